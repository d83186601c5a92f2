"""Tests of the group envelope: value, conjugate, proximal operator, groups, penalties, optimisers, linear models."""

import copy
import itertools

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from optimizer_contract import check_optimizer
from workingpapers.training.group_envelope import (
    HSPG,
    GroupEnvelope,
    GroupLasso,
    GroupSpec,
    KGroupRegressor,
    KSupportRegressor,
    ProxAdam,
    ProxSGD,
    SparsityRamp,
    conjugate,
    harden,
    prox_wgsef,
    wgsef,
)
from workingpapers.training.group_envelope.envelope import shrinkage, sorted_roots

LAMBDAS = [0.05, 0.3, 1.0, 10.0, 1000.0]


def groups(m=12, size=3, seed=0, zeros=0):
    rng = np.random.default_rng(seed)
    t = rng.standard_normal((m, size))
    t[rng.permutation(m)[:zeros]] = 0.0
    return t, rng.uniform(0.3, 3.0, m)


def norms_of(theta):
    return np.linalg.norm(theta, axis=-1)


def bisected(t, lam, d, k):
    """The proximal operator from its optimality conditions, by 200 bisections: slow and independent."""
    a, c = norms_of(t) * np.sqrt(lam * d), lam * d
    if (a > 0).sum() <= k:
        u = np.ones(len(a))
    else:
        low, high = -320.0, 320.0  # of the logarithm
        for _ in range(200):
            r = (low + high) / 2
            low, high = (r, high) if np.clip(10.0**r * a - c, 0, 1).sum() < k else (low, r)
        u = np.clip(10.0**high * a - c, 0, 1)
    return t * (u / (u + c))[:, None]


# --------------------------------------------------------------------------------------------------------------------
# The envelope


@pytest.mark.parametrize("k", [1, 3, 11])
def test_value_is_the_minimum_over_the_capped_simplex(k):
    t, d = groups()
    b = np.sqrt(d) * norms_of(t)
    value = wgsef(norms_of(t), d, k)
    # by enumeration: q groups at u = 1, the others proportional to b; the minimum is among the feasible ones
    order = np.sort(b)[::-1]
    candidates = []
    for q in range(k):
        u = np.r_[np.ones(q), (k - q) * order[q:] / order[q:].sum()]
        if u.max() <= 1 + 1e-12:
            candidates.append(0.5 * (order**2 / u).sum())
    assert value == pytest.approx(min(candidates), rel=1e-12)


def test_limits_in_which_it_is_something_known():
    t, d = groups()
    n = norms_of(t)
    assert wgsef(n, d, len(n)) == pytest.approx(0.5 * (d * n**2).sum())  # weighted ridge
    assert wgsef(t[:, 0], 1.0, 1) == pytest.approx(0.5 * np.abs(t[:, 0]).sum() ** 2)  # 1-support: the squared l1 norm
    sparse, d = groups(zeros=9)
    assert wgsef(norms_of(sparse), d, 3) == pytest.approx(0.5 * (d * norms_of(sparse) ** 2).sum())  # = gs_k


def test_singleton_groups_give_half_the_squared_k_support_norm():
    # Argyriou et al. 2012, Proposition 2.1: with the one r in 0..k-1 between whose neighbours the mean falls
    w, k = np.sort(np.abs(groups(m=9, size=1, seed=3)[0][:, 0]))[::-1], 4
    for r in range(k):
        mean = w[k - r - 1 :].sum() / (r + 1)
        above = w[k - r - 2] if k - r - 1 > 0 else np.inf
        if above > mean >= w[k - r - 1]:
            norm = (w[: k - r - 1] ** 2).sum() + w[k - r - 1 :].sum() ** 2 / (r + 1)
    assert wgsef(w, 1.0, k) == pytest.approx(0.5 * norm, rel=1e-12)


