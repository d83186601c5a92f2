"""The estimator: alternating minimisation with regressions solved by sketched, warm-started conjugate gradients."""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from workingpapers.common.validation import check_number
from workingpapers.optimization.matrix_completion.alternating import Callback, Completion, HeldOut, alternate
from workingpapers.optimization.matrix_completion.observed import Observed
from workingpapers.optimization.matrix_completion.regression import Inner, Sketch, Solver, weighted_multi_regression

_AUTOMATIC = 0.1  # relative accuracy of the regressions that costs no sweeps


class RobustAltMin(TransformerMixin, BaseEstimator):
    """Low-rank completion by alternating minimisation that tolerates inexact regressions.

    Seeks X = U V^T of rank k that minimises |P_O(X - M)|_F^2 + reg |X|_F^2. From a spectral start, one sweep is

        V = argmin_V |P_O(U V^T - M)|_F^2 + reg |V|_F^2,   V <- Q of V = Q R,
        U = argmin_U |P_O(U V^T - M)|_F^2 + reg |U|_F^2,   U <- Q of U = Q R,

    where the columns of the fixed factor are orthonormal, so |V|_F is |X|_F. Each argmin is one small regression per
    row or column, solved only until its preconditioned gradient has shrunk to `inner_tol` of its value at the previous
    completion. M should be incoherent: no row or column may carry much of a singular vector.

    Parameters
    ----------
    rank : k, from 1 to min(m, n). Without `reg`, at most 10 % of the rows and columns may have fewer entries.
    tol : at least 0; stop when a sweep changes the completion at the observed entries by at most this, relative.
    max_sweeps : at least 1.
    inner : "sketch" for conjugate gradients preconditioned with the R of a sketch's QR factorisation, the method of
        the paper; "cg" with a diagonal preconditioner, the cheapest where M is incoherent indeed; "exact" for normal
        equations; "qr" for QR factorisations.
    sketch : "countsketch" or "srht", see `weighted_multi_regression`.
    sketch_factor : at least 2; the sketch has this times k rows.
    inner_tol : in [0, 1); "auto" is 0.1, and no steps are spent below 0.1 `tol` of the entries' norm. 0 makes
        `max_inner` steps everywhere.
    sample_splitting : use other entries in every half-step, 2 max_sweeps + 1 parts in all, as the analysis does. Only
        for studying it: reusing all entries needs far fewer of them, though nothing is proved about it.
    warm_start_rows : start the regressions from the previous completion. With cold starts the error stalls at what
        `max_inner` steps leave.
    max_inner : at least 1, most steps for a regression.
    validation_fraction : in [0, 1), share of the entries that are left out and measured on.
    incoherence : mu, see `clip_rows`, applied to the start; estimated by default.
    reg : at least 0, in units of one observation per entry.
    n_jobs : threads, as in joblib: None for one, -1 for all cores. They do not change the result beyond the rounding
        of sums over entries.
    callback : called with (sweep, U, V) after each sweep; a true answer stops. It must not change U or V.
    random_state : seed or generator.

    Attributes
    ----------
    U_ : (m, k), carries the scale. V_ : (n, k), with orthonormal columns.
    history_ : one row for each sweep, columns by name; see `Completion`.
    n_sweeps_ : sweeps made.
    converged_, n_fallbacks_ : see `Completion`; `fit` warns with a `ConvergenceWarning` if not converged.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> M = rng.standard_normal((100, 3)) @ rng.standard_normal((3, 80))
    >>> model = RobustAltMin(3, random_state=0).fit(np.where(rng.random(M.shape) < 0.3, M, np.nan))
    >>> bool(np.allclose(model.complete(), M, atol=1e-3))
    True
    """

    def __init__(
        self,
        rank: int,
        tol: float = 1e-6,
        max_sweeps: int = 50,
        *,
        inner: Inner = "sketch",
        sketch: Sketch = "countsketch",
        sketch_factor: int = 4,
        inner_tol: float | Literal["auto"] = "auto",
        sample_splitting: bool = False,
        warm_start_rows: bool = True,
        max_inner: int = 30,
        validation_fraction: float = 0.0,
        incoherence: float | None = None,
        reg: float = 0.0,
        n_jobs: int | None = None,
        callback: Callback | None = None,
        random_state: int | np.random.Generator | None = None,
    ) -> None:
        self.rank = rank
        self.tol = tol
        self.max_sweeps = max_sweeps
        self.inner = inner
        self.sketch = sketch
        self.sketch_factor = sketch_factor
        self.inner_tol = inner_tol
        self.sample_splitting = sample_splitting
        self.warm_start_rows = warm_start_rows
        self.max_inner = max_inner
        self.validation_fraction = validation_fraction
        self.incoherence = incoherence
        self.reg = reg
        self.n_jobs = n_jobs
        self.callback = callback
        self.random_state = random_state

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = tags.input_tags.allow_nan = True
        return tags

    def fit(self, X: Any, y: object = None) -> Self:
        """Complete a partly observed matrix.

        Parameters
        ----------
        X : (m, n); a SciPy sparse matrix or array of any format, whose stored entries are the observed ones, zeros
            included; or an array with NaN where not observed. float32 is kept (the factors are then good to about
            1e-3), everything else computed in float64.
        y : ignored.

        Raises
        ------
        ValueError, TypeError : X is not finite, has no entry or gives one entry two values; too many rows or columns
            have fewer entries than the rank; a parameter is out of range.

        Warns
        -----
        ConvergenceWarning : `tol` was not reached.
        RuntimeWarning : rows or columns have no entry, or all entries are zero.
        """
        automatic = self.inner_tol == "auto"
        if isinstance(self.inner_tol, str) and not automatic:
            raise ValueError(f"inner_tol must be 'auto' or a number, got {self.inner_tol!r}")
        solver = Solver(
            self.inner,
            self.sketch,
            self.sketch_factor,
            _AUTOMATIC if isinstance(self.inner_tol, str) else self.inner_tol,
            self.max_inner,
            self.reg,
            self.n_jobs,
        )
        check_number("validation_fraction", self.validation_fraction, at_least=0.0, below=1.0)
        rng = np.random.default_rng(self.random_state)
        observed = Observed.of(X)
        held_out = None
        if self.validation_fraction > 0.0:
            chosen = rng.random(observed.size) < self.validation_fraction
            if chosen.all() or not chosen.any():
                raise ValueError(
                    f"validation_fraction={self.validation_fraction:g} leaves {chosen.sum()} of {observed.size} "
                    "entries to measure on and the others to fit: both need some"
                )
            held_out = HeldOut(
                observed.rows()[chosen], observed.indices[chosen].astype(np.int64), observed.values[chosen]
            )
            observed = observed.part(~chosen)
        found = alternate(
            observed,
            self.rank,
            solver,
            tol=self.tol,
            max_sweeps=self.max_sweeps,
            rng=rng,
            sample_splitting=self.sample_splitting,
            warm_start_rows=self.warm_start_rows,
            adaptive_floor=automatic,
            incoherence=self.incoherence,
            held_out=held_out,
            callback=self.callback,
        )
        self.n_features_in_ = observed.shape[1]
        self.U_, self.V_, self.history_ = found.U, found.V, found.history
        self.n_sweeps_, self.converged_, self.n_fallbacks_ = found.n_iterations, found.converged, found.n_fallbacks
        self._completion = found
        return self

    def transform(self, X: Any) -> Float[np.ndarray, "q k"]:
        """Coordinates of other rows in the basis V_, from their observed entries: fold-in of new users.

        Parameters
        ----------
        X : (q, n), as for `fit`. Rows without entries get zeros.

        Returns
        -------
        U : (q, k); U @ V_.T completes X.
        """
        check_is_fitted(self)
        observed = self._observed(X)
        return weighted_multi_regression(self.V_, observed.csr.T, inner="exact", reg=self.reg, n_jobs=self.n_jobs).V

    def complete(self) -> Float[np.ndarray, "m n"]:
        """All m n entries of the completion, as a dense array."""
        check_is_fitted(self)
        return self._completion.complete()

    def predict(self, rows: Int[np.ndarray, " e"], columns: Int[np.ndarray, " e"]) -> Float[np.ndarray, " e"]:
        """The entries (rows[i], columns[i]) of the completion.

        Parameters
        ----------
        rows, columns : integers from 0 to m - 1 and from 0 to n - 1, as many of one as of the other.
        """
        check_is_fitted(self)
        return self._completion.predict(rows, columns)

    def score(self, X: Any, y: object = None) -> float:
        """Minus the root mean square error at the observed entries of X, shape (m, n): higher is better.

        Give entries that `fit` has not seen: the fit to those it has can be perfect and worthless.
        """
        check_is_fitted(self)
        observed = self._observed(X)
        if observed.shape != (len(self.U_), len(self.V_)):
            raise ValueError(f"X must have shape {(len(self.U_), len(self.V_))} as in fit, got {observed.shape}")
        errors = self._completion.predict(observed.rows(), observed.indices) - observed.values
        return -float(np.sqrt(np.mean(errors**2)))

    def completion(self) -> Completion:
        """What the fit found, in the form that the baselines return."""
        check_is_fitted(self)
        return self._completion

    def _observed(self, X: Any) -> Observed:
        observed = Observed.of(X)
        if observed.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {observed.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} "
                "features as input"
            )
        return observed
