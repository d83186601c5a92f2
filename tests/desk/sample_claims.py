"""Claims that the tests of the runners measure: well-behaved ones and every kind of trouble."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from workingpapers.desk.claim import Cell, Row, benchmark, claim


def log(cell: Cell, *more: object) -> None:
    """A line per measurement in the file that a test has named."""
    path = os.environ.get("SAMPLE_LOG")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(" ".join(map(str, (os.getpid(), *cell.values.values(), *more))) + "\n")


@claim(paper="sample", says="", published="", grid={"n": list(range(2_000))}, expect=[])
def square(cell: Cell) -> Row:
    log(cell)
    return {"square": cell.n**2, "half": cell.n / 2, "even": cell.n % 2 == 0, "name": f"n{cell.n}"}


@claim(paper="sample", says="", published="", grid={"seed": [0]}, expect=[])
def curve(cell: Cell) -> list[Row]:
    return [
        {"step": np.int64(0), "loss": np.float32(0.5), "better": np.bool_(True), "gap": float("inf")},
        {"step": 1, "loss": np.array(0.25), "better": False, "gap": float("nan")},
    ]


@claim(paper="sample", says="", published="", grid={"what": ["fine"], "seed": [0]}, expect=[])
def trouble(cell: Cell) -> Row | list[Row]:
    log(cell)
    if cell.what == "raises":
        raise ValueError(f"no luck with seed {cell.seed}")
    if cell.what == "sys.exit":
        sys.exit(3)
    if cell.what == "os._exit":
        print("the last thing it said")
        sys.stdout.flush()
        os._exit(4)
    if cell.what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.what == "segfault":
        ctypes.string_at(0)
    if cell.what == "hangs":
        child = subprocess.Popen(["sleep", "60"])
        log(cell, "child", child.pid)
        time.sleep(60)
    if cell.what == "orphans":
        if os.fork() == 0:
            time.sleep(60)
        os._exit(5)
    if cell.what == "array":
        return {"weights": np.ones(3)}
    if cell.what == "axis":
        return {"seed": 1}
    if cell.what == "nothing":
        return []
    if cell.what == "supervisor":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    return {"value": cell.seed}


@claim(paper="sample", says="", published="", grid={"n": [0]}, expect=[])
def threads(cell: Cell) -> Row:
    row: Row = {"environment": os.environ["OMP_NUM_THREADS"], "process": os.getpid()}
    if cell.n == 0:
        import torch

        row["torch"] = torch.get_num_threads()
    return row


@claim(paper="sample", says="", published="", grid={"n": [0]}, expect=[])
def place(cell: Cell) -> Row:
    time.sleep(0.2)
    return {"node": os.environ["RAY_RAYLET_PID"], "threads": os.environ["OMP_NUM_THREADS"]}


@claim(paper="sample", says="", published="", grid={"n": [0]}, expect=[])
def slow(cell: Cell) -> Row:
    log(cell, "begin")
    time.sleep(0.05 if cell.n < 4 else 60)
    return {"value": cell.n}


@benchmark(
    paper="sample",
    grid={"size": [1, 2], "contender": ["ours", "theirs"]},
    expect=[],
    rounds={"smoke": 3, "laptop": 3, "paper": 3},
)
def race(cell: Cell) -> Row:
    log(cell)
    with cell.timed():
        time.sleep(0.001)
    return {"threads": int(os.environ.get("OMP_NUM_THREADS", 0)), "process": os.getpid()}
