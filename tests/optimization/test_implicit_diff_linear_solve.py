"""The linear solvers: on systems with known solutions, many at once, and where they must fail aloud."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from workingpapers.optimization.implicit_diff.linear_solve import bicgstab, cg, cholesky, gmres, krylov, lu, normal_cg


def system(n=30, kind="definite", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, dtype=torch.float64, generator=generator) / n**0.5
    identity = torch.eye(n, dtype=torch.float64)
    A = {"definite": A @ A.T + identity, "negative": -(A @ A.T) - identity, "general": A + 3 * identity}[kind]
    return A.to(dtype), torch.randn(n, dtype=torch.float64, generator=generator).to(dtype)


def solve(method, A, b, **options):
    if method is normal_cg:
        return normal_cg(lambda v: A @ v, lambda v: A.T @ v, b, **options)
    return method(lambda v: A @ v, b, **options)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *((method, "general") for method in (normal_cg, gmres, bicgstab, lu)),
        *((method, kind) for method in (cg, cholesky) for kind in ("definite", "negative")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_solution_and_its_residual(method, kind, dtype):
    A, b = system(kind=kind, dtype=dtype)
    found = solve(method, A, b)
    tol = 1e-10 if dtype == torch.float64 else 1e-6
    assert found.converged
    assert found.residual == pytest.approx(float((A @ found.x - b).norm() / b.norm()), rel=0.1, abs=1e-12)
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b), rtol=0, atol=30 * tol)
    assert len(found.history) == found.iterations
    assert (found.iterations == 0) == (method in (lu, cholesky))
    assert "solved the system" in found.message


@pytest.mark.parametrize(("method", "peer"), [(cg, "cg"), (bicgstab, "bicgstab"), (gmres, "gmres")])
def test_iterations_are_those_of_scipy(method, peer):
    A, b = system(60, "definite" if method is cg else "general")
    steps = []
    options = {"restart": 30, "callback_type": "pr_norm"} if peer == "gmres" else {}
    count = lambda _: steps.append(1)  # noqa: E731
    getattr(scipy.sparse.linalg, peer)(A.numpy(), b.numpy(), rtol=1e-10, atol=0, callback=count, **options)
    assert abs(solve(method, A, b).iterations - len(steps)) <= 2


def test_conjugate_gradients_end_after_as_many_steps_as_there_are_eigenvalues():
    values = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).repeat(20)
    assert cg(lambda v: values * v, torch.ones(60, dtype=torch.float64)).iterations == 3


def test_restarts_cost_iterations_and_reach_the_same_solution():
    A, b = system(40, "general")
    long, short = (solve(gmres, A, b, restart=restart) for restart in (40, 4))
    assert long.converged
    assert short.converged
    assert long.iterations < short.iterations
    torch.testing.assert_close(long.x, short.x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", [cg, gmres, bicgstab, lu, cholesky])
def test_a_ridge_is_added_to_the_matrix(method):
    A, b = system(10, "definite")
    torch.testing.assert_close(
        solve(method, A, b, ridge=0.5).x, torch.linalg.solve(A + 0.5 * torch.eye(10).double(), b)
    )


def test_a_ridge_is_added_to_the_normal_equations():
    A, b = system(10, "general")
    expected = torch.linalg.solve(A.T @ A + 0.5 * torch.eye(10).double(), A.T @ b)
    torch.testing.assert_close(solve(normal_cg, A, b, ridge=0.5).x, expected)


@pytest.mark.parametrize("method", [normal_cg, lu])
def test_singular_systems_get_the_least_squares_solution_and_a_warning_unless_consistent(method):
    A = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(solve(method, A, A @ torch.ones(3).double()).x, torch.tensor([1.0, 1.0, 0.0]).double())
    with pytest.warns(RuntimeWarning, match=r"did not solve the system.*relative residual 5\.8e-01"):
        found = solve(method, A, torch.ones(3).double())
    assert not found.converged
    torch.testing.assert_close(found.x, torch.tensor([1.0, 0.5, 0.0]).double())


@pytest.mark.parametrize("method", [cg, normal_cg, gmres, bicgstab])
def test_running_out_of_iterations_warns_and_returns_the_best_point(method):
    A, b = system(50, "definite")
    with pytest.warns(RuntimeWarning, match="in 3 iterations"):
        found = solve(method, A, b, maxiter=3)
    assert not found.converged
    assert found.iterations == 3
    assert found.residual < 1


def test_a_breakdown_of_bicgstab_is_a_warning_not_a_nan():
    # For a rotation by a right angle, <A p, b> = 0 in the first step.
    rotation = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="did not solve"):
        found = solve(bicgstab, rotation, torch.tensor([1.0, 0.0]).double())
    assert found.x.isfinite().all()
    assert solve(gmres, rotation, torch.tensor([1.0, 0.0]).double()).converged


@pytest.mark.parametrize("method", ["cg", "normal_cg", "gmres", "bicgstab"])
def test_systems_solved_together_do_not_disturb_each_other(method):
    matrices, sides = zip(*(system(12, "definite", seed=seed) for seed in range(3)), strict=True)
    A, b = torch.stack(matrices), torch.stack([sides[0], 1e-6 * sides[1], torch.zeros(12).double()])
    product = lambda v: torch.einsum("nij,nj->ni", A, v)  # noqa: E731
    found = krylov(method, product, product, b, ridge=0.0, tol=None, maxiter=None)
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b[..., None])[..., 0], rtol=1e-8, atol=1e-15)
    assert found.x[2].abs().max() == 0


@pytest.mark.parametrize("method", [cg, gmres, bicgstab, normal_cg, lu, cholesky])
def test_trees(method):
    A, b = system(6, "definite")
    split = lambda v: {"a": v[:2], "b": (v[2:].reshape(2, 2),)}  # noqa: E731
    join = lambda tree: torch.cat([tree["a"], tree["b"][0].reshape(-1)])  # noqa: E731
    matvec = lambda tree: split(A @ join(tree))  # noqa: E731
    products = (matvec, matvec) if method is normal_cg else (matvec,)
    torch.testing.assert_close(join(method(*products, split(b)).x), torch.linalg.solve(A, b))


@pytest.mark.parametrize("seed", range(5))
def test_float32_reaches_what_rounding_allows_and_says_so(seed):
    # Condition number 1e3: a relative residual of 1e-6 may be out of reach, and that is no failure.
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    A = (Q * torch.logspace(0, 3, 40, dtype=torch.float64)) @ Q.T
    b = torch.randn(40, generator=generator)
    A32 = ((A + A.T) / 2).float()
    for method in (cg, functools.partial(gmres, restart=40), lu, cholesky):
        found = method(lambda v: A32 @ v, b)
        assert found.converged
        assert found.residual < 1e-4


def test_asymmetry_is_found_by_random_products():
    A, b = system(20, "definite")
    cg(lambda v: A @ v, b)
    A[3, 4] += 1e-3
    with pytest.raises(ValueError, match="needs a symmetric A"):
        cg(lambda v: A @ v, b)
    with pytest.raises(ValueError, match=r"needs a symmetric A, but A and Aᵀ differ by 1\.0e-03"):
        cholesky(lambda v: A @ v, b)


def test_indefinite_matrices_are_refused_by_cholesky():
    with pytest.raises(ValueError, match="definite A, and this one is indefinite"):
        cholesky(lambda v: torch.tensor([1.0, -3.0]).double() * v, torch.ones(2).double())


@pytest.mark.parametrize(
    ("b", "options", "error", "message"),
    [
        (torch.tensor([1.0, float("inf")]), {}, ValueError, "b must be finite"),
        (torch.tensor([1, 2]), {}, TypeError, "b must hold floating-point tensors only, got a tensor of torch.int64"),
        (np.ones(2), {}, TypeError, "got a ndarray"),
        ((torch.ones(2), torch.ones(2).double()), {}, TypeError, "must share one dtype"),
        (torch.ones(2), {"ridge": -1.0}, ValueError, "ridge must be at least 0"),
        (torch.ones(2), {"tol": float("nan")}, ValueError, "tol must be above 0"),
        (torch.ones(2), {"maxiter": 2.5}, TypeError, "maxiter must be an integer"),
        (torch.ones(2), {"restart": 0}, ValueError, "restart must be at least 1"),
    ],
)
def test_bad_input_is_named(b, options, error, message):
    with pytest.raises(error, match=message):
        gmres(lambda v: v, b, **options)
