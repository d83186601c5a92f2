"""What every request passes first: the Host header, the size and pace of its body, the reader's token.

A reader is a random number in a cookie. The token that a state change needs is the HMAC of that number under the
page's secret: a page of another site can neither read it nor make it up, and it need not be stored.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workingpapers.desk.page.settings import Settings

COOKIE = "reader"
HEADER = "x-page-token"
FIELD = "token"
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
# what carries its own secret in the address: mail programs send it for RFC 8058, without any cookie
UNSIGNED = ("/unsubscribe/",)

UPLOADS = frozenset({"/import", "/api/import"})  # where listings arrive
UPLOAD_LIMIT = 21_000_000  # bytes; a listing may have 20 MB, a form brings some overhead
BODY_LIMIT = 200_000  # bytes, everywhere else
BODY_SECONDS = 30.0  # for the whole body to arrive
YEAR = 365 * 24 * 3600

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "font-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}

CLOSE = {"connection": "close"}  # what is still to come of a refused body is not waited for

_READER = re.compile(r"[0-9a-f]{32}")


class Guard:
    """ASGI middleware around the whole page: refuses foreign hosts and oversized or stalling bodies, adds headers.

    It also answers HEAD wherever GET has an answer.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._hosts = settings.allowed_hosts
        self._address = settings.address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page has no websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        is_head = scope["method"] == "HEAD"
        send = _adorned(send, is_head)
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        if is_head:
            scope = {**scope, "method": "GET"}
        await self._app(scope, _Body(receive, _limit(scope["path"])).receive, send)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or _name(hosts[0]) not in self._hosts:
            return _refused(400, "This page does not answer under that name; serve it with --address or --allow-host.")
        if scope["method"] not in SAFE and not scope["path"].startswith(UNSIGNED) and not self._is_own(headers):
            return _refused(403, "A change must come from the page itself.")
        limit = _limit(scope["path"])
        for length in headers.getlist("content-length"):
            if not re.fullmatch("[0-9]{1,12}", length):
                return _refused(400, "Content-Length must be a number.")
            if int(length) > limit:
                return _refused(413, _too_large(limit))
        return None

    def _is_own(self, headers: Headers) -> bool:
        """Whether the page itself asks for this change, as far as the browser says where it comes from."""
        site = headers.get("sec-fetch-site")
        if site is not None:
            return site in ("same-origin", "none")
        origin = headers.get("origin", self._address).lower()
        # a proxy in front may have turned https into http, or the Host header into its own
        return origin == self._address.lower() or origin.partition("://")[2] == headers["host"].lower()


def reader_of(request: Request) -> str:
    """The reader's number: of the cookie, or a new one, which the response must then set (`greet`)."""
    known = getattr(request.state, "reader", None)
    if known is None:
        given = request.cookies.get(COOKIE, "")
        request.state.is_new = _READER.fullmatch(given) is None
        known = request.state.reader = secrets.token_hex(16) if request.state.is_new else given
    return str(known)


def token_of(request: Request) -> str:
    """What this reader's state changes must carry."""
    return sign(request.app.state.site.secret, "reader", reader_of(request))


def greet(request: Request, headers: MutableHeaders) -> None:
    """Set the cookie of a reader who came without one."""
    reader = reader_of(request)
    if request.state.is_new:
        secure = "; Secure" if request.app.state.site.settings.secure else ""
        headers.append("set-cookie", f"{COOKIE}={reader}; Path=/; Max-Age={YEAR}; HttpOnly; SameSite=Lax{secure}")


async def require_token(request: Request) -> None:
    """Refuse a state change without the reader's token; every route of the page depends on this.

    Raises
    ------
    HTTPException : 403.
    """
    if request.method in SAFE or request.scope["path"].startswith(UNSIGNED):
        return
    given = request.headers.get(HEADER, "")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not given and kind in ("application/x-www-form-urlencoded", "multipart/form-data"):
        field = (await request.form()).get(FIELD, "")
        given = field if isinstance(field, str) else ""
    if not same(given, token_of(request)):
        raise HTTPException(403, "The form has expired, or did not come from this page. Reload the page and try again.")


Reader = Annotated[str, Depends(reader_of)]


def sign(secret: bytes, purpose: str, text: str) -> str:
    """A token for `text` that only this page can make, different for every purpose."""
    return hmac.new(secret, f"{purpose}\n{text}".encode(), hashlib.sha256).hexdigest()


def same(given: str, wanted: str) -> bool:
    """Compare tokens in constant time."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), wanted.encode())


class _Body:
    """Counts what arrives and how long it takes."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._size = 0
        self._finished = False
        self._deadline: float | None = None

    async def receive(self) -> Message:
        if self._finished:
            return await self._receive()  # waits for the reader to leave, as long as it takes
        now = asyncio.get_running_loop().time()
        self._deadline = self._deadline or now + BODY_SECONDS
        try:
            message = await asyncio.wait_for(self._receive(), self._deadline - now)
        except TimeoutError:
            raise HTTPException(408, "The request took too long to arrive.", CLOSE) from None
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise HTTPException(413, _too_large(self._limit), CLOSE)
        self._finished = not message.get("more_body", False)
        return message


def _adorned(send: Send, is_head: bool) -> Send:
    finished = False

    async def adorned(message: Message) -> None:
        nonlocal finished
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        elif is_head:
            if finished:  # the rest of a stream
                return
            finished = True
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await send(message)

    return adorned


def _refused(status: int, why: str) -> PlainTextResponse:
    return PlainTextResponse(why, status, CLOSE)


def _limit(path: str) -> int:
    return UPLOAD_LIMIT if path in UPLOADS else BODY_LIMIT


def _too_large(limit: int) -> str:
    return f"At most {limit:,} bytes."


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]/@\s]+)(?::\d{1,5})?", host.lower())
    return found[1].strip("[]").rstrip(".") if found else ""
