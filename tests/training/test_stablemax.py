"""Tests of StableMax and OrthoGrad: losses, gradients, projections, the optimiser's contract, diagnostics, tasks."""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from workingpapers.training.stablemax import (
    GrokkingMonitor,
    OrthoGrad,
    StableMaxCrossEntropyLoss,
    log_stablemax,
    modular_dataset,
    nlm_cosine,
    softmax_collapse_fraction,
    sparse_parity,
    stablemax,
    stablemax_cross_entropy,
)

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def link(z):
    """g(x) = log s(x), of which StableMax is the softmax; away from 0, where its autograd slope is wrong."""
    return z.sign() * z.abs().log1p()


def logits_and_labels(shape=(50, 7), scale=5.0, seed=0, dtype=torch.float64):
    z = scale * torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    batch = shape[:1] + shape[2:] if len(shape) > 1 else ()
    return z.to(dtype).requires_grad_(), torch.randint(shape[min(1, len(shape) - 1)], batch, generator=generator(1))


# --------------------------------------------------------------------------------------------------------------------
# The loss


def test_probabilities_are_the_published_formula():
    z = torch.tensor([[3.0, 0.0, -1.0, -4.0]], dtype=torch.float64)
    s = torch.tensor([4.0, 1.0, 1 / 2, 1 / 5], dtype=torch.float64)
    torch.testing.assert_close(stablemax(z)[0], s / s.sum())
    torch.testing.assert_close(log_stablemax(z.T, dim=0).T[0], (s / s.sum()).log())
    assert not torch.allclose(stablemax(z + 1), stablemax(z))  # softmax would not notice


OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0, "reduction": "none"},
    {"weight": True},
    {"weight": True, "label_smoothing": 0.3},
    {"weight": True, "label_smoothing": 0.3, "reduction": "sum"},
    {"ignore_index": 2},
    {"ignore_index": 2, "label_smoothing": 0.2, "weight": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(7,), (50, 7), (6, 7, 4), (3, 7, 2, 5)], ids=str)
def test_it_is_a_drop_in_for_cross_entropy(shape, options):
    # StableMax is the softmax of log s, so torch's own loss of log s must agree in every option
    options = dict(options)
    if options.get("weight"):
        options["weight"] = torch.linspace(0.2, 2.0, 7, dtype=torch.float64)
    z, labels = logits_and_labels(shape)
    if shape == (7,):
        options.pop("ignore_index", None)
    ours = StableMaxCrossEntropyLoss(**options)(z, labels)
    torchs = nn.CrossEntropyLoss(**options)(link(z), labels)
    torch.testing.assert_close(ours, torchs)
    direction = torch.randn(ours.shape, generator=generator(2), dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z, direction)[0] for loss in (ours, torchs)))


@pytest.mark.parametrize("options", OPTIONS[:8], ids=str)
@pytest.mark.parametrize("shape", [(50, 7), (6, 7, 4)], ids=str)
def test_labels_may_be_probabilities(shape, options):
    options = dict(options)
    if options.get("weight"):
        options["weight"] = torch.linspace(0.2, 2.0, 7, dtype=torch.float64)
    z, labels = logits_and_labels(shape)
    target = torch.rand(shape, generator=generator(3), dtype=torch.float64)
    torch.testing.assert_close(
        StableMaxCrossEntropyLoss(**options)(z, target), nn.CrossEntropyLoss(**options)(link(z), target)
    )
    one_hot = functional.one_hot(labels, 7).movedim(-1, 1).double()
    if "weight" not in options:  # with weights "mean" divides by something else, in torch too
        torch.testing.assert_close(
            stablemax_cross_entropy(z, one_hot, **options), stablemax_cross_entropy(z, labels, **options)
        )


@pytest.mark.parametrize("labels", ["indices", "smoothed", "probabilities"])
def test_first_and_second_derivatives(labels):
    z, indices = logits_and_labels((4, 5), scale=2.0)
    options = {"label_smoothing": 0.1} if labels == "smoothed" else {}
    target = torch.rand(4, 5, dtype=torch.float64) if labels == "probabilities" else indices

    def loss(z):
        return stablemax_cross_entropy(z, target, reduction="none", **options)

    assert torch.autograd.gradcheck(loss, z)
    assert torch.autograd.gradgradcheck(loss, z)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_layer_of_zeros_learns(dtype, smoothing):
    z = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
    labels = torch.tensor([0, 3])
    loss = stablemax_cross_entropy(z, labels, reduction="sum", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss, z)
    wanted = 1 / 4 - (1 - smoothing) * functional.one_hot(labels, 4) - smoothing / 4  # p - target, since g'(0) = 1
    torch.testing.assert_close(gradient, wanted.to(dtype))


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_mixed_second_derivatives_at_zero(smoothing):
    def loss(z):
        return stablemax_cross_entropy(z, torch.tensor(1), label_smoothing=smoothing)

    second = torch.autograd.functional.hessian(loss, torch.zeros(4, dtype=torch.float64))
    mixed = second[~torch.eye(4, dtype=torch.bool)]
    torch.testing.assert_close(mixed, torch.full_like(mixed, -1 / 16))  # -p_j p_k, since s and log s have slope 1


