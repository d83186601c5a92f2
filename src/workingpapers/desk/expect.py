"""Expectations: what must come out of a claim's table, judged with its uncertainty.

The unit of replication is the seed (of a benchmark: the round). Whatever varies inside a seed (cells, rows of a curve)
is averaged first, so that many cells per seed do not fake certainty; the interval is Student's t over the seeds, whose
coverage is exact for normal means at any number of seeds and, unlike a percentile bootstrap's, stays close to nominal
at five. Below `MIN_REPLICATES` seeds every judgement that needs an interval is `inconclusive`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["holds", "inconclusive", "fails", "crashed"]
SEVERITY: dict[Verdict, int] = {"holds": 0, "inconclusive": 1, "fails": 2, "crashed": 3}

CONFIDENCE = 0.95
MIN_REPLICATES = 5


@dataclass(frozen=True)
class Judgement:
    """What one comparison came to.

    Attributes
    ----------
    expectation : the comparison in words.
    measured : the estimate (a difference, a ratio, a slope, the worst row), or None when nothing was measured.
    interval : of the estimate; 95 %, wider where several comparisons share the error. None for exact statements.
    threshold : what the estimate is held against, (low, high) for a region.
    verdict : holds, inconclusive or fails.
    replicates : how many seeds (rounds) stand behind the interval; for exact statements, rows.
    note : what else a reader should know.
    """

    expectation: str
    measured: float | None
    interval: tuple[float, float] | None
    threshold: float | tuple[float, float] | None
    verdict: Verdict
    replicates: int
    note: str = ""


@dataclass(frozen=True)
class Table:
    """The rows of a claim: one column per axis and per metric, and `cell`, the row's cell.

    Attributes
    ----------
    frame : a data frame.
    axes : which columns are the grid's.
    """

    frame: pd.DataFrame
    axes: tuple[str, ...]

    @property
    def contest(self) -> str:
        """The axis along which methods compete."""
        return "contender" if "contender" in self.axes else "method"

    @property
    def replicate(self) -> str | None:
        """The axis that is the unit of replication."""
        return next((axis for axis in ("seed", "round") if axis in self.axes), None)

    def where(self, conditions: Mapping[str, Any]) -> Table:
        """The rows with these values; "last" and "first" choose a column's largest and smallest value in each cell."""
        frame = self.frame
        for column, wanted in conditions.items():
            _require_column(frame, column)
            if isinstance(wanted, str) and wanted in ("last", "first"):
                extreme = frame.groupby("cell")[column].transform("max" if wanted == "last" else "min")
                frame = frame[frame[column] == extreme]
            else:
                frame = frame[frame[column].isin(wanted if isinstance(wanted, list | tuple) else [wanted])]
        return Table(frame, self.axes)

    def of(self, name: str | None) -> pd.DataFrame:
        """The rows of one method; all rows for None."""
        if name is None:
            return self.frame
        _require_column(self.frame, self.contest)
        return self.frame[self.frame[self.contest] == name]

    def split(self, each: Sequence[str]) -> Iterator[tuple[str, Table]]:
        """One table per combination of values of `each`, with its label."""
        if not each:
            yield "", self
            return
        for column in each:
            _require_column(self.frame, column)
        for values, rows in self.frame.groupby(list(each), sort=True):
            label = ", ".join(f"{column} = {value}" for column, value in zip(each, values, strict=True))
            yield f" at {label}", Table(rows, self.axes)


