"""RTO on small transformers: the rewards of the models, and the loop around them."""

from dataclasses import replace

import pytest
import torch

from workingpapers.alignment import (
    PPOTrainer,
    RewardModel,
    RTOConfig,
    RTOReward,
    RTOTrainer,
    delimiter_mask,
    sample_responses,
    token_logprobs,
    token_rewards,
)

transformers = pytest.importorskip("transformers")

END, WANTED = 1, 3
PROMPTS = [[2], [4, 5], [6, 7, 8]]
ARGS = RTOConfig(
    algorithm="reinforce",
    learning_rate=3e-3,
    warmup=None,
    batch_size=4,
    rollout_size=3,
    samples_per_prompt=2,
    max_new_tokens=5,
    eos_token_id=END,
    max_steps=2,
    beta1=0.3,
)


def network(seed, kind="LlamaForCausalLM", vocabulary=12):
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, kind)(config).double().eval()


def wanted_tokens(batch):
    return ((batch.input_ids == WANTED) & batch.response_mask).sum(1).double()


def answers(model):
    generator = torch.Generator().manual_seed(0)
    return sample_responses(model, PROMPTS, n=2, max_new_tokens=5, eos_token_id=END, generator=generator)


def logps(model, batch):
    return token_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_mask).detach()


@pytest.mark.parametrize("granularity", ["token", "sentence", "last", "shaping"])
def test_the_rewards_of_a_batch_are_those_of_its_log_probabilities(granularity):
    policy, reference, dpo, older = (network(seed) for seed in range(4))
    scorer = RewardModel(network(5, "LlamaModel"), generator=torch.Generator().manual_seed(0))
    batch = answers(policy)
    reward = RTOReward(
        dpo, reference, scorer, beta1=0.3, beta2=0.2, clip=0.01, granularity=granularity, score_clip=0.1,
        delimiter_ids=[5, 6], dpo_ref_model=older, batch_size=2,
    )  # fmt: skip
    expected = token_rewards(
        logps(dpo, batch), logps(reference, batch), batch.logprobs, batch.response_mask,
        scorer(batch.input_ids, batch.attention_mask).detach().clamp(-0.1, 0.1),
        beta1=0.3, beta2=0.2, clip=0.01, granularity=granularity, delimiters=delimiter_mask(batch.input_ids, [5, 6]),
        dpo_ref_logps=logps(older, batch),
    )  # fmt: skip
    torch.testing.assert_close(reward(batch), expected, atol=1e-6, rtol=1e-6)


def test_the_trainer_pays_what_the_reward_says_and_reports_its_parts():
    policy, reference, dpo = (network(seed) for seed in range(3))
    run = RTOTrainer(policy, reference, dpo, PROMPTS, args=ARGS, sentence_reward=wanted_tokens)
    row = run.train(1)[0]
    batch = run.latest.batch
    again = RTOReward(dpo, reference, wanted_tokens, beta1=0.3, beta2=ARGS.beta, clip=0.05, score_clip=10.0)
    assert row["return"] == pytest.approx(again(batch).sum(1).mean().item(), abs=1e-6)
    ratios = (0.3 * (logps(dpo, batch) - logps(reference, batch))).clamp(-0.05, 0.05).sum(1)
    assert row["dpo_reward"] == pytest.approx(ratios.mean().item(), abs=1e-6)


def test_without_the_dpo_part_it_is_ppo():
    runs = [
        RTOTrainer(
            network(0), network(1), network(2), PROMPTS, args=replace(ARGS, beta1=0.0), sentence_reward=wanted_tokens
        ),
        PPOTrainer(network(0), network(1), PROMPTS, args=ARGS, reward=wanted_tokens),
    ]
    ours, theirs = (run.train() for run in runs)
    for one, other in zip(ours, theirs, strict=True):
        assert {name: one[name] for name in other} == pytest.approx(other)


def test_token_rewards_alone_move_the_policy_towards_the_dpo_model():
    policy, reference, dpo = network(0), network(0), network(0)
    with torch.no_grad():
        dpo.lm_head.weight[WANTED] = 3 * dpo.model.norm.weight * torch.sign(dpo.lm_head.weight[WANTED])
    args = replace(
        ARGS, beta3=0.0, beta=0.0, beta1=1.0, ratio_clip=None, learning_rate=3e-2, max_steps=8, samples_per_prompt=12,
        batch_size=36,
    )  # fmt: skip
    history = RTOTrainer(policy, reference, dpo, PROMPTS, args=args).train()
    assert history[-1]["dpo_reward"] > history[0]["dpo_reward"] + 0.5
    assert history[-1]["reward"] == 0


def test_a_peft_policy_brings_its_own_reference_and_ppo_its_critic():
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = peft.get_peft_model(network(0), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    scorer = RewardModel(network(5, "LlamaModel"), generator=torch.Generator().manual_seed(0))
    args = replace(ARGS, algorithm="ppo", granularity="sentence", delimiter_ids=(5,))
    history = RTOTrainer(policy, None, network(2), PROMPTS, args=args, sentence_reward=scorer).train()
    assert history[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert history[1]["value_loss"] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: RTOReward(m, network(1), None), "reward_model must be given when beta3 is above 0"),
        (lambda m: RTOReward(m, network(1), wanted_tokens, granularity="sentence"), "delimiter_ids must be given"),
        (lambda m: RTOReward(m, network(1, vocabulary=13), wanted_tokens), "12 tokens, got 13"),
        (lambda m: RTOReward(m, None, wanted_tokens), "ref_model may be None only"),
        (lambda m: RTOReward(m, network(1), wanted_tokens, clip=-1.0), "clip must be at least 0"),
        (lambda m: RTOReward(m, network(1), wanted_tokens)(answers(m).__class__(*[torch.ones(1, 2)] * 3)), "logprobs"),
        (lambda m: RTOTrainer(m, network(1), network(2), PROMPTS, args=ARGS), "sentence_reward must be given"),
        (
            lambda m: RTOTrainer(m, network(1), network(2, vocabulary=13), PROMPTS, args=replace(ARGS, beta3=0.0)),
            "12",
        ),
        (lambda m: RTOConfig(granularity="sentence"), "delimiter_ids must be given"),
        (lambda m: RTOConfig(beta1=-1.0), "beta1 must be at least 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(network(0))
