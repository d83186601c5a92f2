"""Exact best-of-n curves: what the best of n answers is worth, without drawing the n answers.

N answers to each prompt are scored by a proxy, which picks, and by a gold reward, which is to be maximised. The mean
gold score of the proxy's favourite over *all* C(N, n) subsets of n answers is a weighted sum of the gold scores in the
proxy's order. Every n up to N costs one sort and one short dot product for each prompt, and has no sampling noise
beyond that of the N answers. For n near N the subsets hardly differ, so the curve ends in the gold score of one answer
per prompt: draw several times as many answers as the largest n that matters, or average over many prompts.

References: Stiennon et al., "Learning to summarize from human feedback", NeurIPS 2020 (best-of-n and its KL); Nakano
et al., "WebGPT", 2021, appendix I (the estimator, which Coste et al., arXiv 2310.02743, use too).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from workingpapers.common.validation import check_finite, check_integer

_OMITTED_BITS = 64  # ranks whose weights add up to less than 2^-64 are left out


@dataclass(frozen=True)
class BestOfNCurve:
    """Expected scores of the answer that the proxy likes best among n, for increasing n.

    Attributes
    ----------
    n : answers to choose from.
    kl : log n - (n - 1) / n, in nats: the divergence of best-of-n from plain sampling. It is exact where no two answers
        tie, else an upper bound. The divergence that a policy optimiser reports is estimated in another way: the two
        do not belong on one axis without a word about it.
    proxy, gold : expected scores, averaged over prompts.
    proxy_se, gold_se : their standard errors over prompts; NaN when there is one prompt.
    proxy_by_prompt, gold_by_prompt : the curves of single prompts, for paired comparisons of two ways to pick.
    """

    n: Int[np.ndarray, " points"]
    kl: Float[np.ndarray, " points"]
    proxy: Float[np.ndarray, " points"]
    gold: Float[np.ndarray, " points"]
    proxy_se: Float[np.ndarray, " points"]
    gold_se: Float[np.ndarray, " points"]
    proxy_by_prompt: Float[np.ndarray, "prompts points"]
    gold_by_prompt: Float[np.ndarray, "prompts points"]


@dataclass(frozen=True)
class Overoptimization:
    """Where a best-of-n curve peaks, and what further optimisation costs.

    Attributes
    ----------
    peak_n, peak_kl : the place of the highest gold score.
    peak_gold, final_gold : the gold score there and at the largest n.
    drop : peak_gold - final_gold, at least 0. The peak is chosen on the same data, so noise alone makes a small drop.
    drop_se : standard error over prompts of that difference; NaN when there is one prompt.
    """

    peak_n: int
    peak_kl: float
    peak_gold: float
    final_gold: float
    drop: float
    drop_se: float


def best_of_n(
    proxy: Float[np.ndarray, "prompts answers"],
    gold: Float[np.ndarray, "prompts answers"],
    ns: Sequence[int] | Int[np.ndarray, " points"] | None = None,
) -> BestOfNCurve:
    """Expected proxy and gold score of the best of n answers, exactly, for every n asked for.

    With the answers of a prompt in the proxy's ascending order and S_i their gold scores,

        R_n = sum_{i=n}^{N} C(i-1, n-1) / C(N, n) S_i,

    the mean over all subsets of n answers (without replacement: unbiased). Answers that tie in the proxy share their
    mean gold score, as if each tie were broken by a fair die. Scores need not be sorted. Time is that of sorting;
    scratch memory is that of two copies of the scores, however many n are asked for.

    Parameters
    ----------
    proxy : scores that pick, for example `aggregate(member_scores, "wco")`; higher is better.
    gold : scores of the same answers at the same positions.
    ns : answers to choose from, each between 1 and the number of answers; given back in increasing order, each once.
        Powers of two up to all answers when None.

    Raises
    ------
    ValueError : scores are not finite matrices of one shape, or an n is out of range.
    TypeError : an n is not an integer.

    Examples
    --------
    >>> curve = best_of_n(np.array([[1.0, 2.0, 3.0]]), np.array([[0.0, 4.0, 1.0]]), ns=[1, 2, 3])
    >>> [round(float(score), 3) for score in curve.gold]
    [1.667, 2.0, 1.0]
    """
    proxy, gold = _as_matrix("proxy", proxy), _as_matrix("gold", gold)
    if proxy.shape != gold.shape:
        raise ValueError(f"proxy and gold must have one shape, got {proxy.shape} and {gold.shape}")
    prompts, answers = proxy.shape
    if ns is None:
        ns = [2**power for power in range(answers.bit_length())]
    n = np.unique([check_integer("ns", one, at_least=1, at_most=answers) for one in ns])
    if not n.size:
        raise ValueError("ns must name at least one n")

    order = np.argsort(proxy, axis=1)
    proxy, gold = np.take_along_axis(proxy, order, 1), np.take_along_axis(gold, order, 1)
    gold = _share_ties(proxy, gold)
    curves = np.empty((2, prompts, n.size))
    for point, count in enumerate(n):
        weights = _top_weights(answers, int(count))
        curves[0, :, point] = proxy[:, -weights.size :] @ weights
        curves[1, :, point] = gold[:, -weights.size :] @ weights
    means = curves.mean(1)
    errors = curves.std(1, ddof=1) / math.sqrt(prompts) if prompts > 1 else np.full_like(means, np.nan)
    return BestOfNCurve(n, np.log(n) - (n - 1) / n, *means, *errors, *curves)


def overoptimization(curve: BestOfNCurve) -> Overoptimization:
    """The peak of the gold score and the drop from there to the largest n."""
    peak = int(curve.gold.argmax())
    drops = curve.gold_by_prompt[:, peak] - curve.gold_by_prompt[:, -1]
    return Overoptimization(
        peak_n=int(curve.n[peak]),
        peak_kl=float(curve.kl[peak]),
        peak_gold=float(curve.gold[peak]),
        final_gold=float(curve.gold[-1]),
        drop=float(curve.gold[peak] - curve.gold[-1]),
        drop_se=float(drops.std(ddof=1)) / math.sqrt(len(drops)) if len(drops) > 1 else math.nan,
    )


def _top_weights(answers: int, n: int) -> Float[np.ndarray, " top"]:
    """C(i-1, n-1) / C(N, n) for the highest ranks i = ..., N - 1, N, where all the weight is.

    No binomial is formed, of which C(100,000, 1,000) has 2,429 digits: neighbouring weights have the ratio
    w_{i-1} / w_i = (i - n) / (i - 1), and the sum of its logarithms from the top down is most exact where weights are
    largest. The best of n has a rank of at most N - K with probability below (1 - K / N)^n, which bounds what is left
    out; so all n from 1 to N together take O(N log N) weights.
    """
    top = min(answers - n + 1, math.ceil(-answers * math.expm1(-_OMITTED_BITS * math.log(2) / n)))
    below = np.arange(answers - 1, answers - top, -1.0)  # i - 1 for i = N, N - 1, ...
    log_weights = np.concatenate([[0.0], np.cumsum(np.log1p(-(n - 1) / below))]) + math.log(n / answers)  # w_N = n/N
    return np.exp(log_weights)[::-1]


def _share_ties(
    proxy: Float[np.ndarray, "prompts answers"], gold: Float[np.ndarray, "prompts answers"]
) -> Float[np.ndarray, "prompts answers"]:
    """Gold scores, each replaced by its mean over the answers of the prompt with the same proxy score."""
    opens = np.ones(proxy.shape, dtype=bool)  # a new group of ties
    opens[:, 1:] = proxy[:, 1:] != proxy[:, :-1]
    if opens.all():
        return gold
    group = np.cumsum(opens.ravel()) - 1
    means = np.bincount(group, weights=gold.ravel()) / np.bincount(group)
    return np.asarray(means[group].reshape(gold.shape))


def _as_matrix(name: str, scores: Any) -> Float[np.ndarray, "prompts answers"]:
    """A float64 matrix of an array, a nested list or a torch tensor."""
    array = np.asarray(scores.detach().cpu() if hasattr(scores, "detach") else scores, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} must have shape (prompts, answers), neither empty, got {array.shape}")
    check_finite(name, array)
    return array
