"""Compiled loops: products with a few columns, losses row by row, block Hessians, the block's problem."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

SQUARES, LOGISTIC, SOFTMAX = 0, 1, 2

# Reassociation lets the reductions use vector instructions; NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract"}


# --- rows of a loss ------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def row_losses(
    kind: int,
    rows: np.ndarray,
    margins: np.ndarray,
    target: np.ndarray,
    values: np.ndarray,
    slopes: np.ndarray,
    change: np.ndarray,
) -> None:
    """Set `values` and `slopes` of the given rows to phi and phi'; `change[k]` is by how much row k's slopes moved.

    SQUARES: phi(z) = (z - b)^2 / 2. LOGISTIC: log(1 + exp(-b z)). SOFTMAX: log sum_k exp(z_k) - z_b.
    """
    classes = margins.shape[1]
    for k in range(rows.shape[0]):
        i = rows[k]
        if kind == SQUARES:
            slope = margins[i, 0] - target[i]
            values[i] = 0.5 * slope * slope
            change[k, 0] = slope - slopes[i, 0]
            slopes[i, 0] = slope
        elif kind == LOGISTIC:
            agreement = target[i] * margins[i, 0]
            decay = math.exp(-abs(agreement))
            values[i] = math.log1p(decay) + max(0.0, -agreement)
            slope = -target[i] * (decay if agreement > 0.0 else 1.0) / (1.0 + decay)
            change[k, 0] = slope - slopes[i, 0]
            slopes[i, 0] = slope
        else:
            label = int(target[i])
            largest = margins[i, 0]
            for c in range(1, classes):
                largest = max(largest, margins[i, c])
            total = 0.0
            for c in range(classes):
                total += math.exp(margins[i, c] - largest)
            values[i] = math.log(total) + (largest - margins[i, label])
            for c in range(classes):
                slope = math.exp(margins[i, c] - largest) / total - (1.0 if c == label else 0.0)
                change[k, c] = slope - slopes[i, c]
                slopes[i, c] = slope


# --- products with a sparse matrix ---------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def add_columns(
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    features: np.ndarray,
    classes: np.ndarray,
    step: np.ndarray,
    margins: np.ndarray,
    marked: np.ndarray,
    touched: np.ndarray,
) -> int:
    """Add A[:, features] step to the margins of the classes; list the rows touched and return their number.

    `marked` is all False before and after.
    """
    count = 0
    for k in range(features.shape[0]):
        if step[k] == 0.0:
            continue
        c, d = classes[k], step[k]
        for p in range(indptr[features[k]], indptr[features[k] + 1]):
            i = indices[p]
            margins[i, c] += data[p] * d
            if not marked[i]:
                marked[i] = True
                touched[count] = i
                count += 1
    for k in range(count):
        marked[touched[k]] = False
    return count


@njit(cache=True, nogil=True)
def add_rows(
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    rows: np.ndarray,
    weights: np.ndarray,
    out: np.ndarray,
) -> None:
    """out += A[rows].T @ weights, A by rows."""
    single = weights.shape[1] == 1
    for k in range(rows.shape[0]):
        i = rows[k]
        if single:
            w = weights[k, 0]
            for p in range(indptr[i], indptr[i + 1]):
                out[indices[p], 0] += data[p] * w
        else:
            for p in range(indptr[i], indptr[i + 1]):
                a, target = data[p], out[indices[p]]
                for c in range(weights.shape[1]):
                    target[c] += a * weights[k, c]


@njit(cache=True, nogil=True, fastmath=_FAST)
def transposed_product(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, weights: np.ndarray, out: np.ndarray
) -> None:
    """out = A.T @ weights, A by columns."""
    if weights.shape[1] == 1:
        single = weights[:, 0]
        for j in range(indptr.shape[0] - 1):
            total = 0.0
            for p in range(indptr[j], indptr[j + 1]):
                total += data[p] * single[indices[p]]
            out[j, 0] = total
        return
    out[:] = 0.0
    for j in range(indptr.shape[0] - 1):
        target = out[j]
        for p in range(indptr[j], indptr[j + 1]):
            a, row = data[p], weights[indices[p]]
            for c in range(weights.shape[1]):
                target[c] += a * row[c]


@njit(cache=True, nogil=True, fastmath=_FAST)
def column_squares(indptr: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Squared norms of the columns of A, stored by columns."""
    squares = np.zeros(indptr.shape[0] - 1)
    for j in range(squares.shape[0]):
        for p in range(indptr[j], indptr[j + 1]):
            squares[j] += data[p] * data[p]
    return squares


