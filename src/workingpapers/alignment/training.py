"""The loop that the trainers of this field share: steps, accumulation, schedule, resuming, several processes."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from workingpapers.common.validation import check_integer, check_number

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class TrainingConfig:
    """How a trainer of this field takes its steps.

    Attributes
    ----------
    learning_rate : peak of the schedule, above 0.
    warmup : share of the steps in which the rate rises linearly from 0, in [0, 1); then it follows a cosine to 0.
        None keeps the rate constant.
    weight_decay : of AdamW, at least 0.
    max_grad_norm : gradients are scaled down to this Euclidean norm, above 0.
    epochs : passes over the data, at least 1.
    max_steps : stop after this many optimizer steps instead of `epochs`.
    batch_size : items in one forward pass.
    accumulation : forward passes per optimizer step; together they are one batch.
    bf16 : autocast models to bfloat16; losses stay in float32.
    gradient_checkpointing : recompute activations in the backward pass to save memory.
    random_state : decides the order of the items.
    """

    learning_rate: float = 5e-7
    warmup: float | None = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    bf16: bool = False
    gradient_checkpointing: bool = False
    random_state: int = 0

    def __post_init__(self) -> None:
        check_number("learning_rate", self.learning_rate, above=0)
        if self.warmup is not None:
            check_number("warmup", self.warmup, at_least=0, below=1)
        check_number("weight_decay", self.weight_decay, at_least=0)
        check_number("max_grad_norm", self.max_grad_norm, above=0)
        for name in ("epochs", "batch_size", "accumulation"):
            check_integer(name, getattr(self, name), at_least=1)
        if self.max_steps is not None:
            check_integer("max_steps", self.max_steps, at_least=1)
        check_integer("random_state", self.random_state, at_least=0)


class Trainer(ABC):
    """Train a model in place on numbered items; a subclass says what the loss of some items is.

    Dropout stays off, as is usual for losses of log-ratios: policy and reference must be scored by the same function.
    A run can be interrupted after any step, saved with `state_dict`, and continued with identical results.

    Parameters
    ----------
    model : trained in place, on the device it is on. Only parameters that require gradients change.
    count : items, at least 1.
    args : how to train.
    optimizer : over the trainable parameters; AdamW when None. Its learning rate follows the schedule.
    accelerator : of accelerate; each of its processes then takes its share of the items of every step, and gradients
        are summed over the processes before they are clipped: the run is that of one process on the joint batch. The
        model is replicated, neither sharded nor wrapped. None trains in this process alone.

    Attributes
    ----------
    history : one dict per optimizer step: step (from 1), what the loss reports as means over the items of the step,
        gradient_norm (before clipping), learning_rate.
    total_steps : optimizer steps of the whole run.

    Raises
    ------
    ValueError : there are no items, or nothing is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        count: int,
        args: TrainingConfig,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.args: Any = args
        self.model = model
        self.accelerator = accelerator
        self._count = check_integer("count", count, at_least=1)
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._trainable:
            raise ValueError("model must have parameters that require gradients")
        self._device = next(iter(self._trainable.values())).device
        self.optimizer = optimizer or torch.optim.AdamW(
            self._trainable.values(), lr=args.learning_rate, weight_decay=args.weight_decay
        )
        self.history: list[dict[str, float]] = []
        self._items_per_step = args.batch_size * args.accumulation
        self._steps_per_epoch = math.ceil(self._count / self._items_per_step)
        self.total_steps = args.max_steps or args.epochs * self._steps_per_epoch
        if args.gradient_checkpointing:
            # transformers 6 knows the first name alone, before 5 the second alone
            old: Any = getattr(model, "gradient_checkpointing_enable", None)
            enable: Any = getattr(model, "activation_checkpointing_enable", old)
            enable({"use_reentrant": False})

    @abstractmethod
    def _accumulate(self, rows: list[int], total: int) -> Mapping[str, Tensor]:
        """Add the gradient of some items' share of the mean loss over `total` items; return sums over these items.

        Sums are named as they appear in `history`; each is a scalar or one entry per item, and is logged as a mean.
        """

    def train(
        self, steps: int | None = None, on_step: Callable[[dict[str, float]], None] | None = None
    ) -> list[dict[str, float]]:
        """Take the remaining optimizer steps, or the next `steps` of them, and return `history`.

        Parameters
        ----------
        steps : how many steps to take at most; all that remain when None.
        on_step : called with the newest entry of `history` after every step.

        Raises
        ------
        FloatingPointError : the gradient of a step is not finite; the model is as it was before that step.
        """
        remaining = self.total_steps - len(self.history)
        wanted = remaining if steps is None else min(remaining, check_integer("steps", steps, at_least=0))
        for _ in range(wanted):
            self.history.append(self._step(len(self.history)))
            if on_step is not None:
                on_step(self.history[-1])
        return self.history

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on later exactly as if the run had not been interrupted."""
        return {
            "parameters": {name: parameter.detach().clone() for name, parameter in self._trainable.items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "history": [dict(row) for row in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of a trainer with the same model, data and arguments.

        Raises
        ------
        ValueError : the state belongs to other parameters.
        """
        if state["parameters"].keys() != self._trainable.keys():
            raise ValueError("state must come from a trainer with the same trainable parameters and the same data")
        with torch.no_grad():
            for name, parameter in self._trainable.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [dict(row) for row in state["history"]]

    def _step(self, step: int) -> dict[str, float]:
        return {"step": step + 1, **self._optimize(self._rows_of(step), step)}

    def _optimize(self, rows: list[int], step: int) -> dict[str, float]:
        """One optimizer step on the mean loss of these items, in all processes together; the means that it reports."""
        rate = self.args.learning_rate * self._schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.eval()  # no dropout
        if self.args.gradient_checkpointing:
            self._let_layers_checkpoint()
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, float] = {}
        mine = self._share(rows)
        for start in range(0, len(mine), self.args.batch_size):
            found = self._accumulate(mine[start : start + self.args.batch_size], len(rows))
            values = torch.stack([value.detach().sum().double() for value in found.values()]).tolist()  # one transfer
            for name, value in zip(found, values, strict=True):
                totals[name] = totals.get(name, 0.0) + value / len(rows)
        totals = self._summed(totals)
        norm = float(nn.utils.clip_grad_norm_(self._trainable.values(), self.args.max_grad_norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(f"step {step + 1}: the gradient is not finite: is learning_rate too large?")
        self.optimizer.step()
        return {**totals, "gradient_norm": norm, "learning_rate": rate}

    def _share(self, rows: list[int]) -> list[int]:
        """The items of a step that this process takes: each one goes to one process."""
        if self.accelerator is None:
            return rows
        return rows[self.accelerator.process_index :: self.accelerator.num_processes]

    def _summed(self, totals: dict[str, float]) -> dict[str, float]:
        """Sum gradients and reported numbers over the processes."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return totals
        from accelerate.utils import gather_object

        for parameter in self._trainable.values():
            if parameter.grad is None:  # the process had no item of this step
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.accelerator.reduce(parameter.grad, reduction="sum")
        parts: list[dict[str, float]] = gather_object([totals])
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: sum(part.get(name, 0.0) for part in parts) for name in names}

    def _rows_of(self, step: int) -> list[int]:
        """Items of a step: every epoch is a permutation, drawn from `random_state` and the epoch alone."""
        epoch, place = divmod(step, self._steps_per_epoch)
        order = np.random.default_rng([self.args.random_state, epoch]).permutation(self._count)
        start = place * self._items_per_step
        rows: list[int] = order[start : start + self._items_per_step].tolist()
        return rows

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.args.bf16)

    def _schedule(self, step: int) -> float:
        """Share of the peak rate: a linear rise, then half a cosine, ending just above 0."""
        if self.args.warmup is None:
            return 1.0
        rise = math.ceil(self.args.warmup * self.total_steps)
        if step < rise:
            return (step + 1) / (rise + 1)  # type: ignore[no-any-return]
        return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, self.total_steps - rise)))

    def _let_layers_checkpoint(self) -> None:
        """Layers recompute only in training mode; their children, which hold the dropout, stay in evaluation mode."""
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
