"""What the parts of the page share: settings, state, content, the rendered pages that are kept."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Request
from markupsafe import Markup
from starlette.responses import HTMLResponse

from workingpapers.desk.page.content import Content, Current
from workingpapers.desk.page.guard import greet, token_of
from workingpapers.desk.page.render import TOKEN, Renderer
from workingpapers.desk.page.settings import Settings
from workingpapers.desk.page.state import State

KEPT = 512  # rendered pages
RENDERERS = 2  # threads: more would only take turns with each other, and with the answers that are ready

Part = TypeVar("Part")


class Site:
    """One running page; routes find it as `request.app.state.site`, or take it as `Depends(site_of)`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.state = State(settings.state)
        self.secret = self.state.secret
        self.render = Renderer(is_live=True)
        self.is_closing: Callable[[], bool] = lambda: False  # the server says so; streams end then
        self._current = Current()
        self._changes = 0
        self._kept: OrderedDict[Hashable, str] = OrderedDict()
        self._pieces: dict[Hashable, tuple[object, Markup]] = {}
        self._parts: dict[Any, Any] = {}
        self._lock = threading.RLock()  # a part may need another part
        self._making: dict[Hashable, asyncio.Future[str]] = {}
        self._renderers = CapacityLimiter(RENDERERS)

    @property
    def content(self) -> Content:
        """The papers as they are now; take it once per request."""
        return self._current.get()

    @property
    def version(self) -> str:
        """Changes with everything that pages show: evidence, stars, runs, imports."""
        return f"{self._current.get().version}-{self._changes}"

    def changed(self) -> None:
        """Something that pages show has changed: rendered pages are made anew."""
        with self._lock:
            self._changes += 1
            self._kept.clear()

    async def page(
        self, request: Request, key: Hashable, make: Callable[[], str], *, status: int = 200
    ) -> HTMLResponse:
        """The page of this key, rendered by `make` in a thread unless it is kept from an earlier request.

        Parameters
        ----------
        key : everything that `make` depends on, besides what `version` covers; None never to keep it.
        """
        if key is None:
            html = await to_thread.run_sync(make, limiter=self._renderers)
        else:
            html = await self._page((self.version, key), make)
        return self.personal(request, html, status=status)

    def personal(self, request: Request, html: str, *, status: int = 200) -> HTMLResponse:
        """The page with this reader's token in it, and the reader's cookie."""
        response = HTMLResponse(html.replace(TOKEN, token_of(request)), status)
        response.headers["cache-control"] = "private, no-cache"
        greet(request, response.headers)
        return response

    def piece(self, key: Hashable, of: object, make: Callable[[], str]) -> Markup:
        """A rendered part of pages, kept for as long as the object that it shows is the same one."""
        kept = self._pieces.get(key)
        if kept is None or kept[0] is not of:
            kept = self._pieces[key] = (of, Markup(make()))
        return kept[1]

    def part(self, make: Callable[[Site], Part]) -> Part:
        """What a part of the page keeps while the page is up; made when it is first asked for."""
        with self._lock:
            if make not in self._parts:
                self._parts[make] = make(self)
            kept: Part = self._parts[make]
            return kept

    async def _page(self, key: Hashable, make: Callable[[], str]) -> str:
        """Kept, or made once for all who ask for it in the meantime."""
        with self._lock:
            html = self._kept.get(key)
            if html is not None:
                self._kept.move_to_end(key)
                return html
        if key not in self._making:
            self._making[key] = asyncio.ensure_future(self._made(key, make))
        return await asyncio.shield(self._making[key])  # whoever leaves does not take it from the others

    async def _made(self, key: Hashable, make: Callable[[], str]) -> str:
        try:
            html = await to_thread.run_sync(make, limiter=self._renderers)
            with self._lock:
                self._kept[key] = html
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            return html
        finally:
            del self._making[key]

    def close(self) -> None:
        self.state.close()


def site_of(request: Request) -> Site:
    """The page that answers this request."""
    site: Any = request.app.state.site
    assert isinstance(site, Site)
    return site
