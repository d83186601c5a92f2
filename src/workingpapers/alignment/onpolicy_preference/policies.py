"""Policies as `PreferenceTuner` wants them: over numbered actions, and transformers causal language models.

A prompt is whatever the policy understands, one row of a tensor or one item of a list; its answers are one tensor of
shape (prompts, answers, ...), which is handed back to score them. That is all the loop asks for, so any object with
`sample`, `log_prob`, `parameters` and `reference` will do: `Policy` is the protocol.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workingpapers.alignment.logprobs import frozen, token_logprobs
from workingpapers.alignment.sampling import sample_responses
from workingpapers.alignment.sequences import SequenceBatch, collate_sequences
from workingpapers.common.validation import check_integer

Prompts = Tensor | Sequence[Sequence[int]]
PADDING = -1  # where an answer in tokens has ended


class Policy(Protocol):
    """What can be tuned, or serve as reference or as source of answers.

    A policy may also have ``log_distribution(prompts)``, the log-probabilities of all actions, shape (P, A): then
    divergences, entropy and expected reward are computed exactly. Without it they are estimated from samples.
    """

    def sample(self, prompts: Any, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n answers to each prompt, shape (P, n, ...)."""

    def log_prob(self, prompts: Any, actions: Tensor) -> Float[Tensor, "prompts answers"]:
        """log pi(answer | prompt), in nats, with gradients."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer may change."""

    def reference(self) -> Policy:
        """The policy as it is now, frozen."""


class LogitTable(nn.Module):
    """One row of logits for all contexts: the smallest network that `CategoricalPolicy` can use.

    Parameters
    ----------
    logits : the start, shape (A,); copied.
    """

    def __init__(self, logits: Float[Tensor, " actions"]) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.detach().clone())

    def forward(self, contexts: Tensor) -> Float[Tensor, "prompts actions"]:
        """The same logits for each context."""
        return self.logits.expand(len(contexts), -1)


