"""Reading Daily Papers pages: whole or refused, whatever the file; matching and keeping what they hold."""

from __future__ import annotations

import html as html_escapes
import json
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workingpapers.desk import catalogue, listing
from workingpapers.desk.catalogue import Paper, paper, papers
from workingpapers.desk.listing import Entry, Listing, ListingError, import_listing, match, parse, title_key

HEADER = "new\n\nGet trending papers in your email inbox!\n\nSubscribe\n\nbyAK and the research community\n\n"

# Titles with the difficulties of real ones; every abstract is one sentence, so that no cut of it looks whole.
ENTRIES = [
    Entry("Tides Without Moons: A Study of P^2OT", "We measure " + "very carefully " * 60 + "what rises and falls."),
    Entry("Is Counting All You Need?", "Counting is " + "much discussed " * 70 + "at https://example.org/count"),
    Entry(
        "Schrödinger's Ducks & Their Ponds",
        "A duck that both swims and flies " + "(over water) " * 90 + "is shown twice.",
    ),
]

CARD_IDS = ["2503.00001", "2503.00002", "2503.00003"]


def text_page(entries=ENTRIES, day="Mar 11", header=HEADER) -> str:
    return header + f"{day}\n\n" + "\n\n".join(f"{entry.title}\n\n{entry.abstract}" for entry in entries)


def json_page(entries=ENTRIES) -> str:
    return json.dumps(
        [
            {
                "paper": {
                    "id": number,
                    "authors": [{"name": "A. Duck"}],
                    "publishedAt": "2025-03-09T00:00:00.000Z",
                    "submittedOnDailyAt": "2025-03-11T01:30:00.000Z",
                    "title": entry.title,
                    "summary": entry.abstract,
                    "upvotes": 3,
                },
                "publishedAt": "2025-03-10T22:00:00.000Z",
                "title": entry.title,
                "numComments": 0,
            }
            for number, entry in zip(CARD_IDS, entries, strict=True)
        ]
    )


def html_page(entries=ENTRIES, *, abstracts=True, props="", day="Mar 11", head="") -> str:
    cards = "".join(
        f"""
        <article class="relative flex"><a href="/papers/{number}" class="block"><img src="thumb.png"></a>
          <div><h3 class="mb-1"><a href="https://huggingface.co/papers/{number}">
            {html_escapes.escape(entry.title)}</a></h3>
            {f"<p>{html_escapes.escape(entry.abstract)}</p>" if abstracts else ""}
            <p>3 authors</p><time>Mar 9</time></div></article>"""
        for number, entry in zip(CARD_IDS, entries, strict=True)
    )
    return (
        f"<!DOCTYPE html><html><head><title>Daily Papers</title>{head}<script>if (1 < 2) document.write('<h3>');"
        f"</script></head><body>{props}<h1>Daily Papers</h1><p>by AK and the research community</p>"
        f"<time>{day}</time>{cards}<footer>About</footer></body></html>\n"
    )


def props(value) -> str:
    return f'<div data-target="DailyPapers" data-props="{html_escapes.escape(json.dumps(value))}"></div>'


PAGE_PROPS = {"periodType": "day", "dateString": "2025-03-12", "dailyPapers": json.loads(json_page())}


def titles(page: str | bytes) -> list[str]:
    return [entry.title for entry in parse(page, "page").entries]


# --------------------------------------------------------------------------------------------------------------------
# Pages that are read


def test_a_text_page():
    read = parse(text_page(), "page.txt")
    assert read == Listing("Mar 11", tuple(ENTRIES), "page.txt")


@pytest.mark.parametrize(
    "written",
    [
        text_page() + "\n",
        text_page() + "\n \n\t\n",
        text_page().replace("\n", "\r\n"),
        text_page().replace("\n", "\r"),
        "\ufeff" + text_page(),
        b"\xef\xbb\xbf" + text_page().encode(),
        text_page().encode(),
        text_page().replace("\n\n", "\n \t \n\n\n"),
        text_page().replace(" what rises", "\nwhat   rises"),
        text_page(header="Models\n\nDatasets\n\n" * 8 + "Daily Papers\n\nbyAK and the research community\n\n"),
        text_page(header="DAILY PAPERS\n\n"),
        text_page(day="Mar 11, 2025"),
        text_page(day="March 11"),
        text_page(day="Mar. 11"),
    ],
)
def test_the_same_page_written_otherwise(written):
    assert parse(written, "page.txt") == parse(text_page(), "page.txt")


