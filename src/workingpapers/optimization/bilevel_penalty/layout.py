"""Trees of tensors as single vectors, so that the algorithms can add and project them."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from workingpapers.common.validation import check_finite

Tree = Any  # a tensor, or tuples, lists and dicts of tensors
Vector = Float[Tensor, " n"]


class Layout:
    """Where the tensors of a tree lie in one vector.

    Parameters
    ----------
    name : of the argument, for messages.
    tree : floating-point tensors of one dtype on one device, finite.

    Raises
    ------
    TypeError : a leaf is not such a tensor.
    ValueError : a value is not finite, or there is none.
    """

    def __init__(self, name: str, tree: Tree) -> None:
        self.name = name
        leaves, self.structure = pytree.tree_flatten(tree)
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                kind = str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(f"{name} must hold floating-point tensors only, got {kind}")
            check_finite(name, leaf)
        if len({(leaf.dtype, leaf.device) for leaf in leaves}) > 1:
            raise TypeError(f"the tensors of {name} must share one dtype and one device")
        self.shapes = [leaf.shape for leaf in leaves]
        self.sizes = [leaf.numel() for leaf in leaves]
        if not sum(self.sizes):
            raise ValueError(f"{name} must hold at least one number")
        self.dtype, self.device = leaves[0].dtype, leaves[0].device

    def vector(self, tree: Tree, what: str | None = None) -> Vector:
        """A tree of this layout as a new, detached vector.

        Raises
        ------
        ValueError : the tree has another structure or other shapes.
        """
        leaves, structure = pytree.tree_flatten(tree)
        shapes = [leaf.shape if isinstance(leaf, Tensor) else None for leaf in leaves]
        if structure != self.structure or shapes != self.shapes:
            wanted = [tuple(shape) for shape in self.shapes]
            found = [tuple(shape) if shape is not None else None for shape in shapes]
            raise ValueError(f"{what or self.name} must have the structure and shapes {wanted}, got {found}")
        return torch.cat([leaf.detach().reshape(-1) for leaf in leaves]).to(self.device, self.dtype, copy=True)

    def tree(self, vector: Vector) -> Tree:
        """The tree whose tensors are views of the vector."""
        if len(self.sizes) == 1:
            return pytree.tree_unflatten([vector.view(self.shapes[0])], self.structure)
        parts = torch.split(vector, self.sizes)
        leaves = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return pytree.tree_unflatten(leaves, self.structure)


def norm(vector: Vector) -> float:
    """The Euclidean norm, accumulated in double precision."""
    return math.sqrt(float(vector.double().square().sum()))
