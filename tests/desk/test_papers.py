"""The catalogue: all 92 papers, every malformed row named, status computed from the tree."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workingpapers.desk import catalogue
from workingpapers.desk.catalogue import FIELDS, CatalogueError, Paper, UnknownPaper, paper, papers, read_catalogue

TOML = Path(catalogue.__file__).with_name("papers")

ROW = """
[colide-two]
title = "A title of its own"
module = "causality.colide_two"
arxiv = "2912.00001"
code = ""
listings = ["Mar 11"]
names = ["Two"]
summary = "Says something."
"""


@pytest.fixture
def toml(tmp_path):
    """A copy of the real catalogue that a test may spoil."""
    return Path(shutil.copytree(TOML, tmp_path / "papers"))


def test_all_papers_of_the_listings_are_there():
    catalogued = papers()
    assert len(catalogued) == 92
    assert {found.field for found in catalogued.values()} == set(FIELDS)
    assert sorted({date for found in catalogued.values() for date in found.listings}) == ["Jul 29", "Mar 11"]
    assert sorted(slug for slug, found in catalogued.items() if len(found.listings) == 2) == [
        "dynamic-submodular",
        "halpern",
    ]
    assert paper("colide") == Paper(
        slug="colide",
        title="CoLiDE: Concomitant Linear DAG Estimation",
        field="causality",
        module="causality.colide",
        arxiv="2310.02895",
        code="SAMiatto/colide",
        listings=("Mar 11",),
        names=paper("colide").names,
        summary=paper("colide").summary,
        note="",
    )


@pytest.mark.parametrize("slug", sorted(papers()))
def test_summary_is_one_sentence_of_15_to_35_words(slug):
    summary = papers()[slug].summary
    assert 15 <= len(summary.split()) <= 35
    assert summary[0].isupper()
    assert summary.endswith(".")
    assert ". " not in summary


def test_papers_can_be_changed_by_the_caller_without_harm():
    papers().clear()
    assert len(papers()) == 92
    with pytest.raises(dataclasses.FrozenInstanceError):
        paper("colide").title = "other"


def test_reading_everything_takes_under_30_ms():
    seconds = []
    for _ in range(5):
        start = time.process_time()
        read_catalogue(TOML)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.030


def test_nothing_heavy_is_imported():
    heavy = "{'torch', 'numpy', 'pandas', 'scipy', 'sklearn', 'matplotlib', 'importlib.metadata'}"
    program = f"""if True:
        import sys
        from workingpapers.desk import catalogue, listing, search
        known = catalogue.papers()
        [catalogue.status(found) for found in known.values()]
        search.search("graph", known, claims=search.search_claims(known.values()))
        print(sorted({heavy} & set(sys.modules)), [name for name in sys.modules if ".claims." in name])
    """
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[] []"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (('arxiv = "2912.00001"\n', ""), r"causality\.toml: \[colide-two\] arxiv: the key is missing"),
        (("[colide-two]\n", '[colide-two]\nyear = "2025"\n'), r"\[colide-two\] year: no such key; the keys are title"),
        (('"A title of its own"', "7"), r"\[colide-two\] title: must be a text, got 7"),
        (('"A title of its own"', '""'), r"\[colide-two\] title: must be one line without stray blanks, got ''"),
        (('"A title of its own"', '"two  blanks"'), r"title: must be one line without stray blanks, got 'two  blanks'"),
        (('["Two"]', '"Two"'), r"names: must be a list of texts, got 'Two'"),
        (('["Two"]', '["Two", 2]'), r"names: must be a list of texts, got \['Two', 2\]"),
        (('["Two"]', "[]"), r"names: must hold at least one entry and none twice, got \[\]"),
        (('["Two"]', '["Two", "Two"]'), r"names: must hold at least one entry and none twice"),
        (('["Two"]', '["two words"]'), r"names: must be names that Python can import, got 'two words'"),
        (('["Mar 11"]', '["11 March"]'), r"listings: a date must look like 'Mar 11', got '11 March'"),
        (
            ("causality.colide_two", "control.two"),
            r"module: must be causality\.<name of the module>, got 'control\.two'",
        ),
        (("causality.colide_two", "causality.colide-two"), r"module: must be causality\.<name of the module>"),
        (("2912.00001", "2912.00001v2"), r"arxiv: must look like 2310\.01174, got '2912\.00001v2'"),
        (("2912.00001", "2913.00001"), r"arxiv: must look like 2310\.01174"),
        (('code = ""', 'code = "https://github.com/a/b"'), r"code: must be owner/name on GitHub, or empty"),
        (("[colide-two]", "[CoLiDE]"), r"\[CoLiDE\] a slug is made of lower-case letters"),
        (("[colide-two]", "[light-sb]"), r"\[light-sb\] this slug already stands in causality\.toml"),
        (
            ("A title of its own", "Light Schrödinger bridge"),
            r"title: \[colide-two\] already has 'Light Schrödinger Br",
        ),
        (("causality.colide_two", "causality.colide"), r"\[colide-two\] module: \[colide\] already has"),
        (("2912.00001", "2310.02895"), r"\[colide-two\] arxiv: \[colide\] already has '2310\.02895'"),
        (("[colide-two]", "[colide]"), r"causality\.toml: not a TOML file: .*line"),
        (('names = ["Two"]', "names = ["), r"causality\.toml: not a TOML file"),
        (
            (ROW, "colide-two = 3\n" + ROW.replace("colide-two", "three")),
            r"\[colide-two\] a paper must be a table, got 3",
        ),
    ],
)
def test_a_malformed_row_is_named(toml, spoil, message):
    before, after = spoil
    assert before in ROW
    row = ROW.replace(before, after)
    file = toml / "causality.toml"
    text = file.read_text(encoding="utf-8")
    file.write_text(row + text if row.startswith("colide-two = ") else text + row, encoding="utf-8")
    with pytest.raises(CatalogueError, match=message):
        read_catalogue(toml)


def test_the_unspoiled_row_is_accepted(toml):
    with (toml / "causality.toml").open("a", encoding="utf-8") as file:
        file.write(ROW)
    assert read_catalogue(toml)["colide-two"].field == "causality"


def test_files_and_fields_must_agree(toml):
    (toml / "geometry.toml").write_text("")
    with pytest.raises(CatalogueError, match=r"geometry\.toml: no field has this name; the fields are alignment, "):
        read_catalogue(toml)
    (toml / "geometry.toml").unlink()
    (toml / "control.toml").unlink()
    with pytest.raises(CatalogueError, match=r"control\.toml: the file of this field is missing"):
        read_catalogue(toml)
    (toml / "control.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(CatalogueError, match=r"control\.toml: not a TOML file"):
        read_catalogue(toml)


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("colid", "colide"),
        ("CoLiDE", "colide"),
        ("light_sb", "light-sb"),
        ("causality.colide", "colide"),
        ("schedules", "refined-schedules"),
        ("haplern", "halpern"),
    ],
)
def test_an_unknown_slug_suggests_the_nearest(asked, near):
    with pytest.raises(UnknownPaper, match=rf"^no paper is called '{asked}'; did you mean {near}\b"):
        paper(asked)


@pytest.mark.parametrize("asked", ["", "zzz", "\N{PILE OF POO}", "x" * 10_000])
def test_a_slug_like_none_is_refused_without_a_guess(asked):
    with pytest.raises(UnknownPaper, match="`workingpapers list` shows all slugs"):
        paper(asked)


# --------------------------------------------------------------------------------------------------------------------
# Status


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Empty directories for claims and evidence."""
    claims, evidence = tmp_path / "claims", tmp_path / "evidence"
    (claims / "causality").mkdir(parents=True)
    evidence.mkdir()
    monkeypatch.setattr(catalogue, "_claims_directory", lambda: claims)
    monkeypatch.setenv("WORKINGPAPERS_EVIDENCE", str(evidence))
    return claims, evidence


