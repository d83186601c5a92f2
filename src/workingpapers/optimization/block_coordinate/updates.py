"""How the chosen block moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from workingpapers.common.line_search import backtrack
from workingpapers.optimization.block_coordinate.linear_algebra import largest_eigenvalues, solve
from workingpapers.optimization.block_coordinate.losses import Loss, State, Vector
from workingpapers.optimization.block_coordinate.model import minimise
from workingpapers.optimization.block_coordinate.partition import FixedBlocks
from workingpapers.optimization.block_coordinate.quadratic import SparseQuadratic
from workingpapers.optimization.block_coordinate.selection import Chosen

Update = Literal["lb", "la", "hb", "newton", "tmp", "pn", "bp"]
SMOOTH_ONLY = ("hb", "newton", "bp")

Rule = Callable[[State, Chosen], bool]

_SUFFICIENT = 1e-10  # share of the tangent's decrease that line searches ask for
_BAND = 1e-4  # coordinates below this may count as active in the two-metric projection
_TRIALS = 60
_SLACK = 8 * np.finfo(float).eps  # a decrease below the rounding of F cannot be seen in F


def updater(rule: Update, loss: Loss, blocks: FixedBlocks | None, estimates: Vector, accuracy: float) -> Rule:
    """The update as a function of the state and the chosen block, which says whether x moved.

    Parameters
    ----------
    blocks : the partition, whose bounds are computed once; None where blocks vary.
    estimates : (n,), the Lipschitz estimates of "la", which it changes.
    accuracy : of the block's problem in "pn", as in `model.minimise`.
    """
    if rule == "lb":
        return lambda state, chosen: gradient_step(state, chosen, _lipschitz(loss, blocks, chosen))
    if rule == "la":
        return lambda state, chosen: adaptive_step(state, chosen, estimates)
    if rule == "hb":
        return lambda state, chosen: matrix_step(state, chosen, blocks)
    if rule == "newton":
        return newton_step
    if rule == "tmp":
        return two_metric_step
    if rule == "pn":
        return lambda state, chosen: prox_newton_step(state, chosen, accuracy)
    return forest_step


def _lipschitz(loss: Loss, blocks: FixedBlocks | None, chosen: Chosen) -> float:
    if blocks is not None:
        return float(blocks.lipschitz[chosen.number])
    bound = float(largest_eigenvalues(loss.hess_bound(chosen.block)))
    return bound if bound > 0.0 else 1.0


def _moved(state: State, chosen: Chosen, to: Vector) -> bool:
    if np.array_equal(to, state.x[chosen.block]):
        return False
    state.move(chosen.block, to)
    return True


def gradient_step(state: State, chosen: Chosen, bound: float) -> bool:
    """x_b <- prox(x_b - g_b / L_b)."""
    block = chosen.block
    return _moved(state, chosen, state.loss.prox(state.x[block] - state.g[block] / bound, bound, block))


def adaptive_step(state: State, chosen: Chosen, estimates: Vector) -> bool:
    """A gradient step with an estimate of L_b, doubled until the decrease that L_b would guarantee is there."""
    block, loss = chosen.block, state.loss
    x, g = state.x[block], state.g[block]
    estimate = float(estimates[block].max())
    allowed = state.smooth_value + _SLACK * abs(state.smooth_value)
    for _ in range(_TRIALS):
        d = loss.prox(x - g / estimate, estimate, block) - x
        # f(x + d) <= f(x) + g^T d + L |d|^2 / 2, which is f(x) - |g_b|^2 / (2 L) for d = -g_b / L
        if state.trial(block, d) <= allowed + float(g @ d + 0.5 * estimate * (d @ d)):
            estimates[block] = estimate
            return _moved(state, chosen, x + d)
        estimate *= 2.0
    return False


def matrix_step(state: State, chosen: Chosen, blocks: FixedBlocks | None) -> bool:
    """x_b <- x_b - H_b^+ g_b."""
    block, number = chosen
    g = state.g[block]
    newton = solve(state.loss.hess_bound(block), g) if blocks is None else blocks.inverses[number] @ g
    return _moved(state, chosen, state.x[block] - newton)


def newton_step(state: State, chosen: Chosen) -> bool:
    """x_b <- x_b - alpha (hess_bb f(x))^+ g_b, alpha by backtracking from 1."""
    block = chosen.block
    g, x = state.g[block], state.x[block]
    d = -solve(state.hess(block), g)
    slope = float(g @ d)
    if not slope < 0.0:
        return False
    if state.loss.quadratic:
        return _moved(state, chosen, x + d)
    value = state.smooth_value
    found = backtrack(
        lambda step: state.trial(block, step * d),
        value + _SLACK * abs(value),
        slope,
        sufficient=_SUFFICIENT,
        max_trials=_TRIALS,
    )
    return _moved(state, chosen, x + found.step * d)


def forest_step(state: State, chosen: Chosen) -> bool:
    """x_b <- x_b - A_bb^{-1} g_b, which solves A_bb x_b = b_b - A_{b,rest} x_rest, by message passing."""
    assert isinstance(state.loss, SparseQuadratic)
    block = chosen.block
    return _moved(state, chosen, state.x[block] + state.loss.forest_step(block, state.g))


def two_metric_step(state: State, chosen: Chosen) -> bool:
    """Newton on the coordinates away from their bound, gradient on the others, projected back.

    With l1 the step stays in one orthant: of the signs of x_i, and where x_i = 0, of the downhill direction. There F is
    smooth and |x_i| >= 0 the bound.
    """
    block, loss = chosen.block, state.loss
    x, g, l1 = state.x[block], state.g[block], loss.l1[block]
    bounded = np.full(len(block), True) if loss.nonnegative else l1 > 0.0
    signs = np.ones(len(block)) if loss.nonnegative else np.where(x != 0.0, np.sign(x), -np.sign(g))
    signs[signs == 0.0] = 1.0
    u, slope = signs * x, signs * g + l1
    slope[~bounded] = (signs * g)[~bounded]

    def project(v: Vector) -> Vector:
        return np.where(bounded, np.maximum(v, 0.0), v)

    band = min(_BAND, float(np.linalg.norm(u - project(u - slope))))
    active = bounded & (u <= band) & (slope > 0.0)
    work = ~active
    d = np.zeros(len(block))
    d[active] = -slope[active] / max(float(loss.steps[block[active]].sum()), np.finfo(float).tiny)
    H = state.hess(block[work]) * np.outer(signs[work], signs[work])
    d[work] = -solve(H, slope[work])
    decrease = float(slope @ d)
    fun, penalty = state.smooth_value, loss.penalty(x, block)
    allowed = fun + penalty + _SLACK * abs(fun + penalty)
    alpha = 1.0
    for _ in range(_TRIALS):
        to = signs * project(u + alpha * d)
        if state.trial(block, to - x) + loss.penalty(to, block) <= allowed + _SUFFICIENT * alpha * decrease:
            return _moved(state, chosen, to)
        alpha *= 0.5
    return False


def prox_newton_step(state: State, chosen: Chosen, accuracy: float) -> bool:
    """x_b <- the minimiser of g_b^T d + d^T H d / 2 + h(x_b + d), H = hess_bb f(x), then backtracking along d."""
    block, loss = chosen.block, state.loss
    x, g = state.x[block], state.g[block]
    to = minimise(state.model(block), x, loss.l1[block], loss.nonnegative, accuracy)
    if loss.quadratic:
        return _moved(state, chosen, to)
    d = to - x
    penalty = loss.penalty(x, block)
    slope = float(g @ d) + loss.penalty(to, block) - penalty
    if not slope < 0.0:
        return False
    fun = state.smooth_value + penalty
    found = backtrack(
        lambda step: state.trial(block, step * d) + loss.penalty(x + step * d, block),
        fun + _SLACK * abs(fun),
        slope,
        sufficient=_SUFFICIENT,
        max_trials=_TRIALS,
    )
    return _moved(state, chosen, to if found.step == 1.0 else x + found.step * d)
