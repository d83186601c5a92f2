"""The outer loop: Newton-KKT steps solved roughly, made safe by the exact augmented Lagrangian."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import scipy.linalg
import scipy.sparse as sp
import scipy.sparse.linalg
from jaxtyping import Float
from torch import Tensor

from workingpapers.common.line_search import backtrack
from workingpapers.common.validation import check_choice, check_integer, check_number
from workingpapers.optimization.result import History, OptimizationResult
from workingpapers.optimization.sketched_newton.linear import (
    InexactSolver,
    RandomState,
    Sketch,
    Solved,
    System,
    check_sketch,
)
from workingpapers.optimization.sketched_newton.merit import checked_multipliers, merit_gradient, merit_value
from workingpapers.optimization.sketched_newton.oracle import Matrix, Oracle, Point, Vector

Accuracy = Literal["paper", "relative"]
Forcing = Literal["constant", "superlinear", "quadratic"]
Status = Literal["converged", "callback", "iterations", "line search", "penalties", "licq", "singular", "not finite"]
Callback = Callable[[int, Any, float], object]

_MAX_HALVINGS = 40
_DELTA_FLOOR = 1e-6
_ETA1_MAX, _ETA2_MIN = 1e8, 1e-8  # beyond these a direction is taken as it is
_SMALL = 300  # constraints up to which G Gᵀ is treated as dense


@dataclass(frozen=True, eq=False, kw_only=True)
class EqualityResult(OptimizationResult):
    """A KKT pair of min f(x) subject to c(x) = 0, and how it was reached.

    Attributes
    ----------
    multipliers : λ, (m,), with the sign of L = f + λᵀ c.
    kkt : ||(∇_x L, c)|| at the end, the residual of the optimality conditions.
    constr_violation : ||c||_∞ at the end.
    status : "converged", or why not: "iterations", "line search" (no decrease after 40 halvings), "penalties" (they
        diverged), "licq" (the Jacobian lost rank), "singular" (the KKT matrix, with sketch="exact"), "not finite",
        "callback".
    inner_iters : steps of the inner solver, all in all.
    inner_capped : inner solves that ended at `max_inner` before their accuracy was reached.
    flops : floating-point operations of the inner solver; forming the KKT matrix and its tests are not counted.
    eta : the penalties (η1, η2) at the end.
    n_values, n_gradients, n_hessians : points at which f and c, their first derivatives, and ∇²L were evaluated.
    history : with "iteration", "fun", "kkt", "constr_violation", "step", "inner_iters", "capped", "flops", "residual"
        (||K Δz + ∇L|| relative to ||∇L||), "shift" (t in B = H + t I), "eta1", "eta2"; those of a step stand in the
        row of the point it led to.
    """

    multipliers: Any
    kkt: float
    constr_violation: float
    status: Status
    inner_iters: int
    inner_capped: int
    flops: float
    eta: tuple[float, float]
    n_values: int
    n_gradients: int
    n_hessians: int

    @property
    def lam(self) -> Any:
        return self.multipliers


@dataclass(frozen=True)
class Constants:
    """The constants of the method, which rarely need a change; the defaults are the paper's.

    Attributes
    ----------
    eta1, eta2 : penalties at the start, above 0.
    delta : accuracy at the start, above 0; matters little, as the rule brings it down to 1e-6 at once.
    curvature_shift : ξ_B above 0, added to ||H||_F where the reduced Hessian is not positive; part of the accuracy.
    beta : share of the decrease the line search asks for, in (0, 0.5).
    nu : factor of the penalty updates, above 1.
    theta : θ of the accuracy condition "paper", in (0, 1].
    kappa : relative residual of "relative" at most, in (0, 1).
    curvature_tol : least eigenvalue of the reduced Hessian that is taken as positive, at least 0.
    """

    eta1: float = 1.0
    eta2: float = 0.1
    delta: float = 0.1
    curvature_shift: float = 0.1
    beta: float = 0.1
    nu: float = 1.5
    theta: float = 1.0
    kappa: float = 0.1
    curvature_tol: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("eta1", "eta2", "delta", "curvature_shift"):
            check_number(name, getattr(self, name), above=0.0)
        check_number("beta", self.beta, above=0.0, below=0.5)
        check_number("nu", self.nu, above=1.0)
        check_number("theta", self.theta, above=0.0, at_most=1.0)
        check_number("kappa", self.kappa, above=0.0, below=1.0)
        check_number("curvature_tol", self.curvature_tol, at_least=0.0)

    @classmethod
    def of(cls, options: Mapping[str, float] | None) -> Constants:
        known = [entry.name for entry in fields(cls)]
        for name in options or {}:
            if name not in known:
                raise ValueError(f"options must be among {', '.join(known)}, got {name!r}")
        return cls(**(options or {}))


def minimize_equality(
    fun: Callable[[Any], Any],
    x0: Float[np.ndarray, " n"] | Float[Tensor, " n"],
    cons: Callable[[Any], Any],
    *,
    grad: Callable[[Any], Any] | None = None,
    hess: Callable[[Any], Any] | None = None,
    jac: Callable[[Any], Any] | None = None,
    lag_hess: Callable[[Any, Any], Any] | None = None,
    lam0: Float[np.ndarray, " m"] | Float[Tensor, " m"] | Literal["ls"] | None = None,
    sketch: Sketch = "kaczmarz",
    block: int = 1,
    accuracy: Accuracy = "paper",
    theta: Forcing = "constant",
    tol: float = 1e-4,
    licq_tol: float = 1e-2,
    max_iter: int = 10_000,
    max_inner: int = 100_000,
    callback: Callback | None = None,
    random_state: RandomState = None,
    options: Mapping[str, float] | None = None,
) -> EqualityResult:
    """Minimise f(x) subject to c(x) = 0, with Newton-KKT systems solved only roughly.

    Every iteration solves [[B, Gᵀ], [G, 0]] Δz = -(∇_x L, c) with G = ∇c and B = ∇²_x L + t I by random sketches until
    the residual is small enough, raises the penalties of the exact augmented Lagrangian until Δz is a direction of
    descent for it, and halves the step from 1 until that function falls.

    Parameters
    ----------
    fun : x, shape (n,), to the number f(x).
    x0 : start, finite; not modified. A tensor: the callables get tensors of its dtype and device, and derivatives that
        are not given come by autograd. An array: they get float64 arrays, and grad, jac and lag_hess are needed.
    cons : x to c(x), shape (m,), 1 <= m <= n.
    grad : x to ∇f(x), shape (n,).
    hess : x to ∇²f(x), shape (n, n), with a tensor x0; the constraints' part of ∇²L then comes by autograd.
    jac : x to G(x), shape (m, n), dense or sparse (scipy or torch).
    lag_hess : (x, λ) to ∇²_x L = ∇²f + Σ λ_i ∇²c_i, shape (n, n), dense or sparse. Where jac and lag_hess are both
        sparse, the KKT matrix is, and nothing dense of order n is formed.
    lam0 : λ at the start, shape (m,); zero by default; "ls" takes the least-squares multipliers -(G Gᵀ)^{-1} G ∇f.
    sketch, block : inner solver, as in `sketch_project`.
    accuracy : "paper": ||r|| <= θ δ ||∇L|| / (||K|| Ψ), which with the paper's constants asks for a solution exact to
        about ten digits. "relative": ||r|| <= κ ||∇L||, far cheaper; descent is enforced in both.
    theta : κ of "relative": "constant" 0.1; "superlinear" min(0.1, ||∇L||^{1/2}); "quadratic" min(0.1, ||∇L||).
        Has no effect on "paper".
    tol : stop at ||(∇_x L, c)|| <= tol, at least 0.
    licq_tol : least eigenvalue of G Gᵀ with which to go on, at least 0.
    max_iter : at least 0. max_inner : steps of one inner solve, at least 1.
    callback : called with the iteration, x and f(x) after every iteration; a true value stops.
    options : constants of the method by name, see `Constants`.

    Returns
    -------
    EqualityResult

    Raises
    ------
    ValueError, TypeError : an argument is out of range, a shape is wrong, or a value at x0 is not finite.
    NotImplementedError : cons is a SciPy constraint with inequalities; the message says how to rewrite them.
    numpy.linalg.LinAlgError : the Jacobian at x0 has no full row rank, by licq_tol.

    Warns
    -----
    RuntimeWarning : the tolerance was not reached, with the reason.
    """
    constants = Constants.of(options)
    check_sketch(sketch, block)
    check_choice("accuracy", accuracy, get_args(Accuracy))
    check_choice("theta", theta, get_args(Forcing))
    tol = check_number("tol", tol, at_least=0.0)
    licq_tol = check_number("licq_tol", licq_tol, at_least=0.0)
    max_iter = check_integer("max_iter", max_iter, at_least=0)
    max_inner = check_integer("max_inner", max_inner, at_least=1)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {callback!r}")
    oracle = Oracle(fun, cons, grad=grad, hess=hess, jac=jac, lag_hess=lag_hess, like=x0)
    point = oracle.start(x0)
    singular_value = math.sqrt(smallest_gram_eigenvalue(point.jac))
    if singular_value**2 < licq_tol or singular_value == 0.0:
        raise np.linalg.LinAlgError(
            f"LICQ fails: smallest singular value of the Jacobian at x0 is {singular_value:.1e}, "
            f"its square must be at least licq_tol={licq_tol:g}"
        )
    lam = _start_multipliers(lam0, point)
    inner = InexactSolver(sketch, block, max_inner, np.random.default_rng(random_state))
    newton = _Newton(oracle, inner, constants, accuracy, theta)
    return newton.run(point, lam, tol, licq_tol, max_iter, callback)


class _Newton:
    """The state of one run: the iterate (point, lam), the penalties, the accuracy and what was spent."""

    def __init__(
        self, oracle: Oracle, inner: InexactSolver, constants: Constants, accuracy: Accuracy, theta: Forcing
    ) -> None:
        self.oracle, self.inner, self.constants = oracle, inner, constants
        self.accuracy, self.theta = accuracy, theta
        self.eta1, self.eta2, self.delta = constants.eta1, constants.eta2, constants.delta
        self.tightened = 1.0  # what failed descent tests have divided κ by
        self.spent = Solved(0, False, 0.0, 0.0)
        self.rows: list[dict[str, float]] = []
        self.n_capped = 0

    def run(
        self, point: Point, lam: Vector, tol: float, licq_tol: float, max_iter: int, callback: Callback | None
    ) -> EqualityResult:
        self.point, self.lam = point, lam
        self._record(step=0.0, shift=0.0, solved=Solved(0, False, 0.0, 0.0), kkt=1.0)
        iteration = 0
        status: Status | None = None
        while status is None:
            if self.rows[-1]["kkt"] <= tol:
                status = "converged"
            elif iteration > 0 and callback is not None and self._stopped_by(callback, iteration):
                status = "callback"
            elif iteration == max_iter:
                status = "iterations"
            else:
                status = self._iterate(licq_tol)
                iteration += status is None
        return self._result(status, tol, iteration)

    # --- one iteration ----------------------------------------------------------------------------------------------

    def _iterate(self, licq_tol: float) -> Status | None:
        """One step, or why there is none."""
        point, lam, constants = self.point, self.lam, self.constants
        jac = point.jac
        xi_G = smallest_gram_eigenvalue(jac)
        if xi_G < licq_tol or xi_G == 0.0:
            return "licq"
        hessian = self.oracle.hessian(point.x, lam)
        if not np.isfinite(hessian.data if sp.issparse(hessian) else hessian).all():
            return "not finite"
        H_norm = _norm(hessian)
        positive = reduced_hessian_is_positive(hessian, jac, constants.curvature_tol)
        shift = 0.0 if positive else constants.curvature_shift + H_norm  # t
        n, m = len(point.x), len(point.cons)
        B = _plus_multiple_of_identity(hessian, shift)
        grad_L = np.concatenate([point.lagrangian_gradient(lam), point.cons])  # ∇L
        kkt = float(np.linalg.norm(grad_L))
        system = System(kkt_matrix(B, jac), -grad_L)

        upsilon = max(_norm(jac), H_norm, 1.0)
        psi = 20.0 * max(_norm(B) ** 2, 1.0) / (min(xi_G, 1.0) * min(constants.curvature_shift, 1.0))
        self.delta = max(_DELTA_FLOOR, min(self.delta, self._delta_trial(upsilon, psi)))
        z = np.zeros(n + m)
        total = Solved(0, False, 0.0, 0.0)
        while True:
            try:
                solved = self.inner.solve(system, z, self._wanted(system, psi, kkt))
            except np.linalg.LinAlgError:
                return "singular"
            total = Solved(total.steps + solved.steps, solved.capped, solved.residual, total.flops + solved.flops)
            slope = float(merit_gradient(point, hessian, lam, self.eta1, self.eta2) @ z)
            # (∇L_η)ᵀ Δz <= -(η2 / 2) ||∇L||²
            if slope <= -0.5 * self.eta2 * kkt**2:
                break
            if not math.isfinite(slope):
                return "not finite"
            if self.eta1 > _ETA1_MAX or self.eta2 < _ETA2_MIN:
                if slope >= 0.0:
                    return "penalties"
                break
            self.eta1 *= constants.nu**2
            self.eta2 /= constants.nu
            self.delta = max(_DELTA_FLOOR, min(self.delta / constants.nu**4, self._delta_trial(upsilon, psi)))
            self.tightened *= constants.nu**4

        step = self._line_search(z, slope)
        if step == 0.0:
            return "line search"
        self._record(step=step, shift=shift, solved=total, kkt=kkt)
        return None

    def _delta_trial(self, upsilon: float, psi: float) -> float:
        """(0.5 - β) η2 / ((1 + η1 + η2) Υ² Ψ²)."""
        return (0.5 - self.constants.beta) * self.eta2 / ((1.0 + self.eta1 + self.eta2) * upsilon**2 * psi**2)

    def _wanted(self, system: System, psi: float, kkt: float) -> float:
        """The residual ||K Δz + ∇L|| to reach."""
        if self.accuracy == "paper":
            return self.constants.theta * self.delta * kkt / (system.norm * psi)
        forcing = {"constant": math.inf, "superlinear": math.sqrt(kkt), "quadratic": kkt}[self.theta]
        return min(self.constants.kappa, forcing) / self.tightened * kkt

    def _line_search(self, z: Vector, slope: float) -> float:
        """Halve the step from 1 until L_η falls; the iterate moves there. Returns 0 where it never does."""
        n, point, lam = len(self.point.x), self.point, self.lam
        value = merit_value(point, lam, self.eta1, self.eta2)
        # near a solution the decrease drowns in the rounding of f; without this slack the search would end there
        slack = 8.0 * self.oracle.eps * (abs(value) + abs(point.fun) + abs(float(point.cons @ lam)))
        trial, trial_lam = point, lam

        def merit(step: float) -> float:
            nonlocal trial, trial_lam
            trial, trial_lam = self.oracle.point(point.x + step * z[:n]), lam + step * z[n:]
            found = merit_value(trial, trial_lam, self.eta1, self.eta2)
            return found if math.isfinite(found) else math.inf

        search = backtrack(
            merit,
            value + slack,
            slope,
            sufficient=self.constants.beta,
            smallest=0.5,
            largest=0.5,
            max_trials=_MAX_HALVINGS + 1,
        )
        if search.success:
            self.point, self.lam = trial, trial_lam
        return search.step

    # --- bookkeeping ------------------------------------------------------------------------------------------------

    def _record(self, *, step: float, shift: float, solved: Solved, kkt: float) -> None:
        """A row for the iterate, with the step that led to it; `kkt` is ||∇L|| before that step."""
        gradient, c = self.point.lagrangian_gradient(self.lam), self.point.cons
        self.n_capped += solved.capped
        self.spent = Solved(self.spent.steps + solved.steps, False, 0.0, self.spent.flops + solved.flops)
        self.rows.append(
            {
                "iteration": len(self.rows),
                "fun": self.point.fun,
                "kkt": math.hypot(float(np.linalg.norm(gradient)), float(np.linalg.norm(c))),
                "constr_violation": float(np.abs(c).max()),
                "step": step,
                "inner_iters": solved.steps,
                "capped": solved.capped,
                "flops": solved.flops,
                "residual": solved.residual / kkt,
                "shift": shift,
                "eta1": self.eta1,
                "eta2": self.eta2,
            }
        )

    def _stopped_by(self, callback: Callback, iteration: int) -> bool:
        return bool(callback(iteration, self.oracle.returned(self.point.x), self.point.fun))

    def _result(self, status: Status, tol: float, iteration: int) -> EqualityResult:
        last = self.rows[-1]
        message = _REASONS[status].format(iteration=iteration)
        message += f"; KKT residual {last['kkt']:.1e} {'<=' if last['kkt'] <= tol else '>'} tol {tol:.1e}"
        if self.n_capped:
            message += f"; {self.n_capped} inner solves ended at max_inner={self.inner.max_steps}"
        if status != "converged":
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        return EqualityResult(
            x=self.oracle.returned(self.point.x),
            fun=self.point.fun,
            converged=status == "converged",
            message=message,
            n_iterations=iteration,
            history=History.of(self.rows),
            multipliers=self.oracle.returned(self.lam),
            kkt=last["kkt"],
            constr_violation=last["constr_violation"],
            status=status,
            inner_iters=self.spent.steps,
            inner_capped=self.n_capped,
            flops=self.spent.flops,
            eta=(self.eta1, self.eta2),
            n_values=self.oracle.n_values,
            n_gradients=self.oracle.n_gradients,
            n_hessians=self.oracle.n_hessians,
        )


_REASONS: dict[Status, str] = {
    "converged": "converged after {iteration} iterations",
    "callback": "stopped by the callback after {iteration} iterations",
    "iterations": "stopped after {iteration} iterations",
    "line search": f"the merit function did not fall in {_MAX_HALVINGS} halvings after {{iteration}} iterations",
    "penalties": "the penalties diverged after {iteration} iterations and the direction is not one of descent",
    "licq": "the Jacobian lost its full row rank (by licq_tol) after {iteration} iterations",
    "singular": "the KKT matrix is singular after {iteration} iterations",
    "not finite": "a derivative is not finite after {iteration} iterations",
}


# --- linear algebra -----------------------------------------------------------------------------------------------


def kkt_matrix(B: Matrix, jac: Matrix) -> Matrix:
    """K = [[B, Gᵀ], [G, 0]], CSR where both are."""
    if sp.issparse(B) and sp.issparse(jac):
        return sp.csr_array(sp.block_array([[B, jac.T], [jac, None]]))
    B, G = _dense(B), _dense(jac)
    return np.block([[B, G.T], [G, np.zeros((len(G), len(G)))]])


def smallest_gram_eigenvalue(jac: Matrix) -> float:
    """ξ_G = λ_min(G Gᵀ), the square of G's smallest singular value."""
    if not sp.issparse(jac) or jac.shape[0] <= _SMALL:
        return float(np.linalg.svd(_dense(jac), compute_uv=False)[-1]) ** 2
    gram = sp.csc_array(jac @ jac.T)
    try:
        inverse = scipy.sparse.linalg.splu(gram)
    except RuntimeError:  # exactly singular
        return 0.0
    operator = scipy.sparse.linalg.LinearOperator(gram.shape, matvec=inverse.solve, dtype=np.float64)
    largest = _extreme_eigenvalue(operator, "LA")
    return 1.0 / largest if largest > 0.0 and math.isfinite(largest) else 0.0


