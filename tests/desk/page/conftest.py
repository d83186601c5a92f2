"""The page over a catalogue of two papers: in process (`client`), on a real port (`address`), in a browser (`tab`)."""

import asyncio
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvicorn
from starlette.testclient import TestClient

from workingpapers.desk import supervisor
from workingpapers.desk.page.app import create_app
from workingpapers.desk.page.settings import Settings

CHROMIUM = "/usr/bin/chromium"
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip


@pytest.fixture
def settings(toy, tmp_path):
    return Settings(store=tmp_path / "store.sqlite", jobs=1)


@pytest.fixture
def client(settings):
    """Requests to the page in this process; the cookie is kept from one to the next."""
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8600") as found:
        yield found


@pytest.fixture
def token(client):
    """What a state change of this client must carry."""
    return token_in(client.get("/").text)


def finished(coroutine):
    """What a coroutine comes to; in a thread of its own, because Playwright keeps an event loop in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def token_in(html):
    return re.search(r'<meta name="page-token" content="([0-9a-f]{64})">', html)[1]


@pytest.fixture
def address(settings):
    """Where the page is served by uvicorn, on a port of its own."""
    with served(settings) as found:
        yield found


class served:  # noqa: N801 - reads as a verb
    """Serve the page in a thread of this process; enter it for the address."""

    def __init__(self, settings, app=None):
        app = app or create_app(settings)
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
        app.state.site.is_closing = lambda: self.server.should_exit
        self._thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self._thread.start()
        while not self.server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def __exit__(self, *error):
        self.server.should_exit = True
        self._thread.join(10)


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium; tests without it are skipped, except where WORKINGPAPERS_BROWSER=required."""
    if not Path(CHROMIUM).exists():
        missing = f"no {CHROMIUM}: apt-get install chromium"
        assert os.environ.get("WORKINGPAPERS_BROWSER") != "required", missing
        pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield started
        started.close()


@pytest.fixture
def tab(browser):
    """A fresh browser context; the test fails on any error that the page's scripts or its policy raise."""
    context = browser.new_context()
    found = context.new_page()
    found.set_default_timeout(10_000)
    problems = []
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    yield found
    context.close()
    assert not problems, problems


TOY_RUN = """
import json, sys, time
from pathlib import Path
given = json.loads(sys.argv[1])
sys.path[:] = given.pop("path")
import workingpapers.claims.optimization as field
import workingpapers.desk.run as runs
from workingpapers.desk import catalogue, supervisor
claims, pause, measure = Path(sys.argv[2]), Path(sys.argv[3]), runs.measure
field.__path__.append(str(claims / "optimization"))
catalogue._claims_directory = lambda: claims
catalogue._catalogue = lambda: {"toy": catalogue.Paper(
    "toy", "A Toy", "optimization", "optimization.toy", "2401.00000", "", ("Jul 29",), ("solve",), "minimises toys")}
def patient(*cell):
    while pause.exists():
        time.sleep(0.01)
    return measure(*cell)
runs.measure = patient
supervisor.main(**{**given, "jobs": 0})
"""


@pytest.fixture
def toy_runs(toy, tmp_path, monkeypatch):
    """Runs of the toy are done as real ones are; no cell is measured as long as the file that this gives exists."""
    pause = tmp_path / "pause"

    def command(run, store, jobs):
        *_, given = plain(run, store, jobs)
        return [sys.executable, "-c", TOY_RUN, given, str(tmp_path / "claims"), str(pause)]

    plain = supervisor.command
    monkeypatch.setattr(supervisor, "command", command)
    return pause
