"""Claims of "Efficient and Modular Implicit Differentiation"."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workingpapers.data import breast_cancer, diabetes, digits
from workingpapers.desk.claim import (
    Cell,
    Row,
    always,
    bars,
    benchmark,
    claim,
    close,
    faster,
    higher,
    line,
    lower,
    scales,
    scatter,
    seeds,
    slope,
)
from workingpapers.optimization.implicit_diff import (
    custom_fixed_point,
    custom_root,
    lasso,
    linear_solve,
    projection,
    prox,
    root_jvp,
    svm_dual,
    svm_weights,
)

PAPER = "implicit-diff"
DOUBLE = torch.float64


# --- precision of the Jacobian ---------------------------------------------------------------------------------------


@claim(
    paper=PAPER,
    says="The error of the implicit Jacobian is proportional to the iterate's, within Theorem 1's bound, and below "
    "that of the unrolled Jacobian.",
    published="ridge regression on diabetes, gradient descent (Figure 3): implicit below its bound and below unrolling",
    grid={
        "penalty": [1e-3],
        "iterations": [168],
        "seed": seeds(smoke=5, laptop=8, paper=20),
        "method": ["implicit", "unrolled"],
    },
    expect=[
        slope("jacobian_error", over="iterate_error", of="implicit", at_least=0.9, at_most=1.1),
        always("share_of_bound", of="implicit", at_most=1 + 1e-6),
        close("share_of_bound", 1.0, atol=0.02, of="implicit", where={"iteration": "last"}),
        lower("jacobian_error", "implicit", than="unrolled", factor=1.0, where={"iteration": "first"}),
        lower("jacobian_error", "implicit", than="unrolled", factor=0.1, where={"iteration": "last"}),
    ],
    plot=line(x="iterate_error", y="jacobian_error", by="method", log="xy"),
)
def jacobian_precision(cell: Cell) -> list[Row]:
    data = diabetes()
    rng = np.random.default_rng(cell.seed)
    patients = rng.permutation(len(data["response"]))[:400]  # another sample of patients for each seed
    X, y = (torch.tensor(data[name][patients]) for name in ("columns", "response"))
    H, c = X.T @ X / len(y), X.T @ y / len(y)
    A = H + cell.penalty * torch.eye(len(c), dtype=DOUBLE)
    solution = torch.linalg.solve(A, c)
    jacobian = -torch.linalg.solve(A, solution)
    # F is linear in w, and ∂_2 F = w: α is A's smallest eigenvalue, β = 1 and γ = 0, so C = 1 / α.
    constant = 1 / float(torch.linalg.eigvalsh(A)[0])
    step = 1 / float(torch.linalg.eigvalsh(A)[-1])

    def gradient(w: Tensor, penalty: Tensor) -> Tensor:
        return H @ w - c + penalty * w

    penalty, one = torch.tensor(cell.penalty, dtype=DOUBLE), torch.tensor(1.0, dtype=DOUBLE)
    shown = np.unique(np.geomspace(1, cell.iterations, 25).round())
    rows = []
    for iteration, point, unrolled in unrolling(lambda w, p: w - step * gradient(w, p), torch.zeros_like(c), penalty):
        if iteration in shown:
            estimate = root_jvp(gradient, point, (penalty,), (one,)) if cell.method == "implicit" else unrolled
            iterate_error, jacobian_error = float((point - solution).norm()), float((estimate - jacobian).norm())
            rows.append(
                {
                    "iteration": iteration,
                    "iterate_error": iterate_error,
                    "jacobian_error": jacobian_error,
                    "share_of_bound": jacobian_error / (constant * iterate_error),
                }
            )
        if iteration == cell.iterations:
            break
    return rows


def unrolling(
    step: Callable[[Tensor, Tensor], Tensor], x: Tensor, parameter: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The iterates of x <- step(x, parameter), each with its derivative in the parameter, by forward mode."""
    derivative = torch.zeros_like(x)
    one = torch.ones_like(parameter)
    for iteration in itertools.count(1):
        found = torch.func.jvp(step, (x, parameter), (derivative, one))
        x, derivative = found[0], found[1]
        yield iteration, x, derivative


