"""How the extreme eigenvalues of a batch's curvature, and with them the largest learning rates, depend on its size."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import brentq, isotonic_regression, nnls

from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number

CurveModel = Literal["additive", "multiplicative", "empirical"]
Rule = Literal["linear", "sqrt", "measured"]
Numbers: TypeAlias = Float[np.ndarray, "*batches"]


def effective_batch(B: ArrayLike, N: int | None = None) -> Numbers:
    """b = B / (1 - B / N): the size of an independent sample as noisy as B of N drawn without replacement.

    Parameters
    ----------
    B : batch size or sizes, from 1 to N.
    N : samples in all; None for fresh samples without end, where b = B.

    Returns
    -------
    array of the shape of B : infinite at B = N, where nothing is left to chance.
    """
    with np.errstate(divide="ignore"):
        return np.asarray(1.0 / _inverse_batch(B, N))[()]


def _inverse_batch(B: ArrayLike, N: int | None) -> Numbers:
    """1 / b = 1 / B - 1 / N."""
    sizes = np.asarray(B)
    if sizes.dtype.kind not in "iuf":
        raise TypeError(f"B must be numbers, got {B!r}")
    sizes = sizes.astype(float)
    check_finite("B", sizes)
    if (sizes < 1).any():
        raise ValueError(f"B must be at least 1, got {sizes.min():g}")
    if N is None:
        return np.asarray(1.0 / sizes)
    N = check_integer("N", N, at_least=1)
    if (sizes > N).any():
        raise ValueError(f"B must be at most N = {N}, got {sizes.max():g}")
    return np.asarray(1.0 / sizes - 1.0 / N)


# --------------------------------------------------------------------------------------------------------------------
# Predictions from the full spectrum


class Extremal(NamedTuple):
    """Predicted extreme eigenvalues of a batch Hessian, and squared overlaps of their vectors with the full ones."""

    top: Numbers
    bottom: Numbers
    top_overlap: Numbers
    bottom_overlap: Numbers


def predict_extremal(lam1: float, lamP: float, P: int, sigma2: float, B: ArrayLike, N: int | None = None) -> Extremal:
    """Extreme eigenvalues of a batch Hessian H_emp + noise, the noise symmetric with independent entries.

    The paper's law for the Hessian, in the limit of P and b to infinity at a fixed ratio. With entries of variance
    sigma^2 / b the noise has its spectrum in +-2 sigma sqrt(P / b), and an eigenvalue of H_emp shows if it is beyond
    half of that. Where samples have Hessians of low rank (linear models, networks near a fit) the noise is no such
    matrix, and this law gives too little: see `predict_ggn` and `fit_batch_curve`.

    Parameters
    ----------
    lam1, lamP : largest and smallest eigenvalue of H_emp, the Hessian of all samples.
    P : number of parameters.
    sigma2 : sigma^2, see `noise_variance`; at least 0.
    B, N : batch size or sizes, and samples in all, as for `effective_batch`.
    """
    lam1, lamP = check_number("lam1", lam1), check_number("lamP", lamP, at_most=lam1)
    sigma2 = check_number("sigma2", sigma2, at_least=0)
    noise = check_integer("P", P, at_least=1) * sigma2 * _inverse_batch(B, N)  # (P / b) sigma^2
    top, top_overlap = _spike(lam1, noise)
    bottom, bottom_overlap = _spike(-lamP, noise)
    return Extremal(top, -bottom, top_overlap, bottom_overlap)


def _spike(lam: float, noise: Numbers) -> tuple[Numbers, Numbers]:
    if lam <= 0:  # inside the noise, whatever its size
        return 2.0 * np.sqrt(noise), np.zeros_like(noise)[()]
    seen = lam**2 > noise
    # lambda' = lambda + (P / b) sigma^2 / lambda beyond the threshold, else the edge 2 sigma sqrt(P / b)
    value = np.where(seen, lam + noise / lam, 2.0 * np.sqrt(noise))
    return value[()], np.where(seen, 1.0 - noise / lam**2, 0.0)[()]


def predict_ggn(lam1: float, s2: float, p_eff: float, B: ArrayLike, N: int | None = None) -> Numbers:
    """Largest eigenvalue of a batch's generalised Gauss-Newton matrix, by the law of spiked sample covariances.

    A batch's GGN is a mean of B matrices of low rank, as a covariance of B samples is. With q = P_eff / b its bulk ends
    at s^2 (1 + sqrt q)^2 (Marchenko and Pastur), and an eigenvalue l s^2 of the full matrix shows, as
    l s^2 (1 + q / (l - 1)), if l > 1 + sqrt q (Baik and Silverstein). The paper's theorem has this shape; that its
    constants are these has not been checked.

    Parameters
    ----------
    lam1 : largest eigenvalue of the full matrix, at least 0.
    s2 : s^2 > 0, the eigenvalue of its bulk.
    p_eff : dimension of the bulk, at least 0.
    B, N : as for `effective_batch`.
    """
    lam1, s2 = check_number("lam1", lam1, at_least=0), check_number("s2", s2, above=0)
    q = check_number("p_eff", p_eff, at_least=0) * _inverse_batch(B, N)
    ratio = lam1 / s2
    edge = s2 * (1.0 + np.sqrt(q)) ** 2
    if ratio <= 1:
        return edge
    return np.where(ratio > 1.0 + np.sqrt(q), lam1 * (1.0 + q / (ratio - 1.0)), edge)[()]


def gaussian_regression_max_lr(H_eigenvalues: ArrayLike, B: int) -> float:
    """Exact limit of stability of SGD on least squares with Gaussian features x ~ N(0, H), fresh batches of size B.

    Below it the mean square error of the weights goes to 0 (without label noise) in every direction that H sees,
    above it it grows. It is where the spectral radius of the second-moment recursion
    diag((1 - a l)^2 + a^2 l^2 / B) + (a^2 / B) l l^T reaches 1, hence the root of

        (a / B) sum_j l_j / (2 - a l_j (1 + 1 / B)) = 1  on  0 < a < 2 / (l_1 (1 + 1 / B)),

    which is 2 / (l + (d + 1) l / B) for d equal eigenvalues l. Not from the paper: a check of its laws.

    Parameters
    ----------
    H_eigenvalues : at least 0 and not all 0, for the loss ||X w - y||^2 / (2 B).
    B : batch size, at least 1.
    """
    eigenvalues = np.asarray(H_eigenvalues, dtype=float).ravel()
    check_finite("H_eigenvalues", eigenvalues)
    if not eigenvalues.size or (eigenvalues < 0).any() or not (eigenvalues > 0).any():
        raise ValueError("H_eigenvalues must be at least 0 and not all 0")
    B = check_integer("B", B, at_least=1)
    scaled = eigenvalues / eigenvalues.max()  # a in units of 1 / l_1, so that any size of H will do

    def excess(a: float) -> float:
        return float(a / B * np.sum(scaled / (2.0 - a * (1.0 + 1.0 / B) * scaled))) - 1.0

    highest = 2.0 * B / (B + 2.0)  # where the term of l_1 alone reaches 1
    limit = highest if excess(highest) <= 0 else brentq(excess, 0.0, highest, xtol=1e-15, rtol=1e-14)
    return float(limit / eigenvalues.max())


# --------------------------------------------------------------------------------------------------------------------
# Curves fitted to measured eigenvalues


@dataclass(frozen=True)
class BatchCurve:
    """lambda'(B), the largest eigenvalue of a batch's curvature as a function of the batch size: call it with B.

    Attributes
    ----------
    model : "additive", a + c / b; "multiplicative", s^2 (1 + sqrt(P_eff / b))^2; or "empirical", the measured values
        made non-increasing and joined by straight lines in sqrt(lambda) over b^(-1/2).
    lam1 : lambda' for infinite b: the top eigenvalue of all samples as this curve sees it (empirical: the last value).
    bstar : effective batch at which lambda' is twice lam1: much below it larger batches allow larger rates, much above
        it they do not. Infinite where lam1 is 0; None where an empirical curve does not get that far.
    Psigma2 : P sigma^2 of the additive model, else None.
    p_eff : effective dimension of the multiplicative model (its bulk scale s^2 is lam1), else None.
    N : samples in all, or None for fresh ones.
    sizes, measured : what was fitted, by increasing batch size.
    residuals : log lambda'(B_i) - log lambda_i.
    rival : with model="auto", the curve of the other law.
    """

    model: CurveModel
    lam1: float
    bstar: float | None
    Psigma2: float | None
    p_eff: float | None
    N: int | None
    sizes: Float[np.ndarray, " sizes"]
    measured: Float[np.ndarray, " sizes"]
    residuals: Float[np.ndarray, " sizes"]
    rival: BatchCurve | None
    _coefficients: tuple[float, float] | None  # (a, c), or (s, t) with t / sqrt b added to s
    _knots: Float[np.ndarray, " knots"] | None  # sqrt(lambda) by increasing batch size

    def __call__(self, B: ArrayLike) -> Numbers:
        """lambda'(B), for one batch size or several.

        Warns
        -----
        UserWarning : B is below the smallest measured size, where the curve is a guess.
        """
        inverse = _inverse_batch(B, self.N)
        if (np.asarray(B) < self.sizes[0]).any():
            warnings.warn(
                f"B = {np.min(B):g} is below the smallest measured batch size {self.sizes[0]:g}", stacklevel=2
            )
        return np.asarray(self._at(inverse))[()]

    def r_squared(self) -> float:
        """Share of the variance of log lambda that the curve explains."""
        logs = np.log(self.measured)
        spread = float(np.sum((logs - logs.mean()) ** 2))
        return 1.0 - float(np.sum(self.residuals**2)) / spread if spread > 0 else float(not np.any(self.residuals))

    def _at(self, inverse: Numbers) -> Numbers:
        if self._coefficients is not None:
            constant, rise = self._coefficients
            if self.model == "additive":
                return np.asarray(constant + rise * inverse)  # lambda' = a + c / b
            return np.asarray((constant + rise * np.sqrt(inverse)) ** 2)  # sqrt(lambda') = s + t / sqrt b
        assert self._knots is not None
        x = np.sqrt(_inverse_batch(self.sizes, self.N))
        at = np.sqrt(inverse)
        roots = np.interp(at, x[::-1], self._knots[::-1])  # constant beyond the largest size, which is cautious
        slope = (self._knots[0] - self._knots[1]) / (x[0] - x[1])
        return np.asarray(np.where(at > x[0], self._knots[0] + slope * (at - x[0]), roots) ** 2)


def fit_batch_curve(
    B: ArrayLike, lam: ArrayLike, N: int | None = None, model: CurveModel | Literal["auto"] = "auto"
) -> BatchCurve:
    """Fit lambda'(B) to measured top eigenvalues.

    Both laws are linear after a transform, so the fit is a least-squares problem in relative residuals with two
    coefficients of at least 0, and needs no start: sum (( a + c / b_i) / lambda_i - 1)^2 for the additive law,
    sum ((s + t / sqrt b_i) / sqrt(lambda_i) - 1)^2 for the multiplicative one.

    Parameters
    ----------
    B : measured batch sizes, at least three different ones (two for "empirical").
    lam : lambda_1(B_i), positive, see `batch_top_eigenvalue`.
    N : samples in all, as for `effective_batch`.
    model : "auto" takes the law with the smaller sum of squared log residuals.

    Raises
    ------
    ValueError : too few sizes, lengths that differ, or eigenvalues that are not positive and finite.
    """
    check_choice("model", model, (*get_args(CurveModel), "auto"))
    sizes, values = np.atleast_1d(np.asarray(B, dtype=float)), np.atleast_1d(np.asarray(lam, dtype=float))
    if sizes.ndim != 1 or sizes.shape != values.shape:
        raise ValueError(f"B and lam must be vectors of one length, got shapes {sizes.shape} and {values.shape}")
    inverse = _inverse_batch(sizes, N)
    check_finite("lam", values)
    if (values <= 0).any():
        raise ValueError(f"lam must be positive, got {values.min():g}")
    needed = 2 if model == "empirical" else 3
    if len(np.unique(sizes)) < needed:
        raise ValueError(f"B must hold at least {needed} different sizes, got {len(np.unique(sizes))}")
    order = np.argsort(sizes, kind="stable")
    sizes, values, inverse = sizes[order], values[order], inverse[order]
    if model == "empirical":
        return _empirical(sizes, values, inverse, N)
    if model == "auto":
        laws = [_fit_law(law, sizes, values, inverse, N, None) for law in ("additive", "multiplicative")]
        best, other = sorted(laws, key=lambda curve: float(np.sum(curve.residuals**2)))
        return _fit_law(best.model, sizes, values, inverse, N, other)
    return _fit_law(model, sizes, values, inverse, N, None)


def _fit_law(
    law: CurveModel, sizes: Numbers, values: Numbers, inverse: Numbers, N: int | None, rival: BatchCurve | None
) -> BatchCurve:
    additive = law == "additive"
    terms = np.stack([np.ones_like(inverse), inverse if additive else np.sqrt(inverse)], axis=1)
    scale = values if additive else np.sqrt(values)
    constant, rise = (float(found) for found in nnls(terms / scale[:, None], np.ones_like(values))[0])
    fitted = terms @ [constant, rise]
    if additive:
        bstar = rise / constant if constant > 0 else math.inf  # a + c / b = 2 a
        found = {"lam1": constant, "bstar": bstar, "Psigma2": constant * rise, "p_eff": None}
    else:
        p_eff = (rise / constant) ** 2 if constant > 0 else math.inf
        doubling = p_eff / (math.sqrt(2.0) - 1.0) ** 2  # (1 + sqrt(P_eff / b))^2 = 2
        found = {"lam1": constant**2, "bstar": doubling, "Psigma2": None, "p_eff": p_eff}
        fitted = fitted**2
    return BatchCurve(
        model=law,
        N=N,
        sizes=sizes,
        measured=values,
        residuals=np.log(fitted / values),
        rival=rival,
        _coefficients=(constant, rise),
        _knots=None,
        **found,  # type: ignore[arg-type]
    )


def _empirical(sizes: Numbers, values: Numbers, inverse: Numbers, N: int | None) -> BatchCurve:
    """Values of equal sizes averaged, then made non-increasing, both as logarithms."""
    distinct, group = np.unique(sizes, return_inverse=True)
    counts = np.bincount(group)
    logs = np.bincount(group, np.log(values)) / counts
    falling = isotonic_regression(logs, weights=counts, increasing=False).x
    roots = np.exp(0.5 * falling)
    x = np.sqrt(_inverse_batch(distinct, N))
    twice = math.sqrt(2.0) * roots[-1]
    bstar = float(np.interp(twice, roots[::-1], x[::-1]) ** -2) if roots[0] >= twice else None
    return BatchCurve(
        model="empirical",
        lam1=float(roots[-1] ** 2),
        bstar=bstar,
        Psigma2=None,
        p_eff=None,
        N=N,
        sizes=distinct,
        measured=np.exp(logs),
        residuals=falling - logs,
        rival=None,
        _coefficients=None,
        _knots=roots,
    )


# --------------------------------------------------------------------------------------------------------------------
# Learning rates


def max_lr(curve: BatchCurve, B: ArrayLike, momentum: float = 0.0) -> Numbers:
    """Largest stable learning rate of SGD on the quadratic with the curve's curvature.

    2 / (lambda_1 / (1 + momentum) + (lambda'(B) - lambda_1) / (1 - momentum)), which is the paper's 2 / lambda'(B)
    without momentum and its 2 (1 + momentum) / lambda_1 for all samples. Between them the paper has
    2 (1 + momentum) / lambda'(B), which is far too large, since momentum adds up the noise of 1 / (1 - momentum)
    batches. The form here is the exact limit in one dimension: a curvature of mean lambda_1 and variance s^2 that is
    drawn anew in every step, where lambda' = lambda_1 + s^2 / lambda_1.

    Networks may bear more (their curvature falls as they move) or less and, trained at one rate for long, drift until
    their curvature is near this limit: measure the curve at the stage of training where the rate is to hold.

    Parameters
    ----------
    curve : from `fit_batch_curve`.
    B : batch size or sizes.
    momentum : of heavy-ball momentum as `torch.optim.SGD` has it (no dampening, not Nesterov), in [0, 1). The loss may
        overshoot at the start, also below the limit.

    Raises
    ------
    ValueError : the curve is 0 at B, since it was fitted where noise is everything; measure larger batches.
    """
    momentum = check_number("momentum", momentum, at_least=0, below=1)
    curvature = _evaluated(curve, B)
    lasting = np.minimum(curve.lam1, curvature)
    return np.asarray(2.0 / (lasting / (1.0 + momentum) + (curvature - lasting) / (1.0 - momentum)))[()]


def scale_lr(
    lr: float,
    B0: float,
    B: ArrayLike,
    rule: Rule = "measured",
    *,
    bstar: float | None = None,
    curve: BatchCurve | None = None,
    N: int | None = None,
) -> Numbers:
    """The learning rate for batch size B when `lr` was right for B0.

    Parameters
    ----------
    lr : learning rate at B0, above 0.
    B0, B : batch sizes, at least 1; B may be several.
    rule : "linear", lr B / B0, the folklore for SGD; "sqrt", lr sqrt(B / B0), that for Adam and its kind; "measured",
        lr lambda'(B0) / lambda'(B), which is linear or a square root for small batches and levels off for large ones.
    curve : for "measured": a fitted curve, with its own N.
    bstar : for "measured", instead of a curve: the additive law's B*, so that the factor is
        (1 + B* / b0) / (1 + B* / b).
    N : samples in all, for `bstar`.

    Raises
    ------
    ValueError : rule="measured" without one of `curve` and `bstar`, either with another rule, or B out of range.

    Warns
    -----
    UserWarning : the curve is asked for batches below those it was fitted to.
    """
    lr, B0 = check_number("lr", lr, above=0), check_number("B0", B0, at_least=1)
    check_choice("rule", rule, get_args(Rule))
    if (rule == "measured") != ((curve is None) != (bstar is None)):
        raise ValueError('one of curve and bstar is needed for rule="measured", and neither for the other rules')
    if rule != "measured":
        ratio = B0 * _inverse_batch(B, None)  # B_0 / B
        return np.asarray(lr / (ratio if rule == "linear" else np.sqrt(ratio)))[()]
    if curve is not None:
        return np.asarray(lr * _evaluated(curve, B0) / _evaluated(curve, B))[()]
    bstar = check_number("bstar", bstar, at_least=0)
    factor = (1.0 + bstar * _inverse_batch(B0, N)) / (1.0 + bstar * _inverse_batch(B, N))
    return np.asarray(lr * factor)[()]


def _evaluated(curve: BatchCurve, B: ArrayLike) -> Numbers:
    if not isinstance(curve, BatchCurve):
        raise TypeError(f"curve must be a BatchCurve, got {type(curve).__name__}")
    curvature = curve(B)
    if (np.asarray(curvature) <= 0).any():
        raise ValueError("the curve is 0 at this batch size: measure the curvature of larger batches")
    return curvature
