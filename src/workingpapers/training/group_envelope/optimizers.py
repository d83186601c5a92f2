"""Gradient steps followed by proximal ones, and the half-space step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from workingpapers.common.validation import check_integer, check_number
from workingpapers.training.group_envelope.regularizers import GroupRegularizer

Parameters: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class _Proximal(Optimizer):
    """Adds the proximal step of one or several penalties to an optimiser of torch."""

    regularizers: tuple[GroupRegularizer, ...] = ()

    def _regularize(self, regularizers: Sequence[GroupRegularizer] | GroupRegularizer) -> None:
        self.regularizers = (regularizers,) if isinstance(regularizers, GroupRegularizer) else tuple(regularizers)
        for regularizer in self.regularizers:
            if not isinstance(regularizer, GroupRegularizer):
                raise TypeError(f"regularizers must be group penalties, got {type(regularizer).__name__}")
            self._rate(regularizer)

    def _rate(self, regularizer: GroupRegularizer) -> float:
        """The learning rate of the penalised parameters, which must be one."""
        rates = {id(parameter): group["lr"] for group in self.param_groups for parameter in group["params"]}
        module = regularizer.spec.module
        names = [member.parameter for family in regularizer.spec.families for member in family.members]
        missing = [name for name in names if id(module.get_parameter(name)) not in rates]
        if missing:
            raise ValueError(f"regularizers must penalise parameters of this optimiser, it lacks {missing[0]}")
        used = {float(rates[id(module.get_parameter(name))]) for name in names}
        if len(used) > 1:
            raise ValueError(f"parameters under one penalty must have one learning rate, got {sorted(used)}")
        return used.pop()

    def _refuse_sparse(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step along the gradient, then one of each penalty.

        Parameters
        ----------
        closure : evaluates the model, calls backward and returns the loss.

        Returns
        -------
        The closure's loss, None without a closure.
        """
        loss = _evaluated(closure)
        self._refuse_sparse()
        self._move()
        for regularizer in self.regularizers:
            regularizer.prox_(self._rate(regularizer))
        return loss

    @abstractmethod
    def _move(self) -> None:
        """The step along the gradient."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "regularizers": self.regularizers}


class ProxSGD(_Proximal):
    """Proximal SGD with momentum: theta <- prox of lr lam G at theta - lr gradient + momentum (theta - theta_before).

    The momentum is that of the iterates, after their proximal steps, as in iPiano. `torch.optim.SGD` sums gradients
    instead; followed by ``reg.prox_(lr)`` its stationary points are those of a penalty 1 - momentum times as strong.

    Parameters
    ----------
    params : parameters, or groups of them, as for any optimiser. All that lie under one penalty must have one
        learning rate; parameters outside all groups get plain steps.
    regularizers : `GroupEnvelope` or `GroupLasso` penalties of these parameters, one or several. Their strengths and
        supports are not part of `state_dict`; those a `SparsityRamp` sets are part of its own.
    lr : at least 0.
    momentum : 0 <= momentum < 1.
    weight_decay : added to the gradient, times the parameters, at least 0.

    Raises
    ------
    TypeError, ValueError : a number is out of range, or a penalty has parameters that are not among `params`.
    RuntimeError : by `step`, when a gradient is sparse.

    Reference: Ochs, Chen, Brox and Pock, "iPiano: Inertial Proximal Algorithm for Nonconvex Optimization", SIAM J.
    Imaging Sciences 7(2), 2014.
    """

    def __init__(
        self,
        params: Parameters,
        regularizers: Sequence[GroupRegularizer] | GroupRegularizer = (),
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": check_number("lr", lr, at_least=0.0),
            "momentum": check_number("momentum", momentum, at_least=0.0, below=1.0),
            "weight_decay": check_number("weight_decay", weight_decay, at_least=0.0),
        }
        super().__init__(params, defaults)
        self._regularize(regularizers)

    def _move(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                move = parameter.grad.add(parameter, alpha=group["weight_decay"]).mul_(-group["lr"])
                if group["momentum"] > 0.0:
                    state = self.state[parameter]
                    if "before" in state:
                        move.add_(parameter - state["before"], alpha=group["momentum"])
                    state["before"] = parameter.clone()
                parameter.add_(move)


class ProxAdam(_Proximal, Adam):
    """Adam with the proximal step in the plain metric: an extension, not in the paper.

    Adam scales its steps and the proximal step is not scaled, so that stationary points are not those of loss plus
    penalty: take it to choose groups (`SparsityRamp`, which trains the chosen ones without penalty). Parameters are
    those of `ProxSGD`, with `betas` and `eps` as in `torch.optim.Adam`.
    """

    def __init__(
        self,
        params: Parameters,
        regularizers: Sequence[GroupRegularizer] | GroupRegularizer = (),
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        _check_finite(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._regularize(regularizers)

    def _move(self) -> None:
        Adam.step(self)


class HSPG(ProxSGD):
    """Proximal SGD, then half-space steps, which remove groups faster.

    After `prox_steps` steps groups that are 0 stay 0, and the others take a step along the gradient of loss and
    penalty; a group whose step leaves its half-space, ``<x_new, x> < epsilon ||x||^2``, becomes 0. Once no more than k
    groups are left, none is removed any more: as none comes back, accuracy could only fall.

    Parameters
    ----------
    params, regularizers, lr : as for `ProxSGD`.
    prox_steps : how many proximal steps come first (the paper switches at an epoch it does not state; half of
        training is a reasonable choice), at least 0.
    epsilon : 0 <= epsilon < 1: the larger, the more groups are removed.
    momentum : of the proximal steps; half-space steps have none.

    Raises
    ------
    ValueError : a number is out of range, or a penalty has parameters that are not among `params`.
    RuntimeError : by `step`, when a gradient is sparse.
    """

    def __init__(
        self,
        params: Parameters,
        regularizers: Sequence[GroupRegularizer] | GroupRegularizer = (),
        lr: float = 0.05,
        prox_steps: int = 0,
        epsilon: float = 0.0,
        momentum: float = 0.0,
    ) -> None:
        self.prox_steps = check_integer("prox_steps", prox_steps, at_least=0)
        self.epsilon = check_number("epsilon", epsilon, at_least=0.0, below=1.0)
        super().__init__(params, regularizers, lr=lr, momentum=momentum)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "prox_steps": self.prox_steps, "epsilon": self.epsilon}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A proximal or a half-space step; see `ProxSGD.step`."""
        first = self.param_groups[0]
        taken = first.get("steps_taken", 0)  # kept among the options so that `state_dict` has it
        first["steps_taken"] = taken + 1
        if taken < self.prox_steps:
            return super().step(closure)
        loss = _evaluated(closure)
        self._refuse_sparse()
        open_ones = [regularizer for regularizer in self.regularizers if not regularizer.within_budget()]
        before = {p: p.clone() for group in self.param_groups for p in group["params"] if p.grad is not None}
        dead = [[norms == 0.0 for norms in regularizer.spec.norms()] for regularizer in self.regularizers]
        slopes = [regularizer.slopes() for regularizer in self.regularizers]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-float(group["lr"]))
        for regularizer, zero, slope in zip(self.regularizers, dead, slopes, strict=True):
            self._half_space(regularizer, zero, slope, before, regularizer in open_ones)
        return loss

    def _half_space(
        self,
        regularizer: GroupRegularizer,
        dead: list[Tensor],
        slopes: list[Tensor],
        before: dict[Tensor, Tensor],
        removing: bool,
    ) -> None:
        """x~ = x - lr (gradient + c x), then 0 for groups with <x~, x> < epsilon ||x||^2."""
        rate = self._rate(regularizer)
        module = regularizer.spec.module
        for family, zero, slope in zip(regularizer.spec.families, dead, slopes, strict=True):
            inner, squares = torch.zeros_like(slope), torch.zeros_like(slope)
            for member in family.members:
                parameter = module.get_parameter(member.parameter)
                old = before.get(parameter)
                old = parameter.clone() if old is None else old
                parameter.sub_(rate * member.spread(slope.to(parameter), parameter, 0.0) * old)
                wide = old.to(slope.dtype)
                inner += member.totals(parameter.to(slope.dtype) * wide, family.size).to(inner)
                squares += member.totals(wide.square(), family.size).to(inner)
            kept = ~zero
            if removing:
                kept &= inner >= self.epsilon * squares
            family.multiply_(module, kept)


def _evaluated(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _check_finite(**numbers: float) -> None:
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value!r}")