def test_gradient_is_finite_and_right_at_one_where_two_branches_would_give_nan():
    z = torch.tensor([[1.0, -1.0, 0.0]], requires_grad=True)  # s = 2, 1/2, 1
    (gradient,) = torch.autograd.grad(stablemax_cross_entropy(z, torch.tensor([0])), z)
    torch.testing.assert_close(gradient, torch.tensor([[-(1.5 / 3.5) / 2, (0.5 / 3.5) / 2, 1 / 3.5]]))


def reference(z, label):
    """Loss and gradient in float64, the probability of the others summed by itself."""
    s = [1 + float(x) if x >= 0 else 1 / (1 - float(x)) for x in z]
    others, total = sum(v for k, v in enumerate(s) if k != label), sum(s)
    loss = math.log1p(others / s[label]) if others < s[label] else math.log(total) - math.log(s[label])
    gradient = [
        (-others if k == label else v) / total / (1 + abs(float(x))) for k, (x, v) in enumerate(zip(z, s, strict=True))
    ]
    return loss, gradient


@pytest.mark.parametrize("label", [0, 3])
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e8, 1e12, 1e17])
@pytest.mark.parametrize("how", ["indices", "one-hot"])
def test_float32_is_accurate_at_every_size_of_logits(size, label, how):
    z = torch.tensor([[size, 0.0, -1.0, -size, 0.5]], requires_grad=True)
    target = torch.tensor([label])
    if how == "one-hot":
        target = functional.one_hot(target, 5).float()
    loss = stablemax_cross_entropy(z, target)
    (gradient,) = torch.autograd.grad(loss, z)
    wanted, slopes = reference(z[0].tolist(), label)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(gradient[0].numpy(), slopes, rtol=2e-5, atol=1e-38)
    assert loss > 0
    assert gradient[0, label] < 0  # it still teaches, where 1 - p_y formed as a difference is 0


def test_logits_of_1e30_on_both_sides():
    z = torch.tensor([[1e30, -1e30, 1.0]], requires_grad=True)
    for label in range(3):
        loss = stablemax_cross_entropy(z, torch.tensor([label]))
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss.item() == pytest.approx(reference(z[0].tolist(), label)[0], rel=1e-5)
        assert gradient.isfinite().all()


def test_softmax_collapses_where_stablemax_learns():
    z = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([0])
    for loss, learns in ((nn.CrossEntropyLoss(), False), (StableMaxCrossEntropyLoss(), True)):
        (gradient,) = torch.autograd.grad(loss(z, labels), z)
        assert bool(gradient[0, 0] != 0) == learns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_thirty_two(dtype):
    z, labels = logits_and_labels((50, 7), dtype=dtype)
    loss = stablemax_cross_entropy(z, labels)
    wide = stablemax_cross_entropy(z.float(), labels)
    assert loss.dtype == log_stablemax(z).dtype == stablemax(z).dtype == dtype
    assert loss == wide.to(dtype)
    torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in (loss, wide)))


def test_precision_casts_and_is_returned():
    z, labels = logits_and_labels((50, 7), dtype=torch.bfloat16)
    loss = stablemax_cross_entropy(z, labels, precision="float64")
    assert loss.dtype == torch.float64
    assert loss == stablemax_cross_entropy(z.double(), labels)
    assert torch.autograd.grad(loss, z)[0].dtype == torch.bfloat16
    assert stablemax_cross_entropy(z, labels, precision="float32").dtype == torch.float32


def test_minus_infinity_rules_a_class_out():
    z, labels = logits_and_labels((20, 7))
    masked = torch.cat([z.detach(), torch.full((20, 1), -torch.inf, dtype=z.dtype)], 1).requires_grad_()
    torch.testing.assert_close(stablemax_cross_entropy(masked, labels), stablemax_cross_entropy(z, labels))
    one_hot = functional.one_hot(labels, 8).double()
    for target in (labels, one_hot):
        loss = stablemax_cross_entropy(masked, target)
        (gradient,) = torch.autograd.grad(loss, masked)
        assert gradient.isfinite().all()
        assert (gradient[:, 7] == 0).all()
    with pytest.raises(FloatingPointError, match="rules out"):
        stablemax_cross_entropy(masked, torch.full((20,), 7))


def test_a_single_class_costs_nothing():
    z = torch.randn(3, 1, requires_grad=True)
    loss = stablemax_cross_entropy(z, torch.zeros(3, dtype=torch.long))
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.item() == pytest.approx(0, abs=1e-30)
    assert (gradient == 0).all()


