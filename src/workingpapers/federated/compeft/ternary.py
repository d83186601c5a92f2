"""Compressing one fine-tuning residual to signs and one scale, and computing with the result."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch

from workingpapers.common.validation import check_choice, check_number
from workingpapers.federated.compeft.coding import Ternary, TernaryCode, Words, byte_count, entropy_bits, masks
from workingpapers.federated.compeft.packing import CODINGS, Coding, Description, parse, parts
from workingpapers.federated.compeft.selection import Piece, encode, select
from workingpapers.federated.compeft.sources import (
    DTYPES,
    PIECE,
    START,
    Kind,
    Parameters,
    Source,
    StateDict,
    StateDictSource,
    Tensor,
    TensorSpec,
    check_shapes,
    residual,
    shapes_of,
)

Alpha = float | Literal["stc"]


@dataclass(frozen=True, eq=False, repr=False)
class TernaryUpdate:
    """A compressed fine-tuning residual s * t, with t in {-1, 0, 1}^d held as its Golomb-Rice code.

    It comes from `compress`, `compress_file` or `unpack`. Whatever needs the entries decodes them on the way, tensor
    by tensor; only `dot` and `hamming` make the two bit masks (2 bits per parameter) and keep them.

    Attributes
    ----------
    description : kind of the update, and names, types and shapes of its tensors.
    scale : s, at least 0, exactly representable in float32; 0 when t is.
    code : t.
    """

    description: Description
    scale: float
    code: TernaryCode = field(repr=False)

    @property
    def size(self) -> int:
        """Number of parameters, d."""
        return self.code.size

    @property
    def nonzero(self) -> int:
        """Number of entries of t that are not 0."""
        return self.code.nonzero

    @property
    def density(self) -> float:
        """Share of entries of t that are not 0; below the density asked for where tau had too few non-zeros."""
        return self.nonzero / self.size

    @property
    def kind(self) -> Kind:
        """The kind of adapter: "lora", "ia3" or "full"."""
        return self.description.kind

    @property
    def relative(self) -> bool:
        """Whether it was taken from a base, which rebuilding then needs."""
        return self.description.relative

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors, tied names left out."""
        return {spec.key: spec.shape for spec in self.description.layout}

    def __repr__(self) -> str:
        return (
            f"TernaryUpdate({self.kind}{', relative' if self.relative else ''}: {self.size:,} parameters in "
            f"{len(self.shapes)} tensors, density {self.density:.4g}, scale {self.scale:.4g}, {self.nbytes():,} bytes)"
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Rebuilding

    def to_state_dict(self, dtype: torch.dtype | None = None, *, base: StateDict | None = None) -> Parameters:
        """The parameters theta_init + s * t (step 4).

        Parameters
        ----------
        dtype : floating-point type of every tensor; None gives each the type it had when it was compressed.
        base : theta_init, needed for an update that was taken from a base, and then only; not modified. What it holds
            besides the update's tensors is left out of the result.

        Returns
        -------
        dict : name to tensor, on the device of `base`, else on the CPU; tied names share one tensor.

        Raises
        ------
        ValueError : `base` is missing or not wanted, or lacks a tensor, or holds one of another shape.
        """
        if self.relative and base is None:
            raise ValueError("this update is a difference from a base: pass the initial parameters as base=")
        if not self.relative and base is not None:
            raise ValueError(f"this {self.kind} update holds the whole adapter: it takes no base")
        return self._added_to(base, dtype)

    def __add__(self, other: TernaryUpdate | StateDict) -> Parameters:
        """The residual s * t added to dense weights, or to another update's residual: dense tensors, name by name.

        Entries of `other` that are no part of this update are passed on as they are.
        """
        if isinstance(other, TernaryUpdate):
            self._check_comparable(other)
            return self._added_to(other.residual(), None)
        if not isinstance(other, Mapping):
            return NotImplemented
        return {**other, **self._added_to(other, None)}

    __radd__ = __add__

    def residual(self) -> Parameters:
        """The residual s * t by itself, in float32 (float64 for float64 parameters)."""
        rebuilt = dict(self.steps())
        return rebuilt | {other: rebuilt[key] for other, key in self.description.tied.items()}

    def tensors(self) -> Iterator[tuple[TensorSpec, Ternary]]:
        """The ternary vector tensor by tensor, flattened, in the order of the packed form."""
        layout = self.description.layout
        return zip(layout, self.code.chunks(spec.size for spec in layout), strict=True)

    def steps(self) -> Iterator[tuple[str, Tensor]]:
        """The residual s * t, one dense tensor at a time."""
        for spec, pieces in self._pieces():
            yield spec.key, _dense(spec, pieces, 0.0, torch.float64 if spec.dtype == "F64" else torch.float32)

    def _pieces(self) -> Iterator[tuple[TensorSpec, Iterator[Piece]]]:
        """Each tensor with the pieces of its s * t, which must be taken before those of the next."""
        layout = self.description.layout
        lengths = (min(PIECE, spec.size - first) for spec in layout for first in range(0, spec.size, PIECE))
        ternaries = self.code.chunks(lengths)
        for spec in layout:
            of_this = itertools.islice(ternaries, -(-spec.size // PIECE))
            wide = np.float64 if spec.dtype == "F64" else np.float32
            yield spec, (np.multiply(ternary, wide(self.scale), dtype=wide) for ternary in of_this)

    def _added_to(self, base: StateDict | None, dtype: torch.dtype | None) -> Parameters:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
        if base is not None:
            self._check_base(base)
        rebuilt = {}
        for spec, pieces in self._pieces():
            if base is None:
                rebuilt[spec.key] = _dense(spec, pieces, START[self.kind], dtype or DTYPES[spec.dtype])
            else:
                start = base[spec.key].detach()
                rebuilt[spec.key] = _dense(spec, pieces, start, dtype or start.dtype)
        return rebuilt | {other: rebuilt[key] for other, key in self.description.tied.items()}

    def _check_base(self, base: StateDict) -> None:
        if not isinstance(base, Mapping):
            raise TypeError(f"base must map names to tensors, got {type(base).__name__}")
        held = {key: tuple(base[key].shape) for key in self.shapes if key in base}
        check_shapes("the update", self.shapes, "base", held)

    # ----------------------------------------------------------------------------------------------------------------
    # Sending

    def nbytes(self, coding: Literal["golomb", "bitmask", "entropy"] = "golomb") -> int:
        """Size in bytes.

        Parameters
        ----------
        coding : "golomb" and "bitmask" give the exact length of `pack(coding)`, names and shapes included; "entropy" is
            d * H(k) + 16 bits, without names and shapes: the least for entries that are all alike. Tensors of unequal
            density take less.
        """
        if coding == "entropy":
            return byte_count(int(np.ceil(entropy_bits(self.size, self.nonzero))) + 16)
        check_choice("coding", coding, (*CODINGS, "entropy"))
        golomb = sum(len(part) for part in parts(self.description, self.scale, self.code, "golomb"))
        if coding == "golomb":
            return golomb
        return golomb - sum(len(part) for part in self.code.payload()) + 2 * byte_count(self.size)

    def pack(self, coding: Coding = "golomb") -> bytes:
        """The bytes to send; `unpack` gives back the same update.

        Parameters
        ----------
        coding : "golomb" is the shorter; "bitmask" takes 2 bits per parameter whatever the density, and any entry can
            be looked up in it without decoding.
        """
        check_choice("coding", coding, CODINGS)
        return b"".join(parts(self.description, self.scale, self.code, coding))

    @classmethod
    def unpack(cls, blob: bytes | bytearray | memoryview) -> TernaryUpdate:
        """Read what `pack` wrote.

        The bytes may come from a stranger: every claim they make is checked, and no more memory than a small multiple
        of their length is used. Look at `size` before making a stranger's update dense: an empty one of any size packs
        into a hundred bytes.

        Raises
        ------
        TypeError : not bytes.
        ValueError : the bytes are not a packed update, are damaged or incomplete, or contradict themselves.
        """
        if not isinstance(blob, bytes | bytearray | memoryview):
            raise TypeError(f"blob must be bytes, got {type(blob).__name__}")
        return cls(*parse(blob))

    # ----------------------------------------------------------------------------------------------------------------
    # Arithmetic on the masks

    @cached_property
    def masks(self) -> tuple[Words, Words]:
        """P and N: where t is 1 and where it is -1, a bit for each entry, the first in the lowest bit."""
        return masks(self.code, PIECE)

    def dot(self, other: TernaryUpdate) -> float:
        """Inner product <s1 t1, s2 t2> of two updates of the same tensors.

        <t1, t2> = |P1 & P2| + |N1 & N2| - |P1 & N2| - |N1 & P2|, where |.| counts bits.
        """
        self._check_comparable(other)
        (p1, n1), (p2, n2) = self.masks, other.masks
        return self.scale * other.scale * (_count(p1 & p2) + _count(n1 & n2) - _count(p1 & n2) - _count(n1 & p2))

    def hamming(self, other: TernaryUpdate) -> int:
        """||t1 - t2||_1 = |P1 ^ P2| + |N1 ^ N2|: entries that differ, opposite signs counted twice."""
        self._check_comparable(other)
        (p1, n1), (p2, n2) = self.masks, other.masks
        return _count(p1 ^ p2) + _count(n1 ^ n2)

    def _check_comparable(self, other: TernaryUpdate) -> None:
        if not isinstance(other, TernaryUpdate):
            raise TypeError(f"other must be a TernaryUpdate, got {type(other).__name__}")
        check_shapes("one update", self.shapes, "the other", other.shapes)


def compress(
    state_dict: StateDict,
    base: StateDict | None = None,
    density: float = 0.2,
    alpha: Alpha = 1.0,
    kind: Kind = "lora",
) -> TernaryUpdate:
    """Keep the signs of the largest entries of a fine-tuning residual, and one scale for all of them.

    With tau = theta_ft - theta_init over all tensors together, in sorted key order: t = sign(tau) on the
    floor(density * d) entries of largest magnitude (ties go to the lower index, zeros are never kept) and 0 elsewhere,
    and s = alpha * sigma(tau), the standard deviation of all of tau about its mean with divisor d - 1. The deviation
    and the differences are computed in float32 or better, whatever the type of the parameters.

    Parameters
    ----------
    state_dict : the fine-tuned parameters theta_ft: bfloat16, float16, float32 or float64, finite, any device; not
        modified. Tensors of integers are left out, with a warning. Tied tensors (the same memory under two names)
        count once.
    base : theta_init, tensors of the same names and shapes. None stands for where the adapter does nothing: 0 for
        LoRA's factors, 1 for (IA)^3's scalings. For LoRA the parameters that training started from, which a receiver
        can draw anew from their seed, make a smaller residual and cost less accuracy.
    density : the share k of entries kept, in (0, 1]; a fraction, not a percentage.
    alpha : multiple of sigma, above 0; or "stc" for s = mean |tau| over the kept entries, as sparse ternary compression
        has it. `ComPEFTTuner` chooses it. LoRA multiplies two factors, so there alpha acts on the weights squared.
    kind : "lora", "ia3" or "full" (all weights; needs `base`).

    Returns
    -------
    TernaryUpdate : with fewer than floor(density * d) non-zeros, and a warning, where tau has fewer.

    Raises
    ------
    TypeError : an argument is of the wrong type.
    ValueError : density or alpha is out of range, `base` is missing or does not match, a tensor is not finite (the
        message names it), or the scale does not fit into float32.
    """
    check_choice("kind", kind, get_args(Kind))
    source = StateDictSource("state_dict", state_dict)
    origin = None
    if base is not None:
        origin = StateDictSource("base", base)
        source.untie(origin)
    return ternarise("state_dict", source, origin, density, kind).scaled(alpha)


@dataclass(frozen=True)
class Ternarised:
    """A ternary vector whose scale is still to be chosen.

    Attributes
    ----------
    update : with scale 0.
    deviation : sigma of the residual.
    kept_mean : mean magnitude of the residual over the kept entries.
    """

    update: TernaryUpdate
    deviation: float
    kept_mean: float

    @property
    def stc_alpha(self) -> float:
        """The multiple of sigma that sparse ternary compression uses."""
        return self.kept_mean / self.deviation if self.deviation > 0 else 1.0

    def scaled(self, alpha: Alpha) -> TernaryUpdate:
        """The update with s = alpha * sigma, or the mean kept magnitude for "stc" (step 3)."""
        check_alpha(alpha)
        wanted = self.kept_mean if alpha == "stc" else alpha * self.deviation
        with np.errstate(over="ignore", under="ignore"):
            scale = float(np.float32(wanted))
        if self.update.nonzero and not 0 < scale < np.inf:
            why = "all its entries are equal" if self.deviation == 0 else "float32 cannot hold it"
            raise ValueError(f"the residual has no scale: alpha * sigma is {wanted:g}, {why}")
        return replace(self.update, scale=scale if self.update.nonzero else 0.0)


def check_alpha(alpha: Any) -> None:
    """Raise unless `alpha` is a positive number or "stc"."""
    if not isinstance(alpha, str):
        check_number("alpha", alpha, above=0)
    elif alpha != "stc":
        raise ValueError(f"alpha must be a positive number or 'stc', got {alpha!r}")


def ternarise(
    name: str, source: Source, base: Source | None, density: float, kind: Kind, config: str = ""
) -> Ternarised:
    """Steps 1 and 2 of ComPEFT for parameters read in pieces: four passes over them, six in float64."""
    check_number("density", density, above=0, at_most=1)
    if kind == "full" and base is None:
        raise ValueError("kind='full' needs base=, the weights that fine-tuning started from")
    if base is not None:
        check_shapes(name, shapes_of(source), "base", shapes_of(base))
    layout = tuple(source.specs.values())
    size = sum(spec.size for spec in layout)
    if size < 2:
        raise ValueError(f"{name} must hold at least 2 floating-point entries, got {size}")
    if source.skipped:
        warnings.warn(f"left out, not of floating point: {', '.join(source.skipped)}", UserWarning, stacklevel=3)

    dtype = np.dtype(np.float64 if any(spec.dtype == "F64" for spec in layout) else np.float32)
    pieces = residual(source, base, kind, dtype)
    chosen = select(pieces, size, density, dtype.itemsize)
    wanted = int(density * size)
    if chosen.kept < wanted:
        warnings.warn(
            f"the residual has only {chosen.kept} non-zeros, all are kept where density {density:g} asks for {wanted}",
            UserWarning,
            stacklevel=3,
        )
    elif wanted == 0:
        warnings.warn(f"density {density:g} of {size} entries keeps none", UserWarning, stacklevel=3)
    code, kept_mean = encode(pieces, chosen, {spec.key: spec.size for spec in layout})
    description = Description(kind, base is not None, layout, dict(source.tied), config)
    return Ternarised(TernaryUpdate(description, 0.0, code), chosen.deviation, kept_mean)


def _dense(spec: TensorSpec, steps: Iterator[Piece], start: torch.Tensor | float, dtype: torch.dtype) -> torch.Tensor:
    """start + s * t of one tensor, computed in float32 or better."""
    origin = start.reshape(-1) if isinstance(start, torch.Tensor) else None
    rebuilt = torch.empty(spec.shape, dtype=dtype, device=None if origin is None else origin.device)
    flat, first = rebuilt.view(-1), 0
    for step in steps:
        held = slice(first, first + len(step))
        if origin is None:
            flat[held] = torch.from_numpy(step + step.dtype.type(start))
        else:
            added = torch.from_numpy(step).to(origin.device)
            flat[held] = origin[held].to(added.dtype) + added
        first += len(step)
    return rebuilt


def _count(words: Words) -> int:
    return int(np.bitwise_count(words).sum(dtype=np.int64))
