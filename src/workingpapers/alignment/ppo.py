"""Proximal policy optimisation of language models, as functions of per-token tensors.

The arithmetic between a rollout and an optimiser step: rewards shaped by the divergence from a reference, advantages,
and the clipped losses of policy and value function. Log-probabilities come from `token_logprobs`, scores from any
reward, values from `RewardModel.token_values`; all are (batch, length) with a mask of the response tokens, which may
stand anywhere in a row, with gaps (several turns) and padding on either side. `PPOTrainer` is the loop around them.

References: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", 2016;
Schulman et al., "Proximal Policy Optimization Algorithms", 2017; Ziegler et al., "Fine-Tuning Language Models from
Human Preferences", 2019 (rewards of tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workingpapers.common.validation import check_choice, check_number

Average = Literal["tokens", "sequences"]


@dataclass(frozen=True)
class PPOOutput:
    """What `ppo_losses` returns; only `loss` carries a gradient.

    Attributes
    ----------
    loss : policy_loss + value_weight * value_loss.
    policy_loss, value_loss : means over response tokens, as all that follow.
    clip_fraction : share of response tokens at which the policy's gradient is cut off.
    approx_kl : (log ratio)^2 / 2, in nats: how far this policy has moved from the one that made the rollout.
    """

    loss: Float[Tensor, ""]
    policy_loss: Float[Tensor, ""]
    value_loss: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]
    approx_kl: Float[Tensor, ""]


def kl_shaped_rewards(
    scores: Float[Tensor, " batch"],
    logprobs: Float[Tensor, "batch length"],
    ref_logprobs: Float[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    *,
    beta: float,
) -> Float[Tensor, "batch length"]:
    """Rewards of tokens: -beta (log pi - log pi_ref) each, and the answer's score at its last token.

    Parameters
    ----------
    scores : of whole answers.
    logprobs, ref_logprobs : of the tokens under policy and reference, in nats.
    mask : True on response tokens; at least one in each row.
    beta : price of a nat, at least 0.
    """
    beta = check_number("beta", beta, at_least=0)
    logprobs, ref_logprobs = _on_mask(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores must have one entry for each of {len(mask)} answers, got {tuple(scores.shape)}")
    rewards = -beta * (logprobs - ref_logprobs)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(
    rewards: Float[Tensor, "batch length"],
    values: Float[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, "batch length"], Float[Tensor, "batch length"]]:
    """Generalised advantage estimates, and the returns that the value function is fitted to.

        A_t = sum_{l >= 0} (gamma lam)^l delta_{t+l},   delta_t = r_t + gamma V_{t+1} - V_t

    over the response tokens of a row, whose last one ends the episode. One product with a triangular matrix of size
    length^2 computes all of them.

    Parameters
    ----------
    rewards : r_t, of taking token t.
    values : V_t, of the prefix before token t; no gradient flows through them.
    mask : True on response tokens; at least one in each row.
    gamma, lam : in [0, 1]. lam = 1 gives discounted returns less values, 0 the one-step errors delta.

    Returns
    -------
    advantages : 0 outside the mask.
    returns : advantages + values, 0 outside the mask.
    """
    gamma = check_number("gamma", gamma, at_least=0, at_most=1)
    lam = check_number("lam", lam, at_least=0, at_most=1)
    rewards, values = _on_mask(mask, rewards=rewards.detach(), values=values.detach())
    order = (~mask).int().argsort(dim=1, stable=True)  # response tokens first, in their order
    inside = mask.gather(1, order)
    reward, value = rewards.gather(1, order), values.gather(1, order)
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], dim=1)
    delta = reward + gamma * following - value
    places = torch.arange(mask.shape[1], device=mask.device)
    lags = places[:, None] - places  # of the row's delta behind the column's advantage
    decay = torch.full_like(delta[:1], gamma * lam) ** lags.clamp(min=0)
    advantages = delta @ decay.tril()
    return tuple(  # type: ignore[return-value]
        torch.zeros_like(delta).scatter(1, order, found.masked_fill(~inside, 0.0))
        for found in (advantages, advantages + value)
    )


def whiten(values: Float[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]) -> Float[Tensor, "batch length"]:
    """Shift and scale the masked entries to mean 0 and variance 1 over the batch; 0 elsewhere."""
    (values,) = _on_mask(mask, values=values)
    mean = _masked_mean(values, mask)
    variance = _masked_mean((values - mean) ** 2, mask)
    return ((values - mean) * torch.rsqrt(variance + 1e-8)).masked_fill(~mask, 0.0)


def ppo_losses(
    logprobs: Float[Tensor, "batch length"],
    values: Float[Tensor, "batch length"],
    *,
    old_logprobs: Float[Tensor, "batch length"],
    old_values: Float[Tensor, "batch length"],
    advantages: Float[Tensor, "batch length"],
    returns: Float[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    clip: float = 0.2,
    value_clip: float | None = 0.2,
    value_weight: float = 0.1,
    average: Average = "tokens",
) -> PPOOutput:
    """The clipped losses of one mini-batch, `clipped_policy_losses` and `clipped_value_losses` averaged.

    Parameters
    ----------
    logprobs, values : of the current policy and value function, with gradients.
    old_logprobs, old_values : of those that made the rollout.
    advantages, returns : from `gae`; advantages are usually passed through `whiten`.
    mask : True on response tokens; at least one in each row.
    clip, value_clip : above 0; without a `value_clip` values are fitted by least squares.
    value_weight : at least 0.
    average : "tokens" gives every token of the batch one weight, "sequences" every answer, shared by its tokens.
    """
    value_weight = check_number("value_weight", value_weight, at_least=0)
    check_choice("average", average, ("tokens", "sequences"))
    losses, cut_off, log_ratio = clipped_policy_losses(
        logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask, clip=clip
    )
    value_losses = clipped_value_losses(
        values, old_values=old_values, returns=returns, mask=mask, value_clip=value_clip
    )
    lengths = mask.sum(1, keepdim=True)
    weights = 1.0 / (lengths * len(mask) if average == "sequences" else lengths.sum())
    policy_loss, value_loss, clip_fraction, approx_kl = (
        (weights * part).sum() for part in (losses, value_losses, cut_off, 0.5 * log_ratio.detach() ** 2)
    )
    loss = policy_loss + value_weight * value_loss
    return PPOOutput(loss, policy_loss.detach(), value_loss.detach(), clip_fraction, approx_kl)


def clipped_policy_losses(
    logprobs: Float[Tensor, "batch length"],
    *,
    old_logprobs: Float[Tensor, "batch length"],
    advantages: Float[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    clip: float = 0.2,
) -> tuple[Float[Tensor, "batch length"], Bool[Tensor, "batch length"], Float[Tensor, "batch length"]]:
    """PPO's loss of every token.

        max(-A rho, -A clip(rho, 1 - clip, 1 + clip)),  rho = pi / pi_old

    Parameters as in `ppo_losses`.

    Returns
    -------
    losses, whether the gradient is cut off, log rho : 0 or False outside the mask.
    """
    clip = check_number("clip", clip, above=0)
    logprobs, old_logprobs, advantages = _on_mask(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    log_ratio = logprobs - old_logprobs.detach()
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), clipped > plain, log_ratio


def clipped_value_losses(
    values: Float[Tensor, "batch length"],
    *,
    old_values: Float[Tensor, "batch length"],
    returns: Float[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    value_clip: float | None = 0.2,
) -> Float[Tensor, "batch length"]:
    """The loss of every prefix's value, 0 outside the mask.

        max((V - R)^2, (V_old + clip(V - V_old, -value_clip, value_clip) - R)^2) / 2

    Parameters as in `ppo_losses`.
    """
    if value_clip is not None:
        value_clip = check_number("value_clip", value_clip, above=0)
    values, old_values, returns = _on_mask(mask, values=values, old_values=old_values, returns=returns)
    losses = (values - returns) ** 2
    if value_clip is not None:
        near = old_values + (values - old_values).clamp(-value_clip, value_clip)
        losses = torch.maximum(losses, (near - returns) ** 2)
    return 0.5 * losses


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0.0).sum() / mask.sum()


def _on_mask(mask: Tensor, **tensors: Tensor) -> list[Tensor]:
    """The tensors, checked, with zeros outside the mask."""
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"mask must be boolean (batch, length), got {mask.dtype} {tuple(mask.shape)}")
    if not mask.any(1).all():
        raise ValueError("mask must mark at least one token of each row")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} must have the shape of mask {tuple(mask.shape)}, got {tuple(tensor.shape)}")
        if not tensor[mask].isfinite().all():
            raise ValueError(f"{name} must be finite on the mask")
    return [tensor.masked_fill(~mask, 0.0) for tensor in tensors.values()]
