"""The second-order hyper-gradient: against finite differences, implicit differentiation and itself."""

from __future__ import annotations

import math

import pytest
import torch

from workingpapers.optimization.bilevel_penalty import PenaltyBilevel, hypergradient, penalty_gradient, projections
from workingpapers.optimization.implicit_diff import root_vjp

DOUBLE = torch.float64


def draws(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE)


def central_differences(function, x, h=1e-6):
    units = torch.eye(len(x), dtype=DOUBLE)
    return torch.stack([(function(x + h * unit) - function(x - h * unit)) / (2 * h) for unit in units])


@pytest.mark.parametrize("method", ["pinv", "cg"])
def test_many_lower_level_solutions(method):
    draw = draws()
    C, B, t, a, x = draw(3, 6), draw(3, 4), draw(6), draw(4), draw(4)
    pinv = torch.linalg.pinv(C)

    def f(x, y):
        return (y - t).square().sum() / 2 + (x - a).square().sum() / 2

    def g(x, y):
        return (C @ y - B @ x).square().sum() / 2

    def solution(x):
        return pinv @ B @ x + t - pinv @ (C @ t)

    expected = central_differences(lambda x: f(x, solution(x)), x)
    found = hypergradient(f, g, x, solution(x), method=method)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    # at a minimiser of g that does not minimise f, the formula is another selection's derivative
    with_other = hypergradient(f, g, x, solution(x) + (torch.eye(6, dtype=DOUBLE) - pinv @ C)[0])
    torch.testing.assert_close(with_other, found)  # here f is separable, so that the selection does not matter


