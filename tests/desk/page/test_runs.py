"""Running checks from the page: forms, JSON, server-sent events, and one real run from the browser to the store."""

import json
import re
import threading
import time

import httpx
import pytest
from playwright.sync_api import expect
from starlette.testclient import TestClient

from workingpapers import cli
from workingpapers.desk.catalogue import paper
from workingpapers.desk.page import runs
from workingpapers.desk.page.app import create_app
from workingpapers.desk.page.content import PaperContent
from workingpapers.desk.page.render import Renderer
from workingpapers.desk.page.settings import Settings
from workingpapers.desk.store import Store

from .conftest import served, token_in

GAP = {"slug": "toy", "what": "gap", "scale": "smoke", "seed": 0}


def ask(client, token, **changes):
    return client.post("/api/runs", json={**GAP, **changes}, headers={"x-page-token": token})


def until(look, within=20.0):
    end = time.monotonic() + within
    while not (found := look()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
    return found


def ended(client, number):
    def look():
        run = client.get(f"/api/runs/{number}").json()
        return None if run["status"] in ("queued", "running") else run

    return until(look)


def events_of(lines):
    """(kind, id, data) of each event; comments as (None, None, text)."""
    event = {}
    for line in lines:
        if line.startswith(":"):
            yield None, None, line
        elif line:
            name, _, value = line.partition(": ")
            event[name] = value
        else:
            if "data" in event:
                yield event["event"], int(event["id"]), json.loads(event["data"])
            event = {}


def test_the_form_leads_to_a_run_that_shows_its_outcome(toy_runs, client, token):
    answer = client.post("/runs", data={**GAP, "what": "all claims", "token": token}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs/1")
    found = ended(client, 1)
    assert (found["status"], found["verdict"], found["done"], found["total"]) == ("done", "fails", 12, 12)
    page = client.get("/runs/1").text
    assert "Done: 1 holds, 1 fails." in page
    assert "half the gap of &lt;the&gt; old method" in page
    assert "gap of new below old" in page
    assert "broken in 1 of 2 rows" in page
    assert "http-equiv" not in page, "a page that is final does not reload itself"
    assert "workingpapers check toy --scale smoke --seed 0" in page
    overview = client.get("/runs").text
    assert client.head("/runs").status_code == client.head("/runs/1").status_code == 200
    assert 'href="/runs/1"' in overview
    assert "✗ fails" in overview


def test_the_form_offers_every_claim_once_and_says_how_long(toy):
    recorded = [
        {"claim": claim, "kind": kind, "scale": scale, "seconds": seconds}
        for claim, kind, scale, seconds in [
            ("gap", "claim", "laptop", 100.0),
            ("exact", "claim", "laptop", 100.0),
            ("gap", "claim", "smoke", 2.5),
            ("speed", "benchmark", "smoke", 50.0),
        ]
    ]
    page = PaperContent(paper(toy), "working", recorded, "laptop", False)
    form = " ".join(Renderer(is_live=True)("_run_form.html", page=page).split())
    assert re.findall(r'<option value="([^"]*)">([^<]*)<', form) == [
        ("all claims", "All claims"),
        ("gap", "Gap"),
        ("exact", "Exact"),
        ("speed", "Speed"),
        ("smoke", "Smoke: 2.5 s for all claims"),
        ("laptop", "Laptop: 3 min 20 s for all claims"),
        ("paper", "Paper: may take hours"),
    ]


def test_a_run_that_waits_reloads_without_scripts_and_can_be_cancelled(toy_runs, client, token):
    toy_runs.touch()
    first, second = ask(client, token).json(), ask(client, token, seed=1).json()
    page = client.get(f"/runs/{second['id']}").text
    assert "Waiting: 1 run comes first." in page
    assert '<noscript><meta http-equiv="refresh"' in page
    answer = client.post(f"/runs/{second['id']}/cancel", data={"token": token}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/runs/{second['id']}")
    assert client.get(f"/api/runs/{second['id']}").json()["status"] == "cancelled"
    until(lambda: client.get(f"/api/runs/{first['id']}").json()["total"] == 10)
    assert [run["id"] for run in client.get("/api/runs").json()] == [first["id"], second["id"]]
    assert client.post(f"/api/runs/{first['id']}/cancel", headers={"x-page-token": token}).json()["is_stopping"]
    assert ended(client, first["id"])["status"] == "cancelled"
    again = client.post(f"/api/runs/{first['id']}/cancel", headers={"x-page-token": token})
    assert (again.status_code, again.json()["detail"]) == (409, "Run 1 has ended already.")
    assert client.post("/runs/1/cancel", data={"token": token}).status_code == 200, "the page says how it ended"


def test_on_a_public_page_a_reader_cancels_their_own_run_only(toy_runs, settings):
    toy_runs.touch()
    public = Settings(store=settings.store, address="http://papers.example", jobs=1)
    with TestClient(create_app(public), base_url="http://papers.example") as mine:
        token = token_in(mine.get("/").text)
        number = ask(mine, token).json()["id"]
        until(lambda: mine.get(f"/api/runs/{number}").json()["status"] == "running")
        other = TestClient(mine.app, base_url="http://papers.example")  # without the cookie: another reader
        theirs = token_in(other.get("/").text)
        assert "Cancel this run" in mine.get(f"/runs/{number}").text
        assert "Cancel this run" not in other.get(f"/runs/{number}").text
        assert other.post(f"/runs/{number}/cancel", data={"token": theirs}).status_code == 403
        assert other.post(f"/api/runs/{number}/cancel", headers={"x-page-token": theirs}).status_code == 403
        assert mine.post(f"/api/runs/{number}/cancel", headers={"x-page-token": token}).status_code == 200
        assert ended(mine, number)["status"] == "cancelled"


def test_equal_requests_lead_to_one_run_and_a_reader_has_five(toy_runs, client, token):
    toy_runs.touch()
    made = [ask(client, token, seed=seed) for seed in range(5)]
    assert [answer.status_code for answer in made] == [201] * 5
    same = ask(client, token, seed=3)
    assert (same.status_code, same.json()["id"]) == (200, 4)
    refused = ask(client, token, seed=5)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    assert "You have 5 runs" in refused.json()["detail"]
    page = client.post("/runs", data={**GAP, "seed": 5, "token": token})
    assert page.status_code == 429
    assert "You have 5 runs" in page.text


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"slug": "nowhere"}, 404),
        ({"slug": "rope"}, 409),
        ({"slug": "../toy"}, 422),
        ({"what": "solve"}, 404),
        ({"what": "gap; rm"}, 422),
        ({"scale": "huge"}, 422),
        ({"seed": -1}, 422),
        ({"seed": 2**31}, 422),
        ({"seed": "0x1"}, 422),
        ({"slug": None}, 422),
    ],
)
def test_bad_requests_are_refused(client, token, changes, status):
    assert ask(client, token, **changes).status_code == status
    form = {name: value for name, value in {**GAP, **changes, "token": token}.items() if value is not None}
    assert client.post("/runs", data=form).status_code == status
    assert client.get("/api/runs").json() == []


