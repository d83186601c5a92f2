"""Which entries of which parameters make up the groups of one family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Member(ABC):
    """The share of one parameter in the groups 0 .. m-1 of a family.

    Attributes
    ----------
    parameter : its name in the module, as in `named_parameters`.
    """

    parameter: str

    @abstractmethod
    def totals(self, values: Float[Tensor, ...], m: int) -> Float[Tensor, " m"]:
        """Sums over each group of values shaped like the parameter."""

    @abstractmethod
    def spread(self, per_group: Float[Tensor, " m"], like: Tensor, fill: float) -> Float[Tensor, ...]:
        """A tensor that broadcasts with `like` and holds each group's number at its entries, `fill` elsewhere."""

    @abstractmethod
    def size(self, like: Tensor, m: int) -> int:
        """How many entries a group has here; ValueError where the parameter has another shape than was assumed."""


@dataclass(frozen=True, eq=False)
class Slices(Member):
    """Group j is entries ``start + j * width`` to ``start + (j + 1) * width`` of one dimension, all others whole.

    Filters of a convolution are slices of width 1 of dimension 0; a head's rows are slices as wide as the head.
    """

    dim: int
    width: int = 1
    start: int = 0

    def totals(self, values: Float[Tensor, ...], m: int) -> Float[Tensor, " m"]:
        part = values.narrow(self.dim, self.start, m * self.width)
        part = part.reshape(*part.shape[: self.dim], m, self.width, *part.shape[self.dim + 1 :])
        return part.sum([dim for dim in range(part.ndim) if dim != self.dim])

    def spread(self, per_group: Float[Tensor, " m"], like: Tensor, fill: float) -> Float[Tensor, ...]:
        length = like.shape[self.dim]
        spread = per_group.repeat_interleave(self.width) if self.width > 1 else per_group
        if len(spread) < length:
            whole = spread.new_full((length,), fill)
            whole[self.start : self.start + len(spread)] = spread
            spread = whole
        return spread.view([length if dim == self.dim else 1 for dim in range(like.ndim)])

    def size(self, like: Tensor, m: int) -> int:
        if not (self.dim < like.ndim and self.start + m * self.width <= like.shape[self.dim]):
            raise ValueError(
                f"{self.parameter} of shape {tuple(like.shape)} has no {m} slices of width {self.width} "
                f"from {self.start} on in dimension {self.dim}"
            )
        return self.width * like.numel() // like.shape[self.dim]


@dataclass(frozen=True, eq=False)
class Entries(Member):
    """Every entry is a group, or with `m` = 1 the whole parameter is one."""

    def totals(self, values: Float[Tensor, ...], m: int) -> Float[Tensor, " m"]:
        return values.reshape(m, -1).sum(1)

    def spread(self, per_group: Float[Tensor, " m"], like: Tensor, fill: float) -> Float[Tensor, ...]:
        return per_group.view(like.shape) if len(per_group) == like.numel() else per_group.view([1] * like.ndim)

    def size(self, like: Tensor, m: int) -> int:
        if m not in (1, like.numel()):
            raise ValueError(f"{self.parameter} has {like.numel()} entries, which cannot be {m} groups")
        return like.numel() // m


@dataclass(frozen=True, eq=False)
class Indexed(Member):
    """Entry `positions[i]` of the flattened parameter belongs to group `groups[i]`."""

    positions: Int[Tensor, " entries"]
    groups: Int[Tensor, " entries"]

    def totals(self, values: Float[Tensor, ...], m: int) -> Float[Tensor, " m"]:
        positions, groups = self.positions.to(values.device), self.groups.to(values.device)
        return values.new_zeros(m).index_add(0, groups, values.reshape(-1)[positions])

    def spread(self, per_group: Float[Tensor, " m"], like: Tensor, fill: float) -> Float[Tensor, ...]:
        flat = per_group.new_full((like.numel(),), fill)
        flat[self.positions.to(like.device)] = per_group[self.groups.to(like.device)]
        return flat.view(like.shape)

    def size(self, like: Tensor, m: int) -> int:
        inside = (self.positions >= 0) & (self.positions < like.numel())
        if not bool(inside.all()):
            wrong = int(self.positions[~inside][0])
            raise ValueError(f"{self.parameter} has {like.numel()} entries, index {wrong} is outside")
        return len(self.positions)  # of all groups together: they differ in size


@dataclass(frozen=True, eq=False)
class Family:
    """Groups of one layer (or of several that live and die together), numbered 0 to `size` - 1.

    Attributes
    ----------
    name : of the first layer whose outputs they are.
    size : how many groups.
    members : their entries, over all parameters that belong to them.
    kind : "filter", "channel", "neuron", "head", "block", "weight" or "index".
    """

    name: str
    size: int
    members: tuple[Member, ...]
    kind: str

    def sizes(self, module: torch.nn.Module) -> Float[Tensor, " m"]:
        """How many weights each group has."""
        total = torch.zeros(self.size, dtype=torch.float64)
        for member in self.members:
            like = module.get_parameter(member.parameter)
            total += member.totals(torch.ones(like.shape, dtype=torch.float64), self.size)
        return total

    def norms(self, module: torch.nn.Module) -> Float[Tensor, " m"]:
        """Euclidean norms of the groups, float32 or float64, differentiable."""
        squares: Tensor | None = None
        for member in self.members:
            parameter = module.get_parameter(member.parameter)
            wide = parameter if parameter.dtype == torch.float64 else parameter.float()
            total = member.totals(wide.square(), self.size)
            squares = total if squares is None else squares + total.to(squares.device)
        assert squares is not None
        # the square root has no derivative at 0: there the subgradient 0 is chosen
        zero = squares == 0.0
        return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())

    @torch.no_grad()
    def multiply_(self, module: torch.nn.Module, factors: Float[Tensor, " m"]) -> None:
        """Multiply each group in place."""
        for member in self.members:
            parameter = module.get_parameter(member.parameter)
            parameter.mul_(member.spread(factors.to(parameter.device, parameter.dtype), parameter, 1.0))
