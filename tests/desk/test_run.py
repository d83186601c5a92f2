"""Every way in which a cell can end, with real processes that really end so."""

import importlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from workingpapers.desk import worker
from workingpapers.desk.claim import Cell
from workingpapers.desk.run import Pool, run, usable_cores
from workingpapers.desk.store import Store

HERE = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def samples():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        yield importlib.import_module("sample_claims")


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store.sqlite") as opened:
        yield opened


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The measurements that were made, a list of words for each."""
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv("SAMPLE_LOG", str(path))
    return lambda: [line.split() for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def pool():
    with Pool(jobs=2) as opened:
        yield opened


def cells(axis, values, **others):
    return [Cell({axis: value, **others}) for value in values]


def gone(process, within=5.0):
    """Whether a process ends soon (a zombie has ended)."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_results_come_in_the_order_of_the_cells_and_are_reused(samples, store, pool, log):
    wanted = cells("n", [3, 1, 2, 1])
    seen = []
    results = run(samples.square, wanted, store=store, pool=pool, progress=seen.append)
    assert [result.rows for result in results] == [
        [{"square": n * n, "half": n / 2, "even": n % 2 == 0, "name": f"n{n}"}] for n in (3, 1, 2, 1)
    ]
    assert sorted(words[1] for words in log()) == ["1", "2", "3"], "equal cells are measured once"
    assert len(seen) == 3
    assert {result.status for result in results} == {"done"}
    assert results[0].environment["versions"]["numpy"]
    assert results[0].measured_at.endswith("+00:00")

    again = run(samples.square, cells("n", [1, 2, 3, 4]), store=store, pool=pool, progress=seen.append)
    assert again[0] == results[1]
    assert Counter(words[1] for words in log()) == {"1": 1, "2": 1, "3": 1, "4": 1}
    assert len(seen) == 3 + 4, "reused cells count as progress"

    run(samples.square, cells("n", [1]), store=store, pool=pool, fresh=True)
    assert Counter(words[1] for words in log())["1"] == 2


def test_a_changed_source_is_measured_again(samples, store, pool, log, monkeypatch):
    run(samples.square, cells("n", [1]), store=store, pool=Pool(jobs=0))
    monkeypatch.setattr("workingpapers.desk.run.fingerprint", lambda claim: "another source")
    run(samples.square, cells("n", [1]), store=store, pool=Pool(jobs=0))
    assert len(log()) == 2
    # a worker that imports a source other than the one the run was started with does not pass it off as that
    (result,) = run(samples.square, cells("n", [2]), store=store, pool=pool)
    assert result.status == "crashed"
    assert "is not the one this run began with" in result.error


def test_scalars_of_numpy_become_plain_and_non_finite_numbers_survive(samples, store, pool):
    for where in (pool, Pool(jobs=0)):
        (result,) = run(samples.curve, cells("seed", [0]), store=store, pool=where, fresh=True)
        first, second = result.rows
        assert first == {"step": 0, "loss": 0.5, "better": True, "gap": float("inf")}
        assert [type(value) for value in first.values()] == [int, float, bool, float]
        assert second["gap"] != second["gap"]
    assert store.results("sample", "curve")[0].rows[0] == first


TROUBLES = {
    "raises": "ValueError: no luck with seed 0",
    "sys.exit": "SystemExit: 3",
    "os._exit": "the process exited with code 4\n\nthe last thing it said",
    "killed": "killed by signal 9, probably out of memory",
    "segfault": "killed by signal 11",
    "array": "TypeError: column 'weights' must be a number, a truth value or a short text, got ndarray",
    "axis": "ValueError: column 'seed' of the measurement repeats an axis",
    "nothing": "ValueError: the measurement returned no row",
}


