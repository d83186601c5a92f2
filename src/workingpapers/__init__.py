"""Working Papers: the methods of the Daily Papers listings, and what their claims are worth when run."""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "alignment",
        "causality",
        "clustering",
        "compression",
        "control",
        "data",
        "dynamics",
        "equations",
        "federated",
        "generative",
        "inference",
        "language",
        "optimization",
        "recommendation",
        "selection",
        "training",
    ],
)
