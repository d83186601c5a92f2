"""Claims of "On Penalty Methods for Nonconvex Bilevel Optimization and First-Order Stochastic Approximation".

The paper has no experiments: what is checked first are its theorems, on problems whose hyper-objective ψ is known in
closed form; there a "call" is, as in the paper, a gradient of σ f + g or of g. Then come hyper-parameters and data
cleaning on real tables, where the penalty competes with implicit differentiation, unrolling and random search. There a
call is a gradient of the training or of the validation loss, so that one of σ f + g counts 2; a Hessian-vector product
counts 2, and the way back through an unrolled step 2 beside the step's own. Every method gets as many calls, and its
step size on x (random search: its steps for each trial) from a grid of three, chosen by the validation loss.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from workingpapers.common.validation import require
from workingpapers.data import breast_cancer, diabetes, digits
from workingpapers.desk.claim import (
    Cell,
    Row,
    always,
    benchmark,
    claim,
    faster,
    higher,
    line,
    lower,
    scales,
    seeds,
    slope,
)
from workingpapers.optimization.bilevel_penalty import (
    Decay,
    PenaltyBilevel,
    hypergradient,
    penalty_gradient,
    penalty_value,
    projections,
)

PAPER = "bilevel-penalty"
DOUBLE = torch.float64


# --- theorems, on a quadratic lower level with many minimisers -------------------------------------------------------


class Quadratic:
    """g = ½|C y - B x|² with fewer rows than columns in C; f = ½|y - t|² + ½|x - a|² + xᵀE y.

    Gaussian data, with the singular values of C spread from 1 to 1/3, |B|₂ = 1 and |E|₂ the coupling. ψ is a quadratic
    too, convex for couplings below 1. With one, which of g's minimisers is taken decides on its gradient.
    """

    C: Tensor
    B: Tensor
    E: Tensor
    t: Tensor
    a: Tensor
    lipschitz = 1.0  # of ∇_y g
    inner_steps = 20  # which shrink the error of y and z to a tenth

    def __init__(self, columns: int, coupling: float, seed: int) -> None:
        rows, n, p = columns // 2, columns, 4
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=DOUBLE)

        U, V = (torch.linalg.qr(draw(size, rows)).Q for size in (rows, n))
        self.C = U @ torch.diag(torch.linspace(1, 1 / 3, rows, dtype=DOUBLE)) @ V.mT
        B, self.t, self.a, E = draw(rows, p), draw(n), draw(p), draw(p, n)
        self.B, self.E = B / torch.linalg.matrix_norm(B, 2), coupling * E / torch.linalg.matrix_norm(E, 2)
        self.x0, self.y0 = torch.zeros(p, dtype=DOUBLE), torch.zeros(n, dtype=DOUBLE)
        self.identity: Tensor = torch.eye(n, dtype=DOUBLE)
        self.pinv: Tensor = torch.linalg.pinv(self.C)
        self.hessian, self.right = affine(self.gradient, p)
        self.optimum = torch.linalg.solve(self.hessian, self.right)
        self.lr_x = float(1 / torch.linalg.eigvalsh(self.hessian)[-1])

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return (y - self.t).square().sum() / 2 + (x - self.a).square().sum() / 2 + x @ self.E @ y

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.C @ y - self.B @ x).square().sum() / 2

    def solution(self, x: Tensor) -> Tensor:
        """The minimiser of g that minimises f."""
        kernel = self.identity - self.pinv @ self.C
        return self.pinv @ self.B @ x + kernel @ (self.t - self.E.mT @ x)

    def penalised(self, x: Tensor, sigma: float) -> Tensor:
        """The minimiser of σ f + g."""
        right = sigma * (self.t - self.E.mT @ x) + self.C.mT @ self.B @ x
        minimiser: Tensor = torch.linalg.solve(sigma * self.identity + self.C.mT @ self.C, right)
        return minimiser

    def value(self, x: Tensor) -> float:
        return float(self.f(x, self.solution(x)))

    def gradient(self, x: Tensor) -> Tensor:
        """∇ψ, by automatic differentiation of the closed form."""
        derivative: Tensor = torch.func.grad(lambda x: self.f(x, self.solution(x)))(x)
        return derivative

    def penalised_gradient(self, x: Tensor, sigma: float) -> Tensor:
        """∇ψ_σ, at the exact minimisers."""
        y, z = self.penalised(x, sigma), self.pinv @ self.B @ x
        return x - self.a + self.E @ y - self.B.mT @ (self.C @ y - self.C @ z) / sigma

    def penalised_optimum(self, sigma: float) -> Tensor:
        hessian, right = affine(lambda x: self.penalised_gradient(x, sigma), len(self.x0))
        optimum: Tensor = torch.linalg.solve(hessian, right)
        return optimum

    def sigma_with_bias(self, error: float) -> float:
        """The σ at whose optimum ‖∇ψ‖ is about `error`; the two are proportional."""
        small = 1e-5
        return small * error / float(self.gradient(self.penalised_optimum(small)).norm())


def affine(slope: Callable[[Tensor], Tensor], p: int) -> tuple[Tensor, Tensor]:
    """H and r of an affine map x -> H x - r."""
    constant = slope(torch.zeros(p, dtype=DOUBLE))
    return torch.stack([slope(unit) - constant for unit in torch.eye(p, dtype=DOUBLE)], 1), -constant


@claim(
    paper=PAPER,
    says="On a lower level with many minimisers the penalty's value and gradient are O(σ)-close to those of the "
    "hyper-objective, and the pseudo-inverse formula is its gradient.",
    published="|ψ_σ - ψ| = O(σ/μ), |∇ψ_σ - ∇ψ| = O(σ/μ³), and the formula, as theorems",
    grid={
        "columns": scales(smoke=[6], laptop=[6, 40], paper=[6, 40, 400]),
        "sigma": [1e-2, 1e-3, 1e-4, 1e-5],
        "seed": seeds(smoke=5, laptop=10),
    },
    expect=[
        slope("value_error", over="sigma", at_least=0.9, at_most=1.1, each="columns"),
        slope("gradient_error", over="sigma", at_least=0.9, at_most=1.1, each="columns"),
        always("formula_error", at_most=1e-6),
    ],
    plot=line(x="sigma", y="gradient_error", by="columns", log="xy"),
)
def within_order_sigma(cell: Cell) -> Row:
    problem = Quadratic(cell.columns, coupling=0.5, seed=cell.seed)
    x = torch.randn(4, generator=torch.Generator().manual_seed(cell.seed), dtype=DOUBLE)
    y, z = problem.penalised(x, cell.sigma), problem.pinv @ problem.B @ x
    h = 1e-5
    differences = [
        (problem.value(x + h * unit) - problem.value(x - h * unit)) / (2 * h) for unit in torch.eye(4).double()
    ]
    exact = torch.tensor(differences, dtype=DOUBLE)
    formula = hypergradient(problem.f, problem.g, x, problem.solution(x))
    return {
        "value_error": abs(float(penalty_value(problem.f, problem.g, x, y, z, cell.sigma)) - problem.value(x)),
        "gradient_error": float((penalty_gradient(problem.f, problem.g, x, y, z, cell.sigma) - formula).norm()),
        "formula_error": float((formula - exact).norm() / exact.norm()),
    }


@claim(
    paper=PAPER,
    says="The double loop ends at the minimiser of ψ_σ, whose distance from that of ψ is proportional to σ.",
    published="follows from the two theorems; no numbers",
    grid={
        "columns": [6],
        "sigma": scales(smoke=[3e-2, 1e-2], laptop=[3e-2, 1e-2, 3e-3, 1e-3]),
        "seed": seeds(smoke=5, laptop=10),
    },
    expect=[
        always("reached"),
        slope("distance", over="sigma", at_least=0.85, at_most=1.15),
    ],
    plot=line(x="sigma", y="distance", log="xy"),
)
def distance_to_the_optimum(cell: Cell) -> Row:
    problem = Quadratic(cell.columns, coupling=0.0, seed=cell.seed)
    target = problem.penalised_optimum(cell.sigma)
    bias = float((target - problem.optimum).norm())
    solver = PenaltyBilevel(
        problem.f,
        problem.g,
        sigma=cell.sigma,
        lr_x=problem.lr_x,
        lr_y=1 / (problem.lipschitz + cell.sigma),
        inner_steps=problem.inner_steps,
        beta=1.0,
        callback=lambda iteration, x, fun: float((x - target).norm()) < 0.05 * bias,
    )
    found = solver.run(problem.x0, problem.y0, iters=2000)
    return {
        "reached": found.n_iterations < 2000,
        "distance": float((found.x - problem.optimum).norm() / problem.optimum.norm()),
        "gradient_calls": found.gradient_calls,
    }


@claim(
    paper=PAPER,
    says="With exact gradients and σ proportional to ε, the calls to |∇ψ| <= ε grow no faster than ε^-3.",
    published="O(ε^-3) gradient calls in the deterministic case, an upper bound (arXiv abstract)",
    grid={
        "columns": [6],
        "epsilon": scales(smoke=[1.0, 0.5], laptop=[0.3, 0.1, 0.03, 0.01, 0.003]),
        "seed": seeds(smoke=5, laptop=10),
        "method": ["double loop", "single loop"],
    },
    expect=[
        always("reached"),
        slope("gradient_calls", over="epsilon", of="double loop", at_least=-3),
        slope("gradient_calls", over="epsilon", of="single loop", at_least=-3),
    ],
    plot=line(x="epsilon", y="gradient_calls", by="method", log="xy"),
)
def calls_to_epsilon(cell: Cell) -> Row:
    problem = Quadratic(cell.columns, coupling=0.0, seed=cell.seed)
    single = cell.method == "single loop"
    options: dict[str, Any] = (
        {"momentum": "storm", "schedule": Decay(0.0, 0.0, 0.0)}
        if single
        else {"beta": 1.0, "inner_steps": problem.inner_steps}
    )
    # Moving all three at once is stable only while x is slow beside y: a fifth of the double loop's step
    lr_x = problem.lr_x / 5 if single else problem.lr_x
    return first_below(problem, cell.epsilon, max_iter=30_000 if single else 3_000, lr_x=lr_x, **options)


@claim(
    paper=PAPER,
    says="With noisy gradients the calls to |∇ψ| <= ε grow no faster than ε^-7 in the double and ε^-5 in the single "
    "loop.",
    published="O(ε^-7) with two loops, O(ε^-5) with one and mean-squared-smooth samples: upper bounds",
    grid={
        "columns": [6],
        "epsilon": scales(smoke=[2.0, 1.0], laptop=[1.0, 0.5, 0.25]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": ["double loop", "single loop"],
    },
    expect=[
        always("reached"),
        slope("gradient_calls", over="epsilon", of="double loop", at_least=-7),
        slope("gradient_calls", over="epsilon", of="single loop", at_least=-5),
    ],
    plot=line(x="epsilon", y="gradient_calls", by="method", log="xy"),
)
def noisy_calls_to_epsilon(cell: Cell) -> Row:
    problem = Quadratic(cell.columns, coupling=0.0, seed=cell.seed)
    noise = 0.1
    exact_f, exact_g = problem.f, problem.g

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return tuple(noise * torch.randn(cell.columns, generator=generator, dtype=DOUBLE) for _ in range(2))  # type: ignore[return-value]

    single = cell.method == "single loop"
    options: dict[str, Any] = (
        {"momentum": "storm", "schedule": Decay(sigma=0.0)}
        if single
        else {"beta": 1.0, "inner_steps": problem.inner_steps}
    )
    return first_below(
        problem,
        cell.epsilon,
        max_iter=10_000 if single else 2_000,
        f=lambda x, y, xi: exact_f(x, y) + xi[0] @ y,
        g=lambda x, y, xi: exact_g(x, y) + xi[1] @ y,
        lr_x=problem.lr_x,
        sample=sample,
        generator=torch.Generator().manual_seed(cell.seed),
        **options,
    )


def first_below(problem: Quadratic, epsilon: float, max_iter: int, f: Any = None, g: Any = None, **options: Any) -> Row:
    """Gradient calls until ‖∇ψ(x)‖ <= ε, at the σ whose bias takes half of it."""
    sigma = min(problem.sigma_with_bias(epsilon / 2), 1.0)
    solver = PenaltyBilevel(
        f or problem.f,
        g or problem.g,
        sigma=sigma,
        lr_y=1 / (problem.lipschitz + sigma),
        callback=lambda iteration, x, fun: float(problem.gradient(x).norm()) <= epsilon,
        **options,
    )
    found = solver.run(problem.x0, problem.y0, iters=max_iter)
    reached = float(problem.gradient(found.x).norm()) <= epsilon
    return {"reached": reached, "gradient_calls": found.gradient_calls, "sigma": sigma}


@claim(
    paper=PAPER,
    says="Without the error bound, where the lower level's minimiser jumps, ∇ψ_σ does not converge but grows like "
    "1/σ; beside the jump it converges.",
    published="counter-examples (Examples 1 and 2) to convergence without the error bound",
    grid={
        "sigma": scales(smoke=[1e-2, 1e-3], laptop=[1e-2, 1e-3, 1e-4]),
        "seed": seeds(smoke=5, laptop=10),
    },
    expect=[
        slope("gradient_at_the_jump", over="sigma", at_least=-1.02, at_most=-0.98),
        always("error_beside_it", at_most=0.05),
    ],
    plot=line(x="sigma", y="gradient_at_the_jump", log="xy"),
)
def without_the_error_bound(cell: Cell) -> Row:
    # g = (y² - 1)² + s x y: its minimiser jumps from 1 to -1 as x crosses 0; f = (y - c)² prefers the one at 1
    rng = np.random.default_rng(cell.seed)
    s, c = rng.uniform(0.5, 2.0), rng.uniform(0.3, 0.7)

    def f(x: Tensor, y: Tensor) -> Tensor:
        return (y - c).square()

    def g(x: Tensor, y: Tensor) -> Tensor:
        return (y.square() - 1).square() + s * x * y

    def gradient(x: float, sigma: float, tie: float = 0.0) -> float:
        at = torch.tensor(x, dtype=DOUBLE)
        y = global_minimiser(lambda y: sigma * f(at, y) + g(at, y))
        z = global_minimiser(lambda z: g(at, z) + tie * z)
        return float(penalty_gradient(f, g, at, y, z, sigma))

    beside = 0.05 / s
    errors = []
    for x in (-beside, beside):
        at = torch.tensor(x, dtype=DOUBLE)
        exact = float(hypergradient(f, g, at, global_minimiser(functools.partial(g, at))))
        errors.append(abs(gradient(x, cell.sigma) - exact) / s)
    # At the jump itself both wells are as deep; the tie is given to the other one than f's.
    return {"gradient_at_the_jump": gradient(0.0, cell.sigma, tie=1e-12) / s, "error_beside_it": max(errors)}


def global_minimiser(objective: Callable[[Tensor], Tensor]) -> Tensor:
    """The minimum of a function of one variable on [-2, 2]: the best of a grid, made exact by Newton's method."""
    grid = torch.linspace(-2, 2, 4001, dtype=DOUBLE)
    y = grid[objective(grid).argmin()]
    slope_of = torch.func.grad(objective)
    for _ in range(8):
        y = y - slope_of(y) / torch.func.grad(slope_of)(y)
    return y


