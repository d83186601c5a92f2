"""Direct Nash optimisation on finite sets of answers, exactly (Algorithm 1 of the paper without sampling).

The preference P(y > y') of every two answers is known, as from a tournament, a table of judgements or a model of
them. Two players choose policies, the payoff of one is P(pi > pi') = E P(y > y'); at the equilibrium, the minimax
winner, neither can be beaten more often than half of the time. For up to a few hundred answers `exact_nash` gives it
at once; `nash_policy` runs many games side by side, handles thousands of answers, and is the oracle of the algorithm
for language models.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numba import njit
from scipy.optimize import linprog

from workingpapers.common.validation import check_finite, check_integer, check_number

Games = Float[np.ndarray, "*contexts actions actions"]
Policy = Float[np.ndarray, "*contexts actions"]
Trace = Float[np.ndarray, " iterations"]


@dataclass(frozen=True)
class NashResult:
    """Policies found by self-play, and how they got there; every trace is averaged over the games.

    Attributes
    ----------
    policy_avg : mean of pi_1 .. pi_T, the approximate equilibrium; shape (A,) or (X, A).
    policy_last : pi_{T+1}, the policy after the last round. Without `tau` it may circle for ever.
    exploitability_trace : entry t is the exploitability of the mean of pi_1 .. pi_{t+1}.
    last_exploitability_trace : entry t is the exploitability of pi_{t+2}, where round t + 1 arrived.
    improvement_trace : entry t is P(pi_{t+2} > pi_{t+1}), at least 1/2 + eta * kl_trace[t]. With `tau` above 0 the
        comparison of this trace and the next is with the mixture of pi_{t+1} and the reference.
    kl_trace : entry t is KL(pi_{t+2} || pi_{t+1}) in nats.
    converged : whether `tol` was reached.
    iterations : T, rounds taken.
    reason : why the iteration stopped, for people.
    eta : the temperature used.
    """

    policy_avg: Policy
    policy_last: Policy
    exploitability_trace: Trace
    last_exploitability_trace: Trace
    improvement_trace: Trace
    kl_trace: Trace
    converged: bool
    iterations: int
    reason: str
    eta: float


def nash_policy(
    P: Games,
    eta: float | Literal["auto"] = 0.5,
    n_rounds: int = 400,
    tau: float = 0.0,
    ref: Policy | None = None,
    init: Policy | None = None,
    tol: float = 0.0,
) -> NashResult:
    """Approach the Nash equilibrium of preferences by soft policy iteration against oneself.

    From pi_1 = `init`, every round takes the closed form of the paper's regression::

        r_t(y) = E_{y' ~ pi_t} P(y > y'),    pi_{t+1}(y) ~ pi_t(y) exp(r_t(y) / eta)

    which maximises P(pi > pi_t) - eta KL(pi || pi_t), so every policy beats its predecessor. The mean policy of T
    rounds from the uniform one has an exploitability of at most eta log(A) / T + 1 / (8 eta); the last policy need not
    converge. With `tau` above 0 payoffs are regularised towards `ref` (Nash-MD): the base of each update and the
    opponent in r_t is the mixture pi_t^tau ~ pi_t^(1 - tau / eta) ref^(tau / eta), and the last policy converges in
    about 30 eta / tau rounds, to within O(1 / eta) of the regularised equilibrium
    pi(y) ~ ref(y) exp(E_{y' ~ pi} P(y > y') / tau).

    Parameters
    ----------
    P : P[y, y'] is the probability that y is preferred to y', shape (A, A) with A at least 2, or (X, A, A) for X
        games at once. In [0, 1], with P[y, y'] + P[y', y] = 1 within 1e-6.
    eta : temperature, above 0 and at least `tau`: small values take large steps. "auto" is
        sqrt(n_rounds / (8 log A)), for which the bound above is smallest (`tau` = 0 only).
    n_rounds : T, at least 1.
    tau : weight of the regularisation, at least 0.
    ref : positive reference policy, rows sum to 1, shape (A,) or (X, A); uniform when None.
    init : positive policy to start from; `ref` when None.
    tol : stop early when the exploitability of the mean policy is at most this; with `tau` above 0, when no policy
        changed by more than this in total probability, |pi_{t+1} - pi_t|_1. At 0 all rounds are taken, unless nothing
        is left to improve.

    Raises
    ------
    ValueError : an argument is out of range, not finite or of the wrong shape.

    Warns
    -----
    RuntimeWarning : a positive `tol` was not reached.

    Examples
    --------
    >>> P = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])
    >>> found = nash_policy(P, eta=0.5, n_rounds=400)
    >>> found.policy_avg.round(2)
    array([0.29, 0.3 , 0.41])
    """
    games = _checked_games(P)
    n_rounds = check_integer("n_rounds", n_rounds, at_least=1)
    tau = check_number("tau", tau, at_least=0)
    tol = check_number("tol", tol, at_least=0)
    eta = _checked_eta(eta, tau, n_rounds, games.shape[-1])
    log_ref = _log_policy("ref", ref, games.shape[:-1])
    log_policy = log_ref if init is None else _log_policy("init", init, games.shape[:-1])

    actions = games.shape[-1]
    log_policy = log_policy.reshape(-1, actions).copy()
    policy = np.exp(log_policy)
    wins, policy_sum, wins_sum = (np.zeros_like(policy) for _ in range(3))
    traces = np.zeros((n_rounds, 4))
    rounds, remaining = _self_play(
        games.reshape(-1, actions, actions),
        log_policy,
        policy,
        wins,
        policy_sum,
        wins_sum,
        log_ref.reshape(-1, actions),
        traces,
        eta,
        tau,
        tol,
    )
    traces = traces[:rounds].T / len(policy)
    converged = remaining <= tol

    measure = "step of the last policy" if tau > 0 else "exploitability of the mean policy"
    reason = f"{measure} {remaining:.1e} {'<=' if converged else '>'} tol {tol:.1e} after {rounds} rounds"
    if tol > 0 and not converged:
        warnings.warn(f"nash_policy did not converge: {reason}", RuntimeWarning, stacklevel=2)
    shape = games.shape[:-1]
    return NashResult(
        policy_avg=(policy_sum / rounds).reshape(shape),
        policy_last=policy.reshape(shape),
        exploitability_trace=traces[0],
        last_exploitability_trace=traces[1],
        improvement_trace=traces[2],
        kl_trace=traces[3],
        converged=converged,
        iterations=rounds,
        reason=reason,
        eta=eta,
    )


@njit(cache=True)
def _self_play(
    games: Float[np.ndarray, "contexts actions actions"],
    log_policy: Float[np.ndarray, "contexts actions"],
    policy: Float[np.ndarray, "contexts actions"],
    wins: Float[np.ndarray, "contexts actions"],
    policy_sum: Float[np.ndarray, "contexts actions"],
    wins_sum: Float[np.ndarray, "contexts actions"],
    log_ref: Float[np.ndarray, "contexts actions"],
    traces: Float[np.ndarray, "rounds 4"],
    eta: float,
    tau: float,
    tol: float,
) -> tuple[int, float]:
    """Take rounds in place, all games one round at a time; return their number and what is compared with `tol`.

    Entries of `traces` are sums over the games, in the order of the traces of `NashResult`.
    """
    contexts, actions = policy.shape
    log_base, reward, mixture = np.empty(actions), np.empty(actions), np.empty(actions)
    for x in range(contexts):
        np.dot(games[x], policy[x], wins[x])
    rounds, remaining = 0, np.inf
    while rounds < len(traces) and remaining > tol:
        longest_step = 0.0
        for x in range(contexts):
            best_against_mean = 0.0
            for y in range(actions):
                policy_sum[x, y] += policy[x, y]
                wins_sum[x, y] += wins[x, y]  # P(y > mean policy) is the mean of the win rates
                best_against_mean = max(best_against_mean, wins_sum[x, y] / (rounds + 1))
                log_base[y], reward[y] = log_policy[x, y], wins[x, y]
            if tau > 0:
                # pi_t^tau ~ pi_t^(1 - tau/eta) ref^(tau/eta)
                for y in range(actions):
                    log_base[y] = (1.0 - tau / eta) * log_policy[x, y] + (tau / eta) * log_ref[x, y]
                _normalise(log_base)
                for y in range(actions):
                    mixture[y] = np.exp(log_base[y])
                np.dot(games[x], mixture, reward)
            # log pi_{t+1} = log base + r_t / eta - log Z_t, in logarithms because policies fall below 1e-300
            for y in range(actions):
                log_policy[x, y] = log_base[y] + reward[y] / eta
            log_z = _normalise(log_policy[x])
            step = 0.0
            for y in range(actions):
                after = np.exp(log_policy[x, y])
                step += abs(after - policy[x, y])
                traces[rounds, 2] += after * reward[y]
                traces[rounds, 3] += after * (reward[y] / eta - log_z)
                policy[x, y] = after
            longest_step = max(longest_step, step)
            np.dot(games[x], policy[x], wins[x])
            best_against_last = 0.0
            for y in range(actions):
                best_against_last = max(best_against_last, wins[x, y])
            traces[rounds, 0] += max(0.0, best_against_mean - 0.5)  # below 0 by rounding alone
            traces[rounds, 1] += max(0.0, best_against_last - 0.5)
        remaining = longest_step if tau > 0 else traces[rounds, 0] / contexts
        rounds += 1
    return rounds, remaining


@njit(cache=True)
def _normalise(logs: Float[np.ndarray, " actions"]) -> float:
    """Subtract log sum exp(logs), in place, and return it."""
    highest, total = -np.inf, 0.0
    for y in range(len(logs)):
        highest = max(highest, logs[y])
    for y in range(len(logs)):
        total += np.exp(logs[y] - highest)
    log_total: float = highest + np.log(total)
    for y in range(len(logs)):
        logs[y] -= log_total
    return log_total


def exploitability(P: Games, policy: Policy) -> Float[np.ndarray, "*contexts"]:
    """How much more often than half of the time the best reply to a policy wins: max_y P(y > policy) - 1/2.

    Parameters
    ----------
    P : preferences, shape (A, A) or (X, A, A), as in `nash_policy`.
    policy : rows sum to 1, shape (A,) or (X, A).

    Returns
    -------
    One number in [0, 1/2] per game; 0 exactly at an equilibrium.

    Raises
    ------
    ValueError : an argument is not finite, of the wrong shape, no preference or no distribution.
    """
    games = _checked_games(P)
    excess: np.ndarray = _win_rates(games, _checked_policy("policy", policy, games.shape[:-1])).max(-1) - 0.5
    above: np.ndarray = np.maximum(excess, 0.0)  # never below 0 but for rounding
    return above


def exact_nash(P: Games) -> Policy:
    """Nash equilibrium of each game by linear programming, for small A.

        max v  over distributions pi  subject to  sum_y pi(y) P(y > y') >= v for every y'

    The value v is 1/2. One program of A + 1 variables per game: milliseconds at A = 30, seconds at A = 1000.

    Parameters
    ----------
    P : preferences, shape (A, A) or (X, A, A), as in `nash_policy`.

    Returns
    -------
    Policies, shape (A,) or (X, A). Where a game has several equilibria, one of them.

    Raises
    ------
    ValueError : P is not finite, of the wrong shape or no preference.
    ArithmeticError : the solver gave up.
    """
    games = _checked_games(P)
    actions = games.shape[-1]
    policies = [_solve_game(game) for game in games.reshape(-1, actions, actions)]
    return np.stack(policies).reshape(games.shape[:-1])


def borda_scores(P: Games) -> Policy:
    """Average win rate of every answer against the others, itself left out.

    The answer that leads this ranking also leads a Bradley-Terry model fitted to all pairs equally; where preferences
    go in circles it may be beaten nearly always by one other answer.

    Parameters
    ----------
    P : preferences, shape (A, A) or (X, A, A), as in `nash_policy`.

    Raises
    ------
    ValueError : P is not finite, of the wrong shape or no preference.
    """
    games = _checked_games(P)
    scores: np.ndarray = (games.sum(-1) - np.diagonal(games, axis1=-2, axis2=-1)) / (games.shape[-1] - 1)
    return scores


def _win_rates(games: Games, policy: Policy) -> Policy:
    """E_{y' ~ policy} P(y > y') for every y."""
    rates: np.ndarray = np.matmul(games, policy[..., None])[..., 0]
    return rates


def _solve_game(game: Float[np.ndarray, "actions actions"]) -> Float[np.ndarray, " actions"]:
    actions = len(game)
    found = linprog(
        np.append(np.zeros(actions), -1.0),
        A_ub=np.column_stack([-game.T, np.ones(actions)]),
        b_ub=np.zeros(actions),
        A_eq=np.append(np.ones(actions), 0.0)[None],
        b_eq=[1.0],
        bounds=(0.0, 1.0),
    )
    if not found.success:
        raise ArithmeticError(f"the linear program of a game with {actions} answers was not solved: {found.message}")
    weights = np.maximum(found.x[:-1], 0.0)
    policy: np.ndarray = weights / weights.sum()
    return policy


def _checked_eta(eta: float | str, tau: float, n_rounds: int, actions: int) -> float:
    if isinstance(eta, str):
        if eta != "auto" or tau > 0:
            raise ValueError(f"eta must be a number, or 'auto' where tau is 0, got {eta!r} with tau={tau:g}")
        return math.sqrt(n_rounds / (8.0 * math.log(actions)))
    eta = check_number("eta", eta, above=0)
    if tau > eta:
        raise ValueError(f"tau must be at most eta={eta:g}, got {tau:g}")
    return eta


def _checked_games(P: Games) -> Games:
    games = np.array(P, dtype=float)  # a copy: the caller's array stays as it is
    if games.ndim not in (2, 3) or games.shape[-1] != games.shape[-2] or games.shape[-1] < 2 or not games.size:
        raise ValueError(f"P must have shape (A, A) or (X, A, A) with A at least 2, got {games.shape}")
    check_finite("P", games)
    if games.min() < 0 or games.max() > 1:
        raise ValueError(f"P must be in [0, 1], got values from {games.min():g} to {games.max():g}")
    error = float(np.abs(games + games.swapaxes(-1, -2) - 1.0).max())
    if error > 1e-6:
        raise ValueError(
            f"P[y, y'] + P[y', y] must be 1, got a sum off by {error:g}: average the judge over both orders, "
            "(P + 1 - P.T) / 2"
        )
    return games


def _checked_policy(name: str, policy: Policy, shape: tuple[int, ...]) -> Policy:
    values = np.array(policy, dtype=float)
    if values.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {values.shape}")
    check_finite(name, values)
    if (values < 0).any() or np.abs(values.sum(-1) - 1.0).max() > 1e-6:
        raise ValueError(f"{name} must be at least 0 and sum to 1, got sums {np.unique(values.sum(-1))}")
    return values


def _log_policy(name: str, policy: Policy | None, shape: tuple[int, ...]) -> Policy:
    """Logarithm of a policy, the uniform one for None."""
    if policy is None:
        return np.full(shape, -math.log(shape[-1]))
    values = _checked_policy(name, policy, shape)
    if not (values > 0).all():
        raise ValueError(f"{name} must be positive: an answer of probability 0 never returns; leave it out of P")
    logs: np.ndarray = np.log(values / values.sum(-1, keepdims=True))
    return logs
