"""The controlled experiment: an oracle that is the truth, a teacher that imitates it, a student of the teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from workingpapers.alignment.logprobs import select_logprobs
from workingpapers.alignment.prompts import tokenize_prompts
from workingpapers.alignment.sequences import SequenceBatch
from workingpapers.alignment.teacher_hacking.detector import PowerLawDetector
from workingpapers.alignment.teacher_hacking.distiller import Distiller, Source, check_source
from workingpapers.alignment.teacher_hacking.divergence import DivergenceEstimate, Kind, SequenceDivergence
from workingpapers.alignment.teacher_hacking.models import (
    as_sequence_model,
    check_shared_vocabulary,
    frozen_model,
    module_of,
)
from workingpapers.alignment.teacher_hacking.monitor import HackingMonitor, MonitorRow
from workingpapers.alignment.training import Trainer, TrainingConfig
from workingpapers.common.validation import check_integer


@dataclass(frozen=True)
class DistillationArm:
    """One way to distil, compared with others in a study.

    Attributes
    ----------
    source, mix, samples_per_prompt, loss : of `Distiller`.
    diversity : 1 / d of the prompts, each d times with answers of its own: fewer prompts, data of the same size.
    """

    source: Source = "offline"
    mix: float | None = None
    samples_per_prompt: int = 1
    loss: Kind = "fkl"
    diversity: int = 1

    def __post_init__(self) -> None:
        check_source(self.source, self.mix, self.samples_per_prompt)
        SequenceDivergence(self.loss)
        check_integer("diversity", self.diversity, at_least=1)


ARMS: Mapping[str, DistillationArm] = {
    "offline": DistillationArm(),
    "online teacher": DistillationArm("online_teacher"),
    "online student": DistillationArm("online_student"),
}


@dataclass(frozen=True)
class HackingRun:
    """What one arm came to.

    Attributes
    ----------
    trace : evaluations, with proxy and golden metric.
    onset, golden_onset, proxy_onset, overfitting_onset : epochs, or None; see `HackingMonitor`.
    history : the distiller's, one dict per optimizer step.
    student : trained.
    """

    trace: list[MonitorRow]
    onset: int | None
    golden_onset: int | None
    proxy_onset: int | None
    overfitting_onset: int | None
    history: list[dict[str, float]] = field(repr=False)
    student: Any = field(repr=False)


@dataclass(frozen=True)
class HackingStudy:
    """A controlled study.

    Attributes
    ----------
    runs : by the names of the arms.
    teacher_golden : divergence of the teacher from the oracle. A student that starts below it can only get worse by
        approaching the teacher.
    teacher, student : after fine-tuning on the oracle's answers, before distillation.
    """

    runs: dict[str, HackingRun]
    teacher_golden: DivergenceEstimate
    teacher: Any = field(repr=False)
    student: Any = field(repr=False)


def controlled_study(
    oracle: Any,
    make_teacher: Callable[[], Any],
    make_student: Callable[[], Any],
    *,
    sft_prompts: Iterable[Any],
    prompts: Iterable[Any],
    val_prompts: Iterable[Any],
    arms: Mapping[str, DistillationArm] = ARMS,
    teacher_epochs: int = 1,
    student_epochs: int = 1,
    sft_lr: float = 3e-4,
    sft_batch_size: int = 32,
    epochs: int = 50,
    every: int = 1,
    lr: float = 3e-4,
    batch_size: int = 32,
    warmup_steps: int = 0,
    max_grad_norm: float = 1.0,
    max_new_tokens: int = 128,
    reduction: Literal["sum", "mean"] = "sum",
    detector: PowerLawDetector | None = None,
    generator: torch.Generator | None = None,
    tokenizer: Any = None,
) -> HackingStudy:
    """Distil a teacher into a student in several ways, with the truth at hand.

    Stage 1: the oracle answers `sft_prompts`, and teacher and student are fine-tuned on the same answers. Stage 2: for
    every arm a copy of that student learns from that teacher, watched on `val_prompts`. All arms share the validation
    answers and their random numbers.

    Where nothing happens, nothing is wrong: with a teacher close to the oracle, a student of its size, or few epochs
    there is no hacking.

    Parameters
    ----------
    oracle : the truth; models are as in `Distiller`.
    make_teacher, make_student : return the models before stage 1. Nothing that they return is used elsewhere.
    sft_prompts, prompts, val_prompts : of stage 1, stage 2 and the evaluations, all different. Token ids; or text, with
        a tokenizer.
    arms : by name.
    teacher_epochs, student_epochs : of stage 1; 0 leaves a model as it is made.
    sft_lr, sft_batch_size : of stage 1, whose loss is the negative log-likelihood summed over the tokens.
    epochs, every : of stage 2, and between evaluations.
    lr, batch_size, warmup_steps, max_grad_norm, reduction : of stage 2, the norm of stage 1 as well.
    max_new_tokens : tokens an answer may have.
    detector : of the departure from the power law, without history.
    generator : of all random numbers; the global one when None.
    tokenizer : of all models.

    Raises
    ------
    ValueError : sets of prompts overlap, a prompt is empty, or an argument is out of range.
    TypeError : a model is of no known kind.
    FloatingPointError : a loss is not finite.
    """
    if not arms:
        raise ValueError("arms must name at least one arm")
    for name, count in (("teacher_epochs", teacher_epochs), ("student_epochs", student_epochs)):
        check_integer(name, count, at_least=0)
    check_integer("epochs", epochs, at_least=1)
    check_integer("warmup_steps", warmup_steps, at_least=0)
    # the checks of what is constructed later
    TrainingConfig(learning_rate=lr, batch_size=batch_size, max_grad_norm=max_grad_norm)
    sft = TrainingConfig(learning_rate=sft_lr, warmup=None, max_grad_norm=max_grad_norm, batch_size=sft_batch_size)
    SequenceDivergence(reduction=reduction)
    named = {
        name: tokenize_prompts(given, tokenizer, name=name)
        for name, given in (("sft_prompts", sft_prompts), ("prompts", prompts), ("val_prompts", val_prompts))
    }
    _check_disjoint(named)
    size = len(named["prompts"])
    for name, arm in arms.items():
        if arm.diversity > size:
            raise ValueError(f"arms[{name!r}] must keep at least one of {size} prompts, got diversity={arm.diversity}")
    truth = as_sequence_model("oracle", oracle)
    teacher, student = make_teacher(), make_student()
    check_shared_vocabulary(
        oracle=truth, teacher=as_sequence_model("teacher", teacher), student=as_sequence_model("student", student)
    )
    monitor = HackingMonitor(
        teacher,
        oracle,
        named["val_prompts"],
        every,
        max_new_tokens=max_new_tokens,
        detector=detector,
        generator=generator,
    )
    seed = int(torch.randint(2**31, (), generator=generator))
    with frozen_model(truth):
        answers = truth.sample(
            named["sft_prompts"],
            max_new_tokens=max_new_tokens,
            temperature=1.0,
            generator=torch.Generator().manual_seed(seed),
        )
    for model, count in ((teacher, teacher_epochs), (student, student_epochs)):
        if count:
            SupervisedTrainer(model, answers, replace(sft, epochs=count, random_state=seed)).train()

    runs = {}
    for name, arm in arms.items():
        watched, copied = monitor.again(), copy.deepcopy(student)
        kept = named["prompts"][: size // arm.diversity]
        distiller = Distiller(
            teacher,
            copied,
            (kept * -(-size // len(kept)))[:size],
            arm.source,
            arm.mix,
            arm.samples_per_prompt,
            arm.loss,
            reduction,
            lr=lr,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            generator=torch.Generator().manual_seed(seed + 1),
            warmup_steps=warmup_steps,
            max_grad_norm=max_grad_norm,
        )
        distiller.fit(epochs, watched)
        runs[name] = HackingRun(
            watched.trace,
            watched.onset,
            watched.golden_onset,
            watched.proxy_onset,
            watched.overfitting_onset,
            distiller.history,
            copied,
        )
    assert watched.teacher_golden is not None
    return HackingStudy(runs, watched.teacher_golden, teacher, student)


class SupervisedTrainer(Trainer):
    """Fine-tune a model on answers: the negative log-likelihood, summed over tokens, averaged over answers.

    Parameters
    ----------
    model : as in `Distiller`; trained in place.
    answers : one prompt and answer per row.
    args : how to train.
    """

    def __init__(self, model: Any, answers: SequenceBatch, args: TrainingConfig) -> None:
        self.scored, self.answers = as_sequence_model("model", model), answers
        module = module_of(self.scored)
        if module is None:
            raise TypeError(f"model must be a torch.nn.Module to be trained, got {type(model).__name__}")
        super().__init__(module, len(answers), args)

    def _accumulate(self, rows: list[int], total: int) -> Mapping[str, Tensor]:
        batch = self.answers.select(rows)
        with self._autocast():
            logits = self.scored.logits(batch)
        labels = batch.input_ids[batch.response_mask].to(logits.device)
        loss = -select_logprobs(logits, labels).sum()
        torch.autograd.backward(loss / total)
        return {"loss": loss}


def _check_disjoint(named: Mapping[str, Sequence[Sequence[int]]]) -> None:
    found: dict[tuple[int, ...], str] = {}
    for name, prompts in named.items():
        for prompt in {tuple(prompt) for prompt in prompts}:
            if prompt in found:
                raise ValueError(
                    f"{found[prompt]} and {name} must have no prompt in common, got {list(prompt)} in both"
                )
            found[prompt] = name
