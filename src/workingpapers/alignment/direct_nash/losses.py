"""The regression of log-ratios on win rates (equation 9 and Algorithms 1 and 2 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from workingpapers.alignment.checks import Reduction, check_logps, reduced
from workingpapers.common.validation import check_choice, check_number

_ROUNDING = 1e-6  # of averages of win rates in single precision


@dataclass(frozen=True)
class DNOOutput:
    """The loss and what it is made of; per pair, shape (B,), detached, unless said otherwise.

    Attributes
    ----------
    loss : the objective, with gradient; a scalar unless ``reduction="none"``.
    chosen_rewards, rejected_rewards : internal rewards ``eta * (log pi - log pi_t)`` of answers 1 and 2.
    margin : chosen minus rejected reward, the D of the loss.
    target : what sigma(margin) is regressed on; 1 everywhere when `hard`.
    accuracy : 1 where the internal rewards rank the pair as the target does, 1/2 where one of them ties.
    """

    loss: Float[Tensor, "*reduced"]
    chosen_rewards: Float[Tensor, " batch"]
    rejected_rewards: Float[Tensor, " batch"]
    margin: Float[Tensor, " batch"]
    target: Float[Tensor, " batch"]
    accuracy: Float[Tensor, " batch"]


class DNOLoss(nn.Module):
    """Binary cross-entropy between differences of win rates and differences of log-ratios to the current policy.

    With ``D = eta [log pi(y1) - log pi_t(y1)] - eta [log pi(y2) - log pi_t(y2)]`` and win rates r against pi_t::

        soft:  -s log sigma(D) - (1 - s) log sigma(-D),   s = sigma(r1 - r2)
        hard:  -log sigma(D), answer 1 being the winner: DPO whose reference is pi_t and whose beta is eta

    The soft loss has the gradient eta (sigma(D) - s) with respect to log pi(y1) and is least at pi ~ pi_t exp(r / eta)
    whatever distribution the answers come from. Its targets lie between sigma(-1) = 0.27 and sigma(1) = 0.73, so it is
    not the limit of the hard one: hard labels push a pair apart without end.

    Parameters
    ----------
    eta : temperature, above 0: a small one takes large steps away from pi_t. Paper: 0.1 or 0.05 (hard).
    hard : learn from winners and losers alone.
    reduction : "mean" or "sum" over the batch, or "none".

    Raises
    ------
    ValueError : a parameter is out of range.
    """

    needs_reference: bool = True

    def __init__(self, eta: float = 0.1, hard: bool = False, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.eta = check_number("eta", eta, above=0)
        self.hard = bool(hard)
        self.reduction = reduction

    def forward(
        self,
        logp1: Float[Tensor, " batch"],
        logp2: Float[Tensor, " batch"],
        old_logp1: Float[Tensor, " batch"],
        old_logp2: Float[Tensor, " batch"],
        r1: Float[Tensor, " batch"] | None = None,
        r2: Float[Tensor, " batch"] | None = None,
        *,
        chosen_lengths: Int[Tensor, " batch"] | None = None,
        rejected_lengths: Int[Tensor, " batch"] | None = None,
    ) -> DNOOutput:
        """Evaluate the loss on log-probabilities summed over the tokens of each answer, in nats.

        Parameters
        ----------
        logp1, logp2 : of the two answers under the trained policy.
        old_logp1, old_logp2 : under pi_t, the policy at the beginning of the round.
        r1, r2 : win rates against pi_t, in [0, 1]; needed for soft targets, not used for hard ones.
        chosen_lengths, rejected_lengths : not used; with them a `PreferenceTrainer` can call this loss.

        Raises
        ------
        ValueError : shapes differ, a log-probability is not finite or is positive, or win rates are missing or outside
            [0, 1].
        """
        check_logps(logp1=logp1, logp2=logp2, old_logp1=old_logp1, old_logp2=old_logp2)
        chosen_rewards, rejected_rewards = self.eta * (logp1 - old_logp1), self.eta * (logp2 - old_logp2)
        margin = chosen_rewards - rejected_rewards
        target = torch.ones_like(margin)
        if not self.hard:
            target = torch.sigmoid(_checked_rate("r1", r1, logp1) - _checked_rate("r2", r2, logp1))
        # log sigma(-D) = log sigma(D) - D
        losses = (1.0 - target) * margin - logsigmoid(margin)
        accuracy = 0.5 + 0.5 * torch.sign(margin.detach()) * torch.sign(target - 0.5)
        return DNOOutput(
            loss=reduced(losses, self.reduction),
            chosen_rewards=chosen_rewards.detach(),
            rejected_rewards=rejected_rewards.detach(),
            margin=margin.detach(),
            target=target,
            accuracy=accuracy,
        )

    def extra_repr(self) -> str:
        return f"eta={self.eta:g}, hard={self.hard}, reduction={self.reduction!r}"


def _checked_rate(name: str, rate: Tensor | None, like: Tensor) -> Tensor:
    if rate is None:
        raise ValueError(f"{name} must be given unless hard=True")
    if rate.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(rate.shape)}")
    low, high = (float(extreme) for extreme in rate.detach().aminmax())
    if not (-_ROUNDING <= low <= high <= 1.0 + _ROUNDING):  # so for NaN, too
        raise ValueError(f"{name} must be win rates in [0, 1], got values from {low:g} to {high:g}")
    return rate.detach().to(like)
