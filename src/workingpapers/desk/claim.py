"""The words in which a paper's claims are written.

A claim is a grid, a measurement and expectations. Data flows one way: grid -> measurement of each cell -> table ->
expectations -> verdict. The measurement is a pure function of its cell: it may run in any order, in another process,
on another machine, and again with the same result.

    @claim(
        paper="colide",
        says="CoLiDE recovers more of the graph than DAGMA when the noise is small.",
        published="what the paper reports, with its numbers",
        grid={
            "variance": [0.1, 1.0],
            "seed": seeds(smoke=5, laptop=16, paper=10),
            "method": ["CoLiDE-EV", "DAGMA"],
        },
        expect=[lower("shd", "CoLiDE-EV", than="DAGMA", each="variance")],
        plot=line(x="variance", y="shd", by="method", log="x"),
    )
    def small_noise(cell: Cell) -> Row:
        truth, data = simulate_linear_sem(30, variance=cell.variance, random_state=cell.seed)
        with cell.timed():
            estimate = METHODS[cell.method]().fit(data)
        return {"shd": dag_metrics(truth, estimate.adjacency_).shd}
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from workingpapers.desk.artifact import artifact
from workingpapers.desk.expect import Expectation, always, close, faster, higher, lower, slope
from workingpapers.desk.plot import Plot, bars, line, scatter

__all__ = [
    "SCALES",
    "Cell",
    "Claim",
    "Expectation",
    "Plot",
    "Row",
    "Scale",
    "Value",
    "always",
    "artifact",
    "bars",
    "benchmark",
    "claim",
    "close",
    "faster",
    "higher",
    "line",
    "lower",
    "scales",
    "scatter",
    "seeds",
    "slope",
]

Scale = Literal["smoke", "laptop", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)

Value = str | int | float | bool
Row = dict[str, Any]  # metric name -> number, truth value or short text


class Cell:
    """One point of a grid: `cell.nodes`, `cell.seed`, `cell.method`, ... and a stopwatch."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self.values = dict(values)
        self.cost: dict[str, float] = {}

    def __getattr__(self, axis: str) -> Any:
        try:
            return self.__dict__["values"][axis]
        except KeyError:
            axes = ", ".join(self.__dict__.get("values", ()))
            raise AttributeError(f"this cell has no axis {axis!r}; it has {axes}") from None

    def __repr__(self) -> str:
        return f"Cell({', '.join(f'{axis}={value!r}' for axis, value in self.values.items())})"

    @property
    def key(self) -> str:
        """Canonical text of the values, equal for equal cells."""
        return json.dumps(self.values, sort_keys=True)

    @contextmanager
    def timed(self, calls: int = 1) -> Iterator[None]:
        """Add the cost of the block to every row: `seconds`, `cpu_seconds` (both per call) and `peak_bytes`.

        `peak_bytes` is the growth of the process's resident memory at its highest (on CUDA: of the device memory).
        Several blocks in one measurement add up their seconds and keep the larger peak.

        Parameters
        ----------
        calls : how many times the block does the work, where once is too quick to time.
        """
        cuda = _cuda()
        before = _start_peak(cuda)
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        if cuda is not None:
            cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = max(0.0, _peak(cuda) - before)
        self.cost = {
            "seconds": self.cost.get("seconds", 0.0) + wall / calls,
            "cpu_seconds": self.cost.get("cpu_seconds", 0.0) + cpu / calls,
            "peak_bytes": max(self.cost.get("peak_bytes", 0.0), peak),
        }


@dataclass(frozen=True)
class Scaled:
    """The values of an axis at each scale."""

    values: Mapping[Scale, Sequence[Value]]


@dataclass(frozen=True)
class Seeds:
    """How many consecutive seeds each scale uses."""

    counts: Mapping[Scale, int]


Axis = Sequence[Value] | Scaled | Seeds


def scales(*, smoke: Sequence[Value], laptop: Sequence[Value], paper: Sequence[Value] | None = None) -> Scaled:
    """An axis whose values depend on the scale; `paper` defaults to `laptop`."""
    return Scaled({"smoke": smoke, "laptop": laptop, "paper": laptop if paper is None else paper})


def seeds(*, smoke: int, laptop: int, paper: int | None = None) -> Seeds:
    """An axis of consecutive seeds, starting at the run's `--seed`; below five no interval is formed."""
    return Seeds({"smoke": smoke, "laptop": laptop, "paper": laptop if paper is None else paper})


