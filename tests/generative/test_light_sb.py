"""Tests of the mathematics: each fails when the idea it names is removed."""

import math
import pickle

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from workingpapers.generative import LightSB, LightSBPotential, energy_distance

COVARIANCES = ["diag", "full"]


def potential(covariance="diag", components=4, d=3, epsilon=0.7, seed=0):
    """A potential with random parameters of every kind."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    model = LightSBPotential(draw(components, d), epsilon=epsilon, covariance=covariance, init_scale=0.6)
    with torch.no_grad():
        model.raw_log_weights += 0.5 * draw(components)
        model.log_scales += 0.3 * draw(*model.log_scales.shape)
    return model


def batch(n, d=3, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance_matrices(model):
    scales = model.scales.detach()
    return torch.diag_embed(scales) if model.covariance == "diag" else scales


def mixture(model):
    """v(y), normalised, built by torch.distributions."""
    components = torch.distributions.MultivariateNormal(model.means, model.epsilon * covariance_matrices(model))
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=model.log_weights), components, validate_args=False
    )


@pytest.fixture(scope="module")
def truth():
    """A bridge from N(0, I) whose plan is known, and unpaired samples of its ends."""
    model = potential(components=3, d=2, epsilon=1.0, seed=5)
    with torch.no_grad():
        model.means.mul_(3)
    generator = torch.Generator().manual_seed(0)
    x0, other = (torch.randn(4_000, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return model, x0, model.sample(other, generator)


@pytest.fixture(scope="module")
def fitted(truth):
    _, x0, x1 = truth
    return LightSB(6, epsilon=1.0, init_scale=1.0, max_iter=800, random_state=0).fit(x0.numpy(), x1.numpy())


# The closed forms


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_potential_is_the_mixture_of_torch_distributions(covariance):
    model, y = potential(covariance), batch(20)
    expected = mixture(model).log_prob(y) + model.log_weights.logsumexp(0)
    torch.testing.assert_close(model.log_potential(y), expected)


def test_normaliser_is_the_integral_of_the_potential_against_the_kernel():
    model, x = potential(d=1), torch.tensor([[-1.3], [0.0], [2.0]], dtype=torch.float64)
    y = torch.linspace(-40, 40, 40_001, dtype=torch.float64)[:, None]
    integrand = (x * y.T / model.epsilon + model.log_potential(y)).exp()
    torch.testing.assert_close(torch.trapezoid(integrand, y[:, 0]).log(), model.log_normaliser(x))


def test_plan_is_a_density_with_the_closed_form_moments():
    model, x = potential(d=1), torch.tensor([[0.8]], dtype=torch.float64)
    y = torch.linspace(-30, 30, 20_001, dtype=torch.float64)[:, None]
    density = model.log_plan(y, x.expand_as(y)).exp()
    integral = lambda values: torch.trapezoid(values, y[:, 0])  # noqa: E731
    mean, covariance = model.conditional_moments(x)
    torch.testing.assert_close(integral(density), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(integral(density * y[:, 0]), mean[0, 0])
    torch.testing.assert_close(integral(density * (y[:, 0] - mean[0, 0]) ** 2), covariance[0, 0, 0])


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_draws_have_the_closed_form_moments(covariance):
    model, x = potential(covariance), batch(2)
    mean, cov = model.conditional_moments(x)
    torch.testing.assert_close(mean, model.conditional_mean(x))
    draws = model.sample(x.repeat_interleave(40_000, 0), torch.Generator().manual_seed(0)).view(2, -1, 3)
    torch.testing.assert_close(draws.mean(1), mean, atol=0.03, rtol=0)
    for found, expected in zip(draws, cov, strict=True):
        torch.testing.assert_close(found.T.cov(), expected, atol=0.04, rtol=0.03)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_gradient_by_hand_is_autograd_s_and_accumulates(covariance):
    model, x0, x1 = potential(covariance), batch(30, seed=2), batch(20, seed=3)
    model.objective(x0, x1).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss = model.accumulate_gradient(x0, x1)
    torch.testing.assert_close(loss, model.objective(x0, x1).detach())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    model.accumulate_gradient(x0, x1)
    torch.testing.assert_close(model.means.grad, 2 * expected[1])


def test_full_covariance_without_correlations_is_the_diagonal_one():
    diagonal, full, x0, x1 = potential("diag"), potential("full"), batch(30, seed=2), batch(20, seed=3)
    with torch.no_grad():
        full.raw_log_weights.copy_(diagonal.raw_log_weights)
        full.means.copy_(diagonal.means)
        full.log_scales.copy_(torch.diag_embed(diagonal.log_scales))
    torch.testing.assert_close(full.accumulate_gradient(x0, x1), diagonal.accumulate_gradient(x0, x1))
    torch.testing.assert_close(full.means.grad, diagonal.means.grad)
    torch.testing.assert_close(full.log_scales.grad.diagonal(dim1=1, dim2=2), diagonal.log_scales.grad)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_scale_of_alpha_changes_nothing(covariance):
    model, x, y = potential(covariance), batch(10, seed=2), batch(10, seed=3)
    before = [model.objective(x, y), model.log_plan(y, x), model.conditional_mean(x), model.drift(x, 0.4)]
    with torch.no_grad():
        model.raw_log_weights += 3.0
    after = [model.objective(x, y), model.log_plan(y, x), model.conditional_mean(x), model.drift(x, 0.4)]
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_one_gaussian_is_optimal_at_the_known_plan_between_gaussians(covariance):
    # Cov(x, y) = (Σ0^½ (4 Σ0^½ Σ1 Σ0^½ + ε² I)^½ Σ0^-½ - ε I) / 2, and for one component L sees two moments only,
    # so that its gradient vanishes exactly on samples with exactly these moments.
    rng, epsilon, mean = np.random.default_rng(0), 0.7, np.array([1.0, -2.0])
    a0, a1 = rng.standard_normal((2, 2, 2))
    sigma0, sigma1 = a0 @ a0.T + np.eye(2), a1 @ a1.T + np.eye(2)
    if covariance == "diag":
        sigma0, sigma1 = np.diag(np.diag(sigma0)), np.diag(np.diag(sigma1))
    root = scipy.linalg.sqrtm(sigma0)
    inner = scipy.linalg.sqrtm(4 * root @ sigma1 @ root + epsilon**2 * np.eye(2))
    cross = (root @ inner @ np.linalg.inv(root) - epsilon * np.eye(2)) / 2
    scale = torch.from_numpy(np.linalg.solve(sigma0, cross))
    np.testing.assert_allclose(sigma1, scale.numpy() @ sigma0 @ scale.numpy() + epsilon * scale.numpy(), atol=1e-12)

    def sample(centre, sigma):
        raw = rng.standard_normal((50, 2))
        raw -= raw.mean(0)
        whitened = raw @ np.linalg.inv(np.linalg.cholesky(raw.T @ raw / 50)).T
        return torch.from_numpy(centre + whitened @ np.linalg.cholesky(sigma).T)

    model = LightSBPotential(torch.from_numpy(mean)[None], epsilon=epsilon, covariance=covariance)
    with torch.no_grad():
        if covariance == "diag":
            model.log_scales.copy_(scale.diagonal().log())
        else:
            factor = torch.linalg.cholesky(scale)
            model.log_scales.copy_(factor.tril(-1) + torch.diag(2 * factor.diagonal().log()))
    model.accumulate_gradient(sample(np.zeros(2), sigma0), sample(mean, sigma1))
    for parameter in model.parameters():
        torch.testing.assert_close(parameter.grad.abs().max().item(), 0.0, atol=1e-12, rtol=0)


# The process


def autograd_drift(model, x, t):
    """The paper's formula: -x/(1-t) + ε ∇ logsumexp_k(log α - ½log|S| - ½log|A| - r'S⁻¹r/2ε + ½h'A⁻¹h)."""
    x, scales, epsilon = x.clone().requires_grad_(), covariance_matrices(model), model.epsilon
    inverse = scales.inverse()
    a = t / (epsilon * (1 - t)) * torch.eye(x.shape[1], dtype=x.dtype) + inverse / epsilon
    pull = (inverse @ model.means[:, :, None])[:, :, 0]
    h = x[:, None, :] / (epsilon * (1 - t)) + pull / epsilon
    terms = (
        model.log_weights
        - scales.logdet() / 2
        - a.logdet() / 2
        - (model.means * pull).sum(1) / (2 * epsilon)
        + torch.einsum("nki,kij,nkj->nk", h, a.inverse(), h) / 2
    )
    (gradient,) = torch.autograd.grad(terms.logsumexp(1).sum(), x)
    return -x.detach() / (1 - t) + epsilon * gradient


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_drift_is_the_gradient_in_the_paper(covariance):
    model, x = potential(covariance), batch(8)
    for t in (0.0, 0.3, 0.9):
        torch.testing.assert_close(model.drift(x, t), autograd_drift(model, x, t), atol=1e-10, rtol=1e-10)
    times = torch.linspace(0, 0.9, 8, dtype=torch.float64)
    one_by_one = torch.cat([model.drift(x[i : i + 1], float(times[i])) for i in range(8)])
    torch.testing.assert_close(model.drift(x, times), one_by_one)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_drift_at_both_ends(covariance):
    model, x = potential(covariance), batch(8)
    torch.testing.assert_close(model.drift(x, 0.0), model.conditional_mean(x) - x)
    end = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model.log_potential(end).sum(), end)
    # the drift tends to ε ∇ log(v(x) exp(|x|² / 2ε)); the paper's form loses every digit this close to t = 1
    torch.testing.assert_close(model.drift(x, 1 - 1e-12), x + model.epsilon * slope)


