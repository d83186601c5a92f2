"""Claims of "Preference Fine-Tuning for Factuality in Chest X-Ray Interpretation Models Without Human Feedback".

The paper's numbers come from models of 3 and 8 billion parameters on MIMIC-CXR, judged by a language model. What they
rest on is measured here where the findings of every report are known: a small model writes reports from a noisy view, a
judge compares them with one reference each, and what the judge does not see (precision, length, an unrelated task) is
measured beside what it rewards. All reports are sampled, none is decoded greedily.
"""

from workingpapers.claims.alignment.judge_preference.cost import training_step
from workingpapers.claims.alignment.judge_preference.language import smollm2_reports
from workingpapers.claims.alignment.judge_preference.reports import (
    better_than_longer_sft,
    better_than_more_references,
    length_controlled_judge,
    length_controlled_sentences,
    length_labelled_by_chance,
    length_regularised_loss,
    no_alignment_tax,
    other_losses,
    reports_in_sentences,
    small_steps_without_tax,
)

__all__ = [
    "better_than_longer_sft",
    "better_than_more_references",
    "length_controlled_judge",
    "length_controlled_sentences",
    "length_labelled_by_chance",
    "length_regularised_loss",
    "no_alignment_tax",
    "other_losses",
    "reports_in_sentences",
    "small_steps_without_tax",
    "smollm2_reports",
    "training_step",
]
