"""Which block comes next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from workingpapers.optimization.block_coordinate import graphs
from workingpapers.optimization.block_coordinate.linear_algebra import solve
from workingpapers.optimization.block_coordinate.losses import Block, Loss, State, Vector
from workingpapers.optimization.block_coordinate.partition import FixedBlocks
from workingpapers.optimization.block_coordinate.quadratic import SparseQuadratic

Selection = Literal[
    "gsq",
    "gsd",
    "gsl",
    "gs",
    "gsq-nn",
    "iht",
    "random",
    "cyclic",
    "perm",
    "lipschitz",
    "greedy_tree",
    "greedy_tree_scaled",
    "random_tree",
    "tree",
    "red_black",
]
FORESTS = ("greedy_tree", "greedy_tree_scaled", "random_tree", "tree", "red_black")
GREEDY = ("gsq", "gsd", "gsl", "gs", "gsq-nn", "iht", "greedy_tree", "greedy_tree_scaled")
SMOOTH_ONLY = ("gsq", "iht", *FORESTS)

_IHT_STEPS = 10
_IHT_STILL = 1e-10


class Chosen(NamedTuple):
    """A block, and its number in the partition (-1 where blocks vary)."""

    block: Block
    number: int


Chooser = Callable[[State], Chosen]


def coordinate_scores(rule: Selection, state: State, curvature: Vector) -> Vector:
    """What each coordinate adds to the score of a block.

    r_i^2 for "gs"; r_i^2 / D_i for "gsl" and "gsd"; for "gsq-nn" the decrease -(g_i d_i + D_i d_i^2 / 2) of the
    coordinate's own model, plus that of h_i, at its minimiser d_i. r is the prox-gradient residual, which is the
    gradient g where there are neither bounds nor l1.

    Parameters
    ----------
    curvature : (n,), D_i above 0.
    """
    if rule == "gs":
        return np.asarray(np.square(state.residual()))
    if rule != "gsq-nn":
        return np.asarray(np.square(state.residual()) / curvature)
    loss, x = state.loss, state.x
    moved = loss.prox(x - state.g / curvature, curvature)
    d = moved - x
    decrease = -d * (state.g + 0.5 * curvature * d) + loss.l1 * (np.abs(x) - np.abs(moved))
    # A block that holds the support makes the exact update Newton's method. Ties with coordinates that rest at 0 go to
    # the support, whose decrease is 0 after it was solved to rounding.
    return np.asarray(np.where(x != 0.0, np.maximum(decrease, np.finfo(float).tiny), decrease))


def largest(scores: Vector, count: int) -> Block:
    """The places of the `count` largest scores, in increasing order."""
    if count >= len(scores):
        return np.arange(len(scores))
    return np.sort(np.argpartition(scores, -count)[-count:])


def fixed_chooser(
    rule: Selection, blocks: FixedBlocks, curvature: Vector, *, estimated: bool, rng: np.random.Generator
) -> Chooser:
    """A rule that chooses among the blocks of a partition.

    Parameters
    ----------
    curvature : (n,), D_i of the rule; read at every choice, so the estimates of the "la" update may change it.
    estimated : whether it holds such estimates, whose maximum stands in for L_b then.
    """
    count = len(blocks)
    sequence: list[int] = []

    def number(state: State) -> int:
        if rule in ("cyclic", "perm", "tree", "red_black"):
            if not sequence:
                sequence.extend(reversed(rng.permutation(count) if rule == "perm" else range(count)))
            return sequence.pop()
        if rule == "random":
            return int(rng.integers(count))
        if rule == "lipschitz":
            return int(rng.choice(count, p=blocks.lipschitz / blocks.lipschitz.sum()))
        if rule == "gsq":
            return int(np.argmax(blocks.newton_scores(state.g)))  # g_b^T H_b^+ g_b
        if rule == "gsl":
            bound = blocks.maxima(curvature) if estimated else blocks.lipschitz
            return int(np.argmax(blocks.sums(coordinate_scores("gs", state, curvature)) / bound))  # |g_b|^2 / L_b
        return int(np.argmax(blocks.sums(coordinate_scores(rule, state, curvature))))

    def choose(state: State) -> Chosen:
        k = number(state)
        return Chosen(blocks.blocks[k], k)

    return choose


def variable_chooser(
    rule: Selection, loss: Loss, size: int, curvature: Vector, *, safeguard: bool, rng: np.random.Generator
) -> Chooser:
    """A rule that forms any block of `size` coordinates; curvature as in `fixed_chooser`."""
    queue: list[Block] = []

    def choose(state: State) -> Chosen:
        if rule in ("cyclic", "perm"):
            if not queue:
                order = rng.permutation(loss.n) if rule == "perm" else np.arange(loss.n)
                queue.extend(order[k : k + size] for k in reversed(range(0, loss.n, size)))
            return Chosen(queue.pop(), -1)
        if rule == "random":
            return Chosen(rng.choice(loss.n, size, replace=False, shuffle=False), -1)
        if rule == "lipschitz":
            # The largest of log L_i + Gumbel noise are draws without replacement with probabilities L_i.
            noisy = np.where(loss.lipschitz > 0.0, np.log(loss.steps), -np.inf) + rng.gumbel(size=loss.n)
            return Chosen(largest(noisy, size), -1)
        if rule == "iht" or rule == "gsq":
            return Chosen(thresholded_block(state, size, safeguard), -1)
        return Chosen(largest(coordinate_scores(rule, state, curvature), size), -1)

    return choose


def thresholded_block(state: State, size: int, safeguard: bool) -> Block:
    """The support of an approximate minimiser of g^T d + d^T H d / 2 over d with at most `size` entries.

    Iterative hard thresholding d <- P(d - mu (g + H d)), mu = 1 / lambda_max(H), where P keeps the largest entries.
    The start d_i = -g_i / sqrt(L_i) matters: others give blocks that decrease f far less.

    Parameters
    ----------
    safeguard : compare with the block of "gsd", and return the one with the larger g_b^T H_b^+ g_b.
    """
    loss, g = state.loss, state.g
    d = -g / np.sqrt(loss.steps)
    product = loss.bound_product(d)
    block = largest(np.abs(d), size)
    for _ in range(_IHT_STEPS):
        target = d - (g + product) / loss.bound_norm
        block = largest(np.abs(target), size)
        kept = np.zeros_like(d)
        kept[block] = target[block]
        still = np.linalg.norm(kept - d) < _IHT_STILL
        d = kept
        if still:
            break
        product = loss.bound_product(d)
    if safeguard:
        other = largest(coordinate_scores("gsd", state, loss.steps), size)
        if newton_score(state, other) > newton_score(state, block):
            return other
    return block


def newton_score(state: State, block: Block) -> float:
    """g_b^T H_b^+ g_b."""
    return float(state.g[block] @ solve(state.loss.hess_bound(block), state.g[block]))


def working_set_chooser(loss: Loss, smallest: int, most: int) -> Chooser:
    """Blocks that grow with the solution: its support, and as many of the most promising other coordinates.

    Parameters
    ----------
    smallest, most : the sizes allowed, as far as that many coordinates are away from their own minimiser.
    """
    free = np.flatnonzero(loss.l1 == 0.0) if not loss.nonnegative else np.empty(0, np.int64)

    def choose(state: State) -> Chosen:
        scores = coordinate_scores("gsq-nn", state, loss.steps)
        support = np.flatnonzero(state.x)
        size = min(max(smallest, 2 * len(support)), most)
        if len(support) + len(free) < size:
            scores[support] = np.inf
            scores[free] = np.inf
        candidates = np.flatnonzero(scores > 0.0)
        return Chosen(candidates[largest(scores[candidates], size)], -1)

    return choose


def forest_chooser(rule: Selection, loss: SparseQuadratic, rng: np.random.Generator) -> Chooser:
    """Blocks that are forests of the graph of A, grown at every choice in the order of |g_i| or at random."""
    indptr, indices, _ = loss.arrays

    def choose(state: State) -> Chosen:
        if rule == "random_tree":
            order = rng.permutation(loss.n)
        else:
            scores = np.abs(state.g)
            order = np.argsort(-(scores / np.sqrt(loss.lipschitz) if rule == "greedy_tree_scaled" else scores))
        return Chosen(graphs.collect_forest(indptr, indices, order), -1)

    return choose


def forest_partition(rule: Selection, loss: SparseQuadratic) -> list[Block]:
    """The fixed forests of "tree" and "red_black"."""
    return graphs.tree_partition(loss.A) if rule == "tree" else graphs.red_black_partition(loss.A)
