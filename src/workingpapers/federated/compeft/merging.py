"""Merging several experts into one set of parameters, from their compressed or their dense residuals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float

from workingpapers.common.validation import check_choice, check_integer, check_number
from workingpapers.federated.compeft.sources import DTYPES, START, Parameters, StateDict, StateDictSource, check_shapes
from workingpapers.federated.compeft.ternary import TernaryUpdate

Method = Literal["ties", "arithmetic"]
Expert = TernaryUpdate | StateDict


def merge(
    base: StateDict | None,
    updates: Sequence[Expert],
    method: Method = "ties",
    lam: float = 1.0,
    weights: Sequence[float] | None = None,
) -> Parameters:
    """Parameters that combine several experts: theta_init + lam * (combined residual).

    "arithmetic" adds: sum_i w_i tau_i (Ilharco et al., "Editing Models with Task Arithmetic", 2023). "ties" elects at
    each entry the sign of that sum and averages the experts that have it (Yadav et al., "TIES-Merging", 2023); their
    first step, trimming, is what compression has done. Where the votes cancel exactly no sign is elected, and the
    entry stays as in `base`.

    Parameters
    ----------
    base : theta_init; not modified. What it holds besides the experts' tensors is passed on. None stands for where the
        adapter does nothing, for compressed experts of one kind that were not taken from a base.
    updates : at least one expert over the same tensors: compressed, or a dense residual tau by name.
    method : "ties" or "arithmetic".
    lam : scale lambda of the combined residual, finite.
    weights : w_i, one finite number for each expert; 1 for all by default.

    Returns
    -------
    dict : name to tensor, in the types and on the devices of `base` (of the first expert, where base is None).

    Raises
    ------
    TypeError, ValueError : an argument is not as described; the message names it.
    """
    check_choice("method", method, get_args(Method))
    check_number("lam", lam)
    experts = [_Expert(f"updates[{i}]", update) for i, update in enumerate(updates)]
    if not experts:
        raise ValueError("updates must hold at least one expert, got none")
    factors = [1.0] * len(experts) if weights is None else list(weights)
    if len(factors) != len(experts):
        raise ValueError(f"weights must be one for each of {len(experts)} experts, got {len(factors)}")
    factors = [check_number(f"weights[{i}]", factor) for i, factor in enumerate(factors)]
    first = experts[0]
    for expert in experts[1:]:
        check_shapes(expert.name, expert.shapes, first.name, first.shapes)
    if base is None:
        start = _adapter_start(updates)
    else:
        held = {key: tuple(base[key].shape) for key in first.shapes if key in base}
        check_shapes("base", held, first.name, first.shapes)

    merged = {} if base is None else dict(base)
    for of_one_tensor in zip(*(expert.residuals() for expert in experts), strict=True):
        key, like = of_one_tensor[0]
        stack = torch.stack([w * tau.to(like.device) for w, (_, tau) in zip(factors, of_one_tensor, strict=True)])
        combined = stack.sum(dim=0)
        if method == "ties":
            agree = stack * combined.sign() > 0
            combined = (stack * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
        if base is None:
            merged[key] = (start + lam * combined).to(first.dtypes[key])
        else:
            origin = base[key].detach()
            merged[key] = (origin.to(combined.dtype) + lam * combined.to(origin.device)).to(origin.dtype)
    return merged | {other: merged[key] for other, key in first.tied.items()}


@dataclass(frozen=True)
class LearnedMerge:
    """Weights found for a pool of experts.

    Attributes
    ----------
    weights : w_i, one for each expert.
    loss : what the caller's loss gave for them, without the penalty.
    history : best penalised loss after each evaluation.
    state_dict : the merged parameters.
    """

    weights: Float[np.ndarray, " experts"]
    loss: float
    history: Float[np.ndarray, " evaluations"]
    state_dict: Parameters


def learn_weights(
    base: StateDict | None,
    updates: Sequence[Expert],
    loss: Callable[[dict[str, torch.Tensor]], float],
    *,
    evaluations: int = 200,
    bound: float = 1.5,
    penalty: float = 0.05,
    random_state: int | np.random.Generator | None = None,
) -> LearnedMerge:
    """Weights of an arithmetic merge for a new task, from its loss on a few examples and without gradients.

    Minimises loss(w) + penalty * mean |w_i| over [-bound, bound]^n, from w = 0, as LoraHub does (Huang et al.,
    "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition", 2023, whose code has these defaults
    and 40 evaluations). The search is a (1+1) evolution strategy with the one-fifth success rule: one Gaussian
    step at a time, longer after a success (by e^0.8), shorter after a failure (by e^-0.2), clipped to the box.

    Parameters
    ----------
    base, updates : as in `merge`.
    loss : maps merged parameters to a number to be made small; called `evaluations` times.
    evaluations : at least 1; the first is at w = 0.
    bound : largest magnitude of a weight, above 0.
    penalty : weight of mean |w_i|, at least 0.
    random_state : seed or generator of the steps.

    Raises
    ------
    ValueError : the loss was not finite, or an argument is out of range.
    """
    check_integer("evaluations", evaluations, at_least=1)
    check_number("bound", bound, above=0)
    check_number("penalty", penalty, at_least=0)
    generator = np.random.default_rng(random_state)

    def evaluated(weights: np.ndarray) -> tuple[float, float]:
        value = float(loss(merge(base, updates, "arithmetic", weights=weights.tolist())))
        if not np.isfinite(value):
            raise ValueError(f"loss must be finite, got {value} for weights {np.round(weights, 3).tolist()}")
        return value + penalty * float(np.abs(weights).mean()), value

    best = np.zeros(len(updates))
    best_penalised, best_loss = evaluated(best)
    history, length = [best_penalised], bound / 3
    for _ in range(evaluations - 1):
        trial = np.clip(best + length * generator.standard_normal(len(best)), -bound, bound)
        penalised, value = evaluated(trial)
        if penalised <= best_penalised:
            best, best_penalised, best_loss = trial, penalised, value
            length = min(length * np.exp(0.8), bound)
        else:
            length *= np.exp(-0.2)
        history.append(best_penalised)
    return LearnedMerge(best, best_loss, np.array(history), merge(base, updates, "arithmetic", weights=best.tolist()))


class _Expert:
    """Compressed and dense experts behind one face: their tensors, in sorted order, one at a time."""

    def __init__(self, name: str, update: Expert) -> None:
        self.name = name
        self.update = update
        self.dtypes: dict[str, torch.dtype]
        self.tied: Mapping[str, str]
        if isinstance(update, TernaryUpdate):
            self.shapes, self.tied = update.shapes, update.description.tied
            self.dtypes = {spec.key: DTYPES[spec.dtype] for spec in update.description.layout}
        else:
            source = StateDictSource(name, update)
            self.shapes, self.tied = {key: spec.shape for key, spec in source.specs.items()}, source.tied
            self.dtypes = {key: DTYPES[spec.dtype] for key, spec in source.specs.items()}

    def residuals(self) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(self.update, TernaryUpdate):
            yield from self.update.steps()
        else:
            for key in self.shapes:
                tau = self.update[key].detach()
                yield key, tau.to(torch.promote_types(tau.dtype, torch.float32))


def _adapter_start(updates: Sequence[Expert]) -> float:
    kinds = {
        update.kind if isinstance(update, TernaryUpdate) and not update.relative else "relative" for update in updates
    }
    if len(kinds) != 1 or kinds == {"relative"}:
        raise ValueError("base is needed, unless every expert is a compressed adapter of one kind taken without a base")
    return START[kinds.pop()]
