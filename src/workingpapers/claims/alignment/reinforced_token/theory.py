"""Claims that are exact: trees of tokens."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from workingpapers.claims.alignment.reinforced_token.problems import PAPER
from workingpapers.desk.claim import Cell, Row, always, bars, claim, scales, seeds


@claim(
    paper=PAPER,
    says="Told the log-probability of every token, elimination finds the likeliest of 729 responses with at most "
    "1 + (A - 1) H A^xi queries, when one has probability A^-xi.",
    published="A^min(xi + 1, H) queries against A^H (Proposition 3.2); the argument gives the bound tested here",
    grid={"xi": [1, 2, 3], "concentration": [0.3, 1.0], "seed": seeds(smoke=20, laptop=100)},
    expect=[always("excess", at_most=0), always("found")],
    plot=bars(x="xi", y="queries", by="concentration"),
)
def queries_with_token_rewards(cell: Cell) -> Row:
    return elimination(cell)


@claim(
    paper=PAPER,
    says="The number of queries is at most A^min(xi + 1, H), as the proposition states it.",
    published="A^min(xi + 1, H) queries (Proposition 3.2)",
    grid={"xi": [1, 2, 3], "concentration": [0.3, 1.0], "seed": seeds(smoke=20, laptop=100)},
    expect=[always("excess_as_stated", at_most=0)],
    plot=bars(x="xi", y="queries", by="concentration"),
)
def queries_as_stated(cell: Cell) -> Row:
    return elimination(cell)


def elimination(cell: Cell) -> Row:
    """A random tree of 3 tokens and 6 places, in which one response's conditionals are all A^(-xi / H)."""
    from workingpapers.alignment import prefix_elimination

    A, H = 3, 6
    rng = np.random.default_rng(cell.seed)
    planted, share = rng.integers(A, size=H), A ** (-cell.xi / H)
    tables, prefix = [], 0
    for place, token in enumerate(planted):
        table = rng.dirichlet(np.full(A, cell.concentration), size=A**place)
        others = np.arange(A) != token
        table[prefix, others] *= (1.0 - share) / table[prefix, others].sum()
        table[prefix, token] = share
        tables.append(np.log(np.maximum(table, 1e-300)))
        prefix = prefix * A + token

    def along(response: tuple[int, ...]) -> np.ndarray:
        prefix, rewards = 0, np.zeros(H)
        for place, token in enumerate(response):
            rewards[place] = tables[place][prefix, token]
            prefix = prefix * A + token
        return rewards

    found = prefix_elimination(along, A, H, cell.xi)
    likeliest = max(float(along(response).sum()) for response in itertools.product(range(A), repeat=H))
    return {
        "queries": found.queries,
        "excess": found.queries - found.bound,
        "excess_as_stated": found.queries - A ** min(cell.xi + 1, H),
        "found": bool(found.logp >= likeliest - 1e-9),
    }


@claim(
    paper=PAPER,
    says="Token rewards are log-ratios of the soft-optimal policy: along every answer they sum to the reward less V*. "
    "Shaping leaves the soft-optimal policy as it is; the sum paid at the end moves it as much as token by token.",
    published="sum r = sum beta log(pi* / pi_ref) + V*(s_1) (exact)",
    grid={"horizon": scales(smoke=[4], laptop=[6]), "seed": seeds(smoke=5, laptop=20)},
    expect=[
        always("identity_error", at_most=1e-10),
        always("moved_by_shaping", at_most=1e-10),
        always("last_against_token", at_most=1e-10),
        always("moved_by_rto", at_least=1e-2),
    ],
    plot=bars(x="horizon", y="identity_error", by="horizon", log="y"),
)
def exact_identities(cell: Cell) -> Row:
    import torch

    from workingpapers.alignment import soft_optimal_policy, token_rewards

    A, H, beta = 3, cell.horizon, 0.7
    rng = np.random.default_rng(cell.seed)
    answers = np.array(list(itertools.product(range(A), repeat=H)))
    prefixes = np.zeros_like(answers)
    for place in range(1, H):
        prefixes[:, place] = prefixes[:, place - 1] * A + answers[:, place - 1]

    def random_policy() -> list[np.ndarray]:
        return [np.log(rng.dirichlet(np.ones(A), size=A**place)) for place in range(H)]

    def along(tables: Any) -> np.ndarray:
        return np.stack([tables[place][prefixes[:, place], answers[:, place]] for place in range(H)], axis=1)

    reference, dpo, dense = random_policy(), random_policy(), [rng.standard_normal((A**h, A)) for h in range(H)]
    optimum = soft_optimal_policy(dense, reference, beta=beta)
    ratios = (along(optimum.logps) - along(reference)).sum(1)
    error = np.abs(along(dense).sum(1) - beta * ratios - optimum.values[0][0]).max()

    scores = torch.from_numpy(rng.standard_normal(len(answers)))
    of_dpo, of_reference = torch.from_numpy(along(dpo)), torch.from_numpy(along(reference))
    mask = torch.ones(answers.shape, dtype=torch.bool)

    def solved(beta1: float, granularity: Any) -> np.ndarray:
        rewards = token_rewards(
            of_dpo, of_reference, of_reference, mask, scores, beta1=beta1, beta2=0.0, granularity=granularity
        ).numpy()
        tables = [np.zeros((A**place, A)) for place in range(H)]
        for place in range(H):
            tables[place][prefixes[:, place], answers[:, place]] = rewards[:, place]
        return np.concatenate([t.ravel() for t in soft_optimal_policy(tables, reference, beta=beta).logps])

    sparse, dense_rto = solved(0.0, "token"), solved(0.4, "token")
    return {
        "identity_error": float(error),
        "moved_by_shaping": float(np.abs(solved(0.4, "shaping") - sparse).max()),
        "last_against_token": float(np.abs(solved(0.4, "last") - dense_rto).max()),
        "moved_by_rto": float(np.abs(dense_rto - sparse).max()),
    }