def test_it_is_convex_and_the_largest_such_function():
    # biconjugate: G(theta) = max over phi of <theta, phi> - G*(phi), reached at the gradient of G
    t, d = groups(seed=1)
    theta = torch.tensor(t, requires_grad=True)
    value = wgsef(torch.linalg.vector_norm(theta, dim=1), torch.tensor(d), 4)
    (phi,) = torch.autograd.grad(value, theta)
    dual = (theta * phi).sum() - conjugate(torch.linalg.vector_norm(phi, dim=1), torch.tensor(d), 4)
    torch.testing.assert_close(value, dual, rtol=1e-12, atol=0.0)
    rng = np.random.default_rng(0)
    a, b, share = rng.standard_normal((50, 12, 3)), rng.standard_normal((50, 12, 3)), rng.random((50, 1, 1))
    chord = share[:, 0, 0] * wgsef(norms_of(a), d, 4) + (1 - share[:, 0, 0]) * wgsef(norms_of(b), d, 4)
    assert (wgsef(norms_of(share * a + (1 - share) * b), d, 4) <= chord + 1e-12).all()


# --------------------------------------------------------------------------------------------------------------------
# The proximal operator


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("zeros", [0, 5])
def test_prox_satisfies_fenchels_equality(lam, k, zeros):
    t, d = groups(seed=2, zeros=zeros)
    theta = prox_wgsef(t, lam, d, k, axis=1)
    phi = (t - theta) / lam
    gap = wgsef(norms_of(theta), d, k) + conjugate(norms_of(phi), d, k) - (theta * phi).sum()
    assert abs(gap) <= 1e-13 * (1 + (theta * phi).sum() + (t**2).sum())
    np.testing.assert_allclose(theta, bisected(t, lam, d, k), rtol=0, atol=1e-12)


def test_no_perturbation_lowers_the_objective():
    t, d = groups(seed=4)
    theta = prox_wgsef(t, 0.7, d, 3, axis=1)

    def objective(x):
        return 0.5 * ((x - t) ** 2).sum((-1, -2)) + 0.7 * wgsef(norms_of(x), d, 3)

    rng = np.random.default_rng(0)
    moves = rng.standard_normal((1000, *t.shape)) * 10.0 ** rng.uniform(-6, 0, (1000, 1, 1))
    moves[::2] *= theta != 0  # half of them stay on the support
    assert (objective(theta + moves) >= objective(theta) - 1e-12).all()


def test_groups_left_fall_to_k_and_the_kept_are_shrunk_like_weight_decay():
    t, _ = groups(m=200, seed=5)
    left = [(norms_of(prox_wgsef(t, lam, 1.0, 20, axis=1)) > 0).sum() for lam in LAMBDAS]
    assert left[0] > left[2] > left[-1] == 20
    assert left == sorted(left, reverse=True)
    largest = norms_of(t).argmax()
    np.testing.assert_allclose(prox_wgsef(t, 1.0, 1.0, 20, axis=1)[largest], t[largest] / 2)


def test_ties_share_what_is_left():
    np.testing.assert_allclose(prox_wgsef(np.ones(6), 1.0, 1.0, 3), np.full(6, 0.5 / 1.5))
    assert wgsef(np.ones(6), 1.0, 3) == pytest.approx(6.0)


@pytest.mark.parametrize("values", ["gauss", "ties", "powers", "tiny", "huge", "geometric"])
@pytest.mark.parametrize("k", [1, 50, 499, 500])
def test_the_root_is_found_for_any_values(values, k):
    rng = np.random.default_rng(6)
    t = {
        "gauss": rng.standard_normal(500),
        "ties": rng.integers(1, 4, 500).astype(float),
        "powers": 10.0 ** rng.uniform(-150, 150, 500),
        "tiny": 1e-300 * rng.random(500),
        "huge": 1e150 * rng.random(500),
        "geometric": 1.01 ** np.arange(500.0),
    }[values][:, None]
    for lam in (1e-3, 1.0, 1e6):
        unit = np.abs(t).max()
        theta = prox_wgsef(t, lam, 1.0, k, axis=1) / unit
        np.testing.assert_allclose(theta, bisected(t / unit, lam, np.ones(500), k), rtol=1e-7, atol=1e-13)


