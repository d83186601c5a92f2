"""Tests of refined schedules: bounds and their minimisers, refinement, shapes, schedulers, recorder, reduction."""

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from workingpapers.training.refined_schedules import (
    GradNormRecorder,
    LinearDecay,
    RefinedLR,
    last_iterate_bound,
    last_iterate_wrapper,
    optimise_bound,
    refine,
    schedule_shape,
    weights_from_schedule,
)

SHAPES = ["flat", "1/t", "1/sqrt(t)", "cosine", "step", "polynomial", "linear"]


def rough_norms(T, seed=0, trend=1.0):
    rng = np.random.default_rng(seed)
    return np.exp(0.3 * rng.standard_normal(T) + np.linspace(trend, 0.0, T))


def plain_bound(etas, G, D):
    """The numeric bound as it is written, with its double sum."""
    R = np.cumsum(etas[::-1])[::-1]
    S = np.cumsum((etas * G)[::-1] ** 2)[::-1]
    return (D**2 + S[0]) / (2 * R[0]) + np.sum(etas[:-1] * S[:-1] / (R[:-1] * R[1:])) / 2


# --------------------------------------------------------------------------------------------------------------------
# Bounds


def test_bounds_of_the_named_schedules_at_constant_norms():
    known = {"linear": 1.0, "cosine": 1.030300, "1/sqrt(t)": 1.270843, "flat": 1.474588}
    for name, value in known.items():
        bound = last_iterate_bound(schedule_shape(name, 200), np.ones(200))
        np.testing.assert_allclose(bound * np.sqrt(200), value, atol=2e-6)


def test_theorem_bound_is_the_one_of_the_weights_at_their_best_scale():
    G, schedule, D = rough_norms(80), schedule_shape("cosine", 80), 2.5
    weights = weights_from_schedule(schedule, G)
    np.testing.assert_allclose(weights.sum(), 1.0)
    etas = weights[:-1] * np.cumsum(weights[::-1])[::-1][1:]
    np.testing.assert_allclose(etas / etas.max(), schedule[:-1])  # eta_t ~ w_t w_{t+1:T}
    scales = np.exp(np.linspace(-8, 8, 20_001))
    values = [(D**2 / 2 + np.sum((scale * weights * G) ** 2) / 2) / scale for scale in scales]
    np.testing.assert_allclose(last_iterate_bound(schedule, G, D), min(values), rtol=1e-6)


def test_virtual_last_step_is_the_best_of_many():
    G, schedule = rough_norms(50, 3), schedule_shape("step", 50)
    for y in np.exp(np.linspace(-6, 3, 80)):
        tau, weights = y, [y]
        for t in range(48, -1, -1):
            weights.append(schedule[t] / tau)
            tau += weights[-1]
        reached = np.linalg.norm(np.array(weights[::-1]) / tau * G)
        assert last_iterate_bound(schedule, G) <= reached * (1 + 1e-9)
        etas = np.append(schedule[:-1], y)
        scaled = min(plain_bound(scale * etas, G, 1.0) for scale in np.exp(np.linspace(-6, 2, 60)))
        assert last_iterate_bound(schedule, G, kind="numeric") <= scaled * (1 + 1e-9)