def test_a_run_needs_the_readers_token(client, token):
    for wrong in ("", "0" * 64):
        assert ask(client, wrong).status_code == 403
        assert client.post("/runs", data={**GAP, "token": wrong}).status_code == 403
        assert client.post("/runs/1/cancel", data={"token": wrong}).status_code == 403
        assert client.post("/api/runs/1/cancel", headers={"x-page-token": wrong}).status_code == 403
    assert client.get("/api/runs").json() == []


@pytest.mark.parametrize("number", ["1", "0", "-1", "x", "9" * 30])
def test_a_run_that_is_not_there(client, token, number):
    for path in ("/runs/{}", "/runs/{}/state", "/runs/{}/events", "/api/runs/{}"):
        assert client.get(path.format(number)).status_code == (404 if number == "1" else 422)
    answer = client.post(f"/api/runs/{number}/cancel", headers={"x-page-token": token})
    assert answer.status_code == (404 if number == "1" else 422)


def test_the_history_goes_on_page_by_page(toy_runs, client, token, monkeypatch):
    monkeypatch.setattr(runs, "SHOWN", 2)
    toy_runs.touch()
    for seed in range(5):
        number = ask(client, token, seed=seed).json()["id"]
        client.post(f"/api/runs/{number}/cancel", headers={"x-page-token": token})
        ended(client, number)
    first = client.get("/runs").text
    assert 'href="/runs/5"' in first
    assert 'href="/runs?before=4"' in first
    second = client.get("/runs?before=4").text
    assert [f'href="/runs/{number}"' in second for number in (5, 4, 3, 2, 1)] == [False, False, True, True, False]
    assert "Nothing is running" not in second
    assert "before" not in client.get("/runs?before=2").text


def test_a_server_that_stops_leaves_its_run_to_the_next(toy_runs, settings):
    toy_runs.touch()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8600") as client:
        assert ask(client, token_in(client.get("/").text)).status_code == 201
        until(lambda: client.get("/api/runs/1").json()["status"] == "running")
    toy_runs.unlink()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8600") as client:
        assert ended(client, 1)["verdict"] == "holds"