@claim(
    paper=PAPER,
    says="Where F has kinks, here the lasso's, the implicit Jacobian is further off than the unrolled one until the "
    "active set is found, and exact from then on.",
    published="not in the paper, whose Theorem 1 asks for a smooth F: the limit of its claim",
    grid={
        "samples": [60],
        "features": [100],
        "seed": seeds(smoke=5, laptop=8, paper=20),
        "method": ["implicit", "unrolled"],
    },
    expect=[
        lower("digits", "implicit", than="unrolled", where={"iteration": "first"}),
        higher("digits", "implicit", than="unrolled", where={"support_is_right": True}),
        always("digits", of="implicit", at_least=8, where={"support_is_right": True}),
    ],
    plot=line(x="iteration", y="digits", by="method", log="x"),
)
def before_the_active_set_has_settled(cell: Cell) -> list[Row]:
    rng = np.random.default_rng(cell.seed)
    X = torch.tensor(rng.standard_normal((cell.samples, cell.features)))
    truth = torch.tensor(rng.standard_normal(cell.features) * (rng.random(cell.features) < 0.1))
    y = X @ truth + 0.1 * torch.tensor(rng.standard_normal(cell.samples))
    penalty, one = torch.tensor(0.1, dtype=DOUBLE), torch.tensor(1.0, dtype=DOUBLE)
    step = cell.samples / float(torch.linalg.matrix_norm(X, 2)) ** 2

    def mapped(w: Tensor, penalty: Tensor) -> Tensor:
        return prox.lasso(w - step * X.T @ (X @ w - y) / cell.samples, penalty, step)

    def residual(w: Tensor, penalty: Tensor) -> Tensor:
        return w - mapped(w, penalty)

    exact = lasso(X, y, penalty, tol=1e-14)
    jacobian = root_jvp(residual, exact, (penalty,), (one,))
    rows = []
    for iteration, point, unrolled in unrolling(mapped, torch.zeros(cell.features, dtype=DOUBLE), penalty):
        if iteration in (5, 10, 20, 50, 100, 200):
            estimate = root_jvp(residual, point, (penalty,), (one,)) if cell.method == "implicit" else unrolled
            error = float((estimate - jacobian).norm() / jacobian.norm())
            right = bool(((point != 0) == (exact != 0)).all())
            rows.append({"iteration": iteration, "digits": -math.log10(max(error, 1e-16)), "support_is_right": right})
        if iteration == 200:
            break
    return rows


# --- hyper-parameters of the multiclass support vector machine -------------------------------------------------------

# Until the residual of the fixed point is below 1e-5; at 100 features, where the dual is not strongly convex, 1e-3.
PROJECTED_GRADIENT_STEPS = {100: 2500, 200: 600, 500: 600}


class MulticlassSVM:
    """The dual of the multiclass SVM on synthetic data, its solvers, and the loss of its hyper-parameter θ.

    Validation loss ½ mean (X_val W - Y_val)², as a function of θ at which it is evaluated and differentiated.
    """

    classes = 5
    penalty = 1.0

    def __init__(self, samples: int, features: int, seed: int) -> None:
        from sklearn.datasets import make_classification

        columns, labels = make_classification(
            2 * samples,
            features,
            n_informative=10,
            n_classes=self.classes,
            n_redundant=0,
            random_state=seed,
        )
        columns = columns / np.linalg.norm(columns, axis=1, keepdims=True)
        one_hot = np.eye(self.classes)[labels]
        self.X, self.X_validation = torch.tensor(columns[:samples]), torch.tensor(columns[samples:])
        self.Y, self.Y_validation = torch.tensor(one_hot[:samples]), torch.tensor(one_hot[samples:])
        self.data = (self.X, self.X_validation, self.Y, self.Y_validation)
        self.curvature = float(torch.linalg.matrix_norm(self.X, 2)) ** 2
        self.start = torch.full_like(self.Y, 1 / self.classes)

    def gradient(self, beta: Tensor, penalty: Tensor) -> Tensor:
        return self.Y - self.X @ (self.X.T @ (self.Y - beta)) / penalty

    def projected_step(self, beta: Tensor, penalty: Tensor) -> Tensor:
        step = self.penalty / self.curvature
        return projection.simplex(beta - step * self.gradient(beta, penalty))

    def mirror_step(self, beta: Tensor, penalty: Tensor) -> Tensor:
        weights = beta * torch.exp(-self.penalty / self.curvature * self.gradient(beta, penalty))
        return weights / weights.sum(1, keepdim=True)

    def loss(self, beta: Tensor, penalty: Tensor) -> Tensor:
        predicted = self.X_validation @ svm_weights(beta, self.X, self.Y, penalty)
        return (predicted - self.Y_validation).square().mean() / 2

    def residual(self, beta: Tensor) -> float:
        moved = self.projected_step(beta, torch.tensor(self.penalty, dtype=DOUBLE))
        return float((moved - beta).detach().norm())