@pytest.mark.parametrize("method", ["pinv", "cg"])
def test_implicit_differentiation_of_a_logistic_regression(method):
    draw = draws(1)
    features, labels = draw(40, 5), (draw(40) > 0).double()
    held_out, truth = draw(30, 5), (draw(30) > 0).double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits

    def f(x, y):
        return loss(held_out @ y["w"], truth) + 0.1 * x["log_penalty"].square().sum()

    def g(x, y):
        return loss(features @ y["w"], labels) + (x["log_penalty"].exp() * y["w"].square()).sum() / 2

    x = {"log_penalty": torch.linspace(-2, 0, 5, dtype=DOUBLE)}
    y = {"w": torch.zeros(5, dtype=DOUBLE)}
    for _ in range(30):  # Newton's method
        w = y["w"]
        slope = torch.func.grad(lambda w: g(x, {"w": w}))(w)
        y = {"w": w - torch.linalg.solve(torch.func.hessian(lambda w: g(x, {"w": w}))(w), slope)}

    # our own implicit differentiation of the optimality condition, by another route and another solver
    (pulled,) = root_vjp(
        lambda y, x: {"w": torch.func.grad(lambda w: g(x, {"w": w}))(y["w"])},
        y,
        (x,),
        {"w": torch.func.grad(lambda w: f(x, {"w": w}))(y["w"])},
        solve="lu",
    )
    direct = torch.func.grad(lambda p: f({"log_penalty": p}, y))(x["log_penalty"])
    found = hypergradient(f, g, x, y, method=method)
    torch.testing.assert_close(found["log_penalty"], direct + pulled["log_penalty"], rtol=1e-8, atol=1e-10)

    sigma = 1e-5  # and the penalty comes within σ of it without any second derivative
    doubled = y["w"]
    for _ in range(10):
        penalised = lambda w: sigma * f(x, {"w": w}) + g(x, {"w": w})  # noqa: E731
        doubled = doubled - torch.linalg.solve(
            torch.func.hessian(penalised)(doubled), torch.func.grad(penalised)(doubled)
        )
    first_order = penalty_gradient(f, g, x, {"w": doubled}, y, sigma)
    torch.testing.assert_close(first_order["log_penalty"], found["log_penalty"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["pinv", "cg"])
def test_active_constraints_of_the_lower_level(method):
    # Y is the simplex, as inequalities; some entries of y are zero
    draw = draws(3)
    c, t, D = draw(5), draw(5), draw(5, 3)
    x = draw(3)
    root = draw(5, 5)
    curvature = root @ root.T + torch.eye(5, dtype=DOUBLE)

    def f(x, y):
        return (y - t).square().sum() + x.square().sum()

    def g(x, y):
        return y @ curvature @ y / 2 - y @ (c + 5 + D @ x)

    def solution(x):
        y = torch.full((5,), 0.2, dtype=DOUBLE)
        step = 1 / float(torch.linalg.eigvalsh(curvature)[-1])
        for _ in range(400):
            y = projections.simplex(y - step * (curvature @ y - c - 5 - D @ x))
        return y

    def constraints(y):
        return torch.cat([-y, (y.sum() - 1)[None]])

    y = solution(x)
    assert 0 < int((y == 0).sum()) < 4
    expected = central_differences(lambda x: f(x, solution(x)), x, h=1e-5)
    found = hypergradient(f, g, x, y, constraints=constraints, method=method)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    unconstrained = hypergradient(f, g, x, y, method=method)
    assert not torch.allclose(found, unconstrained, atol=1e-2)


def test_curved_constraints_enter_through_their_multipliers():
    # y is the point of the disk nearest to x: x / |x| outside of it
    t = torch.tensor([0.3, -1.0], dtype=DOUBLE)
    x = torch.tensor([1.5, 2.0], dtype=DOUBLE)
    f, g = lambda x, y: (y - t).square().sum(), lambda x, y: (y - x).square().sum() / 2
    found = hypergradient(f, g, x, x / x.norm(), constraints=lambda y: (y.square().sum() - 1)[None] / 2)
    torch.testing.assert_close(found, torch.func.grad(lambda x: f(x, x / x.norm()))(x))
    inside = torch.tensor([0.2, 0.1], dtype=DOUBLE)
    found = hypergradient(f, g, inside, inside, constraints=lambda y: (y.square().sum() - 1)[None] / 2)
    torch.testing.assert_close(found, 2 * (inside - t))


def test_degenerate_constraints_have_no_gradient_and_say_so():
    f, g = lambda x, y: (y - 1).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
    at, one = torch.zeros(1, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)
    with pytest.warns(RuntimeWarning, match="does not exist here and is NaN: an active constraint has multiplier 0.0e"):
        assert hypergradient(f, g, at, at, constraints=lambda y: -y).isnan().all()  # the kink of max(x, 0)
    with pytest.warns(RuntimeWarning, match="NaN: the gradients of the active constraints are linearly dependent"):
        assert hypergradient(f, g, -one, at, constraints=lambda y: torch.cat([-y, -2 * y])).isnan().all()
    assert float(hypergradient(f, g, -one, at, constraints=lambda y: -y)) == pytest.approx(0.0, abs=1e-12)
    assert float(hypergradient(f, g, 3 * one, 3 * one, constraints=lambda y: -y)) == pytest.approx(2.0)


def test_the_solver_s_solution_is_good_enough_for_it():
    f, g = lambda x, y: (y - 1).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
    solver = PenaltyBilevel(f, g, sigma=1e-3, lr_x=0.5, lr_y=0.9, beta=1.0)
    found = solver.run(torch.full((2,), 3.0, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE), iters=60)
    assert hypergradient(f, g, found.x, found.z).norm() < 1e-8


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "lu"}, ValueError, "method must be one of 'pinv', 'cg'"),
        ({"x": torch.tensor([math.inf]).double()}, ValueError, "x must be finite"),
        ({"y": torch.zeros(2)}, TypeError, "x and y must share one dtype"),
        ({"f": lambda x, y: y}, ValueError, "f must return a scalar tensor"),
        ({"constraints": lambda y: y.sum()}, ValueError, r"constraints must return a vector, got \(\)"),
        ({"constraints": lambda y: y + 1}, ValueError, "y violates a constraint: the largest h_i"),
        ({"constraints": lambda y: -y - 1}, ValueError, r"the gradient of 𝓛 is 1.4e\+00"),
        ({"constraints": lambda y: y}, ValueError, "a multiplier is -1.0e"),
        ({"active_tol": 0.0}, ValueError, "active_tol must be above 0"),
        ({"tol": 1e-3}, ValueError, "tol and max_iter are for method='cg'"),
        ({"method": "cg", "max_iter": 0}, ValueError, "max_iter must be at least 1"),
    ],
)
def test_bad_input_is_named(change, error, message):
    # g falls along -1: y = 0 is no minimiser of it
    good = {
        "f": lambda x, y: y.square().sum() + x.sum(),
        "g": lambda x, y: (y + 1).square().sum() / 2 + x.sum() - y.sum() * 0,
        "x": torch.zeros(1, dtype=DOUBLE),
        "y": torch.zeros(2, dtype=DOUBLE),
    }
    if change.get("constraints") is not None and "multiplier" in message:
        good["g"] = lambda x, y: (y + 1).square().sum() / 2 + x.sum()
    with pytest.raises(error, match=message):
        hypergradient(**good | change)
