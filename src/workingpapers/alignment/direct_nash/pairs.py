"""From judgements to training pairs: ranking by win rates, large margins, replay (Algorithm 2 of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from workingpapers.alignment.direct_nash.tabular import borda_scores
from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number

KINDS = ("teacher>student", "student>teacher", "student>student")

_ROUNDING = 1e-9  # of averages of win rates

Item = TypeVar("Item")


class WinRateRanker:
    """Score the answers to a prompt by how often each wins against the others.

    Parameters
    ----------
    prefer : the judge, any preference, also one that goes in circles. Called as ``prefer(prompt, y, z)``; returns
        whether y is preferred to z (bool), or the probability of that, in [0, 1].
    symmetrize : ask in both orders and average, (P(y, z) + 1 - P(z, y)) / 2, which removes the judge's position bias.
        False asks half as often: only in the order in which the candidates stand.
    batched : `prefer` takes three equally long lists, prompts, ys and zs, and returns one judgement for each. All
        comparisons of a call of `preferences` are then made in one call, as a model that judges needs it.

    Examples
    --------
    >>> shorter = WinRateRanker(lambda prompt, y, z: 0.5 * (len(y) < len(z)) + 0.5 * (len(y) <= len(z)))
    >>> shorter("Say hello.", ["Hello!", "Hi!", "Good day!"])
    array([0.5, 1. , 0. ])
    """

    def __init__(self, prefer: Callable[..., Any], symmetrize: bool = True, *, batched: bool = False) -> None:
        if not callable(prefer):
            raise TypeError(f"prefer must be callable, got {prefer!r}")
        self.prefer, self.symmetrize, self.batched = prefer, symmetrize, batched

    def __call__(self, prompt: Any, candidates: Sequence[Any]) -> Float[np.ndarray, " candidates"]:
        """Average win rate of every candidate against the others, itself left out.

        Parameters
        ----------
        prompt : handed to the judge.
        candidates : at least two answers, of any type that the judge takes and ``==`` compares.

        Raises
        ------
        ValueError : fewer than two candidates, or a judgement outside [0, 1].
        """
        return borda_scores(self.preferences([prompt], [candidates])[0])

    def preferences(
        self, prompts: Sequence[Any], candidates: Sequence[Sequence[Any]]
    ) -> list[Float[np.ndarray, "candidates candidates"]]:
        """For every prompt the table of preferences between its candidates, ready for `nash_policy`.

        Equal candidates tie without the judge being asked.

        Parameters
        ----------
        prompts : handed to the judge.
        candidates : of each prompt, at least two.

        Raises
        ------
        ValueError : fewer than two candidates, lists of different lengths, or a judgement outside [0, 1].
        """
        if len(prompts) != len(candidates):
            raise ValueError(f"candidates must be one list per prompt, got {len(candidates)} for {len(prompts)}")
        asked = []
        for row, answers in enumerate(candidates):
            if len(answers) < 2:
                raise ValueError(f"candidates of prompt {row} must be at least 2, got {len(answers)}")
            for y in range(len(answers)):
                for z in range(y + 1, len(answers)):
                    if answers[y] != answers[z]:
                        asked += [(row, y, z), (row, z, y)] if self.symmetrize else [(row, y, z)]
        judged = self._judge([(prompts[row], candidates[row][y], candidates[row][z]) for row, y, z in asked])
        tables = [np.full((len(answers), len(answers)), 0.5) for answers in candidates]
        step = 2 if self.symmetrize else 1
        for place in range(0, len(asked), step):
            row, y, z = asked[place]
            share = 0.5 * (judged[place] + 1.0 - judged[place + 1]) if self.symmetrize else judged[place]
            tables[row][y, z], tables[row][z, y] = share, 1.0 - share
        return tables

    def _judge(self, comparisons: list[tuple[Any, Any, Any]]) -> Float[np.ndarray, " comparisons"]:
        if not comparisons:
            return np.zeros(0)
        if self.batched:
            answers = self.prefer(*(list(column) for column in zip(*comparisons, strict=True)))
        else:
            answers = [self.prefer(*comparison) for comparison in comparisons]
        judged = np.asarray(answers, dtype=float)
        if judged.shape != (len(comparisons),):
            raise ValueError(f"prefer must return {len(comparisons)} judgements, got shape {judged.shape}")
        fine = (judged >= 0) & (judged <= 1)  # not so for NaN
        if not fine.all():
            raise ValueError(f"prefer must return a bool or a probability, got {judged[~fine][0]}")
        return judged


@dataclass(frozen=True)
class PairSelection:
    """The pairs of a round, and what was left out.

    Attributes
    ----------
    pairs : rows of prompt, winner and loser as places in the scores; at most all ordered pairs of each prompt.
    counts : pairs of every allowed kind, for example ``{"teacher>student": 3}``.
    skipped : prompts without a pair, by reason: "tied" (all scores equal), "no_positive" (nobody may win), and
        "small_margin" (no allowed pair is far enough apart).
    """

    pairs: Int[np.ndarray, "n 3"]
    counts: dict[str, int]
    skipped: dict[str, int]


def build_pairs(
    scores: Float[np.ndarray, "prompts candidates"],
    source: Sequence[Any],
    *,
    margin: float,
    student_margin: float | None = None,
    min_positive: float | None = None,
    allow: Sequence[str] = KINDS,
    automatic_negatives: Bool[np.ndarray, "prompts candidates"] | None = None,
) -> PairSelection:
    """Keep the pairs of answers whose scores are far apart.

    The paper, with scores from 1 to 6: margin 2, student_margin 1, min_positive 5. With win rates about 0.15 to 0.25.
    DNO-Restrictive is ``allow=["teacher>student"]``; SPIN is the same with scores that let the teacher always win.

    Parameters
    ----------
    scores : of every candidate, higher is better, finite.
    source : "teacher" or "student", one per candidate, or one per prompt and candidate.
    margin : by how much the winner must lead, at least 0; exactly that much is enough. Equal scores make no pair.
    student_margin : the same where the winner is a student; `margin` when None.
    min_positive : the least score with which an answer may win; None: any.
    allow : which winners and losers are paired.
    automatic_negatives : answers that never win, and lose to every possible winner whatever their scores, for example
        because they repeat themselves (`ngram_repetition`).

    Raises
    ------
    ValueError : an argument is out of range, not finite or of the wrong shape.
    """
    values = np.asarray(scores, dtype=float)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"scores must have shape (prompts, candidates) with at least 2 candidates, got {values.shape}")
    check_finite("scores", values)
    margin = check_number("margin", margin, at_least=0)
    for_student = margin if student_margin is None else check_number("student_margin", student_margin, at_least=0)
    least = -np.inf if min_positive is None else check_number("min_positive", min_positive)
    for kind in allow:
        check_choice("allow", kind, KINDS)
    sources = np.asarray(source)
    if sources.shape not in (values.shape, values.shape[1:]):
        raise ValueError(f"source must have shape {values.shape} or {values.shape[1:]}, got {sources.shape}")
    if not np.isin(sources, ("teacher", "student")).all():
        raise ValueError(f"source must be 'teacher' or 'student', got {np.unique(sources).tolist()}")
    student = np.broadcast_to(sources == "student", values.shape)
    negative = np.zeros(values.shape, dtype=bool)
    if automatic_negatives is not None:
        negative = np.asarray(automatic_negatives, dtype=bool)
        if negative.shape != values.shape:
            raise ValueError(f"automatic_negatives must have shape {values.shape}, got {negative.shape}")

    may_win = (values >= least - _ROUNDING) & ~negative
    lead = values[:, :, None] - values[:, None, :]
    needed = np.where(student, for_student, margin)[:, :, None]
    far = (lead >= needed - _ROUNDING) & (lead > _ROUNDING)
    of_kind = {
        "teacher>student": ~student[:, :, None] & student[:, None, :],
        "student>teacher": student[:, :, None] & ~student[:, None, :],
        "student>student": student[:, :, None] & student[:, None, :],
    }
    accepted = may_win[:, :, None] & (far | negative[:, None, :])
    kept = {kind: accepted & of_kind[kind] for kind in allow}
    chosen = np.logical_or.reduce(list(kept.values())) if kept else np.zeros_like(accepted)

    without = ~chosen.any((1, 2))
    tied = without & (np.ptp(values, axis=1) <= _ROUNDING)
    no_positive = without & ~tied & ~may_win.any(1)
    return PairSelection(
        np.argwhere(chosen),
        {kind: int(pairs.sum()) for kind, pairs in kept.items()},
        {
            "tied": int(tied.sum()),
            "no_positive": int(no_positive.sum()),
            "small_margin": int((without & ~tied & ~no_positive).sum()),
        },
    )


def ngram_repetition(tokens: Sequence[Any], n: int = 4) -> float:
    """Share of the n-grams of an answer that stand in it earlier already, in [0, 1); 0 when it is shorter than n."""
    n = check_integer("n", n, at_least=1)
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class ReplayMix:
    """Mix pairs of earlier rounds into those of the newest, fewer the older they are.

    Attributes
    ----------
    decay : factor from one round to the one before it, in [0, 1].
    first : share of the last round's pairs that is used again, in [0, 1]; that of the k-th last is
        ``first * decay ** (k - 1)``. Paper: 30 %, 15 %, ...
    random_state : decides which ones.
    """

    decay: float = 0.5
    first: float = 0.30
    random_state: int = 0

    def __post_init__(self) -> None:
        check_number("decay", self.decay, at_least=0, at_most=1)
        check_number("first", self.first, at_least=0, at_most=1)
        check_integer("random_state", self.random_state, at_least=0)

    def __call__(self, rounds: Sequence[Sequence[Item]]) -> list[Item]:
        """All items of the last round, then shares of the earlier ones, drawn without replacement.

        Parameters
        ----------
        rounds : the items of each round, the oldest first; at least one round.
        """
        if not rounds:
            raise ValueError("rounds must hold at least one round")
        mixed = list(rounds[-1])
        for age, earlier in enumerate(reversed(rounds[:-1]), start=1):
            count = int(self.first * self.decay ** (age - 1) * len(earlier) + _ROUNDING)  # at most this share
            rng = np.random.default_rng([self.random_state, len(rounds), age])
            mixed += [earlier[place] for place in rng.choice(len(earlier), size=count, replace=False)]
        return mixed
