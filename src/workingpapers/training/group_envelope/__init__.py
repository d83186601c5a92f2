"""Networks and linear models with at most k groups of weights, k chosen in advance: group envelope regularisation.

The regulariser is the tightest convex bound on "energy, with at most k groups nonzero"; its proximal operator is exact
and takes linear time. A group is whatever the hardware wants gone: filters, channels, neurons, attention heads, or any
set of weights.

    spec = GroupSpec.from_module(model, kind="filter")
    reg = GroupEnvelope(spec, k=0.3, lam=0.0)
    optimizer = ProxSGD(model.parameters(), reg, lr=0.05)  # or any optimiser, with reg.prox_(lr) after its step
    ramp = SparsityRamp(reg, epochs=50)
    for epoch in range(50):
        ramp.step(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    print(reg.sparsity())
    smaller = shrink(model, spec)  # the same outputs from fewer filters

When something else is better. The envelope controls how many groups are left, which the group lasso does not; it does
not choose better ones. On handwritten digits, after the same ramp, hardening and training without penalty, perceptrons
are about a point less accurate than under the group lasso, and removing the groups of smallest norm from a trained
network (`harden`), followed by the same training, is simpler and a point and a half better. A constant strength large
enough to leave k groups costs more, as every kept group carries it as weight decay.

- `envelope` : `wgsef`, `prox_wgsef`, `conjugate`, for arrays and tensors.
- `spec` : `GroupSpec`, `Sparsity`, `harden`. `members` : `Family`, for groups of one's own making.
- `regularizers` : `GroupEnvelope`, and `GroupLasso` to compare with. `ramp` : `SparsityRamp`.
- `optimizers` : `ProxSGD`, `ProxAdam`, `HSPG`.
- `shrinking` : `shrink`.
- `linear` : `KGroupRegressor`, `KSupportRegressor`.

Reference: Refael, Arbel and Huleihel, "Learning k-Level Structured Sparse Neural Networks Using Group Envelope
Regularization", arXiv 2212.12921. No code was published; the formulas here are derived from the definition, and the
ramp, the hardening and all defaults of training are this library's. Half-space steps: Chen et al., "Orthant Based
Proximal Stochastic Gradient Method" and "Half-Space Proximal Stochastic Gradient Method for Group-Sparsity Regularized
Problem", arXiv 2009.12078.
"""

from workingpapers.training.group_envelope.envelope import conjugate, prox_wgsef, wgsef
from workingpapers.training.group_envelope.linear import KGroupRegressor, KSupportRegressor
from workingpapers.training.group_envelope.members import Entries, Family, Indexed, Slices
from workingpapers.training.group_envelope.optimizers import HSPG, ProxAdam, ProxSGD
from workingpapers.training.group_envelope.ramp import SparsityRamp
from workingpapers.training.group_envelope.regularizers import GroupEnvelope, GroupLasso
from workingpapers.training.group_envelope.shrinking import shrink
from workingpapers.training.group_envelope.spec import GroupSpec, Sparsity, harden

__all__ = [
    "HSPG",
    "Entries",
    "Family",
    "GroupEnvelope",
    "GroupLasso",
    "GroupSpec",
    "Indexed",
    "KGroupRegressor",
    "KSupportRegressor",
    "ProxAdam",
    "ProxSGD",
    "Slices",
    "Sparsity",
    "SparsityRamp",
    "conjugate",
    "harden",
    "prox_wgsef",
    "shrink",
    "wgsef",
]
