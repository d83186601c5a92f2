"""Schedules as arrays of multipliers: refined from gradient norms, and the named shapes to compare them with."""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import median_filter

from workingpapers.common.validation import check_choice, check_integer, check_number
from workingpapers.training.refined_schedules.bounds import Steps, check_norms

Norm = Literal["l2", "l1"]
Final = Literal["zero", "half"]
Shape = Literal["flat", "1/t", "1/sqrt(t)", "cosine", "step", "polynomial", "linear"]

# w_t = G_t^-2 minimises the bound of SGD, w_t = |g_t|_1^-1 the one of coordinate-wise methods.
POWERS: dict[Norm, float] = {"l2": 2.0, "l1": 1.0}
RANGE_TO_WARN_AT = 30.0


def refine(
    norms: ArrayLike,
    kind: Norm = "l2",
    tau: float = 0.1,
    power: float | None = None,
    total_steps: int | None = None,
    final: Final = "zero",
    clip_quantile: float | None = None,
) -> Steps:
    """The schedule that minimises the last-iterate bound at the smoothed gradient norms of an earlier run.

    For any weights w_t the last iterate of SGD with eta_t = w_t (w_{t+1} + ... + w_T) / w_{1:T} satisfies
    E f(x_T) - f(u) <= (1 / w_{1:T}) E[D^2 / 2 + sum_t w_t^2 |g_t|^2 / 2]; w_t ~ |g_t|^-2 makes it least. Constant
    norms give linear decay. The log should come from a run of the same length and batch size with linear or cosine
    decay; refining the log of a refined run is possible and gains little.

    Parameters
    ----------
    norms : logged gradient norms, at least two, positive and finite (but see `clip_quantile`). A log of every k-th
        step, or of a run of another length, is interpolated to `total_steps`.
    kind : the norm they are: "l2" for SGD and methods like it, "l1" for Adam and coordinate-wise methods.
    tau : width of the median filter as a share of the run, in [0, 1); 0 does not smooth.
    power : p in w_t = G_t^-p, at least 0; 2 for "l2" and 1 for "l1" when None. Between 0 (linear decay) and these it
        refines less.
    total_steps : T, at least 2; the length of the log when None.
    final : "zero" makes the last step of training a no-op, as in the theory, which never uses it; "half" gives it
        half of the rate of the step before.
    clip_quantile : q in (0, 0.5). Norms are brought into the range between the q and 1 - q quantiles of the positive
        ones, and those that are not finite are interpolated, where otherwise zero or a non-finite norm is an error.

    Returns
    -------
    array of shape (T,) : multipliers of the peak rate, in [0, 1] with maximum 1.

    Raises
    ------
    ValueError, TypeError : an argument is out of its range.

    Warns
    -----
    UserWarning : tau is too small to smooth anything; the smoothed norms vary more than 30-fold, as on separable
        problems, so that the schedule sits on few steps; or the log cannot be of a run of `total_steps`.
    """
    check_choice("kind", kind, get_args(Norm))
    tau = check_number("tau", tau, at_least=0.0, below=1.0)
    power = POWERS[kind] if power is None else check_number("power", power, at_least=0.0)
    check_choice("final", final, get_args(Final))
    G = check_norms("norms", norms if clip_quantile is None else _clipped(norms, clip_quantile))
    T = len(G) if total_steps is None else check_integer("total_steps", total_steps, at_least=2)
    if len(G) != T:
        _warn_unless_thinned(len(G), T)
        G = np.interp(np.linspace(0.0, 1.0, T), np.linspace(0.0, 1.0, len(G)), G)

    G = _smoothed(G, tau)
    spread = float(G.max() / G.min())
    if spread > RANGE_TO_WARN_AT:
        warnings.warn(
            f"the smoothed norms vary {spread:.3g}-fold, as on problems that are interpolated: nearly all of the "
            "learning rate moves to the steps where they are small; consider linear decay",
            UserWarning,
            stacklevel=2,
        )
    weights = (G / G.min()) ** -power
    after = np.append(np.cumsum(weights[:0:-1])[::-1], 0.0)  # w_{t+1} + ... + w_T
    schedule = weights * after
    return finished(schedule / schedule.max(), final)


