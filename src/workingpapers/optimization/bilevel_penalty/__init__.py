"""Bilevel optimisation by a penalty, with gradients only: no Hessians, no unrolling.

Minimises ψ(x) = min f(x, y) over y in S(x) = argmin g(x, .) on Y, for x in X: hyper-parameter tuning, data cleaning,
meta-learning, Stackelberg games. The lower level may have many minimisers, constraints, and be nonconvex as long as
it satisfies an error bound near its solutions (Polyak-Łojasiewicz is one). With h_σ = σ f + g,

    ψ_σ(x) = (min_y h_σ(x, y) - min_z g(x, z)) / σ,
    ∇ψ_σ(x) = ∇_x f(x, y) + (∇_x g(x, y) - ∇_x g(x, z)) / σ at the two minimisers y and z,

are O(σ)-close to ψ and ∇ψ:

    from workingpapers.optimization.bilevel_penalty import PenaltyBilevel

    solver = PenaltyBilevel(validation_loss, training_loss, sigma=1e-2, lr_x=0.05, lr_y=0.1)
    x, y, info = solver.run(x0, y0, iters=500)
    info.stationarity[-1], info.bias_estimate, info.gradient_calls

Where the lower level is strongly convex and Hessian-vector products are cheap, implicit differentiation
(`hypergradient(method="cg")`, `optimization.implicit_diff`) has no bias and needs no σ. With one or two
hyper-parameters a grid search is simpler. Where the lower-level solution jumps with x, there is no error bound, and
∇ψ_σ grows like 1/σ instead of converging.

Reference: Kwon, Kwon, Wright and Nowak, "On Penalty Methods for Nonconvex Bilevel Optimization and First-Order
Stochastic Approximation", ICLR 2024 (arXiv 2309.01753). No official code was found. The structure of its two algorithms
is followed; the step-size schedules are this library's own choice within the family that the paper analyses.
"""

from workingpapers.common import projection as projections
from workingpapers.optimization.bilevel_penalty.hypergradient import hypergradient
from workingpapers.optimization.bilevel_penalty.penalty import penalty_gradient, penalty_value
from workingpapers.optimization.bilevel_penalty.solver import BilevelResult, Decay, PenaltyBilevel

__all__ = [
    "BilevelResult",
    "Decay",
    "PenaltyBilevel",
    "hypergradient",
    "penalty_gradient",
    "penalty_value",
    "projections",
]