def test_sorting_on_other_devices_finds_the_same_root():
    t, d = groups(m=300, seed=7, zeros=40)
    n = torch.tensor(np.stack([norms_of(t), norms_of(t[::-1]), np.ones(300), np.zeros(300)]))
    for lam, k in itertools.product(LAMBDAS, [1, 30, 259]):
        ours = shrinkage(n, lam, torch.tensor(d), k)
        a, c = torch.tensor(d).sqrt() * n, lam * torch.tensor(d)
        r = sorted_roots(a, c, k)
        u = torch.where(torch.isinf(r), 1.0, r * a - c).clamp(0, 1)
        torch.testing.assert_close(u / (u + c), ours, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_it_is_differentiable(lam):
    t, d = groups(seed=8)
    point = torch.tensor(t, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: prox_wgsef(x, lam, d, 4, axis=1), point)
    assert torch.autograd.gradcheck(lambda x: wgsef(torch.linalg.vector_norm(x, dim=1), d, 4), point)
    assert torch.autograd.gradcheck(lambda x: conjugate(torch.linalg.vector_norm(x, dim=1), d, 4), point)
    torch.testing.assert_close(
        prox_wgsef(point, lam, d, 4, axis=1).detach(), prox_wgsef(point.detach(), lam, d, 4, axis=1)
    )


def test_batches_axes_and_types():
    rng = np.random.default_rng(9)
    weight = rng.standard_normal((5, 8, 3, 2)).astype(np.float32)
    whole = prox_wgsef(weight, 0.5, 1.0, 3, axis=(-1, 2))
    assert whole.dtype == np.float32
    for one, given in zip(whole, weight, strict=True):
        np.testing.assert_allclose(one.reshape(8, 6), prox_wgsef(given.reshape(8, 6), 0.5, 1.0, 3, axis=1), rtol=1e-6)
    tensor = prox_wgsef(torch.tensor(weight), 0.5, 1.0, 3, axis=(2, 3))
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), whole)
    half = torch.tensor(weight, dtype=torch.float16)
    assert prox_wgsef(half, 0.5, 1.0, 3, axis=(2, 3)).dtype == torch.float16
    np.testing.assert_array_equal(prox_wgsef(weight, 0.0, 1.0, 2), weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"t": np.array([1.0, np.nan])}, ValueError, "t must be finite"),
        ({"t": np.array([1, 2])}, TypeError, "t must be of floating point"),
        ({"t": [1.0, 2.0]}, TypeError, "t must be a NumPy array or a tensor, got list"),
        ({"t": np.array(1.0)}, ValueError, "at least one group"),
        ({"lam": -1.0}, ValueError, "lam must be at least 0"),
        ({"lam": np.inf}, ValueError, "lam must be"),
        ({"d": 0.0}, ValueError, "d must be above 0"),
        ({"d": np.array([1.0, -1.0])}, ValueError, "d must be above 0, got -1.0"),
        ({"d": np.ones(3)}, ValueError, r"d must be a number or of shape \(2,\)"),
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": 3}, ValueError, "k must be at least 1 and at most 2, got 3"),
        ({"k": 1.5}, TypeError, "k must be an integer"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        prox_wgsef(**({"t": np.ones(2), "lam": 1.0, "d": 1.0, "k": 1} | change))


# --------------------------------------------------------------------------------------------------------------------
# Groups of a module


def perceptron(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 3))


def test_neurons_are_rows_with_their_biases_and_outputs_are_left_out():
    model = perceptron()
    spec = GroupSpec.from_module(model, "neuron")
    assert [(family.name, family.size) for family in spec.families] == [("0", 20), ("2", 10)]
    assert "output" in spec.left_out["4"]
    expected = torch.cat([model[0].weight, model[0].bias[:, None]], 1).norm(dim=1)
    torch.testing.assert_close(spec.norms()[0], expected)
    assert GroupSpec.from_module(model, "neuron", exclude="0").families[0].name == "2"
    assert len(GroupSpec.from_module(model, "weight", include="2")) == 200
    blocks = GroupSpec.from_module(model, "block", include=["0", "2"])
    torch.testing.assert_close(blocks.norms()[1][0], torch.cat([p.flatten() for p in model[2].parameters()]).norm())


