"""The test bed of the claims is what it says, and the loss of the benchmark is trl's."""

import itertools

import pytest
import torch

from workingpapers.alignment import ppo_losses, token_logprobs
from workingpapers.claims.alignment.reinforced_token.cost import answers_to_update_on, trl_loss
from workingpapers.claims.alignment.reinforced_token.problems import TOKENS, draw, expected_return, reached, total


def test_the_clipped_loss_averaged_over_sequences_is_trls(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    model, batch, advantages = answers_to_update_on(64)
    logprobs = token_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_mask)
    nothing = torch.zeros_like(advantages)
    ours = ppo_losses(
        logprobs,
        nothing,
        old_logprobs=batch.logprobs,
        old_values=nothing,
        advantages=advantages,
        returns=nothing,
        mask=batch.response_mask,
        average="sequences",
    )
    theirs = trl_loss(model, batch, advantages, str(tmp_path))()
    assert ours.loss.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert ours.clip_fraction > 0.05
    ours.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    theirs.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_the_return_is_exact_and_answers_follow_the_policy():
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(3, TOKENS, TOKENS, generator=generator).log_softmax(-1)
    reward = torch.randn(3, TOKENS, TOKENS, generator=generator)
    answers = torch.tensor(list(itertools.product(range(TOKENS), repeat=3)))
    chances = total(policy, answers).exp()
    assert chances.sum().item() == pytest.approx(1.0, abs=1e-5)
    exact = (chances * total(reward, answers)).sum().item()
    assert expected_return(policy, reward) == pytest.approx(exact, abs=1e-5)
    drawn = draw(policy, 20_000, generator)
    assert total(reward, drawn).mean().item() == pytest.approx(exact, abs=0.05)


def test_when_a_curve_reaches_a_level_is_interpolated():
    curve = torch.tensor([0.0, 1.0, 3.0]).numpy()
    assert reached(curve, 2.0) == pytest.approx(1.5)
    assert reached(curve, 9.0) == 2.0
