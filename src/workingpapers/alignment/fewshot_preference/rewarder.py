"""One model as the reward function and the policy of whoever's preferences stand in its context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from workingpapers.alignment.fewshot_preference.episodes import Episode, Text
from workingpapers.alignment.fewshot_preference.template import EpisodeTemplate, FewShotTemplate, Record
from workingpapers.alignment.logprobs import frozen, reference_of, sequence_logprobs
from workingpapers.alignment.preferences import collate_preferences, pair_logprobs
from workingpapers.alignment.sampling import sample_responses
from workingpapers.alignment.sequences import collate_sequences
from workingpapers.common.validation import check_integer, check_number


@dataclass(frozen=True)
class PersonalResponse:
    """An answer for one user.

    Attributes
    ----------
    text : the response.
    description : what the response was conditioned on; None where no description was asked for.
    """

    text: str
    description: str | None


class PersonalRewarder:
    """Score and write responses for a user who is known by a few labelled preferences; nothing is trained per user.

    Parameters
    ----------
    model : trained by `FSPOTrainer`.
    ref_model : its reference; None for a peft model with the adapters off.
    tokenizer : of the model.
    template : the one the model was trained with.
    beta : of the loss the model was trained with, above 0; it scales the scores.
    max_length : tokens a sequence may have; the oldest shots are dropped where there are more.
    batch_size : sequences (in `margins`: pairs) scored at a time.

    Raises
    ------
    ValueError : an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        tokenizer: Any,
        template: EpisodeTemplate,
        *,
        beta: float = 0.01,
        max_length: int = 8192,
        batch_size: int = 8,
    ) -> None:
        self.model, self.ref_model, self.tokenizer, self.template = model, ref_model, tokenizer, template
        self.beta = check_number("beta", beta, above=0)
        self.max_length = check_integer("max_length", max_length, at_least=2)
        self.batch_size = check_integer("batch_size", batch_size, at_least=1)

    def score(
        self,
        shots: Sequence[Record],
        prompt: Text,
        responses: Sequence[Text],
        *,
        description: Text | None = None,
    ) -> Float[np.ndarray, " responses"]:
        """The user's implicit reward of each response, ``beta * log(pi_theta / pi_ref)(y | x, shots)``.

        Only differences between responses to the same prompt and shots mean something.

        Parameters
        ----------
        shots : the user's comparisons, or records as for `as_comparison`, oldest first.
        prompt : what the responses answer.
        responses : at least one.
        description : of the user, for templates that describe; the most likely one is generated when None. It is the
            same for all responses.

        Raises
        ------
        ValueError : there are no responses, or the reference is missing.
        """
        if isinstance(responses, str) or not len(responses):
            raise ValueError("responses must be a list with at least one response")
        if description is None and getattr(self.template, "describe", False):
            [drawn] = self._descriptions(shots, prompt, 1, 128, temperature=0.0, generator=None)
            description = drawn
        sequences = self.template.fit_responses(
            shots, prompt, responses, self.tokenizer, self.max_length, description=description
        )
        scores = []
        for start in range(0, len(sequences), self.batch_size):
            batch = collate_sequences(sequences[start : start + self.batch_size]).to(self._device)
            masked = batch.input_ids, batch.attention_mask, batch.response_mask
            with frozen(self.model) as policy:
                logprobs = sequence_logprobs(policy, *masked)
            with reference_of(self.model, self.ref_model) as reference:
                scores.append(self.beta * (logprobs - sequence_logprobs(reference, *masked)))
        return torch.cat(scores).double().cpu().numpy()

    def margins(self, episodes: Iterable[Episode]) -> Float[np.ndarray, " episodes"]:
        """By how much each query's chosen response is scored above the rejected one; positive where that is right.

        Parameters
        ----------
        episodes : of users that were trained on or not; the share of positive margins is the accuracy.

        Raises
        ------
        ValueError : there are no episodes, or the reference is missing.
        """
        pairs = [
            self.template.fit(episode.shots, episode.query, self.tokenizer, self.max_length) for episode in episodes
        ]
        if not pairs:
            raise ValueError("episodes must hold at least one episode")
        margins = []
        for start in range(0, len(pairs), self.batch_size):
            batch = collate_preferences(pairs[start : start + self.batch_size]).to(self._device)
            with frozen(self.model) as policy:
                chosen, rejected = pair_logprobs(policy, batch)
            with reference_of(self.model, self.ref_model) as reference:
                ref_chosen, ref_rejected = pair_logprobs(reference, batch)
            margins.append(self.beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))
        return torch.cat(margins).double().cpu().numpy()

    def generate(
        self,
        shots: Sequence[Record],
        prompt: str,
        *,
        describe: bool | None = None,
        description: str | None = None,
        n: int = 1,
        max_new_tokens: int = 256,
        max_description_tokens: int = 128,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> list[PersonalResponse]:
        """Write what the user of the shots would like to read.

        Parameters
        ----------
        shots : the user's comparisons, or records as for `as_comparison`, oldest first.
        prompt : what to respond to.
        describe : first write a description of the user, then a response that follows it; as the template says when
            None.
        description : a description to use in place of a generated one; needs `describe`.
        n : responses, each with a description of its own.
        max_new_tokens, max_description_tokens : of a response and of a description, at least 1.
        temperature : 0 takes the most likely token.
        generator : on any device; the global one when None.

        Raises
        ------
        ValueError : an argument is out of range, or the prompt does not fit.
        TypeError : the template is not a `FewShotTemplate`, and so has no headings to begin with.
        """
        template = self._text_template()
        check_integer("n", n, at_least=1)
        if describe if describe is not None else template.describe:
            given: list[str | None] = (
                [description] * n
                if description is not None
                else [
                    *self._descriptions(
                        shots, prompt, n, max_description_tokens, temperature=temperature, generator=generator
                    )
                ]
            )
            template = replace(template, describe=True)
            openings = [f"{template.description_heading}{text}\n{template.response_heading}" for text in given]
        elif description is not None:
            raise ValueError("description needs describe=True")
        else:
            given = [None] * n
            template = replace(template, describe=False, teacher_forced=False)
            openings = [template.response_heading] * n
        texts = self._continue(
            template, shots, prompt, openings, max_new_tokens, temperature=temperature, generator=generator
        )
        return [PersonalResponse(text, found) for text, found in zip(texts, given, strict=True)]

    def _descriptions(
        self,
        shots: Sequence[Record],
        prompt: Text,
        n: int,
        max_new_tokens: int,
        *,
        temperature: float,
        generator: torch.Generator | None,
    ) -> list[str]:
        """What the model says about the user before it goes on to the response."""
        template = replace(self._text_template(), describe=True)
        texts = self._continue(
            template,
            shots,
            prompt,
            [template.description_heading] * n,
            max_new_tokens,
            temperature=temperature,
            generator=generator,
        )
        return [text.partition(template.response_heading.strip())[0].strip() for text in texts]

    def _continue(
        self,
        template: FewShotTemplate,
        shots: Sequence[Record],
        prompt: Text,
        openings: Sequence[str],
        max_new_tokens: int,
        *,
        temperature: float,
        generator: torch.Generator | None,
    ) -> list[str]:
        room = self.max_length - check_integer("max_new_tokens", max_new_tokens, at_least=1)
        if room < 1:
            raise ValueError(f"max_new_tokens must be below max_length={self.max_length}, got {max_new_tokens}")
        ids = [template.fit_opening(shots, prompt, self.tokenizer, room, opening=opening) for opening in openings]
        alike = all(one == ids[0] for one in ids)  # then the shots pass the model once
        drawn = sample_responses(
            self.model,
            ids[:1] if alike else ids,
            n=len(ids) if alike else 1,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            temperature=temperature,
            generator=generator,
        )
        return [self.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in drawn.responses()]

    def _text_template(self) -> FewShotTemplate:
        if not isinstance(self.template, FewShotTemplate):
            raise TypeError(f"text is generated with a FewShotTemplate alone, got a {type(self.template).__name__}")
        return self.template

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device
