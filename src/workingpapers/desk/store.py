"""What has been measured, cell by cell, in one SQLite file.

Every cell is committed when it is finished, so a run that is killed goes on with the cells that are missing, and two
runs at once keep both their results. The file is in WAL mode with `synchronous=NORMAL`: what was committed survives
the death of the process at any moment; after a power cut the last few cells may be missing, which the next run
measures again, but the file stays whole.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from filelock import FileLock

from workingpapers.desk.claim import Cell, Row, Value
from workingpapers.desk.places import store_path

__all__ = ["Result", "Store", "StoreError", "store_path"]

APPLICATION = 0x77705041  # "wpPA", in the header of the file
VERSION = 1
WAIT = 60.0  # seconds for another process to finish writing

HEADER = b"SQLite format 3\0"
SCHEMA = """
    CREATE TABLE cells (
        paper TEXT NOT NULL,
        claim TEXT NOT NULL,
        cell TEXT NOT NULL,         -- JSON of the axes, keys sorted
        fingerprint TEXT NOT NULL,  -- of the source that was measured
        status TEXT NOT NULL CHECK (status IN ('done', 'crashed')),
        rows TEXT NOT NULL,         -- JSON; a number that JSON lacks as {"number": "nan"}
        error TEXT NOT NULL,        -- traceback or reason, empty when done
        seconds REAL NOT NULL,
        measured_at TEXT NOT NULL,  -- ISO 8601, UTC
        environment TEXT NOT NULL,  -- JSON: device and versions
        PRIMARY KEY (paper, claim, cell, fingerprint)
    ) WITHOUT ROWID
"""
COLUMNS = "paper, claim, cell, fingerprint, status, rows, error, seconds, measured_at, environment"


class StoreError(Exception):
    """The store cannot be used: one sentence naming the file and what to do."""


@dataclass(frozen=True)
class Result:
    """What measuring one cell came to.

    Attributes
    ----------
    values : of the cell's axes.
    fingerprint : of the source that was measured.
    status : "done", or "crashed": it raised, ran out of time, or took its process along.
    rows : one or several, empty when crashed.
    error : why it crashed, with the traceback where there is one; empty when done.
    seconds : the measurement took, warm-up not counted.
    measured_at : when it finished, ISO 8601 in UTC.
    environment : device and versions of the process that measured.
    """

    paper: str
    claim: str
    values: Mapping[str, Value]
    fingerprint: str
    status: Literal["done", "crashed"]
    rows: list[Row]
    error: str = ""
    seconds: float = 0.0
    measured_at: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal for equal cells."""
        return Cell(self.values).key


