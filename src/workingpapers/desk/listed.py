"""The imported papers that are new: the table `listed` of the store.

Each date carries a version, a random text that changes whenever its papers do: whoever keeps something made from them
sees what to make again.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MOST_LISTED = 200_000  # imported papers in one store


@dataclass(frozen=True)
class Listed:
    """One row of the table `listed`: an imported paper that the catalogue does not have (columns as there)."""

    key: str
    date: str
    title: str
    abstract: str
    arxiv: str
    source: str
    nearest: list[tuple[str, float]]
    imported_at: str


@contextmanager
def changing(connection: sqlite3.Connection, date: str | None = None) -> Iterator[None]:
    """Change the papers of a date, all or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(
            """
            CREATE TABLE IF NOT EXISTS listed (
                key TEXT NOT NULL,          -- title_key(title)
                date TEXT NOT NULL,         -- of the listing, 'Mar 11'
                title TEXT NOT NULL,
                abstract TEXT NOT NULL,
                arxiv TEXT NOT NULL,        -- '' where the page does not say
                source TEXT NOT NULL,       -- name of the imported file
                nearest TEXT NOT NULL,      -- JSON: [[slug, similarity], ...]
                imported_at TEXT NOT NULL,  -- UTC, ISO 8601
                PRIMARY KEY (key, date)
            )
            """
        )
        connection.execute("CREATE INDEX IF NOT EXISTS listed_by_date ON listed (date, imported_at)")
        if not _has_table(connection, "listed_versions"):
            connection.execute("CREATE TABLE listed_versions (date TEXT PRIMARY KEY, version TEXT NOT NULL)")
            connection.execute("INSERT INTO listed_versions SELECT date, 'first' FROM listed GROUP BY date")
        yield
        connection.execute("DELETE FROM listed_versions WHERE date = ?", (date,))
        connection.execute(
            "INSERT INTO listed_versions SELECT DISTINCT date, ? FROM listed WHERE date = ?",
            (os.urandom(8).hex(), date),
        )
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def remove_listing(connection: sqlite3.Connection, date: str, imported_at: Collection[str] | None = None) -> int:
    """Forget the new papers of a listing; how many they were.

    Parameters
    ----------
    connection : to the store, outside a transaction.
    imported_at : only what was imported at these times; everything by default.
    """
    with changing(connection, date):
        before = connection.total_changes
        if imported_at is None:
            connection.execute("DELETE FROM listed WHERE date = ?", (date,))
        else:
            values = [(date, moment) for moment in imported_at]
            connection.executemany("DELETE FROM listed WHERE date = ? AND imported_at = ?", values)
        return connection.total_changes - before


def listed_dates(connection: sqlite3.Connection) -> list[tuple[str, int]]:
    """The listings that brought new papers, the one imported last first, and how many."""
    if not _has_table(connection, "listed"):
        return []
    return connection.execute(
        "SELECT date, count(*) FROM listed GROUP BY date ORDER BY max(imported_at) DESC, date"
    ).fetchall()


def listed_on(connection: sqlite3.Connection, date: str, limit: int = -1, offset: int = 0) -> list[Listed]:
    """The new papers of a listing in its order."""
    if not _has_table(connection, "listed"):
        return []
    rows = connection.execute(
        "SELECT key, date, title, abstract, arxiv, source, nearest, imported_at FROM listed WHERE date = ? "
        "ORDER BY rowid LIMIT ? OFFSET ?",
        (date, limit, offset),
    )
    return [
        Listed(key, day, title, abstract, arxiv, source, [(slug, near) for slug, near in json.loads(nearest)], at)
        for key, day, title, abstract, arxiv, source, nearest, at in rows
    ]


def listed_versions(connection: sqlite3.Connection) -> dict[str, str]:
    """For every imported date a text that changes whenever its papers do."""
    if not _has_table(connection, "listed"):
        return {}
    if not _has_table(connection, "listed_versions"):  # the store was written before there were any
        with changing(connection):
            pass
    return dict(connection.execute("SELECT date, version FROM listed_versions ORDER BY rowid").fetchall())


def _has_table(connection: sqlite3.Connection, name: str) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchone() is not None
