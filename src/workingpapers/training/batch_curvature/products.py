"""Hessian and generalised Gauss-Newton matrix of a module's loss on a batch or a loader, as linear operators."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from workingpapers.common.curvature import GaussNewtonProduct, HessianProduct
from workingpapers.common.validation import check_choice, check_integer

Loss = Callable[[Any, Any], Tensor]
Batch: TypeAlias = tuple[Any, Any]
Mode = Literal["eval", "train"]
Matrix = Literal["hessian", "ggn"]


class FunctionalModel:
    """A module as a function of its trainable parameters, which leaves the module as it is.

    Attributes
    ----------
    parameters : copies of the trainable parameters, by name.
    dtype, device : of a flat vector of them; all are on one device.
    """

    def __init__(self, model: nn.Module, mode: Mode = "eval", seed: int = 0) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_choice("mode", mode, get_args(Mode))
        self.model, self.mode, self.seed = model, mode, check_integer("seed", seed, at_least=0)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("model must have a parameter with requires_grad=True")
        devices = {p.device for p in trainable.values()}
        if len(devices) > 1:
            raise ValueError(f"model must be on one device, got {', '.join(sorted(map(str, devices)))}")
        self.device = devices.pop()
        self.parameters = {name: p.detach().clone() for name, p in trainable.items()}
        self.dtype = functools.reduce(torch.promote_types, (p.dtype for p in trainable.values()))
        # double backward through cuDNN's recurrent kernels does not exist
        self._cudnn = not any(isinstance(module, nn.RNNBase) for module in model.modules())

    @property
    def size(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters.values())

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Any, draw: int = 0) -> Any:
        """What the module returns for a tensor, a tuple of positional or a mapping of keyword arguments.

        In mode "train" calls with equal `draw` see the same random numbers.
        """
        arguments: tuple[Any, ...] = ()
        keywords: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            keywords = dict(inputs)
        elif isinstance(inputs, tuple | list):
            arguments = tuple(inputs)
        else:
            arguments = (inputs,)
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}  # batch norm writes into them
        with self._forward(self.seed + draw):
            return functional_call(self.model, {**parameters, **buffers}, arguments, keywords)

    def flatten(self, tree: Mapping[str, Tensor]) -> Float[Tensor, " P"]:
        return torch.cat([tree[name].flatten().to(self.dtype) for name in self.parameters])

    def unflatten(self, vector: Float[Tensor, " P"]) -> dict[str, Tensor]:
        parts = torch.split(vector, [p.numel() for p in self.parameters.values()])
        pairs = zip(self.parameters.items(), parts, strict=True)
        return {name: part.view(p.shape).to(p.dtype) for (name, p), part in pairs}

    @contextmanager
    def _forward(self, seed: int) -> Iterator[None]:
        """The mode asked for, random numbers from the seed, and attention that has second derivatives."""
        training = {module: module.training for module in self.model.modules()}
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            self.model.train(self.mode == "train")
            with (
                torch.random.fork_rng(devices, enabled=self.mode == "train"),
                sdpa_kernel(SDPBackend.MATH),
                torch.backends.cudnn.flags(enabled=self._cudnn and torch.backends.cudnn.enabled),
            ):
                if self.mode == "train":
                    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond
                    if devices:
                        torch.cuda.manual_seed(seed)
                yield
        finally:
            for module, flag in training.items():
                module.training = flag


class Curvature:
    """A symmetric matrix of second derivatives of a mean loss, known by its products with flat vectors.

    Made by `hvp` and `ggn_vp`; ``H(v)`` and ``H @ v`` are the product, for `lanczos(H, H.n, 20, dtype=H.dtype)`. The
    matrix is that at the parameters which the model had when this was made, whatever becomes of the model.

    Attributes
    ----------
    n : trainable parameters; their order is that of `model.named_parameters()`, frozen ones left out.
    dtype, device : of the vectors.
    loss : mean loss on the data.
    samples : how many there are.
    """

    def __init__(self, kind: Matrix, model: FunctionalModel, loss: Loss, batches: Iterable[Batch]) -> None:
        self._kind, self._model, self._loss, self._batches = kind, model, loss, batches
        self.n, self.dtype, self.device = model.size, model.dtype, model.device
        self._kept: Callable[[Any], Any] | None = None
        self.loss, self.samples = 0.0, 0
        count = 0
        for batch in batches:
            product, size = self._product(batch)
            self.loss += float(product.value) * size
            self.samples += size
            count += 1
            self._kept = product if count == 1 else None
        if not count:
            raise ValueError("the data must hold at least one batch")
        self.loss /= self.samples

    def __call__(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The matrix times v, in the type of v; each batch weighs as many samples as it has.

        Raises
        ------
        ValueError : v has another shape, or the data are no longer those of the first pass.
        """
        if not isinstance(v, Tensor) or v.shape != (self.n,):
            raise ValueError(f"v must be a tensor of shape ({self.n},), got {getattr(v, 'shape', v)!r}")
        direction = self._model.unflatten(v.to(self.device, self.dtype))
        if self._kept is not None:
            return self._model.flatten(self._kept(direction)).to(v)
        total = torch.zeros(self.n, dtype=self.dtype, device=self.device)
        loss, samples = 0.0, 0
        for batch in self._batches:
            product, size = self._product(batch)
            total += size * self._model.flatten(product(direction))
            loss += float(product.value) * size
            samples += size
        tolerance = math.sqrt(torch.finfo(self.dtype).eps) * max(1.0, abs(self.loss))
        if samples != self.samples or abs(loss / samples - self.loss) > tolerance:
            raise ValueError(
                f"the data must be the same in every pass: {self.samples} samples with loss {self.loss:.6g} first, "
                f"then {samples} with {loss / max(samples, 1):.6g} (augmentation, or a loader that drops the last?)"
            )
        return (total / samples).to(v)

    __matmul__ = __call__

    def to_scipy(self) -> LinearOperator:
        """For SciPy's sparse eigensolvers and linear solvers; a float64 operator on the CPU."""

        def matvec(v: np.ndarray) -> np.ndarray:
            return self(torch.as_tensor(v, dtype=torch.float64).reshape(-1)).cpu().numpy()

        return LinearOperator((self.n, self.n), matvec=matvec, rmatvec=matvec, dtype=np.float64)

    def _product(self, batch: Batch) -> tuple[HessianProduct | GaussNewtonProduct, int]:
        """v -> (this batch's matrix) v on dictionaries of parameters, and the batch's size."""
        inputs, targets = pytree.tree_map_only(Tensor, lambda t: t.to(self.device), tuple(batch))
        model, parameters = self._model, self._model.parameters
        product: HessianProduct | GaussNewtonProduct
        if self._kind == "hessian":
            product = HessianProduct(lambda p: self._value(model.outputs(p, inputs), targets), parameters)
        else:
            product = GaussNewtonProduct(
                lambda p: _tensor(model.outputs(p, inputs)), lambda z: self._value(z, targets), parameters
            )
        if not bool(product.value.isfinite()):
            raise FloatingPointError(f"the loss is {float(product.value)}")
        return product, batch_length(inputs)

    def _value(self, outputs: Any, targets: Any) -> Tensor:
        return self._loss(outputs, targets)


