"""Projections on convex sets, differentiable in what is projected and in the set's parameters.

Those in closed form are `common.projection`'s. `transport`, which has none, is differentiated through its optimality
condition. Set parameters are the second argument, so that every projection here fits
`optimality.projected_gradient`.

Reference: Sinkhorn scaling, Cuturi, "Sinkhorn Distances", 2013.
"""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from workingpapers.common.projection import affine, ball, box, isotonic, l1_ball, nonnegative, simplex, simplex_entropy
from workingpapers.common.validation import check_integer, check_number
from workingpapers.optimization.implicit_diff.decorators import custom_root

__all__ = [
    "affine",
    "ball",
    "box",
    "isotonic",
    "l1_ball",
    "nonnegative",
    "simplex",
    "simplex_entropy",
    "transport",
]


def transport(
    similarity: Float[Tensor, "n m"],
    marginals: tuple[Float[Tensor, " n"], Float[Tensor, " m"]],
    *,
    tol: float = 1e-9,
    maxiter: int = 10_000,
) -> Float[Tensor, "n m"]:
    """On {P > 0 : P 1 = a, Pᵀ1 = b} in the sense of Kullback and Leibler: the P closest to exp(similarity).

    P minimises <P, log P> - <P, similarity>; with similarity = -cost/ε it is the plan of entropic optimal transport.
    Found by Sinkhorn's iterations on potentials f, g with P = exp(f_i + g_j + similarity_ij).

    Parameters
    ----------
    similarity : finite.
    marginals : (a, b), positive, of the same total.
    tol : the largest error of a marginal, relative to the total, at which the iterations stop; in float32 at least
        1e-6.
    maxiter : of Sinkhorn's iterations.

    Warns
    -----
    RuntimeWarning : the tolerance was not reached.
    """
    check_number("tol", tol, above=0)
    check_integer("maxiter", maxiter, at_least=1)
    a, b = marginals
    if similarity.shape != (*a.shape, *b.shape) or similarity.ndim != 2:
        raise ValueError(
            f"similarity must have shape ({a.numel()}, {b.numel()}) like the marginals, got {tuple(similarity.shape)}"
        )
    g = _potential(None, similarity, a, b, tol=tol, maxiter=maxiter)
    return torch.exp(_first_potential(similarity, g, a) + g + similarity)


def _first_potential(similarity: Tensor, g: Tensor, a: Tensor) -> Tensor:
    """The f for which the rows of the plan have the totals a."""
    return (torch.log(a) - torch.logsumexp(similarity + g, -1))[:, None]


def _marginal_gap(g: Tensor, similarity: Tensor, a: Tensor, b: Tensor, tol: float = 0, maxiter: int = 0) -> Tensor:
    # The gaps add up to 0 and g is determined up to a constant: asking for mean g = 0 makes A invertible.
    plan = torch.exp(_first_potential(similarity, g, a) + g + similarity)
    return plan.sum(0) - b + g.mean() * a.sum() / b.numel()


def _sinkhorn(_: None, similarity: Tensor, a: Tensor, b: Tensor, tol: float, maxiter: int) -> Tensor:
    if not (bool(similarity.isfinite().all()) and bool((a > 0).all()) and bool((b > 0).all())):
        raise ValueError("transport needs a finite similarity and positive marginals")
    total = a.sum()
    eps = torch.finfo(similarity.dtype).eps
    if not bool((total - b.sum()).abs() <= math.sqrt(eps) * total):
        raise ValueError(f"the marginals must have the same total, got {float(total):g} and {float(b.sum()):g}")
    g = torch.zeros_like(b)
    goal = max(tol, 10 * eps) * total
    for _step in range(maxiter):
        f = _first_potential(similarity, g, a)
        columns = torch.logsumexp(f + similarity, 0)
        if bool((torch.exp(columns + g) - b).abs().max() <= goal):
            break
        g = torch.log(b) - columns
    else:
        gap = float((torch.exp(columns + g) - b).abs().max() / total)
        warnings.warn(f"transport stopped after {maxiter} iterations, a marginal off by {gap:.1e}", RuntimeWarning, 2)
    return g - g.mean()


_potential = custom_root(_marginal_gap)(_sinkhorn)
