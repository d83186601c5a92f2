"""How sharp a model is: how much of its mass lies on the best response known."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from workingpapers.alignment.prompts import Prompt, end_tokens, tokenize_prompts
from workingpapers.alignment.sharpening.policy import (
    Responses,
    SequencePolicy,
    as_policy,
)
from workingpapers.alignment.sharpening.selection import best_of_n_select, sharpen
from workingpapers.common.validation import check_number


@dataclass(frozen=True)
class Sharpness:
    """Of a model, measured on the candidates that its base likes best.

    Attributes
    ----------
    best : the candidate of highest base log-probability, for each prompt. It stands in for y*, and is y* if the
        candidates hold it: probabilities of rarer candidates make coverage an overestimate, and the other numbers
        refer to the candidate, not to y*.
    base_logps, logps : its log-probability under the base and under the model, in nats.
    sharpened_share : share of prompts on which the model gives it at least 1 - delta.
    greedy_share : share of prompts on which greedy decoding of the model returns it; NaN for a policy without `greedy`.
    """

    best: list[list[int]]
    base_logps: Float[np.ndarray, " prompts"]
    logps: Float[np.ndarray, " prompts"]
    sharpened_share: float
    greedy_share: float

    @property
    def mass(self) -> float:
        """Mean probability that the model gives the best candidate."""
        return float(np.exp(self.logps).mean())

    @property
    def log_coverage(self) -> float:
        """Logarithm of `coverage`, which does not overflow."""
        return log_mean_inverse(self.base_logps)

    @property
    def coverage(self) -> float:
        """Estimate of ``E_x[1 / pi_base(y*(x) | x)]``; inf where it would overflow, as it does for long answers."""
        return exp_or_inf(self.log_coverage)


def sharpness(
    model: nn.Module | SequencePolicy,
    base: nn.Module | SequencePolicy,
    prompts: Sequence[Prompt],
    candidates: Responses | None = None,
    *,
    delta: float = 0.5,
    n: int = 64,
    tokenizer: Any = None,
    max_new_tokens: int = 512,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Sharpness:
    """Measure how much of its mass a model puts on the response that its base likes best.

    Parameters
    ----------
    model, base : causal LMs or `SequencePolicy`; the base itself may be measured.
    prompts : text, conversations or token ids.
    candidates : responses to each prompt, token ids with their end token; `n` draws from the base when None.
    delta : the model is sharpened on a prompt when it gives the best candidate at least 1 - delta, in (0, 1). At one
        half and below, greedy decoding is sure to return y* where it is unique; above, it need not.
    n : draws from the base.
    tokenizer, max_new_tokens, batch_size, generator : as in `sharpen`.

    Raises
    ------
    ValueError : an argument is out of range, or a prompt has no complete candidate.
    """
    delta = check_number("delta", delta, above=0, below=1)
    ids = tokenize_prompts(prompts, tokenizer)
    trained, reference = (
        as_policy(one, max_new_tokens=max_new_tokens, batch_size=batch_size, eos_token_id=end_tokens(one, tokenizer))
        for one in (model, base)
    )
    if candidates is None:
        found = sharpen(
            base,
            ids,
            n,
            tokenizer=tokenizer,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            generator=generator,
        )
        lost = [row for row, response in enumerate(found.responses) if response is None]
        if lost:
            raise ValueError(f"max_new_tokens={max_new_tokens} cut off every draw for prompts {lost}")
        best = [response for response in found.responses if response is not None]
        base_logps = found.base_logps
    else:
        scores = reference.log_prob(ids, candidates).double().cpu().numpy()
        places = best_of_n_select(candidates, scores)
        best = [list(several[place]) for several, place in zip(candidates, places, strict=True)]
        base_logps = scores[np.arange(len(places)), places]
    logps = trained.log_prob(ids, [[response] for response in best])[:, 0].double().cpu().numpy()
    greedy = getattr(trained, "greedy", None)
    found_greedily = [] if greedy is None else [a == b for a, b in zip(greedy(ids), best, strict=True)]
    return Sharpness(
        best=best,
        base_logps=base_logps,
        logps=logps,
        sharpened_share=float((logps >= math.log1p(-delta)).mean()),
        greedy_share=math.nan if greedy is None else float(np.mean(found_greedily)),
    )


def log_mean_inverse(logps: Float[np.ndarray, " prompts"]) -> float:
    """log E[1 / p] from log p."""
    return float(np.logaddexp.reduce(-logps) - math.log(len(logps)))


def exp_or_inf(logarithm: float) -> float:
    """exp, or infinity where it is too large for a float."""
    return math.exp(logarithm) if logarithm < math.log(sys.float_info.max) else math.inf
