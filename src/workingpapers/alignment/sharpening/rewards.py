"""Self-rewards: how good a response is in the eyes of the model that could have drawn it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from workingpapers.alignment.sharpening.policy import Responses, Tokens, as_policy
from workingpapers.common.validation import check_choice

Kind = Literal["loglik", "normalized", "majority"]
RewardFunction = Callable[[Sequence[Tokens], Responses], Float[Tensor, "prompts n"]]
Extract = Callable[[Tokens], Hashable | None]


def self_reward(
    model: Any,
    prompts: Sequence[Tokens],
    responses: Responses,
    kind: Kind | RewardFunction = "loglik",
    extract: Extract | None = None,
    *,
    base_logps: Float[Tensor, "prompts n"] | None = None,
    batch_size: int = 256,
) -> Float[Tensor, "prompts n"]:
    """Score several responses to each prompt with nothing but the base model.

    Parameters
    ----------
    model : the base: a causal LM or an object with `log_prob`. Not asked for "majority", nor where `base_logps` are
        given; may then be None.
    prompts : token ids.
    responses : to each prompt, token ids with their end token; the numbers may differ.
    kind : "loglik", log pi_base(y|x); "normalized", the same per token, where log-likelihood favours short answers;
        "majority", the share of the prompt's responses that `extract` the same answer; or a function of prompts and
        responses.
    extract : from a response to its answer, hashable, or None where it has none, which scores 0; for "majority".
    base_logps : log-probabilities in hand, from sampling.
    batch_size : responses in one forward pass.

    Returns
    -------
    Higher is better; -inf where a prompt has fewer responses than another.

    Raises
    ------
    ValueError : an argument is missing or unknown, a response is empty, or shapes do not fit.
    """
    check_kind(kind, extract)
    if len(prompts) != len(responses) or not len(prompts):
        raise ValueError(
            f"responses must hold one list for each of at least one prompt, got {len(responses)} for {len(prompts)}"
        )
    lengths = [[len(response) for response in several] for several in responses]
    width = max(map(len, lengths))
    if not width or not all(map(all, lengths)):
        raise ValueError("responses must not be empty")
    present = torch.tensor([[True] * len(several) + [False] * (width - len(several)) for several in lengths])
    if callable(kind):
        found = kind(prompts, responses)
    elif kind == "majority":
        assert extract is not None
        found = torch.tensor([_agreement(several, extract) + [0.0] * (width - len(several)) for several in responses])
    else:
        if base_logps is None:
            base_logps = as_policy(model, max_new_tokens=1, batch_size=batch_size).log_prob(prompts, responses)
        found = base_logps
    if found.shape != present.shape:
        source = "the rewards of kind" if callable(kind) else "base_logps"
        raise ValueError(f"{source} must have shape {tuple(present.shape)}, got {tuple(found.shape)}")
    if kind == "normalized":
        tokens = [several + [1] * (width - len(several)) for several in lengths]
        found = found / torch.tensor(tokens, device=found.device)
    return found.masked_fill(~present.to(found.device), -torch.inf)


def check_kind(kind: Any, extract: Extract | None) -> None:
    """Refuse an unknown reward, or "majority" without a way to read the answers."""
    if not callable(kind):
        check_choice("kind", kind, get_args(Kind))
    if kind == "majority" and extract is None:
        raise ValueError("extract must be given for kind='majority': a function from a response to its answer")


def _agreement(responses: Sequence[Tokens], extract: Extract) -> list[float]:
    """For each response, the share of all that give its answer."""
    answers = [extract(response) for response in responses]
    counts = Counter(answers)
    return [0.0 if answer is None else counts[answer] / len(answers) for answer in answers]
