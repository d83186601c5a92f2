"""What token rewards are worth, where it can be computed exactly: trees and tables of tokens."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import expit, logsumexp

from workingpapers.common.validation import check_finite, check_integer, check_number

_ROUNDING = 1e-9  # nats by which a prefix may fall below the threshold and count as on it


@dataclass(frozen=True)
class SoftOptimal:
    """The policy that maximises reward less beta times the divergence from the reference.

    Attributes
    ----------
    logps : of actions, one table (states, actions) for each token of an answer.
    values : V*, one vector (states,) for each token: the objective from there on.
    """

    logps: tuple[Float[np.ndarray, "states actions"], ...]
    values: tuple[Float[np.ndarray, " states"], ...]


def soft_optimal_policy(
    rewards: Sequence[Float[np.ndarray, "states actions"]],
    ref_logps: Sequence[Float[np.ndarray, "states actions"]],
    *,
    beta: float,
    successors: Sequence[Int[np.ndarray, "states actions"]] | None = None,
) -> SoftOptimal:
    """Solve a token problem by backward induction.

        V_h(s) = beta log sum_a pi_ref(a | s) exp((r_h(s, a) + V_{h+1}(s')) / beta),  V_{H+1} = 0
        log pi*(a | s) = log pi_ref(a | s) + (r_h(s, a) + V_{h+1}(s') - V_h(s)) / beta

    so that along every answer the rewards sum to ``beta log(pi* / pi_ref) + V_1``: DPO, which fits these log-ratios to
    comparisons of whole answers, learns a reward of tokens.

    Parameters
    ----------
    rewards : of the actions at each of H tokens.
    ref_logps : of the same shapes, in nats.
    beta : weight of the divergence, above 0.
    successors : the state that follows each action, for all tokens but the last (a table for it is not read). None
        when states are prefixes: one, then A, then A^2, ..., prefix s followed by token a being s A + a.

    Raises
    ------
    ValueError : the tables do not fit together, hold NaN, or infinite rewards.
    """
    beta = check_number("beta", beta, above=0)
    if not len(rewards) or len(rewards) != len(ref_logps):
        raise ValueError(f"rewards and ref_logps must hold as many tables, got {len(rewards)} and {len(ref_logps)}")
    logps: list[Float[np.ndarray, "states actions"]] = []
    values: list[Float[np.ndarray, " states"]] = []
    for place in reversed(range(len(rewards))):
        reward, ref = np.asarray(rewards[place], dtype=float), np.asarray(ref_logps[place], dtype=float)
        check_finite("rewards", reward)
        if reward.ndim != 2 or ref.shape != reward.shape or np.isnan(ref).any():
            raise ValueError(f"ref_logps[{place}] must be log-probabilities {reward.shape}, got shape {ref.shape}")
        gain = reward / beta
        if values:
            after = np.arange(reward.size).reshape(reward.shape) if successors is None else successors[place]
            gain = gain + values[-1][after] / beta
        normaliser = logsumexp(ref + gain, axis=1)
        values.append(beta * normaliser)
        logps.append(ref + gain - normaliser[:, None])
    return SoftOptimal(tuple(logps[::-1]), tuple(values[::-1]))


@dataclass(frozen=True)
class Elimination:
    """What `prefix_elimination` found.

    Attributes
    ----------
    response : the most likely of the responses asked for.
    logp : its log-probability.
    queries : responses asked for.
    bound : min(A^H, 1 + (A - 1) H A^xi), which `queries` cannot exceed.
    """

    response: tuple[int, ...]
    logp: float
    queries: int
    bound: float


def prefix_elimination(
    query: Callable[[tuple[int, ...]], Sequence[float] | Float[np.ndarray, " horizon"]], A: int, H: int, xi: float
) -> Elimination:
    """Find the most likely of A^H responses when every query tells the rewards of its tokens.

    With rewards log pi*(y_h | y_<h), a prefix less likely than A^-xi has no response that is as likely as that, so it
    is never entered again; nor are the untried tokens after a prefix, when the tried ones leave them less than that.
    Depth first, each query after the first tries one new token after a prefix that is still alive. A layer has at most
    A^xi such prefixes, so 1 + (A - 1) H A^xi queries suffice where some response is at least that likely; with one
    reward for the whole response, A^H are needed. (Proposition 3.2 states A^min(xi + 1, H); as a number of whole
    responses that does not hold for small xi, where the (A - 1) H of the last prefix count.)

    Parameters
    ----------
    query : maps a response, H tokens in 0 ... A - 1, to the log-probabilities of its tokens, at most 0; the
        probabilities of the tokens after a prefix sum to 1.
    A, H : tokens to choose from, and tokens in a response, at least 1.
    xi : at least 0; some response has probability A^-xi or more. If none has, the best of the responses asked for is
        returned, which may not be the most likely.

    Raises
    ------
    ValueError : A, H or xi is out of range, or a query does not return H log-probabilities.
    """
    A, H = check_integer("A", A, at_least=1), check_integer("H", H, at_least=1)
    xi = check_number("xi", xi, at_least=0)
    threshold = -xi * math.log(A) - _ROUNDING
    best, best_logp, queries = (0,) * H, -math.inf, 0
    # prefix, log-probability, tokens tried after it, probability left to the others
    alive: list[tuple[tuple[int, ...], float, int, float]] = [((), 0.0, 0, 1.0)]
    while alive:
        prefix, logp, tried, left = alive.pop()
        if tried == A or left <= 0.0 or logp + math.log(left) < threshold:
            continue
        response = (*prefix, tried) + (0,) * (H - len(prefix) - 1)
        rewards = np.asarray(query(response), dtype=float)
        queries += 1
        if rewards.shape != (H,) or not (rewards <= _ROUNDING).all():
            raise ValueError(f"query must return {H} log-probabilities, got {rewards.tolist()}")
        if rewards.sum() > best_logp:
            best, best_logp = response, float(rewards.sum())
        alive.append((prefix, logp, tried + 1, left - math.exp(rewards[len(prefix)])))
        for depth in range(len(prefix) + 1, H):
            logp += float(rewards[depth - 1])
            if logp < threshold:
                break
            alive.append((response[:depth], logp, 1, 1.0 - math.exp(rewards[depth])))
    bound = min(float(A) ** H, 1.0 + (A - 1) * H * float(A) ** xi)
    return Elimination(best, best_logp, queries, bound)


@dataclass(frozen=True)
class PessimisticReward:
    """A linear reward of tokens, lowered where comparisons say little.

    Attributes
    ----------
    reward : phi . theta - rho width.
    theta : the maximum-likelihood weights.
    width : ||phi|| in the norm of Sigma^-1.
    """

    reward: Float[np.ndarray, "*shape"]
    theta: Float[np.ndarray, " features"]
    width: Float[np.ndarray, "*shape"]


def pessimistic_token_reward(
    features: Float[np.ndarray, "... features"],
    pairs: tuple[Float[np.ndarray, "pairs features"], Float[np.ndarray, "pairs features"]],
    lam: float,
    rho: float,
) -> PessimisticReward:
    """Fit a linear reward of tokens to comparisons of answers, and subtract its uncertainty (Algorithm 1).

        theta = argmin sum_i -log sigma(theta . (phi_i^w - phi_i^l)) + lam ||theta||^2 / 2
        Sigma = sum_i (phi_i^w - phi_i^l)(phi_i^w - phi_i^l)^T + lam I
        r(s, a) = phi(s, a) . theta - rho ||phi(s, a)||_{Sigma^-1}

    The paper keeps theta in a ball; the ridge here does the same for answers that are perfectly separated. Hand the
    reward to `soft_optimal_policy` for the policy.

    Parameters
    ----------
    features : phi(s, a), of all the state-action pairs that are to have a reward.
    pairs : features of the chosen and of the rejected answers, each summed over its tokens.
    lam : above 0.
    rho : at least 0.

    Raises
    ------
    ValueError : shapes do not fit, a number is not finite, or lam or rho is out of range.

    Warns
    -----
    RuntimeWarning : the fit did not converge.
    """
    lam, rho = check_number("lam", lam, above=0), check_number("rho", rho, at_least=0)
    phi = np.asarray(features, dtype=float)
    chosen, rejected = (np.asarray(side, dtype=float) for side in pairs)
    if not phi.ndim or chosen.ndim != 2 or chosen.shape != rejected.shape or chosen.shape[1] != phi.shape[-1]:
        raise ValueError(
            f"pairs must be two arrays (pairs, {phi.shape[-1] if phi.ndim else 'features'}), got {chosen.shape} and "
            f"{rejected.shape}"
        )
    check_finite("features", phi)
    check_finite("pairs", chosen)
    check_finite("pairs", rejected)
    lead = chosen - rejected

    def objective(theta: Float[np.ndarray, " features"]) -> tuple[float, Float[np.ndarray, " features"]]:
        margin = lead @ theta
        value = np.logaddexp(0.0, -margin).sum() + 0.5 * lam * theta @ theta
        return float(value), lam * theta - lead.T @ expit(-margin)

    def hessian(theta: Float[np.ndarray, " features"]) -> Float[np.ndarray, "features features"]:
        margin = lead @ theta
        curved: Float[np.ndarray, "features features"] = (lead * (expit(margin) * expit(-margin))[:, None]).T @ lead
        return curved + lam * np.eye(len(theta))

    scale = max(1.0, float(np.abs(lead).sum()))
    found = minimize(
        objective, np.zeros(phi.shape[-1]), jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-9 * scale}
    )
    if not found.success:
        warnings.warn(f"the fit of theta did not converge: {found.message}", RuntimeWarning, stacklevel=2)
    covariance = lead.T @ lead + lam * np.eye(phi.shape[-1])
    flat = phi.reshape(-1, phi.shape[-1])
    width = np.sqrt((flat * np.linalg.solve(covariance, flat.T).T).sum(1)).reshape(phi.shape[:-1])
    return PessimisticReward(phi @ found.x - rho * width, found.x, width)
