"""Sharpening of small transformers: what is drawn, trained, reported, and left alone."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workingpapers.alignment.logprobs import sequence_logprobs
from workingpapers.alignment.sequences import collate_sequences
from workingpapers.alignment.sharpening import (
    AdaptiveSampler,
    CausalPolicy,
    SharpeningRLHF,
    SharpeningSFT,
    self_reward,
    sharpen,
    sharpness,
    tabular,
)

END, PROMPTS = 4, [[5], [6, 7], [8]]
CUT = 3  # tokens at most
RESPONSES = [[a] for a in (END,)] + [[a, END] for a in range(4)] + [[a, b, END] for a in range(4) for b in range(4)]


def small_model(seed):
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=END,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    table = np.random.default_rng(seed).dirichlet(np.full(len(RESPONSES), 0.5), size=len(PROMPTS))
    pairs = [(prompt, response) for prompt in PROMPTS for response in RESPONSES]
    batch = collate_sequences(pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(100):
        optimizer.zero_grad()
        logps = sequence_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_mask)
        (-(torch.from_numpy(table).reshape(-1) * logps).sum()).backward()
        optimizer.step()
    return model.eval()


def exact_law(model, prompts=PROMPTS):
    """Probabilities of all complete responses without a prompt's token, (prompts, responses)."""
    policy = CausalPolicy(model, max_new_tokens=CUT)
    return policy.log_prob(prompts, [RESPONSES] * len(prompts)).exp().double()


@pytest.fixture(scope="module")
def base():
    return small_model(0)


@pytest.fixture(scope="module")
def other():
    return small_model(1)


def test_cached_log_probabilities_are_those_of_the_base(base):
    found = sharpen(base, PROMPTS, 40, max_new_tokens=CUT, generator=torch.Generator().manual_seed(0))
    again = self_reward(base, PROMPTS, [[response] for response in found.responses])[:, 0]
    np.testing.assert_allclose(found.base_logps, again, atol=1e-5)
    normalized = self_reward(base, PROMPTS, [[response] for response in found.responses], "normalized")[:, 0]
    lengths = [len(response) for response in found.responses]
    np.testing.assert_allclose(normalized * torch.tensor(lengths), again, rtol=1e-6)


def test_sft_with_enough_data_becomes_the_law_of_the_best_of_n(base):
    # 200 copies of a prompt are 200 draws of its best-of-n law.
    n, copies = 4, 200
    sh = SharpeningSFT(base, n=n, max_new_tokens=CUT, epochs=100, lr=1e-2, batch_size=copies, max_grad_norm=1.0)
    sh.fit([PROMPTS[0]] * copies)
    drawn = [tuple(response) for response in sh.selected_.responses]
    law = exact_law(sh.model_)[0].numpy()
    empirical = np.array([drawn.count(tuple(response)) / copies for response in RESPONSES])
    assert 0.5 * np.abs(law - empirical).sum() < 0.1
    # and what was selected is the best of n draws
    p = exact_law(base)[0].numpy()
    cut_off = np.array([1.0 - p.sum(), *p])
    wanted = tabular.bon_distribution(cut_off, n, np.array([-np.inf, *np.log(p)]))
    assert 0.5 * np.abs(empirical / empirical.sum() - wanted[1:] / wanted[1:].sum()).sum() < 0.15


def test_sft_raises_the_base_likelihood_and_leaves_the_base_alone(base):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    sh = SharpeningSFT(base, n=10, max_new_tokens=CUT, epochs=40, lr=1e-2, random_state=1).fit(PROMPTS)
    report = sh.report_
    assert report.mean_base_loglik > report.mean_base_loglik_before
    assert report.mean_base_loglik_selected > report.mean_base_loglik_before
    assert report.coverage == pytest.approx(np.mean(np.exp(-sh.selected_.max_loglik)))
    assert report.samples == 10
    assert sh.history_[-1]["loss"] < sh.history_[0]["loss"]
    assert sh.history_[-1]["learning_rate"] < sh.history_[0]["learning_rate"] / 30
    assert len(sh.history_) == 40
    for name, value in base.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    again = SharpeningSFT(base, n=10, max_new_tokens=CUT, epochs=40, lr=1e-2, random_state=1).fit(PROMPTS)
    assert again.report_ == report
    assert again.history_ == sh.history_


