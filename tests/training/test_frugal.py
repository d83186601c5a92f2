"""Tests of FRUGAL: the rule against dense algebra and known optimisers, subspaces, memory, state, groups, bad input."""

import copy
import importlib.util
import io
import itertools
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from workingpapers.training.frugal import Frugal, frugal_param_groups, state_memory
from workingpapers.training.frugal import optimizer as frugal_optimizer

_spec = importlib.util.spec_from_file_location(
    "optimizer_contract", Path(__file__).parents[1] / "optimizer_contract.py"
)
optimizer_contract = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(optimizer_contract)

COORDINATES = ["columns", "rows", "randk", "randperm"]
DIVIDED = [*COORDINATES, "svd", "random"]
KINDS = ["block", *DIVIDED]
SHAPES = [(6, 4), (4, 6), (5, 5), (3, 8)]


def gradients(shapes=SHAPES, steps=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes] for _ in range(steps)]


def weights(shapes=SHAPES, dtype=torch.float64):
    return [nn.Parameter(w) for w in gradients(shapes, 1, seed=99, dtype=dtype)[0]]


def projectable(params, **options):
    return Frugal([{"params": params, "projectable": True}], **options)


def descend(params, optimiser, steps):
    for grads in steps:
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else grad.clone()
        optimiser.step()
    return params


