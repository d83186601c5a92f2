"""Tests of the mathematics: each fails when the idea it names is removed."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.linalg import eigh
from scipy.optimize import linprog, lsq_linear
from sklearn.linear_model import Lasso

from workingpapers.optimization.halpern import (
    BoxProx,
    FiniteSumOperator,
    L1Prox,
    SimplexPairProx,
    affine_operator,
    extra_anchored_gradient,
    extragradient,
    halpern,
    identity_prox,
    least_squares_operator,
    matrix_game,
    simplex_prox,
    vr_extragradient,
    vr_forb,
    vr_halpern,
    vr_halpern_monotone,
)

BOX = BoxProx(-1.0, 1.0)


def least_squares(n, d, seed=0, *, prox=BOX, probs=None):
    """Columns scaled by 1/j; some coordinates of the solution lie on the bounds of the box."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((n, d)) / np.arange(1, d + 1)
    b = A @ (2.0 * rng.standard_normal(d)) + 0.1 * rng.standard_normal(n)
    return A, b, least_squares_operator(A, b, prox=prox, probs=probs)


def skew_sum(n=40, d=6, seed=0, strength=0.0):
    """Components whose mean is skew plus `strength` times the identity."""
    rng = np.random.default_rng(seed)
    M = rng.standard_normal((n, d, d))
    mean = M.mean(axis=0)
    M = M - (mean + mean.T) / 2.0 + strength * np.eye(d)
    return M, rng.standard_normal((n, d))


