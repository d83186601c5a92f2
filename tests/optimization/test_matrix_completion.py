"""Tests of the mathematics: each fails when the idea it names is removed."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import check_estimator

from workingpapers.optimization import matrix_completion
from workingpapers.optimization.matrix_completion import (
    RobustAltMin,
    _kernels,
    clip_rows,
    exact_als,
    soft_impute,
    spectral_init,
    weighted_multi_regression,
)


def low_rank(m, n, k, seed=0):
    """Equal singular values 1 and random, hence incoherent, singular vectors."""
    rng = np.random.default_rng(seed)
    return np.linalg.qr(rng.standard_normal((m, k)))[0] @ np.linalg.qr(rng.standard_normal((n, k)))[0].T


def sampled(M, p, seed=0):
    mask = np.random.default_rng(1000 + seed).random(M.shape) < p
    return sp.coo_array((M[mask], np.nonzero(mask)), shape=M.shape), mask


def error(M, U, V):
    return np.linalg.norm(M - U @ V.T) / np.linalg.norm(M)


def curve(X, M, rank, sweeps, **options):
    """Relative error on the whole matrix after each sweep."""
    errors = []
    RobustAltMin(
        rank,
        tol=0.0,
        max_sweeps=sweeps,
        callback=lambda t, U, V: errors.append(error(M, U, V)),
        random_state=0,
        **options,
    ).fit(X)
    return np.array(errors)


@pytest.fixture(scope="module")
def problem():
    M = low_rank(200, 180, 5)
    X, mask = sampled(M, 0.25)
    return M, X, mask


# --- the regressions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reg", [0.0, 0.7])
@pytest.mark.parametrize("inner", ["sketch", "cg", "exact", "qr"])
def test_every_column_is_the_least_squares_solution_over_its_own_rows(inner, reg):
    rng = np.random.default_rng(0)
    U, Y = rng.standard_normal((120, 6)), rng.standard_normal((120, 9))
    mask = rng.random(Y.shape) < 0.5
    found = weighted_multi_regression(U, np.where(mask, Y, np.nan), 1e-12, inner=inner, reg=reg, random_state=0)
    for j in range(9):
        rows = mask[:, j]
        expected = (
            Ridge(alpha=reg, fit_intercept=False, solver="svd").fit(U[rows], Y[rows, j]).coef_
            if reg
            else np.linalg.lstsq(U[rows], Y[rows, j])[0]
        )
        np.testing.assert_allclose(found.V[j], expected, rtol=0, atol=1e-9)
    assert found.n_unmet == found.n_fallbacks == 0
    assert (found.steps > 0) == (inner in ("sketch", "cg"))


def conditioned(rows, k, condition, seed=1):
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (rows, k))
    return left @ np.diag(np.geomspace(1.0, 1.0 / condition, k)) @ right


@pytest.mark.parametrize("sketch", ["countsketch", "srht"])
def test_the_sketch_makes_an_ill_conditioned_problem_easy(sketch):
    U, V = conditioned(1500, 16, 1e3), np.random.default_rng(0).standard_normal((3, 16))
    options = {"max_inner": 25, "random_state": 0}
    found = weighted_multi_regression(U, U @ V.T, 1e-9, sketch=sketch, **options)
    np.testing.assert_allclose(found.V, V, atol=1e-4)
    assert found.n_fallbacks == 0
    with pytest.warns(RuntimeWarning, match="3 of 3 columns did not reach tol=1e-09 in max_inner=25 steps"):
        weighted_multi_regression(U, U @ V.T, 1e-9, inner="cg", **options)


@pytest.mark.parametrize("sketch", ["countsketch", "srht"])
def test_a_sketch_that_is_nearly_singular_falls_back_to_exact_solutions(sketch):
    U, V = conditioned(1500, 8, 1e6), np.random.default_rng(0).standard_normal((3, 8))
    found = weighted_multi_regression(U, U @ V.T, sketch=sketch, random_state=0)
    assert found.n_fallbacks == 3
    assert found.steps == 0
    np.testing.assert_allclose(U @ found.V.T, U @ V.T, atol=1e-8)


@pytest.mark.parametrize("sketch", ["countsketch", "srht"])
def test_a_sketch_of_4k_rows_gives_a_basis_of_small_condition_and_keeps_lengths_on_average(sketch):
    rng = np.random.default_rng(2)
    rows, k = 700, 8
    A = np.linalg.qr(rng.standard_normal((rows, k)))[0]
    conditions, lengths = [], []
    for seed in range(200):
        SA = np.empty((4 * k, k))
        if sketch == "countsketch":
            _kernels.countsketch(A, rows, np.uint64(7919 * seed), SA)
        else:
            _kernels.srht(A, rows, np.uint64(7919 * seed), np.empty((1024, k)), SA)
        conditions.append(np.linalg.cond(SA))  # that of A R^{-1}, as A is orthonormal
        lengths.append(np.linalg.norm(SA, axis=0) ** 2)
    assert np.median(conditions) < 3.0
    assert np.max(conditions) < 7.0
    np.testing.assert_allclose(np.mean(lengths, axis=0), 1.0, atol=0.06)


def test_operations_are_those_of_the_formulas():
    rng = np.random.default_rng(3)
    s, k = 1000, 10
    U, y = np.linalg.qr(rng.standard_normal((s, k)))[0], rng.standard_normal((s, 1))

    def count(**options):
        return weighted_multi_regression(U, y, 0.0, random_state=0, **options).operations

    triangle, factor = k * (k + 1) // 2, k**3 // 6
    assert count(inner="exact") == s * triangle + s * k + factor + k * k
    assert count(max_inner=3) == s * k + 4 * k * triangle + factor + 3 * s * k + 3 * 2 * s * k + 4 * k * k
    assert count(inner="qr") == s * (k + 1) ** 2 + k * k // 2


def test_problems_no_larger_than_the_sketch_are_solved_exactly():
    rng = np.random.default_rng(4)
    U, Y = rng.standard_normal((20, 5)), rng.standard_normal((20, 2))
    found = weighted_multi_regression(U, Y, random_state=0)
    assert found.steps == 0
    np.testing.assert_allclose(found.V, np.linalg.lstsq(U, Y)[0].T, atol=1e-12)


@pytest.mark.parametrize("inner", ["sketch", "exact", "qr"])
def test_short_and_dependent_rows_give_the_solution_of_least_norm(inner):
    rng = np.random.default_rng(5)
    U, X = rng.standard_normal((60, 6)), np.full((60, 3), np.nan)
    X[:4, 0] = rng.standard_normal(4)
    U[30:] = U[30:, :2] @ rng.standard_normal((2, 6))  # rank 2
    X[30:, 1] = rng.standard_normal(30)
    found = weighted_multi_regression(U, X, inner=inner, random_state=0)
    expected = [np.linalg.lstsq(U[:4], X[:4, 0])[0], np.linalg.lstsq(U[30:], X[30:, 1], rcond=1e-8)[0]]
    np.testing.assert_allclose(found.V[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(U[30:] @ found.V[1], U[30:] @ expected[1], atol=1e-5)
    assert np.linalg.norm(found.V[1]) <= 1.001 * np.linalg.norm(expected[1]) or inner == "qr"
    assert (found.V[2] == 0).all()


def test_a_good_start_saves_steps():
    rng = np.random.default_rng(6)
    U, Y = np.linalg.qr(rng.standard_normal((400, 6)))[0], rng.standard_normal((400, 20))
    exact = weighted_multi_regression(U, Y, inner="exact").V
    near = exact + 1e-6 * rng.standard_normal(exact.shape)
    after_two = weighted_multi_regression(U, Y, 0.0, max_inner=2, start=near, random_state=0).V
    assert np.abs(after_two - exact).max() < 1e-6
    cold = weighted_multi_regression(U, Y, 0.0, max_inner=2, random_state=0).V
    assert np.abs(cold - exact).max() > 1e-3


# --- the start -----------------------------------------------------------------------------------------------------


def test_the_start_is_near_the_column_space(problem):
    M, X, _ = problem
    U = spectral_init(X, 5, random_state=0)
    np.testing.assert_allclose(U.T @ U, np.eye(5), atol=1e-12)
    left = np.linalg.svd(M)[0][:, :5]
    assert np.linalg.norm(left - U @ (U.T @ left), 2) < 0.7
    with_all = spectral_init(M, 5, random_state=0)
    assert np.linalg.norm(left - with_all @ (with_all.T @ left), 2) < 1e-8


def test_clipping_shortens_only_rows_that_incoherence_excludes():
    U = np.linalg.qr(np.random.default_rng(0).standard_normal((100, 4)))[0]
    np.testing.assert_array_equal(clip_rows(U), U)
    spike = U.copy()
    spike[7] = [3.0, 0.0, 0.0, 0.0]
    bound = 2 * 1.5 * np.sqrt(4 / 100)
    clipped = clip_rows(spike, 1.5)
    assert np.isclose(np.linalg.norm(clipped[7]), bound)
    assert (clip_rows(spike, 1.5, how="zero")[7] == 0).all()
    assert spike[7, 0] == 3.0
    assert np.isclose(np.linalg.norm(clip_rows(spike)[7]), 2 * 5 * np.sqrt(4 / 100))  # the estimate stops at 5


# --- the outer loop ------------------------------------------------------------------------------------------------


def test_inexact_regressions_keep_the_contraction_of_exact_ones():
    M = low_rank(400, 400, 8)
    X, _ = sampled(M, 0.15)
    exact, rule, five = (
        curve(X, M, 8, 12, **options) for options in ({"inner": "exact"}, {}, {"inner_tol": 0.0, "max_inner": 5})
    )
    assert exact[-1] < 1e-4
    assert (exact[1:] < 0.7 * exact[:-1]).all()
    assert (np.abs(five / exact - 1) < 0.02).all()
    assert (rule / exact < 1.35).all()


def test_without_warm_starts_the_error_stalls():
    M = low_rank(400, 400, 8)
    X, _ = sampled(M, 0.15)
    options = {"inner_tol": 0.0, "max_inner": 5}
    assert curve(X, M, 8, 12, warm_start_rows=False, **options)[-1] > 20 * curve(X, M, 8, 12, **options)[-1]


@pytest.mark.parametrize("options", [{"inner": "exact"}, {"inner": "qr"}, {"inner": "cg"}, {}, {"sketch": "srht"}])
def test_the_matrix_is_recovered_where_it_was_not_observed(problem, options):
    M, X, mask = problem
    model = RobustAltMin(5, tol=1e-8, max_sweeps=100, random_state=0, **options).fit(X)
    assert model.converged_
    np.testing.assert_allclose(model.complete()[~mask], M[~mask], atol=1e-6)
    np.testing.assert_allclose(model.V_.T @ model.V_, np.eye(5), atol=1e-12)
    assert model.history_["change"][-1] <= 1e-8 < model.history_["change"][-2]
    assert len(model.history_["train_rmse"]) == model.n_sweeps_ == len(model.history_["operations"])


def test_a_sweep_is_two_least_squares_problems_and_two_changes_of_basis(problem):
    _, X, mask = problem
    dense, found = X.toarray(), []
    exact_als(X, 5, tol=0.0, max_sweeps=2, callback=lambda t, U, V: found.append(U @ V.T), random_state=0)
    U = spectral_init(X, 5, random_state=np.random.default_rng(0))
    for completion in found:
        V = np.array([np.linalg.lstsq(U[mask[:, j]], dense[mask[:, j], j])[0] for j in range(mask.shape[1])])
        V = np.linalg.qr(V)[0]
        U = np.array([np.linalg.lstsq(V[mask[i]], dense[i, mask[i]])[0] for i in range(len(mask))])
        np.testing.assert_allclose(completion, U @ V.T, atol=1e-9)
        U = np.linalg.qr(U)[0]


def test_exact_als_is_the_estimator_with_exact_regressions_by_either_solver(problem):
    _, X, _ = problem
    model = RobustAltMin(5, inner="exact", random_state=0).fit(X)
    for solver in ("normal", "qr"):
        found = exact_als(X, 5, solver=solver, random_state=0)
        np.testing.assert_allclose(found.complete(), model.complete(), atol=1e-8)
        assert found.n_iterations == model.n_sweeps_


def test_regularisation_minimises_the_penalised_objective(problem):
    _, X, mask = problem
    noisy = sp.coo_array((X.data + 0.02 * np.random.default_rng(0).standard_normal(X.nnz), X.coords), shape=X.shape)
    reg, objectives = 0.3, []

    def objective(t, U, V):
        objectives.append(((U @ V.T - noisy.toarray())[mask] ** 2).sum() + reg * ((U @ V.T) ** 2).sum())

    exact_als(noisy, 5, reg=reg, tol=0.0, max_sweeps=40, callback=objective, random_state=0)
    assert (np.diff(objectives) <= 1e-12).all()
    inexact = RobustAltMin(5, reg=reg, tol=1e-9, max_sweeps=200, random_state=0).fit(noisy)
    completion = inexact.complete()
    final = ((completion - noisy.toarray())[mask] ** 2).sum() + reg * (completion**2).sum()
    assert final == pytest.approx(objectives[-1], rel=1e-6)


def test_sample_splitting_uses_every_entry_once_and_needs_many():
    M = low_rank(500, 500, 2)
    X, mask = sampled(M, 0.9)
    model = RobustAltMin(2, tol=0.0, max_sweeps=5, sample_splitting=True, random_state=0).fit(X)
    assert np.abs(model.complete() - M)[~mask].max() < 1e-3
    with pytest.raises(ValueError, match=r"sample_splitting makes 101 parts .* p = 0.40 .* would be needed, 0.10 is"):
        RobustAltMin(2, sample_splitting=True).fit(sampled(M, 0.1)[0])


def test_held_out_entries_are_not_fitted_and_are_measured(problem):
    M, _, _ = problem
    rng = np.random.default_rng(0)
    X, _ = sampled(M + 0.05 * rng.standard_normal(M.shape), 0.3)
    model = RobustAltMin(5, tol=1e-3, max_sweeps=500, validation_fraction=0.2, random_state=0).fit(X)
    assert model.history_["heldout_rmse"][-1] > 1.2 * model.history_["train_rmse"][-1]
    # as many entries as the whole has, but fitted to 80 % of them: between the two
    assert -model.score(X) == pytest.approx(
        np.sqrt(0.8 * model.history_["train_rmse"][-1] ** 2 + 0.2 * model.history_["heldout_rmse"][-1] ** 2), rel=0.02
    )


def test_stored_zeros_are_observations():
    M = low_rank(60, 50, 2)
    M[:, :10] = 0.0
    mask = np.random.default_rng(0).random(M.shape) < 0.6
    X = sp.coo_array((M[mask], np.nonzero(mask)), shape=M.shape)
    for form in (X, X.tocsr(), X.tocsc(), sp.csr_matrix(X), np.where(mask, M, np.nan)):
        model = RobustAltMin(2, tol=1e-9, max_sweeps=200, random_state=0).fit(form)
        np.testing.assert_allclose(model.complete(), M, atol=1e-6)


def test_rows_are_folded_in(problem):
    M, X, _ = problem
    model = RobustAltMin(5, tol=1e-9, max_sweeps=100, random_state=0).fit(X)
    new = np.random.default_rng(3).standard_normal((4, 5)) @ np.linalg.svd(M)[2][:5]
    mask = np.random.default_rng(4).random(new.shape) < 0.2
    mask[3] = False
    folded = model.transform(np.where(mask, new, np.nan)) @ model.V_.T
    np.testing.assert_allclose(folded[:3], new[:3], atol=1e-5)
    assert (folded[3] == 0).all()


def test_predictions_are_entries_of_the_completion(problem):
    _, X, _ = problem
    model = RobustAltMin(5, random_state=0).fit(X)
    rows, columns = np.array([0, 3, 199]), np.array([179, 0, 5])
    np.testing.assert_allclose(model.predict(rows, columns), model.complete()[rows, columns], atol=1e-14)
    for rows, columns, message in [
        ([200], [0], "rows must be from 0 to 199"),
        ([0], [-1], "columns must be from 0 to 179"),
        ([0, 1], [0], "must be as long"),
        ([[0]], [0], "vector"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.predict(np.array(rows), np.array(columns))
    with pytest.raises(TypeError, match="rows must be integers"):
        model.predict(np.array([0.5]), np.array([0]))


# --- the nuclear norm ----------------------------------------------------------------------------------------------


def test_soft_impute_meets_the_optimality_conditions_of_the_nuclear_norm():
    rng = np.random.default_rng(0)
    M = low_rank(60, 50, 4) * 30 + 0.3 * rng.standard_normal((60, 50))
    X, mask = sampled(M, 0.5)
    shrinkage = 3.0
    found = soft_impute(X, shrinkage, 20, tol=1e-10, max_sweeps=5000)
    completion = found.complete()
    rank = np.linalg.matrix_rank(completion, tol=1e-6)
    assert 0 < rank < 20
    # P_O(M - X) / shrinkage is a subgradient of the nuclear norm: U V^T on the space of X, of norm at most 1 off it
    gradient = np.where(mask, M - completion, 0.0) / shrinkage
    U, _, Vt = np.linalg.svd(completion)
    U, Vt = U[:, :rank], Vt[:rank]
    np.testing.assert_allclose(gradient @ Vt.T, U, atol=1e-3)
    np.testing.assert_allclose(U.T @ gradient, Vt, atol=1e-3)
    assert np.linalg.norm(gradient, 2) <= 1 + 1e-3


def test_soft_impute_of_a_full_matrix_shrinks_singular_values():
    M = low_rank(30, 20, 3) * np.arange(1, 21)
    U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
    np.testing.assert_allclose(
        soft_impute(M, 2.0, 10, tol=1e-12, max_sweeps=2000).complete(), (U * np.maximum(sigma - 2.0, 0)) @ Vt, atol=1e-6
    )
    assert np.abs(soft_impute(M, 1.01 * sigma[0], 5, tol=0.0, max_sweeps=200).complete()).max() == 0.0


# --- conduct -------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_result_with_any_number_of_threads(problem):
    _, X, _ = problem
    one, again, two = (RobustAltMin(5, tol=0.0, max_sweeps=6, n_jobs=jobs, random_state=3).fit(X) for jobs in (1, 1, 2))
    np.testing.assert_array_equal(one.U_, again.U_)
    np.testing.assert_array_equal(one.U_, two.U_)
    assert one.history_["operations"].tolist() == two.history_["operations"].tolist()
    other = RobustAltMin(5, tol=0.0, max_sweeps=6, random_state=4).fit(X)
    assert np.abs(one.complete() - other.complete()).max() > 1e-12


def test_the_callers_data_stay_as_they_are(problem):
    _, X, _ = problem
    csr = X.tocsr()
    kept = csr.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        RobustAltMin(5, random_state=0, max_sweeps=3).fit(csr)
        soft_impute(csr, 0.1, 3, max_sweeps=3)
    np.testing.assert_array_equal(csr.data, kept.data)
    np.testing.assert_array_equal(csr.indices, kept.indices)


def test_single_precision_is_kept(problem):
    M, X, mask = problem
    model = RobustAltMin(5, tol=1e-4, random_state=0).fit(X.astype(np.float32))
    assert model.U_.dtype == model.V_.dtype == np.float32
    assert np.abs(model.complete() - M)[~mask].max() < 1e-3


def test_parameters_survive_a_clone_and_unfitted_use_is_named(problem):
    model = RobustAltMin(5, reg=0.5, sketch="srht")
    assert clone(model).get_params() == model.get_params()
    with pytest.raises(NotFittedError):
        model.complete()


def test_equal_duplicates_are_one_observation_and_others_are_refused(problem):
    _, X, _ = problem
    twice = sp.coo_array((np.r_[X.data, X.data[:9]], (np.r_[X.row, X.row[:9]], np.r_[X.col, X.col[:9]])), shape=X.shape)
    once, again = (RobustAltMin(5, random_state=0).fit(data).complete() for data in (X, twice))
    np.testing.assert_array_equal(once, again)
    twice.data[-1] += 1.0
    with pytest.raises(ValueError, match=r"one value, got .* for entry \(0, "):
        RobustAltMin(5).fit(twice)


def test_empty_rows_are_zero_with_a_warning(problem):
    _, X, _ = problem
    dense = np.where(X.toarray() != 0, X.toarray(), np.nan)
    dense[3], dense[:, 5:7] = np.nan, np.nan
    with pytest.warns(RuntimeWarning) as caught:
        completion = RobustAltMin(5, random_state=0).fit(dense).complete()
    assert [str(w.message).partition(" have")[0] for w in caught] == ["1 of 200 rows of X", "2 of 180 columns of X"]
    assert (completion[3] == 0).all()
    np.testing.assert_allclose(completion[:, 5:7], 0.0, atol=1e-12)


@pytest.mark.parametrize(
    "solve", [lambda X: RobustAltMin(2).fit(X).complete(), lambda X: soft_impute(X, 1.0, 2).complete()]
)
def test_zeros_are_completed_by_zeros_with_a_warning(solve):
    with pytest.warns(RuntimeWarning, match="all observed entries are zero"):
        assert (solve(np.zeros((6, 5))) == 0).all()


def test_running_out_of_sweeps_warns_and_says_so(problem):
    _, X, _ = problem
    with pytest.warns(ConvergenceWarning, match=r"change .* > tol 1.0e-06 after 2 sweeps"):
        assert not RobustAltMin(5, max_sweeps=2, random_state=0).fit(X).converged_
    with pytest.warns(ConvergenceWarning, match="after 1 sweeps"):
        assert not soft_impute(X, 0.1, 3, max_sweeps=1).converged


def test_a_callback_may_stop(problem):
    _, X, _ = problem
    model = RobustAltMin(5, callback=lambda t, U, V: t == 2, random_state=0).fit(X)
    assert model.n_sweeps_ == 2
    assert not model.converged_
    assert "callback" in model.completion().message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be at least 1 and at most 180, got 0"),
        ({"rank": 181}, "rank must be at least 1 and at most 180, got 181"),
        (
            {"rank": 60},
            r"of the 200 rows of X that have entries have fewer than rank=60: take a smaller rank or reg above 0",
        ),
        ({"tol": -1.0}, "tol must be at least 0"),
        ({"max_sweeps": 0}, "max_sweeps must be at least 1"),
        ({"inner": "svd"}, "inner must be one of 'sketch', 'cg', 'exact', 'qr', got 'svd'"),
        ({"sketch": "gauss"}, "sketch must be one of"),
        ({"sketch_factor": 1}, "sketch_factor must be at least 2"),
        ({"inner_tol": 1.0}, "inner_tol must be at least 0 and below 1"),
        ({"inner_tol": "tight"}, "inner_tol must be 'auto' or a number, got 'tight'"),
        ({"max_inner": 0}, "max_inner must be at least 1"),
        ({"validation_fraction": 1.0}, "validation_fraction must be at least 0 and below 1"),
        ({"incoherence": 0.0}, "incoherence must be above 0"),
        ({"reg": -0.1}, "reg must be at least 0"),
        ({"reg": np.nan}, "reg must be at least 0"),
        ({"n_jobs": 0}, "n_jobs must not be 0"),
    ],
)
def test_bad_parameters_are_named(problem, change, message):
    with pytest.raises(ValueError, match=message):
        RobustAltMin(**({"rank": 5} | change)).fit(problem[1])


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros(3), r"X must be a matrix, got shape \(3,\)"),
        (np.full((3, 3), np.nan), "X must have at least one observed entry"),
        (np.array([[1.0, np.inf], [1.0, 2.0]]), "X must be finite"),
        (sp.csr_array(np.array([[1.0, np.nan], [1.0, 2.0]])), "X must be finite"),
        (np.array([[1j, 2.0], [1.0, 2.0]]), "X must hold real numbers"),
    ],
)
def test_bad_matrices_are_named(X, message):
    for solve in (RobustAltMin(1).fit, lambda X: exact_als(X, 1), lambda X: soft_impute(X, 1.0, 1)):
        with pytest.raises(ValueError, match=message):
            solve(X)


def test_bad_arguments_of_the_functions_are_named(problem):
    _, X, _ = problem
    U = np.ones((200, 3))
    for call, message in [
        (lambda: weighted_multi_regression(U[:5], X), r"U must have shape \(200, k\), got \(5, 3\)"),
        (lambda: weighted_multi_regression(np.full((200, 3), np.nan), X), "U must be finite"),
        (lambda: weighted_multi_regression(U, X, start=np.ones((2, 3))), r"start must have shape \(180, 3\)"),
        (lambda: weighted_multi_regression(U, X, tol=2.0), "tol must be at least 0 and below 1"),
        (lambda: clip_rows(np.ones(3)), "U must be a matrix"),
        (lambda: clip_rows(U, -1.0), "incoherence must be above 0"),
        (lambda: clip_rows(U, how="drop"), "how must be one of 'scale', 'zero'"),
        (lambda: spectral_init(X, 0), "rank must be at least 1"),
        (lambda: exact_als(X, 5, solver="svd"), "solver must be one of 'normal', 'qr'"),
        (lambda: soft_impute(X, 0.0, 3), "shrinkage must be above 0"),
        (
            lambda: RobustAltMin(5, random_state=0).fit(X).transform(np.ones((2, 3))),
            "X has 3 features, but RobustAltMin is expecting 180",
        ),
        (lambda: RobustAltMin(5, random_state=0).fit(X).score(np.ones((2, 180))), r"X must have shape \(200, 180\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="callback must be callable"):
        RobustAltMin(5, callback=3).fit(X)


def test_every_name_is_reachable_from_the_field():
    from workingpapers import optimization

    assert all(getattr(optimization, name) is getattr(matrix_completion, name) for name in matrix_completion.__all__)


def test_rows_without_entries_do_not_hide_rows_with_too_few():
    X = np.full((40, 40), np.nan)
    X[0, 0], X[1, 1] = 1.0, 2.0
    with pytest.raises(ValueError, match="2 of the 2 rows of X that have entries have fewer than rank=5"):
        RobustAltMin(5).fit(X)


class Transformer(RobustAltMin):
    """Without `predict`, which takes places of a matrix and not its rows."""

    @property
    def predict(self):
        raise AttributeError("predict")


def test_estimator_keeps_the_contract_of_scikit_learn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        check_estimator(Transformer(rank=1, max_sweeps=200), on_skip=None)
