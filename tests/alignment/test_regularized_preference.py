"""Tests of the mathematics: each fails when the idea it names is removed."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn.functional import logsigmoid

from workingpapers.alignment import (
    RPOConfig,
    RPOLoss,
    RPOTrainer,
    TokenPair,
    collate_preferences,
    dpo_losses,
    overoptimization_report,
    pair_logprobs,
    policy_probs,
    rpo_minimax,
)

# ---------------------------------------------------------------------------------------------------------- the loss


@pytest.fixture
def logps():
    generator = torch.Generator().manual_seed(0)
    values = -20 * torch.rand(4, 6, generator=generator, dtype=torch.float64)
    return [row.clone().requires_grad_(place < 2) for place, row in enumerate(values)]


def test_gradient_is_the_formula_of_the_paper(logps):
    beta, eta = 0.3, 0.7
    chosen, rejected, ref_chosen, ref_rejected = logps
    RPOLoss(beta, eta, reduction="sum")(*logps).loss.backward()
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    pull = beta * torch.sigmoid(-beta * margin)
    torch.testing.assert_close(chosen.grad, -eta * beta - pull)
    torch.testing.assert_close(rejected.grad, pull)


def test_eta_zero_is_dpo_bit_for_bit(logps):
    chosen, rejected, ref_chosen, ref_rejected = logps
    dpo = -logsigmoid(0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected)))
    out = RPOLoss(0.1, 0.0, reduction="none")(*logps)
    assert torch.equal(out.loss, dpo)
    assert torch.equal(out.dpo_loss, dpo)


def test_large_eta_is_supervised_fine_tuning(logps):
    chosen, rejected, *_ = logps
    RPOLoss(0.1, 1e8)(*logps).loss.backward()
    assert rejected.grad.abs().max() / chosen.grad.abs().max() < 1e-6
    torch.testing.assert_close(chosen.grad / chosen.grad.mean(), torch.ones_like(chosen))


def test_the_sum_is_scaled_by_beta_and_the_mean_by_lengths_alone(logps):
    chosen = logps[0]
    lengths = torch.tensor([1, 2, 3, 4, 5, 6])
    for beta in (0.1, 0.5):
        total = RPOLoss(beta, 0.2)(*logps)
        torch.testing.assert_close(total.loss, total.dpo_loss.mean() - 0.2 * beta * chosen.mean())
        mean = RPOLoss(beta, 0.2, sft="mean")(*logps, chosen_lengths=lengths)
        torch.testing.assert_close(mean.loss, mean.dpo_loss.mean() - 0.2 * (chosen / lengths).mean())


def test_another_baseline_policy_replaces_the_chosen_answers_in_the_supervised_term(logps):
    base = torch.full((6,), -3.0, dtype=torch.float64, requires_grad=True)
    out = RPOLoss(0.1, 0.2, sft="mean")(*logps, base_logps=base, base_lengths=torch.full((6,), 2))
    torch.testing.assert_close(out.sft_loss, torch.full((6,), 1.5, dtype=torch.float64))
    out.loss.backward()
    torch.testing.assert_close(base.grad, torch.full((6,), -0.2 / 2 / 6, dtype=torch.float64))


def test_label_smoothing_is_the_expectation_over_flipped_labels(logps):
    chosen, rejected, ref_chosen, ref_rejected = logps
    straight = dpo_losses(chosen - ref_chosen, rejected - ref_rejected, beta=0.1)
    flipped = dpo_losses(rejected - ref_rejected, chosen - ref_chosen, beta=0.1)
    found = RPOLoss(0.1, 0.0, label_smoothing=0.2, reduction="none")(*logps).loss
    torch.testing.assert_close(found, 0.8 * straight + 0.2 * flipped)


def test_reported_quantities_are_per_example_and_detached(logps):
    chosen, _, ref_chosen, _ = logps
    out = RPOLoss(0.1, 0.2)(*logps)
    torch.testing.assert_close(out.chosen_rewards, 0.1 * (chosen - ref_chosen).detach())
    torch.testing.assert_close(out.margin, out.chosen_rewards - out.rejected_rewards)
    assert out.accuracy.tolist() == (out.margin > 0).double().tolist()
    assert not any(t.requires_grad for t in (out.chosen_rewards, out.rejected_rewards, out.accuracy, out.margin))
    assert out.dpo_loss.requires_grad
    assert out.sft_loss.requires_grad


def test_far_margins_do_not_overflow():
    far = torch.tensor([-1e4], requires_grad=True)
    out = RPOLoss(1.0, 0.0)(far, torch.zeros(1), torch.zeros(1), torch.zeros(1))
    out.loss.backward()
    assert out.loss.item() == 1e4
    assert far.grad.item() == -1.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": 0.0}, ValueError, "beta must be above 0, got 0.0"),
        ({"eta": -0.1}, ValueError, "eta must be at least 0"),
        ({"eta": float("nan")}, ValueError, "eta must be at least 0"),
        ({"label_smoothing": 0.5}, ValueError, "label_smoothing must be at least 0 and below 0.5"),
        ({"sft": "max"}, ValueError, "sft must be one of 'sum', 'mean'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"beta": "0.1"}, TypeError, "beta must be a number"),
    ],
)
def test_bad_parameters_are_named(change, error, message):
    with pytest.raises(error, match=message):
        RPOLoss(**change)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.tensor([-1.0, float("nan")]), "policy_chosen_logps must be finite log-probabilities"),
        (1, torch.tensor([-1.0, 0.5]), "policy_rejected_logps must be finite log-probabilities, at most 0"),
        (2, torch.tensor([-1.0]), r"ref_chosen_logps must have shape \(batch,\) like policy_chosen_logps \(2,\)"),
        (3, torch.tensor([[-1.0, -1.0]]), "ref_rejected_logps must have shape"),
    ],
)
def test_bad_log_probabilities_are_named(place, value, message):
    good = [torch.tensor([-1.0, -2.0]) for _ in range(4)]
    good[place] = value
    with pytest.raises(ValueError, match=message):
        RPOLoss()(*good)


def test_lengths_are_required_and_positive_for_the_mean():
    good = [torch.tensor([-1.0, -2.0]) for _ in range(4)]
    with pytest.raises(ValueError, match="chosen_lengths must be given when sft='mean'"):
        RPOLoss(sft="mean")(*good)
    with pytest.raises(ValueError, match="base_lengths must be given"):
        RPOLoss(sft="mean")(*good, chosen_lengths=torch.ones(2), base_logps=good[0])
    with pytest.raises(ValueError, match="chosen_lengths must be at least 1, got 0"):
        RPOLoss(sft="mean")(*good, chosen_lengths=torch.tensor([3, 0]))
    with pytest.raises(ValueError, match="chosen_lengths must have shape"):
        RPOLoss(sft="mean")(*good, chosen_lengths=torch.tensor([3]))


# -------------------------------------------------------------------------------------------------- the exact solution


def random_game(prompts=3, actions=6, n=60, seed=0):
    rng = np.random.default_rng(seed)
    ref = rng.dirichlet(np.ones(actions), size=prompts)
    prompt, chosen = rng.integers(prompts, size=n), rng.integers(actions, size=n)
    rejected = (chosen + rng.integers(1, actions, size=n)) % actions
    return ref, np.stack([prompt, chosen, rejected], axis=1)


def bracket(policy, reward, ref, pairs, *, beta, eta, prior, base):
    """The payoff of the game: eta E[r(x, a) - r(x, a0) - beta KL] + L_D(r), and its gradient in the reward."""
    prompt, chosen, rejected = pairs.T
    margin = reward[prompt, chosen] - reward[prompt, rejected]
    divergence = (policy * np.log(policy / ref)).sum(axis=1)
    value = eta * prior @ (((policy - base) * reward).sum(axis=1) - beta * divergence)
    gradient = eta * prior[:, None] * (policy - base)
    push = 1 / (1 + np.exp(margin)) / len(pairs)
    np.add.at(gradient, (prompt, chosen), -push)
    np.add.at(gradient, (prompt, rejected), push)
    return value + np.logaddexp(0, -margin).mean(), gradient


def worst_case(policy, start, bound, **game):
    """Minimum of the bracket over the box, by an independent solver."""

    def flat(r):
        value, gradient = bracket(policy, r.reshape(policy.shape), **game)
        return value, gradient.ravel()

    bounds = [(-bound, bound)] * policy.size
    options = {"ftol": 1e-15, "gtol": 1e-11, "maxiter": 2000}
    return minimize(flat, start.ravel(), jac=True, method="L-BFGS-B", bounds=bounds, options=options).fun


def empirical(pairs, shape):
    base = np.zeros(shape)
    np.add.at(base, (pairs[:, 0], pairs[:, 1]), 1.0)
    prior = base.sum(axis=1) / len(pairs)
    return prior, base / base.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("beta", "eta"), [(0.1, 0.2), (1.0, 1.0), (0.5, 20.0)])
def test_strong_duality_holds_and_no_perturbed_policy_is_better(beta, eta):
    ref, pairs = random_game()
    prior, base = empirical(pairs, ref.shape)
    game = {"ref": ref, "pairs": pairs, "beta": beta, "eta": eta, "prior": prior, "base": base}
    found = rpo_minimax(ref, pairs, beta=beta, eta=eta)
    assert found.converged
    assert found.duality_gap < 1e-8
    np.testing.assert_allclose(found.policy, policy_probs(ref, found.reward, beta), rtol=1e-12)
    assert found.value == pytest.approx(bracket(found.policy, found.reward, **game)[0], abs=1e-12)
    ours = worst_case(found.policy, found.reward, 10.0, **game)
    assert found.value - ours < 1e-8
    rng = np.random.default_rng(1)
    for scale in (1e-3, 1e-1, 1.0):
        for _ in range(5):
            other = found.policy * np.exp(scale * rng.standard_normal(ref.shape))
            other /= other.sum(axis=1, keepdims=True)
            assert worst_case(other, found.reward, 10.0, **game) < ours + 1e-9


def test_maximin_equals_a_brute_force_grid_over_policies():
    ref, pairs = np.array([[0.5, 0.3, 0.2]]), np.array([[0, 0, 1]] * 3 + [[0, 1, 2]] * 2 + [[0, 2, 0]])
    prior, base = empirical(pairs, ref.shape)
    game = {"ref": ref, "pairs": pairs, "beta": 0.7, "eta": 0.5, "prior": prior, "base": base}
    found = rpo_minimax(ref, pairs, beta=0.7, eta=0.5, reward_bound=2.0)
    grid = [(a, b, 1 - a - b) for a in np.arange(0.03, 1, 0.03) for b in np.arange(0.03, 1 - a, 0.03) if a + b < 0.99]
    values = [worst_case(np.array([policy]), np.zeros((1, 3)), 2.0, **game) for policy in grid]
    best = int(np.argmax(values))
    assert values[best] <= found.value + 1e-9
    assert values[best] > found.value - 2e-3
    np.testing.assert_allclose(grid[best], found.policy[0], atol=0.03)


def test_two_actions_in_closed_form():
    # With share w of the pairs won by action 0, beta = 1, k = ref0 / ref1 and y = exp(r0 - r1), stationarity is
    # eta k y / (1 + k y) + y / (1 + y) = (1 + eta) w, a quadratic in y.
    wins, eta, ref0 = np.array([0, 0, 0, 1]), 0.8, 0.6
    share, k = 0.75, ref0 / (1 - ref0)
    pairs = np.stack([np.zeros(4, int), wins, 1 - wins], axis=1)
    found = rpo_minimax(np.array([[ref0, 1 - ref0]]), pairs, beta=1.0, eta=eta, tol=1e-13)
    total = (1 + eta) * share
    quadratic = [k * (1 + eta) - total * k, eta * k + 1 - total * (1 + k), -total]
    y = max(np.roots(quadratic))
    assert found.reward[0, 0] - found.reward[0, 1] == pytest.approx(np.log(y), abs=1e-9)
    assert not found.at_bound


def test_eta_moves_from_the_bradley_terry_fit_to_the_baseline_policy():
    ref, pairs = random_game(prompts=1, actions=4, n=200)
    _, base = empirical(pairs, ref.shape)
    prompt, chosen, rejected = pairs.T
    fit = rpo_minimax(ref, pairs, beta=0.5, eta=0.0)
    residual = np.zeros(ref.shape)
    push = 1 / (1 + np.exp(fit.reward[prompt, chosen] - fit.reward[prompt, rejected]))
    np.add.at(residual, (prompt, chosen), push)
    np.add.at(residual, (prompt, rejected), -push)
    np.testing.assert_allclose(residual, 0.0, atol=1e-6)
    np.testing.assert_allclose(rpo_minimax(ref, pairs, beta=0.5, eta=1e6).policy, base, atol=1e-5)


def test_the_reward_problem_is_the_rpo_loss_up_to_its_constant():
    ref, pairs = random_game(seed=3)
    _, base = empirical(pairs, ref.shape)
    beta, eta = 0.4, 0.3
    found = rpo_minimax(ref, pairs, beta=beta, eta=eta)
    prompt, chosen, rejected = pairs.T
    logps = [torch.from_numpy(np.log(p)[prompt, a]) for p in (found.policy, ref) for a in (chosen, rejected)]
    loss = RPOLoss(beta, eta)(*logps).loss.item()
    constant = eta * beta * np.log(ref)[prompt, chosen].mean()
    assert loss + constant == pytest.approx(found.value, abs=1e-10)
    assert np.isfinite(base).all()


def test_an_action_without_support_goes_to_the_bound_and_is_said_to():
    found = rpo_minimax(np.full((1, 3), 1 / 3), np.array([[0, 0, 1], [0, 1, 0]]), beta=1.0, eta=1.0, reward_bound=2.0)
    assert found.at_bound
    assert found.reward[0, 2] == -2.0
    assert found.duality_gap < 1e-9
    # With a small beta the rest of the way to the bound changes the policy by less than rounding.
    far = rpo_minimax(np.full((1, 3), 1 / 3), np.array([[0, 0, 1], [0, 1, 0]]), beta=0.1, eta=1.0, reward_bound=10.0)
    assert far.at_bound
    assert far.reward[0, 2] == -10.0


@pytest.mark.parametrize("bound", [0.05, 10.0])
def test_linear_rewards_are_optimal_in_their_ball(bound):
    ref, pairs = random_game(prompts=4, actions=30, n=50)
    phi = np.random.default_rng(5).standard_normal((4, 30, 3))
    found = rpo_minimax(ref, pairs, beta=0.2, eta=0.3, features=phi, reward_bound=bound)
    prior, base = empirical(pairs, ref.shape)

    def objective(theta):
        reward = phi @ theta
        margin = reward[pairs[:, 0], pairs[:, 1]] - reward[pairs[:, 0], pairs[:, 2]]
        log_z = np.log((ref * np.exp(reward / 0.2)).sum(axis=1))
        return 0.3 * prior @ (0.2 * log_z - (base * reward).sum(axis=1)) + np.logaddexp(0, -margin).mean()

    ball = {"type": "ineq", "fun": lambda theta: bound**2 - theta @ theta}
    independent = minimize(objective, np.zeros(3), method="SLSQP", constraints=[ball], options={"ftol": 1e-14})
    np.testing.assert_allclose(found.reward, phi @ found.weights)
    np.testing.assert_allclose(found.weights, independent.x, atol=1e-4)
    assert found.value <= independent.fun + 1e-9
    assert found.at_bound is (bound == 0.05)
    assert np.linalg.norm(found.weights) <= bound * (1 + 1e-12)


def test_many_prompts_and_actions_converge_and_arguments_stay_as_they_were():
    ref, pairs = random_game(prompts=50, actions=100, n=3000)
    before = ref.copy(), pairs.copy()
    found = rpo_minimax(ref, pairs, beta=0.05, eta=0.05)
    assert found.converged
    assert (ref == before[0]).all()
    assert (pairs == before[1]).all()


def test_a_gap_out_of_reach_is_a_warning_and_a_field_of_the_result():
    with pytest.warns(RuntimeWarning, match="did not converge: duality gap"):
        found = rpo_minimax(*random_game(), beta=0.1, eta=0.2, tol=1e-300)
    assert not found.converged
    assert found.duality_gap < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_probs": np.array([[0.5, 0.6]])}, "ref_probs must be at least 0 and sum to 1"),
        ({"ref_probs": np.array([0.5, 0.5])}, "ref_probs must have shape"),
        ({"ref_probs": np.array([[0.5, np.nan]])}, "ref_probs must be finite"),
        ({"pairs": np.array([[0, 1]])}, r"pairs must have shape \(n, 3\)"),
        ({"pairs": np.array([[0, 1, 2]])}, "pairs must name prompts below 1 and actions below 2"),
        ({"pairs": np.array([[0, 1, 1]])}, "pairs must compare two different actions"),
        ({"pairs": np.array([[0.0, 1.0, 0.0]])}, "pairs must hold integers"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"eta": -1.0}, "eta must be at least 0"),
        ({"prior": np.array([0.5, 0.5])}, r"prior must have shape \(1,\)"),
        ({"base_probs": np.array([[0.5, 0.4]])}, "base_probs must be at least 0 and sum to 1"),
        ({"features": np.zeros((1, 3, 2))}, "features must have shape"),
        ({"reward_bound": 0.0}, "reward_bound must be above 0"),
        ({"tol": 0.0}, "tol must be above 0"),
    ],
)
def test_bad_games_are_named(change, message):
    good = {"ref_probs": np.array([[0.5, 0.5]]), "pairs": np.array([[0, 1, 0]]), "beta": 1.0, "eta": 1.0}
    with pytest.raises(ValueError, match=message):
        rpo_minimax(**(good | change))


# --------------------------------------------------------------------------------------------------------- the trainer

transformers = pytest.importorskip("transformers")
VOCABULARY = 24


def tiny(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def random_pairs(n=10, seed=0):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(VOCABULARY, size=rng.integers(1, most)).tolist() for _ in range(n) for most in (5, 7, 7)]
    return [TokenPair(*ids[start : start + 3]) for start in range(0, 3 * n, 3)]


def train(model, ref_model, steps=None, pairs=None, **options):
    options = {"learning_rate": 1e-2, "batch_size": 4, "epochs": 3, "eta": 0.05} | options
    trainer = RPOTrainer(model, ref_model, pairs or random_pairs(), args=RPOConfig(**options))
    trainer.train(steps)
    return trainer


def parameters(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.fixture
def trl_trainer(tmp_path):
    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")

    def build(policy, reference, **options):
        letters = {letter: place for place, letter in enumerate("abcdefghijklmnopqrstuvw")} | {"<e>": 23}
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[])), eos_token="<e>"
        )
        arguments = dpo.DPOConfig(
            output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, disable_dropout=True, **options
        )
        row = {"prompt": "ab", "chosen": "cd", "rejected": "e"}
        return dpo.DPOTrainer(
            policy,
            reference,
            args=arguments,
            train_dataset=datasets.Dataset.from_list([row]),
            processing_class=tokenizer,
        )

    return build


def test_the_loss_equals_that_of_trl(trl_trainer):
    policy, reference = tiny(0), tiny(1)
    pairs = [TokenPair([1, 2], [3, 4, 5], [6]), TokenPair([7], [8, 9, 2], [10])]
    batch = collate_preferences(pairs)
    with torch.no_grad():
        logps = *pair_logprobs(policy, batch), *pair_logprobs(reference, batch)
    trainer = trl_trainer(policy, reference, beta=0.3, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.0])
    inputs = trainer.data_collator(
        [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    )
    for eta in (0.0, 0.2):
        trainer.loss_weights = [1.0, eta]
        theirs = trainer._compute_loss(trainer.model, inputs, False).item()
        # trl averages the supervised term over the tokens of the batch: the same where all answers are equally long.
        ours = RPOLoss(0.3, eta, sft="mean")(*logps, chosen_lengths=batch.chosen_lengths).loss.item()
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_the_first_step_starts_at_the_reference():
    history = train(tiny(), tiny(), steps=1).history
    assert history[0]["dpo_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert history[0]["margin"] == pytest.approx(0.0, abs=1e-6)


def test_the_supervised_term_holds_up_the_chosen_answers_and_pairs_are_learned():
    last = {}
    for eta in (0.0, 1.0):
        model = tiny()
        trainer = train(model, copy.deepcopy(model), epochs=10, eta=eta)
        last[eta] = trainer.history[-1]
        assert last[eta]["accuracy"] == 1.0
        assert last[eta]["margin"] > 0
    assert last[1.0]["chosen_logprob"] > last[0.0]["chosen_logprob"] + 1.0


def test_accumulated_gradients_equal_those_of_the_joint_batch():
    pairs = random_pairs(7)  # the last part is smaller than the others
    joint, parts = tiny(), tiny()
    for sft in ("sum", "mean"):
        one = train(joint, tiny(), 2, pairs, batch_size=7, sft=sft)
        other = train(parts, tiny(), 2, pairs, batch_size=2, accumulation=4, sft=sft)
        for name, value in one.history[-1].items():
            assert other.history[-1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        torch.testing.assert_close(parameters(parts), parameters(joint), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_peft", [False, True])
def test_a_resumed_run_goes_on_identically(with_peft):
    def start():
        model = tiny()
        if not with_peft:
            return model, tiny()
        peft = pytest.importorskip("peft")
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_dropout=0.1, task_type="CAUSAL_LM")), None

    whole = train(*start())
    first = train(*start(), steps=4)
    state = first.state_dict()
    first.train(2)  # training on does not reach into the state
    second = train(*start(), steps=0)
    second.load_state_dict(state)
    second.train()
    assert second.history == whole.history
    assert torch.equal(parameters(second.model), parameters(whole.model))
    assert ("embed_tokens" in "".join(state["parameters"])) is not with_peft


def test_precomputed_references_and_checkpointing_change_memory_not_results():
    plain = train(tiny(), tiny(1))
    precomputed = train(tiny(), tiny(1), precompute_reference=True)
    assert precomputed.ref_model is None
    checkpointed = train(tiny(), tiny(1), gradient_checkpointing=True)
    for other in (precomputed, checkpointed):
        torch.testing.assert_close(parameters(other.model), parameters(plain.model), atol=1e-4, rtol=1e-4)


def test_dropout_is_off_also_with_checkpointing():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5, bos_token_id=0, eos_token_id=0
    )
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        calls, reference = [], copy.deepcopy(model)
        model.transformer.h[0].attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer = train(model, reference, 1, gradient_checkpointing=checkpointing)
        assert trainer.history[0]["margin"] == pytest.approx(0.0, abs=1e-5)
        assert len(calls) == 1 + checkpointing  # the layer runs again in the backward pass


def test_bfloat16_stays_close():
    exact, rounded = train(tiny(), tiny(1), 3), train(tiny(), tiny(1), 3, bf16=True)
    assert rounded.history[-1]["loss"] == pytest.approx(exact.history[-1]["loss"], rel=0.05)
    assert next(rounded.model.parameters()).dtype == torch.float32


def test_runs_are_reproducible_and_every_epoch_sees_every_pair_once():
    one, other = train(tiny(), tiny(1)), train(tiny(), tiny(1))
    assert one.history == other.history
    steps = one.total_steps // 3
    for epoch in range(3):
        seen = [row for step in range(steps) for row in one._rows_of(epoch * steps + step)]
        assert sorted(seen) == list(range(10))
    assert one._rows_of(0) != one._rows_of(steps)


def test_the_rate_rises_and_falls():
    rates = [row["learning_rate"] for row in train(tiny(), tiny(1), warmup=0.4, max_steps=10).history]
    assert rates[:5] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert {row["learning_rate"] for row in train(tiny(), tiny(1), 3, warmup=None).history} == {1e-2}


def test_a_supervised_term_that_swamps_the_preferences_is_warned_of():
    with pytest.warns(UserWarning, match="eta=50 is large for answers of this length with sft='sum'"):
        train(tiny(), tiny(), 1, eta=50.0)


def test_bad_trainer_input_is_named():
    model = tiny()
    with pytest.raises(ValueError, match="pass a frozen copy as ref_model"):
        train(model, None)
    with pytest.raises(ValueError, match="ref_model must be a frozen copy"):
        train(model, model)
    with pytest.raises(ValueError, match="parameters that require gradients"):
        train(tiny().requires_grad_(False), model)
    with pytest.raises(ValueError, match="tokenizer may be None only"):
        RPOTrainer(tiny(), model, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ValueError, match="same trainable parameters and the same data"):
        train(tiny(), model, 0).load_state_dict(train(tiny(), model, 0, random_pairs(3)).state_dict())
    for name, value in {"learning_rate": 0.0, "warmup": 1.0, "batch_size": 0, "max_steps": 0, "eta": -1.0}.items():
        with pytest.raises(ValueError, match=name):
            RPOConfig(**{name: value})


# ---------------------------------------------------------------------------------------------------------- the report


def test_report_of_finite_policies_enumerates_the_mass_outside_the_data():
    ref = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    policy = np.array([[0.3, 0.1, 0.6], [0.2, 0.2, 0.6]])
    report = overoptimization_report(policy, ref, np.array([[0, 0, 1]]))
    assert report.uncovered_mass == pytest.approx(0.6)
    assert report.reference_uncovered_mass == pytest.approx(0.2)
    assert report.chosen_change == pytest.approx(np.log(0.6))
    assert report.rejected_change == pytest.approx(np.log(1 / 3))
    assert report.accuracy == 1.0
    assert report.margin == pytest.approx(np.log(1.8))


def test_report_of_a_model_agrees_with_its_log_probabilities_in_any_batch_size():
    policy, ref, pairs = tiny(0), tiny(1), random_pairs(5)
    reports = [overoptimization_report(policy, ref, pairs, batch_size=size) for size in (2, 5)]
    with torch.no_grad():
        (chosen, rejected), (ref_chosen, ref_rejected) = (
            pair_logprobs(model, collate_preferences(pairs)) for model in (policy, ref)
        )
    for report in reports:
        assert report.chosen_logprob == pytest.approx(chosen.mean().item(), rel=1e-5)
        assert report.rejected_change == pytest.approx((rejected - ref_rejected).mean().item(), rel=1e-4)
        assert report.accuracy == pytest.approx((chosen - ref_chosen > rejected - ref_rejected).float().mean().item())
        assert report.uncovered_mass is None


def test_bad_reports_are_named():
    ref = np.array([[0.5, 0.5]])
    with pytest.raises(TypeError, match="both be models or both be arrays, got LlamaForCausalLM, ndarray"):
        overoptimization_report(tiny(), ref, np.array([[0, 0, 1]]))
    with pytest.raises(ValueError, match="a probability above 0"):
        overoptimization_report(np.array([[1.0, 0.0]]), ref, np.array([[0, 0, 1]]))
    with pytest.raises(ValueError, match="ref must have the shape of policy"):
        overoptimization_report(np.ones((2, 1)), ref, np.array([[0, 0, 1]]))
