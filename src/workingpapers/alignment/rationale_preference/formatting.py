"""Rationales as text: how they are asked for, who writes them, and how they become token ids."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from workingpapers.alignment.preferences import TokenPair, tokenize_preferences
from workingpapers.alignment.sequences import TokenSequence
from workingpapers.common.validation import check_choice, check_integer

Message = Mapping[str, Any]
Rows = Iterable[Mapping[str, Any]]

_STYLES = {
    "general": (
        "Explain in one or two sentences why the better response is better. Name the quality that decides between them "
        "and stay general: do not quote either response."
    ),
    "specific": (
        "Explain in two to four sentences why the better response is better. Be specific: quote the words or steps in "
        "each response that decide between them."
    ),
}
_SLACK = 8  # tokens that a shortened quotation may gain where it meets other text


class PromptOfRationale(Protocol):
    """What asks for a rationale: `RationaleFormatter`, or any function of a user's own with these arguments."""

    def __call__(self, prompt: str, chosen: str, rejected: str, number: int, /) -> str:
        """The text after which the model writes the rationale of pair `number`."""


@dataclass(frozen=True)
class RationaleFormatter:
    """Writes the prompt of a rationale: the request, both responses, and the question why one is better.

    With ``order="chosen_first"``, as in the paper, the better response always comes first. That gives the rationale its
    label and costs nothing in training, but a model that is later asked to judge will favour the first place. With
    ``order="random"`` a coin decides for every pair, and the prompt names the better response.

    Parameters
    ----------
    order : "chosen_first" or "random".
    random_state : of the coins; the same pair number always falls the same way.

    Examples
    --------
    >>> print(RationaleFormatter()("Say hello.", "Hello!", "No.", 0))
    Request:
    Say hello.
    <BLANKLINE>
    Response 1:
    Hello!
    <BLANKLINE>
    Response 2:
    No.
    <BLANKLINE>
    Which of the two responses serves the request better, and why?
    """

    order: Literal["chosen_first", "random"] = "chosen_first"
    random_state: int = 0

    def __post_init__(self) -> None:
        check_choice("order", self.order, ("chosen_first", "random"))
        check_integer("random_state", self.random_state, at_least=0)

    def __call__(self, prompt: str, chosen: str, rejected: str, number: int, /) -> str:
        """The prompt of the rationale of pair `number`."""
        question, responses = "Which of the two responses serves the request better, and why?", (chosen, rejected)
        if self.order == "random":
            swapped = np.random.default_rng([self.random_state, number]).random() < 0.5
            responses = (rejected, chosen) if swapped else responses
            question = f"Response {2 if swapped else 1} serves the request better. Why?"
        first, second = responses
        return f"Request:\n{prompt}\n\nResponse 1:\n{first}\n\nResponse 2:\n{second}\n\n{question}"


def add_rationales(
    dataset: Rows,
    generate: Callable[[list[str]], Sequence[str]],
    style: Literal["general", "specific"] = "general",
) -> Any:
    """Have a language model write the rationale of every pair, whose label it is told.

    Parameters
    ----------
    dataset : rows with prompt, chosen and rejected, as text or conversations (see `tokenize_preferences`).
    generate : takes one instruction per row, returns one rationale per instruction, for example a call of a chat model.
        Instructions call the responses "the better" and "the other", so that a rationale reads well after either order
        of `RationaleFormatter`.
    style : "general" asks for the reason in principle, "specific" for quotations from both responses.

    Returns
    -------
    A ``datasets.Dataset`` with the new column rationale when given one, else a list of new dicts.

    Raises
    ------
    ValueError : a row lacks a column or has a rationale already, or `generate` returns too few rationales or an empty
        one.
    """
    check_choice("style", style, tuple(_STYLES))
    rows = list(dataset)
    if not rows:
        raise ValueError("dataset must have at least one row")
    instructions = []
    for number, row in enumerate(rows):
        if "rationale" in row:
            raise ValueError(f"row {number} of dataset has a rationale already")
        prompt, chosen, rejected = _texts(number, row)
        instructions.append(
            f"Two responses to a request were compared, and people preferred one of them.\n\nRequest:\n{prompt}\n\n"
            f"The better response:\n{chosen}\n\nThe other response:\n{rejected}\n\n{_STYLES[style]} "
            'Call them "the better response" and "the other response".'
        )
    rationales = [text.strip() if isinstance(text, str) else text for text in generate(instructions)]
    if len(rationales) != len(rows):
        raise ValueError(f"generate must return {len(rows)} rationales, got {len(rationales)}")
    for number, rationale in enumerate(rationales):
        _check_rationale(f"generate's rationale {number}", rationale)
    add_column = getattr(dataset, "add_column", None)
    if add_column is not None:
        return add_column("rationale", rationales)
    return [{**row, "rationale": rationale} for row, rationale in zip(rows, rationales, strict=True)]


