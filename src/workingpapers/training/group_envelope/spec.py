"""How a module's parameters are divided into groups, and cutting the groups down to k."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.common.validation import check_choice, check_integer, check_number
from workingpapers.training.group_envelope.members import Entries, Family, Indexed
from workingpapers.training.group_envelope.structure import Space, spaces

Kind = Literal["filter", "channel", "neuron", "head", "block", "weight"]
Scope = Literal["global", "family"]
Budget: TypeAlias = int | float | Mapping[str, int | float]
Patterns: TypeAlias = str | Sequence[str]


@dataclass(frozen=True)
class Sparsity:
    """How many groups are left. A group counts as gone when all its weights are exactly 0.

    Attributes
    ----------
    kept, total : number of groups by family.
    weights_kept, weights_total : number of weights in kept groups, and in all.
    """

    kept: Mapping[str, int]
    total: Mapping[str, int]
    weights_kept: int
    weights_total: int

    @property
    def groups(self) -> int:
        """Groups left in all families together."""
        return sum(self.kept.values())

    def __str__(self) -> str:
        lines = [f"{name}: {self.kept[name]} of {self.total[name]}" for name in self.total]
        whole = f"{self.groups} of {sum(self.total.values())} groups"
        return "\n".join([f"{whole}, {self.weights_kept} of {self.weights_total} weights in them", *lines])


class GroupSpec:
    """Disjoint groups of a module's parameters, in families: one for each layer, or for layers that share their units.

    Made by `from_module` (units of the architecture) or `from_index_sets` (anything).

    Attributes
    ----------
    module : whose parameters are grouped.
    families : the groups, by layer.
    left_out : layers that were wanted but cannot be taken apart, with the reason.
    """

    def __init__(
        self, module: nn.Module, families: Sequence[Family], left_out: Mapping[str, str] | None = None
    ) -> None:
        if not families:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in (left_out or {}).items())
            raise ValueError(f"there is nothing to group ({reasons or 'no layer of this kind was found and selected'})")
        self.module = module
        self.families = tuple(families)
        self.left_out = dict(left_out or {})
        _check_disjoint(module, self.families)

    @classmethod
    def from_module(
        cls, model: nn.Module, kind: Kind = "filter", include: Patterns = "*", exclude: Patterns = ()
    ) -> GroupSpec:
        """Groups as the architecture suggests them.

        Filters, channels and neurons are found by tracing the module with torch.fx; what cannot be traced whole (most
        models of transformers) is traced part by part. Layers whose outputs are added, as in residual networks, share
        groups. Outputs of the module, inputs of layer norms and grouped convolutions and whatever the tracing does not
        understand are left out (see `left_out`).

        Parameters
        ----------
        model : any module.
        kind : what is a group:
            "filter", an output channel of a convolution with its bias, its batch norm's pair and the depthwise filters
            after it; "neuron", the same for linear layers; "channel", the slices of all layers that read an output;
            "head", the four slices of an attention head (with grouped queries: of a key-value head and its queries),
            where queries, keys and values have a layer each, or in torch.nn.MultiheadAttention;
            "block", all parameters of a submodule; "weight", a single entry of a parameter of two or more dimensions.
        include, exclude : shell patterns for names of layers (of submodules for "block"), one or several. A family is
            taken if one of its layers is included and none is excluded. "block" needs `include`.

        Raises
        ------
        ValueError : `kind` is unknown, or nothing was found; the message says what stood in the way.
        """
        check_choice("kind", kind, get_args(Kind))
        include, exclude = ([p] if isinstance(p, str) else list(p) for p in (include, exclude))

        def wanted(names: Sequence[str]) -> bool:
            return any(fnmatchcase(n, p) for n in names for p in include) and not any(
                fnmatchcase(n, p) for n in names for p in exclude
            )

        if kind == "block":
            if include == ["*"]:
                raise ValueError('kind="block" needs include: patterns for the names of the submodules that are blocks')
            blocks = [(name, part) for name, part in model.named_modules() if name and wanted([name])]
            return cls(model, [_block(name, part) for name, part in blocks if any(True for _ in part.parameters())])
        if kind == "weight":
            chosen = [(n, p) for n, p in model.named_parameters() if p.ndim >= 2 and wanted([n, n.rpartition(".")[0]])]
            return cls(model, [Family(name, p.numel(), (Entries(name),), kind) for name, p in chosen])
        families, left_out = [], {}
        for space in spaces(model):
            if (kind == "channel" or space.kind == kind) and wanted(space.layers):
                # heads that cannot be taken out can still be zeroed one by one
                members = _members(space, kind)
                if space.held is not None and kind != "head":
                    left_out[space.name] = space.held
                elif members:
                    families.append(Family(space.name, space.size, members, kind))
        return cls(model, families, left_out)

    @classmethod
    def from_index_sets(
        cls, model: nn.Module, sets: Sequence[Mapping[str, Any]], name: str = "index sets"
    ) -> GroupSpec:
        """Groups given entry by entry.

        Parameters
        ----------
        model : any module.
        sets : one mapping for each group, from names of parameters to the positions of the group's entries in the
            flattened parameter (integers). Empty groups are dropped with a warning.
        name : of the family they form.

        Raises
        ------
        ValueError : two groups overlap (the first common entry is named), or a position is outside of its parameter.
        """
        arrays = [{n: np.asarray(ids).reshape(-1) for n, ids in group.items()} for group in sets]
        filled = [group for group in arrays if any(len(ids) for ids in group.values())]
        if len(filled) < len(arrays):
            warnings.warn(f"{len(arrays) - len(filled)} empty groups were dropped", UserWarning, stacklevel=2)
        members = []
        for parameter in dict.fromkeys(n for group in filled for n in group):
            parts = [group.get(parameter, np.empty(0, dtype=int)) for group in filled]
            if any(len(ids) and ids.dtype.kind not in "iu" for ids in parts):
                raise TypeError(f"sets must hold integer positions, those of {parameter} are not")
            positions = torch.from_numpy(np.concatenate(parts).astype(np.int64))
            owners = torch.from_numpy(np.repeat(np.arange(len(parts)), [len(ids) for ids in parts]))
            members.append(Indexed(parameter, positions, owners))
        return cls(model, [Family(name, len(filled), tuple(members), "index")] if members else [])

    def __len__(self) -> int:
        """Number of groups in all families."""
        return sum(family.size for family in self.families)

    def __repr__(self) -> str:
        families = ", ".join(f"{family.name}: {family.size}" for family in self.families)
        return f"GroupSpec({len(self)} groups; {families})"

    def norms(self, module: nn.Module | None = None) -> list[Float[Tensor, " m"]]:
        """Euclidean norms of the groups of each family, in `module` or the one the groups were made from.

        Raises
        ------
        FloatingPointError : a norm is not finite.
        """
        norms = [family.norms(module or self.module) for family in self.families]
        for family, values in zip(self.families, norms, strict=True):
            if not bool(values.isfinite().all()):
                raise FloatingPointError(f"parameters of {family.name} are not finite: did training diverge?")
        return norms

    def sparsity(self, module: nn.Module | None = None) -> Sparsity:
        """Which groups are left in `module` or the one the groups were made from."""
        module = module or self.module
        with torch.no_grad():
            alive = [norms > 0.0 for norms in self.norms(module)]
        sizes = [family.sizes(module) for family in self.families]
        return Sparsity(
            {family.name: int(living.sum()) for family, living in zip(self.families, alive, strict=True)},
            {family.name: family.size for family in self.families},
            int(sum(float(size[living.cpu()].sum()) for size, living in zip(sizes, alive, strict=True))),
            int(sum(float(size.sum()) for size in sizes)),
        )


def harden(model: nn.Module, spec: GroupSpec, k: Budget, *, scope: Scope = "family") -> Sparsity:
    """Keep the k groups of largest norm and set the others to 0, in place: the Euclidean projection.

    Groups of equal norm are kept in their order.

    Parameters
    ----------
    model : the module of `spec`, or one like it.
    spec : its groups.
    k : how many to keep: a number, a fraction in (0, 1), or one of these for each family, by name.
    scope : "family" counts each family for itself, "global" all together.

    Raises
    ------
    TypeError, ValueError : `k` or `scope` is out of range.
    FloatingPointError : parameters are not finite.

    Warns
    -----
    UserWarning : a family has no group left, which cuts most networks in two.
    """
    project(model, spec, budgets(spec, k, scope))
    return spec.sparsity(model)


@dataclass(frozen=True)
class Share:
    """Families (by position) that share a budget of `k` groups."""

    families: tuple[int, ...]
    k: int


def budgets(spec: GroupSpec, k: Budget, scope: Scope) -> list[Share]:
    """Numbers of groups from numbers, fractions or a mapping."""
    check_choice("scope", scope, get_args(Scope))
    if isinstance(k, Mapping):
        names = [family.name for family in spec.families]
        if set(k) != set(names):
            raise ValueError(f"k must name each family once, got {sorted(k)} for {sorted(names)}")
        return [Share((i,), _count(f"k[{name!r}]", k[name], spec.families[i].size)) for i, name in enumerate(names)]
    if scope == "family":
        return [Share((i,), _count("k", k, family.size)) for i, family in enumerate(spec.families)]
    return [Share(tuple(range(len(spec.families))), _count("k", k, len(spec)))]


@torch.no_grad()
def project(model: nn.Module, spec: GroupSpec, shares: Sequence[Share]) -> None:
    """Keep the largest groups of each share, in place."""
    norms = spec.norms(model)
    for share in shares:
        joint = torch.cat([norms[i].double().cpu() for i in share.families])
        kept = torch.zeros(len(joint), dtype=torch.bool)
        kept[joint.argsort(descending=True, stable=True)[: share.k]] = True
        pieces = torch.split(kept, [len(norms[i]) for i in share.families])
        for i, piece in zip(share.families, pieces, strict=True):
            spec.families[i].multiply_(model, piece)
            if not bool((piece & (norms[i].cpu() > 0.0)).any()):
                name = spec.families[i].name
                warnings.warn(f"no group of {name} is left: give each family its own k", UserWarning, stacklevel=3)


def _count(name: str, k: Any, groups: int) -> int:
    if isinstance(k, float):
        return max(1, math.floor(check_number(name, k, above=0.0, below=1.0) * groups + 0.5))
    return check_integer(name, k, at_least=1, at_most=groups)


def _members(space: Space, kind: str) -> tuple[Any, ...]:
    if kind == "channel":
        return tuple(space.readers)
    if kind == "head":
        return tuple(space.slices())
    return tuple(space.makers)


def _block(name: str, part: nn.Module) -> Family:
    return Family(name, 1, tuple(Entries(f"{name}.{own}") for own, _ in part.named_parameters()), "block")


def _check_disjoint(module: nn.Module, families: Sequence[Family]) -> None:
    """Refuse groups that overlap, in one parameter or in parameters that are the same tensor."""
    names = [family.name for family in families]
    if len(set(names)) < len(names):
        raise ValueError(f"families must have different names, got {names}")
    uses: dict[int, list[tuple[Family, Any, Tensor]]] = {}
    for family in families:
        for member in family.members:
            parameter = module.get_parameter(member.parameter)
            member.size(parameter, family.size)
            uses.setdefault(id(parameter), []).append((family, member, parameter))
    for shared in uses.values():
        if len(shared) == 1 and not isinstance(shared[0][1], Indexed):
            continue
        owner = torch.full((shared[0][2].numel(),), -1, dtype=torch.int64)
        seen: list[tuple[Family, Any]] = []
        for family, member, tensor in shared:
            positions, groups = _entries_of(family, member, tensor)
            order = positions.argsort(stable=True)
            repeated = order[1:][positions[order].diff() == 0]
            taken = torch.nonzero(owner[positions] >= 0)[:, 0]
            clash = torch.cat([repeated, taken])
            if len(clash):
                at = int(clash.min())
                raise ValueError(
                    f"groups must be disjoint: entry {int(positions[at])} of {member.parameter} belongs to group "
                    f"{int(groups[at])} of {family.name} and to another one before"
                )
            owner[positions] = len(seen)
            seen.append((family, member))


def _entries_of(family: Family, member: Any, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions of a member's entries, and their groups."""
    if isinstance(member, Indexed):
        return member.positions, member.groups
    blank = torch.empty(parameter.shape, device="meta") if parameter.is_meta else torch.empty(parameter.shape)
    numbers = member.spread(torch.arange(family.size, dtype=torch.float64), blank, -1.0).expand(parameter.shape)
    flat = numbers.reshape(-1).to(torch.int64)
    positions = torch.nonzero(flat >= 0)[:, 0]
    return positions, flat[positions]
