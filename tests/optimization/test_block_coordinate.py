"""Tests of the descent and its rules: each fails when the idea it names is removed."""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse as sp
from sklearn.linear_model import ElasticNet, Lasso

from workingpapers.optimization.block_coordinate import (
    BlockCoordinateDescent,
    LeastSquares,
    Logistic,
    Loss,
    NonnegativeL1LeastSquares,
    Softmax,
    SparseQuadratic,
    tree_partition,
)
from workingpapers.optimization.block_coordinate.linear_algebra import largest_eigenvalues, pseudo_inverses, solve
from workingpapers.optimization.block_coordinate.model import ColumnModel, DenseModel, minimise
from workingpapers.optimization.block_coordinate.partition import FixedBlocks, partition
from workingpapers.optimization.block_coordinate.selection import (
    Chosen,
    coordinate_scores,
    fixed_chooser,
    thresholded_block,
    variable_chooser,
)
from workingpapers.optimization.block_coordinate.updates import adaptive_step

_spec = importlib.util.spec_from_file_location("solver_contract", Path(__file__).parents[1] / "solver_contract.py")
assert _spec is not None
assert _spec.loader is not None
solver_contract = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(solver_contract)


def scaled_design(m, n, seed=0, density=0.3):
    """Columns of very different scale, as in the paper's data set A."""
    rng = np.random.default_rng(seed)
    A = (rng.standard_normal((m, n)) + 1) * (10 * rng.standard_normal(n))
    return A * (rng.random((m, n)) < density), rng