def tokenize_rationales(
    dataset: Rows,
    tokenizer: Any,
    *,
    formatter: PromptOfRationale | None = None,
    max_length: int = 1024,
    max_prompt_length: int = 512,
    max_rationale_length: int = 2048,
) -> list[TokenPair]:
    """Turn rows with prompt, chosen, rejected and rationale into token ids.

    The pair is tokenised as `tokenize_preferences` does; its prompt and responses never contain the rationale. The
    rationale becomes the response to a prompt of its own, in the chat template where the row is a conversation. There
    the system message stays in its place; of several turns each is quoted after the name of its role.

    Parameters
    ----------
    dataset : rows as mappings; rationale is a string that is not blank.
    tokenizer : a transformers tokenizer.
    formatter : writes the prompt of a rationale; ``RationaleFormatter()`` when None.
    max_length, max_prompt_length : in tokens, of the pair.
    max_rationale_length : tokens of a rationale with its prompt. Where it is exceeded the responses are quoted only as
        far as there is room; if that is not enough the beginning of the prompt is dropped, and of a rationale that
        takes more than half, the end.

    Raises
    ------
    ValueError : the data set is empty, or a row lacks a column or has an empty one.

    Warns
    -----
    UserWarning : some sequences were cut.
    """
    max_rationale_length = check_integer("max_rationale_length", max_rationale_length, at_least=2)
    formatter = RationaleFormatter() if formatter is None else formatter
    rows = list(dataset)
    texts = [_texts(number, row) for number, row in enumerate(rows)]
    for number, row in enumerate(rows):
        _check_rationale(f"row {number} of dataset: rationale", row.get("rationale"))
    pairs = tokenize_preferences(rows, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)

    sequences = _ask(rows, texts, range(len(rows)), tokenizer, formatter)
    long = [
        number
        for number, (prompt, rationale) in enumerate(sequences)
        if len(prompt) + len(rationale) > max_rationale_length
    ]
    for number in long:
        excess = len(sequences[number].prompt) + len(sequences[number].response) - max_rationale_length + _SLACK
        texts[number] = _shortened(texts[number], excess, tokenizer)
    for number, (prompt, rationale) in zip(long, _ask(rows, texts, long, tokenizer, formatter), strict=True):
        # the pair was cut as far as it goes: the rationale keeps at least half of the room, the prompt the rest
        room = max(max_rationale_length // 2, max_rationale_length - len(prompt))
        rationale = rationale[:room]
        sequences[number] = TokenSequence(prompt[-(max_rationale_length - len(rationale)) :], rationale)
    if long:
        warnings.warn(
            f"{len(long)} of {len(pairs)} rationales quote shortened responses: max_rationale_length="
            f"{max_rationale_length}",
            UserWarning,
            stacklevel=2,
        )
    return [pair._replace(rationale=sequence) for pair, sequence in zip(pairs, sequences, strict=True)]


def _ask(
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[tuple[str, str, str]],
    numbers: Sequence[int],
    tokenizer: Any,
    formatter: PromptOfRationale,
) -> list[TokenSequence]:
    """Prompts of rationales with the rationales, uncut: tokenised like any prompt and response."""
    asked = []
    for number in numbers:
        question, rationale = formatter(*texts[number], number), rows[number]["rationale"].strip()
        prompt: Any = f"{question}\n\n"
        if not isinstance(rows[number]["chosen"], str):
            system = [message for message in _conversation(rows[number])[0] if message["role"] == "system"]
            prompt = [*system, {"role": "user", "content": question}]
            rationale = [{"role": "assistant", "content": rationale}]
        asked.append({"prompt": prompt, "chosen": rationale, "rejected": rationale})
    if not asked:
        return []
    unlimited = 2**31
    found = tokenize_preferences(asked, tokenizer, max_length=2 * unlimited, max_prompt_length=unlimited)
    return [TokenSequence(pair.prompt, pair.chosen) for pair in found]


def _shortened(texts: tuple[str, str, str], excess: int, tokenizer: Any) -> tuple[str, str, str]:
    """Drop the ends of the responses, the longer one first, `excess` tokens in all or as many as there are."""
    prompt, *responses = texts
    ids = [tokenizer(response, add_special_tokens=False)["input_ids"] for response in responses]
    shorter, longer = sorted(len(part) for part in ids)
    room = max(0, shorter + longer - excess)
    limit = room - shorter if room >= 2 * shorter else room // 2
    kept = [
        response if len(part) <= limit else tokenizer.decode(part[:limit]) + " ..."
        for response, part in zip(responses, ids, strict=True)
    ]
    return prompt, kept[0], kept[1]


def _texts(number: int, row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as they are quoted."""
    if isinstance(row.get("chosen"), str):
        parts = tuple(row.get(column) for column in ("prompt", "chosen", "rejected"))
    else:
        for column in ("chosen", "rejected"):
            if not isinstance(row.get(column), Sequence):
                raise ValueError(f"row {number} of dataset: {column} must be text or a list of messages")
        prompt, chosen, rejected = _conversation(row)
        parts = tuple(_transcript(messages) for messages in (prompt, chosen, rejected))
    for column, text in zip(("prompt", "chosen", "rejected"), parts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"row {number} of dataset: {column} must be a non-empty text, got {text!r}")
    return parts  # type: ignore[return-value]


def _conversation(row: Mapping[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """Messages of prompt, chosen and rejected; whole conversations share the prompt at their beginning."""
    prompt, chosen, rejected = row.get("prompt"), list(row["chosen"]), list(row["rejected"])
    if prompt is None or isinstance(prompt, str):
        paired = zip(chosen, rejected, strict=False)
        prompt = [ours for ours, theirs in itertools.takewhile(lambda both: both[0] == both[1], paired)]
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return list(prompt), chosen, rejected


def _transcript(messages: Sequence[Message]) -> str:
    turns = [message for message in messages if message["role"] != "system"]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in turns)


def _check_rationale(name: str, rationale: Any) -> None:
    if not isinstance(rationale, str) or not rationale.strip():
        raise ValueError(f"{name} must be a non-empty text, got {rationale!r}")
