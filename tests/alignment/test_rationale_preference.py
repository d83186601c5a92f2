"""The losses: identities, agreement with trl, limits, and what is refused."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from workingpapers.alignment import RationaleLoss, RPOLoss, TokenPair, collate_preferences, data_efficiency
from workingpapers.alignment.preferences import pair_logprobs
from workingpapers.alignment.rationale_preference import orpo_losses, pairs_needed, simpo_losses
from workingpapers.alignment.rationale_preference.losses import BASES, log1mexp

BATCH = 6


def example(seed=0, dtype=torch.float64):
    """Arguments of any base: summed log-probabilities of short answers and of a longer rationale, and lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(2, 9, (BATCH,), generator=generator) for _ in range(3)]
    logps = [
        -length * (0.2 + torch.rand(BATCH, generator=generator, dtype=dtype)).requires_grad_() for length in lengths
    ]
    references = [(logps[side] - torch.rand(BATCH, generator=generator, dtype=dtype)).detach() for side in (0, 1)]
    names = ("chosen_lengths", "rejected_lengths", "rationale_lengths")
    return [*logps, *references], dict(zip(names, lengths, strict=True))


def evaluate(seed=0, **options):
    logps, lengths = example(seed)
    return RationaleLoss(**options)(*logps, **lengths)


def gradients(loss, logps):
    return torch.autograd.grad(loss, logps, retain_graph=True, allow_unused=True)


# ---------------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("link", ["linear", "logsigmoid"])
@pytest.mark.parametrize("base", BASES)
def test_gamma_zero_is_the_base_to_the_last_bit(base, link):
    logps, lengths = example(dtype=torch.float32)
    out = RationaleLoss(base, beta=0.3, gamma=0.0, rationale_link=link, reduction="none")(*logps, **lengths)
    without = RationaleLoss(base, beta=0.3, gamma=0.0, reduction="none")(*logps[:2], None, *logps[3:], **lengths)
    chosen, rejected = logps[0] / lengths["chosen_lengths"], logps[1] / lengths["rejected_lengths"]
    if base == "dpo":
        expected = RPOLoss(0.3, eta=0.0, reduction="none")(logps[0], logps[1], logps[3], logps[4]).loss
    elif base == "orpo":
        tokens = lengths["chosen_lengths"].sum()
        expected = orpo_losses(chosen, rejected, beta=0.3) - logps[0] / (tokens / BATCH)
    else:
        expected = simpo_losses(chosen, rejected, beta=0.3, margin=0.5)
    assert torch.equal(out.loss, expected)
    assert torch.equal(without.loss, expected)
    assert (out.rationale_loss == 0).all()
    assert gradients(out.loss.sum(), logps[2:3]) == (None,)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("of", ["sum", "mean"])
def test_the_linear_term_is_the_weighted_likelihood_of_the_rationale_and_leaves_the_answers_alone(base, of):
    logps, lengths = example()
    score = logps[2] if of == "sum" else logps[2] / lengths["rationale_lengths"]
    with_, without = (
        RationaleLoss(base, gamma=gamma, rationale_reduction=of, reduction="none")(*logps, **lengths)
        for gamma in (0.7, 0.0)
    )
    torch.testing.assert_close(with_.loss - without.loss, -0.7 * score)
    for ours, bare in zip(
        gradients(with_.loss.sum(), logps[:2]), gradients(without.loss.sum(), logps[:2]), strict=True
    ):
        torch.testing.assert_close(ours, bare)


def test_the_slope_of_the_logsigmoid_link_lies_between_gamma_and_half_of_it():
    scores = torch.linspace(-400.0, 0.0, 401, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(401, dtype=torch.float64)
    out = RationaleLoss(gamma=0.1, rationale_link="logsigmoid", reduction="sum")(zeros, zeros, scores, zeros, zeros)
    (slope,) = gradients(out.loss, [scores])
    assert slope.min() >= -0.1
    assert slope.max() <= -0.05
    assert slope[0] == pytest.approx(-0.1, rel=1e-12)
    assert slope[-1] == pytest.approx(-0.05)
    torch.testing.assert_close(out.rationale_loss, torch.log1p(torch.exp(-0.1 * scores)))


def test_dpo_by_hand():
    logps = [torch.tensor([value]) for value in (-3.0, -5.0, -8.0, -4.0, -4.0)]
    out = RationaleLoss("dpo", beta=0.5, gamma=0.1)(*logps, rationale_lengths=torch.tensor([4]))
    preference = math.log1p(math.exp(-0.5 * (1.0 - -1.0)))
    assert out.preference_loss.item() == pytest.approx(preference)
    assert out.rationale_loss.item() == pytest.approx(0.8)
    assert out.loss.item() == pytest.approx(preference + 0.8)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item(), out.margin.item()) == (0.5, -0.5, 1.0)
    assert out.rationale_perplexity.item() == pytest.approx(math.exp(2.0))
    assert out.sft_loss is None


