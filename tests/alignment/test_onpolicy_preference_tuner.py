"""Tests of the loop, on policies over actions and on language models."""

import copy
import math

import pytest
import torch

from workingpapers.alignment import (
    CategoricalPolicy,
    CausalLMPolicy,
    GroupLoss,
    LogitTable,
    PreferenceTuner,
    TokenSequence,
    collate_sequences,
    model_reward,
    sequence_logprobs,
    testbeds,
    text_reward,
)

CONTEXTS = torch.zeros(6, 1)


def table(logits=(0.0, 0.5, -0.5, 0.2)):
    return CategoricalPolicy(LogitTable(torch.tensor(logits)))


def rising(prompts, actions):
    return actions / 3.0


def tuner(policy=None, **changes):
    given = {"loss": "dpo", "batch_size": 24, "lr": 0.05, "generator": torch.Generator().manual_seed(0)} | changes
    return PreferenceTuner(policy or table(), None, rising, **given)


@pytest.fixture(scope="module")
def language_model():
    return testbeds.length_task("min", limit=6, mean=3).policy(steps=0).model


def lm_policy(language_model, **changes):
    return CausalLMPolicy(copy.deepcopy(language_model), max_new_tokens=6, eos_token_id=0, **changes)


PROMPTS = [[3, 4], [5], [6, 7], [2, 2]]


def short_ones(prompts, actions):
    return -(actions != -1).sum(-1).float()


# ------------------------------------------------------------------------------------------------------------ one step


def test_a_step_is_gradient_descent_on_the_loss_of_the_answers_it_drew():
    policy, start = table(), table()
    seen = []

    def reward(prompts, actions):
        seen.append(actions)
        return rising(prompts, actions)

    sgd = torch.optim.SGD(policy.parameters(), lr=0.3)
    PreferenceTuner(policy, None, reward, loss="ipo", tau=2.0, batch_size=24, optimizer=sgd).fit(CONTEXTS, 24)
    drawn = next(actions for actions in seen if actions.shape == (6, 4) and not (actions == torch.arange(4)).all())
    logps = start.log_prob(CONTEXTS, drawn)
    from workingpapers.alignment.onpolicy_preference import ipo

    ipo(logps, logps.detach(), rising(None, drawn), tau=2.0).backward()
    expected = start.network.logits - 0.3 * start.network.logits.grad
    torch.testing.assert_close(policy.network.logits, expected)


@pytest.mark.parametrize("loss", ["pref_ft", "best_of_n", "rwr", "reinforce", "ppo", "dpo", "ipo", "slic"])
def test_every_loss_finds_the_best_action(loss):
    history = tuner(loss=loss, inner_steps=5, tau=4.0).fit(CONTEXTS, 24 * 12)
    assert history.reward[0] == pytest.approx((table().network.logits.softmax(0) * torch.arange(4) / 3).sum().item())
    assert history.reward[-1] > history.reward[0] + 0.2


def test_budgets_are_counted_side_by_side():
    history = tuner(inner_steps=3, prompts_per_step=4).fit(CONTEXTS, 24 * 2 + 8 + 3)
    assert history.reward_queries == [0, 24, 48, 56]  # the last three queries are no group of four
    assert history.gradient_steps == [0, 6, 12, 15]  # six prompts by four are two steps in each of three passes
    assert history.generated_tokens == [0, 24, 48, 56]
    assert history.trained_tokens == [0, 72, 144, 168]
    assert len(history) == 4
    assert math.isnan(history.loss[0])
    by_steps = tuner(inner_steps=3, prompts_per_step=4).fit(CONTEXTS, 48, evaluate_every=5)
    assert by_steps.gradient_steps == [0, 5, 10, 12]
    assert by_steps.reward_queries == [0, 24, 48, 48]
    blind = tuner().fit(CONTEXTS, 48, evaluate_every=0)
    assert blind.gradient_steps == [0, 1, 2]
    assert all(math.isnan(value) for value in blind.reward + blind.kl)
    assert blind.batch_reward[-1] > 0


