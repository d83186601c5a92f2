"""The same cells on a Ray cluster of two nodes, which run on this machine."""

import importlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from workingpapers.desk.claim import Cell
from workingpapers.desk.run import Pool, run, usable_cores
from workingpapers.desk.store import Store

HERE = str(Path(__file__).parent)


def test_without_ray_one_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"ray is needed here: pip install 'workingpapers\[cluster\]'"):
        Pool(on="ray")


def test_an_address_needs_the_client_of_ray(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(ImportError, match=r"grpc is needed here: pip install 'workingpapers\[cluster\]'"):
        Pool(on="ray://127.0.0.1:10001")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """The measurements that were made, a list of words for each."""
    path = tmp_path_factory.mktemp("cluster") / "log"
    path.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMPLE_LOG", str(path))
        yield lambda: [line.split() for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def samples():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        yield importlib.import_module("sample_claims")


@pytest.fixture(scope="module")
def pool(log, samples):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False, "include_log_monitor": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args=node)
        cluster.add_node(**node)
        patch.setenv("RAY_ADDRESS", cluster.address)
        with Pool(timeout=20.0, on="ray") as opened:
            yield opened
        cluster.shutdown()


def ended(process):
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def soon(condition, within=20.0):
    until = time.monotonic() + within
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store.sqlite") as opened:
        yield opened


@pytest.mark.slow
def test_every_node_takes_part_with_one_thread_a_cell(samples, pool, store):
    results = run(samples.place, [Cell({"n": n}) for n in range(12)], store=store, pool=pool)
    assert len({result.rows[0]["node"] for result in results}) == 2
    assert {result.rows[0]["threads"] for result in results} == {"1"}


@pytest.mark.slow
def test_every_trouble_is_reported_and_the_others_go_on(samples, pool, store):
    troubles = {
        "raises": "ValueError: no luck with seed 0",
        "os._exit": "the process exited with code 4",
        "killed": "killed by signal 9, probably out of memory",
        "supervisor": "the Ray task was lost: WorkerCrashedError",
    }
    wanted = [Cell({"what": "fine", "seed": seed}) for seed in range(20)]
    wanted[10:10] = [Cell({"what": what, "seed": 0}) for what in troubles]
    seen = []
    results = run(samples.trouble, wanted, store=store, pool=pool, progress=seen.append)
    assert len(seen) == len(wanted) == len(store.results("sample"))
    for cell, result in zip(wanted, results, strict=True):
        if cell.what == "fine":
            assert result.rows == [{"value": cell.seed}]
        else:
            assert (result.status, result.values) == ("crashed", cell.values)
            assert troubles[cell.what] in result.error
    fine = [cell for cell in wanted if cell.what == "fine"]
    assert run(samples.trouble, fine, store=store, pool=pool) == [r for r in results if r.status == "done"]


@pytest.mark.slow
def test_a_cell_out_of_time_is_stopped(samples, pool, store):
    with Pool(timeout=0.5, on="ray") as impatient:
        (result,) = run(samples.trouble, [Cell({"what": "hangs", "seed": 0})], store=store, pool=impatient)
    assert result.error.startswith("stopped after the time limit of 0.5 s")
    assert "in trouble" in result.error


@pytest.mark.slow
def test_a_benchmark_stays_on_this_machine(samples, pool, store):
    results = run(samples.race, samples.race.cells("smoke"), store=store, pool=pool)
    assert {result.status for result in results} == {"done"}
    assert {result.rows[0]["threads"] for result in results} == {usable_cores()}


@pytest.mark.slow
def test_ctrl_c_cancels_what_runs_and_keeps_what_was_measured(samples, pool, store, log):
    def interrupt_when_all_have_begun():
        soon(lambda: {"6", "7"} <= {words[1] for words in log()[before:]})
        os.kill(os.getpid(), signal.SIGINT)

    before = len(log())
    threading.Thread(target=interrupt_when_all_have_begun).start()
    with pytest.raises(KeyboardInterrupt):
        run(samples.slow, [Cell({"n": n}) for n in (0, 1, 6, 7, 8, 9)], store=store, pool=pool)
    assert sorted(result.values["n"] for result in store.results("sample")) == [0, 1]
    busy = {words[0] for words in log()[before:] if words[1] in "67"}
    assert len(busy) == 2
    assert soon(lambda: all(map(ended, busy)))
    assert run(samples.slow, [Cell({"n": 2})], store=store, pool=pool)[0].status == "done"
    assert not {"8", "9"} & {words[1] for words in log()[before:]}
