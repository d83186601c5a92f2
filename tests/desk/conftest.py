"""A catalogue of two papers, one of which works: what the desk does is tested without the real papers."""

import json
import sys
import textwrap

import pytest

import workingpapers.claims.optimization as claims_of_field
from workingpapers.desk import catalogue

TOY = '''
"""Claims of a toy."""

from workingpapers.desk.claim import Cell, Row, always, benchmark, claim, faster, line, lower, scales, seeds


@claim(
    paper="toy",
    says="The new method ends lower than the old one.",
    published="half the gap of <the> old method",
    grid={
        "size": scales(smoke=[10], laptop=[10, 100]),
        "seed": seeds(smoke=5, laptop=6),
        "method": ["new", "old"],
    },
    expect=[lower("gap", "new", than="old", where={"step": "last"})],
    plot=line(x="step", y="gap", by="method", log="y", each="size"),
)
def gap(cell: Cell) -> list[Row]:
    with cell.timed():
        start = {"new": 1.0, "old": 2.0}[cell.method] + 0.01 * cell.seed
    return [{"step": step, "gap": start / step} for step in range(1, 4)]


@claim(
    paper="toy",
    says="The old method is exact.",
    published="yes",
    grid={"seed": seeds(smoke=2, laptop=2)},
    expect=[always("error", at_most=0.5)],
)
def exact(cell: Cell) -> Row:
    return {"error": 1.0 * cell.seed}


@claim(
    paper="toy",
    says="Only at paper scale.",
    published="nothing",
    grid={"seed": scales(smoke=[], laptop=[], paper=[0])},
    expect=[always("kept")],
)
def large(cell: Cell) -> Row:
    raise RuntimeError("the machine is too small")


@benchmark(
    paper="toy",
    grid={"contender": ["ours", "theirs"]},
    expect=[faster("ours", than="theirs")],
)
def speed(cell: Cell) -> Row:
    with cell.timed():
        total = sum(range({"ours": 1_000, "theirs": 200_000}[cell.contender]))
    return {"total": total}
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The slug of a paper with claims that hold, fail and crash, and no evidence yet."""
    module = "toy"
    claims = tmp_path / "claims"
    (claims / "optimization").mkdir(parents=True)
    (claims / "optimization" / f"{module}.py").write_text(textwrap.dedent(TOY))
    monkeypatch.setattr(claims_of_field, "__path__", [*claims_of_field.__path__, str(claims / "optimization")])
    monkeypatch.setattr(catalogue, "_claims_directory", lambda: claims)
    monkeypatch.delitem(sys.modules, f"{claims_of_field.__name__}.{module}", raising=False)  # an earlier test's
    rows = [
        ("toy", "A Toy & Its <Claims>", "optimization.toy", ("Jul 29", "Mar 11"), "minimises toys"),
        ("rope", "Ropes That Solve Knots", "optimization.rope", ("Mar 11",), "ties knots"),
    ]
    made = {
        slug: catalogue.Paper(slug, title, "optimization", path, "2401.0000" + str(i), "", dates, ("solve",), summary)
        for i, (slug, title, path, dates, summary) in enumerate(rows)
    }
    monkeypatch.setattr(catalogue, "_catalogue", lambda: made)
    monkeypatch.setenv("WORKINGPAPERS_EVIDENCE", str(tmp_path / "evidence"))
    monkeypatch.setenv("WORKINGPAPERS_STORE", str(tmp_path / "store.sqlite"))
    return "toy"


@pytest.fixture
def toy_evidence(toy, tmp_path):
    """Evidence of the toy as if it had been recorded, in a moment; returns the file. Some of it looks dangerous."""
    from workingpapers.desk.source import module_fingerprint

    stamp = {
        "device": "a test",
        "versions": {"python": "3.11", "workingpapers": "0", "numpy": "2", "torch": "2"},
        "fingerprint": module_fingerprint("optimization.toy"),
    }

    def entry(claim, kind, verdict, scale="laptop", *, axes=("method",), metrics=("gap",), rows, figure=None, **judged):
        judgement = {
            "expectation": f"{claim} is as expected", "measured": -0.5, "interval": [-1.0, -0.25], "threshold": 0.0,
            "verdict": verdict, "replicates": 6, "note": "",
        }  # fmt: skip
        return {
            "paper": toy, "claim": claim, "kind": kind, "says": f"The <i>{claim}</i> & more.", "published": "<yes>",
            "scale": scale, "seed": 0, "verdict": verdict, "expectations": [judgement | judged], "cells": 12,
            "crashed": [], "seconds": 1.5, "recorded": f"2026-11-{'21' if kind == 'claim' else '20'}T10:00:00+00:00",
            **stamp, "measurements": {"axes": list(axes), "metrics": list(metrics), "rows": rows},
            **({"figure": figure} if figure else {}),
        }  # fmt: skip

    points = [[1, 1.0, 0.9, 1.1], [2, 0.5, None, None]]
    figure = {
        "kind": "line", "x": "step", "y": "gap", "by": "method", "log": "y", "each": "size",
        "series": [{"panel": 10, "name": name, "points": points} for name in ("new", "<old>")],
    }  # fmt: skip
    rows = [
        [10, "=new()", [0.1, 0.30000000000000004], [None, None], 6],
        [100, "@old, \"quoted\"", [-2.5e-7, 0.0], [3.0, 1.0], 6],
    ]  # fmt: skip
    claims = {
        "smoke": [entry("gap", "claim", "inconclusive", "smoke", rows=[["new", [0.1, 0.0], 5]])],
        "laptop": [
            entry("speed", "benchmark", "holds", rows=[["ours", [1.0, 0.1], 9]],
                  expectation="ours faster than theirs (speed-up)", measured=31.0),
            entry("gap", "claim", "holds", axes=("size", "method"), metrics=("gap", "loss"), rows=rows, figure=figure),
            entry("exact", "claim", "fails", rows=[["new", [1.0, 0.0], 2]], interval=None),
        ],
    }  # fmt: skip
    path = tmp_path / "evidence" / f"{toy}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"format": 1, "paper": toy, "claims": claims}))
    return path
