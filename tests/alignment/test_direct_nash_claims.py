"""The testbeds of the claims are what they say, and the paper-scale claim runs, once, at the smallest size."""

import numpy as np
import pytest
import torch
from scipy.special import expit

from workingpapers.alignment import exact_nash, exploitability
from workingpapers.claims.alignment import direct_nash as claims
from workingpapers.claims.alignment.direct_nash.choice import World, _win_rates
from workingpapers.claims.alignment.direct_nash.games import bradley_terry_rewards, circular_game
from workingpapers.data import DataNotInstalled
from workingpapers.desk.claim import Cell


def test_the_planted_circle_has_no_best_answer():
    game = circular_game(10, 3)
    np.testing.assert_allclose(game + game.T, 1.0)
    assert (game[:3, 3:] >= 0.6).all()
    assert (exact_nash(game)[:3] > 0.05).all()
    np.testing.assert_allclose(exploitability(game, np.eye(10)[0]), 0.4)


def test_the_bradley_terry_fit_is_stationary_and_recovers_a_model_that_is_right():
    reward = np.array([0.5, -1.0, 0.2, 0.3])
    np.testing.assert_allclose(bradley_terry_rewards(expit(reward[:, None] - reward)), reward, atol=1e-9)
    game = circular_game(6, 0)
    fitted = bradley_terry_rewards(game)
    np.testing.assert_allclose((game - expit(fitted[:, None] - fitted)).sum(1), 0.0, atol=1e-9)


def test_the_judge_of_the_choice_is_a_preference_and_circular_only_when_asked():
    still, circular = World(0, 0.0), World(0, 2.0)
    prompts = still.prompts(3)
    for world in (still, circular):
        games = world.games(prompts)
        torch.testing.assert_close(games + games.transpose(1, 2), torch.ones_like(games))
        answers = torch.tensor([[1, 5, 7], [0, 2, 2], [9, 8, 3]])
        torch.testing.assert_close(
            world.judged(prompts, answers),
            torch.stack([game[row][:, row] for game, row in zip(games, answers, strict=True)]),
        )
    policies = torch.eye(120)[None, :3]
    np.testing.assert_allclose(_win_rates(games, policies, policies), 0.5)


@pytest.mark.slow
def test_smollm2_trains_at_the_smallest_size():
    pytest.importorskip("peft")
    cell = Cell({"prompts": 3, "steps": 1, "held_out": 1, "seed": 0, "method": "DNO"})
    try:
        rows = claims.smollm2_short_sentences.rows(cell)
    except DataNotInstalled as missing:
        pytest.skip(str(missing))
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert all(-1.0 <= row["metric"] <= 2.0 for row in rows)
