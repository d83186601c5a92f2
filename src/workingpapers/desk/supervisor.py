"""Doing the runs of the queue, one after the other, each in a process of its own.

The page's server never loads a claim: it starts a process for each run, which has the worker processes in turn, sees
the source as it is now, and is less urgent to the machine than answering readers. The two talk over pipes. The
process tells how far it is, one JSON object a line; when its standard input closes, because the run is cancelled or
the server has stopped or died, it ends its workers and itself. What was measured until then is in the store.
"""

from __future__ import annotations

import json
import logging
import os
import queue as queues
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from workingpapers.desk.catalogue import paper
from workingpapers.desk.claim import Scale
from workingpapers.desk.queue import ALL_BENCHMARKS, ALL_CLAIMS, Queue, Run

__all__ = ["Supervisor", "carry_out", "command", "main"]

LOOK = 0.25  # seconds between looks at the queue, and between reports of progress
GRACE = 2.0  # seconds for the process of a run to end its workers
NICENESS = 10  # of everything that measures
QUOTED = 4_000  # characters of an error, or of the output of a process that died
INTERRUPTED = 130  # exit code
CRASHES = 10  # quoted of one claim
START = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given.pop('path'); "
    "from workingpapers.desk.supervisor import main; main(**given)"
)


def command(run: Run, store: Path, jobs: int | None) -> list[str]:
    """What to execute for a run."""
    given = {
        "slug": run.paper,
        "what": run.what,
        "scale": run.scale,
        "seed": run.seed,
        "store": str(store),
        "jobs": jobs,
        "path": sys.path,
    }
    return [sys.executable, "-c", START, json.dumps(given)]


class Supervisor:
    """A thread that does the runs, as long as no other process on the same queue has one.

    Parameters
    ----------
    queue : of the runs.
    lock : file that the working supervisor holds; its lock goes with the process, however that ends.
    command : what to execute for a run.
    """

    def __init__(self, queue: Queue, lock: Path, command: Callable[[Run], Sequence[str]]) -> None:
        self._queue = queue
        self._lock = FileLock(lock)
        self._command = command
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="runs", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the run that is being done, which goes back to the queue."""
        self._stopping.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._lock.acquire(timeout=0):
                    self._queue.recover()
                    self._work_alone()
            except Timeout:
                pass  # another process does the runs
            except Exception:  # the disk is full, say: try again later
                logging.getLogger(__name__).exception("runs are held up")
            self._stopping.wait(LOOK)

    def _work_alone(self) -> None:
        while not self._stopping.is_set():
            run = self._queue.take()
            if run is None:
                self._stopping.wait(LOOK)
            else:
                try:
                    self._do(run)
                except Exception:
                    self._queue.finish(run.id, "failed", _quoted(traceback.format_exc()))

    def _do(self, run: Run) -> None:
        child = Child(self._command(run))
        try:
            self._follow(run, child)
        finally:
            child.end()

    def _follow(self, run: Run, child: Child) -> None:
        done = total = 0
        outcomes: list[dict[str, Any]] = []
        is_told, is_finished, error = True, False, ""
        looked = 0.0
        while True:
            message = child.heard(LOOK)
            done, total = message.get("done", done), message.get("total", total)
            outcomes += message.get("outcomes", [])
            is_finished = is_finished or message.get("finished", False)
            error = message.get("error", error)
            is_told = is_told and not message
            if child.is_silent or time.monotonic() - looked >= LOOK:
                looked = time.monotonic()
                if not is_told:
                    self._queue.advance(run.id, done, total, outcomes)
                    is_told = True
                if child.is_silent:
                    break
                if self._stopping.is_set() or self._queue.is_stopping(run.id):
                    child.end()
                    if self._stopping.is_set():
                        self._queue.recover()
                    else:
                        self._queue.finish(run.id, "cancelled")
                    return
        if is_finished:
            self._queue.finish(run.id, "done")
        else:
            self._queue.finish(run.id, "failed", error or child.last_words())


class Child:
    """The process of a run, as the supervisor sees it.

    Attributes
    ----------
    is_silent : all that it will ever say has been heard.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.is_silent = False
        self._heard: queues.SimpleQueue[dict[str, Any] | None] = queues.SimpleQueue()
        self._output = tempfile.TemporaryFile("a+b")  # noqa: SIM115, it lives as long as the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C in the terminal is the server's to answer
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def heard(self, timeout: float) -> dict[str, Any]:
        """What it says next; empty when it says nothing in time, or nothing more."""
        try:
            message = self._heard.get(timeout=timeout)
        except queues.Empty:
            return {}
        self.is_silent = message is None
        return message or {}

    def end(self) -> None:
        """Let it end its workers and itself, and see to it that it does; more than once is fine."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError, PermissionError):
                if hasattr(os, "killpg"):
                    os.killpg(self._process.pid, signal.SIGKILL)
                else:
                    self._process.kill()
            self._process.wait()
        self._output.close()

    def last_words(self) -> str:
        """Why it ended without saying so itself."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        self._output.seek(0)
        said = self._output.read().decode(errors="replace").strip()
        return _quoted(f"The process of this run ended with code {self._process.poll()}.\n\n{said}".strip())

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if line.endswith("\n"):
                    self._heard.put(json.loads(line))
        self._heard.put(None)


