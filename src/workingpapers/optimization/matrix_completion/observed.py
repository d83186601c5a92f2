"""The observed entries, checked, by rows and by columns."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from joblib import effective_n_jobs

from workingpapers.common.validation import check_finite

Matrix = Float[np.ndarray, "rows columns"]
Result = TypeVar("Result")

_PARTS_PER_THREAD = 8  # rows differ in cost, so threads take several parts each


@dataclass(frozen=True, eq=False)
class Observed:
    """Observed entries of an m x n matrix, compressed by rows; a stored zero is an observation.

    Attributes
    ----------
    indptr, indices, values : as in a canonical CSR matrix; values are float32 or float64.
    shape : (m, n).
    """

    indptr: Int[np.ndarray, " rows_plus_1"]
    indices: Int[np.ndarray, " entries"]
    values: Float[np.ndarray, " entries"]
    shape: tuple[int, int]

    @classmethod
    def of(cls, X: Any) -> Observed:
        """The entries of a SciPy sparse matrix or array of any format, or the entries that are not NaN of an array.

        Raises
        ------
        ValueError : X is not a matrix, has no entries, holds infinity (sparse: or NaN), is complex, or gives one entry
            two values.
        """
        if sp.issparse(X):
            csr = _canonical(X)
        else:
            dense = np.asarray(X)
            if dense.dtype.kind == "O":
                dense = dense.astype(float)  # TypeError and ValueError as NumPy words them
            if dense.ndim != 2:
                raise ValueError(f"X must be a matrix, got shape {dense.shape}. Reshape your data")
            if 0 in dense.shape:
                m, n = dense.shape
                empty = f"{m} sample(s)" if m == 0 else f"{n} feature(s)"
                raise ValueError(
                    f"X must not be empty, got {empty} (shape={dense.shape}) while a minimum of 1 is required."
                )
            dense = dense.astype(_dtype(dense.dtype), copy=False)
            rows, columns = np.nonzero(~np.isnan(dense))
            # from (data, indices, indptr), because other constructors may drop zeros
            indptr = np.r_[0, np.cumsum(np.bincount(rows, minlength=len(dense)))]
            csr = sp.csr_array((dense[rows, columns], columns, indptr), shape=dense.shape)
        if csr.nnz == 0:
            raise ValueError("X must have at least one observed entry, got none")
        check_finite("X", csr.data)
        return cls._from(csr)

    @classmethod
    def _from(cls, csr: sp.csr_array) -> Observed:
        index = np.int32 if max(csr.shape) < 2**31 else np.int64
        return cls(
            csr.indptr.astype(np.int64),
            csr.indices.astype(index, copy=False),
            csr.data.astype(_dtype(csr.data.dtype), copy=False),
            csr.shape,
        )

    @cached_property
    def csr(self) -> sp.csr_array:
        """The same entries for SciPy, without a copy of the values."""
        return sp.csr_array((self.values, self.indices, self.indptr), shape=self.shape)

    @cached_property
    def transposed(self) -> Observed:
        """The same entries, compressed by columns."""
        return Observed._from(self.csr.T.tocsr())

    @property
    def size(self) -> int:
        return len(self.values)

    @property
    def counts(self) -> Int[np.ndarray, " rows"]:
        """Observed entries of each row."""
        return np.diff(self.indptr)

    @property
    def norm(self) -> float:
        """Square root of the sum of the squared entries."""
        return float(np.linalg.norm(self.values))

    def part(self, chosen: np.ndarray) -> Observed:
        """Some of the entries, chosen by a mask over them."""
        counts = np.add.reduceat(np.r_[chosen, False], self.indptr[:-1]) * (self.counts > 0)
        return Observed(np.r_[0, np.cumsum(counts)], self.indices[chosen], self.values[chosen], self.shape)

    def rows(self) -> Int[np.ndarray, " entries"]:
        """The row of every entry."""
        return np.repeat(np.arange(self.shape[0]), self.counts)

    def shares(self, n_jobs: int | None) -> list[tuple[int, int]]:
        """Ranges of rows with about as many entries each, for so many threads."""
        jobs = effective_n_jobs(n_jobs)
        parts = 1 if jobs == 1 else jobs * _PARTS_PER_THREAD
        cuts = np.searchsorted(self.indptr, np.linspace(0, self.size, parts + 1)[1:-1])
        bounds = np.unique(np.r_[0, cuts, self.shape[0]]).tolist()
        return list(itertools.pairwise(bounds))


def in_threads(work: Callable[[int, int], Result], observed: Observed, n_jobs: int | None) -> Iterator[Result]:
    """work(first, last) for ranges of rows that cover all of them, with `n_jobs` threads as in joblib."""
    shares = observed.shares(n_jobs)
    if len(shares) == 1:
        yield work(*shares[0])
        return
    with ThreadPoolExecutor(effective_n_jobs(n_jobs)) as pool:
        yield from pool.map(lambda share: work(*share), shares)


def warn_about_empty(observed: Observed, stacklevel: int) -> None:
    """Warn of rows and columns without any entry, which no method can fill."""
    for name, side in (("rows", observed), ("columns", observed.transposed)):
        empty = int((side.counts == 0).sum())
        if empty:
            message = f"{empty} of {len(side.counts)} {name} of X have no observed entry; they are filled with zeros"
            warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)


def _dtype(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    if dtype.kind == "c":
        raise ValueError(f"X must hold real numbers, got dtype {dtype}. Complex data not supported")
    if dtype.kind not in "biuf":
        raise ValueError(f"X must hold real numbers, got dtype {dtype}")
    return np.float32 if dtype == np.float32 else np.float64


def _canonical(X: Any) -> sp.csr_array:
    """X by rows, sorted, every entry once; X itself stays as it is."""
    _dtype(X.dtype)
    if X.ndim != 2:
        raise ValueError(f"X must be a matrix, got shape {X.shape}")
    if X.format == "csr" and X.has_canonical_format:
        return sp.csr_array(X)
    coo = sp.coo_array(X)
    csr = coo.tocsr()  # adds up entries that are given twice
    if csr.nnz == coo.nnz:
        return csr
    order = np.lexsort((coo.col, coo.row))
    row, column, data = coo.row[order], coo.col[order], coo.data[order]
    repeated = (np.diff(row) == 0) & (np.diff(column) == 0)
    conflicts = repeated & (np.diff(data) != 0)
    if conflicts.any():
        i = int(np.argmax(conflicts))
        raise ValueError(
            f"X must give every entry one value, got {data[i]} and {data[i + 1]} for entry ({row[i]}, {column[i]})"
        )
    kept = np.r_[True, ~repeated]
    unique: sp.csr_array = sp.coo_array((data[kept], (row[kept], column[kept])), shape=X.shape).tocsr()
    return unique
