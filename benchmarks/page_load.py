"""Does the page stay quick under load? 200 requests a second for 30 seconds, while a check uses every core.

    python benchmarks/page_load.py [--seconds 30] [--rate 200] [--json]

A store with 100,000 measurements, the real catalogue and its evidence, `workingpapers serve` in a process of its own
that has been up for ten seconds (it loads a language model in the first of them), and a check started through the page.
Requests for the listing (whole, filtered, searched) and for the pages of papers,
with and without a reader's cookie, leave at times fixed beforehand, whether or not earlier ones have been answered;
how long one takes counts from that time, so that a stall shows in all the requests that it holds up.

The exit code is 1 when the 99th percentile reaches 100 ms, when a request fails, or when the check was not running
all the time.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from workingpapers.desk.catalogue import FIELDS, papers
from workingpapers.desk.evidence import load
from workingpapers.desk.store import COLUMNS, Store

MEASUREMENTS = 100_000
LIMIT = 0.1  # seconds, of the 99th percentile
CHECKED = "colide"  # its claims take minutes at laptop scale, and keep every core busy
SETTLED = 10.0  # seconds that the server has been up
PATIENCE = 60.0  # seconds for the server and the check to start
QUERIES = (
    *("graph", "causal discovery", "minimax", "bilevel optimization", "transport", "low rank", "preference", "kernel"),
    *("neural operator", "federated learning with compression", "diffusion", "step size", "bandit", "quantization"),
)


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="page-load-") as directory:
        store = Path(directory, "store.sqlite")
        started = time.perf_counter()
        fill(store, MEASUREMENTS)
        filled = time.perf_counter() - started
        with Server(store) as server:
            time.sleep(max(0.0, SETTLED - (time.perf_counter() - server.started)))
            run = server.start_check(CHECKED)
            before = server.cpu()
            load_ = asyncio.run(Load(server.port, requests(server.cookie), options.rate, options.seconds).go())
            used = server.cpu() - before
            is_checking = server.is_running(run)
    result = load_.summary() | {
        "filled_in": round(filled, 1),
        "server_cores": round(used / load_.took, 2),
        "check_ran_throughout": is_checking,
        "cores": os.cpu_count(),
    }
    print(json.dumps(result, indent=1) if options.json else table(result))
    return 0 if is_checking and not result["errors"] and result["all"]["p99"] < LIMIT * 1000 else 1


def fill(path: Path, count: int) -> None:
    """A store with this many measurements, spread over all papers and the claims of their evidence."""
    chance = random.Random(0)
    claims = []
    for slug in papers():
        named = {entry["claim"] for entries in load(slug)["claims"].values() for entry in entries}
        claims += [(slug, name) for name in sorted(named) or ["claim"]]
    environment = json.dumps({"device": "cpu", "python": "3.11", "workingpapers": "0"})

    def rows() -> Iterator[tuple[Any, ...]]:
        for number in range(count):
            slug, claim = claims[number % len(claims)]
            cell = json.dumps({"method": "ours", "seed": number}, sort_keys=True)
            measured = json.dumps([{"step": step, "gap": chance.random()} for step in range(3)])
            yield slug, claim, cell, "0" * 64, "done", measured, "", 0.1, "2026-01-01T00:00:00+00:00", environment

    with Store(path) as store, store.transaction() as connection:
        marks = ", ".join("?" * len(COLUMNS.split(",")))
        connection.executemany(f"INSERT INTO cells ({COLUMNS}) VALUES ({marks})", rows())


class Server:
    """`workingpapers serve` on a free port; enter it to start it."""

    def __init__(self, store: Path) -> None:
        command = Path(sys.executable).with_name("workingpapers")
        self._command = [str(command), "serve", "--port", "0", "--store", str(store)]
        self.cookie = ""
        self._token = ""

    def __enter__(self) -> Server:
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        said = self._process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", said)
        if found is None:
            raise SystemExit(f"the server did not start: {said}{self._process.stderr.read()}")
        self.port = int(found[1])
        answer = self._ask("/")  # waits in the backlog until the server answers
        self.cookie = answer.headers["set-cookie"].partition(";")[0]
        token = re.search(r'name="page-token" content="(\w+)"', answer.read().decode())
        assert token is not None
        self._token = token[1]
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        _, said = self._process.communicate(timeout=PATIENCE)
        if said:
            print(said, file=sys.stderr)

    def start_check(self, slug: str) -> int:
        """Ask for a check and wait until its first cell is measured; the number of the run."""
        wanted = json.dumps({"slug": slug, "what": "all claims", "scale": "laptop", "seed": 0}).encode()
        run = json.loads(self._ask("/api/runs", wanted).read())
        end = time.monotonic() + PATIENCE
        while not (state := self._state(run["id"]))["done"]:
            if state["status"] not in ("queued", "running") or time.monotonic() > end:
                raise SystemExit(f"the check did not start: {state}")
            time.sleep(0.2)
        return int(run["id"])

    def is_running(self, run: int) -> bool:
        return bool(self._state(run)["status"] == "running")

    def cpu(self) -> float:
        """Seconds of processor time that the server's own process has used."""
        times = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")

    def _state(self, run: int) -> dict[str, str]:
        found: dict[str, str] = json.loads(self._ask(f"/api/runs/{run}").read())
        return found

    def _ask(self, path: str, body: bytes | None = None) -> Any:
        headers = {"cookie": self.cookie, "x-page-token": self._token, "content-type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers)
        return urllib.request.urlopen(request, timeout=PATIENCE)


def requests(cookie: str) -> list[tuple[str, bytes]]:
    """Kind and bytes of the requests that are drawn from: half of them pages of papers."""
    ways = {
        "listing": ["/"] * 12,
        "filtered": [f"/?{urlencode({'field': name})}" for name in FIELDS]
        + [f"/?{urlencode({'verdict': verdict})}" for verdict in ("holds", "fails", "inconclusive")]
        + [f"/?{urlencode({'sort': sort, 'status': 'working'})}" for sort in ("evidence", "title", "trending")],
        "search": [f"/?{urlencode({'q': query})}" for query in QUERIES],
        "paper": [f"/papers/{slug}" for slug in papers()],
    }
    many = max(len(paths) for paths in ways.values())
    found = []
    for kind, paths in ways.items():
        for number in range(3 * many if kind == "paper" else many):
            for line in ("", f"Cookie: {cookie}\r\n"):
                path = paths[number % len(paths)]
                found.append((kind, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{line}\r\n".encode()))
    return found


class Load:
    """Sends requests at fixed times.

    Parameters
    ----------
    ways : kind and bytes of the requests to draw from.
    rate : a second.
    """

    def __init__(self, port: int, ways: Sequence[tuple[str, bytes]], rate: float, seconds: float) -> None:
        self._port = port
        chance = random.Random(1)
        self._plan = [(number / rate, *chance.choice(ways)) for number in range(round(rate * seconds))]
        self._idle: list[Connection] = []
        self._left = len(self._plan)
        self._finished = asyncio.Event()
        self.times: dict[str, list[float]] = defaultdict(list)
        self.lags: list[float] = []
        self.errors: Counter[str] = Counter()
        self.opened = 0
        self.took = 0.0

    async def go(self) -> Load:
        loop = asyncio.get_running_loop()
        gc.collect()
        gc.disable()  # what stalls here would count against the server
        start = loop.time() + 0.1
        opening = set()
        for due, kind, request in self._plan:
            wait = start + due - loop.time()
            if wait > 0:
                await asyncio.sleep(wait)
            self.lags.append(loop.time() - start - due)
            if self._idle:
                self._idle.pop().send(kind, start + due, request)
            else:
                task = asyncio.ensure_future(self._open(kind, start + due, request))
                opening.add(task)
                task.add_done_callback(opening.discard)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._finished.wait(), PATIENCE)
        if self._left:
            self.errors["no answer"] += self._left
        self.took = loop.time() - start
        gc.enable()
        return self

    async def _open(self, kind: str, due: float, request: bytes) -> None:
        try:
            loop = asyncio.get_running_loop()
            _, opened = await loop.create_connection(lambda: Connection(self), "127.0.0.1", self._port)
        except OSError as trouble:
            self.answered(kind, 0.0, f"cannot connect: {trouble}")
            return
        self.opened += 1
        opened.send(kind, due, request)

    def answered(self, kind: str, seconds: float, error: str = "") -> None:
        if error:
            self.errors[error] += 1
        else:
            self.times[kind].append(seconds)
        self._left -= 1
        if not self._left:
            self._finished.set()

    def idle(self, connection: Connection) -> None:
        self._idle.append(connection)

    def lost(self, connection: Connection) -> None:
        with suppress(ValueError):
            self._idle.remove(connection)

    def summary(self) -> dict[str, Any]:
        everything = [seconds for times in self.times.values() for seconds in times]
        return {
            "requests": len(self._plan),
            "seconds": round(self.took, 2),
            "connections": self.opened,
            "errors": dict(self.errors),
            "all": percentiles(everything),
            "kinds": {kind: percentiles(times) for kind, times in sorted(self.times.items())},
            "lag_of_the_generator": percentiles(self.lags),
        }


@dataclass(eq=False)
class Connection(asyncio.Protocol):
    """A connection that is kept open; one request at a time."""

    load: Load
    _got: bytearray = field(default_factory=bytearray)
    _kind: str = ""
    _due: float = 0.0
    _end: int = -1  # of the answer in `_got`, once its headers are there

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, kind: str, due: float, request: bytes) -> None:
        self._kind, self._due, self._end = kind, due, -1
        self._got.clear()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._got += data
        if self._end < 0:
            head = self._got.find(b"\r\n\r\n")
            if head < 0:
                return
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self._got[:head])
            if length is None:
                self._done("an answer without a length")
                return
            self._end = head + 4 + int(length[1])
        if len(self._got) >= self._end:
            status = self._got[9:12].decode("latin-1")
            self._done("" if status == "200" else f"status {status}")

    def connection_lost(self, error: Exception | None) -> None:
        self.load.lost(self)
        if self._kind:
            self._done(f"connection lost: {error}")

    def _done(self, error: str = "") -> None:
        kind, self._kind = self._kind, ""
        now = asyncio.get_running_loop().time()
        self.load.answered(kind, now - self._due, error)
        if not self._transport.is_closing():
            self.load.idle(self)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Count and milliseconds."""
    if not seconds:
        return {"n": 0}
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)] * 1000, 1)

    return {"n": len(ordered), "p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "max": at(1.0)}


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['requests']} requests in {result['seconds']} s over {result['connections']} connections, "
        f"errors: {result['errors'] or 'none'}",
        f"{'milliseconds':24}{'n':>7}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}",
    ]
    rows = {**result["kinds"], "all": result["all"], "lag of the generator": result["lag_of_the_generator"]}
    for name, row in rows.items():
        lines.append(f"{name:24}" + "".join(f"{row.get(key, '-'):>{7 if key == 'n' else 9}}"
                                            for key in ("n", "p50", "p95", "p99", "max")))  # fmt: skip
    lines.append(f"the server used {result['server_cores']} of {result['cores']} cores; "
                 f"the check ran throughout: {'yes' if result['check_ran_throughout'] else 'no'}")  # fmt: skip
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
