"""Regularized preference optimization: DPO with the supervised term that its adversarial derivation asks for.

"RPO" also names relative, reward-aware and iterative-reasoning preference optimization; this is the *regularized* one.
DPO fits only the difference of two log-ratios, so the log-probability of the chosen answers may fall while the loss
improves, and the mass leaks to answers no pair covers. RPO adds eta * beta times the negative log-likelihood of a
baseline policy's answers (by default the chosen ones). That sum is the exact dual of "best policy against the worst
bounded reward that still fits the data". It costs nothing beyond DPO. Where a held-out gold score exists, stopping DPO
early or raising beta does as well; the term earns its place where there is none. The guarantee needs the baseline's
answers covered by the data: with answers from elsewhere the loss is a heuristic.

- `losses` : `RPOLoss`, for any training loop that has log-probabilities.
- `trainer` : `RPOTrainer`, a thin loop for transformers causal LMs, with or without peft.
- `minimax` : `rpo_minimax`, the exact solution for finite action sets.
- `report` : `overoptimization_report`, the numbers to watch while training.

Reference: Liu, Lu, Zhang, Liu, Guo, Yang, Blanchet and Wang, "Provably Mitigating Overoptimization in RLHF: Your SFT
Loss is Implicitly an Adversarial Regularizer", NeurIPS 2024, arXiv 2405.16436. Equation numbers are theirs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