def test_objective_measures_the_divergence_between_the_processes(truth):
    # L(θ) - L(θ*) = E log plan*/plan = E ∫ |g* - g|² / 2ε dt (Girsanov), along the true bridge
    model, _, _ = truth
    other = potential(components=4, d=2, epsilon=1.0, seed=8)
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randn(60_000, 2, generator=generator, dtype=torch.float64)
    x1 = model.sample(x0, generator)
    gap = other.objective(x0, x1) - model.objective(x0, x1)
    plans = (model.log_plan(x1, x0) - other.log_plan(x1, x0)).mean()
    torch.testing.assert_close(gap, plans)
    times = torch.rand(len(x0), generator=generator, dtype=torch.float64)
    state = model.sample_at(x0, times, generator)
    paths = ((model.drift(state, times) - other.drift(state, times)) ** 2).sum(1).mean() / (2 * model.epsilon)
    assert gap > 0.1
    assert abs(paths / gap - 1).item() < 0.03


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_simulated_paths_have_the_law_of_the_exact_draws(covariance):
    model, x = potential(covariance, d=2), batch(1_500, d=2)
    paths = model.trajectory(x, 40, torch.Generator().manual_seed(0))
    assert paths.shape == (1_500, 41, 2)
    torch.testing.assert_close(paths[:, 0], x)
    exact = [model.sample_at(x, t, torch.Generator().manual_seed(seed)) for t, seed in ((0.5, 1), (1.0, 2), (1.0, 3))]
    floor = energy_distance(exact[1], exact[2])
    assert energy_distance(paths[:, 20], exact[0]) < 3 * floor
    assert energy_distance(paths[:, 40], exact[1]) < 3 * floor
    assert energy_distance(x, exact[1]) > 20 * floor  # the distance would notice


