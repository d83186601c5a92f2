"""The queue of runs and who does them: order, cancelling, and every way in which a server can end."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from workingpapers.desk import queue as queues
from workingpapers.desk import supervisor as supervisors
from workingpapers.desk.catalogue import paper
from workingpapers.desk.check import check
from workingpapers.desk.page.state import State
from workingpapers.desk.queue import Queue, Refused, claims_in
from workingpapers.desk.run import Pool
from workingpapers.desk.source import load_claims
from workingpapers.desk.store import Store
from workingpapers.desk.supervisor import Supervisor, carry_out, command

# In place of the process of a run: it notes its number and that of its run, and does what the claim's name stands for.
CHILD = """
import json, os, sys, time
log, run, what = sys.argv[1:]
with open(log, "a") as file:
    print(os.getpid(), run, file=file)
tell = lambda **message: print(json.dumps(message), flush=True)
tell(total=2)
tell(done=1)
if what == "exact":  # takes until it is told to end
    sys.stdin.read()
    sys.exit(130)
if what == "large":  # does not listen
    time.sleep(60)
if what == "speed":
    sys.exit("no luck")
if what == "all benchmarks":
    tell(error="no benchmarks today")
    sys.exit()
tell(done=2)
tell(outcomes=[{"claim": what, "verdict": "fails"}])
tell(finished=True)
"""


def acting(log):
    return lambda run: [sys.executable, "-I", "-S", "-c", CHILD, str(log), str(run.id), run.what]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "page.sqlite"


@pytest.fixture
def queue(toy, path):
    state = State(path)
    yield Queue(state)
    state.close()


@pytest.fixture
def log(tmp_path):
    """The numbers of the processes that were started, with those of their runs."""
    made = tmp_path / "log"
    made.touch()
    return made


def started(log):
    return [tuple(map(int, line.split())) for line in log.read_text().splitlines()]


@contextmanager
def supervised(queue, log, **others):
    made = Supervisor(queue, log.with_name("lock"), others.get("command", acting(log)))
    made.start()
    try:
        yield made
    finally:
        made.stop()


def until(holds, within=10.0):
    end = time.monotonic() + within
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def gone(process):
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def ask(queue, what="gap", seed=0, reader="anna"):
    return queue.ask("toy", what, "smoke", seed, reader)[0]


def status_of(queue, run):
    return queue.get(run.id).status


def test_runs_are_done_in_order_one_at_a_time(queue, log):
    asked = [ask(queue, seed=seed) for seed in range(3)]
    assert [queue.ahead(run) for run in asked] == [0, 1, 2]
    with supervised(queue, log):
        until(lambda: not queue.open())
    ended = [queue.get(run.id) for run in asked]
    assert [run.status for run in ended] == ["done"] * 3
    assert [run.verdict for run in ended] == ["fails"] * 3
    assert [(run.done, run.total) for run in ended] == [(2, 2)] * 3
    assert all(earlier.finished <= later.started for earlier, later in itertools.pairwise(ended))
    assert [run for _, run in started(log)] == [run.id for run in asked]
    brief = [replace(run, outcomes=[]) for run in ended]
    assert queue.ended(2) == brief[:0:-1]
    assert queue.ended(2, before=ended[1].id) == brief[:1]
    assert queue.of_paper("toy", 1) == brief[2:]


def test_an_equal_run_is_not_queued_twice(queue, log):
    first, is_new = queue.ask("toy", "exact", "smoke", 0, "anna")
    assert is_new
    assert queue.ask("toy", "exact", "smoke", 0, "bert") == (first, False)
    for different in [("toy", "gap", "smoke", 0), ("toy", "exact", "laptop", 0), ("toy", "exact", "smoke", 1)]:
        assert queue.ask(*different, "bert")[1], different
    with supervised(queue, log):
        until(lambda: status_of(queue, first) == "running")
        assert queue.ask("toy", "exact", "smoke", 0, "bert")[0].id == first.id
        queue.cancel(first.id)
        again, is_new = queue.ask("toy", "exact", "smoke", 0, "bert")
        assert is_new, "a run that is being cancelled is of no use to the next reader"
        assert again.id != first.id


def test_the_queue_is_limited_for_each_reader_and_in_all(queue):
    for seed in range(5):
        ask(queue, seed=seed)
    with pytest.raises(Refused, match="You have 5 runs in the queue") as refused:
        ask(queue, seed=5)
    assert refused.value.status == 429
    assert ask(queue, seed=4).id == 5, "a run that is there already is not one more"
    for seed in range(5, 50):
        ask(queue, seed=seed, reader=f"reader {seed // 5}")
    with pytest.raises(Refused, match="full with 50 runs"):
        ask(queue, seed=50, reader="carla")
    queue.cancel(1)
    ask(queue, seed=50, reader="carla")


def test_old_runs_are_forgotten_but_none_that_is_to_be_done(queue, monkeypatch):
    monkeypatch.setattr(queues, "KEPT", 2)
    waiting = ask(queue, seed=100, reader="bert")
    for seed in range(4):
        queue.cancel(ask(queue, seed=seed).id)
    last = ask(queue, seed=5)
    assert [run.id for run in queue.open()] == [waiting.id, last.id]
    assert [run.seed for run in queue.ended(10)] == [3, 2]


@pytest.mark.parametrize(
    ("slug", "what", "status", "message"),
    [
        ("nowhere", "gap", 404, "No paper"),
        ("rope", "all claims", 409, "does not work yet"),
        ("toy", "scales", 404, "no claim of this name"),
    ],
)
def test_what_is_not_there_cannot_be_run(queue, slug, what, status, message):
    with pytest.raises(Refused, match=message) as refused:
        queue.ask(slug, what, "smoke", 0, "anna")
    assert refused.value.status == status
    assert not queue.open()


def test_claims_are_known_without_importing_them(toy):
    module = f"workingpapers.claims.{paper(toy).module}"
    found = claims_in(paper(toy))
    assert module not in sys.modules
    assert list(found.items()) == [(claim.name, claim.kind) for claim in load_claims(paper(toy).module)]


def test_a_queued_run_is_cancelled_at_once(queue, log):
    run = ask(queue)
    assert queue.cancel(run.id).status == "cancelled"
    with supervised(queue, log):
        other = ask(queue, seed=1)
        until(lambda: status_of(queue, other) == "done")
    assert [number for _, number in started(log)] == [other.id]
    with pytest.raises(Refused, match="has ended already") as refused:
        queue.cancel(run.id)
    assert refused.value.status == 409
    assert queue.cancel(99) is None


@pytest.mark.parametrize("what", ["exact", "large"])  # one that ends when told, and one that has to be made to
def test_a_running_one_is_cancelled_within_seconds(queue, log, monkeypatch, what):
    monkeypatch.setattr(supervisors, "GRACE", 0.3)
    run, following = ask(queue, what), ask(queue)
    with supervised(queue, log):
        until(lambda: queue.get(run.id).done == 1)
        began = time.monotonic()
        assert queue.cancel(run.id).is_stopping
        assert status_of(queue, run) == "running", "it is not cancelled before it has ended"
        until(lambda: status_of(queue, run) == "cancelled", within=2.0)
        assert gone(started(log)[0][0])
        assert time.monotonic() - began < 2
        until(lambda: status_of(queue, following) == "done")
    ended = queue.get(run.id)
    assert (ended.done, ended.total, ended.is_stopping, ended.verdict) == (1, 2, False, None)


def test_a_process_that_dies_says_why_and_the_next_run_goes_on(queue, log):
    died, told, well = ask(queue, "speed"), ask(queue, "all benchmarks"), ask(queue)
    with supervised(queue, log):
        until(lambda: not queue.open())
    assert [status_of(queue, run) for run in (died, told, well)] == ["failed", "failed", "done"]
    assert queue.get(died.id).error == "The process of this run ended with code 1.\n\nno luck"
    assert queue.get(told.id).error == "no benchmarks today"


def test_what_cannot_be_started_fails(queue, log):
    run = ask(queue)
    with supervised(queue, log, command=lambda run: ["/nowhere"]):
        until(lambda: status_of(queue, run) == "failed")
    assert "No such file" in queue.get(run.id).error


def test_a_run_survives_the_stop_of_its_server(queue, log):
    run = ask(queue, "exact")
    with supervised(queue, log):
        until(lambda: queue.get(run.id).done == 1)
    ((process, _),) = started(log)
    assert gone(process)
    assert status_of(queue, run) == "queued"
    assert queue.get(run.id).elapsed == 0
    quick = replace(run, what="gap")
    with supervised(queue, log, command=lambda found: acting(log)(quick)):
        until(lambda: status_of(queue, run) == "done")
    assert [number for _, number in started(log)] == [run.id, run.id]


SERVER = """
import sys, time
from pathlib import Path
from workingpapers.desk.page.state import State
from workingpapers.desk.queue import Queue
from workingpapers.desk.supervisor import Supervisor
path, log, child = sys.argv[1:]
command = lambda run: [sys.executable, "-I", "-S", "-c", child, log, str(run.id), run.what]
Supervisor(Queue(State(Path(path))), Path(log).with_name("lock"), command).start()
time.sleep(60)
"""


def test_a_run_survives_the_death_of_its_server_and_is_never_done_by_two(queue, path, log):
    run, unwanted = ask(queue, "exact"), ask(queue, "exact", seed=1)
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(path), str(log), CHILD])
    try:
        until(lambda: queue.get(run.id).done == 1)
        with supervised(queue, log):  # a second server, beside the first
            time.sleep(3 * supervisors.LOOK)
            assert len(started(log)) == 1
            queue.cancel(run.id)  # asked of the second, done by the first
            until(lambda: status_of(queue, run) == "cancelled")
            until(lambda: queue.get(unwanted.id).done == 1)
            assert len(started(log)) == 2
            server.kill()
            until(lambda: len(started(log)) == 3)
            assert [number for _, number in started(log)] == [run.id, unwanted.id, unwanted.id]
            assert gone(started(log)[1][0]), "the process of a run dies with its server"
    finally:
        server.kill()
        server.wait()
    assert status_of(queue, unwanted) == "queued"


def test_what_was_cancelled_while_nobody_did_runs_is_cancelled(queue, log):
    run = ask(queue)
    assert queue.take().id == run.id
    queue.cancel(run.id)
    with supervised(queue, log):
        until(lambda: status_of(queue, run) == "cancelled")
    assert started(log) == []


# --------------------------------------------------------------------------------------------------------------------
# The process of a run


def test_a_run_comes_to_what_the_command_line_comes_to(toy, tmp_path):
    store, told = tmp_path / "store.sqlite", []
    carry_out(toy, "all claims", "smoke", 0, store, 0, lambda **message: told.append(message))
    assert told[0] == {"total": 12}
    assert [message["done"] for message in told if "done" in message] == list(range(1, 13))
    outcomes = [outcome for message in told for outcome in message.get("outcomes", [])]
    assert [(outcome["claim"], outcome["verdict"]) for outcome in outcomes] == [("gap", "holds"), ("exact", "fails")]
    with Store(store) as opened, Pool(jobs=0) as pool:
        measured = {result.key: result.measured_at for result in opened.results(toy, "gap")}
        (claim, *_) = load_claims(paper(toy).module)
        outcome = check(claim, scale="smoke", store=opened, pool=pool)
        assert {**outcome.as_json(), "crashes": 0} == outcomes[0]
        assert {result.key: result.measured_at for result in opened.results(toy, "gap")} == measured

    told.clear()
    carry_out(toy, "gap", "smoke", 1, store, 0, lambda **message: told.append(message))
    with Store(store) as opened:
        again = {result.key: result.measured_at for result in opened.results(toy, "gap")}
    assert measured.items() <= again.items(), "the four seeds that both have are measured once"
    assert len(again) == len(measured) + 2


def test_crashes_are_quoted_with_measure(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(supervisors, "QUOTED", 30)
    told = []
    carry_out(toy, "large", "paper", 0, tmp_path / "store.sqlite", 0, lambda **message: told.append(message))
    (outcome,) = told[-1]["outcomes"]
    assert (outcome["verdict"], outcome["crashes"]) == ("crashed", 1)
    assert outcome["crashed"][0]["error"].endswith("the machine is too small")
    assert len(outcome["crashed"][0]["error"]) == 31


@pytest.mark.parametrize(
    ("what", "scale", "error", "message"),
    [("nothing", "smoke", LookupError, "no longer a claim nothing"), ("large", "smoke", ValueError, "at smoke scale")],
)
def test_nothing_to_do_is_said(toy, tmp_path, what, scale, error, message):
    with pytest.raises(error, match=message):
        carry_out(toy, what, scale, 0, tmp_path / "store.sqlite", 0, lambda **message: None)


def children_of(process):
    """Of a process: those it has started, and those they have."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found.setdefault(int(parent), []).append(int(stat.parent.name))
    todo, children = [process], []
    while todo:
        children += found.get(todo[-1], [])
        todo += found.get(todo.pop(), [])
    return children


