"""The problem behind the RPO loss, solved exactly for finite action sets (Algorithm 1 of the paper).

The paper seeks the policy that is best against the worst reward that still fits the data::

    max over pi  min over r in R  eta * E_{x, a ~ pi, a0 ~ base} [r(x, a) - r(x, a0) - beta KL(pi || ref)] + L_D(r)

where L_D is the mean Bradley-Terry loss of the pairs. For convex, compact R the two may be exchanged; the inner
maximiser is then known, and the convex function of the reward ::

    F(r) = eta * E_x [beta log Z_r(x) - E_{a0 ~ base} r(x, a0)] + L_D(r),    Z_r(x) = sum_a ref(a|x) exp(r(x, a) / beta)

remains. Its minimiser r* and the soft-optimal policy of r* are a saddle point. For preference data over finitely many
answers (bandits, recommendations, multiple choice) this is a usable estimator; for language models it is the oracle
of the loss, since ``F(r) = eta * beta * E[-log pi_r(a0|x)] + L_D(beta log(pi_r / ref)) + constant``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import brentq
from scipy.special import expit, logsumexp, softmax

from workingpapers.common.validation import check_finite, check_number

Table = Float[np.ndarray, "prompts actions"]
Vector = Float[np.ndarray, " n"]

_MAX_ITERATIONS = 500


@dataclass(frozen=True)
class RPOSolution:
    """A saddle point of the regularized preference problem.

    Attributes
    ----------
    reward : r*, shape (X, A), within the class. Only differences within a prompt mean anything.
    policy : the maximin policy, ``ref * exp(reward / beta)`` normalised, shape (X, A).
    value : F(r*), the value of the game.
    duality_gap : F(r*) minus the worst case of `policy` over the class, or a bound on it from above, certified by
        convexity; the policy is worse than the best one by at most this. At least 0 up to rounding.
    at_bound : whether the reward lies on the boundary of its class. Then it depends on `reward_bound`: actions
        that are neither base actions nor ever chosen are pushed down as far as the class allows.
    converged : whether ``duality_gap <= tol``.
    iterations : Newton steps taken.
    reason : why the solver stopped, for people.
    weights : theta of the linear class, shape (d,), else None.
    """

    reward: Table
    policy: Table
    value: float
    duality_gap: float
    at_bound: bool
    converged: bool
    iterations: int
    reason: str
    weights: Vector | None = None


def policy_probs(ref_probs: Table, reward: Table, beta: float) -> Table:
    """Soft-optimal policy ``pi_r(a|x) = ref(a|x) exp(r(x, a) / beta) / Z_r(x)``.

    Parameters
    ----------
    ref_probs : reference policy, rows sum to 1, shape (X, A).
    reward : finite, shape (X, A).
    beta : weight of the KL divergence, above 0.
    """
    check_number("beta", beta, above=0)
    log_ref = log_probs("ref_probs", ref_probs)
    return _soft_optimal(log_ref, _checked_table("reward", reward, log_ref.shape), beta)


def _soft_optimal(log_ref: Table, reward: Table, beta: float) -> Table:
    policy: Table = softmax(log_ref + reward / beta, axis=1)
    return policy


def rpo_minimax(
    ref_probs: Table,
    pairs: Int[np.ndarray, "n 3"],
    *,
    beta: float,
    eta: float,
    prior: Float[np.ndarray, " prompts"] | None = None,
    base_probs: Table | None = None,
    features: Float[np.ndarray, "prompts actions d"] | None = None,
    reward_bound: float = 10.0,
    tol: float = 1e-9,
) -> RPOSolution:
    """Find the policy that is best against the worst reward that fits the pairs.

    Projected Newton steps on F; the steps are solved by conjugate gradients without forming a Hessian, so memory and
    the cost of an iteration are linear in prompts * actions + pairs.

    Parameters
    ----------
    ref_probs : reference policy pi_ref, rows sum to 1, shape (X, A). An action of probability 0 is never taken.
    pairs : rows of prompt, chosen action and rejected action, shape (n, 3), n >= 1.
    beta : weight of the KL divergence to the reference, above 0, in units of the reward.
    eta : weight of the adversary, at least 0: at 0 the reward is the Bradley-Terry fit alone (as in DPO); for
        large eta the policy approaches `base_probs` as far as the class allows.
    prior : distribution d0 of the prompts, shape (X,); by default their frequencies in the pairs.
    base_probs : baseline policy pi_base, rows sum to 1, shape (X, A); by default the frequencies of the chosen
        actions, and the reference where a prompt has no pair.
    features : phi, shape (X, A, d), for the class of rewards ``phi @ theta`` with ``||theta||_2 <= reward_bound``.
        Without it every reward with ``|r(x, a)| <= reward_bound`` is allowed.
    reward_bound : above 0. It keeps the problem well posed; see `RPOSolution.at_bound`.
    tol : largest accepted duality gap, above 0.

    Raises
    ------
    ValueError : an argument is out of range, not finite, or of the wrong shape.

    Warns
    -----
    RuntimeWarning : the duality gap stayed above `tol`.
    """
    beta = check_number("beta", beta, above=0)
    eta = check_number("eta", eta, at_least=0)
    reward_bound = check_number("reward_bound", reward_bound, above=0)
    tol = check_number("tol", tol, above=0)
    log_ref = log_probs("ref_probs", ref_probs)
    pairs = checked_pairs("pairs", pairs, log_ref.shape)
    game = _Game(
        log_ref,
        pairs,
        _chosen_frequencies(pairs, np.exp(log_ref)) if base_probs is None else _checked_base(base_probs, log_ref.shape),
        np.bincount(pairs[:, 0], minlength=len(log_ref)) / len(pairs)
        if prior is None
        else _checked_prior(prior, log_ref),
        beta,
        eta,
    )
    if features is None:
        reward, gap, iterations = _solve_box(game, reward_bound, tol)
        weights, at_bound = None, bool((np.abs(reward) >= reward_bound).any())
    else:
        phi = np.array(features, dtype=float)
        if phi.ndim != 3 or phi.shape[:2] != log_ref.shape:
            raise ValueError(f"features must have shape {(*log_ref.shape, 'd')}, got {phi.shape}")
        check_finite("features", phi)
        weights, gap, iterations = _solve_ball(game, phi, reward_bound, tol)
        reward = phi @ weights
        at_bound = bool(np.linalg.norm(weights) >= reward_bound * (1 - 1e-9))

    converged = gap <= tol
    reason = f"duality gap {gap:.1e} {'<=' if converged else '>'} tol {tol:.1e} after {iterations} Newton steps"
    if not converged:
        warnings.warn(f"rpo_minimax did not converge: {reason}", RuntimeWarning, stacklevel=2)
    policy = _soft_optimal(log_ref, reward, beta)
    return RPOSolution(reward, policy, game.value(reward), gap, at_bound, converged, iterations, reason, weights)


@dataclass(frozen=True)
class _Game:
    """F, its gradient and its Hessian as functions of the reward table."""

    log_ref: Table
    pairs: Int[np.ndarray, "n 3"]
    base: Table
    prior: Float[np.ndarray, " prompts"]
    beta: float
    eta: float

    def value(self, reward: Table) -> float:
        return float(self.value_by_prompt(reward).sum())

    def value_by_prompt(self, reward: Table) -> Vector:
        """The summands of F: without a shared parameter every prompt is a problem of its own."""
        log_z: Vector = logsumexp(self.log_ref + reward / self.beta, axis=1)
        adversary: Vector = self.eta * self.prior * (self.beta * log_z - (self.base * reward).sum(axis=1))
        fit = np.logaddexp(0.0, -self._margins(reward)) / len(self.pairs)
        by_prompt: Vector = adversary + np.bincount(self.pairs[:, 0], fit, minlength=len(reward))
        return by_prompt

    def gradient(self, reward: Table) -> Table:
        policy = _soft_optimal(self.log_ref, reward, self.beta)
        # eta d0(x) (pi_r - base), then -(1/n) sigma(-m) on the chosen entry and +(1/n) sigma(-m) on the rejected one
        gradient: Table = self.eta * self.prior[:, None] * (policy - self.base)
        gradient += self._spread(-expit(-self._margins(reward)) / len(self.pairs))
        return gradient

    def curvature(self, reward: Table) -> tuple[Callable[[Table], Table], Table]:
        """The Hessian at `reward` as a product with a table, and its diagonal."""
        policy = _soft_optimal(self.log_ref, reward, self.beta)
        weight = self.eta / self.beta * self.prior[:, None] * policy
        margins = self._margins(reward)
        pair_weight = expit(margins) * expit(-margins) / len(self.pairs)

        def product(table: Table) -> Table:
            centred: Table = table - (policy * table).sum(axis=1, keepdims=True)
            bent: Table = weight * centred + self._spread(pair_weight * self._margins(table))
            return bent

        return product, weight * (1.0 - policy) + np.abs(self._spread(pair_weight, rejected_sign=1.0))

    def _margins(self, table: Table) -> Float[np.ndarray, " n"]:
        prompt, chosen, rejected = self.pairs.T
        margins: Vector = table[prompt, chosen] - table[prompt, rejected]
        return margins

    def _spread(self, values: Float[np.ndarray, " n"], rejected_sign: float = -1.0) -> Table:
        """The adjoint of `_margins`: each value onto the chosen entry of its pair, negated onto the rejected one."""
        prompt, chosen, rejected = self.pairs.T
        entries = np.concatenate([prompt, prompt]) * self.log_ref.shape[1] + np.concatenate([chosen, rejected])
        weights = np.concatenate([values, rejected_sign * values])
        return np.bincount(entries, weights, minlength=self.log_ref.size).reshape(self.log_ref.shape)


def _solve_box(game: _Game, bound: float, tol: float) -> tuple[Table, float, int]:
    """Minimise F over |r| <= bound by projected Newton steps (Bertsekas, 1982)."""
    # F only falls with the reward of an action that is never chosen and no base action: start those at the bound.
    unsupported = (game.base == 0.0) & (game._spread(np.ones(len(game.pairs)), rejected_sign=0.0) == 0.0)
    falls = (game.eta * game.prior[:, None] * np.exp(game.log_ref) > 0.0) | (
        game._spread(np.ones(len(game.pairs))) != 0.0
    )
    reward = np.where(unsupported & falls, -bound, 0.0)
    best = reward, np.inf
    iteration = 0
    for iteration in range(_MAX_ITERATIONS + 1):
        gradient = game.gradient(reward)
        # F(r) - min F <= max over the box of <grad F(r), r - s>; the same holds for the bracket at pi_r, which
        # touches F at r with the same gradient, so this bounds F(r) minus the worst case of pi_r.
        gap = float((gradient * reward + bound * np.abs(gradient)).sum())
        if gap < best[1]:
            best = reward, gap
        if gap <= tol or iteration == _MAX_ITERATIONS:
            break
        nearly = min(1e-3 * bound, float(np.abs(np.clip(reward - gradient, -bound, bound) - reward).max()))
        held = ((reward <= -bound + nearly) & (gradient > 0)) | ((reward >= bound - nearly) & (gradient < 0))
        product, diagonal = game.curvature(reward)
        direction = np.where(held, -gradient, _conjugate_gradients(product, diagonal, gradient, ~held))
        reward, moved = _line_search(game, reward, gradient, direction, bound)
        if not moved:
            break
    return *best, iteration


def _line_search(game: _Game, reward: Table, gradient: Table, direction: Table, bound: float) -> tuple[Table, bool]:
    """Halve every prompt's step until its share of F has fallen enough; a prompt where it never does stays."""
    before = game.value_by_prompt(reward)
    noise = 1e-14 * (1.0 + np.abs(before))  # near the minimum the decrease is smaller than the rounding of F
    step = np.ones((len(reward), 1))
    for _ in range(60):
        point = np.clip(reward + step * direction, -bound, bound)
        wanted = 1e-4 * (gradient * (point - reward)).sum(axis=1)
        short = game.value_by_prompt(point) > before + wanted + noise
        if not short.any():
            break
        step[short] *= 0.5
    point[short] = reward[short]
    return point, bool((point != reward).any())