@given(st.integers(2, 60), st.integers(0, 1000), st.floats(-2, 2))
@settings(max_examples=40, deadline=None)
def test_refined_weights_reach_the_least_theorem_bound(T, seed, trend):
    G = rough_norms(T, seed, trend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        refined = refine(G, tau=0.0)
    least = 3.0 / np.sqrt(np.sum(G**-2.0))
    np.testing.assert_allclose(last_iterate_bound(refined, G, 3.0), least, rtol=1e-6)
    np.testing.assert_allclose(weights_from_schedule(refined, G), G**-2.0 / np.sum(G**-2.0), rtol=2e-3, atol=1e-6)
    for name in SHAPES:
        assert last_iterate_bound(schedule_shape(name, T), G, 3.0) >= least * (1 - 1e-9)


@given(st.integers(2, 60), st.integers(0, 1000), st.floats(-3, 3), st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_optimised_steps_are_stationary_and_reach_their_bound(T, seed, trend, D):
    G = rough_norms(T, seed, trend)
    best = optimise_bound(G, D)
    assert (best.etas > 0).all()
    np.testing.assert_allclose(plain_bound(best.etas, G, D), best.bound, rtol=1e-10)
    np.testing.assert_allclose(last_iterate_bound(best.etas, G, D, "numeric"), best.bound, rtol=1e-8)
    rng = np.random.default_rng(seed)
    for size in (1e-3, 0.1):  # the bound is convex: no change of the steps lowers it
        changed = best.etas * np.exp(size * rng.standard_normal(T))
        assert plain_bound(changed, G, D) >= best.bound * (1 - 1e-12)


def test_optimised_steps_agree_with_a_quasi_newton_method():
    G, D = rough_norms(40), 2.0
    best = optimise_bound(G, D)
    found = minimize(
        lambda etas: plain_bound(etas, G, D),
        np.full(40, D / np.sqrt(40)),
        method="L-BFGS-B",
        bounds=[(1e-8, None)] * 40,
        options={"maxfun": 100_000, "maxiter": 10_000, "ftol": 1e-15, "gtol": 1e-9},
    )
    np.testing.assert_allclose(found.fun, best.bound, rtol=1e-7)
    np.testing.assert_allclose(found.x, best.etas, rtol=0.02, atol=1e-4)


def test_optimised_steps_are_linear_decay_at_constant_norms_and_twice_the_theorems_bound():
    T, G = 4000, 3.0
    best = optimise_bound(np.full(T, G), 2.0)
    np.testing.assert_allclose(best.bound, 2 * 2.0 * G / np.sqrt(T), rtol=2e-3)
    np.testing.assert_allclose(best.schedule, schedule_shape("linear", T), atol=2e-3)
    np.testing.assert_allclose(best.etas[0], 2.0 / (G * np.sqrt(T)), rtol=2e-3)


def test_optimised_steps_look_like_refined_ones():
    G = rough_norms(400)
    assert np.corrcoef(optimise_bound(G).schedule, refine(G, tau=0.0))[0, 1] > 0.999


def test_bounds_scale_with_distance_and_norms():
    G = rough_norms(30)
    for kind in ("theorem", "numeric"):
        one = last_iterate_bound(schedule_shape("cosine", 30), G, kind=kind)
        many = last_iterate_bound(7 * schedule_shape("cosine", 30), 1e6 * G, 3.0, kind)
        np.testing.assert_allclose(many, 3e6 * one, rtol=1e-9)
    small, large = optimise_bound(1e-200 * G), optimise_bound(1e200 * G)  # whose squares are no floats
    np.testing.assert_allclose(small.bound * 1e200, large.bound * 1e-200, rtol=1e-9)
    np.testing.assert_allclose(small.schedule, large.schedule, rtol=1e-9)


# --------------------------------------------------------------------------------------------------------------------
# Refinement


@pytest.mark.parametrize("T", [2, 3, 17, 1000])
@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_constant_norms_give_linear_decay(T, kind):
    steps = np.arange(1, T + 1)
    np.testing.assert_allclose(refine(np.full(T, 7.3), kind, tau=0.0), (T - steps) / (T - 1), atol=1e-12)
    np.testing.assert_allclose(schedule_shape("linear", T), (T - steps) / (T - 1), atol=1e-12)


def test_large_early_norms_make_warm_up():
    norms = np.r_[np.full(10, 10.0), np.ones(90)]
    for kind, first in (("l2", 0.0101225), ("l1", 0.102135)):
        schedule = refine(norms, kind, tau=0.0)
        np.testing.assert_allclose(schedule[0], first, rtol=1e-5)
        assert schedule.argmax() == 10
    assert refine(norms, power=0.0, tau=0.0).argmax() == 0


def test_norms_that_fall_keep_the_rate_high_and_norms_that_rise_lower_it():
    falling, linear = np.linspace(2.0, 1.0, 200), schedule_shape("linear", 200)
    assert (refine(falling, tau=0.0)[100:-1] > linear[100:-1]).all()
    assert (refine(falling[::-1], tau=0.0)[1:-1] < linear[1:-1]).all()


def test_the_filter_is_a_median_continued_by_reflection():
    norms = rough_norms(60)
    width = 2 * (int(0.2 * 60) // 2) + 1
    half = width // 2
    continued = np.r_[np.full(half, norms[0]), norms, norms[-2 : -2 - half : -1]]
    medians = np.array([np.median(continued[t : t + width]) for t in range(60)])
    np.testing.assert_allclose(refine(norms, tau=0.2), refine(medians, tau=0.0))
    spiked = np.ones(100)
    spiked[[20, 70]] = 1e-6, 1e6
    np.testing.assert_allclose(refine(spiked), schedule_shape("linear", 100), atol=1e-12)


def test_thinned_logs_are_interpolated_and_other_lengths_warned_of():
    norms = np.linspace(3.0, 1.0, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for every in (1, 3, 7, 10):
            thinned = refine(norms[::every], total_steps=1000)
            np.testing.assert_allclose(thinned, refine(norms), atol=0.02)
    for length in (1001, 700):
        with pytest.warns(UserWarning, match=rf"{length} norms are not those of every k-th of 1000 steps"):
            assert len(refine(np.ones(length), total_steps=1000)) == 1000


def test_last_step_can_be_half_of_the_one_before():
    zero, half = (refine(rough_norms(50), final=final) for final in ("zero", "half"))
    assert zero[-1] == 0.0
    assert half[-1] == zero[-2] / 2
    np.testing.assert_array_equal(zero[:-1], half[:-1])


def test_zero_and_broken_norms_need_a_quantile():
    norms = np.ones(100)
    norms[[5, 50, 51, 80]] = np.nan, 0.0, 1e-9, np.inf
    with pytest.raises(ValueError, match="norms must be finite"):
        refine(norms)
    with pytest.raises(ValueError, match=r"norms must be positive, got 0 at step 1"):
        refine([1.0, 0.0, 1.0])
    np.testing.assert_allclose(refine(norms, tau=0.0, clip_quantile=0.1), schedule_shape("linear", 100), atol=1e-12)
    with pytest.raises(ValueError, match="norms must hold a positive finite number"):
        refine(np.zeros(5), clip_quantile=0.1)


def test_interpolated_problems_and_useless_filters_are_warned_of():
    with pytest.warns(UserWarning, match=r"vary 32-fold, as on problems that are interpolated"):
        refine(np.geomspace(32.0, 1.0, 100), tau=0.0)
    with pytest.warns(UserWarning, match=r"tau=0\.1 of 15 steps is below 2 steps"):
        refine(np.ones(15))


def test_the_callers_norms_stay_as_they_are():
    norms = rough_norms(50)
    norms[3] = 0.0
    before = norms.copy()
    refine(norms, clip_quantile=0.1)
    norms[3] = before[3] = 1.0
    refine(norms)
    optimise_bound(norms)
    last_iterate_bound(norms, norms)
    np.testing.assert_array_equal(norms, before)


# --------------------------------------------------------------------------------------------------------------------
# Shapes


def test_shapes_are_their_formulas():
    t = np.arange(100)
    np.testing.assert_allclose(schedule_shape("1/t", 100), 10 / (10 + t))
    np.testing.assert_allclose(schedule_shape("1/t", 100, offset=3.0), 3 / (3 + t))
    np.testing.assert_allclose(schedule_shape("1/sqrt(t)", 100), 1 / np.sqrt(1 + t))
    np.testing.assert_allclose(schedule_shape("cosine", 100), (1 + np.cos(np.pi * t / 99)) / 2, atol=1e-15)
    np.testing.assert_allclose(schedule_shape("polynomial", 100, power=3.0), (1 - t / 99) ** 3)
    np.testing.assert_allclose(schedule_shape("step", 100), np.repeat([1, 0.1, 0.01, 0.001], [30, 30, 30, 10]))
    thirds = schedule_shape("step", 99, drops=(1 / 3, 2 / 3))
    np.testing.assert_allclose(thirds, np.repeat([1, 0.1, 0.01], 33))


@pytest.mark.parametrize("name", SHAPES)
def test_warm_up_rises_to_the_peak_and_the_shape_follows(name):
    schedule = schedule_shape(name, 50, warmup=0.2)
    np.testing.assert_allclose(schedule[:10], np.arange(1, 11) / 11)
    np.testing.assert_allclose(schedule[10:], schedule_shape(name, 40))
    assert schedule.max() == 1.0


# --------------------------------------------------------------------------------------------------------------------
# Schedulers


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)) for _ in range(count)]


def train(model, optimizer, data, scheduler=None, clip=None, recorder=None):
    for inputs, targets in data:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        if recorder is not None:
            recorder()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_every_group_follows_its_own_peak(as_tensor):
    model = small_model()
    peaks = [0.1, 0.02]
    groups = [
        {"params": layer.parameters(), "lr": torch.tensor(peak, dtype=torch.float64) if as_tensor else peak}
        for layer, peak in zip((model[0], model[2]), peaks, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, foreach=False if as_tensor else None)
    schedule = refine(rough_norms(20), tau=0.2)
    scheduler = RefinedLR(optimizer, schedule)
    for multiplier in schedule:
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        np.testing.assert_allclose(rates, [peak * multiplier for peak in peaks])
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == [0.0, 0.0]
    with pytest.warns(UserWarning, match="the schedule has 20 steps and training goes on"):
        scheduler.step()


def test_linear_decay_agrees_with_torch():
    ours, theirs = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3) for _ in range(2))
    linear = LinearDecay(ours, 50)
    peer = torch.optim.lr_scheduler.LinearLR(theirs, 1.0, 0.0, 49)
    for _ in range(50):
        np.testing.assert_allclose(linear.get_last_lr(), peer.get_last_lr(), atol=1e-15)
        for each in (ours, theirs, linear, peer):
            each.step()
    with_half = LinearDecay(ours, 10, warmup=0.2, final="half").schedule
    np.testing.assert_allclose(with_half[-2:], [1 / 7, 1 / 14])