def iterated(step: Callable[[Tensor, Tensor], Tensor], steps: int) -> Callable[[Tensor, Tensor], Tensor]:
    def solver(x: Tensor, penalty: Tensor) -> Tensor:
        for _ in range(steps):
            x = step(x, penalty)
        return x

    return solver


def block_coordinate_descent(problem: MulticlassSVM, beta: Tensor, sweeps: int) -> Tensor:
    """One row of β after the other, each with its own step: in NumPy, a black box to torch."""
    X, Y, dual = problem.X.numpy(), problem.Y.numpy(), beta.numpy().copy()
    weights = X.T @ (Y - dual) / problem.penalty
    steps = problem.penalty / np.square(X).sum(1)
    counts = np.arange(1, Y.shape[1] + 1)
    for _ in range(sweeps):
        for i, x in enumerate(X):
            v = dual[i] - steps[i] * (Y[i] - x @ weights)
            threshold = ((np.sort(v)[::-1].cumsum() - 1) / counts).max()  # of the projection on the simplex
            row = np.maximum(v - threshold, 0)
            weights -= np.outer(x, row - dual[i]) / problem.penalty
            dual[i] = row
    return torch.tensor(dual)


@claim(
    paper=PAPER,
    says="The hyper-gradient of the multiclass SVM is the same whichever solver found the solution and whichever fixed "
    "point it is differentiated through.",
    published="mirror descent, projected gradient and block coordinate descent solvers, the first two also as fixed "
    "points: the validation losses coincide (Figure 4)",
    grid={
        "samples": scales(smoke=[15], laptop=[30], paper=[100]),
        "features": scales(smoke=[30], laptop=[60], paper=[200]),
        "seed": seeds(smoke=2, laptop=8),
        "method": ["projected gradient", "mirror descent", "block coordinate descent"],
    },
    expect=[always("gradient_error", at_most=1e-3), always("residual", at_most=1e-5)],
    plot=scatter(x="residual", y="gradient_error", by="method", log="xy"),
)
def any_solver_with_any_fixed_point(cell: Cell) -> list[Row]:
    problem = MulticlassSVM(cell.samples, cell.features, cell.seed)
    penalty = torch.tensor(problem.penalty, dtype=DOUBLE, requires_grad=True)
    advance: Callable[[Tensor], Tensor] = {
        "projected gradient": lambda beta: iterated(problem.projected_step, 100)(beta, penalty.detach()),
        "mirror descent": lambda beta: iterated(problem.mirror_step, 500)(beta, penalty.detach()),
        "block coordinate descent": lambda beta: block_coordinate_descent(problem, beta, 10),
    }[cell.method]
    solution = problem.start
    for _ in range(200):
        solution = advance(solution)
        if problem.residual(solution) < 1e-8:
            break

    def accurate_loss(penalty: float) -> float:
        exact = svm_dual(problem.X, problem.Y, penalty, tol=1e-13)
        return float(problem.loss(exact, torch.tensor(penalty, dtype=DOUBLE)))

    h = 1e-4
    difference = (accurate_loss(problem.penalty + h) - accurate_loss(problem.penalty - h)) / (2 * h)
    rows = []
    for name, step in (("projected gradient", problem.projected_step), ("mirror descent", problem.mirror_step)):
        beta = custom_fixed_point(step, solve="bicgstab")(lambda start, penalty: solution)(None, penalty)
        (found,) = torch.autograd.grad(problem.loss(beta, penalty), penalty)
        error = abs(float(found) / difference - 1)
        rows.append({"fixed_point": name, "gradient_error": error, "residual": problem.residual(solution)})
    return rows


