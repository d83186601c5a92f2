"""Users that are known: hidden weights over the visible attributes of a response, and the best prediction."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.common.validation import require

if TYPE_CHECKING:
    from torch import nn

    from workingpapers.alignment import Episode, FSPOTrainer, TokenPair
    from workingpapers.alignment.sequences import TokenSequence

PAPER = "fewshot-preference"
ROLE_PLAY = (
    "Role-play, 1500 users, win rate: without context 72.4, few-shot prompting 63.2, few-shot Pref-FT 62.8, FSPO-DPO "
    "81.3, FSPO-IPO 82.6, with description 90.3, oracle description 90.9"
)

LEVELS = np.array([-1.5, -0.5, 0.5, 1.5])  # of an attribute; a response is one token per attribute
STEEPNESS = 1.5  # of the Bradley-Terry labels


CROWD = 1_000  # users with weights in random directions, of the length of a sign vector


def weights(attributes: int, crowd: str, population: str, seed: int) -> np.ndarray:
    """Hidden weights of a population of users.

    The "few" are the sign vectors, the "many" have random directions. Three quarters of either are trained on, the
    others are unseen. Shifted users care about half of the attributes, by sqrt(2) as much.
    """
    if population == "shifted":
        sparse = np.array(list(product((-1.0, 0.0, 1.0), repeat=attributes)))
        shifted: np.ndarray = np.sqrt(2) * sparse[np.abs(sparse).sum(1) == attributes // 2]
        return shifted
    rng = np.random.default_rng([seed, 0])
    users = np.array(list(product((-1.0, 1.0), repeat=attributes)))
    if crowd == "many":
        users = rng.standard_normal((CROWD, attributes))
        users *= np.sqrt(attributes) / np.linalg.norm(users, axis=1, keepdims=True)
    order = rng.permutation(len(users))
    unseen = len(users) // 4
    parts: dict[str, np.ndarray] = {"trained": users[order[unseen:]], "unseen": users[order[:unseen]], "all": users}
    return parts[population]


@dataclass(frozen=True)
class Draw:
    """Contexts of users with queries: levels of (contexts, shots, 2, attributes), the preferred response first.

    Attributes
    ----------
    users : hidden weights, (contexts, attributes).
    shots : levels, labelled by the user.
    queries : levels, (contexts, queries, 2, attributes).
    """

    users: np.ndarray
    shots: np.ndarray
    queries: np.ndarray

    def episodes(self) -> list[Episode]:
        """One for every query."""
        from workingpapers.alignment import Comparison, Episode

        attributes = self.users.shape[1]
        tokens = np.arange(attributes) * len(LEVELS)
        found = []
        for user, shots, queries in zip(self.users, self.shots + tokens, self.queries + tokens, strict=True):
            context = tuple(Comparison((), tuple(a), tuple(b)) for a, b in shots.tolist())
            persona = described(user)
            name = tuple(user.tolist())
            found += [Episode(context, Comparison((), tuple(a), tuple(b), persona), name) for a, b in queries.tolist()]
        return found


def described(user: np.ndarray) -> tuple[int, ...]:
    """The signs of the weights as tokens."""
    attributes = len(user)
    return tuple((8 * attributes + 1 + 2 * np.arange(attributes) + (user > 0)).tolist())


def draw(
    users: np.ndarray, contexts: int, shots: int, queries: int, rng: np.random.Generator, *, true_labels: bool = False
) -> Draw:
    """Random users with fresh pairs; queries are labelled without noise, ties left out, if `true_labels`."""
    chosen = users[rng.integers(len(users), size=contexts)]
    attributes = users.shape[1]

    def pairs(count: int, exact: bool) -> np.ndarray:
        spare = 3 * count + 20 if exact else count
        levels = rng.integers(len(LEVELS), size=(contexts, spare, 2, attributes))
        gap = np.einsum("ck,cspk->csp", chosen, LEVELS[levels]) @ np.array([1.0, -1.0])
        if exact:
            first = np.argsort(np.abs(gap) < 1e-9, axis=1, kind="stable")[:, :count]  # ties go last
            levels = np.take_along_axis(levels, first[..., None, None], 1)
            wins = np.take_along_axis(gap, first, 1) > 0
        else:
            wins = rng.random(gap.shape) < 1 / (1 + np.exp(-STEEPNESS * gap))
        return np.where(wins[..., None, None], levels, levels[:, :, ::-1])

    return Draw(chosen, pairs(shots, exact=False), pairs(queries, exact=true_labels))


def bayes_accuracy(found: Draw, prior: np.ndarray) -> float:
    """Accuracy of the best predictor: the posterior over `prior` given the shots votes on each query."""
    gaps = np.einsum("uk,csk->cus", prior, LEVELS[found.shots[:, :, 0]] - LEVELS[found.shots[:, :, 1]])
    logits = -np.logaddexp(0.0, -STEEPNESS * gaps).sum(-1)
    posterior = np.exp(logits - logits.max(1, keepdims=True))
    sides = np.einsum("uk,cqk->cuq", prior, LEVELS[found.queries[:, :, 0]] - LEVELS[found.queries[:, :, 1]])
    votes = np.einsum("cu,cuq->cq", posterior / posterior.sum(1, keepdims=True), np.sign(np.round(sides, 9)))
    return float((votes > 0).mean() + 0.5 * (votes == 0).mean())


@dataclass(frozen=True)
class AttributeTemplate:
    """A shot is the preferred response and, in a second range of ids, the other one; then one query token.

    Attributes
    ----------
    describe : "no", "first" (the completion begins with the signs of the user's weights) or "given" (the prompt
        ends with them).
    """

    attributes: int
    describe: str = "no"

    def fit(self, shots: Sequence[Any], query: Any, tokenizer: Any, max_length: int) -> TokenPair:
        from workingpapers.alignment import TokenPair

        chosen, rejected = list(query.chosen), list(query.rejected)
        prompt = self.prompt(shots, query.persona if self.describe == "given" else ())
        if self.describe == "first":
            chosen, rejected = [*query.persona, *chosen], [*(query.rejected_persona or query.persona), *rejected]
        return TokenPair(prompt, chosen, rejected)

    def fit_responses(
        self,
        shots: Sequence[Any],
        question: Any,
        responses: Sequence[Any],
        tokenizer: Any,
        max_length: int,
        *,
        description: Any = None,
    ) -> list[TokenSequence]:
        from workingpapers.alignment import TokenSequence

        opening = () if description is None else description
        return [TokenSequence(self.prompt(shots, opening), list(response)) for response in responses]

    def prompt(self, shots: Sequence[Any], description: Sequence[Any] = ()) -> list[int]:
        second = 4 * self.attributes
        tokens = [t for shot in shots for t in (*shot.chosen, *(token + second for token in shot.rejected))]
        return [*tokens, 8 * self.attributes, *description]


def transformer(attributes: int, width: int, seed: int) -> nn.Module:
    """Two pre-norm layers with four heads."""
    import torch

    transformers = require("transformers", extra="language")
    config = transformers.LlamaConfig(
        vocab_size=10 * attributes + 1,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=width**-0.5,  # the default, 0.02, is for a width of 2,500
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def train(
    model: nn.Module,
    reference: nn.Module,
    template: AttributeTemplate,
    found: Draw,
    *,
    kind: str = "ipo",
    beta: float = 0.25,
    learning_rate: float = 6e-3,
) -> FSPOTrainer:
    """One pass over fresh episodes."""
    episodes = found.episodes()
    if template.describe == "first":  # the rejected response is another user's
        rng = np.random.default_rng(len(found.users))
        others = found.users[rng.permutation(len(found.users))]
        episodes = [
            replace(episode, query=replace(episode.query, rejected_persona=described(other)))
            for episode, other in zip(episodes, others, strict=True)
        ]
    return train_on(model, reference, template, episodes, kind=kind, beta=beta, learning_rate=learning_rate)


def train_on(
    model: nn.Module,
    reference: nn.Module,
    template: AttributeTemplate,
    episodes: Sequence[Episode],
    *,
    kind: str = "ipo",
    beta: float = 0.25,
    learning_rate: float = 6e-3,
) -> FSPOTrainer:
    """One pass over the episodes, 32 at a step."""
    from workingpapers.alignment import FSPOConfig, FSPOLoss, FSPOTrainer

    args = FSPOConfig(learning_rate=learning_rate, warmup=0.1, max_grad_norm=1.0, batch_size=32, weight_decay=0.01)
    loss = FSPOLoss("ipo" if kind == "ipo" else "dpo", beta)
    trainer = FSPOTrainer(model, reference, None, episodes, template, args, loss=loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # without context the target margin cannot be reached
        trainer.train()
    return trainer


def accuracy(margins: np.ndarray) -> float:
    return float((margins > 0).mean())
