"""The two stages of FSPO: supervised fine-tuning in the few-shot format, then preferences in the same format."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from workingpapers.alignment.fewshot_preference.episodes import Episode, EpisodeSampler
from workingpapers.alignment.fewshot_preference.losses import FSPOLoss
from workingpapers.alignment.fewshot_preference.rewarder import PersonalRewarder
from workingpapers.alignment.fewshot_preference.template import EpisodeTemplate
from workingpapers.alignment.logprobs import sequence_logprobs
from workingpapers.alignment.preference_training import PreferenceConfig, PreferenceTrainer
from workingpapers.alignment.sequences import TokenSequence, collate_sequences
from workingpapers.alignment.training import Trainer
from workingpapers.common.validation import check_choice

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class FSPOConfig(PreferenceConfig):
    """How the two stages train; items are episodes, and the defaults are the authors' for the second stage.

    Attributes
    ----------
    learning_rate, warmup, weight_decay, max_grad_norm, epochs, max_steps, batch_size, accumulation, bf16,
    gradient_checkpointing, random_state, precompute_reference : of `PreferenceConfig`. The authors warm up for 150
        steps and use RMSprop (pass it as `optimizer`); their first stage has a learning rate of 1e-7.
    max_length : tokens of an episode; where it has more, its oldest shots are dropped.
    max_prompt_length : not used: a prompt is never cut inside a shot.
    """

    learning_rate: float = 1e-6
    max_grad_norm: float = 10.0
    batch_size: int = 4
    max_length: int = 8192
    max_prompt_length: int = 1


class PrefFTTrainer(Trainer):
    """Stage one: fine-tune on the responses to the query, given the shots. The result is stage two's reference.

    The loss is the negative log-likelihood summed over the tokens of a response, averaged over the batch.

    Parameters
    ----------
    model : a transformers causal LM, or a peft model around one; trained in place.
    tokenizer : of the model; whatever the template needs.
    sampler : an `EpisodeSampler`, whose epochs follow each other, each in windows of its own; or episodes, the same
        in every epoch. One with replacement needs ``args.max_steps``.
    template : how an episode becomes tokens.
    args : an `FSPOConfig`; the defaults with learning rate 1e-7 when None.
    sft_on : "chosen" trains on the preferred responses; "both" on the others too, as the authors' code does.
    optimizer, accelerator : of `Trainer`.

    Attributes
    ----------
    history : one dict per optimizer step: step, loss, gradient_norm, learning_rate.
    total_steps : optimizer steps of the whole run.

    Raises
    ------
    ValueError : an episode does not fit, there are none, or nothing is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        sampler: EpisodeSampler | Iterable[Episode],
        template: EpisodeTemplate,
        args: FSPOConfig | None = None,
        *,
        sft_on: Literal["chosen", "both"] = "chosen",
        optimizer: torch.optim.Optimizer | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        check_choice("sft_on", sft_on, ("chosen", "both"))
        args = FSPOConfig(learning_rate=1e-7) if args is None else args
        episodes, args = _of_the_run(sampler, args)
        self._sequences: list[TokenSequence] = []
        for episode in episodes:
            pair = template.fit(episode.shots, episode.query, tokenizer, args.max_length)
            self._sequences.append(TokenSequence(pair.prompt, pair.chosen))
            if sft_on == "both":
                self._sequences.append(TokenSequence(pair.prompt, pair.rejected))
        super().__init__(model, len(self._sequences), args, optimizer=optimizer, accelerator=accelerator)

    def reference(self) -> nn.Module:
        """A frozen copy of the model as it is now, for `FSPOTrainer`."""
        return copy.deepcopy(self.model).eval().requires_grad_(False)

    def _accumulate(self, rows: list[int], total: int) -> dict[str, Tensor]:
        batch = collate_sequences([self._sequences[row] for row in rows]).to(self._device)
        with self._autocast():
            logprobs = sequence_logprobs(self.model, batch.input_ids, batch.attention_mask, batch.response_mask)
        losses = -logprobs  # -log pi_theta(y | x, shots)
        torch.autograd.backward(losses.sum() / total)
        return {"loss": losses}


