"""Claims of "FSPO: Few-Shot Preference Optimization of Synthetic Preference Data in LLMs Elicits Effective ...".

The paper's tables are judgements of a 3-billion-parameter model. What they rest on can be measured where users are
known exactly: a user is a vector of hidden weights over the visible attributes of a response, labels are Bradley-Terry,
and the best that anybody could predict from the shots (the posterior over all users) is computed exactly. Users are
either the sign vectors, few enough to be memorised, or a thousand in random directions.
"""

from workingpapers.claims.alignment.fewshot_preference.cost import training_step
from workingpapers.claims.alignment.fewshot_preference.known_users import (
    describing_the_user,
    four_shots,
    ipo_or_dpo,
    many_users,
    more_shots,
    random_labels,
    sixteen_users,
    written_responses,
)
from workingpapers.claims.alignment.fewshot_preference.synthetic import synthetic_data

__all__ = [
    "describing_the_user",
    "four_shots",
    "ipo_or_dpo",
    "many_users",
    "more_shots",
    "random_labels",
    "sixteen_users",
    "synthetic_data",
    "training_step",
    "written_responses",
]
