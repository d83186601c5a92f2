"""The penalty function ψ_σ and its gradient, from first derivatives of f and g only."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workingpapers.common.validation import check_number
from workingpapers.optimization.bilevel_penalty.layout import Layout, Tree, Vector, norm

Objective = Callable[..., Tensor]

ROUNDING_SHARE = 0.1  # of the terms of ∇ψ_σ that rounding may amount to before a warning


@dataclass(frozen=True)
class Evaluation:
    """ψ_σ and its first derivatives at (x, y, z).

    Attributes
    ----------
    upper : f(x, y).
    gap : g(x, y) - g(x, z).
    value : f(x, y) + (g(x, y) - g(x, z)) / σ.
    along_x : its derivative in x, double precision.
    along_y : ∇_y h_σ(x, y), σ times its derivative in y.
    along_z : ∇_y g(x, z), -σ times its derivative in z.
    terms : size of the larger of the two terms of `along_x`, ∇_x f and the difference of gradients of g over σ.
    """

    upper: float
    gap: float
    value: float
    along_x: Vector
    along_y: Vector
    along_z: Vector
    terms: float


class Problem:
    """f and g as functions of vectors.

    Parameters
    ----------
    f, g : map (x, y), or (x, y, batch), to a scalar tensor.
    x, y : how the trees that f and g take lie in vectors.
    """

    def __init__(self, f: Objective, g: Objective, x: Layout, y: Layout) -> None:
        self.f, self.g, self.x, self.y = f, g, x, y

    def lower_gradient(self, x: Vector, w: Vector, sigma: float, batch: Any) -> Vector:
        """∇_y h_σ(x, w) with h_σ = σ f + g; σ = 0 leaves f out."""
        w = w.detach().requires_grad_()
        with torch.enable_grad():
            x_tree, w_tree = self.x.tree(x), self.y.tree(w)
            value = _scalar("g", self.g, x_tree, w_tree, batch)
            if sigma:
                value = sigma * _scalar("f", self.f, x_tree, w_tree, batch) + value
        return _gradients(value, [w])[0]

    def values(self, x: Vector, y: Vector, batches: Sequence[Any]) -> tuple[float, float]:
        """f and g at (x, y), averaged over the samples."""
        x_tree, y_tree = self.x.tree(x), self.y.tree(y)
        with torch.no_grad():
            upper = [float(_scalar("f", self.f, x_tree, y_tree, batch)) for batch in batches]
            lower = [float(_scalar("g", self.g, x_tree, y_tree, batch)) for batch in batches]
        return sum(upper) / len(batches), sum(lower) / len(batches)

    def evaluate(self, x: Vector, y: Vector, z: Vector, sigma: float, batches: Sequence[Any]) -> Evaluation:
        """ψ_σ and its derivatives, averaged over the samples, each of which serves y and z alike.

        ∇_x g(x, y) - ∇_x g(x, z) is of order σ: the two are subtracted, divided and averaged in double precision, so
        that only the rounding inside each of them remains; see `rounding`.
        """
        x = x.detach().requires_grad_()
        y, z = y.detach().requires_grad_(), z.detach().requires_grad_()
        pull = torch.zeros_like(x, dtype=torch.float64)  # of the constraint: (∇_x g(x, y) - ∇_x g(x, z)) / σ
        direct = torch.zeros_like(pull)  # ∇_x f(x, y)
        along_y, along_z = torch.zeros_like(y), torch.zeros_like(z)
        upper = gap = 0.0
        share = 1.0 / len(batches)
        for batch in batches:
            with torch.enable_grad():
                f_y = _scalar("f", self.f, self.x.tree(x), self.y.tree(y), batch)
                g_y = _scalar("g", self.g, self.x.tree(x), self.y.tree(y), batch)
                g_z = _scalar("g", self.g, self.x.tree(x), self.y.tree(z), batch)
            (fx, fy), (gx, gy), (gx_at_z, gz) = (
                _gradients(value, [x, w]) for value, w in ((f_y, y), (g_y, y), (g_z, z))
            )
            direct += share * fx
            pull += share * (gx.double() - gx_at_z.double()) / sigma
            along_y += share * (sigma * fy + gy)
            along_z += share * gz
            upper += share * float(f_y.detach())
            gap += share * (float(g_y.detach().double()) - float(g_z.detach().double()))
        terms = max(norm(direct), norm(pull))
        return Evaluation(upper, gap, upper + gap / sigma, direct + pull, along_y, along_z, terms)

    def rounding(self, x: Vector, y: Vector, sigma: float, batch: Any) -> float:
        """Size of the error in ∇ψ_σ that comes from rounding y to its dtype: (∇_x g(x, y') - ∇_x g(x, y)) / σ.

        y' differs from y in the last digit of each entry; the change of the gradient is what the digits that y lacks
        may hide, and covers the cancellation inside g's gradient where y fits the data.
        """
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, y.shape, generator=generator).to(y.device, y.dtype) * 2 - 1
        eps = torch.finfo(y.dtype).eps
        x = x.detach().requires_grad_()
        slopes = []
        for w in (y, y * (1 + eps * signs)):
            with torch.enable_grad():
                value = _scalar("g", self.g, self.x.tree(x), self.y.tree(w.detach()), batch)
            slopes.append(_gradients(value, [x])[0].double())
        return max(norm(slopes[1] - slopes[0]), eps * norm(slopes[0])) / sigma

    def warn_of_rounding(
        self, found: Evaluation, x: Vector, y: Vector, sigma: float, batch: Any, *, floor: float = 0.0, stacklevel: int
    ) -> None:
        """Warn when rounding exceeds a tenth of the terms of ∇ψ_σ, or of `floor` where they are smaller.

        Rounding leaves errors of eps / σ of what is subtracted. Where σ is so large that a tenth of sqrt(eps) hides
        them, terms that they exceed are as good as zero.
        """
        if sigma * ROUNDING_SHARE >= math.sqrt(torch.finfo(x.dtype).eps):
            return
        lost = self.rounding(x, y, sigma, batch)
        if lost > ROUNDING_SHARE * max(found.terms, floor):
            warnings.warn(
                f"the difference of gradients of g has lost its digits: rounding in {x.dtype} leaves an error of about "
                f"{lost:.1e} in a gradient of {found.terms:.1e} at sigma = {sigma:.1e}; raise sigma or use float64",
                RuntimeWarning,
                stacklevel=stacklevel,
            )


def penalty_value(f: Objective, g: Objective, x: Tree, y: Tree, z: Tree, sigma: float, *, batch: Any = None) -> Tensor:
    """f(x, y) + (g(x, y) - g(x, z)) / σ, differentiable; ψ_σ(x) when y minimises σ f + g and z minimises g.

    Parameters
    ----------
    f, g : upper and lower objective; map (x, y), or (x, y, batch) when a batch is given, to a scalar tensor.
    x, y, z : tensors or trees of tensors; y and z alike.
    sigma : penalty parameter σ > 0; the smaller, the closer ψ_σ is to the hyper-objective ψ: |ψ_σ - ψ| = O(σ).
    batch : the sample at which f and g are evaluated.

    Raises
    ------
    ValueError : f or g is not scalar, or sigma is not positive.
    """
    sigma = check_number("sigma", sigma, above=0)
    upper = _scalar("f", f, x, y, batch)
    gap = _scalar("g", g, x, y, batch) - _scalar("g", g, x, z, batch)
    return upper + gap / sigma


def penalty_gradient(f: Objective, g: Objective, x: Tree, y: Tree, z: Tree, sigma: float, *, batch: Any = None) -> Tree:
    """∇_x f(x, y) + (∇_x g(x, y) - ∇_x g(x, z)) / σ: ∇ψ_σ(x) when y minimises σ f + g and z minimises g (Danskin).

    ‖∇ψ_σ - ∇ψ‖ = O(σ) where the lower level satisfies the error bound and its constraints are not degenerate. It does
    not depend on which minimiser z of g is taken.

    Parameters
    ----------
    f, g, x, y, z, sigma, batch : as in `penalty_value`.

    Returns
    -------
    A tree like x, detached.

    Raises
    ------
    ValueError : f or g is not scalar, sigma is not positive, or z is not structured like y.

    Warns
    -----
    RuntimeWarning : rounding may amount to more than a tenth of the gradient: σ is too small for the precision of x.
    """
    sigma = check_number("sigma", sigma, above=0)
    layout_x, layout_y = Layout("x", x), Layout("y", y)
    problem = Problem(f, g, layout_x, layout_y)
    at_x, at_y = layout_x.vector(x), layout_y.vector(y)
    found = problem.evaluate(at_x, at_y, layout_y.vector(z, "z"), sigma, [batch])
    problem.warn_of_rounding(found, at_x, at_y, sigma, batch, stacklevel=3)
    return layout_x.tree(found.along_x.to(layout_x.dtype))


def _scalar(name: str, objective: Objective, x: Tree, y: Tree, batch: Any) -> Tensor:
    value = objective(x, y) if batch is None else objective(x, y, batch)
    if not isinstance(value, Tensor) or value.ndim:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return a scalar tensor, got {found}")
    return value


def _gradients(value: Tensor, at: list[Vector]) -> list[Vector]:
    """The gradients of a scalar; zero in what it does not depend on."""
    if not value.requires_grad:
        return [torch.zeros_like(vector) for vector in at]
    found = torch.autograd.grad(value, at, allow_unused=True)
    return [torch.zeros_like(w) if gradient is None else gradient for gradient, w in zip(found, at, strict=True)]
