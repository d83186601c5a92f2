"""What the claims of `target_surrogate` train: tasks, methods with their settings, an expert and a slow simulator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from workingpapers.data import breast_cancer, diabetes, digits
from workingpapers.desk.claim import Row
from workingpapers.optimization.target_surrogate import SSO, ArmijoGD, oracle_from_loss

# --- tasks ----------------------------------------------------------------------------------------------------------


def half_squares(z: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (z - y).square()


LOGISTIC, SOFTMAX = nn.BCEWithLogitsLoss(reduction="none"), nn.CrossEntropyLoss(reduction="none")


class Task(NamedTuple):
    """A model to train: standardised inputs, labels, the unreduced loss and its largest curvature L."""

    inputs: Tensor
    labels: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    smoothness: float
    hidden: int = 0  # 0 for a linear model
    linear_net: bool = False

    def model(self, seed: int) -> nn.Module:
        """Linear, or with one hidden layer: tanh, or none, which makes it a matrix factorisation."""
        columns = self.inputs.shape[1]
        outputs = 10 if self.labels.ndim == 1 else self.labels.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if not self.hidden:
                linear = nn.Linear(columns, outputs)
                nn.init.normal_(linear.weight, std=0.1)
                model = nn.Sequential(linear)
            elif self.linear_net:
                layers = nn.Linear(columns, self.hidden, bias=False), nn.Linear(self.hidden, outputs, bias=False)
                model = nn.Sequential(*layers)
            else:
                model = nn.Sequential(nn.Linear(columns, self.hidden), nn.Tanh(), nn.Linear(self.hidden, outputs))
        return model.double()

    def value(self, model: nn.Module) -> float:
        """h, the mean over all examples."""
        with torch.no_grad():
            return float(self.loss(model(self.inputs), self.labels).sum()) / len(self.inputs)

    @property
    def linear_smoothness(self) -> float:
        """The largest curvature of h in the weights of a linear model."""
        return self.smoothness * float(torch.linalg.matrix_norm(self.inputs, 2)) ** 2 / len(self.inputs)


def load_task(name: str) -> Task:
    if name.startswith("matrix"):
        return factorisation(int(name.split()[1]))
    if name == "digits":
        data = digits()
        images = data["images"] - data["images"].mean(axis=0)
        return Task(torch.tensor(images), torch.tensor(data["labels"]), SOFTMAX, 0.5)
    if name == "diabetes":
        data = diabetes()
        return Task(standardised(data["columns"]), standardised(data["response"][:, None]), half_squares, 1.0)
    data = breast_cancer()
    labels = torch.tensor(data["labels"], dtype=torch.float64)[:, None]
    return Task(standardised(data["columns"]), labels, LOGISTIC, 0.25, hidden=8 if name.endswith("network") else 0)


def standardised(columns: np.ndarray) -> Tensor:
    return torch.tensor((columns - columns.mean(axis=0)) / columns.std(axis=0))


def factorisation(hidden: int) -> Task:
    """The paper's: Y = A X for 1000 Gaussian columns of 6 entries, the 10 rows of A scaled from 1 down to 1e-10."""
    rng = np.random.default_rng(0)
    A = np.linspace(1.0, 1e-10, 10)[:, None] * rng.random((10, 6))
    X = rng.standard_normal((1000, 6))
    return Task(torch.tensor(X), torch.tensor(X @ A.T), half_squares, 1.0, hidden, linear_net=True)


def batches(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Rows of one batch after the other, epoch after epoch in a new order; the rest of an epoch is dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator)[: n - n % size].reshape(-1, size)


# --- methods --------------------------------------------------------------------------------------------------------

TORCH = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdaGrad": torch.optim.Adagrad}
LARGEST = {"SGD": 8, "Adam": 0, "AdaGrad": 4, "SSO": 8}  # exponents of two; SGD and SSO in units of 1 / L
SETTINGS = sorted(range(22), key=lambda setting: abs(setting - 11))  # the likelier first


class Trainer:
    """One of the methods with one of its settings: `update` costs one gradient of the oracle."""

    def __init__(self, method: str, setting: int, model: nn.Module, task: Task, batches_per_epoch: int) -> None:
        self.model, self.loss, self.updates, self.queries = model, task.loss, 0, 0
        params = list(model.parameters())
        family = method.partition(",")[0]
        halvings, self.falling = setting // 2, setting % 2 == 1
        self.lr = 2.0 ** (LARGEST.get(family, 0) - halvings)
        self.optimizer: Any
        if family == "SLS":
            growth = 2.0 ** (1.0 / batches_per_epoch) if self.falling else 2.0
            self.optimizer = ArmijoGD(params, c=0.05 + 0.08 * halvings, growth=growth)
        elif family.startswith("SSO"):
            rule = "line_search" if family == "SSO-SLS" else "sqrt" if self.falling else "constant"
            lr = 1.0 if family == "SSO-SLS" else self.lr / task.smoothness
            inner = int(method.partition("m=")[2] or 10)
            options: dict[str, Any] = {"batches_per_epoch": batches_per_epoch}
            self.optimizer = SSO(params, lr, rule, inner, **options)  # type: ignore[arg-type]
        else:
            if family == "SGD":
                self.lr /= task.linear_smoothness
            if family == "AdaGrad" and self.falling:
                self.lr *= math.sqrt(0.5)  # it decays by itself: steps in between instead
                self.falling = False
            self.optimizer = TORCH[family](params, lr=self.lr)

    def update(self, x: Tensor, y: Tensor) -> None:
        """One update on a batch; counts oracle queries, of gradients and of losses alone."""
        self.updates += 1
        optimizer = self.optimizer
        if isinstance(optimizer, SSO):
            optimizer.step(lambda: self.model(x), oracle_from_loss(self.loss, y))
            self.queries = optimizer.oracle_calls + optimizer.loss_evaluations
            return

        def loss() -> Tensor:
            return self.loss(self.model(x), y).sum() / len(x)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            torch.autograd.backward(value)
            return value.detach()

        if isinstance(optimizer, ArmijoGD):
            optimizer.step(closure, loss)
            self.queries = self.updates + optimizer.evaluations
            return
        if self.falling:
            optimizer.param_groups[0]["lr"] = self.lr / math.sqrt(self.updates)
        optimizer.step(closure)
        self.queries = self.updates


