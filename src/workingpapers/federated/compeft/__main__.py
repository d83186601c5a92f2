"""`python -m workingpapers.federated.compeft pack|unpack|inspect`: checkpoints to packed files and back."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import get_args

from workingpapers.federated.compeft.files import inspect_file, pack_file, unpack_file
from workingpapers.federated.compeft.packing import CODINGS
from workingpapers.federated.compeft.sources import DTYPES, Kind


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it succeeded, 1 with a sentence on standard error when it did not."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "pack":
            update = pack_file(
                given.checkpoint, given.packed, given.base, given.density, given.alpha, given.kind, given.coding
            )
            nbytes = os.path.getsize(given.packed)
            print(f"{update!r}: {2 * update.size / nbytes:.1f} times smaller than in 16 bits")
        elif given.command == "unpack":
            unpack_file(given.packed, given.checkpoint, given.base, DTYPES[given.dtype] if given.dtype else None)
        else:
            print(json.dumps(inspect_file(given.packed), indent=2))
    except (ValueError, OSError) as error:
        print(f"{given.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workingpapers.federated.compeft", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    pack = commands.add_parser("pack", help="compress a checkpoint into one file")
    pack.add_argument("checkpoint", help="safetensors file, PEFT adapter folder or model folder")
    pack.add_argument("packed", help="file to write")
    pack.add_argument("--base", help="checkpoint that fine-tuning started from")
    pack.add_argument("--density", type=float, default=0.2, help="share of entries kept, in (0, 1] (default 0.2)")
    pack.add_argument("--alpha", type=_alpha, default=1.0, help="multiple of sigma, or stc (default 1)")
    pack.add_argument("--kind", choices=get_args(Kind), help="default: that of the adapter's configuration")
    pack.add_argument("--coding", choices=CODINGS, default="golomb")

    unpack = commands.add_parser("unpack", help="rebuild a checkpoint from a packed file")
    unpack.add_argument("packed", help="file written by pack")
    unpack.add_argument("checkpoint", help="file ending in .safetensors, or folder for a PEFT adapter")
    unpack.add_argument("--base", help="checkpoint that fine-tuning started from")
    unpack.add_argument("--dtype", choices=list(DTYPES), help="type of all tensors (default: as they were)")

    inspect = commands.add_parser("inspect", help="check a packed file and say what it holds")
    inspect.add_argument("packed", help="file written by pack")
    return parser


def _alpha(text: str) -> float | str:
    return text if text == "stc" else float(text)


if __name__ == "__main__":
    sys.exit(main())
