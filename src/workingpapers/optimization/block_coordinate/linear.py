"""Losses of linear predictions: least squares, logistic and softmax."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from workingpapers.optimization.block_coordinate import _kernels as kernels
from workingpapers.optimization.block_coordinate.design import Design
from workingpapers.optimization.block_coordinate.losses import (
    Block,
    Hessian,
    Loss,
    State,
    Vector,
    checked_vector,
    checked_weights,
)
from workingpapers.optimization.block_coordinate.model import BlockModel, ColumnModel


class LinearLoss(Loss):
    """f(x) = sum_i phi((A x)_i, b_i) + sum_j l2_j x_j^2 / 2, for one or several columns of x.

    With c classes x has n = features * classes entries, feature after feature.

    Parameters
    ----------
    A : (m, features), dense or sparse, finite.
    b : (m,), what is predicted.
    l1 : at least 0, a number or one for each coordinate; with bounds, sum_i l1_i x_i is part of f.
    l2 : at least 0, likewise.
    nonnegative : whether x >= 0.
    """

    _kind: int
    _largest: float  # of the second derivative of phi in one margin

    def __init__(
        self,
        A: Any,
        b: Any,
        *,
        classes: int = 1,
        l1: float | Vector = 0.0,
        l2: float | Vector = 0.0,
        nonnegative: bool = False,
    ) -> None:
        self.design = Design.of(A)
        self.classes = classes
        self.target = self._checked_target(b, self.design.shape[0])
        n = self.design.shape[1] * classes
        weight, self.l2 = checked_weights("l1", l1, n), checked_weights("l2", l2, n)
        self.linear = weight if nonnegative else np.zeros(n)
        super().__init__(
            np.repeat(self._largest * self.design.squares, classes) + self.l2,
            l1=0.0 if nonnegative else weight,
            nonnegative=nonnegative,
        )

    @abstractmethod
    def _checked_target(self, b: Any, rows: int) -> Vector: ...

    @abstractmethod
    def _curvature(self, slopes: Float[np.ndarray, "m c"]) -> Float[np.ndarray, "m c"]:
        """The p of `Design.hessian`, from the slopes phi'."""

    def value(self, x: Vector) -> float:
        return LinearState(self, x).smooth_value

    def grad(self, x: Vector, block: Block | None = None) -> Vector:
        g = LinearState(self, x).g
        return g if block is None else g[block]

    def hess(self, x: Vector, block: Block) -> Hessian:
        return LinearState(self, x).hess(block)

    def hess_bound(self, block: Block) -> Hessian:
        H = self._largest * self.design.gram(block)
        H[np.diag_indices(len(block))] += self.l2[block]
        return H

    def state(self, x: Vector) -> LinearState:
        return LinearState(self, x)

    def bound_product(self, v: Vector) -> Vector:
        return np.asarray(self._largest * self._normal_product(v[:, None])[:, 0] + self.l2 * v)

    @cached_property
    def bound_sums(self) -> Vector:
        return np.asarray(np.repeat(self._row_sum * self.design.gram_sums, self.classes) + self.l2)

    @cached_property
    def _short_columns(self) -> bool:
        """Whether even large blocks are solved from their columns, without their Hessian."""
        return self.classes == 1 and self.design.short_columns(np.arange(self.n))

    @property
    def smallest_block(self) -> int:
        if not self._short_columns:
            return super().smallest_block
        # a pass over all columns finds the block: a tenth of the largest possible support saves some of them
        return min(self.n, max(super().smallest_block, self.design.shape[0] // 10))

    @property
    def largest_block(self) -> int:
        return self.n if self._short_columns else super().largest_block

    @property
    def _row_sum(self) -> float:
        """sum_e |B_ce| for H = B kron A^T A."""
        return self._largest

    def _normal_product(self, v: Float[np.ndarray, "f c"]) -> Float[np.ndarray, "f c"]:
        """A^T (A v), which costs what its few entries ask where most of v is zero."""
        margins, rows = self.product(v)
        if rows is None:
            return self.design.back(margins)
        return self.design.add_rows(rows, margins[rows], margins, np.zeros(v.shape))

    def product(self, v: Float[np.ndarray, "f c"]) -> tuple[Float[np.ndarray, "m c"], Block | None]:
        """A v, and the rows in which it may not be zero; None for all where v is not sparse."""
        features, classes = np.nonzero(v)
        if 4 * len(features) > len(v):
            return np.ascontiguousarray(self.design.product(v)), None
        margins = np.zeros((self.design.shape[0], v.shape[1]))
        return margins, self.design.add_columns(features, classes, v[features, classes], margins)


class LinearState(State):
    """A descent on a linear loss. A move costs the columns of its block and the rows that these touch."""

    loss: LinearLoss

    def refresh(self) -> None:
        loss = self.loss
        m, classes = loss.design.shape[0], loss.classes
        self.margins, _ = loss.product(self.x.reshape(-1, classes))
        self.values, self.slopes = np.empty(m), np.zeros((m, classes))
        change = np.empty((m, classes))
        kernels.row_losses(loss._kind, np.arange(m), self.margins, loss.target, self.values, self.slopes, change)
        self._back = loss.design.back(self.slopes)
        self._set()

    def _set(self) -> None:
        loss = self.loss
        self.g = self._back.ravel() + loss.linear + loss.l2 * self.x
        self.smooth_value = float(self.values.sum() + self.x @ (loss.linear + 0.5 * loss.l2 * self.x))

    def _places(self, block: Block) -> tuple[Block, Block]:
        features, classes = np.divmod(block, self.loss.classes)
        return features, classes

    def trial(self, block: Block, step: Vector) -> float:
        loss = self.loss
        margins, values, slopes = self.margins.copy(), self.values.copy(), self.slopes.copy()
        rows = loss.design.add_columns(*self._places(block), step, margins)
        change = np.empty((len(rows), loss.classes))
        kernels.row_losses(loss._kind, rows, margins, loss.target, values, slopes, change)
        here = self.x[block]
        moved = here + step
        terms = self.x @ (loss.linear + 0.5 * loss.l2 * self.x)
        terms += step @ loss.linear[block] + 0.5 * loss.l2[block] @ (moved * moved - here * here)
        return float(values.sum() + terms)

    def move(self, block: Block, to: Vector) -> None:
        loss = self.loss
        rows = loss.design.add_columns(*self._places(block), to - self.x[block], self.margins)
        self.x[block] = to
        change = np.empty((len(rows), loss.classes))
        kernels.row_losses(loss._kind, rows, self.margins, loss.target, self.values, self.slopes, change)
        self._back = loss.design.add_rows(rows, change, self.slopes, self._back)
        self._set()

    def hess(self, block: Block) -> Hessian:
        features, classes = self._places(block)
        H = self.loss.design.hessian(features, classes, self.loss._curvature(self.slopes), self.loss.classes > 1)
        H[np.diag_indices(len(block))] += self.loss.l2[block]
        return H

    def model(self, block: Block) -> BlockModel:
        loss = self.loss
        if loss.classes > 1 or not loss.design.short_columns(block):
            return super().model(block)
        weights = loss._curvature(self.slopes)[:, 0]
        return ColumnModel(loss.design.columns, block, weights, loss.l2[block], self.g[block], self.x[block])


class LeastSquares(LinearLoss):
    """f(x) = |A x - b|^2 / 2. With l1 it is the lasso, with l2 ridge regression, with both the elastic net.

    Parameters
    ----------
    A : (m, n), dense or sparse, finite.
    b : (m,), finite.
    l1, l2, nonnegative : as in `LinearLoss`.
    """

    _kind, _largest = kernels.SQUARES, 1.0

    def _checked_target(self, b: Any, rows: int) -> Vector:
        return checked_vector("b", b, rows)

    def _curvature(self, slopes: Float[np.ndarray, "m c"]) -> Float[np.ndarray, "m c"]:
        return np.ones_like(slopes)

    @property
    def quadratic(self) -> bool:
        return True

    @cached_property
    def _free_column(self) -> tuple[Vector, Vector] | None:
        """The one column v without a penalty and A^T v, or None."""
        free = np.flatnonzero(self.l1 + self.linear == 0.0)
        if len(free) != 1:
            return None
        unit = np.zeros((self.n, 1))
        unit[free] = 1.0
        column = np.ascontiguousarray(self.design.product(unit))
        return column[:, 0], self.design.back(column)[:, 0]

    @property
    def knows_gap(self) -> bool:
        free = self.l1 + self.linear == 0.0
        return not free.any() or (free.sum() == 1 and not self.nonnegative and not self.l2[free].any())

    def duality_gap(self, state: State) -> float:
        """F(x) - D(theta), theta = (b - A x) / s with the least s >= 1 that makes it feasible for the dual.

        l2 counts as rows sqrt(l2_i) e_i below A, with b = 0 there, so that one formula serves all. A column without
        penalty, of an intercept say, is first projected out of b - A x.
        """
        if not self.knows_gap:
            raise ValueError("the duality gap needs l1 > 0 for every coordinate, or all but one that has no l2 either")
        assert isinstance(state, LinearState)
        weight = self.l1 + self.linear
        residual, correlation = -state.slopes[:, 0], -(state.g - self.linear)  # of b - A x with the columns
        if self._free_column is not None:
            column, with_columns = self._free_column
            part = float(column @ residual) / max(float(column @ column), 1e-300)
            residual = residual - column * part
            correlation = correlation - with_columns * part
        excess = correlation if self.nonnegative else np.abs(correlation)
        penalised = weight > 0.0
        scale = max(1.0, float((excess[penalised] / weight[penalised]).max(initial=0.0)))
        square = float(residual @ residual + self.l2 @ (state.x * state.x))
        dual = float(self.target @ residual) / scale - 0.5 * square / scale**2
        return max(0.0, state.fun - dual)


class NonnegativeL1LeastSquares(LeastSquares):
    """f(x) = |A x - b|^2 / 2 + l1 sum_i x_i, subject to x >= 0.

    Parameters
    ----------
    A, b : as in `LeastSquares`.
    l1 : at least 0, a number or one for each coordinate.
    """

    def __init__(self, A: Any, b: Any, l1: float | Vector) -> None:
        super().__init__(A, b, l1=l1, nonnegative=True)


class Logistic(LinearLoss):
    """f(x) = sum_i log(1 + exp(-b_i (A x)_i)).

    Where the data are separable and there is no penalty, the infimum 0 is not attained: x grows without end.

    Parameters
    ----------
    A : (m, n), dense or sparse, finite.
    b : (m,), of -1 and 1.
    l1, l2, nonnegative : as in `LinearLoss`.
    """

    _kind, _largest = kernels.LOGISTIC, 0.25

    def _checked_target(self, b: Any, rows: int) -> Vector:
        target = checked_vector("b", b, rows)
        if not np.isin(target, (-1.0, 1.0)).all():
            raise ValueError(f"b must consist of -1 and 1, got {np.unique(target)[:5]}")
        return target

    def _curvature(self, slopes: Float[np.ndarray, "m c"]) -> Float[np.ndarray, "m c"]:
        share = np.abs(slopes)  # 1 / (1 + exp(b z))
        return np.asarray(share * (1.0 - share))


class Softmax(LinearLoss):
    """f(X) = sum_i log sum_k exp((A X)_ik) - (A X)_{i, b_i}, for c classes; x is X, (features, c), row after row.

    Adding a constant to all classes' coefficients of a feature changes nothing: without l2 the minimiser is not unique.

    Parameters
    ----------
    A : (m, features), dense or sparse, finite.
    b : (m,), integers from 0 to c - 1.
    n_classes : c, at least 2; one more than the largest label by default.
    l1, l2, nonnegative : as in `LinearLoss`, in the order of x.
    """

    _kind, _largest = kernels.SOFTMAX, 0.25

    def __init__(
        self,
        A: Any,
        b: Any,
        n_classes: int | None = None,
        *,
        l1: float | Vector = 0.0,
        l2: float | Vector = 0.0,
        nonnegative: bool = False,
    ) -> None:
        labels = np.asarray(b)
        if labels.dtype.kind not in "iu" or labels.ndim != 1 or len(labels) == 0 or labels.min() < 0:
            raise ValueError("b must be a vector of labels, integers from 0 on")
        present = int(labels.max()) + 1
        classes = max(present, 2) if n_classes is None else n_classes
        if classes < max(present, 2):
            raise ValueError(f"n_classes must be at least 2 and above the largest label, got {classes}")
        super().__init__(A, b, classes=classes, l1=l1, l2=l2, nonnegative=nonnegative)

    def _checked_target(self, b: Any, rows: int) -> Vector:
        return checked_vector("b", b, rows)

    def _curvature(self, slopes: Float[np.ndarray, "m c"]) -> Float[np.ndarray, "m c"]:
        p = slopes.copy()
        p[np.arange(len(p)), self.target.astype(np.int64)] += 1.0
        return p

    def hess_bound(self, block: Block) -> Hessian:
        features, classes = np.divmod(block, self.classes)
        # On k of the c classes the rest acts as one more: diag(p) - p p^T <= (I - 1 1^T / (k + 1)) / 2 (Bohning).
        k = min(self.classes, len(np.unique(classes)) + 1)
        distinct, place = np.unique(features, return_inverse=True)
        H = self.design.gram(distinct)[np.ix_(place, place)]
        H *= 0.5 * ((classes[:, None] == classes) - 1.0 / k)
        H[np.diag_indices(len(block))] += self.l2[block]
        return H

    def bound_product(self, v: Vector) -> Vector:
        centred = self._normal_product(v.reshape(-1, self.classes))
        return np.asarray(0.5 * (centred - centred.mean(axis=1, keepdims=True)).ravel() + self.l2 * v)

    @property
    def _row_sum(self) -> float:
        return 1.0 - 1.0 / self.classes  # of (I - 1 1^T / c) / 2
