"""Penalties on the groups of a module, by their proximal steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from workingpapers.common import prox
from workingpapers.common.validation import check_choice, check_number
from workingpapers.training.group_envelope.envelope import selectors, shrinkage, wgsef
from workingpapers.training.group_envelope.spec import Budget, GroupSpec, Scope, Share, Sparsity, budgets

Weighting = Literal["one", "size", "1/size", "sqrt(size)"]


class GroupRegularizer(ABC):
    """What penalties on groups have in common: the step, the report, the frozen support.

    Attributes
    ----------
    spec : the groups.
    lam : strength, at least 0; may be set at any time.
    shares : which families share a budget of how many groups.
    d : weights of the groups, by family.
    support : which groups of each family are free, once frozen; None before.
    """

    def __init__(
        self, spec: GroupSpec, k: Budget, lam: float, weights: Weighting | Sequence[Tensor], scope: Scope
    ) -> None:
        self.spec = spec
        self.lam = check_number("lam", lam, at_least=0.0)
        self.shares = budgets(spec, k, scope)
        self.d = _weights(spec, weights)
        self.support: list[Tensor] | None = None

    @property
    def frozen(self) -> bool:
        """Whether groups that are 0 are held there and the others are free."""
        return self.support is not None

    def freeze(self) -> None:
        """From now on a step sets the groups that are 0 now to 0 and leaves the others alone, whatever `lam`."""
        with torch.no_grad():
            self.support = [norms > 0.0 for norms in self.spec.norms()]

    def thaw(self) -> None:
        """Undo `freeze`."""
        self.support = None

    @torch.no_grad()
    def prox_(self, lr: float) -> None:
        """One proximal step of length `lr`, after the optimiser's: parameters become prox of ``lr * lam`` times it.

        Raises
        ------
        ValueError : `lr` is negative or not finite.
        FloatingPointError : parameters are not finite.
        """
        check_number("lr", lr, at_least=0.0)
        if self.support is not None:
            factors = self.support
        elif lr * self.lam == 0.0:
            return
        else:
            factors = self._joint(self.spec.norms(), lambda n, d, k: self._shrinkage(n, lr * self.lam, d, k))
        for family, factor in zip(self.spec.families, factors, strict=True):
            family.multiply_(self.spec.module, factor)

    def value(self) -> Float[Tensor, ""]:
        """The penalty, ``lam`` included: a differentiable number."""
        norms = self.spec.norms()
        parts = [
            self._value(torch.cat([norms[i].to(norms[0].device) for i in share.families]), self._d(share), share.k)
            for share in self.shares
        ]
        return self.lam * torch.stack(parts).sum()

    @torch.no_grad()
    def slopes(self) -> list[Float[Tensor, " m"]]:
        """The c_j for which the penalty's gradient at a nonzero group theta_j is c_j theta_j; 0 at zero groups."""
        if self.frozen or self.lam == 0.0:
            return [torch.zeros_like(norms) for norms in self.spec.norms()]
        slopes = self._joint(self.spec.norms(), self._slopes)
        return [self.lam * slope for slope in slopes]

    def sparsity(self) -> Sparsity:
        """Which groups are left."""
        return self.spec.sparsity()

    def within_budget(self, slack: float = 0.0) -> bool:
        """Whether no more than ``1 + slack`` times k groups are left, of each k."""
        with torch.no_grad():
            alive = [int((norms > 0.0).sum()) for norms in self.spec.norms()]
        return all(sum(alive[i] for i in share.families) <= (1.0 + slack) * share.k for share in self.shares)

    @abstractmethod
    def _shrinkage(self, norms: Tensor, step: float, d: Tensor, k: int) -> Tensor: ...

    @abstractmethod
    def _value(self, norms: Tensor, d: Tensor, k: int) -> Tensor: ...

    @abstractmethod
    def _slopes(self, norms: Tensor, d: Tensor, k: int) -> Tensor: ...

    def _d(self, share: Share) -> Tensor:
        return torch.cat([self.d[i] for i in share.families])

    def _joint(self, norms: list[Tensor], function: Any) -> list[Tensor]:
        """Numbers for each group from the norms of all groups that share a budget."""
        results = list(norms)
        for share in self.shares:
            device = norms[share.families[0]].device
            joint = torch.cat([norms[i].to(device) for i in share.families])
            numbers = function(joint, self._d(share), share.k)
            pieces = torch.split(numbers, [len(norms[i]) for i in share.families])
            for i, piece in zip(share.families, pieces, strict=True):
                results[i] = piece.to(norms[i].device)
        return results


