"""What is minimised: a smooth convex function with an l1 penalty or bounds, and where a descent stands on it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse.linalg import LinearOperator, eigsh

from workingpapers.common.validation import check_finite, check_number
from workingpapers.optimization.block_coordinate.model import BlockModel, DenseModel

Vector = Float[np.ndarray, " n"]
Block = Int[np.ndarray, " k"]
Hessian = Float[np.ndarray, "k k"]

_SMALLEST_BLOCK = 100
_LARGEST_BLOCK = 4000
_ENLARGED = 1.0 + 1e-6  # a Lanczos value approaches the largest eigenvalue from below


class Loss(ABC):
    """F(x) = f(x) + sum_i h_i(x_i): f twice differentiable and convex, h_i either l1_i |x_i| or the bound x_i >= 0.

    A loss of one's own defines `value`, `grad`, `hess` and `hess_bound` and calls this constructor. Everything else
    has a default, slower than it could be where f has structure: `state` can keep what changes little with a block.

    Parameters
    ----------
    lipschitz : (n,), L_i at least the largest second derivative of f in coordinate i, at least 0.
    l1 : at least 0, a number or one for each coordinate.
    nonnegative : whether x >= 0; l1 is 0 then, as l1 x_i is a term of f.
    """

    def __init__(self, lipschitz: Vector, *, l1: float | Vector = 0.0, nonnegative: bool = False) -> None:
        self.n = len(np.asarray(lipschitz))
        self.lipschitz = checked_weights("lipschitz", lipschitz, self.n)
        self.l1 = checked_weights("l1", l1, self.n)
        self.nonnegative = bool(nonnegative)
        if self.nonnegative and self.l1.any():
            raise ValueError("l1 must be 0 where x >= 0: l1_i x_i is then a linear term of f")

    @abstractmethod
    def value(self, x: Vector) -> float:
        """f(x)."""

    @abstractmethod
    def grad(self, x: Vector, block: Block | None = None) -> Vector:
        """The gradient of f, or its entries in the block."""

    @abstractmethod
    def hess(self, x: Vector, block: Block) -> Hessian:
        """The Hessian of f at x on the block."""

    @abstractmethod
    def hess_bound(self, block: Block) -> Hessian:
        """A constant matrix H_b with H_b - hess(x, block) positive semidefinite for every x."""

    @property
    def smooth(self) -> bool:
        """Whether there are neither bounds nor l1."""
        return not self.nonnegative and not self.l1.any()

    @property
    def quadratic(self) -> bool:
        """Whether `hess` equals `hess_bound`, so that Newton's step needs no line search."""
        return False

    @property
    def smallest_block(self) -> int:
        """How many coordinates the blocks have at first where the solver chooses their size."""
        return min(self.n, _SMALLEST_BLOCK)

    @property
    def largest_block(self) -> int:
        """How many coordinates a block of a size chosen by the solver may have; their Hessian must fit in memory."""
        return min(self.n, _LARGEST_BLOCK)

    @cached_property
    def steps(self) -> Vector:
        """The Lipschitz constants, 1 where they are 0: a column of zeros moves only by its penalty."""
        return np.where(self.lipschitz > 0.0, self.lipschitz, 1.0)

    def objective(self, x: Vector) -> float:
        """F(x): infinite where x violates the bounds."""
        if self.nonnegative and (x < 0).any():
            return math.inf
        return self.value(x) + self.penalty(x)

    def penalty(self, x: Vector, block: Block | None = None) -> float:
        """sum_i l1_i |x_i|, over the block where one is given (x are its entries then)."""
        return float((self.l1 if block is None else self.l1[block]) @ np.abs(x))

    def prox(self, v: Vector, steps: Vector | float, block: Block | None = None) -> Vector:
        """The minimiser over u of sum_i steps_i (u_i - v_i)^2 / 2 + h_i(u_i), on the block where one is given."""
        if self.nonnegative:
            return np.asarray(np.maximum(v, 0.0))
        threshold = (self.l1 if block is None else self.l1[block]) / steps
        return np.asarray(np.sign(v) * np.maximum(np.abs(v) - threshold, 0.0))

    def state(self, x: Vector) -> State:
        """A descent standing at x, a copy of which it owns."""
        return State(self, x)

    @property
    def knows_gap(self) -> bool:
        """Whether there is a `duality_gap`."""
        return False

    def duality_gap(self, state: State) -> float:
        """An upper bound of F(x) - F*."""
        raise NotImplementedError(f"{type(self).__name__} has no duality gap")

    # The constant H of the whole problem, for rules that look at all coordinates.

    @cached_property
    def _whole_bound(self) -> Hessian:
        return self.hess_bound(np.arange(self.n))

    def bound_product(self, v: Vector) -> Vector:
        """H v, H the bound of all coordinates."""
        return np.asarray(self._whole_bound @ v)

    @cached_property
    def bound_sums(self) -> Vector:
        """sum_j |H_ij| for every i, Gershgorin's bound of the curvature."""
        return np.asarray(np.abs(self._whole_bound).sum(axis=1))

    @cached_property
    def bound_norm(self) -> float:
        """An upper bound of the largest eigenvalue of H, tight to a relative 1e-6."""
        if self.n == 1:
            return float(self.bound_product(np.ones(1))[0])
        operator = LinearOperator((self.n, self.n), matvec=lambda v: self.bound_product(np.ravel(v)), dtype=float)
        start = np.random.default_rng(0).standard_normal(self.n)  # not orthogonal to the eigenvector
        found = eigsh(operator, k=1, v0=start, tol=1e-8, return_eigenvectors=False)
        return float(found[0]) * _ENLARGED


