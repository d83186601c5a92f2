"""Finite-sum monotone operators F = (1/n) sum_i F_i: from callables, least squares, affine components, matrix games."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number
from workingpapers.optimization.halpern._kernels import AFFINE, GAME, LEAST_SQUARES, Components
from workingpapers.optimization.halpern.prox import Prox, SimplexPairProx, Vector

Indices = Int[np.ndarray, "batch ..."]
Oracle = Callable[[Vector, Indices], Float[np.ndarray, "..."]]

_UNUSED_MATRIX, _UNUSED_VECTOR = np.empty((0, 0)), np.empty(0)
_CHUNK = 4096  # components evaluated at once when a full value is summed from batches


class FiniteSumOperator:
    """F = (1/n) sum_i F_i with its sampling distribution, constants and a counter of component evaluations.

    Parameters
    ----------
    batch : maps u, shape (d,), and indices, shape (b,), to the components F_i(u), shape (b, d), or their mean, (d,).
    n : number of components; the cost of one full value in component evaluations.
    full : maps u to F(u), shape (d,); by default F is summed from batches.
    probs : sampling probabilities q_i > 0, shape (n,), summing to 1; uniform by default. The unbiased estimate of F
        is then F_i / (n q_i), so `batch` must return the components, not their mean.
    cocoercivity : L with E||F_q(u) - F_q(v)||^2 <= L <F(u) - F(v), u - v>; None if unknown or if there is none.
    lipschitz : L with E||F_q(u) - F_q(v)||^2 <= L^2 ||u - v||^2; None if unknown.
    L_F : the Lipschitz constant of F; None if unknown. L_F <= L <= sqrt(n) L_F when the sampling is uniform, and
        variance reduction pays only when L is well below sqrt(n) L_F.
    prox : the resolvent that belongs to the problem, used by the solvers unless they are given another one.
    dimension : d; None accepts a start of any length.

    Attributes
    ----------
    oracle_calls : component evaluations made so far through `batch`, `difference`, `full` and the solvers.

    Raises
    ------
    ValueError, TypeError : an argument is out of range; the message names it.
    """

    def __init__(
        self,
        batch: Oracle,
        n: int,
        *,
        full: Callable[[Vector], Vector] | None = None,
        probs: Float[np.ndarray, " n"] | None = None,
        cocoercivity: float | None = None,
        lipschitz: float | None = None,
        L_F: float | None = None,
        prox: Prox | None = None,
        dimension: int | None = None,
    ) -> None:
        if not callable(batch):
            raise TypeError(f"batch must be callable, got {batch!r}")
        self.n = check_integer("n", n, at_least=1)
        for name, constant in (("cocoercivity", cocoercivity), ("lipschitz", lipschitz), ("L_F", L_F)):
            if constant is not None:
                check_number(name, constant, above=0.0)
        self.cocoercivity = cocoercivity
        self.lipschitz = lipschitz
        self.L_F = L_F
        self.prox = prox
        self.dimension = dimension
        self.oracle_calls = 0
        self._oracle = batch
        self._full = full
        self._cumulative: np.ndarray | None = None
        self._weight: np.ndarray | None = None
        self._components: Components | None = None
        if probs is not None:
            probs = _checked_probabilities(probs, self.n)
            self._weight = 1.0 / (self.n * probs)
            self._cumulative = _cumulative(probs)

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Int[np.ndarray, "*shape"]:
        """Draw independent oracle indices from Q."""
        if self._cumulative is None:
            return rng.integers(self.n, size=shape)
        drawn: np.ndarray = np.searchsorted(self._cumulative, rng.random(shape), side="right")
        return drawn

    def components(self, u: Vector, indices: Indices) -> Float[np.ndarray, "batch d"]:
        """F_i(u) / (n q_i) for every index: each row an unbiased estimate of F(u) when the index is drawn from Q."""
        self.oracle_calls += len(indices)
        rows: np.ndarray = np.asarray(self._oracle(u, indices), dtype=float)
        if rows.shape == u.shape:  # the callable averages, so ask for one component at a time
            rows = np.stack([np.asarray(self._oracle(u, indices[s : s + 1])).reshape(-1) for s in range(len(indices))])
        if rows.shape != (len(indices), len(u)):
            raise ValueError(_wrong_shape(rows, indices, u))
        if self._weight is not None:
            rows = rows * self._weight[indices, None]
        return rows

    def batch(self, u: Vector, indices: Indices) -> Vector:
        """The mean over the indices of F_i(u) / (n q_i), which estimates F(u) without bias; costs len(indices)."""
        self.oracle_calls += len(indices)
        value: np.ndarray = np.asarray(self._oracle(u, indices), dtype=float)
        if value.shape == u.shape and (self._weight is None or len(indices) == 1):
            value = value[None]
        elif value.shape == u.shape:
            raise ValueError("batch must return the components, shape (batch, d), where probs is given; got a mean")
        elif value.shape != (len(indices), len(u)):
            raise ValueError(_wrong_shape(value, indices, u))
        if self._weight is not None:
            value = value * self._weight[indices, None]
        mean: Vector = value.mean(axis=0)
        return mean

    def difference(self, u: Vector, v: Vector, indices: Indices) -> Vector:
        """batch(u, indices) - batch(v, indices): the same indices at both points; costs 2 len(indices)."""
        change: Vector = self.batch(u, indices) - self.batch(v, indices)
        return change

    def full(self, u: Vector) -> Vector:
        """F(u); costs n."""
        self.oracle_calls += self.n
        if self._full is not None:
            value = np.asarray(self._full(u), dtype=float)
            if value.shape != u.shape:
                raise ValueError(f"full must return an array of shape {u.shape}, got {value.shape}")
            return value
        total = np.zeros_like(u)
        for first in range(0, self.n, _CHUNK):
            indices = np.arange(first, min(first + _CHUNK, self.n))
            value = np.asarray(self._oracle(u, indices), dtype=float)
            if value.shape not in ((len(indices), len(u)), u.shape):
                raise ValueError(_wrong_shape(value, indices, u))
            total += value.sum(axis=0) if value.ndim == 2 else len(indices) * value
        return total / self.n

    def duality_gap(self, u: Vector) -> float | None:
        """A gap that certifies u, where the problem has one (see `MatrixGame`); otherwise None."""
        return None

    def natural_residual(self, u: Vector, prox: Prox, L_F: float, *, value: Vector | None = None) -> float:
        """R(u) = L_F ||u - J_{G/L_F}(u - F(u)/L_F)||; `value` is F(u) where it is known already.

        R(u) = 0 exactly at solutions, R(u) = ||F(u)|| when G = 0, and R(u) <= Res(u) = min over g in G(u) of
        ||F(u) + g|| always; the point J_{G/L_F}(u - F(u)/L_F) has Res <= 2 R(u).
        """
        value = self.full(u) if value is None else value
        return L_F * float(np.linalg.norm(u - prox(u - value / L_F, 1.0 / L_F)))

    def lipschitz_estimate(
        self,
        u: Vector,
        *,
        kind: str = "lipschitz",
        samples: int = 512,
        random_state: int | np.random.Generator | None = None,
    ) -> float:
        """Estimate a constant from differences around u: it is the largest ratio met, so too small rather than large.

        Three random directions d, each turned ten times to F(u + d) - F(u), which for an affine F whose matrix is
        symmetric or skew is the power method on L_F. L on average needs single components and is measured on
        `samples` draws, whose error goes both ways.

        Parameters
        ----------
        u : shape (d,); the differences are taken at a distance of 1 + ||u|| from it.
        kind : "full" for L_F, "lipschitz" for L on average, "cocoercive" for L in the cocoercive sense.
        samples : components drawn from Q for the second moment, at least 1.
        random_state : of the directions and the draws.

        Raises
        ------
        ValueError : the operator is not cocoercive around u, for kind="cocoercive".
        """
        check_choice("kind", kind, ("full", "lipschitz", "cocoercive"))
        check_integer("samples", samples, at_least=1)
        rng = np.random.default_rng(random_state)
        here = self.full(u)
        largest = 0.0
        for _ in range(3):
            direction = rng.standard_normal(len(u))
            for _ in range(10):
                direction *= (1.0 + np.linalg.norm(u)) / np.linalg.norm(direction)
                change = self.full(u + direction) - here
                size = float(np.linalg.norm(direction))
                if kind == "full":
                    ratio = float(np.linalg.norm(change)) / size
                else:
                    drawn = self.draw(rng, (samples,))
                    moved = self.components(u + direction, drawn) - self.components(u, drawn)
                    moment = float(np.mean(np.sum(moved**2, axis=1)))
                    if kind == "lipschitz":
                        ratio = np.sqrt(moment) / size
                    else:
                        inner = _cocoercive_product(change, direction)
                        ratio = moment / inner
                largest = max(largest, ratio)
                if not np.any(change):
                    break
                direction = change
        if not (np.isfinite(largest) and largest > 0.0):
            raise ValueError(f"L cannot be estimated: F is constant or not finite around u (largest ratio {largest})")
        return largest

    def check_cocoercive(
        self, u: Vector, L: float, *, pairs: int = 10, random_state: int | np.random.Generator | None = None
    ) -> None:
        """Raise ValueError if random pairs around u show that F is not cocoercive, or not with this L.

        Uses ||F(u) - F(v)||^2 <= E||F_q(u) - F_q(v)||^2 <= L <F(u) - F(v), u - v>, two full values a pair.

        Parameters
        ----------
        u : shape (d,).
        L : the constant to be refuted, above 0.
        pairs : at least 1.
        random_state : of the pairs.
        """
        rng = np.random.default_rng(random_state)
        scale = 1.0 + float(np.linalg.norm(u)) / np.sqrt(len(u))
        for _ in range(check_integer("pairs", pairs, at_least=1)):
            one, two = (u + scale * rng.standard_normal(len(u)) for _ in range(2))
            change = self.full(one) - self.full(two)
            if not np.any(change):
                continue
            needed = float(change @ change) / _cocoercive_product(change, one - two)
            if needed > L * (1.0 + 1e-8):
                raise ValueError(f"L={L:g} is too small for this operator: a random pair needs at least {needed:g}")


class MatrixGame(FiniteSumOperator):
    """The zero-sum game min_x max_y x^T A y on two probability simplices; u stacks x, then y.

    F(x, y) = (A y, -A^T x). One oracle call draws a row i and a column j with probabilities proportional to their
    squared norms and returns (A_.j y_j / q_j, -A_i. x_i / q_i), which gives L = ||A||_F against L_F = ||A||_2;
    a full value costs max(m, k) calls. The operator is skew, hence monotone but not cocoercive.

    Parameters
    ----------
    A : payoffs of the column player, shape (m, k), finite, not all zero.

    Raises
    ------
    ValueError : A is not a finite matrix, or is zero.
    """

    def __init__(self, A: Float[np.ndarray, "m k"]) -> None:
        A = _matrix("A", A)
        if not A.any():
            raise ValueError("A must have a nonzero entry: every pair of strategies is an equilibrium of the zero game")
        frobenius, spectral = float(np.linalg.norm(A)), float(np.linalg.norm(A, 2))
        super().__init__(
            self._mean,
            max(A.shape),
            lipschitz=frobenius,
            L_F=spectral,
            prox=SimplexPairProx(A.shape[0]),
            dimension=sum(A.shape),
        )
        self.A = A
        self._split = A.shape[0]
        row, column = (A**2).sum(axis=1) / frobenius**2, (A**2).sum(axis=0) / frobenius**2
        self._cumulative_row, self._cumulative_column = _cumulative(row), _cumulative(column)
        self._components = Components(
            GAME, A, np.ascontiguousarray(A.T), _UNUSED_VECTOR, _inverse(row), _inverse(column)
        )

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Int[np.ndarray, "*shape 2"]:
        """Draw independent pairs of a row and a column."""
        uniform = rng.random((*shape, 2))
        return np.stack(
            [
                np.searchsorted(self._cumulative_row, uniform[..., 0], side="right"),
                np.searchsorted(self._cumulative_column, uniform[..., 1], side="right"),
            ],
            axis=-1,
        )

    def components(self, u: Vector, indices: Indices) -> Float[np.ndarray, "batch d"]:
        self.oracle_calls += len(indices)
        assert self._components is not None
        x, y = self.strategies(u)
        i, j = indices[:, 0], indices[:, 1]
        left = self.A.T[j] * (y[j] * self._components.column_weight[j])[:, None]
        right = self.A[i] * (x[i] * self._components.row_weight[i])[:, None]
        return np.concatenate([left, -right], axis=1)

    def batch(self, u: Vector, indices: Indices) -> Vector:
        mean: Vector = self.components(u, indices).mean(axis=0)
        return mean

    def difference(self, u: Vector, v: Vector, indices: Indices) -> Vector:
        self.oracle_calls += len(indices)
        return self.batch(u - v, indices)  # linear

    def full(self, u: Vector) -> Vector:
        self.oracle_calls += self.n
        return self._mean(u)

    def uniform_start(self) -> Vector:
        """Both players mix all their actions equally."""
        m, k = self.A.shape
        return np.concatenate([np.full(m, 1.0 / m), np.full(k, 1.0 / k)])

    def strategies(self, u: Vector) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " k"]]:
        """The row player's and the column player's halves of u."""
        return u[: self._split], u[self._split :]

    def value(self, u: Vector) -> float:
        """x^T A y, the expected payoff to the column player."""
        x, y = self.strategies(u)
        return float(x @ self.A @ y)

    def duality_gap(self, u: Vector) -> float:
        """max_y' x^T A y' - min_x' x'^T A y: what the players could gain by deviating, 0 exactly at an equilibrium.

        A certificate when the strategies lie on the simplices, as those returned by the solvers do, up to rounding.
        """
        x, y = self.strategies(u)
        return float(np.max(x @ self.A) - np.min(self.A @ y))

    def _mean(self, u: Vector, indices: Indices | None = None) -> Vector:
        x, y = self.strategies(u)
        return np.concatenate([self.A @ y, -(x @ self.A)])  # F(x, y) = (A y, -A^T x)


def matrix_game(A: Float[np.ndarray, "m k"]) -> MatrixGame:
    """The game min_x max_y x^T A y as an operator for `vr_halpern_monotone` and the extragradient methods."""
    return MatrixGame(A)


def least_squares_operator(
    A: Float[np.ndarray, "n d"],
    b: Float[np.ndarray, " n"],
    *,
    probs: Float[np.ndarray, " n"] | None = None,
    prox: Prox | None = None,
) -> FiniteSumOperator:
    """F_i(u) = a_i (a_i^T u - b_i): the gradient of ||A u - b||^2 / (2 n), component by component, compiled.

    Parameters
    ----------
    A : design, shape (n, d), finite, not all zero.
    b : response, shape (n,), finite.
    probs : sampling probabilities, shape (n,), positive; proportional to ||a_i||^2 they minimise the constant.
    prox : the resolvent of the constraint or penalty.

    Returns
    -------
    FiniteSumOperator : with its exact constants; the cocoercive one is the largest generalised eigenvalue of
        A^T D A against A^T A, D = diag(||a_i||^2 / (n q_i)).

    Raises
    ------
    ValueError : A or b has a wrong shape or is not finite.
    """
    A, b = _matrix("A", A), _vector("b", b)
    n = len(A)
    if len(b) != n:
        raise ValueError(f"b must have one entry per row of A, {n}, got {len(b)}")
    if not A.any():
        raise ValueError("A must have a nonzero entry")

    def components(u: Vector, indices: Indices) -> Float[np.ndarray, "batch d"]:
        rows = A[indices]
        return np.asarray(rows * (rows @ u - b[indices])[:, None])

    operator = FiniteSumOperator(
        components, n, full=lambda u: (A @ u - b) @ A / n, probs=probs, prox=prox, dimension=A.shape[1]
    )
    weight = np.ones(n) if operator._weight is None else operator._weight
    D = (A**2).sum(axis=1) * weight
    left, singular, _ = np.linalg.svd(A, full_matrices=False)
    left = left[:, singular > 1e-12 * singular[0]]
    operator.cocoercivity = float(np.linalg.eigvalsh(left.T @ (D[:, None] * left))[-1])
    operator.lipschitz = float(np.sqrt(np.linalg.eigvalsh(A.T @ (D[:, None] * A) / n)[-1]))
    operator.L_F = float(singular[0] ** 2 / n)
    operator._components = Components(LEAST_SQUARES, A, _UNUSED_MATRIX, b, weight, _UNUSED_VECTOR)
    return operator


def affine_operator(
    M: Float[np.ndarray, "n d d"],
    c: Float[np.ndarray, "n d"],
    *,
    probs: Float[np.ndarray, " n"] | None = None,
    prox: Prox | None = None,
) -> FiniteSumOperator:
    """F_i(u) = M_i u + c_i, compiled: linear-quadratic games, robust least squares, AUC maximisation.

    Parameters
    ----------
    M : matrices, shape (n, d, d), finite; their mean must have a positive semidefinite symmetric part.
    c : offsets, shape (n, d), finite.
    probs : sampling probabilities, shape (n,), positive.
    prox : the resolvent of the constraint or penalty.

    Returns
    -------
    FiniteSumOperator : with its exact constants; `cocoercivity` is None where the operator is not cocoercive.
        A full value is computed with the mean matrix, and counted as n component evaluations all the same.

    Raises
    ------
    ValueError : a shape is wrong, an entry is not finite, or F is not monotone.
    """
    M, c = np.ascontiguousarray(M, dtype=float), np.ascontiguousarray(c, dtype=float)
    if M.ndim != 3 or M.shape[1] != M.shape[2] or 0 in M.shape:
        raise ValueError(f"M must have shape (n, d, d), got {M.shape}")
    n, d = M.shape[:2]
    if c.shape != (n, d):
        raise ValueError(f"c must have shape {(n, d)}, got {c.shape}")
    check_finite("M", M)
    check_finite("c", c)
    mean, offset = M.mean(axis=0), c.mean(axis=0)
    spectrum, basis = np.linalg.eigh((mean + mean.T) / 2.0)
    spectral = float(np.linalg.norm(mean, 2))
    if spectrum[0] < -1e-10 * max(spectral, 1.0):
        raise ValueError(f"M must have a monotone mean; its symmetric part has the eigenvalue {spectrum[0]:g}")

    def components(u: Vector, indices: Indices) -> Float[np.ndarray, "batch d"]:
        return np.asarray(M[indices] @ u + c[indices])

    operator = FiniteSumOperator(components, n, full=lambda u: mean @ u + offset, probs=probs, prox=prox, dimension=d)
    weight = np.ones(n) if operator._weight is None else operator._weight
    stacked = M.reshape(n * d, d)
    moment = (stacked * np.repeat(weight, d)[:, None]).T @ stacked / n  # E M_q^T M_q
    largest = float(np.linalg.eigvalsh(moment)[-1])
    operator.lipschitz = float(np.sqrt(largest)) if largest > 0.0 else None
    operator.L_F = spectral or None
    positive = spectrum > 1e-12 * max(spectrum[-1], spectral)
    kernel, scaled = basis[:, ~positive], basis[:, positive] / np.sqrt(spectrum[positive])
    if positive.any() and np.linalg.norm(moment @ kernel) <= 1e-10 * largest:
        operator.cocoercivity = float(np.linalg.eigvalsh(scaled.T @ moment @ scaled)[-1])
    operator._components = Components(AFFINE, stacked, mean, offset, weight, _UNUSED_VECTOR)
    return operator


def _cocoercive_product(change: Vector, direction: Vector) -> float:
    inner = float(change @ direction)
    if inner <= 1e-10 * float(np.linalg.norm(change) * np.linalg.norm(direction)):
        raise ValueError("operator is not cocoercive; use vr_halpern_monotone")
    return inner


def _matrix(name: str, value: Float[np.ndarray, "m k"]) -> Float[np.ndarray, "m k"]:
    matrix = np.array(value, dtype=float, order="C")  # a copy: the caller's array may change later
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{name} must be a matrix, got shape {matrix.shape}")
    check_finite(name, matrix)
    return matrix


def _vector(name: str, value: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    vector = np.array(value, dtype=float)
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"{name} must be a vector, got shape {vector.shape}")
    check_finite(name, vector)
    return vector


def _checked_probabilities(probs: Float[np.ndarray, " n"], n: int) -> Float[np.ndarray, " n"]:
    probs = _vector("probs", probs)
    if len(probs) != n or not (probs > 0).all():
        raise ValueError(f"probs must be {n} positive numbers, got {len(probs)} with smallest {probs.min():g}")
    if abs(probs.sum() - 1.0) > 1e-8:
        raise ValueError(f"probs must sum to 1, got {probs.sum():g}")
    return probs


def _cumulative(probs: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    cumulative = np.cumsum(probs)
    return np.asarray(cumulative / cumulative[-1])


def _inverse(probs: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    weight: np.ndarray = np.divide(1.0, probs, out=np.zeros_like(probs), where=probs > 0.0)
    return weight  # what is never drawn has weight 0


def _wrong_shape(value: np.ndarray, indices: Indices, u: Vector) -> str:
    return f"batch must return shape {(len(indices), len(u))} or {u.shape}, got {value.shape}"
