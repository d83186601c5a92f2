"""Token rewards of tokenised batches, by the models themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.alignment.logprobs import frozen, reference_of, token_logprobs
from workingpapers.alignment.ppo_training import Reward, in_parts, score_answers
from workingpapers.alignment.reinforced_token.rewards import Granularity, delimiter_mask, token_rewards
from workingpapers.alignment.sequences import SequenceBatch
from workingpapers.common.validation import check_choice, check_integer, check_number


class RTOReward:
    """A DPO model, its reference and a reward model as one reward of tokens, for any policy-gradient loop.

    Parameters
    ----------
    dpo_model : a transformers causal LM trained by DPO, or a peft model around one.
    ref_model : the reference of the divergence, and of the DPO model unless `dpo_ref_model` is given; None for a peft
        `dpo_model`, whose reference is itself with the adapters off.
    reward_model : scores whole answers, see `score_answers`; may be None when `beta3` is 0.
    beta1, beta2, beta3, clip, granularity : of `token_rewards`.
    score_clip : sentence rewards are cut to [-score_clip, score_clip] before they are weighted; None leaves them. The
        authors' code uses 10, on scores standardised by fixed numbers that come with the reward model.
    delimiter_ids : tokens that end a sentence; needed for granularity "sentence".
    dpo_ref_model : the model that `dpo_model` was trained from, where it is not `ref_model`.
    batch_size : answers in one forward pass.

    Raises
    ------
    ValueError : an argument is out of range or missing, or two models have vocabularies of different sizes: log-ratios
        between them mean nothing.

    Examples
    --------
    >>> reward = RTOReward(dpo_model, ref_model, reward_model, clip=0.05)  # doctest: +SKIP
    >>> rewards = reward(sample_responses(policy, prompts, max_new_tokens=64))  # doctest: +SKIP
    """

    def __init__(
        self,
        dpo_model: nn.Module,
        ref_model: nn.Module | None = None,
        reward_model: Reward | None = None,
        *,
        beta1: float = 0.05,
        beta2: float = 0.01,
        beta3: float = 1.0,
        clip: float | None = None,
        granularity: Granularity = "token",
        score_clip: float | None = None,
        delimiter_ids: Sequence[int] | None = None,
        dpo_ref_model: nn.Module | None = None,
        batch_size: int = 8,
    ) -> None:
        for name, value in (("beta1", beta1), ("beta2", beta2), ("beta3", beta3), ("clip", clip)):
            if value is not None:
                check_number(name, value, at_least=0)
        if score_clip is not None:
            check_number("score_clip", score_clip, above=0)
        check_choice("granularity", granularity, get_args(Granularity))
        if granularity == "sentence" and not delimiter_ids:
            raise ValueError('delimiter_ids must be given when granularity is "sentence"')
        if beta3 > 0 and reward_model is None:
            raise ValueError("reward_model must be given when beta3 is above 0")
        with reference_of(dpo_model, ref_model):
            pass  # refuses a missing reference
        for name, other in (("ref_model", ref_model), ("dpo_ref_model", dpo_ref_model)):
            if other is not None:
                check_same_vocabulary(dpo_model, other, name)
        self.dpo_model, self.ref_model, self.dpo_ref_model = dpo_model, ref_model, dpo_ref_model
        self.reward_model = reward_model
        self.beta1, self.beta2, self.beta3, self.clip, self.score_clip = beta1, beta2, beta3, clip, score_clip
        self.granularity: Granularity = granularity
        self.delimiter_ids = delimiter_ids
        self.batch_size = check_integer("batch_size", batch_size, at_least=1)

    def __call__(
        self,
        batch: SequenceBatch,
        *,
        ref_logps: Float[Tensor, "answers length"] | None = None,
        sentence_reward: Float[Tensor, " answers"] | None = None,
        beta2: float | None = None,
    ) -> Float[Tensor, "answers length"]:
        """Rewards of the tokens of answers.

        Parameters
        ----------
        batch : answers with `logprobs`, those of the policy that drew them.
        ref_logps, sentence_reward : where the loop has them already; computed when None.
        beta2 : the price of divergence in force, for a loop that adapts it.

        Raises
        ------
        ValueError : `batch` has no log-probabilities, or the models return what `token_rewards` refuses.
        """
        if batch.logprobs is None:
            raise ValueError("batch must have logprobs, those of the policy that drew the answers")
        if sentence_reward is None and self.reward_model is not None:
            sentence_reward = score_answers(self.reward_model, batch, self.batch_size)
        if sentence_reward is not None and self.score_clip is not None:
            sentence_reward = sentence_reward.clamp(-self.score_clip, self.score_clip)
        if ref_logps is None:
            with reference_of(self.dpo_model, self.ref_model) as reference:
                ref_logps = self._logps(reference, batch)
        with frozen(self.dpo_model) as dpo:
            dpo_logps = self._logps(dpo, batch)
        dpo_ref_logps = None
        if self.dpo_ref_model is not None:
            with frozen(self.dpo_ref_model) as dpo_reference:
                dpo_ref_logps = self._logps(dpo_reference, batch)
        return token_rewards(
            dpo_logps,
            ref_logps,
            batch.logprobs,
            batch.response_mask,
            sentence_reward,
            beta1=self.beta1,
            beta2=self.beta2 if beta2 is None else beta2,
            beta3=self.beta3,
            clip=self.clip,
            granularity=self.granularity,
            delimiters=None if self.delimiter_ids is None else delimiter_mask(batch.input_ids, self.delimiter_ids),
            dpo_ref_logps=dpo_ref_logps,
        )

    def _logps(self, model: nn.Module, batch: SequenceBatch) -> Float[Tensor, "answers length"]:
        return in_parts(
            batch,
            self.batch_size,
            lambda part: token_logprobs(model, part.input_ids, part.attention_mask, part.response_mask),
        )


def check_same_vocabulary(model: nn.Module, other: nn.Module, name: str) -> None:
    """Raise ValueError unless both models give logits for equally many tokens."""
    sizes = [_vocabulary(model), _vocabulary(other)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{name} must have the vocabulary of the DPO model, {sizes[0]} tokens, got {sizes[1]}")


def _vocabulary(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)
