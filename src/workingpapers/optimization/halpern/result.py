"""What the solvers return, and how they measure, stop and report on the way."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from workingpapers.common.validation import check_finite, check_integer, check_number
from workingpapers.optimization.halpern._kernels import Components, Resolvent
from workingpapers.optimization.halpern.operators import FiniteSumOperator, Oracle
from workingpapers.optimization.halpern.prox import Prox, Vector, compiled_prox, identity_prox
from workingpapers.optimization.result import History, OptimizationResult

Callback = Callable[[int, Vector, float], object]
RandomState = int | np.random.Generator | None

_STALLED = 10  # checks without any decrease before the user is told


@dataclass(frozen=True, eq=False, kw_only=True)
class MonotoneInclusionResult(OptimizationResult):
    """A point u with 0 in F(u) + G(u), approximately, and how it was reached.

    Attributes
    ----------
    x : the last iterate, shape (d,); `u` is the same array under the paper's name.
    fun : the natural residual R(u) = L_F ||u - J_{G/L_F}(u - F(u)/L_F)|| at x, with the true F; see
        `FiniteSumOperator.natural_residual`. L stands in for L_F where L_F is unknown. `residual` is its other name.
    converged : whether residual <= tol.
    message : why the solver stopped, for people.
    n_iterations : iterations; of `vr_halpern_monotone`, outer ones.
    history : one row for each evaluation of the residual: "iteration", at whose end the point was reached; "fun", the
        natural residual; "oracle_calls", those of the method until then, without those of the residual;
        "residual_bound"; "duality_gap" of a matrix game, NaN for other problems.
    residual_bound : ||F(u) + g|| with a known g in G(u), so an upper bound of the operator norm residual Res(u);
        infinite where the method does not end on a resolvent.
    oracle_calls : component evaluations F_i(u) spent by the method; n of them are one pass.
    evaluation_calls : further component evaluations, spent on the residual.
    duality_gap : at x, for a matrix game; otherwise None.
    """

    residual_bound: float
    oracle_calls: int
    evaluation_calls: int
    duality_gap: float | None

    @property
    def u(self) -> Vector:
        vector: Vector = self.x
        return vector

    @property
    def residual(self) -> float:
        return self.fun


@dataclass
class Draws:
    """Coins and oracle indices, drawn ahead in blocks so that compiled and plain loops use the same ones."""

    operator: FiniteSumOperator
    batch_size: int
    rng: np.random.Generator
    coins: np.ndarray = field(init=False, default_factory=lambda: np.empty(0))
    indices: np.ndarray = field(init=False, default_factory=lambda: np.empty((0, 1, 1), dtype=np.int64))

    def block(self) -> tuple[Float[np.ndarray, " steps"], Int[np.ndarray, "steps batch width"]]:
        """What is left of the present block, or a new one."""
        if not len(self.coins):
            steps = max(1, min(2048, 2**18 // self.batch_size))
            self.coins = self.rng.random(steps)
            drawn = self.operator.draw(self.rng, (steps, self.batch_size))
            self.indices = np.ascontiguousarray(drawn.reshape(steps, self.batch_size, -1), dtype=np.int64)
        return self.coins, self.indices

    def take(self, steps: int) -> None:
        self.coins, self.indices = self.coins[steps:], self.indices[steps:]


def oracle_indices(drawn: Int[np.ndarray, "batch width"]) -> Int[np.ndarray, "batch ..."]:
    """One step's indices in the shape the operator's `draw` gave them: (batch,), or (batch, 2) for a game."""
    return drawn[:, 0] if drawn.shape[1] == 1 else drawn


class Progress:
    """The budget, the residual checks and the result of one run.

    Parameters
    ----------
    value : maps u to F(u), the operator whose inclusion is being solved.
    L_F : sets the step 1/L_F of the natural residual.
    """

    def __init__(
        self,
        operator: FiniteSumOperator,
        prox: Prox,
        L_F: float,
        *,
        value: Callable[[Vector], Vector] | None = None,
        tol: float,
        max_passes: float,
        eval_every: float,
        callback: Callback | None,
    ) -> None:
        self.operator = operator
        self.prox = prox
        self.L_F = L_F
        self.value = value or operator.full
        self.tol = check_number("tol", tol, at_least=0.0)
        self.budget = check_number("max_passes", max_passes, above=0.0) * operator.n
        self.interval = check_number("eval_every", eval_every, above=0.0) * operator.n
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, got {callback!r}")
        self.callback = callback
        self.calls = 0
        self.evaluation_calls = 0
        self.next_check = self.interval
        self.records: list[dict[str, float]] = []
        self.rises = 0
        self.stopped_by_callback = False

    @property
    def limit(self) -> float:
        """Component evaluations after which the next check, or the end of the budget, is due."""
        return min(self.next_check, self.budget)

    def spend(self, calls: int, *, already_counted: bool) -> None:
        """Set the calls of the method to `calls`; compiled loops do not reach the operator's own counter."""
        if not already_counted:
            self.operator.oracle_calls += calls - self.calls
        self.calls = calls

    def check(self, iteration: int, u: Vector, value: Vector | None = None, g: Vector | None = None) -> bool:
        """Measure the residual at u, and say whether to stop.

        Parameters
        ----------
        value : F(u) where the method has just computed it; otherwise it is evaluated here.
        g : an element of G(u) where the method knows one.
        """
        check_progress(u, iteration, self.L_F)
        if value is None:
            value = self.value(u)
            self.evaluation_calls += self.operator.n
        check_progress(value, iteration, self.L_F)
        residual = self.operator.natural_residual(u, self.prox, self.L_F, value=value)
        check_progress(np.array(residual), iteration, self.L_F)
        if self.prox is identity_prox:
            g = np.zeros_like(u)
        bound = math.inf if g is None else float(np.linalg.norm(value + g))
        gap = self.operator.duality_gap(u)
        self.rises = self.rises + 1 if self.records and residual >= self.records[-1]["fun"] else 0
        if self.rises == _STALLED:
            message = f"the residual has not decreased over {_STALLED} checks (now {residual:.1e}): is F monotone?"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        self.records.append(
            {
                "iteration": iteration,
                "fun": residual,
                "oracle_calls": self.calls,
                "residual_bound": bound,
                "duality_gap": math.nan if gap is None else gap,
            }
        )
        self.next_check = self.calls + self.interval
        if self.callback is not None and self.callback(iteration, u.copy(), residual):
            self.stopped_by_callback = True
        return residual <= self.tol or self.stopped_by_callback or self.calls >= self.budget

    def result(self, u: Vector) -> MonotoneInclusionResult:
        history = History.of(self.records)
        residual, gap = float(history["fun"][-1]), float(history["duality_gap"][-1])
        converged = residual <= self.tol
        passes = self.calls / self.operator.n
        if converged:
            message = f"residual {residual:.1e} <= tol {self.tol:.1e} after {passes:.1f} passes"
        else:
            why = "the callback asked to stop" if self.stopped_by_callback else "the passes are used up"
            message = f"{why}: residual {residual:.1e} > tol {self.tol:.1e} after {passes:.1f} passes"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        return MonotoneInclusionResult(
            x=u.copy(),
            fun=residual,
            residual_bound=float(history["residual_bound"][-1]),
            converged=converged,
            message=message,
            n_iterations=int(history["iteration"][-1]),
            oracle_calls=self.calls,
            evaluation_calls=self.evaluation_calls,
            history=history,
            duality_gap=None if math.isnan(gap) else gap,
        )


