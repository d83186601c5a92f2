"""Checkpoints on disk, read and written a piece at a time: safetensors files, sharded checkpoints, PEFT folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from safetensors import SafetensorError, safe_open

from workingpapers.federated.compeft.adapters import PEFT_KINDS
from workingpapers.federated.compeft.selection import Piece
from workingpapers.federated.compeft.sources import DTYPES, PIECE, Kind, TensorSpec

PathLike = str | os.PathLike[str]

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WHOLE, SHARDED = "model.safetensors", "model.safetensors.index.json"
STORED = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type as safetensors names it, its shape, and where its bytes are."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def blocks(self, length: int) -> Iterator[bytes]:
        """Its bytes, `length` at a time."""
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            left = self.stop - self.start
            while left:
                block = file.read(min(length, left))
                if not block:
                    raise ValueError(f"{self.file} has become shorter while it was read")
                left -= len(block)
                yield block


class Checkpoint:
    """A `Source` on disk. Files are read, not mapped, so that what was read once does not stay in memory.

    Parameters
    ----------
    name : of the argument, for messages.
    path : a safetensors file; or a folder with an adapter, with one model file, or with shards and their index.

    Attributes
    ----------
    kind, config : of the adapter's configuration file; None and "" without one.

    Raises
    ------
    FileNotFoundError : there is nothing at `path`, or no checkpoint in the folder.
    ValueError : a file is not in the safetensors format, or holds floating-point numbers of an unknown type; the
        adapter is neither LoRA nor (IA)^3.
    """

    def __init__(self, name: str, path: PathLike) -> None:
        self.kind: Kind | None = None
        self.config = ""
        self.tied: Mapping[str, str] = {}
        place = Path(path)
        if (place / CONFIG).is_file():
            self.config = (place / CONFIG).read_text(encoding="utf-8")
            self.kind = _kind_of(self.config, place / CONFIG)
        self.stored = {key: held for file in _files(name, place) for key, held in _header(file).items()}
        self.specs: dict[str, TensorSpec] = {}
        skipped = []
        for key in sorted(self.stored):
            held = self.stored[key]
            if held.dtype in DTYPES:
                self.specs[key] = TensorSpec(key, held.dtype, held.shape)
            elif held.dtype.startswith(("F", "BF")):
                raise ValueError(f"{key!r} in {name} must be of type {', '.join(DTYPES)}, got {held.dtype}")
            else:
                skipped.append(key)
        self.skipped = tuple(skipped)

    def pieces(self, key: str, dtype: np.dtype) -> Iterator[Piece]:
        held = self.stored[key]
        narrow = np.dtype(STORED[held.dtype])
        for block in held.blocks(PIECE * narrow.itemsize):
            entries = np.frombuffer(block, dtype=narrow)
            if held.dtype == "BF16":  # the upper half of a float32
                entries = (entries.astype(np.uint32) << 16).view(np.float32)
            yield entries.astype(dtype, copy=False)


def write_safetensors(
    file: IO[bytes], tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> None:
    """Write the head of a safetensors file; the tensors' bytes must follow in the same order.

    Parameters
    ----------
    tensors : name, type as safetensors names it, shape and number of bytes of each.
    """
    head: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for key, dtype, shape, length in tensors:
        head[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the numbers aligned
    file.write(len(text).to_bytes(8, "little") + text)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its place at `path` once it has been written whole."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _files(name: str, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for whole in (ADAPTER, WHOLE):
        if (path / whole).is_file():
            return [path / whole]
    if (path / SHARDED).is_file():
        try:
            shards = set(json.loads((path / SHARDED).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path / SHARDED} is not an index of shards: {error!r}") from None
        return [path / shard for shard in sorted(shards)]
    raise FileNotFoundError(
        f"{name} must be a safetensors file or a folder with {ADAPTER}, {WHOLE} or {SHARDED}, got {path}"
    )


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="numpy"):  # the format's own reader checks every offset
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from None
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(length))
    entries.pop("__metadata__", None)
    return {
        key: Stored(file, entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
        for key, entry in entries.items()
    }


def _kind_of(config: str, path: Path) -> Kind:
    try:
        peft_type = json.loads(config)["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an adapter's configuration: {error!r}") from None
    if peft_type not in PEFT_KINDS:
        raise ValueError(f"the adapter must be of type {' or '.join(PEFT_KINDS)}, got {peft_type!r} in {path}")
    return PEFT_KINDS[peft_type]
