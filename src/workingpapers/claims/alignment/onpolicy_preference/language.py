"""Language models: tokens of a GPT-nano, lengths of a small transformer, short answers of SmolLM2-135M-Instruct."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.claims.alignment.onpolicy_preference.common import (
    ANSWERS,
    BUDGETS,
    LOSSES,
    PAPER,
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
    line,
    lower,
    scales,
    seeds,
)

if TYPE_CHECKING:
    import torch

    from workingpapers.alignment import CausalLMPolicy


@claim(
    paper=PAPER,
    says="Ten tokens of a GPT-nano in place of one action, far peak: fresh samples end at a higher reward than fixed "
    "ones.",
    published="token bandit curves, as for the bandit",
    grid={
        "loss": ["best of n", "PPO", "IPO"],
        "centre": scales(smoke=[], laptop=[], paper=[70]),
        "rate": [1e-3],
        "seed": seeds(smoke=5, laptop=5, paper=5),
        "method": ["fresh", "fixed"],
    },
    expect=[higher("reward", "fresh", than="fixed", each="loss")],
    plot=line(x="gradient_steps", y="reward", by="method", each="loss"),
)
def tokens(cell: Cell) -> list[Row]:
    """10,000 queries: 100 rounds of 10 prompts and 10 steps, or one batch and 1,000 steps."""
    import torch

    from workingpapers.alignment import PreferenceTuner, testbeds

    env = testbeds.token_bandit(cell.centre)
    policy, fresh = env.policy(random_state=cell.seed), cell.method == "fresh"
    tuner = PreferenceTuner(
        policy,
        None,
        env.reward,
        on_policy=fresh,
        inner_steps=10 if fresh else 1_000,
        batch_size=100 if fresh else 10_000,
        responses_per_prompt=ANSWERS,
        lr=cell.rate,
        micro_batch=2_000,
        generator=torch.Generator().manual_seed(cell.seed),
        **LOSSES[cell.loss],
    )
    held_out = env.prompts(100, random_state=2 * cell.seed + 1)
    history = tuner.fit(
        env.prompts(1_000, random_state=2 * cell.seed), 10_000, eval_prompts=held_out, evaluate_every=100
    )
    curve = columns(history)
    return [
        {column: float(curve[column][place]) for column in ("reward", "kl", *BUDGETS)} for place in range(len(history))
    ]


LENGTH_LOSSES: dict[str, dict[str, Any]] = {"best of n": {"loss": "best_of_n"}, "DPO": {"loss": "dpo", "beta": 0.1}}
LENGTHS: dict[str, Axis] = {
    "loss": list(LENGTH_LOSSES),
    "rounds": scales(smoke=[], laptop=[10], paper=[60]),
    "seed": seeds(smoke=5, laptop=5, paper=10),
    "method": ["fresh", "fixed"],
}


@claim(
    paper=PAPER,
    says="A small transformer, a reward learned from pairs: where the best answers are rare (min and skew length) "
    "fresh samples end at a higher true reward than as many of the pairs' own policy.",
    published="Min Length and Skew Length: on-policy sampling ends at a higher true reward",
    grid={"kind": ["min", "skew"], **LENGTHS},
    expect=[higher("reward", "fresh", than="fixed", each=["kind", "loss"])],
    plot=bars(x="kind", y="reward", by="method", each="loss"),
)
def rare_lengths(cell: Cell) -> Row:
    return _length_run(cell)


@claim(
    paper=PAPER,
    says="They do with best of n.",
    published="Min Length and Skew Length: on-policy sampling ends at a higher true reward",
    grid={"kind": ["min", "skew"], **LENGTHS},
    only=lambda cell: cell.loss == "best of n",
    expect=[higher("reward", "fresh", than="fixed", each=["kind", "loss"])],
    plot=bars(x="kind", y="reward", by="method", each="loss"),
)
def rare_lengths_by_best_of_n(cell: Cell) -> Row:
    return _length_run(cell)


@claim(
    paper=PAPER,
    says="Where the usual answers are best (mode length) fresh samples gain less than 0.1.",
    published="Mode Length: all methods do about equally well",
    grid={"kind": ["mode"], **LENGTHS},
    expect=[lower("reward", "fresh", than="fixed", margin=0.1, each="loss")],
    plot=bars(x="loss", y="reward", by="method"),
)
def usual_lengths(cell: Cell) -> Row:
    return _length_run(cell)


def _length_run(cell: Cell) -> Row:
    return last(length_curve(cell.kind, cell.loss, cell.method, cell.rounds, cell.seed))


@artifact
def length_curve(kind: str, loss: str, source: str, rounds: int, seed: int) -> dict[str, np.ndarray]:
    """64 queries and 4 steps a round, 4 answers to a prompt, Adam at 1e-3; the reward is learned from 400 pairs."""
    import torch

    from workingpapers.alignment import PreferenceTuner, model_reward, testbeds

    task = testbeds.length_task(kind)  # type: ignore[arg-type]
    policy = _fitted_policy(kind, False, seed)
    judge = task.reward_model([], steps=0)
    judge.load_state_dict(judge_weights(kind, seed))
    tuner = PreferenceTuner(
        policy,
        None,
        model_reward(judge, batch_size=256),
        on_policy=source == "fresh",
        inner_steps=4,
        data_policy=_fitted_policy(kind, True, seed),
        eval_reward=task.reward,
        lr=1e-3,
        generator=torch.Generator().manual_seed(seed),
        **LENGTH_LOSSES[loss],
    )
    held_out = task.prompts(64, random_state=2 * seed + 1)
    prompts = task.prompts(16 * rounds, random_state=2 * seed)
    return columns(tuner.fit(prompts, 64 * rounds, eval_prompts=held_out, evaluate_every=2 * rounds))


def _fitted_policy(kind: str, of_data: bool, seed: int) -> CausalLMPolicy:
    from workingpapers.alignment import testbeds

    skewed = of_data and kind == "skew"  # else the reference, which is the same for all kinds
    policy = testbeds.length_task().policy(steps=0)
    policy.model.load_state_dict(length_weights(skewed, seed))
    return policy


@artifact
def judge_weights(kind: str, seed: int) -> dict[str, torch.Tensor]:
    """A reward model fitted to 400 pairs of the data policy."""
    from workingpapers.alignment import testbeds

    task = testbeds.length_task(kind)  # type: ignore[arg-type]
    pairs = task.pairs(_fitted_policy(kind, True, seed), 400, random_state=seed)
    fitted = task.reward_model(pairs, random_state=seed)
    return {name: value.clone() for name, value in fitted.state_dict().items()}


@artifact
def length_weights(skewed: bool, seed: int) -> dict[str, torch.Tensor]:
    """A policy fitted to the usual lengths, or to the skewed ones."""
    from workingpapers.alignment import testbeds

    task = testbeds.length_task("skew")
    fitted = (task.data_policy if skewed else task.policy)(random_state=seed)
    return {name: value.clone() for name, value in fitted.model.state_dict().items()}


# -------------------------------------------------------------------------------------------- SmolLM2-135M-Instruct


@claim(
    paper=PAPER,
    says="SmolLM2-135M-Instruct, asked for a sentence and rewarded for few tokens: DPO on fresh samples ends "
    "with shorter answers than on as many of the untrained model's.",
    published="Min Length, Pythia-1.4B: on-policy sampling ends at a higher reward",
    grid={
        "loss": ["DPO"],
        "queries": scales(smoke=[], laptop=[], paper=[128]),
        "held_out": scales(smoke=[], laptop=[], paper=[16]),
        "seed": seeds(smoke=5, laptop=5, paper=5),
        "method": ["fresh", "fixed"],
    },
    expect=[higher("reward", "fresh", than="fixed", where={"gradient_steps": "last"})],
    plot=line(x="reward_queries", y="reward", by="method"),
)
def smollm2_short_answers(cell: Cell) -> list[Row]:
    """Rounds of 32 queries, 4 answers to a prompt, 2 passes in steps of 4 prompts; adapters on the last ten layers."""
    import torch

    from workingpapers.alignment import CausalLMPolicy, PreferenceTuner
    from workingpapers.claims.alignment.testbeds import (
        ANSWER_LIMIT,
        HELD_OUT_TOPICS,
        TRAINING_TOPICS,
        adapted,
        sentence_prompt,
    )
    from workingpapers.data import smollm2

    model, tokenizer = smollm2()
    policy = CausalLMPolicy(adapted(model, cell.seed), max_new_tokens=ANSWER_LIMIT, eos_token_id=tokenizer.eos_token_id)

    def few_tokens(_: Any, actions: torch.Tensor) -> torch.Tensor:
        return 1.0 - (actions != -1).sum(-1) / ANSWER_LIMIT

    tuner = PreferenceTuner(
        policy,
        None,
        few_tokens,
        on_policy=cell.method == "fresh",
        inner_steps=2,
        batch_size=min(32, cell.queries),
        lr=5e-4,
        max_grad_norm=1.0,
        prompts_per_step=4,
        generator=torch.Generator().manual_seed(cell.seed),
        **LENGTH_LOSSES[cell.loss],
    )
    training, held_out = (
        [tokenizer(sentence_prompt(topic, tokenizer)).input_ids for topic in topics]
        for topics in (TRAINING_TOPICS, HELD_OUT_TOPICS[: cell.held_out])
    )
    history = tuner.fit(training, cell.queries, eval_prompts=held_out, evaluate_every=max(1, cell.queries // 4))
    curve = columns(history)
    return [
        {column: float(curve[column][place]) for column in ("reward", "kl", "entropy", *BUDGETS)}
        for place in range(len(history))
    ]
