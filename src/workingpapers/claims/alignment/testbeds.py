"""Testbeds of the alignment claims: language models whose true reward is known.

- Bigram grammar: a small transformer trained here on random text with 6 legal successors per symbol; the gold reward
  is a sum over bigrams, and illegal bigrams show mass outside the data.
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


def sample(
    model: nn.Module, prompts: np.ndarray, new_tokens: int, *, seed: int, attention_mask: np.ndarray | None = None
) -> np.ndarray:
    """Prompts with sampled continuations, at temperature 1 from the whole vocabulary."""
    import torch

    ids = torch.from_numpy(prompts)
    mask = torch.ones_like(ids) if attention_mask is None else torch.from_numpy(attention_mask)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        found: torch.Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=new_tokens
        )
    return found.numpy()


# ------------------------------------------------------------------------------------------------ a grammar of bigrams

SYMBOLS, BIGRAM_LENGTH = 32, 16  # of the grammar's text


def bigram_grammar(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which symbols may follow which (6 each), how likely they do, and the gold reward of every bigram."""
    rng = np.random.default_rng([seed, 0])
    legal = rng.permuted(np.tile(np.arange(SYMBOLS) < 6, (SYMBOLS, 1)), axis=1)
    transition = np.where(legal, np.exp(rng.standard_normal((SYMBOLS, SYMBOLS))), 0.0)
    gold = np.where(legal, 0.5 * rng.standard_normal((SYMBOLS, SYMBOLS)), -3.0)
    return legal, transition / transition.sum(1, keepdims=True), gold


def bigram_pairs(model: nn.Module, gold: np.ndarray, count: int, seed: int) -> list[TokenPair]:
    """Two continuations of each first symbol by the model itself, labelled by a Bradley-Terry judge."""
    from workingpapers.alignment import TokenPair

    first = np.repeat(first_symbols(count, seed), 2, axis=0)
    symbols = sample(model, first, BIGRAM_LENGTH - 1, seed=seed).reshape(count, 2, BIGRAM_LENGTH)
    rewards = gold[symbols[..., :-1], symbols[..., 1:]].sum(-1)
    second_wins = np.random.default_rng([seed, 2]).random(count) > 1 / (1 + np.exp(rewards[:, 1] - rewards[:, 0]))
    return [
        TokenPair(answers[0][:1], answers[won][1:], answers[1 - won][1:])
        for answers, won in zip(symbols.tolist(), second_wins.astype(int).tolist(), strict=True)
    ]


def first_symbols(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 3]).integers(SYMBOLS, size=(count, 1))


def pretrained_transformer(seed: int) -> nn.Module:
    model = _small_transformer(seed)
    model.load_state_dict(pretrained_weights(seed))
    return model.eval()


@artifact
def pretrained_weights(seed: int) -> dict[str, torch.Tensor]:
    """500 AdamW steps of 128 sequences of the grammar, learning rate 3e-3, then 5e-4 for the last fifth."""
    import torch

    _, transition, _ = bigram_grammar(seed)
    rng = np.random.default_rng([seed, 4])
    cumulative = transition.cumsum(1)
    model = _small_transformer(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(500):
        if step == 400:
            optimizer.param_groups[0]["lr"] = 5e-4
        symbols = rng.integers(SYMBOLS, size=(128, 1))
        for _ in range(BIGRAM_LENGTH - 1):
            drawn = (rng.random((128, 1)) > cumulative[symbols[:, -1]]).sum(1, keepdims=True)
            symbols = np.concatenate([symbols, np.minimum(drawn, SYMBOLS - 1)], axis=1)
        batch = torch.from_numpy(symbols)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return dict(model.state_dict())


def _small_transformer(seed: int) -> nn.Module:
    import torch

    transformers = require("transformers", extra="language")
    config = transformers.GPT2Config(
        vocab_size=SYMBOLS,
        n_positions=BIGRAM_LENGTH,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


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
    judged = []
    for start in range(0, len(prompts), 32):
        part = prompts[start : start + 32]
        batch = tokenizer(part, return_tensors="np", padding=True, padding_side="left")
        ids = sample(model, batch["input_ids"], ANSWER_LIMIT, seed=seed + start, attention_mask=batch["attention_mask"])
        for prompt, answer in zip(part, ids[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            finished = tokenizer.eos_token_id in answer
            kept = answer[: answer.index(tokenizer.eos_token_id) + 1] if finished else answer
            topic = prompt.partition(" about ")[2].partition(".")[0]
            judged.append((kept, checkable_reward(tokenizer.decode(kept, skip_special_tokens=True), topic, finished)))
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
