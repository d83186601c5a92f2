"""Concomitant linear DAG estimation (CoLiDE): a causal graph and its noise scales, learned together.

Learns the weighted DAG of a linear structural equation model x = W' x + z from observations, by continuous
optimisation. Of the methods of its family (NOTEARS, GOLEM, DAGMA) it is the one to take when the noise level is not
known, because it estimates the scale of the noise with the graph and its sparsity weight needs less retuning. When the
causes of each variable are known up to their order, regressing along that order is better; when relations are not
linear, or hidden causes are likely, take a constraint-based method (PC, FCI) instead.

What it does not do. The published argument is that lam ~ sqrt(log d / n) no longer depends on the noise level, as in a
regression on fixed regressors. Here the regressors are themselves made of noise: multiply all data by c, and CoLiDE
with (lam, mu) returns the W of CoLiDE on the original data with (lam / c, c mu), where DAGMA needs (lam / c^2, c^2 mu).
The dependence on the noise level is weakened from variance to standard deviation, not removed;
`standardise_scale=True` removes it. And the order of the variables is found mostly from their scales: on columns
divided by their own standard deviations every method of this family degrades.

Reference: Saboksayr, Mateos and Tepper, "CoLiDE: Concomitant Linear DAG Estimation", ICLR 2024 (arXiv 2310.02895).
The acyclicity function and the stages are those of DAGMA: Bello, Aragam and Ravikumar, "DAGMA: Learning DAGs via
M-matrices and a Log-Determinant Acyclicity Characterization", NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from sklearn.base import clone
from sklearn.utils import check_random_state

from workingpapers.causality.colide.base import Descent, LinearDAGEstimator, Schedule, descend
from workingpapers.causality.colide.kernels import EQUAL, UNEQUAL, Matrix, Vector
from workingpapers.common.validation import check_choice, check_number


class CoLiDE(LinearDAGEstimator):
    """Linear DAG and noise scales by concomitant estimation.

    Minimises, over W and sigma >= sigma_0, in stages k with mu_k falling and s_k falling,

        mu_k S(W, sigma) + h_{s_k}(W),      h_s(W) = d log s - log det(sI - W o W),

    where h is zero exactly on DAGs, C = X'X / n is the covariance, and S, jointly convex, is

        "equal" (EV):    tr((I - W)' C (I - W)) / (2 sigma) + d sigma / 2 + lam |W|_1
        "unequal" (NV):  tr(diag(sigma)^-1 (I - W)' C (I - W)) / 2 + sum_i sigma_i / 2 + lam |W|_1.

    Each iteration is one Adam step on W and the closed form for sigma. Entries of W never reach zero exactly, so the
    threshold is a part of the method. The fit sees X only through C and is O(d^3) per iteration.

    Parameters
    ----------
    variances : "equal" where all noises are assumed as strong, "unequal" where each has its own scale.
    lam : at least 0, weight of |W|_1; 0.05 in all of the paper's experiments.
    threshold : at least 0; weights up to it are set to zero after the fit, and then the weakest edges of what is left
        until no cycle remains.
    stages : at least 1.
    mu, mu_factor : mu_k = mu * mu_factor^(k - 1); mu positive, mu_factor in (0, 1].
    s : positive s_k, one per stage (the last repeats), or one number. W o W stays below s_k in spectral radius.
    max_iter : iterations allowed in (all stages but the last, the last stage), or one number for both.
    lr : positive step length of Adam.
    tol : at least 0; a stage ends when its objective changes by at most this, relative, between checkpoints.
    checkpoint : iterations between evaluations of the objective.
    scale_floor : positive; sigma_0 is this times the smallest standard deviation of a column. It matters where a
        column is a function of others. (The paper has such a floor but the authors' code none, and its size there
        is not known to us; one relative to the largest columns could exceed the noise itself.)
    standardise_scale : divide the data by the smallest standard deviation of a column and put it back into
        `noise_std_`: makes W independent of the units of the data, as long as all columns share them.
    backend : "numpy" runs compiled code on one CPU core per call; "torch" runs the same iterations in torch, which
        pays where a GPU is at hand and d is in the hundreds, or with `fit_many`.
    device : where the torch backend computes, such as "cuda"; the CPU by default.
    random_state : accepted as every estimator of graphs does, checked, and not used: the fit starts from W = 0 and
        draws nothing.

    Attributes
    ----------
    adjacency_, raw_adjacency_, noise_std_, order_, location_ : see `LinearDAGEstimator`; `noise_std_` is a number for
        "equal" and (d,) for "unequal".
    n_iter_ : iterations made, those of restarted stages included.
    objective_path_ : mu_k S + h_{s_k} at the checkpoints, in units of `standardise_scale`.
    stage_ : the stage, from 1, in which each entry of `objective_path_` was taken.
    converged_ : whether the last stage met `tol`; if not, `fit` warns with a `ConvergenceWarning`.
    n_restarts_ : how often a stage left the domain of h and was restarted with half the step and s + 0.1.

    Examples
    --------
    >>> from workingpapers.causality import CoLiDE, dag_metrics, simulate_linear_sem
    >>> truth, X = simulate_linear_sem(10, edges_per_node=2, random_state=0)
    >>> dag_metrics(truth, CoLiDE(variances="equal").fit(X).adjacency_).shd
    0
    """

    def __init__(
        self,
        variances: Literal["equal", "unequal"] = "unequal",
        lam: float = 0.05,
        threshold: float = 0.3,
        *,
        stages: int = 4,
        mu: float = 1.0,
        mu_factor: float = 0.1,
        s: float | Sequence[float] = (1.0, 0.9, 0.8, 0.7),
        max_iter: int | tuple[int, int] = (20_000, 70_000),
        lr: float = 3e-4,
        tol: float = 1e-6,
        checkpoint: int = 1000,
        scale_floor: float = 1e-2,
        standardise_scale: bool = False,
        backend: Literal["numpy", "torch"] = "numpy",
        device: str | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.variances = variances
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
        self.scale_floor = scale_floor
        self.standardise_scale = standardise_scale
        self.backend = backend
        self.device = device
        self.random_state = random_state

    def _check_parameters(self) -> None:
        check_choice("variances", self.variances, ("equal", "unequal"))
        check_choice("backend", self.backend, ("numpy", "torch"))
        check_number("lam", self.lam, at_least=0.0)
        check_number("threshold", self.threshold, at_least=0.0)
        check_number("scale_floor", self.scale_floor, above=0.0)
        check_choice("standardise_scale", self.standardise_scale, (False, True))
        check_random_state(self.random_state)
        Schedule.of(self)

    def fit_many(self, datasets: Sequence[Float[np.ndarray, "n d"]]) -> list[CoLiDE]:
        """Fit one model per data set, side by side where the backend is "torch".

        Parameters
        ----------
        datasets : arrays or DataFrames as `fit` takes them, of any numbers of samples; for the torch backend all with
            the same number of columns.

        Returns
        -------
        Fitted clones of this estimator, in order; this one stays as it is.
        """
        models = [clone(self) for _ in datasets]
        if self.backend == "numpy":
            return [model.fit(X) for model, X in zip(models, datasets, strict=True)]
        self._check_parameters()
        prepared = [model._covariance(X) for model, X in zip(models, datasets, strict=True)]
        sizes = sorted({len(C) for C, _, _ in prepared})
        if len(sizes) > 1:
            raise ValueError(f"datasets must all have the same number of columns for the torch backend, got {sizes}")
        estimates = self._descend([C for C, _, _ in prepared]) if prepared else []
        for model, (found, unit), (_, _, location) in zip(models, estimates, prepared, strict=True):
            model._keep(*model._describe(found, unit), location)
        return models

    def _estimate(self, C: Matrix, n_samples: int) -> tuple[Matrix, float | Vector]:
        return self._describe(*self._descend([C])[0])

    def _descend(self, covariances: list[Matrix]) -> list[tuple[Descent, float]]:
        """What the stages found for each covariance, and the unit in which it was measured."""
        units = [float(np.sqrt(np.diag(C).min())) if self.standardise_scale else 1.0 for C in covariances]
        scaled = [C / unit**2 for C, unit in zip(covariances, units, strict=True)]
        kind, schedule = EQUAL if self.variances == "equal" else UNEQUAL, Schedule.of(self)
        deviations = [np.sqrt(np.diag(C)) for C in scaled]
        # sigma for W = 0; with equal noises the smallest deviation is that of a node without causes
        starts = [np.full(len(each), each.min()) if kind == EQUAL else each for each in deviations]
        floors = [self.scale_floor * float(each.min()) for each in deviations]
        if self.backend == "torch":
            from workingpapers.causality.colide.batched import descend_together  # torch takes seconds to import

            found = descend_together(scaled, starts, floors, kind, self.lam, schedule, self.device)
        else:
            found = [
                descend(C, start, floor, kind, self.lam, schedule)
                for C, start, floor in zip(scaled, starts, floors, strict=True)
            ]
        return list(zip(found, units, strict=True))

    def _describe(self, found: Descent, unit: float) -> tuple[Matrix, float | Vector]:
        self._record(found)
        sigma = unit * found.sigma
        return found.W, float(sigma[0]) if self.variances == "equal" else sigma