class Expectation(ABC):
    """Turns a claim's table into judgements."""

    @abstractmethod
    def judge(self, table: Table) -> list[Judgement]:
        """One judgement per comparison."""


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of the whole; nothing at all is `inconclusive`."""
    return max(verdicts, key=SEVERITY.__getitem__, default="inconclusive")


# --------------------------------------------------------------------------------------------------------------------
# Comparisons


@dataclass(frozen=True)
class Comparison(Expectation):
    """`metric` of one method against baselines or constants, paired over seeds. See `lower` and `higher`."""

    metric: str
    ours: str
    than: tuple[str | float, ...]
    sign: Literal[-1, 1]  # -1: lower is expected, +1: higher
    margin: float = 0.0
    factor: float | None = None
    each: tuple[str, ...] = ()
    where: Mapping[str, Any] = field(default_factory=dict)
    paired_by: tuple[str, ...] | None = None

    def judge(self, table: Table) -> list[Judgement]:
        contests = [
            (label, other, self._differences(part, other))
            for label, part in table.where(self.where).split(self.each)
            for other in self.than
        ]
        intervals = _holm_intervals([found for _, _, found in contests], self._null)
        return [
            self._judgement(label, other, found, interval)
            for (label, other, found), interval in zip(contests, intervals, strict=True)
        ] or [
            Judgement(self._words("", self.than[0]), None, None, self._shown(self._null), "inconclusive", 0, "no rows")
        ]

    @property
    def _null(self) -> float:
        """The difference (of logarithms, where a factor is given) that the interval must exclude."""
        return self.margin if self.factor is None else math.log(self.factor)

    def _differences(self, table: Table, other: str | float) -> _Sample:
        """Ours minus the other, one number per seed."""
        replicate = table.replicate
        if replicate is None:
            return _Sample((), "the grid has no axis 'seed': nothing to form an interval from")
        pairing = list(self.paired_by) if self.paired_by is not None else [a for a in table.axes if a != table.contest]
        if replicate not in pairing:
            pairing.append(replicate)
        ours = self._means(table.of(self.ours), pairing)
        if isinstance(other, str):
            theirs = self._means(table.of(other), pairing)
        else:
            theirs = ours * 0 + (math.log(other) if self.factor is not None else other)
        if not len(ours) or not len(theirs):
            return _Sample((), f"no rows of {self.ours if not len(ours) else other}")
        admissible = "finite" if self.factor is None else "positive and finite"
        if not _all_finite(ours):
            return _Sample((), f"{self.metric} of {self.ours} is not {admissible}", hopeless=True)
        if not _all_finite(theirs):
            return _Sample((), f"{self.metric} of {other} is not {admissible}")
        difference = (ours - theirs).dropna()  # NaN now only where one side has no such cell
        per_seed = difference.groupby(level=replicate).mean()
        lost = len(ours.index.union(theirs.index)) - len(difference)
        return _Sample(tuple(per_seed), f"{lost} cells without a partner left out" if lost else "")

    def _means(self, rows: pd.DataFrame, pairing: list[str]) -> pd.Series[float]:
        import numpy as np

        _require_column(rows, self.metric)
        values = rows[self.metric].astype(float)
        if self.factor is not None:
            values = np.log(values.where(values > 0))
        # a NaN must surface, so it is not skipped
        return values.groupby([rows[axis] for axis in pairing]).agg(lambda group: group.mean(skipna=False))

    def _judgement(
        self, label: str, other: str | float, found: _Sample, interval: tuple[float, float] | None
    ) -> Judgement:
        words, threshold = self._words(label, other), self._shown(self._null)
        if interval is None:
            verdict: Verdict = "fails" if found.hopeless else "inconclusive"
            measured = self._shown(found.mean) if found.values else None
            note = found.note or f"{len(found.values)} seeds are too few, {MIN_REPLICATES} are needed"
            return Judgement(words, measured, None, threshold, verdict, len(found.values), note)
        low, high = interval
        if self.sign < 0:
            verdict = "holds" if high < self._null else "fails" if low >= self._null else "inconclusive"
        else:
            verdict = "holds" if low > self._null else "fails" if high <= self._null else "inconclusive"
        shown = sorted((self._shown(low), self._shown(high)))
        return Judgement(
            words, self._shown(found.mean), (shown[0], shown[1]), threshold, verdict, len(found.values), found.note
        )

    def _shown(self, difference: float) -> float:
        return difference if self.factor is None else math.exp(difference)

    def _words(self, label: str, other: str | float) -> str:
        direction = "below" if self.sign < 0 else "above"
        against = f"{other:g}" if isinstance(other, int | float) else other
        if self.factor is not None:
            times = "" if self.factor == 1 else f"{self.factor:g} times "
            return f"{self.metric} of {self.ours} {direction} {times}that of {against}{label} (ratio)"
        by = "" if self.margin == 0 else f", margin {self.margin:+g}"
        return f"{self.metric} of {self.ours} {direction} {against}{label}{by} (difference)"


@dataclass(frozen=True)
class Faster(Comparison):
    """A comparison of costs, reported as a speed-up. See `faster`."""

    def _shown(self, difference: float) -> float:
        return math.exp(-difference)

    def _words(self, label: str, other: str | float) -> str:
        assert self.factor is not None
        demand = "faster than" if self.factor == 1 else f"at least {1 / self.factor:g} times as fast as"
        return f"{self.ours} {demand} {other}{label} (speed-up)"


def lower(
    metric: str,
    ours: str,
    *,
    than: str | float | Sequence[str | float],
    margin: float = 0.0,
    factor: float | None = None,
    each: str | Sequence[str] = (),
    where: Mapping[str, Any] | None = None,
    paired_by: Sequence[str] | None = None,
) -> Expectation:
    """Expect `metric` of `ours` to be lower than that of every baseline.

    The differences are paired over the other axes, averaged within a seed, and held against `margin` by Student's
    t interval over the seeds, with Holm's correction over all the comparisons of this expectation.

    Parameters
    ----------
    metric : a column of the measurement.
    ours : a value of the axis "method" (in a benchmark, "contender").
    than : names of baselines, or constants.
    margin : ours - theirs must be below it: +1 allows at most 1 worse, -1 demands 1 better.
    factor : judge the ratio instead (positive metrics): ours < factor * theirs, in logarithms.
    each : axes for whose every value this must hold by itself.
    where : which rows count; {"iteration": "last"} takes the end of a curve.
    paired_by : axes over which to pair; all but the method by default.
    """
    return Comparison(
        metric, ours, _names(than), -1, margin, factor, _strings(each), dict(where or {}), _paired(paired_by)
    )


def higher(
    metric: str,
    ours: str,
    *,
    than: str | float | Sequence[str | float],
    margin: float = 0.0,
    factor: float | None = None,
    each: str | Sequence[str] = (),
    where: Mapping[str, Any] | None = None,
    paired_by: Sequence[str] | None = None,
) -> Expectation:
    """Expect `metric` of `ours` to be higher than that of every baseline: ours - theirs > margin. See `lower`."""
    return Comparison(
        metric, ours, _names(than), +1, margin, factor, _strings(each), dict(where or {}), _paired(paired_by)
    )


def faster(
    ours: str,
    *,
    than: str | Sequence[str],
    by: float = 1.0,
    each: str | Sequence[str] = (),
    where: Mapping[str, Any] | None = None,
    metric: str = "seconds",
) -> Expectation:
    """Expect `ours` to take less than 1/`by` of the time of every contender: a geometric-mean speed-up above `by`."""
    return Faster(metric, ours, _names(than), -1, 0.0, 1.0 / by, _strings(each), dict(where or {}))


# --------------------------------------------------------------------------------------------------------------------
# Slopes


@dataclass(frozen=True)
class Slope(Expectation):
    """Exponent of a power law. See `slope`."""

    metric: str
    over: str
    ours: str | None
    region: tuple[float, float]
    each: tuple[str, ...]
    where: Mapping[str, Any]

    def judge(self, table: Table) -> list[Judgement]:
        return [self._judgement(label, part) for label, part in table.where(self.where).split(self.each)] or [
            Judgement(self._words(""), None, None, self.region, "inconclusive", 0, "no rows")
        ]

    def _judgement(self, label: str, table: Table) -> Judgement:
        import numpy as np

        rows, words = table.of(self.ours), self._words(label)
        for column in (self.metric, self.over):
            _require_column(rows, column)
        positive = (rows[self.metric] > 0) & (rows[self.over] > 0) & np.isfinite(rows[self.metric].astype(float))
        note = "" if positive.all() else f"{int((~positive).sum())} rows are not positive and finite"
        rows = rows[positive]
        replicate = table.replicate
        groups = [group for _, group in rows.groupby(replicate)] if replicate is not None else [rows]
        fits = [_power_law(group, self.over, self.metric) for group in groups]
        exponents = [fit for fit in fits if fit is not None]
        sample = _Sample(tuple(exponents), note)
        interval = t_interval(sample.values, CONFIDENCE)
        if interval is None:
            note = note or f"{len(exponents)} seeds are too few, {MIN_REPLICATES} are needed"
            measured = sample.mean if exponents else None
            return Judgement(words, measured, None, self.region, "inconclusive", len(exponents), note)
        low, high = interval
        inside = self.region[0] <= low and high <= self.region[1]
        outside = high < self.region[0] or low > self.region[1]
        verdict: Verdict = "holds" if inside and not note else "fails" if outside else "inconclusive"
        return Judgement(words, sample.mean, interval, self.region, verdict, len(exponents), note)

    def _words(self, label: str) -> str:
        whose = f" of {self.ours}" if self.ours is not None else ""
        low, high = self.region
        bound = f"at most {high:g}" if low == -math.inf else f"at least {low:g}" if high == math.inf else "in between"
        return f"{self.metric}{whose} grows over {self.over} with an exponent {bound}{label} (slope)"


def slope(
    metric: str,
    *,
    over: str,
    of: str | None = None,
    at_most: float = math.inf,
    at_least: float = -math.inf,
    each: str | Sequence[str] = (),
    where: Mapping[str, Any] | None = None,
) -> Expectation:
    """Expect metric ~ over^slope with the slope inside [at_least, at_most].

    Each seed (round) gives one least-squares slope in logarithms, after averaging equal values of `over`; the interval
    is Student's t over the seeds.

    Parameters
    ----------
    metric : a positive column.
    over : a positive axis or column with at least two values.
    of : the method or contender whose rows count; all rows by default.
    at_most, at_least : the exponent's range; at least one is finite.
    each, where : as in `lower`.
    """
    if at_least == -math.inf and at_most == math.inf:
        raise ValueError("slope needs at_most or at_least")
    return Slope(metric, over, of, (at_least, at_most), _strings(each), dict(where or {}))


# --------------------------------------------------------------------------------------------------------------------
# Exact statements


@dataclass(frozen=True)
class Exact(Expectation):
    """A statement about every row. See `always` and `close`."""

    metric: str
    ours: str | None
    low: float
    high: float
    where: Mapping[str, Any]

    def judge(self, table: Table) -> list[Judgement]:
        rows = table.where(self.where).of(self.ours)
        _require_column(rows, self.metric)
        if not len(rows):
            return [Judgement(self._words(), None, None, self._threshold, "inconclusive", 0, "no rows")]
        values = [float(value) for value in rows[self.metric]]
        broken = [value for value in values if not self.low <= value <= self.high]  # NaN is not inside
        excess = lambda value: math.inf if math.isnan(value) else max(self.low - value, value - self.high)  # noqa: E731
        note = f"broken in {len(broken)} of {len(values)} rows" if broken else ""
        verdict: Verdict = "fails" if broken else "holds"
        return [Judgement(self._words(), max(values, key=excess), None, self._threshold, verdict, len(values), note)]

    @property
    def _threshold(self) -> float | tuple[float, float]:
        if self.low == -math.inf:
            return self.high
        return self.low if self.high == math.inf else (self.low, self.high)

    def _words(self) -> str:
        whose = f" of {self.ours}" if self.ours is not None else ""
        if self.low == self.high == 1.0:
            return f"{self.metric}{whose} on every row"
        low = "" if self.low == -math.inf else f" at least {self.low:g}"
        high = "" if self.high == math.inf else f" at most {self.high:g}"
        return f"{self.metric}{whose}{low}{' and' if low and high else ''}{high} on every row"


@dataclass(frozen=True)
class Close(Expectation):
    """Two numbers that must agree on every row. See `close`."""

    metric: str
    to: str | float
    atol: float
    rtol: float
    ours: str | None
    where: Mapping[str, Any]

    def judge(self, table: Table) -> list[Judgement]:
        rows = table.where(self.where).of(self.ours)
        _require_column(rows, self.metric)
        against = f"{self.to:g}" if isinstance(self.to, int | float) else self.to
        whose = f" of {self.ours}" if self.ours is not None else ""
        words = f"{self.metric}{whose} equals {against} within {self.atol:g} + {self.rtol:g} |{against}| on every row"
        if not len(rows):
            return [Judgement(words, None, None, 1.0, "inconclusive", 0, "no rows")]
        if isinstance(self.to, str):
            _require_column(rows, self.to)
        wanted = rows[self.to].astype(float) if isinstance(self.to, str) else self.to
        error = (rows[self.metric].astype(float) - wanted).abs()
        excess = error - self.atol - self.rtol * abs(wanted)
        broken = int((~(excess <= 0)).sum())
        worst_row = excess.fillna(math.inf).argmax()
        note = f"broken in {broken} of {len(rows)} rows" if broken else ""
        allowed = float((error - excess).iloc[worst_row])
        measured = float(error.iloc[worst_row])
        return [Judgement(words, measured, None, allowed, "fails" if broken else "holds", len(rows), note)]


def always(
    metric: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    of: str | None = None,
    where: Mapping[str, Any] | None = None,
) -> Expectation:
    """Expect at_least <= metric <= at_most on every row; without bounds, expect the column to be true."""
    if at_most is None and at_least is None:
        at_least = at_most = 1.0
    low = -math.inf if at_least is None else at_least
    return Exact(metric, of, low, math.inf if at_most is None else at_most, dict(where or {}))


def close(
    metric: str,
    to: str | float,
    *,
    atol: float = 0.0,
    rtol: float = 0.0,
    of: str | None = None,
    where: Mapping[str, Any] | None = None,
) -> Expectation:
    """Expect |metric - to| <= atol + rtol |to| on every row; `to` is a column or a constant."""
    if not (atol >= 0 and rtol >= 0 and atol + rtol > 0):
        raise ValueError(f"close needs a positive tolerance, got atol={atol!r}, rtol={rtol!r}")
    return Close(metric, to, atol, rtol, of, dict(where or {}))


# --------------------------------------------------------------------------------------------------------------------
# Statistics


@dataclass(frozen=True)
class _Sample:
    """One number per seed, or the reason why there is none."""

    values: tuple[float, ...]
    note: str = ""
    hopeless: bool = False  # ours is not finite: no number of seeds mends that

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


def t_interval(values: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """Student's t interval of the mean: mean -/+ t_{n-1} s / sqrt(n); None below `MIN_REPLICATES` values."""
    n = len(values)
    if n < MIN_REPLICATES:
        return None
    from scipy.special import stdtrit

    mean, deviation = _mean_and_deviation(values)
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * deviation / math.sqrt(n)
    return mean - half, mean + half