@pytest.mark.parametrize("stop", [1, 7, 19])
def test_a_resumed_run_goes_on_identically(stop, tmp_path):
    data, schedule = batches(20), refine(rough_norms(20), tau=0.2)

    def parts(other):
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler = RefinedLR(optimizer, schedule[::-1] if other else schedule)
        return model, optimizer, scheduler, GradNormRecorder(optimizer, every=3)

    whole = parts(False)
    train(whole[0], whole[1], data, whole[2])
    first = parts(False)
    train(first[0], first[1], data[:stop], first[2])
    torch.save([part.state_dict() for part in first], tmp_path / "run.pt")
    second = parts(True)  # built with another schedule, which the state replaces
    for part, state in zip(second, torch.load(tmp_path / "run.pt"), strict=True):
        part.load_state_dict(state)
    train(second[0], second[1], data[stop:], second[2])
    for ours, theirs in zip(second[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    np.testing.assert_array_equal(second[3].norms, whole[3].norms)
    np.testing.assert_array_equal(second[3].steps, [0, 3, 6, 9, 12, 15, 18])
    assert second[2].get_last_lr() == whole[2].get_last_lr()


# --------------------------------------------------------------------------------------------------------------------
# Recorder


def gradient_norm(model, ord):
    return float(torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm(ord))


@pytest.mark.parametrize("ord", [1, 2])
def test_every_step_of_every_group_is_logged(ord):
    model = small_model()
    optimizer = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].weight, "lr": 0.1}], lr=0.2)
    recorder = GradNormRecorder(optimizer, ord=ord)
    expected = []
    for step, batch in enumerate(batches(6)):
        if step == 3:
            optimizer.add_param_group({"params": model[2].bias})
        train(model, optimizer, [batch])
        seen = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        expected.append(float(torch.cat(seen).norm(ord)))
    np.testing.assert_allclose(recorder.norms, expected, rtol=1e-6)
    np.testing.assert_array_equal(recorder.steps, np.arange(6))
    recorder.remove()
    train(model, optimizer, batches(1))
    assert len(recorder.norms) == 6


