"""Tests of the losses, the gap and the loop: each fails when the idea it names is removed."""

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from workingpapers.alignment import GroupLoss, alignment_gap, kl_gradients, recommend
from workingpapers.alignment.onpolicy_preference import (
    best_of_n,
    dpo,
    group_advantages,
    ipo,
    ppo,
    pref_ft,
    reinforce,
    rwr,
    slic,
)

REWARDS = torch.tensor([[0.1, 0.7, 0.4], [0.9, 0.2, 0.9]], dtype=torch.float64)


@pytest.fixture
def logps():
    generator = torch.Generator().manual_seed(0)
    values = -5 * torch.rand(3, 2, 3, generator=generator, dtype=torch.float64)
    return values[0].clone().requires_grad_(), values[1], values[2]


# --------------------------------------------------------------------------------------------------- losses by the pair


def pairs_by_hand(threshold=0.0):
    return [
        (p, i, j)
        for p in range(2)
        for i in range(3)
        for j in range(3)
        if REWARDS[p, i] > REWARDS[p, j] and REWARDS[p, i] - REWARDS[p, j] >= threshold
    ]


@pytest.mark.parametrize("threshold", [None, 0.35])
def test_contrastive_losses_are_means_over_the_kept_pairs_of_all_prompts(logps, threshold):
    policy, ref, _ = logps
    kept = pairs_by_hand(threshold or 0.0)
    assert len(kept) == (5 if threshold is None else 3)  # the tie is dropped in both
    margins = torch.stack([(policy - ref)[p, i] - (policy - ref)[p, j] for p, i, j in kept])
    plain = torch.stack([policy[p, i] - policy[p, j] for p, i, j in kept])
    winners = torch.stack([policy[p, i] for p, i, _ in kept])
    torch.testing.assert_close(
        dpo(policy, ref, REWARDS, beta=0.3, threshold=threshold), -logsigmoid(0.3 * margins).mean()
    )
    torch.testing.assert_close(ipo(policy, ref, REWARDS, tau=10.0, threshold=threshold), ((margins - 10.0) ** 2).mean())
    torch.testing.assert_close(
        slic(policy, REWARDS, beta=0.5, delta=2.0, threshold=threshold), (2.0 - 0.5 * plain).clamp(min=0).mean()
    )
    torch.testing.assert_close(pref_ft(policy, REWARDS, threshold=threshold), -winners.mean())


def test_the_target_of_ipo_is_half_of_one_over_beta(logps):
    policy, ref, _ = logps
    torch.testing.assert_close(ipo(policy, ref, REWARDS, beta=0.05), ipo(policy, ref, REWARDS, tau=10.0))


def test_ties_alone_give_loss_zero_and_gradient_zero(logps):
    policy, ref, _ = logps
    equal = torch.ones_like(REWARDS)
    for loss in (
        dpo(policy, ref, equal),
        ipo(policy, ref, equal),
        slic(policy, equal),
        pref_ft(policy, equal),
        reinforce(policy, equal),
        ppo(policy, ref, equal),
    ):
        (gradient,) = torch.autograd.grad(loss, policy, retain_graph=True)
        assert loss.item() == 0
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_advantage_zero_whatever_the_rounding_of_their_mean(dtype):
    rewards = torch.full((3, 7), 0.1, dtype=dtype)
    assert not group_advantages(rewards).any()


# --------------------------------------------------------------------------------------------------- other closed forms


def test_two_answers_make_pref_ft_and_best_of_n_the_same(logps):
    policy = logps[0][:, :2]
    rewards = REWARDS[:, :2]
    torch.testing.assert_close(pref_ft(policy, rewards), best_of_n(policy, rewards))


def test_best_of_n_shares_the_place_among_ties(logps):
    policy = logps[0]
    by_hand = -(policy[0, 1] + (policy[1, 0] + policy[1, 2]) / 2) / 2
    torch.testing.assert_close(best_of_n(policy, REWARDS), by_hand)


