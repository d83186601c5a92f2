"""The gradient of the hyper-objective by second derivatives: the reference for what the penalty approximates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workingpapers.common.curvature import HessianProduct
from workingpapers.common.validation import check_choice, check_integer, check_number
from workingpapers.optimization.bilevel_penalty.layout import Layout, Tree, Vector
from workingpapers.optimization.bilevel_penalty.penalty import Objective
from workingpapers.optimization.implicit_diff import linear_solve

Constraints = Callable[[Tree], Float[Tensor, " m"]]


def hypergradient(
    f: Objective,
    g: Objective,
    x: Tree,
    y: Tree,
    *,
    constraints: Constraints | None = None,
    method: Literal["pinv", "cg"] = "pinv",
    tol: float | None = None,
    max_iter: int | None = None,
    active_tol: float | None = None,
) -> Tree:
    """∇ψ(x) at a lower-level solution y, also where there are many or where constraints are active.

    With 𝓛(λ, y) = g(x, y) + Σ λ_i h_i(y) over the active constraints and † the pseudo-inverse,

        ∇ψ(x) = ∇_x f - [0, ∇²_xy g] (∇²𝓛)^† [0; ∇_y f],

    which without constraints is implicit differentiation, ∇_x f - ∇²_xy g (∇²_yy g)^† ∇_y f. Where g has many
    minimisers over Y, y must be the one that minimises f, the limit of argmin σ f + g for σ to 0: at another one the
    formula gives the derivative of another selection. An error in y makes a proportional one in the gradient.

    Parameters
    ----------
    f, g : upper and lower objective, (x, y) to a scalar tensor, g twice differentiable.
    x, y : tensors or trees of tensors.
    constraints : maps y to h(y), shape (m,), for Y = {h <= 0}; None for no constraints.
    method : "pinv" builds the matrix column by column and pseudo-inverts it, for up to a few hundred entries of y;
        "cg" solves by conjugate gradients with Hessian-vector products, the Hessian projected on the kernel of the
        active constraints, where it must be positive semidefinite.
    tol, max_iter : of the conjugate gradients: relative residual (by default 1e-10 in float64, 1e-6 in float32) and
        the most products (by default ten times the size of y).
    active_tol : a constraint is active when h_i(y) >= -active_tol; a multiplier is zero when it is at most active_tol
        times the size of ∇_y g, or active_tol where that is below 1. By default the square root of the dtype's
        epsilon; raise it to the accuracy of y.

    Returns
    -------
    A tree like x, detached; NaN where the constraints are degenerate, so that ∇ψ does not exist.

    Raises
    ------
    ValueError : f, g or h has the wrong shape, y violates a constraint, or y is no minimiser of g over them.

    Warns
    -----
    RuntimeWarning : the active constraints are degenerate, or the conjugate gradients did not converge.
    """
    check_choice("method", method, ("pinv", "cg"))
    layout_x, layout_y = Layout("x", x), Layout("y", y)
    if layout_x.dtype != layout_y.dtype:
        raise TypeError(f"x and y must share one dtype, got {layout_x.dtype} and {layout_y.dtype}")
    eps = torch.finfo(layout_y.dtype).eps
    active_tol = math.sqrt(eps) if active_tol is None else check_number("active_tol", active_tol, above=0)
    if tol is not None:
        check_number("tol", tol, above=0)
    if max_iter is not None:
        check_integer("max_iter", max_iter, at_least=1)
    if method == "pinv" and not tol is max_iter is None:
        raise ValueError("tol and max_iter are for method='cg'")
    at_x, at_y = layout_x.vector(x), layout_y.vector(y)

    upper = HessianProduct(lambda pair: f(layout_x.tree(pair[0]), layout_y.tree(pair[1])), (at_x, at_y))
    direct, target = upper.gradient

    def lower(w: Vector) -> Tensor:
        return g(layout_x.tree(at_x), layout_y.tree(w))

    lagrangian, jacobian = lower, None
    if constraints is not None:
        active, jacobian = _active_constraints(constraints, layout_y, at_y, active_tol)
        multipliers, degenerate = _multipliers(jacobian, HessianProduct(lower, at_y).gradient, active_tol)
        if degenerate:
            warnings.warn(
                f"the hyper-gradient does not exist here and is NaN: {degenerate}", RuntimeWarning, stacklevel=2
            )
            return layout_x.tree(torch.full_like(at_x, math.nan))

        def lagrangian(w: Vector) -> Tensor:
            return lower(w) + multipliers @ constraints(layout_y.tree(w))[active]

    curved = HessianProduct(lagrangian, at_y)
    if method == "pinv":
        solution = _by_pseudo_inverse(curved, jacobian, target)
    else:
        solution = _by_conjugate_gradients(curved, jacobian, target, tol, max_iter)

    # ∇²_xy g u is the derivative in x of <∇_y g(x, y), u>
    mixed = HessianProduct(lambda pair: g(layout_x.tree(pair[0]), layout_y.tree(pair[1])), (at_x, at_y))
    through, _ = mixed((torch.zeros_like(at_x), solution))
    return layout_x.tree(direct - through)


def _active_constraints(
    constraints: Constraints, layout: Layout, y: Vector, active_tol: float
) -> tuple[Bool[Tensor, " m"], Float[Tensor, "active n"]]:
    """Which constraints are active, and their gradients, one a row."""
    y = y.detach().requires_grad_()
    with torch.enable_grad():
        values = constraints(layout.tree(y))
        if not isinstance(values, Tensor) or values.ndim != 1:
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"constraints must return a vector, got {found}")
        if not bool((values <= active_tol).all()):
            raise ValueError(f"y violates a constraint: the largest h_i(y) is {float(values.detach().max()):.1e}")
        active = values.detach() >= -active_tol
        rows = [torch.autograd.grad(value, y, retain_graph=True)[0] for value in values[active]]
    return active, torch.stack(rows) if rows else y.new_zeros(0, len(y))


def _multipliers(jacobian: Tensor, slope: Vector, active_tol: float) -> tuple[Float[Tensor, " active"], str]:
    """λ with ∇_y g + Σ λ_i ∇h_i = 0, and in what way the constraints are degenerate, if they are."""
    size = max(1.0, float(slope.norm()))
    if not len(jacobian):
        multipliers = slope.new_zeros(0)
    else:
        singular = torch.linalg.svdvals(jacobian)
        if len(jacobian) > jacobian.shape[1] or float(singular[-1]) <= active_tol * float(singular[0]):
            return slope.new_zeros(len(jacobian)), "the gradients of the active constraints are linearly dependent"
        multipliers = torch.linalg.lstsq(jacobian.mT, -slope[:, None]).solution[:, 0]
        least = float(multipliers.min())
        if least < -active_tol * size:
            raise ValueError(f"y does not minimise g over the constraints: a multiplier is {least:.1e}")
        if least <= active_tol * size:
            return multipliers, f"an active constraint has multiplier {least:.1e}, strict complementarity fails"
    left = float((slope + jacobian.mT @ multipliers).norm())
    if left > math.sqrt(active_tol) * size:
        raise ValueError(f"y does not minimise g over the constraints: the gradient of 𝓛 is {left:.1e}")
    return multipliers, ""


def _by_pseudo_inverse(curved: HessianProduct, jacobian: Tensor | None, target: Vector) -> Vector:
    """The part u_y of (∇²𝓛)^† [0; ∇_y f], where ∇²𝓛 = [[0, J], [Jᵀ, H]]."""
    n = len(target)
    hessian = torch.stack([curved(unit) for unit in torch.eye(n, dtype=target.dtype, device=target.device)])
    rows = target.new_zeros(0, n) if jacobian is None else jacobian
    active = len(rows)
    bordered = target.new_zeros(active + n, active + n)
    bordered[:active, active:], bordered[active:, :active] = rows, rows.mT
    bordered[active:, active:] = (hessian + hessian.mT) / 2
    # Eigenvalues that are rounding errors of zero must not be inverted: eps^(2/3) leaves them room.
    rtol = torch.finfo(target.dtype).eps ** (2 / 3)
    inverse = torch.linalg.pinv(bordered, hermitian=True, rtol=rtol)
    solution: Vector = inverse[active:, active:] @ target
    return solution


def _by_conjugate_gradients(
    curved: HessianProduct, jacobian: Tensor | None, target: Vector, tol: float | None, max_iter: int | None
) -> Vector:
    """The same u_y from (P H P) u = P ∇_y f, with P the projection on the kernel of J."""

    def projected(v: Vector) -> Vector:
        return v if basis is None else v - basis @ (basis.mT @ v)

    basis = None if jacobian is None or not len(jacobian) else torch.linalg.qr(jacobian.mT).Q
    right = projected(target)
    if not bool(right.any()):
        return right
    found = linear_solve.cg(lambda v: projected(curved(projected(v))), right, tol=tol, maxiter=max_iter)
    return found.x  # type: ignore[no-any-return]
