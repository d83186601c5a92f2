"""DPO, ORPO and SimPO with the likelihood of a rationale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from workingpapers.alignment.checks import Reduction, check_logps, checked_lengths, reduced
from workingpapers.alignment.regularized_preference import dpo_losses
from workingpapers.common.validation import check_choice, check_number

Base = Literal["dpo", "orpo", "simpo"]
BASES: tuple[Base, ...] = ("dpo", "orpo", "simpo")


@dataclass(frozen=True)
class RationaleOutput:
    """The loss and its terms; per example, shape (B,), unless said otherwise.

    ``loss = preference_weight * preference_loss + rationale_loss + sft_loss``, reduced over the batch. Terms carry
    gradients, the other tensors do not.

    Attributes
    ----------
    loss : the objective, a scalar unless ``reduction="none"``.
    preference_loss : of DPO, of ORPO's odds ratio (beta included) or of SimPO.
    rationale_loss : with its weight gamma; None where no rationale was given.
    sft_loss : ORPO's negative log-likelihood: each pair's share of the mean per token over all chosen answers of the
        batch. None for DPO and SimPO.
    chosen_rewards, rejected_rewards : implicit rewards: ``beta * (log pi_theta - log pi_ref)`` for DPO, ``beta`` times
        the mean log-probability of a token for ORPO and SimPO.
    accuracy : 1 where the implicit rewards rank the pair as the data do, else 0.
    margin : chosen minus rejected reward.
    rationale_perplexity : of the rationale, per token; None where its length was not given.
    """

    loss: Float[Tensor, "*reduced"]
    preference_loss: Float[Tensor, " batch"]
    rationale_loss: Float[Tensor, " batch"] | None
    sft_loss: Float[Tensor, " batch"] | None
    chosen_rewards: Float[Tensor, " batch"]
    rejected_rewards: Float[Tensor, " batch"]
    accuracy: Float[Tensor, " batch"]
    margin: Float[Tensor, " batch"]
    rationale_perplexity: Float[Tensor, " batch"] | None


def orpo_losses(
    chosen_means: Float[Tensor, "*batch"], rejected_means: Float[Tensor, "*batch"], *, beta: float
) -> Float[Tensor, "*batch"]:
    """Odds-ratio term of ORPO from mean log-probabilities of a token; no checks, any shape."""
    # log odds(y) = log p - log(1 - p), p = exp(mean log-probability)
    log_odds = (chosen_means - log1mexp(chosen_means)) - (rejected_means - log1mexp(rejected_means))
    return -beta * logsigmoid(log_odds)


def simpo_losses(
    chosen_means: Float[Tensor, "*batch"], rejected_means: Float[Tensor, "*batch"], *, beta: float, margin: float
) -> Float[Tensor, "*batch"]:
    """SimPO's loss from mean log-probabilities of a token; no checks, any shape."""
    # -log sigma(beta log pi(y_w|x) / |y_w| - beta log pi(y_l|x) / |y_l| - margin)
    return -logsigmoid(beta * (chosen_means - rejected_means) - margin)


def log1mexp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``log(1 - exp(x))`` for x <= 0, accurate on both sides of -log 2.

    Values nearer to 0 than one rounding error of 1 are taken to be that far from it: results and gradients stay finite.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = torch.log(-torch.expm1(x))  # no cancellation where exp(x) is close to 1
    far = torch.log1p(-torch.exp(x))  # nor where it is close to 0
    return torch.where(x > -math.log(2.0), near, far)