def test_state_in_between_is_a_brownian_bridge_over_the_plan():
    model, x, t = potential(), batch(1).repeat(60_000, 1), 0.3
    mean, cov = model.conditional_moments(x[:1])
    state = model.sample_at(x, t, torch.Generator().manual_seed(0))
    torch.testing.assert_close(state.mean(0), ((1 - t) * x[:1] + t * mean)[0], atol=0.02, rtol=0)
    expected = t**2 * cov[0] + model.epsilon * t * (1 - t) * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(state.T.cov(), expected, atol=0.02, rtol=0.02)


# Units


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_change_of_units_keeps_the_plan(covariance):
    model, x, y = potential(covariance), batch(6, seed=2), batch(6, seed=3)
    origin0, origin1, unit = batch(1, seed=4)[0], batch(1, seed=5)[0], 2.5
    moved = model.in_units(origin0, origin1, unit, model.epsilon / unit**2)
    jacobian = 3 * math.log(unit)
    there = moved.log_plan((y - origin1) / unit, (x - origin0) / unit) - jacobian
    torch.testing.assert_close(there, model.log_plan(y, x))


def test_units_and_origin_of_the_data_do_not_matter(truth, fitted):
    _, x0, x1 = (value for value in truth)
    unit, origin0, origin1 = 40.0, torch.tensor([300.0, -100.0]), torch.tensor([50.0, 700.0])
    moved = clone(fitted).set_params(epsilon=unit**2).fit(origin0 + unit * x0, origin1 + unit * x1)
    expected = fitted.conditional_mean(x0[:50])
    torch.testing.assert_close(
        (moved.conditional_mean(origin0 + unit * x0[:50]) - origin1) / unit, expected, atol=1e-6, rtol=0
    )
    np.testing.assert_allclose(moved.scales_, fitted.scales_, rtol=1e-6)
    # and the loss is the objective of the samples as they were given
    for estimator, ends in ((fitted, (x0, x1)), (moved, (origin0 + unit * x0, origin1 + unit * x1))):
        assert abs(estimator.loss_curve_[-200:].mean() + estimator.score(*ends)) < 0.1


