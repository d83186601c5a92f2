"""Decorators that make any solver differentiable, given the equation that its solution satisfies."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from workingpapers.common.validation import check_choice, check_number
from workingpapers.optimization.implicit_diff import linear_solve
from workingpapers.optimization.implicit_diff.autograd import (
    Call,
    Equation,
    Leaves,
    Linearisation,
    Vectors,
    pull_back,
    push_forward,
    root,
)
from workingpapers.optimization.implicit_diff.linear_solve import LinearSolution, Outcome, ravel, unravel
from workingpapers.optimization.implicit_diff.optimality import FixedPoint, Residual

Tree = Any  # a tensor, or tensors and other things in tuples, lists and dicts
Solve = str | Callable[..., Any]

SOLVERS = ("auto", "cg", "normal_cg", "gmres", "bicgstab", "lu", "cholesky")
DENSE_UP_TO = 256  # unknowns for which "auto" factorises A
FAR_FROM_A_ROOT = 1e-3


@dataclass(frozen=True)
class LinearSolveInfo:
    """How the linear systems of the last backward or forward-mode pass were solved.

    Attributes
    ----------
    method : of solution; "auto" has become "lu", "cg" or "normal_cg".
    iterations : of a Krylov method, the most of the systems solved together; 0 for a factorisation.
    residual : ``|A u - v| / |v|``, the largest of the systems solved together.
    converged : whether the residual met the tolerance, or is as small as rounding allows.
    """

    method: str
    iterations: int
    residual: float
    converged: bool


def custom_root(
    optimality_fun: Callable[..., Tree],
    has_aux: bool = False,
    solve: Solve = "auto",
    ridge: float | None = None,
    check: bool | float = False,
    *,
    tol: float | None = None,
    maxiter: int | None = None,
    vectorize: bool = False,
) -> Callable[[Callable[..., Any]], ImplicitSolver]:
    """Make a solver differentiable whose solution x satisfies F(x, θ) = 0.

    The decorated solver is called as ``solver(init, *args, **kwargs)`` and is differentiable, in reverse and forward
    mode, any number of times and under torch.func's transforms, in every floating-point tensor of `args` and
    `kwargs`, which together are θ. Not in `init`, and not in tensors that the functions capture by closure.

    Parameters
    ----------
    optimality_fun : F, called as ``F(x, *args, **kwargs)``, returns the structure and shapes of x. Written in torch
        and differentiable in x and θ where it is evaluated, once for each order of derivative.
    has_aux : the solver returns ``(x, aux)``. Tensors in aux are returned without gradient, the rest as it is; under
        torch.vmap, numbers become tensors with one entry for each sample.
    solve : of the linear systems with A = ∂_1 F: "auto" (LU up to 256 unknowns, then "cg" if random products find A
        symmetric and it converges, else "normal_cg"), "cg", "normal_cg", "gmres", "bicgstab", "lu", "cholesky", or a
        callable ``(matvec, b)`` or ``(matvec, rmatvec, b)`` that returns a vector structured like x, or a
        `LinearSolution`.
    ridge : solves with A + ridge I (with AᵀA + ridge I for "normal_cg") where A is singular or nearly so.
    check : warns when |F(x, θ)| is above 1e-3, or above this number; with `has_aux` also when aux is a mapping whose
        "active_set_changed" is true: near a kink, the derivative is wrong until the active set has settled.
    tol : relative residual to reach in the linear systems, by default 1e-10 in float64 and 1e-6 in float32 (1.5e-8
        and 3.5e-4 for the factorisations).
    maxiter : of the Krylov methods, by default 10 times the number of unknowns.
    vectorize : the solver is torch code that torch.vmap can batch; otherwise it runs once for each sample of a batch.

    Returns
    -------
    decorator : turns a solver ``(init, *args, **kwargs) -> x`` into an `ImplicitSolver`. The solver is a black box:
        it sees tensors without gradient, and may return NumPy arrays, which are converted to the dtype and device of
        the first floating-point tensor of the arguments.

    Raises
    ------
    ValueError, TypeError : an option is out of range or does not go with the others.

    Warns
    -----
    RuntimeWarning : in a backward pass, when a linear system was not solved to the tolerance.
    """
    if isinstance(optimality_fun, FixedPoint):
        raise TypeError("optimality_fun is a fixed-point map, T(x) = x; use custom_fixed_point")
    return _decorator(optimality_fun, has_aux, solve, ridge, check, tol, maxiter, vectorize)


def custom_fixed_point(
    fixed_point_fun: Callable[..., Tree],
    has_aux: bool = False,
    solve: Solve = "auto",
    ridge: float | None = None,
    check: bool | float = False,
    *,
    tol: float | None = None,
    maxiter: int | None = None,
    vectorize: bool = False,
) -> Callable[[Callable[..., Any]], ImplicitSolver]:
    """Make a solver differentiable whose solution x satisfies x = T(x, θ).

    That is `custom_root` with F(x, θ) = x - T(x, θ), so A = I - ∂_1 T. The solver need not iterate T.

    Parameters
    ----------
    fixed_point_fun : T, called as ``T(x, *args, **kwargs)``, returns the structure and shapes of x.
    has_aux, solve, ridge, check, tol, maxiter, vectorize : as in `custom_root`, as are the result, the errors and the
        warnings.
    """
    if isinstance(fixed_point_fun, Residual):
        raise TypeError("fixed_point_fun is a residual, F(x) = 0; use custom_root")

    def residual(x: Tree, *args: Any, **kwargs: Any) -> Tree:
        mapped = fixed_point_fun(x, *args, **kwargs)
        leaves, structure = pytree.tree_flatten(x)
        moved = _like(leaves, structure, mapped, "fixed_point_fun")
        return pytree.tree_unflatten([a - b for a, b in zip(leaves, moved, strict=True)], structure)

    return _decorator(residual, has_aux, solve, ridge, check, tol, maxiter, vectorize)


class ImplicitSolver:
    """A solver with implicit derivatives, as made by `custom_root` and `custom_fixed_point`.

    Attributes
    ----------
    linear_solve_info : how the linear systems of the last derivative were solved; None before the first.
    """

    def __init__(
        self,
        solver: Callable[..., Any],
        optimality_fun: Callable[..., Tree],
        linear_solver: _LinearSolver,
        has_aux: bool,
        threshold: float | None,
        vectorize: bool,
    ) -> None:
        functools.update_wrapper(self, solver)
        self._solver = solver
        self._optimality_fun = optimality_fun
        self._linear_solver = linear_solver
        self._has_aux = has_aux
        self._threshold = threshold
        self._vectorize = vectorize

    @property
    def linear_solve_info(self) -> LinearSolveInfo | None:
        return self._linear_solver.info

    def __call__(self, init: Tree, *args: Any, **kwargs: Any) -> Any:
        start, theta = _Tensors(init), _Tensors((args, kwargs))
        call = _Call(self, start, theta)
        output = root(call, *start.tensors, *theta.tensors)
        x = pytree.tree_unflatten(output[: call.unknowns], call.structure)
        return (x, call.aux(output[call.unknowns :])) if self._has_aux else x


def root_vjp(
    optimality_fun: Callable[..., Tree],
    sol: Tree,
    args: tuple[Any, ...],
    cotangent: Tree,
    solve: Solve = "auto",
) -> tuple[Tree, ...]:
    """vᵀJ at a root: the derivative of <cotangent, x*(args)> in every argument, at the price of one linear solve.

    Parameters
    ----------
    optimality_fun : F, with ``F(sol, *args) == 0``.
    sol : the root x.
    args : the arguments θ.
    cotangent : v, structured like sol.
    solve : as in `custom_root`.

    Returns
    -------
    products : for each argument its structure, with None in the place of what is not a floating-point tensor.
    """
    _check_solve(solve)
    theta = _Tensors((args, {}))
    equation, x = _equation_at(optimality_fun, sol, theta, _LinearSolver(solve))
    v = _like(list(x), equation.structure, cotangent, "cotangent")
    wanted = [i for i, leaf in enumerate(theta.tensors) if leaf.is_floating_point()]
    found: list[Tensor | None] = [None] * len(theta.tensors)
    for i, grad in zip(wanted, pull_back(equation, tuple(v), x, theta.tensors, wanted), strict=True):
        found[i] = grad
    products, _ = theta.filled(found)
    return tuple(products)


def root_jvp(
    optimality_fun: Callable[..., Tree],
    sol: Tree,
    args: tuple[Any, ...],
    tangents: tuple[Any, ...],
    solve: Solve = "auto",
) -> Tree:
    """J w at a root: the derivative of x*(args) along `tangents`.

    Parameters
    ----------
    tangents : one for each argument and structured like it; None for an argument, or a part of it, that stands still.
    optimality_fun, sol, args, solve : as in `root_vjp`.

    Returns
    -------
    product : structured like sol.
    """
    _check_solve(solve)
    if len(tangents) != len(args):
        raise ValueError(f"tangents must be one for each of the {len(args)} arguments, got {len(tangents)}")
    theta = _Tensors((args, {}))
    equation, x = _equation_at(optimality_fun, sol, theta, _LinearSolver(solve))
    moves: list[Tensor | None] = []
    for k, (argument, tangent) in enumerate(zip(args, tangents, strict=True)):
        leaves, structure = pytree.tree_flatten(argument)
        given = [None] * len(leaves) if tangent is None else structure.flatten_up_to(tangent)
        for leaf, move in zip(leaves, given, strict=True):
            if isinstance(leaf, Tensor):
                if move is not None and move.shape != leaf.shape:
                    raise ValueError(f"tangents[{k}] must have shape {tuple(leaf.shape)}, got {tuple(move.shape)}")
                moves.append(move)
    return pytree.tree_unflatten(push_forward(equation, moves, x, theta.tensors), equation.structure)


def jacobian(f: Callable[..., Tree], args: Any) -> Tree:
    """All derivatives of ``f(*args)``, by reverse mode if it has fewer outputs than inputs, else by forward mode.

    Parameters
    ----------
    f : function of the arguments, for instance ``functools.partial(solver, init)``.
    args : a tuple of arguments, or a single tensor. Those that hold floating-point tensors only are differentiated.

    Returns
    -------
    derivatives : structured like f's output; in the place of each tensor, for a tuple of arguments a tuple with one
        entry for each differentiated argument, of shape (*output, *argument); for a single tensor just that entry.
    """
    single = isinstance(args, Tensor)
    args = (args,) if single else args
    places = tuple(
        i for i, argument in enumerate(args) if (leaves := pytree.tree_leaves(argument)) and all(map(_is_float, leaves))
    )
    if not places:
        raise ValueError("args must hold at least one argument made of floating-point tensors")
    inputs = sum(leaf.numel() for i in places for leaf in pytree.tree_leaves(args[i]))
    with torch.no_grad():
        outputs = sum(leaf.numel() for leaf in pytree.tree_leaves(f(*args)) if isinstance(leaf, Tensor))
    transform = torch.func.jacrev if outputs <= inputs else torch.func.jacfwd
    return transform(f, argnums=places[0] if single else places)(*args)


def _decorator(
    optimality_fun: Callable[..., Tree],
    has_aux: bool,
    solve: Solve,
    ridge: float | None,
    check: bool | float,
    tol: float | None,
    maxiter: int | None,
    vectorize: bool,
) -> Callable[[Callable[..., Any]], ImplicitSolver]:
    _check_solve(solve)
    if callable(solve) and not ridge is tol is maxiter is None:
        raise ValueError(
            "ridge, tol and maxiter are for the named solvers; give a callable its own with functools.partial"
        )
    penalty = linear_solve.check_options(ridge, tol, maxiter)
    threshold = None if check is False else FAR_FROM_A_ROOT if check is True else check_number("check", check, above=0)

    def decorate(solver: Callable[..., Any]) -> ImplicitSolver:
        linear_solver = _LinearSolver(solve, penalty, tol, maxiter)
        return ImplicitSolver(solver, optimality_fun, linear_solver, has_aux, threshold, vectorize)

    return decorate


def _check_solve(solve: Solve) -> None:
    if not callable(solve):
        check_choice("solve", solve, SOLVERS)


class _LinearSolver:
    """Solves the systems of a linearisation in the way that was asked for, and remembers how that went."""

    def __init__(self, solve: Solve, ridge: float = 0.0, tol: float | None = None, maxiter: int | None = None) -> None:
        self.solve, self.ridge, self.tol, self.maxiter = solve, ridge, tol, maxiter
        self.info: LinearSolveInfo | None = None

    def __call__(self, at: Linearisation, b: Vectors, transposed: bool) -> Vectors:
        method = self.solve
        if method == "auto" and at.size <= DENSE_UP_TO:
            method = "lu"
        products = (at.pull, at.push) if transposed else (at.push, at.pull)
        if callable(method):
            outcome = _by_callable(method, at, products, b)
            u, method = outcome.x, getattr(method, "__name__", type(method).__name__)
        elif method in ("lu", "cholesky"):
            A = at.dense()
            outcome = linear_solve.dense(
                method, A.mT if transposed else A, b.permute(1, 2, 0), ridge=self.ridge, tol=self.tol
            )
            u = outcome.x.permute(2, 0, 1)
        else:
            method, outcome = self._by_krylov(method, at, products, b)
            u = outcome.x.reshape(b.shape)
        self.info = LinearSolveInfo(method, outcome.iterations, outcome.residual, outcome.converged)
        if not outcome.converged:
            warnings.warn(
                f"the derivative of the solution is inaccurate: {outcome.message(method)}. If A is singular, 'lu' and "
                "'normal_cg' give a least-squares solution and a ridge a smooth one; if it is badly conditioned, more "
                "maxiter or another solve may help",
                RuntimeWarning,
                stacklevel=2,
            )
        return u

    def _by_krylov(
        self, method: str, at: Linearisation, products: tuple[Callable[[Vectors], Vectors], ...], b: Vectors
    ) -> tuple[str, Outcome]:
        rows = b.reshape(-1, at.size)
        matvec, rmatvec = (_on_rows(product, b.shape) for product in products)
        pull = _on_rows(at.pull, b.shape)  # of a symmetric A's two products, this is the cheaper
        run = functools.partial(linear_solve.krylov, b=rows, ridge=self.ridge, tol=self.tol, maxiter=self.maxiter)
        if method == "auto":
            # A symmetric A is most often definite; when it is not, the residual tells.
            if linear_solve.is_symmetric(pull, rows):
                outcome = run("cg", pull, None)
                if outcome.converged:
                    return "cg", outcome
            method = "normal_cg"
        if method == "cg":
            linear_solve.check_symmetric(pull, rows)
            matvec = pull
        return method, run(method, matvec, rmatvec)


def _on_rows(product: Callable[[Vectors], Vectors], shape: torch.Size) -> linear_solve.Product:
    return lambda rows: product(rows.reshape(-1, *shape[1:])).reshape(rows.shape)


def _by_callable(
    solve: Callable[..., Any], at: Linearisation, products: tuple[Callable[[Vectors], Vectors], ...], b: Vectors
) -> Outcome:
    """Let the user's own solver loose on one right-hand side of one system at a time."""

    def tree(vector: Tensor) -> Tree:
        return pytree.tree_unflatten(unravel(vector, at.shapes), at.structure)

    def of_system(k: int, product: Callable[[Vectors], Vectors]) -> Callable[[Tree], Tree]:
        def times(v: Tree) -> Tree:
            padded = torch.zeros_like(b[:1])
            padded[0, k] = ravel(pytree.tree_leaves(v))
            return tree(product(padded)[0, k])

        return times

    used = products if _takes_rmatvec(solve) else products[:1]
    u, solved, iterations = torch.zeros_like(b), [], 0
    for r in range(b.shape[0]):
        for k in range(b.shape[1]):
            found = solve(*(of_system(k, product) for product in used), tree(b[r, k]))
            if isinstance(found, LinearSolution):
                solved.append(found.converged)
                iterations = max(iterations, found.iterations)
                found = found.x
            u[r, k] = ravel(pytree.tree_leaves(found))
    missing, scale = b - products[0](u), torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    residual = linear_solve.worst_residual(missing, scale)
    converged = all(solved) if solved else residual <= math.sqrt(torch.finfo(b.dtype).eps)
    return Outcome(u, converged, iterations, residual, ())


