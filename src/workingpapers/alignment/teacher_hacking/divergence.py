"""Divergences between autoregressive models: token by token for training, sequence by sequence for evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from workingpapers.alignment.sequences import SequenceBatch
from workingpapers.alignment.teacher_hacking.models import SequenceModel, as_sequence_model, frozen_model
from workingpapers.common.validation import check_choice, check_integer, check_number

Kind = Literal["fkl", "rkl", "js"]
KINDS: tuple[Kind, ...] = ("fkl", "rkl", "js")
_BLOCK = 2**20  # logits normalised at a time: a few MiB of scratch memory, which the caches of a CPU hold


def token_divergence(
    p_logits: Float[Tensor, "tokens vocabulary"],
    q_logits: Float[Tensor, "tokens vocabulary"],
    kind: Kind = "fkl",
    *,
    beta: float = 0.5,
) -> Float[Tensor, " tokens"]:
    """Divergence of two next-token distributions at each position, in nats; gradients flow to `q_logits` alone.

    ``fkl``: KL(p || q), ``rkl``: KL(q || p), ``js``: beta KL(p || m) + (1 - beta) KL(q || m) with the mixture
    m = beta p + (1 - beta) q. The gradient is written down instead of traced, and found together with the value: of
    vocabulary-sized tensors only the two arguments and that gradient exist.

    Parameters
    ----------
    p_logits : of the teacher.
    q_logits : of the student; half precision is normalised in float32.
    kind : "fkl" covers all that the teacher may say, "rkl" settles on part of it, "js" is in between and bounded.
    beta : weight of p in the mixture, in (0, 1); the `beta` of generalized knowledge distillation.

    Raises
    ------
    ValueError : shapes differ (models with different vocabularies cannot be compared), or an option is unknown.
    FloatingPointError : a divergence is not finite.
    """
    check_choice("kind", kind, KINDS)
    check_number("beta", beta, above=0, below=1)
    _check_logits(p_logits, q_logits)
    values: Tensor = _TokenDivergence.apply(p_logits, q_logits, kind, beta)  # type: ignore[no-untyped-call]
    _check_finite(values)
    return values


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p_logits: Tensor, q_logits: Tensor, kind: Kind, beta: float) -> Tensor:
        precise = torch.promote_types(q_logits.dtype, torch.float32)
        values = torch.empty(len(q_logits), dtype=precise, device=q_logits.device)
        gradient = torch.empty_like(q_logits) if ctx.needs_input_grad[1] else None
        for rows in _row_blocks(q_logits):
            log_p, log_q = (logits[rows].to(precise).log_softmax(-1) for logits in (p_logits, q_logits))
            if kind == "fkl":
                p = log_p.exp()
                # KL(p || q) = sum_v p_v (log p_v - log q_v),  d / d logit_v = q_v - p_v
                values[rows] = (p * (log_p - log_q)).sum(-1)
                if gradient is not None:
                    gradient[rows] = log_q.exp_().sub_(p)
                continue
            q = log_q.exp()
            if kind == "rkl":
                # KL(q || p) = sum_v q_v r_v with r = log q - log p
                ratio = log_q - log_p
                of_q = values[rows] = (q * ratio).sum(-1)
            else:
                # JS = beta KL(p || m) + sum_v q_v r_v with r = (1 - beta) (log q - log m)
                log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
                ratio = (1.0 - beta) * (log_q - log_m)
                of_q = (q * ratio).sum(-1)
                values[rows] = beta * (log_p.exp() * (log_p - log_m)).sum(-1) + of_q
            if gradient is not None:
                # of both: d / d logit_v = q_v (r_v - sum_u q_u r_u); what the change of m itself adds cancels
                gradient[rows] = ratio.sub_(of_q[:, None]).mul_(q)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * upstream[:, None].to(gradient.dtype), None, None


@dataclass(frozen=True)
class DivergenceEstimate:
    """A Monte Carlo estimate of a divergence between sequence models.

    Attributes
    ----------
    value : mean over the sequences, in nats per answer (``reduction="sum"``) or nats per token.
    standard_error : of `value`; NaN for one sequence.
    by_sequence : the summands. Two estimates on the same answers are compared by the standard error of their
        differences, which is far smaller than either standard error.
    """

    value: float
    standard_error: float
    by_sequence: Float[Tensor, " sequences"]


def paired_difference(later: Float[Tensor, " sequences"], earlier: Float[Tensor, " sequences"]) -> tuple[float, float]:
    """Mean and standard error of ``later - earlier`` on the same answers; the error of one answer is NaN."""
    difference = later - earlier
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    return float(difference.mean()), error


class SequenceDivergence:
    """Distance between two autoregressive models on prompts, exact over the vocabulary at every prefix.

    ``fkl``: E_x E_{y ~ P} sum_t KL(P(. | x, y_<t) || Q(. | x, y_<t)). By the chain rule this is the KL divergence of
    the two distributions over whole answers, and having every next-token distribution removes most of the variance of
    the plain estimate log P(y | x) - log Q(y | x).
    ``rkl``: the same with P and Q exchanged, y ~ Q.
    ``js``: beta E_{y ~ P} sum_t KL(p || m) + (1 - beta) E_{y ~ Q} sum_t KL(q || m), m = beta p + (1 - beta) q at the
    same prefix. At beta = 1/2 it is symmetric and at most T log 2 for T tokens; it is not the JS divergence of whole
    answers, whose mixture is one of sequences.

    Answers must be drawn at temperature 1 without top-k or top-p, or the chain rule does not hold.

    Parameters
    ----------
    kind : "fkl", "rkl" or "js".
    reduction : "sum" over the tokens of an answer, or their "mean", which no longer is a divergence of sequences
        where lengths differ.
    beta : weight of P in the mixture of "js", in (0, 1).
    batch_size : answers scored at a time in an evaluation; all when None.

    Raises
    ------
    ValueError : an option is unknown or out of range.
    """

    def __init__(
        self,
        kind: Kind = "fkl",
        reduction: Literal["sum", "mean"] = "sum",
        *,
        beta: float = 0.5,
        batch_size: int | None = None,
    ) -> None:
        check_choice("kind", kind, KINDS)
        check_choice("reduction", reduction, ("sum", "mean"))
        self.kind: Kind = kind
        self.reduction = reduction
        self.beta = check_number("beta", beta, above=0, below=1)
        self.batch_size = None if batch_size is None else check_integer("batch_size", batch_size, at_least=1)

    def losses(
        self,
        p_logits: Float[Tensor, "tokens vocabulary"],
        q_logits: Float[Tensor, "tokens vocabulary"],
        response_mask: Bool[Tensor, "sequences length"],
    ) -> Float[Tensor, " sequences"]:
        """Distillation loss of each answer, whoever drew it: `token_divergence` summed or averaged over its tokens.

        The gradient ignores how the answers came about. For answers of the student (on-policy distillation) this is
        the usual practice: the term through sampling is left out, so even "rkl" is not the exact gradient of the
        sequence divergence.

        Parameters
        ----------
        p_logits, q_logits : at the marked tokens, row by row.
        response_mask : True on the tokens of the answers.
        """
        return self._reduced(token_divergence(p_logits, q_logits, self.kind, beta=self.beta), response_mask)

    def __call__(
        self, p: Any, q: Any, batch: SequenceBatch, q_batch: SequenceBatch | None = None
    ) -> DivergenceEstimate:
        """Estimate the divergence of `q` from `p`.

        Parameters
        ----------
        p, q : transformers causal or encoder-decoder LMs, or objects with sample and logits (`SequenceModel`).
        batch : answers drawn from `p` ("fkl", "js") or from `q` ("rkl"), one to each prompt: the standard error takes
            rows as independent.
        q_batch : "js" alone: answers to the same prompts drawn from `q`.

        Raises
        ------
        ValueError : `q_batch` is missing or superfluous, or the vocabularies differ.
        FloatingPointError : a divergence is not finite.
        """
        if (q_batch is not None) != (self.kind == "js"):
            raise ValueError(f"q_batch must be {'given' if self.kind == 'js' else 'None'} for kind {self.kind!r}")
        if q_batch is not None and len(q_batch) != len(batch):
            raise ValueError(f"q_batch must hold as many answers as batch, got {len(q_batch)} and {len(batch)}")
        p_model, q_model = as_sequence_model("p", p), as_sequence_model("q", q)
        values = self.evaluate(p_model, q_model, batch, first=self.kind != "rkl")
        if q_batch is not None:
            values = values + self.evaluate(p_model, q_model, q_batch, first=False)
        return self.estimate(values)

    def evaluate(
        self,
        p: SequenceModel,
        q: SequenceModel,
        batch: SequenceBatch,
        *,
        first: bool,
        p_logits: Float[Tensor, "tokens vocabulary"] | None = None,
    ) -> Float[Tensor, " sequences"]:
        """The share of the divergence that answers of one of the models bring, answer by answer, without gradients.

        Parameters
        ----------
        p, q : the models.
        batch : answers.
        first : whether `p` drew them.
        p_logits : of `p` at the answers' tokens, where the caller has kept them.
        """
        size = self.batch_size or len(batch)
        parts, token = [], 0
        with frozen_model(p), frozen_model(q):
            for start in range(0, len(batch), size):
                whole = size >= len(batch)
                part = batch if whole else batch.select(range(start, min(start + size, len(batch))))
                tokens = int(part.response_mask.sum())
                of_q = q.logits(part)
                of_p = p.logits(part) if p_logits is None else p_logits[token : token + tokens]
                of_p = of_p.to(of_q.device)
                _check_logits(of_p, of_q)
                parts.append(self._reduced(self._terms(of_p, of_q, first), part.response_mask))
                token += tokens
        values = torch.cat(parts)
        _check_finite(values)
        return values

    @staticmethod
    def estimate(by_sequence: Float[Tensor, " sequences"]) -> DivergenceEstimate:
        """Mean and standard error of the values of independent answers."""
        return DivergenceEstimate(*paired_difference(by_sequence, torch.zeros_like(by_sequence)), by_sequence)

    def _terms(self, p_logits: Tensor, q_logits: Tensor, first: bool) -> Float[Tensor, " tokens"]:
        parts = []
        for rows in _row_blocks(q_logits):
            log_p, log_q = (
                logits[rows].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
                for logits in (p_logits, q_logits)
            )
            own, other, weight = (log_p, log_q, 1.0) if first else (log_q, log_p, 1.0)
            if self.kind == "js":
                other = torch.logaddexp(log_p + math.log(self.beta), log_q + math.log1p(-self.beta))
                weight = self.beta if first else 1.0 - self.beta
            parts.append(weight * (own.exp() * (own - other)).sum(-1))
        return torch.cat(parts).double()

    def _reduced(self, values: Tensor, response_mask: Tensor) -> Float[Tensor, " sequences"]:
        mask = response_mask.to(values.device)
        totals = values.new_zeros(mask.shape).masked_scatter(mask, values).sum(-1)
        return totals if self.reduction == "sum" else totals / mask.sum(-1)


def _row_blocks(logits: Tensor) -> list[slice]:
    size = max(1, _BLOCK // logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def _check_logits(p_logits: Tensor, q_logits: Tensor) -> None:
    if p_logits.ndim != 2 or p_logits.shape != q_logits.shape:
        raise ValueError(
            f"logits of p and q must have one shape (tokens, vocabulary), got {tuple(p_logits.shape)} and "
            f"{tuple(q_logits.shape)}: the models must share their tokenizer"
        )


def _check_finite(values: Tensor) -> None:
    if not values.isfinite().all():
        raise FloatingPointError("a divergence is not finite: the logits of p or q hold NaN or infinity")
