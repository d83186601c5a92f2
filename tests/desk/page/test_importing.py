"""Importing over the page: what is kept, what is refused and how, and that nothing in it does anything."""

import json
import re
import threading

import pytest
from starlette.testclient import TestClient

from workingpapers.desk.apart import parse_apart
from workingpapers.desk.listed import listed_dates
from workingpapers.desk.listing import Entry, ListingError, import_listing, match, parse
from workingpapers.desk.page import importing
from workingpapers.desk.page.app import create_app
from workingpapers.desk.page.importing import Imports
from workingpapers.desk.page.settings import Settings
from workingpapers.desk.store import Store

BASE = "http://127.0.0.1:8600"
HEAD = "Daily Papers\n\nby AK and the research community\n\n"
SENTENCE = "We tie knots with care and solve them with ropes, " * 6 + "always."
EVIL = '<script>alert(1)</script> "><img src=x onerror=alert(2)> \u202egpj.exe {{ 7 * 7 }} <b>A' + 6 * "\u0301"


def page(*titles, day="Mar 11", abstract=SENTENCE):
    return f"{HEAD}{day}\n\n" + "\n\n".join(f"{title}\n\n{abstract}" for title in titles)


def json_page(*titles):
    return json.dumps([
        {"paper": {"id": f"2503.0000{i}", "title": title, "summary": SENTENCE, "submittedOnDailyAt": "2025-03-11"}}
        for i, title in enumerate(titles)
    ])  # fmt: skip


def html_page(*titles):
    cards = "".join(
        f'<article><a href="/papers/2503.0000{i}"></a><h3>{title}</h3></article>' for i, title in enumerate(titles)
    )
    return f"<html><body><time>Mar 11</time>{cards}</body></html>"


def send(client, token, content, path="/api/import", name="page.txt"):
    return client.post(path, files={"page": (name, content)}, headers={"x-page-token": token})


@pytest.mark.parametrize("write", [page, json_page, html_page])
def test_a_page_is_read_in_every_form(client, token, write):
    answer = send(client, token, write("Ropes that Solve Knots", "Knots That Solve Ropes"))
    assert answer.status_code == 200
    read = answer.json()
    assert (read["date"], read["added"], read["known"]) == ("Mar 11", 1, ["rope"])
    (new,) = read["new"]
    assert new["title"] == "Knots That Solve Ropes"
    assert new["nearest"][0]["slug"] == "rope"
    assert 0 < new["nearest"][0]["similarity"] <= 1
    assert client.get("/api/imported").json() == {"listings": [{"date": "Mar 11", "papers": 1}]}
    assert client.get("/api/imported/Mar-11").json()["new"] == [new]


def test_a_form_without_a_script(client, token):
    form = {"token": token, "text": page("Knots That Solve Ropes", "Ropes That Solve Knots")}
    answer = client.post("/import", data=form, files={"page": ("", b"")})
    assert answer.status_code == 200
    assert "Knots That Solve Ropes" in answer.text
    assert 'href="/papers/rope"' in answer.text
    assert "Knots That Solve Ropes" in client.get("/imported/Mar-11").text
    assert 'href="/imported/Mar-11"' in client.get("/imported").text


def test_an_import_twice_is_kept_once(client, token):
    assert send(client, token, page("One of New", "Two of New")).json()["added"] == 2
    assert send(client, token, page("One of New", "Two of New")).json()["added"] == 0
    assert send(client, token, page("Two of New", "Three of New")).json()["added"] == 1


def test_what_is_imported_is_found(client, token):
    send(client, token, page("Zeppelins in Winter"))
    (hit,) = client.get("/api/search", params={"q": "zeppelin"}).json()["hits"]
    assert (hit["title"], hit["slug"], hit["date"]) == ("Zeppelins in Winter", "", "Mar 11")


