"""Reinforced token optimization: PPO on a reward for every token that a DPO model already holds.

PPO from human feedback pays one number at the end of a long answer, and has to find out by itself which tokens earned
it. In the token problem with a divergence price, the soft-optimal policy's log-ratios to the reference sum, along every
answer, to its reward less a constant; DPO fits exactly these log-ratios. So each token is paid its share of
log(pi_dpo / pi_ref), beside the usual score at the end and the usual price of divergence, and PPO (or REINFORCE) goes
on as before. It gains on long answers and small rollouts; with many answers a step, or short ones, ordinary PPO
catches up. Its end point is not that of the score alone: granularity "shaping" keeps that one. Stopping at DPO costs no
rollouts at all.

- `rewards` : `token_rewards` and `delimiter_mask`, for any loop that has log-probabilities.
- `wrapper` : `RTOReward`, the same on tokenised batches with the models themselves.
- `trainer` : `RTOTrainer`, on `PPOTrainer`.
- `theory` : the exact soft-optimal policy, elimination of prefixes, the pessimistic linear reward.

Reference: Zhong, Shan, Feng, Xiong, Cheng, Zhao, He, Bian and Wang, "DPO Meets PPO: Reinforced Token Optimization for
RLHF", ICML 2025, arXiv 2404.18922. Equation numbers are theirs; defaults and the order of scaling and clipping are
those of the authors' code.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
