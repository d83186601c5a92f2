"""Five losses of direct alignment, on log-probabilities that are summed over the tokens of a response.

All are called alike, ``loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
chosen_lengths=..., rejected_lengths=...)``, and take what they need of it. Below, m is the difference of log-ratios,
``log pi/pi_ref(chosen) - log pi/pi_ref(rejected)``.

References: DPO, Rafailov et al. 2023, arXiv 2305.18290; length regularisation, Park et al. 2024, arXiv 2403.19159
(R-DPO; "LC-DPO" in CheXalign); IPO, Azar et al. 2023, arXiv 2310.12036; KTO, Ethayarajh et al. 2024, arXiv 2402.01306;
ORPO, Hong, Lee and Thorne 2024, arXiv 2403.07691.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from workingpapers.alignment.checks import Reduction, check_logps, checked_lengths, reduced
from workingpapers.alignment.regularized_preference import dpo_losses
from workingpapers.common.validation import check_choice, check_number


@dataclass(frozen=True)
class PairOutput:
    """A loss on pairs and what it says of them; per pair, shape (B,), unless said otherwise.

    Attributes
    ----------
    loss : the objective, a scalar unless ``reduction="none"``.
    chosen_rewards, rejected_rewards : implicit rewards, detached: beta times the log-ratio; for ORPO, which has no
        reference, beta times the mean log-probability of a token.
    accuracy : 1 where the implicit rewards rank the pair as the judge does, else 0.
    margin : chosen minus rejected reward, detached.
    """

    loss: Float[Tensor, "*reduced"]
    chosen_rewards: Float[Tensor, " batch"]
    rejected_rewards: Float[Tensor, " batch"]
    accuracy: Float[Tensor, " batch"]
    margin: Float[Tensor, " batch"]


@dataclass(frozen=True)
class KTOOutput(PairOutput):
    """`PairOutput` of KTO.

    Attributes
    ----------
    baseline : z0, what the log-ratios are compared with, in nats, at least 0 and the same for every pair.
    """

    baseline: Float[Tensor, " batch"]


@dataclass(frozen=True)
class ORPOOutput(PairOutput):
    """`PairOutput` of ORPO.

    Attributes
    ----------
    nll_loss : minus the mean log-probability of a token of the chosen response, in nats, with gradient.
    odds_loss : minus the log-sigmoid of the log odds ratio, before its weight, with gradient.
    """

    nll_loss: Float[Tensor, " batch"]
    odds_loss: Float[Tensor, " batch"]


class _PairLoss(nn.Module):
    """What the five share: a weight beta, a reduction, and whether a reference is needed."""

    needs_reference = True

    def __init__(self, beta: float, reduction: Reduction) -> None:
        super().__init__()
        self.beta = check_number("beta", beta, above=0)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.reduction = reduction

    def extra_repr(self) -> str:
        own = {name: value for name, value in vars(self).items() if name[0] != "_" and name != "training"}
        return ", ".join(f"{name}={value!r}" for name, value in own.items())


class DPO(_PairLoss):
    """Direct preference optimization, ``-log sigma(beta m)``.

    Parameters
    ----------
    beta : weight of the KL divergence to the reference, above 0. CheXalign tries 0.1, 0.05 and 0.01.
    label_smoothing : probability that a label is flipped, in [0, 0.5).
    reduction : "mean" or "sum" over the batch, or "none".
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, reduction: Reduction = "mean") -> None:
        super().__init__(beta, reduction)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)

    def forward(
        self,
        policy_chosen_logps: Float[Tensor, " batch"],
        policy_rejected_logps: Float[Tensor, " batch"],
        ref_chosen_logps: Float[Tensor, " batch"],
        ref_rejected_logps: Float[Tensor, " batch"],
        *,
        chosen_lengths: Int[Tensor, " batch"] | None = None,
        rejected_lengths: Int[Tensor, " batch"] | None = None,
    ) -> PairOutput:
        """Evaluate the loss; the lengths are not used.

        Raises
        ------
        ValueError : shapes differ, or a log-probability is not finite or is positive.
        """
        chosen, rejected = _logratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
        losses = dpo_losses(chosen, rejected, beta=self.beta, label_smoothing=self.label_smoothing)
        return _output(reduced(losses, self.reduction), self.beta * chosen, self.beta * rejected)