def test_index_sets_are_groups_of_any_entries():
    model = perceptron()
    sets = [{"0.weight": [0, 7], "0.bias": [3]}, {"2.weight": np.arange(5)}]
    spec = GroupSpec.from_index_sets(model, sets)
    flat = model[0].weight.detach().flatten()
    torch.testing.assert_close(spec.norms()[0][0], torch.stack([flat[0], flat[7], model[0].bias[3]]).norm())
    before = copy.deepcopy(model)
    harden(model, spec, 1)
    gone = int(spec.norms()[0].argmin())
    changed = {
        n: (p != q).nonzero().shape[0] for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True)
    }
    assert changed == {n: len(sets[gone].get(n, ())) for n in changed}


def test_groups_that_overlap_or_miss_are_refused():
    model = perceptron()
    with pytest.raises(ValueError, match=r"entry 7 of 0.weight belongs to group 1 of index sets and to another"):
        GroupSpec.from_index_sets(model, [{"0.weight": [0, 7]}, {"0.weight": [3, 7]}])
    with pytest.raises(ValueError, match="index 120 is outside"):
        GroupSpec.from_index_sets(model, [{"0.weight": [120]}])
    with pytest.raises(TypeError, match="integer positions"):
        GroupSpec.from_index_sets(model, [{"0.weight": [0.5]}])
    with pytest.warns(UserWarning, match="1 empty groups"):
        GroupSpec.from_index_sets(model, [{"0.weight": []}, {"0.weight": [1]}])
    spec = GroupSpec.from_module(model, "neuron")
    rows = [GroupSpec.from_module(model, kind, include="0").families[0] for kind in ("neuron", "weight")]
    with pytest.raises(ValueError, match=r"disjoint: entry 0 of 0\.weight"):
        GroupSpec(model, rows)
    with pytest.raises(ValueError, match="kind must be one of"):
        GroupSpec.from_module(model, "rows")
    with pytest.raises(ValueError, match='kind="block" needs include'):
        GroupSpec.from_module(model, "block")
    with pytest.raises(ValueError, match="nothing to group"):
        GroupSpec.from_module(model, "filter")
    for k, error in ((0, ValueError), (31, ValueError), (1.5, ValueError), ("3", TypeError), ({"0": 2}, ValueError)):
        with pytest.raises(error, match="k"):
            harden(model, spec, k)


def test_hardening_keeps_the_largest_of_each_budget_and_breaks_ties_by_order():
    model = perceptron()
    spec = GroupSpec.from_module(model, "neuron")
    largest = spec.norms()[0].topk(5).indices.sort().values
    report = harden(model, spec, {"0": 5, "2": 0.3})
    assert report.kept == {"0": 5, "2": 3}
    assert report.weights_total == 20 * 7 + 10 * 21
    assert report.weights_kept == 5 * 7 + 3 * 21
    assert "8 of 30 groups" in str(report)
    assert torch.equal(spec.norms()[0].nonzero()[:, 0], largest)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    assert harden(model, spec, 2).kept == {"0": 2, "2": 2}
    assert spec.norms()[0].nonzero()[:, 0].tolist() == [0, 1]
    with pytest.warns(UserWarning, match="no group of 0 is left"):
        assert harden(model, spec, 2, scope="global").kept == {"0": 0, "2": 2}


# --------------------------------------------------------------------------------------------------------------------
# Penalties