def test_nothing_in_a_page_is_markup(client, token):
    answer = send(client, token, page(EVIL, abstract=EVIL + SENTENCE), "/import", name=EVIL[:80])
    for shown in (answer.text, client.get("/imported/Mar-11").text, client.get("/", params={"q": "alert"}).text):
        assert "&lt;script&gt;alert(1)" in shown or "alert(1)" not in shown
        assert "<script>alert" not in shown
        assert "<img" not in shown
        assert "49" not in re.sub(r"<[^>]*>", "", shown)
        assert "\u202e" not in shown
        assert "\u0301" * 4 not in shown
    assert "alert(1)" in answer.text
    (new,) = client.get("/api/imported/Mar-11").json()["new"]
    assert "\u202e" not in new["title"]
    refused = send(client, token, b"nothing", "/import", name=EVIL[:80])
    assert refused.status_code == 422
    assert "<script>alert" not in refused.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b" ", "the page is empty"),
        (b"hello", "header is missing"),
        (b"\x00\x01", "binary"),
        (b"[" * 100_000, "nested too deeply"),
        (page("One", abstract="cut of").encode(), "stops inside a sentence"),
        (b"x" * 20_000_001, "too large"),
        (page(*(f"Title {i}" for i in range(1001))).encode(), "1,001 papers are too many"),
    ],
)
def test_a_refused_page_is_told_in_one_sentence_and_changes_nothing(client, token, settings, content, said):
    for path in ("/api/import", "/import"):
        answer = send(client, token, content, path)
        assert answer.status_code == 422
        assert said in answer.text
    assert client.get("/api/imported").json() == {"listings": []}


def test_a_page_too_large_for_any_form_is_not_read(client, token):
    answer = client.post("/import", content=b"x" * 22_000_000, headers={"x-page-token": token})
    assert answer.status_code == 413


def test_both_a_file_and_a_text_are_refused(client, token):
    answer = client.post("/api/import", data={"text": page("One")}, files={"page": ("a.txt", page("Two"))},
                         headers={"x-page-token": token})  # fmt: skip
    assert answer.status_code == 422


def test_an_import_needs_the_token(client, token):
    assert send(client, "0" * 64, page("One")).status_code == 403
    assert client.post("/import", data={"text": page("One"), "token": "no"}).status_code == 403
    assert client.post("/imported/Mar-11/remove", data={"token": "no"}).status_code == 403


def test_reading_is_cut_short(monkeypatch):
    with pytest.raises(ListingError, match="within 0 seconds"):
        parse_apart(page("One").encode(), "slow", seconds=0.001)
    monkeypatch.setattr("workingpapers.desk.apart.MEMORY", 1)  # of this process; the other one has its own
    assert parse_apart(page("One").encode(), "a page").entries == (Entry("One", SENTENCE),)


@pytest.mark.parametrize("name", ["-c", "--help", "a b", "ü", "x" * 5000])
def test_reading_apart_gives_what_reading_here_gives(name):
    for content in (page("One", "Two Ü"), json_page("One"), html_page("One &amp; Two")):
        assert parse_apart(content.encode(), name) == parse(content.encode(), name)


def test_only_one_page_is_read_at_a_time(client, token):
    imports = client.app.state.site.part(Imports)
    with imports.going_on:
        assert send(client, token, page("One")).status_code == 409
    assert send(client, token, page("One")).status_code == 200


def test_a_reader_imports_at_a_bounded_rate(client, token, monkeypatch):
    monkeypatch.setattr(importing, "PER_READER", 2)
    assert [send(client, token, content).status_code for content in (page("One"), b"no", page("Two"))] == [
        200,
        422,
        429,
    ]
    other = TestClient(client.app, base_url=BASE)
    others = re.search(r'page-token" content="(\w+)"', other.get("/import").text)[1]
    assert send(other, others, page("Three")).status_code == 200
    monkeypatch.setattr(importing, "PER_ALL", 3)
    assert send(other, others, page("Four")).status_code == 429