def hvp(
    model: nn.Module,
    loss: Loss,
    batch: Batch | Iterable[Batch],
    *,
    mode: Mode = "eval",
    micro_batch: int | None = None,
    seed: int = 0,
) -> Curvature:
    """Hessian of the mean loss on a batch or a loader, as an operator: two backward passes, one of them shared.

    On a single batch the graph of the gradient is kept (memory for its activations) and each product costs one backward
    pass through it; on several batches the graphs are rebuilt in each product, which bounds the memory by one batch.

    Parameters
    ----------
    model : any module; its parameters, buffers, gradients and mode are left as they are. Attention is computed by the
        kernel that has second derivatives. Parameters with requires_grad=False do not count.
    loss : maps (outputs, targets) to the mean of the samples' losses, a scalar.
    batch : (inputs, targets) with a tensor of targets, or an iterable of such pairs that can be gone through again:
        a list, a `DataLoader`. Inputs are a tensor, a tuple of positional or a mapping of keyword arguments.
    mode : "eval", or "train" for the curvature that training sees with batch norm (statistics of each batch) and
        dropout (one mask, drawn from `seed`).
    micro_batch : split a batch into pieces of at most so many samples, to save memory. In mode "train" the pieces have
        their own batch-norm statistics.
    seed : of the random numbers in mode "train".

    Returns
    -------
    Curvature : call it with flat vectors.

    Raises
    ------
    FloatingPointError : the loss is not finite.
    TypeError, ValueError : an argument has the wrong type or is out of range, or the data can be read only once.
    """
    return Curvature("hessian", FunctionalModel(model, mode, seed), loss, as_batches(batch, micro_batch))


def ggn_vp(
    model: nn.Module,
    loss: Loss,
    batch: Batch | Iterable[Batch],
    *,
    mode: Mode = "eval",
    micro_batch: int | None = None,
    seed: int = 0,
) -> Curvature:
    """Generalised Gauss-Newton matrix of the mean loss, J^T (d^2 loss / dz^2) J, as an operator; arguments as `hvp`.

    Positive semidefinite for losses that are convex in the outputs z (which must be one tensor). For cross-entropy it
    is the Fisher information; for networks near a fit it is most of the Hessian.
    """
    return Curvature("ggn", FunctionalModel(model, mode, seed), loss, as_batches(batch, micro_batch))


def as_batches(batch: Batch | Iterable[Batch], micro_batch: int | None = None) -> Iterable[Batch]:
    """One batch or an iterable of them, as something that can be gone through again."""
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        batches: Iterable[Batch] = [cast(Batch, tuple(batch))]
    elif isinstance(batch, Tensor | Mapping) or not isinstance(batch, Iterable):
        raise TypeError(f"batch must be (inputs, targets) or an iterable of such pairs, got {type(batch).__name__}")
    elif iter(batch) is batch:
        raise TypeError("batch must be a list or a loader that can be gone through again, got an iterator")
    else:
        batches = cast(Iterable[Batch], batch)
    return batches if micro_batch is None else MicroBatches(batches, micro_batch)


class MicroBatches:
    """Batches cut into pieces of at most `size` samples."""

    def __init__(self, batches: Iterable[Batch], size: int) -> None:
        self.batches, self.size = batches, check_integer("micro_batch", size, at_least=1)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            for first in range(0, batch_length(batch[0]), self.size):
                yield _piece(batch, slice(first, first + self.size))


def _piece(batch: Batch, samples: slice) -> Batch:
    return cast(Batch, pytree.tree_map_only(Tensor, lambda t: t[samples], tuple(batch)))


def batch_length(inputs: Any) -> int:
    """Samples in a batch: the first dimension of the first tensor among the inputs."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not tensors or not tensors[0].ndim or not len(tensors[0]):
        raise ValueError("the inputs of a batch must hold a tensor whose first dimension counts the samples")
    return len(tensors[0])


def _tensor(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(f"ggn_vp needs a model that returns one tensor, got {type(outputs).__name__}")
    return outputs
