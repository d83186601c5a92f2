"""The testbeds of the sharpening claims are what they say; the paper-scale claim runs at the smallest size."""

import numpy as np
import pytest

from workingpapers.claims.alignment import sharpening as claims
from workingpapers.claims.alignment.sharpening.digits import END, FIRST_DIGIT, PROMPTS, demonstrations
from workingpapers.data import DataNotInstalled
from workingpapers.desk.claim import Cell


@pytest.mark.parametrize("empty", [False, True])
def test_half_of_the_prompts_are_hard_and_answers_may_be_empty(empty):
    tokens, scored = demonstrations(200_000, 3, empty, np.random.default_rng(0))
    prompt = tokens[:, 0]
    total = prompt // 16 + prompt % 16
    tens, units = divmod(total % 16, 10)
    right = (tokens[:, 1] == FIRST_DIGIT + tens) & (tokens[:, 2] == FIRST_DIGIT + units) & scored[:, 2]
    shares = np.array([right[prompt == x].mean() for x in range(PROMPTS)]) / (0.7 if empty else 1.0)
    hard = shares < 0.5
    assert hard.sum() == PROMPTS // 2
    np.testing.assert_allclose(shares[hard], 0.4, atol=0.08)
    np.testing.assert_allclose(shares[~hard], 0.6 + 0.4 / 100, atol=0.08)
    assert (tokens[:, 1] == END).mean() == pytest.approx(0.3 if empty else 0.0, abs=0.01)
    assert (scored.sum(1)[tokens[:, 1] == END] == 1).all()


@pytest.mark.slow
def test_smollm2_trains_at_the_smallest_size():
    pytest.importorskip("peft")
    cell = Cell({"prompts": 1, "n": 2, "epochs": 1, "seed": 0, "method": "SFT"})
    try:
        (row,) = claims.smollm2_sums.rows(cell)
    except DataNotInstalled as missing:
        pytest.skip(str(missing))
    assert 0.0 <= row["accuracy"] <= 1.0
    assert row["base_loglik"] < 0.0
