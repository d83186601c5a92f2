"""The decorators: derivatives of solutions against closed forms, finite differences and every torch.func transform."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from workingpapers.data import diabetes
from workingpapers.optimization.implicit_diff import (
    custom_fixed_point,
    custom_root,
    jacobian,
    linear_solve,
    optimality,
    root_jvp,
    root_vjp,
)

SOLVERS = ["auto", "cg", "normal_cg", "gmres", "bicgstab", "lu", "cholesky"]


class Ridge:
    """Ridge regression on the diabetes data, whose derivatives in the penalty are known in closed form."""

    def __init__(self, dtype=torch.float64):
        data = diabetes()
        X, y = (torch.tensor(data[name], dtype=dtype) for name in ("columns", "response"))
        self.n, self.d = X.shape
        self.H, self.c = X.T @ X / self.n, X.T @ y / self.n
        self.dtype = dtype

    def matrix(self, penalty):
        return self.H + penalty * torch.eye(self.d, dtype=self.dtype)

    def gradient(self, w, penalty):
        return self.H @ w - self.c + penalty * w

    def solver(self, init, penalty):
        return torch.linalg.solve(self.matrix(penalty), self.c)

    def first(self, penalty):  # -(H + λI)⁻¹ w
        return -torch.linalg.solve(self.matrix(penalty), self.solver(None, penalty))

    def second(self, penalty):  # 2 (H + λI)⁻² w
        return -2 * torch.linalg.solve(self.matrix(penalty), self.first(penalty))

    def third(self, penalty):
        return -3 * torch.linalg.solve(self.matrix(penalty), self.second(penalty))


@pytest.fixture(scope="module")
def problem():
    return Ridge()


@pytest.fixture
def penalty():
    return torch.tensor(0.1, dtype=torch.float64, requires_grad=True)


def tanh_model():
    """x = tanh(W x + b): a fixed point with a curved, non-symmetric dependence on everything."""
    generator = torch.Generator().manual_seed(0)
    W = 0.15 * torch.randn(3, 3, dtype=torch.float64, generator=generator)
    b = torch.randn(3, dtype=torch.float64, generator=generator)

    def iterate(init, W, b):
        x = torch.zeros_like(b)
        for _ in range(45):
            x = torch.tanh(W @ x + b)
        return x

    solver = custom_fixed_point(lambda x, W, b: torch.tanh(W @ x + b))(iterate)
    return solver, W.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("solve", SOLVERS)
def test_the_derivative_of_ridge_is_the_closed_form_with_every_linear_solver(problem, penalty, solve):
    solver = custom_root(problem.gradient, solve=solve)(problem.solver)
    assert solver.linear_solve_info is None
    solver(None, penalty).sum().backward()
    torch.testing.assert_close(penalty.grad, problem.first(penalty).sum(), rtol=1e-8, atol=0)
    assert penalty.grad.item() == pytest.approx(-801.88198833, abs=1e-6)
    info = solver.linear_solve_info
    assert info.converged
    assert info.residual <= 1e-10
    assert info.method == ("lu" if solve == "auto" else solve)
    assert (info.iterations == 0) == (info.method in ("lu", "cholesky"))


@pytest.mark.parametrize(
    ("matrix", "method"),
    [
        (torch.eye(257), "cg"),
        (torch.diag(torch.linspace(1, 2, 257)) + torch.diag(torch.ones(256), 1) / 4, "normal_cg"),
        (torch.diag(torch.linspace(-2, 2, 258)[torch.arange(258) != 129][:257]), None),
    ],
    ids=["definite", "not symmetric", "indefinite"],
)
def test_auto_leaves_factorisations_above_256_unknowns(matrix, method):
    # M (θ x) = 1.
    M, ones = matrix.double(), torch.ones(257).double()
    theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = torch.linalg.solve(M, ones)
    solver = custom_root(lambda x, theta: theta * (M @ x) - ones)(lambda init, theta: x / theta)
    (derivative,) = torch.autograd.grad(solver(None, theta).sum(), theta)
    assert derivative.item() == pytest.approx(-x.sum().item() / 4)
    assert solver.linear_solve_info.converged
    assert method is None or solver.linear_solve_info.method == method


@pytest.mark.parametrize("solve", ["lu", "normal_cg", "gmres", "bicgstab"])
def test_first_and_second_derivatives_of_a_nonlinear_fixed_point_agree_with_differences(solve):
    _, W, b = tanh_model()
    plain, _, _ = tanh_model()
    solver = custom_fixed_point(lambda x, W, b: torch.tanh(W @ x + b), solve=solve, tol=1e-13)(plain.__wrapped__)
    of = functools.partial(solver, None)
    assert gradcheck(of, (W, b), check_forward_ad=True)
    assert gradgradcheck(of, (W, b), check_fwd_over_rev=True, fast_mode=True)


def test_every_composition_of_transforms_gives_the_closed_form(problem, penalty):
    of = functools.partial(custom_root(problem.gradient)(problem.solver), None)
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    for first in (jacrev, jacfwd):
        close(first(of)(penalty), problem.first(penalty))
    for second in (jacrev(jacrev(of)), jacfwd(jacrev(of)), jacrev(jacfwd(of))):
        close(second(penalty), problem.second(penalty))
    close(jacrev(jacrev(jacrev(of)))(penalty), problem.third(penalty))
    (once,) = torch.autograd.grad(of(penalty).sum(), penalty, create_graph=True)
    (twice,) = torch.autograd.grad(once, penalty, create_graph=True)
    (thrice,) = torch.autograd.grad(twice, penalty)
    close(
        torch.stack([once, twice, thrice]),
        torch.stack([f(penalty).sum() for f in (problem.first, problem.second, problem.third)]),
    )
    with torch.autograd.forward_ad.dual_level():
        dual = of(torch.autograd.forward_ad.make_dual(penalty.detach(), torch.ones_like(penalty)))
        close(torch.autograd.forward_ad.unpack_dual(dual).tangent, problem.first(penalty))


def test_forward_over_forward_is_refused_where_torch_would_return_zero(problem, penalty):
    of = functools.partial(custom_root(problem.gradient)(problem.solver), None)
    with pytest.raises(NotImplementedError, match="forward over reverse"):
        jacfwd(jacfwd(of))(penalty)


def test_batches_agree_with_loops_at_every_order(problem):
    of = functools.partial(custom_root(problem.gradient)(problem.solver), None)
    penalties = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)

    def stacked(function):
        return torch.stack([function(penalty) for penalty in penalties])

    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    close(vmap(of)(penalties), stacked(lambda p: problem.solver(None, p)))
    close(vmap(jacrev(of))(penalties), stacked(problem.first))
    close(vmap(jacfwd(of))(penalties), stacked(problem.first))
    close(vmap(hessian(lambda p: of(p).sum()))(penalties), stacked(lambda p: problem.second(p).sum()))
    close(grad(lambda p: vmap(of)(p).sum())(penalties), stacked(lambda p: problem.first(p).sum()))
    grid = penalties.repeat(2, 1)
    close(vmap(vmap(grad(lambda p: of(p).sum())))(grid)[1], stacked(lambda p: problem.first(p).sum()))


@pytest.mark.parametrize("solve", ["lu", "normal_cg", "gmres", "bicgstab"])
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 1)])
def test_a_batch_of_different_systems_is_solved_side_by_side(solve, in_dims):
    plain, W, b = tanh_model()
    solver = custom_fixed_point(lambda x, W, b: torch.tanh(W @ x + b), solve=solve, tol=1e-12)(plain.__wrapped__)
    Ws = torch.stack([W, 0.5 * W]).detach() if in_dims[0] == 0 else W.detach()
    bs = torch.stack([b, -b, 2 * b][:2], in_dims[1]).detach() if in_dims[1] is not None else b.detach()

    def value(W, b):
        return solver(None, W, b).square().sum()

    batched = vmap(grad(value, argnums=(0, 1)), in_dims=in_dims)(Ws, bs)
    for i in range(2):
        sample = [t if dim is None else t.select(dim, i) for t, dim in zip((Ws, bs), in_dims, strict=True)]
        for ours, single in zip(batched, grad(value, argnums=(0, 1))(*sample), strict=True):
            torch.testing.assert_close(ours[i], single, rtol=1e-8, atol=1e-10)


def test_a_shared_argument_of_a_batch_collects_the_gradients_of_all_samples():
    solver, W, b = tanh_model()
    bs = torch.stack([b, -b, 2 * b]).detach()
    total = vmap(lambda b: solver(None, W, b))(bs).sum()
    alone = sum(solver(None, W, b).sum() for b in bs)
    torch.testing.assert_close(torch.autograd.grad(total, W), torch.autograd.grad(alone, W))


def test_vectorize_runs_the_solver_once_on_the_whole_batch(problem):
    calls = []

    def counting(init, penalty):
        calls.append(1)
        return problem.solver(init, penalty)

    penalties = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    results = []
    for vectorize in (False, True):
        calls.clear()
        of = functools.partial(custom_root(problem.gradient, vectorize=vectorize)(counting), None)
        results.append(vmap(grad(lambda p, of=of: of(p).sum()))(penalties))
        assert len(calls) == (1 if vectorize else 3)
    torch.testing.assert_close(*results)


def test_variables_and_parameters_may_be_trees_with_things_that_are_no_tensors():
    # x = {"u": a + k * c, "v": (b, a * b)} in disguise.
    def residual(x, data, power, labels, nothing, *, scale):
        u, (v, w) = x["u"], x["v"]
        return {"u": scale * (u - data["a"] - power * labels.sum()), "v": (v**3 - data["b"] ** 3, w - data["a"] * v)}

    def solver(init, data, power, labels, nothing, *, scale):
        assert nothing is None
        assert scale == 2.0
        assert init == "start"
        a, b = data["a"], data["b"]
        return {"u": a + power * labels.sum(), "v": (b, a * b)}

    implicit = custom_root(residual)(solver)
    data = {name: torch.rand(3, dtype=torch.float64, requires_grad=True) for name in "ab"}
    x = implicit("start", data, 3, torch.tensor([1, 2]), None, scale=2.0)
    assert torch.equal(x["u"], data["a"] + 9)
    (x["u"] + 2 * x["v"][0] + x["v"][1]).sum().backward()
    torch.testing.assert_close(data["a"].grad, 1 + data["b"])
    torch.testing.assert_close(data["b"].grad, 2 + data["a"])


def test_integer_arguments_can_be_batched(problem):
    def residual(x, scale, label):
        return scale * x - (torch.arange(3) == label).to(x.dtype)

    solver = custom_root(residual)(lambda init, scale, label: torch.eye(3, dtype=scale.dtype)[label] / scale)
    scale = torch.tensor(2.0, dtype=torch.float64)
    found = vmap(jacrev(lambda s, k: solver(None, s, k)), in_dims=(None, 0))(scale, torch.tensor([2, 0]))
    torch.testing.assert_close(found, -torch.eye(3, dtype=torch.float64)[[2, 0]] / 4)


def test_auxiliary_output_is_handed_through_and_carries_no_gradient(problem, penalty):
    def solver(init, penalty):
        w = problem.solver(init, penalty)
        return w, {"loss": w.sum(), "iterations": 7}

    implicit = custom_root(problem.gradient, has_aux=True)(solver)
    w, aux = implicit(None, penalty)
    assert aux["iterations"] == 7
    assert not aux["loss"].requires_grad
    assert w.requires_grad
    w, aux = vmap(lambda p: implicit(None, p))(torch.tensor([0.1, 0.2], dtype=torch.float64))
    torch.testing.assert_close(aux["loss"], w.sum(1))
    assert aux["iterations"].tolist() == [7, 7]
    _, gradient = jvp(lambda p: implicit(None, p)[0], (penalty.detach(),), (torch.ones_like(penalty).detach(),))
    torch.testing.assert_close(gradient, problem.first(penalty))


def test_a_black_box_solver_may_return_numpy_arrays_and_sees_no_graph(problem, penalty):
    def scipys(init, penalty):
        assert not penalty.requires_grad
        assert not torch.is_grad_enabled()
        quadratic = problem.matrix(penalty).numpy(), problem.c.numpy()

        def objective(w):
            return (w @ quadratic[0] @ w / 2 - quadratic[1] @ w, quadratic[0] @ w - quadratic[1])

        return scipy.optimize.minimize(objective, init, jac=True, options={"gtol": 1e-10}).x

    w = custom_root(problem.gradient)(scipys)(np.zeros(problem.d), penalty)
    assert w.dtype == torch.float64
    w.sum().backward()
    torch.testing.assert_close(penalty.grad, problem.first(penalty).sum(), rtol=1e-6, atol=0)


def test_solvers_that_differentiate_inside_leave_the_arguments_alone(problem, penalty):
    def lbfgs(init, penalty):
        w = torch.zeros(problem.d, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = w @ problem.matrix(penalty) @ w / 2 - problem.c @ w
            loss.backward()
            return loss

        optimizer.step(closure)
        return w

    w = custom_root(problem.gradient)(lbfgs)(None, penalty)
    assert penalty.grad is None
    w.sum().backward()
    torch.testing.assert_close(penalty.grad, problem.first(penalty).sum(), rtol=1e-5, atol=0)


def test_the_condition_may_be_multiplied_by_any_invertible_matrix():
    plain, W, b = tanh_model()
    M = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    other = custom_root(lambda x, W, b: M @ (x - torch.tanh(W @ x + b)))(plain.__wrapped__)
    for first, second in zip(
        jacobian(functools.partial(plain, None), (W, b)), jacobian(functools.partial(other, None), (W, b)), strict=True
    ):
        torch.testing.assert_close(first, second)


def test_conditions_may_contain_implicit_solvers():
    # Inner: z = p x; outer: x = (z(x) + q) / 4, so x = q / (4 - p).
    inner = custom_root(lambda z, x, p: z - p * x)(lambda init, x, p: p * x)
    outer = custom_fixed_point(lambda x, p, q: (inner(None, x, p) + q) / 4)(lambda init, p, q: q / (4 - p))
    p = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([1.0, -1.0, 3.0], dtype=torch.float64, requires_grad=True)
    of = functools.partial(outer, None)
    assert gradcheck(of, (p, q), check_forward_ad=True)
    assert gradgradcheck(of, (p, q))


def test_root_vjp_and_jvp_are_transposes_and_differentiable():
    solver, W, b = tanh_model()
    x = solver(None, W, b).detach()

    def residual(x, W, b, name):
        return x - torch.tanh(W @ x + b)

    generator = torch.Generator().manual_seed(2)
    v, dW, db = (torch.randn(s, dtype=torch.float64, generator=generator) for s in ((3,), (3, 3), (3,)))
    gW, gb, nothing = root_vjp(residual, x, (W, b, "name"), v)
    assert nothing is None
    forward = root_jvp(residual, x, (W, b, "name"), (dW, db, None), solve="gmres")
    torch.testing.assert_close(v @ forward, (gW * dW).sum() + gb @ db)
    torch.testing.assert_close(
        root_jvp(residual, x, (W, b, "name"), (None, db, None)), jacrev(lambda b: solver(None, W, b))(b) @ db
    )
    assert gradcheck(lambda W, b: root_vjp(residual, x, (W, b, "name"), v)[:2], (W, b))


def test_jacobian_takes_the_cheaper_mode_and_the_structure_of_its_arguments(problem, penalty):
    of = functools.partial(custom_root(problem.gradient)(problem.solver), None)
    torch.testing.assert_close(jacobian(of, penalty), problem.first(penalty))
    solver, W, b = tanh_model()

    def function(W, pair, label):
        return solver(None, W, pair["b"])[label]

    dW, pair = jacobian(function, (W, {"b": b}, 2))
    assert dW.shape == (3, 3)
    assert pair["b"].shape == (3,)
    with pytest.raises(ValueError, match="at least one argument made of floating-point tensors"):
        jacobian(of, (torch.tensor(1),))


def test_the_second_derivative_sees_how_the_solution_moves(penalty):
    # x = θ² from x² - θ⁴ = 0: a copy of x that does not move would give 4 θ³ / (2 x) differentiated as 6 θ² / x = 6.
    solver = custom_root(lambda x, theta: x**2 - theta**4)(lambda init, theta: theta**2)
    theta = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    (once,) = torch.autograd.grad(solver(None, theta), theta, create_graph=True)
    (twice,) = torch.autograd.grad(once, theta)
    assert (once.item(), twice.item()) == pytest.approx((6.0, 2.0))


def test_one_linear_solve_serves_every_argument():
    solves = []

    def counting(matvec, b):
        solves.append(1)
        return linear_solve.lu(matvec, b)

    plain, W, b = tanh_model()
    solver = custom_fixed_point(lambda x, W, b: torch.tanh(W @ x + b), solve=counting)(plain.__wrapped__)
    ours = torch.autograd.grad(solver(None, W, b).sum(), (W, b))
    assert len(solves) == 1
    assert solver.linear_solve_info.method == "counting"
    torch.testing.assert_close(ours, torch.autograd.grad(plain(None, W, b).sum(), (W, b)))


@pytest.mark.parametrize(
    "solve",
    [
        functools.partial(linear_solve.gmres, restart=2),
        linear_solve.normal_cg,
        lambda matvec, b: torch.linalg.solve(torch.stack([matvec(e) for e in torch.eye(3, dtype=b.dtype)]).T, b),
    ],
)
def test_a_callable_solves_in_the_structure_of_x_and_keeps_all_transforms(solve):
    plain, W, b = tanh_model()
    solver = custom_fixed_point(lambda x, W, b: torch.tanh(W @ x + b), solve=solve)(plain.__wrapped__)
    ours, reference = (jacrev(jacrev(functools.partial(s, None), 1), 1)(W, b) for s in (solver, plain))
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-8)
    bs = torch.stack([b, -b]).detach()
    ours, reference = (vmap(jacfwd(lambda b, s=s: s(None, W, b)))(bs) for s in (solver, plain))
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-8)


def test_a_singular_system_warns_with_its_residual_and_a_ridge_repairs_it():
    # Only x_1 + x_2 is determined.
    def residual(x, theta):
        return (x.sum() - theta).expand(2)

    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    for solve in ("lu", "normal_cg"):
        solver = custom_root(residual, solve=solve)(lambda init, theta: (theta / 2).expand(2))
        # A consistent system: the total has a derivative, and least squares finds it.
        (derivative,) = torch.autograd.grad(solver(None, theta).sum(), theta)
        assert derivative.item() == pytest.approx(1.0)
        with pytest.warns(RuntimeWarning, match=r"relative residual 7\.1e-01"):
            torch.autograd.grad(solver(None, theta)[0], theta)
        assert not solver.linear_solve_info.converged
    solver = custom_root(residual, ridge=1e-6)(lambda init, theta: (theta / 2).expand(2))
    (derivative,) = torch.autograd.grad(solver(None, theta).sum(), theta)
    assert derivative.item() == pytest.approx(1.0, abs=1e-5)


def test_conjugate_gradients_refuse_a_matrix_that_is_not_symmetric():
    plain, W, b = tanh_model()
    for solve in ("cg", "cholesky"):
        solver = custom_fixed_point(lambda x, W, b: torch.tanh(W @ x + b), solve=solve)(plain.__wrapped__)
        with pytest.raises(ValueError, match="symmetric"):
            solver(None, W, b).sum().backward()


def test_running_out_of_iterations_warns(problem, penalty):
    solver = custom_root(problem.gradient, solve="normal_cg", maxiter=2)(problem.solver)
    with pytest.warns(RuntimeWarning, match="did not solve the system in 2 iterations"):
        solver(None, penalty).sum().backward()


def test_check_warns_of_a_point_that_is_no_root(problem, penalty):
    def off(init, penalty):
        return problem.solver(init, penalty) + 1e-2

    custom_root(problem.gradient)(off)(None, penalty)
    custom_root(problem.gradient, check=0.1)(off)(None, penalty)
    with pytest.warns(RuntimeWarning, match=r"\|F\(x, θ\)\| = 3\.\de-03 > 1\.0e-03"):
        custom_root(problem.gradient, check=True)(off)(None, penalty)
    with pytest.warns(RuntimeWarning, match="no solution"):
        vmap(lambda p: custom_root(problem.gradient, check=True)(off)(None, p))(penalty.detach()[None])


def test_check_warns_of_an_active_set_that_still_changes(problem, penalty):
    for changed in (False, True):

        def solver(init, p, changed=changed):
            return (problem.solver(init, p), {"active_set_changed": changed})

        implicit = custom_root(problem.gradient, has_aux=True, check=True)(solver)
        if changed:
            with pytest.warns(RuntimeWarning, match="active set changed"):
                implicit(None, penalty)
        else:
            implicit(None, penalty)


def test_float32_works_without_warnings(penalty):
    problem = Ridge(torch.float32)
    for solve in SOLVERS:
        solver = custom_root(problem.gradient, solve=solve)(problem.solver)
        single = penalty.detach().float().requires_grad_()
        solver(None, single).sum().backward()
        assert single.grad.item() == pytest.approx(-801.882, rel=1e-4)


def test_nothing_is_modified_and_the_solution_is_a_copy(penalty):
    start = torch.ones(2, dtype=torch.float64)
    solver = custom_root(lambda x, p: p * (x - 1))(lambda init, p: init)
    x = solver(start, penalty)
    assert x.data_ptr() != start.data_ptr()
    assert not start.requires_grad
    x.sum().backward()
    assert penalty.grad.item() == 0.0
    start_with_gradient = start.clone().requires_grad_()
    assert torch.autograd.grad(solver(start_with_gradient, penalty).sum(), start_with_gradient, allow_unused=True) == (
        None,
    )


def test_the_wrapped_solver_keeps_its_name_and_documentation(problem):
    implicit = custom_root(problem.gradient)(problem.solver)
    assert implicit.__name__ == "solver"
    assert implicit.__wrapped__ == problem.solver


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solve": "qr"}, ValueError, "solve must be one of 'auto', 'cg'.*got 'qr'"),
        ({"ridge": -1.0}, ValueError, "ridge must be at least 0, got -1.0"),
        ({"tol": 0.0}, ValueError, "tol must be above 0, got 0.0"),
        ({"maxiter": 0}, ValueError, "maxiter must be at least 1, got 0"),
        ({"check": -1.0}, ValueError, "check must be above 0"),
        ({"solve": linear_solve.cg, "tol": 1e-3}, ValueError, "functools.partial"),
    ],
)
def test_bad_options_are_named(options, error, message):
    for decorator in (custom_root, custom_fixed_point):
        with pytest.raises(error, match=message):
            decorator(lambda x, p: x - p, **options)


def test_a_condition_of_the_wrong_kind_is_refused():
    def square(x):
        return x @ x

    with pytest.raises(TypeError, match="use custom_fixed_point"):
        custom_root(optimality.projected_gradient(square, torch.relu))
    with pytest.raises(TypeError, match="use custom_root"):
        custom_fixed_point(optimality.stationary(square))


@pytest.mark.parametrize(
    ("condition", "solution", "error", "message"),
    [
        (lambda x, p: (x, x), torch.ones(2), TypeError, r"structure of x, \(2,\), got \(\(2,\), \(2,\)\)"),
        (lambda x, p: x[:1], torch.ones(2), TypeError, r"shapes of x, \(2,\), got \(1,\)"),
        (lambda x, p: torch.ones(2), torch.ones(2), ValueError, "does not depend on x"),
        (lambda x, p: x, torch.tensor([1.0, float("nan")]), ValueError, "not finite"),
        (lambda x, p: x, torch.ones(2, dtype=torch.int64), TypeError, "floating-point tensors of one dtype"),
        (lambda x, p: x, "text", TypeError, "tensors or arrays, got a str"),
    ],
)
def test_bad_conditions_and_solutions_are_named(condition, solution, error, message):
    p = torch.tensor(1.0, requires_grad=True)
    for decorator in (custom_root, custom_fixed_point):
        if decorator is custom_fixed_point and error is ValueError and "depend" in message:
            continue  # x - T(x) always depends on x
        with pytest.raises(error, match=message):
            decorator(condition)(lambda init, p: solution)(None, p).sum().backward()


def test_has_aux_needs_a_pair():
    with pytest.raises(TypeError, match=r"must return \(x, aux\), got a Tensor"):
        custom_root(lambda x: x, has_aux=True)(lambda init: torch.zeros(2))(None)
