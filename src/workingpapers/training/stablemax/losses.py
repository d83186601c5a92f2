"""StableMax cross-entropy: s(x) in place of exp(x), so that a sample stops teaching only when its logits overflow."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from workingpapers.common.validation import check_choice, check_integer, check_number

Reduction = Literal["mean", "sum", "none"]
Precision = Literal["float32", "float64"]


def stable_exp(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """s(x) = 1 + x for x >= 0 and 1 / (1 - x) below: positive and increasing like exp, but of linear growth."""
    # at z = 0 autograd gives `relu` slope 0 and `clamp` slope 1: together the slope 1 that s has there
    return z.relu() + 1 / (1 - z).clamp(min=1)


def stablemax(z: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """Probabilities s(z_i) / sum_j s(z_j).

    They order the classes as softmax does but are not calibrated: their tails are heavy (a lead of 1000 over 100
    other classes at 0 gives 0.91), and adding a constant to all logits changes them.

    Parameters
    ----------
    z : logits of any floating-point type; -inf gives probability 0. NaN goes through, as in `torch.softmax`.
    dim : the dimension of the classes.

    Raises
    ------
    TypeError : `z` is not a tensor of real floating-point numbers.
    """
    return _log_probabilities(_widened(z, None), dim).exp().to(z.dtype)


def log_stablemax(z: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """Logarithms of the `stablemax` probabilities; small ones keep full relative accuracy, however close to 0.

    Computed in float32 for the 16-bit types. The derivative of log s at 0 is 1 from both sides.

    Parameters
    ----------
    z : logits of any floating-point type; -inf gives -inf. NaN goes through, as in `torch.log_softmax`.
    dim : the dimension of the classes.

    Raises
    ------
    TypeError : `z` is not a tensor of real floating-point numbers.
    """
    return _log_probabilities(_widened(z, None), dim).to(z.dtype)


def stablemax_cross_entropy(
    z: Float[Tensor, "*batch_and_classes"],
    labels: Int[Tensor, "*batch"] | Float[Tensor, "*batch_and_classes"],
    weight: Float[Tensor, " classes"] | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    precision: Precision | None = None,
) -> Float[Tensor, "*reduced"]:
    """Cross-entropy -log(s(z_y) / sum_k s(z_k)), with the arguments and shapes of `torch.nn.functional.cross_entropy`.

    It equals the ordinary cross-entropy of sign(z) log(1 + |z|), but keeps loss and gradient accurate where that one
    rounds to 0: p_y - 1 is formed as minus the sum of the other probabilities.

    Parameters
    ----------
    z : logits, shape (C,), (B, C) or (B, C, d1, ...), of any floating-point type; not NaN or inf. -inf rules a class
        out.
    labels : class indices of any integer type, the shape of `z` without C, in [0, C) or equal to `ignore_index`; or
        probabilities, the shape of `z`, at least 0.
    weight : of each class, shape (C,), at least 0.
    ignore_index : labels of this value count nowhere; has no effect on probabilities.
    reduction : "mean" (for indices weighted by the classes' weights), "sum" or "none".
    label_smoothing : share of the target that is spread evenly over all classes, in [0, 1].
    precision : the type to compute in and to return, "float64" as the authors do. None computes in the type of `z`,
        in float32 for 16 bits, and returns the type of `z`. With float16 logits the gradients need a scaled loss.

    Raises
    ------
    TypeError : an argument is of the wrong type.
    ValueError : shapes do not fit, a label is out of range, or nothing is left to average over.
    FloatingPointError : a logit is NaN or inf, or a class that is a label is ruled out.
    """
    check_choice("reduction", reduction, get_args(Reduction))
    check_number("label_smoothing", label_smoothing, at_least=0, at_most=1)
    wide = _widened(z, precision)
    if not z.ndim:
        raise ValueError("z must have a dimension of classes, got a scalar")
    dim = min(1, z.ndim - 1)
    if weight is not None:
        weight = _checked_weight(weight, wide, z.shape[dim])
    if labels.is_floating_point():
        loss = _from_probabilities(wide, labels, dim, weight, reduction, label_smoothing)
    else:
        loss = _from_indices(wide, labels, dim, weight, ignore_index, reduction, label_smoothing)
    return loss if precision is not None else loss.to(z.dtype)


class StableMaxCrossEntropyLoss(nn.Module):
    """Drop-in for `torch.nn.CrossEntropyLoss` that goes on learning where softmax cross-entropy rounds to 0.

    For training far past 100 % accuracy without weight decay. The predicted class is that of the largest logit as
    before; probabilities must come from `stablemax`, and are not calibrated, so this is no loss for distillation.

    Parameters
    ----------
    weight : of each class, shape (C,), at least 0; moves and is saved with the module.
    ignore_index : labels of this value count nowhere.
    reduction : "mean", "sum" or "none".
    label_smoothing : share of the target that is spread evenly over all classes, in [0, 1].
    precision : "float32", "float64" (as the authors) or None, the type of the logits but at least float32.

    Raises
    ------
    TypeError, ValueError : a parameter is of the wrong type or out of range.

    See Also
    --------
    stablemax_cross_entropy : the function, with shapes, and what it raises.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, " classes"] | None = None,
        *,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        precision: Precision | None = None,
    ) -> None:
        super().__init__()
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor or None, got {weight!r}")
        check_choice("reduction", reduction, get_args(Reduction))
        check_choice("precision", precision, (None, *get_args(Precision)))
        self.register_buffer("weight", weight)
        self.ignore_index = check_integer("ignore_index", ignore_index)
        self.reduction: Reduction = reduction
        self.label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0, at_most=1)
        self.precision: Precision | None = precision

    def forward(
        self,
        z: Float[Tensor, "*batch_and_classes"],
        labels: Int[Tensor, "*batch"] | Float[Tensor, "*batch_and_classes"],
    ) -> Float[Tensor, "*reduced"]:
        """The loss of logits and labels; see `stablemax_cross_entropy`."""
        return stablemax_cross_entropy(
            z,
            labels,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            precision=self.precision,
        )

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing:g}, "
            f"ignore_index={self.ignore_index}, precision={self.precision!r}"
        )


