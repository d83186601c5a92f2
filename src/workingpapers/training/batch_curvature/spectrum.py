"""Spectra of batch Hessians: densities, extreme eigenvalues as the batch varies, variance of the batch noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.common.lanczos import LanczosResult as LanczosResult
from workingpapers.common.lanczos import lanczos as lanczos
from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number
from workingpapers.training.batch_curvature.laws import effective_batch
from workingpapers.training.batch_curvature.products import Curvature, Loss, Matrix, Mode, ggn_vp, hvp
from workingpapers.training.batch_curvature.sampling import Chunks, Data, Samples


def spectral_density(
    ritz: Float[Tensor, " k"] | Sequence[Float[Tensor, " k"]],
    weights: Float[Tensor, " k"] | Sequence[Float[Tensor, " k"]],
    grid: Float[Tensor, " points"],
    width: float,
) -> Float[Tensor, " points"]:
    """Density of eigenvalues by stochastic Lanczos quadrature, smoothed by a Gaussian.

    Parameters
    ----------
    ritz, weights : of one run of `lanczos` from a random start, or of several, whose densities are averaged. One run
        sees the spectrum with the weights of its start, with relative error about 1 / sqrt(n) a run.
    grid : points at which the density is wanted.
    width : standard deviation of the Gaussian, above 0, in units of the eigenvalues.

    Returns
    -------
    Tensor : the density, in sum (times the spacing of a fine grid) 1.
    """
    width = check_number("width", width, above=0)
    runs = [(ritz, weights)] if isinstance(ritz, Tensor) else list(zip(ritz, weights, strict=True))
    if not runs:
        raise ValueError("ritz must hold at least one run")
    points = torch.as_tensor(grid, dtype=torch.float64)
    density = torch.zeros_like(points)
    for nodes, masses in runs:
        if not isinstance(nodes, Tensor) or not isinstance(masses, Tensor) or nodes.shape != masses.shape:
            raise ValueError("ritz and weights must be tensors of one shape for each run")
        check_finite("ritz", nodes)
        distance = (points[:, None] - nodes.to(points)) / width
        density += torch.exp(-0.5 * distance.square()) @ masses.to(points) / (width * math.sqrt(2 * math.pi))
    return density / len(runs)


@dataclass(frozen=True)
class BatchExtremes:
    """Extreme Ritz values of several batches of one size.

    Attributes
    ----------
    top, bottom : largest and smallest Ritz value of each batch.
    batch_size : of them.
    """

    top: Float[np.ndarray, " repeats"]
    bottom: Float[np.ndarray, " repeats"]
    batch_size: int


def batch_extremes(
    model: nn.Module,
    loss_fn: Loss,
    dataset: Data,
    batch_size: int,
    repeats: int = 5,
    *,
    steps: int = 20,
    matrix: Matrix = "hessian",
    mode: Mode = "eval",
    micro_batch: int = 2048,
    seed: int = 0,
) -> BatchExtremes:
    """Largest and smallest eigenvalue of the curvature on batches of this size, each by one Lanczos run.

    Parameters
    ----------
    model, loss_fn, mode : as for `hvp`.
    dataset : (inputs, targets) as tensors, or a map-style data set of such pairs.
    batch_size : B, from 1 to the number of samples; batches are drawn without replacement.
    repeats : batches. A batch of all samples is measured once, since it does not vary.
    steps : of Lanczos. 20 are enough for the top value; the bottom one may want 40.
    matrix : "hessian" or "ggn".
    micro_batch : largest piece of a batch that goes through the model at once.
    seed : of the batches and of the starts.

    Raises
    ------
    FloatingPointError : the loss or a product is not finite.
    """
    check_choice("matrix", matrix, get_args(Matrix))
    samples = Samples(dataset)
    batch_size = samples.check_batch_size(batch_size)
    repeats = check_integer("repeats", repeats, at_least=1)
    generator = torch.Generator().manual_seed(check_integer("seed", seed, at_least=0))
    product = hvp if matrix == "hessian" else ggn_vp
    extremes = []
    for _ in range(1 if batch_size == len(samples) else repeats):
        batch = samples.draw(batch_size, generator)
        curvature = product(
            model, loss_fn, batch, mode=mode, micro_batch=None if batch_size <= micro_batch else micro_batch, seed=seed
        )
        start = torch.randn(curvature.n, generator=generator, dtype=torch.float64)
        ritz = spectrum_of(curvature, steps, start=start).ritz
        extremes.append((float(ritz[-1]), float(ritz[0])))
    top, bottom = np.array(extremes).T
    return BatchExtremes(top, bottom, batch_size)


def spectrum_of(curvature: Curvature, steps: int, *, seed: int = 0, start: Tensor | None = None) -> LanczosResult:
    """Lanczos on a `Curvature`, in its type and on its device."""
    return lanczos(curvature, curvature.n, steps, seed, start=start, dtype=curvature.dtype, device=curvature.device)


def batch_top_eigenvalue(
    model: nn.Module,
    loss_fn: Loss,
    dataset: Data,
    batch_size: int,
    repeats: int = 5,
    *,
    steps: int = 20,
    matrix: Matrix = "hessian",
    mode: Mode = "eval",
    micro_batch: int = 2048,
    seed: int = 0,
) -> float:
    """lambda_1(B): the mean over batches of the largest eigenvalue of the batch's curvature; see `batch_extremes`.

    The measurement that `fit_batch_curve` takes at three or more batch sizes.
    """
    found = batch_extremes(
        model,
        loss_fn,
        dataset,
        batch_size,
        repeats,
        steps=steps,
        matrix=matrix,
        mode=mode,
        micro_batch=micro_batch,
        seed=seed,
    )
    return float(found.top.mean())


@dataclass(frozen=True)
class NoiseVariance:
    """Variance of the entries of the batch noise H_B - H_emp, times the effective batch.

    Attributes
    ----------
    sigma2 : sigma^2.
    standard_error : of sigma2, from the spread over batches.
    Psigma2 : P sigma^2, the product in which the laws see it; P is the number of parameters.
    """

    sigma2: float
    standard_error: float
    Psigma2: float


def noise_variance(
    model: nn.Module,
    loss_fn: Loss,
    dataset: Data,
    batch_size: int,
    repeats: int = 10,
    *,
    matrix: Matrix = "hessian",
    mode: Mode = "eval",
    micro_batch: int = 2048,
    seed: int = 0,
) -> NoiseVariance:
    """sigma^2 of the additive model from the moment E ||H_B - H_emp||_F^2 = P^2 sigma^2 / b, b the effective batch.

    One probe v ~ N(0, I) a batch: E ||M v||^2 = ||M||_F^2. In networks a few directions carry most of the noise, which
    the model's independent entries do not describe: prefer `fit_batch_curve` on measured eigenvalues for predictions.

    Parameters
    ----------
    batch_size : B, below the number of samples.
    repeats : batches, at least 2 (for the standard error); 10 or more are advised.
    model, loss_fn, dataset, matrix, mode, micro_batch, seed : as for `batch_extremes`.
    """
    check_choice("matrix", matrix, get_args(Matrix))
    samples = Samples(dataset)
    batch_size = check_integer("batch_size", batch_size, at_least=1, at_most=len(samples) - 1)
    repeats = check_integer("repeats", repeats, at_least=2)
    generator = torch.Generator().manual_seed(check_integer("seed", seed, at_least=0))
    product = hvp if matrix == "hessian" else ggn_vp
    full = product(model, loss_fn, Chunks(samples, micro_batch), mode=mode, seed=seed)
    squares = np.empty(repeats)
    for index in range(repeats):
        batch = samples.draw(batch_size, generator)
        part = product(model, loss_fn, batch, mode=mode, micro_batch=micro_batch, seed=seed)
        v = torch.randn(full.n, generator=generator, dtype=torch.float64).to(full.device, full.dtype)
        squares[index] = float((part(v) - full(v)).double().square().sum())
    P = full.n
    estimates = float(effective_batch(batch_size, len(samples))) * squares / P**2
    error = float(estimates.std(ddof=1)) / math.sqrt(repeats)
    return NoiseVariance(float(estimates.mean()), error, P * float(estimates.mean()))
