"""What the state of an optimiser takes, by what it is for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor
from torch.optim import Optimizer

_KINDS = {"indices": "indices", "projector": "projectors", "step": "counters", "mass": "counters"}


@dataclass(frozen=True)
class Tally:
    """How many numbers, and how many bytes they take."""

    scalars: int = 0
    bytes: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.scalars + other.scalars, self.bytes + other.bytes)


@dataclass(frozen=True)
class StateMemory:
    """State of an optimiser, without parameters and gradients.

    Attributes
    ----------
    moments : averages of gradients and of their squares.
    indices : of chosen columns, rows or entries.
    projectors : orthonormal bases of subspaces.
    counters : numbers of steps kept as tensors.
    """

    moments: Tally
    indices: Tally
    projectors: Tally
    counters: Tally

    @property
    def scalars(self) -> int:
        return sum(getattr(self, field.name).scalars for field in fields(self))

    @property
    def bytes(self) -> int:
        return sum(getattr(self, field.name).bytes for field in fields(self))


def state_memory(optimizer: Optimizer) -> StateMemory:
    """Count the tensors in the state of an optimiser as it is now; before its first step there are none.

    Peak memory of a step is something else: `Frugal` needs temporary tensors for a few million numbers (or for the
    largest parameter) besides, and gradients stay whole.

    Parameters
    ----------
    optimizer : a `Frugal`, or any other `torch.optim.Optimizer` for comparison. Only tensors directly in its state are
        seen.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    tallies = {field.name: Tally() for field in fields(StateMemory)}
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                kind = _KINDS.get(name, "moments")
                tallies[kind] += Tally(value.numel(), value.numel() * value.element_size())
    return StateMemory(**tallies)