# Fitting


def test_fit_recovers_a_known_plan_better_than_other_models(truth, fitted):
    model, x0, _ = truth
    mean, cov = model.conditional_moments(x0[:500])
    found_mean, found_cov = fitted.conditional_moments(x0[:500])
    total = model.sample(x0, torch.Generator().manual_seed(9)).var(0).sum()
    assert ((found_mean - mean) ** 2).sum(1).mean() / total < 0.01
    assert (found_cov - cov).abs().mean() / cov.abs().mean() < 0.1
    fresh0 = batch(4_000, d=2, seed=11)
    fresh1 = model.sample(batch(4_000, d=2, seed=12), torch.Generator().manual_seed(13))
    assert fitted.marginal_error(fresh0, fresh1) < 0.01 * energy_distance(fresh0, fresh1)


def test_fit_recovers_the_plan_between_gaussians():
    rng, epsilon = np.random.default_rng(0), 0.5
    X0, X1 = rng.normal(0.0, 1.5, (5_000, 1)), rng.normal(2.0, 0.8, (5_000, 1))
    bridge = LightSB(1, epsilon, max_iter=500, batch_size=512, random_state=0).fit(X0, X1)
    variance0, variance1 = X0.var(), X1.var()
    cross = (math.sqrt(4 * variance0 * variance1 + epsilon**2) - epsilon) / 2
    scale = cross / variance0
    np.testing.assert_allclose(bridge.scales_, scale, rtol=0.05)
    np.testing.assert_allclose(bridge.means_ + scale * X0.mean(), X1.mean(), atol=0.05)
    # E|x - y|²/2 - ε H(y | x), all Gaussian
    transport = (variance0 + variance1 + (X0.mean() - X1.mean()) ** 2) / 2 - cross
    expected = transport - epsilon * 0.5 * math.log(2 * math.pi * math.e * epsilon * scale)
    assert abs(bridge.entropic_cost(X0, 5) - expected) < 0.03


def test_full_covariance_finds_a_plan_that_diagonal_cannot():
    model = potential("full", components=1, d=2, epsilon=0.5)
    with torch.no_grad():
        model.log_scales.copy_(torch.tensor([[[0.0, 0.0], [0.9, -1.5]]]))
    x0 = batch(3_000, d=2, seed=1)
    x1 = model.sample(batch(3_000, d=2, seed=2), torch.Generator().manual_seed(0))
    fits = {
        covariance: LightSB(1, 0.5, covariance, max_iter=400, random_state=0).fit(x0, x1) for covariance in COVARIANCES
    }
    np.testing.assert_allclose(fits["full"].scales_, model.scales.detach(), atol=0.1)
    assert fits["full"].score(x0, x1) > fits["diag"].score(x0, x1) + 0.1


def test_agrees_with_sinkhorn(truth, fitted):
    ot = pytest.importorskip("ot")
    _, x0, x1 = truth
    x, y = x0[:1_500].numpy(), x1[:1_500].numpy()
    cost = ot.dist(x, y) / 2
    plan = ot.sinkhorn(np.full(1_500, 1 / 1_500), np.full(1_500, 1 / 1_500), cost, reg=1.0)
    barycentres = 1_500 * plan @ y
    difference = ((fitted.conditional_mean(x) - barycentres) ** 2).sum(1).mean()
    assert difference < 0.03 * y.var(0).sum()


