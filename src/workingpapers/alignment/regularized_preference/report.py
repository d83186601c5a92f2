"""The numbers that show overoptimization while it happens, which the preference loss does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from workingpapers.alignment.logprobs import frozen, reference_of
from workingpapers.alignment.preferences import TokenPair, as_token_pairs, collate_preferences, pair_logprobs
from workingpapers.alignment.regularized_preference.minimax import checked_pairs, log_probs
from workingpapers.common.validation import check_integer


@dataclass(frozen=True)
class OveroptimizationReport:
    """How far a policy moved on its preference data; log-probabilities in nats, means over the pairs.

    A preference loss that improves while `chosen_change` is well below 0 is the signature of overoptimization: the
    mass has gone to answers that no pair covers.

    Attributes
    ----------
    chosen_logprob, rejected_logprob : under the policy.
    chosen_change, rejected_change : policy minus reference.
    accuracy : share of pairs whose chosen answer gained more than the rejected one, in [0, 1].
    margin : mean of chosen minus rejected change; beta times this is the implicit reward margin.
    uncovered_mass, reference_uncovered_mass : probability of actions that no pair of their prompt contains, averaged
        over the pairs' prompts; None for language models, whose answers cannot be enumerated.
    """

    chosen_logprob: float
    rejected_logprob: float
    chosen_change: float
    rejected_change: float
    accuracy: float
    margin: float
    uncovered_mass: float | None
    reference_uncovered_mass: float | None


def overoptimization_report(
    policy: nn.Module | Float[np.ndarray, "prompts actions"],
    ref: nn.Module | Float[np.ndarray, "prompts actions"] | None,
    dataset: Iterable[Mapping[str, Any]] | Sequence[TokenPair] | Int[np.ndarray, "n 3"],
    *,
    tokenizer: Any = None,
    max_length: int = 1024,
    max_prompt_length: int = 512,
    batch_size: int = 8,
) -> OveroptimizationReport:
    """Compare a policy with its reference on preference pairs.

    Parameters
    ----------
    policy : a transformers causal LM, with or without peft; or probabilities of finitely many actions, shape (X, A).
    ref : the same of the reference; None for the policy with its peft adapters off.
    dataset : for models, rows with prompt, chosen and rejected or token pairs; for probabilities, rows of prompt,
        chosen and rejected action, shape (n, 3).
    tokenizer : needed where the rows are text.
    max_length, max_prompt_length : where longer text is cut, as in `tokenize_preferences`.
    batch_size : pairs scored at a time.

    Raises
    ------
    ValueError : shapes do not fit, or probabilities that the pairs need are 0.
    TypeError : one of `policy` and `ref` is a model and the other an array.
    """
    if isinstance(policy, nn.Module) and (ref is None or isinstance(ref, nn.Module)):
        pairs = as_token_pairs(dataset, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)
        batch_size = check_integer("batch_size", batch_size, at_least=1)
        with frozen(policy) as scorer:
            logprobs = _model_logprobs(scorer, pairs, batch_size)
        with reference_of(policy, ref) as scorer:
            ref_logprobs = _model_logprobs(scorer, pairs, batch_size)
        return _summary(logprobs, ref_logprobs, None, None)
    if isinstance(policy, nn.Module) or isinstance(ref, nn.Module) or ref is None:
        raise TypeError(
            f"policy and ref must both be models or both be arrays, got {type(policy).__name__}, {type(ref).__name__}"
        )
    log_policy, log_ref = log_probs("policy", policy), log_probs("ref", ref)
    if log_policy.shape != log_ref.shape:
        raise ValueError(f"ref must have the shape of policy {log_policy.shape}, got {log_ref.shape}")
    actions = checked_pairs("dataset", np.asarray(dataset), log_policy.shape)
    prompt, chosen, rejected = actions.T
    covered = np.zeros(log_policy.shape, dtype=bool)
    covered[prompt, chosen] = covered[prompt, rejected] = True
    return _summary(
        np.stack([log_policy[prompt, chosen], log_policy[prompt, rejected]]),
        np.stack([log_ref[prompt, chosen], log_ref[prompt, rejected]]),
        float(np.where(covered, 0.0, np.exp(log_policy)).sum(axis=1)[prompt].mean()),
        float(np.where(covered, 0.0, np.exp(log_ref)).sum(axis=1)[prompt].mean()),
    )


def _model_logprobs(model: nn.Module, pairs: Sequence[TokenPair], batch_size: int) -> Float[np.ndarray, "2 n"]:
    device = next(model.parameters()).device
    scored = [
        torch.stack(pair_logprobs(model, collate_preferences(pairs[start : start + batch_size]).to(device)))
        for start in range(0, len(pairs), batch_size)
    ]
    return torch.cat(scored, dim=1).double().cpu().numpy()


def _summary(
    logprobs: Float[np.ndarray, "2 n"],
    ref_logprobs: Float[np.ndarray, "2 n"],
    uncovered_mass: float | None,
    reference_uncovered_mass: float | None,
) -> OveroptimizationReport:
    if not (np.isfinite(logprobs).all() and np.isfinite(ref_logprobs).all()):
        raise ValueError("policy and ref must give every answer of dataset a probability above 0")
    chosen, rejected = logprobs
    chosen_change, rejected_change = logprobs - ref_logprobs
    return OveroptimizationReport(
        chosen_logprob=float(chosen.mean()),
        rejected_logprob=float(rejected.mean()),
        chosen_change=float(chosen_change.mean()),
        rejected_change=float(rejected_change.mean()),
        accuracy=float((chosen_change > rejected_change).mean()),
        margin=float((chosen_change - rejected_change).mean()),
        uncovered_mass=uncovered_mass,
        reference_uncovered_mass=reference_uncovered_mass,
    )