@claim(
    paper=PAPER,
    says="Where the lower level has many minimisers and f decides between them, the penalty finds the optimum; "
    "implicit and unrolled differentiation, which follow the solver's own minimiser, do not.",
    published="the hyper-gradient with several lower-level solutions is that of the one which minimises f",
    grid={
        "columns": scales(smoke=[6], laptop=[6, 20]),
        "seed": seeds(smoke=5, laptop=10),
        "method": ["penalty", "implicit", "unrolled"],
        "calls": scales(smoke=[600], laptop=[3_000]),
    },
    expect=[lower("excess", "penalty", than=["implicit", "unrolled"], factor=0.5, each="columns")],
    plot=line(x="columns", y="excess", by="method", log="y"),
)
def many_minimisers(cell: Cell) -> Row:
    problem = Quadratic(cell.columns, coupling=0.9, seed=cell.seed)
    lr_y = 1 / (problem.lipschitz + 1)
    bilevel = Bilevel(problem.f, problem.g, problem.x0, problem.y0, lr_y, lr_x=problem.lr_x, sigma=0.03)
    least = problem.value(problem.optimum)
    ends = [problem.value(descend(cell.method, bilevel, share, cell.calls)[-1].x) for share in (0.3, 1.0)]
    return {"excess": max(min(ends) - least, 1e-12) / (problem.value(problem.x0) - least)}


