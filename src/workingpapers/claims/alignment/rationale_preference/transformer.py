"""A small transformer, which can copy the rationale from its prompt."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from workingpapers.claims.alignment.rationale_preference.log_linear import ALONE, PAPER, SAVING, SHUFFLED, WIN_RATES
from workingpapers.common.validation import require
from workingpapers.desk.claim import Axis, Cell, Row, artifact, bars, claim, higher, line, lower, scales, seeds

if TYPE_CHECKING:
    import torch
    from torch import nn

    from workingpapers.alignment import TokenPair

BOS, EOS, ASK, OTHER, WHY, BECAUSE, POLITE = range(1, 8)
FILLER, CORRECT, WRONG, TOKENS = 8, 16, 32, 48  # where the 8 fillers and the 16 facts of each kind begin; the end
SHORTCUT_STRENGTH = 0.95  # share of the training pairs whose chosen answer is the longer one; at test of the others
FEW = 30

RDPO, RDPO_HEAVY = "RDPO 0.1", "RDPO 1"
CURVES: dict[str, dict[str, Any]] = {
    "DPO": {"gamma": 0.0},
    "DPO+SFT 0.1": {"supervised": 0.1},
    RDPO: {"gamma": 0.1},
    "ORPO": {"base": "orpo", "beta": 0.1, "gamma": 0.0},
    "RORPO": {"base": "orpo", "beta": 0.1, "gamma": 1.0, "rationale_reduction": "mean"},
    ALONE: {"gamma": 0.1, "preference_weight": 0.0},
}
ONLY_FEW: dict[str, dict[str, Any]] = {
    "DPO, twice the pairs": {"gamma": 0.0},
    "DPO+SFT 1": {"supervised": 1.0},
    RDPO_HEAVY: {"gamma": 1.0},
    SHUFFLED: {"gamma": 0.1},
    "RDPO, rule": {"gamma": 0.1},
    "SimPO": {"base": "simpo", "beta": 2.0, "gamma": 0.0},
    "RSimPO": {"base": "simpo", "beta": 2.0, "gamma": 1.0, "rationale_reduction": "mean"},
}
TOKEN_METHODS = CURVES | ONLY_FEW
TOKEN_SIZES = [FEW, 100, 400]
TOKEN_GRID: dict[str, Axis] = {
    "pairs": scales(smoke=[], laptop=TOKEN_SIZES),
    "steps": scales(smoke=[], laptop=[80]),
    "seed": seeds(smoke=5, laptop=5, paper=10),
    "method": list(TOKEN_METHODS),
}


def _is_run(cell: Cell) -> bool:
    return cell.pairs == FEW or cell.method in CURVES


@claim(
    paper=PAPER,
    says="A transformer with 30 pairs: rationales that name the deciding words beat DPO, DPO with twice the pairs and "
    "shuffled rationales where length misleads, and so does a rationale that states the rule.",
    published=WIN_RATES,
    grid=TOKEN_GRID,
    only=_is_run,
    expect=[
        higher("accuracy", RDPO, than=["DPO", "DPO, twice the pairs", SHUFFLED], where={"pairs": FEW}),
        higher("accuracy", RDPO_HEAVY, than="DPO", where={"pairs": FEW}),
        higher("accuracy", "RDPO, rule", than="DPO", where={"pairs": FEW}),
    ],
    plot=line(x="pairs", y="accuracy", log="x"),
)
def copied_rationales(cell: Cell) -> Row:
    return token_row(cell)


@claim(
    paper=PAPER,
    says="On the same transformer the rationale's term beats what costs nothing: a supervised term of equal weight on "
    "the chosen answers.",
    published="not compared",
    grid=TOKEN_GRID,
    only=_is_run,
    expect=[
        higher("accuracy", RDPO, than="DPO+SFT 0.1", each="pairs"),
        higher("accuracy", RDPO_HEAVY, than="DPO+SFT 1", where={"pairs": FEW}),
    ],
    plot=line(x="pairs", y="accuracy", log="x"),
)
def against_a_supervised_term(cell: Cell) -> Row:
    return token_row(cell)


@claim(
    paper=PAPER,
    says="On the same transformer ORPO and SimPO gain from rationales, with 30 pairs.",
    published="RSimPO wins more than 65 % against SimPO (UltraFeedback, Anthropic HH)",
    grid=TOKEN_GRID,
    only=_is_run,
    expect=[
        higher("accuracy", "RORPO", than="ORPO", where={"pairs": FEW}),
        higher("accuracy", "RSimPO", than="SimPO", where={"pairs": FEW}),
    ],
    plot=line(x="pairs", y="accuracy", log="x"),
)
def other_bases_on_a_transformer(cell: Cell) -> Row:
    return token_row(cell)


@claim(
    paper=PAPER,
    says="Verbosity: sampled answers of the transformer carry fewer filler words after RDPO than after DPO, and name a "
    "correct fact at least as often.",
    published="less verbosity and fewer hallucinations (first version, figures)",
    grid=TOKEN_GRID,
    only=_is_run,
    expect=[
        lower("fillers", RDPO, than="DPO", each="pairs"),
        higher("correct", RDPO, than="DPO", margin=-0.02, each="pairs"),
    ],
    plot=line(x="pairs", y="fillers", log="x"),
)
def verbosity(cell: Cell) -> Row:
    return token_row(cell)


@claim(
    paper=PAPER,
    says="On pairs that differ in the fact alone, so that length cannot help, RDPO with 30 pairs ranks better than "
    "DPO, than DPO with a supervised term and than with shuffled rationales; rationales alone rank better than chance.",
    published="fewer hallucinations (first version, figures); rationales alone win more than 61 % over SFT",
    grid=TOKEN_GRID,
    only=_is_run,
    expect=[
        higher("fact_accuracy", RDPO, than=["DPO", "DPO+SFT 0.1", SHUFFLED], where={"pairs": FEW}),
        higher("fact_accuracy", ALONE, than=0.5, each="pairs"),
    ],
    plot=line(x="pairs", y="fact_accuracy", log="x"),
)
def facts_without_length(cell: Cell) -> Row:
    return token_row(cell)


@claim(
    paper=PAPER,
    says="For 90 % of the best accuracy that any method reaches on pairs that differ in the fact alone, RDPO needs "
    "fewer pairs than DPO and than DPO with a supervised term.",
    published=SAVING,
    grid={
        "steps": scales(smoke=[], laptop=[80]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": list(CURVES),
    },
    expect=[lower("pairs_needed", RDPO, than=["DPO", "DPO+SFT 0.1"])],
    plot=bars(x="method", y="pairs_needed", log="y"),
)
def pairs_for_the_best(cell: Cell) -> Row:
    """A curve that never reaches the target counts as twice the largest size."""
    from workingpapers.alignment import pairs_needed

    def score(method: str, pairs: int) -> float:
        return float(token_scores(method, pairs, cell.steps, cell.seed)["fact_accuracy"])

    target = 0.9 * max(score(method, pairs) for method in CURVES for pairs in TOKEN_SIZES)
    found = pairs_needed(TOKEN_SIZES, [score(cell.method, pairs) for pairs in TOKEN_SIZES], target)
    return {"pairs_needed": min(found, 2.0 * TOKEN_SIZES[-1]), "target": target}


def token_row(cell: Cell) -> Row:
    return {name: float(value) for name, value in token_scores(cell.method, cell.pairs, cell.steps, cell.seed).items()}


@artifact
def token_scores(method: str, pairs: int, steps: int, seed: int) -> dict[str, np.ndarray]:
    """Train by one method; what it learnt.

    accuracy : share of 400 held-out pairs, length reversed, whose correct answer gained more log-probability. Long
        answers lose more where a policy merely drifts away from all of them: that alone scores above one half.
    fact_accuracy : the same on pairs that differ in the fact alone.
    correct, fillers : of 256 sampled answers, the share that name only correct facts, and the mean number of fillers.
    """
    import torch

    from workingpapers.alignment import RationaleConfig, RationaleTrainer, RPOConfig, RPOTrainer, sample_responses

    model, reference = _pretrained(seed), _pretrained(seed)
    rng = np.random.default_rng([seed, 1])
    rationale: Literal["facts", "rule"] = "rule" if method == "RDPO, rule" else "facts"
    data = _fact_pairs(rng, 2 * pairs if method == "DPO, twice the pairs" else pairs, SHORTCUT_STRENGTH, rationale)
    if method == SHUFFLED:
        data = with_rationales_of_others(rng, data)
    options = {"beta": 0.5, **TOKEN_METHODS[method]}
    shared: dict[str, Any] = {
        "learning_rate": 2e-3,
        "warmup": None,
        "weight_decay": 0.01,
        "batch_size": 32,
        "max_steps": steps,
        "random_state": seed,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # heavy weights are meant to be heavy
        if "supervised" in options:
            args = RPOConfig(beta=options["beta"], eta=options["supervised"] / options["beta"], **shared)
            RPOTrainer(model, reference, data, args=args).train()
        else:
            RationaleTrainer(model, reference, data, args=RationaleConfig(**options, **shared)).train()

    test_rng = np.random.default_rng([seed, 2])
    sampled = sample_responses(
        model,
        [[BOS]],
        n=256,
        max_new_tokens=12,
        eos_token_id=EOS,
        generator=torch.Generator().manual_seed(seed),
    ).responses()
    answers = [np.array(answer) for answer in sampled]
    kinds = [(answer >= CORRECT).sum() > 0 and (answer >= WRONG).sum() == 0 for answer in answers]
    fillers = [((answer >= FILLER) & (answer < CORRECT)).sum() for answer in answers]
    reversed_length = _fact_pairs(test_rng, 400, 1.0 - SHORTCUT_STRENGTH, "facts")
    scores = {
        "accuracy": _gained_more(model, reference, reversed_length),
        "fact_accuracy": _gained_more(model, reference, [_same_but_for_the_fact(test_rng, p) for p in reversed_length]),
        "correct": np.mean(kinds),
        "fillers": np.mean(fillers),
    }
    return {name: np.array(value, dtype=float) for name, value in scores.items()}


def _gained_more(model: nn.Module, reference: nn.Module, pairs: Sequence[TokenPair]) -> float:
    import torch

    from workingpapers.alignment import collate_preferences, pair_logprobs

    batch = collate_preferences(pairs)
    with torch.no_grad():
        (chosen, rejected), (before, other) = (pair_logprobs(policy, batch) for policy in (model, reference))
    return (chosen - before > rejected - other).double().mean().item()


def _answer(rng: np.random.Generator, correct: bool, long: bool) -> tuple[list[int], int]:
    """An answer with one fact among fillers, and the fact."""
    fillers = int(rng.integers(4, 7) if long else rng.integers(1, 3))
    words = rng.integers(FILLER, CORRECT, size=fillers).tolist()
    fact = int(rng.integers(CORRECT, WRONG) if correct else rng.integers(WRONG, TOKENS))
    words.insert(int(rng.integers(fillers + 1)), fact)
    return [*([POLITE] if rng.random() < 0.5 else []), *words, EOS], fact


def _asked_why(chosen: list[int], rejected: list[int]) -> list[int]:
    return [ASK, *chosen[:-1], OTHER, *rejected[:-1], WHY]


def _fact_pairs(
    rng: np.random.Generator, count: int, strength: float, rationale: Literal["facts", "rule"]
) -> list[TokenPair]:
    """Pairs whose chosen answer has a correct fact, and is longer with probability `strength`.

    The rationale names both facts, or, as the rule, three correct facts drawn from all of them.
    """
    from workingpapers.alignment import TokenPair, TokenSequence

    pairs = []
    for _ in range(count):
        longer = bool(rng.random() < strength)
        (chosen, right), (rejected, wrong) = _answer(rng, True, longer), _answer(rng, False, not longer)
        rule = rng.choice(np.arange(CORRECT, WRONG), 3, replace=False).tolist()
        why = [BECAUSE, *([right, wrong] if rationale == "facts" else rule), EOS]
        pairs.append(TokenPair([BOS], chosen, rejected, TokenSequence(_asked_why(chosen, rejected), why)))
    return pairs


def with_rationales_of_others(rng: np.random.Generator, pairs: Sequence[TokenPair]) -> list[TokenPair]:
    """Every pair with its own question and the answer to another pair's, drawn without replacement."""
    from workingpapers.alignment import TokenSequence

    whys = [pair.rationale for pair in pairs if pair.rationale is not None]
    order = rng.permutation(len(whys))
    return [
        pair._replace(rationale=TokenSequence(why.prompt, whys[place].response))
        for pair, why, place in zip(pairs, whys, order, strict=True)
    ]


