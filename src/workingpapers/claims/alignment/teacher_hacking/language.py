"""Language models: SmolLM2 as the truth, and the cost of a step."""

from __future__ import annotations

import importlib
import math
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.claims.alignment.beside_trl import adamw_step, small_llama, timed_steps, trl_data, trl_options
from workingpapers.claims.alignment.teacher_hacking.studies import END, PAPER, U_CURVE
from workingpapers.common.validation import require
from workingpapers.desk.claim import Cell, Row, bars, benchmark, claim, faster, higher, lower, scales, seeds

if TYPE_CHECKING:
    import torch
    from torch import nn

    from workingpapers.alignment import SequenceBatch

# ------------------------------------------------------------------------------------- SmolLM2-135M-Instruct, the truth


@claim(
    paper=PAPER,
    says="With SmolLM2-135M-Instruct as the oracle, a teacher of six of its layers fine-tuned for long on few of its "
    "answers and a student of two: distilled from fixed answers, the golden metric rises from its minimum by more than "
    "two standard errors while the proxy goes on falling; with fresh answers it ends lower.",
    published="Flan-T5 as oracle, T5 pairs, three text data sets: offline U-shape, online none (figures)",
    grid={
        "sft": scales(smoke=[], laptop=[], paper=[64]),
        "prompts": scales(smoke=[], laptop=[], paper=[32]),
        "held_out": scales(smoke=[], laptop=[], paper=[32]),
        "epochs": scales(smoke=[], laptop=[], paper=[40]),
        "seed": seeds(smoke=5, laptop=5, paper=5),
    },
    expect=[
        higher("rise_in_errors", "offline", than=2.0, where=END),
        lower("proxy_since_minimum", "offline", than=0.0, where=END),
        higher("golden", "offline", than="online teacher", where=END),
    ],
    plot=U_CURVE,
)
def smollm2_is_the_oracle(cell: Cell) -> list[Row]:
    import torch

    from workingpapers.alignment import DistillationArm, controlled_study
    from workingpapers.claims.alignment.testbeds import TOPICS
    from workingpapers.data import smollm2

    oracle, tokenizer = smollm2()
    texts = [f"A {mood} story about {topic}:" for mood in ("short", "sad", "funny") for topic in TOPICS]
    order = np.random.default_rng(cell.seed).permutation(len(texts))
    ends = np.cumsum([cell.sft, cell.prompts, cell.held_out])
    sft_prompts, prompts, val_prompts = (
        [texts[place] for place in order[end - count : end]]
        for count, end in zip((cell.sft, cell.prompts, cell.held_out), ends, strict=True)
    )
    result = controlled_study(
        oracle,
        lambda: some_layers(6),
        lambda: some_layers(2),
        sft_prompts=sft_prompts,
        prompts=prompts,
        val_prompts=val_prompts,
        arms={"offline": DistillationArm(), "online teacher": DistillationArm("online_teacher")},
        teacher_epochs=20,
        student_epochs=3,
        sft_lr=5e-4,
        sft_batch_size=8,
        epochs=cell.epochs,
        every=max(1, cell.epochs // 8),
        lr=5e-4,
        batch_size=8,
        max_new_tokens=12,
        generator=torch.Generator().manual_seed(cell.seed),
        tokenizer=tokenizer,
    )
    rows = []
    for method, run in result.runs.items():
        last = run.trace[-1]
        lowest = min(run.trace, key=lambda row: row.golden or 0.0)
        rise, error = last.golden_rise or 0.0, last.golden_rise_se or math.inf  # zeros at the minimum itself
        rows += [
            {
                "method": method,
                "epoch": row.epoch,
                "golden": row.golden,
                "proxy": row.proxy,
                "generated_tokens": row.generated_tokens,
                "teacher_golden": result.teacher_golden.value,
                "rise_in_errors": rise / error,
                "proxy_since_minimum": last.proxy - lowest.proxy,
            }
            for row in run.trace
        ]
    return rows


def some_layers(count: int) -> nn.Module:
    """SmolLM2 with `count` of its 30 layers, evenly spaced; embedding and head, which are one, stay as they are."""
    from torch import nn

    from workingpapers.data import smollm2

    model, _ = smollm2()
    places = np.linspace(0, len(model.model.layers) - 1, count).round().astype(int)
    model.model.layers = nn.ModuleList(model.model.layers[place] for place in places)
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place  # where the key-value cache keeps it
    model.config.num_hidden_layers = count
    model.get_input_embeddings().requires_grad_(False)
    return model


# ---------------------------------------------------------------------------------------------------------------- cost

PROMPTS, PROMPT_LENGTH, ANSWER_LENGTH = 8, 48, 16


class FixedAnswers:
    """A teacher whose answers are given: all contenders train on the same."""

    def __init__(self, teacher: nn.Module, answers: SequenceBatch) -> None:
        from workingpapers.alignment.teacher_hacking.models import CausalLM

        self.scored, self.answers = CausalLM(teacher), answers

    def logits(self, batch: SequenceBatch) -> torch.Tensor:
        return self.scored.logits(batch)

    def sample(self, prompts: Sequence[Sequence[int]], **_: Any) -> SequenceBatch:
        return self.answers


@benchmark(
    paper=PAPER,
    says="One distillation step (forward KL on answer tokens, AdamW) is faster than with trl's trainers, the one for "
    "generalized knowledge distillation and the one with a chunked loss, on the same models and batch.",
    grid={
        "vocabulary": scales(smoke=[512], laptop=[512, 8_192], paper=[512, 49_152]),
        "contender": ["ours", "trl GKD", "trl chunked"],
    },
    expect=[faster("ours", than=["trl GKD", "trl chunked"], each="vocabulary")],
    plot=bars(x="vocabulary", y="seconds", by="contender", log="y"),
    rounds={"smoke": 5, "laptop": 5, "paper": 7},
)
def distillation_step(cell: Cell) -> Row:
    """8 prompts of 48 and answers of 16 tokens; Llamas of width 128, the teacher with 4 layers, the student with 2."""
    import torch

    from workingpapers.alignment import Distiller, collate_sequences

    teacher, student = (small_llama(cell.vocabulary, layers=layers, seed=layers) for layers in (4, 2))
    tokens = np.random.default_rng(0).integers(cell.vocabulary, size=(PROMPTS, PROMPT_LENGTH + ANSWER_LENGTH)).tolist()
    pairs = [(row[:PROMPT_LENGTH], row[PROMPT_LENGTH:]) for row in tokens]
    steps = 3
    if cell.contender == "ours":
        distiller = Distiller(
            FixedAnswers(teacher, collate_sequences(pairs)),
            student,
            [prompt for prompt, _ in pairs],
            reduction="mean",
            batch_size=PROMPTS,
            generator=torch.Generator().manual_seed(0),
        )
        return {"loss": timed_steps(cell, lambda: distiller.fit(1).history[-1]["loss"], steps)}
    with tempfile.TemporaryDirectory() as folder:
        loss = _trl_loss(cell.contender, teacher, student, pairs, folder)
        return {"loss": timed_steps(cell, adamw_step(student, loss, lr=3e-4), steps)}


def _trl_loss(
    contender: str, teacher: nn.Module, student: nn.Module, pairs: Sequence[tuple[list[int], list[int]]], folder: str
) -> Callable[[], torch.Tensor]:
    """The loss that trl's trainer computes on these answers."""
    import torch

    options = trl_options(folder, len(pairs)) | {"beta": 0.0}  # forward KL
    data = trl_data([{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}] * len(pairs), padding_side="left")
    prompts, answers = (torch.tensor(column) for column in zip(*pairs, strict=True))
    everything = torch.cat([prompts, answers], 1)
    if contender == "trl GKD":
        gkd = importlib.import_module("trl.experimental.gkd")
        trainer = gkd.GKDTrainer(student, teacher, args=gkd.GKDConfig(**options), **data)
        inputs = {
            "input_ids": everything,
            "attention_mask": torch.ones_like(everything),
            "labels": torch.cat([torch.full_like(prompts, -100), answers], 1),
        }
    else:
        trl = require("trl", extra="peers")
        trainer = trl.DistillationTrainer(student, teacher, args=trl.DistillationConfig(**options), **data)
        inputs = {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": answers,
            "completion_mask": torch.ones_like(answers),
        }
    return lambda: trainer.compute_loss(student, dict(inputs))
