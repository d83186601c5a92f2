"""What recorded evidence and the answers under /api look like: pages may trust what has passed these models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, model_validator

from workingpapers.desk.catalogue import Status
from workingpapers.desk.claim import Scale
from workingpapers.desk.expect import Verdict

Number = FiniteFloat | None  # JSON has no NaN: what could not be measured is null
Value = bool | int | FiniteFloat | str | None  # of an axis
Moments = Annotated[tuple[Number, Number], Field(description="mean and standard deviation")]
Point = Annotated[
    tuple[Value, Number | bool, Number, Number], Field(description="x, y and the ends of the 95 % interval of y")
]


class Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class Judged(Model):
    """One comparison of a claim."""

    expectation: str = Field(description="what was expected, in words")
    measured: Number
    interval: tuple[Number, Number] | None = Field(description="of what was measured; null for exact statements")
    threshold: FiniteFloat | tuple[Number, Number] | None = Field(description="or a region, null for an open end")
    verdict: Verdict
    replicates: int = Field(ge=0, description="seeds, rounds or rows behind the judgement")
    note: str


class Crash(Model):
    """A cell that could not be measured."""

    cell: dict[str, JsonValue]
    error: str


class Measurements(Model):
    """Every grid point: the values of the axes, mean and standard deviation of each metric, and n."""

    axes: list[str]
    metrics: list[str]
    rows: list[list[Moments | Value]]

    @model_validator(mode="after")
    def _rectangular(self) -> Measurements:
        axes, metrics = len(self.axes), len(self.metrics)
        for row in self.rows:
            moments = [isinstance(value, tuple) for value in row]
            if moments != [False] * axes + [True] * metrics + [False] or not isinstance(row[-1], int):
                raise ValueError(f"a row must hold {axes} axes, {metrics} metrics and n")
        return self


class Series(Model):
    """One line of a figure."""

    panel: Value
    name: Value
    points: list[Point]


class Figure(Model):
    """What the figure of a claim shows."""

    kind: Literal["line", "bars", "scatter"]
    x: str
    y: str
    by: str
    log: Literal["", "x", "y", "xy"] = Field(description="logarithmic axes")
    each: str | None = Field(description="one panel per value of this column")
    series: list[Series]


class Recorded(Model):
    """One claim or benchmark at one scale, as it was recorded."""

    paper: str
    claim: str = Field(pattern=r"^[A-Za-z_]\w*$")
    kind: Literal["claim", "benchmark"]
    says: str
    published: str
    scale: Scale
    seed: int = Field(description="the first of the consecutive seeds")
    verdict: Verdict
    expectations: list[Judged]
    cells: int
    crashed: list[Crash]
    seconds: FiniteFloat
    recorded: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", description="ISO 8601")
    device: str
    versions: dict[str, str]
    fingerprint: str = Field(description="of the source that was measured")
    measurements: Measurements
    figure: Figure | None = None


# --------------------------------------------------------------------------------------------------------------------
# Answers


class Listed(Model):
    """What the listing shows of a paper."""

    slug: str
    title: str
    summary: str
    field: str
    module: str = Field(description="below workingpapers")
    names: list[str] = Field(description="public names of the method")
    status: Status
    listings: list[str] = Field(description="dates, which carry no year")
    arxiv: str
    code: str = Field(description="the authors' repository on GitHub, or empty")
    scale: Scale | None = Field(description="of the evidence that speaks for the paper")
    verdict: Verdict | None = Field(description="the worst of its claims")
    tally: dict[Verdict, int] = Field(description="how many claims came to each verdict")
    speed: tuple[FiniteFloat, FiniteFloat] | None = Field(description="range of speed-ups over the best peers")
    recorded: str = Field(description="when the youngest evidence was recorded, ISO 8601, or empty")
    stale: bool = Field(description="whether the source has changed since")
    unreadable: bool = Field(description="whether there is evidence that cannot be read")
    page: str = Field(description="address of its page")
    api: str = Field(description="address of everything about it")


class Shown(Recorded):
    """One claim or benchmark at one scale, and where its measurements can be downloaded."""

    stale: bool = Field(description="whether the source has changed since it was recorded")
    csv: str
    parquet: str


class NearPaper(Model):
    """A paper that is like another one."""

    slug: str
    title: str
    status: Status
    similarity: float = Field(ge=0, le=1 + 1e-9)
    api: str


class Whole(Listed):
    """Everything the page of a paper shows."""

    note: str
    use: str = Field(description="lines of Python that use the method, empty while it does not work")
    check: list[str] = Field(description="commands that check claims and measure cost, none while it does not work")
    evidence: list[Shown] = Field(description="claims and benchmarks, those that speak for the paper first")
    nearest: list[NearPaper]
    bibtex: str
    reference: str = Field(description="address of its reference")


class PaperList(Model):
    """Papers in the order of the catalogue."""

    count: int
    papers: list[Listed]


class OneListing(Model):
    """The papers of one date."""

    date: str
    count: int
    working: int
    slugs: list[str]
    api: str


class ListingList(Model):
    """All listings, newest first."""

    listings: list[OneListing]


class OneField(Model):
    """The papers of one field."""

    field: str
    name: str
    count: int
    working: int
    slugs: list[str]
    api: str


class FieldList(Model):
    """All fields, also those without papers."""

    fields: list[OneField]


class Token(Model):
    """What a request that changes something must carry, together with the cookie of this answer."""

    header: str
    token: str


class Root(Model):
    """Where to go from here."""

    name: str
    version: str
    openapi: str
    docs: str
    links: list[str] = Field(description="what can be read without naming anything")


class Refused(Model):
    """Why nothing came of a request."""

    detail: str


class Problem(Model):
    """What is wrong with a part of a request."""

    where: list[str]
    problem: str


class Invalid(Model):
    """What is wrong with a request."""

    detail: list[Problem] | str
