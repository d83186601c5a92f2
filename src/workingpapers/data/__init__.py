"""Real data that needs no download, and generators: one loader per source.

A loader returns a `Dataset`; where the package that carries the data is absent it raises `DataNotInstalled`, whose
one sentence says what to install. Nothing is ever fetched.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
