"""From a paper's claims to verdicts: measure the cells, make the table, judge it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from workingpapers.desk.claim import Claim, Scale
from workingpapers.desk.expect import Judgement, Table, Verdict, worst
from workingpapers.desk.run import Pool, run
from workingpapers.desk.store import Result, Store


@dataclass(frozen=True)
class Outcome:
    """What one claim came to at one scale.

    Attributes
    ----------
    table : the rows of the cells that were measured.
    crashed : the cells that were not, with the reason.
    verdict : the worst of the judgements; `crashed` when a cell is missing, whatever the others say.
    seconds : of measuring, summed over the cells (reused ones too).
    """

    claim: Claim
    scale: Scale
    seed: int
    table: Table
    judgements: Sequence[Judgement]
    crashed: Sequence[Result]
    verdict: Verdict
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Plain data; a missing bound of a threshold is null."""
        return {
            "paper": self.claim.paper,
            "claim": self.claim.name,
            "kind": self.claim.kind,
            "says": self.claim.says,
            "published": self.claim.published,
            "scale": self.scale,
            "seed": self.seed,
            "verdict": self.verdict,
            "expectations": [finite_json(asdict(judgement)) for judgement in self.judgements],
            "cells": int(self.table.frame["cell"].nunique()) + len(self.crashed),
            "crashed": [{"cell": dict(result.values), "error": result.error} for result in self.crashed],
            "seconds": round(self.seconds, 3),
        }


def check(
    claim: Claim,
    *,
    scale: Scale,
    seed: int = 0,
    store: Store,
    pool: Pool,
    fresh: bool = False,
    progress: Callable[[Result], None] | None = None,
) -> Outcome | None:
    """Measure what is missing and judge the whole; None when the claim has no cells at this scale."""
    cells = claim.cells(scale, seed)
    if not cells:
        return None
    return judged(claim, scale, seed, run(claim, cells, store=store, pool=pool, fresh=fresh, progress=progress))


def judged(claim: Claim, scale: Scale, seed: int, results: Sequence[Result]) -> Outcome:
    """The outcome of measured cells."""
    crashed = [result for result in results if result.status == "crashed"]
    rows = [
        {"cell": i, **result.values, **row}
        for i, result in enumerate(results)
        if result.status == "done"
        for row in result.rows
    ]
    frame = pd.DataFrame(rows, columns=None if rows else ["cell", *claim.axes])
    table = Table(frame, claim.axes)
    judgements: list[Judgement] = []
    if rows:
        for expectation in claim.expect:
            try:
                judgements += expectation.judge(table)
            except KeyError as missing:
                raise ValueError(f"{claim.paper}, claim {claim.name}: {missing.args[0]}") from missing
    verdict = "crashed" if crashed else worst([judgement.verdict for judgement in judgements])
    return Outcome(claim, scale, seed, table, judgements, crashed, verdict, sum(result.seconds for result in results))


def finite_json(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by null; tuples by lists."""
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