def reduced_hessian_is_positive(hessian: Matrix, jac: Matrix, threshold: float) -> bool:
    """Whether Zᵀ H Z has no eigenvalue below the threshold, Z an orthonormal basis of the null space of G."""
    m, n = jac.shape
    if m == n:
        return True
    if not (sp.issparse(hessian) and sp.issparse(jac)):
        basis, _ = scipy.linalg.qr(_dense(jac).T)
        Z = basis[:, m:]
        reduced = Z.T @ _dense(hessian) @ Z
        return bool(scipy.linalg.eigvalsh(reduced, subset_by_index=[0, 0])[0] >= threshold)
    off_diagonal = np.abs(hessian).sum(axis=1) - np.abs(hessian.diagonal())
    if (hessian.diagonal() - off_diagonal >= threshold).all():  # Gershgorin: H itself is positive
        return True
    gram = scipy.sparse.linalg.splu(sp.csc_array(jac @ jac.T))
    ceiling = _norm(hessian)

    def projected(v: Vector) -> Vector:
        inside = v - jac.T @ gram.solve(jac @ v)  # P v, P = I - Gᵀ (G Gᵀ)^{-1} G
        image = hessian @ inside
        # P H P, with the range of Gᵀ moved to the top of the spectrum
        moved: Vector = image - jac.T @ gram.solve(jac @ image) + ceiling * (v - inside)
        return moved

    operator = scipy.sparse.linalg.LinearOperator((n, n), matvec=projected, dtype=np.float64)
    return _extreme_eigenvalue(operator, "SA") >= threshold


