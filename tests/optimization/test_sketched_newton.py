"""Tests of the mathematics: each fails when the idea it names is removed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse as sp
import torch
from torch.autograd.functional import hessian, jacobian

from solver_contract import check_result
from workingpapers.optimization import sketched_newton
from workingpapers.optimization.sketched_newton import (
    HOCK_SCHITTKOWSKI,
    ExactAugmentedLagrangian,
    augmented_lagrangian,
    hock_schittkowski,
    l1_sqp,
    minimize_equality,
    poisson_control,
    sparse_quadratic,
    sphere_logistic,
)
from workingpapers.optimization.sketched_newton.solver import reduced_hessian_is_positive, smallest_gram_eigenvalue


def numpy_derivatives(problem):
    """The problem as NumPy functions with given derivatives."""

    def tensor(x):
        return torch.tensor(x, dtype=torch.float64)

    def lagrangian(x, lam):
        return problem.fun(x) + problem.cons(x) @ tensor(lam)

    return (lambda x: float(problem.fun(tensor(x))), lambda x: problem.cons(tensor(x)).numpy()), {
        "grad": lambda x: jacobian(problem.fun, tensor(x)).numpy(),
        "jac": lambda x: jacobian(problem.cons, tensor(x)).numpy(),
        "lag_hess": lambda x, lam: hessian(lambda y: lagrangian(y, lam), tensor(x)).numpy(),
    }


def solve(problem, **options):
    return minimize_equality(
        problem.fun, problem.x0, problem.cons, **problem.derivatives, **({"random_state": 0} | options)
    )


@pytest.fixture(scope="module")
def logistic():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((60, 12))
    labels = np.where(features @ rng.standard_normal(12) + rng.standard_normal(60) > 0, 1.0, -1.0)
    return sphere_logistic(features, labels, n_affine=4, random_state=1)


# --- the merit function --------------------------------------------------------------------------------------------


def test_the_gradient_of_the_merit_function_is_that_of_its_value_with_the_hessian_of_the_lagrangian():
    problem = hock_schittkowski("HS77")  # its constraints are nonlinear: ∇²f in place of ∇²L is off by thousands
    rng = np.random.default_rng(0)
    x = problem.x0 + 0.3 * torch.tensor(rng.standard_normal(5))
    lam = torch.tensor(rng.standard_normal(2) * 3)
    merit = ExactAugmentedLagrangian(problem.fun, problem.cons, eta1=2.0, eta2=0.3)
    of_x, of_lam = merit.gradient(x, lam)
    for _ in range(4):
        v, w = torch.tensor(rng.standard_normal(5)), torch.tensor(rng.standard_normal(2))
        h = 1e-6
        slope = (merit.value(x + h * v, lam + h * w) - merit.value(x - h * v, lam - h * w)) / (2 * h)
        assert float(of_x @ v + of_lam @ w) == pytest.approx(slope, rel=1e-6)


def test_the_merit_function_is_its_formula_and_a_kkt_pair_is_stationary():
    problem = hock_schittkowski("HS7")
    x, lam = torch.tensor([0.5, 1.0], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    f, c = float(problem.fun(x)), problem.cons(x)
    gradient = jacobian(problem.fun, x) + jacobian(problem.cons, x).T @ lam
    expected = f + float(c @ lam) + 1.5 * float(c @ c) + 0.2 * float(gradient @ gradient)
    merit = ExactAugmentedLagrangian(problem.fun, problem.cons, eta1=3.0, eta2=0.4)
    assert merit.value(x, lam) == pytest.approx(expected, rel=1e-14)
    found = solve(problem, sketch="exact", tol=1e-10)
    for part in merit.gradient(found.x, found.multipliers):
        assert float(part.norm()) < 1e-7


def test_numpy_callables_with_given_derivatives_give_the_same_merit_function():
    problem = hock_schittkowski("HS79")
    (fun, cons), derivatives = numpy_derivatives(problem)
    x, lam = np.array([1.0, 2.0, 0.5, 1.5, 2.5]), np.array([0.3, -1.0, 2.0])
    ours = ExactAugmentedLagrangian(fun, cons, **derivatives)
    theirs = ExactAugmentedLagrangian(problem.fun, problem.cons)
    tensors = torch.tensor(x), torch.tensor(lam)
    assert ours.value(x, lam) == pytest.approx(theirs.value(*tensors), rel=1e-14)
    for array, tensor in zip(ours.gradient(x, lam), theirs.gradient(*tensors), strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-12)


# --- solutions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOCK_SCHITTKOWSKI)
def test_hock_schittkowski_problems_are_solved_to_their_known_values(name):
    problem = hock_schittkowski(name)
    found = solve(problem, sketch="exact")
    assert found.converged
    assert found.kkt <= 1e-4
    assert found.fun == pytest.approx(problem.optimum, abs=1e-3)
    assert found.constr_violation <= 1e-4


# what the authors' recorded runs took, with rows and with Gaussian vectors
RECORDED = {"HS6": 9, "HS28": 1, "HS40": 3, "HS42": 4, "HS78": 4}


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("sketch", ["kaczmarz", "gaussian"])
def test_sketched_steps_take_as_many_iterations_as_the_authors_runs(name, sketch):
    found = solve(hock_schittkowski(name), sketch=sketch)
    assert found.converged
    assert found.nit == RECORDED[name]
    assert found.inner_iters > 100 * found.nit


@pytest.mark.parametrize(
    ("sketch", "block"),
    [
        ("kaczmarz", 1),
        ("weighted-kaczmarz", 1),
        ("block-kaczmarz", 4),
        ("gaussian", 1),
        ("block-gaussian", 4),
        ("sparse-sign", 3),
        ("gmres", 1),
    ],
)
def test_every_sketch_reaches_the_solution_of_trust_constr(logistic, sketch, block):
    found = solve(logistic, sketch=sketch, block=block, accuracy="relative", tol=1e-6)
    assert found.converged
    assert found.kkt <= 1e-6
    constraint = scipy.optimize.NonlinearConstraint(logistic.cons, 0, 0, jac=logistic.derivatives["jac"])
    independent = scipy.optimize.minimize(
        logistic.fun,
        logistic.x0,
        jac=logistic.derivatives["grad"],
        constraints=constraint,
        method="trust-constr",
        options={"gtol": 1e-9, "xtol": 1e-12},
    )
    np.testing.assert_allclose(found.x, independent.x, atol=1e-5)
    assert found.fun == pytest.approx(independent.fun, abs=1e-6)


def test_multipliers_solve_the_kkt_system_of_a_quadratic_program_in_one_step():
    problem = poisson_control(3)
    n, m = len(problem.x0), len(problem.cons(problem.x0))
    H, G = (problem.derivatives[name](problem.x0, *more) for name, more in (("lag_hess", (0,)), ("jac", ())))
    K = sp.block_array([[H, G.T], [G, None]]).toarray()
    linear = H @ problem.x0 - problem.derivatives["grad"](problem.x0)
    exact = np.linalg.solve(K, np.r_[linear, np.zeros(m)])
    for sketch in ("exact", "kaczmarz"):
        found = solve(problem, sketch=sketch, max_inner=3_000_000)
        assert found.nit == 1
        np.testing.assert_allclose(np.r_[found.x, found.multipliers], exact, atol=1e-5)
    assert n == 2 * m


def test_a_dense_and_a_sparse_problem_are_solved_alike():
    problem = sparse_quadratic(40, random_state=0)
    dense = {name: (lambda *x, f=f: f(*x).toarray()) for name, f in problem.derivatives.items() if name != "grad"}
    found = solve(problem, tol=1e-8)
    same = minimize_equality(
        problem.fun,
        problem.x0,
        problem.cons,
        grad=problem.derivatives["grad"],
        **dense,
        sketch="exact",
        tol=1e-8,
    )
    np.testing.assert_allclose(found.x, same.x, atol=1e-7)
    assert found.flops < 1e7


def test_start_multipliers_by_least_squares_and_given_ones():
    problem = hock_schittkowski("HS79")
    (fun, cons), derivatives = numpy_derivatives(problem)
    x0 = problem.x0.numpy()
    grad, jac = derivatives["grad"](x0), derivatives["jac"](x0)
    by_hand = -np.linalg.solve(jac @ jac.T, jac @ grad)
    common = dict(sketch="exact", max_iter=0, **derivatives)
    for lam0 in ("ls", by_hand):
        with pytest.warns(RuntimeWarning, match="stopped after 0 iterations"):
            found = minimize_equality(fun, x0, cons, lam0=lam0, **common)
        np.testing.assert_allclose(found.multipliers, by_hand, rtol=1e-10)
    sparse = sparse_quadratic(20, random_state=0)
    with pytest.warns(RuntimeWarning):
        found = solve(sparse, lam0="ls", max_iter=0)
    G = sparse.derivatives["jac"](sparse.x0).toarray()
    gradient = sparse.derivatives["grad"](sparse.x0) + G.T @ found.multipliers
    np.testing.assert_allclose(G @ gradient, 0.0, atol=1e-10)


def test_float32_tensors_stay_float32():
    problem = hock_schittkowski("HS78")
    found = minimize_equality(problem.fun, problem.x0.float(), problem.cons, sketch="exact", tol=1e-3)
    assert found.converged
    assert found.x.dtype == torch.float32
    assert found.fun == pytest.approx(problem.optimum, abs=1e-3)


def test_a_given_hessian_of_f_is_completed_by_that_of_the_constraints():
    problem = hock_schittkowski("HS77")
    given = minimize_equality(
        problem.fun, problem.x0, problem.cons, hess=lambda x: hessian(problem.fun, x), sketch="exact"
    )
    assert given.nit == solve(problem, sketch="exact").nit == 8
    torch.testing.assert_close(given.x, solve(problem, sketch="exact").x)


# --- the safeguards ------------------------------------------------------------------------------------------------


def test_penalties_rise_until_the_step_is_one_of_descent_and_then_stay():
    found = solve(hock_schittkowski("HS42"), sketch="exact")
    eta1, eta2 = found.history["eta1"], found.history["eta2"]
    assert found.eta == pytest.approx((1.5**4, 0.1 / 1.5**2))
    assert (np.diff(eta1) >= 0).all()
    np.testing.assert_allclose(np.log(eta1) / np.log(1.5**2), -np.log(eta2 / 0.1) / np.log(1.5), atol=1e-12)


def test_every_step_lowers_the_merit_function():
    problem = hock_schittkowski("HS7")
    path = []
    found = solve(
        problem, sketch="exact", callback=lambda k, x, fun: path.append((k, x, fun)) and None, options={"eta1": 10.0}
    )
    assert [k for k, _, _ in path] == list(range(1, found.nit))
    assert all(math.isclose(float(problem.fun(x)), fun) for _, x, fun in path)
    assert (found.history["step"][1:] < 1).any()  # the first Newton steps are too long
    assert found.history["step"][-1] == 1.0  # and the last are not


def test_a_concave_objective_is_shifted_to_a_minimum_and_not_a_maximum():
    # on the circle, -x has its minimum at (1, 0) and its maximum at (-1, 0); the plain Newton step goes to the maximum
    def fun(x):
        return -x[0] - 0.5 * x[1] ** 2

    def cons(x):
        return x @ x - 1

    start = torch.tensor([-0.6, 0.8], dtype=torch.float64)
    found = minimize_equality(fun, start, lambda x: cons(x).reshape(1), sketch="exact", tol=1e-8)
    assert (found.history["shift"] > 0).any()
    reference = min(-math.cos(t) - 0.5 * math.sin(t) ** 2 for t in np.linspace(0, 2 * np.pi, 100_001))
    assert found.fun == pytest.approx(reference, abs=1e-8)


def test_the_test_of_curvature_looks_at_the_null_space_of_the_jacobian_only():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    G = rng.standard_normal((3, 3)) @ basis[:, :3].T
    for least, positive in ((0.1, True), (-0.1, False)):
        # strongly negative in the range of Gᵀ, which must not matter
        H = basis @ np.diag([-5.0, -5.0, -5.0, least, 1.0, 2.0, 3.0, 4.0]) @ basis.T
        assert reduced_hessian_is_positive(H, G, 1e-6) is positive
        assert reduced_hessian_is_positive(sp.csr_array(H), sp.csr_array(G), 1e-6) is positive
    assert reduced_hessian_is_positive(-np.eye(3), rng.standard_normal((3, 3)), 1e-6)  # no null space


def test_the_smallest_eigenvalue_of_a_sparse_gram_matrix():
    G = sparse_quadratic(2500, random_state=0).derivatives["jac"](None)
    assert G.shape[0] > 300
    dense = np.linalg.svd(G.toarray(), compute_uv=False)[-1] ** 2
    assert smallest_gram_eigenvalue(G) == pytest.approx(dense, rel=1e-2)
    twice = sp.csr_array(sp.vstack([G, G[:1]]))
    assert smallest_gram_eigenvalue(twice) < 1e-12


# --- accuracy and rates --------------------------------------------------------------------------------------------


def iterations(name, **options):
    found = solve(hock_schittkowski(name), tol=1e-8, **options)
    assert found.converged
    return found


@pytest.mark.parametrize("name", ["HS28", "HS78"])
def test_the_forcing_rule_sets_the_local_rate(name):
    constant = iterations(name, accuracy="relative")
    quadratic = iterations(name, accuracy="relative", theta="quadratic")
    exact = iterations(name, sketch="exact")
    assert constant.nit > quadratic.nit >= exact.nit
    assert (constant.history["residual"][1:] <= 0.1 + 1e-12).all()
    kkt = quadratic.history["kkt"]
    assert (quadratic.history["residual"][1:] <= np.minimum(0.1, kkt[:-1]) + 1e-12).all()


def test_relative_accuracy_takes_far_fewer_row_steps():
    for name in ("HS7", "HS79"):
        paper, relative = iterations(name), iterations(name, accuracy="relative")
        assert relative.inner_iters < paper.inner_iters / 4


def test_failed_descent_tests_tighten_the_relative_accuracy():
    found = solve(hock_schittkowski("HS51"), accuracy="relative", tol=1e-8)
    raised = np.log(found.history["eta1"]) / np.log(1.5**2)  # how often
    assert raised[-1] >= 1
    assert (found.history["residual"][1:] <= 0.1 / 1.5 ** (4 * raised[1:]) + 1e-12).all()


def test_rounding_of_a_large_objective_does_not_end_the_line_search():
    problem = hock_schittkowski("HS79")
    evaluations = itertools.count()

    def fun(x):  # every value is two units in the last place above what it should be relative to the one before
        return problem.fun(x) + 1e3 + 2e-13 * next(evaluations)

    found = minimize_equality(fun, problem.x0, problem.cons, sketch="exact", tol=1e-9)
    assert found.converged
    assert found.kkt <= 1e-9


def test_the_papers_accuracy_makes_its_theta_rules_the_same():
    first, second = (iterations("HS79", theta=theta) for theta in ("constant", "quadratic"))
    assert first.inner_iters == second.inner_iters
    # far below the 1e-6 that delta asks for, by the factor 1 / (||K|| Psi)
    assert first.history["residual"][1:].max() < 1e-9


def test_the_cap_on_inner_steps_is_reported():
    problem = hock_schittkowski("HS77")
    found = solve(problem, max_inner=500, max_iter=200, accuracy="paper")
    assert found.inner_capped > 0
    assert f"{found.inner_capped} inner solves ended at max_inner=500" in found.message
    assert found.history["capped"].sum() == found.inner_capped


# --- the baselines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "baseline",
    [
        lambda p, **o: l1_sqp(p.fun, p.x0, p.cons, **o),
        lambda p, **o: l1_sqp(p.fun, p.x0, p.cons, rule="byrd-curtis-nocedal", **o),
        lambda p, **o: augmented_lagrangian(p.fun, p.x0, p.cons, **o),
    ],
)
@pytest.mark.parametrize("name", ["HS7", "HS42"])
def test_baselines_find_the_same_solutions(baseline, name):
    problem = hock_schittkowski(name)
    found = baseline(problem, tol=1e-6, max_iter=200)
    assert found.converged
    assert found.kkt <= 1e-6
    assert found.fun == pytest.approx(problem.optimum, abs=1e-5)
    with pytest.warns(RuntimeWarning, match="iterations"):
        assert not baseline(problem, max_iter=1).converged


# --- the contract --------------------------------------------------------------------------------------------------


def test_the_start_stays_as_it_is_and_equal_seeds_give_equal_runs():
    problem = hock_schittkowski("HS40")
    before = problem.x0.clone()
    first, second, other = (solve(problem, random_state=seed) for seed in (3, 3, 4))
    check_result(first, problem.x0)
    assert torch.equal(problem.x0, before)
    assert first.x.data_ptr() != problem.x0.data_ptr()
    assert torch.equal(first.x, second.x)
    assert first.inner_iters == second.inner_iters
    assert not torch.equal(first.x, other.x)
    assert list(first.history["iteration"]) == list(range(first.nit + 1))
    assert first.history["kkt"][-1] == first.kkt
    assert first.lam is first.multipliers


def test_a_callback_stops():
    with pytest.warns(RuntimeWarning, match="stopped by the callback after 2 iterations"):
        found = solve(hock_schittkowski("HS6"), sketch="exact", callback=lambda k, x, fun: k == 2)
    assert (found.status, found.nit, found.converged) == ("callback", 2, False)


def one(x):
    return x[:1] - 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x0": torch.tensor([math.nan, 1.0])}, ValueError, "x0 must be finite"),
        ({"x0": torch.ones(2, 2)}, ValueError, r"x0 must be a vector, got shape \(2, 2\)"),
        ({"x0": torch.ones(2, dtype=torch.int64)}, TypeError, "x0 must be a floating-point tensor"),
        ({"x0": np.ones(2)}, ValueError, "grad, jac, lag_hess must be given when x0 is not a torch tensor"),
        ({"cons": lambda x: torch.cat([x, x])}, ValueError, r"vector of 1 to n = 2 numbers, got shape \(4,\)"),
        ({"cons": lambda x: x[0]}, ValueError, "cons must return a vector"),
        ({"fun": lambda x: x}, ValueError, r"fun must return one number, got shape \(2,\)"),
        ({"fun": lambda x: torch.log(-x.sum())}, ValueError, "must be finite at x0"),
        ({"grad": lambda x: torch.ones(3)}, ValueError, r"grad must return shape \(2,\), got \(3,\)"),
        ({"jac": lambda x: torch.ones(2, 2)}, ValueError, r"jac must return shape \(1, 2\), got \(2, 2\)"),
        ({"lag_hess": lambda x, lam: torch.ones(1, 2)}, ValueError, r"Hessian must have shape \(2, 2\), got \(1, 2\)"),
        ({"fun": lambda x: 1.0}, TypeError, "fun must return a tensor where autograd is to differentiate it"),
        ({"grad": 3}, TypeError, "grad must be callable, got 3"),
        ({"cons": 3}, TypeError, "cons must be callable"),
        ({"cons": {"type": "ineq", "fun": one}}, NotImplementedError, r"g\(x\) \+ s\*\*2 = 0"),
        ({"cons": [{"type": "ineq", "fun": one}]}, NotImplementedError, "inequalities are not covered"),
        (
            {"cons": scipy.optimize.LinearConstraint([[1, 1]], 0, 1)},
            NotImplementedError,
            "inequalities are not covered",
        ),
        ({"sketch": "fourier"}, ValueError, "sketch must be one of 'kaczmarz'.*got 'fourier'"),
        ({"sketch": "kaczmarz", "block": 2}, ValueError, "block must be 1 for sketch='kaczmarz', got 2"),
        ({"accuracy": "high"}, ValueError, "accuracy must be one of 'paper', 'relative', got 'high'"),
        ({"theta": "cubic"}, ValueError, "theta must be one of"),
        ({"tol": -1.0}, ValueError, "tol must be at least 0, got -1.0"),
        ({"licq_tol": math.inf}, ValueError, "licq_tol must be at least 0"),
        ({"max_iter": 1.5}, TypeError, "max_iter must be an integer"),
        ({"max_inner": 0}, ValueError, "max_inner must be at least 1"),
        ({"callback": 3}, TypeError, "callback must be callable"),
        ({"lam0": "zero"}, ValueError, "lam0 must be 'ls' or a vector of m = 1 numbers, got 'zero'"),
        ({"lam0": torch.ones(2)}, ValueError, r"lam0 must have shape \(1,\), got \(2,\)"),
        ({"lam0": torch.tensor([math.nan])}, ValueError, "lam0 must be finite"),
        ({"options": {"eta": 1.0}}, ValueError, "options must be among eta1, .*got 'eta'"),
        ({"options": {"beta": 0.6}}, ValueError, "beta must be above 0 and below 0.5, got 0.6"),
        ({"options": {"nu": 1.0}}, ValueError, "nu must be above 1"),
    ],
)
def test_bad_input_is_named_before_any_step(change, error, message):
    good = {"fun": lambda x: x @ x, "x0": torch.ones(2), "cons": one}
    with pytest.raises(error, match=message):
        minimize_equality(**(good | change))


def test_a_jacobian_without_full_rank_is_an_error_at_the_start_and_a_status_later():
    twice = hock_schittkowski("HS28")
    with pytest.raises(np.linalg.LinAlgError, match="LICQ fails: smallest singular value of the Jacobian at x0 is"):
        minimize_equality(twice.fun, twice.x0, lambda x: torch.cat([twice.cons(x), 2 * twice.cons(x)]))

    # the gradient of x1² vanishes at the only feasible points
    with pytest.warns(RuntimeWarning, match="lost its full row rank"):
        found = minimize_equality(
            lambda x: (x[0] - 1) ** 2, torch.tensor([2.0, 2.0]), lambda x: x[1:] ** 2, sketch="exact", tol=1e-9
        )
    assert found.status == "licq"


def test_no_decrease_and_undefined_values_end_with_their_status():
    # outside x > 0 the objective is NaN: steps are halved back into its domain
    inside = minimize_equality(
        lambda x: x[0] - torch.log(x[0]) + x[1] ** 2,
        torch.tensor([3.0, 1.0], dtype=torch.float64),
        lambda x: x[1:] - 0.5,
        sketch="exact",
    )
    assert inside.converged
    assert inside.x[0] == pytest.approx(1.0, abs=1e-3)
    (fun, cons), derivatives = numpy_derivatives(hock_schittkowski("HS7"))
    with pytest.warns(RuntimeWarning, match="did not fall in 40 halvings"):  # values that contradict the gradient
        found = minimize_equality(lambda x: -1e3 * fun(x), np.array([2.0, 2.0]), cons, **derivatives, sketch="exact")
    assert (found.status, found.converged) == ("line search", False)


def test_every_public_name_is_exported():
    for name in sketched_newton.__all__:
        assert getattr(sketched_newton, name).__doc__ or name == "HOCK_SCHITTKOWSKI"
