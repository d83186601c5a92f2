"""Style sheet and scripts, read once at the start: no request names a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

KINDS = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Asset:
    """A file that pages refer to.

    Attributes
    ----------
    version : of its content; pages name it in the address, so that browsers may keep the file for ever.
    """

    name: str
    kind: str
    content: bytes
    version: str


@cache
def assets() -> Mapping[str, Asset]:
    """Every asset by name: ours, and htmx from the package that carries it.

    Raises
    ------
    ImportError : that package is missing; it comes with the extra `page`.
    """
    folder = resources.files("workingpapers.desk.page").joinpath("assets")
    found = {
        item.name: item.read_bytes() for item in folder.iterdir() if Path(item.name).suffix in KINDS and item.is_file()
    }
    found["htmx.js"] = _htmx()
    return {
        name: Asset(name, KINDS[Path(name).suffix], content, hashlib.sha256(content).hexdigest()[:12])
        for name, content in found.items()
    }


def _htmx() -> bytes:
    spec = find_spec("js_lib_htmx")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the page needs htmx: pip install 'workingpapers[page]'")
    return Path(spec.submodule_search_locations[0], "static", "htmx", "htmx.min.js").read_bytes()
