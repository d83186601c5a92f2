"""Tests of the mathematics: each fails when the idea it names is removed."""

import itertools
import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch

import workingpapers.alignment.best_of_n_curve as module
from workingpapers.alignment import best_of_n, overoptimization


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    proxy = rng.standard_normal((3, 8))
    return proxy, proxy + rng.standard_normal((3, 8))


def over_all_subsets(proxy, gold, n):
    """Mean gold score of the best of every subset, a tie broken by a fair die."""
    values = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[list(subset)])
        values.append(np.mean([gold[i] for i in subset if proxy[i] == best]))
    return np.mean(values)


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_mean_over_all_subsets(scores, tied):
    proxy, gold = scores
    proxy = np.round(proxy) if tied else proxy
    assert (len(np.unique(proxy[0])) < 8) == tied
    curve = best_of_n(proxy, gold, ns=range(1, 9))
    expected = [[over_all_subsets(p, g, n) for n in range(1, 9)] for p, g in zip(proxy, gold, strict=True)]
    np.testing.assert_allclose(curve.gold_by_prompt, expected, atol=1e-14)
    np.testing.assert_allclose(curve.gold, np.mean(expected, axis=0), atol=1e-14)
    np.testing.assert_allclose(curve.gold_se, np.std(expected, axis=0, ddof=1) / math.sqrt(3), atol=1e-14)


@pytest.mark.parametrize(("answers", "n"), [(200, 1), (200, 7), (700, 650), (1_000, 100)])
def test_weights_agree_with_exact_binomials(answers, n):
    gold = np.zeros((answers, answers))
    np.fill_diagonal(gold, 1.0)  # prompt i asks for the weight of rank i
    proxy = np.broadcast_to(np.arange(answers), (answers, answers))
    found = best_of_n(proxy, gold, ns=[n]).gold_by_prompt[:, 0]
    exact = [float(Fraction(math.comb(rank - 1, n - 1), math.comb(answers, n))) for rank in range(1, answers + 1)]
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("n", [1, 2, 1_000, 65_536, 100_000])
def test_weights_sum_to_one_for_a_hundred_thousand_answers(n):
    proxy = np.arange(100_000.0)[None]
    assert best_of_n(proxy, np.ones_like(proxy), ns=[n]).gold[0] == pytest.approx(1.0, abs=1e-11)


def test_the_ends_of_the_curve_are_the_mean_and_the_favourite(scores):
    proxy, gold = scores
    curve = best_of_n(proxy, gold, ns=[8, 1, 8])
    assert curve.n.tolist() == [1, 8]
    np.testing.assert_allclose(curve.gold_by_prompt[:, 0], gold.mean(1), atol=1e-14)
    np.testing.assert_allclose(curve.gold_by_prompt[:, 1], gold[np.arange(3), proxy.argmax(1)], atol=1e-14)
    np.testing.assert_allclose(curve.kl, [0.0, math.log(8) - 7 / 8], atol=1e-14)


def test_the_expected_maximum_of_uniform_scores_is_n_over_n_plus_one():
    # ranks of N + 1 equal spacings: E max of n = n / (n + 1), exactly, in finite populations too
    proxy = (np.arange(1, 1_000) / 1_000)[None]
    curve = best_of_n(proxy, proxy, ns=[1, 2, 10, 500])
    np.testing.assert_allclose(curve.proxy, curve.n / (curve.n + 1), atol=1e-13)


def test_answers_may_stand_in_any_order(scores):
    proxy, gold = scores
    shuffled = np.random.default_rng(1).permutation(8)
    np.testing.assert_allclose(
        best_of_n(proxy, gold).gold, best_of_n(proxy[:, shuffled], gold[:, shuffled]).gold, atol=1e-14
    )


def test_many_n_do_not_make_a_matrix_of_all_answers():
    proxy = np.random.default_rng(0).standard_normal((1, 2_000))
    best_of_n(proxy, proxy, ns=[1])
    tracemalloc.start()
    curve = best_of_n(proxy, proxy, ns=range(1, 2_001))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (np.diff(curve.proxy) > 0).all()
    assert peak < 2_000 * 2_000 * 8 / 50
    lengths = sum(module._top_weights(2_000, n).size for n in range(1, 2_001))
    assert lengths < 50 * 2_000 * math.log(2_000)


def test_default_ns_tensors_and_one_prompt():
    curve = best_of_n(torch.arange(5.0)[None].requires_grad_(), torch.ones(1, 5))
    assert curve.n.tolist() == [1, 2, 4]
    assert np.isnan(curve.gold_se).all()
    assert math.isnan(overoptimization(curve).drop_se)


def test_overoptimization_finds_the_peak_and_pairs_its_drop():
    proxy = np.tile(np.arange(64.0), (4, 1))
    gold = np.where(proxy < 56, proxy, 10.0) + np.array([[0.0], [1.0], [2.0], [3.0]])
    found = overoptimization(best_of_n(proxy, gold))
    assert 1 < found.peak_n < 64
    assert found.peak_kl == pytest.approx(math.log(found.peak_n) - (found.peak_n - 1) / found.peak_n)
    assert found.drop == pytest.approx(found.peak_gold - found.final_gold)
    assert found.final_gold == pytest.approx(11.5)
    assert found.drop_se < 1e-12  # the prompts differ by a constant only
    assert overoptimization(best_of_n(proxy, proxy)).drop == 0.0


def test_scores_are_not_modified(scores):
    proxy, gold = scores
    before = proxy.copy(), gold.copy()
    best_of_n(np.round(proxy), gold)
    best_of_n(proxy, gold)
    np.testing.assert_array_equal((proxy, gold), before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ns": [9]}, ValueError, "ns must be at least 1 and at most 8, got 9"),
        ({"ns": [0]}, ValueError, "ns must be at least 1"),
        ({"ns": []}, ValueError, "ns must name at least one n"),
        ({"ns": [1.5]}, TypeError, "ns must be an integer"),
        ({"gold": np.zeros((3, 7))}, ValueError, r"one shape, got \(3, 8\) and \(3, 7\)"),
        ({"gold": np.full((3, 8), np.nan)}, ValueError, "gold must be finite"),
        ({"proxy": np.zeros(8)}, ValueError, r"proxy must have shape \(prompts, answers\), neither empty, got \(8,\)"),
        ({"proxy": np.zeros((3, 0))}, ValueError, "neither empty"),
    ],
)
def test_bad_input_is_named(scores, change, error, message):
    proxy, gold = scores
    with pytest.raises(error, match=message):
        best_of_n(**({"proxy": proxy, "gold": gold} | change))
