"""What a training step costs, against trl."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.claims.alignment.beside_trl import (
    adamw_step,
    small_llama,
    timed_steps,
    trl_data,
    trl_dpo_loss,
    trl_options,
)
from workingpapers.common.validation import require
from workingpapers.desk.claim import Cell, Row, bars, benchmark, faster, scales

if TYPE_CHECKING:
    from torch import Tensor, nn

    from workingpapers.alignment import TokenPair

PAPER = "judge-preference"
PAIRS, PROMPT, RESPONSE = 8, 48, 16


@benchmark(
    paper=PAPER,
    says="One optimizer step (forward, backward, AdamW) is faster than that of trl's trainer of the same loss, on the "
    "same model, pairs and precomputed reference.",
    grid={
        "loss": ["dpo", "kto", "orpo"],
        "vocabulary": scales(smoke=[4_096], laptop=[8_192], paper=[8_192, 49_152]),
        "contender": ["ours", "trl"],
    },
    expect=[faster("ours", than="trl", each=["loss", "vocabulary"])],
    plot=bars(x="loss", y="seconds", by="contender", log="y"),
    rounds={"smoke": 5, "laptop": 5, "paper": 7},
)
def training_step(cell: Cell) -> Row:
    """8 pairs, prompts of 48 and responses of 16 tokens; a Llama of width 128 with 4 layers.

    trl's step also computes the diagnostics that it logs: entropies, mean logits, token accuracy. Its KTO takes the
    16 records of the pairs with the same mismatched responses, and scores them under the reference at every step unless
    told otherwise; here it is given both references.
    """
    from workingpapers.alignment import TokenPair

    model, reference = small_llama(cell.vocabulary), small_llama(cell.vocabulary, seed=1)
    rng = np.random.default_rng(0)
    sizes = (PROMPT, RESPONSE, RESPONSE)
    pairs = [TokenPair(*(rng.integers(cell.vocabulary, size=size).tolist() for size in sizes)) for _ in range(PAIRS)]
    with tempfile.TemporaryDirectory() as folder:
        if cell.contender == "ours":
            step = _our_step(cell.loss, model, reference, pairs)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its experimental module
                loss = {"dpo": _trl_dpo, "kto": _trl_kto, "orpo": _trl_orpo}[cell.loss](model, reference, pairs, folder)
            step = adamw_step(model, loss)
        return {"value": timed_steps(cell, step, steps=2)}


def _our_step(loss: str, model: nn.Module, reference: nn.Module, pairs: list[TokenPair]) -> Callable[[], float]:
    from workingpapers.alignment import DPO, KTO, ORPO, AlignmentTrainer, PreferenceConfig

    args = PreferenceConfig(warmup=None, max_steps=100, batch_size=PAIRS, precompute_reference=True)
    module: nn.Module = {"dpo": DPO, "kto": KTO, "orpo": ORPO}[loss](0.1, reduction="sum")
    trainer = AlignmentTrainer(model, reference, pairs, args=args, loss=module)
    return lambda: trainer.train(1)[-1]["loss"]


def _trl_dpo(model: nn.Module, reference: nn.Module, pairs: list[TokenPair], folder: str) -> Callable[[], Tensor]:
    return trl_dpo_loss(model, reference, pairs, folder, beta=0.1)


def _trl_kto(model: nn.Module, reference: nn.Module, pairs: list[TokenPair], folder: str) -> Callable[[], Tensor]:
    from workingpapers.alignment import TokenPair, collate_preferences, frozen, pair_logprobs

    trl = require("trl", extra="peers")
    trainer = trl.KTOTrainer(
        model,
        reference,
        args=trl.KTOConfig(**trl_options(folder, 2 * PAIRS), beta=0.1),
        **trl_data([{"prompt": "a", "completion": "a", "label": label} for label in (True, False)]),
    )
    trainer.precompute_ref_logps = True  # the batch carries them
    mismatched = [
        TokenPair(pair.prompt, pairs[place - 1].chosen, pairs[place - 1].rejected) for place, pair in enumerate(pairs)
    ]
    with frozen(reference):
        own, other = (
            [part.tolist() for part in pair_logprobs(reference, collate_preferences(some))]
            for some in (pairs, mismatched)
        )
    inputs = trainer.data_collator(
        [
            {
                "prompt_ids": pair.prompt,
                "completion_ids": pair[1 + side],
                "KL_completion_ids": mismatched[row][1 + side],
                "ref_logps": own[side][row],
                "ref_KL_logps": other[side][row],
                "label": side == 0,
            }
            for row, pair in enumerate(pairs)
            for side in (0, 1)
        ]
    )
    return lambda: trainer.compute_loss(model, dict(inputs))


def _trl_orpo(model: nn.Module, reference: nn.Module, pairs: list[TokenPair], folder: str) -> Callable[[], Tensor]:
    import torch

    orpo = require("trl.experimental.orpo", extra="peers")
    trainer = orpo.ORPOTrainer(
        model,
        args=orpo.ORPOConfig(**trl_options(folder, PAIRS), beta=0.1, max_length=PROMPT + RESPONSE),
        **trl_data([{"prompt": "a", "chosen": "a", "rejected": "aa"}]),
    )
    inputs: dict[str, Any] = {}
    prompts = torch.tensor([pair.prompt for pair in pairs])
    for side in ("chosen", "rejected"):
        responses = torch.tensor([getattr(pair, side) for pair in pairs])
        inputs[f"{side}_input_ids"] = torch.cat([prompts, responses], 1)
        inputs[f"{side}_attention_mask"] = torch.ones_like(inputs[f"{side}_input_ids"])
        inputs[f"{side}_labels"] = torch.cat([torch.full_like(prompts, -100), responses], 1)
    inputs |= {"prompt_input_ids": prompts, "prompt_attention_mask": torch.ones_like(prompts)}
    return lambda: trainer.compute_loss(model, dict(inputs))