def test_orpo_by_hand():
    # mean log-probabilities log 0.8 and log 0.5: odds 4 and 1
    lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([3])}
    logps = [torch.tensor([2 * math.log(0.8)]), torch.tensor([3 * math.log(0.5)]), torch.tensor([-4.0])]
    out = RationaleLoss("orpo", beta=0.1, gamma=0.01)(*logps, **lengths)
    assert out.preference_loss.item() == pytest.approx(-0.1 * math.log(4 / 5), rel=1e-5)
    assert out.sft_loss.item() == pytest.approx(-math.log(0.8))
    assert out.loss.item() == pytest.approx(-0.1 * math.log(4 / 5) - math.log(0.8) + 0.04, rel=1e-5)
    assert out.rationale_perplexity is None


def test_simpo_by_hand():
    lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([4])}
    out = RationaleLoss("simpo", beta=2.0, gamma=0.0, simpo_margin=0.7)(
        torch.tensor([-1.0]), torch.tensor([-6.0]), None, **lengths
    )
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-(2.0 * (-0.5 + 1.5) - 0.7))))
    assert out.margin.item() == pytest.approx(2.0)


def test_without_the_preference_term_rationales_alone_are_learned():
    logps, lengths = example()
    out = RationaleLoss("dpo", gamma=0.3, preference_weight=0.0, reduction="sum")(*logps, **lengths)
    assert out.loss.item() == pytest.approx(-0.3 * logps[2].sum().item())
    assert out.preference_loss.mean() > 0  # still reported
    assert all((slope == 0).all() for slope in gradients(out.loss, logps[:2]))
    with_nll = RationaleLoss("orpo", gamma=0.3, preference_weight=0.0, reduction="none")(*logps, **lengths)
    torch.testing.assert_close(with_nll.loss, with_nll.sft_loss - 0.3 * logps[2])


@pytest.mark.parametrize("base", BASES)
def test_parts_of_a_batch_add_up_to_the_whole(base):
    logps, lengths = example()
    crit = RationaleLoss(base, gamma=0.2, reduction="sum")
    whole = crit(*logps, **lengths).loss
    mean_length = lengths["chosen_lengths"].double().mean().item()
    parts = [
        crit(
            *(values[rows] for values in logps),
            **{name: values[rows] for name, values in lengths.items()},
            mean_chosen_length=mean_length,
        ).loss
        for rows in (slice(0, 2), slice(2, BATCH))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_reductions_and_presets():
    each, total, mean = (evaluate(base="orpo", reduction=name).loss for name in ("none", "sum", "mean"))
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(each.mean(), mean)
    assert "base='dpo', beta=0.1, gamma=0.001, rationale_reduction='sum', rationale_link='linear'" in repr(
        RationaleLoss.paper()
    )
    assert RationaleLoss.paper("simpo").beta == 2.0
    assert RationaleLoss.official("dpo").rationale_link == "logsigmoid"
    orpo = RationaleLoss.official("orpo")
    assert (orpo.rationale_link, orpo.rationale_reduction, orpo.gamma) == ("linear", "mean", 1.0)
    assert RationaleLoss("dpo").needs_reference
    assert not orpo.needs_reference
    with pytest.raises(ValueError, match="base must be one of 'dpo', 'orpo', got 'simpo'"):
        RationaleLoss.official("simpo")


# ------------------------------------------------------------------------------------------------- numbers at the edge


def test_log1mexp_is_accurate_and_differentiable_over_the_whole_range():
    mpmath = pytest.importorskip("mpmath")
    values = [-1e-15, -1e-9, -1e-3, -0.5, -math.log(2.0), -0.7, -5.0, -40.0, -700.0]
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    found = log1mexp(x)
    (slope,) = gradients(found.sum(), [x])
    with mpmath.workdps(400):
        exact = [float(mpmath.log(1 - mpmath.exp(value))) for value in values]
        slopes = [float(-1 / (mpmath.exp(-value) - 1)) for value in values]
    np.testing.assert_allclose(found.detach(), exact, rtol=1e-14)
    np.testing.assert_allclose(slope, slopes, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_answers_and_hopeless_ones_give_finite_losses_and_gradients(dtype):
    chosen = torch.tensor([0.0, -1e-9, -400.0, 1e-4, 0.0], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-400.0, 0.0, -1e-9, 0.0, 0.0], dtype=dtype, requires_grad=True)
    ones = torch.ones(5, dtype=torch.int64)
    out = RationaleLoss("orpo", gamma=0.0, reduction="sum")(
        chosen, rejected, None, chosen_lengths=ones, rejected_lengths=ones
    )
    assert out.loss.isfinite()
    for slope in gradients(out.loss, [chosen, rejected]):
        assert slope.isfinite().all()
    assert gradients(out.loss, [rejected])[0][2] > 0  # a certain rejected answer is still pushed down


# ------------------------------------------------------------------------------------------------------------ with trl


def test_orpo_equals_that_of_trl():
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    logps, lengths = example(dtype=torch.float32)
    means = logps[0] / lengths["chosen_lengths"], logps[1] / lengths["rejected_lengths"]
    stand_in = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device="cpu"))
    losses, chosen, rejected, _, _ = trainer.odds_ratio_loss(stand_in, *means)
    out = RationaleLoss("orpo", beta=0.25, gamma=0.0)(*logps[:2], None, **lengths)
    torch.testing.assert_close(-out.preference_loss, losses, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.chosen_rewards, chosen, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.rejected_rewards, rejected, atol=1e-5, rtol=0)


