"""The block's problem of a proximal Newton step: a quadratic with l1 or bounds, solved to any accuracy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
from jaxtyping import Float, Int

from workingpapers.optimization.block_coordinate import _kernels as kernels
from workingpapers.optimization.block_coordinate.linear_algebra import solve

Vector = Float[np.ndarray, " k"]
Places = Int[np.ndarray, " s"]

_ROUNDS = 200
_SWEEPS = 5  # of coordinate descent between two looks at how fast it is
_ROUNDING, _NEARLY = 1e-13, 1e4
_BLAS = 12.0  # by how much a multiply-add of Cholesky's k^3 is cheaper than one of a sweep, with its constant 1/3
_LARGEST_SUPPORT = 5000  # whose Hessian is formed


class BlockModel(ABC):
    """The quadratic g^T (y - x) + (y - x)^T H (y - x) / 2 of a block, at y = x first."""

    size: int

    @abstractmethod
    def sweep(self, y: Vector, l1: Vector, nonnegative: bool, sweeps: int) -> float:
        """Exact minimisation over one coordinate after the other, in place, of the quadratic and sum_i l1_i |y_i|.

        Returns the largest prox-gradient residual met in the last sweep.
        """

    @abstractmethod
    def slope(self, y: Vector, places: Places) -> Vector:
        """The places' entries of the gradient at y."""

    @abstractmethod
    def hessian(self, places: Places) -> Float[np.ndarray, "s s"]: ...

    @abstractmethod
    def jump(self, y: Vector) -> None:
        """Take up y, which changed outside `sweep`."""

    @abstractmethod
    def sweep_cost(self, support: int) -> float:
        """Multiply-adds of a sweep that moves so many coordinates."""


class DenseModel(BlockModel):
    """With H in memory."""

    def __init__(self, H: Float[np.ndarray, "k k"], g: Vector, x: Vector) -> None:
        self._H, self._g, self._x = H, g, x
        self._slope = g.copy()
        self.size = len(x)

    def sweep(self, y: Vector, l1: Vector, nonnegative: bool, sweeps: int) -> float:
        return float(kernels.matrix_sweeps(self._H, y, self._slope, l1, nonnegative, sweeps))

    def slope(self, y: Vector, places: Places) -> Vector:
        return np.asarray(self._slope[places])

    def hessian(self, places: Places) -> Float[np.ndarray, "s s"]:
        return np.asarray(self._H[np.ix_(places, places)])

    def jump(self, y: Vector) -> None:
        self._slope = self._g + self._H @ (y - self._x)

    def sweep_cost(self, support: int) -> float:
        return float(self.size * support)


class ColumnModel(BlockModel):
    """With H = A_b^T W A_b + diag(l2) through the columns of a sparse A; cheap where these are short.

    Parameters
    ----------
    columns : A by columns, as (indptr, indices, data).
    block : k columns of it.
    weights : (m,), the diagonal of W.
    l2, g, x : (k,).
    """

    def __init__(
        self,
        columns: tuple[np.ndarray, np.ndarray, np.ndarray],
        block: Int[np.ndarray, " k"],
        weights: Float[np.ndarray, " m"],
        l2: Vector,
        g: Vector,
        x: Vector,
    ) -> None:
        self._columns, self._block, self._weights = columns, block, weights
        self._l2, self._g, self._x = l2, g, x
        self._diagonal = kernels.weighted_squares(*columns, block, weights) + l2
        self._rows = np.zeros(len(weights))  # A_b (y - x)
        self._entries = float((columns[0][block + 1] - columns[0][block]).sum())
        self.size = len(x)

    def sweep(self, y: Vector, l1: Vector, nonnegative: bool, sweeps: int) -> float:
        return float(
            kernels.column_sweeps(
                *self._columns,
                self._block,
                self._weights,
                self._diagonal,
                self._g,
                self._l2,
                self._x,
                y,
                self._rows,
                l1,
                nonnegative,
                sweeps,
            )
        )

    def slope(self, y: Vector, places: Places) -> Vector:
        products = kernels.some_products(*self._columns, self._block[places], self._weights * self._rows)
        return np.asarray(self._g[places] + products + self._l2[places] * (y - self._x)[places])

    def hessian(self, places: Places) -> Float[np.ndarray, "s s"]:
        block = self._block[places]
        H: np.ndarray = kernels.block_hessian(
            *self._columns, block, np.zeros(len(block), np.int64), self._weights[:, None], False
        )
        H[np.diag_indices(len(block))] += self._l2[places]
        return H

    def jump(self, y: Vector) -> None:
        self._rows = kernels.combination(*self._columns, self._block, y - self._x, len(self._weights))

    def sweep_cost(self, support: int) -> float:
        return 2.0 * self._entries


def minimise(model: BlockModel, x: Vector, l1: Vector, nonnegative: bool, accuracy: float) -> Vector:
    """The minimiser over y of the model and sum_i l1_i |y_i|, subject to y >= 0 where asked, from y = x.

    Coordinate descent finds the support and the signs. Where it is slow, Newton steps on the support, each as far as
    the first sign that would change, take over; both decrease the model, so that the right support is met in the end
    and the solution is exact to rounding.

    Parameters
    ----------
    accuracy : stop once the prox-gradient residual is at most this times its largest value in the first sweep; 0 asks
        for all that rounding allows.
    """
    y = x.copy()
    first = model.sweep(y, l1, nonnegative, 1)
    limit = max(accuracy, _ROUNDING) * first
    last, best = first, math.inf
    for _ in range(_ROUNDS):
        worst = model.sweep(y, l1, nonnegative, _SWEEPS)
        stalled = best <= _NEARLY * limit and worst > 0.5 * best  # rounding allows no more
        if worst <= limit or stalled:
            break
        best = min(best, worst)
        sweeps_to_go = _SWEEPS * math.log(worst / limit) / math.log(last / worst) if worst < last else math.inf
        last = worst
        support = np.flatnonzero((y != 0.0) if nonnegative else (y != 0.0) | (l1 == 0.0))
        newton_cost = float(len(support)) ** 3 / _BLAS
        if len(support) <= _LARGEST_SUPPORT and newton_cost < sweeps_to_go * model.sweep_cost(len(support)):
            newton_on_support(model, y, support, l1, nonnegative)
    return y


def newton_on_support(model: BlockModel, y: Vector, support: Places, l1: Vector, nonnegative: bool) -> None:
    """Move y, in place, to the minimiser on its support and signs, or as far as the first sign that would change."""
    signs = np.sign(y[support])
    d = -solve(model.hessian(support), model.slope(y, support) + l1[support] * signs)
    bounded = (d < 0.0) if nonnegative else (signs * d < 0.0) & (l1[support] > 0.0)
    ratios = np.where(bounded, -y[support] / np.where(bounded, d, 1.0), np.inf)
    share = min(1.0, float(ratios.min(initial=1.0)))
    y[support] += share * d
    y[support[bounded & (ratios <= share)]] = 0.0
    model.jump(y)
