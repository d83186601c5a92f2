"""Compiled inner loops of CoLiDE, DAGMA and GOLEM: Adam on a d x d matrix, in float64, on preallocated buffers.

One iteration of CoLiDE or DAGMA is one inverse and one product of d x d matrices. The product C W serves both the
scale at this iteration and the gradient at the next. The inverse is a Gauss-Jordan elimination without pivoting, in
blocks so that most of its work is matrix products; for this family of matrices it is not only stable but also the
test of the domain: a matrix with non-positive off-diagonal entries has an entrywise non-negative inverse (is a
nonsingular M-matrix) exactly when elimination without pivoting meets only positive pivots (Berman and Plemmons,
Nonnegative Matrices in the Mathematical Sciences, Theorem 6.2.3). Their logarithms add up to log det.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numba import njit

Matrix = Float[np.ndarray, "d d"]
Vector = Float[np.ndarray, " d"]

FIXED, EQUAL, UNEQUAL = 0, 1, 2  # which noise scales are estimated: none (DAGMA), one (EV), one per node (NV)
CONVERGED, OUT_OF_ITERATIONS, LEFT_DOMAIN, STEP_VANISHED = 0, 1, 2, 3  # how a stage ended

_BLOCK = 16
_compiled = njit(cache=True, error_model="numpy", fastmath={"contract"})  # no reordering: the same result every time


@_compiled
def _eliminate(A: Matrix) -> float:
    """Invert A in place by Gauss-Jordan elimination; return log det A, NaN as soon as a pivot is not positive."""
    d = A.shape[0]
    logdet = 0.0
    for k in range(d):
        pivot = A[k, k]
        if not pivot > 0.0:
            return np.nan
        logdet += np.log(pivot)
        A[k, k] = 1.0
        for j in range(d):
            A[k, j] /= pivot
        for i in range(d):
            if i != k:
                factor = A[i, k]
                A[i, k] = 0.0
                for j in range(d):
                    A[i, j] -= factor * A[k, j]
    return logdet


@_compiled
def invert_m_matrix(A: Matrix, pivot: Matrix, right: Matrix, left: Matrix, scaled: Matrix, update: Matrix) -> float:
    """Invert the M-matrix A in place; return log det A, or NaN (and A spoilt) when A is not a nonsingular M-matrix.

    With D the pivot block, [D R; L S] -> [D^-1, D^-1 R; -L D^-1, S - L D^-1 R], one block after the other; the last
    block is filled up with the identity.

    Parameters
    ----------
    A : off-diagonal entries at most 0.
    pivot, right, left, scaled, update : scratch, from `inverse_scratch(d)`.
    """
    d = A.shape[0]
    if 2 * d <= 3 * _BLOCK:  # too small for blocks to pay
        return _eliminate(A)
    logdet = 0.0
    for start in range(0, d, _BLOCK):
        width = min(_BLOCK, d - start)
        for k in range(_BLOCK):
            for j in range(d):
                right[k, j] = A[start + k, j] if k < width else 0.0
            for j in range(_BLOCK):
                pivot[k, j] = (1.0 if k == j else 0.0) if k >= width or j >= width else A[start + k, start + j]
        for i in range(d):
            in_block = start <= i < start + width
            for k in range(_BLOCK):
                left[i, k] = 0.0 if in_block or k >= width else A[i, start + k]
        for k in range(width):  # the identity takes the place of D in its row, and of its column
            for j in range(width):
                right[k, start + j] = 1.0 if k == j else 0.0
            for i in range(d):
                A[i, start + k] = 0.0
        pivot_logdet = _eliminate(pivot)
        if np.isnan(pivot_logdet):
            return np.nan
        logdet += pivot_logdet
        np.dot(pivot, right, scaled)
        np.dot(left, scaled, update)
        for i in range(d):
            for j in range(d):
                A[i, j] -= update[i, j]
        for k in range(width):
            for j in range(d):
                A[start + k, j] = scaled[k, j]
    return logdet


@_compiled
def inverse_scratch(d: int) -> tuple[Matrix, Matrix, Matrix, Matrix, Matrix]:
    """The buffers that `invert_m_matrix` works in."""
    return (
        np.empty((_BLOCK, _BLOCK)),
        np.empty((_BLOCK, d)),
        np.empty((d, _BLOCK)),
        np.empty((_BLOCK, d)),
        np.empty((d, d)),
    )


@_compiled
def _m_matrix_inverse(W: Matrix, s: float, inverse: Matrix, scratch: tuple[Matrix, ...]) -> float:
    """inverse <- (sI - W o W)^-T; return log det(sI - W o W), NaN outside the domain."""
    d = W.shape[0]
    for i in range(d):
        for j in range(d):
            inverse[i, j] = -W[j, i] * W[j, i]
        inverse[i, i] += s
    return invert_m_matrix(inverse, *scratch)


@_compiled
def _residual_variances(W: Matrix, C: Matrix, CW: Matrix, variances: Vector) -> None:
    """CW <- C W; variances <- diag((I - W)' C (I - W)), the mean squares of the residuals x - W' x."""
    d = W.shape[0]
    np.dot(C, W, CW)
    for j in range(d):
        variances[j] = C[j, j] - CW[j, j]
    for i in range(d):
        for j in range(d):
            variances[j] -= W[i, j] * (C[i, j] - CW[i, j])
    for j in range(d):
        variances[j] = max(variances[j], 0.0)  # rounding, when a column is a function of the others


@_compiled
def _update_scale(variances: Vector, floor: float, kind: int, sigma: Vector) -> None:
    """The scale that minimises the score for the W in hand."""
    if kind == EQUAL:  # sigma = max(sqrt(tr((I - W)' C (I - W)) / d), sigma_0)
        sigma[:] = max(np.sqrt(variances.mean()), floor)
    elif kind == UNEQUAL:  # sigma_i = max(sqrt([(I - W)' C (I - W)]_ii), sigma_0)
        for j in range(sigma.size):
            sigma[j] = max(np.sqrt(variances[j]), floor)


@_compiled
def _move(W: Matrix, length: float, step: Matrix) -> None:
    for i in range(W.shape[0]):
        for j in range(W.shape[0]):
            W[i, j] += length * step[i, j]


@_compiled
def minimise_stage(
    W: Matrix,
    sigma: Vector,
    C: Matrix,
    floor: float,
    kind: int,
    lam: float,
    mu: float,
    s: float,
    lr: float,
    max_iter: int,
    tol: float,
    checkpoint: int,
    path: Float[np.ndarray, " checkpoints"],
) -> tuple[int, int, int]:
    """Minimise mu S(W, sigma) + h_s(W) by Adam steps on W, each followed by the closed-form sigma.

    Parameters
    ----------
    W, sigma : where to start; overwritten with where it ended.
    C : covariance of the data.
    floor : sigma_0, the smallest scale allowed.
    kind : FIXED leaves sigma as it is and S(W) = tr((I - W)' C (I - W)) / 2 + lam |W|_1; EQUAL and UNEQUAL
        estimate it and S has the term sum(sigma) / 2 besides.
    path : receives the objective at every checkpoint; max_iter // checkpoint + 1 places.

    Returns
    -------
    How it ended (CONVERGED, ...), the number of iterations, and how many places of `path` were filled.
    """
    beta1, beta2, epsilon = 0.99, 0.999, 1e-8
    d = W.shape[0]
    first, second, step = np.zeros((d, d)), np.zeros((d, d)), np.zeros((d, d))
    inverse, CW, variances, scratch = np.empty((d, d)), np.empty((d, d)), np.empty(d), inverse_scratch(d)
    decay1, decay2 = 1.0, 1.0
    previous, checkpoints = 1e16, 0

    _residual_variances(W, C, CW, variances)
    logdet = _m_matrix_inverse(W, s, inverse, scratch)
    if np.isnan(logdet):
        return LEFT_DOMAIN, 0, 0
    for iteration in range(1, max_iter + 1):
        decay1 *= beta1
        decay2 *= beta2
        unbias1, unbias2 = 1.0 / (1.0 - decay1), 1.0 / (1.0 - decay2)
        for i in range(d):
            for j in range(d):
                w = W[i, j]
                sign = (1.0 if w > 0.0 else 0.0) - (1.0 if w < 0.0 else 0.0)
                # -mu C (I - W) diag(sigma)^-1 + mu lam sign(W) + 2 W o (sI - W o W)^-T
                gradient = mu * ((CW[i, j] - C[i, j]) / sigma[j] + lam * sign) + 2.0 * w * inverse[i, j]
                first[i, j] = beta1 * first[i, j] + (1.0 - beta1) * gradient
                second[i, j] = beta2 * second[i, j] + (1.0 - beta2) * gradient * gradient
                step[i, j] = unbias1 * first[i, j] / (np.sqrt(unbias2 * second[i, j]) + epsilon)
                W[i, j] = w - lr * step[i, j]
        _residual_variances(W, C, CW, variances)
        _update_scale(variances, floor, kind, sigma)
        logdet = _m_matrix_inverse(W, s, inverse, scratch)

        while np.isnan(logdet):
            if s <= 0.9:
                return LEFT_DOMAIN, iteration, checkpoints
            _move(W, lr, step)
            lr *= 0.5
            if lr > 1e-16:
                _move(W, -lr, step)
            _residual_variances(W, C, CW, variances)
            _update_scale(variances, floor, kind, sigma)
            if lr <= 1e-16:
                return STEP_VANISHED, iteration, checkpoints
            logdet = _m_matrix_inverse(W, s, inverse, scratch)

        if iteration % checkpoint == 0 or iteration == max_iter:
            score = 0.0
            for j in range(d):
                score += 0.5 * variances[j] / sigma[j] + (0.0 if kind == FIXED else 0.5 * sigma[j])
                for i in range(d):
                    score += lam * abs(W[i, j])
            objective = mu * score + d * np.log(s) - logdet
            path[checkpoints] = objective
            checkpoints += 1
            if abs(previous - objective) <= tol * abs(previous):
                return CONVERGED, iteration, checkpoints
            previous = objective
    return OUT_OF_ITERATIONS, max_iter, checkpoints


@_compiled
def exponential(A: Matrix, power: Matrix, product: Matrix) -> None:
    """power <- exp(A) of an entrywise non-negative matrix, to about 1e-11 relative.

    Taylor's series to degree 8 (no terms cancel) of A / 2^k, whose norm is at most 1/4, squared k times.
    """
    d = A.shape[0]
    norm, squarings = 0.0, 0
    for j in range(d):
        column = 0.0
        for i in range(d):
            column += A[i, j]
        norm = max(norm, column)
    while norm > 0.25:
        norm *= 0.5
        squarings += 1
    for i in range(d):
        for j in range(d):
            power[i, j] = 1.0 if i == j else 0.0
    for degree in range(8, 0, -1):  # I + A (I + A / 2 (I + A / 3 (...)))
        np.dot(A, power, product)
        shrink = 0.5**squarings / degree
        for i in range(d):
            for j in range(d):
                power[i, j] = shrink * product[i, j] + (1.0 if i == j else 0.0)
    for _ in range(squarings):
        np.dot(power, power, product)
        for i in range(d):
            for j in range(d):
                power[i, j] = product[i, j]


@_compiled
def golem_steps(
    W: Matrix,
    first: Matrix,
    second: Matrix,
    C: Matrix,
    floor: float,
    kind: int,
    lam: float,
    lam_dag: float,
    lr: float,
    start: int,
    stop: int,
) -> None:
    """Adam steps `start` + 1 to `stop` on GOLEM's penalised likelihood, in place; the diagonal of W stays 0.

    With q = diag((I - W)' C (I - W)): L + lam |W|_1 + lam_dag (tr exp(W o W) - d), where
    L = d/2 log(sum q) - log|det(I - W)| for EQUAL variances and sum(log q) / 2 - log|det(I - W)| for UNEQUAL ones.

    Parameters
    ----------
    first, second : Adam's moments.
    floor : bounds the residuals' standard deviations from below.
    """
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8
    d = W.shape[0]
    CW, variances, precision = np.empty((d, d)), np.empty(d), np.empty(d)
    squares, power, product, residual = np.empty((d, d)), np.empty((d, d)), np.empty((d, d)), np.empty((d, d))
    for iteration in range(start + 1, stop + 1):
        unbias1, unbias2 = 1.0 / (1.0 - beta1**iteration), 1.0 / (1.0 - beta2**iteration)
        _residual_variances(W, C, CW, variances)
        mean = variances.mean()
        for i in range(d):
            precision[i] = 1.0 / max(mean if kind == EQUAL else variances[i], floor * floor)
            for j in range(d):
                residual[i, j] = (1.0 if i == j else 0.0) - W[i, j]
                squares[i, j] = W[i, j] * W[i, j]
        inverse = np.linalg.inv(residual)
        exponential(squares, power, product)
        for i in range(d):
            for j in range(d):
                w = W[i, j]
                sign = (1.0 if w > 0.0 else 0.0) - (1.0 if w < 0.0 else 0.0)
                # dL/dW = -C (I - W) diag(q)^-1 + (I - W)^-T, the mean of q in place of each q_j for EQUAL;
                # d tr exp(W o W) / dW = 2 W o exp(W o W)'
                gradient = (CW[i, j] - C[i, j]) * precision[j] + inverse[j, i]
                gradient += lam * sign + 2.0 * lam_dag * w * power[j, i]
                first[i, j] = beta1 * first[i, j] + (1.0 - beta1) * gradient
                second[i, j] = beta2 * second[i, j] + (1.0 - beta2) * gradient * gradient
                W[i, j] = w - lr * unbias1 * first[i, j] / (np.sqrt(unbias2 * second[i, j]) + epsilon)
            W[i, i] = 0.0
