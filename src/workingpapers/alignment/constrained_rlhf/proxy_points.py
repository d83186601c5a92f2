"""Proxy points: how much of each reward model is good for the outputs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy.polynomial.chebyshev import chebvander
from scipy.stats import gaussian_kde

from workingpapers.common.validation import check_finite, check_integer, check_number

_GRID = 10_000  # candidates altogether


@dataclass(frozen=True)
class RewardSurface:
    """A polynomial in the rewards, fitted to a measure of quality.

    Attributes
    ----------
    degree : largest total degree.
    low, high : the box of the data, mapped to [-1, 1].
    """

    degree: int
    low: Float[np.ndarray, " rewards"]
    high: Float[np.ndarray, " rewards"]
    _coefficients: Float[np.ndarray, " terms"]

    def __call__(self, returns: Float[np.ndarray, "points rewards"]) -> Float[np.ndarray, " points"]:
        """Predicted quality. Far from the data a polynomial means nothing."""
        return np.asarray(_features(returns, self.low, self.high, self.degree) @ self._coefficients)


@dataclass(frozen=True)
class ProxyPoints:
    """Where quality is highest.

    Attributes
    ----------
    theta : the joint proxy points, thresholds for `LagrangeMixer`.
    value : predicted quality there.
    independent : the proxy point of each reward when it is looked at alone; it differs where rewards are correlated.
    surface : the fitted polynomial.
    candidates : points that were compared.
    mask : which of them the data support; the others were left out.
    """

    theta: Float[np.ndarray, " rewards"]
    value: float
    independent: Float[np.ndarray, " rewards"]
    surface: RewardSurface
    candidates: Float[np.ndarray, "candidates rewards"]
    mask: Bool[np.ndarray, " candidates"]


def estimate_proxy_points(
    returns: Float[np.ndarray, "points rewards"],
    evals: Float[np.ndarray, " points"],
    *,
    degree: int | None = None,
    min_density: float | None = None,
    random_state: int = 0,
) -> ProxyPoints:
    """Find the mean returns at which quality is highest, from runs that each raised one or several rewards.

    A polynomial surface of quality over the returns is fitted by least squares and maximised where a Gaussian kernel
    density of the data is high enough: outside, polynomials extrapolate wildly.

    Parameters
    ----------
    returns : mean returns logged along training runs, usually one run for each reward model.
    evals : quality of the outputs at these points, higher is better.
    degree : of the polynomial; the paper takes 10, with many points. None: the degree from 1 to 10 with the smallest
        error in five-fold cross-validation.
    min_density : points whose density, per unit of volume of returns, is lower are left out; the paper takes 50 for two
        rewards. None: the density that a twentieth of the data fall below.
    random_state : of the folds, and of the candidates where there are more than two rewards.

    Raises
    ------
    ValueError : shapes differ, values are not finite, there are too few points, a reward never varies, or nothing is
        dense enough.
    """
    points = np.asarray(returns, dtype=float)
    quality = np.asarray(evals, dtype=float)
    if points.ndim != 2 or quality.shape != points.shape[:1]:
        raise ValueError(f"returns and evals must have shapes (n, N) and (n,), got {points.shape} and {quality.shape}")
    check_finite("returns", points)
    check_finite("evals", quality)
    if len(points) < 3 * (points.shape[1] + 1):
        raise ValueError(f"returns must have at least {3 * (points.shape[1] + 1)} points, got {len(points)}")
    if (np.ptp(points, axis=0) == 0).any():
        raise ValueError("each reward must vary over the points")
    if degree is not None:
        check_integer("degree", degree, at_least=1)
    if min_density is not None:
        check_number("min_density", min_density, at_least=0)
    rng = np.random.default_rng(random_state)
    surface = _fit(points, quality, degree, rng)
    theta, candidates, mask = _maximise(surface, points, min_density, rng)
    independent = []
    for column in points.T[:, :, None]:
        alone = _fit(column, quality, degree, rng)
        independent.append(float(_maximise(alone, column, min_density if points.shape[1] == 1 else None, rng)[0][0]))
    return ProxyPoints(theta, float(surface(theta[None])[0]), np.array(independent), surface, candidates, mask)


def _fit(points: np.ndarray, quality: np.ndarray, degree: int | None, rng: np.random.Generator) -> RewardSurface:
    low, high = points.min(0), points.max(0)
    if degree is None:
        fold = rng.permutation(np.arange(len(points)) % 5)
        errors = {}
        for candidate in range(1, 11):
            features = _features(points, low, high, candidate)
            if features.shape[1] > 0.8 * len(points):  # the training folds would be interpolated
                break
            errors[candidate] = sum(
                float(
                    np.sum(
                        (features[fold == k] @ _solve(features[fold != k], quality[fold != k]) - quality[fold == k])
                        ** 2
                    )
                )
                for k in range(5)
            )
        degree = min(errors, key=errors.__getitem__) if errors else 1
    return RewardSurface(degree, low, high, _solve(_features(points, low, high, degree), quality))


def _maximise(
    surface: RewardSurface, points: np.ndarray, min_density: float | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best candidate that the data support, all candidates, and which of them they support."""
    density = gaussian_kde(points.T)
    count = points.shape[1]
    if count <= 2:
        side = round(_GRID ** (1 / count))
        axes = [np.linspace(low, high, side) for low, high in zip(surface.low, surface.high, strict=True)]
        candidates = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, count)
    else:
        drawn = density.resample(_GRID, seed=rng).T
        candidates = np.concatenate([points, drawn[((drawn >= surface.low) & (drawn <= surface.high)).all(1)]])
    least = float(np.quantile(density(points.T), 0.05)) if min_density is None else min_density
    mask = density(candidates.T) >= least
    if not mask.any():
        raise ValueError(
            f"no point is dense enough: the highest density is {density(points.T).max():.3g}, lower min_density"
        )
    allowed = candidates[mask]
    return allowed[surface(allowed).argmax()], candidates, mask


def _features(points: np.ndarray, low: np.ndarray, high: np.ndarray, degree: int) -> np.ndarray:
    """Products of Chebyshev polynomials up to a total degree; they keep the least squares well conditioned."""
    scaled = 2.0 * (np.asarray(points, dtype=float) - low) / (high - low) - 1.0
    single = [chebvander(column, degree) for column in scaled.T]
    powers = [each for each in itertools.product(range(degree + 1), repeat=len(single)) if sum(each) <= degree]
    return np.stack(
        [np.prod([part[:, power] for part, power in zip(single, each, strict=True)], axis=0) for each in powers], 1
    )


def _solve(features: np.ndarray, quality: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.lstsq(features, quality, rcond=1e-10)[0])
