"""Tests of the mathematics: each fails when the idea it names is removed."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from workingpapers.alignment import (
    delimiter_mask,
    gae,
    kl_shaped_rewards,
    pessimistic_token_reward,
    prefix_elimination,
    soft_optimal_policy,
    token_rewards,
)

GENERATOR = torch.Generator().manual_seed(0)
MASK = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
LAST = [4, 5, 5]


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def a_batch():
    logps = {name: -random(3, 6).abs() for name in ("dpo_logps", "ref_logps", "policy_logps")}
    return logps | {"mask": MASK, "sentence_reward": random(3)}


DELIMITERS = torch.tensor([[0, 0, 1, 0, 0, 1], [1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("clip", [None, 0.02])
def test_each_token_gets_its_scaled_then_clipped_ratio_less_the_price_and_the_last_one_the_score(clip):
    batch = a_batch()
    found = token_rewards(**batch, beta1=0.05, beta2=0.3, beta3=2.0, clip=clip)
    for row, token in itertools.product(range(3), range(6)):
        ratio = 0.05 * (batch["dpo_logps"] - batch["ref_logps"])[row, token].item()
        ratio = ratio if clip is None else min(max(ratio, -clip), clip)
        price = 0.3 * (batch["policy_logps"] - batch["ref_logps"])[row, token].item()
        score = 2.0 * batch["sentence_reward"][row].item() if token == LAST[row] else 0.0
        expected = ratio - price + score if MASK[row, token] else 0.0
        assert found[row, token].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("clip", [None, 0.02])
def test_granularities_move_the_same_total_and_shaping_adds_nothing_to_it(clip):
    batch = a_batch()
    options = {"beta1": 0.3, "beta2": 0.1, "beta3": 1.5, "clip": clip, "delimiters": DELIMITERS}
    totals = {
        name: token_rewards(**batch, **options, granularity=name).sum(1)
        for name in ("token", "sentence", "last", "shaping")
    }
    torch.testing.assert_close(totals["sentence"], totals["token"])
    torch.testing.assert_close(totals["last"], totals["token"])
    divergence = (batch["policy_logps"] - batch["ref_logps"]).masked_fill(~MASK, 0.0).sum(1)
    torch.testing.assert_close(totals["shaping"], 1.5 * batch["sentence_reward"] - 0.1 * divergence)


def test_a_sentence_is_paid_at_its_delimiter_and_what_follows_the_last_one_at_the_end():
    batch = a_batch()
    found = token_rewards(**batch, beta1=1.0, beta2=0.0, beta3=0.0, granularity="sentence", delimiters=DELIMITERS)
    ratios = batch["dpo_logps"] - batch["ref_logps"]
    expected = torch.zeros_like(ratios)
    expected[0, 2], expected[0, 4] = ratios[0, 1:3].sum(), ratios[0, 3:5].sum()  # the delimiter at 5 is padding
    expected[1, 0], expected[1, 4], expected[1, 5] = ratios[1, 0], ratios[1, 1] + ratios[1, 4], ratios[1, 5]
    expected[2, 5] = ratios[2, 5]
    torch.testing.assert_close(found, expected)
    at_the_end = token_rewards(**batch, beta1=1.0, beta2=0.0, beta3=0.0, granularity="last")
    nowhere = token_rewards(
        **batch, beta1=1.0, beta2=0.0, beta3=0.0, granularity="sentence", delimiters=torch.zeros_like(MASK)
    )
    torch.testing.assert_close(at_the_end, nowhere)


def test_without_the_dpo_part_it_is_the_reward_of_ppo():
    batch = a_batch()
    found = token_rewards(**batch, beta1=0.0, beta2=0.2)
    ppo = kl_shaped_rewards(batch["sentence_reward"], batch["policy_logps"], batch["ref_logps"], MASK, beta=0.2)
    assert torch.equal(found, ppo)


def test_another_reference_of_the_dpo_model_enters_its_ratio_alone():
    batch, other = a_batch(), -random(3, 6).abs()
    found = token_rewards(**batch, beta1=0.3, dpo_ref_logps=other)
    difference = found - token_rewards(**batch, beta1=0.3)
    torch.testing.assert_close(difference, 0.3 * (batch["ref_logps"] - other).masked_fill(~MASK, 0.0))


def test_half_precision_is_lifted_padding_does_not_matter_and_no_gradient_flows():
    batch = a_batch()
    clean = token_rewards(**batch)
    before = {name: value.clone() for name, value in batch.items()}
    spoiled = batch | {name: batch[name].masked_fill(~MASK, torch.nan) for name in ("dpo_logps", "ref_logps")}
    torch.testing.assert_close(token_rewards(**spoiled), clean)
    assert token_rewards(**(batch | {"dpo_logps": batch["dpo_logps"].bfloat16()})).dtype == torch.float32
    assert not token_rewards(**(batch | {"policy_logps": batch["policy_logps"].requires_grad_()})).requires_grad
    assert all(torch.equal(batch[name].detach(), before[name]) for name in before)


def test_delimiters_are_the_tokens_that_are_named():
    tokens = torch.tensor([[4, 7, 4], [9, 0, 7]])
    assert delimiter_mask(tokens, [7, 9]).tolist() == [[False, True, False], [True, False, True]]


def test_dense_rewards_tell_apart_which_token_was_good_where_the_sum_cannot():
    ratios = torch.tensor([[1.0, -1.0, 0.5, -0.5]], dtype=torch.float64)
    mask, zeros = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.float64)
    options = {"beta1": 1.0, "beta2": 0.0, "beta3": 0.0}
    dense = token_rewards(ratios, zeros, zeros, mask, **options)
    sparse = token_rewards(ratios, zeros, zeros, mask, **options, granularity="last")
    assert gae(dense, zeros, mask, lam=0.0)[0].tolist() == [[1.0, -1.0, 0.5, -0.5]]
    assert not gae(sparse, zeros, mask, lam=0.0)[0].any()


# ------------------------------------------------------------------------------------------------------------- theory


def tree(A, H, seed):
    rng = np.random.default_rng(seed)
    rewards = [rng.standard_normal((A**h, A)) for h in range(H)]
    reference = [np.log(rng.dirichlet(np.ones(A), size=A**h)) for h in range(H)]
    return rewards, reference


def along(tables, response, A):
    """Entries of the tables at each token of a response."""
    prefix, found = 0, []
    for table, token in zip(tables, response, strict=True):
        found.append(table[prefix, token])
        prefix = prefix * A + token
    return np.array(found)


def test_rewards_along_an_answer_sum_to_the_log_ratios_and_the_first_value():
    A, H, beta = 3, 4, 0.7
    rewards, reference = tree(A, H, 0)
    found = soft_optimal_policy(rewards, reference, beta=beta)
    weights = []
    for response in itertools.product(range(A), repeat=H):
        log_ratio = along(found.logps, response, A).sum() - along(reference, response, A).sum()
        total = along(rewards, response, A).sum()
        assert total == pytest.approx(beta * log_ratio + found.values[0][0], abs=1e-12)
        weights.append(along(reference, response, A).sum() + total / beta)
    # the Gibbs distribution over whole answers
    assert found.values[0][0] == pytest.approx(beta * np.log(np.exp(weights).sum()), abs=1e-12)
    assert all(np.allclose(np.exp(table).sum(1), 1.0) for table in found.logps)


def test_shared_states_are_the_tree_folded():
    A, H = 3, 4
    rng = np.random.default_rng(1)
    rewards, reference = rng.standard_normal((H, A, A)), np.log(rng.dirichlet(np.ones(A), size=(H, A)))
    following = [np.tile(np.arange(A), (A, 1))] * H  # the state is the token before
    folded = soft_optimal_policy(rewards, reference, beta=0.5, successors=following)
    unfolded = soft_optimal_policy(
        [rewards[h][np.arange(A**h) % A] for h in range(H)],
        [reference[h][np.arange(A**h) % A] for h in range(H)],
        beta=0.5,
    )
    assert unfolded.values[0][0] == pytest.approx(folded.values[0][0])
    np.testing.assert_allclose(unfolded.logps[3][np.arange(27)], folded.logps[3][np.arange(27) % A])


def test_shaping_keeps_the_policy_of_the_score_and_rto_does_not():
    A, H, beta = 2, 3, 0.5
    answers = list(itertools.product(range(A), repeat=H))
    _, reference = tree(A, H, 2)
    rng = np.random.default_rng(3)
    dpo = [np.log(rng.dirichlet(np.ones(A), size=A**h)) for h in range(H)]
    scores = torch.from_numpy(rng.standard_normal(len(answers)))
    of = {name: torch.from_numpy(np.stack([along(tables, y, A) for y in answers])) for name, tables in
          (("dpo", dpo), ("ref", reference))}  # fmt: skip
    mask = torch.ones(len(answers), H, dtype=torch.bool)

    def solved(granularity, beta1):
        found = token_rewards(
            of["dpo"], of["ref"], of["ref"], mask, scores, beta1=beta1, beta2=0.0, granularity=granularity
        ).numpy()
        tables = [np.zeros((A**h, A)) for h in range(H)]
        for row, answer in enumerate(answers):  # the last reward depends on the answer, the others on the prefix
            prefix = 0
            for h, token in enumerate(answer):
                tables[h][prefix, token] = found[row, h]
                prefix = prefix * A + token
        return np.concatenate([table.ravel() for table in soft_optimal_policy(tables, reference, beta=beta).logps])

    sparse = solved("token", 0.0)
    np.testing.assert_allclose(solved("shaping", 0.4), sparse, atol=1e-12)
    assert np.abs(solved("token", 0.4) - sparse).max() > 0.05
    np.testing.assert_allclose(solved("last", 0.4), solved("token", 0.4), atol=1e-12)


def planted_tree(A, H, xi, seed, concentration=0.3):
    rng = np.random.default_rng(seed)
    planted = rng.integers(A, size=H)
    tables, prefix = [], 0
    for h in range(H):
        table = rng.dirichlet(np.full(A, concentration), size=A**h)
        others = np.arange(A) != planted[h]
        share = A ** (-xi / H)
        table[prefix, others] *= (1 - share) / max(table[prefix, others].sum(), 1e-300)
        table[prefix, planted[h]] = share
        tables.append(np.log(np.maximum(table, 1e-300)))
        prefix = prefix * A + planted[h]
    return tables


@pytest.mark.parametrize("xi", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_elimination_finds_the_likeliest_response_within_the_bound(xi, seed):
    A, H = 3, 5
    tables = planted_tree(A, H, xi, seed)
    asked = []

    def query(response):
        asked.append(response)
        return along(tables, response, A)

    found = prefix_elimination(query, A, H, xi)
    totals = {y: along(tables, y, A).sum() for y in itertools.product(range(A), repeat=H)}
    assert found.logp == pytest.approx(max(totals.values()))
    assert totals[found.response] == pytest.approx(found.logp)
    assert found.queries == len(asked) == len(set(asked)) <= found.bound == 1 + (A - 1) * H * A**xi < A**H


def test_elimination_needs_every_sibling_when_the_right_token_is_tried_last():
    A, H = 3, 6

    def certain(response):
        return [0.0 if token == A - 1 else -50.0 for token in response]

    found = prefix_elimination(certain, A, H, 0.0)
    assert found.response == (A - 1,) * H
    assert found.queries == (A - 1) * H + 1 == found.bound  # the paper states A^min(xi + 1, H) = 3


def test_elimination_asks_for_everything_when_nothing_can_be_ruled_out():
    def uniform(response):
        return np.full(len(response), -np.log(2))

    assert prefix_elimination(uniform, 2, 4, 4.0).queries == 16


def test_pessimism_is_the_ridge_fit_less_the_ellipsoid():
    rng = np.random.default_rng(0)
    chosen, rejected, phi = rng.standard_normal((40, 3)), rng.standard_normal((40, 3)), rng.standard_normal((5, 4, 3))
    found = pessimistic_token_reward(phi, (chosen, rejected), lam=0.5, rho=2.0)
    lead = chosen - rejected

    def loss(theta):
        return np.logaddexp(0, -lead @ theta).sum() + 0.25 * theta @ theta

    np.testing.assert_allclose(found.theta, minimize(loss, np.zeros(3), method="BFGS").x, atol=1e-4)
    inverse = np.linalg.inv(lead.T @ lead + 0.5 * np.eye(3))
    width = np.sqrt(np.einsum("sai,ij,saj->sa", phi, inverse, phi))
    np.testing.assert_allclose(found.reward, phi @ found.theta - 2.0 * width)
    separated = pessimistic_token_reward(phi, (np.abs(chosen), -np.abs(rejected)), lam=0.1, rho=0.0)
    assert np.isfinite(separated.theta).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta1": -1.0}, "beta1 must be at least 0"),
        ({"beta2": -1.0}, "beta2 must be at least 0"),
        ({"clip": -0.1}, "clip must be at least 0"),
        ({"sentence_reward": None}, "sentence_reward must be given when beta3 is above 0"),
        ({"sentence_reward": torch.zeros(2)}, r"sentence_reward must have shape \(3,\), got \(2,\)"),
        ({"sentence_reward": torch.full((3,), torch.nan)}, "sentence_reward must be finite"),
        ({"dpo_logps": torch.zeros(3, 5)}, r"dpo_logps must have the shape of mask \(3, 6\), got \(3, 5\)"),
        ({"policy_logps": torch.full((3, 6), torch.nan)}, "policy_logps must be finite"),
        ({"mask": torch.zeros(3, 6, dtype=torch.bool)}, "at least one token of each row"),
        ({"granularity": "sentence"}, "delimiters must be given"),
        ({"granularity": "sentence", "delimiters": torch.zeros(3, 6)}, "delimiters must be boolean"),
        ({"granularity": "word"}, "granularity must be one of"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        token_rewards(**(a_batch() | change))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: delimiter_mask(torch.zeros(1, 2), []), "at least one token"),
        (lambda: prefix_elimination(lambda y: [0.0], 2, 3, 1.0), "query must return 3 log-probabilities"),
        (lambda: prefix_elimination(lambda y: [1.0] * 3, 2, 3, 1.0), "query must return 3 log-probabilities"),
        (lambda: prefix_elimination(lambda y: [0.0] * 3, 2, 3, -1.0), "xi must be at least 0"),
        (lambda: soft_optimal_policy([np.zeros((1, 2))], [], beta=1.0), "as many tables, got 1 and 0"),
        (lambda: soft_optimal_policy([np.zeros((1, 2))], [np.zeros((2, 2))], beta=1.0), r"ref_logps\[0\] must be"),
        (lambda: soft_optimal_policy([np.full((1, 2), np.nan)], [np.zeros((1, 2))], beta=1.0), "rewards must be fin"),
        (lambda: soft_optimal_policy([np.zeros((1, 2))], [np.zeros((1, 2))], beta=0.0), "beta must be above 0"),
        (lambda: pessimistic_token_reward(np.zeros((2, 3)), (np.zeros((4, 2)),) * 2, 1.0, 1.0), "pairs must be two"),
        (lambda: pessimistic_token_reward(np.zeros((2, 3)), (np.zeros((4, 3)),) * 2, 0.0, 1.0), "lam must be above 0"),
    ],
)
def test_bad_theory_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
