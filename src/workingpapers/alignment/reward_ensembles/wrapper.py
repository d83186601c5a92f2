"""A conservative reward function made of any reward models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.alignment.logprobs import frozen
from workingpapers.alignment.reward_ensembles.aggregation import Method, aggregate, member_variance
from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number

Reward = Float[np.ndarray, " answers"] | Float[Tensor, " answers"]


class EnsembleReward:
    """Call several reward models as one.

    It takes whatever its members take and returns one reward per answer, so it stands wherever a reward function does:
    in a loop of your own (gradients flow to the inputs and to the members unless switched off), or among the
    `reward_funcs` of a trl trainer.

    Parameters
    ----------
    members : at least one. Functions or modules; each returns one score per answer as a tensor, an array or a list, or
        an output with `logits` of one column, as ``AutoModelForSequenceClassification`` does with ``num_labels=1``.
        Modules are called in evaluation mode and left as they were.
    method, lam, ddof : of `aggregate`; `lam` is 0.1 here, the paper's choice for policy optimisation.
    calibration : scores of the members on a set of reference answers, (members, references), for example what
        `member_scores` gave for them. Each member is then standardised by its own mean and deviation there. None: raw.
    batch_size : score that many answers at a time. Tensors, arrays and lists among the arguments that are as long as
        the first such argument are cut; whatever else is passed goes to every call whole.

    Attributes
    ----------
    last_variance : the members' disagreement about each answer of the last call, without gradient; None before.

    Raises
    ------
    ValueError, TypeError : no members, one that cannot be called, or an argument out of range.

    Examples
    --------
    >>> reward = EnsembleReward([lambda x: x.sum(-1), lambda x: x.max(-1)], method="wco")
    >>> reward(np.array([[1.0, 2.0], [-1.0, 0.0]])).tolist()
    [2.0, -1.0]
    >>> reward.last_variance.tolist()
    [0.25, 0.25]
    """

    def __init__(
        self,
        members: Sequence[Callable[..., Any]],
        method: Method = "uwo",
        lam: float = 0.1,
        ddof: int = 0,
        *,
        calibration: Float[np.ndarray, "members references"] | Float[Tensor, "members references"] | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.members = list(members)
        if not self.members:
            raise ValueError("members must hold at least one reward model")
        for place, member in enumerate(self.members):
            if not callable(member):
                raise TypeError(f"members must be callable, member {place} is a {type(member).__name__}")
        check_choice("method", method, get_args(Method))
        self.method = method
        self.lam = check_number("lam", lam, at_least=0)
        self.ddof = check_integer("ddof", ddof, at_least=0, at_most=1)
        self.batch_size = None if batch_size is None else check_integer("batch_size", batch_size, at_least=1)
        self._centre, self._scale = self._standardisation(calibration)
        self.last_variance: Reward | None = None
        self.__name__ = f"{method}_of_{len(self.members)}_rewards"  # by which trl logs it

    def __call__(self, *inputs: Any, **named: Any) -> Reward:
        """The aggregated reward of each answer; arguments as the members take them."""
        scores: Any = self.member_scores(*inputs, **named)
        variance = member_variance(scores, self.ddof)
        self.last_variance = variance.detach() if isinstance(variance, Tensor) else variance
        reward: Reward = aggregate(scores, self.method, self.lam, self.ddof)
        return reward

    def member_scores(
        self, *inputs: Any, **named: Any
    ) -> Float[np.ndarray, "members answers"] | Float[Tensor, "members answers"]:
        """Scores of every member, standardised if `calibration` was given; a tensor when a member returns one.

        Raises
        ------
        ValueError : members return scores of different numbers of answers, or more than one per answer.
        """
        parts = [
            self._stacked([_scores(member, place, *part, **part_named) for place, member in enumerate(self.members)])
            for part, part_named in self._batches(inputs, named)
        ]
        centre, scale = self._centre[:, None], self._scale[:, None]
        if not isinstance(parts[0], Tensor):
            return np.asarray((np.concatenate(parts, axis=1) - centre) / scale)
        scores = torch.cat(parts, dim=1)
        return (scores - scores.new_tensor(centre)) / scores.new_tensor(scale)

    def _stacked(self, scores: list[Any]) -> Any:
        lengths = [len(of_member) for of_member in scores]
        if len(set(lengths)) > 1:
            raise ValueError(f"members must score the same answers, got {lengths} scores")
        tensor = next((of_member for of_member in scores if isinstance(of_member, Tensor)), None)
        if tensor is None:
            return np.stack(scores)
        wide = torch.promote_types(tensor.dtype, torch.float32)
        return torch.stack([torch.as_tensor(of_member).to(tensor.device, wide) for of_member in scores])

    def _batches(
        self, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        divisible = [value for value in (*inputs, *named.values()) if _has_rows(value)]
        if self.batch_size is None or not divisible:
            yield inputs, named
            return
        answers = len(divisible[0])
        for start in range(0, max(1, answers), self.batch_size):
            rows = slice(start, start + self.batch_size)

            def part(value: Any, rows: slice = rows) -> Any:
                return value[rows] if _has_rows(value) and len(value) == answers else value

            yield tuple(map(part, inputs)), {name: part(value) for name, value in named.items()}

    def _standardisation(self, calibration: Any) -> tuple[Float[np.ndarray, " members"], Float[np.ndarray, " members"]]:
        if calibration is None:
            return np.zeros(len(self.members)), np.ones(len(self.members))
        scores = np.asarray(
            calibration.detach().cpu() if isinstance(calibration, Tensor) else calibration, dtype=np.float64
        )
        if scores.ndim != 2 or len(scores) != len(self.members) or not scores.size:
            raise ValueError(
                f"calibration must have shape (members, references) with {len(self.members)} members, got "
                f"{scores.shape}"
            )
        check_finite("calibration", scores)
        deviation = scores.std(1)
        if (deviation == 0).any():
            raise ValueError(f"calibration must vary, member {int(deviation.argmin())} gives one score to all answers")
        return scores.mean(1), deviation


def _scores(member: Callable[..., Any], place: int, *inputs: Any, **named: Any) -> Any:
    gradients = torch.is_grad_enabled()
    with frozen(member) if isinstance(member, nn.Module) else nullcontext(), torch.set_grad_enabled(gradients):
        out = member(*inputs, **named)
    out = getattr(out, "logits", out)
    scores = out if isinstance(out, Tensor) else np.asarray(out, dtype=np.float64)
    if scores.ndim == 2 and scores.shape[1] == 1:
        scores = scores[:, 0]
    if scores.ndim != 1:
        raise ValueError(f"member {place} must return one score per answer, got shape {tuple(scores.shape)}")
    return scores


def _has_rows(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray | Tensor) and value.ndim > 0)