# --- hyper-parameters and data cleaning on real tables ---------------------------------------------------------------

INNER_STEPS = 10  # on the lower level between two steps on x, of the penalty method and of implicit differentiation
UNROLLED_STEPS = 20
CG_STEPS = 10
RANDOM_STEPS = 100  # on the lower level for each random choice of x, times the factor that is tuned


@dataclass(frozen=True)
class Bilevel:
    """A bilevel problem, and the scale of its step sizes.

    Attributes
    ----------
    f, g : upper and lower objective.
    x0, y0 : where every method starts.
    lr_y : step size of the lower level, for all methods.
    lr_x : step size on x, which the methods multiply by factors of a grid.
    sigma : of the penalty method.
    bounds : of x's box, if there is one; random search draws from it.
    """

    f: Callable[[Tensor, Tensor], Tensor]
    g: Callable[[Tensor, Tensor], Tensor]
    x0: Tensor
    y0: Tensor
    lr_y: float
    lr_x: float
    sigma: float
    bounds: tuple[float, float] | None = None

    def projected(self, x: Tensor) -> Tensor:
        return x if self.bounds is None else projections.box(x, self.bounds)


@dataclass(frozen=True, eq=False)
class Point:
    """An x, and the calls and the time it took."""

    calls: int
    x: Tensor
    seconds: float = 0.0


