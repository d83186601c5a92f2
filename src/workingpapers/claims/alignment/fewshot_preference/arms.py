"""Every way to serve a user from a few shots, trained on the same users with the same budget."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from workingpapers.claims.alignment.fewshot_preference.users import (
    LEVELS,
    AttributeTemplate,
    Draw,
    accuracy,
    bayes_accuracy,
    draw,
    train,
    transformer,
    weights,
)
from workingpapers.common.validation import require
from workingpapers.desk.claim import Cell, Row, artifact

if TYPE_CHECKING:
    from torch import nn

    from workingpapers.alignment import Episode

POPULATIONS = ["trained", "unseen", "shifted"]
ARMS = ["FSPO-IPO", "FSPO-DPO", "FSPO, describes", "FSPO, is told", "no context", "Pref-FT", "adapter per user"]
CONTEXTS, QUERIES = 25, 16  # of each population
REFERENCE_STEPS = 50  # of Pref-FT
# Of 2e-3, 4e-3 and 8e-3, on seeds 100 and 101 with many users, which no claim uses: the best for Pref-FT, and within
# 0.01 of the best for FSPO.
RATE = 4e-3
# On seed 100, rates from 1e-3 to 3e-3 with 2 to 12 steps come within 0.01 of each other: the sign of a margin hardly
# depends on how far the adapter moves.
ADAPTER_RATE, ADAPTER_STEPS = 3e-3, 4


def arm_rows(cell: Cell, *populations: str) -> list[Row]:
    return measured(cell, cell.method, cell.shots, populations)


def measured(cell: Cell, method: str, shots: int, populations: Sequence[str]) -> list[Row]:
    found = arm(
        method=method,
        attributes=cell.attributes,
        crowd=cell.crowd,
        shots=shots,
        width=cell.width,
        steps=cell.steps,
        seed=cell.seed,
    )
    return [
        {"users": users, **{name: float(values[POPULATIONS.index(users)]) for name, values in found.items()}}
        for users in populations
    ]


@artifact
def arm(
    method: str, attributes: int, crowd: str, shots: int, width: int, steps: int, seed: int
) -> dict[str, np.ndarray]:
    """Train one arm; accuracy, share of the Bayes ceiling, and what the policy writes against random responses.

    The reference of the preference arms has REFERENCE_STEPS steps of Pref-FT; the arm Pref-FT takes as many steps as
    the others in all, in one run. Every arm starts from the same weights.
    """
    rng = np.random.default_rng([seed, 2])
    tests = {
        name: draw(weights(attributes, crowd, name, seed), CONTEXTS, shots, QUERIES, rng, true_labels=True)
        for name in POPULATIONS
    }
    users = weights(attributes, crowd, "trained", seed)
    shown = 0 if method in ("no context", "adapter per user") else shots
    describe = {"FSPO, describes": "first", "FSPO, is told": "given"}.get(method, "no")
    template = AttributeTemplate(attributes, describe)
    policy = transformer(attributes, width, seed)
    reference = None
    if method == "Pref-FT":
        fine_tuned(policy, template, draw(users, 32 * (REFERENCE_STEPS + steps), shown, 1, rng), RATE)
    else:
        reference = fine_tuned(policy, template, draw(users, 32 * REFERENCE_STEPS, shown, 1, rng), RATE)
        kind, beta = ("dpo", 1.0) if method == "FSPO-DPO" else ("ipo", 0.25)
        material = draw(users, 32 * steps, shown, 1, rng)
        train(policy, reference, template, material, kind=kind, beta=beta, learning_rate=RATE)

    rows = []
    for name, test in tests.items():
        seen = replace(test, shots=test.shots[:, :shown])
        episodes = with_descriptions(policy, template, seen)
        if method == "adapter per user":
            margins = adapted_margins(policy, template, test)
        else:
            margins = log_ratios(policy, reference, template, episodes)
        prior = weights(attributes, crowd, "shifted" if name == "shifted" else "all", seed)
        ceiling = bayes_accuracy(test, prior)
        rows.append(
            {
                "accuracy": accuracy(margins),
                "ceiling": ceiling,
                "of_ceiling": (accuracy(margins) - 0.5) / (ceiling - 0.5),
                # of adapters: of what they start from
                **written(policy, template, episodes[::QUERIES], test.users, seed),
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def fine_tuned(model: nn.Module, template: AttributeTemplate, found: Draw, rate: float) -> nn.Module:
    from workingpapers.alignment import FSPOConfig, PrefFTTrainer

    args = FSPOConfig(learning_rate=rate, warmup=0.1, max_grad_norm=1.0, batch_size=32, weight_decay=0.01)
    trainer = PrefFTTrainer(model, None, found.episodes(), template, args)
    trainer.train()
    return trainer.reference()


def log_ratios(
    policy: nn.Module, reference: nn.Module | None, template: AttributeTemplate, episodes: Iterable[Episode]
) -> np.ndarray:
    """Margin of each query; of the log-likelihoods themselves without a reference."""
    import torch

    from workingpapers.alignment import PersonalRewarder, collate_preferences, frozen, pair_logprobs

    if reference is not None:
        return PersonalRewarder(policy, reference, None, template, beta=1.0, batch_size=500).margins(episodes)
    pairs = [template.fit(episode.shots, episode.query, None, 0) for episode in episodes]
    with frozen(policy):
        parts = [pair_logprobs(policy, collate_preferences(pairs[i : i + 500])) for i in range(0, len(pairs), 500)]
    return torch.cat([chosen - rejected for chosen, rejected in parts]).numpy()


def with_descriptions(policy: nn.Module, template: AttributeTemplate, found: Draw) -> list[Episode]:
    """The episodes with the description that the model itself gives of the user, where it gives one."""
    from workingpapers.alignment import sample_responses

    episodes = found.episodes()
    if template.describe != "first":
        return episodes
    firsts = episodes[:: found.queries.shape[1]]
    prompts = [template.prompt(episode.shots) for episode in firsts]
    said = sample_responses(policy, prompts, max_new_tokens=template.attributes, temperature=0.0).responses()
    return [
        replace(episode, query=replace(episode.query, persona=tuple(said[place // found.queries.shape[1]])))
        for place, episode in enumerate(episodes)
    ]


def written(
    policy: nn.Module, template: AttributeTemplate, episodes: Sequence[Episode], users: np.ndarray, seed: int
) -> dict[str, float]:
    """How often a response has a higher true reward than one with random attributes, ties counting half.

    Drawn from the policy among the responses that there are, one level of each attribute; `legal` is the probability
    that the policy, left alone, writes one of these.
    """
    import torch

    from workingpapers.alignment import frozen

    levels, n = len(LEVELS), 8
    told = [() if template.describe == "no" else episode.query.persona or () for episode in episodes]
    prompts = [template.prompt(episode.shots, persona) for episode, persona in zip(episodes, told, strict=True)]
    ids = torch.tensor(prompts).repeat_interleave(n, 0)
    generator = torch.Generator().manual_seed(seed)
    legal = torch.ones(len(ids))
    with frozen(policy):
        for attribute in range(template.attributes):
            shares = policy(input_ids=ids).logits[:, -1].softmax(-1)[:, levels * attribute : levels * (attribute + 1)]
            legal *= shares.sum(1)  # P(legal) is the mean of this product over draws among the legal ones
            token = torch.multinomial(shares, 1, generator=generator)
            ids = torch.cat([ids, levels * attribute + token], 1)
    tokens = ids[:, -template.attributes :].numpy() - levels * np.arange(template.attributes)
    others = np.random.default_rng(seed).choice(LEVELS, size=(len(users), n, template.attributes))
    ours = (LEVELS[tokens].reshape(others.shape) * users[:, None]).sum(-1)
    theirs = (others * users[:, None]).sum(-1)
    wins = (ours > theirs + 1e-9).mean() + 0.5 * (np.abs(ours - theirs) <= 1e-9).mean()
    return {"win_rate": float(wins), "legal": float(legal.mean())}


def adapted_margins(policy: nn.Module, template: AttributeTemplate, test: Draw) -> np.ndarray:
    """The model without context with a low-rank adapter fitted to the shots of each context."""
    import torch

    from workingpapers.alignment import (
        FSPOLoss,
        collate_preferences,
        frozen,
        pair_logprobs,
    )

    peft = require("peft", extra="language")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapters = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(copy.deepcopy(policy), adapters)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = FSPOLoss("ipo", 0.25)
    found = []
    shots = replace(test, queries=test.shots, shots=test.shots[:, :0]).episodes()
    queries = replace(test, shots=test.shots[:, :0]).episodes()
    count, asked = test.shots.shape[1], test.queries.shape[1]
    for context in range(len(test.users)):
        batches = []
        for episodes, size in ((shots, count), (queries, asked)):
            part = episodes[context * size : (context + 1) * size]
            batches.append(collate_preferences([template.fit((), e.query, None, 0) for e in part]))
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(start[name])
        optimizer = torch.optim.AdamW(trainable.values(), lr=ADAPTER_RATE, weight_decay=0.0)
        with frozen(model):
            references = [pair_logprobs(model, batch) for batch in batches]
        for _ in range(ADAPTER_STEPS):
            optimizer.zero_grad()
            loss(*pair_logprobs(model, batches[0]), *references[0]).loss.backward()
            optimizer.step()
        with frozen(model):
            chosen, rejected = pair_logprobs(model, batches[1])
        found.append(chosen - references[1][0] - rejected + references[1][1])
    return torch.cat(found).numpy()
