"""The application: its parts put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response

from workingpapers.desk.evidence import versions
from workingpapers.desk.page import api, exports, importing, papers, reference, runs, searching, stars, subscriptions
from workingpapers.desk.page.assets import assets
from workingpapers.desk.page.guard import HEADERS, YEAR, Guard, require_token
from workingpapers.desk.page.models import Invalid
from workingpapers.desk.page.settings import Settings
from workingpapers.desk.page.site import Site, site_of

# exports first: /papers/{slug}.bib would be taken for the page of a paper
PARTS = (exports, papers, searching, stars, reference, runs, importing, subscriptions, api)


def create_app(settings: Settings) -> FastAPI:
    """The page for these settings; an ASGI application.

    Each part is a module with a `router`; a part that works in the background also has `lifespan(site)`, an
    asynchronous context manager.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for part in PARTS:
                if hasattr(part, "lifespan"):
                    await stack.enter_async_context(part.lifespan(app.state.site))
            yield
        app.state.site.close()

    app = FastAPI(
        title="Working Papers",
        version=versions().get("workingpapers", ""),
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        openapi_url="/api/openapi.json",
        lifespan=lifespan,
        dependencies=[Depends(require_token)],
        responses={
            422: {"model": Invalid, "description": "Something in the request cannot be."},
            "4XX": {"model": Invalid, "description": "There is no such thing, or it is not allowed."},
        },
    )
    app.state.site = Site(settings)
    for part in PARTS:
        app.include_router(part.router)
        if hasattr(part, "api"):
            app.include_router(part.api)
    app.add_api_route("/assets/{name}", _asset, include_in_schema=False)
    app.add_exception_handler(HTTPException, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _crashed)
    app.add_middleware(Guard, settings=settings)
    return app


async def _asset(name: str) -> Response:
    found = assets().get(name)
    if found is None:
        raise HTTPException(404, "There is no such file.")
    headers = {"cache-control": f"public, max-age={YEAR}, immutable"}
    return Response(found.content, media_type=found.kind, headers=headers)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if _wants_json(request):
        return JSONResponse({"detail": error.detail}, error.status_code, headers=error.headers)
    site = site_of(request)
    html = site.render("error.html", status=error.status_code, detail=error.detail)
    response = site.personal(request, html, status=error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = [
        {"where": [_printable(str(part)) for part in problem["loc"]], "problem": _printable(problem["msg"])}
        for problem in error.errors()
    ]
    if _wants_json(request):
        return JSONResponse({"detail": problems}, 422)
    told = "; ".join(f"{problem['where'][-1]}: {problem['problem']}" for problem in problems)
    return await _failed(request, HTTPException(422, told))


async def _left(request: Request, error: Exception) -> Response:
    """The reader went away in the middle of a request: nobody gets this answer, and it is no error of ours."""
    return Response(status_code=400)


async def _crashed(request: Request, error: Exception) -> Response:
    """An error of ours: the server logs it, the reader learns nothing of it. This answer does not pass the guard."""
    told = "Something went wrong here. It has been logged."
    if _wants_json(request):
        return JSONResponse({"detail": told}, 500, headers=HEADERS)
    return PlainTextResponse(told, 500, headers=HEADERS)


def _printable(text: str) -> str:
    """Half a surrogate pair, which JSON can carry and UTF-8 cannot, becomes a question mark."""
    return text.encode(errors="replace").decode()


def _wants_json(request: Request) -> bool:
    return request.url.path.startswith("/api/")
