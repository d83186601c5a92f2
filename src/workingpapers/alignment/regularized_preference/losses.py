"""The RPO loss on sequence log-probabilities (Algorithm 2 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from workingpapers.alignment.checks import Reduction, check_logps, checked_lengths, reduced
from workingpapers.common.validation import check_choice, check_number


@dataclass(frozen=True)
class RPOOutput:
    """The loss and what it is made of; per example, shape (B,), unless said otherwise.

    Attributes
    ----------
    loss : the objective, a scalar unless ``reduction="none"``.
    chosen_rewards, rejected_rewards : implicit rewards ``beta * (log pi_theta - log pi_ref)``, detached.
    dpo_loss : the preference term, with gradient.
    sft_loss : the supervised term before its weight, a negative log-likelihood in nats (``sft="sum"``) or nats per
        token (``sft="mean"``), with gradient.
    accuracy : 1 where the implicit rewards rank the pair as the data do, else 0.
    margin : chosen minus rejected reward, detached.
    """

    loss: Float[Tensor, "*reduced"]
    chosen_rewards: Float[Tensor, " batch"]
    rejected_rewards: Float[Tensor, " batch"]
    dpo_loss: Float[Tensor, " batch"]
    sft_loss: Float[Tensor, " batch"]
    accuracy: Float[Tensor, " batch"]
    margin: Float[Tensor, " batch"]


def dpo_losses(
    chosen_logratios: Float[Tensor, "*batch"],
    rejected_logratios: Float[Tensor, "*batch"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "*batch"]:
    """Preference term of each pair from its log-ratios ``log pi_theta - log pi_ref``; no checks, any shape."""
    margin = beta * (chosen_logratios - rejected_logratios)
    if label_smoothing == 0.0:
        return -logsigmoid(margin)  # -log sigma(beta h)
    # -(1 - eps) log sigma(beta h) - eps log sigma(-beta h)
    return -(1.0 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


class RPOLoss(nn.Module):
    """DPO plus a supervised term on the chosen answers, the regularizer that guards against overoptimization.

    ``sft="sum"``, the form the theory derives::

        -log sigma(beta h) - eta * beta * log pi_theta(a_cho | x)

    ``sft="mean"``, the form the authors recommend by default and for reasoning (appendix F)::

        -log sigma(beta h) - eta * log pi_theta(a_cho | x) / |a_cho|

    with h the difference of the two log-ratios. For answers of L tokens ``eta_mean = eta_sum * beta * L`` weighs the
    term alike: the same eta in both forms is a very different loss.

    Parameters
    ----------
    beta : weight of the KL divergence to the reference, above 0. Paper: 0.01 or 0.05 (sum), 0.5 (mean).
    eta : weight of the supervised term, at least 0; 0 is DPO. Paper: 0.005 (sum), 0.2 (mean).
    sft : "sum" over the tokens of an answer, or "mean" over them, then over the batch.
    label_smoothing : probability that a label is flipped, in [0, 0.5).
    reduction : "mean" or "sum" over the batch, or "none".

    Raises
    ------
    ValueError : a parameter is out of range.
    """

    def __init__(
        self,
        beta: float = 0.1,
        eta: float = 0.005,
        sft: Literal["sum", "mean"] = "sum",
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_choice("sft", sft, ("sum", "mean"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.beta = check_number("beta", beta, above=0)
        self.eta = check_number("eta", eta, at_least=0)
        self.sft = sft
        self.label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
        self.reduction = reduction

    @property
    def sft_weight(self) -> float:
        """What multiplies `RPOOutput.sft_loss`: eta * beta for the sum, eta for the mean."""
        return self.eta * self.beta if self.sft == "sum" else self.eta

    def forward(
        self,
        policy_chosen_logps: Float[Tensor, " batch"],
        policy_rejected_logps: Float[Tensor, " batch"],
        ref_chosen_logps: Float[Tensor, " batch"],
        ref_rejected_logps: Float[Tensor, " batch"],
        *,
        chosen_lengths: Int[Tensor, " batch"] | None = None,
        base_logps: Float[Tensor, " batch"] | None = None,
        base_lengths: Int[Tensor, " batch"] | None = None,
    ) -> RPOOutput:
        """Evaluate the loss on log-probabilities summed over the tokens of each answer, in nats.

        Parameters
        ----------
        policy_chosen_logps, policy_rejected_logps : under the trained policy.
        ref_chosen_logps, ref_rejected_logps : under the frozen reference.
        chosen_lengths : tokens in each chosen answer, at least 1; needed when ``sft="mean"``.
        base_logps : under the trained policy, of one answer per prompt from another baseline policy; the supervised
            term then uses these in place of the chosen answers.
        base_lengths : their numbers of tokens; needed when ``sft="mean"``.

        Raises
        ------
        ValueError : shapes differ, a log-probability is not finite or is positive, or lengths are missing or below 1.
        """
        check_logps(
            policy_chosen_logps=policy_chosen_logps,
            policy_rejected_logps=policy_rejected_logps,
            ref_chosen_logps=ref_chosen_logps,
            ref_rejected_logps=ref_rejected_logps,
            **({} if base_logps is None else {"base_logps": base_logps}),
        )
        # h = [log pi_theta(a_cho) - log pi_ref(a_cho)] - [log pi_theta(a_rej) - log pi_ref(a_rej)]
        chosen_logratios = policy_chosen_logps - ref_chosen_logps
        rejected_logratios = policy_rejected_logps - ref_rejected_logps
        dpo_loss = dpo_losses(
            chosen_logratios, rejected_logratios, beta=self.beta, label_smoothing=self.label_smoothing
        )

        supervised = policy_chosen_logps if base_logps is None else base_logps  # the paper takes a0 = a_cho
        if self.sft == "sum":
            sft_loss = -supervised
        else:
            name = "chosen_lengths" if base_logps is None else "base_lengths"
            lengths = chosen_lengths if base_logps is None else base_lengths
            sft_loss = -supervised / checked_lengths(name, lengths, supervised, needed_by="sft='mean'")
        losses = dpo_loss if self.eta == 0.0 else dpo_loss + self.sft_weight * sft_loss

        chosen_rewards = self.beta * chosen_logratios.detach()
        rejected_rewards = self.beta * rejected_logratios.detach()
        return RPOOutput(
            loss=reduced(losses, self.reduction),
            chosen_rewards=chosen_rewards,
            rejected_rewards=rejected_rewards,
            dpo_loss=dpo_loss,
            sft_loss=sft_loss,
            accuracy=(chosen_rewards > rejected_rewards).to(chosen_rewards.dtype),
            margin=chosen_rewards - rejected_rewards,
        )

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta:g}, eta={self.eta:g}, sft={self.sft!r}, label_smoothing={self.label_smoothing:g}, "
            f"reduction={self.reduction!r}"
        )
