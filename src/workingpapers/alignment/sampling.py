"""Drawing responses from a policy, with their log-probabilities cached on the way.

To learn from its own answers a policy is asked for several answers to each prompt, and for the probability of each of
their tokens. So here a prompt passes the model once, whatever the number of answers; rows that have ended leave the
batch; the log-probabilities are kept as the tokens are drawn, those of the policy itself, whatever filters shaped the
draw; and every answer has its own random numbers, so that it does not depend on what it was batched with.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workingpapers.alignment.logprobs import frozen
from workingpapers.alignment.sequences import SequenceBatch
from workingpapers.common.validation import check_integer, check_number


def sample_responses(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    n: int = 1,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> SequenceBatch:
    """Draw n responses to each prompt.

    Parameters
    ----------
    model : a transformers causal LM, or a peft model around one; used in evaluation mode, without gradients.
    prompts : token ids of each prompt, none empty.
    n : responses to each prompt; those to prompt i are rows i n to i n + n - 1.
    max_new_tokens : tokens a response may have, its end token included.
    min_new_tokens : no end token is drawn before a response has this many tokens.
    eos_token_id : what ends a response, one id or several; None: all responses have `max_new_tokens`.
    pad_token_id : any id of the vocabulary: padding is masked everywhere.
    temperature : logits are divided by it; 0 takes the most likely token.
    top_k : draw from the k most likely tokens alone.
    top_p : draw from the smallest set of most likely tokens whose probabilities sum to at least this, in (0, 1].
    batch_size : responses drawn at a time, rounded down to whole prompts but at least one prompt; all when None. It
        changes memory and time, not the answers, apart from rounding.
    generator : on any device; the global one when None.

    Returns
    -------
    Prompts padded on the left, responses on the right, with `logprobs` and `finished`. The log-probabilities are those
    of the model at temperature 1 without filters, in float32 or better.

    Raises
    ------
    ValueError : an argument is out of range, or a prompt is empty.
    FloatingPointError : the model's logits are not numbers.
    """
    n = check_integer("n", n, at_least=1)
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens, at_least=1)
    check_integer("min_new_tokens", min_new_tokens, at_least=0, at_most=max_new_tokens)
    check_number("temperature", temperature, at_least=0)
    if top_k is not None:
        check_integer("top_k", top_k, at_least=1)
    if top_p is not None:
        check_number("top_p", top_p, above=0, at_most=1)
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts must hold at least one prompt, and none may be empty")
    at_once = len(prompts)
    if batch_size is not None:
        at_once = max(1, check_integer("batch_size", batch_size, at_least=1) // n)
    device = next(model.parameters()).device
    ends = torch.tensor([] if eos_token_id is None else eos_token_id, dtype=torch.long, device=device).reshape(-1)
    where = device if generator is None else generator.device
    uniform = torch.rand(len(prompts) * n, max_new_tokens, dtype=torch.float64, generator=generator, device=where)

    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_token_id, device=device)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.as_tensor(prompt, device=device)
        attention_mask[row, width - len(prompt) :] = 1

    def choose(logits: Tensor, draws: Tensor) -> Tensor:
        return _choose(logits, draws, temperature, top_k, top_p)

    drawn = []
    with frozen(model):
        for start in range(0, len(prompts), at_once):
            stop = min(start + at_once, len(prompts))
            used = (attention_mask[start:stop] != 0).any(0)
            found = _Decoding(model, input_ids[start:stop, used], attention_mask[start:stop, used], n, ends, choose)
            drawn.append(found.run(uniform[start * n : stop * n].to(device), min_new_tokens))
    tokens, logprobs, lengths, finished = (torch.cat(parts) for parts in zip(*drawn, strict=True))

    longest = int(lengths.max())
    inside = torch.arange(longest, device=device) < lengths[:, None]
    tokens, logprobs = tokens[:, :longest].masked_fill(~inside, pad_token_id), logprobs[:, :longest]
    prompt_ids, prompt_mask = (part.repeat_interleave(n, 0) for part in (input_ids, attention_mask))
    return SequenceBatch(
        torch.cat([prompt_ids, tokens], 1),
        torch.cat([prompt_mask, inside.to(prompt_mask.dtype)], 1),
        torch.cat([torch.zeros_like(prompt_ids, dtype=torch.bool), inside], 1),
        torch.cat([logprobs.new_zeros(prompt_ids.shape), logprobs.masked_fill(~inside, 0.0)], 1),
        finished,
    )


class _Decoding:
    """Responses to the prompts of one batch, token by token."""

    def __init__(self, model: nn.Module, input_ids: Tensor, mask: Tensor, n: int, ends: Tensor, choose: Any) -> None:
        self.model, self.input_ids, self.mask, self.n, self.ends, self.choose = model, input_ids, mask, n, ends, choose
        architecture: nn.Module = getattr(model, "get_base_model", lambda: model)()  # peft forwards take any argument
        self.accepted = inspect.signature(architecture.forward).parameters

    def run(self, uniform: Tensor, at_least: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens and log-probabilities (responses, limit), lengths, and which have ended."""
        rows, limit = uniform.shape
        tokens = torch.zeros(rows, limit, dtype=torch.long, device=uniform.device)
        lengths = torch.full((rows,), limit, device=uniform.device)
        finished = torch.zeros(rows, dtype=torch.bool, device=uniform.device)
        logits, cache = self._forward(self.input_ids, None)
        logprobs = torch.zeros(rows, limit, dtype=logits.dtype, device=uniform.device)
        if self.n > 1:
            cache.batch_repeat_interleave(self.n)
            logits, self.mask = logits.repeat_interleave(self.n, 0), self.mask.repeat_interleave(self.n, 0)
        here = torch.arange(rows, device=uniform.device)  # the responses that the rows of the cache belong to
        for place in range(limit):
            allowed = logits
            if place < at_least:
                allowed = logits.index_fill(1, self.ends, -torch.inf)
            token = self.choose(allowed, uniform[here, place])
            tokens[here, place] = token
            logprobs[here, place] = logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(1)
            ended = torch.isin(token, self.ends) & ~finished[here]
            lengths[here[ended]], finished[here[ended]] = place + 1, True
            going = ~finished[here]
            if place == limit - 1 or not going.any():
                break
            if going.sum() <= 0.75 * len(here):  # copying the cache costs about as much as a few steps
                cache.batch_select_indices(going.nonzero().squeeze(1))
                here, token, self.mask = here[going], token[going], self.mask[going]
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
            logits, cache = self._forward(token[:, None], cache)
        return tokens, logprobs, lengths, finished

    def _forward(self, input_ids: Int[Tensor, "rows new"], cache: Any) -> tuple[Float[Tensor, "rows vocabulary"], Any]:
        positions = (self.mask.cumsum(-1) - 1).clamp_(min=0)[:, -input_ids.shape[1] :]
        extras = {"position_ids": positions, "logits_to_keep": 1}
        out = self.model(
            input_ids=input_ids,
            attention_mask=self.mask,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in extras.items() if name in self.accepted},
        )
        logits: Tensor = out.logits[:, -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if logits.isnan().any():
            raise FloatingPointError("the logits of model are not numbers")
        return logits, out.past_key_values


def _choose(
    logits: Float[Tensor, "rows vocabulary"],
    uniform: Float[Tensor, " rows"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Int[Tensor, " rows"]:
    """The token in whose share of the (filtered, tempered) distribution the uniform number falls."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        shares = ordered.softmax(-1)
        beyond = shares.cumsum(-1) - shares >= top_p  # what stands before it is enough
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    # the first token whose cumulative share exceeds the draw; one of probability 0 never does
    below = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, below, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
