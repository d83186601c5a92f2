"""The cost of an update."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.claims.alignment.beside_trl import adamw_step, small_llama, timed_steps, trl_data, trl_options
from workingpapers.claims.alignment.reinforced_token.problems import PAPER
from workingpapers.common.validation import require
from workingpapers.desk.claim import Cell, Row, bars, benchmark, faster, scales

if TYPE_CHECKING:
    import torch
    from torch import nn

    from workingpapers.alignment import SequenceBatch

PROMPT = 48  # tokens


@benchmark(
    paper=PAPER,
    says="One clipped update of the policy on 8 answers of 8 to 64 tokens (forward, backward, AdamW) is faster than "
    "that of trl's GRPOTrainer on the same advantages of tokens: trl 1.16 has no PPO trainer, but this is its loss.",
    grid={
        "vocabulary": scales(smoke=[512], laptop=[512, 8_192], paper=[512, 49_152]),
        "contender": ["ours", "trl"],
    },
    expect=[faster("ours", than="trl", each="vocabulary")],
    plot=bars(x="vocabulary", y="seconds", by="contender", log="y"),
    rounds={"smoke": 5, "laptop": 5, "paper": 7},
)
def policy_update(cell: Cell) -> Row:
    """A Llama of width 128 with 4 layers. trl's step also computes the entropies that it logs."""

    from workingpapers.alignment import clipped_policy_losses, token_logprobs

    model, batch, advantages = answers_to_update_on(cell.vocabulary)
    assert batch.logprobs is not None
    old_logprobs = batch.logprobs

    def ours() -> torch.Tensor:
        logprobs = token_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_mask)
        losses, _, _ = clipped_policy_losses(
            logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=batch.response_mask
        )
        return (losses.sum(1) / batch.lengths).mean()

    with tempfile.TemporaryDirectory() as folder:
        loss = ours if cell.contender == "ours" else trl_loss(model, batch, advantages, folder)
        return {"loss": timed_steps(cell, adamw_step(model, loss), steps=3)}


def answers_to_update_on(vocabulary: int) -> tuple[nn.Module, SequenceBatch, torch.Tensor]:
    """A policy, answers with the log-probabilities of a policy a little different, and advantages of their tokens."""
    from dataclasses import replace

    import torch

    from workingpapers.alignment import collate_sequences, token_logprobs

    model = small_llama(vocabulary).eval()
    rng = np.random.default_rng(0)
    batch = collate_sequences(
        [
            (rng.integers(vocabulary, size=PROMPT).tolist(), rng.integers(vocabulary, size=8 * k).tolist())
            for k in range(1, 9)
        ]
    )
    with torch.no_grad():
        logprobs = token_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_mask)
    noise = torch.from_numpy(rng.standard_normal((2, *logprobs.shape))).float() * batch.response_mask
    return model, replace(batch, logprobs=logprobs + 0.2 * noise[0]), noise[1]


def trl_loss(model: nn.Module, batch: SequenceBatch, advantages: torch.Tensor, folder: str) -> Any:
    """The loss of a GRPOTrainer without divergence term, as a function of nothing."""
    trl = require("trl", extra="peers")
    options = {"loss_type": "grpo", "beta": 0.0, "num_generations": len(batch)}
    theirs = trl.GRPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(**trl_options(folder, len(batch)), **options),
        **trl_data([{"prompt": "a"}]),
    )
    theirs.current_gradient_accumulation_steps = 1
    prompts, completions = slice(None, PROMPT), slice(PROMPT, None)  # padding stands on the right
    assert batch.logprobs is not None
    inputs = {
        "prompt_ids": batch.input_ids[:, prompts],
        "prompt_mask": batch.attention_mask[:, prompts],
        "completion_ids": batch.input_ids[:, completions],
        "completion_mask": batch.attention_mask[:, completions],
        "advantages": advantages[:, completions],
        "old_per_token_logps": batch.logprobs[:, completions],
    }
    return lambda: theirs.compute_loss(model, inputs)
