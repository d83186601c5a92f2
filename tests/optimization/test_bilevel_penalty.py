"""Tests of the penalty method for bilevel problems: ψ_σ and its gradient, both algorithms, and what must fail aloud."""

from __future__ import annotations

import io
import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from solver_contract import check_result
from workingpapers.optimization.bilevel_penalty import (
    BilevelResult,
    Decay,
    PenaltyBilevel,
    penalty_gradient,
    penalty_value,
    projections,
)

DOUBLE = torch.float64


class Quadratic:
    """f = ½|y - t|² + ½|x - a|² over g = ½|C y - B x|²: C has fewer rows than columns, so g has many minimisers."""

    def __init__(self, m=3, n=6, p=4, seed=2, dtype=DOUBLE):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)  # noqa: E731
        self.C, self.B, self.t, self.a = draw(m, n), draw(m, p), draw(n), draw(p)
        self.identity, self.pinv = torch.eye(n, dtype=dtype), torch.linalg.pinv(self.C)
        self.lipschitz = float(torch.linalg.matrix_norm(self.C, 2)) ** 2
        pull = self.pinv @ self.B
        self.hessian = torch.eye(p, dtype=dtype) + pull.T @ pull  # of ψ
        self.right = pull.T @ (self.pinv @ (self.C @ self.t)) + self.a
        self.optimum = torch.linalg.solve(self.hessian, self.right)
        self.lr_x = float(1 / torch.linalg.eigvalsh(self.hessian)[-1])
        self.x0, self.y0 = torch.zeros(p, dtype=dtype), torch.zeros(n, dtype=dtype)

    def f(self, x, y):
        return (y - self.t).square().sum() / 2 + (x - self.a).square().sum() / 2

    def g(self, x, y):
        return (self.C @ y - self.B @ x).square().sum() / 2

    def solution(self, x):
        """The minimiser of g that minimises f."""
        return self.pinv @ self.B @ x + (self.identity - self.pinv @ self.C) @ self.t

    def penalised(self, x, sigma):
        """The minimiser of σ f + g."""
        return torch.linalg.solve(sigma * self.identity + self.C.T @ self.C, sigma * self.t + self.C.T @ self.B @ x)

    def gradient(self, x):
        """∇ψ."""
        return self.hessian @ x - self.right

    def penalised_optimum(self, sigma):
        # ∇ψ_σ is affine in x: (x - a) + Bᵀ (C z - C y_σ(x)) / σ
        def slope(x):
            return (
                x - self.a + self.B.T @ (self.C @ (self.pinv @ self.B @ x) - self.C @ self.penalised(x, sigma)) / sigma
            )

        constant = slope(self.x0)
        columns = [slope(unit) - constant for unit in torch.eye(len(self.x0), dtype=DOUBLE)]
        return torch.linalg.solve(torch.stack(columns, 1), -constant)

    def solver(self, sigma, **options):
        settings = {"lr_x": self.lr_x, "lr_y": 1 / (self.lipschitz + sigma), "sigma": sigma}
        return PenaltyBilevel(self.f, self.g, **settings | options)


@pytest.fixture
def quadratic():
    return Quadratic()


def slope(sigmas, errors):
    return np.polyfit(np.log(sigmas), np.log(errors), 1)[0]


# --------------------------------------------------------------------------------------------------------------------
# ψ_σ and its gradient


def test_value_and_gradient_of_the_penalty_are_within_order_sigma(quadratic):
    x = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    best = quadratic.solution(x)
    sigmas, value_errors, gradient_errors = (1e-2, 1e-3, 1e-4), [], []
    for sigma in sigmas:
        at = (quadratic.f, quadratic.g, x, quadratic.penalised(x, sigma), best, sigma)
        value = penalty_value(*at)
        assert value <= quadratic.f(x, best)  # ψ_σ <= ψ
        value_errors.append(float((value - quadratic.f(x, best)).abs()))
        gradient_errors.append(float((penalty_gradient(*at) - quadratic.gradient(x)).norm()))
    assert 0.95 < slope(sigmas, value_errors) < 1.05
    assert 0.95 < slope(sigmas, gradient_errors) < 1.05


