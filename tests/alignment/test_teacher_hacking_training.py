"""Tests of the training: each fails when the idea it names is removed."""

import copy

import pytest
import torch

from workingpapers.alignment import (
    DistillationArm,
    Distiller,
    HackingMonitor,
    PowerLawDetector,
    SequenceDivergence,
    collate_sequences,
    controlled_study,
    select_logprobs,
)

SYMBOLS, ANSWER = 4, 3


class Markov(torch.nn.Module):
    """The next symbol depends on the last one alone; remembers what it was asked for and what it answered."""

    vocab_size = SYMBOLS

    def __init__(self, seed=None):
        super().__init__()
        generator = torch.Generator().manual_seed(seed or 0)
        start = torch.zeros(SYMBOLS, SYMBOLS) if seed is None else torch.randn(SYMBOLS, SYMBOLS, generator=generator)
        self.table = torch.nn.Parameter(start)
        self.drawn = []

    def logits(self, batch):
        before = batch.input_ids[:, :-1][batch.response_mask[:, 1:]]
        return self.table[before]

    def sample(self, prompts, *, max_new_tokens, temperature, generator):
        assert not torch.is_grad_enabled()
        assert not self.training
        answers = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(max_new_tokens):
                shares = (self.table[ids[-1]] / temperature).softmax(-1)
                ids.append(int(torch.multinomial(shares, 1, generator=generator)))
            answers.append(ids[len(prompt) :])
        batch = collate_sequences(list(zip(prompts, answers, strict=True)))
        self.drawn.append(batch)
        return batch


PROMPTS = [[symbol, other] for symbol in range(SYMBOLS) for other in range(2)]
VALIDATION = [[symbol, other] for symbol in range(SYMBOLS) for other in range(2, 4)]


def distiller(source="offline", teacher=1, student=None, seed=0, prompts=PROMPTS, **options):
    options = {"batch_size": 4, "max_new_tokens": ANSWER, "max_grad_norm": 1e6, "lr": 0.05} | options
    return Distiller(
        Markov(teacher), Markov(student), prompts, source, generator=torch.Generator().manual_seed(seed), **options
    )


def answers_of(batches):
    return [pair for batch in batches for pair in batch.sequences()]


# ------------------------------------------------------------------------------------------------------------- sources


def test_offline_answers_are_drawn_once():
    trained = distiller().fit(4)
    assert sorted(prompt for prompt, _ in answers_of(trained.teacher.drawn)) == sorted(PROMPTS)
    assert sum(map(len, trained.teacher.drawn)) == len(PROMPTS)
    assert trained.student.drawn == []
    assert trained.generated_tokens == len(PROMPTS) * ANSWER
    assert trained.epoch == 4
    assert len(trained.history) == 8


def test_epoch_e_uses_answer_e_mod_m():
    trained, used = distiller(samples_per_prompt=3, batch_size=8), []
    trained.teacher.logits = lambda batch: used.append(batch.sequences()) or Markov.logits(trained.teacher, batch)
    trained.fit(7)
    assert sum(map(len, trained.teacher.drawn)) == 3 * len(PROMPTS)
    epochs = [sorted(rows) for rows in used]
    assert epochs[0] == epochs[3] == epochs[6]
    assert epochs[1] == epochs[4]
    assert epochs[2] == epochs[5]
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(
    ("source", "drawer", "idle"), [("online_teacher", "teacher", "student"), ("online_student", "student", "teacher")]
)
def test_online_answers_are_fresh_in_every_step(source, drawer, idle):
    trained = distiller(source).fit(5)
    batches = getattr(trained, drawer).drawn
    assert getattr(trained, idle).drawn == []
    assert len(batches) == len(trained.history) == 10
    assert trained.generated_tokens == 10 * 4 * ANSWER
    assert len({tuple(map(tuple, batch.responses())) for batch in batches}) == 10
    asked = sorted(prompt for batch in batches[:2] for prompt in batch.prompts())
    assert asked == sorted(PROMPTS)


