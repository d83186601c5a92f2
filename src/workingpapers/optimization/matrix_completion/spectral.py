"""Where alternating minimisation starts: singular vectors of the zero-filled matrix, with long rows shortened."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from sklearn.utils.extmath import randomized_svd

from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number
from workingpapers.optimization.matrix_completion.observed import Matrix, Observed

_LARGEST_ESTIMATE = 5.0  # of the incoherence, where it is not given


def spectral_init(
    X: Any,
    rank: int,
    *,
    incoherence: float | None = None,
    how: Literal["scale", "zero"] = "scale",
    random_state: int | np.random.Generator | None = None,
) -> Float[np.ndarray, "m k"]:
    """Orthonormal estimate of the column space of a partly observed matrix of low rank.

    The `rank` leading left singular vectors of P_O(M) / p, the observed entries with zeros elsewhere, by a randomised
    SVD in O(|O| k); then `clip_rows` and a QR factorisation.

    Parameters
    ----------
    X : (m, n), sparse, or dense with NaN where not observed.
    rank : k, from 1 to min(m, n).
    incoherence, how : see `clip_rows`.
    random_state : seed or generator.

    Returns
    -------
    U : shape (m, k), with orthonormal columns.

    Raises
    ------
    ValueError, TypeError : an argument is out of range.
    """
    observed = Observed.of(X)
    check_rank(rank, observed.shape)
    return initial_factor(observed, rank, incoherence, how, np.random.default_rng(random_state))


def initial_factor(
    observed: Observed,
    rank: int,
    incoherence: float | None,
    how: Literal["scale", "zero"],
    rng: np.random.Generator,
) -> Matrix:
    """As `spectral_init`, of checked entries."""
    # dividing by p does not change singular vectors; two power iterations, as only the start depends on them
    U = randomized_svd(observed.csr, rank, n_iter=2, random_state=int(rng.integers(2**31)))[0]
    return orthonormal(clip_rows(U, incoherence, how=how))[0]


def clip_rows(
    U: Float[np.ndarray, "m k"], incoherence: float | None = None, *, how: Literal["scale", "zero"] = "scale"
) -> Float[np.ndarray, "m k"]:
    """Shorten the rows of an orthonormal factor that an incoherent one cannot have.

    Parameters
    ----------
    U : shape (m, k), with orthonormal columns.
    incoherence : mu, positive: all rows of the true factor have norm at most mu sqrt(k / m). Rows of norm above twice
        that are changed. By default it is estimated from the longest row, capped at 5.
    how : "scale" to the bound, or "zero", as the analysis does.

    Returns
    -------
    A new array of U's shape; its columns are orthonormal only where nothing was changed.

    Raises
    ------
    ValueError : U is not a finite matrix, or another argument is out of range.
    """
    check_choice("how", how, ("scale", "zero"))
    U = np.array(U, dtype=np.float32 if getattr(U, "dtype", None) == np.float32 else float)
    if U.ndim != 2 or not U.size:
        raise ValueError(f"U must be a matrix, got shape {U.shape}")
    check_finite("U", U)
    m, k = U.shape
    norms = np.linalg.norm(U, axis=1)
    if incoherence is None:
        incoherence = min(float(norms.max()) * math.sqrt(m / k), _LARGEST_ESTIMATE)
    else:
        check_number("incoherence", incoherence, above=0.0)
    bound = 2.0 * incoherence * math.sqrt(k / m)
    long = norms > bound
    U[long] *= (bound / norms[long])[:, None] if how == "scale" else 0.0
    return U


def check_rank(rank: int, shape: tuple[int, int]) -> None:
    """Raise unless the rank is an integer from 1 to the smaller side of the matrix."""
    check_integer("rank", rank, at_least=1, at_most=min(shape))


def orthonormal(U: Matrix) -> tuple[Matrix, Matrix]:
    """Q and R of the reduced QR factorisation, Q in the order the loops read."""
    Q, R = np.linalg.qr(U)
    return np.ascontiguousarray(Q), R