def test_weights_move_and_are_saved_with_the_module():
    weight = torch.ones(3)
    loss = StableMaxCrossEntropyLoss(weight, label_smoothing=0.1)
    assert loss.state_dict()["weight"] is not None
    assert loss.double().weight.dtype == torch.float64
    assert weight.dtype == torch.float32
    assert "label_smoothing=0.1" in repr(loss)


GOOD = {"z": torch.zeros(2, 3), "labels": torch.tensor([0, 1])}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "z must be a floating-point tensor, got torch.int64"),
        ({"z": [1.0]}, TypeError, "z must be a floating-point tensor, got list"),
        ({"z": torch.tensor(1.0)}, ValueError, "scalar"),
        ({"z": torch.tensor([[0.0, math.nan, 0], [0, 0, 0]])}, FloatingPointError, "NaN or inf"),
        ({"z": torch.tensor([[0.0, math.inf, 0], [0, 0, 0]])}, FloatingPointError, "NaN or inf"),
        ({"z": torch.tensor([[math.inf, 0.0, 0], [0, 0, 0]])}, FloatingPointError, "NaN or inf"),
        ({"labels": torch.tensor([0, 3])}, ValueError, r"labels must be in \[0, 3\) or -100, got 3"),
        ({"labels": torch.tensor([0, -1])}, ValueError, "got -1"),
        ({"labels": torch.tensor([0])}, ValueError, r"labels must have the shape of z \(2, 3\) without"),
        ({"labels": torch.tensor([True, False])}, TypeError, "labels must be integers"),
        ({"labels": torch.full((2, 3), -0.1)}, ValueError, "finite and at least 0"),
        ({"labels": torch.full((2, 3), math.nan)}, ValueError, "finite and at least 0"),
        ({"labels": torch.zeros(2)}, ValueError, "labels, as probabilities, must have the shape"),
        ({"labels": torch.tensor([-100, -100])}, ValueError, "nothing to average over"),
        ({"weight": torch.tensor([0.0, 0.0, 1.0])}, ValueError, "nothing to average over"),
        ({"weight": torch.ones(2)}, ValueError, r"weight must have shape \(3,\)"),
        ({"weight": -torch.ones(3)}, ValueError, "weight must be finite and at least 0"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be at least 0 and at most 1"),
        ({"precision": "float16"}, ValueError, "precision must be one of"),
    ],
)
def test_bad_input_of_the_loss_is_named(change, error, message):
    with pytest.raises(error, match=message):
        stablemax_cross_entropy(**(GOOD | change))
    if "z" not in change and "labels" not in change and "weight" not in change:
        with pytest.raises(error, match=message):
            StableMaxCrossEntropyLoss(**change)


def test_bad_logits_are_found_even_where_the_label_is_ignored_or_smoothed():
    z = torch.tensor([[0.0, math.nan, 0], [0, 0, 0]])
    for labels in (torch.tensor([-100, 0]), torch.eye(3)[:2]):
        with pytest.raises(FloatingPointError):
            stablemax_cross_entropy(z, labels, label_smoothing=0.1)


def test_probabilities_with_weight_must_be_a_tensor():
    with pytest.raises(TypeError, match="weight must be a tensor"):
        StableMaxCrossEntropyLoss("mean")


# --------------------------------------------------------------------------------------------------------------------
# The optimiser


def parameters(seed=0, dtype=torch.float64, shapes=((5, 4), (3, 5), (5,))):
    """Parameters with gradients."""
    made = [nn.Parameter(torch.randn(s, generator=generator(seed), dtype=torch.float64).to(dtype)) for s in shapes]
    for number, parameter in enumerate(made):
        parameter.grad = torch.randn(parameter.shape, generator=generator(100 + number)).to(dtype)
    return made


def projected(w, g, rescale=True):
    """The published equations, for vectors."""
    left = g - (w @ g) / (w @ w) * w
    return left * g.norm() / left.norm() if rescale else left


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
def test_gradients_are_projected_as_published(scope, rescale):
    made = parameters()
    gradients = [p.grad.clone() for p in made]
    OrthoGrad(made, torch.optim.SGD, scope=scope, rescale=rescale, exclude=(), lr=0.0).step()
    if scope == "global":
        w, g, after = (torch.cat([t.flatten() for t in ts]) for ts in (made, gradients, [p.grad for p in made]))
        torch.testing.assert_close(after, projected(w.detach(), g, rescale))
        return
    for p, g in zip(made, gradients, strict=True):
        rows = zip(p.detach(), g, p.grad, strict=True) if scope == "row" and p.ndim > 1 else [(p.detach(), g, p.grad)]
        for w, before, after in rows:
            wanted = projected(w.flatten(), before.flatten(), rescale)
            torch.testing.assert_close(after.flatten(), wanted)