def _takes_rmatvec(solve: Callable[..., Any]) -> bool:
    """Whether a linear solver is to be called as (matvec, rmatvec, b) rather than (matvec, b)."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(solve).parameters.values()
    return sum(p.kind in positional and p.default is p.empty for p in parameters) >= 3


class _Tensors:
    """A tree, taken apart into its tensors and the rest."""

    def __init__(self, tree: Tree) -> None:
        self.leaves, self.structure = pytree.tree_flatten(tree)
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.tensors: Leaves = tuple(self.leaves[i] for i in self.places)
        for tensor in self.tensors:
            if tensor.is_complex() and tensor.requires_grad:
                raise TypeError("complex arguments cannot be differentiated; pass their real and imaginary parts")

    def replaced(self, tensors: Sequence[Tensor]) -> Tree:
        """The tree with other tensors in their places."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self.structure)

    def filled(self, values: Sequence[Any]) -> Tree:
        """The tree's structure with values in the places of the tensors, and None elsewhere."""
        leaves: list[Any] = [None] * len(self.leaves)
        for place, value in zip(self.places, values, strict=True):
            leaves[place] = value
        return pytree.tree_unflatten(leaves, self.structure)


def _equation(
    optimality_fun: Callable[..., Tree], structure: Any, unknowns: int, theta: _Tensors, linear_solver: _LinearSolver
) -> Equation:
    def residual(x: Leaves, tensors: Leaves) -> Leaves:
        args, kwargs = theta.replaced(tensors)
        value = optimality_fun(pytree.tree_unflatten(x, structure), *args, **kwargs)
        return tuple(_like(x, structure, value, "optimality_fun"))

    return Equation(residual, unknowns, structure, linear_solver)