def test_a_mixture_has_its_share_of_student_answers():
    trained = distiller(mix=0.3, batch_size=2).fit(50)
    shares = [row["student_share"] for row in trained.history]
    assert abs(sum(shares) / len(shares) - 0.3) < 0.05
    assert sum(map(len, trained.teacher.drawn)) == len(PROMPTS)  # the rest is offline
    assert {row["student_share"] for row in distiller("online_teacher", mix=0.5).fit(2).history} == {0.5}
    everything = distiller("online_student").fit(1)
    assert {row["student_share"] for row in everything.history} == {1.0}


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("kind", ["fkl", "rkl", "js"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_step_is_that_of_the_mean_divergence(kind, reduction):
    trained = distiller(loss=kind, reduction=reduction, batch_size=8, student=5)
    start = copy.deepcopy(trained.student.table)
    trained.fit(1)
    (batch,) = trained.teacher.drawn[:1]
    table = start.detach().requires_grad_()
    before = batch.input_ids[:, :-1][batch.response_mask[:, 1:]]
    losses = SequenceDivergence(kind, reduction).losses(
        trained.teacher.table.detach()[before], table[before], batch.response_mask
    )
    losses.mean().backward()
    assert trained.history[0]["loss"] == pytest.approx(float(losses.mean().detach()), rel=1e-5)
    assert trained.history[0]["gradient_norm"] == pytest.approx(float(table.grad.norm()), rel=1e-5)
    assert trained.history[0]["tokens"] == ANSWER


def test_temperature_softens_the_loss_and_the_answers():
    cold, hot = (distiller("online_teacher", temperature=value, batch_size=8) for value in (0.05, 20.0))
    assert cold.fit(1).history[0]["loss"] > 5 * hot.fit(1).history[0]["loss"]
    distinct = [len({tuple(answer) for answer in trained.teacher.drawn[0].responses()}) for trained in (cold, hot)]
    assert distinct[0] < distinct[1]


@pytest.mark.parametrize("source", ["online_teacher", "online_student"])
def test_a_student_that_can_be_the_teacher_becomes_it(source):
    trained = distiller(source, batch_size=8, lr=0.1).fit(80)
    distance = (trained.teacher.table.softmax(-1) - trained.student.table.softmax(-1)).abs().max()
    assert distance < 0.02


def test_accumulation_and_resuming_change_nothing():
    whole = distiller(batch_size=8, samples_per_prompt=2).fit(6)
    halves = distiller(batch_size=4, accumulation=2, samples_per_prompt=2)
    halves._fixed = whole._fixed  # the answers depend on how many are drawn at a time
    halves.fit(6)
    torch.testing.assert_close(whole.student.table, halves.student.table)
    for source, mix in (("offline", 0.5), ("online_student", None)):
        whole = distiller(source, mix=mix).fit(6)
        first = distiller(source, mix=mix).fit(2)
        second = distiller(source, mix=mix)
        second.load_state_dict(first.state_dict())
        second.fit(4)
        assert torch.equal(whole.student.table, second.student.table)
        assert whole.history == second.history
        assert whole.generated_tokens == second.generated_tokens
    with pytest.raises(ValueError, match="same generator seed"):
        distiller(seed=1).load_state_dict(distiller().state_dict())


def test_same_seed_same_run_and_nothing_else_is_touched():
    prompts = [list(prompt) for prompt in PROMPTS]
    state = torch.random.get_rng_state()
    first, second = (distiller("online_teacher", mix=0.5, prompts=prompts).fit(3) for _ in range(2))
    assert torch.equal(first.student.table, second.student.table)
    other = distiller("online_teacher", mix=0.5, seed=1).fit(3)
    assert not torch.equal(first.student.table, other.student.table)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert prompts == PROMPTS
    assert torch.equal(first.teacher.table, Markov(1).table)
    assert first.teacher.table.grad is None
    assert first.teacher.training


def test_warm_up_then_constant_rate():
    rates = [row["learning_rate"] for row in distiller(warmup_steps=3, lr=0.4).fit(3).history]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": "online"}, ValueError, "source must be one of 'offline', 'online_teacher', 'online_student'"),
        ({"samples_per_prompt": 0}, ValueError, "samples_per_prompt must be at least 1, got 0"),
        ({"samples_per_prompt": 2, "source": "online_teacher"}, ValueError, "samples_per_prompt must be 1 for source"),
        ({"mix": 1.5}, ValueError, "mix must be at least 0 and at most 1"),
        ({"mix": 0.5, "source": "online_student"}, ValueError, "mix must be None for source 'online_student'"),
        ({"loss": "kl"}, ValueError, "kind must be one of"),
        ({"reduction": "none"}, ValueError, "reduction must be one of"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"lr": 0.0}, ValueError, "learning_rate must be above 0"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"prompts": []}, ValueError, "prompts must hold at least one prompt"),
        ({"prompts": [[1], []]}, ValueError, "prompt 1 has no tokens"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        distiller(**options)


def test_bad_models_are_named():
    larger = Markov()
    larger.vocab_size = 5
    with pytest.raises(ValueError, match="share their tokenizer, but teacher has 4 tokens, student has 5"):
        Distiller(Markov(1), larger, PROMPTS)
    teacher = Markov(1)
    with pytest.raises(ValueError, match="teacher must be another model than student"):
        Distiller(teacher, teacher, PROMPTS)

    class Plain:
        logits = sample = Markov.logits

    with pytest.raises(TypeError, match=r"student must be a torch\.nn\.Module"):
        Distiller(teacher, Plain(), PROMPTS)
    broken = Markov(1)
    broken.table.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits of p or q hold NaN"):
        Distiller(Markov(1), broken, PROMPTS, max_new_tokens=ANSWER).fit(1)


# --------------------------------------------------------------------------------------------------------- the monitor


def moved(oracle, teacher, toward_teacher, noise=None, seed=9):
    """A student between a far start, the oracle and the teacher."""
    student = Markov(seed)
    with torch.no_grad():
        student.table.copy_(torch.lerp(oracle.table, teacher.table, toward_teacher))
        if noise is not None:
            student.table.add_(noise * Markov(seed).table)
    return student


def monitored(students, oracle, teacher, **options):
    options = {"max_new_tokens": ANSWER, "generator": torch.Generator().manual_seed(0)} | options
    monitor = HackingMonitor(teacher, oracle, VALIDATION * 8, **options)
    for epoch, student in enumerate(students):
        monitor.evaluate(student, epoch)
    return monitor


def test_hacking_is_seen_where_the_golden_metric_turns():
    oracle, teacher = Markov(2), Markov(3)
    near = [moved(oracle, teacher, share) for share in (0.0, 0.1, 0.2, 0.5, 0.9)]
    students = [moved(oracle, teacher, 0.0, noise=2.0), moved(oracle, teacher, 0.0, noise=0.7), *near]
    monitor = monitored(students, oracle, teacher)
    golden = [row.golden for row in monitor.trace]
    assert golden.index(min(golden)) == 2
    assert golden[2] == pytest.approx(0.0, abs=1e-6)
    assert all(
        later.proxy < earlier.proxy for earlier, later in zip(monitor.trace[2:], monitor.trace[3:], strict=False)
    )
    assert monitor.golden_onset == monitor.onset == 3
    assert monitor.overfitting_onset is None
    assert monitor.proxy_onset is None
    # the last student is nearly the teacher
    assert golden[-1] < monitor.teacher_golden.value
    assert monitor.trace[-1].golden_se > monitor.trace[3].golden_rise_se > 0
    assert [row.golden_rise for row in monitor.trace] == pytest.approx(
        [0.0] * 3 + [value - golden[2] for value in golden[3:]]
    )
    assert {row.proxy_rise for row in monitor.trace} == {0.0}
    assert monitor.trace[-1].epoch == 6


def test_a_proxy_that_rises_is_overfitting_and_not_hacking():
    oracle, teacher = Markov(2), Markov(3)
    students = [moved(oracle, teacher, 0.5), *(moved(oracle, teacher, 0.5, noise) for noise in (0.5, 1.0, 2.0))]
    monitor = monitored(students, oracle, teacher)
    assert monitor.overfitting_onset == 1
    assert monitor.golden_onset is None
    assert monitor.onset is None


def test_evaluations_are_paired_on_answers_drawn_once():
    oracle, teacher = Markov(2), Markov(3)
    monitor = monitored([moved(oracle, teacher, share) for share in (0.4, 0.4, 0.5)], oracle, teacher)
    assert (len(oracle.drawn), len(teacher.drawn)) == (1, 1)
    first, same, other = monitor.trace
    assert first.golden == same.golden
    assert first.proxy == same.proxy != other.proxy
    again = monitor.again()
    assert again.trace == []
    again.evaluate(moved(oracle, teacher, 0.4), 7)
    assert again.trace[0].golden == first.golden
    assert len(monitor.trace) == 3
    assert (len(oracle.drawn), len(teacher.drawn)) == (1, 1)


def test_the_metrics_are_the_divergences_from_the_first_model():
    oracle, teacher, student = Markov(2), Markov(3), Markov(4)
    for kind in ("fkl", "rkl", "js"):
        monitor = monitored([student], oracle, teacher, divergence=SequenceDivergence(kind))
        own = student.drawn[-1] if kind != "fkl" else None
        for model, value in ((teacher, monitor.trace[0].proxy), (oracle, monitor.trace[0].golden)):
            batches = {"fkl": [model.drawn[-1]], "rkl": [own], "js": [model.drawn[-1], own]}[kind]
            assert SequenceDivergence(kind)(model, student, *batches).value == pytest.approx(value, rel=1e-6)
        batches = {"fkl": [oracle.drawn[-1]], "rkl": [teacher.drawn[-1]], "js": [oracle.drawn[-1], teacher.drawn[-1]]}
        expected = SequenceDivergence(kind)(oracle, teacher, *batches[kind]).value
        assert monitor.teacher_golden.value == pytest.approx(expected, rel=1e-6)


def test_without_an_oracle_the_detector_speaks():
    teacher, start = Markov(3), Markov(4)

    def student(share):
        return moved(start, teacher, share)

    falling = [1 - 0.9 * t**-0.25 for t in range(1, 9)]
    monitor = HackingMonitor(
        teacher, val_prompts=VALIDATION, max_new_tokens=ANSWER, detector=PowerLawDetector(floor=0.05)
    )
    for epoch, share in enumerate([0.0, *falling, *[falling[-1]] * 12]):
        monitor.evaluate(student(share), epoch)
    assert monitor.trace[0].golden is None
    assert monitor.teacher_golden is None
    assert monitor.onset == monitor.proxy_onset
    assert 9 <= monitor.onset <= 16


def test_a_perfect_copy_has_no_logarithm_and_does_not_stop_the_monitor():
    teacher = Markov(3)
    monitor = monitored([copy.deepcopy(teacher), copy.deepcopy(teacher)], None, teacher)
    assert [row.proxy for row in monitor.trace] == [0.0, 0.0]


def test_fit_shows_the_student_when_it_is_due():
    trained = distiller()
    monitor = HackingMonitor(trained.teacher, Markov(2), VALIDATION, every=3, max_new_tokens=ANSWER)
    trained.fit(4, monitor)
    assert [row.epoch for row in monitor.trace] == [0, 3, 4]
    assert [row.steps for row in monitor.trace] == [0, 6, 8]
    assert [row.generated_tokens for row in monitor.trace] == [0, 24, 24]
    assert monitor.trace[-1].proxy < monitor.trace[0].proxy
    trained.fit(2, monitor)
    assert [row.epoch for row in monitor.trace] == [0, 3, 4, 6]


def test_bad_monitors_are_named():
    trained = distiller()
    with pytest.raises(ValueError, match="1 of 2 are among prompts"):
        trained.fit(1, HackingMonitor(trained.teacher, val_prompts=[PROMPTS[0], [3, 3, 3]], max_new_tokens=ANSWER))
    with pytest.raises(ValueError, match="distance to the same teacher"):
        trained.fit(1, HackingMonitor(Markov(1), val_prompts=VALIDATION, max_new_tokens=ANSWER))
    with pytest.raises(ValueError, match="val_prompts must hold at least one"):
        HackingMonitor(Markov(1))
    used = PowerLawDetector()
    used.update(1, 1.0)
    with pytest.raises(ValueError, match="detector must have no history"):
        HackingMonitor(Markov(1), val_prompts=VALIDATION, detector=used)
    monitor = monitored([Markov(4)], None, Markov(3))
    with pytest.raises(ValueError, match="epoch must be at least 1, got 0"):
        monitor.evaluate(Markov(4), 0)
    larger = Markov()
    larger.vocab_size = 5
    with pytest.raises(ValueError, match="share their tokenizer"):
        monitor.evaluate(larger, 1)
    with pytest.raises(ValueError, match="share their tokenizer"):
        HackingMonitor(Markov(1), larger, VALIDATION)


# ----------------------------------------------------------------------------------------------------------- the study


def study(**options):
    tuned = {"teacher_epochs": 4, "student_epochs": 1, "sft_lr": 0.1, "epochs": 3, "max_new_tokens": ANSWER}
    options = tuned | {"generator": torch.Generator().manual_seed(0)} | options
    oracle = options.pop("oracle", None) or Markov(2)
    sets = {
        "sft_prompts": [[s, s, s] for s in range(4)],
        "prompts": [[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]],
        "val_prompts": [[0, 1, 2], [3, 1, 2]],
    }
    return controlled_study(oracle, lambda: Markov(), lambda: Markov(5), **(sets | options))


def test_the_study_trains_both_on_the_same_answers_and_every_arm_from_the_same_student():
    oracle = Markov(2)
    arms = {"offline": DistillationArm(), "again": DistillationArm(), "few": DistillationArm(diversity=3)}
    result = study(oracle=oracle, arms=arms)
    assert sorted(map(len, oracle.drawn)) == [2, 4]  # validation and fine-tuning answers, each once
    assert result.runs["offline"].trace == result.runs["again"].trace
    starts = {run.trace[0] for run in result.runs.values()}
    assert len(starts) == 1
    assert result.teacher_golden.value > 0
    assert result.runs["offline"].trace != result.runs["few"].trace
    assert len(result.runs["few"].history) == len(result.runs["offline"].history) == 3
    assert torch.equal(oracle.table, Markov(2).table)


def test_fine_tuning_approaches_the_oracle():
    oracle = Markov(2)
    near = study(oracle=oracle, teacher_epochs=8, sft_prompts=[[s % 3, s % 4, s % 4, 1] for s in range(400)])
    far = study(teacher_epochs=0)
    assert near.teacher_golden.value < 0.3 * far.teacher_golden.value
    assert torch.equal(far.teacher.table, torch.zeros(SYMBOLS, SYMBOLS))


def test_fine_tuning_is_maximum_likelihood():
    from workingpapers.alignment import TrainingConfig
    from workingpapers.alignment.teacher_hacking.study import SupervisedTrainer

    model = Markov(1)
    batch = collate_sequences([([0, 1], [2, 3]), ([1], [2])])
    trainer = SupervisedTrainer(model, batch, TrainingConfig(batch_size=2, max_grad_norm=1e6))
    table = model.table.detach().clone().requires_grad_()
    loss = -select_logprobs(table[[1, 2, 1]], torch.tensor([2, 3, 2])).sum() / 2
    loss.backward()
    (row,) = trainer.train()
    assert row["loss"] == pytest.approx(float(loss.detach()))
    assert row["gradient_norm"] == pytest.approx(float(table.grad.norm()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_prompts": [[0, 0, 0]]}, r"sft_prompts and val_prompts must have no prompt in common, got \[0, 0, 0\]"),
        ({"arms": {}}, "arms must name at least one"),
        ({"arms": {"few": DistillationArm(diversity=7)}}, r"arms\['few'\] must keep at least one of 6 prompts"),
        ({"teacher_epochs": -1}, "teacher_epochs must be at least 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": 0.0}, "learning_rate must be above 0"),
        ({"sft_batch_size": 0}, "batch_size must be at least 1"),
        ({"reduction": "none"}, "reduction must be one of"),
        ({"prompts": []}, "prompts must hold at least one"),
    ],
)
def test_bad_studies_are_named(options, message):
    oracle = Markov(2)
    with pytest.raises(ValueError, match=message):
        study(oracle=oracle, **options)
    assert oracle.drawn == []  # before any work


