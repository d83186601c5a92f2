"""Aggregations of the scores of several reward models."""

from __future__ import annotations

import warnings
from typing import Any, Literal, TypeVar, cast, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number

Method = Literal["mean", "wco", "uwo"]
Scores = TypeVar("Scores", np.ndarray, Tensor)

_ENOUGH = 32  # scores per member before a difference of their means says something about the members


def aggregate(
    scores: Float[Scores, "*shape"], method: Method = "uwo", lam: float = 0.5, ddof: int = 0, axis: int = 0
) -> Float[Scores, "*rest"]:
    """One reward from those of k models: their mean, their minimum, or their mean less a price for disagreement.

    Scores are used raw. Preferences fix a reward only up to a constant, so members may be shifted against each other,
    and then the minimum is one member's word and the variance measures the shift: `EnsembleReward` can standardise
    the members, and `bradley_terry_loss` can centre them in training.

    Parameters
    ----------
    scores : of k >= 1 members along `axis`, any shape otherwise; an array, or a tensor, through which gradients flow.
    method : "mean", "wco" (worst case: the minimum) or "uwo" (uncertainty-weighted: ``mean - lam * variance``).
    lam : price of variance in "uwo", at least 0, per unit of score; 0 is the mean. The paper takes 0.5 for best-of-n
        and 0.1 for policy optimisation. The other methods do not use it.
    ddof : 0 for the population variance of the paper, 1 for the unbiased one. A single member has variance 0.
    axis : of the members.

    Returns
    -------
    The shape of `scores` without `axis`. Half precision comes back in float32, integers in float64.

    Raises
    ------
    ValueError : scores are not finite or have no member, or an argument is out of range.

    Warns
    -----
    UserWarning : in "wco" and "uwo", the members are shifted against each other by more than their spread.
    """
    check_choice("method", method, get_args(Method))
    lam = check_number("lam", lam, at_least=0)
    check_integer("ddof", ddof, at_least=0, at_most=1)
    members = _members_first(scores, axis)
    reward: Any
    if method == "mean":
        reward = members.mean(0)
    else:
        _warn_when_shifted(members)
        if method == "wco":
            reward = members.amin(0) if isinstance(members, Tensor) else members.min(0)
        else:
            reward = members.mean(0) - lam * member_variance(members, ddof)
    return cast(Scores, reward)


def member_variance(scores: Float[Scores, "*shape"], ddof: int = 0, axis: int = 0) -> Float[Scores, "*rest"]:
    """How far the members disagree: the variance of their scores along `axis`; parameters as in `aggregate`."""
    check_integer("ddof", ddof, at_least=0, at_most=1)
    members = _members_first(scores, axis)
    deviations = members - members.mean(0)
    return cast(Scores, (deviations * deviations).sum(0) / max(1, len(members) - ddof))


def pairwise_accuracy(
    scores_chosen: Float[np.ndarray, "*members pairs"] | Float[Tensor, "*members pairs"],
    scores_rejected: Float[np.ndarray, "*members pairs"] | Float[Tensor, "*members pairs"],
) -> Float[np.ndarray, "*members"] | float:
    """Share of pairs in which the chosen answer scores higher; a tie counts half.

    Parameters
    ----------
    scores_chosen, scores_rejected : of the two answers of each pair, pairs along the last axis.

    Returns
    -------
    A number for one row of scores, else one share for each row.

    Raises
    ------
    ValueError : the shapes differ, there is no pair, or scores are not finite.
    """
    chosen, rejected = (
        np.asarray(scores.detach().cpu() if isinstance(scores, Tensor) else scores, dtype=np.float64)
        for scores in (scores_chosen, scores_rejected)
    )
    if chosen.shape != rejected.shape or chosen.ndim == 0 or not chosen.size:
        raise ValueError(
            f"scores_chosen and scores_rejected must have one shape with at least one pair, got {chosen.shape} and "
            f"{rejected.shape}"
        )
    check_finite("scores_chosen", chosen)
    check_finite("scores_rejected", rejected)
    shares = ((chosen > rejected) + 0.5 * (chosen == rejected)).mean(-1)
    return float(shares) if shares.ndim == 0 else np.asarray(shares)


def _members_first(scores: Any, axis: int) -> Any:
    """Finite scores in at least single precision with the members along the first axis."""
    if isinstance(scores, Tensor):
        if not scores.is_floating_point():
            scores = scores.double()
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    else:
        scores = np.asarray(scores)
        exact = np.issubdtype(scores.dtype, np.floating)
        scores = scores.astype(np.promote_types(scores.dtype, np.float32) if exact else np.float64, copy=False)
    if scores.ndim == 0:
        raise ValueError("scores must have an axis of members, got a single number")
    axis = check_integer("axis", axis, at_least=-scores.ndim, at_most=scores.ndim - 1)
    scores = scores.movedim(axis, 0) if isinstance(scores, Tensor) else np.moveaxis(scores, axis, 0)
    if len(scores) == 0:
        raise ValueError(f"scores must have at least one member along axis {axis}, got shape {tuple(scores.shape)}")
    check_finite("scores", scores)
    return scores


def _warn_when_shifted(scores: Any) -> None:
    rows = (scores.detach() if isinstance(scores, Tensor) else scores).reshape(len(scores), -1)
    if len(rows) == 1 or rows.shape[1] < _ENOUGH:
        return
    means = rows.mean(1)
    shift = float(means.max() - means.min())
    deviations = rows - means[:, None]
    spread = float((deviations * deviations).mean() ** 0.5)
    if shift > spread:
        warnings.warn(
            f"the members' mean scores differ by {shift:.3g}, more than the scores of one member spread "
            f"({spread:.3g}): the worst case and the variance reflect the shift; calibrate or centre the members",
            UserWarning,
            stacklevel=3,
        )
