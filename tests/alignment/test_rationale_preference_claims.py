"""The testbeds of the claims are what they say; the paper-scale claim runs, once, at the smallest size."""

import numpy as np
import pytest

from workingpapers.claims.alignment import rationale_preference as claims
from workingpapers.claims.alignment.rationale_preference import log_linear, transformer
from workingpapers.claims.alignment.rationale_preference.language import reasons
from workingpapers.data import DataNotInstalled
from workingpapers.desk.claim import Cell


def test_the_shortcut_holds_in_training_and_is_reversed_at_test():
    rng = np.random.default_rng(0)
    train, test = (log_linear._differences(rng, 20_000, sign * 0.9) for sign in (1, -1))
    columns = [log_linear.DECIDING, log_linear.SHORTCUT]
    assert np.corrcoef(train[:, columns].T)[0, 1] > 0.8
    assert np.corrcoef(test[:, columns].T)[0, 1] < -0.8
    best = (test[:, log_linear.DECIDING] > 0).mean()  # of the true reward, less than 1: labels are noisy
    assert 0.81 < best < 0.85
    assert (test[:, log_linear.SHORTCUT] > 0).mean() < 0.3
    # the deciding attribute is named more often the more it speaks for the winner
    named = log_linear._named_attribute(rng, train, log_linear.DECIDING) == log_linear.DECIDING
    assert named[train[:, log_linear.DECIDING] > 1].mean() > 0.7 > 0.1 > named[train[:, log_linear.DECIDING] < 0].mean()


def test_the_fitted_weights_are_a_stationary_point_of_penalised_logistic_regression():
    rng = np.random.default_rng(1)
    data = log_linear._differences(rng, 50, 0.9)
    named = log_linear._named_attribute(rng, data, log_linear.DECIDING)
    weights = log_linear._fit(data, named, gamma=0.0, **log_linear.BASES["DPO"])
    slope = -(data / (1 + np.exp(data @ weights))[:, None]).mean(0) + 2 * log_linear.RIDGE * weights
    np.testing.assert_allclose(slope, 0.0, atol=1e-5)


def test_answers_of_the_transformer_follow_their_rules():
    rng = np.random.default_rng(2)
    pairs = transformer._fact_pairs(rng, 400, 0.95, "facts")
    longer = np.mean([len(pair.chosen) > len(pair.rejected) for pair in pairs])
    assert 0.85 < longer < 0.99  # a politeness token may blur it
    for pair in pairs:
        facts = [[word for word in side if word >= transformer.CORRECT] for side in (pair.chosen, pair.rejected)]
        assert facts[0][0] < transformer.WRONG <= facts[1][0]
        assert [len(found) for found in facts] == [1, 1]
        assert pair.rationale.response == [transformer.BECAUSE, facts[0][0], facts[1][0], transformer.EOS]
        assert pair.rationale.prompt == [
            transformer.ASK,
            *pair.chosen[:-1],
            transformer.OTHER,
            *pair.rejected[:-1],
            transformer.WHY,
        ]
        same = transformer._same_but_for_the_fact(rng, pair)
        different = [one != other for one, other in zip(same.chosen, same.rejected, strict=True)]
        assert sum(different) == 1
    others = transformer.with_rationales_of_others(rng, pairs)
    assert [pair.rationale.prompt for pair in others] == [pair.rationale.prompt for pair in pairs]
    assert sorted(pair.rationale.response for pair in others) == sorted(pair.rationale.response for pair in pairs)
    assert np.mean([one.rationale == other.rationale for one, other in zip(others, pairs, strict=True)]) < 0.05


def test_reasons_say_what_the_reward_counts():
    topic = "owls"
    assert reasons(("Owls hunt.", "Night falls."), (True, True), topic) == "The better response names owls."
    both = reasons(("Owls hunt.", "owls owls"), (True, False), topic)
    assert both == "The better response comes to an end in time. The better response repeats fewer words."
    assert reasons(("", ""), (False, False), topic) == "The two responses are equally good."


@pytest.mark.slow
def test_smollm2_trains_at_the_smallest_size():
    pytest.importorskip("peft")
    cell = Cell({"pairs": 2, "steps": 1, "held_out": 1, "seed": 0, "method": log_linear.SHUFFLED})
    try:
        (row,) = claims.smollm2_short_sentences.rows(cell)
    except DataNotInstalled as missing:
        pytest.skip(str(missing))
    assert np.isfinite(row["gold"])
    assert row["tokens"] >= 1
