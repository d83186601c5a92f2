"""Any online learner as a method whose last iterate converges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.optim import Optimizer

from workingpapers.common.validation import check_finite


class LastIterate(Optimizer):
    """The iterates x_t of an online learner's z_t; made by `last_iterate_wrapper`."""

    def __init__(self, learner: Optimizer, weights: np.ndarray) -> None:
        super().__init__(learner.param_groups, {})
        self.learner = learner
        self.param_groups = learner.param_groups  # rates set on either hold for both
        self.weights = torch.from_numpy(weights)
        self._set_remaining()
        self.taken = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step x_t -> x_{t+1}; the T-th changes nothing.

        Raises
        ------
        RuntimeError : all T weights are used.
        """
        if self.taken == len(self.weights):
            raise RuntimeError(f"the weights are for {self.taken} steps, which have been taken")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        iterates, gradients = [p.clone() for p in moved], [p.grad for p in moved]
        for p in moved:
            if "z" not in self.state[p]:
                self.state[p]["z"] = p.clone()  # z_1 = x_1
            p.copy_(self.state[p]["z"])
            p.grad = float(self.weights[self.taken]) * p.grad
        self.learner.step()
        remaining = float(self.remaining[self.taken])
        for p, x, gradient in zip(moved, iterates, gradients, strict=True):
            z = self.state[p]["z"]
            x.add_(p - z, alpha=remaining)  # x_{t+1} = x_t + (w_{t+1:T} / w_{1:T}) (z_{t+1} - z_t)
            z.copy_(p)
            p.copy_(x)
            p.grad = gradient
        self.taken += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of this optimiser and of the learner."""
        own = {"weights": self.weights, "taken": self.taken, "learner": self.learner.state_dict()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, weights included."""
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        self.learner.load_state_dict(state_dict["learner"])
        self.param_groups = self.learner.param_groups
        self.weights, self.taken = state_dict["weights"].clone(), state_dict["taken"]
        self._set_remaining()

    def _set_remaining(self) -> None:
        """w_{t+1:T} / w_{1:T} for each t."""
        after = self.weights.flip(0).cumsum(0).flip(0)
        self.remaining = torch.cat([after[1:], after.new_zeros(1)]) / after[0]


def last_iterate_wrapper(online_learner: Optimizer, weights: ArrayLike) -> LastIterate:
    """Turn an online learner into a method whose last iterate has the learner's regret as its bound.

    The learner produces z_t from the losses w_t <g_t, z>; the model holds

        x_{t+1} = x_t + (w_{t+1} + ... + w_T) / w_{1:T} (z_{t+1} - z_t),

    where gradients g_t are taken at x_t. For convex f and any u,
    E f(x_T) - f(u) <= (1 / w_{1:T}) E sum_t w_t <g_t, z_t - u>: the weighted regret, without the factor log T that
    last iterates of constant steps have. Plain SGD as the learner gives SGD with eta_t = lr w_t w_{t+1:T} / w_{1:T},
    linear decay for equal weights; for plain SGD a scheduler does the same without the copy of the parameters that
    this keeps.

    Parameters
    ----------
    online_learner : a PyTorch optimiser whose step needs no closure. It, and not the result, is changed by steps.
    weights : w_1..w_T >= 0, T at least 2, not all 0. Their scale matters: the learner sees w_t g_t.

    Returns
    -------
    LastIterate : an optimiser of the same parameter groups.

    Raises
    ------
    TypeError : online_learner is not an optimiser.
    ValueError : weights are not such a vector.
    """
    if not isinstance(online_learner, Optimizer):
        raise TypeError(f"online_learner must be a torch optimizer, got {type(online_learner).__name__}")
    values = np.array(weights, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"weights must be a vector of at least 2 entries, got shape {values.shape}")
    check_finite("weights", values)
    if (values < 0).any() or not values.any():
        raise ValueError(f"weights must be at least 0 and not all 0, got {values.min():g} to {values.max():g}")
    return LastIterate(online_learner, values)
