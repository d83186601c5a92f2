"""The derivative rules: three autograd functions over one description of F(x, θ) = 0.

A = ∂_1 F(x, θ), so that A is positive definite when F is the gradient of a strongly convex function; the paper's A is
its negative, and the sign cancels. With J = ∂x*(θ), the implicit function theorem says A J = -∂_2 F(x*, θ).

- `Root` runs the solver; its rules are vᵀJ = -uᵀ ∂_2 F with Aᵀ u = v, and J w = -A⁻¹ (∂_2 F w).
- `Solve` is u = A⁻¹ b or A⁻ᵀ b as a function of b, x and θ. Differentiating a `Root` twice differentiates it.
- `Pullback` is all of vᵀJ at once, for a derivative that is not differentiated again: F is recorded once by plain
  autograd and that graph serves every product, which is what makes a backward pass cheap.

torch.func's levels are peeled off before `forward` runs: there, every tensor is plain. `backward` and `jvp` run with
the levels in place, so they are compositions of torch.func.vjp, which can be differentiated again. Forward products
are transposes of reverse ones: F needs no forward formulas, and they can be taken inside any other forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import Function

Leaves = tuple[Tensor, ...]
Vectors = Float[Tensor, "r k d"]  # r right-hand sides of each of k systems with d unknowns


def vjp(function: Callable[..., Any], *at: Any) -> tuple[Any, Callable[..., Any]]:
    """The value of a function, and its pullback, from a cotangent of the value to a tuple of them, one an argument."""
    found = torch.func.vjp(function, *at)
    return found[0], found[1]


class LinearSolver(Protocol):
    """Solves the systems of a `Linearisation`: A u = b, or Aᵀ u = b."""

    def __call__(self, at: Linearisation, b: Vectors, transposed: bool) -> Vectors: ...


@dataclass(frozen=True)
class Equation:
    """F(x, θ) = 0, in terms of the leaves of x and θ.

    Attributes
    ----------
    residual : maps (leaves of x, tensor leaves of θ) to the leaves of F(x, θ).
    unknowns : how many leaves x has.
    structure : of x.
    solver : of its linear systems.
    batch : sizes of the leading dimensions that torch.vmap has added to the leaves of x: as many separate systems.
    """

    residual: Callable[[Leaves, Leaves], Leaves]
    unknowns: int
    structure: Any
    solver: LinearSolver
    batch: tuple[int, ...] = ()

    def batched(self, size: int, dims: Sequence[int | None]) -> Equation:
        """`size` equations side by side; `dims` holds 0 for the leaves of θ that differ between them, else None."""
        residual = torch.func.vmap(self.residual, in_dims=((0,) * self.unknowns, tuple(dims)), randomness="same")
        return replace(self, residual=residual, batch=(size, *self.batch))

    def split(self, tensors: Sequence[Tensor]) -> tuple[Leaves, Leaves, Leaves]:
        """The arguments of `Solve` and `Pullback`: a vector shaped like x, x itself, and θ."""
        n = self.unknowns
        return tuple(tensors[:n]), tuple(tensors[n : 2 * n]), tuple(tensors[2 * n :])


class Linearisation:
    """F recorded once at (x, θ) by plain autograd; every product reuses that graph.

    `wanted` are the positions of the leaves of θ for which `pull_theta` will be called.
    """

    def __init__(self, equation: Equation, x: Leaves, theta: Leaves, wanted: Sequence[int] = ()) -> None:
        self.structure = equation.structure
        self.batch = equation.batch
        self.systems = prod(self.batch)
        self.shapes = [leaf.shape[len(self.batch) :] for leaf in x]
        self.sizes = [prod(shape) for shape in self.shapes]
        self.size = sum(self.sizes)
        with torch.enable_grad():
            self.x = tuple(leaf.detach().requires_grad_() for leaf in x)
            leaves = tuple(leaf.detach() for leaf in theta)
            self.theta = tuple(leaves[i].requires_grad_() for i in wanted)
            residual = equation.residual(self.x, leaves)
        # A leaf of F that is constant has no graph, and a zero row in A.
        self.live = [i for i, leaf in enumerate(residual) if leaf.requires_grad]
        self.residual = [residual[i] for i in self.live]
        if not self.live:
            raise ValueError("the optimality function does not depend on x: its value carries no gradient")
        self._transposed: tuple[Leaves, Leaves] | None = None

    def leaves(self, vectors: Vectors) -> list[Tensor]:
        """The vectors in the shapes of the leaves of x, right-hand sides first."""
        parts = [vectors] if len(self.x) == 1 else torch.split(vectors, self.sizes, -1)
        return [part.reshape((len(vectors), *leaf.shape)) for part, leaf in zip(parts, self.x, strict=True)]

    def vectors(self, leaves: Sequence[Tensor]) -> Vectors:
        """The inverse of `leaves`, whatever the leading dimensions of right-hand sides."""
        count = leaves[0].numel() // max(self.x[0].numel(), 1)
        parts = [leaf.reshape(count, self.systems, size) for leaf, size in zip(leaves, self.sizes, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def pull(self, v: Vectors) -> Vectors:
        """Aᵀ v."""
        leaves = self.leaves(v)
        return self.vectors(_pulled(self.residual, self.x, [leaves[i] for i in self.live]))

    def pull_theta(self, v: Vectors) -> Leaves:
        """vᵀ ∂_2 F for each wanted leaf of θ, right-hand sides first."""
        leaves = self.leaves(v)
        return _pulled(self.residual, self.theta, [leaves[i] for i in self.live])

    def push(self, v: Vectors) -> Vectors:
        """A v: the transpose of w ↦ Aᵀ w, which is linear in w and therefore recorded once, at w = 0."""
        if self._transposed is None:
            with torch.enable_grad():
                w = tuple(torch.zeros_like(leaf, requires_grad=True) for leaf in self.residual)
                pulled = torch.autograd.grad(
                    self.residual, self.x, w, create_graph=True, allow_unused=True, materialize_grads=True
                )
            self._transposed = w, pulled
        w, pulled = self._transposed
        leaves = self.leaves(v)
        linear = [i for i, leaf in enumerate(pulled) if leaf.requires_grad]
        products = _pulled([pulled[i] for i in linear], w, [leaves[i] for i in linear])
        full = [torch.zeros_like(leaf) for leaf in leaves]
        for i, product in zip(self.live, products, strict=True):
            full[i] = product
        return self.vectors(full)

    def dense(self) -> Float[Tensor, "k d d"]:
        """A of every system: row i is the pullback of the i-th unit vector, all in one batched reverse pass."""
        units = torch.eye(self.size, dtype=self.x[0].dtype, device=self.x[0].device)
        return self.pull(units[:, None].expand(-1, self.systems, -1)).permute(1, 0, 2)


def _pulled(outputs: Sequence[Tensor], inputs: Leaves, cotangents: Sequence[Tensor]) -> Leaves:
    """vᵀ ∂outputs/∂inputs for every v of the first dimension of the cotangents."""

    def pull(v: Sequence[Tensor]) -> Leaves:
        return torch.autograd.grad(outputs, inputs, v, retain_graph=True, allow_unused=True, materialize_grads=True)

    if len(cotangents[0]) == 1:
        return tuple(product[None] for product in pull([leaf[0] for leaf in cotangents]))
    return torch.func.vmap(pull)(tuple(cotangents))


class Solve(Function):
    """u with A u = b, or Aᵀ u = b when `transposed`; A = ∂_1 F(x, θ).

    Leaves of b may have more leading dimensions than those of x: several right-hand sides for each system.
    """

    @staticmethod
    def forward(equation: Equation, transposed: bool, *tensors: Tensor) -> Leaves:
        b, x, theta = equation.split(tensors)
        at = Linearisation(equation, x, theta)
        u = at.leaves(equation.solver(at, at.vectors(b), transposed))
        return tuple(leaf.reshape(like.shape) for leaf, like in zip(u, b, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        ctx.equation, ctx.transposed, *tensors = inputs
        _, x, theta = ctx.equation.split(tensors)
        ctx.save_for_backward(*output, *x, *theta)
        ctx.save_for_forward(*output, *x, *theta)

    @staticmethod
    def backward(ctx: Any, *w: Tensor) -> tuple[Any, ...]:
        # With s = M⁻ᵀ w for M = A or Aᵀ: the derivative in b is s, in (x, θ) that of -sᵀ M(x, θ) u.
        equation, n = ctx.equation, ctx.equation.unknowns
        u, x, theta = equation.split(ctx.saved_tensors)
        s = solve(equation, not ctx.transposed, *w, *x, *theta)
        places = [i for i, needed in enumerate(ctx.needs_input_grad[2 + n :]) if needed]
        grads: list[Tensor | None] = [None] * (n + len(theta))
        if places:
            left, right = (u, s) if ctx.transposed else (s, u)

            def form(*moving: Tensor) -> Tensor:
                pulled = _product(equation, True, left, *_moved(places, moving, x, theta))
                return -torch.stack([(a * b).sum() for a, b in zip(pulled, right, strict=True)]).sum()

            value, pull = vjp(form, *[(*x, *theta)[i] for i in places])
            for i, grad in zip(places, pull(torch.ones_like(value)), strict=True):
                grads[i] = grad
        return None, None, *s, *grads

    @staticmethod
    def jvp(ctx: Any, _equation: None, _transposed: None, *tangents: Tensor | None) -> Leaves:
        # M u = b  =>  M du = db - (dM) u.
        _refuse_forward_over_forward()
        equation = ctx.equation
        u, x, theta = equation.split(ctx.saved_tensors)
        places = [i for i, tangent in enumerate(tangents[len(u) :]) if tangent is not None]
        right = [torch.zeros_like(leaf) if db is None else db for leaf, db in zip(u, tangents, strict=False)]
        if places:

            def moved(*moving: Tensor) -> Leaves:
                return _product(equation, ctx.transposed, u, *_moved(places, moving, x, theta))

            moves = _pushed(moved, [(*x, *theta)[i] for i in places], [tangents[len(u) + i] for i in places])
            right = [db - move for db, move in zip(right, moves, strict=True)]
        return solve(equation, ctx.transposed, *right, *x, *theta)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], equation: Equation, transposed: bool, *tensors: Tensor
    ) -> tuple[Leaves, Any]:
        batched, tensors, place = _batch_systems(info.batch_size, in_dims[2:], equation, tensors)
        return solve(batched, transposed, *tensors), (place,) * equation.unknowns


class Pullback(Function):
    """vᵀJ for the leaves of θ at the positions `wanted`; it cannot be differentiated, and is quick instead."""

    @staticmethod
    def forward(equation: Equation, wanted: Sequence[int], *tensors: Tensor) -> Leaves:
        v, x, theta = equation.split(tensors)
        at = Linearisation(equation, x, theta, wanted)
        u = equation.solver(at, at.vectors(v), transposed=True)
        sides = v[0].shape[: v[0].ndim - x[0].ndim]
        return tuple(-grad.reshape((*sides, *grad.shape[1:])) for grad in at.pull_theta(u))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], equation: Equation, wanted: Sequence[int], *tensors: Tensor
    ) -> tuple[Leaves, Any]:
        size, dims = info.batch_size, list(in_dims[2:])
        if any(dim is not None for dim in dims[equation.unknowns :]):
            # Each sample wants its own derivative, so that no leaf of θ may be shared.
            tensors = tuple(tensors)
            for i in (2 * equation.unknowns + i for i in wanted):
                if dims[i] is None:
                    tensors = (*tensors[:i], tensors[i].expand(size, *tensors[i].shape), *tensors[i + 1 :])
                    dims[i] = 0
        batched, tensors, place = _batch_systems(size, dims, equation, tensors)
        return pullback(batched, wanted, *tensors), (place,) * len(wanted)


class Call(Protocol):
    """One call of a decorated solver."""

    inits: int  # how many of the tensors belong to the start

    def run(self, tensors: Leaves) -> Leaves:
        """The leaves of x, then tensors of the auxiliary output."""
        ...

    def equation(self) -> Equation:
        """What the solution satisfies; known once the solver has run."""
        ...

    def batched(self, size: int, dims: Sequence[int | None]) -> Call: ...


class Root(Function):
    """x*(θ), found by a solver that is a black box."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> Leaves:
        return call.run(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        call, *tensors = inputs
        ctx.equation, ctx.inits, ctx.outputs = call.equation(), call.inits, len(output)
        n = ctx.equation.unknowns
        ctx.mark_non_differentiable(*output[n:])
        # The returned x itself: a detached copy would cut the second derivative without a sign of it.
        saved = (*output[:n], *tensors[call.inits :])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Any, ...]:
        n = ctx.equation.unknowns
        x, theta = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1 + ctx.inits :]) if needed]
        grads: list[Tensor | None] = [None] * len(theta)
        if wanted:
            for i, grad in zip(wanted, pull_back(ctx.equation, v[:n], x, theta, wanted), strict=True):
                grads[i] = grad
        return *[None] * (1 + ctx.inits), *grads

    @staticmethod
    def jvp(ctx: Any, _call: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_forward_over_forward()
        n = ctx.equation.unknowns
        x, theta = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        return *push_forward(ctx.equation, tangents[ctx.inits :], x, theta), *[None] * (ctx.outputs - n)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Call, *tensors: Tensor) -> tuple[Leaves, Any]:
        dims = in_dims[1:]
        batched = call.batched(info.batch_size, [None if dim is None else 0 for dim in dims])
        return root(batched, *_leading(tensors, dims)), 0