def test_a_paper_that_stands_twice_on_a_page_is_one():
    again = Entry("IS COUNTING all you need", "Counting again.")
    assert parse(text_page([*ENTRIES, again]), "page").entries == tuple(ENTRIES)


def test_a_json_page():
    read = parse(json_page(), "papers.json")
    assert read.date == "Mar 11"
    assert [(entry.title, entry.abstract) for entry in read.entries] == [(e.title, e.abstract) for e in ENTRIES]
    assert [entry.arxiv for entry in read.entries] == CARD_IDS


def test_json_with_titles_outside_the_paper_and_line_breaks():
    record = {"paper": {"id": "x"}, "title": "Broken\n  Lines", "summary": "So\nit goes.", "publishedAt": "2025-07-29"}
    assert parse(json.dumps([record]), "p") == Listing("Jul 29", (Entry("Broken Lines", "So it goes."),), "p")


@pytest.mark.parametrize("abstracts", [True, False])
def test_an_html_page(abstracts):
    read = parse(html_page(abstracts=abstracts), "page.html")
    expected = [
        Entry(e.title, e.abstract if abstracts else "", number) for e, number in zip(ENTRIES, CARD_IDS, strict=True)
    ]
    assert read == Listing("Mar 11", tuple(expected), "page.html")


def test_html_that_carries_its_data_is_read_from_that():
    read = parse(html_page(abstracts=False, props=props(PAGE_PROPS)), "page.html")
    assert (read.date, read.entries) == ("Mar 12", parse(json_page(), "page").entries)


@pytest.mark.parametrize("broken", ["{", "null", '{"dailyPapers": [{}]}', '{"dailyPapers": "' + "[" * 9 + '"}'])
def test_html_with_broken_data_is_read_from_its_cards(broken):
    carrier = f'<div data-target="DailyPapers" data-props="{html_escapes.escape(broken)}"></div>'
    assert parse(html_page(props=carrier), "page.html") == parse(html_page(), "page.html")


def test_the_date_of_html_may_stand_in_its_address_only():
    for head in (
        '<link rel="canonical" href="https://huggingface.co/papers/date/2025-03-11">',
        '<meta property="og:url" content="https://huggingface.co/papers?date=2025-03-11">',
    ):
        assert parse(html_page(day="today", head=head), "page.html").date == "Mar 11"


def test_markup_of_a_title_is_text_and_its_scripts_are_nothing():
    page = html_page().replace("Is Counting", "<b>Is</b> &lt;script&gt; <script>alert('Mar 1')</script>Counting")
    assert titles(page)[1] == "Is <script> Counting All You Need?"


# --------------------------------------------------------------------------------------------------------------------
# Pages that are refused

