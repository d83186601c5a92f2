"""The whole way on a language model: SmolLM2-135M-Instruct writes chest X-ray reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.claims.alignment.testbeds import adapted
from workingpapers.desk.claim import Cell, Row, artifact, bars, claim, higher, lower, scales, seeds

if TYPE_CHECKING:
    import torch
    from torch import nn

PAPER = "judge-preference"
LIMIT, CANDIDATES = 72, 4


@claim(
    paper=PAPER,
    says="SmolLM2-135M-Instruct, fine-tuned to write reports, then by DPO on pairs of its own reports: the recall of "
    "findings rises, and verbosity grows less where the judge is length-controlled, with a higher F1 of findings.",
    published="words per report: SFT 55.8, DPO selected by GREEN 140.2, by LC-GREEN 68.7; CheXbert F1 55.1, after 56.4",
    grid={
        "items": scales(smoke=[], laptop=[], paper=[96]),
        "steps": scales(smoke=[], laptop=[], paper=[24]),
        "held_out": scales(smoke=[], laptop=[], paper=[48]),
        "seed": seeds(smoke=5, laptop=5, paper=5),
        "method": ["SFT", "DPO plain", "DPO LC"],
    },
    expect=[
        higher("recall", "DPO plain", than="SFT"),
        lower("growth", "DPO LC", than="DPO plain"),
        higher("f1", "DPO LC", than="DPO plain"),
    ],
    plot=bars(x="method", y="verbosity"),
)
def smollm2_reports(cell: Cell) -> Row:
    from workingpapers.alignment.judge_preference import (
        ClinicalJudge,
        LengthControlled,
        align,
        build_preferences,
        clinical_errors,
        verbosity_report,
    )

    model, tokenizer = fine_tuned(cell.seed, cell.items, cell.held_out, cell.steps)
    findings, prompts, references = studies(cell.items + cell.held_out, cell.seed, tokenizer)
    before = write(model, tokenizer, prompts[cell.items :], 1, cell.seed)
    after = before
    if cell.method != "SFT":
        plain = ClinicalJudge("recall")
        judge = plain if cell.method == "DPO plain" else LengthControlled(plain)

        def sample(inputs: list[str], n: int, random_state: int) -> list[list[str]]:
            texts = write(model, tokenizer, inputs, n, random_state)
            return [texts[start : start + n] for start in range(0, len(texts), n)]

        items = list(zip(prompts[: cell.items], references[: cell.items], strict=True))
        pairs = build_preferences(items, sample, judge, CANDIDATES, random_state=cell.seed, chunk_size=cell.items)
        policy = adapted(model, cell.seed)
        align(policy, None, pairs, tokenizer, lr=3e-4, warmup=None, accumulate=2, max_steps=cell.steps)
        after = write(policy, tokenizer, prompts[cell.items :], 1, cell.seed)
    held_out = references[cell.items :]
    report = verbosity_report(before, after, held_out, judge=ClinicalJudge("recall"))
    errors = clinical_errors(after, findings[cell.items :])
    return {
        "recall": report.judge_after,
        "lc_score": report.controlled_after,
        "f1": errors.f1,
        "omissions": errors.omissions,
        "hallucinations": errors.hallucinations,
        "verbosity": report.verbosity_after,
        "growth": report.growth,
    }


def studies(count: int, seed: int, tokenizer: Any) -> tuple[list[Any], list[str], list[str]]:
    """Findings, prompts that name most of them and some that are not there, and references."""
    from workingpapers.alignment.judge_preference import CHEST, sample_findings, write_report

    rng = np.random.default_rng([seed, 8])
    findings = sample_findings(count, random_state=seed)
    prompts, references = [], []
    for number, study in enumerate(findings):
        there = {finding.name for finding in study}
        named = [c.name for c in CHEST if rng.random() < (0.85 if c.name in there else 0.15)]
        messages = [
            {"role": "system", "content": ""},  # without it the template adds a long one
            {"role": "user", "content": f"Write a chest X-ray report. Suspected: {', '.join(named) or 'nothing'}."},
        ]
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        references.append(write_report(study, random_state=10_000 * seed + number))
    return findings, prompts, references


def write(model: nn.Module, tokenizer: Any, prompts: Sequence[str], n: int, seed: int) -> list[str]:
    import torch

    from workingpapers.alignment import sample_responses

    drawn = sample_responses(
        model,
        [tokenizer(prompt).input_ids for prompt in prompts],
        n=n,
        max_new_tokens=LIMIT,
        eos_token_id=tokenizer.eos_token_id,
        batch_size=32,
        generator=torch.Generator().manual_seed(seed),
    )
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in drawn.responses()]


def fine_tuned(seed: int, items: int, held_out: int, steps: int) -> tuple[nn.Module, Any]:
    """SmolLM2 after supervised fine-tuning on the references, adapters merged, and its tokenizer."""
    from workingpapers.data import smollm2

    model, tokenizer = smollm2()
    policy: Any = adapted(model, seed)
    policy.load_state_dict(fine_tuned_adapters(seed, items, held_out, steps), strict=False)
    merged: nn.Module = policy.merge_and_unload()
    return merged, tokenizer


@artifact
def fine_tuned_adapters(seed: int, items: int, held_out: int, steps: int) -> dict[str, torch.Tensor]:
    import torch

    from workingpapers.alignment import TokenSequence, collate_sequences, token_logprobs
    from workingpapers.data import smollm2

    model, tokenizer = smollm2()
    policy = adapted(model, seed)
    _, prompts, references = studies(items + held_out, seed, tokenizer)
    end = [tokenizer.eos_token_id]
    sequences = [
        TokenSequence(tokenizer(prompt).input_ids, tokenizer(text).input_ids + end)
        for prompt, text in zip(prompts[:items], references[:items], strict=True)
    ]
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer, rng = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0), np.random.default_rng([seed, 9])
    policy.eval()
    for _ in range(2 * steps):
        batch = collate_sequences([sequences[k] for k in rng.integers(items, size=min(8, items))])
        logps = token_logprobs(policy, batch.input_ids, batch.attention_mask, batch.response_mask)
        optimizer.zero_grad()
        torch.autograd.backward(-logps.sum() / batch.response_mask.sum())
        optimizer.step()
    return {name: value for name, value in policy.state_dict().items() if "lora_" in name}
