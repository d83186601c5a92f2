"""The light Schrödinger bridge as an estimator: samples in; draws, moments, densities and paths out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.random import RandomState
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number
from workingpapers.generative.light_sb.potential import Covariance, LightSBPotential

Array = Float[np.ndarray, "..."] | Float[Tensor, "..."]  # tensors give tensors, everything else gives NumPy arrays
Samples = Float[np.ndarray, "n d"] | Float[Tensor, "n d"]
Values = Float[np.ndarray, " n"] | Float[Tensor, " n"]
Seed = int | RandomState | torch.Generator | None

_CHUNK = 2**22  # numbers in the largest intermediate of one chunk of rows


class LightSB(TransformerMixin, BaseEstimator):
    """Schrödinger bridge between two samples, with scikit-learn's conventions.

    Inside `fit` both samples are centred and divided by one number, their common standard deviation, and the result is
    then expressed in the caller's units. Neither the problem nor the plan changes: epsilon keeps its meaning, and the
    same problem in other units gives the same plan. Features are never scaled separately: that would change the cost.

    Parameters
    ----------
    n_components : K, from 1 to the size of X1. At least the number of modes; hundreds for fine structure at small
        epsilon.
    epsilon : above 0, the variance of the Wiener process at time 1, in squared units of the data. Below about 1e-3
        times the data's variance the plan is close to a map, and needs more components and iterations.
    covariance : "diag" costs O(batch K d) a step, "full" O(batch K d^2 + K d^3).
    init_scale : above 0; every S_k starts at init_scale I.
    lr : Adam's step size in the standardised units, above 0; "auto" is 0.2 min(epsilon / variance, 1), because the
        logits change by (step / epsilon).
    schedule : "cosine" lets lr decay to 0 over the iterations, "constant" does not.
    max_iter : number of steps, at least 1; there is no other stopping rule.
    batch_size : rows drawn from each sample in a step, with replacement.
    warm_start : continue from the last fit, also with another epsilon: fit along a decreasing sequence of them.
    device : where to compute; by default where X0 is, which is the CPU for arrays.
    random_state : int, RandomState, torch.Generator or None.

    Attributes
    ----------
    weights_ : alpha_k normalised to sum 1, (K,). The scale of alpha is arbitrary; `potential_` holds it unnormalised.
    means_ : r_k, (K, d).
    scales_ : S_k, (K, d) or (K, d, d).
    loss_curve_ : the objective on the batches of each step, (max_iter,), known up to a constant.
    potential_ : the fitted `LightSBPotential`.
    n_features_in_, n_iter_ : as in scikit-learn.

    Examples
    --------
    >>> bridge = LightSB(n_components=100, epsilon=0.05, random_state=0).fit(X0, X1)  # doctest: +SKIP
    >>> Y = bridge.sample(X0)  # doctest: +SKIP
    """

    potential_: LightSBPotential
    n_features_in_: int

    def __init__(
        self,
        n_components: int = 50,
        epsilon: float = 0.1,
        covariance: Covariance = "diag",
        *,
        init_scale: float = 0.1,
        lr: float | Literal["auto"] = "auto",
        schedule: Literal["cosine", "constant"] = "cosine",
        max_iter: int = 10_000,
        batch_size: int = 128,
        warm_start: bool = False,
        device: str | torch.device | None = None,
        random_state: Seed = None,
    ) -> None:
        self.n_components = n_components
        self.epsilon = epsilon
        self.covariance = covariance
        self.init_scale = init_scale
        self.lr = lr
        self.schedule = schedule
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.warm_start = warm_start
        self.device = device
        self.random_state = random_state

    def fit(self, X0: Samples, X1: Samples) -> LightSB:
        """Minimise L = E log c(x0) - E log v(x1) by Adam on unpaired mini-batches.

        Parameters
        ----------
        X0 : sample of p0, (n, d), finite.
        X1 : sample of p1, (m, d), finite, m >= n_components; its rows are not paired with those of X0.

        Raises
        ------
        ValueError, TypeError : a parameter is out of range, or the samples do not fit together.
        FloatingPointError : the objective stopped being finite; the message names the iteration.
        """
        self._check_parameters()
        x0 = _as_tensor("X0", X0).to(self.device)
        x1 = _as_tensor("X1", X1)
        if x0.shape[1] != x1.shape[1]:
            raise ValueError(f"X0 and X1 must have the same width, got {x0.shape[1]} and {x1.shape[1]}")
        if self.n_components > len(x1):
            raise ValueError(f"n_components must be at most the {len(x1)} rows of X1, got {self.n_components}")
        dtype = torch.promote_types(x0.dtype, x1.dtype)
        x0, x1 = x0.to(dtype), x1.to(x0.device, dtype)
        generator = _generator(self.random_state, x0.device)

        origin0, origin1 = x0.mean(0), x1.mean(0)
        x0, x1 = x0 - origin0, x1 - origin1
        unit = math.sqrt(float((x0**2).mean() + (x1**2).mean()) / 2) or 1.0  # two single points have no spread
        x0, x1 = x0 / unit, x1 / unit
        epsilon = self.epsilon / unit**2
        if self.warm_start and hasattr(self, "potential_"):
            self._check_warm_start(x0.shape[1])
            potential = self.potential_.to(x0).in_units(origin0, origin1, unit, epsilon)
        else:
            rows = torch.randperm(len(x1), generator=generator, device=x1.device)[: self.n_components]
            potential = LightSBPotential(
                x1[rows], epsilon=epsilon, covariance=self.covariance, init_scale=self.init_scale
            )

        losses = self._minimise(potential, x0, x1, generator)
        self.potential_ = potential.in_units(-origin0 / unit, -origin1 / unit, 1 / unit, self.epsilon)
        self.n_features_in_ = x0.shape[1]
        self.n_iter_ = self.max_iter
        # by which the objective of the samples as given differs from that of the standardised ones
        constant = x0.shape[1] * math.log(unit) + float(origin0 @ origin1) / self.epsilon
        self.loss_curve_ = losses.cpu().numpy() + constant
        self.weights_ = self.potential_.log_weights.softmax(0).detach().cpu().numpy()
        self.means_ = self.potential_.means.detach().cpu().numpy()
        self.scales_ = self.potential_.scales.detach().cpu().numpy()
        return self

    def _minimise(self, potential: LightSBPotential, x0: Tensor, x1: Tensor, generator: torch.Generator) -> Tensor:
        """Train in place; returns the loss of each step."""
        lr = 0.2 * min(potential.epsilon, 1.0) if self.lr == "auto" else float(self.lr)
        optimiser = torch.optim.Adam(potential.parameters(), lr=lr, fused=True)
        losses = x0.new_empty(self.max_iter)
        for step in range(self.max_iter):
            if self.schedule == "cosine":
                optimiser.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / self.max_iter)) / 2
            rows0, rows1 = (
                torch.randint(len(x), (self.batch_size,), generator=generator, device=x.device) for x in (x0, x1)
            )
            losses[step] = potential.accumulate_gradient(x0[rows0], x1[rows1])
            optimiser.step()
            optimiser.zero_grad()
            if (step + 1) % 100 == 0 or step + 1 == self.max_iter:  # a look at every loss would stall a GPU
                bad = losses[: step + 1].isfinite().logical_not().nonzero()
                if len(bad):
                    raise FloatingPointError(
                        f"the objective of iteration {int(bad[0]) + 1} is not finite: is lr={lr:g} too large?"
                    )
        return losses

    def transform(self, X0: Samples) -> Array:
        """E[y | x] for each row, (n, d): the same as `conditional_mean`."""
        return self.conditional_mean(X0)

    def conditional_mean(self, X0: Samples) -> Array:
        """E[y | x] for each row, (n, d): the barycentric map of the plan."""
        x = self._input("X0", X0)
        return self._by_rows(self.potential_.conditional_mean, x, like=X0)

    def conditional_moments(self, X0: Samples) -> tuple[Array, Array]:
        """E[y | x], (n, d), and Cov[y | x], (n, d, d), for each row."""
        x = self._input("X0", X0)

        def stacked(x: Tensor) -> Tensor:
            mean, covariance = self.potential_.conditional_moments(x)
            return torch.cat((mean[:, None, :], covariance), dim=1)

        moments = self._by_rows(stacked, x, like=X0)
        return moments[:, 0], moments[:, 1:]

    def log_plan(self, Y: Samples, X0: Samples) -> Array:
        """log plan(y | x), the conditional log-density of each pair of rows of Y and X0, (n,)."""
        x, y = self._input("X0", X0), self._input("Y", Y)
        if len(x) != len(y):
            raise ValueError(f"Y and X0 must have as many rows, got {len(y)} and {len(x)}")
        return self._by_rows(self.potential_.log_plan, y, x, like=X0)

    def score(self, X0: Samples, X1: Samples) -> float:
        """Minus the objective, E log v(x1) - E log c(x0): higher is better.

        Between models of one epsilon, differences of the score are differences of KL(bridge || model); the value
        itself has an unknown constant.
        """
        x0, x1 = self._input("X0", X0), self._input("X1", X1)
        log_c = self._by_rows(self.potential_.log_normaliser, x0, like=x0)
        log_v = self._by_rows(self.potential_.log_potential, x1, like=x1)
        return float(log_v.mean() - log_c.mean())

    def sample(self, X0: Samples, n: int = 1, *, random_state: Seed = None) -> Array:
        """Exact draws of y from plan(y | x).

        Parameters
        ----------
        X0 : (rows, d).
        n : draws for each row, at least 1.
        random_state : of these draws; the estimator's own by default.

        Returns
        -------
        (rows, d) for n = 1, otherwise (rows, n, d).
        """
        x, n = self._input("X0", X0), check_integer("n", n, at_least=1)
        generator = self._sampling_generator(random_state)
        y = self._by_rows(lambda x: self.potential_.sample(x, generator), x.repeat_interleave(n, 0), like=X0)
        return y if n == 1 else y.reshape(len(x), n, -1)

    def sample_at(self, X0: Samples, t: float, *, random_state: Seed = None) -> Array:
        """The state at time t in [0, 1] of bridges that start at the rows of X0, one exact draw for each, (n, d)."""
        x, time = self._input("X0", X0), check_number("t", t, at_least=0, at_most=1)
        generator = self._sampling_generator(random_state)
        return self._by_rows(lambda x: self.potential_.sample_at(x, time, generator), x, like=X0)

    def drift(self, X: Samples, t: float | Values) -> Array:
        """Drift g(x, t) of the bridge, (n, d); at time 0 it is E[y | x] - x.

        Parameters
        ----------
        X : states, (n, d).
        t : a time in [0, 1), or one for each row, (n,), which costs more.

        Warns
        -----
        RuntimeWarning : covariance="full" needs the eigenvectors of every S_k, O(K d^3), and that is large here.
        """
        x = self._input("X", X)
        self._warn_of_spectrum()
        if np.ndim(t) == 0:
            time = check_number("t", t.item() if isinstance(t, Tensor) else t, at_least=0, below=1)
            return self._by_rows(lambda x: self.potential_.drift(x, time), x, like=X)
        times = torch.as_tensor(t).to(x)
        if times.shape != (len(x),):
            raise ValueError(f"t must be a number or have shape ({len(x)},), got shape {tuple(times.shape)}")
        if not ((times >= 0) & (times < 1)).all():
            raise ValueError(f"t must be at least 0 and below 1, got {times.min():g} to {times.max():g}")
        return self._by_rows(self.potential_.drift, x, times, like=X)

    def trajectory(self, X0: Samples, n_steps: int = 100, *, random_state: Seed = None) -> Array:
        """Paths of the bridge from X0 by Euler-Maruyama, (n, n_steps + 1, d), at the times 0, 1/n_steps, ..., 1.

        Their law at time 1 is the plan's up to the discretisation; `sample` and `sample_at` have no such error.
        """
        x, n_steps = self._input("X0", X0), check_integer("n_steps", n_steps, at_least=1)
        generator = self._sampling_generator(random_state)
        self._warn_of_spectrum()
        return self._by_rows(lambda x: self.potential_.trajectory(x, n_steps, generator), x, like=X0)

    def entropic_cost(self, X0: Samples, n: int = 10, *, random_state: Seed = None) -> float:
        """Cost of the learned plan, E|x - y|^2 / 2 + epsilon E log plan(y | x), from n draws of y for each row.

        This is the minimised E|x - y|^2 / 2 - epsilon H(plan) without its constant -epsilon H(p0).
        """
        x = self._input("X0", X0).repeat_interleave(check_integer("n", n, at_least=1), 0)
        y = torch.as_tensor(self.sample(x, random_state=random_state))
        log_plan = torch.as_tensor(self.log_plan(y, x))
        return float(((x - y) ** 2).sum(1).mean() / 2 + self.potential_.epsilon * log_plan.mean())

    def marginal_error(self, X0: Samples, X1: Samples, *, random_state: Seed = None) -> float:
        """Energy distance from X1 to one draw of y for each row of X0; meant for samples that `fit` did not see."""
        return energy_distance(self.sample(X0, random_state=random_state), X1)

    def _check_parameters(self) -> None:
        check_integer("n_components", self.n_components, at_least=1)
        check_number("epsilon", self.epsilon, above=0)
        check_choice("covariance", self.covariance, ("diag", "full"))
        check_number("init_scale", self.init_scale, above=0)
        if self.lr != "auto":
            check_number("lr", self.lr, above=0)
        check_choice("schedule", self.schedule, ("cosine", "constant"))
        check_integer("max_iter", self.max_iter, at_least=1)
        check_integer("batch_size", self.batch_size, at_least=1)

    def _check_warm_start(self, d: int) -> None:
        last = self.potential_
        wanted = {"n_components": self.n_components, "n_features": d, "covariance": self.covariance}
        held = dict(zip(wanted, (*last.means.shape, last.covariance), strict=True))
        if wanted != held:
            raise ValueError(f"warm_start continues a fit with {held}, got {wanted}")

    def _input(self, name: str, X: Samples) -> Tensor:
        """X as a tensor for the fitted potential."""
        check_is_fitted(self, "potential_")
        x = _as_tensor(name, X)
        if x.shape[1] != self.n_features_in_:
            raise ValueError(f"{name} must have {self.n_features_in_} columns as in fit, got {x.shape[1]}")
        return x.to(self.potential_.means)

    def _sampling_generator(self, random_state: Seed) -> torch.Generator:
        seed = self.random_state if random_state is None else random_state
        return _generator(seed, self.potential_.means.device)

    def _warn_of_spectrum(self) -> None:
        components, d = self.potential_.means.shape
        if self.potential_.covariance == "full" and components * d**3 > 1e10:
            warnings.warn(
                f"the drift needs the eigenvectors of {components} matrices of order {d}, which takes long: "
                'covariance="diag" does without, and so do sample and sample_at',
                RuntimeWarning,
                stacklevel=3,
            )

    def _by_rows(self, function: Callable[..., Tensor], *rows: Tensor, like: Samples) -> Array:
        """`function` of chunks of rows, small enough for its intermediates, joined to an array like `like`."""
        components, d = self.potential_.means.shape
        size = max(1, _CHUNK // (components * d + d * d))
        with torch.no_grad():
            chunks = zip(*(torch.split(x, size) for x in rows), strict=True)
            result = torch.cat([function(*chunk) for chunk in chunks])
        return result.to(like.device) if isinstance(like, Tensor) else result.cpu().numpy()


def energy_distance(X: Samples, Y: Samples) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of two samples, (n, d) and (m, d): at least 0, and 0 for equal samples.

    All pairs are counted, a point with itself too, so that two samples of one distribution are about
    (1/n + 1/m) E|x - x'| apart: the floor with which to compare.
    """
    x = _as_tensor("X", X).double()
    y = _as_tensor("Y", Y).to(x)
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


def _as_tensor(name: str, X: Any) -> Tensor:
    """X as a finite float32 or float64 tensor of shape (n, d) with n, d >= 1."""
    if isinstance(X, Tensor):
        x = X.detach()
        if x.is_complex():
            raise TypeError(f"{name} must hold real numbers, got {x.dtype}")
        x = x if x.dtype == torch.float64 else x.float() if x.is_floating_point() else x.double()
    else:
        array = np.asarray(X)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
        x = torch.tensor(array, dtype=torch.float32 if array.dtype == np.float32 else torch.float64)
    if x.ndim != 2 or not x.numel():
        raise ValueError(f"{name} must have shape (n, d) with n, d >= 1, got {tuple(x.shape)}")
    check_finite(name, x)
    return x


def _generator(random_state: Seed, device: torch.device) -> torch.Generator:
    if isinstance(random_state, torch.Generator):
        return random_state
    return torch.Generator(device).manual_seed(int(check_random_state(random_state).randint(2**31 - 1)))
