"""Halpern iteration for operators that are cocoercive: Algorithm 1, and the deterministic method it accelerates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from workingpapers.common.validation import check_number
from workingpapers.optimization.halpern._kernels import page_halpern_steps
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
    full_constant,
    oracle_indices,
    prepare,
    prepare_full,
    sampling,
)


def vr_halpern(
    F_batch: Oracle | FiniteSumOperator,
    u0: Vector,
    n: int | None = None,
    L: float | Literal["estimate"] | None = None,
    prox: Prox | None = None,
    *,
    full: Callable[[Vector], Vector] | None = None,
    probs: Float[np.ndarray, " n"] | None = None,
    batch_size: int | None = None,
    eta: float | Literal["theory", "practical"] = "theory",
    tol: float = 1e-6,
    max_passes: float = 100,
    eval_every: float = 1.0,
    callback: Callback | None = None,
    random_state: RandomState = None,
    check: bool = False,
) -> MonotoneInclusionResult:
    """Solve 0 in F(u) + G(u), F an average of n components and cocoercive, by variance-reduced Halpern iteration.

    Algorithm 1: Halpern's anchored forward-backward step with the PAGE estimate of F. The last iterate satisfies
    E[Res(u_k)] <= 16 L ||u_0 - u*|| / (k + 4) for the theoretical step, after about 6 sqrt(n) component evaluations
    an iteration. Below n of about a thousand `halpern` is cheaper. With equal steps 1/L_F it needs several times
    fewer evaluations than `halpern` from there on; its theoretical step 1/(4 L) gives much of this away.

    Parameters
    ----------
    F_batch : maps u, shape (d,), and indices, shape (b,), to the components, shape (b, d), or their mean, (d,);
        or a `FiniteSumOperator`, which brings n, L, prox, full and probs.
    u0 : start and anchor, shape (d,), finite; not modified. All computation is in float64.
    n : number of components, at least 1.
    L : cocoercive on average, E||F_q(u) - F_q(v)||^2 <= L <F(u) - F(v), u - v>, above 0 (for least squares the
        largest generalised eigenvalue of A^T D A against A^T A, D = diag(||a_i||^2): not the smaller L_F).
        "estimate" takes the largest ratio met on differences around u0, which is a lower bound.
    prox : resolvent (v, eta) -> (Id + eta G)^{-1}(v); identity (G = 0) by default.
    full : maps u to F(u); by default F is summed from batches.
    probs : sampling probabilities, shape (n,); uniform by default.
    batch_size : b, at least 1; default ceil(sqrt(n)). With 2 b >= n a full value is the cheaper one and is used
        always, so that n = 1 is the deterministic iteration.
    eta : step; "theory" is 1/(4 L), "practical" 1/L_F, the step of the deterministic method, which carries no
        guarantee here but was stable and best on least-squares problems; or a number above 0.
    tol : stop when the natural residual is at most tol, at least 0.
    max_passes : budget in passes of n component evaluations, above 0.
    eval_every : passes between residual checks, above 0; a check costs up to n evaluations, counted apart.
    callback : called with (iteration, u, residual) at each check; a true value stops the run.
    random_state : seed or generator.
    check : refuse an operator that ten random pairs show not to be cocoercive, or not with this L; their 20 full
        values are not part of the result's counts.

    Returns
    -------
    MonotoneInclusionResult

    Raises
    ------
    ValueError, TypeError : an argument is out of range, or F is not cocoercive.
    FloatingPointError : an iterate or F stopped being finite; the message names the iteration.

    Warns
    -----
    RuntimeWarning : the tolerance was not reached, or the residual has not decreased over ten checks.
    """
    operator, u, prox = prepare(F_batch, u0, n, prox, full, probs)
    rng = np.random.default_rng(random_state)
    if L is None and operator.cocoercivity is None and operator.lipschitz is not None:
        raise ValueError("operator is not cocoercive; use vr_halpern_monotone")
    L = average_constant(L, operator.cocoercivity, operator, u, "cocoercive", rng)
    n, L_F = operator.n, operator.L_F or L
    b = sampling(batch_size, math.ceil(math.sqrt(n)))
    if eta == "theory":
        step = 1.0 / (4.0 * L)
    elif eta == "practical":
        L_F = full_constant(None, operator, u)
        step = 1.0 / L_F
    else:
        step = check_number("eta", eta, above=0.0)
    progress = Progress(operator, prox, L_F, tol=tol, max_passes=max_passes, eval_every=eval_every, callback=callback)
    if check:
        operator.check_cocoercive(u, L, random_state=rng)

    fast = compiled(operator, prox, len(u))
    steps: Callable[..., tuple[int, int, int, bool]] = page_halpern_steps if fast else _page_halpern_steps
    problem: tuple[Any, Any] = fast or (operator, prox)
    draws = Draws(operator, b, rng)
    start, estimate, g, k = u.copy(), operator.full(u), np.zeros_like(u), 0
    progress.calls += n
    with np.errstate(over="ignore", invalid="ignore"):
        stop = progress.check(0, u, estimate)
        while not stop:
            exact = False
            while progress.calls < progress.limit:
                done, k, calls, exact = steps(
                    *problem, start, u, estimate, g, k, step, n, *draws.block(), progress.calls, progress.limit
                )
                draws.take(done)
                progress.spend(calls, already_counted=not fast)
                check_progress(u, k, L)
            stop = progress.check(k, u, estimate if exact else None, g)
    return progress.result(u)


def _page_halpern_steps(
    operator: FiniteSumOperator,
    prox: Prox,
    u0: Vector,
    u: Vector,
    estimate: Vector,
    g: Vector,
    k: int,
    step: float,
    n: int,
    coins: Float[np.ndarray, " steps"],
    draws: Int[np.ndarray, "steps batch width"],
    calls: int,
    limit: float,
) -> tuple[int, int, int, bool]:
    """Algorithm 1 until the draws or the calls run out; u, estimate and g are updated in place.

    Returns
    -------
    The draws used, k, the calls so far, and whether `estimate` is F(u) itself.
    """
    done, exact = 0, False
    while done < len(coins) and calls < limit:
        anchor = 2.0 / (k + 4)  # lambda_k
        v = anchor * u0 + (1.0 - anchor) * u - step * estimate
        u_next = prox(v, step)
        k += 1
        # p_k = 4 / (k + 5) for k <= sqrt(n), then 4 / (sqrt(n) + 5)
        exact = bool(2 * draws.shape[1] >= n or coins[done] < 4.0 / (min(k, math.sqrt(n)) + 5.0))
        if exact:
            estimate[:] = operator.full(u_next)
            calls += n
        else:  # the same indices at both points
            estimate += operator.difference(u_next, u, oracle_indices(draws[done]))
            calls += 2 * draws.shape[1]
        g[:] = (v - u_next) / step  # in G(u_next)
        u[:] = u_next
        done += 1
        if not np.isfinite(u).all():
            break
    return done, k, calls, exact


def halpern(
    F: Callable[[Vector], Vector] | FiniteSumOperator,
    u0: Vector,
    L_F: float | None = None,
    prox: Prox | None = None,
    *,
    n: int | None = None,
    step: float | None = None,
    tol: float = 1e-6,
    max_passes: float = 1000,
    eval_every: float = 1.0,
    callback: Callback | None = None,
) -> MonotoneInclusionResult:
    """Solve 0 in F(u) + G(u), F cocoercive, by the deterministic Halpern iteration.

    u_{k+1} = u_0 / (k+2) + (1 - 1/(k+2)) J_{G/L_F}(u_k - F(u_k)/L_F), with R(u_k) = O(L_F ||u_0 - u*|| / k). Every
    iteration costs one full value. The baseline of `vr_halpern`, and the better choice for few components.

    Parameters
    ----------
    F : maps u, shape (d,), to F(u), shape (d,); or a `FiniteSumOperator`, of which `full` is used.
    u0 : start and anchor, shape (d,), finite; not modified.
    L_F : Lipschitz constant of F, above 0; default: the operator's, else estimated from differences around u0.
    prox : resolvent (v, eta) -> (Id + eta G)^{-1}(v); identity by default.
    n : what one full value costs in component evaluations; 1 by default, the operator's n for an operator.
    step : default 1/L_F, above 0; the iteration is nonexpansive up to 2/L_F.
    tol, max_passes, eval_every, callback : as in `vr_halpern`; one pass is one full value.

    Returns
    -------
    MonotoneInclusionResult

    Raises
    ------
    ValueError, TypeError, FloatingPointError : as `vr_halpern`.

    Warns
    -----
    RuntimeWarning : the tolerance was not reached, or the residual has not decreased over ten checks.
    """
    operator, u, prox = prepare_full(F, u0, n, prox)
    L_F = full_constant(L_F, operator, u)
    step = 1.0 / L_F if step is None else check_number("step", step, above=0.0)
    progress = Progress(operator, prox, L_F, tol=tol, max_passes=max_passes, eval_every=eval_every, callback=callback)
    start, k = u.copy(), 0
    with np.errstate(over="ignore", invalid="ignore"):
        while True:
            value = operator.full(u)
            progress.calls += operator.n
            if (k == 0 or progress.calls >= progress.limit) and progress.check(k, u, value):
                return progress.result(u)
            anchor = 1.0 / (k + 2)
            u = anchor * start + (1.0 - anchor) * prox(u - step * value, step)
            k += 1
            check_progress(u, k, L_F)
