"""Claims of "Variance Reduced Halpern Iteration for Finite-Sum Monotone Inclusions".

Cost is counted in component evaluations, n of them one pass; those of the residual checks are left out for every
method. All methods are measured by the same natural residual R(u) with the true F, at the last iterate.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from workingpapers.data import breast_cancer, digits
from workingpapers.desk.claim import (
    Cell,
    Row,
    always,
    benchmark,
    claim,
    faster,
    line,
    lower,
    scales,
    seeds,
    slope,
)
from workingpapers.optimization.halpern import (
    BoxProx,
    FiniteSumOperator,
    MatrixGame,
    MonotoneInclusionResult,
    affine_operator,
    extra_anchored_gradient,
    extragradient,
    halpern,
    least_squares_operator,
    matrix_game,
    vr_extragradient,
    vr_halpern,
    vr_halpern_monotone,
)

PAPER = "halpern"
COMPLEXITY = "O~(n + sqrt(n) L / eps) component evaluations to residual eps, up to sqrt(n) fewer than O(n L / eps)"
FIGURES = "figures only: residual against epochs on matrix games and one further task"

# --- problems ------------------------------------------------------------------------------------------------------


def synthetic_regression(rows: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Design with column j divided by j, and a noisy response whose coefficients leave the box [-1, 1]."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((rows, columns)) / np.arange(1, columns + 1)
    coefficients = rng.standard_normal(columns)
    return A, A @ coefficients + 0.1 * rng.standard_normal(rows)


def regression(problem: str, seed: int) -> FiniteSumOperator:
    """Least squares in a box: "n=2000" and the like, or "digits": one digit, chosen by the seed, against the others."""
    if problem == "digits":
        data = digits()
        images, label = data["images"], np.where(data["labels"] == seed % 10, 1.0, -1.0)
        return least_squares_operator(images - images.mean(axis=0), label - label.mean(), prox=BoxProx(-0.5, 0.5))
    rows = int(problem.removeprefix("n="))
    A, b = synthetic_regression(rows, 20 if rows < 20_000 else 40, seed)
    return least_squares_operator(A, b, prox=BoxProx(-1.0, 1.0))


def game(family: str, size: int, seed: int) -> MatrixGame:
    """Policeman and burglar, A_ij = w_j (1 - exp(-0.8 |i - j|)) with w = |normal|; or entries uniform on (-1, 1)."""
    rng = np.random.default_rng(seed)
    if family == "uniform":
        return matrix_game(rng.uniform(-1.0, 1.0, (size, size)))
    wealth, house = np.abs(rng.standard_normal(size)), np.arange(size)
    return matrix_game(wealth * (1.0 - np.exp(-0.8 * np.abs(house[:, None] - house))))


def area_under_the_curve(seed: int) -> FiniteSumOperator:
    """AUC maximisation with square loss as a saddle point (Ying, Wen and Lyu, 2016), on 80 % of the breast tumours.

    min over (w, a, b), max over alpha, all in [-1, 1], of the mean over the tumours x with label y and share p of
    y = 1 of (1-p) (w.x - a)^2 - 2 (1+alpha) (1-p) w.x where y = 1, p (w.x - b)^2 + 2 (1+alpha) p w.x elsewhere, minus
    p (1-p) alpha^2. Components are drawn in proportion to the norms of their matrices.
    """
    data = breast_cancer()
    kept = np.random.default_rng(seed).permutation(len(data["labels"]))[: int(0.8 * len(data["labels"]))]
    X, positive = data["columns"][kept], data["labels"][kept] == 1
    X = (X - X.mean(axis=0)) / X.std(axis=0)
    n, d = X.shape
    share = positive.mean()
    weight = 2.0 * np.where(positive, 1.0 - share, share)
    sign = np.where(positive, -1.0, 1.0)
    M, c = np.zeros((n, d + 3, d + 3)), np.zeros((n, d + 3))
    scaled = weight[:, None] * X
    M[:, :d, :d] = scaled[:, :, None] * X[:, None, :]
    own = np.where(positive, d, d + 1)  # a belongs to the positive components, b to the negative ones
    every = np.arange(n)
    M[every, :d, own] = M[every, own, :d] = -scaled
    M[every, own, own] = weight
    M[:, :d, d + 2] = sign[:, None] * scaled
    M[:, d + 2, :d] = -sign[:, None] * scaled
    M[:, d + 2, d + 2] = 2.0 * share * (1.0 - share)
    c[:, :d] = sign[:, None] * scaled
    norms = np.linalg.norm(M, axis=(1, 2))
    return affine_operator(M, c, probs=norms / norms.sum(), prox=BoxProx(-1.0, 1.0))


# --- methods -------------------------------------------------------------------------------------------------------

Solver = Callable[..., MonotoneInclusionResult]

# Five settings each, the first close to the theory. Of the others the steps are multiples of it by 2, 4, 8 and 16; of
# Algorithm 2 they relax the two constants of its inner solver, (inner_factor, inner_step_scale).
MULTIPLES = (1.0, 2.0, 4.0, 8.0, 16.0)
VR_HALPERN = ((10.0, 0.5), (3.0, 1.0), (1.0, 2.0), (1.0, 4.0), (0.3, 4.0))


def settings(method: str, operator: FiniteSumOperator, seed: int) -> list[Solver]:
    """The competing method with each of its five settings."""
    assert operator.L_F is not None
    assert operator.lipschitz is not None
    if method == "VR Halpern":
        return [
            functools.partial(vr_halpern_monotone, inner_factor=c, inner_step_scale=gamma, random_state=seed)
            for c, gamma in VR_HALPERN
        ]
    if method == "VR extragradient":
        return [functools.partial(vr_extragradient, step_scale=0.99 * m, random_state=seed) for m in MULTIPLES]
    if method == "EAG":
        return [functools.partial(extra_anchored_gradient, step=m / (8.0 * operator.L_F)) for m in MULTIPLES]
    return [functools.partial(extragradient, step=0.9 * m / operator.L_F) for m in MULTIPLES]


def run(solver: Solver, operator: FiniteSumOperator, **options: Any) -> MonotoneInclusionResult:
    """Run a solver from the centre of its domain, without the warning that its tolerance was not reached."""
    start = operator.uniform_start() if isinstance(operator, MatrixGame) else np.zeros(operator.dimension or 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return solver(operator, start, **options)


def curve(solver: Solver, operator: FiniteSumOperator, checkpoints: list[int]) -> list[float]:
    """The residual after each number of passes; infinite once the method has diverged."""
    try:
        history = run(solver, operator, tol=0.0, max_passes=checkpoints[-1]).history
    except FloatingPointError:
        return [math.inf] * len(checkpoints)
    last = np.searchsorted(history.oracle_calls, np.array(checkpoints) * operator.n, side="right") - 1
    last[-1] = len(history.fun) - 1  # the last step may exceed the budget by a fraction of a pass
    return [float(residual) for residual in history.fun[last]]


def tuned(method: str, operator: FiniteSumOperator, seed: int, checkpoints: list[int]) -> list[float]:
    """The curve of the setting, out of five, that ends lowest on this very problem."""
    return min(
        (curve(solver, operator, checkpoints) for solver in settings(method, operator, seed)), key=lambda c: c[-1]
    )


def passes_of(budget: int) -> list[int]:
    return [budget // 8, budget // 4, budget // 2, budget]


# --- Algorithm 1 ---------------------------------------------------------------------------------------------------

REGRESSIONS = scales(
    smoke=["n=2000", "digits"],
    laptop=["n=2000", "n=20000", "digits"],
    paper=["n=2000", "n=20000", "n=200000", "digits"],
)
BUDGET = scales(smoke=[32], laptop=[200], paper=[200])


def least_squares_curve(cell: Cell, eta: Literal["theory", "practical"]) -> list[Row]:
    operator, checkpoints = regression(cell.problem, cell.seed), passes_of(cell.budget)
    solver: Solver = functools.partial(vr_halpern, eta=eta, random_state=cell.seed)
    residuals = curve(solver if cell.method == "VR Halpern" else halpern, operator, checkpoints)
    return [{"passes": k, "residual": r} for k, r in zip(checkpoints, residuals, strict=True)]


@claim(
    paper=PAPER,
    says="With its theoretical step 1/(4L) Algorithm 1 has a smaller residual than deterministic Halpern iteration "
    "after as many component evaluations.",
    published=COMPLEXITY,
    grid={
        "problem": REGRESSIONS,
        "budget": BUDGET,
        "seed": seeds(smoke=5, laptop=8, paper=10),
        "method": ["VR Halpern", "Halpern"],
    },
    expect=[lower("residual", "VR Halpern", than="Halpern", factor=1.0, each="problem", where={"passes": "last"})],
    plot=line(x="passes", y="residual", log="xy", each="problem"),
)
def theoretical_step(cell: Cell) -> list[Row]:
    return least_squares_curve(cell, "theory")


@claim(
    paper=PAPER,
    says="With the same step 1/L_F for both, Algorithm 1 has a smaller residual than deterministic Halpern iteration "
    "after as many component evaluations.",
    published=f"{COMPLEXITY}; the paper's step is 1/(4L)",
    grid={
        "problem": REGRESSIONS,
        "budget": BUDGET,
        "seed": seeds(smoke=5, laptop=8, paper=10),
        "method": ["VR Halpern", "Halpern"],
    },
    expect=[lower("residual", "VR Halpern", than="Halpern", factor=1.0, each="problem", where={"passes": "last"})],
    plot=line(x="passes", y="residual", log="xy", each="problem"),
)
def equal_steps(cell: Cell) -> list[Row]:
    return least_squares_curve(cell, "practical")


@claim(
    paper=PAPER,
    says="Algorithm 1's last iterate keeps Res(u_k) <= 16 L |u_0 - u*| / (k + 4), and the residual falls steadily, "
    "over 2000 iterations not yet like 1/k.",
    published="E[Res(u_k)] = O(L |u_0 - u*| / k)",
    grid={
        "seed": seeds(smoke=5, laptop=8, paper=10),
        "method": ["1/(4L)", "1/L", "1/L_F"],
    },
    expect=[
        always("share_of_bound", at_most=1.0, of="1/(4L)"),
        slope("residual", over="iteration", of="1/(4L)", at_most=-0.6),
        slope("residual", over="iteration", of="1/L_F", at_most=-0.6),
    ],
    plot=line(x="iteration", y="residual", log="xy"),
)
def rate(cell: Cell) -> list[Row]:
    from scipy.optimize import lsq_linear

    A, b = synthetic_regression(2000, 20, cell.seed)
    operator = least_squares_operator(A, b, prox=BoxProx(-1.0, 1.0))
    L = operator.cocoercivity
    assert L is not None
    distance = float(np.linalg.norm(lsq_linear(A, b, (-1.0, 1.0), tol=1e-12).x))
    eta = {"1/(4L)": "theory", "1/L": 1.0 / L, "1/L_F": "practical"}[cell.method]
    history = run(
        vr_halpern,
        operator,
        eta=eta,
        tol=0.0,
        max_passes=1000,
        eval_every=0.5,
        callback=lambda k, u, residual: k >= 2000,
        random_state=cell.seed,
    ).history
    bound = 16.0 * L * distance / (history.iteration + 4.0)
    share = np.maximum.accumulate(history.residual_bound[1:] / bound[1:])  # the largest so far
    kept = np.unique(np.geomspace(20, 2000, 25).astype(int))
    found = np.searchsorted(history.iteration, kept)
    return [
        {
            "iteration": int(history.iteration[i]),
            "residual": float(history.fun[i]),
            "share_of_bound": float(share[i - 1]),
        }
        for i in np.unique(found[found < len(history.iteration)])
    ]


@claim(
    paper=PAPER,
    says="With the same step 1/L_F, Algorithm 1 reaches residual 0.02 with less than half the component evaluations of "
    "deterministic Halpern iteration, and its cost grows more slowly with n.",
    published=f"{COMPLEXITY}: between n^(1/2) and n for variance reduction, n for the full operator",
    grid={
        "n": scales(smoke=[1000, 2000, 4000], laptop=[1000, 4000, 16_000], paper=[1000, 4000, 16_000, 64_000, 256_000]),
        "seed": seeds(smoke=5, laptop=8, paper=10),
        "method": ["VR Halpern", "Halpern"],
    },
    expect=[
        lower("calls", "VR Halpern", than="Halpern", factor=0.5, each="n"),
        slope("calls", over="n", of="VR Halpern", at_most=0.85),
        slope("calls", over="n", of="Halpern", at_least=0.85),
    ],
    plot=line(x="n", y="calls", log="xy"),
)
def component_evaluations(cell: Cell) -> Row:
    A, b = synthetic_regression(cell.n, 20, cell.seed)
    operator = least_squares_operator(A, b, prox=BoxProx(-1.0, 1.0))
    solver: Solver = halpern
    if cell.method == "VR Halpern":
        solver = functools.partial(vr_halpern, eta="practical", eval_every=0.25, random_state=cell.seed)
    with cell.timed():
        found = run(solver, operator, tol=0.02, max_passes=5000)
    return {"calls": found.oracle_calls if found.converged else math.inf, "checking_calls": found.evaluation_calls}


# --- Algorithm 2 ---------------------------------------------------------------------------------------------------

SIZES = scales(smoke=[100], laptop=[100, 300], paper=[500, 1000, 2000])
GAME_BUDGET = scales(smoke=[100], laptop=[400], paper=[400])


@claim(
    paper=PAPER,
    says="On policeman-and-burglar games, each method with the best of five settings, Algorithm 2's last iterate has a "
    "smaller residual than that of EAG, the full-operator method with the same kind of guarantee.",
    published=FIGURES,
    grid={
        "size": SIZES,
        "budget": GAME_BUDGET,
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": ["VR Halpern", "EAG"],
    },
    expect=[lower("residual", "VR Halpern", than="EAG", factor=1.0, each="size", where={"passes": "last"})],
    plot=line(x="passes", y="residual", log="xy", each="size"),
)
def games_against_anchoring(cell: Cell) -> list[Row]:
    return tuned_game_curve(cell)


@claim(
    paper=PAPER,
    says="On policeman-and-burglar games, each method with the best of five settings, Algorithm 2's last iterate has a "
    "smaller residual than those of extragradient and loopless variance-reduced extragradient.",
    published=f"{FIGURES}; variance-reduced extragradient has no guarantee for this residual",
    grid={
        "size": SIZES,
        "budget": GAME_BUDGET,
        "seed": seeds(smoke=5, laptop=8, paper=10),
        "method": ["VR Halpern", "extragradient", "VR extragradient"],
    },
    expect=[
        lower(
            "residual",
            "VR Halpern",
            than=["extragradient", "VR extragradient"],
            factor=1.0,
            each="size",
            where={"passes": "last"},
        )
    ],
    plot=line(x="passes", y="residual", log="xy", each="size"),
)
def games_against_extragradients(cell: Cell) -> list[Row]:
    return tuned_game_curve(cell)


def tuned_game_curve(cell: Cell) -> list[Row]:
    operator, checkpoints = game("policeman", cell.size, cell.seed), passes_of(cell.budget)
    residuals = tuned(cell.method, operator, cell.seed, checkpoints)
    return [{"passes": k, "residual": r} for k, r in zip(checkpoints, residuals, strict=True)]


@claim(
    paper=PAPER,
    says="On policeman-and-burglar games, all with the settings of their theories, Algorithm 2's last iterate has a "
    "smaller residual than those of EAG, extragradient and variance-reduced extragradient.",
    published=FIGURES,
    grid={
        "size": SIZES,
        "budget": GAME_BUDGET,
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": ["VR Halpern", "EAG", "extragradient", "VR extragradient"],
    },
    expect=[
        lower(
            "residual",
            "VR Halpern",
            than=["EAG", "extragradient", "VR extragradient"],
            factor=1.0,
            each="size",
            where={"passes": "last"},
        )
    ],
    plot=line(x="passes", y="residual", log="xy", each="size"),
)
def games_without_tuning(cell: Cell) -> list[Row]:
    operator, checkpoints = game("policeman", cell.size, cell.seed), passes_of(cell.budget)
    residuals = curve(settings(cell.method, operator, cell.seed)[0], operator, checkpoints)
    return [{"passes": k, "residual": r} for k, r in zip(checkpoints, residuals, strict=True)]


@claim(
    paper=PAPER,
    says="Algorithm 2's gain in residual over the best full-operator method, both tuned, stays below sqrt(N) L_F / L: "
    "about 1.9 for games with uniform entries, 10 and more for policeman and burglar.",
    published="L_F <= L <= sqrt(n) L_F, so the gain lies between none and sqrt(n)",
    grid={
        "family": ["policeman", "uniform"],
        "size": scales(smoke=[30], laptop=[30, 100], paper=[100, 500]),
        "budget": scales(smoke=[100], laptop=[400], paper=[400]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
    },
    expect=[always("share_of_limit", at_most=1.0)],
)
def gain_is_limited(cell: Cell) -> Row:
    operator, checkpoints = game(cell.family, cell.size, cell.seed), [cell.budget]
    assert operator.L_F is not None
    assert operator.lipschitz is not None
    ours, *others = (
        tuned(method, operator, cell.seed, checkpoints)[0] for method in ("VR Halpern", "EAG", "extragradient")
    )
    gain, limit = min(others) / ours, math.sqrt(cell.size) * operator.L_F / operator.lipschitz
    return {"gain": gain, "limit": limit, "share_of_limit": gain / limit}


@claim(
    paper=PAPER,
    says="On AUC maximisation for breast tumours, each method with the best of five settings, Algorithm 2's last "
    "iterate has a smaller residual than that of EAG and of extragradient after as many component evaluations.",
    published=f"{COMPLEXITY}; no such data in the paper",
    grid={
        "budget": scales(smoke=[100], laptop=[100, 400]),
        "seed": seeds(smoke=5, laptop=8, paper=10),
        "method": ["VR Halpern", "EAG", "extragradient", "VR extragradient"],
    },
    expect=[
        lower("residual", "VR Halpern", than="EAG", factor=1.0, each="budget", where={"passes": "last"}),
        lower("residual", "VR Halpern", than="extragradient", factor=1.0, each="budget", where={"passes": "last"}),
    ],
    plot=line(x="passes", y="residual", log="xy", each="budget"),
)
def real_saddle_point(cell: Cell) -> list[Row]:
    operator, checkpoints = area_under_the_curve(cell.seed), passes_of(cell.budget)
    residuals = tuned(cell.method, operator, cell.seed, checkpoints)
    return [{"passes": k, "residual": r} for k, r in zip(checkpoints, residuals, strict=True)]


# --- cost ----------------------------------------------------------------------------------------------------------


@benchmark(
    paper=PAPER,
    says="The compiled loops are faster than the same iterations in NumPy.",
    grid={
        "size": scales(smoke=[100], laptop=[100, 300], paper=[300, 1000]),
        "algorithm": ["Algorithm 1", "Algorithm 2", "VR extragradient"],
        "contender": ["compiled", "NumPy"],
    },
    expect=[faster("compiled", than="NumPy", each="algorithm")],
    rounds={"smoke": 5, "laptop": 5, "paper": 7},
)
def compiled_loops(cell: Cell) -> Row:
    if cell.algorithm == "Algorithm 1":
        operator: FiniteSumOperator = regression(f"n={10 * cell.size}", 0)
        solver: Solver = functools.partial(vr_halpern, eta="practical", random_state=0)
    else:
        operator = game("policeman", cell.size, 0)
        solver = functools.partial(
            vr_halpern_monotone if cell.algorithm == "Algorithm 2" else vr_extragradient, random_state=0
        )
    prox = operator.prox
    assert prox is not None
    if cell.contender == "NumPy":  # the compiled loops do not know this function, so the plain ones run
        compiled = prox
        prox = lambda v, eta: compiled(v, eta)  # noqa: E731
    with cell.timed():
        found = run(solver, operator, prox=prox, tol=0.0, max_passes=10, eval_every=5.0)
    return {"residual": found.residual}


@benchmark(
    paper=PAPER,
    says="Algorithm 2 certifies the value of a matrix game to 1 % of its largest payoff faster than HiGHS solves its "
    "linear program, and than extragradient.",
    grid={
        "family": ["uniform", "policeman"],
        "size": scales(smoke=[50], laptop=[50, 200, 500], paper=[200, 500, 1000, 2000]),
        "contender": ["VR Halpern", "extragradient", "HiGHS"],
    },
    only=lambda cell: cell.family == "uniform" or cell.size <= 200,
    expect=[faster("VR Halpern", than=["HiGHS", "extragradient"], each=["family", "size"])],
    rounds={"smoke": 5, "laptop": 5, "paper": 5},
)
def to_a_duality_gap(cell: Cell) -> Row:
    A = game(cell.family, cell.size, 0).A
    goal = 0.01 * float(np.abs(A).max())
    with cell.timed():
        gap = linear_program_gap(A) if cell.contender == "HiGHS" else solver_gap(A, cell.contender, goal)
    return {"gap_over_goal": gap / goal}


def solver_gap(A: np.ndarray, method: str, goal: float) -> float:
    operator = matrix_game(A)
    solver: Solver = extragradient
    if method == "VR Halpern":
        solver = functools.partial(vr_halpern_monotone, random_state=0)
    found = run(
        solver, operator, tol=0.0, max_passes=20_000, callback=lambda k, u, residual: operator.duality_gap(u) <= goal
    )
    return operator.duality_gap(found.x)


def linear_program_gap(A: np.ndarray) -> float:
    """Solve min_x max_j (A^T x)_j as a linear program; its multipliers are the column player's strategy."""
    from scipy.optimize import linprog

    m, k = A.shape
    found = linprog(
        np.r_[np.zeros(m), 1.0],
        A_ub=np.c_[A.T, -np.ones(k)],
        b_ub=np.zeros(k),
        A_eq=[np.r_[np.ones(m), 0.0]],
        b_eq=[1.0],
        bounds=[(0, None)] * m + [(None, None)],
        method="highs",
    )
    x, y = found.x[:m], -found.ineqlin.marginals
    return float(np.max(x @ A) - np.min(A @ y))
