"""The laboratory of gold rewards: exact optima by enumeration, and overoptimisation that can be seen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from workingpapers.alignment import GoldRewardLab

SMALL = {"symbols": 3, "length": 4, "successors": 2}


def test_the_optimal_policy_is_the_tilted_distribution_over_whole_texts():
    lab = GoldRewardLab(seed=1, **SMALL)
    reward = np.random.default_rng(0).standard_normal((3, 3))
    texts = np.array(list(itertools.product(range(3), repeat=4)))
    reference = (1 - lab.leak) * lab.transition + lab.leak / 3
    chances = reference[texts[:, :-1], texts[:, 1:]].prod(1)
    for beta in (0.1, 1.0, 5.0):
        log_policy = lab.optimal_policy(reward, beta)
        ours = np.exp(sum(log_policy[t][texts[:, t], texts[:, t + 1]] for t in range(3)))
        tilted = chances * np.exp(lab.score(texts, reward) / beta)  # pi* ~ pi_ref exp(r / beta), for each first symbol
        for first in range(3):
            mine = texts[:, 0] == first
            np.testing.assert_allclose(ours[mine], tilted[mine] / tilted[mine].sum(), rtol=1e-10)
        expected, divergence = lab.expected(log_policy, reward)
        assert expected == pytest.approx((ours * lab.score(texts, reward)).sum() / 3)
        assert divergence == pytest.approx((ours * np.log(ours / chances)).sum() / 3)


def test_the_gold_reward_itself_cannot_be_overoptimised_but_a_proxy_can():
    betas = np.geomspace(30, 0.02, 25)
    drops = []
    for seed in range(5):
        lab = GoldRewardLab(seed=seed)
        true = lab.frontier(lab.gold, betas)
        assert (np.diff(true.gold) > 0).all()
        assert (np.diff(true.kl) > 0).all()
        learned = lab.frontier(lab.proxy(lab.ranked_texts(100, seed=5, noise=0.25)), betas)
        assert (np.diff(learned.proxy) > 0).all()
        peak = learned.gold.argmax()
        assert 0 < peak < len(betas) - 1
        drops.append(learned.gold[peak] - learned.gold[-1])
    assert np.mean(drops) > 1.0, "the gold reward turns down while the proxy goes on rising"


def test_more_and_cleaner_pairs_make_a_better_proxy():
    lab = GoldRewardLab(seed=0)
    best = {
        (count, noise): lab.frontier(lab.proxy(lab.ranked_texts(count, seed=1, noise=noise)), np.geomspace(10, 0.1, 9))
        for count, noise in [(100, 0.25), (3000, 0.25), (3000, 0.0)]
    }
    peaks = [curve.gold.max() for curve in best.values()]
    assert peaks == sorted(peaks)
    assert peaks[2] > peaks[0] + 0.5


def test_texts_follow_the_grammar_and_the_judge_the_reward():
    lab = GoldRewardLab(seed=2)
    texts = lab.texts(20_000, np.random.default_rng(0))
    assert lab.illegal_rate(texts) == 0
    counts = np.zeros((32, 32))
    np.add.at(counts, (texts[:, :-1], texts[:, 1:]), 1)
    np.testing.assert_allclose(counts / counts.sum(1, keepdims=True), lab.transition, atol=0.04)
    pairs = texts.reshape(-1, 2, 16)
    for noise in (0.0, 0.25, 0.5):
        ranked = lab.rank(pairs, np.random.default_rng(1), noise=noise)
        gap = np.abs(np.diff(lab.score(pairs), axis=1)[:, 0])
        agrees = (1 - noise) / (1 + np.exp(-gap)) + noise / (1 + np.exp(gap))
        won = np.diff(lab.score(ranked), axis=1)[:, 0] < 0
        assert won.mean() == pytest.approx(agrees.mean(), abs=0.015)


def test_a_policy_learns_the_grammar_and_its_pairs_are_ranked():
    pytest.importorskip("transformers")
    lab = GoldRewardLab(seed=0, symbols=8, length=6, successors=3)
    size = {"width": 32, "layers": 1, "heads": 2}
    start, policy = lab.untrained_policy(**size), lab.policy(steps=150, **size)
    before, after = lab.measure(start, start, seed=1), lab.measure(policy, start, proxy=lab.gold, seed=1)
    assert before["kl"] == pytest.approx(0.0, abs=1e-6)
    assert after["kl"] > 1.0
    assert before["illegal_rate"] > 0.5 > 0.1 > after["illegal_rate"]
    assert after["proxy"] == after["gold"]
    pairs = lab.pairs(policy, 300, seed=2)
    assert np.mean([pair.scores[0] > pair.scores[1] for pair in pairs]) > 0.6
    for pair in pairs[:20]:
        assert pair.scores[0] == pytest.approx(lab.score(np.array(pair.prompt + pair.chosen)))
    assert pairs == lab.pairs(policy, 300, seed=2)


def test_the_grammar_has_six_successors_and_punishes_the_others():
    lab = GoldRewardLab(seed=3)
    assert (lab.legal.sum(1) == 6).all()
    np.testing.assert_allclose(lab.transition.sum(1), 1.0)
    assert (lab.transition[~lab.legal] == 0).all()
    assert (lab.gold[~lab.legal] == -3).all()


def test_nonsense_is_refused():
    for options in ({"symbols": 1}, {"length": 1}, {"successors": 40}, {"leak": 0.0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            GoldRewardLab(**options)
    lab = GoldRewardLab(**SMALL)
    with pytest.raises(ValueError, match="beta"):
        lab.optimal_policy(lab.gold, 0.0)
    with pytest.raises(ValueError, match="shape"):
        lab.optimal_policy(np.zeros((2, 2)), 1.0)
    with pytest.raises(ValueError, match="finite"):
        lab.optimal_policy(np.full((3, 3), np.nan), 1.0)
    with pytest.raises(ValueError, match="noise"):
        lab.ranked_texts(3, seed=0, noise=0.7)
