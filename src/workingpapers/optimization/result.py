"""What every solver of the field returns: one vocabulary, SciPy's names where SciPy has one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


class History(Mapping[str, np.ndarray]):
    """What a solver measured on its way: read-only columns of one length, by name.

    ``history["fun"]`` and ``history.fun`` are the same array, ``pandas.DataFrame(dict(history))`` is the table.

    Parameters
    ----------
    columns : name to one number for each recorded iteration; row 0 is the start.

    Raises
    ------
    ValueError : the columns differ in length, or one is not a vector.
    """

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._columns = {name: np.array(column) for name, column in columns.items()}
        shapes = {name: column.shape for name, column in self._columns.items()}
        if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
            raise ValueError(f"the columns of a history must be vectors of one length, got {shapes}")
        for column in self._columns.values():
            column.flags.writeable = False

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> History:
        """The history whose rows are given, all with the same names."""
        names = list(rows[0]) if rows else []
        return cls({name: [row[name] for row in rows] for name in names})

    def __getitem__(self, name: str) -> np.ndarray:
        return self._columns[name]

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.__dict__["_columns"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(f"the history has no column {name!r}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._columns]

    def __repr__(self) -> str:
        rows = len(next(iter(self._columns.values()), ()))
        return f"History({', '.join(self._columns)}; {rows} rows)"


@dataclass(frozen=True, eq=False, kw_only=True)
class OptimizationResult:
    """A point, and how it was reached. A solver with more to say adds fields in a subclass.

    Attributes
    ----------
    x : the solution, an array (tensor, tree of tensors) of its own, no alias of the start.
    fun : the objective at x.
    converged : whether the solver's stopping rule was met; `success` is SciPy's name for it.
    message : why the solver stopped, for people.
    n_iterations : iterations made; `nit` is SciPy's name for it.
    history : one row for the start and one for each recorded iteration, with "iteration" and "fun" at least.
    """

    x: Any
    fun: float
    converged: bool
    message: str
    n_iterations: int
    history: History

    @property
    def success(self) -> bool:
        return self.converged

    @property
    def nit(self) -> int:
        return self.n_iterations
