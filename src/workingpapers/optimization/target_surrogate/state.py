"""Optimisers whose own counters are part of their state."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.optim import Optimizer


class CountingOptimizer(Optimizer):
    """An optimiser with plain numbers as attributes, which `state_dict`, pickling and copying carry along."""

    kept: ClassVar[tuple[str, ...]]

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimiser, with its counters under "kept"."""
        return {**super().state_dict(), "kept": {name: getattr(self, name) for name in self.kept}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; raises ValueError when it is of another kind of optimiser or has other groups."""
        kept = state_dict.get("kept", {})
        if set(kept) != set(self.kept):
            raise ValueError(f"state_dict is not that of {type(self).__name__}: it keeps {sorted(kept)}")
        super().load_state_dict(state_dict)
        for name, value in kept.items():
            setattr(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()  # the base class would leave out everything but groups and state