def test_a_cell_that_crashes_is_reported_and_the_others_go_on(samples, store, pool, log):
    wanted = [Cell({"what": what, "seed": 0}) for what in TROUBLES]
    wanted[2:2] = cells("seed", range(6), what="fine")
    results = run(samples.trouble, wanted, store=store, pool=pool)
    for cell, result in zip(wanted, results, strict=True):
        if cell.what == "fine":
            assert result.rows == [{"value": cell.seed}]
        else:
            assert (result.status, result.rows) == ("crashed", [])
            assert TROUBLES[cell.what] in result.error
    by_kind = {cell.what: result.error for cell, result in zip(wanted, results, strict=True)}
    assert by_kind["raises"].startswith("Traceback")
    assert "in trouble" in by_kind["raises"]
    assert "workingpapers/desk" not in by_kind["raises"], "the desk's own frames say nothing about the measurement"
    assert "in trouble" in by_kind["segfault"], "a traceback is there even when the interpreter dies"

    kept = {result.key: result for result in store.results("sample", "trouble")}
    assert kept[wanted[0].key].error == results[0].error
    before = Counter(words[1] for words in log())
    run(samples.trouble, wanted, store=store, pool=pool)
    after = Counter(words[1] for words in log()) - before
    assert after == dict.fromkeys(TROUBLES, 1), "crashed cells are tried again, the others are not"


def test_a_process_that_leaves_children_behind_is_noticed(samples, store, pool):
    began = time.monotonic()
    results = run(
        samples.trouble, [Cell({"what": what, "seed": 0}) for what in ("orphans", "fine")], store=store, pool=pool
    )
    assert "the process exited with code 5" in results[0].error
    assert results[1].status == "done"
    assert time.monotonic() - began < 20


def test_a_cell_out_of_time_is_stopped_with_its_children_and_says_where_it_was(samples, store, log):
    wanted = [Cell({"what": what, "seed": 0}) for what in ("hangs", "fine")]
    with Pool(jobs=1, timeout=0.5) as impatient:
        results = run(samples.trouble, wanted, store=store, pool=impatient)
    assert results[0].status == "crashed"
    assert results[0].error.startswith("stopped after the time limit of 0.5 s")
    assert "in trouble" in results[0].error
    assert 0.5 <= results[0].seconds < 30
    assert results[1].status == "done"
    (child,) = [words[-1] for words in log() if "child" in words]
    assert gone(child)


def test_a_reply_that_waits_for_a_slow_caller_is_not_out_of_time(samples, store):
    with Pool(jobs=2, timeout=0.5) as impatient:
        results = run(
            samples.slow, cells("n", [0, 1]), store=store, pool=impatient, progress=lambda result: time.sleep(1.0)
        )
    assert [result.status for result in results] == ["done", "done"]


def test_without_isolation_exceptions_are_still_reports(samples, store):
    wanted = [Cell({"what": what, "seed": 0}) for what in ("raises", "sys.exit", "fine", "array")]
    results = run(samples.trouble, wanted, store=store, pool=Pool(jobs=0))
    assert [result.status for result in results] == ["crashed", "crashed", "done", "crashed"]
    assert "no luck with seed 0" in results[0].error


def test_the_machinery_costs_less_than_a_millisecond_a_cell(samples, store):
    wanted = samples.square.cells("smoke")
    run(samples.square, wanted[:10], store=store, pool=Pool(jobs=0))
    began = time.process_time()
    run(samples.square, wanted, store=store, pool=Pool(jobs=0))
    assert (time.process_time() - began) / len(wanted) < 1e-3


