"""The listing and the pages of the papers."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from workingpapers.desk.page import runs, searching, stars
from workingpapers.desk.page.arrange import SORTS, STATUSES, Filters, arrange
from workingpapers.desk.page.assets import assets
from workingpapers.desk.page.content import Content, PaperContent
from workingpapers.desk.page.guard import YEAR, Reader
from workingpapers.desk.page.site import Site, site_of

READ = ("GET", "HEAD")
FOUND = 200  # hits shown
RECENT_RUNS = 5
BREATH = 0.005  # seconds between two pages that are prepared

router = APIRouter(include_in_schema=False)
Here = Annotated[Site, Depends(site_of)]


@router.api_route("/", methods=list(READ))
async def home(request: Request, site: Here, reader: Reader) -> HTMLResponse:
    """The listing; to htmx, which has the rest of the page already, the results alone."""
    content = site.content
    filters = Filters.of(request.query_params, content)
    starred = stars.of(site, reader)
    is_part = "hx-request" in request.headers and "hx-history-restore-request" not in request.headers

    def make() -> str:
        hits = searching.find(site, filters.q, FOUND) if filters.q else ()
        trending = stars.trending(site) if filters.sort == "trending" else ()
        shown = {
            **listing(content, filters, hits=hits, trending=trending),
            "starred": starred,
            "stars": stars.counts(site),
            "how": searching.how(site, filters.q) if filters.q else "",
        }
        return site.render("_results.html" if is_part else "index.html", is_part=is_part, **shown)

    response = await site.page(request, ("home", content.version, filters, is_part, starred), make)
    response.headers["vary"] = "HX-Request"
    if is_part:  # a step back leads to the listing before the typing began
        typed = request.headers.get("hx-trigger-name") == "q"
        response.headers["hx-replace-url" if typed else "hx-push-url"] = f"/?{filters.query}".rstrip("?")
    return response


def listing(content: Content, filters: Filters, **found: Any) -> dict[str, Any]:
    """What index.html shows, apart from stars (`found` as for `arrange`)."""
    groups = arrange(content, filters, **found)
    rows = [row for group in groups for row in group.rows]
    known = {row.page.paper.slug for row in rows if row.page is not None}  # a paper may stand under two dates
    return {
        "content": content,
        "filters": filters,
        "groups": groups,
        "count": len(known) + sum(row.page is None for row in rows),
        "sorts": SORTS,
        "statuses": STATUSES,
        "listings": {date: date for date, _ in content.listings},
        "how": "",
    }


@router.api_route("/papers/{slug}", methods=list(READ))
async def paper(request: Request, slug: str, site: Here, reader: Reader) -> HTMLResponse:
    content = site.content
    found = content.papers.get(slug)
    if found is None:
        raise HTTPException(404, "No paper has this name.")
    starred = slug in stars.of(site, reader)
    key = ("paper", content.version, slug, starred)
    return await site.page(request, key, lambda: _page(site, content, found, starred=starred))


def _page(site: Site, content: Content, found: PaperContent, *, starred: bool) -> str:
    slug = found.paper.slug
    return site.render(
        "paper.html",
        page=found,
        content=content,
        starred=starred,
        stars=stars.counts(site).get(slug, 0),
        runs=runs.recent(site, slug, RECENT_RUNS),
        # the largest part, which changes only with the evidence
        claims_kept=site.piece(("claims", slug), found, lambda: site.render("_claims.html", page=found)),
    )


@asynccontextmanager
async def lifespan(site: Site) -> AsyncIterator[None]:
    """Render every page once, so that no reader waits for what the first time takes longer."""
    is_over = threading.Event()

    def prepare() -> None:
        content = site.content
        for found in content.papers.values():
            if is_over.wait(BREATH):
                return
            _page(site, content, found, starred=False)

    thread = threading.Thread(target=prepare, name="prepare", daemon=True)
    thread.start()
    yield
    is_over.set()
    await run_in_threadpool(thread.join)


@router.api_route("/about", methods=list(READ))
async def about(request: Request, site: Here) -> HTMLResponse:
    content = site.content
    return await site.page(request, "about", lambda: site.render("about.html", content=content))


@router.api_route("/favicon.ico", methods=list(READ))
async def favicon() -> Response:
    icon = assets()["favicon.svg"]
    return Response(icon.content, media_type=icon.kind, headers={"cache-control": f"public, max-age={YEAR}"})
