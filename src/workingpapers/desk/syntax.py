"""Syntax trees, made by one thread at a time.

In Python 3.11 two threads that make syntax trees at once disturb each other and get a SystemError (the recursion depth
of the conversion is counted for the whole interpreter; python/cpython issue 106905).
"""

from __future__ import annotations

import ast
import threading

ATTEMPTS = 5  # code that is not ours makes syntax trees too, and does not ask

_lock = threading.Lock()


def parse(text: str, name: str = "<unknown>") -> ast.Module:
    """The syntax tree of a module.

    Raises
    ------
    SyntaxError : it has none.
    """
    with _lock:
        for _ in range(ATTEMPTS - 1):
            try:
                return ast.parse(text, name)
            except SystemError:
                continue
        return ast.parse(text, name)
