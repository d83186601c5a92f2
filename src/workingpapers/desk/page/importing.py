"""Importing a Daily Papers page that a reader uploads or pastes.

What it holds comes from strangers. It is read in a process of its own, within bounds of size, time and memory; it is
shown as plain text, cut to a length; nothing of it is rendered, executed or followed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, NoReturn

from fastapi import APIRouter, Depends, File, Form, Path, Query, Request, UploadFile
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, RedirectResponse, Response

from workingpapers.desk.apart import parse_apart
from workingpapers.desk.listed import Listed, listed_dates, listed_on, remove_listing
from workingpapers.desk.listing import SIZE_LIMIT, ListingError, Match, import_listing, match
from workingpapers.desk.page.content import PaperContent
from workingpapers.desk.page.guard import Reader, sign
from workingpapers.desk.page.searching import Finder
from workingpapers.desk.page.site import Site, site_of
from workingpapers.desk.store import Store, StoreError
from workingpapers.desk.titles import plain

MOST_PAPERS = 1_000  # on one page; a real one has a hundred at most
LONGEST_PASTE = 1_000_000  # characters
HOUR, MONTH = 3600.0, 30 * 24 * 3600.0
PER_READER, PER_ALL = 30, 300  # imports within an hour; for a month the reader may remove them
PAGE = 50  # papers

router = APIRouter(include_in_schema=False)
api = APIRouter(prefix="/api", tags=["import"])
Here = Annotated[Site, Depends(site_of)]
Day = Annotated[str, Path(pattern=r"^[A-Z][a-z]{2}-[0-9]{1,2}$", description="A listing, such as `Mar-11`.")]
Upload = Annotated[UploadFile | None, File(description="A saved Daily Papers page: text, HTML or JSON, up to 20 MB.")]
Pasted = Annotated[str, Form(max_length=LONGEST_PASTE, description="Its text instead of a file.")]
Number = Annotated[int, Query(ge=1, le=10_000, description="Of the page, 50 papers each.")]
REFUSALS: dict[int | str, dict[str, Any]] = {status: {"description": said} for status, said in [
    (403, "The token is missing."), (409, "Another page is being read."), (413, "It is too large."),
    (422, "It is no Daily Papers page, or only a part of one."), (429, "There were too many imports in the last hour."),
]}  # fmt: skip


class Near(BaseModel):
    """A paper of the catalogue and how similar it is, between 0 and 1."""

    slug: str
    title: str
    similarity: float


class New(BaseModel):
    """A paper that the catalogue does not have, as plain text.

    Attributes
    ----------
    nearest : the most similar working methods; papers that do not work yet where none that works is similar.
    """

    title: str
    abstract: str
    arxiv: str
    nearest: list[Near]


class Imported(BaseModel):
    """What an import came to: the listing, how many papers were new to the store, those of the catalogue, the new."""

    date: str
    added: int
    known: list[str]
    new: list[New]


class Listing(BaseModel):
    """An imported listing and how many papers it brought that the catalogue does not have."""

    date: str
    papers: int


class Listings(BaseModel):
    """The imported listings, the last one first."""

    listings: list[Listing]


class Papers(BaseModel):
    """Some of the new papers of an imported listing."""

    date: str
    papers: int
    page: int
    pages: int
    new: list[New]


@router.api_route("/import", methods=["GET", "HEAD"])
async def form(request: Request, site: Here) -> HTMLResponse:
    return await site.page(request, "import", lambda: site.render("import.html", problem=""))


@router.post("/import")
def upload(request: Request, site: Here, reader: Reader, page: Upload = None, text: Pasted = "") -> HTMLResponse:
    try:
        imported = _import(site, reader, page, text)
    except HTTPException as refused:
        html = site.render("import.html", problem=refused.detail)
        return site.personal(request, html, status=refused.status_code)
    return site.personal(request, site.render("import_done.html", imported=imported, papers=site.content.papers))


@router.api_route("/imported", methods=["GET", "HEAD"])
def overview(request: Request, site: Here) -> HTMLResponse:
    return site.personal(request, site.render("imported.html", listings=_dates(site)))


@router.api_route("/imported/{day}", methods=["GET", "HEAD"])
def listing(request: Request, site: Here, reader: Reader, day: Day, page: Number = 1) -> HTMLResponse:
    found = _papers(site, day, page)
    html = site.render("imported_date.html", found=found, removable=_removable(site, reader, found.date))
    return site.personal(request, html)


@router.post("/imported/{day}/remove")
def remove(site: Here, reader: Reader, day: Day) -> Response:
    date = day.replace("-", " ")
    mine = None if site.settings.is_private else _imports(site, reader, date)
    if mine is not None and not mine:
        raise HTTPException(403, "A listing can be removed by the reader who imported it.")
    with _storing(site) as store:
        remove_listing(store.connection, date, mine)
    site.part(Finder).sync()
    site.changed()
    return RedirectResponse("/imported", 303)


@api.post("/import", responses=REFUSALS)
def post_page(site: Here, reader: Reader, page: Upload = None, text: Pasted = "") -> Imported:
    """Import a Daily Papers page; its new papers are kept, with the working methods that are nearest to each."""
    return _import(site, reader, page, text)


@api.get("/imported")
def read_listings(site: Here) -> Listings:
    """The imported listings."""
    return Listings(listings=_dates(site))


@api.get("/imported/{day}", responses={404: {"description": "Nothing of this date was imported."}})
def read_papers(site: Here, day: Day, page: Number = 1) -> Papers:
    """The new papers of an imported listing."""
    return _papers(site, day, page)


# --------------------------------------------------------------------------------------------------------------------


class Imports:
    """Who imported what and when, and whether one is going on: an import takes a core for a second or more."""

    def __init__(self, site: Site) -> None:
        self._state = site.state
        self._state.tables(
            """CREATE TABLE IF NOT EXISTS imports (
                reader TEXT NOT NULL,       -- a hash of the reader's number
                at REAL NOT NULL,           -- seconds since 1970
                date TEXT NOT NULL,         -- of the listing, "" while unknown or when it was refused
                imported_at TEXT NOT NULL   -- as in the store's table `listed`
            )"""
        )
        self.going_on = threading.Lock()

    def begin(self, who: str, imported_at: str) -> None:
        """Count an attempt.

        Raises
        ------
        HTTPException : 429, there were too many.
        """
        now = time.time()
        with self._state.transaction() as connection:
            connection.execute("DELETE FROM imports WHERE at < ? OR (date = '' AND at < ?)", (now - MONTH, now - HOUR))
            rows = connection.execute("SELECT reader FROM imports WHERE at >= ?", (now - HOUR,)).fetchall()
            if len(rows) >= PER_ALL or sum(row["reader"] == who for row in rows) >= PER_READER:
                raise HTTPException(429, "There were too many imports in the last hour. Try again later.")
            connection.execute("INSERT INTO imports VALUES (?, ?, '', ?)", (who, now, imported_at))

    def done(self, who: str, imported_at: str, date: str) -> None:
        self._state.write("UPDATE imports SET date = ? WHERE reader = ? AND imported_at = ?", (date, who, imported_at))

    def of(self, who: str, date: str) -> list[str]:
        """When a reader imported pages of this date."""
        rows = self._state.all("SELECT imported_at FROM imports WHERE reader = ? AND date = ?", (who, date))
        return [row["imported_at"] for row in rows]


def _import(site: Site, reader: str, page: UploadFile | None, text: str) -> Imported:
    """Read and keep a page.

    Raises
    ------
    HTTPException : it is refused; the detail is one sentence.
    """
    file = (
        page if page is not None and (page.filename or page.size) else None
    )  # a form without a file sends an empty one
    if (file is not None) == bool(text.strip()):
        raise HTTPException(422, "Choose a file or paste the text of a page, one of the two.")
    imports, who, now = site.part(Imports), _hashed(site, reader), datetime.now(UTC).isoformat()
    if not imports.going_on.acquire(blocking=False):
        raise HTTPException(409, "Another page is being read. Try again in a moment.")
    try:
        imports.begin(who, now)
        name = plain((file.filename or "") if file else "", 100) or "the page"
        content = file.file.read(SIZE_LIMIT + 1) if file else text.encode("utf-8", "replace")
        read = parse_apart(content, name)
        if len(read.entries) > MOST_PAPERS:
            raise ListingError(f"{name}: {len(read.entries):,} papers are too many; the limit is {MOST_PAPERS:,}")
        papers = site.content.papers
        matches = match(read, {slug: found.paper for slug, found in papers.items()})
        with _storing(site) as store:
            added = import_listing(store.connection, read, matches, now)
    except ListingError as refused:
        raise HTTPException(422, plain(str(refused), 400)) from None
    finally:
        imports.going_on.release()
    imports.done(who, now, read.date)
    site.part(Finder).sync()
    site.changed()
    return Imported(
        date=read.date,
        added=added,
        known=list(dict.fromkeys(found.paper.slug for found in matches if found.paper is not None)),
        new=[_new(found, papers) for found in matches if found.paper is None],
    )


def _papers(site: Site, day: str, page: int) -> Papers:
    date = day.replace("-", " ")
    count = {found.date: found.papers for found in _dates(site)}.get(date, 0)
    pages = -(-count // PAGE)
    if page > pages:
        raise HTTPException(404, "Nothing like that was imported.")
    rows = listed_on(site.part(Finder).store.connection, date, PAGE, (page - 1) * PAGE)
    new = [_new(row, site.content.papers) for row in rows]
    return Papers(date=date, papers=count, page=page, pages=pages, new=new)


def _dates(site: Site) -> list[Listing]:
    try:
        found = listed_dates(site.part(Finder).store.connection)
    except StoreError as trouble:
        _unusable(trouble)
    return [Listing(date=date, papers=count) for date, count in found]


def _new(found: Match | Listed, papers: Mapping[str, PaperContent]) -> New:
    """As plain text, safe to look at; escaping is the template's part."""
    paper = found.entry if isinstance(found, Match) else found
    near = [
        Near(slug=slug, title=papers[slug].paper.title, similarity=round(similarity, 3))
        for slug, similarity in found.nearest
        if slug in papers
    ]
    return New(title=plain(paper.title, 300), abstract=plain(paper.abstract, 600), arxiv=paper.arxiv, nearest=near)


def _removable(site: Site, reader: str, date: str) -> bool:
    return site.settings.is_private or bool(_imports(site, reader, date))


def _imports(site: Site, reader: str, date: str) -> list[str]:
    return site.part(Imports).of(_hashed(site, reader), date)


def _hashed(site: Site, reader: str) -> str:
    return sign(site.secret, "imports", reader)[:32]


@contextmanager
def _storing(site: Site) -> Iterator[Store]:
    """The store, for writing.

    Raises
    ------
    HTTPException : 503, it cannot be used.
    """
    try:
        with Store(site.settings.store) as store:
            yield store
    except StoreError as trouble:
        _unusable(trouble)


def _unusable(trouble: StoreError) -> NoReturn:
    logging.getLogger(__name__).warning("imported papers cannot be kept or read: %s", trouble)
    raise HTTPException(503, "The store of this page cannot be used at the moment.") from None
