"""The surrogate of one outer step, and the divergences it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workingpapers.optimization.target_surrogate.oracle import Targets

Divergence = Callable[[Tensor, Tensor], Tensor]


def squares(f: Targets, z: Targets) -> Targets:
    """D(f, z) = ||f - z||^2 / 2, by output."""
    return 0.5 * (f - z).square()


def kullback_leibler(f: Targets, z: Targets) -> Targets:
    """D(f, z) = sum f log(f / z) - f + z, by output; f and z are positive, as the probabilities of a softmax are."""
    return torch.xlogy(f, f / z) - f + z


def weighted_squares(weights: Callable[[Tensor], Tensor]) -> Divergence:
    """The divergence sum w(z) (f - z)^2 / 2, for `SSO(divergence=...)`.

    With the curvature of the loss in each output as weights and ``lr=1`` the surrogate is the diagonal Newton model of
    the loss in output space. The logistic loss:

        def curvature(z):
            p = torch.sigmoid(z)
            return p * (1 - p) + 1e-5

    Parameters
    ----------
    weights : maps z to positive numbers of its shape, or broadcastable to it.
    """

    def divergence(f: Tensor, z: Tensor) -> Tensor:
        return 0.5 * weights(z) * (f - z).square()

    return divergence


DIVERGENCES: dict[str, Divergence] = {"l2": squares, "kl": kullback_leibler}
NamedDivergence = Literal["l2", "kl"]


class Surrogate:
    """g_t(theta) - l(z_t), evaluated at the parameters as they stand.

    Leaving out the constant l(z_t) keeps the digits of small decreases: g_t(theta_t) is 0 exactly.

    Parameters
    ----------
    targets : the caller's.
    outputs : targets() at theta_t, with its graph, which serves the first evaluation.
    z, gradient : z_t and grad l_i(z_ti), of the same shape.
    eta, divergence : as in `SSO`.
    scale : 1/n, or 1 for a sum.
    random : sets the random number generators to where they were before targets() at theta_t; None when it draws no
        numbers.
    """

    def __init__(
        self,
        targets: Callable[[], Tensor],
        outputs: Tensor,
        z: Tensor,
        gradient: Tensor,
        eta: float,
        divergence: Divergence,
        scale: float,
        random: Callable[[], None] | None,
    ) -> None:
        self.targets = targets
        self.outputs: Tensor | None = outputs
        self.z = z
        self.gradient = gradient
        self.eta = eta
        self.divergence = divergence
        self.scale = scale
        self.random = random
        self.evaluations = 0
        self.value = 0.0

    def __call__(self) -> Float[Tensor, ""]:
        outputs, self.outputs = self.outputs, None
        if outputs is None:
            if self.random is not None:
                self.random()
            outputs = self.targets()
            if outputs.shape != self.z.shape:
                raise ValueError(
                    f"targets() must keep its shape within a step, got {tuple(outputs.shape)} after "
                    f"{tuple(self.z.shape)}"
                )
        f = outputs.to(self.z.dtype)
        move = f - self.z
        # (1/n) sum_i [ <grad l_i(z_ti), f_i - z_ti> + D(f_i, z_ti) / eta ]
        if self.divergence is squares:  # the usual case, in fewer operations
            total = (torch.add(self.gradient, move, alpha=0.5 / self.eta) * move).sum()
        else:
            total = (self.gradient * move).sum() + self.divergence(f, self.z).sum() / self.eta
        value: Tensor = self.scale * total
        self.evaluations += 1
        self.value = float(value.detach())
        return value
