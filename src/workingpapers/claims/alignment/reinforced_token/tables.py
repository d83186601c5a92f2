"""Claims about samples: answers from a table of tokens whose true return is exact."""

from __future__ import annotations

import itertools

import numpy as np

from workingpapers.claims.alignment.reinforced_token.problems import (
    ABLATION,
    PAPER,
    TABLE,
    curve,
    reached,
    token_problem,
)
from workingpapers.desk.claim import Axis, Cell, Row, bars, claim, higher, line, lower, scales, scatter, seeds, slope

ARMS = ("PPO", "RTO")
CURVE = line(x="iteration", y="gain")


EARLY: dict[str, Axis] = {
    "horizon": [40],
    "batch": [32],
    "iterations": scales(smoke=[20], laptop=[60]),
    "seed": seeds(smoke=5, laptop=8, paper=20),
}
LONG = EARLY | {"iterations": scales(smoke=[], laptop=[60])}


@claim(
    paper=PAPER,
    says="Answers of 40 tokens, 32 of them an iteration: after 10 and after 20 iterations RTO's true return is above "
    "that of PPO on the sentence reward.",
    published=TABLE,
    grid={**EARLY, "method": ["PPO", "RTO"]},
    expect=[higher("gain", "RTO", than="PPO", where={"iteration": at}) for at in (10, 20)],
    plot=CURVE,
)
def ahead_of_ppo_early(cell: Cell) -> list[Row]:
    return curve_rows(cell)


@claim(
    paper=PAPER,
    says="It is so, too, when the log-ratios are paid more than three times as much (beta1 1).",
    published="guideline: beta1 small enough that the DPO part does not dominate",
    grid={**LONG, "method": ["PPO", "RTO, beta1 1"]},
    expect=[higher("gain", "RTO, beta1 1", than="PPO", where={"iteration": at}) for at in (10, 20)],
    plot=CURVE,
)
def ahead_with_a_large_weight(cell: Cell) -> list[Row]:
    return curve_rows(cell)


@claim(
    paper=PAPER,
    says="REINFORCE gains from the same rewards: after 10 and after 20 iterations it is above REINFORCE on the "
    "sentence reward.",
    published="REINFORCE-type algorithms can use the token rewards (appendix)",
    grid={**LONG, "method": ["REINFORCE", "RTO, REINFORCE"]},
    expect=[higher("gain", "RTO, REINFORCE", than="REINFORCE", where={"iteration": at}) for at in (10, 20)],
    plot=CURVE,
)
def ahead_of_reinforce_early(cell: Cell) -> list[Row]:
    return curve_rows(cell)


@claim(
    paper=PAPER,
    says="After 20 iterations RTO is above all others that see the same pairs: PPO and REINFORCE, which draw as many "
    "answers, and DPO, which draws none.",
    published=TABLE,
    grid={**LONG, "method": ["DPO", "PPO", "REINFORCE", "RTO"]},
    expect=[higher("gain", "RTO", than=["DPO", "PPO", "REINFORCE"], where={"iteration": 20})],
    plot=CURVE,
)
def best_of_the_family_early(cell: Cell) -> list[Row]:
    return curve_rows(cell)


@claim(
    paper=PAPER,
    says="After 60 iterations RTO is above DPO and still above PPO, with 32 and with 128 answers an iteration.",
    published=TABLE,
    grid={**LONG, "batch": [32, 128], "method": ["DPO", "PPO", "RTO"]},
    expect=[higher("gain", "RTO", than=["DPO", "PPO"], each="batch", where={"iteration": "last"})],
    plot=line(x="iteration", y="gain", each="batch"),
)
def ahead_at_the_end(cell: Cell) -> list[Row]:
    return curve_rows(cell)


