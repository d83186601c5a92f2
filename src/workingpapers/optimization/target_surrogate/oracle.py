"""Oracles: what an expensive loss tells about the outputs of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.common.validation import check_number

Targets = Float[Tensor, "n *outputs"]


class Oracle(Protocol):
    """What `SSO.step` asks of an oracle: any callable does.

    It is given the outputs z, shape (n, ...), detached from the model, and returns the mean loss over the n examples
    (None when unknown) and the gradient of each example's own loss, of the shape of z, not divided by n.

    Two attributes are read when needed: `smoothness`, the largest curvature L of one example's loss in its outputs,
    by ``lr="auto"``; and `loss`, a callable z -> mean loss, by ``rule="line_search"``.
    """

    def __call__(self, z: Targets, /) -> tuple[Any, Any]: ...


class LossOracle:
    """An oracle from an unreduced loss; made by `oracle_from_loss`.

    Attributes
    ----------
    smoothness : L, or None when it is not known.
    """

    def __init__(self, loss_fn: Callable[[Tensor, Any], Tensor], y: Any, smoothness: float | None) -> None:
        self.loss_fn = loss_fn
        self.y = y
        self.smoothness = smoothness

    def __call__(self, z: Targets) -> tuple[float, Targets]:
        """The mean loss at z, and the gradient of every example's loss."""
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            total = self._total(z)
        # Examples do not see each other's outputs, so the gradient of the sum holds the gradient of each.
        (gradient,) = torch.autograd.grad(total, z)
        return float(total.detach()) / len(z), gradient

    @torch.no_grad()
    def loss(self, z: Targets) -> float:
        """The mean loss at z."""
        return float(self._total(z)) / len(z)

    def _total(self, z: Tensor) -> Tensor:
        losses = self.loss_fn(z, self.y)
        if losses.shape[:1] != z.shape[:1] or losses.numel() > z.numel():
            raise ValueError(
                f"loss_fn must return one loss per example or per output (reduction='none'): for outputs of shape "
                f"{tuple(z.shape)} it returned {tuple(losses.shape)}"
            )
        return losses.sum()


def oracle_from_loss(
    loss_fn: Callable[[Tensor, Any], Tensor], y: Any, *, smoothness: float | None = None
) -> LossOracle:
    """An oracle for `SSO.step` from a differentiable loss and the labels of the batch.

    Parameters
    ----------
    loss_fn : maps (outputs, y) to one loss per example or per output, without reduction: a loss of PyTorch with
        ``reduction="none"``, or a function. Losses per output are summed within an example.
    y : passed on to `loss_fn`.
    smoothness : L, the largest curvature of one example's loss in its outputs; for the unweighted MSELoss (2),
        BCEWithLogitsLoss (1/4), CrossEntropyLoss (1/2), HuberLoss (1) and SmoothL1Loss (1/beta) of PyTorch it is known.

    Raises
    ------
    ValueError : `loss_fn` reduces, or smoothness is not a positive number.
    TypeError : `loss_fn` is not callable, or smoothness not a number.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {loss_fn!r}")
    reduction = getattr(loss_fn, "reduction", "none")
    if reduction != "none":
        raise ValueError(f"loss_fn must have reduction='none', got reduction={reduction!r}")
    known = _known_smoothness(loss_fn) if smoothness is None else check_number("smoothness", smoothness, above=0.0)
    return LossOracle(loss_fn, y, known)


def _known_smoothness(loss_fn: Callable[..., Tensor]) -> float | None:
    if getattr(loss_fn, "weight", None) is not None or getattr(loss_fn, "pos_weight", None) is not None:
        return None
    match loss_fn:
        case nn.MSELoss():
            return 2.0  # of (z - y)^2
        case nn.BCEWithLogitsLoss():
            return 0.25  # p (1 - p) <= 1/4
        case nn.CrossEntropyLoss():
            return 0.5  # diag(p) - p p^T has eigenvalues of at most 1/2
        case nn.HuberLoss():
            return 1.0
        case nn.SmoothL1Loss() if loss_fn.beta > 0:
            return 1.0 / loss_fn.beta
    return None
