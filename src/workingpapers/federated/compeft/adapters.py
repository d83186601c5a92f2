"""Updates in live models: PEFT models, and modules with a state dict of their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from workingpapers.common.validation import require
from workingpapers.federated.compeft.sources import Kind, Parameters, StateDict, check_shapes
from workingpapers.federated.compeft.ternary import TernaryUpdate

# PEFT's types of adapter, and what the names of their tensors contain where training started from a known value.
PEFT_KINDS: dict[str, Kind] = {"LORA": "lora", "IA3": "ia3"}
STARTS_KNOWN: dict[Kind, tuple[str, ...]] = {"lora": ("lora_A", "lora_B", "lora_embedding_"), "ia3": ("ia3_l",)}


def from_peft(model: nn.Module, adapter_name: str | None = None) -> Parameters:
    """The parameters of a PEFT model's adapter, under the names that PEFT saves them by, ready for `compress`.

    Parameters
    ----------
    model : a `peft.PeftModel` with a LoRA or (IA)^3 adapter.
    adapter_name : which adapter; None for the active one.

    Raises
    ------
    ImportError : peft is absent.
    TypeError : not a PEFT model.
    ValueError : the adapter is of another kind.

    Warns
    -----
    UserWarning : it holds tensors that did not start where the adapter does nothing (a new head, DoRA's magnitudes).
        Compress those relative to their initial values, or take them out and send them by themselves.
    """
    peft = require("peft", extra="federated")
    name, kind = _adapter(model, adapter_name)
    parameters = dict(peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    unknown = start_unknown(parameters, kind)
    if unknown:
        warnings.warn(unknown_start_message(unknown, kind), UserWarning, stacklevel=2)
    return parameters


def into_peft(
    model: nn.Module, update: TernaryUpdate, adapter_name: str | None = None, *, base: StateDict | None = None
) -> None:
    """Load an update into a PEFT model's adapter, in place.

    Parameters
    ----------
    model : a `peft.PeftModel` whose adapter has the update's tensors.
    update : of an adapter of the same kind.
    adapter_name : which adapter; None for the active one.
    base : the initial adapter, for an update taken from one.

    Raises
    ------
    ImportError : peft is absent.
    TypeError : not a PEFT model.
    ValueError : the adapter is of another kind, lacks a tensor, or has one of another shape; nothing is changed then.
    """
    peft = require("peft", extra="federated")
    name, kind = _adapter(model, adapter_name)
    if update.kind != kind:
        raise ValueError(f"adapter {name!r} is of kind {kind!r}, the update of kind {update.kind!r}")
    held = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    _check_held("the update", update.shapes, held)
    peft.set_peft_model_state_dict(model, update.to_state_dict(base=base), adapter_name=name)


def start_unknown(keys: Iterable[str], kind: Kind) -> list[str]:
    """The tensors of a PEFT checkpoint that did not start where the adapter does nothing."""
    return [key for key in keys if not any(part in key for part in STARTS_KNOWN[kind])]


def unknown_start_message(keys: list[str], kind: Kind) -> str:
    """One sentence for `start_unknown`."""
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return (
        f"{keys[0]!r}{more} did not start where a {kind} adapter does nothing: compress relative to the initial "
        f"adapter (base=), or take such tensors out and send them by themselves"
    )


def held_parameters(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Copies of the model's parameters of these names; ValueError when it has others."""
    if _is_peft(model):
        peft = require("peft", extra="federated")
        name, _ = _adapter(model, None)
        held = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    else:
        held = model.state_dict()
    _check_held("state_dict", shapes, held)
    return {key: held[key].detach().clone() for key in shapes}


def load_parameters(model: nn.Module, parameters: StateDict) -> None:
    """Load parameters whose names and shapes `held_parameters` has found."""
    if _is_peft(model):
        peft = require("peft", extra="federated")
        peft.set_peft_model_state_dict(model, dict(parameters), adapter_name=_adapter(model, None)[0])
    else:
        model.load_state_dict(parameters, strict=False)


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def _adapter(model: nn.Module, adapter_name: str | None) -> tuple[str, Kind]:
    """Name and kind of an adapter."""
    if not _is_peft(model):
        raise TypeError(f"model must be a PEFT model, got {type(model).__name__}")
    configs: Any = model.peft_config
    name = str(model.active_adapter) if adapter_name is None else adapter_name
    if name not in configs:
        raise ValueError(f"adapter_name must be one of {', '.join(map(repr, configs))}, got {name!r}")
    peft_type = str(getattr(configs[name].peft_type, "value", configs[name].peft_type))
    if peft_type not in PEFT_KINDS:
        raise ValueError(f"adapter {name!r} must be of type {' or '.join(PEFT_KINDS)}, got {peft_type}")
    return name, PEFT_KINDS[peft_type]


def _check_held(name: str, shapes: Mapping[str, tuple[int, ...]], held: StateDict) -> None:
    theirs = {key: tuple(tensor.shape) for key, tensor in held.items()}
    check_shapes(name, shapes, "the model", theirs, theirs_may_have_more=True)