class LengthRegularizedDPO(_PairLoss):
    """DPO that does not learn from differences of length, ``-log sigma(beta m + alpha (|chosen| - |rejected|))``.

    A chosen response that is d tokens longer already has alpha d of its margin, and pulls less. Where labels are drawn
    from rewards that contain ``alpha |y|``, that part of the reward is not learned. Labels that follow from the scores
    without chance (best against worst) are separable: the margin then outgrows any constant, and this term controls
    little; divide the judge by relative length instead (`LengthControlled`).

    Parameters
    ----------
    beta : as in `DPO`.
    alpha : reward of a token that the labels are taken to contain, at least 0; 0 is DPO.
    reduction : "mean" or "sum" over the batch, or "none".
    """

    def __init__(self, beta: float = 0.1, alpha: float = 0.05, reduction: Reduction = "mean") -> None:
        super().__init__(beta, reduction)
        self.alpha = check_number("alpha", alpha, at_least=0)

    def forward(
        self,
        policy_chosen_logps: Float[Tensor, " batch"],
        policy_rejected_logps: Float[Tensor, " batch"],
        ref_chosen_logps: Float[Tensor, " batch"],
        ref_rejected_logps: Float[Tensor, " batch"],
        *,
        chosen_lengths: Int[Tensor, " batch"] | None = None,
        rejected_lengths: Int[Tensor, " batch"] | None = None,
    ) -> PairOutput:
        """Evaluate the loss, with the numbers of tokens of the responses.

        Raises
        ------
        ValueError : as `DPO`, and where lengths are missing, have another shape, or are below 1.
        """
        chosen, rejected = _logratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
        longer = checked_lengths(
            "chosen_lengths", chosen_lengths, chosen, needed_by="lengths are regularised"
        ) - checked_lengths("rejected_lengths", rejected_lengths, rejected, needed_by="lengths are regularised")
        # -log sigma(beta m + alpha (|chosen| - |rejected|))
        losses = -logsigmoid(self.beta * (chosen - rejected) + self.alpha * longer)
        return _output(reduced(losses, self.reduction), self.beta * chosen, self.beta * rejected)


class IPO(_PairLoss):
    """Identity preference optimization, ``(m - 1 / (2 beta))^2``: a margin to reach, not to outgrow.

    Parameters
    ----------
    beta : above 0; the margin aimed at is 1 / (2 beta) nats.
    per_token : divide each log-ratio by the tokens of its response first, as trl and CheXalign's trainer do; beta then
        sets a margin per token, and the same beta asks for a far larger margin of whole responses.
    reduction : "mean" or "sum" over the batch, or "none".
    """

    def __init__(self, beta: float = 0.1, per_token: bool = False, reduction: Reduction = "mean") -> None:
        super().__init__(beta, reduction)
        self.per_token = bool(per_token)

    def forward(
        self,
        policy_chosen_logps: Float[Tensor, " batch"],
        policy_rejected_logps: Float[Tensor, " batch"],
        ref_chosen_logps: Float[Tensor, " batch"],
        ref_rejected_logps: Float[Tensor, " batch"],
        *,
        chosen_lengths: Int[Tensor, " batch"] | None = None,
        rejected_lengths: Int[Tensor, " batch"] | None = None,
    ) -> PairOutput:
        """Evaluate the loss; lengths are needed with ``per_token=True``.

        Raises
        ------
        ValueError : as `DPO`, and where needed lengths are missing, have another shape, or are below 1.
        """
        chosen, rejected = _logratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
        if self.per_token:
            chosen = chosen / checked_lengths("chosen_lengths", chosen_lengths, chosen, needed_by="per_token=True")
            rejected = rejected / checked_lengths(
                "rejected_lengths", rejected_lengths, rejected, needed_by="per_token=True"
            )
        losses = (chosen - rejected - 1.0 / (2.0 * self.beta)) ** 2
        return _output(reduced(losses, self.reduction), self.beta * chosen, self.beta * rejected)


def kto_losses(
    logratios: Float[Tensor, " records"],
    desirable: Bool[Tensor, " records"],
    baseline: Float[Tensor, ""] | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " records"]:
    """KTO's loss of single responses with a label each, which need no counterpart; no checks.

    Parameters
    ----------
    logratios : ``log pi/pi_ref`` of each response, in nats.
    desirable : their labels.
    baseline : z0, from `kto_baseline`.
    beta, desirable_weight, undesirable_weight : of `KTO`.
    """
    signs = torch.where(desirable, 1.0, -1.0).to(logratios)
    weights = torch.where(desirable, desirable_weight, undesirable_weight).to(logratios)
    # w (1 - sigma(beta (logratio - z0))), and with the opposite sign where undesirable; 1 - sigma(t) = sigma(-t)
    return weights * torch.sigmoid(-signs * beta * (logratios - baseline))


def kto_baseline(mismatched_logratios: Float[Tensor, " records"]) -> Float[Tensor, ""]:
    """z0 of KTO: how far the policy moved on responses to other prompts, ``max(0, mean log pi/pi_ref)``, detached."""
    return mismatched_logratios.detach().mean().clamp(min=0.0)


