"""The sequence version of the bandit: nine tokens of a small transformer, each with a bump as reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workingpapers.alignment.logprobs import response_logits
from workingpapers.alignment.onpolicy_preference.policies import CausalLMPolicy, as_sequences
from workingpapers.alignment.testbeds.bandits import bump_reward, squashed_cauchy
from workingpapers.common.validation import check_integer, check_number, require


class TokenBandit:
    """A first token at random, then some of the policy's. See `token_bandit`."""

    def __init__(self, centre: float, width: float, probabilities: Float[Tensor, " tokens"], new_tokens: int) -> None:
        self.centre, self.width = check_number("centre", centre), check_number("width", width, above=0)
        self.probabilities, self.new_tokens = probabilities, new_tokens

    def prompts(self, count: int, *, random_state: int = 0) -> list[list[int]]:
        """First tokens, uniform over the vocabulary."""
        generator = torch.Generator().manual_seed(check_integer("random_state", random_state, at_least=0))
        size = (check_integer("count", count, at_least=1), 1)
        drawn: list[list[int]] = torch.randint(len(self.probabilities), size, generator=generator).tolist()
        return drawn

    def reward(
        self, prompts: Sequence[Sequence[int]], actions: Int[Tensor, "prompts answers tokens"]
    ) -> Float[Tensor, "prompts answers"]:
        """Mean of the bumps over all positions, the given first token included, as in the authors' code."""
        first = torch.tensor([prompt[0] for prompt in prompts], device=actions.device)
        bumps = bump_reward(actions, centre=self.centre, width=self.width).sum(-1)
        given = bump_reward(first, centre=self.centre, width=self.width)
        return (bumps + given[:, None]) / (actions.shape[-1] + 1)

    def policy(self, *, steps: int = 100, lr: float = 0.01, random_state: int = 0) -> CausalLMPolicy:
        """GPT-nano (3 layers, 3 heads, width 48), fitted so that every token follows the data policy.

        Each Adam step takes one answer of the model to one random prompt, and the sum over its positions of
        KL(pi || data policy).

        Parameters
        ----------
        steps, lr : of the fit, steps at least 0.
        random_state : of the weights and of the fit.
        """
        check_integer("steps", steps, at_least=0)
        check_number("lr", lr, above=0)
        tokens = len(self.probabilities)
        policy = CausalLMPolicy(
            small_gpt(tokens, positions=self.new_tokens + 1, random_state=random_state), max_new_tokens=self.new_tokens
        )
        generator = torch.Generator().manual_seed(random_state)
        log_data = self.probabilities.log().to(torch.get_default_dtype())
        optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
        for _ in range(steps):
            prompt = torch.randint(tokens, (1, 1), generator=generator).tolist()
            batch = as_sequences(prompt, policy.sample(prompt, 1, generator))
            logits = response_logits(policy.model, batch.input_ids, batch.attention_mask, batch.response_mask)
            log_p = logits.log_softmax(-1)
            optimizer.zero_grad()
            torch.autograd.backward((log_p.exp() * (log_p - log_data)).sum())
            optimizer.step()
        return policy


def token_bandit(centre: float = 70, width: float = 10, *, vocabulary: int = 100, new_tokens: int = 9) -> TokenBandit:
    """The token bandit of the paper: the data policy of `bump_bandit` at every position.

    Parameters
    ----------
    centre, width : of the bump at each position; 70 is misaligned, 20 aligned.
    vocabulary : tokens, at least 2.
    new_tokens : answers' length, at least 1.
    """
    check_integer("new_tokens", new_tokens, at_least=1)
    return TokenBandit(centre, width, squashed_cauchy(vocabulary), new_tokens)


def small_gpt(
    vocabulary: int, *, positions: int, random_state: int, layers: int = 3, heads: int = 3, width: int = 48
) -> nn.Module:
    """An untrained GPT-2 without dropout."""
    transformers = require("transformers", extra="language")
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(check_integer("random_state", random_state, at_least=0))
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model.eval()
