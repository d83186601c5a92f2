"""Compiled loops for affine components and simple resolvents.

Each loop exists twice: here, for operators whose components are affine (least squares, dense affine sums, matrix
games), and in the module of its algorithm, for any callables. Both consume the same random draws in the same order,
so their iterates agree to rounding. Components being affine, a difference F_i(u) - F_i(v) is one linear map of u - v.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

LEAST_SQUARES, AFFINE, GAME = 0, 1, 2
IDENTITY, BOX, L1, SIMPLEX_PAIR = 0, 1, 2, 3

# Reassociation lets the reductions use vector instructions; NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract"}


class Components(NamedTuple):
    """Affine components in the form the loops read.

    Attributes
    ----------
    kind : LEAST_SQUARES, AFFINE or GAME.
    rows : least squares: the design, (n, d); affine: the n matrices one below the other, (n d, d); game: A, (m, k).
    columns : affine: the mean matrix, (d, d); game: A transposed, (k, m); least squares: unused.
    offset : least squares: the response, (n,); affine: the mean offset, (d,); game: unused.
    row_weight : 1 / (n q_i) of component i; of a game's row i: 1 / q_i.
    column_weight : 1 / q_j of a game's column j; otherwise unused.
    """

    kind: int
    rows: np.ndarray
    columns: np.ndarray
    offset: np.ndarray
    row_weight: np.ndarray
    column_weight: np.ndarray


class Resolvent(NamedTuple):
    """A resolvent in the form the loops read: IDENTITY, BOX (low, high), L1 (weight) or SIMPLEX_PAIR (split)."""

    kind: int
    low: np.ndarray
    high: np.ndarray
    weight: float
    split: int


@njit(cache=True, fastmath=_FAST)
def full_value(ops: Components, u: np.ndarray, out: np.ndarray) -> None:
    """Set `out` to F(u)."""
    if ops.kind == LEAST_SQUARES:
        out[:] = (ops.rows @ u - ops.offset) @ ops.rows / ops.rows.shape[0]
    elif ops.kind == AFFINE:
        out[:] = ops.columns @ u + ops.offset
    else:
        split = ops.rows.shape[0]
        out[:split] = ops.rows @ u[split:]
        out[split:] = -(ops.columns @ u[:split])


@njit(cache=True, fastmath=_FAST)
def add_difference(ops: Components, draws: np.ndarray, direction: np.ndarray, out: np.ndarray) -> None:
    """Add the mean over `draws` of (F_q(u) - F_q(v)) to `out`, where `direction` is u - v."""
    size = draws.shape[0]
    d = direction.shape[0]
    for s in range(size):
        i, j = draws[s, 0], draws[s, -1]
        if ops.kind == LEAST_SQUARES:
            row = ops.rows[i]
            slope = 0.0
            for a in range(d):
                slope += row[a] * direction[a]
            slope *= ops.row_weight[i] / size
            for a in range(d):
                out[a] += slope * row[a]
        elif ops.kind == AFFINE:
            scale = ops.row_weight[i] / size
            for a in range(d):
                row = ops.rows[i * d + a]
                slope = 0.0
                for c in range(d):
                    slope += row[c] * direction[c]
                out[a] += scale * slope
        else:
            split = ops.rows.shape[0]
            column, row = ops.columns[j], ops.rows[i]
            right = ops.column_weight[j] * direction[split + j] / size
            left = ops.row_weight[i] * direction[i] / size
            for a in range(split):
                out[a] += right * column[a]
            for a in range(d - split):
                out[split + a] -= left * row[a]


@njit(cache=True, fastmath=_FAST)
def project_on_simplex(v: np.ndarray, out: np.ndarray) -> None:
    """Set `out` to the point of the probability simplex nearest to v.

    The point is max(v - t, 0) with sum 1; t is found by Newton's method on this convex, piecewise linear equation,
    which from below climbs to the root in finitely many steps (Michelot, 1986).
    """
    size = v.shape[0]
    threshold, support = (np.sum(v) - 1.0) / size, float(size)
    while True:
        total, count = 0.0, 0.0  # of what exceeds the threshold; without a branch, for vector instructions
        for a in range(size):
            kept = 1.0 if v[a] > threshold else 0.0
            total += kept * v[a]
            count += kept
        if count == 0.0 or count >= support:  # 0: v is not finite, and the caller's check of the iterate will say so
            break
        threshold, support = (total - 1.0) / count, count
    for a in range(size):
        out[a] = max(v[a] - threshold, 0.0)


@njit(cache=True)
def resolve(prox: Resolvent, v: np.ndarray, step: float, out: np.ndarray) -> None:
    """Set `out` to (Id + step G)^{-1}(v)."""
    if prox.kind == IDENTITY:
        out[:] = v
    elif prox.kind == BOX:
        for a in range(v.shape[0]):
            out[a] = min(max(v[a], prox.low[a]), prox.high[a])
    elif prox.kind == L1:
        threshold = step * prox.weight
        for a in range(v.shape[0]):
            out[a] = np.sign(v[a]) * max(abs(v[a]) - threshold, 0.0)
    else:
        project_on_simplex(v[: prox.split], out[: prox.split])
        project_on_simplex(v[prox.split :], out[prox.split :])


@njit(cache=True)
def page_halpern_steps(
    ops: Components,
    prox: Resolvent,
    u0: np.ndarray,
    u: np.ndarray,
    estimate: np.ndarray,
    g: np.ndarray,
    k: int,
    step: float,
    n: int,
    coins: np.ndarray,
    draws: np.ndarray,
    calls: int,
    limit: float,
) -> tuple[int, int, int, bool]:
    """Algorithm 1 until the draws or the calls run out; see `cocoercive._page_halpern_steps`, line for line."""
    root = math.sqrt(n)
    v, u_next = np.empty_like(u), np.empty_like(u)
    done, exact = 0, False
    while done < coins.shape[0] and calls < limit:
        anchor = 2.0 / (k + 4.0)
        for a in range(u.shape[0]):
            v[a] = anchor * u0[a] + (1.0 - anchor) * u[a] - step * estimate[a]
        resolve(prox, v, step, u_next)
        k += 1
        exact = 2 * draws.shape[1] >= n or coins[done] < 4.0 / (min(k, root) + 5.0)
        if exact:
            full_value(ops, u_next, estimate)
            calls += n
        else:
            add_difference(ops, draws[done], u_next - u, estimate)
            calls += 2 * draws.shape[1]
        for a in range(u.shape[0]):
            g[a] = (v[a] - u_next[a]) / step
            u[a] = u_next[a]
        done += 1
        if not np.isfinite(np.sum(u)):
            break
    return done, k, calls, exact


@njit(cache=True)
def natural_residual(prox: Resolvent, u: np.ndarray, value: np.ndarray, step: float) -> float:
    """||u - J_{step G}(u - step F(u))|| / step, where `value` is F(u)."""
    image = np.empty_like(u)
    resolve(prox, u - step * value, step, image)
    return math.sqrt(np.sum((u - image) ** 2)) / step


@njit(cache=True)
def forb_steps(
    ops: Components,
    prox: Resolvent,
    z: np.ndarray,
    w: np.ndarray,
    previous: np.ndarray,
    value: np.ndarray,
    g: np.ndarray,
    centre: np.ndarray,
    mu: float,
    step: float,
    p: float,
    n: int,
    coins: np.ndarray,
    draws: np.ndarray,
    calls: int,
    limit: float,
    accuracy: float,
) -> tuple[int, int, bool]:
    """Algorithm 3 until the draws or the calls run out; see `monotone._forb_steps`, line for line."""
    v, z_next = np.empty_like(z), np.empty_like(z)
    done, accurate = 0, False
    while done < coins.shape[0] and calls < limit and not accurate:
        v[:] = value
        add_difference(ops, draws[done], z - previous, v)
        for a in range(z.shape[0]):
            v[a] += mu * (w[a] - centre[a] + z[a] - previous[a])
            v[a] = (1.0 - p) * z[a] + p * w[a] - step * v[a]
        resolve(prox, v, step, z_next)
        for a in range(z.shape[0]):
            g[a] = (v[a] - z_next[a]) / step
            z[a] = z_next[a]
            previous[a] = w[a]
        calls += 2 * draws.shape[1]
        if coins[done] < p:
            w[:] = z
            full_value(ops, w, value)
            calls += n
            residual = natural_residual(prox, w, value + mu * (w - centre), step)
            accurate = residual <= accuracy * mu * math.sqrt(np.sum((w - centre) ** 2))
        done += 1
        if not np.isfinite(np.sum(z)):
            break
    return done, calls, accurate


@njit(cache=True)
def extragradient_steps(
    ops: Components,
    prox: Resolvent,
    z: np.ndarray,
    w: np.ndarray,
    value: np.ndarray,
    g: np.ndarray,
    step: float,
    p: float,
    n: int,
    coins: np.ndarray,
    draws: np.ndarray,
    calls: int,
    limit: float,
) -> tuple[int, int]:
    """Loopless variance-reduced extragradient; see `baselines._extragradient_steps`, line for line."""
    v, half, mean = np.empty_like(z), np.empty_like(z), np.empty_like(z)
    done = 0
    while done < coins.shape[0] and calls < limit:
        for a in range(z.shape[0]):
            mean[a] = (1.0 - p) * z[a] + p * w[a]
        resolve(prox, mean - step * value, step, half)
        v[:] = value
        add_difference(ops, draws[done], half - w, v)
        for a in range(z.shape[0]):
            v[a] = mean[a] - step * v[a]
        resolve(prox, v, step, z)
        for a in range(z.shape[0]):
            g[a] = (v[a] - z[a]) / step
        calls += 2 * draws.shape[1]
        if coins[done] < p:
            w[:] = z
            full_value(ops, w, value)
            calls += n
        done += 1
        if not np.isfinite(np.sum(z)):
            break
    return done, calls
