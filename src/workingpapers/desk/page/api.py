"""The papers as JSON under /api, and a page that says what there is.

Answers are made once for each content and kept with it; a client that names the answer it has (If-None-Match) is told
in a few bytes that nothing has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from workingpapers.desk.catalogue import FIELDS, Status
from workingpapers.desk.evidence import versions
from workingpapers.desk.expect import Verdict
from workingpapers.desk.page import models
from workingpapers.desk.page.content import Content, PaperContent
from workingpapers.desk.page.exports import bibtex
from workingpapers.desk.page.guard import HEADER, greet, token_of
from workingpapers.desk.page.render import live
from workingpapers.desk.page.site import Site, site_of
from workingpapers.desk.page.usage import usage

router = APIRouter(prefix="/api", tags=["papers"])

Here = Annotated[Site, Depends(site_of)]
FIELD = f"^({'|'.join(FIELDS)})$"
DATE = "^[A-Z][a-z]{2} [1-9][0-9]?$"
METHODS = ("get", "post", "put", "patch", "delete")

Route = Callable[..., Any]


def reads(path: str, model: type[models.Model], *, may_miss: bool = False) -> Callable[[Route], Route]:
    """Answer GET and HEAD at `path` with this model; `may_miss` when what is asked for may not exist."""

    def add(route: Route) -> Route:
        told: dict[int | str, dict[str, Any]] = {304: {"description": "It is what If-None-Match names."}}
        if may_miss:
            told[404] = {"model": models.Refused, "description": "There is nothing of this name."}
        router.add_api_route(path, route, methods=["GET"], response_model=model, responses=told)
        router.add_api_route(path, route, methods=["HEAD"], include_in_schema=False)
        return route

    return add


@reads("", models.Root)
async def start(request: Request, site: Here) -> Response:
    """Where to go from here."""

    def make() -> bytes:
        paths = request.app.openapi()["paths"]
        root = models.Root(
            name="Working Papers",
            version=versions().get("workingpapers", ""),
            openapi=str(request.app.openapi_url),
            docs=live("api"),
            links=[path for path, methods in paths.items() if "get" in methods and "{" not in path],
        )
        return root.model_dump_json().encode()

    return answer(request, await _kept(site.content, "root", make))


@reads("/papers", models.PaperList)
async def every_paper(
    request: Request,
    site: Here,
    field: Annotated[str | None, Query(pattern=FIELD, description="only papers of this field")] = None,
    verdict: Annotated[Verdict | None, Query(description="only papers with a claim that came to this")] = None,
    status: Annotated[Status | None, Query(description="only papers that work, or that do not work yet")] = None,
    listing: Annotated[str | None, Query(pattern=DATE, description="only papers of this date")] = None,
) -> Response:
    """The papers as the listing shows them; filters combine."""
    content = site.content
    chosen = [
        slug
        for slug, found in content.papers.items()
        if field in (None, found.paper.field)
        and (verdict is None or verdict in found.tally)
        and status in (None, found.status)
        and (listing is None or listing in found.paper.listings)
    ]
    rows = await _kept(content, "rows", lambda: _rows(content))
    return answer(request, b'{"count":%d,"papers":[%b]}' % (len(chosen), b",".join(rows[slug] for slug in chosen)))


@reads("/papers/{slug}", models.Whole, may_miss=True)
async def one_paper(request: Request, slug: Annotated[str, Path(max_length=100)], site: Here) -> Response:
    """Everything the page of a paper shows: claims, judgements, measurements, figures, nearest papers, BibTeX."""
    content = site.content
    found = content.papers.get(slug)
    if found is None:
        raise HTTPException(404, "No paper has this name.")
    return answer(request, await _kept(content, ("paper", slug), lambda: whole(content, found)))


@reads("/listings", models.ListingList)
async def every_listing(request: Request, site: Here) -> Response:
    """The listings, newest first."""
    content = site.content

    def make() -> bytes:
        found = [
            models.OneListing(date=date, api=f"/api/papers?listing={date.replace(' ', '%20')}", **_counted(members))
            for date, members in content.listings
        ]
        return models.ListingList(listings=found).model_dump_json().encode()

    return answer(request, await _kept(content, "listings", make))


@reads("/fields", models.FieldList)
async def every_field(request: Request, site: Here) -> Response:
    """The fields, in the order of the catalogue."""
    content = site.content

    def make() -> bytes:
        found = [
            models.OneField(field=field, name=FIELDS[field], api=f"/api/papers?field={field}", **_counted(members))
            for field, members in content.fields.items()
        ]
        return models.FieldList(fields=found).model_dump_json().encode()

    return answer(request, await _kept(content, "fields", make))


@router.get("/token", response_model=models.Token, tags=["changes"])
async def token(request: Request) -> Response:
    """For programs that change something: send the token in this header, and the cookie that this answer sets."""
    told = models.Token(header="X-Page-Token", token=token_of(request))
    assert told.header.lower() == HEADER
    response = Response(told.model_dump_json(), media_type="application/json", headers={"cache-control": "no-store"})
    greet(request, response.headers)
    return response


@router.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
async def overview(request: Request, site: Here) -> HTMLResponse:
    """What there is, for people; made from the OpenAPI description."""

    def make() -> str:
        return site.render(
            "api.html",
            operations=_operations(request.app.openapi()),
            start=router.prefix,
            openapi=request.app.openapi_url,
        )

    return await site.page(request, "api", make)


# --------------------------------------------------------------------------------------------------------------------
# Answers


def answer(request: Request, body: bytes) -> Response:
    """JSON with its ETag; 304 without a body when the client has it already."""
    tag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
    headers = {"etag": tag, "cache-control": "no-cache"}
    known = [given.strip().removeprefix("W/") for given in request.headers.get("if-none-match", "").split(",")]
    if tag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def whole(content: Content, found: PaperContent) -> bytes:
    """Everything the page of a paper shows, as JSON (`Whole`)."""
    paper = found.paper
    works = found.status == "working"
    evidence = [
        models.Shown(
            **entry,
            stale=found.is_stale(entry),
            csv=live("measurements", paper.slug, entry["claim"], entry["scale"], "csv"),
            parquet=live("measurements", paper.slug, entry["claim"], entry["scale"], "parquet"),
        )
        for entry in found.entries
    ]
    nearest = [
        models.NearPaper(
            slug=slug,
            title=content.papers[slug].paper.title,
            status=content.papers[slug].status,
            similarity=similarity,
            api=_api(slug),
        )
        for slug, similarity in found.nearest
    ]
    made = models.Whole(
        **_listed(found),
        note=paper.note,
        use=usage(paper) if works else "",
        check=[f"workingpapers {command} {paper.slug} --scale laptop" for command in ("check", "bench") if works],
        evidence=evidence,
        nearest=nearest,
        bibtex=bibtex(paper),
        reference=live("reference", paper.module) if works else "",
    )
    return made.model_dump_json().encode()


def _rows(content: Content) -> dict[str, bytes]:
    return {slug: models.Listed(**_listed(found)).model_dump_json().encode() for slug, found in content.papers.items()}


def _listed(found: PaperContent) -> dict[str, Any]:
    paper = found.paper
    return {
        "slug": paper.slug,
        "title": paper.title,
        "summary": paper.summary,
        "field": paper.field,
        "module": paper.module,
        "names": list(paper.names),
        "status": found.status,
        "listings": list(paper.listings),
        "arxiv": paper.arxiv,
        "code": paper.code,
        "scale": found.scale,
        "verdict": found.verdict,
        "tally": found.tally,
        "speed": found.speed,
        "recorded": found.recorded,
        "stale": found.stale,
        "unreadable": bool(found.damage),
        "page": live("paper", paper.slug),
        "api": _api(paper.slug),
    }


def _counted(members: list[PaperContent]) -> dict[str, Any]:
    return {
        "count": len(members),
        "working": sum(found.status == "working" for found in members),
        "slugs": [found.paper.slug for found in members],
    }


def _api(slug: str) -> str:
    return f"{router.prefix}/papers/{slug}"


async def _kept(content: Content, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` makes of this content, made once."""
    if key not in content.kept:
        content.kept[key] = await run_in_threadpool(make)
    return content.kept[key]


def _operations(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """What the overview shows: one entry for each path and method, by path."""
    return [
        {
            "path": path,
            "method": method.upper(),
            "says": operation.get("description") or operation.get("summary", ""),
            "parameters": [
                {
                    "name": parameter["name"],
                    "place": parameter["in"],
                    "is_required": parameter.get("required", False),
                    "says": parameter.get("description", ""),
                    "values": _values(parameter.get("schema", {})),
                }
                for parameter in operation.get("parameters", [])
            ],
            "body": sorted(operation.get("requestBody", {}).get("content", {})),
        }
        for path, methods in sorted(schema["paths"].items())
        for method, operation in methods.items()
        if method in METHODS
    ]


def _values(schema: dict[str, Any]) -> str:
    """The values that a parameter may have, in a few words."""
    for choice in schema.get("anyOf", [schema]):
        if "enum" in choice:
            return ", ".join(str(value) for value in choice["enum"] if value)
        if choice.get("pattern") == FIELD:
            return ", ".join(FIELDS)
        if choice.get("type") not in (None, "null"):
            return str(choice["type"])
    return ""
