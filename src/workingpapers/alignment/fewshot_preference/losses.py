"""The preference losses of FSPO on summed log-probabilities: IPO and DPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from workingpapers.alignment.checks import Reduction, check_logps, reduced
from workingpapers.alignment.regularized_preference.losses import dpo_losses
from workingpapers.common.validation import check_choice, check_number


@dataclass(frozen=True)
class FSPOOutput:
    """The loss and what it is made of; per example, shape (B,), unless said otherwise; all but the loss are detached.

    Attributes
    ----------
    loss : the objective, a scalar unless ``reduction="none"``; with gradient.
    margin : h, by how many nats the log-ratio of the chosen response exceeds that of the rejected one.
    chosen_rewards, rejected_rewards : implicit personal rewards ``beta * (log pi_theta - log pi_ref)``.
    accuracy : 1 where the implicit rewards rank the pair as the user does, else 0.
    """

    loss: Float[Tensor, "*reduced"]
    margin: Float[Tensor, " batch"]
    chosen_rewards: Float[Tensor, " batch"]
    rejected_rewards: Float[Tensor, " batch"]
    accuracy: Float[Tensor, " batch"]


def ipo_losses(
    chosen_logratios: Float[Tensor, "*batch"], rejected_logratios: Float[Tensor, "*batch"], *, beta: float
) -> Float[Tensor, "*batch"]:
    """IPO on summed log-ratios ``log pi_theta - log pi_ref``, in nats squared; no checks, any shape."""
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2  # (h - 1 / (2 beta))^2


class FSPOLoss(nn.Module):
    """IPO or DPO of the query's responses given a user's shots.

    With h the log-ratio of the chosen response less that of the rejected one, under policy and reference that see the
    same shots::

        kind="ipo":  (h - 1 / (2 beta))^2
        kind="dpo":  -(1 - e) log sigma(beta h) - e log sigma(-beta h)

    The log-ratios are sums over tokens. trl's IPO averages them over the tokens of each response, so that its beta
    means something else; for responses of one length L, its beta is L times ours for the same minimiser.

    Parameters
    ----------
    kind : "ipo" or "dpo".
    beta : above 0. IPO aims at a margin of 1 / (2 beta) nats: 50 for the paper's 0.01, more than two short responses
        can differ by; choose it for the length of the responses.
    label_smoothing : e, the probability that a label is flipped, in [0, 0.5). For DPO alone: in IPO it would do no
        more than divide the target by 1 / (1 - 2 e), which beta does already.
    reduction : "mean" or "sum" over the batch, or "none".

    Raises
    ------
    ValueError : a parameter is out of range.
    """

    needs_reference = True

    def __init__(
        self,
        kind: Literal["ipo", "dpo"] = "ipo",
        beta: float = 0.01,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_choice("kind", kind, ("ipo", "dpo"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.kind = kind
        self.beta = check_number("beta", beta, above=0)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
        if kind == "ipo" and label_smoothing:
            raise ValueError(
                f"label_smoothing must be 0 for kind='ipo', got {label_smoothing!r}: use "
                f"beta={beta / (1 - 2 * label_smoothing):g}, which has the same minimiser"
            )
        self.reduction = reduction

    @property
    def target_margin(self) -> float | None:
        """The margin in nats that IPO aims at; None for DPO, which wants it as large as it can be."""
        return 1 / (2 * self.beta) if self.kind == "ipo" else None

    def forward(
        self,
        policy_chosen_logps: Float[Tensor, " batch"],
        policy_rejected_logps: Float[Tensor, " batch"],
        ref_chosen_logps: Float[Tensor, " batch"],
        ref_rejected_logps: Float[Tensor, " batch"],
        *,
        chosen_lengths: Int[Tensor, " batch"] | None = None,
        rejected_lengths: Int[Tensor, " batch"] | None = None,
    ) -> FSPOOutput:
        """Evaluate the loss on log-probabilities summed over the tokens of each response, in nats.

        Parameters
        ----------
        policy_chosen_logps, policy_rejected_logps : under the trained policy.
        ref_chosen_logps, ref_rejected_logps : under the frozen reference, which sees the same shots.
        chosen_lengths, rejected_lengths : not used; here so that every trainer of pairs can call every loss.

        Raises
        ------
        ValueError : shapes differ, or a log-probability is not finite or is positive.
        """
        check_logps(
            policy_chosen_logps=policy_chosen_logps,
            policy_rejected_logps=policy_rejected_logps,
            ref_chosen_logps=ref_chosen_logps,
            ref_rejected_logps=ref_rejected_logps,
        )
        chosen_logratios = policy_chosen_logps - ref_chosen_logps
        rejected_logratios = policy_rejected_logps - ref_rejected_logps
        if self.kind == "ipo":
            losses = ipo_losses(chosen_logratios, rejected_logratios, beta=self.beta)
        else:
            losses = dpo_losses(
                chosen_logratios, rejected_logratios, beta=self.beta, label_smoothing=self.label_smoothing
            )
        margin = (chosen_logratios - rejected_logratios).detach()
        return FSPOOutput(
            loss=reduced(losses, self.reduction),
            margin=margin,
            chosen_rewards=self.beta * chosen_logratios.detach(),
            rejected_rewards=self.beta * rejected_logratios.detach(),
            accuracy=(margin > 0).to(margin.dtype),
        )

    def extra_repr(self) -> str:
        return (
            f"kind={self.kind!r}, beta={self.beta:g}, label_smoothing={self.label_smoothing:g}, "
            f"reduction={self.reduction!r}"
        )
