"""What the pages show: the evidence that speaks for a paper, noticed when it changes, survived when it is damaged."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest

from workingpapers.desk import catalogue
from workingpapers.desk.page import content
from workingpapers.desk.page.content import Current, day_of_year, read


def rewrite(path, change):
    """Change the evidence in a file, and its time even on a coarse clock."""
    evidence = json.loads(path.read_text())
    change(evidence["claims"])
    path.write_text(json.dumps(evidence))
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 1_000_000))


@pytest.fixture
def current(monkeypatch):
    monkeypatch.setattr(content, "PATIENCE", -1.0)
    return Current


def test_laptop_evidence_speaks_for_the_paper(toy_evidence):
    found = read().papers["toy"]
    assert (found.status, found.scale, found.verdict) == ("working", "laptop", "fails")
    assert [(entry["claim"], entry["scale"]) for entry in found.entries] == [
        ("gap", "laptop"),
        ("exact", "laptop"),
        ("speed", "laptop"),
        ("gap", "smoke"),
    ]
    assert found.tally == {"holds": 1, "fails": 1}
    assert found.speed == (31.0, 31.0)
    assert found.recorded == "2026-11-21T10:00:00+00:00"
    assert [slug for slug, _ in found.nearest] == ["rope"]
    assert not found.stale


def test_smoke_evidence_speaks_where_there_is_no_other(toy_evidence):
    rewrite(toy_evidence, lambda claims: claims.pop("laptop"))
    found = read().papers["toy"]
    assert (found.scale, found.verdict, found.speed) == ("smoke", "inconclusive", None)


def test_listed_papers_have_no_evidence(toy):
    found = read().papers["toy"]
    assert (found.status, found.entries, found.verdict, found.recorded) == ("listed", [], None, "")


def test_evidence_is_stale_after_a_change_of_the_source(toy_evidence, tmp_path):
    claims = tmp_path / "claims/optimization/toy.py"
    claims.write_text(claims.read_text().replace('"new": 1.0', '"new": 1.5'))
    found = read().papers["toy"]
    assert found.stale
    assert found.is_stale(found.entries[-1])


def test_source_that_is_being_edited_is_stale_and_no_error(toy_evidence, tmp_path):
    (tmp_path / "claims/optimization/toy.py").write_text("def broken(:")
    assert read().papers["toy"].stale


def test_listings_newest_first_with_papers_under_both_dates(toy):
    found = read()
    assert [(date, [page.paper.slug for page in members]) for date, members in found.listings] == [
        ("Jul 29", ["toy"]),
        ("Mar 11", ["toy", "rope"]),
    ]
    assert len(found.fields["optimization"]) == 2
    assert found.fields["causality"] == []


def test_the_leap_day_is_a_day():
    assert day_of_year("Feb 28") < day_of_year("Feb 29") < day_of_year("Mar 1")


class TestChange:
    def test_a_changed_file_is_read_again_and_only_that(self, toy_evidence, current, monkeypatch):
        following = current()
        before = following.get()
        assert following.get() is before
        rewrite(toy_evidence, lambda claims: claims["laptop"].pop())
        after = following.get()
        assert after.papers["toy"].tally == {"holds": 1}
        assert after.version != before.version
        assert after.papers["rope"] is before.papers["rope"]

    def test_evidence_that_comes_and_goes(self, toy_evidence, current):
        following = current()
        toy_evidence.rename(toy_evidence.with_suffix(".away"))
        assert following.get().papers["toy"].status == "listed"
        toy_evidence.with_suffix(".away").rename(toy_evidence)
        assert following.get().papers["toy"].status == "working"

    def test_files_are_looked_at_once_in_a_while(self, toy_evidence):
        following = Current()
        before = following.get()
        rewrite(toy_evidence, lambda claims: claims["laptop"].pop())
        assert following.get() is before

    def test_the_version_is_the_same_in_another_process(self, toy_evidence):
        program = "from workingpapers.desk.page.content import read; print(read().version)"
        versions = {
            subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, check=True,
                env={**os.environ, "PYTHONHASHSEED": seed},
            ).stdout
            for seed in ("1", "2")
        }  # fmt: skip
        assert len(versions) == 1

    def test_what_was_made_of_the_content_goes_with_it(self, toy_evidence, current):
        following = current()
        following.get().kept["answer"] = b"old"
        rewrite(toy_evidence, lambda claims: claims["laptop"].pop())
        assert following.get().kept == {}


DAMAGE = {
    "cut off": lambda text: text[:200],
    "not text": lambda text: "\udc80",
    "a number that JSON lacks": lambda text: text.replace("-0.5", "NaN", 1),
    "a verdict that there is not": lambda text: text.replace('"fails"', '"perhaps"'),
    "a row too short": lambda text: text.replace("[1.0, 0.1], 9", "9"),
    "a claim without a name": lambda text: text.replace('"claim": "gap"', '"claim": ""'),
    "a name that is a path": lambda text: text.replace('"claim": "gap"', '"claim": "../gap"'),
    "nested without end": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_evidence_is_shown_as_such_and_logged_once(toy_evidence, current, caplog, damage):
    text = damage(toy_evidence.read_text())
    toy_evidence.write_bytes(text.encode(errors="surrogateescape"))
    with caplog.at_level(logging.WARNING):
        following = current()
        found = following.get()
        following.get()
    assert len(caplog.records) == 1
    assert "toy" in caplog.text
    broken = found.papers["toy"]
    assert broken.damage
    assert str(toy_evidence) not in broken.damage
    assert (broken.status, broken.entries, broken.scale, broken.verdict, broken.stale) == (
        "working",
        [],
        None,
        None,
        False,
    )
    assert found.papers["rope"].damage == ""


def test_the_catalogue_is_read_at_once(monkeypatch):
    monkeypatch.delenv("WORKINGPAPERS_EVIDENCE", raising=False)
    times = []
    for _ in range(3):
        started = time.process_time()
        found = read()
        times.append(time.process_time() - started)
    assert len(found.papers) == len(catalogue.papers())
    assert min(times) < 0.4