def test_recording_changes_nothing_and_long_logs_are_kept_in_order():
    models = [small_model(), small_model()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in models]
    recorder = GradNormRecorder(optimizers[0])
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, batches(20) * 30)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)
    assert len(recorder.norms) == 600
    np.testing.assert_allclose(recorder.norms[-1], gradient_norm(models[0], 2), rtol=1e-6)


def test_a_norm_taken_before_clipping_is_the_one_that_is_logged():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = GradNormRecorder(optimizer)
    train(model, optimizer, batches(1), clip=1e-3, recorder=recorder)
    train(model, optimizer, batches(1), clip=1e-3)
    assert recorder.norms[0] > 0.1
    np.testing.assert_allclose(recorder.norms[1], 1e-3, rtol=1e-3)


@pytest.mark.parametrize("as_keyword", [False, True])
@pytest.mark.parametrize(("inside", "every"), [(False, 1), (True, 1), (True, 2)])
def test_with_a_closure_its_first_gradient_is_logged(as_keyword, inside, every):
    model = small_model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    scheduler, recorder = RefinedLR(optimizer, [1.0, 0.5, 0.2, 0.0]), GradNormRecorder(optimizer, every=every)
    (inputs, targets), seen = batches(1)[0], []

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        seen[-1].append(gradient_norm(model, 2))
        if inside:
            recorder()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss

    for _ in range(4):
        seen.append([])
        loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert loss.item() > 0
        scheduler.step()
    assert len(seen[0]) > 1
    np.testing.assert_allclose(recorder.norms, [evaluations[0] for evaluations in seen[::every]], rtol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_scaled_gradients_are_logged_unscaled_and_skipped_steps_left_out(fused, unscale):
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    recorder = GradNormRecorder(optimizer, ord=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = []
    for step, (inputs, targets) in enumerate(batches(4)):
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(inputs), targets)).backward()
        if step == 2:
            model[0].weight.grad[0, 0] = torch.inf
        else:
            expected.append(gradient_norm(model, 1) / scaler.get_scale())
        if unscale:
            scaler.unscale_(optimizer)
            recorder()
        scaler.step(optimizer)
        scaler.update()
    np.testing.assert_allclose(recorder.norms, expected, rtol=1e-5)


