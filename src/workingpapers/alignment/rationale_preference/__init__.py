"""Preference optimisation with rationales: the model also learns to write why the chosen answer won.

A pair says which answer is better, not why, and length or style explain a few pairs as well as the true reason. Here
every pair carries a short rationale r, written by a person or a machine, and the chain rule splits the likelihood of
label and rationale in two: p(y_w > y_l, r | x) = p(y_w > y_l | x) p(r | x, y_w > y_l). The first factor is any direct
preference loss (DPO, ORPO, SimPO); the second is the same model's likelihood of r, given a prompt that shows both
answers. It costs one more sequence per pair, longer than the answers, since its prompt quotes them.

The term can help only through what explaining and answering share in the model: it moves the answers where the
rationale names an attribute that the policy also uses to choose, and it harms where rationales name the wrong one.
Where the rationale can be copied from its own prompt, it teaches nothing about the answers. Before paying for
rationales compare with what costs less: more pairs, and a supervised term on the chosen answers
(`workingpapers.alignment.RPOLoss`); the claims beside this module measure both.

- `losses` : `RationaleLoss`, for any training loop that has log-probabilities; `orpo_losses`, `simpo_losses`.
- `formatting` : `RationaleFormatter`, the prompt of a rationale; `add_rationales`, which has a language model write
  them; `tokenize_rationales`, from rows to token ids.
- `trainer` : `RationaleTrainer`, for transformers causal LMs, with or without peft.
- `efficiency` : `data_efficiency`, how many pairs a method needs to reach a score.

Reference: Just, Jin, Sahu, Phan and Jia, "Data-Centric Human Preference with Rationales for Direct Preference
Alignment", COLM 2025, arXiv 2407.14477 (first version: "Data-Centric Human Preference Optimization with Rationales").
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