def test_the_gradient_needs_no_derivative_of_the_minimisers(quadratic):
    # Danskin: differentiating through y_σ(x) and z(x) changes nothing
    x = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE, requires_grad=True)
    through = penalty_value(
        quadratic.f, quadratic.g, x, quadratic.penalised(x, 0.1), quadratic.pinv @ quadratic.B @ x, 0.1
    )
    (expected,) = torch.autograd.grad(through, x)
    y, z = quadratic.penalised(x, 0.1), quadratic.solution(x)  # another minimiser of g than above
    torch.testing.assert_close(penalty_gradient(quadratic.f, quadratic.g, x, y, z, 0.1), expected)
    assert x.grad is None


@pytest.mark.parametrize("x", [-2.0, -0.2, -0.05, 0.0, 0.3, 2.0])
def test_a_bound_of_the_lower_level_has_the_gradient_of_its_closed_form(x):
    # Y = [0, ∞), g = ½ (y - x)², f = ½ (y - 1)²; ψ has a kink at 0, and ∇ψ_σ goes through it within σ
    sigma = 0.1
    upper, lower = lambda x, y: (y - 1).square() / 2, lambda x, y: (y - x).square() / 2
    expected = (x - 1) / (1 + sigma) if x > 0 else 0.0 if x < -sigma else -(x + sigma) / (sigma * (1 + sigma))
    solver = PenaltyBilevel(
        upper, lower, sigma=sigma, lr_x=1e-9, lr_y=0.9, beta=1.0, inner_steps=20, proj_y=projections.nonnegative
    )
    start = torch.tensor(x, dtype=DOUBLE)
    found = solver.run(start, torch.tensor(1.0, dtype=DOUBLE), iters=1)
    assert float(penalty_gradient(upper, lower, start, found.y, found.z, sigma)) == pytest.approx(expected, abs=1e-6)
    assert found.history.stationarity[0] == pytest.approx(abs(expected), abs=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.01, 0.001])
def test_without_the_error_bound_the_gradient_grows_like_one_over_sigma(sigma):
    # the global minimiser of g jumps from 1 to -1 as x crosses 0; ours, by a fine grid and Newton's method
    upper, lower = lambda x, y: (y - 0.5).square(), lambda x, y: (y.square() - 1).square() + x * y

    def minimiser(objective):
        grid = torch.linspace(-2, 2, 4001, dtype=DOUBLE)
        y = grid[objective(grid).argmin()].clone()
        for _ in range(20):
            y.requires_grad_()
            (first,) = torch.autograd.grad(objective(y), y, create_graph=True)
            (second,) = torch.autograd.grad(first, y)
            y = (y - first / second).detach()
        return y

    def gradient(x):
        x = torch.tensor(x, dtype=DOUBLE)
        y = minimiser(lambda y: sigma * upper(x, y) + lower(x, y))
        z = minimiser(lambda z: lower(x, z) + 1e-12 * z)  # at x = 0 the tie goes to -1
        return float(penalty_gradient(upper, lower, x, y, z, sigma))

    assert gradient(0.0) == pytest.approx(2 / sigma, rel=0.02)
    if sigma <= 0.01:  # beside the jump the error bound holds
        assert gradient(0.02) == pytest.approx(0.375, abs=0.003)
        assert gradient(-0.02) == pytest.approx(-0.126, abs=0.003)
    else:
        assert gradient(-0.02) == pytest.approx(-0.12, abs=0.02) or abs(gradient(0.02)) > 10


# --------------------------------------------------------------------------------------------------------------------
# The double loop


