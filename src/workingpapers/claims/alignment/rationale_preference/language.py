"""A chat model, whose answers a program judges and explains; and what a training step costs."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.claims.alignment.beside_trl import adamw_step, small_llama, timed_steps, trl_dpo_loss
from workingpapers.claims.alignment.rationale_preference.log_linear import PAPER, SHUFFLED, WIN_RATES
from workingpapers.claims.alignment.rationale_preference.transformer import with_rationales_of_others
from workingpapers.claims.alignment.testbeds import (
    HELD_OUT_TOPICS,
    TRAINING_TOPICS,
    adapted,
    judged_answers,
    sentence_pairs,
    sentence_prompt,
)
from workingpapers.desk.claim import Cell, Row, bars, benchmark, claim, faster, higher, lower, scales, seeds

if TYPE_CHECKING:
    import torch
    from torch import nn

    from workingpapers.alignment import TokenPair

# ---------------------------------------------------------------------- SmolLM2-135M-Instruct, a reward that is checked

METHODS: dict[str, dict[str, float]] = {
    "DPO": {"gamma": 0.0},
    "DPO, twice the pairs": {"gamma": 0.0},
    "DPO+SFT": {"supervised": 0.01},
    "RDPO": {"gamma": 0.01},
    SHUFFLED: {"gamma": 0.01},
}


@claim(
    paper=PAPER,
    says="SmolLM2-135M-Instruct, asked for one short sentence on a topic and trained on its own answers ranked by a "
    "checkable reward: rationales written by the program that ranks give a higher reward than DPO, also with twice the "
    "pairs or a supervised term, than rationales of other pairs, and shorter answers than DPO.",
    published=f"{WIN_RATES}; AlpacaEval 2 LC: Mistral-7B 19.52 (DPO), 22.42 (RDPO), Llama-3-8B 26.02, 27.55",
    grid={
        "pairs": scales(smoke=[], laptop=[], paper=[64]),
        "steps": scales(smoke=[], laptop=[], paper=[16]),
        "held_out": scales(smoke=[], laptop=[], paper=[16]),
        "seed": seeds(smoke=5, laptop=5, paper=5),
        "method": list(METHODS),
    },
    expect=[
        higher("gold", "RDPO", than=["DPO", "DPO, twice the pairs", "DPO+SFT", SHUFFLED]),
        lower("tokens", "RDPO", than="DPO"),
    ],
    plot=bars(x="method", y="gold"),
)
def smollm2_short_sentences(cell: Cell) -> Row:

    from workingpapers.alignment import RationaleConfig, RationaleTrainer, RPOConfig, RPOTrainer
    from workingpapers.data import smollm2

    model, tokenizer = smollm2()
    pairs = explained_pairs(cell.pairs * (2 if cell.method == "DPO, twice the pairs" else 1), cell.seed, tokenizer)
    if cell.method == SHUFFLED:
        pairs = with_rationales_of_others(np.random.default_rng([cell.seed, 6]), pairs)
    policy = adapted(model, cell.seed)
    beta, options = 0.05, dict(METHODS[cell.method])
    shared: dict[str, Any] = {
        "beta": beta,
        "learning_rate": 5e-4,
        "warmup": None,
        "max_steps": cell.steps,
        "precompute_reference": True,
        "random_state": cell.seed,
    }
    if "supervised" in options:
        RPOTrainer(policy, None, pairs, args=RPOConfig(eta=options["supervised"] / beta, **shared)).train()
    else:
        RationaleTrainer(policy, None, pairs, args=RationaleConfig(gamma=options["gamma"], **shared)).train()
    prompts = [sentence_prompt(topic, tokenizer) for topic in HELD_OUT_TOPICS[: cell.held_out]]
    judged = judged_answers(policy, tokenizer, prompts, cell.seed)
    return {
        "gold": float(np.mean([reward for _, reward in judged])),
        "tokens": float(np.mean([len(answer) for answer, _ in judged])),
    }


def explained_pairs(count: int, seed: int, tokenizer: Any) -> list[TokenPair]:
    """`sentence_pairs` with rationales that name what made the chosen answer's reward the higher one."""
    from workingpapers.alignment import tokenize_rationales

    pairs = sentence_pairs(count, seed, tokenizer)
    rows = []
    for number, pair in enumerate(pairs):
        topic = TRAINING_TOPICS[number % len(TRAINING_TOPICS)]
        chosen, rejected = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (pair.chosen, pair.rejected))
        ended = [ids[-1] == tokenizer.eos_token_id for ids in (pair.chosen, pair.rejected)]
        rows.append(
            {
                "prompt": [
                    {"role": "system", "content": ""},
                    {"role": "user", "content": f"Write one short sentence about {topic}."},
                ],
                "chosen": [{"role": "assistant", "content": chosen or "(nothing)"}],
                "rejected": [{"role": "assistant", "content": rejected or "(nothing)"}],
                "rationale": reasons((chosen, rejected), (ended[0], ended[1]), topic),
            }
        )
    asked = tokenize_rationales(rows, tokenizer)
    return [pair._replace(rationale=text.rationale) for pair, text in zip(pairs, asked, strict=True)]


