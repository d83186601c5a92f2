"""The listing as static pages, and the table of papers in the README; both read the catalogue and the evidence only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from workingpapers.desk import evidence
from workingpapers.desk.catalogue import FIELDS, Paper, papers, status
from workingpapers.desk.expect import SEVERITY, worst

START, END = "<!-- papers: written by `workingpapers report --readme` -->", "<!-- end of papers -->"
MARKS = {"holds": "✓ holds", "fails": "✗ fails", "inconclusive": "? can't be told", "crashed": "! crashed"}


def write_site(directory: Path) -> list[Path]:
    """Write index.html, one page per paper and the style sheet into `directory`; returns what was written."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("workingpapers.desk"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(number=_number, words=_words, day=_day)
    pages = {found.slug: _page(found) for found in papers().values()}
    shared = {"fields": FIELDS, "marks": MARKS, "version": evidence.versions().get("workingpapers", "")}
    written = []
    index = environment.get_template("index.html").render(
        listings=_by_date(list(pages.values())), pages=pages, **shared
    )
    for name, text in [
        ("index.html", index),
        *(
            (f"{slug}.html", environment.get_template("paper.html").render(page=page, **shared))
            for slug, page in pages.items()
        ),
        (
            "style.css",
            resources.files("workingpapers.desk").joinpath("templates/style.css").read_text(encoding="utf-8"),
        ),
    ]:
        directory.mkdir(parents=True, exist_ok=True)
        written.append(directory / name)
        written[-1].write_text(text, encoding="utf-8")
    return written


def update_readme(readme: Path) -> Path:
    """Replace the table between the two marks in a README.

    Raises
    ------
    ValueError : the marks are not there.
    """
    text = readme.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise ValueError(f"{readme} lacks the lines that enclose the table:\n{START}\n{END}")
    before, _, rest = text.partition(START)
    readme.write_text(f"{before}{START}\n{readme_table()}{END}{rest.partition(END)[2]}", encoding="utf-8")
    return readme


def readme_table() -> str:
    """Papers that work, with their verdicts; then how many are listed in each field."""
    lines = ["| paper | field | claims | speed-up over peers | evidence |", "|---|---|---|---|---|"]
    for found in papers().values():
        if status(found) == "working":
            page = _page(found)
            age = ", older than the code" if page["stale"] else ""
            lines.append(
                f"| [{found.title}](https://arxiv.org/abs/{found.arxiv}) `{found.slug}` | {found.field} "
                f"| {page['tally']} | {page['speed'] or '–'} | {page['scale']}, {page['recorded']}{age} |"
            )
    waiting = {field: sum(p.field == field and status(p) == "listed" for p in papers().values()) for field in FIELDS}
    listed = ", ".join(f"{field} {count}" for field, count in waiting.items() if count)
    return "\n".join(lines) + f"\n\nListed, not working yet ({sum(waiting.values())}): {listed}.\n"


def _page(found: Paper) -> dict[str, Any]:
    """What a page shows of one paper."""
    working = status(found) == "working"
    recorded = evidence.load(found.slug)["claims"] if working else {}
    scale = next((scale for scale in ("laptop", "paper", "smoke") if recorded.get(scale)), None)
    entries = recorded.get(scale, []) if scale else []
    others = [entry for name, more in recorded.items() if name != scale for entry in more]
    claims = [entry for entry in entries if entry["kind"] == "claim"]
    benchmarks = [entry for entry in entries if entry["kind"] == "benchmark"]
    return {
        "paper": found,
        "status": status(found),
        "scale": scale,
        "claims": claims,
        "benchmarks": benchmarks,
        "entries": entries + others,
        "verdict": worst([entry["verdict"] for entry in claims]) if claims else None,
        "tally": _tally(claims),
        "speed": _speed(benchmarks),
        "stale": any(evidence.is_stale(found, entry) for entry in entries),
        "recorded": max((entry["recorded"] for entry in entries), default="")[:10],
        "figures": _figures([*entries, *others]),
    }


def _figures(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from markupsafe import Markup

    from workingpapers.desk.figure import svg

    return {_key(entry): Markup(svg(entry["figure"])) for entry in entries if "figure" in entry}


def _key(entry: dict[str, Any]) -> str:
    return f"{entry['claim']}-{entry['scale']}"


def _by_date(pages: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Listings, newest first; a paper that stands in two is shown under both dates."""
    dates = {date for page in pages for date in page["paper"].listings}
    ordered = sorted(dates, key=lambda date: datetime.strptime(f"{date} 2000", "%b %d %Y"), reverse=True)
    return [(date, [page for page in pages if date in page["paper"].listings]) for date in ordered]


def _tally(claims: Sequence[dict[str, Any]]) -> str:
    counts = {verdict: sum(entry["verdict"] == verdict for entry in claims) for verdict in SEVERITY}
    short = {"holds": "hold", "fails": "fail", "inconclusive": "open", "crashed": "crashed"}
    return ", ".join(f"{count} {short[verdict]}" for verdict, count in counts.items() if count)


def _speed(benchmarks: Sequence[dict[str, Any]]) -> str:
    """The range of measured speed-ups over the benchmarks' judgements."""
    found = [
        judgement["measured"]
        for entry in benchmarks
        for judgement in entry["expectations"]
        if judgement["expectation"].endswith("(speed-up)") and judgement["measured"] is not None
    ]
    if not found:
        return ""
    low, high = (f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in (min(found), max(found)))
    return f"{low}×" if low == high else f"{low}× to {high}×"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    text = f"{value:.4g}"
    return re.sub(r"e([+-])0*(\d+)", lambda m: f"e{'-' if m[1] == '-' else ''}{m[2]}", text).replace("-", "−")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _day(stamp: str) -> str:
    return stamp[:10]
