"""Finite games whose preferences are known: everything is exact."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

from workingpapers.common.validation import require
from workingpapers.desk.claim import (
    Cell,
    Row,
    always,
    bars,
    benchmark,
    claim,
    faster,
    line,
    lower,
    scales,
    seeds,
    slope,
)

PAPER = "direct-nash"
SIZES = scales(smoke=[4, 10, 30], laptop=[4, 10, 30, 100], paper=[4, 10, 30, 100, 300])
THEORY = "no numbers: the paper states it as a theorem or in passing"


def circular_game(actions: int, seed: int) -> np.ndarray:
    """Random preferences, in which answers 0 > 1 > 2 > 0 with probability 0.9 and all three beat all others.

    Without the planted circle some games have an answer that beats all others, and then every method finds it.
    """
    from scipy.special import expit

    rng = np.random.default_rng([seed, actions])
    upper = np.triu(rng.standard_normal((actions, actions)), 1)
    game: np.ndarray = expit(upper - upper.T)
    for y in range(3):
        game[y, 3:] = 0.6 + 0.3 * rng.random(actions - 3)
        game[3:, y] = 1 - game[y, 3:]
        z = (y + 1) % 3
        game[y, z], game[z, y] = 0.9, 0.1
    return game


def bradley_terry_rewards(game: np.ndarray) -> np.ndarray:
    """The Bradley-Terry model that fits all pairs of different answers best, by Newton's method."""
    from scipy.special import expit

    reward = np.zeros(len(game))
    others = ~np.eye(len(game), dtype=bool)
    for _ in range(50):
        share = expit(reward[:, None] - reward)
        weight = share * (1 - share) * others
        hessian = np.diag(weight.sum(1)) - weight + np.full_like(weight, 1 / len(game))
        reward = reward + np.linalg.solve(hessian, ((game - share) * others).sum(1))
    return reward


@claim(
    paper=PAPER,
    says="Every exact round beats its predecessor: its win rate is at least 1/2 plus eta times the divergence.",
    published="monotonic improvement (section 3); no numbers",
    grid={"actions": SIZES, "eta": [0.1, 0.5, 2.0], "seed": seeds(smoke=5, laptop=20)},
    expect=[always("slack", at_least=-1e-9)],
    plot=bars(x="actions", y="slack", by="eta", log="y"),
)
def monotone_improvement(cell: Cell) -> Row:
    from workingpapers.alignment import nash_policy

    found = nash_policy(circular_game(cell.actions, cell.seed), cell.eta, 400)
    return {"slack": float((found.improvement_trace - 0.5 - cell.eta * found.kl_trace).min())}


METHODS = ["mean of all rounds", "last round", "best on average", "Bradley-Terry, eta 0.5", "Bradley-Terry, best eta"]


@claim(
    paper=PAPER,
    says="Where preferences go in circles, the mean policy of 400 rounds is hard to beat; the last one, the answer "
    "that wins most on average, and policies that maximise a Bradley-Terry reward, even at the least exploitable "
    "temperature, are not.",
    published=THEORY,
    grid={"actions": SIZES, "seed": seeds(smoke=5, laptop=20)},
    expect=[
        lower("exploitability", METHODS[0], than=METHODS[1:], each="actions", where={"round": "last"}),
        lower("exploitability", METHODS[0], than=0.03, each="actions", where={"round": "last"}),
    ],
    plot=line(x="round", y="exploitability", by="method", log="xy", each="actions"),
)
def means_are_hard_to_beat(cell: Cell) -> list[Row]:
    from scipy.special import softmax

    from workingpapers.alignment import borda_scores, exploitability, nash_policy

    game, rounds = circular_game(cell.actions, cell.seed), 400
    found = nash_policy(game, 0.5, rounds)
    reward = bradley_terry_rewards(game)

    def of(policy: np.ndarray) -> float:
        return float(exploitability(game, policy))

    still = {
        METHODS[2]: of(np.eye(cell.actions)[borda_scores(game).argmax()]),
        METHODS[3]: of(softmax(reward / 0.5)),
        METHODS[4]: min(of(softmax(reward / eta)) for eta in np.geomspace(0.01, 10.0, 61)),
    }
    rows: list[Row] = []
    for number in (1, 5, 20, 80, rounds):
        values = {
            METHODS[0]: found.exploitability_trace[number - 1],
            METHODS[1]: found.last_exploitability_trace[number - 1],
        } | still
        rows += [
            {"method": method, "round": number, "exploitability": float(value)} for method, value in values.items()
        ]
    return rows


@claim(
    paper=PAPER,
    says="With the best temperature for T rounds the exploitability of the mean policy is below sqrt(log A / (2 T)), "
    "and falls at least as fast as T^-0.4.",
    published="averages approach the equilibrium at the rate of no-regret learning; no numbers",
    grid={
        "actions": SIZES,
        "rounds": scales(smoke=[100, 400, 1_600], laptop=[100, 400, 1_600, 6_400], paper=[100, 1_000, 10_000]),
        "seed": seeds(smoke=5, laptop=20),
    },
    expect=[
        always("share_of_bound", at_most=1.0),
        slope("exploitability", over="rounds", at_most=-0.4, each="actions"),
    ],
    plot=line(x="rounds", y="exploitability", by="actions", log="xy"),
)
def rate_of_the_mean(cell: Cell) -> Row:
    from workingpapers.alignment import nash_policy

    found = nash_policy(circular_game(cell.actions, cell.seed), "auto", cell.rounds)
    reached = float(found.exploitability_trace[-1])
    return {
        "exploitability": reached,
        "share_of_bound": reached / math.sqrt(math.log(cell.actions) / (2 * cell.rounds)),
    }


