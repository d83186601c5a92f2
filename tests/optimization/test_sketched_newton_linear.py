"""Tests of sketch-and-project by itself: projections, rates, sampling, and what counts as solved."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from workingpapers.optimization.sketched_newton import _kernels, sketch_project

SKETCHES = [
    ("kaczmarz", 1),
    ("weighted-kaczmarz", 1),
    ("block-kaczmarz", 5),
    ("gaussian", 1),
    ("block-gaussian", 5),
    ("sparse-sign", 4),
    ("gmres", 1),
    ("exact", 1),
]


@pytest.fixture(scope="module")
def system():
    """Symmetric, indefinite, moderately conditioned."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((14, 14)))[0]
    K = Q @ np.diag(np.linspace(1, 3, 14) * np.where(np.arange(14) % 3, 1, -1)) @ Q.T
    K[np.abs(K) < 0.15] = 0.0
    K = (K + K.T) / 2
    return K, rng.standard_normal(14)


@pytest.mark.parametrize(("sketch", "block"), SKETCHES)
@pytest.mark.parametrize("storage", [np.array, sp.csr_array, sp.coo_array])
def test_every_sketch_solves_dense_and_sparse_systems(system, sketch, block, storage):
    K, b = system
    found = sketch_project(storage(K), b, sketch, 1e-10, random_state=1, block=block)
    assert found.converged
    assert found.fun == pytest.approx(np.linalg.norm(K @ found.x - b), abs=1e-13)
    assert found.fun <= 1e-10
    np.testing.assert_allclose(found.x, np.linalg.solve(K, b), atol=1e-8)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("q", [1, 3])
def test_one_step_is_the_projection_on_the_sketched_equations(system, sparse, q):
    K, b = system
    z = np.random.default_rng(1).standard_normal(14)
    rows = np.array([2, 7, 11])[:q]
    W = K[rows]
    expected = z - np.linalg.pinv(W) @ (W @ z - b[rows])
    squares = np.sum(K * K, axis=1)
    moved = z.copy()
    if sparse:
        S = sp.csr_array(K)
        own = (S.indptr.astype(np.int64), S.indices.astype(np.int64), S.data)
        blocks, _, residual = _kernels.sparse_projections(*own, b, squares, rows, q, moved, *own, b, 1, 0.0, 0.0)
    else:
        blocks, _, residual = _kernels.dense_projections(K, b, squares, rows, q, moved, K, b, 1, 0.0, 0.0)
    assert blocks == 1
    np.testing.assert_allclose(moved, expected, atol=1e-12)
    assert residual == pytest.approx(np.linalg.norm(K @ moved - b))


def test_repeated_rows_in_a_block_count_once(system):
    K, b = system
    rows = np.array([4, 9, 4, 4])
    z = np.ones(14)
    expected = z - np.linalg.pinv(K[rows]) @ (K[rows] @ z - b[rows])
    _kernels.dense_projections(K, b, np.sum(K * K, axis=1), rows, 4, z, K, b, 1, 0.0, 0.0)
    np.testing.assert_allclose(z, expected, atol=1e-10)


def test_row_norm_weights_shrink_the_error_by_the_theorems_factor():
    rng = np.random.default_rng(2)
    K = rng.standard_normal((8, 8)) + 3 * np.eye(8)
    K[3] *= 5.0
    solution = rng.standard_normal(8)
    b = K @ solution
    singular = np.linalg.svd(K, compute_uv=False)
    factor = 1 - singular[-1] ** 2 / np.sum(singular**2)
    steps, square_errors = 60, []
    for seed in range(400):
        with pytest.warns(RuntimeWarning, match="after 60 steps: tol=0 was not reached"):
            found = sketch_project(K, b, "weighted-kaczmarz", 0.0, steps, seed)
        square_errors.append(np.sum((found.x - solution) ** 2))
    bound = factor**steps * np.sum(solution**2)
    assert np.mean(square_errors) <= bound * (1 + 3 / np.sqrt(400))
    assert np.mean(square_errors) > 1e-4 * bound


def test_uniform_rows_do_not_feel_the_scale_of_a_row_and_weighted_rows_starve_a_small_one(system):
    K, b = system
    scales = np.ones(14)
    scales[5] = 1e-3
    plain = sketch_project(K, b, "kaczmarz", 1e-9, random_state=0)
    with pytest.warns(RuntimeWarning):
        scaled = sketch_project(scales[:, None] * K, scales * b, "kaczmarz", 0.0, plain.nit, 0)
    np.testing.assert_allclose(scaled.x, plain.x, atol=1e-10)
    with pytest.warns(RuntimeWarning):
        starved = sketch_project(scales[:, None] * K, scales * b, "weighted-kaczmarz", 0.0, plain.nit, 0)
    assert np.abs(starved.x - plain.x).max() > 1e-3


def test_samplers_draw_what_they_say():
    rng = np.random.default_rng(0)
    out = np.empty((20_000, 3), dtype=np.int64)
    _kernels.draw_subsets(rng.random((20_000, 3)), np.arange(7), out)
    assert (np.sort(out, axis=1)[:, 1:] != np.sort(out, axis=1)[:, :-1]).all()  # no repetition inside a block
    counts = np.bincount(out.ravel(), minlength=7)
    np.testing.assert_allclose(counts / len(out), 3 / 7, atol=4 * np.sqrt(3 / 7 / 20_000))


