"""What the pages show of the papers: catalogue and evidence, read once and kept until a file changes.

The live page, the interface under /api and the static site all show this; none of them reads evidence itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from workingpapers.desk import evidence
from workingpapers.desk.catalogue import FIELDS, Paper, Status, evidence_directory, evidence_path, papers, status
from workingpapers.desk.claim import SCALES, Scale
from workingpapers.desk.expect import SEVERITY, Verdict, worst
from workingpapers.desk.page.models import Recorded

SHOWN_FIRST: tuple[Scale, ...] = ("laptop", "paper", "smoke")
PATIENCE = 2.0  # seconds between looks at the files
NEAREST = 4

Entry = Mapping[str, Any]  # one claim at one scale, as `desk.evidence` wrote it and `Recorded` describes it
Stamp = tuple[int, int]  # of a file: when it was written, and its size

_EVIDENCE = TypeAdapter(dict[Scale, list[Recorded]])
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PaperContent:
    """What the pages show of one paper.

    Attributes
    ----------
    status : "working" or "listed".
    entries : all recorded runs: those at `scale` first, claims before benchmarks.
    scale : which evidence speaks for the paper, None when there is none.
    nearest : (slug, similarity between 0 and 1) of the most similar other papers.
    damage : why the recorded evidence cannot be read, "" when it can; there are no entries then.
    """

    paper: Paper
    status: Status
    entries: Sequence[Entry]
    scale: Scale | None
    nearest: Sequence[tuple[str, float]] = ()
    damage: str = ""

    @cached_property
    def claims(self) -> list[Entry]:
        """The claims that speak for the paper."""
        return [entry for entry in self.entries if entry["scale"] == self.scale and entry["kind"] == "claim"]

    @cached_property
    def benchmarks(self) -> list[Entry]:
        """The benchmarks at the same scale."""
        return [entry for entry in self.entries if entry["scale"] == self.scale and entry["kind"] == "benchmark"]

    @cached_property
    def verdict(self) -> Verdict | None:
        """The worst of the claims."""
        return worst([entry["verdict"] for entry in self.claims]) if self.claims else None

    @cached_property
    def tally(self) -> dict[Verdict, int]:
        """How many claims came to each verdict, those that occur."""
        counts = {verdict: sum(entry["verdict"] == verdict for entry in self.claims) for verdict in SEVERITY}
        return {verdict: count for verdict, count in counts.items() if count}

    @cached_property
    def speed(self) -> tuple[float, float] | None:
        """The range of measured speed-ups over the best peers; above 1 the paper is faster."""
        found = [
            judgement["measured"]
            for entry in self.benchmarks
            for judgement in entry["expectations"]
            if judgement["expectation"].endswith("(speed-up)") and judgement["measured"] is not None
        ]
        return (min(found), max(found)) if found else None

    @cached_property
    def recorded(self) -> str:
        """When the youngest evidence at `scale` was recorded, ISO 8601, or ""."""
        return max((entry["recorded"] for entry in self.entries if entry["scale"] == self.scale), default="")

    @cached_property
    def stale(self) -> bool:
        """Whether the source has changed since the evidence at `scale` was recorded."""
        return any(self.is_stale(entry) for entry in self.entries if entry["scale"] == self.scale)

    def is_stale(self, entry: Entry) -> bool:
        """Whether the source has changed since this entry was recorded."""
        return bool(entry["fingerprint"] != self._fingerprint)

    @cached_property
    def _fingerprint(self) -> str:
        """Of the source as it is; computed when first asked for, because it takes a tenth of a second."""
        from workingpapers.desk.source import module_fingerprint

        try:
            return module_fingerprint(self.paper.module)
        except (LookupError, OSError, SyntaxError, ValueError):  # the source is being edited
            return ""


@dataclass(frozen=True)
class Content:
    """All papers at one moment.

    Attributes
    ----------
    version : different whenever anything in here is; the same in every process that sees the same files.
    papers : by slug, in the order of the catalogue.
    """

    version: str
    papers: Mapping[str, PaperContent]

    @cached_property
    def listings(self) -> list[tuple[str, list[PaperContent]]]:
        """Date and members of each listing, newest first; a paper that stands in two is in both."""
        dates = {date for found in self.papers.values() for date in found.paper.listings}
        return [
            (date, [found for found in self.papers.values() if date in found.paper.listings])
            for date in sorted(dates, key=day_of_year, reverse=True)
        ]

    @cached_property
    def fields(self) -> dict[str, list[PaperContent]]:
        """The papers of each field, also of fields without any."""
        return {name: [found for found in self.papers.values() if found.paper.field == name] for name in FIELDS}

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """Room for what is made of this content and is right as long as the content is."""
        return {}


def day_of_year(date: str) -> int:
    """The order of listings; they carry no year."""
    return datetime.strptime(f"{date} 2000", "%b %d %Y").timetuple().tm_yday


def read() -> Content:
    """Catalogue and evidence as they are now."""
    return _Reader().read()


class Current:
    """The content, read again when a file has changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reader = _Reader()
        self._content = self._reader.read()
        self._looked = time.monotonic()

    def get(self) -> Content:
        """The content; at most `PATIENCE` seconds behind the files."""
        now = time.monotonic()
        if now - self._looked > PATIENCE and self._lock.acquire(blocking=False):
            try:
                self._looked = now
                self._content = self._reader.read()
            except OSError as trouble:  # better what was there before than nothing
                _log.warning("the evidence cannot be looked at: %s", trouble)
            finally:
                self._lock.release()
        return self._content


