"""Claims of "Reward Model Ensembles Help Mitigate Overoptimization".

The paper optimises answers of a 1.4-billion-parameter model against 44-million-parameter reward models, with a
7-billion-parameter one as the truth. Here answers are vectors or images of digits whose true reward is known, members
are small perceptrons trained on pairs of which none or a quarter are labelled wrongly, and best-of-n is exact.
"single" is the mean over the curves of the five members, each picking by itself.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.desk.claim import (
    Axis,
    Cell,
    Row,
    always,
    artifact,
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

    from workingpapers.alignment import RewardEnsemble

PAPER = "reward-ensembles"

# --------------------------------------------------------------------------- best-of-n, answers are vectors, gold known

WEIGHTS = [0.1, 0.5, 1.0, 2.0]  # of variance, in UWO
PICKERS = ["single", "mean", "WCO", *(f"UWO {lam:g}" for lam in WEIGHTS)]
SIZES = [2, 3, 4, 5, 6, 8]
BY_SIZE = [f"WCO of {size}" for size in SIZES]
VECTORS: dict[str, Axis] = {
    "answers": scales(smoke=[1_024], laptop=[100_000]),
    "prompts": scales(smoke=[40], laptop=[4], paper=[100]),
    "members": scales(smoke=[5], laptop=[8]),
    "batch": scales(smoke=[128], laptop=[64]),
    "seed": seeds(smoke=5, laptop=8, paper=20),
}
CURVE = line(x="n", y="gold", log="x", each="noise")
FINAL = "final gold score over the average single model: about +30 % without noise, +75 % with 25 % noise"


@claim(
    paper=PAPER,
    says="With 25 % of the labels wrong, the curve of every ensemble peaks above that of a single reward model, and at "
    "n = 1,024 all are above it, WCO also above the mean.",
    published=FINAL,
    grid={"noise": [0.25], **VECTORS},
    expect=[
        *(higher("peak", ours, than="single", where={"n": "last"}) for ours in ("mean", "WCO", "UWO 0.5")),
        *(higher("gold", ours, than="single", where={"n": 1_024}) for ours in PICKERS[1:]),
        higher("gold", "WCO", than="mean", where={"n": 1_024}),
    ],
    plot=CURVE,
)
def best_of_n_with_noise(cell: Cell) -> list[Row]:
    return _rows(cell, PICKERS)


@claim(
    paper=PAPER,
    says="Without wrong labels, too, every ensemble is above a single reward model at n = 1,024.",
    published=FINAL,
    grid={"noise": scales(smoke=[], laptop=[0.0]), **VECTORS},
    expect=[higher("gold", ours, than="single", where={"n": 1_024}) for ours in ("mean", "WCO", "UWO 0.5")],
    plot=CURVE,
)
def best_of_n_without_noise(cell: Cell) -> list[Row]:
    return _rows(cell, PICKERS)


@claim(
    paper=PAPER,
    says="The advantage of WCO and UWO over a single model lasts to the largest n, with and without noise.",
    published=f"{FINAL}; n up to 12,500",
    grid={"noise": scales(smoke=[0.25], laptop=[0.0, 0.25]), **VECTORS},
    expect=[higher("gold", ours, than="single", each="noise", where={"n": "last"}) for ours in ("WCO", "UWO 0.5")],
    plot=CURVE,
)
def best_of_n_at_the_largest_n(cell: Cell) -> list[Row]:
    return _rows(cell, PICKERS)


@claim(
    paper=PAPER,
    says="WCO and UWO do not overoptimise: from its peak to the largest n the gold score falls by less than 0.05.",
    published="no overoptimisation by WCO and UWO up to n = 12,500, with or without noise",
    grid={"noise": scales(smoke=[0.25], laptop=[0.0, 0.25]), **VECTORS},
    expect=[lower("drop", ours, than=0.05, each="noise", where={"n": "last"}) for ours in ("WCO", "UWO 0.5")],
    plot=CURVE,
)
def no_overoptimisation(cell: Cell) -> list[Row]:
    return _rows(cell, PICKERS)


@claim(
    paper=PAPER,
    says="With noise, the worst of four members picks better than the worst of three at n = 1,024; a fifth adds less "
    "than 0.05.",
    published="three to four members matters, four to five little",
    grid={"noise": scales(smoke=[], laptop=[0.25]), **VECTORS},
    expect=[
        higher("gold", "WCO of 4", than="WCO of 3", where={"n": 1_024}),
        lower("gold", "WCO of 5", than="WCO of 4", margin=0.05, where={"n": 1_024}),
    ],
    plot=line(x="n", y="gold", log="x"),
)
def number_of_members(cell: Cell) -> list[Row]:
    return _rows(cell, BY_SIZE)


def _rows(cell: Cell, methods: list[str]) -> list[Row]:
    curves = vector_curves(cell.seed, cell.noise, cell.answers, cell.prompts, cell.members, cell.batch)
    return [
        {
            "method": method,
            "n": int(n),
            "kl": float(kl),
            "gold": float(gold),
            "peak": float(curves[method].max()),
            "drop": float(curves[method].max() - curves[method][-1]),
        }
        for method in methods
        for n, kl, gold in zip(curves["n"], curves["kl"], curves[method], strict=True)
    ]


@artifact
def vector_curves(
    seed: int, noise: float, answers: int, prompts: int, members: int, batch: int
) -> dict[str, np.ndarray]:
    """Gold score of the best of n by every way to pick: candidates are normal, one in ten scaled by 2.5."""
    import torch

    from workingpapers.alignment import aggregate, best_of_n

    generator = torch.Generator().manual_seed(seed)
    ensemble, direction = _vector_members(generator, seed, noise, batch, members)
    candidates = torch.randn(prompts, answers, len(direction), generator=generator)
    far = torch.rand(prompts, answers, 1, generator=generator) < 0.1
    candidates = torch.where(far, 2.5 * candidates, candidates)
    gold = _vector_gold(candidates, direction).numpy()
    scores = np.asarray(ensemble.score_samples(candidates.numpy().reshape(-1, len(direction))))
    scores = scores.reshape(members, prompts, answers)
    ns = sorted({4**power for power in range(9) if 4**power <= answers} | {answers})
    five = scores[:5]
    picks = {"mean": aggregate(five, "mean"), "WCO": aggregate(five, "wco")}
    picks |= {f"UWO {lam:g}": aggregate(five, "uwo", lam) for lam in WEIGHTS}
    picks |= {f"WCO of {size}": aggregate(scores[:size], "wco") for size in SIZES if size <= members}
    curves = {name: best_of_n(proxy, gold, ns) for name, proxy in picks.items()}
    singles = [best_of_n(own, gold, ns).gold for own in five]
    return {
        "n": curves["mean"].n,
        "kl": curves["mean"].kl,
        "single": np.mean(singles, axis=0),
        **{name: curve.gold for name, curve in curves.items()},
    }


def _vector_members(
    generator: torch.Generator, seed: int, noise: float, batch: int, members: int
) -> tuple[RewardEnsemble, torch.Tensor]:
    """Members trained on 1,000 pairs of normal vectors in ten dimensions, and the direction of the gold reward."""
    import torch

    from workingpapers.alignment import RewardEnsemble

    direction = torch.randn(10, generator=generator)
    direction /= direction.norm()
    first, second = torch.randn(2, 1_000, 10, generator=generator)
    wrong = torch.rand(1_000, generator=generator) < noise
    first_wins = ((_vector_gold(first, direction) > _vector_gold(second, direction)) ^ wrong)[:, None]
    chosen, rejected = torch.where(first_wins, first, second), torch.where(first_wins, second, first)
    ensemble = RewardEnsemble(n_members=members, batch_size=batch, random_state=seed).fit(chosen, rejected)
    return ensemble, direction


def _vector_gold(answers: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Better along the direction, up to a point; worse far from where the pairs are."""
    gold: torch.Tensor = (1.5 * answers @ direction).tanh() - 0.25 * (answers.norm(dim=-1) - 4.5).relu()
    return gold


