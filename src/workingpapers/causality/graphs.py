"""Weighted directed acyclic graphs: simulation from linear structural equation models, repair, and comparison.

A graph is a networkx DiGraph whose edges carry `weight`, or a matrix W with W[i, j] != 0 exactly when i -> j. Data
follow the linear structural equation model x = W' x + z, in rows X = Z (I - W)^-1.

Simulation is the protocol of Saboksayr, Mateos and Tepper, "CoLiDE: Concomitant Linear DAG Estimation", ICLR 2024,
which the papers of this family share (NOTEARS, GOLEM, DAGMA). Two warnings come with it. In data simulated so, the
variance of a node almost always exceeds that of its causes, and sorting nodes by variance is nearly enough to find the
order (Reisach, Seiler and Weichwald, "Beware of the Simulated DAG!", NeurIPS 2021): look at `varsortability`. And with
Gaussian noise of unequal variances only the Markov equivalence class can be found: look at `shd_cpdag`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import networkx as nx
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.linalg import solve_triangular
from sklearn.utils import check_random_state

from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number

Graph: TypeAlias = nx.DiGraph | Float[np.ndarray, "d d"]
RandomState = int | np.random.RandomState | None
GraphModel = Literal["er", "sf"]
Noise = Literal["gaussian", "exponential", "laplace", "gumbel"]
Variances = Literal["equal", "unequal"]

UNEQUAL_RANGE = (0.5, 10.0)  # of the noise variances, in the paper's experiments


@dataclass(frozen=True)
class DAGMetrics:
    """How far an estimated graph is from the true one.

    Attributes
    ----------
    shd : structural Hamming distance: edges missing, extra or reversed (a reversal counts once).
    shd_cpdag : pairs of nodes that the two Markov equivalence classes join differently (no edge, ->, <- or --); None
        when the truth has a cycle.
    fdr : share of the estimated edges that are reversed or extra; 0 for an empty estimate.
    tpr : share of the true edges found with the right direction; 1 when the truth is empty.
    fpr : reversed and extra edges over the pairs that are not joined in the truth; 0 when there is no such pair.
    nnz : number of estimated edges.
    """

    shd: int
    shd_cpdag: int | None
    fdr: float
    tpr: float
    fpr: float
    nnz: int


def simulate_linear_sem(
    nodes: int,
    graph: GraphModel = "er",
    edges_per_node: float = 2,
    *,
    noise: Noise = "gaussian",
    variances: Variances = "equal",
    variance: float = 1.0,
    weights: tuple[float, float] = (0.5, 2.0),
    samples: int = 1000,
    random_state: RandomState = None,
) -> tuple[nx.DiGraph, Float[np.ndarray, "samples d"]]:
    """Draw a random weighted DAG and data from its linear structural equation model.

    Parameters
    ----------
    nodes : d, at least 2.
    graph : "er": every pair is joined with the same probability (Erdős-Rényi) and directed along a random order;
        "sf": preferential attachment (Barabási-Albert), from the newer node to the older one, labels shuffled.
    edges_per_node : expected edges over d; at most (d - 1) / 2. For "sf" an integer below d: edges of each new node.
    noise : distribution of z. "exponential" and "gumbel" are not centred.
    variances : "equal": all noise variances are `variance`; "unequal": `variance` times uniform draws from [0.5, 10].
    variance : positive, in squared units of the data.
    weights : 0 < low <= high; edge weights are uniform in [-high, -low] and [low, high].
    samples : n, at least 1.
    random_state : seed or RandomState; fixes graph and data.

    Returns
    -------
    The graph (nodes 0 to d - 1, edge attribute "weight") and X, samples in rows.

    Raises
    ------
    TypeError, ValueError : an argument is not of the kind or in the range above.
    """
    check_choice("variances", variances, get_args(Variances))
    check_number("variance", variance, above=0.0)
    rng = check_random_state(random_state)
    W = simulate_dag(nodes, graph, edges_per_node, weights=weights, random_state=rng)
    scale = rng.uniform(*UNEQUAL_RANGE, size=nodes) if variances == "unequal" else np.ones(nodes)
    X = sample_linear_sem(W, np.sqrt(variance * scale), samples, noise=noise, random_state=rng)
    return nx.from_numpy_array(W, create_using=nx.DiGraph), X


def simulate_dag(
    nodes: int,
    graph: GraphModel = "er",
    edges_per_node: float = 2,
    *,
    weights: tuple[float, float] = (0.5, 2.0),
    random_state: RandomState = None,
) -> Float[np.ndarray, "d d"]:
    """Weighted adjacency matrix of a random DAG; the arguments are those of `simulate_linear_sem`."""
    check_integer("nodes", nodes, at_least=2)
    check_choice("graph", graph, get_args(GraphModel))
    low, high = weights
    check_number("weights[0]", low, above=0.0)
    check_number("weights[1]", high, at_least=low)
    rng = check_random_state(random_state)
    if graph == "er":
        check_number("edges_per_node", edges_per_node, at_least=0.0, at_most=(nodes - 1) / 2)
        probability = 2.0 * edges_per_node / (nodes - 1)  # E = d edges_per_node of d (d - 1) / 2 pairs
        edges = np.triu(rng.uniform(size=(nodes, nodes)) < probability, k=1)
    else:
        check_integer("edges_per_node", edges_per_node, at_least=1, at_most=nodes - 1)
        attached = nx.barabasi_albert_graph(nodes, edges_per_node, seed=int(rng.randint(2**31)))
        edges = np.tril(nx.to_numpy_array(attached) != 0, k=-1)
    label = rng.permutation(nodes)
    magnitude = rng.uniform(low, high, size=edges.shape)
    sign = rng.choice([-1.0, 1.0], size=edges.shape)
    W = np.zeros(edges.shape)
    W[np.ix_(label, label)] = np.where(edges, sign * magnitude, 0.0)
    return W


def sample_linear_sem(
    W: Graph,
    noise_std: float | Float[np.ndarray, " d"],
    samples: int,
    *,
    intercepts: Float[np.ndarray, " d"] | None = None,
    noise: Noise = "gaussian",
    random_state: RandomState = None,
) -> Float[np.ndarray, "samples d"]:
    """Draw data from x = intercepts + W' x + z for a given weighted DAG.

    Parameters
    ----------
    W : weighted adjacency matrix or DiGraph, acyclic.
    noise_std : standard deviations of z: one number, or one per node; positive.
    samples : n, at least 1.
    intercepts : added to z, one per node; 0 by default.
    noise : distribution of z, of `simulate_linear_sem`.
    random_state : seed or RandomState.

    Raises
    ------
    ValueError : W has a cycle, or an argument is out of range.
    """
    W = weight_matrix("W", W)
    order = topological_order(W)
    if order is None:
        raise ValueError("W must be acyclic, it has a cycle")
    check_integer("samples", samples, at_least=1)
    check_choice("noise", noise, get_args(Noise))
    deviations = np.asarray(noise_std, dtype=float)
    if deviations.shape not in ((), (len(W),)) or not (np.isfinite(deviations) & (deviations > 0)).all():
        raise ValueError(f"noise_std must be positive and one number or {len(W)}, got {noise_std!r}")
    rng = check_random_state(random_state)
    shape = (samples, len(W))
    if noise == "gaussian":
        Z = rng.normal(size=shape)
    elif noise == "exponential":
        Z = rng.exponential(size=shape)
    elif noise == "laplace":
        Z = rng.laplace(scale=1.0 / math.sqrt(2.0), size=shape)  # variance 2 scale^2
    else:
        Z = rng.gumbel(scale=math.sqrt(6.0) / math.pi, size=shape)  # variance (pi scale)^2 / 6
    Z *= deviations
    if intercepts is not None:
        Z += np.asarray(intercepts, dtype=float)
    # X (I - W) = Z: in topological order I - W is upper triangular with a unit diagonal.
    X = np.empty(shape)
    triangle = np.eye(len(W)) - W[np.ix_(order, order)]
    X[:, order] = solve_triangular(triangle, Z[:, order].T, trans="T", unit_diagonal=True).T
    return X


def weight_matrix(name: str, graph: Graph) -> Float[np.ndarray, "d d"]:
    """A fresh float64 matrix of the weights of a DiGraph (in the order of its nodes) or of a square array.

    Raises
    ------
    ValueError : not square, or not finite; the message starts with `name`.
    """
    W = nx.to_numpy_array(graph, dtype=float) if isinstance(graph, nx.Graph) else np.array(graph, dtype=float)
    if W.ndim != 2 or W.shape[0] != W.shape[1]:
        raise ValueError(f"{name} must be a square matrix or a DiGraph, got shape {W.shape}")
    check_finite(name, W)
    return W


def topological_order(W: Float[np.ndarray, "d d"]) -> Int[np.ndarray, " d"] | None:
    """Nodes with every cause before its effects (the smallest label first among equals), or None if W has a cycle."""
    edges = np.asarray(W) != 0
    waiting = np.ones(len(edges), dtype=bool)
    levels: list[np.ndarray] = []
    while waiting.any():
        sources = waiting & ~edges[waiting].any(axis=0)
        if not sources.any():
            return None
        levels.append(np.flatnonzero(sources))
        waiting &= ~sources
    return np.concatenate(levels)


def to_dag(W: Graph, threshold: float = 0.3) -> Float[np.ndarray, "d d"]:
    """Set small weights to zero, then delete the weakest edges, one after the other, until no cycle remains.

    Parameters
    ----------
    W : weighted adjacency matrix or DiGraph; not modified.
    threshold : at least 0; weights with |W_ij| <= threshold are deleted first.
    """
    check_number("threshold", threshold, at_least=0.0)
    W = weight_matrix("W", W)
    W[np.abs(W) <= threshold] = 0.0
    rows, columns = np.nonzero(W)
    weakest_first = np.argsort(np.abs(W[rows, columns]), kind="stable")

    def without_the_weakest(count: int) -> Float[np.ndarray, "d d"]:
        kept = W.copy()
        kept[rows[weakest_first[:count]], columns[weakest_first[:count]]] = 0.0
        return kept

    # Deleting edges never creates a cycle, so the smallest count that leaves a DAG is found by bisection.
    too_few, enough = -1, len(weakest_first)
    while enough - too_few > 1:
        count = (too_few + enough + 1) // 2
        if topological_order(without_the_weakest(count)) is None:
            too_few = count
        else:
            enough = count
    return without_the_weakest(enough)


def to_cpdag(W: Graph) -> Bool[np.ndarray, "d d"]:
    """Completed partially directed graph of the Markov equivalence class of a DAG.

    P[i, j] and not P[j, i] is the directed edge i -> j, which every DAG of the class has; P[i, j] and P[j, i] is
    the undirected edge i -- j, which they direct differently. Colliders are directed first, then Meek's rules 1 to 3
    until nothing changes (Meek, "Causal inference and causal explanation with background knowledge", UAI 1995).

    Raises
    ------
    ValueError : W has a cycle.
    """
    edges = weight_matrix("W", W) != 0
    if topological_order(edges) is None:
        raise ValueError("W must be acyclic, it has a cycle")
    joined = edges | edges.T
    apart = ~joined
    np.fill_diagonal(apart, False)
    # i -> k is in a collider when k has another cause j that is not joined to i.
    directed = edges & ((apart.astype(int) @ edges) > 0)
    while True:
        undirected = joined & ~directed & ~directed.T
        arrows = directed.astype(int)
        found = (arrows.T @ apart) > 0  # rule 1: a -> b -- c, a and c apart: b -> c
        found |= (arrows @ arrows) > 0  # rule 2: a -> b -> c, a -- c: a -> c
        for effect in range(len(edges)):  # rule 3: a -- b -> d, a -- c -> d, b and c apart, a -- d: a -> d
            causes = np.flatnonzero(directed[:, effect])
            reaches = undirected[:, causes].astype(int)
            found[:, effect] |= ((reaches @ apart[np.ix_(causes, causes)]) * reaches).any(axis=1)
        found &= undirected
        if not found.any():
            cpdag: Bool[np.ndarray, "d d"] = directed | undirected
            return cpdag
        directed |= found


def dag_metrics(W_true: Graph, W_est: Graph) -> DAGMetrics:
    """Compare an estimated DAG with the true one by their edges; weights only say where an edge is.

    Parameters
    ----------
    W_true, W_est : adjacency matrices or DiGraphs of the same nodes in the same order. The truth may have cycles
        (feedback in a biological network), the estimate may not.

    Raises
    ------
    ValueError : the sizes differ, or the estimate has a cycle (`to_dag` removes cycles).
    """
    true, estimated = weight_matrix("W_true", W_true) != 0, weight_matrix("W_est", W_est) != 0
    if true.shape != estimated.shape:
        raise ValueError(f"W_est must have the shape of W_true, {true.shape}, got {estimated.shape}")
    if topological_order(estimated) is None:
        raise ValueError("W_est must be acyclic, it has a cycle")
    acyclic = topological_order(true) is not None
    wrong = int((estimated & ~true).sum())  # reversed or extra
    right = int((estimated & true).sum())
    not_joined = int(np.triu(~(true | true.T), k=1).sum())
    return DAGMetrics(
        shd=_pairs_that_differ(true, estimated),
        shd_cpdag=_pairs_that_differ(to_cpdag(true), to_cpdag(estimated)) if acyclic else None,
        fdr=wrong / max(int(estimated.sum()), 1),
        tpr=right / int(true.sum()) if true.any() else 1.0,
        fpr=wrong / not_joined if not_joined else 0.0,
        nnz=int(estimated.sum()),
    )


def _pairs_that_differ(one: Bool[np.ndarray, "d d"], other: Bool[np.ndarray, "d d"]) -> int:
    differs = one != other
    return int(np.triu(differs | differs.T, k=1).sum())


def varsortability(W: Graph, variances: Float[np.ndarray, " d"]) -> float:
    """Share of the directed paths that lead from a smaller to a larger variance: 1 means sorting finds the order.

    Paths are counted as Reisach et al. (2021) do: a pair of nodes counts once for every length of a path between them.

    Parameters
    ----------
    W : weighted adjacency matrix or DiGraph, acyclic.
    variances : of the nodes, positive; those equal to 1e-9 relative count half.

    Returns
    -------
    A number in [0, 1]; 0.5 on standardised data, and where W has no edge.
    """
    edges = (weight_matrix("W", W) != 0).astype(int)
    if topological_order(edges) is None:
        raise ValueError("W must be acyclic, it has a cycle")
    variances = np.asarray(variances, dtype=float)
    if variances.shape != (len(edges),):
        raise ValueError(f"variances must have shape ({len(edges)},), got {variances.shape}")
    if not (np.isfinite(variances) & (variances > 0)).all():
        raise ValueError("variances must be finite and positive")
    ratio = variances[None, :] / variances[:, None]  # of the effect's variance to the cause's
    rises = np.where(ratio > 1.0 + 1e-9, 1.0, np.where(ratio < 1.0 - 1e-9, 0.0, 0.5))
    paths, total, rising = edges, 0, 0.0
    while paths.any():
        total += int(paths.sum())
        rising += float(rises[paths != 0].sum())
        paths = ((paths @ edges) > 0).astype(int)
    return rising / total if total else 0.5
