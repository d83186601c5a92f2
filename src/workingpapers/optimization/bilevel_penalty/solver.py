"""The double loop (Algorithm 1) and the single loop with momentum (Algorithm 2), on one state that can be saved."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from workingpapers.common.validation import check_choice, check_integer, check_number
from workingpapers.optimization.bilevel_penalty.layout import Layout, Tree, Vector, norm
from workingpapers.optimization.bilevel_penalty.penalty import Evaluation, Objective, Problem
from workingpapers.optimization.result import History, OptimizationResult

Projection = Callable[[Tree], Tree]
Callback = Callable[[int, Tree, float], object]
Sampler = Callable[[torch.Generator], Any]

DIVERGED = 1e3  # growth of the stationarity measure that is no fluctuation

_VECTORS = ("x", "y", "z", "along_x", "along_y", "along_z")


@dataclass(frozen=True)
class Decay:
    """How σ and the step sizes shrink: each is its first value times k^-exponent at iteration k = 1, 2, ...

    The defaults are the single loop's. Which exponents the paper itself takes was not found out: these are the
    library's choice within the polynomial family that its analysis describes.

    Parameters
    ----------
    sigma, lr_x, lr_y : exponents, at least 0; 0 keeps a value as it is.
    eta : exponent of the weight η_k = min(1, eta_scale k^-eta) that the momentum gives to a new sample, at least 0.
    eta_scale : at least 0; with 0 a sample counts only by its differences.
    """

    sigma: float = 0.2
    lr_x: float = 0.6
    lr_y: float = 0.4
    eta: float = 0.8
    eta_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("sigma", "lr_x", "lr_y", "eta", "eta_scale"):
            check_number(name, getattr(self, name), at_least=0)


CONSTANT = Decay(sigma=0.0, lr_x=0.0, lr_y=0.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class BilevelResult(OptimizationResult):
    """Where a penalty method ended; unpacks as ``x, y, info = result``, with `info` the result itself.

    Attributes
    ----------
    x : upper variable, structured like x0.
    fun : f(x, y) + (g(x, y) - g(x, z)) / σ, the estimate of ψ_σ(x); in stochastic mode on the last sample.
    y : minimiser of σ f + g, the lower variable that goes with x.
    z : minimiser of g alone.
    stationarity : ``|x - Π_X(x - lr_x ∇ψ_σ)| / lr_x`` at the start and after each iteration, a column of the history.
    lower_residual_y, lower_residual_z : ``|y - Π_Y(y - lr_y ∇_y h_σ)| / (lr_y σ)`` and the same of z and g, likewise.
        Divided by σ they are, like `stationarity`, derivatives of f + (g(., y) - g(., z)) / σ.
    gradient_calls : gradients of σ f + g or of g that the iterations took.
    bias_estimate : ``|∇ψ_2σ - ∇ψ_σ|``, which estimates ``|∇ψ_σ - ∇ψ|`` since the latter is proportional to σ.
    history : a row for the start and one for each iteration: "iteration", "fun", "stationarity", "lower_residual_y",
        "lower_residual_z", "upper" f(x, y), "gap" g(x, y) - g(x, z), "sigma" and "gradient_calls".
    """

    y: Tree
    z: Tree
    gradient_calls: int
    bias_estimate: float

    @property
    def stationarity(self) -> Float[np.ndarray, " rows"]:
        return self.history["stationarity"]

    @property
    def lower_residual_y(self) -> Float[np.ndarray, " rows"]:
        return self.history["lower_residual_y"]

    @property
    def lower_residual_z(self) -> Float[np.ndarray, " rows"]:
        return self.history["lower_residual_z"]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.x, self.y, self))


class _Steps(NamedTuple):
    """σ and the step sizes of one iteration."""

    sigma: float
    lr_x: float
    lr_y: float
    eta: float


class PenaltyBilevel:
    """Minimise f(x, y) over x in X, where y minimises g(x, .) over Y, by gradients of f and g alone.

    The lower level is lifted into a penalty: ψ_σ(x) = min_y max_z f(x, y) + (g(x, y) - g(x, z)) / σ over Y, whose
    gradient ∇_x f(x, y) + (∇_x g(x, y) - ∇_x g(x, z)) / σ needs y, the minimiser of σ f + g, and z, that of g. Both
    are followed by gradient steps from one start and on the same samples.

    Parameters
    ----------
    f, g : upper and lower objective, smooth; map (x, y) to a scalar tensor, or (x, y, batch) in stochastic mode.
    lr_x : step size of x, of the order of 1 over the smoothness of ψ, whatever σ.
    lr_y : step size of y and z, at most 1 / (L + 1 / rho) for L-smooth σ f + g.
    sigma : penalty parameter σ > 0. ψ_σ is O(σ)-close to ψ; in float32 below 1e-4 its gradient drowns in rounding.
    rho : prox parameter of the lower level, which adds |w - y|² / (2 rho) to each inner problem: for a nonconvex g,
        below 1 over its most negative curvature. None adds nothing: right for a convex lower level.
    inner_steps : T, gradient steps on y and z for each step of x: enough that they follow x, of the order of the lower
        level's condition number. With too few, x diverges, or needs a smaller lr_x.
    outer_samples : M, samples averaged in the gradient in x; only with `sample`.
    beta : share of the inner loop's result in the next y and z, in (0, 1]; 1 is faster on a convex lower level with
        exact gradients.
    proj_x, proj_y : projections on X and Y, maps of trees; see `projections`. None: no constraint. The start is
        projected too.
    momentum : "none" is the double loop. "storm" is the single loop, which moves x, y and z together on one sample an
        iteration, with recursive-momentum estimates of their gradients; it ignores inner_steps and beta.
    schedule : how sigma, lr_x and lr_y shrink; `Decay()` for the single loop, no decay for the double loop.
    sample : draws a batch from a generator; makes the mode stochastic. The double loop draws inner_steps +
        outer_samples batches an iteration, the single loop one.
    tol : stop when stationarity and both lower residuals are at most tol. None: take all iterations.
    generator : what `sample` draws from; by default one with seed 0. It advances.
    callback : called as callback(iteration, x, fun) after each iteration; a truthy answer stops the run.

    Raises
    ------
    ValueError, TypeError : an argument is out of range or of the wrong kind.

    Notes
    -----
    In stochastic mode "fun", "upper" and "gap" of the history are those of the iteration's samples, and the three
    residuals are those of the estimated gradients: noisy in the double loop, less so with momentum.
    """

    def __init__(
        self,
        f: Objective,
        g: Objective,
        *,
        lr_x: float,
        lr_y: float,
        sigma: float = 1e-2,
        rho: float | None = None,
        inner_steps: int = 10,
        outer_samples: int = 1,
        beta: float = 0.5,
        proj_x: Projection | None = None,
        proj_y: Projection | None = None,
        momentum: Literal["none", "storm"] = "none",
        schedule: Decay | None = None,
        sample: Sampler | None = None,
        tol: float | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> None:
        for name, function in (("f", f), ("g", g)):
            if not callable(function):
                raise TypeError(f"{name} must be callable, got {function!r}")
        optional = (("proj_x", proj_x), ("proj_y", proj_y), ("sample", sample), ("callback", callback))
        for name, option in optional:
            if option is not None and not callable(option):
                raise TypeError(f"{name} must be callable or None, got {option!r}")
        check_choice("momentum", momentum, ("none", "storm"))
        if schedule is not None and not isinstance(schedule, Decay):
            raise TypeError(f"schedule must be a Decay or None, got {schedule!r}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")
        self.f, self.g = f, g
        self.sigma = check_number("sigma", sigma, above=0)
        self.lr_x = check_number("lr_x", lr_x, above=0)
        self.lr_y = check_number("lr_y", lr_y, above=0)
        self.rho = None if rho is None else check_number("rho", rho, above=0)
        self.inner_steps = check_integer("inner_steps", inner_steps, at_least=1)
        self.outer_samples = check_integer("outer_samples", outer_samples, at_least=1)
        self.beta = check_number("beta", beta, above=0, at_most=1)
        self.tol = None if tol is None else check_number("tol", tol, above=0)
        self.momentum = momentum
        if momentum == "storm" and rho is not None:
            raise ValueError("rho smooths the inner problems, and momentum='storm' has none: leave it None")
        if self.outer_samples > 1 and (sample is None or momentum == "storm"):
            raise ValueError("outer_samples above 1 needs sample, and momentum='none'")
        self.schedule = schedule or (Decay() if momentum == "storm" else CONSTANT)
        self.proj_x, self.proj_y, self.sample, self.callback = proj_x, proj_y, sample, callback
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._started = False

    # --- the public course of a run ----------------------------------------------------------------------------------

    def start(self, x0: Tree, y0: Tree, batch: Any = None) -> None:
        """Begin at (x0, y0) with z0 = y0: the inner loop at x0 and the first estimate of the gradient.

        Parameters
        ----------
        x0, y0 : tensors or trees of floating-point tensors of one dtype and device; they are not changed.
        batch : as in `step`.

        Raises
        ------
        ValueError : x0 or y0 is not finite, a projection is none, or f or g does not return a scalar.
        """
        self._lay_out(x0, y0)
        self._x = _projected("proj_x", self.proj_x, self._layout_x, self._layout_x.vector(x0))
        self._y = _projected("proj_y", self.proj_y, self._layout_y, self._layout_y.vector(y0))
        _check_projection("proj_x", self.proj_x, self._layout_x, self._x)
        _check_projection("proj_y", self.proj_y, self._layout_y, self._y)
        self._z = self._y.clone()
        self._iteration, self._calls = 0, 0
        self._rows: list[dict[str, float]] = []
        self._estimate(batch, None)
        self._started = True

    def step(self, batch: Any = None) -> dict[str, float]:
        """One iteration: move x (the single loop: x, y and z), then estimate the gradients at the new point.

        Parameters
        ----------
        batch : the sample on which every gradient of this iteration is taken, handed to f and g. None draws with
            `sample`, and where there is none calls f and g without a batch.

        Returns
        -------
        The iteration's row of the history.

        Raises
        ------
        RuntimeError : there is no start.
        FloatingPointError : an iterate is not finite.
        """
        self._require_start()
        steps = self._steps(max(self._iteration, 1))
        before = (self._x, self._y, self._z)
        self._x = self._moved("x", self._x, self._along_x, steps.lr_x)
        if self.momentum == "storm":
            self._y = self._moved("y", self._y, self._along_y, steps.lr_y)
            self._z = self._moved("y", self._z, self._along_z, steps.lr_y)
        self._iteration += 1
        self._estimate(batch, before)
        return dict(self._rows[-1])

    def run(self, x0: Tree | None = None, y0: Tree | None = None, iters: int = 1000) -> BilevelResult:
        """Iterate from (x0, y0), or on from where a run or `load_state_dict` has left off.

        Parameters
        ----------
        x0, y0 : as in `start`; both None to go on.
        iters : iterations of this run, at least 1.

        Warns
        -----
        RuntimeWarning : tol was given and not reached; stationarity has grown a thousandfold; y and z are minimisers of
            different basins of g; or rounding takes more than a tenth of the gradient.
        """
        check_integer("iters", iters, at_least=1)
        if (x0 is None) != (y0 is None):
            raise ValueError("x0 and y0 go together: give both, or neither to go on")
        if x0 is not None:
            self.start(x0, y0)
        self._require_start()
        message = ""
        for _ in range(iters):
            if self._converged():
                break
            row = self.step()
            if self.callback is not None and self.callback(self._iteration, self.x, row["fun"]):
                message = f"the callback stopped the run at iteration {self._iteration}"
                break
        result = self._result(message)
        first, last = result.stationarity[:3].max(), result.stationarity[-1]
        if last > DIVERGED * first:
            warnings.warn(
                f"the iterates diverge: stationarity has grown from {first:.1e} to {last:.1e}; a smaller lr_x, or more "
                "inner_steps, may help",
                RuntimeWarning,
                stacklevel=2,
            )
        if self.tol is not None and not result.converged and not message:
            warnings.warn(result.message, RuntimeWarning, stacklevel=2)
        return result

    def estimate_bias(self, steps: int = 100) -> float:
        """|∇ψ_2σ(x) - ∇ψ_σ(x)| at the present x, which estimates |∇ψ_σ(x) - ∇ψ(x)|, for that is O(σ).

        The minimisers of 2σ f + g, of σ f + g and of g are each followed for some gradient steps from the present y
        and z, accelerated where gradients are exact, on common samples where they are not. The state of the run is
        left as it is.

        Parameters
        ----------
        steps : at most; 3 gradients each. Too few misstate the bias of an ill-conditioned lower level.
        """
        check_integer("steps", steps, at_least=1)
        self._require_start()
        sigma = self._steps(max(self._iteration, 1)).sigma
        state = self.generator.get_state()
        samples = self._batches(None, steps) if self.sample is not None else [self._last_batches[0]] * steps
        self.generator.set_state(state)
        near_enough = 0.0 if self.sample is not None else 1e-3 * norm(self._y - self._z)
        y_doubled = self._followed(self._y, 2 * sigma, samples, near_enough)
        y = self._followed(self._y, sigma, samples, near_enough)
        z = self._followed(self._z, 0.0, samples, near_enough)
        near = self._problem.evaluate(self._x, y, z, sigma, self._last_batches)
        far = self._problem.evaluate(self._x, y_doubled, z, 2 * sigma, self._last_batches)
        return norm(far.along_x - near.along_x)

    def _followed(self, point: Vector, sigma: float, samples: list[Any], near_enough: float) -> Vector:
        """Projected gradient steps on h_σ(x, .) at the present x; Nesterov's, with restarts, where they are exact.

        They end with the samples, or with a step that is shorter than `near_enough`.
        """
        ahead, momentum = point, 0
        for sample in samples:
            slope = self._problem.lower_gradient(self._x, ahead, sigma, sample)
            moved = self._moved("y", ahead, slope, self.lr_y)
            momentum = 0 if self.sample is not None or float(slope @ (moved - point)) > 0 else momentum + 1
            short = norm(moved - ahead) < near_enough
            ahead, point = moved + momentum / (momentum + 3) * (moved - point), moved
            if short:
                break
        return point

    @property
    def x(self) -> Tree:
        """The present upper variable, a copy."""
        self._require_start()
        return self._layout_x.tree(self._x.clone())

    @property
    def y(self) -> Tree:
        """The present minimiser of σ f + g, a copy."""
        self._require_start()
        return self._layout_y.tree(self._y.clone())

    @property
    def z(self) -> Tree:
        """The present minimiser of g, a copy."""
        self._require_start()
        return self._layout_y.tree(self._z.clone())

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on exactly as it would have: tensors, numbers and the history so far."""
        self._require_start()
        trees = {"x": self.x, "y": self.y, "z": self.z}
        estimates = {name: getattr(self, f"_{name}").clone() for name in _VECTORS[3:]}
        return {
            **trees,
            **estimates,
            "iteration": self._iteration,
            "gradient_calls": self._calls,
            "history": [dict(row) for row in self._rows],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; the objectives and settings must be those it was made with.

        Raises
        ------
        ValueError : an entry is missing.
        """
        wanted = (*_VECTORS, "iteration", "gradient_calls", "history", "generator")
        missing = [name for name in wanted if name not in state]
        if missing:
            raise ValueError(f"the state lacks {', '.join(missing)}")
        self._lay_out(state["x"], state["y"])
        self._x = self._layout_x.vector(state["x"])
        self._y, self._z = (self._layout_y.vector(state[name], name) for name in ("y", "z"))
        for name in _VECTORS[3:]:
            setattr(self, f"_{name}", state[name].detach().clone())
        self._iteration, self._calls = state["iteration"], state["gradient_calls"]
        self._rows = [dict(row) for row in state["history"]]
        self.generator.set_state(state["generator"])
        self._last_batches = self._batches(None, self.outer_samples)
        self.generator.set_state(state["generator"])
        self._started = True

    # --- one iteration -----------------------------------------------------------------------------------------------

    def _estimate(self, batch: Any, before: tuple[Vector, Vector, Vector] | None) -> None:
        """Estimate the directions at the present point and write the iteration's row."""
        steps = self._steps(max(self._iteration, 1))
        if self.momentum == "storm":
            found = self._single_loop_estimate(batch, before, steps)
        else:
            found = self._double_loop_estimate(batch, steps)
        directions = (self._along_x, self._along_y, self._along_z)
        if not all(bool(direction.isfinite().all()) for direction in directions):
            raise FloatingPointError(
                f"a gradient of iteration {self._iteration} is not finite: "
                f"is lr_x = {self.lr_x:g} or lr_y = {self.lr_y:g} too large?"
            )
        if batch is None and self.sample is None:
            directions = (found.along_x, found.along_y, found.along_z)  # exact, where the momentum lags behind σ
        self._rows.append(self._row(found, directions, steps))

    def _double_loop_estimate(self, batch: Any, steps: _Steps) -> Evaluation:
        """Algorithm 1: T proximal gradient steps on y and z, then the gradient in x at the new ones."""
        problem, sigma = self._problem, steps.sigma
        w_y, w_z = self._y, self._z
        watch_y, watch_z = _CurvatureWatch(self.rho), _CurvatureWatch(self.rho)
        for sample in self._batches(batch, self.inner_steps):
            # w_y <- Π_Y(w_y - γ [∇_y h_σ(x, w_y; ξ) + (w_y - y) / ρ]), and w_z likewise, on the same ξ
            slope_y = problem.lower_gradient(self._x, w_y, sigma, sample)
            slope_z = problem.lower_gradient(self._x, w_z, 0.0, sample)
            if self.rho is not None:
                if sample is None:
                    watch_y.see(w_y, slope_y)
                    watch_z.see(w_z, slope_z)
                slope_y, slope_z = slope_y + (w_y - self._y) / self.rho, slope_z + (w_z - self._z) / self.rho
            w_y = self._moved("y", w_y, slope_y, steps.lr_y)
            w_z = self._moved("y", w_z, slope_z, steps.lr_y)
        self._y = torch.lerp(self._y, w_y, self.beta)  # y <- (1 - β) y + β w_y
        self._z = torch.lerp(self._z, w_z, self.beta)
        self._last_batches = self._batches(batch, self.outer_samples)
        found = problem.evaluate(self._x, self._y, self._z, sigma, self._last_batches)
        self._calls += 2 * self.inner_steps + 2 * len(self._last_batches)
        self._along_x, self._along_y, self._along_z = found.along_x, found.along_y, found.along_z
        return found

    def _single_loop_estimate(
        self, batch: Any, before: tuple[Vector, Vector, Vector] | None, steps: _Steps
    ) -> Evaluation:
        """Algorithm 2: v_{k+1} = ∇q(p_{k+1}; ξ) + (1 - η)(v_k - ∇q(p_k; ξ)) for x, y and z, one ξ at both points."""
        self._last_batches = self._batches(batch, 1)
        found = self._problem.evaluate(self._x, self._y, self._z, steps.sigma, self._last_batches)
        self._calls += 2
        if before is None:
            self._along_x, self._along_y, self._along_z = found.along_x, found.along_y, found.along_z
            return found
        earlier = self._problem.evaluate(*before, steps.sigma, self._last_batches)
        self._calls += 2
        keep = 1.0 - steps.eta
        self._along_x = found.along_x + keep * (self._along_x - earlier.along_x)
        self._along_y = found.along_y + keep * (self._along_y - earlier.along_y)
        self._along_z = found.along_z + keep * (self._along_z - earlier.along_z)
        return found

    def _row(self, found: Evaluation, directions: tuple[Vector, Vector, Vector], steps: _Steps) -> dict[str, float]:
        along_x, along_y, along_z = directions
        step_x = self._moved("x", self._x, along_x, steps.lr_x) - self._x
        step_y = self._moved("y", self._y, along_y, steps.lr_y) - self._y
        step_z = self._moved("y", self._z, along_z, steps.lr_y) - self._z
        return {
            "iteration": self._iteration,
            "fun": found.value,
            "stationarity": norm(step_x) / steps.lr_x,
            "lower_residual_y": norm(step_y) / (steps.lr_y * steps.sigma),
            "lower_residual_z": norm(step_z) / (steps.lr_y * steps.sigma),
            "upper": found.upper,
            "gap": found.gap,
            "sigma": steps.sigma,
            "gradient_calls": self._calls,
        }

    def _steps(self, k: int) -> _Steps:
        decay = self.schedule
        return _Steps(
            self.sigma * k**-decay.sigma,
            self.lr_x * k**-decay.lr_x,
            self.lr_y * k**-decay.lr_y,
            min(1.0, decay.eta_scale * k**-decay.eta),
        )

    def _moved(self, which: Literal["x", "y"], vector: Vector, direction: Vector, step: float) -> Vector:
        """Π(vector - step direction)."""
        moved = vector - (step * direction).to(vector.dtype)
        if which == "x":
            return _projected("proj_x", self.proj_x, self._layout_x, moved)
        return _projected("proj_y", self.proj_y, self._layout_y, moved)

    def _batches(self, batch: Any, count: int) -> list[Any]:
        if batch is not None or self.sample is None:
            return [batch] * count
        return [self.sample(self.generator) for _ in range(count)]

    # --- the end of a run --------------------------------------------------------------------------------------------

    def _converged(self) -> bool:
        last = self._rows[-1]
        names = ("stationarity", "lower_residual_y", "lower_residual_z")
        return self.tol is not None and all(last[name] <= self.tol for name in names)

    def _result(self, message: str) -> BilevelResult:
        last, converged = self._rows[-1], self._converged()
        sizes = ", ".join(
            f"{name.replace('_', ' ')} {last[name]:.1e}"
            for name in ("stationarity", "lower_residual_y", "lower_residual_z")
        )
        if converged:
            message = f"converged after {self._iteration} iterations: {sizes}, at most tol = {self.tol:.1e}"
        elif not message:
            goal = "" if self.tol is None else f", not all below tol = {self.tol:.1e}"
            message = f"stopped after {self._iteration} iterations: {sizes}{goal}"
        self._warn_of_rounding_and_basins()
        return BilevelResult(
            x=self.x,
            fun=last["fun"],
            converged=converged,
            message=message,
            n_iterations=self._iteration,
            history=History.of(self._rows),
            y=self.y,
            z=self.z,
            gradient_calls=self._calls,
            bias_estimate=self.estimate_bias(),
        )

    def _warn_of_rounding_and_basins(self) -> None:
        """Warn when rounding drowns the gradient, or y and z are no minimisers of σ f + g and of g.

        The latter when z is a better y than y, or y a better z than z, by more than gradients can explain.

        With global minimisers h_σ(y) <= h_σ(z) and g(z) <= g(y). Where h is convex, h(y) - h(z) is at most
        <∇h(y), y - z>: y that has merely not converged stays below that, y in a basin of its own does not.
        """
        sigma = self._steps(max(self._iteration, 1)).sigma
        batches = self._last_batches
        found = self._problem.evaluate(self._x, self._y, self._z, sigma, batches)
        self._problem.warn_of_rounding(found, self._x, self._y, sigma, batches[0], floor=self.tol or 0.0, stacklevel=5)
        upper_y, lower_y = self._problem.values(self._x, self._y, batches)
        upper_z, lower_z = self._problem.values(self._x, self._z, batches)
        apart = self._y - self._z
        rounding = 1e3 * torch.finfo(apart.dtype).eps * (abs(lower_y) + abs(lower_z) + sigma * abs(upper_y))
        excess_y = sigma * (upper_y - upper_z) + lower_y - lower_z
        excess_z = lower_z - lower_y
        explained_y, explained_z = (2 * abs(float(slope @ apart)) for slope in (found.along_y, found.along_z))
        if excess_y > explained_y + rounding or excess_z > explained_z + rounding:
            which = ("y", "sigma f + g") if excess_y > excess_z else ("z", "g")
            warnings.warn(
                f"y and z have settled in different basins of g: g(x, y) - g(x, z) is {lower_y - lower_z:.1e} at "
                f"sigma = {sigma:.1e}, and {which[0]} is not the minimiser of {which[1]}, which the other improves by "
                f"{max(excess_y, excess_z):.1e}. Start from another y0, or lower sigma or lr_y",
                RuntimeWarning,
                stacklevel=4,
            )

    def _lay_out(self, x: Tree, y: Tree) -> None:
        self._layout_x, self._layout_y = Layout("x0", x), Layout("y0", y)
        if (self._layout_x.dtype, self._layout_x.device) != (self._layout_y.dtype, self._layout_y.device):
            raise TypeError("x0 and y0 must share one dtype and one device")
        self._problem = Problem(self.f, self.g, self._layout_x, self._layout_y)

    def _require_start(self) -> None:
        if not self._started:
            raise RuntimeError("there is no start yet: call start(x0, y0), run(x0, y0) or load_state_dict first")


class _CurvatureWatch:
    """Compares gradients along the inner loop's path: each inner problem must be convex with its prox term."""

    def __init__(self, rho: float | None) -> None:
        self.rho = rho
        self.before: tuple[Vector, Vector] | None = None

    def see(self, w: Vector, slope: Vector) -> None:
        if self.before is not None and self.rho is not None:
            move, change = w - self.before[0], slope - self.before[1]
            length = float(move @ move)
            curvature = float(move @ change) / length if length else math.inf
            if curvature < -1 / self.rho:
                raise ValueError(
                    f"rho = {self.rho:g} is too large: the lower level has curvature {curvature:.2e}, and the inner "
                    f"problems are convex only for rho below {-1 / curvature:.2e}"
                )
        self.before = (w, slope)


def _projected(name: str, projection: Projection | None, layout: Layout, vector: Vector) -> Vector:
    if projection is None:
        return vector
    with torch.no_grad():
        return layout.vector(projection(layout.tree(vector)), f"the result of {name}")


def _check_projection(name: str, projection: Projection | None, layout: Layout, around: Vector) -> None:
    """Raise ValueError unless projecting a random point twice is projecting it once."""
    if projection is None:
        return
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(around), generator=generator, dtype=torch.float64).to(around.device, around.dtype)
    once = _projected(name, projection, layout, around + (1 + around.abs().max()) * noise)
    twice = _projected(name, projection, layout, once)
    slack = 100 * torch.finfo(around.dtype).eps * (1 + float(once.abs().max()))
    if not float((twice - once).abs().max()) <= slack:
        further = float((twice - once).abs().max())
        raise ValueError(f"{name} must be a projection, but applied twice it moves a point by another {further:.1e}")
