"""Golomb-Rice code of a sparse ternary vector, written and read in pieces by compiled loops.

The vector is described by its marks: the non-zeros, or the zeros where those are rarer. Each mark costs the number of
unmarked entries before it (the gap), in unary above the low `shift` bits; each non-zero costs one more bit for its
sign, in a stream of its own. Every tensor is a segment with a density and a `shift` of its own, because a threshold
for all tensors together leaves some of them dense and others nearly empty. With independent entries the gaps are
geometric, and for those the code is the best prefix code up to its restriction to powers of two: Golomb, "Run-Length
Encodings", 1966; Gallager and van Voorhis, "Optimal Source Codes for Geometrically Distributed Integer Alphabets",
1975.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int8, UInt64
from numba import njit

Ternary = Int8[np.ndarray, " entries"]
Words = UInt64[np.ndarray, " words"]

MAX_SHIFT = 62  # a mark's low bits and its stop bit fit into one word


def byte_count(bits: int) -> int:
    """Bytes that hold so many bits."""
    return -(-bits // 8)


def entropy_bits(size: int, nonzero: int) -> float:
    """Entropy of `size` independent ternary entries, a share k = nonzero / size of them non-zero with random signs.

    d * H(k) = -d * [(1 - k) log2(1 - k) + k log2(k / 2)] bits; no code does better on average.
    """
    kept = nonzero / size if size else 0.0
    zeros = (1 - kept) * math.log2(1 - kept) if kept < 1 else 0.0
    signs = kept * math.log2(kept / 2) if kept > 0 else 0.0
    return -size * (zeros + signs)


def rice_shift(marks: int, size: int) -> int:
    """The number b* of low bits that makes the code of gaps between `marks` of `size` entries shortest.

    b* = max(0, 1 + floor(log2(ln(phi - 1) / ln(1 - p)))) with p = marks / size and the golden ratio phi.
    """
    if marks == 0 or marks == size:
        return 0
    golden = (1 + math.sqrt(5)) / 2
    best = 1 + math.floor(math.log2(math.log(golden - 1) / math.log1p(-marks / size)))
    return min(max(0, best), MAX_SHIFT)


class Segment(NamedTuple):
    """A stretch of entries with a density, and so a code, of its own: one tensor.

    Attributes
    ----------
    size : number of entries.
    nonzero : how many of them are -1 or 1.
    shift : low bits of each gap, b*.
    """

    size: int
    nonzero: int
    shift: int

    def check(self) -> None:
        """Raise ValueError when no vector has such a stretch."""
        if not (0 <= self.nonzero <= self.size < 2**62 and 0 <= self.shift <= MAX_SHIFT):
            raise ValueError(f"no stretch of a packed vector is {self}")

    @property
    def marks_zeros(self) -> bool:
        """Whether the marks are the zeros: so above a density of one half, where these are the rarer kind."""
        return 2 * self.nonzero > self.size

    @property
    def marks(self) -> int:
        """How many entries are marked."""
        return min(self.nonzero, self.size - self.nonzero)


@dataclass(frozen=True, eq=False)
class TernaryCode:
    """A ternary vector in little more than its entropy.

    Attributes
    ----------
    segments : its stretches, one after the other.
    bits : length of the gap code in bits.
    gaps : the gap code, least significant bit first, zero beyond `bits`.
    signs : one bit for each non-zero, 1 for negative, least significant bit first.
    """

    segments: tuple[Segment, ...]
    bits: int
    gaps: Words
    signs: Words

    @property
    def size(self) -> int:
        """Number of entries, d."""
        return sum(segment.size for segment in self.segments)

    @property
    def nonzero(self) -> int:
        """How many entries are -1 or 1."""
        return sum(segment.nonzero for segment in self.segments)

    def payload(self) -> tuple[memoryview, memoryview]:
        """The bytes of the gap code and of the signs, not copied."""
        return _bytes(self.gaps, self.bits), _bytes(self.signs, self.nonzero)

    @classmethod
    def from_payload(cls, segments: tuple[Segment, ...], bits: int, gaps: memoryview, signs: memoryview) -> TernaryCode:
        """Read a code back and walk once through it; nothing longer than the bytes themselves is allocated.

        Raises
        ------
        ValueError : these bytes are not the code of any vector with such segments, or there are no such segments.
        """
        for segment in segments:
            segment.check()
        code = cls(segments, bits, _words(gaps), _words(signs))
        if len(gaps) != byte_count(bits) or len(signs) != byte_count(code.nonzero):
            raise ValueError(f"{len(gaps)} + {len(signs)} bytes are not {bits} bits of gaps and {code.nonzero} signs")
        at = 0
        for segment in segments:
            at = _end_of_gaps(code.gaps, at, segment.marks, segment.shift, segment.size)
            if not 0 <= at <= bits:
                raise ValueError(f"the gap code does not describe {segment}")
        if at != bits or not (_padding_is_zero(gaps, bits) and _padding_is_zero(signs, code.nonzero)):
            raise ValueError(f"the gap code does not describe {code.nonzero} non-zeros among {code.size} entries")
        return code

    def chunks(self, lengths: Iterable[int]) -> Iterator[Ternary]:
        """The vector from its start, in consecutive pieces of the given lengths."""
        state = np.array([0, 0, 0, -1])  # bits read, signs read, marks read, entries before the next mark
        left, remaining = 0, iter(self.segments)
        for length in lengths:
            piece = np.empty(length, dtype=np.int8)
            filled = 0
            while filled < length:
                while left == 0:
                    segment = next(remaining)
                    left, state[2], state[3] = segment.size, 0, -1
                part = piece[filled : filled + left]
                _read(
                    self.gaps,
                    self.signs,
                    segment.marks_zeros,
                    segment.shift,
                    segment.size,
                    segment.marks,
                    state,
                    part,
                )
                filled += len(part)
                left -= len(part)
            yield piece


class TernaryEncoder:
    """Writes a ternary vector into a `TernaryCode`, piece by piece.

    Parameters
    ----------
    counts : size and number of non-zeros of each segment.
    """

    def __init__(self, counts: Iterable[tuple[int, int]]) -> None:
        self.segments = tuple(
            Segment(size, nonzero, rice_shift(min(nonzero, size - nonzero), size)) for size, nonzero in counts
        )
        # The unary parts of a segment add up to at most (size - marks) / 2^shift bits: its gaps add up to size - marks.
        longest = sum(
            segment.marks * (1 + segment.shift) + ((segment.size - segment.marks) >> segment.shift)
            for segment in self.segments
        )
        self.gaps = _empty_words(longest)
        self.signs = _empty_words(sum(segment.nonzero for segment in self.segments))
        self.state = np.zeros(3, dtype=np.int64)  # bits written, signs written, entries since the last mark
        self.left, self.signed, self.remaining = 0, 0, iter(self.segments)

    def write(self, ternary: Ternary) -> None:
        """Append the next entries; ValueError where a segment turns out to have other numbers than were announced."""
        written = 0
        while written < len(ternary):
            while self.left == 0:
                self.current = next(self.remaining)
                self.left, self.signed, self.state[2] = self.current.size, int(self.state[1]), 0
            part = ternary[written : written + self.left]
            fits = _write(part, self.current.marks_zeros, self.current.shift, self.gaps, self.signs, self.state)
            written += len(part)
            self.left -= len(part)
            nonzero = int(self.state[1]) - self.signed
            if not fits or (self.left == 0 and nonzero != self.current.nonzero):
                raise ValueError(f"a stretch announced as {self.current} has another number of non-zeros")

    def finish(self) -> TernaryCode:
        """The code, when every entry has been written."""
        bits = int(self.state[0])
        return TernaryCode(self.segments, bits, self.gaps[: len(_empty_words(bits))], self.signs)


def encode(ternary: Ternary) -> TernaryCode:
    """The code of a whole vector, in one segment."""
    encoder = TernaryEncoder([(len(ternary), int(np.count_nonzero(ternary)))])
    encoder.write(ternary)
    return encoder.finish()


def masks(code: TernaryCode, piece: int) -> tuple[Words, Words]:
    """Where the vector is positive and where it is negative: one bit for each entry, 64 in a word."""
    positive, negative = (np.zeros(-(-code.size // 64), dtype=np.uint64) for _ in range(2))
    starts = range(0, code.size, piece)
    ternaries = code.chunks(min(piece, code.size - first) for first in starts)
    for first, ternary in zip(starts, ternaries, strict=True):
        _set_bits(ternary, first, positive, negative)
    return positive, negative


def _empty_words(bits: int) -> Words:
    return np.zeros(bits // 64 + 2, dtype=np.uint64)  # one word to spare: a field may be written across two


def _bytes(words: Words, bits: int) -> memoryview:
    return words.astype("<u8", copy=False).view(np.uint8)[: byte_count(bits)].data


def _words(data: memoryview) -> Words:
    words = np.zeros(len(data) // 8 + 2, dtype="<u8")
    words.view(np.uint8)[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    return words.astype(np.uint64, copy=False)


def _padding_is_zero(data: memoryview, bits: int) -> bool:
    return bits % 8 == 0 or data[-1] >> (bits % 8) == 0


@njit(cache=True)
def _write(
    ternary: np.ndarray, marks_zeros: bool, shift: int, gaps: np.ndarray, signs: np.ndarray, state: np.ndarray
) -> bool:
    """Append entries; False when there are more marks or signs than there is room for."""
    at, signed, gap = state[0], state[1], state[2]
    one = np.uint64(1)
    for value in ternary:
        if value != 0:
            if signed >> 6 >= len(signs):
                return False
            if value < 0:
                signs[signed >> 6] |= one << np.uint64(signed & 63)
            signed += 1
        if (value == 0) != marks_zeros:
            gap += 1
            continue
        at += gap >> shift  # the quotient in unary: zeros, already there, up to the stop bit
        if at + shift >= 64 * (len(gaps) - 1):
            return False
        field = one | np.uint64(gap & ((1 << shift) - 1)) << one
        offset = np.uint64(at & 63)
        gaps[at >> 6] |= field << offset
        if (at & 63) + shift + 1 > 64:
            gaps[(at >> 6) + 1] |= field >> (np.uint64(64) - offset)
        at += shift + 1
        gap = 0
    state[0], state[1], state[2] = at, signed, gap
    return True


@njit(cache=True)
def _next_gap(gaps: np.ndarray, at: int, shift: int, size: int) -> tuple[int, int]:
    """The gap whose code starts at bit `at`, and the bit after it: -1 where the words end or the gap exceeds size."""
    start, word = at, at >> 6
    if word >= len(gaps):
        return 0, -1
    rest = gaps[word] >> np.uint64(at & 63)
    while rest == 0:
        word += 1
        if word >= len(gaps):
            return 0, -1
        at = word << 6
        rest = gaps[word]
    while rest & np.uint64(1) == 0:
        rest >>= np.uint64(1)
        at += 1
    quotient = at - start
    at += 1
    if quotient > size >> shift:
        return 0, -1
    if shift == 0:
        return quotient, at
    word, offset = at >> 6, np.uint64(at & 63)
    if at + shift > 64 * len(gaps):
        return 0, -1
    low = gaps[word] >> offset
    if (at & 63) + shift > 64:
        low |= gaps[word + 1] << (np.uint64(64) - offset)
    low &= (np.uint64(1) << np.uint64(shift)) - np.uint64(1)
    return (quotient << shift) | int(low), at + shift


@njit(cache=True)
def _read(
    gaps: np.ndarray,
    signs: np.ndarray,
    marks_zeros: bool,
    shift: int,
    size: int,
    marks: int,
    state: np.ndarray,
    ternary: np.ndarray,
) -> None:
    at, signed, read, gap = state
    filled = 0
    while filled < len(ternary):
        if gap < 0:  # the gap before the next mark; after the last mark no other comes before the end
            gap = size
            if read < marks:
                gap, at = _next_gap(gaps, at, shift, size)
                read += 1
        unmarked = min(gap, len(ternary) - filled)
        gap -= unmarked
        with_mark = 1 if filled + unmarked < len(ternary) else 0
        if marks_zeros:
            signed = _read_signs(signs, signed, ternary[filled : filled + unmarked])
            ternary[filled + unmarked : filled + unmarked + with_mark] = 0
        else:
            ternary[filled : filled + unmarked] = 0
            signed = _read_signs(signs, signed, ternary[filled + unmarked : filled + unmarked + with_mark])
        gap -= with_mark
        filled += unmarked + with_mark
    state[0], state[1], state[2], state[3] = at, signed, read, gap


@njit(cache=True)
def _read_signs(signs: np.ndarray, signed: int, ternary: np.ndarray) -> int:
    for i in range(len(ternary)):
        negative = (signs[signed >> 6] >> np.uint64(signed & 63)) & np.uint64(1)
        ternary[i] = 1 - 2 * np.int8(negative)
        signed += 1
    return signed


@njit(cache=True)
def _end_of_gaps(gaps: np.ndarray, at: int, marks: int, shift: int, size: int) -> int:
    """The bit after `marks` gaps that start at bit `at`; -1 where they do not stay inside `size` entries."""
    entries = 0
    for _ in range(marks):
        gap, at = _next_gap(gaps, at, shift, size)
        if at < 0 or gap >= size - entries:
            return -1
        entries += gap + 1
    return at


@njit(cache=True)
def _set_bits(ternary: np.ndarray, first: int, positive: np.ndarray, negative: np.ndarray) -> None:
    for i in range(len(ternary)):
        bit = np.uint64(1) << np.uint64((first + i) & 63)
        if ternary[i] > 0:
            positive[(first + i) >> 6] |= bit
        elif ternary[i] < 0:
            negative[(first + i) >> 6] |= bit