def _equation_at(
    optimality_fun: Callable[..., Tree], sol: Tree, theta: _Tensors, linear_solver: _LinearSolver
) -> tuple[Equation, Leaves]:
    leaves, structure = pytree.tree_flatten(sol)
    x = _as_solution(leaves, theta.tensors)
    return _equation(optimality_fun, structure, len(x), theta, linear_solver), x


class _Call:
    """One call of a decorated solver: how to run it, and, once it has run, what it returned."""

    def __init__(self, implicit: ImplicitSolver, start: _Tensors, theta: _Tensors) -> None:
        self.implicit, self.start, self.theta = implicit, start, theta
        self.inits = len(start.tensors)
        self.unknowns = 0
        self.structure: Any = None
        self.returned_aux = _Tensors(None)
        self.under_vmap = False

    def run(self, tensors: Leaves) -> Leaves:
        output = self.solve(tensors)
        self.verify(output, tensors, self.equation())
        aux = self.returned_aux.replaced(output[self.unknowns :])
        if self.implicit._threshold is not None and isinstance(aux, Mapping) and bool(aux.get("active_set_changed")):
            _warn("the active set changed in the solver's last step: the derivative may be far off until it settles")
        return output

    def solve(self, tensors: Leaves) -> Leaves:
        detached = [tensor.detach() for tensor in tensors]
        init = self.start.replaced(detached[: self.inits])
        args, kwargs = self.theta.replaced(detached[self.inits :])
        with torch.no_grad():
            output = self.implicit._solver(init, *args, **kwargs)
        if self.implicit._has_aux:
            if not (isinstance(output, tuple) and len(output) == 2):
                raise TypeError(f"with has_aux=True the solver must return (x, aux), got a {type(output).__name__}")
            output, aux = output
            self.returned_aux = _Tensors(pytree.tree_map(_number_as_tensor, aux) if self.under_vmap else aux)
        leaves, self.structure = pytree.tree_flatten(output)
        x = _as_solution(leaves, detached)
        self.unknowns = len(x)
        # Copies: the solver may return its start, or a buffer that it will use again.
        return (*(leaf.detach().clone() for leaf in x), *(leaf.detach().clone() for leaf in self.returned_aux.tensors))

    def verify(self, output: Leaves, tensors: Leaves, equation: Equation) -> None:
        x = output[: self.unknowns]
        if not all(bool(leaf.isfinite().all()) for leaf in x):
            raise ValueError("the solver returned a solution that is not finite")
        threshold = self.implicit._threshold
        if threshold is not None:
            at = Linearisation(equation, x, tensors[self.inits :])
            size = math.sqrt(sum(float(leaf.detach().square().sum()) for leaf in at.residual))
            if not size <= threshold:
                _warn(f"x is no solution: |F(x, θ)| = {size:.1e} > {threshold:.1e}; its derivative is as far off")

    def equation(self) -> Equation:
        implicit = self.implicit
        return _equation(implicit._optimality_fun, self.structure, self.unknowns, self.theta, implicit._linear_solver)

    def aux(self, tensors: Sequence[Tensor]) -> Tree:
        return self.returned_aux.replaced(tensors)

    def batched(self, size: int, dims: Sequence[int | None]) -> Call:
        self.under_vmap = True
        return _BatchedCall(self, self, size, tuple(dims))


