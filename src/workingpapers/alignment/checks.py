"""Checks of what losses on log-probabilities are called with, and their reduction."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ABOVE_ZERO = 1e-3  # rounding may lift the log-probability of a certain answer this far above 0

Reduction = Literal["mean", "sum", "none"]


def check_logps(**logps: Float[Tensor, " batch"]) -> None:
    """Refuse log-probabilities of answers that are none.

    Raises
    ------
    ValueError : the shapes differ or are not (batch,), the batch is empty, or a value is not finite or is positive.
    """
    first, example = next(iter(logps.items()))
    for name, values in logps.items():
        if values.ndim != 1 or values.shape != example.shape or not values.numel():
            like = "" if name == first else f" like {first} {tuple(example.shape)}"
            raise ValueError(f"{name} must have shape (batch,){like}, got {tuple(values.shape)}")
    stacked = torch.stack([values.detach().to(example.device) for values in logps.values()])
    fine = ((stacked <= _ABOVE_ZERO) & stacked.isfinite()).all(dim=1).tolist()  # one transfer from the device for all
    for name, accepted in zip(logps, fine, strict=True):
        if not accepted:
            raise ValueError(f"{name} must be finite log-probabilities, at most 0, got {logps[name].detach().tolist()}")


def checked_lengths(
    name: str, lengths: Int[Tensor, " batch"] | None, like: Float[Tensor, " batch"], *, needed_by: str
) -> Int[Tensor, " batch"]:
    """The numbers of tokens of answers, at least 1 each.

    Raises
    ------
    ValueError : they are missing, have another shape than `like`, or one is below 1.
    """
    if lengths is None:
        raise ValueError(f"{name} must be given when {needed_by}")
    if lengths.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(lengths.shape)}")
    if (lengths < 1).any():
        raise ValueError(f"{name} must be at least 1, got {int(lengths.min())}")
    return lengths


def reduced(losses: Float[Tensor, " batch"], reduction: Reduction) -> Float[Tensor, "*reduced"]:
    """Mean or sum over the batch, or the losses as they are."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
