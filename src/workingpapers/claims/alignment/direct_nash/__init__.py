"""Claims of "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences".

The paper's tables are GPT-4 judgements of models of 7 billion parameters. What they rest on is measured here where the
judge is known: in finite games everything is exact; in a contextual choice among 120 answers the judge may be more or
less circular, and DNO meets its variants, SPIN, iterative and offline DPO, and PPO on a fitted Bradley-Terry reward;
small transformers run the trainer itself. Win rates against the start mislead where preferences go in circles, so the
head-to-head against DNO and the exploitability always stand beside them: with a strongly circular judge the methods
themselves go in circles, and the one with the best win rate against the start, offline DPO, loses most against DNO.
"""

from workingpapers.claims.alignment.direct_nash.choice import (
    against_iterative_dpo,
    against_offline_dpo,
    against_ppo,
    against_restrictive,
    against_spin,
    large_margins,
    rounds_improve,
    soft_targets,
)
from workingpapers.claims.alignment.direct_nash.games import (
    means_are_hard_to_beat,
    monotone_improvement,
    rate_of_the_mean,
    regression_reaches_the_target,
    regularised_last_round,
    time_to_equilibrium,
)
from workingpapers.claims.alignment.direct_nash.language import smollm2_short_sentences, transformer_rounds

__all__ = [
    "against_iterative_dpo",
    "against_offline_dpo",
    "against_ppo",
    "against_restrictive",
    "against_spin",
    "large_margins",
    "means_are_hard_to_beat",
    "monotone_improvement",
    "rate_of_the_mean",
    "regression_reaches_the_target",
    "regularised_last_round",
    "rounds_improve",
    "smollm2_short_sentences",
    "soft_targets",
    "time_to_equilibrium",
    "transformer_rounds",
]
