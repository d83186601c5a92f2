"""Equality-constrained minimisation by Newton-KKT steps that are solved only roughly, by random sketches.

Minimises f(x) subject to c(x) = 0. The Newton system of every iteration is solved by sketch-and-project, which reads a
few rows (or a few random combinations of rows) of the KKT matrix at a time, and the error is controlled through an
exact augmented Lagrangian, whose penalties stay bounded: global convergence, and locally the rate that the accuracy of
the solves allows. `minimize_equality` is the solver, for torch functions (derivatives by autograd) or NumPy functions
with given derivatives; `sketch_project` the inner solver; `ExactAugmentedLagrangian` the merit function.

When something else is better. Nearly always, where cost matters: with the paper's accuracy one inner solve takes some
50 ||K||_F² / σ_min(K)² row steps, far more operations than GMRES, and than a factorisation of a matrix of a few
hundred rows. `sketch="exact"` and `sketch="gmres"` run the same method without the sketches; with sketches,
`accuracy="relative"` is 4 to 45 times cheaper. What remains for sketches is a large, well-conditioned, sparse KKT
matrix that fills in when it is factorised, or one of which only rows can be had. For small problems SciPy's SLSQP and
trust-constr are faster, and they also take inequalities and Jacobians without full rank.

`l1_sqp` and `augmented_lagrangian` are what the paper compares with; `hock_schittkowski`, `sphere_logistic`,
`poisson_control` and `sparse_quadratic` are problems to try a solver on.

Reference: Hong, Na, Mahoney and Kolar, "Constrained Optimization via Exact Augmented Lagrangian and Randomized
Iterative Sketching", ICML 2023, arXiv 2305.18379. The constants are those of the authors' code, with three differences:
∇L_η uses the Hessian of the Lagrangian, where their code uses that of f; an inner solve also ends when rounding keeps
its residual from falling; and the line search tolerates the rounding error of L_η. Sketch and project: Gower and
Richtárik, "Randomized Iterative Methods for Linear Systems", 2015.
"""

from workingpapers.optimization.sketched_newton.baselines import augmented_lagrangian, l1_sqp
from workingpapers.optimization.sketched_newton.linear import sketch_project
from workingpapers.optimization.sketched_newton.merit import ExactAugmentedLagrangian
from workingpapers.optimization.sketched_newton.problems import (
    HOCK_SCHITTKOWSKI,
    EqualityProblem,
    hock_schittkowski,
    poisson_control,
    sparse_quadratic,
    sphere_logistic,
)
from workingpapers.optimization.sketched_newton.solver import Constants, EqualityResult, minimize_equality

__all__ = [
    "HOCK_SCHITTKOWSKI",
    "Constants",
    "EqualityProblem",
    "EqualityResult",
    "ExactAugmentedLagrangian",
    "augmented_lagrangian",
    "hock_schittkowski",
    "l1_sqp",
    "minimize_equality",
    "poisson_control",
    "sketch_project",
    "sparse_quadratic",
    "sphere_logistic",
]
