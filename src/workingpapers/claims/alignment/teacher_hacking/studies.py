"""Studies of recurrent models: who hacks, what helps, and what the detector sees."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.desk.claim import (
    Axis,
    Cell,
    Row,
    always,
    artifact,
    claim,
    higher,
    line,
    lower,
    scales,
    seeds,
)

if TYPE_CHECKING:
    import torch

PAPER = "teacher-hacking"

ARMS: dict[str, dict[str, Any]] = {
    "offline": {},
    "online teacher": {"source": "online_teacher"},
    "online student": {"source": "online_student"},
    "4 answers": {"samples_per_prompt": 4},
    "prompts / 2": {"diversity": 2},
    "prompts / 5": {"diversity": 5},
    "offline, reverse KL": {"loss": "rkl"},
    "offline, JS": {"loss": "js"},
}
# A teacher of the oracle's size that saw few answers often, and a smaller student that saw them a few times.
GRID: dict[str, Axis] = {
    "width": scales(smoke=[32], laptop=[64]),
    "answers": scales(smoke=[250], laptop=[500]),
    "teacher_epochs": [60],
    "sft_rate": scales(smoke=[3e-3], laptop=[1e-3]),
    "rate": scales(smoke=[1e-2], laptop=[3e-3]),
    "epochs": scales(smoke=[140], laptop=[300], paper=[600]),
    "every": scales(smoke=[10], laptop=[20]),
    "seed": seeds(smoke=5, laptop=6, paper=10),
}
END = {"epoch": "last"}
U_CURVE = line(x="epoch", y="golden", by="method")  # over the proxy, which differs by seed, nothing could be averaged
NO_TABLES = "figures alone, no table of values"


@claim(
    paper=PAPER,
    says="Trained for long on fixed answers of the teacher, the student comes closer to the teacher and goes away from "
    "the oracle: at the end the golden metric is more than two standard errors above its minimum, the proxy below its "
    "value there. With fresh answers of the teacher the golden metric rises less than half as much, and ends lower.",
    published=f"offline: U-shaped golden metric over a falling proxy; online teacher: both fall ({NO_TABLES})",
    grid={**GRID, "method": ["offline", "online teacher"]},
    expect=[
        higher("rise_in_errors", "offline", than=2.0, where=END),
        lower("proxy_since_minimum", "offline", than=0.0, where=END),
        lower("rise_over_half_of_offline", "online teacher", than=0.0, where=END),
        higher("golden", "offline", than="online teacher", where=END),
    ],
    plot=U_CURVE,
)
def hacking(cell: Cell) -> list[Row]:
    return rows(cell)


@claim(
    paper=PAPER,
    says="With fresh answers of the student itself the golden metric rises less than half as much as offline, and ends "
    "lower.",
    published=f"online student: golden and proxy both fall ({NO_TABLES})",
    grid={**GRID, "width": scales(smoke=[], laptop=[64]), "method": ["offline", "online student"]},
    expect=[
        lower("rise_over_half_of_offline", "online student", than=0.0, where=END),
        lower("golden", "online student", than="offline", where=END),
    ],
    plot=U_CURVE,
)
def on_policy(cell: Cell) -> list[Row]:
    return rows(cell)


@claim(
    paper=PAPER,
    says="Fewer prompts with more answers each, at equal size of the data, make hacking worse: the golden metric rises "
    "more, while training loss and proxy change by less than a tenth.",
    published=f"half and a fifth of the prompts: golden worse, train loss and proxy barely change ({NO_TABLES})",
    grid={**GRID, "width": scales(smoke=[], laptop=[64]), "method": ["offline", "prompts / 2", "prompts / 5"]},
    expect=[
        *(higher("rise", few, than="offline", where=END) for few in ("prompts / 2", "prompts / 5")),
        *(lower("loss", few, than="offline", factor=1.1, where=END) for few in ("prompts / 2", "prompts / 5")),
        *(lower("proxy", few, than="offline", factor=1.1, where=END) for few in ("prompts / 2", "prompts / 5")),
    ],
    plot=U_CURVE,
)
def fewer_prompts_by_the_rise(cell: Cell) -> list[Row]:
    return rows(cell)


@claim(
    paper=PAPER,
    says="Fewer prompts with more answers each, at equal size of the data, leave the student further from the oracle.",
    published=f"half and a fifth of the prompts: golden worse ({NO_TABLES})",
    grid={**GRID, "width": scales(smoke=[], laptop=[64]), "method": ["offline", "prompts / 2", "prompts / 5"]},
    expect=[higher("golden", few, than="offline", where=END) for few in ("prompts / 2", "prompts / 5")],
    plot=U_CURVE,
)
def fewer_prompts_by_the_end(cell: Cell) -> list[Row]:
    return rows(cell)


@claim(
    paper=PAPER,
    says="Four answers to each prompt, used in turn, make the golden metric rise less and end lower than one answer.",
    published=f"more answers per prompt reduce hacking ({NO_TABLES})",
    grid={**GRID, "width": scales(smoke=[], laptop=[64]), "method": ["offline", "4 answers"]},
    expect=[
        lower("rise", "4 answers", than="offline", where=END),
        lower("golden", "4 answers", than="offline", where=END),
    ],
    plot=U_CURVE,
)
def more_answers(cell: Cell) -> list[Row]:
    return rows(cell)


@claim(
    paper=PAPER,
    says="Hacking is not a matter of the loss: with reverse KL and with Jensen-Shannon the golden metric (forward KL) "
    "rises from its minimum as well.",
    published=f"other losses show the same pattern ({NO_TABLES})",
    grid={**GRID, "width": scales(smoke=[], laptop=[64]), "method": ["offline, reverse KL", "offline, JS"]},
    expect=[higher("rise_in_errors", method, than=2.0, where=END) for method in ("offline, reverse KL", "offline, JS")],
    plot=U_CURVE,
)
def other_losses(cell: Cell) -> list[Row]:
    return rows(cell)


@claim(
    paper=PAPER,
    says="Without the oracle: the proxy of offline runs leaves the power law of its first six evaluations, that of "
    "online runs does not.",
    published="online proxies are straight lines in log-log axes, offline ones bend away (figure, no test)",
    grid={**GRID, "width": scales(smoke=[], laptop=[64]), "method": [*ARMS][:3]},
    expect=[
        higher("flagged", "offline", than=0.5, where=END),
        *(lower("flagged", online, than=0.5, where=END) for online in [*ARMS][1:3]),
        *(lower("departure", online, than=1.0, where=END) for online in [*ARMS][1:3]),
        higher("departure", "offline", than=1.0, where=END),
    ],
    plot=line(x="epoch", y="proxy", by="method", log="xy"),
)
def departure_from_the_power_law(cell: Cell) -> list[Row]:
    return rows(cell)


@claim(
    paper=PAPER,
    says="Where a curve is a power law but for independent noise of the size seen around the law of the online runs, "
    "the detector raises fewer than 5 % false alarms.",
    published="no test is given",
    grid={**GRID, "width": scales(smoke=[], laptop=[64]), "method": ["online teacher", "online student"]},
    expect=[always("false_alarm_rate", at_most=0.05)],
)
def false_alarms(cell: Cell) -> Row:
    from workingpapers.alignment import false_alarm_rate, fit_power_law

    curve = distilled(**_arguments(cell), method=cell.method)
    times, proxy = curve["epoch"][1:], curve["proxy"][1:]
    law = fit_power_law(times[:6], proxy[:6])
    return {
        "exponent": law.exponent,
        "noise": law.scatter,
        "false_alarm_rate": false_alarm_rate(times, noise=law.scatter, random_state=cell.seed),
    }


@claim(
    paper=PAPER,
    says="Where nothing happens: with a teacher that saw four times as many answers of the oracle, each a third as "
    "often, the golden metric of offline runs rises by less than 0.1.",
    published="not reported",
    grid={
        **GRID,
        "width": scales(smoke=[], laptop=[64]),
        "answers": [2_000],
        "teacher_epochs": [20],
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": ["offline"],
    },
    expect=[lower("rise", "offline", than=0.1, where=END)],
    plot=U_CURVE,
)
def a_teacher_close_to_the_oracle(cell: Cell) -> list[Row]:
    return rows(cell)


def rows(cell: Cell) -> list[Row]:
    curve = distilled(**_arguments(cell), method=cell.method)
    offline = curve if cell.method == "offline" else distilled(**_arguments(cell), method="offline")
    lowest = int(curve["golden"].argmin())
    last = {
        "rise": curve["rise"][-1],
        "rise_in_errors": curve["rise"][-1] / curve["rise_se"][-1] if curve["rise"][-1] > 0 else 0.0,
        "rise_over_half_of_offline": curve["rise"][-1] - 0.5 * offline["rise"][-1],
        "proxy_since_minimum": curve["proxy"][-1] - curve["proxy"][lowest],
        "departure": curve["departure"][-1],
        "flagged": float(curve["flagged"][-1]),
        "teacher_golden": curve["teacher_golden"][-1],
    }
    return [
        {column: float(curve[column][point]) for column in ("epoch", "golden", "proxy", "loss", "generated_tokens")}
        | {name: float(value) for name, value in last.items()}
        for point in range(len(curve["epoch"]))
    ]


def _arguments(cell: Cell) -> dict[str, Any]:
    names = ("seed", "width", "answers", "teacher_epochs", "sft_rate", "rate", "epochs", "every")
    return {name: cell.values[name] for name in names}


@artifact
def distilled(
    seed: int,
    width: int,
    answers: int,
    teacher_epochs: int,
    sft_rate: float,
    rate: float,
    epochs: int,
    every: int,
    method: str,
) -> dict[str, np.ndarray]:
    """The trace of one arm, and beside each evaluation the training loss of the epoch before."""
    import torch

    from workingpapers.alignment import DistillationArm, PowerLawDetector, controlled_study
    from workingpapers.claims.alignment.teacher_hacking.recurrent import ANSWER, different_prompts, recurrent_lm

    teacher, student = recurrent_lm(width, 3 * seed + 1), recurrent_lm(24, 3 * seed + 2)
    tuned = fine_tuned(seed, width, answers, teacher_epochs, sft_rate)
    for name, model in (("teacher", teacher), ("student", student)):
        model.load_state_dict({key.partition(".")[2]: value for key, value in tuned.items() if key.startswith(name)})
    sft_prompts, prompts, val_prompts = different_prompts([answers, 100, 300], seed)
    result = controlled_study(
        recurrent_lm(width, 3 * seed, oracle=True),
        lambda: teacher,
        lambda: student,
        sft_prompts=sft_prompts[:1],
        prompts=prompts,
        val_prompts=val_prompts,
        arms={method: DistillationArm(**ARMS[method])},
        teacher_epochs=0,
        student_epochs=0,
        epochs=epochs,
        every=every,
        lr=rate,
        batch_size=len(prompts),
        max_grad_norm=1e6,
        max_new_tokens=ANSWER,
        generator=torch.Generator().manual_seed(seed),
    )
    run = result.runs[method]
    detector = PowerLawDetector()
    for row in run.trace:
        detector.update(row.epoch, row.proxy)
    assert detector.law is not None
    above = [
        np.log(row.proxy / detector.law(row.epoch)) / (detector.k * max(detector.law.scatter, detector.floor))
        for row in run.trace[1:]
    ]
    columns = {name: np.array([asdict(row)[name] for row in run.trace]) for name in asdict(run.trace[0])}
    many = np.ones(len(run.trace))
    return {
        **{name: columns[name].astype(float) for name in ("epoch", "golden", "proxy", "generated_tokens")},
        "rise": columns["golden_rise"],
        "rise_se": columns["golden_rise_se"],
        "loss": np.array([run.history[max(row.epoch, 1) - 1]["loss"] for row in run.trace]),
        "departure": many * max(above[detector.window :]),  # 1 where the detector's threshold is
        "flagged": many * (run.proxy_onset is not None),
        "teacher_golden": many * result.teacher_golden.value,
    }


@artifact
def fine_tuned(seed: int, width: int, answers: int, teacher_epochs: int, sft_rate: float) -> dict[str, torch.Tensor]:
    """Teacher and student after stage 1, on the same answers of the oracle: batches of 64, Adam."""
    import torch

    from workingpapers.alignment import TrainingConfig
    from workingpapers.alignment.teacher_hacking.study import SupervisedTrainer
    from workingpapers.claims.alignment.teacher_hacking.recurrent import ANSWER, different_prompts, recurrent_lm

    prompts = different_prompts([answers], seed)[0]
    oracle = recurrent_lm(width, 3 * seed, oracle=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        batch = oracle.sample(prompts, max_new_tokens=ANSWER, temperature=1.0, generator=generator)
    weights: dict[str, torch.Tensor] = {}
    for name, model, epochs in (
        ("teacher", recurrent_lm(width, 3 * seed + 1), teacher_epochs),
        ("student", recurrent_lm(24, 3 * seed + 2), 5),
    ):
        args = TrainingConfig(
            learning_rate=sft_rate,
            warmup=None,
            max_grad_norm=1e6,
            epochs=epochs,
            batch_size=64,
            random_state=seed,
        )
        SupervisedTrainer(model, batch, args).train()
        weights |= {f"{name}.{key}": value for key, value in model.state_dict().items()}
    return weights
