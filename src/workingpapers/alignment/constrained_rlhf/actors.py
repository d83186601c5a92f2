"""What constrained PPO acts through: episodes from Gymnasium environments, from language models, or from your own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workingpapers.alignment.logprobs import frozen, token_logprobs
from workingpapers.alignment.sampling import sample_responses
from workingpapers.alignment.sequences import SequenceBatch

TextReward = Callable[[Sequence[Any], Sequence[Any]], Sequence[float]]


@dataclass(frozen=True)
class Episodes:
    """Episodes of one policy, padded to one length.

    Attributes
    ----------
    data : whatever `Actor.evaluate` needs to score them again.
    mask : True on steps that were taken; at least one in each row.
    logprobs, ref_logprobs : of the actions under the policy that took them and under the reference, 0 elsewhere.
    rewards : of every step, for each of the N rewards.
    """

    data: Any
    mask: Bool[Tensor, "episodes steps"]
    logprobs: Float[Tensor, "episodes steps"]
    ref_logprobs: Float[Tensor, "episodes steps"]
    rewards: Float[Tensor, "episodes steps rewards"]

    @property
    def returns(self) -> Float[Tensor, "episodes rewards"]:
        """Undiscounted return of each episode for each reward."""
        return (self.rewards * self.mask[..., None]).sum(1)


class Actor(Protocol):
    """A policy with its value functions, and where it acts."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """What is trained: policy and value functions."""

    def rollout(self, episodes: int, generator: torch.Generator) -> Episodes:
        """Act for some episodes, without gradients."""

    def evaluate(
        self, episodes: Episodes, rows: Tensor
    ) -> tuple[Float[Tensor, "rows steps"], Float[Tensor, "rows steps streams"]]:
        """Log-probabilities of the actions of some episodes and values of the states before them, with gradients."""


class GymActor:
    """Act in a Gymnasium environment whose steps return ``info["rewards"]``, a vector.

    Parameters
    ----------
    policy : maps observations (B, ...) to a `torch.distributions.Distribution` over actions; joint log-probabilities
        are summed over the last dimension where the action has one.
    value : maps observations (B, ...) to (B, N + 1) values.
    make_env : makes one environment; its episodes end by themselves.
    seed : of the environment's resets.
    """

    def __init__(self, policy: nn.Module, value: nn.Module, make_env: Callable[[], Any], *, seed: int = 0) -> None:
        self.policy, self.value = policy, value
        self.reference = copy.deepcopy(policy).requires_grad_(False)
        self.env = make_env()
        self._seed: int | None = seed

    def parameters(self) -> Iterable[nn.Parameter]:
        return [*self.policy.parameters(), *self.value.parameters()]

    @torch.no_grad()
    def rollout(self, episodes: int, generator: torch.Generator) -> Episodes:
        observations: list[Tensor] = []
        actions: list[Tensor] = []
        rewards: list[Tensor] = []
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))  # distributions take no generator
            for _ in range(episodes):
                for found, row in zip((observations, actions, rewards), self._episode(), strict=True):
                    found.append(torch.stack(row))
        lengths = torch.tensor([len(row) for row in actions])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        padded = [nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (observations, actions, rewards)]
        data = (padded[0], padded[1])
        scored = [self._logprobs(policy, *data) * mask for policy in (self.policy, self.reference)]
        return Episodes(data, mask, scored[0], scored[1], padded[2].to(scored[0]))

    def _episode(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Observations, actions and rewards until the environment ends."""
        rows: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        seen, done = self.env.reset(seed=self._seed)[0], False
        self._seed = None
        while not done:
            observation = torch.as_tensor(np.asarray(seen), dtype=torch.get_default_dtype())
            action = self.policy(observation[None]).sample()[0]
            seen, _, terminated, truncated, info = self.env.step(action.numpy())
            if "rewards" not in info:
                raise ValueError('the environment must return info["rewards"], a vector of rewards')
            for row, entry in zip(rows, (observation, action, torch.as_tensor(info["rewards"])), strict=True):
                row.append(entry)
            done = bool(terminated or truncated)
        return rows

    def evaluate(self, episodes: Episodes, rows: Tensor) -> tuple[Tensor, Tensor]:
        observations, actions = (part[rows] for part in episodes.data)
        values: Tensor = self.value(observations.flatten(0, 1))
        return self._logprobs(self.policy, observations, actions), values.reshape(*observations.shape[:2], -1)

    @staticmethod
    def _logprobs(policy: nn.Module, observations: Tensor, actions: Tensor) -> Tensor:
        found: Tensor = policy(observations.flatten(0, 1)).log_prob(actions.flatten(0, 1))
        found = found.reshape(len(found), -1).sum(1)
        return found.reshape(observations.shape[:2])


