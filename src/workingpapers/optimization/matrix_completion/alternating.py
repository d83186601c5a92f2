"""Alternating minimisation over the two factors, with regressions solved exactly or only nearly."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from joblib import effective_n_jobs
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from workingpapers.common.validation import check_integer, check_number
from workingpapers.optimization.matrix_completion import _kernels as kernels
from workingpapers.optimization.matrix_completion.observed import Matrix, Observed, in_threads, warn_about_empty
from workingpapers.optimization.matrix_completion.regression import Solver
from workingpapers.optimization.matrix_completion.spectral import check_rank, initial_factor, orthonormal
from workingpapers.optimization.result import History, OptimizationResult

Callback = Callable[[int, Matrix, Matrix], object]

_TOO_MANY_SHORT = 0.1  # share of rows or columns with fewer entries than the rank
_FLOOR = 0.1  # share of the tolerance below which solving a regression better changes nothing


@dataclass(frozen=True, eq=False, kw_only=True)
class Completion(OptimizationResult):
    """A completed matrix U V^T, and how it was reached.

    Attributes
    ----------
    x : the pair (U, V): U of shape (m, k) carries the scale, V of shape (n, k) has orthonormal columns.
    fun : the objective at x: |P_O(U V^T - M)|_F^2 + reg |U V^T|_F^2, of `soft_impute`
        |P_O(U V^T - M)|_F^2 / 2 + shrinkage |U V^T|_*.
    n_iterations : sweeps made; one updates both factors.
    converged : whether the last sweep changed the completion by at most the tolerance.
    message : why it stopped, for people.
    history : one row for each sweep. "iteration"; "fun"; "train_rmse" and "heldout_rmse" (where entries were held out)
        are root mean squares over these entries, in units of X; "change" is |P_O(X_t - X_{t-1})| / |P_O(X_t)|;
        "inner_steps" conjugate gradient steps per regression; "operations" multiply-adds; "seconds" of the clock.
    n_fallbacks : regressions solved exactly because their sketch was nearly singular.
    """

    n_fallbacks: int = 0

    @property
    def U(self) -> Float[np.ndarray, "m k"]:  # noqa: N802 - a matrix
        factor: Matrix = self.x[0]
        return factor

    @property
    def V(self) -> Float[np.ndarray, "n k"]:  # noqa: N802
        factor: Matrix = self.x[1]
        return factor

    def complete(self) -> Float[np.ndarray, "m n"]:
        """All m n entries of U V^T."""
        product: Float[np.ndarray, "m n"] = self.U @ self.V.T
        return product

    def predict(self, rows: Int[np.ndarray, " e"], columns: Int[np.ndarray, " e"]) -> Float[np.ndarray, " e"]:
        """The entries (rows[i], columns[i]) of U V^T.

        Raises
        ------
        ValueError : the two differ in length, or an index is not one of the matrix.
        TypeError : they are not integers.
        """
        row_places, column_places = _places("rows", rows, len(self.U)), _places("columns", columns, len(self.V))
        if len(row_places) != len(column_places):
            raise ValueError(f"rows and columns must be as long, got {len(row_places)} and {len(column_places)}")
        out = np.empty(len(row_places), self.U.dtype)
        kernels.entries(row_places, column_places, self.U, self.V, out)
        return out


class HeldOut(NamedTuple):
    """Entries that are not fitted."""

    rows: Int[np.ndarray, " e"]
    columns: Int[np.ndarray, " e"]
    values: Float[np.ndarray, " e"]


def alternate(
    observed: Observed,
    rank: int,
    solver: Solver,
    *,
    tol: float,
    max_sweeps: int,
    rng: np.random.Generator,
    sample_splitting: bool = False,
    warm_start_rows: bool = True,
    adaptive_floor: bool = True,
    incoherence: float | None = None,
    held_out: HeldOut | None = None,
    callback: Callback | None = None,
    stacklevel: int = 3,
) -> Completion:
    """Fit U V^T to the observed entries; see `RobustAltMin` for the method and its parameters."""
    check_rank(rank, observed.shape)
    check_number("tol", tol, at_least=0.0)
    check_integer("max_sweeps", max_sweeps, at_least=1)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {callback!r}")
    _refuse_too_few(observed, rank, solver.reg, 2 * max_sweeps + 1 if sample_splitting else 1)
    warn_about_empty(observed, stacklevel + 1)
    m, n = observed.shape
    size = observed.norm
    if size == 0.0:
        message = "all observed entries are zero; so is the completion"
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)
        dtype = observed.values.dtype
        zero = (np.zeros((m, rank), dtype), np.eye(n, rank, dtype=dtype))
        return Completion(x=zero, fun=0.0, converged=True, message=message, n_iterations=0, history=History({}))

    part = rng.integers(2 * max_sweeps + 1, size=observed.size, dtype=np.int32) if sample_splitting else None

    def sample(index: int) -> Observed:
        return observed if part is None else observed.part(part == index)

    first = sample(0)
    with threadpool_limits(effective_n_jobs(solver.n_jobs), user_api="blas"):
        U = initial_factor(first, rank, incoherence, "scale", rng)
        # A^T A is near p I for the regressions of an incoherent U, so A^T b / p is near their solution
        V_start = np.asarray(first.csr.T @ U) * (m * n / first.size)
        fitted = np.zeros_like(observed.values)
        floor = _FLOOR * tol * size if adaptive_floor else 0.0
        records: list[dict[str, float]] = []
        fallbacks, converged, message = 0, False, ""
        for sweep in range(max_sweeps):
            began = time.perf_counter()
            if not warm_start_rows:
                V_start = np.zeros_like(V_start)
            columns = sample(sweep + 1).transposed
            for_V = solver.solve(columns, U, V_start, int(rng.integers(2**62)), floor / math.sqrt(n))
            V, R = orthonormal(for_V.V)
            # the same completion in the new basis: U (V R)^T = (U R^T) V^T
            U_start = U @ R.T if warm_start_rows else np.zeros_like(U)
            rows = sample(max_sweeps + sweep + 1)
            for_U = solver.solve(rows, V, U_start, int(rng.integers(2**62)), floor / math.sqrt(m))
            U_scaled = for_U.V
            U, R = orthonormal(U_scaled)
            V_start = V @ R.T

            residuals, changes, squares = np.sum(
                list(in_threads(_compare(observed, U_scaled, V, fitted), observed, solver.n_jobs)), axis=0
            )
            if not math.isfinite(residuals):
                raise FloatingPointError(f"sweep {sweep + 1} is not finite: is X too large for its type?")
            change = math.sqrt(changes / squares) if squares else 0.0
            seconds = time.perf_counter() - began
            fallbacks += for_V.n_fallbacks + for_U.n_fallbacks
            records.append(
                {
                    "iteration": sweep + 1,
                    "fun": float(residuals + solver.reg * np.sum(U_scaled.astype(float) ** 2)),  # |U V^T|_F = |U|_F
                    "train_rmse": math.sqrt(residuals / observed.size),
                    "heldout_rmse": _rmse(held_out, U_scaled, V),
                    "change": change,
                    "inner_steps": (for_V.steps + for_U.steps) / (m + n),
                    # regressions; Q and R of both factors and one product with R each; the comparison
                    "operations": float(
                        for_V.operations
                        + for_U.operations
                        + 3 * (m + n) * rank**2
                        - 4 * rank**3 // 3
                        + observed.size * rank
                    ),
                    "seconds": seconds,
                }
            )
            converged = change <= tol
            stopped = callback is not None and bool(callback(sweep + 1, U_scaled, V))
            if converged:
                message = f"change {change:.1e} <= tol {tol:.1e} after {sweep + 1} sweeps"
                break
            if stopped:
                message = f"the callback asked to stop after {sweep + 1} sweeps"
                break
        else:
            message = f"change {change:.1e} > tol {tol:.1e} after {max_sweeps} sweeps"
            if tol > 0.0:
                warnings.warn(message, ConvergenceWarning, stacklevel=stacklevel)
    if held_out is None:
        for row in records:
            del row["heldout_rmse"]
    return Completion(
        x=(U_scaled, V),
        fun=records[-1]["fun"],
        converged=converged,
        message=message,
        n_iterations=len(records),
        history=History.of(records),
        n_fallbacks=fallbacks,
    )


def _compare(
    observed: Observed, U: Matrix, V: Matrix, fitted: Float[np.ndarray, " e"]
) -> Callable[[int, int], tuple[float, float, float]]:
    def work(first: int, last: int) -> tuple[float, float, float]:
        sums: tuple[float, float, float] = kernels.compare(
            first, last, observed.indptr, observed.indices, observed.values, U, V, fitted
        )
        return sums

    return work


def _rmse(held_out: HeldOut | None, U: Matrix, V: Matrix) -> float:
    if held_out is None:
        return math.nan
    predicted = np.empty_like(held_out.values)
    kernels.entries(held_out.rows, held_out.columns, U, V, predicted)
    return float(np.sqrt(np.mean((predicted - held_out.values) ** 2)))


def _places(name: str, indices: Any, size: int) -> Int[np.ndarray, " e"]:
    places = np.asarray(indices)
    if places.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got dtype {places.dtype}")
    if places.ndim != 1:
        raise ValueError(f"{name} must be a vector, got shape {places.shape}")
    if len(places) and not (places.min() >= 0 and places.max() < size):
        raise ValueError(f"{name} must be from 0 to {size - 1}, got {places.min()} to {places.max()}")
    return places.astype(np.int64)


def _refuse_too_few(observed: Observed, rank: int, reg: float, parts: int) -> None:
    """Raise ValueError where the entries cannot determine factors of this rank."""
    m, n = observed.shape
    if parts > 1 and observed.size < parts * rank * max(m, n):
        needed = rank * parts / min(m, n)
        raise ValueError(
            f"sample_splitting makes {parts} parts of {observed.size / parts / max(m, n):.1f} entries per row or "
            f"column, below rank={rank}: a share p = {needed:.2f} of the entries would be needed, "
            f"{observed.size / m / n:.2f} is given"
        )
    if reg > 0.0:
        return
    for name, side in (("rows", observed), ("columns", observed.transposed)):
        counts = side.counts[side.counts > 0]
        short = int((counts < rank).sum())
        if short > _TOO_MANY_SHORT * len(counts):
            raise ValueError(
                f"{short} of the {len(counts)} {name} of X that have entries have fewer than rank={rank}: "
                "take a smaller rank or reg above 0"
            )
