"""What is new, and the Atom feeds that tell it."""

from __future__ import annotations

import json
import sqlite3
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from workingpapers.desk.catalogue import FIELDS, papers
from workingpapers.desk.feed import ATOM, ENTRIES, Item, News, atom, clean, recorded
from workingpapers.desk.listed import remove_listing
from workingpapers.desk.listing import Entry, Listing, import_listing, match
from workingpapers.desk.page.content import Content, PaperContent, read
from workingpapers.desk.page.state import State
from workingpapers.desk.store import Store

NOW = datetime(2026, 11, 16, 9, 0, tzinfo=UTC)
PAGE = uuid.UUID(int=1)


@pytest.fixture
def news(toy, tmp_path):
    state = State(tmp_path / "state.sqlite")
    yield News(state, tmp_path / "store.sqlite")
    state.close()


def with_evidence(content, slug, stamp, verdicts=("holds",), scale="laptop"):
    """The same content with evidence for one paper."""
    entries = [{"scale": scale, "kind": "claim", "verdict": verdict, "recorded": stamp} for verdict in verdicts]
    found = PaperContent(content.papers[slug].paper, "working", entries, scale, False)
    return Content(content.version + stamp, {**content.papers, slug: found})


def bring_in(store, *entries, day="Mar 12"):
    listing = Listing(day, tuple(entries), "page.txt")
    with Store(store) as opened:
        import_listing(opened.connection, listing, match(listing, papers()))


def tree(items, **given):
    given = {"address": "https://papers.example.org", "field": "", "identity": PAGE, "updated": NOW.isoformat()} | given
    return ElementTree.fromstring(atom(items, **given))


def at(element, name):
    return element.find(f"{{{ATOM}}}{name}")


def told(items):
    return [(item.kind, item.slug) for item in items]


# --------------------------------------------------------------------------------------------------------------------
# The ledger


def test_a_title_is_as_old_as_the_first_look_at_it(news):
    assert news.refresh(read(), NOW)
    assert not news.refresh(read(), NOW + timedelta(days=9))
    assert told(news.youngest()) == [("listed", "rope"), ("listed", "toy")]
    assert {item.updated for item in news.youngest()} == {"2026-11-16T09:00:00+00:00"}


def test_every_recording_of_evidence_is_news_the_first_says_that_it_works(news):
    content = read()
    news.refresh(content, NOW)
    for stamp in ("2026-11-17T10:00:00+00:00", "2026-11-18T12:00:00+02:00", "2026-11-18T12:00:00+02:00"):
        news.refresh(with_evidence(content, "toy", stamp, ("holds", "holds", "fails", "inconclusive")), NOW)
    second, first, *_ = news.youngest()
    assert (first.kind, second.kind) == ("working", "evidence")
    assert first.updated == "2026-11-17T10:00:00+00:00"
    assert second.updated == "2026-11-18T10:00:00+00:00"
    assert first.told == "Works now: at laptop scale 2 claims hold, 1 cannot be told, 1 fails."
    assert len({item.urn for item in news.youngest()}) == 4
    news.refresh(replace(content, version="evidence was removed"), NOW)
    assert len(news.youngest()) == 4


def test_the_speed_is_told_with_the_verdicts(news):
    content = with_evidence(read(), "toy", "2026-11-17T10:00:00+00:00")
    speeds = [{"expectation": "ours against theirs (speed-up)", "measured": speed} for speed in (1.21, 31.4)]
    bench = {"scale": "laptop", "kind": "benchmark", "verdict": "holds", "recorded": "", "expectations": speeds}
    toy = replace(content.papers["toy"], entries=[*content.papers["toy"].entries, bench])
    news.refresh(replace(content, papers={"toy": toy}), NOW)
    (item,) = news.youngest()
    assert item.told == "Works now: at laptop scale 1 claim holds; 1.2× to 31× the speed of the best peer."


def test_imported_titles_are_news_once_whatever_their_spelling(news, tmp_path):
    store = tmp_path / "store.sqlite"
    news.refresh(read(), NOW)
    bring_in(store, Entry("Knots Solve Ropes", "They untie what ties.", "2503.00001"), Entry("Zebras", "Stripes."))
    assert news.refresh(read(), NOW)
    bring_in(store, Entry("KNOTS solve ropes!", "Again."), day="Mar 13")
    assert not news.refresh(read(), NOW)
    zebras, knots = news.youngest(limit=2)
    assert (knots.kind, knots.title, knots.arxiv) == ("imported", "Knots Solve Ropes", "2503.00001")
    assert knots.field == "optimization"  # of the nearest paper
    assert "nearest here: Ropes That Solve Knots" in knots.told
    assert knots.link("https://p.example") == "https://arxiv.org/abs/2503.00001"
    assert zebras.link("https://p.example") == "https://p.example/"


def test_a_store_that_was_exchanged_is_read_from_the_start(news, tmp_path):
    store = tmp_path / "store.sqlite"
    bring_in(store, *(Entry(f"Title {i}", "Text.") for i in range(5)))
    news.refresh(read(), NOW)
    for file in tmp_path.glob("store.sqlite*"):
        file.unlink()
    bring_in(store, Entry("Another", "Text."))
    news.refresh(read(), NOW)
    assert news.youngest(limit=1)[0].title == "Another"
    assert [item.title for item in news.youngest() if item.kind == "imported"] == ["Another"]


