"""Resolvents (Id + eta G)^{-1} of the usual constraints and penalties, with signature ``(v, eta)``.

Any callable of that signature serves the solvers; the classes here are also known to the compiled loops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from workingpapers.common.validation import check_integer, check_number
from workingpapers.optimization.halpern._kernels import BOX, IDENTITY, L1, SIMPLEX_PAIR, Resolvent

Vector = Float[np.ndarray, " d"]
Prox = Callable[[Vector, float], Vector]

_UNUSED = np.empty(0)


def simplex_prox(v: Vector, eta: float = 1.0) -> Vector:
    """Project v on the probability simplex {x >= 0, sum x = 1}; eta plays no part in a projection."""
    descending = np.sort(v)[::-1]
    excess = np.cumsum(descending) - 1.0
    support = np.count_nonzero(descending * np.arange(1, len(v) + 1) > excess)
    projected: Vector = np.maximum(v - excess[support - 1] / support, 0.0)
    return projected


def identity_prox(v: Vector, eta: float = 1.0) -> Vector:
    """The resolvent of G = 0."""
    return np.array(v)


@dataclass(frozen=True, eq=False)
class BoxProx:
    """Projection on the box low <= u <= high.

    Parameters
    ----------
    low, high : numbers, or arrays of shape (d,); infinite bounds are allowed, low <= high.
    """

    low: float | Vector
    high: float | Vector

    def __post_init__(self) -> None:
        if not np.all(np.asarray(self.low) <= np.asarray(self.high)):
            raise ValueError(f"low must be at most high, got low={self.low!r}, high={self.high!r}")

    def __call__(self, v: Vector, eta: float = 1.0) -> Vector:
        clipped: Vector = np.clip(v, self.low, self.high)
        return clipped

    def compiled(self, dimension: int) -> Resolvent:
        low, high = (np.broadcast_to(np.asarray(bound, float), dimension).copy() for bound in (self.low, self.high))
        return Resolvent(BOX, low, high, 0.0, 0)


@dataclass(frozen=True)
class L1Prox:
    """Soft threshold, the resolvent of the subdifferential of weight * ||u||_1, weight >= 0."""

    weight: float

    def __post_init__(self) -> None:
        check_number("weight", self.weight, at_least=0.0)

    def __call__(self, v: Vector, eta: float = 1.0) -> Vector:
        shrunk: Vector = np.sign(v) * np.maximum(np.abs(v) - eta * self.weight, 0.0)
        return shrunk

    def compiled(self, dimension: int) -> Resolvent:
        return Resolvent(L1, _UNUSED, _UNUSED, float(self.weight), 0)


@dataclass(frozen=True)
class SimplexPairProx:
    """Projection on two probability simplices: the first `split` coordinates on one, the others on the other."""

    split: int

    def __post_init__(self) -> None:
        check_integer("split", self.split, at_least=1)

    def __call__(self, v: Vector, eta: float = 1.0) -> Vector:
        if self.split >= len(v):
            raise ValueError(f"split must be below the dimension {len(v)}, got {self.split}")
        return np.concatenate([simplex_prox(v[: self.split]), simplex_prox(v[self.split :])])

    def compiled(self, dimension: int) -> Resolvent:
        return Resolvent(SIMPLEX_PAIR, _UNUSED, _UNUSED, 0.0, self.split)


def compiled_prox(prox: Prox, dimension: int) -> Resolvent | None:
    """The form of `prox` that the compiled loops read; None for a callable they do not know."""
    if prox is identity_prox:
        return Resolvent(IDENTITY, _UNUSED, _UNUSED, 0.0, 0)
    return prox.compiled(dimension) if isinstance(prox, BoxProx | L1Prox | SimplexPairProx) else None