@benchmark(
    paper=PAPER,
    says="The hyper-gradient of the multiclass SVM takes less time by implicit differentiation than by unrolling the "
    "same solver.",
    published="700 samples, up to 10,000 features, 5 classes: run time well below unrolling, which runs out of memory",
    grid={
        "samples": scales(smoke=[100], laptop=[700]),
        "features": scales(smoke=[200], laptop=[100, 500, 2000], paper=[100, 500, 2000, 10_000]),
        "contender": ["implicit", "unrolled"],
    },
    expect=[faster("implicit", than="unrolled", each="features")],
    plot=bars(x="features", y="seconds", by="contender"),
    rounds={"smoke": 5, "laptop": 5, "paper": 7},
)
def svm_hypergradient(cell: Cell) -> Row:
    problem = MulticlassSVM(cell.samples, cell.features, seed=0)
    steps = PROJECTED_GRADIENT_STEPS.get(cell.features, 150)
    solver: Callable[[Tensor, Tensor], Any] = iterated(problem.projected_step, steps)
    if cell.contender == "implicit":
        solver = custom_fixed_point(problem.projected_step, solve="bicgstab")(solver)
    penalty = torch.tensor(problem.penalty, dtype=DOUBLE, requires_grad=True)
    with cell.timed():
        beta = solver(problem.start, penalty)
        loss = problem.loss(beta, penalty)
        (gradient,) = torch.autograd.grad(loss, penalty)
    return {
        "gradient": float(gradient),
        "validation_loss": float(loss),
        "residual": problem.residual(beta),
    }


@claim(
    paper=PAPER,
    says="The memory that unrolling needs beside the data grows in proportion to the solver's iterations, that of "
    "implicit differentiation does not, and the gradients agree once the solver has converged.",
    published="unrolling runs out of memory at large sizes, implicit differentiation does not (Figure 4)",
    grid={
        "samples": scales(smoke=[30], laptop=[200]),
        "features": scales(smoke=[300], laptop=[1000]),
        "iterations": scales(smoke=[100, 400], laptop=[50, 100, 200, 400]),
        "seed": seeds(smoke=5, laptop=5),
        "method": ["implicit", "unrolled"],
    },
    expect=[
        slope("graph_bytes", over="iterations", of="unrolled", at_least=0.9, at_most=1.1),
        slope("graph_bytes", over="iterations", of="implicit", at_most=0.01),
        always("gradient_error", at_most=1e-6, where={"converged": True}),
    ],
    plot=line(x="iterations", y="graph_bytes", by="method", log="xy"),
)
def memory(cell: Cell) -> Row:
    problem = MulticlassSVM(cell.samples, cell.features, cell.seed)
    penalty = torch.tensor(problem.penalty, dtype=DOUBLE, requires_grad=True)
    unrolled = iterated(problem.projected_step, cell.iterations)
    implicit = custom_fixed_point(problem.projected_step, solve="bicgstab")
    solver: Callable[[Tensor, Tensor], Any] = implicit(unrolled) if cell.method == "implicit" else unrolled
    losses: list[Tensor] = []

    def forward() -> Tensor:
        losses.append(problem.loss(solver(problem.start, penalty), penalty))
        return losses[0]

    kept = graph_bytes(forward, problem.data)
    (gradient,) = torch.autograd.grad(losses[0], penalty)
    exact = svm_dual(problem.X, problem.Y, penalty, tol=1e-12)
    (reference,) = torch.autograd.grad(problem.loss(exact, penalty), penalty)
    residual = problem.residual(unrolled(problem.start, penalty.detach()))
    return {
        "graph_bytes": kept,
        "residual": residual,
        "converged": residual < 1e-8,
        "gradient_error": abs(float(gradient / reference) - 1),
    }


