"""The compiled root search behind the envelope and its proximal operator."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numba import njit

SAMPLE = 9  # breakpoints of which the median is the pivot


@njit(cache=True)
def clipped_roots(
    slopes: Float[np.ndarray, "batch m"], offsets: Float[np.ndarray, " m"], k: int
) -> Float[np.ndarray, " batch"]:
    """For each row a of `slopes`, the r at which sum_j clip(r a_j - c_j, 0, 1) = k, c being `offsets`.

    Infinite where at most k slopes are positive. Expected time is linear in m, whatever the values: the search halves
    the set of breakpoints around a random pivot, as quickselect does, and keeps only the sums of what is settled.
    """
    roots = np.empty(len(slopes))
    for row in range(len(slopes)):
        roots[row] = _root(slopes[row], offsets, k)
    return roots


@njit(cache=True)
def shrink_factors(
    norms: Float[np.ndarray, "batch m"], d: Float[np.ndarray, " m"], lam: float, k: int
) -> Float[np.ndarray, "batch m"]:
    """The factors u / (u + lam d) of the proximal operator, for groups of these norms."""
    factors = np.empty_like(norms)
    a = np.empty(norms.shape[1])
    c = lam * d
    for row in range(len(norms)):
        largest = 0.0
        for j in range(len(a)):
            a[j] = np.sqrt(d[j]) * norms[row, j]
            largest = max(largest, a[j])
        if largest > 0.0:
            a /= largest  # u = clip(r a - c, 0, 1) is the same in any unit of a, and in this one nothing overflows
        r = _root(a, c, k)
        for j in range(len(a)):
            u = min(max(r * a[j] - c[j], 0.0), 1.0) if np.isfinite(r) else 1.0
            factors[row, j] = u / (u + c[j])
    return factors


@njit(cache=True)
def _root(slopes: Float[np.ndarray, " m"], offsets: Float[np.ndarray, " m"], k: int) -> float:
    a = np.empty(len(slopes))
    c = np.empty(len(slopes))
    left = 0  # groups with a breakpoint strictly inside (low, high), kept at the front of a and c
    for j in range(len(slopes)):
        if slopes[j] > 0.0:
            a[left] = slopes[j]
            c[left] = offsets[j]
            left += 1
    if left <= k:
        return np.inf
    low, high = 0.0, np.inf
    ones, slope, offset = 0, 0.0, 0.0  # of the settled groups: those at 1, and the sums over those on their slope
    state = np.uint64(left)
    drawn = np.empty(SAMPLE)
    while left > 0:
        size = SAMPLE if left > SAMPLE else 1
        for i in range(size):
            state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            picked = np.int64((state >> np.uint64(33)) % np.uint64(left))
            start, end = c[picked] / a[picked], (1.0 + c[picked]) / a[picked]
            heads = (state >> np.uint64(32)) & np.uint64(1)
            drawn[i] = end if low < end < high and (start <= low or heads) else start
        pivot = np.sort(drawn[:size])[size // 2]
        total = ones + slope * pivot - offset
        for j in range(left):
            total += min(max(pivot * a[j] - c[j], 0.0), 1.0)
        if total < k:
            low = pivot
        else:
            high = pivot
        kept = 0
        for j in range(left):
            start, end = c[j] / a[j], (1.0 + c[j]) / a[j]
            if end <= low:
                ones += 1
            elif start <= low and end >= high:
                slope += a[j]
                offset += c[j]
            elif start < high:
                a[kept] = a[j]
                c[kept] = c[j]
                kept += 1
        left = kept
    if slope == 0.0:
        return low
    return min(max((k - ones + offset) / slope, low), high)
