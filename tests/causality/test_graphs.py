"""Simulation, repair and comparison of DAGs: against enumeration, closed forms and hand-made graphs."""

import itertools

import networkx as nx
import numpy as np
import pytest

from workingpapers.causality import (
    dag_metrics,
    sample_linear_sem,
    simulate_dag,
    simulate_linear_sem,
    to_cpdag,
    to_dag,
    topological_order,
    varsortability,
)


def all_dags(nodes):
    places = [(i, j) for i in range(nodes) for j in range(nodes) if i != j]
    for bits in itertools.product((0, 1), repeat=len(places)):
        A = np.zeros((nodes, nodes))
        A[tuple(np.array(places).T)] = bits
        if topological_order(A) is not None:
            yield A


def matrix(*edges, nodes):
    A = np.zeros((nodes, nodes))
    for i, j in edges:
        A[i, j] = 1.0
    return A


def test_cpdag_is_the_union_of_the_markov_equivalent_dags():
    # Verma and Pearl: DAGs are equivalent exactly when they share their skeleton and their colliders.
    classes = {}
    dags = list(all_dags(4))
    assert len(dags) == 543  # OEIS A003024
    for A in dags:
        joined = (A + A.T) != 0
        colliders = frozenset(
            (i, k, j)
            for k in range(4)
            for i, j in itertools.combinations(np.flatnonzero(A[:, k]), 2)
            if not joined[i, j]
        )
        classes.setdefault((joined.tobytes(), colliders), []).append(A)
    for members in classes.values():
        union = np.any(members, axis=0)
        for A in members:
            np.testing.assert_array_equal(to_cpdag(A), union)


def test_topological_order_agrees_with_networkx_and_finds_cycles():
    rng = np.random.default_rng(0)
    cyclic = 0
    for _ in range(200):
        A = (rng.uniform(size=(6, 6)) < 0.2) * rng.normal(size=(6, 6))
        order = topological_order(A)
        assert (order is None) == (not nx.is_directed_acyclic_graph(nx.DiGraph(A)))
        cyclic += order is None
        if order is not None:
            assert not np.tril(A[np.ix_(order, order)] != 0).any()
    assert 20 < cyclic < 180


@pytest.mark.parametrize("noise", ["gaussian", "exponential", "laplace", "gumbel"])
def test_samples_have_the_covariance_of_the_model(noise):
    W = simulate_dag(6, edges_per_node=1.5, random_state=3)
    deviations = np.linspace(0.5, 2.0, 6)
    X = sample_linear_sem(W, deviations, 200_000, noise=noise, random_state=0)
    Z = X @ (np.eye(6) - W)  # x = W' x + z
    np.testing.assert_allclose(np.cov(Z.T, bias=True), np.diag(deviations**2), atol=0.06)


def test_intercepts_move_the_means_along_the_edges():
    W = matrix((0, 1), (1, 2), nodes=3) * 2.0
    X = sample_linear_sem(W, 1e-9, 2, intercepts=[1.0, 0.0, -1.0], random_state=0)
    np.testing.assert_allclose(X, [[1.0, 2.0, 3.0]] * 2, atol=1e-6)


def test_erdos_renyi_graphs_have_the_edges_asked_for_in_a_random_order():
    graphs = [simulate_dag(30, "er", 4, random_state=seed) for seed in range(20)]
    assert np.mean([np.count_nonzero(W) for W in graphs]) == pytest.approx(120, abs=6)
    weights = np.abs(np.concatenate([W[W != 0] for W in graphs]))
    assert weights.min() >= 0.5
    assert weights.max() <= 2.0
    assert weights.mean() == pytest.approx(1.25, abs=0.03)
    below = np.mean([np.count_nonzero(np.tril(W)) / np.count_nonzero(W) for W in graphs])
    assert below == pytest.approx(0.5, abs=0.1)  # the labels do not give the order away


def test_scale_free_graphs_have_hubs():
    W = simulate_dag(100, "sf", 2, random_state=0)
    assert np.count_nonzero(W) == 2 * 98
    assert topological_order(W) is not None
    assert np.count_nonzero(W, axis=0).max() > 10  # edges lead to the older nodes
    assert np.count_nonzero(W, axis=1).max() == 2


def test_unequal_variances_are_drawn_from_the_papers_range():
    _, X = simulate_linear_sem(200, edges_per_node=0, variances="unequal", variance=4.0, samples=2000, random_state=0)
    variances = X.var(axis=0) / 4.0
    assert 0.4 < variances.min() < 1.5
    assert 9.0 < variances.max() < 11.5


def test_simulation_depends_on_the_seed_alone():
    (G, X), (H, Y), (_, other) = (simulate_linear_sem(5, random_state=seed) for seed in (1, 1, 2))
    assert nx.utils.graphs_equal(G, H)
    np.testing.assert_array_equal(X, Y)
    assert (other != X).any()


