"""Networks, their measured curvature and their training runs, as the claims of batch-curvature share them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from workingpapers import data
from workingpapers.desk.claim import artifact
from workingpapers.training.batch_curvature import (
    BatchCurve,
    batch_extremes,
    batch_top_eigenvalue,
    fit_batch_curve,
    largest_stable_lr,
    noise_variance,
)

LOSS = nn.CrossEntropyLoss()

# --------------------------------------------------------------------------------------------------------------------
# Data and networks


class Task(NamedTuple):
    """Centred inputs and labels."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def load_task(name: str, seed: int) -> Task:
    """Three quarters of the digits, the rest for testing; or 2,048 and 4,000 images of Fashion-MNIST."""
    rng = np.random.default_rng([seed, 7])
    if name == "digits":
        loaded = data.digits()
        order = rng.permutation(len(loaded["labels"]))
        train, test = order[:1344], order[1344:]
        images, labels = loaded["images"], loaded["labels"]
        test_images, test_labels = images[test], labels[test]
    else:
        loaded, held_out = data.fashion_mnist("train"), data.fashion_mnist("test")
        train = rng.permutation(len(loaded["labels"]))[:2048]
        images, labels = loaded["images"].reshape(-1, 784)[train] / 255.0, loaded["labels"][train]
        test_images, test_labels = held_out["images"].reshape(-1, 784)[:4000] / 255.0, held_out["labels"][:4000]
        train = np.arange(2048)
    mean = images[train].mean(axis=0)
    parts = [(images[train] - mean, labels[train]), (test_images - mean, test_labels)]
    (X, y), (X_test, y_test) = [
        (torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.long)) for a, b in parts
    ]
    return Task(X, y, X_test, y_test)


def new_network(name: str, seed: int) -> nn.Sequential:
    """64 hidden units ("digits", "fashion"), or two strided convolutions ("fashion, convolutions")."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name.endswith("convolutions"):
            layers = [nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1)]
            model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(392, 10))
        else:
            model = nn.Sequential(nn.Linear(64 if name == "digits" else 784, 64), nn.ReLU(), nn.Linear(64, 10))
        weights = [p for p in model.parameters() if p.ndim > 1]
        for p in weights:
            nn.init.kaiming_normal_(p, nonlinearity="relu")
        with torch.no_grad():
            weights[-1].mul_(0.5)
            for p in model.parameters():
                p.mul_(float(p.ndim > 1))  # no biases
    return model


def train(
    model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, batch_size: int, steps: int, seed: int
) -> nn.Module:
    """Train on batches drawn anew in every step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pick = torch.randperm(len(task.labels), generator=generator)[:batch_size]
        optimizer.zero_grad()
        torch.autograd.backward(LOSS(model(task.inputs[pick]), task.labels[pick]))
        optimizer.step()
    return model


@artifact
def trained(name: str, steps: int, seed: int) -> dict[str, Tensor]:
    """Parameters after so many steps of SGD with rate 0.1 and batches of 64."""
    model = new_network(name, seed)
    train(model, load_task(name.split(",")[0], seed), torch.optim.SGD(model.parameters(), lr=0.1), 64, steps, seed)
    return {key: value.clone() for key, value in model.state_dict().items()}


def network_and_task(name: str, stage: int, seed: int) -> tuple[nn.Sequential, Task]:
    model = new_network(name, seed)
    if stage:
        model.load_state_dict(trained(name, stage, seed))
    return model, load_task(name.split(",")[0], seed)


SIZES = (8, 16, 32, 64, 256)


@artifact
def measured(name: str, stage: int, seed: int) -> dict[str, Tensor]:
    """Extreme eigenvalues of the Hessian: means over 5 batches of each size, and those of all samples at the end."""
    model, task = network_and_task(name, stage, seed)
    sizes = (*SIZES, len(task.labels))
    found = [batch_extremes(model, LOSS, task[:2], B, seed=seed) for B in sizes]
    means = [(part.top.mean(), part.bottom.mean()) for part in found]
    return {"sizes": torch.tensor(sizes), "extremes": torch.tensor(means, dtype=torch.float64)}


def fitted(name: str, stage: int, seed: int, model: Any = "auto") -> BatchCurve:
    """The curve through the Hessian's top eigenvalues."""
    found = measured(name, stage, seed)
    tops = found["extremes"][:-1, 0].numpy()
    return fit_batch_curve(SIZES, tops, N=int(found["sizes"][-1]), model=model)