def test_simpo_equals_that_of_trl():
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    logps, lengths = example(dtype=torch.float32)
    means = logps[0] / lengths["chosen_lengths"], logps[1] / lengths["rejected_lengths"]
    settings = {"beta": 2.5, "alpha": 0.0, "loss_type": "simpo", "simpo_gamma": 1.4, "label_smoothing": 0.0}
    stand_in = SimpleNamespace(**settings, accelerator=SimpleNamespace(device="cpu"))
    losses, chosen, rejected = trainer.cpo_loss(stand_in, *means)
    out = RationaleLoss("simpo", beta=2.5, gamma=0.0, simpo_margin=1.4)(*logps[:2], None, **lengths)
    torch.testing.assert_close(out.preference_loss, losses, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.margin, chosen - rejected, atol=1e-5, rtol=0)


def test_dpo_equals_that_of_trl(tmp_path):
    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    datasets, tokenizers = pytest.importorskip("datasets"), pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        models.append(transformers.LlamaForCausalLM(config))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "<e>": 1}, merges=[]))
    trainer = dpo.DPOTrainer(
        *models,
        args=dpo.DPOConfig(
            output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, disable_dropout=True, beta=0.3
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "a", "rejected": "aa"}]),
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>"),
    )
    pairs = [TokenPair([1, 2], [3, 4, 5], [6]), TokenPair([7], [8, 9, 2], [10])]
    inputs = trainer.data_collator(
        [{"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected} for pair in pairs]
    )
    theirs = trainer._compute_loss(trainer.model, inputs, False).item()
    batch = collate_preferences(pairs)
    with torch.no_grad():
        policy, reference = (pair_logprobs(model, batch) for model in models)
    out = RationaleLoss("dpo", beta=0.3, gamma=0.5)(*policy, torch.tensor([-2.0, -4.0]), *reference)
    assert out.preference_loss.mean().item() == pytest.approx(theirs, abs=1e-5)
    assert out.loss.item() == pytest.approx(theirs + 1.5, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "ipo"}, "base must be one of 'dpo', 'orpo', 'simpo', got 'ipo'"),
        ({"beta": 0.0}, "beta must be above 0, got 0.0"),
        ({"beta": math.nan}, "beta must be above 0, got nan"),
        ({"gamma": -0.1}, "gamma must be at least 0, got -0.1"),
        ({"rationale_reduction": "max"}, "rationale_reduction must be one of"),
        ({"rationale_link": "sigmoid"}, "rationale_link must be one of"),
        ({"preference_weight": -1.0}, "preference_weight must be at least 0"),
        ({"simpo_margin": -1.0}, "simpo_margin must be at least 0"),
        ({"reduction": "max"}, "reduction must be one of"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RationaleLoss(**options)


@pytest.mark.parametrize(
    ("options", "place", "value", "message"),
    [
        ({}, 2, None, "policy_rationale_logps must be given when gamma > 0"),
        ({}, 3, None, "ref_chosen_logps and ref_rejected_logps must be given when base='dpo'"),
        ({}, 2, torch.zeros(2), r"policy_rationale_logps must have shape \(batch,\) like policy_chosen_logps \(6,\)"),
        ({}, 2, torch.full((BATCH,), math.nan), "policy_rationale_logps must be finite log-probabilities"),
        ({}, 0, torch.ones(BATCH), "policy_chosen_logps must be finite log-probabilities, at most 0"),
        ({"base": "orpo"}, "chosen_lengths", None, "chosen_lengths must be given when base='orpo'"),
        ({"base": "simpo"}, "rejected_lengths", None, "rejected_lengths must be given when base='simpo'"),
        ({"base": "simpo"}, "rejected_lengths", torch.zeros(BATCH), "rejected_lengths must be at least 1, got 0"),
        (
            {"rationale_reduction": "mean"},
            "rationale_lengths",
            None,
            "rationale_lengths must be given when rationale_reduction='mean'",
        ),
        ({"base": "orpo"}, "mean_chosen_length", 0.5, "mean_chosen_length must be at least 1"),
    ],
)
def test_bad_arguments_are_named(options, place, value, message):
    logps, lengths = example()
    if isinstance(place, int):
        logps[place] = value
    else:
        lengths[place] = value
    with pytest.raises(ValueError, match=message):
        RationaleLoss(**options)(*logps, **lengths)


@pytest.mark.parametrize("base", BASES)
def test_arguments_stay_as_they_were(base):
    logps, lengths = example()
    before = [values.detach().clone() for values in (*logps, *lengths.values())]
    RationaleLoss(base)(*logps, **lengths).loss.backward()
    for values, kept in zip((*logps, *lengths.values()), before, strict=True):
        assert torch.equal(values, kept)


# ----------------------------------------------------------------------------------------------------- data efficiency


def test_the_curve_is_interpolated_between_sizes_in_the_logarithm():
    asked = []

    def train(size):
        asked.append(size)
        return size

    found = data_efficiency(train, [10, 40, 160], lambda size: {10: 0.5, 40: 0.6, 160: 0.8}[size], target=0.7)
    assert asked == [10, 40, 160]
    assert found.scores == (0.5, 0.6, 0.8)
    assert found.reached
    assert found.pairs == pytest.approx(80.0)  # half of the way, in the logarithm
    cheaper = data_efficiency(train, [10, 40], lambda size: 0.4 if size == 10 else 1.0, target=0.7)
    assert cheaper.pairs == pytest.approx(20.0)
    assert cheaper.saving_over(found) == pytest.approx(4.0)


def test_a_lucky_run_does_not_reach_the_target():
    assert pairs_needed([10, 20, 40, 80], [0.9, 0.5, 0.5, 0.9], 0.7) == pytest.approx(40 * math.sqrt(2.0))
    assert pairs_needed([10, 20, 40], [0.9, 0.9, 0.6], 0.7) == math.inf
    assert pairs_needed([10, 20], [0.7, 0.8], 0.7) == 10.0


def test_savings_where_the_target_is_out_of_reach():
    reaches, fails = (data_efficiency(lambda n: n, [1, 2], lambda n, top=top: n * top, 1.0) for top in (1.0, 0.1))
    assert not fails.reached
    assert fails.pairs == math.inf
    assert reaches.saving_over(fails) == math.inf
    assert fails.saving_over(reaches) == 0.0
    assert math.isnan(fails.saving_over(fails))
    with pytest.raises(ValueError, match="other must have the same target 1, got"):
        reaches.saving_over(data_efficiency(lambda n: n, [1], float, 0.5))


@pytest.mark.parametrize(
    ("sizes", "score", "target", "message"),
    [
        ([], 1.0, 0.5, "sizes must hold increasing numbers of pairs"),
        ([20, 10], 1.0, 0.5, r"sizes must hold increasing numbers of pairs, got \[20, 10\]"),
        ([0, 10], 1.0, 0.5, "sizes must be at least 1"),
        ([10], math.nan, 0.5, "evaluate's score at 10 pairs must be finite"),
        ([10], 1.0, math.inf, "target must be finite"),
    ],
)
def test_bad_curves_are_named(sizes, score, target, message):
    with pytest.raises(ValueError, match=message):
        data_efficiency(lambda size: size, sizes, lambda _: score, target)
    with pytest.raises(ValueError, match="scores must be one per size, got 1 for 2 sizes"):
        pairs_needed([1, 2], [0.5], 0.5)
