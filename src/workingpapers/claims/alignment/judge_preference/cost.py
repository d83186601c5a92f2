"""What a training step costs, against trl."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.common.validation import require
from workingpapers.desk.claim import Cell, Row, bars, benchmark, faster, scales

if TYPE_CHECKING:
    from torch import nn

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
    import torch

    from workingpapers.alignment import TokenPair

    transformers = require("transformers", extra="language")
    config = transformers.LlamaConfig(
        vocab_size=cell.vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, reference = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    rng = np.random.default_rng(0)
    sizes = (PROMPT, RESPONSE, RESPONSE)
    pairs = [TokenPair(*(rng.integers(cell.vocabulary, size=size).tolist() for size in sizes)) for _ in range(PAIRS)]
    with tempfile.TemporaryDirectory() as folder:
        build = _our_step if cell.contender == "ours" else _trl_step
        step = build(cell.loss, model, reference, pairs, folder)
        loss, steps = step(), 2
        with cell.timed(calls=steps):
            for _ in range(steps):
                step()
    return {"value": loss}


def _our_step(
    loss: str, model: nn.Module, reference: nn.Module, pairs: list[TokenPair], folder: str
) -> Callable[[], float]:
    from workingpapers.alignment import DPO, KTO, ORPO, AlignmentTrainer, PreferenceConfig

    args = PreferenceConfig(warmup=None, max_steps=100, batch_size=PAIRS, precompute_reference=True)
    module: nn.Module = {"dpo": DPO, "kto": KTO, "orpo": ORPO}[loss](0.1, reduction="sum")
    trainer = AlignmentTrainer(model, reference, pairs, args=args, loss=module)
    return lambda: trainer.train(1)[-1]["loss"]


def _trl_step(
    loss: str, model: nn.Module, reference: nn.Module, pairs: list[TokenPair], folder: str
) -> Callable[[], float]:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its experimental module
        trainer, inputs = {"dpo": _trl_dpo, "kto": _trl_kto, "orpo": _trl_orpo}[loss](model, reference, pairs, folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-7, weight_decay=0.0)

    def step() -> float:
        optimizer.zero_grad()
        value = trainer.compute_loss(model, dict(inputs))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(value)

    return step


def _trl_dpo(model: nn.Module, reference: nn.Module, pairs: list[TokenPair], folder: str) -> tuple[Any, Any]:
    from workingpapers.alignment import collate_preferences, frozen, pair_logprobs

    trl = require("trl", extra="peers")
    arguments = trl.DPOConfig(**_arguments(folder), beta=0.1, gradient_checkpointing=False)
    trainer = trl.DPOTrainer(
        model,
        reference,
        args=arguments,
        train_dataset=_dataset([{"prompt": "a", "chosen": "a", "rejected": "aa"}]),
        processing_class=_tokenizer(),
    )
    trainer.precompute_ref_logps = True  # the batch carries them
    with frozen(reference):
        logps = [part.tolist() for part in pair_logprobs(reference, collate_preferences(pairs))]
    examples = [
        {
            "prompt_ids": pair.prompt,
            "chosen_ids": pair.chosen,
            "rejected_ids": pair.rejected,
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }
        for pair, chosen, rejected in zip(pairs, *logps, strict=True)
    ]
    return trainer, trainer.data_collator(examples)


def _trl_kto(model: nn.Module, reference: nn.Module, pairs: list[TokenPair], folder: str) -> tuple[Any, Any]:
    from workingpapers.alignment import TokenPair, collate_preferences, frozen, pair_logprobs

    trl = require("trl", extra="peers")
    arguments = trl.KTOConfig(
        **(_arguments(folder) | {"per_device_train_batch_size": 2 * PAIRS}), beta=0.1, gradient_checkpointing=False
    )
    trainer = trl.KTOTrainer(
        model,
        reference,
        args=arguments,
        train_dataset=_dataset([{"prompt": "a", "completion": "a", "label": label} for label in (True, False)]),
        processing_class=_tokenizer(),
    )
    trainer.precompute_ref_logps = True
    mismatched = [
        TokenPair(pair.prompt, pairs[place - 1].chosen, pairs[place - 1].rejected) for place, pair in enumerate(pairs)
    ]
    with frozen(reference):
        own, other = (
            [part.tolist() for part in pair_logprobs(reference, collate_preferences(some))]
            for some in (pairs, mismatched)
        )
    examples = [
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
    return trainer, trainer.data_collator(examples)


def _trl_orpo(model: nn.Module, reference: nn.Module, pairs: list[TokenPair], folder: str) -> tuple[Any, Any]:
    import torch

    orpo = require("trl.experimental.orpo", extra="peers")
    arguments = orpo.ORPOConfig(
        **_arguments(folder), beta=0.1, max_length=PROMPT + RESPONSE, gradient_checkpointing=False
    )
    trainer = orpo.ORPOTrainer(
        model,
        args=arguments,
        train_dataset=_dataset([{"prompt": "a", "chosen": "a", "rejected": "aa"}]),
        processing_class=_tokenizer(),
    )
    inputs: dict[str, Any] = {}
    prompts = torch.tensor([pair.prompt for pair in pairs])
    for side in ("chosen", "rejected"):
        responses = torch.tensor([getattr(pair, side) for pair in pairs])
        inputs[f"{side}_input_ids"] = torch.cat([prompts, responses], 1)
        inputs[f"{side}_attention_mask"] = torch.ones_like(inputs[f"{side}_input_ids"])
        inputs[f"{side}_labels"] = torch.cat([torch.full_like(prompts, -100), responses], 1)
    inputs |= {"prompt_input_ids": prompts, "prompt_attention_mask": torch.ones_like(prompts)}
    return trainer, inputs


def _arguments(folder: str) -> dict[str, Any]:
    import torch

    return {
        "output_dir": folder,
        "report_to": [],
        "bf16": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": PAIRS,
        "use_cpu": not torch.cuda.is_available(),
    }


def _dataset(rows: list[dict[str, Any]]) -> Any:
    return require("datasets", extra="language").Dataset.from_list(rows)


def _tokenizer() -> Any:
    transformers, tokenizers = require("transformers", extra="language"), require("tokenizers", extra="language")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "<e>": 1}, merges=[])),
        eos_token="<e>",
        pad_token="<e>",
    )
