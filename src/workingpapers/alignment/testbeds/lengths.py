"""Length tasks: a small language model whose answers have a known law of lengths, and rewards for some lengths.

What an answer says does not matter here, only how long it is, so that the distance between the reference's habits and
the best answers is one number that can be set. As in the paper there are three: the shortest answers are best and the
reference hardly writes any (min); the usual length is best (mode); the shortest are best, and the pairs that a reward
is learned from hold even fewer of them (skew).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workingpapers.alignment.logprobs import response_logits
from workingpapers.alignment.onpolicy_preference.policies import PADDING, CausalLMPolicy, as_sequences
from workingpapers.alignment.preferences import TokenPair, collate_preferences
from workingpapers.alignment.reward_head import RewardModel, bradley_terry_loss, pair_scores
from workingpapers.alignment.testbeds.tokens import small_gpt
from workingpapers.common.validation import check_choice, check_integer, check_number, require

END = 0  # the token that ends an answer


class LengthTask:
    """Answers of some length to prompts of two tokens. See `length_task`.

    Attributes
    ----------
    lengths : probabilities of the lengths 1 ... limit under the reference, end token included.
    data_lengths : the same under the policy that wrote the preference data.
    """

    def __init__(
        self,
        kind: Literal["min", "mode", "skew"],
        lengths: Float[Tensor, " limit"],
        data_lengths: Float[Tensor, " limit"],
        vocabulary: int,
    ) -> None:
        self.kind, self.lengths, self.data_lengths, self.vocabulary = kind, lengths, data_lengths, vocabulary

    @property
    def limit(self) -> int:
        """Tokens an answer may have."""
        return len(self.lengths)

    @property
    def best(self) -> float:
        """The best length: 1, or the mean of the reference."""
        places = torch.arange(1, self.limit + 1, dtype=self.lengths.dtype)
        return float((self.lengths * places).sum()) if self.kind == "mode" else 1.0

    def prompts(self, count: int, *, random_state: int = 0) -> list[list[int]]:
        """Two random tokens each."""
        generator = torch.Generator().manual_seed(check_integer("random_state", random_state, at_least=0))
        size = (check_integer("count", count, at_least=1), 2)
        drawn: list[list[int]] = torch.randint(1, self.vocabulary, size, generator=generator).tolist()
        return drawn

    def reward(self, prompts: Any, actions: Int[Tensor, "prompts answers tokens"]) -> Float[Tensor, "prompts answers"]:
        """The true reward: 1 - |length - best| / limit."""
        lengths = (actions != PADDING).sum(-1)
        return 1.0 - (lengths - self.best).abs() / self.limit

    def policy(self, *, steps: int = 200, random_state: int = 0) -> CausalLMPolicy:
        """A transformer of one layer, fitted to the reference's law of lengths.

        Parameters
        ----------
        steps : of Adam, at least 0.
        random_state : of the weights and of the fit.
        """
        return self._fitted(self.lengths, steps, random_state)

    def data_policy(self, *, steps: int = 200, random_state: int = 0) -> CausalLMPolicy:
        """The same, fitted to the lengths of the preference data."""
        return self._fitted(self.data_lengths, steps, random_state)

    def pairs(self, source: CausalLMPolicy, count: int, *, random_state: int = 0) -> list[TokenPair]:
        """Two answers of `source` to each prompt, the one with the larger reward chosen; ties are left out."""
        generator = torch.Generator().manual_seed(check_integer("random_state", random_state, at_least=0))
        prompts = self.prompts(count, random_state=random_state)
        actions = source.sample(prompts, 2, generator)
        rewards, answers = self.reward(prompts, actions), source.responses(actions)
        winners = (rewards[:, 1] > rewards[:, 0]).long().tolist()
        tied = (rewards[:, 1] == rewards[:, 0]).tolist()
        return [
            TokenPair(prompt, both[won], both[1 - won])
            for prompt, both, won, tie in zip(prompts, answers, winners, tied, strict=True)
            if not tie
        ]

    def reward_model(
        self, pairs: Sequence[TokenPair], *, steps: int = 100, batch_size: int = 32, random_state: int = 0
    ) -> RewardModel:
        """A reward fitted to the pairs, a transformer of one layer with a linear head, for `model_reward`.

        Parameters
        ----------
        pairs : from `pairs`.
        steps : of Adam on the Bradley-Terry loss, at least 0.
        batch_size : pairs in a step.
        random_state : of the weights and of the pairs' order.
        """
        check_integer("steps", steps, at_least=0)
        generator = torch.Generator().manual_seed(check_integer("random_state", random_state, at_least=0))
        model = RewardModel(self._network(random_state), generator=generator)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(steps):
            rows = torch.randint(len(pairs), (batch_size,), generator=generator).tolist()
            chosen, rejected = pair_scores(model, collate_preferences([pairs[row] for row in rows]))
            optimizer.zero_grad()
            torch.autograd.backward(bradley_terry_loss(chosen, rejected))
            optimizer.step()
        return model.eval()

    def _fitted(self, lengths: Float[Tensor, " limit"], steps: int, random_state: int) -> CausalLMPolicy:
        """Cross-entropy on the exact law of the next token: the end with the hazard of the length, else uniform."""
        check_integer("steps", steps, at_least=0)
        model = self._network(random_state)
        survival = lengths.flip(0).cumsum(0).flip(0)  # P(length >= t)
        hazard = (lengths / survival.clamp(min=1e-12)).clamp(max=1.0).to(torch.get_default_dtype())
        target = ((1.0 - hazard) / (self.vocabulary - 1))[:, None].repeat(1, self.vocabulary)
        target[:, END] = hazard
        generator = torch.Generator().manual_seed(random_state)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=max(1, steps))
        for _ in range(steps):
            tokens = torch.randint(1, self.vocabulary, (16, self.limit + 2), generator=generator)
            batch = as_sequences(tokens[:, :2].tolist(), tokens[:, None, 2:])
            logits = response_logits(model, batch.input_ids, batch.attention_mask, batch.response_mask)
            optimizer.zero_grad()
            torch.autograd.backward(-(target.repeat(16, 1) * logits.log_softmax(-1)).sum() / len(logits))
            optimizer.step()
            schedule.step()
        return CausalLMPolicy(model, max_new_tokens=self.limit, eos_token_id=END)

    def _network(self, random_state: int) -> Any:
        return small_gpt(
            self.vocabulary, positions=self.limit + 2, random_state=random_state, layers=1, heads=4, width=32
        )


def length_task(
    kind: Literal["min", "mode", "skew"] = "min",
    *,
    mean: float = 12.0,
    deviation: float = 3.0,
    limit: int = 24,
    skew: float = 3.0,
    vocabulary: int = 16,
) -> LengthTask:
    """A length task on a small transformer, made anew.

    The reference's lengths follow a normal law cut to 1 ... limit. In the paper a 1.4-billion-parameter model writes
    200 tokens on average; how its skewed data were drawn is not known to us, so for "skew" the preference data follow
    the reference's lengths times exp(length / skew), which leaves short answers to chance.

    Parameters
    ----------
    kind : "min": the shorter the better. "mode": the closer to the mean the better. "skew": as "min", with skewed data.
    mean, deviation : of the reference's lengths in tokens, deviation above 0.
    limit : tokens an answer may have, at least 2.
    skew : tokens over which the skewed data grow e-fold, above 0.
    vocabulary : tokens, the end token included, at least 2.
    """
    check_choice("kind", kind, ("min", "mode", "skew"))
    check_integer("limit", limit, at_least=2)
    check_integer("vocabulary", vocabulary, at_least=2)
    check_number("mean", mean, at_least=1, at_most=limit)
    check_number("deviation", deviation, above=0)
    check_number("skew", skew, above=0)
    require("transformers", extra="language")
    places = torch.arange(1, limit + 1, dtype=torch.float64)
    log_lengths = -0.5 * ((places - mean) / deviation) ** 2
    data = log_lengths + places / skew if kind == "skew" else log_lengths
    return LengthTask(kind, log_lengths.softmax(0), data.softmax(0), vocabulary)
