"""Inexact Halpern iteration on the resolvent, for operators that are monotone and Lipschitz: Algorithms 2 and 3."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from workingpapers.common.validation import check_finite, check_number
from workingpapers.optimization.halpern._kernels import forb_steps
from workingpapers.optimization.halpern.operators import FiniteSumOperator, Oracle
from workingpapers.optimization.halpern.prox import Prox, Vector
from workingpapers.optimization.halpern.result import (
    Callback,
    Draws,
    MonotoneInclusionResult,
    Progress,
    RandomState,
    average_constant,
    check_progress,
    compiled,
    oracle_indices,
    prepare,
    sampling,
)

_SAFE_SCALE = 0.5  # gamma within the theory of VR-FoRB


def vr_halpern_monotone(
    F_batch: Oracle | FiniteSumOperator,
    u0: Vector,
    n: int | None = None,
    L: float | Literal["estimate"] | None = None,
    prox: Prox | None = None,
    *,
    full: Callable[[Vector], Vector] | None = None,
    probs: Float[np.ndarray, " n"] | None = None,
    batch_size: int | None = None,
    eta: float | None = None,
    inner_factor: float = 1.0,
    inner_step_scale: float = 2.0,
    adaptive: bool = True,
    tol: float = 1e-6,
    max_passes: float = 100,
    eval_every: float = 1.0,
    callback: Callback | None = None,
    random_state: RandomState = None,
) -> MonotoneInclusionResult:
    """Solve 0 in F(u) + G(u), F an average of n components, monotone and Lipschitz, at the last iterate.

    Algorithm 2: u_{k+1} = lambda_k u_0 + (1 - lambda_k) J_k, lambda_k = 1/(k+2), where J_k approximates the resolvent
    J_{eta (F + G)}(u_k) by M_k = ceil(c n log(k+2)) steps of VR-FoRB from u_k. The returned point is J_k. With exact
    resolvents Res <= 2 ||u_0 - u*|| / (eta (k+1)), hence O~(n + sqrt(n) L / eps) component evaluations, against
    O(n L_F / eps) of the full-operator methods: the gain is at most sqrt(n) L_F / L. Where no guarantee on the last
    iterate is needed, `vr_extragradient` with a tuned step is often several times faster.

    Parameters
    ----------
    F_batch, u0, n, prox, full, probs : as in `vr_halpern`.
    L : Lipschitz on average, E||F_q(u) - F_q(v)||^2 <= L^2 ||u - v||^2, above 0 (||A||_F for a matrix game); or
        "estimate", a lower bound from differences around u0.
    batch_size : b components per inner step, at least 1; default 1.
    eta : step of the resolvent, above 0; default sqrt(n)/L. On games four times that often pays.
    inner_factor : c above 0. Theory asks for several tens; 1 and less are far faster in practice.
    inner_step_scale : gamma above 0 in the inner step gamma sqrt(p) / (L + 1/eta). Theory covers 0.5.
    adaptive : end an inner solve once its error is certified to be below ||u_k - J_k|| / (k+2)^4, the accuracy the
        theory asks for; and when the inner residual has grown over an inner solve, repeat it with gamma = 0.5 and
        keep that value.
    tol, max_passes, eval_every, callback, random_state : as in `vr_halpern`; checks fall at the end of inner solves.

    Returns
    -------
    MonotoneInclusionResult

    Raises
    ------
    ValueError, TypeError : an argument is out of range.
    FloatingPointError : an iterate or F stopped being finite; the message names the outer iteration.

    Warns
    -----
    RuntimeWarning : the tolerance was not reached, or the residual has not decreased over ten checks.
    """
    operator, u, prox = prepare(F_batch, u0, n, prox, full, probs)
    rng = np.random.default_rng(random_state)
    known = operator.lipschitz or operator.cocoercivity  # L-cocoercive on average is L-Lipschitz on average
    L = average_constant(L, known, operator, u, "lipschitz", rng)
    eta = math.sqrt(operator.n) / L if eta is None else check_number("eta", eta, above=0.0)
    inner_factor = check_number("inner_factor", inner_factor, above=0.0)
    inner_step_scale = check_number("inner_step_scale", inner_step_scale, above=0.0)
    progress = Progress(
        operator, prox, operator.L_F or L, tol=tol, max_passes=max_passes, eval_every=eval_every, callback=callback
    )
    inner = _Forb(operator, prox, L, Draws(operator, sampling(batch_size, 1), rng), progress)

    start, k = u.copy(), 0
    with np.errstate(over="ignore", invalid="ignore"):
        value = operator.full(u)
        progress.calls += operator.n
        stop = progress.check(0, u, value)
        while not stop:
            inner_steps = math.ceil(inner_factor * operator.n * math.log(k + 2))  # M_k
            accuracy = (k + 2.0) ** -4 if adaptive else 0.0
            before = inner.begin(u, value, centre=u, mu=1.0 / eta, scale=inner_step_scale)
            after = inner.run(inner_steps, progress.budget, accuracy)
            if adaptive and not after <= before and inner_step_scale > _SAFE_SCALE:
                inner_step_scale = _SAFE_SCALE
                inner.begin(u, value, centre=u, mu=1.0 / eta, scale=inner_step_scale)
                inner.run(inner_steps, progress.budget, accuracy)
            k += 1
            approximation = inner.z  # of J_{eta (F + G)}(u_k)
            check_progress(approximation, k, L)
            if progress.calls >= progress.limit:
                stop = progress.check(k, approximation, inner.value_at_z(), inner.g)
            if not stop:
                anchor = 1.0 / (k + 1)  # lambda_{k-1}
                u = anchor * start + (1.0 - anchor) * approximation
                value = operator.full(u)
                progress.calls += operator.n
    return progress.result(approximation if k else u)


def vr_forb(
    F_batch: Oracle | FiniteSumOperator,
    u0: Vector,
    n: int | None = None,
    L: float | Literal["estimate"] | None = None,
    prox: Prox | None = None,
    *,
    full: Callable[[Vector], Vector] | None = None,
    probs: Float[np.ndarray, " n"] | None = None,
    batch_size: int | None = None,
    center: Vector | None = None,
    eta: float | None = None,
    step_scale: float = _SAFE_SCALE,
    tol: float = 1e-6,
    max_passes: float = 100,
    eval_every: float = 1.0,
    callback: Callback | None = None,
    random_state: RandomState = None,
) -> MonotoneInclusionResult:
    """Variance-reduced forward-reflected-backward splitting: solve 0 in F(z) + G(z), or evaluate a resolvent.

    With `center` c and `eta` it solves 0 in F(z) + (z - c)/eta + G(z), whose solution is J_{eta (F + G)}(c), at a
    linear rate: Algorithm 3, the inner solver of `vr_halpern_monotone`, there written for eta times this inclusion.
    Without, it solves 0 in F(z) + G(z), with no rate for the last iterate. Three component evaluations a step.

    Parameters
    ----------
    F_batch, u0, n, prox, full, probs : as in `vr_halpern`.
    L : Lipschitz on average, as in `vr_halpern_monotone`.
    batch_size : b components per step, at least 1; default 1. The snapshot is renewed with probability p = b/n.
    center : c, shape (d,), finite; not modified.
    eta : above 0; needed with `center`, refused without.
    step_scale : gamma above 0 in the step gamma sqrt(p) / (L_b + 1/eta), with L_b the constant of a batch; theory
        covers 0.5; for a resolvent twice to eight times that is often stable, without `center` less.
    tol : stop when the natural residual of the inclusion being solved is at most tol, at least 0.
    max_passes, eval_every, callback, random_state : as in `vr_halpern`.

    Returns
    -------
    MonotoneInclusionResult : its residuals are those of the inclusion being solved.

    Raises
    ------
    ValueError, TypeError, FloatingPointError : as `vr_halpern_monotone`.

    Warns
    -----
    RuntimeWarning : the tolerance was not reached, or the residual has not decreased over ten checks.
    """
    operator, z, prox = prepare(F_batch, u0, n, prox, full, probs)
    rng = np.random.default_rng(random_state)
    L = average_constant(L, operator.lipschitz or operator.cocoercivity, operator, z, "lipschitz", rng)
    if (center is None) != (eta is None):
        raise ValueError(f"center and eta must be given together, got center={center!r}, eta={eta!r}")
    mu = 0.0 if eta is None else 1.0 / check_number("eta", eta, above=0.0)
    centre = np.zeros_like(z) if center is None else np.array(center, dtype=float)
    if centre.shape != z.shape:
        raise ValueError(f"center must have shape {z.shape}, got {centre.shape}")
    check_finite("center", centre)
    step_scale = check_number("step_scale", step_scale, above=0.0)
    progress = Progress(
        operator,
        prox,
        (operator.L_F or L) + mu,
        value=lambda point: operator.full(point) + mu * (point - centre),
        tol=tol,
        max_passes=max_passes,
        eval_every=eval_every,
        callback=callback,
    )
    forb = _Forb(operator, prox, L, Draws(operator, sampling(batch_size, 1), rng), progress)

    with np.errstate(over="ignore", invalid="ignore"):
        value = operator.full(z)
        progress.calls += operator.n
        stop = progress.check(0, z, value + mu * (z - centre))
        forb.begin(z, value, centre=centre, mu=mu, scale=step_scale)
        while not stop:
            forb.run(None, progress.limit, 0.0)
            known = forb.value_at_z()
            stop = progress.check(forb.taken, forb.z, None if known is None else known + mu * (forb.z - centre), forb.g)
    return progress.result(forb.z)


class _Forb:
    """The state of VR-FoRB on 0 in F(z) + mu (z - centre) + G(z), and its cost, reported to a `Progress`.

    Attributes
    ----------
    z : the iterate.
    w, previous : the snapshot, and the snapshot one step earlier.
    value : F(w).
    g : an element of G(z), once a step is taken.
    taken : steps since `begin`.
    """

    def __init__(self, operator: FiniteSumOperator, prox: Prox, L: float, draws: Draws, progress: Progress) -> None:
        self.operator = operator
        self.prox = prox
        self.draws = draws
        self.progress = progress
        b = draws.batch_size
        self.p = min(1.0, b / operator.n)
        L_F = operator.L_F or L
        self.batch_constant = math.sqrt((L**2 + (b - 1) * min(L, L_F) ** 2) / b)  # of the mean of b draws

    def begin(self, z: Vector, value: Vector, *, centre: Vector, mu: float, scale: float) -> float:
        """Start from z, where F(z) is `value`, and return the natural residual there."""
        self.z, self.w, self.previous, self.value = z.copy(), z.copy(), z.copy(), value.copy()
        self.g = np.zeros_like(z)
        self.centre, self.mu = centre, mu
        self.step = scale * math.sqrt(self.p) / (self.batch_constant + mu)  # gamma sqrt(p) / (L + 1/eta)
        self.taken = 0
        return self._residual()

    def run(self, steps: int | None, limit: float, accuracy: float) -> float:
        """Take steps until `steps` are taken, the calls reach `limit` or the error is certified.

        Parameters
        ----------
        accuracy : stop when ||w - solution|| <= accuracy ||w - centre|| is certified at a new snapshot.

        Returns
        -------
        The natural residual at the snapshot, for the step of the method; infinity when the iterate is not finite.
        """
        fast = compiled(self.operator, self.prox, len(self.z))
        loop: Callable[..., tuple[int, int, bool]] = forb_steps if fast else _forb_steps
        problem: tuple[Any, Any] = fast or (self.operator, self.prox)
        # by strong monotonicity ||w - solution|| <= (1 + step (L_F + mu)) residual / mu
        accuracy /= 1.0 + self.step * ((self.operator.L_F or self.batch_constant) + self.mu)
        end = math.inf if steps is None else self.taken + steps
        accurate = False
        while self.taken < end and self.progress.calls < limit and not accurate:
            coins, draws = self.draws.block()
            if end - self.taken < len(coins):
                coins = coins[: int(end - self.taken)]
            done, calls, accurate = loop(
                *problem,
                self.z,
                self.w,
                self.previous,
                self.value,
                self.g,
                self.centre,
                self.mu,
                self.step,
                self.p,
                self.operator.n,
                coins,
                draws,
                self.progress.calls,
                limit,
                accuracy,
            )
            self.draws.take(done)
            self.taken += done
            self.progress.spend(calls, already_counted=not fast)
            if not np.isfinite(self.z).all():
                return math.inf
        return self._residual()

    def value_at_z(self) -> Vector | None:
        """F(z) if the snapshot is at z, else None."""
        return self.value if np.array_equal(self.z, self.w) else None

    def _residual(self) -> float:
        value = self.value + self.mu * (self.w - self.centre)
        return self.operator.natural_residual(self.w, self.prox, 1.0 / self.step, value=value)


def _forb_steps(
    operator: FiniteSumOperator,
    prox: Prox,
    z: Vector,
    w: Vector,
    previous: Vector,
    value: Vector,
    g: Vector,
    centre: Vector,
    mu: float,
    step: float,
    p: float,
    n: int,
    coins: Float[np.ndarray, " steps"],
    draws: Int[np.ndarray, "steps batch width"],
    calls: int,
    limit: float,
    accuracy: float,
) -> tuple[int, int, bool]:
    """Algorithm 3 until the draws or the calls run out; the state is updated in place.

    With H = F + mu (Id - centre):
    z_{t+1} = J_{step G}( (1 - p) z_t + p w_t - step [ H(w_t) + H_q(z_t) - H_q(w_{t-1}) ] ).

    Returns
    -------
    The draws used, the calls so far, and whether the accuracy is certified at the snapshot.
    """
    done, accurate = 0, False
    while done < len(coins) and calls < limit and not accurate:
        change = operator.difference(z, previous, oracle_indices(draws[done])) + mu * (z - previous)
        v = (1.0 - p) * z + p * w - step * (value + mu * (w - centre) + change)
        z[:] = prox(v, step)
        g[:] = (v - z) / step
        previous[:] = w
        calls += 2 * draws.shape[1]
        if coins[done] < p:  # w_{t+1} = z_{t+1} with probability p, else w_t
            w[:] = z
            value[:] = operator.full(w)
            calls += n
            residual = operator.natural_residual(w, prox, 1.0 / step, value=value + mu * (w - centre))
            accurate = residual <= accuracy * mu * float(np.linalg.norm(w - centre))
        done += 1
        if not np.isfinite(z).all():
            break
    return done, calls, accurate
