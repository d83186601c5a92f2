"""Forests inside the graph of a sparse symmetric matrix, and exact message passing on them.

An edge joins i and j where A_ij or A_ji is stored and not zero; the diagonal makes no edges. Everything here is
compiled and takes time linear in the number of edges, up to the inverse Ackermann function of the union-find.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numba import njit

from workingpapers.common.validation import check_finite

Vector = Float[np.ndarray, " n"]
Nodes = Int[np.ndarray, " k"]
Symmetric = Any  # (n, n), an array or a SciPy sparse matrix


def forest_solve(A: Symmetric, b: Vector, order: Nodes | None = None) -> Vector:
    """Solve A x = b exactly in O(n), for a symmetric positive definite A whose graph has no cycle.

    Gaussian belief propagation on a forest, which is elimination from the leaves to the roots: with i running over the
    children of j,

        P_j = A_jj - sum_i A_ij^2 / P_i,   m_j = b_j - sum_i A_ij m_i / P_i,

    and back, x_j = (m_j - A_jp x_p) / P_j with p the parent of j.

    Parameters
    ----------
    A : (n, n), symmetric, sparse or dense, with a positive diagonal.
    b : (n,), finite.
    order : all n nodes, each after its parent: at most one of its neighbours stands before it. Found by a breadth-first
        search by default.

    Raises
    ------
    ValueError : A is not such a matrix or not positive definite, its graph has a cycle, or the order is none.
    """
    matrix = symmetric(A)
    n = matrix.shape[0]
    rhs = np.array(b, dtype=float)
    if rhs.shape != (n,):
        raise ValueError(f"b must have shape ({n},), got {rhs.shape}")
    check_finite("b", rhs)
    everything = np.arange(n, dtype=np.int64)
    arrays = matrix.indptr, matrix.indices, matrix.data
    if order is None:
        nodes, parents, acyclic = breadth_first(*arrays, everything, np.full(n, -1, np.int64))
        if not acyclic:
            raise ValueError("the graph of A must be a forest, it has a cycle")
    else:
        nodes = np.array(order)
        if nodes.dtype.kind not in "iu" or not np.array_equal(np.sort(nodes), everything):
            raise ValueError(f"order must hold each of the integers 0 to {n - 1} once")
        nodes = nodes.astype(np.int64)
        parents = _parents(matrix.indptr, matrix.indices, nodes)
        if parents[0] < -1:
            raise ValueError(
                "order must put each node after its parent and after no other neighbour; "
                "that is possible only where the graph of A is a forest"
            )
    x, smallest = eliminate(*arrays, nodes, parents, rhs, np.zeros(n))
    if not smallest > 0.0:
        raise ValueError("A must be positive definite, elimination met a pivot that is not positive")
    return x


def greedy_forest(A: Symmetric, priority: Vector) -> Nodes:
    """Nodes that induce a forest, collected greedily: by decreasing priority, each that closes no cycle.

    A node joins where each tree built so far touches it at most once, which union-find tells in O(degree).

    Parameters
    ----------
    A : (n, n), symmetric pattern.
    priority : (n,), finite; the gradient's absolute value for the greedy tree rule. Ties go to the lower node.

    Returns
    -------
    nodes : sorted.
    """
    matrix = pattern(A)
    return collect_forest(matrix.indptr, matrix.indices, visiting_order(priority, matrix.shape[0]))


def tree_partition(A: Symmetric, priority: Vector | None = None) -> list[Nodes]:
    """Forests that together hold every node once: each node goes into the first in which it closes no cycle.

    A node of degree d is refused by at most d/2 forests, so there are at most d_max/2 + 1.

    Parameters
    ----------
    A : (n, n), symmetric pattern.
    priority : (n,), nodes are visited by its decreasing value; the diagonal of A by default, which visits nodes of
        large Lipschitz constants first. Pass random numbers for a random order.
    """
    return _partition(A, priority, forests=True)


def red_black_partition(A: Symmetric, priority: Vector | None = None) -> list[Nodes]:
    """A greedy colouring: sets of nodes without an edge inside, each node in the first set that holds no neighbour.

    The blocks of A on these sets are diagonal. There are at most d_max + 1, and two on a bipartite graph visited in a
    breadth-first order.

    Parameters
    ----------
    A, priority : as in `tree_partition`.
    """
    return _partition(A, priority, forests=False)


def _partition(A: Symmetric, priority: Vector | None, *, forests: bool) -> list[Nodes]:
    matrix = pattern(A)
    order = visiting_order(A.diagonal() if priority is None else priority, matrix.shape[0])
    part = first_fit(matrix.indptr, matrix.indices, order, forests)
    return [np.flatnonzero(part == k) for k in range(part.max(initial=-1) + 1)]


# --- checks --------------------------------------------------------------------------------------------------------


def symmetric(A: Any) -> sp.csr_array:
    """A as a CSR array without stored zeros, or ValueError: not square, finite, symmetric, of positive diagonal."""
    matrix = _square(A)
    difference = abs(matrix - matrix.T)
    scale = abs(matrix).max() if matrix.nnz else 0.0
    if difference.nnz and difference.max() > 1e-12 * scale:
        raise ValueError(f"A must be symmetric, |A - A^T| reaches {difference.max():g}")
    diagonal = matrix.diagonal()
    if not (diagonal > 0).all():
        i = int(np.argmin(diagonal))
        raise ValueError(f"the diagonal of A must be positive, A[{i}, {i}] is {diagonal[i]:g}")
    return matrix


def pattern(A: Any) -> sp.csr_array:
    """The CSR array of A's edges: symmetrised, without stored zeros."""
    matrix = _square(A)
    edges = sp.csr_array((np.ones(matrix.nnz), matrix.indices, matrix.indptr), shape=matrix.shape)
    return sp.csr_array(edges + edges.T)


