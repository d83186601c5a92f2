"""Log-probabilities of packed sequences: the same numbers as with padding, without computing on padding."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.alignment.logprobs import response_logits, select_logprobs
from workingpapers.alignment.preferences import PreferenceBatch
from workingpapers.alignment.sequences import SequenceBatch


def packed_token_logprobs(
    model: nn.Module, batch: SequenceBatch | PreferenceBatch
) -> Float[Tensor, "sequences length"]:
    """What `token_logprobs` gives for the batch, from one forward pass over its tokens in a single row.

    The sequences stand behind each other, and each sees itself alone: positions start anew with every sequence, from
    which transformers makes a block-diagonal causal mask (with flash attention, lengths of segments). Worth it where
    lengths differ much; with dense attention the mask is as large as all tokens squared, so pack a few thousand tokens.

    Parameters
    ----------
    model : a transformers causal LM whose forward takes ``position_ids``, or a peft model around one, except prompt
        learning. Models that number positions in another way (learned relative buckets, recurrences) cannot be packed.
    batch : sequences with padding on either side.

    Returns
    -------
    Nats, aligned with ``batch.input_ids``; 0 outside the responses. Gradients flow to the model.

    Raises
    ------
    ValueError : the model takes no positions, or its adapters are prompts.
    """
    architecture: Any = getattr(model, "get_base_model", lambda: model)()
    if "position_ids" not in inspect.signature(architecture.forward).parameters:
        raise ValueError(f"model must take position_ids to be packed; {type(architecture).__name__} does not")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError("model must not be a peft prompt-learning model: its virtual tokens are not packed")
    inside = batch.attention_mask != 0
    row, scored = batch.input_ids[inside][None], batch.response_mask[inside][None]
    positions = (inside.long().cumsum(-1) - 1)[inside][None]
    logits = response_logits(_Packed(model, positions), row, torch.ones_like(row), scored)
    logprobs = select_logprobs(logits, row[scored].to(logits.device))
    mask = batch.response_mask.to(logprobs.device)
    return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)


class _Packed(nn.Module):
    """A model that is called with positions in place of a mask."""

    def __init__(self, model: nn.Module, positions: Tensor) -> None:
        super().__init__()
        self._model, self._positions = model, positions

    def get_output_embeddings(self) -> nn.Module | None:
        head: nn.Module | None = self._model.get_output_embeddings()  # type: ignore[operator]
        return head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        return self._model(input_ids=input_ids, position_ids=self._positions, use_cache=use_cache)