# ----------------------------------------------------------------------------------- best-of-n, answers are real images

DIGITS: dict[str, Axis] = {
    "pairs": scales(smoke=[200], laptop=[1_000]),
    # Candidates are the held-out images moved by up to that many pixels in all ways; training images are not moved.
    "shift": scales(smoke=[0], laptop=[0, 1]),
    "seed": seeds(smoke=5, laptop=8, paper=20),
}
# There are ten prompts: the score at the largest n is that of ten images, so the curves are compared at n = 256.
DIGITS_BETTER = [
    *(higher("peak", ours, than="single", each="shift", where={"n": 256}) for ours in ("mean", "WCO", "UWO 0.5")),
    *(higher("gold", ours, than="single", each="shift", where={"n": 256}) for ours in ("mean", "WCO", "UWO 0.5")),
]
DIGIT_CURVE = line(x="n", y="gold", log="x", each="shift")


@claim(
    paper=PAPER,
    says="Asked for a digit and scored by how far the picked image's label is from it: with 25 % of the labels of the "
    "pairs wrong, ensembles pick better than single models among held-out images, and among their shifts by a pixel.",
    published=FINAL,
    grid={"noise": [0.25], **DIGITS},
    expect=DIGITS_BETTER,
    plot=DIGIT_CURVE,
)
def digits_with_noise(cell: Cell) -> list[Row]:
    return _digit_rows(cell)