def reasons(answers: tuple[str, str], ended: tuple[bool, bool], topic: str) -> str:
    """What of `checkable_reward` speaks for the first answer, in words."""
    words = [re.findall(r"[a-z']+", answer.lower()) for answer in answers]
    fresh = [len(set(found)) / len(found) if found else 0.0 for found in words]
    found = []
    if topic in words[0] and topic not in words[1]:
        found.append(f"The better response names {topic}.")
    if ended[0] and not ended[1]:
        found.append("The better response comes to an end in time.")
    if fresh[0] > fresh[1]:
        found.append("The better response repeats fewer words.")
    return " ".join(found) or "The two responses are equally good."


# ---------------------------------------------------------------------------------------------------------------- cost


@benchmark(
    paper=PAPER,
    says="One optimizer step (forward, backward, AdamW) is faster than that of trl's DPOTrainer on the same model, "
    "batch and precomputed reference; with rationales, than trl's loss plus the model's own cross-entropy on them.",
    grid={
        "loss": ["DPO", "RDPO"],
        "vocabulary": scales(smoke=[512], laptop=[8_192], paper=[512, 49_152]),
        "contender": ["ours", "trl"],
    },
    expect=[faster("ours", than="trl", each=["loss", "vocabulary"])],
    plot=bars(x="vocabulary", y="seconds", by="contender", log="y", each="loss"),
    rounds={"smoke": 5, "laptop": 5, "paper": 7},
)
def training_step(cell: Cell) -> Row:
    """8 pairs, prompts of 48 and answers of 16 tokens; rationales of 32 after 104. A Llama of width 128 with 4 layers.

    trl's step also computes the diagnostics that it logs: entropies, mean logits, token accuracy.
    """
    from workingpapers.alignment import RationaleConfig, RationaleTrainer, TokenPair, TokenSequence

    model, reference = small_llama(cell.vocabulary), small_llama(cell.vocabulary, seed=1)
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(8):
        prompt, chosen, rejected, asked, why = (
            rng.integers(cell.vocabulary, size=size).tolist() for size in (48, 16, 16, 104, 32)
        )
        pairs.append(TokenPair(prompt, chosen, rejected, TokenSequence(asked, why)))
    steps, gamma = 3, 0.001 if cell.loss == "RDPO" else 0.0
    if cell.contender == "ours":
        args = RationaleConfig(gamma=gamma, warmup=None, max_steps=steps + 1, precompute_reference=True)
        trainer = RationaleTrainer(model, reference, pairs, args=args)
        return {"value": timed_steps(cell, lambda: trainer.train(1)[-1]["loss"], steps)}
    with tempfile.TemporaryDirectory() as folder:
        loss = _trl_loss(model, reference, pairs, gamma, folder)
        return {"value": timed_steps(cell, adamw_step(model, loss), steps)}


def _trl_loss(
    model: nn.Module, reference: nn.Module, pairs: Sequence[TokenPair], gamma: float, folder: str
) -> Callable[[], torch.Tensor]:
    """A DPOTrainer's loss on all `pairs`, and the rationales' cross-entropy besides where gamma is not 0."""
    from workingpapers.alignment import collate_preferences

    preference_loss = trl_dpo_loss(model, reference, pairs, folder, beta=0.1)
    if gamma == 0.0:
        return preference_loss
    asked = collate_preferences(pairs).rationales
    assert asked is not None
    labels = asked.input_ids.masked_fill(~asked.response_mask, -100)
    tokens_per_pair = int(asked.response_mask.sum()) / len(pairs)

    def loss() -> torch.Tensor:
        per_token = model(input_ids=asked.input_ids, attention_mask=asked.attention_mask, labels=labels).loss
        whole: torch.Tensor = preference_loss() + gamma * tokens_per_pair * per_token
        return whole

    return loss
