"""The didactic bandit of the paper: where the reward peaks, and where the data are.

Contexts are uniform in [0, 1]^100 and carry no information. The data policy is a Cauchy variable with location -0.7 and
scale 0.4, squashed by tanh and cut into 100 equal bins of [-1, 1]: a mode at bin 16, spikes in the first and the last
bin, and at least 0.19 % in every bin. The reward is a bump: around bin 70 it is far from the data's mode, around bin 20
close to it. All numbers are those of the authors' code, which takes the bins' masses from 10,000 samples; here they are
exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workingpapers.alignment.onpolicy_preference.policies import CategoricalPolicy, LogitTable
from workingpapers.common.validation import check_integer, check_number, require


def bump_reward(actions: Int[Tensor, "*shape"], *, centre: float, width: float) -> Float[Tensor, "*shape"]:
    """exp(-((a - centre) / width)^2), between 0 and 1."""
    return torch.exp(-(((actions - centre) / width) ** 2))


def squashed_cauchy(bins: int = 100, *, loc: float = -0.7, scale: float = 0.4) -> Float[Tensor, " bins"]:
    """Masses of equal bins of [-1, 1] under tanh of a Cauchy variable, in float64.

    A bin's mass is the difference of F(atanh(edge)) with F(x) = 1/2 + arctan((x - loc) / scale) / pi.

    Parameters
    ----------
    bins : at least 2.
    loc, scale : of the Cauchy variable; scale above 0.
    """
    check_integer("bins", bins, at_least=2)
    check_number("loc", loc)
    check_number("scale", scale, above=0)
    inner = torch.atanh(torch.linspace(-1.0, 1.0, bins + 1, dtype=torch.float64)[1:-1])
    below = 0.5 + torch.arctan((inner - loc) / scale) / torch.pi
    ends = below.new_tensor([0.0, 1.0])
    return torch.cat([ends[:1], below, ends[1:]]).diff()


class BumpBandit:
    """One context, one of 100 actions, a reward around one of them. See `bump_bandit`.

    Attributes
    ----------
    probabilities : of the data policy, shape (A,), float64.
    context_size : numbers in a context.
    """

    def __init__(
        self, centre: float, width: float, probabilities: Float[Tensor, " actions"], context_size: int
    ) -> None:
        self.centre, self.width = check_number("centre", centre), check_number("width", width, above=0)
        self.probabilities, self.context_size = probabilities, context_size
        self._rng = np.random.default_rng()
        self._context: np.ndarray | None = None

    @property
    def actions(self) -> int:
        """Number of actions."""
        return len(self.probabilities)

    def contexts(self, count: int, *, random_state: int = 0) -> Float[Tensor, "prompts numbers"]:
        """Contexts, uniform in the unit cube; take another `random_state` for those held out."""
        generator = torch.Generator().manual_seed(check_integer("random_state", random_state, at_least=0))
        return torch.rand(check_integer("count", count, at_least=1), self.context_size, generator=generator)

    def reward(self, prompts: Any, actions: Int[Tensor, "prompts answers"]) -> Float[Tensor, "prompts answers"]:
        """The true reward, without noise; the same for all contexts.

        Raises
        ------
        ValueError : an action is outside the support.
        """
        if actions.numel() and not (int(actions.min()) >= 0 and int(actions.max()) < self.actions):
            raise ValueError(f"actions must be at least 0 and below {self.actions}")
        return bump_reward(actions, centre=self.centre, width=self.width)

    def expected_reward(self, policy: CategoricalPolicy, contexts: Float[Tensor, "prompts numbers"]) -> float:
        """Mean over contexts of sum_a pi(a|x) R(a), exactly."""
        with torch.no_grad():
            shares = policy.log_distribution(contexts).exp()
        return float((shares * self.reward(None, torch.arange(self.actions))).sum(1).mean())

    def reference(self) -> CategoricalPolicy:
        """The data policy, frozen."""
        return self.table().requires_grad_(False)

    def table(self) -> CategoricalPolicy:
        """A policy of one row of logits that starts at the data policy exactly."""
        return CategoricalPolicy(LogitTable(self.probabilities.log().to(torch.get_default_dtype())))

    def policy(
        self,
        contexts: Float[Tensor, "prompts numbers"] | None = None,
        *,
        steps: int = 100,
        lr: float = 0.01,
        random_state: int = 0,
    ) -> CategoricalPolicy:
        """The network of the authors, fitted to the data policy.

        100 - 50 (LayerNorm, ReLU) - 256 - 256 - actions, weights Xavier-uniform with gain 0.01, biases 0; then Adam
        steps on the mean of KL(pi || data policy) over the contexts.

        Parameters
        ----------
        contexts : to fit on, those that will be trained on; the first ten of ``contexts(10)`` when None.
        steps, lr : of the fit, steps at least 0.
        random_state : of the weights.
        """
        check_integer("steps", steps, at_least=0)
        contexts = self.contexts(10) if contexts is None else contexts
        policy = CategoricalPolicy(_network(self.context_size, self.actions, random_state))
        log_data = self.probabilities.log().to(contexts)
        optimizer = torch.optim.Adam(policy.parameters(), lr=check_number("lr", lr, above=0))
        for _ in range(steps):
            log_p = policy.log_distribution(contexts)
            optimizer.zero_grad()
            torch.autograd.backward((log_p.exp() * (log_p - log_data)).sum(1).mean())
            optimizer.step()
        return policy

    # ------------------------------------------------------------------------------------------------------- Gymnasium

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """A new context, and nothing else to know; `seed` starts the contexts anew."""
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self._context = self._rng.random(self.context_size, dtype=np.float32)
        return self._context.copy(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """The reward of an action; the episode is then over.

        Raises
        ------
        ValueError : there is no context yet, or the action is outside the support.
        """
        if self._context is None:
            raise ValueError("reset must be called before step")
        reward = float(self.reward(None, torch.tensor([[int(action)]])))
        return self._context.copy(), reward, True, False, {}

    def gymnasium(self) -> Any:
        """This bandit as a ``gymnasium.Env``, for libraries that check for one.

        Raises
        ------
        ImportError : gymnasium is absent.
        """
        gym: Any = require("gymnasium", extra="control")
        bandit = self

        class Environment(gym.Env):
            """One context, one action, the end."""

            observation_space = gym.spaces.Box(0.0, 1.0, (bandit.context_size,), np.float32)
            action_space = gym.spaces.Discrete(bandit.actions)

            def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
                super().reset(seed=seed)
                return bandit.reset(seed=seed)

            def step(self, action: Any) -> Any:
                return bandit.step(int(action))

        return Environment()


def bump_bandit(centre: float = 70, width: float = 10, *, actions: int = 100, context_size: int = 100) -> BumpBandit:
    """The bandit of the paper.

    Parameters
    ----------
    centre : best action; 70 is misaligned with the data policy (expected reward 0.039), 20 aligned (0.377).
    width : of the bump, above 0; the paper has 10, 20 and 30.
    actions : bins of the data policy, at least 2.
    context_size : numbers in a context, at least 1.
    """
    check_integer("context_size", context_size, at_least=1)
    return BumpBandit(centre, width, squashed_cauchy(actions), context_size)


def _network(inputs: int, outputs: int, random_state: int) -> nn.Sequential:
    network = nn.Sequential(
        nn.Linear(inputs, 50),
        nn.LayerNorm(50),
        nn.ReLU(),
        nn.Linear(50, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, outputs),
    )
    generator = torch.Generator().manual_seed(check_integer("random_state", random_state, at_least=0))
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, gain=0.01, generator=generator)
            nn.init.zeros_(layer.bias)
    return network