SLOW = '''
"""Claims that take their time."""

import time

from workingpapers.desk.claim import Cell, Row, always, claim


@claim(paper="toy", says="It ends.", published="", grid={"n": [0, 1, 2, 3]}, expect=[always("ended")])
def slow(cell: Cell) -> Row:
    time.sleep(60 if cell.n >= 2 else 0)
    return {"ended": True}
'''


@pytest.mark.parametrize("how", ["told", "killed"])
def test_the_workers_of_a_run_end_with_it_and_keep_what_they_measured(toy, queue, tmp_path, how):
    """With real workers: each process puts the claims of the toy where the field's claims are looked for."""
    (tmp_path / "claims" / "optimization" / "toy.py").write_text(SLOW)
    site = tmp_path / "site" / "sitecustomize.py"
    site.parent.mkdir()
    site.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(queues.__file__).parents[2])!r})
        import workingpapers.claims.optimization as field
        from workingpapers.desk import catalogue
        claims = catalogue.Path({str(tmp_path / "claims")!r})
        field.__path__.append(str(claims / "optimization"))
        catalogue._claims_directory = lambda: claims
        catalogue._catalogue = lambda: {{"toy": catalogue.{paper(toy)!r}}}
        """)
    )
    run = ask(queue, "slow")
    store = tmp_path / "store.sqlite"
    process = subprocess.Popen(
        command(run, store, 2),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(site.parent)},
    )
    for line in process.stdout:
        if '"done": 2' in line:
            break
    else:
        pytest.fail(process.stderr.read())
    workers = children_of(process.pid)
    assert len(workers) == 2
    assert os.getpriority(os.PRIO_PROCESS, workers[0]) >= supervisors.NICENESS
    if how == "told":
        process.stdin.close()
    else:
        process.send_signal(signal.SIGKILL)
    until(lambda: all(gone(worker) for worker in workers), within=2.0)
    assert process.wait(supervisors.GRACE) == (130 if how == "told" else -signal.SIGKILL)
    with Store(store) as opened:
        assert sorted(result.values["n"] for result in opened.results(toy)) == [0, 1]