@pytest.mark.parametrize("sigma", [1e-1, 1e-2, 1e-3])
def test_the_double_loop_finds_the_minimiser_of_the_penalty(quadratic, sigma):
    solver = quadratic.solver(sigma, beta=1.0)
    found = solver.run(quadratic.x0, quadratic.y0, iters=40)
    check_result(found, quadratic.x0)
    torch.testing.assert_close(found.x, quadratic.penalised_optimum(sigma), rtol=1e-7, atol=1e-7)
    bias = float((found.x - quadratic.optimum).norm() / quadratic.optimum.norm())
    assert 0.05 * sigma < bias < sigma
    assert found.history.stationarity[-1] < 1e-6 < found.history.stationarity[0]


def test_the_inner_loop_s_result_counts_for_beta(quadratic):
    ends = {}
    for beta in (0.25, 1.0):
        solver = quadratic.solver(0.1, beta=beta)
        solver.start(quadratic.x0, quadratic.y0 + 1)
        ends[beta] = solver.y - 1, solver.z - 1
    for part, whole in zip(ends[0.25], ends[1.0], strict=True):
        torch.testing.assert_close(part, 0.25 * whole)


def test_the_prox_term_leaves_the_limit_as_it_is(quadratic):
    limits = []
    for rho in (None, 1.0):
        lr_y = 1 / (quadratic.lipschitz + 0.1 + (1 / rho if rho else 0))
        solver = quadratic.solver(0.1, rho=rho, lr_y=lr_y, beta=1.0)
        limits.append(solver.run(quadratic.x0, quadratic.y0, iters=35).x)
    for limit in limits:
        torch.testing.assert_close(limit, quadratic.penalised_optimum(0.1), rtol=1e-5, atol=1e-5)


def test_the_prox_term_keeps_a_nonconvex_lower_level_near_its_path():
    # far from a minimum of the double well, the inner loop alone leaves at once; with a small rho it moves slowly
    upper, lower = lambda x, y: y.square() + x.square(), lambda x, y: (y.square() - 1).square()
    ends = {}
    for rho in (None, 0.02):
        solver = PenaltyBilevel(upper, lower, lr_x=0.1, lr_y=0.01, rho=rho, inner_steps=50)
        solver.start(torch.tensor(1.0), torch.tensor(0.05))
        ends[rho] = float(solver.y)
    assert ends[0.02] - 0.05 < 0.1 * (ends[None] - 0.05)


def test_constraints_at_both_levels():
    # lower: the simplex point nearest to x + c; upper: x in a box. ψ by brute force over x's grid
    c, t = torch.tensor([0.3, -0.2, 0.1], dtype=DOUBLE), torch.tensor([0.1, 0.6, 0.3], dtype=DOUBLE)
    direction = torch.tensor([1.0, -1.0, 0.5], dtype=DOUBLE)

    def upper(x, y):
        return (y - t).square().sum() + 0.05 * (x - 0.1).square().sum()

    def lower(x, y):
        return (y - c - x * direction).square().sum() / 2

    box = lambda x: projections.box(x, (-0.2, 0.2))  # noqa: E731
    solver = PenaltyBilevel(
        upper, lower, sigma=1e-3, lr_x=0.1, lr_y=0.9, beta=1.0, proj_x=box, proj_y=projections.simplex, tol=1e-6
    )
    found = solver.run(torch.tensor(0.9, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE), iters=200)
    assert found.converged
    assert found.history.iteration[0] == 0
    grid = torch.linspace(-0.2, 0.2, 4001, dtype=DOUBLE)
    values = torch.func.vmap(lambda x: upper(x, projections.simplex(c + x * direction)))(grid)
    assert float(found.x) == pytest.approx(float(grid[values.argmin()]), abs=2e-3)
    assert float(found.y.sum()) == pytest.approx(1.0)
    assert float(found.y.min()) >= 0


