"""Few-shot preference optimization: one model that adapts to a new user from labelled preferences in its context.

One reward for everybody averages users away. FSPO trains on episodes, some labelled preferences of one user and one
more to predict, over many users; afterwards a handful of a new user's preferences in the prompt make the same model
that user's reward function and policy, with no training per user. N binary labels tell at most 2^N users apart, and
the training users must be many and diverse: a few dozen are memorised, and users unlike them are then served badly. For
one user with hundreds of labels, training on these labels is the better choice.

- `episodes` : `EpisodeSampler`, `split_users`; windows of one user's records.
- `template` : `FewShotTemplate`, the prompt; with a description of the user before the response if wanted.
- `losses` : `FSPOLoss`, IPO or DPO on summed log-probabilities.
- `trainer` : `PrefFTTrainer`, the supervised first stage, and `FSPOTrainer`, the second.
- `rewarder` : `PersonalRewarder`, scores and writes for new users.
- `personas` : synthetic preferences, their controls, and gauges of diversity and structure.

Differences from the authors' code: windows take N + 1 records where theirs take N + 2 and leave one unused; an episode
that is too long loses its oldest shots where theirs keeps the start of the prompt and loses the question; the first
stage trains on chosen responses, as described, where theirs trains on both (``sft_on="both"``).

Reference: Singh, Hsu, Hsu, Mitchell, Ermon, Hashimoto, Sharma and Finn, "FSPO: Few-Shot Preference Optimization of
Synthetic Preference Data in LLMs Elicits Effective Personalization to Real Users", arXiv 2502.19312.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