def test_what_is_removed_from_the_store_is_no_news_any_more_nor_again(news, tmp_path):
    store = tmp_path / "store.sqlite"
    bring_in(store, Entry("Zebras", "Stripes."), day="Mar 12")
    bring_in(store, Entry("Lions", "Manes."), Entry("Tigers", "Stripes."), day="Mar 13")
    news.refresh(read(), NOW)
    numbers = news.last
    with Store(store) as opened:
        remove_listing(opened.connection, "Mar 13")
    bring_in(store, Entry("Bears", "Fur."), Entry("Wolves", "Fur."), day="Mar 14")  # in the place of the removed rows
    news.refresh(read(), NOW)
    shown = {item.title for item in news.youngest() if item.kind == "imported"}
    assert shown == {"Zebras", "Bears", "Wolves"}
    bring_in(store, Entry("Lions", "Manes."), day="Mar 15")
    assert not news.refresh(read(), NOW)
    assert "Lions" in {item.title for item in news.youngest()}
    assert "Lions" not in {item.title for item in news.between(numbers, news.last, ())}


def test_numbers_only_grow_and_fields_are_kept_apart(news):
    content = read()
    news.refresh(content, NOW)
    mark = news.last
    news.refresh(with_evidence(content, "toy", "2026-11-17T10:00:00+00:00"), NOW)
    assert told(news.between(mark, news.last, ["optimization"])) == [("working", "toy")]
    assert news.between(mark, news.last, ["causality"]) == []
    assert news.between(news.last, news.last + 10, []) == []
    assert news.youngest("causality") == []


def test_many_imports_are_read_in_batches_and_once(news, tmp_path):
    store = tmp_path / "store.sqlite"
    bring_in(store, Entry("One", "Text."))
    with sqlite3.connect(store) as connection:
        connection.executemany(
            "INSERT INTO listed VALUES (?, 'Mar 12', ?, 'Text.', '', 'p', ?, '2026-11-16T09:00:00+00:00')",
            ((f"t{i}", f"Title {i}", json.dumps([["toy", 0.5]])) for i in range(12_345)),
        )
    connection.close()
    news.refresh(read(), NOW)
    assert news.last == 12_345 + 3
    assert not news.refresh(read(), NOW)
    assert len(news.youngest("optimization")) == ENTRIES


# --------------------------------------------------------------------------------------------------------------------
# Atom


def test_the_feed_has_what_rfc_4287_requires(news):
    content = read()
    news.refresh(with_evidence(content, "toy", "2026-11-15T10:00:00+00:00"), NOW)
    root = tree(news.youngest())
    assert root.tag == f"{{{ATOM}}}feed"
    for name in ("id", "title", "updated", "author"):
        assert len(root.findall(f"{{{ATOM}}}{name}")) == 1, name
    assert at(at(root, "author"), "name").text == "Working Papers"
    links = {link.get("rel"): link.get("href") for link in root.findall(f"{{{ATOM}}}link")}
    assert links["self"] == "https://papers.example.org/feeds/all.atom"
    rope, toy = root.findall(f"{{{ATOM}}}entry")
    for entry in (rope, toy):
        for name in ("id", "title", "updated", "content", "summary"):
            assert len(entry.findall(f"{{{ATOM}}}{name}")) == 1, name
        assert uuid.UUID(at(entry, "id").text)
        assert datetime.fromisoformat(at(entry, "updated").text).tzinfo is not None
        assert at(entry, "link").get("rel") == "alternate"
        assert at(entry, "content").get("type") == "html"
    assert at(toy, "title").text == "A Toy & Its <Claims>"
    assert at(toy, "updated").text == "2026-11-15T10:00:00+00:00"
    assert at(toy, "link").get("href") == "https://papers.example.org/papers/toy"
    assert at(toy, "category").get("term") == "optimization"
    assert datetime.fromisoformat(at(root, "updated").text) == NOW


def test_pages_without_a_ledger_tell_the_evidence_that_there_is(news):
    content = with_evidence(read(), "toy", "2026-11-15T12:00:00+02:00")
    (item,) = recorded(content)
    news.refresh(content, NOW)
    kept = next(item for item in news.youngest() if item.kind == "working")
    assert (item.urn, item.updated) == (kept.urn, kept.updated)
    root = tree([item], url=lambda kind, *names: f"/{kind}.html")
    assert at(at(root, "entry"), "link").get("href") == "https://papers.example.org/paper.html"
    assert at(root, "updated").text == "2026-11-15T10:00:00+00:00"


def test_identifiers_stay_when_the_page_moves_and_differ_between_feeds(news):
    news.refresh(read(), NOW)
    ids = [[element.text for element in tree(news.youngest(), address=where).iter(f"{{{ATOM}}}id")]
           for where in ("https://a.example", "https://b.example")]  # fmt: skip
    assert ids[0] == ids[1]
    feeds = {at(tree([], field=field), "id").text for field in ("", *FIELDS)}
    feeds.add(at(tree([], identity=uuid.UUID(int=2)), "id").text)
    assert len(feeds) == len(FIELDS) + 2


def test_an_empty_feed_has_the_age_of_the_ledger(news):
    assert news.began(NOW) == news.began(NOW + timedelta(days=1)) == "2026-11-16T09:00:00+00:00"
    assert at(tree([], updated=news.began(NOW)), "updated").text == "2026-11-16T09:00:00+00:00"


HOSTILE = st.text(st.one_of(st.characters(), st.sampled_from("\0\x08\x1b\x85\ufffe\ud800<>&\"']]>")), max_size=80)


@given(title=HOSTILE, summary=HOSTILE)
@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_hostile_titles_are_text_in_the_feed(title, summary):
    item = Item(
        "x", "imported", "", "", clean(title), clean(summary), clean(summary), "", NOW.isoformat(), NOW.isoformat()
    )
    entry = at(tree([item]), "entry")
    assert (at(entry, "title").text or "") == clean(title)
    found = _Html()
    found.feed(at(entry, "content").text or "")
    found.close()
    assert set(found.tags) <= {"p"}
    assert "".join(found.text) == 2 * clean(summary)  # as what is new and as the summary


class _Html(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)
