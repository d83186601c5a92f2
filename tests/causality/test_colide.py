"""CoLiDE and its baselines: the mathematics first, then scikit-learn's contract and bad input."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import expm
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LassoLarsIC, LinearRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from workingpapers.causality import (
    CoLiDE,
    DAGMALinear,
    GolemEV,
    GolemNV,
    SortNRegress,
    dag_metrics,
    simulate_linear_sem,
    topological_order,
)
from workingpapers.causality.colide import base, batched, kernels
from workingpapers.causality.colide.baselines import residual_variances

FEW = {"stages": 1, "max_iter": 50, "tol": 0.0}  # iterations, so few that rounding does not grow


@pytest.fixture(scope="module")
def easy():
    """A graph of 8 nodes, and data from which it can be found."""
    return simulate_linear_sem(8, edges_per_node=1.5, samples=2000, random_state=4)


@pytest.fixture(scope="module")
def covariance(easy):
    _, X = easy
    return np.cov(X.T, bias=True)


def quietly(estimator, X):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(X)


def adam_on(objective, gradient_extra, W, iterations, *, beta1, lr, after=lambda W: None):
    """Plain Adam with the smooth part's gradient from automatic differentiation."""
    first, second = torch.zeros_like(W), torch.zeros_like(W)
    for t in range(1, iterations + 1):
        W = W.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(W), W)
        W = W.detach()
        gradient = gradient + gradient_extra(W)
        first = beta1 * first + (1 - beta1) * gradient
        second = 0.999 * second + 0.001 * gradient**2
        W = W - lr * (first / (1 - beta1**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        after(W)
    return W.numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@pytest.mark.parametrize("d", [1, 5, 24, 25, 32, 100])
def test_the_inverse_and_determinant_of_m_matrices(d):
    W = np.random.default_rng(d).normal(size=(d, d)) / np.sqrt(2.0 * d)
    A = np.eye(d) - W * W
    inverse = A.copy()
    logdet = kernels.invert_m_matrix(inverse, *kernels.inverse_scratch(d))
    np.testing.assert_allclose(inverse, np.linalg.inv(A), atol=1e-12)
    assert logdet == pytest.approx(np.linalg.slogdet(A)[1], abs=1e-12)


@pytest.mark.parametrize("d", [5, 40])
def test_elimination_recognises_the_edge_of_the_domain(d):
    W = np.random.default_rng(0).normal(size=(d, d))
    radius = np.abs(np.linalg.eigvals(W * W)).max()
    for s, inside in ((radius * 1.001, True), (radius * 0.999, False), (radius * 0.1, False)):
        A = s * np.eye(d) - W * W
        assert (np.linalg.inv(A) >= 0).all() == inside  # the definition
        assert np.isfinite(kernels.invert_m_matrix(A, *kernels.inverse_scratch(d))) == inside


@pytest.mark.parametrize("kind", ["fixed", "equal", "unequal"])
def test_the_compiled_loop_makes_the_iterations_of_a_plain_one(kind, easy, covariance):
    _, X = easy
    C, d, lam, mu, s = torch.tensor(covariance), 8, 0.07, 0.5, 0.9
    deviations = C.diagonal().sqrt()
    sigma = {"fixed": torch.ones(d), "equal": deviations.min().expand(d), "unequal": deviations}[kind].clone()
    eye = torch.eye(d, dtype=torch.float64)

    def smooth(W):  # mu S + h without the l1 term, sigma held
        residual = torch.trace((eye - W).T @ C @ (eye - W) @ torch.diag(1 / sigma.double()))
        return mu * residual / 2 + d * np.log(s) - torch.logdet(s * eye - W * W)

    def refresh(W):
        square = ((eye - W).T @ C @ (eye - W)).diagonal()
        if kind != "fixed":
            sigma[:] = (square.mean() if kind == "equal" else square).sqrt()

    start = torch.zeros((d, d), dtype=torch.float64)
    expected = adam_on(smooth, lambda W: mu * lam * W.sign(), start, 50, beta1=0.99, lr=1e-2, after=refresh)
    options = {"lam": lam, "mu": mu, "s": s, "lr": 1e-2} | FEW
    found = quietly(DAGMALinear(**options) if kind == "fixed" else CoLiDE(kind, **options), X)
    np.testing.assert_allclose(found.raw_adjacency_, expected, atol=1e-10)
    if kind != "fixed":
        np.testing.assert_allclose(np.broadcast_to(found.noise_std_, d), sigma, atol=1e-10)
    W = torch.tensor(found.raw_adjacency_)
    objective = smooth(W) + mu * (lam * W.abs().sum() + (0.0 if kind == "fixed" else sigma.sum() / 2))
    assert found.objective_path_[-1] == pytest.approx(float(objective), rel=1e-10)


@pytest.mark.parametrize("kind", ["equal", "unequal"])
def test_golem_makes_the_iterations_of_a_plain_loop(kind, easy, covariance):
    C, d = torch.tensor(covariance), 8
    eye = torch.eye(d, dtype=torch.float64)

    def smooth(W):
        W = W - torch.diag(W.diagonal())
        square = ((eye - W).T @ C @ (eye - W)).diagonal()
        likelihood = d * square.sum().log() if kind == "equal" else square.log().sum()
        acyclic = torch.trace(torch.linalg.matrix_exp(W * W)) - d
        return likelihood / 2 - torch.linalg.slogdet(eye - W).logabsdet + 5.0 * acyclic

    start = torch.full((d, d), 0.1, dtype=torch.float64) - 0.1 * eye
    expected = adam_on(smooth, lambda W: 0.02 * W.sign(), start, 40, beta1=0.9, lr=1e-2)
    W, which = start.numpy().copy(), kernels.EQUAL if kind == "equal" else kernels.UNEQUAL
    first, second = np.zeros((d, d)), np.zeros((d, d))
    for begin, end in ((0, 25), (25, 40)):  # in two pieces, as the estimator does
        kernels.golem_steps(W, first, second, covariance, 1e-9, which, 0.02, 5.0, 1e-2, begin, end)
    np.testing.assert_allclose(W, expected, atol=1e-9)


def test_the_exponential_agrees_with_scipy():
    A = np.random.default_rng(0).uniform(size=(12, 12))
    power = np.empty((12, 12))
    kernels.exponential(A, power, np.empty((12, 12)))
    np.testing.assert_allclose(power, expm(A), rtol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# The method


@pytest.mark.parametrize("variances", ["equal", "unequal"])
def test_finds_the_graph_its_weights_and_the_noise(variances, easy):
    truth, X = easy
    found = CoLiDE(variances).fit(3.0 * X)
    assert dag_metrics(truth, found.adjacency_).shd == 0
    np.testing.assert_allclose(found.noise_std_, 3.0, rtol=0.15)
    assert found.converged_
    assert list(np.unique(found.stage_)) == [1, 2, 3, 4]
    assert (np.diff(found.order_[np.argsort(found.order_)]) == 1).all()
    assert not np.tril(found.adjacency_[np.ix_(found.order_, found.order_)]).any()


def test_the_scale_is_the_closed_form_of_the_weights(easy, covariance):
    _, X = easy
    for variances in ("equal", "unequal"):
        found = CoLiDE(variances).fit(X)
        squares = residual_variances(found.raw_adjacency_, covariance)
        expected = np.sqrt(squares.mean() if variances == "equal" else squares)
        np.testing.assert_allclose(found.noise_std_, expected, rtol=1e-9)


@pytest.mark.parametrize("variances", ["equal", "unequal"])
def test_scaling_the_data_scales_lam_and_mu_as_the_docstring_says(variances, easy):
    _, X = easy
    scaled = CoLiDE(variances, lam=0.2).fit(4.0 * X)
    moved = CoLiDE(variances, lam=0.05, mu=4.0).fit(X)
    np.testing.assert_allclose(scaled.raw_adjacency_, moved.raw_adjacency_, atol=1e-10)
    np.testing.assert_allclose(scaled.noise_std_, 4.0 * np.asarray(moved.noise_std_), rtol=1e-10)
    lam_alone = CoLiDE(variances, lam=0.2).fit(X)
    assert np.abs(scaled.raw_adjacency_ - lam_alone.raw_adjacency_).max() > 0.01


def test_dagma_needs_the_square_of_the_scale(easy):
    _, X = easy
    scaled, moved = quietly(DAGMALinear(lam=0.32), 4.0 * X), quietly(DAGMALinear(lam=0.02, mu=16.0), X)
    np.testing.assert_allclose(scaled.raw_adjacency_, moved.raw_adjacency_, atol=1e-10)


def test_standardise_scale_removes_the_unit_of_the_data(easy):
    _, X = easy
    one, other = (CoLiDE(standardise_scale=True).fit(unit * X) for unit in (1.0, 1 / 64))
    np.testing.assert_allclose(one.raw_adjacency_, other.raw_adjacency_, atol=1e-10)
    np.testing.assert_allclose(one.noise_std_, 64.0 * other.noise_std_, rtol=1e-10)


@pytest.mark.parametrize("variances", ["equal", "unequal"])
def test_a_column_that_is_a_function_of_others_leaves_a_finite_answer(variances):
    _, X = simulate_linear_sem(4, edges_per_node=0.5, samples=300, random_state=0)
    X = np.column_stack([X, X[:, 0] - 2.0 * X[:, 1]])
    found = quietly(CoLiDE(variances, scale_floor=0.5), X)
    assert np.isfinite(found.raw_adjacency_).all()
    assert np.min(found.noise_std_) >= 0.5 * X.std(axis=0).min() * (1 - 1e-12)
    if variances == "unequal":
        assert np.min(found.noise_std_) == pytest.approx(0.5 * X.std(axis=0).min())


def test_a_step_too_long_for_the_first_stage_is_halved_inside_the_domain(covariance):
    W, sigma = np.zeros((8, 8)), np.sqrt(np.diag(covariance))
    path = np.empty(3)
    arguments = (covariance, 1e-9, kernels.UNEQUAL, 0.05, 1.0, 1.0, 0.7, 200, 0.0, 100, path)
    ended, iterations, checkpoints = kernels.minimise_stage(W, sigma, *arguments)
    assert (ended, iterations, checkpoints) == (kernels.OUT_OF_ITERATIONS, 200, 2)
    assert np.abs(np.linalg.eigvals(W * W)).max() < 1.0
    assert np.isfinite(path[:2]).all()
    W = np.zeros((8, 8))  # with s <= 0.9 the same step fails the stage
    ended, *_ = kernels.minimise_stage(W, sigma, *arguments[:5], 0.9, *arguments[6:])
    assert ended == kernels.LEFT_DOMAIN


def test_a_failed_stage_is_restarted_from_its_start_with_a_shorter_step(easy):
    _, X = easy
    options = {"stages": 1, "max_iter": 300, "tol": 0.0, "checkpoint": 100}
    found = quietly(CoLiDE(s=0.6, lr=0.5, **options), X)
    assert found.n_restarts_ > 0
    by_hand = quietly(CoLiDE(s=0.6 + 0.1 * found.n_restarts_, lr=0.5 / 2**found.n_restarts_, **options), X)
    np.testing.assert_allclose(found.raw_adjacency_, by_hand.raw_adjacency_, atol=1e-8)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_when_no_restart_helps_the_last_good_stage_stands_and_a_warning_says_so(backend, easy, monkeypatch):
    _, X = easy
    for module in (base, batched):
        monkeypatch.setattr(module, "MAX_RESTARTS", 1)
    options = {"lr": 0.5, "max_iter": 200, "checkpoint": 100, "backend": backend}
    with pytest.warns(ConvergenceWarning, match="stage 2 left the domain of the acyclicity function in each of 1 rest"):
        found = CoLiDE(s=(1.0, 0.1), stages=3, **options).fit(X)
    assert not found.converged_
    assert found.n_restarts_ == 1
    assert set(found.stage_) == {1}
    np.testing.assert_array_equal(found.raw_adjacency_, quietly(CoLiDE(stages=1, **options), X).raw_adjacency_)


def test_running_out_of_iterations_is_a_warning_and_an_attribute(easy):
    _, X = easy
    with pytest.warns(ConvergenceWarning, match="CoLiDE did not converge: stage 4 .* up to iteration 10"):
        found = CoLiDE(max_iter=10).fit(X)
    assert not found.converged_
    assert found.n_iter_ == 40
    with pytest.warns(ConvergenceWarning, match="GOLEM did not converge"):
        assert not GolemEV(max_iter=10).fit(X).converged_


def test_a_covariance_is_enough(easy, covariance):
    _, X = easy
    by_data, by_covariance = CoLiDE().fit(X), CoLiDE().fit_cov(covariance, n_samples=len(X))
    np.testing.assert_allclose(by_data.adjacency_, by_covariance.adjacency_, atol=1e-3)
    assert by_covariance.n_features_in_ == 8
    assert by_data.score(X) == pytest.approx(by_covariance.score(X - X.mean(axis=0)), abs=1e-3)


def test_score_is_the_negative_unpenalised_score(easy):
    _, X = easy
    train, test = X[:1000], X[1000:]
    found = CoLiDE("equal").fit(train)
    R = np.eye(8) - found.adjacency_
    centred = test - train.mean(axis=0)
    C = centred.T @ centred / len(test)
    expected = -np.trace(R.T @ C @ R) / (2 * found.noise_std_) - 8 * found.noise_std_ / 2
    assert found.score(test) == pytest.approx(expected)
    empty = quietly(CoLiDE("equal", lam=100.0, max_iter=1000), train)
    assert not empty.adjacency_.any()
    assert found.score(test) > empty.score(test)


def test_names_of_a_data_frame_reach_the_graph(easy):
    truth, X = easy
    names = [f"gene {k}" for k in range(8)]
    frame = pd.DataFrame(X, columns=names)
    found = CoLiDE().fit(frame)
    graph = found.to_networkx()
    assert set(graph.edges) == {(names[i], names[j]) for i, j in truth.edges}
    i, j = next(iter(truth.edges))
    assert graph[names[i]][names[j]]["weight"] == found.adjacency_[i, j]
    assert set(found.to_networkx(range(8)).edges) == set(truth.edges)
    with pytest.raises(ValueError, match="feature_names must be 8 different names"):
        found.to_networkx(["a"] * 8)


# ---------------------------------------------------------------------------------------------------------------------
# The torch backend


@pytest.mark.parametrize("variances", ["equal", "unequal"])
def test_data_sets_side_by_side_in_torch_get_what_they_get_one_by_one(variances):
    datasets = [simulate_linear_sem(6, edges_per_node=1, samples=100 + seed, random_state=seed)[1] for seed in range(3)]
    # Long steps: those of the first stage are halved, the second stage is restarted, and some converge early.
    options = {"lr": 0.7, "s": (1.0, 0.2), "stages": 2, "max_iter": (60, 200), "checkpoint": 20, "tol": 1e-3}
    one_by_one = [quietly(CoLiDE(variances, **options), X) for X in datasets]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        together = CoLiDE(variances, backend="torch", device="cpu", **options).fit_many(datasets)
    assert len({model.n_restarts_ for model in one_by_one}) > 1  # each goes its own way
    for one, other in zip(one_by_one, together, strict=True):
        np.testing.assert_allclose(other.raw_adjacency_, one.raw_adjacency_, atol=1e-9)
        np.testing.assert_allclose(other.objective_path_, one.objective_path_, rtol=1e-9)
        np.testing.assert_allclose(other.noise_std_, one.noise_std_, rtol=1e-9)
        assert (other.n_restarts_, other.n_iter_, other.converged_) == (one.n_restarts_, one.n_iter_, one.converged_)


def test_fit_many_leaves_the_estimator_as_it_is(easy):
    _, X = easy
    estimator = CoLiDE(max_iter=1000)
    with pytest.warns(ConvergenceWarning):
        first, second = estimator.fit_many([X, 2.0 * X])
    assert not hasattr(estimator, "adjacency_")
    np.testing.assert_array_equal(first.adjacency_, quietly(CoLiDE(max_iter=1000), X).adjacency_)
    assert (first.noise_std_ != second.noise_std_).all()
    with pytest.raises(ValueError, match=r"same number of columns for the torch backend, got \[7, 8\]"):
        CoLiDE(backend="torch").fit_many([X, X[:, :7]])
    assert CoLiDE(backend="torch").fit_many([]) == []


# ---------------------------------------------------------------------------------------------------------------------
# Baselines


def test_dagma_agrees_with_its_authors_package(easy):
    linear = pytest.importorskip("dagma.linear", reason="pip install 'workingpapers[peers]'")
    _, X = easy
    theirs = linear.DagmaLinear("l2").fit(X.copy(), w_threshold=0.0, T=2, warm_iter=1500, max_iter=1500, lr=1e-3)
    ours = quietly(DAGMALinear(stages=2, max_iter=1500, lr=1e-3), X)
    np.testing.assert_allclose(ours.raw_adjacency_, theirs, atol=1e-4)  # sign(W) amplifies rounding at 0


def test_golem_nv_starts_from_the_solution_of_golem_ev(easy, covariance):
    truth, X = easy
    ev, nv = quietly(GolemEV(max_iter=5000), X), quietly(GolemNV(max_iter=5000), X)
    assert dag_metrics(truth, ev.adjacency_).shd == 0
    assert dag_metrics(truth, nv.adjacency_).shd == 0
    standing = quietly(GolemNV(max_iter=1, lr=1e-12, lam_start=1e9), X)  # no step to speak of, from W = 0
    np.testing.assert_allclose(standing.noise_std_, X.std(axis=0))
    np.testing.assert_allclose(nv.noise_std_, 1.0, rtol=0.15)
    assert ev.noise_std_ == pytest.approx(np.sqrt(residual_variances(ev.raw_adjacency_, covariance).mean()))


def test_sorting_and_regressing_agrees_with_scikit_learn():
    _, X = simulate_linear_sem(7, edges_per_node=2, samples=300, random_state=2)
    X = X - X.mean(axis=0)
    order = np.argsort(X.var(axis=0))
    expected = np.zeros((7, 7))
    for place in range(1, 7):
        before, node = order[:place], order[place]
        weight = np.abs(LinearRegression().fit(X[:, before], X[:, node]).coef_)
        lasso = LassoLarsIC(criterion="bic").fit(X[:, before] * weight, X[:, node])
        expected[before, node] = lasso.coef_ * weight
    np.testing.assert_allclose(SortNRegress(threshold=0.0).fit(X).adjacency_, expected, atol=1e-8)


def test_sorting_fails_without_the_scales_and_needs_samples():
    truth, X = simulate_linear_sem(10, edges_per_node=2, random_state=0)
    assert dag_metrics(truth, SortNRegress().fit(X).adjacency_).shd <= 2
    assert dag_metrics(truth, SortNRegress(0.1).fit(X / X.std(axis=0)).adjacency_).shd >= 8
    with (
        pytest.warns(UserWarning, match="10 variables"),
        pytest.raises(ValueError, match="more samples than variables, got 9 of 10"),
    ):
        SortNRegress().fit(X[:9])


# ---------------------------------------------------------------------------------------------------------------------
# scikit-learn's contract, and bad input

SHORT = {"max_iter": 300}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks(
    [
        CoLiDE(**SHORT),
        CoLiDE("equal", backend="torch", max_iter=5, checkpoint=5),
        DAGMALinear(**SHORT),
        GolemEV(**SHORT),
        GolemNV(**SHORT),
        SortNRegress(),
    ]
)
def test_scikit_learns_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", [CoLiDE(), DAGMALinear(), GolemNV(max_iter=100), SortNRegress()])
def test_the_same_data_give_the_same_graph_and_stay_as_they_are(estimator, easy):
    _, X = easy
    before = X.copy()
    first = quietly(estimator, X).raw_adjacency_.copy()
    np.testing.assert_array_equal(X, before)
    np.testing.assert_array_equal(quietly(estimator, np.asfortranarray(X)).raw_adjacency_, first)


def test_fewer_samples_than_variables_is_a_warning(easy):
    _, X = easy
    with pytest.warns(UserWarning, match="X has 7 samples of 8 variables"):
        found = quietly(CoLiDE(max_iter=1000), X[:7])
    assert topological_order(found.adjacency_) is not None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"variances": "odd"}, ValueError, "variances must be one of 'equal', 'unequal', got 'odd'"),
        ({"backend": "jax"}, ValueError, "backend must be one of"),
        ({"lam": -0.1}, ValueError, "lam must be at least 0"),
        ({"lam": "0.1"}, TypeError, "lam must be a number"),
        ({"threshold": np.nan}, ValueError, "threshold must be at least 0"),
        ({"stages": 0}, ValueError, "stages must be at least 1"),
        ({"mu": 0.0}, ValueError, "mu must be above 0"),
        ({"mu_factor": 1.5}, ValueError, "mu_factor must be above 0 and at most 1"),
        ({"s": (1.0, -0.5)}, ValueError, "s must be above 0"),
        ({"s": ()}, ValueError, "s must be a number or a sequence of numbers"),
        ({"max_iter": (1, 2, 3)}, ValueError, "max_iter must be an integer or"),
        ({"max_iter": 0}, ValueError, "max_iter must be at least 1"),
        ({"max_iter": 1.5}, TypeError, "max_iter must be an integer"),
        ({"lr": 0.0}, ValueError, "lr must be above 0"),
        ({"tol": -1.0}, ValueError, "tol must be at least 0"),
        ({"checkpoint": 0}, ValueError, "checkpoint must be at least 1"),
        ({"scale_floor": 0.0}, ValueError, "scale_floor must be above 0"),
        ({"random_state": "zero"}, ValueError, "zero"),
    ],
)
def test_bad_parameters_are_named_before_any_work(change, error, message):
    with pytest.raises(error, match=message):
        CoLiDE(**change).fit(np.full((3, 2), np.nan))


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.array([[1.0, 2.0], [np.nan, 0.0]]), "NaN"),
        (np.array([[1.0, 2.0], [np.inf, 0.0]]), "infinity"),
        (np.ones((1, 3)), "minimum of 2"),
        (np.ones((3, 1)), "minimum of 2"),
        (np.array([[1.0, 2.0, 3.0], [1.0, 0.0, 1.0]]), "column 0 is constant"),
        (pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 3.0]}), "column b is constant"),
        (np.array([[1.0, 0.0], [0.0, 1e-200]]), "column 1 is constant"),
        (np.array([[1.0, 0.0], [0.0, 1e200]]), "the covariance of X must be finite"),
    ],
)
def test_bad_data_are_named(X, message):
    with pytest.raises(ValueError, match=message):
        CoLiDE().fit(X)


@pytest.mark.parametrize(
    ("C", "n_samples", "message"),
    [
        (np.ones((2, 3)), 10, r"C must be a square matrix .* got shape \(2, 3\)"),
        (np.ones((1, 1)), 10, r"C must be at least 2 x 2"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), 10, "C must be symmetric"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), 10, "C must be positive semidefinite"),
        (np.diag([1.0, 0.0]), 10, "positive diagonal"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), 10, "C must be finite"),
        (np.eye(2), 1, "n_samples must be at least 2"),
    ],
)
def test_bad_covariances_are_named(C, n_samples, message):
    with pytest.raises(ValueError, match=message):
        CoLiDE().fit_cov(C, n_samples)
