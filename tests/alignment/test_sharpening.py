"""Sharpening without training: exact laws of tables, self-rewards, selection, the adaptive rule, the pair loss."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax

from workingpapers.alignment.sequences import SequenceBatch, collate_sequences
from workingpapers.alignment.sharpening import (
    AdaptiveSampler,
    SharpeningPairLoss,
    best_of_n_select,
    self_reward,
    sharpen,
    tabular,
)

GREEDY_MISSES = np.array([0.4, 0.0, 0.35, 0.25])  # two tokens, (0,0) (0,1) (1,0) (1,1): greedy starts with 1


class TablePolicy:
    """Responses [token, 0] with the probabilities of a row of a table; the prompt [row] names the row."""

    def __init__(self, table, seed=0, cut=()):
        self.table, self.rng, self.cut = np.asarray(table), np.random.default_rng(seed), cut
        self.asked = 0

    def sample(self, prompts, n):
        self.asked += n * len(prompts)
        rows = np.repeat(np.array(prompts)[:, 0], n)
        drawn = (self.rng.random((len(rows), 1)) >= self.table.cumsum(1)[rows, :-1]).sum(1)
        batch = collate_sequences([([row], [token, 0]) for row, token in zip(rows, drawn, strict=True)])
        logprobs = torch.zeros(batch.input_ids.shape, dtype=torch.float64)
        logprobs[:, 1] = torch.from_numpy(np.log(self.table[rows, drawn]))
        finished = torch.tensor([token not in self.cut for token in drawn])
        return SequenceBatch(batch.input_ids, batch.attention_mask, batch.response_mask, logprobs, finished)

    def log_prob(self, prompts, responses):
        pairs = zip(prompts, responses, strict=True)
        return torch.tensor([[math.log(self.table[row, token]) for token, _ in several] for (row,), several in pairs])


# ------------------------------------------------------------------------------------------------------------ best of N


def test_the_best_of_one_is_the_base_and_the_mode_gains_as_order_statistics_say():
    p = np.random.default_rng(0).dirichlet(np.ones(50), size=(3, 4))
    np.testing.assert_allclose(tabular.bon_distribution(p, 1), p, atol=1e-15)
    law = tabular.bon_distribution(p, 7)
    np.testing.assert_allclose(law.sum(-1), 1.0, atol=1e-12)
    best = np.take_along_axis(law, p.argmax(-1)[..., None], -1)[..., 0]
    np.testing.assert_allclose(best, 1 - (1 - p.max(-1)) ** 7, atol=1e-12)


def test_the_law_of_the_best_of_n_is_what_drawing_and_keeping_the_first_best_gives():
    p = np.array([0.3, 0.3, 0.15, 0.15, 0.1, 0.0])  # ties
    scores = np.array([1.0, 2.0, 2.0, -np.inf, 1.0, 5.0])
    rng = np.random.default_rng(1)
    for values in (None, scores):
        drawn = rng.choice(6, size=(40_000, 3), p=p)
        kept = drawn[np.arange(len(drawn)), (p if values is None else values)[drawn].argmax(1)]
        found = np.bincount(kept, minlength=6) / len(drawn)
        assert 0.5 * np.abs(found - tabular.bon_distribution(p, 3, values)).sum() < 0.01


def test_responses_without_mass_stay_without_mass():
    law = tabular.bon_distribution([0.5, 0.5, 0.0, 0.0], 4, [0.0, 1.0, 2.0, -np.inf])
    np.testing.assert_allclose(law, [1 / 16, 15 / 16, 0, 0])


def test_the_mean_loglik_of_the_selected_rises_with_n():
    p = np.random.default_rng(0).dirichlet(np.ones(50), size=20)
    means = [(tabular.bon_distribution(p, n) * np.log(p)).sum(-1).mean() for n in (1, 2, 10, 50)]
    assert np.all(np.diff(means) > 0)


def test_enough_draws_meet_the_approximate_mode():
    p = np.random.default_rng(2).dirichlet(np.ones(50), size=20)
    for gamma, rho in ((0.0, 0.1), (0.3, 0.01)):
        mass = (p * tabular.modes(p, gamma)).sum(-1)
        failure = (1 - mass) ** tabular.samples_needed(mass, rho)
        assert (failure <= rho).all()
        assert failure.max() > 0.3 * rho  # and not many more draws than that


# ------------------------------------------------------------------------------------------------ the other exact tools


def test_coverage_is_the_mean_inverse_mass_of_the_mode():
    p = np.array([[0.5, 0.25, 0.25], [0.4, 0.4, 0.2]])
    assert tabular.coverage(p) == pytest.approx((1 / 0.5 + 1 / 0.8) / 2)
    assert tabular.coverage(p, gamma=0.5) == pytest.approx(1.0)
    assert tabular.coverage(p, prior=[1.0, 0.0]) == pytest.approx(2.0)


def test_the_share_of_sharpened_prompts():
    base = np.array([[0.6, 0.4], [0.3, 0.7]])
    policy = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert tabular.sharpened_share(policy, base, delta=0.1) == 0.5
    assert tabular.sharpened_share(policy, base, delta=0.2) == 1.0
    assert tabular.sharpened_share(policy, base, delta=0.1, prior=[0.75, 0.25]) == 0.75
    assert tabular.sharpened_share(base, base, delta=0.1, gamma=0.5) == 0.5


def test_a_power_maximises_self_reward_less_divergence():
    p = np.random.default_rng(3).dirichlet(np.ones(6))
    beta = 0.7

    def objective(policy):
        return policy @ np.log(p) - beta * policy @ np.log(policy / p)

    best = tabular.power(p, 1 + 1 / beta)
    assert objective(best) == pytest.approx(beta * logsumexp(np.log(p) * (1 + 1 / beta)))  # beta log Z
    rng = np.random.default_rng(4)
    others = [softmax(np.log(best) + 0.1 * rng.standard_normal(6)) for _ in range(50)]
    assert max(map(objective, others)) < objective(best)


def test_a_power_of_tiny_probabilities_does_not_underflow():
    np.testing.assert_allclose(tabular.power(np.full(1000, 1e-3), 401.0), np.full(1000, 1e-3))


def test_sharpening_finds_a_mode_that_greedy_decoding_misses_until_it_has_half_the_mass():
    first = GREEDY_MISSES.reshape(2, 2).sum(1)
    assert first.argmax() == 1
    assert GREEDY_MISSES.argmax() == 0
    softer, sharper = tabular.power(GREEDY_MISSES, 2.0), tabular.power(GREEDY_MISSES, 3.0)
    assert softer[0] == pytest.approx(0.464, abs=5e-4)
    assert softer.reshape(2, 2).sum(1).argmax() == 1
    assert sharper[0] == pytest.approx(0.522, abs=5e-4)
    assert sharper.reshape(2, 2).sum(1).argmax() == 0
    assert tabular.bon_distribution(GREEDY_MISSES, 2)[0] == pytest.approx(1 - 0.6**2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tabular.bon_distribution([0.5, 0.5], 0), "n must be at least 1, got 0"),
        (lambda: tabular.bon_distribution([0.5, 0.6], 2), "p must have rows that sum to 1, got sums from 1.1"),
        (lambda: tabular.bon_distribution([1.5, -0.5], 2), "p must hold probabilities"),
        (lambda: tabular.bon_distribution([np.nan, 1.0], 2), "p must hold probabilities"),
        (lambda: tabular.bon_distribution([], 2), r"p must have shape \(..., responses\), not empty"),
        (lambda: tabular.bon_distribution([0.5, 0.5], 2, [np.nan, 0.0]), "scores must not be NaN"),
        (lambda: tabular.bon_distribution([0.5, 0.5], 2, [1.0, 2.0, 3.0]), r"scores must broadcast .* \(2,\)"),
        (lambda: tabular.power([0.5, 0.5], 0.0), "exponent must be above 0"),
        (lambda: tabular.modes([0.5, 0.5], 1.0), "gamma must be at least 0 and below 1"),
        (lambda: tabular.coverage([[0.5, 0.5]], prior=[0.5]), "prior must be a distribution"),
        (lambda: tabular.coverage([[0.5, 0.5]], prior=[0.5, 0.5]), r"prior must have shape \(1,\)"),
        (lambda: tabular.sharpened_share([0.5, 0.5], [1.0], delta=0.1), "policy and p must have one shape"),
        (lambda: tabular.sharpened_share([0.5, 0.5], [0.5, 0.5], delta=1.0), "delta must be above 0 and below 1"),
        (lambda: tabular.samples_needed(0.0, 0.1), r"mass must lie in \(0, 1\]"),
        (lambda: tabular.samples_needed(0.5, 0.0), "rho must be above 0"),
        (lambda: tabular.adaptive_law([0.5, 0.5], delta=0.0, max_samples=5), "delta must be above 0"),
        (lambda: tabular.adaptive_law([0.5, 0.5], delta=0.1, max_samples=0), "max_samples must be at least 1"),
    ],
)
def test_bad_tables_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tables_are_not_modified():
    p, scores = np.array([0.2, 0.8]), np.array([1.0, 0.0])
    tabular.bon_distribution(p, 3, scores)
    tabular.power(p, 2.0)
    tabular.adaptive_law(p, delta=0.1, max_samples=10)
    np.testing.assert_array_equal(p, [0.2, 0.8])
    np.testing.assert_array_equal(scores, [1.0, 0.0])


# ---------------------------------------------------------------------------------------------------- the adaptive rule


@pytest.mark.parametrize(("delta", "limit"), [(0.1, 256), (0.1, 12), (0.5, 6), (0.1, 2)])
def test_the_law_of_the_adaptive_rule_is_what_it_does(delta, limit):
    p = np.array([0.3, 0.2, 0.2, 0.15, 0.1, 0.05, 0.0])
    law = tabular.adaptive_law(p, delta=delta, max_samples=limit)
    rule = AdaptiveSampler(delta, limit)
    runs = 20_000
    drawn = np.random.default_rng(5).choice(7, size=(runs, limit), p=p)
    likeliest = np.maximum.accumulate(np.log(p[drawn]), axis=1)
    k = np.arange(1, limit + 1)
    stop = rule.should_stop(likeliest, k).argmax(1)
    kept = drawn[np.arange(runs), np.where(k - 1 <= stop[:, None], p[drawn], -1).argmax(1)]
    assert law.selected.sum() == pytest.approx(1.0)
    assert 0.5 * np.abs(np.bincount(kept, minlength=7) / runs - law.selected).sum() < 0.012
    assert law.expected_samples == pytest.approx((stop + 1).mean(), rel=0.02)
    assert law.capped == pytest.approx(np.mean(~rule.is_met(likeliest[:, -1], limit)), abs=0.01)


def test_the_adaptive_rule_costs_what_the_theory_says_on_every_table():
    rng = np.random.default_rng(6)
    tables = np.concatenate([rng.dirichlet(np.full(50, c), size=20) for c in (0.05, 0.1, 0.3, 1.0)])
    mu, largest = math.log(2 / 0.1), tables.max(1)
    law = tabular.adaptive_law(tables, delta=0.1, max_samples=10_000)
    failure = 1 - np.take_along_axis(law.selected, tables.argmax(1)[:, None], 1)[:, 0]
    assert (law.expected_samples <= 1.2 * np.ceil(mu / largest)).all()
    assert (failure <= 0.1).all()
    assert (law.capped < 1e-12).all()
    assert tabular.adaptive_law([[1.0, 0.0]], delta=0.1, max_samples=99).expected_samples == math.ceil(mu) == 3


def test_the_rule_never_stops_before_the_best_seen_explains_the_draws():
    rule = AdaptiveSampler(delta=0.1, max_samples=10**9)
    logp = np.log(np.random.default_rng(7).uniform(1e-6, 1, size=1_000))
    needed = rule.draws_needed(logp)
    assert rule.should_stop(logp, needed).all()
    assert not rule.should_stop(logp, np.maximum(needed - 1, 1))[needed > 1].any()
    assert (needed >= rule.mu / np.exp(logp) - 1e-6).all()
    assert not rule.should_stop(-2000.0, 10**8)  # the probability is 0 in floating point
    assert rule.should_stop(-2000.0, 10**9)


def test_sampling_with_the_rule_follows_its_law_and_wastes_at_most_as_much_again():
    rng = np.random.default_rng(8)
    tables = np.concatenate([rng.dirichlet(np.full(20, c), size=5) for c in (0.1, 1.0)])
    rule = AdaptiveSampler(delta=0.2, max_samples=500)
    law = tabular.adaptive_law(tables, delta=0.2, max_samples=500)
    prompts = [[row] for row in range(10)] * 60
    policy = TablePolicy(tables)
    found = sharpen(policy, prompts, rule)
    drawn = found.drawn.reshape(60, 10)
    np.testing.assert_allclose(drawn.mean(0), law.expected_samples, rtol=0.15)
    right = np.array([response[0] for response in found.responses]).reshape(60, 10) == tables.argmax(1)
    assert abs(right.mean() - law.selected[np.arange(10), tables.argmax(1)].mean()) < 0.03
    assert found.drawn.sum() <= policy.asked <= 2 * found.drawn.sum()
    assert (found.drawn >= rule.mu / np.exp(found.max_loglik) - 1e-9).all()


def test_the_limit_of_the_rule_is_reported():
    with pytest.warns(RuntimeWarning, match="1 of 2 prompts reached max_samples=8"):
        found = sharpen(TablePolicy([[1.0] + [0.0] * 19, [0.05] * 20]), [[0], [1]], AdaptiveSampler(0.1, 8))
    assert found.capped.tolist() == [False, True]
    assert found.drawn.tolist() == [3, 8]


# ------------------------------------------------------------------------------------------------ rewards and selection


def test_self_rewards_by_hand():
    prompts, responses = [[5], [6]], [[[1, 0], [2, 3, 0], [1, 1, 0]], [[4, 0]]]
    logps = torch.tensor([[-1.0, -3.0, -1.5], [-2.0, 0.0, 0.0]])
    inf = -math.inf
    given = {"base_logps": logps}
    assert self_reward(None, prompts, responses, **given).tolist() == [[-1.0, -3.0, -1.5], [-2.0, inf, inf]]
    assert self_reward(None, prompts, responses, "normalized", **given).tolist() == [[-0.5, -1, -0.5], [-1, inf, inf]]
    majority = self_reward(
        None, prompts, responses, "majority", lambda response: response[0] if response[0] < 4 else None
    )
    assert majority[0].tolist() == pytest.approx([2 / 3, 1 / 3, 2 / 3])
    assert majority[1].tolist() == [0.0, inf, inf]  # no answer, no vote
    by_length = self_reward(
        None, prompts, responses, lambda _, several: torch.tensor([[2.0, 3.0, 3.0], [2.0, 9.0, 9.0]])
    )
    assert by_length.tolist() == [[2.0, 3.0, 3.0], [2.0, inf, inf]]
    assert logps[1, 1] == 0.0  # the caller's data stay


def test_a_policy_without_cached_log_probabilities_is_asked_for_them():
    policy = TablePolicy([[0.25, 0.75]])
    assert self_reward(policy, [[0]], [[[0, 0], [1, 0]]])[0].exp().tolist() == pytest.approx([0.25, 0.75])


def test_the_first_of_the_best_is_selected():
    samples = [["a", "b", "c"], ["d", "e"]]
    scores = [[1.0, 3.0, 3.0], [-math.inf, -7.0, 99.0]]  # the last score belongs to no sample
    assert best_of_n_select(samples, scores).tolist() == [1, 1]
    assert best_of_n_select(samples, torch.tensor(scores)).tolist() == [1, 1]


def test_inference_time_sharpening_draws_the_law_of_the_best_of_n():
    p = np.array([0.1, 0.2, 0.3, 0.4])
    found = sharpen(TablePolicy([p]), [[0]] * 3_000, 3)
    law = np.bincount([response[0] for response in found.responses], minlength=4) / 3_000
    np.testing.assert_allclose(law, tabular.bon_distribution(p, 3), atol=0.03)
    assert (found.drawn == 3).all()
    np.testing.assert_allclose(found.scores, found.max_loglik)
    np.testing.assert_allclose(found.mean_loglik.mean(), p @ np.log(p), atol=0.03)
    np.testing.assert_allclose(found.duplicates.mean(), 3 - (1 - (1 - p) ** 3).sum(), atol=0.06)


def test_responses_that_were_cut_off_are_never_chosen():
    found = sharpen(TablePolicy([[0.3, 0.7], [0.0, 1.0]], cut=(1,)), [[0], [1]], 12)
    assert found.responses == [[0, 0], None]
    assert found.truncated.tolist()[1] == 12
    assert found.scores[1] == -math.inf
    assert math.isnan(found.mean_loglik[1])
    assert [(s.prompt, s.response) for s in found.sequences()] == [([0], [0, 0])]


def test_a_majority_can_overrule_the_likeliest_response():
    p = [[0.4, 0.3, 0.3]]  # 1 and 2 are two ways to say the same
    by_likelihood = sharpen(TablePolicy(p), [[0]], 60)
    by_majority = sharpen(TablePolicy(p), [[0]], 60, reward="majority", extract=lambda response: response[0] == 0)
    assert by_likelihood.responses == [[0, 0]]
    assert by_majority.responses[0] in ([1, 0], [2, 0])


class Silent(TablePolicy):
    def sample(self, prompts, n):
        batch = super().sample(prompts, n)
        return SequenceBatch(batch.input_ids, batch.attention_mask, batch.response_mask)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdaptiveSampler(delta=1.0), "delta must be above 0 and below 1, got 1.0"),
        (lambda: AdaptiveSampler(max_samples=0), "max_samples must be at least 1"),
        (lambda: AdaptiveSampler().should_stop(-1.0, 0), "k must be at least 1, got 0"),
        (lambda: AdaptiveSampler().should_stop(math.nan, 1), "max_logp must not be NaN"),
        (lambda: best_of_n_select([["a"]], [[math.nan]]), "got NaN"),
        (lambda: best_of_n_select([["a"]], [[1.0, 2.0]]), r"here \(1, 1\), got \(1, 2\)"),
        (lambda: best_of_n_select([], np.zeros((0, 0))), "not empty"),
        (lambda: best_of_n_select([["a"], ["b"]], [[0.0], [-math.inf]]), r"prompts \[1\] have none"),
        (lambda: self_reward(None, [[0]], [[[1]]], "length"), "kind must be one of 'loglik'"),
        (lambda: self_reward(None, [[0]], [[[1]]], "majority"), "extract must be given"),
        (lambda: self_reward(None, [[0]], [[[]]]), "responses must not be empty"),
        (lambda: self_reward(None, [[0]], []), "one list for each"),
        (
            lambda: self_reward(None, [[0]], [[[1]]], base_logps=torch.zeros(1, 2)),
            r"base_logps must have shape \(1, 1\)",
        ),
        (lambda: sharpen(TablePolicy([[1.0]]), [[0]], 0), "n must be at least 1, got 0"),
        (lambda: sharpen(TablePolicy([[1.0]]), [], 2), "prompts must hold at least one prompt"),
        (lambda: sharpen(TablePolicy([[1.0]]), [[0], []], 2), "prompts must not be empty, but prompt 1 has no tokens"),
        (lambda: sharpen(TablePolicy([[1.0]]), ["text"], 2), "tokenizer may be None only when prompts are token ids"),
        (lambda: sharpen(TablePolicy([[1.0]]), [[0]], AdaptiveSampler(), reward="normalized"), "n must be a number"),
        (lambda: sharpen(Silent([[1.0]]), [[0]], 2), "must sample with logprobs"),
    ],
)
def test_bad_selections_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_no_policy_is_refused():
    with pytest.raises(TypeError, match="methods sample and log_prob, got a object"):
        sharpen(object(), [[0]], 2)


# ------------------------------------------------------------------------------------------------------------ pair loss


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_the_minimiser_of_the_pair_loss_is_the_power_of_the_base(beta):
    p = torch.from_numpy(np.random.default_rng(9).dirichlet(np.ones(12)))
    logits = p.log().clone().requires_grad_()
    y, y2 = (index.reshape(-1) for index in torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij"))
    loss = SharpeningPairLoss(beta, "none")
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        log_policy = logits.log_softmax(0)
        out = loss(log_policy[y], log_policy[y2], p.log()[y], p.log()[y2])
        value = (p[y] * p[y2] * out.loss).sum()  # all pairs, as often as the base draws them
        value.backward()
        return value

    assert optimizer.step(closure) > 0.1
    found = logits.detach().softmax(0).numpy()
    np.testing.assert_allclose(found, tabular.power(p, 1 + 1 / beta), atol=1e-8)


def test_the_pair_loss_by_hand_with_its_optimism_and_reductions():
    logp, logp2 = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -0.5])
    base, base2 = torch.tensor([-1.5, -2.5]), torch.tensor([-1.0, -1.5])
    r, r2 = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    out = SharpeningPairLoss(2.0, "none")(logp, logp2, base, base2, r, r2)
    # 2 (0.5 + 1) - 1 = 2; 2 (0.5 - 1) + 2 = 1
    assert out.loss.tolist() == [4.0, 1.0]
    assert out.implicit_margin.tolist() == [3.0, -1.0]
    assert out.reward_margin.tolist() == [1.0, -2.0]
    assert SharpeningPairLoss(2.0)(logp, logp2, base, base2, r, r2).loss == 2.5
    assert SharpeningPairLoss(2.0, "sum", alpha=0.5)(logp, logp2, base, base2, r, r2).loss == 5.0 - 0.5 * 2.5
    default = SharpeningPairLoss(2.0, "none")(logp, logp2, base, base2)
    assert default.reward_margin.tolist() == [-0.5, -1.0]


def test_optimism_takes_mass_from_what_the_base_says():
    logp = torch.tensor([-1.0], requires_grad=True)
    logp2 = torch.tensor([-1.0], requires_grad=True)
    SharpeningPairLoss(1.0, alpha=0.1)(logp, logp2, logp.detach(), logp2.detach()).loss.backward()
    assert logp.grad == 0.0
    assert logp2.grad == pytest.approx(0.1)  # a descent step lowers it


def test_with_a_reward_difference_of_one_half_the_pair_loss_is_identity_preference_optimisation():
    # IPO: (h - 1 / (2 beta))^2 for the difference h of the log-ratios (Azar et al., 2024)
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, ref_chosen, ref_rejected = -5 * torch.rand(4, 7, generator=generator)
    beta = 0.3
    ipo = (chosen - ref_chosen - (rejected - ref_rejected) - 1 / (2 * beta)) ** 2
    half = torch.full((7,), 0.5)
    out = SharpeningPairLoss(beta, "none")(chosen, rejected, ref_chosen, ref_rejected, half, torch.zeros(7))
    torch.testing.assert_close(out.loss, beta**2 * ipo)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: SharpeningPairLoss(0.0), "beta must be above 0"),
        (lambda x: SharpeningPairLoss(1.0, "max"), "reduction must be one of"),
        (lambda x: SharpeningPairLoss(1.0, alpha=-1.0), "alpha must be at least 0"),
        (lambda x: SharpeningPairLoss(1.0)(x, x, x, x, r=x), "r and r2 must be given both or neither"),
        (lambda x: SharpeningPairLoss(1.0)(x, x[:1], x, x), r"logp2 must have shape \(batch,\)"),
        (lambda x: SharpeningPairLoss(1.0)(x, x, x - math.inf, x), "base_logp must be finite"),
        (lambda x: SharpeningPairLoss(1.0)(x, x, x, x + 2.0), "base_logp2 must be finite log-probabilities, at most 0"),
        (lambda x: SharpeningPairLoss(1.0)(x, x, x, x, x, x * math.nan), "r2 must be finite"),
        (lambda x: SharpeningPairLoss(1.0)(x, x, x, x, x, x[:1]), r"r2 must have shape \(2,\) like logp"),
    ],
)
def test_bad_losses_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(-torch.ones(2))
