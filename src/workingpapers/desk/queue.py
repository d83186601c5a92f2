"""The runs that readers of the page ask for: one queue, kept in a file, so that it outlives the server.

A run checks one claim of a paper, or all of them, at a scale and a seed. The queue says what is to be done and how
far it is; `desk.supervisor` does it. What is measured goes to the store, as from the command line; the queue keeps
verdicts only.
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from sqlite3 import Row as Record
from typing import TYPE_CHECKING, Any, Literal

from workingpapers.desk import syntax
from workingpapers.desk.catalogue import Paper, claims_path, paper
from workingpapers.desk.claim import Scale
from workingpapers.desk.expect import Verdict, worst

if TYPE_CHECKING:
    from workingpapers.desk.page.state import State

__all__ = ["ALL_BENCHMARKS", "ALL_CLAIMS", "Queue", "Refused", "Run", "claims_in"]

ALL_CLAIMS, ALL_BENCHMARKS = "all claims", "all benchmarks"  # no function has a name with a blank in it
WAITING = 50  # runs in the queue
WAITING_EACH = 5  # of them of one reader
KEPT = 1_000  # runs that have ended

RunStatus = Literal["queued", "running", "done", "failed", "cancelled"]

SCHEMA = """
    CREATE TABLE IF NOT EXISTS runs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        paper TEXT NOT NULL,
        what TEXT NOT NULL,
        scale TEXT NOT NULL,
        seed INTEGER NOT NULL,
        reader TEXT NOT NULL,
        status TEXT NOT NULL DEFAULT 'queued',
        is_stopping INTEGER NOT NULL DEFAULT 0,  -- a reader wants a running one to be cancelled
        done INTEGER NOT NULL DEFAULT 0,
        total INTEGER NOT NULL DEFAULT 0,        -- 0 until the claims are loaded
        outcomes TEXT NOT NULL DEFAULT '[]',     -- JSON, one for each claim that is judged
        verdict TEXT,                            -- the worst of them, once the run is done
        error TEXT NOT NULL DEFAULT '',
        asked TEXT NOT NULL,                     -- ISO 8601, UTC
        started TEXT NOT NULL DEFAULT '',
        finished TEXT NOT NULL DEFAULT '',
        revision INTEGER NOT NULL DEFAULT 0      -- grows with every change
    );
    CREATE INDEX IF NOT EXISTS runs_by_status ON runs (status, id);
    CREATE INDEX IF NOT EXISTS runs_by_paper ON runs (paper, id);
"""
# what a list of runs shows: all but the outcomes, which may be long
BRIEF = ("id, paper, what, scale, seed, reader, status, is_stopping, done, total, '[]' AS outcomes, verdict, error,"
         " asked, started, finished, revision")  # fmt: skip
OPEN = "status IN ('queued', 'running')"


class Refused(Exception):
    """A run cannot be queued or cancelled.

    Attributes
    ----------
    status : the HTTP status that says so.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Run:
    """A run as it is at one moment.

    Attributes
    ----------
    paper : its slug.
    what : the name of a claim or benchmark, `ALL_CLAIMS` or `ALL_BENCHMARKS`.
    reader : who asked for it.
    is_stopping : it is still running, but has been cancelled.
    done, total : cells; `total` is 0 until the claims are loaded.
    outcomes : `Outcome.as_json` of every claim that is judged; lists of runs leave them out.
    verdict : the worst of its claims, None before all of them are judged.
    error : why it failed.
    asked, started, finished : ISO 8601 in UTC, "" when that has not happened yet.
    revision : grows with every change.
    """

    id: int
    paper: str
    what: str
    scale: Scale
    seed: int
    reader: str
    status: RunStatus
    is_stopping: bool
    done: int
    total: int
    outcomes: list[dict[str, Any]]
    verdict: Verdict | None
    error: str
    asked: str
    started: str
    finished: str
    revision: int

    @property
    def is_open(self) -> bool:
        """Whether something is still to happen."""
        return self.status in ("queued", "running")

    @property
    def elapsed(self) -> float:
        """Seconds since it was started, or from start to end."""
        if not self.started:
            return 0.0
        end = datetime.fromisoformat(self.finished) if self.finished else datetime.now(UTC)
        return max(0.0, (end - datetime.fromisoformat(self.started)).total_seconds())


