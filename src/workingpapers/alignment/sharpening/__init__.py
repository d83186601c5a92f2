"""Sharpening: a language model learns from its own most likely answers, with no reward from outside.

A model often gives its highest sequence probability to better answers than those it draws. Draw N answers, score them
by a self-reward (the model's own log-probability of the whole answer, unless told otherwise), and keep the best:
inference-time sharpening. Fine-tune on the kept answers (SFT-Sharpening), or regress log-ratios on differences of
self-reward (RLHF-Sharpening, offline or with exploration), and one plain draw gives what the search found.

This helps exactly where likelihood and quality agree. Where the likeliest answers are wrong, short or empty, it makes
them more frequent: look at the lengths and samples in the report, and compare with rewards per token or by majority.
Where greedy decoding already finds the likeliest answer there is nothing to gain, and for short answers to a handful of
prompts, majority voting at inference time needs no training.

- `tabular` : the quantities of the framework and the laws of best-of-N, of the adaptive rule and of the KL-regularised
  optimum, exactly, for finite tables.
- `policy`, `rewards` : what is drawn from, and `self_reward`.
- `selection` : `sharpen`, best-of-N with a fixed or an adaptive number of draws.
- `losses` : `SharpeningPairLoss`.
- `estimator` : `SharpeningSFT` and `SharpeningRLHF`, for transformers causal LMs.
- `report` : `sharpness`, how sharp a model is.

Reference: Huang, Block, Foster, Rohatgi, Zhang, Simchowitz, Ash and Krishnamurthy, "Self-Improvement in Language
Models: The Sharpening Mechanism", ICLR 2025, arXiv 2412.01951.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
