"""The estimators CoLiDE is compared with, under its interface: DAGMA, GOLEM-EV, GOLEM-NV and sorting by variance.

References: Bello, Aragam and Ravikumar, "DAGMA: Learning DAGs via M-matrices and a Log-Determinant Acyclicity
Characterization", NeurIPS 2022; Ng, Ghassami and Zhang, "On the Role of Sparsity and DAG Constraints for Learning
Linear DAGs" (GOLEM), NeurIPS 2020; Reisach, Seiler and Weichwald, "Beware of the Simulated DAG! Causal Discovery
Benchmarks May Be Easy to Game" (sorting and regressing), NeurIPS 2021.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from scipy.linalg import expm
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lars_path_gram

from workingpapers.causality.colide.base import LinearDAGEstimator, Schedule, descend
from workingpapers.causality.colide.kernels import EQUAL, FIXED, UNEQUAL, Matrix, Vector, golem_steps
from workingpapers.common.validation import check_integer, check_number

_FLOOR = 1e-6  # of the residuals' deviations, over the smallest deviation of a column: keeps logarithms finite


class DAGMALinear(LinearDAGEstimator):
    """Linear DAG by DAGMA: least squares, an l1 penalty and a log-determinant acyclicity function.

    CoLiDE with sigma held at 1: the score is tr((I - W)' C (I - W)) / 2 + lam |W|_1, so `lam` is in squared units of
    the data. `noise_std_` is the residuals' common standard deviation. Parameters and attributes are those of
    `CoLiDE`, the defaults those of DAGMA's authors.
    """

    def __init__(
        self,
        lam: float = 0.03,
        threshold: float = 0.3,
        *,
        stages: int = 5,
        mu: float = 1.0,
        mu_factor: float = 0.1,
        s: float | Sequence[float] = (1.0, 0.9, 0.8, 0.7, 0.6),
        max_iter: int | tuple[int, int] = (30_000, 60_000),
        lr: float = 3e-4,
        tol: float = 1e-6,
        checkpoint: int = 1000,
    ) -> None:
        self.lam = lam
        self.threshold = threshold
        self.stages = stages
        self.mu = mu
        self.mu_factor = mu_factor
        self.s = s
        self.max_iter = max_iter
        self.lr = lr
        self.tol = tol
        self.checkpoint = checkpoint

    def _check_parameters(self) -> None:
        check_number("lam", self.lam, at_least=0.0)
        check_number("threshold", self.threshold, at_least=0.0)
        Schedule.of(self)

    def _estimate(self, C: Matrix, n_samples: int) -> tuple[Matrix, float]:
        found = descend(C, np.ones(len(C)), 0.0, FIXED, self.lam, Schedule.of(self))
        self._record(found)
        return found.W, float(np.sqrt(residual_variances(found.W, C).mean()))


class GolemEV(LinearDAGEstimator):
    """Linear DAG by GOLEM-EV: Gaussian likelihood with equal variances, penalised by |W|_1 and NOTEARS' acyclicity.

    Parameters
    ----------
    lam, lam_dag : at least 0, weights of |W|_1 and of tr exp(W o W) - d.
    threshold : as in `CoLiDE`.
    max_iter : Adam steps, all of them made, as the authors do.
    lr : positive step length of Adam.
    tol : positive; when the last tenth of the steps changed the objective by more than this share of its change over
        all steps, `fit` warns with a `ConvergenceWarning`.

    Attributes
    ----------
    noise_std_ : the residuals' common standard deviation.
    n_iter_, converged_ : steps made; whether `tol` was met.
    """

    def __init__(
        self,
        lam: float = 2e-2,
        threshold: float = 0.3,
        *,
        lam_dag: float = 5.0,
        max_iter: int = 100_000,
        lr: float = 1e-3,
        tol: float = 1e-2,
    ) -> None:
        self.lam = lam
        self.threshold = threshold
        self.lam_dag = lam_dag
        self.max_iter = max_iter
        self.lr = lr
        self.tol = tol

    def _check_parameters(self) -> None:
        _check_golem(self)

    def _estimate(self, C: Matrix, n_samples: int) -> tuple[Matrix, float]:
        W, self.converged_ = _golem(self, C, np.zeros_like(C), EQUAL)
        self.n_iter_ = self.max_iter
        return W, float(np.sqrt(residual_variances(W, C).mean()))


class GolemNV(LinearDAGEstimator):
    """Linear DAG by GOLEM-NV: as GOLEM-EV with one variance per node, started from GOLEM-EV's solution.

    Parameters and attributes are those of `GolemEV`, and
    lam_start : the l1 weight of the GOLEM-EV fit that gives the start, for which the other parameters are shared.
    noise_std_ : (d,), the residuals' standard deviations.
    """

    def __init__(
        self,
        lam: float = 2e-3,
        threshold: float = 0.3,
        *,
        lam_start: float = 2e-2,
        lam_dag: float = 5.0,
        max_iter: int = 100_000,
        lr: float = 1e-3,
        tol: float = 1e-2,
    ) -> None:
        self.lam = lam
        self.threshold = threshold
        self.lam_start = lam_start
        self.lam_dag = lam_dag
        self.max_iter = max_iter
        self.lr = lr
        self.tol = tol

    def _check_parameters(self) -> None:
        _check_golem(self)
        check_number("lam_start", self.lam_start, at_least=0.0)

    def _estimate(self, C: Matrix, n_samples: int) -> tuple[Matrix, Vector]:
        start = GolemEV(
            self.lam_start, self.threshold, lam_dag=self.lam_dag, max_iter=self.max_iter, lr=self.lr, tol=self.tol
        )
        W, _ = start._estimate(C, n_samples)
        W, self.converged_ = _golem(self, C, W, UNEQUAL)
        self.n_iter_ = 2 * self.max_iter
        return W, np.sqrt(residual_variances(W, C))


def _check_golem(estimator: GolemEV | GolemNV) -> None:
    check_number("lam", estimator.lam, at_least=0.0)
    check_number("lam_dag", estimator.lam_dag, at_least=0.0)
    check_number("threshold", estimator.threshold, at_least=0.0)
    check_integer("max_iter", estimator.max_iter, at_least=1)
    check_number("lr", estimator.lr, above=0.0)
    check_number("tol", estimator.tol, above=0.0)


def _golem(estimator: GolemEV | GolemNV, C: Matrix, start: Matrix, kind: int) -> tuple[Matrix, bool]:
    floor = _FLOOR * float(np.sqrt(np.diag(C).min()))
    W, first, second = start.copy(), np.zeros_like(C), np.zeros_like(C)
    weights = (floor, kind, float(estimator.lam), float(estimator.lam_dag))
    last_tenth = estimator.max_iter - max(1, estimator.max_iter // 10)
    objectives = [golem_objective(W, C, *weights)]
    for begin, end in ((0, last_tenth), (last_tenth, estimator.max_iter)):
        golem_steps(W, first, second, C, *weights, float(estimator.lr), begin, end)
        objectives.append(golem_objective(W, C, *weights))
    before, nearly, after = objectives
    converged = abs(after - nearly) <= estimator.tol * abs(after - before)
    if not converged:
        warnings.warn(
            f"GOLEM did not converge: the last tenth of {estimator.max_iter} steps changed the objective by "
            f"{abs(after - nearly):.2g} of {abs(after - before):.2g}",
            ConvergenceWarning,
            stacklevel=5,
        )
    return W, converged


def golem_objective(W: Matrix, C: Matrix, floor: float, kind: int, lam: float, lam_dag: float) -> float:
    """GOLEM's penalised negative log-likelihood per sample, up to a constant; see `kernels.golem_steps`."""
    d = len(W)
    variances = np.maximum(residual_variances(W, C), floor**2)
    likelihood = d * np.log(variances.sum()) if kind == EQUAL else np.log(variances).sum()
    penalty = lam * np.abs(W).sum() + lam_dag * (np.trace(expm(W * W)) - d)
    return float(0.5 * likelihood - np.linalg.slogdet(np.eye(d) - W)[1] + penalty)


def residual_variances(W: Matrix, C: Matrix) -> Vector:
    """diag((I - W)' C (I - W)), the mean squares of x - W' x."""
    R = np.eye(len(W)) - W
    variances: Vector = np.maximum(np.einsum("ij,ij->j", R, C @ R), 0.0)  # rounding may leave less than 0
    return variances


class SortNRegress(LinearDAGEstimator):
    """Linear DAG by sorting the variables by variance and regressing each on those before it.

    The test of whether data are easy: what this finds, the scale of the variables gives away (see `varsortability`).
    Each regression is an adaptive lasso, its columns weighted by their least-squares coefficients, its penalty chosen
    along the LARS path by the Bayesian information criterion.

    Parameters
    ----------
    threshold : at least 0; smaller weights are set to zero. 0.3 as for the other estimators; 0 leaves the choice to
        the criterion.

    Attributes
    ----------
    noise_std_ : (d,), the residuals' standard deviations.
    """

    def __init__(self, threshold: float = 0.3) -> None:
        self.threshold = threshold

    def _check_parameters(self) -> None:
        check_number("threshold", self.threshold, at_least=0.0)

    def _estimate(self, C: Matrix, n_samples: int) -> tuple[Matrix, Vector]:
        if n_samples <= len(C):
            raise ValueError(f"SortNRegress needs more samples than variables, got {n_samples} of {len(C)}")
        W = np.zeros_like(C)
        order = np.argsort(np.diag(C), kind="stable")
        for place in range(1, len(order)):
            before, node = order[:place], order[place]
            W[before, node] = _adaptive_lasso(C[np.ix_(before, before)], C[before, node], C[node, node], n_samples)
        return W, np.sqrt(residual_variances(W, C))


def _adaptive_lasso(gram: Matrix, moments: Vector, variance: float, n_samples: int) -> Vector:
    """Coefficients of a column of this variance on columns of this covariance, by adaptive lasso and BIC."""
    least_squares = np.linalg.lstsq(gram, moments, rcond=None)[0]
    full = max(variance - float(moments @ least_squares), 0.0)  # mean square of the residuals
    weight = np.abs(least_squares)
    _, _, path = lars_path_gram(
        moments * weight, gram * np.outer(weight, weight), n_samples=n_samples, method="lasso", alpha_min=0.0
    )
    coefficients = path * weight[:, None]
    residual = variance - 2.0 * moments @ coefficients + np.einsum("ik,ij,jk->k", coefficients, gram, coefficients)
    noise = full * n_samples / max(n_samples - len(gram) - 1, 1)
    # BIC with a known noise variance: n rss / noise + log(n) times the number of columns used
    criterion = n_samples * residual + noise * np.log(n_samples) * (coefficients != 0).sum(axis=0)
    best: Vector = coefficients[:, int(np.argmin(criterion))]
    return best