LOGISTIC_SIZES = [8, 16, 32, 64, 128, 256, 512, 1024]


@artifact
def logistic_regression(features: int, samples: int, seed: int) -> dict[str, Tensor]:
    """Top eigenvalues of batches; of all samples the extreme ones and the variance of the noise."""
    rng = np.random.default_rng(seed)
    X = torch.tensor(rng.standard_normal((samples, features)), dtype=torch.float32)
    y = torch.tensor(rng.integers(2, size=(samples, 1)), dtype=torch.float32)
    model = nn.Linear(features, 1, bias=False)
    nn.init.zeros_(model.weight)
    loss = functional.binary_cross_entropy_with_logits
    tops = [batch_top_eigenvalue(model, loss, (X, y), B, seed=seed) for B in LOGISTIC_SIZES]
    whole = batch_extremes(model, loss, (X, y), samples)
    sigma2 = noise_variance(model, loss, (X, y), 64, 10, seed=seed).sigma2
    return {
        "tops": torch.tensor(tops, dtype=torch.float64),
        "whole": torch.tensor([float(whole.top[0]), float(whole.bottom[0]), sigma2], dtype=torch.float64),
    }


# --------------------------------------------------------------------------------------------------------------------
# Training runs

OPTIMIZERS: dict[str, Any] = {
    "SGD": "sgd",
    "SGD, momentum 0.9": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "Adam": "adam",
}


@artifact
def stable_rate(name: str, stage: int, method: str, B: int, steps: int, seed: int) -> dict[str, Tensor]:
    model, task = network_and_task(name, stage, seed)
    start = 0.2 if method == "Adam" else 4.0
    found = largest_stable_lr(
        model, LOSS, task[:2], B, OPTIMIZERS[method], steps=steps, seed=seed, start=start, rtol=0.05
    )
    return {"lr": torch.tensor(math.sqrt(found.lr * found.diverges_at))}


RATES = [2.0**k for k in range(-4, 4)]  # tried at every batch size
FACTOR = {"SGD": 1.0, "Adam": 0.02}


def final_loss(method: str, lr: float, B: int, steps: int, seed: int) -> float:
    """Loss on all samples after training digits; a run that ends above its start counts as the start."""
    task, model = load_task("digits", seed), new_network("digits", seed)
    first = float(LOSS(model(task.inputs), task.labels).detach())
    make = torch.optim.SGD if method == "SGD" else torch.optim.Adam
    train(model, task, make(model.parameters(), lr=lr), B, steps, seed)
    last = float(LOSS(model(task.inputs), task.labels).detach())
    return min(last, first) if math.isfinite(last) else first


@artifact
def tuned(optimizer: str, B: int, steps: int, seed: int) -> dict[str, Tensor]:
    """The rate with the smallest final loss, and this loss."""
    rates = [FACTOR[optimizer] * rate for rate in RATES]
    losses = [final_loss(optimizer, lr, B, steps, seed) for lr in rates]
    best = int(np.argmin(losses))
    return {"lr": torch.tensor(rates[best], dtype=torch.float64), "loss": torch.tensor(losses[best])}


def train_epochs(
    model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, epochs: int, seed: int, scheduler: Any = None
) -> float:
    """Share of wrong labels on test data after training in batches of 64; 0.9, as good as guessing, if it diverged."""
    loader = batches_of_64(task, seed)
    for _ in range(epochs):
        for X, y in loader:
            optimizer.zero_grad()
            torch.autograd.backward(LOSS(model(X), y))
            optimizer.step()
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            return 0.9
        if scheduler is not None:
            scheduler.step()
    with torch.no_grad():
        return float((model(task.test_inputs).argmax(1) != task.test_labels).double().mean())


def batches_of_64(task: Task, seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(task.inputs, task.labels), 64, shuffle=True, generator=generator)


@artifact
def best_of_six(network: str, epochs: int, seed: int) -> dict[str, Tensor]:
    """Test errors of SGD with momentum 0.9 at six rates."""
    errors = []
    for lr in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
        model, task = network_and_task(network, 0, seed)
        errors.append(train_epochs(model, task, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), epochs, seed))
    return {"test_error": torch.tensor(errors, dtype=torch.float64)}
