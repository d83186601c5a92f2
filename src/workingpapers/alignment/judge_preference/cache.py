"""A file that remembers what was drawn and judged."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

_AT_ONCE = 500  # SQLite allows about a thousand parameters in one statement


class ScoreCache:
    """Keys to JSON values in one SQLite file; each write is kept whole or not at all.

    Parameters
    ----------
    path : of the file, which is made when it is missing; its folder must exist.
    judge : name under which scores are kept.
    """

    def __init__(self, path: str | Path, judge: str) -> None:
        self.judge = judge
        self._connection = sqlite3.connect(path, timeout=60.0)
        with self._connection:
            self._connection.execute("create table if not exists kept (key text primary key, value text not null)")

    def read(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those keys that are known."""
        names = {_digest(key): key for key in keys}
        digests, found = list(names), {}
        for start in range(0, len(digests), _AT_ONCE):
            some = digests[start : start + _AT_ONCE]
            marks = ", ".join("?" * len(some))
            for digest, value in self._connection.execute(f"select * from kept where key in ({marks})", some):
                found[names[digest]] = json.loads(value)
        return found

    def write(self, values: Mapping[str, Any]) -> None:
        """Keep values; those already known stay as they are."""
        rows = [(_digest(key), json.dumps(value)) for key, value in values.items()]
        with self._connection:
            self._connection.executemany("insert or ignore into kept values (?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def name_of_judge(judge: Any) -> str:
    """What scores of a judge are kept under.

    Raises
    ------
    ValueError : nothing tells it from another judge.
    """
    name = _name(judge)
    if "<lambda>" in name or " at 0x" in name:
        raise ValueError(f"judge must have a name for its scores to be cached: set its cache_name; got {name}")
    return name


def _name(part: Any) -> str:
    if (given := getattr(part, "cache_name", None)) is not None:
        return str(given)
    if is_dataclass(part) and not isinstance(part, type):
        inside = ", ".join(f"{field.name}={_name(getattr(part, field.name))}" for field in fields(part))
        return f"{type(part).__qualname__}({inside})"
    if callable(part) and hasattr(part, "__qualname__"):
        return f"{getattr(part, '__module__', None) or 'builtins'}.{part.__qualname__}"
    return repr(part)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
