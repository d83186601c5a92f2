"""Tests of batch curvature: products, spectra, laws, stable rates, the learner."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, TensorDataset

from workingpapers.training.batch_curvature import (
    LanczosLR,
    batch_extremes,
    batch_top_eigenvalue,
    effective_batch,
    fit_batch_curve,
    gaussian_regression_max_lr,
    ggn_vp,
    heavy_ball,
    hvp,
    lanczos,
    largest_stable_lr,
    max_lr,
    noise_variance,
    predict_extremal,
    predict_ggn,
    scale_lr,
    spectral_density,
)
from workingpapers.training.batch_curvature.products import FunctionalModel

CROSS_ENTROPY = nn.CrossEntropyLoss()
MSE = nn.MSELoss()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).to(dtype)  # 81 parameters


def classes(n=40, dtype=torch.float64, seed=0):
    X = torch.randn(n, 6, generator=generator(seed), dtype=torch.float64).to(dtype)
    return X, torch.randint(4, (n,), generator=generator(seed + 1))


def dense(model, loss, X, y, kind="hessian"):
    """The matrix itself, by functional transforms of the whole network."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    shapes = [(name, p.shape, p.numel()) for name, p in parameters.items()]
    flat = torch.cat([p.flatten() for p in parameters.values()])

    def outputs(w):
        parts = torch.split(w, [size for _, _, size in shapes])
        return functional_call(model, {n: p.view(s) for (n, s, _), p in zip(shapes, parts, strict=True)}, (X,))

    if kind == "hessian":
        return hessian(lambda w: loss(outputs(w), y), flat)
    J = jacobian(outputs, flat).reshape(-1, len(flat))
    z = outputs(flat)
    inner = hessian(lambda v: loss(v.view(z.shape), y), z.detach().flatten())
    return J.T @ inner @ J


PRODUCTS = {"hessian": hvp, "ggn": ggn_vp}

# --------------------------------------------------------------------------------------------------------------------
# Products


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("loss", ["cross-entropy", "squares"])
def test_products_are_those_of_the_dense_matrix(kind, loss):
    model, (X, y) = network(), classes()
    loss, y = (
        (CROSS_ENTROPY, y) if loss == "cross-entropy" else (MSE, torch.randn(40, 4, generator=generator()).double())
    )
    M = dense(model, loss, X, y, kind)
    H = PRODUCTS[kind](model, loss, (X, y))
    assert (H.n, H.dtype, H.samples) == (81, torch.float64, 40)
    assert pytest.approx(float(loss(model(X), y).detach())) == H.loss
    torch.testing.assert_close(torch.stack([H(e) for e in torch.eye(81).double()]), M)
    v = torch.randn(81, generator=generator(5)).double()
    torch.testing.assert_close(H @ v, M @ v)
    np.testing.assert_allclose(H.to_scipy() @ v.numpy(), (M @ v).numpy(), atol=1e-12)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_loaders_and_pieces_give_the_mean_over_all_samples(kind):
    model, (X, y) = network(), classes(43)
    whole = PRODUCTS[kind](model, CROSS_ENTROPY, (X, y))
    v = torch.randn(81, generator=generator(5)).double()
    for data in (
        DataLoader(TensorDataset(X, y), batch_size=10, shuffle=True),
        [(X[:40], y[:40]), (X[40:], y[40:])],
        [[X, y]],
    ):
        torch.testing.assert_close(PRODUCTS[kind](model, CROSS_ENTROPY, data)(v), whole(v))
    pieces = PRODUCTS[kind](model, CROSS_ENTROPY, (X, y), micro_batch=7)
    torch.testing.assert_close(pieces(v), whole(v))
    assert pieces.samples == 43
    assert pieces.loss == pytest.approx(whole.loss)


def test_gauss_newton_is_the_hessian_of_a_linear_model_and_positive_semidefinite_in_others():
    X, y = classes()
    linear = nn.Linear(6, 4).double()
    v = torch.randn(28, generator=generator(2)).double()
    torch.testing.assert_close(
        ggn_vp(linear, CROSS_ENTROPY, (X, y))(v), hvp(linear, CROSS_ENTROPY, (X, y))(v), atol=1e-14, rtol=1e-10
    )
    model = network()
    smallest = {
        kind: float(lanczos(H := PRODUCTS[kind](model, CROSS_ENTROPY, (X, y)), H.n, 81, dtype=H.dtype).ritz[0])
        for kind in PRODUCTS
    }
    assert smallest["ggn"] > -1e-12
    assert smallest["hessian"] < -1e-3