class FSPOTrainer(PreferenceTrainer):
    """Stage two: learn what users prefer from their shots, over many users.

    Minimises ``E_u E_(query, shots of u) [L_pref(query | shots)]``: the user is the task of a meta-learner that adapts
    in its context. Policy and reference see the same shots, and only the query's responses carry loss.

    Parameters
    ----------
    model : a transformers causal LM, or a peft model around one; trained in place.
    ref_model : the model after stage one, frozen (`PrefFTTrainer.reference`); None for a peft model whose adapters
        belong to this stage alone, which is its own reference with the adapters off.
    tokenizer : of the model; whatever the template needs.
    sampler : an `EpisodeSampler`, whose epochs follow each other, each in windows of its own; or episodes, the same
        in every epoch. One with replacement needs ``args.max_steps``.
    template : how an episode becomes tokens.
    args : an `FSPOConfig`; its defaults when None.
    loss : an `FSPOLoss`; IPO with beta 0.01 when None. Its reduction is not used.
    optimizer, accelerator : of `Trainer`.

    Attributes
    ----------
    history : one dict per optimizer step: step, loss, margin (nats), chosen_reward, rejected_reward, accuracy,
        chosen_logprob, rejected_logprob (nats per answer), gradient_norm, learning_rate.
    total_steps : optimizer steps of the whole run.
    pairs : the episodes of the run as `TokenPair`.

    Raises
    ------
    ValueError : an episode does not fit, there are none, the reference is missing, or nothing is trainable.

    Warns
    -----
    UserWarning : at the end of training, the margin is under half of what IPO aims at.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        tokenizer: Any,
        sampler: EpisodeSampler | Iterable[Episode],
        template: EpisodeTemplate,
        args: FSPOConfig | None = None,
        *,
        loss: FSPOLoss | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        args = FSPOConfig() if args is None else args
        loss = FSPOLoss() if loss is None else loss
        episodes, args = _of_the_run(sampler, args)
        pairs = [
            template.fit(episode.shots, episode.query, tokenizer, args.max_length)._replace(user=episode.user)
            for episode in episodes
        ]
        self.tokenizer, self.template = tokenizer, template
        self.fspo_loss = FSPOLoss(loss.kind, loss.beta, loss.label_smoothing, reduction="sum")
        super().__init__(
            model,
            ref_model,
            pairs,
            tokenizer,
            args,
            loss=self.fspo_loss,
            optimizer=optimizer,
            accelerator=accelerator,
        )

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
        before = len(self.history)
        super().train(steps, on_step)
        target = self.fspo_loss.target_margin
        if before < len(self.history) == self.total_steps and target is not None:
            reached = float(np.mean([row["margin"] for row in self.history[-max(1, self.total_steps // 10) :]]))
            if reached < target / 2:
                warnings.warn(
                    f"the margin ended at {reached:.3g} nats, under half of the 1 / (2 beta) = {target:.3g} that IPO "
                    "aims at: train longer or faster, or raise beta to what responses of this length can reach",
                    stacklevel=2,
                )
        return self.history

    def rewarder(self, ref_model: nn.Module | None = None) -> PersonalRewarder:
        """The model as a reward function and policy for new users.

        Parameters
        ----------
        ref_model : the reference, where ``precompute_reference`` has let go of it.
        """
        return PersonalRewarder(
            self.model,
            self.ref_model if ref_model is None else ref_model,
            self.tokenizer,
            self.template,
            beta=self.fspo_loss.beta,
            max_length=self.args.max_length,
            batch_size=self.args.batch_size,
        )


def _of_the_run(sampler: EpisodeSampler | Iterable[Episode], args: FSPOConfig) -> tuple[list[Episode], FSPOConfig]:
    """All episodes of a run, and arguments under which they are one epoch."""
    if not isinstance(sampler, EpisodeSampler):
        return list(sampler), args
    items = args.batch_size * args.accumulation
    if sampler.replacement:
        if args.max_steps is None:
            raise ValueError("args.max_steps must be given when sampler draws with replacement: it never ends")
        return list(itertools.islice(sampler, args.max_steps * items)), args
    epochs = args.epochs if args.max_steps is None else -(-args.max_steps * items // len(sampler))
    episodes = [episode for number in range(epochs) for episode in sampler.epoch(number)]
    return episodes, replace(args, epochs=1)