@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
def test_under_sgd_the_squared_norm_grows_by_exactly_that_of_the_step(scope):
    made = parameters()
    optimiser = OrthoGrad(made, torch.optim.SGD, scope=scope, exclude=(), lr=0.1)

    def squared():
        return torch.stack([p.detach().square().sum() for p in made])

    for turn in range(3):
        for p in made:
            p.grad = torch.randn(p.shape, generator=generator(50 + turn), dtype=p.dtype)
        before, step = squared(), torch.stack([p.grad.square().sum() for p in made]) * 0.1**2
        optimiser.step()
        if scope == "global":
            torch.testing.assert_close(squared().sum(), (before + step).sum())
        else:
            torch.testing.assert_close(squared(), before + step)


def test_biases_and_single_numbers_are_left_alone_and_exclude_is_obeyed():
    made = parameters(shapes=((5, 4), (3, 5), (5,), (1, 1), (1,)))
    gradients = [p.grad.clone() for p in made]

    def changed():
        return [not torch.equal(p.grad, g) for p, g in zip(made, gradients, strict=True)]

    OrthoGrad(made, torch.optim.SGD, lr=0.0).step()
    assert changed() == [True, True, False, False, False]
    for p, g in zip(made, gradients, strict=True):
        p.grad.copy_(g)
    OrthoGrad(made, torch.optim.SGD, exclude=made[1:2], lr=0.0).step()
    assert changed() == [True, False, True, False, False]


def test_a_column_has_nothing_to_project_by_row_and_empty_tensors_do_no_harm():
    made = parameters(shapes=((5, 1), (0, 3), (2, 3)))
    gradients = [p.grad.clone() for p in made]
    OrthoGrad(made, torch.optim.SGD, scope="row", lr=0.0).step()
    assert torch.equal(made[0].grad, gradients[0])
    assert not torch.equal(made[2].grad, gradients[2])


@pytest.mark.parametrize("size", [0.0, 1e-30])
@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_weights_leave_the_gradient_untouched_to_the_last_digit(dtype, size):
    (parameter,) = parameters(dtype=dtype, shapes=((6, 7),))
    parameter.data.mul_(size if dtype != torch.float64 else size**6)
    gradient = parameter.grad.clone()
    OrthoGrad([parameter], torch.optim.SGD, lr=0.0).step()
    assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
def test_a_parallel_gradient_becomes_zero_instead_of_amplified_rounding(dtype, scope):
    (parameter,) = parameters(dtype=dtype, shapes=((64, 500),))
    parameter.grad = (-0.37 * parameter.detach().double()).to(dtype)
    OrthoGrad([parameter], torch.optim.SGD, scope=scope, lr=0.0).step()
    assert (parameter.grad == 0).all()


def test_millions_of_entries_are_summed_accurately():
    parameter = nn.Parameter(torch.randn(2000, 2000, generator=generator()) + 1)
    parameter.grad = (-0.37 * parameter.detach().double()).float()
    optimiser = OrthoGrad([parameter], torch.optim.SGD, lr=0.0)
    optimiser.step()
    assert (parameter.grad == 0).all()
    parameter.grad = torch.randn(2000, 2000, generator=generator(1)) + 1
    optimiser.step()
    overlap = (parameter.detach().double() * parameter.grad.double()).sum()
    assert abs(overlap / parameter.detach().double().norm() / parameter.grad.double().norm()) < 1e-6


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_nearly_parallel_gradient_keeps_its_direction(dtype):
    w, other = torch.randn(2, 40, 50, generator=generator(3), dtype=torch.float64)
    share = 100 * max(torch.finfo(dtype).eps, 1e-7)
    parameter = nn.Parameter(w.to(dtype))
    parameter.grad = (w + share * other).to(dtype)
    wanted = projected(parameter.detach().double().flatten(), other.flatten())
    OrthoGrad([parameter], torch.optim.SGD, lr=0.0).step()
    assert functional.cosine_similarity(parameter.grad.double().flatten(), wanted, dim=0) > 0.99


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-20, 1e20, 1e37])
def test_gradients_whose_squares_leave_the_range_of_float32(size):
    (parameter,) = parameters(dtype=torch.float32, shapes=((6, 7),))
    gradient = parameter.grad * size
    wanted = projected(parameter.detach().flatten().double(), gradient.flatten().double())
    parameter.grad = gradient.clone()
    OrthoGrad([parameter], torch.optim.SGD, lr=0.0).step()
    np.testing.assert_allclose(
        parameter.grad.flatten().double().numpy(), wanted.numpy(), rtol=1e-4, atol=max(1e-5 * size, 2e-45)
    )


def test_sixteen_bits_channels_last_and_mixed_types():
    shapes = ((6, 3, 5, 5), (4, 6))
    made = parameters(dtype=torch.bfloat16, shapes=shapes)
    made[0].data = made[0].data.contiguous(memory_format=torch.channels_last)
    made[0].grad = made[0].grad.contiguous(memory_format=torch.channels_last)
    wide = [nn.Parameter(p.detach().double()) for p in made]
    for p, q in zip(made, wide, strict=True):
        q.grad = p.grad.double()
    for ones in (made, wide, [made[0], wide[1]]):
        OrthoGrad(ones, torch.optim.SGD, scope="global", lr=0.0).step()
    for p, q in zip(made, wide, strict=True):
        assert p.grad.dtype == torch.bfloat16
        torch.testing.assert_close(p.grad, q.grad.bfloat16(), rtol=2e-2, atol=2e-2)