def test_warm_start_follows_a_decreasing_epsilon(truth):
    _, x0, x1 = truth
    annealed = LightSB(6, 1.0, init_scale=1.0, max_iter=150, warm_start=True, random_state=0)
    annealed.fit(x0, x1)
    before = annealed.means_.copy()
    annealed.set_params(epsilon=0.5, max_iter=1, lr=1e-9).fit(x0, x1)
    np.testing.assert_allclose(annealed.means_, before, atol=1e-6)
    annealed.set_params(max_iter=30, lr="auto").fit(x0, x1)
    cold = LightSB(6, 0.5, init_scale=1.0, max_iter=30, random_state=0).fit(x0, x1)
    assert annealed.score(x0, x1) > cold.score(x0, x1)
    with pytest.raises(ValueError, match=r"warm_start continues a fit with .*6.*, got .*7"):
        annealed.set_params(n_components=7).fit(x0, x1)


def test_small_epsilon_in_single_precision_stays_finite():
    rng = np.random.default_rng(0)
    X0, X1 = (rng.standard_normal((500, 2)).astype(np.float32) + 50 for _ in range(2))
    bridge = LightSB(50, 1e-3, max_iter=100, random_state=0).fit(X0, X1)
    assert bridge.loss_curve_.dtype == np.float32
    assert bridge.sample(X0).dtype == np.float32
    assert np.isfinite(bridge.loss_curve_).all()
    assert np.isfinite(bridge.drift(X0, 0.999)).all()


def test_energy_distance_is_scipy_s():
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal(30), rng.standard_normal(40) + 1
    found = energy_distance(X[:, None], Y[:, None])
    np.testing.assert_allclose(found, scipy.stats.energy_distance(X, Y) ** 2)


# The estimator


def test_same_seed_same_result_and_data_untouched(truth):
    X0, X1 = truth[1].numpy()[:200].copy(), truth[2].numpy()[:200].copy()
    kept0, kept1 = X0.copy(), X1.copy()
    first, second, third = (LightSB(3, max_iter=20, random_state=seed).fit(X0, X1) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.means_, second.means_)
    np.testing.assert_array_equal(first.sample(X0), second.sample(X0))
    assert (first.means_ != third.means_).any()
    assert (first.sample(X0, random_state=1) != first.sample(X0)).any()
    for method in (first.conditional_moments, first.trajectory, first.entropic_cost):
        method(X0)
    np.testing.assert_array_equal(X0, kept0)
    np.testing.assert_array_equal(X1, kept1)


def test_arrays_give_arrays_and_tensors_give_tensors(fitted):
    X = np.zeros((5, 2))
    shapes = {
        "sample": (5, 2),
        "conditional_mean": (5, 2),
        "transform": (5, 2),
        "trajectory": (5, 101, 2),
    }
    for method, shape in shapes.items():
        array, tensor = getattr(fitted, method)(X), getattr(fitted, method)(torch.from_numpy(X))
        assert isinstance(array, np.ndarray)
        assert isinstance(tensor, torch.Tensor)
        assert array.shape == shape
        np.testing.assert_array_equal(array, tensor)
    assert fitted.sample(X, 7).shape == (5, 7, 2)
    assert fitted.sample_at(X, 0.5).shape == fitted.drift(X, np.linspace(0, 0.5, 5)).shape == (5, 2)
    assert fitted.log_plan(X, X).shape == (5,)
    np.testing.assert_allclose(fitted.sample_at(X, 0.0), X)


def test_results_do_not_depend_on_the_chunks(fitted, monkeypatch):
    X = np.random.default_rng(0).standard_normal((9, 2))
    whole = fitted.conditional_moments(X), fitted.drift(X, np.linspace(0, 0.9, 9))
    monkeypatch.setattr("workingpapers.generative.light_sb.estimator._CHUNK", 40)
    parts = fitted.conditional_moments(X), fitted.drift(X, np.linspace(0, 0.9, 9))
    np.testing.assert_allclose(parts[0][1], whole[0][1])
    np.testing.assert_allclose(parts[1], whole[1])


