"""Tests of the mathematics: each fails when the idea it names is removed."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from workingpapers.alignment import (
    PowerLawDetector,
    SequenceBatch,
    SequenceDivergence,
    collate_sequences,
    false_alarm_rate,
    fit_power_law,
    frozen,
    sequence_logprobs,
    token_divergence,
)
from workingpapers.alignment.teacher_hacking import divergence as module
from workingpapers.alignment.teacher_hacking.models import as_sequence_model

SYMBOLS, ANSWER = 3, 3
KINDS = ["fkl", "rkl", "js"]


class Table(torch.nn.Module):
    """Next-symbol logits for every prompt symbol and every beginning of an answer, in float64."""

    def __init__(self, seed, symbols=SYMBOLS):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (symbols,) * (ANSWER + 1)
        self.table = torch.nn.ParameterList(
            torch.randn(*shape[: place + 1], symbols, generator=generator, dtype=torch.float64)
            for place in range(ANSWER)
        )

    def logits(self, batch):
        ids = batch.input_ids
        rows = [self.table[place][tuple(ids[:, : place + 1].T)] for place in range(ANSWER)]
        return torch.stack(rows, 1).flatten(0, 1)


def every_answer(prompt=1):
    answers = [list(answer) for answer in itertools.product(range(SYMBOLS), repeat=ANSWER)]
    return collate_sequences([([prompt], answer) for answer in answers])


def sequence_probabilities(model, batch):
    with torch.no_grad():
        logps = model.logits(batch).log_softmax(-1).gather(1, batch.input_ids[batch.response_mask][:, None])
    return logps.reshape(len(batch), ANSWER).sum(1).exp()


# ---------------------------------------------------------------------------------------------------------- divergences


def test_token_sums_are_the_divergence_of_whole_answers():
    p, q, batch = Table(0), Table(1), every_answer()
    of_p, of_q = sequence_probabilities(p, batch), sequence_probabilities(q, batch)
    torch.testing.assert_close(of_p.sum(), torch.ones((), dtype=torch.float64))
    forward = SequenceDivergence("fkl").evaluate(_model(p), _model(q), batch, first=True)
    torch.testing.assert_close((of_p * forward).sum(), (of_p * (of_p / of_q).log()).sum())
    backward = SequenceDivergence("rkl").evaluate(_model(p), _model(q), batch, first=False)
    torch.testing.assert_close((of_q * backward).sum(), (of_q * (of_q / of_p).log()).sum())
    # answers of the wrong model give another number
    assert abs((of_q * forward).sum() - (of_p * (of_p / of_q).log()).sum()) > 0.05


def test_exact_distributions_have_less_variance_than_drawn_tokens():
    p, q, batch = Table(0), Table(1), every_answer()
    of_p, of_q = sequence_probabilities(p, batch), sequence_probabilities(q, batch)
    ours = SequenceDivergence("fkl").evaluate(_model(p), _model(q), batch, first=True)
    plain = (of_p / of_q).log()
    ours, plain = ((of_p * (values - (of_p * values).sum()) ** 2).sum() for values in (ours, plain))
    assert ours < 0.5 * plain


def test_js_is_symmetric_bounded_and_exact_for_one_token():
    p, q, batch = Table(0), Table(1), every_answer()
    of_p, of_q = sequence_probabilities(p, batch), sequence_probabilities(q, batch)

    def js(first, second, of_first, of_second, beta=0.5):
        divergence = SequenceDivergence("js", beta=beta)
        return (of_first * divergence.evaluate(first, second, batch, first=True)).sum() + (
            of_second * divergence.evaluate(first, second, batch, first=False)
        ).sum()

    there, back = js(p, q, of_p, of_q), js(q, p, of_q, of_p)
    torch.testing.assert_close(there, back)
    torch.testing.assert_close(js(p, q, of_p, of_q, 0.2), js(q, p, of_q, of_p, 0.8))
    assert 0 < there < ANSWER * math.log(2)
    first, second = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = jensenshannon(first.softmax(-1).numpy(), second.softmax(-1).numpy(), axis=1) ** 2
    np.testing.assert_allclose(token_divergence(first, second, "js"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences_in_blocks_too(kind, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 14)  # two rows
    p, q = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: token_divergence(p, logits, kind, beta=0.3), (q,))


@pytest.mark.parametrize(
    ("kind", "beta", "theirs"), [("fkl", 0.5, 0.0), ("rkl", 0.5, 1.0), ("js", 0.5, 0.5), ("js", 0.2, 0.2)]
)
def test_trl_has_the_same_loss(kind, beta, theirs):
    generalized_jsd_loss = pytest.importorskip("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    p, student = torch.randn(2, 3, 4, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 1, 1, 1], [-100, 2, 2, -100], [3, -100, -100, -100]])
    mask = labels != -100
    ours, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    tokens = token_divergence(p[mask], ours[mask], kind, beta=beta)
    expected = generalized_jsd_loss(other, p, labels, beta=theirs)
    torch.testing.assert_close(tokens.mean(), expected, atol=1e-5, rtol=1e-5)
    tokens.mean().backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, other.grad, atol=1e-6, rtol=1e-5)


def test_half_precision_is_normalised_in_float32_and_the_teacher_gets_no_gradient():
    p, q = torch.randn(2, 3, 50, dtype=torch.bfloat16)
    p.requires_grad_()
    q.requires_grad_()
    values = token_divergence(p, q)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, token_divergence(p.float(), q.float()))
    values.sum().backward()
    assert q.grad.dtype == torch.bfloat16
    assert p.grad is None


def test_reductions_average_within_an_answer_first():
    p, q = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[False, True, True], [False, False, True]])
    tokens = token_divergence(p, q)
    torch.testing.assert_close(SequenceDivergence().losses(p, q, mask), torch.stack([tokens[:2].sum(), tokens[2]]))
    torch.testing.assert_close(
        SequenceDivergence(reduction="mean").losses(p, q, mask), torch.stack([tokens[:2].mean(), tokens[2]])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_estimate_is_the_mean_with_its_error_however_it_is_cut(kind):
    p, q, batch = Table(0), Table(1), every_answer()
    extra = [batch.select(torch.arange(27).flip(0))] if kind == "js" else []
    whole = SequenceDivergence(kind)(_model(p), _model(q), batch, *extra)
    cut = SequenceDivergence(kind, batch_size=4)(_model(p), _model(q), batch, *extra)
    torch.testing.assert_close(whole.by_sequence, cut.by_sequence)
    assert whole.value == pytest.approx(float(whole.by_sequence.mean()))
    assert whole.standard_error == pytest.approx(float(whole.by_sequence.std()) / math.sqrt(27))
    same = SequenceDivergence(kind)(_model(p), _model(p), batch, *extra)
    assert abs(same.value) < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SequenceDivergence("kl"), "kind must be one of 'fkl', 'rkl', 'js', got 'kl'"),
        (lambda: SequenceDivergence("js", beta=1.0), "beta must be above 0 and below 1"),
        (lambda: SequenceDivergence(reduction="none"), "reduction must be one of"),
        (lambda: SequenceDivergence(batch_size=0), "batch_size must be at least 1"),
        (lambda: token_divergence(torch.zeros(2, 3), torch.zeros(2, 4)), "must share their tokenizer"),
        (lambda: SequenceDivergence()(Table(0), Table(1), every_answer(), every_answer()), "q_batch must be None"),
        (lambda: SequenceDivergence("js")(Table(0), Table(1), every_answer()), "q_batch must be given"),
        (
            lambda: SequenceDivergence("js")(
                _model(Table(0)), _model(Table(1)), every_answer(), every_answer().select([0])
            ),
            "as many answers as batch, got 1 and 27",
        ),
    ],
)
def test_bad_divergences_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    broken = torch.zeros(2, 3).index_fill(0, torch.tensor([1]), bad)
    for pair in ((broken, torch.zeros(2, 3)), (torch.zeros(2, 3), broken)):
        with pytest.raises(FloatingPointError, match="hold NaN or infinity"):
            token_divergence(*pair)


# ----------------------------------------------------------------------------------------------- transformers models


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=5, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def t5():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=13, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=5, dropout_rate=0.5, initializer_factor=3.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(config).double().eval()


def test_a_causal_model_is_scored_at_its_answers(llama):
    batch = collate_sequences([([1, 2], [3, 4, 5]), ([6], [7, 5])])
    labels = batch.input_ids[batch.response_mask]
    with torch.no_grad():
        logps = as_sequence_model("model", llama).logits(batch).log_softmax(-1).gather(1, labels[:, None])[:, 0]
        expected = sequence_logprobs(llama, batch.input_ids, batch.attention_mask, batch.response_mask)
    torch.testing.assert_close(torch.stack([logps[:3].sum(), logps[3:].sum()]), expected)


def test_an_encoder_decoder_is_scored_like_each_answer_by_itself(t5):
    pairs = [([1, 2, 9], [3, 4, 5]), ([6], [7, 5])]
    for side in ("left", "right"):
        with torch.no_grad():
            found = as_sequence_model("model", t5).logits(collate_sequences(pairs, padding_side=side))
            single = [
                t5(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *answer[:-1]]])).logits[0]
                for prompt, answer in pairs
            ]
        torch.testing.assert_close(found, torch.cat(single))


def test_an_encoder_decoder_narrows_to_answers_before_its_head(t5):
    seen = []
    hook = t5.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.shape))
    with frozen(t5):
        as_sequence_model("model", t5).logits(collate_sequences([([1, 2], [3, 4, 5]), ([6], [7])]))
    hook.remove()
    assert seen == [(1, 4, 13)]


def test_an_encoder_decoder_draws_from_its_own_distribution(t5):
    model, prompt = as_sequence_model("model", t5), [1, 2, 9]
    batch = model.sample(
        [prompt] * 4_000, max_new_tokens=2, temperature=1.0, generator=torch.Generator().manual_seed(0)
    )
    assert batch.prompts()[0] == prompt
    answers = batch.responses()
    every = [[5]] + [[first, second] for first in range(13) if first != 5 for second in range(13)]
    with torch.no_grad():
        logits = model.logits(collate_sequences([(prompt, answer) for answer in every]))
    logps = logits.log_softmax(-1).gather(1, torch.tensor([*itertools.chain(*every)])[:, None])[:, 0]
    ends = np.cumsum([len(answer) for answer in every])
    exact = np.array(
        [float(logps[end - len(answer) : end].sum().exp()) for answer, end in zip(every, ends, strict=True)]
    )
    assert exact.sum() == pytest.approx(1.0, abs=1e-5)
    counts = np.array([answers.count(answer) for answer in every])
    assert counts.sum() == 4_000  # an answer ends at its end token
    expected = 4_000 * exact
    large = expected > 5
    chi_square = ((counts - expected)[large] ** 2 / expected[large]).sum()
    assert chi_square < large.sum() + 4 * math.sqrt(2 * large.sum())
    assert batch.finished.tolist() == [answer[-1] == 5 for answer in answers]


def test_an_encoder_decoder_at_low_temperature_is_greedy(t5):
    prompts = [[1, 2, 9], [6], [8, 8]]
    batch = as_sequence_model("model", t5).sample(prompts, max_new_tokens=6, temperature=1e-4, generator=None)
    for prompt, answer in zip(prompts, batch.responses(), strict=True):
        expected = t5.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[0, 1:].tolist()
        assert answer == expected


def test_a_teacher_is_a_language_model():
    with pytest.raises(TypeError, match="teacher must be a transformers language model or have the methods"):
        as_sequence_model("teacher", torch.nn.Linear(2, 2))


# -------------------------------------------------------------------------------------------------------- the detector


def test_a_power_law_is_recovered_and_not_flagged():
    times = [20.0 * step for step in range(1, 31)]
    values = [7.0 * t**-0.4 for t in times]
    law = fit_power_law(times, values)
    assert (law.scale, law.exponent, law.scatter) == pytest.approx((7.0, 0.4, 0.0), abs=1e-9)
    assert law(50.0) == pytest.approx(7.0 * 50.0**-0.4)
    detector = PowerLawDetector()
    assert all(detector.update(t, value) is None for t, value in zip([0.0, *times], [9.0, *values], strict=True))
    assert detector.law.exponent == pytest.approx(0.4)


def test_the_line_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    times, values = np.arange(1, 9), np.exp(rng.standard_normal(8))
    law = fit_power_law(times, values)
    (slope, intercept), residual, *_ = np.polyfit(np.log(times), np.log(values), 1, full=True)
    assert law.exponent == pytest.approx(-slope)
    assert law.scale == pytest.approx(np.exp(intercept))
    assert law.scatter == pytest.approx(np.sqrt(residual[0] / 6))


def test_a_plateau_is_flagged_at_its_first_point_that_counts():
    curve = {t: max(t, 0) ** -0.5 if t < 12 else 12**-0.5 for t in range(1, 21)}
    onsets = [PowerLawDetector(consecutive=count) for count in (1, 3)]
    for detector in onsets:
        for t, value in curve.items():
            detector.update(t, value)
    # the plateau leaves the line by more than 3 * 0.02 in logarithms once log(t / 12) / 2 > 0.06
    first = next(t for t in range(12, 21) if math.log(t / 12) / 2 > 0.06)
    assert [detector.onset for detector in onsets] == [first, first]


def test_only_what_lies_above_for_long_enough_counts():
    def onset(bumps, **options):
        detector = PowerLawDetector(**options)
        for t in range(1, 21):
            detector.update(t, t**-0.5 * bumps.get(t, 1.0))
        return detector.onset

    assert onset({10: 2.0, 11: 2.0}) is None
    assert onset({10: 2.0, 11: 2.0, 12: 2.0}) == 10
    assert onset(dict.fromkeys(range(10, 21), 0.5)) is None  # faster than the law
    assert onset({10: 2.0, 11: 2.0}, consecutive=2) == 10
    assert onset(dict.fromkeys(range(10, 21), 1.05)) is None  # within the floor
    assert onset(dict.fromkeys(range(10, 21), 1.05), floor=0.01) == 10
    wide = {t: math.exp(0.1 * (-1) ** t) for t in range(1, 7)}  # a window with scatter is less strict
    assert onset(wide | dict.fromkeys(range(10, 21), 1.2)) is None


def test_false_alarms_are_those_of_the_detector():
    times, noise, trials = list(range(1, 31)), 0.08, 200
    draws = noise * np.random.default_rng(3).standard_normal((trials, len(times)))
    flagged = []
    for row in draws:
        detector = PowerLawDetector()
        for t, deviation in zip(times, row, strict=True):
            detector.update(t, 5.0 * t**-0.7 * math.exp(deviation))  # any law: residuals do not depend on it
        flagged.append(detector.onset is not None)
    assert 0 < np.mean(flagged) == false_alarm_rate(times, noise=noise, trials=trials, random_state=3)


def test_false_alarms_are_rare_and_grow_with_noise_and_extrapolation():
    fifteen = [20 * step for step in range(1, 16)]
    assert false_alarm_rate(fifteen, noise=0.01) == 0.0
    assert false_alarm_rate(fifteen, noise=0.02) < 0.005
    assert 0.01 < false_alarm_rate(fifteen, noise=0.05) < 0.04
    far = false_alarm_rate(list(range(1, 51)), noise=0.05)
    assert far > 0.1
    assert false_alarm_rate(list(range(1, 51)), noise=0.05, window=12) < 0.3 * far
    assert false_alarm_rate(list(range(1, 9)), noise=0.05, consecutive=4) == 0.0  # two evaluations after the window


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PowerLawDetector(window=5), "window must be at least 6, got 5"),
        (lambda: PowerLawDetector(k=0.0), "k must be above 0"),
        (lambda: PowerLawDetector(floor=0.0), "floor must be above 0"),
        (lambda: PowerLawDetector(consecutive=0), "consecutive must be at least 1"),
        (lambda: PowerLawDetector().update(1, 0.0), "value must be above 0"),
        (lambda: PowerLawDetector().update(-1, 1.0), "t must be at least 0"),
        (lambda: PowerLawDetector().update(1, math.nan), "value must be above 0"),
        (lambda: fit_power_law([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]), "6 points or more"),
        (lambda: fit_power_law(range(6), range(1, 7)), "times must be above 0"),
        (lambda: fit_power_law([1] * 6, range(1, 7)), "times must differ"),
        (lambda: fit_power_law(range(1, 7), [1, 2, 3, 4, 5, math.inf]), "values must be finite"),
        (lambda: false_alarm_rate(range(1, 7), noise=0.1), "more than window"),
        (lambda: false_alarm_rate([1, 2, 3, 4, 5, 6, 6], noise=0.1), "must be increasing"),
        (lambda: false_alarm_rate(range(1, 9), noise=-0.1), "noise must be at least 0"),
    ],
)
def test_bad_detectors_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_time_moves_on():
    detector = PowerLawDetector()
    detector.update(1, 1.0)
    with pytest.raises(ValueError, match="t must be above the last one, 1, got 1"):
        detector.update(1, 1.0)


def _model(table):
    """The table where a model with both methods is asked for."""
    table.sample = lambda *_, **__: SequenceBatch(*[None] * 3)
    return table