# --------------------------------------------------------------------------------------------------------------------
# The process of a run


def main(slug: str, what: str, scale: Scale, seed: int, store: str, jobs: int | None) -> None:
    """Do a run, telling on standard output how far it is, until it is done or standard input closes."""
    from workingpapers.desk.worker import private_streams

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a server started in the background ignores it
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    requests, replies = private_streams()
    threading.Thread(target=_end_with, args=(requests.fileno(),), daemon=True).start()

    def tell(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        # the process of a server that was killed may be about to end: two would measure the same cells
        with FileLock(f"{store}.run.lock"):
            carry_out(slug, what, scale, seed, Path(store), jobs, tell)
        tell(finished=True)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)  # the workers have ended; taking torch down in order would only take time
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        tell(error=_quoted(f"{type(error).__name__}: {error}"))


def carry_out(
    slug: str, what: str, scale: Scale, seed: int, store: Path, jobs: int | None, tell: Callable[..., None]
) -> None:
    """Check the claims of a run, and tell of every cell and every outcome.

    Raises
    ------
    LookupError : the claim is no longer there.
    ValueError : nothing is to be measured at this scale.
    """
    from workingpapers.desk.check import check
    from workingpapers.desk.run import Pool
    from workingpapers.desk.source import load_claims
    from workingpapers.desk.store import Result, Store

    kind = "benchmark" if what == ALL_BENCHMARKS else "claim"
    claims = [
        claim
        for claim in load_claims(paper(slug).module)
        if claim.name == what or (what in (ALL_CLAIMS, ALL_BENCHMARKS) and claim.kind == kind)
    ]
    if not claims:
        raise LookupError(f"{slug} has no longer a claim {what}")
    total = sum(len({cell.key for cell in claim.cells(scale, seed)}) for claim in claims)
    if not total:
        raise ValueError(f"nothing is measured at {scale} scale: choose another one")
    tell(total=total)
    done = 0

    def advance(result: Result) -> None:
        nonlocal done
        done += 1
        tell(done=done)

    with Store(store) as opened, Pool(jobs) as pool:
        for claim in claims:
            outcome = check(claim, scale=scale, seed=seed, store=opened, pool=pool, progress=advance)
            if outcome is not None:
                tell(outcomes=[_shortened(outcome.as_json())])


def _shortened(outcome: dict[str, Any]) -> dict[str, Any]:
    """Without most of the tracebacks when many cells crashed; the store has them all."""
    from workingpapers.desk.check import finite_json

    crashed = [{**cell, "error": _quoted(cell["error"])} for cell in outcome["crashed"][:CRASHES]]
    return dict(finite_json({**outcome, "crashed": crashed, "crashes": len(outcome["crashed"])}))


def _end_with(requests: int) -> None:
    """When standard input closes, end this process; the workers end with it."""
    while os.read(requests, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)  # wakes the main thread, whatever it waits for
    time.sleep(GRACE / 2)
    os._exit(INTERRUPTED)


def _quoted(text: str) -> str:
    """The end of a text, where a traceback says what happened."""
    return text if len(text) <= QUOTED else f"…{text[-QUOTED:]}"
