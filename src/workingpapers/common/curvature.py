"""Products of the Hessian and of the generalised Gauss-Newton matrix with vectors, on tensors or trees of tensors.

Neither matrix is formed. References: Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994; Schraudolph,
"Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", 2002.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any  # a tensor, or tuples, lists and dicts of them


class HessianProduct:
    """v -> H v with H the Hessian of f at x: the gradient's graph is built once, then one backward pass a product.

    Parameters
    ----------
    f : maps x to a scalar tensor, twice differentiable.
    x : a floating-point tensor, or a tree of them. It is not changed.

    Attributes
    ----------
    value : f(x), detached.
    gradient : of f at x, detached, in the structure of x.

    Raises
    ------
    ValueError : f does not return a scalar tensor.
    """

    def __init__(self, f: Callable[[Tree], Tensor], x: Tree) -> None:
        leaves, self._structure = pytree.tree_flatten(x)
        self._leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            value = f(pytree.tree_unflatten(self._leaves, self._structure))
            if not isinstance(value, Tensor) or value.ndim:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"f must return a scalar tensor, got {shape}")
            self._gradient = _gradients(value, self._leaves, create_graph=True)
        self.value = value.detach()
        self.gradient = self._tree([part.detach() for part in self._gradient])

    def __call__(self, v: Tree) -> Tree:
        """H v, for v in the structure and the shapes of x."""
        direction = _like(v, self._leaves, self._structure)
        # d/dx <gradient, v>; parts of the gradient that do not depend on x have no graph and no second derivative
        pairs = [(part, d) for part, d in zip(self._gradient, direction, strict=True) if part.requires_grad]
        if not pairs:
            return self._tree([torch.zeros_like(leaf) for leaf in self._leaves])
        parts, directions = zip(*pairs, strict=True)
        products = torch.autograd.grad(parts, self._leaves, directions, retain_graph=True, allow_unused=True)
        return self._tree(_zeros_for_none(products, self._leaves))

    def _tree(self, leaves: list[Tensor]) -> Tree:
        return pytree.tree_unflatten(leaves, self._structure)


def hessian_vector_product(f: Callable[[Tree], Tensor], x: Tree, v: Tree) -> Tree:
    """H v with H the Hessian of f at x; see `HessianProduct` for several products at one x."""
    return HessianProduct(f, x)(v)


class GaussNewtonProduct:
    """v -> G v = J^T (d^2 loss / dz^2) J v, with J the Jacobian of z = outputs(x); the graphs are built once.

    G is positive semidefinite where the loss is convex in z, and equals the Hessian of loss(outputs(x)) where the
    outputs are affine in x or fit exactly.

    Parameters
    ----------
    outputs : maps x to a tensor of any shape; once differentiable.
    loss : maps it to a scalar tensor; twice differentiable.
    x : a floating-point tensor, or a tree of them. It is not changed.

    Attributes
    ----------
    value : loss(outputs(x)), detached.

    Raises
    ------
    ValueError : loss does not return a scalar tensor.
    """

    def __init__(self, outputs: Callable[[Tree], Tensor], loss: Callable[[Tensor], Tensor], x: Tree) -> None:
        leaves, self._structure = pytree.tree_flatten(x)
        self._leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            self._z = outputs(pytree.tree_unflatten(self._leaves, self._structure))
            # J v by two backward passes: J^T u is linear in u, and its derivative in u, times v, is J v
            self._u = torch.zeros_like(self._z, requires_grad=True)
            self._transposed = _gradients(self._z, self._leaves, self._u, create_graph=True)
        self._curve = HessianProduct(loss, self._z)
        self.value = self._curve.value

    def __call__(self, v: Tree) -> Tree:
        """G v, for v in the structure and the shapes of x."""
        direction = _like(v, self._leaves, self._structure)
        pairs = [(part, d) for part, d in zip(self._transposed, direction, strict=True) if part.requires_grad]
        if not pairs:
            return pytree.tree_unflatten([torch.zeros_like(leaf) for leaf in self._leaves], self._structure)
        parts, directions = zip(*pairs, strict=True)
        (tangent,) = torch.autograd.grad(parts, self._u, directions, retain_graph=True)
        curved = self._curve(tangent)
        products = torch.autograd.grad(self._z, self._leaves, curved, retain_graph=True, allow_unused=True)
        return pytree.tree_unflatten(_zeros_for_none(products, self._leaves), self._structure)


def gauss_newton_vector_product(
    outputs: Callable[[Tree], Tensor], loss: Callable[[Tensor], Tensor], x: Tree, v: Tree
) -> Tree:
    """G v at x; see `GaussNewtonProduct`, also for several products at one x."""
    return GaussNewtonProduct(outputs, loss, x)(v)


def _gradients(y: Tensor, leaves: list[Tensor], weights: Tensor | None = None, *, create_graph: bool) -> list[Tensor]:
    if not y.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return _zeros_for_none(
        torch.autograd.grad(y, leaves, weights, create_graph=create_graph, allow_unused=True), leaves
    )


def _zeros_for_none(gradients: tuple[Tensor | None, ...], leaves: list[Tensor]) -> list[Tensor]:
    pairs = zip(gradients, leaves, strict=True)
    return [torch.zeros_like(leaf) if gradient is None else gradient for gradient, leaf in pairs]


def _like(v: Tree, leaves: list[Tensor], structure: Any) -> list[Tensor]:
    direction, other = pytree.tree_flatten(v)
    shapes, wanted = [tuple(part.shape) for part in direction], [tuple(leaf.shape) for leaf in leaves]
    if other != structure or shapes != wanted:
        raise ValueError(f"v must have the structure and shapes of x, {wanted}, got {shapes}")
    return direction
