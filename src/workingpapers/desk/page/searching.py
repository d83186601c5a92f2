"""Search over the catalogue and the imported titles: by words, and by meaning where the extra is installed."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Literal, get_args

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from workingpapers.desk import reference
from workingpapers.desk.catalogue import FIELDS, Status
from workingpapers.desk.expect import Verdict
from workingpapers.desk.meaning import Meaning, is_installed, is_worthwhile
from workingpapers.desk.page.site import Site, site_of
from workingpapers.desk.places import titles_path
from workingpapers.desk.search import Hit, Index, Span, search_claims
from workingpapers.desk.store import Store, StoreError
from workingpapers.desk.titles import Titles

BY_WORDS, BY_BOTH = "by words", "by words and meaning"
LONGEST_QUERY = 200  # characters
LONGEST_WAIT = 2.0  # seconds for the thread to end
PAUSE = 0.1  # seconds between two batches of texts that are read for their meaning
PATIENCE = 1.0  # seconds until what another program imported is found

_log = logging.getLogger(__name__)
router = APIRouter(include_in_schema=False)
api = APIRouter(prefix="/api", tags=["search"])
Here = Annotated[Site, Depends(site_of)]
Field = Literal[
    "", "alignment", "causality", "clustering", "compression", "control", "dynamics", "equations", "federated",
    "generative", "inference", "language", "optimization", "recommendation", "selection", "training",
]  # fmt: skip
assert get_args(Field) == ("", *FIELDS)


class Found(BaseModel):
    """A hit: a paper of the catalogue, or, with an empty `slug`, an imported title.

    Attributes
    ----------
    title_spans, snippet_spans : [start, end] of what matched in title and snippet.
    field, status, verdict : of a paper of the catalogue.
    date, arxiv : of an imported title: its listing, and its identifier or "".
    """

    slug: str
    title: str
    snippet: str
    title_spans: list[Span]
    snippet_spans: list[Span]
    score: float
    field: str = ""
    status: Status | None = None
    verdict: Verdict | None = None
    date: str = ""
    arxiv: str = ""


class Answer(BaseModel):
    """What a search found, best first, and by what."""

    query: str
    by: str
    hits: list[Found]


def find(site: Site, query: str, limit: int = 200) -> list[Hit]:
    """The papers and imported titles that match best; any text is a legal query."""
    return site.part(Finder).find(query[:LONGEST_QUERY], limit)


def how(site: Site, query: str) -> str:
    """By what `find` answers this query: `BY_WORDS` or `BY_BOTH`."""
    return site.part(Finder).how(query[:LONGEST_QUERY])


@api.get("/search")
def search(
    site: Here,
    q: Annotated[str, Query(max_length=LONGEST_QUERY)],
    field: Field = "",
    verdict: Literal["", "holds", "fails", "inconclusive", "crashed"] = "",
    status: Literal["", "working", "listed"] = "",
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Answer:
    """Search titles, summaries, names, claims and imported titles; the filters combine.

    An imported title has no field, status or verdict, so that a filter leaves it out.
    """
    papers = site.content.papers
    chosen = []
    for hit in find(site, q):
        found = Found(**{name: getattr(hit, name) for name in Found.model_fields if hasattr(hit, name)})
        if hit.slug:
            page = papers[hit.slug]
            found = found.model_copy(update={"field": page.paper.field, "status": page.status, "verdict": page.verdict})
        if all(not wanted or wanted == is_ for wanted, is_ in
               ((field, found.field), (verdict, found.verdict), (status, found.status))):  # fmt: skip
            chosen.append(found)
    return Answer(query=q, by=how(site, q), hits=chosen[:limit])


@asynccontextmanager
async def lifespan(site: Site) -> AsyncIterator[None]:
    """Keep the index up to date in a thread, until the page stops."""
    finder = site.part(Finder)
    finder.start()
    try:
        yield
    finally:
        await run_in_threadpool(finder.close)


class Finder:
    """The indexes of one page, and the thread that keeps them up to date."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._papers = {slug: page.paper for slug, page in site.content.papers.items()}
        self._claims = search_claims(self._papers.values())
        self._titles = Titles(titles_path(site.settings.store))
        self._index = Index(self._papers, claims=self._claims, titles=self._titles)
        self._meaning: Meaning | None = None
        self._store: Store | None = None
        self._trouble = ""
        self._opening = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="finder", daemon=True)

    def find(self, query: str, limit: int) -> list[Hit]:
        hits = self._index.search(query, limit=limit)
        if self._meaning is not None and is_worthwhile(query):
            hits = self._meaning.blended(query, hits, limit)
        return hits

    def how(self, query: str) -> str:
        return BY_BOTH if self._meaning is not None and is_worthwhile(query) else BY_WORDS

    @property
    def store(self) -> Store:
        """For reading.

        Raises
        ------
        StoreError : it cannot be used.
        """
        with self._opening:
            if self._store is None:
                self._store = Store(self._site.settings.store)
            return self._store

    def sync(self) -> None:
        """Take over what has been imported or removed, by this program or another."""
        if self._titles.sync(self.store.connection):
            self._site.changed()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(LONGEST_WAIT)
            if self._thread.is_alive():  # it loads the model, which cannot be interrupted
                return
        self._titles.close()
        if self._store is not None:
            self._store.close()

    def _work(self) -> None:
        for task in (self._catch_up, self._read_reference, self._load_meaning):
            try:
                if not self._stop.is_set():
                    task()
            except Exception:
                _log.exception("search goes on without what is missing here")
        while not self._stop.wait(PATIENCE):
            try:
                self._catch_up()
                while self._meaning is not None and self._meaning.advance() and not self._stop.wait(PAUSE):
                    pass
            except Exception:
                _log.exception("imported papers are not up to date in the search")

    def _catch_up(self) -> None:
        try:
            self.sync()
        except StoreError as trouble:
            if str(trouble) != self._trouble:  # said once
                _log.warning("imported papers cannot be read: %s", trouble)
            self._trouble = str(trouble)

    def _load_meaning(self) -> None:
        if self._site.settings.meaning and is_installed():
            self._meaning = Meaning(self._papers, self._titles)
            self._site.changed()

    def _read_reference(self) -> None:
        """Reading the docstrings takes a while; papers are found by their other texts meanwhile."""
        slugs = {paper.module: slug for slug, paper in self._papers.items()}
        texts: dict[str, list[str]] = {}
        for entry in reference.entries():
            if entry.module in slugs:
                texts.setdefault(slugs[entry.module], []).append(f"{entry.name}: {entry.text}")
        if texts:
            joined = {slug: "\n".join(found) for slug, found in texts.items()}
            self._index = Index(self._papers, claims=self._claims, reference=joined, titles=self._titles)
            self._site.changed()
