"""The few-shot prompt: numbered examples of a user's preferences, then the task, in markdown."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from workingpapers.alignment.fewshot_preference.episodes import Comparison, Episode, Text, as_comparison
from workingpapers.alignment.preferences import TokenPair, tokenize_preferences
from workingpapers.alignment.sequences import TokenSequence
from workingpapers.common.validation import check_integer

_NO_LIMIT = 2**31
T = TypeVar("T")

Record = Mapping[str, Any] | Comparison


class EpisodeTemplate(Protocol):
    """What the trainers and `PersonalRewarder` need of a template; write your own for another format."""

    def fit(self, shots: Sequence[Record], query: Record, tokenizer: Any, max_length: int) -> TokenPair:
        """Token ids of context, chosen and rejected completion, within `max_length` together."""
        ...

    def fit_responses(
        self,
        shots: Sequence[Record],
        question: Text,
        responses: Sequence[Text],
        tokenizer: Any,
        max_length: int,
        *,
        description: Text | None = None,
    ) -> list[TokenSequence]:
        """Token ids of the same context with each response."""
        ...


@dataclass(frozen=True)
class FewShotTemplate:
    """Render an episode as text.

    The prompt lists the examples under numbered headings (question, preferred response, dispreferred response), then
    the task and its question. Both completions begin with the heading of preferred responses, so that the model is
    asked for what the user prefers and the rejected response is a bad answer to that. The preferred response always
    stands first: the heading says which it is, the order adds nothing.

    Parameters
    ----------
    include_dispreferred : show the dispreferred responses of the examples too.
    describe : the completion is first a description of the user, then the response. In training the chosen completion
        carries the user's description, the rejected one that of the user it was written for.
    teacher_forced : with `describe`: the true description stands at the end of the prompt and both completions are
        responses alone.

    Raises
    ------
    ValueError : `teacher_forced` without `describe`.
    """

    include_dispreferred: bool = True
    describe: bool = False
    teacher_forced: bool = False

    def __post_init__(self) -> None:
        if self.teacher_forced and not self.describe:
            raise ValueError("teacher_forced=True needs describe=True: it says where the description stands")

    @property
    def response_heading(self) -> str:
        """What every response to prefer stands under."""
        return "## Preferred response\n" if self.include_dispreferred else "## Response\n"

    @property
    def description_heading(self) -> str:
        """What a description of the user stands under."""
        return "## User description\n"

    def prompt(self, shots: Sequence[Record], question: Text) -> str:
        """The context up to and including the new question.

        Parameters
        ----------
        shots : comparisons of one user, or records as for `as_comparison`.
        question : the new prompt, text.
        """
        parts = []
        for number, shot in enumerate(shots, start=1):
            example = as_comparison(shot, f"shot {number}")
            parts.append(f"# Example {number}\n## Question\n{_plain(example.prompt)}\n")
            parts.append(f"{self.response_heading}{_plain(example.chosen)}\n")
            if self.include_dispreferred:
                parts.append(f"## Dispreferred response\n{_plain(example.rejected)}\n")
            parts.append("\n")
        parts.append(f"# Task\n{self._instruction(bool(shots))}\n## Question\n{_plain(question)}\n")
        return "".join(parts)

    def render(self, shots: Sequence[Record], query: Record) -> tuple[str, str, str]:
        """The prompt, the chosen and the rejected completion.

        Parameters
        ----------
        shots : as for `prompt`.
        query : the comparison to predict; with `describe` it has a persona and, unless the description is
            teacher-forced, a rejected_persona.

        Raises
        ------
        ValueError : a record does not fit, or a description is missing.
        TypeError : a record holds token ids in place of text.
        """
        asked = as_comparison(query, "query")
        prompt = self.prompt(shots, asked.prompt)
        chosen, rejected = (
            f"{self.response_heading}{_plain(response)}\n" for response in (asked.chosen, asked.rejected)
        )
        if not self.describe:
            return prompt, chosen, rejected
        described = self._description(asked.persona, "persona")
        if self.teacher_forced:
            return prompt + described, chosen, rejected
        return prompt, described + chosen, self._description(asked.rejected_persona, "rejected_persona") + rejected

    def row(self, episode: Episode) -> dict[str, Any]:
        """An episode as a row of a preference data set: prompt, chosen, rejected (and user), as trl takes them."""
        prompt, chosen, rejected = self.render(episode.shots, episode.query)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "user": episode.user}

    def fit(self, shots: Sequence[Record], query: Record, tokenizer: Any, max_length: int) -> TokenPair:
        """Token ids of the rendered episode; where it is too long, whole shots are dropped from the front.

        The end-of-text token is appended to both completions.

        Parameters
        ----------
        shots, query : as for `render`.
        tokenizer : a transformers tokenizer.
        max_length : tokens that prompt and completion may have together.

        Raises
        ------
        ValueError : the query does not fit even without shots.

        Warns
        -----
        UserWarning : shots were dropped.
        """

        def tokenized(kept: Sequence[Record]) -> list[TokenPair]:
            prompt, chosen, rejected = self.render(kept, query)
            return _tokenized([{"prompt": prompt, "chosen": chosen, "rejected": rejected}], tokenizer)

        [pair] = _fitted(shots, tokenized, _longest_pair, max_length)
        return pair

    def fit_responses(
        self,
        shots: Sequence[Record],
        question: Text,
        responses: Sequence[Text],
        tokenizer: Any,
        max_length: int,
        *,
        description: Text | None = None,
    ) -> list[TokenSequence]:
        """Token ids of several responses to one question, all with the same shots, as many as fit the longest.

        Parameters
        ----------
        shots, question : as for `prompt`.
        responses : at least one.
        tokenizer, max_length : as for `fit`.
        description : of the user; with `describe` it is needed and stands before each response.

        Raises
        ------
        ValueError : the question does not fit even without shots, or the description is missing.
        """
        opening = self._description(description, "description") if self.describe else ""
        completions = [f"{opening}{self.response_heading}{_plain(response)}\n" for response in responses]
        if self.teacher_forced:
            completions = [completion.removeprefix(opening) for completion in completions]

        def tokenized(kept: Sequence[Record]) -> list[TokenPair]:
            prompt = self.prompt(kept, question) + (opening if self.teacher_forced else "")
            return _tokenized([{"prompt": prompt, "chosen": text, "rejected": text} for text in completions], tokenizer)

        return [
            TokenSequence(pair.prompt, pair.chosen) for pair in _fitted(shots, tokenized, _longest_pair, max_length)
        ]

    def fit_opening(
        self, shots: Sequence[Record], question: Text, tokenizer: Any, max_length: int, *, opening: str
    ) -> list[int]:
        """Token ids of the prompt with the first words of its completion, to generate from; shots dropped as in `fit`.

        Parameters
        ----------
        shots, question : as for `prompt`.
        tokenizer : a transformers tokenizer.
        max_length : tokens the result may have.
        opening : what the completion begins with, a heading for example.

        Raises
        ------
        ValueError : the question does not fit even without shots.
        """

        def tokenized(kept: Sequence[Record]) -> list[int]:
            ids: list[int] = tokenizer(self.prompt(kept, question) + opening)["input_ids"]
            return ids

        return _fitted(shots, tokenized, len, max_length)

    def _instruction(self, with_examples: bool) -> str:
        if not with_examples:
            return "Respond to the question below."
        wanted = "the response that this user would prefer" if self.include_dispreferred else "a response for this user"
        if self.describe:
            return f"Describe the user behind the examples above. Then write {wanted} to the question below."
        return f"Judging by the examples above, write {wanted} to the question below."

    def _description(self, persona: Text | None, name: str) -> str:
        if persona is None:
            raise ValueError(f"query has no {name}, which describe=True needs")
        return f"{self.description_heading}{_plain(persona)}\n"


def _plain(text: Text) -> str:
    if not isinstance(text, str):
        raise TypeError("FewShotTemplate needs text, got token ids: write a template of your own for them")
    return text


def _tokenized(rows: list[dict[str, str]], tokenizer: Any) -> list[TokenPair]:
    return tokenize_preferences(rows, tokenizer, max_length=_NO_LIMIT + 1, max_prompt_length=_NO_LIMIT)


def _longest_pair(pairs: Sequence[TokenPair]) -> int:
    return max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs)


def _fitted(
    shots: Sequence[Record], tokenized: Callable[[Sequence[Record]], T], size: Callable[[T], int], max_length: int
) -> T:
    """The tokens with as many of the newest shots as fit: a shot cut in half could show the wrong preference."""
    check_integer("max_length", max_length, at_least=1)
    for dropped in range(len(shots) + 1):
        found = tokenized(shots[dropped:])
        if size(found) <= max_length:
            if dropped:
                warnings.warn(
                    f"the oldest shots of an episode were dropped to fit it into max_length={max_length} tokens",
                    stacklevel=3,
                )
            return found
    raise ValueError(f"the query without shots has {size(found)} tokens, more than max_length={max_length}")
