"""Tests of the mathematics of the five losses: each fails when the idea it names is removed."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from workingpapers.alignment.judge_preference import DPO, IPO, KTO, ORPO, LengthRegularizedDPO, kto_baseline, kto_losses
from workingpapers.alignment.judge_preference.losses import log_odds

LENGTHS = torch.tensor([3, 5, 9, 2, 7, 4])
OTHERS = torch.tensor([6, 5, 1, 8, 7, 3])


@pytest.fixture
def logps():
    generator = torch.Generator().manual_seed(0)
    values = -20 * torch.rand(4, 6, generator=generator, dtype=torch.float64)
    return [row.clone().requires_grad_(place < 2) for place, row in enumerate(values)]


@pytest.fixture
def mismatched():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, generator=generator, dtype=torch.float64) + 0.5


def margin_of(logps):
    chosen, rejected, ref_chosen, ref_rejected = logps
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def test_dpo_is_its_formula_and_smooths_labels(logps):
    margin = margin_of(logps)
    torch.testing.assert_close(DPO(0.3, reduction="none")(*logps).loss, -logsigmoid(0.3 * margin))
    smoothed = DPO(0.3, label_smoothing=0.2, reduction="none")(*logps).loss
    torch.testing.assert_close(smoothed, -0.8 * logsigmoid(0.3 * margin) - 0.2 * logsigmoid(-0.3 * margin))


def test_a_longer_chosen_response_pulls_less_and_a_longer_rejected_one_more():
    pull = {}
    for chosen_length in (5, 10, 15):
        chosen = torch.tensor([-8.0], requires_grad=True)
        lengths = {"chosen_lengths": torch.tensor([chosen_length]), "rejected_lengths": torch.tensor([10])}
        same = [torch.tensor([-8.0])] * 3
        LengthRegularizedDPO(0.1, 0.05)(chosen, *same, **lengths).loss.backward()
        pull[chosen_length] = -chosen.grad.item()
    assert pull[5] > pull[10] > pull[15]
    assert pull[10] == pytest.approx(0.05)  # beta / 2: as DPO
    assert pull[15] == pytest.approx(0.1 / (1 + math.exp(0.05 * 5)))


def test_length_regularisation_takes_the_length_out_of_bradley_terry_labels():
    """With labels drawn from r + alpha |y| the minimiser is pi_ref exp(r / beta), as if length had no reward."""
    beta, alpha = 0.5, 0.3
    generator = torch.Generator().manual_seed(3)
    actions = 7
    reward = torch.randn(actions, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 9, (actions,), generator=generator)
    log_ref = torch.randn(actions, generator=generator, dtype=torch.float64).log_softmax(0)
    first, second = torch.cartesian_prod(torch.arange(actions), torch.arange(actions)).T
    judged = reward + alpha * lengths
    wins = torch.sigmoid(judged[first] - judged[second])

    def minimiser(loss):
        logits = torch.zeros(actions, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([logits], max_iter=500, tolerance_change=0, line_search_fn="strong_wolfe")

        def closure():
            solver.zero_grad()
            log_policy = logits.log_softmax(0)
            arguments = (log_policy[first], log_policy[second], log_ref[first], log_ref[second])
            value = wins @ loss(*arguments, chosen_lengths=lengths[first], rejected_lengths=lengths[second]).loss
            value.backward()
            return value

        solver.step(closure)
        return logits.detach().log_softmax(0)

    wanted = (log_ref + reward / beta).log_softmax(0)
    found = minimiser(LengthRegularizedDPO(beta, alpha, reduction="none"))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (minimiser(DPO(beta, reduction="none")) - wanted).abs().max() > 0.5


def test_alpha_zero_is_dpo(logps):
    lengths = {"chosen_lengths": LENGTHS, "rejected_lengths": OTHERS}
    assert torch.equal(LengthRegularizedDPO(0.2, 0.0)(*logps, **lengths).loss, DPO(0.2)(*logps).loss)


def test_ipo_aims_at_a_margin_and_does_not_go_past_it(logps):
    margin = margin_of(logps)
    torch.testing.assert_close(IPO(0.25, reduction="none")(*logps).loss, (margin - 2.0) ** 2)
    reached = torch.tensor([-4.0], requires_grad=True)
    IPO(0.25)(reached, torch.tensor([-6.0]), torch.tensor([-5.0]), torch.tensor([-5.0])).loss.backward()
    assert reached.grad.item() == 0.0
    chosen, rejected, ref_chosen, ref_rejected = logps
    per_token = (chosen - ref_chosen) / LENGTHS - (rejected - ref_rejected) / OTHERS
    found = IPO(0.25, per_token=True, reduction="none")(*logps, chosen_lengths=LENGTHS, rejected_lengths=OTHERS).loss
    torch.testing.assert_close(found, (per_token - 2.0) ** 2)


def test_kto_is_its_formula_with_a_baseline_without_gradient(logps, mismatched):
    chosen, rejected, ref_chosen, ref_rejected = logps
    mismatched.requires_grad_()
    loss = KTO(0.3, desirable_weight=2.0, undesirable_weight=0.5, reduction="none")
    out = loss(*logps, mismatched_logratios=mismatched)
    z0 = mismatched.mean().detach()
    assert z0 > 0
    good = 2.0 * (1 - torch.sigmoid(0.3 * (chosen - ref_chosen - z0)))
    bad = 0.5 * (1 - torch.sigmoid(0.3 * (z0 - (rejected - ref_rejected))))
    torch.testing.assert_close(out.loss, (good + bad) / 2)
    torch.testing.assert_close(out.baseline, z0.expand(6))
    out.loss.sum().backward()
    assert mismatched.grad is None
    assert not out.baseline.requires_grad


def test_the_baseline_is_clamped_at_zero_and_records_need_no_counterpart():
    assert kto_baseline(torch.tensor([-3.0, 1.0])) == 0.0
    assert kto_baseline(torch.tensor([3.0, 1.0])) == 2.0
    ratios = torch.tensor([1.0, 1.0, -2.0])
    found = kto_losses(ratios, torch.tensor([True, False, False]), 0.5, beta=2.0, undesirable_weight=3.0)
    wanted = torch.tensor([1.0, 3.0, 3.0]) * torch.sigmoid(torch.tensor([-1.0, 1.0, -5.0]))
    torch.testing.assert_close(found, wanted)


def test_orpo_is_its_formula_and_needs_no_reference(logps):
    chosen, rejected = logps[0] / LENGTHS, logps[1] / OTHERS
    p, q = chosen.exp(), rejected.exp()
    ratio = torch.log((p / (1 - p)) / (q / (1 - q)))
    out = ORPO(0.4, reduction="none")(*logps[:2], chosen_lengths=LENGTHS, rejected_lengths=OTHERS)
    torch.testing.assert_close(out.nll_loss, -chosen)
    torch.testing.assert_close(out.odds_loss, -logsigmoid(ratio))
    torch.testing.assert_close(out.loss, -chosen - 0.4 * logsigmoid(ratio))
    assert not ORPO.needs_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_of_near_certain_and_impossible_events_are_finite(dtype):
    logps = torch.tensor([0.0, -1e-12, -1e-4, -0.5, -1e4], dtype=dtype, requires_grad=True)
    odds = log_odds(logps)
    assert odds.isfinite().all()
    assert odds[2].item() == pytest.approx(math.log(1e4), rel=1e-3)
    assert odds[4].item() == pytest.approx(-1e4)
    odds.sum().backward()
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize("loss", [DPO, LengthRegularizedDPO, IPO, KTO, ORPO])
def test_the_losses_share_one_signature_reductions_and_reports(loss, logps, mismatched):
    extra = {"mismatched_logratios": mismatched} if loss is KTO else {}
    call = {"chosen_lengths": LENGTHS, "rejected_lengths": OTHERS} | extra
    each = loss(0.2, reduction="none")(*logps, **call)
    assert each.loss.shape == (6,)
    torch.testing.assert_close(loss(0.2, reduction="sum")(*logps, **call).loss, each.loss.sum())
    torch.testing.assert_close(loss(0.2)(*logps, **call).loss, each.loss.mean())
    torch.testing.assert_close(each.margin, each.chosen_rewards - each.rejected_rewards)
    assert each.accuracy.tolist() == (each.margin > 0).double().tolist()
    assert not any(t.requires_grad for t in (each.chosen_rewards, each.rejected_rewards, each.accuracy, each.margin))
    assert "beta=0.2" in repr(loss(0.2))
    each.loss.sum().backward()
    assert (logps[0].grad < 0).any()  # raising the chosen response lowers every loss; IPO past its margin apart
    assert (logps[1].grad > 0).any()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: DPO(0.0), ValueError, "beta must be above 0, got 0.0"),
        (lambda: DPO(0.1, label_smoothing=0.5), ValueError, "label_smoothing must be"),
        (lambda: LengthRegularizedDPO(alpha=-1.0), ValueError, "alpha must be at least 0"),
        (lambda: KTO(desirable_weight=float("nan")), ValueError, "desirable_weight must be at least 0"),
        (lambda: ORPO(reduction="max"), ValueError, "reduction must be one of"),
        (lambda: IPO("0.1"), TypeError, "beta must be a number"),
    ],
)
def test_bad_parameters_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("loss", "call", "message"),
    [
        (LengthRegularizedDPO(), {}, "chosen_lengths must be given"),
        (LengthRegularizedDPO(), {"chosen_lengths": torch.tensor([1, 1])}, "rejected_lengths must be given"),
        (IPO(per_token=True), {}, "chosen_lengths must be given when per_token=True"),
        (ORPO(), {"chosen_lengths": torch.tensor([1, 0])}, "chosen_lengths must be at least 1, got 0"),
        (KTO(), {}, "mismatched_logratios must have shape"),
        (KTO(), {"mismatched_logratios": torch.zeros(1)}, "with at least two records, got shape"),
        (KTO(), {"mismatched_logratios": torch.tensor([0.0, math.inf])}, "mismatched_logratios must be finite"),
    ],
)
def test_what_a_loss_needs_is_asked_for(loss, call, message):
    with pytest.raises(ValueError, match=message):
        loss(*[torch.tensor([-1.0, -2.0])] * 4, **call)


@pytest.mark.parametrize("loss", [DPO(), IPO(), KTO(), LengthRegularizedDPO(), ORPO()])
def test_bad_log_probabilities_are_named(loss):
    good = torch.tensor([-1.0, -2.0])
    with pytest.raises(ValueError, match="policy_rejected_logps must be finite log-probabilities"):
        loss(good, torch.tensor([-1.0, float("nan")]), good, good)
