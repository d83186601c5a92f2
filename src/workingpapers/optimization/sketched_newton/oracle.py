"""The user's callables, NumPy or torch, behind one face: values and derivatives as NumPy and SciPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float
from torch import Tensor

from workingpapers.common.validation import check_finite

Vector = Float[np.ndarray, " n"]
Matrix = Any  # Float[np.ndarray, "m n"] or scipy.sparse.csr_array

_SLACKS = (
    "inequalities are not covered: write g(x) <= 0 as the equality g(x) + s**2 = 0 with one more variable s for each, "
    "start at s = sqrt(max(-g(x0), 1)), and give cons as one function that returns all equalities"
)


@dataclass(frozen=True)
class Point:
    """Everything of first order at x.

    Attributes
    ----------
    x : (n,). cons : c(x), (m,). grad : ∇f(x), (n,). jac : G(x), (m, n), dense or CSR.
    """

    x: Vector
    fun: float
    cons: Vector
    grad: Vector
    jac: Matrix

    def lagrangian_gradient(self, lam: Vector) -> Vector:
        """∇_x L = ∇f + Gᵀ λ."""
        gradient: Vector = self.grad + self.jac.T @ lam
        return gradient

    @property
    def finite(self) -> bool:
        jac = self.jac.data if sp.issparse(self.jac) else self.jac
        return bool(
            np.isfinite(self.fun)
            and np.isfinite(self.cons).all()
            and np.isfinite(self.grad).all()
            and np.isfinite(jac).all()
        )


class Oracle:
    """f and c with their derivatives, missing ones by torch's autograd.

    Parameters
    ----------
    fun, cons, grad, hess, jac, lag_hess : as in `minimize_equality`.
    like : a tensor, whose dtype and device the callables then get, or an array.

    Attributes
    ----------
    n_values, n_gradients, n_hessians : points at which f and c, their first derivatives, and ∇²L were evaluated.
    eps : the unit roundoff of what the callables compute in.
    """

    def __init__(
        self,
        fun: Callable[[Any], Any],
        cons: Callable[[Any], Any],
        *,
        grad: Callable[[Any], Any] | None,
        hess: Callable[[Any], Any] | None,
        jac: Callable[[Any], Any] | None,
        lag_hess: Callable[[Any, Any], Any] | None,
        like: Any,
    ) -> None:
        given = {"fun": fun, "grad": grad, "hess": hess, "jac": jac, "lag_hess": lag_hess}
        for name, function in given.items():
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, got {function!r}")
        _check_cons(cons)
        self.like = like if isinstance(like, Tensor) else None
        self.eps = float(np.finfo(np.float64).eps)
        if self.like is None:
            missing = [name for name in ("grad", "jac", "lag_hess") if given[name] is None]
            if missing:
                raise ValueError(
                    f"{', '.join(missing)} must be given when x0 is not a torch tensor (a Hessian of f alone is not "
                    "that of the Lagrangian); with torch functions and a tensor x0 they come by autograd"
                )
        else:
            if not self.like.is_floating_point():
                raise TypeError(f"x0 must be a floating-point tensor, got {self.like.dtype}")
            self.eps = torch.finfo(self.like.dtype).eps
        self.fun, self.cons, self.grad, self.jac = fun, cons, grad, jac
        self.hess, self.lag_hess = hess, lag_hess
        self.n_values = self.n_gradients = self.n_hessians = 0

    def start(self, x0: Any) -> Point:
        """The point x0, with every shape checked.

        Raises
        ------
        ValueError : a shape is wrong, there are more constraints than variables, or a value is not finite.
        """
        x = as_array(x0).astype(np.float64)
        if x.ndim != 1 or not len(x):
            raise ValueError(f"x0 must be a vector, got shape {x.shape}")
        check_finite("x0", x)
        n = len(x)
        values = {"fun": self.fun(self._given(x)), "cons": self.cons(self._given(x))}
        for name, derivative in (("fun", self.grad), ("cons", self.jac)):
            if derivative is None and not isinstance(values[name], Tensor):
                raise TypeError(f"{name} must return a tensor where autograd is to differentiate it")
        value, cons = as_array(values["fun"]), as_array(values["cons"])
        if value.size != 1:
            raise ValueError(f"fun must return one number, got shape {value.shape}")
        if cons.ndim != 1 or not 1 <= len(cons) <= n:
            raise ValueError(f"cons must return a vector of 1 to n = {n} numbers, got shape {cons.shape}")
        m = len(cons)
        point = self.point(x)
        if point.grad.shape != (n,):
            raise ValueError(f"grad must return shape ({n},), got {point.grad.shape}")
        if point.jac.shape != (m, n):
            raise ValueError(f"jac must return shape ({m}, {n}), got {point.jac.shape}")
        if not point.finite:
            raise ValueError("fun, cons and their derivatives must be finite at x0, got NaN or infinity")
        hessian = self.hessian(x, np.zeros(m))
        if hessian.shape != (n, n):
            raise ValueError(f"the Hessian must have shape ({n}, {n}), got {hessian.shape}")
        self.n_values = self.n_gradients = 1
        self.n_hessians = 0
        return point

    def point(self, x: Vector) -> Point:
        """Values and first derivatives at x."""
        self.n_values += 1
        self.n_gradients += 1
        given = self._given(x)
        if self.grad is None or self.jac is None:
            given.requires_grad_()
        with np.errstate(all="ignore"):  # what is not finite is refused by the caller
            value, constraints = self.fun(given), self.cons(given)
            grad = self.grad(given) if self.grad is not None else _derivatives(value.reshape(1), given)[0]
            jac = self.jac(given) if self.jac is not None else _derivatives(constraints, given)
        fun = float(as_array(value).reshape(()))
        return Point(x, fun, _vector(constraints), _vector(grad), _as_matrix(jac))

    def hessian(self, x: Vector, lam: Vector) -> Matrix:
        """H = ∇²_x L(x, λ), dense or CSR."""
        self.n_hessians += 1
        given, multipliers = self._given(x), self._given(lam)
        with np.errstate(all="ignore"):
            if self.lag_hess is not None:
                return _as_matrix(self.lag_hess(given, multipliers))
            if self.hess is not None:
                of_constraints = _second_derivatives(lambda y: self.cons(y) @ multipliers, given)
                return _as_matrix(self.hess(given)) + _as_matrix(of_constraints)
            return _as_matrix(
                _second_derivatives(lambda y: self.fun(y).reshape(()) + self.cons(y) @ multipliers, given)
            )

    def returned(self, x: Vector) -> Any:
        """x as the caller's kind of array, a copy."""
        return x.copy() if self.like is None else self._given(x)

    def _given(self, x: Vector) -> Any:
        if self.like is None:
            return x
        return torch.tensor(x, dtype=self.like.dtype, device=self.like.device)


