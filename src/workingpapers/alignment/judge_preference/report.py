"""What alignment to a judge did besides raising its score: longer texts, other metrics, unrelated tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats

from workingpapers.alignment.judge_preference.judges import Judge, LengthControlled, judge_scores
from workingpapers.common.validation import check_finite, check_number


@dataclass(frozen=True)
class VerbosityReport:
    """How long the texts of a model are before and after alignment; lengths in words, means over texts.

    Attributes
    ----------
    words_before, words_after, words_reference : mean lengths.
    verbosity_before, verbosity_after : relative to the references, ratios of the mean lengths.
    growth : `verbosity_after` minus `verbosity_before`.
    growth_interval : 95 % interval of `growth` (the same inputs before and after, Student's t); infinite for one text.
    relative_to_before : mean length after over mean length before.
    judge_before, judge_after : mean score; None without a judge.
    controlled_before, controlled_after : mean length-controlled score; None without a judge. Where the judge rises and
        this does not, the gain is length.
    """

    words_before: float
    words_after: float
    words_reference: float
    verbosity_before: float
    verbosity_after: float
    growth: float
    growth_interval: tuple[float, float]
    relative_to_before: float
    judge_before: float | None = None
    judge_after: float | None = None
    controlled_before: float | None = None
    controlled_after: float | None = None


def verbosity_report(
    before: Sequence[str],
    after: Sequence[str],
    references: Sequence[str],
    *,
    judge: Judge | None = None,
    count: Callable[[str], Sized] = str.split,
) -> VerbosityReport:
    """Compare lengths, and scores with and without control of length, of texts for the same inputs.

    Parameters
    ----------
    before, after : texts of the model before and after alignment, sampled alike, one per input.
    references : the reference texts.
    judge : with scores of at least 0; its plain and its length-controlled mean are reported.
    count : text to the units of its length.

    Raises
    ------
    ValueError : there are no texts, not one of each for every input, a reference is empty, or a score is negative.
    """
    if not len(references) or not len(before) == len(after) == len(references):
        raise ValueError(
            "before, after and references must have one text per input, at least one, "
            f"got {len(before)}, {len(after)}, {len(references)}"
        )
    lengths = np.array([[len(count(text)) for text in texts] for texts in (before, after, references)], dtype=float)
    if not lengths[2].all():
        raise ValueError("references must not be empty")
    words_before, words_after, words_reference = lengths.mean(1).tolist()
    change = _Mean.of((lengths[1] - lengths[0]) / words_reference)
    scores: dict[str, float] = {}
    if judge is not None:
        controlled = LengthControlled(judge, count)
        for name, texts in (("before", before), ("after", after)):
            plain = judge_scores(judge, texts, references)
            scores[f"judge_{name}"] = float(np.mean(plain))
            scores[f"controlled_{name}"] = float(np.mean(controlled.controlled(plain, texts, references)))
    return VerbosityReport(
        words_before,
        words_after,
        words_reference,
        verbosity_before=words_before / words_reference,
        verbosity_after=words_after / words_reference,
        growth=change.mean,
        growth_interval=change.interval(),
        relative_to_before=words_after / words_before if words_before else math.inf,
        **scores,
    )


@dataclass(frozen=True)
class JudgeOveroptimization:
    """Whether a metric that did not make the pairs follows the judge that did.

    Attributes
    ----------
    judge_gain, heldout_gain : last minus first checkpoint.
    heldout_interval : 95 % interval of `heldout_gain` over examples; None where only means were given.
    best : checkpoint with the best held-out mean, from 0.
    lost_since_best : held-out mean at `best` minus that of the last checkpoint, at least 0.
    rank_correlation : Spearman's, of the means over checkpoints; NaN for two or fewer, or where a mean never changes.
    overoptimized : the judge rose from `best` to the last checkpoint while the held-out mean fell.
    """

    judge_gain: float
    heldout_gain: float
    heldout_interval: tuple[float, float] | None
    best: int
    lost_since_best: float
    rank_correlation: float
    overoptimized: bool


def overoptimization_report(judge_scores: ArrayLike, heldout_scores: ArrayLike) -> JudgeOveroptimization:
    """Compare the judge with a held-out metric over the checkpoints of a run, the first one before alignment.

    Parameters
    ----------
    judge_scores, heldout_scores : means, shape (checkpoints,), or scores of the same examples at all checkpoints, shape
        (checkpoints, examples); at least two checkpoints, higher is better.

    Raises
    ------
    ValueError : shapes do not fit, or a score is not finite.
    """
    judged, heldout = _checkpoints("judge_scores", judge_scores), _checkpoints("heldout_scores", heldout_scores)
    if len(judged) != len(heldout):
        raise ValueError(f"heldout_scores must have {len(judged)} checkpoints like judge_scores, got {len(heldout)}")
    judge_means, means = (scores.reshape(len(scores), -1).mean(1) for scores in (judged, heldout))
    best = int(means.argmax())
    lost = float(means[best] - means[-1])
    changing = len(means) > 2 and np.ptp(means) > 0 and np.ptp(judge_means) > 0
    return JudgeOveroptimization(
        judge_gain=float(judge_means[-1] - judge_means[0]),
        heldout_gain=float(means[-1] - means[0]),
        heldout_interval=_Mean.of(heldout[-1] - heldout[0]).interval() if heldout.ndim == 2 else None,
        best=best,
        lost_since_best=lost,
        rank_correlation=float(stats.spearmanr(judge_means, means).statistic) if changing else math.nan,
        overoptimized=lost > 0 and bool(judge_means[-1] > judge_means[best]),
    )


@dataclass(frozen=True)
class TaskChange:
    """What alignment did to a task it was not meant for.

    Attributes
    ----------
    before, after : mean scores.
    change : `after` minus `before`.
    interval : of `change`, at the level of the report over all its tasks together (Bonferroni).
    worse : the interval is below 0: a tax.
    """

    before: float
    after: float
    change: float
    interval: tuple[float, float]
    worse: bool


@dataclass(frozen=True)
class AlignmentTax:
    """The alignment tax: what unrelated tasks lost.

    Attributes
    ----------
    tasks : by name.
    change : mean over tasks.
    """

    tasks: Mapping[str, TaskChange]
    change: float

    @property
    def taxed(self) -> tuple[str, ...]:
        """Tasks that are worse beyond chance."""
        return tuple(name for name, task in self.tasks.items() if task.worse)


def alignment_tax(
    before: Mapping[str, ArrayLike], after: Mapping[str, ArrayLike], *, level: float = 0.95
) -> AlignmentTax:
    """Compare scores on unrelated tasks before and after alignment.

    Parameters
    ----------
    before, after : task to its scores, one per example, of the same examples in the same order; at least two each,
        higher is better.
    level : probability with which all intervals hold together, in (0, 1). That an interval contains 0 means that a tax
        larger than it was not found, not that there is none.

    Raises
    ------
    ValueError : tasks or numbers of examples differ, there are none, or a score is not finite.
    """
    level = check_number("level", level, above=0, below=1)
    if not before or before.keys() != after.keys():
        raise ValueError(f"after must have the tasks of before, at least one, got {sorted(before)}, {sorted(after)}")
    tasks = {}
    for name in before:
        first, last = _examples(f"before[{name!r}]", before[name]), _examples(f"after[{name!r}]", after[name])
        if len(first) != len(last):
            raise ValueError(f"after[{name!r}] must have {len(first)} scores like before, got {len(last)}")
        difference = _Mean.of(last - first)
        interval = difference.interval(1.0 - (1.0 - level) / len(before))
        tasks[name] = TaskChange(
            float(first.mean()), float(last.mean()), difference.mean, interval, worse=interval[1] < 0
        )
    return AlignmentTax(tasks, float(np.mean([task.change for task in tasks.values()])))


@dataclass(frozen=True)
class _Mean:
    """A mean with its standard error."""

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Float[np.ndarray, " n"]) -> _Mean:
        error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        return cls(float(values.mean()), error, len(values))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's t interval."""
        half = float(stats.t.ppf(0.5 + level / 2, self.count - 1)) * self.error if self.count > 1 else math.inf
        return self.mean - half, self.mean + half


def _checkpoints(name: str, values: ArrayLike) -> Float[np.ndarray, ...]:
    scores = np.asarray(values, dtype=float)
    if scores.ndim not in (1, 2) or len(scores) < 2 or not scores.size:
        raise ValueError(
            f"{name} must have shape (checkpoints,) or (checkpoints, examples), two checkpoints or more, "
            f"got {scores.shape}"
        )
    check_finite(name, scores)
    return scores


def _examples(name: str, values: ArrayLike) -> Float[np.ndarray, " examples"]:
    scores = np.asarray(values, dtype=float)
    if scores.ndim != 1 or len(scores) < 2:
        raise ValueError(f"{name} must have shape (examples,) with two examples or more, got {scores.shape}")
    check_finite(name, scores)
    return scores