@claim(
    paper=PAPER,
    says="The same with no label wrong.",
    published=FINAL,
    grid={"noise": scales(smoke=[], laptop=[0.0]), **DIGITS},
    expect=DIGITS_BETTER,
    plot=DIGIT_CURVE,
)
def digits_without_noise(cell: Cell) -> list[Row]:
    return _digit_rows(cell)


def _digit_rows(cell: Cell) -> list[Row]:
    from workingpapers.alignment import RewardEnsemble, aggregate, best_of_n
    from workingpapers.data import digits

    data = digits()
    images, labels = data["images"].reshape(-1, 8, 8).astype(np.float32), data["labels"]
    rng = np.random.default_rng(cell.seed)
    train, held_out = np.array_split(rng.permutation(len(labels)), 2)

    wanted = rng.integers(10, size=cell.pairs)
    first, second = rng.choice(train, size=(2, cell.pairs))
    lead = np.abs(labels[second] - wanted) - np.abs(labels[first] - wanted)
    first_wins = np.where(lead == 0, rng.random(cell.pairs) < 0.5, lead > 0) ^ (rng.random(cell.pairs) < cell.noise)
    chosen, rejected = np.where(first_wins, [first, second], [second, first])
    ensemble = RewardEnsemble(batch_size=64, score_l2=0.001, random_state=cell.seed)  # the penalty of the paper's runs
    ensemble.fit(_asked(images[chosen], wanted), _asked(images[rejected], wanted))

    padded = np.pad(images[held_out], ((0, 0), *2 * [(cell.shift, cell.shift)]))
    places = list(itertools.product(range(2 * cell.shift + 1), repeat=2))
    shifted = np.concatenate([padded[:, down : down + 8, right : right + 8] for down, right in places])
    gold = -np.abs(np.tile(labels[held_out], len(places)) - np.arange(10)[:, None]).astype(float)
    scores = np.stack(
        [ensemble.score_samples(_asked(shifted, np.full(len(shifted), digit))) for digit in range(10)], axis=1
    )
    ns = sorted({4**power for power in range(7) if 4**power <= len(shifted)} | {len(shifted)})
    picks = {
        "mean": aggregate(scores, "mean"),
        "WCO": aggregate(scores, "wco"),
        "UWO 0.5": aggregate(scores, "uwo", 0.5),
    }
    curves = {name: best_of_n(proxy, gold, ns).gold for name, proxy in picks.items()}
    curves["single"] = np.mean([best_of_n(own, gold, ns).gold for own in scores], axis=0)
    return [
        {"method": method, "n": n, "gold": float(value), "peak": float(curve.max())}
        for method, curve in curves.items()
        for n, value in zip(ns, curve, strict=True)
    ]