def run(task: Task, method: str, setting: int, size: int, target: float, budget: int, seed: int) -> list[Row]:
    """The loss over all data after each update, until the target, the end of the budget or divergence."""
    model, n = task.model(seed), len(task.inputs)
    size = min(size, n)
    trainer = Trainer(method, setting, model, task, n // size)
    start = task.value(model)
    rows: list[Row] = [{"calls": 0, "queries": 0, "loss": start}]
    for rows_of_batch in batches(n, size, seed):
        x, y = task.inputs[rows_of_batch], task.labels[rows_of_batch]
        try:
            trainer.update(x, y)
        except (ValueError, FloatingPointError):  # outputs that are no longer finite
            break
        value = task.value(model)
        if not value < 1e3 * start:
            break
        rows.append({"calls": trainer.updates, "queries": trainer.queries, "loss": value})
        if value <= target or trainer.updates == budget:
            break
    return rows


# --- oracles that are not formulas -----------------------------------------------------------------------------------


def expert_torque(observations: np.ndarray) -> np.ndarray:
    """Swing up by pumping energy, then hold upright: the expert that labels what the learner sees."""
    cosine, sine, velocity = observations.T
    angle = np.arctan2(sine, cosine)  # 0 upright
    energy = velocity**2 / 6.0 + 5.0 * (cosine - 1.0)  # of a rod of mass and length 1, g = 10; 0 upright at rest
    pumping = -energy * np.tanh(4.0 * velocity)
    holding = -8.0 * angle - 2.0 * velocity
    upright = 1.0 / (1.0 + np.exp(20.0 * (np.abs(angle) - 0.5)))
    torque: np.ndarray = np.clip(upright * holding + (1.0 - upright) * pumping, -2.0, 2.0)
    return torque


class Throws:
    """A simulator as the loss: velocities z, where each ball is a second later against where it should be.

    The flight, with quadratic drag, is integrated by `steps` steps of the classical Runge-Kutta method; the gradient
    takes two more flights per ball (forward differences). 1/2 |p(z) - goal|^2, L about 1.

    Parameters
    ----------
    steps : what the oracle costs.
    """

    smoothness = 1.0

    def __init__(self, goals: np.ndarray, steps: int) -> None:
        self.goals, self.steps, self.calls = goals, steps, 0

    @np.errstate(over="ignore", invalid="ignore")  # a thrower that diverges is noticed by its caller
    def flight(self, velocities: np.ndarray) -> np.ndarray:
        state = np.concatenate([np.zeros_like(velocities), velocities], axis=1)
        dt = 1.0 / self.steps
        for _ in range(self.steps):
            one = self._rate(state)
            two = self._rate(state + 0.5 * dt * one)
            three = self._rate(state + 0.5 * dt * two)
            four = self._rate(state + dt * three)
            state = state + dt / 6.0 * (one + 2.0 * two + 2.0 * three + four)
        return state[:, :2]

    @staticmethod
    def _rate(state: np.ndarray) -> np.ndarray:
        velocity = state[:, 2:]
        speed = np.sqrt((velocity**2).sum(axis=1, keepdims=True))
        return np.concatenate([velocity, -0.2 * speed * velocity - np.array([0.0, 9.81])], axis=1)

    def __call__(self, z: Tensor) -> tuple[float, np.ndarray]:
        self.calls += 1
        velocities, n, h = z.numpy(), len(z), 1e-6
        nudged = [velocities, velocities + np.array([h, 0.0]), velocities + np.array([0.0, h])]
        landed, right, above = np.split(self.flight(np.concatenate(nudged)), [n, 2 * n])
        miss = landed - self.goals
        gradient = np.stack([((right - landed) * miss).sum(axis=1), ((above - landed) * miss).sum(axis=1)], axis=1) / h
        return 0.5 * float((miss**2).sum()) / n, gradient

    def loss(self, z: Tensor) -> float:
        self.calls += 1
        return 0.5 * float(((self.flight(z.numpy()) - self.goals) ** 2).sum()) / len(z)


class ThroughThrows(torch.autograd.Function):
    """The mean loss as a function that PyTorch's optimisers can differentiate."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, oracle: Throws) -> Tensor:
        value, gradient = oracle(z.detach())
        ctx.save_for_backward(torch.from_numpy(gradient) / len(z))
        return z.new_tensor(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.saved_tensors[0], None