solve: Callable[..., Leaves] = Solve.apply
pullback: Callable[..., Leaves] = Pullback.apply
root: Callable[..., Leaves] = Root.apply


def pull_back(equation: Equation, v: Leaves, x: Leaves, theta: Leaves, wanted: Sequence[int]) -> Leaves:
    """vᵀJ for the leaves of θ at the positions `wanted`."""
    if not torch.is_grad_enabled():
        levels = retrieve_all_functorch_interpreters()
        pull = pullback if levels else Pullback.forward  # the detour through apply is for torch.vmap alone
        return pull(equation, wanted, *v, *x, *theta)
    u = solve(equation, True, *v, *x, *theta)  # Aᵀ u = v

    def residual(*moving: Tensor) -> Leaves:
        return equation.residual(*_moved([len(x) + i for i in wanted], moving, x, theta))

    _, pull = vjp(residual, *[theta[i] for i in wanted])
    return tuple(-grad for grad in pull(u))  # -uᵀ ∂_2 F


def push_forward(equation: Equation, tangents: Sequence[Tensor | None], x: Leaves, theta: Leaves) -> Leaves:
    """J w, for tangents w of the leaves of θ; None stands for zero."""
    moves = [i for i, tangent in enumerate(tangents) if tangent is not None]
    if not moves:
        return tuple(torch.zeros_like(leaf) for leaf in x)

    def residual(*moving: Tensor) -> Leaves:
        return equation.residual(*_moved([len(x) + i for i in moves], moving, x, theta))

    pushed = _pushed(residual, [theta[i] for i in moves], [tangents[i] for i in moves])  # ∂_2 F w
    return solve(equation, False, *[-leaf for leaf in pushed], *x, *theta)


