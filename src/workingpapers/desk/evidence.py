"""What the last recorded runs measured: `evidence/<slug>.json`, written by the program and read by page and README."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from workingpapers.desk.catalogue import Paper, evidence_path
from workingpapers.desk.expect import Verdict, worst

FORMAT = 1
POINTS = 40  # of a recorded curve
VERSIONS = ("workingpapers", "numpy", "scipy", "torch", "scikit-learn", "transformers", "numba")


def load(slug: str) -> dict[str, Any]:
    """The recorded evidence of a paper: {"paper": slug, "claims": {scale: [outcome, ...]}}, empty when there is none.

    Raises
    ------
    ValueError : the file is damaged or of a newer format.
    """
    path = evidence_path(slug)
    if not path.is_file():
        return {"format": FORMAT, "paper": slug, "claims": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or found["paper"] != slug or not isinstance(found["claims"], dict):
            raise ValueError(f"format {found['format']!r} of paper {found['paper']!r}")
    except (ValueError, KeyError, TypeError) as damage:
        raise ValueError(f"{path} is not evidence of {slug} in format {FORMAT}: {damage}") from damage
    return dict(found)


def record(paper: Paper, outcomes: Sequence[Any]) -> Path:
    """Write what these runs measured into the paper's evidence, in place of older runs of the same claims and scales.

    Parameters
    ----------
    paper : whose evidence.
    outcomes : of `desk.check.check`, at any scales.
    """
    from workingpapers.desk.source import module_fingerprint

    evidence = load(paper.slug)
    stamp = {
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device(),
        "versions": versions(),
        "fingerprint": module_fingerprint(paper.module),
    }
    for outcome in outcomes:
        recorded = evidence["claims"].setdefault(outcome.scale, [])
        entry = {**outcome.as_json(), **stamp, **_measurements(outcome), **_series(outcome)}
        recorded[:] = [old for old in recorded if old["claim"] != entry["claim"]] + [entry]
    order = _order_of_claims(paper)
    for recorded in evidence["claims"].values():
        # a claim that was renamed or dropped takes its evidence along
        recorded[:] = sorted((old for old in recorded if old["claim"] in order), key=lambda old: order[old["claim"]])
    path = evidence_path(paper.slug)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(evidence, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def verdicts(evidence: Mapping[str, Any]) -> dict[str, dict[str, Verdict]]:
    """Verdict by scale and claim."""
    return {
        scale: {entry["claim"]: entry["verdict"] for entry in entries}
        for scale, entries in evidence["claims"].items()
        if entries
    }


def overall(evidence: Mapping[str, Any], scale: str) -> Verdict | None:
    """The worst verdict at a scale, None when nothing was recorded."""
    found = verdicts(evidence).get(scale, {})
    return worst(list(found.values())) if found else None


def is_stale(paper: Paper, entry: Mapping[str, Any]) -> bool:
    """Whether the source of the claims or of the method has changed since this was recorded."""
    from workingpapers.desk.source import module_fingerprint

    return bool(entry["fingerprint"] != module_fingerprint(paper.module))


def versions() -> dict[str, str]:
    """Of Python and of the libraries a measurement may depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device() -> str:
    """What measured: processor, cores, and the GPU when torch is loaded and sees one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    named = _processor() or platform.processor() or platform.machine()
    torch = sys.modules.get("torch")
    gpu = f", {torch.cuda.get_device_name()}" if torch is not None and torch.cuda.is_available() else ""
    return f"{named}, {cores} cores{gpu}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _order_of_claims(paper: Paper) -> dict[str, int]:
    from workingpapers.desk.source import load_claims

    return {claim.name: i for i, claim in enumerate(load_claims(paper.module))}


def _measurements(outcome: Any) -> dict[str, Any]:
    """Mean and deviation of every metric at every grid point, over the seeds; of a curve, its end."""
    from workingpapers.desk.check import finite_json

    table, replicate = outcome.table, outcome.table.replicate
    # a measurement may return a row for each method instead of having them on an axis
    inner = [table.contest] if table.contest in table.frame.columns and table.contest not in table.axes else []
    frame = table.frame.groupby(["cell", *inner]).tail(1)
    keys = [axis for axis in table.axes if axis != replicate] + inner
    metrics = [
        column
        for column in frame.select_dtypes(["number", "bool"]).columns
        if column not in keys and column not in (replicate, "cell")
    ]
    rows = []
    for values, group in frame.groupby(keys, sort=False) if keys else [((), frame)]:
        numbers = group[metrics].astype(float)
        rows.append(
            [*values]
            + [[_short(numbers[m].mean()), _short(numbers[m].std(ddof=1) if len(group) > 1 else 0.0)] for m in metrics]
            + [len(group)]
        )
    return {"measurements": finite_json({"axes": keys, "metrics": metrics, "rows": _plain(rows)})}


def _series(outcome: Any) -> dict[str, Any]:
    """What the claim's figure shows: one series per panel and method, with 95 % intervals over the seeds."""
    from workingpapers.desk.check import finite_json
    from workingpapers.desk.expect import t_interval

    plot = outcome.claim.plot
    if plot is None or plot.y not in outcome.table.frame.columns:
        return {}
    table = outcome.table.where(plot.where)
    replicate = table.replicate
    series = []
    panels = [plot.each] if plot.each else []
    named = [plot.by] if plot.by in table.frame.columns else []
    keys = [*panels, *named]
    for values, rows in table.frame.groupby(keys, sort=False) if keys else [((), table.frame)]:
        labels = dict(zip(keys, values, strict=True))
        points = []
        if plot.kind == "scatter":
            points = [[x, y, None, None] for x, y in zip(rows[plot.x], rows[plot.y], strict=True)]
        else:
            for x, group in rows.groupby(plot.x, sort=plot.kind == "line"):
                sample = group.groupby(replicate)[plot.y].mean() if replicate else group[plot.y]
                low, high = t_interval(sample.astype(float).tolist(), 0.95) or (None, None)
                points.append([x, _short(float(sample.mean())), _short(low), _short(high)])
        series.append(
            {"panel": labels.get(plot.each), "name": labels.get(plot.by), "points": _thinned(points, plot.log)}
        )
    shown = {"kind": plot.kind, "x": plot.x, "y": plot.y, "by": plot.by, "log": plot.log, "each": plot.each}
    return {"figure": finite_json({**shown, "series": _plain(series)})}


def _thinned(points: list[Any], log: str) -> list[Any]:
    """At most `POINTS` points, evenly spaced along the axis as it is drawn."""
    if len(points) <= POINTS:
        return points
    last = len(points) - 1
    if "x" in log:
        chosen = {round((last + 1) ** (i / (POINTS - 1))) - 1 for i in range(POINTS)}
    else:
        chosen = {round(last * i / (POINTS - 1)) for i in range(POINTS)}
    return [points[i] for i in sorted(chosen)]


def _plain(value: Any) -> Any:
    """NumPy scalars as Python's."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def _short(number: float | None) -> float | None:
    """Six significant digits: evidence is read and compared, not computed with."""
    return None if number is None else float(f"{number:.6g}")
