"""The titles of imported papers, in a full-text index that is kept in a file beside the store.

The store has the papers; this file can be deleted at any time and is then made again. It is brought up to date date
by date, so one more imported page costs as much as that page, whichever program imported it.

A query may match tens of thousands of titles, and ranking them all would take the better part of a second. So a bounded
number is looked at: the newest `RANKED` titles that match by themselves, ranked by how much of the title the query
covers; where those are few, the newest papers whose abstract helps to match.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from workingpapers.desk.listed import listed_on, listed_versions

VERSION = 1  # of the file; another one is made anew
WAIT = 30.0  # seconds for another process to finish writing
RANKED = 200
PER_WORD = 100  # titles looked at for each word where any of the words will do

OPEN, CLOSE = "\x02", "\x03"  # enclose a match in what FTS5 returns; removed from what is indexed
SNIPPET = 40  # words of a text that is not shown whole

_LONGEST_TITLE = 300  # characters
_LONGEST_ABSTRACT = 3_000
_SCHEMA = f"""
    CREATE TABLE papers (
        id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given twice
        date TEXT NOT NULL,
        key TEXT NOT NULL,
        imported_at TEXT NOT NULL,
        arxiv TEXT NOT NULL,
        UNIQUE (date, key)
    );
    CREATE TABLE dates (date TEXT PRIMARY KEY, version TEXT NOT NULL);
    CREATE TABLE vectors (id INTEGER PRIMARY KEY, model TEXT NOT NULL, vector BLOB NOT NULL);
    CREATE VIRTUAL TABLE texts USING fts5(title, abstract, prefix='1 2 3', tokenize='porter unicode61');
    PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True)
class Title:
    """An imported paper that matches.

    Attributes
    ----------
    title, text : with each match between `OPEN` and `CLOSE`; `text` is the beginning of the abstract or the part of it
        that matches.
    date, arxiv : of the listing, and the identifier or "".
    score : larger is better.
    """

    id: int
    title: str
    text: str
    date: str
    arxiv: str
    score: float


