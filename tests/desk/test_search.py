"""Search: what must be found, in which order, with what highlighted, and that no query breaks it."""

from __future__ import annotations

import html
import random
import sqlite3
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workingpapers.desk import search as module
from workingpapers.desk.catalogue import Paper, papers
from workingpapers.desk.listed import remove_listing
from workingpapers.desk.listing import Entry, Listing, Match, import_listing
from workingpapers.desk.search import Index, emphasise, parts, search, search_claims
from workingpapers.desk.titles import RANKED, Titles, plain


def make(slug: str, title: str = "Untitled", summary: str = "Nothing.", names: tuple[str, ...] = ("thing",), note=""):
    identifier = f"2401.{abs(hash(slug)) % 100_000:05d}"
    path = "optimization." + slug.replace("-", "_")
    return Paper(slug, title, "optimization", path, identifier, "", ("Mar 11",), names, summary, note)


def catalogue(*made: Paper) -> dict[str, Paper]:
    return {paper.slug: paper for paper in made}


def slugs(query: str, known: dict[str, Paper] | None = None, **options) -> list[str]:
    return [hit.slug for hit in search(query, papers() if known is None else known, **options)]


@pytest.fixture(scope="module")
def index():
    return Index(papers())


# --------------------------------------------------------------------------------------------------------------------
# What is found


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("CoLiDE", "colide"),
        ("colide", "colide"),
        ("RPOLoss", "regularized-preference"),
        ("rpo loss", "regularized-preference"),
        ("custom_root", "implicit-diff"),
        ("custom root", "implicit-diff"),
        ("light-sb", "light-sb"),
        ("Schrödinger", "light-sb"),
        ("schrodinger bridge", "light-sb"),
        ("sparse autoencoders", "sparse-autoencoders"),
        ("SP²OT", "sppot"),
        ("\uff2c\uff4f\uff32\uff21", "compeft"),  # LoRA as full-width letters
        ("2310.02895", "colide"),
        ("https://arxiv.org/abs/2310.02895", "colide"),
        ("khalil-research/Neur2RO", "neur2ro"),
        ("PerfRL", "code-rl"),
        ("causal graph with unequal noise", "colide"),
        ("how do I compress a lora adapter", "compeft"),
        ("warm-up learning rate", "refined-schedules"),
    ],
)
def test_a_reader_finds_the_paper(index, query, first):
    assert index.search(query)[0].slug == first


def test_typing_a_title_finds_its_paper_from_the_third_letter_of_its_last_word_on(index):
    for found in papers().values():
        words = found.title.split()
        for length in range(3, len(words[-1]) + 1):
            query = " ".join([*words[:-1], words[-1][:length]])
            assert index.search(query)[0].slug == found.slug, query


@pytest.mark.parametrize("end", range(3, len("regularization") + 1))
def test_an_unfinished_word_finds_what_the_finished_one_does(end):
    known = catalogue(make("one", "Regularization of Networks"), make("two", "Other Matters"))
    assert slugs("regularization"[:end], known) == ["one"]


def test_only_the_last_word_may_be_unfinished():
    known = catalogue(make("one", "Gradient Descent"), make("two", "Graph Descent"))
    assert slugs("descent gra", known) == slugs("descent ", known) == ["one", "two"]
    assert slugs("descent graph ", known) == ["two"]
    assert slugs("gra descent", catalogue(make("one", "Gravel"), make("two", "Descent"))) == ["two"]  # any word, then


def test_british_and_american_spellings_find_each_other():
    known = catalogue(make("one", "Optimization"), make("two", summary="Regularises."), make("three"))
    assert slugs("optimisation", known)[:1] == ["one"]
    assert slugs("regularizes", known) == slugs("regularize ", known) == ["two"]
    both = catalogue(make("one", "Regularization"), make("two", summary="On regularisation."))
    for query in ("regularization", "regularisation "):
        assert set(slugs(query, both)) == {"one", "two"}


def test_title_counts_more_than_names_than_summary_than_claims():
    known = catalogue(
        make("in-claims"),
        make("in-summary", summary="Uses a zeppelin."),
        make("in-names", names=("zeppelin",)),
        make("in-title", "Zeppelin"),
    )
    found = slugs("zeppelin", known, claims={"in-claims": ["A zeppelin flies higher."]})
    assert found == ["in-title", "in-names", "in-summary", "in-claims"]


