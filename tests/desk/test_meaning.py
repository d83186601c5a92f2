"""Search by meaning: how its answers join those of the words; the model itself where the extra is installed."""

from __future__ import annotations

import threading
from zlib import crc32

import numpy as np
import pytest

from workingpapers.desk import meaning as module
from workingpapers.desk.catalogue import Paper, papers
from workingpapers.desk.meaning import Meaning, is_installed, is_worthwhile
from workingpapers.desk.search import Index, search_claims
from workingpapers.desk.titles import Titles

TOPICS = {"boat": 0, "ship": 0, "vessel": 0, "knot": 1, "rope": 1, "cake": 2, "pastry": 2}


class Topics:
    """Unit vectors by topic, so that different words can mean the same; counts the texts it reads."""

    version = ""

    def __init__(self):
        self.texts = 0

    def __call__(self, texts):
        self.texts += len(texts)
        vectors = np.zeros((len(texts), 64), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in text.lower().replace(".", " ").replace(":", " ").split():
                topic = TOPICS.get(word.removesuffix("s"))
                if topic is None:
                    row[3 + crc32(word.encode()) % 61] += 0.2
                else:
                    row[topic] += 1.0
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make(slug, title, summary="Nothing."):
    return Paper(
        slug, title, "optimization", f"optimization.{slug}", "2401.00001", "", ("Mar 11",), ("thing",), summary
    )


KNOWN = {paper.slug: paper for paper in (
    make("sails", "Boats under Sail", "Boat by boat."), make("ties", "Knots That Hold"),
    make("cakes", "Cakes", "Cake on cake of pastry, as on a ship."),
)}  # fmt: skip


def found(meaning, query, limit=10, known=KNOWN, **options):
    return meaning.blended(query, Index(known, **options).search(query, limit=limit), limit)


def test_a_query_finds_what_says_the_same_in_other_words():
    meaning = Meaning(KNOWN, encode=Topics())
    assert [hit.slug for hit in Index(KNOWN).search("sturdy vessels")] == []
    (hit,) = found(meaning, "sturdy vessels")
    assert (hit.slug, hit.title, hit.title_spans) == ("sails", "Boats under Sail", ())


def test_what_is_like_nothing_finds_nothing():
    assert found(Meaning(KNOWN, encode=Topics()), "quantum zebra") == []


def test_both_ways_together_count_more_than_one():
    known = KNOWN | {"both": make("both", "Vessels", "A ship with an anchor."), "word": make("word", "Anchor")}
    meaning = Meaning(known, encode=Topics())
    order = [hit.slug for hit in found(meaning, "ship anchor", known=known)]
    assert order[0] == "both"
    assert "sails" in order


def test_a_title_or_name_that_contains_the_query_stays_in_front():
    known = KNOWN | {"odd": make("odd", "On the Ship of Theseus")}
    meaning = Meaning(known, encode=Topics())
    for query in ("ship of Theseus", "Ship of theseus!"):
        hits = found(meaning, query, known=known)
        assert hits[0].slug == "odd"
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_words_keep_their_marks_and_the_limit_holds():
    hits = found(Meaning(KNOWN, encode=Topics()), "boats under vessels", limit=2)
    assert len(hits) <= 2
    assert hits[0].slug == "sails"
    assert hits[0].title_spans


def test_imported_papers_are_read_in_batches_and_only_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 4)
    encode = Topics()
    encode.version = "topics 1"
    monkeypatch.setenv("WORKINGPAPERS_CACHE", str(tmp_path / "cache"))
    with Titles(tmp_path / "titles.sqlite") as titles:
        titles.add([(f"Vessels {i}", "") for i in range(9)])
        meaning = Meaning(KNOWN, titles, encode=encode)
        assert [meaning.advance() for _ in range(4)] == [4, 4, 1, 0]
        hits = found(meaning, "many ships", limit=20, titles=titles)
        assert {"cakes", "sails"} <= {hit.slug for hit in hits}  # one has the word, one the meaning
        assert sum(hit.title.startswith("Vessels") for hit in hits) > 3
        read = encode.texts
        again = Meaning(KNOWN, titles, encode=encode)
        assert again.advance() == 0
        assert encode.texts == read  # vectors of catalogue and titles were kept
        assert [hit.title for hit in found(again, "many ships", limit=20, titles=titles)] == [hit.title for hit in hits]
        encode.version = "topics 2"
        assert Meaning(KNOWN, titles, encode=encode).advance() == 4  # those of another model are not taken


def test_of_equals_the_paper_of_the_catalogue_is_first(tmp_path):
    with Titles() as titles:
        titles.add([("Boats under Sail", "Nothing.")])
        meaning = Meaning(KNOWN, titles, encode=Topics())
        meaning.advance()
        assert [hit.slug for hit in found(meaning, "sturdy vessels", titles=titles)] == ["sails", ""]


def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKINGPAPERS_CACHE", str(tmp_path))
    encode = Topics()
    encode.version = "topics"
    first = Meaning(KNOWN, encode=encode).nearest("a vessel")
    (file,) = (tmp_path / "meaning").iterdir()
    for damage in (b"", b"PK\x03\x04", b"no zip"):
        file.write_bytes(damage)
        assert Meaning(KNOWN, encode=encode).nearest("a vessel") == first


def test_one_unfinished_word_is_left_to_full_text():
    assert not any(map(is_worthwhile, ("", "a", "priv", "privacy", "privacy ")))
    assert is_worthwhile("privacy o")


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert not is_installed()
    with pytest.raises(ImportError, match=r"workingpapers\[meaning\]"):
        Meaning(KNOWN)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not is_installed():
        pytest.skip("needs the extra meaning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKINGPAPERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        return Meaning(papers()), Index(papers(), claims=search_claims(papers().values()))


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("privacy of hospitals training together", "federated"),
        ("chatbot that follows human wishes", "alignment"),
        ("finding cause and effect from observations", "causality"),
        ("shopping suggestions", "recommendation"),
        ("movie suggestions for users", "recommendation"),
        ("electing a council by ballots", "selection"),
        ("simulating physics with partial differential equations", "equations"),
        ("steering robots", "control"),
        ("shrinking chatbots to fit on phones", "compression"),
        ("partitioning unlabelled photographs into kinds", "clustering"),
    ],
)
def test_the_model_finds_the_field_of_a_question(real, query, field):
    meaning, index = real
    hits = meaning.blended(query, index.search(query, limit=200), 200)
    assert field in {papers()[hit.slug].field for hit in hits[:2]}


def test_the_model_finds_nothing_like_nonsense(real):
    meaning, _ = real
    assert meaning.nearest("zzzz qqqq") == []


def test_the_model_answers_several_threads(real):
    meaning, _ = real
    queries = [f"how to {word} a model" for word in ("train", "prune", "align", "sample", "cluster", "compress")]
    alone = [meaning._encode([query])[0] for query in queries]
    together = [None] * len(queries)

    def ask(at):
        together[at] = meaning._encode([queries[at]])[0]

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(queries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose(together, alone, atol=1e-5)