def _extreme_eigenvalue(operator: scipy.sparse.linalg.LinearOperator, which: Literal["SA", "LA"]) -> float:
    """To three digits, by Lanczos; from a fixed start, so that equal matrices give equal answers."""
    start = np.random.default_rng(0).standard_normal(operator.shape[0])
    try:
        found = scipy.sparse.linalg.eigsh(
            operator, k=1, which=which, v0=start, tol=1e-3, maxiter=300, return_eigenvectors=False
        )
    except scipy.sparse.linalg.ArpackNoConvergence:
        return math.nan  # not certified: comparisons with NaN are false
    return float(found[0])


def _start_multipliers(lam0: Any, point: Point) -> Vector:
    m = len(point.cons)
    if lam0 is None:
        return np.zeros(m)
    if isinstance(lam0, str):
        if lam0 != "ls":
            raise ValueError(f"lam0 must be 'ls' or a vector of m = {m} numbers, got {lam0!r}")
        if sp.issparse(point.jac):
            found: Vector = scipy.sparse.linalg.spsolve(sp.csc_array(point.jac @ point.jac.T), -point.jac @ point.grad)
            return np.atleast_1d(found)
        least_squares: Vector = np.linalg.lstsq(point.jac.T, -point.grad)[0]
        return least_squares
    return checked_multipliers("lam0", lam0, m)


def _plus_multiple_of_identity(hessian: Matrix, shift: float) -> Matrix:
    if shift == 0.0:
        return hessian
    n = hessian.shape[0]
    if sp.issparse(hessian):
        return sp.csr_array(hessian + shift * sp.eye_array(n))
    return hessian + shift * np.eye(n)


def _norm(matrix: Matrix) -> float:
    return float(scipy.sparse.linalg.norm(matrix) if sp.issparse(matrix) else np.linalg.norm(matrix))


def _dense(matrix: Matrix) -> Float[np.ndarray, "_ _"]:
    return np.asarray(matrix.toarray() if sp.issparse(matrix) else matrix)