def test_scikit_learn_conventions(fitted):
    copy = clone(fitted)
    assert copy.get_params()["max_iter"] == 800
    with pytest.raises(NotFittedError):
        copy.sample(np.zeros((1, 2)))
    assert fitted.n_features_in_ == 2
    assert fitted.weights_.shape == (6,)
    np.testing.assert_allclose(fitted.weights_.sum(), 1)
    X = np.zeros((3, 2))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).sample(X), fitted.sample(X))
    rng = np.random.default_rng(0)
    short = LightSB(2, max_iter=5, random_state=0)
    np.testing.assert_array_equal(
        short.fit_transform(rng.standard_normal((4, 2)), rng.standard_normal((4, 2))).shape, (4, 2)
    )


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"epsilon": 0.0}, ValueError, "epsilon must be above 0, got 0.0"),
        ({"epsilon": math.nan}, ValueError, "epsilon must be above 0"),
        ({"n_components": 0}, ValueError, "n_components must be at least 1"),
        ({"n_components": 2.5}, TypeError, "n_components must be an integer"),
        ({"n_components": 11}, ValueError, "n_components must be at most the 10 rows of X1, got 11"),
        ({"covariance": "tied"}, ValueError, "covariance must be one of 'diag', 'full', got 'tied'"),
        ({"init_scale": -1.0}, ValueError, "init_scale must be above 0"),
        ({"lr": 0.0}, ValueError, "lr must be above 0"),
        ({"lr": "adaptive"}, TypeError, "lr must be a number, got 'adaptive'"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of"),
        ({"max_iter": 0}, ValueError, "max_iter must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ],
)
def test_bad_parameters_are_named(parameters, error, message):
    X = np.random.default_rng(0).standard_normal((10, 2))
    with pytest.raises(error, match=message):
        LightSB(**({"n_components": 2, "max_iter": 1} | parameters)).fit(X, X)


@pytest.mark.parametrize(
    ("X0", "X1", "error", "message"),
    [
        (np.zeros((4, 2)), np.zeros((4, 3)), ValueError, "same width, got 2 and 3"),
        (np.full((4, 2), np.nan), np.zeros((4, 2)), ValueError, "X0 must be finite"),
        (np.zeros((4, 2)), np.full((4, 2), np.inf), ValueError, "X1 must be finite"),
        (np.zeros(4), np.zeros((4, 2)), ValueError, r"X0 must have shape \(n, d\)"),
        (np.zeros((4, 2)), np.zeros((0, 2)), ValueError, r"X1 must have shape \(n, d\)"),
        (np.array([["a", "b"]]), np.zeros((4, 2)), TypeError, "X0 must hold real numbers"),
        (torch.zeros(4, 2, dtype=torch.complex64), np.zeros((4, 2)), TypeError, "X0 must hold real numbers"),
    ],
)
def test_bad_samples_are_named(X0, X1, error, message):
    with pytest.raises(error, match=message):
        LightSB(2, max_iter=1).fit(X0, X1)


def test_bad_queries_are_named(fitted):
    X = np.zeros((3, 2))
    with pytest.raises(ValueError, match="X0 must have 2 columns as in fit, got 3"):
        fitted.sample(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="t must be at least 0 and below 1"):
        fitted.drift(X, 1.0)
    with pytest.raises(ValueError, match=r"t must be at least 0 and below 1, got -0\.1 to 0\.5"):
        fitted.drift(X, [0.0, 0.5, -0.1])
    with pytest.raises(ValueError, match=r"t must be a number or have shape \(3,\), got shape \(2,\)"):
        fitted.drift(X, [0.0, 0.5])
    with pytest.raises(ValueError, match="t must be at least 0 and at most 1"):
        fitted.sample_at(X, 1.1)
    with pytest.raises(ValueError, match="n must be at least 1"):
        fitted.sample(X, 0)
    with pytest.raises(ValueError, match="n_steps must be at least 1"):
        fitted.trajectory(X, 0)
    with pytest.raises(ValueError, match="Y and X0 must have as many rows, got 3 and 2"):
        fitted.log_plan(X, X[:2])
    with pytest.raises(ValueError, match="means must be a floating-point tensor"):
        LightSBPotential(torch.zeros(3), epsilon=1.0)


def test_a_step_that_is_too_long_is_an_error_not_a_nan(truth):
    with pytest.raises(FloatingPointError, match=r"iteration \d+ is not finite: is lr=1e\+06 too large"):
        LightSB(3, lr=1e6, max_iter=200, random_state=0).fit(truth[1], truth[2])


def test_an_expensive_spectrum_is_announced():
    model = LightSB(1, covariance="full")
    model.potential_ = LightSBPotential(torch.zeros(1, 2_200), epsilon=1.0)
    model.n_features_in_ = 2_200
    model.potential_.covariance = "full"
    model.potential_.drift = lambda x, t: x  # the message comes before the work
    with pytest.warns(RuntimeWarning, match="eigenvectors of 1 matrices of order 2200"):
        model.drift(np.zeros((1, 2_200)), 0.5)
