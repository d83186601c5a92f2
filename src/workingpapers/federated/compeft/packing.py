"""The packed form of an update: one byte string that says what it holds and whether it arrived whole.

    7 bytes   b"COMPEFT"
    1 byte    version, 1
    1 byte    coding: 0 Golomb-Rice, 1 two bit masks
    3 x 8     number of entries d, number of non-zeros, bits of the gap code
    4 bytes   the scale s, float32
    4 bytes   length of the description
              description: JSON under zlib, with kind, tied names, the adapter's configuration, and for each tensor its
              name, type, shape, number of non-zeros and b*, the low bits of its gaps
              gap code and signs, or the masks of the positive and of the negative entries
    4 bytes   CRC-32 of everything before it

Integers are little-endian, bit streams start at the least significant bit. The checksum finds accidents; it is no
protection against forgery, so whatever is read is checked before it is believed: no claimed length makes `parse`
allocate more than a small multiple of the bytes it was given.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from workingpapers.federated.compeft.coding import Segment, TernaryCode, TernaryEncoder, byte_count, masks
from workingpapers.federated.compeft.sources import DTYPES, PIECE, Kind, TensorSpec

Coding = Literal["golomb", "bitmask"]
CODINGS: tuple[Coding, ...] = get_args(Coding)

MAGIC, VERSION = b"COMPEFT", 1
HEADER = struct.Struct("<7sBBQQQfI")
CHECKSUM = struct.Struct("<I")
MOST_DIMENSIONS = 64  # as in torch and NumPy
LONGEST_DESCRIPTION = 1 << 25  # bytes of JSON, enough for some hundred thousand tensors


@dataclass(frozen=True)
class Description:
    """What a packed update says about itself besides its numbers.

    Attributes
    ----------
    kind : "lora", "ia3" or "full".
    relative : whether it is a difference from a base that the receiver must have.
    layout : the tensors, in the order of the flattened vector.
    tied : further names of tensors in `layout`.
    config : text of the adapter's configuration file; empty without one.
    """

    kind: Kind
    relative: bool
    layout: tuple[TensorSpec, ...]
    tied: Mapping[str, str]
    config: str = ""

    def __post_init__(self) -> None:
        keys = [spec.key for spec in self.layout]
        names = [*keys, *self.tied]
        if not (all(isinstance(name, str) for name in names) and len(set(names)) == len(names)):
            raise ValueError("names of tensors must be different strings")
        whole = all(type(n) is int and 0 <= n < 2**62 for spec in self.layout for n in spec.shape)
        if not whole or any(len(spec.shape) > MOST_DIMENSIONS for spec in self.layout):
            raise ValueError(f"shapes must be at most {MOST_DIMENSIONS} whole numbers")
        if not all(spec.dtype in DTYPES for spec in self.layout):
            raise ValueError(f"types must be among {', '.join(DTYPES)}")
        if not (set(self.tied.values()) <= set(keys) and isinstance(self.config, str)):
            raise ValueError("tied names must point to tensors, and the configuration must be text")
        if self.kind not in get_args(Kind) or type(self.relative) is not bool:
            raise ValueError(f"no update has kind {self.kind!r} and relative {self.relative!r}")
        if self.kind == "full" and not self.relative:
            raise ValueError("an update of all weights must be relative")

    def packed(self, segments: Sequence[Segment]) -> bytes:
        """The bytes of the description, with what the code needs to know of each tensor."""
        rows = [
            [spec.key, spec.dtype, spec.shape, segment.nonzero, segment.shift]
            for spec, segment in zip(self.layout, segments, strict=True)
        ]
        fields = {"kind": self.kind, "relative": self.relative, "tensors": rows, "tied": dict(self.tied)}
        return zlib.compress(json.dumps({**fields, "config": self.config}, separators=(",", ":")).encode(), 9)

    @classmethod
    def unpacked(cls, data: memoryview) -> tuple[Description, tuple[Segment, ...]]:
        """Read what `packed` wrote; ValueError when it is something else."""
        inflate = zlib.decompressobj()
        try:
            text = inflate.decompress(data, LONGEST_DESCRIPTION)
            fields = json.loads(text) if inflate.eof and not inflate.unused_data else None
        except (zlib.error, ValueError, RecursionError) as error:
            raise ValueError(f"the packed description cannot be read: {error}") from None
        if fields is None:
            raise ValueError(f"the packed description is cut off or longer than {LONGEST_DESCRIPTION} bytes")
        try:
            layout, segments = [], []
            for key, dtype, shape, nonzero, shift in fields["tensors"]:
                layout.append(TensorSpec(key, dtype, tuple(shape)))
                if type(nonzero) is not int or type(shift) is not int:
                    raise ValueError(f"{key!r} must have whole numbers of non-zeros and low bits")
                segments.append((nonzero, shift))
            tied, config = dict(fields["tied"]), fields["config"]
            described = cls(fields["kind"], fields["relative"], tuple(layout), tied, config)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the packed description is not one of an update: {error!r}") from None
        sizes = (spec.size for spec in described.layout)
        return described, tuple(Segment(size, *numbers) for size, numbers in zip(sizes, segments, strict=True))


def parts(description: Description, scale: float, code: TernaryCode, coding: Coding) -> Iterator[bytes | memoryview]:
    """The packed form, in pieces to be written one after the other."""
    about = description.packed(code.segments)
    payload = code.payload() if coding == "golomb" else _mask_payload(code)
    bits = code.bits if coding == "golomb" else 0
    number = CODINGS.index(coding)
    head = HEADER.pack(MAGIC, VERSION, number, code.size, code.nonzero, bits, scale, len(about))
    checksum = 0
    for part in (head, about, *payload):
        checksum = zlib.crc32(part, checksum)
        yield part
    yield CHECKSUM.pack(checksum)


def parse(blob: bytes | bytearray | memoryview) -> tuple[Description, float, TernaryCode]:
    """Read the packed form.

    Raises
    ------
    ValueError : the bytes are not a packed update, or not a whole one; the message says what is wrong.
    """
    data = memoryview(blob).cast("B")
    if len(data) < HEADER.size + CHECKSUM.size or bytes(data[: len(MAGIC)]) != MAGIC:
        raise ValueError(f"not a packed update: {len(data)} bytes that start with {bytes(data[: len(MAGIC)])!r}")
    _, version, coding, size, nonzero, bits, scale, about = HEADER.unpack(data[: HEADER.size])
    if version != VERSION:
        raise ValueError(f"packed as version {version}, this program reads version {VERSION}")
    if coding >= len(CODINGS):
        raise ValueError(f"packed in coding {coding}, this program reads 0 to {len(CODINGS) - 1}")
    first, second = (bits, nonzero) if CODINGS[coding] == "golomb" else (size, size)
    ends = list(itertools.accumulate([HEADER.size, about, byte_count(first), byte_count(second)]))
    if len(data) != ends[-1] + CHECKSUM.size:
        raise ValueError(f"a packed update of {ends[-1] + CHECKSUM.size} bytes is announced, got {len(data)}")
    if zlib.crc32(data[: ends[-1]]) != CHECKSUM.unpack(data[ends[-1] :])[0]:
        raise ValueError("the packed update is damaged: its checksum does not match")

    description, segments = Description.unpacked(data[ends[0] : ends[1]])
    announced = sum(segment.size for segment in segments), sum(segment.nonzero for segment in segments)
    if (size, nonzero) != announced:
        raise ValueError(
            f"the packed update has {size} entries, {nonzero} of them non-zero; its tensors {announced[0]} and "
            f"{announced[1]}"
        )
    if not (math.isfinite(scale) and (scale > 0 or (scale == 0 and nonzero == 0))):
        raise ValueError(f"the scale of {nonzero} non-zeros must be positive and finite, got {scale}")
    payload = data[ends[1] : ends[2]], data[ends[2] : ends[3]]
    if CODINGS[coding] == "golomb":
        return description, scale, TernaryCode.from_payload(segments, bits, *payload)
    return description, scale, _code_of_masks(segments, *payload)


def _mask_payload(code: TernaryCode) -> tuple[memoryview, memoryview]:
    positive, negative = (mask.astype("<u8", copy=False).view(np.uint8) for mask in masks(code, PIECE))
    length = byte_count(code.size)
    return positive[:length].data, negative[:length].data


def _code_of_masks(segments: tuple[Segment, ...], positive: memoryview, negative: memoryview) -> TernaryCode:
    for segment in segments:
        segment.check()
    above, below = np.frombuffer(positive, dtype=np.uint8), np.frombuffer(negative, dtype=np.uint8)
    size = sum(segment.size for segment in segments)
    outside = size % 8 and int((above[-1] | below[-1]) >> (size % 8))
    if outside or (above & below).any():
        raise ValueError(f"the two masks do not describe {size} entries")
    encoder = TernaryEncoder((segment.size, segment.nonzero) for segment in segments)
    for start in range(0, size, PIECE):
        held, length = slice(start // 8, byte_count(start + PIECE)), min(PIECE, size - start)
        plus, minus = (np.unpackbits(mask[held], bitorder="little", count=length) for mask in (above, below))
        encoder.write(plus.view(np.int8) - minus.view(np.int8))
    return encoder.finish()
