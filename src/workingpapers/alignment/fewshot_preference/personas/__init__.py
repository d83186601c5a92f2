"""Synthetic preferences of many users: how to make them, and gauges that say whether they can be learned from.

A model that is to adapt to people has to be trained on users that differ and that mean what they say. Two controls:

- diversity: responses written for personas or viewpoints, by several writers (`synthesize`), so that there is something
  to prefer; `response_similarity` should be low;
- structure: labels that the user's description determines, found by a judge that is asked in both orders (`synthesize`)
  and a description that is extended wherever it leaves a label open (`refine`); `label_entropy` should be low, and
  `disagreement` should show users that differ.
"""

from workingpapers.alignment.fewshot_preference.personas.gauges import disagreement, label_entropy, response_similarity
from workingpapers.alignment.fewshot_preference.personas.refinement import Refinement, refine
from workingpapers.alignment.fewshot_preference.personas.synthesis import (
    SyntheticPreferences,
    judge_prompt,
    synthesize,
)

__all__ = [
    "Refinement",
    "SyntheticPreferences",
    "disagreement",
    "judge_prompt",
    "label_entropy",
    "refine",
    "response_similarity",
    "synthesize",
]
