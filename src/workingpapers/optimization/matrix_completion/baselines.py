"""What robust alternating minimisation is measured against: exact least squares, and the nuclear norm."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.extmath import randomized_svd

from workingpapers.common.validation import check_choice, check_integer, check_number
from workingpapers.optimization.matrix_completion import _kernels as kernels
from workingpapers.optimization.matrix_completion.alternating import Callback, Completion, alternate
from workingpapers.optimization.matrix_completion.observed import Matrix, Observed, warn_about_empty
from workingpapers.optimization.matrix_completion.regression import Solver
from workingpapers.optimization.matrix_completion.spectral import check_rank
from workingpapers.optimization.result import History


def exact_als(
    X: Any,
    rank: int,
    *,
    solver: Literal["normal", "qr"] = "normal",
    reg: float = 0.0,
    tol: float = 1e-6,
    max_sweeps: int = 50,
    incoherence: float | None = None,
    n_jobs: int | None = None,
    callback: Callback | None = None,
    random_state: int | np.random.Generator | None = None,
) -> Completion:
    """Alternating least squares with every regression solved exactly, at s k^2 / 2 multiply-adds for s entries.

    The algorithm of Jain, Netrapalli and Sanghavi (2013) on all entries in every half-step: the iterates that
    `RobustAltMin` approximates. Below a rank of a few dozen it is the faster of the two.

    Parameters
    ----------
    X, rank, reg, tol, max_sweeps, incoherence, n_jobs, callback, random_state : as for `RobustAltMin`.
    solver : "normal" for normal equations by Cholesky factorisation; "qr" for a QR factorisation of every regression,
        about twice the multiply-adds, for factors so ill-conditioned that squaring their condition matters.

    Raises
    ------
    ValueError, TypeError : an argument is out of range; see `RobustAltMin.fit`.

    Warns
    -----
    ConvergenceWarning : `tol` was not reached.
    """
    check_choice("solver", solver, ("normal", "qr"))
    return alternate(
        Observed.of(X),
        rank,
        Solver("exact" if solver == "normal" else "qr", reg=reg, n_jobs=n_jobs),
        tol=tol,
        max_sweeps=max_sweeps,
        rng=np.random.default_rng(random_state),
        incoherence=incoherence,
        callback=callback,
    )


def soft_impute(
    X: Any,
    shrinkage: float,
    rank: int,
    *,
    tol: float = 1e-5,
    max_sweeps: int = 200,
    callback: Callback | None = None,
    random_state: int | np.random.Generator | None = None,
) -> Completion:
    """Completion with small nuclear norm: minimise |P_O(X - M)|_F^2 / 2 + shrinkage |X|_* over X of limited rank.

    Each half-step fills the missing entries from the current completion and makes one ridge regression with the same
    matrix for all rows (softImpute-ALS), in O(|O| k + (m + n) k^2). If the found rank is below `rank`, X solves the
    problem without the limit too.

    Parameters
    ----------
    X : as for `RobustAltMin.fit`.
    shrinkage : positive, subtracted from the singular values of the filled matrix; from the largest singular value of
        the observed entries on, the completion is zero.
    rank : largest rank allowed, from 1 to min(m, n).
    tol, max_sweeps, callback, random_state : as for `RobustAltMin`.

    Raises
    ------
    ValueError, TypeError : an argument is out of range.

    Warns
    -----
    ConvergenceWarning : `tol` was not reached.

    References
    ----------
    Hastie, Mazumder, Lee and Zadeh, "Matrix Completion and Low-Rank SVD via Fast Alternating Least Squares", 2015.
    """
    check_number("shrinkage", shrinkage, above=0.0)
    check_number("tol", tol, at_least=0.0)
    check_integer("max_sweeps", max_sweeps, at_least=1)
    observed = Observed.of(X)
    check_rank(rank, observed.shape)
    warn_about_empty(observed, 3)
    rng = np.random.default_rng(random_state)
    size = observed.norm
    if size == 0.0:
        message = "all observed entries are zero; so is the completion"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        (m, n), dtype = observed.shape, observed.values.dtype
        zero = (np.zeros((m, rank), dtype), np.eye(n, rank, dtype=dtype))
        return Completion(x=zero, fun=0.0, converged=True, message=message, n_iterations=0, history=History({}))

    # the completion is U diag(sigma) V^T; unshrunk at the start, as a zero in sigma would stay one
    U, sigma, Vt = randomized_svd(observed.csr, rank, n_iter=2, random_state=int(rng.integers(2**31)))
    U, V = np.ascontiguousarray(U), np.ascontiguousarray(Vt.T)
    residual = sp.csr_array((observed.values.copy(), observed.indices, observed.indptr), shape=observed.shape)
    fitted = np.zeros_like(observed.values)

    def compare(scaled: Matrix, V: Matrix) -> tuple[float, float, float]:
        """Bring `fitted` and `residual` up to date."""
        sums: tuple[float, float, float] = kernels.compare(
            0, observed.shape[0], observed.indptr, observed.indices, observed.values, scaled, V, fitted
        )
        residual.data[:] = observed.values - fitted
        return sums

    compare(U * sigma, V)
    records: list[dict[str, float]] = []
    converged = False
    for sweep in range(max_sweeps):
        began = time.perf_counter()
        before = fitted.copy()
        U, sigma, V = _ridge_half_step(residual.T, U, sigma, V, shrinkage)
        compare(U * sigma, V)
        V, sigma, U = _ridge_half_step(residual, V, sigma, U, shrinkage)
        residuals, _, squares = compare(U * sigma, V)
        if not math.isfinite(residuals):
            raise FloatingPointError(f"sweep {sweep + 1} is not finite: is X too large for its type?")
        change = float(np.linalg.norm(fitted - before)) / math.sqrt(squares) if squares else 0.0
        records.append(
            {
                "iteration": sweep + 1,
                "fun": float(residuals / 2.0 + shrinkage * sigma.sum()),
                "train_rmse": math.sqrt(residuals / observed.size),
                "change": change,
                "seconds": time.perf_counter() - began,
            }
        )
        converged = change <= tol
        if converged or (callback is not None and callback(sweep + 1, U * sigma, V)):
            break
    message = f"change {change:.1e} {'<=' if converged else '>'} tol {tol:.1e} after {len(records)} sweeps"
    if not converged and len(records) == max_sweeps and tol > 0.0:
        warnings.warn(message, ConvergenceWarning, stacklevel=2)

    # one step of SoftImpute itself within the space found: the singular values of the filled matrix, shrunk
    U, sigma, Rt = np.linalg.svd(residual @ V + U * sigma, full_matrices=False)
    sigma = np.maximum(sigma - shrinkage, 0.0)
    scaled, V = U * sigma, V @ Rt.T
    residuals, _, _ = compare(scaled, V)
    return Completion(
        x=(scaled, V),
        fun=float(residuals / 2.0 + shrinkage * sigma.sum()),
        converged=converged,
        message=message,
        n_iterations=len(records),
        history=History.of(records),
    )


def _ridge_half_step(
    residual: Any, U: Matrix, sigma: np.ndarray, V: Matrix, shrinkage: float
) -> tuple[Matrix, np.ndarray, Matrix]:
    """The best B for A = U D, D^2 = diag(sigma), on the filled matrix; back in the form U diag(sigma) V^T.

    B = X^T A (A^T A + shrinkage I)^{-1} with X = P_O(M - A B^T) + A B^T, of which only the first part, transposed, is
    given as `residual`: X^T A = residual A + B D^2.
    """
    D = np.sqrt(sigma)
    B = (residual @ (U * D) + V * (D * sigma)) / (sigma + shrinkage)
    V, sigma, Rt = np.linalg.svd(B * D, full_matrices=False)
    return np.ascontiguousarray(U @ Rt.T), sigma, np.ascontiguousarray(V)