def test_to_dag_deletes_the_weakest_edges_one_by_one():
    rng = np.random.default_rng(0)
    for _ in range(50):
        W = rng.normal(size=(5, 5)).round(1)  # rounding makes ties
        expected = np.where(np.abs(W) <= 0.2, 0.0, W)
        while not nx.is_directed_acyclic_graph(nx.DiGraph(expected)):
            weakest = np.where(expected != 0, np.abs(expected), np.inf).argmin()
            expected.flat[weakest] = 0.0
        before = W.copy()
        np.testing.assert_array_equal(to_dag(W, 0.2), expected)
        np.testing.assert_array_equal(W, before)


def test_metrics_of_a_graph_made_by_hand():
    truth = matrix((0, 1), (1, 2), (0, 3), nodes=5)
    estimate = matrix((0, 1), (2, 1), (3, 4), nodes=5)  # one right, one reversed, one extra, one missing
    found = dag_metrics(nx.DiGraph(truth), estimate)
    assert (found.shd, found.nnz) == (3, 3)
    assert found.fdr == pytest.approx(2 / 3)
    assert found.tpr == pytest.approx(1 / 3)
    assert found.fpr == pytest.approx(2 / 7)  # 10 pairs, 3 of them joined
    assert dag_metrics(truth, truth).shd == 0


def test_reversing_an_edge_inside_the_equivalence_class_costs_nothing_on_cpdags():
    chain, turned = matrix((0, 1), (1, 2), nodes=3), matrix((1, 0), (1, 2), nodes=3)
    assert (dag_metrics(chain, turned).shd, dag_metrics(chain, turned).shd_cpdag) == (1, 0)
    collider = matrix((0, 1), (2, 1), nodes=3)
    assert (dag_metrics(chain, collider).shd, dag_metrics(chain, collider).shd_cpdag) == (1, 2)


def test_a_truth_with_a_cycle_has_no_equivalence_class():
    cycle = matrix((0, 1), (1, 2), (2, 0), nodes=3)
    found = dag_metrics(cycle, matrix((0, 1), nodes=3))
    assert found.shd == 2
    assert found.shd_cpdag is None


def test_varsortability_counts_paths_that_lead_to_larger_variances():
    chain = matrix((0, 1), (1, 2), nodes=3)
    assert varsortability(chain, [1.0, 2.0, 3.0]) == 1.0
    assert varsortability(chain, [3.0, 2.0, 1.0]) == 0.0
    assert varsortability(chain, [1.0, 1.0, 1.0]) == 0.5
    assert varsortability(chain, [1.0, 3.0, 2.0]) == pytest.approx(2 / 3)  # 0-1 and 0-1-2 rise, 1-2 falls
    G, X = simulate_linear_sem(20, edges_per_node=3, random_state=0)
    assert varsortability(G, X.var(axis=0)) > 0.9  # the warning in the module's docstring


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simulate_linear_sem(1), "nodes must be at least 2, got 1"),
        (lambda: simulate_linear_sem(4, "ring"), "graph must be one of 'er', 'sf', got 'ring'"),
        (lambda: simulate_linear_sem(4, edges_per_node=2), "edges_per_node must be at least 0 and at most 1.5"),
        (lambda: simulate_linear_sem(9, noise="cauchy"), "noise must be one of"),
        (lambda: simulate_linear_sem(9, variances="odd"), "variances must be one of"),
        (lambda: simulate_linear_sem(9, variance=0.0), "variance must be above 0"),
        (lambda: simulate_linear_sem(9, samples=0), "samples must be at least 1"),
        (lambda: simulate_dag(9, weights=(2.0, 0.5)), "at least 2, got 0.5"),
        (lambda: sample_linear_sem(np.ones((2, 2)), 1.0, 5), "W must be acyclic"),
        (lambda: sample_linear_sem(np.zeros((2, 2)), [1.0, -1.0], 5), "noise_std must be positive"),
        (lambda: to_dag(np.zeros((2, 3))), r"square matrix or a DiGraph, got shape \(2, 3\)"),
        (lambda: to_dag(np.full((2, 2), np.nan)), "W must be finite"),
        (lambda: to_dag(np.zeros((2, 2)), -1.0), "threshold must be at least 0"),
        (lambda: to_cpdag(np.ones((2, 2))), "W must be acyclic"),
        (lambda: dag_metrics(np.zeros((2, 2)), np.zeros((3, 3))), "W_est must have the shape"),
        (lambda: dag_metrics(np.zeros((2, 2)), np.ones((2, 2))), "W_est must be acyclic"),
        (lambda: varsortability(np.zeros((2, 2)), [1.0]), r"variances must have shape \(2,\)"),
        (lambda: varsortability(np.zeros((2, 2)), [1.0, -1.0]), "variances must be finite and positive"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