class Network(nn.Module):
    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)

    def forward(self, x):
        return self.layers(x)


def batch(turn, dtype=torch.float32):
    x = torch.randn(16, 6, generator=generator(turn)).to(dtype)
    return x, torch.randint(3, (16,), generator=generator(turn + 1000))


def train(network, optimiser, turns, closure=False):
    loss_fn = StableMaxCrossEntropyLoss()
    for turn in turns:
        x, y = batch(turn, next(network.parameters()).dtype)

        def evaluate(x=x, y=y):
            optimiser.zero_grad()
            loss = loss_fn(network(x), y)
            loss.backward()
            return loss

        if closure:
            assert optimiser.step(evaluate) > 0
        else:
            evaluate()
            assert optimiser.step() is None
    return network


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


BASES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.0, "eps": 1e-25}),
    (torch.optim.RMSprop, {"lr": 0.01}),
]


@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize(("base", "options"), BASES)
def test_a_saved_state_continues_identically(base, options, dtype):
    whole = Network(dtype=dtype)
    train(whole, OrthoGrad(whole.parameters(), base, **options), range(8))
    first = Network(dtype=dtype)
    optimiser = OrthoGrad(first.parameters(), base, **options)
    optimiser.param_groups[0]["lr"] = optimiser.param_groups[0]["lr"] * 1.0
    train(first, optimiser, range(4))
    file = io.BytesIO()
    torch.save({"network": first.state_dict(), "optimiser": optimiser.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    second = Network(seed=1, dtype=dtype)
    second.load_state_dict(saved["network"])
    resumed = OrthoGrad(second.parameters(), base, **(options | {"lr": 123.0}))
    resumed.load_state_dict(saved["optimiser"])
    assert resumed.param_groups is resumed.base.param_groups
    assert resumed.param_groups[0]["lr"] == options["lr"]
    train(second, resumed, range(4, 8))
    assert torch.equal(weights(second), weights(whole))


def test_a_checkpoint_of_the_bare_base_optimiser_can_be_continued():
    bare = Network()
    adam = torch.optim.AdamW(bare.parameters(), lr=0.01)
    train(bare, adam, range(3))
    optimiser = OrthoGrad(bare.parameters(), lr=5.0)
    optimiser.load_state_dict(adam.state_dict())
    assert optimiser.param_groups[0]["lr"] == 0.01
    state = next(iter(optimiser.base.state.values()))
    assert state["step"] == 3
    assert optimiser.state is optimiser.base.state
    torch.optim.AdamW(bare.parameters()).load_state_dict(optimiser.state_dict())


def test_copies_and_pickles_are_independent_and_continue_identically():
    network = Network()
    optimiser = OrthoGrad(network.parameters(), lr=0.01, exclude=[network.layers[0].weight], scope="row")
    train(network, optimiser, range(3))
    file = io.BytesIO()
    torch.save((network, optimiser), file)
    file.seek(0)
    twins = [copy.deepcopy((network, optimiser)), torch.load(file, weights_only=False)]
    train(network, optimiser, range(3, 6))
    for twin, its in twins:
        assert its.exclude[0] is twin.layers[0].weight
        assert (its.scope, its.rescale) == ("row", True)
        train(twin, its, range(3, 6))
        assert torch.equal(weights(twin), weights(network))


@pytest.mark.parametrize(("base", "options"), BASES)
def test_a_closure_gives_the_same_steps(base, options):
    by_hand, by_closure = Network(), Network()
    train(by_hand, OrthoGrad(by_hand.parameters(), base, **options), range(5))
    train(by_closure, OrthoGrad(by_closure.parameters(), base, **options), range(5), closure=True)
    assert torch.equal(weights(by_hand), weights(by_closure))
    plain = train(Network(), base(by_hand.parameters(), **options), range(0))
    train(plain, base(plain.parameters(), **options), range(5), closure=True)
    assert not torch.allclose(weights(plain), weights(by_hand))


def test_every_evaluation_of_a_closure_is_projected():
    network = Network()
    optimiser = OrthoGrad(network.parameters(), torch.optim.LBFGS, scope="global", exclude=(), max_iter=5, lr=0.1)
    seen = []
    project = optimiser.project
    optimiser.project = lambda: (project(), seen.append(nlm_cosine(network).total))
    train(network, optimiser, range(1), closure=True)
    assert len(seen) >= 5
    assert max(map(abs, seen)) < 1e-6


def test_groups_are_shared_with_the_base_so_schedulers_and_new_groups_reach_it():
    network = Network()
    optimiser = OrthoGrad([{"params": network.layers[0].parameters(), "lr": 0.5}], torch.optim.SGD, lr=0.1)
    optimiser.add_param_group({"params": list(network.layers[2].parameters())})
    assert [group["lr"] for group in optimiser.base.param_groups] == [0.5, 0.1]
    scheduler = torch.optim.lr_scheduler.StepLR(optimiser, 1, gamma=0.1)
    train(network, optimiser, range(1))
    scheduler.step()
    assert [group["lr"] for group in optimiser.base.param_groups] == pytest.approx([0.05, 0.01])
    named = OrthoGrad(network.named_parameters(), lr=0.1)
    assert named.param_groups[0]["param_names"][0] == "layers.0.weight"
    before = weights(network)
    train(network, named, range(1))
    assert not torch.equal(before, weights(network))


def test_hooks_run_once_and_parameters_without_gradient_are_left_alone():
    network = Network()
    network.layers[0].weight.requires_grad_(False)
    frozen = network.layers[0].weight.clone()
    optimiser = OrthoGrad(network.parameters(), lr=0.01)
    calls = []
    optimiser.register_step_post_hook(lambda *_: calls.append(1))
    train(network, optimiser, range(2))
    assert len(calls) == 2
    assert torch.equal(frozen, network.layers[0].weight)


def test_projection_does_not_mind_a_scaled_loss():
    made, scaled = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    for p in scaled:
        p.grad *= 2.0**16
    for ones in (made, scaled):
        OrthoGrad(ones, torch.optim.SGD, lr=0.0).step()
    for p, q in zip(made, scaled, strict=True):
        assert torch.equal(p.grad, q.grad / 2.0**16)


def test_bad_input_of_the_optimiser_is_named():
    network = Network()
    with pytest.raises(ValueError, match="scope must be one of"):
        OrthoGrad(network.parameters(), scope="layer", lr=0.1)
    with pytest.raises(TypeError, match="base must be an optimiser class"):
        OrthoGrad(network.parameters(), torch.optim.SGD(network.parameters()))
    with pytest.raises(TypeError, match=r"base must make a torch\.optim\.Optimizer, got list"):
        OrthoGrad(network.parameters(), list)
    with pytest.raises(TypeError, match="exclude must hold parameters"):
        OrthoGrad(network.parameters(), exclude=["layers.0.weight"], lr=0.1)
    with pytest.raises(TypeError, match="got a single tensor"):
        OrthoGrad(network.parameters(), exclude=network.layers[0].weight, lr=0.1)
    with pytest.raises(TypeError, match="must be real"):
        OrthoGrad([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], lr=0.1)
    with pytest.raises(ValueError, match="learning rate"):
        OrthoGrad(network.parameters(), lr=-1.0)
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        OrthoGrad(table.parameters(), torch.optim.SGD, lr=0.1).step()


# --------------------------------------------------------------------------------------------------------------------
# Diagnostics


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24), (torch.float64, 53)]
)
def test_collapse_sets_in_where_one_plus_the_other_term_rounds_to_one(dtype, bits):
    threshold = bits * math.log(2)
    logits = torch.tensor([[threshold * 1.02, 0.0], [threshold * 0.98, 0.0]], dtype=torch.float64)
    for dtype_of_logits in (dtype, torch.float64):
        held = logits.to(dtype_of_logits)
        for rows, wanted in (([0], 1.0), ([1], 0.0), ([0, 1], 0.5)):
            assert softmax_collapse_fraction(held[rows], torch.zeros(len(rows), dtype=torch.long), dtype) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapse_means_that_the_loss_and_the_slope_at_the_label_are_zero(dtype):
    z = (torch.randn(200, 30, generator=generator(), dtype=torch.float64) * 6).to(dtype)
    labels = z.argmax(1)
    z[torch.arange(200), labels] += torch.linspace(0, 45, 200).to(dtype)
    z.requires_grad_()
    loss = functional.cross_entropy(z, labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    dead = (loss == 0).double().mean().item()
    assert 0.1 < dead < 0.9
    assert softmax_collapse_fraction(z, labels) == pytest.approx(dead, abs=0.02)  # sums in another order
    assert (gradient[loss == 0].gather(1, labels[loss == 0, None]) == 0).all()


def test_wrongly_classified_and_ignored_samples_and_the_stablemax_link():
    logits = torch.tensor([[300.0, 0.0], [0.0, 300.0], [300.0, 0.0]])
    labels = torch.tensor([0, 0, -100])
    assert softmax_collapse_fraction(logits, labels) == 0.5
    assert softmax_collapse_fraction(logits, labels, link="stablemax") == 0.0
    assert softmax_collapse_fraction(1e6 * logits, labels, link="stablemax") == 0.5
    assert softmax_collapse_fraction(logits, labels, torch.bfloat16, "stablemax") == 0.5  # 1 + 1/301 rounds to 1
    sequences = logits.T.expand(4, 2, 3)
    assert softmax_collapse_fraction(sequences, labels.expand(4, 3)) == 0.5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3).long()}, TypeError, "logits must be a floating-point tensor"),
        ({"logits": torch.zeros(2, 1)}, ValueError, "at least 2 classes"),
        ({"logits": torch.full((2, 3), math.inf)}, ValueError, "logits must be finite"),
        ({"labels": torch.tensor([0, 5])}, ValueError, "got 5"),
        ({"labels": torch.tensor([-100, -100])}, ValueError, "must not all be -100"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating-point"),
        ({"link": "sigmoid"}, ValueError, "link must be one of"),
    ],
)
def test_bad_input_of_the_collapse_fraction_is_named(change, error, message):
    with pytest.raises(error, match=message):
        softmax_collapse_fraction(**({"logits": torch.zeros(2, 3), "labels": torch.tensor([0, 1])} | change))