def graph_bytes(forward: Callable[[], Tensor], data: tuple[Tensor, ...]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of a computation, beside its data."""
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(forward())  # until the end of the count, so that no address is used twice
    for tensor in data:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


# --- dataset distillation --------------------------------------------------------------------------------------------


class Distillation:
    """Ten images from which a logistic regression is trained that should do well on all digits."""

    penalty = 0.1

    def __init__(self, seed: int) -> None:
        data = digits()
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(data["labels"]))
        images, labels = torch.tensor(data["images"][order]), torch.tensor(data["labels"][order])
        self.images, self.labels, self.test_images, self.test_labels = (
            images[:1200],
            labels[:1200],
            images[1200:],
            labels[1200:],
        )
        self.start = torch.tensor(rng.standard_normal((10, images.shape[1])) / images.shape[1])
        self.weights = torch.zeros(images.shape[1], 10, dtype=DOUBLE)

    def training_loss(self, weights: Tensor, distilled: Tensor) -> Tensor:
        scores = distilled @ weights
        return torch.nn.functional.cross_entropy(scores, torch.arange(10)) + self.penalty / 2 * weights.square().sum()

    def gradient(self, weights: Tensor, distilled: Tensor) -> Tensor:
        error = torch.softmax(distilled @ weights, 1) - torch.eye(10, dtype=DOUBLE)
        return distilled.T @ error / 10 + self.penalty * weights

    def gradient_descent(self, weights: Tensor, distilled: Tensor) -> Tensor:
        """Until the gradient is below 1e-6, with the step 1 / L."""
        curvature = torch.linalg.matrix_norm(distilled.detach(), 2) ** 2 / 20 + self.penalty
        for _ in range(2000):
            gradient = self.gradient(weights, distilled)
            if float(gradient.detach().norm()) < 1e-6:
                break
            weights = weights - gradient / curvature
        return weights

    def lbfgs(self, weights: Tensor, distilled: Tensor) -> np.ndarray:
        """SciPy's L-BFGS: a black box."""
        from scipy.optimize import minimize

        def value_and_gradient(w: np.ndarray) -> tuple[float, np.ndarray]:
            W = torch.tensor(w).reshape(weights.shape)
            return float(self.training_loss(W, distilled)), self.gradient(W, distilled).numpy().ravel()

        found = minimize(
            value_and_gradient, weights.numpy().ravel(), jac=True, method="L-BFGS-B", options={"gtol": 1e-7}
        )
        return np.reshape(found.x, weights.shape)

    def solver(self, method: str) -> Callable[[Tensor, Tensor], Any]:
        if method == "unrolled":
            return self.gradient_descent
        black_box = self.lbfgs if "L-BFGS" in method else self.gradient_descent
        return custom_root(self.gradient, solve="cg")(black_box)

    def loss(self, weights: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(self.images @ weights, self.labels)


@claim(
    paper=PAPER,
    says="Ten distilled images train as good a classifier when distilled by implicit differentiation as by unrolling.",
    published="MNIST, one image for each class, logistic regression: the quality of unrolling, about 4 times as fast",
    grid={
        "outer_steps": scales(smoke=[5], laptop=[60], paper=[300]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": ["implicit", "implicit, L-BFGS", "unrolled"],
    },
    expect=[
        higher("accuracy", "implicit", than="unrolled", margin=-0.01),
        higher("accuracy", "implicit, L-BFGS", than="unrolled", margin=-0.01),
    ],
    plot=line(x="outer_step", y="training_loss", by="method"),
)
def distillation(cell: Cell) -> list[Row]:
    problem = Distillation(cell.seed)
    solver = problem.solver(cell.method)
    distilled = problem.start.clone().requires_grad_()
    optimizer = torch.optim.SGD([distilled], lr=3.0, momentum=0.9)
    rows: list[Row] = []
    for outer_step in range(cell.outer_steps + 1):
        optimizer.zero_grad()
        weights = solver(problem.weights, distilled)
        loss = problem.loss(weights)
        right = (problem.test_images @ weights.detach()).argmax(1) == problem.test_labels
        rows.append({"outer_step": outer_step, "training_loss": float(loss), "accuracy": float(right.double().mean())})
        torch.autograd.backward(loss)
        optimizer.step()
    return rows


@benchmark(
    paper=PAPER,
    says="A gradient in the distilled images is faster by implicit differentiation than by unrolling the same solver.",
    published="about 4 times as fast on MNIST",
    grid={"contender": ["implicit", "unrolled"]},
    expect=[faster("implicit", than="unrolled")],
)
def distillation_gradient(cell: Cell) -> Row:
    problem = Distillation(seed=0)
    # Images of the size that distillation arrives at.
    distilled = torch.stack([problem.images[problem.labels == k].mean(0) for k in range(10)]).mul(3).requires_grad_()
    solver = problem.solver(cell.contender)
    with cell.timed():
        (gradient,) = torch.autograd.grad(problem.loss(solver(problem.weights, distilled)), distilled)
    return {"gradient_norm": float(gradient.norm())}


# --- task-driven dictionary learning ---------------------------------------------------------------------------------

ATOMS = 10
STRENGTHS = (0.03, 0.1, 0.3, 1.0)  # of the codes' lasso; as many settings as the baselines' penalties get


def sparse_codes(columns: Tensor, dictionary: Tensor, strength: float) -> Tensor:
    """argmin over codes c of ½ |x - c D|² + strength |c|₁ + 0.01 |c|² / 2, for each row x of the columns."""
    step = 1 / (float(torch.linalg.matrix_norm(dictionary.detach(), 2)) ** 2 + 0.01)

    def mapped(codes: Tensor, x: Tensor, dictionary: Tensor) -> Tensor:
        gradient = (codes @ dictionary - x) @ dictionary.T
        return prox.elastic_net(codes - step * gradient, (strength, 0.01), step)

    def fista(start: None, x: Tensor, dictionary: Tensor) -> Tensor:
        codes = momentum = torch.zeros((len(x), len(dictionary)), dtype=DOUBLE)
        for k in range(100):
            before, codes = codes, mapped(momentum, x, dictionary)
            momentum = codes + k / (k + 3) * (codes - before)
        return codes

    codes: Tensor = custom_fixed_point(mapped, solve="bicgstab", tol=1e-6)(fista)(None, columns, dictionary)
    return codes


def logistic_scores(train: np.ndarray, labels: np.ndarray, test: np.ndarray, C: float, l1: bool = False) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    solver = "liblinear" if l1 else "lbfgs"
    model = LogisticRegression(C=C, l1_ratio=1.0 if l1 else 0.0, solver=solver, max_iter=5000)
    scores: np.ndarray = model.fit(train, labels).decision_function(test)
    return scores


def dictionary_codes(
    train: np.ndarray, labels: np.ndarray, others: np.ndarray, strength: float, seed: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sparse codes of the training columns and of others.

    The dictionary is an unsupervised one, trained further for `steps` together with a logistic regression on codes.
    """
    from sklearn.decomposition import DictionaryLearning

    unsupervised = DictionaryLearning(ATOMS, alpha=strength, max_iter=30, fit_algorithm="cd", random_state=seed)
    columns, target = torch.tensor(train), torch.tensor(labels, dtype=DOUBLE)
    atoms = torch.tensor(unsupervised.fit(train).components_, requires_grad=True)
    weights = torch.zeros(ATOMS + 1, dtype=DOUBLE, requires_grad=True)
    optimizer = torch.optim.Adam([atoms, weights], lr=0.03)

    def dictionary() -> Tensor:
        length: Tensor = torch.linalg.vector_norm(atoms, dim=1, keepdim=True)
        return atoms / length.clamp_min(1e-6)

    for _ in range(steps):
        optimizer.zero_grad()
        scores = sparse_codes(columns, dictionary(), strength) @ weights[:-1] + weights[-1]
        fit = torch.nn.functional.binary_cross_entropy_with_logits(scores, target)
        torch.autograd.backward(fit + weights[:-1].square().sum() / (2 * len(target)))
        optimizer.step()
    with torch.no_grad():
        learned = sparse_codes(columns, dictionary(), strength).numpy()
        return learned, sparse_codes(torch.tensor(others), dictionary(), strength).numpy()


@claim(
    paper=PAPER,
    says="A dictionary learned for the task gives a better classifier of tumours than an unsupervised dictionary and "
    "than logistic regression.",
    published="AUC on breast-cancer gene expressions: 73.2 ± 2.1 task-driven, 71.6 ± 2.0 L1 and 72.4 ± 2.8 L2 logistic "
    "regression, 68.3 ± 2.3 unsupervised dictionary",
    grid={
        "patients": scales(smoke=[40], laptop=[60], paper=[200]),
        "steps": scales(smoke=[2], laptop=[60], paper=[300]),
        "seed": seeds(smoke=5, laptop=6, paper=20),
        "method": ["task-driven", "unsupervised", "L1 logistic", "L2 logistic"],
    },
    expect=[
        higher("auc", "task-driven", than="unsupervised"),
        higher("auc", "task-driven", than=["L1 logistic", "L2 logistic"]),
    ],
    plot=bars(x="patients", y="auc", by="method"),
)
def task_driven_dictionary(cell: Cell) -> Row:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import roc_auc_score

    data = breast_cancer()
    columns, labels = data["columns"], data["labels"]
    order = np.random.default_rng(cell.seed).permutation(len(labels))
    fit, validation, test = np.split(order, [cell.patients, 2 * cell.patients])
    columns = (columns - columns[fit].mean(0)) / columns[fit].std(0)

    def auc(setting: float) -> tuple[float, float]:
        """On the validation patients and on the test patients."""
        train, others, C = columns[fit], columns[order[cell.patients :]], setting
        if "logistic" not in cell.method:
            steps = cell.steps if cell.method == "task-driven" else 0
            train, others = dictionary_codes(train, labels[fit], others, setting, cell.seed, steps)
            C = 1.0
        scores = logistic_scores(train, labels[fit], others, C, l1=cell.method.startswith("L1"))
        parts = np.split(scores, [len(validation)])
        return roc_auc_score(labels[validation], parts[0]), roc_auc_score(labels[test], parts[1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of the unsupervised start, after its 30 passes
        best = max(map(auc, (0.01, 0.1, 1.0, 10.0) if "logistic" in cell.method else STRENGTHS))
    return {"auc": float(best[1]), "validation_auc": float(best[0])}


# --- sensitivity of a packing of soft discs --------------------------------------------------------------------------


class SoftDiscs:
    """Discs in a periodic square that repel where they overlap; half of them have the diameter θ, half 1.

    Energy ½ Σ max(0, 1 - r_ij / σ_ij)² with σ_ij the mean of the two diameters; positions in units of the larger one.
    """

    small = 0.6

    def __init__(self, discs: int, density: float, seed: int) -> None:
        self.discs = discs
        self.side = math.sqrt(discs / 2 * math.pi / 4 * (1 + self.small**2) / density)
        self.start = self.side * torch.rand((discs, 2), dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
        self.first, self.second = torch.triu_indices(discs, discs, 1)

    def wrapped(self, displacement: Tensor) -> Tensor:
        """Displacements to the nearest periodic image."""
        return displacement - self.side * torch.round(displacement.detach() / self.side)

    def force(self, x: Tensor, diameter: Tensor) -> Tensor:
        half = self.discs // 2
        diameters = torch.cat([diameter.expand(half), torch.ones(self.discs - half, dtype=DOUBLE)])
        contact = (diameters[self.first] + diameters[self.second]) / 2
        apart = self.wrapped(x[self.first] - x[self.second])
        distance = apart.square().sum(1).sqrt()
        push = (torch.relu(1 - distance / contact) / (contact * distance))[:, None] * apart
        return torch.zeros_like(x).index_add(0, self.first, push).index_add(0, self.second, -push)

    def residual(self, x: Tensor, diameter: Tensor) -> Tensor:
        """The gradient of the energy."""
        return -self.force(x, diameter)

    def fire(self, x: Tensor, diameter: Tensor, force_tolerance: float = 1e-12, max_steps: int = 5000) -> Tensor:
        """The fast inertial relaxation engine of Bitzek et al., 2006."""
        v, force = torch.zeros_like(x), self.force(x, diameter)
        dt, mixing, downhill = 0.1, 0.1, 0
        for _ in range(max_steps):
            v = v + dt / 2 * force
            x = x + dt * v
            force = self.force(x, diameter)
            v = v + dt / 2 * force
            size = force.norm()
            if float(size.detach()) < force_tolerance:
                break
            power = float((force * v).sum().detach())
            v = (1 - mixing) * v + mixing * v.norm() / size * force
            if power > 0:
                downhill += 1
                if downhill > 5:
                    dt, mixing = min(1.1 * dt, 0.4), 0.99 * mixing
            else:
                dt, mixing, downhill, v = dt / 2, 0.1, 0, torch.zeros_like(v)
        return x


@claim(
    paper=PAPER,
    says="The sensitivity of a packing of soft discs to a diameter is accurate by implicit differentiation, where that "
    "of the unrolled minimiser is not.",
    published="128 discs: unrolled FIRE does not give a gradient that settles; implicit differentiation with BiCGSTAB "
    "does (Section 4.4)",
    grid={
        "discs": scales(smoke=[32], laptop=[64], paper=[128]),
        "density": scales(smoke=[0.9], laptop=[0.9, 1.0]),
        "seed": seeds(smoke=5, laptop=6, paper=40),
        "method": ["implicit", "unrolled"],
    },
    expect=[
        always("error", of="implicit", at_most=1e-3),
        lower("error", "implicit", than="unrolled", factor=0.1, each="density"),
    ],
    plot=scatter(x="seed", y="error", by="method", log="y"),
)
def soft_discs(cell: Cell) -> Row:
    packing = SoftDiscs(cell.discs, cell.density, cell.seed)
    diameter = torch.tensor(packing.small, dtype=DOUBLE, requires_grad=True)
    # Three random directions of displacement, blind to the translation of the whole packing, which costs no energy.
    generator = torch.Generator().manual_seed(1000 + cell.seed)
    probes = torch.randn((3, cell.discs, 2), dtype=DOUBLE, generator=generator)
    probes = probes - probes.mean(1, keepdim=True)
    if cell.method == "implicit":
        # Forward mode: a disc without contacts makes A singular, but moves with nothing, and so does no harm here.
        implicit = custom_root(packing.residual, solve="bicgstab")(packing.fire)
        solution = torch.func.jvp(
            functools.partial(implicit, packing.start), (diameter.detach(),), (torch.ones_like(diameter).detach(),)
        )
        x, found = solution[0], (probes * solution[1]).sum((1, 2))
    else:
        x = packing.fire(packing.start, diameter)
        slopes = [torch.autograd.grad((probe * x).sum(), diameter, retain_graph=True)[0] for probe in probes]
        found = torch.stack(slopes)
    with torch.no_grad():
        h = 1e-6
        further, nearer = (packing.fire(x, diameter + change) for change in (h, -h))
        truth = (probes * packing.wrapped(further - nearer)).sum((1, 2)) / (2 * h)
        force = packing.force(x, diameter).norm()
    return {"error": float((found - truth).norm() / truth.norm()), "force": float(force)}


# --- cost ------------------------------------------------------------------------------------------------------------


@benchmark(
    paper=PAPER,
    says="A backward pass through a solution takes less time than torchopt's, to the same tolerance, and than "
    "unrolling.",
    published="",
    grid={
        "unknowns": scales(smoke=[10], laptop=[10, 100, 1000]),
        "contender": ["ours", "torchopt", "torchopt, conjugate gradients", "unrolled"],
    },
    expect=[
        faster("ours", than=["torchopt", "torchopt, conjugate gradients", "unrolled"], each="unknowns"),
        always("error", of="ours", at_most=1e-6),
    ],
    plot=line(x="unknowns", y="seconds", by="contender", log="xy"),
)
def backward_pass(cell: Cell) -> Row:
    import warnings

    d = cell.unknowns
    generator = torch.Generator().manual_seed(0)
    X = torch.randn((4 * d, d), dtype=DOUBLE, generator=generator)
    y = torch.randn(4 * d, dtype=DOUBLE, generator=generator)
    penalty = torch.full((), 0.1, dtype=DOUBLE, requires_grad=True)
    H, c = X.T @ X / len(y), X.T @ y / len(y)
    curvature = float(torch.linalg.matrix_norm(H, 2)) + 0.1

    def gradient(w: Tensor, penalty: Tensor) -> Tensor:
        return X.T @ (X @ w - y) / len(y) + penalty * w

    def closed_form(start: Tensor, penalty: Tensor) -> Tensor:
        w: Tensor = torch.linalg.solve(H + penalty * torch.eye(d, dtype=DOUBLE), c)
        return w

    solver: Callable[[Tensor, Tensor], Any]
    if cell.contender == "unrolled":
        solver = iterated(lambda w, penalty: w - gradient(w, penalty) / curvature, 200)
    elif cell.contender == "ours":
        solver = custom_root(gradient)(closed_form)
    else:
        solver = with_torchopt(gradient, closed_form, "conjugate" in cell.contender)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchopt still calls functorch by its old name
        w = solver(torch.zeros(d, dtype=DOUBLE), penalty)
        total, calls = w.sum(), max(1, 100 // d)
        with cell.timed(calls=calls):
            for _ in range(calls):
                (found,) = torch.autograd.grad(total, penalty, retain_graph=True)
    A = H + 0.1 * torch.eye(d, dtype=DOUBLE)
    exact = -torch.linalg.solve(A, torch.linalg.solve(A, c)).sum()
    return {"error": abs(float(found / exact) - 1)}


def with_torchopt(
    gradient: Callable[[Tensor, Tensor], Tensor], solver: Callable[[Tensor, Tensor], Tensor], conjugate: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    from workingpapers.common.validation import require

    require("torchopt", extra="peers")
    from torchopt.diff.implicit import custom_root as torchopt_root
    from torchopt.linear_solve import solve_cg, solve_normal_cg

    solve = (solve_cg if conjugate else solve_normal_cg)(rtol=linear_solve.default_tol(DOUBLE))
    decorate: Any = functools.partial(torchopt_root, gradient, argnums=1, solve=solve)
    decorated: Callable[[Tensor, Tensor], Tensor] = decorate()(solver)
    return decorated