REFUSED = {
    "empty": ("", "the page is empty"),
    "blank": (" \n\n\t", "the page is empty"),
    "only a byte order mark": (b"\xef\xbb\xbf", "the page is empty"),
    "picture": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "this is a binary file, not a page"),
    "zeros": ("Daily Papers\x00", "this is a binary file, not a page"),
    "half a character": ("Daily Papers \ud800", "this is a binary file, not a page"),
    "UTF-16": (text_page().encode("utf-16"), "the page is UTF-16 text; save it as UTF-8"),
    "Latin-1": (
        text_page().encode("latin-1"),
        r"the page is not UTF-8 \(byte 0xf6 at position \d+\); save it as UTF-8",
    ),
    "enormous": (b"a" * 20_000_001, "20 MB is too large for a page; the limit is 20 MB"),
    "other text": ("Dear all,\n\nMar 11\n\nA title\n\nAn abstract.", "not a Daily Papers page: its header is missing"),
    "source code": ("import os\n\nprint('Mar 11')\n", "not a Daily Papers page: its header is missing"),
    "long prose": ("The daily papers " * 20 + "\n\nMar 11\n\nA\n\nB.", "its header is missing"),
    "no date": (text_page(day="yesterday"), "no date line, such as 'Mar 11', after its header"),
    "impossible date": (text_page(day="Feb 30"), "no date line"),
    "unknown month": (text_page(day="Mai 11"), "no date line"),
    "date too late": (HEADER + text_page(header="")[8:] + "\n\nMar 11", "no date line"),
    "header only": (HEADER + "Mar 11\n", "the page lists no papers"),
    "last abstract missing": (
        text_page() + "\n\nMoons Without Tides",
        "the last title, 'Moons Without Tides', has no abstract; the page was cut off",
    ),
    "cut in the last abstract": (
        text_page()[:-30],
        r"the abstract of \"Schrödinger's Ducks & Their Ponds\" stops inside a sentence; the page was cut off",
    ),
    "an abstract missing": (
        text_page([Entry("Tides", "Moons"), *ENTRIES]),
        "'Tides' is followed by 'Moons', which is no abstract",
    ),
    "a title missing": (
        text_page().replace("Is Counting All You Need?\n\n", ""),
        r"'Counting is much .*\.\.\.' stands where a title should; a title or an abstract before it is missing",
    ),
    "title without letters": (text_page([Entry("2025", "A."), *ENTRIES]), "'2025' stands where a title should"),
    "two pages": (text_page() + text_page(day="Jul 29"), "second date line; import one page at a time"),
    "two pages, uneven": (text_page() + "\n\n" + text_page(day="Jul 29"), "second date line"),
    "many lines": ("a\n" * 200_001, "200,001 lines are too many for a page; the limit is 200,000"),
    "many papers": (text_page([Entry("A", "B.")] * 10_001), "10,001 papers are too many for a page"),
    "cut JSON": (json_page()[:-1], "the JSON is cut off or broken: "),
    "JSON with more after it": (json_page() + "]", "the JSON is cut off or broken: Extra data"),
    "Markdown": ("[Daily Papers](https://example.org)", "the JSON is cut off or broken"),
    "deep JSON": ("[" * 100_000, "the JSON is nested too deeply for a page"),
    "enormous number": ("[" + "9" * 5_000 + "]", "the JSON is cut off or broken"),
    "other JSON": ('{"papers": []}', "this JSON is not a list of daily papers"),
    "JSON of numbers": ("[1, 2]", "entry 1 of the JSON is not a paper"),
    "JSON of nulls": ('[{"paper": null}]', "entry 1 of the JSON is not a paper"),
    "empty JSON": ("[]", "the page lists no papers"),
    "JSON without title": ('[{"paper": {"title": "A", "summary": "B."}}, {"paper": {}}]', "entry 2 of the JSON has no"),
    "JSON without abstract": ('[{"paper": {"title": "A", "summary": " "}}]', "'A' has no abstract"),
    "JSON without date": (
        '[{"paper": {"title": "A", "summary": "B.", "publishedAt": "soon"}}]',
        "the page has no date",
    ),
    "JSON with half a character": ('[{"title": "A\\ud800", "summary": "B."}]', "entry 1 of the JSON holds characters"),
    "JSON with a control character": (
        '[{"title": "A", "summary": "\\u0000."}]',
        "entry 1 of the JSON holds characters",
    ),
    "much JSON": ("[" + "0," * 10_001 + "0]", "10,002 papers are too many for a page"),
    "a week": (json.dumps(PAGE_PROPS | {"periodType": "week"}), "the page covers a period of 'week', not a day"),
    "page data without date": (json.dumps({"dailyPapers": PAGE_PROPS["dailyPapers"]}), "the page has no date"),
    "cut HTML": (html_page()[:-12], "the HTML does not close; the page was cut off"),
    "cut inside a tag": ("<article><a href='/papers/2503.00001'><h3>A</h3></article><p", "the HTML does not close"),
    "cut inside a script": ("<html><script>if (1", "the HTML does not close"),
    "script never closed": ("<html><script>'</html>'", "the HTML does not close"),
    "cut card": ("<article><a href='/papers/2503.00001'><h3>A</h3>", "the HTML does not close"),
    "other HTML": ("<html><body><h1>News</h1>Mar 11</body></html>", "not a Daily Papers page: it has no cards"),
    "other cards": ("<article><h3>News</h3></article>", "not a Daily Papers page: it has no cards"),
    "card without title": (html_page([*ENTRIES[:2], Entry("", "A.")]), "the card of paper 2503.00003 has no title"),
    "HTML without date": (html_page(day="today"), "the page has no date, such as 'Mar 11'"),
    "broken data and no cards": (f"<html>{props({'dailyPapers': [{}]})}</html>", "entry 1 of the JSON has no title"),
    "malformed declaration": ("<![nonsense" * 100 + "[ <html></html>", "the HTML is broken"),
    "a strange period": (json.dumps(PAGE_PROPS | {"periodType": ["\n" * 1_000]}), "the page covers a period of"),
    "enormous character number": ("<html>&#" + "9" * 5_000 + ";</html>", "the HTML is broken"),
    "many tags": ("<b>" * 200_001, "200,001 tags are too many for a page"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_whole_page_is_refused_in_one_sentence(case):
    page, message = REFUSED[case]
    with pytest.raises(ListingError, match=message) as refused:
        parse(page, "saved page")
    assert str(refused.value).startswith("saved page: ")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_a_text_page_cut_anywhere_gives_whole_papers_or_none():
    page = text_page()
    whole = tuple(ENTRIES)
    accepted = set()
    for end in range(len(page)):
        try:
            entries = parse(page[:end], "page").entries
        except ListingError:
            continue
        accepted.add(entries)
    # Papers that stand on the page in full, but for an abstract cut after a bracket or inside its last address.
    for entries in accepted:
        for cut, entry in zip(entries, whole, strict=False):
            assert cut.title == entry.title
            assert entry.abstract.startswith(cut.abstract)
            assert cut.abstract == entry.abstract or "://" in cut.abstract or cut.abstract.endswith(")")


@pytest.mark.parametrize(
    "page", [json_page(), html_page(), html_page(props=props(PAGE_PROPS))], ids=["json", "html", "data"]
)
def test_a_json_or_html_page_cut_anywhere_is_refused(page):
    for end in {*range(0, len(page) - 1, 37), *range(len(page) - 60, len(page) - 1)}:
        with pytest.raises(ListingError):
            parse(page[:end], "page")


PIECES = [
    *(HEADER, "Mar 11", "\n\n", "\r", "Daily Papers", "A title", "An abstract.", "\x00", "\ud83d"),
    *("<html>", "</html>", "<article>", "</article>", "<h3>", "</h3>", "<p>", "<a href='/papers/2503.00001'>"),
    *("<script>", "</script>", "<!--", "-->", "<![CDATA[", "<![x[", "</", "<", "&#x", "&amp"),
    *("<div data-target=DailyPapers ", "data-props='", "'>", '{"dailyPapers":[]}'),
    *("[", "]", '{"paper":', '"title": "A"', '"summary"', ",", "}", "null"),
]
hostile = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


@settings(max_examples=600, deadline=2_000)
@given(st.one_of(st.text(), st.binary(), hostile, hostile.map(lambda text: text.encode("utf-8", "surrogatepass"))))
@example("<![foo[")
def test_any_text_or_bytes_are_a_listing_or_a_listing_error(page):
    try:
        read = parse(page, "page")
    except ListingError:
        return
    assert read.entries
    assert all(entry.title for entry in read.entries)
    assert len({title_key(entry.title) for entry in read.entries}) == len(read.entries)


@settings(max_examples=150, deadline=2_000)
@given(st.sampled_from([text_page(), json_page(), html_page()]), st.data())
def test_a_spoiled_page_is_a_listing_or_a_listing_error(page, data):
    start = data.draw(st.integers(0, len(page)))
    end = data.draw(st.integers(start, len(page)))
    put = data.draw(st.one_of(st.just(""), st.text(max_size=5), hostile))
    with suppress(ListingError):
        parse(page[:start] + put + page[end:], "page")


@pytest.mark.parametrize(
    "piece", ["<", "<!--", "<![CDATA[", "<a x='", "</", "</a", "<script></", "&#9", "<article><p>", "<a =", "\n"]
)
def test_hostile_repetition_is_read_in_linear_time(piece):
    def seconds(size: int) -> float:
        page = "<html>" + piece * (size // len(piece)) + "</html>"
        start = time.process_time()
        with pytest.raises(ListingError):
            parse(page, "page")
        return time.process_time() - start

    assert seconds(120_000) < 20 * seconds(30_000) + 0.1  # four times the text; quadratic time would be sixteen


# --------------------------------------------------------------------------------------------------------------------
# Matching


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("SP^2OT: Semantic", "SP$^2$OT: semantic"),
        ("SP^2OT", "SP²OT"),
        ("P$^{2}$OT", "P2OT"),
        ("Light Schrödinger Bridge", 'Light Schr\\"odinger  Bridge'),
        ("Light Schrödinger Bridge", "Light Schro\u0308dinger Bridge"),
        ("Let's Make", "Let\u2019s make"),
        ("Mutual Choice & Feature Choice", "Mutual Choice and Feature Choice"),
        ("Free-form \u2014 Text", "Freeform: text."),
        ("$\\mathcal{O}(n)$ Time", "O(n) time"),
        ("mathcal{O}(n) Time", "O(n) time"),
        ("\\textbf{Bold} Claims", "Bold Claims"),
        ("$\\alpha$-Stable", "α-stable"),
        ("$\\lambda$ and $\\Omega$", "Λ & Ω"),
        ("𝓟arametric ℝ", "parametric R"),
        ("ﬁne", "fine"),
    ],
)
def test_spellings_of_one_title(one, other):
    assert title_key(one) == title_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("SP^2OT", "SP^3OT"),
        ("Text", "Texts"),
        ("α", "β"),
        ("rmsprop", "sprop"),
        ("???", "!!!"),
        ("bf16", "16"),
        ("C++", "C#"),
    ],
)
def test_different_titles_stay_different(one, other):
    assert title_key(one) != title_key(other) or {one, other} == {"C++", "C#"}  # punctuation alone does not tell


