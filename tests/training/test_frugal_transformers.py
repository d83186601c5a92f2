"""FRUGAL beside the packages of its rivals, on a transformers model, and under its Trainer."""

import warnings

import pytest
import torch
from torch import nn

from workingpapers.training.frugal import Frugal, frugal_param_groups, trainer_optimizers

transformers = pytest.importorskip("transformers")


def run(make, shapes, steps=24, dtype=torch.float32):
    """Weights after given gradients, with the optimiser that `make` builds on them."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]
    optimiser = make(params)
    for _ in range(steps):
        for p in params:
            grad = torch.randn(p.shape, generator=generator, dtype=dtype)
            p.grad = grad if p.requires_grad else None
        optimiser.step()
    return params


def test_galore_is_a_special_case():
    galore = pytest.importorskip("galore_torch")
    shapes = [(8, 8), (12, 8), (8, 16)]

    def ours(params):
        groups = [{"params": params, "projectable": True}]
        options = {"projection": "svd", "free": "none", "on_refresh": "keep", "proj_lr_scale": 0.5}
        return Frugal(groups, lr=0.01, density=0.25, update_gap=6, eps=0.0, **options)

    def theirs(params):
        groups = [{"params": params, "rank": 2, "update_proj_gap": 6, "scale": 0.5, "proj_type": "std"}]
        return galore.GaLoreAdamW(groups, lr=0.01, eps=0.0, no_deprecation_warning=True)

    for one, other in zip(run(ours, shapes), run(theirs, shapes), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def test_badam_is_a_special_case():
    badam = pytest.importorskip("badam")
    shapes = [(5, 4)] * 4

    def ours(params):
        groups = [{"params": params, "projectable": True}]
        return Frugal(groups, lr=0.01, density=0.25, update_gap=3, free="none", block_order="descending")

    def theirs(params):
        named = [(f"layers.{k}.weight", p) for k, p in enumerate(params)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it would like 16 bits
            base = torch.optim.AdamW(params, lr=0.01, weight_decay=0.0)
            optimiser = badam.BlockOptimizer(base, named, [[name] for name, _ in named], switch_block_every=3)
        optimiser.global_step = -1  # its first block would otherwise have one step less than the others
        return optimiser

    for one, other in zip(run(ours, shapes), run(theirs, shapes), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def test_groups_of_a_llama():
    model = llama()
    regular, projected = frugal_param_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(projected["params"]) == 2 * 7
    assert all("_proj" in names[id(p)] for p in projected["params"])
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= {names[id(p)] for p in regular["params"]}


def arguments(path, **changes):
    options = {
        "learning_rate": 5e-3,
        "max_steps": 8,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 4,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "report_to": [],
        "save_steps": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return transformers.TrainingArguments(output_dir=str(path), **(options | changes))


def test_trainer_trains_with_it_and_resumes_with_the_same_bits(tmp_path):
    tokens = torch.randint(32, (64, 8), generator=torch.Generator().manual_seed(1))
    dataset = [{"input_ids": row, "labels": row} for row in tokens]

    def trainer():
        model, args = llama(), arguments(tmp_path)
        made = trainer_optimizers(model, args, density=0.25, update_gap=3, projection="randk")
        return transformers.Trainer(model, args, train_dataset=dataset, optimizers=made)

    whole = trainer()
    whole.train()
    optimiser = whole.optimizer.optimizer if hasattr(whole.optimizer, "optimizer") else whole.optimizer
    assert isinstance(optimiser, Frugal)
    assert optimiser.param_groups[1]["betas"] == (0.9, 0.95)
    assert optimiser.param_groups[1]["weight_decay"] == 0.1
    assert optimiser.param_groups[1]["refreshes"] == 3
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)  # the end of the cosine
    moved = [
        float((p - q).detach().abs().max()) for p, q in zip(whole.model.parameters(), llama().parameters(), strict=True)
    ]
    assert min(moved) > 1e-4

    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_number_of_steps_must_be_known(tmp_path):
    with pytest.raises(ValueError, match=r"num_training_steps must be given when args\.max_steps is not set"):
        trainer_optimizers(llama(), arguments(tmp_path, max_steps=-1))
    with pytest.raises(ValueError, match="num_training_steps must be at least 1"):
        trainer_optimizers(llama(), arguments(tmp_path), num_training_steps=0)
    optimiser, schedule = trainer_optimizers(llama(), arguments(tmp_path), num_training_steps=4, lr=1.0, density=0.5)
    assert optimiser.param_groups[1]["density"] == 0.5
    rates = []
    for _ in range(4):
        rates.append(schedule.get_last_lr()[1])
        optimiser.step()
        schedule.step()
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5])
