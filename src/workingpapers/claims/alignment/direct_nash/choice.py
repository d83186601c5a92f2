"""A contextual choice whose judge is more or less circular.

120 answers with embeddings e ~ N(0, I_6), prompts x ~ N(0, I_6), and the judge

    P(y > z | x) = sigma(q(x, y) - q(x, z) + c e_y' C e_z),   q = 1.5 x' M e_y / sqrt(6)

with C skew-symmetric: at c = 0 a Bradley-Terry model is right, at c = 2 no scalar reward is. Policies are bilinear,
softmax of (x, 1)' W e_y, and take 3 times `steps` full-batch Adam steps, which the on-policy methods divide into 3
rounds over disjoint thirds of the prompts. Each prompt is judged with 5 drawn answers and one of a teacher, the softmax
of q. Every method chooses its temperature among the same ones, by its win rate against the start on validation prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

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
    import torch

PAPER = "direct-nash"
ANSWERS, WIDTH, DRAWN, ROUNDS, RATE, MOST_PAIRS = 120, 6, 5, 3, 0.02, 2_000
TEMPERATURES = [0.1, 0.03, 0.3]  # the first alone at smoke scale

METHODS = [
    "DNO",
    "DNO, soft targets",
    "DNO, all pairs",
    "DNO, teacher wins only",
    "SPIN",
    "iterative DPO",
    "offline DPO",
    "PPO on Bradley-Terry",
]
GRID: dict[str, Axis] = {
    "circularity": scales(smoke=[0.5], laptop=[0.0, 0.5, 2.0]),
    "prompts": scales(smoke=[150], laptop=[600]),
    "steps": scales(smoke=[20], laptop=[60]),
    "temperatures": scales(smoke=[1], laptop=[3]),
    "seed": seeds(smoke=5, laptop=8, paper=20),
}
TABLE = "AlpacaEval 2 win rate (length-controlled) after 3 iterations: DNO 24.97 (22.59)"
BARS = bars(x="circularity", y="win_rate", by="method")


@claim(
    paper=PAPER,
    says="DNO beats SPIN, to which every drawn answer is worse than the teacher's: against the start and head to head.",
    published=f"{TABLE}, SPIN 16.13 (16.18)",
    grid=GRID,
    expect=[
        higher("win_rate", "DNO", than="SPIN", each="circularity"),
        lower("against_dno", "SPIN", than=0.5, each="circularity"),
    ],
    plot=BARS,
)
def against_spin(cell: Cell) -> list[Row]:
    return standings(cell)


@claim(
    paper=PAPER,
    says="Learning also where a drawn answer wins pays: DNO beats DNO-Restrictive, which learns only where the teacher "
    "wins, against the start and head to head.",
    published=f"{TABLE}, DNO-Restrictive 19.21 (21.61)",
    grid=GRID,
    expect=[
        higher("win_rate", "DNO", than="DNO, teacher wins only", each="circularity"),
        lower("against_dno", "DNO, teacher wins only", than=0.5, each="circularity"),
    ],
    plot=BARS,
)
def against_restrictive(cell: Cell) -> list[Row]:
    return standings(cell)


@claim(
    paper=PAPER,
    says="Renewing the reference every round pays: DNO beats iterative DPO, whose reference stays the start.",
    published="the derivation makes pi_t the reference; no numbers for iterative DPO with a frozen one",
    grid=GRID,
    expect=[
        higher("win_rate", "DNO", than="iterative DPO", each="circularity"),
        lower("against_dno", "iterative DPO", than=0.5, each="circularity"),
    ],
    plot=BARS,
)
def against_iterative_dpo(cell: Cell) -> list[Row]:
    return standings(cell)


@claim(
    paper=PAPER,
    says="On-policy rounds pay: DNO beats DPO on answers that the start drew to all prompts, with as many judgements "
    "and steps.",
    published=f"{TABLE}, offline DPO 18.22 (19.49)",
    grid=GRID,
    expect=[
        higher("win_rate", "DNO", than="offline DPO", each="circularity"),
        lower("against_dno", "offline DPO", than=0.5, each="circularity"),
    ],
    plot=BARS,
)
def against_offline_dpo(cell: Cell) -> list[Row]:
    return standings(cell)


@claim(
    paper=PAPER,
    says="Where preferences go in circles, DNO with soft targets beats PPO on a fitted Bradley-Terry reward head to "
    "head and is less exploitable.",
    published="scalar rewards cannot express intransitive preferences (section 2); no numbers for PPO",
    grid=GRID,
    only=lambda cell: cell.circularity > 0,
    expect=[
        higher("against_ppo", "DNO, soft targets", than=0.5, each="circularity"),
        lower("exploitability", "DNO, soft targets", than="PPO on Bradley-Terry", each="circularity"),
    ],
    plot=bars(x="circularity", y="exploitability", by="method"),
)
def against_ppo(cell: Cell) -> list[Row]:
    """`against_ppo` is the win rate against PPO on Bradley-Terry."""
    return standings(cell)


@claim(
    paper=PAPER,
    says="Keeping only pairs with a large margin pays.",
    published="AlpacaEval 2 win rate 11.60 with 42k pairs of large margin, 9.60 with all 63k",
    grid=GRID,
    expect=[
        higher("win_rate", "DNO", than="DNO, all pairs", each="circularity"),
        lower("against_dno", "DNO, all pairs", than=0.5, each="circularity"),
    ],
    plot=BARS,
)
def large_margins(cell: Cell) -> list[Row]:
    return standings(cell)


@claim(
    paper=PAPER,
    says="Regression on win rates, the form the theory derives, is less exploitable than every method that learns from "
    "hard labels.",
    published="the paper trains on hard labels alone; no numbers for soft targets",
    grid=GRID,
    expect=[
        lower(
            "exploitability",
            "DNO, soft targets",
            than=["DNO", "DNO, all pairs", "DNO, teacher wins only", "SPIN", "iterative DPO", "offline DPO"],
            each="circularity",
        )
    ],
    plot=bars(x="circularity", y="exploitability", by="method"),
)
def soft_targets(cell: Cell) -> list[Row]:
    return standings(cell)


@claim(
    paper=PAPER,
    says="Every round of DNO beats the round before it, on prompts that it has not seen.",
    published="monotonic improvement across iterations (section 3 and figure 1); no single numbers",
    grid=GRID,
    expect=[
        higher("improvement", method, than=0.5, each=["circularity", "round"])
        for method in ("DNO", "DNO, soft targets")
    ],
    plot=bars(x="round", y="improvement", by="method", each="circularity"),
)
def rounds_improve(cell: Cell) -> list[Row]:
    found = tournament(cell.seed, cell.circularity, cell.prompts, cell.steps, cell.temperatures)
    return [
        {"method": method, "round": number + 1, "improvement": float(value)}
        for method in ("DNO", "DNO, soft targets")
        for number, value in enumerate(found["improvement"][METHODS.index(method)])
    ]


def standings(cell: Cell) -> list[Row]:
    """Win rate against the start, against DNO and against PPO, and exploitability of every method."""
    found = tournament(cell.seed, cell.circularity, cell.prompts, cell.steps, cell.temperatures)
    return [
        {
            "method": method,
            "win_rate": float(found["win_rate"][place]),
            "against_dno": float(found["duels"][place, METHODS.index("DNO")]),
            "against_ppo": float(found["duels"][place, METHODS.index("PPO on Bradley-Terry")]),
            "exploitability": float(found["exploitability"][place]),
            "temperature": float(found["temperature"][place]),
        }
        for place, method in enumerate(METHODS)
    ]


@artifact
def tournament(seed: int, circularity: float, prompts: int, steps: int, temperatures: int) -> dict[str, np.ndarray]:
    """All methods on one problem, with what they do on 100 test prompts."""
    from workingpapers.alignment import exploitability

    world = World(seed, circularity)
    training, validation, test = (world.prompts(count) for count in (prompts, 100, 100))
    start = 0.3 * world.normal(WIDTH + 1, WIDTH)
    validation_games, games = world.games(validation), world.games(test)

    def beats(weights: list[torch.Tensor], others: list[torch.Tensor]) -> np.ndarray:
        return _win_rates(games, *(world.policies(side, test) for side in (weights, others)))

    at_start = world.policies([start], validation)
    chosen: list[tuple[float, list[torch.Tensor]]] = []
    for method in METHODS:
        tried = []
        for eta in TEMPERATURES[:temperatures]:
            world.generator.manual_seed(10_000 + seed)  # all methods meet the same draws as long as they agree
            rounds = _train(method, world, training, start, eta, steps)
            gained = _win_rates(validation_games, world.policies(rounds[-1:], validation), at_start)
            tried.append((float(gained[0, 0]), eta, rounds))
        _, eta, rounds = max(tried, key=lambda entry: entry[0])
        chosen.append((eta, rounds))
    last = [rounds[-1] for _, rounds in chosen]
    policies = world.policies(last, test).double().numpy()
    exploited = [exploitability(games.double().numpy(), policy / policy.sum(-1, keepdims=True)) for policy in policies]
    return {
        "temperature": np.array([eta for eta, _ in chosen]),
        "win_rate": beats(last, [start])[:, 0],
        "duels": beats(last, last),
        "exploitability": np.array([of_prompts.mean() for of_prompts in exploited]),
        "improvement": np.stack([beats(rounds, [start, *rounds[:-1]]).diagonal() for _, rounds in chosen]),
    }


def _win_rates(games: torch.Tensor, policies: torch.Tensor, others: torch.Tensor) -> np.ndarray:
    """P(pi > pi'), exactly, of every policy against every other."""
    import torch

    found: np.ndarray = torch.einsum(
        "axy,bxy->ab", policies, (games @ others.permute(1, 2, 0)).permute(2, 0, 1)
    ).numpy()
    return found / len(games)


class World:
    """Answers, judge and teacher of one seed."""

    def __init__(self, seed: int, circularity: float) -> None:
        import torch

        self.generator = torch.Generator().manual_seed(seed)
        self.answers = self.normal(ANSWERS, WIDTH)
        self.quality = 1.5 * self.normal(WIDTH, WIDTH) / WIDTH
        circle = self.normal(WIDTH, WIDTH)
        self.circles = circularity * self.answers @ ((circle - circle.T) / WIDTH) @ self.answers.T

    def normal(self, *shape: int) -> torch.Tensor:
        import torch

        return torch.randn(*shape, generator=self.generator)

    def prompts(self, count: int) -> torch.Tensor:
        """Features of prompts with a constant 1 at the end."""
        import torch

        return torch.cat([self.normal(count, WIDTH), torch.ones(count, 1)], 1)

    def qualities(self, prompts: torch.Tensor) -> torch.Tensor:
        return prompts[:, :-1] @ self.quality @ self.answers.T

    def games(self, prompts: torch.Tensor) -> torch.Tensor:
        """P(y > z | x) for all answers."""
        quality = self.qualities(prompts)
        return (quality[:, :, None] - quality[:, None, :] + self.circles).sigmoid()

    def judged(self, prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """The same for some answers to each prompt."""
        quality = self.qualities(prompts).gather(1, answers)
        circles = self.circles[answers[:, :, None], answers[:, None, :]]
        return (quality[:, :, None] - quality[:, None, :] + circles).sigmoid()

    def log_policy(self, weights: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        return (prompts @ weights @ self.answers.T).log_softmax(-1)

    def policies(self, weights: list[torch.Tensor], prompts: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.stack([self.log_policy(one, prompts).exp() for one in weights])

    def draw(self, weights: torch.Tensor, prompts: torch.Tensor, count: int) -> torch.Tensor:
        probabilities = self.log_policy(weights, prompts).exp()
        return probabilities.multinomial(count, replacement=True, generator=self.generator)

    def candidates(self, weights: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Answers of the policy, and at the end one of the teacher."""
        import torch

        teacher = self.qualities(prompts).softmax(-1).multinomial(1, generator=self.generator)
        return torch.cat([self.draw(weights, prompts, DRAWN), teacher], 1)


@dataclass(frozen=True)
class Rule:
    """How one of the methods that learn from pairs makes them."""

    margin: float = 0.25
    student_margin: float = 0.15
    allow: tuple[str, ...] = ("teacher>student", "student>teacher", "student>student")
    soft: bool = False
    frozen_reference: bool = False
    teacher_always_wins: bool = False
    rounds: int = ROUNDS


RULES = {
    "DNO": Rule(),
    "DNO, soft targets": Rule(margin=0.0, student_margin=0.0, soft=True),
    "DNO, all pairs": Rule(margin=0.0, student_margin=0.0),
    "DNO, teacher wins only": Rule(allow=("teacher>student",)),
    "SPIN": Rule(allow=("teacher>student",), teacher_always_wins=True),
    "iterative DPO": Rule(frozen_reference=True),
    "offline DPO": Rule(rounds=1),
}


def _train(
    method: str, world: World, prompts: torch.Tensor, start: torch.Tensor, eta: float, steps: int
) -> list[torch.Tensor]:
    """The weights after each round; three times the same where there is only one."""
    if method not in RULES:
        return _ppo(world, prompts, start, eta, steps)
    rule = RULES[method]
    weights, made, rounds = start, [], []
    for part in np.array_split(np.arange(len(prompts)), rule.rounds):
        made.append(_pairs(world, rule, prompts, part, weights))
        weights = _regress(world, rule, prompts, made, start if rule.frozen_reference else weights, weights, eta, steps)
        rounds.append(weights)
    return rounds if rule.rounds > 1 else rounds * ROUNDS


def _pairs(
    world: World, rule: Rule, prompts: torch.Tensor, part: np.ndarray, weights: torch.Tensor
) -> list[tuple[float, ...]]:
    """Prompt, winner, loser and the win rates of these two, for a part of the prompts; some where there are many."""
    import torch

    from workingpapers.alignment import borda_scores, build_pairs

    answers = world.candidates(weights, prompts[part])
    tables = world.judged(prompts[part], answers).double()
    source = ["student"] * DRAWN + ["teacher"]
    scores = np.zeros(answers.shape) if rule.teacher_always_wins else borda_scores(tables.numpy())
    scores[:, -1] += rule.teacher_always_wins
    rows = build_pairs(scores, source, margin=rule.margin, student_margin=rule.student_margin, allow=rule.allow).pairs
    most = MOST_PAIRS * (ROUNDS // rule.rounds)
    if len(rows) > most:
        rows = rows[torch.randperm(len(rows), generator=world.generator)[:most].numpy()]
    against = tables[:, :, :DRAWN].sum(-1)  # win rates against the policy's answers, an answer itself left out
    rates = torch.cat([(against[:, :DRAWN] - 0.5) / (DRAWN - 1), against[:, DRAWN:] / DRAWN], 1).float()
    prompt, winner, loser = torch.from_numpy(rows).T
    columns = (answers[prompt, winner], answers[prompt, loser], rates[prompt, winner], rates[prompt, loser])
    return list(zip(part[rows[:, 0]].tolist(), *(column.tolist() for column in columns), strict=True))


def _regress(
    world: World,
    rule: Rule,
    prompts: torch.Tensor,
    made: list[list[tuple[float, ...]]],
    reference: torch.Tensor,
    weights: torch.Tensor,
    eta: float,
    steps: int,
) -> torch.Tensor:
    import torch

    from workingpapers.alignment import DNOLoss, ReplayMix

    mixed = ReplayMix(first=0.0 if rule.soft else 0.30)(made)
    prompt, first, second, r1, r2 = (torch.tensor(column) for column in zip(*mixed, strict=True))
    used, row = torch.unique(prompt, return_inverse=True)

    def logprobs(of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table = world.log_policy(of, prompts[used])
        return table[row, first], table[row, second]

    loss, old = DNOLoss(eta, hard=not rule.soft), logprobs(reference)
    weights = weights.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=RATE)
    for _ in range(steps * (ROUNDS // rule.rounds)):
        optimizer.zero_grad()
        loss(*logprobs(weights), *old, r1, r2).loss.backward()
        optimizer.step()
    return weights.detach()


def _ppo(world: World, prompts: torch.Tensor, start: torch.Tensor, eta: float, steps: int) -> list[torch.Tensor]:
    """Fit a reward to all judged pairs of the start's answers, then draw answers anew every 4 clipped steps."""
    import torch

    from workingpapers.alignment import ppo_losses, whiten

    answers = world.candidates(start, prompts)
    tables = world.judged(prompts, answers)
    reward = torch.zeros(WIDTH + 1, WIDTH, requires_grad=True)
    fit = torch.optim.LBFGS([reward], max_iter=200, line_search_fn="strong_wolfe")

    def scores(drawn: torch.Tensor) -> torch.Tensor:
        return (prompts @ reward @ world.answers.T).gather(1, drawn)

    def closure() -> torch.Tensor:
        fit.zero_grad()
        found = scores(answers)
        gaps = found[:, :, None] - found[:, None, :]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(gaps, tables)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    fit.step(closure)  # type: ignore[no-untyped-call]
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=RATE)
    log_start, rounds = world.log_policy(start, prompts), []
    mask = torch.ones(len(prompts), DRAWN, dtype=torch.bool)
    zeros = torch.zeros(mask.shape)  # the baseline is the mean over a prompt's answers: no value function is needed
    for rollout in range(ROUNDS * steps // 4):
        with torch.no_grad():
            drawn = world.draw(weights, prompts, DRAWN)
            old = world.log_policy(weights, prompts).gather(1, drawn)
            shaped = scores(drawn) - eta * (old - log_start.gather(1, drawn))
            advantages = whiten(shaped - shaped.mean(1, keepdim=True), mask)
        for _ in range(4):
            optimizer.zero_grad()
            now = world.log_policy(weights, prompts).gather(1, drawn)
            ppo_losses(
                now,
                zeros,
                old_logprobs=old,
                old_values=zeros,
                advantages=advantages,
                returns=zeros,
                mask=mask,
            ).loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if (rollout + 1) % (steps // 4) == 0:
            rounds.append(weights.detach().clone())
    return rounds
