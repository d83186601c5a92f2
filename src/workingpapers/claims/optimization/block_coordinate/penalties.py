"""l1 and bounds: the active set, and the time of a lasso beside other solvers."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import scipy.sparse as sp
from sklearn.linear_model import Lasso

from workingpapers.claims.optimization.block_coordinate.problems import PAPER, columns_of_all_lengths, descend
from workingpapers.common.validation import require
from workingpapers.desk.claim import (
    Cell,
    Row,
    always,
    bars,
    benchmark,
    claim,
    faster,
    lower,
    scales,
    seeds,
)
from workingpapers.optimization.block_coordinate import (
    BlockCoordinateDescent,
    LeastSquares,
    NonnegativeL1LeastSquares,
)

ACTIVE = {
    "PN": (2.0, "pn"),
    "TMP": (2.0, "tmp"),
    "projected gradient": (2.0, "lb"),
    "PN, half the support": (0.5, "pn"),
    "TMP, half the support": (0.5, "tmp"),
}


@claim(
    paper=PAPER,
    says="On nonnegative l1 least squares with blocks of twice the support, proximal Newton (PN) and two-metric "
    "projection (TMP) end at the solution, a relative gap of 1e-12, within 100 iterations and by one last leap; "
    "projected gradient creeps, at least twice as long, and with blocks of half the support both take longer.",
    published="Figure 7: PN and TMP terminate with blocks of 100 at a support of about 51, projected gradient does not",
    grid={
        "rows": scales(smoke=[200], laptop=[200, 1000]),
        "iterations": scales(smoke=[100], laptop=[200]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": list(ACTIVE),
    },
    expect=[
        always("iterations_to_1e_12", at_most=100, of="PN"),
        always("iterations_to_1e_12", at_most=100, of="TMP"),
        always("last_leap", at_most=1e-4, of="PN"),
        always("last_leap", at_most=1e-4, of="TMP"),
        always("last_leap", at_least=0.1, of="projected gradient"),
        lower("iterations_to_1e_12", "TMP", than="projected gradient", factor=0.5, each="rows"),
        lower("iterations_to_1e_12", "PN", than="PN, half the support", factor=0.5, each="rows"),
        lower("iterations_to_1e_12", "TMP", than="TMP, half the support", factor=1.0, each="rows"),
    ],
    plot=bars(x="method", y="iterations_to_1e_12"),
)
def active_set(cell: Cell) -> Row:
    columns, share_of_largest = {200: (1000, 0.05), 1000: (10_000, 0.15)}[cell.rows]
    A, w = columns_of_all_lengths(cell.rows, columns, cell.seed)
    b = A @ w + np.random.default_rng([cell.seed, 1]).standard_normal(cell.rows)
    steepest = float(np.abs(A.T @ b).max())
    loss = NonnegativeL1LeastSquares(A, b, share_of_largest * steepest)
    exact = BlockCoordinateDescent(loss, tol=1e-11 * steepest).minimize()
    support = int(np.count_nonzero(exact.x))
    share, update = ACTIVE[cell.method]
    options = {"block_size": max(1, int(share * support)), "selection": "gsq-nn", "update": update}
    with cell.timed():
        found = descend(loss, {**options, "tol": 1e-12 * steepest}, cell.iterations, cell.seed)
    gaps = np.maximum((found.history.fun - exact.fun) / abs(exact.fun), 0.0)
    there = np.flatnonzero(gaps <= 1e-12)
    last = there[0] if len(there) else len(gaps) - 1
    residual = found.history.residual
    return {
        "gap": float(gaps[-1]),
        "iterations_to_1e_12": int(there[0]) if len(there) else cell.iterations,
        "last_leap": float(residual[last] / residual[max(last - 1, 0)]),
        "support": support,
    }


# --------------------------------------------------------------------------------------------------------------------
# Cost


@functools.lru_cache(maxsize=1)
def wide_lasso(rows: int, columns: int) -> tuple[sp.csc_array, np.ndarray]:
    """Random entries, 0.5 % of all; every 200th column makes the response, on average, and a tenth of it is noise."""
    rng = np.random.default_rng(0)
    A = sp.random_array((rows, columns), density=5e-3, rng=rng, format="csc")
    A.data = rng.standard_normal(A.nnz)
    w = np.zeros(columns)
    w[rng.choice(columns, columns // 200, replace=False)] = rng.standard_normal(columns // 200)
    b = A @ w
    return A, b + 0.1 * np.linalg.norm(b) / np.sqrt(rows) * rng.standard_normal(rows)


@benchmark(
    paper=PAPER,
    says="On a sparse lasso we are no slower than the coordinate descents of scikit-learn, celer and skglm, to the "
    "same duality gap, 1e-6 |b|^2; at laptop scale 10 000 x 100 000.",
    grid={
        "rows": scales(smoke=[500], laptop=[10_000]),
        "columns": scales(smoke=[5000], laptop=[100_000]),
        "penalty": scales(smoke=[0.1], laptop=[0.03, 0.01], paper=[0.1, 0.03, 0.01]),
        "contender": ["ours", "scikit-learn", "celer", "skglm"],
    },
    expect=[
        faster("ours", than="scikit-learn", each="penalty"),
        faster("ours", than=["celer", "skglm"], each="penalty"),
        always("gap_over_target", at_most=1.0),
    ],
    rounds={"smoke": 5, "laptop": 5, "paper": 5},
    plot=bars(x="penalty", y="seconds", by="contender"),
)
def lasso_to_the_same_gap(cell: Cell) -> Row:
    A, b = wide_lasso(cell.rows, cell.columns)
    l1, target = cell.penalty * float(np.abs(A.T @ b).max()), 1e-6 * float(b @ b)
    alpha = l1 / len(b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what counts is the gap that comes out
        if cell.contender == "ours":
            with cell.timed():
                x = BlockCoordinateDescent(LeastSquares(A, b, l1=l1), tol=0.0, gap_tol=target).minimize().x
        else:
            if cell.contender == "scikit-learn":
                model = Lasso(alpha, fit_intercept=False, tol=1e-6, max_iter=100_000)
            elif cell.contender == "celer":
                model = require("celer", extra="peers").Lasso(alpha, fit_intercept=False, tol=1e-6)
            else:  # stops on the optimality condition; this is the loosest power of ten that keeps the gap
                model = require("skglm", extra="peers").Lasso(alpha, fit_intercept=False, tol=1e-4 * alpha)
            with cell.timed():
                x = model.fit(A, b).coef_
    loss = LeastSquares(A, b, l1=l1)
    return {"gap_over_target": loss.duality_gap(loss.state(x)) / target, "support": int(np.count_nonzero(x))}