def unfinished(solver, *args, **options):
    """Run a solver whose tolerance is not meant to be reached."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return solver(*args, **options)


def plain(prox):
    """The same resolvent, in a form that the compiled loops do not know."""
    return lambda v, eta: prox(v, eta)


# --- Algorithm 1 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), [(1, None), (40, 20)])
def test_vr_halpern_is_the_deterministic_recursion_when_every_estimate_is_the_full_value(n, batch_size):
    _, _, operator = least_squares(n, 5)
    step = 1.0 / (4.0 * operator.cocoercivity)
    seen = []
    unfinished(
        vr_halpern,
        operator,
        np.zeros(5),
        batch_size=batch_size,
        tol=0.0,
        max_passes=50,
        callback=lambda k, u, residual: seen.append(u) and None,
    )
    u, iterates = np.zeros(5), [np.zeros(5)]
    for k in range(49):
        u = BOX(2 / (k + 4) * np.zeros(5) + (1 - 2 / (k + 4)) * u - step * operator.full(u), step)
        iterates.append(u)
    np.testing.assert_allclose(seen, iterates, rtol=0, atol=1e-14)


def test_residual_stays_below_the_published_bound_and_falls_as_one_over_k():
    _, _, operator = least_squares(2000, 20, seed=1)
    solution = unfinished(extragradient, operator, np.zeros(20), tol=1e-9, max_passes=20_000, eval_every=100).x
    result = unfinished(vr_halpern, operator, np.zeros(20), tol=0.0, max_passes=250, eval_every=0.5, random_state=0)
    h = result.history
    scale = operator.cocoercivity * np.linalg.norm(solution) / (h.iteration + 4)
    assert (h.residual_bound[1:] <= 16.0 * scale[1:]).all()
    assert (h.fun <= h.residual_bound + 1e-12).all()
    late = h.iteration >= 20
    assert np.polyfit(np.log(h.iteration[late]), np.log(h.fun[late]), 1)[0] < -0.6


def test_a_pass_of_variance_reduction_buys_more_than_a_pass_of_the_deterministic_method():
    _, _, operator = least_squares(4000, 20)
    budget = {"tol": 0.0, "max_passes": 40}
    full = unfinished(halpern, operator, np.zeros(20), **budget)
    reduced = unfinished(vr_halpern, operator, np.zeros(20), eta="practical", random_state=0, **budget)
    assert reduced.residual < full.residual / 2
    assert 40 * 4000 <= reduced.oracle_calls < 41.1 * 4000
    assert 4.5 < reduced.oracle_calls / reduced.n_iterations / np.sqrt(4000) < 7  # about 6 sqrt(n) an iteration


def test_both_points_of_a_difference_use_the_same_indices():
    A, b, _ = least_squares(400, 3)
    drawn = []

    def components(u, S):
        drawn.append(S)
        return A[S] * (A[S] @ u - b[S])[:, None]

    def full(u):
        return (A @ u - b) @ A / 400

    unfinished(vr_halpern, components, np.zeros(3), 400, 20.0, full=full, max_passes=40, random_state=0)
    assert len(drawn) > 20
    assert all(len(S) == 20 and (S == T).all() for S, T in zip(drawn[::2], drawn[1::2], strict=True))
    assert len({tuple(S) for S in drawn}) == len(drawn) / 2


def test_box_constrained_least_squares_agrees_with_scipy_and_lasso_with_scikit_learn():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((300, 5))
    b = A @ (2.0 * rng.standard_normal(5)) + 0.1 * rng.standard_normal(300)
    operator = least_squares_operator(A, b)
    options = {"eta": "practical", "tol": 3e-3, "max_passes": 1000, "random_state": 0}
    found = vr_halpern(operator, np.zeros(5), prox=BOX, **options)
    np.testing.assert_allclose(found.x, lsq_linear(A, b, (-1, 1), tol=1e-12).x, atol=5e-3)
    assert (np.abs(found.x) == 1.0).any()
    assert found.converged
    assert found.message.startswith("residual ")
    penalised = vr_halpern(operator, np.zeros(5), prox=L1Prox(0.5), **options)
    lasso = Lasso(alpha=0.5, fit_intercept=False, tol=1e-12).fit(A, b)
    np.testing.assert_allclose(penalised.x, lasso.coef_, atol=5e-3)
    assert ((penalised.x == 0.0) == (lasso.coef_ == 0.0)).all()


def test_check_detects_skew_operators_and_constants_that_are_too_small():
    operator = affine_operator(*skew_sum())
    with pytest.raises(ValueError, match="operator is not cocoercive; use vr_halpern_monotone"):
        vr_halpern(operator, np.zeros(6), L=operator.lipschitz, check=True, random_state=0)
    with pytest.raises(ValueError, match="not cocoercive; use vr_halpern_monotone"):
        vr_halpern(operator, np.zeros(6))  # it knows that it has no such constant
    _, _, convex = least_squares(50, 4)
    with pytest.raises(ValueError, match=r"L=0\.01 is too small .* needs at least"):
        vr_halpern(convex, np.zeros(4), L=0.01, check=True)
    unfinished(vr_halpern, convex, np.zeros(4), check=True, max_passes=3)


# --- Algorithms 2 and 3 --------------------------------------------------------------------------------------------


def exact_resolvent(M, c, eta):
    mean, offset = M.mean(axis=0), c.mean(axis=0)
    return lambda v: np.linalg.solve(np.eye(len(v)) + eta * mean, v - eta * offset)


def test_vr_forb_evaluates_the_resolvent_at_a_linear_rate():
    M, c = skew_sum()
    operator, centre, eta = affine_operator(M, c), np.arange(6.0), 0.8
    found = vr_forb(
        operator, np.zeros(6), center=centre, eta=eta, step_scale=1.0, tol=1e-9, max_passes=600, random_state=0
    )
    np.testing.assert_allclose(found.x, exact_resolvent(M, c, eta)(centre), atol=1e-8)
    h = found.history
    half = len(h.fun) // 2
    assert h.fun[half] < 1e-3 * h.fun[0]
    assert h.fun[-1] < 1e-3 * h.fun[half]


def test_vr_forb_without_a_centre_solves_the_inclusion():
    M, c = skew_sum(strength=0.5)
    found = vr_forb(affine_operator(M, c), np.zeros(6), tol=1e-6, max_passes=2000, random_state=0)
    np.testing.assert_allclose(found.x, -np.linalg.solve(M.mean(axis=0), c.mean(axis=0)), atol=1e-5)


def test_algorithm_2_is_halpern_on_the_exact_resolvent_when_inner_solves_are_accurate():
    M, c = skew_sum()
    operator = affine_operator(M, c)
    eta = np.sqrt(40) / operator.lipschitz
    found = unfinished(
        vr_halpern_monotone,
        operator,
        np.ones(6),
        inner_factor=60.0,
        inner_step_scale=1.0,
        adaptive=False,
        tol=0.0,
        max_passes=3000,
        random_state=0,
        callback=lambda k, u, residual: k == 7,
    )
    resolvent, u = exact_resolvent(M, c, eta), np.ones(6)
    solution = -np.linalg.solve(M.mean(axis=0), c.mean(axis=0))
    for k in range(7):
        image = resolvent(u)
        u = np.ones(6) / (k + 2) + (1 - 1 / (k + 2)) * image
    np.testing.assert_allclose(found.x, image, atol=1e-6)
    # ||F(J_k)|| = ||u_k - J_k|| / eta <= 2 ||u_0 - u*|| / (eta (k + 1)), k = 6
    assert found.residual <= 2 * np.linalg.norm(np.ones(6) - solution) / (eta * 7)
    assert "callback" in found.message


def test_the_certified_stop_saves_evaluations_and_keeps_the_accuracy():
    M, c = skew_sum(strength=0.3)
    spent = {}
    for adaptive in (True, False):
        found = unfinished(
            vr_halpern_monotone,
            affine_operator(M, c),
            np.ones(6),
            inner_factor=80.0,
            inner_step_scale=1.0,
            adaptive=adaptive,
            tol=0.0,
            max_passes=4000,
            random_state=0,
            callback=lambda k, u, residual: k == 5,
        )
        spent[adaptive] = (found.oracle_calls, found.residual)
    assert spent[True][0] < 0.8 * spent[False][0]
    np.testing.assert_allclose(spent[True][1], spent[False][1], rtol=2e-2)


def test_an_inner_step_that_is_too_long_is_given_up():
    operator = affine_operator(*skew_sum())
    options = {"inner_step_scale": 60.0, "tol": 0.0, "max_passes": 200, "random_state": 0}
    with pytest.raises(FloatingPointError, match=r"iteration \d+ is not finite"):
        unfinished(vr_halpern_monotone, operator, np.ones(6), adaptive=False, **options)
    cautious = unfinished(vr_halpern_monotone, operator, np.ones(6), **options)
    within_theory = unfinished(vr_halpern_monotone, operator, np.ones(6), **(options | {"inner_step_scale": 0.5}))
    assert cautious.residual < 1.5 * within_theory.residual < cautious.history.fun[0] / 2


# --- games ---------------------------------------------------------------------------------------------------------


def linear_program_value(A):
    """min_x max_j (A^T x)_j by HiGHS."""
    m, k = A.shape
    found = linprog(
        np.r_[np.zeros(m), 1.0],
        A_ub=np.c_[A.T, -np.ones(k)],
        b_ub=np.zeros(k),
        A_eq=[np.r_[np.ones(m), 0.0]],
        b_eq=[1.0],
        bounds=[(0, None)] * m + [(None, None)],
    )
    return found.fun


@pytest.mark.parametrize("solver", [vr_halpern_monotone, vr_extragradient, vr_forb, extragradient])
def test_game_values_agree_with_the_linear_program(solver):
    A = np.random.default_rng(3).standard_normal((9, 7))
    game = matrix_game(A)
    found = unfinished(
        solver,
        game,
        game.uniform_start(),
        tol=5e-3,
        max_passes=8000,
        **({} if solver is extragradient else {"random_state": 0}),
        **({"step_scale": 1.0} if solver is vr_forb else {}),
    )
    value = linear_program_value(A)
    x, y = game.strategies(found.x)
    assert found.converged
    assert found.duality_gap < 2e-2
    assert np.min(A @ y) - 1e-9 <= value <= np.max(x @ A) + 1e-9
    assert abs(game.value(found.x) - value) <= found.duality_gap
    assert x.sum() == pytest.approx(1.0)
    assert (found.x >= 0).all()


def test_rock_paper_scissors_has_the_uniform_equilibrium():
    game = matrix_game(np.array([[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]]))
    start = np.array([0.8, 0.1, 0.1, 0.0, 0.3, 0.7])
    found = vr_halpern_monotone(game, start, tol=4e-3, max_passes=20_000, random_state=0)
    np.testing.assert_allclose(found.u, 1 / 3, atol=1e-2)
    assert game.duality_gap(np.full(6, 1 / 3)) == pytest.approx(0.0, abs=1e-15)
    assert game.duality_gap(start) > 0.5


# --- oracles and constants -----------------------------------------------------------------------------------------


def operators():
    rng = np.random.default_rng(5)
    probs = rng.uniform(0.2, 1.0, 30)
    M, c = skew_sum(30, 5, strength=0.2)
    A, b = rng.standard_normal((30, 5)), rng.standard_normal(30)

    def rows(u, S):
        return A[S] * np.tanh(A[S] @ u - b[S])[:, None]

    return {
        "least squares": least_squares_operator(A, b),
        "weighted least squares": least_squares_operator(A, b, probs=probs / probs.sum()),
        "affine": affine_operator(M, c),
        "weighted affine": affine_operator(M, c, probs=probs / probs.sum()),
        "callable": FiniteSumOperator(rows, 30),
        "weighted callable": FiniteSumOperator(rows, 30, probs=probs / probs.sum()),
    }


@pytest.mark.parametrize("name", operators())
def test_the_oracle_is_unbiased_and_its_constants_are_exact(name):
    operator = operators()[name]
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((2, 5))
    everything = np.arange(30)
    drawn = operator.draw(np.random.default_rng(1), (200_000,))
    q = np.bincount(drawn, minlength=30) / 200_000
    if "weighted" in name:
        weight = np.random.default_rng(5).uniform(0.2, 1.0, 30)
        exact = weight / weight.sum()
    else:
        exact = np.full(30, 1 / 30)
    np.testing.assert_allclose(q, exact, atol=5e-3)
    np.testing.assert_allclose(exact @ operator.components(u, everything), operator.full(u), atol=1e-12)
    pick = np.array([3, 3, 17])
    np.testing.assert_allclose(operator.batch(u, pick), operator.components(u, pick).mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(
        operator.difference(u, v, pick), operator.batch(u, pick) - operator.batch(v, pick), atol=1e-12
    )

    if operator.lipschitz is not None:
        maps = np.stack(
            [operator.components(e, everything) - operator.components(0 * e, everything) for e in np.eye(5)], 2
        )
        moment = np.einsum("i,iab,iac->bc", exact, maps, maps)  # E M_q^T M_q
        mean = np.einsum("i,iab->ab", exact, maps)
        np.testing.assert_allclose(operator.lipschitz**2, np.linalg.eigvalsh(moment)[-1])
        np.testing.assert_allclose(operator.L_F, np.linalg.norm(mean, 2))
        np.testing.assert_allclose(operator.cocoercivity, eigh(moment, (mean + mean.T) / 2)[0][-1])
        if "weighted" not in name:
            assert operator.L_F <= operator.lipschitz <= np.sqrt(30) * operator.L_F


def test_the_game_oracle_is_unbiased_and_l_is_the_frobenius_norm():
    A = np.random.default_rng(0).standard_normal((3, 4))
    game = matrix_game(A)
    u, v = np.random.default_rng(1).standard_normal((2, 7))
    row, column = (A**2).sum(1) / (A**2).sum(), (A**2).sum(0) / (A**2).sum()
    mean, second = np.zeros(7), 0.0
    for i, j in itertools.product(range(3), range(4)):
        pair = np.array([[i, j]])
        mean += row[i] * column[j] * game.batch(u, pair)
        second += row[i] * column[j] * np.sum(game.difference(u, v, pair) ** 2)
    np.testing.assert_allclose(mean, game.full(u), atol=1e-12)
    np.testing.assert_allclose(game.full(u), np.r_[A @ u[3:], -A.T @ u[:3]])
    np.testing.assert_allclose(second, game.lipschitz**2 * np.sum((u - v) ** 2))
    assert game.lipschitz == pytest.approx(np.linalg.norm(A))
    np.testing.assert_allclose(game.L_F, np.linalg.norm(A, 2))
    frequencies = game.draw(np.random.default_rng(2), (100_000,))
    np.testing.assert_allclose(np.bincount(frequencies[:, 0]) / 1e5, row, atol=5e-3)
    np.testing.assert_allclose(np.bincount(frequencies[:, 1]) / 1e5, column, atol=5e-3)


def test_affine_components_without_cocoercivity_know_it():
    M, c = skew_sum()
    assert affine_operator(M, c).cocoercivity is None
    assert affine_operator(M + 0.1 * np.eye(6), c).cocoercivity > 0
    with pytest.raises(ValueError, match="monotone mean"):
        affine_operator(M - 0.1 * np.eye(6), c)


def test_estimated_constants_are_close_and_suffice():
    A, b, operator = least_squares(200, 5)
    rows = FiniteSumOperator(lambda u, S: A[S] * (A[S] @ u - b[S])[:, None], 200)
    exact = {"full": operator.L_F, "lipschitz": operator.lipschitz, "cocoercive": operator.cocoercivity}
    for kind, constant in exact.items():
        estimate = rows.lipschitz_estimate(np.zeros(5), kind=kind, samples=2000, random_state=0)
        assert 0.5 * constant < estimate < 1.5 * constant, kind
    assert rows.lipschitz_estimate(np.zeros(5), kind="full") == pytest.approx(operator.L_F, rel=1e-3)

    def averaged(u, S):
        return A[S].T @ (A[S] @ u - b[S]) / len(S)

    cocoercive = vr_halpern(
        averaged, np.zeros(5), 200, "estimate", BOX, eta="practical", tol=5e-2, max_passes=500, random_state=0
    )
    monotone = vr_halpern_monotone(rows, np.zeros(5), L="estimate", prox=BOX, tol=5e-2, max_passes=500, random_state=0)
    assert cocoercive.converged
    assert monotone.converged
    with pytest.raises(ValueError, match="not cocoercive"):
        matrix_game(np.eye(3)).lipschitz_estimate(np.ones(6) / 3, kind="cocoercive")


# --- compiled loops ------------------------------------------------------------------------------------------------


def compiled_problems():
    probs = np.linspace(1.0, 2.0, 60)
    M, c = skew_sum(50, 6, strength=0.1)
    game = matrix_game(np.random.default_rng(2).uniform(-1, 1, (12, 9)))
    start = np.linspace(-0.5, 0.5, 6)
    return {
        "least squares in a box": (least_squares(60, 6, probs=probs / probs.sum())[2], BOX, start),
        "lasso": (least_squares(60, 6)[2], L1Prox(0.05), start),
        "affine": (affine_operator(M, c), identity_prox, start),
        "game": (game, SimplexPairProx(12), game.uniform_start()),
    }


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("solver", [vr_halpern, vr_halpern_monotone, vr_forb, vr_extragradient])
@pytest.mark.parametrize("name", compiled_problems())
def test_compiled_and_plain_loops_agree(name, solver, batch_size):
    operator, prox, start = compiled_problems()[name]
    options = {"batch_size": batch_size, "max_passes": 12, "tol": 0.0, "random_state": 3}
    if solver is vr_halpern:
        options["L"] = 10.0  # so that the loop can be compared on the game too
    fast = unfinished(solver, operator, start, prox=prox, **options)
    fast_calls, operator.oracle_calls = operator.oracle_calls, 0
    slow = unfinished(solver, operator, start, prox=plain(prox), **options)
    np.testing.assert_allclose(fast.x, slow.x, rtol=0, atol=1e-11)
    np.testing.assert_allclose(fast.history.fun, slow.history.fun, rtol=1e-6, atol=1e-11)
    assert fast.oracle_calls == slow.oracle_calls
    for found, counted in ((fast, fast_calls), (slow, operator.oracle_calls)):
        assert found.oracle_calls + found.evaluation_calls == counted


vectors = arrays(float, st.integers(2, 12), elements=st.floats(-50, 50))


@settings(max_examples=60, deadline=None)
@given(vectors, st.integers(0, 2**32 - 1))
def test_resolvents_are_firmly_nonexpansive(v, seed):
    w = v + np.random.default_rng(seed).standard_normal(len(v))
    for prox in (simplex_prox, identity_prox, BoxProx(-2.0, 3.0), L1Prox(0.7), SimplexPairProx(1)):
        one, two = prox(v, 0.5), prox(w, 0.5)
        assert np.sum((one - two) ** 2) <= (one - two) @ (v - w) + 1e-9


@settings(max_examples=60, deadline=None)
@given(vectors)
def test_simplex_projection_satisfies_its_optimality_conditions(v):
    x = simplex_prox(v)
    assert x.sum() == pytest.approx(1.0)
    assert (x >= 0).all()
    multiplier = (v - x)[x > 0]  # v - x = t on the support, v <= t off it
    assert np.ptp(multiplier) < 1e-9
    assert (v[x == 0] <= multiplier[0] + 1e-9).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_compiled_simplex_projection_is_the_sorted_one(scale):
    from workingpapers.optimization.halpern._kernels import project_on_simplex

    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 300):
        for v in (scale * rng.standard_normal(size), np.full(size, scale), np.r_[scale, np.zeros(size - 1)]):
            out = np.empty(size)
            project_on_simplex(v, out)
            np.testing.assert_allclose(out, simplex_prox(v), atol=1e-9 * max(scale, 1.0))


# --- baselines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "constant"), [("constant", 260.0), ("varying", 27.0)])
def test_extra_anchored_gradient_keeps_its_published_bound(variant, constant):
    # ||F(u_k)||^2 <= C L_F^2 ||u_0 - u*||^2 / ((k + 1)(k + 2)): C = 27 for EAG-V, and over (k + 1)^2 260 for EAG-C
    A = np.diag(np.linspace(0.01, 1.0, 30))

    def operator(u):
        return np.r_[A @ u[30:], -A.T @ u[:30]]

    found = unfinished(
        extra_anchored_gradient, operator, np.ones(60), 1.0, variant=variant, tol=0.0, max_passes=801, eval_every=2
    )
    k = found.history.iteration
    assert (found.history.fun**2 <= constant * 60.0 / ((k + 1) * (k + 2))).all()
    assert found.residual < found.history.fun[0] / 20
    assert found.oracle_calls == 801


def test_halpern_contracts_at_the_optimal_rate_where_its_anchor_is_removed_it_circles():
    # A rotation: J = 2 (Id + F)^{-1} - Id with step 2/L_F of a rotation's cocoercive form never settles unanchored.
    R = np.array([[1.0, -1.0], [1.0, 1.0]])  # (Id + rotation by 90 degrees): cocoercive with constant 1, ||R|| = sqrt 2

    def operator(u):
        return R @ u

    found = unfinished(halpern, operator, np.ones(2), np.sqrt(2), step=1.0, tol=0.0, max_passes=200)
    unanchored = np.ones(2)
    for _ in range(200):
        unanchored = unanchored - operator(unanchored)
    assert np.linalg.norm(operator(unanchored)) == pytest.approx(2.0)
    k = found.history.iteration
    # fixed-point residual of a nonexpansive map T: ||u_k - T u_k|| <= 2 ||u_0 - u*|| / (k + 1) (Lieder, 2021)
    assert (found.history.fun <= 2 * np.sqrt(2) / (k + 1) + 1e-12).all()


def test_the_step_of_eag_v_decreases_to_its_published_limit():
    # With F = 1 the step can be read off: u_{k+1} = u_k + (u_0 - u_k) / (k + 2) - alpha_k.
    seen = []
    unfinished(
        extra_anchored_gradient,
        np.ones_like,
        np.zeros(1),
        1.0,
        variant="varying",
        tol=0.0,
        max_passes=2000,
        callback=lambda k, u, residual: seen.append(u[0]),
    )
    u = np.array(seen)
    alpha = u[:-1] * (1.0 - 1.0 / np.arange(2, len(u) + 1)) - u[1:]
    assert alpha[0] == pytest.approx(0.618)
    assert (np.diff(alpha) < 1e-12).all()
    assert alpha[-1] == pytest.approx(0.437, abs=1e-3)  # Yoon and Ryu (2021): about 0.437 / L_F


def test_with_one_component_the_variance_reduced_methods_are_their_deterministic_forms():
    M, c = skew_sum(1)
    operator = affine_operator(M, c)
    step = 0.3 / operator.L_F
    options = {"tol": 0.0, "random_state": 0}
    reduced = unfinished(vr_extragradient, operator, np.ones(6), prox=BOX, step_scale=0.3, max_passes=31, **options)
    full = unfinished(extragradient, operator, np.ones(6), prox=BOX, step=step, tol=0.0, max_passes=21)
    assert reduced.n_iterations == full.n_iterations == 10
    np.testing.assert_allclose(reduced.x, full.x, atol=1e-13)
    # forward-reflected-backward splitting (Malitsky and Tam, 2020)
    forb = unfinished(vr_forb, operator, np.ones(6), prox=BOX, step_scale=0.3, max_passes=31, **options)
    z, before = np.ones(6), np.ones(6)
    for _ in range(10):
        z, before = BOX(z - step * (2 * operator.full(z) - operator.full(before))), z
    np.testing.assert_allclose(forb.x, z, atol=1e-13)


def test_extragradient_converges_where_forward_steps_diverge():
    M, c = skew_sum(strength=0.1)
    operator = affine_operator(M, c)
    solution = -np.linalg.solve(M.mean(axis=0), c.mean(axis=0))
    forward = np.zeros(6)
    for _ in range(500):
        forward = forward - 0.9 / operator.L_F * operator.full(forward)
    assert np.linalg.norm(forward - solution) > 100 * np.linalg.norm(solution)
    for solver in (extragradient, vr_extragradient):
        options = {} if solver is extragradient else {"random_state": 0}
        found = solver(operator, np.zeros(6), tol=1e-6, max_passes=2000, **options)
        np.testing.assert_allclose(found.x, solution, atol=1e-5)


# --- behaviour -----------------------------------------------------------------------------------------------------

VARIANCE_REDUCED = [vr_halpern, vr_halpern_monotone, vr_forb, vr_extragradient]
DETERMINISTIC = [halpern, extra_anchored_gradient, extragradient]


@pytest.mark.parametrize("solver", VARIANCE_REDUCED)
def test_same_seed_same_result_and_checks_do_not_disturb(solver):
    _, _, operator = least_squares(100, 4)
    start = np.ones(4)

    def run(seed, every):
        return unfinished(solver, operator, start, tol=0.0, max_passes=10, eval_every=every, random_state=seed)

    first, again, other = run(0, 1.0), run(0, 1.0), run(1, 1.0)
    assert (first.x == again.x).all()
    assert not (first.x == other.x).all()
    assert (start == 1.0).all()
    rarely = run(0, 100.0)
    assert rarely.evaluation_calls < first.evaluation_calls
    if solver is not vr_halpern_monotone:  # whose last inner solve the budget may cut
        assert len(rarely.history.fun) == 2


def test_a_tolerance_that_is_not_reached_is_a_warning_and_a_field():
    _, _, operator = least_squares(100, 4)
    with pytest.warns(RuntimeWarning, match="the passes are used up: residual"):
        found = vr_halpern(operator, np.zeros(4), tol=1e-12, max_passes=2, random_state=0)
    assert not found.converged
    assert found.residual == found.history.fun[-1] > 1e-12
    assert found.duality_gap is None
    assert found.u is found.x


def test_a_solution_is_recognised_at_the_start():
    game = matrix_game(np.eye(4) - 0.25)
    found = vr_halpern_monotone(game, game.uniform_start())
    assert found.converged
    assert found.n_iterations == 0
    assert found.oracle_calls == 4


def test_an_operator_that_is_not_monotone_raises_an_alarm():
    M = np.array([[-0.2, 1.0], [-1.0, -0.2]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        extragradient(lambda u: M @ u, np.full(2, 1e-3), 1.1, step=0.3, max_passes=61, eval_every=2)
    assert sum("has not decreased over 10 checks" in str(warning.message) for warning in caught) == 1
    assert all(warning.filename == __file__ for warning in caught)


@pytest.mark.parametrize("prox", [identity_prox, plain(identity_prox)])
@pytest.mark.parametrize("solver", VARIANCE_REDUCED)
def test_divergence_is_an_error_that_names_the_iteration(solver, prox):
    _, _, operator = least_squares(100, 4)
    options = {"adaptive": False} if solver is vr_halpern_monotone else {}
    with pytest.raises(FloatingPointError, match=r"iteration [1-9]\d* is not finite"):
        unfinished(
            solver,
            operator,
            np.zeros(4),
            L=1e-3,
            prox=prox,
            max_passes=2000,
            eval_every=2000,
            random_state=0,
            **options,
        )


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_divergence_of_the_deterministic_methods_too(solver):
    with pytest.raises(FloatingPointError, match=r"iteration \d+ is not finite"):
        unfinished(solver, lambda u: 100 * u, np.ones(2), 1.0, step=1.0, max_passes=5000)


def test_an_operator_that_returns_nan_is_an_error():
    with pytest.raises(FloatingPointError, match="iteration 0 is not finite"):
        vr_halpern(lambda u, S: np.full(2, np.nan), np.zeros(2), 10, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u0": np.array([0.0, np.inf])}, "u0 must be finite"),
        ({"u0": np.zeros((2, 1))}, r"u0 must be a vector, got shape \(2, 1\)"),
        ({"n": None}, "n must be given"),
        ({"n": 0}, "n must be at least 1"),
        ({"L": 0.0}, "L must be above 0, got 0.0"),
        ({"L": np.nan}, "L must be above 0"),
        ({"L": None}, "L must be a positive number or 'estimate'"),
        ({"L": "guess"}, "L must be a positive number or 'estimate', got 'guess'"),
        ({"tol": -1.0}, "tol must be at least 0"),
        ({"max_passes": 0}, "max_passes must be above 0"),
        ({"eval_every": 0.0}, "eval_every must be above 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"probs": np.full(10, 0.2)}, "probs must sum to 1, got 2"),
        ({"probs": np.r_[np.zeros(1), np.full(9, 1 / 9)]}, "probs must be 10 positive numbers"),
        ({"probs": np.full(5, 0.2)}, "probs must be 10 positive numbers, got 5"),
        ({"prox": lambda v, eta: 0.0}, "prox must return an array of shape"),
        ({"F_batch": lambda u, S: np.zeros(3)}, "batch must return shape"),
        ({"full": lambda u: np.zeros(3)}, "full must return an array of shape"),
    ],
)
@pytest.mark.parametrize("solver", VARIANCE_REDUCED)
def test_bad_input_is_named(solver, change, message):
    good = {"F_batch": lambda u, S: np.tile(u, (len(S), 1)), "u0": np.ones(2), "n": 10, "L": 1.0}
    with pytest.raises(ValueError, match=message):
        unfinished(solver, **(good | change))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda op: vr_halpern(op, np.zeros(3)), ValueError, "u0 must have length 4, got 3"),
        (lambda op: vr_halpern(op, np.zeros(4), n=5), ValueError, "belong to the FiniteSumOperator"),
        (lambda op: vr_halpern(op, np.zeros(4), eta=-1.0), ValueError, "eta must be above 0"),
        (lambda op: vr_halpern(op, np.zeros(4), eta="long"), TypeError, "eta must be a number"),
        (lambda op: vr_halpern(op, np.zeros(4), callback=3), TypeError, "callback must be callable"),
        (lambda op: vr_halpern(3, np.zeros(4), 10, 1.0), TypeError, "batch must be callable"),
        (lambda op: vr_halpern(op, np.zeros(4), prox=3), TypeError, "prox must be callable"),
        (lambda op: halpern(3, np.zeros(4)), TypeError, "F must be callable"),
        (lambda op: halpern(op, np.zeros(4), step=0.0), ValueError, "step must be above 0"),
        (lambda op: halpern(op, np.zeros(4), L_F=-1.0), ValueError, "L_F must be above 0"),
        (lambda op: vr_forb(op, np.zeros(4), eta=1.0), ValueError, "center and eta must be given together"),
        (lambda op: vr_forb(op, np.zeros(4), eta=1.0, center=np.zeros(2)), ValueError, "center must have shape"),
        (lambda op: vr_halpern_monotone(op, np.zeros(4), inner_factor=0), ValueError, "inner_factor must be above 0"),
        (lambda op: extra_anchored_gradient(op, np.zeros(4), variant="x"), ValueError, "variant must be one of"),
        (
            lambda op: vr_halpern(
                lambda u, S: u, np.ones(4), 10, 1.0, probs=np.full(10, 0.1), full=lambda u: u, max_passes=50
            ),
            ValueError,
            "must return the components",
        ),
        (lambda op: matrix_game(np.zeros((2, 2))), ValueError, "nonzero entry"),
        (lambda op: matrix_game(np.array([1.0, np.nan])), ValueError, "A must be a matrix"),
        (lambda op: matrix_game(np.array([[1.0, np.nan]])), ValueError, "A must be finite"),
        (lambda op: least_squares_operator(np.ones((3, 2)), np.ones(2)), ValueError, "one entry per row of A"),
        (lambda op: affine_operator(np.ones((3, 2)), np.ones((3, 2))), ValueError, "M must have shape"),
        (lambda op: affine_operator(np.ones((3, 2, 2)), np.ones(3)), ValueError, "c must have shape"),
        (lambda op: BoxProx(1.0, 0.0), ValueError, "low must be at most high"),
        (lambda op: L1Prox(-1.0), ValueError, "weight must be at least 0"),
        (lambda op: SimplexPairProx(4)(np.ones(4)), ValueError, "split must be below the dimension"),
    ],
)
def test_other_bad_input_is_named(call, error, message):
    _, _, operator = least_squares(50, 4)
    with pytest.raises(error, match=message):
        call(operator)


def test_the_callers_matrices_are_copied():
    A = np.eye(3)
    game = matrix_game(A)
    before = game.full(np.arange(6.0))
    A[:] = 7.0
    assert (game.full(np.arange(6.0)) == before).all()
