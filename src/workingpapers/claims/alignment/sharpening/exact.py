"""Claims that finite tables settle exactly: laws, minimisers, the adaptive rule, greedy decoding, exploration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from workingpapers.desk.claim import Cell, Row, always, bars, claim, higher, lower, scales, seeds

if TYPE_CHECKING:
    import torch

PAPER = "sharpening"


@claim(
    paper=PAPER,
    says="On random tables the best of N draws has the law of order statistics: N = 1 is the base, the mode gains "
    "1 - (1 - p*)^N, sampling agrees, and the mean log-likelihood of the base rises with N.",
    published="the law behind inference-time best-of-N (section 3.1), exact",
    grid={"responses": [50, 1_000], "seed": seeds(smoke=5, laptop=10)},
    expect=[
        always("gap_at_1", at_most=1e-12),
        always("gap_of_mode", at_most=1e-12),
        always("chi_square_p", at_least=1e-4),
        always("loglik_rises"),
    ],
    plot=bars(x="responses", y="loglik_at_50", by="responses"),
)
def law_of_the_best(cell: Cell) -> Row:
    from scipy.stats import chi2

    from workingpapers.alignment.sharpening import tabular

    rng = np.random.default_rng([cell.seed, cell.responses])
    p = rng.dirichlet(np.ones(cell.responses), size=20)
    laws = {n: tabular.bon_distribution(p, n) for n in (1, 2, 10, 50)}
    mode_mass = np.take_along_axis(laws[10], p.argmax(1)[:, None], 1)[:, 0]
    drawn = rng.choice(cell.responses, size=(20_000, 10), p=p[0])
    kept = drawn[np.arange(len(drawn)), p[0][drawn].argmax(1)]
    expected, observed = 20_000 * laws[10][0], np.bincount(kept, minlength=cell.responses)
    common = expected >= 10  # the others are pooled
    expected = np.append(expected[common], expected[~common].sum())
    observed = np.append(observed[common], observed[~common].sum())
    statistic = ((observed - expected) ** 2 / expected).sum()
    logliks = [float((law * np.log(p)).sum(1).mean()) for law in laws.values()]
    return {
        "gap_at_1": float(np.abs(laws[1] - p).max()),
        "gap_of_mode": float(np.abs(mode_mass - (1 - (1 - p.max(1)) ** 10)).max()),
        "chi_square_p": float(chi2.sf(statistic, common.sum())),
        "loglik_rises": bool((np.diff(logliks) > 0).all()),
        "loglik_at_1": logliks[0],
        "loglik_at_50": logliks[-1],
    }


@claim(
    paper=PAPER,
    says="The pair loss, with exact expectations, is least at the base to the power 1 + 1/beta, normalised.",
    published="the optimum of RLHF-Sharpening (section 3.2), exact",
    grid={"beta": [0.5, 1.0], "seed": seeds(smoke=5, laptop=10)},
    expect=[always("gap", at_most=1e-6)],
    plot=bars(x="beta", y="gap", by="beta", log="y"),
)
def minimiser_of_the_pair_loss(cell: Cell) -> Row:
    import torch

    from workingpapers.alignment.sharpening import SharpeningPairLoss, tabular

    p = torch.from_numpy(np.random.default_rng(cell.seed).dirichlet(np.ones(30)))
    y, y2 = (index.reshape(-1) for index in torch.meshgrid(torch.arange(30), torch.arange(30), indexing="ij"))
    loss = SharpeningPairLoss(cell.beta, "none")

    def objective(logits: torch.Tensor) -> torch.Tensor:
        log_policy = logits.log_softmax(0)
        errors = loss(log_policy[y], log_policy[y2], p.log()[y], p.log()[y2]).loss
        expected: torch.Tensor = (p[y] * p[y2] * errors).sum()
        return expected

    logits = p.log()
    for _ in range(2):  # Newton's steps: the loss is quadratic in the logits, up to their common shift
        gradient = torch.func.grad(objective)(logits)
        hessian = torch.func.hessian(objective)(logits) + torch.ones(30, 30)  # which the loss does not see
        logits = logits - torch.linalg.solve(hessian, gradient)
    found = logits.softmax(0).numpy()
    return {"gap": float(np.abs(found - tabular.power(p.numpy(), 1 + 1 / cell.beta)).max())}


@claim(
    paper=PAPER,
    says="N = log(1 / rho) / p(y*_gamma) draws meet y*_gamma with probability at least 1 - rho.",
    published="N at least log(1 / rho) / pi_base(y*_gamma) suffices for inference-time sharpening, exact",
    grid={"rho": [0.1, 0.01], "gamma": [0.0, 0.3], "seed": seeds(smoke=5, laptop=20)},
    expect=[always("excess", at_most=0.0), always("share_of_rho", at_least=0.5)],
    plot=bars(x="rho", y="share_of_rho", by="gamma"),
)
def enough_draws(cell: Cell) -> Row:
    from workingpapers.alignment.sharpening import tabular

    p = np.random.default_rng(cell.seed).dirichlet(np.ones(50), size=20)
    mode = tabular.modes(p, cell.gamma)
    needed = tabular.samples_needed((p * mode).sum(1), cell.rho)
    missed = [
        1.0 - tabular.bon_distribution(table, int(n))[inside].sum()
        for table, n, inside in zip(p, needed, mode, strict=True)
    ]
    return {"excess": float(max(missed)) - cell.rho, "share_of_rho": float(max(missed)) / cell.rho}


@claim(
    paper=PAPER,
    says="On tables of mixed difficulty the adaptive rule needs fewer draws than the best fixed N of equal mean "
    "failure, and keeps every table's failure below delta, where that N fails more often on its worst table.",
    published="draws n C_cov log(1 / delta) in place of N = C_cov log(1 / delta) / eps for each prompt (section 4)",
    grid={"seed": seeds(smoke=5, laptop=20), "method": ["adaptive", "fixed N"]},
    expect=[
        lower("samples", "adaptive", than="fixed N"),
        lower("worst_failure", "adaptive", than="fixed N"),
        always("worst_failure", at_most=0.1, of="adaptive"),
        always("over_bound", at_most=1.2, of="adaptive"),
    ],
    plot=bars(x="method", y="samples"),
)
def adaptive_against_fixed(cell: Cell) -> Row:
    """Exact expectations; the fixed N is chosen knowing the failure that the adaptive rule will have."""
    from workingpapers.alignment.sharpening import tabular

    rng = np.random.default_rng(cell.seed)
    p = np.concatenate([rng.dirichlet(np.full(50, c), size=8) for c in (0.05, 0.1, 0.3, 1.0, 1.0)])
    largest, mode = p.max(1), p.argmax(1)
    law = tabular.adaptive_law(p, delta=0.1, max_samples=10_000)
    failure = 1.0 - law.selected[np.arange(len(p)), mode]
    if cell.method == "adaptive":
        return {
            "samples": float(law.expected_samples.mean()),
            "failure": float(failure.mean()),
            "worst_failure": float(failure.max()),
            "over_bound": float((law.expected_samples / np.ceil(math.log(20) / largest)).max()),
        }
    n = 1
    while ((1 - largest) ** n).mean() > failure.mean():
        n += 1
    return {
        "samples": n,
        "failure": float(((1 - largest) ** n).mean()),
        "worst_failure": float((1 - min(largest)) ** n),
    }


@claim(
    paper=PAPER,
    says="A unique mode with more than half of the mass is found by greedy decoding, and half is needed: just below "
    "it, greedy decoding can miss.",
    published="greedy decoding returns y* if pi(y*) > 1/2; tight (section 2)",
    grid={"length": [2, 4], "seed": seeds(smoke=5, laptop=20)},
    expect=[always("found_above_half", at_least=1.0), always("found_just_below_half", at_most=0.0)],
    plot=bars(x="length", y="found_at_all", by="length"),
)
def greedy_decoding_and_half_of_the_mass(cell: Cell) -> Row:
    """Tables over strings of three letters; sharpened by powers until the mode crosses one half."""
    from workingpapers.alignment.sharpening import tabular

    def greedy(table: np.ndarray) -> int:
        prefix, law = 0, table.reshape([3] * cell.length)
        for left in range(cell.length, 0, -1):
            token = int(law.reshape(3, -1).sum(1).argmax())
            prefix, law = prefix + token * 3 ** (left - 1), law[token]
        return prefix

    rng = np.random.default_rng([cell.seed, cell.length])
    above, anywhere = [], []
    for base in rng.dirichlet(np.full(3**cell.length, 0.3), size=100):
        for exponent in (1.0, 2.0, 4.0, 8.0, 16.0):
            table = tabular.power(base, exponent)
            found = greedy(table) == table.argmax()
            anywhere.append(found)
            if table.max() > 0.5:
                above.append(found)
    counter = np.zeros([3] * cell.length)
    counter[(0,) * cell.length] = 0.5 - 1e-6
    counter[(1,) + (0,) * (cell.length - 1)] = 0.25 + 1e-6  # two responses share a first token
    counter[(1,) + (1,) * (cell.length - 1)] = 0.25
    return {
        "found_above_half": float(np.mean(above)),
        "found_just_below_half": float(greedy(counter.reshape(-1)) == counter.argmax()),
        "found_at_all": float(np.mean(anywhere)),
    }


# ------------------------------------------------------------------------------------------------ exploration, exactly


@claim(
    paper=PAPER,
    says="Where the mode is too rare for best-of-N (probability 0.001, against 60 or 80 draws) and the class of "
    "policies generalises, exploration with optimism finds it; the same on-policy pairs without optimism, offline "
    "pairs, and SFT on the best of as many draws do not.",
    published="RLHF-Sharpening with exploration needs no coverage where the class has a small extrapolation "
    "coefficient (section 4.2, theory)",
    grid={
        "rounds": scales(smoke=[30], laptop=[40]),
        "seed": seeds(smoke=5, laptop=8),
        "method": ["exploration", "on-policy pairs", "offline pairs", "SFT best of N"],
    },
    expect=[higher("mode_mass", "exploration", than=["on-policy pairs", "offline pairs", "SFT best of N"], margin=0.3)],
    plot=bars(x="method", y="mode_mass"),
)
def exploration_without_coverage(cell: Cell) -> Row:
    """Response A with probability 0.001, else a fair string of 12 bits, each of probability 2^-12.

    The policy has a logit for A and one for each bit. One pair in each round; every round ends with Adam's steps on
    all pairs so far, with the pair loss at beta 0.2. Exploration has alpha 1, the best of 0.1, 0.3 and 1 on other
    seeds. The mean of 16 runs.
    """
    import torch
    from torch.nn.functional import logsigmoid

    from workingpapers.alignment.sharpening import SharpeningPairLoss

    runs, bits, log_odds = 16, 12, math.log(0.001 / 0.999)
    generator = torch.Generator().manual_seed(cell.seed)

    def draw(theta: torch.Tensor, count: int) -> torch.Tensor:
        """For each run, `count` rows of the indicator of A and the bits."""
        uniform = torch.rand(runs, count, 1 + bits, generator=generator)
        logits = theta.detach() + torch.tensor([log_odds] + [0.0] * bits)
        return (uniform < logits.sigmoid()[:, None]).float()

    def logp(theta: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        of_a, signs = log_odds + theta[:, None, 0], 2 * y[..., 1:] - 1
        of_string = logsigmoid(-of_a) + logsigmoid(signs * theta[:, None, 1:]).sum(-1)
        return torch.where(y[..., 0] == 1, logsigmoid(of_a), of_string).flatten()

    base = torch.zeros(runs, 1 + bits)
    if cell.method == "SFT best of N":  # A, once seen, is the best, and then all that is trained on
        return {"mode_mass": float(draw(base, 2 * cell.rounds)[..., 0].amax(1).mean())}
    loss = SharpeningPairLoss(0.2, alpha=1.0 if cell.method == "exploration" else 0.0)
    theta = torch.zeros_like(base, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.15)
    y, y2 = draw(base, 0), draw(base, 0)
    for _ in range(cell.rounds):
        y = torch.cat([y, draw(base if cell.method == "offline pairs" else theta, 1)], 1)
        y2 = torch.cat([y2, draw(base, 1)], 1)
        base_logp, base_logp2 = logp(base, y), logp(base, y2)
        for _ in range(5):
            optimizer.zero_grad()
            loss(logp(theta, y), logp(theta, y2), base_logp, base_logp2).loss.backward()
            optimizer.step()
    return {"mode_mass": float((log_odds + theta[:, 0]).sigmoid().mean().detach())}