def descend(method: str, problem: Bilevel, factor: float, calls: int, seed: int = 0) -> list[Point]:
    """The path of a method's x, as far as the calls go."""
    steps: dict[str, Callable[..., Iterator[Point]]] = {
        "penalty": penalty_path,
        "implicit": implicit_path,
        "unrolled": unrolled_path,
        "random search": random_path,
    }
    path, began = [], time.perf_counter()
    for point in steps[method](problem, factor, seed):
        path.append(replace(point, seconds=time.perf_counter() - began))
        if point.calls >= calls:
            return path
    raise AssertionError("the paths do not end")


def penalty_path(problem: Bilevel, factor: float, seed: int) -> Iterator[Point]:
    solver = PenaltyBilevel(
        problem.f,
        problem.g,
        sigma=problem.sigma,
        lr_x=factor * problem.lr_x,
        lr_y=problem.lr_y,
        inner_steps=INNER_STEPS,
        beta=1.0,
        proj_x=problem.projected,
    )
    solver.start(problem.x0, problem.y0)
    while True:
        row = solver.step()
        yield Point(3 * int(row["gradient_calls"]) // 2, solver.x)  # of f and g: 3 where σ f + g and g are 2


def implicit_path(problem: Bilevel, factor: float, seed: int) -> Iterator[Point]:
    """∇ψ = ∇_x f - ∇²_xy g u, with ∇²_yy g u = ∇_y f solved by a few warm-started conjugate gradients."""
    x, y = problem.x0, problem.y0
    solution, calls = torch.zeros_like(y), 0
    while True:
        for _ in range(INNER_STEPS):
            y = y - problem.lr_y * gradient_of(functools.partial(problem.g, x), y)
        at_x, at_y = x.detach().requires_grad_(), y.detach().requires_grad_()
        direct, target = torch.autograd.grad(problem.f(at_x, at_y) + 0 * at_x.sum() + 0 * at_y.sum(), (at_x, at_y))
        (inner,) = torch.autograd.grad(problem.g(at_x, at_y), at_y, create_graph=True)

        def product(v: Tensor, inner: Tensor = inner, at_y: Tensor = at_y) -> Tensor:
            return torch.autograd.grad(inner, at_y, v, retain_graph=True)[0]

        solution = conjugate_gradients(product, target, solution, CG_STEPS)
        (through,) = torch.autograd.grad(inner, at_x, solution)
        calls += INNER_STEPS + 2 + 2 * (CG_STEPS + 1) + 2  # one product is for the residual of the warm start
        x = problem.projected(x - factor * problem.lr_x * (direct - through)).detach()
        yield Point(calls, x)


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, u: Tensor, steps: int) -> Tensor:
    residual = b - product(u)
    direction, size, largest = residual, float(residual.square().sum()), 0.0
    for _ in range(steps):
        if not size > 1e-24 * float(b.square().sum()):
            break
        image = product(direction)
        curvature = float((direction * image).sum()) / float(direction.square().sum())
        largest = max(largest, curvature)
        if curvature <= 1e-8 * largest:  # the kernel of a singular Hessian: nothing to gain there
            break
        step = size / (curvature * float(direction.square().sum()))
        u, residual = u + step * direction, residual - step * image
        size, before = float(residual.square().sum()), size
        direction = residual + size / before * direction
    return u


