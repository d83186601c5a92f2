"""Claims of "FSPO: Few-Shot Preference Optimization of Synthetic Preference Data in LLMs Elicits Effective ...".

The paper's tables are judgements of a 3-billion-parameter model. What they rest on can be measured where users are
known exactly: a user is a vector of hidden weights over the visible attributes of a response, labels are Bradley-Terry,
and the best that anybody could predict from the shots (the posterior over all users) is computed exactly.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.common.validation import require
from workingpapers.desk.claim import (
    Cell,
    Row,
    artifact,
    bars,
    benchmark,
    claim,
    faster,
    higher,
    lower,
    scales,
    seeds,
)

if TYPE_CHECKING:
    from torch import nn

    from workingpapers.alignment import Episode, FSPOTrainer, TokenPair
    from workingpapers.alignment.sequences import TokenSequence

PAPER = "fewshot-preference"
ROLE_PLAY = (
    "Role-play, 1500 users, win rate: without context 72.4, few-shot prompting 63.2, few-shot Pref-FT 62.8, FSPO-DPO "
    "81.3, FSPO-IPO 82.6, with description 90.3, oracle description 90.9"
)

# ------------------------------------------------------------------------------------------------- users that are known

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


# ------------------------------------------------------------------------------------------- the shots and nothing else


@claim(
    paper=PAPER,
    says="From four labelled preferences the model predicts a fifth of the same user better than a model without "
    "context; with random labels in the shots it is at chance, with flipped labels it predicts the opposite.",
    published=ROLE_PLAY,
    grid={"attributes": [2], "shots": [4], "seed": seeds(smoke=5, laptop=8)},
    expect=[
        higher("accuracy", "FSPO", than="no context", margin=0.1),
        lower("accuracy", "labels at random", than=0.5, margin=0.05),
        lower("accuracy", "labels flipped", than=0.5),
    ],
    plot=bars(x="method", y="accuracy"),
)
def four_shots(cell: Cell) -> list[Row]:
    rng = np.random.default_rng([cell.seed, 1])
    users = weights(cell.attributes, "few", "all", cell.seed)
    template = AttributeTemplate(cell.attributes)
    test = draw(users, 1_000, cell.shots, 1, rng, true_labels=True)
    turned = {"FSPO": np.zeros((1_000, cell.shots), bool), "labels flipped": np.ones((1_000, cell.shots), bool)}
    turned["labels at random"] = rng.random((1_000, cell.shots)) < 0.5
    found = []
    for shots in (cell.shots, 0):
        start = transformer(cell.attributes, 32, cell.seed)
        trainer = train(copy.deepcopy(start), start, template, draw(users, 100 * 32, shots, 1, rng))
        rewarder = trainer.rewarder()
        rewarder.batch_size = 500
        for method, flip in turned.items() if shots else [("no context", np.zeros((1_000, 0), bool))]:
            kept = test.shots[:, :shots]
            shown = replace(test, shots=np.where(flip[..., None, None], kept[:, :, ::-1], kept))
            found.append({"method": method, "accuracy": accuracy(rewarder.margins(shown.episodes()))})
    return [*found, {"method": "Bayes", "accuracy": bayes_accuracy(test, users)}]


# ------------------------------------------------------------------------------------------ unseen users, shifted users

POPULATIONS = ["trained", "unseen", "shifted"]
ARMS = ["FSPO-IPO", "FSPO-DPO", "FSPO, describes", "FSPO, is told", "no context", "Pref-FT", "adapter per user"]
CONTEXTS, QUERIES = 40, 25  # of each population
ADAPTER_RATE, ADAPTER_STEPS = 1e-2, 15


@claim(
    paper=PAPER,
    says="With eight shots, on users it was trained on, on unseen users of the same kind and on users of another kind, "
    "FSPO ranks responses better than a model without context, a few-shot fine-tuned model and an adapter per user.",
    published=ROLE_PLAY,
    grid={
        "attributes": scales(smoke=[], laptop=[2], paper=[4]),
        "crowd": ["many"],
        "shots": [8],
        "steps": scales(smoke=[], laptop=[200], paper=[1_000]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": ARMS,
    },
    expect=[
        higher("accuracy", "FSPO-IPO", than=["no context", "Pref-FT", "adapter per user"], each="users"),
        higher("accuracy", "FSPO-IPO", than="FSPO-DPO", margin=-0.05),
    ],
    plot=bars(x="users", y="accuracy", by="method"),
)
def kinds_of_users(cell: Cell) -> list[Row]:
    return arm_rows(cell)


@claim(
    paper=PAPER,
    says="Describing the user first ranks responses better, up to being told the true description.",
    published=ROLE_PLAY,
    grid={
        "attributes": scales(smoke=[], laptop=[2], paper=[4]),
        "crowd": ["many"],
        "shots": [8],
        "steps": scales(smoke=[], laptop=[200], paper=[1_000]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": ["FSPO-IPO", "FSPO, describes", "FSPO, is told"],
    },
    expect=[
        higher("accuracy", "FSPO, describes", than="FSPO-IPO", where={"users": ["trained", "unseen"]}),
        higher("accuracy", "FSPO, is told", than="FSPO, describes", where={"users": ["trained", "unseen"]}),
    ],
    plot=bars(x="users", y="accuracy", by="method"),
)
def describing_the_user(cell: Cell) -> list[Row]:
    return arm_rows(cell)


@claim(
    paper=PAPER,
    says="Responses drawn from the adapted model beat those of the model without context under the user's own reward.",
    published="87 % average win rate on synthetic users, 72 % with real users, against the base model",
    grid={
        "attributes": scales(smoke=[], laptop=[2], paper=[4]),
        "crowd": ["many"],
        "shots": [8],
        "steps": scales(smoke=[], laptop=[200], paper=[1_000]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": ["FSPO-IPO", "no context", "Pref-FT"],
    },
    expect=[
        higher("win_rate", "FSPO-IPO", than=0.5, each="users"),
        higher("win_rate", "FSPO-IPO", than=["no context", "Pref-FT"], each="users"),
    ],
    plot=bars(x="users", y="win_rate", by="method"),
)
def drawn_responses(cell: Cell) -> list[Row]:
    return arm_rows(cell)


@claim(
    paper=PAPER,
    says="More shots of an unseen user give a larger share of what the Bayes-optimal predictor gains over chance.",
    published="Reviews, unseen (interpolated) users: FSPO 71.3 with 4 shots, 73.6 with 8",
    grid={
        "attributes": scales(smoke=[], laptop=[2], paper=[4]),
        "crowd": ["many"],
        "steps": scales(smoke=[], laptop=[200], paper=[1_000]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": ["1 shot", "2 shots", "4 shots", "8 shots"],
    },
    expect=[
        higher("accuracy", "8 shots", than="4 shots", where={"users": "unseen"}),
        higher("accuracy", "4 shots", than="1 shot", where={"users": "unseen"}),
        higher("of_ceiling", "8 shots", than="1 shot", where={"users": "unseen"}),
    ],
    plot=bars(x="method", y="of_ceiling", by="users"),
)
def more_shots(cell: Cell) -> list[Row]:
    shots = int(cell.method.split()[0])
    return measured("FSPO-IPO", cell.attributes, cell.crowd, shots, cell.steps, cell.seed)


@claim(
    paper=PAPER,
    says="Trained on the three of four sign vectors, the model serves the fourth user, whom it has not seen, better "
    "than chance and better than the model without context.",
    published="Reviews, users interpolated between trained ones: FSPO 71.3 to 73.6, prompting 59.1 to 61.9",
    grid={
        "attributes": scales(smoke=[], laptop=[2], paper=[4]),
        "crowd": ["few"],
        "shots": [8],
        "steps": scales(smoke=[], laptop=[200], paper=[1_000]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": ["FSPO-IPO", "no context"],
    },
    expect=[higher("accuracy", "FSPO-IPO", than=[0.5, "no context"], each="users")],
    plot=bars(x="users", y="accuracy", by="method"),
)
def few_training_users(cell: Cell) -> list[Row]:
    return arm_rows(cell)


def arm_rows(cell: Cell) -> list[Row]:
    return measured(cell.method, cell.attributes, cell.crowd, cell.shots, cell.steps, cell.seed)


def measured(method: str, attributes: int, crowd: str, shots: int, steps: int, seed: int) -> list[Row]:
    found = arm(method=method, attributes=attributes, crowd=crowd, shots=shots, steps=steps, seed=seed)
    return [
        {"users": users, **{name: float(values[place]) for name, values in found.items()}}
        for place, users in enumerate(POPULATIONS)
    ]


@artifact
def arm(method: str, attributes: int, crowd: str, shots: int, steps: int, seed: int) -> dict[str, np.ndarray]:
    """Train one arm; accuracy, share of the Bayes ceiling and win rate against the reference by population."""
    rng = np.random.default_rng([seed, 2])
    tests = {
        name: draw(weights(attributes, crowd, name, seed), CONTEXTS, shots, QUERIES, rng, true_labels=True)
        for name in POPULATIONS
    }
    users = weights(attributes, crowd, "trained", seed)
    shown = 0 if method in ("no context", "adapter per user") else shots
    describe = {"FSPO, describes": "first", "FSPO, is told": "given"}.get(method, "no")
    template = AttributeTemplate(attributes, describe)
    policy = transformer(attributes, 32, seed)
    reference = fine_tuned(policy, template, draw(users, 32 * 50, shown, 1, rng))
    material = draw(users, 32 * steps, shown, 1, rng)
    if method == "Pref-FT":
        fine_tuned(policy, template, material)
    else:
        kind, beta = ("dpo", 1.0) if method == "FSPO-DPO" else ("ipo", 0.25)
        train(policy, reference, template, material, kind=kind, beta=beta, learning_rate=4e-3)

    rows = []
    for name, test in tests.items():
        seen = replace(test, shots=test.shots[:, :shown])
        if method == "adapter per user":
            margins = adapted_margins(policy, template, test)
        elif method == "Pref-FT":
            margins = log_ratios(policy, None, template, seen.episodes())
        else:
            margins = log_ratios(policy, reference, template, with_descriptions(policy, template, seen))
        prior = weights(attributes, crowd, "shifted" if name == "shifted" else "all", seed)
        ceiling = bayes_accuracy(test, prior)
        rows.append(
            {
                "accuracy": accuracy(margins),
                "ceiling": ceiling,
                "of_ceiling": (accuracy(margins) - 0.5) / (ceiling - 0.5),
                "win_rate": win_rate(policy, reference, template, seen, seed),
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def fine_tuned(model: nn.Module, template: AttributeTemplate, found: Draw) -> nn.Module:
    from workingpapers.alignment import FSPOConfig, PrefFTTrainer

    args = FSPOConfig(learning_rate=4e-3, warmup=0.1, max_grad_norm=1.0, batch_size=32, weight_decay=0.01)
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


def win_rate(policy: nn.Module, reference: nn.Module, template: AttributeTemplate, found: Draw, seed: int) -> float:
    """How often a response of the policy has a higher true reward than one of the reference; ties count half."""
    import torch

    from workingpapers.alignment import sample_responses

    attributes = template.attributes
    rewards = []
    episodes = found.episodes()[:: found.queries.shape[1]]
    length = 2 * attributes if template.describe == "first" else attributes
    for place, model in enumerate((policy, reference)):
        told = [episode.query.persona or () if template.describe == "given" else () for episode in episodes]
        prompts = [template.prompt(episode.shots, persona) for episode, persona in zip(episodes, told, strict=True)]
        generator = torch.Generator().manual_seed(2 * seed + place)
        drawn = sample_responses(model, prompts, n=8, max_new_tokens=length, generator=generator).responses()
        tokens = np.array(drawn)[:, -attributes:] - len(LEVELS) * np.arange(attributes)
        legal = (tokens >= 0) & (tokens < len(LEVELS))
        values = np.where(legal, LEVELS[np.clip(tokens, 0, 3)], LEVELS[0])
        rewards.append((values.reshape(len(episodes), 8, attributes) * found.users[:, None]).sum(-1))
    ours, theirs = rewards
    return float((ours > theirs + 1e-9).mean() + 0.5 * (np.abs(ours - theirs) <= 1e-9).mean())


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


# ---------------------------------------------------------------------------- diversity and structure of synthetic data


@claim(
    paper=PAPER,
    says="Synthetic users train a better model when their responses differ (diversity) and their descriptions decide "
    "their labels (structure): descriptions that leave half of the choices open, settled by a coin each time, and "
    "responses that are all alike both cost accuracy on real users.",
    published="Response similarity 0.94 to 0.71 by conditioning on personas or viewpoints, label entropy 0.64 to 0.13 "
    "nats by refinement; both needed for the transfer to real users (ablations)",
    grid={
        "steps": scales(smoke=[], laptop=[150], paper=[1_000]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": ["diverse, refined", "diverse, open", "alike, refined"],
    },
    expect=[
        higher("accuracy", "diverse, refined", than=["diverse, open", "alike, refined"]),
        lower("label_entropy", "diverse, refined", than="diverse, open", margin=-0.1),
        lower("similarity", "diverse, refined", than="alike, refined", margin=-0.1),
    ],
    plot=bars(x="method", y="accuracy"),
)
def synthetic_data(cell: Cell) -> Row:
    from workingpapers.alignment import EpisodeSampler, personas

    attributes, shots = 2, 4
    diversity, structure = cell.method.split(", ")
    rng = np.random.default_rng([cell.seed, 3])
    real = weights(attributes, "few", "all", cell.seed)
    offsets = len(LEVELS) * np.arange(attributes)

    def write(prompt: int, viewpoint: str) -> tuple[int, ...]:
        """Viewpoints are levels to stay near; writers without one all write about the same."""
        near = np.array([int(level) for level in viewpoint]) if diversity == "diverse" else np.array([1, 2])
        moved = near + rng.integers(-1, 2, size=attributes) * (rng.random(attributes) < 0.2)
        return tuple((np.clip(moved, 0, len(LEVELS) - 1) + offsets).tolist())

    def embed(responses: Sequence[tuple[int, ...]]) -> np.ndarray:
        vectors: np.ndarray = np.eye(attributes * len(LEVELS))[np.array(responses)].sum(1)
        return vectors

    records: list[dict[str, Any]] = []
    entropies, similarities = [], []
    for user, signs in enumerate(np.repeat(real, 4, axis=0)):
        known = {0: float(signs[0])}  # the description is silent on the other attribute
        pairs: list[Any] = []

        def collect(description: str, prompt: int, first: Any, second: Any, pairs: list[Any] = pairs) -> int:
            pairs.append((prompt, first, second))
            return 0

        levels = ["".join(map(str, each)) for each in product(range(len(LEVELS)), repeat=attributes)]
        made = personas.synthesize(
            list(range(40)),
            {user: "known"},
            [write],
            collect,
            viewpoints=levels,
            responses_per_prompt=4,
            pairs_per_prompt=3,
            embed=embed,
            swap=False,
            random_state=1_000 * cell.seed + user,
        )
        if made.similarity is not None:
            similarities.append(made.similarity)
        found = personas.refine(known, pairs, decides, settle, random_state=user)
        described_by = known if structure == "open" else found.persona
        votes = np.array([[label_of(described_by, pair, rng) for _ in range(8)] for pair in pairs])
        entropies.append(personas.label_entropy(votes))
        for place, (_, first, second) in enumerate(pairs):
            chosen, rejected = (second, first) if votes[place, 0] else (first, second)
            records.append({"prompt": [place], "chosen": chosen, "rejected": rejected, "user": user})
    sampler = EpisodeSampler(records, shots, random_state=cell.seed, replacement=True)
    episodes = [episode for episode, _ in zip(sampler, range(32 * cell.steps), strict=False)]
    start = transformer(attributes, 32, cell.seed)
    trainer = train_on(copy.deepcopy(start), start, AttributeTemplate(attributes), episodes)
    test = draw(real, 1_000, shots, 1, rng, true_labels=True)
    margins = log_ratios(trainer.model, start, AttributeTemplate(attributes), test.episodes())
    return {
        "accuracy": accuracy(margins),
        "label_entropy": float(np.mean(entropies)),
        "similarity": float(np.mean(similarities)),
    }


def gap_of(persona: dict[int, float], pair: tuple[Any, tuple[int, ...], tuple[int, ...]]) -> float:
    """By how much the first response is better, as far as the description says."""
    first, second = (LEVELS[np.array(response) % len(LEVELS)] for response in pair[1:])
    return sum(sign * float(first[place] - second[place]) for place, sign in persona.items())


def decides(persona: dict[int, float], pair: Any) -> Any:
    """The label that follows from the description; None where a relevant attribute is not described."""
    first, second = (LEVELS[np.array(response) % len(LEVELS)] for response in pair[1:])
    differ = [place for place in range(len(first)) if first[place] != second[place]]
    if any(place not in persona for place in differ) or gap_of(persona, pair) == 0:
        return None if any(place not in persona for place in differ) else 0
    return 0 if gap_of(persona, pair) > 0 else 1


def settle(persona: dict[int, float], pair: Any, label: int) -> dict[int, float]:
    """Add the attributes that the pair turns on, with the sign that speaks for the label."""
    first, second = (LEVELS[np.array(response) % len(LEVELS)] for response in pair[1:])
    side = np.sign(first - second) * (-1.0 if label else 1.0)
    return persona | {place: float(sign) for place, sign in enumerate(side) if place not in persona and sign}


def label_of(persona: dict[int, float], pair: Any, rng: np.random.Generator) -> int:
    label = decides(persona, pair)
    return int(rng.integers(2)) if label is None else int(label)


# ---------------------------------------------------------------------------------------------------------------- cost


@benchmark(
    paper=PAPER,
    says="One optimizer step on eight-shot episodes (IPO, forward, backward, AdamW) is faster than that of trl's "
    "DPOTrainer on the same model, batch and precomputed reference.",
    grid={"vocabulary": scales(smoke=[512], laptop=[512, 8_192], paper=[49_152]), "contender": ["ours", "trl"]},
    expect=[faster("ours", than="trl", each="vocabulary")],
    plot=bars(x="vocabulary", y="seconds", by="contender", log="y"),
    rounds={"smoke": 5, "laptop": 5, "paper": 7},
)
def training_step(cell: Cell) -> Row:
    """4 episodes: prompts of 8 shots (160 tokens), answers of 12 tokens; a Llama of width 64 with 2 layers.

    trl's step also computes the diagnostics that it logs: entropies, mean logits, token accuracy.
    """
    import torch

    from workingpapers.alignment import Comparison, Episode, FSPOConfig, FSPOLoss, FSPOTrainer

    transformers = require("transformers", extra="language")
    config = transformers.LlamaConfig(
        vocab_size=cell.vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, reference = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    rng = np.random.default_rng(0)

    def comparison(length: int) -> Comparison:
        chosen, rejected = rng.integers(80, size=(2, length)).tolist()
        return Comparison((), tuple(chosen), tuple(rejected))

    template = AttributeTemplate(20)
    episodes = [Episode(tuple(comparison(10) for _ in range(8)), comparison(12), user) for user in range(4)]
    steps = 5
    if cell.contender == "ours":
        args = FSPOConfig(warmup=None, max_steps=steps + 2, precompute_reference=True)  # the end warns: not reached
        trainer = FSPOTrainer(model, reference, None, episodes, template, args, loss=FSPOLoss("ipo", 0.25))
        trainer.train(1)
        with cell.timed(calls=steps):
            trainer.train(steps)
        return {"loss": trainer.history[0]["loss"] / len(episodes[0].query.chosen) ** 2}
    pairs = [template.fit(episode.shots, episode.query, None, 0) for episode in episodes]
    with tempfile.TemporaryDirectory() as folder:
        theirs, inputs = trl_trainer(model, reference, pairs, folder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)

        def step() -> float:
            optimizer.zero_grad()
            loss = theirs.compute_loss(model, dict(inputs))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            return float(loss)

        first = step()
        with cell.timed(calls=steps):
            for _ in range(steps):
                step()
    return {"loss": first}


def trl_trainer(model: nn.Module, reference: nn.Module, pairs: Sequence[TokenPair], folder: str) -> tuple[Any, Any]:
    """A DPOTrainer with the IPO loss, and the batch of `pairs` with the reference's log-probabilities."""
    import torch

    from workingpapers.alignment import collate_preferences, frozen, pair_logprobs

    datasets, trl = require("datasets", extra="language"), require("trl", extra="peers")
    transformers, tokenizers = require("transformers", extra="language"), require("tokenizers", extra="language")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "<e>": 1}, merges=[])),
        eos_token="<e>",
    )
    length = len(pairs[0].chosen)
    arguments = trl.DPOConfig(
        output_dir=folder,
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        beta=0.25 * length,  # trl averages log-ratios over tokens: the same minimiser
        loss_type=["ipo"],
        per_device_train_batch_size=len(pairs),
        use_cpu=not torch.cuda.is_available(),
    )
    row = {"prompt": "a", "chosen": "a", "rejected": "aa"}
    theirs = trl.DPOTrainer(
        model, reference, args=arguments, train_dataset=datasets.Dataset.from_list([row]), processing_class=tokenizer
    )
    with frozen(reference):
        chosen, rejected = pair_logprobs(reference, collate_preferences(pairs))
    examples = [
        {
            "prompt_ids": pair.prompt,
            "chosen_ids": pair.chosen,
            "rejected_ids": pair.rejected,
            "ref_chosen_logps": of_chosen,
            "ref_rejected_logps": of_rejected,
        }
        for pair, of_chosen, of_rejected in zip(pairs, chosen.tolist(), rejected.tolist(), strict=True)
    ]
    theirs.precompute_ref_logps = True  # the batch carries them
    return theirs, theirs.data_collator(examples)
