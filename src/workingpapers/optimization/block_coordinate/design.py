"""A data matrix, dense or sparse, with the products that block coordinate descent needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from workingpapers.common.validation import check_finite
from workingpapers.optimization.block_coordinate import _kernels as kernels

Matrix = Float[np.ndarray, "n c"]
Vector = Float[np.ndarray, " n"]
Indices = Int[np.ndarray, " k"]

_WORTH_A_COPY = 5  # sorting a sparse matrix by rows takes as long as about this many products with it


class Design(ABC):
    """An m x n matrix A whose columns are touched a few at a time."""

    shape: tuple[int, int]
    columns: tuple[np.ndarray, np.ndarray, np.ndarray]  # (indptr, indices, data) by columns; sparse matrices only

    def short_columns(self, block: Indices) -> bool:
        """Whether a pass over these columns is cheaper than one over their Gram matrix."""
        return False

    @staticmethod
    def of(A: Any) -> Design:
        """A as given, or ValueError where it is no finite matrix with rows and columns. The caller's data is not kept
        where it would have to be changed, nor written to."""
        if not sp.issparse(A):
            A = np.asarray(A)
            if A.dtype.kind not in "fiub":
                raise TypeError(f"A must hold real numbers, got dtype {A.dtype}")
        if A.ndim != 2 or 0 in A.shape:
            raise ValueError(f"A must be a matrix with rows and columns, got shape {A.shape}")
        if sp.issparse(A):
            return _Sparse(A)
        return _Dense(A)

    @abstractmethod
    def product(self, x: Matrix) -> Matrix:
        """A x, shape (m, c)."""

    @abstractmethod
    def back(self, weights: Matrix) -> Matrix:
        """A^T weights, shape (n, c)."""

    @abstractmethod
    def add_columns(self, features: Indices, classes: Indices, step: Vector, margins: Matrix) -> Indices:
        """Add A[:, features] step to the classes' margins, in place; returns the rows that changed."""

    @abstractmethod
    def add_rows(self, rows: Indices, change: Matrix, weights: Matrix, out: Matrix) -> Matrix:
        """A^T weights, where `out` is that before the given rows of the weights changed by `change`."""

    @abstractmethod
    def hessian(
        self, features: Indices, classes: Indices, curvature: Matrix, coupled: bool
    ) -> Float[np.ndarray, "k k"]:
        """The block sum_i w_i(c, e) a_ij a_il for pairs (j, c), (l, e); w_i(c, e) is p_c where c = e, minus p_c p_e
        where `coupled`, for p row i of the curvature."""

    @abstractmethod
    def gram(self, features: Indices) -> Float[np.ndarray, "k k"]:
        """A[:, features]^T A[:, features]."""

    @cached_property
    @abstractmethod
    def squares(self) -> Vector:
        """Squared norms of the columns."""

    @cached_property
    @abstractmethod
    def gram_sums(self) -> Vector:
        """sum_j |A^T A|_ij for every i."""


class _Dense(Design):
    def __init__(self, A: np.ndarray) -> None:
        self.A = np.asfortranarray(A, dtype=float)
        check_finite("A", self.A)
        self.shape = self.A.shape
        self._rows = np.arange(self.shape[0])

    def product(self, x: Matrix) -> Matrix:
        return np.asarray(self.A @ x)

    def back(self, weights: Matrix) -> Matrix:
        return np.asarray(self.A.T @ weights)

    def add_columns(self, features: Indices, classes: Indices, step: Vector, margins: Matrix) -> Indices:
        for c in np.unique(classes):
            of_class = classes == c
            margins[:, c] += self.A[:, features[of_class]] @ step[of_class]
        return self._rows

    def add_rows(self, rows: Indices, change: Matrix, weights: Matrix, out: Matrix) -> Matrix:
        return self.back(weights)  # every row has changed

    def hessian(
        self, features: Indices, classes: Indices, curvature: Matrix, coupled: bool
    ) -> Float[np.ndarray, "k k"]:
        columns = self.A[:, features]
        weighted = columns * curvature[:, classes]
        H: np.ndarray = weighted.T @ columns
        if curvature.shape[1] > 1:
            H *= classes[:, None] == classes
        if coupled:
            H -= weighted.T @ weighted
        return H

    def gram(self, features: Indices) -> Float[np.ndarray, "k k"]:
        columns = self.A[:, features]
        return np.asarray(columns.T @ columns)

    @cached_property
    def squares(self) -> Vector:
        return np.asarray(np.einsum("ij,ij->j", self.A, self.A))

    @cached_property
    def gram_sums(self) -> Vector:
        width = 256  # columns at a time, so that A^T A is never whole in memory
        return np.concatenate(
            [np.abs(self.A.T @ self.A[:, j : j + width]).sum(0) for j in range(0, self.shape[1], width)]
        )


class _Sparse(Design):
    def __init__(self, A: Any) -> None:
        self.A = sp.csc_array(A, dtype=float)
        if not self.A.has_canonical_format:
            self.A = self.A.copy()  # it may share the caller's arrays
            self.A.sum_duplicates()
        check_finite("A", self.A.data)
        self.shape = self.A.shape
        self.columns = self.A.indptr, self.A.indices, self.A.data
        self._marked = np.zeros(self.shape[0], bool)
        self._touched = np.empty(self.shape[0], np.int64)
        self._ones = np.ones((self.shape[0], 1))
        self._few_rows = 0  # updates so far that touched few rows

    def short_columns(self, block: Indices) -> bool:
        indptr = self.columns[0]
        return 4 * int((indptr[block + 1] - indptr[block]).sum()) < len(block) ** 2

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        by_row = self.A.tocsr()
        return by_row.indptr, by_row.indices, by_row.data

    def product(self, x: Matrix) -> Matrix:
        return np.asarray(self.A @ x)

    def back(self, weights: Matrix) -> Matrix:
        out = np.empty((self.shape[1], weights.shape[1]))
        kernels.transposed_product(*self.columns, weights, out)
        return out

    def add_columns(self, features: Indices, classes: Indices, step: Vector, margins: Matrix) -> Indices:
        count = kernels.add_columns(*self.columns, features, classes, step, margins, self._marked, self._touched)
        return self._touched[:count]

    def add_rows(self, rows: Indices, change: Matrix, weights: Matrix, out: Matrix) -> Matrix:
        self._few_rows += 4 * len(rows) < self.shape[0]
        if 4 * len(rows) >= self.shape[0] or self._few_rows < _WORTH_A_COPY:
            return self.back(weights)
        kernels.add_rows(*self._rows, rows, change, out)
        return out

    def hessian(
        self, features: Indices, classes: Indices, curvature: Matrix, coupled: bool
    ) -> Float[np.ndarray, "k k"]:
        return kernels.block_hessian(*self.columns, features, classes, curvature, coupled)

    def gram(self, features: Indices) -> Float[np.ndarray, "k k"]:
        return kernels.block_hessian(*self.columns, features, np.zeros(len(features), np.int64), self._ones, False)

    @cached_property
    def squares(self) -> Vector:
        return kernels.column_squares(self.A.indptr, self.A.data)

    @cached_property
    def gram_sums(self) -> Vector:
        return kernels.absolute_gram_sums(self.columns, self._rows)
