"""Linear systems K z = b solved only roughly: sketch-and-project, GMRES, and for comparison a factorisation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import scipy.linalg
import scipy.sparse as sp
import scipy.sparse.linalg
from jaxtyping import Float

from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number
from workingpapers.optimization.result import History, OptimizationResult
from workingpapers.optimization.sketched_newton import _kernels as kernels
from workingpapers.optimization.sketched_newton.oracle import Matrix, Vector

RandomState = int | np.random.Generator | None

Sketch = Literal[
    "kaczmarz", "weighted-kaczmarz", "block-kaczmarz", "gaussian", "block-gaussian", "sparse-sign", "gmres", "exact"
]
_BLOCKS = ("block-kaczmarz", "block-gaussian", "sparse-sign")
_DIRECT = ("gmres", "exact")

ROUNDING = 64 * float(np.finfo(np.float64).eps)
_NONZEROS = 8  # per vector of the sparse sign sketch
_BATCH_ROWS = 4096  # rows drawn at a time; more would be thrown away at the end
_BATCH_ENTRIES = 2_000_000  # of S and W = Sᵀ K held at a time
_RESTART = 200


class Solved(NamedTuple):
    """What a solver did: steps, whether it hit the cap, the residual, and floating-point operations."""

    steps: int
    capped: bool
    residual: float
    flops: float


class System:
    """K z = b, dense or in compressed rows, with what the solvers reuse.

    Attributes
    ----------
    K : (M, N). rhs : (M,).
    norm : ||K||_F.
    """

    def __init__(self, K: Matrix, rhs: Vector) -> None:
        self.sparse = sp.issparse(K)
        self.K: Matrix = sp.csr_array(K) if self.sparse else np.ascontiguousarray(K)
        self.rhs = rhs
        self.rows, self.columns = int(self.K.shape[0]), int(self.K.shape[1])
        self.nnz = int(self.K.size)  # of a sparse array: what it stores
        self.norm = float(scipy.sparse.linalg.norm(self.K) if self.sparse else np.linalg.norm(self.K))
        self.rhs_norm = float(np.linalg.norm(rhs))

    def residual(self, z: Vector) -> float:
        return float(np.linalg.norm(self.K @ z - self.rhs))

    def target(self, tol: float, z: Vector) -> float:
        """The residual to reach: tol, but not below what rounding leaves, 64 eps (||K|| ||z|| + ||b||)."""
        return max(tol, ROUNDING * (self.norm * float(np.linalg.norm(z)) + self.rhs_norm))


def sketch_project(
    K: Float[np.ndarray, "rows columns"] | sp.sparray,
    rhs: Float[np.ndarray, " rows"],
    sketch: Sketch = "kaczmarz",
    tol: float = 1e-8,
    max_iter: int = 1_000_000,
    random_state: RandomState = None,
    *,
    block: int = 1,
    z0: Float[np.ndarray, " columns"] | None = None,
) -> OptimizationResult:
    """Solve a consistent system K z = rhs by projections on the solutions of random combinations of its equations.

    z <- z - Kᵀ S (Sᵀ K Kᵀ S)^+ Sᵀ (K z - rhs), with a new random S of `block` columns in every step. From z0 in the
    range of Kᵀ (0 is) it converges to the solution of least norm. For one row drawn in proportion to its square length
    the expected square error shrinks by 1 - σ_min(K)² / ||K||_F² a step. Touches little of K at a time; where K z is
    cheap, GMRES (or least squares) needs far fewer operations, and a factorisation where K is small.

    Parameters
    ----------
    K : the matrix, dense or scipy sparse, finite.
    rhs : finite; must lie in the range of K.
    sketch : distribution of S. "kaczmarz": a row, uniformly; "weighted-kaczmarz": a row, in proportion to its square
        length, which starves small rows; "block-kaczmarz": `block` different rows, uniformly; "gaussian" and
        "block-gaussian": standard normal entries; "sparse-sign": columns of 8 random signs. "gmres" (square K) and
        "exact" (a factorisation) are for comparison.
    tol : the norm of the residual to reach, at least 0; 64 eps (||K||_F ||z|| + ||rhs||) is always enough.
    max_iter : steps, at least 1; for "gmres" products with K.
    block : columns of S, at least 1, more than K has rows count as many as it has; with "kaczmarz",
        "weighted-kaczmarz" and "gaussian" 1.
    z0 : start, finite; 0 by default; not modified.

    Returns
    -------
    OptimizationResult : x is z, fun is ||K z - rhs||; the history has the start and the end, with "flops".

    Raises
    ------
    ValueError, TypeError : an argument is out of range.
    numpy.linalg.LinAlgError : "exact", and K is singular.

    Warns
    -----
    RuntimeWarning : the tolerance was not reached.
    """
    if not sp.issparse(K):
        K = np.asarray(K, dtype=np.float64)
        if K.ndim != 2:
            raise ValueError(f"K must be a matrix, got shape {K.shape}")
    else:
        K = sp.csr_array(K, dtype=np.float64)
    right = np.array(rhs, dtype=np.float64)
    if right.shape != (K.shape[0],):
        raise ValueError(f"rhs must have shape ({K.shape[0]},), got {right.shape}")
    start = np.zeros(K.shape[1]) if z0 is None else np.array(z0, dtype=np.float64)
    if start.shape != (K.shape[1],):
        raise ValueError(f"z0 must have shape ({K.shape[1]},), got {start.shape}")
    for name, array in (("K", K.data if sp.issparse(K) else K), ("rhs", right), ("z0", start)):
        check_finite(name, array)
    check_sketch(sketch, block)
    if sketch in _DIRECT and K.shape[0] != K.shape[1]:
        raise ValueError(f"K must be square for sketch={sketch!r}, got shape {K.shape}")
    tol = check_number("tol", tol, at_least=0.0)
    max_iter = check_integer("max_iter", max_iter, at_least=1)

    system, z = System(K, right), start
    before = system.residual(z)
    solver = InexactSolver(sketch, block, max_iter, np.random.default_rng(random_state))
    done = solver.solve(system, z, tol)
    message = f"residual {done.residual:.1e} after {done.steps} steps"
    if done.capped:
        warnings.warn(f"{message}: tol={tol:g} was not reached", RuntimeWarning, stacklevel=2)
    rows = [
        {"iteration": 0, "fun": before, "flops": 0.0},
        {"iteration": done.steps, "fun": done.residual, "flops": done.flops},
    ]
    return OptimizationResult(
        x=z,
        fun=done.residual,
        converged=not done.capped,
        message=message,
        n_iterations=done.steps,
        history=History.of(rows),
    )


def check_sketch(sketch: Any, block: Any) -> None:
    """Raise unless `sketch` is known and `block` fits it."""
    check_choice("sketch", sketch, get_args(Sketch))
    check_integer("block", block, at_least=1)
    if block > 1 and sketch not in _BLOCKS:
        raise ValueError(f"block must be 1 for sketch={sketch!r}, got {block}; blocks are for {', '.join(_BLOCKS)}")


class InexactSolver:
    """Moves z towards the solution of a system, in place, by one of the sketches.

    Parameters
    ----------
    sketch, block : as in `sketch_project`.
    max_steps : of one call of `solve`.
    """

    def __init__(self, sketch: Sketch, block: int, max_steps: int, rng: np.random.Generator) -> None:
        self.sketch, self.block, self.max_steps, self.rng = sketch, block, max_steps, rng

    def solve(self, system: System, z: Vector, tol: float) -> Solved:
        """Continue from z until the residual is at most `System.target(tol, z)`."""
        residual = system.residual(z)
        if residual <= system.target(tol, z):
            return Solved(0, False, residual, 0.0)
        if self.sketch == "exact":
            return _factorise(system, z)
        if self.sketch == "gmres":
            return self._gmres(system, z, tol)
        return self._project(system, z, tol)

    # --- sketch and project -----------------------------------------------------------------------------------------

    def _project(self, system: System, z: Vector, tol: float) -> Solved:
        q = min(self.block, system.rows)
        every = max(1, system.rows // q)  # a check of the residual costs about as much as these steps by rows
        batch = self._batch(system, q, every)
        every = min(every, batch)
        floor = max(tol, ROUNDING * system.rhs_norm)
        draw = _ROWS.get(self.sketch)
        own = _equations(system.K, system.rhs)
        permutation = np.arange(system.rows)
        steps, flops, residual = 0, 0.0, math.inf
        while steps < self.max_steps:
            wanted = min(batch, self.max_steps - steps)
            if draw is not None:
                equations, order, forming = own, draw(self.rng, system, wanted, q, permutation), 0.0
            else:
                equations, forming = self._sketched(system, wanted * q)
                order = np.arange(wanted * q)
            taken, work, residual = _run(equations, order, q, z, own, every, floor, ROUNDING * system.norm)
            steps += taken
            flops += work + forming * taken * q
            if not residual > system.target(tol, z):
                break
        if steps % every:
            residual = system.residual(z)
        return Solved(steps, residual > system.target(tol, z), residual, flops)

    def _batch(self, system: System, q: int, every: int) -> int:
        """Blocks to draw at a time: whole intervals between checks, where memory allows."""
        if self.sketch in _ROWS:
            return max(_BATCH_ROWS // (q * every), 1) * every
        blocks = max(1, min(_BATCH_ROWS, _BATCH_ENTRIES // (system.rows + system.columns)) // q)
        return blocks - blocks % every if blocks > every else blocks

    def _sketched(self, system: System, count: int) -> tuple[tuple[Any, ...], float]:
        """Sᵀ K and Sᵀ b for `count` columns of S, and the operations that one of them took."""
        if self.sketch == "sparse-sign":
            nonzeros = min(_NONZEROS, system.rows)
            columns = self.rng.integers(system.rows, size=count * nonzeros)  # where a row repeats, its signs add up
            signs = self.rng.choice([-1.0, 1.0], size=count * nonzeros)
            S = sp.csr_array((signs, columns, np.arange(0, len(signs) + 1, nonzeros)), shape=(count, system.rows))
            forming = 2.0 * nonzeros * system.nnz / system.rows
        else:
            S = self.rng.standard_normal((count, system.rows))
            forming = 2.0 * system.nnz
        W = S @ system.K
        return _equations(sp.csr_array(W) if system.sparse else W, S @ system.rhs), forming

    # --- baselines --------------------------------------------------------------------------------------------------

    def _gmres(self, system: System, z: Vector, tol: float) -> Solved:
        """GMRES, restarted after 200 products at most."""
        N, restart = system.columns, min(system.columns, _RESTART, self.max_steps)
        products = 0

        def count(_: float) -> None:
            nonlocal products
            products += 1

        found, _ = scipy.sparse.linalg.gmres(
            system.K,
            system.rhs,
            x0=z,
            rtol=0.0,
            atol=system.target(tol, z),
            restart=restart,
            maxiter=max(1, self.max_steps // restart),
            callback=count,
            callback_type="pr_norm",
        )
        z[:] = found
        residual = system.residual(z)
        # per product: the product, and the orthogonalisation against the basis so far
        whole, rest = divmod(products, restart)
        bases = whole * restart * (restart + 1) / 2 + rest * (rest + 1) / 2
        flops = 2.0 * system.nnz * products + 4.0 * N * bases
        return Solved(products, residual > system.target(tol, z), residual, flops)


def _factorise(system: System, z: Vector) -> Solved:
    """Bunch-Kaufman's LDLᵀ where K is dense (K is symmetric) or LU, SuperLU where K is sparse."""
    N = system.columns
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)  # the residual tells
            if system.sparse:
                factor = scipy.sparse.linalg.splu(system.K.tocsc())
                z[:] = factor.solve(system.rhs)
                below, right = np.diff(factor.L.indptr) - 1, np.diff(factor.U.tocsr().indptr) - 1
                flops = float(np.sum(below * (1.0 + 2.0 * right))) + 2.0 * (factor.L.nnz + factor.U.nnz)
            else:
                symmetric = np.array_equal(system.K, system.K.T)
                z[:] = scipy.linalg.solve(system.K, system.rhs, assume_a="sym" if symmetric else "gen")
                flops = (N**3 / 3.0 if symmetric else 2.0 * N**3 / 3.0) + 2.0 * N**2
    except RuntimeError as singular:
        raise np.linalg.LinAlgError(f"the matrix is singular: {singular}") from None
    return Solved(1, False, system.residual(z), flops)