def test_of_an_underdetermined_system_the_solution_of_least_norm_is_found():
    rng = np.random.default_rng(3)
    K, b = rng.standard_normal((5, 12)), rng.standard_normal(5)
    for sketch, block in SKETCHES[:-2]:
        found = sketch_project(K, b, sketch, 1e-11, random_state=0, block=block)
        np.testing.assert_allclose(found.x, np.linalg.pinv(K) @ b, atol=1e-9)
    tall = np.vstack([K.T, K.T]) @ rng.standard_normal((5, 3))  # more equations than unknowns, consistent
    solution = rng.standard_normal(3)
    found = sketch_project(tall, tall @ solution, "block-kaczmarz", 1e-10, random_state=0, block=2)
    np.testing.assert_allclose(found.x, solution, atol=1e-9)


def test_the_first_residual_has_the_right_sign(system):
    K, b = system
    start = np.linalg.solve(K, b) + 1e-3
    found = sketch_project(K, b, "kaczmarz", 1e-6, random_state=0, z0=start)
    from_zero = sketch_project(K, b, "kaczmarz", 1e-6, random_state=0)
    assert found.nit < from_zero.nit
    assert (start == np.linalg.solve(K, b) + 1e-3).all()
    already = sketch_project(K, b, "gaussian", 1e-6, z0=np.linalg.solve(K, b))
    assert already.nit == 0


def test_rounding_ends_what_no_iteration_can_improve(system):
    K, b = system
    found = sketch_project(1e6 * K, 1e6 * b, "kaczmarz", 0.0, random_state=0)
    assert found.converged
    assert 0.0 < found.fun < 1e-6


@pytest.mark.parametrize("sketch", ["kaczmarz", "block-kaczmarz", "gaussian"])
def test_the_residual_of_a_large_system_is_looked_at_between_batches(sketch):
    N = 6000  # more rows than are drawn at a time
    rng = np.random.default_rng(0)
    K = sp.csr_array(sp.diags_array([np.full(N, 2.0), np.ones(N - 1) * 0.1, np.ones(N - 1) * 0.1], offsets=[0, 1, -1]))
    b = rng.standard_normal(N)
    tol = {"gaussian": 0.999 * np.linalg.norm(b)}.get(sketch, 1e-8)
    found = sketch_project(K, b, sketch, tol, 3_000_000, 0, block=4 if sketch == "block-kaczmarz" else 1)
    assert found.converged
    assert found.nit < 60 * N


def test_operations_are_those_of_the_formulas(system):
    K, b = system
    N = 14

    def per_step(sketch, block=1, steps=10 * N):
        with pytest.warns(RuntimeWarning):
            found = sketch_project(K, b, sketch, 0.0, steps, random_state=0, block=block)
        checks = found.nit // max(1, N // block)
        return (found.history["flops"][-1] - checks * 2 * N * N) / found.nit

    assert per_step("kaczmarz") == 4 * N
    assert per_step("gaussian") == 4 * N + 2 * N * N
    q = 7
    projection = 4 * q * N + q * (q + 1) * N + q**3 / 3
    assert per_step("block-kaczmarz", q, 6) == pytest.approx(projection)
    assert per_step("block-gaussian", q, 6) == pytest.approx(projection + q * 2 * N * N)
    full = sketch_project(K, b, "gmres", 1e-10)
    assert full.history["flops"][-1] == 2 * N * N * full.nit + 2 * N * full.nit * (full.nit + 1)


def test_equal_seeds_give_equal_answers(system):
    K, b = system
    for sketch, block in SKETCHES:
        first, second = (sketch_project(K, b, sketch, 1e-8, random_state=5, block=block) for _ in range(2))
        np.testing.assert_array_equal(first.x, second.x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"K": np.ones(3)}, ValueError, r"K must be a matrix, got shape \(3,\)"),
        ({"K": np.array([[1.0, np.nan], [0.0, 1.0]])}, ValueError, "K must be finite"),
        ({"rhs": np.ones(3)}, ValueError, r"rhs must have shape \(2,\), got \(3,\)"),
        ({"rhs": np.array([1.0, np.inf])}, ValueError, "rhs must be finite"),
        ({"z0": np.ones(3)}, ValueError, r"z0 must have shape \(2,\), got \(3,\)"),
        ({"sketch": "srht"}, ValueError, "sketch must be one of"),
        ({"sketch": "gaussian", "block": 3}, ValueError, "block must be 1 for sketch='gaussian'"),
        ({"block": 0}, ValueError, "block must be at least 1"),
        ({"tol": -1.0}, ValueError, "tol must be at least 0"),
        ({"max_iter": 0}, ValueError, "max_iter must be at least 1"),
        ({"K": np.ones((2, 3)), "sketch": "gmres"}, ValueError, "K must be square for sketch='gmres'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    good = {"K": np.eye(2), "rhs": np.ones(2)}
    with pytest.raises(error, match=message):
        sketch_project(**(good | change))


def test_a_singular_matrix_is_an_error_for_a_factorisation():
    for K in (np.ones((3, 3)), sp.csr_array(np.ones((3, 3)))):
        with pytest.raises(np.linalg.LinAlgError, match="singular"):
            sketch_project(K, np.ones(3), "exact")