def test_rendered_pages_learn_of_runs(toy_runs, client, token):
    site = client.app.state.site
    before = site.version
    number = ask(client, token).json()["id"]
    asked = site.version
    ended(client, number)
    assert len({before, asked, site.version}) == 3
    (run,) = runs.recent(site, "toy", 5)
    assert (run.id, run.verdict) == (number, "holds")
    assert runs.recent(site, "rope", 5) == []


# --------------------------------------------------------------------------------------------------------------------
# Server-sent events


@pytest.fixture
def reader(address):
    """A client of the served page, and its token."""
    with httpx.Client(base_url=address, timeout=20) as found:
        yield found, token_in(found.get("/").text)


def test_events_tell_of_progress_until_the_end(toy_runs, reader, monkeypatch):
    monkeypatch.setattr(runs, "LOOK", 0.02)
    client, token = reader
    toy_runs.touch()
    number = ask(client, token).json()["id"]
    with client.stream("GET", f"/runs/{number}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = events_of(stream.iter_lines())
        told = []
        for kind, identity, data in events:
            told.append((kind, identity, data))
            if data["total"] and toy_runs.exists():
                assert client.get("/runs").status_code == 200, "the page answers others meanwhile"
                toy_runs.unlink()
        kinds = [kind for kind, _, _ in told]
        assert kinds == ["progress"] * (len(told) - 1) + ["done"], "the stream ends with the run"
    identities = [identity for _, identity, _ in told]
    assert identities == sorted(set(identities))
    first, *_, last = [data for _, _, data in told]
    assert (first["done"], first["total"]) == (0, 0)
    assert (last["status"], last["done"], last["total"], last["told"]) == ("done", 10, 10, "Done: holds.")
    # who comes back is told how it stands at once; who knows already, not to come again
    with client.stream("GET", f"/runs/{number}/events", headers={"last-event-id": str(identities[0])}) as stream:
        assert [kind for kind, _, _ in events_of(stream.iter_lines())] == ["done"]
    known = client.get(f"/runs/{number}/events", headers={"last-event-id": str(identities[-1])})
    assert (known.status_code, known.content) == (204, b"")


def test_a_silent_stream_shows_that_it_lives_and_ends_in_time(toy_runs, reader, monkeypatch):
    monkeypatch.setattr(runs, "LOOK", 0.02)
    monkeypatch.setattr(runs, "HEARTBEAT", 0.1)
    monkeypatch.setattr(runs, "LIFETIME", 0.7)
    client, token = reader
    toy_runs.touch()
    number = ask(client, token).json()["id"]
    until(lambda: client.get(f"/api/runs/{number}").json()["total"])
    with client.stream("GET", f"/runs/{number}/events") as stream:
        found = list(events_of(stream.iter_lines()))
    kinds = [kind for kind, _, _ in found]
    assert kinds[0] == "progress"
    assert kinds.count(None) >= 3


def test_streams_are_limited_and_a_reader_who_leaves_makes_room(toy_runs, reader, monkeypatch):
    monkeypatch.setattr(runs, "LOOK", 0.02)
    monkeypatch.setattr(runs, "HEARTBEAT", 0.05)
    monkeypatch.setattr(runs, "STREAMS", 1)
    client, token = reader
    toy_runs.touch()
    number = ask(client, token).json()["id"]
    with client.stream("GET", f"/runs/{number}/events") as stream:
        lines = stream.iter_lines()
        next(lines)
        refused = client.get(f"/runs/{number}/events")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        lines.close()

    def is_let_in():
        with client.stream("GET", f"/runs/{number}/events") as stream:
            return stream.status_code == 200

    until(is_let_in)


def test_streams_end_when_the_server_is_told_to_stop(toy_runs, settings, monkeypatch):
    monkeypatch.setattr(runs, "LOOK", 0.02)
    toy_runs.touch()
    found = []
    with served(settings) as address:
        with httpx.Client(base_url=address) as client:
            assert ask(client, token_in(client.get("/runs").text)).status_code == 201
            until(lambda: client.get("/api/runs/1").json()["total"])
        follower = threading.Thread(target=lambda: found.append(httpx.get(f"{address}/runs/1/events", timeout=20)))
        follower.start()
        time.sleep(0.1)
        assert follower.is_alive()
    follower.join(1)
    assert "event: progress" in found[0].text, "the answer is complete"


def test_one_look_at_the_queue_serves_every_stream(toy_runs, reader, monkeypatch):
    looks = []
    several = runs.Queue.several

    def counted(queue, numbers):
        looks.append(list(numbers))
        return several(queue, numbers)

    monkeypatch.setattr(runs, "LOOK", 0.05)
    client, token = reader
    toy_runs.touch()
    number = ask(client, token).json()["id"]
    done = threading.Barrier(6)

    def follow():
        with httpx.stream("GET", f"{client.base_url}/runs/{number}/events", timeout=20) as stream:
            lines = stream.iter_lines()
            next(lines)
            done.wait()
            assert [kind for kind, _, _ in events_of(lines)][-1] == "done"

    followers = [threading.Thread(target=follow) for _ in range(5)]
    for follower in followers:
        follower.start()
    done.wait()
    monkeypatch.setattr(runs.Queue, "several", counted)
    began = time.monotonic()
    toy_runs.unlink()
    for follower in followers:
        follower.join()
    assert len(looks) <= (time.monotonic() - began) / 0.05 + 2
    until(lambda: not client.get("/runs").text.count("hx-trigger"))


# --------------------------------------------------------------------------------------------------------------------
# Browser

ASK = """async () => fetch("/api/runs", {method: "POST", body: JSON.stringify({slug: "toy", what: "gap"}), headers: {
    "content-type": "application/json",
    "x-page-token": document.querySelector("meta[name=page-token]").content}})"""


def at_a_run(tab, address):
    tab.goto(f"{address}/runs")
    tab.evaluate(ASK)
    tab.goto(f"{address}/runs/1")


def test_a_reader_watches_a_run_and_reloads(toy_runs, address, tab):
    toy_runs.touch()
    at_a_run(tab, address)
    said, bar = tab.get_by_role("status"), tab.get_by_label("Cells measured")
    expect(said).to_have_text("0 of 10 cells measured.")
    expect(bar).to_have_js_property("max", 10)
    expect(bar).to_have_js_property("value", 0)
    tab.reload()
    expect(said).to_have_text("0 of 10 cells measured.")
    tab.evaluate("() => { window.kept = true }")
    toy_runs.unlink()
    expect(said).to_have_text("Done: holds.")
    expect(tab.get_by_role("table")).to_have_count(1)
    expect(bar).to_have_count(0)
    assert tab.evaluate("() => window.kept"), "the page is not loaded again"


def test_a_reader_cancels(toy_runs, address, tab):
    toy_runs.touch()
    at_a_run(tab, address)
    expect(tab.get_by_role("status")).to_have_text("0 of 10 cells measured.")
    tab.get_by_role("button", name="Cancel this run").click()
    expect(tab.get_by_role("status")).to_have_text("Cancelled after 0 of 10 cells.")
    expect(tab.get_by_role("button", name="Run again")).to_have_count(1)
    expect(tab.get_by_role("button", name="Cancel this run")).to_have_count(0)


def test_when_events_are_refused_the_page_asks(toy_runs, address, browser, monkeypatch):
    monkeypatch.setattr(runs, "STREAMS", 0)
    toy_runs.touch()
    context = browser.new_context()  # not `tab`: a refused stream is an error in the console
    try:
        tab = context.new_page()
        at_a_run(tab, address)
        toy_runs.unlink()
        expect(tab.get_by_role("status")).to_have_text("Done: holds.", timeout=10_000)
    finally:
        context.close()


# --------------------------------------------------------------------------------------------------------------------
# The real catalogue


def test_a_real_run_lands_in_the_store_of_the_command_line(tmp_path, capsys):
    settings = Settings(store=tmp_path / "store.sqlite", jobs=2)
    with served(settings) as address, httpx.Client(base_url=address) as client:
        token = token_in(client.get("/runs").text)
        wanted = {"slug": "halpern", "what": "games_without_tuning"}
        assert ask(client, token, **wanted).status_code == 201
        with client.stream("GET", "/runs/1/events", timeout=60) as stream:
            *_, (kind, _, last) = events_of(stream.iter_lines())
        assert (kind, last["status"], last["done"]) == ("done", "done", 20), client.get("/api/runs/1").json()
        (outcome,) = client.get("/api/runs/1").json()["outcomes"]

    def measured():
        with Store(settings.store) as store:
            return {result.key: result.measured_at for result in store.results("halpern")}

    before = measured()
    assert len(before) == 20
    capsys.readouterr()
    cli.main(["check", "halpern", "--claim", "games_without_tuning", "--jobs", "0", "--json",
              "--store", str(settings.store)])  # fmt: skip
    (same,) = json.loads(capsys.readouterr().out)
    assert {**same, "crashes": 0} == outcome
    assert measured() == before, "no cell is measured twice"
