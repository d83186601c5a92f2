"""Distillation of a teacher into a student, from answers of the one, of the other, or of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from workingpapers.alignment.prompts import tokenize_prompts
from workingpapers.alignment.sequences import SequenceBatch
from workingpapers.alignment.teacher_hacking.divergence import Kind, SequenceDivergence
from workingpapers.alignment.teacher_hacking.models import (
    as_sequence_model,
    check_shared_vocabulary,
    frozen_model,
    module_of,
    underlying,
)
from workingpapers.alignment.teacher_hacking.monitor import HackingMonitor
from workingpapers.alignment.training import Trainer, TrainingConfig
from workingpapers.common.validation import check_choice, check_integer, check_number

if TYPE_CHECKING:
    from accelerate import Accelerator

Source = Literal["offline", "online_teacher", "online_student"]
SOURCES: tuple[Source, ...] = ("offline", "online_teacher", "online_student")


class Distiller(Trainer):
    """Train a student on the next-token distributions of a teacher, in place.

    The loss is the mean over prompts x and answers y of

        sum_t d(p_teacher(. | x, y_<t), p_student(. | x, y_<t)),

    where y comes from the source:

    - "offline": the teacher's answers, drawn once and used again in every epoch. Trained for long, the student may
      come closer to the teacher and go away from the truth;
    - "online_teacher": the teacher answers anew in every step;
    - "online_student": the student does (on-policy distillation). Without a gradient through the sampling.

    Only answer tokens reach the vocabulary-sized tensors. Dropout stays off. To lower the diversity of the prompts at
    the same size of the data, repeat some of them in `prompts`: each copy gets answers of its own.

    Parameters
    ----------
    teacher : a transformers causal or encoder-decoder LM, or any object with sample and logits (`SequenceModel`).
    student : the same, and a module; trained in place, on the device it is on. It shares the teacher's tokenizer.
    prompts : lists of token ids; or strings or conversations, with a tokenizer.
    source : of the answers.
    mix : share of the student's own fresh answers in every batch, in [0, 1], the rest being of the source: the `lmbda`
        of generalized knowledge distillation, there a share of batches. None is 0, and 1 for "online_student", for
        which it may not be given.
    samples_per_prompt : m answers of the teacher to each prompt; "offline" uses answer e mod m in epoch e.
    loss : "fkl" (forward KL), "rkl", "js", or a `SequenceDivergence` with another mixture weight.
    reduction : "sum" or "mean" over the tokens of an answer; a `SequenceDivergence` brings its own.
    optimizer : over the student's trainable parameters; AdamW without weight decay when None. Its rate is set to `lr`.
    lr : learning rate, constant after the warm-up.
    batch_size : prompts in one forward pass.
    max_new_tokens : tokens an answer may have, its end token included.
    temperature : above 0. Logits of both models are divided by it in the loss, and in the sampling of the answers.
    generator : decides the answers and the order of the prompts; the global one when None. It is read once.
    tokenizer : of both models, for prompts that are text.
    warmup_steps : steps in which the rate rises linearly from 0; the paper takes 100.
    max_grad_norm : gradients are scaled down to this Euclidean norm.
    accumulation, bf16, gradient_checkpointing : of `TrainingConfig`.
    accelerator : of accelerate, as in `Trainer`.

    Attributes
    ----------
    history : one dict per optimizer step: step, loss (nats per answer, or per token), tokens (mean length of the
        answers), student_share, gradient_norm, learning_rate.
    epoch : epochs done.
    generated_tokens : drawn for training so far, from either model, by this process: offline and online epochs differ
        in this cost.

    Raises
    ------
    ValueError : an option is unknown or out of range, a prompt is empty, or the vocabularies differ.
    TypeError : a model is of no known kind, or the student is not a module.

    Examples
    --------
    >>> monitor = HackingMonitor(teacher, val_prompts=validation)  # doctest: +SKIP
    >>> distiller = Distiller(teacher, student, prompts, source="online_teacher")  # doctest: +SKIP
    >>> distiller.fit(epochs=50, monitor=monitor)  # doctest: +SKIP
    >>> print(monitor.onset, monitor.trace[-1])  # doctest: +SKIP
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        prompts: Iterable[Any],
        source: Source = "offline",
        mix: float | None = None,
        samples_per_prompt: int = 1,
        loss: Kind | SequenceDivergence = "fkl",
        reduction: Literal["sum", "mean"] = "sum",
        optimizer: torch.optim.Optimizer | None = None,
        lr: float = 3e-4,
        batch_size: int = 32,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        *,
        tokenizer: Any = None,
        warmup_steps: int = 0,
        max_grad_norm: float = 1.0,
        accumulation: int = 1,
        bf16: bool = False,
        gradient_checkpointing: bool = False,
        accelerator: Accelerator | None = None,
    ) -> None:
        check_source(source, mix, samples_per_prompt)
        self.source, self.samples_per_prompt = source, samples_per_prompt
        self.mix = float(source == "online_student") if mix is None else float(mix)
        self.divergence = loss if isinstance(loss, SequenceDivergence) else SequenceDivergence(loss, reduction)
        self.max_new_tokens = check_integer("max_new_tokens", max_new_tokens, at_least=1)
        self.temperature = check_number("temperature", temperature, above=0)
        self.warmup_steps = check_integer("warmup_steps", warmup_steps, at_least=0)
        self.teacher, self.student = as_sequence_model("teacher", teacher), as_sequence_model("student", student)
        module = module_of(self.student)
        if module is None:
            raise TypeError(f"student must be a torch.nn.Module to be trained, got {type(student).__name__}")
        if module is module_of(self.teacher):
            raise ValueError("teacher must be another model than student")
        check_shared_vocabulary(teacher=self.teacher, student=self.student)
        self.prompts = tokenize_prompts(prompts, tokenizer)
        self._seed = int(torch.randint(2**31, (), generator=generator))
        args = TrainingConfig(
            learning_rate=lr,
            warmup=None,
            max_grad_norm=max_grad_norm,
            batch_size=batch_size,
            accumulation=accumulation,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
            random_state=self._seed,
        )
        super().__init__(module, len(self.prompts), args, optimizer=optimizer, accelerator=accelerator)
        self.total_steps = 0  # `fit` says how far to go
        self.generated_tokens = 0
        self._fixed: dict[int, SequenceBatch] = {}  # the teacher's answers of "offline", by their number

    @property
    def epoch(self) -> int:
        return len(self.history) // self._steps_per_epoch

    def fit(self, epochs: int = 1, monitor: HackingMonitor | None = None) -> Distiller:
        """Train for some epochs more.

        Parameters
        ----------
        epochs : passes over the prompts.
        monitor : evaluates the student before the first epoch, whenever it is due, and after the last epoch. It only
            watches: when to stop is for the caller to say.

        Raises
        ------
        ValueError : a validation prompt of the monitor is trained on, or the monitor belongs to another teacher.
        FloatingPointError : a divergence or a gradient is not finite.
        """
        last = self.epoch + check_integer("epochs", epochs, at_least=1)
        if monitor is not None:
            self._check_monitor(monitor)
            if not monitor.trace:
                self._show_to(monitor)
        self.total_steps = last * self._steps_per_epoch
        while self.epoch < last:
            self.train(self._steps_per_epoch)
            if monitor is not None and (monitor.due(self.epoch) or self.epoch == last):
                self._show_to(monitor)
        return self

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on later as if the run had not been interrupted; answers are drawn again."""
        return {**super().state_dict(), "seed": self._seed, "generated_tokens": self.generated_tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of a distiller with the same models, prompts and options.

        Raises
        ------
        ValueError : the state belongs to other parameters or to another seed.
        """
        if state["seed"] != self._seed:
            raise ValueError("state must come from a distiller with the same generator seed")
        super().load_state_dict(state)
        for number in range(min(self.samples_per_prompt, -(-len(self.history) // self._steps_per_epoch))):
            if self.source == "offline" and self.mix < 1:
                self._fixed_answers(number)
        self.generated_tokens = state["generated_tokens"]

    def _accumulate(self, rows: list[int], total: int) -> Mapping[str, Tensor]:
        step = len(self.history)
        generator = self._generator(1, step, rows[0])  # an item is in one forward pass of a step: no draw comes twice
        # round up or down at random, so that the expected share is exact at every batch size
        own = int(self.mix * len(rows) + float(torch.rand((), generator=generator)))
        losses, lengths = [], []
        for mine, part in ((True, rows[:own]), (False, rows[own:])):
            if part:
                batch = self._answers(part, mine, step // self._steps_per_epoch, generator)
                losses.append(self._backward(batch, total))
                lengths.append(batch.lengths)
        return {
            "loss": torch.cat(losses),
            "tokens": torch.cat(lengths).to(losses[0].device),
            "student_share": torch.tensor(float(own), device=losses[0].device),
        }

    def _answers(self, rows: list[int], of_student: bool, epoch: int, generator: torch.Generator) -> SequenceBatch:
        if self.source == "offline" and not of_student:
            return self._fixed_answers(epoch % self.samples_per_prompt).select(rows)
        return self._sample(of_student, [self.prompts[row] for row in rows], generator)

    def _fixed_answers(self, number: int) -> SequenceBatch:
        """One answer of the teacher to every prompt, drawn when it is first needed."""
        if number not in self._fixed:
            size, generator = self.args.batch_size, self._generator(0, number)
            parts = [
                self._sample(False, self.prompts[start : start + size], generator)
                for start in range(0, len(self.prompts), size)
            ]
            self._fixed[number] = joined(parts)
        return self._fixed[number]

    def _sample(self, of_student: bool, prompts: list[list[int]], generator: torch.Generator) -> SequenceBatch:
        model = self.student if of_student else self.teacher
        with frozen_model(model), self._autocast():
            batch = model.sample(
                prompts, max_new_tokens=self.max_new_tokens, temperature=self.temperature, generator=generator
            )
        self.generated_tokens += int(batch.lengths.sum())
        return batch

    def _backward(self, batch: SequenceBatch, total: int) -> Tensor:
        with self._autocast():
            with frozen_model(self.teacher):
                of_teacher = self.teacher.logits(batch)
            of_student = self.student.logits(batch)
        if self.temperature != 1.0:
            of_teacher, of_student = of_teacher / self.temperature, of_student / self.temperature
        losses = self.divergence.losses(of_teacher.to(of_student.device), of_student, batch.response_mask)
        torch.autograd.backward(losses.sum() / total)
        return losses.detach()

    def _generator(self, *place: int) -> torch.Generator:
        """Random numbers of one place of the run, whatever came before it: a resumed run draws what it would have."""
        state = np.random.SeedSequence([self._seed, *place]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))

    def _schedule(self, step: int) -> float:
        return min(1.0, (step + 1) / (self.warmup_steps + 1))

    def _show_to(self, monitor: HackingMonitor) -> None:
        monitor.evaluate(self.student, self.epoch, steps=len(self.history), generated_tokens=self.generated_tokens)

    def _check_monitor(self, monitor: HackingMonitor) -> None:
        if underlying(monitor.teacher) is not underlying(self.teacher):
            raise ValueError("monitor must watch the distance to the same teacher")
        seen = {tuple(prompt) for prompt in self.prompts}
        shared = sum(tuple(prompt) in seen for prompt in monitor.val_prompts)
        if shared:
            raise ValueError(
                f"monitor must have validation prompts that are not trained on, or its proxy is training loss; "
                f"{shared} of {len(monitor.val_prompts)} are among prompts"
            )


def check_source(source: Source, mix: float | None, samples_per_prompt: int) -> None:
    """Refuse options of `Distiller` that are out of range or contradict each other.

    Raises
    ------
    ValueError, TypeError : they do.
    """
    check_choice("source", source, SOURCES)
    if mix is not None:
        check_number("mix", mix, at_least=0, at_most=1)
        if source == "online_student":
            raise ValueError(f"mix must be None for source 'online_student', which takes no other answers, got {mix!r}")
    if check_integer("samples_per_prompt", samples_per_prompt, at_least=1) > 1 and source != "offline":
        raise ValueError(f"samples_per_prompt must be 1 for source {source!r}, whose answers are always fresh")


def joined(parts: list[SequenceBatch]) -> SequenceBatch:
    """Answers of several batches, padded on the right to one length."""
    width = max(part.input_ids.shape[1] for part in parts)

    def stack(columns: list[Tensor]) -> Tensor:
        return torch.cat([nn.functional.pad(column, (0, width - column.shape[1])) for column in columns])

    return SequenceBatch(
        stack([part.input_ids for part in parts]),
        stack([part.attention_mask for part in parts]),
        stack([part.response_mask for part in parts]),
    )
