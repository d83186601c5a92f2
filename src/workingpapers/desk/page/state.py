"""What belongs to the page alone, in an SQLite file beside the store: runs, stars, subscriptions, its secret.

The store holds measurements, which people share; this file holds what readers entrust to the page. Every part of the
page keeps its own tables here and says so with `State.tables`.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WAIT = 30.0  # seconds for another thread or process to finish writing


class State:
    """One connection, usable from any thread; reads and writes are serialised.

    Parameters
    ----------
    path : of the file; it is made when absent, readable by its owner only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=True)
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")  # a mail that was sent stays sent
        self._connection.row_factory = sqlite3.Row
        self.tables("CREATE TABLE IF NOT EXISTS secrets (name TEXT PRIMARY KEY, value BLOB NOT NULL)")
        with self.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO secrets VALUES ('page', ?)", (secrets.token_bytes(32),))

    @property
    def secret(self) -> bytes:
        """32 random bytes, drawn once for this file."""
        return bytes(self.one("SELECT value FROM secrets WHERE name = 'page'")["value"])

    def tables(self, script: str) -> None:
        """Run `CREATE ... IF NOT EXISTS` statements."""
        with self._lock:
            self._connection.executescript(script)

    def all(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """The rows of a query."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def one(self, query: str, values: Sequence[Any] = ()) -> Any:
        """The first row of a query, or None."""
        with self._lock:
            return self._connection.execute(query, values).fetchone()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write, all or nothing; other threads wait."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # some errors have already rolled back
                    self._connection.execute("ROLLBACK")
                raise

    def write(self, statement: str, values: Sequence[Any] = ()) -> int:
        """Run one statement; how many rows it changed."""
        with self.transaction() as connection:
            return connection.execute(statement, values).rowcount

    def close(self) -> None:
        with self._lock:
            self._connection.close()
