"""Block coordinate descent with greedy blocks, exact block updates and message passing.

Minimises F(x) = f(x) + sum_i h_i(x_i), f smooth and convex, h_i zero, l1_i |x_i| or the bound x_i >= 0, moving one
block of coordinates at a time. Three choices are independent: the blocks (any coordinates, or a partition), the rule
that selects one (from cyclic to the greedy rules that look at gradient and curvature), and the update of the chosen
block (from a gradient step to an exact solution). On sparse quadratics a block may be a forest with half of all
coordinates, which message passing solves exactly in linear time; with l1, blocks as large as the support end in
Newton's method.

When something else is better. Greedy rules need the whole gradient: they pay where updating it costs little more than
the block's own columns, in sparse data or a sparse Hessian, and where a block is a small share of the coordinates
(0.005 and less); at larger shares random or cyclic blocks catch up. A smooth problem with few coordinates is faster by
L-BFGS or Newton; a sparse quadratic that fits in memory by a sparse direct solver.

Reference: Nutini, Laradji and Schmidt, "Let's Make Block Coordinate Descent Converge Faster: Faster Greedy Rules,
Message-Passing, Active-Set Complexity, and Superlinear Convergence", JMLR 23(131), 2022, arXiv 1712.08859. Fixed blocks
are scored by squared norms, the form of the paper's bounds; the authors' code sums absolute values there. Working sets
and the stop on the duality gap follow celer (Massias, Gramfort and Salmon, 2018) and skglm (Bertrand et al., 2022).
"""

from workingpapers.optimization.block_coordinate.estimators import BCDClassifier, BCDRegressor, LabelPropagationBCD
from workingpapers.optimization.block_coordinate.graphs import (
    forest_solve,
    greedy_forest,
    red_black_partition,
    tree_partition,
)
from workingpapers.optimization.block_coordinate.linear import (
    LeastSquares,
    Logistic,
    NonnegativeL1LeastSquares,
    Softmax,
)
from workingpapers.optimization.block_coordinate.losses import Loss
from workingpapers.optimization.block_coordinate.quadratic import SparseQuadratic
from workingpapers.optimization.block_coordinate.solver import BlockCoordinateDescent

__all__ = [
    "BCDClassifier",
    "BCDRegressor",
    "BlockCoordinateDescent",
    "LabelPropagationBCD",
    "LeastSquares",
    "Logistic",
    "Loss",
    "NonnegativeL1LeastSquares",
    "Softmax",
    "SparseQuadratic",
    "forest_solve",
    "greedy_forest",
    "red_black_partition",
    "tree_partition",
]
