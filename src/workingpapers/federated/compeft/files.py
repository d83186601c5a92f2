"""Compressing and rebuilding checkpoints on disk, a piece at a time.

Compressing reads a checkpoint four times (six times in float64) and holds the code that comes out and one piece of
some 10^4 entries; unpacking holds the code and one piece. So the memory needed is that of the packed result and about
2 MB, however large the checkpoint and its largest tensor.
"""

from __future__ import annotations

import itertools
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from workingpapers.common.validation import check_choice
from workingpapers.federated.compeft.adapters import start_unknown, unknown_start_message
from workingpapers.federated.compeft.checkpoints import (
    ADAPTER,
    CONFIG,
    Checkpoint,
    PathLike,
    replacing,
    write_safetensors,
)
from workingpapers.federated.compeft.packing import CODINGS, Coding, parts
from workingpapers.federated.compeft.sources import DTYPES, NAMES, PIECE, START, Kind, check_shapes, shapes_of
from workingpapers.federated.compeft.ternary import Alpha, TernaryUpdate, check_alpha, ternarise


def compress_file(
    path: PathLike,
    base: PathLike | None = None,
    density: float = 0.2,
    alpha: Alpha = 1.0,
    kind: Kind | None = None,
) -> TernaryUpdate:
    """`compress` for a checkpoint on disk, read a piece at a time.

    Parameters
    ----------
    path : a safetensors file; or a folder with a PEFT adapter, with `model.safetensors`, or with the shards and index
        of a large model. An adapter's configuration goes into the update, for `unpack_file` to restore.
    base : the checkpoint that fine-tuning started from; None for an adapter's known start.
    density, alpha : as in `compress`.
    kind : as in `compress`; None takes it from the adapter's configuration.

    Raises
    ------
    FileNotFoundError : there is no checkpoint at `path` or `base`.
    ValueError : as in `compress`; also for a file that is not in the safetensors format, for a kind that contradicts
        the adapter's configuration, and for an adapter with tensors that did not start at a known value.
    """
    check_alpha(alpha)
    source = Checkpoint("path", path)
    origin = None if base is None else Checkpoint("base", base)
    if source.kind is not None and kind not in (None, source.kind):
        raise ValueError(f"kind must be {source.kind!r}, that of the adapter in {os.fspath(path)}, got {kind!r}")
    known = source.kind if kind is None else kind
    check_choice("kind", known, get_args(Kind))
    assert known is not None
    if origin is None and source.kind is not None:
        unknown = start_unknown(source.specs, source.kind)
        if unknown:
            raise ValueError(unknown_start_message(unknown, source.kind))
    return ternarise("path", source, origin, density, known, source.config).scaled(alpha)


def pack_file(
    path: PathLike,
    destination: PathLike,
    base: PathLike | None = None,
    density: float = 0.2,
    alpha: Alpha = 1.0,
    kind: Kind | None = None,
    coding: Coding = "golomb",
) -> TernaryUpdate:
    """Compress a checkpoint into one packed file, and return the update.

    Parameters
    ----------
    destination : the file to write; it appears only when the whole of it has been written.
    path, base, density, alpha, kind : as in `compress_file`.
    coding : as in `TernaryUpdate.pack`.
    """
    check_choice("coding", coding, CODINGS)
    update = compress_file(path, base, density, alpha, kind)
    with replacing(Path(destination)) as file:
        for part in parts(update.description, update.scale, update.code, coding):
            file.write(part)
    return update