def test_catalogue_titles_are_told_apart():
    assert len({title_key(found.title) for found in papers().values()}) == 92


def test_known_titles_and_identifiers_are_found():
    page = Listing(
        "Mar 11",
        (
            Entry("CoLiDE : concomitant linear DAG estimation", "..."),
            Entry("PerfRL: A Small Language Model Framework for Efficient Code Optimization", "...", "2312.05657"),
        ),
        "page",
    )
    assert [found.paper for found in match(page, papers())] == [paper("colide"), paper("code-rl")]
    assert all(found.nearest == [] for found in match(page, papers()))


NEW = Entry(
    "Learning Directed Acyclic Graphs from Noisy Observations",
    "We recover a causal graph, a linear structural equation model, from data whose noise levels are unknown.",
)


@pytest.fixture
def working(monkeypatch):
    """Decide which papers work."""
    chosen: set[str] = set()
    monkeypatch.setattr(listing, "status", lambda found: "working" if found.slug in chosen else "listed")
    return chosen


def test_a_new_title_gets_the_nearest_papers_that_work(working):
    working.update(["light-sb", "topo", "halpern", "compeft", "colide"])
    (found,) = match(Listing("Mar 11", (NEW,), "page"), papers())
    assert found.paper is None
    assert found.nearest_work
    assert found.nearest[0][0] == "colide"
    assert len(found.nearest) <= 3
    assert {slug for slug, _ in found.nearest} <= working
    scores = [score for _, score in found.nearest]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score <= 1 for score in scores)


