"""What ComPEFT is compared with: other ways to ship a fine-tuning residual.

`stc` and `sign_only` are ternary and give a `TernaryUpdate`; the others give the parameters that a receiver would
have. STC shares its ternary vector with ComPEFT at the same density and differs in the scalar alone: the mean kept
magnitude, which minimises ||tau - s t||. A comparison of the two compares that with a scalar tuned on the task.
"""

from __future__ import annotations

from typing import get_args

import torch

from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number
from workingpapers.federated.compeft.sources import (
    DTYPES,
    START,
    Kind,
    Parameters,
    StateDict,
    StateDictSource,
    check_shapes,
    shapes_of,
)
from workingpapers.federated.compeft.ternary import TernaryUpdate, compress


def stc(
    state_dict: StateDict, base: StateDict | None = None, density: float = 0.2, kind: Kind = "lora"
) -> TernaryUpdate:
    """Sparse ternary compression: the largest entries, each replaced by its sign times their mean magnitude.

    Sattler, Wiedemann, Müller and Samek, "Robust and Communication-Efficient Federated Learning from Non-IID Data",
    2019. Parameters as in `compress`.
    """
    return compress(state_dict, base, density, "stc", kind)


def sign_only(
    state_dict: StateDict, base: StateDict | None = None, alpha: float = 1.0, kind: Kind = "lora"
) -> TernaryUpdate:
    """The sign of every entry and one scale alpha * sigma: ComPEFT without sparsification. Parameters as there."""
    return compress(state_dict, base, 1.0, alpha, kind)


def pruned(
    state_dict: StateDict, base: StateDict | None = None, density: float = 0.2, kind: Kind = "lora", scale: float = 1.0
) -> Parameters:
    """The parameters when the largest entries of the residual keep their values and the others become 0.

    Parameters
    ----------
    state_dict, base, density, kind : as in `compress`.
    scale : factor on the values kept, above 0; tuned, it gives pruning the freedom that alpha gives ComPEFT.
    """
    check_number("scale", scale, above=0)
    update = compress(state_dict, base, density, "stc", kind)
    rebuilt = {}
    for spec, ternary in update.tensors():
        tau, start = _residual(state_dict[spec.key], None if base is None else base[spec.key], kind)
        kept = torch.from_numpy(ternary).to(tau.device).reshape(spec.shape) != 0
        rebuilt[spec.key] = (start + scale * tau * kept).to(DTYPES[spec.dtype])
    return rebuilt | {other: rebuilt[key] for other, key in update.description.tied.items()}


def uniform_quant(
    state_dict: StateDict, base: StateDict | None = None, bits: int = 4, kind: Kind = "lora"
) -> Parameters:
    """The parameters when each tensor of the residual is rounded to 2^bits - 1 evenly spaced values.

    The values reach from minus to plus the tensor's largest magnitude and include 0; each tensor carries one scale.

    Parameters
    ----------
    state_dict, base, kind : as in `compress`.
    bits : of each entry, 2 to 16.
    """
    check_integer("bits", bits, at_least=2, at_most=16)
    check_choice("kind", kind, get_args(Kind))
    if kind == "full" and base is None:
        raise ValueError("kind='full' needs base=, the weights that fine-tuning started from")
    source = StateDictSource("state_dict", state_dict)
    if base is not None:
        check_shapes("state_dict", shapes_of(source), "base", shapes_of(StateDictSource("base", base)))
    levels = 2 ** (bits - 1) - 1
    rebuilt = {}
    for key in source.tensors:
        tau, start = _residual(state_dict[key], None if base is None else base[key], kind)
        check_finite(key, tau)
        largest = tau.abs().amax() if tau.numel() else tau.new_zeros(())
        step = torch.where(largest > 0, largest / levels, 1.0)
        rebuilt[key] = (start + (tau / step).round() * step).to(state_dict[key].dtype)
    return rebuilt


def original(state_dict: StateDict, dtype: torch.dtype = torch.bfloat16) -> Parameters:
    """The uncompressed parameters as they are usually shipped, rounded to 16 bits, in the types they came in."""
    source = StateDictSource("state_dict", state_dict)
    return {key: tensor.to(dtype).to(tensor.dtype) for key, tensor in source.tensors.items()}


def _residual(tuned: torch.Tensor, base: torch.Tensor | None, kind: Kind) -> tuple[torch.Tensor, torch.Tensor | float]:
    """tau and theta_init of one tensor, in float32 or better."""
    wide = torch.promote_types(tuned.dtype, torch.float32)
    start = START[kind] if base is None else base.detach().to(tuned.device, wide)
    return tuned.detach().to(wide) - start, start
