"""Tests of the mathematics: each fails when the idea it names is removed."""

import pytest
import torch

from workingpapers.alignment import gae, kl_shaped_rewards, ppo_losses, whiten

GENERATOR = torch.Generator().manual_seed(0)
MASK = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def of_row(values, row):
    return values[row][MASK[row]].tolist()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_advantages_are_the_backward_recursion_over_the_response_alone(gamma, lam):
    rewards, values = random(3, 6), random(3, 6)
    advantages, returns = gae(rewards, values, MASK, gamma=gamma, lam=lam)
    for row in range(3):
        r, v = of_row(rewards, row), of_row(values, row)
        expected, following = [], 0.0
        for t in reversed(range(len(r))):
            delta = r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t]
            following = delta + gamma * lam * following
            expected.insert(0, following)
        assert of_row(advantages, row) == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(returns, (advantages + values).masked_fill(~MASK, 0.0))
    assert not advantages[~MASK].any()


def test_without_bias_the_advantage_is_the_return_less_the_value():
    rewards, values = random(3, 6), random(3, 6)
    returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)[1]
    for row in range(3):
        r = torch.tensor(of_row(rewards, row))
        to_go = r.flip(0).cumsum(0).flip(0)
        assert of_row(returns, row) == pytest.approx(to_go.tolist(), abs=1e-6)
    exact = gae(rewards, returns, MASK, gamma=1.0, lam=0.3)[0]  # a value function that is right has no advantage
    torch.testing.assert_close(exact, torch.zeros_like(exact), atol=1e-12, rtol=0)


def test_shaped_rewards_sum_to_the_score_less_the_divergence():
    scores, logprobs, reference = random(3), random(3, 6), random(3, 6)
    rewards = kl_shaped_rewards(scores, logprobs, reference, MASK, beta=0.3)
    divergence = (logprobs - reference).masked_fill(~MASK, 0.0).sum(1)
    torch.testing.assert_close(rewards.sum(1), scores - 0.3 * divergence)
    bare = kl_shaped_rewards(scores, logprobs, reference, MASK, beta=0.0)
    assert bare.nonzero().tolist() == [[0, 4], [1, 5], [2, 5]]


def losses(logprobs, values, **changes):
    fixed = {
        "old_logprobs": torch.zeros_like(logprobs),
        "old_values": torch.zeros_like(values),
        "advantages": torch.ones_like(values),
        "returns": torch.zeros_like(values),
        "mask": torch.ones(values.shape, dtype=torch.bool),
    }
    return ppo_losses(logprobs, values, **(fixed | changes))


def test_at_the_old_policy_the_gradient_is_the_policy_gradient():
    logprobs = random(3, 6).requires_grad_()
    advantages = random(3, 6)
    zeros = torch.zeros(3, 6, dtype=torch.float64)
    out = losses(logprobs, zeros, old_logprobs=logprobs.detach(), advantages=advantages, mask=MASK)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, -advantages.masked_fill(~MASK, 0.0) / MASK.sum())
    assert out.clip_fraction == 0
    assert out.approx_kl == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.3, 1.0, False), (0.7, 1.0, True), (0.7, -1.0, False), (1.3, -1.0, True), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_the_gradient_stops_only_where_the_ratio_has_gone_far_enough(ratio, advantage, moves):
    logprobs = torch.tensor([[ratio]]).log().requires_grad_()
    out = losses(logprobs, torch.zeros(1, 1), advantages=torch.tensor([[advantage]]))
    out.loss.backward()
    assert bool(logprobs.grad.item()) == moves
    assert out.clip_fraction.item() == 1 - moves
    assert out.approx_kl.item() == pytest.approx(0.5 * torch.tensor(ratio).log().item() ** 2)


def test_values_are_fitted_and_held_near_the_old_ones():
    values = torch.tensor([[0.1, 1.0]], requires_grad=True)
    out = losses(torch.zeros(1, 2), values, returns=torch.tensor([[2.0, 2.0]]), value_weight=1.0)
    assert out.value_loss.item() == pytest.approx(0.25 * (1.9**2 + 1.8**2))  # the second is clipped to 0.2
    out.loss.backward()
    assert values.grad[0, 0].item() == pytest.approx(-0.95)
    assert values.grad[0, 1].item() == 0.0


def test_whitened_entries_have_mean_zero_and_variance_one():
    found = whiten(5 + 3 * random(3, 6), MASK)
    assert found[MASK].mean().item() == pytest.approx(0.0, abs=1e-12)
    assert found[MASK].var(correction=0).item() == pytest.approx(1.0, abs=1e-6)
    assert not found[~MASK].any()


def test_what_stands_outside_the_mask_does_not_matter():
    values = random(3, 6)
    spoiled = values.masked_fill(~MASK, torch.nan)
    torch.testing.assert_close(gae(spoiled, spoiled, MASK), gae(values, values, MASK))
    torch.testing.assert_close(whiten(spoiled, MASK), whiten(values, MASK))
    given = {"old_logprobs": spoiled, "old_values": spoiled, "advantages": spoiled, "returns": spoiled, "mask": MASK}
    moving = spoiled.clone().requires_grad_()
    out = ppo_losses(moving, moving, **given)
    out.loss.backward()
    assert out.loss.isfinite()
    assert moving.grad[MASK].isfinite().all()
    assert not moving.grad[~MASK].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: gae(x, x, MASK, lam=1.5), "lam must be at least 0 and at most 1"),
        (lambda x: gae(x, x, MASK, gamma=-1.0), "gamma must be at least 0"),
        (lambda x: gae(x, x[:, :5], MASK), r"values must have the shape of mask \(3, 6\), got \(3, 5\)"),
        (lambda x: gae(x * torch.nan, x, MASK), "rewards must be finite"),
        (lambda x: gae(x, x, MASK.long()), "mask must be boolean"),
        (lambda x: gae(x, x, torch.zeros_like(MASK)), "at least one token"),
        (lambda x: kl_shaped_rewards(x[0], x, x, MASK, beta=0.1), "one entry for each of 3 answers"),
        (lambda x: kl_shaped_rewards(x[:, 0], x, x, MASK, beta=-0.1), "beta must be at least 0"),
        (lambda x: losses(x, x, clip=0.0), "clip must be above 0"),
        (lambda x: losses(x, x, value_weight=-1.0), "value_weight must be at least 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(random(3, 6))


def test_sequences_can_have_one_weight_each_and_values_can_go_unclipped():
    logprobs, values, advantages = random(3, 6), random(3, 6), random(3, 6)
    out = losses(logprobs, values, advantages=advantages, mask=MASK, average="sequences", value_clip=None)
    alone = [losses(logprobs[[k]], values[[k]], advantages=advantages[[k]], mask=MASK[[k]]) for k in range(3)]
    assert out.policy_loss.item() == pytest.approx(sum(part.policy_loss.item() for part in alone) / 3)
    assert out.value_loss.item() == pytest.approx(
        sum(0.5 * (values[k][MASK[k]] ** 2).mean().item() for k in range(3)) / 3
    )