class _BatchedCall:
    """A call under torch.vmap, possibly of a call that is itself under torch.vmap."""

    def __init__(self, single: _Call | _BatchedCall, innermost: _Call, size: int, dims: tuple[int | None, ...]) -> None:
        self.single, self.innermost, self.size, self.dims = single, innermost, size, dims
        self.inits = innermost.inits

    def run(self, tensors: Leaves) -> Leaves:
        output = self.solve(tensors)
        self.innermost.verify(output, tensors, self.equation())
        return output

    def solve(self, tensors: Leaves) -> Leaves:
        if self.innermost.implicit._vectorize:
            return torch.func.vmap(lambda *sample: self.single.solve(sample), in_dims=self.dims)(*tensors)
        outputs = []
        for i in range(self.size):
            sample = tuple(t if dim is None else t[i] for t, dim in zip(tensors, self.dims, strict=True))
            outputs.append(self.single.solve(sample))
        return tuple(torch.stack(leaves) for leaves in zip(*outputs, strict=True))

    def equation(self) -> Equation:
        return self.single.equation().batched(self.size, self.dims[self.inits :])

    def batched(self, size: int, dims: Sequence[int | None]) -> Call:
        return _BatchedCall(self, self.innermost, size, tuple(dims))


def _number_as_tensor(leaf: Any) -> Any:
    """What a solver counts for each sample must be stacked over the samples."""
    return torch.as_tensor(leaf) if isinstance(leaf, bool | int | float) else leaf


