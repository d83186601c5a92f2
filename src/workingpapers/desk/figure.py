"""Draws the figure of a recorded claim as SVG whose lines and text take the colour of the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

# Okabe and Ito's palette, told apart by colour-blind readers; the orange and the blue first
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999", "#B8A800"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
INK = "#010203"  # a colour nothing else has, replaced by the page's own


def svg(figure: Mapping[str, Any]) -> str:
    """The figure of an evidence entry as an inline SVG element."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(series["panel"] for series in figure["series"]))
    names = list(dict.fromkeys(series["name"] for series in figure["series"]))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    drawing = Figure(figsize=(max(5.6, 3.3 * columns), 3.2 * lines + 0.1), layout="constrained")
    FigureCanvasSVG(drawing)
    grid = drawing.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        shown = [series for series in figure["series"] if series["panel"] == panel and series["points"]]
        if figure["kind"] == "bars":
            _bars(axes, figure, shown, names)
        else:
            _lines(axes, figure, shown, names)
        _dress(axes, figure, panel)
    handles, labels = next((found for axes in grid.flat if (found := axes.get_legend_handles_labels())[0]), ([], []))
    if len(names) > 1:
        columns = max(1, min(4, 64 // (8 + max(len(label) for label in labels))))  # as many as fit side by side
        drawing.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK, fontsize=9
        )
    return _written(drawing)


def _lines(axes: Any, figure: Mapping[str, Any], shown: list[Any], names: list[Any]) -> None:
    for series in shown:
        i = names.index(series["name"])
        colour = PALETTE[i % len(PALETTE)]
        points = [point for point in series["points"] if point[1] is not None]
        x, y = [point[0] for point in points], [point[1] for point in points]
        many = len(points) > 12
        style = "none" if figure["kind"] == "scatter" else "-"
        axes.plot(
            x, y, style, color=colour, marker=None if many else MARKERS[i % len(MARKERS)], markersize=4.5,
            linewidth=1.6, label=str(series["name"]),
        )  # fmt: skip
        band = [point for point in points if point[2] is not None]
        if band and figure["kind"] == "line":
            floor = min(value for value in y if value > 0) / 10 if "y" in figure["log"] and max(y) > 0 else None
            low = [point[2] if floor is None else max(point[2], floor) for point in band]
            axes.fill_between([p[0] for p in band], low, [p[3] for p in band], color=colour, alpha=0.16, linewidth=0)


def _bars(axes: Any, figure: Mapping[str, Any], shown: list[Any], names: list[Any]) -> None:
    places = list(dict.fromkeys(point[0] for series in shown for point in series["points"]))
    width = 0.8 / max(1, len(shown))
    for j, series in enumerate(shown):
        i = names.index(series["name"])
        points = [point for point in series["points"] if point[1] is not None]
        x = [places.index(point[0]) + (j - (len(shown) - 1) / 2) * width for point in points]
        y = [point[1] for point in points]
        whiskers = [
            [abs(value - (point[k] if point[k] is not None else value)) for value, point in zip(y, points, strict=True)]
            for k in (2, 3)
        ]
        axes.bar(
            x, y, width * 0.92, color=PALETTE[i % len(PALETTE)], label=str(series["name"]), yerr=whiskers,
            error_kw={"ecolor": INK, "elinewidth": 0.9, "alpha": 0.75},
        )  # fmt: skip
    axes.set_xticks(range(len(places)), [str(place) for place in places])


def _dress(axes: Any, figure: Mapping[str, Any], panel: Any) -> None:
    if "x" in figure["log"] and figure["kind"] != "bars":
        axes.set_xscale("log")
    if "y" in figure["log"]:
        axes.set_yscale("log")
    axes.set_xlabel(_words(figure["x"]), color=INK, fontsize=9.5)
    axes.set_ylabel(_words(figure["y"]), color=INK, fontsize=9.5)
    if panel is not None:
        axes.set_title(f"{_words(figure['each'])} = {panel}", color=INK, fontsize=9.5)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_alpha(0.45)


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _written(drawing: Any) -> str:
    import matplotlib as mpl

    out = io.StringIO()
    drawing.patch.set_alpha(0)
    # text stays text in the page's own font; a fixed salt makes equal figures equal files
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "workingpapers"}):
        drawing.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r"font-family: [^;\"]*", "font-family: inherit", re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    )
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would apply to the whole page
    root, rest = text.split(">", 1)
    root = re.sub(r' (width|height)="[^"]*"', "", root)  # the page sets the size, the viewBox the proportions
    return f'{root} role="img" stroke-linejoin="round">{rest}'
