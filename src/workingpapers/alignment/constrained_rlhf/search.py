"""Thresholds found in one run: Nelder-Mead on the thresholds while the policy goes on training."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from workingpapers.common.validation import check_finite, check_integer, check_number


@dataclass(frozen=True)
class SearchResult:
    """What a threshold search found.

    Attributes
    ----------
    thresholds, value : the best ones, and their evaluation.
    simplex, values : the last simplex, best first, and its evaluations.
    evaluations : calls of `evaluate`; proposals answered from memory are not counted.
    converged : whether the values of the simplex came within `tol`.
    """

    thresholds: Float[np.ndarray, " rewards"]
    value: float
    simplex: Float[np.ndarray, "points rewards"]
    values: Float[np.ndarray, " points"]
    evaluations: int
    converged: bool


class ThresholdSearch:
    """Maximise an evaluation over thresholds, without derivatives.

    Nelder-Mead with reflection 1, expansion 2, contraction 1/2 and shrinking 1/2. Each proposal continues the training
    of one policy towards the new thresholds (`train_until`) and evaluates it. The evaluation must come from a
    validation split: the search fits it.

    Use `run`, or `ask` for thresholds and `tell` their evaluation yourself.

    Parameters
    ----------
    train_until : called with thresholds; trains until the returns are near them or a share of the budget is used.
        None when `ask` and `tell` are used.
    evaluate : called without arguments after it; one number, higher is better. None likewise.
    simplex : N + 1 starting thresholds, not in one plane; see `starting_simplex`.
    cache_within : a proposal of which no coordinate is further than this from an evaluated one takes its value.
    tol : stop when the standard deviation of the simplex's values is below this.

    Raises
    ------
    ValueError : the simplex is not (N + 1, N), not finite, or flat.
    """

    def __init__(
        self,
        train_until: Callable[[np.ndarray], Any] | None,
        evaluate: Callable[[], float] | None,
        simplex: Float[np.ndarray, "points rewards"],
        *,
        cache_within: float = 0.005,
        tol: float = 0.01,
    ) -> None:
        points = np.array(simplex, dtype=float)
        if points.ndim != 2 or points.shape[0] != points.shape[1] + 1:
            raise ValueError(f"simplex must have shape (N + 1, N), got {points.shape}")
        check_finite("simplex", points)
        if np.linalg.matrix_rank(points[1:] - points[0]) < points.shape[1]:
            raise ValueError("simplex must not be flat: its points lie in one plane")
        self.train_until, self.evaluate = train_until, evaluate
        self.cache_within = check_number("cache_within", cache_within, at_least=0)
        self.tol = check_number("tol", tol, at_least=0)
        self.converged = False
        self._seen: list[tuple[np.ndarray, float]] = []
        self._points, self._values = points, np.full(len(points), -np.inf)
        self._steps = self._search()
        self._proposal: np.ndarray | None = next(self._steps)

    def ask(self) -> Float[np.ndarray, " rewards"] | None:
        """The thresholds to try next; None when the search has converged."""
        return None if self._proposal is None else self._proposal.copy()

    def tell(self, value: float) -> None:
        """The evaluation of the thresholds that `ask` gave.

        Raises
        ------
        TypeError, ValueError : it is not a finite number, or the search has ended.
        """
        if self._proposal is None:
            raise ValueError("the search has converged: there is nothing to tell")
        value = check_number("the evaluation", value)
        self._seen.append((self._proposal, value))
        try:
            self._proposal = self._steps.send(value)
        except StopIteration:
            self._proposal = None

    def run(self, max_evaluations: int = 50) -> SearchResult:
        """Train and evaluate until the search converges or has used its evaluations."""
        limit = check_integer("max_evaluations", max_evaluations, at_least=1)
        if self.train_until is None or self.evaluate is None:
            raise ValueError("run needs train_until and evaluate")
        while (thresholds := self.ask()) is not None and len(self._seen) < limit:
            self.train_until(thresholds)
            self.tell(self.evaluate())
        return self.result()

    def result(self) -> SearchResult:
        """The state of the search.

        Raises
        ------
        ValueError : nothing has been evaluated.
        """
        if not self._seen:
            raise ValueError("nothing has been evaluated")
        best, value = max(self._seen, key=lambda seen: seen[1])
        order = np.argsort(-self._values)
        return SearchResult(
            best.copy(), value, self._points[order], self._values[order], len(self._seen), self.converged
        )

    def _search(self) -> Generator[np.ndarray, float, None]:
        points, values = self._points, self._values

        def value_of(point: np.ndarray) -> Generator[np.ndarray, float, float]:
            for known, value in self._seen:
                if (np.abs(known - point) < self.cache_within).all():
                    return value
            return (yield point)

        for place in range(len(points)):
            values[place] = yield from value_of(points[place].copy())
        while True:
            order = np.argsort(-values, kind="stable")
            points[:], values[:] = points[order], values[order]
            if values.std() < self.tol:
                self.converged = True
                return
            centre, worst = points[:-1].mean(0), points[-1].copy()
            reflected = 2.0 * centre - worst
            value = yield from value_of(reflected)
            if value > values[0]:
                expanded = centre + 2.0 * (reflected - centre)
                further = yield from value_of(expanded)
                points[-1], values[-1] = (expanded, further) if further > value else (reflected, value)
            elif value > values[-2]:
                points[-1], values[-1] = reflected, value
            else:
                contracted = centre + 0.5 * (worst - centre)
                value = yield from value_of(contracted)
                if value > values[-1]:
                    points[-1], values[-1] = contracted, value
                else:
                    for place in range(1, len(points)):
                        points[place] = points[0] + 0.5 * (points[place] - points[0])
                        values[place] = yield from value_of(points[place].copy())


def starting_simplex(
    start: Float[np.ndarray, " rewards"], highest: Float[np.ndarray, " rewards"], *, random_state: int = 0
) -> Float[np.ndarray, "points rewards"]:
    """N + 1 uniform draws between the returns of the initial policy and the highest that can be reached.

    Raises
    ------
    ValueError : the two are not finite vectors of one length, or they agree in a coordinate.
    """
    low, high = np.asarray(start, dtype=float), np.asarray(highest, dtype=float)
    if low.ndim != 1 or low.shape != high.shape or not len(low):
        raise ValueError(f"start and highest must be vectors of one length, got shapes {low.shape} and {high.shape}")
    check_finite("start", low)
    check_finite("highest", high)
    if (low == high).any():
        raise ValueError("start and highest must differ in each coordinate")
    rng = np.random.default_rng(random_state)
    return np.asarray(low + (high - low) * rng.random((len(low) + 1, len(low))))