def _p_value(values: Sequence[float], null: float) -> float:
    """Two-sided p-value of the t test that the mean is `null`."""
    from scipy.special import stdtr

    mean, deviation = _mean_and_deviation(values)
    if deviation == 0:
        return 1.0 if mean == null else 0.0
    return float(2 * stdtr(len(values) - 1, -abs(mean - null) / (deviation / math.sqrt(len(values)))))


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _holm_intervals(samples: Sequence[_Sample], null: float) -> list[tuple[float, float] | None]:
    """Intervals whose levels follow Holm's step-down: the i-th smallest of m p-values has 1 - 0.05 / (m - i).

    From the first comparison that does not exclude `null` on, the level stays, so that a later one cannot pass either.
    """
    intervals: list[tuple[float, float] | None] = [None] * len(samples)
    usable = [i for i, sample in enumerate(samples) if len(sample.values) >= MIN_REPLICATES]
    level, stopped = 0.0, False
    for rank, i in enumerate(sorted(usable, key=lambda i: _p_value(samples[i].values, null))):
        if not stopped:
            level = (1 - CONFIDENCE) / (len(samples) - rank)
            stopped = _p_value(samples[i].values, null) > level
        intervals[i] = t_interval(samples[i].values, 1 - level)
    return intervals


def _power_law(rows: pd.DataFrame, over: str, metric: str) -> float | None:
    """Least-squares slope of log metric over log x, after averaging the logarithms at equal x."""
    import numpy as np

    mean_log = np.log(rows[metric].astype(float)).groupby(rows[over]).mean()
    if len(mean_log) < 2:
        return None
    x = np.log(mean_log.index.to_numpy(dtype=float))
    x = x - x.mean()
    return float(x @ mean_log.to_numpy() / (x @ x))


def _all_finite(values: Any) -> bool:
    import numpy as np

    return bool(np.isfinite(values.to_numpy(dtype=float)).all())


def _require_column(frame: pd.DataFrame, column: str) -> None:
    if column not in frame.columns:
        raise KeyError(f"the table has no column {column!r}; it has {', '.join(map(str, frame.columns))}")


def _names(than: str | float | Sequence[str | float]) -> tuple[str | float, ...]:
    return (than,) if isinstance(than, str | int | float) else tuple(than)


def _strings(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _paired(paired_by: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if paired_by is None else tuple(paired_by)
