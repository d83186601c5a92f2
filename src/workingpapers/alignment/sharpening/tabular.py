"""Sharpening of finite tables of probabilities, exactly: what the language-model tools estimate by sampling.

Every function works over the last axis; the axes before it are prompts. The base policy is ``p``, with rows that sum
to 1; y* is its most likely response, or the set of them where they tie, and more generally

    y*_gamma = {y : p(y) >= (1 - gamma) max p}.

A policy pi is (eps, delta)-sharpened when P_x[pi(y*(x) | x) >= 1 - delta] >= 1 - eps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from workingpapers.common.validation import check_integer, check_number

Table = Float[np.ndarray, "*prompts responses"]
PerPrompt = Float[np.ndarray, "*prompts"]

_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class AdaptiveLaw:
    """What the adaptive rule of `AdaptiveSampler` does on a table, in expectation over its draws.

    Attributes
    ----------
    selected : law of the response it returns.
    expected_samples : draws until it stops.
    capped : probability that it is stopped by `max_samples`.
    """

    selected: Table
    expected_samples: PerPrompt
    capped: PerPrompt


def modes(p: ArrayLike, gamma: float = 0.0) -> Bool[np.ndarray, "*prompts responses"]:
    """Members of y*_gamma: the most likely responses, or all within a factor 1 - gamma of them, 0 <= gamma < 1."""
    table = _as_table("p", p)
    gamma = check_number("gamma", gamma, at_least=0, below=1)
    return np.asarray(table >= (1.0 - gamma) * table.max(-1, keepdims=True))


def coverage(p: ArrayLike, gamma: float = 0.0, prior: ArrayLike | None = None) -> float:
    """Coverage coefficient ``E_x[1 / p(y*_gamma(x) | x)]``: how many draws a sight of the mode costs on average.

    Parameters
    ----------
    p : base policy, shape (..., responses).
    gamma : of y*_gamma, in [0, 1).
    prior : distribution of the prompts, of the shape of `p` without its last axis; uniform when None.
    """
    table = _as_table("p", p)
    mass = (table * modes(table, gamma)).sum(-1)
    return float(np.average(1.0 / mass, weights=_as_prior(prior, mass)))


def sharpened_share(
    policy: ArrayLike, p: ArrayLike, *, delta: float, gamma: float = 0.0, prior: ArrayLike | None = None
) -> float:
    """Share of prompts on which `policy` gives y*_gamma of the base `p` at least 1 - delta: the largest 1 - eps.

    Parameters
    ----------
    policy, p : of one shape, (..., responses).
    delta : mass that may lie elsewhere, in (0, 1).
    gamma, prior : as in `coverage`.
    """
    table, base = _as_table("policy", policy), _as_table("p", p)
    if table.shape != base.shape:
        raise ValueError(f"policy and p must have one shape, got {table.shape} and {base.shape}")
    delta = check_number("delta", delta, above=0, below=1)
    mass = (table * modes(base, gamma)).sum(-1)
    # The sum over the set may miss 1 - delta by a rounding.
    reached = mass >= 1.0 - delta - 1e-12
    return float(np.average(reached, weights=_as_prior(prior, mass)))


def samples_needed(mass: ArrayLike, rho: float) -> Int[np.ndarray, "*prompts"]:
    """Draws after which a set of probability `mass` has been seen with probability at least 1 - rho.

    ``N = ceil(log(1 / rho) / mass)``, since ``(1 - mass)^N <= exp(-N mass)``.

    Parameters
    ----------
    mass : of the set wanted, for example of y*_gamma, in (0, 1].
    rho : probability of failure allowed, in (0, 1).
    """
    rho = check_number("rho", rho, above=0, below=1)
    masses = np.asarray(mass, dtype=np.float64)
    if not ((masses > 0) & (masses <= 1)).all():
        raise ValueError(f"mass must lie in (0, 1], got {masses.tolist()}")
    return np.ceil(math.log(1.0 / rho) / masses).astype(np.int64)


def bon_distribution(p: ArrayLike, n: int, scores: ArrayLike | None = None) -> Table:
    """Law of the best of `n` draws from `p`, the first of them where scores tie.

    With F(s) the probability that a draw scores at most s, the best of n scores s with probability
    F(s)^n - F(s-)^n. Given the score, the first best draw is any response of that score in proportion to p.

    Parameters
    ----------
    p : base policy, shape (..., responses).
    n : draws, at least 1; 1 gives `p` back.
    scores : self-reward of every response, of the shape of `p` or broadcast to it; may be -inf, not NaN. By default
        log p, or what orders alike.
    """
    table = _as_table("p", p)
    n = check_integer("n", n, at_least=1)
    values = table if scores is None else _as_scores(scores, table.shape)
    order = np.argsort(values, axis=-1, kind="stable")
    ranked = np.take_along_axis(table, order, -1)
    first, last = _tie_groups(np.take_along_axis(values, order, -1))

    cumulative = np.cumsum(ranked, -1)
    up_to = np.take_along_axis(cumulative, last, -1)
    up_to[last == table.shape[-1] - 1] = 1.0  # whatever rounding made of it
    before = np.where(first > 0, np.take_along_axis(cumulative, np.maximum(first - 1, 0), -1), 0.0)
    in_group = up_to - before
    # (F^n - F_before^n) p / (F - F_before); a group without mass is never best.
    best = (up_to**n - before**n) * np.divide(ranked, in_group, out=np.zeros_like(ranked), where=in_group > 0)
    law: Table = np.empty_like(best)
    np.put_along_axis(law, order, best, -1)
    return law


def power(p: ArrayLike, exponent: float) -> Table:
    """``p^exponent``, normalised: with exponent 1 + 1/beta the optimum of RLHF-Sharpening.

    That policy maximises ``E_pi[log p] - beta KL(pi || p)``. Over whole responses it is not what a lower temperature
    gives, which sharpens every next-token distribution by itself.

    Parameters
    ----------
    p : base policy, shape (..., responses).
    exponent : above 0; below 1 it flattens.
    """
    table = _as_table("p", p)
    exponent = check_number("exponent", exponent, above=0)
    # Relative to the largest entry, which no exponent can make underflow.
    raised = (table / table.max(-1, keepdims=True)) ** exponent
    return np.asarray(raised / raised.sum(-1, keepdims=True))


def adaptive_law(p: ArrayLike, *, delta: float, max_samples: int) -> AdaptiveLaw:
    """Law of the adaptive rule: draw until ``1 / max_j p(y_j) <= k / mu``, mu = log(2 / delta), and keep the best.

    The rule, once met, stays met. So it goes on after j draws just when none of them has ``p >= mu / j``, which has
    probability S_j = P(p(y) < mu / j)^j, and a response of probability v, which ends the search from the
    draw k_v = ceil(mu / v) on, is returned

    - at draw k_v, when it is the best of the first k_v, or
    - at a later draw, when it is the first to be good enough: with probability p(y) S_j for every j >= k_v.

    Parameters
    ----------
    p : base policy, shape (..., responses).
    delta : of `AdaptiveSampler`, in (0, 1).
    max_samples : draws after which it stops in any case, at least 1.
    """
    table = _as_table("p", p)
    mu = math.log(2.0 / check_number("delta", delta, above=0, below=1))
    limit = check_integer("max_samples", max_samples, at_least=1)
    rows = table.reshape(-1, table.shape[-1])
    selected, expected, capped = np.empty_like(rows), np.empty(len(rows)), np.empty(len(rows))
    draws = np.arange(limit)
    for row, base in enumerate(rows):
        with np.errstate(divide="ignore"):
            stops_at = np.minimum(np.ceil(mu / base), limit + 1.0)  # k_v, or limit + 1: never
        order = np.argsort(stops_at, kind="stable")
        mass_by_stop = np.concatenate([[0.0], np.cumsum(base[order])])
        can_stop = np.searchsorted(stops_at[order], np.arange(limit + 1), side="right")
        surviving = np.maximum(0.0, 1.0 - mass_by_stop[can_stop]) ** np.arange(limit + 1)  # S_0 ... S_limit
        survival = surviving[:limit]
        expected[row] = survival.sum()  # E[T] = sum_j P(T > j)
        capped[row] = surviving[limit]
        later = np.concatenate([np.cumsum(survival[::-1])[::-1], [0.0]])  # sum of S_j over j >= k, below the limit
        last_draw = np.minimum(stops_at, limit).astype(np.int64)
        # All of the first k draws at most v, less all of them below v; shared among responses of one probability.
        values, group = np.unique(base, return_inverse=True)
        in_group = np.bincount(group, weights=base)
        up_to = np.minimum(np.cumsum(in_group), 1.0)
        up_to[-1] = 1.0
        below = np.concatenate([[0.0], up_to[:-1]])
        share = np.divide(base, in_group[group], out=np.zeros_like(base), where=values[group] > 0)
        best = up_to[group] ** last_draw - below[group] ** last_draw
        selected[row] = share * best + base * later[np.minimum(last_draw, draws.size)]
    shape = table.shape[:-1]
    return AdaptiveLaw(selected.reshape(table.shape), expected.reshape(shape), capped.reshape(shape))


def _tie_groups(
    ranked: Float[np.ndarray, "*prompts responses"],
) -> tuple[Int[np.ndarray, "*prompts responses"], Int[np.ndarray, "*prompts responses"]]:
    """First and last position of the run of equal values that each position of sorted values belongs to."""
    place = np.broadcast_to(np.arange(ranked.shape[-1]), ranked.shape)
    differs = ranked[..., 1:] != ranked[..., :-1]
    edge = np.ones((*ranked.shape[:-1], 1), dtype=bool)
    first = np.maximum.accumulate(np.where(np.concatenate([edge, differs], -1), place, 0), axis=-1)
    ends = np.where(np.concatenate([differs, edge], -1), place, ranked.shape[-1])
    last = np.flip(np.minimum.accumulate(np.flip(ends, -1), axis=-1), -1)
    return first, last.copy()


def _as_table(name: str, p: Any) -> Table:
    """Probabilities in float64 whose rows sum to 1 exactly."""
    table = np.asarray(p.detach().cpu().numpy() if hasattr(p, "detach") else p, dtype=np.float64)
    if table.ndim == 0 or not table.size:
        raise ValueError(f"{name} must have shape (..., responses), not empty, got {table.shape}")
    if not (np.isfinite(table).all() and (table >= 0).all()):
        raise ValueError(f"{name} must hold probabilities, finite and at least 0")
    sums = table.sum(-1, keepdims=True)
    if (np.abs(sums - 1.0) > _SUM_TOLERANCE).any():
        raise ValueError(f"{name} must have rows that sum to 1, got sums from {sums.min():g} to {sums.max():g}")
    return np.asarray(table / sums)


def _as_scores(scores: Any, shape: tuple[int, ...]) -> Table:
    values = np.asarray(scores.detach().cpu().numpy() if hasattr(scores, "detach") else scores, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError("scores must not be NaN")
    try:
        return np.broadcast_to(values, shape)
    except ValueError:
        raise ValueError(f"scores must broadcast to the shape of p {shape}, got {values.shape}") from None


def _as_prior(prior: ArrayLike | None, like: PerPrompt) -> PerPrompt | None:
    if prior is None:
        return None
    weights = np.asarray(prior, dtype=np.float64)
    if weights.shape != like.shape:
        raise ValueError(f"prior must have shape {like.shape}, one entry per prompt, got {weights.shape}")
    if not ((weights >= 0).all() and abs(weights.sum() - 1.0) <= _SUM_TOLERANCE):
        raise ValueError("prior must be a distribution: at least 0, with sum 1")
    return weights
