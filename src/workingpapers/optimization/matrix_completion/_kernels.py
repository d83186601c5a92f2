"""Compiled loops over the rows of a sparse matrix: one small least-squares problem for each.

Row i of the unknown factor solves min_x |A x - b|^2 + ridge |x|^2, where A holds the rows of the other factor at the
entries observed in row i and b their values. All loops release the GIL, so that threads share the rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

NORMAL, QR, CG, SKETCH = 0, 1, 2, 3
COUNTSKETCH, SRHT = 0, 1

# Reassociation lets the reductions use vector instructions; NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract"}


class Plan(NamedTuple):
    """How the rows are solved.

    Attributes
    ----------
    method : NORMAL, QR, CG or SKETCH.
    sketch : COUNTSKETCH or SRHT.
    sketch_rows : rows of the sketch S A; problems with no more rows than this are solved by normal equations.
    ridge : weight of |x|^2.
    relative, floor : iterations stop once the preconditioned gradient is at most max(relative * its norm at the
        start, floor).
    max_steps : of conjugate gradients.
    seed : of the sketches; the sketch of row i depends on it and on i alone.
    """

    method: int
    sketch: int
    sketch_rows: int
    ridge: float
    relative: float
    floor: float
    max_steps: int
    seed: int


@njit(cache=True, nogil=True)
def _mix(state: np.uint64) -> np.uint64:
    """A bijection of the 64-bit integers whose outputs on a counter look random (finaliser of SplitMix64)."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True, nogil=True, fastmath=_FAST)
