"""Draws the figure of a recorded claim: inline SVG in the page's own font and colours, one drawing per panel, a legend.

Everything is said with presentation attributes and classes (`s0` to `s7` for the series), so that a
Content-Security-Policy without inline styles is content; no element has an id, so that a page may hold many figures.
Series differ by marker or dash as well as by colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

WIDTH, HEIGHT = 360, 250  # of a panel, in its own units
RIGHT, BOTTOM = 10, 34  # margins; the left one depends on the labels, the top one on the title
LINE = 11.5  # from one line of a label to the next
CHARACTER = 6.3  # about how wide one is at the size of the labels
COLOURS = 8
MARKERS = (  # paths around the origin
    "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z",
    "M-3.2-3.2h6.4v6.4h-6.4z",
    "M0-4.2 4 3h-8z",
    "M0-4.5 4.5 0 0 4.5-4.5 0z",
    "M0 4.2 4-3h-8z",
    "M-1.3-4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
)
DASHES = ("", "6 3", "2 2.5", "9 3 2 3")
MANY = 12  # points from which on a curve goes without markers
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Point = Sequence[Any]  # x, y, and the interval of y or None twice


@dataclass(frozen=True)
class Axis:
    """Where values lie between two ends of the drawing, and which of them carry labels."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool
    ticks: Sequence[tuple[float, str]]

    def __call__(self, value: float) -> float:
        """The place of a value, kept within the axis."""
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        if self.is_log:
            value = math.log(max(value, self.low))
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return self.start + share * (self.end - self.start)


def chart(figure: Mapping[str, Any]) -> str:
    """The figure of an evidence entry as HTML: its panels and, where there are several series, their legend.

    Empty when nothing was measured.
    """
    if all(point[1] is None for series in figure["series"] for point in series["points"]):
        return ""
    names = list(dict.fromkeys(series["name"] for series in figure["series"]))
    panels = list(dict.fromkeys(series["panel"] for series in figure["series"]))
    drawn = [_panel(figure, panel, names) for panel in panels]
    legend = _legend(figure, names) if len(names) > 1 and not _names_bars(figure) else ""
    size = "one" if len(panels) == 1 else "many"
    return f'<div class="chart {size}"><div class="panels">{"".join(drawn)}</div>{legend}</div>'


def _names_bars(figure: Mapping[str, Any]) -> bool:
    """Whether every bar has its series' whole name below it already."""
    room = (WIDTH - 40) / len(_places(figure)) if figure["kind"] == "bars" and figure["x"] == figure["by"] else 0
    return room > 0 and all("…" not in "".join(_wrapped(place, room)) for place in _places(figure))


def _panel(figure: Mapping[str, Any], panel: Any, names: Sequence[Any]) -> str:
    shown = [
        (names.index(series["name"]), series["name"], [point for point in series["points"] if point[1] is not None])
        for series in figure["series"]
        if series["panel"] == panel
    ]
    places = _places(figure)
    top = 34 if panel is not None else 20
    floor = HEIGHT - BOTTOM - (LINE if places else 0)
    y = _values(figure, floor, top)
    left = 12 + CHARACTER * max((len(label) for _, label in y.ticks), default=1)
    x = _categories(places, left) if places else _numbers(figure, panel, left)
    title = f"{_words(figure['each'])} = {_text(panel)}" if panel is not None else ""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_description(figure, title, names))}">',
        _frame(figure, title, x, y, left, bool(places)),
    ]
    if figure["kind"] == "bars":
        parts += _bars(figure, shown, places, x, y)
    else:
        at: Callable[[Any], float] = (lambda value: x(places.index(_text(value)))) if places else x
        parts += [_curve(figure, number, name, points, at, y) for number, name, points in shown]
    return "".join([*parts, "</svg>"])


def _description(figure: Mapping[str, Any], title: str, names: Sequence[Any]) -> str:
    kind = {"line": "Line chart", "bars": "Bar chart", "scatter": "Scatter plot"}[figure["kind"]]
    of = f" of {', '.join(_text(name) for name in names)}" if names != [None] else ""
    return f"{kind}: {_words(figure['y'])} over {_words(figure['x'])}{of}{', where ' + title if title else ''}"


# --------------------------------------------------------------------------------------------------------------------
# Axes


def _values(figure: Mapping[str, Any], floor: float, top: float) -> Axis:
    """The vertical axis, which all panels share."""
    points = [point for series in figure["series"] for point in series["points"] if point[1] is not None]
    middle = [float(point[1]) for point in points]
    ends = [float(end) for point in points for end in point[2:4] if end is not None]
    is_log = "y" in figure["log"] and any(value > 0 for value in middle)
    if is_log:
        middle = [value for value in middle if value > 0]
        ends = [end for end in ends if end > min(middle) / 10]  # an interval may reach below zero
    values = middle + ends or [0.0]
    if figure["kind"] == "bars" and not is_log:
        values.append(0.0)
    low, high = _padded(min(values), max(values), is_log)
    if not is_log and min(values) >= 0:
        low = max(low, 0.0)
    elif not is_log and max(values) <= 0:
        high = min(high, 0.0)
    return Axis(low, high, floor, top, is_log, _ticks(low, high, is_log))


