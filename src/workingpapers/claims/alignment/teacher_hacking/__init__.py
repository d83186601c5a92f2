"""Claims of "On Teacher Hacking in Language Model Distillation".

The paper distils T5 models for 390,625 steps and shows curves, no tables. What it reports does not need their size:
small recurrent models over 16 symbols show it in seconds, with a truth whose divergence is known exactly at every
prefix. The effect needs a teacher that is clearly wrong (it saw few answers of the oracle, each often) and a smaller
student; a setting in which nothing happens stands beside it. The U-shape is judged on the same answers at every
evaluation, by the standard error of paired differences. The detector is ours, the paper gives none.
"""

from workingpapers.claims.alignment.teacher_hacking.language import distillation_step, smollm2_is_the_oracle
from workingpapers.claims.alignment.teacher_hacking.studies import (
    a_teacher_close_to_the_oracle,
    departure_from_the_power_law,
    false_alarms,
    fewer_prompts_by_the_end,
    fewer_prompts_by_the_rise,
    hacking,
    more_answers,
    on_policy,
    other_losses,
)

__all__ = [
    "a_teacher_close_to_the_oracle",
    "departure_from_the_power_law",
    "distillation_step",
    "false_alarms",
    "fewer_prompts_by_the_end",
    "fewer_prompts_by_the_rise",
    "hacking",
    "more_answers",
    "on_policy",
    "other_losses",
    "smollm2_is_the_oracle",
]
