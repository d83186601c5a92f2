"""Prompts with one response each, as padded token ids: what is sampled, scored and trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workingpapers.common.validation import check_choice


class TokenSequence(NamedTuple):
    """A prompt and a response as token ids without padding; neither is empty."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class SequenceBatch:
    """Padded sequences; the first three fields are the arguments of `token_logprobs`.

    Attributes
    ----------
    input_ids : token ids.
    attention_mask : 1 on prompt and response, 0 on padding, which may stand on both sides.
    response_mask : True on the response.
    logprobs : log-probability of each response token under the policy that drew it, in nats, 0 elsewhere; None where
        the responses were not drawn.
    finished : whether a response ended by itself; False where the limit of tokens cut it. None where not drawn.
    """

    input_ids: Int[Tensor, "sequences length"]
    attention_mask: Int[Tensor, "sequences length"]
    response_mask: Bool[Tensor, "sequences length"]
    logprobs: Float[Tensor, "sequences length"] | None = None
    finished: Bool[Tensor, " sequences"] | None = None

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.input_ids)

    @property
    def lengths(self) -> Int[Tensor, " sequences"]:
        """Tokens in each response."""
        return self.response_mask.sum(-1)

    def prompts(self) -> list[list[int]]:
        """The prompts without padding."""
        inside = (self.attention_mask != 0) & ~self.response_mask
        return [row[mask].tolist() for row, mask in zip(self.input_ids, inside, strict=True)]

    def responses(self) -> list[list[int]]:
        """The responses without padding."""
        return [row[mask].tolist() for row, mask in zip(self.input_ids, self.response_mask, strict=True)]

    def sequences(self) -> list[TokenSequence]:
        """Prompts and responses without padding."""
        return [TokenSequence(*pair) for pair in zip(self.prompts(), self.responses(), strict=True)]

    def select(self, rows: Sequence[int] | Int[Tensor, " rows"]) -> SequenceBatch:
        """Some of the sequences, in the order asked for, without columns that are padding in all of them."""
        index = torch.as_tensor(rows, device=self.input_ids.device)
        used = (self.attention_mask[index] != 0).any(0)
        return replace(
            self,
            input_ids=self.input_ids[index][:, used],
            attention_mask=self.attention_mask[index][:, used],
            response_mask=self.response_mask[index][:, used],
            logprobs=None if self.logprobs is None else self.logprobs[index][:, used],
            finished=None if self.finished is None else self.finished[index],
        )

    def to(self, device: torch.device | str) -> SequenceBatch:
        """The same batch on another device."""
        return SequenceBatch(*(None if part is None else part.to(device) for part in self._parts()))  # type: ignore[arg-type]

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.input_ids, self.attention_mask, self.response_mask, self.logprobs, self.finished


def collate_sequences(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad_token_id: int = 0,
    padding_side: Literal["left", "right"] = "right",
) -> SequenceBatch:
    """Pad prompts with their responses to one length.

    Parameters
    ----------
    sequences : (prompt, response), for example `TokenSequence`; at least one.
    pad_token_id : any id of the vocabulary: padding is masked everywhere.
    padding_side : left for batches that are also generated from.

    Raises
    ------
    ValueError : no sequences, or one with an empty part.
    """
    check_choice("padding_side", padding_side, ("left", "right"))
    if not sequences:
        raise ValueError("sequences must hold at least one sequence")
    if not all(len(prompt) and len(response) for prompt, response in sequences):
        raise ValueError("sequences must have no empty prompt or response")
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = torch.full((len(sequences), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    response_mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(sequences):
        used = len(prompt) + len(response)
        start = length - used if padding_side == "left" else 0
        input_ids[row, start : start + used] = torch.tensor([*prompt, *response])
        attention_mask[row, start : start + used] = 1
        response_mask[row, start + len(prompt) : start + used] = True
    return SequenceBatch(input_ids, attention_mask, response_mask)
