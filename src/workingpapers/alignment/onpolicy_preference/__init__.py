"""Preference fine-tuning with its three ingredients as switches, and how to set them.

Supervised tuning on winners, reward-weighted regression, REINFORCE, PPO, DPO and IPO differ in three things: whether
they learn from fresh answers of the policy itself, how many gradient steps they take on each batch of answers, and
whether they push bad answers down. Here one loop has all three, so that each can be changed alone on one budget, which
is counted in reward queries, gradient steps and tokens at once: different winners come out of different budgets.

What the authors found, to be read with the claims beside this module: (1) the further the best answers are from the
reference policy's habits, the more fresh samples help, and where they are close it hardly matters; (2) moderate reuse
of a batch saves queries, much reuse hurts all losses but PPO; (3) pushing bad answers down beats likelihood alone where
the best answers are far; (4) fresh samples and pushing down go together. `alignment_gap` measures how far, `recommend`
sets the switches. Where a reference already covers the best answers, a sharp reward-weighted regression on its samples
is as good and much cheaper.

- `losses` : `pref_ft`, `best_of_n`, `rwr`, `reinforce`, `ppo`, `dpo`, `ipo`, `slic`, on groups of answers to a prompt,
  and `GroupLoss`, one module for all of them.
- `tuner` : `PreferenceTuner`, the loop, and its history.
- `policies` : policies over numbered actions, and any transformers causal LM, as the loop wants them.
- `gap` : `alignment_gap`, `recommend` and `kl_gradients`, the two directions in which mass can move.
- `workingpapers.alignment.testbeds` : the bandits and length tasks on which this was found.

The losses are functions of this package and not of `workingpapers.alignment`, where `best_of_n` and `ppo` name other
things.

Reference: Tajwar, Singh, Sharma, Rafailov, Schneider, Xie, Ermon, Finn and Kumar, "Preference Fine-Tuning of LLMs
Should Leverage Suboptimal, On-Policy Data", ICML 2024, arXiv 2404.14367.
"""

from workingpapers.alignment import testbeds
from workingpapers.alignment.onpolicy_preference.gap import (
    AlignmentGap,
    Recommendation,
    alignment_gap,
    kl_gradients,
    recommend,
)
from workingpapers.alignment.onpolicy_preference.losses import (
    GroupLoss,
    GroupLossOutput,
    best_of_n,
    dpo,
    group_advantages,
    ipo,
    ppo,
    pref_ft,
    reinforce,
    rwr,
    slic,
)
from workingpapers.alignment.onpolicy_preference.policies import (
    CategoricalPolicy,
    CausalLMPolicy,
    LogitTable,
    Policy,
    model_reward,
    text_reward,
)
from workingpapers.alignment.onpolicy_preference.tuner import PreferenceTuner, TunerHistory

__all__ = [
    "AlignmentGap",
    "CategoricalPolicy",
    "CausalLMPolicy",
    "GroupLoss",
    "GroupLossOutput",
    "LogitTable",
    "Policy",
    "PreferenceTuner",
    "Recommendation",
    "TunerHistory",
    "alignment_gap",
    "best_of_n",
    "dpo",
    "group_advantages",
    "ipo",
    "kl_gradients",
    "model_reward",
    "ppo",
    "pref_ft",
    "recommend",
    "reinforce",
    "rwr",
    "slic",
    "testbeds",
    "text_reward",
]
