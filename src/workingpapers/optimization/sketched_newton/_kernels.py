"""Compiled loops of sketch-and-project: the current point is projected on the solutions of q sketched equations.

The sketched equations are rows of W z = b. For the Kaczmarz sketches W is the matrix itself and `order` says which
rows are drawn; for the others W = Sᵀ K and its rows are taken one after the other. Every `every` projections the
residual of K z = rhs is computed in full, which ends the loop when it is small enough.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from jaxtyping import Float, Int

Floats = Float[np.ndarray, " _"]
Ints = Int[np.ndarray, " _"]
Table = Float[np.ndarray, "_ _"]

_FAST = {"reassoc", "contract", "arcp", "nsz"}  # sums may be reordered; NaN and infinity keep their meaning
_DEPENDENT = 1e-12  # a row whose pivot falls below this share of its square length is in the span of those before


@numba.njit(cache=True, fastmath=_FAST)
def dense_projections(
    W: Table,
    b: Floats,
    squares: Floats,
    order: Ints,
    q: int,
    z: Floats,
    K: Table,
    rhs: Floats,
    every: int,
    tol: float,
    rounding: float,
) -> tuple[int, float, float]:
    """Project z, in place, on blocks of q rows of W z = b.

    Parameters
    ----------
    W, b, squares : the sketched equations and the square lengths of the rows of W.
    order : the rows to use; every q of them are one block.
    K, rhs, every : the residual of K z = rhs is checked every so many blocks.
    tol, rounding : stop at ||K z - rhs|| <= max(tol, rounding ||z||).

    Returns
    -------
    Blocks used, floating-point operations, and the residual at the last check (infinity before the first).
    """
    N = len(z)
    gram, right = np.empty((q, q)), np.empty(q)
    flops, residual = 0.0, math.inf
    blocks = len(order) // q
    for block in range(blocks):
        if q == 1:
            i = order[block]
            if squares[i] > 0.0:
                gap = -b[i]
                for k in range(N):
                    gap += W[i, k] * z[k]
                gap /= squares[i]
                for k in range(N):
                    z[k] -= gap * W[i, k]
                flops += 4.0 * N
        else:
            rows = order[block * q : (block + 1) * q]
            for s in range(q):
                i = rows[s]
                gap = -b[i]
                for k in range(N):
                    gap += W[i, k] * z[k]
                right[s] = gap
                for t in range(s + 1):
                    j = rows[t]
                    product = 0.0
                    for k in range(N):
                        product += W[i, k] * W[j, k]
                    gram[s, t] = product
            solve_gram(gram, right)
            for s in range(q):
                i = rows[s]
                for k in range(N):
                    z[k] -= right[s] * W[i, k]
            flops += 4.0 * q * N + q * (q + 1.0) * N + q**3 / 3.0
        if (block + 1) % every == 0:
            total, size = 0.0, 0.0
            for i in range(len(rhs)):
                gap = -rhs[i]
                for k in range(N):
                    gap += K[i, k] * z[k]
                total += gap * gap
            for k in range(N):
                size += z[k] * z[k]
            flops += 2.0 * len(rhs) * N
            residual = math.sqrt(total)
            if not residual > max(tol, rounding * math.sqrt(size)):
                return block + 1, flops, residual
    return blocks, flops, residual


@numba.njit(cache=True, fastmath=_FAST)
def sparse_projections(
    indptr: Ints,
    indices: Ints,
    data: Floats,
    b: Floats,
    squares: Floats,
    order: Ints,
    q: int,
    z: Floats,
    K_indptr: Ints,
    K_indices: Ints,
    K_data: Floats,
    rhs: Floats,
    every: int,
    tol: float,
    rounding: float,
) -> tuple[int, float, float]:
    """`dense_projections` for W and K in compressed rows: a block costs what its rows hold."""
    gram, right = np.empty((q, q)), np.empty(q)
    spread = np.zeros(len(z) if q > 1 else 0)  # one row of the block, spread out
    flops, residual = 0.0, math.inf
    blocks = len(order) // q
    for block in range(blocks):
        if q == 1:
            i = order[block]
            if squares[i] > 0.0:
                gap = -b[i]
                for e in range(indptr[i], indptr[i + 1]):
                    gap += data[e] * z[indices[e]]
                gap /= squares[i]
                for e in range(indptr[i], indptr[i + 1]):
                    z[indices[e]] -= gap * data[e]
                flops += 4.0 * (indptr[i + 1] - indptr[i])
        else:
            rows = order[block * q : (block + 1) * q]
            for s in range(q):
                i = rows[s]
                gap = -b[i]
                for e in range(indptr[i], indptr[i + 1]):
                    gap += data[e] * z[indices[e]]
                    spread[indices[e]] = data[e]
                right[s] = gap
                for t in range(s + 1):
                    j = rows[t]
                    product = 0.0
                    for e in range(indptr[j], indptr[j + 1]):
                        product += data[e] * spread[indices[e]]
                    gram[s, t] = product
                    flops += 2.0 * (indptr[j + 1] - indptr[j])
                for e in range(indptr[i], indptr[i + 1]):
                    spread[indices[e]] = 0.0
                flops += 4.0 * (indptr[i + 1] - indptr[i])
            solve_gram(gram, right)
            flops += q**3 / 3.0
            for s in range(q):
                i = rows[s]
                for e in range(indptr[i], indptr[i + 1]):
                    z[indices[e]] -= right[s] * data[e]
        if (block + 1) % every == 0:
            total, size = 0.0, 0.0
            for i in range(len(rhs)):
                gap = -rhs[i]
                for e in range(K_indptr[i], K_indptr[i + 1]):
                    gap += K_data[e] * z[K_indices[e]]
                total += gap * gap
            for k in range(len(z)):
                size += z[k] * z[k]
            flops += 2.0 * len(K_data)
            residual = math.sqrt(total)
            if not residual > max(tol, rounding * math.sqrt(size)):
                return block + 1, flops, residual
    return blocks, flops, residual


@numba.njit(cache=True)
def solve_gram(gram: Table, right: Floats) -> None:
    """Solve W Wᵀ y = right by Cholesky, in place; a row in the span of those before it is left out (y = 0).

    The equations of a left-out row follow from the others where the system is consistent, so W^+ right = Wᵀ y.
    """
    q = len(right)
    for j in range(q):
        size = gram[j, j]
        pivot = size
        for k in range(j):
            pivot -= gram[j, k] * gram[j, k]
        if pivot <= _DEPENDENT * size:
            for k in range(j + 1):
                gram[j, k] = 0.0
            for i in range(j + 1, q):
                gram[i, j] = 0.0
            right[j] = 0.0
            continue
        root = math.sqrt(pivot)
        gram[j, j] = root
        for i in range(j + 1, q):
            entry = gram[i, j]
            for k in range(j):
                entry -= gram[i, k] * gram[j, k]
            gram[i, j] = entry / root
        for k in range(j):
            right[j] -= gram[j, k] * right[k]
        right[j] /= root
    for j in range(q - 1, -1, -1):
        if gram[j, j] == 0.0:
            right[j] = 0.0
            continue
        for i in range(j + 1, q):
            right[j] -= gram[i, j] * right[i]
        right[j] /= gram[j, j]


@numba.njit(cache=True)
def draw_subsets(uniforms: Table, permutation: Ints, out: Int[np.ndarray, "_ _"]) -> None:
    """Each row of `out` becomes a uniform subset, without repetition, of the permuted numbers (Fisher-Yates).

    Parameters
    ----------
    uniforms : (blocks, q), in [0, 1).
    permutation : any permutation of the rows; left as another one.
    out : (blocks, q).
    """
    M = len(permutation)
    blocks, q = out.shape
    for block in range(blocks):
        for k in range(q):
            other = k + int(uniforms[block, k] * (M - k))
            permutation[k], permutation[other] = permutation[other], permutation[k]
            out[block, k] = permutation[k]
