"""Losses on groups of answers: P prompts with C answers each, their log-probabilities and their rewards.

All take tensors of shape (P, C) and return one number to minimise. They fall into three families:

- likelihood alone, no answer is pushed down: `pref_ft`, `best_of_n`, `rwr`;
- policy gradients, whose baseline pushes down what is below average: `reinforce`, `ppo`;
- contrastive, on the pairs of answers to one prompt: `dpo`, `ipo`, `slic`.

A pair is two answers to one prompt with different rewards, at least `threshold` apart; the winner has the larger
reward. The mean is over the kept pairs of all prompts together, so that prompts with many ties count for less. Pairs
that share an answer are not independent: their number overstates what was learned. Without any kept pair the loss is 0.

Reference: as in the package. The losses are those of the authors' bandit code, except where a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workingpapers.alignment.regularized_preference import dpo_losses
from workingpapers.common.validation import check_choice, check_finite, check_number

Groups = Float[Tensor, "prompts answers"]
Name = Literal["pref_ft", "best_of_n", "rwr", "reinforce", "ppo", "dpo", "ipo", "slic"]
NAMES: tuple[Name, ...] = get_args(Name)


def pref_ft(logps: Groups, rewards: Groups, *, threshold: float | None = None) -> Float[Tensor, ""]:
    """Supervised fine-tuning on the winner of every pair: the mean of -log pi(winner).

    With two answers to a prompt it is `best_of_n`; with more, an answer counts as often as it wins.

    Parameters
    ----------
    logps : log pi(a|x) of the trained policy, in nats, with gradients.
    rewards : of the same answers; no gradient flows through them.
    threshold : pairs with closer rewards are dropped, at least 0; None drops ties alone.

    Raises
    ------
    ValueError : shapes differ, there is but one answer to a prompt, or a number is not finite or out of range.
    """
    _check(rewards, at_least=2, logps=logps)
    kept = _kept_pairs(rewards, threshold)
    wins = kept.sum(2).to(logps.dtype)
    return -(wins * logps).sum() / kept.sum().clamp(min=1)


def best_of_n(
    logps: Groups,
    rewards: Groups,
    *,
    negative: Literal["worst", "mean", "sum"] | None = None,
    negative_weight: float = 0.1,
    ref_logps: Groups | None = None,
    floor: float | None = 10.0,
) -> Float[Tensor, ""]:
    """Supervised fine-tuning on the best answer to each prompt, and, if asked, pushing the others down.

        mean over prompts of -log pi(best) + c N,   N = g(worst), or mean or sum of g over the answers below the best

    with g(a) = max(log pi(a) / pi_ref(a), -floor): an answer that has become exp(floor) times rarer than it was is let
    go. Without a floor g = log pi, as in the authors' code, and the loss has no lower bound. (Their "constrained"
    variants subtract the constant log pi_ref, which changes no gradient.) Answers that tie for best, or for worst,
    share the place equally; nothing is pushed down where all tie.

    Parameters
    ----------
    logps, rewards : as in `pref_ft`.
    negative : which answers are pushed down; None for none.
    negative_weight : c, at least 0.
    ref_logps : log pi_ref(a|x), needed when answers are pushed down to a floor.
    floor : in nats, at least 0; None lets the loss go to minus infinity.

    Raises
    ------
    ValueError : as in `pref_ft` (one answer suffices without `negative`), or `ref_logps` is missing.
    """
    check_choice("negative", negative, (None, "worst", "mean", "sum"))
    _check(rewards, at_least=1 if negative is None else 2, logps=logps)
    best = rewards == rewards.max(1, keepdim=True).values
    loss = -_mean_where(best, logps).mean()
    if negative is None:
        return loss
    check_number("negative_weight", negative_weight, at_least=0)
    pushed = logps
    if floor is not None:
        check_number("floor", floor, at_least=0)
        if ref_logps is None:
            raise ValueError("ref_logps must be given when answers are pushed down to a floor")
        _check(rewards, at_least=2, ref_logps=ref_logps)
        pushed = (logps - ref_logps.detach()).clamp(min=-floor)
    below = ~best
    if negative == "worst":
        below = below & (rewards == rewards.min(1, keepdim=True).values)
    down = (pushed * below).sum(1) if negative == "sum" else _mean_where(below, pushed)
    return loss + negative_weight * down.mean()


def rwr(logps: Groups, rewards: Groups, *, temperature: float = 0.25) -> Float[Tensor, ""]:
    """Reward-weighted regression: -sum_i w_i log pi(a_i) / sum_i w_i with w_i = exp(r_i / temperature).

    The weights are those of the whole batch. The authors' code does not divide by their sum, which Adam hides and
    plain gradient descent does not. A small temperature comes close to `best_of_n` over the batch, and where the
    answers cover the best ones it can be all that is needed.

    Parameters
    ----------
    logps, rewards : as in `pref_ft`; one answer to a prompt suffices.
    temperature : above 0, in units of the reward.
    """
    check_number("temperature", temperature, above=0)
    _check(rewards, at_least=1, logps=logps)
    weights = (rewards.detach().flatten() / temperature).softmax(0)  # no overflow, whatever the rewards
    return -(weights.to(logps.dtype) * logps.flatten()).sum()


def group_advantages(rewards: Groups, *, negative: Literal["clip", "shift"] | None = None) -> Groups:
    """A_i = (r_i - mean) / std, over the answers to each prompt; over the batch where a prompt has one answer.

    The standard deviation is that of the population. Equal rewards have advantage 0.

    Parameters
    ----------
    rewards : r_i.
    negative : what becomes of the push-down. "clip" sets negative advantages to 0: answers below average are not
        learned from. "shift" adds a constant, so that the smallest advantage of the batch is 0: every answer is
        learned from, as in the authors' code.
    """
    check_choice("negative", negative, (None, "clip", "shift"))
    _check(rewards, at_least=1)
    groups = rewards if rewards.shape[1] > 1 else rewards.T
    centred = groups - groups.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)  # rounding of the mean must not be scaled up
    advantages = (centred / (deviation + 1e-12)).masked_fill(equal, 0.0).reshape(rewards.shape)
    if negative == "clip":
        return advantages.clamp(min=0.0)
    return advantages - advantages.min() if negative == "shift" else advantages


def reinforce(logps: Groups, rewards: Groups, *, negative: Literal["clip", "shift"] | None = None) -> Float[Tensor, ""]:
    """Policy gradient with a baseline: the mean of -A_i log pi(a_i), with A of `group_advantages`.

    Right for answers of the current policy; on others it is off-policy without saying so. Use `ppo` there.
    """
    _check(rewards, at_least=1, logps=logps)
    return -(group_advantages(rewards.detach(), negative=negative) * logps).mean()


def ppo(
    logps: Groups,
    behaviour_logps: Groups,
    rewards: Groups,
    *,
    clip: float = 0.2,
    negative: Literal["clip", "shift"] | None = None,
) -> Float[Tensor, ""]:
    """The clipped surrogate on whole answers: the mean of -min(A_i q_i, A_i clip(q_i, 1 - clip, 1 + clip)).

    q_i = pi(a_i) / mu(a_i) is the ratio of whole answers, as in trl's RLOOTrainer: for long ones a small change of
    every token reaches the clip. `workingpapers.alignment.ppo_losses` clips each token by itself.

    Parameters
    ----------
    logps, rewards : as in `pref_ft`; one answer to a prompt suffices.
    behaviour_logps : log mu(a|x) of the policy that drew the answers.
    clip : above 0.
    negative : as in `group_advantages`.
    """
    check_number("clip", clip, above=0)
    _check(rewards, at_least=1, logps=logps, behaviour_logps=behaviour_logps)
    advantages = group_advantages(rewards.detach(), negative=negative)
    ratio = (logps - behaviour_logps.detach()).exp()
    return -torch.minimum(advantages * ratio, advantages * ratio.clamp(1.0 - clip, 1.0 + clip)).mean()


def dpo(
    logps: Groups, ref_logps: Groups, rewards: Groups, *, beta: float = 0.1, threshold: float | None = None
) -> Float[Tensor, ""]:
    """The mean over kept pairs of -log sigma(beta h), h = log pi/pi_ref (winner) - log pi/pi_ref (loser).

    Parameters
    ----------
    logps, rewards, threshold : as in `pref_ft`.
    ref_logps : log pi_ref(a|x) of the original reference, also when the answers are the policy's own.
    beta : above 0.
    """
    check_number("beta", beta, above=0)
    _check(rewards, at_least=2, logps=logps, ref_logps=ref_logps)
    kept = _kept_pairs(rewards, threshold)
    margins = _margins(logps - ref_logps.detach(), kept)
    return dpo_losses(margins, torch.zeros_like(margins), beta=beta).sum() / kept.sum().clamp(min=1)


def ipo(
    logps: Groups,
    ref_logps: Groups,
    rewards: Groups,
    *,
    beta: float = 0.1,
    tau: float | None = None,
    threshold: float | None = None,
) -> Float[Tensor, ""]:
    """The mean over kept pairs of (h - tau)^2, h as in `dpo`.

    Parameters
    ----------
    logps, ref_logps, rewards, threshold : as in `dpo`.
    beta : above 0; sets tau = 1 / (2 beta), the form of the IPO paper.
    tau : the target of h, above 0, instead of `beta`; the authors' bandit code calls it beta and sets it to 10.
    """
    target = 1.0 / (2.0 * check_number("beta", beta, above=0)) if tau is None else check_number("tau", tau, above=0)
    _check(rewards, at_least=2, logps=logps, ref_logps=ref_logps)
    kept = _kept_pairs(rewards, threshold)
    return (_margins(logps - ref_logps.detach(), kept) - target).square().sum() / kept.sum().clamp(min=1)


def slic(
    logps: Groups, rewards: Groups, *, beta: float = 1.0, delta: float = 1.0, threshold: float | None = None
) -> Float[Tensor, ""]:
    """The mean over kept pairs of max(0, delta - beta (log pi(winner) - log pi(loser))); needs no reference.

    Parameters
    ----------
    logps, rewards, threshold : as in `pref_ft`.
    beta, delta : above 0; the margin asked for is delta / beta nats.
    """
    check_number("beta", beta, above=0)
    check_number("delta", delta, above=0)
    _check(rewards, at_least=2, logps=logps)
    kept = _kept_pairs(rewards, threshold)
    return (delta - beta * _margins(logps, kept)).relu().sum() / kept.sum().clamp(min=1)


_WITHOUT_REFERENCE: dict[str, Callable[..., Tensor]] = {
    "pref_ft": pref_ft,
    "rwr": rwr,
    "reinforce": reinforce,
    "slic": slic,
}


@dataclass(frozen=True)
class GroupLossOutput:
    """What `GroupLoss` returns; only `loss` carries a gradient.

    Attributes
    ----------
    loss : the objective.
    chosen_logps, rejected_logps : mean log pi of the best and of the worst answers to each prompt, in nats.
    """

    loss: Float[Tensor, ""]
    chosen_logps: Float[Tensor, " prompts"]
    rejected_logps: Float[Tensor, " prompts"]


class GroupLoss(nn.Module):
    """One of the losses of this module with its parameters.

    Parameters
    ----------
    name : "pref_ft", "best_of_n", "rwr", "reinforce", "ppo", "dpo", "ipo" or "slic".
    **parameters : keyword arguments of that function, other than tensors.

    Raises
    ------
    ValueError : the name is unknown, or a parameter is out of range.
    TypeError : the loss has no such parameter.

    Examples
    --------
    >>> GroupLoss("best_of_n", negative="worst", floor=5.0)
    GroupLoss('best_of_n', negative='worst', floor=5.0)
    """

    def __init__(self, name: Name, **parameters: Any) -> None:
        super().__init__()
        check_choice("name", name, NAMES)
        self.name, self.parameters_of_loss = name, dict(parameters)
        probe = torch.tensor([[0.0, 1.0]])
        self(probe, rewards=probe, ref_logps=probe, behaviour_logps=probe)  # refuses bad parameters

    @property
    def needs_reference(self) -> bool:
        """Whether `ref_logps` is looked at; where it is not, anything finite of the right shape will do."""
        own = self.parameters_of_loss
        to_a_floor = own.get("negative") is not None and own.get("floor", 10.0) is not None
        return self.name in ("dpo", "ipo") or (self.name == "best_of_n" and to_a_floor)

    @property
    def needs_behaviour(self) -> bool:
        """The same for `behaviour_logps`."""
        return self.name == "ppo"

    @property
    def contrastive(self) -> bool:
        """Whether it needs at least two answers to each prompt."""
        return self.name in ("pref_ft", "dpo", "ipo", "slic") or (
            self.name == "best_of_n" and self.parameters_of_loss.get("negative") is not None
        )

    def forward(self, logps: Groups, *, rewards: Groups, ref_logps: Groups, behaviour_logps: Groups) -> GroupLossOutput:
        """Evaluate the loss.

        Parameters
        ----------
        logps : log pi of the trained policy, with gradients.
        rewards : of the answers.
        ref_logps, behaviour_logps : log pi_ref, and log mu of the policy that drew the answers.
        """
        if self.name == "ppo":
            loss = ppo(logps, behaviour_logps, rewards, **self.parameters_of_loss)
        elif self.name == "dpo":
            loss = dpo(logps, ref_logps, rewards, **self.parameters_of_loss)
        elif self.name == "ipo":
            loss = ipo(logps, ref_logps, rewards, **self.parameters_of_loss)
        elif self.name == "best_of_n":
            loss = best_of_n(logps, rewards, ref_logps=ref_logps, **self.parameters_of_loss)
        else:
            loss = _WITHOUT_REFERENCE[self.name](logps, rewards, **self.parameters_of_loss)
        seen = logps.detach()
        return GroupLossOutput(
            loss,
            _mean_where(rewards == rewards.max(1, keepdim=True).values, seen),
            _mean_where(rewards == rewards.min(1, keepdim=True).values, seen),
        )

    def __repr__(self) -> str:
        given = "".join(f", {name}={value!r}" for name, value in self.parameters_of_loss.items())
        return f"GroupLoss({self.name!r}{given})"


def _kept_pairs(rewards: Groups, threshold: float | None) -> Bool[Tensor, "prompts answers answers"]:
    """kept[p, i, j]: answer i to prompt p beats answer j."""
    lead = rewards[:, :, None] - rewards[:, None, :]
    return (lead > 0) & (lead >= (0.0 if threshold is None else check_number("threshold", threshold, at_least=0)))


def _margins(values: Groups, kept: Bool[Tensor, "prompts answers answers"]) -> Float[Tensor, " pairs"]:
    """Value of the winner minus value of the loser, for every kept pair."""
    return (values[:, :, None] - values[:, None, :])[kept]


def _mean_where(mask: Bool[Tensor, "prompts answers"], values: Groups) -> Float[Tensor, " prompts"]:
    """Mean of the marked entries of each row, 0 where none is."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def _check(rewards: Tensor, *, at_least: int, **logps: Tensor) -> None:
    if rewards.ndim != 2 or not rewards.numel():
        raise ValueError(f"rewards must have shape (prompts, answers), neither 0, got {tuple(rewards.shape)}")
    if rewards.shape[1] < at_least:
        raise ValueError(f"rewards must hold at least {at_least} answers to each prompt, got {rewards.shape[1]}")
    check_finite("rewards", rewards)
    for name, values in logps.items():
        if values.shape != rewards.shape:
            raise ValueError(f"{name} must have the shape of rewards {tuple(rewards.shape)}, got {tuple(values.shape)}")
        check_finite(name, values.detach())