def unrolled_path(problem: Bilevel, factor: float, seed: int) -> Iterator[Point]:
    """The derivative of f after 20 steps on the lower level, begun where the last ones ended."""
    x, y, calls = problem.x0, problem.y0, 0
    while True:
        at_x, w = x.detach().requires_grad_(), y.detach().requires_grad_()
        for _ in range(UNROLLED_STEPS):
            (inner,) = torch.autograd.grad(problem.g(at_x, w), w, create_graph=True)
            w = w - problem.lr_y * inner
        (direction,) = torch.autograd.grad(problem.f(at_x, w), at_x)
        calls += 3 * UNROLLED_STEPS + 1
        x, y = problem.projected(x - factor * problem.lr_x * direction).detach(), w.detach()
        yield Point(calls, x)


def random_path(problem: Bilevel, factor: float, seed: int) -> Iterator[Point]:
    """The best of random points of the box, each judged after a fixed number of steps on the lower level."""
    assert problem.bounds is not None
    generator = torch.Generator().manual_seed(seed)
    low, high = problem.bounds
    steps = round(factor * RANDOM_STEPS)
    best, best_value, calls, y = problem.x0, math.inf, 0, problem.y0
    while True:
        x = low + (high - low) * torch.rand(problem.x0.shape, generator=generator, dtype=problem.x0.dtype)
        for _ in range(steps):
            y = y - problem.lr_y * gradient_of(functools.partial(problem.g, x), y)
        calls += steps + 1
        value = float(problem.f(x, y))
        if value < best_value:
            best, best_value = x, value
        yield Point(calls, best)


