"""Multipliers by hand, proxy points of planted surfaces, the search, and PPO that meets its thresholds."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from workingpapers.alignment.constrained_rlhf import (
    ConstrainedPPO,
    ConstrainedPPOConfig,
    Episodes,
    LagrangeMixer,
    LanguageActor,
    ThresholdSearch,
    ValueHeads,
    estimate_proxy_points,
    starting_simplex,
)

# ---------------------------------------------------------------------------------------------------------- multipliers


@pytest.mark.parametrize("kind", ["eq", "ge", "le"])
def test_weights_and_mixture_are_those_of_the_formula(kind):
    mixer = LagrangeMixer([0.0, 0.0], kind, normalize=False)
    mixer.multipliers.copy_(torch.tensor([0.5, -1.0]))
    squash = np.tanh if kind == "eq" else lambda x: 1 / (1 + np.exp(-x))
    f = squash(np.array([0.5, -1.0]))
    np.testing.assert_allclose(mixer.weights(), f)
    task, constraints = torch.randn(5), torch.randn(5, 2)
    sign = -1.0 if kind == "le" else 1.0
    expected = (2 - f.sum()) * task.numpy() + sign * (constraints.numpy() * f).sum(1)
    np.testing.assert_allclose(mixer.mix(task, constraints), expected, rtol=1e-5)


@pytest.mark.parametrize(("kind", "sign"), [("eq", 1.0), ("ge", 1.0), ("le", -1.0)])
def test_the_step_of_the_multipliers(kind, sign):
    mixer = LagrangeMixer([1.0, -0.5], kind, lr=0.2, momentum=0.3, max_grad_norm=0.4, init=0.3)
    mu, velocity = np.full(2, 0.3), np.zeros(2)
    for returns in ([0.9, -0.3], [5.0, 4.0], [1.0, -0.5]):
        mixer.update(torch.tensor(returns))
        f = np.tanh(mu) if kind == "eq" else 1 / (1 + np.exp(-mu))
        slope = 1 - f**2 if kind == "eq" else f * (1 - f)
        gradient = slope * sign * (np.array(returns) - [1.0, -0.5])
        gradient *= min(1.0, 0.4 / (np.linalg.norm(gradient) + 1e-6))
        velocity = 0.3 * velocity + gradient
        mu = mu - 0.2 * velocity
        np.testing.assert_allclose(mixer.multipliers, mu, rtol=1e-6)


def test_a_violated_constraint_gains_weight_at_once_with_the_proportional_term():
    for kind, short in (("eq", 0.2), ("ge", 0.2), ("le", 0.8)):
        slow, quick = LagrangeMixer([0.5], kind), LagrangeMixer([0.5], kind, proportional=3.0)
        before = float(slow.weights())
        for mixer in (slow, quick):
            mixer.update(torch.tensor([short]))
        assert float(quick.weights()) > float(slow.weights()) + 0.1 > before + 0.1
        assert float(quick.violations) == pytest.approx(0.3)
        quick.update(torch.tensor([0.5]))  # met: the proportional part is gone
        assert float(quick.weights()) == pytest.approx(float(quick._squash(quick.multipliers)))


def test_kinds_may_differ_and_advantages_are_normalised_one_by_one():
    mixer = LagrangeMixer([0.0, 0.0], ["ge", "le"])
    task, constraints = torch.randn(8, 3), 100.0 * torch.randn(8, 3, 2) + 7.0
    mask = torch.rand(8, 3) < 0.7
    found = mixer.mix(task, constraints, mask)

    def normal(x):
        return (x - x[mask].mean()) / x[mask].std()

    expected = normal(task) + 0.5 * normal(constraints[..., 0]) - 0.5 * normal(constraints[..., 1])
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert not found[~mask].any()
    constant = mixer.mix(torch.ones(4), torch.ones(4, 2))
    assert torch.equal(constant, torch.zeros(4))


def test_the_average_is_over_updates_and_the_state_round_trips():
    mixer = LagrangeMixer([0.5, 0.5], momentum=0.5)
    assert torch.equal(mixer.averaged_weights(), mixer.weights())
    seen = []
    for step in range(4):
        mixer.update(torch.tensor([0.1 * step, 1.0]))
        seen.append(mixer.weights())
    torch.testing.assert_close(mixer.averaged_weights(), torch.stack(seen).mean(0))
    other = LagrangeMixer([0.0, 0.0], momentum=0.5)
    other.load_state_dict(mixer.state_dict())
    for one in (mixer, other):
        one.update(torch.tensor([0.3, 0.2]))
    assert torch.equal(other.multipliers, mixer.multipliers)
    assert torch.equal(other.averaged_weights(), mixer.averaged_weights())


def test_an_unreachable_threshold_is_told_and_a_clamp_holds():
    mixer = LagrangeMixer([10.0], "ge", init=6.0)
    for _ in range(49):
        mixer.update(torch.tensor([1.0]))
    with pytest.warns(RuntimeWarning, match="out of reach"):
        mixer.update(torch.tensor([1.0]))
    held = LagrangeMixer([10.0], "ge", lr=5.0, init=3.5, clamp=4.0)
    for _ in range(60):
        held.update(torch.tensor([1.0]))
    assert float(held.multipliers) == 4.0


def test_no_gradient_reaches_the_multipliers():
    mixer = LagrangeMixer([0.5])
    task = torch.randn(4, requires_grad=True)
    mixer.mix(task, torch.randn(4, 1)).sum().backward()
    assert not any(True for _ in mixer.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LagrangeMixer([]), "thresholds"),
        (lambda: LagrangeMixer([math.nan]), "thresholds"),
        (lambda: LagrangeMixer([1.0], "gt"), "kind"),
        (lambda: LagrangeMixer([1.0], ["ge", "le"]), "kind"),
        (lambda: LagrangeMixer([1.0], lr=0.0), "lr"),
        (lambda: LagrangeMixer([1.0], momentum=1.0), "momentum"),
        (lambda: LagrangeMixer([1.0]).mix(torch.zeros(3), torch.zeros(3, 2)), "adv_constraints"),
        (lambda: LagrangeMixer([1.0]).mix(torch.full((3,), math.nan), torch.zeros(3, 1)), "finite"),
        (lambda: LagrangeMixer([1.0]).mix(torch.zeros(1), torch.zeros(1, 1)), "two entries"),
        (lambda: LagrangeMixer([1.0]).update(torch.tensor([1.0, 2.0])), "mean_returns"),
        (lambda: LagrangeMixer([1.0]).update(torch.tensor([math.inf])), "mean_returns"),
        (lambda: estimate_proxy_points(np.zeros((5, 2)), np.zeros(4)), "shapes"),
        (lambda: estimate_proxy_points(np.zeros((20, 2)), np.zeros(20)), "vary"),
        (lambda: estimate_proxy_points(np.eye(2), np.zeros(2)), "at least 9 points"),
        (
            lambda: estimate_proxy_points(np.random.default_rng(0).random((30, 1)), np.zeros(30), min_density=1e9),
            "dense",
        ),
        (lambda: ThresholdSearch(None, None, np.zeros((2, 2))), "simplex"),
        (lambda: ThresholdSearch(None, None, np.ones((3, 2))), "flat"),
        (lambda: starting_simplex([0.0, 1.0], [1.0, 1.0]), "differ"),
        (lambda: ConstrainedPPO(Plane(), thresholds=[]), "thresholds"),
        (lambda: ConstrainedPPO(Plane(), thresholds=[1.0], variant="nu"), "variant"),
        (lambda: ConstrainedPPO(nn.Linear(1, 1), thresholds=[1.0]), "give policy and value"),
        (lambda: ConstrainedPPOConfig(episodes=1), "episodes"),
        (lambda: ConstrainedPPO(Plane(2), thresholds=[1.0, 2.0]).train(1), "outputs"),
        (lambda: ConstrainedPPO(Plane(2), thresholds=[1.0]).train(1), "rewards of every step"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --------------------------------------------------------------------------------------------------------- proxy points


def runs(seed, peak, noise=0.02):
    """Three training runs from (0, 0): along the first reward, along the second, and along both."""
    rng = np.random.default_rng(seed)
    steps = np.linspace(0, 1, 120)[:, None]
    points = np.concatenate([steps * direction for direction in ([1.0, 0.4], [0.3, 1.0], [0.9, 0.9])])
    points += 0.05 * rng.standard_normal(points.shape)
    quality = -((points - peak) ** 2).sum(1) - 0.8 * (points[:, 0] - peak[0]) * (points[:, 1] - peak[1])
    return points, quality + noise * rng.standard_normal(len(points))


def test_the_peak_of_a_planted_surface_is_found():
    errors = []
    for seed in range(3):
        points, quality = runs(seed, peak := np.array([0.45, 0.6]))
        found = estimate_proxy_points(points, quality)
        errors.append(np.abs(found.theta - peak).max())
        assert found.value == pytest.approx(quality.max(), abs=0.1)
        assert not found.mask.all()
        assert np.abs(found.independent - found.theta).max() > 0.05, "rewards are correlated"
    assert np.mean(errors) < 0.08


def test_the_mask_keeps_a_high_polynomial_from_the_empty_corners():
    points, quality = runs(0, np.array([0.45, 0.6]))
    wild = estimate_proxy_points(points, quality, degree=10)
    everywhere = wild.surface(wild.candidates)
    corner = wild.candidates[everywhere.argmax()]
    assert np.abs(corner - [0.45, 0.6]).max() > 0.3, "without the mask it would be far away"
    assert np.abs(wild.theta - [0.45, 0.6]).max() < 0.2
    assert estimate_proxy_points(points, quality).surface.degree < 6
    three = np.column_stack([points, points[:, 0] ** 2])
    assert estimate_proxy_points(three, quality, degree=2).theta.shape == (3,)


# ---------------------------------------------------------------------------------------------------------- the search


def test_the_search_climbs_to_the_maximum_and_remembers():
    asked = []

    def evaluate():
        return -float(((asked[-1] - [0.3, 0.7]) ** 2).sum()) * 10

    search = ThresholdSearch(asked.append, evaluate, [[0.0, 0.0], [0.2, 0.0], [0.0, 0.2]], tol=1e-6, cache_within=1e-4)
    found = search.run(200)
    assert found.converged
    assert found.evaluations == len(asked)
    np.testing.assert_allclose(found.thresholds, [0.3, 0.7], atol=0.01)
    assert all(np.abs(one - other).max() >= 1e-4 for k, one in enumerate(asked) for other in asked[:k])
    coarse = ThresholdSearch(None, None, [[0.0, 0.0], [0.2, 0.0], [0.0, 0.2]], tol=0.0, cache_within=0.1)
    values = []
    for _ in range(6):
        point = coarse.ask()
        values.append(-float(((point - [0.3, 0.7]) ** 2).sum()))
        coarse.tell(values[-1])
    assert coarse.result().value == max(values)


def test_moves_of_the_simplex():
    """Reflection between best and second-worst; expansion beyond the best; inside contraction; shrinking."""

    def second(values):
        search = ThresholdSearch(None, None, [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], tol=0.0, cache_within=0.0)
        points = []
        for value in values:
            points.append(search.ask().tolist())
            search.tell(value)
        return [*points, search.ask().tolist()]

    start = [3.0, 2.0, 1.0]  # the worst is (0, 1), the centre of the others (0.5, 0)
    assert second(start)[3] == [1.0, -1.0]
    assert second([*start, 4.0])[4] == [1.5, -2.0]
    assert second([*start, 1.5])[4] == [0.25, 0.5]
    assert second([*start, 1.5, 0.5])[5] == [0.5, 0.0]
    assert second([*start, 1.5, 0.5, 0.0])[6] == [0.0, 0.5]
    assert second([*start, 2.5])[4] == [0.0, -1.0]  # accepted: (1, 0) is the worst now


# ------------------------------------------------------------------------------------------------------ constrained PPO

REWARDS = torch.tensor([[1.0, 0.0], [0.3, 0.7]])  # rewards of a point in the plane, correlated
START, DEVIATION = 0.1, 0.15


class Plane:
    """One-step episodes of a Gaussian policy; meeting (0.5, 0.6) costs 10.1043 nats at least."""

    def __init__(self, streams=3):
        self.mean = nn.Parameter(torch.full((2,), START))
        self.streams = streams

    def parameters(self):
        return [self.mean]

    def rollout(self, episodes, generator):
        points = self.mean.detach() + DEVIATION * torch.randn(episodes, 2, generator=generator)
        logprobs, reference = (
            -((points - mean) ** 2).sum(1, keepdim=True) / (2 * DEVIATION**2)
            for mean in (self.mean.detach(), torch.full((2,), START))
        )
        mask = torch.ones(episodes, 1, dtype=torch.bool)
        return Episodes(points, mask, logprobs, reference, (points @ REWARDS.T)[:, None])

    def evaluate(self, episodes, rows):
        points = episodes.data[rows]
        logprobs = -((points - self.mean) ** 2).sum(1, keepdim=True) / (2 * DEVIATION**2)
        return logprobs, torch.zeros(len(rows), 1, self.streams)


def trained(variant, updates=500, thresholds=(0.5, 0.6), seed=0, **options):
    options = {"learning_rate": 0.02, "kl_coef": 0.0, "target_kl": None, "proportional": 3.0} | options
    args = ConstrainedPPOConfig(episodes=128, minibatch=128, epochs=1, random_state=seed, **options)
    actor = Plane(1 if variant in ("sat", "ppo") else 3)
    trainer = ConstrainedPPO(actor, thresholds=thresholds, variant=variant, args=args)
    trainer.train(updates)
    return trainer


def means(trainer, last=100):
    return np.mean([[row["return_0"], row["return_1"]] for row in trainer.history[-last:]], axis=0)


def test_damped_variants_meet_their_thresholds_at_the_least_divergence():
    equal = trained("xi")
    np.testing.assert_allclose(means(equal), [0.5, 0.6], rtol=0.06)
    for variant in ("mu", "all"):
        np.testing.assert_allclose(means(trained(variant, 400)), [0.5, 0.6], rtol=0.15)
    divergence = np.mean([row["kl"] for row in equal.history[-100:]])
    assert divergence == pytest.approx(10.1043, rel=0.08)
    np.testing.assert_allclose(means(trained("sat", 300)), [0.5, 0.6], rtol=0.06)


def test_without_constraints_rewards_run_away_and_constraints_already_met_cost_nothing():
    assert (means(trained("ppo", 150)) > 1.5).all()
    satisfied = trained("mu", 300, thresholds=(0.05, 0.05))
    np.testing.assert_allclose(means(satisfied), 0.1, atol=0.02)
    assert np.mean([row["kl"] for row in satisfied.history[-100:]]) < 0.1


def test_plain_multipliers_circle_and_their_averages_settle():
    plain = trained("xi", 900, proportional=0.0)
    tail = np.array([row["return_0"] for row in plain.history[-600:]])
    assert tail.std() > 0.1
    assert tail.mean() == pytest.approx(0.5, abs=0.12)


def test_the_price_of_divergence_follows_its_target():
    pulled = trained("ppo", 150, kl_coef=0.2, target_kl=0.5)
    assert pulled.kl_coef > 0.2
    assert pulled.history[-1]["kl"] < trained("ppo", 150).history[-1]["kl"] / 5
    assert "weight_0" not in pulled.history[-1]


def test_a_resumed_run_goes_on_identically():
    whole = trained("xi", 20)
    first = trained("xi", 8)
    state = first.state_dict()
    first.train(3)
    second = trained("xi", 0)
    second.load_state_dict(state)
    second.train(12)
    assert second.history == whole.history
    assert torch.equal(second.actor.mean, whole.actor.mean)


def test_train_until_moves_the_thresholds_and_stops_near_them():
    trainer = trained("xi", 0)
    assert trainer.train_until([0.3, 0.35], max_updates=400)
    used = len(trainer.history)
    assert used < 400
    last = trainer.history[-1]
    assert last["return_0"] == pytest.approx(0.3, rel=0.05)
    assert not trainer.train_until([50.0, 50.0], max_updates=3)
    assert len(trainer.history) == used + 3
    with pytest.raises(ValueError, match="no thresholds"):
        trained("ppo", 0).train_until([1.0, 1.0], max_updates=1)


def test_gymnasium_environments():
    gymnasium = pytest.importorskip("gymnasium")

    class Walk(gymnasium.Env):
        """Steps left or right for five to seven steps; one reward for each direction."""

        observation_space = gymnasium.spaces.Box(-9, 9, (1,))
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.left = int(self.np_random.integers(5, 8))
            return np.zeros(1), {}

        def step(self, action):
            self.left -= 1
            reward = np.array([float(action == 1), float(action == 0)])
            return np.full(1, float(self.left)), 0.0, self.left == 0, False, {"rewards": reward}

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(2))

        def forward(self, observations):
            return torch.distributions.Categorical(logits=self.logits.expand(len(observations), 2))

    torch.manual_seed(0)
    args = ConstrainedPPOConfig(learning_rate=0.05, episodes=16, minibatch=16, epochs=2, proportional=1.0)
    trainer = ConstrainedPPO(Policy(), nn.Linear(1, 2), thresholds=[4.5], variant="xi", env=OneReward(Walk), args=args)
    history = trainer.train(60)
    assert np.mean([row["return_0"] for row in history[-20:]]) == pytest.approx(4.5, abs=0.4)
    assert 5.5 < history[-1]["length"] < 6.6
    with pytest.raises(ValueError, match="rewards"):
        ConstrainedPPO(Policy(), nn.Linear(1, 3), thresholds=[1.0, 1.0], env=OneReward(Walk), args=args).train(1)


def OneReward(make):  # noqa: N802
    def made():
        env = make()
        step = env.step

        def first_reward(action):
            *rest, info = step(action)
            return *rest, {"rewards": info["rewards"][:1]}

        env.step = first_reward
        return env

    return made


def test_language_models():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    value = ValueHeads(transformers.LlamaModel(config), 3)
    rewards = [
        lambda prompts, answers: [float(np.mean([token == 3 for token in answer])) for answer in answers],
        lambda prompts, answers: [float(a[0] == p[-1]) for p, a in zip(prompts, answers, strict=True)],
    ]
    prompts = [[1, 2], [5], [4, 6, 7]]
    actor = LanguageActor(model, value, prompts, rewards, max_new_tokens=5)
    episodes = actor.rollout(12, torch.Generator().manual_seed(0))
    logprobs, values = actor.evaluate(episodes, torch.arange(12))
    torch.testing.assert_close(logprobs.detach(), episodes.logprobs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(episodes.ref_logprobs, episodes.logprobs, rtol=1e-4, atol=1e-5)
    assert values.shape == (*episodes.mask.shape, 3)
    expected = [rewards[0](None, [answer])[0] for answer in episodes.data.responses()]
    torch.testing.assert_close(episodes.returns[:, 0], torch.tensor(expected))
    assert not episodes.rewards[:, :-1].any(), "answers of one length are paid at their last token"

    args = ConstrainedPPOConfig(learning_rate=5e-3, episodes=64, minibatch=32, epochs=2, proportional=3.0, lam=1.0)
    text = {"max_new_tokens": 5}
    trainer = ConstrainedPPO(model, value, rewards, [0.5, 0.4], variant="xi", prompts=prompts, text=text, args=args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = trainer.train(40)
    assert history[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    np.testing.assert_allclose(means(trainer, 20), [0.5, 0.4], atol=0.12)