@claim(
    paper=PAPER,
    says="It is where the log-ratios are paid that matters: after 10 and after 20 iterations RTO and RS-PPO are above "
    "DDPO, which pays their sum at the last token.",
    published=ABLATION,
    grid={**EARLY, "method": ["RTO", "DDPO", "RS-PPO"]},
    expect=[
        higher("gain", ours, than="DDPO", where={"iteration": at})
        for ours, at in itertools.product(("RTO", "RS-PPO"), (10, 20))
    ],
    plot=CURVE,
)
def where_it_is_paid(cell: Cell) -> list[Row]:
    return curve_rows(cell)


@claim(
    paper=PAPER,
    says="Paid token by token (RTO) is better than paid sentence by sentence (Semi-RTO, eight tokens each on average), "
    "and that better than paid at the end (DDPO), after 20 iterations.",
    published=ABLATION,
    grid={**LONG, "method": ["RTO", "Semi-RTO", "DDPO"]},
    expect=[
        higher("gain", "RTO", than="Semi-RTO", where={"iteration": 20}),
        higher("gain", "Semi-RTO", than="DDPO", where={"iteration": 20}),
    ],
    plot=CURVE,
)
def how_finely_it_is_paid(cell: Cell) -> list[Row]:
    return curve_rows(cell)


@claim(
    paper=PAPER,
    says="The longer the answers, the more answers PPO needs for each one of RTO, to gain half of what PPO gains in "
    "all its iterations.",
    published="sentence reward A^H queries, token reward A^min(xi + 1, H) (Proposition 3.2)",
    grid={**EARLY, "horizon": scales(smoke=[5, 40], laptop=[5, 10, 20, 40, 80])},
    expect=[slope("answers_ratio", over="horizon", at_least=0.0)],
    plot=scatter(x="horizon", y="answers_ratio", by="horizon", log="x"),
)
def gap_by_horizon(cell: Cell) -> Row:
    gains = {method: curve(method, cell.horizon, cell.batch, cell.iterations, cell.seed)["gain"] for method in ARMS}
    level = 0.5 * gains["PPO"].max()
    needed = {method: reached(gain, level) for method, gain in gains.items()}
    return {
        "answers_ratio": needed["PPO"] / needed["RTO"],
        "gap_at_20": float(gains["RTO"][20] - gains["PPO"][20]),
        "gap_at_20_per_token": float(gains["RTO"][20] - gains["PPO"][20]) / cell.horizon,
    }


@claim(
    paper=PAPER,
    says="RTO reaches with an eighth of the answers what PPO gains in 20 iterations.",
    published="RTO reaches PPO's level with about 1/8 of the prompts",
    grid=EARLY,
    expect=[lower("share", "RTO", than=0.125)],
    plot=bars(x="method", y="share"),
)
def an_eighth_of_the_answers(cell: Cell) -> Row:
    return share_of_answers(cell)


@claim(
    paper=PAPER,
    says="RTO reaches with fewer answers, at most nine tenths, what PPO gains in 20 iterations.",
    published="RTO reaches PPO's level with about 1/8 of the prompts",
    grid=EARLY,
    expect=[lower("share", "RTO", than=0.9)],
    plot=bars(x="method", y="share"),
)
def fewer_answers(cell: Cell) -> Row:
    return share_of_answers(cell)


def share_of_answers(cell: Cell) -> Row:
    gains = {method: curve(method, cell.horizon, cell.batch, cell.iterations, cell.seed)["gain"] for method in ARMS}
    return {"method": "RTO", "share": reached(gains["RTO"], gains["PPO"][20]) / 20}


def curve_rows(cell: Cell) -> list[Row]:
    if cell.method == "DPO":  # it draws nothing: the same after every iteration
        gain = np.full(cell.iterations + 1, float(token_problem(cell.horizon, cell.seed)["dpo_gain"]))
    else:
        gain = curve(cell.method, cell.horizon, cell.batch, cell.iterations, cell.seed)["gain"]
    return [{"iteration": at, "gain": float(gain[at])} for at in range(0, cell.iterations + 1, 10)]