def test_all_words_must_match_while_any_paper_has_them_all():
    known = catalogue(make("both", "Sparse Graphs"), make("sparse", "Sparse Sparse Sparse"), make("graphs", "Graphs"))
    assert slugs("sparse graphs", known) == ["both"]
    assert slugs("what is a sparse one of those graphs", known) == ["both"]  # common words need not
    assert set(slugs("sparse elephant", known)) == {"both", "sparse"}


@pytest.mark.parametrize(
    ("typo", "slug"),
    [("collide", "colide"), ("shrodinger brige", "light-sb"), ("autoencdoers", "sparse-autoencoders")],
)
def test_a_misspelt_word_finds_the_nearest_one(index, typo, slug):
    assert index.search(typo)[0].slug == slug


def test_what_resembles_nothing_finds_nothing(index):
    assert index.search("zzzzqqqq") == []


def test_extra_titles_are_found_beside_the_papers():
    known = catalogue(make("one", "Graph Solvers"))
    extra = [("Graph <b>Drawing</b>", "An abstract of graphs. " * 40), ("Other", "No.")]
    hits = {hit.slug: hit for hit in search("graph", known, extra=extra)}
    assert {slug: hit.title for slug, hit in hits.items()} == {"one": "Graph Solvers", "": "Graph <b>Drawing</b>"}
    assert len(hits[""].snippet) < 400


def test_limit_and_order(index):
    hits = index.search("learning", limit=5)
    assert len(hits) == 5
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert index.search("learning", limit=0) == []
    assert hits == index.search("learning", limit=5)


# --------------------------------------------------------------------------------------------------------------------
# What is shown


def marked(text, spans):
    return emphasise(text, spans, "[", "]")


@pytest.mark.parametrize(
    ("query", "title", "snippet"),
    [
        ("zeppelin", "A [Zeppelin] of Graphs", "Glides gently."),
        ("gliding", "A Zeppelin of Graphs", "[Glides] gently."),
        ("gas", "A Zeppelin of Graphs", "[GasBag], fly_far, Hull2D"),
        ("gasbag", "A Zeppelin of Graphs", "[GasBag], fly_far, Hull2D"),
        ("hull2d", "A Zeppelin of Graphs", "[Hull2D], GasBag, fly_far"),
        ("fly_far", "A Zeppelin of Graphs", "[fly_far], GasBag, Hull2D"),
        ("gentle gas bag", "A Zeppelin of Graphs", "[GasBag], fly_far, Hull2D"),
        ("far", "A Zeppelin of Graphs", "[fly_far], GasBag, Hull2D"),
        ("renamed", "A Zeppelin of Graphs", "Later [renamed]. It lands softly."),
        ("landing softly", "A Zeppelin of Graphs", "Later renamed. It [lands] [softly]."),
    ],
)
def test_the_snippet_shows_what_matched(query, title, snippet):
    known = catalogue(
        make("z", "A Zeppelin of Graphs", "Glides gently.", ("GasBag", "fly_far", "Hull2D"), note="Later renamed.")
    )
    (hit,) = search(query, known, claims={"z": ["It lands softly."]})
    assert marked(hit.title, hit.title_spans) == title
    assert marked(hit.snippet, hit.snippet_spans) == snippet


def test_the_snippet_of_a_long_text_is_the_part_that_matched():
    claims = ["Nothing here to see at all. " * 30 + "A zeppelin lands. " + "Nothing there to see at all. " * 30]
    (hit,) = search("zeppelin", catalogue(make("z")), claims={"z": claims})
    assert "[zeppelin]" in marked(hit.snippet, hit.snippet_spans)
    assert len(hit.snippet) < 300
    assert hit.snippet[0] == hit.snippet[-1] == "…"


