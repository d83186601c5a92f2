"""Tests of the mathematics: each fails when the idea it names is removed."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from workingpapers.alignment import (
    EnsembleReward,
    RewardEnsemble,
    RewardModel,
    aggregate,
    member_variance,
    pairwise_accuracy,
)

# ------------------------------------------------------------------------------------------------------- aggregation


@pytest.fixture
def scores():
    return np.random.default_rng(0).standard_normal((5, 4, 7))


def test_the_three_aggregations_are_their_formulas(scores):
    np.testing.assert_allclose(aggregate(scores, "mean"), np.mean(scores, axis=0), atol=1e-15)
    np.testing.assert_array_equal(aggregate(scores, "wco"), np.min(scores, axis=0))
    for ddof in (0, 1):
        expected = np.mean(scores, axis=0) - 0.7 * np.var(scores, axis=0, ddof=ddof)
        np.testing.assert_allclose(aggregate(scores, "uwo", lam=0.7, ddof=ddof), expected, atol=1e-15)


@pytest.mark.parametrize("method", ["mean", "wco", "uwo"])
def test_tensors_give_what_arrays_give_along_any_axis(scores, method):
    expected = aggregate(scores, method)
    found = aggregate(torch.from_numpy(scores).movedim(0, -1), method, axis=-1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-15)
    np.testing.assert_allclose(aggregate(np.moveaxis(scores, 0, 1), method, axis=1), expected, atol=1e-15)


def test_lambda_zero_is_the_mean(scores):
    np.testing.assert_array_equal(aggregate(scores, "uwo", lam=0.0), aggregate(scores, "mean"))


@pytest.mark.parametrize("method", ["mean", "wco", "uwo"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_a_single_member_is_itself(scores, method, ddof):
    np.testing.assert_array_equal(aggregate(scores[:1], method, ddof=ddof), scores[0])
    assert not member_variance(torch.from_numpy(scores[:1]), ddof).any()


def test_equal_members_agree_whatever_the_method(scores):
    same = np.repeat(scores[:1], 4, axis=0)
    for method in ("mean", "wco", "uwo"):
        np.testing.assert_allclose(aggregate(same, method), scores[0], atol=1e-15)


def test_a_higher_price_and_more_members_are_more_conservative(scores):
    assert (aggregate(scores, "uwo", lam=2.0) < aggregate(scores, "uwo", lam=1.0)).all()
    assert (aggregate(scores, "wco") <= aggregate(scores[:3], "wco")).all()


def test_gradients_flow_to_the_members():
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    for method in ("mean", "wco", "uwo"):
        assert torch.autograd.gradcheck(lambda s, method=method: aggregate(s, method), (values,))


def test_half_precision_is_computed_in_single():
    half = torch.tensor([[100.0], [100.5]], dtype=torch.float16)
    found = aggregate(half, "uwo", lam=1.0)
    assert found.dtype == torch.float32
    assert found.item() == 100.25 - 0.0625
    assert aggregate(np.array([[1], [2]]), "mean").tolist() == [1.5]


def test_shifted_members_are_reported_only_where_it_matters(scores):
    wide = np.random.default_rng(0).standard_normal((2, 100))
    shifted = wide + np.array([[0.0], [3.0]])
    with pytest.warns(UserWarning, match="the members' mean scores differ by"):
        aggregate(shifted, "wco")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aggregate(shifted, "mean")
        aggregate(wide, "wco")
        aggregate(shifted[:, :5], "wco")  # too few to tell


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": np.array([[1.0], [np.nan]])}, ValueError, "scores must be finite"),
        ({"scores": torch.tensor([[1.0], [torch.inf]])}, ValueError, "scores must be finite"),
        ({"scores": np.zeros((0, 3))}, ValueError, "at least one member along axis 0"),
        ({"scores": np.array(1.0)}, ValueError, "axis of members"),
        ({"method": "max"}, ValueError, "method must be one of 'mean', 'wco', 'uwo', got 'max'"),
        ({"lam": -0.1}, ValueError, "lam must be at least 0, got -0.1"),
        ({"ddof": 2}, ValueError, "ddof must be at least 0 and at most 1, got 2"),
        ({"axis": 2}, ValueError, "axis must be at least -2 and at most 1, got 2"),
    ],
)
def test_bad_arguments_of_aggregate_are_named(change, error, message):
    with pytest.raises(error, match=message):
        aggregate(**({"scores": np.ones((2, 3))} | change))


def test_pairwise_accuracy_counts_a_tie_half():
    assert pairwise_accuracy(np.array([1.0, 0.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 2.0, 2.0])) == 0.625
    np.testing.assert_array_equal(pairwise_accuracy(np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]])), [1.0, 0.0])
    with pytest.raises(ValueError, match="one shape"):
        pairwise_accuracy(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="at least one pair"):
        pairwise_accuracy(np.ones(0), np.ones(0))


# ----------------------------------------------------------------------------------------------------------- wrapper


def linear(*weights):
    module = nn.Linear(len(weights), 1, bias=False).double()
    module.weight.data[:] = torch.tensor(weights)
    return module


def test_modules_functions_and_lists_are_members_alike():
    answers = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    members = [linear(1.0, 0.0), lambda x: x[:, 1], lambda x: (x.sum(1) / 2).tolist()]
    reward = EnsembleReward(members, method="uwo", lam=0.5)
    stacked = torch.stack([answers[:, 0], answers[:, 1], answers.mean(1)])
    torch.testing.assert_close(reward(answers), stacked.mean(0) - 0.5 * stacked.var(0, correction=0))
    torch.testing.assert_close(reward.last_variance, stacked.var(0, correction=0))
    assert not reward.last_variance.requires_grad


def test_gradients_reach_the_answers_and_modules_keep_their_mode():
    member = nn.Sequential(nn.Dropout(0.5), linear(1.0, -2.0)).train()
    answers = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    reward = EnsembleReward([member], method="mean")(answers)
    reward.sum().backward()
    torch.testing.assert_close(answers.grad, torch.tensor([[1.0, -2.0]] * 4, dtype=torch.float64))
    assert member.training
    with torch.no_grad():
        assert not EnsembleReward([member])(answers).requires_grad


def test_batches_change_nothing_and_cut_only_what_is_per_answer():
    seen = []

    def member(texts, *, length, word):
        seen.append((len(texts), len(length), word))
        return [text.count(word) + size for text, size in zip(texts, length, strict=True)]

    texts, length = ["a", "b", "ab", "aa", "ba"], np.arange(5)
    whole = EnsembleReward([member])(texts, length=length, word="a")
    parts = EnsembleReward([member], batch_size=2)(texts, length=length, word="a")
    np.testing.assert_array_equal(whole, parts)
    assert seen == [(5, 5, "a"), (2, 2, "a"), (2, 2, "a"), (1, 1, "a")]


def test_calibration_takes_shift_and_scale_out():
    base = np.random.default_rng(0).standard_normal(200)
    members = [lambda x: x, lambda x: 10.0 + 3.0 * x]
    reference = EnsembleReward(members).member_scores(base)
    reward = EnsembleReward(members, method="uwo", lam=1.0, calibration=reference)
    np.testing.assert_allclose(reward(base), (base - base.mean()) / base.std(), atol=1e-12)
    assert reward.last_variance.max() < 1e-20
    torch.testing.assert_close(reward(torch.from_numpy(base)), torch.from_numpy(reward(base)))


def test_transformers_classifiers_are_members():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, num_labels=1, pad_token_id=0
    )
    model = transformers.GPT2ForSequenceClassification(config).eval()
    ids = torch.randint(1, 11, (3, 5))
    reward = EnsembleReward([model, RewardModel(model)], method="wco", batch_size=2)
    expected = model(input_ids=ids).logits[:, 0]
    torch.testing.assert_close(reward(input_ids=ids, attention_mask=torch.ones_like(ids)), expected)


def test_it_can_stand_among_the_reward_functions_of_trl():
    reward = EnsembleReward([lambda prompts, completions, **_: [float(len(c)) for c in completions]], method="wco")
    assert reward.__name__ == "wco_of_1_rewards"
    found = reward(prompts=["a", "b"], completions=["xy", "z"], completion_ids=[[1], [2]], trainer_state=None)
    assert list(found) == [2.0, 1.0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"members": []}, ValueError, "at least one reward model"),
        ({"members": [1]}, TypeError, "member 0 is a int"),
        ({"method": "max"}, ValueError, "method must be one of"),
        ({"lam": -1}, ValueError, "lam must be at least 0"),
        ({"ddof": 3}, ValueError, "ddof must be"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"calibration": np.ones((2, 3))}, ValueError, r"with 1 members, got \(2, 3\)"),
        ({"calibration": np.ones((1, 3))}, ValueError, "calibration must vary, member 0"),
        ({"calibration": np.array([[np.nan, 1.0]])}, ValueError, "calibration must be finite"),
    ],
)
def test_bad_arguments_of_the_wrapper_are_named(change, error, message):
    with pytest.raises(error, match=message):
        EnsembleReward(**({"members": [sum]} | change))


def test_members_that_do_not_score_every_answer_once_are_refused():
    with pytest.raises(ValueError, match=r"same answers, got \[3, 2\]"):
        EnsembleReward([lambda x: x, lambda x: x[:2]])(np.ones(3))
    with pytest.raises(ValueError, match=r"member 0 must return one score per answer, got shape \(3, 2\)"):
        EnsembleReward([lambda x: np.ones((3, 2))])(np.ones(3))


# --------------------------------------------------------------------------------------------------------- estimator


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    answers = rng.standard_normal((2, 150, 4))
    better = (answers[0] @ [1.0, -1.0, 0.5, 0.0] > answers[1] @ [1.0, -1.0, 0.5, 0.0])[:, None]
    return np.where(better, answers[0], answers[1]), np.where(better, answers[1], answers[0])


SMALL = {"hidden": (8,), "epochs": 6, "batch_size": 32, "lr": 0.01, "random_state": 3}


def test_one_pass_over_members_is_training_them_one_by_one(pairs):
    made = []

    def factory():
        made.append(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
        return made[-1]

    score_l2 = 0.01
    fitted = RewardEnsemble(factory, n_members=3, score_l2=score_l2, **SMALL).fit(*pairs)
    chosen, rejected = map(torch.from_numpy, pairs)
    children = np.random.SeedSequence(SMALL["random_state"]).spawn(3)
    for place, child in enumerate(children):
        seed = int(child.generate_state(1)[0])
        torch.manual_seed(seed)
        member = factory().double()
        optimizer = torch.optim.Adam(member.parameters(), lr=SMALL["lr"])
        order = torch.Generator().manual_seed(seed)
        for _ in range(SMALL["epochs"]):
            for rows in torch.randperm(150, generator=order).split(SMALL["batch_size"]):
                won, lost = member(chosen[rows])[:, 0], member(rejected[rows])[:, 0]
                loss = torch.nn.functional.softplus(lost - won) + 0.5 * score_l2 * (won**2 + lost**2)
                optimizer.zero_grad()
                loss.mean().backward()
                optimizer.step()
        np.testing.assert_allclose(
            fitted.score_samples(pairs[0])[place], member(chosen)[:, 0].detach().numpy(), atol=1e-10
        )


def test_it_learns_and_its_members_differ(pairs):
    fitted = RewardEnsemble(**SMALL | {"epochs": 30}).fit(*pairs)
    assert fitted.score(*pairs) > 0.95
    assert fitted.losses_.shape == (30, 5)
    assert (fitted.losses_[-1] < 0.5 * fitted.losses_[0]).all()
    scores = fitted.score_samples(pairs[0])
    assert scores.shape == (5, 150)
    assert member_variance(scores).min() > 0
    np.testing.assert_array_equal(fitted.predict(pairs[0]), aggregate(scores, "uwo", lam=0.5))


def test_a_smaller_ensemble_is_the_beginning_of_a_larger_one(pairs):
    two, four = (RewardEnsemble(n_members=k, **SMALL).fit(*pairs).score_samples(pairs[0]) for k in (2, 4))
    np.testing.assert_allclose(two, four[:2], atol=1e-12)


def test_the_same_seed_gives_the_same_members_and_leaves_the_global_generator_alone(pairs):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = RewardEnsemble(**SMALL).fit(*pairs).predict(pairs[0])
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(first, RewardEnsemble(**SMALL).fit(*pairs).predict(pairs[0]))
    other = RewardEnsemble(**SMALL | {"random_state": 4}).fit(*pairs).predict(pairs[0])
    assert np.abs(first - other).max() > 1e-3


def test_tensors_are_scored_with_gradients_and_in_their_precision(pairs):
    chosen, rejected = (torch.from_numpy(part).float() for part in pairs)
    fitted = RewardEnsemble(**SMALL).fit(chosen, rejected)
    point = chosen[:3].clone().requires_grad_()
    fitted.predict(point).sum().backward()
    assert point.grad.abs().sum() > 0
    assert fitted.score_samples(chosen).dtype == torch.float32
    together = EnsembleReward(fitted.members_, method="uwo", lam=0.5)
    torch.testing.assert_close(together(chosen), fitted.predict(chosen))
    assert all(parameter.grad is None for member in fitted.members_ for parameter in member.parameters())


def test_members_may_read_token_ids():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Embedding(9, 1)

        def forward(self, ids):
            return self.score(ids).sum((1, 2))

    rng = np.random.default_rng(0)
    ids = rng.integers(9, size=(2, 200, 6))
    counts = (ids == 4).sum(-1)
    better = (counts[0] > counts[1])[:, None]
    chosen, rejected = np.where(better, ids[0], ids[1]), np.where(better, ids[1], ids[0])
    fitted = RewardEnsemble(Bag, n_members=2, epochs=30, lr=0.05, random_state=0).fit(chosen, rejected)
    best = [int(member.score.weight.argmax()) for member in fitted.members_]
    assert best == [4, 4]


def test_it_is_a_scikit_learn_estimator(pairs):
    ensemble = RewardEnsemble(n_members=2, method="wco")
    assert clone(ensemble).get_params() == ensemble.get_params()
    with pytest.raises(Exception, match="not fitted"):
        ensemble.predict(pairs[0])


def test_answers_are_not_modified(pairs):
    before = pairs[0].copy(), pairs[1].copy()
    RewardEnsemble(**SMALL | {"epochs": 1}).fit(*pairs)
    np.testing.assert_array_equal(pairs, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_members": 0}, "n_members must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"hidden": (8, 0)}, "hidden must be at least 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lam": -1.0}, "lam must be at least 0"),
        ({"score_l2": -1.0}, "score_l2 must be at least 0"),
        ({"method": "median"}, "method must be one of"),
        ({"random_state": -1}, "random_state must be at least 0"),
        ({"base_factory": lambda: nn.Linear(4, 2)}, r"one score per answer, got shape \(64, 2\) for 64 answers"),
    ],
)
def test_bad_parameters_of_the_estimator_are_named(pairs, change, message):
    with pytest.raises(ValueError, match=message):
        RewardEnsemble(**SMALL | change).fit(*pairs)


def test_bad_answers_are_named(pairs):
    chosen, rejected = pairs
    with pytest.raises(ValueError, match="one shape"):
        RewardEnsemble().fit(chosen, rejected[:-1])
    with pytest.raises(ValueError, match="X_rejected must be finite"):
        RewardEnsemble().fit(chosen, np.where(rejected == rejected[0, 0], np.nan, rejected))
    with pytest.raises(ValueError, match="nothing empty"):
        RewardEnsemble().fit(chosen[:0], rejected[:0])
    with pytest.raises(ValueError, match="one dtype and device"):
        RewardEnsemble().fit(chosen, rejected.astype(np.float32))
    fitted = RewardEnsemble(**SMALL | {"epochs": 1}).fit(*pairs)
    with pytest.raises(ValueError, match=r"rows of shape \(4,\), got \(3,\)"):
        fitted.predict(chosen[:, :3])


def test_divergence_is_an_error_not_a_nan(pairs):
    with pytest.raises(FloatingPointError, match=r"is lr=1e\+308 too large"):
        RewardEnsemble(lambda: nn.Linear(4, 1), **SMALL | {"lr": 1e308}).fit(*pairs)
