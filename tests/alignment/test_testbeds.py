"""The testbeds are what they say: numbers of the paper's code, laws of lengths, Gymnasium's contract."""

import math

import numpy as np
import pytest
import torch

from workingpapers.alignment import model_reward, testbeds
from workingpapers.alignment.testbeds import bump_reward, squashed_cauchy


def test_the_data_policy_has_the_published_masses():
    masses = squashed_cauchy()
    assert masses.sum().item() == pytest.approx(1)
    assert masses[0].item() == pytest.approx(0.0781, abs=5e-5)
    assert masses[99].item() == pytest.approx(0.0422, abs=5e-5)
    assert masses[1:99].argmax().item() + 1 == 16
    assert masses.min().item() == pytest.approx(0.00189, abs=5e-6)
    for centre, expected in ((70, 0.0390), (20, 0.3772)):
        env = testbeds.bump_bandit(centre)
        assert env.expected_reward(env.reference(), env.contexts(2)) == pytest.approx(expected, abs=5e-5)


def test_the_masses_are_those_of_samples():
    rng = np.random.default_rng(0)
    samples = np.tanh(-0.7 + 0.4 * rng.standard_cauchy(400_000))
    counts, _ = np.histogram(samples, bins=100, range=(-1, 1))
    np.testing.assert_allclose(counts / 400_000, squashed_cauchy(), atol=0.0015)


def test_the_bump_is_the_published_reward():
    values = bump_reward(torch.tensor([70, 80, 60, 20]), centre=70, width=10)
    torch.testing.assert_close(values, torch.tensor([1.0, math.exp(-1), math.exp(-1), math.exp(-25)]))
    assert bump_reward(torch.tensor(80), centre=70, width=20).item() == pytest.approx(math.exp(-0.25))


def test_the_network_is_fitted_to_the_data_on_its_contexts():
    env = testbeds.bump_bandit()
    contexts = env.contexts(10)
    untrained, fitted = (env.policy(contexts, steps=steps) for steps in (0, 100))
    torch.testing.assert_close(
        untrained.log_distribution(contexts).exp(), torch.full((10, 100), 0.01), rtol=1e-3, atol=0
    )
    log_p, log_data = fitted.log_distribution(contexts), env.probabilities.log()
    assert (log_p.exp() * (log_p - log_data)).sum(1).mean().item() < 0.01
    assert [tuple(layer.weight.shape) for layer in fitted.network if isinstance(layer, torch.nn.Linear)] == [
        (50, 100),
        (256, 50),
        (256, 256),
        (100, 256),
    ]


def test_contexts_repeat_with_their_seed_and_differ_without():
    env = testbeds.bump_bandit()
    assert torch.equal(env.contexts(3), env.contexts(3))
    assert not torch.equal(env.contexts(3), env.contexts(3, random_state=1))
    assert env.contexts(3).shape == (3, 100)


def test_the_bandit_is_a_gymnasium_environment():
    checker = pytest.importorskip("gymnasium.utils.env_checker")
    env = testbeds.bump_bandit().gymnasium()
    checker.check_env(env)
    context, _ = env.reset(seed=3)
    _, reward, ended, cut, _ = env.step(70)
    assert (reward, ended, cut) == (1.0, True, False)
    assert np.array_equal(env.reset(seed=3)[0], context)
    with pytest.raises(ValueError, match="reset must be called"):
        testbeds.bump_bandit().step(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: testbeds.bump_bandit(width=0), "width must be above 0"),
        (lambda: testbeds.bump_bandit(actions=1), "bins must be at least 2"),
        (
            lambda: testbeds.bump_bandit().reward(None, torch.tensor([[100]])),
            "actions must be at least 0 and below 100",
        ),
        (lambda: testbeds.token_bandit(new_tokens=0), "new_tokens must be at least 1"),
        (lambda: testbeds.length_task("max"), "kind must be one of"),
        (lambda: testbeds.length_task(mean=30, limit=24), "mean must be at least 1 and at most 24"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------ language models


def test_the_token_bandit_averages_bumps_over_all_ten_positions():
    env = testbeds.token_bandit(centre=70)
    actions = torch.full((2, 1, 9), 70)
    rewards = env.reward([[70], [0]], actions)
    torch.testing.assert_close(rewards, torch.tensor([[1.0], [0.9]]))
    assert env.prompts(5) == env.prompts(5)
    assert len(env.prompts(5)[0]) == 1


def test_the_token_policy_moves_to_the_data_policy():
    env = testbeds.token_bandit(vocabulary=20, new_tokens=3)
    generator = torch.Generator().manual_seed(0)
    distances = []
    for steps in (0, 40):
        drawn = env.policy(steps=steps).sample(env.prompts(400), 1, generator)
        shares = torch.bincount(drawn.flatten(), minlength=20) / drawn.numel()
        distances.append((shares - env.probabilities).abs().sum().item() / 2)
    assert distances[1] < 0.6 * distances[0]


def test_lengths_follow_their_law():
    task = testbeds.length_task("skew", mean=5, deviation=1.5, limit=8, skew=2.0)
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(1, 9, dtype=torch.float64)
    assert (task.data_lengths * places).sum() > (task.lengths * places).sum() + 0.5
    drawn = task.policy(steps=80).sample(task.prompts(500), 1, generator)
    lengths = (drawn != -1).sum(-1).flatten()
    shares = torch.bincount(lengths, minlength=9)[1:] / 500
    assert (shares - task.lengths).abs().sum().item() / 2 < 0.15


def test_rewards_of_lengths_and_the_pairs_they_make():
    task = testbeds.length_task("min", limit=4, mean=2)
    actions = torch.tensor([[[3, 0, -1, -1], [2, 3, 4, 5]]])
    assert task.reward(None, actions).tolist() == [[0.75, 0.25]]
    mode = testbeds.length_task("mode", limit=4, mean=2.5, deviation=0.01)
    assert mode.best == pytest.approx(2.5, abs=0.01)
    pairs = task.pairs(task.policy(steps=0), 100)
    assert 0 < len(pairs) < 50  # an untrained network hardly ever ends within four tokens
    assert all(len(pair.chosen) < len(pair.rejected) for pair in pairs)


def test_a_learned_reward_prefers_what_the_pairs_prefer():
    task = testbeds.length_task("min", limit=6, mean=3)
    policy = task.policy(steps=0)
    reward = model_reward(task.reward_model(task.pairs(policy, 100), steps=40))
    actions = policy.sample(task.prompts(60, random_state=1), 2, torch.Generator().manual_seed(1))
    prompts = task.prompts(60, random_state=1)
    found, true = reward(prompts, actions), task.reward(prompts, actions)
    untied = true[:, 0] != true[:, 1]
    agree = ((found[:, 0] > found[:, 1]) == (true[:, 0] > true[:, 1]))[untied].float().mean()
    assert agree > 0.85
