"""Why a classifier stopped learning (softmax collapse) or generalises late (naive loss minimisation)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workingpapers.common.validation import check_choice, check_integer, check_number
from workingpapers.training.stablemax.losses import check_floating, check_labels, stable_exp

Link = Literal["softmax", "stablemax"]


def softmax_collapse_fraction(
    logits: Float[Tensor, "*batch_and_classes"],
    labels: Int[Tensor, "*batch"],
    dtype: torch.dtype | None = None,
    link: Link = "softmax",
    *,
    ignore_index: int = -100,
) -> float:
    """Share of samples from which the loss learns nothing, since sum_k exp(z_k - z_y) comes out as exactly 1.

    With two classes that happens as soon as the right logit leads by 5.55 in bfloat16, 7.63 in float16, 16.64 in
    float32 and 36.74 in float64; with C classes, by up to log(C - 1) more.

    Parameters
    ----------
    logits : finite, shape (C,), (B, C) or (B, C, d1, ...); C at least 2.
    labels : class indices, the shape of `logits` without C.
    dtype : of the loss whose collapse is asked for; None is that of the logits.
    link : "stablemax" for a model trained with that loss: sum_k s(z_k) / s(z_y) == 1, where the softmax test would
        read 1 although the model still learns. A loss that forms this sum, as the authors' does, then stops too;
        `stablemax_cross_entropy`, which does not add the 1, still learns.
    ignore_index : samples with this label are left out.

    Returns
    -------
    float : in [0, 1].

    Raises
    ------
    TypeError, ValueError : an argument is of the wrong type or shape, a label is out of range, or no sample is left.
    """
    check_choice("link", link, get_args(Link))
    check_floating("logits", logits)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    dim = min(1, logits.ndim - 1)
    if dim < 0 or logits.shape[dim] < 2:
        raise ValueError(f"logits must have a dimension of at least 2 classes, got shape {tuple(logits.shape)}")
    if not bool(logits.isfinite().all()):
        raise ValueError("logits must be finite, got NaN or infinity")
    kept = check_labels(labels, logits, dim, ignore_index)
    if not bool(kept.any()):
        raise ValueError(f"labels must not all be {ignore_index}")

    z = logits.detach().to(dtype or logits.dtype)
    own = z.gather(dim, labels.long().where(kept, 0).unsqueeze(dim))
    terms = (z - own).exp() if link == "softmax" else stable_exp(z) / stable_exp(own)
    collapsed = terms.sum(dim) == 1
    return float(collapsed[kept].double().mean())


@dataclass(frozen=True)
class NLMCosine:
    """Cosines between minus the gradient of the loss and the weights; 0 where one of the two is 0.

    Attributes
    ----------
    total : of all parameters as one vector.
    per_parameter : of each, by name.
    """

    total: float
    per_parameter: dict[str, float]


def nlm_cosine(model: nn.Module) -> NLMCosine:
    """How much of a descent step only scales up the logits, read from the gradients that `backward` left.

    Near 1 after overfitting: naive loss minimisation, which delays generalisation and, under softmax, ends in its
    collapse. In a network without biases and with ReLU the weights are exactly the direction that scales the logits;
    in others nearly, or those of the last layer. Call it between `backward` and the step: `OrthoGrad` leaves
    gradients whose cosine is 0.

    Parameters
    ----------
    model : with gradients in at least one parameter; parameters without one are left out.

    Raises
    ------
    ValueError : no parameter has a gradient, or a gradient is not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = {name: (p.detach(), p.grad) for name, p in model.named_parameters() if p.grad is not None}
    if not found:
        raise ValueError("model must have gradients: call backward first")
    return _cosines(found)


def _cosines(weights_and_gradients: dict[str, tuple[Tensor, Tensor]]) -> NLMCosine:
    per_parameter = {}
    overlap = square_w = square_g = 0.0
    for name, (weight, gradient) in weights_and_gradients.items():
        # on the scale of the largest entry, since squares of the gradients of a collapsing model underflow
        w, size_w = _unit(weight)
        g, size_g = _unit(gradient)
        cosine = -float(w @ g)
        if cosine != cosine:
            raise ValueError(f"model must have finite weights and gradients, {name} has not")
        per_parameter[name] = cosine
        overlap += cosine * size_w * size_g
        square_w += size_w**2
        square_g += size_g**2
    lengths = (square_w * square_g) ** 0.5
    return NLMCosine(overlap / lengths if lengths > 0 else 0.0, per_parameter)