def gradient_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    with torch.enable_grad():  # also inside of torchopt's decorated solver
        return torch.autograd.grad(function(at), at)[0]


def solved(g: Callable[[Tensor], Tensor], y0: Tensor, max_iter: int = 300) -> Tensor:
    """A minimiser of g, for judging an x: not counted among its method's calls."""
    y = y0.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [y], max_iter=max_iter, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = g(y)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return y.detach()


FACTORS = (0.2, 1.0, 5.0)  # the grid that every method is tuned on


def tuned(cell: Cell, problem: Bilevel, judge: Callable[[Tensor], Row]) -> list[Row]:
    """The path with the least validation loss at its end, of those of the grid: what `judge` says along it."""
    paths = [(factor, descend(cell.method, problem, factor, cell.calls, cell.seed)) for factor in FACTORS]
    factor, path = min(paths, key=lambda found: float(judge(found[1][-1].x)["validation_loss"]))
    early = [next(point for point in path if point.calls >= share * cell.calls) for share in (0.05, 0.15, 0.4)]
    return [
        {"calls_made": point.calls, "seconds_spent": point.seconds, "factor": factor, **judge(point.x)}
        for point in dict.fromkeys((*early, path[-1]))
    ]


def penalties(name: str, seed: int) -> tuple[Bilevel, Callable[[Tensor], Row]]:
    """One ridge penalty for each feature: a regression (diabetes), a logistic and a softmax classification.

    Half of the rows train, a quarter validates, a quarter tests. Columns are standardised by the training rows.
    """
    data = {"diabetes": diabetes, "breast cancer": breast_cancer, "digits": digits}[name]()
    columns = np.asarray(data["images" if name == "digits" else "columns"], dtype=float)
    target = np.asarray(data["response" if name == "diabetes" else "labels"], dtype=float)
    order = np.random.default_rng(seed).permutation(len(target))[:800]
    cuts = len(order) // 2, 3 * len(order) // 4
    train, validation, test = np.split(order, cuts)
    mean, deviation = columns[train].mean(0), columns[train].std(0)
    columns = (columns - mean) / np.where(deviation > 0, deviation, 1.0)
    if name == "diabetes":
        target = (target - target[train].mean()) / target[train].std()
    X = torch.tensor(columns)
    classes = 10 if name == "digits" else 1
    t = torch.tensor(target).long() if name == "digits" else torch.tensor(target)

    def loss(rows: np.ndarray, y: Tensor) -> Tensor:
        scores = X[rows] @ y
        if name == "digits":
            return functional.cross_entropy(scores, t[rows])
        if name == "diabetes":
            return (scores[:, 0] - t[rows]).square().mean() / 2
        return functional.binary_cross_entropy_with_logits(scores[:, 0], t[rows])

    def g(x: Tensor, y: Tensor) -> Tensor:
        return loss(train, y) + (x.exp()[:, None] * y.square()).sum() / 2

    bounds = (-7.0, 1.0)
    curvature = float(torch.linalg.matrix_norm(X[train], 2)) ** 2 / len(train)
    curvature *= {"diabetes": 1.0, "breast cancer": 0.25, "digits": 0.5}[name]
    y0 = torch.zeros(X.shape[1], classes, dtype=DOUBLE)
    x0 = torch.full((X.shape[1],), -4.0, dtype=DOUBLE)
    problem = Bilevel(
        lambda x, y: loss(validation, y), g, x0, y0, 1 / (1.1 * curvature + math.exp(bounds[1])), 1000.0, 1e-2, bounds
    )

    def judge(x: Tensor) -> Row:
        y = solved(lambda y: g(x, y), y0)
        return {"validation_loss": float(loss(validation, y)), "test_loss": float(loss(test, y))}

    return problem, judge


@claim(
    paper=PAPER,
    says="With as many calls, the penalty chooses ridge penalties, one for each feature, as well as implicit and "
    "unrolled differentiation, and better than random search.",
    published="not in the paper: what its method is for",
    grid={
        "data": scales(smoke=["diabetes"], laptop=["diabetes", "breast cancer", "digits"]),
        "calls": scales(smoke=[150], laptop=[1_000], paper=[10_000]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": scales(
            smoke=["penalty", "random search"], laptop=["penalty", "implicit", "unrolled", "random search"]
        ),
    },
    expect=[
        lower("validation_loss", "penalty", than="random search", each="data", where={"calls_made": "last"}),
        lower("validation_loss", "penalty", than=["implicit", "unrolled"], factor=1.05, where={"calls_made": "last"}),
        lower("test_loss", "penalty", than="random search", each="data", where={"calls_made": "last"}),
    ],
    plot=line(x="calls_made", y="validation_loss", by="method", log="x", each="data"),
)
def ridge_penalties(cell: Cell) -> list[Row]:
    problem, judge = penalties(cell.data, cell.seed)
    return tuned(cell, problem, judge)


