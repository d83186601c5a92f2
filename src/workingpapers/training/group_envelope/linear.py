"""Linear regression under the envelope: few groups of columns, or few columns."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted, validate_data

from workingpapers.common.validation import check_integer, check_number
from workingpapers.training.group_envelope._kernels import shrink_factors
from workingpapers.training.group_envelope.envelope import conjugate, wgsef

Vector = Float[np.ndarray, " n_features"]
CHECK_EVERY = 10  # iterations between two evaluations of the duality gap, which cost as much as one iteration


class KGroupRegressor(RegressorMixin, BaseEstimator):
    """Least squares with the group envelope: convex regression towards k groups of columns.

    Minimises over w and the intercept b::

        ||y - X w - b||^2 / (2 n_samples) + lam G_k(w)

    by accelerated proximal gradient steps with restarts, down to a duality gap. The number of nonzero groups falls
    from all to k as `lam` grows, but those that a very large `lam` leaves are merely the groups most correlated with y:
    choose `lam` by validation, and set `refit` for exactly k groups. The group lasso finds sparser solutions at the
    same error; this one keeps groups together that are correlated, as ridge regression does.

    Parameters
    ----------
    k : number of groups, or a fraction of them in (0, 1).
    lam : strength, above 0.
    groups : label of each column's group, shape (n_features,), integers from 0 on without gaps; None makes each column
        one.
    weights : d of each group, positive, shape (n_groups,); None makes them 1.
    fit_intercept : whether to estimate b, which is not penalised.
    refit : keep the k groups of largest norm and fit them by least squares without penalty.
    warm_start : start from the last fit's `coef_`.
    max_iter : at least 1.
    tol : duality gap to reach, as a share of ``||y - mean(y)||^2 / (2 n_samples)``.

    Attributes
    ----------
    coef_ : shape (n_features,).
    intercept_ : a number.
    groups_ : labels of the groups that are not 0, ascending.
    n_iter_ : iterations made.
    dual_gap_ : reached, in units of the objective (before the refit).

    Warns
    -----
    ConvergenceWarning : the gap was not reached.
    """

    def __init__(
        self,
        k: int | float = 0.5,
        lam: float = 1.0,
        groups: Int[np.ndarray, " n_features"] | None = None,
        weights: Float[np.ndarray, " n_groups"] | None = None,
        *,
        fit_intercept: bool = True,
        refit: bool = False,
        warm_start: bool = False,
        max_iter: int = 10_000,
        tol: float = 1e-6,
    ) -> None:
        self.k = k
        self.lam = lam
        self.groups = groups
        self.weights = weights
        self.fit_intercept = fit_intercept
        self.refit = refit
        self.warm_start = warm_start
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, X: Any, y: Any) -> KGroupRegressor:
        """Fit to columns X, shape (n_samples, n_features), and responses y, shape (n_samples,)."""
        lam = check_number("lam", self.lam, above=0.0)
        max_iter = check_integer("max_iter", self.max_iter, at_least=1)
        tol = check_number("tol", self.tol, at_least=0.0)
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        labels = self._labels(X.shape[1])
        m = int(labels.max()) + 1
        k, d = _count(self.k, m), _weights(self.weights, m)
        center, level = (X.mean(0), y.mean()) if self.fit_intercept else (np.zeros(X.shape[1]), 0.0)
        A, b = X - center, y - level
        start: np.ndarray = np.zeros(X.shape[1])
        if self.warm_start:
            start = getattr(self, "coef_", start)
        if len(start) != X.shape[1]:
            raise ValueError(f"X must have the {len(start)} columns of the fit to start from, got {X.shape[1]}")
        w, gap, iterations = _fista(A, b, start, labels, d, k, lam, tol, max_iter)
        allowed = tol * 0.5 * float(b @ b) / len(b)
        if gap > allowed:
            message = f"stopped after {iterations} iterations with duality gap {gap:.1e} > {allowed:.1e}"
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
        if self.refit:
            norms = _norms(w, labels, m)
            chosen = np.argsort(-norms, kind="stable")[:k]
            columns = np.isin(labels, chosen[norms[chosen] > 0])
            w = np.zeros_like(w)
            w[columns] = np.linalg.lstsq(A[:, columns], b, rcond=None)[0]
        self.coef_ = w
        self.intercept_ = float(level - center @ w)
        self.groups_ = np.unique(labels[w != 0])
        self.n_iter_ = iterations
        self.dual_gap_ = gap
        return self

    def predict(self, X: Any) -> Float[np.ndarray, " n_samples"]:
        """Responses for columns X, shape (n_samples, n_features)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        prediction: np.ndarray = X @ self.coef_ + self.intercept_
        return prediction

    def _labels(self, columns: int) -> Int[np.ndarray, " n_features"]:
        if self.groups is None:
            return np.arange(columns)
        labels = np.asarray(self.groups)
        if labels.shape != (columns,) or labels.dtype.kind not in "iu":
            raise ValueError(f"groups must be {columns} integers, one for each column, got shape {labels.shape}")
        present = np.unique(labels)
        if not np.array_equal(present, np.arange(len(present))):
            raise ValueError(f"groups must be numbered from 0 on without gaps, got labels {present[:10].tolist()}")
        return labels.astype(np.int64)


