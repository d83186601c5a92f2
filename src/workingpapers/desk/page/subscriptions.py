"""Atom feeds, and subscribing to the digest: ask, confirm, change, leave."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Form, Request
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from workingpapers.desk.catalogue import FIELDS
from workingpapers.desk.digest import Postman
from workingpapers.desk.feed import News, atom
from workingpapers.desk.mail import ADDRESS_LIMIT, BadAddress, transport
from workingpapers.desk.page.guard import Reader, sign
from workingpapers.desk.page.render import live
from workingpapers.desk.page.site import Site, site_of
from workingpapers.desk.subscribers import Choice, Subscriber, Subscribers, TooMany

CHECK = 60.0  # seconds between looks at what is due
LEAVING = 5.0  # seconds for a mail that is being sent when the page stops
TOLD = "If mail reaches that address, a message with a link is on its way to it. The link holds for seven days."
UNKNOWN = "This link has expired, was used before, or is not whole."

router = APIRouter(include_in_schema=False)
api = APIRouter(prefix="/api", tags=["subscribe"])
Here = Annotated[Site, Depends(site_of)]
Rhythm = Literal["daily", "weekly"]
FormFields = Annotated[list[Annotated[str, Field(max_length=40)]], Form(alias="field", max_length=len(FIELDS))]
FormRhythm = Annotated[Rhythm, Form()]

_log = logging.getLogger(__name__)


class Desk:
    """What this part of a page works with.

    Attributes
    ----------
    clock : tells the time, in UTC.
    postman : sends in a thread of its own while the page runs.
    """

    def __init__(self, site: Site) -> None:
        self.clock: Callable[[], datetime] = lambda: datetime.now(UTC)
        self.news = News(site.state, site.settings.store)
        self.subscribers = Subscribers(site.state)
        deliver = transport(site.settings)
        self.postman = Postman(site.settings, site.state, self.news, self.subscribers, deliver)
        self.identity = uuid.UUID(sign(site.secret, "feeds", "")[:32])
        self._work = threading.Event()
        self._stopped = False

    def wake(self) -> None:
        """Have the postman look now."""
        self._work.set()

    def run(self, site: Site) -> None:
        """Send what is due until `stop`."""
        while not self._stopped:
            try:
                self.postman.round(site.content, self.clock())
            except Exception:  # whatever it is, the next round may do better
                if not self._stopped:
                    _log.exception("the digest could not be sent")
            self._work.wait(CHECK)
            self._work.clear()

    def stop(self) -> None:
        self._stopped = True
        self._work.set()


def desk_of(site: Site) -> Desk:
    """The desk of a page, one for each."""
    return site.part(Desk)


@asynccontextmanager
async def lifespan(site: Site) -> AsyncIterator[None]:
    """Send mails in the background while the page runs."""
    desk = desk_of(site)
    thread = threading.Thread(target=desk.run, args=(site,), name="digest", daemon=True)
    thread.start()
    yield
    desk.stop()
    await asyncio.to_thread(thread.join, LEAVING)


# --------------------------------------------------------------------------------------------------------------------
# Feeds


@router.api_route("/feeds/{name}.atom", methods=["GET", "HEAD"])
def feed(request: Request, name: str, site: Here) -> Response:
    if name != "all" and name not in FIELDS:
        raise HTTPException(404, "There is no such feed.")
    desk = desk_of(site)
    now = desk.clock()
    desk.news.refresh(site.content, now)
    field = "" if name == "all" else name
    items = desk.news.youngest(field)
    began = desk.news.began(now)
    body = atom(items, address=site.settings.address, field=field, identity=desk.identity, updated=began)
    changed = datetime.fromisoformat(max((item.seen for item in items), default=began))
    headers = {
        "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "last-modified": format_datetime(changed, usegmt=True),
        "cache-control": "public, max-age=300",
        # feeds are for other programs, also for those that run in a browser
        "cross-origin-resource-policy": "cross-origin",
    }
    if _is_fresh(request, headers["etag"], changed):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/atom+xml; charset=utf-8", headers=headers)


def _is_fresh(request: Request, etag: str, changed: datetime) -> bool:
    """Whether the reader has this very feed already (RFC 9110, 13.1)."""
    known = request.headers.get("if-none-match")
    if known is not None:
        return known.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in known.split(","))
    try:
        since = parsedate_to_datetime(request.headers.get("if-modified-since", ""))
    except ValueError:
        return False
    return since.tzinfo is not None and changed <= since


class Feed(BaseModel):
    """An Atom feed of the page."""

    field: str = Field(description="name of the field, `all` for the feed of all")
    label: str
    address: str


@api.get("/feeds")
async def feeds(site: Here) -> list[Feed]:
    """The Atom feeds."""
    labels = {"all": "All fields", **FIELDS}
    return [
        Feed(field=name, label=label, address=site.settings.address + live("feed", name))
        for name, label in labels.items()
    ]


# --------------------------------------------------------------------------------------------------------------------
# Asking and confirming


@router.get("/subscribe")
async def form(request: Request, site: Here) -> Response:
    return await site.page(request, "subscribe", lambda: _form(site))


@router.post("/subscribe")
def ask(
    request: Request,
    site: Here,
    reader: Reader,
    address: Annotated[str, Form(max_length=2 * ADDRESS_LIMIT)],
    wanted: FormFields = [],  # noqa: B006 - FastAPI copies it
    rhythm: FormRhythm = "weekly",
) -> Response:
    try:
        _ask(request, site, reader, address, wanted, rhythm)
    except BadAddress as wrong:
        html = _form(site, problem=str(wrong), given=address, wanted=wanted, rhythm=rhythm)
        return site.personal(request, html, status=422)
    return RedirectResponse(live("asked"), 303)


@router.get("/subscribe/asked")
async def asked(request: Request, site: Here) -> Response:
    def make() -> str:
        return site.render(
            "subscribe_asked.html", here="subscribe", told=TOLD, has_server=site.settings.smtp is not None
        )

    return await site.page(request, "asked", make)


@router.get("/subscribe/confirm/{token}")
def show_request(request: Request, token: str, site: Here) -> Response:
    desk = desk_of(site)
    found = desk.subscribers.request(token, desk.clock())
    if found is None or found.is_confirmed:
        raise HTTPException(404, UNKNOWN)
    html = site.render("subscribe_confirm.html", here="subscribe", action=live("confirm", token), found=found)
    return _private(site, request, html)


@router.post("/subscribe/confirm/{token}")
def confirm(token: str, site: Here) -> Response:
    desk = desk_of(site)
    now = desk.clock()
    desk.news.refresh(site.content, now)
    found = desk.subscribers.confirm(token, now, desk.news.last)
    if found is None:
        raise HTTPException(404, UNKNOWN)
    return RedirectResponse(live("unsubscribe", desk.subscribers.token(found)), 303)


class Wish(BaseModel):
    """What to send, and where to."""

    address: str = Field(max_length=2 * ADDRESS_LIMIT, examples=["name@example.org"])
    fields: list[Literal[tuple(FIELDS)]] = Field(  # type: ignore[valid-type]
        default=[], max_length=len(FIELDS), description="none for all"
    )
    rhythm: Rhythm = "weekly"


class Answer(BaseModel):
    """What was done."""

    told: str


@api.post(
    "/subscriptions",
    status_code=202,
    responses={
        403: {"description": "The token of the page is missing."},
        429: {"description": "Too many were asked for; Retry-After says when to try again."},
    },
)
def subscribe(request: Request, site: Here, reader: Reader, wish: Wish) -> Answer:
    """Ask for the digest. It comes once the link in the mail that follows has been opened and confirmed."""
    try:
        _ask(request, site, reader, wish.address, wish.fields, wish.rhythm)
    except BadAddress as wrong:
        raise HTTPException(422, str(wrong)) from None
    return Answer(told=TOLD)


def _ask(request: Request, site: Site, reader: str, address: str, wanted: list[str], rhythm: str) -> None:
    desk = desk_of(site)
    try:
        choice = Choice.of(wanted, rhythm)
    except ValueError as wrong:
        raise HTTPException(422, str(wrong)) from None
    try:
        host = request.client.host if request.client else ""
        desk.subscribers.ask(address, choice, reader=reader, host=host, now=desk.clock())
    except TooMany as refused:
        raise HTTPException(429, str(refused), {"retry-after": str(refused.seconds)}) from None
    desk.wake()


# --------------------------------------------------------------------------------------------------------------------
# The subscriber's own page: its address is secret, so it needs no other token (see `guard.UNSIGNED`)


@router.get("/unsubscribe/{token}")
def show_subscription(request: Request, token: str, site: Here) -> Response:
    return _subscription(request, token, site)


@router.post("/unsubscribe/{token}")
def unsubscribe(request: Request, token: str, site: Here) -> Response:
    desk = desk_of(site)
    desk.subscribers.unsubscribe(_subscriber(desk, token), desk.clock())
    return _subscription(request, token, site)  # no redirect: RFC 8058, 3.1 forbids it


@router.post("/unsubscribe/{token}/choices")
def change(
    token: str,
    site: Here,
    wanted: FormFields = [],  # noqa: B006 - FastAPI copies it
    rhythm: FormRhythm = "weekly",
) -> Response:
    desk = desk_of(site)
    found = _subscriber(desk, token)
    try:
        choice = Choice.of(wanted, rhythm)
    except ValueError as wrong:
        raise HTTPException(422, str(wrong)) from None
    desk.subscribers.change(found, choice, desk.clock())
    return RedirectResponse(live("unsubscribe", token), 303)


def _subscriber(desk: Desk, token: str) -> Subscriber:
    found = desk.subscribers.of(token)
    if found is None:
        raise HTTPException(404, UNKNOWN)
    return found


def _subscription(request: Request, token: str, site: Site) -> Response:
    desk = desk_of(site)
    found = _subscriber(desk, token)
    missed = [
        (made, desk.news.between(after, upto, found.choice.fields)[:100])
        for after, upto, made in desk.subscribers.missed(found)
    ]
    html = site.render(
        "unsubscribe.html",
        here="subscribe",
        found=found,
        missed=missed,
        leave=live("unsubscribe", token),
        choices=live("choices", token),
        has_server=site.settings.smtp is not None,
    )
    return _private(site, request, html)


def _form(
    site: Site, problem: str = "", given: str = "", wanted: list[str] | None = None, rhythm: str = "weekly"
) -> str:
    return site.render(
        "subscribe.html",
        here="subscribe",
        has_server=site.settings.smtp is not None,
        problem=problem,
        given=given,
        wanted=wanted or [],
        rhythm=rhythm,
    )


def _private(site: Site, request: Request, html: str) -> Response:
    """A page whose address is a secret: nobody keeps it, nobody learns of it."""
    response = site.personal(request, html)
    response.headers["cache-control"] = "no-store"
    response.headers["x-robots-tag"] = "noindex"
    return response
