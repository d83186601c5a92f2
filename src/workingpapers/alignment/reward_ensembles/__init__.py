"""Ensembles of reward models with conservative aggregation, against overoptimisation.

A policy that is optimised hard against one learned reward (best-of-n with a large n, PPO) finds the answers on which
that reward errs: the score rises while the quality falls. Reward models that differ only in their seed err alike near
the data and differently far from it, so their worst score, or their mean less a price for disagreement, takes away
part of what there is to exploit. Errors that all members share remain, so an ensemble delays the peak and softens the
fall; nothing here promises to remove it. A KL penalty large enough does as much in policy optimisation, and where
compute is short, one larger reward model is the other candidate.

- `aggregation` : `aggregate`, `member_variance` and `pairwise_accuracy` for scores in hand.
- `wrapper` : `EnsembleReward`, any reward models as one reward function.
- `estimator` : `RewardEnsemble`, members trained together on features.
- `workingpapers.alignment.best_of_n_curve` : exact curves of gold against proxy for n = 1 ... N.
- `workingpapers.alignment.reward_head` : reward models on transformers, and the loss they are trained with.

Reference: Coste, Anwar, Kirk and Krueger, "Reward Model Ensembles Help Mitigate Overoptimization", ICLR 2024, arXiv
2310.02743. `aggregate` uses the population variance of the paper; the authors' PPO code uses the unbiased one (ddof=1).
"""

from workingpapers.alignment.best_of_n_curve import BestOfNCurve, Overoptimization, best_of_n, overoptimization
from workingpapers.alignment.reward_ensembles.aggregation import aggregate, member_variance, pairwise_accuracy
from workingpapers.alignment.reward_ensembles.estimator import RewardEnsemble
from workingpapers.alignment.reward_ensembles.wrapper import EnsembleReward

__all__ = [
    "BestOfNCurve",
    "EnsembleReward",
    "Overoptimization",
    "RewardEnsemble",
    "aggregate",
    "best_of_n",
    "member_variance",
    "overoptimization",
    "pairwise_accuracy",
]