def test_where_none_that_works_is_similar_any_paper_is_named_and_flagged(working):
    (found,) = match(Listing("Mar 11", (NEW,), "page"), papers())
    assert not found.nearest_work
    assert {slug for slug, _ in found.nearest} & {"colide", "topo", "one-connection"}


def test_a_title_like_nothing_has_no_nearest(working):
    (found,) = match(Listing("Mar 11", (Entry("Xyzzy", "Plugh."),), "page"), papers())
    assert (found.paper, found.nearest, found.nearest_work) == (None, [], False)


def test_the_description_of_a_paper_finds_that_paper(working):
    """Its own summary under another title: the nearest is the paper itself."""
    for known in papers().values():
        (found,) = match(Listing("Mar 11", (Entry("A New Title", known.summary),), "page"), papers())
        assert found.nearest[0][0] == known.slug


def test_a_rare_word_says_more_than_a_common_one(working):
    known = {
        slug: Paper(slug, title, "control", f"control.{slug}", f"2401.0000{slug}", "", (), (slug,), "Does things.")
        for slug, title in [("z", "Tides in Ponds"), ("b", "Gradients in Sand"), ("c", "Gradients in Hills")]
    }
    (found,) = match(Listing("Mar 11", (Entry("Gradients and Tides", "New."),), "page"), known)
    assert [slug for slug, _ in found.nearest] == ["z", "b", "c"]