def check_progress(u: Vector, iteration: int, L: float) -> None:
    """Raise FloatingPointError, naming the iteration, unless u is finite."""
    if not np.isfinite(u).all():
        raise FloatingPointError(
            f"iteration {iteration} is not finite: is the Lipschitz constant {L:g} too small, the step too long, "
            "or F not monotone?"
        )


def prepare(
    F_batch: Oracle | FiniteSumOperator,
    u0: Vector,
    n: int | None,
    prox: Prox | None,
    full: Callable[[Vector], Vector] | None = None,
    probs: Float[np.ndarray, " n"] | None = None,
) -> tuple[FiniteSumOperator, Vector, Prox]:
    """Check what all solvers take, and return the operator, a copy of the start and the resolvent.

    Raises
    ------
    ValueError, TypeError : naming the argument.
    """
    if isinstance(F_batch, FiniteSumOperator):
        operator = F_batch
        if not (n is None and full is None and probs is None):
            raise ValueError("n, full and probs belong to the FiniteSumOperator and must not be given again")
    else:
        if n is None:
            raise ValueError("n must be given with a callable F_batch")
        operator = FiniteSumOperator(F_batch, n, full=full, probs=probs)
    start = np.array(u0, dtype=float)  # a copy: the caller's array stays as it is
    if start.ndim != 1 or not len(start):
        raise ValueError(f"u0 must be a vector, got shape {start.shape}")
    if operator.dimension not in (None, len(start)):
        raise ValueError(f"u0 must have length {operator.dimension}, got {len(start)}")
    check_finite("u0", start)
    prox = prox or operator.prox or identity_prox
    if not callable(prox):
        raise TypeError(f"prox must be callable, got {prox!r}")
    if np.shape(image := prox(start.copy(), 1.0)) != start.shape:
        raise ValueError(f"prox must return an array of shape {start.shape}, got {np.shape(image)}")
    return operator, start, prox


def compiled(operator: FiniteSumOperator, prox: Prox, dimension: int) -> tuple[Components, Resolvent] | None:
    """What the compiled loops need, when they know both the components and the resolvent."""
    resolvent = compiled_prox(prox, dimension)
    return None if operator._components is None or resolvent is None else (operator._components, resolvent)


def average_constant(
    L: float | str | None,
    known: float | None,
    operator: FiniteSumOperator,
    u0: Vector,
    kind: str,
    rng: np.random.Generator,
) -> float:
    """The constant L on average that the caller gave, asked to be estimated, or left to the operator."""
    if isinstance(L, str):
        if L != "estimate":
            raise ValueError(f"L must be a positive number or 'estimate', got {L!r}")
        return operator.lipschitz_estimate(u0, kind=kind, random_state=rng)
    if L is not None:
        return check_number("L", L, above=0.0)
    if known is None:
        raise ValueError("L must be a positive number or 'estimate': the operator does not know its constant")
    return known


def full_constant(L_F: float | None, operator: FiniteSumOperator, u0: Vector) -> float:
    """L_F as the caller gave it, as the operator knows it, or estimated."""
    if L_F is not None:
        return check_number("L_F", L_F, above=0.0)
    return operator.L_F or operator.lipschitz_estimate(u0, kind="full", random_state=0)


def prepare_full(
    F: Callable[[Vector], Vector] | FiniteSumOperator, u0: Vector, n: int | None, prox: Prox | None
) -> tuple[FiniteSumOperator, Vector, Prox]:
    """As `prepare`, for methods that use full values only."""
    if isinstance(F, FiniteSumOperator):
        return prepare(F, u0, n, prox)
    if not callable(F):
        raise TypeError(f"F must be callable, got {F!r}")
    return prepare(lambda u, indices: F(u), u0, 1 if n is None else n, prox, full=F)


def sampling(batch_size: int | None, default: int) -> int:
    return default if batch_size is None else check_integer("batch_size", batch_size, at_least=1)