class GroupEnvelope(GroupRegularizer):
    """``lam`` times the envelope of "energy, with at most k groups" of a module's parameters.

    Its proximal step shrinks the groups that are surely among the k by 1 / (1 + lr lam d), like weight decay, removes
    those that surely are not, and lets the others share what is left. At small ``lam`` most groups are undecided; as it
    grows, exactly k remain. Raise it gradually from a trained model (`SparsityRamp`): a large constant one picks
    the groups before they have learned anything.

        reg = GroupEnvelope(GroupSpec.from_module(model, kind="filter"), k=0.3, lam=1e-2)
        loss.backward()
        optimizer.step()
        reg.prox_(lr)

    After `torch.optim.SGD` with momentum the penalty acts 1 - momentum times as strongly; `ProxSGD` has no such effect.
    Parameters in 16 bits should have masters in
    32 that are stepped: small factors are lost in rounding.

    Parameters
    ----------
    spec : the groups.
    k : how many may be active: a number, a fraction in (0, 1), or one of these for each family, by name.
    lam : strength, at least 0.
    weights : d in ``(1/2) sum d_j ||theta_j||^2``: "one", "size" (the number of weights in the group), "1/size",
        "sqrt(size)", or one tensor of positive numbers for each family.
    scope : "family" gives each family its own k, "global" shares one among all. A shared k can leave a layer without
        groups, where weights of other layers are larger.

    Raises
    ------
    TypeError, ValueError : an argument is out of range.
    """

    def __init__(
        self,
        spec: GroupSpec,
        k: Budget,
        lam: float,
        weights: Weighting | Sequence[Tensor] = "one",
        scope: Scope = "family",
    ) -> None:
        super().__init__(spec, k, lam, weights, scope)

    def _shrinkage(self, norms: Tensor, step: float, d: Tensor, k: int) -> Tensor:
        return shrinkage(norms, step, d, k)

    def _value(self, norms: Tensor, d: Tensor, k: int) -> Tensor:
        return wgsef(norms, d, k)

    def _slopes(self, norms: Tensor, d: Tensor, k: int) -> Tensor:
        # u of the minimum does not move to first order: the gradient of (1/2) d ||theta||^2 / u is d theta / u
        u = selectors(norms, d, k)
        alive = norms > 0.0
        return torch.where(alive, d.to(u.device) / torch.where(alive, u, 1.0), 0.0)


class GroupLasso(GroupRegularizer):
    """The group lasso, ``lam * sum_j d_j ||theta_j||``: the usual penalty, to compare with.

    Parameters are those of `GroupEnvelope`; `k` has no part in the penalty and is what `SparsityRamp` and `HSPG` go by.
    """

    def __init__(
        self,
        spec: GroupSpec,
        k: Budget,
        lam: float,
        weights: Weighting | Sequence[Tensor] = "sqrt(size)",
        scope: Scope = "family",
    ) -> None:
        super().__init__(spec, k, lam, weights, scope)

    def _shrinkage(self, norms: Tensor, step: float, d: Tensor, k: int) -> Tensor:
        alive = norms > 0.0
        shrunk = prox.group_lasso(norms[:, None], d.to(norms)[:, None], step)[:, 0]
        return torch.where(alive, shrunk / torch.where(alive, norms, 1.0), 0.0)

    def _value(self, norms: Tensor, d: Tensor, k: int) -> Tensor:
        return (d.to(norms) * norms).sum()

    def _slopes(self, norms: Tensor, d: Tensor, k: int) -> Tensor:
        alive = norms > 0.0
        return torch.where(alive, d.to(norms) / torch.where(alive, norms, 1.0), 0.0)


def _weights(spec: GroupSpec, weights: Any) -> list[Tensor]:
    if isinstance(weights, str):
        check_choice("weights", weights, get_args(Weighting))
        powers = {"one": 0.0, "size": 1.0, "1/size": -1.0, "sqrt(size)": 0.5}
        return [family.sizes(spec.module) ** powers[weights] for family in spec.families]
    given = [torch.as_tensor(d, dtype=torch.float64).cpu() for d in weights]
    shapes, wanted = [tuple(d.shape) for d in given], [(family.size,) for family in spec.families]
    if shapes != wanted:
        raise ValueError(f"weights must be one vector for each family, of shapes {wanted}, got {shapes}")
    if not all(bool(((d > 0) & d.isfinite()).all()) for d in given):
        raise ValueError("weights must be positive and finite")
    return given