class Queue:
    """All runs, those that have ended too.

    Parameters
    ----------
    state : of the page; several processes may share it.
    changed : called after every change that a reader would want to see at once: not for every cell.
    """

    def __init__(self, state: State, changed: Callable[[], None] = lambda: None) -> None:
        self._state = state
        self._changed = changed
        state.tables(SCHEMA)

    def ask(self, slug: str, what: str, scale: Scale, seed: int, reader: str) -> tuple[Run, bool]:
        """Queue a run, unless an equal one is already there; the run, and whether it is new.

        Raises
        ------
        Refused : there is no such paper or claim, or the queue is full.
        """
        _refuse_unknown(slug, what)
        with self._state.transaction() as connection:
            same = connection.execute(
                f"SELECT * FROM runs WHERE {OPEN} AND NOT is_stopping"
                " AND paper = ? AND what = ? AND scale = ? AND seed = ?",
                (slug, what, scale, seed),
            ).fetchone()
            if same is not None:
                return _run(same), False
            waiting, own = connection.execute(
                f"SELECT count(*), coalesce(sum(reader = ?), 0) FROM runs WHERE {OPEN}", (reader,)
            ).fetchone()
            if own >= WAITING_EACH:
                raise Refused(429, f"You have {own} runs in the queue: wait until one has ended, or cancel one.")
            if waiting >= WAITING:
                raise Refused(429, f"The queue is full with {waiting} runs. Try again later.")
            record = connection.execute(
                "INSERT INTO runs (paper, what, scale, seed, reader, asked) VALUES (?, ?, ?, ?, ?, ?) RETURNING *",
                (slug, what, scale, seed, reader, _now()),
            ).fetchone()
            connection.execute(
                f"DELETE FROM runs WHERE NOT {OPEN} AND id NOT IN"
                f" (SELECT id FROM runs WHERE NOT {OPEN} ORDER BY id DESC LIMIT ?)",
                (KEPT,),
            )
        self._changed()
        return _run(record), True

    def get(self, number: int) -> Run | None:
        return self.several([number]).get(number)

    def several(self, numbers: Iterable[int]) -> dict[int, Run]:
        """The runs of these numbers, those that exist."""
        chosen = list(numbers)
        marks = ", ".join("?" * len(chosen))
        found = self._state.all(f"SELECT * FROM runs WHERE id IN ({marks})", chosen)
        return {record["id"]: _run(record) for record in found}

    def open(self) -> list[Run]:
        """Those that run and wait, in their order."""
        return [_run(record) for record in self._state.all(f"SELECT {BRIEF} FROM runs WHERE {OPEN} ORDER BY id")]

    def ended(self, limit: int, before: int = 2**62) -> list[Run]:
        """Those that have ended, the youngest first, with numbers below `before`."""
        query = f"SELECT {BRIEF} FROM runs WHERE NOT {OPEN} AND id < ? ORDER BY id DESC LIMIT ?"
        return [_run(record) for record in self._state.all(query, (before, limit))]

    def of_paper(self, slug: str, limit: int) -> list[Run]:
        """The last runs of a paper, the youngest first."""
        query = f"SELECT {BRIEF} FROM runs WHERE paper = ? ORDER BY id DESC LIMIT ?"
        return [_run(record) for record in self._state.all(query, (slug, limit))]

    def ahead(self, run: Run) -> int:
        """How many runs come before a queued one."""
        query = f"SELECT count(*) FROM runs WHERE {OPEN} AND id < ?"
        return int(self._state.one(query, (run.id,))[0]) if run.status == "queued" else 0

    def cancel(self, number: int, reader: str | None = None) -> Run | None:
        """Take a queued run out, and have a running one stopped; what it measured is kept. None if it is not there.

        Parameters
        ----------
        reader : who must have asked for it; None when anybody may cancel it.

        Raises
        ------
        Refused : it has ended, or somebody else asked for it.
        """
        with self._state.transaction() as connection:
            record = connection.execute(
                "UPDATE runs SET is_stopping = (status = 'running'), finished = iif(status = 'queued', ?, ''),"
                " status = iif(status = 'queued', 'cancelled', status), revision = revision + 1"
                f" WHERE id = ? AND {OPEN} AND reader = coalesce(?, reader) RETURNING *",
                (_now(), number, reader),
            ).fetchone()
        if record is None:
            found = self.get(number)
            if found is not None and found.is_open:
                raise Refused(403, "A run can be cancelled by the reader who asked for it.")
            if found is not None:
                raise Refused(409, f"Run {number} has ended already.")
            return None
        self._changed()
        return _run(record)

    # What the supervisor does with them

    def recover(self) -> None:
        """Put back what was running when the last supervisor ended, and cancel what it did not get round to."""
        self._state.write(
            "UPDATE runs SET status = iif(is_stopping, 'cancelled', 'queued'), finished = iif(is_stopping, ?, ''),"
            " started = iif(is_stopping, started, ''), is_stopping = 0, revision = revision + 1"
            " WHERE status = 'running'",
            (_now(),),
        )
        self._changed()

    def take(self) -> Run | None:
        """The next run, which is running from now on."""
        with self._state.transaction() as connection:
            record = connection.execute(
                "UPDATE runs SET status = 'running', started = ?, done = 0, total = 0, outcomes = '[]',"
                " revision = revision + 1 WHERE id = (SELECT min(id) FROM runs WHERE status = 'queued') RETURNING *",
                (_now(),),
            ).fetchone()
        if record is None:
            return None
        self._changed()
        return _run(record)

    def is_stopping(self, number: int) -> bool:
        record = self._state.one("SELECT is_stopping FROM runs WHERE id = ?", (number,))
        return record is None or bool(record["is_stopping"])

    def advance(self, number: int, done: int, total: int, outcomes: list[dict[str, Any]]) -> None:
        """Say how far a running one is."""
        self._state.write(
            "UPDATE runs SET done = ?, total = ?, outcomes = ?, revision = revision + 1 WHERE id = ?",
            (done, total, json.dumps(outcomes), number),
        )

    def finish(self, number: int, status: RunStatus, error: str = "") -> None:
        """End a running one; its verdict is the worst of its outcomes when it is done."""
        with self._state.transaction() as connection:
            (outcomes,) = connection.execute("SELECT outcomes FROM runs WHERE id = ?", (number,)).fetchone()
            verdicts = [outcome["verdict"] for outcome in json.loads(outcomes)]
            connection.execute(
                "UPDATE runs SET status = ?, verdict = ?, error = ?, finished = ?, is_stopping = 0,"
                " revision = revision + 1 WHERE id = ?",
                (status, worst(verdicts) if verdicts and status == "done" else None, error, _now(), number),
            )
        self._changed()