def make(kind, n=24, sparse=False, **penalty):
    A, rng = scaled_design(40, n)
    A /= np.abs(A).max()
    b = rng.standard_normal(40)
    data = sp.csr_array(A) if sparse else A
    if kind == "least squares":
        return LeastSquares(data, b, **penalty)
    if kind == "logistic":
        return Logistic(data, np.sign(b), **penalty)
    if kind == "softmax":
        return Softmax(data[:, : n // 3], rng.integers(3, size=40), **penalty)
    Q = A.T @ A + 0.1 * np.eye(n)
    return SparseQuadratic(sp.csr_array(Q) if sparse else Q, rng.standard_normal(n), **penalty)


KINDS = ["least squares", "logistic", "softmax", "quadratic"]


def descend(loss, size="auto", x0=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return BlockCoordinateDescent(loss, size, **options).minimize(x0)


# --- the losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_the_value_and_the_bound_lies_above_them(kind, sparse):
    loss = make(kind, sparse=sparse, **({} if kind == "quadratic" else {"l2": 0.3}))
    rng = np.random.default_rng(1)
    for scale in (0.1, 10.0):
        x = scale * rng.standard_normal(loss.n)
        block = rng.choice(loss.n, 7, replace=False)
        numeric = scipy.optimize.approx_fprime(x, loss.value, 1e-6)
        np.testing.assert_allclose(loss.grad(x), numeric, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(loss.grad(x)[block], loss.grad(x, block))
        step = 1e-5
        columns = [(loss.grad(x + step * e) - loss.grad(x - step * e))[block] / (2 * step) for e in np.eye(loss.n)]
        hess = loss.hess(x, block)
        np.testing.assert_allclose(hess, np.array(columns)[block], rtol=1e-4, atol=1e-4)
        assert np.linalg.eigvalsh(loss.hess_bound(block) - hess).min() >= -1e-10
        assert (loss.lipschitz[block] >= np.diag(hess) - 1e-10).all()


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_the_whole_bound_are_those_of_the_matrix(kind):
    loss = make(kind)
    whole = loss.hess_bound(np.arange(loss.n))
    for sparse in (False, True):
        loss = make(kind, sparse=sparse)
        for v in (np.random.default_rng(2).standard_normal(loss.n), np.eye(loss.n)[3]):
            np.testing.assert_allclose(loss.bound_product(v), whole @ v, atol=1e-10)
        np.testing.assert_allclose(loss.bound_sums, np.abs(whole).sum(1), rtol=1e-10)
        top = np.linalg.eigvalsh(whole)[-1]
        assert top <= loss.bound_norm <= top * (1 + 1e-5)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_descent_keeps_up_to_date_equals_what_is_computed_anew(kind, sparse):
    loss = make(kind, sparse=sparse)
    state, rng = loss.state(np.zeros(loss.n)), np.random.default_rng(3)
    for _ in range(20):
        block = rng.choice(loss.n, 3, replace=False)
        step = rng.standard_normal(3)
        expected = state.trial(block, step)
        state.move(block, state.x[block] + step)
        assert state.fun == pytest.approx(expected, rel=1e-9)
        assert state.fun == pytest.approx(loss.objective(state.x), rel=1e-9)
        np.testing.assert_allclose(state.g, loss.grad(state.x), atol=1e-9)


def test_a_loss_of_ones_own_needs_four_methods():
    class Quartic(Loss):
        """sum_i (x_i - 1)^2 / 2 + log cosh x_i."""

        def __init__(self, l1):
            super().__init__(np.full(6, 2.0), l1=l1)

        def value(self, x):
            return float(0.5 * np.sum((x - 1) ** 2) + np.sum(np.log(np.cosh(x))))

        def grad(self, x, block=None):
            g = x - 1 + np.tanh(x)
            return g if block is None else g[block]

        def hess(self, x, block):
            return np.diag(2 - np.tanh(x[block]) ** 2)

        def hess_bound(self, block):
            return 2.0 * np.eye(len(block))

    root = scipy.optimize.brentq(lambda x: x - 1 + np.tanh(x), 0, 1)
    for options in ({}, {"selection": "gsq", "partition": "sort"}, {"selection": "iht"}, {"update": "newton"}):
        found = BlockCoordinateDescent(Quartic(0.0), 2, tol=1e-9, **options).minimize()
        np.testing.assert_allclose(found.x, root, atol=1e-8)
    np.testing.assert_array_equal(BlockCoordinateDescent(Quartic(1.5)).minimize().x, 0.0)


# --- the updates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["gs", "gsl", "gsd", "iht", "random"])
@pytest.mark.parametrize("kind", ["least squares", "logistic", "softmax"])
def test_matrix_updates_decrease_f_by_half_the_newton_score(kind, selection):
    loss = make(kind, sparse=True)
    found = descend(loss, 4, selection=selection, update="hb", max_iter=40, tol=0, record_blocks=True, random_state=0)
    x = np.zeros(loss.n)
    for fun, after, block in zip(found.history.fun, found.history.fun[1:], found.history.block[1:], strict=False):
        g, H = loss.grad(x, block), loss.hess_bound(block)
        score = g @ np.linalg.pinv(H) @ g
        assert score >= (g @ g) / np.linalg.eigvalsh(H)[-1] * (1 - 1e-9)
        assert after <= fun - 0.5 * score + 1e-10 * abs(found.history.fun[0])
        x[block] -= np.linalg.pinv(H) @ g
    np.testing.assert_allclose(x, found.x, atol=1e-6)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("update", ["lb", "la", "hb", "newton", "pn"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_update_descends_to_the_minimiser(kind, update, fixed):
    loss = make(kind, **({} if kind == "quadratic" else {"l2": 0.5}))
    partition = "sort" if fixed else "variable"
    found = descend(loss, 5, partition=partition, update=update, max_iter=3000, tol=1e-7)
    reference = scipy.optimize.minimize(loss.value, np.zeros(loss.n), jac=loss.grad, tol=1e-10)
    assert found.converged, found.message
    np.testing.assert_allclose(found.x, reference.x, atol=1e-5)
    assert (np.diff(found.history.fun) <= 1e-12 * (1 + np.abs(found.history.fun[1:]))).all()


def test_the_estimates_of_la_never_exceed_twice_the_largest_curvature():
    loss = make("least squares")
    state = loss.state(np.zeros(loss.n))
    estimates = np.ones(loss.n)
    block = np.arange(6)
    g = state.g[block].copy()
    before = state.fun
    assert adaptive_step(state, Chosen(block, -1), estimates)
    estimate = estimates[0]
    assert (estimates[:6] == estimate).all()
    assert (estimates[6:] == 1).all()
    assert 1 <= estimate <= max(2 * np.linalg.eigvalsh(loss.hess_bound(block))[-1], 1)
    assert state.fun <= before - g @ g / (2 * estimate) + 1e-12


def test_newton_steps_of_a_logistic_loss_are_shortened_where_they_overshoot():
    A = np.array([[1.0], [1.0], [1.0]])
    loss = Logistic(A, np.array([1.0, 1.0, -1.0]))
    found = BlockCoordinateDescent(loss, 1, update="newton", tol=1e-10).minimize(np.array([-8.0]))
    assert found.x[0] == pytest.approx(np.log(2.0), abs=1e-9)
    assert (np.diff(found.history.fun) <= 0).all()


# --- the blocks and the rules --------------------------------------------------------------------------------------


def test_partitions_hold_every_coordinate_once_in_the_order_they_promise():
    loss = make("least squares", n=23)
    for rule in ("order", "sort", "avg", "sort_gershgorin"):
        blocks = partition(loss, rule, 5)
        assert [len(block) for block in blocks] == [5, 5, 5, 5, 3]
        np.testing.assert_array_equal(np.sort(np.concatenate(blocks)), np.arange(23))
    by_size = [loss.lipschitz[block] for block in partition(loss, "sort", 5)]
    assert all(one.max() <= other.min() for one, other in itertools.pairwise(by_size))
    first = partition(loss, "avg", 2)[0]
    assert set(loss.lipschitz[first]) == {loss.lipschitz.min(), loss.lipschitz.max()}


def test_fixed_blocks_are_scored_as_their_definitions_say():
    loss = make("least squares", n=23)
    state = loss.state(np.zeros(23))
    blocks = partition(loss, "sort", 5)
    fixed = FixedBlocks(blocks, loss)
    g, bounds = state.g, [loss.hess_bound(block) for block in blocks]
    np.testing.assert_allclose(fixed.lipschitz, [np.linalg.eigvalsh(H)[-1] for H in bounds])
    newton = [g[b] @ np.linalg.pinv(H) @ g[b] for b, H in zip(blocks, bounds, strict=True)]
    np.testing.assert_allclose(fixed.newton_scores(g), newton)
    expected = {
        "gs": [g[b] @ g[b] for b in blocks],
        "gsl": [g[b] @ g[b] / L for b, L in zip(blocks, fixed.lipschitz, strict=True)],
        "gsd": [(g[b] ** 2 / loss.lipschitz[b]).sum() for b in blocks],
        "gsq": newton,
    }
    for rule, scores in expected.items():
        found = descend(loss, 5, partition="sort", selection=rule, max_iter=1, record_blocks=True)
        np.testing.assert_array_equal(found.history.block[1], blocks[int(np.argmax(scores))], err_msg=rule)


def test_variable_blocks_hold_the_largest_scores():
    loss = make("least squares")
    g = loss.grad(np.zeros(loss.n))
    sums = np.abs(loss.hess_bound(np.arange(loss.n))).sum(1)
    expected = {
        ("gs", "lipschitz"): np.abs(g),
        ("gsd", "lipschitz"): g**2 / loss.lipschitz,
        ("gsl", "lipschitz"): g**2 / loss.lipschitz,
        ("gsd", "gershgorin"): g**2 / sums,
    }
    for (rule, bound), scores in expected.items():
        found = descend(loss, 4, selection=rule, gsd_bound=bound, max_iter=1, record_blocks=True)
        assert set(found.history.block[1]) == set(np.argsort(scores)[-4:])


def test_hard_thresholding_finds_better_blocks_than_the_diagonal_and_the_safeguard_never_hurts():
    shares = {"gsd": [], "iht": [], "safeguarded": []}
    for seed in range(20):
        A, rng = scaled_design(30, 12, seed)
        loss = LeastSquares(A, rng.standard_normal(30))
        state = loss.state(np.zeros(12))

        def score(block, state=state, loss=loss):
            return state.g[block] @ np.linalg.pinv(loss.hess_bound(block)) @ state.g[block]

        best = max(score(np.array(block)) for block in itertools.combinations(range(12), 3))
        shares["gsd"].append(score(np.argsort(state.g**2 / loss.lipschitz)[-3:]) / best)
        shares["iht"].append(score(thresholded_block(state, 3, False)) / best)
        shares["safeguarded"].append(score(thresholded_block(state, 3, True)) / best)
    better = np.maximum(shares["gsd"], shares["iht"])
    np.testing.assert_allclose(shares["safeguarded"], better)
    assert np.mean(shares["gsd"]) + 0.02 < np.mean(better) <= 1


def test_greedy_rules_rank_as_in_the_paper_where_blocks_are_small():
    final = {}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        A = (rng.standard_normal((100, 500)) + 1) * (10 * rng.standard_normal(500))
        A *= rng.random(A.shape) < 0.5
        loss = LeastSquares(A, A @ (rng.standard_normal(500) * (rng.random(500) < 0.1)))
        for rule in ("random", "gs", "gsd", "iht"):
            found = descend(loss, 3, selection=rule, max_iter=60, tol=0, random_state=0)
            final.setdefault(rule, []).append(found.fun / found.history.fun[0])
    means = [np.exp(np.mean(np.log(final[rule]))) for rule in ("random", "gs", "gsd", "iht")]
    assert (np.diff(means) < 0).all(), means


def test_rules_that_take_turns_visit_everything():
    loss = make("least squares", n=23)
    for rule in ("cyclic", "perm"):
        for blocks in ("variable", "order"):
            found = descend(loss, 5, partition=blocks, selection=rule, max_iter=5, tol=0, record_blocks=True)
            np.testing.assert_array_equal(np.sort(np.concatenate(found.history.block)), np.arange(23))


def test_lipschitz_sampling_prefers_steep_coordinates():
    loss = LeastSquares(np.diag([1.0, 1.0, 1.0, 3.0]), np.ones(4))
    state, rng = loss.state(np.zeros(4)), np.random.default_rng(0)
    single = FixedBlocks(partition(loss, "order", 1), loss)
    for choose in (
        variable_chooser("lipschitz", loss, 1, loss.steps, safeguard=True, rng=rng),
        fixed_chooser("lipschitz", single, loss.steps, estimated=False, rng=rng),
    ):
        drawn = np.concatenate([choose(state).block for _ in range(2000)])
        np.testing.assert_allclose(np.bincount(drawn) / 2000, [1 / 12, 1 / 12, 1 / 12, 9 / 12], atol=0.03)


# --- l1 and bounds -------------------------------------------------------------------------------------------------


def lasso_problem(seed=0, m=60, n=150):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((m, n)) * rng.lognormal(size=n)
    b = A @ (rng.standard_normal(n) * (rng.random(n) < 0.1)) + rng.standard_normal(m)
    return A, b, 0.1 * np.abs(A.T @ b).max()


@pytest.mark.parametrize("update", ["pn", "tmp", "lb", "la"])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_lasso_agrees_with_coordinate_descent(update, positive, sparse):
    A, b, l1 = lasso_problem()
    data = sp.csc_array(A) if sparse else A
    loss = NonnegativeL1LeastSquares(data, b, l1) if positive else LeastSquares(data, b, l1=l1)
    found = descend(loss, update=update, tol=1e-6, max_iter=5000)
    assert found.converged, found.message
    reference = Lasso(l1 / 60, fit_intercept=False, positive=positive, tol=1e-14, max_iter=10**6).fit(A, b).coef_
    np.testing.assert_allclose(found.x, reference, atol=1e-7)
    np.testing.assert_array_equal(found.x == 0, reference == 0)


def test_the_elastic_net_agrees_with_coordinate_descent():
    A, b, l1 = lasso_problem()
    found = BlockCoordinateDescent(LeastSquares(A, b, l1=l1, l2=5.0), 20, tol=1e-9).minimize()
    reference = ElasticNet((l1 + 5) / 60, l1_ratio=l1 / (l1 + 5), fit_intercept=False, tol=1e-14, max_iter=10**6)
    np.testing.assert_allclose(found.x, reference.fit(A, b).coef_, atol=1e-8)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_duality_gap_bounds_the_error_and_closes(sparse):
    A, b, l1 = lasso_problem()
    weights = np.full(150, l1)
    for change in ({}, {"l2": 2.0}, {"nonnegative": True}, {"free": True}):
        weights[0] = 0.0 if change.pop("free", False) else l1
        loss = LeastSquares(sp.csr_array(A) if sparse else A, b, l1=weights, **change)
        optimum = BlockCoordinateDescent(loss, tol=1e-9).minimize().fun
        state = loss.state(np.zeros(150))
        assert loss.duality_gap(state) >= state.fun - optimum
        found = BlockCoordinateDescent(loss, tol=0, gap_tol=1e-5).minimize()
        assert "duality gap" in found.message
        assert (found.history.gap >= found.history.fun - optimum - 1e-9).all()
        assert found.fun - optimum <= 1e-5


@pytest.mark.parametrize("update", ["pn", "tmp"])
def test_blocks_above_the_support_end_in_finitely_many_steps_where_projected_gradient_does_not(update):
    A, b, l1 = lasso_problem(3)
    loss = NonnegativeL1LeastSquares(A, b, l1)
    support = np.count_nonzero(BlockCoordinateDescent(loss, tol=1e-9).minimize().x)
    tol = 1e-12 * np.abs(A.T @ b).max()
    found = descend(loss, 2 * support, selection="gsq-nn", update=update, tol=tol, max_iter=60)
    assert found.converged, found.message
    slow = descend(loss, 2 * support, selection="gsq-nn", update="lb", tol=tol, max_iter=60)
    assert slow.history.residual[-1] > 1e6 * found.history.residual[-1]
    residual = found.history.residual
    assert residual[-1] < 1e-6 * residual[-2]  # the last step solves for the support exactly


def test_scores_of_the_l1_rule_are_the_decreases_of_single_coordinates():
    A, b, l1 = lasso_problem()
    rng = np.random.default_rng(0)
    for loss in (LeastSquares(A, b, l1=l1), NonnegativeL1LeastSquares(A, b, l1)):
        x = np.maximum(rng.standard_normal(150), 0) if loss.nonnegative else rng.standard_normal(150)
        scores = coordinate_scores("gsq-nn", loss.state(x), loss.steps)
        for i in range(0, 150, 29):
            along = lambda u, i=i, x=x, loss=loss: loss.objective(np.where(np.arange(150) == i, u, x))  # noqa: E731
            best = scipy.optimize.minimize_scalar(along, bounds=(0.0 if loss.nonnegative else -40.0, 40.0))
            decrease = along(x[i]) - min(best.fun, along(0.0))
            assert scores[i] == pytest.approx(decrease, rel=1e-3, abs=1e-6 * abs(along(x[i])))


@pytest.mark.parametrize("nonnegative", [False, True])
def test_both_forms_of_the_block_problem_are_solved_to_rounding(nonnegative):
    rng = np.random.default_rng(0)
    A = sp.random_array((40, 30), density=0.2, rng=rng, format="csc")
    columns = A.indptr, A.indices, A.data
    block = rng.permutation(30)[:20]
    weights, l2 = rng.random(40), np.full(20, 1e-3)
    x = np.abs(rng.standard_normal(20))
    g, l1 = rng.standard_normal(20), np.zeros(20) if nonnegative else rng.random(20) * (rng.random(20) < 0.8)
    dense = A.toarray()[:, block]
    H = dense.T @ (weights[:, None] * dense) + np.diag(l2)
    solutions = [
        minimise(model, x, l1, nonnegative, 0.0)
        for model in (DenseModel(H, g, x), ColumnModel(columns, block, weights, l2, g, x))
    ]
    for y in solutions:
        slope = g + H @ (y - x)
        assert not nonnegative or (y >= 0).all()
        on = y != 0 if nonnegative else (y != 0) | (l1 == 0)
        scale = np.abs(slope).max() + np.abs(y).max()
        np.testing.assert_allclose(slope[on], -(l1 * np.sign(y))[on], atol=1e-10 * scale)
        assert ((slope >= 0) if nonnegative else (np.abs(slope) <= l1))[~on].all()
    np.testing.assert_allclose(*solutions, rtol=1e-7, atol=1e-7)


def test_singular_systems_are_solved_in_the_range():
    B = np.random.default_rng(0).standard_normal((3, 5))
    H, rhs = B.T @ B, B.T @ np.ones(3)
    np.testing.assert_allclose(solve(H, rhs), np.linalg.pinv(H) @ rhs, atol=1e-9)
    np.testing.assert_allclose(pseudo_inverses(H), np.linalg.pinv(H), atol=1e-9)
    big = np.diag(np.arange(1.0, 101.0))
    assert largest_eigenvalues(big) == pytest.approx(100.0)


# --- the contract --------------------------------------------------------------------------------------------------


def test_the_result_keeps_the_contract_and_the_data_stay_as_they_are():
    A, b, l1 = lasso_problem()
    for data in (A.copy(), sp.csr_array(A), sp.coo_array(A), sp.csc_matrix(A.astype(np.float32))):
        kept, start = data.copy(), np.zeros(150)
        found = BlockCoordinateDescent(LeastSquares(data, b, l1=l1), tol=1e-3).minimize(start)
        solver_contract.check_result(found, start)
        assert (start == 0).all()
        assert abs(data - kept).max() == 0
        assert set(found.history) == {"iteration", "fun", "residual", "time", "block_size"}
    loss = LeastSquares(A, b)
    with pytest.warns(RuntimeWarning, match=r"max_iter reached; residual .* after 3 iterations"):
        found = BlockCoordinateDescent(loss, 5, max_iter=3).minimize()
    solver_contract.check_result(found)
    assert not found.success
    assert (np.diff(found.history.time) >= 0).all()


def test_the_same_seed_gives_the_same_descent_and_another_seed_another():
    loss = make("logistic")
    for rule in ("random", "perm", "lipschitz"):
        runs = [descend(loss, 3, selection=rule, max_iter=30, random_state=seed).x for seed in (0, 0, 1)]
        np.testing.assert_array_equal(runs[0], runs[1])
        assert (runs[0] != runs[2]).any()


def test_a_callback_watches_and_stops_but_cannot_write():
    seen = []

    def callback(iteration, x, fun):
        seen.append((iteration, fun))
        with pytest.raises(ValueError, match="read-only"):
            x[0] = 1.0
        return iteration == 4

    found = BlockCoordinateDescent(make("least squares"), 2, callback=callback).minimize()
    assert found.n_iterations == 4
    assert "callback" in found.message
    np.testing.assert_array_equal([fun for _, fun in seen], found.history.fun[1:])


def test_a_start_at_the_minimiser_is_recognised_at_once():
    found = BlockCoordinateDescent(LeastSquares(np.eye(3), np.ones(3)), 1).minimize(np.ones(3))
    assert found.converged
    assert found.n_iterations == 0


def test_columns_of_zeros_and_coordinates_without_curvature_do_no_harm():
    A = np.zeros((4, 3))
    A[:, 0] = 1.0
    for options in ({}, {"selection": "iht"}, {"partition": "sort", "selection": "gsq"}, {"update": "lb"}):
        found = descend(LeastSquares(A, np.ones(4)), 2, tol=1e-10, **options)
        np.testing.assert_allclose(found.x, [1.0, 0.0, 0.0], atol=1e-9)
    found = BlockCoordinateDescent(LeastSquares(A, np.ones(4), l1=0.5), update="lb").minimize(np.array([0.0, 3.0, 0.0]))
    np.testing.assert_allclose(found.x, [0.875, 0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LeastSquares(np.array([[np.nan]]), [1.0]), "A must be finite"),
        (lambda: LeastSquares(np.eye(2), [1.0]), r"b must have shape \(2,\), got \(1,\)"),
        (lambda: LeastSquares(np.ones(3), [1.0]), r"matrix with rows and columns, got shape \(3,\)"),
        (lambda: LeastSquares(np.eye(2), np.ones(2), l1=-1.0), "l1 must be at least 0, got -1"),
        (lambda: LeastSquares(np.eye(2), np.ones(2), l2=[1.0, -2.0]), "l2 must be at least 0, got -2"),
        (lambda: Logistic(np.eye(2), [0.0, 1.0]), "b must consist of -1 and 1"),
        (lambda: Softmax(np.eye(2), [0.5, 1.0]), "b must be a vector of labels"),
        (lambda: Softmax(np.eye(2), [0, 3], 3), "n_classes must be at least 2 and above the largest label, got 3"),
        (lambda: SparseQuadratic(np.array([[1.0, 2.0], [0.0, 1.0]]), np.ones(2)), "A must be symmetric"),
        (lambda: SparseQuadratic(np.diag([1.0, 0.0]), np.ones(2)), r"diagonal of A must be positive, A\[1, 1\] is 0"),
    ],
)
def test_bad_data_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
        ({"block_size": 25}, ValueError, "at most 24, got 25"),
        ({"block_size": 2.0}, TypeError, "block_size must be an integer"),
        ({"selection": "best"}, ValueError, "selection must be one of"),
        ({"update": "best"}, ValueError, "update must be one of"),
        ({"partition": "best"}, ValueError, "partition must be one of"),
        ({"partition": [np.arange(20)]}, ValueError, "each coordinate from 0 to 23 in exactly one block"),
        ({"partition": [np.arange(24.0)]}, ValueError, "vectors of integers"),
        ({"gsd_bound": "best"}, ValueError, "gsd_bound must be one of"),
        ({"max_iter": 0}, ValueError, "max_iter must be at least 1"),
        ({"tol": -1.0}, ValueError, "tol must be at least 0"),
        ({"gap_tol": 1.0}, ValueError, "gap_tol needs LeastSquares with l1"),
        ({"callback": 3}, TypeError, "callback must be callable"),
        ({"update": "tmp"}, ValueError, "update='tmp' is for l1 or bounds"),
        ({"update": "bp"}, TypeError, "update='bp' is for SparseQuadratic, got LeastSquares"),
        ({"selection": "greedy_tree"}, TypeError, "is for SparseQuadratic, got LeastSquares"),
        ({"selection": "iht", "partition": "sort"}, ValueError, "'iht' is for variable blocks"),
        ({"loss": 3}, TypeError, "loss must be a Loss, got 3"),
        ({"loss": make("quadratic"), "update": "bp"}, ValueError, "update='bp' needs forests"),
        ({"loss": make("quadratic"), "selection": "tree", "partition": "sort"}, ValueError, "makes its own blocks"),
        (
            {"loss": make("least squares", l1=1.0), "selection": "gsq"},
            ValueError,
            "without l1 and bounds, take 'gsq-nn'",
        ),
        ({"loss": make("least squares", l1=1.0), "update": "hb"}, ValueError, "without l1 and bounds, take 'pn'"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        BlockCoordinateDescent(**({"loss": make("least squares")} | change))


def test_bad_starts_are_named():
    descent = BlockCoordinateDescent(make("least squares", nonnegative=True))
    for x0, message in (
        (np.ones(3), "x0 must have shape"),
        (np.full(24, np.nan), "finite"),
        (-np.ones(24), "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            descent.minimize(x0)


def test_hard_thresholding_with_gradient_steps_is_warned_about_because_it_can_stall():
    with pytest.warns(RuntimeWarning, match="strongly coupled coordinates"):
        BlockCoordinateDescent(make("least squares"), 3, selection="iht", update="lb")


def test_blocks_with_cycles_are_refused_by_message_passing():
    loss = make("quadratic")
    with pytest.raises(ValueError, match="needs blocks without cycles"):
        BlockCoordinateDescent(loss, partition=[np.arange(24)], update="bp").minimize()
    blocks = tree_partition(loss.A)
    found = BlockCoordinateDescent(loss, partition=blocks, selection="gsd", update="bp", tol=1e-8, max_iter=5000)
    np.testing.assert_allclose(loss.A @ found.minimize().x, loss.b, atol=1e-7)


def test_an_objective_that_overflows_is_an_error_not_a_nan():
    descent = BlockCoordinateDescent(LeastSquares(np.array([[1e150]]), np.array([1e160])), 1)
    with pytest.raises(FloatingPointError, match="objective is inf at iteration 0"), np.errstate(over="ignore"):
        descent.minimize()
