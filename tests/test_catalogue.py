"""Every paper marked working meets the mechanical half of "done"."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from workingpapers.desk import evidence
from workingpapers.desk.catalogue import papers, status
from workingpapers.desk.source import load_claims

ROOT = Path(__file__).parents[1]
WORKING = [paper for paper in papers().values() if status(paper) == "working"]

pytestmark = pytest.mark.parametrize("paper", WORKING, ids=lambda paper: paper.slug)


def method_files(paper):
    base = ROOT / "src/workingpapers" / paper.module.replace(".", "/")
    return sorted(base.glob("*.py")) if base.is_dir() else [base.with_suffix(".py")]


def test_it_is_five_things_found_by_name(paper):
    field, _, module = paper.module.partition(".")
    assert all(path.is_file() for path in method_files(paper))
    claims = ROOT / f"src/workingpapers/claims/{field}" / module
    assert claims.with_suffix(".py").is_file() or (claims / "__init__.py").is_file()
    assert list((ROOT / f"tests/{field}").glob(f"test_{module}*.py"))
    assert (ROOT / f"evidence/{paper.slug}.json").is_file()


def test_its_public_names_import_and_are_documented(paper):
    module = importlib.import_module(f"workingpapers.{paper.module}")
    assert paper.names
    for name in paper.names:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), f"{name} has no docstring"


def test_its_module_says_where_it_comes_from(paper):
    text = "\n".join(
        ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in method_files(paper)
    )
    assert paper.title.split(":")[0] in " ".join(text.split())


def test_its_claims_are_whole(paper):
    claims = load_claims(paper.module)
    assert any(claim.kind == "claim" for claim in claims)
    assert any(claim.kind == "benchmark" for claim in claims)
    for claim in claims:
        assert claim.paper == paper.slug
        assert claim.says
        assert claim.expect
        assert claim.published or claim.kind == "benchmark"


def test_its_evidence_is_at_laptop_scale_complete_and_of_this_code(paper):
    recorded = evidence.load(paper.slug)
    entries = {entry["claim"]: entry for entry in recorded["claims"]["laptop"]}
    for claim in load_claims(paper.module):
        if claim.cells("laptop"):
            entry = entries[claim.name]
            assert entry["seed"] == 0
            assert entry["verdict"] != "crashed"
            assert entry["says"] == claim.says
            assert entry["cells"] == len(claim.cells("laptop"))
            assert not evidence.is_stale(paper, entry), f"{claim.name} was recorded before the code changed"


def test_laptop_scale_fits_the_budget(paper):
    entries = evidence.load(paper.slug)["claims"]["laptop"]
    # five minutes on two idle cores; seconds are wall-clock, and a load of 14 on two cores stretches them sevenfold
    assert sum(entry["seconds"] for entry in entries) <= 7 * 2 * 300


def test_its_page_has_a_figure(paper):
    assert any("figure" in entry for entry in evidence.load(paper.slug)["claims"]["laptop"])