def test_frozen_parameters_do_not_count_and_tied_ones_count_once():
    model, (X, y) = network(), classes()
    model[0].weight.requires_grad_(False)
    H = hvp(model, CROSS_ENTROPY, (X, y))
    assert H.n == 81 - 42
    torch.testing.assert_close(torch.stack([H(e) for e in torch.eye(H.n).double()]), dense(model, CROSS_ENTROPY, X, y))

    tied = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False)).double()
    tied[2].weight = tied[0].weight
    parameter = tied[0].weight.detach()

    def loss_of(w):
        return CROSS_ENTROPY(torch.tanh(X @ w.view(6, 6).T) @ w.view(6, 6).T, y)

    H = hvp(tied, CROSS_ENTROPY, (X, y))
    torch.testing.assert_close(
        torch.stack([H(e) for e in torch.eye(36).double()]), hessian(loss_of, parameter.flatten())
    )


def test_the_matrix_stays_that_of_the_moment_and_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4)).double()
    model[2].eval()  # modes that differ must come back as they were
    X, y = classes()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    v = torch.ones(hvp(model, CROSS_ENTROPY, (X, y)).n).double()
    for mode in ("train", "eval"):
        H = hvp(model, CROSS_ENTROPY, (X, y), mode=mode)
        state = torch.random.get_rng_state()
        first = H(v)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(state, torch.random.get_rng_state())
        with torch.no_grad():
            model[0].weight.mul_(2.0)
        torch.testing.assert_close(H(v), first)
        assert not torch.allclose(hvp(model, CROSS_ENTROPY, (X, y), mode=mode)(v), first)
        with torch.no_grad():
            model[0].weight.div_(2.0)


def test_dropout_has_one_mask_for_all_products_and_pieces_can_be_rebuilt():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Dropout(0.5), nn.Linear(30, 4)).double()
    X, y = classes()
    for data, micro in (((X, y), None), ((X, y), 9)):
        H = hvp(model, CROSS_ENTROPY, data, mode="train", micro_batch=micro, seed=3)
        assert lanczos(H, H.n, 30, dtype=H.dtype).ritz[-1] > 0  # refuses products that differ between calls
    v = torch.ones(H.n).double()
    seeds = [hvp(model, CROSS_ENTROPY, (X, y), mode="train", seed=seed)(v) for seed in (3, 3, 4)]
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.allclose(seeds[0], seeds[2])