def test_divergences_entropy_and_reward_are_exact_where_they_can_be():
    policy, ref = table(), table((0.0, 0.0, 1.0, 0.0)).requires_grad_(False)
    history = PreferenceTuner(policy, ref, rising, batch_size=24, lr=1e-9).fit(CONTEXTS, 24)
    p, q = policy.network.logits.softmax(0), ref.network.logits.softmax(0)
    assert history.kl[-1] == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)
    assert history.reverse_kl[-1] == pytest.approx(float((q * (q / p).log()).sum()), abs=1e-6)
    assert history.entropy[-1] == pytest.approx(float(-(p * p.log()).sum()), abs=1e-6)


# --------------------------------------------------------------------------------------------------------- the switches


class Counting(CategoricalPolicy):
    """A policy that knows how many answers it was asked for."""

    drawn = 0

    def sample(self, prompts, n, generator=None):
        self.drawn += len(prompts) * n
        return super().sample(prompts, n, generator)


@pytest.mark.parametrize(("on_policy", "fresh"), [(True, 48), (False, 0), (0.25, 12), (0.5, 24)])
def test_the_share_of_fresh_answers_is_what_was_asked_for(on_policy, fresh):
    policy, data = Counting(table().network), Counting(table().network).requires_grad_(False)
    PreferenceTuner(policy, data, rising, on_policy=on_policy, batch_size=24).fit(CONTEXTS, 48)
    assert policy.drawn == fresh
    assert data.drawn == 48 - fresh


def test_answers_that_are_not_fresh_come_from_the_data_policy():
    only_first = table((50.0, 0.0, 0.0, 0.0)).requires_grad_(False)
    history = tuner(loss="best_of_n", on_policy=False, data_policy=only_first, inner_steps=50).fit(CONTEXTS, 24)
    assert history.batch_reward[-1] == 0
    assert history.reward[-1] < 0.1 < history.reward[0]  # best of n learned the one action that it saw


def test_ppo_divides_by_the_policy_that_drew_the_answers():
    """The data policy draws the worst action almost always; its ratio starts far below the clip, not at 1."""
    seen = []

    class Spy(GroupLoss):
        def forward(self, logps, **given):
            seen.append((logps.detach(), given["behaviour_logps"]))
            return super().forward(logps, **given)

    data = table((3.0, 0.0, 0.0, 0.0)).requires_grad_(False)
    tuner(loss=Spy("ppo"), on_policy=0.5, data_policy=data, inner_steps=2).fit(CONTEXTS, 24)
    first, behaviour = seen[-2] if len(seen) > 2 else seen[0]
    torch.testing.assert_close(first[:, :2], behaviour[:, :2])  # fresh ones, at the first step
    assert (first[:, 2:] - behaviour[:, 2:]).abs().min() > 0.1
    torch.testing.assert_close(seen[-1][1], behaviour)  # kept for all steps on the batch


@pytest.mark.parametrize(
    ("loss", "asked"),
    [("best_of_n", 0), ("dpo", 1), ("ppo", 1), (GroupLoss("best_of_n", negative="worst"), 1)],
)
def test_nobody_is_asked_for_log_probabilities_that_no_loss_looks_at(loss, asked):
    class Asked(CategoricalPolicy):
        """A policy that counts how often it scores answers."""

        times = 0

        def log_prob(self, prompts, actions):
            self.times += 1
            return super().log_prob(prompts, actions)

    policy, ref = Asked(table().network), Asked(table().network).requires_grad_(False)
    PreferenceTuner(policy, ref, rising, loss=loss, batch_size=24).fit(CONTEXTS, 24)
    assert policy.times + ref.times == 1 + asked


def test_a_price_on_kl_holds_the_policy_near_the_reference():
    free, held = (tuner(loss="ppo", kl_weight=weight, inner_steps=5).fit(CONTEXTS, 24 * 30) for weight in (0.0, 1.0))
    assert held.kl[-1] < 0.3 < free.kl[-1]


def test_small_micro_batches_change_memory_not_the_gradient():
    def trained(**how):
        policy = table()
        tuner(policy, loss="rwr", batch_size=24, optimizer=torch.optim.SGD(policy.parameters(), lr=0.5), **how).fit(
            CONTEXTS, 72
        )
        return policy.network.logits.detach()

    torch.testing.assert_close(trained(micro_batch=4), trained(), atol=1e-6, rtol=1e-5)


