"""A thin training loop for RPO on transformers causal language models."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.alignment.preference_training import PreferenceConfig, PreferenceTrainer
from workingpapers.alignment.preferences import PreferenceBatch, TokenPair
from workingpapers.alignment.regularized_preference.losses import RPOLoss, RPOOutput

if TYPE_CHECKING:
    from accelerate import Accelerator

_SWAMPED = 10.0  # times the preference term: above this the supervised term decides alone


@dataclass(frozen=True)
class RPOConfig(PreferenceConfig):
    """How `RPOTrainer` trains; the defaults follow the paper's runs where it states them.

    Attributes
    ----------
    beta, eta, sft, label_smoothing : of `RPOLoss`.
    """

    beta: float = 0.1
    eta: float = 0.005
    sft: Literal["sum", "mean"] = "sum"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        RPOLoss(self.beta, self.eta, self.sft, self.label_smoothing)


class RPOTrainer(PreferenceTrainer):
    """Train a causal LM on preference pairs with the RPO loss, in place.

    Parameters
    ----------
    model, ref_model, train_dataset, tokenizer, optimizer, accelerator : as in `PreferenceTrainer`.
    args : an `RPOConfig`; its defaults when None.

    Attributes
    ----------
    history : one dict per optimizer step: step (from 1), loss, dpo_loss, sft_loss, chosen_logprob, rejected_logprob
        (nats per answer), chosen_reward, rejected_reward, accuracy, margin, gradient_norm, learning_rate.
    total_steps : optimizer steps of the whole run.

    Raises
    ------
    ValueError : the data do not fit, `ref_model` is missing or is the model itself, or nothing is trainable.

    Examples
    --------
    >>> trainer = RPOTrainer(model, reference, dataset, tokenizer, RPOConfig(beta=0.1, eta=0.005))  # doctest: +SKIP
    >>> trainer.train(on_step=lambda row: print(row["step"], row["chosen_logprob"]))  # doctest: +SKIP
    """

    loss: RPOLoss

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        train_dataset: Iterable[Mapping[str, Any]] | Sequence[TokenPair],
        tokenizer: Any = None,
        args: RPOConfig | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        args = RPOConfig() if args is None else args
        loss = RPOLoss(args.beta, args.eta, args.sft, args.label_smoothing, reduction="sum")
        super().__init__(
            model, ref_model, train_dataset, tokenizer, args, loss=loss, optimizer=optimizer, accelerator=accelerator
        )

    def _evaluate(
        self,
        batch: PreferenceBatch,
        rows: list[int],
        chosen: Float[Tensor, " pairs"],
        rejected: Float[Tensor, " pairs"],
        reference: Float[Tensor, "2 pairs"] | None,
    ) -> RPOOutput:
        assert reference is not None
        out: RPOOutput = self.loss(chosen, rejected, *reference, chosen_lengths=batch.chosen_lengths)
        return out

    def _step(self, step: int) -> dict[str, float]:
        found = super()._step(step)
        supervised = self.loss.sft_weight * found["sft_loss"]
        if step == 0 and supervised > _SWAMPED * found["dpo_loss"]:
            warnings.warn(
                f"the supervised term ({supervised:.3g}) is more than {_SWAMPED:g} times the preference term "
                f"({found['dpo_loss']:.3g}) at the first step: eta={self.args.eta:g} is large for answers of this "
                f"length with sft={self.args.sft!r}",
                UserWarning,
                stacklevel=3,
            )
        return found
