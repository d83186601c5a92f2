"""StableMax and OrthoGrad: training classifiers long past 100 % training accuracy without weight decay.

Two things stop a classifier there. Softmax cross-entropy rounds to 0 once the right logit leads by about 17 (float32;
6 in bfloat16), and the sample teaches nothing more: softmax collapse. And most of the gradient points along the
weights, which only scales the logits: naive loss minimisation, which delays generalisation and ends in the collapse.

    from workingpapers.training.stablemax import OrthoGrad, StableMaxCrossEntropyLoss

    loss_fn = StableMaxCrossEntropyLoss()
    optimiser = OrthoGrad(model.parameters(), base=torch.optim.AdamW, lr=1e-2)
    loss_fn(model(x), y).backward()
    optimiser.step()
    optimiser.zero_grad()

Take `OrthoGrad` to generalise soon: on modular arithmetic it needs a hundred steps where weight decay needs several
hundred. If training goes on, its test accuracy may fall back by a point or two, so keep the best weights.
`StableMaxCrossEntropyLoss` by itself only removes the collapse: generalisation may still take thousands of steps.
Where weight decay is acceptable and time is plenty, it does as well; where the training set is never learnt to 100 %,
neither problem arises. `GrokkingMonitor` tells which of the two a run suffers from.

- `losses` : `StableMaxCrossEntropyLoss`, `stablemax_cross_entropy`, `log_stablemax`, `stablemax`.
- `orthograd` : `OrthoGrad`, around any optimiser class.
- `diagnostics` : `softmax_collapse_fraction`, `nlm_cosine`, `GrokkingMonitor`.
- `tasks` : `modular_dataset`, `sparse_parity`.

Reference: Prieto, Barsbey, Mediano and Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025 (arXiv
2501.04697). Against the authors' code: the loss computes in the type of the logits where theirs casts to float64, and
does not round to 0; `OrthoGrad` projects after a closure instead of before it, shares state with its base optimiser,
and leaves biases and gains alone unless ``exclude=()``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
