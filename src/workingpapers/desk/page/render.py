"""Templates, shared by the live page and the static site: one set of pages, two sets of addresses."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

import jinja2
from markupsafe import Markup, escape

from workingpapers.desk.catalogue import FIELDS, Paper
from workingpapers.desk.evidence import versions
from workingpapers.desk.expect import SEVERITY
from workingpapers.desk.figure import chart
from workingpapers.desk.page.assets import assets
from workingpapers.desk.page.content import Entry
from workingpapers.desk.page.usage import usage
from workingpapers.desk.reference import known
from workingpapers.desk.search import Span, emphasise

MARKS = {"holds": "✓ holds", "fails": "✗ fails", "inconclusive": "? can't be told", "crashed": "! crashed"}
GLYPHS = {verdict: mark[0] for verdict, mark in MARKS.items()}
FEW = 8  # comparisons of a claim that are all shown at once
TOKEN = secrets.token_hex(16)  # stands in rendered pages for the reader's token, so that pages can be kept; nobody
# can guess it, or a title could have the token put where it leaks


class Addresses(Protocol):
    """Where things are: `live(kind, *names)` for the server; the static site makes relative ones."""

    def __call__(self, kind: str, *names: str) -> str: ...


def live(kind: str, *names: str) -> str:
    """Addresses on the server.

    Parameters
    ----------
    kind : "home", "paper" (slug), "measurements" (slug, claim, scale, "csv" or "parquet"), "bibtex" (slug),
        "reference" (module, or none for the overview), "name" (module, name), "asset" (name), "feed" (field or none),
        "runs", "run" (id, or id and "state", "events" or "cancel"), "import", "subscribe", "confirm" (token),
        "unsubscribe" (token), "choices" (token), "about", "api", "star" (slug), "imported" (none, or date, or date and
        number of the page or "remove").
    """
    match kind, names:
        case "home", ():
            return "/"
        case "paper", (slug,):
            return f"/papers/{slug}"
        case "measurements", (slug, claim, scale, suffix):
            return f"/papers/{slug}/{claim}-{scale}.{suffix}"
        case "bibtex", (slug,):
            return f"/papers/{slug}.bib"
        case "reference", ():
            return "/reference"
        case "reference", (module,):
            return f"/reference/{module}"
        case "name", (module, name):
            return f"/reference/{module}#{name}"
        case "asset", (name,):
            return f"/assets/{name}?v={assets()[name].version}"
        case "feed", ():
            return "/feeds/all.atom"
        case "feed", (field,):
            return f"/feeds/{field}.atom"
        case "run", (number,):
            return f"/runs/{number}"
        case "run", (number, part):
            return f"/runs/{number}/{part}"
        case "asked", ():
            return "/subscribe/asked"
        case "confirm", (token,):
            return f"/subscribe/confirm/{token}"
        case "unsubscribe", (token,):
            return f"/unsubscribe/{token}"
        case "choices", (token,):
            return f"/unsubscribe/{token}/choices"
        case "api", ():
            return "/api/docs"
        case "star", (slug,):
            return f"/stars/{slug}"
        case "imported", ():
            return "/imported"
        case "imported", (date, *rest):  # a number of the page, or "remove"
            return "/".join(["/imported", date.replace(" ", "-"), *rest])
        case (("runs" | "import" | "subscribe" | "about"), ()):
            return f"/{kind}"
    raise ValueError(f"no address for {kind} {names}")


def environment(*, is_live: bool) -> jinja2.Environment:
    """Everything a template may use: filters, names of fields, marks of verdicts, and whether a server answers.

    A template also gets `url`, which depends on where its page lies, with every call of `render`.
    """
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("workingpapers.desk"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters.update(
        number=number,
        words=words,
        day=day,
        marked=marked,
        counted=counted,
        times=times,
        drawn=drawn,
        by_claim=by_claim,
        between=between,
        usage=usage,
        bibtex=bibtex,
        split_judgements=split_judgements,
    )
    made.filters["duration"] = duration
    made.globals.update(
        is_live=is_live,
        fields=FIELDS,
        marks=MARKS,
        glyphs=GLYPHS,
        known=known,
        token=TOKEN if is_live else "",
        version=versions().get("workingpapers", ""),
    )
    return made


class Renderer:
    """Turns a template and what it shows into a page."""

    def __init__(self, *, is_live: bool) -> None:
        self._environment = environment(is_live=is_live)

    def __call__(self, template: str, /, *, url: Addresses | Callable[..., str] = live, **shown: Any) -> str:
        return self._environment.get_template(template).render({"url": url, **shown})

    def block(self, template: str, block: str, /, shown: Mapping[str, Any]) -> str:
        """One block of a template, for htmx to put in place."""
        found = self._environment.get_template(template)
        context = found.new_context({"url": live, **shown})
        return "".join(found.blocks[block](context))


def number(value: float | str | bool | None) -> str:
    """Four significant digits, with a real minus sign; a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e6 else f"{value:.4g}"
    return re.sub(r"e([+-])0*(\d+)", lambda m: f"e{'-' if m[1] == '-' else ''}{m[2]}", text).replace("-", "−")


def words(name: str) -> str:
    """A Python name as words."""
    return name.replace("_", " ")


def day(stamp: str) -> str:
    """`21 Nov 2026` of an ISO time."""
    return f"{datetime.fromisoformat(stamp):%-d %b %Y}" if stamp else ""


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def marked(text: str, spans: Iterable[Span]) -> Markup:
    """The text, escaped, with every span in a `<mark>`."""
    return Markup(emphasise(text, spans, "<mark>", "</mark>", lambda piece: str(escape(piece))))


def counted(verdict: str, count: int) -> str:
    """How many claims came to a verdict: `1 holds`, `3 hold`, `2 open`."""
    if verdict in ("holds", "fails"):
        return f"{count} {verdict if count == 1 else verdict[:-1]}"
    return f"{count} {'open' if verdict == 'inconclusive' else verdict}"


def times(speed: tuple[float, float]) -> str:
    """A range of speed-ups: `1.2× to 31×`."""
    low, high = (f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in speed)
    return f"{low}×" if low == high else f"{low}× to {high}×"


def drawn(entry: Entry) -> Markup:
    """The figure of a claim, "" when it has none."""
    if not entry.get("figure"):
        return Markup("")
    # safe: `chart` escapes every text it writes
    return Markup(chart(entry["figure"]))


def by_claim(entries: Sequence[Entry], kind: str) -> list[list[Entry]]:
    """The entries of a kind, one list for each claim, in the order they come."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry["kind"] == kind:
            found.setdefault(entry["claim"], []).append(entry)
    return list(found.values())


def between(bounds: float | Sequence[float | None] | None) -> str:
    """`1.2 to 3`, `at most 3`, or the one number there is."""
    if bounds is None or isinstance(bounds, int | float):
        return number(bounds)
    low, high = bounds
    if low is None or high is None:
        return f"at least {number(low)}" if high is None else f"at most {number(high)}"
    return f"{number(low)} to {number(high)}"


def bibtex(paper: Paper) -> str:
    """The paper's entry for a bibliography."""
    from workingpapers.desk.page import exports  # which needs the pages, which need this

    return exports.bibtex(paper)


def split_judgements(judgements: Sequence[Entry]) -> tuple[Sequence[Entry], Sequence[Entry]]:
    """All of them where they are few; else the worst, and the others."""
    if len(judgements) <= FEW:
        return judgements, ()
    ranked = sorted(judgements, key=lambda judgement: -SEVERITY[judgement["verdict"]])
    return ranked[: FEW - 2], ranked[FEW - 2 :]