def test_half_precision_and_sparse_gradients():
    half = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    half.grad = torch.full((1000,), 500.0, dtype=torch.float16)  # the sum, 500,000, is no half-precision number
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 1, 3])).sum().backward()
    optimizer = torch.optim.SGD([half, table.weight, nn.Parameter(torch.zeros(3))], lr=0.0)
    recorder = GradNormRecorder(optimizer, ord=1)
    optimizer.step()
    np.testing.assert_allclose(recorder.norms, [500_000 + 4 * (2 + 1)])


def test_saved_logs_read_back(tmp_path):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = GradNormRecorder(optimizer, ord=1, every=2)
    train(model, optimizer, batches(5))
    recorder.save(tmp_path / "norms.npz")
    with np.load(tmp_path / "norms.npz") as saved:
        np.testing.assert_array_equal(saved["norms"], recorder.norms)
        assert saved["steps"].tolist() == [0, 2, 4]
        assert saved["ord"] == 1
    with pytest.raises(ValueError, match="the recorder has every=3, got a state with every=2"):
        GradNormRecorder(optimizer, ord=1, every=3).load_state_dict(recorder.state_dict())


def test_a_recorded_run_refines_into_a_schedule_for_the_next():
    data = batches(40)

    def fresh():
        model = small_model()
        return model, torch.optim.SGD(model.parameters(), lr=0.3)

    model, optimizer = fresh()
    recorder = GradNormRecorder(optimizer)
    train(model, optimizer, data, LinearDecay(optimizer, 40))
    model, optimizer = fresh()
    scheduler = RefinedLR(optimizer, refine(recorder.norms))
    train(model, optimizer, data, scheduler)
    assert scheduler.get_last_lr() == [0.0]


