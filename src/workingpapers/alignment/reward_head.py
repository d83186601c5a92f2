"""Scalar reward models on transformers, and the Bradley-Terry loss they are trained with.

`RewardModel` puts one linear unit on the hidden state of an answer's last real token, or takes over the head of an
``AutoModelForSequenceClassification``. The attention mask says which token is last, so an answer may end in the token
that is also used for padding, where transformers' own heads, which look for the padding id, read one token too early.

References: Stiennon et al., "Learning to summarize from human feedback", NeurIPS 2020 (head and loss). The loss with
margins and centring is that of trl's RewardTrainer; the score penalty is that of Open-Assistant's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from workingpapers.alignment.logprobs import _accepted_extras
from workingpapers.alignment.preferences import PreferenceBatch
from workingpapers.common.validation import check_choice, check_number


class RewardModel(nn.Module):
    """One score per sequence from any transformers language model.

    Parameters
    ----------
    model : what carries the reward; part of this module, not a copy.

        - a base model (``AutoModel``) or a causal LM: gets a new head. Only the hidden states of a causal LM are
          computed, never its logits;
        - an ``AutoModelForSequenceClassification`` with ``num_labels=1``: its own head is used, at the last real
          token where it is a decoder with a `score` head, else as the model itself does (BERT's pooled first token);
        - a peft model around one of them, except prompt learning, whose virtual tokens are not seen here.
    generator : of the new head's weights, normal with deviation 1 / sqrt(width + 1); members of an ensemble differ in
        its seed. The global generator when None. Not used where `model` brings a head.

    Attributes
    ----------
    model : as given.
    head : the new linear head without bias; None where `model` brings its own.

    Raises
    ------
    ValueError : the classifier has more than one label, or the adapters are prompts.

    Examples
    --------
    >>> reward = RewardModel(AutoModel.from_pretrained(name))  # doctest: +SKIP
    >>> chosen, rejected = pair_scores(reward, collate_preferences(pairs))  # doctest: +SKIP
    >>> bradley_terry_loss(chosen, rejected).backward()  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError("model must not be a peft prompt-learning model; use adapters such as LoRA")
        self.model = model
        architecture = self._architecture()
        self.head: nn.Linear | None = None
        if _is_classifier(architecture):
            labels = int(architecture.config.num_labels)
            if labels != 1:
                raise ValueError(f"model must be a classifier with num_labels=1, got {labels}")
            return
        weights = next(self._backbone().parameters())
        width = int(architecture.config.get_text_config().hidden_size)
        self.head = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.head.weight, std=(width + 1) ** -0.5, generator=generator)
        self.head.to(weights.device, weights.dtype)

    def forward(
        self, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, " batch"]:
        """Scores of a batch, padded on either side.

        Parameters
        ----------
        input_ids : token ids of prompt and answer.
        attention_mask : 1 on real tokens, 0 on padding; None when nothing is padded.

        Returns
        -------
        One score per sequence, in float32 where the model computes in half precision.

        Raises
        ------
        ValueError : the shapes differ, or a sequence has no real token.
        """
        mask = self._checked_mask(input_ids, attention_mask)
        head = self._head()
        if head is None:
            scores: Tensor = self.model(input_ids=input_ids, attention_mask=mask).logits
        else:
            states = self._states(input_ids, mask)
            last = mask.shape[1] - 1 - (mask != 0).flip(1).int().argmax(1)
            scores = head(states[torch.arange(len(states), device=states.device), last.to(states.device)])
        return _at_least_single(scores.squeeze(-1))

    def token_values(
        self, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length"]:
        """Scores of all prefixes, as the value function of PPO needs them.

        Parameters as in `forward`.

        Returns
        -------
        Entry t belongs to the tokens before token t, like the entries of `token_logprobs`; entry 0 is 0, and entries
        at padding mean nothing.

        Raises
        ------
        ValueError : as `forward`, or the model is an encoder that pools in its own way.
        """
        mask = self._checked_mask(input_ids, attention_mask)
        head = self._head()
        if head is None:
            raise ValueError("token_values needs a head on hidden states; this model pools in its own way")
        before = _at_least_single(head(self._states(input_ids, mask)[:, :-1]).squeeze(-1))
        return torch.cat([before.new_zeros(len(before), 1), before], dim=1)

    def _checked_mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if input_ids.ndim != 2 or mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids and attention_mask must have one shape (batch, length), got {tuple(input_ids.shape)} and "
                f"{tuple(mask.shape)}"
            )
        if not (mask != 0).any(1).all():
            raise ValueError("attention_mask must mark at least one token of each sequence")
        return mask

    def _head(self) -> nn.Module | None:
        """What maps a hidden state to a score; None for encoders that pool in their own way."""
        return self.head if self.head is not None else getattr(self._architecture(), "score", None)

    def _states(self, input_ids: Tensor, mask: Tensor) -> Float[Tensor, "batch length width"]:
        backbone = self._backbone()
        states: Tensor = backbone(
            input_ids=input_ids, attention_mask=mask, **_accepted_extras(backbone, mask)
        ).last_hidden_state
        return states

    def _architecture(self) -> Any:
        """The transformers model, with adapters in place where there are any."""
        return getattr(self.model, "get_base_model", lambda: self.model)()

    def _backbone(self) -> Any:
        """The part of it that makes hidden states."""
        return self._architecture().base_model


def pair_scores(model: nn.Module, batch: PreferenceBatch) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Scores of the chosen and of the rejected answers by a `RewardModel`, in one forward pass."""
    chosen, rejected = model(batch.input_ids, batch.attention_mask).chunk(2)
    return chosen, rejected


def bradley_terry_loss(
    chosen: Float[Tensor, "*shape"],
    rejected: Float[Tensor, "*shape"],
    *,
    margin: Float[Tensor, "*shape"] | float = 0.0,
    score_l2: float = 0.0,
    centre: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Float[Tensor, "*reduced"]:
    """Negative log-likelihood of the choices when log-odds are differences of scores.

        -log sigma(r_w - r_l - margin) + score_l2 (r_w^2 + r_l^2) / 2 + centre (r_w + r_l)^2

    The first term does not change when a constant is added to all scores; the penalties fix that constant, and
    `score_l2` also the scale.

    Parameters
    ----------
    chosen, rejected : scores r_w and r_l of the two answers of each pair, of one shape.
    margin : by how much the chosen answer should lead, for example from graded judgements.
    score_l2 : at least 0; 0.001 in the runs of the reward-ensembles paper.
    centre : at least 0; trl's `center_rewards_coefficient`, for which 0.01 is usual.
    reduction : over pairs.

    Raises
    ------
    ValueError : the shapes differ or a weight is out of range.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"chosen and rejected must have one shape, got {tuple(chosen.shape)} and {tuple(rejected.shape)}"
        )
    if isinstance(margin, Tensor) and margin.shape != chosen.shape:
        raise ValueError(f"margin must have the shape of chosen {tuple(chosen.shape)}, got {tuple(margin.shape)}")
    check_number("score_l2", score_l2, at_least=0)
    check_number("centre", centre, at_least=0)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    loss = -logsigmoid(chosen - rejected - margin)
    if score_l2:
        loss = loss + 0.5 * score_l2 * (chosen * chosen + rejected * rejected)
    if centre:
        loss = loss + centre * (chosen + rejected) ** 2
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _at_least_single(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _is_classifier(architecture: Any) -> bool:
    return type(architecture).__name__.endswith("ForSequenceClassification")
