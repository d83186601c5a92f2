"""Small real and synthetic tasks, and linear models or networks with many learning rates trained on them at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sklearn.datasets import make_classification
from torch.nn import functional

from workingpapers import data

Array = np.ndarray

# --------------------------------------------------------------------------------------------------------------------
# The tasks

SEPARABLE = ("wine", "breast cancer", "blood cells", "digits")
NOISY = ("iris", "diabetes", "sachs", "text", "synthetic 1", "synthetic 2", "synthetic 3")


class Task(NamedTuple):
    """Standardised columns with a constant one, and one-hot labels (or a response of one column), split 3 to 1."""

    inputs: torch.Tensor
    targets: torch.Tensor
    test_inputs: torch.Tensor
    test_targets: torch.Tensor
    classes: bool


def load_task(name: str, seed: int) -> Task:
    columns, targets = columns_and_targets(name)
    order = np.random.default_rng([seed, 1]).permutation(len(columns))
    train, test = np.split(order, [3 * len(order) // 4])
    classes = targets.dtype.kind == "i"
    if name != "text":
        spread = columns[train].std(axis=0)
        columns = (columns - columns[train].mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    columns = np.c_[columns, np.ones(len(columns))]
    if classes:
        targets = np.eye(targets.max() + 1)[targets]
    else:
        targets = ((targets - targets[train].mean()) / targets[train].std())[:, None]
    X, Y = (torch.tensor(part, dtype=torch.float32) for part in (columns, targets))
    return Task(X[train], Y[train], X[test], Y[test], classes)


def columns_and_targets(name: str) -> tuple[Array, Array]:
    """Raw columns; labels (whole numbers) or a response."""
    if name.startswith("synthetic"):
        shape: dict[str, Any] = {"n_samples": 500, "n_features": 50, "n_informative": 15, "n_classes": 3}
        columns, labels = make_classification(**shape, flip_y=0.1, random_state=int(name.split()[1]))
        return columns, labels
    if name == "text":  # the next letter from the three before it
        codes = data.descriptions()["codes"]
        letters = np.eye(27)[codes]
        return np.hstack([letters[:-3], letters[1:-2], letters[2:-1]]), codes[3:]
    if name == "sachs":  # one protein from the other ten
        proteins = np.log(data.sachs()["columns"])
        return proteins[:, :-1], proteins[:, -1]
    if name == "diabetes":
        return data.diabetes()["columns"], data.diabetes()["response"]
    source, columns = {
        "iris": (data.iris, "columns"),
        "wine": (data.wine, "columns"),
        "breast cancer": (data.breast_cancer, "columns"),
        "digits": (data.digits, "images"),
        "blood cells": (data.blood_cells, "components"),
    }[name]
    loaded = source()
    return loaded[columns], loaded["labels"]


# --------------------------------------------------------------------------------------------------------------------
# Many runs at once

BATCH = 16
HIDDEN = 32
# How the batch size changes over the run, as a function of the share of the run that is over.
BATCHES: dict[str, Callable[[float], int]] = {
    "16": lambda done: BATCH,
    "1, then 32": lambda done: 1 if done < 0.5 else 32,
    "32, then 1": lambda done: 32 if done < 0.5 else 1,
    "1 in the middle": lambda done: 1 if 0.4 < done < 0.7 else 32,
}


class Runs(NamedTuple):
    """What each of `runs` runs came to."""

    loss: Float[np.ndarray, " runs"]  # on all training data, after the last step; infinite where it diverged
    error: Float[np.ndarray, " runs"]  # on test data: share of wrong labels, or of unexplained variance
    norms: Float[np.ndarray, "steps runs"]  # l2 for SGD, l1 for Adam


def train(
    task: Task, model: str, optimizer: str, etas: Float[np.ndarray, "steps runs"], batches: str, seed: int
) -> Runs:
    """Train side by side, on the same batches, as many models as `etas` has columns of rates."""
    T, runs = etas.shape
    inputs, targets = task.inputs, task.targets
    generator = torch.Generator().manual_seed(seed)
    classes = targets.shape[1]
    sizes = [inputs.shape[1], classes] if model == "linear" else [inputs.shape[1], HIDDEN, classes]
    # layer[i, o, r]: from input i to output o in run r; one matrix product serves the first layer of all runs
    layers = []
    for rows, columns in itertools.pairwise(sizes):
        start = torch.randn(rows, columns, 1, generator=generator) * (2.0 / rows) ** 0.5
        layers.append((start if model == "network" else 0.0 * start).repeat(1, 1, runs).requires_grad_())
    moments = [(torch.zeros_like(layer), torch.zeros_like(layer)) for layer in layers]
    rates = torch.tensor(etas, dtype=torch.float32)
    norms = torch.empty(T, runs)
    picks = shuffled(len(inputs), T, generator)
    for t in range(T):
        pick = picks[t, : BATCHES[batches](t / T)]
        losses = run_losses(layers, inputs[pick], targets[pick], task.classes)
        gradients = torch.autograd.grad(losses.mean(0).sum(), layers)
        ord = 2.0 if optimizer == "SGD" else 1.0
        norms[t] = torch.stack([torch.linalg.vector_norm(g, ord, (0, 1)) for g in gradients]).norm(ord, dim=0)
        with torch.no_grad():
            for layer, g, (first, second) in zip(layers, gradients, moments, strict=True):
                if optimizer == "SGD":
                    layer -= rates[t] * g
                    continue
                first.lerp_(g, 0.1)
                second.lerp_(g.square(), 0.001)
                scale = (second / (1.0 - 0.999 ** (t + 1))).sqrt_().add_(1e-8)
                layer -= rates[t] * (first / (1.0 - 0.9 ** (t + 1))) / scale
    with torch.no_grad():
        # in float32 the loss of a network that separates the classes rounds to 0
        precise = [layer.double() for layer in layers]
        loss = run_losses(precise, inputs.double(), targets.double(), task.classes).mean(0)
        loss = loss.nan_to_num(torch.inf, torch.inf)
        outputs = forward(layers, task.test_inputs)
        if task.classes:
            wrong = outputs.argmax(1) != task.test_targets.argmax(1)[:, None]
        else:
            wrong = (outputs - task.test_targets[..., None]).square().squeeze(1) / task.test_targets.var()
    return Runs(loss.numpy(), wrong.double().mean(0).numpy(), norms.numpy().astype(float))


def shuffled(rows: int, steps: int, generator: torch.Generator) -> torch.Tensor:
    """Rows for `steps` batches of at most 32, epoch by epoch in random order."""
    needed = 32 * steps
    epochs = [torch.randperm(rows, generator=generator) for _ in range(-(-needed // rows))]
    return torch.cat(epochs)[:needed].reshape(steps, 32)


def forward(layers: list[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """Outputs of shape (rows, classes, runs)."""
    first = layers[0]
    out: torch.Tensor = (inputs @ first.flatten(1)).reshape(len(inputs), *first.shape[1:])
    for layer in layers[1:]:
        out = torch.einsum("bir,ior->bor", out.relu(), layer)
    return out


def run_losses(layers: list[torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor, classes: bool) -> torch.Tensor:
    """Losses of shape (rows, runs)."""
    outputs = forward(layers, inputs)
    if classes:
        losses = -(functional.log_softmax(outputs, dim=1) * targets[..., None]).sum(1)
    else:
        losses = 0.5 * (outputs - targets[..., None]).square().sum(1)
    return losses
