"""Lagrange multipliers that weigh advantages."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workingpapers.common.validation import check_choice, check_number

Kind = Literal["eq", "ge", "le"]

_SATURATED = 0.99  # of a squashed multiplier: it can hardly grow further
_PATIENCE = 50  # updates that a saturated constraint may stay violated before we say so


class LagrangeMixer(nn.Module):
    """Weigh the advantages of several rewards so that each mean return meets its threshold.

    With squashed multipliers f(mu_i), where f is tanh for equalities and the logistic function for inequalities,

        A_mix = (N - sum_i f_i) A_0 + sum_i s_i f_i A_i,   s_i = -1 for returns to be kept below, else 1,
        mu_i <- mu_i - lr * momentum average of s_i f'(mu_i) (v_i - theta_i),   gradient clipped to `max_grad_norm`.

    Usable in any actor-critic loop: `mix` before the policy step, `update` with the mean episode returns.

    Advantages are normalised, which takes away the damping that the divergence would give: without a proportional term
    the multipliers *circle* their solution and only averages of the iterates settle (the paper's form). With
    ``proportional > 0``, about 3 for returns near 1, `mix` uses f(mu_i + proportional * violation_i), and the last
    iterate settles too. Under tanh the weight of an exceeded equality is negative: its reward is pushed down; and
    N - sum f may exceed N.

    Parameters
    ----------
    thresholds : theta, one for each constrained reward, on its mean episode return.
    kind : "eq" (v = theta), "ge" (v >= theta) or "le" (v <= theta), for all or for each.
    lr, momentum : of the multipliers; lr above 0, momentum in [0, 1), low on purpose.
    init : multipliers at the start; 0 gives weights 0 (tanh) or 0.5 (logistic).
    max_grad_norm : above 0.
    normalize : shift and scale each advantage to mean 0 and deviation 1 over the batch before mixing.
    proportional : gain of the latest violation, at least 0; 0 is the paper's method.
    clamp : multipliers are kept in [-clamp, clamp], for example 4, so that they do not stick; None: free.

    Raises
    ------
    ValueError : a parameter is out of range, or kinds and thresholds differ in number.

    Examples
    --------
    >>> mixer = LagrangeMixer([0.5, 0.2], kind="eq", proportional=3.0)
    >>> mixer.update(torch.tensor([0.1, 0.4]))
    >>> [weight > 0 for weight in mixer.weights().tolist()]
    [True, False]
    """

    thresholds: Float[Tensor, " constraints"]
    multipliers: Float[Tensor, " constraints"]
    violations: Float[Tensor, " constraints"]
    updates: Tensor
    _velocity: Tensor
    _weight_sum: Tensor
    _stuck: Tensor
    _sign: Tensor
    _equal: Tensor

    def __init__(
        self,
        thresholds: Sequence[float] | Float[Tensor, " constraints"],
        kind: Kind | Sequence[Kind] = "eq",
        *,
        lr: float = 0.1,
        momentum: float = 0.1,
        init: float = 0.0,
        max_grad_norm: float = 0.5,
        normalize: bool = True,
        proportional: float = 0.0,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        theta = torch.as_tensor(thresholds, dtype=torch.float64).detach().clone()
        if theta.ndim != 1 or not len(theta) or not theta.isfinite().all():
            raise ValueError(f"thresholds must be a vector of finite numbers, got {thresholds}")
        kinds = [kind] * len(theta) if isinstance(kind, str) else list(kind)
        if len(kinds) != len(theta):
            raise ValueError(f"kind must be one word or one for each of {len(theta)} thresholds, got {len(kinds)}")
        for one in kinds:
            check_choice("kind", one, ("eq", "ge", "le"))
        self.kind: tuple[Kind, ...] = tuple(kinds)
        self.lr = check_number("lr", lr, above=0)
        self.momentum = check_number("momentum", momentum, at_least=0, below=1)
        self.max_grad_norm = check_number("max_grad_norm", max_grad_norm, above=0)
        self.proportional = check_number("proportional", proportional, at_least=0)
        self.clamp = None if clamp is None else check_number("clamp", clamp, above=0)
        self.normalize = normalize
        self.register_buffer("thresholds", theta)
        self.register_buffer("multipliers", torch.full_like(theta, check_number("init", init)))
        self.register_buffer("violations", torch.zeros_like(theta))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("_velocity", torch.zeros_like(theta))
        self.register_buffer("_weight_sum", torch.zeros_like(theta))
        self.register_buffer("_stuck", torch.zeros(len(theta), dtype=torch.long))
        self.register_buffer("_sign", torch.tensor([-1.0 if one == "le" else 1.0 for one in kinds]).to(theta))
        self.register_buffer("_equal", torch.tensor([one == "eq" for one in kinds]))

    def weights(self) -> Float[Tensor, " constraints"]:
        """f_i in use: in (-1, 1) for equalities, in (0, 1) for inequalities."""
        return self._squash(self.multipliers + self.proportional * self.violations)

    def averaged_weights(self) -> Float[Tensor, " constraints"]:
        """Mean of the weights after each update so far; the present ones before the first."""
        return self._weight_sum / self.updates if self.updates else self.weights()

    def mix(
        self,
        adv_task: Float[Tensor, "*batch"],
        adv_constraints: Float[Tensor, "*batch constraints"],
        mask: Bool[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch"]:
        """The advantage to follow; no gradient flows through the weights.

        Parameters
        ----------
        adv_task : A_0, of the reward without a threshold, usually minus the divergence.
        adv_constraints : A_i.
        mask : which entries count, all when None; the result is 0 elsewhere.

        Raises
        ------
        ValueError : shapes do not fit, an advantage is not finite, or there is one entry alone to normalise.
        """
        weights = self.weights().to(adv_task)
        if adv_constraints.shape != (*adv_task.shape, len(weights)):
            raise ValueError(
                f"adv_constraints must have shape {(*adv_task.shape, len(weights))}, got {tuple(adv_constraints.shape)}"
            )
        streams = torch.cat([adv_task[..., None], adv_constraints], -1)
        inside = torch.ones_like(adv_task, dtype=torch.bool) if mask is None else mask
        chosen = streams[inside]
        if not chosen.isfinite().all():
            raise ValueError("advantages must be finite")
        if self.normalize:
            if len(chosen) < 2:
                raise ValueError("advantages must have at least two entries to be normalised")
            chosen = (chosen - chosen.mean(0)) / (chosen.std(0) + 1e-8)
        # (N - sum f) A_0 + sum s f A_i
        shares = torch.cat([(len(weights) - weights.sum())[None], self._sign.to(weights) * weights])
        return torch.zeros_like(adv_task).masked_scatter(inside, chosen @ shares)

    @torch.no_grad()
    def update(self, mean_returns: Float[Tensor, " constraints"]) -> None:
        """One step of the multipliers.

        Parameters
        ----------
        mean_returns : v, mean undiscounted episode returns of the latest batch, in the units of the thresholds.

        Raises
        ------
        ValueError : their number is another than that of the thresholds, or one is not finite.

        Warns
        -----
        RuntimeWarning : a multiplier has been saturated and its constraint violated for many updates: the threshold is
            out of reach.
        """
        returns = torch.as_tensor(mean_returns).detach().to(self.thresholds)
        if returns.shape != self.thresholds.shape or not returns.isfinite().all():
            raise ValueError(f"mean_returns must be {len(self.thresholds)} finite numbers, got {returns.tolist()}")
        gap = self._sign * (returns - self.thresholds)  # below 0: violated
        f = self._squash(self.multipliers)
        slope = torch.where(self._equal, 1.0 - f * f, f * (1.0 - f))
        gradient = slope * gap
        gradient *= (self.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)
        self._velocity.mul_(self.momentum).add_(gradient)
        self.multipliers.sub_(self.lr * self._velocity)
        if self.clamp is not None:
            self.multipliers.clamp_(-self.clamp, self.clamp)
        self.violations.copy_(-gap)
        self.updates += 1
        self._weight_sum += self.weights()
        self._warn_when_out_of_reach(returns)

    def _squash(self, multipliers: Tensor) -> Tensor:
        return torch.where(self._equal, multipliers.tanh(), multipliers.sigmoid())

    def _warn_when_out_of_reach(self, returns: Tensor) -> None:
        f = self._squash(self.multipliers)
        pushing = torch.where(self._equal, (f * self.violations).sign(), self.violations.sign()) > 0
        stuck = pushing & (f.abs() > _SATURATED)
        self._stuck = torch.where(stuck, self._stuck + 1, torch.zeros_like(self._stuck))
        for place in (self._stuck == _PATIENCE).nonzero().flatten().tolist():
            warnings.warn(
                f"threshold {place} ({float(self.thresholds[place]):.4g}) seems out of reach: its weight has been "
                f"{float(f[place]):.3f} for {_PATIENCE} updates and the return is {float(returns[place]):.4g}",
                RuntimeWarning,
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        return f"thresholds={self.thresholds.tolist()}, kind={self.kind}, proportional={self.proportional:g}"