def claims_in(paper: Paper) -> Mapping[str, str]:
    """Names of a paper's claims and benchmarks, each with which of the two it is, in order of definition.

    Nothing is imported: the claims of most papers need torch, which takes seconds.
    """
    path = claims_path(paper)
    if path is None:
        return {}
    files = sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
    return {name: kind for file in files for name, kind in _claims_of_file(file, file.stat().st_mtime_ns).items()}


@functools.lru_cache(maxsize=256)
def _claims_of_file(file: Path, version: int) -> dict[str, str]:
    functions = [node for node in syntax.parse(file.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
    words = {node.name: [ast.unparse(found).partition("(")[0] for found in node.decorator_list] for node in functions}
    return {name: word for name, its in words.items() for word in its if word in ("claim", "benchmark")}


def _refuse_unknown(slug: str, what: str) -> None:
    found: Mapping[str, str] = {}
    with suppress(LookupError):
        found = claims_in(paper(slug))
        if not found:
            raise Refused(409, "This paper is listed but does not work yet: it has no claims to check.")
    if not found:
        raise Refused(404, "No paper has this name.")
    if what == ALL_BENCHMARKS and "benchmark" not in found.values():
        raise Refused(404, "This paper has no benchmark.")
    if what not in (ALL_CLAIMS, ALL_BENCHMARKS, *found):
        raise Refused(404, "This paper has no claim of this name.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _run(record: Record) -> Run:
    shown = {name: record[name] for name in Run.__dataclass_fields__}
    return Run(**{**shown, "is_stopping": bool(record["is_stopping"]), "outcomes": json.loads(record["outcomes"])})