def test_adapters_train_over_the_weights_of_the_base_itself(base):
    pytest.importorskip("peft")
    sh = SharpeningSFT(base, n=10, max_new_tokens=CUT, epochs=30, lr=3e-2, peft_rank=4).fit(PROMPTS)
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not any("lora" in name for name, _ in base.named_modules())
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    frozen = [parameter for parameter in sh.model_.parameters() if not parameter.requires_grad]
    assert frozen
    assert all(parameter.data_ptr() in shared for parameter in frozen)
    assert exact_law(sh.model_).max(1).values.mean() > exact_law(base).max(1).values.mean()
    with sh.model_.disable_adapter():
        torch.testing.assert_close(exact_law(sh.model_), exact_law(base))
    # a peft model is a base too: its adapters as they are
    twice = SharpeningSFT(sh.model_, n=10, max_new_tokens=CUT, epochs=1).fit(PROMPTS)
    assert twice.report_.mean_base_loglik_before > sh.report_.mean_base_loglik_before
    with pytest.raises(ValueError, match="peft_rank must be None for a peft model"):
        SharpeningSFT(sh.model_, peft_rank=2)


def test_other_rewards_and_the_adaptive_rule(base):
    common = {"max_new_tokens": CUT, "epochs": 1}
    adaptive = SharpeningSFT(base, adaptive=AdaptiveSampler(0.2, 100_000), **common).fit(PROMPTS)
    assert (adaptive.selected_.drawn > 1).all()
    assert adaptive.report_.capped == 0
    normalized = SharpeningSFT(base, n=30, reward="normalized", **common).fit(PROMPTS)
    assert normalized.report_.mean_length_selected >= adaptive.report_.mean_length_selected
    with pytest.raises(ValueError, match="the rewards of kind must have shape"):
        SharpeningSFT(base, n=3, reward=lambda *_: torch.zeros(1, 1), **common).fit(PROMPTS)


def test_prompts_whose_draws_are_all_cut_off_are_dropped(base):
    class Cutting(CausalPolicy):
        def sample(self, prompts, n):
            batch = super().sample(prompts, n)
            batch.finished[:n] = False
            return batch

    sampler = Cutting(base, max_new_tokens=CUT, eos_token_id=END, generator=torch.Generator().manual_seed(0))
    sh = SharpeningSFT(base, sampler=sampler, n=20, max_new_tokens=CUT, epochs=1)
    with pytest.warns(UserWarning, match="1 of 3 prompts have no draw that ended within max_new_tokens=3"):
        sh.fit(PROMPTS)
    assert sh.report_.dropped == 1
    assert sh.report_.truncated_before >= 1 / 3
    with pytest.raises(ValueError, match="cut off every draw"):
        SharpeningSFT(base, sampler=sampler, n=20, max_new_tokens=CUT).fit(PROMPTS[:1])


def test_tokenizers_and_chat_templates(base):
    class Words:
        eos_token_id = END

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [5] * add_special_tokens + [int(word) for word in text.split()]}

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            assert not tokenize
            assert add_generation_prompt
            return " ".join(message["content"] for message in messages)

    found = sharpen(base, ["6 7", [{"role": "user", "content": "8"}], [1]], 2, tokenizer=Words(), max_new_tokens=CUT)
    assert found.prompts == [[5, 6, 7], [8], [1]]


# ------------------------------------------------------------------------------------------------------ RLHF-Sharpening


def test_the_pair_loss_on_a_transformer_moves_towards_the_power_of_the_base(base):
    beta = 1.0
    sh = SharpeningRLHF(
        base, n=150, beta=beta, max_new_tokens=CUT, epochs=40, lr=1e-2, batch_size=150, max_grad_norm=1.0
    ).fit(PROMPTS)
    before, after = exact_law(base).numpy(), exact_law(sh.model_).numpy()
    wanted = tabular.power(before / before.sum(1, keepdims=True), 1 + 1 / beta)

    def distance(law):
        return 0.5 * np.abs(law / law.sum(1, keepdims=True) - wanted).sum(1).mean()

    assert distance(after) < 0.35 * distance(before)
    assert sh.history_[-1]["squared_error"] < 0.1 * sh.history_[0]["squared_error"]
    assert sh.report_.mean_base_loglik > sh.report_.mean_base_loglik_before


