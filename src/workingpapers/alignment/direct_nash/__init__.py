"""Direct Nash optimisation: self-play against preferences that may go in circles.

A judge may prefer A to B, B to C and C to A. No scalar reward represents that, and a policy that maximises a fitted
one is beaten by some other answer. Here the reward of an answer is its win rate against the current policy, and every
round regresses log-ratios to the current policy on differences of it: a DPO-like loss whose reference is renewed every
round. The average policy approaches the Nash equilibrium, which wins at least half of the comparisons with any other.

Where preferences are transitive and one large set of pairs covers the good answers, offline DPO costs less and does as
well. Nash-MD with a regularised game (`nash_policy(tau=...)`; trl has a trainer for language models) is the choice
when the last policy, not the best of several rounds, must be near the equilibrium.

`eta` is a temperature everywhere, the `beta` of DPO: a small eta takes large steps.

- `tabular` : `nash_policy`, `exact_nash`, `exploitability` and `borda_scores` for finite sets of answers.
- `losses` : `DNOLoss`, for any training loop that has log-probabilities.
- `pairs` : `WinRateRanker`, `build_pairs`, `ReplayMix`, the recipe that turns judgements into training pairs.
- `trainer` : `DirectNashTrainer`, the batched on-policy rounds for transformers causal language models.

Reference: Rosset, Cheng, Mitra, Santacroce, Awadallah and Xie, "Direct Nash Optimization: Teaching Language Models to
Self-Improve with General Preferences", 2024, arXiv 2404.03715. Numbers of algorithms and equations are theirs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