def distance(one, other):
    return max(float((a - b).detach().abs().max()) for a, b in zip(one, other, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# The rule


def mask_of(optimiser, p, projection):
    """The coordinates with state, as a matrix of truth values."""
    indices = optimiser.state[p]["indices"].long()
    mask = torch.zeros(p.shape, dtype=torch.bool)
    if projection == "randk":
        mask.view(-1)[indices] = True
    elif projection == "rows" or (projection == "randperm" and p.shape[0] < p.shape[1]):
        mask[indices] = True
    else:
        mask[:, indices] = True
    return mask


@pytest.mark.parametrize("on_refresh", ["reset", "reproject"])
@pytest.mark.parametrize("projection", COORDINATES)
def test_coordinates_follow_the_rule_written_out_for_dense_matrices(projection, on_refresh):
    lr, scale, free, decay, gap, eps = 0.1, 0.5, 0.7, 0.3, 3, 1e-3
    params = weights()
    optimiser = projectable(
        params,
        lr=lr,
        proj_lr_scale=scale,
        free_lr_scale=free,
        weight_decay=decay,
        eps=eps,
        density=0.5,
        update_gap=gap,
        projection=projection,
        on_refresh=on_refresh,
    )
    dense = [p.detach().clone() for p in params]
    first, second, age, before = ([torch.zeros_like(w) for w in dense] for _ in range(4))
    for k, grads in enumerate(gradients()):
        descend(params, optimiser, [grads])
        for i, (w, grad) in enumerate(zip(dense, grads, strict=True)):
            mask = mask_of(optimiser, params[i], projection)
            if k % gap == 0:
                stays = mask & (before[i] > 0) if on_refresh == "reproject" else torch.zeros_like(mask)
                for tensor in (first[i], second[i], age[i]):
                    tensor.mul_(stays)
                before[i] = mask.double()
            assert torch.equal(before[i] > 0, mask)
            age[i] += mask
            first[i] = torch.where(mask, 0.9 * first[i] + 0.1 * grad, 0.0)
            second[i] = torch.where(mask, 0.999 * second[i] + 0.001 * grad**2, 0.0)
            m, v = first[i] / (1 - 0.9 ** age[i]), second[i] / (1 - 0.999 ** age[i])
            step = torch.where(mask, m / (v.sqrt() + eps), free * grad.sign())
            w.mul_(1 - lr * decay).sub_(lr * scale * step)
        assert distance(params, dense) < 1e-12


@pytest.mark.parametrize("free", ["sign", "sgd", "none"])
@pytest.mark.parametrize("projection", ["svd", "random"])
def test_spans_follow_the_rule_written_out_with_projection_matrices(projection, free):
    gap, eps = 3, 1e-3
    params = weights()
    options = {"lr": 0.1, "update_gap": gap, "eps": eps, "projection": projection, "free": free, "density": 0.5}
    optimiser = projectable(params, free_lr_scale=0.7, **options)
    dense = [p.detach().clone() for p in params]
    moments = [None] * len(dense)
    for k, grads in enumerate(gradients(steps=7)):
        descend(params, optimiser, [grads])
        for i, (w, grad) in enumerate(zip(dense, grads, strict=True)):
            q = optimiser.state[params[i]]["projector"]
            torch.testing.assert_close(q @ q.T, torch.eye(len(q), dtype=q.dtype))
            right = w.shape[0] >= w.shape[1]
            low = grad @ q.T if right else q @ grad
            m, v, t = (0.0, 0.0, 0) if k % gap == 0 else moments[i]
            m, v, t = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2, t + 1
            moments[i] = m, v, t
            update = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + eps)
            inside = grad @ q.T @ q if right else q.T @ q @ grad
            rest = {"sign": (grad - inside).sign(), "sgd": grad - inside, "none": torch.zeros_like(grad)}[free]
            w -= 0.1 * ((update @ q if right else q.T @ update) + 0.7 * rest)
        assert distance(params, dense) < 1e-12


def test_svd_takes_the_directions_with_most_of_the_gradient():
    params = weights()
    grads = gradients(steps=1)
    optimiser = projectable(params, projection="svd", density=0.5)
    descend(params, optimiser, grads)
    for p, grad in zip(params, grads[0], strict=True):
        q = optimiser.state[p]["projector"]
        low = grad @ q.T if p.shape[0] >= p.shape[1] else q @ grad
        strongest = torch.linalg.svdvals(grad)[: len(q)]
        torch.testing.assert_close(torch.linalg.svdvals(low), strongest)


@pytest.mark.parametrize("projection", ["block", *COORDINATES])
def test_with_all_state_and_no_refresh_it_is_adamw(projection):
    params, same = weights(), weights()
    options = {"lr": 0.01, "weight_decay": 0.1}
    descend(params, projectable(params, density=1.0, projection=projection, **options), gradients())
    descend(same, torch.optim.AdamW(same, **options), gradients())
    assert distance(params, same) < 1e-12


@pytest.mark.parametrize("on_refresh", ["reproject", "reset", "keep"])
@pytest.mark.parametrize("projection", COORDINATES)
def test_with_all_state_and_refreshes_it_is_adamw_when_moments_are_reprojected_or_kept(projection, on_refresh):
    # all coordinates stay, and sorted indices name them in the same order: only "reset" forgets
    params, same = weights(), weights()
    optimiser = projectable(
        params, lr=0.01, density=1.0, update_gap=5, projection=projection, on_refresh=on_refresh, weight_decay=0.1
    )
    descend(params, optimiser, gradients())
    descend(same, torch.optim.AdamW(same, lr=0.01, weight_decay=0.1), gradients())
    assert (distance(params, same) < 1e-12) == (on_refresh != "reset")


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_a_span_that_comes_back_reprojected_is_as_if_it_had_stayed(shape):
    left, right = (torch.linalg.qr(grad)[0] for grad in gradients([(6, 4), (4, 4)], 1)[0])
    scales = gradients([(12, 4)], 1)[0][0]
    scales = scales.sign() * (1 + 0.5 * scales.abs().clamp(max=1))
    sizes = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)  # the same leading directions at every step
    steps = [left @ torch.diag(scale * sizes) @ right.T for scale in scales]
    steps = [[grad if shape == (6, 4) else grad.T.contiguous()] for grad in steps]
    runs = {}
    for on_refresh, gap in (("reproject", 1), ("reset", 1), ("reset", 100)):
        params = weights([shape])
        optimiser = projectable(params, projection="svd", density=0.5, update_gap=gap, on_refresh=on_refresh)
        runs[on_refresh, gap] = descend(params, optimiser, steps)
    assert distance(runs["reproject", 1], runs["reset", 100]) < 1e-12
    assert distance(runs["reset", 1], runs["reset", 100]) > 1e-4


