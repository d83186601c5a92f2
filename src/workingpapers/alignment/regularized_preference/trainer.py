"""A thin training loop for RPO on transformers causal language models."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
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
from workingpapers.alignment.regularized_preference.losses import RPOLoss
from workingpapers.common.validation import check_integer, check_number

_SWAMPED = 10.0  # times the preference term: above this the supervised term decides alone


@dataclass(frozen=True)
class RPOConfig:
    """How `RPOTrainer` trains; the defaults follow the paper's runs where it states them.

    Attributes
    ----------
    beta, eta, sft, label_smoothing : of `RPOLoss`.
    learning_rate : peak of the schedule, above 0.
    warmup : share of the steps in which the rate rises linearly from 0, in [0, 1); then it follows a cosine to 0.
        None keeps the rate constant.
    weight_decay : of AdamW, at least 0.
    max_grad_norm : gradients are scaled down to this Euclidean norm, above 0.
    epochs : passes over the data, at least 1.
    max_steps : stop after this many optimizer steps instead of `epochs`.
    batch_size : pairs in one forward pass.
    accumulation : forward passes per optimizer step; together they are one batch.
    max_length, max_prompt_length : in tokens; see `tokenize_preferences`.
    bf16 : autocast the policy and the reference to bfloat16; the loss stays in float32.
    gradient_checkpointing : recompute activations in the backward pass to save memory.
    precompute_reference : score all pairs under the reference before the first step and let go of `ref_model`.
        Otherwise each pair is scored when it is first met, and remembered.
    random_state : decides the order of the pairs.
    """

    beta: float = 0.1
    eta: float = 0.005
    sft: Literal["sum", "mean"] = "sum"
    label_smoothing: float = 0.0
    learning_rate: float = 5e-7
    warmup: float | None = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    max_length: int = 1024
    max_prompt_length: int = 512
    bf16: bool = False
    gradient_checkpointing: bool = False
    precompute_reference: bool = False
    random_state: int = 0

    def __post_init__(self) -> None:
        RPOLoss(self.beta, self.eta, self.sft, self.label_smoothing)
        check_number("learning_rate", self.learning_rate, above=0)
        if self.warmup is not None:
            check_number("warmup", self.warmup, at_least=0, below=1)
        check_number("weight_decay", self.weight_decay, at_least=0)
        check_number("max_grad_norm", self.max_grad_norm, above=0)
        for name in ("epochs", "batch_size", "accumulation", "max_prompt_length"):
            check_integer(name, getattr(self, name), at_least=1)
        if self.max_steps is not None:
            check_integer("max_steps", self.max_steps, at_least=1)
        check_integer("max_length", self.max_length, at_least=self.max_prompt_length + 1)
        check_integer("random_state", self.random_state, at_least=0)


class RPOTrainer:
    """Train a causal LM on preference pairs with the RPO loss, on one device, in place.

    Dropout stays off, as is usual for losses of log-ratios: policy and reference must be scored by the same function.
    For several devices use `RPOLoss` in the loop of your choice.

    Parameters
    ----------
    model : a transformers causal LM, or a peft model around one; trained in place, on the device it is on. Only
        parameters that require gradients change.
    ref_model : the frozen reference; None for a peft model, whose reference is itself with the adapters off.
    train_dataset : rows with prompt, chosen and rejected (text or conversations, see `tokenize_preferences`), or
        `TokenPair`.
    tokenizer : of the model; may be None when the data are tokenised.
    args : an `RPOConfig`; its defaults when None.
    optimizer : over the model's trainable parameters; AdamW when None. Its learning rate follows the schedule.

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

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        train_dataset: Iterable[Mapping[str, Any]] | Sequence[TokenPair],
        tokenizer: Any = None,
        args: RPOConfig | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.args = RPOConfig() if args is None else args
        self.model, self.ref_model = model, ref_model
        if ref_model is model:
            raise ValueError("ref_model must be a frozen copy, got the model that is trained")
        with reference_of(model, ref_model):
            pass  # refuses a missing reference before the data are read
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._trainable:
            raise ValueError("model must have parameters that require gradients")
        self.pairs = as_token_pairs(
            train_dataset, tokenizer, max_length=self.args.max_length, max_prompt_length=self.args.max_prompt_length
        )
        self.loss = RPOLoss(self.args.beta, self.args.eta, self.args.sft, self.args.label_smoothing, reduction="sum")
        self.optimizer = optimizer or torch.optim.AdamW(
            self._trainable.values(), lr=self.args.learning_rate, weight_decay=self.args.weight_decay
        )
        self.history: list[dict[str, float]] = []
        self._pairs_per_step = self.args.batch_size * self.args.accumulation
        self._steps_per_epoch = math.ceil(len(self.pairs) / self._pairs_per_step)
        self.total_steps = self.args.max_steps or self.args.epochs * self._steps_per_epoch
        self._device = next(iter(self._trainable.values())).device
        self._reference = torch.full(
            (2, len(self.pairs)), torch.nan, dtype=torch.float64
        )  # chosen, rejected; NaN: not scored yet
        if self.args.gradient_checkpointing:
            # transformers 6 knows the first name alone, before 5 the second alone
            old: Any = getattr(model, "gradient_checkpointing_enable", None)
            enable: Any = getattr(model, "activation_checkpointing_enable", old)
            enable({"use_reentrant": False})
        if self.args.precompute_reference:
            self.precompute_reference()

    def train(
        self, steps: int | None = None, on_step: Callable[[dict[str, float]], None] | None = None
    ) -> list[dict[str, float]]:
        """Take the remaining optimizer steps, or the next `steps` of them, and return `history`.

        Parameters
        ----------
        steps : how many steps to take at most; all that remain when None.
        on_step : called with the newest entry of `history` after every step.

        Raises
        ------
        FloatingPointError : the gradient of a step is not finite; the model is as it was before that step.
        """
        remaining = self.total_steps - len(self.history)
        wanted = remaining if steps is None else min(remaining, check_integer("steps", steps, at_least=0))
        for _ in range(wanted):
            self.history.append(self._step(len(self.history)))
            if on_step is not None:
                on_step(self.history[-1])
        return self.history

    def precompute_reference(self) -> None:
        """Score every pair under the reference now, and let go of `ref_model`."""
        for start in range(0, len(self.pairs), self.args.batch_size):
            rows = list(range(start, min(start + self.args.batch_size, len(self.pairs))))
            self._reference_logprobs(rows, self._batch(rows))
        self.ref_model = None

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on later exactly as if the run had not been interrupted."""
        return {
            "parameters": {name: parameter.detach().clone() for name, parameter in self._trainable.items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "reference": self._reference.clone(),
            "history": [dict(row) for row in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of a trainer with the same model, data and arguments.

        Raises
        ------
        ValueError : the state belongs to other parameters or to another number of pairs.
        """
        if state["parameters"].keys() != self._trainable.keys() or state["reference"].shape != self._reference.shape:
            raise ValueError("state must come from a trainer with the same trainable parameters and the same data")
        with torch.no_grad():
            for name, parameter in self._trainable.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self._reference = state["reference"].clone()
        self.history = [dict(row) for row in state["history"]]

    def _step(self, step: int) -> dict[str, float]:
        rows = self._rows_of(step)
        rate = self.args.learning_rate * self._schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.eval()  # no dropout
        if self.args.gradient_checkpointing:
            self._let_layers_checkpoint()
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, float] = {}
        for start in range(0, len(rows), self.args.batch_size):
            for name, value in self._accumulate(rows[start : start + self.args.batch_size], len(rows)).items():
                totals[name] = totals.get(name, 0.0) + value / len(rows)
        if step == 0:
            self._warn_when_swamped(totals)
        norm = float(nn.utils.clip_grad_norm_(self._trainable.values(), self.args.max_grad_norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(f"step {step + 1}: the gradient is not finite: is learning_rate too large?")
        self.optimizer.step()
        return {"step": step + 1, **totals, "gradient_norm": norm, "learning_rate": rate}

    def _accumulate(self, rows: list[int], pairs_in_step: int) -> dict[str, float]:
        """Add the gradient of some pairs' share of the mean loss; return the sums over these pairs."""
        batch = self._batch(rows)
        reference = self._reference_logprobs(rows, batch)
        with self._autocast():
            chosen, rejected = pair_logprobs(self.model, batch)
        out = self.loss(chosen, rejected, *reference.to(chosen), chosen_lengths=batch.chosen_lengths)
        (out.loss / pairs_in_step).backward()
        sums = {
            "loss": out.loss,
            "dpo_loss": out.dpo_loss,
            "sft_loss": out.sft_loss,
            "chosen_logprob": chosen,
            "rejected_logprob": rejected,
            "chosen_reward": out.chosen_rewards,
            "rejected_reward": out.rejected_rewards,
            "accuracy": out.accuracy,
            "margin": out.margin,
        }
        values = torch.stack([value.detach().sum() for value in sums.values()]).tolist()  # one transfer for all
        return dict(zip(sums, values, strict=True))

    def _reference_logprobs(self, rows: list[int], batch: PreferenceBatch) -> Float[Tensor, "2 pairs"]:
        if self._reference[:, rows].isnan().any():
            with reference_of(self.model, self.ref_model) as reference, self._autocast():
                self._reference[:, rows] = torch.stack(pair_logprobs(reference, batch)).to(self._reference)
        return self._reference[:, rows]

    def _rows_of(self, step: int) -> list[int]:
        """Pairs of a step: every epoch is a permutation, drawn from `random_state` and the epoch alone."""
        epoch, place = divmod(step, self._steps_per_epoch)
        order = np.random.default_rng([self.args.random_state, epoch]).permutation(len(self.pairs))
        start = place * self._pairs_per_step
        rows: list[int] = order[start : start + self._pairs_per_step].tolist()
        return rows

    def _batch(self, rows: list[int]) -> PreferenceBatch:
        return collate_preferences([self.pairs[row] for row in rows]).to(self._device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.args.bf16)

    def _schedule(self, step: int) -> float:
        """Share of the peak rate: a linear rise, then half a cosine, ending just above 0."""
        if self.args.warmup is None:
            return 1.0
        rise = math.ceil(self.args.warmup * self.total_steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, self.total_steps - rise)))

    def _let_layers_checkpoint(self) -> None:
        """Layers recompute only in training mode; their children, which hold the dropout, stay in evaluation mode."""
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True

    def _warn_when_swamped(self, first: Mapping[str, float]) -> None:
        supervised = self.loss.sft_weight * first["sft_loss"]
        if supervised > _SWAMPED * first["dpo_loss"]:
            warnings.warn(
                f"the supervised term ({supervised:.3g}) is more than {_SWAMPED:g} times the preference term "
                f"({first['dpo_loss']:.3g}) at the first step: eta={self.args.eta:g} is large for answers of this "
                f"length with sft={self.args.sft!r}",
                UserWarning,
                stacklevel=4,
            )