def test_workers_stay_warm_and_share_the_cores(samples, store, pool):
    first = run(samples.threads, cells("n", [0]), store=store, pool=pool)
    second = run(samples.threads, cells("n", range(1, 3)), store=store, pool=pool)
    share = max(1, usable_cores() // 2)
    assert first[0].rows[0]["torch"] == share
    for result in first + second:
        assert result.rows[0]["environment"] == str(share)
    assert first[0].rows[0]["process"] in {result.rows[0]["process"] for result in second}


def test_a_benchmark_runs_in_order_in_one_process_with_all_cores_after_a_warm_up(samples, store, pool, log):
    wanted = samples.race.cells("smoke")
    results = run(samples.race, wanted, store=store, pool=pool)
    assert len({result.rows[0]["process"] for result in results}) == 1
    assert {result.rows[0]["threads"] for result in results} == {usable_cores()}
    assert all(result.rows[0]["seconds"] >= 0.001 for result in results)
    expected = []
    for size in "12":
        expected += [[size, "ours", "0"]] * 2 + [[size, "theirs", "0"]] * 2  # the first of each is the warm-up
        expected += [
            [size, name, turn]
            for turn, names in (("1", ("theirs", "ours")), ("2", ("ours", "theirs")))
            for name in names
        ]
    assert [words[1:] for words in log()] == expected

    run(samples.race, wanted, store=store, pool=pool)
    assert len(log()) == len(expected), "a complete benchmark is reused"
    store.connection.execute("DELETE FROM cells WHERE cell = ?", (wanted[5].key,))
    run(samples.race, wanted, store=store, pool=pool)
    assert len(log()) == len(expected) + len(wanted), "an incomplete one is measured as a whole; the worker is warm"


SCRIPT = """
import importlib, sys
sys.path.insert(0, {here!r})
from workingpapers.desk.claim import Cell
from workingpapers.desk.run import Pool, run
from workingpapers.desk.store import Store
slow = importlib.import_module("sample_claims").slow
with Store({path!r}) as store, Pool(jobs=2) as pool:
    run(slow, [Cell({{"n": n}}) for n in range(8)], store=store, pool=pool)
"""


def started_script(path, log):
    """A process that measures: four quick cells, then cells that take a minute; returned when it is at those."""
    script = SCRIPT.format(here=HERE, path=str(path))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 60
    while not {"4", "5"} <= {words[1] for words in log()}:
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process, {words[0] for words in log()}


def test_ctrl_c_ends_the_workers_and_keeps_what_was_measured(samples, log, tmp_path):
    process, workers = started_script(tmp_path / "store.sqlite", log)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does, to the whole group
    _, said = process.communicate(timeout=20)
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert all(gone(worker) for worker in workers)
    with Store(tmp_path / "store.sqlite") as store:
        assert sorted(result.values["n"] for result in store.results("sample")) == [0, 1, 2, 3]


@pytest.mark.parametrize("answered", [False, True])
def test_a_request_counts_from_its_arrival_until_its_answer(monkeypatch, answered):
    """The parent may die before the worker's main thread has taken the request: it must not be measured then."""
    ended, inbox, busy = [], queue.SimpleQueue(), threading.Event()
    monkeypatch.setattr(worker.os, "killpg", lambda group, how: ended.append(how))
    monkeypatch.setattr(worker.os, "_exit", lambda code: ended.append(code))

    def requests():
        yield '{"cell": 1}\n'
        if answered:
            busy.clear()

    worker._read(requests(), inbox, busy)
    assert ended == ([] if answered else [signal.SIGKILL, 1])
    assert inbox.get() == {"cell": 1}
    assert inbox.get() is None


def test_workers_die_with_their_parent(samples, log, tmp_path):
    process, workers = started_script(tmp_path / "store.sqlite", log)
    process.kill()
    process.communicate(timeout=20)
    assert len(workers) == 2
    assert all(gone(worker) for worker in workers)
    with Store(tmp_path / "store.sqlite") as store:
        assert len(store.results("sample")) == 4


def test_an_exception_of_the_caller_stops_the_cells_and_leaves_the_pool_usable(samples, store, log):
    def refuse(result):
        end = time.monotonic() + 20
        while not any(words[1] == "7" for words in log()) and time.monotonic() < end:  # the other one is at work
            time.sleep(0.01)
        raise RuntimeError("enough")

    with Pool(jobs=2) as pool:
        with pytest.raises(RuntimeError, match="enough"):
            run(samples.slow, cells("n", [0, 7]), store=store, pool=pool, progress=refuse)
        (busy,) = {words[0] for words in log() if words[1] == "7"}
        assert gone(busy)
        assert run(samples.slow, cells("n", [1]), store=store, pool=pool)[0].status == "done"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"jobs": -1}, ValueError, "jobs must be at least 0, got -1"),
        ({"jobs": 1.5}, TypeError, "jobs must be an integer, got 1.5"),
        ({"timeout": 0.0}, ValueError, "timeout must be above 0, got 0.0"),
        ({"timeout": float("nan")}, ValueError, "timeout must be above 0"),
        ({"jobs": 0, "timeout": 1.0}, ValueError, "timeout needs worker processes"),
        ({"jobs": 2, "on": "ray"}, ValueError, "jobs is decided by the cluster"),
        ({"on": "slurm"}, ValueError, "on must be 'ray'"),
    ],
)
def test_bad_arguments_are_named(given, error, message):
    with pytest.raises(error, match=message):
        Pool(**given)
