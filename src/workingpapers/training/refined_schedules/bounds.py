"""Bounds on the last iterate of SGD for a given schedule and gradient norms, and the step sizes that minimise them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numba
import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from workingpapers.common.validation import check_choice, check_finite, check_number

Steps = Float[np.ndarray, " steps"]
Bound = Literal["theorem", "numeric"]


@dataclass(frozen=True, eq=False)
class OptimalSteps:
    """The step sizes that minimise the numeric bound, and the bound they reach.

    Attributes
    ----------
    etas : eta_1..eta_T, all positive, in the unit of D / G. The last is virtual: it is taken after x_T.
    bound : B(etas), in the unit of D * G.
    """

    etas: Steps
    bound: float

    @property
    def schedule(self) -> Steps:
        """Multipliers for `RefinedLR`: eta_t over the largest eta before the last step, and 0 for the last."""
        schedule: Steps = self.etas / self.etas[:-1].max()
        schedule[-1] = 0.0
        return schedule


def optimise_bound(norms: ArrayLike, D: float = 1.0) -> OptimalSteps:
    """Minimise the last-iterate bound of plain SGD over all step sizes eta_t > 0.

    The bound of SGD on a convex function, for norms G_t and R_k = eta_k + ... + eta_T, is

        B(eta) = D^2 / (2 R_1) + sum_t eta_t^2 G_t^2 / (2 R_1)
                 + 1/2 sum_{k<T} eta_k (sum_{t>=k} eta_t^2 G_t^2) / (R_k R_{k+1}).

    As eta_k / (R_k R_{k+1}) = 1 / R_{k+1} - 1 / R_k, summing by parts leaves

        B = D^2 / (2 R_1) + 1/2 sum_{k<T} G_k^2 (R_k - R_{k+1})^2 / R_{k+1} + 1/2 G_T^2 R_T,

    which is convex, and of degree one in R apart from D. So the best continuation from R_k costs c_k R_k / 2 whatever
    R_k is, and the minimiser follows from one backward and one forward pass, O(T), exactly. For constant G it is
    close to linear decay from D / (G sqrt(T)), with B near 2 D G / sqrt(T), twice the theorem's bound.

    Parameters
    ----------
    norms : G_1..G_T > 0, T at least 2. Not filtered here: smooth a noisy log first.
    D : distance from the start to the comparator, positive.

    Returns
    -------
    OptimalSteps : the minimiser and its bound.

    Raises
    ------
    ValueError, TypeError : norms are not at least two positive finite numbers, or D is not a positive number.
    """
    G = check_norms("norms", norms)
    D = check_number("D", D, above=0.0)
    unit = float(np.exp(np.log(G).mean()))  # the squares of very small or large norms would leave the range of floats
    costs, shares = _continuations(G / unit)
    first = D / np.sqrt(costs[0])  # R_1 minimises D^2 / (2 R_1) + c_1 R_1 / 2
    tails = first * np.concatenate([[1.0], np.cumprod(1.0 - shares[:-1])])
    return OptimalSteps(etas=tails * shares / unit, bound=float(D * np.sqrt(costs[0]) * unit))


@numba.njit(cache=True)
def _continuations(G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """c_k, and eta_k / R_k at the best continuation, backwards.

    c_k = min over r = R_{k+1} / R_k of G_k^2 (1 - r)^2 / r + c_{k+1} r, reached at r = G_k / sqrt(G_k^2 + c_{k+1}).
    """
    costs, shares = np.empty_like(G), np.empty_like(G)
    costs[-1], shares[-1] = G[-1] ** 2, 1.0  # R_T = eta_T
    for k in range(len(G) - 2, -1, -1):
        hypotenuse = np.sqrt(G[k] ** 2 + costs[k + 1])
        rest = costs[k + 1] / (hypotenuse + G[k])  # hypotenuse - G_k, without cancellation
        costs[k] = 2.0 * G[k] * rest
        shares[k] = rest / hypotenuse
    return costs, shares


def last_iterate_bound(etas: ArrayLike, norms: ArrayLike, D: float = 1.0, kind: Bound = "theorem") -> float:
    """Bound on f(x_T) - f(u) for SGD with a schedule of the given shape at its best scale.

    Only x_1..x_T enter, so eta_T is never used: its place is taken by a virtual last step that minimises the bound.
    Schedules that end in 0 and schedules that do not are thus treated alike.

    Parameters
    ----------
    etas : step sizes or multipliers eta_1..eta_T >= 0, T at least 2, one of the first T - 1 positive; the scale and
        the last entry have no effect.
    norms : G_1..G_T > 0.
    D : distance from the start to the comparator u, positive.
    kind : "theorem" for (1 / w_{1:T}) (D^2 / 2 + sum_t w_t^2 G_t^2 / 2) at the weights of the schedule, least for
        `refine`; "numeric" for the bound B of plain SGD, least for `optimise_bound`.

    Returns
    -------
    float : in the unit of D * G.

    Raises
    ------
    ValueError, TypeError : an argument is out of its range, or the lengths differ.
    """
    schedule = _check_schedule(etas)
    G = check_norms("norms", norms)
    _check_lengths(schedule, G)
    D = check_number("D", D, above=0.0)
    check_choice("kind", kind, get_args(Bound))
    squared = _theorem_bound(schedule, G) if kind == "theorem" else _numeric_bound(schedule, G)
    return D * float(np.sqrt(squared(_best_virtual_step(squared, len(G)))))


def weights_from_schedule(etas: ArrayLike, norms: ArrayLike | None = None) -> Steps:
    """The weights w_t, summing to 1, whose theorem gives the schedule eta_t ~ w_t (w_{t+1} + ... + w_T).

    Every shape comes from weights, one family for each virtual last step y > 0: backwards from tau_T = y,

        tau_t = tau_{t+1} + eta_t / tau_{t+1},   w_t = eta_t / (tau_{t+1} tau_1),   w_T = y / tau_1.

    Of this family the member with the least bound at the given norms is returned.

    Parameters
    ----------
    etas : as in `last_iterate_bound`.
    norms : G_1..G_T > 0; constant when None.

    Returns
    -------
    array of shape (T,) : nonnegative, summing to 1.

    Raises
    ------
    ValueError, TypeError : as `last_iterate_bound`.
    """
    schedule = _check_schedule(etas)
    G = np.ones(len(schedule)) if norms is None else check_norms("norms", norms)
    _check_lengths(schedule, G)
    squared = _theorem_bound(schedule, G)
    return _weights(schedule, _best_virtual_step(squared, len(G)))


def _theorem_bound(schedule: Steps, G: Steps) -> Callable[[float], float]:
    """The square of the theorem's bound at its best scale, for D = 1: sum_t w_t^2 G_t^2 with weights summing to 1."""
    return lambda y: float(np.sum(np.square(_weights(schedule, y) * G)))


