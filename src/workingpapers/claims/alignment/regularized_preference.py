"""Claims of "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer".

The paper's own tables are GPT-4 judgements of 7-billion-parameter models. What they rest on can be measured where the
true reward is known: does the supervised term keep the policy on answers that the pairs cover, and does the true
reward gain from it? The competitors are DPO with the same steps, DPO stopped by an oracle that sees the true reward,
supervised fine-tuning on the chosen answers, and the reference.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.claims.alignment.beside_trl import adamw_step, small_llama, timed_steps, trl_dpo_loss
from workingpapers.claims.alignment.testbeds import (
    HELD_OUT_TOPICS,
    adapted,
    judged_answers,
    pretrained_transformer,
    sentence_pairs,
    sentence_prompt,
)
from workingpapers.desk.claim import (
    Axis,
    Cell,
    Row,
    always,
    artifact,
    bars,
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


PAPER = "regularized-preference"
ORACLE = "DPO, oracle stop"

# ------------------------------------------------------------------------------- a log-linear policy, true reward known

ETAS = [0.005, 0.05, 0.2, 0.5, 1.0]
RPO = [f"RPO {eta:g}" for eta in ETAS]
WIN_RATES = "GPT-4 win rate of RPO over DPO 56.0 % (beta series) and 54.0 % (gemma series), table 1"


@claim(
    paper=PAPER,
    says="Where DPO overoptimizes (beta 0.1), RPO keeps the chosen answers likely and ends at a higher true reward; "
    "with eta 0.2 it comes within 0.1 of DPO stopped by an oracle.",
    published=f"{WIN_RATES}; chosen log-probability stays above DPO's during training (figures 1 and 4)",
    grid={"beta": [0.1], "seed": seeds(smoke=5, laptop=16)},
    expect=[
        higher("true_reward", "RPO 0.2", than=["DPO", "SFT", "reference"]),
        higher("true_reward", "RPO 0.2", than=ORACLE, margin=-0.1),
        higher("true_reward", "RPO 0.005", than="DPO"),
        *(higher("chosen_logprob", more, than=less) for less, more in itertools.pairwise(["DPO", *RPO])),
        lower("uncovered_mass", "RPO 0.2", than="DPO"),
    ],
    plot=bars(x="method", y="true_reward"),
)
def small_beta(cell: Cell) -> list[Row]:
    return log_linear_policies(cell.beta, cell.seed)


@claim(
    paper=PAPER,
    says="RPO ends at a higher true reward than DPO also where the KL weight is large (beta 1).",
    published=WIN_RATES,
    grid={"beta": [1.0], "seed": seeds(smoke=5, laptop=16)},
    expect=[
        higher("true_reward", "RPO 0.2", than="DPO"),
        *(higher("chosen_logprob", more, than=less) for less, more in itertools.pairwise(["DPO", *RPO])),
    ],
    plot=bars(x="method", y="true_reward"),
)
def large_beta(cell: Cell) -> list[Row]:
    return log_linear_policies(cell.beta, cell.seed)


def log_linear_policies(beta: float, seed: int) -> list[Row]:
    """Train ``pi_theta ~ pi_ref exp(phi theta)`` with every loss at once, one column of theta each.

    20 prompts, 200 actions of which the reference covers 20 well, 400 pairs with Bradley-Terry labels.
    """
    import torch

    from workingpapers.alignment import dpo_losses

    prompts, actions, covered, dimension, pairs = 20, 200, 20, 12, 400
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(prompts, actions, dimension, generator=generator)
    ref_logits = torch.randn(prompts, actions, generator=generator)
    ref_logits[:, covered:] -= 5.0
    log_ref = ref_logits.log_softmax(1)
    direction = torch.randn(dimension, generator=generator)
    reward = phi @ (direction / direction.norm())
    reward[:, covered:] = -1.0

    prompt = torch.randint(prompts, (pairs,), generator=generator)
    drawn = torch.multinomial(log_ref.exp()[prompt], 2, replacement=True, generator=generator)
    gap = reward[prompt, drawn[:, 0]] - reward[prompt, drawn[:, 1]]
    swapped = torch.rand(pairs, generator=generator) > gap.sigmoid()
    chosen, rejected = torch.where(swapped, drawn.T.flip(0), drawn.T)

    methods = {"DPO": (1.0, 0.0)} | {name: (1.0, eta * beta) for name, eta in zip(RPO, ETAS, strict=True)}
    methods |= {"SFT": (0.0, 1.0)}
    preference_weight, supervised_weight = torch.tensor(list(methods.values())).T
    theta = torch.zeros(dimension, len(methods), requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.05)
    ref_chosen, ref_rejected = log_ref[prompt, chosen, None], log_ref[prompt, rejected, None]
    best: Row = {"true_reward": -math.inf}
    for step in range(400):
        log_policy = (log_ref[..., None] + phi @ theta).log_softmax(1)
        likelihood = log_policy[prompt, chosen]
        preference = dpo_losses(likelihood - ref_chosen, log_policy[prompt, rejected] - ref_rejected, beta=beta)
        optimizer.zero_grad()
        (preference_weight * preference - supervised_weight * likelihood).mean(0).sum().backward()
        optimizer.step()
        if step % 4 == 0:  # the oracle looks at DPO
            state = _state(log_policy[..., 0].detach(), reward, prompt, chosen, covered)
            best = max(best, state, key=lambda row: row["true_reward"])
    with torch.no_grad():
        final = (log_ref[..., None] + phi @ theta).log_softmax(1).unbind(-1)
    states = {name: _state(table, reward, prompt, chosen, covered) for name, table in zip(methods, final, strict=True)}
    states |= {ORACLE: best, "reference": _state(log_ref, reward, prompt, chosen, covered)}
    return [{"method": name, **state} for name, state in states.items()]


def _state(
    log_policy: torch.Tensor, reward: torch.Tensor, prompt: torch.Tensor, chosen: torch.Tensor, covered: int
) -> Row:
    policy = log_policy.exp()
    return {
        "true_reward": (policy * reward).sum(-1).mean().item(),
        "uncovered_mass": policy[:, covered:].sum(-1).mean().item(),
        "chosen_logprob": log_policy[prompt, chosen].mean().item(),
    }


# ----------------------------------------------------------------------------------------------------- the exact game


@claim(
    paper=PAPER,
    says="Maximin equals minimax: the soft-optimal policy of the least favourable reward has no duality gap, and no "
    "policy near it does better against its own worst reward.",
    published="Theorem 5.6: the minimiser of the reward problem gives the policy of the maximin problem (exact)",
    grid={"eta": scales(smoke=[0.2], laptop=[0.02, 0.2, 2.0]), "seed": seeds(smoke=5, laptop=10)},
    expect=[always("duality_gap", at_most=1e-8), always("gain_of_best_perturbation", at_most=1e-8)],
    plot=bars(x="eta", y="duality_gap", by="eta", log="y"),
)
def saddle_point(cell: Cell) -> Row:
    from scipy.optimize import minimize

    from workingpapers.alignment import rpo_minimax

    prompts, actions, pairs, beta, bound = 3, 6, 60, 0.5, 10.0
    rng = np.random.default_rng(cell.seed)
    ref = rng.dirichlet(np.ones(actions), size=prompts)
    prompt, chosen = rng.integers(prompts, size=pairs), rng.integers(actions, size=pairs)
    rejected = (chosen + rng.integers(1, actions, size=pairs)) % actions
    found = rpo_minimax(ref, np.stack([prompt, chosen, rejected], 1), beta=beta, eta=cell.eta, reward_bound=bound)

    base = np.zeros_like(ref)
    np.add.at(base, (prompt, chosen), 1.0)
    prior = base.sum(1) / pairs
    base /= base.sum(1, keepdims=True)

    def worst_case(policy: np.ndarray) -> float:
        """min over |r| <= bound of eta E[r(x, a) - r(x, a0) - beta KL] + L_D(r), by an independent solver."""
        linear = cell.eta * prior[:, None] * (policy - base)

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            reward = flat.reshape(ref.shape)
            margin = reward[prompt, chosen] - reward[prompt, rejected]
            gradient = linear.copy()
            np.add.at(gradient, (prompt, chosen), -1 / (1 + np.exp(margin)) / pairs)
            np.add.at(gradient, (prompt, rejected), 1 / (1 + np.exp(margin)) / pairs)
            return float((linear * reward).sum() + np.logaddexp(0, -margin).mean()), gradient.ravel()

        options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 2000}
        bounds = [(-bound, bound)] * ref.size
        inner = minimize(objective, found.reward.ravel(), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return float(inner.fun - cell.eta * beta * prior @ (policy * np.log(policy / ref)).sum(1))

    ours, perturbed = worst_case(found.policy), []
    for scale in np.repeat([1e-3, 1e-2, 0.1, 1.0], 25):
        other = found.policy * np.exp(scale * rng.standard_normal(ref.shape))
        perturbed.append(worst_case(other / other.sum(1, keepdims=True)))
    return {"duality_gap": abs(found.value - ours), "gain_of_best_perturbation": max(perturbed) - ours}


# ------------------------------------------------------------------------------ a small transformer, gold reward known

SETTINGS = {(500, 0.1), (2_000, 0.01)}  # pairs and beta: few pairs seen 13 times, or more pairs and a small KL weight
BIGRAM_ETAS = {"DPO": 0.0, ORACLE: 0.0, "RPO 0.005": 0.005, "RPO 0.05": 0.05, "RPO 0.2": 0.2}
BIGRAM_ETAS["SFT"] = 1e6  # so large that the preference term is lost in rounding
INCREASING_ETA = list(itertools.pairwise(["DPO", "RPO 0.005", "RPO 0.05", "RPO 0.2"]))
BIGRAM_GRID: dict[str, Axis] = {
    "pairs": scales(smoke=[], laptop=[500, 2_000]),
    "beta": [0.1, 0.01],
    "steps": scales(smoke=[], laptop=[200], paper=[1_000]),
    "seed": seeds(smoke=5, laptop=5, paper=10),
    "method": list(BIGRAM_ETAS),
}


@claim(
    paper=PAPER,
    says="A transformer trained on pairs of its own answers: the larger eta, the likelier the chosen answers stay.",
    published="chosen log-probability notably above DPO's during training (figures 1 and 4, no table)",
    grid=BIGRAM_GRID,
    only=lambda cell: (cell.pairs, cell.beta) in SETTINGS,
    expect=[
        higher("chosen_logprob", more, than=less, each="pairs", where={"step": "last"}) for less, more in INCREASING_ETA
    ],
    plot=line(x="step", y="chosen_logprob", each="pairs"),
)
def chosen_answers_stay_likely(cell: Cell) -> list[Row]:
    return bigram_rows(cell)


@claim(
    paper=PAPER,
    says="On the same transformer: the larger eta, the fewer bigrams that the training text never had.",
    published="the policy stays on answers that the data cover (theory, section 5); not measured there",
    grid=BIGRAM_GRID,
    only=lambda cell: (cell.pairs, cell.beta) in SETTINGS,
    expect=[
        lower("illegal_rate", more, than=less, each="pairs", where={"step": "last"}) for less, more in INCREASING_ETA
    ],
    plot=line(x="step", y="illegal_rate", each="pairs"),
)
def fewer_illegal_bigrams(cell: Cell) -> list[Row]:
    return bigram_rows(cell)


@claim(
    paper=PAPER,
    says="With beta 0.1 and 500 pairs, trained far past DPO's peak, RPO with a small eta ends at a higher gold reward "
    "than DPO and than supervised fine-tuning.",
    published=WIN_RATES,
    grid=BIGRAM_GRID,
    only=lambda cell: (cell.pairs, cell.beta) == (500, 0.1),
    expect=[higher("gold", ours, than=["DPO", "SFT"], where={"step": "last"}) for ours in ("RPO 0.005", "RPO 0.05")],
    plot=line(x="step", y="gold"),
)
def gold_reward_past_the_peak(cell: Cell) -> list[Row]:
    return bigram_rows(cell)


@claim(
    paper=PAPER,
    says="With a small KL weight (beta 0.01, 2,000 pairs) RPO with a small eta ends at a higher gold reward than DPO "
    "and than supervised fine-tuning.",
    published=WIN_RATES,
    grid=BIGRAM_GRID,
    only=lambda cell: (cell.pairs, cell.beta) == (2_000, 0.01),
    expect=[higher("gold", ours, than=["DPO", "SFT"], where={"step": "last"}) for ours in ("RPO 0.005", "RPO 0.05")],
    plot=line(x="step", y="gold"),
)
def gold_reward_with_a_small_beta(cell: Cell) -> list[Row]:
    return bigram_rows(cell)


def bigram_rows(cell: Cell) -> list[Row]:
    curve = bigram_curve(cell.seed, cell.pairs, cell.beta, cell.steps, BIGRAM_ETAS[cell.method])
    rows = [dict(zip(curve, map(float, values), strict=True)) for values in zip(*curve.values(), strict=True)]
    return [max(rows, key=lambda row: row["gold"]) | {"step": cell.steps}] if cell.method == ORACLE else rows


@artifact
def bigram_curve(seed: int, pairs: int, beta: float, steps: int, eta: float) -> dict[str, np.ndarray]:
    """Every 50 steps: gold reward and illegal bigrams of 1,000 samples, log-probability of the chosen answers."""
    from workingpapers.alignment import GoldRewardLab, RPOConfig, RPOTrainer, overoptimization_report

    lab = GoldRewardLab(seed)
    model, reference = pretrained_transformer(seed), pretrained_transformer(seed)
    data = lab.pairs(reference, pairs, seed=seed)
    args = RPOConfig(
        beta=beta,
        eta=eta,
        learning_rate=1e-3,
        warmup=None,
        weight_decay=0.01,
        batch_size=32,
        max_steps=steps,
        precompute_reference=True,
        random_state=seed,
    )
    trainer = RPOTrainer(model, reference, data, args=args)
    rows = []
    for step in range(0, steps + 1, 50):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the supervised term is meant to swamp the other for SFT
            trainer.train(step - len(trainer.history))
        measured = lab.measure(model, reference, seed=step)
        report = overoptimization_report(model, reference, data[:500], batch_size=100)
        rows.append(
            {
                "step": step,
                "gold": measured["gold"],
                "illegal_rate": measured["illegal_rate"],
                "chosen_logprob": report.chosen_logprob,
                "rejected_logprob": report.rejected_logprob,
                "accuracy": report.accuracy,
            }
        )
    return {name: np.array([row[name] for row in rows], dtype=float) for name in rows[0]}


# ---------------------------------------------------------------------- SmolLM2-135M-Instruct, a reward that is checked


@claim(
    paper=PAPER,
    says="SmolLM2-135M-Instruct, asked for one short sentence on a topic and trained on its own answers ranked by a "
    "checkable reward: RPO keeps the chosen answers likelier than DPO and its final reward is higher.",
    published=f"{WIN_RATES}; chosen log-probability above DPO's (figures 1 and 4)",
    grid={
        "pairs": scales(smoke=[], laptop=[], paper=[96]),
        "steps": scales(smoke=[], laptop=[], paper=[40]),
        "held_out": scales(smoke=[], laptop=[], paper=[16]),
        "seed": seeds(smoke=5, laptop=5, paper=5),
        "method": ["DPO", "RPO 0.005", "RPO mean 0.2"],
    },
    expect=[
        higher("chosen_change", "RPO 0.005", than="DPO", where={"step": "last"}),
        higher("gold", "RPO 0.005", than="DPO", where={"step": "last"}),
        higher("chosen_change", "RPO mean 0.2", than="DPO", where={"step": "last"}),
        higher("gold", "RPO mean 0.2", than="DPO", where={"step": "last"}),
    ],
    plot=line(x="step", y="gold"),
)
def smollm2_short_sentences(cell: Cell) -> list[Row]:

    from workingpapers.alignment import RPOConfig, RPOTrainer, overoptimization_report
    from workingpapers.data import smollm2

    model, tokenizer = smollm2()
    pairs = sentence_pairs(cell.pairs, cell.seed, tokenizer)
    policy = adapted(model, cell.seed)
    losses: dict[str, dict[str, Any]] = {
        "DPO": {"eta": 0.0},
        "RPO 0.005": {"eta": 0.005},
        "RPO mean 0.2": {"eta": 0.2, "sft": "mean"},
    }
    args = RPOConfig(
        beta=0.05,
        learning_rate=5e-4,
        warmup=None,
        max_steps=cell.steps,
        precompute_reference=True,
        random_state=cell.seed,
        **losses[cell.method],
    )
    trainer = RPOTrainer(policy, None, pairs, args=args)
    rows: list[Row] = []
    before = np.zeros(0)
    for step in sorted({0, cell.steps // 2, cell.steps}):
        trainer.train(step - len(trainer.history))
        prompts = [sentence_prompt(topic, tokenizer) for topic in HELD_OUT_TOPICS[: cell.held_out]]
        rewards = np.array([reward for _, reward in judged_answers(policy, tokenizer, prompts, cell.seed)])
        before = rewards if step == 0 else before
        report = overoptimization_report(policy, None, pairs[:24])
        rows.append(
            {
                "step": step,
                "gold": float(rewards.mean()),
                "win_rate": float((rewards > before).mean() + 0.5 * (rewards == before).mean()),
                "chosen_change": report.chosen_change,
                "rejected_change": report.rejected_change,
                "accuracy": report.accuracy,
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------- cost


@benchmark(
    paper=PAPER,
    says="One optimizer step (forward, backward, AdamW) is faster than that of trl's DPOTrainer on the same model, "
    "batch and precomputed reference.",
    grid={
        "vocabulary": scales(smoke=[512], laptop=[512, 8_192], paper=[512, 49_152]),
        "contender": ["ours", "trl"],
    },
    expect=[faster("ours", than="trl", each="vocabulary")],
    plot=bars(x="vocabulary", y="seconds", by="contender", log="y"),
    rounds={"smoke": 5, "laptop": 5, "paper": 7},
)
def training_step(cell: Cell) -> Row:
    """8 pairs, prompts of 48 and answers of 16 tokens; a Llama of width 128 with 4 layers.

    trl's step also computes the diagnostics that it logs: entropies, mean logits, token accuracy.
    """
    from workingpapers.alignment import RPOConfig, RPOTrainer, TokenPair

    model, reference = small_llama(cell.vocabulary), small_llama(cell.vocabulary, seed=1)
    rng = np.random.default_rng(0)
    pairs = [TokenPair(*(rng.integers(cell.vocabulary, size=size).tolist() for size in (48, 16, 16))) for _ in range(8)]
    steps = 3
    if cell.contender == "ours":
        args = RPOConfig(eta=0.2, sft="mean", warmup=None, max_steps=steps + 1, precompute_reference=True)
        trainer = RPOTrainer(model, reference, pairs, args=args)
        return {"loss": timed_steps(cell, lambda: trainer.train(1)[-1]["loss"], steps)}
    with tempfile.TemporaryDirectory() as folder:
        loss = trl_dpo_loss(
            model, reference, pairs, folder, beta=0.1, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2]
        )
        return {"loss": timed_steps(cell, adamw_step(model, loss), steps)}
