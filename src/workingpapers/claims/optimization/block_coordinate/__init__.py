"""Claims of "Let's Make Block Coordinate Descent Converge Faster".

The data are the paper's, drawn anew for every seed: A, B (least squares and logistic, 1000 x 10 000, columns of very
different length), C (softmax), D (labels on a lattice), E (two moons); and real ones, a graph of handwritten digits and
products of the measurements of breast tumours. The paper plots iterations only; the time of the same iterations stands
beside them here. Progress is f / f(0) where the infimum is 0 and (f - f*) / |f*| with f* from a direct solver
elsewhere.
"""

from workingpapers.claims.optimization.block_coordinate.forests import (
    all_of_it_together,
    authors_lattice,
    curvature_on_a_lattice,
    forests_by_time,
    forests_on_a_lattice,
    forests_on_neighbours,
    message_passing_is_exact,
    tree_solve,
)
from workingpapers.claims.optimization.block_coordinate.penalties import (
    active_set,
    lasso_to_the_same_gap,
)
from workingpapers.claims.optimization.block_coordinate.rules import (
    curvature_in_the_rule,
    estimated_constants,
    gradient_updates,
    greedy_with_large_blocks,
    other_losses,
    quadratic_rule_by_iterations,
    quadratic_rule_by_time,
    quadratic_rule_on_fixed_blocks,
    real_measurements,
    sorted_partition,
    thresholded_blocks_need_matrix_updates,
    variable_blocks,
)

__all__ = [
    "active_set",
    "all_of_it_together",
    "authors_lattice",
    "curvature_in_the_rule",
    "curvature_on_a_lattice",
    "estimated_constants",
    "forests_by_time",
    "forests_on_a_lattice",
    "forests_on_neighbours",
    "gradient_updates",
    "greedy_with_large_blocks",
    "lasso_to_the_same_gap",
    "message_passing_is_exact",
    "other_losses",
    "quadratic_rule_by_iterations",
    "quadratic_rule_by_time",
    "quadratic_rule_on_fixed_blocks",
    "real_measurements",
    "sorted_partition",
    "thresholded_blocks_need_matrix_updates",
    "tree_solve",
    "variable_blocks",
]
