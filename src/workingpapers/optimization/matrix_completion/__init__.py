"""Low-rank matrix completion by alternating minimisation that tolerates inexact least squares.

Fills in a large, nearly low-rank matrix M from a random sample of entries. Alternating minimisation solves one small
regression per row or column in every sweep; solving it exactly costs s k^2 for s entries and rank k. `RobustAltMin`
solves it by a few warm-started conjugate gradient steps of O(s k), preconditioned through a sketch, and loses no sweep:
a bounded forward error of the regressions leaves the factors incoherent and the contraction of each sweep intact.

When something else is better. A row of s entries must outweigh its sketch, which costs some 2 k^3: below s of about
10 k, or a rank below a few dozen, `exact_als` is as fast. `inner="cg"` has no such cost, and is enough where no row of
M dominates. For ratings, where entries are noisy and not sampled uniformly, take `reg` above 0 and subtract means
first, or use `soft_impute`, whose problem is convex.

`exact_als` and `soft_impute` are what it is measured against; `weighted_multi_regression`, `spectral_init` and
`clip_rows` are its parts.

Reference: Gu, Song, Yin and Zhang, "Low Rank Matrix Completion via Robust Alternating Minimization in Nearly Linear
Time", ICLR 2024, arXiv 2302.11068. The paper analyses fresh entries for every half-step and gives no code and no
experiments; its constants are not reproduced here. Outer algorithm: Jain, Netrapalli and Sanghavi, "Low-rank Matrix
Completion using Alternating Minimization", STOC 2013. Sketch as preconditioner: Rokhlin and Tygert, "A fast randomized
algorithm for overdetermined linear least-squares regression", PNAS 2008.
"""

from workingpapers.optimization.matrix_completion.alternating import Completion
from workingpapers.optimization.matrix_completion.baselines import exact_als, soft_impute
from workingpapers.optimization.matrix_completion.estimator import RobustAltMin
from workingpapers.optimization.matrix_completion.regression import Regressions, weighted_multi_regression
from workingpapers.optimization.matrix_completion.spectral import clip_rows, spectral_init

__all__ = [
    "Completion",
    "Regressions",
    "RobustAltMin",
    "clip_rows",
    "exact_als",
    "soft_impute",
    "spectral_init",
    "weighted_multi_regression",
]
