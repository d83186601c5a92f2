"""The source of Python's standard library: text for byte-level language models wherever Python is installed."""

from __future__ import annotations

import platform
import sys
import sysconfig
from pathlib import Path

import numpy as np

from workingpapers.data.source import DataNotInstalled, Dataset

_TESTS = {"test", "tests", "idle_test"}
_EVERY = 10  # of so many files the last goes into validation


def python_source() -> Dataset:
    """Standard library as bytes: `train` and `validation`, uint8, all text of nine and of one of every ten files.

    The files are the .py files of the modules in `sys.stdlib_module_names`, without tests, in alphabetical order of
    their paths, joined without separators: 12 MB in Python 3.11. Other versions of Python, and distributions that patch
    it, have other text. ``extra`` holds the paths as "train_files" and "validation_files".

    Raises
    ------
    DataNotInstalled : this Python comes without its sources as files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root).as_posix() for name in sys.stdlib_module_names for path in _files(root, name))
    if len(paths) < _EVERY:
        raise DataNotInstalled(
            f"This data is the source of Python's standard library, which is not in {root}: install a Python with it"
        )
    parts: dict[str, list[str]] = {"train": [], "validation": []}
    for k, path in enumerate(paths):
        parts["validation" if k % _EVERY == _EVERY - 1 else "train"].append(path)
    return Dataset(
        "Python source",
        {
            part: np.frombuffer(bytearray().join((root / path).read_bytes() for path in files), dtype=np.uint8)
            for part, files in parts.items()
        },
        f"Python source code of the standard library of {platform.python_version()}, as bytes.",
        "PSF licence, free",
        f"Python {platform.python_version()}, standard library",
        {f"{part}_files": files for part, files in parts.items()},
    )


def _files(root: Path, module: str) -> list[Path]:
    """The sources of one module or package."""
    found = [root / f"{module}.py", *(root / module).rglob("*.py")]
    return [path for path in found if path.is_file() and not _TESTS & set(path.relative_to(root).parts)]
