"""The listing as a reader asks for it: filtered, searched, ordered, under its dates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from urllib.parse import urlencode

from workingpapers.desk.catalogue import FIELDS
from workingpapers.desk.expect import SEVERITY
from workingpapers.desk.page.content import Content, PaperContent, day_of_year
from workingpapers.desk.search import Hit, Span

LONGEST_QUERY = 200  # characters
SORTS = {"listed": "date listed", "trending": "trending", "evidence": "recent evidence", "title": "title"}
STATUSES = {"working": "working", "listed": "not working yet"}


@dataclass(frozen=True)
class Filters:
    """What stands in the address of a listing; "" leaves a filter open.

    Attributes
    ----------
    q : words to search for.
    field, status, listing : that a paper has.
    verdict : that at least one of its claims came to.
    sort : one of `SORTS`; "" is by date, or the best match first when there are words to search for.
    """

    q: str = ""
    field: str = ""
    verdict: str = ""
    status: str = ""
    listing: str = ""
    sort: str = ""

    @classmethod
    def of(cls, asked: Mapping[str, str], content: Content) -> Filters:
        """The filters in a query string; values that nothing has are left out."""
        dates = {date for date, _ in content.listings}
        legal: dict[str, Collection[str]] = {
            "field": FIELDS,
            "verdict": SEVERITY,
            "status": STATUSES,
            "listing": dates,
            "sort": SORTS,
        }
        found = {name: asked.get(name, "") for name in legal if asked.get(name, "") in legal[name]}
        return cls(q=asked.get("q", "").strip()[:LONGEST_QUERY], **found)

    @property
    def query(self) -> str:
        """The query string that asks for this listing, the shortest one."""
        return urlencode({name: value for name, value in asdict(self).items() if value})

    @property
    def narrows(self) -> bool:
        """Whether a filter besides the words leaves papers out."""
        return any(getattr(self, item.name) for item in fields(self) if item.name not in ("q", "sort"))

    def admit(self, page: PaperContent) -> bool:
        return (
            self.field in ("", page.paper.field)
            and self.status in ("", page.status)
            and (not self.listing or self.listing in page.paper.listings)
            and (not self.verdict or self.verdict in page.tally)
        )


@dataclass(frozen=True)
class Row:
    """A paper as the listing shows it.

    Attributes
    ----------
    page : None for a title that was imported and is not in the catalogue.
    text : its summary; what matched when that lies elsewhere.
    title_spans, text_spans : what matched.
    date, arxiv : of an imported title: its listing, and its identifier or "".
    """

    page: PaperContent | None
    title: str
    text: str
    title_spans: Sequence[Span] = ()
    text_spans: Sequence[Span] = ()
    date: str = ""
    arxiv: str = ""


@dataclass(frozen=True)
class Group:
    """Rows under a date, or under "" when they are not ordered by date."""

    date: str
    rows: Sequence[Row]


def arrange(
    content: Content, filters: Filters, *, hits: Sequence[Hit] = (), trending: Sequence[str] = ()
) -> list[Group]:
    """The papers that the filters admit.

    Parameters
    ----------
    hits : of `filters.q`, best first; not looked at without words.
    trending : slugs, the most trending first; the others follow by date.
    """
    if filters.q:
        rows = _found(content, filters, hits)
        if filters.sort:
            strangers = [row for row in rows if row.page is None]
            known = {row.page.paper.slug: row for row in rows if row.page is not None}
            ordered = _ordered([row.page for row in rows if row.page is not None], filters.sort, trending)
            rows = [known[page.paper.slug] for page in ordered] + strangers
        return [Group("", rows)] if rows else []
    if filters.sort in ("", "listed"):
        groups = [
            Group(date, [_row(page) for page in _working_first(members) if filters.admit(page)])
            for date, members in content.listings
            if filters.listing in ("", date)
        ]
        return [group for group in groups if group.rows]
    pages = _ordered([page for page in content.papers.values() if filters.admit(page)], filters.sort, trending)
    return [Group("", [_row(page) for page in pages])] if pages else []


def _found(content: Content, filters: Filters, hits: Sequence[Hit]) -> list[Row]:
    rows = []
    for hit in hits:
        page = content.papers.get(hit.slug)
        if page is not None and filters.admit(page):
            rows.append(Row(page, hit.title, hit.snippet, hit.title_spans, hit.snippet_spans))
        elif not hit.slug and not filters.narrows:
            rows.append(Row(None, hit.title, hit.snippet, hit.title_spans, hit.snippet_spans, hit.date, hit.arxiv))
    return rows


def _ordered(pages: list[PaperContent], sort: str, trending: Sequence[str]) -> list[PaperContent]:
    by_date = {page.paper.slug: i for i, page in enumerate(_by_date(pages))}
    match sort:
        case "title":
            return sorted(pages, key=lambda page: page.paper.title.casefold())
        case "evidence":
            pages = sorted(pages, key=lambda page: by_date[page.paper.slug])
            return sorted(pages, key=lambda page: page.recorded, reverse=True)
        case "trending":
            place = {slug: i for i, slug in enumerate(trending)}
            return sorted(pages, key=lambda page: (place.get(page.paper.slug, len(place)), by_date[page.paper.slug]))
    return sorted(pages, key=lambda page: by_date[page.paper.slug])


def _by_date(pages: Sequence[PaperContent]) -> list[PaperContent]:
    return sorted(_working_first(pages), key=lambda page: -max(map(day_of_year, page.paper.listings)))


def _working_first(pages: Sequence[PaperContent]) -> list[PaperContent]:
    return sorted(pages, key=lambda page: page.status != "working")


def _row(page: PaperContent) -> Row:
    return Row(page, page.paper.title, page.paper.summary)
