"""Reward models that differ only in their seed, trained side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float, Shaped
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from workingpapers.alignment.reward_ensembles.aggregation import Method, aggregate, pairwise_accuracy
from workingpapers.alignment.reward_head import bradley_terry_loss
from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number

Answers = Shaped[np.ndarray, "answers *features"] | Shaped[Tensor, "answers *features"]

_SCORED_AT_ONCE = 16_384  # answers


class RewardEnsemble(BaseEstimator):
    """k reward models of one architecture, learned from pairs of answers with different seeds.

    All members see all pairs; they differ in their initial weights and in the order of the data. Every training step
    is one pass over a leading axis of members, with the losses summed: since no parameter is shared, this equals
    training them one by one. Member i is the same in ensembles of any size.

    For language models, encode the answers first (sentence embeddings, last hidden states) and learn heads on these;
    to fine-tune whole models instead, train `RewardModel` and aggregate with `EnsembleReward`.

    Parameters
    ----------
    base_factory : makes one untrained member: a module that maps (batch, features...) to one score each, (batch,) or
        (batch, 1). It is called once for each member, under that member's seed, and must not keep statistics of its
        batches. None: a multilayer perceptron with tanh activations on flattened features.
    n_members : k, at least 1; four or five are enough in the paper.
    hidden : widths of the perceptron's hidden layers; not used with a `base_factory`.
    epochs : passes over the pairs.
    batch_size : pairs in one step of one member.
    lr : learning rate of Adam.
    method, lam : of `aggregate`, for `predict`. The default `lam` is the paper's for best-of-n.
    score_l2 : of `bradley_terry_loss`; it also keeps the members from drifting apart by constants.
    random_state : seed of initial weights and data order; None takes fresh entropy.

    Attributes
    ----------
    members_ : the trained modules, in evaluation mode; usable one by one or in an `EnsembleReward`.
    losses_ : mean training loss of each epoch and member, (epochs, members).
    n_features_in_ : size of the second axis of the answers, 1 where there is none.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> better, worse = rng.normal(1.0, 1.0, (200, 2)), rng.normal(0.0, 1.0, (200, 2))
    >>> ensemble = RewardEnsemble(epochs=5, random_state=0).fit(better, worse)
    >>> ensemble.score_samples(better).shape, ensemble.score(better, worse) > 0.7
    ((5, 200), True)
    """

    def __init__(
        self,
        base_factory: Callable[[], nn.Module] | None = None,
        n_members: int = 5,
        hidden: Sequence[int] = (64, 64),
        epochs: int = 40,
        batch_size: int = 128,
        lr: float = 2e-3,
        method: Method = "uwo",
        lam: float = 0.5,
        score_l2: float = 0.0,
        random_state: int | None = None,
    ) -> None:
        self.base_factory = base_factory
        self.n_members = n_members
        self.hidden = hidden
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.method = method
        self.lam = lam
        self.score_l2 = score_l2
        self.random_state = random_state

    def fit(self, X_chosen: Answers, X_rejected: Answers) -> RewardEnsemble:
        """Learn from pairs: row i of `X_chosen` was preferred to row i of `X_rejected`.

        Parameters
        ----------
        X_chosen, X_rejected : features of the two answers, arrays or tensors of one shape. Floating-point features
            decide precision and device of the members; integers (token ids) leave the members as they are made.

        Raises
        ------
        ValueError, TypeError : the answers are not finite or do not pair up, or a parameter is out of range.
        FloatingPointError : the loss stopped being finite.
        """
        self._check_parameters()
        chosen, rejected = _as_features("X_chosen", X_chosen), _as_features("X_rejected", X_rejected)
        if chosen.shape != rejected.shape:
            raise ValueError(
                f"X_chosen and X_rejected must have one shape, got {tuple(chosen.shape)} and {tuple(rejected.shape)}"
            )
        if chosen.dtype != rejected.dtype or chosen.device != rejected.device:
            raise ValueError("X_chosen and X_rejected must have one dtype and device")
        self._row_shape = chosen.shape[1:]
        self.n_features_in_ = int(self._row_shape[0]) if self._row_shape else 1

        # A child of the seed for each member: a longer list of children begins with the shorter one.
        children = np.random.SeedSequence(self.random_state).spawn(self.n_members)
        seeds = [int(child.generate_state(1)[0]) for child in children]
        with torch.random.fork_rng(devices=[chosen.device] if chosen.device.type == "cuda" else []):
            self.members_ = [self._make_member(seed, chosen) for seed in seeds]
            torch.manual_seed(seeds[0])  # of dropout, where a member has it
            self.losses_ = self._train(chosen, rejected, seeds)
        return self

    def score_samples(self, X: Answers) -> Float[np.ndarray, "members answers"] | Float[Tensor, "members answers"]:
        """Raw scores of every member.

        A tensor comes back for a tensor, with gradients to `X`, and an array for an array.

        Raises
        ------
        ValueError : `X` is not finite or not of the shape that was learned.
        """
        check_is_fitted(self, "members_")
        features = _as_features("X", X)
        if features.shape[1:] != self._row_shape:
            raise ValueError(f"X must have rows of shape {tuple(self._row_shape)}, got {tuple(features.shape[1:])}")
        gradients = isinstance(X, Tensor) and torch.is_grad_enabled()
        with torch.set_grad_enabled(gradients):
            state = {name: value.detach() for name, value in self._state.items()}
            scores = torch.cat(
                [self._forward(state, part, shared=True) for part in torch.split(features, _SCORED_AT_ONCE)], dim=1
            )
        return scores if isinstance(X, Tensor) else scores.numpy()

    def predict(self, X: Answers) -> Float[np.ndarray, " answers"] | Float[Tensor, " answers"]:
        """The aggregated reward of each answer, by `method` and `lam`."""
        scores: Any = self.score_samples(X)
        reward: Float[np.ndarray, " answers"] | Float[Tensor, " answers"] = aggregate(scores, self.method, self.lam)
        return reward

    def score(self, X_chosen: Answers, X_rejected: Answers) -> float:
        """Share of pairs that the aggregated reward ranks as given, a tie counting half."""
        return float(pairwise_accuracy(self.predict(X_chosen), self.predict(X_rejected)))

    def _train(self, chosen: Tensor, rejected: Tensor, seeds: Sequence[int]) -> Float[np.ndarray, "epochs members"]:
        for member in self.members_:
            member.train()
        parameters, buffers = stack_module_state(self.members_)
        state = {**parameters, **buffers}
        optimizer = torch.optim.Adam(parameters.values(), lr=self.lr, fused=True)
        orders = [torch.Generator().manual_seed(seed) for seed in seeds]
        losses = np.empty((self.epochs, self.n_members))
        for epoch in range(self.epochs):
            order = torch.stack([torch.randperm(len(chosen), generator=generator) for generator in orders])
            total = chosen.new_zeros(self.n_members, dtype=torch.float64)
            for rows in torch.split(order.to(chosen.device), self.batch_size, dim=1):
                scores = self._forward(state, torch.cat([chosen[rows], rejected[rows]], dim=1))
                loss = bradley_terry_loss(*scores.chunk(2, dim=1), score_l2=self.score_l2, reduction="none").mean(1)
                optimizer.zero_grad()
                torch.autograd.backward(loss.sum())
                optimizer.step()
                total += loss.detach() * rows.shape[1]
            losses[epoch] = (total / len(chosen)).cpu()
            if not np.isfinite(losses[epoch]).all():
                raise FloatingPointError(f"the loss of epoch {epoch + 1} is not finite: is lr={self.lr:g} too large?")
        with torch.no_grad():
            for place, member in enumerate(self.members_):
                for name, parameter in member.named_parameters():
                    parameter.copy_(parameters[name][place])
                member.eval()
        self._state = {name: value.detach() for name, value in state.items()}
        return losses

    def _forward(self, state: dict[str, Tensor], rows: Tensor, shared: bool = False) -> Float[Tensor, "members rows"]:
        """All members at once, each on its own rows, or all on the same."""

        def of_member(weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
            scores: Tensor = functional_call(self.members_[0], weights, (inputs,))
            return scores.squeeze(-1) if scores.ndim == 2 else scores

        scores: Tensor = vmap(of_member, in_dims=(0, None if shared else 0), randomness="different")(state, rows)
        wanted = (self.n_members, rows.shape[0 if shared else 1])
        if scores.shape != wanted:
            raise ValueError(
                f"base_factory must make modules that return one score per answer, got shape "
                f"{tuple(scores.shape[1:])} for {wanted[1]} answers"
            )
        return scores

    def _make_member(self, seed: int, like: Tensor) -> nn.Module:
        torch.manual_seed(seed)
        member = _perceptron(like[0].numel(), self.hidden) if self.base_factory is None else self.base_factory()
        return member.to(like.device, like.dtype if like.is_floating_point() else None)

    def _check_parameters(self) -> None:
        check_choice("method", self.method, get_args(Method))
        for name in ("n_members", "epochs", "batch_size"):
            check_integer(name, getattr(self, name), at_least=1)
        for width in self.hidden:
            check_integer("hidden", width, at_least=1)
        check_number("lr", self.lr, above=0)
        check_number("lam", self.lam, at_least=0)
        check_number("score_l2", self.score_l2, at_least=0)
        if self.random_state is not None:
            check_integer("random_state", self.random_state, at_least=0)


def _perceptron(features: int, hidden: Sequence[int]) -> nn.Module:
    widths = [features, *hidden]
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 1))


def _as_features(name: str, answers: Any) -> Tensor:
    features = answers if isinstance(answers, Tensor) else torch.from_numpy(np.array(answers))
    if features.ndim == 0 or not features.numel():
        raise ValueError(f"{name} must have shape (answers, features...), nothing empty, got {tuple(features.shape)}")
    check_finite(name, features)
    return features
