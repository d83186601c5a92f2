"""The largest entries of a vector that is only ever seen in pieces: exact selection in a few passes.

The magnitudes of IEEE numbers are ordered as their bit patterns are, so the k-th largest is found by radix selection,
16 bits in a pass: two passes for float32, four for float64, whatever the number of entries, and 512 kB of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64, UInt
from numba import njit

from workingpapers.federated.compeft.coding import Ternary, TernaryCode, TernaryEncoder

Piece = Float[np.ndarray, " entries"]
Pieces = Callable[[], Iterator[tuple[str, Piece]]]  # each call walks over the vector again: (name, piece), ...

DIGIT = 16


@dataclass(frozen=True)
class Selection:
    """Which entries of a vector to keep, and how large it is.

    Attributes
    ----------
    size : number of entries, d.
    kept : how many entries are kept.
    threshold : bit pattern of the smallest magnitude that is kept.
    ties : how many of the entries of exactly that magnitude are kept, those of the lowest index.
    deviation : standard deviation of all d entries about their mean, divisor d - 1.
    """

    size: int
    kept: int
    threshold: int
    ties: int
    deviation: float


def select(pieces: Pieces, size: int, density: float, itemsize: int) -> Selection:
    """Find the floor(density * size) entries of largest magnitude; zeros are never kept.

    Parameters
    ----------
    pieces : the vector; walked over two or four times.
    size : number of entries of all pieces together, at least 2.
    itemsize : 4 for float32, 8 for float64, the same in all pieces.

    Raises
    ------
    ValueError : an entry is not finite; the message names its piece.
    """
    moments = _Moments()
    kept, prefix, rank = 0, 0, 0
    for shift in range(8 * itemsize - DIGIT, -1, -DIGIT):
        histogram = np.zeros(1 << DIGIT, dtype=np.int64)
        for name, piece in pieces():
            if moments.count < size:
                moments.add(name, piece)
            _count_digit(_pattern(piece), prefix, shift, histogram)
        if moments.count == size and kept == 0:
            kept = rank = min(int(density * size), moments.nonzero)
            if kept == 0:
                break
        # at_least[i] entries have a digit of i or more; the rank-th largest has the last digit with rank or more
        at_least = histogram[::-1].cumsum()[::-1]
        digit = int(np.flatnonzero(at_least >= rank)[-1])
        rank -= int(at_least[digit] - histogram[digit])
        prefix = prefix << DIGIT | digit
    return Selection(size, kept, prefix, rank, moments.deviation)


def ternarise(pieces: Pieces, chosen: Selection) -> Iterator[tuple[str, Ternary, float]]:
    """Piece by piece its name, gamma * 1[mu in top-k], and the sum of the magnitudes that are kept.

    The integers are overwritten by those of the next piece.
    """
    ties = np.array([chosen.ties])
    buffer = np.empty(0, dtype=np.int8)
    for name, piece in pieces():
        if len(buffer) < len(piece):
            buffer = np.empty(len(piece), dtype=np.int8)
        ternary = buffer[: len(piece)]
        if chosen.kept == 0:
            ternary[:] = 0
            yield name, ternary, 0.0
        else:
            yield name, ternary, _keep(piece, _pattern(piece), chosen.threshold, ties, ternary)


def encode(pieces: Pieces, chosen: Selection, sizes: Mapping[str, int]) -> tuple[TernaryCode, float]:
    """The code of the ternary vector with one segment for each name, and the mean magnitude of the entries kept."""
    nonzero = dict.fromkeys(sizes, 0)
    mass = 0.0
    for name, ternary, kept in ternarise(pieces, chosen):
        nonzero[name] += int(np.count_nonzero(ternary))
        mass += kept
    encoder = TernaryEncoder((size, nonzero[name]) for name, size in sizes.items())
    for _, ternary, _ in ternarise(pieces, chosen):
        encoder.write(ternary)
    return encoder.finish(), mass / max(1, chosen.kept)


class _Moments:
    """Mean and sum of squared deviations in float64, and the number of non-zeros, merged piece by piece.

    Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983, equation (1.5).
    """

    def __init__(self) -> None:
        self.count, self.nonzero, self.mean, self.squares = 0, 0, 0.0, 0.0

    def add(self, name: str, piece: Piece) -> None:
        if not len(piece):
            return
        if not np.isfinite(piece).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
        count = len(piece)
        mean, squares = _moments(piece)
        delta, total = mean - self.mean, self.count + count
        self.squares += squares + delta * delta * self.count * count / total
        self.mean += delta * count / total
        self.count = total
        self.nonzero += int(np.count_nonzero(piece))

    @property
    def deviation(self) -> float:
        return float(np.sqrt(self.squares / (self.count - 1)))


def _pattern(piece: Piece) -> UInt[np.ndarray, " entries"]:
    return piece.view(np.uint32 if piece.itemsize == 4 else np.uint64)


@njit(cache=True)
def _moments(piece: Piece) -> tuple[float, float]:
    total = 0.0
    for value in piece:
        total += np.float64(value)
    mean = total / len(piece)
    squares = 0.0
    for value in piece:
        squares += (np.float64(value) - mean) ** 2
    return mean, squares


@njit(cache=True)
def _count_digit(
    pattern: UInt[np.ndarray, " entries"], prefix: int, shift: int, histogram: Int64[np.ndarray, " digits"]
) -> None:
    """Count the digit at bit `shift` of the magnitudes whose higher bits are `prefix`."""
    unsigned = np.uint64((1 << (8 * pattern.itemsize - 1)) - 1)  # without the sign bit
    low, wanted = np.uint64(shift), np.uint64(prefix)
    for bits in pattern:
        upper = (np.uint64(bits) & unsigned) >> low
        if upper >> np.uint64(DIGIT) == wanted:
            histogram[upper & np.uint64((1 << DIGIT) - 1)] += 1


@njit(cache=True)
def _keep(
    piece: Piece,
    pattern: UInt[np.ndarray, " entries"],
    threshold: int,
    ties: Int64[np.ndarray, " one"],
    ternary: Ternary,
) -> float:
    unsigned = np.uint64((1 << (8 * pattern.itemsize - 1)) - 1)
    least, left = np.uint64(threshold), ties[0]
    mass = 0.0
    for i in range(len(piece)):
        magnitude = np.uint64(pattern[i]) & unsigned
        if magnitude < least or (magnitude == least and left == 0):
            ternary[i] = 0
            continue
        if magnitude == least:
            left -= 1
        ternary[i] = 1 if piece[i] > 0 else -1
        mass += abs(np.float64(piece[i]))
    ties[0] = left
    return mass
