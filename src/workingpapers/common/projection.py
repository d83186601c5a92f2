"""Projections on convex sets, differentiable in what is projected and in the set's parameters.

The derivative of each is that of its closed form with the active set held fixed: one element of the generalised
derivative at a kink, the derivative everywhere else. Set parameters are the second argument.

References: simplex, Held, Wolfe and Crowder 1974; the isotonic projection's derivative, Djolonga and Krause,
"Differentiable Learning of Submodular Models", 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workingpapers.common.validation import check_number

Vectors = Float[Tensor, "*batch n"]
Positive = Float[Tensor, ""] | float


def nonnegative(v: Vectors) -> Vectors:
    """On {u : u >= 0}."""
    return torch.relu(v)


def box(v: Vectors, bounds: tuple[Tensor | float, Tensor | float]) -> Vectors:
    """On {u : lower <= u <= upper}, for bounds = (lower, upper), numbers or tensors that broadcast with v."""
    lower, upper = (torch.as_tensor(bound, dtype=v.dtype, device=v.device) for bound in bounds)
    return torch.clamp(v, lower, upper)


def simplex(v: Vectors, total: Positive = 1.0) -> Vectors:
    """On {u >= 0 : sum u = total} along the last dimension.

    u = max(v - τ, 0), where τ makes the total right. With s the indicator of the support, the derivative in v is
    diag(s) - s sᵀ / |s|.

    Parameters
    ----------
    v : of shape (..., n).
    total : positive.
    """
    if isinstance(total, int | float):
        check_number("total", total, above=0)
    v = v - v.detach().amax(-1, keepdim=True)  # changes nothing but the rounding: now the largest entry is 0
    # The support holds the k largest entries, for the largest k at which the k-th exceeds the threshold it makes.
    descending = v.detach().sort(-1, descending=True).values
    counts = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    thresholds = (descending.cumsum(-1) - (total.detach() if isinstance(total, Tensor) else total)) / counts
    k = (descending > thresholds).sum(-1, keepdim=True)
    support = v.detach() > thresholds.gather(-1, k - 1)
    tau = (torch.where(support, v, 0.0).sum(-1, keepdim=True) - total) / k
    return torch.where(support, v - tau, 0.0)


def simplex_entropy(y: Vectors) -> Vectors:
    """On the unit simplex in the geometry of the entropy, from the dual space: the softmax along the last dimension."""
    return torch.softmax(y, -1)


def ball(v: Vectors, radius: Positive = 1.0) -> Vectors:
    """On {u : |u|₂ <= radius} along the last dimension."""
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    outside = norm > radius
    return torch.where(outside, v * (radius / torch.where(outside, norm, 1.0)), v)


def l1_ball(v: Vectors, radius: Positive = 1.0) -> Vectors:
    """On {u : |u|₁ <= radius} along the last dimension."""
    inside = v.abs().sum(-1, keepdim=True) <= radius
    return torch.where(inside, v, torch.sign(v) * simplex(v.abs(), radius))


def affine(v: Float[Tensor, " n"], equations: tuple[Float[Tensor, "m n"], Float[Tensor, " m"]]) -> Float[Tensor, " n"]:
    """On {u : A u = b}, for equations = (A, b) with linearly independent rows of A: v - Aᵀ(AAᵀ)⁻¹(A v - b)."""
    A, b = equations
    multipliers: Tensor = torch.linalg.solve(A @ A.mT, A @ v - b)
    return v - A.mT @ multipliers


def isotonic(v: Vectors) -> Vectors:
    """On {u : u_1 <= u_2 <= ... <= u_n} along the last dimension: the least-squares non-decreasing fit.

    The solution is constant on blocks and equals v's mean on each, so the derivative averages over blocks. The blocks
    come from pool-adjacent-violators, in linear time on the CPU.
    """
    flat = v.reshape(-1, v.shape[-1])
    block = _blocks(flat.detach())
    ones = torch.ones_like(flat)
    sums = torch.zeros_like(flat).scatter_add(-1, block, flat)
    sizes = torch.zeros_like(flat).scatter_add(-1, block, ones)
    return (sums / sizes.clamp_min(1)).gather(-1, block).reshape(v.shape)


class _Blocks(torch.autograd.Function):
    """The block, counted from 0, to which each entry of the isotonic projection belongs."""

    @staticmethod
    def forward(v: Float[Tensor, "m n"]) -> Int[Tensor, "m n"]:
        blocks = np.empty(tuple(v.shape), dtype=np.int64)
        _pool_adjacent_violators(v.detach().cpu().double().numpy(), blocks)
        return torch.from_numpy(blocks).to(v.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        return None

    @staticmethod
    def jvp(ctx: Any, _: Tensor | None) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], v: Tensor) -> tuple[Tensor, int]:
        stacked = v.movedim(in_dims[0], 0)
        return _blocks(stacked.reshape(-1, stacked.shape[-1])).reshape(stacked.shape), 0


_blocks: Callable[[Tensor], Tensor] = _Blocks.apply


@numba.njit(cache=True)
def _pool_adjacent_violators(values: np.ndarray, blocks: np.ndarray) -> None:  # pragma: no cover - compiled
    rows, n = values.shape
    means, sizes = np.empty(n), np.empty(n, dtype=np.int64)
    for row in range(rows):
        top = 0  # blocks so far
        for j in range(n):
            means[top], sizes[top] = values[row, j], 1
            top += 1
            while top > 1 and means[top - 2] >= means[top - 1]:  # the last two violate the order: pool them
                size = sizes[top - 2] + sizes[top - 1]
                means[top - 2] += (means[top - 1] - means[top - 2]) * sizes[top - 1] / size
                sizes[top - 2] = size
                top -= 1
        j = 0
        for block in range(top):
            for _ in range(sizes[block]):
                blocks[row, j] = block
                j += 1
