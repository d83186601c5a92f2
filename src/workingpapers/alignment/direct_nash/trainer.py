"""The batched on-policy rounds for transformers causal language models (Algorithm 2 of the paper)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.alignment.direct_nash.losses import DNOLoss, DNOOutput
from workingpapers.alignment.direct_nash.pairs import (
    KINDS,
    PairSelection,
    ReplayMix,
    WinRateRanker,
    build_pairs,
    ngram_repetition,
)
from workingpapers.alignment.direct_nash.tabular import borda_scores
from workingpapers.alignment.logprobs import frozen
from workingpapers.alignment.preference_training import PreferenceConfig, PreferenceTrainer
from workingpapers.alignment.preferences import PreferenceBatch, TokenPair, collate_preferences, pair_logprobs
from workingpapers.alignment.prompts import end_tokens, tokenize_prompts
from workingpapers.alignment.sampling import sample_responses
from workingpapers.alignment.training import TrainingConfig
from workingpapers.common.validation import check_choice, check_integer, check_number


@dataclass(frozen=True)
class DirectNashConfig(TrainingConfig):
    """How `DirectNashTrainer` trains; the defaults follow the paper where it states them.

    Attributes
    ----------
    learning_rate, warmup, weight_decay, max_grad_norm, epochs, max_steps, batch_size, accumulation, bf16,
    gradient_checkpointing, random_state : of `TrainingConfig`; items are pairs, and every round is a run of its own
        with these settings.
    n_rounds : rounds, at least 1; each has its own part of the prompts.
    n_samples : K, answers drawn to every prompt, at least 1, and at least 2 without gold answers or with soft targets.
    eta : temperature of `DNOLoss`, above 0: a small one takes large steps.
    hard : learn from winners and losers (the paper's practice); False regresses on win rates (its theory).
    margin, student_margin, min_positive, allow : of `build_pairs`; scores are average win rates, in [0, 1].
    symmetrize, batched_judge : of `WinRateRanker`.
    replay, replay_decay : `first` and `decay` of `ReplayMix`; with hard labels alone, since win rates against an
        earlier policy are no targets for this one.
    max_repetition : answers with a larger `ngram_repetition` are automatic negatives; None: there are none.
    max_new_tokens : tokens an answer may have.
    temperature, top_p : of the draws.
    sampling_batch : answers drawn at a time, at least 1.
    """

    learning_rate: float = 5e-5
    batch_size: int = 8
    accumulation: int = 8
    n_rounds: int = 3
    n_samples: int = 5
    eta: float = 0.1
    hard: bool = True
    margin: float = 0.25
    student_margin: float | None = 0.15
    min_positive: float | None = None
    allow: tuple[str, ...] = KINDS
    symmetrize: bool = True
    batched_judge: bool = False
    replay: float = 0.30
    replay_decay: float = 0.5
    max_repetition: float | None = 0.5
    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float | None = 0.95
    sampling_batch: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_rounds", "n_samples", "max_new_tokens", "sampling_batch"):
            check_integer(name, getattr(self, name), at_least=1)
        DNOLoss(self.eta)
        ReplayMix(self.replay_decay, self.replay)
        check_number("margin", self.margin, at_least=0)
        if self.student_margin is not None:
            check_number("student_margin", self.student_margin, at_least=0)
        if self.min_positive is not None:
            check_number("min_positive", self.min_positive, at_most=1)
        for kind in self.allow:
            check_choice("allow", kind, KINDS)
        if self.max_repetition is not None:
            check_number("max_repetition", self.max_repetition, at_least=0, at_most=1)
        check_number("temperature", self.temperature, above=0)
        if self.top_p is not None:
            check_number("top_p", self.top_p, above=0, at_most=1)


class DirectNashTrainer:
    """Self-play rounds: draw answers, let the judge compare them, regress on large margins, renew the reference.

    A round draws K answers from the current policy pi_t to each prompt of its part, adds the teacher's answer if there
    is one, ranks them by their win rates against each other, and trains on the pairs that `build_pairs` keeps, mixed
    with some of earlier rounds. The reference of the loss is pi_t, whose log-probabilities are cached before the first
    step. The model is trained in place, on one device, without dropout.

    Parameters
    ----------
    model : a transformers causal LM, or a peft model around one. Only parameters that require gradients change.
    tokenizer : of the model; None when prompts and gold answers are token ids, which then also go to the judge.
    prompts : strings, conversations (lists of messages) or lists of token ids; at least `n_rounds`.
    prefer : the judge, called as ``prefer(prompt, y, z)`` with a prompt as it was given and answers as text; see
        `WinRateRanker`. It may go in circles.
    gold : the teacher's answer to each prompt; None: the policy's own answers alone.
    args : a `DirectNashConfig`; its defaults when None.
    ref_model : a frozen model that is the reference in every round, in place of pi_t: iterative DPO, to compare with.
    metric : called with the model after every round, higher is better; the parameters of the best round are those
        the model has in the end. Without it, those of the last round.
    eval_prompts : held-out prompts. After every round one answer to each is compared with that of the round before and
        of the start, which measures whether policies improve monotonically.

    Attributes
    ----------
    history : one dict per optimizer step: round (from 1), and what `PreferenceTrainer` reports.
    rounds : one dict per finished round, the first, round 0, for the start: round, metric, eval_length, win_previous
        and win_start (win rates on `eval_prompts`); and, from round 1 on, prompts, pairs, replayed, one count for each
        kind of pair, skipped_tied, skipped_no_positive, skipped_small_margin (prompts without a pair), negatives
        (automatic ones), student_length, teacher_length, chosen_length, rejected_length (mean tokens), finished
        (share of drawn answers that ended by themselves) and teacher_score (its mean win rate).
    best_round : the round whose parameters are kept.

    Raises
    ------
    ValueError : prompts, gold answers and arguments do not fit each other.

    Examples
    --------
    >>> trainer = DirectNashTrainer(model, tokenizer, prompts, judge, gold, eval_prompts=held_out)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    >>> [row["win_previous"] for row in trainer.rounds[1:]]  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Any],
        prefer: Callable[..., Any],
        gold: Sequence[Any] | None = None,
        args: DirectNashConfig | None = None,
        *,
        ref_model: nn.Module | None = None,
        metric: Callable[[nn.Module], float] | None = None,
        eval_prompts: Sequence[Any] | None = None,
    ) -> None:
        self.args = DirectNashConfig() if args is None else args
        self.model, self.tokenizer, self.ref_model, self.metric = model, tokenizer, ref_model, metric
        self.ranker = WinRateRanker(prefer, self.args.symmetrize, batched=self.args.batched_judge)
        if ref_model is model:
            raise ValueError("ref_model must be a frozen copy, got the model that is trained")
        self.prompts = list(prompts)
        self._prompt_ids = tokenize_prompts(self.prompts, tokenizer)
        if len(self.prompts) < self.args.n_rounds:
            raise ValueError(f"prompts must be at least n_rounds={self.args.n_rounds}, got {len(self.prompts)}")
        if gold is not None and len(gold) != len(self.prompts):
            raise ValueError(f"gold must have one answer for each of {len(self.prompts)} prompts, got {len(gold)}")
        if self.args.n_samples < 2 and (gold is None or not self.args.hard):
            raise ValueError("n_samples must be at least 2 without gold answers or with soft targets, got 1")
        self.gold = None if gold is None else list(gold)
        self._ends = end_tokens(model, tokenizer)
        self._gold_ids = None if gold is None else [self._answer_ids(answer) for answer in self.gold or ()]
        self.eval_prompts = [] if eval_prompts is None else list(eval_prompts)
        self._eval_ids = (
            tokenize_prompts(self.eval_prompts, tokenizer, name="eval_prompts") if self.eval_prompts else []
        )

        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._trainable:
            raise ValueError("model must have parameters that require gradients")
        order = np.random.default_rng(self.args.random_state).permutation(len(self.prompts))
        self._parts = [part.tolist() for part in np.array_split(order, self.args.n_rounds)]
        self.history: list[dict[str, float]] = []
        self.rounds: list[dict[str, float]] = []
        self.best_round = 0
        self._best: dict[str, Tensor] = {}
        self._pairs: list[list[TokenPair]] = []  # of each round begun
        self._round: _Round | None = None  # the one under way
        self._report: dict[str, float] = {}  # on it
        self._eval_answers: dict[str, list[Any]] = {}

    @property
    def finished(self) -> bool:
        """Whether all rounds are over."""
        return len(self.rounds) > self.args.n_rounds

    def train(
        self, steps: int | None = None, on_step: Callable[[dict[str, float]], None] | None = None
    ) -> list[dict[str, float]]:
        """Take the remaining optimizer steps of all rounds, or the next `steps` of them, and return `history`.

        Parameters
        ----------
        steps : how many steps to take at most; all that remain when None.
        on_step : called with the newest entry of `history` after every step.

        Raises
        ------
        FloatingPointError : the gradient of a step is not finite; the model is as it was before that step.

        Warns
        -----
        UserWarning : a round kept no pair and leaves the policy as it is.
        """
        remaining = None if steps is None else check_integer("steps", steps, at_least=0)

        def record(row: dict[str, float]) -> None:
            self.history.append({"round": len(self.rounds), **row})
            if on_step is not None:
                on_step(self.history[-1])

        while not self.finished and remaining != 0:
            if not self.rounds:
                self.rounds.append({"round": 0, **self._evaluate()})
            if self._round is None:
                self._begin_round()
            if self._round is not None:
                before = len(self.history)
                self._round.train(remaining, record)
                remaining = None if remaining is None else remaining - (len(self.history) - before)
                if len(self._round.history) < self._round.total_steps:
                    break
            self._end_round()
        return self.history

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on later exactly as if the run had not been interrupted."""
        return {
            "parameters": {name: parameter.detach().clone() for name, parameter in self._trainable.items()},
            "history": [dict(row) for row in self.history],
            "rounds": [dict(row) for row in self.rounds],
            "best_round": self.best_round,
            "best": {name: values.clone() for name, values in self._best.items()},
            "pairs": [[tuple(pair) for pair in pairs] for pairs in self._pairs],
            "round": None if self._round is None else self._round.state_dict(),
            "report": dict(self._report),
            "eval_answers": {name: list(answers) for name, answers in self._eval_answers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of a trainer with the same model, data and arguments.

        Raises
        ------
        ValueError : the state belongs to other parameters.
        """
        if state["parameters"].keys() != self._trainable.keys():
            raise ValueError("state must come from a trainer with the same trainable parameters")
        self._restore(state["parameters"])
        self.history = [dict(row) for row in state["history"]]
        self.rounds = [dict(row) for row in state["rounds"]]
        self.best_round = state["best_round"]
        self._best = {name: values.clone() for name, values in state["best"].items()}
        self._pairs = [[TokenPair(*pair) for pair in pairs] for pairs in state["pairs"]]
        self._report = dict(state["report"])
        self._eval_answers = {name: list(answers) for name, answers in state["eval_answers"].items()}
        self._round = None
        if state["round"] is not None:
            self._round = _Round(self.model, self._training_pairs(), self.args, len(self.rounds))
            self._round.load_state_dict(state["round"])

    def _begin_round(self) -> None:
        """Draw and judge answers, build pairs, score them under the reference."""
        part = self._parts[len(self.rounds) - 1]
        drawn = sample_responses(
            self.model,
            [self._prompt_ids[row] for row in part],
            n=self.args.n_samples,
            generator=self._generator(len(self.rounds)),
            batch_size=self.args.sampling_batch,
            **self._sampling(),
        )
        responses, k = drawn.responses(), self.args.n_samples
        ids = [responses[start : start + k] for start in range(0, len(responses), k)]
        answers = [[self._text(tokens) for tokens in own] for own in ids]
        source = ["student"] * k
        if self.gold is not None and self._gold_ids is not None:
            source.append("teacher")
            for place, row in enumerate(part):
                ids[place].append(self._gold_ids[row])
                answers[place].append(self.gold[row])

        tables = np.stack(self.ranker.preferences([self.prompts[row] for row in part], answers))
        scores = borda_scores(tables)
        negatives = np.zeros(scores.shape, dtype=bool)
        if self.args.max_repetition is not None:
            shares = [[ngram_repetition(tokens) for tokens in own] for own in ids]
            negatives = np.array(shares) > self.args.max_repetition
        selection = build_pairs(
            scores,
            source,
            margin=self.args.margin,
            student_margin=self.args.student_margin,
            min_positive=self.args.min_positive,
            allow=self.args.allow,
            automatic_negatives=negatives,
        )
        rates = scores if self.args.hard else _rates_against_students(tables, k)
        self._pairs.append(
            [
                TokenPair(
                    self._prompt_ids[part[place]],
                    ids[place][winner],
                    ids[place][loser],
                    scores=(float(rates[place, winner]), float(rates[place, loser])),
                )
                for place, winner, loser in selection.pairs.tolist()
            ]
        )
        pairs = self._training_pairs()
        self._report = self._summary(selection, ids, len(pairs)) | {
            "negatives": int(negatives.sum()),
            "finished": float(drawn.finished.float().mean()) if drawn.finished is not None else float("nan"),
        }
        if self.gold is not None:
            self._report["teacher_score"] = float(scores[:, -1].mean())
        if not pairs:
            warnings.warn(f"round {len(self.rounds)} kept no pair: {selection.skipped}", UserWarning, stacklevel=3)
            return
        self._round = _Round(self.model, pairs, self.args, len(self.rounds))
        self._round.score_reference(self.model if self.ref_model is None else self.ref_model)

    def _end_round(self) -> None:
        number = len(self.rounds)
        self._round = None
        row = {"round": number, **self._evaluate(), **self._report}
        self.rounds.append(row)
        if self.metric is None or number == 1 or row["metric"] > self.rounds[self.best_round]["metric"]:
            self.best_round = number
            if self.metric is not None:
                self._best = {name: parameter.detach().clone() for name, parameter in self._trainable.items()}
        if self.finished and self._best:
            self._restore(self._best)

    def _training_pairs(self) -> list[TokenPair]:
        """The newest round's pairs with a share of the earlier ones."""
        first = self.args.replay if self.args.hard else 0.0
        return ReplayMix(self.args.replay_decay, first, self.args.random_state)(self._pairs)

    def _summary(self, selection: PairSelection, ids: list[list[list[int]]], used: int) -> dict[str, float]:
        newest, k = self._pairs[-1], self.args.n_samples
        report: dict[str, float] = {"prompts": len(ids), "pairs": len(newest), "replayed": used - len(newest)}
        report |= selection.counts | {f"skipped_{reason}": count for reason, count in selection.skipped.items()}
        report["student_length"] = float(np.mean([len(tokens) for own in ids for tokens in own[:k]]))
        if self.gold is not None:
            report["teacher_length"] = float(np.mean([len(own[k]) for own in ids]))
        if newest:
            report["chosen_length"] = float(np.mean([len(pair.chosen) for pair in newest]))
            report["rejected_length"] = float(np.mean([len(pair.rejected) for pair in newest]))
        return report

    def _evaluate(self) -> dict[str, float]:
        """The metric, and how often held-out answers win against those of the round before and of the start."""
        found: dict[str, float] = {}
        if self.metric is not None:
            found["metric"] = check_number("metric", self.metric(self.model))
        if self.eval_prompts:
            drawn = sample_responses(
                self.model,
                self._eval_ids,
                generator=self._generator(0),
                batch_size=self.args.sampling_batch,
                **self._sampling(),
            )
            answers = [self._text(tokens) for tokens in drawn.responses()]
            found["eval_length"] = float(drawn.lengths.float().mean())
            for name, others in self._eval_answers.items():
                pairs = [list(pair) for pair in zip(answers, others, strict=True)]
                tables = self.ranker.preferences(self.eval_prompts, pairs)
                found[f"win_{name}"] = float(np.mean([table[0, 1] for table in tables]))
            self._eval_answers = {"start": answers} | self._eval_answers | {"previous": answers}
        return found

    def _sampling(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.args.max_new_tokens,
            "eos_token_id": self._ends,
            "temperature": self.args.temperature,
            "top_p": self.args.top_p,
        }

    def _generator(self, number: int) -> torch.Generator:
        """Random numbers of one round, the same whether or not the run was interrupted; 0 is the evaluation."""
        seed = np.random.SeedSequence([self.args.random_state, number]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed >> np.uint64(1)))

    def _text(self, tokens: list[int]) -> Any:
        return tokens if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _answer_ids(self, answer: Any) -> list[int]:
        """Token ids of a gold answer, which ends as the policy's own do."""
        if not isinstance(answer, str):
            ids = [int(token) for token in answer]
        elif self.tokenizer is None:
            raise ValueError("tokenizer may be None only when prompts and gold answers are token ids")
        else:
            ids = list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
            end = self.tokenizer.eos_token_id
            ids += [] if end is None or ids[-1:] == [end] else [end]
        if not ids:
            raise ValueError("gold must have no empty answer")
        return ids

    def _restore(self, parameters: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._trainable.items():
                parameter.copy_(parameters[name])


class _Round(PreferenceTrainer):
    """The regression of one round, whose reference is what was cached at its beginning."""

    def __init__(self, model: nn.Module, pairs: list[TokenPair], args: DirectNashConfig, number: int) -> None:
        loss = DNOLoss(args.eta, args.hard, reduction="sum")
        loss.needs_reference = False  # `_evaluate` brings the cached one
        shared = {field.name: getattr(args, field.name) for field in fields(TrainingConfig)}
        shared["random_state"] += number
        super().__init__(model, None, pairs, args=PreferenceConfig(**shared), loss=loss)

    def score_reference(self, policy: nn.Module) -> None:
        """Cache the log-probabilities of all pairs under a policy, in evaluation mode."""
        with frozen(policy) as reference:
            for start in range(0, len(self.pairs), self.args.batch_size):
                rows = slice(start, start + self.args.batch_size)
                batch = collate_preferences(self.pairs[rows]).to(self._device)
                with self._autocast():
                    self._reference[:, rows] = torch.stack(pair_logprobs(reference, batch)).to(self._reference)

    def _evaluate(
        self,
        batch: PreferenceBatch,
        rows: list[int],
        chosen: Float[Tensor, " pairs"],
        rejected: Float[Tensor, " pairs"],
        reference: Float[Tensor, "2 pairs"] | None,
    ) -> DNOOutput:
        rates: list[Tensor] = [] if batch.scores is None else list(batch.scores.T)
        output: DNOOutput = self.loss(chosen, rejected, *self._reference[:, rows].to(chosen), *rates)
        return output


def _rates_against_students(
    tables: Float[np.ndarray, "prompts candidates candidates"], k: int
) -> Float[np.ndarray, "prompts candidates"]:
    """Unbiased estimates of r_t: average wins against the answers drawn from pi_t, an answer itself left out."""
    against = tables[:, :, :k].sum(-1)
    rates: np.ndarray = against / k
    rates[:, :k] = (against[:, :k] - 0.5) / (k - 1)
    return rates
