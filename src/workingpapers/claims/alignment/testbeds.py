"""Testbeds of the alignment claims: language models whose true reward is known.

- Bigram grammar: the small transformer of `GoldRewardLab`, whose gold reward is a sum over bigrams.
- Short sentences: SmolLM2-135M-Instruct is asked for one short sentence on a topic; the reward is checked by a program.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.common.validation import require
from workingpapers.desk.claim import artifact

if TYPE_CHECKING:
    import torch
    from torch import nn

    from workingpapers.alignment import TokenPair


# ------------------------------------------------------------------------------------------------ a grammar of bigrams


def pretrained_transformer(seed: int) -> nn.Module:
    """The policy of `GoldRewardLab(seed)`, trained once."""
    from workingpapers.alignment import GoldRewardLab

    model = GoldRewardLab(seed).untrained_policy()
    model.load_state_dict(pretrained_weights(seed))
    return model.eval()


@artifact
def pretrained_weights(seed: int) -> dict[str, torch.Tensor]:
    from workingpapers.alignment import GoldRewardLab

    return dict(GoldRewardLab(seed).policy().state_dict())


# ----------------------------------------------------------------------------------------------------- short sentences

TOPICS = [
    "autumn", "bakers", "bees", "books", "bridges", "candles", "castles", "cats", "clouds", "coffee", "dancing",
    "deserts", "dogs", "dragons", "farms", "fishing", "forests", "frogs", "gardens", "glass", "grandparents",
    "harbours", "horses", "islands", "kites", "lakes", "lighthouses", "maps", "markets", "mirrors", "mountains",
    "museums", "music", "night", "oceans", "owls", "painters", "planets", "poets", "rain", "rivers", "robots",
    "ships", "silence", "snow", "spiders", "storms", "summer", "tea", "thunder", "tigers", "time", "trains",
    "trees", "villages", "violins", "volcanoes", "wind", "windows", "winter", "wolves", "writers", "youth",
    "zebras",
]  # fmt: skip
TRAINING_TOPICS, HELD_OUT_TOPICS = TOPICS[:48], TOPICS[48:]
ANSWER_LIMIT = 24  # tokens


def adapted(model: nn.Module, seed: int) -> nn.Module:
    """SmolLM2 with new low-rank adapters in its last ten of 30 layers, where the backward pass then ends."""
    import torch

    peft = require("peft", extra="language")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapters = peft.LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            layers_to_transform=list(range(20, 30)),
            task_type="CAUSAL_LM",
        )
        policy: nn.Module = peft.get_peft_model(model, adapters)
    return policy


def sentence_pairs(count: int, seed: int, tokenizer: Any) -> list[TokenPair]:
    """Two answers of the model to each prompt, ranked by the reward; pairs that tie are ranked by a coin."""
    from workingpapers.alignment import TokenPair

    answers = sentence_answers(count, seed)
    pairs = []
    for row, (tokens, lengths, wins) in enumerate(
        zip(answers["tokens"], answers["lengths"], answers["wins"], strict=True)
    ):
        first, second = (tokens[side, : lengths[side]].tolist() for side in (0, 1))
        prompt = tokenizer(sentence_prompt(TRAINING_TOPICS[row % len(TRAINING_TOPICS)], tokenizer)).input_ids
        pairs.append(TokenPair(prompt, *((first, second) if wins else (second, first))))
    return pairs


@artifact
def sentence_answers(count: int, seed: int) -> dict[str, np.ndarray]:
    """tokens (count, 2, limit), their lengths (count, 2), and whether the first answer wins (count,)."""
    from workingpapers.data import smollm2

    model, tokenizer = smollm2()
    prompts = [
        sentence_prompt(TRAINING_TOPICS[row % len(TRAINING_TOPICS)], tokenizer)
        for row in range(count)
        for _ in range(2)
    ]
    judged = judged_answers(model, tokenizer, prompts, seed)
    tokens = np.zeros((2 * count, ANSWER_LIMIT), dtype=np.int64)
    for row, (answer, _) in enumerate(judged):
        tokens[row, : len(answer)] = answer
    rewards = np.array([reward for _, reward in judged]).reshape(count, 2)
    coin = np.random.default_rng([seed, 5]).random(count) < 0.5
    return {
        "tokens": tokens.reshape(count, 2, ANSWER_LIMIT),
        "lengths": np.array([len(answer) for answer, _ in judged]).reshape(count, 2),
        "wins": np.where(rewards[:, 0] == rewards[:, 1], coin, rewards[:, 0] > rewards[:, 1]),
    }


def judged_answers(model: nn.Module, tokenizer: Any, prompts: list[str], seed: int) -> list[tuple[list[int], float]]:
    """One sampled answer to each prompt, up to and including its end, and its reward."""
    import torch

    from workingpapers.alignment import sample_responses

    drawn = sample_responses(
        model,
        [tokenizer(prompt).input_ids for prompt in prompts],
        max_new_tokens=ANSWER_LIMIT,
        eos_token_id=tokenizer.eos_token_id,
        batch_size=32,
        generator=torch.Generator().manual_seed(seed),
    )
    assert drawn.finished is not None
    judged = []
    for prompt, answer, finished in zip(prompts, drawn.responses(), drawn.finished.tolist(), strict=True):
        topic = prompt.partition(" about ")[2].partition(".")[0]
        judged.append((answer, checkable_reward(tokenizer.decode(answer, skip_special_tokens=True), topic, finished)))
    return judged


def checkable_reward(text: str, topic: str, finished: bool) -> float:
    """One for naming the topic, one for ending in time, minus twice the share of words that repeat an earlier one."""
    words = re.findall(r"[a-z']+", text.lower())
    repeated = 1.0 - len(set(words)) / len(words) if words else 1.0
    return float(topic in words) + float(finished) - 2.0 * repeated


def sentence_prompt(topic: str, tokenizer: Any) -> str:
    messages = [
        {"role": "system", "content": ""},  # without it the template adds a long one
        {"role": "user", "content": f"Write one short sentence about {topic}."},
    ]
    rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return rendered
