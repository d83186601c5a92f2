"""Taking dead units out of a module."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from workingpapers.training.group_envelope.members import Slices
from workingpapers.training.group_envelope.spec import GroupSpec
from workingpapers.training.group_envelope.structure import BATCH_NORMS, CONVOLUTIONS, TRANSPOSED, Space, spaces

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
KEY_VALUE_COUNTS = ("num_key_value_heads", "num_kv_heads")


def shrink(model: nn.Module, spec: GroupSpec) -> nn.Module:
    """A smaller copy of a module, without the units whose groups are 0, that computes the same in evaluation mode.

    A unit goes if everything that makes it is exactly 0 (its filter, bias and batch norm) or everything that reads it
    is. Layers keep at least one unit. Where a dead unit has a value, as a sigmoid's 1/2, the biases of the layers that
    read it take it over. The copy is an ordinary module of the same classes with smaller parameters; optimisers must be
    made anew. Configurations (``model.config`` of transformers) keep the old numbers of heads, so save the copy whole
    (`torch.save`), not by a state of the old shape.

    Parameters
    ----------
    model : the module of `spec`, or one like it; stays as it is.
    spec : which units may go: families of filters, neurons, channels or heads made by `GroupSpec.from_module`.

    Raises
    ------
    ValueError : a group that is 0 cannot be taken out: a single weight or block, a head of `torch.nn.
        MultiheadAttention`, a unit of a grouped convolution, or a family that `model` does not have.
    """
    zero = _zero_groups(model, spec)
    found = {space.name: space for space in spaces(model)}
    for family in spec.families:
        if not bool(zero[family.name].any()):
            continue
        if family.kind not in ("filter", "neuron", "channel", "head"):
            raise ValueError(f"groups of kind {family.kind!r} cannot be taken out ({family.name}): they are no units")
        space = found.get(family.name)
        if space is None or space.size != family.size:
            raise ValueError(f"spec has units of {family.name} that model does not have")
        if space.held is not None:
            raise ValueError(f"units of {family.name} cannot be taken out: {space.held}")
    smaller = copy.deepcopy(model)
    keep: dict[tuple[str, int], Tensor] = {}
    changed: list[Space] = []
    new_biases: list[str] = []
    for family in spec.families:
        if family.kind in ("filter", "neuron", "channel", "head") and bool(zero[family.name].any()):
            space = found[family.name]
            alive = ~(_all_zero(model, space, space.makers) | _all_zero(model, space, space.readers))
            if not bool(alive.any()):
                alive[0] = True
            new_biases += _take_over_constants(smaller, space, ~alive)
            for slices in space.slices():
                length = model.get_parameter(slices.parameter).shape[slices.dim]
                kept = keep.setdefault((slices.parameter, slices.dim), torch.ones(length, dtype=torch.bool))
                kept[slices.start : slices.start + space.size * slices.width] = alive.repeat_interleave(slices.width)
            changed.append(space)
    for layer in new_biases:  # these have no slices of their own
        if (f"{layer}.weight", 0) in keep:
            keep[f"{layer}.bias", 0] = keep[f"{layer}.weight", 0]
    for (name, dim), kept in keep.items():
        _cut(smaller, name, dim, kept)
    for name in dict.fromkeys(name.rpartition(".")[0] for name, _ in keep):
        _adjust(smaller.get_submodule(name))
    for space in changed:
        for name in space.heads:
            _adjust_attention(smaller.get_submodule(name), found=space, model=smaller)
    return smaller


@torch.no_grad()
def _zero_groups(model: nn.Module, spec: GroupSpec) -> dict[str, Tensor]:
    return {family.name: norms == 0.0 for family, norms in zip(spec.families, spec.norms(model), strict=True)}


@torch.no_grad()
def _all_zero(model: nn.Module, space: Space, slices: list[Slices]) -> Tensor:
    """Which units are 0 in all these slices; none if there are no slices."""
    if not slices:
        return torch.zeros(space.size, dtype=torch.bool)
    counts = [s.totals((model.get_parameter(s.parameter) != 0).float(), space.size).cpu() for s in slices]
    return torch.stack(counts).sum(0) == 0.0


@torch.no_grad()
def _take_over_constants(smaller: nn.Module, space: Space, dead: Tensor) -> list[str]:
    """Add to the biases of the readers what dead units that are not 0 contribute; the layers that had none."""
    without: list[str] = []
    for slices, value in space.constants:
        name = slices.parameter.rpartition(".")[0]
        layer = smaller.get_submodule(name)
        weight = smaller.get_parameter(slices.parameter)
        mask = slices.spread(dead.to(weight), weight, 0.0)
        others = [dim for dim in range(weight.ndim) if dim != 1 - slices.dim]
        constant = value * (weight * mask).sum(others)
        bias = layer.bias
        if bias is None:
            without.append(name)
        layer.bias = nn.Parameter(constant if bias is None else bias + constant)  # type: ignore[operator]
    return without


@torch.no_grad()
def _cut(module: nn.Module, name: str, dim: int, kept: Tensor) -> None:
    """Keep these entries of a dimension of a parameter, and of the running statistics that go with it."""
    path, _, own = name.rpartition(".")
    layer = module.get_submodule(path)
    old = module.get_parameter(name)
    index = torch.nonzero(kept)[:, 0].to(old.device)
    new = nn.Parameter(old.index_select(dim, index), requires_grad=old.requires_grad)
    setattr(layer, own, new)
    if isinstance(layer, BATCH_NORMS) and own == "weight" and layer.running_mean is not None:
        assert layer.running_var is not None
        layer.running_mean = layer.running_mean.index_select(0, index)
        layer.running_var = layer.running_var.index_select(0, index)


def _adjust(layer: nn.Module) -> None:
    """Make a layer's numbers agree with its parameters."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = layer.weight.shape[1]
    elif isinstance(layer, BATCH_NORMS):
        layer.num_features = layer.weight.shape[0]
    elif isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        if layer.groups > 1:
            layer.groups = layer.weight.shape[0]  # only depthwise convolutions are cut
        first, second = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        layer.out_channels, layer.in_channels = (second, first) if isinstance(layer, TRANSPOSED) else (first, second)


def _adjust_attention(attention: nn.Module, found: Space, model: nn.Module) -> None:
    """Make an attention module's numbers of heads agree with its projections."""
    value, query = found.makers[0], found.companions[0]
    width = value.width
    heads = model.get_parameter(query.parameter).shape[0] // width
    groups = model.get_parameter(value.parameter).shape[0] // width
    for names, count in ((HEAD_COUNTS, heads), (KEY_VALUE_COUNTS, groups), (("all_head_size",), heads * width)):
        for name in names:
            if isinstance(getattr(attention, name, None), int):
                setattr(attention, name, count)