def _moved(places: Sequence[int], moving: Sequence[Tensor], x: Leaves, theta: Leaves) -> tuple[Leaves, Leaves]:
    """x and θ with the leaves at the given places, counted through both, replaced."""
    leaves = [*x, *theta]
    for place, leaf in zip(places, moving, strict=True):
        leaves[place] = leaf
    return tuple(leaves[: len(x)]), tuple(leaves[len(x) :])


def _pushed(function: Callable[..., Leaves], at: Sequence[Tensor], tangents: Sequence[Any]) -> Leaves:
    """The derivative of a function along tangents, as the transpose of its pullback, which is linear."""
    value, pull = vjp(function, *at)
    _, push = vjp(pull, tuple(torch.zeros_like(leaf) for leaf in value))
    pushed: Leaves = push(tuple(tangents))[0]
    return pushed


def _product(equation: Equation, transposed: bool, v: Leaves, x: Leaves, theta: Leaves) -> Leaves:
    """A v or Aᵀ v as a differentiable function of everything, for v with any number of right-hand sides."""

    def residual(*moving: Tensor) -> Leaves:
        return equation.residual(moving, theta)

    def product(*leaves: Tensor) -> Leaves:
        return vjp(residual, *x)[1](leaves) if transposed else _pushed(residual, x, leaves)

    for _ in range(v[0].ndim - x[0].ndim):
        product = torch.func.vmap(product)
    return product(*v)


