"""Every measurement of the claims runs, once, at a toy size; their users are what they say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from workingpapers.claims.alignment import fewshot_preference as claims
from workingpapers.claims.alignment.fewshot_preference import arms, users
from workingpapers.desk.claim import Cell


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKINGPAPERS_CACHE", str(tmp_path))
    monkeypatch.setattr(arms, "CONTEXTS", 3)
    monkeypatch.setattr(arms, "QUERIES", 2)
    monkeypatch.setattr(arms, "REFERENCE_STEPS", 1)


def test_users_of_a_draw_prefer_what_they_are_said_to_prefer():
    rng = np.random.default_rng(0)
    everybody = users.weights(4, "few", "all", 0)
    assert len(users.weights(4, "few", "trained", 0)) == 12
    trained, unseen = (set(map(tuple, users.weights(4, "few", part, 0))) for part in ("trained", "unseen"))
    assert len(unseen) == 4
    assert not trained & unseen
    found = users.draw(everybody, 200, 8, 2, rng, true_labels=True)
    gaps = np.einsum("ck,cspk->csp", found.users, users.LEVELS[found.queries])
    assert (gaps[..., 0] > gaps[..., 1]).all()
    noisy = np.einsum("ck,cspk->csp", found.users, users.LEVELS[found.shots])
    assert 0.7 < (noisy[..., 0] > noisy[..., 1]).mean() < 0.95


def test_the_ceiling_is_one_when_users_are_known_and_chance_without_shots():
    rng = np.random.default_rng(1)
    everybody = users.weights(2, "few", "all", 0)
    found = users.draw(everybody[:1], 50, 0, 4, rng, true_labels=True)
    assert users.bayes_accuracy(found, everybody[:1]) == 1.0
    assert users.bayes_accuracy(found, everybody) == 0.5


@pytest.mark.parametrize("method", arms.ARMS)
def test_every_arm_runs(method):
    cell = Cell({"attributes": 2, "crowd": "many", "shots": 2, "width": 8, "steps": 1, "seed": 0, "method": method})
    rows = claims.many_users.rows(cell)
    assert [row["users"] for row in rows] == arms.POPULATIONS
    assert all(0.0 <= row[name] <= 1.0 for row in rows for name in ("accuracy", "win_rate", "legal", "ceiling"))


class Favouring(torch.nn.Module):
    """Writes every token with the same probability but for those of the highest levels, if it favours them."""

    def __init__(self, attributes, favours):
        super().__init__()
        self.logits = torch.zeros(10 * attributes + 1)
        if favours:
            self.logits[3 : 4 * attributes : 4] = 50.0

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_what_is_written_is_drawn_among_responses_and_judged_by_the_users_reward():
    likes_all = np.ones((200, 2))
    found = users.draw(likes_all, 200, 1, 1, np.random.default_rng(0), true_labels=True)
    template = users.AttributeTemplate(2)
    for favours, win_rate, legal in ((False, 0.5, (4 / 21) ** 2), (True, 1.0 - 1 / 32, (1 / 2) ** 2)):
        rates = arms.written(Favouring(2, favours), template, found.episodes(), found.users, 0)
        # the best response beats all of the 16 others but itself; half of the mass is on the other attribute's best
        assert rates["win_rate"] == pytest.approx(win_rate, abs=0.02)
        assert rates["legal"] == pytest.approx(legal, rel=1e-4)


def test_the_other_measurements_run(monkeypatch):
    common = {"attributes": 2, "steps": 1, "seed": 0}
    methods = [row["method"] for row in claims.four_shots.rows(Cell(common | {"shots": 2}))]
    assert methods == ["Bayes", "FSPO", "labels flipped", "labels at random", "no context"]
    for crowd in ("few", "many"):
        rows = claims.more_shots.rows(Cell(common | {"crowd": crowd, "width": 8, "method": "2 shots"}))
        assert [row["users"] for row in rows] == ["trained", "unseen"]


@pytest.mark.parametrize("method", ["diverse, refined", "diverse, open", "alike, refined"])
def test_synthetic_data_runs(method):
    (row,) = claims.synthetic_data.rows(Cell({"steps": 1, "seed": 0, "method": method}))
    assert 0.0 <= row["accuracy"] <= 1.0
    assert (row["label_entropy"] > 0.1) == (method == "diverse, open")
