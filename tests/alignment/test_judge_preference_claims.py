"""The test bed of the claims is what it says; the paper-scale claim runs, once, at the smallest size."""

import pytest
import torch

from workingpapers.alignment.judge_preference import clinical_errors
from workingpapers.claims.alignment import judge_preference as claims
from workingpapers.claims.alignment.judge_preference import bed as beds
from workingpapers.data import DataNotInstalled
from workingpapers.desk.claim import Cell


@pytest.mark.parametrize("style", ["words", "sentences"])
def test_references_say_what_is_there_and_survive_the_vocabulary(style, monkeypatch):
    monkeypatch.setattr(beds, "MOST_STUDIES", 200)
    studies = beds.make_studies(style, 3)
    errors = clinical_errors(studies.references, studies.findings, beds.LEXICONS[style])
    assert (errors.omissions, errors.hallucinations) == (0.0, 0.0)
    vocabulary = beds.Vocabulary(studies.references)
    assert [vocabulary.decode(vocabulary.encode(text)) for text in studies.references] == studies.references
    assert studies.views.shape == (200, beds.FINDINGS)


def test_the_writer_samples_from_the_distribution_that_it_is_trained_with(monkeypatch):
    monkeypatch.setattr(beds, "MOST_STUDIES", 10)
    studies = beds.make_studies("words", 0)
    vocabulary = beds.Vocabulary([" ".join(word for pair in beds.SYNONYMS for word in pair)])
    torch.manual_seed(0)
    writer = beds.ReportWriter(vocabulary, studies.views)
    prompt = [vocabulary.first_study + 4]
    first = [(answer or [vocabulary.end])[0] for answer in writer.sample([prompt] * 20_000, 1, seed=1)]
    logits = writer(torch.tensor([prompt]), torch.ones(1, 1)).logits[0, 0]
    shares = torch.bincount(torch.tensor(first), minlength=len(logits)) / 20_000
    torch.testing.assert_close(shares, logits.detach().softmax(-1), atol=0.01, rtol=0)
    second = writer(torch.tensor([[*prompt, 3, 5]]), torch.ones(1, 3)).logits
    assert not torch.equal(second[0, 1], second[0, 2])
    other = writer(torch.tensor([[vocabulary.first_study + 5]]), torch.ones(1, 1)).logits[0, 0]
    assert not torch.equal(logits, other)


@pytest.mark.slow
def test_smollm2_writes_and_trains_at_the_smallest_size():
    pytest.importorskip("peft")
    cell = Cell({"items": 3, "steps": 1, "held_out": 2, "seed": 0, "method": "DPO LC"})
    try:
        (row,) = claims.smollm2_reports.rows(cell)
    except DataNotInstalled as missing:
        pytest.skip(str(missing))
    assert row["verbosity"] > 0
    assert 0 <= row["f1"] <= 1
