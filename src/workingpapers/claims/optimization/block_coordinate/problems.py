"""The problems of the claims, and a descent on one of them as a table."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.datasets import make_moons
from sklearn.neighbors import kneighbors_graph

from workingpapers.data import breast_cancer, digits
from workingpapers.desk.claim import (
    Row,
)
from workingpapers.optimization.block_coordinate import (
    BlockCoordinateDescent,
    LeastSquares,
    Logistic,
    Loss,
    Softmax,
)
from workingpapers.optimization.result import OptimizationResult

PAPER = "block-coordinate"
FIGURES = "Figures 4, 5, 8 and 11: curves of f - f* over 500 iterations, blocks of 5, 50 and 100; no numbers"


@functools.lru_cache(maxsize=1)
def columns_of_all_lengths(rows: int, columns: int, seed: int) -> tuple[sp.csc_array, np.ndarray]:
    """A of the data sets A, B and C, and a w of which a tenth is not 0."""
    rng = np.random.default_rng(seed)
    A = (rng.standard_normal((rows, columns)) + 1.0) * (10.0 * rng.standard_normal(columns))
    A *= rng.random(A.shape) < 10.0 * np.log(rows) / rows
    return sp.csc_array(A), rng.standard_normal(columns) * (rng.random(columns) < 0.1)


def loss_of(data: str, rows: int, columns: int, seed: int) -> Loss:
    rng = np.random.default_rng([seed, 1])
    if data == "tumours":
        return tumours(seed)
    A, w = columns_of_all_lengths(rows, columns, seed)
    if data == "A":
        return LeastSquares(A, A @ w + rng.standard_normal(rows))
    if data == "B":
        return Logistic(A, np.where(A @ w >= 0, 1.0, -1.0) * np.where(rng.random(rows) < 0.1, -1.0, 1.0))
    classes = max(columns // 20, 5)
    W = rng.standard_normal((columns, classes))
    return Softmax(A, np.argmax(A @ W + rng.standard_normal((rows, classes)), axis=1), classes)


def tumours(seed: int) -> Logistic:
    """Raw measurements of tumours and their products, in units of their mean size, on a half of the patients."""
    data = breast_cancer()
    X = data["columns"] / data["columns"].mean(axis=0)
    i, j = np.triu_indices(X.shape[1])
    half = np.random.default_rng(seed).permutation(len(X))[: len(X) // 2]
    products = np.hstack([X, X[:, i] * X[:, j]])[half]
    return Logistic(products, 2.0 * data["labels"][half] - 1.0, l2=1e-3)


def label_system(W: sp.csr_array, labels: np.ndarray, known: np.ndarray) -> tuple[sp.csr_array, np.ndarray]:
    """A and b of min sum_ij w_ij (y_i - y_j)^2 / 4 over the nodes whose labels are not known."""
    laplacian = sp.csr_array(sp.diags_array(np.asarray(W.sum(axis=1)).ravel()) - W)
    return sp.csr_array(laplacian[~known][:, ~known]), W[~known][:, known] @ labels[known]


def lattice(side: int, labels: int, seed: int) -> tuple[sp.csr_array, np.ndarray, np.ndarray]:
    """Data set D: A, b, and where the unknown nodes lie. At side 50 and seed 1 it is the authors' own instance."""
    n = side * side
    place = np.arange(n).reshape(side, side)
    edges = np.hstack([[place[:-1].ravel(), place[1:].ravel()], [place[:, :-1].ravel(), place[:, 1:].ravel()]])
    half = sp.coo_array((np.full(edges.shape[1], 1e5), (edges[0], edges[1])), shape=(n, n))
    draws = np.random.RandomState(seed)  # what the authors used
    chosen, values = draws.choice(n, labels, replace=False), np.zeros(n)
    values[chosen] = 10.0 * draws.standard_normal(labels)
    known = np.isin(np.arange(n), chosen)
    return *label_system(sp.csr_array(half + half.T), values, known), np.flatnonzero(~known)


def combs(side: int, nodes: np.ndarray) -> list[np.ndarray]:
    """Two interleaved combs that cover a lattice: even columns with the first row, odd ones with the last."""
    row, column = np.divmod(nodes, side)
    white = (row == 0) | ((column % 2 == 0) & (row != side - 1))
    return [np.flatnonzero(white), np.flatnonzero(~white)]


def checkerboard(side: int, nodes: np.ndarray) -> list[np.ndarray]:
    red = np.add(*np.divmod(nodes, side)) % 2 == 0
    return [np.flatnonzero(red), np.flatnonzero(~red)]


def neighbours_system(data: str, nodes: int, seed: int) -> tuple[sp.csr_array, np.ndarray]:
    """Data set E: who is among the five nearest of whom, a twentieth labelled; two moons, or the digits (even or odd).

    Parts of the graph without a label are left out.
    """
    rng = np.random.default_rng(seed)
    if data == "moons":
        points, truth = make_moons(nodes, noise=0.1, random_state=seed)
    else:
        images = digits()
        chosen = rng.permutation(len(images["labels"]))[:nodes]
        points, truth = images["images"][chosen], images["labels"][chosen] % 2
    W = sp.csr_array(kneighbors_graph(points, 5))
    W = sp.csr_array(W.maximum(W.T))
    known = np.isin(np.arange(len(truth)), rng.choice(len(truth), len(truth) // 20, replace=False))
    part = sp.csgraph.connected_components(W, directed=False)[1]
    reached = np.isin(part, part[known])
    return label_system(sp.csr_array(W[reached][:, reached]), truth[reached] + 1.0, known[reached])


def random_tree(nodes: int, seed: int) -> tuple[sp.csr_array, np.ndarray]:
    """A diagonally dominant matrix on a tree whose nodes hang on random earlier ones, and a right-hand side."""
    rng = np.random.default_rng(seed)
    parents = (rng.random(nodes - 1) * np.arange(1, nodes)).astype(int)
    half = sp.coo_array((rng.standard_normal(nodes - 1), (np.arange(1, nodes), parents)), shape=(nodes, nodes))
    W = sp.csr_array(half + half.T)
    return sp.csr_array(W + sp.diags_array(np.asarray(abs(W).sum(axis=1)).ravel() + 0.1)), rng.standard_normal(nodes)


def descend(loss: Loss, options: dict[str, Any], iterations: int, seed: int) -> OptimizationResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # iterations are counted, not tolerances reached
        options = {"tol": 0.0, "max_iter": iterations, "random_state": seed, **options}
        return BlockCoordinateDescent(loss, **options).minimize()


def curve(found: OptimizationResult, optimum: float, scale: float) -> list[Row]:
    """Progress and time at about ten iterations and the last."""
    last = found.n_iterations
    kept = sorted({0, last, *np.unique(np.geomspace(1, max(last, 1), 10).astype(int))})
    return [
        {
            "iteration": int(k),
            "gap": max(float(found.history.fun[k] - optimum) / scale, 1e-32),
            "solver_seconds": float(found.history.time[k]),
        }
        for k in kept
    ]


LAST = {"iteration": "last"}
