"""What the estimators of linear DAGs share: checked data, attributes, score, networkx; and the stages of descent."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import networkx as nx
import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted, validate_data

from workingpapers.causality.colide.kernels import (
    CONVERGED,
    LEFT_DOMAIN,
    OUT_OF_ITERATIONS,
    STEP_VANISHED,
    Matrix,
    Vector,
    minimise_stage,
)
from workingpapers.causality.graphs import to_dag, topological_order, weight_matrix
from workingpapers.common.validation import check_finite, check_integer, check_number

MAX_RESTARTS = 20  # of one stage; the authors' code restarts without a limit


class LinearDAGEstimator(BaseEstimator, ABC):
    """Base of the estimators of x = W' x + z from the covariance of x alone.

    A concrete class has a parameter `threshold` and says how W is estimated. After `fit` or `fit_cov`:

    Attributes
    ----------
    adjacency_ : (d, d), weights of the estimated DAG, entry (i, j) for i -> j: thresholded and acyclic.
    raw_adjacency_ : (d, d), the weights before thresholding.
    noise_std_ : standard deviations of z, in units of the data: one number where the method assumes one, else (d,).
    order_ : (d,), the nodes with every cause before its effects.
    location_ : (d,), column means of the training data; zeros after `fit_cov`.
    n_features_in_, feature_names_in_ : number of columns; their names, if X was a DataFrame.
    """

    threshold: float

    def fit(self, X: Float[np.ndarray, "n d"], y: object = None) -> Self:
        """Estimate the graph from data.

        Parameters
        ----------
        X : (n, d) array or DataFrame, samples in rows, n >= 2, d >= 2; centred here, in a copy. Fewer samples than
            columns are allowed, with a warning: the covariance is then singular.
        y : ignored.

        Raises
        ------
        ValueError : X is not finite, too small, or has a constant column; a parameter is out of range.
        """
        self._check_parameters()
        C, n_samples, location = self._covariance(X)
        return self._keep(*self._estimate(C, n_samples), location)

    def fit_cov(self, C: Matrix, n_samples: int) -> Self:
        """Estimate the graph from a covariance matrix, such as one accumulated over a stream.

        Parameters
        ----------
        C : (d, d), symmetric, positive semidefinite, with a positive diagonal; d >= 2.
        n_samples : n >= 2, the number of samples behind it.

        Raises
        ------
        ValueError : C is not such a matrix; a parameter is out of range.
        """
        self._check_parameters()
        C = weight_matrix("C", C)
        check_integer("n_samples", n_samples, at_least=2)
        if len(C) < 2:
            raise ValueError(f"C must be at least 2 x 2, got shape {C.shape}")
        if not np.allclose(C, C.T, rtol=1e-8, atol=1e-8 * float(np.abs(C).max())):
            raise ValueError("C must be symmetric")
        spectrum = np.linalg.eigvalsh(C)
        if np.diag(C).min() <= 0 or spectrum[0] < -1e-8 * spectrum[-1]:
            raise ValueError("C must be positive semidefinite with a positive diagonal")
        self.n_features_in_ = len(C)
        if hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        C = (C + C.T) / 2.0
        return self._keep(*self._estimate(C, n_samples), np.zeros(len(C)))

    def _covariance(self, X: Float[np.ndarray, "n d"]) -> tuple[Matrix, int, Vector]:
        """Checked data as covariance, number of samples and column means."""
        X = validate_data(self, X, dtype=np.float64, order="C", ensure_min_samples=2, ensure_min_features=2)
        with np.errstate(over="ignore"):
            location = X.mean(axis=0)
            centred = X - location
            C = centred.T @ centred / len(X)
        constant = np.flatnonzero((X.max(axis=0) == X.min(axis=0)) | (np.diag(C) < np.finfo(float).tiny))
        if constant.size:
            names = getattr(self, "feature_names_in_", np.arange(X.shape[1]))[constant]
            raise ValueError(f"X must not have constant columns, column {', '.join(map(str, names))} is constant")
        check_finite("the covariance of X", C)
        if X.shape[0] < X.shape[1]:
            warnings.warn(
                f"X has {X.shape[0]} samples of {X.shape[1]} variables: its covariance is singular, the fit unreliable",
                UserWarning,
                stacklevel=3,
            )
        return C, len(X), location

    def _keep(self, W: Matrix, noise_std: float | Vector, location: Vector) -> Self:
        self.raw_adjacency_, self.noise_std_, self.location_ = W, noise_std, location
        self.adjacency_ = to_dag(W, self.threshold)
        self.order_ = topological_order(self.adjacency_)
        return self

    @abstractmethod
    def _check_parameters(self) -> None:
        """Raise TypeError or ValueError unless every parameter is in range."""

    @abstractmethod
    def _estimate(self, C: Matrix, n_samples: int) -> tuple[Matrix, float | Vector]:
        """The weights before thresholding and the noise's standard deviations, from the covariance."""

    def _record(self, found: Descent) -> None:
        """Keep what a staged descent reports, and warn when it did not converge."""
        self.n_iter_ = found.n_iter
        self.n_restarts_ = found.restarts
        self.objective_path_ = found.objective_path
        self.stage_ = found.stage
        self.converged_ = not found.message
        if found.message:
            warnings.warn(f"{type(self).__name__} did not converge: {found.message}", ConvergenceWarning, stacklevel=5)

    def score(self, X: Float[np.ndarray, "n d"], y: object = None) -> float:
        """Negative unpenalised score of data under the thresholded graph: higher is better.

        -1/2 sum_j (q_j / sigma_j + sigma_j), with q_j the mean square of the residuals of column j (centred as the
        training data were) and sigma = noise_std_. It is largest where sigma_j = sqrt(q_j).

        Parameters
        ----------
        X : (n, d), finite.
        y : ignored.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        centred = X - self.location_
        residuals = np.square(centred - centred @ self.adjacency_).mean(axis=0)
        return -0.5 * float((residuals / self.noise_std_ + self.noise_std_).sum())

    def to_networkx(self, feature_names: Sequence[Any] | None = None) -> nx.DiGraph:
        """The estimated DAG with edge attribute "weight".

        Parameters
        ----------
        feature_names : d names for the nodes; by default the DataFrame's columns, else 0 to d - 1.
        """
        check_is_fitted(self)
        d = len(self.adjacency_)
        names = list(getattr(self, "feature_names_in_", range(d)) if feature_names is None else feature_names)
        if len(names) != d or len(set(names)) != d:
            raise ValueError(f"feature_names must be {d} different names, got {names}")
        graph = nx.from_numpy_array(self.adjacency_, create_using=nx.DiGraph)
        return nx.relabel_nodes(graph, dict(enumerate(names)))


@dataclass(frozen=True)
class Schedule:
    """The stages of DAGMA and CoLiDE: minimise mu_k S + h_{s_k}, each stage from where the last one ended."""

    stages: int
    mu: float
    mu_factor: float
    s: tuple[float, ...]
    max_iter: tuple[int, int]
    lr: float
    tol: float
    checkpoint: int

    @classmethod
    def of(cls, estimator: Any) -> Schedule:
        """Check the parameters of an estimator that has these names."""
        stages = check_integer("stages", estimator.stages, at_least=1)
        s = estimator.s if isinstance(estimator.s, Sequence) else (estimator.s,)
        if not s:
            raise ValueError(f"s must be a number or a sequence of numbers, got {estimator.s!r}")
        domain = [check_number("s", value, above=0.0) for value in s]
        limits = estimator.max_iter if isinstance(estimator.max_iter, Sequence) else (estimator.max_iter,) * 2
        if len(limits) != 2:
            raise ValueError(f"max_iter must be an integer or (earlier stages, last stage), got {estimator.max_iter!r}")
        return cls(
            stages,
            check_number("mu", estimator.mu, above=0.0),
            check_number("mu_factor", estimator.mu_factor, above=0.0, at_most=1.0),
            tuple(domain[min(stage, len(domain) - 1)] for stage in range(stages)),
            (check_integer("max_iter", limits[0], at_least=1), check_integer("max_iter", limits[1], at_least=1)),
            check_number("lr", estimator.lr, above=0.0),
            check_number("tol", estimator.tol, at_least=0.0),
            check_integer("checkpoint", estimator.checkpoint, at_least=1),
        )

    def limit(self, stage: int) -> int:
        """Iterations allowed in a stage, counted from 0."""
        return self.max_iter[stage == self.stages - 1]


@dataclass(frozen=True)
class Descent:
    """Where the stages ended.

    Attributes
    ----------
    W, sigma : raw weights and scales, one per node.
    n_iter : iterations made, those of restarted stages included.
    restarts : how many times a stage was restarted.
    objective_path, stage : the objective at the checkpoints, and the stage (from 1) of each.
    message : empty when the last stage converged, else what it did instead.
    """

    W: Matrix
    sigma: Vector
    n_iter: int
    restarts: int
    objective_path: Float[np.ndarray, " checkpoints"]
    stage: np.ndarray
    message: str


def descend(C: Matrix, start: Vector, floor: float, kind: int, lam: float, schedule: Schedule) -> Descent:
    """Run the stages from W = 0 and sigma = `start`, in compiled code."""
    W, sigma = np.zeros_like(C), start.copy()
    n_iter = restarts = 0
    objectives, stage_of = [np.empty(0)], [np.empty(0, dtype=int)]
    message = ""
    for stage in range(schedule.stages):
        mu, limit = schedule.mu * schedule.mu_factor**stage, schedule.limit(stage)
        s, lr = schedule.s[stage], schedule.lr
        for attempt in range(MAX_RESTARTS + 1):
            W_stage, sigma_stage, path = W.copy(), sigma.copy(), np.empty(limit // schedule.checkpoint + 1)
            ended, made, checkpoints = minimise_stage(
                W_stage, sigma_stage, C, floor, kind, lam, mu, s, lr, limit, schedule.tol, schedule.checkpoint, path
            )
            n_iter += made
            if ended != LEFT_DOMAIN:
                break
            restarts += attempt < MAX_RESTARTS
            s, lr = s + 0.1, lr / 2.0
        message = what_went_wrong(ended, stage + 1, limit, schedule.tol)
        if ended == LEFT_DOMAIN:
            break
        W, sigma = W_stage, sigma_stage
        objectives.append(path[:checkpoints])
        stage_of.append(np.full(checkpoints, stage + 1))
    return Descent(W, sigma, n_iter, restarts, np.concatenate(objectives), np.concatenate(stage_of), message)


def what_went_wrong(ended: int, stage: int, limit: int, tol: float) -> str:
    """Empty for a stage that converged, else a clause for people."""
    return {
        CONVERGED: "",
        OUT_OF_ITERATIONS: f"stage {stage} changed its objective by more than tol={tol:g} up to iteration {limit}",
        LEFT_DOMAIN: f"stage {stage} left the domain of the acyclicity function in each of {MAX_RESTARTS} restarts",
        STEP_VANISHED: f"stage {stage} stopped at the boundary of the domain, where its step vanished",
    }[ended]
