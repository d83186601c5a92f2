"""Tests of Lanczos: exact eigenvalues, quadrature, ghosts, breakdown, refusals."""

import numpy as np
import pytest
import torch

from workingpapers.common.lanczos import lanczos


def symmetric(n=60, seed=0, dtype=torch.float64, eigenvalues=None):
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    if eigenvalues is None:
        eigenvalues = torch.randn(n, generator=generator, dtype=torch.float64)
    return (Q * eigenvalues) @ Q.T, Q


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_all_steps_give_the_exact_spectrum(dtype, tolerance):
    H, _ = symmetric()
    found = lanczos(H.to(dtype).mv, 60, 60, dtype=dtype)
    exact = np.linalg.eigvalsh(H.numpy())
    np.testing.assert_allclose(found.ritz.numpy(), exact, atol=tolerance)
    assert found.exhausted
    assert float(found.weights.sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
def test_few_steps_give_the_extremes_of_a_spiked_spectrum(dtype, tolerance):
    eigenvalues = torch.cat([torch.linspace(-0.1, 0.1, 497, dtype=torch.float64), torch.tensor([-1.0, 2.0, 3.0])])
    H, Q = symmetric(500, eigenvalues=eigenvalues.double())
    found = lanczos(H.to(dtype).mv, 500, 20, dtype=dtype, keep_basis=True)
    np.testing.assert_allclose(found.ritz[[0, -2, -1]].numpy(), [-1.0, 2.0, 3.0], atol=tolerance)
    assert abs(float(found.vectors(-1) @ Q[:, -1])) == pytest.approx(1.0, abs=1e-6)
    assert found.vectors().shape == (20, 500)


def test_ritz_values_lie_inside_the_spectrum_and_within_their_residuals_of_it():
    H, _ = symmetric(80)
    exact = torch.linalg.eigvalsh(H)
    for m in (1, 2, 5, 15):
        found = lanczos(H.mv, 80, m, seed=3, dtype=torch.float64, keep_basis=True)
        assert exact[0] - 1e-12 <= found.ritz[0]
        assert found.ritz[-1] <= exact[-1] + 1e-12
        nearest = (found.ritz[:, None] - exact).abs().amin(1)
        assert (nearest <= found.residuals + 1e-12).all()
        Y = found.vectors()
        torch.testing.assert_close((Y @ H - found.ritz[:, None] * Y).norm(dim=1), found.residuals, atol=1e-12, rtol=0)


def test_nodes_and_weights_are_a_gauss_quadrature_of_degree_2m_minus_1():
    H, _ = symmetric(40, eigenvalues=torch.linspace(-1, 1, 40, dtype=torch.float64))
    start = torch.arange(1.0, 41.0, dtype=torch.float64)
    unit = start / start.norm()
    found = lanczos(H.mv, 40, 5, start=start, dtype=torch.float64)
    power = unit.clone()
    for degree in range(12):
        moment = float((found.weights * found.ritz**degree).sum())
        if degree <= 9:
            assert moment == pytest.approx(float(unit @ power), abs=1e-13)
        elif degree == 10:  # one more is too many
            assert abs(moment - float(unit @ power)) > 1e-9
        power = H @ power
    torch.testing.assert_close(start, torch.arange(1.0, 41.0, dtype=torch.float64))


def test_no_ghosts_of_a_converged_eigenvalue():
    # without reorthogonalisation the top value reappears from about step 30 on
    eigenvalues = torch.cat(
        [torch.linspace(0, 1, 299, dtype=torch.float64), torch.tensor([100.0], dtype=torch.float64)]
    )
    H, _ = symmetric(300, eigenvalues=eigenvalues)
    found = lanczos(H.mv, 300, 120, dtype=torch.float64, keep_basis=True)
    assert int((found.ritz > 50).sum()) == 1
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(120, dtype=torch.float64), atol=1e-13, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_breakdown_stops_early_at_any_scale(dtype, scale):
    eigenvalues = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).repeat(20) * scale
    H, _ = symmetric(60, eigenvalues=eigenvalues)
    found = lanczos(H.to(dtype).mv, 60, 30, dtype=dtype)
    assert found.exhausted
    np.testing.assert_allclose(found.ritz.numpy(), np.array([1.0, 2.0, 5.0]) * scale, rtol=1e-5)


def test_zero_and_one_dimensional_operators():
    zero = lanczos(lambda v: 0 * v, 10, 5)
    assert zero.exhausted
    assert zero.ritz.tolist() == [0.0]
    one = lanczos(lambda v: -3 * v, 1, 7)
    assert one.exhausted
    assert one.ritz.tolist() == pytest.approx([-3.0])
    assert one.weights.tolist() == [1.0]


def test_float32_recursion_costs_about_a_digit():
    H, _ = symmetric(200)
    exact = float(torch.linalg.eigvalsh(H)[-1])
    halves = lanczos(H.float().mv, 200, 80, recursion_dtype=torch.float32, keep_basis=True)
    assert halves.basis.dtype == torch.float32
    assert float(halves.ritz[-1]) == pytest.approx(exact, rel=2e-5)


def test_the_same_seed_gives_the_same_result_and_leaves_the_global_generator_alone():
    H, _ = symmetric(30)
    state = torch.random.get_rng_state()
    first, second, other = (lanczos(H.float().mv, 30, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.ritz, second.ritz)
    assert not torch.equal(first.ritz, other.ritz)
    assert torch.equal(state, torch.random.get_rng_state())


def test_products_that_are_not_symmetric_or_not_repeatable_are_refused():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(30, 30, generator=generator)
    with pytest.raises(ValueError, match="symmetric and the same at every call"):
        lanczos(A.mv, 30, 10)
    with pytest.raises(ValueError, match="dropout"):
        lanczos(lambda v: (A + A.T) @ v * (torch.rand(30, generator=generator) > 0.1), 30, 10)


def test_a_matvec_that_writes_into_its_argument_does_no_harm():
    H, _ = symmetric(30)

    def careless(v):
        product = H @ v
        v.zero_()
        return product

    torch.testing.assert_close(
        lanczos(careless, 30, 10, dtype=torch.float64).ritz, lanczos(H.mv, 30, 10, dtype=torch.float64).ritz
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n": 0}, ValueError, "n must be"),
        ({"m": 0}, ValueError, "m must be"),
        ({"m": 2.0}, TypeError, "m must be an integer"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"start": torch.zeros(5)}, ValueError, "start must not be 0"),
        ({"start": torch.ones(4)}, ValueError, r"start must be a tensor of shape \(5,\)"),
        ({"start": torch.full((5,), torch.nan)}, ValueError, "start must be finite"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a floating-point"),
        ({"matvec": lambda v: v[:2]}, ValueError, "matvec must return shape"),
        ({"matvec": lambda v: v * torch.inf}, FloatingPointError, "product 1 is not finite"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        lanczos(**({"matvec": lambda v: v, "n": 5, "m": 3} | change))


def test_it_unpacks():
    H, _ = symmetric(20)
    found = lanczos(H.mv, 20, 6, dtype=torch.float64, keep_basis=True)
    ritz, weights, vectors = found
    assert ritz is found.ritz
    assert weights is found.weights
    assert vectors.shape == (6, 20)
    assert list(lanczos(H.mv, 20, 6, dtype=torch.float64))[2] is None
