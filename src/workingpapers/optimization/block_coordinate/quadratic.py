"""Quadratics with a sparse matrix, whose forests are solved exactly."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from workingpapers.optimization.block_coordinate import _kernels as kernels
from workingpapers.optimization.block_coordinate import graphs
from workingpapers.optimization.block_coordinate.losses import (
    Block,
    Hessian,
    Loss,
    State,
    Vector,
    checked_vector,
    checked_weights,
)


class SparseQuadratic(Loss):
    """f(x) = x^T A x / 2 - b^T x.

    Parameters
    ----------
    A : (n, n), symmetric positive semidefinite with a positive diagonal, sparse or dense. Only symmetry and the
        diagonal are checked.
    b : (n,), finite.
    l1 : at least 0, a number or one for each coordinate; with bounds, sum_i l1_i x_i is part of f.
    nonnegative : whether x >= 0.
    """

    def __init__(self, A: Any, b: Any, *, l1: float | Vector = 0.0, nonnegative: bool = False) -> None:
        self.A = graphs.symmetric(A)
        n = self.A.shape[0]
        self.b = checked_vector("b", b, n)
        if nonnegative:
            self.b, l1 = self.b - checked_weights("l1", l1, n), 0.0
        super().__init__(self.A.diagonal(), l1=l1, nonnegative=nonnegative)
        self.arrays = self.A.indptr, self.A.indices, self.A.data
        self._place = np.full(self.n, -1, np.int64)

    @property
    def quadratic(self) -> bool:
        return True

    def value(self, x: Vector) -> float:
        return float(x @ (0.5 * (self.A @ x) - self.b))

    def grad(self, x: Vector, block: Block | None = None) -> Vector:
        if block is None:
            return np.asarray(self.A @ x - self.b)
        return np.asarray(self.A[block] @ x - self.b[block])

    def hess(self, x: Vector, block: Block) -> Hessian:
        return self.hess_bound(block)

    def hess_bound(self, block: Block) -> Hessian:
        return kernels.symmetric_block(*self.arrays, block, self._place)

    def bound_product(self, v: Vector) -> Vector:
        return np.asarray(self.A @ v)

    @cached_property
    def bound_sums(self) -> Vector:
        return np.asarray(abs(self.A).sum(axis=1)).ravel()

    def state(self, x: Vector) -> State:
        return _QuadraticState(self, x)

    def forest_step(self, block: Block, g: Vector) -> Vector:
        """-A_bb^{-1} g_b by message passing, for a block whose graph is a forest; ValueError if it is none.

        Parameters
        ----------
        g : (n,), the whole gradient.
        """
        order, parents, acyclic = graphs.breadth_first(*self.arrays, block, self._place)
        if not acyclic:
            raise ValueError("message passing needs blocks without cycles, this one has one")
        x, smallest = graphs.eliminate(*self.arrays, order, parents, -g, np.zeros(self.n))
        if not smallest > 0.0:
            raise ValueError("A must be positive definite, elimination met a pivot that is not positive")
        return np.asarray(x[block])


class _QuadraticState(State):
    """A descent on a quadratic: a move costs the rows of A in its block."""

    loss: SparseQuadratic

    def refresh(self) -> None:
        self.g = self.loss.grad(self.x)
        self._set()

    def _set(self) -> None:
        self.smooth_value = 0.5 * float(self.x @ (self.g - self.loss.b))

    def trial(self, block: Block, step: Vector) -> float:
        return self.smooth_value + float(step @ (self.g[block] + 0.5 * (self.loss.hess_bound(block) @ step)))

    def move(self, block: Block, to: Vector) -> None:
        kernels.add_symmetric_columns(*self.loss.arrays, block, to - self.x[block], self.g)
        self.x[block] = to
        self._set()