def homogeneous(seed=0, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).to(dtype)


def test_the_cosine_is_the_derivative_along_scaling_the_logits():
    # d/dalpha f(alpha theta) = L f at alpha = 1 for L homogeneous layers, so <grad, theta> = L sum_i <dloss/dz_i, z_i>
    network = homogeneous()
    x, y = batch(0, torch.float64)
    z = network(x)
    loss = functional.cross_entropy(z, y)
    (slopes,) = torch.autograd.grad(loss, z, retain_graph=True)
    loss.backward()
    found = nlm_cosine(network)
    w = torch.cat([p.detach().flatten() for p in network.parameters()])
    g = torch.cat([p.grad.flatten() for p in network.parameters()])
    assert found.total == pytest.approx(float(-2 * (slopes * z.detach()).sum() / w.norm() / g.norm()))
    assert found.total == pytest.approx(float(-(w @ g) / w.norm() / g.norm()))
    for name, p in network.named_parameters():
        assert found.per_parameter[name] == pytest.approx(
            float(-(p.detach() * p.grad).sum() / p.detach().norm() / p.grad.norm())
        )


def test_the_cosine_of_tiny_opposite_projected_and_zero_gradients():
    network = homogeneous(dtype=torch.float32)
    for p in network.parameters():
        p.grad = -1e-38 * p.detach()
    assert nlm_cosine(network).total == pytest.approx(1.0, abs=1e-5)
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=generator(1))
    OrthoGrad(network.parameters(), torch.optim.SGD, lr=0.0).step()
    assert abs(nlm_cosine(network).total) < 1e-6
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    assert nlm_cosine(network).total == 0.0
    network[0].weight.grad[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"0\.weight has not"):
        nlm_cosine(network)
    network.zero_grad()
    with pytest.raises(ValueError, match="call backward first"):
        nlm_cosine(network)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        nlm_cosine([1])


