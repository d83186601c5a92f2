"""Batches drawn without replacement from tensors or from a map-style data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, TensorDataset, default_collate

from workingpapers.common.validation import check_integer
from workingpapers.training.batch_curvature.products import Batch, batch_length

Data: TypeAlias = Dataset[Any] | tuple[Any, Tensor]


class Samples:
    """Inputs and targets by index, from a pair of tensors (inputs may be a tree of them) or a map-style data set."""

    def __init__(self, dataset: Data) -> None:
        if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
            dataset = (dataset.tensors[0], dataset.tensors[1])
        self._pair: Batch | None = None
        if isinstance(dataset, tuple | list):
            if len(dataset) != 2 or not isinstance(dataset[1], Tensor):
                raise TypeError("dataset must be (inputs, targets) with a tensor of targets, or a map-style data set")
            self._pair = (dataset[0], dataset[1])
            self._length = batch_length(dataset[0])
            if len(dataset[1]) != self._length:
                raise ValueError(
                    f"dataset must have as many inputs as targets, got {self._length} and {len(dataset[1])}"
                )
        elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
            self._dataset = cast(Any, dataset)
            self._length = len(self._dataset)
        else:
            raise TypeError(f"dataset must be tensors or a map-style data set, got {type(dataset).__name__}")

    def __len__(self) -> int:
        return self._length

    def take(self, indices: Int[Tensor, " B"]) -> Batch:
        """The batch of these samples."""
        if self._pair is not None:
            return cast(Batch, pytree.tree_map_only(Tensor, lambda t: t[indices.to(t.device)], self._pair))
        batch = default_collate([self._dataset[int(index)] for index in indices])
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError("dataset must hold pairs of an input and a target")
        return cast(Batch, tuple(batch))

    def draw(self, batch_size: int, generator: torch.Generator) -> Batch:
        """A batch drawn without replacement; all samples in their order where batch_size is their number."""
        if batch_size == len(self):
            return self.take(torch.arange(len(self)))
        return self.take(torch.randperm(len(self), generator=generator)[:batch_size])

    def check_batch_size(self, batch_size: int) -> int:
        return check_integer("batch_size", batch_size, at_least=1, at_most=len(self))


class Chunks:
    """All samples in their order, in batches of at most `size`; can be gone through again."""

    def __init__(self, samples: Samples, size: int) -> None:
        self.samples, self.size = samples, size

    def __iter__(self) -> Iterator[Batch]:
        for indices in torch.split(torch.arange(len(self.samples)), self.size):
            yield self.samples.take(indices)