def _numbers(figure: Mapping[str, Any], panel: Any, left: float) -> Axis:
    values = sorted(
        {float(point[0]) for series in figure["series"] if series["panel"] == panel for point in series["points"]}
    ) or [0.0]
    is_log = "x" in figure["log"] and values[0] > 0
    low, high = _padded(values[0], values[-1], is_log)
    axis = Axis(low, high, left, WIDTH - RIGHT, is_log, ())
    own = [(value, _label(value)) for value in values]  # label what was measured where that is legible
    gaps = [axis(b) - axis(a) for a, b in pairwise(values)]
    widest = CHARACTER * max(len(label) for _, label in own)
    ticks = own if len(own) <= 6 and all(gap > widest + 8 for gap in gaps) else _ticks(low, high, is_log)
    return Axis(low, high, left, WIDTH - RIGHT, is_log, ticks)


def _places(figure: Mapping[str, Any]) -> list[str]:
    """The categories along x; none where x is a number."""
    found = dict.fromkeys(point[0] for series in figure["series"] for point in series["points"])
    if figure["kind"] != "bars" and all(isinstance(place, int | float) for place in found):
        return []
    return [_text(place) for place in found]


def _categories(places: Sequence[str], left: float) -> Axis:
    return Axis(-0.5, len(places) - 0.5, left, WIDTH - RIGHT, False, list(enumerate(places)))


def _padded(low: float, high: float, is_log: bool) -> tuple[float, float]:
    if is_log:
        room = (high / low) ** 0.05 if high > low else 2.0
        return low / room, high * room
    room = (high - low) * 0.05 or abs(high) * 0.5 or 1.0
    return low - room, high + room


