"""The paper-scale claim on SmolLM2 runs, once, at the smallest size; runs of the bandit are what their names say."""

import pytest

from workingpapers.claims.alignment import onpolicy_preference as claims
from workingpapers.claims.alignment.onpolicy_preference.common import LOSSES, TABLE_RATES
from workingpapers.claims.alignment.onpolicy_preference.network import NETWORK_RATES
from workingpapers.data import DataNotInstalled
from workingpapers.desk.claim import Cell


def test_every_loss_has_a_learning_rate_for_both_sources_and_centres():
    for rates in TABLE_RATES.values():
        assert rates.keys() == LOSSES.keys()
    assert NETWORK_RATES[70].keys() == NETWORK_RATES[20].keys()


def test_both_sources_spend_the_same_queries_and_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKINGPAPERS_CACHE", str(tmp_path))
    fresh, fixed = (
        claims.far_peak.rows(Cell({"loss": "IPO", "centre": 70, "seed": 0, "method": method}))[0]
        for method in ("fresh", "fixed")
    )
    for budget in ("reward_queries", "gradient_steps", "generated_tokens"):
        assert fresh[budget] == fixed[budget]


@pytest.mark.slow
def test_smollm2_trains_at_the_smallest_size():
    pytest.importorskip("peft")
    cell = Cell({"loss": "best of n", "queries": 4, "held_out": 1, "seed": 0, "method": "fresh"})
    try:
        before, *_, after = claims.smollm2_short_answers.rows(cell)
    except DataNotInstalled as missing:
        pytest.skip(str(missing))
    assert before["kl"] == 0.0
    assert (after["reward_queries"], after["gradient_steps"]) == (4, 2)