@dataclass(frozen=True, eq=False)
class Claim:
    """What a paper says, how it is measured here, and what must come out.

    Attributes
    ----------
    name : of the measuring function.
    kind : "claim", or "benchmark" for claims about cost, whose contenders run in turn with nothing else running.
    rounds : of a benchmark, at each scale.
    only : keeps a cell of the product of the axes, or drops it.
    """

    name: str
    paper: str
    says: str
    published: str
    grid: Mapping[str, Axis]
    expect: Sequence[Expectation]
    measure: Callable[[Cell], Row | list[Row]]
    plot: Plot | None = None
    only: Callable[[Cell], bool] | None = None
    kind: Literal["claim", "benchmark"] = "claim"
    rounds: Mapping[Scale, int] | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        return (*self.grid, "round") if self.kind == "benchmark" else tuple(self.grid)

    def cells(self, scale: Scale, seed: int = 0) -> list[Cell]:
        """The cells of a scale, seeds counted from `seed`; a benchmark's contenders alternate within each round."""
        axes = {axis: _values_at(values, scale, seed) for axis, values in self.grid.items()}
        if self.kind == "claim":
            points = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
        else:
            assert self.rounds is not None
            contenders = axes.pop("contender")
            points = [
                {**dict(zip(axes, point, strict=True)), "contender": contender, "round": turn}
                for point in itertools.product(*axes.values())
                for turn in range(self.rounds[scale])
                for contender in (contenders if turn % 2 == 0 else contenders[::-1])
            ]
        cells = [Cell(point) for point in points]
        return [cell for cell in cells if self.only is None or self.only(cell)]

    def rows(self, cell: Cell) -> list[Row]:
        """Measure one cell: its rows, with the cost of what was timed."""
        cell = Cell(cell.values)
        measured = self.measure(cell)
        return [{**row, **cell.cost} for row in (measured if isinstance(measured, list) else [measured])]


def claim(
    *,
    paper: str,
    says: str,
    published: str,
    grid: Mapping[str, Axis],
    expect: Sequence[Expectation],
    plot: Plot | None = None,
    only: Callable[[Cell], bool] | None = None,
) -> Callable[[Callable[[Cell], Row | list[Row]]], Claim]:
    """Make a measurement a claim.

    Parameters
    ----------
    paper : its slug.
    says : the claim as this experiment tests it, one sentence.
    published : what the paper reports, with numbers.
    grid : axis name to its values, `scales(...)` or `seeds(...)`.
    expect : what must come out.
    plot : how to show it.
    only : drops cells of the product that make no sense together.
    """

    def decorate(measure: Callable[[Cell], Row | list[Row]]) -> Claim:
        return Claim(measure.__name__, paper, says, published, dict(grid), tuple(expect), measure, plot, only)

    return decorate


def benchmark(
    *,
    paper: str,
    grid: Mapping[str, Axis],
    expect: Sequence[Expectation],
    says: str = "Faster than the best peer.",
    published: str = "",
    plot: Plot | None = None,
    only: Callable[[Cell], bool] | None = None,
    rounds: Mapping[Scale, int] | None = None,
) -> Callable[[Callable[[Cell], Row | list[Row]]], Claim]:
    """Make a timed measurement a benchmark: one of the axes is `contender`.

    Contenders run in turn (A B, B A, ...) in one process with nothing else running, each after one untimed warm-up.
    `rounds` repeats this (default 5 at smoke, 7 at laptop and paper scale): the round is the unit of replication.
    """
    if "contender" not in grid:
        raise ValueError(f"a benchmark's grid must have an axis 'contender', got {', '.join(grid)}")
    turns = dict(rounds) if rounds is not None else {"smoke": 5, "laptop": 7, "paper": 7}

    def decorate(measure: Callable[[Cell], Row | list[Row]]) -> Claim:
        return Claim(
            measure.__name__,
            paper,
            says,
            published,
            dict(grid),
            tuple(expect),
            measure,
            plot,
            only,
            "benchmark",
            turns,  # type: ignore[arg-type]
        )

    return decorate


def _values_at(axis: Axis, scale: Scale, seed: int) -> Sequence[Value]:
    if isinstance(axis, Seeds):
        return range(seed, seed + axis.counts[scale])
    return axis.values[scale] if isinstance(axis, Scaled) else axis


def _cuda() -> Any:
    """torch.cuda, when torch is loaded and has a device in use."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


def _start_peak(cuda: Any) -> float:
    """Reset the peak and return the memory in use now, in bytes."""
    if cuda is not None:
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        return float(cuda.memory_allocated())
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: makes VmHWM start again from VmRSS
    return _peak(None)


def _peak(cuda: Any) -> float:
    if cuda is not None:
        return float(cuda.max_memory_allocated())
    try:
        status = Path("/proc/self/status").read_text()
        return float(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024
    except (OSError, IndexError):
        import resource

        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