@pytest.mark.parametrize(
    ("negative", "pushed"),
    [
        ("worst", lambda g: (g[0, 0] + g[1, 1]) / 2),
        ("mean", lambda g: ((g[0, 0] + g[0, 2]) / 2 + g[1, 1]) / 2),
        ("sum", lambda g: (g[0, 0] + g[0, 2] + g[1, 1]) / 2),
    ],
)
def test_pushing_down_takes_the_answers_it_names(logps, negative, pushed):
    policy, ref, _ = logps
    unbounded = best_of_n(policy, REWARDS, negative=negative, negative_weight=0.3, floor=None)
    torch.testing.assert_close(unbounded, best_of_n(policy, REWARDS) + 0.3 * pushed(policy))
    bounded = best_of_n(policy, REWARDS, negative=negative, negative_weight=0.3, ref_logps=ref, floor=1.0)
    torch.testing.assert_close(bounded, best_of_n(policy, REWARDS) + 0.3 * pushed((policy - ref).clamp(min=-1.0)))


def test_the_floor_bounds_the_push_down_where_there_is_none_otherwise():
    ref = torch.tensor([[-1.0, -1.0]])
    rewards = torch.tensor([[1.0, 0.0]])
    gone = torch.tensor([[-1.0, -1e4]], requires_grad=True)
    floored = best_of_n(gone, rewards, negative="worst", ref_logps=ref)
    assert torch.autograd.grad(floored, gone)[0][0, 1] == 0
    assert floored > -1
    free = best_of_n(gone, rewards, negative="worst", floor=None)
    assert torch.autograd.grad(free, gone)[0][0, 1] > 0
    assert free < -900


def test_rwr_weighs_by_the_exponential_of_the_reward_over_the_whole_batch(logps):
    policy = logps[0]
    weights = (REWARDS / 0.25).exp()
    torch.testing.assert_close(rwr(policy, REWARDS), -(weights * policy).sum() / weights.sum())
    torch.testing.assert_close(rwr(policy, REWARDS + 1e4), rwr(policy, REWARDS), rtol=1e-8, atol=0)
    sharp = rwr(policy, REWARDS, temperature=1e-3)
    torch.testing.assert_close(sharp, -(policy[1, 0] + policy[1, 2]) / 2)


def test_advantages_are_standardised_within_a_prompt_or_over_single_answers():
    spread = REWARDS.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(group_advantages(REWARDS), (REWARDS - REWARDS.mean(1, keepdim=True)) / spread)
    single = group_advantages(REWARDS.reshape(6, 1))
    torch.testing.assert_close(single, ((REWARDS - REWARDS.mean()) / REWARDS.std(correction=0)).reshape(6, 1))


def test_clip_and_shift_remove_the_push_down_in_different_ways(logps):
    policy = logps[0]

    def pushed_down(negative):
        (gradient,) = torch.autograd.grad(reinforce(policy, REWARDS, negative=negative), policy)
        return gradient > 0

    assert pushed_down(None).any()
    assert not pushed_down("clip").any()
    assert not pushed_down("shift").any()
    clipped, shifted = (group_advantages(REWARDS, negative=one) for one in ("clip", "shift"))
    assert (clipped < 1e-12).sum() == 3  # what is not above average is not learned from
    assert (shifted == 0).sum() == 1
    torch.testing.assert_close(shifted - shifted.mean(), group_advantages(REWARDS))


def test_ppo_starts_as_reinforce_and_stops_at_the_clip(logps):
    policy, _, _ = logps
    at_once = ppo(policy, policy.detach(), REWARDS)
    (gradient,) = torch.autograd.grad(at_once, policy, retain_graph=True)
    (plain,) = torch.autograd.grad(reinforce(policy, REWARDS), policy, retain_graph=True)
    torch.testing.assert_close(gradient, plain)
    advantages = group_advantages(REWARDS)
    moved = policy.detach() - 0.5 * advantages.sign()  # every ratio is beyond 1 +- 0.2 on the profitable side
    (stopped,) = torch.autograd.grad(ppo(policy, moved, REWARDS), policy, retain_graph=True)
    assert not stopped.any()
    (wrong_side,) = torch.autograd.grad(ppo(policy, policy.detach() + 0.5 * advantages.sign(), REWARDS), policy)
    assert (wrong_side != 0).sum() == (advantages != 0).sum()