def _solve_ball(
    game: _Game, phi: Float[np.ndarray, "prompts actions d"], bound: float, tol: float
) -> tuple[Vector, float, int]:
    """Minimise F(phi @ theta) over ||theta|| <= bound: each step minimises the quadratic model over the ball."""
    theta = np.zeros(phi.shape[-1])
    best = theta, np.inf
    flat = phi.reshape(-1, phi.shape[-1])
    iteration = 0
    for iteration in range(_MAX_ITERATIONS + 1):
        reward = phi @ theta
        gradient = flat.T @ game.gradient(reward).ravel()
        gap = float(theta @ gradient + bound * np.linalg.norm(gradient))  # as in _solve_box, over the ball
        if gap < best[1]:
            best = theta, gap
        if gap <= tol or iteration == _MAX_ITERATIONS:
            break
        product, _ = game.curvature(reward)
        columns = [product(phi[..., k]).ravel() for k in range(phi.shape[-1])]
        towards = _minimise_on_ball(flat.T @ np.stack(columns, axis=1), gradient, theta, bound) - theta
        before, slope, step = game.value(reward), float(gradient @ towards), 1.0
        noise = 1e-14 * (1.0 + abs(before))
        while game.value(phi @ (theta + step * towards)) > before + 1e-4 * step * slope + noise and step > 1e-15:
            step *= 0.5
        theta = theta + step * towards
    return *best, iteration