def test_the_store_does_not_grow_without_bound(client, token, monkeypatch):
    monkeypatch.setattr("workingpapers.desk.listing.MOST_LISTED", 2)
    assert send(client, token, page("One", "Two")).status_code == 200
    answer = send(client, token, page("Three"))
    assert answer.status_code == 422
    assert "2 imported papers at most" in answer.json()["detail"]
    assert client.get("/api/imported").json()["listings"][0]["papers"] == 2


def test_a_wrong_import_can_be_removed(client, token):
    send(client, token, page("One of Wrong", "Two of Wrong"))
    send(client, token, page("One of Right", day="Mar 12"))
    answer = client.post("/imported/Mar-11/remove", data={"token": token}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/imported")
    assert client.get("/api/imported").json() == {"listings": [{"date": "Mar 12", "papers": 1}]}
    assert client.get("/api/imported/Mar-11").status_code == 404
    assert client.get("/api/search", params={"q": "wrong"}).json()["hits"] == []
    assert len(client.get("/api/search", params={"q": "right"}).json()["hits"]) == 1


def test_on_a_public_page_a_reader_removes_their_own_import_only(settings, tmp_path):
    public = Settings(store=settings.store, address="http://papers.example")
    with TestClient(create_app(public), base_url="http://papers.example") as mine:
        token = re.search(r'page-token" content="(\w+)"', mine.get("/import").text)[1]
        send(mine, token, page("One of Mine"))
        other = TestClient(mine.app, base_url="http://papers.example")
        others = re.search(r'page-token" content="(\w+)"', other.get("/import").text)[1]
        assert "Remove" not in other.get("/imported/Mar-11").text
        assert other.post("/imported/Mar-11/remove", data={"token": others}).status_code == 403
        send(other, others, page("One of Theirs"))
        assert "Remove" in mine.get("/imported/Mar-11").text
        assert mine.post("/imported/Mar-11/remove", data={"token": token}).status_code == 200
        assert [new["title"] for new in mine.get("/api/imported/Mar-11").json()["new"]] == ["One of Theirs"]


def test_many_papers_come_in_pages(client, token):
    send(client, token, page(*(f"Title {i}" for i in range(120))))
    shown = [client.get(f"/api/imported/Mar-11?page={number}").json() for number in (1, 2, 3)]
    assert [len(part["new"]) for part in shown] == [50, 50, 20]
    assert [new["title"] for part in shown for new in part["new"]] == [f"Title {i}" for i in range(120)]
    assert 'rel="next"' in client.get("/imported/Mar-11?page=2").text
    for wrong in ("4", "0", "-1", "x", "99999999999999999999"):
        assert client.get("/imported/Mar-11", params={"page": wrong}).status_code in (404, 422)
    for day in ("Mar", "Mar-111", "mar-11", "Mar-11%00"):
        assert client.get(f"/imported/{day}").status_code in (404, 422)


def test_what_the_command_line_imports_while_the_page_runs_is_found(client, settings):
    listing = parse(page("Zeppelins in Winter"), "by hand")
    with Store(settings.store) as store:
        import_listing(store.connection, listing, match(listing, {}))
    found = threading.Event()
    for _ in range(100):
        if client.get("/api/search", params={"q": "zeppelin"}).json()["hits"]:
            found.set()
            break
        found.wait(0.05)
    assert found.is_set()
    assert "Zeppelins" in client.get("/imported/Mar-11").text


def test_a_damaged_store_is_a_503(settings):
    settings.store.write_bytes(b"no store")
    with TestClient(create_app(settings), base_url=BASE) as client:
        assert client.get("/api/imported").status_code == 503
        assert client.get("/imported").status_code == 503
        assert client.get("/api/search", params={"q": "toy"}).json()["hits"][0]["slug"] == "toy"


def test_dates_of_a_store_that_never_imported(tmp_path):
    with Store(tmp_path / "store.sqlite") as store:
        assert listed_dates(store.connection) == []