class CategoricalPolicy(nn.Module):
    """A policy over A numbered actions whose logits a network computes from a context.

    Parameters
    ----------
    network : maps contexts (P, ...) to logits (P, A); trained in place.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def log_distribution(self, prompts: Tensor) -> Float[Tensor, "prompts actions"]:
        """log pi(a|x) of all actions."""
        logits: Tensor = self.network(prompts)
        return logits.log_softmax(-1)

    def sample(
        self, prompts: Tensor, n: int, generator: torch.Generator | None = None
    ) -> Int[Tensor, "prompts answers"]:
        """Draw n actions for each context, with replacement."""
        with torch.no_grad():
            probabilities = self.log_distribution(prompts).exp()
        return torch.multinomial(probabilities, n, replacement=True, generator=generator)

    def log_prob(self, prompts: Tensor, actions: Int[Tensor, "prompts answers"]) -> Float[Tensor, "prompts answers"]:
        """log pi(a|x) of these actions.

        Raises
        ------
        ValueError : an action is outside the support.
        """
        table = self.log_distribution(prompts)
        if actions.numel() and not (int(actions.min()) >= 0 and int(actions.max()) < table.shape[1]):
            raise ValueError(
                f"actions must be at least 0 and below {table.shape[1]}, got {int(actions.min())} to "
                f"{int(actions.max())}"
            )
        return table.gather(1, actions)

    def reference(self) -> CategoricalPolicy:
        """A frozen copy."""
        return copy.deepcopy(self).requires_grad_(False)


class CausalLMPolicy:
    """Any transformers causal LM, or a peft model around one, as a policy over answers.

    Prompts are lists of token ids. Answers come as one tensor (prompts, answers, max_new_tokens) of token ids, -1 after
    the end; `responses` turns it into lists. Dropout stays off.

    Parameters
    ----------
    model : trained in place, on the device it is on. Only parameters that require gradients change.
    max_new_tokens : tokens an answer may have, its end token included.
    eos_token_id : what ends an answer, one id or several; None: all answers have `max_new_tokens`.
    pad_token_id : any id of the vocabulary.
    sample_batch_size : answers drawn at a time; all of a call when None.
    bf16 : autocast to bfloat16; log-probabilities stay in float32.
    gradient_checkpointing : recompute activations in the backward pass to save memory.

    Examples
    --------
    >>> policy = CausalLMPolicy(model, max_new_tokens=64, eos_token_id=tokenizer.eos_token_id)  # doctest: +SKIP
    >>> tuner = PreferenceTuner(policy, None, text_reward(score, tokenizer), lr=1e-5)  # doctest: +SKIP
    >>> history = tuner.fit([tokenizer(text).input_ids for text in texts], budget=4_096)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int = 0,
        sample_batch_size: int | None = None,
        bf16: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.model = model
        self.max_new_tokens = check_integer("max_new_tokens", max_new_tokens, at_least=1)
        self.eos_token_id, self.pad_token_id = eos_token_id, check_integer("pad_token_id", pad_token_id, at_least=0)
        self.sample_batch_size, self.bf16 = sample_batch_size, bf16
        self.gradient_checkpointing = gradient_checkpointing
        self._adapters: Callable[[], AbstractContextManager[Any]] = nullcontext
        if gradient_checkpointing:
            old: Any = getattr(model, "gradient_checkpointing_enable", None)
            enable: Any = getattr(model, "activation_checkpointing_enable", old)
            enable({"use_reentrant": False})

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def sample(
        self, prompts: Sequence[Sequence[int]], n: int, generator: torch.Generator | None = None
    ) -> Int[Tensor, "prompts answers tokens"]:
        """Draw n answers to each prompt at temperature 1 from the whole vocabulary."""
        with self._adapters(), self._autocast():
            drawn = sample_responses(
                self.model,
                prompts,
                n=n,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=self.eos_token_id,
                pad_token_id=self.pad_token_id,
                batch_size=self.sample_batch_size,
                generator=generator,
            )
        longest = int(drawn.lengths.max())
        answers = drawn.input_ids[:, -longest:].masked_fill(~drawn.response_mask[:, -longest:], PADDING)
        answers = nn.functional.pad(answers, (0, self.max_new_tokens - longest), value=PADDING)
        return answers.reshape(len(prompts), n, self.max_new_tokens)

    def log_prob(
        self, prompts: Sequence[Sequence[int]], actions: Int[Tensor, "prompts answers tokens"]
    ) -> Float[Tensor, "prompts answers"]:
        """log pi of whole answers, summed over their tokens.

        Raises
        ------
        ValueError : an answer is empty, or tokens follow its end.
        """
        batch = as_sequences(prompts, actions, pad_token_id=self.pad_token_id).to(self.device)
        self.model.eval()  # no dropout
        if self.gradient_checkpointing and torch.is_grad_enabled():
            for module in self.model.modules():  # layers recompute in training mode only; their dropout stays off
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True
        with self._adapters(), self._autocast():
            scored = token_logprobs(self.model, batch.input_ids, batch.attention_mask, batch.response_mask)
        return scored.sum(-1).reshape(actions.shape[:2])

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that require gradients."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def reference(self) -> CausalLMPolicy:
        """The frozen reference: of a peft model itself with the adapters off, at no cost in memory; else a copy."""
        disable_adapter: Any = getattr(self.model, "disable_adapter", None)
        found = copy.copy(self)
        found.gradient_checkpointing = False
        if disable_adapter is not None:
            found._adapters = disable_adapter
        else:
            found.model = copy.deepcopy(self.model).requires_grad_(False)
        return found

    def responses(self, actions: Int[Tensor, "prompts answers tokens"]) -> list[list[list[int]]]:
        """Answers as lists of token ids, by prompt."""
        return [[answer[answer != PADDING].tolist() for answer in answers] for answers in actions]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)


