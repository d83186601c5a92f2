"""Training a causal LM on judged pairs with any of the five losses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.alignment.judge_preference.losses import DPO, IPO, KTO, ORPO, LengthRegularizedDPO
from workingpapers.alignment.logprobs import frozen, reference_of
from workingpapers.alignment.preference_training import PreferenceConfig, PreferenceTrainer
from workingpapers.alignment.preferences import PreferenceBatch, TokenPair, collate_preferences, pair_logprobs
from workingpapers.common.validation import check_choice

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Literal["dpo", "lc-dpo", "ipo", "kto", "orpo"]


@dataclass(frozen=True)
class Alignment:
    """A finished run of `align`.

    Attributes
    ----------
    model : the model that was passed, trained in place.
    history : one dict per optimizer step, as in `PreferenceTrainer`.
    """

    model: nn.Module
    history: list[dict[str, float]]


class AlignmentTrainer(PreferenceTrainer):
    """`PreferenceTrainer` that also gives KTO what it needs: responses to prompts they do not belong to.

    Each prompt gets the two responses of the nearest pair before it that has another prompt, counted in a circle. They
    pass the policy without gradient at every step, and the reference once in a run. z0 is their mean over all pairs of
    an optimizer step, in all processes: accumulation changes memory, not the result.

    Parameters
    ----------
    model, ref_model, train_dataset, tokenizer, args, loss, optimizer, accelerator : as in `PreferenceTrainer`.

    Raises
    ------
    ValueError : as `PreferenceTrainer`, and for KTO where all prompts are the same, or where a step has a single pair,
        whose z0 would be noise.
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
        self._needs_mismatched = isinstance(loss, KTO)
        self._mismatched_logratios = torch.empty(0)
        if self._needs_mismatched and args.batch_size * args.accumulation < 2:
            raise ValueError("batch_size * accumulation must be at least 2 for KTO, whose z0 is a mean, got 1")
        super().__init__(
            model, ref_model, train_dataset, tokenizer, args, loss=loss, optimizer=optimizer, accelerator=accelerator
        )
        if self._needs_mismatched:
            _ = self._mismatched  # refuses equal prompts before any training

    def precompute_reference(self) -> None:
        """Score every pair now, for KTO the mismatched ones too, and let go of `ref_model`."""
        if self._needs_mismatched:
            for start in range(0, len(self.pairs), self.args.batch_size):
                rows = list(range(start, min(start + self.args.batch_size, len(self.pairs))))
                self._score_mismatched(rows, self._mismatched_batch(rows))
        super().precompute_reference()

    def _optimize(self, rows: list[int], step: int) -> dict[str, float]:
        if self._needs_mismatched:
            self._mismatched_logratios = self._gathered_logratios(rows)
        return super()._optimize(rows, step)

    def _evaluate(
        self,
        batch: PreferenceBatch,
        rows: list[int],
        chosen: Float[Tensor, " pairs"],
        rejected: Float[Tensor, " pairs"],
        reference: Float[Tensor, "2 pairs"] | None,
    ) -> Any:
        if not self._needs_mismatched:
            return super()._evaluate(batch, rows, chosen, rejected, reference)
        assert reference is not None
        return self.loss(chosen, rejected, *reference, mismatched_logratios=self._mismatched_logratios.to(chosen))

    @functools.cached_property
    def _mismatched(self) -> list[TokenPair]:
        """Every prompt with the responses of the nearest pair before it that has another prompt."""
        others = mismatched_rows([pair.prompt for pair in self.pairs])
        return [
            TokenPair(pair.prompt, self.pairs[other].chosen, self.pairs[other].rejected)
            for pair, other in zip(self.pairs, others, strict=True)
        ]

    @functools.cached_property
    def _mismatched_reference(self) -> Float[Tensor, "2 pairs"]:
        return torch.full((2, len(self.pairs)), torch.nan, dtype=torch.float64)  # NaN: not scored yet

    def _mismatched_batch(self, rows: list[int]) -> PreferenceBatch:
        return collate_preferences([self._mismatched[row] for row in rows]).to(self._device)

    def _score_mismatched(self, rows: list[int], batch: PreferenceBatch) -> Float[Tensor, "2 pairs"]:
        if self._mismatched_reference[:, rows].isnan().any():
            with reference_of(self.model, self.ref_model) as reference, self._autocast():
                scored = torch.stack(pair_logprobs(reference, batch))
            self._mismatched_reference[:, rows] = scored.to(self._mismatched_reference)
        return self._mismatched_reference[:, rows]

    def _gathered_logratios(self, rows: list[int]) -> Float[Tensor, " records"]:
        """``log pi/pi_ref`` of the mismatched responses of all pairs of a step, in all processes."""
        mine, logratios = self._share(rows), []
        for start in range(0, len(mine), self.args.batch_size):
            part = mine[start : start + self.args.batch_size]
            batch = self._mismatched_batch(part)
            reference = self._score_mismatched(part, batch)
            with frozen(self.model) as policy, self._autocast():
                scored = torch.stack(pair_logprobs(policy, batch))
            logratios += (scored.to(reference) - reference).flatten().tolist()
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            logratios = gather_object(logratios)
        return torch.tensor(logratios)