def _asked(images: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Features of an answer to a prompt: the pixels and the digit that is wanted."""
    return np.concatenate([images.reshape(len(images), -1), np.eye(10, dtype=np.float32)[wanted]], axis=1)


# ------------------------------------------------------------------------------------------------- policy optimisation

PENALTIES = [0.0, 0.1, 0.3]  # weights of the divergence from the initial policy
OBJECTIVES = ["single", "mean", "WCO", "UWO 0.1", "UWO 0.5"]
POLICY: dict[str, Axis] = {
    "steps": scales(smoke=[], laptop=[300], paper=[3_000]),
    "seed": seeds(smoke=5, laptop=5, paper=20),
}


@claim(
    paper=PAPER,
    says="A policy optimised without a KL penalty ends at a higher gold score on WCO and UWO than on a single model, "
    "with and without noise.",
    published="WCO and UWO reduce overoptimisation under PPO without a KL penalty, the single model and the mean "
    "overoptimise",
    grid={"noise": [0.0, 0.25], "penalty": [0.0], **POLICY},
    expect=[
        higher("gold", ours, than="single", each="noise", where={"step": "last"})
        for ours in ("WCO", "UWO 0.1", "UWO 0.5")
    ],
    plot=line(x="step", y="gold", each="noise"),
)
def policy_without_penalty(cell: Cell) -> list[Row]:
    return _policy_rows(cell)


@claim(
    paper=PAPER,
    says="With 25 % of the labels wrong, a policy optimised on WCO or UWO ends at a higher gold score than one "
    "optimised on a single model, without a KL penalty and with a small one.",
    published="WCO and UWO outperform the single model under PPO, with and without noise",
    grid={"noise": [0.25], "penalty": [0.0, 0.1], **POLICY},
    expect=[higher("gold", ours, than="single", each="penalty", where={"step": "last"}) for ours in ("WCO", "UWO 0.1")],
    plot=line(x="step", y="gold", each="penalty"),
)
def policy_with_noise(cell: Cell) -> list[Row]:
    return _policy_rows(cell)


@claim(
    paper=PAPER,
    says="With a small KL penalty (0.1) WCO and UWO prevent overoptimisation, the drop from the peak is below 0.05, "
    "and end above a single model.",
    published="a KL penalty of 0.01 suffices for WCO and UWO, at no cost; the single model needs 0.2",
    grid={"noise": [0.0, 0.25], "penalty": [0.1], **POLICY},
    expect=[
        *(lower("drop", ours, than=0.05, each="noise", where={"step": "last"}) for ours in ("WCO", "UWO 0.1")),
        *(higher("gold", ours, than="single", each="noise", where={"step": "last"}) for ours in ("WCO", "UWO 0.1")),
    ],
    plot=line(x="step", y="gold", each="noise"),
)
def policy_with_small_penalty(cell: Cell) -> list[Row]:
    return _policy_rows(cell)


@claim(
    paper=PAPER,
    says="With a KL penalty large enough (0.3) a single model does as well as WCO and UWO, to 0.05.",
    published="a single model with KL penalty 0.2 does not overoptimise, but ends lower",
    grid={"noise": [0.0, 0.25], "penalty": [0.3], **POLICY},
    expect=[higher("gold", "single", than=["WCO", "UWO 0.1"], margin=-0.05, each="noise", where={"step": "last"})],
    plot=line(x="step", y="gold", each="noise"),
)
def policy_with_large_penalty(cell: Cell) -> list[Row]:
    return _policy_rows(cell)


@claim(
    paper=PAPER,
    says="Without a penalty and with noise, the members' disagreement grows less under UWO than under the mean.",
    published="variance grows about 2.5-fold under the mean and about 20 % under UWO, lambda 0.1",
    grid={"noise": [0.25], "penalty": [0.0], **POLICY},
    expect=[lower("variance", ours, than="mean", where={"step": "last"}) for ours in ("UWO 0.1", "UWO 0.5")],
    plot=line(x="step", y="variance"),
)
def disagreement_under_optimisation(cell: Cell) -> list[Row]:
    return _policy_rows(cell)


def _policy_rows(cell: Cell) -> list[Row]:
    found = policy_runs(cell.seed, cell.noise, cell.steps)
    at = PENALTIES.index(cell.penalty)
    return [
        {
            "method": method,
            "step": int(step),
            "gold": float(found["gold"][time, place, at]),
            "variance": float(found["variance"][time, place, at]),
            "drop": float(found["gold"][: time + 1, place, at].max() - found["gold"][time, place, at]),
        }
        for place, method in enumerate(OBJECTIVES)
        for time, step in enumerate(found["step"])
    ]


@artifact
def policy_runs(seed: int, noise: float, steps: int) -> dict[str, np.ndarray]:
    """The mean of a normal policy N(m, I), moved by 300 Adam steps along the gradient through the members.

    All objectives and penalties run side by side; "single" averages the runs on each of the five members.

    Returns
    -------
    step (times,); gold and variance (times, objectives, penalties), of 500 samples.
    """
    import torch

    from workingpapers.alignment import aggregate, member_variance

    generator = torch.Generator().manual_seed(seed)
    ensemble, direction = _vector_members(generator, seed, noise, batch=64, members=5)
    runs = 5 + len(OBJECTIVES) - 1
    penalties = torch.tensor(PENALTIES)
    mean = torch.zeros(runs, len(PENALTIES), 10, requires_grad=True)
    optimizer = torch.optim.Adam([mean], lr=0.02)
    times, golds, variances = [], [], []
    for step in range(steps + 1):
        if step % (steps // 10) == 0:
            with torch.no_grad():
                seen = mean[:, :, None] + torch.randn(1, 1, 500, 10, generator=generator)
                scores = _scored(ensemble, seen)
                gold, variance = _vector_gold(seen, direction).mean(-1), member_variance(scores).mean(-1)
            times.append(step)
            golds.append(torch.cat([gold[:5].mean(0, keepdim=True), gold[5:]]).numpy())
            variances.append(torch.cat([variance[:5].mean(0, keepdim=True), variance[5:]]).numpy())
        answers = mean[:, :, None] + torch.randn(runs, len(PENALTIES), 64, 10, generator=generator)
        scores = _scored(ensemble, answers)
        rewards = [scores[run, run] for run in range(5)]
        rewards += [aggregate(scores[:, 5], "mean"), aggregate(scores[:, 6], "wco")]
        rewards += [aggregate(scores[:, run], "uwo", lam) for run, lam in ((7, 0.1), (8, 0.5))]
        divergence = 0.5 * mean.square().sum(-1)  # KL(N(m, I) || N(0, I))
        optimizer.zero_grad()
        torch.autograd.backward((penalties * divergence - torch.stack(rewards).mean(-1)).sum())
        optimizer.step()
    return {"step": np.array(times), "gold": np.stack(golds), "variance": np.stack(variances)}


def _scored(ensemble: RewardEnsemble, answers: torch.Tensor) -> torch.Tensor:
    """Scores (members, *shape) of answers (*shape, features), with gradients."""
    scores: Any = ensemble.score_samples(answers.flatten(end_dim=-2))
    found: torch.Tensor = scores.unflatten(1, answers.shape[:-1])
    return found


# -------------------------------------------------------------------------------------------------------- the estimator


@claim(
    paper=PAPER,
    says="The best-of-n estimator is the mean over all subsets, ties broken by a fair die.",
    published="the unbiased estimator of best-of-n scores (exact)",
    grid={"tied": [False, True], "seed": seeds(smoke=5, laptop=20)},
    expect=[always("error", at_most=1e-12)],
    plot=line(x="n", y="error"),
)
def every_subset_of_eight(cell: Cell) -> list[Row]:
    from workingpapers.alignment import best_of_n

    rng = np.random.default_rng(cell.seed)
    proxy, gold = rng.standard_normal((2, 1, 8))
    proxy = np.round(proxy) if cell.tied else proxy
    curve = best_of_n(proxy, gold, ns=range(1, 9))
    rows = []
    for n, found in zip(range(1, 9), curve.gold, strict=True):
        subsets = np.array(list(itertools.combinations(range(8), n)))
        best = proxy[0, subsets] == proxy[0, subsets].max(1, keepdims=True)
        exact = ((gold[0, subsets] * best).sum(1) / best.sum(1)).mean()
        rows.append({"n": n, "error": abs(found - exact)})
    return rows


# ---------------------------------------------------------------------------------------------------------------- cost


@benchmark(
    paper=PAPER,
    says="Members trained in one batched pass are faster than a loop over members in plain PyTorch.",
    grid={
        "members": scales(smoke=[5], laptop=[2, 5, 10]),
        "epochs": scales(smoke=[1], laptop=[2]),
        "contender": ["one pass", "loop"],
    },
    expect=[faster("one pass", than="loop", each="members")],
    plot=line(x="members", y="seconds", by="contender"),
)
def training(cell: Cell) -> Row:
    """1,000 pairs in ten dimensions, perceptrons 10-64-64-1 with tanh, Adam, batches of 64."""
    import torch

    from workingpapers.alignment import RewardEnsemble

    chosen, rejected = torch.randn(2, 1_000, 10, generator=torch.Generator().manual_seed(0))
    chosen += 0.3
    if cell.contender == "one pass":
        with cell.timed():
            ensemble = RewardEnsemble(n_members=cell.members, epochs=cell.epochs, batch_size=64, random_state=0)
            ensemble.fit(chosen, rejected)
        return {"loss": float(ensemble.losses_[-1].mean())}

    losses = []
    with torch.random.fork_rng(), cell.timed():
        for seed in range(cell.members):
            torch.manual_seed(seed)
            member = torch.nn.Sequential(
                torch.nn.Linear(10, 64),
                torch.nn.Tanh(),
                torch.nn.Linear(64, 64),
                torch.nn.Tanh(),
                torch.nn.Linear(64, 1),
            )
            optimizer = torch.optim.Adam(member.parameters(), lr=2e-3, fused=True)
            for _ in range(cell.epochs):
                total = torch.zeros(())
                for rows in torch.split(torch.randperm(1_000), 64):
                    won, lost = member(torch.cat([chosen[rows], rejected[rows]]))[:, 0].chunk(2)
                    loss = -torch.nn.functional.logsigmoid(won - lost).mean()
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    optimizer.step()
                    total += loss.detach() * len(rows)
            losses.append(float(total) / 1_000)
    return {"loss": float(np.mean(losses))}


@benchmark(
    paper=PAPER,
    says="The exact best-of-n curve is faster than a matrix of log-binomial weights and than drawing 100 subsets for "
    "each n.",
    grid={
        "answers": scales(smoke=[2_000], laptop=[10_000, 100_000]),
        "contender": ["ours", "log-binomials", "resampling"],
    },
    expect=[faster("ours", than=["log-binomials", "resampling"], each="answers")],
    plot=line(x="answers", y="seconds", by="contender", log="xy"),
)
def estimator(cell: Cell) -> Row:
    """Four prompts, 40 values of n spread evenly over the nats."""
    from scipy.special import gammaln

    from workingpapers.alignment import best_of_n

    rng = np.random.default_rng(0)
    proxy = rng.standard_normal((4, cell.answers))
    gold = proxy + rng.standard_normal(proxy.shape)
    ns = np.unique(np.geomspace(1, cell.answers, 40).round().astype(int))
    with cell.timed():
        if cell.contender == "ours":
            curve = best_of_n(proxy, gold, ns).gold
        elif cell.contender == "log-binomials":
            rank, n = np.arange(1.0, cell.answers + 1), ns[:, None].astype(float)
            with np.errstate(invalid="ignore"):
                log_weights = gammaln(rank) - gammaln(n) - gammaln(np.maximum(rank - n + 1, 1.0))
            log_weights -= gammaln(cell.answers + 1) - gammaln(n + 1) - gammaln(cell.answers - n + 1)
            weights = np.where(rank >= n, np.exp(np.where(rank >= n, log_weights, -np.inf)), 0.0)
            curve = (weights @ np.take_along_axis(gold, proxy.argsort(1), 1).T).mean(1)
        else:
            curve = np.zeros(len(ns))
            for place, n in enumerate(ns):
                for scores, values in zip(proxy, gold, strict=True):
                    drawn = rng.integers(cell.answers, size=(100, n))  # with replacement: cheaper, and slightly biased
                    best = drawn[np.arange(100), scores[drawn].argmax(1)]
                    curve[place] += values[best].mean() / len(proxy)
    return {"last": float(curve[-1])}
