"""Stars, and what is trending.

A paper's heat is the sum over its stars of 2^(-age / 7 days), plus `EVIDENCE` times the same for its youngest evidence.
Everything fades at the same pace, so the order changes only when a star or evidence comes or goes, never by waiting.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from workingpapers.desk.page.guard import Reader, sign
from workingpapers.desk.page.site import Site, site_of

HALF_LIFE = 7 * 24 * 3600.0  # seconds in which a star loses half of its weight
EVIDENCE = 3.0  # stars that fresh evidence counts as
MEANING = "Trending: the stars of the last weeks and fresh evidence. Both count half as much every week that passes."
MOST = 200_000  # stars of all readers together
PATIENCE = 5.0  # seconds in which the pages of other readers may miss a star: a burst makes pages anew only once

router = APIRouter(include_in_schema=False)
api = APIRouter(prefix="/api", tags=["stars"])
Here = Annotated[Site, Depends(site_of)]


class StarsOfAll(BaseModel):
    """How many readers starred each paper, which ones this reader starred, and what is trending."""

    stars: dict[str, int]
    starred: list[str]
    trending: list[str]
    meaning: str = MEANING


class Star(BaseModel):
    """One paper after a change."""

    slug: str
    starred: bool
    stars: int


def counts(site: Site) -> Mapping[str, int]:
    """How many readers have starred each paper; those without a star are absent."""
    return site.part(Stars).counts


def of(site: Site, reader: str) -> frozenset[str]:
    """What a reader has starred."""
    return site.part(Stars).of(reader)


def trending(site: Site) -> list[str]:
    """All papers, the hottest first; equal ones in the order of the catalogue."""
    return site.part(Stars).trending()


@router.post("/stars/{slug}")
def toggle(request: Request, slug: str, site: Here, reader: Reader) -> Response:
    starred = _toggled(site, slug, reader)
    if "hx-request" in request.headers:
        html = site.render("_star.html", slug=slug, starred=starred, stars=counts(site).get(slug, 0), focus=True)
        return site.personal(request, html)
    return RedirectResponse(_back(request), 303)


@api.get("/stars")
def read_stars(site: Here, reader: Reader) -> StarsOfAll:
    return StarsOfAll(stars=dict(counts(site)), starred=sorted(of(site, reader)), trending=trending(site))


@api.post("/stars/{slug}", responses={404: {}, 403: {}, 503: {}})
def toggle_star(slug: str, site: Here, reader: Reader) -> Star:
    """Star a paper, or take the star back."""
    return Star(slug=slug, starred=_toggled(site, slug, reader), stars=counts(site).get(slug, 0))


class Stars:
    """Every star, in memory and in the page's state.

    Parameters
    ----------
    clock : seconds since 1970.
    """

    def __init__(self, site: Site, clock: Callable[[], float] = time.time) -> None:
        site.state.tables(
            """CREATE TABLE IF NOT EXISTS stars (
                slug TEXT NOT NULL,
                reader TEXT NOT NULL,  -- a hash of the reader's number, which is as good as a password
                at REAL NOT NULL,      -- seconds since 1970
                PRIMARY KEY (slug, reader)
            ) WITHOUT ROWID"""
        )
        self._site = site
        self._clock = clock
        self._epoch = clock()
        self._lock = threading.Lock()
        self._of: dict[str, frozenset[str]] = {}
        self._at: dict[str, dict[str, float]] = {}
        self._total = 0
        for slug, reader, at in site.state.all("SELECT slug, reader, at FROM stars"):
            self._put(slug, reader, at)

    @property
    def counts(self) -> dict[str, int]:
        with self._lock:
            return {slug: len(readers) for slug, readers in self._at.items() if readers}

    def of(self, reader: str) -> frozenset[str]:
        return self._of.get(self._hashed(reader), frozenset())

    def toggle(self, slug: str, reader: str) -> bool:
        """Star, or take the star back; whether the paper is starred now.

        Raises
        ------
        OverflowError : there are `MOST` stars already.
        """
        who = self._hashed(reader)
        with self._lock:
            if who in self._at.get(slug, {}):
                self._site.state.write("DELETE FROM stars WHERE slug = ? AND reader = ?", (slug, who))
                self._remove(slug, who)
                return False
            if self._total >= MOST:
                raise OverflowError
            now = self._clock()
            self._site.state.write("INSERT OR REPLACE INTO stars VALUES (?, ?, ?)", (slug, who, now))
            self._put(slug, who, now)
            return True

    def trending(self) -> list[str]:
        papers = self._site.content.papers
        recorded = {slug: page.recorded for slug, page in papers.items()}
        with self._lock:
            heat = {slug: [self._weight(at) for at in self._at.get(slug, {}).values()] for slug in papers}
        for slug, stamp in recorded.items():
            if stamp:
                heat[slug].append(EVIDENCE * self._weight(_seconds(stamp)))
        total = {slug: math.fsum(weights) for slug, weights in heat.items()}
        return sorted(papers, key=lambda slug: -total[slug])

    def _weight(self, at: float) -> float:
        """Relative to one moment for all, so that it need not be now."""
        return float(2.0 ** min((at - self._epoch) / HALF_LIFE, 500.0))

    def _hashed(self, reader: str) -> str:
        return sign(self._site.secret, "stars", reader)[:32]

    def _put(self, slug: str, who: str, at: float) -> None:
        self._at.setdefault(slug, {})[who] = at
        self._of[who] = self._of.get(who, frozenset()) | {slug}
        self._total += 1

    def _remove(self, slug: str, who: str) -> None:
        del self._at[slug][who]
        self._of[who] -= {slug}
        if not self._of[who]:
            del self._of[who]
        self._total -= 1


class _Spaced:
    """Tells the site of changes, `PATIENCE` seconds apart."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._lock = threading.Lock()
        self._last = -math.inf
        self._timer: threading.Timer | None = None

    def changed(self) -> None:
        with self._lock:
            wait = self._last + PATIENCE - time.monotonic()
            if wait <= 0:
                self._tell()
            elif self._timer is None:
                self._timer = threading.Timer(wait, self._late)
                self._timer.daemon = True
                self._timer.start()

    def _late(self) -> None:
        with self._lock:
            self._timer = None
            self._tell()

    def _tell(self) -> None:
        self._last = time.monotonic()
        self._site.changed()


def _toggled(site: Site, slug: str, reader: str) -> bool:
    if slug not in site.content.papers:
        raise HTTPException(404, "No paper has this name.")
    try:
        starred = site.part(Stars).toggle(slug, reader)
    except OverflowError:
        raise HTTPException(503, "There is no room for more stars.") from None
    site.part(_Spaced).changed()
    return starred


def _back(request: Request) -> str:
    """The path of the page that the form stands on, when it is one of ours."""
    try:
        came = urlsplit(request.headers.get("referer", ""))
    except ValueError:
        return "/"
    if came.netloc != request.headers.get("host") or not came.path.startswith("/") or came.path.startswith("//"):
        return "/"
    return f"{came.path}?{came.query}" if came.query else came.path


def _seconds(stamp: str) -> float:
    found = datetime.fromisoformat(stamp)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