def test_density_zero_is_sign_descent_without_any_state():
    for projection in KINDS:
        params, dense = weights(), weights()
        optimiser = projectable(params, lr=0.1, density=0.0, projection=projection, proj_lr_scale=0.5)
        descend(params, optimiser, gradients())
        for grads in gradients():
            for w, grad in zip(dense, grads, strict=True):
                w.data -= 0.1 * 0.5 * grad.sign()
        assert distance(params, dense) < 1e-14
        assert state_memory(optimiser).scalars == 0
        assert optimiser.active_fraction() == 0


def test_sgdm_is_torchs_sgd_and_its_momentum_starts_at_zero():
    params, same = weights(), weights()
    descend(params, projectable(params, lr=0.1, density=1.0, full="sgdm"), gradients())
    descend(same, torch.optim.SGD(same, lr=0.1, momentum=0.9), gradients())
    assert distance(params, same) < 1e-14
    regular, same = weights(), weights()
    with pytest.warns(UserWarning, match="projectable=True"):
        optimiser = Frugal(regular, lr=0.1, full="sgdm")
    descend(regular, optimiser, gradients())
    descend(same, torch.optim.SGD(same, lr=0.1, momentum=0.9), gradients())
    assert distance(regular, same) < 1e-14


def test_lion_is_its_two_lines():
    params, dense = weights(), weights()
    descend(params, projectable(params, lr=0.1, density=1.0, full="lion", betas=(0.8, 0.95)), gradients())
    moments = [torch.zeros_like(w) for w in dense]
    for grads in gradients():
        for w, m, grad in zip(dense, moments, grads, strict=True):
            w.data -= 0.1 * (0.8 * m + 0.2 * grad).sign()
            m.mul_(0.95).add_(grad, alpha=0.05)
    assert distance(params, dense) < 1e-14


def test_regular_groups_are_adamw_at_their_own_rate():
    regular, projected, same = weights(), weights(), weights()
    optimiser = Frugal(
        [{"params": regular, "lr": 0.05}, {"params": projected, "projectable": True}], lr=0.1, proj_lr_scale=0.25
    )
    descend([*regular, *projected], optimiser, [[*grads, *grads] for grads in gradients()])
    descend(same, torch.optim.AdamW(same, lr=0.05, weight_decay=0.0), gradients())
    assert distance(regular, same) < 1e-12


# --------------------------------------------------------------------------------------------------------------------
# Which tensors and coordinates


def active_blocks(order, n, density, refreshes):
    params = weights([(3, 3)] * n)
    optimiser = projectable(params, density=density, update_gap=1, block_order=order)
    chosen = []
    for grads in gradients([(3, 3)] * n, refreshes):
        descend(params, optimiser, [grads])
        chosen.append({k for k, p in enumerate(params) if optimiser.state.get(p)})
    return chosen


def test_order_of_blocks():
    assert active_blocks("ascending", 5, 0.4, 4) == [{0, 1}, {2, 3}, {4, 0}, {1, 2}]
    assert active_blocks("descending", 5, 0.4, 4) == [{4, 3}, {2, 1}, {0, 4}, {3, 2}]
    assert active_blocks("mirror", 8, 0.5, 3) == [{0, 7, 1, 6}, {2, 5, 3, 4}, {0, 7, 1, 6}]
    assert active_blocks("descending", 10, 0.25, 1) == [{9, 8}]  # 2.5 blocks: half to even
    drawn = active_blocks("random", 8, 0.25, 40)
    assert all(len(blocks) == 2 for blocks in drawn)
    counts = [sum(k in blocks for blocks in drawn) for k in range(8)]
    assert min(counts) > 2
    assert len({frozenset(blocks) for blocks in drawn}) > 10