def mismatched_rows(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each prompt the nearest one before it, in a circle, that differs from it.

    Raises
    ------
    ValueError : all prompts are the same.
    """
    starts = [place for place in range(len(prompts)) if prompts[place] != prompts[place - 1]]
    if not starts:
        raise ValueError("prompts must not all be the same for KTO, which mismatches prompts and responses")
    others = [0] * len(prompts)
    other = starts[0] - 1
    for place in range(starts[0], starts[0] + len(prompts)):
        row = place % len(prompts)
        if prompts[row] != prompts[row - 1]:
            other = row - 1
        others[row] = other % len(prompts)
    return others


def align(
    model: nn.Module,
    ref: nn.Module | None,
    pairs: Iterable[Mapping[str, Any]] | Sequence[TokenPair],
    tokenizer: Any = None,
    *,
    loss: Loss | nn.Module = "dpo",
    beta: float = 0.1,
    alpha: float = 0.05,
    lr: float = 1e-6,
    epochs: int = 1,
    batch_size: int = 4,
    accumulate: int = 8,
    warmup: float | None = 0.1,
    max_length: int = 2048,
    max_prompt_length: int | None = None,
    max_steps: int | None = None,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    random_state: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    accelerator: Accelerator | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> Alignment:
    """Train a causal LM on judged pairs, in place; `AlignmentTrainer` where a run must be saved and resumed.

    Parameters
    ----------
    model : a transformers causal LM, or a peft model around one, fine-tuned on the references.
    ref : a frozen copy of it; None for a peft model and for ORPO.
    pairs : from `build_preferences`, or rows with prompt, chosen and rejected, or `TokenPair`.
    tokenizer : of the model; may be None where the pairs are tokenised.
    loss : by name, or a module as `PreferenceTrainer` takes it, with ``reduction="sum"``.
    beta : of the named loss; the paper tries 0.1, 0.05 and 0.01.
    alpha : of "lc-dpo".
    lr : peak learning rate; linear rise over the share `warmup` of the steps, then cosine to 0.
    epochs, max_steps, bf16, gradient_checkpointing, random_state : of `TrainingConfig`.
    batch_size : pairs in one forward pass.
    accumulate : forward passes per optimizer step.
    warmup : None keeps the rate constant.
    max_length : tokens a sequence may have.
    max_prompt_length : tokens a prompt may have; half of `max_length` when None.
    optimizer, accelerator : as in `PreferenceTrainer`.
    on_step : called with the newest entry of the history after every step.

    Raises
    ------
    ValueError : an argument is out of range or the data do not fit.
    """
    args = PreferenceConfig(
        learning_rate=lr,
        warmup=warmup,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        accumulation=accumulate,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        random_state=random_state,
        max_length=max_length,
        max_prompt_length=max(1, max_length // 2) if max_prompt_length is None else max_prompt_length,
    )
    module = loss if isinstance(loss, nn.Module) else _named_loss(loss, beta, alpha)
    if getattr(module, "reduction", "sum") != "sum":
        raise ValueError(f"loss must have reduction='sum', got {module.reduction!r}")
    trainer = AlignmentTrainer(
        model, ref, pairs, tokenizer, args, loss=module, optimizer=optimizer, accelerator=accelerator
    )
    return Alignment(model, trainer.train(on_step=on_step))


def _named_loss(name: Loss, beta: float, alpha: float) -> nn.Module:
    check_choice("loss", name, get_args(Loss))
    if name == "lc-dpo":
        return LengthRegularizedDPO(beta, alpha, reduction="sum")
    losses: dict[Loss, type[DPO | IPO | KTO | ORPO]] = {"dpo": DPO, "ipo": IPO, "kto": KTO, "orpo": ORPO}
    return losses[name](beta, reduction="sum")
