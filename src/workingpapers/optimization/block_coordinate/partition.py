"""Fixed blocks, and what is computed for each of them once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from workingpapers.optimization.block_coordinate.linear_algebra import largest_eigenvalues, pseudo_inverses
from workingpapers.optimization.block_coordinate.losses import Block, Loss, Vector

Partition = Literal["variable", "order", "sort", "avg", "sort_gershgorin"]


def partition(loss: Loss, rule: Partition, block_size: int) -> list[Block]:
    """Blocks of `block_size` coordinates, the last one shorter where that does not divide n.

    Parameters
    ----------
    rule : "order" cuts the coordinates as they stand; "sort" in the order of L_i, which groups large ones together;
        "avg" likewise, after pairing the smallest with the largest; "sort_gershgorin" in the order of sum_j |H_ij|.
    """
    if rule == "order":
        order = np.arange(loss.n)
    else:
        order = np.argsort(loss.bound_sums if rule == "sort_gershgorin" else loss.lipschitz, kind="stable")
    if rule == "avg":
        paired = np.empty_like(order)
        half = (loss.n + 1) // 2
        paired[::2], paired[1::2] = order[:half], order[half:][::-1]
        order = paired
    return [order[k : k + block_size] for k in range(0, loss.n, block_size)]


class FixedBlocks:
    """A partition of the coordinates.

    Parameters
    ----------
    blocks : index arrays that hold each of 0 to n - 1 once.
    loss : whose curvature bounds are cached by block.
    """

    def __init__(self, blocks: Sequence[Block], loss: Loss) -> None:
        self.blocks = list(blocks)
        self._loss = loss
        self._order = np.concatenate(self.blocks)
        self._starts = np.cumsum([0, *(len(block) for block in self.blocks[:-1])])

    def __len__(self) -> int:
        return len(self.blocks)

    def sums(self, scores: Vector) -> Float[np.ndarray, " blocks"]:
        """The sum of the coordinates' scores in each block."""
        return np.add.reduceat(scores[self._order], self._starts)

    def maxima(self, scores: Vector) -> Float[np.ndarray, " blocks"]:
        return np.maximum.reduceat(scores[self._order], self._starts)

    @cached_property
    def _groups(self) -> list[Int[np.ndarray, "members size"]]:
        """The numbers of the blocks, grouped by size."""
        sizes = np.array([len(block) for block in self.blocks])
        return [np.flatnonzero(sizes == size) for size in np.unique(sizes)]

    @cached_property
    def _bounds(self) -> list[Float[np.ndarray, "members size size"]]:
        return [np.stack([self._loss.hess_bound(self.blocks[k]) for k in group]) for group in self._groups]

    @cached_property
    def lipschitz(self) -> Float[np.ndarray, " blocks"]:
        """L_b, the largest eigenvalue of H_b; 1 where that is 0."""
        values = np.empty(len(self))
        for group, bounds in zip(self._groups, self._bounds, strict=True):
            values[group] = largest_eigenvalues(bounds)
        return np.where(values > 0.0, values, 1.0)

    @cached_property
    def _inverse_groups(self) -> list[Float[np.ndarray, "members size size"]]:
        return [pseudo_inverses(bounds) for bounds in self._bounds]

    @cached_property
    def inverses(self) -> list[Float[np.ndarray, "size size"]]:
        """The pseudo-inverse of H_b for each block."""
        found: list[np.ndarray] = [np.empty(0)] * len(self)
        for group, inverses in zip(self._groups, self._inverse_groups, strict=True):
            for k, inverse in zip(group, inverses, strict=True):
                found[k] = inverse
        return found

    def newton_scores(self, g: Vector) -> Float[np.ndarray, " blocks"]:
        """g_b^T H_b^+ g_b for each block."""
        scores = np.empty(len(self))
        for group, inverses in zip(self._groups, self._inverse_groups, strict=True):
            parts = g[np.stack([self.blocks[k] for k in group])]
            scores[group] = np.einsum("ki,kij,kj->k", parts, inverses, parts)
        return scores