def test_a_nonconvex_lower_level_with_an_error_bound():
    # u² + 3 sin² u satisfies Polyak-Łojasiewicz, is not convex, and has its only minimum at u = 0, that is y = sin x
    upper = lambda x, y: (y - 0.5).square()  # noqa: E731

    def lower(x, y):
        u = y - torch.sin(x)
        return u.square() + 3 * torch.sin(u).square()

    solver = PenaltyBilevel(upper, lower, sigma=1e-2, lr_x=0.3, lr_y=0.1, beta=1.0, tol=1e-5)
    found = solver.run(torch.tensor(0.0, dtype=DOUBLE), torch.tensor(2.0, dtype=DOUBLE), iters=100)
    assert found.converged
    assert float(found.x) == pytest.approx(math.asin(0.5), abs=1e-4)


def test_calls_are_counted_as_they_are_made(quadratic):
    calls = {"f": 0, "g": 0}

    def counted(name, objective):
        def call(x, y):
            calls[name] += torch.is_grad_enabled()
            return objective(x, y)

        return call

    solver = PenaltyBilevel(counted("f", quadratic.f), counted("g", quadratic.g), lr_x=0.1, lr_y=0.05, inner_steps=7)
    solver.start(quadratic.x0, quadratic.y0)
    row = solver.step()
    assert row["gradient_calls"] == 2 * (2 * 7 + 2) == calls["g"]
    assert calls["f"] == 2 * (7 + 1)  # z's steps need none


# --------------------------------------------------------------------------------------------------------------------
# Samples, and the single loop


def noisy(problem, size):
    """Additive Gaussian noise in the gradients in y of f and g, and in that of g in x; mean zero."""

    def sample(generator):
        return [size * torch.randn(len(like), generator=generator, dtype=DOUBLE) for like in (problem.y0, problem.x0)]

    def f(x, y, noise):
        return problem.f(x, y) + noise[0] @ y

    def g(x, y, noise):
        return problem.g(x, y) + noise[0] @ y + noise[1] @ x

    return f, g, sample


@pytest.mark.parametrize("schedule", [None, Decay(sigma=0.0)], ids=["default", "constant sigma"])
def test_the_single_loop_without_noise(quadratic, schedule):
    solver = quadratic.solver(0.2, momentum="storm", schedule=schedule)
    found = solver.run(quadratic.x0, quadratic.y0, iters=120)
    sigma = found.history.sigma[-1]
    assert sigma == pytest.approx(0.2 * (120 ** (-0.2) if schedule is None else 1))
    target = quadratic.penalised_optimum(sigma)
    start = float((quadratic.x0 - target).norm())
    assert float((found.x - target).norm()) < 0.3 * start
    assert found.gradient_calls == 2 + 4 * 120


def test_constant_single_loop_without_noise_is_gradient_descent_ascent(quadratic):
    # with exact gradients v is the gradient, whatever the momentum
    sigma, lr_y = 0.1, 1 / (quadratic.lipschitz + 0.1)
    solver = quadratic.solver(sigma, momentum="storm", schedule=Decay(0.0, 0.0, 0.0, 0.0, 0.3))
    solver.start(quadratic.x0, quadratic.y0)
    x, y, z = quadratic.x0, quadratic.y0, quadratic.y0
    C, B = quadratic.C, quadratic.B
    for _ in range(20):
        solver.step()
        slope_x = x - quadratic.a + B.T @ (C @ z - C @ y) / sigma
        slope_y = sigma * (y - quadratic.t) + C.T @ (C @ y - B @ x)
        slope_z = C.T @ (C @ z - B @ x)
        x, y, z = x - quadratic.lr_x * slope_x, y - lr_y * slope_y, z - lr_y * slope_z
    for found, expected in ((solver.x, x), (solver.y, y), (solver.z, z)):
        torch.testing.assert_close(found, expected)


def test_momentum_averages_the_noise_of_the_estimates_out(quadratic):
    residuals = {}
    for scale in (0.1, 1e9):  # a huge scale keeps η at 1: plain stochastic gradients
        f, g, sample = noisy(quadratic, 0.5)
        schedule = Decay(0.0, 0.0, 0.0, 0.0, scale)
        options = {"sigma": 0.2, "lr_x": 1e-6, "lr_y": 1e-3, "schedule": schedule, "momentum": "storm"}
        solver = PenaltyBilevel(f, g, sample=sample, **options)
        solver.start(quadratic.x0, quadratic.solution(quadratic.x0))  # there the gradient of g is only noise
        residuals[scale] = np.mean([solver.step()["lower_residual_z"] for _ in range(100)][40:])
    assert residuals[0.1] < 0.4 * residuals[1e9]


