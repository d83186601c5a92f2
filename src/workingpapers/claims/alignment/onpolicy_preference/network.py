"""The bandit with the authors' network and schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from workingpapers.claims.alignment.onpolicy_preference.common import (
    ANSWERS,
    EXCEPTIONS,
    FIGURES,
    FOUR,
    LOSSES,
    PAPER,
    SIX,
    columns,
    last,
)
from workingpapers.desk.claim import (
    Axis,
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


# Best of 0.001, 0.003, 0.01 (and 0.03 for fixed samples of the losses that were best at 0.01 by far): fresh, fixed.
NETWORK_RATES: dict[int, dict[str, tuple[float, float]]] = {
    70: {
        "best of n": (0.01, 0.01),
        "RWR 0.25": (0.003, 0.01),
        "PPO": (0.003, 0.03),
        "IPO": (0.003, 0.01),
        "DPO": (0.01, 0.01),
        "RWR 0.02": (0.01, 0.01),
    },
    20: {
        "best of n": (0.003, 0.003),
        "RWR 0.25": (0.001, 0.001),
        "PPO": (0.003, 0.01),
        "IPO": (0.01, 0.01),
        "DPO": (0.003, 0.01),
        "RWR 0.02": (0.003, 0.001),
    },
}
NETWORK: dict[str, Axis] = {
    "width": scales(smoke=[], laptop=[10], paper=[10, 20, 30]),
    "rounds": scales(smoke=[], laptop=[20], paper=[100]),
    "seed": seeds(smoke=5, laptop=5, paper=5),
    "method": ["fresh", "fixed"],
}


@claim(
    paper=PAPER,
    says="On the authors' network and schedule, far peak: fresh samples end at a higher reward than as many fixed "
    "ones, with every loss.",
    published=FIGURES,
    grid={"loss": SIX, "centre": [70], **NETWORK},
    expect=[higher("reward", "fresh", than="fixed", each="loss")],
    plot=bars(x="loss", y="reward", by="method"),
)
def network_far_peak(cell: Cell) -> Row:
    return _network(cell)


@claim(
    paper=PAPER,
    says="The same for the losses that do not find the peak in fixed samples.",
    published=FIGURES,
    grid={"loss": [name for name in SIX if name not in EXCEPTIONS], "centre": [70], **NETWORK},
    expect=[higher("reward", "fresh", than="fixed", each="loss")],
    plot=bars(x="loss", y="reward", by="method"),
)
def network_far_peak_but_for_two_losses(cell: Cell) -> Row:
    return _network(cell)


@claim(
    paper=PAPER,
    says="On the authors' network, near peak: fresh samples gain less than 0.1 with every loss.",
    published="when the reference already prefers the best answers, on-policy sampling makes little difference",
    grid={"loss": FOUR, "centre": [20], **NETWORK},
    expect=[lower("reward", "fresh", than="fixed", margin=0.1, each="loss")],
    plot=bars(x="loss", y="reward", by="method"),
)
def network_near_peak(cell: Cell) -> Row:
    return _network(cell)


def _network(cell: Cell) -> Row:
    rate = NETWORK_RATES[cell.centre][cell.loss][cell.method == "fixed"]
    return last(network_curve(cell.loss, cell.method, cell.centre, cell.width, cell.rounds, cell.seed, rate))


@artifact
def network_curve(
    loss: str, source: str, centre: int, width: int, rounds: int, seed: int, rate: float
) -> dict[str, np.ndarray]:
    """10 contexts and 15 steps in each round, or one batch of as many contexts and steps; 100 held-out contexts."""
    import torch

    from workingpapers.alignment import PreferenceTuner, testbeds

    env = testbeds.bump_bandit(centre, width)
    fresh = source == "fresh"
    contexts = env.contexts(10 if fresh else 10 * rounds, random_state=2 * seed)
    tuner = PreferenceTuner(
        env.policy(contexts, random_state=seed),
        env.reference(),
        env.reward,
        on_policy=fresh,
        inner_steps=15 if fresh else 15 * rounds,
        batch_size=len(contexts) * ANSWERS,
        responses_per_prompt=ANSWERS,
        lr=rate,
        generator=torch.Generator().manual_seed(seed),
        **LOSSES[loss],
    )
    held_out = env.contexts(100, random_state=2 * seed + 1)
    return columns(
        tuner.fit(contexts, 10 * ANSWERS * rounds, eval_prompts=held_out, evaluate_every=15 * max(1, rounds // 4))
    )
