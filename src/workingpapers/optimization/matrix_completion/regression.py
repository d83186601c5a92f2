"""Multi-response regression in which every response sees its own rows: one factor given the other."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number
from workingpapers.optimization.matrix_completion import _kernels as kernels
from workingpapers.optimization.matrix_completion.observed import Matrix, Observed, in_threads

Inner = Literal["sketch", "cg", "exact", "qr"]
Sketch = Literal["countsketch", "srht"]

_METHODS = {"sketch": kernels.SKETCH, "cg": kernels.CG, "exact": kernels.NORMAL, "qr": kernels.QR}
_SKETCHES = {"countsketch": kernels.COUNTSKETCH, "srht": kernels.SRHT}


@dataclass(frozen=True, eq=False)
class Regressions:
    """Solutions of min_v |U[O_j] v - X[O_j, j]|^2 + reg |v|^2 for every column j, and what they cost.

    Attributes
    ----------
    V : the solutions, shape (n, k); zero for columns without entries.
    steps : conjugate gradient steps, summed over the columns.
    operations : multiply-adds executed.
    n_fallbacks : columns solved by normal equations because the sketch lost a direction.
    n_unmet : columns whose iterations ended before the tolerance was met.
    """

    V: Float[np.ndarray, "n k"]
    steps: int
    operations: int
    n_fallbacks: int
    n_unmet: int


@dataclass(frozen=True)
class Solver:
    """How the regressions are solved; the parameters are those of `RobustAltMin`, checked."""

    inner: Inner = "sketch"
    sketch: Sketch = "countsketch"
    sketch_factor: int = 4
    relative: float = 0.1
    max_inner: int = 30
    reg: float = 0.0
    n_jobs: int | None = None

    def __post_init__(self) -> None:
        check_choice("inner", self.inner, tuple(_METHODS))
        check_choice("sketch", self.sketch, tuple(_SKETCHES))
        check_integer("sketch_factor", self.sketch_factor, at_least=2)
        check_number("inner_tol", self.relative, at_least=0.0, below=1.0)
        check_integer("max_inner", self.max_inner, at_least=1)
        check_number("reg", self.reg, at_least=0.0)
        if self.n_jobs is not None and check_integer("n_jobs", self.n_jobs) == 0:
            raise ValueError("n_jobs must not be 0, got 0")

    def solve(self, observed: Observed, other: Matrix, start: Matrix, seed: int, floor: float = 0.0) -> Regressions:
        """The factor of the rows of `observed`, given that of its columns and a start."""
        plan = kernels.Plan(
            _METHODS[self.inner],
            _SKETCHES[self.sketch],
            self.sketch_factor * other.shape[1],
            float(self.reg),
            float(self.relative),
            floor,
            int(self.max_inner),
            seed,
        )
        x = np.array(start, dtype=other.dtype, order="C")
        costs = list(
            in_threads(
                lambda first, last: kernels.solve_rows(
                    first, last, observed.indptr, observed.indices, observed.values, other, x, plan
                ),
                observed,
                self.n_jobs,
            )
        )
        return Regressions(x, *(int(total) for total in np.sum(costs, axis=0)))


def weighted_multi_regression(
    U: Float[np.ndarray, "m k"],
    X: Any,
    tol: float = 1e-6,
    *,
    inner: Inner = "sketch",
    sketch: Sketch = "countsketch",
    sketch_factor: int = 4,
    max_inner: int = 30,
    reg: float = 0.0,
    start: Float[np.ndarray, "n k"] | None = None,
    n_jobs: int | None = None,
    random_state: int | np.random.Generator | None = None,
) -> Regressions:
    """Regress every column of a partly observed matrix on the columns of U, over its own observed rows.

    The inner problem of alternating minimisation (weights 1 at observed entries, 0 elsewhere), useful alone to fold
    new columns into a known factor. With "sketch" a problem of s rows costs O(s k) for each of O(log 1/tol) steps and
    O(k^3) once, where exact least squares costs s k^2 / 2: fewer multiply-adds once s is above some 10 k.

    Parameters
    ----------
    U : known factor, shape (m, k), finite.
    X : (m, n), sparse, or dense with NaN where not observed; see `RobustAltMin.fit`.
    tol : in [0, 1); a column's iterations stop when |B^T (b - B y)| is at most this times its value at the start,
        where B = A R^{-1} has orthonormal columns up to the error of the sketch. The error of the fit A v relative to
        that of the start is then about tol. Residuals alone bound the error of v only through the least singular
        value of A, about sqrt(s / m) for an orthonormal, incoherent U.
    inner : "sketch" for conjugate gradients preconditioned with the R of a sketch's QR factorisation; "cg" for the
        diagonal of A^T A as preconditioner instead, enough where the rows of U are incoherent and orthonormal;
        "exact" for normal equations; "qr" for a QR factorisation of every A.
    sketch : "countsketch", one pass over A; or "srht", a Hadamard transform, slower and safe for coherent rows too.
    sketch_factor : at least 2; the sketch has this times k rows, and problems with no more rows are solved exactly.
    max_inner : at least 1, most steps for a column.
    reg : at least 0, weight of |v|^2. Without it columns with fewer than k entries get the solution of least norm.
    start : (n, k), where the iterations start; zeros by default.
    n_jobs : threads, as in joblib: None for one, -1 for all cores.
    random_state : seed or generator of the sketches.

    Raises
    ------
    ValueError, TypeError : an argument is out of range or shapes do not match.

    Warns
    -----
    RuntimeWarning : the iterations of some columns did not reach `tol`.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> U, V = rng.standard_normal((200, 3)), rng.standard_normal((5, 3))
    >>> X = np.where(rng.random((200, 5)) < 0.5, U @ V.T, np.nan)
    >>> found = weighted_multi_regression(U, X, tol=1e-10, random_state=0)
    >>> bool(np.allclose(found.V, V))
    True
    """
    solver = Solver(
        inner, sketch, sketch_factor, check_number("tol", tol, at_least=0.0, below=1.0), max_inner, reg, n_jobs
    )
    observed = Observed.of(X)
    factor = _factor("U", U, (observed.shape[0], None), observed.values.dtype)
    n, k = observed.shape[1], factor.shape[1]
    initial = np.zeros((n, k), factor.dtype) if start is None else _factor("start", start, (n, k), factor.dtype)
    seed = int(np.random.default_rng(random_state).integers(2**62))
    found = solver.solve(observed.transposed, factor, initial, seed)
    if found.n_unmet and tol > 0.0:
        message = f"{found.n_unmet} of {n} columns did not reach tol={tol:g} in max_inner={max_inner} steps"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return found


def _factor(name: str, value: Any, shape: tuple[int, int | None], dtype: np.dtype[Any]) -> Matrix:
    factor = np.ascontiguousarray(value, dtype=dtype)
    rows, columns = shape
    if factor.ndim != 2 or len(factor) != rows or columns not in (None, factor.shape[1]) or not factor.shape[1]:
        raise ValueError(f"{name} must have shape ({rows}, {columns or 'k'}), got {factor.shape}")
    check_finite(name, factor)
    return factor
