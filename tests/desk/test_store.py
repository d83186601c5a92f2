"""The store under kills, races and damage."""

import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from workingpapers.desk.claim import Cell
from workingpapers.desk.store import Result, Store, StoreError


def result(n, **changes):
    made = Result("halpern", "rates", {"seed": n, "method": "ours"}, "f1", "done", [{"gap": n / 2}], seconds=0.5)
    return replace(made, measured_at=f"2025-01-01T00:00:00.{n:06d}+00:00", **changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "not yet there" / "store.sqlite"


def test_results_come_back_as_they_were_put(path):
    rows = [
        {
            "gap": math.inf,
            "worse": -math.inf,
            "count": 2**70,
            "holds": True,
            "name": "Łukaszyk–Karmowski",
            "tiny": 5e-324,
        },
        {"gap": 0.1 + 0.2, "worse": math.nan, "count": 0, "holds": False, "name": "", "tiny": -0.0},
    ]
    environment = {"device": "cpu", "versions": {"torch": "2"}}
    put = result(1, rows=rows, environment=environment)
    with Store(path) as store:
        store.put(put)
    with Store(path) as store:
        (got,) = store.get("halpern", "rates", [Cell({"method": "ours", "seed": 1})], "f1").values()
        assert store.connection.execute("SELECT json_valid(rows) FROM cells").fetchall() == [(1,)]
    assert math.isnan(got.rows[1].pop("worse"))
    rows[1].pop("worse")
    assert got == put
    assert [type(value) for value in got.rows[0].values()] == [float, float, int, bool, str, float]
    assert math.copysign(1.0, got.rows[1]["tiny"]) == -1.0


def test_a_result_belongs_to_its_paper_claim_cell_and_source(path):
    with Store(path) as store:
        for changes in ({}, {"paper": "colide"}, {"claim": "cost"}, {"fingerprint": "f2"}):
            store.put(result(1, **changes))
        store.put(result(2))
        found = store.get("halpern", "rates", [Cell({"seed": n, "method": "ours"}) for n in (1, 3)], "f1")
        assert found == {result(1).key: result(1)}
        assert store.get("halpern", "rates", [Cell({"seed": 1, "method": "theirs"})], "f1") == {}
        assert len(store.results("halpern")) == 4
        assert [r.fingerprint for r in store.results("halpern", "rates")] == ["f1", "f2", "f1"]
        store.put(result(1, rows=[{"gap": 9.0}]))
        assert len(store.results("halpern")) == 4
        assert store.get("halpern", "rates", [Cell(result(1).values)], "f1")[result(1).key].rows == [{"gap": 9.0}]


def test_the_place_of_the_store_can_be_named_in_the_environment(path, monkeypatch):
    monkeypatch.setenv("WORKINGPAPERS_STORE", str(path))
    with Store() as store:
        assert store.path == path
    monkeypatch.delenv("WORKINGPAPERS_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", str(path.parent))
    if sys.platform == "linux":
        with Store() as store:
            assert store.path == path.parent / "workingpapers" / "store.sqlite"


def test_threads_may_share_a_store(path):
    with Store(path) as store:
        threads = [
            threading.Thread(target=lambda start=start: [store.put(result(start + i)) for i in range(100)])
            for start in range(0, 400, 100)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(store.results("halpern")) == 400


def test_a_transaction_is_kept_as_a_whole_or_not_at_all(path):
    with Store(path) as store:
        with store.transaction() as connection:
            connection.execute("CREATE TABLE listings (title TEXT NOT NULL)")
            connection.execute("INSERT INTO listings VALUES ('one')")
        with pytest.raises(sqlite3.IntegrityError), store.transaction() as connection:
            connection.executemany("INSERT INTO listings VALUES (?)", [("two",), (None,)])
        store.put(result(1))
    with Store(path) as store:
        assert store.connection.execute("SELECT title FROM listings").fetchall() == [("one",)]


# --------------------------------------------------------------------------------------------------------------------
# Kills and races, with real processes

WRITER = """
import os, sys, time
from workingpapers.desk.store import Result, Store
path, go, start = sys.argv[1:]
print("ready", flush=True)
while not os.path.exists(go):
    time.sleep(0.001)
with Store(path) as store:
    for n in range(int(start), int(start) + 2500):
        store.put(Result("halpern", "rates", {"n": n}, "f1", "done", [{"n": n}]))
"""


def test_two_processes_that_write_at_once_lose_nothing(path, tmp_path):
    go = tmp_path / "go"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(go), start], stdout=subprocess.PIPE, text=True)
        for start in ("0", "2000")  # 500 cells are written by both
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    go.touch()  # so that they even create the store at the same time
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    for writer in writers:
        writer.stdout.close()
    with Store(path) as store:
        assert sorted(result.values["n"] for result in store.results("halpern")) == list(range(4500))


