"""Training a causal LM on its own answers, by proximal policy optimisation or REINFORCE with any reward.

A step is one rollout: answers to some prompts, their rewards token by token, their advantages, and then a few passes of
clipped updates over them. Policy and critic are two networks with two optimizers. Where a reward can be checked and
answers are short, methods that need no critic (REINFORCE here, with the mean of the batch as baseline) lose little;
where a fixed set of pairs is all there is, a preference loss costs far less.

References: Schulman et al., "Proximal Policy Optimization Algorithms", 2017; Ziegler et al., "Fine-Tuning Language
Models from Human Preferences", 2019 (rewards of tokens, adaptive price of the divergence); Hu, "REINFORCE++", 2025
(whitened rewards-to-go in place of a critic).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.alignment.logprobs import frozen, reference_of, token_logprobs
from workingpapers.alignment.ppo import (
    Average,
    clipped_policy_losses,
    clipped_value_losses,
    gae,
    kl_shaped_rewards,
    whiten,
)
from workingpapers.alignment.prompts import tokenize_prompts
from workingpapers.alignment.reward_head import RewardModel
from workingpapers.alignment.sampling import sample_responses
from workingpapers.alignment.sequences import SequenceBatch, collate_sequences
from workingpapers.alignment.training import Trainer, TrainingConfig
from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number

if TYPE_CHECKING:
    from accelerate import Accelerator

Reward = nn.Module | Callable[[SequenceBatch], Any]


@dataclass(frozen=True)
class PPOConfig(TrainingConfig):
    """How a `PPOTrainer` trains. A step is one rollout with all its updates; the defaults are those of RTO's code.

    Attributes
    ----------
    learning_rate, warmup, weight_decay, max_grad_norm, bf16, gradient_checkpointing, random_state : of
        `TrainingConfig`, for policy and critic alike except `learning_rate`, which is the policy's.
    epochs : passes over the prompts.
    max_steps : stop after this many rollouts instead of `epochs`.
    batch_size : answers in one forward pass.
    accumulation : forward passes per update; together they are one mini-batch.
    algorithm : "ppo" estimates advantages with a critic, "reinforce" takes rewards-to-go and needs none.
    rollout_size : prompts of one rollout.
    samples_per_prompt : answers to each of them.
    rollout_epochs : passes of updates over a rollout.
    max_new_tokens, temperature, top_k, top_p, eos_token_id : of `sample_responses`; the tokenizer's end token when
        None. The behaviour policy is taken to be the one at temperature 1 without filters, so anything else makes
        every update slightly off-policy.
    sampling_batch_size : answers drawn at a time; all when None.
    max_prompt_length : in tokens; the beginning of a longer prompt is dropped.
    beta : price of a nat of divergence from the reference, at least 0.
    target_kl : in nats per answer. With one, `beta` is only the first price: after each rollout it is multiplied by
        1 + kl_rate * clip(kl / target_kl - 1, -0.2, 0.2).
    kl_rate : at least 0.
    gamma, lam : of `gae`; "reinforce" uses lam = 1.
    clip, value_clip : of `ppo_losses`.
    value_learning_rate : peak of the critic's schedule, above 0.
    whiten_advantages : to mean 0 and variance 1 over the tokens of the rollout.
    average : of losses within a mini-batch, see `ppo_losses`.
    """

    algorithm: Literal["ppo", "reinforce"] = "ppo"
    rollout_size: int = 64
    samples_per_prompt: int = 1
    rollout_epochs: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    sampling_batch_size: int | None = None
    max_prompt_length: int = 512
    beta: float = 0.01
    target_kl: float | None = None
    kl_rate: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float | None = 0.2
    value_learning_rate: float = 9e-6
    whiten_advantages: bool = True
    average: Average = "sequences"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algorithm", self.algorithm, ("ppo", "reinforce"))
        check_choice("average", self.average, ("tokens", "sequences"))
        for name in ("rollout_size", "samples_per_prompt", "rollout_epochs", "max_new_tokens", "max_prompt_length"):
            check_integer(name, getattr(self, name), at_least=1)
        for name in ("top_k", "sampling_batch_size"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), at_least=1)
        check_number("temperature", self.temperature, at_least=0)
        if self.top_p is not None:
            check_number("top_p", self.top_p, above=0, at_most=1)
        for name in ("beta", "kl_rate"):
            check_number(name, getattr(self, name), at_least=0)
        for name in ("gamma", "lam"):
            check_number(name, getattr(self, name), at_least=0, at_most=1)
        for name in ("clip", "value_learning_rate"):
            check_number(name, getattr(self, name), above=0)
        for name in ("value_clip", "target_kl"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)


@dataclass(frozen=True)
class Rollout:
    """Answers of the policy, scored.

    Attributes
    ----------
    batch : prompts and answers; `logprobs` are those of the policy that drew them.
    ref_logprobs : of the same tokens under the reference, in nats, 0 elsewhere.
    scores : of whole answers; a last axis where there are several.
    """

    batch: SequenceBatch
    ref_logprobs: Float[Tensor, "answers length"]
    scores: Float[Tensor, "answers ..."]

    @property
    def logprobs(self) -> Float[Tensor, "answers length"]:
        """Of the tokens under the policy that drew them, in nats, 0 elsewhere."""
        assert self.batch.logprobs is not None
        return self.batch.logprobs


@dataclass(frozen=True)
class Experience:
    """A rollout with what its updates are made from.

    Attributes
    ----------
    rollout : the answers.
    rewards, values, returns : token by token, a first axis for the streams of reward.
    advantages : of the tokens.
    """

    rollout: Rollout
    rewards: Float[Tensor, "streams answers length"]
    values: Float[Tensor, "streams answers length"]
    advantages: Float[Tensor, "answers length"]
    returns: Float[Tensor, "streams answers length"]


class PPOTrainer(Trainer):
    """Train a causal LM in place on the rewards of its own answers.

    A subclass changes what is rewarded (`_rewards`, in one stream or several with a value each) or how streams become
    one advantage (`_advantages`, or `_update` before each mini-batch), and keeps the loop.

    Parameters
    ----------
    model : a transformers causal LM, or a peft model around one; trained in place, on the device it is on.
    ref_model : the frozen reference; None for a peft model, whose reference is itself with the adapters off.
    prompts : see `tokenize_prompts`.
    tokenizer : of the model; may be None when prompts are token ids.
    args : a `PPOConfig`; its defaults when None.
    reward : scores whole answers: a module such as `RewardModel`, called with input ids and attention mask, or any
        function of a `SequenceBatch`. Returns one number per answer.
    critic : a `RewardModel`, or any module whose ``token_values(input_ids, attention_mask)`` gives (answers, length),
        or (streams, answers, length) where rewards come in streams; trained in place. When None, "ppo" starts from a
        copy of `reward`, which must then be a `RewardModel`.
    optimizer, value_optimizer : over the trainable parameters of model and critic; AdamW when None. Their learning
        rates follow the schedule.
    accelerator : for several processes, see `Trainer`: each draws and scores its share of the answers.

    Attributes
    ----------
    history : one dict per rollout: step (from 1); of its answers reward, kl (nats per answer, from the reference),
        entropy (nats per token, estimated from the tokens drawn), length (tokens), finished (share that ended by
        itself), return (sum of the rewards of tokens); of its updates, averaged, policy_loss, clip_fraction, approx_kl
        (from the policy that drew), value_loss, gradient_norm and value_gradient_norm (before clipping); beta,
        learning_rate.
    total_steps : rollouts of the whole run.
    critic : the value network; None for "reinforce".
    beta : price of a nat of divergence, in force.
    latest : the `Rollout` of the last step, None before the first.

    Raises
    ------
    ValueError : prompts do not fit, reference or critic is missing, or is part of the model, or nothing is trainable.

    Examples
    --------
    >>> trainer = PPOTrainer(model, reference, prompts, tokenizer, PPOConfig(), reward=scorer)  # doctest: +SKIP
    >>> trainer.train(on_step=lambda row: print(row["step"], row["reward"], row["kl"]))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        prompts: Iterable[Any],
        tokenizer: Any = None,
        args: PPOConfig | None = None,
        *,
        reward: Reward,
        critic: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        value_optimizer: torch.optim.Optimizer | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        args = PPOConfig() if args is None else args
        if ref_model is model:
            raise ValueError("ref_model must be a frozen copy, got the model that is trained")
        with reference_of(model, ref_model):
            pass  # refuses a missing reference before anything is drawn
        if not callable(reward):
            raise TypeError(f"reward must be a module or a function of a SequenceBatch, got {reward!r}")
        self.ref_model = ref_model
        self.reward = reward
        self.prompts = tokenize_prompts(prompts, tokenizer, max_prompt_length=args.max_prompt_length)
        super().__init__(model, len(self.prompts), args, optimizer=optimizer, accelerator=accelerator)
        self._items_per_step = args.rollout_size  # the items of a step are prompts
        self._steps_per_epoch = math.ceil(self._count / self._items_per_step)
        self.total_steps = args.max_steps or args.epochs * self._steps_per_epoch
        self.critic: Any = self._usable_critic(critic) if args.algorithm == "ppo" else None
        self._critic_trainer = None
        if self.critic is not None:
            self._critic_trainer = _CriticTrainer(
                self.critic,
                replace(args, learning_rate=args.value_learning_rate, max_steps=self.total_steps),
                self._value_losses,
                value_optimizer,
                accelerator,
            )
        self.beta = args.beta
        self.latest: Rollout | None = None
        self._ends = args.eos_token_id if args.eos_token_id is not None else getattr(tokenizer, "eos_token_id", None)
        self._experience: Experience
        self._mean_length = 1.0

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on later exactly as if the run had not been interrupted.

        The numbers that draw a rollout follow from `random_state` and the rollout's own, so no generator has a state.
        """
        critic = None if self._critic_trainer is None else self._critic_trainer.state_dict()
        return super().state_dict() | {"critic": critic, "beta": self.beta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of a trainer with the same networks, prompts and arguments.

        Raises
        ------
        ValueError : the state belongs to other parameters.
        """
        if (state["critic"] is None) != (self._critic_trainer is None):
            raise ValueError("state must come from a trainer with the same algorithm")
        super().load_state_dict(state)
        if self._critic_trainer is not None:
            self._critic_trainer.load_state_dict(state["critic"])
        self.beta = state["beta"]

    # ------------------------------------------------------------------------------------- what subclasses may change

    def _scores(self, batch: SequenceBatch) -> Float[Tensor, "answers ..."]:
        """Scores of whole answers by `reward`."""
        return score_answers(self.reward, batch, self.args.batch_size)

    def _rewards(self, rollout: Rollout) -> Float[Tensor, "*streams answers length"]:
        """Rewards of tokens, in one stream or several."""
        batch = rollout.batch
        return kl_shaped_rewards(
            rollout.scores, rollout.logprobs, rollout.ref_logprobs, batch.response_mask, beta=self.beta
        )

    def _advantages(
        self,
        rewards: Float[Tensor, "streams answers length"],
        values: Float[Tensor, "streams answers length"],
        mask: Tensor,
    ) -> tuple[Float[Tensor, "answers length"], Float[Tensor, "streams answers length"]]:
        """Advantages of tokens, and the returns that values are fitted to; advantages of streams are added."""
        lam = self.args.lam if self.args.algorithm == "ppo" else 1.0
        streams = [
            gae(reward, value, mask, gamma=self.args.gamma, lam=lam)
            for reward, value in zip(rewards, values, strict=True)
        ]
        advantages, returns = (torch.stack(parts) for parts in zip(*streams, strict=True))
        total = advantages.sum(0)
        return whiten(total, mask) if self.args.whiten_advantages else total, returns

    def _report(self, experience: Experience) -> dict[str, Float[Tensor, " answers"]]:
        """What `history` says about a rollout; one entry per answer, logged as means."""
        rollout = experience.rollout
        lengths = rollout.batch.lengths
        assert rollout.batch.finished is not None
        return {
            "reward": rollout.scores,
            "kl": (rollout.logprobs - rollout.ref_logprobs).sum(1),
            "entropy": -rollout.logprobs.sum(1) / lengths,
            "length": lengths,
            "finished": rollout.batch.finished,
            "return": experience.rewards.sum((0, 2)),
        }

    def _update(self, rows: list[int], step: int) -> dict[str, float]:
        """One optimizer step of policy and critic on some answers of the rollout."""
        self._mean_length = float(self._experience.rollout.batch.lengths[rows].double().mean())
        found = self._optimize(rows, step)
        if self._critic_trainer is not None:
            value = self._critic_trainer._optimize(rows, step)
            found |= {"value_loss": value["value_loss"], "value_gradient_norm": value["gradient_norm"]}
        return found

    # --------------------------------------------------------------------------------------------------- one rollout

    def _step(self, step: int) -> dict[str, float]:
        self._experience = self._collect(step)
        self.latest = self._experience.rollout
        row = {name: float(of.double().mean()) for name, of in self._report(self._experience).items()}
        row["beta"] = self.beta
        answers, at_once = len(self.latest.batch), self.args.batch_size * self.args.accumulation
        updates = []
        for epoch in range(self.args.rollout_epochs):
            order = np.random.default_rng([self.args.random_state, step, epoch]).permutation(answers).tolist()
            updates += [self._update(order[start : start + at_once], step) for start in range(0, answers, at_once)]
        row |= {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}
        if self.args.target_kl is not None:
            excess = min(max(row["kl"] / self.args.target_kl - 1.0, -0.2), 0.2)
            self.beta *= 1.0 + self.args.kl_rate * excess
        return {"step": step + 1, **row}

    def _collect(self, step: int) -> Experience:
        """Answers to the prompts of a step, with their rewards, values and advantages."""
        rows = self._rows_of(step)
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([self.args.random_state, step]).generate_state(1)[0])
        )
        processes, rank = 1, 0
        if self.accelerator is not None:
            processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        first, last = (len(rows) * share // processes for share in (rank, rank + 1))
        # what the processes before this one draw: answers are those of one process
        torch.rand(
            first * self.args.samples_per_prompt, self.args.max_new_tokens, dtype=torch.float64, generator=generator
        )
        scored = self._scored(rows[first:last], generator) if first < last else None
        rollout, rewards, values = scored if processes == 1 and scored is not None else _gathered(scored, self._device)
        if rewards.shape != values.shape:
            raise ValueError(f"rewards and values must come in as many streams, got {len(rewards)} and {len(values)}")
        advantages, returns = self._advantages(rewards, values, rollout.batch.response_mask)
        return Experience(rollout, rewards, values, advantages, returns)

    def _scored(self, rows: list[int], generator: torch.Generator) -> tuple[Rollout, Tensor, Tensor]:
        """Answers to some prompts, rewards and values (streams, answers, length)."""
        args = self.args
        with self._autocast():
            batch = sample_responses(
                self.model,
                [self.prompts[row] for row in rows],
                n=args.samples_per_prompt,
                max_new_tokens=args.max_new_tokens,
                eos_token_id=self._ends,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                batch_size=args.sampling_batch_size,
                generator=generator,
            )
        with reference_of(self.model, self.ref_model) as reference, self._autocast():
            ref_logprobs = in_parts(
                batch,
                args.batch_size,
                lambda part: token_logprobs(reference, part.input_ids, part.attention_mask, part.response_mask),
            )
        rollout = Rollout(batch, ref_logprobs.to(batch.logprobs), self._scores(batch).to(self._device))
        rewards = _in_streams(self._rewards(rollout).detach())
        if self.critic is None:
            return rollout, rewards, torch.zeros_like(rewards)
        with frozen(self.critic):
            values = in_parts(batch, args.batch_size, self._token_values)
        return rollout, rewards, values.to(rewards)

    def _token_values(self, batch: SequenceBatch) -> Float[Tensor, "streams answers length"]:
        with self._autocast():
            values: Tensor = self.critic.token_values(batch.input_ids, batch.attention_mask)
        return _in_streams(values)

    # ----------------------------------------------------------------------------------------------------- one update

    def _accumulate(self, rows: list[int], total: int) -> dict[str, Tensor]:
        batch, used = self._part(rows)
        with self._autocast():
            logprobs = token_logprobs(self.model, batch.input_ids, batch.attention_mask, batch.response_mask)
        assert batch.logprobs is not None
        losses, cut_off, log_ratio = clipped_policy_losses(
            logprobs,
            old_logprobs=batch.logprobs.to(logprobs),
            advantages=self._experience.advantages[rows][:, used].to(logprobs),
            mask=batch.response_mask,
            clip=self.args.clip,
        )
        weights = self._weights(batch)
        per_answer = losses.sum(1) * weights
        torch.autograd.backward(per_answer.sum() / total)
        return {
            "policy_loss": per_answer,
            "clip_fraction": cut_off.sum(1) * weights,
            "approx_kl": 0.5 * (log_ratio.detach() ** 2).sum(1) * weights,
        }

    def _value_losses(self, rows: list[int]) -> Float[Tensor, " answers"]:
        """The critic's loss of some answers, over all streams."""
        batch, used = self._part(rows)
        values = self._token_values(batch)
        old, returns = (of[:, rows][..., used].to(values) for of in (self._experience.values, self._experience.returns))
        losses = torch.stack(
            [
                clipped_value_losses(
                    value, old_values=before, returns=aim, mask=batch.response_mask, value_clip=self.args.value_clip
                )
                for value, before, aim in zip(values, old, returns, strict=True)
            ]
        )
        return losses.sum((0, 2)) * self._weights(batch)

    def _part(self, rows: list[int]) -> tuple[SequenceBatch, Tensor]:
        """Some answers without the columns that are padding in all of them, and which columns are left."""
        batch = self._experience.rollout.batch
        return batch.select(rows), (batch.attention_mask[rows] != 0).any(0)

    def _weights(self, batch: SequenceBatch) -> Float[Tensor, " answers"]:
        """What the sum of an answer's losses is multiplied by, before the mean over the answers of the mini-batch."""
        if self.args.average == "sequences":
            return 1.0 / batch.lengths
        return torch.full((len(batch),), 1.0 / self._mean_length, device=batch.lengths.device)

    def _usable_critic(self, critic: nn.Module | None) -> nn.Module:
        if critic is None:
            if not isinstance(self.reward, RewardModel):
                raise ValueError('critic may be None only when reward is a RewardModel or algorithm is "reinforce"')
            critic = copy.deepcopy(self.reward).requires_grad_(True)
        if not callable(getattr(critic, "token_values", None)):
            raise TypeError(f"critic must have token_values, as RewardModel has, got a {type(critic).__name__}")
        trained = {id(parameter) for parameter in self._trainable.values()}
        if any(id(parameter) in trained for parameter in critic.parameters()):
            raise ValueError("critic must not share trainable parameters with model")
        return critic


class _CriticTrainer(Trainer):
    """The critic's side of an update: its own optimizer, schedule and clipping."""

    def __init__(
        self,
        critic: nn.Module,
        args: PPOConfig,
        losses: Callable[[list[int]], Tensor],
        optimizer: torch.optim.Optimizer | None,
        accelerator: Accelerator | None,
    ) -> None:
        super().__init__(
            critic, 1, replace(args, gradient_checkpointing=False), optimizer=optimizer, accelerator=accelerator
        )
        self._losses = losses
        if args.gradient_checkpointing:  # the switch belongs to the transformers model inside a RewardModel
            inside: Any = getattr(critic, "model", critic)
            inside.gradient_checkpointing_enable({"use_reentrant": False})
            self.args = args

    def _accumulate(self, rows: list[int], total: int) -> dict[str, Tensor]:
        losses = self._losses(rows)
        torch.autograd.backward(losses.sum() / total)
        return {"value_loss": losses}


def score_answers(reward: Reward, batch: SequenceBatch, batch_size: int) -> Float[Tensor, "answers ..."]:
    """Scores of answers by a module of input ids and attention mask, or by a function of the batch.

    Raises
    ------
    ValueError : there is not one score per answer, or one is not finite.
    """
    with torch.no_grad():
        if isinstance(reward, nn.Module):
            with frozen(reward):
                starts = range(0, len(batch), batch_size)
                pairs = (
                    (batch.input_ids[a : a + batch_size], batch.attention_mask[a : a + batch_size]) for a in starts
                )
                parts = [reward(ids, mask) for ids, mask in pairs]
            scores = torch.cat(parts)
        else:
            scores = torch.as_tensor(reward(batch))
    if scores.shape[:1] != (len(batch),):
        raise ValueError(f"reward must return one score for each of {len(batch)} answers, got {tuple(scores.shape)}")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    check_finite("reward's scores", scores)
    return scores


def in_parts(
    batch: SequenceBatch, batch_size: int, function: Callable[[SequenceBatch], Tensor]
) -> Float[Tensor, "*streams answers length"]:
    """A function of batches, with one entry per token, for a few answers at a time; 0 at padding left out."""
    parts = []
    for start in range(0, len(batch), batch_size):
        rows = list(range(start, min(start + batch_size, len(batch))))
        used = (batch.attention_mask[rows] != 0).any(0)
        found = function(batch.select(rows))
        whole = found.new_zeros(*found.shape[:-1], len(used))
        whole[..., used] = found
        parts.append(whole)
    return torch.cat(parts, dim=-2)


def _in_streams(of_tokens: Tensor) -> Float[Tensor, "streams answers length"]:
    return of_tokens if of_tokens.ndim == 3 else of_tokens[None]


def _gathered(scored: tuple[Rollout, Tensor, Tensor] | None, device: torch.device) -> tuple[Rollout, Tensor, Tensor]:
    """The answers of all processes, in the order of the prompts, in each of them."""
    from accelerate.utils import gather_object

    mine: list[Any] = []
    if scored is not None:
        rollout, rewards, values = scored
        batch = rollout.batch
        assert batch.finished is not None
        of_tokens = torch.cat([rollout.logprobs[None], rollout.ref_logprobs[None], rewards, values]).cpu()
        masks = batch.response_mask.cpu()
        mine = [
            (
                sequence,
                of_tokens[:, row, masks[row]],
                len(rewards),
                rollout.scores[row].cpu(),
                bool(batch.finished[row]),
            )
            for row, sequence in enumerate(batch.sequences())
        ]
    rows: list[Any] = gather_object(mine)
    sequences, tokens, streams, scores, finished = zip(*rows, strict=True)
    batch = collate_sequences(sequences).to(device)
    padded = tokens[0].new_zeros(len(tokens[0]), *batch.input_ids.shape).to(device)
    padded[:, batch.response_mask] = torch.cat(tokens, dim=1).to(device)
    logprobs, ref_logprobs = padded[:2]
    batch = replace(batch, logprobs=logprobs, finished=torch.tensor(finished, device=device))
    rollout = Rollout(batch, ref_logprobs, torch.stack(scores).to(device))
    return rollout, padded[2 : 2 + streams[0]], padded[2 + streams[0] :]