def text_reward(
    score: Callable[..., Sequence[float]], tokenizer: Any
) -> Callable[[Sequence[Sequence[int]], Tensor], Float[Tensor, "prompts answers"]]:
    """A reward for `PreferenceTuner` from a function of texts, of the kind that trl's trainers take.

    Parameters
    ----------
    score : called as ``score(prompts=..., completions=..., completion_ids=...)`` on flat lists of equal length, texts
        without special tokens and token ids; returns one number for each.
    tokenizer : of the model.
    """

    def reward(prompts: Sequence[Sequence[int]], actions: Tensor) -> Tensor:
        count = actions.shape[1]
        ids = [answer[answer != PADDING].tolist() for answer in actions.flatten(0, 1)]
        asked = tokenizer.batch_decode([list(prompt) for prompt in prompts], skip_special_tokens=True)
        said = tokenizer.batch_decode(ids, skip_special_tokens=True)
        scores = score(prompts=[text for text in asked for _ in range(count)], completions=said, completion_ids=ids)
        return torch.tensor([float(one) for one in scores]).reshape(actions.shape[:2])

    return reward


def model_reward(
    model: nn.Module, *, pad_token_id: int = 0, batch_size: int = 64
) -> Callable[[Sequence[Sequence[int]], Tensor], Float[Tensor, "prompts answers"]]:
    """A reward for `PreferenceTuner` from a `RewardModel`, or from anything called on token ids and their mask.

    Parameters
    ----------
    model : used in evaluation mode, without gradients.
    pad_token_id : any id of its vocabulary.
    batch_size : answers scored at a time.
    """
    check_integer("batch_size", batch_size, at_least=1)

    def reward(prompts: Sequence[Sequence[int]], actions: Tensor) -> Tensor:
        device = next(model.parameters()).device
        batch = as_sequences(prompts, actions, pad_token_id=pad_token_id).to(device)
        with frozen(model) as scorer:
            parts = [
                scorer(part.input_ids, part.attention_mask)
                for part in map(batch.select, torch.split(torch.arange(len(batch), device=device), batch_size))
            ]
        return torch.cat(parts).reshape(actions.shape[:2])

    return reward


def as_sequences(
    prompts: Sequence[Sequence[int]], actions: Int[Tensor, "prompts answers tokens"], *, pad_token_id: int = 0
) -> SequenceBatch:
    """Each prompt with each of its answers, row p C + c, padded on the right.

    Raises
    ------
    ValueError : there are not as many prompts as groups of answers, an answer is empty, or tokens follow its end.
    """
    if actions.ndim != 3 or len(actions) != len(prompts):
        raise ValueError(f"actions must have shape ({len(prompts)}, answers, tokens), got {tuple(actions.shape)}")
    inside = actions != PADDING
    lengths = inside.sum(-1)
    if not lengths.all():
        raise ValueError("actions must hold no empty answer")
    if (inside != (torch.arange(actions.shape[2], device=actions.device) < lengths[..., None])).any():
        raise ValueError("actions must hold nothing but -1 after the end of an answer")
    sequences = [
        (list(prompt), answer[:length])
        for prompt, answers, of_prompt in zip(prompts, actions.tolist(), lengths.tolist(), strict=True)
        for answer, length in zip(answers, of_prompt, strict=True)
    ]
    return collate_sequences(sequences, pad_token_id=pad_token_id)


def take(prompts: Prompts, rows: Sequence[int]) -> Any:
    """Some of the prompts, in the order asked for."""
    if isinstance(prompts, Tensor):
        return prompts[torch.as_tensor(rows, dtype=torch.long, device=prompts.device)]
    return [prompts[row] for row in rows]


def count_tokens(actions: Tensor) -> int:
    """Tokens in answers; an action that is one number is one token."""
    return int((actions != PADDING).sum()) if actions.ndim > 2 else actions.numel()


def exact(policy: Policy) -> Callable[[Any], Float[Tensor, "prompts actions"]] | None:
    """The log-probabilities of all actions, where the policy has them."""
    found = getattr(policy, "log_distribution", None)
    return cast("Callable[[Any], Tensor] | None", found)
