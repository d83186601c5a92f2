"""Judges: how good a candidate text is, measured against a reference text.

A judge is any callable ``judge(candidate, reference) -> float``, higher is better. One that is quicker on many texts
at once has a method ``scores(candidates, references) -> list of floats`` too, which is then called in its place.
Scores are compared only among candidates for the same input, so they need no common scale; `LengthControlled` needs
them to be at least 0.

Metrics of surface overlap are cheap and know nothing of meaning: they cannot tell "effusion" from "no effusion".
Findings that rules read from the text (`LabelF1`, `ClinicalJudge`) or a language model (`LanguageModelJudge`) can.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from workingpapers.common.validation import check_integer, check_number

Judge = Callable[[str, str], float]

_WORD = re.compile(r"[^\W_]+")
_BRACKETED = re.compile(r"\[.*?\]")
_BLANKS = re.compile(r"\s+")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def normalize_report(text: str) -> str:
    """What CheXalign does to a report before it is judged: no [...] spans, no ``**``, single blanks, lower case."""
    return _BLANKS.sub(" ", _BRACKETED.sub("", text).replace("**", "")).strip().lower()


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case: what the judges of overlap compare."""
    return _WORD.findall(text.lower())


def judge_scores(judge: Judge, candidates: Sequence[str], references: Sequence[str]) -> list[float]:
    """Score each candidate against its reference, all at once where the judge can.

    Raises
    ------
    ValueError : the numbers of candidates, references and scores differ, or a score is not finite.
    """
    if len(candidates) != len(references):
        raise ValueError(f"references must be one per candidate ({len(candidates)}), got {len(references)}")
    together: Any = getattr(judge, "scores", None)
    if together is not None:
        found = [float(score) for score in together(list(candidates), list(references))]
    else:
        found = [float(judge(*texts)) for texts in zip(candidates, references, strict=True)]
    if len(found) != len(candidates):
        raise ValueError(f"judge must give one score per candidate ({len(candidates)}), got {len(found)}")
    for candidate, score in zip(candidates, found, strict=True):
        if not math.isfinite(score):
            raise ValueError(f"judge must give finite scores, got {score} for {candidate!r}")
    return found


@dataclass(frozen=True)
class TokenF1:
    """F1 of the words that candidate and reference share, counted as often as both have them; in [0, 1].

    Parameters
    ----------
    tokenize : text to tokens.
    """

    tokenize: Callable[[str], Sequence[Hashable]] = words

    def __call__(self, candidate: str, reference: str) -> float:
        """Score one candidate."""
        ours, theirs = Counter(self.tokenize(candidate)), Counter(self.tokenize(reference))
        return _f_score((ours & theirs).total(), ours.total(), theirs.total())


@dataclass(frozen=True)
class RougeL:
    """ROUGE-L: F1 of the longest common subsequence of words, which rewards their order; in [0, 1].

    Reference: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.

    Parameters
    ----------
    tokenize : text to tokens.
    """

    tokenize: Callable[[str], Sequence[Hashable]] = words

    def __call__(self, candidate: str, reference: str) -> float:
        """Score one candidate."""
        ours, theirs = self.tokenize(candidate), self.tokenize(reference)
        return _f_score(common_subsequence(ours, theirs), len(ours), len(theirs))


