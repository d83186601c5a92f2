"""How many pairs a method needs: the score as a function of the data, and where it reaches a target."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from workingpapers.common.validation import check_integer, check_number

Trained = TypeVar("Trained")


@dataclass(frozen=True)
class DataEfficiency:
    """A curve of scores over numbers of pairs.

    Attributes
    ----------
    sizes : numbers of pairs, increasing.
    scores : what `evaluate` gave for each, higher is better.
    target : the score asked for.
    pairs : pairs needed to reach the target for good, see `pairs_needed`; infinite where the curve ends below it.
    """

    sizes: tuple[int, ...]
    scores: tuple[float, ...]
    target: float
    pairs: float

    @property
    def reached(self) -> bool:
        """Whether the largest size reaches the target."""
        return math.isfinite(self.pairs)

    def saving_over(self, other: DataEfficiency) -> float:
        """How many times the pairs of this method the `other` one needs; above 1 this one is cheaper.

        Infinite where only this one reaches the target, 0 where only the other one does, NaN where neither does.

        Raises
        ------
        ValueError : the targets differ.
        """
        if other.target != self.target:
            raise ValueError(f"other must have the same target {self.target:g}, got {other.target:g}")
        if not self.reached:
            return 0.0 if other.reached else math.nan
        return other.pairs / self.pairs


def data_efficiency(
    train_fn: Callable[[int], Trained],
    sizes: Sequence[int],
    evaluate: Callable[[Trained], float],
    target: float,
) -> DataEfficiency:
    """Train at several data sizes and find how many pairs a target score takes.

    Parameters
    ----------
    train_fn : trains from the start on this many pairs and returns whatever `evaluate` takes. For several seeds train
        and average inside, or average curves and call `pairs_needed`.
    sizes : numbers of pairs, at least 1, strictly increasing.
    evaluate : the score of a trained model, finite, higher is better: a win rate, a reward, an accuracy.
    target : the score to reach.

    Raises
    ------
    ValueError : the sizes do not increase, or a score or the target is not finite.
    """
    counts = _checked_sizes(sizes)
    target = check_number("target", target)
    scores = tuple(check_number(f"evaluate's score at {size} pairs", evaluate(train_fn(size))) for size in counts)
    return DataEfficiency(counts, scores, target, pairs_needed(counts, scores, target))


def pairs_needed(sizes: Sequence[int], scores: Sequence[float], target: float) -> float:
    """The number of pairs from which on the score stays at the target or above.

    Between two sizes the score is taken to be linear in the logarithm of the size. A curve that dips below the target
    again counts from its last crossing, so that one lucky run does not.

    Parameters
    ----------
    sizes : numbers of pairs, at least 1, strictly increasing.
    scores : one per size, finite, higher is better.
    target : the score to reach.

    Returns
    -------
    A number between the first and the last size; infinity where the last score is below the target.

    Raises
    ------
    ValueError : the sizes do not increase, there is not one score per size, or a value is not finite.
    """
    counts = _checked_sizes(sizes)
    if len(scores) != len(counts):
        raise ValueError(f"scores must be one per size, got {len(scores)} for {len(counts)} sizes")
    values = np.array([check_number("scores", score) for score in scores])
    target = check_number("target", target)
    below = np.flatnonzero(values < target)
    if not below.size:
        return float(counts[0])
    last = int(below[-1])
    if last == len(counts) - 1:
        return math.inf
    share = (target - values[last]) / (values[last + 1] - values[last])
    return float(counts[last] * (counts[last + 1] / counts[last]) ** share)


def _checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    counts = tuple(check_integer("sizes", size, at_least=1) for size in sizes)
    if not counts or any(later <= earlier for earlier, later in itertools.pairwise(counts)):
        raise ValueError(f"sizes must hold increasing numbers of pairs, got {list(counts)}")
    return counts