@pytest.mark.parametrize("source", ["colide.py", "colide/__init__.py"])
def test_a_paper_works_when_claims_and_evidence_exist(tree, source):
    claims, evidence = tree
    colide = paper("colide")
    assert catalogue.status(colide) == "listed"
    assert catalogue.claims_path(colide) is None

    (evidence / "colide.json").write_text("{}")
    assert catalogue.status(colide) == "listed"

    module = claims / "causality" / source
    module.parent.mkdir(exist_ok=True)
    module.write_text("raise RuntimeError('imported')")
    assert catalogue.status(colide) == "working"
    assert catalogue.claims_path(colide) == module

    (evidence / "colide.json").unlink()
    assert catalogue.status(colide) == "listed"


def test_the_claims_are_looked_for_beside_the_package():
    assert catalogue._claims_directory() == Path(catalogue.__file__).parents[1] / "claims"


def test_evidence_lies_in_the_checkout_in_the_wheel_or_where_one_says(tmp_path, monkeypatch):
    monkeypatch.delenv("WORKINGPAPERS_EVIDENCE", raising=False)
    for root in ("checkout/src", "site-packages"):
        (tmp_path / root / "workingpapers" / "desk").mkdir(parents=True)
    (tmp_path / "checkout" / "pyproject.toml").touch()
    (tmp_path / "pyproject.toml").touch()  # of a project that merely has the package installed inside it

    monkeypatch.setattr(catalogue, "__file__", str(tmp_path / "checkout/src/workingpapers/desk/catalogue.py"))
    assert catalogue.evidence_path("colide") == tmp_path / "checkout" / "evidence" / "colide.json"

    monkeypatch.setattr(catalogue, "__file__", str(tmp_path / "site-packages/workingpapers/desk/catalogue.py"))
    assert catalogue.evidence_path("colide") == tmp_path / "site-packages/workingpapers/desk/evidence/colide.json"

    monkeypatch.setenv("WORKINGPAPERS_EVIDENCE", str(tmp_path))
    assert catalogue.evidence_path("colide") == tmp_path / "colide.json"
