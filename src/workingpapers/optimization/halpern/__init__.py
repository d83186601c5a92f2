"""Variance-reduced Halpern iteration for finite-sum monotone inclusions.

Solves 0 in F(u) + G(u), F = (1/n) sum_i F_i monotone on R^d and G given by its resolvent: min-max problems, matrix
games, variational inequalities, constrained convex fitting. The methods of the paper bound a residual that can be
computed, at the last iterate:

- `vr_halpern` (Algorithm 1) for F cocoercive, such as gradients of smooth convex functions;
- `vr_halpern_monotone` (Algorithm 2) for F monotone and Lipschitz, such as games; `vr_forb` (Algorithm 3) inside it.

`halpern`, `extra_anchored_gradient`, `extragradient` and `vr_extragradient` are what they are measured against.
Problems come as callables over index batches, as `FiniteSumOperator`, or from `least_squares_operator`,
`affine_operator` and `matrix_game`, whose loops are compiled.

When something else is better: with fewer than about a thousand components the full-operator methods; for a matrix
game that fits a linear program, `scipy.optimize.linprog`; where a bound at the last iterate is not needed,
`vr_extragradient` with a tuned step; for smooth convex minimisation, methods that use function values.

The gain over full-operator methods is at most sqrt(n) L_F / L, with L the constant on average and L_F that of F.

Reference: Cai, Alacaoglu and Diakonikolas, "Variance Reduced Halpern Iteration for Finite-Sum Monotone Inclusions",
ICLR 2024, arXiv 2310.02987. The numerical constants (the schedules of Algorithm 1, the accuracy (k+2)^-4 and
the inner step of Algorithm 2) have not been compared with the paper's text; the tests measure that they keep its rates.
VR-FoRB: Alacaoglu and Malitsky, "Stochastic Variance Reduction for Variational Inequality Methods", COLT 2022.
EAG: Yoon and Ryu, "Accelerated Algorithms for Smooth Convex-Concave Minimax Problems with O(1/k^2) Rate on Squared
Gradient Norm", ICML 2021.
"""

from workingpapers.optimization.halpern.baselines import extra_anchored_gradient, extragradient, vr_extragradient
from workingpapers.optimization.halpern.cocoercive import halpern, vr_halpern
from workingpapers.optimization.halpern.monotone import vr_forb, vr_halpern_monotone
from workingpapers.optimization.halpern.operators import (
    FiniteSumOperator,
    MatrixGame,
    affine_operator,
    least_squares_operator,
    matrix_game,
)
from workingpapers.optimization.halpern.prox import BoxProx, L1Prox, SimplexPairProx, identity_prox, simplex_prox
from workingpapers.optimization.halpern.result import MonotoneInclusionResult

__all__ = [
    "BoxProx",
    "FiniteSumOperator",
    "L1Prox",
    "MatrixGame",
    "MonotoneInclusionResult",
    "SimplexPairProx",
    "affine_operator",
    "extra_anchored_gradient",
    "extragradient",
    "halpern",
    "identity_prox",
    "least_squares_operator",
    "matrix_game",
    "simplex_prox",
    "vr_extragradient",
    "vr_forb",
    "vr_halpern",
    "vr_halpern_monotone",
]