class Store:
    """The results of all runs; use it as a context manager, or close it.

    Parameters
    ----------
    path : of the file, made when absent; $WORKINGPAPERS_STORE or the user's data directory by default.

    Raises
    ------
    StoreError : the file is not a store, is damaged, or belongs to a newer version. It is left as it is.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path) if path is not None else store_path()
        self._writing = threading.Lock()
        try:
            with self._explained():
                if not self.path.exists():
                    _create(self.path)
                self._refuse_foreign()
                self._connection = _connect(self.path, "rw")
                try:
                    self._refuse_damaged()
                except BaseException:
                    self._connection.close()
                    raise
        except OSError as error:
            raise StoreError(f"{self.path} cannot be used: {error.strerror}: {error.filename}") from error

    @property
    def connection(self) -> sqlite3.Connection:
        """In autocommit mode; for reading tables that stand beside the cells, from any thread."""
        return self._connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """For changing tables that stand beside the cells: all that is done in the block is committed, or none of it.

        Raises
        ------
        StoreError : SQLite refuses; other exceptions of the block pass through.
        """
        with self._explained(), self._writing:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                if self._connection.in_transaction:  # some errors have already rolled back
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def get(self, paper: str, claim: str, cells: Iterable[Cell], fingerprint: str) -> dict[str, Result]:
        """The results of these cells under this fingerprint, by `Cell.key`; cells never measured are absent."""
        keys = {cell.key for cell in cells}
        found = self._select("paper = ? AND claim = ? AND fingerprint = ?", paper, claim, fingerprint)
        return {key: result for key, result in found if key in keys}

    def results(self, paper: str, claim: str | None = None) -> list[Result]:
        """All results of a paper or of one of its claims, also of older sources, in the order they were measured."""
        if claim is None:
            found = self._select("paper = ?", paper)
        else:
            found = self._select("paper = ? AND claim = ?", paper, claim)
        return sorted((result for _, result in found), key=lambda result: result.measured_at)

    def put(self, result: Result) -> None:
        """Commit a result, in place of an older one of the same cell and fingerprint."""
        row = (
            result.paper,
            result.claim,
            result.key,
            result.fingerprint,
            result.status,
            json.dumps([{name: _encoded(value) for name, value in row.items()} for row in result.rows]),
            result.error,
            result.seconds,
            result.measured_at,
            json.dumps(dict(result.environment)),
        )
        marks = ", ".join("?" * len(row))
        with self._explained(), self._writing:
            self._connection.execute(f"INSERT OR REPLACE INTO cells ({COLUMNS}) VALUES ({marks})", row)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _select(self, condition: str, *values: str) -> list[tuple[str, Result]]:
        with self._explained():
            rows = self._connection.execute(f"SELECT {COLUMNS} FROM cells WHERE {condition}", values).fetchall()
        return [(row[2], _result(row)) for row in rows]

    def _refuse_foreign(self) -> None:
        """Read the header as bytes: SQLite itself might already change a file that it opens."""
        with self.path.open("rb") as file:
            header = file.read(100)
        if len(header) < 100 or not header.startswith(HEADER):
            raise StoreError(f"{self.path} is not a store of workingpapers: move it away, or name another file")
        if int.from_bytes(header[68:72], "big") != APPLICATION:
            raise StoreError(f"{self.path} is the SQLite database of another program: name another file")
        self._refuse_newer(int.from_bytes(header[60:64], "big"))

    def _refuse_newer(self, version: int) -> None:
        if version > VERSION:
            raise StoreError(
                f"{self.path} was written by a newer workingpapers (version {version} of the store, this one knows "
                f"{VERSION}): upgrade, or name another file"
            )

    def _refuse_damaged(self) -> None:
        self._refuse_newer(self._connection.execute("PRAGMA user_version").fetchone()[0])
        (found,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        self._connection.execute(f"SELECT {COLUMNS} FROM cells LIMIT 0")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what SQLite says of the file into one sentence."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StoreError(f"{self.path} cannot be used: {error}") from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # a subclass speaks of the statement, not of the file
                raise
            damage = " ".join(str(error).split())
            raise StoreError(
                f"{self.path} is damaged ({damage}): move it away to start a new store, or restore a copy"
            ) from error


def _connect(path: Path, mode: Literal["rw", "rwc"]) -> sqlite3.Connection:
    # In autocommit mode, with SQLite serialising its use, a connection may be shared by threads.
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, timeout=WAIT, isolation_level=None, check_same_thread=False, uri=True)
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _create(path: Path) -> None:
    """Make a complete store beside `path` and move it there, so that `path` never names a half-made one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():  # another process was faster
            return
        fresh = path.with_name(f"{path.name}.new")
        fresh.unlink(missing_ok=True)
        with closing(_connect(fresh, "rwc")) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(
                f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; {SCHEMA};"
            )
        fresh.rename(path)


def _result(row: tuple[Any, ...]) -> Result:
    paper, claim, cell, fingerprint, status, rows, error, seconds, measured_at, environment = row
    return Result(
        paper,
        claim,
        json.loads(cell),
        fingerprint,
        status,
        [{name: _decoded(value) for name, value in row.items()} for row in json.loads(rows)],
        error,
        seconds,
        measured_at,
        json.loads(environment),
    )


def _encoded(value: Any) -> Any:
    return {"number": repr(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(value: Any) -> Any:
    return float(value["number"]) if isinstance(value, dict) else value
