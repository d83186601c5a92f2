"""The envelope of "energy, with at most k groups", its conjugate and its proximal operator, on arrays and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workingpapers.common.validation import check_finite, check_integer, check_number
from workingpapers.training.group_envelope._kernels import clipped_roots, shrink_factors

Array = TypeVar("Array", np.ndarray, Tensor)
Weights = float | np.ndarray | Tensor


def wgsef(norms: Float[Array, "*batch m"], d: Weights, k: int) -> Float[Array, "*batch"]:
    """Value of the weighted group sparse envelope function: the tightest convex bound on energy with k groups.

    With gs_k(theta) = (1/2) sum_j d_j ||theta_j||^2 where at most k groups are nonzero and infinity elsewhere, it is
    the largest convex function below gs_k::

        G_k(theta) = min over u of (1/2) sum_j d_j ||theta_j||^2 / u_j,   0 <= u_j <= 1,  sum_j u_j <= k

    It equals gs_k wherever at most k groups are nonzero, the weighted ridge for k = m, and half the squared k-support
    norm for groups of one weight each and d = 1. Time is linear in m, in expectation.

    Parameters
    ----------
    norms : Euclidean norms of the groups (for groups of one weight: the weights, of any sign), finite. Dimensions
        before the last are a batch. Floating point, NumPy or torch; torch results are differentiable.
    d : weights of the groups, positive: one number, or one for each group, shape (m,).
    k : how many groups may be active, 1 to m.

    Raises
    ------
    TypeError, ValueError : an argument is of the wrong type or shape, not finite, or out of range.
    """
    n, d_, k = _checked("norms", norms, d, k)
    b = d_.sqrt() * n.abs()
    with torch.no_grad():
        r = _roots(b, torch.zeros_like(d_), k)
        ones = (r * b >= 1.0) | torch.isinf(r)
    # The minimiser is u_j = min(1, r b_j) with sum u = k, so d_j ||theta_j||^2 / u_j is b_j^2 or b_j / r.
    rest = torch.where(ones, 0.0, b).sum(-1)
    free = (k - ones.sum(-1)).clamp(min=1)
    return _like(norms, 0.5 * (torch.where(ones, b, 0.0).square().sum(-1) + rest.square() / free))


def conjugate(norms: Float[Array, "*batch m"], d: Weights, k: int) -> Float[Array, "*batch"]:
    """Fenchel conjugate of `wgsef` (and of gs_k): half the sum of the k largest ||phi_j||^2 / d_j.

    Parameters, errors and batching are those of `wgsef`.
    """
    n, d_, k = _checked("norms", norms, d, k)
    return _like(norms, 0.5 * (n.square() / d_).topk(k, dim=-1, sorted=False).values.sum(-1))


def prox_wgsef(
    t: Float[Array, ...], lam: float, d: Weights, k: int, *, axis: int | Sequence[int] = ()
) -> Float[Array, ...]:
    """Proximal operator of the envelope, exactly: argmin over theta of (1/2) ||theta - t||^2 + lam G_k(theta).

    Each group is multiplied by a number between 0 and 1 / (1 + lam d_j), the first for groups that die, the second
    for those that are surely among the k; at least k groups stay nonzero (where t has as many), and the larger `lam`,
    the fewer stay beyond k. Groups of equal norm at the boundary share the place between them. Time is linear in m, in
    expectation, on CPUs; elsewhere breakpoints are sorted.

    Parameters
    ----------
    t : the point, finite: floating point, NumPy or torch; torch results are differentiable (the derivative is that of
        the present choice of groups, exact away from its changes). The last dimension that is not in `axis` counts
        the groups, those before it are a batch.
    lam : strength, at least 0. In proximal gradient steps: the learning rate times the penalty's strength.
    d : weights of the groups, positive: one number, or one for each group, shape (m,).
    k : how many groups are wanted, 1 to m.
    axis : the dimension or dimensions over which a group extends: ``(1, 2, 3)`` makes each filter of a convolution's
        weight a group. With the default each entry is a group (or the norm of one: the result is its new norm).

    Raises
    ------
    TypeError, ValueError : an argument is of the wrong type or shape, not finite, or out of range.
    """
    lam = check_number("lam", lam, at_least=0.0)
    tensor = _tensor("t", t)
    axes = tuple(a % tensor.ndim for a in ([axis] if isinstance(axis, int) else axis)) if tensor.ndim else ()
    norms = torch.linalg.vector_norm(tensor, dim=axes) if axes else tensor.abs()
    scale = shrinkage(norms, lam, d, k).to(tensor.dtype)
    for a in sorted(axes):
        scale = scale.unsqueeze(a)
    return _like(t, scale * tensor)


def shrinkage(norms: Float[Tensor, "*batch m"], lam: float, d: Weights, k: int) -> Float[Tensor, "*batch m"]:
    """The factors by which the proximal operator multiplies groups of these norms, in float64."""
    n, d_, k = _checked("t", norms, d, k)
    if lam == 0.0:
        return torch.ones_like(n)
    if n.device.type == "cpu" and not n.requires_grad:
        rows = shrink_factors(n.reshape(-1, n.shape[-1]).contiguous().numpy(), d_.detach().numpy(), lam, k)
        return torch.from_numpy(rows).reshape(n.shape)
    # Without theta the problem reads: min over u of (1/2) sum_j lam d_j n_j^2 / (u_j + lam d_j). Its stationary points
    # are u_j = clip(r a_j - c_j, 0, 1), with r such that they sum to k.
    a, c = d_.sqrt() * n, lam * d_
    with torch.no_grad():
        r = _roots(a, c, k)
        u = r * a - c
        ones = (u >= 1.0) | torch.isinf(r)
        sloped = ~ones & (u > 0.0)
    # r once more, from the groups on their slope: this is what carries the derivative.
    slope = torch.where(sloped, a, 0.0).sum(-1, keepdim=True)
    free = k - ones.sum(-1, keepdim=True) + torch.where(sloped, c, 0.0).sum(-1, keepdim=True)
    r = free / torch.where(slope > 0.0, slope, 1.0)
    u = torch.where(ones, 1.0, torch.where(sloped, (r * a - c).clamp(0.0, 1.0), 0.0))
    return u / (u + c)


def selectors(norms: Float[Tensor, "*batch m"], d: Weights, k: int) -> Float[Tensor, "*batch m"]:
    """The minimising u in the definition of the envelope, in float64; 0 for groups of norm 0 if others compete."""
    n, d_, k = _checked("norms", norms, d, k)
    b = d_.sqrt() * n
    r = _roots(b, torch.zeros_like(d_), k)
    return torch.where(torch.isinf(r), 1.0, r * b).clamp(max=1.0)


def _roots(a: Float[Tensor, "*batch m"], c: Float[Tensor, " m"], k: int) -> Float[Tensor, "*batch 1"]:
    """The r at which sum_j clip(r a_j - c_j, 0, 1) = k; infinite where at most k of a are positive."""
    if a.device.type != "cpu":
        return sorted_roots(a, c, k)
    # The root scales with 1 / a: in units of the largest a no breakpoint overflows.
    unit = a.amax(-1, keepdim=True)
    unit = torch.where(unit > 0.0, unit, 1.0)
    rows = (a / unit).reshape(-1, a.shape[-1]).contiguous()
    roots = clipped_roots(rows.detach().numpy(), c.detach().numpy(), k)
    return torch.from_numpy(roots).reshape(*a.shape[:-1], 1) / unit


def sorted_roots(a: Float[Tensor, "*batch m"], c: Float[Tensor, " m"], k: int) -> Float[Tensor, "*batch 1"]:
    """As `_roots`, by sorting all breakpoints: O(m log m), but in a few operations on whole tensors, for GPUs."""
    alive = a > 0.0
    a_ = torch.where(alive, a, 1.0)
    # At c / a the sum starts to rise with slope a, at (1 + c) / a it ceases to.
    breaks = torch.where(torch.cat([alive, alive], -1), torch.cat([c / a_, (1.0 + c) / a_], -1), torch.inf)
    rises = torch.where(alive, a_, 0.0)
    breaks, order = breaks.sort(dim=-1)
    slopes = torch.cat([rises, -rises], -1).gather(-1, order).cumsum(-1)
    steps = torch.where(torch.isfinite(breaks[..., 1:]), slopes[..., :-1] * breaks.diff(dim=-1), 0.0)
    totals = torch.nn.functional.pad(steps.cumsum(-1), (1, 0))
    last = ((totals < k) & torch.isfinite(breaks)).sum(-1, keepdim=True).clamp(min=1) - 1
    near = breaks.gather(-1, last)
    far = breaks.gather(-1, (last + 1).clamp(max=breaks.shape[-1] - 1))
    # The sums carry the rounding of all that came before; between its two breakpoints the root is had from fresh ones.
    inside = 0.5 * (near + torch.where(torch.isfinite(far), far, near))
    u = inside * a - c
    sloped = alive & (u > 0.0) & (u < 1.0)
    slope = torch.where(sloped, a, 0.0).sum(-1, keepdim=True)
    free = k - (alive & (u >= 1.0)).sum(-1, keepdim=True) + torch.where(sloped, c, 0.0).sum(-1, keepdim=True)
    root = torch.where(slope > 0.0, free / torch.where(slope > 0.0, slope, 1.0), near)
    root = torch.minimum(torch.maximum(root, near), torch.maximum(far, near))
    return torch.where(alive.sum(-1, keepdim=True) > k, root, torch.inf)


def _checked(name: str, norms: Any, d: Weights, k: int) -> tuple[Tensor, Tensor, int]:
    """Norms and weights in float64 on the device of the norms, and k."""
    n = _tensor(name, norms)
    if n.ndim == 0 or n.shape[-1] == 0:
        raise ValueError(f"{name} must hold at least one group in its last dimension, got shape {tuple(n.shape)}")
    k = check_integer("k", k, at_least=1, at_most=n.shape[-1])
    if isinstance(d, Tensor | np.ndarray):
        weights = torch.as_tensor(d).to(n.device, torch.float64)
    else:
        weights = torch.tensor(check_number("d", d, above=0.0), dtype=torch.float64, device=n.device)
    if weights.ndim > 1 or (weights.ndim == 1 and len(weights) != n.shape[-1]):
        raise ValueError(f"d must be a number or of shape ({n.shape[-1]},), got shape {tuple(weights.shape)}")
    check_finite("d", weights)
    if not bool((weights > 0).all()):
        raise ValueError(f"d must be above 0, got {float(weights.min())!r}")
    return n.to(torch.float64), weights.expand(n.shape[-1]).contiguous(), k


def _tensor(name: str, array: Any) -> Tensor:
    if not isinstance(array, Tensor | np.ndarray):
        raise TypeError(f"{name} must be a NumPy array or a tensor, got {type(array).__name__}")
    if isinstance(array, np.ndarray):
        array = np.array(array, order="C", copy=None if array.flags.writeable else True)  # as torch wants it
    tensor = torch.as_tensor(array)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be of floating point, got {array.dtype}")
    check_finite(name, tensor.detach())
    return tensor


def _like(given: Array, result: Tensor) -> Array:
    """The result in the type of the argument."""
    if isinstance(given, Tensor):
        return result.to(given.dtype)
    array: np.ndarray = result.numpy().astype(given.dtype, copy=False)
    return array