def _log_s(z: Tensor) -> Tensor:
    """log s(x) = sign(x) log(1 + |x|), with slope 1 at 0: of that formula autograd makes 0, and zeros never learn."""
    return z.relu().log1p() - (-z).clamp(min=0).log1p()


def _log_probabilities(z: Tensor, dim: int) -> Tensor:
    return cast(Tensor, _LogNormalised.apply(_log_s(z), dim))  # type: ignore[no-untyped-call]


class _LogNormalised(torch.autograd.Function):
    """log p = log s - log sum_k s_k, where neither the value nor the slope of a p near 1 is a difference of ones."""

    generate_vmap_rule = True

    @staticmethod
    def forward(log_s: Tensor, dim: int) -> Tensor:
        _, others, lead = _LogNormalised.shares(log_s, dim)
        return lead - others.sum(dim, keepdim=True).log1p()  # the winner's own share, 1, would absorb the others

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        dim, (log_s,) = ctx.dim, ctx.saved_tensors
        winner, others, _ = _LogNormalised.shares(log_s, dim)
        rest = others.sum(dim, keepdim=True)
        own = upstream[0].gather(dim, winner)
        foreign = upstream[0].scatter(dim, winner, 0.0).sum(dim, keepdim=True)
        gradient = upstream[0] - others / (1 + rest) * (own + foreign)  # u_k - p_k sum_j u_j
        # of the winner m: u_m (1 - p_m) - p_m sum_{j != m} u_j
        return gradient.scatter(dim, winner, (own * rest - foreign) / (1 + rest)), None

    @staticmethod
    def shares(log_s: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """The likeliest class m; s_k / s_m of the others, 0 for m itself; and log(s_k / s_m)."""
        largest, winner = log_s.max(dim, keepdim=True)
        lead = log_s - largest
        return winner, lead.exp().scatter(dim, winner, 0.0), lead


class _Surprise(torch.autograd.Function):
    """-log p_y of each sample as log(1 + sum_{k != y} s_k / s_y), with the same care and in few passes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, own: Tensor, dim: int) -> Tensor:
        others = stable_exp(z).scatter(dim, own, 0.0).sum(dim, keepdim=True)
        lead = _log_s(z.gather(dim, own)) - others.clamp(min=torch.finfo(z.dtype).tiny).log()
        return -functional.logsigmoid(lead)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.dim = inputs[2]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        dim, (z, own) = ctx.dim, ctx.saved_tensors
        s = stable_exp(z)
        others = s.scatter(dim, own, 0.0).sum(dim, keepdim=True)
        total = others + s.gather(dim, own)
        # for k != y: p_k / (1 + |z_k|) = min(s_k, 1)^2 / sum_j s_j
        low = s.clamp(max=1)
        gradient = low / (total / upstream[0]) * low
        # for y: (p_y - 1) / (1 + |z_y|), the difference as minus the sum of the other p_k
        of_label = -upstream[0] * (others / total) / (1 + z.gather(dim, own).abs())
        return gradient.scatter(dim, own, of_label), None, None


def _from_indices(
    z: Tensor,
    labels: Tensor,
    dim: int,
    weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    label_smoothing: float,
) -> Tensor:
    kept = check_labels(labels, z, dim, ignore_index)
    labels = labels.long().where(kept, 0)
    of_sample = kept.to(z.dtype) if weight is None else weight[labels] * kept
    own = labels.unsqueeze(dim)
    surprise = cast(Tensor, _Surprise.apply(z, own, dim)).squeeze(dim)  # type: ignore[no-untyped-call]
    if not bool((surprise.isfinite() & (z.gather(dim, own).squeeze(dim) < torch.inf)).all()):
        raise FloatingPointError("z has NaN or inf, or rules out the class of a label by -inf")
    loss = surprise * of_sample
    if label_smoothing:
        log_p = _log_probabilities(z, dim)
        even = -(log_p if weight is None else log_p * _along(weight, z, dim)).mean(dim)
        loss = (1 - label_smoothing) * loss + label_smoothing * even.where(kept, 0.0)
    if reduction != "mean":
        return loss.sum() if reduction == "sum" else loss
    total = of_sample.sum()
    if not bool(total > 0):
        raise ValueError(f"labels leave nothing to average over: all are {ignore_index} or of classes with weight 0")
    return loss.sum() / total


def _from_probabilities(
    z: Tensor, labels: Tensor, dim: int, weight: Tensor | None, reduction: Reduction, label_smoothing: float
) -> Tensor:
    if labels.shape != z.shape:
        raise ValueError(
            f"labels, as probabilities, must have the shape {tuple(z.shape)} of z, got {tuple(labels.shape)}"
        )
    if not bool(((labels >= 0) & labels.isfinite()).all()):
        raise ValueError("labels, as probabilities, must be finite and at least 0")
    target = (1 - label_smoothing) * labels.to(z.dtype) + label_smoothing / z.shape[dim]
    if weight is not None:
        target = target * _along(weight, z, dim)
    log_p = _log_probabilities(z, dim)
    # a class that is ruled out and not asked for costs nothing: 0 * -inf is no NaN here
    loss = -(target * log_p.where(target > 0, 0.0)).sum(dim)
    if not bool(loss.isfinite().all()):
        raise FloatingPointError("z has NaN or inf, or rules out a class that labels give a probability by -inf")
    if reduction == "mean" and not loss.numel():
        raise ValueError("labels leave nothing to average over: the batch is empty")
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless this is a tensor of real floating-point numbers."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {given}")


def check_labels(labels: Tensor, z: Tensor, dim: int, ignore_index: int) -> Tensor:
    """Where labels are not `ignore_index`; raises unless they are class indices that fit the logits."""
    if labels.is_complex() or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.shape != z.shape[:dim] + z.shape[dim + 1 :]:
        raise ValueError(f"labels must have the shape of z {tuple(z.shape)} without classes, got {tuple(labels.shape)}")
    kept = labels != ignore_index
    wrong = kept & ((labels < 0) | (labels >= z.shape[dim]))
    if bool(wrong.any()):
        raise ValueError(f"labels must be in [0, {z.shape[dim]}) or {ignore_index}, got {int(labels[wrong][0])}")
    return kept


def _widened(z: Tensor, precision: Precision | None) -> Tensor:
    check_floating("z", z)
    check_choice("precision", precision, (None, *get_args(Precision)))
    if precision is not None:
        return z.to(cast(torch.dtype, getattr(torch, precision)))
    return z if z.dtype == torch.float64 else z.float()


def _checked_weight(weight: Tensor, z: Tensor, classes: int) -> Tensor:
    if weight.shape != (classes,):
        raise ValueError(f"weight must have shape ({classes},), one for each class, got {tuple(weight.shape)}")
    if not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError("weight must be finite and at least 0")
    return weight.to(z.dtype)


def _along(weight: Tensor, z: Tensor, dim: int) -> Tensor:
    """The weights shaped to multiply `z`."""
    return weight.view([-1 if axis == dim else 1 for axis in range(z.ndim)])