def test_bad_arms_are_named():
    with pytest.raises(ValueError, match="source must be one of"):
        DistillationArm("online")
    with pytest.raises(ValueError, match="kind must be one of"):
        DistillationArm(loss="kl")
    with pytest.raises(ValueError, match="diversity must be at least 1"):
        DistillationArm(diversity=0)


# ------------------------------------------------------------------------------------------------- transformers models


def causal(seed, transformers):
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=5, pad_token_id=0, attention_dropout=0.5, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


def encoder_decoder(seed, transformers):
    config = transformers.T5Config(
        vocab_size=13, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=5, dropout_rate=0.5,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [causal, encoder_decoder])
@pytest.mark.parametrize("source", ["offline", "online_teacher", "online_student"])
def test_transformers_models_are_distilled(make, source):
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        teacher, student = make(0, transformers), make(1, transformers)
    prompts = [[1, 2], [3], [4, 6, 7], [8, 9]]
    monitor = HackingMonitor(
        teacher, None, [[2, 1], [9]], every=6, max_new_tokens=4, generator=torch.Generator().manual_seed(0)
    )
    trained = Distiller(
        teacher,
        student,
        prompts,
        source,
        lr=1e-2,
        batch_size=2,
        max_new_tokens=4,
        generator=torch.Generator().manual_seed(0),
        gradient_checkpointing=make is causal,
    )
    trained.fit(6, monitor)
    assert monitor.trace[-1].proxy < 0.9 * monitor.trace[0].proxy
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert 1 <= trained.history[0]["tokens"] <= 4
