"""Testbeds for preference fine-tuning whose true reward is known.

All are one-step environments: a prompt (or context), an answer, a reward. Each has `reward`, `policy()`, `reference()`
and prompts as `PreferenceTuner` wants them; the bandits also have `reset` and `step` in the manner of Gymnasium, and
`gymnasium()` makes a Gymnasium environment of one.

- `bump_bandit` : 100 actions, a heavy-tailed data policy, and a reward that peaks where the data are rare or common.
- `token_bandit` : the same with ten tokens of a small transformer in place of one action.
- `length_task` : a small transformer that writes answers of known lengths, and a reward for short or usual ones.

Reference: Tajwar et al., "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data", ICML 2024.
"""

from workingpapers.alignment.testbeds.bandits import BumpBandit, bump_bandit, bump_reward, squashed_cauchy
from workingpapers.alignment.testbeds.lengths import LengthTask, length_task
from workingpapers.alignment.testbeds.tokens import TokenBandit, token_bandit

__all__ = [
    "BumpBandit",
    "LengthTask",
    "TokenBandit",
    "bump_bandit",
    "bump_reward",
    "length_task",
    "squashed_cauchy",
    "token_bandit",
]