class KSupportRegressor(KGroupRegressor):
    """Least squares with half the squared k-support norm: `KGroupRegressor` with every column a group.

    Between ridge regression (k = n_features) and, up to the square of the norm, the lasso (k = 1).

    Reference: Argyriou, Foygel and Srebro, "Sparse Prediction with the k-Support Norm", NIPS 2012.
    """

    def __init__(
        self,
        k: int | float = 0.5,
        lam: float = 1.0,
        *,
        fit_intercept: bool = True,
        refit: bool = False,
        warm_start: bool = False,
        max_iter: int = 10_000,
        tol: float = 1e-6,
    ) -> None:
        super().__init__(
            k,
            lam,
            fit_intercept=fit_intercept,
            refit=refit,
            warm_start=warm_start,
            max_iter=max_iter,
            tol=tol,
        )


def _fista(
    A: Float[np.ndarray, "n p"],
    b: Float[np.ndarray, " n"],
    start: Vector,
    labels: Int[np.ndarray, " p"],
    d: Float[np.ndarray, " m"],
    k: int,
    lam: float,
    tol: float,
    max_iter: int,
) -> tuple[Vector, float, int]:
    """Coefficients, duality gap and iterations."""
    n = len(b)
    lipschitz = float(np.linalg.norm(A, 2)) ** 2 / n
    target = tol * 0.5 * float(b @ b) / n
    w = start.copy()
    gap = _gap(A, b, w, labels, d, k, lam)
    if lipschitz == 0.0:
        w[:] = 0.0
        return w, _gap(A, b, w, labels, d, k, lam), 0
    z, t, iteration = w, 1.0, 0
    while gap > target and iteration < max_iter:
        iteration += 1
        moved = z - A.T @ (A @ z - b) / (n * lipschitz)
        factors = shrink_factors(_norms(moved, labels, len(d))[None], d, lam / lipschitz, k)[0]
        w_next = moved * factors[labels]
        step = w_next - w
        if (z - w_next) @ step > 0.0:  # the momentum points uphill: forget it
            t = 1.0
        t_next = 0.5 * (1.0 + np.sqrt(1.0 + 4.0 * t * t))
        z = w_next + (t - 1.0) / t_next * step
        w, t = w_next, t_next
        if iteration % CHECK_EVERY == 0 or iteration == max_iter:
            gap = _gap(A, b, w, labels, d, k, lam)
    return w, gap, iteration


def _gap(
    A: Float[np.ndarray, "n p"],
    b: Float[np.ndarray, " n"],
    w: Vector,
    labels: Int[np.ndarray, " p"],
    d: Float[np.ndarray, " m"],
    k: int,
    lam: float,
) -> float:
    """Objective at w minus that of the dual at the scaled residual; every dual point is feasible."""
    n, residual = len(b), b - A @ w
    primal = 0.5 * float(residual @ residual) / n + lam * float(wgsef(_norms(w, labels, len(d)), d, k))
    # max over nu of <nu, b> - (n / 2) ||nu||^2 - lam G*(A^T nu / lam), at nu = residual / n
    nu = residual / n
    conjugate_value = float(conjugate(_norms(A.T @ nu, labels, len(d)) / lam, d, k))
    dual = float(nu @ b) - 0.5 * n * float(nu @ nu) - lam * conjugate_value
    return max(primal - dual, 0.0)


def _norms(w: Vector, labels: Int[np.ndarray, " p"], m: int) -> Float[np.ndarray, " m"]:
    norms: np.ndarray = np.sqrt(np.bincount(labels, w * w, m))
    return norms


def _count(k: Any, m: int) -> int:
    if isinstance(k, float):
        return max(1, round(check_number("k", k, above=0.0, below=1.0) * m))
    return check_integer("k", k, at_least=1, at_most=m)


def _weights(weights: Any, m: int) -> Float[np.ndarray, " m"]:
    d = np.ones(m) if weights is None else np.array(weights, dtype=float)
    if d.shape != (m,) or not (np.isfinite(d) & (d > 0)).all():
        raise ValueError(f"weights must be {m} positive numbers, one for each group, got {weights!r}")
    return d
