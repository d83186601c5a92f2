"""Learning rate and momentum from the spectrum of a batch Hessian, while training goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from workingpapers.common.validation import check_choice, check_integer, check_number
from workingpapers.training.batch_curvature.products import Batch, Loss, Matrix, Mode, as_batches, ggn_vp, hvp
from workingpapers.training.batch_curvature.spectrum import spectrum_of


class HeavyBall(NamedTuple):
    """Learning rate and momentum, with the curvatures they were made for."""

    lr: float
    momentum: float
    largest: float
    smallest: float


def heavy_ball(ritz: Float[Tensor, " k"], *, safety: float = 1.0, max_momentum: float = 0.99) -> HeavyBall:
    """Polyak's learning rate and momentum for curvatures between lambda_n and lambda_1.

    rho = ((sqrt lambda_1 - sqrt lambda_n) / (sqrt lambda_1 + sqrt lambda_n))^2 and
    alpha = (2 / (sqrt lambda_1 + sqrt lambda_n))^2 = (1 + sqrt rho)^2 / lambda_1, the latter also when rho is clipped,
    which keeps it below the limit of stability 2 (1 + rho) / lambda_1.

    lambda_1 is the largest Ritz value; lambda_n the smallest that is beyond the noise, whose spectrum is symmetric
    about 0 in the additive model: above the modulus of the most negative Ritz value.

    Parameters
    ----------
    ritz : Ritz values of a batch's curvature.
    safety : factor of the learning rate, in (0, 1].
    max_momentum : momentum is clipped to it; in [0, 1).

    Raises
    ------
    ValueError : no Ritz value is positive.
    """
    safety = check_number("safety", safety, above=0, at_most=1)
    max_momentum = check_number("max_momentum", max_momentum, at_least=0, below=1)
    largest = float(ritz.max())
    if not largest > 0:
        raise ValueError(f"ritz must hold a positive value, got at most {largest:g}")
    noise = max(0.0, -float(ritz.min()))
    beyond = ritz[ritz > noise]
    smallest = float(beyond.min()) if len(beyond) else largest  # all noise: no momentum
    a, b = math.sqrt(largest), math.sqrt(smallest)
    momentum = min(((a - b) / (a + b)) ** 2, max_momentum)
    return HeavyBall(safety * (1.0 + math.sqrt(momentum)) ** 2 / largest, momentum, largest, smallest)


class LanczosLR(LRScheduler):
    """Set an SGD optimiser's learning rate and momentum from a Lanczos run on a batch, every few epochs.

    The paper's on-the-fly learner, which it calls preliminary: Polyak's heavy-ball pair for the batch's extreme
    curvatures, see `heavy_ball`; held between updates. Only its idea is in the paper's abstract: how lambda_n is chosen
    and that the pair is that of `heavy_ball` could not be checked against the authors' code, which is not published.
    Costs `steps` Hessian products (about 4 passes over the batch each, less when the graph is kept) an update.

        scheduler = LanczosLR(optimizer, model, loss_fn, loader, every=5)
        for epoch in range(epochs):
            ...  # train
            scheduler.step()

    Parameters
    ----------
    optimizer : with "lr" and "momentum" in its groups (`torch.optim.SGD`), neither Nesterov nor dampened; all groups
        get the same pair.
    model, loss_fn : as for `hvp`.
    batches : loader of batches of the training size, or one batch; each update reads the loader's next first batch.
    every : epochs (calls of `step`) between updates, the first of which is made at once.
    steps : of Lanczos, at least 2.
    safety : factor of the learning rate, in (0, 1]. At 1, Polyak's own, training often diverges: the rate is near the
        limit of the measured batch's quadratic, the next batch's curvature may be larger, and so may be the loss's a
        few steps on.
    max_momentum : in [0, 1).
    matrix, mode : as for `batch_extremes`; mode "train" sees what training sees.
    seed : of the starts.

    Attributes
    ----------
    history : one `HeavyBall` for each update.

    Raises
    ------
    FloatingPointError : at an update, when the loss is not finite any more.
    ValueError : an argument is out of range, or at the start no curvature is positive.
    TypeError : the optimiser has no momentum.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        loss_fn: Loss,
        batches: Batch | Iterable[Batch],
        *,
        every: int = 1,
        steps: int = 20,
        safety: float = 0.25,
        max_momentum: float = 0.99,
        matrix: Matrix = "hessian",
        mode: Mode = "train",
        seed: int = 0,
    ) -> None:
        for group in optimizer.param_groups:
            if "momentum" not in group:
                raise TypeError(f"optimizer must have momentum, as SGD has, got {type(optimizer).__name__}")
            if group.get("nesterov") or group.get("dampening"):
                raise ValueError("optimizer must have plain momentum, neither nesterov nor dampening")
        check_choice("matrix", matrix, get_args(Matrix))
        self.model, self.loss_fn, self.batches = model, loss_fn, as_batches(batches)
        self.every = check_integer("every", every, at_least=1)
        self.lanczos_steps = check_integer("steps", steps, at_least=2)
        self.safety = check_number("safety", safety, above=0, at_most=1)
        self.max_momentum = check_number("max_momentum", max_momentum, at_least=0, below=1)
        self.matrix: Matrix = matrix
        self.mode: Mode = mode
        self.seed = check_integer("seed", seed, at_least=0)
        self.history: list[HeavyBall] = []
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of every group; measures the curvature when an update is due."""
        if self.last_epoch % self.every == 0:
            found = self._measure()
            self.history.append(found)
            for group in self.optimizer.param_groups:
                group["momentum"] = found.momentum
        return [self.history[-1].lr for _ in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The counters and the history, without model, loss and data."""
        return {
            "last_epoch": self.last_epoch,
            "history": [tuple(pair) for pair in self.history],
            "_last_lr": list(self._last_lr),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the optimiser's own state carries the present rate and momentum."""
        self.last_epoch = state_dict["last_epoch"]
        self.history = [HeavyBall(*pair) for pair in state_dict["history"]]
        self._last_lr = list(state_dict["_last_lr"])

    def _measure(self) -> HeavyBall:
        product = hvp if self.matrix == "hessian" else ggn_vp
        batch = next(iter(self.batches))
        curvature = product(self.model, self.loss_fn, batch, mode=self.mode, seed=self.seed)
        ritz = spectrum_of(curvature, self.lanczos_steps, seed=self.seed + self.last_epoch).ritz
        if self.history and not ritz.max() > 0:  # a loss that is 0 on this batch says nothing
            return self.history[-1]
        return heavy_ball(ritz, safety=self.safety, max_momentum=self.max_momentum)
