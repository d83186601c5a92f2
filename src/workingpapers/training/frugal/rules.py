"""The rules with state: each advances the moments and returns what is added to the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

FullRule = Literal["adamw", "lion", "sgdm"]
State: TypeAlias = dict[str, Any]
Group: TypeAlias = dict[str, Any]

MOMENTS: dict[FullRule, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "sgdm": ("momentum_buffer",),
}


def _adamw(states: list[State], grads: list[Tensor], group: Group, rate: float) -> list[Tensor]:
    beta1, beta2 = group["betas"]
    m, v = ([state[name] for state in states] for name in MOMENTS["adamw"])
    torch._foreach_lerp_(m, grads, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
    corrections, roots = _bias_corrections(states, beta1, beta2)
    denominators = torch._foreach_sqrt(v)
    torch._foreach_div_(denominators, roots)
    torch._foreach_add_(denominators, group["eps"])
    updates: list[Tensor] = list(torch._foreach_div(m, denominators))
    torch._foreach_mul_(updates, [-rate / correction for correction in corrections])
    return updates


def _bias_corrections(states: list[State], beta1: float, beta2: float) -> tuple[list[Any], list[Any]]:
    """1 - beta1^t and the root of 1 - beta2^t: numbers, or tensors where coordinates differ in their history.

    Both are the sum of the weights with which gradients entered the average. So is the mass of a coordinate, which
    forgets and gains as the averages do and is re-projected as v is; coordinates that stay keep it, new ones have 0.
    """
    for state in states:
        state["step"] += 1
    if "mass" not in states[0]:
        steps = [state["step"] for state in states]
        return [1 - beta1**t for t in steps], [(1 - beta2**t) ** 0.5 for t in steps]
    for state in states:
        state["mass"][0].mul_(beta1).add_(1 - beta1)
        state["mass"][1].mul_(beta2).add_(1 - beta2)
    return [state["mass"][0] for state in states], [state["mass"][1].sqrt() for state in states]


def _lion(states: list[State], grads: list[Tensor], group: Group, rate: float) -> list[Tensor]:
    beta1, beta2 = group["betas"]
    m = [state["exp_avg"] for state in states]
    updates: list[Tensor] = list(torch._foreach_lerp(m, grads, 1 - beta1))
    torch._foreach_sign_(updates)
    torch._foreach_mul_(updates, -rate)
    torch._foreach_lerp_(m, grads, 1 - beta2)
    return updates


def _sgdm(states: list[State], grads: list[Tensor], group: Group, rate: float) -> list[Tensor]:
    buffers = [state["momentum_buffer"] for state in states]
    torch._foreach_mul_(buffers, group["betas"][0])
    torch._foreach_add_(buffers, grads)
    return list(torch._foreach_mul(buffers, -rate))


RULES: dict[FullRule, Callable[[list[State], list[Tensor], Group, float], list[Tensor]]] = {
    "adamw": _adamw,
    "lion": _lion,
    "sgdm": _sgdm,
}


def clear(state: State, like: Tensor, group: Group) -> None:
    """Zero moments for gradients like this one."""
    state["step"] = 0
    for name in MOMENTS[group["full"]]:
        if name in state and state[name].shape == like.shape:
            state[name].zero_()
        else:
            state[name] = torch.zeros_like(like)
