"""The rules read what reports say, and reports written from findings are read back."""

import pytest

from workingpapers.alignment.judge_preference import (
    CHEST,
    ClinicalJudge,
    Concept,
    Finding,
    clinical_errors,
    extract_findings,
    sample_findings,
    score_report,
    write_report,
)


@pytest.mark.parametrize(
    ("text", "present", "denied"),
    [
        ("No pneumothorax, effusion, or edema.", [], ["pneumothorax", "pleural effusion", "edema"]),
        ("No pneumothorax, mild edema is seen.", ["edema"], ["pneumothorax"]),
        (
            "No pneumothorax but cardiomegaly; lungs without consolidation",
            ["cardiomegaly"],
            ["pneumothorax", "consolidation"],
        ),
        ("Edema has resolved. Lungs are clear of consolidation.", [], ["edema", "consolidation"]),
        ("No change in the pleural effusion.", ["pleural effusion"], []),
        ("There is not only edema but atelectasis.", ["edema", "atelectasis"], []),
        ("PULMONARY NODULES, Airspace Opacities and pneumothoraces", ["nodule", "consolidation", "pneumothorax"], []),
        ("Atelectasis and no effusion", ["atelectasis"], ["pleural effusion"]),
        ("No effusion. Small effusion on the left.", ["pleural effusion"], []),
        ("The heart is normal.", [], []),
    ],
)
def test_assertion_and_denial(text, present, denied):
    found = extract_findings(text)
    assert [name for name, finding in found.items() if finding is not None] == present
    assert [name for name, finding in found.items() if finding is None] == denied


def test_sides_and_degrees_belong_to_the_nearest_finding():
    found = extract_findings("Large left effusion and small right pneumothorax, atelectasis in both lungs.")
    assert found == {
        "pleural effusion": Finding("pleural effusion", "left", "severe"),
        "pneumothorax": Finding("pneumothorax", "right", "mild"),
        "atelectasis": Finding("atelectasis", "bilateral", None),
    }


def test_errors_are_counted_by_kind_and_scored():
    reference = "Mild left effusion. Cardiomegaly. Right nodule. No edema."
    score = score_report("Severe right effusion. Edema. Nodule.", reference)
    assert score.matched == ("nodule", "pleural effusion")
    assert score.omissions == ("cardiomegaly",)
    assert score.hallucinations == ("edema",)
    assert score.wrong_side == score.wrong_degree == ("pleural effusion",)
    assert (score.precision, score.recall, score.f1) == (2 / 3, 2 / 3, 2 / 3)
    assert score.green == 2 / (2 + 4)
    assert ClinicalJudge("recall")("Edema. Nodule.", reference) == 1 / 3
    nothing = score_report("Normal.", "No edema.")
    assert (nothing.green, nothing.f1, nothing.precision, nothing.recall) == (1.0, 1.0, 1.0, 1.0)


def test_recall_rewards_a_report_that_names_everything_and_green_does_not():
    everything = " ".join(f"{concept.phrases[0]}." for concept in CHEST)
    plain = "Edema."
    assert ClinicalJudge("recall")(everything, "Edema and left effusion.") == 1.0
    assert ClinicalJudge()(everything, "Edema and left effusion.") < ClinicalJudge()(plain, "Edema and left effusion.")


def test_corpus_errors_are_means_per_report_and_micro_averages():
    errors = clinical_errors(["Edema.", "Nodule. Edema."], [[Finding("edema"), Finding("nodule")], "Left nodule."])
    assert (errors.omissions, errors.hallucinations) == (0.5, 0.5)
    assert (errors.precision, errors.recall, errors.f1) == (2 / 3, 2 / 3, 2 / 3)
    with pytest.raises(ValueError, match="references must be one per candidate, got 0 for 1"):
        clinical_errors(["Edema."], [])


def test_what_is_written_from_findings_is_read_back():
    for seed, findings in enumerate(sample_findings(200, random_state=1)):
        text = write_report(findings, denied=3, random_state=seed)
        read = extract_findings(text)
        assert {finding for finding in read.values() if finding is not None} == set(findings)
        assert list(read.values()).count(None) == min(3, len(CHEST) - len(findings))
        assert ClinicalJudge()(text, text) == 1.0


def test_writing_uses_every_phrase_and_follows_its_seed():
    finding = [Finding("edema", degree="mild")]
    texts = [write_report(finding, random_state=seed) for seed in range(60)]
    assert all(any(phrase in text for text in texts) for phrase in CHEST[4].phrases)
    assert texts[7] == write_report(finding, random_state=7)
    assert sample_findings(5, random_state=2) == sample_findings(5, random_state=2)
    assert all(sample_findings(500, rate=0.01))
    rate = sum(map(len, sample_findings(2_000))) / 2_000 / len(CHEST)
    assert rate == pytest.approx(0.4, abs=0.02)


def test_another_lexicon_is_another_specialty():
    skin = (Concept("melanoma", ("melanoma", "malignant mole")), Concept("eczema", ("eczema",)))
    assert ClinicalJudge("f1", skin)("No malignant mole. Eczema.", "Eczema") == 1.0
    assert sample_findings(1, rate=1.0, lexicon=skin) == [(Finding("melanoma"), Finding("eczema"))]
    assert write_report([], denied=0, lexicon=skin) == ""


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Finding("edema", "middle"), "side must be one of"),
        (lambda: Finding("edema", degree="huge"), "degree must be one of"),
        (lambda: Concept("edema", ()), "phrases must be at least one non-empty phrase"),
        (lambda: Concept("edema", "edema"), "phrases must be at least one"),
        (lambda: ClinicalJudge("bleu"), "measure must be one of"),
        (lambda: sample_findings(0), "n must be at least 1"),
        (lambda: sample_findings(1, rate=0.0), "rate must be above 0"),
        (lambda: write_report([Finding("scoliosis")]), r"findings must be in the lexicon, got \['scoliosis'\]"),
        (lambda: write_report([], denied=-1), "denied must be at least 0"),
        (lambda: extract_findings("edema", ()), "lexicon must have at least one finding"),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
