"""Claims of "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data".

The paper's results are curves, of bandits and of language models; no table was available, so what is published stands
in words. Here the bandit is the authors' (100 actions, heavy-tailed data policy, reward far from or near its mode),
once with a table of logits and once with their network, and the length tasks run on a small transformer with a reward
learned from pairs.

"fresh" draws answers from the policy itself, "fixed" from the reference, with as many reward queries. Learning rates
were chosen for every loss, source and centre on one grid, on seeds 1000 and up, by the final reward. RWR is
reward-weighted regression at the temperature that follows.
"""

from workingpapers.claims.alignment.onpolicy_preference.cost import (
    training,
)
from workingpapers.claims.alignment.onpolicy_preference.language import (
    rare_lengths,
    rare_lengths_by_best_of_n,
    smollm2_short_answers,
    tokens,
    usual_lengths,
)
from workingpapers.claims.alignment.onpolicy_preference.modes import (
    commitment,
    gradients,
    speed_of_both_divergences,
    speed_with_a_light_weight,
)
from workingpapers.claims.alignment.onpolicy_preference.network import (
    network_far_peak,
    network_far_peak_but_for_two_losses,
    network_near_peak,
)
from workingpapers.claims.alignment.onpolicy_preference.table import (
    advice,
    budgets_side_by_side,
    far_peak,
    far_peak_but_for_two_losses,
    fresh_and_push_down,
    gain_of_fresh_samples,
    ipo_against_best_of_n,
    near_peak,
    push_down_against_winners,
    push_down_on_fixed_samples,
    reuse,
    reuse_by_ppo,
    reuse_or_learning_rate,
)

__all__ = [
    "advice",
    "budgets_side_by_side",
    "commitment",
    "far_peak",
    "far_peak_but_for_two_losses",
    "fresh_and_push_down",
    "gain_of_fresh_samples",
    "gradients",
    "ipo_against_best_of_n",
    "near_peak",
    "network_far_peak",
    "network_far_peak_but_for_two_losses",
    "network_near_peak",
    "push_down_against_winners",
    "push_down_on_fixed_samples",
    "rare_lengths",
    "rare_lengths_by_best_of_n",
    "reuse",
    "reuse_by_ppo",
    "reuse_or_learning_rate",
    "smollm2_short_answers",
    "speed_of_both_divergences",
    "speed_with_a_light_weight",
    "tokens",
    "training",
    "usual_lengths",
]
