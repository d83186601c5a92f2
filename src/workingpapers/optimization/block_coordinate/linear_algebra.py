"""Small positive semidefinite systems."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.linalg import eigvalsh, lapack

Square = Float[np.ndarray, "*stack k k"]
Vector = Float[np.ndarray, " k"]


def largest_eigenvalues(H: Square) -> Float[np.ndarray, "*stack"]:
    """The largest eigenvalue of each symmetric matrix of a stack."""
    if H.ndim == 2 and len(H) > 64:  # one eigenvalue is cheaper than all
        return np.asarray(eigvalsh(H, subset_by_index=[len(H) - 1, len(H) - 1])[0])
    return np.linalg.eigvalsh(H)[..., -1]


def pseudo_inverses(H: Square) -> Square:
    """The pseudo-inverse of each positive semidefinite matrix of a stack; eigenvalues at rounding level count as 0."""
    values, vectors = np.linalg.eigh(H)
    cutoff = 4 * H.shape[-1] * np.finfo(float).eps * values[..., -1:]
    inverse = np.where(values > cutoff, 1.0 / np.where(values > cutoff, values, 1.0), 0.0)
    return np.asarray((vectors * inverse[..., None, :]) @ np.swapaxes(vectors, -1, -2))


def solve(H: Square, rhs: Vector) -> Vector:
    """H^+ rhs for a positive semidefinite H: by Cholesky where its pivots are sound, else by eigenvalues."""
    if len(H) == 0:
        return np.zeros(0)
    factor, failed = lapack.dpotrf(H, lower=1)
    if not failed:
        pivots = np.diagonal(factor) ** 2
        if pivots.min() > 100 * len(H) * np.finfo(float).eps * pivots.max():
            solution, _ = lapack.dpotrs(factor, rhs, lower=1)
            return np.asarray(solution)
    return np.asarray(pseudo_inverses(H) @ rhs)