class State:
    """Where a descent stands: x, the gradient `g` of f there, and f. This one evaluates the loss anew at every move.

    Attributes
    ----------
    x : (n,), changed by `move`.
    g : (n,), the gradient of f at x.
    smooth_value : f(x).
    """

    def __init__(self, loss: Loss, x: Vector) -> None:
        self.loss = loss
        self.x = x.copy()
        self.g = np.empty_like(self.x)
        self.smooth_value = math.nan
        self.refresh()

    def refresh(self) -> None:
        """Compute everything from x, which removes the rounding errors that moves leave behind."""
        self.g = np.asarray(self.loss.grad(self.x), dtype=float)
        self.smooth_value = float(self.loss.value(self.x))

    def trial(self, block: Block, step: Vector) -> float:
        """f with `step` added to the block."""
        there = self.x.copy()
        there[block] += step
        return float(self.loss.value(there))

    def move(self, block: Block, to: Vector) -> None:
        """Set the block to `to`."""
        self.x[block] = to
        self.refresh()

    def hess(self, block: Block) -> Hessian:
        return self.loss.hess(self.x, block)

    def model(self, block: Block) -> BlockModel:
        """The quadratic model of f on the block."""
        return DenseModel(self.hess(block), self.g[block], self.x[block])

    @property
    def fun(self) -> float:
        """F(x)."""
        return self.smooth_value + self.loss.penalty(self.x)

    def residual(self) -> Vector:
        """The prox-gradient residual in units of the gradient, L_i (x_i - prox_i(x_i - g_i / L_i)).

        It is 0 exactly at a minimiser, and the gradient where there are neither bounds nor l1.
        """
        if self.loss.smooth:
            return self.g
        steps = self.loss.steps
        return np.asarray(steps * (self.x - self.loss.prox(self.x - self.g / steps, steps)))


# --- checks --------------------------------------------------------------------------------------------------------


def checked_vector(name: str, values: Any, length: int) -> Vector:
    vector = np.array(values, dtype=float)
    if vector.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {vector.shape}")
    check_finite(name, vector)
    return vector


def checked_weights(name: str, weights: Any, n: int) -> Vector:
    if np.ndim(weights) == 0:
        return np.full(n, check_number(name, weights, at_least=0.0))
    vector = checked_vector(name, weights, n)
    if (vector < 0).any():
        raise ValueError(f"{name} must be at least 0, got {vector.min():g}")
    return vector