def test_a_block_that_is_active_twice_starts_anew():
    params = weights([(3, 3)])
    optimiser = projectable(params, density=1.0, update_gap=2)
    descend(params, optimiser, gradients([(3, 3)], 3))
    (state,) = optimiser.state.values()
    assert state["step"] == 1
    torch.testing.assert_close(state["exp_avg"], 0.1 * gradients([(3, 3)], 3)[2][0])


@pytest.mark.parametrize("projection", KINDS)
@pytest.mark.filterwarnings("ignore:density:UserWarning")
def test_every_step_has_full_rank(projection):
    generator = torch.Generator().manual_seed(0)
    shapes = [(48, 32), (24, 40)]
    for free, ranks in (("sign", (32, 24)), ("sgd", (32, 24)), ("none", None)):
        start = [torch.randn(shape, generator=generator) for shape in shapes]
        params = [nn.Parameter(w.clone()) for w in start]
        optimiser = projectable(params, projection=projection, density=0.25, free=free, block_order="ascending")
        descend(params, optimiser, gradients(shapes, 1, dtype=torch.float32))
        moves = [p.detach() - w for p, w in zip(params, start, strict=True)]
        got = tuple(int(torch.linalg.matrix_rank(move, rtol=1e-4)) for move in moves)
        # one of the two blocks rounds to none, half to even
        low = {"block": (0, 0), "columns": (8, 10), "rows": (12, 6), "randk": (32, 24)}.get(projection, (8, 6))
        assert got == (ranks or low)


@pytest.mark.parametrize("projection", DIVIDED)
def test_subspaces_change_every_gap_steps_and_differ_between_weights(projection):
    shapes = [(12, 12), (12, 12)]
    params = weights(shapes)
    optimiser = projectable(params, projection=projection, density=0.5, update_gap=4)
    key = "projector" if projection in ("svd", "random") else "indices"
    seen = []
    for grads in gradients(shapes, 9):
        descend(params, optimiser, [grads])
        seen.append([optimiser.state[p][key].clone() for p in params])
    changed = [k for k in range(1, 9) if not torch.equal(seen[k][0], seen[k - 1][0])]
    assert changed == [4, 8]
    assert not torch.equal(seen[0][0], seen[0][1])


def test_draws_depend_on_the_generator_alone():
    def run(generator, noise):
        params = weights()
        optimiser = projectable(params, projection="randk", update_gap=2, generator=generator)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        descend(params, optimiser, gradients())
        assert torch.equal(before, torch.get_rng_state())
        return params

    one = run(torch.Generator().manual_seed(3), 0)
    assert distance(one, run(torch.Generator().manual_seed(3), 1)) == 0
    assert distance(one, run(torch.Generator().manual_seed(4), 0)) > 0
    assert distance(run(None, 0), run(None, 1)) == 0