def _clipped(norms: ArrayLike, quantile: float) -> Steps:
    quantile = check_number("clip_quantile", quantile, above=0.0, below=0.5)
    G = np.array(norms, dtype=float)
    positive = np.isfinite(G) & (G > 0)
    if not positive.any():
        raise ValueError("norms must hold a positive finite number, got none")
    finite = np.flatnonzero(np.isfinite(G))
    G = np.interp(np.arange(len(G)), finite, G[finite])
    low, high = np.quantile(G[positive], [quantile, 1.0 - quantile])
    clipped: Steps = np.clip(G, low, high)
    return clipped


def _warn_unless_thinned(logged: int, T: int) -> None:
    """Warn unless some k makes `logged` the number of every k-th of T steps."""
    intervals = range(max(T // logged, 1), -(-T // logged) + 1)
    if not any(-(-T // k) == logged for k in intervals):
        warnings.warn(
            f"{logged} norms are not those of every k-th of {T} steps: a run of another length says less of this one",
            UserWarning,
            stacklevel=3,
        )


def _smoothed(G: Steps, tau: float) -> Steps:
    """Median filter of width 2 floor(floor(tau T) / 2) + 1; the norms go on by their first value and by reflection."""
    if 0 < tau * len(G) < 2:
        warnings.warn(
            f"tau={tau:g} of {len(G)} steps is below 2 steps: the norms are not smoothed", UserWarning, stacklevel=3
        )
    width = 2 * (int(tau * len(G)) // 2) + 1
    if width == 1:
        return G
    # reflection keeps the level and the trend of the last norms, on which the final decay depends
    padded = np.pad(G, (0, 2 * width), mode="reflect")
    return np.asarray(median_filter(padded, size=width, mode="nearest")[: len(G)])


def finished(schedule: Steps, final: Final) -> Steps:
    """The schedule with its last multiplier, 0, replaced by half of the one before where that is wanted."""
    if final == "half":
        schedule[-1] = schedule[-2] / 2.0
    return schedule


def schedule_shape(
    name: Shape,
    total_steps: int,
    warmup: float = 0.0,
    *,
    offset: float | None = None,
    power: float = 1.0,
    drops: tuple[float, ...] = (0.3, 0.6, 0.9),
) -> Steps:
    """A named schedule as multipliers of the peak rate, after an optional linear warm-up.

    Parameters
    ----------
    name : over t = 1..T, or over what the warm-up leaves of it:
        "flat" is 1; "1/t" is b / (b + t - 1); "1/sqrt(t)"; "cosine" is (1 + cos(pi x)) / 2, "linear" 1 - x and
        "polynomial" (1 - x)^power for x = (t - 1) / (T - 1); "step" divides by 10 at each of `drops`.
    total_steps : T, at least 2.
    warmup : share of the steps, in [0, 1), in which the rate rises linearly; 0.05 to 0.1 is usual for deep networks.
    offset : b > 0 of "1/t"; T / 10 when None.
    power : of "polynomial", positive. The published refined schedules look like a warm-up of 20 to 45 % with power
        0.8 to 1 for DLRM, GPT, RoBERTa and MRI reconstruction, and like power 1.5 and 3 without for RCNN and ImageNet.
    drops : of "step", shares of the run in (0, 1).

    Returns
    -------
    array of shape (T,) : in [0, 1] with maximum 1.

    Raises
    ------
    ValueError, TypeError : an argument is out of its range.
    """
    check_choice("name", name, get_args(Shape))
    T = check_integer("total_steps", total_steps, at_least=2)
    rising = round(check_number("warmup", warmup, at_least=0.0, below=1.0) * T)
    if rising > T - 2:
        raise ValueError(f"warmup must leave 2 of {T} steps, got {warmup!r}")
    steps = T - rising
    offset = steps / 10.0 if offset is None else check_number("offset", offset, above=0.0)
    power = check_number("power", power, above=0.0)
    for drop in drops:
        check_number("drops", drop, above=0.0, below=1.0)

    gone = np.arange(steps, dtype=float)  # t - 1
    left = 1.0 - gone / (steps - 1)
    if name == "flat":
        decay = np.ones(steps)
    elif name == "1/t":
        decay = offset / (offset + gone)
    elif name == "1/sqrt(t)":
        decay = 1.0 / np.sqrt(1.0 + gone)
    elif name == "cosine":
        decay = 0.5 - 0.5 * np.cos(np.pi * left)
    elif name == "step":
        decay = 0.1 ** sum(gone >= np.floor(drop * steps) for drop in drops)
    else:
        decay = left ** (power if name == "polynomial" else 1.0)
    return np.concatenate([np.arange(1, rising + 1) / (rising + 1), decay])
