"""A log-linear model, in which explaining and choosing share weights; and the loss's identities."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.desk.claim import Axis, Cell, Row, always, artifact, bars, claim, higher, line, lower, scales, seeds

if TYPE_CHECKING:
    import torch

PAPER = "rationale-preference"
WIN_RATES = "GPT-4 prefers RDPO to DPO in more than 60 % of answers (Orca and UltraFeedback pairs)"
SAVING = "RDPO reaches a 60 % win rate over supervised tuning with 3,000 Orca pairs, DPO with 9,000"

# ------------------------------------------------------------------------------------------------- the loss, exactly


@claim(
    paper=PAPER,
    says="With gamma 0 each loss is its base to the last bit, and the code's log-sigmoid link weighs a rationale "
    "between gamma and half of gamma.",
    published="not stated; the paper's formula is linear in the rationale's log-probability, its code is not",
    grid={"base": ["dpo", "orpo", "simpo"], "seed": seeds(smoke=5, laptop=20)},
    expect=[always("is_base"), always("steepest", at_most=1.0), always("flattest", at_least=0.5)],
    plot=bars(x="base", y="flattest", by="base"),
)
def identities(cell: Cell) -> Row:
    import torch

    from workingpapers.alignment import RationaleLoss, dpo_losses
    from workingpapers.alignment.rationale_preference import orpo_losses, simpo_losses

    generator = torch.Generator().manual_seed(cell.seed)
    pairs, gamma = 256, 0.1
    lengths = torch.randint(1, 300, (3, pairs), generator=generator)
    logps = -lengths * torch.rand(3, pairs, generator=generator) * 4.0
    reference = logps[:2] - torch.randn(2, pairs, generator=generator).abs()
    named = dict(zip(("chosen_lengths", "rejected_lengths", "rationale_lengths"), lengths, strict=True))
    chosen, rejected = logps[:2] / lengths[:2]
    plain = {
        "dpo": lambda: dpo_losses(logps[0] - reference[0], logps[1] - reference[1], beta=0.1),
        "orpo": lambda: orpo_losses(chosen, rejected, beta=0.1) - logps[0] / lengths[0].double().mean().item(),
        "simpo": lambda: simpo_losses(chosen, rejected, beta=0.1, margin=0.5),
    }
    found = RationaleLoss(cell.base, gamma=0.0, reduction="none")(*logps, *reference, **named).loss
    scores = logps[2].double().requires_grad_()
    linked = RationaleLoss(cell.base, gamma=gamma, rationale_link="logsigmoid", reduction="sum")
    linked(*logps[:2].double(), scores, *reference.double(), **named).loss.backward()
    assert scores.grad is not None
    slopes = -scores.grad / gamma
    return {
        "is_base": bool(torch.equal(found, plain[cell.base]())),
        "steepest": slopes.max().item(),
        "flattest": slopes.min().item(),
    }


# ---------------------------------------------------------- a log-linear model: explaining and choosing share weights

ATTRIBUTES, DECIDING, SHORTCUT = 12, 0, 1
TRUE_WEIGHT = 3.0
CORRELATION = 0.9  # of the shortcut with the deciding attribute in training; at test its negative
RIDGE = 0.01
RIDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
BASES: dict[str, dict[str, Any]] = {
    "DPO": {"base": "dpo", "beta": 1.0},
    "ORPO": {"base": "orpo", "beta": 0.1},
    "SimPO": {"base": "simpo", "beta": 2.0},
}
MORE_PAIRS = {"DPO, twice the pairs": 2, "DPO, three times the pairs": 3}
BEST_RIDGE, SHUFFLED = "DPO, best ridge", "RDPO, shuffled rationales"
MISLEADING, ALONE = "RDPO, misleading rationales", "rationales alone"
LOG_LINEAR_GRID: dict[str, Axis] = {
    "pairs": scales(smoke=[20, 40], laptop=[10, 20, 40, 80, 160, 320]),
    "seed": seeds(smoke=16, laptop=30),
}


@claim(
    paper=PAPER,
    says="With 20 and with 40 pairs, rationales that name the deciding attribute give a higher accuracy than DPO, than "
    "DPO with twice the pairs or with the ridge that is best at test, and than rationales of other pairs.",
    published=WIN_RATES,
    grid=LOG_LINEAR_GRID,
    expect=[
        higher("accuracy", "RDPO", than=["DPO", "DPO, twice the pairs", BEST_RIDGE, SHUFFLED], where={"pairs": pairs})
        for pairs in (20, 40)
    ],
    plot=line(x="pairs", y="accuracy", log="x"),
)
def shared_weights(cell: Cell) -> list[Row]:
    return log_linear_rows(cell)


@claim(
    paper=PAPER,
    says="Rationales are worth three times the pairs: RDPO is more accurate than DPO on three times as many.",
    published=SAVING,
    grid=LOG_LINEAR_GRID,
    expect=[higher("accuracy", "RDPO", than="DPO, three times the pairs", each="pairs")],
    plot=line(x="pairs", y="accuracy", log="x"),
)
def three_times_the_pairs(cell: Cell) -> list[Row]:
    return log_linear_rows(cell)


@claim(
    paper=PAPER,
    says="RDPO reaches an accuracy of 0.75 with less than a third of the pairs that DPO needs.",
    published=SAVING,
    grid={"most": scales(smoke=[], laptop=[320]), "seed": seeds(smoke=16, laptop=30), "method": ["DPO", "RDPO"]},
    expect=[lower("pairs_needed", "RDPO", than="DPO", factor=1 / 3)],
    plot=bars(x="method", y="pairs_needed", log="y"),
)
def pairs_to_the_target(cell: Cell) -> Row:
    """A curve that never reaches the target counts as twice its largest size, which understates what it needs."""
    from workingpapers.alignment import data_efficiency

    sizes = [size for size in (10, 20, 40, 80, 160, 320) if size <= cell.most]
    found = data_efficiency(
        lambda size: log_linear_scores(size, cell.seed)[cell.method], sizes, lambda scores: float(scores[0]), 0.75
    )
    return {"pairs_needed": min(found.pairs, 2.0 * cell.most)}


@claim(
    paper=PAPER,
    says="The rationale's term helps ORPO and SimPO as it helps DPO, with 20 and with 40 pairs.",
    published="RSimPO wins more than 65 % against SimPO (UltraFeedback, Anthropic HH)",
    grid=LOG_LINEAR_GRID,
    expect=[higher("accuracy", f"R{base}", than=base, where={"pairs": pairs}) for base in BASES for pairs in (20, 40)],
    plot=line(x="pairs", y="accuracy", log="x"),
)
def every_base(cell: Cell) -> list[Row]:
    return log_linear_rows(cell)


@claim(
    paper=PAPER,
    says="Rationales alone, without the preference term, beat DPO.",
    published="rationales alone win more than 61 % over supervised tuning",
    grid=LOG_LINEAR_GRID,
    expect=[higher("accuracy", ALONE, than="DPO", where={"pairs": pairs}) for pairs in (20, 40)],
    plot=line(x="pairs", y="accuracy", log="x"),
)
def rationales_alone(cell: Cell) -> list[Row]:
    return log_linear_rows(cell)


@claim(
    paper=PAPER,
    says="Rationales that name the shortcut do harm: RDPO with them is less accurate than DPO, at every size.",
    published="rationales with irrelevant information hurt (theory, no number)",
    grid=LOG_LINEAR_GRID,
    expect=[lower("accuracy", MISLEADING, than="DPO", each="pairs")],
    plot=line(x="pairs", y="accuracy", log="x"),
)
def misleading_rationales(cell: Cell) -> list[Row]:
    return log_linear_rows(cell)


@claim(
    paper=PAPER,
    says="Rationales take weight off the shortcut: of its weight relative to the deciding attribute RDPO keeps less "
    "than DPO, and less than DPO with three times the pairs.",
    published="less verbosity (first version, figures)",
    grid=LOG_LINEAR_GRID,
    expect=[
        lower("shortcut", "RDPO", than=["DPO", "DPO, three times the pairs"], where={"pairs": pairs})
        for pairs in (20, 40)
    ],
    plot=line(x="pairs", y="shortcut", log="x"),
)
def weight_of_the_shortcut(cell: Cell) -> list[Row]:
    return log_linear_rows(cell)


def log_linear_rows(cell: Cell) -> list[Row]:
    scores = log_linear_scores(cell.pairs, cell.seed)
    return [
        {"method": method, "accuracy": float(accuracy), "shortcut": float(shortcut)}
        for method, (accuracy, shortcut) in scores.items()
    ]


@artifact
def log_linear_scores(pairs: int, seed: int) -> dict[str, np.ndarray]:
    """Of each method: accuracy on 4,000 pairs with the shortcut reversed, and the shortcut's share of the two weights.

    A pair is the difference of the attributes of two answers, winner minus loser, with Bradley-Terry labels of the
    reward ``3 * deciding attribute``. A rationale names attribute k with probability softmax(true weight * difference)
    and is modelled as softmax(w * difference) with the weights w that also rank.
    """
    rng = np.random.default_rng([seed, 0])
    pool = _differences(rng, max(MORE_PAIRS.values()) * pairs, CORRELATION)
    named = _named_attribute(rng, pool, DECIDING)
    few, why = pool[:pairs], named[:pairs]
    test = _differences(np.random.default_rng([seed, 1]), 4_000, -CORRELATION)

    def accuracy(weights: np.ndarray) -> float:
        return float((test @ weights > 0).mean())

    found = {}
    for name, base in BASES.items():
        found[name] = _fit(few, why, gamma=0.0, **base)
        found[f"R{name}"] = _fit(few, why, gamma=1.0, **base)
    dpo = BASES["DPO"]
    for name, times in MORE_PAIRS.items():
        found[name] = _fit(pool[: times * pairs], named[: times * pairs], gamma=0.0, **dpo)
    found[BEST_RIDGE] = max((_fit(few, why, gamma=0.0, ridge=ridge, **dpo) for ridge in RIDGES), key=accuracy)
    found[SHUFFLED] = _fit(few, rng.permutation(why), gamma=1.0, **dpo)
    found[MISLEADING] = _fit(few, _named_attribute(rng, few, SHORTCUT), gamma=1.0, **dpo)
    found[ALONE] = _fit(few, why, gamma=1.0, preference_weight=0.0, **dpo)
    return {
        name: np.array([accuracy(w), abs(w[SHORTCUT]) / (abs(w[SHORTCUT]) + abs(w[DECIDING]))])
        for name, w in found.items()
    }


def _differences(rng: np.random.Generator, count: int, correlation: float) -> np.ndarray:
    found = rng.standard_normal((count, ATTRIBUTES))
    found[:, SHORTCUT] = correlation * found[:, DECIDING] + math.sqrt(1 - correlation**2) * found[:, SHORTCUT]
    wins = rng.random(count) < 1 / (1 + np.exp(-TRUE_WEIGHT * found[:, DECIDING]))
    return found * np.where(wins, 1.0, -1.0)[:, None]


def _named_attribute(rng: np.random.Generator, differences: np.ndarray, attribute: int) -> np.ndarray:
    """Draws from softmax(weight * difference) for a weight on one attribute alone."""
    logits = np.zeros_like(differences)
    logits[:, attribute] = TRUE_WEIGHT * differences[:, attribute]
    named: np.ndarray = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    return named


def _fit(differences: np.ndarray, named: np.ndarray, *, ridge: float = RIDGE, **options: Any) -> np.ndarray:
    """Weights that minimise a `RationaleLoss` plus a ridge.

    The policy over the two answers of a pair is ``sigmoid(+- w . difference)``, the reference a coin: then DPO with
    beta 1 is logistic regression, and a supervised term on the winner would be the same function once more.
    """
    import torch

    from workingpapers.alignment import RationaleLoss

    data, index = torch.from_numpy(differences), torch.from_numpy(named)[:, None]
    coin = torch.full((len(data),), -math.log(2.0), dtype=data.dtype)
    one = torch.ones(len(data), dtype=torch.int64)
    weights = torch.zeros(ATTRIBUTES, dtype=data.dtype, requires_grad=True)
    crit = RationaleLoss(**options)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        score = data @ weights
        explained = (weights * data).log_softmax(1).gather(1, index).squeeze(1)
        chosen, rejected = (torch.nn.functional.logsigmoid(sign * score) for sign in (1.0, -1.0))
        out = crit(chosen, rejected, explained, coin, coin, chosen_lengths=one, rejected_lengths=one)
        loss: torch.Tensor = out.loss + ridge * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach().numpy()