def _square(A: Any) -> sp.csr_array:
    if not sp.issparse(A):
        A = np.asarray(A)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or A.shape[0] == 0:
        raise ValueError(f"A must be a square matrix, got shape {A.shape}")
    matrix = sp.csr_array(A, dtype=float, copy=True)
    check_finite("A", matrix.data)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def visiting_order(priority: Any, n: int) -> Nodes:
    """The nodes by decreasing priority, ties by number."""
    values = np.asarray(priority, dtype=float)
    if values.shape != (n,):
        raise ValueError(f"priority must have shape ({n},), got {values.shape}")
    check_finite("priority", values)
    return np.argsort(-values, kind="stable")


# --- compiled ------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _root(parent: np.ndarray, i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]  # halving the path keeps the trees flat
        i = parent[i]
    return i


@njit(cache=True, nogil=True)
def _joins(
    indptr: np.ndarray, indices: np.ndarray, i: int, part: np.ndarray, k: int, parent: np.ndarray, seen: np.ndarray
) -> bool:
    """Whether node i can join part k without closing a cycle.

    `seen` holds at each root the last node that met it; a root belongs to one part, so no reset is needed.
    """
    for p in range(indptr[i], indptr[i + 1]):
        j = indices[p]
        if j != i and part[j] == k:
            root = _root(parent, j)
            if seen[root] == i:
                return False
            seen[root] = i
    return True


@njit(cache=True, nogil=True)
def _join(indptr: np.ndarray, indices: np.ndarray, i: int, part: np.ndarray, k: int, parent: np.ndarray) -> None:
    part[i] = k
    for p in range(indptr[i], indptr[i + 1]):
        j = indices[p]
        if j != i and part[j] == k:
            parent[_root(parent, j)] = i  # i is its own root


