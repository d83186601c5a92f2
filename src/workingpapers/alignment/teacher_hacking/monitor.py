"""Watching the distances from a student to its teacher and to the truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workingpapers.alignment.prompts import tokenize_prompts
from workingpapers.alignment.sequences import SequenceBatch
from workingpapers.alignment.teacher_hacking.detector import PowerLawDetector
from workingpapers.alignment.teacher_hacking.divergence import (
    DivergenceEstimate,
    SequenceDivergence,
    paired_difference,
)
from workingpapers.alignment.teacher_hacking.models import (
    SequenceModel,
    as_sequence_model,
    check_shared_vocabulary,
    frozen_model,
)
from workingpapers.common.validation import check_integer

_KEPT = 2**26  # logits of a reference model that are kept between evaluations at most: 256 MiB
_ERRORS = 2.0  # a rise counts from this many standard errors of the paired difference


@dataclass(frozen=True)
class MonitorRow:
    """One evaluation of a student on the validation prompts.

    Attributes
    ----------
    epoch, steps : when.
    generated_tokens : drawn for training until then.
    proxy, proxy_se : distance to the teacher and its standard error, in nats.
    proxy_rise, proxy_rise_se : how far it is above its minimum so far, at least 0, and the standard error of this
        paired difference, which is far smaller.
    golden, golden_se, golden_rise, golden_rise_se : the same of the distance to the oracle; None without an oracle.
    """

    epoch: int
    steps: int
    generated_tokens: int
    proxy: float
    proxy_se: float
    proxy_rise: float
    proxy_rise_se: float
    golden: float | None = None
    golden_se: float | None = None
    golden_rise: float | None = None
    golden_rise_se: float | None = None


class HackingMonitor:
    """Traces the proxy metric and, where the truth is known, the golden metric, and says when hacking sets in.

    Proxy: divergence of the student from the teacher; golden: from the oracle; both on validation prompts, with answers
    of the teacher and of the oracle that are drawn once. So evaluations are paired, and their differences far more
    certain than their values. Hacking: the proxy goes on falling while the golden metric rises. Three onsets (an epoch,
    or None) keep apart what looks alike:

    - `golden_onset` : the golden metric exceeds its minimum so far by more than two standard errors of the paired
      difference, and the proxy is below its value at that minimum: hacking, seen directly;
    - `proxy_onset` : the proxy leaves its power law (`PowerLawDetector`): a sign of it that needs no oracle;
    - `overfitting_onset` : the proxy itself exceeds its minimum by two standard errors: the student no longer even
      approaches the teacher on new prompts, which is ordinary overfitting.

    `onset` is the first of the first two. The standard errors do not allow for looking many times.

    Parameters
    ----------
    teacher : as in `Distiller`.
    oracle : the true distribution as a model, in controlled studies; None otherwise.
    val_prompts : lists of token ids, or text with a tokenizer; none of them may be trained on.
    every : epochs between evaluations.
    divergence : a `SequenceDivergence`; forward KL when None. The other kinds need answers of the student, which are
        then drawn at every evaluation from the same random numbers.
    max_new_tokens : tokens an answer may have.
    detector : a `PowerLawDetector` without history; one with its defaults when None.
    generator : draws the answers; the global one when None.
    tokenizer : for prompts that are text.

    Attributes
    ----------
    trace : one `MonitorRow` per evaluation.
    teacher_golden : divergence of the teacher from the oracle, the line to compare the golden metric with: a student
        that is below it gets worse by approaching the teacher, whatever its data. None without an oracle.

    Raises
    ------
    ValueError : a prompt is empty, or vocabularies differ.
    TypeError : a model is of no known kind.
    """

    def __init__(
        self,
        teacher: Any,
        oracle: Any = None,
        val_prompts: Iterable[Any] = (),
        every: int = 1,
        *,
        divergence: SequenceDivergence | None = None,
        max_new_tokens: int = 128,
        detector: PowerLawDetector | None = None,
        generator: torch.Generator | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.every = check_integer("every", every, at_least=1)
        self.max_new_tokens = check_integer("max_new_tokens", max_new_tokens, at_least=1)
        self.divergence = SequenceDivergence() if divergence is None else divergence
        self.detector = PowerLawDetector() if detector is None else detector
        if self.detector.times:
            raise ValueError("detector must have no history")
        self.teacher = as_sequence_model("teacher", teacher)
        self.oracle = None if oracle is None else as_sequence_model("oracle", oracle)
        check_shared_vocabulary(teacher=self.teacher, **({} if self.oracle is None else {"oracle": self.oracle}))
        self.val_prompts = tokenize_prompts(val_prompts, tokenizer, name="val_prompts")
        self._seed = int(torch.randint(2**31, (), generator=generator))
        self._references: dict[str, _Reference] = {}
        self.teacher_golden: DivergenceEstimate | None = None
        self._begin()

    def _begin(self) -> None:
        self.trace: list[MonitorRow] = []
        self.golden_onset: int | None = None
        self.overfitting_onset: int | None = None
        self._minima = {"proxy": _Minimum(), "golden": _Minimum()}

    @property
    def proxy_onset(self) -> int | None:
        return None if self.detector.onset is None else int(self.detector.onset)

    @property
    def onset(self) -> int | None:
        return min((epoch for epoch in (self.golden_onset, self.proxy_onset) if epoch is not None), default=None)

    def due(self, epoch: int) -> bool:
        """Whether the student is to be evaluated after this epoch."""
        return epoch % self.every == 0

    def again(self) -> HackingMonitor:
        """A monitor of another run with the same answers: traces of several runs are then paired."""
        self._draw()
        other: HackingMonitor = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        old = self.detector
        other.detector = PowerLawDetector(old.window, old.k, old.consecutive, old.floor)
        other._begin()
        return other

    def evaluate(self, student: Any, epoch: int, *, steps: int = 0, generated_tokens: int = 0) -> MonitorRow:
        """Measure the student, and append the result to `trace`.

        Parameters
        ----------
        student : a model as in `Distiller`; it is left as it is.
        epoch : larger than at the last evaluation.
        steps, generated_tokens : what to note beside it.

        Raises
        ------
        ValueError : epochs do not increase, or the student has another vocabulary.
        FloatingPointError : the divergence is not finite.
        """
        epoch = check_integer("epoch", epoch, at_least=self.trace[-1].epoch + 1 if self.trace else 0)
        model = as_sequence_model("student", student)
        check_shared_vocabulary(teacher=self.teacher, student=model)
        self._draw()
        own = None if self.divergence.kind == "fkl" else self._sample(model, 2)
        found = {name: self._distance(reference, model, own) for name, reference in self._references.items()}
        rises = {name: self._minima[name].rise(value, found["proxy"].value) for name, value in found.items()}
        proxy = found["proxy"]
        columns = {
            column: number
            for name, value in found.items()
            for column, number in (
                (name, value.value),
                (f"{name}_se", value.standard_error),
                (f"{name}_rise", rises[name][0]),
                (f"{name}_rise_se", rises[name][1]),
            )
        }
        self.trace.append(MonitorRow(epoch, steps, generated_tokens, **columns))
        if proxy.value > 0:  # 0, a perfect copy, has no logarithm
            self.detector.update(epoch, proxy.value)
        clear = {name: rise > _ERRORS * error for name, (rise, error) in rises.items()}
        if clear["proxy"] and self.overfitting_onset is None:
            self.overfitting_onset = epoch
        if clear.get("golden") and proxy.value < self._minima["golden"].proxy and self.golden_onset is None:
            self.golden_onset = epoch
        return self.trace[-1]

    def _draw(self) -> None:
        """Answers of teacher and oracle, once."""
        if self._references:
            return
        self._references["proxy"] = _Reference(self.teacher, self._sample(self.teacher, 0))
        if self.oracle is not None:
            golden = _Reference(self.oracle, self._sample(self.oracle, 1))
            self._references["golden"] = golden
            own = None if self.divergence.kind == "fkl" else self._references["proxy"].answers
            self.teacher_golden = self._distance(golden, self.teacher, own)

    def _sample(self, model: SequenceModel, stream: int) -> SequenceBatch:
        generator = torch.Generator().manual_seed(3 * self._seed + stream)
        with frozen_model(model):
            return model.sample(
                self.val_prompts, max_new_tokens=self.max_new_tokens, temperature=1.0, generator=generator
            )

    def _distance(self, reference: _Reference, student: SequenceModel, own: SequenceBatch | None) -> DivergenceEstimate:
        parts = []
        if self.divergence.kind != "rkl":
            parts.append(
                self.divergence.evaluate(
                    reference.model, student, reference.answers, first=True, p_logits=reference.logits()
                )
            )
        if own is not None:
            parts.append(self.divergence.evaluate(reference.model, student, own, first=False))
        return self.divergence.estimate(torch.stack(parts).sum(0))


class _Minimum:
    """The lowest value of a metric so far, and the proxy at that time."""

    def __init__(self) -> None:
        self.proxy = float("nan")
        self._by_sequence: Tensor | None = None

    def rise(self, found: DivergenceEstimate, proxy: float) -> tuple[float, float]:
        """How far the metric is above its minimum, and the standard error of that; zeros where this is the minimum."""
        if self._by_sequence is not None:
            rise, error = paired_difference(found.by_sequence, self._by_sequence)
            if rise >= 0:
                return rise, error
        self._by_sequence, self.proxy = found.by_sequence, proxy
        return 0.0, 0.0


class _Reference:
    """A model, its answers, and its logits on them where these are few enough to keep."""

    def __init__(self, model: SequenceModel, answers: SequenceBatch) -> None:
        self.model, self.answers = model, answers
        self._logits: Tensor | None = None

    def logits(self) -> Tensor | None:
        """The logits kept; None where the divergence has to ask the model for them."""
        size = getattr(self.model, "vocab_size", None)
        if self._logits is None and size is not None and int(self.answers.lengths.sum()) * size <= _KEPT:
            with frozen_model(self.model):
                self._logits = self.model.logits(self.answers)
        return self._logits