def test_evaluation_by_another_reward_does_not_train_on_it():
    history = tuner(eval_reward=lambda prompts, actions: -rising(prompts, actions), inner_steps=5).fit(CONTEXTS, 240)
    assert history.reward[-1] < history.reward[0]
    assert history.batch_reward[-1] > 0.5


# ------------------------------------------------------------------------------------------- determinism and bad input


def test_same_seed_same_run_and_nothing_of_the_callers_changes():
    contexts, before = CONTEXTS.clone(), torch.random.get_rng_state()
    first, second = (tuner(inner_steps=2).fit(contexts, 96) for _ in range(2))
    assert first.reward == second.reward
    assert torch.equal(contexts, CONTEXTS)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_run_can_be_interrupted_and_go_on():
    whole = tuner(inner_steps=2)
    whole.fit(CONTEXTS, 48)
    whole.fit(CONTEXTS, 48)
    first = tuner(inner_steps=2)
    first.fit(CONTEXTS, 48)
    saved = copy.deepcopy(first.state_dict())
    second = tuner(inner_steps=2)
    second.load_state_dict(saved)
    second.fit(CONTEXTS, 48)
    assert second.history.reward == whole.history.reward
    assert second.history.gradient_steps == [0, 2, 4, 6, 8]
    with pytest.raises(ValueError, match="same trainable parameters"):
        tuner(table((0.0, 1.0))).load_state_dict(saved)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inner_steps": 0}, ValueError, "inner_steps must be at least 1"),
        ({"responses_per_prompt": 1}, ValueError, "responses_per_prompt must be at least 2"),
        ({"batch_size": 25}, ValueError, "batch_size must be a multiple of responses_per_prompt=4, got 25"),
        ({"on_policy": 1.5}, ValueError, "on_policy must be at least 0 and at most 1"),
        ({"beta": 0.0}, ValueError, "beta must be above 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be above 0"),
        ({"threshold": -1.0}, ValueError, "threshold must be at least 0"),
        ({"negative": "clip"}, ValueError, "negative must be None for loss 'dpo'"),
        ({"kl_weight": 0.1}, ValueError, "kl_weight must be 0 for loss 'dpo'"),
        ({"lr": 0.0}, ValueError, "lr must be above 0"),
        ({"loss": "kto"}, ValueError, "name must be one of"),
        ({"micro_batch": 0}, ValueError, "micro_batch must be at least 1"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be above 0"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        tuner(**changes)


def test_bad_runs_are_refused():
    with pytest.raises(ValueError, match="prompts must hold at least one"):
        tuner().fit(CONTEXTS[:0], 24)
    with pytest.raises(ValueError, match="budget must be at least 4"):
        tuner().fit(CONTEXTS, 3)
    policy = table()
    with pytest.raises(ValueError, match="ref must be a frozen copy"):
        PreferenceTuner(policy, policy, rising)
    with pytest.raises(ValueError, match="parameters that require gradients"):
        PreferenceTuner(policy.reference(), None, rising)
    for bad, message in (
        (lambda prompts, actions: actions * math.nan, "what reward returns must be finite"),
        (lambda prompts, actions: actions[:, :1], r"reward must return shape \(6, 4\), got \(6, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            PreferenceTuner(table(), None, bad, batch_size=24).fit(CONTEXTS, 24)
    with pytest.raises(ValueError, match="actions must be at least 0 and below 4, got 0 to 4"):
        policy.log_prob(CONTEXTS[:1], torch.tensor([[0, 4]]))


def test_a_step_that_is_not_finite_leaves_the_policy_as_it_was():
    class Broken(GroupLoss):
        def forward(self, logps, **given):
            out = super().forward(logps, **given)
            return type(out)(out.loss * math.inf, out.chosen_logps, out.rejected_logps)

    policy = table()
    with pytest.raises(FloatingPointError, match="step 1: loss or gradient is not finite"):
        tuner(policy, loss=Broken("rwr")).fit(CONTEXTS, 24)
    assert torch.equal(policy.network.logits, table().network.logits)


# ------------------------------------------------------------------------------------------------------ language models


def test_answers_of_a_language_model_are_scored_as_whole_sequences(language_model):
    policy = lm_policy(language_model)
    actions = policy.sample(PROMPTS, 3, torch.Generator().manual_seed(0))
    assert actions.shape == (4, 3, 6)
    answers = policy.responses(actions)
    assert all(0 not in answer[:-1] for group in answers for answer in group)
    assert any(len(answer) < 6 for group in answers for answer in group)
    found = policy.log_prob(PROMPTS, actions)
    for prompt, group, scores in zip(PROMPTS, answers, found, strict=True):
        for answer, score in zip(group, scores, strict=True):
            batch = collate_sequences([TokenSequence(prompt, answer)])
            alone = sequence_logprobs(policy.model, batch.input_ids, batch.attention_mask, batch.response_mask)
            torch.testing.assert_close(score, alone[0], rtol=1e-4, atol=1e-5)


def test_a_language_model_learns_to_end_soon_and_its_reference_stays(language_model):
    policy = lm_policy(language_model)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    fine = PreferenceTuner(
        policy, None, short_ones, loss="ppo", inner_steps=2, lr=3e-3, generator=generator, micro_batch=32
    )
    history = fine.fit(PROMPTS * 4, 64 * 8, evaluate_every=8)
    assert history.reward[-1] > history.reward[0] + 1
    assert history.kl[0] == 0
    assert history.kl[-1] > 0.1
    assert history.reward_queries[-1] == 512
    assert 512 <= history.generated_tokens[-1] < 6 * 512
    assert history.trained_tokens[-1] == 2 * history.generated_tokens[-1]
    reference = fine.ref.model.state_dict()
    assert all(torch.equal(value, reference[name]) for name, value in before.items())


def test_the_reference_of_adapters_is_the_model_without_them(language_model):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", init_lora_weights=False)
    bare = lm_policy(language_model)
    policy = lm_policy(peft.get_peft_model(copy.deepcopy(language_model), adapters))
    actions = policy.sample(PROMPTS, 2, torch.Generator().manual_seed(0))
    plain = bare.log_prob(PROMPTS, actions)
    assert not torch.allclose(policy.log_prob(PROMPTS, actions), plain, atol=1e-3)
    torch.testing.assert_close(policy.reference().log_prob(PROMPTS, actions), plain, rtol=1e-4, atol=1e-5)
    assert policy.reference().model is policy.model


def test_checkpointing_changes_memory_not_the_gradient(language_model):
    gradients = []
    for checkpointing in (False, True):
        policy = lm_policy(language_model, gradient_checkpointing=checkpointing)
        actions = torch.full((4, 2, 6), 3)
        policy.log_prob(PROMPTS, actions).sum().backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-5)


class Letters:
    """A tokenizer of single letters."""

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(chr(97 + token) for token in row if token or not skip_special_tokens) for row in rows]


def test_a_reward_on_texts_sees_every_answer_with_its_prompt():
    actions = torch.tensor([[[1, 2, 0], [3, -1, -1]], [[2, 0, -1], [2, 2, 2]]])
    seen = {}

    def score(prompts, completions, completion_ids):
        seen.update(zip(completions, prompts, strict=True))
        return [len(ids) for ids in completion_ids]

    rewards = text_reward(score, Letters())([[3, 4], [5]], actions)
    assert rewards.tolist() == [[3.0, 1.0], [2.0, 3.0]]
    assert seen == {"bc": "de", "d": "de", "c": "f", "ccc": "f"}


def test_a_reward_model_scores_every_answer_with_its_prompt():
    class Total(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, input_ids, attention_mask):
            return (self.weight * input_ids * attention_mask).sum(1)

    actions = torch.tensor([[[1, 2, 0], [3, -1, -1]], [[2, 0, -1], [2, 2, 2]]])
    rewards = model_reward(Total(), batch_size=3, pad_token_id=9)([[3, 4], [5]], actions)
    assert rewards.tolist() == [[10.0, 10.0], [7.0, 11.0]]
    assert not rewards.requires_grad


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (torch.tensor([[[-1, -1]]]), "no empty answer"),
        (torch.tensor([[[1, -1, 2]]]), "nothing but -1 after the end"),
        (torch.tensor([[1, 2]]), r"actions must have shape \(1, answers, tokens\)"),
    ],
)
def test_bad_answers_are_named(language_model, actions, message):
    with pytest.raises(ValueError, match=message):
        lm_policy(language_model).log_prob([[3]], actions)
