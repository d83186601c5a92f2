"""Search over the page: filters, kinds of search, many imported titles, searching while others write."""

import threading
import time

import numpy as np
import pytest
from starlette.testclient import TestClient

from workingpapers.desk.listed import remove_listing
from workingpapers.desk.listing import Entry, Listing, Match, import_listing
from workingpapers.desk.meaning import Meaning
from workingpapers.desk.page import searching
from workingpapers.desk.page.app import create_app
from workingpapers.desk.page.searching import BY_BOTH, BY_WORDS, Finder, find, how
from workingpapers.desk.page.site import Site
from workingpapers.desk.places import titles_path
from workingpapers.desk.store import Store

BASE = "http://127.0.0.1:8600"


def put(settings, *titles, date="Mar 11"):
    matches = [Match(Entry(title, "An abstract."), None, []) for title in titles]
    with Store(settings.store) as store:
        import_listing(store.connection, Listing(date, tuple(found.entry for found in matches), "by hand"), matches)


def hits(client, **asked):
    answer = client.get("/api/search", params=asked)
    assert answer.status_code == 200
    return answer.json()["hits"]


def test_hits_carry_what_a_page_shows(client):
    (hit,) = hits(client, q="minimises")
    assert hit == {
        "slug": "toy", "title": "A Toy & Its <Claims>", "snippet": "minimises toys", "title_spans": [],
        "snippet_spans": [[0, 9]], "score": hit["score"], "field": "optimization", "status": "listed",
        "verdict": None, "date": "", "arxiv": "",
    }  # fmt: skip
    assert hit["score"] > 0


def test_filters_combine(client, settings):
    put(settings, "Toys of Winter")
    client.app.state.site.part(Finder).sync()
    assert [hit["slug"] for hit in hits(client, q="toy")] == ["toy", ""]
    assert [hit["slug"] for hit in hits(client, q="toy", field="optimization", status="listed")] == ["toy"]
    for empty in ({"field": "causality"}, {"status": "working"}, {"verdict": "holds"},
                  {"field": "optimization", "status": "working"}):  # fmt: skip
        assert hits(client, q="toy", **empty) == []
    assert len(hits(client, q="toy", limit=1)) == 1


@pytest.mark.parametrize(
    "wrong", [{"q": "x" * 201}, {"q": "a", "limit": 0}, {"q": "a", "limit": 201}, {"q": "a", "field": "x"},
              {"q": "a", "verdict": "maybe"}, {"q": "a", "status": "x"}, {}],
)  # fmt: skip
def test_bounds(client, wrong):
    assert client.get("/api/search", params=wrong).status_code == 422


@pytest.mark.parametrize(
    "query", ['"', "'; DROP TABLE papers; --", "\x00", "(", "NEAR(a b)", "*", "😀", " ", "a" * 200]
)
def test_any_text_is_a_query(client, query):
    assert client.get("/api/search", params={"q": query}).status_code == 200


def test_docstrings_lead_to_their_paper(settings, monkeypatch):
    class Entry:
        module, name, text = "optimization.rope", "untangle", "Loosens a bight of hemp."

    monkeypatch.setattr(searching.reference, "entries", lambda: [Entry])
    with TestClient(create_app(settings), base_url=BASE) as client:
        assert _soon(lambda: hits(client, q="hemp"))
        (hit,) = hits(client, q="hemp")
        assert (hit["slug"], hit["snippet"]) == ("rope", "untangle: Loosens a bight of hemp.")


def test_without_the_extra_it_is_by_words_and_says_so(client):
    answer = client.get("/api/search", params={"q": "toys that solve"}).json()
    assert answer["by"] == BY_WORDS
    assert [hit["slug"] for hit in answer["hits"]] == ["toy"]


def test_with_the_extra_it_is_by_words_and_meaning_and_says_so(client, settings):
    site = client.app.state.site
    finder = site.part(Finder)

    def alike(texts):
        return np.array([[1.0, 0.0] if "toy" in text.lower() or "doll" in text else [0.0, 1.0] for text in texts])

    assert find(site, "wooden doll") == []
    finder._meaning = Meaning(finder._papers, encode=alike)
    assert [hit.slug for hit in find(site, "wooden doll")] == ["toy"]
    assert (how(site, "wooden doll"), how(site, "doll")) == (BY_BOTH, BY_WORDS)
    assert client.get("/api/search", params={"q": "wooden doll"}).json()["by"] == BY_BOTH


def test_a_meaning_that_fails_leaves_the_words(settings, monkeypatch):
    def broken(*_):
        raise OSError("the model is damaged")

    monkeypatch.setattr(searching, "Meaning", broken)
    monkeypatch.setattr(searching, "is_installed", lambda: True)
    object.__setattr__(settings, "meaning", True)
    with TestClient(create_app(settings), base_url=BASE) as client:
        put(settings, "Zeppelins in Winter")
        assert hits(client, q="toy")[0]["slug"] == "toy"
        assert _soon(lambda: hits(client, q="zeppelin"))  # the thread goes on


def test_imports_of_another_program_are_found_without_a_restart(client, settings):
    assert hits(client, q="zeppelin") == []
    put(settings, "Zeppelins in Winter")
    assert _soon(lambda: hits(client, q="zeppelin"))
    with Store(settings.store) as store:
        remove_listing(store.connection, "Mar 11")
    assert _soon(lambda: not hits(client, q="zeppelin"))


def test_the_listing_does_not_show_a_search_of_before_the_import(client, settings):
    assert "Zeppelins" not in client.get("/", params={"q": "zeppelin"}).text
    put(settings, "Zeppelins in Winter")
    assert _soon(lambda: "Winter" in client.get("/", params={"q": "zeppelin"}).text)


def test_a_restart_finds_what_was_imported(settings):
    put(settings, "Zeppelins in Winter")
    for _ in range(2):
        with TestClient(create_app(settings), base_url=BASE) as client:
            assert _soon(lambda client=client: hits(client, q="zeppelin"))
    titles_path(settings.store).write_bytes(b"damaged")
    with TestClient(create_app(settings), base_url=BASE) as client:
        assert _soon(lambda: hits(client, q="zeppelin"))


def test_searching_while_papers_are_imported_and_removed(settings):
    """Every search sees whole listings, and none waits for the writers."""
    site = Site(settings)
    finder = site.part(Finder)
    done, trouble, slowest = threading.Event(), [], 0.0

    def change():
        try:
            for _ in range(6):
                put(settings, *(f"Zeppelin {i} of Winter" for i in range(40)))
                finder.sync()
                with Store(settings.store) as store:
                    remove_listing(store.connection, "Mar 11")
                finder.sync()
        except Exception as error:
            trouble.append(error)
        finally:
            done.set()

    def search():
        nonlocal slowest
        try:
            while not done.is_set():
                start = time.perf_counter()
                count = len(find(site, "zeppelin"))
                slowest = max(slowest, time.perf_counter() - start)
                if count not in (0, 40):
                    trouble.append(count)
        except Exception as error:
            trouble.append(error)

    threads = [threading.Thread(target=change), *(threading.Thread(target=search) for _ in range(3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    finder.close()
    site.close()
    assert not trouble
    assert slowest < 2.0


def _soon(ask, seconds=10.0):
    """Whether it comes true; looks again every few milliseconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = ask()
        if found:
            return found
        time.sleep(0.02)
    return False
