"""Claims of "Self-Improvement in Language Models: The Sharpening Mechanism".

The paper's table needs models of 4 to 8 billion parameters. What it rests on is exact on finite tables, and shows on
small transformers whose law of answers is known: where the likeliest answer is right, sharpening gains; where it is
wrong (here: empty), sharpening loses, and rewards per token or by majority are the remedy to compare.
"""

from workingpapers.claims.alignment.sharpening.digits import likelihood_and_truth_agree, the_empty_answer_is_likelier
from workingpapers.claims.alignment.sharpening.exact import (
    adaptive_against_fixed,
    enough_draws,
    exploration_without_coverage,
    greedy_decoding_and_half_of_the_mass,
    law_of_the_best,
    minimiser_of_the_pair_loss,
)
from workingpapers.claims.alignment.sharpening.language import best_of_n_throughput, smollm2_sums

__all__ = [
    "adaptive_against_fixed",
    "best_of_n_throughput",
    "enough_draws",
    "exploration_without_coverage",
    "greedy_decoding_and_half_of_the_mass",
    "law_of_the_best",
    "likelihood_and_truth_agree",
    "minimiser_of_the_pair_loss",
    "smollm2_sums",
    "the_empty_answer_is_likelier",
]