class Titles:
    """The index; usable from any thread, and by several processes.

    Parameters
    ----------
    path : of the file, made when it is absent, damaged or of another version; None keeps the index in memory.

    Raises
    ------
    sqlite3.OperationalError : the file cannot be opened.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._writing = threading.Lock()
        self._idle: list[sqlite3.Connection] = []  # for reading
        self._is_open = True
        if path is None:
            self._writer = _opened(":memory:")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._writer = _opened(path)
            except sqlite3.DatabaseError as trouble:
                if isinstance(trouble, sqlite3.OperationalError):  # locked or unreadable, which does not mean damaged
                    raise
                for file in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
                    file.unlink(missing_ok=True)
                self._writer = _opened(path)

    def sync(self, store: sqlite3.Connection) -> int:
        """Take over what has changed in the table `listed` of the store; how many papers came or went."""
        wanted = listed_versions(store)
        with self._reading() as reader:
            known: dict[str, str] = dict(reader.execute("SELECT date, version FROM dates").fetchall())
        changed = 0
        for date in [*wanted, *(known.keys() - wanted.keys())]:
            if known.get(date) != wanted.get(date):
                changed += self._sync_date(store, date, wanted.get(date))
        return changed

    def add(self, papers: Iterable[tuple[str, str]], date: str = "") -> None:
        """Add (title, abstract) pairs that are in no store."""
        with self._writing:
            self._begin()
            for number, (title, abstract) in enumerate(papers):
                self._insert(date, f"{number}", "", title, abstract, "")
            self._writer.execute("COMMIT")

    def count(self) -> int:
        with self._reading() as reader:
            return int(reader.execute("SELECT count(*) FROM papers").fetchone()[0])

    def matching(self, expression: str, limit: int) -> list[Title]:
        """The papers that match an expression of FTS5, best first, by the rule at the top of this module."""
        with self._reading() as reader:
            rows = reader.execute(
                f"SELECT rowid, highlight(texts, 0, {_MARK}) FROM texts WHERE texts MATCH ? "
                "ORDER BY rowid DESC LIMIT ?",
                (f"{{title}} : ({expression})", RANKED),
            ).fetchall()
            ranked = sorted(((_covered(title), number, title) for number, title in rows), reverse=True)[:limit]
            found = [(number, title, "", 1 + covered) for covered, number, title in ranked]
            if len(found) < limit:
                known = {number for number, *_ in found}
                rows = reader.execute(
                    f"""SELECT rowid, highlight(texts, 0, {_MARK}), snippet(texts, 1, {_MARK}, '…', {SNIPPET})
                        FROM texts WHERE texts MATCH ? ORDER BY rowid DESC LIMIT ?""",
                    (expression, limit + len(known)),
                ).fetchall()
                fresh = [row for row in rows if row[0] not in known][: limit - len(found)]
                found += [(number, title, text, 1 - at / limit) for at, (number, title, text) in enumerate(fresh, 1)]
            return _completed(reader, found)

    def matching_any(self, expressions: Sequence[str], limit: int) -> list[Title]:
        """The papers whose title matches any of the expressions; many and rare matches first."""
        with self._reading() as reader:
            weight: dict[int, float] = {}
            for expression in expressions:
                rows = reader.execute(
                    "SELECT rowid FROM texts WHERE texts MATCH ? ORDER BY rowid DESC LIMIT ?",
                    (f"{{title}} : ({expression})", PER_WORD),
                ).fetchall()
                for (number,) in rows:
                    weight[number] = weight.get(number, 0.0) + 1 / len(rows)
            best = sorted(weight, key=lambda number: (-weight[number], -number))[:limit]
            shown = f"SELECT highlight(texts, 0, {_MARK}) FROM texts WHERE texts MATCH ? AND rowid = ?"
            any_of = " OR ".join(f"({expression})" for expression in expressions)
            titles = [reader.execute(shown, (any_of, number)).fetchone()[0] for number in best]
            found = [(number, title, "", weight[number]) for number, title in zip(best, titles, strict=True)]
            return _completed(reader, found)

    def titles(self, numbers: Iterable[int]) -> list[Title]:
        """The papers of these numbers, without matches; those that are gone are left out."""
        with self._reading() as reader:
            rows = [
                reader.execute("SELECT rowid, title, '', 0.0 FROM texts WHERE rowid = ?", (number,)).fetchone()
                for number in numbers
            ]
            return _completed(reader, [row for row in rows if row is not None])

    # What `desk.meaning` keeps here, for each model

    def without_vector(self, model: str, newest: int, limit: int) -> list[tuple[int, str]]:
        """Number and text of papers that have no vector yet, among the newest."""
        query = """SELECT id, title || '. ' || abstract FROM (SELECT id FROM papers ORDER BY id DESC LIMIT ?)
               JOIN texts ON texts.rowid = id WHERE id NOT IN (SELECT id FROM vectors WHERE model = ?) LIMIT ?"""
        with self._reading() as reader:
            return reader.execute(query, (newest, model, limit)).fetchall()

    def put_vectors(self, model: str, vectors: Iterable[tuple[int, bytes]]) -> None:
        rows = [(number, model, vector) for number, vector in vectors]
        with self._writing:
            self._begin()
            self._writer.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)
            self._writer.execute("COMMIT")

    def vectors(self, model: str, newest: int) -> list[tuple[int, bytes]]:
        """Number and vector of the newest papers, the oldest of them first."""
        query = "SELECT id, vector FROM vectors WHERE model = ? ORDER BY id DESC LIMIT ?"
        with self._reading() as reader:
            return reader.execute(query, (model, newest)).fetchall()[::-1]

    def close(self) -> None:
        self._is_open = False
        while self._idle:
            self._idle.pop().close()
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """All that is read in the block is of one moment, and nobody waits for it."""
        if self._path is None:
            with self._writing:
                yield self._writer
            return
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = _connected(self._path)
        connection.execute("BEGIN")
        try:
            yield connection
        finally:
            connection.execute("ROLLBACK")  # nothing was written
            if self._is_open:
                self._idle.append(connection)
            else:
                connection.close()

    def _sync_date(self, store: sqlite3.Connection, date: str, version: str | None) -> int:
        with self._writing:
            self._begin()
            try:
                papers = {(paper.key, paper.imported_at): paper for paper in listed_on(store, date)}
                rows = self._writer.execute(
                    "SELECT key, imported_at, id FROM papers WHERE date = ?", (date,)
                ).fetchall()
                here = {(key, imported_at): number for key, imported_at, number in rows}
                gone, come = here.keys() - papers.keys(), [key for key in papers if key not in here]
                for key in gone:
                    for table, column in (("papers", "id"), ("texts", "rowid"), ("vectors", "id")):
                        self._writer.execute(f"DELETE FROM {table} WHERE {column} = ?", (here[key],))
                for key in come:
                    paper = papers[key]
                    self._insert(date, *key, paper.title, paper.abstract, paper.arxiv)
                self._writer.execute("DELETE FROM dates WHERE date = ?", (date,))
                if version is not None:
                    self._writer.execute("INSERT INTO dates VALUES (?, ?)", (date, version))
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise
            self._writer.execute("COMMIT")
            return len(gone) + len(come)

    def _begin(self) -> None:
        self._writer.execute("BEGIN IMMEDIATE")

    def _insert(self, date: str, key: str, imported_at: str, title: str, abstract: str, arxiv: str) -> None:
        row = self._writer.execute(
            "INSERT INTO papers (date, key, imported_at, arxiv) VALUES (?, ?, ?, ?)", (date, key, imported_at, arxiv)
        )
        texts = (plain(title, _LONGEST_TITLE), plain(abstract, _LONGEST_ABSTRACT))
        self._writer.execute("INSERT INTO texts (rowid, title, abstract) VALUES (?, ?, ?)", (row.lastrowid, *texts))


def plain(text: str, longest: int) -> str:
    """A stranger's text as it may be shown: one line, bounded, nothing in it that hides, reorders or towers."""
    text = _TOWERS.sub(r"\1", " ".join(_UNSEEN.sub("", _UNFIT.sub(" ", text)).split()))
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


