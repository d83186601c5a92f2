"""Implicit differentiation: exact derivatives of the solution of an optimisation problem, without unrolling its solver.

State a condition F(x, θ) = 0 (`custom_root`) or T(x, θ) = x (`custom_fixed_point`) that the solution satisfies, in
plain torch code, and decorate any solver with it, differentiable or not. The solution's derivative in θ is then one
linear system, A J = -∂_2 F with A = ∂_1 F, solved by products with A:

    from workingpapers.optimization.implicit_diff import custom_root

    def gradient(w, penalty):
        return X.T @ (X @ w - y) / len(y) + penalty * w

    @custom_root(gradient)
    def ridge(start, penalty):
        return scipy_or_sklearn_or_your_own(...)

    validation_loss(ridge(None, penalty)).backward()

Time and memory do not depend on how many iterations the solver took, and the derivative's error is proportional to
the solution's: |J(x̂) - J(x*)| <= C |x̂ - x*|, C = β/α + γR/α² for |A⁻¹| <= 1/α, ∂_2 F and A Lipschitz with β and γ,
|∂_2 F| <= R (Theorem 1). Unrolling is better when the solution is far from converged and F has kinks whose active set
is not yet right, and when the derivative wanted is that of the truncated iteration itself.

Tensors that the condition captures by closure receive no gradient: pass them as arguments. Where x* is not
differentiable (at a kink, without strict complementarity) one element of the generalised derivative is returned.
Forward mode over forward mode is refused; every other composition of torch.func's transforms works, as does
`torch.autograd`'s own double backward, but not its `is_grads_batched`, for which torch.func.vmap is the replacement.

Reference: Blondel, Berthet, Cuturi, Frostig, Hoyer, Llinares-López, Pedregosa and Vert, "Efficient and Modular
Implicit Differentiation", NeurIPS 2022 (arXiv 2105.15183).
"""

from workingpapers.common import prox
from workingpapers.optimization.implicit_diff import linear_solve, optimality, projection
from workingpapers.optimization.implicit_diff.decorators import (
    ImplicitSolver,
    LinearSolveInfo,
    custom_fixed_point,
    custom_root,
    jacobian,
    root_jvp,
    root_vjp,
)
from workingpapers.optimization.implicit_diff.linear_solve import LinearSolution
from workingpapers.optimization.implicit_diff.solvers import lasso, ridge, svm_dual, svm_weights

__all__ = [
    "ImplicitSolver",
    "LinearSolution",
    "LinearSolveInfo",
    "custom_fixed_point",
    "custom_root",
    "jacobian",
    "lasso",
    "linear_solve",
    "optimality",
    "projection",
    "prox",
    "ridge",
    "root_jvp",
    "root_vjp",
    "svm_dual",
    "svm_weights",
]
