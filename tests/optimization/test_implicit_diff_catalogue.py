"""Conditions, projections, proximal operators and ready solvers: closed forms, differences, independent libraries."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import scipy.optimize
import sklearn.isotonic
import sklearn.linear_model
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, vmap

from workingpapers.optimization.implicit_diff import (
    custom_fixed_point,
    custom_root,
    lasso,
    optimality,
    projection,
    prox,
    ridge,
    svm_dual,
    svm_weights,
)


def random(*shape, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


close = functools.partial(torch.testing.assert_close, rtol=1e-7, atol=1e-9)


# --- conditions ------------------------------------------------------------------------------------------------------


def quadratic(x, theta):
    A, c = theta
    return x @ (A @ A.T + torch.eye(len(c), dtype=c.dtype)) @ x / 2 - c @ x


def iterate(fixed_point, x, *parameters):
    for _ in range(300):
        before, x = x, fixed_point(x, *parameters)
        if torch.equal(before, x):
            break
    return x


def test_stationary_is_the_gradient_of_the_objective():
    theta = (random(4, 4), random(4, seed=1))
    solver = custom_root(optimality.stationary(quadratic), solve="cg")(
        lambda init, theta: torch.linalg.solve(theta[0] @ theta[0].T + torch.eye(4).double(), theta[1])
    )
    A, c = (t.requires_grad_() for t in theta)
    assert gradcheck(lambda A, c: solver(None, (A, c)), (A, c))
    close(jacrev(lambda c: solver(None, (A, c)))(c), torch.linalg.inv(A @ A.T + torch.eye(4).double()))


def test_all_first_order_conditions_of_the_simplex_agree_whatever_found_the_solution():
    theta = (random(4, 4), 5 * random(4, seed=1))
    pgd = optimality.projected_gradient(quadratic, projection.simplex, step=0.12)
    x = iterate(pgd, torch.full((4,), 0.25).double(), theta)
    assert 1 < (x > 0).sum() < 4  # some coordinates are exactly zero
    conditions = [
        (custom_fixed_point, pgd),
        (custom_fixed_point, optimality.projected_gradient(quadratic, projection.simplex, step=3.0)),
        (custom_fixed_point, optimality.proximal_gradient(quadratic, prox.from_projection(projection.simplex))),
        (custom_fixed_point, optimality.exponentiated_gradient(quadratic, step=0.3)),
    ]
    jacobians = [
        jacrev(lambda c, d=decorator, f=fun: d(f)(lambda init, theta: x)(None, (theta[0], c)))(theta[1])
        for decorator, fun in conditions
    ]
    support = x > 0
    H = (theta[0] @ theta[0].T + torch.eye(4).double())[support][:, support]
    inverse, ones = torch.linalg.inv(H), torch.ones(int(support.sum())).double()
    exact = torch.zeros(4, 4).double()
    exact[support.nonzero(), support.nonzero().T] = inverse - torch.outer(inverse @ ones, inverse @ ones) / (
        ones @ inverse @ ones
    )
    for found in jacobians:
        close(found, exact)


def test_mirror_descent_on_the_interior_of_the_simplex():
    # min <x, c> + <x, log x> over the simplex has x = softmax(-c).
    def entropy(x, c):
        return x @ c + (x * x.log()).sum()

    fixed_point = optimality.mirror_descent(entropy, projection.simplex_entropy, torch.log, step=0.5)
    c = random(5, grad=True)
    solver = custom_fixed_point(fixed_point)(lambda init, c: torch.softmax(-c, 0))
    close(jacrev(functools.partial(solver, None))(c), jacrev(lambda c: torch.softmax(-c, 0))(c))


def test_mirror_descent_in_the_euclidean_geometry_is_projected_gradient():
    theta, x = (random(3, 3), random(3, seed=1)), random(3, seed=2)
    bounds = (torch.zeros(3).double(), 0.5)
    mirror = optimality.mirror_descent(quadratic, projection.box, lambda x: x, step=0.3)
    close(
        mirror(x, theta, bounds), optimality.projected_gradient(quadratic, projection.box, step=0.3)(x, theta, bounds)
    )


def test_projected_gradient_is_differentiable_in_the_set():
    theta = (0.7 * random(3, 3), 5 * random(3, seed=1))
    fixed_point = optimality.projected_gradient(quadratic, projection.box, step=0.3)

    def of(lower, upper):
        return custom_fixed_point(fixed_point)(functools.partial(iterate, fixed_point))(
            torch.zeros(3).double(), theta, (lower, upper)
        )

    bounds = [torch.full((3,), v, dtype=torch.float64, requires_grad=True) for v in (-0.5, 0.5)]
    solution = of(*bounds)
    assert ((solution == -0.5) | (solution == 0.5)).any()
    assert gradcheck(of, bounds)


def test_proximal_gradient_of_the_elastic_net():
    theta = (0.5 * random(4, 4), 3 * random(4, seed=1))
    fixed_point = optimality.proximal_gradient(quadratic, prox.elastic_net, step=0.4)
    strengths = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, 0.3)]
    of = lambda l1, l2: custom_fixed_point(fixed_point)(functools.partial(iterate, fixed_point))(  # noqa: E731
        torch.zeros(4).double(), theta, (l1, l2)
    )
    assert 0 < (of(*strengths) == 0).sum() < 4
    assert gradcheck(of, strengths)


def test_blocks_have_their_own_prox_parameters_and_steps():
    theta = (random(4, 4), 3 * random(4, seed=1))

    def f(x, theta):
        return quadratic(torch.cat(x), theta)

    def both(v, strengths, step):
        return torch.cat([prox.lasso(v[:2], strengths[0], step), prox.nonnegative_lasso(v[2:], strengths[1], step)])

    whole = optimality.proximal_gradient(quadratic, both, step=0.12)
    blocks = optimality.block_proximal_gradient(f, [prox.lasso, prox.nonnegative_lasso], steps=[0.5, 0.2])
    strengths = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.2, 0.3)]
    with torch.no_grad():
        x = iterate(whole, torch.zeros(4).double(), theta, strengths)
    in_blocks = custom_fixed_point(blocks, check=1e-8)(lambda init, theta, strengths: (x[:2], x[2:]))
    found = torch.cat(in_blocks(None, theta, strengths))
    expected = custom_fixed_point(whole)(lambda init, theta, strengths: x)(None, theta, strengths)
    for i in range(4):
        close(*(torch.autograd.grad(y[i], strengths, retain_graph=True) for y in (found, expected)))


def test_newton_has_the_derivative_of_the_root_and_a_perfectly_conditioned_system():
    g = lambda x, theta: x**3 + x @ theta * x - 1  # noqa: E731
    theta = random(3).abs().requires_grad_()

    def solver(init, theta):
        x = torch.ones(3).double()
        for _ in range(50):
            x = optimality.newton(g)(x, theta)
        return x

    by_newton = custom_fixed_point(optimality.newton(g, step=0.7), solve="normal_cg")(solver)
    found, reference = (jacrev(lambda t, s=s: s(None, t))(theta) for s in (by_newton, custom_root(g)(solver)))
    close(found, reference)
    assert by_newton.linear_solve_info.iterations == 1


def test_kkt_of_a_quadratic_program_against_differences():
    # minimise |z - p|² / 2 such that z_1 + z_2 + z_3 = t and z <= u.
    def solver(init, p, t, u):
        program = scipy.optimize.minimize(
            lambda z: ((z - p.numpy()) ** 2).sum() / 2,
            np.zeros(3),
            jac=lambda z: z - p.numpy(),
            method="trust-constr",
            bounds=[(None, float(value)) for value in u],
            constraints=scipy.optimize.LinearConstraint(np.ones((1, 3)), float(t), float(t)),
            options={"gtol": 1e-13, "xtol": 1e-14, "barrier_tol": 1e-14, "maxiter": 3000},
        )
        z = torch.tensor(program.x)
        active = z > u - 1e-5
        z = torch.where(active, u, z)
        nu = (p - z)[~active].mean()
        return z, nu[None], torch.where(active, p - z - nu, 0.0)

    condition = optimality.kkt(
        lambda z, p: (z - p).square().sum() / 2, lambda z, t: z.sum()[None] - t, lambda z, u: z - u
    )
    solve = custom_root(condition, check=1e-4)(solver)
    p = torch.tensor([1.0, 0.2, -0.5], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    u = torch.tensor([0.6, 5.0, 5.0], dtype=torch.float64, requires_grad=True)
    z, _, multipliers = solve(None, p, t, u)
    assert multipliers[0] > 0
    close(multipliers[1:], torch.zeros(2).double())
    # With z_1 = u_1 active, z_2 and z_3 share t - u_1: z_i = p_i + (t - u_1 - p_2 - p_3) / 2.
    jacobians = [torch.stack([torch.autograd.grad(c, v, retain_graph=True)[0] for c in z]) for v in (p, t, u)]
    close(jacobians[0], torch.tensor([[0, 0, 0], [0, 0.5, -0.5], [0, -0.5, 0.5]]).double())
    close(jacobians[1], torch.tensor([[0.0], [0.5], [0.5]]).double())
    close(jacobians[2], torch.tensor([[1.0, 0, 0], [-0.5, 0, 0], [-0.5, 0, 0]]).double())


def test_kkt_with_one_kind_of_constraint_and_without():
    f = lambda z: z.square().sum()  # noqa: E731
    z, one = torch.ones(2).double(), torch.ones(1).double()
    assert len(optimality.kkt(f, equality=lambda z: z.sum()[None])((z, one))) == 2
    stationarity, slackness = optimality.kkt(f, inequality=lambda z: z.sum()[None])((z, 3 * one))
    assert stationarity.tolist() == [5, 5]
    assert slackness.tolist() == [6]
    with pytest.raises(ValueError, match="kkt needs equality or inequality"):
        optimality.kkt(f)


def test_a_linear_program_through_the_conic_residual():
    # minimise cᵀz such that G z <= h (K the nonnegative orthant): at a vertex z = G_active⁻¹ h_active.
    generator = np.random.default_rng(0)
    G, h = generator.standard_normal((6, 3)), np.ones(6)
    c = -G.T @ generator.random(6)

    def solver(init, data):
        A, b, c = (t.numpy() for t in data)
        program = scipy.optimize.linprog(c, A_ub=A, b_ub=b, bounds=(None, None))
        y, s = -program.ineqlin.marginals, program.slack
        return torch.tensor(program.x), torch.tensor(y - s), torch.ones(1).double()

    data = [torch.tensor(t, requires_grad=True) for t in (G, h, c)]
    solve = custom_root(optimality.conic_residual(projection.nonnegative), check=1e-6)(solver)

    def primal(*data):
        u, _, w = solve(None, data)
        return u / w

    def dual(*data):
        _, v, w = solve(None, data)
        return torch.relu(v) / w

    z = primal(*data)
    active = (data[0] @ z - data[1]).abs() < 1e-9
    assert active.sum() == 3
    reference = torch.linalg.solve(data[0][active], data[1][active])
    for ours, exact in zip(
        *(torch.autograd.grad(x @ torch.arange(1.0, 4).double(), data[:2]) for x in (z, reference)), strict=True
    ):
        close(ours, exact)
    totals = dual(*data).sum(), torch.linalg.solve(data[0][active].T, -data[2]).sum()
    for ours, exact in zip(*(torch.autograd.grad(total, (data[0], data[2])) for total in totals), strict=True):
        close(ours, exact)


@pytest.mark.parametrize(
    "build",
    [
        lambda step: optimality.projected_gradient(quadratic, projection.simplex, step=step),
        lambda step: optimality.proximal_gradient(quadratic, prox.lasso, step=step),
        lambda step: optimality.mirror_descent(quadratic, projection.simplex, torch.log, step=step),
        lambda step: optimality.exponentiated_gradient(quadratic, step=step),
        lambda step: optimality.newton(quadratic, step=step),
    ],
)
@pytest.mark.parametrize("step", [0.0, -1.0, math.nan])
def test_steps_must_be_positive(build, step):
    with pytest.raises(ValueError, match="step must be above 0"):
        build(step)


def test_blocks_need_a_step_each():
    with pytest.raises(ValueError, match="one for each of the 2 proxes, got 1"):
        optimality.block_proximal_gradient(quadratic, [prox.lasso, prox.lasso], steps=[1.0])


# --- projections -----------------------------------------------------------------------------------------------------

PROJECTIONS = {
    "nonnegative": (projection.nonnegative, lambda u: u >= 0, None),
    "box": (lambda v: projection.box(v, (-0.5, 0.7)), lambda u: (u >= -0.5) & (u <= 0.7), None),
    "simplex": (lambda v: projection.simplex(v, 2.0), lambda u: u >= 0, lambda u: u.sum(-1) - 2.0),
    "ball": (projection.ball, None, lambda u: torch.relu(u.norm(dim=-1) - 1)),
    "l1_ball": (projection.l1_ball, None, lambda u: torch.relu(u.abs().sum(-1) - 1)),
    "isotonic": (projection.isotonic, None, lambda u: torch.relu(-u.diff(dim=-1)).sum(-1)),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_are_the_closest_points_and_differentiable(name):
    project, holds, gap = PROJECTIONS[name]
    v = random(3, 6, grad=True)
    u = project(v)
    assert holds is None or holds(u).all()
    assert gap is None or gap(u).abs().max() < 1e-12
    close(project(u.detach()), u)
    # <v - u, w - u> <= 0 for every w of the set.
    others = project(random(50, 1, 6, seed=1)).detach()
    assert (((v - u) * (others - u)).sum(-1) <= 1e-12).all()
    assert gradcheck(project, (v,))
    assert gradgradcheck(project, (v,))
    for jacobian in (jacrev, jacfwd):
        close(vmap(jacobian(project))(v), torch.stack([jacrev(project)(row) for row in v]))


def test_the_simplex_jacobian_is_the_centred_indicator_of_the_support():
    v = random(5, seed=3)
    s = (projection.simplex(v) > 0).double()
    close(jacrev(projection.simplex)(v), torch.diag(s) - torch.outer(s, s) / s.sum())
    total = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(projection.simplex, (v.requires_grad_(), total))


@pytest.mark.parametrize("offset", [0.0, 1e12, -1e12])
def test_the_simplex_projection_survives_large_numbers(offset):
    u = projection.simplex(torch.tensor([0.5, 1.0, 0.0]).double() + offset)
    assert u.sum().item() == pytest.approx(1.0, abs=1e-12)
    close(u, torch.tensor([0.25, 0.75, 0.0]).double(), atol=1e-3)


def test_the_affine_projection_and_its_derivatives():
    A, b, v = random(2, 4, grad=True), random(2, seed=1, grad=True), random(4, seed=2, grad=True)
    u = projection.affine(v, (A, b))
    close(A @ u, b)
    assert gradcheck(lambda v, A, b: projection.affine(v, (A, b)), (v, A, b))


def test_the_isotonic_projection_is_scikit_learns():
    v = random(4, 50)
    theirs = np.stack([sklearn.isotonic.isotonic_regression(row.numpy()) for row in v])
    close(projection.isotonic(v), torch.tensor(theirs))


def test_transport_is_the_plan_of_an_independent_sinkhorn():
    ot = pytest.importorskip("ot")
    cost = random(5, 4).abs()
    a, b = torch.softmax(random(5, seed=1), 0), torch.softmax(random(4, seed=2), 0)
    plan = projection.transport(-cost / 0.1, (a, b))
    close(plan, torch.tensor(ot.sinkhorn(a.numpy(), b.numpy(), cost.numpy(), 0.1, stopThr=1e-13)), atol=1e-8)


def test_transport_is_differentiable_in_costs_and_marginals_and_in_batches():
    plan = functools.partial(projection.transport, tol=1e-13)
    S, u, v = random(3, 2, grad=True), random(3, seed=1, grad=True), random(2, seed=2, grad=True)
    of = lambda S, u, v: plan(S, (torch.softmax(u, 0), torch.softmax(v, 0)))  # noqa: E731
    assert gradcheck(of, (S, u, v))
    assert gradgradcheck(lambda S: of(S, u.detach(), v.detach()), (S,))
    batch = random(4, 3, 2, seed=5)
    close(
        vmap(jacrev(lambda S: of(S, u, v)))(batch),
        torch.stack([jacrev(lambda S: of(S, u, v))(S) for S in batch]),
    )


def test_transport_names_bad_input_and_running_out_of_iterations():
    a, b = torch.ones(3).double() / 3, torch.ones(2).double() / 2
    with pytest.raises(ValueError, match=r"shape \(3, 2\) like the marginals, got \(2, 3\)"):
        projection.transport(random(2, 3), (a, b))
    with pytest.raises(ValueError, match="the same total, got 1 and 2"):
        projection.transport(random(3, 2), (a, 2 * b))
    with pytest.raises(ValueError, match="positive marginals"):
        projection.transport(random(3, 2), (a, torch.tensor([1.0, 0.0]).double()))
    with pytest.warns(RuntimeWarning, match="transport stopped after 2 iterations"):
        projection.transport(20 * random(3, 2), (a, b), maxiter=2)


def test_bad_totals_are_named():
    with pytest.raises(ValueError, match="total must be above 0, got 0"):
        projection.simplex(torch.zeros(3), 0.0)


# --- proximal operators ----------------------------------------------------------------------------------------------


def barrier(u):
    return torch.where(u >= 0, 0.0, math.inf).sum(-1)


PENALTIES = {
    "none": (prox.none, 0.7, lambda u: 0 * u.sum(-1)),
    "lasso": (prox.lasso, 0.7, lambda u: 0.7 * u.abs().sum(-1)),
    "nonnegative_lasso": (
        prox.nonnegative_lasso,
        0.7,
        lambda u: 0.7 * u.sum(-1) + barrier(u),
    ),
    "elastic_net": (prox.elastic_net, (0.7, 0.4), lambda u: 0.7 * u.abs().sum(-1) + 0.2 * u.square().sum(-1)),
    "group_lasso": (prox.group_lasso, 0.7, lambda u: 0.7 * u.norm(dim=-1)),
    "ridge": (prox.ridge, 0.7, lambda u: 0.35 * u.square().sum(-1)),
    "nonnegative_ridge": (
        prox.nonnegative_ridge,
        0.7,
        lambda u: 0.35 * u.square().sum(-1) + barrier(u),
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_proximal_operators_minimise_what_they_should_and_are_differentiable(name):
    operator, strength, penalty = PENALTIES[name]
    v, scaling = random(3, 5, grad=True), 0.6

    def objective(u):
        return (u - v).square().sum(-1) / 2 + scaling * penalty(u)

    u = operator(v, strength, scaling)
    for seed in range(20):
        assert (objective(u) <= objective(u + 0.1 * random(3, 5, seed=seed))).all()
        assert (objective(u) <= objective(torch.relu(u + 0.1 * random(3, 5, seed=seed)))).all()
    assert gradcheck(lambda v: operator(v, strength, scaling), (v,))


def test_strengths_are_differentiable_and_groups_vanish_whole():
    v = random(3, 4, grad=True)
    strength = torch.tensor([[0.5], [1.0], [10.0]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(prox.group_lasso, (v, strength))
    assert prox.group_lasso(v, strength)[2].abs().max() == 0
    assert gradcheck(prox.lasso, (v, strength))


# --- ready solvers ---------------------------------------------------------------------------------------------------


def test_ridge_is_differentiable_in_everything_and_agrees_with_scikit_learn():
    X, y = random(12, 3, grad=True), random(12, 2, seed=1, grad=True)
    penalty = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(ridge, (X, y, penalty))
    assert gradgradcheck(ridge, (X, y, penalty), atol=1e-4)
    model = sklearn.linear_model.Ridge(alpha=12 * 0.5, fit_intercept=False).fit(X.detach(), y.detach())
    close(ridge(X, y, 0.5), torch.tensor(model.coef_.T))
    penalties = torch.tensor([0.1, 1.0], dtype=torch.float64)
    close(vmap(lambda p: ridge(X, y, p))(penalties), torch.stack([ridge(X, y, p) for p in penalties]))


def test_the_lasso_derivative_is_the_closed_form_on_the_support_and_zero_elsewhere():
    X, y, penalty = random(40, 15), random(40, seed=1), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    w = lasso(X, y, penalty, tol=1e-14)
    support = w != 0
    assert 2 < support.sum() < 13
    # X_sᵀ(X_s w_s - y) / n + λ sign(w_s) = 0, so ∂w_s/∂λ = -n (X_sᵀX_s)⁻¹ sign(w_s).
    exact = torch.zeros(15).double()
    Xs = X[:, support]
    exact[support] = -40 * torch.linalg.solve(Xs.T @ Xs, w[support].sign().detach())
    found = torch.stack([torch.autograd.grad(c, penalty, retain_graph=True)[0] for c in w])
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        h = 1e-5
        difference = (lasso(X, y, penalty + h, tol=1e-15) - lasso(X, y, penalty - h, tol=1e-15)) / (2 * h)
    torch.testing.assert_close(found, difference, rtol=0, atol=1e-8)


def svm_problem():
    X = random(20, 6)
    Y = torch.eye(3, dtype=torch.float64)[torch.arange(20) % 3]
    return X, Y


def test_the_svm_dual_is_a_minimum_and_both_fixed_points_give_the_derivative():
    X, Y = svm_problem()

    def value(beta, penalty):
        return (X.T @ (Y - beta)).square().sum() / (2 * penalty) + (beta * Y).sum()

    beta = svm_dual(X, Y, 3.0)
    others = projection.simplex(random(200, 20, 3, seed=5))
    assert all(value(beta, 3.0) <= value(0.9 * beta + 0.1 * other, 3.0) for other in others)

    def loss(penalty, fixed_point):
        beta = svm_dual(X, Y, penalty, fixed_point=fixed_point, tol=1e-12)
        return (X @ svm_weights(beta, X, Y, penalty) - Y).square().mean()

    penalty, h = torch.tensor(3.0, dtype=torch.float64, requires_grad=True), 1e-4
    difference = (loss(3.0 + h, "projected_gradient") - loss(3.0 - h, "projected_gradient")) / (2 * h)
    for fixed_point in ("projected_gradient", "mirror_descent"):
        (found,) = torch.autograd.grad(loss(penalty, fixed_point), penalty)
        assert found.item() == pytest.approx(difference.item(), rel=1e-5)


def test_the_svm_predicts():
    digits = pytest.importorskip("sklearn.datasets").load_digits(n_class=3)
    X, Y = torch.tensor(digits.data / 16), torch.eye(3).double()[torch.tensor(digits.target)]
    W = svm_weights(svm_dual(X[:200], Y[:200], 1.0), X[:200], Y[:200], 1.0)
    assert ((X[200:] @ W).argmax(1) == Y[200:].argmax(1)).double().mean() > 0.95


def test_ready_solvers_warn_when_they_stop_early():
    X, Y = svm_problem()
    with pytest.warns(RuntimeWarning, match="svm_dual stopped after 3 steps"):
        svm_dual(X, Y, 0.01, maxiter=3)
    with pytest.warns(RuntimeWarning, match="lasso stopped after 1 passes"):
        lasso(X, Y[:, 0], 1e-4, maxiter=1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda X, Y: ridge(X, Y, -1.0), ValueError, "penalty must be positive and finite"),
        (lambda X, Y: ridge(X, Y[:5], 1.0), ValueError, r"got \(20, 6\) and \(5, 3\)"),
        (lambda X, Y: ridge(X, Y.float(), 1.0), TypeError, "share one floating-point dtype"),
        (lambda X, Y: ridge(X * math.nan, Y, 1.0), ValueError, "X must be finite"),
        (lambda X, Y: lasso(X, Y[:, 0], 0.0), ValueError, "penalty must be positive"),
        (lambda X, Y: lasso(X, Y[:, 0], 1.0, tol=0.0), ValueError, "tol must be above 0"),
        (lambda X, Y: svm_dual(X, Y[:, 0], 1.0), ValueError, "one column for each class"),
        (lambda X, Y: svm_dual(X, Y, 1.0, fixed_point="newton"), ValueError, "fixed_point must be one of"),
        (lambda X, Y: svm_dual(X, Y, 1.0, maxiter=0), ValueError, "maxiter must be at least 1"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(*svm_problem())