# --------------------------------------------------------------------------------------------------------------------

_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # control characters, halves of characters
_UNSEEN = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_TOWERS = re.compile("((?:[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]){3})"
                     "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+")  # fmt: skip
_MARK = f"'{OPEN}', '{CLOSE}'"
_MATCH = re.compile(f"{OPEN}(.*?){CLOSE}")


def _opened(path: Path | str) -> sqlite3.Connection:
    connection = _connected(path)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            connection.execute("BEGIN IMMEDIATE")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:  # else another process was faster
                for statement in _SCHEMA.split(";")[:-1]:
                    connection.execute(statement)
            connection.execute("COMMIT")
        elif version != VERSION:
            raise sqlite3.DatabaseError(f"version {version}")
    except BaseException:
        connection.close()
        raise
    return connection


def _connected(path: Path | str) -> sqlite3.Connection:
    # In autocommit mode, with SQLite serialising its use, a connection may be shared by threads.
    connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _completed(reader: sqlite3.Connection, found: Iterable[tuple[int, str, str, float]]) -> list[Title]:
    """With date and identifier, and with the beginning of the abstract where there is no text; no title twice."""
    query = "SELECT key, date, arxiv, abstract FROM papers JOIN texts ON texts.rowid = id WHERE id = ?"
    titles: dict[str, Title] = {}
    for number, title, text, score in found:
        key, date, arxiv, abstract = reader.execute(query, (number,)).fetchone()
        titles.setdefault(key, Title(number, title, text or _beginning(abstract), date, arxiv, score))
    return list(titles.values())


def _covered(marked: str) -> float:
    """The part of a title that matches, between 0 and 1."""
    inside = sum(map(len, _MATCH.findall(marked)))
    return inside / max(len(marked.replace(OPEN, "").replace(CLOSE, "")), 1)


def _beginning(abstract: str) -> str:
    words = abstract.split(" ", SNIPPET)
    return abstract if len(words) <= SNIPPET else " ".join(words[:SNIPPET]) + "…"