# --------------------------------------------------------------------------------------------------------------------
# Reduction


def absolute_regression(seed=0):
    rng = np.random.default_rng(seed)
    A = torch.from_numpy(rng.standard_normal((30, 6)))
    b = A @ torch.from_numpy(rng.standard_normal(6)) + torch.from_numpy(rng.standard_cauchy(30))
    return lambda x: (A @ x - b).abs().mean()


def test_plain_sgd_becomes_sgd_with_the_theorems_schedule():
    weights = rough_norms(25) ** -2
    schedule = np.append(weights[:-1] * np.cumsum(weights[::-1])[::-1][1:], 0.0) / weights.sum()
    wrapped, plain = small_model(), small_model()
    optimizer = last_iterate_wrapper(torch.optim.SGD(wrapped.parameters(), lr=0.5), weights)
    train(wrapped, optimizer, batches(25))
    peer = torch.optim.SGD(plain.parameters(), lr=0.5)
    train(plain, peer, batches(25), RefinedLR(peer, schedule))
    for ours, theirs in zip(wrapped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="weights are for 25 steps"):
        optimizer.step()


@pytest.mark.parametrize("learner", ["SGD", "Adagrad", "Adam"])
def test_the_last_iterate_is_bounded_by_the_weighted_regret(learner):
    f = absolute_regression()
    rng = np.random.default_rng(1)
    for T, weights in itertools.product([2, 10, 60], ["equal", "uneven"]):
        w = np.ones(T) if weights == "equal" else rng.uniform(0.0, 2.0, T)
        x = nn.Parameter(torch.zeros(6, dtype=torch.float64))
        base = getattr(torch.optim, learner)([x], lr=0.7)
        optimizer = last_iterate_wrapper(base, w)
        gradients, points, values = [], [], []
        for _ in range(T):
            optimizer.zero_grad()
            loss = f(x)
            loss.backward()
            points.append(optimizer.state[x]["z"].clone() if optimizer.state[x] else x.detach().clone())
            gradients.append(x.grad.clone())
            values.append(loss.item())
            optimizer.step()
            assert torch.equal(x.grad, gradients[-1])  # the learner saw w_t g_t; the caller's gradient is as it was
        for u in (torch.zeros(6, dtype=torch.float64), torch.from_numpy(rng.standard_normal(6))):
            regret = sum(a * float(g @ (z - u)) for a, g, z in zip(w, gradients, points, strict=True))
            assert values[-1] - float(f(u)) <= regret / w.sum() + 1e-9


def test_a_wrapped_learner_resumes_identically_and_runs_closures():
    def fresh():
        model = small_model()
        learner = torch.optim.Adam(model.parameters(), lr=0.05)
        return model, last_iterate_wrapper(learner, np.arange(1.0, 13.0))

    whole, optimizer = fresh()
    train(whole, optimizer, batches(12))
    first, optimizer = fresh()
    train(first, optimizer, batches(12)[:5])
    state = copy.deepcopy([first.state_dict(), optimizer.state_dict()])
    second, optimizer = fresh()
    second.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    for inputs, targets in batches(12)[5:]:

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(second(inputs), targets)
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
    for ours, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    optimizer.param_groups[0]["lr"] = 0.0
    assert optimizer.learner.param_groups[0]["lr"] == 0.0


