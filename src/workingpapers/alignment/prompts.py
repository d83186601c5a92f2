"""Prompts as token ids, and where answers to them end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workingpapers.common.validation import check_integer

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


def tokenize_prompts(
    prompts: Iterable[Any], tokenizer: Any = None, *, max_prompt_length: int | None = None, name: str = "prompts"
) -> list[list[int]]:
    """Prompts as token ids.

    Parameters
    ----------
    prompts : each a string, a list of messages (``{"role": ..., "content": ...}``, rendered by the chat template with
        the opening of an answer), token ids (Python or NumPy integers; of a tensor, its ``tolist()``), or a row of a
        data set whose column prompt is one of these.
    tokenizer : a transformers tokenizer; may be None when all are token ids.
    max_prompt_length : in tokens; the beginning of a longer prompt is dropped. None: prompts stay whole.
    name : of the argument, for errors.

    Raises
    ------
    ValueError : there are no prompts, one has no tokens, an id is negative, or text is given without a tokenizer.
    TypeError : prompts is one string, or an id is not an integer.
    KeyError : a row has no column prompt.
    """
    if isinstance(prompts, str):
        raise TypeError(f"{name} must be a list of prompts, got one string")
    if max_prompt_length is not None:
        max_prompt_length = check_integer("max_prompt_length", max_prompt_length, at_least=1)
    found: list[list[int]] = []
    for number, given in enumerate(prompts):
        prompt = given["prompt"] if isinstance(given, Mapping) else given
        if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], Mapping)):
            if tokenizer is None:
                raise ValueError(f"tokenizer may be None only when {name} are token ids")
            if isinstance(prompt, str):
                prompt = tokenizer(prompt)["input_ids"]
            else:  # the template writes the special tokens itself
                text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
                prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not len(prompt):
            raise ValueError(f"{name} must not be empty, but prompt {number} has no tokens")
        kept = prompt if max_prompt_length is None else prompt[-max_prompt_length:]
        found.append([check_integer(name, token, at_least=0) for token in kept])
    if not found:
        raise ValueError(f"{name} must hold at least one prompt")
    return found


def end_tokens(model: Any, tokenizer: Any = None) -> int | list[int] | None:
    """What ends an answer: what the model's generation stops at, else the tokenizer's end of text."""
    generation = getattr(model, "generation_config", None)
    ends: int | list[int] | None = getattr(generation, "eos_token_id", None)
    return getattr(tokenizer, "eos_token_id", None) if ends is None else ends