@njit(cache=True, nogil=True)
def absolute_gram_sums(
    by_column: tuple[np.ndarray, np.ndarray, np.ndarray], by_row: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> np.ndarray:
    """sum_j |A^T A|_ij for every i."""
    column_ptr, column_rows, column_data = by_column
    row_ptr, row_columns, row_data = by_row
    n = column_ptr.shape[0] - 1
    sums, column = np.zeros(n), np.zeros(n)
    for i in range(n):
        for p in range(column_ptr[i], column_ptr[i + 1]):
            r, a = column_rows[p], column_data[p]
            for q in range(row_ptr[r], row_ptr[r + 1]):
                column[row_columns[q]] += a * row_data[q]
        for j in range(n):
            sums[i] += abs(column[j])
            column[j] = 0.0
    return sums


@njit(cache=True, nogil=True)
def block_hessian(
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    features: np.ndarray,
    classes: np.ndarray,
    curvature: np.ndarray,
    coupled: bool,
) -> np.ndarray:
    """sum_i curvature of row i times A[i, features]^T A[i, features], by rows: sum_i r_i^2 for r_i entries a row.

    The weight of the pair of classes (c, e) in row i is p_c where c = e, 0 elsewhere, and, where `coupled`, minus
    p_c p_e; p is row i of `curvature`.
    """
    m, size = curvature.shape[0], features.shape[0]
    start = np.zeros(m + 1, np.int64)
    for k in range(size):
        for p in range(indptr[features[k]], indptr[features[k] + 1]):
            start[indices[p] + 1] += 1
    for i in range(m):
        start[i + 1] += start[i]
    members, entries = np.empty(start[m], np.int64), np.empty(start[m])
    for k in range(size):
        for p in range(indptr[features[k]], indptr[features[k] + 1]):
            place = start[indices[p]]
            members[place], entries[place] = k, data[p]
            start[indices[p]] += 1  # ends as the start of the next row
    H = np.zeros((size, size))
    first = 0
    for i in range(m):
        for s in range(first, start[i]):
            k = members[s]
            pc = curvature[i, classes[k]]
            for t in range(first, s + 1):
                other = members[t]
                weight = pc if classes[k] == classes[other] else 0.0
                if coupled:
                    weight -= pc * curvature[i, classes[other]]
                H[k, other] += weight * entries[s] * entries[t]
        first = start[i]
    for k in range(size):
        for other in range(k):
            H[other, k] = H[k, other]
    return H


# --- a symmetric sparse matrix -------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def add_symmetric_columns(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, block: np.ndarray, step: np.ndarray, out: np.ndarray
) -> None:
    """out += A[:, block] @ step, A symmetric."""
    for k in range(block.shape[0]):
        d = step[k]
        if d != 0.0:
            for p in range(indptr[block[k]], indptr[block[k] + 1]):
                out[indices[p]] += data[p] * d


@njit(cache=True, nogil=True)
def symmetric_block(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, block: np.ndarray, place: np.ndarray
) -> np.ndarray:
    """A[block][:, block] as a dense array; `place` is all -1 before and after."""
    H = np.zeros((block.shape[0], block.shape[0]))
    for k in range(block.shape[0]):
        place[block[k]] = k
    for k in range(block.shape[0]):
        for p in range(indptr[block[k]], indptr[block[k] + 1]):
            other = place[indices[p]]
            if other >= 0:
                H[k, other] = data[p]
    for k in range(block.shape[0]):
        place[block[k]] = -1
    return H


# --- the block problem ---------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _coordinate_minimiser(y: float, slope: float, h: float, l1: float, nonnegative: bool) -> float:
    u = y - slope / h
    if nonnegative:
        return max(u, 0.0)
    if l1 > 0.0:
        return math.copysign(max(abs(u) - l1 / h, 0.0), u)
    return u


@njit(cache=True, nogil=True, fastmath=_FAST)
def matrix_sweeps(
    H: np.ndarray,
    y: np.ndarray,
    slope: np.ndarray,
    l1: np.ndarray,
    nonnegative: bool,
    sweeps: int,
) -> float:
    """See `model.BlockModel.sweep`; `slope` is the gradient at y, kept up to date."""
    worst = 0.0
    for _ in range(sweeps):
        worst = 0.0
        for i in range(y.shape[0]):
            h = H[i, i]
            if h <= 0.0:
                continue
            move = _coordinate_minimiser(y[i], slope[i], h, l1[i], nonnegative) - y[i]
            if move != 0.0:
                worst = max(worst, h * abs(move))
                y[i] += move
                row = H[i]
                for j in range(y.shape[0]):
                    slope[j] += move * row[j]
        if worst == 0.0:
            break
    return worst


@njit(cache=True, nogil=True)
def column_sweeps(
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    block: np.ndarray,
    weights: np.ndarray,
    diagonal: np.ndarray,
    g: np.ndarray,
    l2: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    rows: np.ndarray,
    l1: np.ndarray,
    nonnegative: bool,
    sweeps: int,
) -> float:
    """See `model.BlockModel.sweep`; `rows` is A_b (y - x), kept up to date."""
    worst = 0.0
    for _ in range(sweeps):
        worst = 0.0
        for k in range(block.shape[0]):
            h = diagonal[k]
            if h <= 0.0:
                continue
            slope = g[k] + l2[k] * (y[k] - x[k])
            for p in range(indptr[block[k]], indptr[block[k] + 1]):
                slope += data[p] * weights[indices[p]] * rows[indices[p]]
            move = _coordinate_minimiser(y[k], slope, h, l1[k], nonnegative) - y[k]
            if move != 0.0:
                worst = max(worst, h * abs(move))
                y[k] += move
                for p in range(indptr[block[k]], indptr[block[k] + 1]):
                    rows[indices[p]] += data[p] * move
        if worst == 0.0:
            break
    return worst


@njit(cache=True, nogil=True)
def weighted_squares(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, block: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """sum_i weights_i a_ij^2 for the columns j of the block."""
    sums = np.zeros(block.shape[0])
    for k in range(block.shape[0]):
        for p in range(indptr[block[k]], indptr[block[k] + 1]):
            sums[k] += weights[indices[p]] * data[p] * data[p]
    return sums


@njit(cache=True, nogil=True)
def some_products(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, block: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """A[:, block].T @ v."""
    sums = np.zeros(block.shape[0])
    for k in range(block.shape[0]):
        for p in range(indptr[block[k]], indptr[block[k] + 1]):
            sums[k] += data[p] * v[indices[p]]
    return sums


@njit(cache=True, nogil=True)
def combination(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, block: np.ndarray, step: np.ndarray, rows: int
) -> np.ndarray:
    """A[:, block] @ step."""
    out = np.zeros(rows)
    for k in range(block.shape[0]):
        for p in range(indptr[block[k]], indptr[block[k] + 1]):
            out[indices[p]] += data[p] * step[k]
    return out
