"""Tests of SSO: the surrogate against closed forms, the bound it rests on, step rules, counters, state, bad inputs."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from optimizer_contract import check_optimizer
from workingpapers.optimization.target_surrogate import SSO, ArmijoGD, oracle_from_loss, weighted_squares
from workingpapers.optimization.target_surrogate.surrogate import Surrogate, squares


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def half_squares(z, y):
    return 0.5 * (z - y).square()


MSE = nn.MSELoss(reduction="none")
BCE = nn.BCEWithLogitsLoss(reduction="none")
CE = nn.CrossEntropyLoss(reduction="none")


def regression(n=40, d=6, outputs=2):
    X = torch.randn(n, d, generator=generator(1), dtype=torch.float64)
    y = torch.randn(n, outputs, generator=generator(2), dtype=torch.float64)
    W = nn.Parameter(0.3 * torch.randn(d, outputs, generator=generator(3), dtype=torch.float64))
    return X, y, W


def tumours():
    X, y = load_breast_cancer(return_X_y=True)
    X = torch.tensor((X - X.mean(0)) / X.std(0))
    return X, torch.tensor(y, dtype=torch.float64)[:, None]


def network(inputs=6, hidden=8, outputs=2, dtype=torch.float64, dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Linear(inputs, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, outputs)]
    return nn.Sequential(*layers).to(dtype)


def solved(params, lr, **options):
    """An optimiser that minimises each surrogate to rounding."""
    return SSO(params, lr=lr, inner="lbfgs", inner_steps=400, inner_tol=1e-12, **options)


# --------------------------------------------------------------------------------------------------------------------
# The surrogate, in closed form


def test_one_inner_step_of_fixed_length_is_gradient_descent():
    X, y, _ = regression()
    ours, theirs = network(), network()
    optimizer = SSO(ours.parameters(), lr=0.7, inner_steps=1, inner="sgd", inner_lr=0.3)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.3)
    for _ in range(5):
        optimizer.step(lambda: ours(X), oracle_from_loss(MSE, y))
        sgd.zero_grad()
        (MSE(theirs(X), y).sum() / len(X)).backward()
        sgd.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("inner", "steps", "atol"), [("lbfgs", 200, 1e-8), ("armijo", 300, 1e-5)])
def test_one_outer_step_solves_linear_least_squares(inner, steps, atol):
    X, y, W = regression()
    optimizer = SSO([W], lr=1.0, inner=inner, inner_steps=steps, inner_tol=1e-9)
    optimizer.step(lambda: X @ W, oracle_from_loss(half_squares, y))
    torch.testing.assert_close(W.detach(), torch.linalg.lstsq(X, y).solution, rtol=0, atol=atol)
    assert optimizer.oracle_calls == 1


@pytest.mark.parametrize("eta", [0.5, 4.0])
def test_a_linear_model_takes_the_projected_step_in_output_space(eta):
    X, y = tumours()
    X = X[:, 4:10]
    W = nn.Parameter(torch.zeros(6, 1, dtype=torch.float64))
    start = W.detach().clone()
    gradient = torch.sigmoid(X @ start) - y
    solved([W], eta).step(lambda: X @ W, oracle_from_loss(BCE, y))
    torch.testing.assert_close(W.detach(), start - eta * torch.linalg.pinv(X) @ gradient, rtol=0, atol=1e-8)


def test_curvature_as_weights_gives_newtons_method():
    X, y = tumours()
    X, y = X[:, 4:10], y + 0.2 * (0.5 - y)  # not separable
    W = nn.Parameter(torch.full((6, 1), 0.1, dtype=torch.float64))

    def curvature(z):
        p = torch.sigmoid(z)
        return p * (1 - p)

    optimizer = solved([W], 1.0, divergence=weighted_squares(curvature))
    for _ in range(3):
        theta = W.detach().clone()
        z = X @ theta
        newton = theta - torch.linalg.solve(X.T @ (curvature(z) * X), X.T @ (torch.sigmoid(z) - y))
        optimizer.step(lambda: X @ W, oracle_from_loss(BCE, y))
        torch.testing.assert_close(W.detach(), newton, rtol=0, atol=1e-7)


def test_kl_divergence_is_mirror_descent():
    y = torch.eye(3, dtype=torch.float64)[torch.tensor([0, 2, 1, 1])]
    logits = nn.Parameter(torch.randn(4, 3, generator=generator(), dtype=torch.float64))
    p = torch.softmax(logits.detach(), 1)
    solved([logits], 0.8, divergence="kl").step(lambda: torch.softmax(logits, 1), oracle_from_loss(half_squares, y))
    multiplied = p * torch.exp(-0.8 * (p - y))  # exponentiated gradient
    torch.testing.assert_close(torch.softmax(logits.detach(), 1), multiplied / multiplied.sum(1, keepdim=True))


def test_parameters_that_are_their_own_targets():
    theta = nn.Parameter(torch.randn(5, generator=generator(), dtype=torch.float64))
    start, y = theta.detach().clone(), torch.ones(5, dtype=torch.float64)
    solved([theta], 0.25).step(lambda: theta, oracle_from_loss(half_squares, y))
    torch.testing.assert_close(theta.detach(), start - 0.25 * (start - y), rtol=0, atol=1e-10)


def test_sum_instead_of_mean_only_rescales_the_inner_steps():
    X, y, W = regression()
    V = nn.Parameter(W.detach().clone())
    n = len(X)
    mean = SSO([W], lr=1.0, inner_steps=4, init_step=8.0, inner_tol=0.0)
    total = SSO([V], lr=1.0, inner_steps=4, init_step=8.0 / n, reduction="sum", inner_tol=0.0)
    for _ in range(3):
        mean.step(lambda: X @ W, oracle_from_loss(half_squares, y))
        total.step(lambda: X @ V, oracle_from_loss(half_squares, y))
    torch.testing.assert_close(V, W, rtol=1e-10, atol=1e-12)
    assert total.surrogate_value == pytest.approx(n * mean.surrogate_value)


def test_the_step_does_not_depend_on_the_batch_size():
    X, y, W = regression()
    V = nn.Parameter(W.detach().clone())
    SSO([W], lr=0.5, inner_steps=3).step(lambda: X @ W, oracle_from_loss(half_squares, y))
    twice = oracle_from_loss(half_squares, torch.cat([y, y]))
    SSO([V], lr=0.5, inner_steps=3).step(lambda: torch.cat([X, X]) @ V, twice)
    torch.testing.assert_close(V, W, rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# The bound

LOSSES = {
    "mse": (MSE, lambda n: torch.randn(n, 2, generator=generator(5), dtype=torch.float64)),
    "bce": (BCE, lambda n: torch.rand(n, 2, generator=generator(5), dtype=torch.float64)),
    "ce": (CE, lambda n: torch.randint(2, (n,), generator=generator(5))),
    "huber": (nn.HuberLoss("none", 0.7), lambda n: torch.randn(n, 2, generator=generator(5), dtype=torch.float64)),
    "smooth": (nn.SmoothL1Loss(reduction="none", beta=0.3), lambda n: torch.zeros(n, 2, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_known_smoothness_is_the_largest_curvature(name):
    loss, labels = LOSSES[name]
    y = labels(1)
    oracle = oracle_from_loss(loss, y)
    points = [torch.zeros(1, 2, dtype=torch.float64), y.double().expand(1, 2) + 0.1]
    points += list(2 * torch.randn(50, 1, 2, generator=generator(6), dtype=torch.float64))
    hessians = [torch.autograd.functional.hessian(lambda z: loss(z, y).sum(), z).reshape(2, 2) for z in points]
    largest = max(float(torch.linalg.eigvalsh(hessian).max()) for hessian in hessians)
    assert largest == pytest.approx(oracle.smoothness, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_surrogate_lies_above_the_loss_at_one_over_l_and_not_at_a_longer_step(name):
    loss, labels = LOSSES[name]
    n = 30
    X, y = torch.randn(n, 6, generator=generator(7), dtype=torch.float64), labels(n)
    model, oracle = network(), oracle_from_loss(loss, y)
    with torch.no_grad():
        z = model(X)
        start = [p.clone() for p in model.parameters()]
    value, gradient = oracle(z)

    def gaps(eta):
        """g_t(theta) - h(theta) at parameters near and far."""
        found = []
        for spread in (0.0, 1e-3, 0.1, 1.0, 3.0):
            with torch.no_grad():
                for p, p_start in zip(model.parameters(), start, strict=True):
                    p.copy_(p_start + spread * torch.randn(p.shape, generator=generator(8), dtype=p.dtype))
                f = model(X)
                surrogate = Surrogate(lambda f=f: f, f, z, gradient, eta, squares, 1 / n, None)
                found.append(value + float(surrogate()) - oracle.loss(f))
        return np.array(found)

    touching, *others = gaps(1 / oracle.smoothness)
    assert touching == pytest.approx(0.0, abs=1e-15)
    assert min(others) >= -1e-14
    assert gaps(8 / oracle.smoothness).min() < -1e-10


def losses_along(optimizer, targets, oracle, steps):
    values = [optimizer.step(targets, oracle) for _ in range(steps)]
    with torch.no_grad():
        return np.array([*values, oracle.loss(targets())])


@pytest.mark.parametrize("inner", ["armijo", "lbfgs"])
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_full_batches_never_raise_the_loss(inner, steps):
    X, y = tumours()
    model, oracle = network(30, 8, 1), oracle_from_loss(BCE, y)
    optimizer = SSO(model.parameters(), inner_steps=steps, inner=inner)  # lr="auto"
    values = losses_along(optimizer, lambda: model(X), oracle, 25)
    assert np.diff(values).max() <= 1e-12
    assert values[-1] < 0.5 * values[0]
    assert optimizer.eta == 4.0
    assert values[0] == oracle.loss(network(30, 8, 1)(X).detach())
    if inner == "armijo":  # and the decrease of the surrogate bounds the one of the loss
        assert values[-1] <= optimizer.surrogate_value + 1e-12


def test_a_step_beyond_two_over_l_raises_the_loss():
    """Least squares solved in every outer step: the part of the residual in the range of X is multiplied by 1 - eta."""
    X, y, W = regression()
    best = torch.linalg.lstsq(X, y).solution
    oracle = oracle_from_loss(half_squares, y, smoothness=1.0)
    for eta in (0.5, 1.9, 2.5):
        with torch.no_grad():
            W.copy_(best + 1.0)
        values = losses_along(solved([W], eta), lambda: X @ W, oracle, 6) - oracle.loss(X @ best)
        np.testing.assert_allclose(values[1:] / values[:-1], (1 - eta) ** 2, rtol=1e-5)
        assert (np.diff(values) > 0).all() == (eta > 2)


def test_a_longer_step_raises_the_logistic_loss_that_one_over_l_decreases():
    X, y = tumours()
    rises = {}
    for eta in (4.0, 1024.0):
        W = nn.Parameter(torch.zeros(30, 1, dtype=torch.float64))
        rises[eta] = np.diff(losses_along(SSO([W], eta, inner_steps=30), lambda: X @ W, oracle_from_loss(BCE, y), 10))  # noqa: B023
    assert rises[4.0].max() < 0 < rises[1024.0].max()


def test_more_inner_steps_need_fewer_oracle_calls():
    X, y, W = regression()
    start = W.detach().clone()
    gaps = {}
    for m in (1, 10):
        with torch.no_grad():
            W.copy_(start)
        oracle = oracle_from_loss(half_squares, y)
        gaps[m] = losses_along(SSO([W], 1.0, inner_steps=m), lambda: X @ W, oracle, 5)[-1]
    best = oracle.loss(X @ torch.linalg.lstsq(X, y).solution)
    assert gaps[10] - best < 0.01 * (gaps[1] - best)


# --------------------------------------------------------------------------------------------------------------------
# Rules for eta


def etas(rule, lr=2.0, steps=6, loss=half_squares, **options):
    X, y, W = regression()
    optimizer, found = SSO([W], lr, rule, inner_steps=2, **options), []
    gradients = []
    for _ in range(steps):
        gradients.append(float((X @ W.detach() - y).square().sum()))
        optimizer.step(lambda: X @ W, oracle_from_loss(loss, y))
        found.append(optimizer.eta)
    return np.array(found), np.array(gradients), optimizer


def test_rules():
    t = np.arange(1, 7)
    np.testing.assert_allclose(etas("constant")[0], 2.0)
    np.testing.assert_allclose(etas("sqrt")[0], 2.0 / np.sqrt(t))
    np.testing.assert_allclose(etas("exp", total_steps=6)[0], 2.0 * (1 / 6) ** (t / 6))
    found, gradients, optimizer = etas("adagrad")
    np.testing.assert_allclose(found, 2.0 / (np.sqrt(np.cumsum(gradients)) + 1e-6))
    assert optimizer.gradient_squares == pytest.approx(gradients.sum())


@pytest.mark.parametrize("lr", [0.01, 1.0, 300.0])
def test_the_line_search_finds_one_over_l(lr):
    found, _, optimizer = etas("line_search", lr=lr, steps=12, loss=MSE)
    assert (found[8:] <= 0.5 * (1 + 1e-9)).all()
    assert (found[8:] > 0.9 * 0.5).all()
    assert optimizer.oracle_calls == 12
    assert 12 < optimizer.loss_evaluations < 12 * 8 + 100


def test_schedulers_act_on_the_target_step():
    X, y, W = regression()
    optimizer = SSO([W], lr=1.0, inner_steps=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 2)
    found = []
    for _ in range(3):
        before = W.detach().clone()
        optimizer.step(lambda: X @ W, oracle_from_loss(half_squares, y))
        schedule.step()
        found.append(optimizer.eta)
    assert found == [1.0, 0.5, 0.0]
    assert torch.equal(before, W)


# --------------------------------------------------------------------------------------------------------------------
# Counting, randomness, the caller's data


class Counted:
    """An oracle of some black box: NumPy in and out, no value, no smoothness."""

    def __init__(self, y):
        self.y, self.calls = y.numpy(), 0

    def __call__(self, z):
        self.calls += 1
        gradient = z.numpy() - self.y
        z.zero_()  # what it does with its copy is its own business
        return None, gradient


@pytest.mark.parametrize("inner", ["armijo", "sgd", "adam", "lbfgs"])
def test_one_oracle_call_for_each_outer_step(inner):
    X, y, _ = regression()
    model, oracle, passes = network(), Counted(y), []

    def targets():
        passes.append(1)
        return model(X)

    before = float(half_squares(model(X), y).mean().detach())
    optimizer = SSO(model.parameters(), 1.0, inner_steps=5, inner=inner, inner_lr=0.02)
    for _ in range(4):
        assert optimizer.step(targets, oracle) is None
    assert optimizer.oracle_calls == oracle.calls == 4
    assert optimizer.inner_steps_done == 20
    assert optimizer.surrogate_evaluations == len(passes) >= 20
    assert optimizer.loss_evaluations == 0
    assert optimizer.surrogate_value < 0  # of g_t - l(z_t)
    assert float(half_squares(model(X), y).mean().detach()) < before


def test_gradients_and_other_modules_stay_as_they_are():
    X, y, _ = regression()
    body, head = network(outputs=4), nn.Linear(4, 2).double()
    body[0].requires_grad_(False)
    held = torch.ones_like(body[3].bias)
    body[3].bias.grad = held
    kept = copy.deepcopy((body[0], head))
    spare = nn.Parameter(torch.ones(3))  # belongs to the optimiser and not to the model
    optimizer = SSO([*body.parameters(), spare], 1.0, inner="adam")
    optimizer.step(lambda: head(body(X)), oracle_from_loss(half_squares, y))
    assert body[3].bias.grad is held
    assert (held == 1).all()
    assert body[3].weight.grad is None
    assert head.weight.grad is None
    for module, before in zip((body[0], head), kept, strict=True):
        assert torch.equal(module.weight, before.weight)
    assert (spare == 1).all()


def test_random_models_are_refused_or_replayed():
    X, y, _ = regression()
    model = network(dropout=0.5)
    oracle, masks = Counted(y), []
    model[2].register_forward_hook(lambda module, inputs, outputs: masks.append(outputs == 0))
    with pytest.raises(ValueError, match="draws random numbers"):
        SSO(model.parameters(), 1.0).step(lambda: model(X), oracle)
    assert oracle.calls == 0
    SSO(model.eval().parameters(), 1.0).step(lambda: model(X), oracle)

    model.train()
    masks.clear()
    torch.manual_seed(3)
    model(X)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    SSO(model.parameters(), 1.0, inner_steps=4, strict=False).step(lambda: model(X), oracle)
    assert len(masks) > 5
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert torch.equal(torch.get_rng_state(), after)  # as after one forward pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", ["armijo", "sgd", "adam", "lbfgs"])
def test_types(dtype, inner):
    X, y, _ = regression()
    model = network(dtype=dtype)
    X, oracle = X.to(dtype), oracle_from_loss(MSE, y.float())
    optimizer = SSO(model.parameters(), inner=inner, inner_lr=0.03)
    first = optimizer.step(lambda: model(X), oracle)
    for _ in range(5):
        last = optimizer.step(lambda: model(X), oracle)
    assert last < 0.95 * first
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())


def test_features_of_any_scale_are_trained():
    X, y = load_breast_cancer(return_X_y=True)
    X, y = torch.tensor(X), torch.tensor(y, dtype=torch.float64)[:, None]  # up to 4000
    W = nn.Parameter(torch.zeros(30, 1, dtype=torch.float64))
    values = losses_along(SSO([W], inner_steps=20), lambda: X @ W, oracle_from_loss(BCE, y), 10)
    assert np.diff(values).max() <= 0
    assert values[-1] < 0.7 * values[0]


# --------------------------------------------------------------------------------------------------------------------
# State


def train(model, optimizer, steps):
    X, y, _ = regression()
    for step in steps:
        rows = slice(8 * (step % 5), 8 * (step % 5) + 8)
        optimizer.step(lambda rows=rows: model(X[rows]), oracle_from_loss(MSE, y[rows]))


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "sqrt"},
        {"rule": "exp", "total_steps": 8, "inner": "lbfgs"},
        {"rule": "line_search", "batches_per_epoch": 5},
        {"rule": "adagrad", "inner": "adam"},
        {"inner": "sgd", "inner_lr": 0.1},
    ],
)
def test_continues_from_its_state_to_the_same_bits(options):
    make = lambda model: SSO(model.parameters(), 0.5, inner_steps=3, **options)  # noqa: E731
    whole, half = network(), network()
    straight, interrupted = make(whole), make(half)
    train(whole, straight, range(8))
    train(half, interrupted, range(4))
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    resumed_model = copy.deepcopy(half)
    resumed = make(resumed_model)
    resumed.load_state_dict(torch.load(file))
    train(resumed_model, resumed, range(4, 8))
    copied_model, copied = pickle.loads(pickle.dumps((half, interrupted)))
    train(copied_model, copied, range(4, 8))
    for model, optimizer in ((resumed_model, resumed), (copied_model, copied)):
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters(), strict=True))
        assert optimizer.state_dict()["kept"] == straight.state_dict()["kept"]


def test_states_of_others_are_refused():
    W = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="not that of SSO"):
        SSO([W]).load_state_dict(torch.optim.SGD([W]).state_dict())
    with pytest.raises(ValueError, match="same inner solver"):
        SSO([W]).load_state_dict(SSO([W], inner="adam").state_dict())


def test_groups():
    X, y, _ = regression()
    model = network()
    groups = [{"params": model[0].parameters(), "inner_lr": 0.0}, {"params": [model[3].weight]}]
    for inner in ("sgd", "adam"):
        optimizer = SSO(groups, 1.0, inner=inner, inner_lr=0.01)
        optimizer.add_param_group({"params": [model[3].bias]})
        before = copy.deepcopy(model)
        optimizer.step(lambda: model(X), oracle_from_loss(half_squares, y))
        assert torch.equal(model[0].weight, before[0].weight)
        assert not torch.equal(model[3].weight, before[3].weight)
        assert not torch.equal(model[3].bias, before[3].bias)
    with pytest.raises(ValueError, match=r"1.0 for all groups, got 2.0: set inner_lr"):
        optimizer.add_param_group({"params": [torch.ones(1)], "lr": 2.0})


# --------------------------------------------------------------------------------------------------------------------
# ArmijoGD


def test_armijo_keeps_the_contract_of_optimisers():
    check_optimizer(lambda params: ArmijoGD(params), needs_closure=True, learning_rate=False)


@pytest.mark.parametrize("shrink", [(0.1, 0.9), (0.9, 0.9)])
@pytest.mark.parametrize("separate", [True, False])
def test_armijo_decreases_enough_at_every_step(shrink, separate):
    X, y = tumours()
    W = nn.Parameter(torch.zeros(30, 1, dtype=torch.float64))
    optimizer = ArmijoGD([W], 7.0, c=0.3, growth=1.7, shrink=shrink)
    loss = lambda: BCE(X @ W, y).mean()  # noqa: E731

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(15):
        last, start = optimizer.step_size, W.detach().clone()
        before = float(optimizer.step(closure, loss if separate else None).detach())
        step, gradient = optimizer.step_size, W.grad
        torch.testing.assert_close(W.detach(), start - step * gradient)
        assert float(loss().detach()) <= before - 0.3 * step * float(gradient.square().sum())
        if shrink == (0.9, 0.9):
            refusals = np.log(step / (1.7 * last)) / np.log(0.9)
            assert refusals == pytest.approx(round(refusals), abs=1e-9)
            assert refusals >= -1e-9
    assert not optimizer.stalled
    assert optimizer.evaluations >= 15


def test_armijo_on_batches_is_the_published_stochastic_line_search():
    """Against the rule written out: double per epoch, shrink by 0.9."""
    X, y = tumours()
    W = nn.Parameter(torch.zeros(30, 1, dtype=torch.float64))
    V, step, growth = torch.zeros(30, 1, dtype=torch.float64), 1.0, 2 ** (1 / 4)
    optimizer = ArmijoGD([W], 1.0, growth=growth, shrink=(0.9, 0.9))
    for rows in list(torch.arange(568).view(4, 142)) * 3:
        loss = lambda at, rows=rows: BCE(X[rows] @ at, y[rows]).mean()  # noqa: E731

        def closure(loss=loss):
            optimizer.zero_grad()
            value = loss(W)
            value.backward()
            return value

        optimizer.step(closure, lambda loss=loss: loss(W))
        at = V.clone().requires_grad_()
        value = loss(at)
        (gradient,) = torch.autograd.grad(value, at)
        step *= growth
        while loss(V - step * gradient) > value - 0.1 * step * gradient.square().sum():
            step *= 0.9
        V -= step * gradient
    torch.testing.assert_close(W.detach(), V, rtol=1e-10, atol=1e-12)


def test_armijo_stalls_rather_than_moves_at_a_minimum_or_along_a_wrong_gradient():
    w = nn.Parameter(torch.zeros(2))
    optimizer = ArmijoGD([w], tol=1e-3)

    def closure(slope):
        optimizer.zero_grad()
        w.grad = torch.full((2,), slope)
        return 1.0 - w.detach().sum()  # falls along +1

    assert float(optimizer.step(lambda: closure(1e-4))) == 1.0
    assert optimizer.stalled
    assert optimizer.evaluations == 0
    optimizer.step(lambda: closure(1.0))
    assert optimizer.stalled
    assert optimizer.step_size == 1.0
    assert (w == 0).all()
    optimizer.step(lambda: closure(-1.0))
    assert not optimizer.stalled
    assert (w > 0).all()


# --------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr must be above 0, got 0.0"),
        ({"lr": float("nan")}, ValueError, "lr must be above 0, got nan"),
        ({"lr": "fast"}, TypeError, "lr must be a number, got 'fast'"),
        ({"rule": "cosine"}, ValueError, "rule must be one of 'constant', .*got 'cosine'"),
        ({"rule": "exp"}, ValueError, "total_steps is needed by rule='exp'"),
        ({"total_steps": 0}, ValueError, "total_steps must be at least 1, got 0"),
        ({"inner_steps": 0}, ValueError, "inner_steps must be at least 1, got 0"),
        ({"inner_steps": 2.5}, TypeError, "inner_steps must be an integer"),
        ({"inner": "newton"}, ValueError, "inner must be one of"),
        ({"inner_lr": -1.0}, ValueError, "inner_lr must be above 0"),
        ({"inner_tol": -1.0}, ValueError, "inner_tol must be at least 0"),
        ({"divergence": "l1"}, ValueError, "divergence must be one of 'l2', 'kl', got 'l1'"),
        ({"reduction": "none"}, ValueError, "reduction must be one of"),
        ({"batches_per_epoch": 0}, ValueError, "batches_per_epoch must be at least 1"),
        ({"init_step": float("inf")}, ValueError, "init_step must be above 0, got inf"),
        ({"shrink": 0.9}, TypeError, "shrink must be a pair"),
        ({"shrink": (0.9, 0.5)}, ValueError, r"shrink\[0\] must be above 0 and at most 0.5"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        SSO([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_step": 0.0}, "init_step must be above 0"),
        ({"c": 1.0}, "c must be above 0 and below 1"),
        ({"growth": 0.5}, "growth must be at least 1"),
        ({"tol": -1.0}, "tol must be at least 0"),
    ],
)
def test_bad_options_of_armijo_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ArmijoGD([nn.Parameter(torch.ones(2))], **options)


W0 = torch.ones(3, 2)
NAN = torch.full((4, 2), torch.nan)


@pytest.mark.parametrize(
    ("targets", "oracle", "error", "message"),
    [
        (lambda W: (X0 @ W).detach(), None, ValueError, "must depend on the parameters"),
        (lambda W: (X0 @ W).tolist(), None, TypeError, "must return a tensor of real numbers, got list"),
        (lambda W: (X0 @ W).sum(), None, ValueError, r"shape \(n, ...\), n >= 1, got shape \(\)"),
        (lambda W: X0[:0] @ W, None, ValueError, r"got shape \(0, 2\)"),
        (lambda W: X0 @ W / 0, None, ValueError, r"targets\(\) must be finite"),
        (lambda W: X0 @ W, lambda z: z, TypeError, "oracle must return a pair"),
        (lambda W: X0 @ W, lambda z: (0.0, z[:2]), ValueError, r"\(4, 2\), got \(2, 2\)"),
        (lambda W: X0 @ W, lambda z: (0.0, NAN), ValueError, "the oracle's gradient must be finite"),
        (lambda W: X0 @ W, lambda z: (float("inf"), z), ValueError, "the oracle's value must be finite, got inf"),
    ],
)
def test_bad_targets_and_answers_are_named_and_change_nothing(targets, oracle, error, message):
    W = nn.Parameter(W0.clone())
    optimizer = SSO([W], 1.0)
    with pytest.raises(error, match=message):
        optimizer.step(lambda: targets(W), oracle)
    assert torch.equal(W, W0)
    assert W.grad is None
    assert optimizer.eta is None
    assert optimizer.oracle_calls == (oracle is not None)


X0 = torch.randn(4, 3, generator=generator())


def test_what_a_rule_or_divergence_needs_is_said():
    W = nn.Parameter(W0.clone())
    step = lambda optimizer, oracle=lambda z: (None, z): optimizer.step(lambda: X0 @ W, oracle)  # noqa: E731
    with pytest.raises(ValueError, match="lr='auto' needs an oracle with an attribute smoothness"):
        step(SSO([W]))
    with pytest.raises(ValueError, match=r"needs an oracle with a method loss\(z\)"):
        step(SSO([W], 1.0, "line_search"))
    with pytest.raises(ValueError, match="must be positive for divergence='kl', got -"):
        step(SSO([W], 1.0, divergence="kl"))
    with pytest.raises(ValueError, match="divergence must be 0 at f = z, got"):
        step(SSO([W], 1.0, divergence=lambda f, z: f.square() + 1))
    with pytest.raises(ValueError, match="must depend on the parameters"):
        step(SSO([torch.ones(2, requires_grad=True)], 1.0))
    with pytest.raises(FloatingPointError, match="is inner_lr too large"):
        step(SSO([W], 1.0, inner="sgd", inner_lr=1e15))
    table = nn.Embedding(10, 4, sparse=True)
    with pytest.raises(RuntimeError, match="sparse"):
        SSO(table.parameters(), 1.0).step(lambda: table(torch.arange(3)), lambda z: (None, z))
    shapes = iter([4, 4, 3, 2])
    with pytest.raises(ValueError, match=r"keep its shape within a step, got \(3, 2\) after \(4, 2\)"):
        SSO([table.weight], 1.0).step(lambda: table.weight[: next(shapes), :2], lambda z: (None, z))


def test_losses_that_are_reduced_or_broadcast_are_refused():
    z = torch.zeros(5, 1)
    with pytest.raises(ValueError, match="reduction='none', got reduction='mean'"):
        oracle_from_loss(nn.MSELoss(), z)
    with pytest.raises(ValueError, match=r"shape \(5, 1\) it returned \(\)"):
        oracle_from_loss(lambda z, y: (z - y).mean(), z)(z)
    with pytest.raises(ValueError, match=r"it returned \(5, 5\)"):
        oracle_from_loss(lambda z, y: (z - y).square(), torch.zeros(5))(z)
    with pytest.raises(TypeError, match="loss_fn must be callable"):
        oracle_from_loss(3.0, z)
    with pytest.raises(ValueError, match="smoothness must be above 0"):
        oracle_from_loss(half_squares, z, smoothness=0.0)
    assert oracle_from_loss(nn.CrossEntropyLoss(torch.ones(2), reduction="none"), z).smoothness is None
    assert oracle_from_loss(half_squares, z).smoothness is None
