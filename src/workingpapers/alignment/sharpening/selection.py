"""Sharpening at inference time: draw several responses, keep the one that the base itself likes best."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor, nn

from workingpapers.alignment.prompts import Prompt, end_tokens, tokenize_prompts
from workingpapers.alignment.sequences import TokenSequence
from workingpapers.alignment.sharpening.policy import (
    SequencePolicy,
    Tokens,
    as_policy,
)
from workingpapers.alignment.sharpening.rewards import Extract, Kind, RewardFunction, check_kind, self_reward
from workingpapers.common.validation import check_integer, check_number


class AdaptiveSampler:
    """When to stop drawing: once the best response seen is as likely as the number of draws requires.

    With mu = log(2 / delta), stop at the first k with ``1 / max_{j <= k} pi_base(y_j) <= k / mu``. Had the base a
    response y* of probability above that of the best one seen, then k >= mu / pi_base(y*) draws would have shown it
    with probability at least 1 - delta / 2. Easy prompts cost few draws, hard ones many, about mu / pi_base(y*).

    The rule belongs to the log-likelihood as self-reward, and to draws at temperature 1. For long answers, whose
    probabilities are far below ``mu / max_samples``, it never stops before the limit: use a fixed number there.

    Parameters
    ----------
    delta : probability of failure per prompt, in (0, 1).
    max_samples : draws after which it stops in any case, at least 1.

    Attributes
    ----------
    mu : log(2 / delta).
    """

    def __init__(self, delta: float = 0.05, max_samples: int = 256) -> None:
        self.delta = check_number("delta", delta, above=0, below=1)
        self.max_samples = check_integer("max_samples", max_samples, at_least=1)
        self.mu = math.log(2.0 / self.delta)

    def __repr__(self) -> str:
        return f"AdaptiveSampler(delta={self.delta:g}, max_samples={self.max_samples})"

    def should_stop(self, max_logp: ArrayLike, k: ArrayLike) -> Bool[np.ndarray, "*prompts"]:
        """Whether k draws are enough when the likeliest of them has log-probability `max_logp`; elementwise."""
        return np.asarray(self.is_met(max_logp, k) | (np.asarray(k) >= self.max_samples))

    def is_met(self, max_logp: ArrayLike, k: ArrayLike) -> Bool[np.ndarray, "*prompts"]:
        """Whether the rule itself is met, whatever `max_samples`; arguments as in `should_stop`."""
        best, draws = np.asarray(max_logp, dtype=np.float64), np.asarray(k)
        if (draws < 1).any():
            raise ValueError(f"k must be at least 1, got {draws.min()}")
        if np.isnan(best).any():
            raise ValueError("max_logp must not be NaN")
        # -max log pi <= log k - log mu: the probabilities themselves may underflow.
        return np.asarray(-best <= np.log(draws) - math.log(self.mu))

    def draws_needed(self, max_logp: ArrayLike) -> Int[np.ndarray, "*prompts"]:
        """Draws at which the rule stops if none better comes: ceil(mu / max pi), at most `max_samples`."""
        with np.errstate(over="ignore"):
            needed = self.mu * np.exp(-np.asarray(max_logp, dtype=np.float64))
        return np.ceil(np.minimum(needed, self.max_samples)).astype(np.int64)


@dataclass(frozen=True)
class Sharpened:
    """The best response to each prompt, and what was seen on the way; per prompt unless said otherwise.

    Attributes
    ----------
    prompts : token ids.
    responses : the best ones; None where every draw was cut off before its end, which leaves it without a probability.
    scores : their self-rewards; -inf where there is none.
    base_logps : their log-probabilities under the base, in nats.
    drawn : how many draws the choice is from.
    capped : whether the adaptive rule gave up at its limit; never for a fixed number.
    truncated : draws cut off before their end, which are never chosen.
    duplicates : complete draws equal to an earlier one.
    mean_loglik : mean of log pi_base over the complete draws; NaN where there is none.
    max_loglik : the largest log pi_base among the complete draws; -inf where there is none.
    mean_length : tokens per draw.
    """

    prompts: list[list[int]]
    responses: list[list[int] | None]
    scores: Float[np.ndarray, " prompts"]
    base_logps: Float[np.ndarray, " prompts"]
    drawn: Int[np.ndarray, " prompts"]
    capped: Bool[np.ndarray, " prompts"]
    truncated: Int[np.ndarray, " prompts"]
    duplicates: Int[np.ndarray, " prompts"]
    mean_loglik: Float[np.ndarray, " prompts"]
    max_loglik: Float[np.ndarray, " prompts"]
    mean_length: Float[np.ndarray, " prompts"]

    def sequences(self) -> list[TokenSequence]:
        """The prompts that have a response, with it: what SFT-Sharpening trains on."""
        return [
            TokenSequence(prompt, response)
            for prompt, response in zip(self.prompts, self.responses, strict=True)
            if response is not None
        ]


def best_of_n_select(samples: Sequence[Sequence[Any]], scores: ArrayLike | Tensor) -> Int[np.ndarray, " prompts"]:
    """Place of the best of several samples, for each prompt; the first drawn where scores tie.

    Parameters
    ----------
    samples : for each prompt, in the order drawn; the numbers may differ.
    scores : higher is better, shape (prompts, n) with n the largest number of samples. -inf marks samples that must
        not be chosen, and fills rows with fewer samples; NaN is refused.

    Raises
    ------
    ValueError : shapes do not fit, a score is NaN or +inf, or a prompt has no sample that may be chosen.
    """
    values = np.asarray(scores.detach().cpu().numpy() if isinstance(scores, Tensor) else scores, dtype=np.float64)
    counts = np.array([len(several) for several in samples])
    if not counts.size or values.shape != (counts.size, counts.max()):
        wanted = (counts.size, int(counts.max(initial=0)))
        raise ValueError(f"scores must have shape (prompts, n), not empty, here {wanted}, got {values.shape}")
    if np.isnan(values).any() or (values == np.inf).any():
        raise ValueError("scores must be numbers or -inf, got NaN or infinity")
    values = np.where(np.arange(values.shape[1]) < counts[:, None], values, -np.inf)
    lost = np.flatnonzero(np.isneginf(values).all(1))
    if lost.size:
        raise ValueError(f"every prompt needs a sample with a score above -inf; prompts {lost.tolist()} have none")
    return np.asarray(values.argmax(1))


def sharpen(
    model: nn.Module | SequencePolicy,
    prompts: Sequence[Prompt],
    n: int | AdaptiveSampler = 50,
    *,
    reward: Kind | RewardFunction = "loglik",
    extract: Extract | None = None,
    tokenizer: Any = None,
    max_new_tokens: int = 512,
    min_new_tokens: int = 0,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Sharpened:
    """Answer each prompt with the best of n draws from the base, by the base's own judgement.

    Responses that are cut off at `max_new_tokens` have no sequence probability and are never chosen.

    Parameters
    ----------
    model : the base: a causal LM, drawn from at temperature 1, or a `SequencePolicy`, to which the arguments after
        `tokenizer` do not apply.
    prompts : text, conversations or token ids; see `tokenize_prompts`.
    n : draws, at least 1, or a rule that says when there are enough. What is drawn does not depend on how the rule's
        draws are batched: it is applied draw by draw.
    reward, extract : as in `self_reward`.
    tokenizer : of the model; may be None when prompts are token ids.
    max_new_tokens : tokens a response may have, its end token included.
    min_new_tokens : tokens it has at least.
    batch_size : responses in one forward pass.
    generator : of the draws.

    Raises
    ------
    ValueError : an argument is out of range, or the policy draws without log-probabilities.

    Warns
    -----
    RuntimeWarning : the adaptive rule gave up at its limit on some prompts.

    Examples
    --------
    >>> best = sharpen(model, ["2 + 2 ="], n=25, tokenizer=tokenizer, max_new_tokens=8)  # doctest: +SKIP
    >>> tokenizer.decode(best.responses[0])  # doctest: +SKIP
    """
    check_kind(reward, extract)
    if isinstance(n, AdaptiveSampler) and reward != "loglik":
        raise ValueError(f"n must be a number for reward={reward!r}: the adaptive rule compares log-likelihoods")
    policy = as_policy(
        model,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        eos_token_id=end_tokens(model, tokenizer),
        batch_size=batch_size,
        generator=generator,
    )
    ids = tokenize_prompts(prompts, tokenizer)
    if not isinstance(n, AdaptiveSampler):
        return choose_best(ids, draw_responses(policy, ids, n), reward, extract)
    best = choose_best(ids, _draw_adaptively(policy, ids, n), reward, extract)
    best = replace(best, capped=~n.is_met(best.max_loglik, best.drawn))
    if best.capped.any():
        warnings.warn(
            f"{best.capped.sum()} of {len(ids)} prompts reached max_samples={n.max_samples} before the adaptive rule "
            f"was met",
            RuntimeWarning,
            stacklevel=2,
        )
    return best


class Draw(NamedTuple):
    """A response and its log-probability, which is -inf when the response was cut off before its end."""

    response: list[int]
    logp: float

    @property
    def complete(self) -> bool:
        return self.logp > -math.inf


def draw_responses(policy: SequencePolicy, prompts: Sequence[Tokens], n: int) -> list[list[Draw]]:
    """n draws to each prompt.

    Raises
    ------
    ValueError : n is below 1, or the policy does not do what `SequencePolicy` says.
    """
    batch = policy.sample(prompts, check_integer("n", n, at_least=1))
    if batch.logprobs is None or batch.finished is None:
        raise ValueError("the policy must sample with logprobs and finished, got None")
    if len(batch) != n * len(prompts):
        raise ValueError(f"the policy must draw n={n} responses to each prompt, got {len(batch)} to {len(prompts)}")
    logps = batch.logprobs.double().sum(-1).masked_fill(~batch.finished, -torch.inf).tolist()
    draws = [Draw(*pair) for pair in zip(batch.responses(), logps, strict=True)]
    return [draws[start : start + n] for start in range(0, len(draws), n)]


def _draw_adaptively(policy: SequencePolicy, prompts: Sequence[Tokens], rule: AdaptiveSampler) -> list[list[Draw]]:
    """Draws of each prompt up to its stop. They come in rounds that at most double what a prompt has."""
    draws: list[list[Draw]] = [[] for _ in prompts]
    fewest = math.ceil(min(rule.mu, rule.max_samples))  # 1 / pi >= 1, so fewer are never enough
    wanted = dict.fromkeys(range(len(prompts)), fewest)
    while wanted:
        asked = [row for row, count in wanted.items() for _ in range(count)]
        for row, draw in zip(asked, draw_responses(policy, [prompts[row] for row in asked], 1), strict=True):
            draws[row] += draw
        for row in list(wanted):
            best = np.maximum.accumulate([draw.logp for draw in draws[row]])
            enough = rule.should_stop(best, np.arange(1, len(best) + 1))
            if enough.any():  # the rule looks at one draw after the other: what came after the stop does not count
                del draws[row][int(enough.argmax()) + 1 :], wanted[row]
            else:
                wanted[row] = min(len(best), max(1, int(rule.draws_needed(best[-1])) - len(best)))
    return draws


def choose_best(
    prompts: list[list[int]], draws: Sequence[Sequence[Draw]], reward: Kind | RewardFunction, extract: Extract | None
) -> Sharpened:
    """The best draw of each prompt by self-reward, and what was seen on the way; see `sharpen`."""
    complete = [[draw for draw in several if draw.complete] for several in draws]
    kept = [row for row, several in enumerate(complete) if several]
    width = max(map(len, complete))
    logps = torch.full((len(prompts), width), -torch.inf, dtype=torch.float64)
    for row in kept:
        logps[row, : len(complete[row])] = torch.tensor([draw.logp for draw in complete[row]], dtype=torch.float64)
    responses: list[list[int] | None] = [None] * len(prompts)
    scores, chosen = np.full(len(prompts), -np.inf), np.full(len(prompts), -np.inf)
    if kept:
        candidates = [[draw.response for draw in complete[row]] for row in kept]
        found = self_reward(None, [prompts[row] for row in kept], candidates, reward, extract, base_logps=logps[kept])
        for row, score, place in zip(kept, found.tolist(), best_of_n_select(candidates, found), strict=True):
            responses[row], chosen[row] = complete[row][place]
            scores[row] = score[place]
    counts = np.array([len(several) for several in complete])
    total = logps.masked_fill(logps.isneginf(), 0.0).sum(1).numpy()
    return Sharpened(
        prompts=prompts,
        responses=responses,
        scores=scores,
        base_logps=chosen,
        drawn=np.array([len(several) for several in draws]),
        capped=np.zeros(len(prompts), dtype=bool),
        truncated=np.array([len(several) for several in draws]) - counts,
        duplicates=np.array([len(several) - len({tuple(draw.response) for draw in several}) for several in complete]),
        mean_loglik=np.divide(total, counts, out=np.full(len(prompts), np.nan), where=counts > 0),
        max_loglik=logps.amax(1).numpy() if width else np.full(len(prompts), -np.inf),
        mean_length=np.array([np.mean([len(draw.response) for draw in several]) for several in draws]),
    )
