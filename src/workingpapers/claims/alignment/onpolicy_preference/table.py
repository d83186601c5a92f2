"""The bandit with a table of logits in place of a network, 2,000 reward queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from workingpapers.claims.alignment.onpolicy_preference.common import (
    ANSWERS,
    BUDGETS,
    EXCEPTIONS,
    FIGURES,
    FOUR,
    LOSSES,
    PAPER,
    QUERIES,
    SIX,
    TABLE_RATES,
    columns,
    last,
)
from workingpapers.desk.claim import (
    Cell,
    Row,
    artifact,
    bars,
    claim,
    higher,
    lower,
    scales,
    seeds,
)

if TYPE_CHECKING:
    pass


SEEDS = seeds(smoke=5, laptop=8, paper=20)


@claim(
    paper=PAPER,
    says="Where the best action is rare under the reference, fresh samples end at a higher reward than as many fixed "
    "ones, with every loss.",
    published=FIGURES,
    grid={
        "loss": scales(smoke=[], laptop=list(LOSSES)),
        "centre": [70],
        "seed": SEEDS,
        "method": ["fresh", "fixed"],
    },
    expect=[higher("reward", "fresh", than="fixed", each="loss")],
    plot=bars(x="loss", y="reward", by="method"),
)
def far_peak(cell: Cell) -> Row:
    return last(_table(cell.loss, cell.method, cell.centre, cell.seed))


@claim(
    paper=PAPER,
    says="They do with all losses but two, DPO and sharply weighted regression, which find the peak in the tail of "
    "fixed samples.",
    published=FIGURES,
    grid={
        "loss": scales(smoke=FOUR, laptop=[name for name in LOSSES if name not in EXCEPTIONS]),
        "centre": [70],
        "seed": SEEDS,
        "method": ["fresh", "fixed"],
    },
    expect=[higher("reward", "fresh", than="fixed", each="loss")],
    plot=bars(x="loss", y="reward", by="method"),
)
def far_peak_but_for_two_losses(cell: Cell) -> Row:
    return last(_table(cell.loss, cell.method, cell.centre, cell.seed))


@claim(
    paper=PAPER,
    says="Fresh samples gain more where the peak is far from the reference than where it is near.",
    published="on-policy sampling matters less when the peak of the reward is close to the reference",
    grid={"loss": FOUR, "seed": SEEDS, "method": ["far", "near"]},
    expect=[higher("gain", "far", than="near", each="loss")],
    plot=bars(x="loss", y="gain", by="method"),
)
def gain_of_fresh_samples(cell: Cell) -> Row:
    centre = {"far": 70, "near": 20}[cell.method]
    fresh, fixed = (last(_table(cell.loss, source, centre, cell.seed)) for source in ("fresh", "fixed"))
    return {"gain": fresh["reward"] - fixed["reward"]}


@claim(
    paper=PAPER,
    says="Where the peak is near, fresh samples gain less than 0.1, with every loss.",
    published="when the reference already prefers the best answers, on-policy sampling makes little difference",
    grid={"loss": scales(smoke=[], laptop=list(LOSSES)), "centre": [20], "seed": SEEDS, "method": ["fresh", "fixed"]},
    expect=[lower("reward", "fresh", than="fixed", margin=0.1, each="loss")],
    plot=bars(x="loss", y="reward", by="method"),
)
def near_peak(cell: Cell) -> Row:
    return last(_table(cell.loss, cell.method, cell.centre, cell.seed))


@claim(
    paper=PAPER,
    says="With fixed samples and a far peak, losses that push bad answers down (DPO, IPO) end higher than all that do "
    "not.",
    published="offline DPO and IPO end higher than best-of-n and Pref-FT when the peak is far from the reference",
    grid={
        "centre": scales(smoke=[], laptop=[70]),
        "seed": SEEDS,
        "method": ["DPO", "IPO", "best of n", "Pref-FT", "RWR 0.25", "RWR 0.02"],
    },
    expect=[higher("reward", ours, than=["best of n", "Pref-FT", "RWR 0.25", "RWR 0.02"]) for ours in ("DPO", "IPO")],
    plot=bars(x="method", y="reward"),
)
def push_down_on_fixed_samples(cell: Cell) -> Row:
    return last(_table(cell.method, "fixed", cell.centre, cell.seed))


@claim(
    paper=PAPER,
    says="DPO and IPO do end higher than the likelihood of winners, best of n and Pref-FT.",
    published="offline DPO and IPO end higher than best-of-n and Pref-FT when the peak is far from the reference",
    grid={"centre": scales(smoke=[], laptop=[70]), "seed": SEEDS, "method": ["DPO", "IPO", "best of n", "Pref-FT"]},
    expect=[higher("reward", ours, than=["best of n", "Pref-FT"]) for ours in ("DPO", "IPO")],
    plot=bars(x="method", y="reward"),
)
def push_down_against_winners(cell: Cell) -> Row:
    return last(_table(cell.method, "fixed", cell.centre, cell.seed))


@claim(
    paper=PAPER,
    says="IPO ends higher on fixed samples than best of n.",
    published="offline IPO ends higher than best-of-n when the peak is far from the reference",
    grid={"centre": [70], "seed": SEEDS, "method": ["IPO", "best of n"]},
    expect=[higher("reward", "IPO", than="best of n")],
    plot=bars(x="method", y="reward"),
)
def ipo_against_best_of_n(cell: Cell) -> Row:
    return last(_table(cell.method, "fixed", cell.centre, cell.seed))


@claim(
    paper=PAPER,
    says="Fresh samples with a loss that pushes down (DPO, IPO) are the best of all ways.",
    published="on-policy sampling and the negative gradient complement each other",
    grid={
        "centre": scales(smoke=[], laptop=[70]),
        "seed": SEEDS,
        "method": [f"{name} {source}" for name in SIX for source in ("fresh", "fixed")],
    },
    expect=[
        higher(
            "reward",
            ours,
            than=[f"{name} {source}" for name in SIX for source in ("fresh", "fixed") if f"{name} {source}" != ours],
        )
        for ours in ("DPO fresh", "IPO fresh")
    ],
    plot=bars(x="method", y="reward"),
)
def fresh_and_push_down(cell: Cell) -> Row:
    name, _, source = cell.method.rpartition(" ")
    return last(_table(name, source, cell.centre, cell.seed))


TO_REACH = 0.8


@claim(
    paper=PAPER,
    says="Whatever is counted, reward queries, gradient steps, tokens drawn or tokens trained on, fresh samples need "
    "less of it to reach a reward of 0.8; fixed samples that never do so count with all they used.",
    published="on-policy sampling is more sample-efficient; budgets are counted in queries and in gradient steps",
    grid={
        "loss": scales(smoke=[], laptop=SIX),
        "centre": [70],
        "seed": SEEDS,
        "method": ["fresh", "fixed"],
    },
    expect=[lower(budget, "fresh", than="fixed", factor=1.0, each="loss") for budget in BUDGETS],
    plot=bars(x="loss", y="trained_tokens", by="method", log="y"),
)
def budgets_side_by_side(cell: Cell) -> Row:
    return _until_reached(cell)


def _until_reached(cell: Cell) -> Row:
    curve = _table(cell.loss, cell.method, cell.centre, cell.seed)
    there = np.flatnonzero(curve["reward"] >= TO_REACH)
    place = there[0] if len(there) else -1
    return {"reached": bool(len(there)), **{budget: float(curve[budget][place]) for budget in BUDGETS}}


@claim(
    paper=PAPER,
    says="The effective sample size of reference samples tells where to draw fresh ones: where `recommend` says so "
    "they gain more than 0.1, and more than where it does not.",
    published="how far the peak is from the reference decides whether on-policy sampling is needed",
    grid={
        "centre": scales(smoke=[], laptop=[14, 30, 50, 70, 90]),
        "seed": SEEDS,
    },
    expect=[higher("gain", "advised", than=[0.1, "not advised"], paired_by=["seed"])],
    plot=bars(x="centre", y="gain"),
)
def advice(cell: Cell) -> Row:
    """Best of n; the gap comes from 1,000 samples at beta 0.1."""
    import torch

    from workingpapers.alignment import alignment_gap, recommend, testbeds

    env = testbeds.bump_bandit(cell.centre)
    generator = torch.Generator().manual_seed(cell.seed)
    rewards = env.reward(None, env.reference().sample(env.contexts(1), 1_000, generator))
    gap = alignment_gap(rewards, beta=0.1)
    rates = TABLE_RATES[70]["best of n"]
    fresh, fixed = (
        table_curve("best of n", source, cell.centre, cell.seed, rate)["reward"][-1]
        for source, rate in zip(("fresh", "fixed"), rates, strict=True)
    )
    advised = recommend(gap, QUERIES).on_policy
    return {"method": "advised" if advised else "not advised", "gain": float(fresh - fixed), "share": gap.share}


def _table(loss: str, source: str, centre: int, seed: int) -> dict[str, np.ndarray]:
    return table_curve(loss, source, centre, seed, TABLE_RATES[centre][loss][source == "fixed"])


@artifact
def table_curve(loss: str, source: str, centre: int, seed: int, rate: float) -> dict[str, np.ndarray]:
    """2,000 queries and 100 gradient steps: 20 rounds of 10 prompts and 5 steps, or 100 steps on all samples."""
    import torch

    from workingpapers.alignment import PreferenceTuner, testbeds

    env = testbeds.bump_bandit(centre)
    fresh = source == "fresh"
    tuner = PreferenceTuner(
        env.table(),
        env.reference(),
        env.reward,
        on_policy=fresh,
        inner_steps=5 if fresh else 100,
        batch_size=10 * ANSWERS if fresh else QUERIES,
        responses_per_prompt=ANSWERS,
        lr=rate,
        generator=torch.Generator().manual_seed(seed),
        **LOSSES[loss],
    )
    contexts = env.contexts(QUERIES // ANSWERS)  # the table does not look at them
    return columns(tuner.fit(contexts, QUERIES, eval_prompts=contexts[:1], evaluate_every=5))


# --------------------------------------------------------------------------------------------------- reuse of a batch

REUSED = ["best of n", "DPO", "IPO", "REINFORCE", "RWR 0.25", "PPO"]


@claim(
    paper=PAPER,
    says="At a fixed learning rate, moderate reuse of each batch (5 steps) beats one step, and 50 steps are worse than "
    "5, for every loss but PPO.",
    published="moderate sample reuse improves sample efficiency, too much of it hurts, PPO tolerates more",
    grid={
        "loss": scales(smoke=[], laptop=REUSED[:5]),
        "rate": [0.1],
        "seed": seeds(smoke=5, laptop=5, paper=20),
        "method": ["1 step", "5 steps", "50 steps"],
    },
    expect=[higher("reward", "5 steps", than=["1 step", "50 steps"], each="loss")],
    plot=bars(x="loss", y="reward", by="method"),
)
def reuse(cell: Cell) -> Row:
    return {"reward": _reward_after(cell.loss, int(cell.method.split()[0]), cell.rate, cell.seed)}


@claim(
    paper=PAPER,
    says="PPO is not hurt by 50 steps on each batch: it loses less than 0.01 against 5.",
    published="PPO tolerates more reuse than the other losses",
    grid={
        "loss": scales(smoke=[], laptop=["PPO"]),
        "rate": [0.1],
        "seed": seeds(smoke=5, laptop=5, paper=20),
        "method": ["5 steps", "50 steps"],
    },
    expect=[higher("reward", "50 steps", than="5 steps", margin=-0.01)],
    plot=bars(x="loss", y="reward", by="method"),
)
def reuse_by_ppo(cell: Cell) -> Row:
    return {"reward": _reward_after(cell.loss, int(cell.method.split()[0]), cell.rate, cell.seed)}


@claim(
    paper=PAPER,
    says="With the learning rate chosen for each number of steps, reuse gains nothing: one step at rate 1 comes within "
    "0.05 of five at 0.1.",
    published="moderate sample reuse improves sample efficiency",
    grid={
        "loss": scales(smoke=[], laptop=REUSED),
        "seed": seeds(smoke=5, laptop=5, paper=20),
        "method": ["1 step, rate 1", "5 steps, rate 0.1"],
    },
    expect=[higher("reward", "1 step, rate 1", than="5 steps, rate 0.1", margin=-0.05, each="loss")],
    plot=bars(x="loss", y="reward", by="method"),
)
def reuse_or_learning_rate(cell: Cell) -> Row:
    steps, rate = cell.method.split(", rate ")
    return {"reward": _reward_after(cell.loss, int(steps.split()[0]), float(rate), cell.seed)}


def _reward_after(loss: str, steps: int, rate: float, seed: int) -> float:
    return float(reused(loss, steps, rate, seed)["reward"][0])


@artifact
def reused(loss: str, steps: int, rate: float, seed: int) -> dict[str, np.ndarray]:
    """Final reward of 20 rounds of 100 fresh samples with a number of steps on each; the peak is far."""
    import torch

    from workingpapers.alignment import PreferenceTuner, testbeds

    env = testbeds.bump_bandit(70)
    tuner = PreferenceTuner(
        env.table(),
        env.reference(),
        env.reward,
        inner_steps=steps,
        batch_size=10 * ANSWERS,
        responses_per_prompt=ANSWERS,
        lr=rate,
        generator=torch.Generator().manual_seed(seed),
        **LOSSES[loss],
    )
    contexts = env.contexts(10)
    history = tuner.fit(contexts, QUERIES, eval_prompts=contexts[:1], evaluate_every=20 * steps)
    return {"reward": np.array([history.reward[-1]])}