@pytest.mark.parametrize("scope", ["global", "family"])
@pytest.mark.parametrize("weights", ["one", "size", "1/size"])
def test_the_step_on_a_module_is_the_operator_on_its_groups(scope, weights):
    model = perceptron()
    spec = GroupSpec.from_module(model, "neuron")
    reg = GroupEnvelope(spec, k=4, lam=3.0, weights=weights, scope=scope)
    power = {"one": 0, "size": 1, "1/size": -1}[weights]
    before = [norms.detach().double() for norms in spec.norms()]
    d = [torch.full((20,), 7.0).double() ** power, torch.full((10,), 21.0).double() ** power]
    if scope == "global":
        expected = prox_wgsef(torch.cat(before), 0.3, torch.cat(d), 4)
        value = 3.0 * wgsef(torch.cat(before), torch.cat(d), 4)
    else:
        expected = torch.cat([prox_wgsef(n, 0.3, w, 4) for n, w in zip(before, d, strict=True)])
        value = 3.0 * sum(wgsef(n, w, 4) for n, w in zip(before, d, strict=True))
    assert float(reg.value().detach()) == pytest.approx(float(value), rel=1e-6)
    reg.prox_(0.1)
    torch.testing.assert_close(torch.cat(spec.norms()).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [GroupEnvelope, GroupLasso])
def test_slopes_are_the_gradient_of_the_penalty_and_steps_are_implicit(make):
    model = perceptron().double()
    spec = GroupSpec.from_module(model, "neuron")
    reg = make(spec, k=12, lam=0.7, scope="global")
    reg.value().backward()
    for family, slope in zip(spec.families, reg.slopes(), strict=True):
        for member in family.members:
            parameter = model.get_parameter(member.parameter)
            torch.testing.assert_close(parameter.grad, member.spread(slope, parameter, 0.0) * parameter.detach())
    # theta = t - lr * gradient at theta, on groups that are left
    before = copy.deepcopy(model)
    reg.prox_(0.1)
    for family, slope, norms in zip(spec.families, reg.slopes(), spec.norms(), strict=True):
        for member in family.members:
            new, old = model.get_parameter(member.parameter), before.get_parameter(member.parameter)
            undone = new + 0.1 * member.spread(slope, new, 0.0) * new
            alive = member.spread((norms > 0).double(), new, 0.0)
            torch.testing.assert_close(undone * alive, old * alive)


def test_frozen_groups_stay_zero_and_the_others_are_free():
    model = perceptron()
    spec = GroupSpec.from_module(model, "neuron")
    reg = GroupEnvelope(spec, k=0.5, lam=1.0)
    harden(model, spec, 0.5)
    reg.freeze()
    before = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    reg.prox_(0.1)
    alive = spec.norms()[0] > 0
    torch.testing.assert_close(model[0].weight[alive], before[0].weight[alive] + 1.0)
    assert not model[0].weight[~alive].any()
    assert reg.frozen
    reg.thaw()
    assert not reg.frozen


def test_bad_penalties_and_parameters_are_refused():
    model = perceptron()
    spec = GroupSpec.from_module(model, "neuron")
    with pytest.raises(ValueError, match="lam must be at least 0"):
        GroupEnvelope(spec, 3, -1.0)
    with pytest.raises(ValueError, match="weights must be one of"):
        GroupEnvelope(spec, 3, 1.0, weights="sizes")
    with pytest.raises(ValueError, match="one vector for each family"):
        GroupEnvelope(spec, 3, 1.0, weights=[torch.ones(3)])
    with pytest.raises(ValueError, match="positive and finite"):
        GroupEnvelope(spec, 3, 1.0, weights=[torch.ones(20), -torch.ones(10)])
    reg = GroupEnvelope(spec, 3, 1.0)
    with pytest.raises(ValueError, match="lr must be at least 0"):
        reg.prox_(-0.1)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="parameters of 0 are not finite"):
        reg.prox_(0.1)


# --------------------------------------------------------------------------------------------------------------------
# Optimisers and the ramp


def penalties(params, lam):
    """One penalty for each tensor of two dimensions, every row a group."""
    params = [p for entry in params for p in (entry["params"] if isinstance(entry, dict) else [entry])]
    matrices = [p for p in params if p.ndim == 2 and p.requires_grad]
    regs = []
    for matrix in matrices:
        holder = nn.ParameterList([matrix])
        width = matrix.shape[1]
        sets = [{"0": np.arange(width) + width * row} for row in range(len(matrix))]
        regs.append(GroupEnvelope(GroupSpec.from_index_sets(holder, sets), k=0.9, lam=lam))
    return regs