def test_emphasise_escapes_every_piece():
    text = "a <b> & <c>"
    assert emphasise(text, [(2, 5), (8, 11)], "<mark>", "</mark>", html.escape) == (
        "a <mark>&lt;b&gt;</mark> &amp; <mark>&lt;c&gt;</mark>"
    )
    assert emphasise(text, [], "<mark>", "</mark>") == text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RPOLoss", ["RPO", "Loss"]),
        ("CoLiDE", ["Co", "Li", "DE"]),
        ("custom_root", ["custom", "root"]),
        ("EKFACInfluence", ["EKFAC", "Influence"]),
        ("SP2OTLoss", ["SP2OT", "Loss"]),
        ("UCRL2_VTR", ["UCRL2", "VTR"]),
        ("ppl", ["ppl"]),
    ],
)
def test_parts_of_names(name, words):
    assert parts(name) == words


def test_claims_are_read_from_their_source_without_importing_it(tmp_path, monkeypatch):
    source = tmp_path / "claims.py"
    source.write_text(
        'raise RuntimeError\n@claim(\n    paper="one",\n    says="It is \\"quick\\".",\n)\ndef a(cell): ...\n'
        '@claim(says=(\n        "It holds "\n        "in the limit."\n    ),\n)\ndef b(cell): ...\n'
        "@claim(says='It says \"no\".')\ndef c(cell): ...\nsays_nothing = 1\nsays=variable\n"
    )
    package = tmp_path / "package" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    (package.parent / "rates.py").write_text('@claim(says="It is linear.")\ndef d(cell): ...\n')
    monkeypatch.setattr(module, "claims_path", lambda paper: {"one": source, "two": package}.get(paper.slug))
    assert search_claims([make("one"), make("two"), make("three")]) == {
        "one": ['It is "quick".', "It holds in the limit.", 'It says "no".'],
        "two": ["It is linear."],
    }


# --------------------------------------------------------------------------------------------------------------------
# Any query, soon


HOSTILE = [
    *("", " ", '"', '""', "(", ")", "()", "*", "^", "-", "+a", "'", "%", "_", "\\"),
    *("NEAR", "NEAR(", "NEAR(a b, 2)", "AND", "OR NOT", "a AND", "title:", "title: graph", "col : x", "a*b", "x^2"),
    *("{title}", "; DROP TABLE texts; --", "\x00", "\x02a\x03", "\ud800", "\u202egraph", "\N{PILE OF POO}"),
    *("图 求解", "ꟿ", "ꟿcustomꟿ", "é" * 10_000, "graph " * 10_000, "gr\u0301aph"),
]


@pytest.mark.parametrize("query", HOSTILE)
def test_no_query_is_an_error(index, query):
    for hit in index.search(query):
        assert hit.slug in papers()
    assert isinstance(index.search(f"graph {query}"), list)


def test_words_of_the_query_language_are_words(index):
    assert index.search("NEAR")[0].slug == "matrix-completion"  # "in Nearly Linear Time"


pieces = st.sampled_from([*HOSTILE[:-3], "graph", ":", "CoLiDE", "é", ", "])


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(pieces, max_size=8).map("".join)))
def test_any_text_gives_hits_with_spans_inside_their_texts(index, query):
    for hit in index.search(query, limit=4):
        for text, spans in ((hit.title, hit.title_spans), (hit.snippet, hit.snippet_spans)):
            edges = [edge for span in spans for edge in span]
            assert edges == sorted(edges)
            assert all(0 <= edge <= len(text) for edge in edges)
            assert all(start < stop for start, stop in spans)
            assert not {"\x02", "\x03"} & set(text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=40), st.text(max_size=80)), max_size=5), st.text(max_size=20))
def test_any_extra_titles_can_be_indexed(extra, query):
    assert isinstance(search(query, {}, extra=extra), list)


def test_what_cannot_be_shown_is_left_out_of_titles():
    (hit,) = search("zeppelin", {}, extra=[("\x02A\ud800 zeppelin\x03\x00", "")])
    assert marked(hit.title, hit.title_spans).split() == ["A", "[zeppelin]"]


def test_a_search_takes_under_50_ms_with_building_the_index():
    known = papers()
    for query in ("graph", "mispeled wrods evrywhere"):
        seconds = []
        for _ in range(5):
            start = time.process_time()
            search(query, known)
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.050


# --------------------------------------------------------------------------------------------------------------------
# Imported titles


