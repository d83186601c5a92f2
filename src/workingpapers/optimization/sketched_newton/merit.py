"""The exact augmented Lagrangian: a smooth merit function in (x, λ) whose penalties stay bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from workingpapers.common.validation import check_number
from workingpapers.optimization.sketched_newton.oracle import Matrix, Oracle, Point, Vector, as_array


class ExactAugmentedLagrangian:
    """L_η(x, λ) = f + cᵀλ + (η1/2) ||c||² + (η2/2) ||∇_x L||².

    For η1 large and η2 small enough its stationary points are the KKT pairs of min f(x) subject to c(x) = 0, with no
    penalty going to infinity, and a Newton-KKT step is a direction of descent for it.

    Parameters
    ----------
    fun, cons, grad, hess, jac, lag_hess : as in `minimize_equality`; missing derivatives need x as a tensor.
    eta1, eta2 : the penalties, above 0.
    """

    def __init__(
        self,
        fun: Callable[[Any], Any],
        cons: Callable[[Any], Any],
        *,
        grad: Callable[[Any], Any] | None = None,
        hess: Callable[[Any], Any] | None = None,
        jac: Callable[[Any], Any] | None = None,
        lag_hess: Callable[[Any, Any], Any] | None = None,
        eta1: float = 1.0,
        eta2: float = 0.1,
    ) -> None:
        self.eta1 = check_number("eta1", eta1, above=0.0)
        self.eta2 = check_number("eta2", eta2, above=0.0)
        self._callables: dict[str, Any] = {
            "fun": fun,
            "cons": cons,
            "grad": grad,
            "hess": hess,
            "jac": jac,
            "lag_hess": lag_hess,
        }

    def value(self, x: Any, lam: Any) -> float:
        """L_η at x, shape (n,), and lam, shape (m,).

        Raises
        ------
        ValueError : a shape is wrong, or x, lam or a value there is not finite.
        """
        _, point, multipliers = self._at(x, lam)
        return merit_value(point, multipliers, self.eta1, self.eta2)

    def gradient(self, x: Any, lam: Any) -> tuple[Any, Any]:
        """The gradients in x, shape (n,), and in λ, shape (m,), as tensors where x is one.

        Raises
        ------
        ValueError : as `value`.
        """
        oracle, point, multipliers = self._at(x, lam)
        hessian = oracle.hessian(point.x, multipliers)
        gradient = merit_gradient(point, hessian, multipliers, self.eta1, self.eta2)
        n = len(point.x)
        return oracle.returned(gradient[:n]), oracle.returned(gradient[n:])

    def _at(self, x: Any, lam: Any) -> tuple[Oracle, Point, Vector]:
        oracle = Oracle(**self._callables, like=x)
        point = oracle.start(x)
        return oracle, point, checked_multipliers("lam", lam, len(point.cons))


def merit_value(point: Point, lam: Vector, eta1: float, eta2: float) -> float:
    """L_η; NaN or infinity where something at the point is not finite."""
    with np.errstate(all="ignore"):
        gradient = point.lagrangian_gradient(lam)
        c = point.cons
        return float(point.fun + c @ lam + 0.5 * eta1 * (c @ c) + 0.5 * eta2 * (gradient @ gradient))


def merit_gradient(point: Point, hessian: Matrix, lam: Vector, eta1: float, eta2: float) -> Vector:
    """∇L_η = [∇_x L + η2 H ∇_x L + η1 Gᵀ c ; c + η2 G ∇_x L], with H the Hessian of the Lagrangian, not of f."""
    gradient, jac = point.lagrangian_gradient(lam), point.jac
    return np.concatenate(
        [gradient + eta2 * (hessian @ gradient) + eta1 * (jac.T @ point.cons), point.cons + eta2 * (jac @ gradient)]
    )


def checked_multipliers(name: str, lam: Any, m: int) -> Vector:
    """λ as a new float64 vector of m finite numbers."""
    multipliers = as_array(lam).astype(np.float64)
    if multipliers.shape != (m,):
        raise ValueError(f"{name} must have shape ({m},), got {multipliers.shape}")
    if not np.isfinite(multipliers).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return multipliers
