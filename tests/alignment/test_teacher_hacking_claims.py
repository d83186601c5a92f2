"""The testbed of the claims is what it says, and the paper-scale claim runs, once, at the smallest size."""

import pytest
import torch

from workingpapers.claims.alignment import teacher_hacking as claims
from workingpapers.claims.alignment.teacher_hacking.recurrent import different_prompts, recurrent_lm
from workingpapers.data import DataNotInstalled
from workingpapers.desk.claim import Cell


def test_no_prompt_comes_twice():
    sets = different_prompts([50, 20, 30], seed=1)
    assert [len(prompts) for prompts in sets] == [50, 20, 30]
    assert len({tuple(prompt) for prompts in sets for prompt in prompts}) == 100
    assert different_prompts([50], seed=1)[0] == sets[0]


def test_recurrent_models_draw_from_their_logits():
    model, count = recurrent_lm(8, 0, oracle=True), 5_000
    with torch.no_grad():
        batch = model.sample(
            [[1, 2, 3, 4]] * count, max_new_tokens=8, temperature=1.0, generator=torch.Generator().manual_seed(0)
        )
        shares = model.logits(batch).softmax(-1).reshape(count, 8, -1)
    drawn = torch.nn.functional.one_hot(batch.input_ids[:, 4:], 16).float()
    error = (shares * (1 - shares)).sum(0).sqrt() / count
    assert (((drawn - shares).mean(0)).abs() <= 5 * error + 1e-6).all()


@pytest.mark.slow
def test_smollm2_is_distilled_at_the_smallest_size():
    cell = Cell({"sft": 1, "prompts": 1, "held_out": 2, "epochs": 1, "seed": 0})
    try:
        rows = claims.smollm2_is_the_oracle.rows(cell)
    except DataNotInstalled as missing:
        pytest.skip(str(missing))
    assert [(row["method"], row["epoch"]) for row in rows] == [
        (method, epoch) for method in ("offline", "online teacher") for epoch in (0, 1)
    ]
    assert all(row["proxy"] > 0 and row["golden"] > 0 for row in rows)