def _is_float(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _as_solution(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> Leaves:
    """The leaves of x as tensors of one floating dtype; arrays are converted to that of the arguments."""
    like = next(filter(_is_float, tensors), torch.empty(0))
    x = tuple(leaf if isinstance(leaf, Tensor) else _converted(leaf, like) for leaf in leaves)
    if not x or not all(map(_is_float, x)) or len({leaf.dtype for leaf in x}) != 1:
        kinds = ", ".join(sorted({str(leaf.dtype) for leaf in x})) or "none"
        raise TypeError(f"the solution must be made of floating-point tensors of one dtype, got {kinds}")
    return x


def _converted(leaf: Any, like: Tensor) -> Tensor:
    try:
        return torch.as_tensor(leaf, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"the solution must be made of tensors or arrays, got a {type(leaf).__name__}") from error


def _like(x: Sequence[Tensor], structure: Any, value: Tree, name: str) -> list[Tensor]:
    """The leaves of a value that must have the structure and the shapes of x."""
    leaves, found = pytree.tree_flatten(value)
    if found != structure or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(f"{name} must have the structure of x, {_shape(x, structure)}, got {_shape(leaves, found)}")
    if any(a.shape != b.shape for a, b in zip(x, leaves, strict=True)):
        raise TypeError(f"{name} must have the shapes of x, {_shape(x, structure)}, got {_shape(leaves, found)}")
    return leaves


def _shape(leaves: Sequence[Any], structure: Any) -> str:
    """A tree for people: the shape in the place of each tensor, the type in the place of anything else."""
    return str(pytree.tree_unflatten([tuple(a.shape) if isinstance(a, Tensor) else type(a) for a in leaves], structure))


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
