"""The testbed: small recurrent language models, whose samples cost nothing and whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workingpapers.alignment import SequenceBatch

SYMBOLS, PROMPT, ANSWER = 16, 4, 8


class RecurrentLM(nn.Module):
    """Embedding, GRU and linear layer over 16 symbols; prompts of 4 and answers of 8, so no batch has padding."""

    vocab_size = SYMBOLS

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, width)
        self.recurrent = nn.GRU(width, width)
        self.head = nn.Linear(width, SYMBOLS)

    def logits(self, batch: SequenceBatch) -> Float[Tensor, "tokens vocabulary"]:
        states, _ = self.recurrent(self.embedding(batch.input_ids[:, :-1].T))
        answering = states[PROMPT - 1 :].transpose(0, 1).flatten(0, 1)
        return self.head(answering)  # type: ignore[no-any-return]

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator | None,
    ) -> SequenceBatch:
        """Symbol by symbol: the argmax of logit plus Gumbel noise is a draw."""
        ids = torch.tensor(prompts)
        noise = torch.rand(max_new_tokens, len(ids), SYMBOLS, generator=generator).log_().neg_().log_().neg_()
        weights: list[nn.Parameter] = self.recurrent.all_weights[0]
        state, drawn = self.recurrent(self.embedding(ids.T))[1][0], [ids]
        for place in range(max_new_tokens):
            symbol = (self.head(state) / temperature + noise[place]).argmax(-1)
            drawn.append(symbol[:, None])
            state = torch.gru_cell(self.embedding(symbol), state, *weights)
        sequences = torch.cat(drawn, 1)
        answered = torch.zeros_like(sequences, dtype=torch.bool)
        answered[:, ids.shape[1] :] = True
        return SequenceBatch(sequences, torch.ones_like(sequences), answered)


def recurrent_lm(width: int, seed: int, *, oracle: bool = False) -> RecurrentLM:
    """A model at its initial weights; an oracle has larger ones, so that its answers are structured."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = RecurrentLM(width)
    if oracle:
        with torch.no_grad():
            model.recurrent.all_weights[0][1].mul_(3.0)  # of the states
            model.embedding.weight.mul_(1.5)
            model.head.weight.mul_(12.0)
    return model


def different_prompts(counts: Sequence[int], seed: int) -> list[list[list[int]]]:
    """Sets of prompts of these sizes, no prompt twice: their symbols are the digits of different numbers."""
    codes = np.random.default_rng([seed, 0]).permutation(SYMBOLS**PROMPT)[: sum(counts)]
    prompts: Int[np.ndarray, "prompts 4"] = codes[:, None] // SYMBOLS ** np.arange(PROMPT) % SYMBOLS
    ends = np.cumsum(counts)
    return [prompts[end - count : end].tolist() for count, end in zip(counts, ends, strict=True)]
