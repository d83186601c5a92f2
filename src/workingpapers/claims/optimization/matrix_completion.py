"""Claims of "Low Rank Matrix Completion via Robust Alternating Minimization in Nearly Linear Time".

The paper has no experiments. Its statements are about orders of growth: as many sweeps as exact alternating
minimisation, |O| k operations a sweep in place of |O| k^2, both up to logarithms. Operations are the multiply-adds that
the compiled loops execute, symmetry used where it exists; for the exact methods these are about |O| k^2 / 2 (normal
equations) and |O| k^2 (QR) per half-step.
"""

from __future__ import annotations

import ctypes
import functools
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import scipy.sparse as sp
from threadpoolctl import threadpool_limits

from workingpapers.common.validation import require
from workingpapers.data import movielens_100k
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
from workingpapers.optimization.matrix_completion import (
    Completion,
    RobustAltMin,
    exact_als,
    soft_impute,
    weighted_multi_regression,
)
from workingpapers.optimization.result import History

PAPER = "matrix-completion"
NO_NUMBERS = "no experiments"
NEARLY_LINEAR = "O~(|O| k) time for O(log 1/eps) sweeps, against O~(|O| k^2) of earlier alternating minimisation"

# --- problems ------------------------------------------------------------------------------------------------------


def incoherent(n: int, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random orthonormal factors: M = U V^T has `rank` singular values 1."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for _ in range(2))
    return U, V


def uniform_sample(M: np.ndarray, share: float, seed: int) -> sp.coo_array:
    """Each entry kept with probability `share`."""
    kept = np.random.default_rng([seed, 1]).random(M.shape) < share
    return sp.coo_array((M[kept], np.nonzero(kept)), shape=M.shape)


def large_sample(entries: int, per_row: int, rank: int, seed: int) -> sp.csr_array:
    """About so many entries, about `per_row` in a row, of a square incoherent matrix, without forming it."""
    n = entries // per_row
    rng = np.random.default_rng(seed)
    U, V = (rng.standard_normal((n, rank)) / math.sqrt(rank) for _ in range(2))
    draws = -(n**2) * math.log1p(-per_row / n)  # so many hit a share per_row / n of the places at least once
    rows, columns = np.divmod(np.unique(rng.integers(n * n, size=round(draws))), n)
    truth = Completion(x=(U, V), fun=0.0, converged=True, message="the truth", n_iterations=0, history=History({}))
    values = truth.predict(rows, columns)
    indptr = np.r_[0, np.cumsum(np.bincount(rows, minlength=n))]
    return sp.csr_array((values, columns.astype(np.int32), indptr.astype(np.int32)), shape=(n, n))


# --- methods -------------------------------------------------------------------------------------------------------

Solver = Callable[..., Completion]


def robust(X: Any, rank: int, **options: Any) -> Completion:
    return RobustAltMin(rank, **options).fit(X).completion()


METHODS: dict[str, Solver] = {
    "sketch": robust,
    "diagonal": functools.partial(robust, inner="cg"),
    "normal equations": exact_als,
    "QR": functools.partial(exact_als, solver="qr"),
}


def run(method: str, X: Any, rank: int, **options: Any) -> Completion:
    """Run a method for its sweeps, without the warning that a tolerance of 0 or few sweeps were not enough."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return METHODS[method](X, rank, **options)


def relative_error(M: np.ndarray, U: np.ndarray, V: np.ndarray) -> float:
    """On the whole matrix, observed or not."""
    return float(np.linalg.norm(M - U @ V.T) / np.linalg.norm(M))


def error_curve(X: Any, M: np.ndarray, rank: int, sweeps: int, method: str = "sketch", **options: Any) -> list[float]:
    """Relative error after each sweep."""
    errors: list[float] = []
    run(
        method,
        X,
        rank,
        tol=0.0,
        max_sweeps=sweeps,
        callback=lambda sweep, U, V: errors.append(relative_error(M, U, V)),
        **options,
    )
    return errors


# --- robust to inexact solves --------------------------------------------------------------------------------------

INEXACT: dict[str, dict[str, Any]] = {
    "default rule": {},
    "5 steps": {"inner_tol": 0.0, "max_inner": 5},
    "2 steps": {"inner_tol": 0.0, "max_inner": 2},
    "5 steps, cold": {"inner_tol": 0.0, "max_inner": 5, "warm_start_rows": False},
    "exact": {"method": "normal equations"},
}


@claim(
    paper=PAPER,
    says="With warm starts, sweeps of 5 conjugate gradient steps stay within 2 % of the exact error at every sweep and "
    "those of the default rule within 35 %; with cold starts the error stalls.",
    published="the contraction survives regressions of forward error 1 / poly(kappa, mu, k, n); no experiments",
    grid={
        "n": scales(smoke=[400], laptop=[400, 800], paper=[400, 800, 4000]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": list(INEXACT),
    },
    expect=[
        always("ratio_to_exact", at_most=1.02, of="5 steps"),
        always("ratio_to_exact", at_most=1.35, of="default rule"),
        lower("error", "default rule", than=1e-3, where={"sweep": 9, "n": 400}, factor=1.0),
        higher("error", "5 steps, cold", than="5 steps", factor=10.0, where={"sweep": "last"}, each="n"),
    ],
    plot=line(x="sweep", y="error", by="method", log="y", each="n"),
)
def inexact_sweeps(cell: Cell) -> list[Row]:
    U, V = incoherent(cell.n, 8, cell.seed)
    M = U @ V.T
    X = uniform_sample(M, 60 / cell.n, cell.seed)
    curve = functools.partial(error_curve, X, M, 8, 12, random_state=cell.seed)
    exact, errors = curve(method="normal equations"), curve(**INEXACT[cell.method])
    return [
        {"sweep": t + 1, "error": error, "ratio_to_exact": error / best}
        for t, (error, best) in enumerate(zip(errors, exact, strict=True))
    ]


@claim(
    paper=PAPER,
    says="At the default inner tolerance, completion to a relative error of 1e-6 takes at most 1.2 times the sweeps of "
    "exact alternating minimisation.",
    published=f"{NEARLY_LINEAR}; {NO_NUMBERS}",
    grid={
        "n": scales(smoke=[300], laptop=[800], paper=[3000]),
        "rank": scales(smoke=[5], laptop=[10, 20, 40]),
        "seed": seeds(smoke=5, laptop=8, paper=10),
        "method": ["sketch", "diagonal", "normal equations"],
    },
    expect=[
        lower("sweeps", "sketch", than="normal equations", factor=1.2, each="rank"),
        lower("sweeps", "diagonal", than="normal equations", factor=1.2, each="rank"),
    ],
    plot=line(x="rank", y="sweeps", by="method"),
)
def sweeps_to_accuracy(cell: Cell) -> Row:
    U, V = incoherent(cell.n, cell.rank, cell.seed)
    M = U @ V.T
    entries = min(10 * cell.n * cell.rank * math.log(cell.n), cell.n**2 / 3)
    X = uniform_sample(M, entries / cell.n**2, cell.seed)
    with cell.timed():
        found = run(
            cell.method,
            X,
            cell.rank,
            tol=0.0,
            max_sweeps=100,
            callback=lambda sweep, U, V: relative_error(M, U, V) < 1e-6,
            random_state=cell.seed,
        )
    reached = relative_error(M, found.U, found.V) < 1e-6
    return {
        "sweeps": found.n_iterations if reached else math.inf,
        "operations": float(found.history["operations"].sum()),
    }


@claim(
    paper=PAPER,
    says="Inexact sweeps recover from as few entries as exact ones: success within 0.1 over the phase transition, and, "
    "above it, at most 1.2 times the sweeps to an error of 1e-3.",
    published=f"the same sample complexity as with exact regressions, up to logarithms; {NO_NUMBERS}",
    grid={
        "share": scales(smoke=[0.10, 0.18], laptop=[0.10, 0.13, 0.16, 0.20, 0.25, 0.30]),
        "seed": seeds(smoke=5, laptop=20, paper=50),
        "method": ["sketch", "normal equations"],
    },
    expect=[
        higher("success", "sketch", than="normal equations", margin=-0.1),
        lower("sweeps", "sketch", than="normal equations", factor=1.2, where={"share": [0.16, 0.18, 0.20, 0.25, 0.30]}),
    ],
    plot=line(x="share", y="success", by="method"),
)
def phase_transition(cell: Cell) -> Row:
    U, V = incoherent(150, 5, cell.seed)
    M = U @ V.T
    errors = error_curve(uniform_sample(M, cell.share, cell.seed), M, 5, 40, cell.method, random_state=cell.seed)
    return {
        "success": float(errors[-1] < 1e-2),
        "sweeps": next((t + 1 for t, error in enumerate(errors) if error < 1e-3), len(errors)),
    }


@claim(
    paper=PAPER,
    says="With noise at 20 dB inexact and exact sweeps end at the same error, within 1 %.",
    published=f"the analysis allows M to be low-rank plus noise; {NO_NUMBERS}",
    grid={
        "n": scales(smoke=[400], laptop=[400, 800], paper=[400, 800, 4000]),
        "seed": seeds(smoke=5, laptop=8, paper=10),
        "method": ["sketch", "diagonal", "normal equations"],
    },
    expect=[
        lower("error", "sketch", than="normal equations", factor=1.01, each="n"),
        lower("error", "diagonal", than="normal equations", factor=1.01, each="n"),
    ],
)
def noisy_entries(cell: Cell) -> Row:
    U, V = incoherent(cell.n, 8, cell.seed)
    M = U @ V.T
    noise = np.random.default_rng([cell.seed, 2]).standard_normal(M.shape)
    noisy = M + 0.1 * noise * (np.linalg.norm(M) / np.linalg.norm(noise))
    X = uniform_sample(noisy, 60 / cell.n, cell.seed)
    return {"error": error_curve(X, M, 8, 15, cell.method, random_state=cell.seed)[-1]}


# --- cost ----------------------------------------------------------------------------------------------------------


@claim(
    paper=PAPER,
    says="One regression of s >= 4 k^2 rows by a sketch and 3 conjugate gradient steps costs multiply-adds that grow "
    "with the rank at an exponent of at most 1.4, those of the exact solution at 1.6 or more; 3 steps cut the error to "
    "a third.",
    published="O~(s k) for a sketched regression, O(s k^2) for an exact one",
    grid={
        "rows": scales(smoke=[6400], laptop=[6400, 25600], paper=[6400, 25600, 102400]),
        "rank": scales(smoke=[10, 20, 40], laptop=[10, 20, 40, 80], paper=[10, 20, 40, 80, 160]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": ["sketch", "normal equations", "QR"],
    },
    only=lambda cell: cell.rows >= 4 * cell.rank**2,
    expect=[
        slope("operations", over="rank", of="sketch", at_most=1.4, each="rows"),
        slope("operations", over="rank", of="normal equations", at_least=1.6, each="rows"),
        lower("error_left", "sketch", than=1 / 3, each="rows"),
    ],
    plot=line(x="rank", y="operations", by="method", log="xy", each="rows"),
)
def one_regression(cell: Cell) -> Row:
    U, _ = np.linalg.qr(np.random.default_rng(cell.seed).standard_normal((cell.rows, cell.rank)))
    rng = np.random.default_rng([cell.seed, 1])
    V = rng.standard_normal((2, cell.rank))
    start = V + 0.1 * rng.standard_normal(V.shape)
    Y = U @ V.T
    inner: Any = {"sketch": "sketch", "normal equations": "exact", "QR": "qr"}[cell.method]
    with cell.timed():
        found = weighted_multi_regression(U, Y, 0.0, inner=inner, max_inner=3, start=start, random_state=cell.seed)
    return {
        "operations": found.operations / len(V),
        "error_left": float(np.linalg.norm(found.V - V) / np.linalg.norm(start - V)),
    }


def sweep_cost(cell: Cell, X: sp.csr_array, sweeps: int = 2) -> Row:
    found = run(cell.method, X, cell.rank, tol=0.0, max_sweeps=sweeps, random_state=cell.seed)
    return {
        "operations": float(found.history["operations"].mean()),
        "sweep_seconds": float(found.history["seconds"].min()),
        "inner_steps": float(found.history["inner_steps"].mean()),
    }


RANKS = scales(smoke=[4, 8, 16], laptop=[8, 16, 32, 64], paper=[8, 16, 32, 64, 128])
ENTRIES = scales(smoke=[50_000], laptop=[400_000], paper=[10_000_000])


@claim(
    paper=PAPER,
    says="With 500 entries per row, the multiply-adds of a sweep with sketched regressions grow linearly with the rank "
    "up to 64 (exponent at most 1.2), and stay below those of exact sweeps by normal equations and by QR.",
    published=NEARLY_LINEAR,
    grid={
        "entries": ENTRIES,
        "rank": RANKS,
        "seed": seeds(smoke=5, laptop=5, paper=5),
        "method": ["sketch", "normal equations", "QR"],
    },
    expect=[
        slope("operations", over="rank", of="sketch", at_most=1.2),
        lower("operations", "sketch", than=["normal equations", "QR"], factor=1.0, each="rank"),
    ],
    plot=line(x="rank", y="operations", by="method", log="xy"),
)
def sketched_sweep_by_rank(cell: Cell) -> Row:
    return sweep_cost(cell, large_sample(cell.entries, 500 if cell.entries > 100_000 else 200, cell.rank, cell.seed))


@claim(
    paper=PAPER,
    says="Where rows have at least 4 k^2 entries, the multiply-adds of a sweep with sketched regressions grow linearly "
    "with the rank (exponent at most 1.2), those of exact sweeps at 1.5 or more.",
    published=f"{NEARLY_LINEAR}; the sketch's own k^3 per row is a lower-order term only there",
    grid={
        "entries": scales(smoke=[80_000], laptop=[420_000], paper=[100_000_000]),
        "per_row": scales(smoke=[256], laptop=[600], paper=[5000]),
        "rank": scales(smoke=[2, 4, 8], laptop=[3, 6, 12], paper=[8, 16, 32]),
        "seed": seeds(smoke=5, laptop=5, paper=5),
        "method": ["sketch", "normal equations"],
    },
    expect=[
        slope("operations", over="rank", of="sketch", at_most=1.2),
        slope("operations", over="rank", of="normal equations", at_least=1.5),
    ],
    plot=line(x="rank", y="operations", by="method", log="xy"),
)
def sketched_sweep_of_long_rows(cell: Cell) -> Row:
    return sweep_cost(cell, large_sample(cell.entries, cell.per_row, cell.rank, cell.seed))


@claim(
    paper=PAPER,
    says="With 500 entries per row and the diagonal in place of the sketch, the multiply-adds of a sweep grow linearly "
    "with the rank up to 64 (exponent at most 1.2), where exact sweeps grow at 1.6 or more.",
    published=f"{NEARLY_LINEAR}; the diagonal is our simplification for orthonormal, incoherent factors",
    grid={
        "entries": ENTRIES,
        "rank": RANKS,
        "seed": seeds(smoke=5, laptop=5, paper=5),
        "method": ["diagonal", "normal equations"],
    },
    expect=[
        slope("operations", over="rank", of="diagonal", at_most=1.2),
        slope("operations", over="rank", of="normal equations", at_least=1.6),
    ],
    plot=line(x="rank", y="operations", by="method", log="xy"),
)
def diagonal_sweep_by_rank(cell: Cell) -> Row:
    return sweep_cost(cell, large_sample(cell.entries, 500 if cell.entries > 100_000 else 200, cell.rank, cell.seed))


@claim(
    paper=PAPER,
    says="The multiply-adds of a sweep grow linearly with the number of entries (exponent at most 1.05).",
    published=NEARLY_LINEAR,
    grid={
        "entries": scales(
            smoke=[25_000, 50_000, 100_000],
            laptop=[60_000, 200_000, 600_000],
            paper=[100_000, 1_000_000, 10_000_000, 100_000_000],
        ),
        "rank": [16],
        "seed": seeds(smoke=5, laptop=5, paper=5),
        "method": ["sketch", "diagonal", "normal equations"],
    },
    expect=[
        slope("operations", over="entries", of="sketch", at_most=1.05),
        slope("operations", over="entries", of="diagonal", at_most=1.05),
    ],
    plot=line(x="entries", y="operations", by="method", log="xy"),
)
def sweep_by_entries(cell: Cell) -> Row:
    return sweep_cost(cell, large_sample(cell.entries, 100, cell.rank, cell.seed))


@claim(
    paper=PAPER,
    says="At the largest size (10^7 entries, rank 64, 1000 entries per row) a sweep takes fewer multiply-adds than "
    "an exact one by normal equations, with the sketch and with the diagonal; seconds stand beside.",
    published=NEARLY_LINEAR,
    grid={
        "entries": scales(smoke=[100_000], laptop=[10_000_000], paper=[100_000_000]),
        "rank": scales(smoke=[16], laptop=[64], paper=[64]),
        "seed": seeds(smoke=1, laptop=1, paper=5),
    },
    expect=[
        always("sketch_saves_operations", at_least=1.0),
        always("diagonal_saves_operations", at_least=1.0),
    ],
)
def ten_million_entries(cell: Cell) -> Row:
    X = large_sample(cell.entries, 1000 if cell.rank == 64 else 300, cell.rank, cell.seed)
    costs: dict[str, Row] = {}
    for method in ("normal equations", "sketch", "diagonal"):
        costs[method] = sweep_cost(Cell({**cell.values, "method": method}), X, sweeps=1)
    exact = costs.pop("normal equations")
    row: Row = {"exact_seconds": exact["sweep_seconds"], "exact_operations": exact["operations"]}
    for method, cost in costs.items():
        row[f"{method}_saves_operations"] = exact["operations"] / cost["operations"]
        row[f"{method}_saves_seconds"] = exact["sweep_seconds"] / cost["sweep_seconds"]
    return row


@claim(
    paper=PAPER,
    says="Memory grows like entries plus factors: it stays below 4 times what these fill themselves.",
    published="the algorithm keeps the entries and the two factors",
    grid={
        "entries": scales(smoke=[300_000], laptop=[200_000, 600_000, 2_000_000], paper=[10_000_000, 100_000_000]),
        "rank": scales(smoke=[16], laptop=[16, 64]),
        "seed": seeds(smoke=1, laptop=2, paper=2),
    },
    expect=[always("peak_over_size", at_least=0.5, at_most=4.0)],
    plot=line(x="entries", y="peak_bytes", by="rank", log="xy"),
)
def memory(cell: Cell) -> Row:
    run("sketch", large_sample(20_000, 100, cell.rank, 0), cell.rank, max_sweeps=1)  # loads the compiled code
    X = large_sample(cell.entries, 300, cell.rank, cell.seed)
    with suppress(OSError, AttributeError):  # pages freed by what ran before, kept by glibc, would hide new ones
        ctypes.CDLL(None).malloc_trim(0)
    with cell.timed():
        run("sketch", X, cell.rank, tol=0.0, max_sweeps=1, random_state=cell.seed)
    size = X.data.nbytes + X.indices.nbytes + X.indptr.nbytes + 8 * sum(X.shape) * cell.rank
    return {"peak_over_size": cell.cost["peak_bytes"] / size, "size_bytes": size}


# --- ratings -------------------------------------------------------------------------------------------------------

# Settings to try on a tenth of the training ratings, as many of each method (the first four at laptop scale).
LOW_RANK = [{"rank": rank, "reg": reg} for rank, reg in ((4, 0.2), (4, 0.4), (2, 0.1), (2, 0.3), (8, 0.3), (8, 0.6))]
NUCLEAR = [
    {"rank": rank, "shrinkage": s} for rank, s in ((20, 14.0), (40, 14.0), (20, 11.0), (40, 17.0), (8, 12.0), (8, 15.0))
]
BIASES = [{"shrink": shrink} for shrink in (3.0, 5.0, 1.0, 2.0, 8.0, 12.0)]

RATING_GRID: dict[str, Any] = {
    "settings": scales(smoke=[1], laptop=[4], paper=[6]),
    "sweeps": scales(smoke=[5], laptop=[40], paper=[200]),
    "seed": seeds(smoke=5, laptop=5, paper=10),
}


def ratings_rmse(
    method: str, setting: dict[str, Any], sweeps: int, seed: int, fitted: np.ndarray, left: np.ndarray
) -> float:
    """Root mean square error on the ratings `left`, of a model of the ratings `fitted`.

    All models stand on biases: mean + user + film, each a mean of what is left, shrunk as if by `shrink` more zeros.
    """
    data = movielens_100k()
    users, films, ratings = data["users"], data["films"], data["ratings"]
    shape = users.max() + 1, films.max() + 1
    shrink = setting.get("shrink", 3.0)
    mean = ratings[fitted].mean()
    of_user, of_film = np.zeros(shape[0]), np.zeros(shape[1])
    for _ in range(10):
        for bias, own, other, theirs in ((of_film, films, of_user, users), (of_user, users, of_film, films)):
            rest = ratings[fitted] - mean - other[theirs[fitted]]
            counts = np.bincount(own[fitted], minlength=len(bias))
            bias[:] = np.bincount(own[fitted], rest, len(bias)) / (counts + shrink)
    predicted = mean + of_user[users] + of_film[films]
    if method != "biases":
        X = sp.coo_array(((ratings - predicted)[fitted], (users[fitted], films[fitted])), shape=shape)
        options = {"tol": 1e-3, "max_sweeps": sweeps, "random_state": seed, **setting}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # films that nobody in the training ratings has rated; few sweeps
            found = soft_impute(X, **options) if method == "soft_impute" else METHODS[method](X, **options)
        predicted += found.predict(users, films)
    return float(np.sqrt(np.mean((predicted - ratings)[left] ** 2)))


def tuned_rmse(cell: Cell) -> Row:
    """Error on a fifth of the ratings, with the setting that is best on a tenth of the others."""
    rng = np.random.default_rng(cell.seed)
    drawn = rng.random((2, 100_000))
    test = drawn[0] < 0.2
    validation = ~test & (drawn[1] < 0.1)
    settings: list[dict[str, Any]] = {"soft_impute": NUCLEAR, "biases": BIASES}.get(cell.method, LOW_RANK)
    settings = settings[: cell.settings]
    rmse = functools.partial(ratings_rmse, cell.method, sweeps=cell.sweeps, seed=cell.seed)
    best = settings[0]
    if len(settings) > 1:
        best = min(settings, key=lambda setting: rmse(setting, fitted=~test & ~validation, left=validation))
    return {"rmse": rmse(best, fitted=~test, left=test), "rank": best.get("rank", 0)}


@claim(
    paper=PAPER,
    says="On MovieLens ratings inexact sweeps predict as well as exact ones with the same regularisation, within "
    "0.002, and better than user and film biases alone, which both stand on.",
    published=NO_NUMBERS,
    grid={**RATING_GRID, "method": ["sketch", "normal equations", "biases"]},
    expect=[
        lower("rmse", "sketch", than="normal equations", margin=0.002),
        lower("rmse", "sketch", than="biases"),
    ],
)
def movielens_as_exact(cell: Cell) -> Row:
    return tuned_rmse(cell)


@claim(
    paper=PAPER,
    says="On MovieLens ratings inexact sweeps predict better than the nuclear norm (SoftImpute), on the same biases.",
    published=NO_NUMBERS,
    grid={**RATING_GRID, "method": ["sketch", "soft_impute"]},
    expect=[lower("rmse", "sketch", than="soft_impute")],
)
def movielens_against_nuclear_norm(cell: Cell) -> Row:
    return tuned_rmse(cell)


# --- time ----------------------------------------------------------------------------------------------------------


@benchmark(
    paper=PAPER,
    says="Our exact ALS is faster than that of implicit: four sweeps over the same entries at the same rank, one "
    "thread. implicit minimises over all entries, with weights 2 at the observed ones: the same rank-one updates and "
    "Cholesky factorisations, and one Gram matrix per half-step more. We make a spectral start and check convergence.",
    grid={
        "entries": scales(smoke=[30_000], laptop=[100_000], paper=[10_000_000]),
        "rank": scales(smoke=[16], laptop=[16, 64], paper=[64]),
        "contender": ["exact_als", "implicit", "implicit, single precision"],
    },
    expect=[faster("exact_als", than=["implicit", "implicit, single precision"], each="rank")],
    rounds={"smoke": 5, "laptop": 5, "paper": 5},
)
def exact_against_implicit(cell: Cell) -> Row:
    X = large_sample(cell.entries, 100, cell.rank, 0)
    if cell.contender == "exact_als":
        with cell.timed():
            run("normal equations", X, cell.rank, tol=0.0, max_sweeps=4, random_state=0)
        return {}
    als = require("implicit.cpu.als", extra="peers")
    weights = sp.csr_matrix((np.full(X.nnz, 2.0, np.float32), X.indices, X.indptr), shape=X.shape)
    with threadpool_limits(1, user_api="blas"):  # what implicit asks for; our fit does the same
        model = als.AlternatingLeastSquares(
            factors=cell.rank,
            use_cg=False,
            iterations=4,
            num_threads=1,
            dtype=np.float64 if cell.contender == "implicit" else np.float32,
            random_state=0,
        )
        with cell.timed():
            model.fit(weights, show_progress=False)
    return {}


@benchmark(
    paper=PAPER,
    says="A sweep with inexact regressions takes less time than an exact one by normal equations or by QR, in one "
    "thread, at 500 entries per row.",
    grid={
        "entries": scales(smoke=[30_000], laptop=[300_000], paper=[10_000_000]),
        "rank": scales(smoke=[4, 16], laptop=[8, 64], paper=[64, 128]),
        "contender": ["sketch", "diagonal", "normal equations", "QR"],
    },
    expect=[
        faster("sketch", than=["normal equations", "QR"], each="rank", metric="sweep_seconds"),
        faster("diagonal", than=["normal equations", "QR"], each="rank", metric="sweep_seconds"),
    ],
    rounds={"smoke": 5, "laptop": 5, "paper": 5},
)
def time_of_a_sweep(cell: Cell) -> Row:
    X = large_sample(cell.entries, 500 if cell.entries > 100_000 else 150, cell.rank, 0)
    with cell.timed():
        found = run(cell.contender, X, cell.rank, tol=0.0, max_sweeps=2, random_state=0)
    return {"sweep_seconds": float(found.history["seconds"].mean())}
