"""Training on judged pairs: the losses equal trl's on the same batch, KTO's mismatched pairs, and the whole way."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

from workingpapers.alignment import PreferenceConfig, TokenPair, collate_preferences, pair_logprobs, sample_responses
from workingpapers.alignment.judge_preference import (
    DPO,
    IPO,
    KTO,
    ORPO,
    AlignmentTrainer,
    LengthRegularizedDPO,
    align,
    build_preferences,
)
from workingpapers.alignment.judge_preference.training import mismatched_rows

transformers = pytest.importorskip("transformers")

PAIRS = [
    TokenPair([1, 2], [3, 4, 5], [6]),
    TokenPair([7], [8, 9, 2], [10, 3]),
    TokenPair([5, 4, 3], [2], [9, 9, 9]),
    TokenPair([6], [1, 1], [4]),
]
NAMES = ["dpo", "lc-dpo", "ipo", "kto", "orpo"]


def tiny(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def parameters(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def scored(policy, reference, pairs=PAIRS):
    batch = collate_preferences(pairs)
    with torch.no_grad():
        logps = *pair_logprobs(policy, batch), *pair_logprobs(reference, batch)
    return logps, {"chosen_lengths": batch.chosen_lengths, "rejected_lengths": batch.rejected_lengths}


# --------------------------------------------------------------------------------------------------- agreement with trl


def letters():
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {letter: place for place, letter in enumerate("abcdefghijklmnopqrstuvw")} | {"<e>": 23}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[])), eos_token="<e>"
    )


def arguments(config, folder, **options):
    options = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True} | options
    return config(output_dir=str(folder), **options)


@pytest.mark.parametrize(("name", "ours"), [("sigmoid", DPO(0.3)), ("ipo", IPO(0.3, per_token=True))])
def test_dpo_and_ipo_equal_those_of_trl(tmp_path, name, ours):
    dpo, datasets = pytest.importorskip("trl.trainer.dpo_trainer"), pytest.importorskip("datasets")
    policy, reference = tiny(0), tiny(1)
    row = {"prompt": "ab", "chosen": "cd", "rejected": "e"}
    theirs = dpo.DPOTrainer(
        policy,
        reference,
        args=arguments(dpo.DPOConfig, tmp_path, beta=0.3, loss_type=[name]),
        train_dataset=datasets.Dataset.from_list([row]),
        processing_class=letters(),
    )
    inputs = theirs.data_collator(
        [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in PAIRS]
    )
    wanted = theirs._compute_loss(theirs.model, inputs, False).item()
    logps, lengths = scored(policy, reference)
    assert ours(*logps, **lengths).loss.item() == pytest.approx(wanted, abs=1e-5)


def test_kto_equals_that_of_trl_on_the_same_mismatched_pairs(tmp_path):
    kto, datasets = pytest.importorskip("trl.trainer.kto_trainer"), pytest.importorskip("datasets")
    policy, reference = tiny(1), tiny(0)
    rows = [{"prompt": "ab", "completion": "cd", "label": label} for label in (True, False)]
    theirs = kto.KTOTrainer(
        policy,
        reference,
        args=arguments(
            kto.KTOConfig,
            tmp_path,
            beta=0.3,
            desirable_weight=1.5,
            undesirable_weight=0.7,
            per_device_train_batch_size=2,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=letters(),
    )
    ours = AlignmentTrainer(
        policy, reference, PAIRS, args=PreferenceConfig(batch_size=4), loss=KTO(0.3, 1.5, 0.7, reduction="sum")
    )
    other = [PAIRS[place - 1] for place in range(4)]
    examples = [
        {
            "prompt_ids": pair.prompt,
            "completion_ids": getattr(pair, column),
            "KL_completion_ids": getattr(mismatched, column),
            "label": column == "chosen",
        }
        for pair, mismatched in zip(PAIRS, other, strict=True)
        for column in ("chosen", "rejected")
    ]
    wanted = theirs._compute_loss(theirs.model, theirs.data_collator(examples), False).item()
    row = ours.train(1)[0]
    assert row["loss"] == pytest.approx(wanted, abs=1e-5)
    assert row["baseline"] > 0.01  # not clamped away


def test_the_odds_ratio_equals_that_of_trl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    logps, lengths = scored(tiny(0), tiny(1))
    means = logps[0] / lengths["chosen_lengths"], logps[1] / lengths["rejected_lengths"]
    as_trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs, chosen_rewards, *_ = orpo.ORPOTrainer.odds_ratio_loss(as_trainer, *means)
    out = ORPO(0.3, reduction="none")(*logps[:2], **lengths)
    torch.testing.assert_close(-0.3 * out.odds_loss, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.chosen_rewards, chosen_rewards)


# ---------------------------------------------------------------------------------------------------------- the trainer


def test_prompts_meet_responses_of_the_nearest_other_prompt_before_them():
    assert mismatched_rows([[1], [2], [3]]) == [2, 0, 1]
    assert mismatched_rows([[1], [1], [2], [2], [1]]) == [3, 3, 1, 1, 3]
    with pytest.raises(ValueError, match="must not all be the same"):
        mismatched_rows([[1], [1]])


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_learns_the_pairs(name):
    model = tiny()
    result = align(model, None if name == "orpo" else tiny(), PAIRS, loss=name, lr=1e-2, epochs=30, warmup=None)
    assert result.model is model
    assert len(result.history) == 30
    assert result.history[-1]["accuracy"] == 1.0
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]
    assert result.history[-1]["margin"] > result.history[0]["margin"]


def test_only_the_model_changes_and_the_seed_decides():
    pairs = copy.deepcopy(PAIRS)
    reference = tiny()
    before = parameters(reference).clone()
    models = [tiny() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        align(model, reference, pairs, loss="kto", lr=1e-2, epochs=2, batch_size=2, accumulate=1, random_state=seed)
    assert torch.equal(parameters(models[0]), parameters(models[1]))
    assert not torch.equal(parameters(models[0]), parameters(models[2]))
    assert torch.equal(parameters(reference), before)
    assert pairs == PAIRS


@pytest.mark.parametrize("name", ["kto", "lc-dpo"])
def test_accumulation_changes_memory_and_not_the_step(name):
    found = {}
    for batch_size, accumulate in ((4, 1), (1, 4), (3, 2)):
        model = tiny().double()
        history = align(
            model, tiny(1).double(), PAIRS, loss=name, lr=1e-2, epochs=3, batch_size=batch_size, accumulate=accumulate
        ).history
        found[batch_size] = parameters(model), [row["loss"] for row in history]
    for batch_size in (1, 3):
        torch.testing.assert_close(found[batch_size][0], found[4][0], atol=1e-6, rtol=0)
        assert found[batch_size][1] == pytest.approx(found[4][1], abs=1e-6)


def test_the_baseline_is_the_movement_on_mismatched_pairs():
    policy, reference = tiny(1), tiny(0)
    trainer = AlignmentTrainer(
        policy, reference, PAIRS, args=PreferenceConfig(batch_size=2, accumulation=2), loss=KTO(reduction="sum")
    )
    other = [
        TokenPair(pair.prompt, PAIRS[place - 1].chosen, PAIRS[place - 1].rejected) for place, pair in enumerate(PAIRS)
    ]
    logps, _ = scored(policy, reference, other)
    movement = torch.cat([logps[0] - logps[2], logps[1] - logps[3]]).mean()
    assert movement > 0.01
    assert trainer.train(1)[0]["baseline"] == pytest.approx(movement.item(), abs=1e-6)


def test_a_resumed_run_and_a_precomputed_reference_give_the_same_run():
    def start(**options):
        args = PreferenceConfig(learning_rate=1e-2, batch_size=2, epochs=3, **options)
        return AlignmentTrainer(tiny(), tiny(), PAIRS, args=args, loss=KTO(reduction="sum"))

    whole, first, second, precomputed = start(), start(), start(), start(precompute_reference=True)
    assert precomputed.ref_model is None
    whole.train()
    first.train(3)
    second.load_state_dict(first.state_dict())
    second.train()
    precomputed.train()
    assert second.history == whole.history
    for row, other in zip(whole.history, precomputed.history, strict=True):
        assert other == pytest.approx(row, abs=1e-5)


def test_adapters_off_are_the_reference():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    history = align(
        model, None, PAIRS, loss="kto", lr=1e-2, epochs=20, warmup=None, gradient_checkpointing=True
    ).history
    assert history[0]["baseline"] == pytest.approx(0.0, abs=1e-5)
    assert history[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert history[-1]["accuracy"] == 1.0


def test_from_candidates_to_an_aligned_model():
    """A model that says anything learns, from scores alone, to say what the references say."""
    tokenizer = letters()
    model = tiny()
    prompts = [f"{letter}b" for letter in "abcdefghijklmnop"]

    def sample(inputs, n, random_state):
        batch = sample_responses(
            model,
            [tokenizer(text)["input_ids"] for text in inputs],
            n=n,
            max_new_tokens=6,
            eos_token_id=23,
            generator=torch.Generator().manual_seed(random_state),
        )
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in batch.responses()]
        return [texts[start : start + n] for start in range(0, len(texts), n)]

    def share_of_c(candidate, reference):
        return candidate.count(reference) / max(1, len(candidate.replace(" ", "")))

    items = [(prompt, "c") for prompt in prompts]
    pairs = build_preferences(items, sample, share_of_c, n=8, random_state=0)
    assert 8 <= len(pairs) <= 16
    align(model, tiny(), pairs, tokenizer, loss="dpo", lr=1e-2, epochs=20, accumulate=1)
    after = build_preferences(items, sample, share_of_c, n=8, random_state=0)
    assert after.scores.mean() > 3 * pairs.scores.mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "ppo"}, "loss must be one of 'dpo', 'lc-dpo', 'ipo', 'kto', 'orpo', got 'ppo'"),
        ({"loss": LengthRegularizedDPO()}, "loss must have reduction='sum', got 'mean'"),
        ({"loss": "kto", "batch_size": 1, "accumulate": 1}, "must be at least 2 for KTO"),
        ({"loss": "kto", "pairs": PAIRS[:1] * 2}, "prompts must not all be the same for KTO"),
        ({"ref": None}, "ref_model may be None only"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"warmup": 1.0}, "warmup must be at least 0 and below 1"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"model": tiny(), "ref": tiny(), "pairs": PAIRS}
    with pytest.raises(ValueError, match=message):
        align(**(good | change))
