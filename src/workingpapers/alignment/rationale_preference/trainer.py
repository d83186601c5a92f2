"""Training a causal LM on preference pairs and their rationales."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.alignment.logprobs import sequence_logprobs
from workingpapers.alignment.preference_training import PreferenceConfig, PreferenceTrainer
from workingpapers.alignment.preferences import PreferenceBatch, TokenPair
from workingpapers.alignment.rationale_preference.formatting import PromptOfRationale, tokenize_rationales
from workingpapers.alignment.rationale_preference.losses import Base, RationaleLoss, RationaleOutput
from workingpapers.common.validation import check_integer

if TYPE_CHECKING:
    from accelerate import Accelerator

_SWAMPED = 10.0  # times the other terms: above this the rationales decide alone


@dataclass(frozen=True)
class RationaleConfig(PreferenceConfig):
    """How `RationaleTrainer` trains.

    Attributes
    ----------
    base, beta, gamma, rationale_reduction, rationale_link, preference_weight, simpo_margin : of `RationaleLoss`.
    max_rationale_length : tokens of a rationale with its prompt, see `tokenize_rationales`.
    """

    base: Base = "dpo"
    beta: float = 0.1
    gamma: float = 0.01
    rationale_reduction: Literal["sum", "mean"] = "sum"
    rationale_link: Literal["linear", "logsigmoid"] = "linear"
    preference_weight: float = 1.0
    simpo_margin: float = 0.5
    max_rationale_length: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss()
        check_integer("max_rationale_length", self.max_rationale_length, at_least=2)

    def loss(self) -> RationaleLoss:
        """The loss with these settings, summed over pairs."""
        return RationaleLoss(
            self.base,
            self.beta,
            self.gamma,
            self.rationale_reduction,
            self.rationale_link,
            self.preference_weight,
            self.simpo_margin,
            reduction="sum",
        )


class RationaleTrainer(PreferenceTrainer):
    """Train a causal LM on preference pairs and on the rationales of their labels, in place.

    Parameters
    ----------
    model, optimizer, accelerator : as in `PreferenceTrainer`.
    ref_model : the frozen reference of DPO; None for a peft model, whose reference is itself with the adapters off, and
        for ORPO and SimPO.
    train_dataset : rows with prompt, chosen, rejected and rationale (text, or conversations with the rationale as
        text), or `TokenPair` with rationales. With ``gamma=0`` rationales are neither needed nor read.
    tokenizer : of the model; may be None when the data are tokenised.
    args : a `RationaleConfig`; its defaults when None.
    formatter : writes the prompt of a rationale; ``RationaleFormatter()`` when None.

    Attributes
    ----------
    history : one dict per optimizer step: step (from 1), loss, preference_loss, rationale_loss, sft_loss (ORPO),
        rationale_perplexity, chosen_logprob, rejected_logprob (nats per answer), chosen_reward, rejected_reward,
        accuracy, margin, gradient_norm, learning_rate.
    total_steps : optimizer steps of the whole run.

    Raises
    ------
    ValueError : the data do not fit, `ref_model` is missing or is the model itself, or nothing is trainable.

    Warns
    -----
    UserWarning : at the first step the rationale's term is more than ten times the rest of the loss.

    Examples
    --------
    >>> args = RationaleConfig(base="dpo", beta=0.1, gamma=0.001)
    >>> trainer = RationaleTrainer(model, reference, dataset, tokenizer, args)  # doctest: +SKIP
    >>> trainer.train(on_step=lambda row: print(row["preference_loss"], row["rationale_loss"]))  # doctest: +SKIP
    """

    loss: RationaleLoss

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        train_dataset: Iterable[Mapping[str, Any]] | Sequence[TokenPair],
        tokenizer: Any = None,
        args: RationaleConfig | None = None,
        *,
        formatter: PromptOfRationale | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        args = RationaleConfig() if args is None else args
        rows: list[Any] = list(train_dataset)
        tokenised = all(isinstance(row, TokenPair) for row in rows)
        if args.gamma > 0.0 and not tokenised and tokenizer is not None:
            rows = tokenize_rationales(
                rows,
                tokenizer,
                formatter=formatter,
                max_length=args.max_length,
                max_prompt_length=args.max_prompt_length,
                max_rationale_length=args.max_rationale_length,
            )
        super().__init__(
            model, ref_model, rows, tokenizer, args, loss=args.loss(), optimizer=optimizer, accelerator=accelerator
        )
        without = [number for number, pair in enumerate(self.pairs) if pair.rationale is None]
        if args.gamma > 0.0 and without:
            raise ValueError(f"train_dataset must have a rationale in every pair, pair {without[0]} has none")
        self._mean_chosen_length: float | None = None

    def _optimize(self, rows: list[int], step: int) -> dict[str, float]:
        # ORPO's mean runs over the tokens of the whole step, of which each forward pass sees a part
        self._mean_chosen_length = sum(len(self.pairs[row].chosen) for row in rows) / len(rows)
        return super()._optimize(rows, step)

    def _evaluate(
        self,
        batch: PreferenceBatch,
        rows: list[int],
        chosen: Float[Tensor, " pairs"],
        rejected: Float[Tensor, " pairs"],
        reference: Float[Tensor, "2 pairs"] | None,
    ) -> RationaleOutput:
        of_rationales = lengths = None
        if self.loss.gamma > 0.0:
            asked = batch.rationales
            assert asked is not None
            # a pass of its own: with their quotations rationales are far longer than answers, padding would cost more
            with self._autocast():
                of_rationales = sequence_logprobs(
                    self.model, asked.input_ids, asked.attention_mask, asked.response_mask
                )
            lengths = asked.lengths
        out: RationaleOutput = self.loss(
            chosen,
            rejected,
            of_rationales,
            *((None, None) if reference is None else reference),
            chosen_lengths=batch.chosen_lengths,
            rejected_lengths=batch.rejected_lengths,
            rationale_lengths=lengths,
            mean_chosen_length=self._mean_chosen_length,
        )
        return out

    def _step(self, step: int) -> dict[str, float]:
        found = super()._step(step)
        rationale = found.get("rationale_loss", 0.0)
        rest = self.loss.preference_weight * found["preference_loss"] + found.get("sft_loss", 0.0)
        if step == 0 and self.loss.preference_weight > 0.0 and rationale > _SWAMPED * rest:
            warnings.warn(
                f"the rationale term ({rationale:.3g}) is more than {_SWAMPED:g} times the other terms ({rest:.3g}) at "
                f"the first step: gamma={self.loss.gamma:g} is large for rationales of this length with "
                f"rationale_reduction={self.loss.rationale_reduction!r}",
                UserWarning,
                stacklevel=3,
            )
        return found
