"""Tests of the line search: closed forms of the interpolated steps, the Armijo condition, clipping, refusals."""

import math

import numpy as np
import pytest

from workingpapers.common.line_search import backtrack, next_step


def test_parabola_is_minimised_by_the_second_trial():
    # phi(t) = (t - 0.2)^2: the tangent's decrease at 1 is missed, and interpolation finds the minimiser at once
    found = backtrack(lambda t: (t - 0.2) ** 2, 0.04, -0.4)
    assert found.step == pytest.approx(0.2)
    assert found.value == pytest.approx(0.0, abs=1e-30)
    assert (found.trials, found.success) == (2, True)


def test_cubic_is_minimised_through_two_trials():
    def phi(t):
        return 1.0 - 2.0 * t + 3.0 * t**2 + 5.0 * t**3

    minimiser = (-6.0 + math.sqrt(36.0 + 120.0)) / 30.0
    step = next_step(1.0, -2.0, 0.6, phi(0.6), 1.0, phi(1.0), 0.1, 0.9)
    assert step == pytest.approx(minimiser)
    # without a cubic term the same formula gives the parabola's minimiser
    assert next_step(1.0, -2.0, 0.6, 1 - 1.2 + 3 * 0.36, 1.0, 2.0, 0.1, 0.9) == pytest.approx(1.0 / 3.0)


@pytest.mark.parametrize("seed", range(20))
def test_cubic_through_random_trials_is_stationary(seed):
    rng = np.random.default_rng(seed)
    a, b, slope = rng.standard_normal(), rng.standard_normal(), -rng.random() - 0.1
    value = rng.standard_normal()

    def phi(t):
        return value + slope * t + b * t**2 + a * t**3

    step = next_step(value, slope, 1.0, phi(1.0), 2.0, phi(2.0), 1e-9, 1.0 - 1e-9)
    if 1e-8 < step < 1.0 - 1e-8:
        assert slope + 2 * b * step + 3 * a * step**2 == pytest.approx(0.0, abs=1e-7)
        assert 2 * b + 6 * a * step >= -1e-7, "a maximiser"


def test_steps_are_clipped():
    assert backtrack(lambda t: 0.0 if t == 0 else 1e9 * t, 0.0, -1.0, max_trials=3).step == 0.0
    steps = []

    def steep(t):
        steps.append(t)
        return 1e6 * t

    assert not backtrack(steep, 0.0, -1.0, max_trials=4).success
    np.testing.assert_allclose(np.array(steps[1:]) / steps[:-1], 0.1)
    # barely refused: half the step and not more
    assert next_step(0.0, -1.0, 1.0, -1e-5, 0.0, math.nan, 0.1, 0.5) == 0.5


@pytest.mark.parametrize("sufficient", [0.0, 1e-4, 0.3])
def test_accepted_step_has_the_sufficient_decrease(sufficient):
    def phi(t):
        return math.exp(3 * t) - 5 * t

    found = backtrack(phi, 1.0, -2.0, step=4.0, sufficient=sufficient)
    assert found.success
    assert found.value == phi(found.step) <= 1.0 - sufficient * found.step * 2.0


def test_values_that_are_not_finite_are_backed_away_from():
    found = backtrack(lambda t: math.log(0.02 - t) if t < 0.02 else math.nan, math.log(0.02), -50.0)
    assert found.success
    assert 0 < found.step < 0.02


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"value": math.nan}, "value"),
        ({"slope": 0.0}, "slope"),
        ({"slope": 1.0}, "slope"),
        ({"step": 0.0}, "step"),
        ({"sufficient": 1.0}, "sufficient"),
        ({"smallest": 0.6}, "smallest"),
        ({"largest": 1.0}, "largest"),
        ({"max_trials": 0}, "max_trials"),
    ],
)
def test_nonsense_is_refused_by_name(changes, named):
    def never(t):
        raise AssertionError

    with pytest.raises(ValueError, match=f"^{named} must be"):
        backtrack(never, **({"value": 1.0, "slope": -1.0} | changes))
