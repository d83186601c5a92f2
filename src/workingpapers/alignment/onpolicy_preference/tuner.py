"""The loop: draw answers, score them, take gradient steps on them, again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.alignment.onpolicy_preference.losses import GroupLoss, Name
from workingpapers.alignment.onpolicy_preference.policies import Policy, Prompts, count_tokens, exact, take
from workingpapers.common.validation import check_finite, check_integer, check_number

Reward = Callable[[Any, Tensor], Float[Tensor, "prompts answers"]]

_OWN_PARAMETERS: dict[str, tuple[str, ...]] = {  # of the tuner's arguments, those that each loss has
    "pref_ft": ("threshold",),
    "best_of_n": ("negative",),
    "rwr": ("temperature",),
    "reinforce": ("negative",),
    "ppo": ("negative",),
    "dpo": ("beta", "threshold"),
    "ipo": ("beta", "tau", "threshold"),
    "slic": ("threshold",),
}
_EVALUATED = 64  # of the training prompts, where no others are given


@dataclass
class TunerHistory:
    """One entry per evaluation, the first of them before training; `pandas.DataFrame(vars(history))` is a table.

    Attributes
    ----------
    reward : mean reward of the policy's answers, by `eval_reward` where there is one.
    kl, reverse_kl : KL(pi || ref) and KL(ref || pi), in nats.
    entropy : of the policy, in nats. All four are exact where policy and reference have `log_distribution`, else
        estimated from fresh answers (`reverse_kl` from answers of the reference, the same ones every time).
    reward_queries : answers that the reward has scored for training. Evaluation is not counted here or below.
    gradient_steps : optimizer steps.
    generated_tokens : tokens of the answers drawn for training, fresh or not.
    trained_tokens : tokens of answers that gradient steps went through.
    batch_reward : mean reward of the last batch that was trained on; NaN before training, as the next three.
    loss : at the last step.
    chosen_logp, rejected_logp : mean log pi of the best and of the worst answers to the prompts of the last step.
    """

    reward: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    reverse_kl: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    reward_queries: list[int] = field(default_factory=list)
    gradient_steps: list[int] = field(default_factory=list)
    generated_tokens: list[int] = field(default_factory=list)
    trained_tokens: list[int] = field(default_factory=list)
    batch_reward: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    chosen_logp: list[float] = field(default_factory=list)
    rejected_logp: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        """Number of evaluations."""
        return len(self.reward)

    def append(self, row: Mapping[str, float]) -> None:
        """Add one evaluation; the keys are the names of all columns."""
        for column in fields(self):
            getattr(self, column.name).append(row[column.name])


class _Batch(NamedTuple):
    """Answers to some prompts, (P, C, ...) or (P, C), with all that losses ask about them."""

    prompts: Any
    actions: Tensor
    rewards: Tensor
    ref_logps: Tensor
    behaviour_logps: Tensor

    def take(self, rows: list[int]) -> _Batch:
        index = torch.as_tensor(rows, device=self.rewards.device)
        actions = self.actions[index.to(self.actions.device)]
        return _Batch(take(self.prompts, rows), actions, *(part[index] for part in self[2:]))


class PreferenceTuner:
    """Fine-tune a policy on rewards, with the three ingredients as switches.

    - `on_policy`: whether answers are drawn from the policy as it is, or from a fixed one;
    - `inner_steps`: how often each batch is gone through;
    - `loss` and `negative`: whether bad answers are pushed down.

    A round draws `responses_per_prompt` answers to each of ``batch_size / responses_per_prompt`` prompts, scores them,
    and takes the gradient steps. Offline learning from one fixed set is ``on_policy=False, batch_size=budget``. The
    margin of DPO and IPO is against `ref` in all rounds, not against the last policy.

    Parameters
    ----------
    policy : trained in place; see `Policy`. `CausalLMPolicy` makes one of a language model.
    ref : the reference; None for the policy as it is now (`Policy.reference`).
    reward : maps prompts and answers (P, C, ...) to finite rewards (P, C). For language models see `text_reward` and
        `model_reward`. Preferences between two answers enter through a reward model that was fitted to them.
    loss : name of a loss with the parameters below where it has them, or a `GroupLoss`, which brings its own.
    on_policy : share of fresh answers to each prompt, in [0, 1], rounded to whole answers; the others come from
        `data_policy`.
    inner_steps : passes over each batch, at least 1: gradient steps, unless `prompts_per_step` divides the batch.
    batch_size : answers in a round, B, a multiple of `responses_per_prompt`.
    responses_per_prompt : C, at least 2 for contrastive losses.
    beta, tau, temperature, threshold, negative : of `dpo` and `ipo`, `rwr`, pairs, and policy gradients or
        `best_of_n`. None of tau is 1 / (2 beta).
    kl_weight : price of a nat of KL(pi || ref), at least 0, for "reinforce" and "ppo": rewards become
        r - kl_weight log(mu / pi_ref), mu being the policy that drew the answer.
    lr : of Adam, above 0; ignored with `optimizer`.
    optimizer : over the policy's parameters; Adam when None.
    max_grad_norm : gradients are scaled down to this Euclidean norm; None leaves them.
    prompts_per_step : prompts in a gradient step; all of the batch when None.
    micro_batch : answers in one forward and backward pass; all of a step when None. It changes memory and time (each
        answer is then scored twice), not the gradient, whatever the loss.
    data_policy : source of the answers that are not fresh; `ref` when None.
    eval_reward : what `TunerHistory.reward` reports, for example the true reward behind a learned one.
    eval_responses : fresh answers to each prompt in an evaluation, where it is not exact.
    generator : draws prompts and answers; the global one when None.

    Attributes
    ----------
    history : see `TunerHistory`.

    Raises
    ------
    ValueError : an argument is out of range, or does not go with the loss.

    Examples
    --------
    >>> from workingpapers.alignment import PreferenceTuner, testbeds
    >>> env = testbeds.bump_bandit(centre=70)
    >>> generator = torch.Generator().manual_seed(0)
    >>> tuner = PreferenceTuner(
    ...     env.policy(), env.reference(), env.reward, loss="ipo", tau=10.0, inner_steps=5, generator=generator
    ... )
    >>> history = tuner.fit(env.contexts(10), budget=2_048)
    >>> history.reward[0] < 0.1 < 0.8 < history.reward[-1]
    True
    """

    def __init__(
        self,
        policy: Policy,
        ref: Policy | None,
        reward: Reward,
        loss: Name | GroupLoss = "dpo",
        on_policy: bool | float = True,
        inner_steps: int = 1,
        batch_size: int = 64,
        responses_per_prompt: int = 4,
        beta: float = 0.1,
        temperature: float = 0.25,
        tau: float | None = None,
        threshold: float | None = None,
        negative: Literal["clip", "shift", "worst", "mean", "sum"] | None = None,
        lr: float = 1e-2,
        optimizer: torch.optim.Optimizer | None = None,
        generator: torch.Generator | None = None,
        *,
        kl_weight: float = 0.0,
        max_grad_norm: float | None = None,
        prompts_per_step: int | None = None,
        micro_batch: int | None = None,
        data_policy: Policy | None = None,
        eval_reward: Reward | None = None,
        eval_responses: int = 1,
    ) -> None:
        given = {"beta": beta, "temperature": temperature, "tau": tau, "threshold": threshold, "negative": negative}
        self.loss = loss if isinstance(loss, GroupLoss) else _named_loss(loss, given)
        self.on_policy = check_number("on_policy", float(on_policy), at_least=0, at_most=1)
        self.inner_steps = check_integer("inner_steps", inner_steps, at_least=1)
        least = 2 if self.loss.contrastive else 1
        self.responses_per_prompt = check_integer("responses_per_prompt", responses_per_prompt, at_least=least)
        self.batch_size = check_integer("batch_size", batch_size, at_least=responses_per_prompt)
        if batch_size % responses_per_prompt:
            raise ValueError(
                f"batch_size must be a multiple of responses_per_prompt={responses_per_prompt}, got {batch_size}"
            )
        self.kl_weight = check_number("kl_weight", kl_weight, at_least=0)
        if kl_weight and self.loss.name not in ("reinforce", "ppo"):
            raise ValueError(f"kl_weight must be 0 for loss {self.loss.name!r}: it belongs to 'reinforce' and 'ppo'")
        if max_grad_norm is not None:
            check_number("max_grad_norm", max_grad_norm, above=0)
        for name, value in (("prompts_per_step", prompts_per_step), ("micro_batch", micro_batch)):
            if value is not None:
                check_integer(name, value, at_least=1)
        self.max_grad_norm, self.prompts_per_step, self.micro_batch = max_grad_norm, prompts_per_step, micro_batch
        self.eval_responses = check_integer("eval_responses", eval_responses, at_least=1)
        self.policy, self.reward, self.eval_reward = policy, reward, eval_reward or reward
        if ref is policy:
            raise ValueError("ref must be a frozen copy, got the policy that is trained; None makes the copy")
        self.ref = policy.reference() if ref is None else ref
        self.data_policy = self.ref if data_policy is None else data_policy
        self._parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        if not self._parameters:
            raise ValueError("policy must have parameters that require gradients")
        check_number("lr", lr, above=0)
        self.optimizer = optimizer or torch.optim.Adam(self._parameters, lr=lr)
        self.generator = generator
        self.history = TunerHistory()
        self._queries = self._steps = self._generated = self._trained = 0
        self._last = dict.fromkeys(("batch_reward", "loss", "chosen_logp", "rejected_logp"), math.nan)

    def fit(
        self, prompts: Prompts, budget: int, *, eval_prompts: Prompts | None = None, evaluate_every: int | None = None
    ) -> TunerHistory:
        """Spend a budget of reward queries; a second call goes on from where the first one ended.

        Parameters
        ----------
        prompts : to train on, a tensor (P, ...) or a list of token ids; gone through in random order, again and again.
        budget : reward queries. A last round that they do not fill is smaller; less than one prompt's answers is left.
        eval_prompts : to evaluate on; the first 64 of `prompts` when None.
        evaluate_every : gradient steps between two evaluations; one for each round when None. The first and the last
            state are always evaluated. 0 does without, where drawing answers is dear: an entry for each round, with NaN
            in the four columns of evaluation.

        Raises
        ------
        ValueError : there are no prompts, the budget is too small, or a reward is not finite or has another shape.
        FloatingPointError : a loss or gradient is not finite; the policy is as it was before that step.
        """
        answers = self.responses_per_prompt
        if not len(prompts):
            raise ValueError("prompts must hold at least one prompt")
        check_integer("budget", budget, at_least=answers)
        if evaluate_every is not None:
            check_integer("evaluate_every", evaluate_every, at_least=0)
        if eval_prompts is not None and not len(eval_prompts):
            raise ValueError("eval_prompts must hold at least one prompt")
        evaluate = self._evaluation(prompts, eval_prompts) if evaluate_every != 0 else _without_evaluation
        if not len(self.history):
            self._record(evaluate)
        order = self._order(len(prompts))
        left = budget
        while left >= answers:
            asked = [next(order) for _ in range(min(left, self.batch_size) // answers)]
            left -= len(asked) * answers
            for _ in self._learn(self._draw(take(prompts, asked))):
                if evaluate_every and self._steps % evaluate_every == 0:
                    self._record(evaluate)
            if (not evaluate_every or left < answers) and self.history.gradient_steps[-1] != self._steps:
                self._record(evaluate)
        return self.history

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on between two calls of `fit` as if nothing had happened."""
        return {
            "parameters": [parameter.detach().clone() for parameter in self._parameters],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "generator": None if self.generator is None else self.generator.get_state(),
            "history": copy.deepcopy(vars(self.history)),
            "counts": (self._queries, self._steps, self._generated, self._trained),
            "last": dict(self._last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of a tuner with the same policy and arguments.

        Raises
        ------
        ValueError : the state belongs to other parameters.
        """
        if [parameter.shape for parameter in self._parameters] != [saved.shape for saved in state["parameters"]]:
            raise ValueError("state must come from a tuner with the same trainable parameters")
        with torch.no_grad():
            for parameter, saved in zip(self._parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])
        self.history = TunerHistory(**copy.deepcopy(state["history"]))
        self._queries, self._steps, self._generated, self._trained = state["counts"]
        self._last = dict(state["last"])

    # ---------------------------------------------------------------------------------------------------------- a round

    def _draw(self, prompts: Any) -> _Batch:
        """Answers to the prompts, from the policy and from the fixed source, scored by all who will be asked."""
        answers = self.responses_per_prompt
        fresh = round(self.on_policy * answers)
        sources = [(self.policy, fresh), (self.data_policy, answers - fresh)]
        drawn = [(source, source.sample(prompts, count, self.generator)) for source, count in sources if count]
        together = torch.cat([actions for _, actions in drawn], 1)
        rewards = self._rewards(self.reward, prompts, together)
        # A language model is not asked for what nobody will look at.
        ref_logps = behaviour_logps = torch.zeros(rewards.shape, device=self._parameters[0].device)
        if self.loss.needs_reference or self.kl_weight:
            ref_logps = self._scored(self.ref, prompts, together).to(ref_logps.device)
        if self.loss.needs_behaviour or self.kl_weight:
            scored = [self._scored(source, prompts, actions) for source, actions in drawn]
            behaviour_logps = torch.cat([part.to(behaviour_logps.device) for part in scored], 1)
        self._queries += rewards.numel()
        self._generated += count_tokens(together)
        self._last["batch_reward"] = float(rewards.mean())
        rewards = rewards.to(ref_logps.device)
        if self.kl_weight:
            rewards = rewards - self.kl_weight * (behaviour_logps - ref_logps)
        return _Batch(prompts, together, rewards, ref_logps, behaviour_logps)

    def _learn(self, batch: _Batch) -> Iterator[int]:
        """The gradient steps on a batch; gives way after each."""
        groups = len(batch.rewards)
        size = groups if self.prompts_per_step is None else min(self.prompts_per_step, groups)
        order = self._order(groups)
        for _ in range(self.inner_steps):
            for start in range(0, groups, size):
                whole = size == groups
                rows = list(range(groups)) if whole else [next(order) for _ in range(min(size, groups - start))]
                self._step(batch if whole else batch.take(rows))
                yield self._steps

    def _step(self, batch: _Batch) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        at_once = len(batch.rewards)
        if self.micro_batch is not None:
            at_once = max(1, self.micro_batch // batch.rewards.shape[1])
        if at_once >= len(batch.rewards):
            out = self._loss(self._logps(batch), batch)
            torch.autograd.backward(out.loss)
        else:
            # The chain rule through the log-probabilities: d loss / d theta = sum_i (d loss / d logp_i) d logp_i / d
            # theta. The first factor is found on all answers together, the second on a few at a time.
            parts = [batch.take(list(rows)) for rows in torch.split(torch.arange(len(batch.rewards)), at_once)]
            with torch.no_grad():
                logps = torch.cat([self._logps(part) for part in parts])
            logps.requires_grad_()
            out = self._loss(logps, batch)
            (weights,) = torch.autograd.grad(out.loss, logps)
            for part, weight in zip(parts, torch.split(weights, at_once), strict=True):
                torch.autograd.backward(self._logps(part), weight)
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self._parameters, limit)
        if not math.isfinite(float(out.loss.detach() + norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(f"step {self._steps + 1}: loss or gradient is not finite: is lr too large?")
        self.optimizer.step()
        self._steps += 1
        self._trained += count_tokens(batch.actions)
        self._last["loss"] = float(out.loss.detach())
        self._last["chosen_logp"] = float(out.chosen_logps.mean())
        self._last["rejected_logp"] = float(out.rejected_logps.mean())

    def _loss(self, logps: Tensor, batch: _Batch) -> Any:
        return self.loss(logps, rewards=batch.rewards, ref_logps=batch.ref_logps, behaviour_logps=batch.behaviour_logps)

    def _logps(self, batch: _Batch) -> Float[Tensor, "prompts answers"]:
        return self.policy.log_prob(batch.prompts, batch.actions)

    def _scored(self, policy: Policy, prompts: Any, actions: Tensor) -> Float[Tensor, "prompts answers"]:
        """log pi without gradients, some prompts at a time where memory is short."""
        at_once = len(actions)
        if self.micro_batch is not None:
            at_once = max(1, self.micro_batch // actions.shape[1])
        with torch.no_grad():
            parts = [
                policy.log_prob(take(prompts, rows.tolist()), actions[rows.to(actions.device)])
                for rows in torch.split(torch.arange(len(actions)), at_once)
            ]
        return torch.cat(parts)

    def _rewards(self, reward: Reward, prompts: Any, actions: Tensor) -> Float[Tensor, "prompts answers"]:
        rewards = torch.as_tensor(reward(prompts, actions)).detach()
        rewards = rewards if rewards.is_floating_point() else rewards.to(torch.get_default_dtype())
        if rewards.shape != actions.shape[:2]:
            raise ValueError(f"reward must return shape {tuple(actions.shape[:2])}, got {tuple(rewards.shape)}")
        check_finite("what reward returns", rewards)
        return rewards

    def _order(self, count: int) -> Iterator[int]:
        """Numbers below `count`, one random permutation after the other."""
        device = "cpu" if self.generator is None else self.generator.device
        while True:
            yield from torch.randperm(count, generator=self.generator, device=device).tolist()

    # ------------------------------------------------------------------------------------------------------- evaluation

    def _evaluation(self, prompts: Any, eval_prompts: Any) -> Callable[[], dict[str, float]]:
        """What measures the policy on the prompts that are watched."""
        watched = take(prompts, range(min(len(prompts), _EVALUATED))) if eval_prompts is None else eval_prompts
        if exact(self.policy) is not None and exact(self.ref) is not None:
            return lambda: self._exactly(watched)
        drawn = self.ref.sample(watched, self.eval_responses, self.generator)
        logps = self._scored(self.ref, watched, drawn)
        return lambda: self._estimated(watched, drawn, logps)

    def _record(self, evaluate: Callable[[], dict[str, float]]) -> None:
        self.history.append(
            {
                **evaluate(),
                "reward_queries": self._queries,
                "gradient_steps": self._steps,
                "generated_tokens": self._generated,
                "trained_tokens": self._trained,
                **self._last,
            }
        )

    @torch.no_grad()
    def _exactly(self, prompts: Any) -> dict[str, float]:
        policy, ref = exact(self.policy), exact(self.ref)
        assert policy is not None
        assert ref is not None
        log_p, log_ref = policy(prompts), ref(prompts)
        p = log_p.exp()
        every = torch.arange(log_p.shape[1], device=log_p.device).expand(log_p.shape)
        rewards = self._rewards(self.eval_reward, prompts, every).to(p)
        return {
            "reward": float((p * rewards).sum(1).mean()),
            "kl": float((p * (log_p - log_ref)).sum(1).mean()),
            "reverse_kl": float((log_ref.exp() * (log_ref - log_p)).sum(1).mean()),
            "entropy": float(-(p * log_p).sum(1).mean()),
        }

    def _estimated(self, prompts: Any, ref_actions: Tensor, ref_logps: Tensor) -> dict[str, float]:
        actions = self.policy.sample(prompts, self.eval_responses, self.generator)
        logps = self._scored(self.policy, prompts, actions)
        return {
            "reward": float(self._rewards(self.eval_reward, prompts, actions).mean()),
            "kl": float((logps - self._scored(self.ref, prompts, actions)).mean()),
            "reverse_kl": float((ref_logps - self._scored(self.policy, prompts, ref_actions)).mean()),
            "entropy": float(-logps.mean()),
        }


def _without_evaluation() -> dict[str, float]:
    return dict.fromkeys(("reward", "kl", "reverse_kl", "entropy"), math.nan)


def _named_loss(name: Name, given: Mapping[str, Any]) -> GroupLoss:
    """The loss with those of the tuner's arguments that it has."""
    own = _OWN_PARAMETERS.get(name, ())
    if given["negative"] is not None and "negative" not in own:
        raise ValueError(f"negative must be None for loss {name!r}, got {given['negative']!r}")
    for argument, least in (("beta", 0), ("temperature", 0)):
        check_number(argument, given[argument], above=least)
    return GroupLoss(name, **{parameter: given[parameter] for parameter in own})
