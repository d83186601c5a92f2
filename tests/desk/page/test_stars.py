"""Stars: one per reader and paper, kept over a restart; trending by stars and evidence that fade alike."""

import re
from datetime import UTC, datetime, timedelta

import pytest
from starlette.testclient import TestClient

from workingpapers.desk.page import stars
from workingpapers.desk.page.app import create_app
from workingpapers.desk.page.content import PaperContent
from workingpapers.desk.page.site import Site
from workingpapers.desk.page.stars import HALF_LIFE, Stars

BASE = "http://127.0.0.1:8600"


class Clock:
    def __init__(self):
        self.now = datetime(2030, 1, 1, tzinfo=UTC).timestamp()

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def site(settings):
    made = Site(settings)
    yield made
    made.close()


def other_reader(client):
    """A client of the same page without the first one's cookie, and its token."""
    other = TestClient(client.app, base_url=BASE)
    page = other.get("/").text
    return other, re.search(r'<meta name="page-token" content="(\w+)">', page)[1]


def test_a_star_is_given_and_taken_back(client, token):
    for starred, count in ((True, 1), (False, 0), (True, 1)):
        answer = client.post("/api/stars/toy", headers={"x-page-token": token})
        assert answer.json() == {"slug": "toy", "starred": starred, "stars": count}
    assert client.get("/api/stars").json()["starred"] == ["toy"]
    assert client.get("/api/stars").json()["stars"] == {"toy": 1}


def test_every_reader_counts_once(client, token):
    other, others = other_reader(client)
    client.post("/api/stars/toy", headers={"x-page-token": token})
    assert other.post("/api/stars/toy", headers={"x-page-token": others}).json()["stars"] == 2
    assert other.post("/api/stars/toy", headers={"x-page-token": others}).json() == {
        "slug": "toy", "starred": False, "stars": 1,
    }  # fmt: skip
    assert client.get("/api/stars").json()["starred"] == ["toy"]
    assert other.get("/api/stars").json()["starred"] == []


def test_a_star_needs_the_readers_own_token(client, token):
    _, others = other_reader(client)
    for wrong in ("", "0" * 64, others):
        assert client.post("/api/stars/toy", headers={"x-page-token": wrong}).status_code == 403
        assert client.post("/stars/toy", data={"token": wrong}).status_code == 403
    assert client.get("/api/stars").json()["stars"] == {}


def test_the_button_works_with_and_without_htmx(client, token):
    part = client.post("/stars/toy", headers={"x-page-token": token, "hx-request": "true"})
    assert "<html" not in part.text
    assert 'aria-pressed="true"' in part.text
    assert 'action="/stars/toy"' in part.text
    assert token in part.text  # so that it can be pressed again
    for referer, to in (
        (f"{BASE}/papers/toy?x=1", "/papers/toy?x=1"),
        ("http://evil.example/papers/toy", "/"),
        (f"{BASE}//evil.example/", "/"),
        ("http://[", "/"),
        ("", "/"),
    ):
        answer = client.post("/stars/toy", data={"token": token}, headers={"referer": referer}, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, to)


@pytest.mark.parametrize("slug", ["nothing", "toy%2F..", "%00", "<script>", "x" * 5000])
def test_an_unknown_paper_is_404(client, token, slug):
    for path in ("/stars/", "/api/stars/"):
        assert client.post(path + slug, headers={"x-page-token": token}).status_code == 404


def test_stars_outlive_a_restart(settings, client, token):
    client.post("/api/stars/toy", headers={"x-page-token": token})
    reader = client.cookies["reader"]
    with TestClient(create_app(settings), base_url=BASE, cookies={"reader": reader}) as again:
        assert again.get("/api/stars").json()["starred"] == ["toy"]
        assert again.get("/api/stars").json()["stars"] == {"toy": 1}


def test_the_readers_numbers_are_not_stored(settings, client, token):
    client.post("/api/stars/toy", headers={"x-page-token": token})
    files = [settings.state, settings.state.with_name(settings.state.name + "-wal")]
    assert not any(client.cookies["reader"].encode() in file.read_bytes() for file in files if file.exists())


def test_the_listing_shows_the_reader_their_own_star_at_once(client, token):
    assert 'aria-pressed="true"' not in client.get("/").text
    client.post("/api/stars/rope", headers={"x-page-token": token})
    assert 'aria-pressed="true"' in client.get("/").text
    other, _ = other_reader(client)
    assert 'aria-pressed="true"' not in other.get("/").text


def test_recent_stars_lead_and_old_ones_fade(site, clock):
    found = Stars(site, clock)
    assert found.trending() == ["toy", "rope"]
    found.toggle("rope", "a")
    assert found.trending() == ["rope", "toy"]
    clock.now += 3 * HALF_LIFE  # the star of rope is worth an eighth now
    found.toggle("toy", "b")
    assert found.trending() == ["toy", "rope"]
    for reader in range(8):
        clock.now -= 3 * HALF_LIFE
        found.toggle("rope", f"old {reader}")
        clock.now += 3 * HALF_LIFE
    assert found.trending() == ["rope", "toy"]  # nine old ones outweigh it


def test_fresh_evidence_counts_as_three_stars(site, clock, monkeypatch):
    recorded = {"toy": (datetime.fromtimestamp(clock.now, UTC) - timedelta(days=7)).isoformat(), "rope": ""}
    monkeypatch.setattr(PaperContent, "recorded", property(lambda page: recorded[page.paper.slug]))
    found = Stars(site, clock)
    found.toggle("rope", "a")
    assert found.trending() == ["toy", "rope"]  # 3 · 2^-1 against 1
    found.toggle("rope", "b")
    assert found.trending() == ["rope", "toy"]


def test_a_burst_of_stars_makes_pages_anew_only_once(site, monkeypatch):
    changes = []
    monkeypatch.setattr(site, "changed", lambda: changes.append(1))
    for reader in range(200):
        stars._toggled(site, "toy", f"{reader:032x}")
    assert len(changes) == 1
    assert stars.counts(site) == {"toy": 200}


def test_there_is_a_most(site, monkeypatch):
    monkeypatch.setattr(stars, "MOST", 2)
    found = Stars(site)
    found.toggle("toy", "a")
    found.toggle("toy", "b")
    with pytest.raises(OverflowError):
        found.toggle("toy", "c")
    found.toggle("toy", "a")
    assert found.toggle("toy", "c")
