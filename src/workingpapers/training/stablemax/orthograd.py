"""OrthoGrad: any optimiser, on gradients without the part that only rescales the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from workingpapers.common.validation import check_choice

Scope = Literal["tensor", "row", "global"]
Parameters: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class OrthoGrad(Optimizer):
    """Wrap an optimiser so that it sees gradients orthogonal to the weights, at their original length.

    In a network whose output is homogeneous in its weights, moving along them scales the logits and predicts nothing
    new; late in training most of the gradient does that. For each tensor w with gradient g, before every step::

        g_perp = g - (<w, g> / <w, w>) w
        g <- g_perp ||g|| / ||g_perp||

    Under SGD every step adds exactly lr^2 ||g||^2 to ||w||^2; preconditioned optimisers (Adam) move along w a little.
    Weight decay inside the base optimiser is allowed. `p.grad` holds the projected gradient after the step. Gradients
    are projected after every evaluation of a closure, need not be unscaled first, and may be of any floating-point
    type (16 bits are projected in float32). Learning-rate schedulers, parameter groups and `state_dict` are those of
    the base optimiser, so a checkpoint of the bare base optimiser can be continued, and the other way round.

    Where g is parallel to w up to its rounding, nothing is left of it: the gradient becomes 0. Where w is 0 (or its
    square underflows) the gradient is left as it is, as are those of tensors with one element.

    Parameters
    ----------
    params : parameters, or groups of them, as for any optimiser.
    base : class of the optimiser, for example `torch.optim.SGD`. After overfitting, gradients fall below Adam's
        default eps = 1e-8, which then freezes it: pass eps=1e-25.
    scope : what is orthogonal to what: each tensor by itself; each "row" of it, the weights into one unit; or all of
        the projected parameters as one vector.
    rescale : give the projected gradient the length of the original; False leaves it shorter.
    exclude : parameters whose gradient stays as it is. None excludes tensors with fewer than two dimensions (biases,
        gains of normalisation layers); the authors exclude nothing, which is ``()``.
    **base_kwargs : for the base optimiser: lr, betas, eps, weight_decay, momentum, ...

    Raises
    ------
    TypeError : `base` is no optimiser class, `exclude` holds something else than tensors, or a parameter is complex.
    ValueError : `scope` is unknown, or the base optimiser refuses its arguments.
    RuntimeError : by `step`, when a gradient is sparse.
    """

    def __init__(
        self,
        params: Parameters,
        base: Callable[..., Optimizer] = torch.optim.AdamW,
        scope: Scope = "tensor",
        rescale: bool = True,
        exclude: Iterable[Tensor] | None = None,
        **base_kwargs: Any,
    ) -> None:
        check_choice("scope", scope, get_args(Scope))
        if not callable(base):
            raise TypeError(f"base must be an optimiser class, got {base!r}")
        if isinstance(exclude, Tensor):
            raise TypeError("exclude must be a list of parameters or None, got a single tensor")
        excluded = None if exclude is None else list(exclude)
        if excluded is not None and not all(isinstance(parameter, Tensor) for parameter in excluded):
            raise TypeError("exclude must hold parameters (tensors), or be None")
        wrapped = base(params, **base_kwargs)
        if not isinstance(wrapped, Optimizer):
            raise TypeError(f"base must make a torch.optim.Optimizer, got {type(wrapped).__name__}")
        super().__init__(wrapped.param_groups, wrapped.defaults)
        self.scope: Scope = scope
        self.rescale = rescale
        self.exclude = excluded
        self.base = wrapped
        self._share()
        self._check_real()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Project the gradients and let the base optimiser step.

        Parameters
        ----------
        closure : evaluates the model, calls backward and returns the loss.

        Returns
        -------
        What the base optimiser returns: the closure's loss, None without a closure.
        """
        if closure is None:
            self.project()
            return self.base.step()

        def projected() -> Any:
            loss = closure()
            self.project()
            return loss

        return self.base.step(projected)

    @torch.no_grad()
    def project(self) -> None:
        """Replace `p.grad` by its projection for all parameters that are not excluded; `step` does this itself."""
        excluded = None if self.exclude is None else {id(parameter) for parameter in self.exclude}
        chosen = []
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if parameter.grad.is_sparse:
                raise RuntimeError("OrthoGrad does not support sparse gradients")
            if not (parameter.ndim < 2 if excluded is None else id(parameter) in excluded):
                chosen.append(parameter)
        batches = self._batches(chosen)
        # A power of two changes no digit, and squares of tiny gradients would underflow.
        units = [_power_of_two(peak) for peak in self._joined([b.peaks() for b in batches], Tensor.amax)]
        for batch, unit in zip(batches, units, strict=True):
            torch._foreach_div_(batch.g, batch.of_each(unit))
        overlaps = self._joined([b.inner(b.w, b.g) for b in batches], Tensor.sum)  # <w, g>
        squares = self._joined([b.inner(b.w, b.w) for b in batches], Tensor.sum)  # <w, w>
        before = self._joined([b.norms() for b in batches], torch.linalg.vector_norm)  # ||g||
        for batch, overlap, square in zip(batches, overlaps, squares, strict=True):
            share = torch.where(square > torch.finfo(square.dtype).tiny, -overlap / square, 0.0)
            torch._foreach_addcmul_(batch.g, batch.w, batch.of_each(share))  # g_perp = g - <w, g> / <w, w> w
        after = self._joined([b.norms() for b in batches], torch.linalg.vector_norm)  # ||g_perp||
        for batch, unit, whole, left in zip(batches, units, before, after, strict=True):
            factor = unit * (whole / left) if self.rescale else unit
            factor = torch.where(left <= batch.rounding * whole, 0.0, factor)
            torch._foreach_mul_(batch.g, batch.of_each(factor))
            batch.write_back()

    def _batches(self, parameters: list[Tensor]) -> list[_Batch]:
        """The parameters by device and type; without those a projection would leave nothing of."""
        single = sum(parameter.numel() for parameter in parameters) < 2
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in parameters:
            columns = parameter.numel() if self.scope != "row" else _columns(parameter)
            if not single and parameter.numel() and (columns > 1 or self.scope == "global"):
                kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        return [_Batch(alike, by_row=self.scope == "row") for alike in kinds.values()]

    def _joined(self, values: list[Tensor], join: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """With scope "global" the joint value of all parameters, for each of them; else the values as they are."""
        if self.scope != "global" or not values:
            return values
        widest = max((value.dtype for value in values), key=lambda dtype: torch.finfo(dtype).bits)
        joint = join(torch.cat([value.to(values[0].device, widest) for value in values]))
        return [joint.to(value.device, value.dtype).expand_as(value) for value in values]

    # ----------------------------------------------------------------------------------------------------------------
    # Groups and state are the base optimiser's own, not copies

    def _share(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state
        self.defaults = self.base.defaults

    def _check_real(self) -> None:
        if any(parameter.is_complex() for group in self.param_groups for parameter in group["params"]):
            raise TypeError("params must be real, got a complex tensor")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base optimiser, as `torch.optim.Optimizer.add_param_group`."""
        if "base" not in self.__dict__:  # called by the constructor of torch.optim.Optimizer
            super().add_param_group(param_group)
            return
        self.base.add_param_group(param_group)
        self._check_real()

    def state_dict(self) -> dict[str, Any]:
        """The state of the base optimiser."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an `OrthoGrad`, or of a bare base optimiser, with the same groups."""
        self.base.load_state_dict(state_dict)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "scope": self.scope, "rescale": self.rescale, "exclude": self.exclude}

    def __setstate__(self, state: dict[str, Any]) -> None:
        base: Optimizer = state["base"]
        shared = {"param_groups": base.param_groups, "state": base.state, "defaults": base.defaults}
        super().__setstate__(state | shared)


class _Batch:
    """Parameters of one device and type with their gradients, as what is projected: vectors, or matrices by row.

    Attributes
    ----------
    w, g : one vector or matrix for each parameter, float32 or float64; `g` is the gradient itself where its type and
        layout allow, else a copy. Numbers for each vector or row are kept for all parameters together, as one tensor.
    rounding : how small a share of g the orthogonal part may be before it is rounding error.
    """

    def __init__(self, parameters: list[Tensor], by_row: bool) -> None:
        given = parameters[0].dtype
        wide = torch.float64 if given == torch.float64 else torch.float32
        self.by_row = by_row
        self.gradients = [p.grad for p in parameters if p.grad is not None]
        shapes = [(len(p) if p.ndim > 1 else 1, -1) if by_row else (-1,) for p in parameters]
        self.w = [p.detach().to(wide).reshape(shape) for p, shape in zip(parameters, shapes, strict=True)]
        self.g = [g.to(wide).reshape(shape) for g, shape in zip(self.gradients, shapes, strict=True)]
        self.rounding = max(4 * torch.finfo(wide).eps, torch.finfo(given).eps / 2)

    def peaks(self) -> Tensor:
        """Largest absolute entries of g."""
        if self.by_row:
            return torch.cat([g.abs().amax(1) for g in self.g])
        extremes = [torch.aminmax(g) for g in self.g]  # on CPUs ten times as fast as the infinity norm
        least, most = (torch.stack(ends) for ends in zip(*extremes, strict=True))
        return torch.maximum(-least, most)

    def norms(self) -> Tensor:
        """Euclidean norms of g."""
        if self.by_row:
            return torch.cat([torch.linalg.vector_norm(g, dim=1) for g in self.g])
        return torch.stack(torch._foreach_norm(self.g))

    def inner(self, left: list[Tensor], right: list[Tensor]) -> Tensor:
        """Inner products; not by `dot`, which loses three digits over millions of float32 terms on CPUs."""
        products = [(a * b).sum(-1, keepdim=True).flatten() for a, b in zip(left, right, strict=True)]
        return torch.cat(products)

    def of_each(self, values: Tensor) -> list[Tensor]:
        """Numbers for each vector or row, shaped to multiply them."""
        if self.by_row:
            return list(torch.split(values.unsqueeze(1), [len(rows) for rows in self.g]))
        return list(values.unbind())

    def write_back(self) -> None:
        for gradient, projected in zip(self.gradients, self.g, strict=True):
            if gradient.data_ptr() != projected.data_ptr():
                gradient.copy_(projected.view(gradient.shape))


def _columns(parameter: Tensor) -> int:
    """Entries of a row; a vector is one row."""
    return parameter[0].numel() if parameter.ndim > 1 and len(parameter) else parameter.numel()


def _power_of_two(peak: Tensor) -> Tensor:
    """The powers of two next above these numbers, inside the normal range; 1 for 0."""
    limits = torch.finfo(peak.dtype)
    lowest, highest = math.frexp(limits.tiny)[1] - 1, math.frexp(limits.max)[1] - 1
    return torch.exp2(torch.frexp(peak).exponent.clamp(lowest, highest).to(peak.dtype))