def test_matching_against_an_empty_catalogue():
    (found,) = match(Listing("Mar 11", (NEW,), "page"), {})
    assert (found.paper, found.nearest) == (None, [])


# --------------------------------------------------------------------------------------------------------------------
# Keeping


def kept(connection):
    return connection.execute("SELECT title, date, source, nearest FROM listed ORDER BY rowid").fetchall()


@pytest.mark.parametrize("isolation", ["DEFERRED", None])
def test_new_papers_are_kept_once(tmp_path, isolation):
    with sqlite3.connect(tmp_path / "store.sqlite", isolation_level=isolation) as connection:
        page = Listing("Mar 11", (Entry(paper("colide").title, "..."), *ENTRIES), "page.txt")
        matches = match(page, papers())
        assert import_listing(connection, page, matches) == 3
        assert not connection.in_transaction
        assert import_listing(connection, page, matches) == 0
        assert import_listing(connection, Listing("Mar 11", page.entries, "copy.txt"), matches) == 0
        rows = kept(connection)
        assert [row[:3] for row in rows] == [(entry.title, "Mar 11", "page.txt") for entry in ENTRIES]
        assert json.loads(rows[0][3]) == [list(pair) for pair in matches[1].nearest]

        later = Listing("Mar 12", page.entries, "later.txt")
        assert import_listing(connection, later, match(later, papers())) == 3  # the same papers on another day
        assert len(kept(connection)) == 6


def test_an_import_that_fails_keeps_nothing(tmp_path):
    connection = sqlite3.connect(tmp_path / "store.sqlite")
    first = Listing("Mar 10", (NEW,), "first")
    import_listing(connection, first, match(first, papers()))
    connection.execute(
        "CREATE TRIGGER full BEFORE INSERT ON listed WHEN NEW.title LIKE 'Is Counting%' "
        "BEGIN SELECT RAISE(FAIL, 'disk full'); END"
    )
    page = parse(text_page(), "page.txt")
    with pytest.raises(sqlite3.Error, match="disk full"):
        import_listing(connection, page, match(page, papers()))
    assert [row[0] for row in kept(connection)] == [NEW.title]
    assert not connection.in_transaction


def test_two_programs_that_import_at_once_keep_every_paper_once(tmp_path):
    page = parse(text_page(), "page.txt")
    connections = [sqlite3.connect(tmp_path / "store.sqlite", timeout=10) for _ in range(2)]
    connections[0].execute("PRAGMA journal_mode=WAL")
    assert [import_listing(one, page, match(page, papers())) for one in connections] == [3, 0]


# --------------------------------------------------------------------------------------------------------------------
# The real pages, where they are at hand

REAL = Path(__file__).parents[3] / "shared" / "listings"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real pages are not part of the repository")
def test_the_real_pages_are_in_the_catalogue():
    found: dict[str, list[str]] = {}
    for file in sorted(REAL.glob("*.txt")):
        page = parse(file.read_bytes(), file.name)
        for matched in match(page, papers()):
            assert isinstance(matched.paper, Paper), matched.entry.title
            assert page.date in matched.paper.listings
            assert len(matched.entry.abstract) > 1000
            found.setdefault(matched.paper.slug, []).append(page.date)
    assert {slug: sorted(dates) for slug, dates in found.items()} == {
        slug: sorted(known.listings) for slug, known in papers().items()
    }
    assert sorted(slug for slug, dates in found.items() if len(dates) == 2) == ["dynamic-submodular", "halpern"]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real pages are not part of the repository")
def test_no_summary_repeats_an_abstract():
    """Seven words in a row that a summary shares with the paper's abstract would be a copy."""
    for file in sorted(REAL.glob("*.txt")):
        for matched in match(parse(file.read_bytes(), file.name), papers()):
            assert matched.paper is not None
            abstract = " ".join(matched.entry.abstract.lower().split())
            words = matched.paper.summary.lower().rstrip(".").split()
            for at in range(len(words) - 6):
                assert " ".join(words[at : at + 7]) not in abstract, matched.paper.slug


def test_catalogue_and_listing_agree_on_dates():
    for known in papers().values():
        assert all(listing._day(day) == day for day in known.listings)
    assert catalogue._DATE.fullmatch("Mar 11")
