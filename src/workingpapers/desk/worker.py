"""Measuring a cell, and the worker process that does it away from everything else.

A worker reads requests from its standard input and writes replies to its standard output, one JSON object a line.
What the measurement prints goes to its standard error, which the parent quotes when the worker dies.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from workingpapers.desk.claim import Cell, Claim, Row
from workingpapers.desk.evidence import device, versions
from workingpapers.desk.source import claims_of, fingerprint


@dataclass(frozen=True)
class Measured:
    """What one attempt at a cell came to; the fields are those of `store.Result`."""

    status: Literal["done", "crashed"]
    rows: list[Row] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """Which claim to measure, for a process that has to import it.

    Attributes
    ----------
    module, claim : where to import it from, and its name.
    source : its fingerprint; a process that finds another source refuses.
    alone : whether nothing else may run beside its cells.
    """

    module: str
    claim: str
    source: str
    alone: bool

    @classmethod
    def of(cls, claim: Claim, source: str) -> Order:
        return cls(claim.measure.__module__, claim.name, source, claim.kind == "benchmark")


def measure(claim: Claim, cell: Cell, warm: set[tuple[str, ...]]) -> Measured:
    """Measure a cell in this process; whatever it raises, except KeyboardInterrupt, becomes a crash.

    Parameters
    ----------
    warm : the benchmark points and contenders that this process has run already, to which this one is added. The
        first of each is run once untimed, so that imports, compilation and caches do not count.
    """
    started = time.perf_counter()
    try:
        if claim.kind == "benchmark":
            point = {axis: value for axis, value in cell.values.items() if axis != "round"}
            ready = (claim.measure.__module__, claim.name, Cell(point).key)
            if ready not in warm:
                claim.rows(cell)
                warm.add(ready)
        started = time.perf_counter()
        rows = [_plain(row, cell) for row in claim.rows(cell)]
        if not rows:
            raise ValueError("the measurement returned no row")
    except (Exception, SystemExit) as error:
        return Measured("crashed", [], _explained(error), time.perf_counter() - started, _environment())
    return Measured("done", rows, "", time.perf_counter() - started, _environment())


def _plain(row: Row, cell: Cell) -> Row:
    """The row with NumPy and torch scalars as Python's."""
    plain: Row = {}
    for column, value in row.items():
        if column in cell.values:
            raise ValueError(f"column {column!r} of the measurement repeats an axis of the grid")
        if getattr(value, "ndim", None) == 0:
            value = value.item()
        if not isinstance(column, str) or not isinstance(value, bool | int | float | str):
            kind = type(value).__name__
            raise TypeError(f"column {column!r} must be a number, a truth value or a short text, got {kind}: {value!r}")
        plain[column] = value
    return plain


def _explained(error: BaseException) -> str:
    """The traceback, from the measurement's own frames on."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None:
        if not frames.tb_frame.f_globals.get("__name__", "").startswith("workingpapers.desk."):
            break
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()


def _environment() -> dict[str, Any]:
    return _described("torch" in sys.modules)


@functools.cache
def _described(torch_loaded: bool) -> dict[str, Any]:  # a GPU is only seen once torch is there
    return {"device": device(), "versions": versions()}


# --------------------------------------------------------------------------------------------------------------------
# The worker process


def main(threads: int, timeout: float | None) -> None:
    """Measure what comes in until standard input closes.

    Parameters
    ----------
    threads : for torch; the libraries that read the environment have been told there.
    timeout : seconds after which the parent will kill a measurement; a traceback is written just before.
    """
    with suppress(ValueError):  # only the main thread may; Ctrl-C is the parent's to answer
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = private_streams()
    faulthandler.enable()
    with suppress(OSError):  # Linux: when memory runs out, this process goes and not the parent
        Path("/proc/self/oom_score_adj").write_text("500")
    inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    busy = threading.Event()  # from a request's arrival to its answer
    threading.Thread(target=_read, args=(requests, inbox, busy), daemon=True).start()

    known: dict[tuple[str, str], tuple[Claim, str]] = {}
    warm: set[tuple[str, ...]] = set()
    while (request := inbox.get()) is not None:
        measured = _answer(request, known, warm, threads, timeout, replies)
        busy.clear()  # before the reply, on which the next request may come
        _reply(replies, asdict(measured))


def _answer(
    request: dict[str, Any],
    known: dict[tuple[str, str], tuple[Claim, str]],
    warm: set[tuple[str, ...]],
    threads: int,
    timeout: float | None,
    replies: IO[str],
) -> Measured:
    name = (request["module"], request["claim"])
    try:
        if name not in known:
            known[name] = _loaded(*name)
        claim, source = known[name]
        if source != request["source"]:
            raise RuntimeError(f"the source of {name[1]} in {name[0]} is not the one this run began with: run it again")
    except (Exception, SystemExit) as error:
        return Measured("crashed", [], _explained(error))
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
    if timeout is not None:
        _reply(replies, {"started": True})
        faulthandler.dump_traceback_later(timeout)
    try:
        return measure(claim, Cell(request["cell"]), warm)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _loaded(module: str, name: str) -> tuple[Claim, str]:
    """A claim, and the fingerprint of the source it has just been imported from."""
    for claim in claims_of(importlib.import_module(module)):
        if claim.name == name:
            return claim, fingerprint(claim)
    raise LookupError(f"{module} has no claim {name}")


def private_streams() -> tuple[IO[str], IO[str]]:
    """Standard input and output under other descriptors, so that a measurement can neither read nor write them."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, replies


def _read(requests: IO[str], inbox: queue.SimpleQueue[dict[str, Any] | None], busy: threading.Event) -> None:
    """Pass requests on; when the parent is gone, end this process and those it started."""
    for line in requests:
        busy.set()  # here: the parent may be gone before the main thread has taken the request
        inbox.put(json.loads(line))
    if busy.is_set():
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)
    inbox.put(None)


def _reply(replies: IO[str], message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()