def _check_cons(cons: Any) -> None:
    if callable(cons):
        return
    # SciPy's ways of writing constraints: a dict, a list of dicts, LinearConstraint, NonlinearConstraint
    parts = [cons] if isinstance(cons, Mapping) or not isinstance(cons, Sequence) else list(cons)
    for part in parts:
        if isinstance(part, Mapping) and part.get("type") == "ineq":
            raise NotImplementedError(_SLACKS)
        if hasattr(part, "lb") and hasattr(part, "ub") and np.any(np.asarray(part.lb) != np.asarray(part.ub)):
            raise NotImplementedError(_SLACKS)
    raise TypeError(f"cons must be callable: x to the vector c(x) that must vanish, got {cons!r}")


def _derivatives(outputs: Tensor, x: Tensor) -> Tensor:
    """The Jacobian of a vector of outputs, one reverse pass each; zero where they do not depend on x."""
    if not outputs.requires_grad:
        return x.new_zeros((len(outputs), len(x)))
    rows = [torch.autograd.grad(output, x, retain_graph=True, materialize_grads=True)[0] for output in outputs]
    return torch.stack(rows)


def _second_derivatives(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    hessian: Tensor = torch.autograd.functional.hessian(function, x)  # type: ignore[no-untyped-call]
    return hessian


def as_array(value: Any) -> np.ndarray:
    """A tensor or anything like an array, as a NumPy array."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    return np.asarray(value)


def _vector(value: Any) -> Vector:
    return as_array(value).astype(np.float64)


def _as_matrix(value: Any) -> Matrix:
    """A float64 array, or a CSR array for anything sparse."""
    if isinstance(value, Tensor) and value.layout != torch.strided:
        entries: Tensor = value.detach().to_sparse_coo().coalesce().cpu()  # type: ignore[no-untyped-call]
        rows, columns = entries.indices().numpy()
        return sp.csr_array((entries.values().numpy().astype(np.float64), (rows, columns)), shape=tuple(entries.shape))
    if sp.issparse(value):
        return sp.csr_array(value, dtype=np.float64)
    return np.atleast_2d(as_array(value).astype(np.float64))
