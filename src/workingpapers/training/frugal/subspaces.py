"""The subspaces in which a linear weight keeps its state: some of its coordinates, or the span of a few directions.

A subspace is described by one tensor that lives in the optimiser's state: the sorted int32 `indices` of coordinates, or
the `projector` Q, whose orthonormal rows span directions along the smaller side of the matrix.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Projection = Literal["block", "columns", "rows", "randk", "svd", "random", "randperm"]

Matrix: TypeAlias = Float[Tensor, "a b"]


class Coordinates:
    """Whole columns or rows of a matrix, or single entries of it; the low-dimensional gradient is a copy of them.

    Parameters
    ----------
    indices : sorted, int32.
    axis : the dimension of the matrix, counted from the end, that they number; -1 for entries.
    flat : entries, numbered row by row.
    """

    key = "indices"

    def __init__(self, indices: Int[Tensor, " r"], axis: int, flat: bool) -> None:
        self.tensor = indices
        self.axis = axis
        self.flat = flat

    def down(self, grad: Matrix) -> Tensor:
        """P G."""
        return (grad.reshape(-1) if self.flat else grad).index_select(self.axis, self.tensor)

    def remainder(self, grad: Matrix, low: Tensor) -> Matrix:
        """G - P^T P G, except at the coordinates themselves, which `insert` overwrites."""
        return grad

    def insert(self, low: Tensor, full: Matrix) -> None:
        """Put P^T low where `full`, contiguous, comes from `remainder`."""
        indices = self.tensor.long()
        if not self.flat:  # index_copy_ does the same, several times slower
            indices = (indices if self.axis == -1 else indices[:, None]).expand_as(low)
        (full.view(-1) if self.flat else full).scatter_(self.axis, indices, low)

    def carry(self, low: Tensor, before: Int[Tensor, " q"], squared: bool) -> Tensor:
        """R low with R = P P_before^T, here a 0/1 matrix: coordinates that stay keep their value, new ones have 0."""
        place = torch.searchsorted(before, self.tensor).clamp_(max=len(before) - 1)
        stays = before[place] == self.tensor
        return torch.where(stays if self.axis == -1 else stays[:, None], low.index_select(self.axis, place), 0.0)


class Span:
    """The span of orthonormal directions along the smaller side of a matrix.

    Parameters
    ----------
    projector : Q, with orthonormal rows.
    axis : -1 when Q acts on the rows of G (G Q^T), -2 when it acts on its columns (Q G).
    """

    key = "projector"

    def __init__(self, projector: Float[Tensor, "r side"], axis: int) -> None:
        self.tensor = projector
        self.axis = axis

    def down(self, grad: Matrix) -> Tensor:
        """P G."""
        return grad @ self.tensor.T if self.axis == -1 else self.tensor @ grad

    def remainder(self, grad: Matrix, low: Tensor) -> Matrix:
        """G - P^T P G."""
        return grad - self._up(low)

    def insert(self, low: Tensor, full: Matrix) -> None:
        """Add P^T low."""
        full.add_(self._up(low))

    def _up(self, low: Tensor) -> Matrix:
        """P^T low."""
        return low @ self.tensor if self.axis == -1 else self.tensor.T @ low

    def carry(self, low: Tensor, before: Float[Tensor, "q side"], squared: bool) -> Tensor:
        """R low with R = P P_before^T, or (R o R) low for averages of squares."""
        turn = self.tensor @ before.T
        turn = turn.square() if squared else turn
        return low @ turn.T if self.axis == -1 else turn @ low


Subspace: TypeAlias = Coordinates | Span


def size(shape: torch.Size, projection: Projection, density: float) -> int:
    """How many columns, rows, entries or directions of a matrix the share `density` is."""
    rows, columns = shape
    match projection:
        case "columns":
            return math.floor(density * columns)
        case "rows":
            return math.floor(density * rows)
        case "randk":
            return math.floor(density * rows * columns)
        case _:
            return round(density * min(rows, columns))


def from_tensor(tensor: Tensor, shape: torch.Size, projection: Projection) -> Subspace:
    """The subspace of a matrix of this shape that a tensor of the state describes."""
    smaller = -1 if shape[0] >= shape[1] else -2
    if projection in ("svd", "random"):
        return Span(tensor, smaller)
    return Coordinates(tensor, {"rows": -2, "randperm": smaller}.get(projection, -1), flat=projection == "randk")


def choose(grad: Matrix, projection: Projection, density: float, generator: torch.Generator) -> Subspace:
    """A new subspace for a weight.

    Parameters
    ----------
    grad : the gradient of this step in the type of the moments; only "svd" looks at its values.
    generator : on the CPU, so that all devices and processes draw the same.
    """
    r = size(grad.shape, projection, density)
    side = min(grad.shape)
    match projection:
        case "svd":
            left, _, right = torch.linalg.svd(grad, full_matrices=False)
            tensor = right[:r] if len(grad) >= grad.shape[1] else left[:, :r].T
        case "random":
            tensor = nn.init.orthogonal_(torch.empty(r, side, dtype=grad.dtype), generator=generator)
        case _:
            among = {"columns": grad.shape[1], "rows": len(grad), "randk": grad.numel()}.get(projection, side)
            tensor = torch.randperm(among, generator=generator, dtype=torch.int32)[:r].sort().values
    return from_tensor(tensor.to(grad.device).contiguous(), grad.shape, projection)