class Cleaning:
    """Digits of which some training labels are wrong: x are logits of their weights, y a softmax regression.

    600 rows train, 400 validate with true labels, the others test. With two copies every weight of the regression is a
    sum of two entries of y, of which the loss and its ridge see only the sum: the lower level has many minimisers and
    a singular Hessian. (Without a ridge it would have none: the regression fits wrong labels too, whatever their
    weights.)
    """

    ridge = 1e-3

    def __init__(self, flipped: float, seed: int, *, copies: int = 1, random_features: int = 0) -> None:
        data = digits()
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(data["labels"]))
        images, labels = torch.tensor(data["images"]), torch.tensor(data["labels"])
        self.train, self.validation, self.test = np.split(order, (600, 1000))
        images = images - images[self.train].mean(0)
        if random_features:
            weights = torch.tensor(rng.standard_normal((64, random_features)) / 4)
            images = torch.relu(images @ weights) / math.sqrt(random_features / 32)
        self.X = torch.cat([images, torch.ones(len(images), 1)], 1)
        self.labels, self.given = labels, labels.clone()
        wrong = torch.tensor(self.train[rng.random(600) < flipped])
        self.given[wrong] = (self.given[wrong] + torch.tensor(rng.integers(1, 10, len(wrong)))) % 10
        self.clean = self.given[self.train] == self.labels[self.train]
        self.y0 = torch.zeros(copies, self.X.shape[1], 10, dtype=DOUBLE)
        self.x0 = torch.zeros(600, dtype=DOUBLE)
        self.X_train, self.X_validation = self.X[self.train], self.X[self.validation]
        self.given_train, self.labels_validation = self.given[self.train], self.labels[self.validation]

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(self.X_validation @ y.sum(0), self.labels_validation)

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        losses = functional.cross_entropy(self.X_train @ y.sum(0), self.given_train, reduction="none")
        return torch.sigmoid(x) @ losses / len(x) + self.ridge / 2 * y.sum(0).square().sum()

    def bilevel(self, sigma: float = 0.1) -> Bilevel:
        curvature = float(torch.linalg.matrix_norm(self.X_train, 2)) ** 2 / (2 * len(self.train)) + self.ridge
        curvature *= len(self.y0)
        return Bilevel(self.f, self.g, self.x0, self.y0, 1 / ((1 + sigma) * curvature), 1e4, sigma, (-10, 10))

    def judge(self, x: Tensor) -> Row:
        """The regression trained anew with these weights."""
        y = solved(lambda y: self.g(x, y), self.y0)
        right = (self.X[self.test] @ y.sum(0)).argmax(1) == self.labels[self.test]
        weights = torch.sigmoid(x)
        return {
            "validation_loss": float(self.f(x, y)),
            "test_accuracy": float(right.double().mean()),
            "weight_clean": float(weights[self.clean].mean()),
            "weight_flipped": float(weights[~self.clean].mean()),
        }


@claim(
    paper=PAPER,
    says="Weights learned by the penalty tell wrong training labels from right ones: the test accuracy is far above "
    "that of equal weights, at least that of implicit and unrolled differentiation with as many calls, and near that "
    "of the clean rows alone; also where the lower level's Hessian is singular.",
    published="not in the paper: a standard task of bilevel optimisation",
    grid={
        "flipped": [0.3],
        "copies": scales(smoke=[1], laptop=[1, 2]),
        "calls": scales(smoke=[150], laptop=[2_000], paper=[20_000]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": scales(
            smoke=["penalty", "equal weights"],
            laptop=["penalty", "implicit", "unrolled", "equal weights", "clean rows"],
        ),
    },
    expect=[
        higher(
            "test_accuracy", "penalty", than="equal weights", margin=0.02, each="copies", where={"calls_made": "last"}
        ),
        higher(
            "test_accuracy",
            "penalty",
            than=["implicit", "unrolled"],
            margin=-0.01,
            each="copies",
            where={"calls_made": "last"},
        ),
        higher(
            "test_accuracy", "penalty", than="clean rows", margin=-0.02, each="copies", where={"calls_made": "last"}
        ),
    ],
    plot=line(x="calls_made", y="validation_loss", by="method", log="x", each="copies"),
)
def data_cleaning(cell: Cell) -> list[Row]:
    task = Cleaning(cell.flipped, cell.seed, copies=cell.copies)
    if cell.method == "equal weights":
        return [{"calls_made": 0, "seconds_spent": 0.0, "factor": 0.0, **task.judge(task.x0)}]
    if cell.method == "clean rows":
        return [
            {
                "calls_made": 0,
                "seconds_spent": 0.0,
                "factor": 0.0,
                **task.judge(torch.where(task.clean, 20.0, -20.0).double()),
            }
        ]
    return tuned(cell, task.bilevel(), task.judge)


