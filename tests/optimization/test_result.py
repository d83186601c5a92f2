"""Tests of what all solvers return."""

import copy
import pickle

import numpy as np
import pandas as pd
import pytest

from solver_contract import check_result
from workingpapers.optimization import exact_als, least_squares_operator, vr_halpern
from workingpapers.optimization.result import History, OptimizationResult


def test_history_is_a_table_of_read_only_columns():
    mine = np.array([3.0, 2.0])
    history = History({"iteration": [0, 1], "fun": mine})
    assert history["fun"] is history.fun
    assert list(history) == ["iteration", "fun"]
    assert "fun" in dir(history)
    assert pd.DataFrame(dict(history)).shape == (2, 2)
    assert repr(history) == "History(iteration, fun; 2 rows)"
    mine[0] = 7.0
    assert history.fun[0] == 3.0
    with pytest.raises(ValueError, match="read-only"):
        history.fun[0] = 1.0
    with pytest.raises(AttributeError, match="no column 'time'"):
        _ = history.time
    assert History.of([{"fun": 1.0}, {"fun": 0.5}])["fun"].tolist() == [1.0, 0.5]
    assert len(History.of([])) == 0


def test_history_can_be_copied_and_pickled():
    history = History({"fun": [1.0]})
    for other in (copy.deepcopy(history), pickle.loads(pickle.dumps(history))):
        assert other.fun.tolist() == [1.0]


def test_ragged_columns_are_refused():
    with pytest.raises(ValueError, match="one length"):
        History({"iteration": [0, 1], "fun": [1.0]})
    with pytest.raises(ValueError, match="vectors"):
        History({"fun": [[1.0]]})


def test_scipys_names_are_aliases():
    result = OptimizationResult(
        x=np.zeros(1), fun=0.5, converged=True, message="done", n_iterations=3, history=History({})
    )
    assert result.success
    assert result.nit == 3


def test_solvers_of_the_first_papers_keep_the_contract():
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((40, 3)), rng.standard_normal(40)
    start = np.zeros(3)
    check_result(vr_halpern(least_squares_operator(A, b), start, tol=1e-2, max_passes=5000, random_state=0), start)
    entries = rng.standard_normal((30, 2)) @ rng.standard_normal((2, 20))
    check_result(exact_als(np.where(rng.random(entries.shape) < 0.7, entries, np.nan), 2, tol=1e-6, random_state=0))
