"""Problems to try a solver for equality constraints on, written from their mathematics.

Hock and Schittkowski, "Test Examples for Nonlinear Programming Codes", 1981, for the numbered ones; logistic regression
on a sphere and control of a Poisson equation are those of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float
from torch import Tensor

from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number


@dataclass(frozen=True, eq=False)
class EqualityProblem:
    """min f(x) subject to c(x) = 0.

    ``minimize_equality(problem.fun, problem.x0, problem.cons, **problem.derivatives)`` solves it.

    Attributes
    ----------
    name : of the problem.
    fun, cons : f and c, of a tensor or an array as x0 is.
    x0 : the customary start, (n,).
    derivatives : "grad", "jac" and "lag_hess" where they are given.
    optimum : f at the solution, NaN where it has no closed form.
    """

    name: str
    fun: Callable[[Any], Any]
    cons: Callable[[Any], Any]
    x0: Any
    derivatives: dict[str, Callable[..., Any]]
    optimum: float = math.nan


_ROOT2 = math.sqrt(2.0)

# name: objective, constraints, start, value at the solution that is reached from there
_HS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], tuple[Tensor, ...]], list[float], float]] = {
    "HS6": (
        lambda x: (1 - x[0]) ** 2,
        lambda x: (10 * (x[1] - x[0] ** 2),),
        [-1.2, 1],
        0.0,
    ),
    "HS7": (
        lambda x: torch.log(1 + x[0] ** 2) - x[1],
        lambda x: ((1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4,),
        [2, 2],
        -math.sqrt(3.0),
    ),
    "HS28": (
        lambda x: (x[0] + x[1]) ** 2 + (x[1] + x[2]) ** 2,
        lambda x: (x[0] + 2 * x[1] + 3 * x[2] - 1,),
        [-4, 1, 1],
        0.0,
    ),
    "HS40": (
        lambda x: -x[0] * x[1] * x[2] * x[3],
        lambda x: (x[0] ** 3 + x[1] ** 2 - 1, x[0] ** 2 * x[3] - x[2], x[3] ** 2 - x[1]),
        [0.8, 0.8, 0.8, 0.8],
        -0.25,
    ),
    "HS42": (
        lambda x: (x[0] - 1) ** 2 + (x[1] - 2) ** 2 + (x[2] - 3) ** 2 + (x[3] - 4) ** 2,
        lambda x: (x[0] - 2, x[2] ** 2 + x[3] ** 2 - 2),
        [1, 1, 1, 1],
        28 - 10 * _ROOT2,
    ),
    "HS48": (
        lambda x: (x[0] - 1) ** 2 + (x[1] - x[2]) ** 2 + (x[3] - x[4]) ** 2,
        lambda x: (x[0] + x[1] + x[2] + x[3] + x[4] - 5, x[2] - 2 * (x[3] + x[4]) + 3),
        [3, 5, -3, 2, -2],
        0.0,
    ),
    "HS49": (
        lambda x: (x[0] - x[1]) ** 2 + (x[2] - 1) ** 2 + (x[3] - 1) ** 4 + (x[4] - 1) ** 6,
        lambda x: (x[0] + x[1] + x[2] + 4 * x[3] - 7, x[2] + 5 * x[4] - 6),
        [10, 7, 2, -3, 0.8],
        0.0,
    ),
    "HS50": (
        lambda x: (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 2 + (x[2] - x[3]) ** 4 + (x[3] - x[4]) ** 2,
        lambda x: (
            x[0] + 2 * x[1] + 3 * x[2] - 6,
            x[1] + 2 * x[2] + 3 * x[3] - 6,
            x[2] + 2 * x[3] + 3 * x[4] - 6,
        ),
        [35, -31, 11, 5, -5],
        0.0,
    ),
    "HS51": (
        lambda x: (x[0] - x[1]) ** 2 + (x[1] + x[2] - 2) ** 2 + (x[3] - 1) ** 2 + (x[4] - 1) ** 2,
        lambda x: (x[0] + 3 * x[1] - 4, x[2] + x[3] - 2 * x[4], x[1] - x[4]),
        [2.5, 0.5, 2, -1, 0.5],
        0.0,
    ),
    "HS52": (
        lambda x: (4 * x[0] - x[1]) ** 2 + (x[1] + x[2] - 2) ** 2 + (x[3] - 1) ** 2 + (x[4] - 1) ** 2,
        lambda x: (x[0] + 3 * x[1], x[2] + x[3] - 2 * x[4], x[1] - x[4]),
        [2, 2, 2, 2, 2],
        1859 / 349,
    ),
    "HS77": (
        lambda x: (x[0] - 1) ** 2 + (x[0] - x[1]) ** 2 + (x[2] - 1) ** 2 + (x[3] - 1) ** 4 + (x[4] - 1) ** 6,
        lambda x: (
            x[0] ** 2 * x[3] + torch.sin(x[3] - x[4]) - 2 * _ROOT2,
            x[1] + x[2] ** 4 * x[3] ** 2 - 8 - _ROOT2,
        ),
        [2, 2, 2, 2, 2],
        0.24150513,
    ),
    "HS78": (
        lambda x: x[0] * x[1] * x[2] * x[3] * x[4],
        lambda x: (
            x[0] ** 2 + x[1] ** 2 + x[2] ** 2 + x[3] ** 2 + x[4] ** 2 - 10,
            x[1] * x[2] - 5 * x[3] * x[4],
            x[0] ** 3 + x[1] ** 3 + 1,
        ),
        [-2, 1.5, 2, -1, -1],
        -2.91970041,
    ),
    "HS79": (
        lambda x: (x[0] - 1) ** 2 + (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 2 + (x[2] - x[3]) ** 4 + (x[3] - x[4]) ** 4,
        lambda x: (
            x[0] + x[1] ** 2 + x[2] ** 3 - 2 - 3 * _ROOT2,
            x[1] - x[2] ** 2 + x[3] + 2 - 2 * _ROOT2,
            x[0] * x[4] - 2,
        ),
        [2, 2, 2, 2, 2],
        0.0787768209,
    ),
}

HOCK_SCHITTKOWSKI = tuple(_HS)


def hock_schittkowski(name: str) -> EqualityProblem:
    """A problem of Hock and Schittkowski's collection, as torch functions with the customary start.

    Parameters
    ----------
    name : one of `HOCK_SCHITTKOWSKI`.
    """
    check_choice("name", name, HOCK_SCHITTKOWSKI)
    fun, constraints, x0, optimum = _HS[name]
    start = torch.tensor(x0, dtype=torch.float64)
    return EqualityProblem(name, fun, lambda x: torch.stack(constraints(x)), start, {}, optimum)


def sphere_logistic(
    features: Float[np.ndarray, "samples n"],
    labels: Float[np.ndarray, " samples"],
    n_affine: int = 10,
    random_state: int | np.random.Generator | None = None,
) -> EqualityProblem:
    """Logistic regression, (1/N) Σ log(1 + exp(-y_i a_iᵀ x)), subject to A x = b and ||x||² = 1.

    A is Gaussian, and b = A x_f with ||x_f|| = 0.8, so that the constraints meet in a sphere of dimension n - 1 - m.
    The start is all ones, as in the paper.

    Parameters
    ----------
    features : a_i, finite. labels : y_i, -1 or 1.
    n_affine : rows of A, from 0 to n - 2.
    """
    a, y = np.array(features, dtype=np.float64), np.array(labels, dtype=np.float64)
    if a.ndim != 2 or y.shape != (len(a),):
        raise ValueError(f"features and labels must have shapes (samples, n) and (samples,), got {a.shape}, {y.shape}")
    check_finite("features", a)
    if not np.isin(y, (-1.0, 1.0)).all():
        raise ValueError("labels must be -1 or 1")
    n = a.shape[1]
    check_integer("n_affine", n_affine, at_least=0, at_most=n - 2)
    rng = np.random.default_rng(random_state)
    A = rng.standard_normal((n_affine, n))
    feasible = rng.standard_normal(n)
    b = A @ (0.8 * feasible / np.linalg.norm(feasible))
    signed = y[:, None] * a

    def fun(x: np.ndarray) -> float:
        return float(np.logaddexp(0.0, -signed @ x).mean())

    def wrong(x: np.ndarray) -> np.ndarray:
        """The probability of the wrong label, 1 / (1 + exp(y aᵀ x))."""
        return np.asarray(np.exp(-np.logaddexp(0.0, signed @ x)))

    def lag_hess(x: np.ndarray, lam: np.ndarray) -> np.ndarray:
        p = wrong(x)
        return np.asarray((signed.T * (p * (1.0 - p) / len(y))) @ signed + 2.0 * lam[-1] * np.eye(n))

    return EqualityProblem(
        "sphere-logistic",
        fun,
        lambda x: np.append(A @ x - b, x @ x - 1.0),
        np.ones(n),
        {
            "grad": lambda x: -signed.T @ wrong(x) / len(y),
            "jac": lambda x: np.vstack([A, 2.0 * x]),
            "lag_hess": lag_hess,
        },
    )


def poisson_control(width: int, weight: float = 0.1) -> EqualityProblem:
    """Control Z of a state W on the unit square: min ½ (||W - W_d||² + weight ||Z||²) subject to ΔW + Z = 0.

    The Laplacian is the five-point one on width² points of the spacing 2 / (width + 1), with zero boundary values;
    the desired state W_d is a sine bump. Variables are W, then Z: n = 2 width², m = width². A sparse quadratic program.

    Parameters
    ----------
    width : at least 2.
    weight : of the control, above 0.
    """
    width = check_integer("width", width, at_least=2)
    weight = check_number("weight", weight, above=0.0)
    m = width * width
    spacing = 2.0 / (width + 1)
    second = sp.diags_array([np.ones(width - 1), np.full(width, -2.0), np.ones(width - 1)], offsets=[-1, 0, 1])
    eye = sp.eye_array(width)
    laplacian = (sp.kron(second, eye) + sp.kron(eye, second)) / spacing**2
    G = sp.csr_array(sp.hstack([laplacian, sp.eye_array(m)]))
    H = sp.csr_array(sp.diags_array(np.r_[np.ones(m), np.full(m, weight)]))
    nodes = np.arange(1, width + 1) / (width + 1)
    desired = np.outer(np.sin(np.pi * nodes), np.sin(np.pi * nodes)).ravel()
    linear = np.r_[desired, np.zeros(m)]
    constant = 0.5 * float(desired @ desired)
    return EqualityProblem(
        "poisson-control",
        lambda x: 0.5 * float(x @ (H @ x)) - float(linear @ x) + constant,
        lambda x: G @ x,
        np.ones(2 * m),
        {"grad": lambda x: H @ x - linear, "jac": lambda x: G, "lag_hess": lambda x, lam: H},
    )


def sparse_quadratic(
    n: int, per_row: int = 3, structure: Literal["random", "banded"] = "random", random_state: int | None = None
) -> EqualityProblem:
    """A well-conditioned quadratic program with n variables, n // 5 constraints and a few non-zeros in every row.

    H has eigenvalues in [1, 3] and G singular values near 1 at every n, so the condition of the KKT matrix does not
    grow. "random" places the non-zeros anywhere, where a factorisation fills in; "banded" near the diagonal, where it
    hardly does.

    Parameters
    ----------
    n : at least 10.
    per_row : non-zeros of a row of G beside its own column, and links of a variable in H, from 1 to 8.
    """
    n = check_integer("n", n, at_least=10)
    check_integer("per_row", per_row, at_least=1, at_most=8)
    check_choice("structure", structure, ("random", "banded"))
    rng = np.random.default_rng(random_state)
    m = n // 5

    def partners(rows: np.ndarray) -> np.ndarray:
        if structure == "random":
            return rng.integers(n, size=(len(rows), per_row))
        return (rows[:, None] + rng.integers(1, 11, size=(len(rows), per_row))) % n

    links = partners(np.arange(n))
    adjacency = sp.coo_array((np.ones(links.size), (np.repeat(np.arange(n), per_row), links.ravel())), shape=(n, n))
    adjacency = sp.csr_array(adjacency + adjacency.T)
    degree = np.maximum(np.asarray(adjacency.sum(axis=1)).ravel(), 1.0)
    scaling = sp.diags_array(1.0 / np.sqrt(degree))
    H = sp.csr_array(2.0 * sp.eye_array(n) - scaling @ adjacency @ scaling)  # normalised: the second term is in [-1, 1]
    own = np.arange(m) * 5
    others = partners(own)
    G = sp.csr_array(
        sp.coo_array((np.ones(m), (np.arange(m), own)), shape=(m, n))
        + sp.coo_array(
            (
                rng.uniform(-0.4, 0.4, size=others.size) / math.sqrt(per_row),
                (np.repeat(np.arange(m), per_row), others.ravel()),
            ),
            shape=(m, n),
        )
    )
    linear, right = rng.standard_normal(n), rng.standard_normal(m)
    return EqualityProblem(
        "sparse-quadratic",
        lambda x: 0.5 * float(x @ (H @ x)) - float(linear @ x),
        lambda x: G @ x - right,
        np.zeros(n),
        {"grad": lambda x: H @ x - linear, "jac": lambda x: G, "lag_hess": lambda x, lam: H},
    )