# Forks a writer for every line of its input, so that fifty of them do not import everything fifty times. A writer
# notes every cell after it was committed.
NURSERY = """
import os, sys
from workingpapers.desk.store import Result, Store
for line in sys.stdin:
    path, notes, start = line.rstrip().split("|")
    child = os.fork()
    if child == 0:
        notes, n = os.open(notes, os.O_CREAT | os.O_APPEND | os.O_WRONLY), int(start)
        with Store(path) as store:
            while True:
                store.put(Result("p", "c", {"n": n}, "f", "done", [{"n": n, "text": "x" * 300}]))
                os.write(notes, b"%d " % n)
                n += 1
    print(child, flush=True)
    os.waitpid(child, 0)
"""


def test_fifty_kills_lose_at_most_the_cell_in_flight(tmp_path):
    rng = random.Random(0)
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    committed_somewhere = 0
    with nursery:
        for kill in range(50):
            fresh = kill < 15  # these are killed while they create the store, or soon after
            name = f"store {kill}" if fresh else "store"
            path, notes = tmp_path / f"{name}.sqlite", tmp_path / f"{name}.notes"
            nursery.stdin.write(f"{path}|{notes}|{kill * 1_000_000}\n")
            nursery.stdin.flush()
            writer = int(nursery.stdout.readline())
            time.sleep(rng.uniform(0.0, 0.02 if fresh else 0.1))
            os.kill(writer, signal.SIGKILL)

            noted = {int(n) for n in notes.read_text().split()} if notes.exists() else set()
            with Store(path) as store:
                rows = store.connection.execute("SELECT json_extract(cell, '$.n') FROM cells")
                kept = {n for (n,) in rows}
            assert noted <= kept
            assert len(kept - noted) <= kill + 1, "at most one cell a kill is committed and not noted"
            committed_somewhere += bool(noted)
        nursery.stdin.close()
    assert committed_somewhere > 25
    with Store(tmp_path / "store.sqlite") as store:
        assert store.connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert {tuple(result.rows[0]) for result in store.results("p")} == {("n", "text")}


# --------------------------------------------------------------------------------------------------------------------
# Files that are no store, or no longer one


def a_store(path, cells=500):
    path.parent.mkdir(parents=True, exist_ok=True)
    with Store(path) as store:
        for n in range(cells):
            store.put(result(n))
    return path.read_bytes()


def truncated(path):
    path.write_bytes(a_store(path)[:-5000])


def garbled(path):
    whole = bytearray(a_store(path))
    for page in range(2, len(whole) // 4096, 3):
        whole[page * 4096 : page * 4096 + 200] = os.urandom(200)
    path.write_bytes(whole)


def another_database(path):
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE cells (photo BLOB)")
    connection.close()


def newer(path):
    a_store(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()


def without_its_table(path):
    a_store(path)
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE cells")
    connection.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("a shopping list\n" * 100), "is not a store of workingpapers"),
        (lambda path: path.write_bytes(os.urandom(10_000)), "is not a store of workingpapers"),
        (lambda path: path.write_bytes(b""), "is not a store of workingpapers"),
        (lambda path: path.write_bytes(b"SQLite format 3\0"), "is not a store of workingpapers"),
        (truncated, r"is damaged \("),
        (garbled, r"is damaged \("),
        (another_database, "is the SQLite database of another program"),
        (newer, r"was written by a newer workingpapers \(version 2 of the store, this one knows 1\)"),
        (without_its_table, "cannot be used: no such table"),
        (lambda path: path.mkdir(), "cannot be used: Is a directory"),
    ],
)
def test_what_is_no_store_is_refused_and_left_alone(tmp_path, make, message):
    path = tmp_path / "store.sqlite"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    for _ in range(2):
        with pytest.raises(StoreError, match=message) as refused:
            Store(path)
        assert str(path) in str(refused.value)
        assert "\n" not in str(refused.value)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be used: File exists: .*file"):
        Store(tmp_path / "file" / "store.sqlite")


def test_damage_that_comes_later_is_told_in_one_sentence(path):
    whole = a_store(path)
    with Store(path) as store:
        store.connection.execute("PRAGMA shrink_memory")
        Path(path).write_bytes(whole[:4096] + os.urandom(len(whole) - 4096))
        with pytest.raises(StoreError, match="is damaged"):
            store.results("halpern")
