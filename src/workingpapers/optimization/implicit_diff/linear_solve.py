"""Linear systems A x = b given by products with A: Krylov methods on many systems at once, and dense factorisations.

Which one: `cg` when A is symmetric and definite (F is the gradient of a strongly convex function); `bicgstab` or
`gmres` for other well-conditioned A (fixed points of contractions); `normal_cg` when nothing is known, at the price
of squaring the condition number; `lu` and `cholesky` when A has at most a few hundred rows. Each takes products, so
A may be anything; a preconditioner, or a sparse factorisation, is a user's own callable.

References: Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952; Saad and Schultz,
"GMRES", SIAM J. Sci. Stat. Comput. 7(3), 1986; van der Vorst, "Bi-CGSTAB", SIAM J. Sci. Stat. Comput. 13(2), 1992.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from workingpapers.common.validation import check_integer, check_number

Rows = Float[Tensor, "n d"]  # n vectors of length d, one per system
Product = Callable[[Rows], Rows]
Tree = Any  # a tensor, or tensors in tuples, lists and dicts

DEFAULT_TOL = {torch.float64: 1e-10, torch.float32: 1e-6}
COARSE_TOL = 1e-2  # of the half-precision types
ITERATIONS_PER_ROW = 10
GMRES_RESTART = 30
DIVERGED = 1e6  # a residual this much larger than the least one will not come back
ROUNDING = 32  # a residual below ROUNDING * eps * |A| |x| is as small as rounding allows


@dataclass(frozen=True)
class LinearSolution:
    """What a linear solver found, and how well it solves the system.

    Attributes
    ----------
    x : the solution, structured like b.
    converged : whether `residual` is at most the tolerance, or as small as rounding in A x allows.
    iterations : steps of the Krylov method; 0 for a factorisation.
    residual : ``|A x - b| / |b|``, of the system with the ridge when there is one; the largest of several systems.
    history : that residual, as the method's own recursion estimates it, after each iteration.
    message : why the solver stopped, for people.
    """

    x: Tree
    converged: bool
    iterations: int
    residual: float
    history: tuple[float, ...]
    message: str


def default_tol(dtype: torch.dtype) -> float:
    """The relative residual that a solver aims at when it is not told: 1e-10 in float64, 1e-6 in float32."""
    return DEFAULT_TOL.get(dtype, COARSE_TOL)


def cg(
    matvec: Callable[[Tree], Tree],
    b: Tree,
    *,
    ridge: float = 0.0,
    tol: float | None = None,
    maxiter: int | None = None,
) -> LinearSolution:
    """Conjugate gradients: A symmetric, positive or negative definite.

    Parameters
    ----------
    matvec : maps v to A v, both structured like b.
    b : right-hand side, one floating dtype, finite.
    ridge : solves (A + ridge I) x = b, at least 0.
    tol : relative residual to reach, by default 1e-10 in float64 and 1e-6 in float32.
    maxiter : at most this many iterations, by default 10 times the number of unknowns.

    Raises
    ------
    ValueError : two random products show that A is not symmetric, or an argument is out of range.

    Warns
    -----
    RuntimeWarning : the tolerance was not reached; the message gives the residual.
    """
    return _public("cg", matvec, None, b, ridge, tol, maxiter)


def normal_cg(
    matvec: Callable[[Tree], Tree],
    rmatvec: Callable[[Tree], Tree],
    b: Tree,
    *,
    ridge: float = 0.0,
    tol: float | None = None,
    maxiter: int | None = None,
) -> LinearSolution:
    """Conjugate gradients on (AᵀA + ridge I) x = Aᵀ b: any A; a singular one gives a least-squares solution.

    It needs the square of A's condition number where `gmres` and `bicgstab` need about the number itself.

    Parameters
    ----------
    matvec, rmatvec : map v to A v and to Aᵀ v, structured like b.
    b, ridge, tol, maxiter : as in `cg`; with a ridge the residual is that of the normal equations.

    Warns
    -----
    RuntimeWarning : the tolerance was not reached; the message gives the residual.
    """
    return _public("normal_cg", matvec, rmatvec, b, ridge, tol, maxiter)


def bicgstab(
    matvec: Callable[[Tree], Tree],
    b: Tree,
    *,
    ridge: float = 0.0,
    tol: float | None = None,
    maxiter: int | None = None,
) -> LinearSolution:
    """Stabilised bi-conjugate gradients: any well-conditioned A, two products an iteration, constant memory.

    Parameters, result and warnings as in `cg`.
    """
    return _public("bicgstab", matvec, None, b, ridge, tol, maxiter)


def gmres(
    matvec: Callable[[Tree], Tree],
    b: Tree,
    *,
    ridge: float = 0.0,
    tol: float | None = None,
    maxiter: int | None = None,
    restart: int = GMRES_RESTART,
) -> LinearSolution:
    """Generalised minimal residuals, restarted: any well-conditioned A, one product an iteration.

    Parameters
    ----------
    restart : vectors kept before a restart, at least 1: more memory, fewer iterations.
    matvec, b, ridge, tol, maxiter : as in `cg`, as are the result and the warnings.
    """
    restart = check_integer("restart", restart, at_least=1)
    return _public("gmres", matvec, None, b, ridge, tol, maxiter, restart)


def lu(matvec: Callable[[Tree], Tree], b: Tree, *, ridge: float = 0.0, tol: float | None = None) -> LinearSolution:
    """Dense LU of A, built column by column; a singular A gives the least-squares solution of least norm.

    Parameters, result and warnings as in `cg`, but `tol` is 1.5e-8 in float64 and 3.5e-4 in float32 when not given.
    """
    return _public_dense("lu", matvec, b, ridge, tol)


def cholesky(
    matvec: Callable[[Tree], Tree], b: Tree, *, ridge: float = 0.0, tol: float | None = None
) -> LinearSolution:
    """Dense Cholesky of a symmetric, positive or negative definite A: half the work of `lu`.

    Parameters, result and warnings as in `lu`.

    Raises
    ------
    ValueError : A is not symmetric, or not definite.
    """
    return _public_dense("cholesky", matvec, b, ridge, tol)


@dataclass(frozen=True)
class Outcome:
    """Solutions of n systems, and the worst of their residuals; the row form of `LinearSolution`."""

    x: Rows
    converged: bool
    iterations: int
    residual: float
    history: tuple[float, ...]

    def message(self, method: str) -> str:
        reached = "solved" if self.converged else "did not solve"
        effort = f" in {self.iterations} iterations" if self.iterations else ""
        return f"{method} {reached} the system{effort}: relative residual {self.residual:.1e}"


class Cycle(NamedTuple):
    """One run of a Krylov method from zero: the correction, and its residual after each step."""

    x: Rows
    residuals: list[float]


class Best:
    """The point of least residual so far, row by row: the residuals of these methods need not fall at every step."""

    def __init__(self, x: Rows, size: Float[Tensor, "n 1"]) -> None:
        self.x, self.size = x, size

    def see(self, x: Rows, size: Float[Tensor, "n 1"]) -> Tensor:
        """Take note of a point; False for a row that diverges, or that a division by zero has ended."""
        better = size < self.size
        self.x, self.size = torch.where(better, x, self.x), torch.where(better, size, self.size)
        return size < DIVERGED * self.size


def krylov(
    method: str,
    matvec: Product,
    rmatvec: Product | None,
    b: Rows,
    *,
    ridge: float,
    tol: float | None,
    maxiter: int | None,
    restart: int = GMRES_RESTART,
) -> Outcome:
    """Solve the n systems (A + ridge I) x = b, rows of b, by `method`, whose rounding errors are refined away.

    Each method runs from zero on the true residual; whatever it leaves is solved for again, as long as that helps.
    The n systems advance together: one product serves all, and a row that has converged stands still.
    """
    tol = default_tol(b.dtype) if tol is None else tol
    budget = ITERATIONS_PER_ROW * b.shape[1] if maxiter is None else maxiter
    if method == "normal_cg":
        assert rmatvec is not None
        transposed, plain = rmatvec, matvec
        target = transposed(b) if ridge else b
        apply = (lambda v: transposed(plain(v)) + ridge * v) if ridge else matvec
    else:
        target, apply = b, _with_ridge(matvec, ridge)

    scale = _norm(target)
    if not bool(scale.isfinite().all()):
        return Outcome(torch.full_like(b, math.nan), False, 0, math.nan, ())
    limit = tol * scale
    x, left = torch.zeros_like(b), target
    history: list[float] = []
    worst = worst_residual(left, scale)
    while worst > tol and len(history) < budget:
        allowed = budget - len(history)
        if method == "gmres":
            cycle = _gmres_cycle(apply, left, limit, min(allowed, restart, b.shape[1]))
        elif method == "bicgstab":
            cycle = _bicgstab_cycle(apply, left, limit, allowed)
        elif method == "normal_cg" and not ridge:
            cycle = _normal_cg_cycle(plain, transposed, left, limit, allowed)
        else:
            cycle = _cg_cycle(apply, left, limit, allowed)
        history += [value / float(scale.max()) for value in cycle.residuals]
        trial = x + cycle.x
        residual = target - apply(trial)
        before, after = worst, worst_residual(residual, scale)
        if after < before:
            x, left, worst = trial, residual, after
        if not after < 0.99 * before:
            break
    converged = worst <= tol or _as_small_as_rounding_allows(worst, apply, x, scale)
    return Outcome(x, converged, len(history), worst, tuple(history))


def dense(
    method: str, A: Float[Tensor, "k d d"], b: Float[Tensor, "k d r"], *, ridge: float, tol: float | None
) -> Outcome:
    """Solve the k systems (A + ridge I) x = b, each with r right-hand sides, by a factorisation."""
    tol = math.sqrt(torch.finfo(b.dtype).eps) if tol is None else tol
    if ridge:
        A = A + ridge * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    x = _cholesky(A, b) if method == "cholesky" else torch.linalg.solve_ex(A, b).result
    residual = _relative(A @ x - b, b)
    worst = float(residual.max())
    if method == "lu" and not worst <= tol and bool(A.isfinite().all()):
        closest = torch.linalg.pinv(A) @ b
        residual_closest = _relative(A @ closest - b, b)
        better = ~(residual <= residual_closest)  # also where the residual is NaN
        x = torch.where(better[:, None, None], closest, x)
        worst = float(torch.where(better, residual_closest, residual).max())
    return Outcome(x, worst <= tol, 0, worst, ())


def asymmetry(product: Product, like: Rows) -> float:
    """The gap |uᵀA v - vᵀA u| for two random vectors, relative to sizes; the largest of the systems.

    Plain conjugate gradients on a matrix that is not symmetric return a wrong answer without a sign of it.
    """
    generator = torch.Generator().manual_seed(0)
    both = torch.randn((2, *like.shape), generator=generator, dtype=like.dtype).to(like.device)
    products = product(both.reshape(-1, like.shape[1])).reshape(both.shape)
    gap = (_dot(both[0], products[1]) - _dot(both[1], products[0])).abs()
    size = _norm(both[0]) * _norm(products[1]) + _norm(both[1]) * _norm(products[0])
    return float((gap / size.clamp_min(torch.finfo(like.dtype).tiny)).max())


def is_symmetric(product: Product, like: Rows) -> bool:
    """Whether random products find A symmetric."""
    return asymmetry(product, like) <= math.sqrt(torch.finfo(like.dtype).eps)


def check_symmetric(product: Product, like: Rows) -> None:
    """Raise ValueError when random products find A not symmetric."""
    found = asymmetry(product, like)
    if not found <= math.sqrt(torch.finfo(like.dtype).eps):
        raise ValueError(
            f"cg needs a symmetric A, but uᵀAv and vᵀAu differ by {found:.1e} of their size for random u and v; "
            "use 'normal_cg', 'gmres', 'bicgstab' or 'lu'"
        )


def _cg_cycle(matvec: Product, b: Rows, limit: Tensor, budget: int) -> Cycle:
    x, r, p = torch.zeros_like(b), b, b
    energy = _dot(r, r)
    best = Best(x, energy.sqrt())
    active = best.size > limit
    residuals: list[float] = []
    while len(residuals) < budget and bool(active.any()):
        Ap = matvec(p)
        alpha = torch.where(active, energy / _dot(p, Ap), 0.0)
        x, r = torch.addcmul(x, alpha, p), torch.addcmul(r, alpha, Ap, value=-1)
        before, energy = energy, _dot(r, r)
        p = torch.addcmul(r, torch.where(active, energy / before, 0.0), p)
        size = energy.sqrt()
        active = active & best.see(x, size) & (size > limit)
        residuals.append(float(size.max()))
    return Cycle(best.x, residuals)


def _normal_cg_cycle(matvec: Product, rmatvec: Product, b: Rows, limit: Tensor, budget: int) -> Cycle:
    # CGLS: the residual b - A x is kept, not that of the normal equations, which loses half of the digits.
    x, r = torch.zeros_like(b), b
    s = p = rmatvec(r)
    energy = _dot(s, s)
    least_squares = torch.finfo(b.dtype).eps * energy.sqrt()
    best = Best(x, _norm(r))
    active = (best.size > limit) & (energy > 0)
    residuals: list[float] = []
    while len(residuals) < budget and bool(active.any()):
        q = matvec(p)
        alpha = torch.where(active, energy / _dot(q, q), 0.0)
        x, r = torch.addcmul(x, alpha, p), torch.addcmul(r, alpha, q, value=-1)
        s = rmatvec(r)
        before, energy = energy, _dot(s, s)
        p = torch.addcmul(s, torch.where(active, energy / before, 0.0), p)
        size = _norm(r)
        active = active & best.see(x, size) & (size > limit) & (energy.sqrt() > least_squares)
        residuals.append(float(size.max()))
    return Cycle(best.x, residuals)


def _bicgstab_cycle(matvec: Product, b: Rows, limit: Tensor, budget: int) -> Cycle:
    x, r, p, shadow = torch.zeros_like(b), b, b, b
    rho = _dot(shadow, r)
    best = Best(x, rho.sqrt())
    active = best.size > limit
    residuals: list[float] = []
    while len(residuals) < budget and bool(active.any()):
        v = matvec(p)
        alpha = torch.where(active, rho / _dot(shadow, v), 0.0)
        s = torch.addcmul(r, alpha, v, value=-1)
        t = matvec(s)
        omega = torch.where(active, _dot(t, s) / _dot(t, t), 0.0)
        x = x + alpha * p + omega * s
        r = torch.addcmul(s, omega, t, value=-1)
        before, rho = rho, _dot(shadow, r)
        beta = torch.where(active, rho / before * alpha / omega, 0.0)
        p = r + beta * (p - omega * v)
        size = _norm(r)
        # A vanishing rho or omega is a breakdown: the row stops, and starts again from its true residual.
        active = active & best.see(x, size) & (size > limit) & (beta != 0)
        residuals.append(float(size.max()))
    return Cycle(best.x, residuals)


def _gmres_cycle(matvec: Product, b: Rows, limit: Tensor, steps: int) -> Cycle:
    n, _ = b.shape
    beta = _norm(b)
    basis = [b / beta.clamp_min(torch.finfo(b.dtype).tiny)]
    hessenberg = b.new_zeros(n, steps + 1, steps)
    rotations: list[tuple[Tensor, Tensor]] = []
    right = b.new_zeros(n, steps + 1)
    right[:, :1] = beta
    residuals: list[float] = []
    for j in range(steps):
        w = matvec(basis[j])
        size = _norm(w)
        for _ in range(2):  # twice is enough to keep the basis orthogonal to working precision
            known = torch.stack(basis, 1)
            coefficients = torch.einsum("nkd,nd->nk", known, w)
            w = w - torch.einsum("nk,nkd->nd", coefficients, known)
            hessenberg[:, : j + 1, j] += coefficients
        length = _norm(w)
        length = torch.where(length > torch.finfo(b.dtype).eps * size, length, 0.0)
        basis.append(torch.where(length > 0, w / length, 0.0))
        # Givens rotations turn the new column of the Hessenberg matrix into one of a triangular matrix.
        column = [hessenberg[:, i, j].clone() for i in range(j + 1)] + [length[:, 0]]
        for i, (c, s) in enumerate(rotations):
            column[i], column[i + 1] = c * column[i] + s * column[i + 1], c * column[i + 1] - s * column[i]
        radius = torch.hypot(column[j], column[j + 1])
        c = torch.where(radius > 0, column[j] / radius, 1.0)
        s = torch.where(radius > 0, column[j + 1] / radius, 0.0)
        rotations.append((c, s))
        column[j] = radius
        hessenberg[:, : j + 1, j] = torch.stack(column[: j + 1], 1)
        right[:, j + 1] = -s * right[:, j]
        right[:, j] = c * right[:, j]
        estimate = right[:, j + 1 : j + 2].abs()
        residuals.append(float(estimate.max()))
        if not bool(((estimate > limit) & (length > 0)).any()):
            break
    k = len(residuals)
    triangle = hessenberg[:, :k, :k]
    # A zero on the diagonal belongs to a direction that changes nothing: its coefficient is zero.
    empty = triangle.diagonal(dim1=1, dim2=2) == 0
    triangle = triangle + torch.diag_embed(empty.to(b.dtype))
    weights = torch.linalg.solve_triangular(triangle, torch.where(empty, 0.0, right[:, :k])[..., None], upper=True)
    return Cycle(torch.einsum("nk,nkd->nd", weights[..., 0], torch.stack(basis[:k], 1)), residuals)


def _cholesky(A: Tensor, b: Tensor) -> Tensor:
    asymmetry = (A - A.mT).abs().amax()
    if bool(asymmetry > math.sqrt(torch.finfo(A.dtype).eps) * A.abs().amax()):
        raise ValueError(f"cholesky needs a symmetric A, but A and Aᵀ differ by {float(asymmetry):.1e}; use 'lu'")
    sign = torch.where(A.diagonal(dim1=1, dim2=2).sum(1) < 0, -1.0, 1.0).to(A.dtype)[:, None, None]
    factor, info = torch.linalg.cholesky_ex(sign * A)
    if bool(info.any()):
        raise ValueError("cholesky needs a definite A, and this one is indefinite or singular; use 'lu'")
    return sign * torch.cholesky_solve(b, factor)


def _one_by_one(product: Product) -> Product:
    return lambda rows: torch.cat([product(row[None]) for row in rows])


def _with_ridge(matvec: Product, ridge: float) -> Product:
    return (lambda v: matvec(v) + ridge * v) if ridge else matvec


def _dot(a: Rows, b: Rows) -> Float[Tensor, "n 1"]:
    return (a * b).sum(-1, keepdim=True)


def _norm(a: Rows) -> Float[Tensor, "n 1"]:
    norm: Tensor = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    return norm


def worst_residual(residual: Rows, b_norm: Float[Tensor, "n 1"]) -> float:
    """The largest |residual| / |b| of the rows; a row with b = 0 is solved by 0."""
    return float((_norm(residual) / b_norm.clamp_min(torch.finfo(b_norm.dtype).tiny)).max())


def _relative(residual: Float[Tensor, "k d r"], b: Float[Tensor, "k d r"]) -> Float[Tensor, " k"]:
    """The largest |residual| / |b| over the right-hand sides of each system."""
    scale = torch.linalg.vector_norm(b, dim=1).clamp_min(torch.finfo(b.dtype).tiny)
    relative: Tensor = torch.linalg.vector_norm(residual, dim=1) / scale
    return relative.amax(1)


def _as_small_as_rounding_allows(worst: float, product: Product, x: Rows, b_norm: Tensor) -> bool:
    """Whether a residual is at the level of the rounding errors in A x, eps |A| |x|, and below sqrt(eps) |b|."""
    eps = torch.finfo(x.dtype).eps
    if not worst <= math.sqrt(eps):
        return False
    v, norm = x, torch.zeros_like(b_norm)
    for _ in range(5):  # of the power method, for a lower bound on |A|
        v = v / _norm(v).clamp_min(torch.finfo(x.dtype).tiny)
        v = product(v)
        norm = torch.maximum(norm, _norm(v))
    rounding = eps * norm * _norm(x) / b_norm.clamp_min(torch.finfo(x.dtype).tiny)
    return worst <= ROUNDING * float(rounding.max())


def check_options(ridge: float | None, tol: float | None, maxiter: int | None) -> float:
    """Validate the options that all solvers share; the ridge as a number."""
    if tol is not None:
        check_number("tol", tol, above=0)
    if maxiter is not None:
        check_integer("maxiter", maxiter, at_least=1)
    return 0.0 if ridge is None else check_number("ridge", ridge, at_least=0)


def ravel(leaves: list[Tensor] | tuple[Tensor, ...], *batch: int) -> Float[Tensor, "*batch d"]:
    """The entries of all leaves, whose leading dimensions are `batch`, side by side."""
    flat = [leaf.reshape(*batch, -1) for leaf in leaves]
    return flat[0] if len(flat) == 1 else torch.cat(flat, -1)


def unravel(vectors: Float[Tensor, "*batch d"], shapes: list[torch.Size]) -> list[Tensor]:
    """Undo `ravel`: leaves of the given shapes, each with the leading dimensions of `vectors`."""
    batch = vectors.shape[:-1]
    if len(shapes) == 1:
        return [vectors.reshape(*batch, *shapes[0])]
    parts = torch.split(vectors, [math.prod(shape) for shape in shapes], -1)
    return [part.reshape(*batch, *shape) for part, shape in zip(parts, shapes, strict=True)]


class _Raveled(NamedTuple):
    rows: Rows
    matvec: Callable[[Callable[[Tree], Tree]], Product]
    restore: Callable[[Rows], Tree]


def _raveled(b: Tree) -> _Raveled:
    leaves, structure = pytree.tree_flatten(b)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            raise TypeError(f"b must hold floating-point tensors only, got {_describe(leaf)}")
    if len({leaf.dtype for leaf in leaves}) != 1:
        raise TypeError(f"the tensors of b must share one dtype, got {[str(leaf.dtype) for leaf in leaves]}")
    rows = ravel(leaves)[None]
    if not bool(rows.isfinite().all()):
        raise ValueError("b must be finite, got NaN or infinity")
    shapes = [leaf.shape for leaf in leaves]

    def restore(vector: Rows) -> Tree:
        return pytree.tree_unflatten(unravel(vector[0], shapes), structure)

    def on_rows(product: Callable[[Tree], Tree]) -> Product:
        return lambda vector: ravel(pytree.tree_leaves(product(restore(vector))))[None]

    return _Raveled(rows, on_rows, restore)


def _describe(leaf: object) -> str:
    return f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"


def _public(
    method: str,
    matvec: Callable[[Tree], Tree],
    rmatvec: Callable[[Tree], Tree] | None,
    b: Tree,
    ridge: float,
    tol: float | None,
    maxiter: int | None,
    restart: int = GMRES_RESTART,
) -> LinearSolution:
    ridge = check_options(ridge, tol, maxiter)
    rows, on_rows, restore = _raveled(b)
    transposed = None if rmatvec is None else on_rows(rmatvec)
    with torch.no_grad():
        if method == "cg":
            check_symmetric(_one_by_one(on_rows(matvec)), rows)
        outcome = krylov(
            method, on_rows(matvec), transposed, rows, ridge=ridge, tol=tol, maxiter=maxiter, restart=restart
        )
    return _reported(method, outcome, restore(outcome.x))


def _public_dense(
    method: str, matvec: Callable[[Tree], Tree], b: Tree, ridge: float, tol: float | None
) -> LinearSolution:
    ridge = check_options(ridge, tol, None)
    rows, on_rows, restore = _raveled(b)
    product = on_rows(matvec)
    with torch.no_grad():
        identity = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        A = torch.cat([product(unit[None]) for unit in identity]).mT[None]
        outcome = dense(method, A, rows[..., None], ridge=ridge, tol=tol)
    return _reported(method, outcome, restore(outcome.x[..., 0]))


def _reported(method: str, outcome: Outcome, x: Tree) -> LinearSolution:
    message = outcome.message(method)
    if not outcome.converged:
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    return LinearSolution(x, outcome.converged, outcome.iterations, outcome.residual, outcome.history, message)
