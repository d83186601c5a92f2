"""PPO with a reward for every token, read out of a DPO model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.alignment.ppo_training import Experience, PPOConfig, PPOTrainer, Reward, Rollout
from workingpapers.alignment.reinforced_token.rewards import Granularity
from workingpapers.alignment.reinforced_token.wrapper import RTOReward, check_same_vocabulary
from workingpapers.alignment.sequences import SequenceBatch
from workingpapers.common.validation import check_choice, check_number

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class RTOConfig(PPOConfig):
    """How `RTOTrainer` trains; the defaults are those of the authors' code. `beta` is the paper's beta2.

    Attributes
    ----------
    beta1, beta3 : weights of the DPO log-ratios and of the sentence reward, at least 0.
    ratio_clip : scaled log-ratios are cut to [-ratio_clip, ratio_clip]; None or 0 leaves them.
    score_clip : of `RTOReward`.
    granularity : of `token_rewards`.
    delimiter_ids : tokens that end a sentence, for granularity "sentence".
    """

    beta1: float = 0.05
    beta3: float = 1.0
    ratio_clip: float | None = 0.05
    score_clip: float | None = 10.0
    granularity: Granularity = "token"
    delimiter_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta1", self.beta1, at_least=0)
        check_number("beta3", self.beta3, at_least=0)
        if self.ratio_clip is not None:
            check_number("ratio_clip", self.ratio_clip, at_least=0)
        if self.score_clip is not None:
            check_number("score_clip", self.score_clip, above=0)
        check_choice("granularity", self.granularity, get_args(Granularity))
        if self.granularity == "sentence" and not self.delimiter_ids:
            raise ValueError('delimiter_ids must be given when granularity is "sentence"')


class RTOTrainer(PPOTrainer):
    """Train a causal LM in place on the token rewards of a DPO model and the scores of whole answers.

    Parameters
    ----------
    model, ref_model, prompts, tokenizer, critic, optimizer, value_optimizer, accelerator : as in `PPOTrainer`.
    dpo_model : a frozen causal LM trained by DPO on the preference pairs, with the same vocabulary.
    args : an `RTOConfig`; its defaults when None. Algorithm "reinforce" uses the same rewards without a critic.
    sentence_reward : scores whole answers, the `reward` of `PPOTrainer`; may be None when `beta3` is 0.
    dpo_ref_model : the model that `dpo_model` was trained from, where it is not the reference.

    Attributes
    ----------
    history : as in `PPOTrainer`, with dpo_reward: what the scaled and clipped log-ratios add to the return of an answer
        (nothing when "shaping"). Where it is positive it pays for length: watch the two together.

    Raises
    ------
    ValueError : as `PPOTrainer` and `RTOReward`.

    Examples
    --------
    >>> args = RTOConfig(max_new_tokens=256)
    >>> trainer = RTOTrainer(model, ref, dpo, prompts, tokenizer, args, sentence_reward=scorer)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        dpo_model: nn.Module,
        prompts: Iterable[Any],
        tokenizer: Any = None,
        args: RTOConfig | None = None,
        *,
        sentence_reward: Reward | None = None,
        critic: nn.Module | None = None,
        dpo_ref_model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        value_optimizer: torch.optim.Optimizer | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        args = RTOConfig() if args is None else args
        if sentence_reward is None and args.beta3 > 0:
            raise ValueError("sentence_reward must be given when beta3 is above 0")
        check_same_vocabulary(dpo_model, model, "model")
        reward: Reward = _no_reward if sentence_reward is None else sentence_reward
        self.token_reward = RTOReward(
            dpo_model,
            model if ref_model is None else ref_model,  # never scored: the rollout brings its log-probabilities
            reward,
            beta1=args.beta1,
            beta2=args.beta,
            beta3=args.beta3,
            clip=args.ratio_clip,
            granularity=args.granularity,
            score_clip=args.score_clip,
            delimiter_ids=args.delimiter_ids,
            dpo_ref_model=dpo_ref_model,
            batch_size=args.batch_size,
        )
        super().__init__(
            model,
            ref_model,
            prompts,
            tokenizer,
            args,
            reward=reward,
            critic=critic,
            optimizer=optimizer,
            value_optimizer=value_optimizer,
            accelerator=accelerator,
        )

    def _rewards(self, rollout: Rollout) -> Float[Tensor, "answers length"]:
        with self._autocast():
            return self.token_reward(
                rollout.batch, ref_logps=rollout.ref_logprobs, sentence_reward=rollout.scores, beta2=self.beta
            )

    def _report(self, experience: Experience) -> dict[str, Float[Tensor, " answers"]]:
        found = super()._report(experience)
        score = (
            found["reward"]
            if self.args.score_clip is None
            else found["reward"].clamp(-self.args.score_clip, self.args.score_clip)
        )
        return found | {"dpo_reward": found["return"] - self.args.beta3 * score + self.beta * found["kl"]}


def _no_reward(batch: SequenceBatch) -> Tensor:
    return torch.zeros(len(batch))
