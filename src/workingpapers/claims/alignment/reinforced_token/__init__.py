"""Claims of "DPO Meets PPO: Reinforced Token Optimization for RLHF".

The paper's tables are GPT-4 judgements of an 8-billion-parameter model. Here answers are strings of tokens from a
table of logits [place, token before, token], the true reward is a table of the same form, and the return of a policy is
exact. All methods see the same 1,500 pairs: DPO fits its policy to them, the sentence reward is fitted to them and
shown as one number per answer. PPO, REINFORCE and all forms of RTO then draw equally many answers.
"""

from workingpapers.claims.alignment.reinforced_token.cost import policy_update
from workingpapers.claims.alignment.reinforced_token.smollm2 import smollm2_short_sentences
from workingpapers.claims.alignment.reinforced_token.tables import (
    ahead_at_the_end,
    ahead_of_ppo_early,
    ahead_of_reinforce_early,
    ahead_with_a_large_weight,
    an_eighth_of_the_answers,
    best_of_the_family_early,
    fewer_answers,
    gap_by_horizon,
    how_finely_it_is_paid,
    where_it_is_paid,
)
from workingpapers.claims.alignment.reinforced_token.theory import (
    exact_identities,
    queries_as_stated,
    queries_with_token_rewards,
)

__all__ = [
    "ahead_at_the_end",
    "ahead_of_ppo_early",
    "ahead_of_reinforce_early",
    "ahead_with_a_large_weight",
    "an_eighth_of_the_answers",
    "best_of_the_family_early",
    "exact_identities",
    "fewer_answers",
    "gap_by_horizon",
    "how_finely_it_is_paid",
    "policy_update",
    "queries_as_stated",
    "queries_with_token_rewards",
    "smollm2_short_sentences",
    "where_it_is_paid",
]