@pytest.mark.parametrize("make", [ProxSGD, ProxAdam, HSPG], ids=lambda cls: cls.__name__)
def test_contract(make):
    def made(params):
        params = list(params)
        options = {"prox_steps": 3} if make is HSPG else {}
        return make(params, penalties(params, 1e-3), lr=0.02, **options)

    check_optimizer(made)


def test_proximal_sgd_reaches_the_minimum_of_loss_plus_penalty():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((80, 12)), rng.standard_normal(80)
    layer = nn.Linear(12, 1, bias=False).double()
    spec = GroupSpec.from_index_sets(layer, [{"weight": [2 * j, 2 * j + 1]} for j in range(6)])
    optimizer = ProxSGD(layer.parameters(), GroupEnvelope(spec, k=2, lam=0.2), lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        (0.5 * (layer(torch.tensor(X))[:, 0] - torch.tensor(y)).square().mean()).backward()
        optimizer.step()
    model = KGroupRegressor(k=2, lam=0.2, groups=np.arange(12) // 2, fit_intercept=False, tol=1e-14).fit(X, y)
    np.testing.assert_allclose(layer.weight.detach().numpy()[0], model.coef_, atol=1e-8)


def test_half_space_steps_remove_groups_until_k_and_revive_none():
    model = perceptron()
    spec = GroupSpec.from_module(model, "neuron")
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    optimizer = HSPG(model.parameters(), GroupEnvelope(spec, k=10, lam=0.5, scope="global"), lr=0.05, prox_steps=5)
    left = []
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        left.append(spec.sparsity().groups)
    assert left[5:] == sorted(left[5:], reverse=True)
    assert left[-1] <= 10 < left[5]
    reached = next(i for i, count in enumerate(left) if count <= 10)
    assert left[reached:] == [left[reached]] * len(left[reached:])


def test_optimisers_refuse_what_they_cannot_do():
    model = perceptron()
    reg = GroupEnvelope(GroupSpec.from_module(model, "neuron"), k=5, lam=1.0)
    with pytest.raises(ValueError, match=r"it lacks 2\.weight"):
        ProxSGD(model[0].parameters(), reg)
    with pytest.raises(ValueError, match="one learning rate"):
        ProxSGD([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}], reg)
    with pytest.raises(TypeError, match="group penalties, got float"):
        ProxSGD(model.parameters(), [0.1])
    with pytest.raises(ValueError, match="lr must be at least 0, got nan"):
        ProxSGD(model.parameters(), reg, lr=float("nan"))
    with pytest.raises(ValueError, match="eps must be finite"):
        ProxAdam(model.parameters(), reg, eps=float("inf"))
    with pytest.raises(ValueError, match="epsilon must be at least 0 and below 1"):
        HSPG(model.parameters(), reg, epsilon=1.0)


def ramped(seed=0, epochs=24, stop=None, state=None):
    model = perceptron(seed)
    spec = GroupSpec.from_module(model, "neuron")
    reg = GroupEnvelope(spec, k=10, lam=1.0, scope="global")
    ramp = SparsityRamp(reg, epochs, start=0.05)
    optimizer = ProxSGD(model.parameters(), reg, lr=0.05)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(128, 6, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    strengths = []
    for epoch in range(epochs):
        if epoch == stop:
            return model, optimizer.state_dict(), ramp.state_dict()
        if state is not None and epoch < state[0]:
            continue
        if state is not None and epoch == state[0]:
            model.load_state_dict(state[1].state_dict())
            optimizer.load_state_dict(state[2])
            ramp.load_state_dict(state[3])
        ramp.step(epoch)
        strengths.append(reg.lam)
        for batch in range(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch::8]), y[batch::8]).backward()
            optimizer.step()
    return model, strengths, ramp


