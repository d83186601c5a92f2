"""Logging the gradient norms of a training run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from workingpapers.common.validation import check_choice, check_integer

Ord = Literal[1, 2]

PENDING = 512  # norms kept on the device before they are copied, so that a step never waits for the device
SKIPPED = -1.0  # in place of the norm of a step that a fused optimiser leaves out


class GradNormRecorder:
    """Logs the norm of the gradient that each step of an optimiser uses, over all of its parameter groups.

    It hooks itself into `optimizer.step` and looks at the gradients before the step: once for a step with a closure,
    after its first evaluation; after the gradients are divided by the scale of a gradient scaler, fused optimisers
    included; summed over the shards of distributed tensors. Replicated gradients, as of DistributedDataParallel, are
    equal on all ranks and need no sum. Steps that the scaler leaves out for overflow leave no norm.

    Clipping changes the norms, so call the recorder itself after the backward pass and before clipping (with a scaler:
    between `unscale_` and clipping); the next step then logs that value.

    Parameters
    ----------
    optimizer : whose gradients to look at; groups added later are included.
    ord : 2 for SGD and methods like it, 1 for Adam and coordinate-wise methods.
    every : log each k-th step, at least 1. `refine(recorder.norms, total_steps=...)` interpolates.

    Raises
    ------
    TypeError : optimizer is not an optimiser, or every not an integer.
    ValueError : ord or every is out of its range.
    """

    def __init__(self, optimizer: Optimizer, ord: Ord = 2, every: int = 1) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
        check_choice("ord", ord, (1, 2))
        self.optimizer, self.ord = optimizer, ord
        self.every = check_integer("every", every, at_least=1)
        self._taken = 0  # steps of the optimiser so far
        self._steps: list[int] = []
        self._values: list[float] = []
        self._pending: list[torch.Tensor] = []
        self._early: torch.Tensor | None = None
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    @property
    def norms(self) -> Float[np.ndarray, " logged"]:
        """The norms logged so far, in the order of the steps."""
        return self._logged(self._values, float)

    @property
    def steps(self) -> Int[np.ndarray, " logged"]:
        """The step of each norm, counted from 0."""
        return self._logged(self._steps, int)

    def __call__(self) -> None:
        """Log the gradients as they are now for the coming step: call it after the backward pass, before clipping."""
        if self._taken % self.every == 0:
            self._early = self._norm()

    def save(self, path: str | PathLike[str]) -> None:
        """Write an .npz file with the arrays `norms`, `steps` and `ord`, which `numpy.load` reads."""
        np.savez(path, norms=self.norms, steps=self.steps, ord=self.ord)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on logging."""
        return {
            "ord": self.ord,
            "every": self.every,
            "taken": self._taken,
            "norms": torch.from_numpy(self.norms),
            "steps": torch.from_numpy(self.steps),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of a recorder with the same `ord` and `every`.

        Raises
        ------
        ValueError : they differ.
        """
        for name, ours in (("ord", self.ord), ("every", self.every)):
            if state_dict[name] != ours:
                raise ValueError(f"the recorder has {name}={ours}, got a state with {name}={state_dict[name]}")
        self._taken = int(state_dict["taken"])
        self._values, self._steps = state_dict["norms"].tolist(), state_dict["steps"].tolist()
        self._pending, self._early = [], None

    def remove(self) -> None:
        """Stop logging; what was logged stays."""
        for hook in self._hooks:
            hook.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._taken % self.every:
            return None
        # args[0] is the optimiser
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._log()
            return None
        recording = self._recording(closure)
        if len(args) > 1:
            return (args[0], recording, *args[2:]), kwargs
        return args, {**kwargs, "closure": recording}

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._taken += 1
        self._early = None  # of a closure that calls the recorder at each of its evaluations

    def _recording(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with the gradients logged after its first evaluation."""
        logged = False

        @functools.wraps(closure)
        def evaluate() -> Any:
            nonlocal logged
            loss = closure()
            if not logged:
                self._log()
                logged = True
            return loss

        return evaluate

    def _log(self) -> None:
        norm = self._norm() if self._early is None else self._early
        overflow = getattr(self.optimizer, "found_inf", None)  # the scaler tells fused optimisers to leave a step out
        if overflow is not None:
            norm = norm.masked_fill(overflow.bool(), SKIPPED)
        self._steps.append(self._taken)
        self._pending.append(norm)
        if len(self._pending) == PENDING:
            self._collect()

    @torch.no_grad()
    def _norm(self) -> torch.Tensor:
        """The norm over all parameters, on their device."""
        groups = self.optimizer.param_groups
        parts = [_part(p.grad, self.ord) for group in groups for p in group["params"] if p.grad is not None]
        total: torch.Tensor = get_total_norm(parts, float(self.ord))
        if hasattr(total, "full_tensor"):  # of a distributed tensor each rank holds the norm of its shard
            total = total.full_tensor()
        scale = getattr(self.optimizer, "grad_scale", None)  # the scaler leaves the division to fused optimisers
        return total if scale is None else total / scale

    def _collect(self) -> None:
        if self._pending:
            self._values += torch.stack(self._pending).cpu().double().tolist()
            self._pending = []

    def _logged(self, entries: list[Any], dtype: type) -> np.ndarray:
        self._collect()
        return np.array([entry for entry, norm in zip(entries, self._values, strict=True) if norm != SKIPPED], dtype)


def _part(grad: torch.Tensor, ord: Ord) -> torch.Tensor:
    """A dense tensor with the same norm, in at least single precision."""
    if grad.is_sparse:
        grad = grad.coalesce().values()
    if grad.dtype in (torch.float16, torch.bfloat16):  # sums of many entries leave the range of half precision
        grad = torch.linalg.vector_norm(grad, ord, dtype=torch.float32)
    return grad
