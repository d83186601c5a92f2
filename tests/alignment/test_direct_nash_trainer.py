"""Tests of the rounds for language models: each fails when the idea it names is removed."""

import copy

import numpy as np
import pytest
import torch

from workingpapers.alignment import DirectNashConfig, DirectNashTrainer, collate_preferences, nash_policy, pair_logprobs

transformers = pytest.importorskip("transformers")
VOCABULARY = 8


def tiny(seed=0, vocabulary=VOCABULARY):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def parameters(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def likes_sevens(prompt, y, z):
    return 0.5 + 0.5 * np.sign(y.count(7) - z.count(7))


def circle(prompt, y, z):
    """Tokens 1 > 2 > 3 > 1 at the beginning of an answer; all other tokens lose to these."""
    first, second = y[0], z[0]
    if first in (1, 2, 3) and second in (1, 2, 3):
        return 0.5 if first == second else 0.9 if (second - first) % 3 == 1 else 0.1
    return 0.5 if (first in (1, 2, 3)) == (second in (1, 2, 3)) else 0.95 if first in (1, 2, 3) else 0.05


PROMPTS = [[1 + row % 7, 1 + row // 7] for row in range(12)]
FAST = {
    "learning_rate": 1e-2,
    "warmup": None,
    "batch_size": 8,
    "accumulation": 1,
    "n_rounds": 3,
    "n_samples": 4,
    "max_new_tokens": 4,
    "temperature": 1.0,
    "top_p": None,
}


def trainer_of(model=None, prefer=likes_sevens, prompts=PROMPTS, gold=None, **options):
    of_trainer = {name: options.pop(name) for name in ("metric", "ref_model", "eval_prompts") if name in options}
    args = DirectNashConfig(**(FAST | options))
    return DirectNashTrainer(model or tiny(), None, prompts, prefer, gold, args, **of_trainer)


def test_policies_learn_what_the_judge_likes_and_beat_their_predecessors():
    trainer = trainer_of(epochs=4, eval_prompts=PROMPTS * 4, margin=0.2)
    trainer.train()
    assert trainer.finished
    assert [row["round"] for row in trainer.rounds] == [0, 1, 2, 3]
    assert "win_previous" not in trainer.rounds[0]
    assert all(row["win_previous"] > 0.5 for row in trainer.rounds[1:])
    assert trainer.rounds[3]["win_start"] > 0.8
    assert trainer.best_round == 3


@pytest.mark.parametrize("with_frozen_reference", [False, True])
def test_the_reference_is_the_policy_of_the_round_unless_a_frozen_one_is_given(with_frozen_reference):
    model = tiny()
    start = copy.deepcopy(model)
    trainer = trainer_of(model, ref_model=start if with_frozen_reference else None, epochs=2)
    trainer.train()
    firsts = [row for row in trainer.history if row["step"] == 1]
    assert [row["round"] for row in firsts] == [1, 2, 3]
    for row in firsts:
        if with_frozen_reference and row["round"] > 1:
            assert abs(row["margin"]) > 1e-3
        else:
            assert row["margin"] == pytest.approx(0.0, abs=1e-6)
            assert row["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_soft_targets_are_win_rates_against_the_policys_own_other_answers():
    gold = [[7, 7, 7, 0] for _ in PROMPTS]
    trainer = trainer_of(hard=False, gold=gold, margin=0.0, student_margin=None, n_rounds=1, n_samples=3)
    trainer.train(1)
    pairs = trainer._pairs[0]
    for pair in pairs:
        # against K = 3 students (a teacher), or the other 2 (a student), counted in halves
        steps = 6 if pair.chosen == [7, 7, 7, 0] else 4
        assert pair.scores[0] * steps == pytest.approx(round(pair.scores[0] * steps))
    batch = collate_preferences(pairs)
    logps = pair_logprobs(tiny(), batch)
    out = trainer._round.loss(*logps, *logps, *batch.scores.T)
    torch.testing.assert_close(out.target, torch.sigmoid(batch.scores[:, 0] - batch.scores[:, 1]))


def test_soft_rounds_on_a_circular_judge_take_the_step_of_the_exact_solver():
    """One prompt, answers of one token: the policy after a round must be near pi ~ pi_1 exp(r / eta)."""
    eta, model = 0.25, tiny(vocabulary=4)
    with torch.no_grad():
        start = model(torch.tensor([[1]])).logits[0, -1].double().softmax(-1).numpy()
    game = np.array([[circle(None, [y], [z]) for z in range(4)] for y in range(4)])
    target = nash_policy(game, eta, 1, init=start / start.sum()).policy_last
    trainer = trainer_of(
        model,
        circle,
        [[1]] * 8,
        hard=False,
        eta=eta,
        n_rounds=1,
        n_samples=32,
        max_new_tokens=1,
        margin=0.0,
        student_margin=None,
        max_steps=100,
        batch_size=64,
    )
    trainer.train()
    with torch.no_grad():
        found = model(torch.tensor([[1]])).logits[0, -1].softmax(-1).numpy()
    np.testing.assert_allclose(found, target, atol=0.05)
    assert np.abs(start - target).max() > 0.15


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_resumed_run_goes_on_identically(stop):
    options = {"epochs": 2, "eval_prompts": PROMPTS[:3], "metric": lambda model: -float(parameters(model).norm())}
    whole = trainer_of(**options)
    whole.train()
    first = trainer_of(**options)
    first.train(stop)
    assert len(first.history) == stop
    state = first.state_dict()
    first.train(2)  # training on does not reach into the state
    second = trainer_of(tiny(5), **options)
    second.load_state_dict(state)
    second.train()
    assert second.history == whole.history
    assert second.rounds == whole.rounds
    assert torch.equal(parameters(second.model), parameters(whole.model))


def test_the_best_round_by_the_metric_is_kept():
    seen = []

    def metric(model):
        seen.append(parameters(model).clone())
        return [9.0, 0.1, 0.8, 0.3][len(seen) - 1]  # the start does not compete

    trainer = trainer_of(metric=metric)
    trainer.train()
    assert trainer.best_round == 2
    assert [row["metric"] for row in trainer.rounds] == [9.0, 0.1, 0.8, 0.3]
    assert torch.equal(parameters(trainer.model), seen[2])
    assert not torch.equal(seen[2], seen[3])


def test_lengths_pairs_skipped_prompts_and_replay_are_reported():
    gold = [[7, 7, 7, 7, 7, 0] for _ in PROMPTS]
    trainer = trainer_of(gold=gold, max_repetition=None, margin=0.3)
    trainer.train()
    for row in trainer.rounds[1:]:
        kinds = ("teacher>student", "student>teacher", "student>student")
        assert row["pairs"] == sum(row[kind] for kind in kinds) > 0
        assert row["prompts"] == 4
        assert row["teacher_length"] == 6.0
        assert 1 <= row["student_length"] <= 4
        assert row["chosen_length"] > row["rejected_length"]
        assert row["teacher_score"] > 0.8
    counts = [row["pairs"] for row in trainer.rounds[1:]]
    assert [row["replayed"] for row in trainer.rounds[1:]] == [
        0,
        int(0.3 * counts[0]),
        int(0.3 * counts[1]) + int(0.15 * counts[0]),
    ]


def test_repetitive_answers_are_negatives():
    gold = [[7, 7, 7, 7, 7, 7, 7, 0] for _ in PROMPTS]  # the judge's favourite
    trainer = trainer_of(gold=gold, n_rounds=1, max_repetition=0.5)
    trainer.train()
    assert trainer.rounds[1]["negatives"] == len(PROMPTS)
    assert trainer.rounds[1]["teacher>student"] == 0
    assert trainer.rounds[1]["student>teacher"] == 4 * len(PROMPTS)


def test_a_round_without_pairs_warns_and_leaves_the_policy():
    model = tiny()
    before = parameters(model).clone()
    trainer = trainer_of(model, lambda prompt, y, z: 0.5, n_rounds=1)
    with pytest.warns(UserWarning, match="round 1 kept no pair: {'tied': 12"):
        trainer.train()
    assert trainer.finished
    assert trainer.rounds[1]["skipped_tied"] == 12
    assert trainer.history == []
    assert torch.equal(parameters(model), before)


def test_every_prompt_is_used_once_and_runs_are_reproducible():
    asked = []

    def judge(prompts, ys, zs):
        asked.append({tuple(prompt) for prompt in prompts})
        return [likes_sevens(*row) for row in zip(prompts, ys, zs, strict=True)]

    one = trainer_of(prefer=judge, batched_judge=True)
    one.train()
    assert len(asked) == 3
    assert sum(len(part) for part in asked) == len(set.union(*asked)) == len(PROMPTS)
    other = trainer_of()
    other.train()
    assert one.history == other.history
    assert trainer_of(random_state=1).train() != other.history


def test_text_goes_to_the_judge_as_text_and_adapters_are_enough():
    tokenizers, peft = pytest.importorskip("tokenizers"), pytest.importorskip("peft")
    letters = {"<e>": 0} | {letter: place for place, letter in enumerate("abcdefg", start=1)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[])), eos_token="<e>"
    )
    heard = set()

    def judge(prompt, y, z):
        heard.update({prompt, y, z})
        return 0.5 + 0.5 * np.sign(y.count("g") - z.count("g"))

    model = tiny()
    base = parameters(model).clone()
    policy = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    prompts = ["ab", "cd", "ef"]
    trainer = DirectNashTrainer(policy, tokenizer, prompts, judge, ["ggg", "gg", "g"], DirectNashConfig(**FAST))
    trainer.train()
    assert {"ab", "cd", "ef"} <= heard
    assert trainer._gold_ids == [[7, 7, 7, 0], [7, 7, 0], [7, 0]]
    assert all(set(text) <= set("abcdefg ") for text in heard)  # no end token
    assert len(trainer.history) >= 3
    frozen = torch.cat([p.detach().reshape(-1) for name, p in model.named_parameters() if "lora" not in name])
    assert torch.equal(frozen, base)


def test_bad_trainer_input_is_named():
    model = tiny()
    with pytest.raises(ValueError, match="ref_model must be a frozen copy"):
        trainer_of(model, ref_model=model)
    with pytest.raises(ValueError, match="prompts must be at least n_rounds=3, got 2"):
        trainer_of(prompts=PROMPTS[:2])
    with pytest.raises(ValueError, match="gold must have one answer for each of 12 prompts, got 1"):
        trainer_of(gold=[[1]])
    with pytest.raises(ValueError, match="gold must have no empty answer"):
        trainer_of(gold=[[]] * 12)
    with pytest.raises(ValueError, match="tokenizer may be None only when"):
        trainer_of(prompts=["a"] * 3)
    with pytest.raises(ValueError, match="n_samples must be at least 2 without gold answers"):
        trainer_of(n_samples=1)
    with pytest.raises(ValueError, match="parameters that require gradients"):
        trainer_of(tiny().requires_grad_(False))
    with pytest.raises(ValueError, match="same trainable parameters"):
        trainer_of().load_state_dict({"parameters": {}})
    for name, value in {"eta": 0.0, "n_rounds": 0, "margin": -1.0, "temperature": 0.0, "top_p": 2.0}.items():
        with pytest.raises(ValueError, match=name):
            DirectNashConfig(**{name: value})
    with pytest.raises(ValueError, match="allow must be one of"):
        DirectNashConfig(allow=("teacher",))
