"""What sharpening asks of a policy: draw responses with their log-probabilities, and score given ones.

Any object with the two methods of `SequencePolicy` will do, a server for instance. `CausalPolicy` makes one of a
transformers causal language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.alignment.logprobs import frozen, sequence_logprobs
from workingpapers.alignment.sampling import sample_responses
from workingpapers.alignment.sequences import SequenceBatch, collate_sequences
from workingpapers.common.validation import check_integer

Tokens = Sequence[int]
Responses = Sequence[Sequence[Tokens]]  # to every prompt, several


@runtime_checkable
class SequencePolicy(Protocol):
    """A policy over token sequences."""

    def sample(self, prompts: Sequence[Tokens], n: int) -> SequenceBatch:
        """Draw n responses to each prompt, those to one prompt in consecutive rows, with logprobs and finished."""

    def log_prob(self, prompts: Sequence[Tokens], responses: Responses) -> Float[Tensor, "prompts n"]:
        """Log-probability of whole responses, end token included, in nats; -inf where a prompt has fewer than n."""


@dataclass(frozen=True)
class CausalPolicy:
    """A transformers causal LM, or a peft model around one, as a `SequencePolicy`.

    Attributes
    ----------
    model : the language model; used in evaluation mode, without gradients.
    max_new_tokens : tokens a response may have, its end token included.
    min_new_tokens : tokens it has at least; something to try when log-likelihood favours answers that are too short.
    eos_token_id : what ends a response. None: every response has `max_new_tokens` and counts as finished.
    temperature, top_k, top_p : of the draws, as in `sample_responses`. The log-probabilities are those of the model
        itself in any case; what theory says about coverage holds for draws at temperature 1 without filters alone.
    batch_size : responses in one forward pass.
    generator : of the draws; torch's global one when None.
    """

    model: nn.Module
    max_new_tokens: int
    min_new_tokens: int = 0
    eos_token_id: int | Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    batch_size: int = 256
    generator: torch.Generator | None = None

    def sample(self, prompts: Sequence[Tokens], n: int) -> SequenceBatch:
        """Draw n responses to each prompt; see `sample_responses`."""
        batch = sample_responses(
            self.model,
            prompts,
            n=n,
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            eos_token_id=self.eos_token_id,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            batch_size=self.batch_size,
            generator=self.generator,
        )
        if self.eos_token_id is None:
            batch = replace(batch, finished=torch.ones(len(batch), dtype=torch.bool, device=batch.input_ids.device))
        return batch

    def greedy(self, prompts: Sequence[Tokens]) -> list[list[int]]:
        """The response of greedy decoding to each prompt."""
        return replace(self, temperature=0.0, top_k=None, top_p=None).sample(prompts, 1).responses()

    def log_prob(self, prompts: Sequence[Tokens], responses: Responses) -> Float[Tensor, "prompts n"]:
        """Log-probability of whole responses, in nats; -inf where a prompt has fewer responses than another."""
        check_integer("batch_size", self.batch_size, at_least=1)
        rows = [(row, column) for row, several in enumerate(responses) for column in range(len(several))]
        width = max((len(several) for several in responses), default=0)
        device = next(self.model.parameters()).device
        found = torch.full((len(prompts), width), -torch.inf, device=device)
        # Responses of like length share a batch, so that little of it is padding.
        rows.sort(key=lambda place: len(prompts[place[0]]) + len(responses[place[0]][place[1]]))
        with frozen(self.model):
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                batch = collate_sequences([(prompts[row], responses[row][column]) for row, column in part]).to(device)
                scored = sequence_logprobs(self.model, batch.input_ids, batch.attention_mask, batch.response_mask)
                index = torch.tensor(part, device=device)
                found[index[:, 0], index[:, 1]] = scored.to(found.dtype)
        return found


def as_policy(policy: Any, **of_a_model: Any) -> SequencePolicy:
    """A `SequencePolicy` as it is, or a causal LM made one; `of_a_model` are arguments of `CausalPolicy`."""
    if isinstance(policy, nn.Module) and not isinstance(policy, SequencePolicy):
        return CausalPolicy(policy, **of_a_model)
    if not isinstance(policy, SequencePolicy):
        raise TypeError(
            f"model must be a transformers causal LM or have methods sample and log_prob, got a {type(policy).__name__}"
        )
    return policy
