"""Tests of forests, message passing and the estimators."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, make_moons
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from workingpapers.optimization.block_coordinate import (
    BCDClassifier,
    BCDRegressor,
    BlockCoordinateDescent,
    LabelPropagationBCD,
    SparseQuadratic,
    forest_solve,
    greedy_forest,
    red_black_partition,
    tree_partition,
)


def random_forest_matrix(n, seed, edge=0.9):
    """A positive definite matrix whose graph is a random forest."""
    rng = np.random.default_rng(seed)
    children = np.array([i for i in range(1, n) if rng.random() < edge], dtype=int)
    parents = np.array([rng.integers(i) for i in children], dtype=int)
    shuffle = rng.permutation(n)
    values = rng.standard_normal(len(children))
    A = sp.coo_array((values, (shuffle[children], shuffle[parents])), shape=(n, n)).tocsr()
    A = A + A.T
    return sp.csr_array(A + sp.diags_array(np.abs(A).sum(axis=1) + rng.random(n) + 0.1)), rng


def lattice(side):
    return sp.csr_array(nx.to_scipy_sparse_array(nx.grid_2d_graph(side, side), dtype=float))


@pytest.mark.parametrize("n", [1, 2, 50, 4000])
def test_message_passing_is_the_direct_solution(n):
    A, rng = random_forest_matrix(n, n)
    b = rng.standard_normal(n)
    expected = sp.linalg.spsolve(A.tocsc(), b)
    np.testing.assert_allclose(forest_solve(A, b), np.atleast_1d(expected), rtol=1e-10, atol=1e-12)
    kept = A.copy()
    by_hand = [node for tree in nx.connected_components(nx.from_scipy_sparse_array(A)) for node in
               nx.bfs_tree(nx.from_scipy_sparse_array(A), min(tree))] if n <= 50 else None  # fmt: skip
    if by_hand is not None:
        np.testing.assert_allclose(forest_solve(A.toarray(), b, np.array(by_hand)), np.atleast_1d(expected), rtol=1e-9)
    assert abs(A - kept).max() == 0


def test_what_is_no_forest_is_refused_and_stored_zeros_are_no_edges():
    ring = sp.csr_array(nx.to_scipy_sparse_array(nx.cycle_graph(5), dtype=float)) + 3.0 * sp.eye_array(5)
    with pytest.raises(ValueError, match="must be a forest, it has a cycle"):
        forest_solve(ring, np.ones(5))
    with pytest.raises(ValueError, match="order must put each node after its parent"):
        forest_solve(ring, np.ones(5), np.arange(5))
    cut = sp.csr_array(ring)
    cut[0, 4] = cut[4, 0] = 0.0  # stays stored
    assert cut.nnz == 15
    np.testing.assert_allclose(cut @ forest_solve(cut, np.ones(5)), 1.0)


@pytest.mark.parametrize(
    ("A", "message"),
    [
        (np.ones((2, 3)), "square"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "positive definite"),
        (np.array([[1.0, np.inf], [np.inf, 1.0]]), "finite"),
        (np.array([[1.0, 2.0], [1.0, 9.0]]), "symmetric"),
        (np.array([[-1.0, 0.0], [0.0, 1.0]]), r"A\[0, 0\] is -1"),
    ],
)
def test_bad_matrices_are_named(A, message):
    with pytest.raises(ValueError, match=message):
        forest_solve(A, np.ones(2))


def test_bad_orders_and_priorities_are_named():
    with pytest.raises(ValueError, match="order must hold each of the integers"):
        forest_solve(np.eye(3), np.ones(3), np.array([0, 0, 1]))
    with pytest.raises(ValueError, match="b must have shape"):
        forest_solve(np.eye(3), np.ones(2))
    with pytest.raises(ValueError, match="priority must have shape"):
        greedy_forest(np.eye(3), np.ones(2))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_forests_have_no_cycle_and_nothing_can_be_added(seed):
    graph = nx.gnm_random_graph(120, 300, seed=seed)
    A = nx.to_scipy_sparse_array(graph, dtype=float)
    nodes = greedy_forest(A, np.random.default_rng(seed).random(120))
    assert nx.is_forest(graph.subgraph(nodes))
    for other in set(range(120)) - set(nodes):
        assert not nx.is_forest(graph.subgraph([*nodes, other]))


def test_greedy_forests_follow_the_priority():
    triangle = np.ones((3, 3))
    np.testing.assert_array_equal(greedy_forest(triangle, np.array([3.0, 1.0, 2.0])), [0, 2])
    np.testing.assert_array_equal(greedy_forest(triangle, np.array([1.0, 3.0, 2.0])), [1, 2])
    assert len(greedy_forest(lattice(30), np.random.default_rng(0).random(900))) > 450


@pytest.mark.parametrize("seed", range(3))
def test_partitions_are_forests_and_independent_sets(seed):
    graph = nx.gnm_random_graph(100, 350, seed=seed)
    A = nx.to_scipy_sparse_array(graph, dtype=float)
    priority = np.random.default_rng(seed).random(100)
    degree = max(dict(graph.degree).values())
    forests, colours = tree_partition(A, priority), red_black_partition(A, priority)
    for parts in (forests, colours):
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(100))
    assert all(nx.is_forest(graph.subgraph(part)) for part in forests)
    assert all(graph.subgraph(part).number_of_edges() == 0 for part in colours)
    assert len(forests) <= degree // 2 + 1
    assert len(colours) <= degree + 1
    assert len(red_black_partition(lattice(12), np.zeros(144))) == 2


# --- descents on graphs --------------------------------------------------------------------------------------------


def label_system(side, seed):
    W = lattice(side)
    rng = np.random.default_rng(seed)
    known = np.zeros(side * side, bool)
    known[rng.choice(side * side, side, replace=False)] = True
    L = sp.csr_array(sp.diags_array(W.sum(axis=1)) - W)
    return sp.csr_array(L[~known][:, ~known]), W[~known][:, known] @ (10 * rng.standard_normal(side))


@pytest.mark.parametrize("selection", ["greedy_tree", "greedy_tree_scaled", "random_tree", "tree", "red_black"])
def test_forest_blocks_reach_the_direct_solution(selection):
    A, b = label_system(15, 0)
    found = BlockCoordinateDescent(
        SparseQuadratic(A, b), selection=selection, tol=1e-8, max_iter=20_000, random_state=0, record_blocks=True
    ).minimize()
    np.testing.assert_allclose(found.x, sp.linalg.spsolve(A.tocsc(), b), atol=1e-6)
    x = np.zeros(len(b))
    graph = nx.from_scipy_sparse_array(A - sp.diags_array(A.diagonal()))
    for block in found.history.block[1:4]:
        assert nx.is_forest(graph.subgraph(block))
        rest = np.setdiff1d(np.arange(len(b)), block)
        x[block] = np.linalg.solve(A[block][:, block].toarray(), b[block] - A[block][:, rest] @ x[rest])
        np.testing.assert_allclose((A @ x - b)[block], 0.0, atol=1e-8)


def test_greedy_forests_need_fewer_iterations_than_the_other_blocks():
    gaps = {}
    for seed in range(3):
        A, b = label_system(15, seed)
        loss = SparseQuadratic(A, b)
        optimum = loss.value(sp.linalg.spsolve(A.tocsc(), b))
        for selection, update, size in (
            ("greedy_tree", "bp", "auto"),
            ("random_tree", "bp", "auto"),
            ("red_black", "bp", "auto"),
            ("gs", "hb", 6),
        ):
            found = BlockCoordinateDescent(
                loss, size, selection=selection, update=update, max_iter=30, tol=0, random_state=0
            ).minimize()
            gaps.setdefault(selection, []).append((found.fun - optimum) / abs(optimum))
    means = [np.exp(np.mean(np.log(gaps[rule]))) for rule in ("greedy_tree", "random_tree", "red_black", "gs")]
    assert (np.diff(means) > 0).all(), means


# --- estimators ----------------------------------------------------------------------------------------------------

EXPECTED = {"LabelPropagationBCD": {"check_classifiers_classes": "the label -1 stands for no label"}}


@parametrize_with_checks(
    [BCDRegressor(), BCDRegressor(alpha=0.1, l1_ratio=0.5, positive=True), BCDClassifier(), LabelPropagationBCD()],
    expected_failed_checks=lambda estimator: EXPECTED.get(type(estimator).__name__, {}),
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


def regression(seed=0, m=80, n=120):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((m, n)) * rng.lognormal(size=n) + 3.0 * rng.standard_normal(n)
    return X, X[:, :5] @ rng.standard_normal(5) + 7.0 + rng.standard_normal(m)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_the_regressor_is_the_lasso(sparse, positive):
    X, y = regression()
    model = BCDRegressor(0.3, positive=positive, tol=1e-10).fit(sp.csr_array(X) if sparse else X, y)
    reference = Lasso(0.3, positive=positive, tol=1e-12, max_iter=10**6).fit(X, y)
    np.testing.assert_allclose(model.coef_, reference.coef_, atol=1e-5)
    assert model.intercept_ == pytest.approx(reference.intercept_, abs=1e-4)
    assert model.n_iter_ < 60
    np.testing.assert_allclose(model.predict(sp.csr_array(X)), reference.predict(X), atol=1e-4)


def test_the_regressor_without_l1_is_ridge_regression():
    X, y = regression()
    model = BCDRegressor(0.3, l1_ratio=0.0, tol=1e-10).fit(X, y)
    reference = Ridge(0.3 * len(y)).fit(X, y)
    np.testing.assert_allclose(model.coef_, reference.coef_, atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_classifier_is_logistic_regression(classes, sparse):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((150, 8)) + 2.0
    names = np.array(["ant", "bee", "cat"])
    y = names[(X[:, :classes] + rng.standard_normal((150, classes))).argmax(axis=1)]
    data = sp.csr_array(X) if sparse else X
    model = BCDClassifier(0.01, tol=1e-8).fit(data, y)
    reference = LogisticRegression(C=1 / (0.01 * 150), tol=1e-10, max_iter=10_000).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(data), reference.predict_proba(X), atol=1e-5)
    np.testing.assert_array_equal(model.predict(data), reference.predict(X))
    assert model.coef_.shape == reference.coef_.shape
    sparse_model = BCDClassifier(0.02, l1_ratio=1.0, tol=1e-8).fit(data, y)
    assert 0 < np.count_nonzero(sparse_model.coef_) < sparse_model.coef_.size


def test_l1_logistic_regression_on_real_data_agrees_with_an_independent_solver():
    X, y = load_breast_cancer(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    model = BCDClassifier(0.01, l1_ratio=1.0, fit_intercept=False, tol=1e-9).fit(X, y)
    reference = LogisticRegression(
        C=1 / (0.01 * len(y)), l1_ratio=1.0, solver="liblinear", fit_intercept=False, tol=1e-10, max_iter=10_000
    ).fit(X, y)
    np.testing.assert_allclose(model.coef_, reference.coef_, atol=1e-4)
    assert 0 < np.count_nonzero(model.coef_) < 30


def test_estimators_say_when_they_have_not_converged():
    X, y = regression()
    with pytest.warns(ConvergenceWarning, match="max_iter reached"):
        BCDRegressor(0.01, tol=1e-12, max_iter=1).fit(X, y)
    with pytest.raises(ValueError, match="alpha must be at least 0, got -1"):
        BCDRegressor(-1.0).fit(X, y)


def test_unlabelled_nodes_are_the_means_of_their_neighbours():
    X, truth = make_moons(120, noise=0.05, random_state=0)
    y = np.full(120, -1)
    seen = np.random.default_rng(0).choice(120, 10, replace=False)
    y[seen] = truth[seen]
    model = LabelPropagationBCD(6, tol=1e-8, max_iter=20_000).fit(X, y)
    W = model._graph(X)
    means = (W @ model.label_distributions_) / np.asarray(W.sum(axis=1))[:, None]
    unknown = y == -1
    np.testing.assert_allclose(means[unknown], model.label_distributions_[unknown], atol=1e-6)
    np.testing.assert_allclose(model.label_distributions_.sum(axis=1), 1.0)
    assert (model.transduction_ == truth).mean() > 0.9
    assert (model.predict(X) == truth).mean() > 0.9
    again = clone(model).set_params(affinity="precomputed").fit(W.toarray(), y)
    np.testing.assert_allclose(again.label_distributions_, model.label_distributions_, atol=1e-8)


def test_nodes_that_no_label_reaches_get_the_shares_of_the_classes():
    W = np.zeros((5, 5))
    W[0, 1] = W[1, 0] = W[3, 4] = W[4, 3] = 1.0
    model = LabelPropagationBCD(affinity="precomputed").fit(W, [0, -1, 1, -1, -1])
    np.testing.assert_allclose(model.label_distributions_[1], [1.0, 0.0])
    np.testing.assert_allclose(model.label_distributions_[3:], 0.5)
    with pytest.raises(ValueError, match="label at least one node"):
        LabelPropagationBCD(affinity="precomputed").fit(W, [-1] * 5)
    with pytest.raises(ValueError, match="symmetric matrix of weights"):
        LabelPropagationBCD(affinity="precomputed").fit(-W, [0, -1, 1, -1, -1])
