"""Departure from a power law: a sign of teacher hacking that needs no oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from workingpapers.common.validation import check_finite, check_integer, check_number

_FEWEST = 6  # points that a line with its scatter is fitted to


@dataclass(frozen=True)
class PowerLaw:
    """The convergence law ``m(t) = scale * t ** -exponent``, fitted on logarithms.

    Attributes
    ----------
    scale : m(1).
    exponent : b; positive where the metric falls.
    scatter : standard deviation of the residuals of log m, with two degrees of freedom less than points.
    """

    scale: float
    exponent: float
    scatter: float

    def __call__(self, t: float) -> float:
        """The law at time t > 0."""
        return float(self.scale * t**-self.exponent)


def fit_power_law(
    times: Sequence[float] | Float[np.ndarray, " points"], values: Sequence[float] | Float[np.ndarray, " points"]
) -> PowerLaw:
    """Least squares of log m = a - b log t.

    Parameters
    ----------
    times : when the metric was measured, above 0; at least 6 points.
    values : the metric, above 0.

    Raises
    ------
    ValueError : fewer than 6 points, lengths differ, or an entry is not positive and finite.
    """
    times, values = (np.asarray(column, dtype=np.float64) for column in (times, values))
    if times.ndim != 1 or times.shape != values.shape or len(times) < _FEWEST:
        raise ValueError(f"times and values must be {_FEWEST} points or more, got {times.shape} and {values.shape}")
    for name, column in (("times", times), ("values", values)):
        check_finite(name, column)
        if not (column > 0).all():
            raise ValueError(f"{name} must be above 0, got {column.min():g}")
    if np.ptp(times) == 0:
        raise ValueError("times must differ")
    intercept, slope, scatter = _lines(np.log(times), np.log(values)[None])
    return PowerLaw(float(np.exp(intercept[0])), -float(slope[0]), float(scatter[0]))


class PowerLawDetector:
    """Flags a learning curve that leaves the power law of its beginning, upwards and for good.

    Under healthy training a distance to the teacher falls like ``m(t) = c t^-b``, a line in log m against log t. The
    line is fitted to the first `window` evaluations after t = 0. With s their residual standard deviation, at least
    `floor`, hacking sets in at the first of `consecutive` evaluations in a row with

        log m - (a - b log t) > k s.

    The paper reports the departure and gives no test; this one is ours. It can only see what is extrapolated well:
    start the window after the initial transient, and look at `false_alarm_rate` for the times and the noise at hand.
    A curve that rises for another reason (overfitting, a learning rate that decays) leaves the line as well.

    Parameters
    ----------
    window : evaluations that the line is fitted to, at least 6.
    k : distance above the line that counts, in units of s.
    consecutive : evaluations in a row that must lie above.
    floor : smallest s, in logarithms: 0.02 ignores departures below ``k`` times 2 %.

    Attributes
    ----------
    times, values : what was given so far, t = 0 left out.
    law : the `PowerLaw` of the window; None before it is full.
    onset : time of the departure; None while there is none.

    Raises
    ------
    ValueError : a parameter is out of range.

    Examples
    --------
    >>> detector = PowerLawDetector()
    >>> for t in range(1, 21):
    ...     onset = detector.update(t, t**-0.5 if t < 12 else 12**-0.5)
    >>> onset
    13
    """

    def __init__(self, window: int = 6, k: float = 3.0, consecutive: int = 3, floor: float = 0.02) -> None:
        self.window = check_integer("window", window, at_least=_FEWEST)
        self.k = check_number("k", k, above=0)
        self.consecutive = check_integer("consecutive", consecutive, at_least=1)
        self.floor = check_number("floor", floor, above=0)
        self.times: list[float] = []
        self.values: list[float] = []
        self.law: PowerLaw | None = None
        self.onset: float | None = None
        self._above = 0  # evaluations in a row above the line

    def update(self, t: float, value: float) -> float | None:
        """Take one evaluation and return `onset`.

        Parameters
        ----------
        t : its time, larger than the last one; t = 0 has no logarithm and is ignored.
        value : the metric, above 0.

        Raises
        ------
        ValueError : time does not move on, or an argument is out of range.
        """
        check_number("t", t, at_least=0)
        check_number("value", value, above=0)
        if t == 0:
            return self.onset
        if self.times and t <= self.times[-1]:
            raise ValueError(f"t must be above the last one, {self.times[-1]:g}, got {t:g}")
        self.times.append(t)
        self.values.append(value)
        if self.law is None:
            if len(self.times) == self.window:
                self.law = fit_power_law(self.times, self.values)
            return self.onset
        departed = np.log(value / self.law(t)) > self.k * max(self.law.scatter, self.floor)
        self._above = self._above + 1 if departed else 0
        if self.onset is None and self._above == self.consecutive:
            self.onset = self.times[-self.consecutive]
        return self.onset


def false_alarm_rate(
    times: Sequence[float] | Float[np.ndarray, " points"],
    *,
    noise: float,
    window: int = 6,
    k: float = 3.0,
    consecutive: int = 3,
    floor: float = 0.02,
    trials: int = 10_000,
    random_state: int = 0,
) -> float:
    """Share of curves that follow a power law exactly, but for noise, and that `PowerLawDetector` flags all the same.

    The law itself does not matter, its residuals do not depend on it. The line is fitted to few points and its error
    grows with the distance of extrapolation: the later the last evaluation is, compared with the window, the larger
    the rate. Noise of neighbouring evaluations is taken as independent; answers that are drawn once and reused make
    real curves smoother than that.

    Parameters
    ----------
    times : of the evaluations, increasing, above 0, more than `window` of them.
    noise : standard deviation of log m around the law.
    window, k, consecutive, floor : of `PowerLawDetector`.
    trials : simulated curves; the standard error is below ``0.5 / sqrt(trials)``.
    random_state : seed of the simulation.

    Raises
    ------
    ValueError : an argument is out of range.
    """
    detector = PowerLawDetector(window, k, consecutive, floor)
    noise = check_number("noise", noise, at_least=0)
    trials = check_integer("trials", trials, at_least=1)
    log_t = np.asarray(times, dtype=np.float64)
    check_finite("times", log_t)
    if log_t.ndim != 1 or len(log_t) <= window or log_t[0] <= 0 or (np.diff(log_t) <= 0).any():
        raise ValueError("times must be increasing, above 0 and more than window")
    log_t = np.log(log_t)
    log_m = noise * np.random.default_rng(random_state).standard_normal((trials, len(log_t)))
    intercept, slope, scatter = _lines(log_t[:window], log_m[:, :window])
    line = intercept[:, None] + slope[:, None] * log_t[window:]
    above = log_m[:, window:] - line > detector.k * np.maximum(scatter, detector.floor)[:, None]
    return float(_has_run(above, detector.consecutive).mean())


def _lines(
    log_t: Float[np.ndarray, " points"], log_m: Float[np.ndarray, "curves points"]
) -> tuple[Float[np.ndarray, " curves"], Float[np.ndarray, " curves"], Float[np.ndarray, " curves"]]:
    """Intercept, slope and residual standard deviation of the least-squares line of each curve."""
    centred = log_t - log_t.mean()
    slope = log_m @ centred / (centred @ centred)
    intercept = log_m.mean(1) - slope * log_t.mean()
    residual = log_m - intercept[:, None] - slope[:, None] * log_t
    return intercept, slope, np.sqrt((residual**2).sum(1) / (len(log_t) - 2))


def _has_run(above: Bool[np.ndarray, "curves points"], length: int) -> Bool[np.ndarray, " curves"]:
    """Whether a row has `length` true entries next to each other."""
    if above.shape[1] < length:
        return np.zeros(len(above), dtype=bool)
    windows = np.lib.stride_tricks.sliding_window_view(above, length, axis=1)
    return np.asarray(np.any(np.all(windows, axis=-1), axis=1))
