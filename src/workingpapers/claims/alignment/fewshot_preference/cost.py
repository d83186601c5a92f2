"""What a training step costs."""

from __future__ import annotations

import tempfile

import numpy as np

from workingpapers.claims.alignment.beside_trl import adamw_step, small_llama, timed_steps, trl_dpo_loss
from workingpapers.claims.alignment.fewshot_preference.users import PAPER, AttributeTemplate
from workingpapers.desk.claim import Cell, Row, bars, benchmark, faster, scales


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
    from workingpapers.alignment import Comparison, Episode, FSPOConfig, FSPOLoss, FSPOTrainer

    model, reference = (small_llama(cell.vocabulary, width=64, layers=2, seed=seed) for seed in (0, 1))
    rng = np.random.default_rng(0)

    def comparison(length: int) -> Comparison:
        chosen, rejected = rng.integers(80, size=(2, length)).tolist()
        return Comparison((), tuple(chosen), tuple(rejected))

    template = AttributeTemplate(20)
    episodes = [Episode(tuple(comparison(10) for _ in range(8)), comparison(12), user) for user in range(4)]
    length, steps = len(episodes[0].query.chosen), 5
    if cell.contender == "ours":
        args = FSPOConfig(warmup=None, max_steps=steps + 2, precompute_reference=True)  # the end warns: not reached
        trainer = FSPOTrainer(model, reference, None, episodes, template, args, loss=FSPOLoss("ipo", 0.25))
        return {"loss": timed_steps(cell, lambda: trainer.train(1)[-1]["loss"], steps) / length**2}
    pairs = [template.fit(episode.shots, episode.query, None, 0) for episode in episodes]
    with tempfile.TemporaryDirectory() as folder:
        # trl averages log-ratios over tokens: with beta that many times larger it has the same minimiser
        loss = trl_dpo_loss(model, reference, pairs, folder, beta=0.25 * length, loss_type=["ipo"])
        return {"loss": timed_steps(cell, adamw_step(model, loss, lr=1e-6, max_grad_norm=10.0), steps)}