def test_after_overfitting_gradient_descent_moves_along_the_weights():
    network = homogeneous(dtype=torch.float32)
    x = torch.randn(20, 6, generator=generator(5))
    y = (x[:, 0] > 0).long()
    monitor = GrokkingMonitor(network, functional.cross_entropy, (x, y), (x, y))
    optimiser = torch.optim.SGD(network.parameters(), lr=0.5)
    for step in range(1500):
        if step in (0, 1499):
            monitor.record(step)
        optimiser.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        optimiser.step()
    start, end = monitor.history
    assert start.train_accuracy < 1 == end.train_accuracy
    assert start.cosine < 0.3 < 0.7 < end.cosine
    assert end.weight_norm == pytest.approx(float(weights(network).norm()), rel=1e-3)


class Fixed(nn.Module):
    """The logits themselves, as a model."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.seen = []

    def forward(self, index):
        self.seen.append(self.training)
        return self.logits[index]


def test_the_monitor_measures_and_changes_nothing():
    model = Fixed(torch.tensor([[20.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 1.0]]))
    model.logits.grad = torch.ones(4, 2)
    train_part, test_part = (torch.arange(2), torch.tensor([0, 1])), (torch.arange(2, 4), torch.tensor([0, 0]))
    monitor = GrokkingMonitor(model, functional.cross_entropy, train_part, test_part)
    with torch.no_grad():
        now = monitor.record(7)
    assert (now.step, now.train_accuracy, now.test_accuracy, now.collapsed, now.logit_scale) == (7, 1.0, 0.5, 0.5, 11.0)
    assert now.train_loss == pytest.approx(math.log1p(math.exp(-2)) / 2)
    assert now.weight_norm == pytest.approx(math.sqrt(406))
    assert (model.logits.grad == 1).all()
    assert model.training
    assert model.seen == [False, False]
    assert monitor.first_step(0.5) == 7
    assert monitor.first_step() is None
    assert monitor.first_step(part="train") == 7


@pytest.mark.parametrize(
    ("logits", "test_label", "expected"),
    [
        ([[20.0, 0.0], [0.0, 20.0]], 0, "generalises"),
        ([[20.0, 0.0], [0.0, 20.0]], 1, "softmax collapse: 100%"),
        ([[9.0, -9.0], [-9.0, 9.0]], 1, "softmax collapse"),
        ([[3.0, -3.0], [-3.0, 3.0]], 1, "naive loss minimisation"),
        ([[9.0, 8.0], [8.0, 9.0]], 1, "overfits"),
        ([[9.0, 8.0], [9.0, 8.0]], 1, "still fitting"),
    ],
)
def test_the_diagnosis_names_the_cause(logits, test_label, expected):
    labels = torch.tensor([0, 1])
    monitor = GrokkingMonitor(
        Fixed(torch.tensor(logits)),
        functional.cross_entropy,
        (torch.arange(2), labels),
        (torch.zeros(1, dtype=torch.long), torch.tensor([test_label])),
    )
    monitor.record(0)
    assert monitor.diagnosis().startswith(expected)


def test_bad_input_of_the_monitor_is_named():
    part, empty = (torch.arange(2), torch.tensor([0, 1])), (torch.arange(0), torch.arange(0))
    model = Fixed(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="test must have as many inputs as labels"):
        GrokkingMonitor(model, functional.cross_entropy, part, empty)
    monitor = GrokkingMonitor(model, lambda z, y: z.sum() * math.nan, part, part)
    with pytest.raises(ValueError, match="nothing has been recorded"):
        monitor.diagnosis()
    with pytest.raises(FloatingPointError, match="training loss is nan at step 3"):
        monitor.record(3)
    assert model.training


# --------------------------------------------------------------------------------------------------------------------
# Tasks


@pytest.mark.parametrize("op", ["add", "mul", "sub"])
def test_modular_tasks_hold_every_pair_once_with_its_label(op):
    task = modular_dataset(11, op, 0.3, one_hot=False, random_state=2)
    assert len(task.train_labels) == int(0.3 * 121)
    a, b = torch.cat([task.train_inputs, task.test_inputs]).T
    assert len(set(zip(a.tolist(), b.tolist(), strict=True))) == 121
    result = {"add": a + b, "mul": a * b, "sub": a - b}[op]
    assert torch.equal(torch.cat([task.train_labels, task.test_labels]), result.remainder(11))
    encoded = modular_dataset(11, op, 0.3, random_state=2)
    assert torch.equal(encoded.train_inputs.view(-1, 2, 11).argmax(2), task.train_inputs)
    assert (encoded.test_inputs.sum(1) == 2).all()
    assert encoded.classes == 11
    assert not torch.equal(modular_dataset(11, op, 0.3, random_state=3).train_labels, task.train_labels)


def test_parity_strings_are_distinct_and_labelled_by_their_first_bits():
    task = sparse_parity(10, 3, 1024, 0.5, random_state=0)  # all strings there are
    strings = torch.cat([task.train_inputs, task.test_inputs])
    assert len(strings.unique(dim=0)) == 1024
    labels = torch.cat([task.train_labels, task.test_labels])
    assert torch.equal(labels, (strings[:, 0] + strings[:, 1] + strings[:, 2]).long() % 2)
    long = sparse_parity(random_state=1)
    assert long.train_inputs.shape == (1000, 43)
    assert long.train_inputs.mean() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(long.test_inputs, sparse_parity(random_state=np.random.default_rng(1)).test_inputs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: modular_dataset(1), "p must be at least 2"),
        (lambda: modular_dataset(5, "div"), "op must be one of"),
        (lambda: modular_dataset(5, fraction=1.0), "fraction must be"),
        (lambda: modular_dataset(2, fraction=0.1), "non-empty"),
        (lambda: sparse_parity(63), "bits must be at least 1 and at most 62"),
        (lambda: sparse_parity(4, 5), "relevant must be"),
        (lambda: sparse_parity(4, 2, 17), "samples must be"),
    ],
)
def test_bad_input_of_the_tasks_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------------------------------
# Together


def test_orthograd_generalises_where_adam_only_memorises():
    task = modular_dataset(37, fraction=0.7, random_state=0)
    monitors = {}
    for wrap in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = (74, 128, 128, 37)
            linear = [nn.Linear(n, m, bias=False) for n, m in itertools.pairwise(sizes)]
            model = nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])
        adam = torch.optim.AdamW if not wrap else OrthoGrad
        optimiser = adam(model.parameters(), lr=0.01, weight_decay=0.0)
        monitors[wrap] = GrokkingMonitor(model, functional.cross_entropy, task.train, task.test)
        for step in range(1, 121):
            optimiser.zero_grad()
            functional.cross_entropy(model(task.train_inputs), task.train_labels).backward()
            optimiser.step()
            if step % 40 == 0:
                monitors[wrap].record(step)
        assert monitors[wrap].first_step(part="train") is not None
    assert monitors[True].first_step() is not None
    assert monitors[False].history[-1].test_accuracy < 0.5