class Attention(nn.Module):
    """Of tokens and a mask, by name."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens, scale):
        return {"logits": self.head(self.block(self.embed(tokens))) * scale[:, None, None]}


def test_attention_keyword_inputs_and_outputs_of_any_kind():
    torch.manual_seed(0)
    model = Attention().double()
    inputs = {"tokens": torch.randint(11, (5, 7), generator=generator()), "scale": torch.ones(5).double()}
    y = torch.randint(11, (5, 7), generator=generator(1))
    H = hvp(model, lambda out, y: CROSS_ENTROPY(out["logits"].flatten(0, 1), y.flatten()), (inputs, y))
    eps, v = 1e-5, torch.randn(H.n, generator=generator(2)).double()
    grads = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(model.parameters()) + sign * eps * v, moved.parameters()
        )
        loss = CROSS_ENTROPY(moved(**inputs)["logits"].flatten(0, 1), y.flatten())
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(moved.parameters()))]))
    torch.testing.assert_close(H(v), (grads[0] - grads[1]) / (2 * eps), atol=1e-7, rtol=1e-6)
    with pytest.raises(TypeError, match="returns one tensor, got dict"):
        ggn_vp(model, CROSS_ENTROPY, (inputs, y))


def test_recurrent_networks_and_several_positional_inputs():
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x, offset):
            return self.head(self.cell(x)[0][:, -1]) + offset

    x, offset = torch.randn(6, 5, 3, generator=generator()), torch.zeros(6, 2)
    H = hvp(Recurrent(), CROSS_ENTROPY, ((x, offset), torch.arange(6) % 2), micro_batch=4)
    assert float(lanczos(H, H.n, 20).ritz[-1]) > 0


def test_data_that_change_between_passes_are_refused():
    class Noisy(Dataset):
        def __init__(self):
            self.generator = generator()

        def __len__(self):
            return 24

        def __getitem__(self, index):
            return torch.randn(6, generator=self.generator).double(), index % 4

    model = network()
    H = hvp(model, CROSS_ENTROPY, DataLoader(Noisy(), batch_size=8))
    with pytest.raises(ValueError, match="same in every pass"):
        H(torch.ones(81).double())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, b: hvp("model", CROSS_ENTROPY, b), TypeError, "model must be a torch.nn.Module"),
        (lambda m, b: hvp(m.requires_grad_(False), CROSS_ENTROPY, b), ValueError, "requires_grad=True"),
        (lambda m, b: hvp(m, CROSS_ENTROPY, b, mode="both"), ValueError, "mode must be one of"),
        (lambda m, b: hvp(m, CROSS_ENTROPY, b[0]), TypeError, "batch must be"),
        (lambda m, b: hvp(m, CROSS_ENTROPY, iter([b])), TypeError, "gone through again, got an iterator"),
        (lambda m, b: hvp(m, CROSS_ENTROPY, []), ValueError, "at least one batch"),
        (lambda m, b: hvp(m, CROSS_ENTROPY, b, micro_batch=0), ValueError, "micro_batch must be"),
        (lambda m, b: hvp(m, nn.CrossEntropyLoss(reduction="none"), b), ValueError, "scalar"),
        (lambda m, b: hvp(m, CROSS_ENTROPY, (b[0] * torch.nan, b[1])), FloatingPointError, "loss is nan"),
        (lambda m, b: hvp(m, CROSS_ENTROPY, b)(torch.ones(3)), ValueError, r"shape \(81,\)"),
        (lambda m, b: batch_extremes(m, CROSS_ENTROPY, b, 41), ValueError, "batch_size must be"),
        (lambda m, b: batch_extremes(m, CROSS_ENTROPY, b, 0), ValueError, "batch_size must be"),
        (lambda m, b: batch_extremes(m, CROSS_ENTROPY, b, 4, matrix="fisher"), ValueError, "matrix must be one of"),
        (lambda m, b: batch_extremes(m, CROSS_ENTROPY, b[0], 4), TypeError, "dataset must|pairs"),
        (lambda m, b: batch_extremes(m, CROSS_ENTROPY, (b[0], b[1][:3]), 2), ValueError, "as many inputs as targets"),
        (lambda m, b: noise_variance(m, CROSS_ENTROPY, b, 40), ValueError, "batch_size must be"),
        (lambda m, b: largest_stable_lr(m, CROSS_ENTROPY, b, 4, "rprop"), ValueError, "optimizer must be"),
        (lambda m, b: largest_stable_lr(m, CROSS_ENTROPY, b, 4, start=0.0), ValueError, "start must be"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(network(), classes())


# --------------------------------------------------------------------------------------------------------------------
# Spectra


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_extremes_of_a_network_are_exact(dtype, tolerance):
    model, (X, y) = network(), classes()
    exact = torch.linalg.eigvalsh(dense(model, CROSS_ENTROPY, X, y))
    found = batch_extremes(model.to(dtype), CROSS_ENTROPY, (X.to(dtype), y), 40, steps=60)
    np.testing.assert_allclose([found.top[0], found.bottom[0]], exact[[-1, 0]].numpy(), atol=tolerance)
    assert len(found.top) == 1  # all samples: nothing to repeat


def test_top_eigenvalues_of_batches_are_those_of_their_own_hessians():
    model, (X, y) = network(), classes()
    found = batch_extremes(model, CROSS_ENTROPY, TensorDataset(X, y), 5, repeats=3, steps=60, seed=4)
    draws = generator(4)
    for top in found.top:
        pick = torch.randperm(40, generator=draws)[:5]
        torch.randn(81, generator=draws, dtype=torch.float64)  # the start
        exact = torch.linalg.eigvalsh(dense(model, CROSS_ENTROPY, X[pick], y[pick]))
        assert top == pytest.approx(float(exact[-1]), abs=1e-9)
    again = batch_top_eigenvalue(model, CROSS_ENTROPY, (X, y), 5, repeats=3, steps=60, seed=4, micro_batch=2)
    assert again == pytest.approx(float(found.top.mean()), abs=1e-9)


def test_data_sets_of_single_samples_are_collated():
    class Pairs(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            return X[index], int(y[index])

    model, (X, y) = network(), classes()
    for matrix in PRODUCTS:
        options = {"repeats": 2, "matrix": matrix}
        assert batch_top_eigenvalue(model, CROSS_ENTROPY, Pairs(), 7, **options) == pytest.approx(
            batch_top_eigenvalue(model, CROSS_ENTROPY, (X, y), 7, **options)
        )


def test_density_integrates_to_one_and_averages_runs():
    H = torch.diag(torch.linspace(-1, 2, 200, dtype=torch.float64))
    runs = [lanczos(H.mv, 200, 40, seed=seed, dtype=torch.float64) for seed in range(20)]
    grid = torch.linspace(-3, 4, 701, dtype=torch.float64)
    density = spectral_density([r.ritz for r in runs], [r.weights for r in runs], grid, 0.1)
    assert float(density.sum() * 0.01) == pytest.approx(1.0, abs=1e-6)
    inside = (grid > -0.6) & (grid < 1.6)
    torch.testing.assert_close(density[inside], torch.full_like(density[inside], 1 / 3), atol=0.05, rtol=0)
    one = spectral_density(runs[0].ritz, runs[0].weights, grid, 0.1)
    torch.testing.assert_close(spectral_density([runs[0].ritz] * 2, [runs[0].weights] * 2, grid, 0.1), one)
    with pytest.raises(ValueError, match="width must be"):
        spectral_density(runs[0].ritz, runs[0].weights, grid, 0.0)


def test_noise_variance_is_the_variance_of_batches_without_replacement():
    # one weight: H_i = x_i^2, so P sigma^2 / b is the variance of a mean of B of N numbers
    X = torch.arange(1.0, 21.0, dtype=torch.float64)[:, None]
    model = nn.Linear(1, 1, bias=False).double()
    half_square = lambda z, y: 0.5 * (z - y).square().mean()  # noqa: E731
    exact = float(X.square().var())  # with N - 1
    for B in (2, 15):
        found = noise_variance(model, half_square, (X, 0 * X), B, repeats=200)
        assert found.sigma2 == pytest.approx(exact, abs=3 * found.standard_error)
        assert found.standard_error < 0.2 * exact
        assert found.Psigma2 == found.sigma2


# --------------------------------------------------------------------------------------------------------------------
# Laws


def test_effective_batch():
    assert effective_batch(8) == 8.0
    assert effective_batch(8, 16) == 16.0
    assert effective_batch(16, 16) == math.inf
    np.testing.assert_allclose(effective_batch([1, 50], 100), [100 / 99, 100.0])
    for B in (0, 101, math.nan):
        with pytest.raises(ValueError, match="B must be"):
            effective_batch(B, 100)
    with pytest.raises(TypeError, match="B must be numbers"):
        effective_batch("8")


@pytest.mark.parametrize("spike", [0.5, 1.5, 2.0, 4.0])
def test_additive_law_of_a_spiked_gaussian_matrix(spike):
    P, tops, overlaps = 500, [], []
    rng = np.random.default_rng(0)
    for _ in range(5):
        noise = rng.standard_normal((P, P))
        noise = (noise + noise.T) / math.sqrt(2 * P)  # entries of variance 1 / P: radius 2
        direction = rng.standard_normal(P)
        direction /= np.linalg.norm(direction)
        values, vectors = eigh(noise + spike * np.outer(direction, direction), subset_by_index=[P - 1, P - 1])
        tops.append(values[0])
        overlaps.append((vectors[:, 0] @ direction) ** 2)
    predicted = predict_extremal(spike, 0.0, P, sigma2=8 / P, B=8)
    assert np.mean(tops) == pytest.approx(predicted.top, rel=0.02)
    assert predicted.bottom == pytest.approx(-2.0)
    if spike > 1:
        assert np.mean(overlaps) == pytest.approx(predicted.top_overlap, abs=0.02)
    else:
        assert predicted.top_overlap == 0


def test_multiplicative_law_of_a_spiked_covariance():
    rng = np.random.default_rng(0)
    for ratio in (1.3, 2.0, 4.0):
        tops = []
        for _ in range(4):
            X = rng.standard_normal((600, 300))
            X[:, 0] *= math.sqrt(ratio)
            tops.append(np.linalg.norm(X, 2) ** 2 / 600)
        assert np.mean(tops) == pytest.approx(predict_ggn(ratio, 1.0, 300, 600), rel=0.03)


def test_laws_are_continuous_monotone_and_exact_without_noise():
    sizes = 1 / (np.linspace(1, 0, 40_001) ** 2 * 0.999 + 0.001)  # even in b^(-1/2)
    for lam in (0.1, 1.0, 5.0):
        top = predict_extremal(lam, -lam, 100, 0.5, sizes, 1000).top
        assert (top >= lam - 1e-12).all()
        assert (np.diff(top) <= 1e-12).all()
        assert np.abs(np.diff(top)).max() < 1e-3
        assert top[-1] == pytest.approx(lam)
        bulk = predict_ggn(lam + 0.5, 0.5, 100, sizes, 1000)
        assert (np.diff(bulk) <= 1e-12).all()
        assert np.abs(np.diff(bulk)).max() < 1e-2
        assert bulk[-1] == pytest.approx(lam + 0.5)
    both = predict_extremal(3.0, -2.0, 100, 0.5, [10, 100])
    mirrored = predict_extremal(2.0, -3.0, 100, 0.5, [10, 100])
    np.testing.assert_allclose(both.top, -mirrored.bottom)
    np.testing.assert_allclose(both.top_overlap, mirrored.bottom_overlap)
    assert predict_ggn(0.5, 1.0, 100, 25) == pytest.approx(9.0)  # the edge (1 + sqrt 4)^2


def test_exact_rates_of_gaussian_regression():
    isotropic = [gaussian_regression_max_lr(np.ones(100), B) for B in (1, 4, 16, 64, 256)]
    np.testing.assert_allclose(isotropic, [0.019608, 0.076190, 0.273504, 0.775758, 1.434174], atol=1e-6)
    spiked = [gaussian_regression_max_lr(np.r_[1.0, np.full(99, 0.05)], B) for B in (1, 4, 16)]
    np.testing.assert_allclose(spiked, [0.308899, 1.017743, 1.739785], atol=1e-6)
    assert gaussian_regression_max_lr([4.0], 1) == pytest.approx(2 / 12)  # 2 / (l (1 + 2 / B))
    assert gaussian_regression_max_lr([1e-200, 0.0, 2e-200], 10**9) == pytest.approx(1e200)


def test_exact_rate_is_where_the_second_moments_stop_contracting():
    eigenvalues = np.array([3.0, 1.0, 0.2, 0.0])
    for B in (1, 5):
        limit = gaussian_regression_max_lr(eigenvalues, B)
        radii = []
        for a in (0.999 * limit, 1.001 * limit):
            seen = eigenvalues[:3]
            recursion = np.diag((1 - a * seen) ** 2 + a**2 * seen**2 / B) + a**2 / B * np.outer(seen, seen)
            radii.append(np.abs(np.linalg.eigvalsh(recursion)).max())
        assert radii[0] < 1 < radii[1]
    for bad in ([], [0.0], [-1.0, 1.0], [np.inf]):
        with pytest.raises(ValueError, match="H_eigenvalues must be"):
            gaussian_regression_max_lr(bad, 4)


SIZES = np.array([8, 16, 64, 256, 1000])


def test_fits_recover_exact_curves_and_choose_between_them():
    b = effective_batch(SIZES, 1000)
    additive, multiplicative = 2.0 + 30.0 / b, 0.5 * (1 + np.sqrt(40.0 / b)) ** 2
    found = fit_batch_curve(SIZES, additive, N=1000)
    assert found.model == "additive"
    assert (found.lam1, found.bstar, found.Psigma2) == pytest.approx((2.0, 15.0, 60.0))
    assert found.rival.model == "multiplicative"
    assert found.rival.r_squared() < found.r_squared() == pytest.approx(1.0)
    found = fit_batch_curve(SIZES[::-1], multiplicative[::-1], N=1000)
    assert found.model == "multiplicative"
    assert (found.lam1, found.p_eff) == pytest.approx((0.5, 40.0))
    np.testing.assert_allclose(found(SIZES), multiplicative)
    # b* is where the curve is twice its limit
    for curve in (found, found.rival, fit_batch_curve(SIZES, additive, N=None)):
        fresh = fit_batch_curve(SIZES, curve(SIZES), model=curve.model, N=curve.N)
        B = 1 / (1 / fresh.bstar + (1 / 1000 if curve.N else 0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert float(curve(B)) == pytest.approx(2 * curve.lam1)


def test_published_fit_of_isotropic_logistic_regression():
    # top eigenvalues measured for d = 300 isotropic features; the true dimension is nearly recovered
    lam = [10.83, 6.01, 3.57, 2.11, 1.35, 0.905, 0.649, 0.493]
    curve = fit_batch_curve(2.0 ** np.arange(3, 11), lam, N=20_000)
    assert curve.model == "multiplicative"
    assert curve.p_eff == pytest.approx(309, rel=0.02)
    assert curve.lam1 == pytest.approx(0.208, rel=0.02)
    assert curve.r_squared() > 0.999
    assert curve.rival.r_squared() == pytest.approx(0.9924, abs=0.001)


def test_empirical_curve_joins_the_points_and_falls():
    curve = fit_batch_curve([8, 16, 64, 64], [9.0, 4.0, 1.0, 1.0], model="empirical")
    np.testing.assert_allclose(curve([8, 16, 64]), [9.0, 4.0, 1.0])
    assert curve(1000) == pytest.approx(1.0)
    assert curve.bstar is not None
    assert float(curve(curve.bstar)) == pytest.approx(2.0)
    bumpy = fit_batch_curve([8, 16, 64], [4.0, 5.0, 1.0], model="empirical")
    assert bumpy(8) == bumpy(16) == pytest.approx(math.sqrt(20.0))
    with pytest.warns(UserWarning, match="below the smallest measured batch size 8"):
        assert float(curve(4)) > 9.0
    assert fit_batch_curve([8, 16], [1.1, 1.0], model="empirical").bstar is None


def test_noise_without_a_limit():
    # the best constant is 0: no saturation in sight
    curve = fit_batch_curve([8, 16, 32], [8.0, 3.0, 0.9], N=64, model="additive")
    assert curve.lam1 == 0.0
    assert curve.bstar == math.inf
    assert max_lr(curve, 32) > max_lr(curve, 8) > 0
    with pytest.raises(ValueError, match="curve is 0 at this batch size"):
        max_lr(curve, 64)


def test_learning_rates_follow_the_curve():
    curve = fit_batch_curve(SIZES, 2.0 + 30.0 / effective_batch(SIZES, 1000), N=1000)
    assert max_lr(curve, 1000) == pytest.approx(1.0)
    assert max_lr(curve, 1000, momentum=0.9) == pytest.approx(1.9)
    assert scale_lr(0.1, 8, 64, "linear") == pytest.approx(0.8)
    assert scale_lr(0.1, 8, 72, "sqrt") == pytest.approx(0.3)
    b0, b1 = effective_batch([16, 256], 1000)
    by_hand = 0.1 * (1 + 15 / b0) / (1 + 15 / b1)
    assert scale_lr(0.1, 16, 256, curve=curve) == pytest.approx(by_hand)
    assert scale_lr(0.1, 16, 256, bstar=15.0, N=1000) == pytest.approx(by_hand)
    np.testing.assert_allclose(scale_lr(0.1, 8, [8, 16], "linear"), [0.1, 0.2])
    # for batches far below b* the law is linear, far above it is flat
    assert scale_lr(1.0, 1, 10, bstar=1e9) == pytest.approx(10.0, rel=1e-6)
    assert scale_lr(1.0, 1e6, 1e7, bstar=1.0) == pytest.approx(1.0, rel=1e-5)
    with pytest.warns(UserWarning, match="below the smallest measured"):
        scale_lr(0.1, 4, 64, curve=curve)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_rate_with_momentum_is_exact_in_one_dimension(momentum):
    # x ~ N(0, 1): the curvature of a batch has mean 1 and variance 2 / B, so lambda' = 1 + 2 / B
    curve = fit_batch_curve([1, 2, 4], [3.0, 2.0, 1.5], model="additive")
    assert (curve.lam1, curve.Psigma2) == pytest.approx((1.0, 2.0))
    for B in (1, 3, 1000):
        limit, radii = float(max_lr(curve, B, momentum)), []
        for a in (0.999 * limit, 1.001 * limit):
            mean, square = 1 + momentum - a, (1 + momentum - a) ** 2 + 2 * a**2 / B
            # w' = (1 + rho - a h) w - rho v of the moments (w w, w v, v v), where v is the w before
            moments = [[square, -2 * momentum * mean, momentum**2], [mean, -momentum, 0.0], [1.0, 0.0, 0.0]]
            radii.append(np.abs(np.linalg.eigvals(moments)).max())
        assert radii[0] < 1 < radii[1]
    assert max_lr(curve, 1) == pytest.approx(gaussian_regression_max_lr([1.0], 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: fit_batch_curve([8, 16], [1, 2]), ValueError, "at least 3 different sizes"),
        (lambda c: fit_batch_curve([8, 8, 16], [1, 2, 3]), ValueError, "at least 3 different sizes"),
        (lambda c: fit_batch_curve([8, 16, 32], [1, 2]), ValueError, "one length"),
        (lambda c: fit_batch_curve([8, 16, 32], [1, 2, 0]), ValueError, "lam must be positive"),
        (lambda c: fit_batch_curve([8, 16, 32], [1, 2, np.nan]), ValueError, "lam must be finite"),
        (lambda c: fit_batch_curve([8, 16, 32], [3, 2, 1], N=20), ValueError, "at most N = 20"),
        (lambda c: fit_batch_curve([8, 16, 32], [3, 2, 1], model="cubic"), ValueError, "model must be one of"),
        (lambda c: max_lr(c, 64, momentum=1.0), ValueError, "momentum must be"),
        (lambda c: max_lr(2.0, 64), TypeError, "curve must be a BatchCurve"),
        (lambda c: scale_lr(0.1, 8, 64), ValueError, "one of curve and bstar"),
        (lambda c: scale_lr(0.1, 8, 64, curve=c, bstar=2.0), ValueError, "one of curve and bstar"),
        (lambda c: scale_lr(0.1, 8, 64, "linear", curve=c), ValueError, "one of curve and bstar"),
        (lambda c: scale_lr(0.1, 8, 64, "cubic"), ValueError, "rule must be one of"),
        (lambda c: scale_lr(0.0, 8, 64, "sqrt"), ValueError, "lr must be above 0"),
        (lambda c: scale_lr(0.1, 8, 2000, curve=c), ValueError, "at most N = 1000"),
        (lambda c: predict_extremal(1.0, 2.0, 10, 1.0, 8), ValueError, "lamP must be"),
        (lambda c: predict_extremal(1.0, 0.0, 10, -1.0, 8), ValueError, "sigma2 must be"),
        (lambda c: predict_ggn(1.0, 0.0, 10, 8), ValueError, "s2 must be"),
    ],
)
def test_bad_input_to_the_laws_is_named(call, error, message):
    curve = fit_batch_curve(SIZES, 2.0 + 30.0 / SIZES, N=1000)
    with pytest.raises(error, match=message):
        call(curve)


# --------------------------------------------------------------------------------------------------------------------
# Stable rates


def quadratic(curvatures=(1.0, 0.3)):
    """Least squares with the Hessian diag(curvatures) on the whole."""
    curvatures = torch.tensor(curvatures, dtype=torch.float64)
    X = torch.diag(curvatures.sqrt()) * math.sqrt(len(curvatures))
    model = nn.Linear(len(curvatures), 1, bias=False).double()
    nn.init.ones_(model.weight)
    return model, lambda z, y: 0.5 * (z - y).square().mean(), (X, torch.zeros(len(curvatures), 1).double())


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_full_batch_rate_is_the_one_of_the_quadratic(momentum):
    model, loss, data = quadratic((4.0, 1.0))
    before = model.weight.detach().clone()
    make = lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=momentum)  # noqa: E731
    found = largest_stable_lr(model, loss, data, 2, make, steps=120, factor=100.0, rtol=0.01)  # momentum overshoots
    limit = 2 * (1 + momentum) / 4.0
    assert found.lr <= found.diverges_at <= 1.0101 * found.lr
    assert float(found) == found.lr
    assert found.lr == pytest.approx(limit, rel=0.03)
    assert torch.equal(model.weight, before)
    top = batch_top_eigenvalue(model, loss, data, 2)
    assert limit == pytest.approx(2 * (1 + momentum) / top)


def test_small_batches_bear_smaller_rates_and_the_start_of_the_search_does_not_matter():
    model, (X, y) = network(), classes(200)
    rates = {B: largest_stable_lr(model, CROSS_ENTROPY, (X, y), B, steps=20).lr for B in (1, 100)}
    assert rates[1] < 0.6 * rates[100]
    for start in (1e-2, 1e3):
        again = largest_stable_lr(model, CROSS_ENTROPY, (X, y), 1, steps=20, start=start)
        assert again.lr == pytest.approx(rates[1], rel=0.12)
    same = [largest_stable_lr(model, CROSS_ENTROPY, (X, y), 10, "adam", steps=10, seed=3) for _ in range(2)]
    assert same[0] == same[1]


def test_training_draws_a_new_dropout_mask_in_every_step():
    model = FunctionalModel(nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5)).double(), "train", seed=1)
    X, _ = classes()
    first, again, other = (model.outputs(model.parameters, X, draw) for draw in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first == 0, other == 0)


def test_searches_that_cannot_end():
    model, loss, data = quadratic()
    with pytest.warns(RuntimeWarning, match="no learning rate up to"):
        found = largest_stable_lr(model, lambda z, y: loss(z, y) * 1e-30, data, 2, steps=2, start=1e5)
    assert found.diverges_at == math.inf
    with pytest.raises(FloatingPointError, match="down to 1e-10"):
        largest_stable_lr(model, lambda z, y: loss(z, y) * 1e30, data, 2, steps=2, start=1e-9)
    with pytest.raises(FloatingPointError, match="nan at the start"):
        largest_stable_lr(model, lambda z, y: loss(z, y) * torch.nan, data, 2)


# --------------------------------------------------------------------------------------------------------------------
# The learner


def test_heavy_ball_is_polyaks_pair():
    pair = heavy_ball(torch.tensor([1.0, 2.0, 9.0]))
    assert pair.lr == pytest.approx((2 / (1 + 3)) ** 2)
    assert pair.momentum == pytest.approx((2 / 4) ** 2)
    # the spectral radius of heavy ball is sqrt(momentum) for every curvature in between
    for curvature in (1.0, 3.0, 9.0):
        step = np.array([[1 + pair.momentum - pair.lr * curvature, -pair.momentum], [1.0, 0.0]])
        assert np.abs(np.linalg.eigvals(step)).max() == pytest.approx(math.sqrt(pair.momentum), abs=1e-6)
    noisy = heavy_ball(torch.tensor([-1.5, 1.0, 2.0, 9.0]))  # below 1.5 there is only noise
    assert noisy.smallest == 2.0
    clipped = heavy_ball(torch.tensor([1e-9, 1.0]), max_momentum=0.9, safety=0.5)
    assert clipped.momentum == 0.9
    assert clipped.lr == pytest.approx(0.5 * (1 + math.sqrt(0.9)) ** 2)
    assert clipped.lr < 2 * 1.9
    assert heavy_ball(torch.tensor([-5.0, 1.0])).momentum == 0.0
    with pytest.raises(ValueError, match="positive value"):
        heavy_ball(torch.tensor([-1.0, 0.0]))


def test_learner_finds_the_pair_of_a_quadratic_and_trains_at_its_rate():
    model, loss, data = quadratic((4.0, 1.0, 0.25))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.0)
    scheduler = LanczosLR(optimizer, model, loss, data, every=10, safety=1.0)
    found = scheduler.history[0]
    assert (found.largest, found.smallest) == pytest.approx((4.0, 0.25))
    assert optimizer.param_groups[0]["lr"] == pytest.approx((2 / 2.5) ** 2)
    assert optimizer.param_groups[0]["momentum"] == pytest.approx((1.5 / 2.5) ** 2)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(data[0]), data[1]).backward()
        optimizer.step()
        scheduler.step()
    assert len(scheduler.history) == 7  # at 0, 10, ..., 60
    assert float(model.weight.detach().norm()) < 60 * 0.6**60 * 10


def test_learner_is_held_between_updates_and_continues_from_its_state():
    def run(steps, state=None):
        model, (X, y) = network(), classes()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.0)
        scheduler = LanczosLR(optimizer, model, CROSS_ENTROPY, DataLoader(TensorDataset(X, y), 40), every=3)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            scheduler.load_state_dict(state[2])
        rates = []
        for _ in range(steps):
            optimizer.zero_grad()
            CROSS_ENTROPY(model(X), y).backward()
            optimizer.step()
            scheduler.step()
            rates.append((scheduler.get_last_lr()[0], optimizer.param_groups[0]["momentum"]))
        return rates, copy.deepcopy([part.state_dict() for part in (model, optimizer, scheduler)]), model

    rates, _, whole = run(8)
    assert rates[0] == rates[1] != rates[2] == rates[3] == rates[4] != rates[5]
    first, state, _ = run(4)
    rest, _, continued = run(4, state)
    assert first + rest == rates
    torch.testing.assert_close(whole[0].weight, continued[0].weight, rtol=0, atol=0)


def test_learner_holds_its_pair_where_the_loss_is_flat_and_stops_where_it_is_not_finite():
    model, (X, y) = network(), classes()
    factor = [1.0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.0)
    scheduler = LanczosLR(optimizer, model, lambda z, y: factor[0] * CROSS_ENTROPY(z, y), (X, y))
    optimizer.step()
    factor[0] = 0.0
    scheduler.step()
    assert scheduler.history[1] == scheduler.history[0]
    assert optimizer.param_groups[0]["lr"] == scheduler.history[0].lr
    factor[0] = math.nan
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        scheduler.step()
    with pytest.raises(ValueError, match="positive value"):
        LanczosLR(optimizer, model, lambda z, y: 0.0 * CROSS_ENTROPY(z, y), (X, y))


def test_learner_refuses_optimisers_it_cannot_steer():
    model, (X, y) = network(), classes()
    for optimizer, error, message in (
        (torch.optim.Adam(model.parameters()), TypeError, "must have momentum"),
        (torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, nesterov=True), ValueError, "neither nesterov"),
    ):
        with pytest.raises(error, match=message):
            LanczosLR(optimizer, model, CROSS_ENTROPY, (X, y))
    with pytest.raises(ValueError, match="every must be"):
        LanczosLR(torch.optim.SGD(model.parameters(), lr=1.0), model, CROSS_ENTROPY, (X, y), every=0)
