"""Where parameters come from: named tensors that are read in pieces, from memory here, from files in `files`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float

from workingpapers.federated.compeft.selection import Piece, Pieces

Tensor = Float[torch.Tensor, "..."]
StateDict = Mapping[str, Tensor]
Parameters = dict[str, Tensor]
Kind = Literal["lora", "ia3", "full"]

PIECE = 3 << 13  # entries read at once: fits into a core's cache, and torch starts no threads below 32,768 entries
START: dict[str, float] = {"lora": 0.0, "ia3": 1.0}  # where each adapter does nothing
DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, floating-point type (as safetensors names it) and shape of one tensor."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Source(Protocol):
    """Named tensors that can be read in pieces, again and again."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The floating-point tensors, each once, by key in sorted order."""

    @property
    def tied(self) -> Mapping[str, str]:
        """Other names of tensors in `specs`."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of tensors of integers or truth values, which are no part of a task vector."""

    def pieces(self, key: str, dtype: np.dtype) -> Iterator[Piece]:
        """The entries of one tensor in row-major order, `PIECE` at a time; not to be written to."""


class StateDictSource:
    """A state dict in memory.

    Parameters
    ----------
    name : of the argument, for messages.
    state_dict : name to tensor, dense, on any device.

    Raises
    ------
    TypeError : it is not a mapping of names to tensors.
    ValueError : a tensor has a floating-point type other than bfloat16, float16, float32 and float64.
    """

    def __init__(self, name: str, state_dict: StateDict) -> None:
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"{name} must map names to tensors, got {type(state_dict).__name__}")
        self.tensors: dict[str, torch.Tensor] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.tied: dict[str, str] = {}
        skipped = []
        first_with: dict[object, str] = {}
        for key in state_dict:
            if not isinstance(key, str) or not isinstance(state_dict[key], torch.Tensor):
                raise TypeError(f"{name} must map names to tensors, got {key!r}: {type(state_dict[key]).__name__}")
        for key in sorted(state_dict):
            tensor = state_dict[key].detach()
            if not tensor.is_floating_point():
                skipped.append(key)
                continue
            if tensor.dtype not in NAMES or tensor.layout is not torch.strided or tensor.is_meta:
                raise ValueError(
                    f"{name}[{key!r}] must be a dense tensor of {', '.join(map(str, NAMES))}, "
                    f"got {tensor.dtype} ({tensor.layout}, on {tensor.device})"
                )
            self.tensors[key] = tensor
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if tensor.numel() and first_with.setdefault(place, key) != key:
                self.tied[key] = first_with[place]
            else:
                self.specs[key] = TensorSpec(key, NAMES[tensor.dtype], tuple(tensor.shape))
        self.skipped = tuple(skipped)

    def pieces(self, key: str, dtype: np.dtype) -> Iterator[Piece]:
        wide = torch.float64 if dtype.itemsize == 8 else torch.float32
        flat = self.tensors[key].reshape(-1)
        for first in range(0, len(flat), PIECE):
            yield flat[first : first + PIECE].to(wide).cpu().numpy()

    def untie(self, base: StateDictSource) -> None:
        """Keep as tied only what is equal in `base` too: elsewhere the differences from it are not."""
        for other, key in list(self.tied.items()):
            if other in base.tensors and key in base.tensors and torch.equal(base.tensors[other], base.tensors[key]):
                continue
            tensor = self.tensors[other]
            self.specs[other] = TensorSpec(other, NAMES[tensor.dtype], tuple(tensor.shape))
            del self.tied[other]
        self.specs = dict(sorted(self.specs.items()))


def residual(source: Source, base: Source | None, kind: Kind, dtype: np.dtype) -> Pieces:
    """tau = theta_ft - theta_init in sorted key order, where theta_init is `base` or where the adapter does nothing."""
    start = dtype.type(START.get(kind, 0.0))

    def walk() -> Iterator[tuple[str, Piece]]:
        for key in source.specs:
            if base is not None:
                for piece, origin in zip(source.pieces(key, dtype), base.pieces(key, dtype), strict=True):
                    yield key, piece - origin
            else:
                for piece in source.pieces(key, dtype):
                    yield key, piece - start if start else piece

    return walk


def shapes_of(source: Source) -> dict[str, tuple[int, ...]]:
    """Shape by name, tied names included."""
    shapes = {key: spec.shape for key, spec in source.specs.items()}
    return shapes | {other: shapes[key] for other, key in source.tied.items()}


def check_shapes(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    other: str,
    theirs: Mapping[str, tuple[int, ...]],
    *,
    theirs_may_have_more: bool = False,
) -> None:
    """Raise ValueError, naming the tensor, unless both have tensors of the same names and shapes."""
    for key in sorted(shapes if theirs_may_have_more else shapes.keys() | theirs.keys()):
        if shapes.get(key) != theirs.get(key):
            raise ValueError(f"{key!r} {_shape_in(shapes, key)} {name} but {_shape_in(theirs, key)} {other}")


def _shape_in(shapes: Mapping[str, tuple[int, ...]], key: str) -> str:
    return f"has shape {shapes[key]} in" if key in shapes else "is not in"
