"""The catalogue: conditions that solutions of optimisation problems satisfy, as functions to differentiate.

Each function builds one condition from the ingredients of the problem. A `Residual` F, with F(x, θ) = 0 at the
solution, goes to `custom_root`; a `FixedPoint` T, with T(x, θ) = x, to `custom_fixed_point`. Which condition is used
for differentiation need not have anything to do with which solver found x, and the step of a fixed point changes the
conditioning of the linear system, not the derivative.

Variables x may be any tree of tensors. Parameters may be any tree; a parameter that is None is not passed on, so that
an ingredient without parameters is simply a function of x.

Reference: Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022 (arXiv 2105.15183), Table 1;
the conic residual: Busseti, Moursi and Boyd, "Solution Refinement at Regular Points of Conic Problems", 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from workingpapers.common.validation import check_number
from workingpapers.optimization.implicit_diff.autograd import vjp

Tree = Any


@dataclass(frozen=True)
class Residual:
    """F, which vanishes at the solution: for `custom_root`."""

    function: Callable[..., Tree]

    def __call__(self, x: Tree, *parameters: Any) -> Tree:
        return self.function(x, *parameters)


@dataclass(frozen=True)
class FixedPoint:
    """T, which the solution maps to itself: for `custom_fixed_point`."""

    function: Callable[..., Tree]

    def __call__(self, x: Tree, *parameters: Any) -> Tree:
        return self.function(x, *parameters)


def stationary(f: Callable[..., Tensor]) -> Residual:
    """F(x, *θ) = ∇_1 f(x, *θ): an unconstrained minimum of a smooth f. A is f's Hessian, so "cg" applies if convex.

    Parameters
    ----------
    f : objective, ``f(x, *θ)``, a scalar.
    """
    return Residual(torch.func.grad(f))


def projected_gradient(f: Callable[..., Tensor], projection: Callable[..., Tree], *, step: float = 1.0) -> FixedPoint:
    """T(x, θ_f, θ_C) = proj_C(x - η ∇_1 f(x, θ_f), θ_C): a minimum of f over a convex set C.

    Parameters
    ----------
    f : objective, ``f(x, θ_f)``, a scalar.
    projection : ``projection(v, θ_C)``, onto C.
    step : η > 0.
    """
    step = check_number("step", step, above=0)

    def mapped(x: Tree, theta_f: Any = None, theta_c: Any = None) -> Tree:
        return _apply(projection, _gradient_step(f, x, theta_f, step), theta_c)

    return FixedPoint(mapped)


def proximal_gradient(f: Callable[..., Tensor], prox: Callable[..., Tree], *, step: float = 1.0) -> FixedPoint:
    """T(x, θ_f, θ_g) = prox_{ηg}(x - η ∇_1 f(x, θ_f), θ_g): a minimum of f + g with g convex.

    Parameters
    ----------
    f : smooth part of the objective, ``f(x, θ_f)``, a scalar.
    prox : ``prox(v, θ_g, η)`` minimises ``|u - v|² / 2 + η g(u, θ_g)``; without parameters ``prox(v, scaling=η)``.
    step : η > 0.
    """
    step = check_number("step", step, above=0)

    def mapped(x: Tree, theta_f: Any = None, theta_g: Any = None) -> Tree:
        return _prox(prox, _gradient_step(f, x, theta_f, step), theta_g, step)

    return FixedPoint(mapped)


def block_proximal_gradient(
    f: Callable[..., Tensor], proxes: Sequence[Callable[..., Tree]], *, steps: Sequence[float]
) -> FixedPoint:
    """T_j(x, θ_f, θ_g) = prox_{η_j g_j}(x_j - η_j ∇_{x_j} f(x, θ_f), θ_{g,j}) for each block j, with its own step.

    The condition of block coordinate descent, whose blocks have Lipschitz constants of their own.

    Parameters
    ----------
    f : smooth part of the objective, ``f(x, θ_f)``, a scalar; x is a tuple of blocks.
    proxes : one for each block, as in `proximal_gradient`.
    steps : η_j > 0, one for each block.

    Notes
    -----
    θ_g is a sequence with one entry for each block, or None.
    """
    proxes = tuple(proxes)
    lengths = tuple(check_number("steps", step, above=0) for step in steps)
    if len(lengths) != len(proxes):
        raise ValueError(f"steps must be one for each of the {len(proxes)} proxes, got {len(lengths)}")

    def mapped(x: tuple[Tree, ...], theta_f: Any = None, theta_g: Any = None) -> tuple[Tree, ...]:
        gradients = _gradient(f, x, theta_f)
        parameters = (None,) * len(proxes) if theta_g is None else theta_g
        return tuple(
            _prox(prox, _step(block, gradient, step), theta, step)
            for prox, block, gradient, theta, step in zip(proxes, x, gradients, parameters, lengths, strict=True)
        )

    return FixedPoint(mapped)


def mirror_descent(
    f: Callable[..., Tensor],
    projection: Callable[..., Tree],
    mirror_map: Callable[[Tensor], Tensor],
    *,
    step: float = 1.0,
) -> FixedPoint:
    """T(x, θ_f, θ_C) = proj^φ_C(∇φ(x) - η ∇_1 f(x, θ_f), θ_C): a minimum of f over C in the geometry of φ.

    On the simplex, use `exponentiated_gradient`: there ∇φ = log is infinite on the boundary.

    Parameters
    ----------
    f : objective, ``f(x, θ_f)``, a scalar.
    projection : ``projection(y, θ_C)``, the Bregman projection from the dual space: argmin over C of φ(u) - <u, y>.
    mirror_map : ∇φ, applied to every tensor of x.
    step : η > 0.
    """
    step = check_number("step", step, above=0)

    def mapped(x: Tree, theta_f: Any = None, theta_c: Any = None) -> Tree:
        dual = _step(pytree.tree_map(mirror_map, x), _gradient(f, x, theta_f), step)
        return _apply(projection, dual, theta_c)

    return FixedPoint(mapped)


def exponentiated_gradient(f: Callable[..., Tensor], *, step: float = 1.0) -> FixedPoint:
    """T(x, θ_f) = x exp(-η ∇_1 f(x, θ_f)) / its sum: mirror descent on the simplex of the last dimension.

    The same map as `mirror_descent` with the entropy, written without logarithms: it is differentiable where
    coordinates of x are exactly 0, as the solutions of other solvers are.

    Parameters
    ----------
    f : objective, ``f(x, θ_f)``, a scalar; each tensor of x has nonnegative entries, of total 1 along the last
        dimension.
    step : η > 0.
    """
    step = check_number("step", step, above=0)

    def moved(leaf: Tensor, gradient: Tensor) -> Tensor:
        exponent = -step * gradient
        weights = leaf * torch.exp(exponent - exponent.detach().amax(-1, keepdim=True))
        return weights / weights.sum(-1, keepdim=True)

    def mapped(x: Tree, theta_f: Any = None) -> Tree:
        return pytree.tree_map(moved, x, _gradient(f, x, theta_f))

    return FixedPoint(mapped)


def newton(g: Callable[..., Tensor], *, step: float = 1.0) -> FixedPoint:
    """T(x, *θ) = x - η (∂_1 G)⁻¹ G(x, *θ): a root of G.

    Its derivative is G's own, `custom_root(G)`, but its linear system is as well conditioned as can be: A = η I. The
    price is a dense factorisation of ∂_1 G.

    Parameters
    ----------
    g : G, ``g(x, *θ)``; x is one tensor, and G(x) has its shape.
    step : η > 0.
    """
    step = check_number("step", step, above=0)

    def mapped(x: Tensor, *theta: Any) -> Tensor:
        def flat(v: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
            return g(v.reshape(x.shape), *theta).reshape(-1)

        v = x.reshape(-1)
        change: Tensor = torch.linalg.solve(torch.func.jacrev(flat)(v), flat(v))
        return (v - step * change).reshape(x.shape)

    return FixedPoint(mapped)


def kkt(
    f: Callable[..., Tensor],
    equality: Callable[..., Tree] | None = None,
    inequality: Callable[..., Tree] | None = None,
) -> Residual:
    """The equations of Karush, Kuhn and Tucker for: minimise f(z) such that G(z) = 0 and H(z) <= 0.

    F((z, ν, λ), θ_f, θ_G, θ_H) = (∇f + Gᵀν + Hᵀλ, G, λ∘H), the gradients and transposes meaning derivatives in z.
    The inequalities H <= 0 and λ >= 0 hold at the solution and are not differentiated. A is invertible under strict
    complementarity (no i with λ_i = 0 = H_i) and linearly independent active gradients.

    Parameters
    ----------
    f : objective, ``f(z, θ_f)``, a scalar.
    equality : G, ``equality(z, θ_G)``; without it, x is (z, λ).
    inequality : H, ``inequality(z, θ_H)``; without it, x is (z, ν).

    Raises
    ------
    ValueError : there is no constraint; `stationary` is the condition then.
    """
    if equality is None and inequality is None:
        raise ValueError("kkt needs equality or inequality; without constraints use stationary")

    def residual(x: tuple[Tree, ...], theta_f: Any = None, theta_eq: Any = None, theta_in: Any = None) -> Tree:
        z, *duals = x
        total = _gradient(f, z, theta_f)
        feasible: list[Tree] = []
        for constraint, theta, slack in ((equality, theta_eq, False), (inequality, theta_in, True)):
            if constraint is None:
                continue
            dual = duals[len(feasible)]
            value, pull = vjp(lambda z, c=constraint, t=theta: _apply(c, z, t), z)
            total = pytree.tree_map(torch.add, total, pull(dual)[0])
            feasible.append(pytree.tree_map(torch.mul, dual, value) if slack else value)
        return (total, *feasible)

    return Residual(residual)


def conic_residual(dual_projection: Callable[[Tensor], Tensor]) -> Residual:
    """The residual map of a cone program: minimise cᵀz such that A z + s = b, s in K.

    F((u, v, w), (A, b, c)) = ((Q - I) Π + I)(u, v, w) with Q = [[0, Aᵀ, c], [-A, 0, b], [-cᵀ, -bᵀ, 0]] and Π the
    projection on Rⁿ × K* × R_+. From a solution (z, y, s) take u = z, v = y - s, w = 1, shape (1,); from a root,
    z = u/w, y = Π_{K*}(v)/w. F is homogeneous, so A is singular along the root itself: the least-squares solution
    that "lu" and "normal_cg" return gives the right derivatives of these ratios.

    Parameters
    ----------
    dual_projection : Π_{K*}, the projection on the dual cone: the identity where K = {0}, `projection.nonnegative`
        where K is the nonnegative orthant.
    """

    def residual(x: tuple[Tensor, Tensor, Tensor], data: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        A, b, c = data
        u, v, w = x
        y, tau = dual_projection(v), w.clamp_min(0)
        return (
            A.mT @ y + c * tau,
            -(A @ u) + b * tau + v - y,
            -(c @ u) - (b @ y) + w - tau,
        )

    return Residual(residual)


def _apply(function: Callable[..., Tree], x: Tree, theta: Any) -> Tree:
    return function(x) if theta is None else function(x, theta)


def _prox(prox: Callable[..., Tree], v: Tree, theta: Any, step: float) -> Tree:
    return prox(v, scaling=step) if theta is None else prox(v, theta, step)


def _gradient(f: Callable[..., Tensor], x: Tree, theta: Any) -> Tree:
    return torch.func.grad(lambda x: _apply(f, x, theta))(x)


def _step(x: Tree, gradient: Tree, step: float) -> Tree:
    return pytree.tree_map(lambda a, g: a - step * g, x, gradient)


def _gradient_step(f: Callable[..., Tensor], x: Tree, theta: Any, step: float) -> Tree:
    return _step(x, _gradient(f, x, theta), step)
