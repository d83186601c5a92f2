"""Training on what search over a model's own answers finds: SFT-Sharpening and RLHF-Sharpening."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.alignment.logprobs import sequence_logprobs
from workingpapers.alignment.prompts import Prompt, end_tokens, tokenize_prompts
from workingpapers.alignment.sequences import TokenSequence, collate_sequences
from workingpapers.alignment.sharpening.losses import SharpeningPairLoss
from workingpapers.alignment.sharpening.policy import (
    CausalPolicy,
    SequencePolicy,
    Tokens,
    as_policy,
)
from workingpapers.alignment.sharpening.report import exp_or_inf, log_mean_inverse
from workingpapers.alignment.sharpening.rewards import Extract, Kind, RewardFunction, check_kind, self_reward
from workingpapers.alignment.sharpening.selection import (
    AdaptiveSampler,
    Draw,
    Sharpened,
    choose_best,
    draw_responses,
    sharpen,
)
from workingpapers.alignment.training import Trainer, TrainingConfig
from workingpapers.common.validation import check_integer, require

OnStep = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class SharpeningReport:
    """What training changed, in the base's own judgement.

    Likelihood that rises while lengths fall, towards nothing in the end, is the sign that likelihood and quality
    disagree.

    Attributes
    ----------
    mean_base_loglik_before, mean_base_loglik_selected, mean_base_loglik : mean log pi_base, in nats per response, of
        the base's draws, of those selected for training (in RLHF-Sharpening: of the likeliest of each prompt), and of
        fresh draws from the trained model.
    mean_length_before, mean_length_selected, mean_length : their mean numbers of tokens.
    truncated_before, truncated : share of the base's and of the trained model's draws that were cut off. They have no
        probability and are left out of the means of log pi_base.
    duplicates : share of the base's draws that repeat an earlier complete one.
    log_coverage : logarithm of the mean of 1 / pi_base over the likeliest responses seen.
    samples : base draws per prompt, on average.
    dropped : prompts without a complete draw, which were not trained on.
    capped : prompts on which the adaptive rule gave up at its limit.
    """

    mean_base_loglik_before: float
    mean_base_loglik_selected: float
    mean_base_loglik: float
    mean_length_before: float
    mean_length_selected: float
    mean_length: float
    truncated_before: float
    truncated: float
    duplicates: float
    log_coverage: float
    samples: float
    dropped: int
    capped: int

    @property
    def coverage(self) -> float:
        """Estimate of ``E_x[1 / pi_base(y*(x) | x)]``, from above for each prompt; inf where it would overflow."""
        return exp_or_inf(self.log_coverage)


@dataclass(eq=False)
class _Sharpener:
    """What both estimators share: the base, how it is drawn from, and how its copy is trained.

    Attributes
    ----------
    model : the base, a transformers causal LM or a peft model around one. It is left as it is.
    tokenizer : of the model; may be None when prompts are token ids.
    sampler : draws from the base and scores for it in its place, for example a server with the same weights.
    n : how much is drawn; see the estimator.
    reward, extract : self-reward, as in `self_reward`.
    peft_rank : train low-rank adapters of this rank on all linear layers but the head, over the base's own weights.
        None trains what requires gradients in `model`: all of it, or the adapters of a peft model.
    epochs : passes over the selected data.
    lr : peak learning rate of AdamW; it falls linearly to zero.
    weight_decay : of AdamW.
    max_grad_norm : gradients are scaled down to this norm.
    batch_size : items in one forward pass of training.
    accumulation : forward passes per optimizer step.
    bf16 : autocast training to bfloat16. Log-probabilities of the base stay in the precision of its weights.
    gradient_checkpointing : recompute activations to save memory.
    max_new_tokens : tokens a response may have, its end token included.
    min_new_tokens : tokens it has at least.
    sampling_batch_size : responses drawn, or scored by the base, in one forward pass.
    random_state : of the draws, the order of the data and the adapters' start.
    """

    model: nn.Module = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    _: KW_ONLY
    sampler: SequencePolicy | None = None
    n: int = 50
    reward: Kind | RewardFunction = "loglik"
    extract: Extract | None = None
    peft_rank: int | None = None
    epochs: int = 30
    lr: float = 3e-4
    weight_decay: float = 0.1
    max_grad_norm: float = 0.1
    batch_size: int = 4
    accumulation: int = 1
    bf16: bool = False
    gradient_checkpointing: bool = False
    max_new_tokens: int = 512
    min_new_tokens: int = 0
    sampling_batch_size: int = 256
    random_state: int = 0
    model_: nn.Module = field(init=False, repr=False)
    report_: SharpeningReport = field(init=False, repr=False)
    history_: list[dict[str, float]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_integer("n", self.n, at_least=1)
        check_kind(self.reward, self.extract)
        if self.peft_rank is not None:
            check_integer("peft_rank", self.peft_rank, at_least=1)
            if hasattr(self.model, "peft_config"):
                raise ValueError("peft_rank must be None for a peft model, which has adapters already")
        check_integer("max_new_tokens", self.max_new_tokens, at_least=1)
        check_integer("min_new_tokens", self.min_new_tokens, at_least=0, at_most=self.max_new_tokens)
        check_integer("sampling_batch_size", self.sampling_batch_size, at_least=1)
        if self.sampler is not None:
            as_policy(self.sampler)
        self._training()

    def _training(self) -> TrainingConfig:
        return TrainingConfig(
            learning_rate=self.lr,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            epochs=self.epochs,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            bf16=self.bf16,
            gradient_checkpointing=self.gradient_checkpointing,
            random_state=self.random_state,
        )

    def _policy(self, model: nn.Module, generator: torch.Generator) -> CausalPolicy:
        return CausalPolicy(
            model,
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            eos_token_id=end_tokens(model, self.tokenizer),
            batch_size=self.sampling_batch_size,
            generator=generator,
        )

    def _copy_to_train(self) -> nn.Module:
        """A model of its own, except that parameters which will not change are the base's, sharing their memory."""
        shared = {
            id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
            for parameter in self.model.parameters()
            if self.peft_rank is not None or not parameter.requires_grad
        }
        model = copy.deepcopy(self.model, shared)
        if self.peft_rank is None:
            return model
        peft = require("peft", extra="language")
        config = peft.LoraConfig(
            r=self.peft_rank, lora_alpha=2 * self.peft_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng():  # peft draws from the global generator
            torch.manual_seed(self.random_state)
            adapted: nn.Module = peft.get_peft_model(model, config)
        return adapted

    def _report(
        self, base: SequencePolicy, trained: CausalPolicy, drawn: Sharpened, prompts: list[list[int]]
    ) -> SharpeningReport:
        """One fresh draw to each prompt, held against the draws that training began with."""
        fresh = trained.sample(prompts, 1)
        assert fresh.finished is not None
        finished = fresh.finished.tolist()
        whole = [
            (prompt, [response])
            for prompt, response, complete in zip(prompts, fresh.responses(), finished, strict=True)
            if complete
        ]
        after = np.full(1, np.nan)
        if whole:
            after = base.log_prob(*zip(*whole, strict=True)).double().cpu().numpy()
        complete = drawn.drawn - drawn.truncated
        kept = np.isfinite(drawn.base_logps)
        draws = drawn.drawn.sum()
        return SharpeningReport(
            mean_base_loglik_before=float(np.average(drawn.mean_loglik[kept], weights=complete[kept])),
            mean_base_loglik_selected=float(drawn.base_logps[kept].mean()),
            mean_base_loglik=float(after.mean()),
            mean_length_before=float(np.average(drawn.mean_length, weights=drawn.drawn)),
            mean_length_selected=float(np.mean([len(response) for response in drawn.responses if response])),
            mean_length=float(fresh.lengths.double().mean()),
            truncated_before=float(drawn.truncated.sum() / draws),
            truncated=1.0 - float(np.mean(finished)),
            duplicates=float(drawn.duplicates.sum() / draws),
            log_coverage=log_mean_inverse(drawn.max_loglik[kept]),
            samples=float(drawn.drawn.mean()),
            dropped=int((~kept).sum()),
            capped=int(drawn.capped.sum()),
        )


@dataclass(eq=False)
class SharpeningSFT(_Sharpener):
    """Fine-tune a causal LM on the best of its own answers, by its own judgement.

    For each prompt n answers are drawn from the base at temperature 1, the one of highest self-reward is kept, and a
    copy of the base is trained on the kept ones::

        max over pi   sum_i log pi(y_i | x_i),   y_i the best of n draws to x_i

    One draw from the result then does what best-of-n does at n times its price. The defaults are the paper's settings;
    its weight decay varied between 0 and 1 over models and tasks.

    Attributes
    ----------
    model, tokenizer, sampler, reward, extract, peft_rank, epochs, lr, weight_decay, max_grad_norm, batch_size,
    accumulation, bf16, gradient_checkpointing, max_new_tokens, min_new_tokens, sampling_batch_size, random_state : how
        it is drawn from and trained. The defaults of training are the paper's.
    n : draws to each prompt; gains level off at 10 to 20.
    adaptive : draw as many as an `AdaptiveSampler` asks for instead; True for its defaults. For short answers, with
        ``reward="loglik"``.
    model_ : the trained model.
    selected_ : what it was trained on, a `Sharpened`.
    report_ : a `SharpeningReport`.
    history_ : one dict per optimizer step: step, loss (nats per response), length, gradient_norm, learning_rate.

    Raises
    ------
    ValueError : a parameter is out of range.

    Examples
    --------
    >>> sh = SharpeningSFT(model, tokenizer, n=50, reward="loglik", peft_rank=16)  # doctest: +SKIP
    >>> sh.fit(prompts)  # doctest: +SKIP
    >>> print(sh.report_.mean_base_loglik, sh.report_.coverage)  # doctest: +SKIP
    """

    adaptive: bool | AdaptiveSampler = False
    selected_: Sharpened = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaptive and self.reward != "loglik":
            raise ValueError(f"adaptive must be False for reward={self.reward!r}: its rule compares log-likelihoods")

    def fit(self, prompts: Sequence[Prompt], on_step: OnStep | None = None) -> Self:
        """Draw, select and train.

        Parameters
        ----------
        prompts : text, conversations or token ids, without answers.
        on_step : called with the newest entry of the history after every optimizer step.

        Raises
        ------
        ValueError : no prompts, an empty one, or none with a draw that ended within `max_new_tokens`.

        Warns
        -----
        UserWarning : some prompts have no draw that ended, and are not trained on.
        RuntimeWarning : the adaptive rule gave up at its limit.
        """
        ids = tokenize_prompts(prompts, self.tokenizer)
        generator = torch.Generator().manual_seed(self.random_state)
        base = self.sampler or self._policy(self.model, generator)
        rule = AdaptiveSampler() if self.adaptive is True else self.adaptive or self.n
        drawn = sharpen(base, ids, rule, reward=self.reward, extract=self.extract)
        data = drawn.sequences()
        if not data:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must leave room for an end: it cut off every draw")
        if len(data) < len(ids):
            warnings.warn(
                f"{len(ids) - len(data)} of {len(ids)} prompts have no draw that ended within "
                f"max_new_tokens={self.max_new_tokens}, and are not trained on",
                UserWarning,
                stacklevel=2,
            )
        self.selected_ = drawn
        self.model_ = self._copy_to_train()
        self.history_ = _SFTTrainer(self.model_, data, self._training()).train(on_step=on_step)
        self.report_ = self._report(base, self._policy(self.model_, generator), drawn, ids)
        return self


@dataclass(eq=False)
class SharpeningRLHF(_Sharpener):
    """Regress a causal LM's log-ratios on differences of self-reward, on pairs of its own answers.

    Offline (``rounds=1``), n pairs to each prompt are drawn from the base, and a copy of it is trained with
    `SharpeningPairLoss`. With exploration (``rounds`` above 1), every further round draws one response of each pair
    from the policy trained so far and the other from the base, and trains on all pairs up to then; alpha > 0 makes it
    optimistic about what the base does not say. It can reach answers that are too rare for best-of-n to meet, where
    the class of policies generalises from common ones, and it needs no n-fold drawing; but it has beta to tune, and
    its targets, differences of log-probability over beta, are large for long answers.

    Attributes
    ----------
    model, tokenizer, sampler, reward, extract, peft_rank, epochs, lr, weight_decay, max_grad_norm, batch_size,
    accumulation, bf16, gradient_checkpointing, max_new_tokens, min_new_tokens, sampling_batch_size, random_state : how
        it is drawn from and trained.
    n : pairs to each prompt in each round; the paper's analysis has 1.
    beta : weight of the KL divergence to the base, above 0. The optimum for the default reward is, over whole
        responses, proportional to pi_base^(1 + 1/beta).
    alpha : weight of the optimism, at least 0.
    rounds : at least 1.
    epochs : passes over the pairs, in every round.
    model_ : the trained model.
    drawn_ : the base's draws of all rounds, a `Sharpened` whose responses are the best of them.
    report_ : a `SharpeningReport`.
    history_ : one dict per optimizer step: round, step (within it), loss, squared_error, implicit_margin,
        reward_margin, gradient_norm, learning_rate.

    Raises
    ------
    ValueError : a parameter is out of range.
    """

    n: int = 1
    beta: float = 0.5
    alpha: float = 0.0
    rounds: int = 1
    drawn_: Sharpened = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        SharpeningPairLoss(self.beta, alpha=self.alpha)
        check_integer("rounds", self.rounds, at_least=1)

    def fit(self, prompts: Sequence[Prompt], on_step: OnStep | None = None) -> Self:
        """Draw pairs and train, in one round or several.

        Parameters
        ----------
        prompts : text, conversations or token ids, without answers.
        on_step : called with the newest entry of the history after every optimizer step.

        Raises
        ------
        ValueError : no prompts, an empty one, or no pair of which both ended within `max_new_tokens`.
        """
        ids = tokenize_prompts(prompts, self.tokenizer)
        generator = torch.Generator().manual_seed(self.random_state)
        base = self.sampler or self._policy(self.model, generator)
        self.model_ = self._copy_to_train()
        trained = self._policy(self.model_, generator)
        self.history_ = []
        from_base: list[list[Draw]] = [[] for _ in ids]
        pairs: list[_Pair] = []
        for turn in range(self.rounds):
            if turn == 0:  # the policy is the base
                both = draw_responses(base, ids, 2 * self.n)
                second, first = [draws[: self.n] for draws in both], [draws[self.n :] for draws in both]
            else:
                both = second = draw_responses(base, ids, self.n)
                first = _scored_by(base, ids, draw_responses(trained, ids, self.n))
            for known, new in zip(from_base, both, strict=True):
                known += new
            for prompt, *sides in zip(ids, first, second, strict=True):
                pairs += self._pairs(prompt, *sides)
            if not pairs:
                raise ValueError(
                    f"max_new_tokens={self.max_new_tokens} must leave room for an end: every pair had a draw cut off"
                )
            loss = SharpeningPairLoss(self.beta, "sum", alpha=self.alpha)
            trainer = _PairTrainer(self.model_, pairs, loss, self._training())
            self.history_ += [{"round": turn + 1, **row} for row in trainer.train(on_step=on_step)]
        self.drawn_ = choose_best(ids, from_base, self.reward, self.extract)
        self.report_ = self._report(base, trained, self.drawn_, ids)
        return self

    def _pairs(self, prompt: list[int], first: list[Draw], second: list[Draw]) -> list[_Pair]:
        """The pairs of one prompt of which both ended; all that ended have a say in a majority."""
        complete = [draw for draw in first + second if draw.complete]
        if not complete:
            return []
        rewards = self_reward(
            None,
            [prompt],
            [[draw.response for draw in complete]],
            self.reward,
            self.extract,
            base_logps=torch.tensor([[draw.logp for draw in complete]]),
        )[0].tolist()
        reward_of = {tuple(draw.response): reward for draw, reward in zip(complete, rewards, strict=True)}
        return [
            _Pair(prompt, y, y2, reward_of[tuple(y.response)], reward_of[tuple(y2.response)])
            for y, y2 in zip(first, second, strict=True)
            if y.complete and y2.complete
        ]


class _Pair(NamedTuple):
    """Two complete responses to a prompt, with the base's log-probabilities and their self-rewards."""

    prompt: list[int]
    y: Draw
    y2: Draw
    r: float
    r2: float


class _Sharpening(Trainer):
    """The schedule of the paper: the rate falls linearly to zero."""

    def _schedule(self, step: int) -> float:
        return 1.0 - step / self.total_steps


class _SFTTrainer(_Sharpening):
    def __init__(self, model: nn.Module, data: list[TokenSequence], args: TrainingConfig) -> None:
        super().__init__(model, len(data), args)
        self._data = data

    def _accumulate(self, rows: list[int], total: int) -> dict[str, Tensor]:
        batch = collate_sequences([self._data[row] for row in rows]).to(self._device)
        with self._autocast():
            logps = sequence_logprobs(self.model, batch.input_ids, batch.attention_mask, batch.response_mask)
        loss = -logps  # of the whole response, not its mean over tokens: what is to become likely is the sequence
        torch.autograd.backward(loss.sum() / total)
        return {"loss": loss, "length": batch.lengths}


class _PairTrainer(_Sharpening):
    def __init__(self, model: nn.Module, pairs: list[_Pair], loss: SharpeningPairLoss, args: TrainingConfig) -> None:
        super().__init__(model, len(pairs), args)
        self._pairs, self._loss = pairs, loss

    def _accumulate(self, rows: list[int], total: int) -> dict[str, Tensor]:
        pairs = [self._pairs[row] for row in rows]
        sequences = [(pair.prompt, pair.y.response) for pair in pairs]
        sequences += [(pair.prompt, pair.y2.response) for pair in pairs]
        batch = collate_sequences(sequences).to(self._device)
        with self._autocast():
            logps = sequence_logprobs(self.model, batch.input_ids, batch.attention_mask, batch.response_mask)
        known: Float[Tensor, "4 pairs"] = logps.new_tensor(
            [[pair.y.logp, pair.y2.logp, pair.r, pair.r2] for pair in pairs]
        ).T
        out = self._loss(*logps.chunk(2), *known)
        torch.autograd.backward(out.loss / total)
        return {
            "loss": out.loss,
            "squared_error": out.squared_error,
            "implicit_margin": out.implicit_margin,
            "reward_margin": out.reward_margin,
        }


def _scored_by(base: SequencePolicy, prompts: Sequence[Tokens], draws: list[list[Draw]]) -> list[list[Draw]]:
    """The same draws with the base's log-probabilities; those cut off keep none."""
    logps = base.log_prob(prompts, [[draw.response for draw in several] for several in draws]).tolist()
    return [
        [draw._replace(logp=logp) if draw.complete else draw for draw, logp in zip(several, row, strict=True)]
        for several, row in zip(draws, logps, strict=True)
    ]