def _minimise_on_ball(hessian: Float[np.ndarray, "d d"], gradient: Vector, theta: Vector, bound: float) -> Vector:
    """Minimiser u of <gradient, u - theta> + (u - theta)' hessian (u - theta) / 2 over ||u|| <= bound.

    (hessian + mu I) u = hessian theta - gradient, with mu = 0 inside the ball and ||u|| = bound otherwise.
    """
    eigenvalues, basis = np.linalg.eigh((hessian + hessian.T) / 2.0)
    eigenvalues = np.maximum(eigenvalues, 1e-14 * max(eigenvalues.max(), 1e-300))
    right = basis.T @ (hessian @ theta - gradient)

    def excess(mu: float) -> float:
        return float(np.linalg.norm(right / (eigenvalues + mu))) - bound

    mu = 0.0
    if excess(0.0) > 0.0:
        mu = float(brentq(excess, 0.0, np.linalg.norm(right) / bound, xtol=1e-300, rtol=1e-14, maxiter=500))
    point: Vector = basis @ (right / (eigenvalues + mu))
    return point * min(1.0, bound / max(float(np.linalg.norm(point)), 1e-300))


def _conjugate_gradients(
    product: Callable[[Table], Table], diagonal: Table, gradient: Table, free: Bool[np.ndarray, "prompts actions"]
) -> Table:
    """Newton direction on the free entries, prompt by prompt side by side.

    Accurate in proportion to a prompt's gradient, so that Newton's method stays superlinear.
    """
    # The Hessian is singular along constants of a prompt; the damping is a little more than its rounding.
    damping = 1e-13 * diagonal.max(axis=1, keepdims=True) + 1e-300
    inverse = free / (diagonal + damping)
    direction = np.zeros_like(gradient)
    residual = np.where(free, -gradient, 0.0)
    search = inverse * residual
    size = (residual * search).sum(axis=1, keepdims=True)
    goal = size * np.minimum(1e-2, size)
    for _ in range(min(gradient.shape[1], _MAX_ITERATIONS)):
        going = size > goal
        if not going.any():
            break
        bent = np.where(free, product(search), 0.0) + damping * search
        step = np.divide(size, (search * bent).sum(axis=1, keepdims=True), out=np.zeros_like(size), where=going)
        direction += step * search
        residual -= step * bent
        scaled = inverse * residual
        previous, size = size, np.where(going, (residual * scaled).sum(axis=1, keepdims=True), size)
        search = scaled + np.divide(size, previous, out=np.zeros_like(size), where=going) * search
    return direction


