"""What the benchmarks against trl share: a small Llama, trl's trainers around it, and one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from workingpapers.common.validation import require
from workingpapers.desk.claim import Cell

if TYPE_CHECKING:
    from torch import Tensor, nn

    from workingpapers.alignment import TokenPair


def small_llama(vocabulary: int, *, width: int = 128, layers: int = 4, seed: int = 0, **config: Any) -> Any:
    """A Llama with random weights; the feed-forward part is three times as wide, and there are four heads."""
    import torch

    transformers = require("transformers", extra="language")
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    special = {"bos_token_id": None, "eos_token_id": None} | config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=vocabulary, num_attention_heads=4, **shape, **special)
        )


def timed_steps(cell: Cell, step: Callable[[], float], steps: int) -> float:
    """Time some calls after a first one, whose value it returns."""
    first = step()
    with cell.timed(calls=steps):
        for _ in range(steps):
            step()
    return first


def adamw_step(
    model: nn.Module, loss: Callable[[], Tensor], *, lr: float = 5e-7, max_grad_norm: float = 1.0
) -> Callable[[], float]:
    """One optimizer step, which returns its loss."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    def step() -> float:
        optimizer.zero_grad()
        value = loss()
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        return float(value.detach())

    return step


def trl_options(folder: str, batch_size: int) -> dict[str, Any]:
    """Arguments of any trainer of trl: float32, and nothing is logged or recomputed."""
    import torch

    return {
        "output_dir": folder,
        "report_to": [],
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": batch_size,
        "use_cpu": not torch.cuda.is_available(),
    }


def trl_data(rows: Sequence[dict[str, Any]], **special: Any) -> dict[str, Any]:
    """The data set and tokenizer a trainer of trl wants to be built with; the steps then get tokens of their own."""
    datasets, tokenizers = require("datasets", extra="language"), require("tokenizers", extra="language")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "<e>": 1}, merges=[]))
    tokenizer = require("transformers", extra="language").PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<e>", pad_token="<e>", **special
    )
    return {"train_dataset": datasets.Dataset.from_list(list(rows)), "processing_class": tokenizer}


def trl_dpo_loss(
    model: nn.Module, reference: nn.Module, pairs: Sequence[TokenPair], folder: str, **options: Any
) -> Callable[[], Tensor]:
    """The loss of a DPOTrainer on all `pairs`, the reference's log-probabilities given; `options` of its DPOConfig."""
    from workingpapers.alignment import collate_preferences, frozen, pair_logprobs

    trl = require("trl", extra="peers")
    trainer = trl.DPOTrainer(
        model,
        reference,
        args=trl.DPOConfig(**trl_options(folder, len(pairs)), **options),
        **trl_data([{"prompt": "a", "chosen": "a", "rejected": "aa"}]),
    )
    trainer.precompute_ref_logps = True  # the batch carries them
    with frozen(reference):
        of_reference = [logps.tolist() for logps in pair_logprobs(reference, collate_preferences(pairs))]
    inputs = trainer.data_collator(
        [
            {
                "prompt_ids": pair.prompt,
                "chosen_ids": pair.chosen,
                "rejected_ids": pair.rejected,
                "ref_chosen_logps": chosen,
                "ref_rejected_logps": rejected,
            }
            for pair, chosen, rejected in zip(pairs, *of_reference, strict=True)
        ]
    )

    def loss() -> Tensor:
        value: Tensor = trainer.compute_loss(model, dict(inputs))
        return value

    return loss