def found_titles(query: str, *titles: str, known: dict[str, Paper] | None = None, **options) -> list[str]:
    return [hit.title for hit in search(query, known or {}, extra=[(title, "") for title in titles], **options)]


def test_of_equal_matches_the_paper_of_the_catalogue_is_first():
    known = catalogue(make("one", summary="Holds a zeppelin."), make("two", "Balloons"))
    assert found_titles("zeppelin", "Zeppelin", known=known) == ["Untitled", "Zeppelin"]
    # a title that has all the words stands before a paper that has only one of them
    assert found_titles("zeppelin flights", "Zeppelin Flights", known=known) == ["Zeppelin Flights", "Untitled"]
    assert found_titles("balloon zeppelin", "Zeppelin Flights", known=known)[-1] == "Zeppelin Flights"


def test_scores_never_rise_over_both():
    hits = search("graph learning", papers(), extra=[("Graph Learning", ""), ("On Learning", "")], limit=200)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert any(hit.slug == "" for hit in hits)


def test_of_imported_titles_the_one_that_the_query_covers_most_is_first_then_the_newest():
    titles = ["Zeppelin", "On the History of the Zeppelin in Winter", "Zeppelins", "The Zeppelin"]
    assert found_titles("zeppelin", *titles) == [titles[2], titles[0], titles[3], titles[1]]
    assert found_titles("zeppelin", *(f"Zeppelin {chr(97 + i)}" for i in range(9)), limit=2) == [
        "Zeppelin i",
        "Zeppelin h",
    ]


def test_the_ranking_looks_at_a_bounded_number_of_the_newest():
    titles = ["Zeppelin", *["A Zeppelin of Some Other Kind"] * RANKED]
    assert found_titles("zeppelin", *titles, limit=1) == ["A Zeppelin of Some Other Kind"]


def test_abstracts_help_where_titles_are_few():
    extra = [("Other", "It mentions a zeppelin and its pilot."), ("Zeppelin", "Of nothing.")]
    hits = search("zeppelin", {}, extra=extra)
    assert [hit.title for hit in hits] == ["Zeppelin", "Other"]
    assert marked(hits[1].snippet, hits[1].snippet_spans) == "It mentions a [zeppelin] and its pilot."
    (hit,) = search("zeppelin pilots", {}, extra=[("A Zeppelin", "and its pilot")])  # words of both together
    assert hit.title_spans
    assert hit.snippet_spans


def test_any_of_the_words_finds_the_titles_with_the_rarest_most():
    titles = [*("Graph Learning " + letter for letter in "abcdef"), "Zeppelin Learning", "Zeppelin"]
    assert found_titles("learning zeppelin submarines ", *titles)[0] == "Zeppelin Learning"


def test_docstrings_are_searched_and_shown():
    known = catalogue(make("one"), make("two", "Hemp"))
    hits = search("hemp", known, reference={"one": "untangle: Loosens a bight of hemp."})
    assert [hit.slug for hit in hits] == ["two", "one"]
    assert marked(hits[1].snippet, hits[1].snippet_spans) == "untangle: Loosens a bight of [hemp]."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u202egpj.exe\u2066\u200b\u00ad", "agpj.exe"),
        ("A" + "\u0301" * 500 + "b", "A\u0301\u0301\u0301b"),
        ("x\x00\x1b[31m\x85y\u2028z", "x [31m y z"),
        ("a" * 500, "a" * 29 + "…"),
        ("<b> & \N{PILE OF POO} é", "<b> & \N{PILE OF POO} é"),
    ],
)
def test_a_strangers_text_is_shown_plainly(text, shown):
    assert plain(text, 30) == shown


@pytest.fixture
def store(tmp_path):
    connection = sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None)
    yield connection
    connection.close()


def put(store, date, *titles, moment=""):
    entries = tuple(Entry(title, "An abstract.") for title in titles)
    return import_listing(
        store, Listing(date, entries, "by hand"), [Match(entry, None, []) for entry in entries], moment
    )


def titles_in(titles, query):
    return sorted(hit.title for hit in Index({}, titles=titles).search(query))


