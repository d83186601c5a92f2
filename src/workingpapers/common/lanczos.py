"""Lanczos with full reorthogonalisation: extreme eigenvalues and spectral measure of a symmetric operator.

For operators known only by their products with vectors, such as Hessians of networks: m products give the extreme
eigenvalues to many digits, and Gauss quadrature of the whole spectrum against the start vector. Eigenvalues inside the
spectrum, or all of them, need a dense matrix; a few extreme ones of a sparse SciPy matrix are better left to `eigsh`,
which restarts and so needs less memory.

Reference: Golub and Van Loan, "Matrix Computations", 4th edition, chapter 10; for the quadrature, Golub and Meurant,
"Matrices, Moments and Quadrature", 2010.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workingpapers.common.validation import check_finite, check_integer

Matvec = Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]]


@dataclass(frozen=True)
class LanczosResult:
    """Spectrum of T = Q H Q^T, the operator on the Krylov space of k dimensions; all but `basis` on the CPU in float64.

    Attributes
    ----------
    ritz : eigenvalues of T, ascending. The extreme ones approach those of H from inside.
    weights : squared first components of the eigenvectors of T, in sum 1: nodes `ritz` with these weights are the Gauss
        quadrature of the start's spectral measure, exact for polynomials of degree 2 k - 1.
    residuals : ||H y - ritz y|| for each Ritz vector y; an eigenvalue of H lies within this distance of the Ritz value.
    coefficients : eigenvectors of T, as columns.
    basis : orthonormal rows q_1 ... q_k, or None when it was not asked for.
    exhausted : whether the Krylov space is invariant, so that all Ritz values are eigenvalues of H.
    """

    ritz: Float[Tensor, " k"]
    weights: Float[Tensor, " k"]
    residuals: Float[Tensor, " k"]
    coefficients: Float[Tensor, "k k"]
    basis: Float[Tensor, "k n"] | None
    exhausted: bool

    def __iter__(self) -> Iterator[Tensor | None]:
        """``ritz, weights, vectors = lanczos(...)``; the last is None when the basis was not kept."""
        return iter((self.ritz, self.weights, None if self.basis is None else self.vectors()))

    def vectors(self, which: int | slice | None = None) -> Float[Tensor, "*chosen n"]:
        """Ritz vectors as rows, of unit length: of all Ritz values, or of those that the index or slice chooses.

        Raises
        ------
        ValueError : the basis was not kept.
        """
        if self.basis is None:
            raise ValueError("vectors need the basis: call lanczos with keep_basis=True")
        chosen = self.coefficients.T[slice(None) if which is None else which]
        return chosen.to(self.basis) @ self.basis


def lanczos(
    matvec: Matvec,
    n: int,
    m: int,
    seed: int = 0,
    *,
    start: Float[Tensor, " n"] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    recursion_dtype: torch.dtype = torch.float64,
    keep_basis: bool = False,
) -> LanczosResult:
    """Run m steps of Lanczos on a symmetric operator.

    The basis is orthogonalised twice against all earlier vectors in every step, without which copies ("ghosts") of
    converged Ritz values appear. Costs m products, O(m^2 n) for the orthogonalisation and m n numbers of memory.

    Parameters
    ----------
    matvec : maps a vector of shape (n,), in `dtype` on `device`, to the product H v of the same shape. It must be
        linear, symmetric and the same at every call.
    n : dimension of the operator, at least 1.
    m : steps, at least 1; no more than n are made. 20 find the top eigenvalue of most networks, 40 to 100 a density.
    seed : of the random start N(0, I) / ||.||, drawn on the CPU so that it is the same on every device.
    start : a start of one's own, shape (n,), finite and not 0; scaled to unit length and not modified.
    dtype : of the vectors given to `matvec`. Its rounding error limits the accuracy of the Ritz values, to about
        1e-7 of the largest in float32.
    device : of those vectors and of the basis.
    recursion_dtype : of the basis and the orthogonalisation; float32 halves the memory and costs about a digit.
    keep_basis : needed for Ritz vectors.

    Returns
    -------
    LanczosResult : with fewer than m Ritz values when the Krylov space of the start is exhausted earlier.

    Raises
    ------
    ValueError : an argument is out of range, `start` is 0 or not finite, or the products turn out not to be symmetric
        (as those of a network with active dropout).
    FloatingPointError : a product is not finite.
    """
    n = check_integer("n", n, at_least=1)
    m = min(check_integer("m", m, at_least=1), n)
    for name, kind in (("dtype", dtype), ("recursion_dtype", recursion_dtype)):
        if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
            raise TypeError(f"{name} must be a floating-point torch.dtype, got {kind!r}")
    rounding = max(torch.finfo(dtype).eps, torch.finfo(recursion_dtype).eps)

    basis = torch.empty((m, n), dtype=recursion_dtype, device=device)
    basis[0] = _unit_start(n, seed, start).to(device, recursion_dtype)
    diagonal: list[float] = []  # alpha_j
    off: list[float] = []  # beta_j, the last of them the residual's length
    for j in range(m):
        q = basis[j]
        w = _product(matvec, q, dtype, j)
        earlier = basis[: j + 1]
        overlap = earlier @ w
        w = w - overlap @ earlier
        correction = earlier @ w  # what rounding left: "twice is enough"
        w = w - correction @ earlier
        overlap = (overlap + correction).double().cpu()
        diagonal.append(float(overlap[j]))
        off.append(float(torch.linalg.vector_norm(w)))
        size = max(max(map(abs, diagonal)), max(off))  # a lower bound of ||H||, up to a factor of about 1
        _check_symmetric(overlap, off, size, rounding)
        # below it the residual is rounding error and its direction means nothing
        if off[-1] <= 32 * rounding * size:
            break
        if j + 1 < m:
            basis[j + 1] = w / off[-1]

    k = len(diagonal)
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    beside = torch.tensor(off[: k - 1], dtype=torch.float64)
    T += torch.diag(beside, 1) + torch.diag(beside, -1)
    ritz, coefficients = torch.linalg.eigh(T)
    return LanczosResult(
        ritz=ritz,
        weights=coefficients[0].square(),
        residuals=off[-1] * coefficients[-1].abs(),
        coefficients=coefficients,
        basis=basis[:k] if keep_basis else None,
        exhausted=k == n or off[-1] <= 32 * rounding * size,
    )


def _unit_start(n: int, seed: int, start: Tensor | None) -> Tensor:
    if start is None:
        generator = torch.Generator().manual_seed(check_integer("seed", seed, at_least=0))
        vector = torch.randn(n, generator=generator, dtype=torch.float64)
    else:
        if not isinstance(start, Tensor) or start.shape != (n,):
            raise ValueError(f"start must be a tensor of shape ({n},), got {getattr(start, 'shape', start)!r}")
        check_finite("start", start)
        vector = start.detach().double()
    length = torch.linalg.vector_norm(vector)
    if not length > 0:
        raise ValueError("start must not be 0")
    unit: Tensor = vector / length
    return unit


def _product(matvec: Matvec, q: Tensor, dtype: torch.dtype, step: int) -> Tensor:
    given = q.to(dtype, copy=True)  # a copy, so that a careless matvec cannot change the basis
    product = matvec(given).detach()
    if product.shape != q.shape:
        raise ValueError(f"matvec must return shape {tuple(q.shape)}, got {tuple(product.shape)}")
    product = product.to(q)
    if not bool(product.isfinite().all()):
        raise FloatingPointError(f"product {step + 1} is not finite")
    return product


def _check_symmetric(overlap: Tensor, off: list[float], size: float, rounding: float) -> None:
    """In exact arithmetic H q_j has component beta_(j-1) along q_(j-1) and none along the vectors before it."""
    if len(overlap) == 1:
        return
    expected = torch.zeros(len(overlap) - 1, dtype=torch.float64)
    expected[-1] = off[-2]
    error = float((overlap[:-1] - expected).abs().max())
    if error > 10 * math.sqrt(rounding) * size:
        raise ValueError(
            f"matvec must be symmetric and the same at every call, but <q_i, H q_j> and <H q_i, q_j> differ by "
            f"{error:.1e} where ||H|| is about {size:.1e} (is dropout active, or the data shuffled or augmented?)"
        )