@njit(cache=True, nogil=True)
def collect_forest(indptr: np.ndarray, indices: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The nodes that join the one forest, in increasing order. See `greedy_forest`."""
    n = order.shape[0]
    part, parent, seen = np.full(n, -1, np.int64), np.arange(n), np.full(n, -1, np.int64)
    for i in order:
        if _joins(indptr, indices, i, part, 0, parent, seen):
            _join(indptr, indices, i, part, 0, parent)
    return np.flatnonzero(part == 0)


@njit(cache=True, nogil=True)
def first_fit(indptr: np.ndarray, indices: np.ndarray, order: np.ndarray, forests: bool) -> np.ndarray:
    """The part of every node. See `tree_partition` and `red_black_partition`."""
    n = order.shape[0]
    part, parent, seen = np.full(n, -1, np.int64), np.arange(n), np.full(n, -1, np.int64)
    for i in order:
        k = 0
        if forests:
            while not _joins(indptr, indices, i, part, k, parent, seen):
                k += 1
            _join(indptr, indices, i, part, k, parent)
        else:
            for p in range(indptr[i], indptr[i + 1]):
                if indices[p] != i and part[indices[p]] >= 0:
                    seen[part[indices[p]]] = i
            while seen[k] == i:
                k += 1
            part[i] = k
    return part


@njit(cache=True, nogil=True)
def breadth_first(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, block: np.ndarray, place: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The nodes of the block from the roots outwards, the place of each one's parent (-1 for roots), and whether the
    block is a forest. `place` is all -1 before and after.
    """
    size = block.shape[0]
    order, parents = np.empty(size, np.int64), np.full(size, -1, np.int64)
    outside, waiting = -1, -2
    for i in block:
        place[i] = waiting
    tail, acyclic = 0, True
    for root in block:
        if place[root] != waiting:
            continue
        head = tail
        order[tail], place[root] = root, tail
        tail += 1
        while head < tail:
            i = order[head]
            for p in range(indptr[i], indptr[i + 1]):
                j = indices[p]
                if j == i or data[p] == 0.0 or place[j] == outside:
                    continue
                if place[j] == waiting:
                    order[tail], place[j], parents[tail] = j, tail, head
                    tail += 1
                elif place[j] != parents[head] and parents[place[j]] != head:
                    acyclic = False
            head += 1
    for i in block:
        place[i] = -1
    return order, parents, acyclic


@njit(cache=True, nogil=True)
def _parents(indptr: np.ndarray, indices: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The place of each node's one earlier neighbour; the first entry is -2 where a node has two."""
    place, parents = np.empty(order.shape[0], np.int64), np.full(order.shape[0], -1, np.int64)
    for k in range(order.shape[0]):
        place[order[k]] = k
    for k in range(order.shape[0]):
        for p in range(indptr[order[k]], indptr[order[k] + 1]):
            earlier = place[indices[p]]
            if earlier < k:
                if parents[k] >= 0:
                    parents[0] = -2
                    return parents
                parents[k] = earlier
    return parents


@njit(cache=True, nogil=True)
def eliminate(
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    order: np.ndarray,
    parents: np.ndarray,
    rhs: np.ndarray,
    x: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Solve A_bb x_b = rhs_b for the block b in `order`; write x_b into x, return x and the smallest pivot."""
    size = order.shape[0]
    pivots, messages, links = np.zeros(size), np.empty(size), np.zeros(size)
    for k in range(size):
        messages[k] = rhs[order[k]]
        above = order[parents[k]] if parents[k] >= 0 else -1
        for p in range(indptr[order[k]], indptr[order[k] + 1]):
            if indices[p] == order[k]:
                pivots[k] = data[p]
            elif indices[p] == above:
                links[k] = data[p]
    smallest = np.inf
    for k in range(size - 1, -1, -1):
        smallest = min(smallest, pivots[k])
        if parents[k] >= 0 and pivots[k] > 0.0:
            ratio = links[k] / pivots[k]
            pivots[parents[k]] -= ratio * links[k]  # P_j = A_jj - sum A_ij^2 / P_i
            messages[parents[k]] -= ratio * messages[k]  # m_j = rhs_j - sum A_ij m_i / P_i
    if not smallest > 0.0:
        return x, smallest
    for k in range(size):
        above = x[order[parents[k]]] if parents[k] >= 0 else 0.0
        x[order[k]] = (messages[k] - links[k] * above) / pivots[k]
    return x, smallest