@pytest.mark.slow  # to import trl
def test_ppo_is_the_loss_of_trl_on_whole_answers(logps):
    trl = pytest.importorskip("trl")
    policy, behaviour, _ = (part.float() for part in logps)

    class Theirs:
        """What `RLOOTrainer._compute_loss` asks of its trainer."""

        epsilon_low = epsilon_high = 0.2
        aux_loss_enabled = False

        def __init__(self):
            same = {name: lambda value, **_: value for name in ("gather", "gather_for_metrics", "reduce")}
            self.accelerator, self.model = SimpleNamespace(**same), SimpleNamespace(training=True)
            self._metrics = {"train": defaultdict(list)}

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            token = policy.reshape(6, 1)
            return token, torch.zeros_like(token), None

    one = torch.ones(6, 1, dtype=torch.long)
    inputs = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"), one)
    rewards = REWARDS.float()
    inputs |= {"old_logps": behaviour.reshape(6), "advantages": group_advantages(rewards).reshape(6)}
    theirs = trl.RLOOTrainer._compute_loss(Theirs(), None, inputs)
    torch.testing.assert_close(ppo(policy, behaviour, rewards), theirs, rtol=1e-5, atol=1e-6)


def test_a_group_loss_is_its_function_and_reports_best_and_worst(logps):
    policy, ref, behaviour = logps
    given = {"rewards": REWARDS, "ref_logps": ref, "behaviour_logps": behaviour}
    expected = {
        "pref_ft": pref_ft(policy, REWARDS, threshold=0.3),
        "best_of_n": best_of_n(policy, REWARDS, negative="mean", ref_logps=ref),
        "rwr": rwr(policy, REWARDS, temperature=0.5),
        "reinforce": reinforce(policy, REWARDS, negative="clip"),
        "ppo": ppo(policy, behaviour, REWARDS, clip=0.1),
        "dpo": dpo(policy, ref, REWARDS, beta=0.2),
        "ipo": ipo(policy, ref, REWARDS, tau=3.0),
        "slic": slic(policy, REWARDS, delta=0.5),
    }
    parameters = {
        "pref_ft": {"threshold": 0.3},
        "best_of_n": {"negative": "mean"},
        "rwr": {"temperature": 0.5},
        "reinforce": {"negative": "clip"},
        "ppo": {"clip": 0.1},
        "dpo": {"beta": 0.2},
        "ipo": {"tau": 3.0},
        "slic": {"delta": 0.5},
    }
    for name, value in expected.items():
        out = GroupLoss(name, **parameters[name])(policy, **given)
        assert out.loss == value
        torch.testing.assert_close(out.chosen_logps, torch.stack([policy[0, 1], policy[1, [0, 2]].mean()]).detach())
        torch.testing.assert_close(out.rejected_logps, torch.stack([policy[0, 0], policy[1, 1]]).detach())
        assert not out.chosen_logps.requires_grad
    assert GroupLoss("dpo").contrastive
    assert not GroupLoss("best_of_n").contrastive


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, r: dpo(p[:, :1], p[:, :1], r[:, :1]), "at least 2 answers to each prompt, got 1"),
        (lambda p, r: dpo(p, p[:1], r), r"ref_logps must have the shape of rewards \(2, 3\), got \(1, 3\)"),
        (lambda p, r: dpo(p, p, r, beta=0.0), "beta must be above 0"),
        (lambda p, r: ipo(p, p, r, tau=-1.0), "tau must be above 0"),
        (lambda p, r: dpo(p, p, r, threshold=-0.1), "threshold must be at least 0"),
        (lambda p, r: rwr(p, r, temperature=0.0), "temperature must be above 0"),
        (lambda p, r: ppo(p, p, r, clip=0.0), "clip must be above 0"),
        (lambda p, r: reinforce(p, r, negative="worst"), "negative must be one of None, 'clip', 'shift'"),
        (lambda p, r: best_of_n(p, r, negative="worst"), "ref_logps must be given"),
        (lambda p, r: best_of_n(p, r * math.nan), "rewards must be finite"),
        (lambda p, r: best_of_n(p * math.inf, r), "logps must be finite"),
        (lambda p, r: reinforce(p[0], r[0]), r"rewards must have shape \(prompts, answers\)"),
        (lambda p, r: GroupLoss("kto"), "name must be one of"),
        (lambda p, r: GroupLoss("dpo", beta=-1.0), "beta must be above 0"),
    ],
)
def test_bad_input_is_named(logps, call, message):
    with pytest.raises(ValueError, match=message):
        call(logps[0], REWARDS)


def test_a_parameter_of_another_loss_is_refused():
    with pytest.raises(TypeError, match="tau"):
        GroupLoss("dpo", tau=1.0)


# -------------------------------------------------------------------------------------------------------------- the gap


