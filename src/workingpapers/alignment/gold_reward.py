"""A laboratory in which the true reward of every text is known, so that overoptimisation can be seen and measured.

Texts are strings of symbols in which each symbol has a few legal successors. The gold reward is a sum over
neighbouring symbols, and illegal neighbours cost much of it; a proxy is learned from pairs that a Bradley-Terry judge
with some noise has ranked by the gold reward. What a policy gains from optimising the proxy, and when the gold reward
turns down, can be had in two ways:

- exactly: the reference is a Markov chain, so the policy that maximises E[reward] - beta KL is one too, and its proxy,
  gold and divergence follow from dynamic programming (`GoldRewardLab.frontier`), without any training or sampling;
- with networks: `GoldRewardLab.policy` trains a small transformer on the texts, any method of this field trains it
  further, and `GoldRewardLab.measure` tells what came of it.

Reference: Gao, Schulman and Hilton, "Scaling Laws for Reward Model Overoptimization", ICML 2023 (gold and proxy). The
grammar is this library's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import nn

from workingpapers.alignment.logprobs import sequence_logprobs
from workingpapers.alignment.preferences import TokenPair
from workingpapers.alignment.sampling import sample_responses
from workingpapers.common.validation import check_finite, check_integer, check_number, require


@dataclass(frozen=True)
class GoldCurve:
    """What optimising a proxy is worth at several strengths, exactly.

    Attributes
    ----------
    beta : price of a nat of divergence, decreasing: the optimisation gets stronger.
    kl : divergence of the optimal policy from the reference, in nats per text.
    proxy, gold : its expected rewards per text.
    """

    beta: Float[np.ndarray, " points"]
    kl: Float[np.ndarray, " points"]
    proxy: Float[np.ndarray, " points"]
    gold: Float[np.ndarray, " points"]


@dataclass(frozen=True)
class GoldRewardLab:
    """Texts with a known reward.

    Parameters
    ----------
    seed : of the grammar and its reward, at least 0.
    symbols : in the alphabet, at least 2; they are the token ids.
    length : symbols in a text, at least 2; the first one is the prompt.
    successors : legal ones of each symbol, from 1 to `symbols`.
    penalty : gold reward of an illegal neighbour.
    leak : probability that the reference chain puts on illegal successors together, in (0, 1), as networks do.

    Attributes
    ----------
    legal : whether symbol j may follow symbol i.
    transition : how likely it does in the texts.
    gold : reward of j behind i: deviation 0.5 where legal, else `penalty`.

    Examples
    --------
    >>> lab = GoldRewardLab(seed=0)
    >>> proxy = lab.proxy(lab.ranked_texts(200, seed=1, noise=0.25))
    >>> curve = lab.frontier(proxy, [10.0, 1.0, 0.1])
    >>> bool(curve.proxy[-1] > curve.proxy[0])
    True
    """

    seed: int = 0
    symbols: int = 32
    length: int = 16
    successors: int = 6
    penalty: float = -3.0
    leak: float = 0.01
    legal: Bool[np.ndarray, "symbols symbols"] = field(init=False, repr=False, compare=False)
    transition: Float[np.ndarray, "symbols symbols"] = field(init=False, repr=False, compare=False)
    gold: Float[np.ndarray, "symbols symbols"] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, at_least=0)
        check_integer("symbols", self.symbols, at_least=2)
        check_integer("length", self.length, at_least=2)
        check_integer("successors", self.successors, at_least=1, at_most=self.symbols)
        check_number("penalty", self.penalty)
        check_number("leak", self.leak, above=0, below=1)
        rng, shape = np.random.default_rng([self.seed, 0]), (self.symbols, self.symbols)
        legal = rng.permuted(np.tile(np.arange(self.symbols) < self.successors, (self.symbols, 1)), axis=1)
        transition = np.where(legal, np.exp(rng.standard_normal(shape)), 0.0)
        gold = np.where(legal, 0.5 * rng.standard_normal(shape), self.penalty)
        for name, array in {
            "legal": legal,
            "transition": transition / transition.sum(1, keepdims=True),
            "gold": gold,
        }.items():
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    # ------------------------------------------------------------------------------------------------------- texts

    def texts(self, count: int, rng: np.random.Generator) -> Int[np.ndarray, "count length"]:
        """Texts of the grammar, with uniform first symbols."""
        cumulative = self.transition.cumsum(1)
        found = rng.integers(self.symbols, size=(count, 1))
        for _ in range(self.length - 1):
            drawn = (rng.random((count, 1)) > cumulative[found[:, -1]]).sum(1, keepdims=True)
            found = np.concatenate([found, np.minimum(drawn, self.symbols - 1)], axis=1)
        return found

    def score(
        self, texts: Int[np.ndarray, "*texts length"], reward: Float[np.ndarray, "symbols symbols"] | None = None
    ) -> Float[np.ndarray, "*texts"]:
        """Sum of a reward over the neighbours in each text; the gold reward when None."""
        table = self.gold if reward is None else reward
        return np.asarray(table[texts[..., :-1], texts[..., 1:]].sum(-1))

    def illegal_rate(self, texts: Int[np.ndarray, "*texts length"]) -> float:
        """Share of neighbours that the grammar never has."""
        return float(1.0 - self.legal[texts[..., :-1], texts[..., 1:]].mean())

    # ------------------------------------------------------------------------------------- preferences and proxies

    def ranked_texts(self, count: int, *, seed: int, noise: float = 0.0) -> Int[np.ndarray, "count 2 length"]:
        """Pairs of texts of the reference chain with one first symbol, the preferred one first; see `rank`."""
        rng = np.random.default_rng([self.seed, seed, 1])
        first = np.repeat(rng.integers(self.symbols, size=(check_integer("count", count, at_least=1), 1)), 2, axis=0)
        found, cumulative = first, self._reference().cumsum(1)
        for _ in range(self.length - 1):
            drawn = (rng.random((len(first), 1)) > cumulative[found[:, -1]]).sum(1, keepdims=True)
            found = np.concatenate([found, np.minimum(drawn, self.symbols - 1)], axis=1)
        return self.rank(found.reshape(count, 2, self.length), rng, noise=noise)

    def rank(
        self, pairs: Int[np.ndarray, "count 2 length"], rng: np.random.Generator, *, noise: float = 0.0
    ) -> Int[np.ndarray, "count 2 length"]:
        """Put the preferred text of each pair first, as a Bradley-Terry judge of the gold reward decides.

        Parameters
        ----------
        pairs : texts.
        rng : draws the judge's decisions.
        noise : probability that a decision is turned round, in [0, 0.5].
        """
        check_number("noise", noise, at_least=0, at_most=0.5)
        rewards = self.score(pairs)
        second = rng.random(len(pairs)) > 1.0 / (1.0 + np.exp(rewards[:, 1] - rewards[:, 0]))
        second ^= rng.random(len(pairs)) < noise
        return np.where(second[:, None, None], pairs[:, ::-1], pairs)

    def proxy(
        self, ranked: Int[np.ndarray, "count 2 length"], *, ridge: float = 1.0
    ) -> Float[np.ndarray, "symbols symbols"]:
        """The reward of neighbours that explains the rankings best: Bradley-Terry, with ridge |r|^2 / 2.

        Neighbours that no pair has keep reward 0, far above the gold reward of illegal ones: what a reward model says
        where it has no data.
        """
        check_number("ridge", ridge, above=0)
        size = self.symbols**2
        codes = ranked[..., :-1] * self.symbols + ranked[..., 1:]
        counts = np.stack(
            [np.bincount(won, minlength=size) - np.bincount(lost, minlength=size) for won, lost in codes]
        ).astype(float)

        def objective(reward: np.ndarray) -> tuple[float, np.ndarray]:
            margin = counts @ reward
            gradient = -counts.T @ (1.0 / (1.0 + np.exp(margin))) + ridge * reward
            return float(np.logaddexp(0.0, -margin).sum() + 0.5 * ridge * reward @ reward), gradient

        found = minimize(objective, np.zeros(size), jac=True, method="L-BFGS-B", options={"gtol": 1e-8})
        return np.asarray(found.x.reshape(self.symbols, self.symbols))

    # -------------------------------------------------------------------------------------------------- exact policies

    def optimal_policy(
        self, reward: Float[np.ndarray, "symbols symbols"], beta: float
    ) -> Float[np.ndarray, "steps symbols symbols"]:
        """Logarithm of the policy that maximises E[reward] - beta KL(policy || reference chain), for each position.

            pi_t(j | i) = pi_ref(j | i) exp((r(i, j) + V_{t+1}(j) - V_t(i)) / beta),
            V_t(i) = beta log sum_j pi_ref(j | i) exp((r(i, j) + V_{t+1}(j)) / beta),  V = 0 behind the last symbol.

        Raises
        ------
        ValueError : the reward is not a finite matrix over symbols, or beta is not above 0.
        """
        reward = np.asarray(reward, dtype=float)
        if reward.shape != self.gold.shape:
            raise ValueError(f"reward must have shape {self.gold.shape}, got {reward.shape}")
        check_finite("reward", reward)
        beta = check_number("beta", beta, above=0)
        log_reference = np.log(self._reference())
        policy = np.empty((self.length - 1, *reward.shape))
        value = np.zeros(self.symbols)
        for step in reversed(range(self.length - 1)):
            logits = log_reference + (reward + value) / beta
            normaliser = logsumexp(logits, axis=1)
            policy[step] = logits - normaliser[:, None]
            value = beta * normaliser
        return policy

    def expected(
        self, log_policy: Float[np.ndarray, "steps symbols symbols"], reward: Float[np.ndarray, "symbols symbols"]
    ) -> tuple[float, float]:
        """Expected reward of a text under a policy, and the divergence of the policy from the reference chain."""
        policy, log_reference = np.exp(log_policy), np.log(self._reference())
        here = np.full(self.symbols, 1.0 / self.symbols)
        total = divergence = 0.0
        for step, chances in enumerate(policy):
            joint = here[:, None] * chances
            total += float((joint * reward).sum())
            divergence += float((joint * (log_policy[step] - log_reference)).sum())
            here = joint.sum(0)
        return total, divergence

    def frontier(self, proxy: Float[np.ndarray, "symbols symbols"], betas: Sequence[float]) -> GoldCurve:
        """Proxy, gold and divergence of the policies that are optimal for the proxy, for each price of divergence."""
        rows = []
        for beta in sorted(betas, reverse=True):
            policy = self.optimal_policy(proxy, beta)
            (expected, divergence), (gold, _) = self.expected(policy, proxy), self.expected(policy, self.gold)
            rows.append((beta, divergence, expected, gold))
        return GoldCurve(*np.array(rows).T)

    def _reference(self) -> Float[np.ndarray, "symbols symbols"]:
        """The chain of the texts, which now and then takes any symbol."""
        return (1.0 - self.leak) * self.transition + self.leak / self.symbols

    # -------------------------------------------------------------------------------------------------------- networks

    def untrained_policy(self, *, width: int = 64, layers: int = 2, heads: int = 4) -> nn.Module:
        """A GPT-2 for these texts with random weights drawn from `seed`, in evaluation mode, without dropout."""
        transformers = require("transformers", extra="language")
        config = transformers.GPT2Config(
            vocab_size=self.symbols,
            n_positions=self.length,
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
            torch.manual_seed(self.seed)
            model: nn.Module = transformers.GPT2LMHeadModel(config)
        return model.eval()

    def policy(self, *, steps: int = 500, **size: int) -> nn.Module:
        """The same network trained on texts: batches of 128, AdamW at 3e-3, the last fifth of the steps at 5e-4."""
        model = self.untrained_policy(**size)
        rng = np.random.default_rng([self.seed, 4])
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(check_integer("steps", steps, at_least=0)):
            if step == (4 * steps) // 5:
                optimizer.param_groups[0]["lr"] = 5e-4
            batch = torch.from_numpy(self.texts(128, rng))
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
        return model.eval()

    def answers(
        self, model: nn.Module, prompts: Int[np.ndarray, " prompts"], *, n: int = 1, seed: int
    ) -> Int[np.ndarray, "prompts n length"]:
        """Texts that a policy writes behind first symbols."""
        generator = torch.Generator().manual_seed(seed)
        first = [[int(symbol)] for symbol in prompts]
        drawn = sample_responses(model, first, n=n, max_new_tokens=self.length - 1, generator=generator)
        return drawn.input_ids.cpu().numpy().reshape(len(first), n, self.length)

    def prompts(self, count: int, seed: int) -> Int[np.ndarray, " count"]:
        """Uniform first symbols."""
        return np.random.default_rng([self.seed, seed, 3]).integers(self.symbols, size=count)

    def pairs(self, model: nn.Module, count: int, *, seed: int, noise: float = 0.0) -> list[TokenPair]:
        """Two answers of a policy to each of `count` prompts, ranked by the judge of `rank`."""
        written = self.answers(model, self.prompts(count, seed), n=2, seed=seed)
        ranked = self.rank(written, np.random.default_rng([self.seed, seed, 2]), noise=noise)
        scores = self.score(ranked).tolist()
        return [
            TokenPair(won[:1], won[1:], lost[1:], scores=(rewards[0], rewards[1]))
            for (won, lost), rewards in zip(ranked.tolist(), scores, strict=True)
        ]

    def measure(
        self,
        model: nn.Module,
        reference: nn.Module,
        *,
        proxy: Float[np.ndarray, "symbols symbols"] | None = None,
        count: int = 1_000,
        seed: int = 0,
    ) -> dict[str, float]:
        """What became of a policy: means over `count` answers of its own, to be logged while it is trained.

        Returns
        -------
        gold, proxy (where given), illegal_rate, and kl, the mean log-ratio to the reference in nats per text.
        """
        texts = self.answers(model, self.prompts(count, seed), seed=seed)[:, 0]
        ids = torch.from_numpy(texts)
        mask = torch.ones_like(ids)
        response = mask.bool()
        response[:, 0] = False
        with torch.no_grad():
            ratio: Any = sequence_logprobs(model, ids, mask, response) - sequence_logprobs(
                reference, ids, mask, response
            )
        found = {"gold": float(self.score(texts).mean()), "illegal_rate": self.illegal_rate(texts)}
        if proxy is not None:
            found["proxy"] = float(self.score(texts, proxy).mean())
        return found | {"kl": float(ratio.mean())}