def _uniform_rows(rng: np.random.Generator, system: System, blocks: int, q: int, permutation: np.ndarray) -> np.ndarray:
    return rng.integers(system.rows, size=blocks)


def _weighted_rows(
    rng: np.random.Generator, system: System, blocks: int, q: int, permutation: np.ndarray
) -> np.ndarray:
    cumulative = np.cumsum(_squares(system.K))
    return np.asarray(np.searchsorted(cumulative, rng.random(blocks) * cumulative[-1], side="right"))


def _subsets(rng: np.random.Generator, system: System, blocks: int, q: int, permutation: np.ndarray) -> np.ndarray:
    out = np.empty((blocks, q), dtype=np.int64)
    kernels.draw_subsets(rng.random((blocks, q)), permutation, out)
    return out.ravel()


_ROWS = {"kaczmarz": _uniform_rows, "weighted-kaczmarz": _weighted_rows, "block-kaczmarz": _subsets}


def _squares(W: Matrix) -> Vector:
    if sp.issparse(W):
        return np.asarray(W.multiply(W).sum(axis=1)).ravel()
    squares: Vector = np.einsum("ij,ij->i", W, W)
    return squares


def _equations(W: Matrix, b: Vector) -> tuple[Any, ...]:
    """The arguments by which the kernels know the equations W z = b."""
    if sp.issparse(W):
        return W.indptr.astype(np.int64), W.indices.astype(np.int64), W.data, b, _squares(W)
    return np.ascontiguousarray(W), b, _squares(W)


def _run(
    equations: tuple[Any, ...],
    order: np.ndarray,
    q: int,
    z: Vector,
    own: tuple[Any, ...],
    every: int,
    tol: float,
    rounding: float,
) -> tuple[int, float, float]:
    """The kernel for this storage; `own` are the equations of K itself, of which the square lengths are not needed."""
    kernel: Callable[..., tuple[int, float, float]] = (
        kernels.dense_projections if len(own) == 3 else kernels.sparse_projections
    )
    return kernel(*equations, order, q, z, *own[:-1], every, tol, rounding)
