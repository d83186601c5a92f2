"""Answers from a table of tokens, what is fitted to pairs of them, and the runs of every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from workingpapers.desk.claim import artifact

if TYPE_CHECKING:
    import torch

PAPER = "reinforced-token"
TABLE = (
    "AlpacaEval 2 length-controlled / raw win rate, Arena-Hard style-controlled / raw: PPO 19.47/12.89, 16.2/15.6; "
    "RTO 27.00/22.45, 20.3/21.4; DPO 17.40/12.23, 13.2/13.8"
)
ABLATION = (
    "AlpacaEval 2 length-controlled / raw win rate, Arena-Hard: RTO 27.00/22.45, 20.3/21.4; Semi-RTO 23.77/19.17, "
    "19.0/19.7; DDPO 21.09/13.06, 13.1/12.1; RS-PPO 27.52/21.69, 19.2/19.9"
)

TOKENS, PAIRS, DELIMITER = 8, 1_500, 0
# beta1, granularity of the token rewards, and whether a critic estimates advantages
RUNS: dict[str, tuple[float, str, bool]] = {
    "PPO": (0.0, "token", True),
    "REINFORCE": (0.0, "token", False),
    "RTO": (0.3, "token", True),
    "RTO, beta1 1": (1.0, "token", True),
    "RTO, REINFORCE": (0.3, "token", False),
    "Semi-RTO": (0.3, "sentence", True),
    "DDPO": (0.3, "last", True),
    "RS-PPO": (0.3, "shaping", True),
}


def reached(gain: np.ndarray, level: float) -> float:
    """Iterations, interpolated, after which a curve that starts at 0 first reaches a level; all of them if never."""
    above = np.flatnonzero(gain >= level)
    if not len(above) or above[0] == 0:
        return float(len(gain) - 1)
    at = above[0]
    return float(at - (gain[at] - level) / (gain[at] - gain[at - 1]))


@artifact
def token_problem(horizon: int, seed: int) -> dict[str, np.ndarray]:
    """Reference, true reward, and what is fitted to the pairs: sentence reward and DPO policy, all (H, A, A)."""
    import torch
    from torch.nn.functional import logsigmoid

    generator = torch.Generator().manual_seed(seed)
    shape = (horizon, TOKENS, TOKENS)
    reference = (0.5 * torch.randn(shape, generator=generator)).log_softmax(-1)
    truth = 0.7 * torch.randn(shape, generator=generator)
    answers = draw(reference, 2 * PAIRS, generator)
    first, second = (total(truth, side) for side in answers.chunk(2))
    wins = torch.rand(PAIRS, generator=generator) < (first - second).sigmoid()
    chosen = torch.where(wins[:, None], answers[:PAIRS], answers[PAIRS:])
    rejected = torch.where(wins[:, None], answers[PAIRS:], answers[:PAIRS])

    def fit(start: torch.Tensor, reward: Callable[[torch.Tensor], torch.Tensor], ridge: float) -> torch.Tensor:
        table = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([table], lr=0.05)
        for _ in range(100):
            rewards = reward(table)
            loss = -logsigmoid(total(rewards, chosen) - total(rewards, rejected)).mean() + ridge * (table**2).sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        return table.detach()

    sentence = fit(torch.zeros(shape), lambda table: table, 1e-4)
    dpo = fit(reference, lambda logits: 0.5 * (logits.log_softmax(-1) - reference), 0.0).log_softmax(-1)
    gain = expected_return(dpo, truth) - expected_return(reference, truth)
    tables = {"reference": reference, "truth": truth, "sentence": sentence, "dpo": dpo}
    return {name: table.numpy() for name, table in tables.items()} | {"dpo_gain": np.array(gain)}


@artifact
def curve(method: str, horizon: int, batch: int, iterations: int, seed: int) -> dict[str, np.ndarray]:
    """True return above the reference's after every iteration: 4 full-batch steps of Adam on the answers drawn."""
    import torch

    from workingpapers.alignment import gae, ppo_losses, token_rewards, whiten

    beta1, granularity, with_critic = RUNS[method]
    tables = {name: torch.from_numpy(table) for name, table in token_problem(horizon, seed).items()}
    own = np.random.SeedSequence([seed, 1])  # not the numbers that drew the problem
    generator = torch.Generator().manual_seed(int(own.generate_state(1)[0]))
    logits = tables["reference"].clone().requires_grad_()
    values = torch.zeros(horizon, TOKENS, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [logits], "lr": 0.05}, {"params": [values], "lr": 0.1}])
    places, mask = torch.arange(horizon), torch.ones(batch, horizon, dtype=torch.bool)
    start = expected_return(tables["reference"], tables["truth"])
    gains = [0.0]
    for _ in range(iterations):
        policy = logits.detach().log_softmax(-1)
        answers = draw(policy, batch, generator)
        before = torch.nn.functional.pad(answers, (1, 0))[:, :-1]
        logps, old_values = policy[places, before, answers], values.detach()[places, before]
        rewards = token_rewards(
            tables["dpo"][places, before, answers],
            tables["reference"][places, before, answers],
            logps,
            mask,
            total(tables["sentence"], answers),
            beta1=beta1,
            beta2=0.02,
            granularity=granularity,  # type: ignore[arg-type]
            delimiters=answers == DELIMITER,
        )
        old_values = old_values if with_critic else torch.zeros_like(old_values)
        advantages, returns = gae(rewards, old_values, mask, lam=0.95 if with_critic else 1.0)
        for _ in range(4):
            out = ppo_losses(
                logits.log_softmax(-1)[places, before, answers],
                values[places, before],
                old_logprobs=logps,
                old_values=old_values,
                advantages=whiten(advantages, mask),
                returns=returns,
                mask=mask,
                value_clip=None,
                value_weight=1.0,
            )
            optimizer.zero_grad()
            torch.autograd.backward(out.loss)
            optimizer.step()
        gains.append(expected_return(logits.detach().log_softmax(-1), tables["truth"]) - start)
    return {"gain": np.array(gains)}


def draw(policy: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Answers (count, H) of a table of log-probabilities, token 0 before the first."""
    import torch

    uniform = torch.rand(len(policy), count, 1, generator=generator)
    cumulative = policy.exp().cumsum(-1)
    answers = torch.zeros(count, len(policy) + 1, dtype=torch.long)
    for place in range(len(policy)):
        answers[:, place + 1] = (uniform[place] > cumulative[place, answers[:, place], :-1]).sum(-1)
    return answers[:, 1:]


def total(table: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Sum of a table's entries along answers."""
    import torch

    before = torch.nn.functional.pad(answers, (1, 0))[:, :-1]
    return table[torch.arange(len(table)), before, answers].sum(-1)


def expected_return(policy: torch.Tensor, reward: torch.Tensor) -> float:
    """Exact, by backward induction over the token before."""
    value = reward.new_zeros(TOKENS)
    for logps, rewards in zip(policy.flip(0), reward.flip(0), strict=True):
        value = (logps.exp() * (rewards + value)).sum(-1)
    return float(value[0])
