"""Runs: a button checks a claim, and its page tells live how far that is."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Annotated, Any, Self, TypeVar

from fastapi import APIRouter, Depends, Form, Header, Path, Query, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from workingpapers.desk import supervisor
from workingpapers.desk.claim import Scale
from workingpapers.desk.expect import SEVERITY, Verdict
from workingpapers.desk.page.guard import reader_of, sign
from workingpapers.desk.page.render import MARKS, counted, live
from workingpapers.desk.page.site import Site, site_of
from workingpapers.desk.queue import ALL_BENCHMARKS, ALL_CLAIMS, Queue, Refused, Run, RunStatus, claims_in

router = APIRouter(include_in_schema=False)
api = APIRouter(prefix="/api", tags=["runs"])

LOOK = 0.5  # seconds between looks at the runs that somebody follows
HEARTBEAT = 15.0  # seconds of silence after which a stream says that it is still there
LIFETIME = 600.0  # seconds of a stream; the browser opens another one
STREAMS = 100  # open at once
SHOWN = 50  # runs on a page of the history
LAST = 2**53 - 1  # the largest number that JavaScript can count to

Answer = TypeVar("Answer")


class Desk:
    """The queue of one page, and those who follow its runs.

    Attributes
    ----------
    streams : how many are open.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self.queue = Queue(site.state, site.changed)
        self.streams = 0
        self._followed: Counter[int] = Counter()
        self._seen: dict[int, Run] = {}

    async def watch(self) -> None:
        """Look at the runs that somebody follows: once for all of them, and not on the event loop."""
        while True:
            await asyncio.sleep(LOOK)
            if self._followed:
                with suppress(sqlite3.Error):
                    self._seen = await run_in_threadpool(self.queue.several, list(self._followed))

    @contextmanager
    def _following(self, number: int) -> Iterator[None]:
        self._followed[number] += 1
        try:
            yield
        finally:
            self._followed[number] -= 1
            self._followed += Counter()  # without those that nobody follows

    async def follow(self, run: Run) -> AsyncIterator[Run | None]:
        """The run, and again whenever it has changed until it ends; None after a silence."""
        yield run
        loop = asyncio.get_running_loop()
        end, heard = loop.time() + LIFETIME, loop.time()
        with self._following(run.id):
            while run.is_open and loop.time() < end and not self._site.is_closing():
                await asyncio.sleep(LOOK)
                now = self._seen.get(run.id, run)
                if now.revision > run.revision:
                    run, heard = now, loop.time()
                    yield run
                elif loop.time() - heard >= HEARTBEAT:
                    heard = loop.time()
                    yield None


