"""The methods Halpern iteration is compared with on monotone Lipschitz problems."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from workingpapers.common.validation import check_choice, check_number
from workingpapers.optimization.halpern._kernels import extragradient_steps
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


def extra_anchored_gradient(
    F: Callable[[Vector], Vector] | FiniteSumOperator,
    u0: Vector,
    L_F: float | None = None,
    prox: Prox | None = None,
    *,
    variant: Literal["constant", "varying"] = "constant",
    step: float | None = None,
    n: int | None = None,
    tol: float = 1e-6,
    max_passes: float = 1000,
    eval_every: float = 1.0,
    callback: Callback | None = None,
) -> MonotoneInclusionResult:
    """Solve 0 in F(u) + G(u) by the extra-anchored gradient method of Yoon and Ryu (2021), EAG-C or EAG-V.

    The deterministic method with the optimal rate for monotone Lipschitz F at the last iterate, proven for G = 0:
    ||F(u_k)|| = O(L_F ||u_0 - u*|| / k), two full values an iteration. With a constraint both half-steps are
    followed by its resolvent.

    Parameters
    ----------
    F, u0, L_F, prox, n : as in `halpern`; F need only be monotone and L_F-Lipschitz.
    variant : "constant" for EAG-C; "varying" for EAG-V, whose step decreases to about 0.7 of its first value.
    step : of EAG-C, default 1/(8 L_F); the first of EAG-V, below 1/L_F, default 0.618/L_F. Above 0.
    tol, max_passes, eval_every, callback : as in `vr_halpern`; one pass is one full value.

    Returns
    -------
    MonotoneInclusionResult

    Raises
    ------
    ValueError, TypeError : an argument is out of range.
    FloatingPointError : an iterate or F stopped being finite; the message names the iteration.

    Warns
    -----
    RuntimeWarning : the tolerance was not reached, or the residual has not decreased over ten checks.
    """
    check_choice("variant", variant, ("constant", "varying"))
    operator, u, prox = prepare_full(F, u0, n, prox)
    L_F = full_constant(L_F, operator, u)
    if variant == "constant":
        alpha = 1.0 / (8.0 * L_F) if step is None else check_number("step", step, above=0.0)
    else:
        alpha = 0.618 / L_F if step is None else check_number("step", step, above=0.0, below=1.0 / L_F)
    progress = Progress(operator, prox, L_F, tol=tol, max_passes=max_passes, eval_every=eval_every, callback=callback)
    start, k, g = u.copy(), 0, None
    with np.errstate(over="ignore", invalid="ignore"):
        while True:
            value = operator.full(u)
            progress.calls += operator.n
            if (k == 0 or progress.calls >= progress.limit) and progress.check(k, u, value, g):
                return progress.result(u)
            anchored = u + (start - u) / (k + 2)
            half = prox(anchored - alpha * value, alpha)
            v = anchored - alpha * operator.full(half)
            progress.calls += operator.n
            u = prox(v, alpha)
            g = (v - u) / alpha
            if variant == "varying":
                square = (alpha * L_F) ** 2
                alpha *= (1.0 - (k + 2) ** 2 / ((k + 1) * (k + 3)) * square) / (1.0 - square)
            k += 1
            check_progress(u, k, L_F)


def extragradient(
    F: Callable[[Vector], Vector] | FiniteSumOperator,
    u0: Vector,
    L_F: float | None = None,
    prox: Prox | None = None,
    *,
    step: float | None = None,
    n: int | None = None,
    tol: float = 1e-6,
    max_passes: float = 1000,
    eval_every: float = 1.0,
    callback: Callback | None = None,
) -> MonotoneInclusionResult:
    """Solve 0 in F(u) + G(u) by Korpelevich's extragradient method.

    u_{k+1/2} = J(u_k - step F(u_k)), u_{k+1} = J(u_k - step F(u_{k+1/2})): two full values an iteration, last-iterate
    residual O(1 / sqrt(k)) in the worst case and often linear in practice.

    Parameters
    ----------
    F, u0, L_F, prox, n : as in `halpern`; F need only be monotone and L_F-Lipschitz.
    step : default 0.9/L_F, above 0; the theory covers steps below 1/L_F.
    tol, max_passes, eval_every, callback : as in `vr_halpern`; one pass is one full value.

    Returns
    -------
    MonotoneInclusionResult

    Raises
    ------
    ValueError, TypeError, FloatingPointError : as `extra_anchored_gradient`.

    Warns
    -----
    RuntimeWarning : the tolerance was not reached, or the residual has not decreased over ten checks.
    """
    operator, u, prox = prepare_full(F, u0, n, prox)
    L_F = full_constant(L_F, operator, u)
    step = 0.9 / L_F if step is None else check_number("step", step, above=0.0)
    progress = Progress(operator, prox, L_F, tol=tol, max_passes=max_passes, eval_every=eval_every, callback=callback)
    k, g = 0, None
    with np.errstate(over="ignore", invalid="ignore"):
        while True:
            value = operator.full(u)
            progress.calls += operator.n
            if (k == 0 or progress.calls >= progress.limit) and progress.check(k, u, value, g):
                return progress.result(u)
            half = prox(u - step * value, step)
            v = u - step * operator.full(half)
            progress.calls += operator.n
            u = prox(v, step)
            g = (v - u) / step
            k += 1
            check_progress(u, k, L_F)


def vr_extragradient(
    F_batch: Oracle | FiniteSumOperator,
    u0: Vector,
    n: int | None = None,
    L: float | Literal["estimate"] | None = None,
    prox: Prox | None = None,
    *,
    full: Callable[[Vector], Vector] | None = None,
    probs: Float[np.ndarray, " n"] | None = None,
    batch_size: int | None = None,
    step_scale: float = 0.99,
    tol: float = 1e-6,
    max_passes: float = 100,
    eval_every: float = 1.0,
    callback: Callback | None = None,
    random_state: RandomState = None,
) -> MonotoneInclusionResult:
    """Solve 0 in F(u) + G(u) by loopless variance-reduced extragradient (Alacaoglu and Malitsky, 2022).

    The guarantee, O(n + sqrt(n) L / eps) component evaluations, is on the duality gap of the averaged iterate; this
    returns the last iterate, for which there is none. With a tuned step, around four times the theoretical one, it
    is often the fastest method here.

    Parameters
    ----------
    F_batch, u0, n, prox, full, probs : as in `vr_halpern`.
    L : Lipschitz on average, as in `vr_halpern_monotone`.
    batch_size : b components per step, at least 1; default 1. The snapshot is renewed with probability p = 2 b / n.
    step_scale : gamma above 0 in the step gamma sqrt(p) / L; theory covers values below 1.
    tol, max_passes, eval_every, callback, random_state : as in `vr_halpern`.

    Returns
    -------
    MonotoneInclusionResult

    Raises
    ------
    ValueError, TypeError, FloatingPointError : as `extra_anchored_gradient`.

    Warns
    -----
    RuntimeWarning : the tolerance was not reached, or the residual has not decreased over ten checks.
    """
    operator, z, prox = prepare(F_batch, u0, n, prox, full, probs)
    rng = np.random.default_rng(random_state)
    L = average_constant(L, operator.lipschitz or operator.cocoercivity, operator, z, "lipschitz", rng)
    n, b = operator.n, sampling(batch_size, 1)
    p = min(1.0, 2.0 * b / n)
    step = check_number("step_scale", step_scale, above=0.0) * math.sqrt(p) / L
    progress = Progress(
        operator, prox, operator.L_F or L, tol=tol, max_passes=max_passes, eval_every=eval_every, callback=callback
    )
    fast = compiled(operator, prox, len(z))
    steps: Callable[..., tuple[int, int]] = extragradient_steps if fast else _extragradient_steps
    problem: tuple[Any, Any] = fast or (operator, prox)
    draws = Draws(operator, b, rng)

    w, value, g, k = z.copy(), operator.full(z), np.zeros_like(z), 0
    progress.calls += n
    with np.errstate(over="ignore", invalid="ignore"):
        stop = progress.check(0, z, value)
        while not stop:
            while progress.calls < progress.limit:
                done, calls = steps(
                    *problem, z, w, value, g, step, p, n, *draws.block(), progress.calls, progress.limit
                )
                draws.take(done)
                k += done
                progress.spend(calls, already_counted=not fast)
                check_progress(z, k, L)
            stop = progress.check(k, z, value if np.array_equal(z, w) else None, g)
    return progress.result(z)


def _extragradient_steps(
    operator: FiniteSumOperator,
    prox: Prox,
    z: Vector,
    w: Vector,
    value: Vector,
    g: Vector,
    step: float,
    p: float,
    n: int,
    coins: Float[np.ndarray, " steps"],
    draws: Int[np.ndarray, "steps batch width"],
    calls: int,
    limit: float,
) -> tuple[int, int]:
    """Steps until the draws or the calls run out; z, w, value = F(w) and g are updated in place.

    Returns
    -------
    The draws used and the calls so far.
    """
    done = 0
    while done < len(coins) and calls < limit:
        mean = (1.0 - p) * z + p * w
        half = prox(mean - step * value, step)
        v = mean - step * (value + operator.difference(half, w, oracle_indices(draws[done])))
        z[:] = prox(v, step)
        g[:] = (v - z) / step  # in G(z)
        calls += 2 * draws.shape[1]
        if coins[done] < p:
            w[:] = z
            value[:] = operator.full(w)
            calls += n
        done += 1
        if not np.isfinite(z).all():
            break
    return done, calls