# --------------------------------------------------------------------------------------------------------------------
# Bad input


def optimiser():
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: refine([1.0]), r"norms must be a vector of at least 2 entries, got shape \(1,\)"),
        (lambda: refine(np.ones((3, 3))), r"got shape \(3, 3\)"),
        (lambda: refine([1.0, np.nan]), "norms must be finite"),
        (lambda: refine([1.0, -1.0]), "norms must be positive, got -1 at step 1"),
        (lambda: refine(np.ones(9), kind="l3"), "kind must be one of 'l2', 'l1', got 'l3'"),
        (lambda: refine(np.ones(9), tau=1.0), "tau must be at least 0 and below 1, got 1.0"),
        (lambda: refine(np.ones(9), power=-1.0), "power must be at least 0"),
        (lambda: refine(np.ones(9), total_steps=1), "total_steps must be at least 2, got 1"),
        (lambda: refine(np.ones(9), final="one"), "final must be one of"),
        (lambda: refine(np.ones(9), clip_quantile=0.5), "clip_quantile must be above 0 and below 0.5"),
        (lambda: optimise_bound([1.0, 0.0]), "norms must be positive"),
        (lambda: optimise_bound([1.0, 1.0], 0.0), "D must be above 0, got 0.0"),
        (lambda: last_iterate_bound([1, 1, 0], [1, 1]), "equally long, got 3 and 2"),
        (lambda: last_iterate_bound([0, 0, 1], np.ones(3)), "etas must be at least 0, with a positive one"),
        (lambda: last_iterate_bound([1, -1, 1], np.ones(3)), "etas must be at least 0"),
        (lambda: last_iterate_bound(np.ones(3), np.ones(3), kind="both"), "kind must be one of"),
        (lambda: weights_from_schedule([1, np.inf]), "etas must be finite"),
        (lambda: schedule_shape("sine", 10), "name must be one of"),
        (lambda: schedule_shape("linear", 1), "total_steps must be at least 2"),
        (lambda: schedule_shape("linear", 10, 0.9), "warmup must leave 2 of 10 steps"),
        (lambda: schedule_shape("linear", 10, 1.0), "warmup must be at least 0 and below 1"),
        (lambda: schedule_shape("1/t", 10, offset=0.0), "offset must be above 0"),
        (lambda: schedule_shape("polynomial", 10, power=0.0), "power must be above 0"),
        (lambda: schedule_shape("step", 10, drops=(0.5, 1.5)), "drops must be above 0 and below 1"),
        (lambda: RefinedLR(optimiser(), []), r"schedule must be a vector, got shape \(0,\)"),
        (lambda: RefinedLR(optimiser(), [1.0, np.nan]), "schedule must be finite"),
        (lambda: RefinedLR(optimiser(), [1.0, -0.1]), "schedule must be at least 0, got -0.1"),
        (lambda: LinearDecay(optimiser(), 10, final="one"), "final must be one of"),
        (lambda: GradNormRecorder(optimiser(), ord=3), "ord must be one of 1, 2, got 3"),
        (lambda: GradNormRecorder(optimiser(), every=0), "every must be at least 1, got 0"),
        (lambda: last_iterate_wrapper(optimiser(), [1.0]), "weights must be a vector of at least 2"),
        (lambda: last_iterate_wrapper(optimiser(), [0.0, 0.0]), "weights must be at least 0 and not all 0"),
        (lambda: last_iterate_wrapper(optimiser(), [1.0, np.inf]), "weights must be finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("build", [GradNormRecorder, lambda o: last_iterate_wrapper(o, [1.0, 1.0])])
def test_what_is_no_optimiser_is_refused(build):
    with pytest.raises(TypeError, match=r"(optimizer|online_learner) must be a torch optimizer, got Sequential"):
        build(small_model())