def _dot(x: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    for m in range(x.shape[0]):
        total += x[m] * y[m]
    return total


@njit(cache=True, nogil=True, fastmath=_FAST)
def _gram(A: np.ndarray, rows: int, G: np.ndarray) -> None:
    """Set the lower triangle of G to that of A^T A, over the first rows of A, four at a time."""
    k = A.shape[1]
    G[:] = 0
    whole = rows - rows % 4
    for i in range(0, whole, 4):
        a, b, c, d = A[i], A[i + 1], A[i + 2], A[i + 3]
        for j in range(k):
            aj, bj, cj, dj, row = a[j], b[j], c[j], d[j], G[j]
            for m in range(j + 1):
                row[m] += aj * a[m] + bj * b[m] + cj * c[m] + dj * d[m]
    for i in range(whole, rows):
        a = A[i]
        for j in range(k):
            aj, row = a[j], G[j]
            for m in range(j + 1):
                row[m] += aj * a[m]


@njit(cache=True, nogil=True, fastmath=_FAST)
def _cholesky(G: np.ndarray, shift: float, smallest: float) -> bool:
    """Replace the lower triangle of G by the factor L of G + shift I = L L^T; return whether all pivots were sound.

    A pivot is sound when it is above `smallest` times the diagonal entry it comes from.
    """
    for i in range(G.shape[0]):
        row = G[i]
        for j in range(i):
            other, total = G[j], row[j]
            for m in range(j):
                total -= row[m] * other[m]
            row[j] = total / other[j]
        diagonal = row[i] + shift
        pivot = diagonal
        for m in range(i):
            pivot -= row[m] * row[m]
        if not pivot > smallest * diagonal:
            return False
        row[i] = math.sqrt(pivot)
    return True


@njit(cache=True, nogil=True, fastmath=_FAST)
def _solve(L: np.ndarray, x: np.ndarray) -> None:
    """Replace x by (L L^T)^{-1} x."""
    k = L.shape[0]
    for i in range(k):
        row, total = L[i], x[i]
        for m in range(i):
            total -= row[m] * x[m]
        x[i] = total / row[i]
    for i in range(k - 1, -1, -1):
        row = L[i]
        x[i] /= row[i]
        value = x[i]
        for m in range(i):
            x[m] -= value * row[m]


@njit(cache=True, nogil=True, fastmath=_FAST)
def _normal_product(A: np.ndarray, rows: int, p: np.ndarray, out: np.ndarray) -> None:
    """Set `out` to A^T A p in one pass over A, four rows at a time."""
    k = A.shape[1]
    out[:] = 0
    whole = rows - rows % 4
    for i in range(0, whole, 4):
        a, b, c, d = A[i], A[i + 1], A[i + 2], A[i + 3]
        ta, tb, tc, td = p.dtype.type(0), p.dtype.type(0), p.dtype.type(0), p.dtype.type(0)
        for m in range(k):
            ta += a[m] * p[m]
            tb += b[m] * p[m]
            tc += c[m] * p[m]
            td += d[m] * p[m]
        for m in range(k):
            out[m] += ta * a[m] + tb * b[m] + tc * c[m] + td * d[m]
    for i in range(whole, rows):
        a, ta = A[i], p.dtype.type(0)
        for m in range(k):
            ta += a[m] * p[m]
        for m in range(k):
            out[m] += ta * a[m]


@njit(cache=True, nogil=True, fastmath=_FAST)
def _gradient(
    A: np.ndarray, rows: int, b: np.ndarray, x: np.ndarray, ridge: float, g: np.ndarray, squares: np.ndarray
) -> None:
    """Set g to A^T (b - A x) - ridge x and `squares` to the diagonal of A^T A + ridge I, 1 where that is 0."""
    k = A.shape[1]
    for m in range(k):
        g[m] = -ridge * x[m]
        squares[m] = ridge
    for i in range(rows):
        a, residual = A[i], b[i]
        for m in range(k):
            residual -= a[m] * x[m]
        for m in range(k):
            g[m] += residual * a[m]
            squares[m] += a[m] * a[m]
    for m in range(k):
        if squares[m] == 0.0:
            squares[m] = 1.0


@njit(cache=True, nogil=True)
def countsketch(A: np.ndarray, rows: int, state: np.uint64, SA: np.ndarray) -> None:
    """Set SA to S A, where every column of S has one entry, +1 or -1, at a random place."""
    SA[:] = 0
    places = np.uint64(SA.shape[0])
    for i in range(rows):
        bits = _mix(state + np.uint64(i))
        target, a = SA[(bits >> np.uint64(1)) % places], A[i]
        if bits & np.uint64(1):
            for m in range(A.shape[1]):
                target[m] += a[m]
        else:
            for m in range(A.shape[1]):
                target[m] -= a[m]


@njit(cache=True, nogil=True)
def srht(A: np.ndarray, rows: int, state: np.uint64, padded: np.ndarray, SA: np.ndarray) -> None:
    """Set SA to sqrt(1/r) P H D A: random signs D, Hadamard transform H, r rows P drawn with replacement.

    `padded` has room for the rows up to the next power of two. All of it costs O(s log s) additions per column.
    """
    k, length = A.shape[1], 1
    while length < rows:
        length *= 2
    for i in range(rows):
        sign = 1.0 if _mix(state + np.uint64(i)) & np.uint64(1) else -1.0
        for m in range(k):
            padded[i, m] = sign * A[i, m]
    padded[rows:length] = 0
    half = 1
    while half < length:
        for start in range(0, length, 2 * half):
            for i in range(start, start + half):
                for m in range(k):
                    first, second = padded[i, m], padded[i + half, m]
                    padded[i, m] = first + second
                    padded[i + half, m] = first - second
        half *= 2
    scale = 1.0 / math.sqrt(SA.shape[0])
    for i in range(SA.shape[0]):
        source = padded[_mix(state ^ np.uint64(~i)) % np.uint64(length)]
        for m in range(k):
            SA[i, m] = scale * source[m]


@njit(cache=True, nogil=True)
def _sketch_operations(sketch: int, rows: int, k: int) -> int:
    """Additions of one sketch."""
    length, levels = 1, 0
    while length < rows:
        length *= 2
        levels += 1
    operations: int = rows * k if sketch == COUNTSKETCH else (levels + 1) * length * k
    return operations


@njit(cache=True, nogil=True)
def _solve_normal(A: np.ndarray, rows: int, b: np.ndarray, ridge: float, G: np.ndarray, x: np.ndarray) -> int:
    """Set x to (A^T A + ridge I)^{-1} A^T b; return the multiply-adds.

    Where that matrix is singular to rounding the ridge is sqrt(eps) tr(A^T A) / k, which leaves the solution of least
    norm up to a relative sqrt(eps); only A = 0 has the solution 0.
    """
    k = A.shape[1]
    root = math.sqrt(np.finfo(A.dtype).eps)
    _gram(A, rows, G)
    trace = 0.0
    for m in range(k):
        trace += G[m, m]
    operations: int = rows * k * (k + 1) // 2 + rows * k + k**3 // 6 + k * k
    short = rows < k and ridge == 0.0
    if short or not _cholesky(G, ridge, root * root * k):
        if trace == 0.0:
            x[:] = 0
            return operations
        if not short:  # the first attempt has overwritten G
            _gram(A, rows, G)
            operations += rows * k * (k + 1) // 2 + k**3 // 6
        _cholesky(G, max(ridge, root * trace / k), 0.0)
    x[:] = 0
    for i in range(rows):
        for m in range(k):
            x[m] += b[i] * A[i, m]
    _solve(G, x)
    return operations


@njit(cache=True, nogil=True, fastmath=_FAST)
def _solve_qr(A: np.ndarray, rows: int, b: np.ndarray, ridge: float, x: np.ndarray) -> int:
    """Set x to R^{-1} Q^T b, with [A; sqrt(ridge) I] = Q R; return the multiply-adds.

    Modified Gram-Schmidt on the columns of [A b], which for least squares is as stable as Householder's reflections
    (Bjorck, 1967) and needs no Q.
    """
    k, eps = A.shape[1], np.finfo(A.dtype).eps
    if rows < k and ridge == 0.0:
        trace = 0.0
        for i in range(rows):
            trace += _dot(A[i], A[i])
        ridge = math.sqrt(eps) * trace / k
    extra = k if ridge > 0.0 else 0
    columns = np.zeros((k + 1, rows + extra), A.dtype)
    R = np.empty((k, k + 1), A.dtype)
    largest = 0.0
    for m in range(k):
        for i in range(rows):
            columns[m, i] = A[i, m]
        if ridge > 0.0:
            columns[m, rows + m] = math.sqrt(ridge)
        largest = max(largest, _dot(columns[m], columns[m]))
    for i in range(rows):
        columns[k, i] = b[i]
    for m in range(k):
        q = columns[m]
        norm = math.sqrt(_dot(q, q))
        # a direction that the rows do not see: no component along it
        seen = norm > k * eps * math.sqrt(largest)
        R[m, m] = norm if seen else 0.0
        for i in range(q.shape[0]):
            q[i] = q[i] / norm if seen else 0.0
        for j in range(m + 1, k + 1):
            other = columns[j]
            product = _dot(q, other)
            R[m, j] = product
            for i in range(q.shape[0]):
                other[i] -= product * q[i]
    for m in range(k - 1, -1, -1):
        total = R[m, k]
        for j in range(m + 1, k):
            total -= R[m, j] * x[j]
        x[m] = total / R[m, m] if R[m, m] > 0.0 else 0.0
    operations: int = (rows + extra) * (k + 1) * (k + 1) + k * k // 2
    return operations


@njit(cache=True, nogil=True, fastmath=_FAST)
def _conjugate_gradients(
    A: np.ndarray,
    rows: int,
    L: np.ndarray,
    diagonal: np.ndarray,
    sketched: bool,
    plan: Plan,
    x: np.ndarray,
    g: np.ndarray,
    work: np.ndarray,
) -> tuple[int, bool]:
    """Improve x, whose gradient g = A^T (b - A x) - ridge x is given, by preconditioned conjugate gradients.

    The preconditioner is L L^T when `sketched`, else `diagonal`. With B = A L^{-T}, z = (L L^T)^{-1} g has
    g^T z = |B^T (b - A x)|^2, the squared gradient of the preconditioned problem, on which the iterations stop.

    Returns
    -------
    The number of steps, and whether the stopping rule was met.
    """
    k = x.shape[0]
    z, p, w = work[0], work[1], work[2]
    for m in range(k):
        z[m] = g[m] if sketched else g[m] / diagonal[m]
    if sketched:
        _solve(L, z)
    for m in range(k):
        p[m] = z[m]
    squared = _dot(g, z)
    goal = max(plan.relative**2 * squared, plan.floor**2)
    steps = 0
    while steps < plan.max_steps and squared > goal:
        _normal_product(A, rows, p, w)
        curvature = 0.0
        for m in range(k):
            w[m] += plan.ridge * p[m]
            curvature += p[m] * w[m]
        if not curvature > 0.0:
            break
        length = squared / curvature
        for m in range(k):
            x[m] += length * p[m]
            g[m] -= length * w[m]
            z[m] = g[m] if sketched else g[m] / diagonal[m]
        if sketched:
            _solve(L, z)
        previous, squared = squared, _dot(g, z)
        for m in range(k):
            p[m] = z[m] + squared / previous * p[m]
        steps += 1
    return steps, squared <= goal


@njit(cache=True, nogil=True)
def solve_rows(
    first: int,
    last: int,
    indptr: np.ndarray,
    indices: np.ndarray,
    values: np.ndarray,
    other: np.ndarray,
    x: np.ndarray,
    plan: Plan,
) -> tuple[int, int, int, int]:
    """Solve rows `first` to `last` of the factor x given the `other` factor; x holds the starts and gets the solutions.

    Returns
    -------
    Steps, multiply-adds, fallbacks to normal equations, and rows whose iterations did not meet the stopping rule.
    """
    k = other.shape[1]
    longest = 0
    for row in range(first, last):
        longest = max(longest, indptr[row + 1] - indptr[row])
    A, G, work = np.empty((longest, k), other.dtype), np.empty((k, k), other.dtype), np.empty((5, k), other.dtype)
    SA = np.empty((plan.sketch_rows if plan.method == SKETCH else 0, k), other.dtype)
    room = 1
    while room < longest:
        room *= 2
    padded = np.empty((room if plan.method == SKETCH and plan.sketch == SRHT else 0, k), other.dtype)
    root = math.sqrt(np.finfo(other.dtype).eps)
    steps, operations, fallbacks, unmet = 0, 0, 0, 0
    for row in range(first, last):
        start, rows = indptr[row], indptr[row + 1] - indptr[row]
        if rows == 0:
            x[row] = 0
            continue
        for i in range(rows):
            A[i] = other[indices[start + i]]
        b = values[start : start + rows]
        if plan.method == QR:
            operations += _solve_qr(A, rows, b, plan.ridge, x[row])
            continue
        exact = plan.method == NORMAL or (rows < k and plan.ridge == 0.0)
        if plan.method == SKETCH and not exact:
            exact = rows <= plan.sketch_rows
            if not exact:
                state = _mix(np.uint64(plan.seed) ^ _mix(np.uint64(row)))
                if plan.sketch == COUNTSKETCH:
                    countsketch(A, rows, state, SA)
                else:
                    srht(A, rows, state, padded, SA)
                # L^T is the R of [S A; sqrt(ridge) I] = Q R, for half the multiply-adds of a QR factorisation
                _gram(SA, SA.shape[0], G)
                exact = not _cholesky(G, plan.ridge, root)
                fallbacks += exact
                operations += _sketch_operations(plan.sketch, rows, k)
                operations += SA.shape[0] * k * (k + 1) // 2 + k**3 // 6
        if exact:
            operations += _solve_normal(A, rows, b, plan.ridge, G, x[row])
            continue
        _gradient(A, rows, b, x[row], plan.ridge, work[3], work[4])
        made, met = _conjugate_gradients(A, rows, G, work[4], plan.method == SKETCH, plan, x[row], work[3], work)
        steps += made
        unmet += not met
        operations += 3 * rows * k + made * 2 * rows * k
        operations += (made + 1) * (k * k if plan.method == SKETCH else k)
    return steps, operations, fallbacks, unmet


@njit(cache=True, nogil=True, fastmath=_FAST)
def compare(
    first: int,
    last: int,
    indptr: np.ndarray,
    indices: np.ndarray,
    values: np.ndarray,
    U: np.ndarray,
    V: np.ndarray,
    fitted: np.ndarray,
) -> tuple[float, float, float]:
    """Overwrite the completion at the observed entries of some rows with that of U V^T.

    Returns
    -------
    Sums of squares over these entries: residuals, changes of the completion, the completion.
    """
    residuals, changes, size = 0.0, 0.0, 0.0
    for row in range(first, last):
        u = U[row]
        for place in range(indptr[row], indptr[row + 1]):
            v, value = V[indices[place]], U.dtype.type(0)
            for m in range(u.shape[0]):
                value += u[m] * v[m]
            residuals += (values[place] - value) ** 2
            changes += (value - fitted[place]) ** 2
            size += value * value
            fitted[place] = value
    return residuals, changes, size


@njit(cache=True, nogil=True, fastmath=_FAST)
def entries(rows: np.ndarray, columns: np.ndarray, U: np.ndarray, V: np.ndarray, out: np.ndarray) -> None:
    """Set out[e] to the entry (rows[e], columns[e]) of U V^T."""
    for place in range(rows.shape[0]):
        u, v, value = U[rows[place]], V[columns[place]], U.dtype.type(0)
        for m in range(u.shape[0]):
            value += u[m] * v[m]
        out[place] = value