def test_the_index_follows_the_store(store, tmp_path):
    with Titles(tmp_path / "titles.sqlite") as titles:
        assert titles.sync(store) == 0
        put(store, "Mar 11", "Zeppelin One", "Zeppelin Two")
        put(store, "Mar 12", "Zeppelin Three")
        assert titles.sync(store) == 3
        assert titles.sync(store) == 0
        assert titles_in(titles, "zeppelin") == ["Zeppelin One", "Zeppelin Three", "Zeppelin Two"]
        assert put(store, "Mar 11", "Zeppelin Two", "Zeppelin Four") == 1
        assert titles.sync(store) == 1  # the others stay as they are
        assert remove_listing(store, "Mar 11") == 3
        put(store, "Mar 11", "Zeppelin Five", "Zeppelin Six", "Zeppelin Seven")  # as many as there were
        assert titles.sync(store) == 6
        assert titles_in(titles, "zeppelin") == ["Zeppelin Five", "Zeppelin Seven", "Zeppelin Six", "Zeppelin Three"]
        remove_listing(store, "Mar 12")
        assert titles.sync(store) == 1


def test_what_one_reader_imported_can_be_removed_alone(store):
    put(store, "Mar 11", "One", moment="2030-01-01T00:00:00")
    put(store, "Mar 11", "Two", moment="2030-01-02T00:00:00")
    assert remove_listing(store, "Mar 11", ["2030-01-01T00:00:00"]) == 1
    assert store.execute("SELECT title FROM listed").fetchall() == [("Two",)]


def test_a_store_from_before_there_were_versions_is_indexed(store, tmp_path):
    put(store, "Mar 11", "Zeppelin")
    store.execute("DROP TABLE listed_versions")
    with Titles(tmp_path / "titles.sqlite") as titles:
        assert titles.sync(store) == 1
        put(store, "Mar 11", "Another Zeppelin")
        assert titles.sync(store) == 1


@pytest.mark.parametrize("content", [b"damaged", b"SQLite format 3\0" + bytes(84), "another version"])
def test_a_useless_index_is_made_again(store, tmp_path, content):
    path = tmp_path / "titles.sqlite"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as other:
            other.execute("PRAGMA user_version = 99")
        other.close()
    put(store, "Mar 11", "Zeppelin")
    with Titles(path) as titles:
        titles.sync(store)
        assert titles_in(titles, "zeppelin") == ["Zeppelin"]


def test_two_processes_that_index_at_once_index_every_paper_once(store, tmp_path):
    put(store, "Mar 11", "Zeppelin")
    with Titles(tmp_path / "titles.sqlite") as one, Titles(tmp_path / "titles.sqlite") as two:
        stale = {"Mar 11": ""}
        one.sync(store)
        two._sync_date(store, "Mar 11", stale["Mar 11"])  # it looked before the other was done
        assert one.count() == two.count() == 1


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """100,000 titles of the words of the catalogue."""
    words = " ".join(paper.title + " " + paper.summary for paper in papers().values()).split()
    rng = random.Random(0)
    with Titles(tmp_path_factory.mktemp("many") / "titles.sqlite") as titles:
        titles.add((" ".join(rng.choices(words, k=rng.randint(5, 14))), "") for _ in range(100_000))
        yield Index(papers(), titles=titles)


@pytest.mark.parametrize(
    "query",
    [
        *("s", "a", "tr", "the", "learning", "models of the learning of a", "difusion modles x"),
        *("learning xylophone model of network training", "https://arxiv.org/abs/2310.02895"),
    ],
)
def test_a_search_takes_under_100_ms_with_100_000_titles(many, query):
    for end in range(1, len(query) + 1):
        seconds = []
        for _ in range(5):
            start = time.process_time()
            many.search(query[:end], limit=200)
            seconds.append(time.process_time() - start)
            if seconds[-1] < 0.100:
                break
        # the suite's other processes share this one's caches; `benchmarks/search.py` measures with nothing beside it
        assert min(seconds) < 0.150, query[:end]


def test_100_000_titles_do_not_hide_the_catalogue(many):
    for query, first in [
        ("CoLiDE", "colide"),
        ("schrodinger bridge", "light-sb"),
        ("sparse autoencoders", "sparse-autoencoders"),
    ]:
        hits = many.search(query)
        assert hits[0].slug == first
        assert any(hit.slug == "" for hit in many.search("learning", limit=200))
