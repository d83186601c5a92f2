"""Constrained RLHF: keep several reward models at the level beyond which they stop tracking quality.

Rewards for language models are often sums of reward models, each of which is useful up to a *proxy point* beyond which
more of it makes outputs worse; and the points shift when rewards are correlated. Here proxy points are thresholds, and
the weights of the rewards are Lagrange multipliers learned during PPO.

- `LagrangeMixer` : the multipliers and the mixture of advantages, for any actor-critic loop.
- `ConstrainedPPO` : the paper's variants of PPO on Gymnasium environments, language models, or an `Actor` of your own.
- `estimate_proxy_points` : thresholds from runs that each raised a reward.
- `ThresholdSearch` : thresholds found by Nelder-Mead while one policy goes on training.

The multipliers of the paper circle their solution (its theory speaks of averages); `proportional` damps them. With one
reward, or with rewards that never stop being good, PPO with a fixed weight and a penalty on divergence is simpler.

Reference: Moskovitz, Singh, Strouse, Sandholm, Salakhutdinov, Dragan and McAleer, "Confronting Reward Model
Overoptimization with Constrained RLHF", ICLR 2024, arXiv 2310.04373.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