def _chosen_frequencies(pairs: Int[np.ndarray, "n 3"], ref_probs: Table) -> Table:
    counts = np.zeros_like(ref_probs)
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1.0)
    totals = counts.sum(axis=1, keepdims=True)
    return np.where(totals > 0, counts / np.maximum(totals, 1.0), ref_probs)


def _checked_table(name: str, table: Table, shape: tuple[int, ...]) -> Table:
    values = np.array(table, dtype=float)  # a copy: the caller's array stays as it is
    if values.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {values.shape}")
    check_finite(name, values)
    return values


def _checked_probs(name: str, probs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    values = _checked_table(name, probs, shape)
    if (values < 0).any() or np.abs(values.sum(axis=-1) - 1.0).max() > 1e-6:
        raise ValueError(f"{name} must be at least 0 and sum to 1, got sums {np.unique(values.sum(axis=-1))}")
    return values


def log_probs(name: str, probs: Table) -> Table:
    """Logarithm of a table of probabilities, -inf where 0, refused unless its rows are distributions."""
    shape = np.shape(probs)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name} must have shape (prompts, actions), got {shape}")
    values = _checked_probs(name, probs, shape)
    logs: Table = np.log(values, out=np.full(shape, -np.inf), where=values > 0)
    return logs


def _checked_base(base_probs: Table, shape: tuple[int, ...]) -> Table:
    return _checked_probs("base_probs", base_probs, shape)


def _checked_prior(prior: np.ndarray, log_ref: Table) -> np.ndarray:
    return _checked_probs("prior", prior, log_ref.shape[:1])


def checked_pairs(name: str, pairs: Int[np.ndarray, "n 3"], shape: tuple[int, ...]) -> Int[np.ndarray, "n 3"]:
    """Rows of prompt, chosen and rejected action, refused unless they fit a table of this shape."""
    values = np.array(pairs)
    if values.ndim != 2 or values.shape[1] != 3 or not len(values):
        raise ValueError(f"{name} must have shape (n, 3) with n at least 1, got {values.shape}")
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got {values.dtype}")
    if (values < 0).any() or (values >= [shape[0], shape[1], shape[1]]).any():
        raise ValueError(f"{name} must name prompts below {shape[0]} and actions below {shape[1]}")
    if (values[:, 1] == values[:, 2]).any():
        raise ValueError(f"{name} must compare two different actions")
    return values