class _Reader:
    """Reads what has changed since it last read, and keeps the rest."""

    def __init__(self) -> None:
        self._papers = papers()
        self._nearest = _nearest(self._papers)
        self._content = Content("", {})
        self._sources: Mapping[str, Stamp] = {}
        self._evidence: dict[str, Stamp | None] = {}

    def read(self) -> Content:
        """The content as it is now; the very same object as before when nothing has changed."""
        sources = dict(_stamps(_sources()))
        files = dict(_stamps(evidence_directory().glob("*.json")))
        version = _digest(sorted(self._papers.items()), sorted(files.items()), sorted(sources.items()))
        if version == self._content.version:
            return self._content
        found = {}
        for slug, row in self._papers.items():
            stamp = files.get(str(evidence_path(slug)))
            known = self._content.papers.get(slug)
            if known is None or sources != self._sources or stamp != self._evidence[slug]:
                known = _paper(row, self._nearest[slug])
            found[slug], self._evidence[slug] = known, stamp
        self._sources = sources
        self._content = Content(version, found)
        return self._content


def _paper(row: Paper, nearest: Sequence[tuple[str, float]]) -> PaperContent:
    if status(row) == "listed":
        return PaperContent(row, "listed", [], None, nearest)
    try:
        recorded = evidence.load(row.slug)["claims"]
        _EVIDENCE.validate_python(recorded)
    except (OSError, ValueError, RecursionError) as damage:
        _log.warning("the evidence of %s cannot be read: %s", row.slug, damage)  # it names the file; readers need not
        return PaperContent(row, "working", [], None, nearest, damage="the file is damaged, or of a newer format")
    scale = next((scale for scale in SHOWN_FIRST if recorded.get(scale)), None)
    order = [scale, *(other for other in SCALES if other != scale)] if scale else []
    entries = [
        entry
        for name in order
        for kind in ("claim", "benchmark")
        for entry in recorded.get(name, [])
        if entry["kind"] == kind
    ]
    return PaperContent(row, "working", entries, scale, nearest)


def _stamps(files: Iterator[Path]) -> Iterator[tuple[str, Stamp]]:
    for file in files:
        try:
            seen = file.stat()
        except OSError:  # it was removed, or replaced, a moment ago
            continue
        yield str(file), (seen.st_mtime_ns, seen.st_size)


def _sources() -> Iterator[Path]:
    """What the evidence may be older than: the source of methods, claims and data."""
    home = Path(evidence.__file__).parents[1]
    for directory, inner, files in os.walk(home):
        inner[:] = [name for name in inner if name not in ("desk", "__pycache__")]
        yield from (Path(directory, name) for name in files if name.endswith(".py"))


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _nearest(everything: Mapping[str, Paper]) -> dict[str, list[tuple[str, float]]]:
    """For every paper the others that are most like it, by the words of title, summary and names."""
    from workingpapers.desk.listing import similar_papers

    return similar_papers(everything, NEAREST)
