"""Measuring the cells of a claim: what the store has is reused, the rest is measured and committed cell by cell.

The cells of a claim are independent, so they run in worker processes, one per core, with the threads of torch and BLAS
divided among them. A benchmark's cells run in order in one worker that has all cores, with nothing else running.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Protocol, Self

from workingpapers.common.validation import check_integer, check_number
from workingpapers.desk.claim import Cell, Claim
from workingpapers.desk.source import fingerprint
from workingpapers.desk.store import Result, Store
from workingpapers.desk.worker import Measured, Order, measure

__all__ = ["Pool", "run", "usable_cores"]

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
)
START = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given.pop('path'); "
    "from workingpapers.desk.worker import main; main(**given)"
)
LOADING = 60.0  # seconds to import a claims module, on top of the time limit of its cells
LAST_WORDS = 0.2  # seconds that a worker gets to write its traceback when its time is up
PATROL = 0.5  # seconds between looks at workers that may have died silently
DYING = 5.0  # seconds for a process to end by itself
QUOTED = 4_000  # characters of a dead worker's output

Measurements = Generator[tuple[Cell, Measured], None, None]


class Runner(Protocol):
    """Measures cells somewhere."""

    def measure(self, claim: Claim, cells: Sequence[Cell], source: str) -> Measurements:
        """Yield each cell with what it came to, as they finish; closing the generator stops those being measured."""

    def close(self) -> None: ...


class Pool:
    """Where cells are measured; the worker processes stay warm from one claim to the next.

    A worker keeps the source that it has imported: after an edit, make a new pool.

    Parameters
    ----------
    jobs : worker processes, by default one per usable core; 0 measures in this process, without protection from
        cells that crash it, but with their output and a debugger at hand.
    timeout : seconds that one cell may take (a benchmark's first cells with their warm-up), by default any.
    on : None for this machine, "ray" for the Ray cluster at hand (one is started here when there is none), or its
        address "ray://host:port"; see `desk.cluster`. Benchmarks stay on this machine, where nothing else
        runs beside them.

    Raises
    ------
    ValueError, TypeError : jobs, timeout or on is out of range, or they contradict each other.
    ImportError : Ray is wanted and absent.
    """

    def __init__(self, jobs: int | None = None, timeout: float | None = None, on: str | None = None) -> None:
        if jobs is not None:
            check_integer("jobs", jobs, at_least=0)
        if timeout is not None:
            check_number("timeout", timeout, above=0)
        if jobs == 0 and timeout is not None:
            raise ValueError("timeout needs worker processes, got jobs=0, which measures in this process")
        if jobs is not None and on is not None:
            raise ValueError(f"jobs is decided by the cluster's size, got jobs={jobs} with on={on!r}")
        self._here: Runner = InProcess() if jobs == 0 else Processes(jobs, timeout)
        self._cluster: Runner | None = None
        if on is not None:
            from workingpapers.desk.cluster import RayCluster

            self._cluster = RayCluster(on, timeout)

    def measure(self, claim: Claim, cells: Sequence[Cell], source: str) -> Measurements:
        """Yield each cell with what it came to, as they finish; closing the generator stops those being measured.

        Parameters
        ----------
        source : the claim's fingerprint; a worker that finds another one on its side refuses.
        """
        runner = self._here if self._cluster is None or claim.kind == "benchmark" else self._cluster
        return runner.measure(claim, cells, source)

    def close(self) -> None:
        """End the worker processes."""
        self._here.close()
        if self._cluster is not None:
            self._cluster.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run(
    claim: Claim,
    cells: Sequence[Cell],
    *,
    store: Store,
    pool: Pool | None = None,
    fresh: bool = False,
    progress: Callable[[Result], None] | None = None,
) -> list[Result]:
    """The results of the cells, in their order; each is committed to the store as soon as it is there.

    Cells that the store has under the claim's present fingerprint are not measured again, unless they crashed. The
    rounds of a benchmark belong together: if one cell is missing, all are measured.

    Parameters
    ----------
    claim : what to measure.
    cells : of its grid; equal ones are measured once.
    store : of the results.
    pool : where to measure; by default one for this call alone.
    fresh : measure every cell, whatever the store has.
    progress : called with every distinct result, those of the store first.

    Raises
    ------
    KeyboardInterrupt : after ending the cells being measured; what was measured is in the store.
    """
    if pool is None:
        with Pool() as own:
            return run(claim, cells, store=store, pool=own, fresh=fresh, progress=progress)
    source = fingerprint(claim)
    wanted = {cell.key: cell for cell in cells}
    results = {} if fresh else store.get(claim.paper, claim.name, cells, source)
    results = {key: result for key, result in results.items() if result.status == "done"}
    if claim.kind == "benchmark" and len(results) < len(wanted):
        results = {}
    if progress is not None:
        for result in results.values():
            progress(result)
    missing = [cell for key, cell in wanted.items() if key not in results]
    with closing(pool.measure(claim, missing, source)) as measurements:
        for cell, measured in measurements:
            now = datetime.now(UTC).isoformat(timespec="microseconds")
            result = Result(claim.paper, claim.name, cell.values, source, measured_at=now, **vars(measured))
            store.put(result)
            results[cell.key] = result
            if progress is not None:
                progress(result)
    return [results[cell.key] for cell in cells]


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class InProcess:
    """Measures in this process, one cell after the other."""

    def __init__(self) -> None:
        self._warm: set[tuple[str, ...]] = set()

    def measure(self, claim: Claim, cells: Sequence[Cell], source: str) -> Measurements:
        for cell in cells:
            yield cell, measure(claim, cell, self._warm)

    def close(self) -> None:
        pass


class Processes:
    """Measures in worker processes of this machine, started when needed and kept for the next claim.

    Parameters
    ----------
    jobs : at most so many at a time; one per usable core by default.
    timeout : seconds that one cell may take.
    threads : per worker; by default the usable cores are divided among the jobs.
    """

    def __init__(self, jobs: int | None, timeout: float | None, threads: int | None = None) -> None:
        cores = usable_cores()
        self._jobs = jobs or cores
        self._threads = threads or max(1, cores // self._jobs)
        self._all_threads = threads or cores
        self._timeout = timeout
        self._workers: list[Worker] = []  # idle or at work
        self._events: queue.SimpleQueue[tuple[Worker, dict[str, Any] | None]] = queue.SimpleQueue()

    def measure(self, claim: Claim, cells: Sequence[Cell], source: str) -> Measurements:
        return self.work(Order.of(claim, source), cells)

    def work(self, order: Order, cells: Sequence[Cell]) -> Measurements:
        """As `measure`, where the claim itself is not at hand."""
        jobs, threads = (1, self._all_threads) if order.alone else (self._jobs, self._threads)
        waiting = deque(cells)
        busy: dict[Worker, Cell] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < jobs:
                    worker = self._idle_worker(threads, busy)
                    busy[worker] = waiting.popleft()
                    worker.begin(order, busy[worker])
                for worker, measured in self._next(busy):
                    yield busy.pop(worker), measured
        finally:
            for worker in busy:
                self._discard(worker)

    def close(self) -> None:
        for worker in self._workers:
            worker.dismiss()
        for worker in self._workers:
            worker.wait()
        self._workers.clear()

    def _idle_worker(self, threads: int, busy: dict[Worker, Cell]) -> Worker:
        for worker in [worker for worker in self._workers if worker.threads == threads and worker not in busy]:
            if worker.is_alive():
                return worker
            self._discard(worker)
        worker = Worker(threads, self._timeout, self._events)
        self._workers.append(worker)
        return worker

    def _discard(self, worker: Worker) -> None:
        worker.kill()
        worker.wait()
        self._workers.remove(worker)

    def _next(self, busy: dict[Worker, Cell]) -> list[tuple[Worker, Measured]]:
        """Wait for something to happen; the workers that are through with their cell, and what it came to."""
        pause = min(PATROL, *(worker.deadline - time.monotonic() for worker in busy))
        events: list[tuple[Worker, dict[str, Any] | None]] = []
        with suppress(queue.Empty):  # all there are: a reply that is already here is not overdue
            events.append(self._events.get(timeout=max(0.0, pause)))
            while True:
                events.append(self._events.get_nowait())
        finished: dict[Worker, Measured] = {}
        for worker, message in events:
            if worker not in busy or worker in finished:  # it died idle, or was killed
                continue
            if message is None:
                finished[worker] = worker.died()
            elif message.get("started"):
                worker.started()
            else:
                finished[worker] = Measured(**message)
        for worker in busy.keys() - finished:
            if not worker.is_alive():  # its output may still be on the way, or be held open by a child of its own
                worker.deadline = min(worker.deadline, time.monotonic() + PATROL)
            if time.monotonic() >= worker.deadline:
                finished[worker] = worker.overdue() if worker.is_alive() else worker.died()
        for worker, measured in finished.items():
            if measured.status == "crashed" and not worker.is_alive():
                self._discard(worker)
        return list(finished.items())


class Worker:
    """The parent's side of a worker process.

    Attributes
    ----------
    threads : that its libraries use.
    deadline : on the monotonic clock, for the cell it is measuring.
    """

    def __init__(
        self, threads: int, timeout: float | None, events: queue.SimpleQueue[tuple[Worker, dict[str, Any] | None]]
    ) -> None:
        self.threads = threads
        self.deadline = math.inf
        self._timeout = timeout
        self._begun = 0.0
        self._output = tempfile.TemporaryFile("a+b")  # noqa: SIM115, it lives as long as the worker
        given = json.dumps({"path": sys.path, "threads": threads, "timeout": timeout})
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env={**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))},
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C in the terminal does not reach it; what it starts dies with it
        )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def begin(self, order: Order, cell: Cell) -> None:
        """Send a cell to measure."""
        self._begun = time.monotonic()
        self.deadline = math.inf if self._timeout is None else self._begun + LOADING + self._timeout
        self._output.truncate(0)
        stdin = self._process.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # it has just died, which will be noticed
            stdin.write(json.dumps({**asdict(order), "cell": cell.values}) + "\n")
            stdin.flush()

    def started(self) -> None:
        """The claim is imported: from now on the time counts."""
        if self._timeout is not None:
            self.deadline = time.monotonic() + self._timeout + LAST_WORDS

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def died(self) -> Measured:
        """What to say of a cell whose process has ended or is ending."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(DYING)
        self.kill()
        code = self._process.returncode
        if code >= 0:
            reason = f"the process exited with code {code}"
        elif -code == signal.SIGKILL:
            reason = "killed by signal 9, probably out of memory"
        else:
            reason = f"killed by signal {-code} ({signal.strsignal(-code)})"
        return self._crashed(reason)

    def overdue(self) -> Measured:
        """End the process; what to say of its cell."""
        self.kill()
        return self._crashed(f"stopped after the time limit of {self._timeout:g} s")

    def kill(self) -> None:
        """End the process and those it has started, at once."""
        with suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()
        self.dismiss()

    def dismiss(self) -> None:
        """Let the process end when it is idle."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def wait(self) -> None:
        """Until the dismissed process has ended; it cannot be used afterwards."""
        try:
            self._process.wait(DYING)
        except subprocess.TimeoutExpired:
            self.kill()
        self._output.close()

    def _crashed(self, reason: str) -> Measured:
        self._output.seek(0)
        said = self._output.read().decode(errors="replace").strip()[-QUOTED:]
        return Measured("crashed", [], f"{reason}\n\n{said}".strip(), time.monotonic() - self._begun)

    def _listen(self, events: queue.SimpleQueue[tuple[Worker, dict[str, Any] | None]]) -> None:
        """Pass the worker's replies on, and None at their end."""
        assert self._process.stdout is not None
        with self._process.stdout as replies:
            for line in replies:
                if line.endswith("\n"):
                    events.put((self, json.loads(line)))
        events.put((self, None))
