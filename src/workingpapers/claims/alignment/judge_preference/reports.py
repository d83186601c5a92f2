"""Claims on reports whose findings are known: what the judge rewards, what it costs in length, what else changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.desk.claim import Axis, Cell, Row, artifact, bars, claim, higher, lower, scales, seeds

if TYPE_CHECKING:
    import torch

    from workingpapers.claims.alignment.judge_preference.bed import Bed, ReportWriter

PAPER = "judge-preference"

LENGTHS = "words: reference 58.4, SFT 55.8, DPO selected by GREEN 140.2 (2.51 times), by LC-GREEN 68.7 (1.23 times)"
SCORES = (
    "CheXagent: GREEN 0.249, after KTO 0.328 (+31.9 %); LC-GREEN 0.218, after 0.293; CheXbert F1 47.9, after 54.6. "
    "CheXagent-2: GREEN 0.326, after DPO 0.387 (+18.9 %); CheXbert F1 55.1, after 56.4"
)
FROM_SMOKE: dict[str, Axis] = {
    "sft_steps": scales(smoke=[200], laptop=[300]),
    "items": scales(smoke=[600], laptop=[1_000], paper=[2_000]),
    "steps": scales(smoke=[60], laptop=[100]),
    "seed": seeds(smoke=5, laptop=8, paper=16),
}
FROM_LAPTOP: dict[str, Axis] = {
    "sft_steps": [300],
    "items": scales(smoke=[], laptop=[1_000], paper=[2_000]),
    "steps": [100],
    "seed": seeds(smoke=5, laptop=5, paper=16),
}


@claim(
    paper=PAPER,
    says="A judge that only counts found findings makes reports longer. Dividing it by relative length cuts DPO's "
    "growth of verbosity by at least a third, and the length-controlled score and the held-out F1 of findings come out "
    "higher; recall rises over SFT either way.",
    published=LENGTHS,
    grid={**FROM_SMOKE, "method": ["SFT", "DPO plain", "DPO LC"]},
    expect=[
        higher("recall", "DPO plain", than="SFT"),
        higher("recall", "DPO LC", than="SFT"),
        lower("growth", "DPO LC", than="DPO plain", factor=2 / 3),
        higher("lc_score", "DPO LC", than="DPO plain"),
        higher("f1", "DPO LC", than="DPO plain"),
    ],
    plot=bars(x="method", y="verbosity"),
)
def length_controlled_judge(cell: Cell) -> Row:
    return report_row(cell)


@claim(
    paper=PAPER,
    says="DPO and KTO on pairs from the length-controlled judge raise the held-out F1 of findings over as many more "
    "steps of SFT on its own references.",
    published=SCORES,
    grid={**FROM_LAPTOP, "method": ["SFT", "SFT longer", "best of 4 plain", "best of 4 LC", "DPO LC", "KTO LC"]},
    expect=[higher("f1", f"{loss} LC", than="SFT longer") for loss in ("DPO", "KTO")],
    plot=bars(x="method", y="f1"),
)
def better_than_longer_sft(cell: Cell) -> Row:
    return report_row(cell)


@claim(
    paper=PAPER,
    says="So do IPO, LC-DPO and ORPO, on the same pairs.",
    published=SCORES,
    grid={**FROM_LAPTOP, "method": ["SFT longer", "IPO LC", "LC-DPO LC", "ORPO LC"]},
    expect=[higher("f1", f"{loss} LC", than="SFT longer") for loss in ("IPO", "LC-DPO", "ORPO")],
    plot=bars(x="method", y="f1"),
)
def other_losses(cell: Cell) -> Row:
    return report_row(cell)


@claim(
    paper=PAPER,
    says="DPO on pairs from the length-controlled judge raises the held-out F1 of findings over SFT on the references "
    "that made the pairs, with as many steps.",
    published=f"the SFT model of the paper had seen the same references; {SCORES}",
    grid={**FROM_LAPTOP, "method": ["SFT all references", "DPO LC"]},
    expect=[higher("f1", "DPO LC", than="SFT all references")],
    plot=bars(x="method", y="f1"),
)
def better_than_more_references(cell: Cell) -> Row:
    return report_row(cell)


@claim(
    paper=PAPER,
    says="LC-DPO (alpha 0.05) controls length where the plain judge rewards it: verbosity grows less than with DPO.",
    published="the official configuration sets alpha 0.05; what it does to length is not reported",
    grid={**FROM_LAPTOP, "method": ["DPO plain", "LC-DPO plain"]},
    expect=[lower("growth", "LC-DPO plain", than="DPO plain")],
    plot=bars(x="method", y="verbosity"),
)
def length_regularised_loss(cell: Cell) -> Row:
    return report_row(cell)


def report_row(cell: Cell, style: str = "words", letters: bool = False) -> Row:
    found = report_numbers(style, cell.seed, cell.sft_steps, letters, cell.method, cell.items, cell.steps)
    return {name: float(value) for name, value in found.items()}


@artifact
def report_numbers(
    style: str, seed: int, sft_steps: int, letters: bool, method: str, items: int, steps: int
) -> dict[str, np.ndarray]:
    """What a method does to the base model of a seed; several claims look at the same runs."""
    from workingpapers.claims.alignment.judge_preference.bed import Bed

    bed = Bed(style, seed, sft_steps, letters)
    model = trained(bed, method, items, steps)
    found = bed.measure(model) | (bed.tax(model) if letters else {})
    return {name: np.array(value) for name, value in found.items()}


def trained(bed: Bed, method: str, items: int, steps: int) -> ReportWriter:
    """The base model after steps of a method with 64 pairs or reports each; pairs are of studies SFT never saw."""
    import torch

    from workingpapers.alignment import TokenSequence, align
    from workingpapers.claims.alignment.judge_preference.bed import SFT_STUDIES, fine_tune, judges

    model = bed.model()
    kind, _, judge = method.rpartition(" ")
    more = range(SFT_STUDIES, SFT_STUDIES + items)
    if method == "SFT":
        return model
    if method == "SFT longer":
        fine_tune(model, bed.references(range(SFT_STUDIES)), steps, 3e-3, bed.seed)
    elif method == "SFT all references":
        fine_tune(model, bed.references(range(SFT_STUDIES + items)), steps, 3e-3, bed.seed)
    elif kind == "best of 4":
        best = [TokenSequence(pair.prompt, pair.chosen) for pair in bed.pairs(judges(bed.style)[judge], more)]
        fine_tune(model, best, steps, 3e-3, bed.seed)
    else:
        pairs = bed.pairs(judges(bed.style)[judge], more)
        rate = {"IPO": 1e-3, "gentle DPO": 2e-4}.get(kind, 2e-3)
        align(
            model,
            None if kind == "ORPO" else bed.model(),
            pairs,
            loss=kind.removeprefix("gentle ").lower(),  # type: ignore[arg-type]
            lr=rate,
            warmup=None,
            batch_size=64,
            accumulate=1,
            max_steps=steps,
            random_state=bed.seed,
            optimizer=torch.optim.Adam(model.parameters(), lr=rate),
        )
    return model


# ------------------------------------------------------------------------------- labels by chance, whole sentences, tax


@claim(
    paper=PAPER,
    says="Where labels are drawn from Bradley-Terry probabilities of reward plus alpha times length, LC-DPO comes "
    "closer than DPO to the length of the policy that is optimal without the length term.",
    published="the derivation of the length-regularised loss (Park et al. 2024); no table",
    grid={
        "pairs": scales(smoke=[2_000], laptop=[2_000, 20_000]),
        "seed": seeds(smoke=5, laptop=16),
        "method": ["DPO", "LC-DPO"],
    },
    expect=[lower("length_error", "LC-DPO", than="DPO", each="pairs")],
    plot=bars(x="method", y="length_error", by="method"),
)
def length_labelled_by_chance(cell: Cell) -> Row:
    """Twelve responses of 1 to 20 tokens, beta 0.5, alpha 0.1: the loss is minimised exactly over all policies."""
    import torch

    from workingpapers.alignment.judge_preference import DPO, LengthRegularizedDPO

    beta, alpha, responses = 0.5, 0.1, 12
    generator = torch.Generator().manual_seed(cell.seed)
    lengths = torch.randint(1, 21, (responses,), generator=generator)
    reward = 0.5 * torch.randn(responses, generator=generator, dtype=torch.float64)
    log_ref = torch.randn(responses, generator=generator, dtype=torch.float64).log_softmax(0)
    drawn = torch.multinomial(log_ref.exp(), 2 * cell.pairs, replacement=True, generator=generator).view(2, -1)
    first, second = drawn[:, drawn[0] != drawn[1]]
    judged = reward + alpha * lengths
    won = torch.rand(len(first), generator=generator) < torch.sigmoid(judged[first] - judged[second])
    chosen, rejected = torch.where(won, first, second), torch.where(won, second, first)
    loss = DPO(beta) if cell.method == "DPO" else LengthRegularizedDPO(beta, alpha)

    logits = log_ref.clone().requires_grad_()
    solver: Any = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        log_policy = logits.log_softmax(0)
        out = loss(
            *(log_policy[chosen], log_policy[rejected], log_ref[chosen], log_ref[rejected]),
            chosen_lengths=lengths[chosen],
            rejected_lengths=lengths[rejected],
        )
        torch.autograd.backward(out.loss)
        value: torch.Tensor = out.loss
        return value

    solver.step(closure)
    target, found = (log_ref + reward / beta).softmax(0), logits.detach().softmax(0)
    return {
        "length_error": abs(float((found - target) @ lengths.double())),
        "length": float(found @ lengths.double()),
        "total_variation": float((found - target).abs().sum() / 2),
    }


SENTENCES: dict[str, Axis] = {
    "sft_steps": scales(smoke=[], laptop=[200], paper=[400]),
    "items": scales(smoke=[], laptop=[500], paper=[2_000]),
    "steps": scales(smoke=[], laptop=[40], paper=[100]),
    "seed": seeds(smoke=5, laptop=5, paper=16),
}


@claim(
    paper=PAPER,
    says="Reports in sentences, with denials and many wordings, judged by the embedded rules (GREEN's score): DPO on "
    "these pairs raises the F1 of findings over longer SFT and leaves fewer omissions and fewer hallucinations.",
    published=SCORES,
    grid={**SENTENCES, "method": ["SFT longer", "DPO green"]},
    expect=[
        higher("f1", "DPO green", than="SFT longer"),
        lower("omissions", "DPO green", than="SFT longer"),
        lower("hallucinations", "DPO green", than="SFT longer"),
    ],
    plot=bars(x="method", y="hallucinations"),
)
def reports_in_sentences(cell: Cell) -> Row:
    return report_row(cell, "sentences")


@claim(
    paper=PAPER,
    says="The same reports, with the judge length-controlled: verbosity grows by less than two thirds of what it does "
    "without, there are fewer hallucinations, and F1 is still above longer SFT.",
    published=LENGTHS,
    grid={**SENTENCES, "method": ["SFT longer", "DPO green", "DPO LC-green"]},
    expect=[
        lower("growth", "DPO LC-green", than="DPO green", factor=2 / 3),
        lower("hallucinations", "DPO LC-green", than="DPO green"),
        higher("f1", "DPO LC-green", than="SFT longer"),
    ],
    plot=bars(x="method", y="verbosity"),
)
def length_controlled_sentences(cell: Cell) -> Row:
    return report_row(cell, "sentences")


UNRELATED: dict[str, Axis] = {
    "sft_steps": scales(smoke=[], laptop=[400], paper=[600]),
    "items": scales(smoke=[], laptop=[1_000], paper=[2_000]),
    "steps": [100],
    "seed": seeds(smoke=5, laptop=5, paper=16),
}
NO_TAX = "no significant change on average over six unrelated tasks of image perception and reasoning"


@claim(
    paper=PAPER,
    says="No alignment tax: a model that also learned to write strings backwards, which no pair shows, does so as "
    "often after DPO or KTO on length-controlled pairs of reports, up to 0.05.",
    published=NO_TAX,
    grid={**UNRELATED, "method": ["SFT", "DPO LC", "KTO LC"]},
    expect=[higher("backwards", f"{loss} LC", than="SFT", margin=-0.05) for loss in ("DPO", "KTO")],
    plot=bars(x="method", y="backwards"),
)
def no_alignment_tax(cell: Cell) -> Row:
    return report_row(cell, letters=True)


@claim(
    paper=PAPER,
    says="With a tenth of the learning rate strings are written backwards as often as before, up to 0.05, and the F1 "
    "of findings still rises over SFT.",
    published=NO_TAX,
    grid={**UNRELATED, "method": ["SFT", "gentle DPO LC"]},
    expect=[
        higher("backwards", "gentle DPO LC", than="SFT", margin=-0.05),
        higher("f1", "gentle DPO LC", than="SFT"),
    ],
    plot=bars(x="method", y="backwards"),
)
def small_steps_without_tax(cell: Cell) -> Row:
    return report_row(cell, letters=True)
