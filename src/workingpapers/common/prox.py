"""Proximal operators: prox(v) minimises |u - v|² / 2 + scaling · g(u), differentiable in v and in g's parameters.

The second argument holds g's parameters and the third the scaling, so that every operator here fits
`optimization.implicit_diff`. Strengths are numbers or tensors that broadcast with v, at least 0. At a kink, where
the operator is not differentiable, torch's choice of a subgradient is used.

Reference: Parikh and Boyd, "Proximal Algorithms", Foundations and Trends in Optimization 1(3), 2014.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Vectors = Float[Tensor, "*batch n"]
Strength = Tensor | float


def none(v: Vectors, strength: Any = None, scaling: Strength = 1.0) -> Vectors:
    """g = 0: nothing happens."""
    return v


def lasso(v: Vectors, strength: Strength = 1.0, scaling: Strength = 1.0) -> Vectors:
    """g(u) = strength |u|₁: entries shrink towards 0 by ``scaling * strength`` and stay there."""
    threshold = scaling * strength
    return torch.relu(v - threshold) - torch.relu(-v - threshold)


def nonnegative_lasso(v: Vectors, strength: Strength = 1.0, scaling: Strength = 1.0) -> Vectors:
    """g(u) = strength · sum u where u >= 0, infinite elsewhere."""
    return torch.relu(v - scaling * strength)


def elastic_net(v: Vectors, strengths: tuple[Strength, Strength] = (1.0, 1.0), scaling: Strength = 1.0) -> Vectors:
    """g(u) = l1 |u|₁ + l2 |u|² / 2, for strengths = (l1, l2)."""
    l1, l2 = strengths
    return lasso(v, l1, scaling) / (1.0 + scaling * l2)


def group_lasso(v: Vectors, strength: Strength = 1.0, scaling: Strength = 1.0) -> Vectors:
    """g(u) = strength |u|₂, each last dimension being one group, which shrinks as a whole.

    A strength that differs between groups has the shape (..., 1).
    """
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    alive = norm > scaling * torch.as_tensor(strength, dtype=v.dtype, device=v.device)
    return torch.where(alive, v * (1.0 - scaling * strength / torch.where(alive, norm, 1.0)), 0.0)


def ridge(v: Vectors, strength: Strength = 1.0, scaling: Strength = 1.0) -> Vectors:
    """g(u) = strength |u|² / 2."""
    return v / (1.0 + scaling * strength)


def nonnegative_ridge(v: Vectors, strength: Strength = 1.0, scaling: Strength = 1.0) -> Vectors:
    """g(u) = strength |u|² / 2 where u >= 0, infinite elsewhere."""
    return torch.relu(v) / (1.0 + scaling * strength)


def from_projection(projection: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The proximal operator of a set's indicator: its projection, whatever the scaling."""

    def prox(v: Vectors, parameters: Any = None, scaling: Strength = 1.0) -> Vectors:
        return projection(v) if parameters is None else projection(v, parameters)

    return prox