def _ticks(low: float, high: float, is_log: bool) -> list[tuple[float, str]]:
    if is_log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        decades = list(range(first, last + 1))
        if len(decades) >= 3:
            chosen = decades[:: -(-len(decades) // 6)]
            is_far = any(abs(k) > 3 for k in chosen)
            return [(10.0**k, _power(k) if is_far else _label(10.0**k)) for k in chosen]
        found = [m * 10.0**k for k in range(first - 1, last + 1) for m in (1, 2, 5) if low <= m * 10.0**k <= high]
        if len(found) >= 2:
            return [(value, _label(value)) for value in found]
    rough = (high - low) / 5
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(i * step, _label(round(i * step, 12))) for i in range(first, last + 1)]


def _frame(figure: Mapping[str, Any], title: str, x: Axis, y: Axis, left: float, is_named: bool) -> str:
    """Title, names of the axes, labels and lines of the grid."""
    floor, top = y.start, y.end
    parts = ['<g class="frame" fill="currentColor" font-size="11">']
    if title:
        parts.append(f'<text x="0" y="11" font-weight="600">{escape(title)}</text>')
    parts.append(f'<text class="axis" x="0" y="{top - 9:g}">{escape(_words(figure["y"]))}</text>')
    for value, label in y.ticks:
        parts.append(
            f'<path d="M{left:.1f} {y(value):.1f}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity=".14"/>'
            f'<text x="{left - 6:.1f}" y="{y(value) + 3.8:.1f}" text-anchor="end">{escape(label)}</text>'
        )
    room = (x.end - x.start) / max(1, len(x.ticks)) if is_named else 0.0
    for value, label in x.ticks:
        lines = _wrapped(label, room) if is_named else [label]
        for i, line in enumerate(lines):
            parts.append(
                f'<text x="{x(value):.1f}" y="{floor + 15 + LINE * i:.1f}" text-anchor="middle">{escape(line)}</text>'
            )
        if not is_named:
            parts.append(f'<path d="M{x(value):.1f} {floor:g}v4" stroke="currentColor" stroke-opacity=".5"/>')
    parts.append(f'<path d="M{left:.1f} {floor:g}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity=".5"/>')
    named = escape(_words(figure["x"]))
    parts.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{named}</text></g>')
    return "".join(parts)


def _wrapped(label: str, room: float) -> list[str]:
    """A label on at most two lines, cut where it does not fit."""
    fits = max(3, int(room / CHARACTER))
    if len(label) <= fits:
        return [label]
    head, tail = label[:fits], label[fits:]
    broken = max(label.rfind(mark, 0, fits + 1) for mark in " -_/")
    if broken > 0:
        head, tail = label[: broken + 1].rstrip(), label[broken + 1 :]
    return [head, tail if len(tail) <= fits else f"{tail[: fits - 1]}…"]


# --------------------------------------------------------------------------------------------------------------------
# Series


def _curve(
    figure: Mapping[str, Any], number: int, name: Any, points: Sequence[Point], at: Callable[[Any], float], y: Axis
) -> str:
    if y.is_log:
        points = [point for point in points if point[1] > 0]
    if not points:
        return ""
    parts = [f'<g class="s{number % COLOURS}" fill="currentColor">']
    band = [point for point in points if point[2] is not None]
    if len(band) > 1 and figure["kind"] == "line":
        upper = [f"{at(point[0]):.1f} {y(point[3]):.1f}" for point in band]
        lower = [f"{at(point[0]):.1f} {y(point[2]):.1f}" for point in reversed(band)]
        parts.append(f'<path d="M{"L".join(upper + lower)}z" fill-opacity=".13"/>')
    if figure["kind"] == "line" and len(points) > 1:
        path = "L".join(f"{at(point[0]):.1f} {y(point[1]):.1f}" for point in points)
        parts.append(_line(f"M{path}", number, is_dashed=len(points) > MANY))
    if len(points) <= MANY or figure["kind"] == "scatter":
        for point in points:
            place = f"{at(point[0]):.1f} {y(point[1]):.1f}"
            parts.append(
                f'<path d="{_marker(number)}" transform="translate({place})"><title>{_told(name, point)}</title></path>'
            )
    return "".join([*parts, "</g>"])


def _bars(
    figure: Mapping[str, Any], shown: Sequence[tuple[int, Any, Sequence[Point]]], places: list[str], x: Axis, y: Axis
) -> list[str]:
    standing: list[list[int]] = [[] for _ in places]  # which series have a bar at each place
    for number, _, points in shown:
        for point in points:
            standing[places.index(_text(point[0]))].append(number)
    slot = (x.end - x.start) / len(places)
    width = min(46.0, 0.8 * slot / max(1, *map(len, standing)))
    base = y(y.low if y.is_log else 0.0)
    parts = []
    for number, name, points in shown:
        parts.append(f'<g class="s{number % COLOURS}" fill="currentColor">')
        for point in points:
            place = places.index(_text(point[0]))
            rank = standing[place].index(number) - (len(standing[place]) - 1) / 2
            centre, end = x(place) + rank * width, y(point[1])
            parts.append(
                f'<rect x="{centre - 0.44 * width:.1f}" y="{min(base, end):.1f}" width="{0.88 * width:.1f}" '
                f'height="{max(0.8, abs(base - end)):.1f}" fill-opacity=".82">'
                f"<title>{_told(name, point)}</title></rect>"
            )
            if point[2] is not None:
                parts.append(
                    f'<path class="whisker" d="M{centre:.1f} {y(point[2]):.1f}V{y(point[3]):.1f}" stroke-width="1.3"/>'
                )
        parts.append("</g>")
    return parts


def _legend(figure: Mapping[str, Any], names: Sequence[Any]) -> str:
    is_curve = figure["kind"] == "line"
    many = max(len(series["points"]) for series in figure["series"]) > MANY
    items = []
    for number, name in enumerate(names):
        if figure["kind"] == "bars":
            sign = '<rect x="7" y="1" width="10" height="10" fill-opacity=".82"/>'
        else:
            sign = _line("M0 6h24", number, is_dashed=many) if is_curve else ""
            sign += "" if many and is_curve else f'<path d="{_marker(number)}" transform="translate(12 6)"/>'
        items.append(
            f'<li><svg class="s{number % COLOURS}" viewBox="0 0 24 12" width="24" height="12" fill="currentColor" '
            f'aria-hidden="true">{sign}</svg>{escape(_text(name))}</li>'
        )
    if any(isinstance(name, int | float) for name in names):  # numbers say nothing without what they count
        items.insert(0, f"<li>{escape(_words(figure['by']))}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _line(path: str, number: int, *, is_dashed: bool) -> str:
    dash = DASHES[number % len(DASHES)] if is_dashed else ""
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="1.7" stroke-linejoin="round"{dashed}/>'


def _marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


# --------------------------------------------------------------------------------------------------------------------
# Words


def _told(name: Any, point: Point) -> str:
    """What a pointer resting on a point shows."""
    whose = f"{_text(name)}, " if name is not None else ""
    between = f" ({_label(point[2])} to {_label(point[3])})" if point[2] is not None else ""
    return escape(f"{whose}{_text(point[0])}: {_label(point[1])}{between}")


def _text(value: Any) -> str:
    return _label(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _label(value: float) -> str:
    text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e6 else f"{value:.4g}"
    return text.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace("-", "−")


def _power(exponent: int) -> str:
    """Of ten."""
    return ("1", "10")[exponent] if exponent in (0, 1) else f"10{str(exponent).translate(SUPERSCRIPTS)}"


def _words(name: Any) -> str:
    return str(name).replace("_", " ")