@benchmark(
    paper=PAPER,
    says="Cleaning labels down to the same validation loss takes less time than by torchopt's implicit and unrolled "
    "differentiation, as the lower level grows.",
    grid={
        "features": scales(smoke=[64], laptop=[64, 512], paper=[64, 512, 2048, 8192]),
        "contender": ["ours", "torchopt implicit", "torchopt unrolled"],
    },
    expect=[faster("ours", than=["torchopt implicit", "torchopt unrolled"], each="features")],
    plot=line(x="features", y="seconds", by="contender", log="xy"),
    rounds={"smoke": 2, "laptop": 5, "paper": 7},
)
def to_the_same_validation_loss(cell: Cell) -> Row:
    task, target = cleaning_goal(cell.features)
    run = {"ours": ours, "torchopt implicit": torchopt_implicit, "torchopt unrolled": torchopt_unrolled}[cell.contender]
    reached, steps = math.inf, 0
    problem = task.bilevel()
    with cell.timed():
        # of 0.2, 1, 5 and 25 times this step size, every contender is fastest with 1
        for reached in run(problem, problem.lr_x):
            steps += 1
            if reached <= target or steps == 500:
                break
    return {"validation_loss": reached, "reached": reached <= target, "steps": steps}


@functools.lru_cache
def cleaning_goal(features: int) -> tuple[Cleaning, float]:
    """The task on random features (64: the pixels), and the loss after four fifths of the way to clean rows."""
    task = Cleaning(0.3, seed=0, random_features=0 if features == 64 else features)
    ends = (task.x0, torch.where(task.clean, 20.0, -20.0).double())
    equal, clean = (float(task.judge(x)["validation_loss"]) for x in ends)
    return task, clean + 0.2 * (equal - clean)


def ours(problem: Bilevel, lr_x: float) -> Iterator[float]:
    solver = PenaltyBilevel(
        problem.f,
        problem.g,
        sigma=problem.sigma,
        lr_x=lr_x,
        lr_y=problem.lr_y,
        inner_steps=INNER_STEPS,
        beta=1.0,
        proj_x=problem.projected,
    )
    solver.start(problem.x0, problem.y0)
    while True:
        yield solver.step()["upper"]


def torchopt_implicit(problem: Bilevel, lr_x: float) -> Iterator[float]:
    torchopt = require("torchopt", extra="peers")
    slope = torch.func.grad(problem.g, argnums=1)

    @torchopt.diff.implicit.custom_root(  # type: ignore[untyped-decorator]
        lambda y, x: slope(x, y), argnums=1, solve=torchopt.linear_solve.solve_cg(maxiter=CG_STEPS)
    )
    def lower(y: Tensor, x: Tensor) -> Tensor:
        x = x.detach()
        for _ in range(INNER_STEPS):
            y = y - problem.lr_y * gradient_of(functools.partial(problem.g, x), y)
        return y

    x, y = problem.x0, problem.y0
    while True:
        at = x.detach().requires_grad_()
        y = lower(y.detach(), at)
        value = problem.f(at, y)
        yield float(value.detach())
        (direction,) = torch.autograd.grad(value, at)
        x = problem.projected(at.detach() - lr_x * direction)


def torchopt_unrolled(problem: Bilevel, lr_x: float) -> Iterator[float]:
    torchopt = require("torchopt", extra="peers")
    x, y = problem.x0, problem.y0
    while True:
        at = x.detach().requires_grad_()
        optimiser = torchopt.FuncOptimizer(torchopt.sgd(problem.lr_y))
        w = (y.detach().requires_grad_(),)
        for _ in range(UNROLLED_STEPS):
            w = optimiser.step(problem.g(at, w[0]), w)
        y = w[0]
        value = problem.f(at, y)
        yield float(value.detach())
        (direction,) = torch.autograd.grad(value, at)
        x = problem.projected(at.detach() - lr_x * direction)