def test_y_and_z_see_the_same_samples(quadratic):
    # noise in g that does not depend on y leaves the difference of its gradients in x untouched, however small σ is
    upper = lambda x, y, noise: quadratic.f(x, y)  # noqa: E731
    lower = lambda x, y, noise: quadratic.g(x, y) + noise[1] @ x  # noqa: E731
    runs = []
    for size in (0.0, 100.0):
        solver = PenaltyBilevel(upper, lower, sigma=1e-2, lr_x=0.1, lr_y=0.05, sample=noisy(quadratic, size)[2])
        runs.append(solver.run(quadratic.x0, quadratic.y0, iters=5))
    torch.testing.assert_close(runs[0].x, runs[1].x, rtol=1e-8, atol=1e-8)


def test_the_double_loop_averages_outer_samples(quadratic):
    drawn = []
    f, g, sample = noisy(quadratic, 1.0)

    def counted(generator):
        drawn.append(sample(generator))
        return drawn[-1]

    options = {"lr_x": 0.1, "lr_y": 0.05, "sigma": 0.5, "inner_steps": 3, "sample": counted}
    solver = PenaltyBilevel(f, g, outer_samples=5, **options)
    solver.start(quadratic.x0, quadratic.y0)
    assert len(drawn) == 3 + 5
    assert solver.step()["gradient_calls"] == 2 * (6 + 10)


def test_a_batch_is_handed_to_both_objectives(quadratic):
    f, g, sample = noisy(quadratic, 1.0)
    batches = [sample(torch.Generator().manual_seed(seed)) for seed in range(4)]
    fed = PenaltyBilevel(f, g, lr_x=0.1, lr_y=0.05, momentum="storm")
    fed.start(quadratic.x0, quadratic.y0, batches[0])
    for batch in batches[1:]:
        fed.step(batch)
    queue = iter(batches)
    drawn = PenaltyBilevel(f, g, lr_x=0.1, lr_y=0.05, momentum="storm", sample=lambda _: next(queue))
    drawn.start(quadratic.x0, quadratic.y0)
    for _ in range(3):
        drawn.step()
    assert torch.equal(fed.x, drawn.x)


# --------------------------------------------------------------------------------------------------------------------
# State, trees, dtypes