def common_subsequence(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, a row of the usual table at a time in the bits of one integer.

    Reference: Hyyrö, "Bit-Parallel LCS-length Computation Revisited", 2004.
    """
    places: dict[Hashable, int] = {}
    for place, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << place
    everywhere = (1 << len(first)) - 1
    row = everywhere  # a 0 bit where the length grows by one
    for token in second:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & everywhere
    return len(first) - row.bit_count()


@dataclass(frozen=True)
class CharacterF:
    """chrF: F score of character n-grams, averaged over n, blanks left out; forgives inflections; in [0, 1].

    Reference: Popović, "chrF: character n-gram F-score for automatic MT evaluation", 2015.

    Parameters
    ----------
    order : longest n-grams, at least 1. Lengths that one of the texts does not reach are left out.
    beta : recall counts beta times as much as precision, above 0.
    """

    order: int = 6
    beta: float = 2.0

    def __post_init__(self) -> None:
        check_integer("order", self.order, at_least=1)
        check_number("beta", self.beta, above=0)

    def __call__(self, candidate: str, reference: str) -> float:
        """Score one candidate."""
        ours, theirs = _BLANKS.sub("", candidate), _BLANKS.sub("", reference)
        lengths = range(1, min(self.order, len(ours), len(theirs)) + 1)
        if not lengths:
            return float(ours == theirs)
        shared = [(_ngrams(ours, n) & _ngrams(theirs, n)).total() for n in lengths]
        precision = sum(count / (len(ours) - n + 1) for n, count in zip(lengths, shared, strict=True)) / len(lengths)
        recall = sum(count / (len(theirs) - n + 1) for n, count in zip(lengths, shared, strict=True)) / len(lengths)
        if not any(shared):
            return 0.0
        return (1 + self.beta**2) * precision * recall / (self.beta**2 * precision + recall)


@dataclass(frozen=True)
class LabelF1:
    """F1 of the labels that an extractor finds in candidate and reference; 1 where neither has any; in [0, 1].

    Parameters
    ----------
    extract : text to its labels; repetitions do not count.
    """

    extract: Callable[[str], Collection[Hashable]]

    def __call__(self, candidate: str, reference: str) -> float:
        """Score one candidate."""
        ours, theirs = set(self.extract(candidate)), set(self.extract(reference))
        return _f_score(len(ours & theirs), len(ours), len(theirs))


@dataclass(frozen=True)
class LengthControlled:
    """A judge that longer texts must earn, ``judge / max(v, floor)`` with v = words of candidate / words of reference.

    The floor of 1 gives no bonus for brevity.

    Parameters
    ----------
    judge : with scores of at least 0: division would raise negative ones.
    count : text to the units of its length, a list of words for example.
    floor : above 0.
    """

    judge: Judge
    count: Callable[[str], Sized] = str.split
    floor: float = 1.0

    def __post_init__(self) -> None:
        check_number("floor", self.floor, above=0)

    def __call__(self, candidate: str, reference: str) -> float:
        """Score one candidate.

        Raises
        ------
        ValueError : the reference has length 0, or the judge's score is negative.
        """
        return self.scores([candidate], [reference])[0]

    def scores(self, candidates: Sequence[str], references: Sequence[str]) -> list[float]:
        """Score many candidates; errors as for one."""
        return self.controlled(judge_scores(self.judge, candidates, references), candidates, references)

    def controlled(self, plain: Sequence[float], candidates: Sequence[str], references: Sequence[str]) -> list[float]:
        """Length-controlled scores from plain ones; errors as for one."""
        for reference in references:
            if not len(self.count(reference)):
                raise ValueError(f"reference must not be empty, got {reference!r}")
        if min(plain, default=0.0) < 0:
            raise ValueError(f"judge must give scores of at least 0 to be length-controlled, got {min(plain):g}")
        verbosity = [
            len(self.count(candidate)) / len(self.count(reference))
            for candidate, reference in zip(candidates, references, strict=True)
        ]
        return [score / max(v, self.floor) for score, v in zip(plain, verbosity, strict=True)]


@dataclass(frozen=True)
class LanguageModelJudge:
    """A language model that is asked for a number.

    Parameters
    ----------
    generate : prompts to the model's answers, any client or pipeline.
    template : the prompt, with ``{candidate}`` and ``{reference}`` where the texts go.
    low, high : ends of the scale that `template` asks for, mapped to 0 and 1; low below high.
    """

    generate: Callable[[list[str]], Sequence[str]]
    template: str = (
        "Reference:\n{reference}\n\nCandidate:\n{candidate}\n\n"
        "How faithful is the candidate to the reference, from 0 (contradicts it) to 10 (says the same, no more and no "
        "less)? Answer with the number alone."
    )
    low: float = 0.0
    high: float = 10.0

    def __post_init__(self) -> None:
        check_number("low", self.low, below=check_number("high", self.high))
        for field in ("{candidate}", "{reference}"):
            if field not in self.template:
                raise ValueError(f"template must contain {field}, got {self.template!r}")

    def __call__(self, candidate: str, reference: str) -> float:
        """Score one candidate.

        Raises
        ------
        ValueError : the answer has no number on the scale.
        """
        return self.scores([candidate], [reference])[0]

    def scores(self, candidates: Sequence[str], references: Sequence[str]) -> list[float]:
        """Score many candidates with one call of `generate`; errors as for one."""
        prompts = [
            # not str.format: the template may hold other braces, and the texts any
            self.template.replace("{reference}", "\0").replace("{candidate}", candidate).replace("\0", reference)
            for candidate, reference in zip(candidates, references, strict=True)
        ]
        return [self._number(answer) for answer in self.generate(prompts)]

    def _number(self, answer: str) -> float:
        found = _NUMBER.search(answer)
        if found is None or not self.low <= float(found.group()) <= self.high:
            raise ValueError(f"the judge's answer must be a number from {self.low:g} to {self.high:g}, got {answer!r}")
        return (float(found.group()) - self.low) / (self.high - self.low)


def _f_score(shared: int, ours: int, theirs: int) -> float:
    """Harmonic mean of shared / ours and shared / theirs; 1 where both are empty."""
    return 2.0 * shared / (ours + theirs) if ours + theirs else 1.0


def _ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[start : start + n] for start in range(len(text) - n + 1))
