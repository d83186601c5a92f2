"""The regression of log-ratios on self-rewards: RLHF-Sharpening, offline and with exploration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.alignment.checks import Reduction, check_logps, reduced
from workingpapers.common.validation import check_choice, check_finite, check_number


@dataclass(frozen=True)
class SharpeningPairOutput:
    """The loss and what it is made of; per pair, shape (B,), unless said otherwise.

    Attributes
    ----------
    loss : the objective, a scalar unless ``reduction="none"``.
    squared_error : of the regression, with gradient.
    implicit_margin : ``beta * (log-ratio of y - log-ratio of y')``, detached.
    reward_margin : ``r(y) - r(y')``, what the implicit margin should become, detached.
    """

    loss: Float[Tensor, "*reduced"]
    squared_error: Float[Tensor, " batch"]
    implicit_margin: Float[Tensor, " batch"]
    reward_margin: Float[Tensor, " batch"]


class SharpeningPairLoss(nn.Module):
    """Squared error between implicit and true differences of self-reward, on pairs of responses::

        (beta log pi(y)/pi_base(y) - beta log pi(y')/pi_base(y') - (r(y) - r(y')))^2 + alpha log pi(y')

    Without the last term its minimiser over all policies, where both responses cover what the base can say, is the
    maximiser of ``E_pi[r] - beta KL(pi || pi_base)``, proportional to ``pi_base exp(r / beta)``; with the default
    self-reward, the base's own log-probability, to ``pi_base^(1 + 1/beta)``. In terms of log-ratios the targets are
    ``1 / beta`` times the differences of log-probability: a small beta asks for a small learning rate.

    The last term is optimism, for on-policy pairs: y from the policy, y' from the base. It takes mass from what the
    base says anyway. The form is that of exploratory preference optimisation (Xie et al., arXiv 2405.21046), which the
    paper builds on. There alpha falls like 1 / sqrt(T) with the number T of pairs in all, times constants that depend
    on unknown properties of the class of policies: here it is a knob.

    Parameters
    ----------
    beta : weight of the KL divergence to the base, above 0, per nat of self-reward.
    alpha : weight of the optimism, at least 0, in nats of self-reward.
    reduction : "mean" or "sum" over the batch, or "none".

    Raises
    ------
    ValueError : a parameter is out of range.
    """

    def __init__(self, beta: float, reduction: Reduction = "mean", *, alpha: float = 0.0) -> None:
        super().__init__()
        check_choice("reduction", reduction, get_args(Reduction))
        self.beta = check_number("beta", beta, above=0)
        self.alpha = check_number("alpha", alpha, at_least=0)
        self.reduction = reduction

    def forward(
        self,
        logp: Float[Tensor, " batch"],
        logp2: Float[Tensor, " batch"],
        base_logp: Float[Tensor, " batch"],
        base_logp2: Float[Tensor, " batch"],
        r: Float[Tensor, " batch"] | None = None,
        r2: Float[Tensor, " batch"] | None = None,
    ) -> SharpeningPairOutput:
        """Evaluate the loss on log-probabilities summed over the tokens of each response, in nats.

        Parameters
        ----------
        logp, logp2 : of y and y' under the trained policy.
        base_logp, base_logp2 : under the frozen base.
        r, r2 : self-rewards of y and y', both or neither; the base log-probabilities when None.

        Raises
        ------
        ValueError : shapes differ, a value is not a finite log-probability or reward, or one reward is missing.
        """
        if (r is None) != (r2 is None):
            raise ValueError("r and r2 must be given both or neither")
        rewards = (base_logp, base_logp2) if r is None or r2 is None else (r, r2)
        check_logps(logp=logp, logp2=logp2, base_logp=base_logp, base_logp2=base_logp2)
        for name, values in (("r", rewards[0]), ("r2", rewards[1])):
            if values.shape != logp.shape:
                raise ValueError(f"{name} must have shape {tuple(logp.shape)} like logp, got {tuple(values.shape)}")
            check_finite(name, values.detach())
        reward_margin = (rewards[0] - rewards[1]).detach()
        # beta log pi(y)/pi_base(y) - beta log pi(y')/pi_base(y')
        implicit_margin = self.beta * ((logp - base_logp) - (logp2 - base_logp2))
        squared_error = (implicit_margin - reward_margin).square()
        losses = squared_error if self.alpha == 0.0 else squared_error + self.alpha * logp2
        return SharpeningPairOutput(
            loss=reduced(losses, self.reduction),
            squared_error=squared_error,
            implicit_margin=implicit_margin.detach(),
            reward_margin=reward_margin,
        )

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}, alpha={self.alpha:g}, reduction={self.reduction!r}"
