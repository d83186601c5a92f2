"""Claims of "Confronting Reward Model Overoptimization with Constrained RLHF".

The paper's figures come from GPT-2 on dialogues with a METEOR and an intent reward. Here the first test bed is a point
in the plane with two correlated rewards, where the least divergence that meets the thresholds is known; the second one
a policy that writes strings of a grammar, rewarded for symbols of a topic and for how a string ends, and evaluated by
what neither reward sees alone: grammar, variety and success together. "PPO, tuned" is the best
of ten runs with random fixed weights and prices of divergence, chosen by the evaluation itself, for each seed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.desk.claim import (
    Axis,
    Cell,
    Row,
    artifact,
    bars,
    benchmark,
    claim,
    faster,
    higher,
    line,
    lower,
    scales,
    seeds,
)

if TYPE_CHECKING:
    import torch

    from workingpapers.alignment.constrained_rlhf import ConstrainedPPO, Episodes

PAPER = "constrained-rlhf"

# --------------------------------------------------------------------------------------- a point in the plane, no doubt

THRESHOLDS, LEAST_KL = (0.5, 0.6), 10.1043  # with deviation 0.15 from (0.1, 0.1): m* = (0.5, 0.642857)
PLANE: dict[str, Axis] = {
    "updates": scales(smoke=[400], laptop=[800]),
    "seed": seeds(smoke=5, laptop=5, paper=20),
}
DAMPED = 3.0


@claim(
    paper=PAPER,
    says="In the plane, with damped multipliers, equality constraints are met within 5 % (mean over the last fifth) at "
    "the least divergence that meets them, within 5 %.",
    published="constraints are met: xi-PPO hits its thresholds (figure; without damping)",
    grid=PLANE | {"method": ["xi, damped"]},
    expect=[lower("error", "xi, damped", than=0.05), lower("kl_error", "xi, damped", than=0.05)],
    plot=bars(x="method", y="error"),
)
def thresholds_at_the_least_divergence(cell: Cell) -> Row:
    return plane_row(cell, "xi", DAMPED)


@claim(
    paper=PAPER,
    says="In the plane, the paper's multipliers, without damping, meet the thresholds within 10 % on average over the "
    "last half of the updates.",
    published="only averages have guarantees (the paper's appendix); figures show runs that hit their thresholds",
    grid=PLANE | {"updates": scales(smoke=[], laptop=[800]), "method": ["xi"]},
    expect=[lower("mean_error", "xi", than=0.1)],
    plot=bars(x="method", y="mean_error"),
)
def plain_multipliers_on_average(cell: Cell) -> Row:
    return plane_row(cell, "xi", 0.0)


@claim(
    paper=PAPER,
    says="In the plane, the paper's multipliers, without damping, end within 10 % of the thresholds.",
    published="xi-PPO hits its thresholds (figure)",
    grid=PLANE | {"updates": scales(smoke=[], laptop=[800]), "method": ["xi"]},
    expect=[lower("last_error", "xi", than=0.1)],
    plot=bars(x="method", y="last_error"),
)
def plain_multipliers_at_the_end(cell: Cell) -> Row:
    return plane_row(cell, "xi", 0.0)


@claim(
    paper=PAPER,
    says="In the plane, PPO without constraints or penalty runs past the thresholds, by more than half of them.",
    published="PPO without KL overoptimises both reward models (figure)",
    grid=PLANE | {"updates": scales(smoke=[100], laptop=[300]), "method": ["PPO"]},
    expect=[higher("error", "PPO", than=0.5)],
    plot=bars(x="method", y="error"),
)
def without_constraints_rewards_run_away(cell: Cell) -> Row:
    return plane_row(cell, "ppo", 0.0)


class Plane:
    """One-step episodes of a Gaussian policy with two correlated linear rewards."""

    def __init__(self, streams: int) -> None:
        import torch

        self.mean = torch.nn.Parameter(torch.full((2,), 0.1))
        self.start, self.streams = torch.full((2,), 0.1), streams
        self.rewards = torch.tensor([[1.0, 0.0], [0.3, 0.7]])

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.mean]

    def rollout(self, episodes: int, generator: torch.Generator) -> Episodes:
        import torch

        from workingpapers.alignment.constrained_rlhf import Episodes

        points = self.mean.detach() + 0.15 * torch.randn(episodes, 2, generator=generator)
        mask = torch.ones(episodes, 1, dtype=torch.bool)
        logprobs, reference = self._logprobs(points, self.mean.detach()), self._logprobs(points, self.start)
        return Episodes(points, mask, logprobs, reference, (points @ self.rewards.T)[:, None])

    def evaluate(self, episodes: Episodes, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        points = episodes.data[rows]
        return self._logprobs(points, self.mean), points.new_zeros(len(rows), 1, self.streams)

    @staticmethod
    def _logprobs(points: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return -((points - mean) ** 2).sum(1, keepdim=True) / (2 * 0.15**2)


def plane_row(cell: Cell, variant: Any, proportional: float) -> Row:
    from workingpapers.alignment.constrained_rlhf import ConstrainedPPO, ConstrainedPPOConfig

    args = ConstrainedPPOConfig(
        learning_rate=0.02,
        episodes=128,
        minibatch=128,
        epochs=1,
        kl_coef=0.0,
        target_kl=None,
        proportional=proportional,
        random_state=cell.seed,
    )
    trainer = ConstrainedPPO(Plane(1 if variant == "ppo" else 3), thresholds=THRESHOLDS, variant=variant, args=args)
    history = trainer.train(cell.updates)
    theta = np.array(THRESHOLDS)
    returns = np.array([[row["return_0"], row["return_1"]] for row in history])
    late, half = len(history) // 5, len(history) // 2
    kl = float(np.mean([row["kl"] for row in history[-late:]]))
    return {
        "error": float((np.abs(returns[-late:].mean(0) - theta) / theta).max()),
        "mean_error": float((np.abs(returns[-half:].mean(0) - theta) / theta).max()),
        "last_error": float((np.abs(returns[-20:].mean(0) - theta) / theta).max()),
        "kl": kl,
        "kl_error": abs(kl / LEAST_KL - 1.0),
    }


# ------------------------------------------------------------------------------------ strings of a grammar, two rewards

SYMBOLS, LENGTH = 30, 13
TUNED_RUNS = 10
FIXED = "PPO, tuned"
STRINGS: dict[str, Axis] = {
    "updates": scales(smoke=[], laptop=[60], paper=[500]),
    "seed": seeds(smoke=5, laptop=5, paper=10),
}
VARIANTS = ["xi", "xi, damped", "mu", "mu, damped", "all, damped", "sat", FIXED, "PPO without KL", "start"]
RANKING = "mu-PPO and xi-PPO give the best evaluation, xi slightly best at the end; All-PPO unstable (figure, 5 seeds)"


@claim(
    paper=PAPER,
    says="With thresholds at the estimated proxy points, xi- and mu-PPO end with a better evaluation than the best of "
    "ten PPO runs with fixed weights.",
    published=RANKING,
    grid=STRINGS | {"method": VARIANTS},
    expect=[
        higher("evaluation", ours, than=[FIXED, "PPO without KL", "sat"]) for ours in ("xi", "xi, damped", "mu, damped")
    ],
    plot=bars(x="method", y="evaluation"),
)
def better_than_tuned_weights(cell: Cell) -> Row:
    return string_row(cell)


@claim(
    paper=PAPER,
    says="On the same strings, xi-PPO keeps both rewards within 10 % of their thresholds over the last third of its "
    "updates.",
    published="constraints are met: xi hits, mu reaches or exceeds, All stays below (figure)",
    grid=STRINGS | {"method": ["xi", "xi, damped"]},
    expect=[lower("error", ours, than=0.1) for ours in ("xi", "xi, damped")],
    plot=bars(x="method", y="error"),
)
def thresholds_on_strings(cell: Cell) -> Row:
    return string_row(cell)


@claim(
    paper=PAPER,
    says="Trained three times as long, xi-PPO loses less of its evaluation than PPO without a penalty.",
    published="xi stays stable at three times the training (figure)",
    grid=STRINGS | {"method": ["xi, damped", "PPO without KL"]},
    expect=[lower("loss", "xi, damped", than="PPO without KL")],
    plot=bars(x="method", y="loss"),
)
def stable_when_trained_longer(cell: Cell) -> Row:
    once = string_run(cell.method, cell.updates, cell.seed)
    thrice = string_run(cell.method, 3 * cell.updates, cell.seed)
    return {
        "loss": float(once["evaluation"][-1] - thrice["evaluation"][-1]),
        "evaluation": float(thrice["evaluation"][-1]),
    }


@claim(
    paper=PAPER,
    says="Thresholds a tenth lower or higher than the proxy points give a worse evaluation.",
    published="thresholds 10 % lower or higher are worse (figure)",
    grid=STRINGS | {"method": ["xi, damped", "a tenth lower", "a tenth higher"]},
    expect=[higher("evaluation", "xi, damped", than=["a tenth lower", "a tenth higher"])],
    plot=bars(x="method", y="evaluation"),
)
def other_thresholds_are_worse(cell: Cell) -> Row:
    return string_row(cell)


@claim(
    paper=PAPER,
    says="Proxy points estimated jointly give a better evaluation than those of each reward alone.",
    published="joint proxy points beat independent ones (figure)",
    grid=STRINGS | {"method": ["xi, damped", "independent points"]},
    expect=[higher("evaluation", "xi, damped", than="independent points")],
    plot=bars(x="method", y="evaluation"),
)
def joint_points_beat_independent_ones(cell: Cell) -> Row:
    return string_row(cell)


@claim(
    paper=PAPER,
    says="A threshold search in one run, with as many updates as estimating the points and training take, ends at most "
    "0.02 below xi-PPO at the estimated points.",
    published="NM-PPO is competitive in one run of 256,000 steps, search cost counted (figure)",
    grid=STRINGS | {"method": ["search", "xi, damped"]},
    expect=[higher("evaluation", "search", than="xi, damped", margin=-0.02)],
    plot=bars(x="method", y="evaluation"),
)
def a_search_in_one_run(cell: Cell) -> Row:
    return string_row(cell)


@claim(
    paper=PAPER,
    says="The course of a run: returns and evaluation of the variants.",
    published=RANKING,
    grid=STRINGS | {"method": ["xi", "xi, damped", "PPO without KL"]},
    expect=[lower("evaluation", "PPO without KL", than="xi, damped", where={"update": "last"})],
    plot=line(x="update", y="evaluation"),
)
def the_course_of_a_run(cell: Cell) -> list[Row]:
    found = string_run(cell.method, cell.updates, cell.seed)
    return [
        {"update": place, "topic": float(topic), "ending": float(ending), "evaluation": float(evaluation)}
        for place, (topic, ending, evaluation) in enumerate(
            zip(found["topic"], found["ending"], found["evaluation"], strict=True), start=1
        )
    ]


def string_row(cell: Cell) -> Row:
    found = string_run(cell.method, cell.updates, cell.seed)
    late = len(found["topic"]) // 3
    returns = np.array([found["topic"][-late:].mean(), found["ending"][-late:].mean()])
    theta = found["thresholds"]
    return {
        "evaluation": float(found["evaluation"][-5:].mean()),
        "topic": float(returns[0]),
        "ending": float(returns[1]),
        "kl": float(found["kl"][-late:].mean()),
        "error": float((np.abs(returns - theta) / theta).max()),
    }


@artifact
def string_run(method: str, updates: int, seed: int) -> dict[str, np.ndarray]:
    """Overlap, ending, divergence and evaluation after each update of one run."""
    if method == FIXED:
        runs = [string_run(f"fixed {draw}", updates, seed) for draw in range(TUNED_RUNS)]
        return max(runs, key=lambda run: float(run["evaluation"][-5:].mean()))
    points = proxy_points(updates, seed)
    theta = points["independent"] if method == "independent points" else points["theta"]
    theta = theta * {"a tenth lower": 0.9, "a tenth higher": 1.1}.get(method, 1.0)
    if method.startswith("fixed "):
        rng = np.random.default_rng([seed, int(method[6:]), 7])
        alphas = tuple(np.exp(rng.uniform(np.log(0.3), np.log(30.0), size=2)).tolist())
        trainer, watch = strings_trainer("ppo", theta, seed, alphas=alphas, kl_coef=float(rng.uniform(0.1, 1.0)))
    elif method == "start":
        trainer, watch = strings_trainer("ppo", theta, seed, learning_rate=1e-12)
    elif method == "PPO without KL":
        trainer, watch = strings_trainer("ppo", theta, seed)
    elif method == "search":
        return searched(updates, seed)
    else:
        name, _, damping = method.partition(", ")
        variant = name if name in ("xi", "mu", "all", "sat") else "xi"
        damped = bool(damping) or variant != name
        trainer, watch = strings_trainer(variant, theta, seed, proportional=DAMPED if damped else 0.0)
    trainer.train(updates, on_update=watch)
    return course(trainer, watch, theta)


@artifact
def proxy_points(updates: int, seed: int) -> dict[str, np.ndarray]:
    """From PPO without penalty on either reward and on both, as the paper does it."""
    from workingpapers.alignment.constrained_rlhf import estimate_proxy_points

    runs = []
    for alphas in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        trainer, watch = strings_trainer("ppo", np.ones(2), seed, alphas=alphas)
        trainer.train(updates, on_update=watch)
        runs.append(course(trainer, watch, np.ones(2)))
    returns = np.concatenate([np.column_stack([run["topic"], run["ending"]]) for run in runs])
    found = estimate_proxy_points(returns, np.concatenate([run["evaluation"] for run in runs]), random_state=seed)
    return {"theta": found.theta, "independent": found.independent}


def searched(updates: int, seed: int) -> dict[str, np.ndarray]:
    """Nelder-Mead on the thresholds while one policy trains, for as many updates as estimating and training take.

    Three quarters of them go to twelve proposals, the rest to the best one.
    """
    from workingpapers.alignment.constrained_rlhf import ThresholdSearch, starting_simplex

    trainer, watch = strings_trainer("xi", np.array([0.5, 0.5]), seed, proportional=DAMPED)
    trainer.train(1, on_update=watch)
    first = trainer.history[-1]

    def train_until(theta: np.ndarray) -> None:
        trainer.train_until(np.maximum(theta, 0.01), max_updates=updates // 4, on_update=watch)

    simplex = starting_simplex(np.array([first["return_0"], first["return_1"]]), np.ones(2), random_state=seed)
    found = ThresholdSearch(train_until, watch.last, simplex).run(12)
    while len(trainer.history) < 4 * updates:
        trainer.train_until(np.maximum(found.thresholds, 0.01), max_updates=1, on_update=watch)
    return course(trainer, watch, found.thresholds)


class Watch:
    """Remembers the evaluation of the policy after each update, on strings drawn for it alone."""

    def __init__(self, actor: Any, seed: int) -> None:
        import torch

        self.actor, self.generator = actor, torch.Generator().manual_seed(10_000 + seed)
        self.rows: list[tuple[float, float, float, float]] = []

    def __call__(self, row: dict[str, float]) -> None:
        self.rows.append((row["return_0"], row["return_1"], row["kl"], self.actor.quality(self.generator)))

    def last(self) -> float:
        return float(np.mean([row[3] for row in self.rows[-3:]]))


def course(trainer: ConstrainedPPO, watch: Watch, theta: np.ndarray) -> dict[str, np.ndarray]:
    columns = np.array(watch.rows).T
    return dict(zip(("topic", "ending", "kl", "evaluation"), columns, strict=True)) | {"thresholds": theta}


def strings_trainer(
    variant: Any,
    theta: np.ndarray,
    seed: int,
    *,
    alphas: tuple[float, ...] = (1.0, 1.0),
    kl_coef: float = 0.0,
    proportional: float = 0.0,
    learning_rate: float = 0.03,
) -> tuple[ConstrainedPPO, Watch]:
    from workingpapers.alignment.constrained_rlhf import ConstrainedPPO, ConstrainedPPOConfig

    actor = Strings(seed, 1 if variant in ("ppo", "sat") else 3)
    args = ConstrainedPPOConfig(
        learning_rate=learning_rate,
        episodes=128,
        minibatch=64,
        epochs=3,
        gamma=1.0,
        alphas=alphas,
        kl_coef=kl_coef,
        target_kl=None,
        proportional=proportional,
        random_state=seed,
    )
    trainer = ConstrainedPPO(actor, thresholds=theta.tolist(), variant=variant, args=args)
    return trainer, Watch(actor, seed)


class Strings:
    """A policy over strings of symbols that starts as the chain of a grammar: a table of logits for every position.

    Topic is the share of symbols that are among six key symbols, three of them of the wanted class; ending the share of
    the last four symbols that are of that class: each is easily overdone by repeating symbols. The evaluation is the
    mean of three things between 0 and 1: legal neighbours, distinct neighbours, and strings that are both on the topic
    (three different key symbols) and rightly ended (the last symbol).
    """

    def __init__(self, seed: int, streams: int) -> None:
        import torch

        from workingpapers.alignment import GoldRewardLab

        lab = GoldRewardLab(seed, symbols=SYMBOLS, length=LENGTH)
        chain = (1.0 - lab.leak) * lab.transition + lab.leak / SYMBOLS
        start = torch.from_numpy(np.log(np.tile(chain, (LENGTH - 1, 1, 1)))).float()
        self.reference = start
        self.logits = torch.nn.Parameter(start.clone())
        self.values = torch.nn.Parameter(torch.zeros(LENGTH - 1, SYMBOLS, streams))
        self.legal = torch.from_numpy(np.array(lab.legal))
        rng = np.random.default_rng([seed, 5])
        self.of_class = torch.arange(SYMBOLS) % 3 == 0
        right, wrong = (np.flatnonzero(part) for part in (self.of_class.numpy(), ~self.of_class.numpy()))
        self.key = torch.zeros(SYMBOLS, dtype=torch.bool)
        self.key[np.concatenate([rng.choice(right, 3, replace=False), rng.choice(wrong, 3, replace=False)])] = True

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.logits, self.values]

    def rollout(self, episodes: int, generator: torch.Generator) -> Episodes:
        import torch

        from workingpapers.alignment.constrained_rlhf import Episodes

        with torch.no_grad():
            text = self._write(episodes, generator)
            logprobs, reference = self._logprobs(self.logits, text), self._logprobs(self.reference, text)
        rewards = torch.zeros(episodes, LENGTH - 1, 2)
        rewards[:, -1, 0] = self.key[text].float().mean(1)
        rewards[:, -1, 1] = self.of_class[text[:, -4:]].float().mean(1)
        return Episodes(text, torch.ones(episodes, LENGTH - 1, dtype=torch.bool), logprobs, reference, rewards)

    def evaluate(self, episodes: Episodes, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        text = episodes.data[rows]
        return self._logprobs(self.logits, text), self.values[torch.arange(LENGTH - 1), text[:, :-1]]

    def quality(self, generator: torch.Generator) -> float:
        import torch

        with torch.no_grad():
            text = self._write(1_000, generator)
        legal = self.legal[text[:, :-1], text[:, 1:]].float().mean()
        pairs = (text[:, :-1] * SYMBOLS + text[:, 1:]).sort(1).values
        distinct = ((pairs.diff(dim=1) != 0).sum(1) + 1).float().mean() / (LENGTH - 1)
        present = torch.zeros(len(text), SYMBOLS, dtype=torch.bool).scatter_(1, text, True)
        success = ((present & self.key).sum(1) >= 3) & self.of_class[text[:, -1]]
        return float(legal + distinct + success.float().mean()) / 3.0

    def _write(self, episodes: int, generator: torch.Generator) -> torch.Tensor:
        import torch

        text = [torch.randint(SYMBOLS, (episodes,), generator=generator)]
        for step in self.logits.softmax(-1):
            text.append(torch.multinomial(step[text[-1]], 1, generator=generator).squeeze(1))
        return torch.stack(text, 1)

    @staticmethod
    def _logprobs(logits: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        import torch

        return logits.log_softmax(-1)[torch.arange(LENGTH - 1), text[:, :-1], text[:, 1:]]


# ---------------------------------------------------------------------------------------------------------------- cost


@benchmark(
    paper=PAPER,
    says="An update with multipliers, on three streams of rewards, takes at most 1.5 times as long as one of PPO on "
    "the summed reward.",
    published="",
    grid={
        "episodes": scales(smoke=[128], laptop=[128, 1_024]),
        "contender": ["xi", "PPO"],
    },
    expect=[faster("xi", than="PPO", by=1 / 1.5, each="episodes")],
    plot=bars(x="episodes", y="seconds", by="contender"),
)
def cost_of_an_update(cell: Cell) -> Row:
    from workingpapers.alignment.constrained_rlhf import ConstrainedPPO, ConstrainedPPOConfig

    args = ConstrainedPPOConfig(
        learning_rate=0.03, episodes=cell.episodes, minibatch=cell.episodes // 2, epochs=3, kl_coef=0.0, target_kl=None
    )
    variant: Any = "xi" if cell.contender == "xi" else "ppo"
    trainer = ConstrainedPPO(Strings(0, 3 if variant == "xi" else 1), thresholds=[0.5, 0.9], variant=variant, args=args)
    trainer.train(1)
    with cell.timed(calls=5):
        trainer.train(5)
    return {"topic": trainer.history[-1]["return_0"]}
