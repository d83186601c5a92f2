"""What the result of every solver of `workingpapers.optimization` keeps.

from solver_contract import check_result

def test_contract():
    start = np.zeros(3)
    check_result(minimise(problem, start), start)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from workingpapers.optimization.result import History, OptimizationResult


def check_result(result: OptimizationResult, x0: Any = None) -> None:
    """Check one result.

    Parameters
    ----------
    result : of a run that ended normally or ran out of iterations.
    x0 : what the caller passed as start; x may share no memory with it.
    """
    assert isinstance(result, OptimizationResult)
    assert dataclasses.is_dataclass(result)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.fun = 0.0  # type: ignore[misc]
    assert type(result.fun) is float
    assert type(result.converged) is bool
    assert type(result.n_iterations) is int
    assert result.message
    assert (result.success, result.nit) == (result.converged, result.n_iterations)
    history = result.history
    assert isinstance(history, History)
    if result.n_iterations:
        assert {"iteration", "fun"} <= set(history)
        assert history.iteration[-1] == result.n_iterations
        assert np.all(np.diff(history.iteration) > 0)
        assert history.fun[-1] == pytest.approx(result.fun, rel=1e-6, abs=1e-12)
    if x0 is not None:
        pairs = zip(pytree.tree_leaves(result.x), pytree.tree_leaves(x0), strict=True)
        assert not any(_shared(one, other) for one, other in pairs), "x is an alias of the start"


def _shared(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return bool(np.shares_memory(np.asarray(one), np.asarray(other)))