class LanguageActor:
    """Act as a causal language model that answers prompts; rewards judge whole answers.

    Parameters
    ----------
    policy : a transformers causal LM, or a peft model around one.
    value : called with input_ids and attention_mask, returns (B, L, N + 1) values of the prefixes before each token,
        for example `ValueHeads`.
    prompts : token ids of each prompt.
    rewards : N functions of (prompts, answers), both lists of token ids, or of texts where a tokenizer is given, that
        return one score for each answer; it is paid at the answer's last token.
    max_new_tokens, eos_token_id, temperature, top_k : of `sample_responses`.
    tokenizer : decodes prompts and answers for the rewards.
    reference : the frozen policy from which divergence is measured; a copy of the policy when None.
    """

    def __init__(
        self,
        policy: nn.Module,
        value: nn.Module,
        prompts: Sequence[Sequence[int]],
        rewards: Sequence[TextReward],
        *,
        max_new_tokens: int,
        eos_token_id: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        tokenizer: Any = None,
        reference: nn.Module | None = None,
    ) -> None:
        if not len(prompts) or not len(rewards):
            raise ValueError("there must be at least one prompt and one reward")
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.policy, self.value, self.prompts, self.rewards = policy, value, list(prompts), list(rewards)
        self.reference = copy.deepcopy(policy).requires_grad_(False) if reference is None else reference
        self.tokenizer = tokenizer
        self._sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": eos_token_id,
            "temperature": temperature,
            "top_k": top_k,
        }

    def parameters(self) -> Iterable[nn.Parameter]:
        policy = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        known = {id(parameter) for parameter in policy}  # the value functions may share layers with the policy
        return [*policy, *(p for p in self.value.parameters() if p.requires_grad and id(p) not in known)]

    @torch.no_grad()
    def rollout(self, episodes: int, generator: torch.Generator) -> Episodes:
        chosen = torch.randint(len(self.prompts), (episodes,), generator=generator).tolist()
        batch = sample_responses(
            self.policy, [self.prompts[row] for row in chosen], generator=generator, **self._sampling
        )
        assert batch.logprobs is not None
        with frozen(self.reference) as reference:
            scored = token_logprobs(reference, batch.input_ids, batch.attention_mask, batch.response_mask)
        answers: list[Any] = batch.responses()
        asked: list[Any] = batch.prompts()
        if self.tokenizer is not None:
            answers = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
            asked = self.tokenizer.batch_decode(asked, skip_special_tokens=True)
        mask = batch.response_mask
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        rewards = batch.logprobs.new_zeros(*mask.shape, len(self.rewards))
        for place, reward in enumerate(self.rewards):
            scores = torch.as_tensor(reward(asked, answers)).to(rewards)
            if scores.shape != (episodes,) or not scores.isfinite().all():
                raise ValueError(f"reward {place} must return {episodes} finite scores, got {scores.tolist()}")
            rewards[torch.arange(episodes), last, place] = scores
        return Episodes(batch, mask, batch.logprobs, scored, rewards)

    def evaluate(self, episodes: Episodes, rows: Tensor) -> tuple[Tensor, Tensor]:
        batch: SequenceBatch = episodes.data
        ids, attention, response = batch.input_ids[rows], batch.attention_mask[rows], batch.response_mask[rows]
        return token_logprobs(self.policy, ids, attention, response), self.value(ids, attention)


class ValueHeads(nn.Module):
    """Values of every prefix for several rewards, from the hidden states of a transformers base model.

    Parameters
    ----------
    backbone : ``AutoModel`` or the ``base_model`` of a causal LM; part of this module, not a copy. Where it is shared
        with the policy, the value loss trains both.
    streams : number of rewards, the divergence included.
    """

    def __init__(self, backbone: nn.Module, streams: int) -> None:
        super().__init__()
        self.backbone = backbone
        config: Any = backbone.config
        weight = next(backbone.parameters())
        self.head = nn.Linear(int(config.get_text_config().hidden_size), streams).to(weight.device, weight.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Float[Tensor, "batch length streams"]:
        """Entry t belongs to the tokens before token t; entry 0 is 0."""
        positions = (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)
        states = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions
        ).last_hidden_state
        before = self.head(states[:, :-1])
        return torch.cat([before.new_zeros(len(before), 1, before.shape[-1]), before], 1).float()
