"""Rewards of tokens read out of a DPO policy, as functions of per-token log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workingpapers.alignment.ppo import _on_mask, kl_shaped_rewards
from workingpapers.common.validation import check_choice, check_finite, check_number

Granularity = Literal["token", "sentence", "last", "shaping"]


def token_rewards(
    dpo_logps: Float[Tensor, "batch length"],
    ref_logps: Float[Tensor, "batch length"],
    policy_logps: Float[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    sentence_reward: Float[Tensor, " batch"] | None = None,
    *,
    beta1: float = 0.05,
    beta2: float = 0.01,
    beta3: float = 1.0,
    clip: float | None = None,
    granularity: Granularity = "token",
    delimiters: Bool[Tensor, "batch length"] | None = None,
    dpo_ref_logps: Float[Tensor, "batch length"] | None = None,
) -> Float[Tensor, "batch length"]:
    """Rewards of the tokens of answers for any policy-gradient loop.

        r_h = beta1 log(pi_dpo / pi_ref) - beta2 log(pi / pi_ref), and beta3 r(x, y) more at the last token   (4.7)

    Log-ratios are scaled, then clipped, then put where `granularity` says, in float32 or better.

    Parameters
    ----------
    dpo_logps, ref_logps : of the tokens under the DPO policy and the reference, in nats.
    policy_logps : under the policy that drew the answers, taken when it drew them; no gradient flows through them.
    mask : True on response tokens; at least one in each row. The last one is where the answer ends, cut or not.
    sentence_reward : r(x, y), one per answer; needed when `beta3` is above 0.
    beta1 : weight of the DPO log-ratios, at least 0. Small enough that they do not dominate; 0 leaves the rewards of
        ordinary PPO.
    beta2 : price of a nat of divergence, at least 0.
    beta3 : weight of the sentence reward, at least 0.
    clip : scaled log-ratios are cut to [-clip, clip], at least 0; None or 0 leaves them. The authors' code uses 0.05.
    granularity : where the log-ratios go.

        - "token": each to its token (RTO);
        - "sentence": their sum over a sentence to its delimiter, what follows the last delimiter to the last token
          (Semi-RTO);
        - "last": their sum to the last token (DDPO);
        - "shaping": each to its token, and their sum is taken off the last token, so that the answer as a whole gets
          what ordinary PPO would give it (RS-PPO).
    delimiters : True on tokens that end a sentence, see `delimiter_mask`; needed for "sentence".
    dpo_ref_logps : under the reference that the DPO policy was trained from, where that is not `ref_logps`.

    Returns
    -------
    Rewards, 0 outside the mask.

    Raises
    ------
    ValueError : shapes differ, a row has no response token, a number is not finite or out of range, or
        `sentence_reward` or `delimiters` is missing.
    """
    beta1, beta2, beta3 = (
        check_number(name, value, at_least=0) for name, value in (("beta1", beta1), ("beta2", beta2), ("beta3", beta3))
    )
    check_choice("granularity", granularity, get_args(Granularity))
    clip = 0.0 if clip is None else check_number("clip", clip, at_least=0)
    given = {"dpo_logps": dpo_logps, "ref_logps": ref_logps, "policy_logps": policy_logps}
    given["dpo_ref_logps"] = ref_logps if dpo_ref_logps is None else dpo_ref_logps
    precise = torch.promote_types(dpo_logps.dtype, torch.float32)
    dpo_logps, ref_logps, policy_logps, dpo_ref_logps = (
        logps.detach().to(precise) for logps in _on_mask(mask, **given)
    )
    if sentence_reward is None:
        if beta3 > 0:
            raise ValueError("sentence_reward must be given when beta3 is above 0")
        sentence_reward = dpo_logps.new_zeros(len(mask))
    if sentence_reward.shape != mask.shape[:1]:
        raise ValueError(f"sentence_reward must have shape ({len(mask)},), got {tuple(sentence_reward.shape)}")
    check_finite("sentence_reward", sentence_reward)

    ratios = beta1 * (dpo_logps - dpo_ref_logps)
    if clip:
        ratios = ratios.clamp(-clip, clip)
    shaped = kl_shaped_rewards(beta3 * sentence_reward.to(ratios), policy_logps, ref_logps, mask, beta=beta2)
    if granularity == "token":
        return shaped + ratios
    places = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    last = torch.where(mask, places, -1).amax(1, keepdim=True)
    if granularity == "last":
        return shaped.scatter_add(1, last, ratios.sum(1, keepdim=True))
    if granularity == "shaping":
        return (shaped + ratios).scatter_add(1, last, -ratios.sum(1, keepdim=True))
    if delimiters is None:
        raise ValueError('delimiters must be given when granularity is "sentence"')
    if delimiters.shape != mask.shape or delimiters.dtype != torch.bool:
        raise ValueError(
            f"delimiters must be boolean {tuple(mask.shape)} like mask, got {delimiters.dtype} "
            f"{tuple(delimiters.shape)}"
        )
    ends = torch.where(delimiters & mask, places, last)  # what is no delimiter looks at the last token
    return shaped.scatter_add(1, ends.flip(1).cummin(1).values.flip(1), ratios)


def delimiter_mask(
    tokens: Int[Tensor, "batch length"], ids: Sequence[int] | Int[Tensor, " delimiters"]
) -> Bool[Tensor, "batch length"]:
    """Which tokens end a sentence.

    Parameters
    ----------
    tokens : token ids.
    ids : of the tokens that end one, at least one: full stop, exclamation and question mark, line break ..., in every
        form that the vocabulary has of them.
    """
    wanted = torch.as_tensor(ids, device=tokens.device)
    if not wanted.numel():
        raise ValueError("ids must name at least one token")
    return torch.isin(tokens, wanted)
