"""How a claim wants to be shown; `desk.figure` draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Plot:
    """A figure: `y` against `x`, one series per value of `by`, means over seeds with 95 % intervals.

    Attributes
    ----------
    kind : "line", "bars" or "scatter".
    log : which axes are logarithmic: "", "x", "y" or "xy".
    each : one panel per value of this column, if any.
    where : keep only the rows with these values; "last" keeps a column's largest value in each cell.
    """

    kind: Literal["line", "bars", "scatter"]
    x: str
    y: str
    by: str
    log: Literal["", "x", "y", "xy"] = ""
    each: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)


def line(
    x: str,
    y: str,
    by: str = "method",
    *,
    log: Literal["", "x", "y", "xy"] = "",
    each: str | None = None,
    where: Mapping[str, Any] | None = None,
) -> Plot:
    """Curves with a band."""
    return Plot("line", x, y, by, log, each, dict(where or {}))


def bars(
    x: str,
    y: str,
    by: str = "method",
    *,
    log: Literal["", "x", "y", "xy"] = "",
    each: str | None = None,
    where: Mapping[str, Any] | None = None,
) -> Plot:
    """Grouped bars with whiskers."""
    return Plot("bars", x, y, by, log, each, dict(where or {}))


def scatter(
    x: str,
    y: str,
    by: str = "method",
    *,
    log: Literal["", "x", "y", "xy"] = "",
    each: str | None = None,
    where: Mapping[str, Any] | None = None,
) -> Plot:
    """One point per row."""
    return Plot("scatter", x, y, by, log, each, dict(where or {}))
