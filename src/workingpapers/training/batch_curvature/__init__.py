"""Learning rates as a function of the batch size, from measured curvature.

For whoever changes the batch size and asks what the learning rate should be, or how large it may be at all. The top
eigenvalue lambda_1(B) of the Hessian on a batch is larger than that on all samples; a curve fitted to it at three or
more batch sizes says how the largest stable rate 2 / lambda_1(B) grows and where it stops growing.

    from workingpapers.training.batch_curvature import batch_top_eigenvalue, fit_batch_curve, scale_lr

    sizes = (16, 64, 256)
    lam = [batch_top_eigenvalue(model, loss_fn, data, B) for B in sizes]
    curve = fit_batch_curve(sizes, lam, N=len(data))
    print(curve.model, curve.bstar, scale_lr(0.1, B0=64, B=512, rule="measured", curve=curve))

The curve answers for plain SGD and SGD with momentum (`max_lr`). For Adam and its kind the paper's rule is the square
root, ``scale_lr(..., rule="sqrt")``, as far as `curve.bstar`. What is stable over so many steps of so many samples is
best known by trying: `largest_stable_lr` does, at the cost of some ten short runs. Where something else than curvature
limits training (gradient noise late in training, warm-up, clipping), tune the rate instead.

- `products` : `hvp`, `ggn_vp`, the Hessian and the Gauss-Newton matrix of any module as linear operators.
- `spectrum` : `lanczos`, `spectral_density`, `batch_extremes`, `batch_top_eigenvalue`, `noise_variance`.
- `laws` : `predict_extremal`, `predict_ggn`, `fit_batch_curve`, `max_lr`, `scale_lr`, `gaussian_regression_max_lr`.
- `stability` : `largest_stable_lr`.
- `learner` : `LanczosLR`, learning rate and momentum while training goes on.

Reference: Granziol, Zohren and Roberts, "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to
Neural Network Training", JMLR 23(173), 2022 (arXiv 2006.09092). The paper reads linear scaling for SGD off its additive
law. There it holds only in the range in which noise adds at most as much again (lambda' <= 2 lambda_1), below which the
noise's edge makes the rate grow like the square root; a rate linear in B over decades is what the multiplicative law
gives, that of sample covariances. Both are fitted here, and the measured eigenvalues choose.
"""

from workingpapers.common.lanczos import lanczos
from workingpapers.training.batch_curvature.laws import (
    BatchCurve,
    effective_batch,
    fit_batch_curve,
    gaussian_regression_max_lr,
    max_lr,
    predict_extremal,
    predict_ggn,
    scale_lr,
)
from workingpapers.training.batch_curvature.learner import HeavyBall, LanczosLR, heavy_ball
from workingpapers.training.batch_curvature.products import Curvature, ggn_vp, hvp
from workingpapers.training.batch_curvature.spectrum import (
    BatchExtremes,
    NoiseVariance,
    batch_extremes,
    batch_top_eigenvalue,
    noise_variance,
    spectral_density,
)
from workingpapers.training.batch_curvature.stability import StableRate, largest_stable_lr

__all__ = [
    "BatchCurve",
    "BatchExtremes",
    "Curvature",
    "HeavyBall",
    "LanczosLR",
    "NoiseVariance",
    "StableRate",
    "batch_extremes",
    "batch_top_eigenvalue",
    "effective_batch",
    "fit_batch_curve",
    "gaussian_regression_max_lr",
    "ggn_vp",
    "heavy_ball",
    "hvp",
    "lanczos",
    "largest_stable_lr",
    "max_lr",
    "noise_variance",
    "predict_extremal",
    "predict_ggn",
    "scale_lr",
    "spectral_density",
]
