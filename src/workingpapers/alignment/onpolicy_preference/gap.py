"""How far the best answers lie from the reference policy, what to do about it, and how fast mass can get there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import logsumexp
from torch import Tensor

from workingpapers.common.validation import check_finite, check_integer, check_number

_FAR = 0.1  # effective share of the samples below which fresh ones are advised: our choice, not the paper's
_STEPS_WANTED = 100  # gradient steps after which the losses here have moved a policy as far as their data let them
_MOST_REUSE = 15  # gradient steps on a batch in the authors' bandit runs


@dataclass(frozen=True)
class AlignmentGap:
    """Distance between the reference and the optimum pi* = pi_ref exp(r / beta) / Z of the KL-regularised objective.

    Attributes
    ----------
    effective_sample_size : how many of the n samples count under pi*, between 1 and n.
    kl_from_reference : KL(pi* || pi_ref) in nats, estimated from the samples, at most log n. A value close to log n
        says that the samples do not reach pi*: the truth may be much larger.
    kl_to_reference : KL(pi_ref || pi*) in nats.
    samples : n, answers to each prompt.
    """

    effective_sample_size: float
    kl_from_reference: float
    kl_to_reference: float
    samples: int

    @property
    def share(self) -> float:
        """Effective sample size as a share of the samples: 1 where all answers are equally good."""
        return self.effective_sample_size / self.samples


@dataclass(frozen=True)
class Recommendation:
    """How to set the switches of `PreferenceTuner`.

    Attributes
    ----------
    on_policy : whether to draw fresh answers.
    inner_steps : gradient steps on each batch.
    batch_size : reward queries in each batch.
    loss : what to minimise.
    reasons : one sentence for each decision.
    """

    on_policy: bool
    inner_steps: int
    batch_size: int
    loss: str
    reasons: tuple[str, ...]


def alignment_gap(rewards: Any, beta: float) -> AlignmentGap:
    """Measure from rewards of reference samples how far the optimal policy is from the reference.

    With w_i = exp(r_i / beta) and u_i = w_i / sum w, over the n answers to one prompt::

        effective sample size = 1 / sum u_i^2
        KL(pi* || pi_ref) = log n + sum u_i log u_i
        KL(pi_ref || pi*) = log mean exp(r / beta) - mean(r) / beta

    Parameters
    ----------
    rewards : of n answers drawn from the reference, shape (n,), or (prompts, n), whose rows are averaged; n >= 2.
    beta : weight of the KL divergence in the objective, above 0, in units of the reward.

    Raises
    ------
    ValueError : the rewards are not finite or have another shape, or beta is out of range.

    Examples
    --------
    >>> gap = alignment_gap([0.0, 0.0, 0.0, 1.0], beta=0.1)
    >>> round(gap.effective_sample_size, 2), round(gap.kl_from_reference, 2)
    (1.0, 1.38)
    """
    check_number("beta", beta, above=0)
    table = np.asarray(rewards.detach().cpu() if isinstance(rewards, Tensor) else rewards, dtype=float)
    table = table[None] if table.ndim == 1 else table
    if table.ndim != 2 or not len(table) or table.shape[1] < 2:
        raise ValueError(f"rewards must have shape (n,) or (prompts, n) with n at least 2, got {np.shape(rewards)}")
    check_finite("rewards", table)
    n = table.shape[1]
    scaled = (table - table.max(1, keepdims=True)) / beta  # a constant added to all rewards changes nothing
    log_total = logsumexp(scaled, axis=1, keepdims=True)
    log_u = scaled - log_total
    u = np.exp(log_u)
    return AlignmentGap(
        effective_sample_size=float((1.0 / (u**2).sum(1)).mean()),
        kl_from_reference=float((math.log(n) + (u * log_u).sum(1)).mean()),
        kl_to_reference=float((log_total[:, 0] - math.log(n) - scaled.mean(1)).mean()),
        samples=n,
    )


def recommend(gap: AlignmentGap, budget: int, *, batch_size: int = 64) -> Recommendation:
    """Set the switches for a gap and a budget, after the findings of the paper.

    Parameters
    ----------
    gap : from `alignment_gap`, on as many samples as can be had: 100 or more.
    budget : reward queries, at least `batch_size`.
    batch_size : queries between two updates of the policy that samples, at least 2.

    Examples
    --------
    >>> recommend(alignment_gap([0.0] * 99 + [1.0], beta=0.1), budget=2_000).on_policy
    True
    """
    check_integer("batch_size", batch_size, at_least=2)
    check_integer("budget", budget, at_least=batch_size)
    share, expected = gap.share, gap.share * budget
    far = share < _FAR
    reasons = [
        f"{share:.0%} of the reference's samples count under the optimal policy, "
        + (
            f"fewer than {_FAR:.0%}: fresh samples pay, since {budget} samples of the reference hold about "
            f"{expected:.0f} that count"
            if far
            else f"at least {_FAR:.0%}: the reference's own samples cover the best answers, and fresh ones add little"
        )
    ]
    if not far:
        steps = _STEPS_WANTED
        reasons.append(f"one batch of the whole budget, {steps} steps on it, watched on held-out prompts")
        loss, size = "dpo", budget
    else:
        rounds = budget // batch_size
        steps = min(_MOST_REUSE, max(1, math.ceil(_STEPS_WANTED / rounds)))
        reasons.append(
            f"{rounds} batches with {steps} steps each make {rounds * steps} steps: reuse saves queries, but more than "
            f"about {_MOST_REUSE} steps on a batch hurts all losses but PPO"
        )
        loss, size = "ppo" if steps == _MOST_REUSE else "dpo", batch_size
    reasons.append(f"{loss} pushes bad answers down, which helps most where the best answers are rare")
    return Recommendation(far, steps, size, loss, tuple(reasons))


def kl_gradients(
    logits: Float[Tensor, "*batch actions"], log_target: Float[Tensor, "*batch actions"]
) -> tuple[Float[Tensor, "*batch actions"], Float[Tensor, "*batch actions"]]:
    """Gradients of the two KL divergences between target q and policy p = softmax(logits), with respect to the logits.

        forward:  d KL(q || p) / dz_j = p_j - q_j
        reverse:  d KL(p || q) / dz_j = p_j (log(p_j / q_j) - KL(p || q))

    Likelihood losses follow the forward one: it lifts every underweighted action, by at most q_j - p_j. On-policy
    policy gradients, and contrastive losses in effect, follow the reverse one: it moves mass among actions that have
    some, in proportion to it, and commits to few of them (mode seeking). An action that the policy never takes it
    hardly sees.

    Parameters
    ----------
    logits : z; no gradient flows.
    log_target : log q, normalised, finite.

    Returns
    -------
    forward, reverse : each with entries that sum to 0.

    Raises
    ------
    ValueError : shapes differ, a number is not finite, or the target does not sum to 1.
    """
    if logits.shape != log_target.shape or not logits.ndim:
        raise ValueError(
            f"log_target must have the shape of logits {tuple(logits.shape)}, got {tuple(log_target.shape)}"
        )
    check_finite("logits", logits.detach())
    check_finite("log_target", log_target.detach())
    if (log_target.detach().logsumexp(-1).abs() > 1e-3).any():
        raise ValueError("log_target must be normalised: its exponentials must sum to 1")
    with torch.no_grad():
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        log_ratio = log_p - log_target
        divergence = (p * log_ratio).sum(-1, keepdim=True)
        return p - log_target.exp(), p * (log_ratio - divergence)
