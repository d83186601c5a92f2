"""Preference pairs as token ids: from data sets with columns prompt, chosen and rejected to padded batches.

The methods of this field that learn from pairs of answers share these three steps: `tokenize_preferences` once,
`collate_preferences` for every batch, `pair_logprobs` for every model that scores it.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workingpapers.alignment.logprobs import sequence_logprobs
from workingpapers.alignment.sequences import SequenceBatch, TokenSequence, collate_sequences
from workingpapers.common.validation import check_choice, check_integer


class TokenPair(NamedTuple):
    """One prompt with two responses, as token ids without padding; none of the three is empty.

    Attributes
    ----------
    prompt, chosen, rejected : token ids.
    rationale : why the chosen response is the better one, as the response to a prompt of its own; None without.
    user : whose preference this is; None where it does not matter.
    scores : of the chosen and of the rejected response by whatever ranked them; None where nothing did.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    rationale: TokenSequence | None = None
    user: Hashable = None
    scores: tuple[float, float] | None = None


@dataclass(frozen=True)
class PreferenceBatch:
    """Padded pairs: the B sequences prompt + chosen, then, in the same order, the B sequences prompt + rejected.

    Attributes
    ----------
    input_ids : token ids.
    attention_mask : 1 on prompt and response, 0 on padding.
    response_mask : True on the response.
    rationales : one per pair, padded for themselves; None unless all pairs have one.
    users : whose pairs these are, None where a pair has no user.
    scores : of the chosen and of the rejected response of each pair; None unless all pairs have them.
    """

    input_ids: Int[Tensor, "sequences length"]
    attention_mask: Int[Tensor, "sequences length"]
    response_mask: Bool[Tensor, "sequences length"]
    rationales: SequenceBatch | None = None
    users: tuple[Hashable, ...] = ()
    scores: Float[Tensor, "pairs 2"] | None = None

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.input_ids) // 2

    @property
    def chosen_lengths(self) -> Int[Tensor, " pairs"]:
        """Tokens in each chosen response."""
        return self.response_mask[: len(self)].sum(-1)

    @property
    def rejected_lengths(self) -> Int[Tensor, " pairs"]:
        """Tokens in each rejected response."""
        return self.response_mask[len(self) :].sum(-1)

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """The same batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            response_mask=self.response_mask.to(device),
            rationales=None if self.rationales is None else self.rationales.to(device),
            scores=None if self.scores is None else self.scores.to(device),
        )


def pair_logprobs(model: nn.Module, batch: PreferenceBatch) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Summed log-probabilities, in nats, of the chosen and of the rejected responses, in one forward pass."""
    chosen, rejected = sequence_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_mask).chunk(2)
    return chosen, rejected


def tokenize_preferences(
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    max_prompt_length: int = 512,
) -> list[TokenPair]:
    """Turn rows with prompt, chosen and rejected into token ids.

    Three forms of row are understood, the same one in all rows:

    - plain: three strings. The end-of-text token is appended to both responses;
    - conversational: three lists of ``{"role": ..., "content": ...}``, rendered by the tokenizer's chat template;
    - whole conversations: chosen and rejected are such lists that include the prompt (a prompt column, if any, is
      then a string and is ignored). The messages the two share at their beginning are the prompt.

    Columns user, and score_chosen with score_rejected, are carried along where a row has them.

    Prompt and response are tokenised together and divided where the tokens of the prompt alone end, so no token is
    trained on that the model would not produce at that place.

    Parameters
    ----------
    dataset : rows as mappings, for example a ``datasets.Dataset`` or a list of dicts.
    tokenizer : a transformers tokenizer.
    max_length : tokens a sequence may have; the end of a longer response is dropped.
    max_prompt_length : tokens a prompt may have, below `max_length`; the beginning of a longer prompt is dropped.

    Raises
    ------
    ValueError : the data set is empty, a row lacks a column, mixes forms, or leaves a prompt or response empty.

    Warns
    -----
    UserWarning : some sequences were cut.
    """
    max_prompt_length = check_integer("max_prompt_length", max_prompt_length, at_least=1)
    max_length = check_integer("max_length", max_length, at_least=max_prompt_length + 1)
    rows = list(dataset)
    if not rows:
        raise ValueError("dataset must have at least one row")
    conversational = not isinstance(rows[0].get("chosen"), str)
    render = _conversation_texts if conversational else _plain_texts
    texts = [render(number, row, tokenizer) for number, row in enumerate(rows)]

    # A chat template writes the special tokens itself.
    prompts, chosen, rejected = (
        tokenizer(list(column), add_special_tokens=not conversational)["input_ids"]
        for column in zip(*texts, strict=True)
    )
    ending = [] if conversational or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pairs, cut = [], 0
    for number, (prompt_ids, chosen_ids, rejected_ids) in enumerate(zip(prompts, chosen, rejected, strict=True)):
        whole = [ids if ids[-1:] == ending else ids + ending for ids in (chosen_ids, rejected_ids)]
        boundary = min(_common_prefix(prompt_ids, ids) for ids in whole)
        context, responses = whole[0][:boundary], [ids[boundary:] for ids in whole]
        if not context and tokenizer.bos_token_id is not None:
            context = [tokenizer.bos_token_id]
        for name, ids in (("prompt", context), ("chosen", responses[0]), ("rejected", responses[1])):
            if not ids:
                raise ValueError(f"row {number} of dataset: {name} has no tokens")
        context_kept = context[-max_prompt_length:]
        kept = [ids[: max_length - len(context_kept)] for ids in responses]
        cut += context_kept != context or kept != responses
        row = rows[number]
        scored = row.get("score_chosen") is not None and row.get("score_rejected") is not None
        scores = (float(row["score_chosen"]), float(row["score_rejected"])) if scored else None
        pairs.append(TokenPair(context_kept, kept[0], kept[1], user=row.get("user"), scores=scores))
    if cut:
        warnings.warn(
            f"{cut} of {len(pairs)} pairs were cut to max_length={max_length}, max_prompt_length={max_prompt_length}",
            UserWarning,
            stacklevel=2,
        )
    return pairs