def test_equal_rewards_have_no_gap_and_one_winner_has_all_of_it():
    flat = alignment_gap([0.3] * 50, beta=0.1)
    assert flat.effective_sample_size == pytest.approx(50)
    assert flat.kl_from_reference == pytest.approx(0, abs=1e-12)
    assert flat.kl_to_reference == pytest.approx(0, abs=1e-12)
    one = alignment_gap([0.0] * 49 + [1.0], beta=0.001)
    assert one.effective_sample_size == pytest.approx(1)
    assert one.kl_from_reference == pytest.approx(math.log(50))
    assert one.kl_to_reference == pytest.approx(1000 * (1 - 1 / 50) - math.log(50))


def test_the_gap_estimates_the_exact_divergences():
    rng = np.random.default_rng(0)
    ref, reward, beta = rng.dirichlet(np.ones(8)), rng.random(8), 0.3
    optimum = ref * np.exp(reward / beta)
    optimum /= optimum.sum()
    drawn = rng.choice(8, size=(4, 100_000), p=ref)
    gap = alignment_gap(torch.from_numpy(reward[drawn]), beta)
    assert gap.kl_from_reference == pytest.approx((optimum * np.log(optimum / ref)).sum(), abs=0.01)
    assert gap.kl_to_reference == pytest.approx((ref * np.log(ref / optimum)).sum(), abs=0.01)
    assert gap.share == pytest.approx(1 / (optimum**2 / ref).sum(), rel=0.02)


def test_recommendations_follow_the_gap_and_the_budget():
    far, near = alignment_gap([0.0] * 99 + [1.0], 0.1), alignment_gap([0.5] * 100, 0.1)
    advice = recommend(far, budget=64 * 20)
    assert advice.on_policy
    assert advice.inner_steps == 5  # a hundred steps on twenty batches
    assert recommend(far, budget=64 * 200).inner_steps == 1
    short = recommend(far, budget=64)
    assert (short.inner_steps, short.loss) == (15, "ppo")
    offline = recommend(near, budget=2_000)
    assert not offline.on_policy
    assert offline.batch_size == 2_000
    assert len(advice.reasons) == 3
    with pytest.raises(ValueError, match="budget must be at least 64"):
        recommend(near, budget=10)
    with pytest.raises(ValueError, match="beta must be above 0"):
        alignment_gap([0.0, 1.0], beta=0)
    with pytest.raises(ValueError, match="rewards must be finite"):
        alignment_gap([0.0, math.nan], beta=1)
    with pytest.raises(ValueError, match=r"\(n,\) or \(prompts, n\)"):
        alignment_gap([1.0], beta=1)


def test_gradients_of_both_divergences_are_those_of_autograd():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    log_target = torch.randn(5, 12, generator=generator, dtype=torch.float64).log_softmax(1)
    log_p = logits.log_softmax(1)
    (forward,) = torch.autograd.grad((log_target.exp() * (log_target - log_p)).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((log_p.exp() * (log_p - log_target)).sum(), logits)
    found = kl_gradients(logits, log_target)
    torch.testing.assert_close(found[0], forward)
    torch.testing.assert_close(found[1], reverse)


def test_reverse_kl_does_not_see_what_the_policy_never_does_and_forward_kl_does():
    logits = torch.tensor([0.0, 0.0, -30.0], dtype=torch.float64)
    log_target = torch.tensor([0.05, 0.05, 0.9], dtype=torch.float64).log()
    forward, reverse = kl_gradients(logits, log_target)
    assert forward[2] == pytest.approx(-0.9)
    assert abs(reverse[2]) < 1e-10


def test_reverse_kl_is_the_expected_policy_gradient_of_the_regularised_reward():
    generator = torch.Generator().manual_seed(1)
    log_ref = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(0)
    reward, beta = torch.rand(9, generator=generator, dtype=torch.float64), 0.3
    logits = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(0)
    objective = (log_p.exp() * (reward - beta * (log_p - log_ref))).sum()
    (gradient,) = torch.autograd.grad(objective, logits)
    _, reverse = kl_gradients(logits, (log_ref + reward / beta).log_softmax(0))
    torch.testing.assert_close(gradient, -beta * reverse)


def test_targets_that_are_no_distributions_are_refused():
    with pytest.raises(ValueError, match="log_target must be normalised"):
        kl_gradients(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="shape of logits"):
        kl_gradients(torch.zeros(3), torch.zeros(2))
