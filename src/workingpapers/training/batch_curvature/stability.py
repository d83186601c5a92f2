"""The largest learning rate at which training does not diverge, found by training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from workingpapers.common.validation import check_integer, check_number
from workingpapers.training.batch_curvature.products import FunctionalModel, Loss, Mode, batch_length
from workingpapers.training.batch_curvature.sampling import Chunks, Data, Samples

MakeOptimizer: TypeAlias = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]
GROWTH = 4.0  # between trials, until a stable and a diverging rate are known
SMALLEST, LARGEST = 1e-10, 1e6  # rates outside are not tried


@dataclass(frozen=True)
class StableRate:
    """Where training goes from stable to diverging.

    Attributes
    ----------
    lr : the largest rate tried that is stable (all larger ones tried diverged).
    diverges_at : the smallest rate tried that diverges; infinite when none up to 1e6 did.
    trials : training runs it took.
    """

    lr: float
    diverges_at: float
    trials: int

    def __float__(self) -> float:
        return self.lr


def largest_stable_lr(
    model: nn.Module,
    loss_fn: Loss,
    dataset: Data,
    batch_size: int,
    optimizer: Literal["sgd", "adam"] | MakeOptimizer = "sgd",
    steps: int = 100,
    seed: int = 0,
    *,
    start: float = 0.1,
    factor: float = 2.0,
    rtol: float = 0.05,
    monitor: int = 4096,
    mode: Mode = "train",
) -> StableRate:
    """Bisect, in the logarithm of the rate, between the rates at which training from here is stable and diverges.

    A run diverges when the loss on all samples is above `factor` times its value at the start, or not finite, after
    one of the first 10 steps or of every tenth after them. Batch losses are no sign: small batches double by chance.
    All runs start at the model's present parameters, with a new optimiser, and see the same batches. What is stable
    depends on the horizon: compare rates of equal `steps` only.

    Parameters
    ----------
    model, loss_fn : as for `hvp`; the model itself is not trained.
    dataset, batch_size : as for `batch_extremes`; every step draws a batch of its own.
    optimizer : "sgd", "adam" (with the defaults of torch), or a function of parameters and rate, for example
        ``lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)``.
    steps : of each run, at least 1.
    seed : of the batches, and of dropout.
    start : rate that is tried first, from 1e-10 to 1e6; it costs time if it is far off, nothing else.
    factor : above 1.
    rtol : the search ends when `diverges_at` is at most (1 + rtol) times `lr`.
    monitor : loss is judged on so many samples, drawn at random, where there are more.
    mode : of the model while it trains and is judged; see `hvp`.

    Returns
    -------
    StableRate : not monotone problems have several transitions, of which it gives one.

    Raises
    ------
    FloatingPointError : the loss is not finite at the start, or training diverges at any rate down to 1e-10.

    Warns
    -----
    RuntimeWarning : no rate up to 1e6 diverges.
    """
    samples = Samples(dataset)
    batch_size = samples.check_batch_size(batch_size)
    steps = check_integer("steps", steps, at_least=1)
    start = check_number("start", start, at_least=SMALLEST, at_most=LARGEST)
    factor, rtol = check_number("factor", factor, above=1), check_number("rtol", rtol, above=0)
    monitor = check_integer("monitor", monitor, at_least=1)
    if optimizer == "sgd":
        make: MakeOptimizer = lambda p, lr: torch.optim.SGD(p, lr=lr)  # noqa: E731
    elif optimizer == "adam":
        make = lambda p, lr: torch.optim.Adam(p, lr=lr)  # noqa: E731
    elif callable(optimizer):
        make = optimizer
    else:
        raise ValueError(f"optimizer must be 'sgd', 'adam' or a function of parameters and rate, got {optimizer!r}")
    generator = torch.Generator().manual_seed(check_integer("seed", seed, at_least=0))
    judged = torch.randperm(len(samples), generator=generator)[:monitor] if len(samples) > monitor else None
    batches = [samples.draw(batch_size, generator) for _ in range(steps)]
    runs = _Runs(model, loss_fn, mode, seed, batches, _judges(samples, judged), factor)

    lr, low, high, trials = start, 0.0, math.inf, 0
    while not high <= (1.0 + rtol) * low:
        trials += 1
        if runs.stable(make, lr):
            low = lr
        else:
            high = lr
        if low == LARGEST:
            warnings.warn(f"no learning rate up to {LARGEST:g} diverges in {steps} steps", RuntimeWarning, stacklevel=2)
            break
        if high == SMALLEST:
            raise FloatingPointError(f"training diverges at every learning rate down to {SMALLEST:g}")
        if low == 0.0:
            lr = max(high / GROWTH, SMALLEST)
        elif high == math.inf:
            lr = min(low * GROWTH, LARGEST)
        else:
            lr = math.sqrt(low * high)
    return StableRate(low, high, trials)


def _judges(samples: Samples, judged: Tensor | None) -> list[Any]:
    if judged is None:
        return list(Chunks(samples, 4096))
    return [samples.take(judged)]


class _Runs:
    """Short training runs from one start on the same batches."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        mode: Mode,
        seed: int,
        batches: list[Any],
        judges: list[Any],
        factor: float,
    ) -> None:
        self.functional = FunctionalModel(model, mode, seed)
        self.loss_fn, self.batches, self.judges = loss_fn, batches, judges
        first = self._judged_loss(self.functional.parameters)
        if not math.isfinite(first):
            raise FloatingPointError(f"the loss is {first} at the start")
        self.bound = factor * first

    def stable(self, make: MakeOptimizer, lr: float) -> bool:
        parameters = {name: p.clone().requires_grad_() for name, p in self.functional.parameters.items()}
        optimizer = make(list(parameters.values()), lr)
        for step, batch in enumerate(self.batches, start=1):
            optimizer.zero_grad()
            torch.autograd.backward(self._loss(parameters, batch, step))
            optimizer.step()
            if (step <= 10 or step % 10 == 0 or step == len(self.batches)) and not (
                self._judged_loss(parameters) <= self.bound  # NaN is not
            ):
                return False
        return True

    def _loss(self, parameters: dict[str, Tensor], batch: Any, draw: int = 0) -> Tensor:
        inputs, targets = pytree.tree_map_only(Tensor, lambda t: t.to(self.functional.device), batch)
        return self.loss_fn(self.functional.outputs(parameters, inputs, draw), targets)

    @torch.no_grad()
    def _judged_loss(self, parameters: dict[str, Tensor]) -> float:
        sizes = [batch_length(inputs) for inputs, _ in self.judges]
        losses = [float(self._loss(parameters, batch)) for batch in self.judges]
        return sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
