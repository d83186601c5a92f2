"""Small tasks on which generalisation comes long after the training set is learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from workingpapers.common.validation import check_choice, check_integer, check_number


@dataclass(frozen=True)
class GrokkingTask:
    """A classification task split into training and test examples.

    Attributes
    ----------
    train_inputs, test_inputs : float32 features, or int64 tokens.
    train_labels, test_labels : int64 classes.
    classes : how many there are.
    """

    train_inputs: Float[Tensor, "train features"] | Int[Tensor, "train tokens"]
    train_labels: Int[Tensor, " train"]
    test_inputs: Float[Tensor, "test features"] | Int[Tensor, "test tokens"]
    test_labels: Int[Tensor, " test"]
    classes: int

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels to learn."""
        return self.train_inputs, self.train_labels

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels to generalise to."""
        return self.test_inputs, self.test_labels


def modular_dataset(
    p: int = 113,
    op: Literal["add", "mul", "sub"] = "add",
    fraction: float = 0.4,
    one_hot: bool = True,
    *,
    random_state: int | np.random.Generator = 0,
) -> GrokkingTask:
    """All p^2 pairs (a, b) with label a + b, a b or a - b modulo p, split at random.

    Parameters
    ----------
    p : modulus, at least 2.
    op : "add", "mul" or "sub".
    fraction : of the pairs to train on, in (0, 1); rounded down to whole pairs.
    one_hot : inputs are the two one-hot vectors side by side, shape (n, 2 p); False leaves the tokens, shape (n, 2).
    random_state : seed or generator of the split.

    Raises
    ------
    ValueError : an argument is out of range, or a part of the split is empty.
    """
    p = check_integer("p", p, at_least=2)
    check_choice("op", op, ("add", "mul", "sub"))
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    a, b = pairs.unbind(1)
    labels = {"add": a + b, "mul": a * b, "sub": a - b}[op] % p
    inputs = functional.one_hot(pairs, p).flatten(1).float() if one_hot else pairs
    return _split(inputs, labels, fraction, p, np.random.default_rng(random_state))


def sparse_parity(
    bits: int = 43,
    relevant: int = 3,
    samples: int = 2000,
    fraction: float = 0.5,
    *,
    random_state: int | np.random.Generator = 0,
) -> GrokkingTask:
    """Distinct random bit strings with the parity of their first few bits as label.

    Parameters
    ----------
    bits : length of a string, in [1, 62].
    relevant : how many of the bits, the first ones, count; in [1, bits].
    samples : how many strings, in [2, 2^bits].
    fraction : of the strings to train on, in (0, 1); rounded down to whole strings.
    random_state : seed or generator of the strings and the split.

    Raises
    ------
    ValueError : an argument is out of range, or a part of the split is empty.
    """
    bits = check_integer("bits", bits, at_least=1, at_most=62)
    relevant = check_integer("relevant", relevant, at_least=1, at_most=bits)
    samples = check_integer("samples", samples, at_least=2, at_most=2**bits)
    generator = np.random.default_rng(random_state)
    numbers = generator.choice(2**bits, size=samples, replace=False)
    strings = torch.from_numpy(numbers[:, None] >> np.arange(bits) & 1)
    labels = strings[:, :relevant].sum(1) % 2
    return _split(strings.float(), labels, fraction, 2, generator)


def _split(
    inputs: Tensor, labels: Tensor, fraction: float, classes: int, generator: np.random.Generator
) -> GrokkingTask:
    count = int(check_number("fraction", fraction, above=0, below=1) * len(labels))
    if not 0 < count < len(labels):
        raise ValueError(f"fraction must leave both parts of {len(labels)} examples non-empty, got {fraction!r}")
    order = torch.from_numpy(generator.permutation(len(labels)))
    train, test = order[:count], order[count:]
    return GrokkingTask(inputs[train], labels[train], inputs[test], labels[test], classes)
