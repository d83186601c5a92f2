"""Which units of a module can be taken out, and which slices of its parameters go with them.

A unit is one output of a layer: a filter, a neuron, an attention head. Layers whose outputs are added share their
units; batch norm and depthwise convolutions pass theirs on; the layers that read them hold a slice for each. The module
is traced by torch.fx (without running it) and read node by node; where it cannot be traced whole, its parts are.
Whatever the reading does not understand holds the units it touches in place, and the reason is kept.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from workingpapers.training.group_envelope.members import Slices

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
POOL_FUNCTIONS = {
    *(functional.max_pool1d, functional.max_pool2d, functional.max_pool3d),
    *(functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d),
    *(functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d),
    *(functional.adaptive_max_pool1d, functional.adaptive_max_pool2d, functional.adaptive_max_pool3d),
    torch.max_pool2d,
}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# Functions of each entry by itself
ENTRYWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Hardtanh),
    *(nn.Hardswish, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Identity),
    *(nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid),
)
ENTRYWISE_NAMES = {
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "tanh", "hardtanh"),
    *("hardswish", "softsign", "tanhshrink", "sigmoid", "hardsigmoid", "softplus", "logsigmoid", "clamp", "clip"),
    *("abs", "neg", "square", "sqrt", "exp", "pow", "dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous"),
    *(
        "clone",
        "float",
        "double",
        "half",
        "to",
        "detach",
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "iadd",
        "isub",
        "imul",
    ),
}
JOINTS = {"add", "iadd", "sub", "isub", "mul", "imul"}
SHAPES = {"size", "dim", "ndim", "shape", "device", "dtype", "numel"}


@dataclass(eq=False)
class Space:
    """Units that are numbered alike everywhere, with every slice that belongs to them.

    Attributes
    ----------
    name : of the first layer that makes them.
    kind : "filter", "neuron" or "head".
    makers : the slices that produce a unit's value: where all are 0 the value is 0 after batch norm.
    readers : the slices that read it: where all are 0 it has no effect.
    companions : slices that matter only through the makers, such as a head's queries and keys.
    held : why units cannot be taken out; None where they can.
    layers : names of all layers that make the units or pass them on.
    constants : (slices that read them, value of a dead unit there), where that value is not 0.
    heads : the attention modules whose heads these are.
    """

    name: str
    size: int
    kind: str
    makers: list[Slices] = field(default_factory=list)
    readers: list[Slices] = field(default_factory=list)
    companions: list[Slices] = field(default_factory=list)
    held: str | None = None
    layers: list[str] = field(default_factory=list)
    constants: list[tuple[Slices, float]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)

    def hold(self, reason: str) -> None:
        self.held = self.held or reason

    def slices(self) -> Iterator[Slices]:
        yield from (*self.makers, *self.companions, *self.readers)


@dataclass(frozen=True)
class Segment:
    """Consecutive entries along the channel dimension: `width` of them for each unit of a space."""

    space: Space
    width: int


@dataclass(frozen=True)
class Channels:
    """What is known of a tensor: whose units its channels are.

    Attributes
    ----------
    axis : the channel dimension, 1 or -1 (the last).
    dead : the value of a unit whose makers are all 0.
    flattened : each channel stands for an unknown number of entries, because dimensions after it were flattened.
    """

    segments: tuple[Segment, ...]
    axis: int
    dead: float = 0.0
    flattened: bool = False

    def hold(self, reason: str) -> None:
        for segment in self.segments:
            segment.space.hold(reason)


class _Tracer(fx.Tracer):
    """Does not look into attention modules."""

    def __init__(self, leaves: set[nn.Module]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.leaves or super().is_leaf_module(m, module_qualified_name)


def spaces(module: nn.Module) -> list[Space]:
    """All units of a module, those that are held in place included, in the order of their layers."""
    parts = list(module.named_modules())
    found = [space for name, part in parts if (space := _heads(module, name, part)) is not None]
    attentions = {module.get_submodule(name) for space in found for name in space.heads}
    found += [space for name, part in parts if (space := _feed_forward(name, part)) is not None]
    reading = _Reading(module)
    for prefix, graph in _graphs(module, "", attentions):
        reading.read(prefix, graph)
    known = {space.name for space in found}
    order = {name: position for position, (name, _) in enumerate(parts)}
    found += [space for space in reading.distinct() if space.name not in known]
    found.sort(key=lambda space: order[space.name])
    _hold_shared(module, found)
    return found


def _graphs(module: nn.Module, prefix: str, leaves: set[nn.Module]) -> Iterator[tuple[str, fx.Graph]]:
    """The graph of the module if it can be traced, else those of its parts, with the names of these."""
    if module in leaves or not any(True for _ in module.parameters()):
        return
    graph: fx.Graph | None = None
    # A single layer has no inside; containers without a forward are not traced either.
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) and any(True for _ in module.children()):
        try:
            graph = _Tracer(leaves).trace(module)
        except Exception:  # fx raises whatever the module's own code raises on symbolic tensors
            graph = None
    if graph is not None:
        yield prefix, graph
        return
    for name, child in module.named_children():
        yield from _graphs(child, f"{prefix}{name}.", leaves)


class _Reading:
    """Reads graphs and collects spaces."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.found: list[Space] = []
        self.merged: dict[Space, Space] = {}
        self.made: dict[str, Channels] = {}  # layers that were read already: those that are used twice are held

    def distinct(self) -> list[Space]:
        return [space for space in self.found if space not in self.merged]

    def read(self, prefix: str, graph: fx.Graph) -> None:
        values: dict[fx.Node, Channels | None] = {}
        for node in graph.nodes:
            inputs = {arg: self.now(values[arg]) for arg in node.all_input_nodes}
            known = [channels for channels in inputs.values() if channels is not None]
            result: Channels | None = None
            if node.op == "call_module":
                name = prefix + str(node.target)
                given = known[0] if len(inputs) == len(known) == len(node.args) == 1 else None
                if given is None:
                    for channels in known:
                        channels.hold(f"{name} has more than one input")
                result = self.layer(name, self.module.get_submodule(name), given)
            elif node.op == "output":
                for channels in known:
                    channels.hold(f"its units are an output of {prefix[:-1] or 'the module'}")
            elif known:
                result = self.function(node, inputs)
            values[node] = result

    def now(self, channels: Channels | None) -> Channels | None:
        """The same with spaces that were merged since replaced."""
        if channels is None:
            return None
        segments = []
        for segment in channels.segments:
            space = segment.space
            while space in self.merged:
                space = self.merged[space]
            segments.append(Segment(space, segment.width))
        return replace(channels, segments=tuple(segments))

    # ----------------------------------------------------------------------------------------------------------------
    # Layers

    def layer(self, name: str, layer: nn.Module, given: Channels | None) -> Channels | None:
        parameters = {key for key, value in layer._parameters.items() if value is not None}
        if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, nn.Embedding)):
            if name in self.made or "weight" not in parameters or hasattr(layer, "parametrizations"):
                reason = f"{name} is used more than once" if name in self.made else f"{name} is parametrized"
                for channels in (given, self.now(self.made.get(name))):
                    if channels is not None:
                        channels.hold(reason)
                return None
            self.made[name] = made = self.maker(name, layer, given)
            return made
        if given is None:
            return None
        if isinstance(layer, BATCH_NORMS):
            if not layer.affine:
                given.hold(f"{name} has no affine parameters, so that a dead unit is not 0 after it")
            elif layer.num_features % _entries(given):
                given.hold(f"{name} does not fit its input")
            else:
                for slices, segment in self.placed(f"{name}.weight", 0, layer.num_features, given):
                    self.follow(segment.space, name, slices, layer)
            return replace(given, dead=0.0)
        if isinstance(layer, POOLS):
            return self.pooled(name, given, getattr(layer, "padding", 0))
        if isinstance(layer, nn.Flatten):
            return self.flattened(name, given, layer.start_dim, layer.end_dim)
        if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
            return self.changed(given, name, given.dead * (1.0 if given.dead > 0 else float(layer.weight.detach())))
        if isinstance(layer, (*DROPOUTS, nn.Upsample)):
            return given
        if isinstance(layer, ENTRYWISE):
            return self.changed(given, name, float(layer(torch.tensor(given.dead, dtype=torch.float64)).detach()))
        given.hold(f"{name} ({type(layer).__name__}) is not known to keep units apart")
        return None

    def changed(self, given: Channels, name: str, dead: float) -> Channels:
        """The same channels where a dead unit now has another value."""
        if not math.isfinite(dead):
            given.hold(f"{name} makes {dead:g} of a dead unit")
        return replace(given, dead=dead)

    def maker(self, name: str, layer: nn.Module, given: Channels | None) -> Channels:
        """A layer with a weight: it reads the units of its input and makes its own."""
        if isinstance(layer, nn.Embedding):
            return self.new(name, layer.embedding_dim, "neuron", Slices(f"{name}.weight", 1), layer, -1)
        if isinstance(layer, nn.Linear):
            if given is not None:
                if given.axis == 1 and not given.flattened:
                    given.hold(f"{name} mixes another dimension than the channels")
                else:
                    self.read_by(name, 1, layer.in_features, given, padded=False)
            return self.new(name, layer.out_features, "neuron", Slices(f"{name}.weight", 0), layer, -1)
        assert isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED))
        out = 1 if isinstance(layer, TRANSPOSED) else 0
        if given is not None and (given.axis != 1 or given.flattened):
            given.hold(f"{name} reads its input's channels from another dimension")
            given = None
        padded = (layer.padding != "valid" and any(layer.padding)) or isinstance(layer, TRANSPOSED)
        if layer.groups == 1:
            if given is not None:
                self.read_by(name, 1 - out, layer.in_channels, given, padded=padded)
            return self.new(name, layer.out_channels, "filter", Slices(f"{name}.weight", out), layer, 1)
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        if depthwise and given is not None and _entries(given) == layer.in_channels:
            for slices, segment in self.placed(f"{name}.weight", 0, layer.in_channels, given):
                self.follow(segment.space, name, slices, layer)
            return replace(given, dead=0.0)
        reason = f"{name} is a grouped convolution, whose groups must keep their size"
        if given is not None:
            given.hold(reason)
        made = self.new(name, layer.out_channels, "filter", None, layer, 1)
        made.hold(reason)
        return made

    def new(self, name: str, size: int, kind: str, slices: Slices | None, layer: nn.Module, axis: int) -> Channels:
        space = Space(name, size, kind, layers=[name])
        if slices is not None:
            space.makers.append(slices)
        if slices is not None and getattr(layer, "bias", None) is not None:
            space.makers.append(Slices(f"{name}.bias", 0))
        self.found.append(space)
        return Channels((Segment(space, 1),), axis)

    def placed(self, parameter: str, dim: int, length: int, given: Channels) -> Iterator[tuple[Slices, Segment]]:
        """Where the units of each segment lie in a dimension of a parameter."""
        repeat, start = length // _entries(given), 0
        for segment in given.segments:
            width = segment.width * repeat
            yield Slices(parameter, dim, width, start), segment
            start += width * segment.space.size

    def follow(self, space: Space, name: str, slices: Slices, layer: nn.Module) -> None:
        """A layer that passes units on, each by itself."""
        space.layers.append(name)
        space.makers.append(slices)
        if getattr(layer, "bias", None) is not None:
            space.makers.append(Slices(f"{name}.bias", 0, slices.width, slices.start))

    def read_by(self, name: str, dim: int, length: int, given: Channels, padded: bool) -> None:
        if length % _entries(given) or (length != _entries(given) and not given.flattened):
            given.hold(f"{name} does not fit its input")
            return
        if given.dead != 0.0 and padded:
            given.hold(f"{name} pads with 0 what for a dead unit is {given.dead:g}")
            return
        for slices, segment in self.placed(f"{name}.weight", dim, length, given):
            segment.space.readers.append(slices)
            if given.dead != 0.0:
                segment.space.constants.append((slices, given.dead))

    # ----------------------------------------------------------------------------------------------------------------
    # Functions

    def function(self, node: fx.Node, inputs: dict[fx.Node, Channels | None]) -> Channels | None:
        known = [channels for channels in inputs.values() if channels is not None]
        target = node.target
        name = str(target) if isinstance(target, str) else getattr(target, "__name__", repr(target))
        if name in SHAPES or (name == "getattr" and node.args[1] in SHAPES):
            return None
        first = inputs.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if len(inputs) == 1 and name in ENTRYWISE_NAMES:
            return self.changed(known[0], node.name, _value_of(node, inputs))
        if first is not None and len(inputs) == 1:
            alone = node.args[1:]
            if name == "flatten":
                start = alone[0] if alone else node.kwargs.get("start_dim", 0)
                end = alone[1] if len(alone) > 1 else node.kwargs.get("end_dim", -1)
                return self.flattened(node.name, first, start, end)
            if target in POOL_FUNCTIONS:
                padding = alone[2] if len(alone) > 2 else node.kwargs.get("padding", 0)
                return self.pooled(node.name, first, 0 if "adaptive" in name else padding)
            if name == "mean" and first.axis == 1 and not first.flattened:
                dims = alone[0] if alone else node.kwargs.get("dim")
                kept = node.kwargs.get("keepdim", alone[1] if len(alone) > 1 else False)
                if dims in ((2, 3), [2, 3], (-2, -1), [-2, -1], (-1, -2), [-1, -2]):
                    return first if kept else replace(first, axis=-1)
        if name in ("view", "reshape") and first is not None:
            sizes = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
            if len(sizes) == 2 and sizes[1] == -1 and _is_batch_size(sizes[0], node.args[0]):
                return self.flattened(node.name, first, 1, -1)
        if name in JOINTS and len(inputs) == len(known) == len(node.args) == 2 and not node.kwargs:
            return self.joined(node, known[0], known[1], _value_of(node, inputs))
        if name in ("cat", "concat", "concatenate") and isinstance(node.args[0], tuple | list):
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
            parts = [inputs[part] for part in node.args[0]]  # type: ignore[index]
            if all(part is not None and part.axis == dim and not part.flattened for part in parts):
                whole = [part for part in parts if part is not None]
                if len({part.dead for part in whole}) == 1:
                    return Channels(tuple(s for part in whole for s in part.segments), whole[0].axis, whole[0].dead)
        for channels in known:
            channels.hold(f"{node.name} ({name}) is not known to keep units apart")
        return None

    def pooled(self, name: str, given: Channels, padding: Any) -> Channels | None:
        padded = any(padding) if isinstance(padding, tuple | list) else bool(padding)
        if given.axis != 1 or given.flattened or (padded and given.dead != 0.0):
            given.hold(f"{name} pools over channels, or pads what is not 0")
            return None
        return given

    def flattened(self, name: str, given: Channels, start: Any, end: Any) -> Channels | None:
        if given.axis == 1 and start == 1 and end == -1:
            return replace(given, axis=-1, flattened=True)
        given.hold(f"{name} flattens other dimensions than those after the channels")
        return None

    def joined(self, node: fx.Node, left: Channels, right: Channels, dead: float) -> Channels | None:
        """Two tensors added or multiplied entry by entry share their units."""
        sizes = [[(s.space.size, s.width) for s in side.segments] for side in (left, right)]
        if sizes[0] != sizes[1] or (left.axis, left.flattened) != (right.axis, right.flattened):
            for side in (left, right):
                side.hold(f"{node.name} joins tensors whose channels do not match")
            return None
        for one, other in zip(left.segments, right.segments, strict=True):
            self.merge(one.space, other.space)
        result = self.now(left)
        assert result is not None
        return self.changed(result, node.name, dead)

    def merge(self, one: Space, other: Space) -> None:
        while one in self.merged:
            one = self.merged[one]
        while other in self.merged:
            other = self.merged[other]
        if one is other:
            return
        first, second = sorted((one, other), key=self.found.index)
        self.merged[second] = first
        for name in ("makers", "readers", "companions", "layers", "constants", "heads"):
            getattr(first, name).extend(getattr(second, name))
        if second.held is not None:
            first.hold(second.held)


