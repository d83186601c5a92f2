"""Extending a user's description until it determines the user's labels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from jaxtyping import Int

from workingpapers.common.validation import check_integer

Persona = TypeVar("Persona")
Pair = TypeVar("Pair")
Label = Literal[0, 1]


@dataclass(frozen=True)
class Refinement(Generic[Persona]):
    """A description that has grown with the questions it was asked.

    Attributes
    ----------
    persona : the final description.
    labels : of all pairs under the final description; -1 where even that leaves the choice open.
    added : the pairs, by place, whose label was open when they were met and now is part of the description.
    relabelled : the pairs, by place, on which the final description says something else than was said on the way.
    """

    persona: Persona
    labels: Int[np.ndarray, " pairs"]
    added: tuple[int, ...]
    relabelled: tuple[int, ...]


def refine(
    persona: Persona,
    pairs: Sequence[Pair],
    decide: Callable[[Persona, Pair], Label | None],
    extend: Callable[[Persona, Pair, Label], Persona],
    *,
    random_state: int = 0,
) -> Refinement[Persona]:
    """Make a description decide every pair.

    A description of a few lines leaves most choices open; labels found with it contradict each other, and no number of
    examples tells what the next one will be. So, for each pair in turn: if the description does not decide, choose a
    side at random and add to the description what that choice says about the user. At the end all pairs are labelled
    anew under the final description, since what was added later may bear on earlier pairs.

    Parameters
    ----------
    persona : what `decide` and `extend` understand as a description, often text; not modified.
    pairs : what the user is asked, in this order.
    decide : maps (description, pair) to 0 (the first response), 1 (the second), or None where it cannot be told.
    extend : maps (description, pair, label) to a longer description from which that label follows.
    random_state : decides the open choices.

    Raises
    ------
    ValueError : there are no pairs, or `decide` returns something else.

    Warns
    -----
    RuntimeWarning : some pairs are open under the final description: `extend` did not settle them.
    """
    if not len(pairs):
        raise ValueError("pairs must hold at least one pair")
    rng = np.random.default_rng(check_integer("random_state", random_state, at_least=0))
    met: list[int] = []
    added: list[int] = []
    for place, pair in enumerate(pairs):
        label = _decided(decide, persona, pair, place)
        if label is None:
            label = 1 if rng.random() < 0.5 else 0
            persona = extend(persona, pair, label)
            added.append(place)
        met.append(label)
    final = [_decided(decide, persona, pair, place) for place, pair in enumerate(pairs)]
    labels = np.array([-1 if label is None else label for label in final])
    open_pairs = int((labels == -1).sum())
    if open_pairs:
        warnings.warn(
            f"the final description leaves {open_pairs} of {len(labels)} pairs open: does extend add what decide "
            "reads?",
            RuntimeWarning,
            stacklevel=2,
        )
    changed = tuple(np.flatnonzero((labels != met) & (labels != -1)).tolist())
    return Refinement(persona, labels, tuple(added), changed)


def _decided(decide: Callable[[Persona, Pair], Label | None], persona: Persona, pair: Pair, place: int) -> Label | None:
    label = decide(persona, pair)
    if label not in (0, 1, None):
        raise ValueError(f"decide must return 0, 1 or None, got {label!r} for pair {place}")
    return label