def _unit(tensor: Tensor) -> tuple[Tensor, float]:
    """A tensor as a vector of length 1 (0 for 0), and its length."""
    flat = tensor.flatten().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    peak = flat.abs().amax()
    flat = flat / peak.where(peak > 0, 1.0)
    length = torch.linalg.vector_norm(flat)
    return flat / length.where(peak > 0, 1.0), float(length) * float(peak)


@dataclass(frozen=True)
class Snapshot:
    """A classifier at one moment of its training.

    Attributes
    ----------
    step : of the training.
    train_loss : in nats.
    train_accuracy, test_accuracy : in [0, 1].
    collapsed : share of the training samples whose loss has collapsed, in [0, 1].
    logit_scale : mean over the training samples of the largest absolute logit.
    weight_norm : Euclidean norm of all trained parameters.
    cosine : between minus the gradient of the training loss and the weights, see `nlm_cosine`.
    """

    step: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    collapsed: float
    logit_scale: float
    weight_norm: float
    cosine: float


class GrokkingMonitor:
    """Record what tells late generalisation from no learning at all, and say which it is.

    Parameters
    ----------
    model : maps inputs to logits of shape (B, C). Neither its mode nor its gradients are changed.
    loss : maps logits and labels to a scalar: the one it is trained with.
    train, test : inputs and labels; not empty. All of them go through the model at every record, the training part
        forwards and backwards.
    link, dtype : of the loss, for the share of collapsed samples; see `softmax_collapse_fraction`.

    Attributes
    ----------
    history : the snapshots, in the order they were taken.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        *,
        link: Link = "softmax",
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice("link", link, get_args(Link))
        for name, (inputs, labels) in (("train", train), ("test", test)):
            if not len(labels) or len(inputs) != len(labels):
                raise ValueError(f"{name} must have as many inputs as labels, got {len(inputs)} and {len(labels)}")
        self.model, self.loss, self.train, self.test = model, loss, train, test
        self.link: Link = link
        self.dtype = dtype
        self.history: list[Snapshot] = []

    def record(self, step: int) -> Snapshot:
        """Take a snapshot.

        Raises
        ------
        FloatingPointError : the training loss is not finite.
        """
        step = check_integer("step", step, at_least=0)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():
                test_accuracy = _accuracy(self.model(self.test[0]), self.test[1])
            with torch.enable_grad():
                logits = self.model(self.train[0])
                loss = self.loss(logits, self.train[1])
                gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        finally:
            for module, mode in training.items():
                module.training = mode
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"the training loss is {float(loss.detach())} at step {step}")
        pairs = zip(trained.items(), gradients, strict=True)
        snapshot = Snapshot(
            step=step,
            train_loss=float(loss.detach()),
            train_accuracy=_accuracy(logits, self.train[1]),
            test_accuracy=test_accuracy,
            collapsed=softmax_collapse_fraction(logits, self.train[1], self.dtype, self.link),
            logit_scale=float(logits.detach().abs().amax(1).double().mean()),
            weight_norm=_length(trained.values()),
            cosine=_cosines({name: (p.detach(), g) for (name, p), g in pairs if g is not None}).total,
        )
        self.history.append(snapshot)
        return snapshot

    def first_step(self, accuracy: float = 0.99, part: Literal["train", "test"] = "test") -> int | None:
        """The first recorded step with at least this accuracy; None if there is none."""
        check_choice("part", part, ("train", "test"))
        accuracy = check_number("accuracy", accuracy, above=0, at_most=1)
        return next((s.step for s in self.history if getattr(s, f"{part}_accuracy") >= accuracy), None)

    def diagnosis(self) -> str:
        """What the last snapshot says, in one sentence.

        Raises
        ------
        ValueError : nothing has been recorded.
        """
        if not self.history:
            raise ValueError("nothing has been recorded yet")
        now = self.history[-1]
        if now.test_accuracy >= 0.99:
            return f"generalises: test accuracy {now.test_accuracy:.1%}"
        if now.train_accuracy < 0.99:
            return f"still fitting: training accuracy {now.train_accuracy:.1%}"
        if self.link == "softmax" and now.collapsed >= 0.5:
            return (
                f"softmax collapse: {now.collapsed:.0%} of the training samples have a loss of exactly 0; use "
                "StableMax, OrthoGrad, weight decay or more precision in the loss"
            )
        if now.cosine >= 0.5:
            return (
                f"naive loss minimisation: the step has cosine {now.cosine:.2f} with the weights and mostly scales the "
                "logits; use OrthoGrad or weight decay"
            )
        return f"overfits: test accuracy {now.test_accuracy:.1%}, and the gradient still has something to say"


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.detach().argmax(1) == labels).double().mean())


def _length(parameters: Iterable[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(p.detach().float())) for p in parameters))
