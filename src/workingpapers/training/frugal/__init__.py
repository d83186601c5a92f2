"""FRUGAL: train transformers with Adam's moments for a small, rotating part of each linear layer.

Adam keeps two numbers for every parameter. FRUGAL keeps them for a share `density` of the linear layers (whole
tensors, columns, rows, single entries, or a low-rank subspace; another share every `update_gap` steps) and moves
everything else by the sign of its gradient, so that every step has full rank. At density 0.25 the linear layers need a
quarter of Adam's memory, at 0 none; embeddings, output head, norms and biases stay with Adam.

    from workingpapers.training.frugal import Frugal, frugal_param_groups

    optimiser = Frugal(frugal_param_groups(model), lr=1e-3, density=0.25, update_gap=200, projection="block")
    model(**batch).loss.backward()
    optimiser.step()
    optimiser.zero_grad()

Take "block" unless there is a reason not to: it stores nothing but moments and is the cheapest step. "svd" learns a
little more in a step but pays for decompositions and products with a projector. Sign steps want a smaller learning rate
than Adam's: tune `proj_lr_scale` (try 0.25 and 1) together with `lr`. Where Adam's state fits, Adam is simpler; where
the weights themselves do not fit, LoRA or 8-bit weights help and FRUGAL does not. `free="none"` gives the rivals that
throw the rest of the gradient away: with "svd" and on_refresh="keep" GaLore, with "block" and "descending" BAdam.

- `optimizer` : `Frugal`.
- `groups` : `frugal_param_groups`, which splits a model.
- `memory` : `state_memory`, of any optimiser.
- `trainer` : `trainer_optimizers`, for the Trainer of transformers.

Reference: Zmushko, Beznosikov, Takáč and Horváth, "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for
Scalable Training", ICML 2025 (arXiv 2411.07837). Against the authors' code: random subspaces come from the optimiser's
own seed, so that all processes of a distributed run choose the same; momentum of SGD starts at zero instead of at the
weights; after a change of subspace moments may be re-projected, as the paper's algorithm says and the code does not.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
