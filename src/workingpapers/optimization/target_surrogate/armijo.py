"""Gradient descent with a line search at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from workingpapers.common.line_search import backtrack
from workingpapers.common.validation import check_number
from workingpapers.optimization.target_surrogate.state import CountingOptimizer

Parameters: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

MAX_TRIALS = 100


class ArmijoGD(CountingOptimizer):
    """Gradient descent whose step is the first of a falling sequence that decreases the loss enough (Armijo).

    ::

        w <- w - alpha grad L(w),   alpha such that L(w - alpha grad L) <= L(w) - c alpha ||grad L||^2

    The first trial is the last accepted step times `growth`. On the loss of a batch this is the stochastic line search
    SLS of Vaswani et al. (2019), for which ``growth=2 ** (1 / batches_per_epoch)``; on a deterministic loss it is
    gradient descent that needs no tuning.

    Parameters
    ----------
    params : parameters, or groups of them; one step length serves all.
    init_step : the step before the first, above 0: the first trial is ``growth * init_step``.
    c : share of the decrease of the tangent that is asked for, in (0, 1). 0.1 allows steps that overshoot the best
        one; 0.5 allows none beyond it on a quadratic.
    growth : at least 1.
    shrink : a refused step is multiplied by a factor between these two, where a quadratic or cubic has its minimum;
        ``(0.9, 0.9)`` always takes 0.9, with more evaluations.
    tol : where the norm of the gradient is at most this, no step is taken.

    Attributes
    ----------
    step_size : the last accepted step.
    evaluations : of the loss, without the one at the start of each step.
    stalled : whether the last call left the parameters as they were: the gradient is within `tol`, or none of 100
        trials decreased the loss (it is at its rounding, or the gradient is not its gradient).

    Raises
    ------
    ValueError, TypeError : an argument is outside its range.
    """

    kept = ("step_size", "evaluations", "stalled")

    def __init__(
        self,
        params: Parameters,
        init_step: float = 1.0,
        c: float = 0.1,
        growth: float = 2.0,
        shrink: tuple[float, float] = (0.1, 0.9),
        tol: float = 0.0,
    ) -> None:
        self.step_size = check_number("init_step", init_step, above=0.0)
        self.c = check_number("c", c, above=0.0, below=1.0)
        self.growth = check_number("growth", growth, at_least=1.0)
        self.shrink = check_shrink(shrink)
        self.tol = check_number("tol", tol, at_least=0.0)
        self.evaluations = 0
        self.stalled = False
        super().__init__(params, {})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any], loss: Callable[[], Any] | None = None
    ) -> Any:
        """One step.

        Parameters
        ----------
        closure : clears the gradients, evaluates the loss, calls backward and returns the loss.
        loss : returns the loss alone, for the trials, which need no gradient; `closure` when None, which spends a
            backward pass on every trial.

        Returns
        -------
        The loss before the step, as `closure` returned it. The gradients held by the parameters belong to it.

        Raises
        ------
        ValueError : the loss is not finite before the step.
        RuntimeError : a gradient is sparse.
        """
        with torch.enable_grad():
            before = closure()
        value = _number(before)
        if not math.isfinite(value):
            raise ValueError(f"closure must return a finite loss, got {value}")
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in moved):
            raise RuntimeError("ArmijoGD does not support sparse gradients")
        gradients = [p.grad if loss is not None else p.grad.clone() for p in moved]
        norm = float(get_total_norm([wide(gradient) for gradient in gradients]))
        self.stalled = not norm > self.tol
        if self.stalled:
            return before

        starts = [p.clone() for p in moved]

        def along(step: float) -> float:
            torch._foreach_copy_(moved, starts)
            torch._foreach_add_(moved, gradients, alpha=-step)  # w - alpha grad L(w)
            if loss is not None:
                return _number(loss())
            with torch.enable_grad():
                return _number(closure())

        smallest, largest = self.shrink
        search = backtrack(
            along,
            value,
            -norm * norm,
            step=self.growth * self.step_size,
            sufficient=self.c,
            smallest=smallest,
            largest=largest,
            max_trials=MAX_TRIALS,
        )
        self.evaluations += search.trials
        if loss is None:
            for p, gradient in zip(moved, gradients, strict=True):
                p.grad = gradient
        if search.value < value:  # a step too short to change the rounded loss passes the search without a decrease
            self.step_size = search.step
        else:
            torch._foreach_copy_(moved, starts)
            self.stalled = True
        return before


def _number(loss: Any) -> float:
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def wide(values: Tensor) -> Tensor:
    """At least single precision, as squares and sums over a batch leave the range of half precision."""
    return values.float() if values.itemsize < 4 else values


def check_shrink(shrink: tuple[float, float]) -> tuple[float, float]:
    """Two factors 0 < smallest <= largest < 1.

    Raises
    ------
    ValueError, TypeError : they are not.
    """
    if not isinstance(shrink, tuple | list) or len(shrink) != 2:
        raise TypeError(f"shrink must be a pair of factors, got {shrink!r}")
    largest = check_number("shrink[1]", shrink[1], above=0.0, below=1.0)
    return check_number("shrink[0]", shrink[0], above=0.0, at_most=largest), largest
