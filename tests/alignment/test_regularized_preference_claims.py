"""The paper-scale claim runs, once, at the smallest size; its testbeds are what they say."""

import pytest

from workingpapers.claims.alignment import regularized_preference as claims
from workingpapers.claims.alignment.testbeds import checkable_reward
from workingpapers.data import DataNotInstalled
from workingpapers.desk.claim import Cell


def test_the_reward_of_a_sentence_can_be_checked_by_hand():
    assert checkable_reward("Owls hunt at night.", "owls", finished=True) == 2.0
    assert checkable_reward("Night falls", "owls", finished=False) == 0.0
    assert checkable_reward("Owls owls owls owls", "owls", finished=False) == 1.0 - 2 * 0.75
    assert checkable_reward("", "owls", finished=True) == -1.0


@pytest.mark.slow
def test_smollm2_trains_at_the_smallest_size():
    pytest.importorskip("peft")
    cell = Cell({"pairs": 1, "steps": 1, "held_out": 1, "seed": 0, "method": "RPO mean 0.2"})
    try:
        before, after = claims.smollm2_short_sentences.rows(cell)
    except DataNotInstalled as missing:
        pytest.skip(str(missing))
    assert before["chosen_change"] == 0.0
    assert after["chosen_change"] > after["rejected_change"]
