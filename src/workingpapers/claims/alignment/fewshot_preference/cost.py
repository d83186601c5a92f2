"""What a training step costs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.claims.alignment.fewshot_preference.users import PAPER, AttributeTemplate
from workingpapers.common.validation import require
from workingpapers.desk.claim import Cell, Row, bars, benchmark, faster, scales

if TYPE_CHECKING:
    from torch import nn

    from workingpapers.alignment import TokenPair


@benchmark(
    paper=PAPER,
    says="One optimizer step on eight-shot episodes (IPO, forward, backward, AdamW) is faster than that of trl's "
    "DPOTrainer on the same model, batch and precomputed reference.",
    grid={"vocabulary": scales(smoke=[512], laptop=[512, 8_192], paper=[49_152]), "contender": ["ours", "trl"]},
    expect=[faster("ours", than="trl", each="vocabulary")],
    plot=bars(x="vocabulary", y="seconds", by="contender", log="y"),
    rounds={"smoke": 5, "laptop": 5, "paper": 7},
)
def training_step(cell: Cell) -> Row:
    """4 episodes: prompts of 8 shots (160 tokens), answers of 12 tokens; a Llama of width 64 with 2 layers.

    trl's step also computes the diagnostics that it logs: entropies, mean logits, token accuracy.
    """
    import torch

    from workingpapers.alignment import Comparison, Episode, FSPOConfig, FSPOLoss, FSPOTrainer

    transformers = require("transformers", extra="language")
    config = transformers.LlamaConfig(
        vocab_size=cell.vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, reference = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    rng = np.random.default_rng(0)

    def comparison(length: int) -> Comparison:
        chosen, rejected = rng.integers(80, size=(2, length)).tolist()
        return Comparison((), tuple(chosen), tuple(rejected))

    template = AttributeTemplate(20)
    episodes = [Episode(tuple(comparison(10) for _ in range(8)), comparison(12), user) for user in range(4)]
    steps = 5
    if cell.contender == "ours":
        args = FSPOConfig(warmup=None, max_steps=steps + 2, precompute_reference=True)  # the end warns: not reached
        trainer = FSPOTrainer(model, reference, None, episodes, template, args, loss=FSPOLoss("ipo", 0.25))
        trainer.train(1)
        with cell.timed(calls=steps):
            trainer.train(steps)
        return {"loss": trainer.history[0]["loss"] / len(episodes[0].query.chosen) ** 2}
    pairs = [template.fit(episode.shots, episode.query, None, 0) for episode in episodes]
    with tempfile.TemporaryDirectory() as folder:
        theirs, inputs = trl_trainer(model, reference, pairs, folder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)

        def step() -> float:
            optimizer.zero_grad()
            loss = theirs.compute_loss(model, dict(inputs))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            return float(loss)

        first = step()
        with cell.timed(calls=steps):
            for _ in range(steps):
                step()
    return {"loss": first}


def trl_trainer(model: nn.Module, reference: nn.Module, pairs: Sequence[TokenPair], folder: str) -> tuple[Any, Any]:
    """A DPOTrainer with the IPO loss, and the batch of `pairs` with the reference's log-probabilities."""
    import torch

    from workingpapers.alignment import collate_preferences, frozen, pair_logprobs

    datasets, trl = require("datasets", extra="language"), require("trl", extra="peers")
    transformers, tokenizers = require("transformers", extra="language"), require("tokenizers", extra="language")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "<e>": 1}, merges=[])),
        eos_token="<e>",
    )
    length = len(pairs[0].chosen)
    arguments = trl.DPOConfig(
        output_dir=folder,
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        beta=0.25 * length,  # trl averages log-ratios over tokens: the same minimiser
        loss_type=["ipo"],
        per_device_train_batch_size=len(pairs),
        use_cpu=not torch.cuda.is_available(),
    )
    row = {"prompt": "a", "chosen": "a", "rejected": "aa"}
    theirs = trl.DPOTrainer(
        model, reference, args=arguments, train_dataset=datasets.Dataset.from_list([row]), processing_class=tokenizer
    )
    with frozen(reference):
        chosen, rejected = pair_logprobs(reference, collate_preferences(pairs))
    examples = [
        {
            "prompt_ids": pair.prompt,
            "chosen_ids": pair.chosen,
            "rejected_ids": pair.rejected,
            "ref_chosen_logps": of_chosen,
            "ref_rejected_logps": of_rejected,
        }
        for pair, of_chosen, of_rejected in zip(pairs, chosen.tolist(), rejected.tolist(), strict=True)
    ]
    theirs.precompute_ref_logps = True  # the batch carries them
    return theirs, theirs.data_collator(examples)