@claim(
    paper=PAPER,
    says="The regression on win rates has the soft policy iteration as its solution, whatever full-support "
    "distribution the pairs are drawn from.",
    published="equations 7 to 9: pi_{t+1} ~ pi_t exp(r_t / eta) for any sampling distributions",
    grid={
        "actions": scales(smoke=[4, 10], laptop=[4, 10, 30]),
        "pairs_from": ["uniform", "the policy", "elsewhere"],
        "seed": seeds(smoke=5, laptop=10),
    },
    expect=[always("distance", at_most=1e-6)],
    plot=bars(x="actions", y="distance", by="pairs_from", log="y"),
)
def regression_reaches_the_target(cell: Cell) -> Row:
    import torch

    from workingpapers.alignment import DNOLoss, nash_policy

    eta, game = 0.5, circular_game(cell.actions, cell.seed)
    rng = np.random.default_rng([cell.seed, 1])
    policy = 0.5 * rng.dirichlet(np.ones(cell.actions)) + 0.5 / cell.actions
    target = nash_policy(game, eta, 1, init=policy).policy_last
    first, second = (torch.tensor(side) for side in zip(*itertools.combinations(range(cell.actions), 2), strict=True))
    of_answers = {
        "uniform": np.ones(cell.actions),
        "the policy": policy,
        "elsewhere": 0.1 + rng.random(cell.actions),
    }[cell.pairs_from]
    answers = torch.from_numpy(of_answers / of_answers.sum())
    weights = answers[first] * answers[second] / (answers[first] * answers[second]).sum()
    old, rates = torch.from_numpy(np.log(policy)), torch.from_numpy(game @ policy)
    logits, loss = old.clone().requires_grad_(), DNOLoss(eta, reduction="none")
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2_000, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        now = logits.log_softmax(0)
        out = loss(now[first], now[second], old[first], old[second], rates[first], rates[second])
        total: torch.Tensor = (weights * out.loss).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return {"distance": float(np.abs(logits.detach().softmax(0).numpy() - target).sum())}


@claim(
    paper=PAPER,
    says="With regularised preferences (tau 0.1) the last policy converges, and its distance from the regularised "
    "equilibrium falls as 1 / eta.",
    published="appendix A: as in Nash-MD, the last iterate converges; no numbers",
    grid={"eta": scales(smoke=[10, 100], laptop=[10, 100, 1_000]), "seed": seeds(smoke=5, laptop=10)},
    expect=[
        always("last_step", at_most=1e-9),
        slope("distance", over="eta", at_most=-0.9, at_least=-1.1),
    ],
    plot=line(x="eta", y="distance", log="xy"),
)
def regularised_last_round(cell: Cell) -> Row:
    from scipy.special import softmax

    from workingpapers.alignment import nash_policy

    game, tau = circular_game(6, cell.seed), 0.1
    found = nash_policy(game, cell.eta, int(30 * cell.eta / tau), tau)
    longer = nash_policy(game, cell.eta, 1, tau, ref=np.full(6, 1 / 6), init=found.policy_last)
    equilibrium = np.full(6, 1 / 6)
    for _ in range(2_000):  # a damped fixed point of pi ~ exp(E P / tau)
        equilibrium = 0.95 * equilibrium + 0.05 * softmax(game @ equilibrium / tau)
    return {
        "distance": float(np.abs(found.policy_last - equilibrium).sum()),
        "last_step": float(np.abs(longer.policy_last - found.policy_last).sum()),
    }


@benchmark(
    paper=PAPER,
    says="Reaching an exploitability of 0.02 takes less time than nashpy's fictitious play or its linear program; our "
    "own linear program is faster than nashpy's.",
    grid={
        "actions": scales(smoke=[30], laptop=[30, 100, 300], paper=[100, 1_000]),
        "contender": ["self-play", "linear program", "nashpy, fictitious play", "nashpy, linear program"],
    },
    expect=[
        faster("self-play", than=["nashpy, fictitious play", "nashpy, linear program"], each="actions"),
        faster("linear program", than="nashpy, linear program", each="actions"),
    ],
    plot=line(x="actions", y="seconds", by="contender", log="xy"),
)
def time_to_equilibrium(cell: Cell) -> Row:
    """Games of one context, as nashpy takes them; fictitious play looks at its exploitability every 20 plays."""
    from workingpapers.alignment import exact_nash, exploitability, nash_policy

    nashpy = require("nashpy", extra="peers")
    game, wanted = circular_game(cell.actions, 0), 0.02

    def fictitious_play() -> np.ndarray:
        plays = nashpy.Game(game - 0.5).fictitious_play(iterations=20_000, play_counts=None)
        for number, (counts, _) in enumerate(plays, start=1):
            if number % 20 == 0 and (game @ counts).max() / counts.sum() - 0.5 <= wanted:
                break
        policy: np.ndarray = counts / counts.sum()
        return policy

    contenders: dict[str, Callable[[], np.ndarray]] = {
        "self-play": lambda: nash_policy(game, 0.5, 5_000, tol=wanted).policy_avg,
        "linear program": lambda: exact_nash(game),
        "nashpy, fictitious play": fictitious_play,
        "nashpy, linear program": lambda: nashpy.Game(game - 0.5).linear_program()[0],
    }
    with cell.timed():
        policy = contenders[cell.contender]()
    reached = np.maximum(policy, 0.0) / np.maximum(policy, 0.0).sum()
    return {"exploitability": float(exploitability(game, reached))}