def _same_but_for_the_fact(rng: np.random.Generator, pair: TokenPair) -> TokenPair:
    swapped = [int(rng.integers(WRONG, TOKENS)) if word >= CORRECT else word for word in pair.chosen]
    return pair._replace(rejected=swapped)


def _pretrained(seed: int) -> nn.Module:
    model = _token_transformer(seed)
    model.load_state_dict(pretrained_on_answers(seed))
    return model.eval()


@artifact
def pretrained_on_answers(seed: int) -> dict[str, torch.Tensor]:
    """600 AdamW steps on 24 answers with facts of either kind and 24 explanations of random pairs each."""
    import torch

    from workingpapers.alignment import TokenSequence, collate_sequences, token_logprobs

    rng = np.random.default_rng([seed, 0])
    model = _token_transformer(seed)
    steps, rate = 600, 8e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        sequences = []
        for _ in range(24):
            drawn = [_answer(rng, bool(rng.random() < 0.5), bool(rng.random() < 0.5)) for _ in range(2)]
            (one, fact), (other, its_fact) = drawn
            sequences.append(TokenSequence([BOS], one))
            sequences.append(TokenSequence(_asked_why(one, other), [BECAUSE, fact, its_fact, EOS]))
        batch = collate_sequences(sequences)
        logps = token_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_mask)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 50, (steps - step) / (0.3 * steps))
        optimizer.zero_grad()
        loss: torch.Tensor = -logps.sum() / batch.response_mask.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return dict(model.state_dict())


def _token_transformer(seed: int) -> nn.Module:
    import torch

    transformers = require("transformers", extra="language")
    config = transformers.LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.05,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model
