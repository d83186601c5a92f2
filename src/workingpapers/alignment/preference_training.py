"""Training a causal LM on preference pairs with any loss of their log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.alignment.logprobs import reference_of
from workingpapers.alignment.preferences import (
    PreferenceBatch,
    TokenPair,
    as_token_pairs,
    collate_preferences,
    pair_logprobs,
)
from workingpapers.alignment.training import Trainer, TrainingConfig
from workingpapers.common.validation import check_integer

if TYPE_CHECKING:
    from accelerate import Accelerator


_MEAN_OF = {"chosen_rewards": "chosen_reward", "rejected_rewards": "rejected_reward"}


@dataclass(frozen=True)
class PreferenceConfig(TrainingConfig):
    """How a `PreferenceTrainer` trains; items are pairs.

    Attributes
    ----------
    learning_rate, warmup, weight_decay, max_grad_norm, epochs, max_steps, batch_size, accumulation, bf16,
    gradient_checkpointing, random_state : of `TrainingConfig`.
    max_length, max_prompt_length : in tokens; see `tokenize_preferences`.
    precompute_reference : score all pairs under the reference before the first step and let go of the reference.
        Otherwise each pair is scored when it is first met, and remembered.
    """

    max_length: int = 1024
    max_prompt_length: int = 512
    precompute_reference: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("max_prompt_length", self.max_prompt_length, at_least=1)
        check_integer("max_length", self.max_length, at_least=self.max_prompt_length + 1)


class PreferenceTrainer(Trainer):
    """Train a causal LM on preference pairs, in place.

    Each response is scored once under the reference; every step is one forward and one backward pass of the policy over
    chosen and rejected responses together, in which logits are formed at response tokens alone.

    Parameters
    ----------
    model : a transformers causal LM, or a peft model around one; trained in place, on the device it is on. Only
        parameters that require gradients change.
    ref_model : the frozen reference; None for a peft model, whose reference is itself with the adapters off, and for
        losses that need none.
    train_dataset : rows with prompt, chosen and rejected (text or conversations, see `tokenize_preferences`), or
        `TokenPair`.
    tokenizer : of the model; may be None when the data are tokenised.
    args : a `PreferenceConfig`; its defaults when None.
    loss : a module that is called as ``loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps,
        ref_rejected_logps, chosen_lengths=..., rejected_lengths=...)`` on summed log-probabilities, and returns a
        dataclass with the *sum* over pairs as `loss` and one entry per pair in its other tensors, whose means are
        reported in `history`. Where its attribute `needs_reference` is False it is given None for the reference.
    optimizer : over the model's trainable parameters; AdamW when None. Its learning rate follows the schedule.
    accelerator : for several processes, see `Trainer`.

    Attributes
    ----------
    history : one dict per optimizer step: step (from 1), loss and the other fields of the loss's output,
        chosen_logprob, rejected_logprob (nats per answer), gradient_norm, learning_rate.
    total_steps : optimizer steps of the whole run.
    pairs : the data as `TokenPair`.

    Raises
    ------
    ValueError : the data do not fit, the reference is missing or is the model itself, or nothing is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        train_dataset: Iterable[Mapping[str, Any]] | Sequence[TokenPair],
        tokenizer: Any = None,
        args: PreferenceConfig | None = None,
        *,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        args = PreferenceConfig() if args is None else args
        self.ref_model = ref_model
        self.loss = loss
        self._refers = bool(getattr(loss, "needs_reference", True))
        if ref_model is model:
            raise ValueError("ref_model must be a frozen copy, got the model that is trained")
        if self._refers:
            with reference_of(model, ref_model):
                pass  # refuses a missing reference before the data are read
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("model must have parameters that require gradients")
        self.pairs = as_token_pairs(
            train_dataset, tokenizer, max_length=args.max_length, max_prompt_length=args.max_prompt_length
        )
        super().__init__(model, len(self.pairs), args, optimizer=optimizer, accelerator=accelerator)
        self._reference = torch.full(
            (2, len(self.pairs)), torch.nan, dtype=torch.float64
        )  # chosen, rejected; NaN: not scored yet
        if args.precompute_reference and self._refers:
            self.precompute_reference()

    def precompute_reference(self) -> None:
        """Score every pair under the reference now, and let go of `ref_model`."""
        for start in range(0, len(self.pairs), self.args.batch_size):
            rows = list(range(start, min(start + self.args.batch_size, len(self.pairs))))
            self._reference_logprobs(rows, self._batch(rows))
        self.ref_model = None

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on later exactly as if the run had not been interrupted."""
        return super().state_dict() | {"reference": self._reference.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of a trainer with the same model, data and arguments.

        Raises
        ------
        ValueError : the state belongs to other parameters or to another number of pairs.
        """
        if state["reference"].shape != self._reference.shape:
            raise ValueError("state must come from a trainer with the same trainable parameters and the same data")
        super().load_state_dict(state)
        self._reference = state["reference"].clone()

    def _accumulate(self, rows: list[int], total: int) -> dict[str, Tensor]:
        batch = self._batch(rows)
        reference = self._reference_logprobs(rows, batch) if self._refers else None
        with self._autocast():
            chosen, rejected = pair_logprobs(self.model, batch)
        out = self._evaluate(batch, rows, chosen, rejected, None if reference is None else reference.to(chosen))
        (out.loss / total).backward()
        reported = {field.name: getattr(out, field.name) for field in fields(out)}
        sums = {_MEAN_OF.get(name, name): value for name, value in reported.items() if isinstance(value, Tensor)}
        return sums | {"chosen_logprob": chosen, "rejected_logprob": rejected}

    def _evaluate(
        self,
        batch: PreferenceBatch,
        rows: list[int],
        chosen: Float[Tensor, " pairs"],
        rejected: Float[Tensor, " pairs"],
        reference: Float[Tensor, "2 pairs"] | None,
    ) -> Any:
        """The output of the loss for these pairs; for subclasses whose loss needs more than the pair itself."""
        return self.loss(
            chosen,
            rejected,
            *((None, None) if reference is None else reference),
            chosen_lengths=batch.chosen_lengths,
            rejected_lengths=batch.rejected_lengths,
        )

    def _reference_logprobs(self, rows: list[int], batch: PreferenceBatch) -> Float[Tensor, "2 pairs"]:
        if self._reference[:, rows].isnan().any():
            with reference_of(self.model, self.ref_model) as reference, self._autocast():
                self._reference[:, rows] = torch.stack(pair_logprobs(reference, batch)).to(self._reference)
        return self._reference[:, rows]

    def _batch(self, rows: list[int]) -> PreferenceBatch:
        return collate_preferences([self.pairs[row] for row in rows]).to(self._device)
