"""What several cells of a grid share (a pre-trained base model, a corpus statistic): built once, kept in a cache.

An artifact is a pure function of its arguments and of its source. The first process that calls it builds it under a
file lock, the others wait and read; later runs read. Files are safetensors or npz, never pickle.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import os
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import platformdirs
from filelock import FileLock

from workingpapers.desk.source import function_fingerprint

if TYPE_CHECKING:
    import torch

__all__ = ["artifact", "cache_directory"]

P = ParamSpec("P")
Built = TypeVar("Built", bound="dict[str, torch.Tensor] | dict[str, np.ndarray]")

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def cache_directory() -> Path:
    """Where artifacts are kept: `artifacts` in $WORKINGPAPERS_CACHE, or in the user's cache directory."""
    root = os.environ.get("WORKINGPAPERS_CACHE") or platformdirs.user_cache_dir("workingpapers", appauthor=False)
    return Path(root) / "artifacts"


def artifact(build: Callable[P, Built]) -> Callable[P, Built]:
    """Build what `build` returns once per arguments, and read it from the cache afterwards.

    It is built again when the source it can reach has changed. Every call reads the arrays anew, on the CPU and
    detached from any graph, so a caller may change what it gets.

    Parameters
    ----------
    build : module-level function of named str, int, float or bool arguments, returning a dict of torch tensors or a
        dict of NumPy arrays.

    Raises
    ------
    TypeError : `build` is not such a function, or is called with, or returns, something else.
    ValueError : an argument is NaN or infinite.

    Warns
    -----
    UserWarning : a file of the cache could not be read and is built again.
    """
    signature = inspect.signature(build)
    name = f"{build.__module__}.{build.__qualname__}"
    if "<" in build.__qualname__:
        raise TypeError(f"an artifact must be a module-level function, got {name}")
    for parameter in signature.parameters.values():
        if parameter.kind not in _NAMED:
            raise TypeError(f"an artifact's arguments must have names, got {parameter} in {name}{signature}")

    @functools.wraps(build)
    def cached(*args: P.args, **kwargs: P.kwargs) -> Built:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for argument, value in bound.arguments.items():
            if not isinstance(value, str | int | float | bool):
                raise TypeError(f"{argument} of the artifact {name} must be str, int, float or bool, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{argument} of the artifact {name} must be finite, got {value!r}")
        key = json.dumps([name, bound.arguments, function_fingerprint(build)], sort_keys=True)
        stem = cache_directory() / f"{name.rpartition('.claims.')[2]}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
        arrays = _read(stem)
        if arrays is None:
            stem.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{stem}.lock"):
                arrays = _read(stem)  # another process may have built it while this one waited
                if arrays is None:
                    _write(stem, build(*args, **kwargs), name)
                    arrays = _read(stem)
        return arrays  # type: ignore[return-value]

    return cached


def _read(stem: Path) -> dict[str, Any] | None:
    """The arrays kept at `stem`; None when there are none, or none that can be read."""
    from safetensors import SafetensorError

    for suffix, read in ((".safetensors", _read_tensors), (".npz", _read_arrays)):
        path = Path(f"{stem}{suffix}")
        if not path.exists():
            continue
        try:
            return read(path)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, SafetensorError) as error:
            warnings.warn(f"{path} could not be read and is built again: {error}", UserWarning, stacklevel=4)
    return None


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(path.read_bytes())  # not memory-mapped, so that the file may be replaced while tensors are in use


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _write(stem: Path, arrays: Any, name: str) -> None:
    """Write to a temporary file and move it into place; `stem` is locked by the caller."""
    suffix = _checked_suffix(arrays, name)
    temporary = Path(f"{stem}.part")
    try:
        with temporary.open("wb") as file:
            (_write_tensors if suffix == ".safetensors" else _write_arrays)(file, arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, f"{stem}{suffix}")
    finally:
        temporary.unlink(missing_ok=True)


def _checked_suffix(arrays: Any, name: str) -> str:
    if isinstance(arrays, dict) and arrays and all(isinstance(key, str) for key in arrays):
        torch = sys.modules.get("torch")  # whoever returns a tensor has imported torch
        if torch is not None and all(isinstance(value, torch.Tensor) for value in arrays.values()):
            return ".safetensors"
        if all(isinstance(value, np.ndarray) and not value.dtype.hasobject for value in arrays.values()):
            return ".npz"
    given = type(arrays).__name__
    if isinstance(arrays, dict):
        given = "{" + ", ".join(f"{key!r}: {_type(value)}" for key, value in arrays.items()) + "}"
    raise TypeError(
        f"the artifact {name} must return a dict of torch tensors or a dict of NumPy arrays, named by str, got {given}"
    )


def _type(value: Any) -> str:
    return f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def _write_tensors(file: IO[bytes], arrays: dict[str, torch.Tensor]) -> None:
    import torch
    from safetensors.torch import save

    # safetensors refuses views and shared memory (tied embeddings), so each tensor gets memory of its own.
    own = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in arrays.items()}
    file.write(save(own))


def _write_arrays(file: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(file, "w") as archive:  # as np.savez does, whose own arguments are not free as names
        for key, array in arrays.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
