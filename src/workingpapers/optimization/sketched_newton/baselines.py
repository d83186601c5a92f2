"""What the paper compares with: SQP with the l1 merit function and GMRES, and the classical augmented Lagrangian."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import scipy.linalg
import scipy.sparse as sp
import scipy.sparse.linalg

from workingpapers.common.line_search import backtrack
from workingpapers.common.validation import check_choice, check_integer, check_number
from workingpapers.optimization.result import History
from workingpapers.optimization.sketched_newton.linear import System
from workingpapers.optimization.sketched_newton.oracle import Matrix, Oracle, Point, Vector
from workingpapers.optimization.sketched_newton.solver import (
    EqualityResult,
    Status,
    kkt_matrix,
    reduced_hessian_is_positive,
)

_BURST = 10  # products of GMRES between two looks at the termination tests
_ARMIJO = 1e-8
_CURVATURE = 1e-6
_MU_MAX = 1e8


def l1_sqp(
    fun: Callable[[Any], Any],
    x0: Any,
    cons: Callable[[Any], Any],
    *,
    grad: Callable[[Any], Any] | None = None,
    jac: Callable[[Any], Any] | None = None,
    lag_hess: Callable[[Any, Any], Any] | None = None,
    rule: Literal["byrd-curtis-nocedal", "adaptive"] = "adaptive",
    tol: float = 1e-4,
    max_iter: int = 10_000,
    max_inner: int = 100_000,
) -> EqualityResult:
    """Inexact SQP with the merit function f + μ ||c||_1 and GMRES restarted by 10.

    Parameters
    ----------
    fun, x0, cons, grad, jac, lag_hess, tol, max_iter, max_inner : as in `minimize_equality`.
    rule : when a GMRES solve is enough. "byrd-curtis-nocedal": the two termination tests of Byrd, Curtis and Nocedal,
        "An Inexact SQP Method for Equality Constrained Optimization", 2008. "adaptive": a relative residual of κ = 0.1,
        divided by 1.5² while the direction does not reduce the model enough.

    Returns
    -------
    EqualityResult : with eta = (μ, 0).

    Raises
    ------
    ValueError, TypeError : an argument is out of range.

    Warns
    -----
    RuntimeWarning : the tolerance was not reached.
    """
    check_choice("rule", rule, ("byrd-curtis-nocedal", "adaptive"))
    run = _Run(fun, x0, cons, grad, jac, lag_hess, tol, max_iter, max_inner)
    n, m = len(run.point.x), len(run.lam)
    mu, kappa, tau, epsilon = 1.0, 1.0 if rule == "byrd-curtis-nocedal" else 0.1, 0.1, 0.1
    sigma = tau * (1.0 - epsilon)
    gradient_norm, violation = _l1(run.point.lagrangian_gradient(run.lam)), _l1(run.point.cons)
    beta = max(gradient_norm / (violation + 1.0), 1.0)

    while run.status is None:
        point = run.point
        hessian = run.oracle.hessian(point.x, run.lam)
        if not reduced_hessian_is_positive(hessian, point.jac, _CURVATURE):
            shift = 0.1 + float(np.linalg.norm(hessian.data if sp.issparse(hessian) else hessian))
            hessian = hessian + (sp.eye_array(n) if sp.issparse(hessian) else np.eye(n)) * shift
        gradient, c = point.lagrangian_gradient(run.lam), point.cons
        system = System(kkt_matrix(hessian, point.jac), -np.concatenate([gradient, c]))
        z, violation, size = np.zeros(n + m), _l1(c), _l1(system.rhs)

        def reduction(
            z: Vector, mu: float, *, point: Point = point, hessian: Matrix = hessian, violation: float = violation
        ) -> tuple[float, float]:
            """How much the model of the merit function falls along z, and what is asked for."""
            d = z[:n]
            linear = _l1(point.jac @ d + point.cons)
            model = -float(point.grad @ d) - max(0.5 * float(d @ (hessian @ d)), 0.0) + mu * (violation - linear)
            return model, sigma * mu * max(violation, linear - violation)

        steps, flops = 0, 0.0
        while True:
            enough = False
            while not enough and steps < max_inner:
                z, work = _burst(system, z)
                steps, flops = steps + _BURST, flops + work
                r = system.K @ z - system.rhs
                model, wanted = reduction(z, mu)
                if rule == "adaptive":
                    enough = _l1(r) <= kappa * size
                else:
                    first = _l1(r) <= kappa * size and _l1(r[n:]) <= max(0.1 * _l1(gradient), beta * violation)
                    second = _l1(r[:n]) <= epsilon * violation and _l1(r[n:]) <= beta * violation
                    enough = (first and model >= wanted) or second
                enough = enough or float(np.linalg.norm(r)) <= system.target(0.0, z)
            if rule == "byrd-curtis-nocedal" or model >= wanted or mu > _MU_MAX or steps >= max_inner:
                break
            mu, kappa = 1.5 * mu, kappa / 1.5**2
            model, wanted = reduction(z, mu)
        gain = violation - _l1(point.jac @ z[:n] + c)
        if rule == "byrd-curtis-nocedal" and model < wanted and gain > 0.0:
            d = z[:n]
            curvature = max(0.5 * float(d @ (hessian @ d)), 0.0)
            mu = max((float(point.grad @ d) + curvature) / ((1.0 - tau) * gain), mu) + 1e-4
        slope = float(point.grad @ z[:n]) - mu * gain

        def merit(trial: Point, lam: Vector, mu: float = mu) -> float:
            return trial.fun + mu * _l1(trial.cons)

        run.step(z, slope, merit, _ARMIJO, steps, flops, mu)
    return run.result()


def augmented_lagrangian(
    fun: Callable[[Any], Any],
    x0: Any,
    cons: Callable[[Any], Any],
    *,
    grad: Callable[[Any], Any] | None = None,
    jac: Callable[[Any], Any] | None = None,
    lag_hess: Callable[[Any, Any], Any] | None = None,
    tol: float = 1e-4,
    max_iter: int = 10_000,
    max_inner: int = 100_000,
) -> EqualityResult:
    """The classical method of multipliers: minimise f + λᵀc + (μ/2) ||c||² in x by Newton's method, then λ += μ c.

    The gradient of the k-th subproblem is brought below 0.1^k; μ grows by 1.5. A multiple of the identity is
    added where the Hessian is not positive. Needs no rank of the Jacobian.

    Parameters
    ----------
    fun, x0, cons, grad, jac, lag_hess, tol : as in `minimize_equality`.
    max_iter : Newton steps, all in all. max_inner : has no effect here.

    Returns
    -------
    EqualityResult : with eta = (μ, 0); an iteration is a Newton step.

    Raises
    ------
    ValueError, TypeError : an argument is out of range.

    Warns
    -----
    RuntimeWarning : the tolerance was not reached.
    """
    run = _Run(fun, x0, cons, grad, jac, lag_hess, tol, max_iter, max_inner)
    mu, accuracy = 1.0, 0.1
    while run.status is None:
        point, lam, m = run.point, run.lam, len(run.lam)
        jac_now = point.jac.toarray() if sp.issparse(point.jac) else point.jac
        shifted = lam + mu * point.cons
        gradient = point.grad + jac_now.T @ shifted
        if float(np.linalg.norm(gradient)) <= accuracy:
            run.lam = shifted
            mu, accuracy = 1.5 * mu, 0.1 * accuracy
            run.look()
            continue
        hessian = run.oracle.hessian(point.x, shifted)
        hessian = (hessian.toarray() if sp.issparse(hessian) else hessian) + mu * jac_now.T @ jac_now
        if not np.isfinite(hessian).all():
            run.status = "not finite"
            break
        curvatures, directions = scipy.linalg.eigh(hessian)
        if curvatures[0] < _CURVATURE:
            curvatures = curvatures + (1.0 - curvatures[0])
        d = -directions @ (directions.T @ gradient / curvatures)

        def merit(trial: Point, lam: Vector, mu: float = mu) -> float:
            return trial.fun + float(lam @ trial.cons) + 0.5 * mu * float(trial.cons @ trial.cons)

        N = len(d)
        flops = N**3 / 3.0 + 2.0 * N**2  # of a Cholesky solve, which is enough once the Hessian is known to be positive
        run.step(np.r_[d, np.zeros(m)], float(gradient @ d), merit, 0.1, 1, flops, mu)
    return run.result()


class _Run:
    """What both share: the iterate, its line search, the stopping rule and the history."""

    def __init__(
        self,
        fun: Callable[[Any], Any],
        x0: Any,
        cons: Callable[[Any], Any],
        grad: Callable[[Any], Any] | None,
        jac: Callable[[Any], Any] | None,
        lag_hess: Callable[[Any, Any], Any] | None,
        tol: float,
        max_iter: int,
        max_inner: int,
    ) -> None:
        self.tol = check_number("tol", tol, at_least=0.0)
        self.max_iter = check_integer("max_iter", max_iter, at_least=0)
        check_integer("max_inner", max_inner, at_least=1)
        self.oracle = Oracle(fun, cons, grad=grad, hess=None, jac=jac, lag_hess=lag_hess, like=x0)
        self.point = self.oracle.start(x0)
        self.lam = np.zeros(len(self.point.cons))
        self.status: Status | None = None
        self.rows: list[dict[str, float]] = []
        self.mu = 1.0
        self._record(0.0, 0, 0.0)

    def step(
        self,
        z: Vector,
        slope: float,
        merit: Callable[[Point, Vector], float],
        sufficient: float,
        inner_iters: int,
        flops: float,
        mu: float,
    ) -> None:
        """Move along z = (Δx, Δλ) until the merit function falls, or set the status that says why not."""
        self.mu = mu
        n, point, lam = len(self.point.x), self.point, self.lam
        value = merit(point, lam)
        if not (slope < 0.0 and math.isfinite(value)):
            self.status = "penalties" if math.isfinite(slope) else "not finite"
            return
        trial = point

        def along(step: float) -> float:
            nonlocal trial
            trial = self.oracle.point(point.x + step * z[:n])
            found = merit(trial, lam)
            return found if math.isfinite(found) and trial.finite else math.inf

        slack = 8.0 * self.oracle.eps * (abs(value) + abs(point.fun))
        search = backtrack(along, value + slack, slope, sufficient=sufficient, smallest=0.5, largest=0.5, max_trials=41)
        if not search.success:
            self.status = "line search"
            return
        self.point, self.lam = trial, lam + search.step * z[n:]
        self._record(search.step, inner_iters, flops)

    def look(self) -> None:
        """Apply the stopping rule to the iterate."""
        if self._kkt() <= self.tol:
            self.status = "converged"
        elif len(self.rows) > self.max_iter:
            self.status = "iterations"

    def result(self) -> EqualityResult:
        assert self.status is not None
        kkt, c = self._kkt(), self.point.cons
        message = f"{self.status}: KKT residual {kkt:.1e} after {len(self.rows) - 1} iterations, tol {self.tol:.1e}"
        if self.status != "converged":
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        return EqualityResult(
            x=self.oracle.returned(self.point.x),
            fun=self.point.fun,
            converged=self.status == "converged",
            message=message,
            n_iterations=len(self.rows) - 1,
            history=History.of(self.rows),
            multipliers=self.oracle.returned(self.lam),
            kkt=kkt,
            constr_violation=float(np.abs(c).max()),
            status=self.status,
            inner_iters=int(sum(row["inner_iters"] for row in self.rows)),
            inner_capped=0,
            flops=float(sum(row["flops"] for row in self.rows)),
            eta=(self.mu, 0.0),
            n_values=self.oracle.n_values,
            n_gradients=self.oracle.n_gradients,
            n_hessians=self.oracle.n_hessians,
        )

    def _kkt(self) -> float:
        gradient, c = self.point.lagrangian_gradient(self.lam), self.point.cons
        return math.hypot(float(np.linalg.norm(gradient)), float(np.linalg.norm(c)))

    def _record(self, step: float, inner_iters: int, flops: float) -> None:
        self.rows.append(
            {
                "iteration": len(self.rows),
                "fun": self.point.fun,
                "kkt": self._kkt(),
                "constr_violation": float(np.abs(self.point.cons).max()),
                "step": step,
                "inner_iters": inner_iters,
                "flops": flops,
            }
        )
        self.look()


def _burst(system: System, z: Vector) -> tuple[Vector, float]:
    """Ten products of GMRES from z, or as many as the system has rows, and their operations."""
    N = system.columns
    products = min(_BURST, N)
    found, _ = scipy.sparse.linalg.gmres(
        system.K, system.rhs, x0=z, rtol=0.0, atol=system.target(0.0, z), restart=products, maxiter=1
    )
    return found, 2.0 * system.nnz * (products + 2) + 2.0 * N * products * (products + 1)


def _l1(v: Vector) -> float:
    return float(np.abs(v).sum())