class RationaleLoss(nn.Module):
    """A direct preference loss plus the negative log-likelihood of a rationale under the same policy.

    The rationale's term is added to the loss of every pair, with s the log-probability of the rationale, summed over
    its tokens or their mean::

        -gamma * s                 rationale_link="linear", the paper
        -log sigma(gamma * s)      rationale_link="logsigmoid", the authors' code for DPO

    The second has slope -gamma in s while gamma |s| is large, and -gamma / 2 once the rationale is certain. The sum
    over a rationale of hundreds of tokens is hundreds of nats, against log 2 of an untrained DPO term: gamma near 0.001
    suits the sum, gamma near 1 the mean.

    ``base="dpo"``::

        -log sigma(beta [log pi/pi_ref(y_w|x) - log pi/pi_ref(y_l|x)])

    ``base="orpo"``, without reference, with p = exp(mean log-probability of a token) and odds = p / (1 - p)::

        NLL(y_w|x) - beta * log sigma(log odds(y_w|x) - log odds(y_l|x))

    NLL is the mean over all tokens of the chosen answers in the batch, as in the authors' code (trl counts the prompts'
    tokens too). ``base="simpo"``, without reference::

        -log sigma(beta log pi(y_w|x) / |y_w| - beta log pi(y_l|x) / |y_l| - simpo_margin)

    Parameters
    ----------
    base : the preference loss.
    beta : above 0: DPO's weight of the KL divergence; ORPO's weight of the odds ratio, lambda in its paper; SimPO's
        scale. Usual: 0.1, 0.1, and 2 to 2.5.
    gamma : weight of the rationale, at least 0; 0 is the base loss, to the last bit.
    rationale_reduction : "sum" over the tokens of a rationale, or "mean".
    rationale_link : "linear" or "logsigmoid".
    preference_weight : of the preference term, at least 0; 0 trains on rationales alone (with ORPO: and on its NLL).
    simpo_margin : the target margin, at least 0; usual 0.5 to 1.6. The constants that the authors used with SimPO are
        not in their code.
    reduction : "mean" or "sum" over the batch, or "none".

    Raises
    ------
    ValueError : a parameter is out of range.
    """

    def __init__(
        self,
        base: Base = "dpo",
        beta: float = 0.1,
        gamma: float = 0.01,
        rationale_reduction: Literal["sum", "mean"] = "sum",
        rationale_link: Literal["linear", "logsigmoid"] = "linear",
        preference_weight: float = 1.0,
        simpo_margin: float = 0.5,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_choice("base", base, BASES)
        check_choice("rationale_reduction", rationale_reduction, ("sum", "mean"))
        check_choice("rationale_link", rationale_link, ("linear", "logsigmoid"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.base: Base = base
        self.beta = check_number("beta", beta, above=0)
        self.gamma = check_number("gamma", gamma, at_least=0)
        self.rationale_reduction = rationale_reduction
        self.rationale_link = rationale_link
        self.preference_weight = check_number("preference_weight", preference_weight, at_least=0)
        self.simpo_margin = check_number("simpo_margin", simpo_margin, at_least=0)
        self.reduction = reduction

    @classmethod
    def paper(cls, base: Base = "dpo", reduction: Reduction = "mean") -> RationaleLoss:
        """The paper's formulas, linear in the sum; gamma 0.001 as the authors run it, beta 0.1, for SimPO 2."""
        return cls(base, beta=2.0 if base == "simpo" else 0.1, gamma=0.001, reduction=reduction)

    @classmethod
    def official(cls, base: Base = "dpo", reduction: Reduction = "mean") -> RationaleLoss:
        """What the authors' code computes: for DPO log-sigmoid of the sum, gamma 0.001; for ORPO linear, mean, gamma 1.

        Raises
        ------
        ValueError : `base` is "simpo", which is not in their code.
        """
        check_choice("base", base, ("dpo", "orpo"))
        if base == "dpo":
            return cls("dpo", beta=0.1, gamma=0.001, rationale_link="logsigmoid", reduction=reduction)
        return cls("orpo", beta=0.1, gamma=1.0, rationale_reduction="mean", reduction=reduction)

    @property
    def needs_reference(self) -> bool:
        """Whether the base compares with a reference policy."""
        return self.base == "dpo"

    def forward(
        self,
        policy_chosen_logps: Float[Tensor, " batch"],
        policy_rejected_logps: Float[Tensor, " batch"],
        policy_rationale_logps: Float[Tensor, " batch"] | None,
        ref_chosen_logps: Float[Tensor, " batch"] | None = None,
        ref_rejected_logps: Float[Tensor, " batch"] | None = None,
        *,
        chosen_lengths: Int[Tensor, " batch"] | None = None,
        rejected_lengths: Int[Tensor, " batch"] | None = None,
        rationale_lengths: Int[Tensor, " batch"] | None = None,
        mean_chosen_length: float | None = None,
    ) -> RationaleOutput:
        """Evaluate the loss on log-probabilities summed over the tokens of each answer and rationale, in nats.

        Parameters
        ----------
        policy_chosen_logps, policy_rejected_logps : under the trained policy.
        policy_rationale_logps : of the rationale given its own prompt, under the trained policy; may be None when
            ``gamma=0``.
        ref_chosen_logps, ref_rejected_logps : under the frozen reference; needed by DPO, ignored by the others.
        chosen_lengths, rejected_lengths : tokens in each answer, at least 1; needed by ORPO and SimPO.
        rationale_lengths : tokens in each rationale, at least 1; needed when ``rationale_reduction="mean"``, and for
            its perplexity.
        mean_chosen_length : of ORPO's NLL, where these pairs are a part of a larger batch: the mean of `chosen_lengths`
            over all of it. Then the parts' losses add up to that of the whole.

        Raises
        ------
        ValueError : shapes differ, a log-probability is not finite or is positive, or something needed is missing.
        """
        given = {"policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps}
        if policy_rationale_logps is not None:
            given["policy_rationale_logps"] = policy_rationale_logps
        elif self.gamma > 0.0:
            raise ValueError("policy_rationale_logps must be given when gamma > 0")
        if self.needs_reference:
            if ref_chosen_logps is None or ref_rejected_logps is None:
                raise ValueError("ref_chosen_logps and ref_rejected_logps must be given when base='dpo'")
            given |= {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
        check_logps(**given)

        sft_loss = None
        if self.base == "dpo":
            assert ref_chosen_logps is not None
            assert ref_rejected_logps is not None
            chosen, rejected = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
            preference_loss = dpo_losses(chosen, rejected, beta=self.beta)
        else:
            needed_by = f"base={self.base!r}"
            lengths = checked_lengths("chosen_lengths", chosen_lengths, policy_chosen_logps, needed_by=needed_by)
            chosen = policy_chosen_logps / lengths
            rejected = policy_rejected_logps / checked_lengths(
                "rejected_lengths", rejected_lengths, policy_rejected_logps, needed_by=needed_by
            )
            if self.base == "simpo":
                preference_loss = simpo_losses(chosen, rejected, beta=self.beta, margin=self.simpo_margin)
            else:
                preference_loss = orpo_losses(chosen, rejected, beta=self.beta)
                # - sum_i log pi(y_i) / sum_i |y_i| = mean_i [ - log pi(y_i) / mean_j |y_j| ]
                if mean_chosen_length is None:
                    mean_chosen_length = lengths.double().mean().item()
                sft_loss = -policy_chosen_logps / check_number("mean_chosen_length", mean_chosen_length, at_least=1)
        losses = self.preference_weight * preference_loss
        if sft_loss is not None:
            losses = losses + sft_loss

        rationale_loss, perplexity = self._rationale_terms(policy_rationale_logps, rationale_lengths)
        if rationale_loss is not None and self.gamma > 0.0:
            losses = losses + rationale_loss

        chosen_rewards, rejected_rewards = self.beta * chosen.detach(), self.beta * rejected.detach()
        return RationaleOutput(
            loss=reduced(losses, self.reduction),
            preference_loss=preference_loss,
            rationale_loss=rationale_loss,
            sft_loss=sft_loss,
            chosen_rewards=chosen_rewards,
            rejected_rewards=rejected_rewards,
            accuracy=(chosen_rewards > rejected_rewards).to(chosen_rewards.dtype),
            margin=chosen_rewards - rejected_rewards,
            rationale_perplexity=perplexity,
        )

    def _rationale_terms(
        self, logps: Float[Tensor, " batch"] | None, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, " batch"] | None, Float[Tensor, " batch"] | None]:
        """The weighted term and the perplexity."""
        if logps is None:
            return None, None
        score, perplexity = logps, None
        if self.rationale_reduction == "mean" or lengths is not None:
            needed_by = "rationale_reduction='mean'"
            means = logps / checked_lengths("rationale_lengths", lengths, logps, needed_by=needed_by)
            perplexity = torch.exp(-means.detach())
            score = means if self.rationale_reduction == "mean" else logps
        # gamma = 0 weighs the term with 0 also where its link would leave the constant log 2
        linear = self.rationale_link == "linear" or self.gamma == 0.0
        return (-self.gamma * score if linear else -logsigmoid(self.gamma * score)), perplexity

    def extra_repr(self) -> str:
        return (
            f"base={self.base!r}, beta={self.beta:g}, gamma={self.gamma:g}, "
            f"rationale_reduction={self.rationale_reduction!r}, rationale_link={self.rationale_link!r}, "
            f"preference_weight={self.preference_weight:g}, simpo_margin={self.simpo_margin:g}, "
            f"reduction={self.reduction!r}"
        )