class KTO(_PairLoss):
    """Kahneman-Tversky optimization: a good and a bad response, each against how far the policy moved in general.

    A pair is two records, the chosen response desirable and the rejected one undesirable; its loss is the mean of
    theirs. In place of a counterpart each is compared with z0, an estimate of the divergence from the reference.

    Parameters
    ----------
    beta : as in `DPO`.
    desirable_weight, undesirable_weight : w of each kind, at least 0.
    reduction : "mean" or "sum" over the batch, or "none".
    """

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(beta, reduction)
        self.desirable_weight = check_number("desirable_weight", desirable_weight, at_least=0)
        self.undesirable_weight = check_number("undesirable_weight", undesirable_weight, at_least=0)

    def forward(
        self,
        policy_chosen_logps: Float[Tensor, " batch"],
        policy_rejected_logps: Float[Tensor, " batch"],
        ref_chosen_logps: Float[Tensor, " batch"],
        ref_rejected_logps: Float[Tensor, " batch"],
        *,
        chosen_lengths: Int[Tensor, " batch"] | None = None,
        rejected_lengths: Int[Tensor, " batch"] | None = None,
        mismatched_logratios: Float[Tensor, " records"] | None = None,
    ) -> KTOOutput:
        """Evaluate the loss; the lengths are not used.

        Parameters
        ----------
        mismatched_logratios : ``log pi/pi_ref`` of responses given to prompts they do not belong to, from which z0
            follows (`kto_baseline`); at least two, since the estimate from one says little. No gradient flows to them.

        Raises
        ------
        ValueError : as `DPO`, and where `mismatched_logratios` is missing, has fewer than two, or is not finite.
        """
        chosen, rejected = _logratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
        if mismatched_logratios is None or mismatched_logratios.ndim != 1 or len(mismatched_logratios) < 2:
            given = "None" if mismatched_logratios is None else f"shape {tuple(mismatched_logratios.shape)}"
            raise ValueError(f"mismatched_logratios must have shape (records,) with at least two records, got {given}")
        if not mismatched_logratios.isfinite().all():
            raise ValueError("mismatched_logratios must be finite, got NaN or infinity")
        baseline = kto_baseline(mismatched_logratios)
        both = torch.cat([chosen, rejected])
        desirable = torch.arange(len(both), device=both.device) < len(chosen)
        records = kto_losses(
            both,
            desirable,
            baseline.to(both),
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        losses = records.view(2, -1).mean(0)
        out = _output(reduced(losses, self.reduction), self.beta * chosen, self.beta * rejected)
        return KTOOutput(**vars(out), baseline=baseline.to(both).expand(len(chosen)))


class ORPO(_PairLoss):
    """Odds-ratio preference optimization: fine-tuning on the chosen response plus an odds ratio, without a reference.

    ``NLL(chosen) - beta log sigma(log odds(chosen) - log odds(rejected))`` with the odds of ``p = exp(mean log-prob of
    a token)``.

    Parameters
    ----------
    beta : weight of the odds ratio (lambda in the paper), above 0.
    reduction : "mean" or "sum" over the batch, or "none".
    """

    needs_reference = False

    def __init__(self, beta: float = 0.1, reduction: Reduction = "mean") -> None:
        super().__init__(beta, reduction)

    def forward(
        self,
        policy_chosen_logps: Float[Tensor, " batch"],
        policy_rejected_logps: Float[Tensor, " batch"],
        ref_chosen_logps: Float[Tensor, " batch"] | None = None,
        ref_rejected_logps: Float[Tensor, " batch"] | None = None,
        *,
        chosen_lengths: Int[Tensor, " batch"] | None = None,
        rejected_lengths: Int[Tensor, " batch"] | None = None,
    ) -> ORPOOutput:
        """Evaluate the loss, with the numbers of tokens of the responses; the reference is not used.

        Raises
        ------
        ValueError : shapes differ, a log-probability is not finite or is positive, or lengths are missing or below 1.
        """
        check_logps(policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps)
        means = [
            logps / checked_lengths(name, lengths, logps, needed_by="odds are per token")
            for name, lengths, logps in (
                ("chosen_lengths", chosen_lengths, policy_chosen_logps),
                ("rejected_lengths", rejected_lengths, policy_rejected_logps),
            )
        ]
        chosen, rejected = means
        nll_loss = -chosen
        odds_loss = -logsigmoid(log_odds(chosen) - log_odds(rejected))
        losses = nll_loss + self.beta * odds_loss
        out = _output(reduced(losses, self.reduction), self.beta * chosen, self.beta * rejected)
        return ORPOOutput(**vars(out), nll_loss=nll_loss, odds_loss=odds_loss)


def log_odds(logps: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """``log(p / (1 - p))`` from ``log p``; a certain event counts as certain up to rounding, so odds stay finite."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - torch.log(-torch.expm1(logps))


def _logratios(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> tuple[Tensor, Tensor]:
    check_logps(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    return policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps


def _output(loss: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> PairOutput:
    chosen, rejected = chosen_rewards.detach(), rejected_rewards.detach()
    return PairOutput(loss, chosen, rejected, (chosen > rejected).to(chosen.dtype), chosen - rejected)
