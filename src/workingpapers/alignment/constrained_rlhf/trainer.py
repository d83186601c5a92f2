"""Constrained PPO in the paper's variants."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.alignment.constrained_rlhf.actors import Actor, Episodes, GymActor, LanguageActor, TextReward
from workingpapers.alignment.constrained_rlhf.mixer import Kind, LagrangeMixer
from workingpapers.alignment.ppo import clipped_policy_losses, clipped_value_losses, gae
from workingpapers.common.validation import check_choice, check_integer, check_number

Variant = Literal["xi", "mu", "all", "sat", "ppo"]
_KINDS: dict[str, Kind] = {"xi": "eq", "mu": "ge", "all": "le"}
_KL_STEP = 0.1  # of the adaptive penalty
_NEAR = 0.05  # of a threshold: near enough for `train_until`


@dataclass(frozen=True)
class ConstrainedPPOConfig:
    """How `ConstrainedPPO` trains; the defaults follow the paper's dialogue runs.

    Attributes
    ----------
    learning_rate : of Adam, above 0.
    episodes : in a rollout; one rollout is one update.
    minibatch : episodes in an optimizer step.
    epochs : passes over a rollout.
    gamma, lam, clip : of PPO.
    value_weights : of the value losses of the task (or divergence) and of each constrained reward.
    max_grad_norm : above 0.
    multiplier_lr, multiplier_momentum, multiplier_clamp, proportional : of `LagrangeMixer`.
    alphas : weights of the rewards in the variants "ppo", "sat" and "all"; None: 1 each.
    kl_coef, target_kl : of the variant "ppo": initial price of a nat, and the divergence per episode that the price is
        adapted to; kl_coef 0 is PPO without a penalty, target_kl None keeps the price.
    random_state : of everything drawn.
    """

    learning_rate: float = 1e-6
    episodes: int = 64
    minibatch: int = 64
    epochs: int = 5
    gamma: float = 0.99
    lam: float = 0.95
    clip: float = 0.2
    value_weights: tuple[float, float] = (0.2, 0.5)
    max_grad_norm: float = 0.5
    multiplier_lr: float = 0.1
    multiplier_momentum: float = 0.1
    multiplier_clamp: float | None = None
    proportional: float = 0.0
    alphas: tuple[float, ...] | None = None
    kl_coef: float = 0.2
    target_kl: float | None = 0.5
    random_state: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip", "max_grad_norm"):
            check_number(name, getattr(self, name), above=0)
        for name in ("episodes", "minibatch"):
            check_integer(name, getattr(self, name), at_least=2)
        check_integer("epochs", self.epochs, at_least=1)
        for name in ("gamma", "lam"):
            check_number(name, getattr(self, name), at_least=0, at_most=1)
        for weight in self.value_weights:
            check_number("value_weights", weight, at_least=0)
        check_number("kl_coef", self.kl_coef, at_least=0)
        if self.target_kl is not None:
            check_number("target_kl", self.target_kl, above=0)
        for alpha in self.alphas or ():
            check_number("alphas", alpha)
        check_integer("random_state", self.random_state, at_least=0)


class ConstrainedPPO:
    """Keep each of several rewards at its threshold while a policy stays near where it started, or the like.

    | variant | objective | constraint |
    |---|---|---|
    | xi | least divergence | v_i = theta_i |
    | mu | least divergence | v_i >= theta_i |
    | all | most sum alpha_i v_i | v_i <= theta_i |
    | sat | least E sum alpha_i (r_i - theta_i)^2 | none |
    | ppo | most sum alpha_i v_i - price of divergence | none |

    v_i are mean undiscounted episode returns. Every stream of rewards has its own value function and its own
    generalised advantages; `LagrangeMixer` weighs them anew for every minibatch, after which the multipliers move.

    Parameters
    ----------
    policy : as `GymActor` or `LanguageActor` take it; or an `Actor`, which brings everything but thresholds.
    value : value functions with N + 1 outputs for xi, mu and all (task or divergence first), 1 for sat and ppo.
    rewards : for language models, N functions of (prompts, answers).
    thresholds : theta, one for each reward; not used by ppo, where they only say how many rewards there are.
    variant : see the table.
    env : makes a Gymnasium environment that returns ``info["rewards"]``.
    prompts, text : for language models: token ids of the prompts, and the other arguments of `LanguageActor`.
    args : a `ConstrainedPPOConfig`; its defaults when None.

    Attributes
    ----------
    mixer : the multipliers; None for sat and ppo.
    history : one dict for each update: update (from 1), return_i, kl (nats per episode), length, policy_loss,
        value_loss, clip_fraction; weight_i, averaged_weight_i and violation_i with multipliers; kl_coef for ppo.

    Raises
    ------
    ValueError : thresholds, variant or the ways to act do not fit.

    Examples
    --------
    >>> trainer = ConstrainedPPO(policy, value, thresholds=[0.48, 0.23], variant="xi", env=make)  # doctest: +SKIP
    >>> trainer.train(100)[-1]["return_0"]  # doctest: +SKIP
    """

    def __init__(
        self,
        policy: nn.Module | Actor,
        value: nn.Module | None = None,
        rewards: Sequence[TextReward] | None = None,
        thresholds: Sequence[float] = (),
        variant: Variant = "xi",
        *,
        env: Callable[[], Any] | None = None,
        prompts: Sequence[Sequence[int]] | None = None,
        text: Mapping[str, Any] | None = None,
        args: ConstrainedPPOConfig | None = None,
    ) -> None:
        check_choice("variant", variant, ("xi", "mu", "all", "sat", "ppo"))
        self.args = ConstrainedPPOConfig() if args is None else args
        self.variant: Variant = variant
        self.thresholds = torch.as_tensor(thresholds, dtype=torch.float64)
        if self.thresholds.ndim != 1 or not len(self.thresholds) or not self.thresholds.isfinite().all():
            raise ValueError(f"thresholds must be a vector of finite numbers, got {thresholds}")
        if rewards is not None and len(rewards) != len(self.thresholds):
            raise ValueError(f"thresholds must be one for each of {len(rewards)} rewards, got {len(self.thresholds)}")
        self.actor = self._actor(policy, value, rewards, env, prompts, text)
        self._alphas = torch.tensor(self.args.alphas or [1.0] * len(self.thresholds), dtype=torch.float64)
        if len(self._alphas) != len(self.thresholds):
            raise ValueError(f"alphas must be one for each of {len(self.thresholds)} thresholds")
        self.mixer: LagrangeMixer | None = None
        if variant in _KINDS:
            self.mixer = LagrangeMixer(
                self.thresholds,
                _KINDS[variant],
                lr=self.args.multiplier_lr,
                momentum=self.args.multiplier_momentum,
                clamp=self.args.multiplier_clamp,
                proportional=self.args.proportional,
            )
        self.kl_coef = self.args.kl_coef if variant == "ppo" else 0.0
        self._parameters = list(self.actor.parameters())
        self.optimizer = torch.optim.Adam(self._parameters, lr=self.args.learning_rate)
        self._generator = torch.Generator().manual_seed(self.args.random_state)
        self.history: list[dict[str, float]] = []

    def train(
        self, updates: int, on_update: Callable[[dict[str, float]], object] | None = None
    ) -> list[dict[str, float]]:
        """Take some updates and return `history`.

        Parameters
        ----------
        updates : rollouts to learn from, at least 0.
        on_update : called with the newest entry of `history`; a true answer ends the training.

        Raises
        ------
        FloatingPointError : a gradient is not finite.
        """
        for _ in range(check_integer("updates", updates, at_least=0)):
            self.history.append(self._update())
            if on_update is not None and on_update(self.history[-1]):
                break
        return self.history

    def train_until(
        self,
        thresholds: Sequence[float] | np.ndarray,
        *,
        max_updates: int,
        on_update: Callable[[dict[str, float]], object] | None = None,
    ) -> bool:
        """Move the thresholds and train until every return is within 5 % of its own, as `ThresholdSearch` needs it.

        Parameters
        ----------
        thresholds : the new ones.
        max_updates : updates at most, at least 1.
        on_update : as in `train`.

        Returns
        -------
        Whether they were reached.

        Raises
        ------
        ValueError : the variant has no multipliers, or the thresholds are not finite or as many as before.
        """
        if self.mixer is None:
            raise ValueError(f"variant {self.variant!r} has no thresholds to train towards")
        wanted = torch.as_tensor(np.asarray(thresholds), dtype=torch.float64)
        if wanted.shape != self.thresholds.shape or not wanted.isfinite().all():
            raise ValueError(f"thresholds must be {len(self.thresholds)} finite numbers, got {thresholds}")
        self.thresholds = wanted
        self.mixer.thresholds.copy_(wanted)

        check_integer("max_updates", max_updates, at_least=1)

        def near(row: dict[str, float]) -> bool:
            found = torch.tensor([row[f"return_{place}"] for place in range(len(wanted))], dtype=torch.float64)
            return bool(((found - wanted).abs() <= _NEAR * wanted.abs()).all())

        def stop(row: dict[str, float]) -> bool:
            return bool(on_update is not None and on_update(row)) or near(row)

        self.train(max_updates, on_update=stop)
        return near(self.history[-1])

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on later exactly as if nothing had happened, but an environment's state."""
        return {
            "parameters": [parameter.detach().clone() for parameter in self._parameters],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "mixer": None if self.mixer is None else copy.deepcopy(self.mixer.state_dict()),
            "thresholds": self.thresholds.clone(),
            "kl_coef": self.kl_coef,
            "generator": self._generator.get_state(),
            "history": [dict(row) for row in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of a trainer with the same policy and arguments.

        Raises
        ------
        ValueError : the state has other parameters.
        """
        if [p.shape for p in state["parameters"]] != [p.shape for p in self._parameters]:
            raise ValueError("state must come from a trainer of the same policy and value functions")
        with torch.no_grad():
            for parameter, saved in zip(self._parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.mixer is not None:
            self.mixer.load_state_dict(state["mixer"])
        self.thresholds = state["thresholds"].clone()
        self.kl_coef = state["kl_coef"]
        self._generator.set_state(state["generator"])
        self.history = [dict(row) for row in state["history"]]

    def _actor(self, policy: Any, value: Any, rewards: Any, env: Any, prompts: Any, text: Any) -> Actor:
        if env is not None and value is not None:
            return GymActor(policy, value, env, seed=self.args.random_state)
        if prompts is not None and value is not None and rewards is not None:
            return LanguageActor(policy, value, prompts, rewards, **(text or {}))
        if value is None and all(hasattr(policy, name) for name in ("parameters", "rollout", "evaluate")):
            actor: Actor = policy
            return actor
        raise ValueError("give policy and value with env, or with prompts and rewards, or an Actor as policy alone")

    def _update(self) -> dict[str, float]:
        episodes = self.actor.rollout(self.args.episodes, self._generator)
        self._check(episodes)
        mask, rows = episodes.mask, torch.arange(len(episodes.mask))
        kl_rewards = episodes.ref_logprobs - episodes.logprobs  # r_KL = -log pi / pi_0
        streams = self._streams(episodes, kl_rewards)
        with torch.no_grad():
            _, old_values = self.actor.evaluate(episodes, rows)
        if old_values.shape != streams.shape:
            raise ValueError(
                f"value must have {streams.shape[-1]} outputs for variant {self.variant!r}, got {old_values.shape[-1]}"
            )
        count = streams.shape[-1]
        rewards, values = (part.movedim(-1, 0).flatten(0, 1) for part in (streams, old_values))  # a row per stream
        found = gae(rewards, values, mask.repeat(count, 1), gamma=self.args.gamma, lam=self.args.lam)
        advantages, targets = (part.reshape(count, *mask.shape).movedim(0, -1) for part in found)
        sums = torch.zeros(3, dtype=torch.float64)
        steps = 0
        for _ in range(self.args.epochs):
            order = torch.randperm(len(rows), generator=self._generator)
            for part in torch.split(order, self.args.minibatch):
                if len(part) > 1:
                    sums += self._step(episodes, part, advantages[part], targets[part])
                    steps += 1
        kl = -float((kl_rewards * mask).sum(1).mean())
        if self.variant == "ppo" and self.args.target_kl is not None:
            error = np.clip((kl - self.args.target_kl) / self.args.target_kl, -0.2, 0.2)
            self.kl_coef *= 1.0 + _KL_STEP * float(error)
        return self._report(episodes, kl, (sums / steps).tolist())

    def _streams(self, episodes: Episodes, kl_rewards: Tensor) -> Float[Tensor, "episodes steps streams"]:
        """The rewards that have value functions, the one without a threshold first."""
        rewards, mask = episodes.rewards, episodes.mask
        alphas = self._alphas.to(rewards)
        if self.variant == "ppo":
            return ((rewards @ alphas) + self.kl_coef * kl_rewards)[..., None]
        if self.variant == "sat":
            # -sum alpha_i (R_i - theta_i)^2 of the whole episode, paid at its last step
            short = -((episodes.returns - self.thresholds.to(rewards)) ** 2) @ alphas
            last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
            return torch.zeros_like(kl_rewards).scatter(1, last[:, None], short[:, None])[..., None]
        task = rewards @ alphas if self.variant == "all" else kl_rewards
        return torch.cat([task[..., None], rewards], -1)

    def _step(self, episodes: Episodes, rows: Tensor, advantages: Tensor, targets: Tensor) -> Tensor:
        mask = episodes.mask[rows]
        if self.mixer is not None:
            mixed = self.mixer.mix(advantages[..., 0], advantages[..., 1:], mask)
        else:
            chosen = advantages[..., 0][mask]
            normal = (chosen - chosen.mean()) / (chosen.std() + 1e-8)
            mixed = torch.zeros_like(advantages[..., 0]).masked_scatter(mask, normal)
        logprobs, values = self.actor.evaluate(episodes, rows)
        losses, cut_off, _ = clipped_policy_losses(
            logprobs, old_logprobs=episodes.logprobs[rows], advantages=mixed, mask=mask, clip=self.args.clip
        )
        policy_loss = losses.sum() / mask.sum()
        weights = [self.args.value_weights[0]] + [self.args.value_weights[1]] * (values.shape[-1] - 1)
        value_loss = torch.zeros_like(policy_loss)
        for stream, weight in enumerate(weights):
            fit = clipped_value_losses(
                values[..., stream], old_values=values[..., stream].detach(), returns=targets[..., stream], mask=mask,
                value_clip=None,
            )  # fmt: skip
            value_loss = value_loss + weight * 2.0 * fit.sum() / mask.sum()  # the paper's MSE has no half
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(policy_loss + value_loss)
        norm = nn.utils.clip_grad_norm_(self._parameters, self.args.max_grad_norm)
        if not norm.isfinite():
            raise FloatingPointError("the gradient is not finite: is learning_rate too large?")
        self.optimizer.step()
        if self.mixer is not None:
            self.mixer.update(episodes.returns[rows].mean(0))
        share = cut_off.sum() / mask.sum()
        return torch.stack([policy_loss.detach(), value_loss.detach(), share]).double().cpu()

    def _report(self, episodes: Episodes, kl: float, losses: list[float]) -> dict[str, float]:
        row = {"update": len(self.history) + 1.0, "kl": kl, "length": float(episodes.mask.sum(1).float().mean())}
        row |= {f"return_{place}": value for place, value in enumerate(episodes.returns.mean(0).tolist())}
        row |= dict(zip(("policy_loss", "value_loss", "clip_fraction"), losses, strict=True))
        if self.mixer is not None:
            parts = {
                "weight": self.mixer.weights(),
                "averaged_weight": self.mixer.averaged_weights(),
                "violation": self.mixer.violations,
            }
            row |= {f"{name}_{place}": each for name, part in parts.items() for place, each in enumerate(part.tolist())}
        return row | ({"kl_coef": self.kl_coef} if self.variant == "ppo" else {})

    def _check(self, episodes: Episodes) -> None:
        if episodes.rewards.shape != (*episodes.mask.shape, len(self.thresholds)):
            raise ValueError(
                f"rewards of every step must be {len(self.thresholds)}, got an array {tuple(episodes.rewards.shape)}"
            )
        if not episodes.rewards[episodes.mask].isfinite().all():
            raise ValueError("rewards must be finite")