@pytest.mark.parametrize("momentum", ["none", "storm"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_saved_run_goes_on_bit_by_bit(quadratic, momentum, stochastic):
    f, g, sample = noisy(quadratic, 0.1) if stochastic else (quadratic.f, quadratic.g, None)

    def make():
        generator = torch.Generator().manual_seed(3)
        return PenaltyBilevel(f, g, lr_x=0.1, lr_y=0.05, momentum=momentum, sample=sample, generator=generator)

    whole = make().run(quadratic.x0, quadratic.y0, iters=8)
    first = make()
    first.run(quadratic.x0, quadratic.y0, iters=3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make()
    second.load_state_dict(torch.load(file, weights_only=True))
    for solver in (first, second):
        found = solver.run(iters=5)
        for name in ("x", "y", "z"):
            assert torch.equal(getattr(found, name), getattr(whole, name))
        assert found.bias_estimate == whole.bias_estimate
        assert all(np.array_equal(found.history[name], whole.history[name]) for name in whole.history)


def test_trees_are_vectors_in_disguise(quadratic):
    split_x = lambda x: {"first": x[:1].reshape(1, 1), "rest": (x[1:],)}  # noqa: E731
    split_y = lambda y: [y[:2], y[2:].reshape(2, 2)]  # noqa: E731
    join_x = lambda x: torch.cat([x["first"].reshape(-1), x["rest"][0]])  # noqa: E731
    join_y = lambda y: torch.cat([y[0], y[1].reshape(-1)])  # noqa: E731
    options = {
        "lr_x": 0.1,
        "lr_y": 0.05,
        "sigma": 0.1,
        "proj_x": lambda x: projections.box(x, (-0.3, 0.3)),
        "proj_y": lambda y: projections.box(y, (-0.5, 0.5)),
    }
    flat = PenaltyBilevel(quadratic.f, quadratic.g, **options).run(quadratic.x0, quadratic.y0, iters=10)
    options["proj_x"] = lambda x: split_x(projections.box(join_x(x), (-0.3, 0.3)))
    options["proj_y"] = lambda y: [projections.box(part, (-0.5, 0.5)) for part in y]
    tree = PenaltyBilevel(
        lambda x, y: quadratic.f(join_x(x), join_y(y)), lambda x, y: quadratic.g(join_x(x), join_y(y)), **options
    )
    found = tree.run(split_x(quadratic.x0), split_y(quadratic.y0), iters=10)
    torch.testing.assert_close(join_x(found.x), flat.x)
    torch.testing.assert_close(join_y(found.y), flat.y)
    gradient = penalty_gradient(tree.f, tree.g, found.x, found.y, found.z, 0.1)
    assert gradient["first"].shape == (1, 1)
    check_result(found, split_x(quadratic.x0))


def test_float32_stays_float32():
    problem = Quadratic(dtype=torch.float32)
    found = problem.solver(0.1).run(problem.x0, problem.y0, iters=10)
    assert found.x.dtype == found.y.dtype == found.z.dtype == torch.float32
    reference = Quadratic().solver(0.1).run(Quadratic().x0, Quadratic().y0, iters=10)
    torch.testing.assert_close(found.x.double(), reference.x, rtol=1e-4, atol=1e-4)


def test_the_caller_s_start_is_left_alone_and_the_result_unpacks(quadratic):
    x0, y0 = torch.ones(4, dtype=DOUBLE), torch.ones(6, dtype=DOUBLE)
    x, y, info = quadratic.solver(0.1).run(x0, y0, iters=5)
    assert isinstance(info, BilevelResult)
    assert info.x is x
    assert info.y is y
    assert bool((x0 == 1).all() and (y0 == 1).all())
    check_result(info, x0)


# --------------------------------------------------------------------------------------------------------------------
# Stopping, and what must be said aloud


def test_tol_asks_for_all_three_residuals(quadratic):
    found = quadratic.solver(0.3, tol=1e-5, beta=1.0).run(quadratic.x0, quadratic.y0, iters=1000)
    assert found.converged
    assert "converged after" in found.message
    assert max(found.stationarity[-1], found.lower_residual_y[-1], found.lower_residual_z[-1]) <= 1e-5
    gradient = penalty_gradient(quadratic.f, quadratic.g, found.x, found.y, found.z, 0.3)
    assert found.stationarity[-1] == pytest.approx(float(gradient.norm()))
    slope = 0.3 * (found.y - quadratic.t) + quadratic.C.T @ (quadratic.C @ found.y - quadratic.B @ found.x)
    assert found.lower_residual_y[-1] == pytest.approx(float(slope.norm()) / 0.3, rel=1e-6)


def test_running_out_of_iterations_warns(quadratic):
    with pytest.warns(
        RuntimeWarning, match=r"stopped after 3 iterations: stationarity .*, not all below tol = 1.0e-06"
    ):
        found = quadratic.solver(0.1, tol=1e-6).run(quadratic.x0, quadratic.y0, iters=3)
    assert not found.converged
    assert found.n_iterations == 3


def test_the_callback_sees_every_iterate_and_may_stop(quadratic):
    seen = []

    def callback(iteration, x, fun):
        seen.append((iteration, x.clone(), fun))
        return iteration == 4

    found = quadratic.solver(0.1, tol=1e-9, callback=callback).run(quadratic.x0, quadratic.y0, iters=50)
    assert [iteration for iteration, _, _ in seen] == [1, 2, 3, 4]
    assert "callback" in found.message
    assert not found.converged
    assert torch.equal(seen[-1][1], found.x)
    assert [fun for _, _, fun in seen] == list(found.history.fun[1:])


def test_the_bias_estimate_is_the_bias(quadratic):
    solver = quadratic.solver(1e-2, beta=1.0)
    found = solver.run(quadratic.x0, quadratic.y0, iters=40)
    assert found.bias_estimate == pytest.approx(float(quadratic.gradient(found.x).norm()), rel=0.1)  # ∇ψ_σ is 0 here


def test_losing_the_difference_of_gradients_in_float32_is_said_aloud():
    problem = Quadratic(dtype=torch.float32)
    x = torch.ones(4)
    y, z = problem.penalised(x, 1e-7), problem.solution(x)
    with pytest.warns(RuntimeWarning, match=r"lost its digits: rounding in torch.float32.*raise sigma or use float64"):
        penalty_gradient(problem.f, problem.g, x, y, z, 1e-7)
    with pytest.warns(RuntimeWarning, match="lost its digits"):
        problem.solver(1e-7).run(problem.x0, problem.y0, iters=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty_gradient(problem.f, problem.g, x, problem.penalised(x, 1e-2), z, 1e-2)
        double = Quadratic()
        penalty_gradient(double.f, double.g, x.double(), double.penalised(x.double(), 1e-7), z.double(), 1e-7)


def test_different_basins_are_noticed():
    # f pulls y over the hill to the higher of g's two wells, and leaves z in the lower
    upper, lower = lambda x, y: 20 * (y - 1).square() + x.square(), lambda x, y: (y.square() - 1).square() + 0.3 * y
    start = torch.tensor(0.0, dtype=DOUBLE), torch.tensor(0.05, dtype=DOUBLE)
    solver = PenaltyBilevel(upper, lower, sigma=5e-3, lr_x=0.1, lr_y=0.05)
    with pytest.warns(RuntimeWarning, match=r"different basins of g: g\(x, y\) - g\(x, z\) is 6.*e-01"):
        found = solver.run(*start, iters=30)
    assert float(found.y) > 0.9
    assert float(found.z) < -0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # in one basin, or with f strong enough to make the higher well the minimiser
        solver.run(start[0], torch.tensor(-0.9, dtype=DOUBLE), iters=30)
        PenaltyBilevel(upper, lower, sigma=0.05, lr_x=0.1, lr_y=0.05).run(*start, iters=30)


def test_a_convex_lower_level_far_from_converged_is_not_taken_for_two_basins():
    for seed in range(6):
        problem = Quadratic(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            problem.solver(0.1, inner_steps=1).run(problem.x0, problem.y0, iters=1 + seed)


def test_a_prox_parameter_that_is_too_large_is_refused():
    upper, lower = lambda x, y: y.square() + x.square(), lambda x, y: 5 * (y.square() - 1).square()  # curvature -20
    good = {"lr_x": 0.1, "lr_y": 0.01}
    with pytest.raises(ValueError, match=r"rho = 1 is too large: the lower level has curvature -.*only for rho below"):
        PenaltyBilevel(upper, lower, rho=1.0, **good).start(torch.tensor(0.0), torch.tensor(0.1))
    PenaltyBilevel(upper, lower, rho=0.04, **good).start(torch.tensor(0.0), torch.tensor(0.1))


def test_slow_divergence_warns(quadratic):
    with pytest.warns(RuntimeWarning, match=r"the iterates diverge: stationarity has grown from .*a smaller lr_x"):
        quadratic.solver(0.1, lr_x=8 * quadratic.lr_x).run(quadratic.x0, quadratic.y0, iters=20)


def test_divergence_is_an_error_not_a_nan(quadratic):
    with pytest.raises(FloatingPointError, match="lr_y = 10 too large"):
        quadratic.solver(0.1, lr_y=10.0).run(quadratic.x0, quadratic.y0, iters=1000)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sigma": 0.0}, ValueError, "sigma must be above 0"),
        ({"sigma": -1.0}, ValueError, "sigma must be above 0"),
        ({"sigma": math.nan}, ValueError, "sigma must be above 0"),
        ({"lr_x": 0.0}, ValueError, "lr_x must be above 0"),
        ({"lr_y": math.inf}, ValueError, "lr_y must be above 0"),
        ({"rho": 0.0}, ValueError, "rho must be above 0"),
        ({"inner_steps": 0}, ValueError, "inner_steps must be at least 1"),
        ({"inner_steps": 1.5}, TypeError, "inner_steps must be an integer"),
        ({"beta": 1.5}, ValueError, "beta must be above 0 and at most 1"),
        ({"tol": 0.0}, ValueError, "tol must be above 0"),
        ({"momentum": "adam"}, ValueError, "momentum must be one of 'none', 'storm'"),
        ({"momentum": "storm", "rho": 1.0}, ValueError, "rho smooths the inner problems"),
        ({"outer_samples": 2}, ValueError, "outer_samples above 1 needs sample"),
        ({"schedule": 3}, TypeError, "schedule must be a Decay"),
        ({"proj_x": 3}, TypeError, "proj_x must be callable or None"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator"),
        ({"f": 3}, TypeError, "f must be callable"),
    ],
)
def test_bad_settings_are_named(quadratic, change, error, message):
    good = {"f": quadratic.f, "g": quadratic.g, "lr_x": 0.1, "lr_y": 0.1}
    with pytest.raises(error, match=message):
        PenaltyBilevel(**good | change)


@pytest.mark.parametrize(
    ("settings", "start", "error", "message"),
    [
        ({}, {"x0": torch.tensor([math.nan] * 4).double()}, ValueError, "x0 must be finite"),
        ({}, {"y0": torch.arange(6)}, TypeError, "y0 must hold floating-point tensors only, got torch.int64"),
        ({}, {"y0": np.zeros(6)}, TypeError, "y0 must hold floating-point tensors only, got ndarray"),
        ({}, {"y0": torch.zeros(6)}, TypeError, "x0 and y0 must share one dtype"),
        ({}, {"x0": {}}, ValueError, "x0 must hold at least one number"),
        ({}, {"x0": None}, ValueError, "x0 and y0 go together"),
        ({"f": lambda x, y: y}, {}, ValueError, r"f must return a scalar tensor, got shape \(6,\)"),
        ({"g": lambda x, y: 1.0}, {}, ValueError, "g must return a scalar tensor, got float"),
        ({"proj_x": lambda x: x / 2}, {}, ValueError, "proj_x must be a projection, but applied twice"),
        (
            {"proj_y": lambda y: y[:2]},
            {},
            ValueError,
            r"the result of proj_y must have the structure and shapes \[\(6,",
        ),
    ],
)
def test_bad_problems_are_named(quadratic, settings, start, error, message):
    solver = PenaltyBilevel(**{"f": quadratic.f, "g": quadratic.g, "lr_x": 0.1, "lr_y": 0.1} | settings)
    with pytest.raises(error, match=message):
        solver.run(**{"x0": quadratic.x0, "y0": quadratic.y0} | start, iters=1)


def test_a_run_needs_a_start_and_a_state_all_its_entries(quadratic):
    solver = quadratic.solver(0.1)
    for premature in (solver.step, solver.run, solver.state_dict, solver.estimate_bias, lambda: solver.x):
        with pytest.raises(RuntimeError, match="there is no start yet"):
            premature()
    with pytest.raises(ValueError, match="the state lacks x, y"):
        solver.load_state_dict({})


@pytest.mark.parametrize(("name", "value"), list(itertools.product(("sigma", "eta_scale"), (-0.1, math.nan))))
def test_bad_schedules_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 0"):
        Decay(**{name: value})