def _leading(tensors: Sequence[Tensor], dims: Sequence[int | None]) -> Leaves:
    """The tensors with their batch dimension, where they have one, in front."""
    return tuple(t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True))


def _batch_systems(
    size: int, dims: Sequence[int | None], equation: Equation, tensors: Sequence[Tensor]
) -> tuple[Equation, Leaves, int]:
    """The arguments of `Solve` or `Pullback` under torch.vmap, and where the result has its batch dimension.

    When only the vectors differ, one matrix serves them all; else the systems are solved side by side.
    """
    n = equation.unknowns
    moved = list(_leading(tensors, dims))
    alike = all(dim is None for dim in dims[n:])
    for i in range(n if alike else 2 * n):
        if dims[i] is None:
            moved[i] = moved[i].expand(size, *moved[i].shape)
    if alike:
        return equation, tuple(moved), 0
    sides = moved[0].ndim - moved[n].ndim
    moved[:n] = [leaf.movedim(0, sides) for leaf in moved[:n]]
    theta_dims = [None if dim is None else 0 for dim in dims[2 * n :]]
    return equation.batched(size, theta_dims), tuple(moved), sides


def _refuse_forward_over_forward() -> None:
    # torch disables the outer forward mode while it runs a function's own `jvp`: the second derivative would be 0.
    if sum(level.key() == TransformType.Jvp for level in retrieve_all_functorch_interpreters()) > 1:
        raise NotImplementedError(
            "forward mode over forward mode (jacfwd of jacfwd, jvp of jvp) is not possible through torch's custom "
            "functions; use forward over reverse, torch.func.hessian, or reverse over either"
        )
