"""The smoke claims of every working paper, measured afresh."""

import pytest

from workingpapers.desk import evidence
from workingpapers.desk.catalogue import papers, status
from workingpapers.desk.check import check
from workingpapers.desk.run import Pool
from workingpapers.desk.source import load_claims
from workingpapers.desk.store import Store

# a measurement may look at a solver that has not converged
pytestmark = pytest.mark.filterwarnings("default::RuntimeWarning")

CLAIMS = [
    pytest.param(paper, claim, id=f"{paper.slug}-{claim.name}")
    for paper in papers().values()
    if status(paper) == "working"
    for claim in load_claims(paper.module)
]


@pytest.mark.parametrize(("paper", "claim"), [param for param in CLAIMS if param.values[1].kind == "claim"])
def test_what_held_at_smoke_scale_holds_now(paper, claim, tmp_path):
    with Store(tmp_path / "store.sqlite") as store, Pool(jobs=0) as pool:
        outcome = check(claim, scale="smoke", store=store, pool=pool)
    recorded = evidence.verdicts(evidence.load(paper.slug)).get("smoke", {})
    if outcome is None:
        assert claim.name not in recorded
        return
    assert not outcome.crashed, outcome.crashed[0].error
    assert recorded[claim.name] != "holds" or outcome.verdict == "holds", outcome.judgements


@pytest.mark.parametrize(("paper", "claim"), [param for param in CLAIMS if param.values[1].kind == "benchmark"])
def test_every_contender_runs(paper, claim):
    contenders = set()
    for cell in claim.cells("smoke"):
        if cell.contender not in contenders:
            contenders.add(cell.contender)
            assert all(row["seconds"] > 0 for row in claim.rows(cell))
