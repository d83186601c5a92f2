"""What a training step costs."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.claims.alignment.beside_trl import small_llama, trl_options
from workingpapers.claims.alignment.onpolicy_preference.common import PAPER
from workingpapers.common.validation import require
from workingpapers.desk.claim import Cell, Row, bars, benchmark, faster, scales

if TYPE_CHECKING:
    import torch


@benchmark(
    paper=PAPER,
    says="On-policy training of a small language model, answers drawn, scored and learned from, is faster than trl's "
    "RLOOTrainer, whose loss is the same.",
    grid={"rounds_of_training": scales(smoke=[3], laptop=[8]), "contender": ["ours", "trl"]},
    expect=[faster("ours", than="trl")],
    plot=bars(x="contender", y="seconds", by="contender"),
    rounds={"smoke": 5, "laptop": 5, "paper": 7},
)
def training(cell: Cell) -> Row:
    """8 prompts of 8 tokens, 4 answers of 32 tokens each a round, one step; a Llama of width 128 with 4 layers.

    trl's trainer also decodes the answers and logs them; its logging, saving and tables are off. Both compute the
    log-probabilities of the answers once more after they were drawn.
    """

    from workingpapers.alignment import CausalLMPolicy, PreferenceTuner

    model = small_llama(512, pad_token_id=0)
    if cell.contender == "ours":

        def reward(_: Any, actions: torch.Tensor) -> torch.Tensor:
            return ((actions % 7 == 0) & (actions != -1)).sum(-1) / (actions != -1).sum(-1)

        policy = CausalLMPolicy(model, max_new_tokens=32, eos_token_id=1)
        tuner = PreferenceTuner(policy, policy.reference(), reward, loss="ppo", batch_size=32, lr=1e-4)
        prompts = np.random.default_rng(0).integers(2, 512, (8, 8)).tolist()
        tuner.fit(prompts, 32, evaluate_every=0)
        with cell.timed(calls=cell.rounds_of_training):
            tuner.fit(prompts, 32 * cell.rounds_of_training, evaluate_every=0)
        return {"steps": tuner.history.gradient_steps[-1] - 1}
    with tempfile.TemporaryDirectory() as folder:
        return {"steps": _trl_training(model, cell, folder)}


def _trl_training(model: Any, cell: Cell, folder: str) -> int:
    """Time the steps of `RLOOTrainer.train` after the first one; its set-up is not timed."""
    datasets, trl = require("datasets", extra="language"), require("trl", extra="peers")
    transformers: Any
    transformers, tokenizers = require("transformers", extra="language"), require("tokenizers", extra="language")
    words = {"<p>": 0, "<e>": 1, **{f"w{token}": token for token in range(2, 512)}}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<e>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>", pad_token="<p>")
    prompts = np.random.default_rng(0).integers(2, 512, (8, 8))
    texts = [" ".join(f"w{token}" for token in prompt) for prompt in prompts.tolist()]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token % 7 == 0 for token in ids) / len(ids) for ids in completion_ids]

    class Timed(transformers.TrainerCallback):
        """Starts the stopwatch after one step."""

        clock: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                self.clock = cell.timed(calls=cell.rounds_of_training)
                self.clock.__enter__()
            if state.global_step == cell.rounds_of_training + 1:
                self.clock.__exit__(None, None, None)

    trainer = trl.RLOOTrainer(
        model,
        reward_funcs=reward,
        args=trl.RLOOConfig(
            **trl_options(folder, batch_size=32),
            logging_strategy="no",
            save_strategy="no",
            num_generations=4,
            max_completion_length=32,
            max_steps=cell.rounds_of_training + 1,
            beta=0.0,
            learning_rate=1e-4,
            normalize_advantages=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=tokenizer,
        callbacks=[Timed()],
    )
    trainer.train()
    return int(trainer.state.global_step) - 1