class Stream(StreamingResponse):
    """Server-sent events of a run; it counts as open until it has ended or the reader has left."""

    def __init__(self, desk: Desk, run: Run) -> None:
        super().__init__(_events(desk, run), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._desk = desk
        desk.streams += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._desk.streams -= 1


@asynccontextmanager
async def lifespan(site: Site) -> AsyncIterator[None]:
    """Do the runs of the queue while the page is up."""
    settings = site.settings
    order = partial(supervisor.command, store=settings.store, jobs=settings.jobs)
    works = supervisor.Supervisor(desk_of(site).queue, settings.state.with_suffix(".lock"), order)
    works.start()
    watching = asyncio.create_task(desk_of(site).watch())
    try:
        yield
    finally:
        watching.cancel()
        await run_in_threadpool(works.stop)


def desk_of(site: Site) -> Desk:
    return site.part(Desk)


def recent(site: Site, slug: str, limit: int = 5) -> list[Run]:
    """The last runs of a paper, the youngest first."""
    return desk_of(site).queue.of_paper(slug, limit)


def told(run: Run, ahead: int = 0) -> str:
    """How far a run is, in one sentence."""
    match run.status:
        case "queued":
            return (
                f"Waiting: {ahead} {'run comes' if ahead == 1 else 'runs come'} first." if ahead else "Starting soon."
            )
        case "running":
            if run.is_stopping:
                return "Stopping."
            return f"{run.done} of {run.total} cells measured." if run.total else "Loading the claims."
        case "failed":
            return "The run failed."
        case "cancelled":
            return f"Cancelled after {run.done} of {run.total} cells." if run.total else "Cancelled."
    verdicts = [outcome["verdict"] for outcome in run.outcomes]
    if len(verdicts) == 1:
        return f"Done: {MARKS[verdicts[0]][2:]}."
    return f"Done: {', '.join(counted(found, verdicts.count(found)) for found in SEVERITY if found in verdicts)}."


# --------------------------------------------------------------------------------------------------------------------
# Pages


class Wanted(BaseModel):
    """A run that a reader asks for.

    Attributes
    ----------
    slug : of the paper.
    what : the name of a claim or benchmark, "all claims" or "all benchmarks".
    scale : "smoke" takes seconds to minutes, "laptop" minutes, "paper" may take hours.
    seed : the first of the consecutive seeds.
    """

    slug: str = Field(max_length=100, pattern="^[a-z0-9-]+$")
    what: str = Field(ALL_CLAIMS, max_length=100, pattern="^(all claims|all benchmarks|[A-Za-z_][A-Za-z0-9_]*)$")
    scale: Scale = "smoke"
    seed: int = Field(0, ge=0, lt=2**31)


def _desk(site: Annotated[Site, Depends(site_of)]) -> Desk:
    return desk_of(site)


def _asker(request: Request, site: Annotated[Site, Depends(site_of)]) -> str:
    """Who asks, as the queue knows it: the reader's number itself is as good as a password."""
    return sign(site.secret, "runs", reader_of(request))[:32]


Here = Annotated[Site, Depends(site_of)]
Asker = Annotated[str, Depends(_asker)]
Runs = Annotated[Desk, Depends(_desk)]
Number = Annotated[int, Path(ge=1, le=LAST)]
Before = Annotated[int, Query(ge=1, le=LAST, description="only runs with smaller numbers")]


@router.post("/runs")
def ask(wanted: Annotated[Wanted, Form()], desk: Runs, who: Asker) -> Response:
    run, _ = _refusing(lambda: desk.queue.ask(wanted.slug, wanted.what, wanted.scale, wanted.seed, who))
    return RedirectResponse(live("run", str(run.id)), 303)


@router.api_route("/runs", methods=["GET", "HEAD"])
def overview(request: Request, site: Here, desk: Runs, before: Before = LAST) -> HTMLResponse:
    ended = desk.queue.ended(SHOWN + 1, before)
    shown: dict[str, Any] = {
        "waiting": desk.queue.open() if before == LAST else [],
        "ended": ended[:SHOWN],
        "older": ended[SHOWN - 1].id if len(ended) > SHOWN else None,
        "is_first": before == LAST,
        "papers": site.content.papers,
    }
    return site.personal(request, site.render("runs.html", **shown))


@router.api_route("/runs/{number}", methods=["GET", "HEAD"])
def one(request: Request, number: Number, site: Here, desk: Runs, who: Asker) -> HTMLResponse:
    return site.personal(request, site.render("run.html", **_shown(site, desk, _found(desk, number), who)))


@router.get("/runs/{number}/state")
def state(request: Request, number: Number, site: Here, desk: Runs, who: Asker) -> HTMLResponse:
    """The part of a run's page that changes."""
    return site.personal(request, site.render("_run_state.html", **_shown(site, desk, _found(desk, number), who)))


@router.post("/runs/{number}/cancel")
def cancel(number: Number, site: Here, desk: Runs, who: Asker) -> Response:
    try:
        _cancelled(site, desk, number, who)
    except HTTPException as refused:
        if refused.status_code != 409:  # it has just ended: its page says how
            raise
    return RedirectResponse(live("run", str(number)), 303)


@router.get("/runs/{number}/events")
async def events(
    number: Number, desk: Runs, last_event_id: Annotated[str | None, Header(max_length=20)] = None
) -> Response:
    """Server-sent events: `progress` at every change, `done` at the end."""
    run = await run_in_threadpool(_found, desk, number)
    if not run.is_open and last_event_id == str(run.revision):
        return Response(status_code=204)  # tells the browser not to ask again
    if desk.streams >= STREAMS:
        raise HTTPException(503, "Too many readers follow runs: ask again later.", {"retry-after": "5"})
    return Stream(desk, run)


async def _events(desk: Desk, run: Run) -> AsyncIterator[str]:
    yield "retry: 2000\n\n"
    async for now in desk.follow(run):
        if now is None:
            yield ": still there\n\n"
            continue
        ahead = await run_in_threadpool(desk.queue.ahead, now) if now.status == "queued" else 0
        data = {
            "status": now.status,
            "done": now.done,
            "total": now.total,
            "judged": len(now.outcomes),
            "stopping": now.is_stopping,
            "elapsed": round(now.elapsed, 1),
            "told": told(now, ahead),
        }
        kind = "progress" if now.is_open else "done"
        yield f"event: {kind}\nid: {now.revision}\ndata: {json.dumps(data)}\n\n"


def _cancelled(site: Site, desk: Desk, number: int, who: str) -> Run:
    """The run, cancelled: on a public page only by the reader who asked for it."""
    run = _refusing(lambda: desk.queue.cancel(number, None if site.settings.is_private else who))
    if run is None:
        raise HTTPException(404, "There is no such run.")
    return run


def _shown(site: Site, desk: Desk, run: Run, who: str) -> dict[str, Any]:
    page = site.content.papers.get(run.paper)
    kinds = claims_in(page.paper) if page else {}
    return {
        "run": run,
        "told": told(run, desk.queue.ahead(run)),
        "may_cancel": run.is_open and not run.is_stopping and (site.settings.is_private or run.reader == who),
        "paper": page.paper if page else None,
        "is_benchmark": run.what == ALL_BENCHMARKS or kinds.get(run.what) == "benchmark",
    }


def _found(desk: Desk, number: int) -> Run:
    run = desk.queue.get(number)
    if run is None:
        raise HTTPException(404, "There is no such run.")
    return run


def _refusing(ask: Callable[[], Answer]) -> Answer:
    try:
        return ask()
    except Refused as refused:
        headers = {"retry-after": "60"} if refused.status == 429 else None
        raise HTTPException(refused.status, str(refused), headers) from None


# --------------------------------------------------------------------------------------------------------------------
# JSON


class RunBrief(BaseModel):
    """A run.

    Attributes
    ----------
    done, total : cells; `total` is 0 until the claims are loaded.
    elapsed : seconds.
    verdict : the worst of its claims, once all are judged.
    asked, started, finished : ISO 8601 in UTC, "" when that has not happened yet.
    """

    id: int
    paper: str
    what: str
    scale: Scale
    seed: int
    status: RunStatus
    is_stopping: bool
    done: int
    total: int
    elapsed: float
    verdict: Verdict | None
    error: str
    asked: str
    started: str
    finished: str

    @classmethod
    def of(cls, run: Run) -> Self:
        return cls(**{name: getattr(run, name) for name in cls.model_fields})


class RunShown(RunBrief):
    """A run with its outcomes: of the claims that are judged, as `workingpapers check --json` prints them."""

    outcomes: list[dict[str, Any]]


NOT_THERE: dict[int | str, dict[str, Any]] = {404: {"description": "No run has this number."}}
REFUSALS: dict[int | str, dict[str, Any]] = {
    404: {"description": "There is no such paper or claim."},
    409: {"description": "The paper does not work yet."},
    429: {"description": "The queue is full, or this reader's part of it."},
}
SAME: dict[int | str, dict[str, Any]] = {200: {"model": RunShown, "description": "An equal one is there already."}}


@api.post("/runs", status_code=201, responses=SAME | REFUSALS)
def ask_json(wanted: Wanted, desk: Runs, who: Asker, response: Response) -> RunShown:
    """Queue a run; an equal one that is queued or running is returned instead, with status 200."""
    run, is_new = _refusing(lambda: desk.queue.ask(wanted.slug, wanted.what, wanted.scale, wanted.seed, who))
    response.status_code = 201 if is_new else 200
    return RunShown.of(run)


@api.get("/runs")
def overview_json(
    desk: Runs, before: Before = LAST, limit: Annotated[int, Query(ge=1, le=200)] = SHOWN
) -> list[RunBrief]:
    """Those that run and wait, in their order, then those that have ended, the youngest first."""
    waiting = desk.queue.open() if before == LAST else []
    return [RunBrief.of(run) for run in (*waiting, *desk.queue.ended(limit, before))]


@api.get("/runs/{number}", responses=NOT_THERE)
def one_json(number: Number, desk: Runs) -> RunShown:
    return RunShown.of(_found(desk, number))


@api.post("/runs/{number}/cancel", responses={**NOT_THERE, 409: {"description": "It has ended."}})
def cancel_json(number: Number, site: Here, desk: Runs, who: Asker) -> RunShown:
    """Cancel a run that is queued or running; what it measured is kept."""
    return RunShown.of(_cancelled(site, desk, number, who))