def as_token_pairs(
    dataset: Iterable[Mapping[str, Any]] | Sequence[TokenPair],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    max_prompt_length: int = 512,
) -> list[TokenPair]:
    """The pairs of a data set that is either tokenised already or rows for `tokenize_preferences`.

    Raises
    ------
    ValueError : the data set is empty, or holds text while `tokenizer` is None.
    """
    rows: list[Any] = list(dataset)
    if rows and all(isinstance(row, TokenPair) for row in rows):
        return rows
    if tokenizer is None:
        raise ValueError("tokenizer may be None only when dataset holds TokenPair")
    return tokenize_preferences(rows, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)


def collate_preferences(
    pairs: Sequence[TokenPair], *, pad_token_id: int = 0, padding_side: Literal["left", "right"] = "right"
) -> PreferenceBatch:
    """Pad pairs to one length.

    Parameters
    ----------
    pairs : at least one.
    pad_token_id : any id of the vocabulary: padding is masked everywhere.
    padding_side : left for batches that are also generated from.

    Raises
    ------
    ValueError : no pairs, or a pair with an empty part.
    """
    check_choice("padding_side", padding_side, ("left", "right"))
    if not pairs:
        raise ValueError("pairs must hold at least one pair")
    if not all(len(pair.prompt) and len(pair.chosen) and len(pair.rejected) for pair in pairs):
        raise ValueError("pairs must have no empty prompt or response")
    both = collate_sequences(
        [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs],
        pad_token_id=pad_token_id,
        padding_side=padding_side,
    )
    rationales = [pair.rationale for pair in pairs if pair.rationale is not None]
    scores = [pair.scores for pair in pairs if pair.scores is not None]
    return PreferenceBatch(
        both.input_ids,
        both.attention_mask,
        both.response_mask,
        collate_sequences(rationales, pad_token_id=pad_token_id, padding_side=padding_side)
        if len(rationales) == len(pairs)
        else None,
        tuple(pair.user for pair in pairs),
        torch.tensor(scores) if len(scores) == len(pairs) else None,
    )


def _plain_texts(number: int, row: Mapping[str, Any], _: Any) -> tuple[str, str, str]:
    for column in ("prompt", "chosen", "rejected"):
        if not isinstance(row.get(column), str):
            raise ValueError(f"row {number} of dataset: {column} must be a string, got {_kind(row, column)}")
    prompt = row["prompt"]
    return prompt, prompt + row["chosen"], prompt + row["rejected"]


def _conversation_texts(number: int, row: Mapping[str, Any], tokenizer: Any) -> tuple[str, str, str]:
    for column in ("chosen", "rejected"):
        if isinstance(row.get(column), str) or not isinstance(row.get(column), Sequence):
            raise ValueError(f"row {number} of dataset: {column} must be a list of messages, got {_kind(row, column)}")
    prompt, chosen, rejected = row.get("prompt"), list(row["chosen"]), list(row["rejected"])
    if isinstance(prompt, str) or prompt is None:
        shared = _common_prefix(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    prompt = list(prompt)
    for name, messages in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not messages:
            raise ValueError(f"row {number} of dataset: {name} has no messages")
    return (
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template(prompt + chosen, tokenize=False),
        tokenizer.apply_chat_template(prompt + rejected, tokenize=False),
    )


def _kind(row: Mapping[str, Any], column: str) -> str:
    return f"a {type(row[column]).__name__}" if column in row else f"columns {', '.join(row)}"


def _common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    for position, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return position
    return min(len(first), len(second))