def test_exploration_draws_from_the_policy_and_regresses_on_the_base(base):
    args = {"n": 5, "max_new_tokens": CUT, "epochs": 2, "lr": 1e-3, "batch_size": 15}
    sh = SharpeningRLHF(base, rounds=3, alpha=0.1, **args).fit(PROMPTS)
    assert [row["round"] for row in sh.history_] == [1] * 2 + [2] * 4 + [3] * 6  # on all pairs so far
    assert (sh.drawn_.drawn == 5 * (2 + 1 + 1)).all()  # the base's draws alone
    offline = SharpeningRLHF(base, rounds=1, **args).fit(PROMPTS)
    assert (offline.drawn_.drawn == 10).all()
    assert offline.history_[0]["squared_error"] == pytest.approx(sh.history_[0]["squared_error"])
    assert sh.history_[0]["loss"] < offline.history_[0]["loss"]  # alpha log pi(y')


# ------------------------------------------------------------------------------------------------------------ sharpness


def test_sharpness_is_exact_when_all_responses_are_candidates(base, other):
    everything = [RESPONSES] * len(PROMPTS)
    found = sharpness(other, base, PROMPTS, everything, max_new_tokens=CUT)
    p, policy = exact_law(base), exact_law(other)
    best = p.argmax(1)
    mass = policy[torch.arange(3), best]
    assert found.best == [RESPONSES[place] for place in best]
    assert found.mass == pytest.approx(float(mass.mean()), rel=1e-5)
    assert found.coverage == pytest.approx(float((1 / p.max(1).values).mean()), rel=1e-5)
    assert found.sharpened_share == float((mass >= 0.5).double().mean())
    itself = sharpness(base, base, PROMPTS, everything, max_new_tokens=CUT)
    np.testing.assert_allclose(itself.logps, itself.base_logps)


def test_a_model_with_half_of_the_mass_on_the_best_answer_finds_it_greedily(base):
    sh = SharpeningSFT(base, n=30, max_new_tokens=CUT, epochs=60, lr=1e-2, max_grad_norm=1.0).fit(PROMPTS)
    found = sharpness(sh.model_, base, PROMPTS, n=30, max_new_tokens=CUT, generator=torch.Generator().manual_seed(0))
    assert found.sharpened_share == 1.0
    assert found.greedy_share == 1.0
    assert found.mass > 0.5


def test_the_coverage_of_long_answers_is_infinite_in_floating_point_but_not_in_logarithms(base):
    long = [[[1] * 400 + [END]] for _ in PROMPTS]
    found = sharpness(base, base, PROMPTS, long, max_new_tokens=CUT)
    assert found.log_coverage == pytest.approx(-found.base_logps.min(), abs=math.log(3))
    if found.log_coverage > 710:
        assert found.coverage == math.inf


def test_bad_estimators_are_named(base):
    for change, message in (
        ({"n": 0}, "n must be at least 1"),
        ({"reward": "length"}, "kind must be one of"),
        ({"reward": "majority"}, "extract must be given"),
        ({"adaptive": True, "reward": "normalized"}, "adaptive must be False"),
        ({"peft_rank": 0}, "peft_rank must be at least 1"),
        ({"lr": 0.0}, "learning_rate must be above 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens must be at least 0 and at most 8"),
    ):
        with pytest.raises(ValueError, match=message):
            SharpeningSFT(base, **change)
    for change, message in (({"beta": 0.0}, "beta must be above 0"), ({"rounds": 0}, "rounds must be at least 1")):
        with pytest.raises(ValueError, match=message):
            SharpeningRLHF(base, **change)
    with pytest.raises(TypeError, match="methods sample and log_prob"):
        SharpeningSFT(base, sampler=object())
    with pytest.raises(ValueError, match="prompts must hold at least one prompt"):
        SharpeningSFT(base).fit([])
    with pytest.raises(ValueError, match="delta must be above 0"):
        sharpness(base, base, PROMPTS, delta=0.0)