def test_the_ramp_ends_with_exactly_k_groups_trained_without_penalty():
    _, strengths, ramp = ramped()
    assert ramp.frozen
    assert ramp.reg.frozen
    assert ramp.reg.sparsity().groups == 10
    assert ramp.before.groups >= 10
    rising = [lam for lam in strengths if lam > 0]
    assert strengths[:2] == [0.0, 0.0]
    assert rising == sorted(rising)
    assert strengths[2 + len(rising) :] == [0.0] * (24 - 2 - len(rising))
    assert 2 + len(rising) <= 0.6 * 24 + 1


def test_the_ramp_goes_on_from_a_checkpoint():
    whole, _, _ = ramped()
    for stop in (5, 20):
        model, optimizer_state, ramp_state = ramped(stop=stop)
        resumed, _, _ = ramped(state=(stop, model, optimizer_state, ramp_state))
        for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(one, other)


def test_bad_ramps_are_refused():
    reg = GroupEnvelope(GroupSpec.from_module(perceptron(), "neuron"), k=5, lam=1.0)
    for change, name in (
        ({"epochs": 2}, "epochs"),
        ({"start": 0.0}, "start"),
        ({"growth": 1.0}, "growth"),
        ({"until": 0.05}, "until"),
        ({"slack": -0.1}, "slack"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            SparsityRamp(reg, **({"epochs": 20} | change))


# --------------------------------------------------------------------------------------------------------------------
# Linear models


@parametrize_with_checks([KGroupRegressor(), KSupportRegressor(k=0.3)])
def test_estimators(estimator, check):
    check(estimator)


def regression(seed=0, n=60, p=20):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p)) + 3.0
    w = np.where(np.arange(p) < 6, 2.0, 0.0)
    return X, X @ w + rng.standard_normal(n) + 5.0


def test_all_groups_is_ridge_regression():
    X, y = regression()
    ours = KGroupRegressor(k=20, lam=0.3, tol=1e-14).fit(X, y)
    ridge = Ridge(alpha=0.3 * len(y)).fit(X, y)
    np.testing.assert_allclose(ours.coef_, ridge.coef_, atol=1e-6)
    assert ours.intercept_ == pytest.approx(ridge.intercept_, abs=1e-5)


def test_the_gap_bounds_the_distance_to_the_optimum_and_the_refit_has_k_groups():
    X, y = regression()
    labels = np.arange(20) // 2
    rough = KGroupRegressor(k=3, lam=0.5, groups=labels, tol=1e-2).fit(X, y)
    fine = KGroupRegressor(k=3, lam=0.5, groups=labels, tol=1e-13).fit(X, y)

    def objective(model):
        norms = np.sqrt(np.bincount(labels, model.coef_**2))
        return 0.5 * np.mean((y - model.predict(X)) ** 2) + 0.5 * wgsef(norms, 1.0, 3)

    assert 0.0 <= objective(rough) - objective(fine) <= rough.dual_gap_
    warm = KGroupRegressor(k=3, lam=0.5, groups=labels, tol=1e-2, warm_start=True)
    warm.coef_ = fine.coef_
    assert warm.fit(X, y).n_iter_ == 0
    refit = KGroupRegressor(k=3, lam=0.5, groups=labels, refit=True).fit(X, y)
    assert refit.groups_.tolist() == [0, 1, 2]
    columns = np.c_[np.ones(len(y)), X[:, :6]]
    np.testing.assert_allclose(refit.coef_[:6], np.linalg.lstsq(columns, y, rcond=None)[0][1:])


def test_bad_estimators_are_refused():
    X, y = regression()
    for change, message in (
        ({"k": 21}, "k must be"),
        ({"lam": 0.0}, "lam must be above 0"),
        ({"groups": np.zeros(3, dtype=int)}, "groups must be 20 integers"),
        ({"groups": np.full(20, 2)}, "without gaps"),
        ({"weights": np.zeros(20)}, "weights must be 20 positive numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            KGroupRegressor(**change).fit(X, y)
    with pytest.warns(ConvergenceWarning, match="stopped after 2 iterations with duality gap"):
        KGroupRegressor(max_iter=2, tol=1e-12).fit(X, y)
