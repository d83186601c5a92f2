"""Tests of the mathematics: each fails when the idea it names is removed."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, softmax

from workingpapers.alignment import (
    DNOLoss,
    PreferenceConfig,
    PreferenceTrainer,
    ReplayMix,
    TokenPair,
    WinRateRanker,
    borda_scores,
    build_pairs,
    dpo_losses,
    exact_nash,
    exploitability,
    nash_policy,
    ngram_repetition,
    rpo_minimax,
)


def random_games(actions, seed=0, contexts=None):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((*(() if contexts is None else (contexts,)), actions, actions))
    return expit(scores - scores.swapaxes(-1, -2))


def planted_cycle(actions, seed):
    """Answers 0 > 1 > 2 > 0 with probability 0.9, all three better than the others."""
    rng = np.random.default_rng(seed)
    game = random_games(actions, seed)
    for y in range(3):
        z = (y + 1) % 3
        game[y, 3:] = 0.6 + 0.3 * rng.random(actions - 3)
        game[3:, y] = 1 - game[y, 3:]
        game[y, z], game[z, y] = 0.9, 0.1
    return game


# ------------------------------------------------------------------------------------------------------ finite games


def test_each_round_maximises_the_win_rate_less_the_divergence():
    game, start, eta = random_games(5), np.random.default_rng(1).dirichlet(np.ones(5)), 0.3
    found = nash_policy(game, eta, n_rounds=1, init=start)

    def objective(logits):
        policy = softmax(logits)
        return -(policy @ game @ start - eta * policy @ np.log(policy / start))

    best = minimize(objective, np.log(start), method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(found.policy_last, softmax(best.x), atol=1e-6)
    np.testing.assert_allclose(found.policy_avg, start, rtol=1e-12)
    assert found.improvement_trace[0] == pytest.approx(found.policy_last @ game @ start, abs=1e-12)
    assert found.kl_trace[0] == pytest.approx(found.policy_last @ np.log(found.policy_last / start), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**32 - 1), st.floats(0.01, 10.0))
def test_every_policy_beats_its_predecessor_by_the_divergence(actions, seed, eta):
    found = nash_policy(random_games(actions, seed), eta, n_rounds=60)
    assert (found.improvement_trace >= 0.5 + eta * found.kl_trace - 1e-9).all()


@pytest.mark.parametrize("actions", [2, 4, 30])
def test_the_mean_policy_keeps_the_bound_of_self_play_at_the_best_temperature(actions):
    rounds = 400
    found = nash_policy(random_games(actions, 3, contexts=10), "auto", rounds)
    assert found.eta == pytest.approx(np.sqrt(rounds / (8 * np.log(actions))))
    assert found.exploitability_trace[-1] <= np.sqrt(np.log(actions) / (2 * rounds))
    longer = nash_policy(random_games(actions, 3, contexts=10), "auto", 64 * rounds)
    assert longer.exploitability_trace[-1] < 0.25 * found.exploitability_trace[-1] + 1e-12


def test_means_converge_where_the_last_policy_and_the_best_average_answer_do_not():
    games = np.stack([planted_cycle(10, seed) for seed in range(5)])
    found = nash_policy(games, 0.5, 400)
    leaders = np.eye(10)[borda_scores(games).argmax(1)]
    assert found.exploitability_trace[-1] < 0.03
    assert found.last_exploitability_trace[300:].min() > 0.2
    np.testing.assert_allclose(exploitability(games, leaders), 0.4, atol=1e-12)


def test_traces_are_the_exploitabilities_of_the_policies_returned():
    games = random_games(6, 2, contexts=4)
    found = nash_policy(games, 0.2, 30)
    assert found.exploitability_trace[-1] == pytest.approx(exploitability(games, found.policy_avg).mean(), abs=1e-12)
    assert found.last_exploitability_trace[-1] == pytest.approx(
        exploitability(games, found.policy_last).mean(), abs=1e-12
    )
    assert len(found.kl_trace) == len(found.improvement_trace) == found.iterations == 30


def test_the_regularised_iteration_converges_to_its_own_fixed_point_near_the_regularised_equilibrium():
    game, tau = planted_cycle(6, 0), 0.1
    equilibrium, distances = np.full(6, 1 / 6), []
    for _ in range(20_000):
        equilibrium = 0.99 * equilibrium + 0.01 * softmax(game @ equilibrium / tau)
    for eta in (1.0, 10.0, 100.0):
        found = nash_policy(game, eta, int(60 * eta / tau), tau, tol=1e-13)
        assert found.converged
        distances.append(np.abs(found.policy_last - equilibrium).sum())
    assert distances[2] < 1e-3
    assert 5 < distances[0] / distances[1] < 20  # O(1 / eta)
    assert 5 < distances[1] / distances[2] < 20


def test_a_reference_is_kept_near_when_regularised_and_is_the_start_when_not():
    game, ref = random_games(5), np.array([0.6, 0.1, 0.1, 0.1, 0.1])
    near = nash_policy(game, 50.0, 2_000, tau=50.0, ref=ref)
    np.testing.assert_allclose(near.policy_last, ref, atol=0.01)
    np.testing.assert_allclose(nash_policy(game, 0.5, 1, ref=ref).policy_avg, ref)
    start = np.array([0.2, 0.2, 0.2, 0.2, 0.2])
    np.testing.assert_allclose(nash_policy(game, 0.5, 1, tau=0.1, ref=ref, init=start).policy_avg, start)


@pytest.mark.parametrize("actions", [2, 3, 7, 25])
def test_the_linear_program_finds_policies_that_nobody_beats(actions):
    games = random_games(actions, 5, contexts=4)
    policies = exact_nash(games)
    np.testing.assert_allclose(policies.sum(-1), 1.0)
    assert exploitability(games, policies).max() < 1e-8
    np.testing.assert_allclose(exact_nash(games[2]), policies[2])


def test_rock_paper_scissors_in_closed_form():
    # With wins of a, b, c over the circle the equilibrium weights every answer by the win between the other two.
    a, b, c = 0.4, 0.3, 0.3
    game = 0.5 + np.array([[0, a, -c], [-a, 0, b], [c, -b, 0]])
    np.testing.assert_allclose(exact_nash(game), np.array([b, c, a]) / (a + b + c), atol=1e-9)
    np.testing.assert_allclose(nash_policy(game, "auto", 20_000).policy_avg, np.array([0.3, 0.3, 0.4]), atol=0.01)


def test_transitive_preferences_are_won_by_their_best_answer_also_in_the_last_policy():
    reward = np.array([0.3, 1.0, -0.5, 0.1])
    game = expit(reward[:, None] - reward)
    found = nash_policy(game, 0.1, 2_000)
    assert found.policy_last[1] > 1 - 1e-12
    assert np.argmax(borda_scores(game)) == 1
    np.testing.assert_allclose(borda_scores(game)[1], expit(1.0 - np.delete(reward, 1)).mean())


def test_many_games_at_once_are_the_games_one_by_one():
    games = random_games(5, 8, contexts=3)
    found = nash_policy(games, 0.3, 50, tau=0.1)
    for game, mean, last in zip(games, found.policy_avg, found.policy_last, strict=True):
        alone = nash_policy(game, 0.3, 50, tau=0.1)
        np.testing.assert_allclose(alone.policy_avg, mean, atol=1e-14)
        np.testing.assert_allclose(alone.policy_last, last, atol=1e-14)


def test_tiny_temperatures_do_not_overflow():
    found = nash_policy(planted_cycle(6, 1), 1e-4, 500)
    assert np.isfinite(found.policy_avg).all()
    assert (found.improvement_trace >= 0.5 + 1e-4 * found.kl_trace - 1e-9).all()


def test_it_stops_when_the_tolerance_is_reached_and_warns_when_it_is_not():
    game = planted_cycle(10, 0)
    before = game.copy()
    found = nash_policy(game, "auto", 4_000, tol=0.05)
    assert found.converged
    assert found.exploitability_trace[-1] <= 0.05 < found.exploitability_trace[-2]
    assert (game == before).all()
    with pytest.warns(RuntimeWarning, match="exploitability of the mean policy .* > tol 1.0e-09 after 10 rounds"):
        assert not nash_policy(game, 0.5, 10, tol=1e-9).converged
    with pytest.warns(RuntimeWarning, match="step of the last policy"):
        nash_policy(game, 0.5, 3, tau=0.1, tol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"P": np.full((2, 3), 0.5)}, r"P must have shape \(A, A\) or \(X, A, A\)"),
        ({"P": np.array([[0.5]])}, "with A at least 2"),
        ({"P": np.array([[0.5, np.nan], [0.5, 0.5]])}, "P must be finite"),
        ({"P": np.array([[0.5, 1.2], [-0.2, 0.5]])}, r"P must be in \[0, 1\]"),
        ({"P": np.array([[0.5, 0.7], [0.4, 0.5]])}, "must be 1, got a sum off by 0.1"),
        ({"eta": 0.0}, "eta must be above 0, got 0.0"),
        ({"eta": "best"}, "eta must be a number, or 'auto'"),
        ({"eta": "auto", "tau": 0.1}, "'auto' where tau is 0"),
        ({"tau": 0.6}, "tau must be at most eta=0.5, got 0.6"),
        ({"tau": -0.1}, "tau must be at least 0"),
        ({"n_rounds": 0}, "n_rounds must be at least 1"),
        ({"tol": np.inf}, "tol must be at least 0"),
        ({"init": np.array([0.5, 0.6])}, "init must be at least 0 and sum to 1"),
        ({"init": np.array([1.0, 0.0])}, "init must be positive"),
        ({"ref": np.array([1.0])}, r"ref must have shape \(2,\), got \(1,\)"),
    ],
)
def test_bad_games_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        nash_policy(**({"P": np.full((2, 2), 0.5), "eta": 0.5} | change))


def test_bad_policies_are_named():
    with pytest.raises(ValueError, match=r"policy must have shape \(2,\)"):
        exploitability(np.full((2, 2), 0.5), np.ones(3) / 3)
    with pytest.raises(ValueError, match="must be 1"):
        borda_scores(np.ones((2, 2)))
    with pytest.raises(ValueError, match="must be 1"):
        exact_nash(np.ones((2, 2)))


# ---------------------------------------------------------------------------------------------------------- the loss


@pytest.fixture
def logps():
    generator = torch.Generator().manual_seed(0)
    values = -20 * torch.rand(4, 6, generator=generator, dtype=torch.float64)
    return [row.clone().requires_grad_(place < 2) for place, row in enumerate(values)]


RATES = torch.tensor([0.1, 0.9, 0.5, 0.0, 1.0, 0.3], dtype=torch.float64)


def test_the_gradient_is_that_of_a_regression_of_the_margin_on_win_rates(logps):
    eta, r1, r2 = 0.3, RATES, RATES.flip(0)
    out = DNOLoss(eta, reduction="sum")(*logps, r1, r2)
    out.loss.backward()
    margin = eta * ((logps[0] - logps[2]) - (logps[1] - logps[3]))
    pull = eta * (torch.sigmoid(margin) - torch.sigmoid(r1 - r2))
    torch.testing.assert_close(logps[0].grad, pull.detach())
    torch.testing.assert_close(logps[1].grad, -pull.detach())
    torch.testing.assert_close(out.margin, margin.detach())


def test_soft_iteration_is_stationary_whatever_the_pairs_are_drawn_from():
    eta, game = 0.2, random_games(6)
    policy = np.random.default_rng(2).dirichlet(np.ones(6))
    target = nash_policy(game, eta, 1, init=policy).policy_last
    rates = torch.from_numpy(game @ policy)
    first, second = (torch.tensor(side) for side in zip(*itertools.permutations(range(6), 2), strict=True))
    old = torch.from_numpy(np.log(policy))
    for seed in range(3):
        weights = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(len(first))))
        logits = torch.from_numpy(np.log(target)).clone().requires_grad_()
        log_policy = logits.log_softmax(0)
        out = DNOLoss(eta, reduction="none")(
            log_policy[first], log_policy[second], old[first], old[second], rates[first], rates[second]
        )
        (weights * out.loss).sum().backward()
        assert logits.grad.abs().max() < 1e-15


def test_training_on_pairs_reaches_the_closed_form():
    eta, game = 0.5, random_games(4)
    policy = np.array([0.4, 0.3, 0.2, 0.1])
    target = nash_policy(game, eta, 1, init=policy).policy_last
    first, second = (torch.tensor(side) for side in zip(*itertools.combinations(range(4), 2), strict=True))
    old, rates = torch.from_numpy(np.log(policy)), torch.from_numpy(game @ policy)
    logits = old.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        now = logits.log_softmax(0)
        loss = DNOLoss(eta)(now[first], now[second], old[first], old[second], rates[first], rates[second]).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    np.testing.assert_allclose(logits.softmax(0).detach().numpy(), target, atol=1e-6)


def test_the_hard_loss_is_dpo_with_the_current_policy_as_reference(logps):
    out = DNOLoss(0.1, hard=True, reduction="none")(*logps)
    expected = dpo_losses(logps[0] - logps[2], logps[1] - logps[3], beta=0.1)
    torch.testing.assert_close(out.loss, expected)
    assert (out.target == 1).all()
    torch.testing.assert_close(DNOLoss(0.1, hard=True)(*logps).loss, expected.mean())


def test_soft_targets_stay_within_sigma_of_one():
    zero = torch.zeros(2)
    out = DNOLoss(0.1)(zero, zero, zero, zero, torch.tensor([1.0, 0.4]), torch.tensor([0.0, 0.4]))
    torch.testing.assert_close(out.target, torch.tensor([1.0, 0.0]).sigmoid())
    assert out.accuracy.tolist() == [0.5, 0.5]


def test_far_margins_do_not_overflow():
    far = torch.tensor([-1e4], requires_grad=True)
    out = DNOLoss(1.0)(far, torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.ones(1), torch.ones(1))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(5e3)
    assert far.grad.item() == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("options", "rates", "message"),
    [
        ({"eta": 0.0}, (), "eta must be above 0"),
        ({"reduction": "max"}, (), "reduction must be one of"),
        ({}, (), "r1 must be given unless hard=True"),
        ({}, (torch.ones(2), torch.ones(3)), r"r2 must have shape \(2,\), got \(3,\)"),
        ({}, (torch.ones(2), torch.tensor([0.0, 1.5])), r"r2 must be win rates in \[0, 1\]"),
        ({}, (torch.tensor([0.0, torch.nan]), torch.ones(2)), "r1 must be win rates"),
    ],
)
def test_bad_loss_input_is_named(options, rates, message):
    with pytest.raises(ValueError, match=message):
        DNOLoss(**options)(*[torch.tensor([-1.0, -2.0])] * 4, *rates)
    with pytest.raises(ValueError, match="old_logp1 must be finite"):
        DNOLoss(hard=True)(*[torch.tensor([-1.0])] * 2, torch.tensor([torch.nan]), torch.tensor([-1.0]))


def test_any_preference_trainer_takes_the_hard_loss():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model, reference = (transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, **shape)) for _ in "ab")
    args = PreferenceConfig(learning_rate=1e-2, epochs=5)
    loss = DNOLoss(0.5, hard=True, reduction="sum")
    history = PreferenceTrainer(model, reference, [TokenPair([1], [2, 3], [4])], args=args, loss=loss).train()
    assert history[-1]["margin"] > history[0]["margin"]


# --------------------------------------------------------------------------------------------------------- the pairs


def test_win_rates_leave_the_answer_itself_out_and_symmetrising_removes_position_bias():
    strength = {"a": 0.0, "b": 1.0, "c": 2.0}

    def first_is_favoured(prompt, y, z):
        return min(1.0, 0.1 + expit(strength[y] - strength[z]))

    table = WinRateRanker(first_is_favoured).preferences(["?"], [["a", "b", "c"]])[0]
    truth = expit(np.subtract.outer([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]))
    np.testing.assert_allclose(table, truth, atol=1e-12)
    rates = WinRateRanker(first_is_favoured)("?", ["a", "b", "c"])
    np.testing.assert_allclose(rates, (truth.sum(1) - 0.5) / 2, atol=1e-12)
    biased = WinRateRanker(first_is_favoured, symmetrize=False).preferences(["?"], [["a", "b", "c"]])[0]
    assert biased[0, 1] == pytest.approx(truth[0, 1] + 0.1)
    np.testing.assert_allclose(biased + biased.T, 1.0)


def test_a_batched_judge_is_called_once_and_equal_answers_tie_unasked():
    calls = []

    def judge(prompts, ys, zs):
        calls.append(list(zip(prompts, ys, zs, strict=True)))
        return [y < z for y, z in zip(ys, zs, strict=True)]

    ranker = WinRateRanker(judge, batched=True)
    tables = ranker.preferences(["p", "q"], [["a", "b", "a"], ["c", "c"]])
    np.testing.assert_array_equal(tables[0], [[0.5, 1.0, 0.5], [0.0, 0.5, 0.0], [0.5, 1.0, 0.5]])
    np.testing.assert_array_equal(tables[1], np.full((2, 2), 0.5))
    assert calls == [[("p", "a", "b"), ("p", "b", "a"), ("p", "b", "a"), ("p", "a", "b")]]


def test_bad_judges_are_named():
    with pytest.raises(TypeError, match="prefer must be callable"):
        WinRateRanker(0.5)
    with pytest.raises(ValueError, match="candidates of prompt 0 must be at least 2, got 1"):
        WinRateRanker(lambda p, y, z: True)("?", ["a"])
    for wrong in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="must return a bool or a probability, got"):
            WinRateRanker(lambda p, y, z, wrong=wrong: wrong)("?", ["a", "b"])
    with pytest.raises(ValueError, match="must return 2 judgements, got shape"):
        WinRateRanker(lambda p, y, z: [True], batched=True)("?", ["a", "b"])
    with pytest.raises(ValueError, match="one list per prompt"):
        WinRateRanker(lambda p, y, z: True).preferences(["?"], [])


SOURCE = ["student", "student", "teacher"]


def test_the_rule_of_the_paper_on_scores_from_one_to_six():
    rule = {"margin": 2, "student_margin": 1, "min_positive": 5}
    found = build_pairs([[4, 5, 6], [5, 4, 5], [3, 1, 4], [6, 6, 6], [5, 5, 4]], SOURCE, **rule)
    # teacher 6 beats student 4 by 2, not student 5 by 1; student 5 beats student 4 by 1
    assert found.pairs.tolist() == [[0, 1, 0], [0, 2, 0], [1, 0, 1], [4, 0, 2], [4, 1, 2]]
    assert found.counts == {"teacher>student": 1, "student>teacher": 2, "student>student": 2}
    assert found.skipped == {"tied": 1, "no_positive": 1, "small_margin": 0}


def test_a_lead_equal_to_the_margin_is_enough_and_no_lead_never_is():
    scores = np.array([[0.4 - 0.15, 0.4, 0.0]])  # 0.4 - 0.25 rounds to less than 0.15
    assert [0, 1, 0] in build_pairs(scores, SOURCE, margin=0.15).pairs.tolist()
    assert len(build_pairs(scores, SOURCE, margin=0.41).pairs) == 0
    nothing = build_pairs(np.full((2, 3), 0.3), SOURCE, margin=0.0)
    assert nothing.pairs.shape == (0, 3)
    assert nothing.skipped == {"tied": 2, "no_positive": 0, "small_margin": 0}
    assert build_pairs([[0.5, 0.6, 0.55]], SOURCE, margin=0.3).skipped["small_margin"] == 1


def test_only_allowed_kinds_are_paired():
    scores = [[1.0, 2.0, 3.0]]
    only = build_pairs(scores, SOURCE, margin=0.0, allow=["teacher>student"])
    assert only.pairs.tolist() == [[0, 2, 0], [0, 2, 1]]
    assert only.counts == {"teacher>student": 2}
    by_row = build_pairs(scores * 2, [SOURCE, SOURCE[::-1]], margin=0.0, allow=["teacher>student"])
    assert by_row.pairs.tolist() == only.pairs.tolist()
    assert by_row.skipped["small_margin"] == 1


def test_automatic_negatives_lose_whatever_their_scores():
    negatives = np.array([[False, True, False]])
    found = build_pairs([[1.0, 9.0, 1.5]], SOURCE, margin=1.0, automatic_negatives=negatives)
    assert found.pairs.tolist() == [[0, 0, 1], [0, 2, 1]]


def test_pairs_are_those_of_the_exact_solver_of_rpo():
    found = build_pairs(np.random.default_rng(0).random((4, 3)), SOURCE, margin=0.1)
    assert rpo_minimax(np.full((4, 3), 1 / 3), found.pairs, beta=1.0, eta=1.0).converged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.ones(3)}, r"scores must have shape \(prompts, candidates\)"),
        ({"scores": np.ones((2, 1)), "source": ["student"]}, "at least 2 candidates"),
        ({"scores": [[1.0, np.nan, 0.0]]}, "scores must be finite"),
        ({"margin": -0.1}, "margin must be at least 0"),
        ({"student_margin": np.nan}, "student_margin must be at least 0"),
        ({"source": ["student"]}, r"source must have shape \(1, 3\) or \(3,\)"),
        ({"source": ["student", "pupil", "teacher"]}, "source must be 'teacher' or 'student'"),
        ({"allow": ["teacher>teacher"]}, "allow must be one of"),
        ({"automatic_negatives": np.zeros(3, bool)}, r"automatic_negatives must have shape \(1, 3\)"),
    ],
)
def test_bad_scores_are_named(change, message):
    good = {"scores": [[1.0, 2.0, 3.0]], "source": SOURCE, "margin": 0.1}
    with pytest.raises(ValueError, match=message):
        build_pairs(**(good | change))


def test_repetition_counts_grams_that_stood_before():
    assert ngram_repetition([1, 2, 3, 4, 5]) == 0.0
    assert ngram_repetition([1, 2]) == 0.0
    assert ngram_repetition([7] * 8) == pytest.approx(0.8)  # five 4-grams, one of them new
    assert ngram_repetition("abab", n=2) == pytest.approx(1 / 3)


def test_replay_halves_with_age_and_keeps_all_that_is_new():
    rounds = [[("old", k) for k in range(40)], [("last", k) for k in range(20)], [("new", k) for k in range(5)]]
    mixed = ReplayMix()(rounds)
    kinds = [kind for kind, _ in mixed]
    assert (kinds.count("new"), kinds.count("last"), kinds.count("old")) == (5, 6, 6)
    assert len(set(mixed)) == len(mixed)
    assert mixed == ReplayMix()(rounds)
    assert mixed != ReplayMix(random_state=1)(rounds)
    assert ReplayMix(first=0.0)(rounds) == rounds[-1]
    with pytest.raises(ValueError, match="first must be at least 0 and at most 1"):
        ReplayMix(first=1.1)
    with pytest.raises(ValueError, match="rounds must hold at least one round"):
        ReplayMix()([])
