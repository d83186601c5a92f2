"""Three ready solvers: ridge regression, the lasso and the dual of the multiclass support vector machine.

They are useful as they stand, and show the three ways to use the decorators: a closed form with a stationarity
condition, somebody else's solver with a proximal gradient fixed point, and an iterative solver that is differentiated
through a fixed point other than its own.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso
from torch import Tensor

from workingpapers.common import projection, prox
from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number
from workingpapers.optimization.implicit_diff.decorators import ImplicitSolver, custom_fixed_point, custom_root

Design = Float[Tensor, "n p"]
Scalar = Float[Tensor, ""] | float


def ridge(X: Design, y: Float[Tensor, "n ..."], penalty: Scalar | Float[Tensor, " p"]) -> Float[Tensor, "p ..."]:
    """Minimise |X w - y|² / (2 n) + <penalty, w²> / 2: differentiable in X, y and the penalty.

    Parameters
    ----------
    X : columns, (n, p), finite.
    y : responses, (n,) or (n, k), finite.
    penalty : positive; one number, or one for each column.
    """
    _check_shapes(X, y)
    weights: Tensor = _ridge(None, X, y, _as_tensor(penalty, X))
    return weights


def lasso(
    X: Design, y: Float[Tensor, " n"], penalty: Scalar, *, tol: float = 1e-10, maxiter: int = 100_000
) -> Float[Tensor, " p"]:
    """Minimise |X w - y|² / (2 n) + penalty |w|₁ by scikit-learn's coordinate descent, on the CPU.

    Differentiable in X, y and the penalty: on the support, where w is the solution of linear equations.

    Parameters
    ----------
    X, y : as in `ridge`, y of shape (n,).
    penalty : positive.
    tol : of scikit-learn: the duality gap, relative to |y|² / n, at which it stops.
    maxiter : passes over the coordinates.

    Warns
    -----
    RuntimeWarning : the duality gap was not reached.
    """
    _check_shapes(X, y)
    check_number("tol", tol, above=0)
    check_integer("maxiter", maxiter, at_least=1)
    weights: Tensor = _lasso(None, X, y, _as_tensor(penalty, X), tol=tol, maxiter=maxiter)
    return weights


def svm_dual(
    X: Design,
    Y: Float[Tensor, "n k"],
    penalty: Scalar,
    *,
    fixed_point: Literal["projected_gradient", "mirror_descent"] = "projected_gradient",
    tol: float = 1e-8,
    maxiter: int = 100_000,
) -> Float[Tensor, "n k"]:
    """The dual of the multiclass support vector machine of Crammer and Singer, by accelerated projected gradient.

    Minimises |V|² / (2 θ) + <β, Y> over matrices β whose rows are in the simplex, with V = Xᵀ(Y - β) and θ the
    penalty; the classifier's weights are W = V/θ, see `svm_weights`. Differentiable in X, Y and the penalty.

    Parameters
    ----------
    X : features, (n, p), finite.
    Y : labels, one-hot rows, (n, k).
    penalty : θ, positive.
    fixed_point : through which β is differentiated; the derivatives agree when β is a solution.
    tol : largest change of an entry of β in a projected gradient step at which the iterations stop; in float32 not
        below 1e-6.
    maxiter : of the projected gradient method.

    Warns
    -----
    RuntimeWarning : the tolerance was not reached; the derivative's error is of the order of what is left.
    """
    check_choice("fixed_point", fixed_point, tuple(_SVM))
    check_number("tol", tol, above=0)
    check_integer("maxiter", maxiter, at_least=1)
    _check_shapes(X, Y)
    if Y.ndim != 2:
        raise ValueError(f"Y must have one column for each class, got shape {tuple(Y.shape)}")
    beta: Tensor = _SVM[fixed_point](None, X, Y, _as_tensor(penalty, X), tol=tol, maxiter=maxiter)
    return beta


def svm_weights(
    beta: Float[Tensor, "n k"], X: Design, Y: Float[Tensor, "n k"], penalty: Scalar
) -> Float[Tensor, "p k"]:
    """The weights of the classifier that scores x by xᵀW, from the dual variables: W = Xᵀ(Y - β) / θ."""
    return X.mT @ (Y - beta) / penalty


def _ridge_gradient(w: Tensor, X: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    return X.mT @ (X @ w - y) / len(y) + (penalty.reshape(-1, *[1] * (w.ndim - 1)) * w)


@custom_root(_ridge_gradient)
def _ridge(_: None, X: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    _check_values(X, y, penalty)
    A = X.mT @ X / len(y) + torch.diag(penalty.expand(X.shape[1]))
    right = X.mT @ y / len(y)
    return torch.cholesky_solve(right.reshape(len(A), -1), torch.linalg.cholesky(A)).reshape(right.shape)


def _lasso_step(w: Tensor, X: Tensor, y: Tensor, penalty: Tensor, **_: float) -> Tensor:
    # The step is free: this one brings the products with A to order 1, whatever the units of X.
    step = len(y) / X.detach().square().sum()
    return prox.lasso(w - step * X.mT @ (X @ w - y) / len(y), penalty, step)


@custom_fixed_point(_lasso_step)
def _lasso(_: None, X: Tensor, y: Tensor, penalty: Tensor, *, tol: float, maxiter: int) -> np.ndarray:
    _check_values(X, y, penalty)
    model = Lasso(alpha=float(penalty), fit_intercept=False, tol=tol, max_iter=maxiter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X.cpu().numpy(), y.cpu().numpy())
    if model.n_iter_ >= maxiter:
        warnings.warn(f"lasso stopped after {maxiter} passes, duality gap {model.dual_gap_:.1e}", RuntimeWarning, 2)
    weights: np.ndarray = model.coef_
    return weights


def _svm_gradient(beta: Tensor, X: Tensor, Y: Tensor, penalty: Tensor) -> Tensor:
    return Y - X @ (X.mT @ (Y - beta)) / penalty  # ∇(|V|² / (2 θ) + <β, Y>), V = Xᵀ(Y - β)


def _svm_projected(beta: Tensor, X: Tensor, Y: Tensor, penalty: Tensor, **_: float) -> Tensor:
    return projection.simplex(beta - _svm_step(X, penalty) * _svm_gradient(beta, X, Y, penalty))


def _svm_mirror(beta: Tensor, X: Tensor, Y: Tensor, penalty: Tensor, **_: float) -> Tensor:
    exponent = -_svm_step(X, penalty) * _svm_gradient(beta, X, Y, penalty)
    weights = beta * torch.exp(exponent - exponent.detach().amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


def _svm_step(X: Tensor, penalty: Tensor) -> Tensor:
    size: Tensor = torch.linalg.matrix_norm(X.detach(), 2)
    return penalty.detach() / size**2  # 1 / the gradient's Lipschitz constant


def _svm_solver(_: None, X: Tensor, Y: Tensor, penalty: Tensor, *, tol: float, maxiter: int) -> Tensor:
    _check_values(X, Y, penalty)
    step = _svm_step(X, penalty)
    tol = max(tol, 10 * torch.finfo(X.dtype).eps)
    beta = extrapolated = torch.full_like(Y, 1 / Y.shape[1])
    t = 1.0
    for _step in range(maxiter):
        moved = projection.simplex(extrapolated - step * _svm_gradient(extrapolated, X, Y, penalty))
        if bool((moved - extrapolated).abs().max() <= tol):
            return moved
        momentum = moved - beta
        if bool(((extrapolated - moved) * momentum).sum() > 0):  # it points uphill: forget it
            t, momentum = 1.0, torch.zeros_like(momentum)
        t_next = (1.0 + (1.0 + 4.0 * t * t) ** 0.5) / 2.0
        extrapolated = moved + (t - 1.0) / t_next * momentum
        beta, t = moved, t_next
    change = float((moved - extrapolated).abs().max())
    warnings.warn(f"svm_dual stopped after {maxiter} steps, entries still change by {change:.1e}", RuntimeWarning, 2)
    return beta


_SVM: dict[str, ImplicitSolver] = {
    "projected_gradient": custom_fixed_point(_svm_projected, solve="bicgstab")(_svm_solver),
    "mirror_descent": custom_fixed_point(_svm_mirror, solve="bicgstab")(_svm_solver),
}


def _check_shapes(X: Tensor, y: Tensor) -> None:
    if X.ndim != 2 or y.ndim not in (1, 2) or len(X) != len(y):
        shapes = f"{tuple(X.shape)} and {tuple(y.shape)}"
        raise ValueError(f"X and y must have shapes (n, p) and (n,) or (n, k), got {shapes}")
    if X.dtype != y.dtype or not X.is_floating_point():
        raise TypeError(f"X and y must share one floating-point dtype, got {X.dtype} and {y.dtype}")


def _check_values(X: Tensor, y: Tensor, penalty: Tensor) -> None:
    # Called by the solvers, who see plain tensors even under torch.vmap.
    check_finite("X", X)
    check_finite("y", y)
    if not bool((penalty > 0).all() and penalty.isfinite().all()):
        raise ValueError(f"penalty must be positive and finite, got {penalty}")


def _as_tensor(penalty: Scalar | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(penalty, dtype=like.dtype, device=like.device)
