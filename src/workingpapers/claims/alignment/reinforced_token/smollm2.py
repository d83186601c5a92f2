"""SmolLM2-135M-Instruct, a reward that is checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.claims.alignment.reinforced_token.problems import ABLATION, PAPER, RUNS, TABLE
from workingpapers.claims.alignment.testbeds import (
    ANSWER_LIMIT,
    HELD_OUT_TOPICS,
    TRAINING_TOPICS,
    adapted,
    checkable_reward,
    judged_answers,
    sentence_pairs,
    sentence_prompt,
)
from workingpapers.common.validation import require
from workingpapers.desk.claim import Cell, Row, artifact, claim, higher, line, scales, seeds

if TYPE_CHECKING:
    import torch
    from torch import nn

    from workingpapers.alignment import SequenceBatch


@claim(
    paper=PAPER,
    says="SmolLM2-135M-Instruct, asked for one short sentence on a topic: with as many answers drawn, RTO ends at a "
    "higher checkable reward than PPO, DDPO and the DPO model that it takes its token rewards from.",
    published=f"{TABLE}; {ABLATION}",
    grid={
        "pairs": scales(smoke=[], laptop=[], paper=[96]),
        "rollouts": scales(smoke=[], laptop=[], paper=[12]),
        "held_out": scales(smoke=[], laptop=[], paper=[16]),
        "seed": seeds(smoke=5, laptop=5, paper=5),
        "method": ["DPO", "PPO", "RTO", "RS-PPO", "DDPO"],
    },
    expect=[higher("gold", "RTO", than=["DPO", "PPO", "DDPO"], where={"rollout": "last"})],
    plot=line(x="rollout", y="gold"),
)
def smollm2_short_sentences(cell: Cell) -> list[Row]:
    import torch

    from workingpapers.alignment import RewardModel, RTOConfig, RTOTrainer

    policy, tokenizer = adapted_smollm2(cell.seed)
    dpo = with_adapters(cell.seed, dpo_adapters(cell.pairs, cell.seed))
    rows: list[Row] = []

    def look(rollout: int, model: nn.Module) -> None:
        prompts = [sentence_prompt(topic, tokenizer) for topic in HELD_OUT_TOPICS[: cell.held_out]]
        rewards = np.array([reward for _, reward in judged_answers(model, tokenizer, prompts, cell.seed)])
        rows.append({"rollout": rollout, "gold": float(rewards.mean())})

    if cell.method == "DPO":
        look(cell.rollouts, dpo)
        return rows
    beta1, granularity, _ = RUNS[cell.method]
    args = RTOConfig(
        learning_rate=3e-4,
        value_learning_rate=3e-4,
        warmup=None,
        beta1=beta1,
        ratio_clip=None,
        granularity=granularity,  # type: ignore[arg-type]
        beta=0.02,
        rollout_size=32,
        rollout_epochs=2,
        batch_size=8,
        accumulation=2,
        max_new_tokens=ANSWER_LIMIT,
        max_steps=cell.rollouts,
        random_state=cell.seed,
    )
    critic = RewardModel(adapted_smollm2(cell.seed)[0])
    assert critic.head is not None
    torch.nn.init.zeros_(critic.head.weight)  # a random head would start from values far from any reward
    prompts = [tokenizer(sentence_prompt(topic, tokenizer)).input_ids for topic in TRAINING_TOPICS]
    trainer = RTOTrainer(
        policy, None, dpo, prompts, tokenizer, args, sentence_reward=checked_by(tokenizer), critic=critic
    )
    for rollout in sorted({0, cell.rollouts // 2, cell.rollouts}):
        trainer.train(rollout - len(trainer.history))
        look(rollout, policy)
    return rows


def checked_by(tokenizer: Any) -> Any:
    """The checkable reward as a function of a batch of answers."""

    def score(batch: SequenceBatch) -> torch.Tensor:
        import torch

        assert batch.finished is not None
        rewards = []
        for sequence, finished in zip(batch.sequences(), batch.finished.tolist(), strict=True):
            topic = tokenizer.decode(sequence.prompt).partition(" about ")[2].partition(".")[0]
            text = tokenizer.decode(sequence.response, skip_special_tokens=True)
            rewards.append(checkable_reward(text, topic, finished))
        return torch.tensor(rewards)

    return score


@artifact
def dpo_adapters(pairs: int, seed: int) -> dict[str, torch.Tensor]:
    """40 steps of DPO on the model's own answers, ranked by the reward."""
    from workingpapers.alignment import RPOConfig, RPOTrainer

    peft = require("peft", extra="language")
    model, tokenizer = adapted_smollm2(seed)
    args = RPOConfig(
        beta=0.05, eta=0.0, learning_rate=5e-4, warmup=None, max_steps=40, precompute_reference=True, random_state=seed
    )
    RPOTrainer(model, None, sentence_pairs(pairs, seed, tokenizer), args=args).train()
    weights: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(model)
    return {name: weight.detach().clone() for name, weight in weights.items()}


def with_adapters(seed: int, weights: dict[str, torch.Tensor]) -> nn.Module:
    peft = require("peft", extra="language")
    model, _ = adapted_smollm2(seed)
    peft.set_peft_model_state_dict(model, weights)
    return model


def adapted_smollm2(seed: int) -> tuple[nn.Module, Any]:
    from workingpapers.data import smollm2

    model, tokenizer = smollm2()
    return adapted(model, seed), tokenizer