def _numeric_bound(schedule: Steps, G: Steps) -> Callable[[float], float]:
    """The square of the numeric bound at its best scale, for D = 1.

    Scaling eta by s turns B into D^2 / (2 s R_1) + s C, which is least at 2 sqrt(C D^2 / (2 R_1)).
    """
    remaining = np.cumsum(schedule[:-1][::-1])[::-1]  # R_k without the virtual step, k < T
    squares = np.square(schedule[:-1] * G[:-1])

    def squared(y: float) -> float:
        after = y + np.append(remaining[1:], 0.0)  # R_{k+1}
        return float((np.sum(squares / after) + y * G[-1] ** 2) / (y + remaining[0]))

    return squared


def _best_virtual_step(squared: Callable[[float], float], steps: int) -> float:
    """Minimise over y > 0: a grid over log y for the basin, then a bounded search inside it.

    Linear decay with peak 1 and constant norms has its minimum at y = 1 / sqrt(T).
    """
    grid = np.linspace(-15.0, 15.0, 61) - 0.5 * np.log(steps)
    best = int(np.argmin([squared(y) for y in np.exp(grid)]))
    inside = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    options = {"xatol": 1e-9}
    found = minimize_scalar(lambda log_y: squared(np.exp(log_y)), bounds=inside, method="bounded", options=options)
    return float(np.exp(found.x))


@numba.njit(cache=True)
def _weights(schedule: np.ndarray, y: float) -> np.ndarray:
    weights = np.empty_like(schedule)
    weights[-1] = tau = y
    for t in range(len(schedule) - 2, -1, -1):
        weights[t] = schedule[t] / tau
        tau += weights[t]
    return weights / tau


def check_norms(name: str, norms: ArrayLike) -> Steps:
    """Gradient norms as a float64 copy: at least two, finite, positive.

    Raises
    ------
    ValueError : they are not.
    """
    G = _vector(name, norms)
    check_finite(name, G)
    if not (G > 0).all():
        raise ValueError(f"{name} must be positive, got {G.min():g} at step {int(G.argmin())}")
    return G


def _check_schedule(etas: ArrayLike) -> Steps:
    """The schedule with peak 1 before its last step."""
    schedule = _vector("etas", etas)
    check_finite("etas", schedule)
    if not ((schedule >= 0).all() and schedule[:-1].any()):
        raise ValueError("etas must be at least 0, with a positive one before the last")
    schedule /= schedule[:-1].max()
    return schedule


def _check_lengths(schedule: Steps, G: Steps) -> None:
    if len(schedule) != len(G):
        raise ValueError(f"etas and norms must be equally long, got {len(schedule)} and {len(G)}")


def _vector(name: str, values: ArrayLike) -> Steps:
    vector = np.array(values, dtype=float)  # a copy: the caller's array stays as it is
    if vector.ndim != 1 or len(vector) < 2:
        raise ValueError(f"{name} must be a vector of at least 2 entries, got shape {vector.shape}")
    return vector
