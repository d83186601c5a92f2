"""Raising the strength of a penalty until k groups are left, then training those."""

from __future__ import annotations

from typing import Any

from workingpapers.common.validation import check_integer, check_number
from workingpapers.training.group_envelope.regularizers import GroupRegularizer
from workingpapers.training.group_envelope.spec import Sparsity, project


class SparsityRamp:
    """Strength of a penalty over the epochs: none, rising, then exactly k groups without it.

    A tenth of the epochs passes without penalty; then the strength rises geometrically until no more than ``1 + slack``
    times k groups are left, or `until` of the epochs have passed. There the k largest groups (of each budget) are kept,
    the others set to 0 and held there, and the strength goes back to 0: the rest of the epochs undoes the shrinkage.
    A library choice; the paper keeps the strength constant.

        ramp = SparsityRamp(reg, epochs=50)
        for epoch in range(50):
            ramp.step(epoch)
            ...  # optimizer.step(); reg.prox_(lr)

    Parameters
    ----------
    reg : the penalty, whose `lam` and support this sets. Its k is what is aimed at.
    epochs : how many epochs there will be, at least 3. Any unit of training will do.
    start : strength after the first tenth of the epochs, above 0.
    growth : factor from one epoch to the next, above 1. None makes it 2 ** (20 / epochs): a thousandfold over the half
        of the epochs in which the strength rises.
    warmup, until : shares of the epochs before the strength rises, and after which it ends, 0 <= warmup < until < 1.
    slack : how far above k the number of groups may be when the rest is cut off, at least 0.

    Attributes
    ----------
    before : `Sparsity` when the rest was cut off, before it was; None until then.

    Raises
    ------
    TypeError, ValueError : an argument is out of range.
    """

    def __init__(
        self,
        reg: GroupRegularizer,
        epochs: int,
        *,
        start: float = 0.003,
        growth: float | None = None,
        warmup: float = 0.1,
        until: float = 0.6,
        slack: float = 0.05,
    ) -> None:
        self.reg = reg
        self.epochs = check_integer("epochs", epochs, at_least=3)
        self.start = check_number("start", start, above=0.0)
        self.growth = 2.0 ** (20.0 / epochs) if growth is None else check_number("growth", growth, above=1.0)
        self.warmup = check_number("warmup", warmup, at_least=0.0, below=1.0)
        self.until = check_number("until", until, above=self.warmup, below=1.0)
        self.slack = check_number("slack", slack, at_least=0.0)
        self.before: Sparsity | None = None

    @property
    def frozen(self) -> bool:
        """Whether the groups have been chosen."""
        return self.before is not None

    def step(self, epoch: int) -> None:
        """Set the strength for this epoch, counted from 0; call it before the epoch's first batch.

        Raises
        ------
        ValueError : `epoch` is negative.
        """
        epoch = check_integer("epoch", epoch, at_least=0)
        if self.frozen:
            return
        first = round(self.warmup * self.epochs)
        if epoch < first:
            self.reg.lam = 0.0
        elif epoch >= self.until * self.epochs or (epoch > first and self.reg.within_budget(self.slack)):
            self.before = self.reg.sparsity()
            project(self.reg.spec.module, self.reg.spec, self.reg.shares)
            self.reg.lam = 0.0
            self.reg.freeze()
        else:
            self.reg.lam = self.start * self.growth ** (epoch - first)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on from a checkpoint, the penalty's strength and support included."""
        return {"lam": self.reg.lam, "support": self.reg.support, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of a ramp on a penalty with the same groups."""
        self.reg.lam = state["lam"]
        self.reg.support = state["support"]
        self.before = state["before"]