# --------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("projection", KINDS)
def test_state_has_the_size_of_the_formula(projection, dtype):
    shapes = [(40, 24), (16, 32), (24, 24), (8, 12)]
    projected, regular = weights(shapes, dtype), weights([(10, 6), (6,)], dtype)
    optimiser = Frugal([{"params": regular}, {"params": projected, "projectable": True}], projection=projection)
    descend([*regular, *projected], optimiser, gradients([(10, 6), (6,), *shapes], 1, dtype=dtype))
    width = 8 if dtype == torch.float64 else 4
    total = sum(a * b for a, b in shapes)
    memory = state_memory(optimiser)
    chosen = {
        "columns": sum(b // 4 for _, b in shapes),
        "rows": sum(a // 4 for a, _ in shapes),
        "randk": total // 4,
        "randperm": sum(min(shape) // 4 for shape in shapes),
    }.get(projection, 0)
    basis = sum((min(shape) // 4) * min(shape) for shape in shapes) if projection in ("svd", "random") else 0
    kept = total // 4
    if projection == "block":
        kept = sum(p.numel() for k, p in enumerate(projected) if k in optimiser.param_groups[1]["active"])
    assert memory.moments.scalars == 2 * (66 + kept)
    assert memory.indices.scalars == chosen
    assert memory.projectors.scalars == basis
    assert memory.counters.scalars == 0
    assert memory.bytes == optimiser.state_memory_bytes() == width * (2 * (66 + kept) + basis) + 4 * chosen
    assert optimiser.active_fraction() == kept / total


def test_memory_of_torchs_adamw_is_two_moments():
    params = weights()
    optimiser = torch.optim.AdamW(params)
    assert state_memory(optimiser).scalars == 0
    descend(params, optimiser, gradients())
    assert state_memory(optimiser).moments.scalars == 2 * sum(p.numel() for p in params)
    with pytest.raises(TypeError, match="optimizer must be"):
        state_memory(params)


@pytest.mark.parametrize("full", ["lion", "sgdm"])
def test_rules_with_one_moment_keep_one(full):
    params = weights()
    optimiser = projectable(params, full=full, density=1.0)
    descend(params, optimiser, gradients())
    assert state_memory(optimiser).scalars == sum(p.numel() for p in params)


# --------------------------------------------------------------------------------------------------------------------
# As an optimiser


def grouped(params, **options):
    """Matrices of plain parameters projectable; groups as they are."""
    params = list(params)
    if isinstance(params[0], dict):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Frugal(params, **options)
    groups = [{"params": [p for p in params if p.ndim != 2]}, {"params": [p for p in params if p.ndim == 2]}]
    groups[1]["projectable"] = True
    return Frugal([group for group in groups if group["params"]], **options)


@pytest.mark.parametrize(
    ("projection", "on_refresh"),
    [*((kind, "reset") for kind in KINDS), *itertools.product(["columns", "svd"], ["keep", "reproject"])],
)
@pytest.mark.filterwarnings("ignore:density:UserWarning")
def test_contract(projection, on_refresh):
    optimizer_contract.check_optimizer(
        lambda params: grouped(
            params, lr=1e-2, density=0.4, update_gap=2, projection=projection, on_refresh=on_refresh
        ),
        steps=4,
    )


@pytest.mark.parametrize("order", ["descending", "ascending", "random"])
@pytest.mark.parametrize("full", ["lion", "sgdm"])
@pytest.mark.filterwarnings("ignore:density:UserWarning")
def test_contract_of_orders_and_other_rules(order, full):
    optimizer_contract.check_optimizer(
        lambda params: grouped(params, lr=1e-3, density=0.4, update_gap=2, block_order=order, full=full, free="sgd"),
        steps=4,
    )


@pytest.mark.parametrize("projection", KINDS)
def test_sixteen_bit_training_continues_from_a_file_with_the_same_bits(projection):
    steps = gradients(dtype=torch.bfloat16)
    options = {"projection": projection, "density": 0.5, "update_gap": 3, "lr": 0.1}
    whole, first = weights(dtype=torch.bfloat16), weights(dtype=torch.bfloat16)
    descend(whole, projectable(whole, **options), steps)
    optimiser = projectable(first, **options)
    descend(first, optimiser, steps[:7])
    file = io.BytesIO()
    torch.save(optimiser.state_dict(), file)
    file.seek(0)
    resumed = projectable(first, generator=torch.Generator().manual_seed(5), **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for p in first:
        for name, value in optimiser.state.get(p, {}).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state[p][name])), name
            assert not isinstance(value, torch.Tensor) or value.dtype in (torch.float32, torch.int32)
    descend(first, resumed, steps[7:])
    assert distance(whole, first) == 0


def test_a_copy_goes_on_by_itself():
    params = weights()
    optimiser = projectable(params, projection="randk", update_gap=2)
    descend(params, optimiser, gradients()[:5])
    copied = copy.deepcopy(optimiser)
    again = [p for group in copied.param_groups for p in group["params"]]
    descend(again, copied, gradients()[5:])
    descend(params, optimiser, gradients()[5:])
    assert distance(params, again) == 0


@pytest.mark.parametrize("projection", KINDS)
def test_a_weight_without_gradient_at_a_refresh_gets_its_subspace_later(projection):
    params = weights([(6, 4)] * 4)
    optimiser = projectable(params, projection=projection, density=0.5, update_gap=3)
    steps = gradients([(6, 4)] * 4, 6)
    for k in (0, 1, 3):
        steps[k][1] = None
    before = params[1].detach().clone()
    descend(params, optimiser, steps[:2])
    assert torch.equal(params[1], before)
    descend(params, optimiser, steps[2:])
    assert not torch.equal(params[1], before)
    if projection != "block":
        assert optimiser.state[params[1]]["step"] == 2  # the refresh at step 3 came for it at step 4


@pytest.mark.parametrize("projection", KINDS)
def test_batches_change_no_bit_and_gradients_stay(projection, monkeypatch):
    whole, split = weights(), weights()
    steps = gradients()
    descend(whole, projectable(whole, projection=projection, density=0.5, update_gap=3), steps)
    monkeypatch.setitem(frugal_optimizer.BATCH, "cpu", 1)
    descend(split, projectable(split, projection=projection, density=0.5, update_gap=3), steps)
    assert distance(whole, split) == 0
    assert all(torch.equal(p.grad, grad) for p, grad in zip(split, steps[-1], strict=True))


@pytest.mark.parametrize("projection", KINDS)
def test_layout_in_memory_does_not_matter(projection):
    params = weights()
    turned = [nn.Parameter(p.detach().T.contiguous().T) for p in params]
    assert not turned[0].is_contiguous()
    options = {"projection": projection, "density": 0.5, "update_gap": 3}
    descend(params, projectable(params, **options), gradients())
    descend(turned, projectable(turned, **options), gradients())
    descend(turned, projectable(turned, **options), [])
    assert distance(params, turned) < 1e-12
    mixed = weights()
    optimiser = projectable(mixed, **options)
    for grads in gradients():
        for p, grad in zip(mixed, grads, strict=True):
            p.grad = grad.T.contiguous().T
        optimiser.step()
    assert distance(params, mixed) < 1e-12


def test_a_schedule_moves_both_rates():
    params = weights()
    optimiser = projectable(params, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.0 if step else 1.0)
    descend(params, optimiser, gradients(steps=1))
    schedule.step()
    before = [p.detach().clone() for p in params]
    descend(params, optimiser, gradients(steps=3))
    assert distance(params, before) == 0


def test_a_sparse_gradient_is_refused_before_anything_moves():
    params = weights()
    optimiser = projectable(params)
    for p, grad in zip(params, gradients(steps=1)[0], strict=True):
        p.grad = grad
    params[3].grad = params[3].grad.to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse"):
        optimiser.step()
    assert distance(params, weights()) == 0


# --------------------------------------------------------------------------------------------------------------------
# Groups


class Conv1D(nn.Module):
    """Stands for the layer of GPT-2, which is recognised by its name."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 6))
        self.bias = nn.Parameter(torch.zeros(6))


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 4), "c_fc": Conv1D()}) for _ in range(2)])
        self.layers.append(self.layers[0])  # a shared layer counts once
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 10, bias=False)
        self.out = nn.Linear(4, 10, bias=False)
        if tied:
            self.layers[1]["q_proj"].weight = nn.Parameter(torch.zeros(10, 4))
            self.embed_tokens.weight = self.layers[1]["q_proj"].weight

    def get_output_embeddings(self):
        return self.out


def test_groups_of_a_model():
    model = Model()
    regular, projected = frugal_param_groups(model)
    assert not regular["projectable"]
    wanted = [model.layers[i][name].weight for i in range(2) for name in ("q_proj", "c_fc")]
    assert [id(p) for p in projected["params"]] == [id(p) for p in wanted]
    assert len(regular["params"]) + 4 == len(list(model.parameters()))
    assert {id(model.lm_head.weight), id(model.out.weight)} <= {id(p) for p in regular["params"]}
    model.layers[0]["c_fc"].weight.requires_grad_(False)
    targeted = frugal_param_groups(model, targets=("c_fc",))
    assert [id(p) for p in targeted[1]["params"]] == [id(model.layers[1]["c_fc"].weight)]
    assert len(targeted[0]["params"]) == len(list(model.parameters())) - 2
    (only,) = frugal_param_groups(nn.Sequential(nn.Linear(3, 3, bias=False)))
    assert only["projectable"]


def test_a_tied_weight_is_regular():
    model = Model(tied=True)
    regular, projected = frugal_param_groups(model)
    assert id(model.embed_tokens.weight) in {id(p) for p in regular["params"]}
    assert len(projected["params"]) == 3


def test_a_model_without_projectable_weights_is_refused_with_the_names_of_its_layers():
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj"):
        frugal_param_groups(Model(), targets=["nothing"])
    with pytest.raises(ValueError, match="linear layers are none"):
        frugal_param_groups(nn.Embedding(3, 4))
    with pytest.raises(TypeError, match="got list"):
        frugal_param_groups([nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="exclude must be a list of strings"):
        frugal_param_groups(Model(), exclude="lm_head")


# --------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be at least 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr must be"),
        ({"lr": "0.1"}, TypeError, "lr must be a number"),
        ({"density": 1.5}, ValueError, "density must be at least 0 and at most 1, got 1.5"),
        ({"update_gap": 0}, ValueError, "update_gap must be at least 1"),
        ({"update_gap": 2.0}, TypeError, "update_gap must be an integer"),
        ({"projection": "galore"}, ValueError, "projection must be one of 'block', 'columns'"),
        ({"full": "adam"}, ValueError, "full must be one of"),
        ({"free": "no"}, ValueError, "free must be one of 'sign', 'sgd', 'none'"),
        ({"free_lr_scale": -0.1}, ValueError, "free_lr_scale"),
        ({"proj_lr_scale": float("inf")}, ValueError, "proj_lr_scale"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be"),
        ({"betas": 0.9}, TypeError, "betas must be two numbers"),
        ({"eps": -1e-8}, ValueError, "eps must be"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be"),
        ({"on_refresh": "forget"}, ValueError, "on_refresh must be one of"),
        ({"on_refresh": "keep"}, ValueError, "on_refresh must be 'reset' when projection is 'block'"),
        ({"block_order": "up"}, ValueError, "block_order must be one of"),
        ({"block_order": "mirror", "density": 0.75}, ValueError, "even number of blocks, density gives 3 of 4"),
        ({"generator": 0}, TypeError, "generator must be a torch.Generator"),
    ],
)
def test_bad_options_are_named(change, error, message):
    with pytest.raises(error, match=message):
        projectable(weights(), **change)


def test_bad_parameters_are_named():
    with pytest.raises(ValueError, match=r"projectable params must be matrices, got shapes \[\(4,\)\]"):
        projectable(weights([(4,)]))
    with pytest.raises(TypeError, match="params must be real"):
        projectable([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="projectable must be one of"):
        Frugal([{"params": weights(), "projectable": "yes"}])
    optimiser = projectable(weights())
    with pytest.raises(ValueError, match="density"):
        optimiser.add_param_group({"params": weights(), "density": 2.0})
    assert len(optimiser.param_groups) == 1


def test_a_density_that_rounds_to_nothing_warns():
    with pytest.warns(UserWarning, match=r"density=0.1 rounds to no state for 4 of 4 projectable tensors"):
        projectable(weights(), density=0.1)
    with pytest.warns(UserWarning, match=r"density=0.2 rounds to no state for 1 of 4 .* projection='columns'"):
        projectable(weights(), density=0.2, projection="columns")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        projectable(weights(), density=0.0)


def test_named_parameters_are_accepted():
    model = nn.Linear(4, 4)
    optimiser = Frugal(
        [{"params": [("bias", model.bias)]}, {"params": [("weight", model.weight)], "projectable": True}],
        projection="columns",
    )
    assert optimiser.param_groups[1]["param_names"] == ["weight"]
