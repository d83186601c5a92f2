"""A small transformer whose law of answers is known, where likelihood and truth agree and where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.claims.alignment.sharpening.exact import PAPER
from workingpapers.common.validation import require
from workingpapers.desk.claim import Axis, Cell, Row, artifact, bars, claim, higher, lower, scales, seeds

if TYPE_CHECKING:
    import torch
    from torch import nn

    from workingpapers.alignment.sharpening.rewards import Kind

PUBLISHED = (
    "SFT-Sharpening against greedy decoding, lift of accuracy in percent and of mean base log-likelihood: Phi3.5-Mini "
    "MATH 19.24, 48.33; GSM8k 1.82, 1.49; ProntoQA 12.46, 5.64; Mistral-7B MATH 8.88, 5.71"
)
PROMPTS, FIRST_DIGIT, END = 128, 128, 138  # a prompt is one token, then come the digits
LIMIT = 5  # tokens of an answer
INFERENCE: dict[str, tuple[int, Kind]] = {
    "best of 2": (2, "loglik"),
    "best of 10": (10, "loglik"),
    "best of 50": (50, "loglik"),
    "best of 50, per token": (50, "normalized"),
    "best of 50, majority": (50, "majority"),
}
TRAINED: dict[str, tuple[int, Kind]] = {
    "SFT": (50, "loglik"),
    "SFT, per token": (50, "normalized"),
    "SFT, majority": (50, "majority"),
    "SFT, own samples": (1, "loglik"),
}
DECODED = ["temperature 1", "temperature 0.5", "greedy"]
DIGITS_GRID: dict[str, Axis] = {
    "steps": scales(smoke=[], laptop=[300], paper=[1_000]),
    "seed": seeds(smoke=5, laptop=5, paper=10),
    "method": [*DECODED, *INFERENCE, *TRAINED, "RLHF"],
}


@claim(
    paper=PAPER,
    says="Where the likeliest answer is right: sharpening, at inference time and amortised, beats sampling, a lower "
    "temperature, greedy decoding and training on random own samples; N = 10 is within 0.05 of N = 50; one draw of the "
    "trained model is as good as the best of 50 (within 0.05).",
    published=PUBLISHED + "; gains level off at N of 10 to 20",
    grid=DIGITS_GRID,
    expect=[
        higher("accuracy", "best of 50", than=DECODED),
        higher("accuracy", "best of 10", than="best of 2"),
        higher("accuracy", "best of 10", than="best of 50", margin=-0.05),
        higher("accuracy", "SFT", than=[*DECODED, "SFT, own samples"]),
        higher("accuracy", "SFT", than="best of 50", margin=-0.05),
        higher("accuracy", "RLHF", than=[*DECODED, "SFT, own samples"]),
        higher("base_loglik", "SFT", than=["temperature 1", "greedy"]),
    ],
    plot=bars(x="method", y="accuracy"),
)
def likelihood_and_truth_agree(cell: Cell) -> Row:
    return answered(cell, False)


@claim(
    paper=PAPER,
    says="Where the empty answer is likelier than each right one: sharpening by log-likelihood raises the likelihood "
    "and destroys the accuracy, and the report's lengths show it; rewards per token and by majority gain instead.",
    published="sharpening by log-likelihood can hurt where the base is weak or short answers win; other self-rewards "
    "usually gain more (appendix)",
    grid=DIGITS_GRID,
    expect=[
        higher("base_loglik", "SFT", than="temperature 1"),
        lower("accuracy", "SFT", than="temperature 1"),
        lower("accuracy", "best of 50", than="temperature 1"),
        lower("length", "SFT", than="temperature 1", factor=0.5),
        higher("accuracy", "SFT, per token", than=["temperature 1", "greedy", "SFT, own samples"]),
        higher("accuracy", "SFT, majority", than=["temperature 1", "greedy", "SFT, own samples"]),
    ],
    plot=bars(x="method", y="accuracy"),
)
def the_empty_answer_is_likelier(cell: Cell) -> Row:
    return answered(cell, True)


def answered(cell: Cell, empty: bool) -> Row:
    """Accuracy, base log-likelihood and length of the answers of one method."""
    import torch

    from workingpapers.alignment.sharpening import CausalPolicy, SharpeningRLHF, SharpeningSFT, sharpen

    base = digits_model(cell.seed, cell.steps, empty)
    prompts = [[x] for x in range(PROMPTS)]
    generator = torch.Generator().manual_seed(cell.seed)
    common: dict[str, Any] = {"extract": _answer, "max_new_tokens": LIMIT}
    if cell.method in INFERENCE:
        n, reward = INFERENCE[cell.method]
        found = sharpen(base, prompts, n, reward=reward, generator=generator, **common)
        return _graded(found.responses, float(found.base_logps.mean()))
    if cell.method in DECODED:
        temperature = {"temperature 1": 1.0, "temperature 0.5": 0.5, "greedy": 0.0}[cell.method]
        trained, draws = base, 1 if cell.method == "greedy" else 20
    else:
        temperature, draws = 1.0, 20
        common |= {"batch_size": 128, "max_grad_norm": 1.0, "lr": 3e-3, "random_state": cell.seed}
        if cell.method == "RLHF":
            trainer: Any = SharpeningRLHF(base, n=8, beta=0.5, epochs=25, **common)
        else:
            n, reward = TRAINED[cell.method]
            trainer = SharpeningSFT(base, n=n, reward=reward, epochs=100, **common)
        trained = trainer.fit(prompts).model_
    policy = CausalPolicy(
        trained, max_new_tokens=LIMIT, eos_token_id=END, temperature=temperature, batch_size=5_000, generator=generator
    )
    batch = policy.sample(prompts * draws, 1)
    scores = CausalPolicy(base, max_new_tokens=LIMIT).log_prob(prompts, _by_prompt(batch.responses()))
    return _graded(batch.responses(), float(scores.mean()))


def _by_prompt(responses: list[list[int]]) -> list[list[list[int]]]:
    return [responses[prompt::PROMPTS] for prompt in range(PROMPTS)]


def _graded(responses: Sequence[list[int] | None], base_loglik: float) -> Row:
    given = [response for response in responses if response is not None]
    right = [_answer(response) == _truth(row % PROMPTS) for row, response in enumerate(responses) if response]
    return {
        "accuracy": sum(right) / len(responses),
        "base_loglik": base_loglik,
        "length": float(np.mean([len(response) for response in given])),
    }


def _answer(response: Sequence[int]) -> tuple[int, int] | None:
    """The two digits that a response begins with."""
    digits = [token - FIRST_DIGIT for token in response if token != END]
    return (digits[0], digits[1]) if len(digits) >= 2 else None


def _truth(prompt: int) -> tuple[int, int]:
    tens, units = divmod((prompt // 16 + prompt % 16) % 16, 10)
    return tens, units


def digits_model(seed: int, steps: int, empty: bool) -> nn.Module:
    model = _untrained(seed)
    model.load_state_dict(digits_weights(seed, steps, empty))
    return model.eval()


@artifact
def digits_weights(seed: int, steps: int, empty: bool) -> dict[str, torch.Tensor]:
    """AdamW steps of 256 noisy demonstrations, learning rate 1e-2 falling linearly to 0."""
    import torch

    model = _untrained(seed)
    rng = np.random.default_rng([seed, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        tokens, scored = (torch.from_numpy(part) for part in demonstrations(256, seed, empty, rng))
        logits = model(input_ids=tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[scored[:, 1:]], tokens[:, 1:][scored[:, 1:]])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return dict(model.state_dict())


def demonstrations(count: int, seed: int, empty: bool, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with noisy answers, and which tokens belong to the answers.

    The prompt numbers two operands a, b; its answer is the two digits of (a + b) mod 16. Half of the prompts are hard:
    the answer is right with probability 0.4, else it has one fixed wrong first digit and any second, so that greedy
    decoding goes wrong. The others are right with 0.6, else any two digits. Where `empty`, 0.3 of the answers have
    nothing before their end, and the others one digit more, any digit.
    """
    of_prompts = np.random.default_rng([seed, 0])
    hard = of_prompts.permutation(PROMPTS) < PROMPTS // 2
    truth = np.array([_truth(prompt) for prompt in range(PROMPTS)])
    lure = (truth[:, 0] + of_prompts.integers(1, 10, size=PROMPTS)) % 10

    prompt = rng.integers(PROMPTS, size=count)
    digits = rng.integers(10, size=(count, 3 if empty else 2))
    digits[:, 0] = np.where(hard[prompt], lure[prompt], digits[:, 0])
    right = rng.random(count) < np.where(hard[prompt], 0.4, 0.6)
    digits[right, :2] = truth[prompt[right]]
    tokens = np.column_stack([prompt, FIRST_DIGIT + digits, np.full(count, END)])
    scored = np.ones(tokens.shape, dtype=bool)
    scored[:, 0] = False
    if empty:
        nothing = rng.random(count) < 0.3
        tokens[nothing, 1] = END
        scored[nothing, 2:] = False
    return tokens, scored


def _untrained(seed: int) -> nn.Module:
    import torch

    transformers = require("transformers", extra="language")
    config = transformers.LlamaConfig(
        vocab_size=END + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model
