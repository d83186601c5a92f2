"""Checks of arguments: each raises one sentence naming the argument, what was given and what is accepted."""

from __future__ import annotations

import importlib
import math
import numbers
from collections.abc import Collection
from types import ModuleType
from typing import Any

import numpy as np


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """Return `value` as a float when it is a finite real number inside the bounds.

    Raises
    ------
    TypeError : `value` is not a real number (bool is not one).
    ValueError : `value` is not finite or violates a bound.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    bounds = [
        (above, "above", number > above if above is not None else True),
        (at_least, "at least", number >= at_least if at_least is not None else True),
        (below, "below", number < below if below is not None else True),
        (at_most, "at most", number <= at_most if at_most is not None else True),
    ]
    if not math.isfinite(number) or not all(kept for _, _, kept in bounds):
        wanted = " and ".join(f"{word} {bound:g}" for bound, word, _ in bounds if bound is not None) or "finite"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return number


def check_integer(name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None) -> int:
    """Return `value` as an int when it is an integer inside the bounds.

    Raises
    ------
    TypeError : `value` is not an integer (bool is not one).
    ValueError : `value` violates a bound.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(check_number(name, value, at_least=at_least, at_most=at_most))


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_finite(name: str, array: Any) -> None:
    """Raise ValueError unless every entry of a NumPy array or torch tensor is finite."""
    if isinstance(array, np.ndarray | np.generic):
        finite = bool(np.isfinite(array).all())
    else:
        finite = bool(array.isfinite().all())
    if not finite:
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency, or say in one sentence which extra of workingpapers brings it.

    Raises
    ------
    ImportError : the module is absent.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name != module.partition(".")[0]:
            raise
        raise ImportError(f"{module} is needed here: pip install 'workingpapers[{extra}]'") from missing
