"""Backtracking for a sufficient decrease, with steps from quadratic and cubic interpolation.

Reference: Dennis and Schnabel, "Numerical Methods for Unconstrained Optimization and Nonlinear Equations", 1983,
section 6.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numba

from workingpapers.common.validation import check_integer, check_number


class LineSearch(NamedTuple):
    """Where a line search ended.

    Attributes
    ----------
    step : the accepted step; 0 when none was.
    value : phi(step).
    trials : evaluations of phi.
    success : whether phi(step) <= phi(0) + sufficient * step * phi'(0).
    """

    step: float
    value: float
    trials: int
    success: bool


def backtrack(
    phi: Callable[[float], float],
    value: float,
    slope: float,
    *,
    step: float = 1.0,
    sufficient: float = 1e-4,
    smallest: float = 0.1,
    largest: float = 0.5,
    max_trials: int = 60,
) -> LineSearch:
    """The first step of a decreasing sequence with phi(step) <= phi(0) + sufficient * step * phi'(0) (Armijo).

    Parameters
    ----------
    phi : the function along the direction; a value that is not finite counts as too large.
    value : phi(0), finite.
    slope : phi'(0), negative.
    step : the first trial, above 0.
    sufficient : share of the decrease of the tangent that is asked for, in [0, 1).
    smallest, largest : the next step lies between these shares of the last, 0 < smallest <= largest < 1.
    max_trials : at least 1.

    Raises
    ------
    ValueError : an argument is outside its range, or the direction is not one of descent.
    """
    check_number("value", value)
    check_number("slope", slope, below=0.0)
    check_number("step", step, above=0.0)
    check_number("sufficient", sufficient, at_least=0.0, below=1.0)
    check_number("smallest", smallest, above=0.0, at_most=largest)
    check_number("largest", largest, above=0.0, below=1.0)
    check_integer("max_trials", max_trials, at_least=1)
    last_step, last_value = 0.0, math.nan
    for trial in range(1, max_trials + 1):
        here = float(phi(step))
        if here <= value + sufficient * step * slope:
            return LineSearch(step, here, trial, True)
        following = next_step(value, slope, step, here, last_step, last_value, smallest, largest)
        last_step, last_value = step, here
        step = following
    return LineSearch(0.0, value, max_trials, False)


@numba.njit(cache=True)
def next_step(
    value: float,
    slope: float,
    step: float,
    here: float,
    last_step: float,
    last_value: float,
    smallest: float,
    largest: float,
) -> float:
    """The minimiser of the polynomial through what is known of phi, clipped to [smallest, largest] * step.

    Parameters
    ----------
    value, slope : phi(0) and phi'(0) < 0.
    step, here : the trial just refused, and phi there.
    last_step, last_value : the trial before it; last_step = 0 at the first refusal, when the polynomial is a parabola.
    smallest, largest : shares of `step`.
    """
    minimiser = smallest * step
    excess = here - value - slope * step  # phi(t) - phi(0) - phi'(0) t
    if math.isfinite(here):
        if last_step == 0.0 or not math.isfinite(last_value):
            minimiser = -slope * step * step / (2.0 * excess)  # of phi(0) + phi'(0) t + excess (t / step)^2
        else:
            # a t^3 + b t^2 + phi'(0) t + phi(0) through both trials
            last_excess = last_value - value - slope * last_step
            one, two = excess / (step * step), last_excess / (last_step * last_step)
            a = (one - two) / (step - last_step)
            b = (last_step * one - step * two) / (last_step - step)
            discriminant = b * b - 3.0 * a * slope
            if discriminant < 0.0:
                minimiser = largest * step
            elif b > 0.0:
                minimiser = -slope / (b + math.sqrt(discriminant))  # no cancellation, and right for a = 0
            elif a != 0.0:
                minimiser = (-b + math.sqrt(discriminant)) / (3.0 * a)
    if not math.isfinite(minimiser):
        minimiser = smallest * step
    return min(max(minimiser, smallest * step), largest * step)
