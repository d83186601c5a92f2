"""Preference records of synthetic users, with controls of diversity and structure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from workingpapers.alignment.fewshot_preference.personas.gauges import response_similarity
from workingpapers.common.validation import check_integer, check_number

Prompt = TypeVar("Prompt", bound=Hashable)  # strings, or token ids as tuples
Answer = TypeVar("Answer", bound=Hashable)


@dataclass(frozen=True)
class SyntheticPreferences:
    """What `synthesize` made, and what it threw away.

    Attributes
    ----------
    records : dicts with prompt, chosen, rejected, user, persona and rejected_persona, as `EpisodeSampler` takes them.
    judged : comparisons that were put to the judge.
    flipped : comparisons dropped because the judge changed its mind with the order of the responses.
    undecided : comparisons dropped because the judge could not tell.
    too_similar : responses dropped because they resembled an earlier one to the same prompt.
    similarity : `response_similarity` of what was kept, averaged over prompts; None without `embed`.
    """

    records: list[dict[str, Any]]
    judged: int
    flipped: int
    undecided: int
    too_similar: int
    similarity: float | None


def synthesize(
    prompts: Sequence[Prompt],
    users: Mapping[Hashable, str],
    writers: Sequence[Callable[[Prompt, str], Answer]],
    judge: Callable[[str, Prompt, Answer, Answer], int | None],
    *,
    viewpoints: Sequence[str] | None = None,
    responses_per_prompt: int = 4,
    pairs_per_prompt: int = 1,
    embed: Callable[[Sequence[Answer]], ArrayLike] | None = None,
    max_similarity: float = 1.0,
    swap: bool = True,
    random_state: int = 0,
) -> SyntheticPreferences:
    """Let synthetic users compare synthetic responses.

    Every prompt gets responses that differ on purpose: each is conditioned on another viewpoint, drawn without
    replacement while they last, and the writers take turns. Every user is then shown random pairs of the responses to
    each prompt, and the judge says what somebody of that description prefers, in both orders: a label that changes
    with the order says more about the judge than about the user, and the pair is dropped.

    Parameters
    ----------
    prompts : at least one.
    users : the description of each user.
    writers : models that map (prompt, viewpoint) to a response; an ensemble sampled at high temperature differs more
        than any one of them. Two calls may give two responses: sample with generators of your own.
    judge : maps (description, prompt, first, second) to 0, 1 or None as the user prefers the first, the second or it
        cannot be told. See `judge_prompt` for what to ask a language model.
    viewpoints : what responses are conditioned on; the users' own descriptions when None. With the latter, records
        know for whom the rejected response was written (rejected_persona).
    responses_per_prompt : at least 2.
    pairs_per_prompt : comparisons each user makes per prompt, at most those there are.
    embed : a sentence encoder, responses to (responses, dimension); needed for `max_similarity` below 1 and for the
        gauge in the result.
    max_similarity : responses whose cosine similarity to an earlier one of the prompt is above this are dropped, in
        (0, 1].
    swap : ask in both orders. False halves the calls, and keeps a judge's preference for the first place.
    random_state : decides viewpoints and pairs.

    Raises
    ------
    ValueError : an argument is empty or out of range, or the judge returns something else.
    """
    if not len(prompts) or not users or not writers:
        raise ValueError("prompts, users and writers must each hold at least one")
    if viewpoints is not None and not len(viewpoints):
        raise ValueError("viewpoints must be None or hold at least one")
    check_integer("responses_per_prompt", responses_per_prompt, at_least=2)
    check_integer("pairs_per_prompt", pairs_per_prompt, at_least=1)
    check_number("max_similarity", max_similarity, above=0, at_most=1)
    if max_similarity < 1 and embed is None:
        raise ValueError(f"max_similarity={max_similarity!r} needs embed")
    rng = np.random.default_rng(check_integer("random_state", random_state, at_least=0))
    personal = viewpoints is None
    conditions = list(dict.fromkeys(users.values())) if viewpoints is None else list(viewpoints)

    records: list[dict[str, Any]] = []
    similarities: list[float] = []
    judged = flipped = undecided = too_similar = 0
    for number, prompt in enumerate(prompts):
        rounds = -(-responses_per_prompt // len(conditions))
        order = np.concatenate([rng.permutation(len(conditions)) for _ in range(rounds)])[:responses_per_prompt]
        written: dict[Answer, str] = {}  # response -> what it was conditioned on
        for turn, place in enumerate(order):
            writer = writers[(number * responses_per_prompt + turn) % len(writers)]
            written.setdefault(writer(prompt, conditions[place]), conditions[place])
        responses = list(written)
        too_similar += responses_per_prompt - len(responses)  # the very same response
        if embed is not None:
            vectors = np.asarray(embed(responses), dtype=float)
            kept = _distinct(vectors, max_similarity)
            too_similar += len(responses) - len(kept)
            responses, vectors = [responses[place] for place in kept], vectors[kept]
            if len(responses) > 1:
                similarities.append(response_similarity(vectors))
        candidates = list(combinations(responses, 2))
        for user, description in users.items():
            for place in rng.permutation(len(candidates))[:pairs_per_prompt]:
                first, second = candidates[place] if rng.random() < 0.5 else candidates[place][::-1]
                judged += 1
                label = _label(judge, description, prompt, first, second)
                back = _label(judge, description, prompt, second, first) if swap and label is not None else None
                if label is None or (swap and back is None):
                    undecided += 1
                elif swap and back == label:  # the same place, so another response
                    flipped += 1
                else:
                    chosen, rejected = (second, first) if label else (first, second)
                    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "user": user}
                    described = {"persona": description}
                    if personal and written[rejected] != description:
                        described["rejected_persona"] = written[rejected]
                    records.append(record | described)
    similarity = float(np.mean(similarities)) if similarities else None
    return SyntheticPreferences(records, judged, flipped, undecided, too_similar, similarity)


def judge_prompt(description: str, prompt: str, first: str, second: str) -> str:
    """What to ask a language model that is to judge in a user's place.

    It is told to ignore length, which judges otherwise reward, and may say that it cannot tell; read its last line.

    Parameters
    ----------
    description : of the user.
    prompt : what the user asked.
    first, second : the responses; ask a second time with the two exchanged.
    """
    return (
        f"A person is described as follows.\n{description}\n\n"
        f"They asked:\n{prompt}\n\nResponse A:\n{first}\n\nResponse B:\n{second}\n\n"
        "Which response would this person prefer? Judge by the description alone. The length of a response must not "
        "count, nor which one comes first, nor your own taste. If the description does not decide, say so.\n"
        "End with one line: A, B or UNDECIDED."
    )


def _label(
    judge: Callable[[str, Prompt, Answer, Answer], int | None],
    description: str,
    prompt: Prompt,
    first: Answer,
    second: Answer,
) -> int | None:
    label = judge(description, prompt, first, second)
    if label not in (0, 1, None):
        raise ValueError(f"judge must return 0, 1 or None, got {label!r}")
    return label


def _distinct(vectors: np.ndarray, max_similarity: float) -> list[int]:
    """Places of the responses that no earlier kept one resembles too much."""
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = units @ units.T
    kept: list[int] = []
    for place in range(len(units)):
        if max_similarity == 1 or not (similar[place, kept] > max_similarity).any():
            kept.append(place)
    return kept
