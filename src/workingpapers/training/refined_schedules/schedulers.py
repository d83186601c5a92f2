"""Schedules as PyTorch learning-rate schedulers."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from workingpapers.common.validation import check_choice, check_finite
from workingpapers.training.refined_schedules.shapes import Final, finished, schedule_shape


class RefinedLR(LRScheduler):
    """Sets the rate of every parameter group to its own peak rate times a schedule's multiplier.

    Call `step` once after each step of the optimiser. The state dict holds the schedule, so a run resumes identically
    from it, also when the scheduler was built with another.

    Parameters
    ----------
    optimizer : its groups' rates are the peak rates.
    schedule : multipliers s_1..s_T >= 0, T at least 1, such as `refine` and `schedule_shape` return.
    last_epoch : steps taken before, minus one, when the optimiser's state is of a run under way; -1 for a new run.

    Raises
    ------
    TypeError : optimizer is not an optimiser.
    ValueError : schedule is not a vector of finite nonnegative numbers.

    Warns
    -----
    UserWarning : training goes on beyond the schedule; the rate stays at the last multiplier, usually 0.
    """

    def __init__(self, optimizer: Optimizer, schedule: ArrayLike, last_epoch: int = -1) -> None:
        multipliers = np.array(schedule, dtype=float)
        if multipliers.ndim != 1 or not len(multipliers):
            raise ValueError(f"schedule must be a vector, got shape {multipliers.shape}")
        check_finite("schedule", multipliers)
        if (multipliers < 0).any():
            raise ValueError(f"schedule must be at least 0, got {multipliers.min():g}")
        self.schedule = torch.from_numpy(multipliers)  # a tensor, because torch.load reads those back by default
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The rate of each group at the coming step: lr_t = lr_max * s_t."""
        steps = len(self.schedule)
        if self.last_epoch == steps + 1:  # step() follows the last step too, so it is one later that matters
            warnings.warn(
                f"the schedule has {steps} steps and training goes on: the multiplier stays at "
                f"{float(self.schedule[-1]):g}",
                UserWarning,
                stacklevel=2,
            )
        multiplier = float(self.schedule[min(self.last_epoch, steps - 1)])
        return [peak * multiplier for peak in self.base_lrs]


class LinearDecay(RefinedLR):
    """Linear decay from the peak rate to zero, the best schedule when nothing is known about the gradient norms.

    Parameters
    ----------
    optimizer : its groups' rates are the peak rates.
    total_steps : T, at least 2.
    warmup : share of the steps, in [0, 1), in which the rate rises linearly before; 0.05 to 0.1 is usual for deep
        networks, 0 for convex problems.
    final : "zero", so that the last step does nothing, as in the theory, or "half" of the step before.
    last_epoch : as in `RefinedLR`.

    Raises
    ------
    ValueError, TypeError : an argument is out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.0,
        final: Final = "zero",
        last_epoch: int = -1,
    ) -> None:
        check_choice("final", final, ("zero", "half"))
        super().__init__(optimizer, finished(schedule_shape("linear", total_steps, warmup), final), last_epoch)