def _entries(channels: Channels) -> int:
    return sum(segment.space.size * segment.width for segment in channels.segments)


def _value_of(node: fx.Node, inputs: dict[fx.Node, Channels | None]) -> float:
    """What a function of single entries makes of the values of dead units."""
    dead = {arg: torch.tensor(channels.dead, dtype=torch.float64) for arg, channels in inputs.items() if channels}
    args = [dead[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
    kwargs = {key: dead[value] if isinstance(value, fx.Node) else value for key, value in node.kwargs.items()}
    if isinstance(node.target, str):
        return float(getattr(args[0], node.target)(*args[1:], **kwargs))
    if "dropout" in node.target.__name__:
        kwargs["training"] = False
    return float(node.target(*args, **kwargs))


def _is_batch_size(size: Any, of: Any) -> bool:
    """Whether a node is x.size(0), or x.shape[0], of this x."""
    if not isinstance(size, fx.Node):
        return False
    if size.target == "size":
        return size.args == (of, 0)
    if size.target is operator.getitem and size.args[1] == 0 and isinstance(size.args[0], fx.Node):
        shape = size.args[0]
        return shape.args == (of, "shape") if shape.target is getattr else shape.args == (of,)
    return False


# --------------------------------------------------------------------------------------------------------------------
# Attention

PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
OUTPUTS = ("o_proj", "out_proj")


def _heads(module: nn.Module, name: str, part: nn.Module) -> Space | None:
    """The heads of an attention module, None for other modules.

    With fewer key-value heads than query heads, a unit is a key-value head with the queries that use it.
    """
    if isinstance(part, nn.MultiheadAttention):
        return _multihead(name, part)
    for names in PROJECTIONS:
        layers = [getattr(part, projection, None) for projection in names]
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        if len(linear) < 3:
            continue
        query, key, value = linear
        output_name, output = _output_projection(module, name, part)
        prefix = f"{name}." if name else ""
        width = getattr(part, "head_dim", getattr(part, "attention_head_size", None))
        if output is None or not isinstance(width, int):
            return None
        units, rest = divmod(key.out_features, width)
        shared, uneven = divmod(query.out_features, max(key.out_features, 1))
        if rest or uneven or value.out_features != key.out_features or output.in_features != query.out_features:
            return None
        space = Space(name, units, "head", layers=[name], heads=[name])
        for projection, layer, wide, into in (
            (names[0], query, shared * width, space.companions),
            (names[1], key, width, space.companions),
            (names[2], value, width, space.makers),
        ):
            into.append(Slices(f"{prefix}{projection}.weight", 0, wide))
            if layer.bias is not None:
                into.append(Slices(f"{prefix}{projection}.bias", 0, wide))
        space.readers.append(Slices(f"{output_name}.weight", 1, shared * width))
        own = {slices.parameter for slices in space.slices()} | {f"{output_name}.bias"}
        for other, parameter in part.named_parameters(prefix=name):
            if other not in own and parameter.shape != (
                width,
            ):  # a norm over the entries of a head is the same for all
                space.hold(f"{name} has a parameter {other} that may differ from head to head")
        return space
    return None


def _output_projection(module: nn.Module, name: str, part: nn.Module) -> tuple[str, nn.Linear | None]:
    for own in OUTPUTS:
        if isinstance(layer := getattr(part, own, None), nn.Linear):
            return f"{name}.{own}" if name else own, layer
    parent = name.rpartition(".")[0]  # BERT and its relatives keep it beside the attention proper
    layer = getattr(getattr(module.get_submodule(parent), "output", None), "dense", None)
    return f"{parent}.output.dense" if parent else "output.dense", layer if isinstance(layer, nn.Linear) else None


def _multihead(name: str, part: nn.MultiheadAttention) -> Space | None:
    if part.in_proj_weight is None:
        return None
    width, whole = part.head_dim, part.embed_dim
    prefix = f"{name}." if name else ""
    space = Space(name, part.num_heads, "head", layers=[name], heads=[name])
    space.hold("torch.nn.MultiheadAttention cannot hold fewer heads than its width divided by that of a head")
    for position, into in enumerate((space.companions, space.companions, space.makers)):
        into.append(Slices(f"{prefix}in_proj_weight", 0, width, position * whole))
        if part.in_proj_bias is not None:
            into.append(Slices(f"{prefix}in_proj_bias", 0, width, position * whole))
    space.readers.append(Slices(f"{prefix}out_proj.weight", 1, width))
    return space


def _feed_forward(name: str, part: nn.Module) -> Space | None:
    """The hidden neurons of layers that torch.fx cannot look into: torch's own, and those of BERT and its relatives."""
    if isinstance(part, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        paths = ("linear1", "linear2")
        activation: Any = part.activation
    else:
        paths = ("intermediate.dense", "output.dense")
        activation = getattr(getattr(part, "intermediate", None), "intermediate_act_fn", None)
    layers = []
    for path in paths:
        owner: Any = part
        for step in path.split("."):
            owner = getattr(owner, step, None)
        layers.append(owner)
    first, second = layers
    if not (isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and callable(activation)):
        return None
    if first.out_features != second.in_features:
        return None
    first_name, second_name = (f"{name}.{path}" if name else path for path in paths)
    space = Space(first_name, first.out_features, "neuron", layers=[first_name])
    space.makers.append(Slices(f"{first_name}.weight", 0))
    if first.bias is not None:
        space.makers.append(Slices(f"{first_name}.bias", 0))
    space.readers.append(Slices(f"{second_name}.weight", 1))
    dead = float(activation(torch.tensor(0.0, dtype=torch.float64)))
    if dead != 0.0:
        space.constants.append((space.readers[0], dead))
    return space


def _hold_shared(module: nn.Module, found: list[Space]) -> None:
    """Hold units whose parameters serve under two names."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {name: alike for alike in names.values() if len(alike) > 1 for name in alike}
    for space in found:
        for slices in space.slices():
            if slices.parameter in tied:
                space.hold(f"{' and '.join(tied[slices.parameter])} are one parameter")
