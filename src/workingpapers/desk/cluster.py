"""Measuring the cells of a claim on a Ray cluster.

Ray decides where a cell runs; each asks for one core and no GPU. There it is measured as on one machine, by a worker
process under a supervising Ray task, so that time limits, crashes and kills are found and told in the same way. Every
node needs the same version of this library, and of what the claim imports, as the machine that started the run: a
worker that finds other source refuses.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from workingpapers.common.validation import require
from workingpapers.desk.claim import Cell, Claim, Value
from workingpapers.desk.run import Measurements, Processes
from workingpapers.desk.worker import Measured, Order

__all__ = ["RayCluster"]

IN_FLIGHT = 1_000  # cells that Ray knows of at a time; enough to show an autoscaler what is wanted


class RayCluster:
    """Measures on the Ray cluster at an address.

    Parameters
    ----------
    on : "ray" for the cluster that $RAY_ADDRESS names or that runs on this machine, or else one that is started here;
        "ray://host:port" for the cluster at that address.
    timeout : seconds that one cell may take.

    Raises
    ------
    ValueError : `on` is neither.
    ImportError : Ray, or for "ray://" its client, is absent.
    ConnectionError : no cluster answers at the address.
    """

    def __init__(self, on: str, timeout: float | None) -> None:
        if on != "ray" and not on.startswith("ray://"):
            raise ValueError(f"on must be 'ray' or 'ray://host:port', got {on!r}")
        self._ray: Any = require("ray", extra="cluster")
        if on.startswith("ray://"):
            require("grpc", extra="cluster")  # Ray's client speaks it
        self._timeout = timeout
        self._ours = not self._ray.is_initialized()
        if self._ours:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            address = None if on == "ray" else on
            try:
                self._ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
            except (ConnectionError, TimeoutError) as error:
                raise ConnectionError(f"no Ray cluster answers at {on}: {error}") from error

    def measure(self, claim: Claim, cells: Sequence[Cell], source: str) -> Measurements:
        task = self._ray.remote(num_cpus=1, max_retries=0)(_supervise)
        order = asdict(Order.of(claim, source))
        waiting = iter(cells)
        pending: dict[Any, Cell] = {}
        try:
            while True:
                for cell in islice(waiting, IN_FLIGHT - len(pending)):
                    pending[task.remote(order, cell.values, self._timeout, sys.path)] = cell
                if not pending:
                    return
                self._ray.wait([*pending], num_returns=1)
                for finished in self._ray.wait([*pending], num_returns=len(pending), timeout=0)[0]:
                    cell = pending.pop(finished)
                    yield cell, self._measured(finished)
        finally:
            for reference in pending:
                self._ray.cancel(reference, force=True)

    def close(self) -> None:
        if self._ours:
            self._ray.shutdown()

    def _measured(self, finished: Any) -> Measured:
        try:
            return Measured(**self._ray.get(finished))
        except self._ray.exceptions.RayError as error:  # the supervising task, or its node, is gone
            return Measured("crashed", [], f"the Ray task was lost: {type(error).__name__}: {error}")


# --------------------------------------------------------------------------------------------------------------------
# On a node of the cluster

_PROCESSES: dict[float | None, Processes] = {}  # by time limit; Ray uses a process of its own for many tasks


def _supervise(
    order: Mapping[str, Any], values: Mapping[str, Value], timeout: float | None, path: Sequence[str]
) -> dict[str, Any]:
    """Measure one cell in a worker process of this node.

    Parameters
    ----------
    path : where the machine that started the run imports from; what exists here too is searched last.
    """
    sys.path.extend(directory for directory in path if directory not in sys.path)
    if timeout not in _PROCESSES:
        _PROCESSES[timeout] = Processes(jobs=1, timeout=timeout, threads=1)
    ((_, measured),) = _PROCESSES[timeout].work(Order(**order), [Cell(values)])
    return asdict(measured)
