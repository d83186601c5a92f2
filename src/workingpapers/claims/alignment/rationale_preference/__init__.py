"""Claims of "Data-Centric Human Preference with Rationales for Direct Preference Alignment".

The paper's own tables are judgements by GPT-4 of 7- and 8-billion-parameter models. Here the attribute that decides a
label is known, length is a shortcut that holds in training and is reversed at test, and the rationale names one of the
two. In a log-linear model explaining and choosing use the same weights, so that the paper's mechanism can act; a small
transformer can copy the rationale from its prompt instead. The controls are rationales of other pairs, rationales that
name the shortcut, more pairs in place of rationales, and a supervised term on the chosen answers.
"""

from workingpapers.claims.alignment.rationale_preference.language import smollm2_short_sentences, training_step
from workingpapers.claims.alignment.rationale_preference.log_linear import (
    every_base,
    identities,
    misleading_rationales,
    pairs_to_the_target,
    rationales_alone,
    shared_weights,
    three_times_the_pairs,
    weight_of_the_shortcut,
)
from workingpapers.claims.alignment.rationale_preference.transformer import (
    against_a_supervised_term,
    copied_rationales,
    facts_without_length,
    other_bases_on_a_transformer,
    pairs_for_the_best,
    verbosity,
)

__all__ = [
    "against_a_supervised_term",
    "copied_rationales",
    "every_base",
    "facts_without_length",
    "identities",
    "misleading_rationales",
    "other_bases_on_a_transformer",
    "pairs_for_the_best",
    "pairs_to_the_target",
    "rationales_alone",
    "shared_weights",
    "smollm2_short_sentences",
    "three_times_the_pairs",
    "training_step",
    "verbosity",
    "weight_of_the_shortcut",
]