def read_packed(path: PathLike) -> TernaryUpdate:
    """The update in a packed file; raises ValueError as `TernaryUpdate.unpack` does."""
    with Path(path).open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError(f"not a packed update: {os.fspath(path)} is empty")
        # mapped, so that the bytes of the file are not in memory beside the code made from them
        return TernaryUpdate.unpack(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def unpack_file(
    path: PathLike, destination: PathLike, base: PathLike | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write the parameters theta_init + s * t of a packed file as a checkpoint, a piece at a time.

    Parameters
    ----------
    path : a packed file.
    destination : a file ending in .safetensors; or, for a PEFT adapter, a folder, made if it is not there, that
        receives `adapter_model.safetensors` and `adapter_config.json`.
    base : the checkpoint theta_init, for an update that was taken from one, and then only. Its tensors of integers are
        copied.
    dtype : floating-point type of all tensors; None keeps those of `base`, or the types before compression.

    Raises
    ------
    FileNotFoundError : `path` or `base` does not exist.
    ValueError : the packed file is damaged, `base` does not match, or the disk has too little room.
    """
    update = read_packed(path)
    if dtype is not None and dtype not in NAMES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, NAMES))}, got {dtype!r}")
    if update.relative and base is None:
        raise ValueError(f"{os.fspath(path)} is a difference from a base: pass the initial checkpoint as base=")
    if not update.relative and base is not None:
        raise ValueError(f"{os.fspath(path)} holds a whole {update.kind} adapter: it takes no base")
    origin = None if base is None else Checkpoint("base", base)
    if origin is not None:
        check_shapes(os.fspath(path), update.shapes, "base", shapes_of(origin))
    target = Path(destination)
    into_folder = target.suffix != ".safetensors"
    if into_folder and not update.description.config:
        raise ValueError(f"destination must end in .safetensors for an update that is no PEFT adapter, got {target}")

    held = origin.specs if origin is not None else {spec.key: spec for spec in update.description.layout}
    types = {key: DTYPES[held[key].dtype] if dtype is None else dtype for key in update.shapes}
    tensors = [
        (spec.key, NAMES[types[spec.key]], spec.shape, spec.size * types[spec.key].itemsize)
        for spec in update.description.layout
    ]
    copied = [] if origin is None else [(key, origin.stored[key]) for key in origin.skipped]
    tensors += [(key, stored.dtype, stored.shape, stored.stop - stored.start) for key, stored in copied]
    needed, free = sum(length for *_, length in tensors), shutil.disk_usage(target.absolute().parent).free
    if needed > free:
        raise ValueError(f"{os.fspath(path)} unpacks to {needed:,} bytes, but only {free:,} are free at {target}")

    if into_folder:
        target.mkdir(exist_ok=True)
        (target / CONFIG).write_text(update.description.config, encoding="utf-8")
    with replacing(target / ADAPTER if into_folder else target) as file:
        # tied names go where safetensors' own `save_model` puts them
        write_safetensors(file, tensors, {"format": "pt", **update.description.tied})
        for piece in _rebuilt(update, origin, types):
            file.write(piece)
        for _, stored in copied:
            for block in stored.blocks(PIECE):
                file.write(block)


def inspect_file(path: PathLike) -> dict[str, Any]:
    """What a packed file holds, after checking the whole of it.

    Returns
    -------
    dict : kind, relative, tensors (name to type and shape), size, nonzero, density, scale, nbytes, bits_per_parameter,
        entropy_nbytes (as `TernaryUpdate.nbytes` has it) and ratio_to_16_bit.
    """
    update = read_packed(path)
    nbytes = os.path.getsize(path)
    return {
        "kind": update.kind,
        "relative": update.relative,
        "tensors": {spec.key: {"dtype": spec.dtype, "shape": spec.shape} for spec in update.description.layout},
        "size": update.size,
        "nonzero": update.nonzero,
        "density": update.density,
        "scale": update.scale,
        "nbytes": nbytes,
        "bits_per_parameter": 8 * nbytes / update.size,
        "entropy_nbytes": update.nbytes("entropy"),
        "ratio_to_16_bit": 2 * update.size / nbytes,
    }


def _rebuilt(update: TernaryUpdate, origin: Checkpoint | None, types: dict[str, torch.dtype]) -> Iterator[memoryview]:
    """The bytes of theta_init + s * t, tensor by tensor in pieces."""
    layout = update.description.layout
    ternaries = update.code.chunks(
        min(PIECE, spec.size - first) for spec in layout for first in range(0, spec.size, PIECE)
    )
    for spec in layout:
        wide = np.dtype(np.float64 if spec.dtype == "F64" else np.float32)
        starts: Iterator[Any] = (
            itertools.repeat(START[update.kind]) if origin is None else origin.pieces(spec.key, wide)
        )
        for ternary in itertools.islice(ternaries, -(-spec.size // PIECE)):
            rebuilt = torch.from_numpy(next(starts) + wide.type(update.scale) * ternary).to(types[spec.key])
            yield rebuilt.view(torch.uint8).numpy().data
