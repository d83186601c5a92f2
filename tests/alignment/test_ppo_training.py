"""Tests of the loop: its first update is the policy gradient, its parts are interchangeable, its runs resume."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from workingpapers.alignment import (
    PPOConfig,
    PPOTrainer,
    RewardModel,
    gae,
    kl_shaped_rewards,
    token_logprobs,
    whiten,
)

transformers = pytest.importorskip("transformers")

VOCABULARY, END, WANTED = 12, 1, 3
PROMPTS = [[2], [4, 5], [6, 7, 8], [2, 9], [10]]
ARGS = PPOConfig(
    learning_rate=3e-3,
    value_learning_rate=1e-2,
    warmup=None,
    batch_size=4,
    accumulation=2,
    rollout_size=5,
    samples_per_prompt=3,
    max_new_tokens=5,
    eos_token_id=END,
    max_steps=2,
    beta=0.05,
)


def wanted_tokens(batch):
    return ((batch.input_ids == WANTED) & batch.response_mask).sum(1).double()


def network(kind, seed):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config)


def policy(seed=0):
    return network(transformers.LlamaForCausalLM, seed).double()


def critic(seed=2):
    return RewardModel(network(transformers.LlamaModel, seed).double(), generator=torch.Generator().manual_seed(seed))


def trainer(args=ARGS, *, model=None, kind=PPOTrainer, prompts=PROMPTS, reward=wanted_tokens, **options):
    model = policy() if model is None else model
    if args.algorithm == "ppo":
        options.setdefault("critic", critic())
    return kind(model, policy(1), prompts, args=args, reward=reward, **options)


def parameters(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def rollout_logprobs(model, batch):
    return token_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_mask)


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
@pytest.mark.parametrize("average", ["sequences", "tokens"])
def test_the_first_update_is_the_policy_gradient_with_these_advantages(algorithm, average):
    args = replace(ARGS, algorithm=algorithm, average=average, batch_size=4, accumulation=4, max_grad_norm=1e9)
    model, before, values_before = policy(), policy(), critic()
    step_length = 0.1
    run = trainer(args, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    run.args = replace(args, learning_rate=step_length)
    row = run.train(1)[0]

    batch = run.latest.batch
    mask = batch.response_mask
    logprobs = rollout_logprobs(before, batch)
    torch.testing.assert_close(logprobs.detach(), batch.logprobs.to(logprobs), atol=1e-6, rtol=0)
    reference = rollout_logprobs(policy(1), batch).detach()
    rewards = kl_shaped_rewards(wanted_tokens(batch), logprobs.detach(), reference, mask, beta=0.05)
    values = values_before.token_values(batch.input_ids, batch.attention_mask).detach().double()
    if algorithm == "reinforce":  # rewards-to-go
        advantages = rewards.flip(1).cumsum(1).flip(1).masked_fill(~mask, 0.0)
    else:
        advantages = gae(rewards, values, mask, gamma=1.0, lam=0.95)[0]
    gains = whiten(advantages, mask) * logprobs
    objective = (gains.sum(1) / mask.sum(1)).mean() if average == "sequences" else gains.sum() / mask.sum()
    objective.backward()
    moved = torch.cat(
        [(now - then).reshape(-1) for now, then in zip(model.parameters(), before.parameters(), strict=True)]
    )
    ascent = torch.cat([parameter.grad.reshape(-1) for parameter in before.parameters()])
    torch.testing.assert_close(moved.detach(), step_length * ascent, atol=1e-7, rtol=1e-4)
    assert row["gradient_norm"] == pytest.approx(ascent.norm().item(), rel=1e-4)
    assert row["clip_fraction"] == 0
    assert row["reward"] == pytest.approx(wanted_tokens(batch).mean().item())
    assert row["kl"] == pytest.approx((logprobs - reference).sum(1).mean().item(), abs=1e-5)
    assert row["return"] == pytest.approx(rewards.sum(1).mean().item(), abs=1e-5)


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_the_reward_rises(algorithm):
    # the critic's head is untrained: PPO's first advantages are noise
    args = replace(ARGS, algorithm=algorithm, learning_rate=3e-2, beta=0.01, max_steps=10)
    history = trainer(replace(args, samples_per_prompt=8, batch_size=40, rollout_epochs=2)).train()
    assert history[-1]["reward"] > 3 * history[0]["reward"]
    assert history[-1]["kl"] > history[0]["kl"]
    assert [row["step"] for row in history] == list(range(1, 11))


def test_the_critic_learns_the_returns():
    args = replace(ARGS, max_steps=6, learning_rate=1e-9, value_learning_rate=3e-2, value_clip=None)
    history = trainer(replace(args, samples_per_prompt=8, batch_size=40, rollout_epochs=4)).train()
    assert history[-1]["value_loss"] < 0.5 * history[0]["value_loss"]


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been():
    args = replace(ARGS, max_steps=4, target_kl=0.01, warmup=0.5)
    whole = trainer(args)
    history = whole.train()
    first = trainer(args)
    first.train(2)
    second = trainer(args, model=policy(7), critic=critic(8))  # whatever its parameters are
    second.load_state_dict(first.state_dict())
    assert second.train() == history
    assert torch.equal(parameters(second.model), parameters(whole.model))
    assert torch.equal(parameters(second.critic), parameters(whole.critic))
    with pytest.raises(ValueError, match="same algorithm"):
        trainer(replace(args, algorithm="reinforce")).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 8, "accumulation": 1}, {"sampling_batch_size": 4}, {"gradient_checkpointing": True}],
)
def test_how_the_work_is_cut_does_not_matter(change):
    whole, other = trainer(), trainer(replace(ARGS, **change))
    for one, two in zip(whole.train(), other.train(), strict=True):
        assert one == pytest.approx(two, rel=1e-6, abs=1e-8)
    torch.testing.assert_close(parameters(whole.model), parameters(other.model), atol=1e-6, rtol=0)
    torch.testing.assert_close(parameters(whole.critic), parameters(other.critic), atol=1e-6, rtol=0)


def test_bf16_keeps_the_ratio_near_one():
    args = replace(ARGS, bf16=True, batch_size=16, accumulation=1, max_steps=1)
    row = trainer(args, model=policy().float(), critic=critic().float()).train()[0]
    assert row["approx_kl"] < 1e-3
    assert torch.tensor(list(row.values())).isfinite().all()


def test_the_reference_of_a_peft_model_is_itself_without_adapters():
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(policy().float(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    args = replace(ARGS, algorithm="reinforce", learning_rate=1e-2, max_steps=3)
    history = PPOTrainer(adapted, None, PROMPTS, args=args, reward=wanted_tokens).train()
    assert history[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(history[-1]["kl"]) > 1e-4


class TwoStreams(PPOTrainer):
    """Score and divergence in streams of their own."""

    def _rewards(self, rollout):
        mask, nothing = rollout.batch.response_mask, torch.zeros_like(rollout.ref_logprobs)
        score = kl_shaped_rewards(rollout.scores, nothing, nothing, mask, beta=0.0)
        price = kl_shaped_rewards(0 * rollout.scores, rollout.logprobs, rollout.ref_logprobs, mask, beta=self.beta)
        return torch.stack([score, price])


class TwoHeads(nn.Module):
    """A critic that halves what another says."""

    def __init__(self):
        super().__init__()
        self.whole = critic()

    def token_values(self, input_ids, attention_mask):
        values = self.whole.token_values(input_ids, attention_mask)
        return torch.stack([0.5 * values, 0.5 * values])


def test_rewards_in_streams_add_up_to_the_same_advantage():
    one = trainer()
    two = trainer(kind=TwoStreams, critic=TwoHeads())
    first, second = one.train(1)[0], two.train(1)[0]
    for name in ("policy_loss", "gradient_norm", "return", "reward"):
        assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-8)
    with pytest.raises(ValueError, match="as many streams, got 2 and 1"):
        trainer(kind=TwoStreams).train(1)


def test_the_price_of_divergence_follows_its_target():
    run = trainer(replace(ARGS, target_kl=1e6, kl_rate=0.5))
    run.train(1)
    assert run.beta == pytest.approx(0.05 * (1 - 0.5 * 0.2))
    run = trainer(replace(ARGS, target_kl=1e-6))
    excess = 0.2 if run.train(1)[0]["kl"] > 1e-6 else -0.2  # an estimate, it may be negative
    assert run.beta == pytest.approx(0.05 * (1 + 0.1 * excess))


def test_without_a_critic_ppo_starts_from_a_copy_of_the_reward_model():
    reward = critic()
    before = parameters(reward)
    run = PPOTrainer(policy(), policy(1), PROMPTS, args=ARGS, reward=reward)
    run.train(1)
    assert torch.equal(parameters(reward), before)
    assert not torch.equal(parameters(run.critic), before)
    scores = reward(run.latest.batch.input_ids, run.latest.batch.attention_mask)
    torch.testing.assert_close(run.latest.scores, scores.detach())


def test_two_processes_give_the_rollouts_and_the_curve_of_one(tmp_path):
    pytest.importorskip("accelerate")
    if not distributed.is_available() or sys.platform != "linux":
        pytest.skip("needs gloo over the loopback")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    run = trainer(DISTRIBUTED)
    history = run.train()
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == len(history) == 4
        for one, other in zip(found, history, strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-7)
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), parameters(run.model), rtol=0, atol=1e-5)


# 5 prompts in rollouts of 4: the second rollout of an epoch has one prompt, so that one process draws nothing
DISTRIBUTED = replace(ARGS, rollout_size=4, max_steps=4)


def child(folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    run = trainer(DISTRIBUTED, accelerator=accelerator)
    history = run.train()
    rank = accelerator.process_index
    (Path(folder) / f"{rank}.json").write_text(json.dumps(history))
    torch.save(parameters(run.model), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


class Tokenizer:
    eos_token_id = END

    def __call__(self, text):
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


def test_prompts_may_be_text():
    run = trainer(replace(ARGS, eos_token_id=None), prompts=["abc", "d"], tokenizer=Tokenizer())
    run.train(1)
    assert run.latest.batch.finished.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trainer(prompts=["text"]), "tokenizer may be None only when prompts are token ids"),
        (lambda: trainer(prompts=[]), "at least one prompt"),
        (lambda: trainer(prompts=[[2], []]), "prompt 1 has no tokens"),
        (lambda: trainer(critic=None), "critic may be None only when reward is a RewardModel"),
        (lambda: PPOTrainer(policy(), None, PROMPTS, args=ARGS, reward=wanted_tokens), "ref_model may be None only"),
        (lambda: trainer(reward=lambda batch: torch.zeros(2)).train(), "one score for each of 15 answers"),
        (lambda: trainer(reward=lambda batch: torch.nan * wanted_tokens(batch)).train(), "scores must be finite"),
        (lambda: PPOConfig(algorithm="a2c"), "algorithm must be one of 'ppo', 'reinforce'"),
        (lambda: PPOConfig(lam=1.5), "lam must be at least 0 and at most 1"),
        (lambda: PPOConfig(clip=0.0), "clip must be above 0"),
        (lambda: PPOConfig(target_kl=0.0), "target_kl must be above 0"),
        (lambda: PPOConfig(rollout_size=0), "rollout_size must be at least 1"),
        (lambda: PPOConfig(beta=-1.0), "beta must be at least 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_networks_must_be_apart():
    model = policy()
    with pytest.raises(ValueError, match="frozen copy"):
        PPOTrainer(model, model, PROMPTS, args=ARGS, reward=wanted_tokens, critic=critic())
    with pytest.raises(ValueError, match="critic must not share trainable parameters"):
        PPOTrainer(model, policy(), PROMPTS, args=ARGS, reward=wanted_tokens, critic=RewardModel(model))
    with pytest.raises(TypeError, match="critic must have token_values"):
        PPOTrainer(model, policy(), PROMPTS, args=ARGS, reward=wanted_tokens, critic=policy())


if __name__ == "__main__":
    child(sys.argv[1])
