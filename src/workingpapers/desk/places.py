"""Where the desk keeps its files. Nothing heavy is imported here: the command line asks at every start."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def store_path() -> Path:
    """Where the store is unless told otherwise: $WORKINGPAPERS_STORE, or in the user's data directory."""
    given = os.environ.get("WORKINGPAPERS_STORE")
    return Path(given) if given else Path(platformdirs.user_data_dir("workingpapers")) / "store.sqlite"


def titles_path(store: Path) -> Path:
    """Where the index of imported titles is that belongs to this store."""
    return store.with_name(f"{store.stem}-titles.sqlite")
