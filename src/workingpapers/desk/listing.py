"""Daily Papers pages: reading one, matching its titles with the catalogue, keeping what is new.

A page comes as text copied from the browser, as the HTML the browser saved, or as the JSON of Hugging Face's
daily-papers interface. What it holds is data from strangers: it is never rendered, executed or followed.

A page is read whole or refused. What shows that it was cut off, and is refused:
a header without a date, a title without an abstract, a last abstract that stops inside a sentence, JSON that does not
close, HTML that does not close. A text page cut at the end of a sentence cannot be told from a shorter one.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from html.parser import HTMLParser
from itertools import groupby, takewhile
from typing import Any

from workingpapers.desk.catalogue import FIELDS, Paper, status
from workingpapers.desk.listed import MOST_LISTED, changing
from workingpapers.desk.search import COMMON_WORDS, parts

# Far above any real page, low enough that a hostile one is refused within seconds.
SIZE_LIMIT = 20_000_000  # bytes
_MOST_PAPERS = 10_000
_MOST_PIECES = 200_000  # lines of a text, tags of HTML

_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


class ListingError(ValueError):
    """A page that cannot be imported; one sentence saying which and why."""


@dataclass(frozen=True)
class Entry:
    """One paper of a page.

    Attributes
    ----------
    title, abstract : as on the page, blanks collapsed; the cards of an HTML page may have no abstract ("").
    arxiv : identifier where the page gives it (HTML, JSON), else "".
    """

    title: str
    abstract: str
    arxiv: str = ""


@dataclass(frozen=True)
class Listing:
    """One page.

    Attributes
    ----------
    date : month and day, `Mar 11`; listings carry no year.
    entries : its papers in the page's order, none twice, at least one.
    source : name of the file it was read from.
    """

    date: str
    entries: tuple[Entry, ...]
    source: str


@dataclass(frozen=True)
class Match:
    """What the catalogue knows of one entry.

    Attributes
    ----------
    entry : the entry.
    paper : the catalogue's paper, or None when the entry is new.
    nearest : for a new entry up to three (slug, similarity between 0 and 1), most similar first.
    nearest_work : whether those are papers that work; False when none that works is similar at all, so that they are
        any of the catalogue.
    """

    entry: Entry
    paper: Paper | None
    nearest: list[tuple[str, float]]
    nearest_work: bool = False


def parse(page: str | bytes, name: str) -> Listing:
    """Read a Daily Papers page.

    Parameters
    ----------
    page : the whole file: text, HTML or JSON, UTF-8 when bytes, at most `SIZE_LIMIT` long.
    name : what to call it in messages and in `Listing.source`.

    Raises
    ------
    ListingError : it is not a Daily Papers page, or only a part of one.
    """
    try:
        text = _decoded(page)
        start = text.lstrip()[:1]
        day, entries = {"<": _read_html, "{": _read_json, "[": _read_json}.get(start, _read_text)(text)
        if not entries:
            raise ListingError("the page lists no papers")
        once: dict[str, Entry] = {}
        for entry in entries:
            once.setdefault(title_key(entry.title), entry)
        return Listing(day, tuple(once.values()), name)
    except ListingError as refused:
        raise ListingError(f"{name}: {refused}") from None


def match(listing: Listing, papers: Mapping[str, Paper]) -> list[Match]:
    """Find each entry in the catalogue, by title or arXiv identifier, and the nearest papers for those that are new."""
    by_title = {title_key(paper.title): paper for paper in papers.values()}
    by_arxiv = {paper.arxiv: paper for paper in papers.values()}
    known = [by_title.get(title_key(entry.title)) or by_arxiv.get(entry.arxiv) for entry in listing.entries]
    if None not in known:
        return [Match(entry, paper, []) for entry, paper in zip(listing.entries, known, strict=True)]

    similarity = _Similarity({slug: _description(paper) for slug, paper in papers.items()})
    working = {slug for slug, paper in papers.items() if status(paper) == "working"}
    matches = []
    for entry, paper in zip(listing.entries, known, strict=True):
        if paper is not None:
            matches.append(Match(entry, paper, []))
            continue
        ranked = similarity.ranked(f"{entry.title} {entry.title} {entry.abstract}")
        works = [found for found in ranked if found[0] in working]
        matches.append(Match(entry, None, (works or ranked)[:3], bool(works)))
    return matches


def similar_papers(papers: Mapping[str, Paper], count: int) -> dict[str, list[tuple[str, float]]]:
    """For every paper up to `count` (slug, similarity between 0 and 1) of the others, most similar first."""
    texts = {slug: _description(paper) for slug, paper in papers.items()}
    similarity = _Similarity(texts)
    return {
        slug: [found for found in similarity.ranked(text)[: count + 1] if found[0] != slug][:count]
        for slug, text in texts.items()
    }


def _description(paper: Paper) -> str:
    names = " ".join(" ".join(parts(name)) for name in paper.names)
    return f"{paper.title} {paper.summary} {FIELDS[paper.field]} {names}"


def import_listing(
    connection: sqlite3.Connection, listing: Listing, matches: Sequence[Match], imported_at: str = ""
) -> int:
    """Keep the entries that are new in the table `listed`, all or none; what it already holds is left alone.

    Parameters
    ----------
    connection : to the store, outside a transaction.
    matches : of this listing.
    imported_at : ISO 8601 in UTC, now by default.

    Returns
    -------
    int : how many rows were added: 0 when the page was imported before.

    Raises
    ------
    ListingError : the store would hold more than `MOST_LISTED` papers.
    """
    now = imported_at or datetime.now(UTC).isoformat(timespec="seconds")
    rows = [
        (
            title_key(found.entry.title),
            listing.date,
            found.entry.title,
            found.entry.abstract,
            found.entry.arxiv,
            listing.source,
            json.dumps(found.nearest),
            now,
        )
        for found in matches
        if found.paper is None
    ]
    with changing(connection, listing.date):
        before = connection.total_changes
        connection.executemany("INSERT OR IGNORE INTO listed VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
        added = connection.total_changes - before
        if connection.execute("SELECT count(*) FROM listed").fetchone()[0] > MOST_LISTED:
            raise ListingError(f"the store holds {MOST_LISTED:,} imported papers at most; remove a listing first")
    return added


_FONT = re.compile(r"\\(?:text|math)?(?:rm|bf|it|sf|tt|sc|cal|bb|frak|text|emph|boldsymbol|operatorname)(?![a-z])")
_BARE_FONT = re.compile(r"\b(?:text|math)(?:rm|bf|it|sf|tt|sc|cal|bb|frak)(?=\s*\{)")  # pages drop the backslash


def title_key(title: str) -> str:
    """What is equal for two spellings of one title.

    Case, blanks, punctuation, accents, LaTeX markup and typographic variants do not count: `SP$^2$OT`, `SP^2OT` and
    `SP²OT` are one title, so are `\\alpha` and `α`, `&` and `and`.
    """
    text = _BARE_FONT.sub("", _FONT.sub("", title.casefold())).replace("&", "and")
    text = unicodedata.normalize("NFKD", text).casefold()  # twice: a mathematical capital becomes a letter only here
    return "".join(filter(str.isalnum, _GREEK.sub(_greek_name, text))) or _line(title)


_GREEK = re.compile("[α-ω]")


def _greek_name(letter: re.Match[str]) -> str:
    name = unicodedata.name(letter[0], "").removeprefix("GREEK SMALL LETTER ").lower()
    return name.replace("lamda", "lambda")  # Unicode's spelling, and everybody else's


# --------------------------------------------------------------------------------------------------------------------
# Any kind of page

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")
_HALF = re.compile("[\ud800-\udfff]")  # one half of a surrogate pair, which no file can hold


def _decoded(page: str | bytes) -> str:
    """The page as text with plain line ends, or a refusal of what is not text at all."""
    if len(page) > SIZE_LIMIT:
        raise ListingError(f"{len(page) / 1e6:.0f} MB is too large for a page; the limit is {SIZE_LIMIT / 1e6:.0f} MB")
    if isinstance(page, bytes):
        if page.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ListingError("the page is UTF-16 text; save it as UTF-8")
        try:
            text = page.decode("utf-8")
        except UnicodeDecodeError as wrong:
            if _CONTROL.search(page[:10_000].decode("latin-1")):
                raise ListingError("this is a binary file, not a page") from None
            raise ListingError(
                f"the page is not UTF-8 (byte 0x{page[wrong.start]:02x} at position {wrong.start}); save it as UTF-8"
            ) from None
    else:
        text = page
    text = text.removeprefix("\ufeff")
    if _CONTROL.search(text) or _HALF.search(text):
        raise ListingError("this is a binary file, not a page")
    if not text.strip():
        raise ListingError("the page is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check_count(things: str, count: int, most: int) -> None:
    if count > most:
        raise ListingError(f"{count:,} {things} are too many for a page; the limit is {most:,}")


def _line(text: str) -> str:
    return " ".join(text.split())


_DAY = re.compile(r"(?P<month>[A-Z][a-z]{2,8})\.? (?P<day>[0-9]{1,2})(?:, [0-9]{4})?")


def _day(text: str) -> str | None:
    """`Mar 11` for a line that is a date and nothing else."""
    found = _DAY.fullmatch(text)
    month = [at for at, name in enumerate(_MONTHS, start=1) if found and name.startswith(found["month"])]
    if found is None or not month:
        return None
    try:
        return _month_day(date(2000, month[0], int(found["day"])))  # a leap year: the page may come from one
    except ValueError:
        return None


def _iso_day(text: Any) -> date | None:
    """The day at the start of a text such as `2025-03-11T00:00:00.000Z`."""
    if not isinstance(text, str) or not re.match(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
        return None
    try:
        return date.fromisoformat(text[:10])
    except ValueError:
        return None


def _month_day(day: date) -> str:
    return f"{_MONTHS[day.month - 1][:3]} {day.day}"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


# --------------------------------------------------------------------------------------------------------------------
# Text

_HEADER = ("daily papers", "trending papers", "research community")
_HEADER_LINE = 100  # characters; every line of the header and the date is shorter, an abstract is not
_LONGEST_TITLE = 350  # characters; the longest real one has 145
_SHORT = 200  # characters; an abstract below it must at least be a sentence

_SENTENCE_END = re.compile(r"""[.!?…。！？)\]}"'”’»*$]$""")


def _read_text(text: str) -> tuple[str, list[Entry]]:
    """Header, date, then titles and abstracts in turn, paragraphs separated by blank lines."""
    _check_count("lines", text.count("\n"), _MOST_PIECES)
    paragraphs = [
        _line(" ".join(lines)) for filled, lines in groupby(text.split("\n"), lambda line: bool(line.strip())) if filled
    ]
    head = list(takewhile(lambda paragraph: len(paragraph) < _HEADER_LINE, paragraphs))
    if not any(mark in paragraph.lower() for paragraph in head for mark in _HEADER):
        raise ListingError("this is not a Daily Papers page: its header is missing")
    at, day = next(((at, day) for at, line in enumerate(head) if (day := _day(line))), (0, None))
    if day is None:
        raise ListingError("the page has no date line, such as 'Mar 11', after its header")

    body = paragraphs[at + 1 :]
    _check_count("papers", len(body) // 2, _MOST_PAPERS)
    if any(map(_day, body)):
        raise ListingError("the page has a second date line; import one page at a time")
    entries = []
    for position in range(0, len(body), 2):
        title = body[position]
        if len(title) > _LONGEST_TITLE or not any(map(str.isalpha, title)):
            raise ListingError(
                f"{_shown(title)} stands where a title should; a title or an abstract before it is missing"
            )
        if position + 1 == len(body):
            raise ListingError(f"the last title, {_shown(title)}, has no abstract; the page was cut off")
        abstract = body[position + 1]
        last = position + 2 == len(body)
        if not _is_whole(abstract) and (last or len(abstract) < _SHORT):
            if not last:
                raise ListingError(f"{_shown(title)} is followed by {_shown(abstract)}, which is no abstract")
            raise ListingError(f"the abstract of {_shown(title)} stops inside a sentence; the page was cut off")
        entries.append(Entry(title, abstract))
    return day, entries


def _is_whole(abstract: str) -> bool:
    """Whether it ends as a sentence or an address does."""
    return bool(_SENTENCE_END.search(abstract)) or "://" in abstract.rpartition(" ")[2]


# --------------------------------------------------------------------------------------------------------------------
# JSON


def _read_json(text: str) -> tuple[str, list[Entry]]:
    try:
        root = json.loads(text)
    except RecursionError:
        raise ListingError("the JSON is nested too deeply for a page") from None
    except ValueError as wrong:
        raise ListingError(f"the JSON is cut off or broken: {wrong}") from None
    return _read_records(root)


def _read_records(root: Any) -> tuple[str, list[Entry]]:
    """The list that Hugging Face's interface returns, or the object its page carries around it."""
    records, day = root, None
    if isinstance(root, dict):
        records, day = root.get("dailyPapers"), _iso_day(root.get("dateString"))
        if root.get("periodType", "day") != "day":
            raise ListingError(f"the page covers a period of {_shown(str(root['periodType']))}, not a day")
    if not isinstance(records, list):
        raise ListingError("this JSON is not a list of daily papers")
    _check_count("papers", len(records), _MOST_PAPERS)
    read = [_read_record(number, record) for number, record in enumerate(records, start=1)]
    # Without a day of its own the list is as young as its youngest paper: papers are listed after they are published.
    days = [day] if day else [published for _, published in read if published and not isinstance(root, dict)]
    if read and not days:
        raise ListingError("the page has no date")
    return _month_day(max(days)) if days else "", [entry for entry, _ in read]


def _read_record(number: int, record: Any) -> tuple[Entry, date | None]:
    """One paper and the day on which it was listed or published."""
    paper = record.get("paper", record) if isinstance(record, dict) else None
    if not isinstance(paper, dict):
        raise ListingError(f"entry {number} of the JSON is not a paper")
    title = _first_text(paper.get("title"), record.get("title"))
    abstract = _first_text(paper.get("summary"), record.get("summary"))
    if not title:
        raise ListingError(f"entry {number} of the JSON has no title")
    if not abstract:
        raise ListingError(f"{_shown(title)} has no abstract")
    if any(unfit.search(text) for unfit in (_CONTROL, _HALF) for text in (title, abstract)):
        raise ListingError(f"entry {number} of the JSON holds characters that are no text")
    arxiv = _first_text(paper.get("id"))
    listed = paper.get("submittedOnDailyAt") or record.get("publishedAt") or paper.get("publishedAt")
    return Entry(title, abstract, arxiv if _ARXIV.fullmatch(arxiv) else ""), _iso_day(listed)


def _first_text(*candidates: Any) -> str:
    return next((_line(text) for text in candidates if isinstance(text, str) and text.strip()), "")


# --------------------------------------------------------------------------------------------------------------------
# HTML

_ARXIV = re.compile(r"\d{4}\.\d{4,5}")
_PAPER_LINK = re.compile(r"(?:https?://huggingface\.co)?/papers/(\d{4}\.\d{4,5})(?![\d.])")
_DATED_LINK = re.compile(r"/papers(?:/date/|\?date=)(\d{4}-\d{2}-\d{2})$")


class _Page(HTMLParser):
    """Collects the article cards, the date and the data that the page carries for its own scripts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.cards: list[Entry] = []
        self.records: Any = None
        self.day: str | None = None
        self.address_day: str | None = None
        self.open_articles = 0
        self._card = Entry("", "")
        self._collecting: str | None = None  # "h3" or "p" while inside one
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {key: value or "" for key, value in attrs}
        if attributes.get("data-target") == "DailyPapers":
            self.records = attributes.get("data-props")
        if tag == "link" and attributes.get("rel") == "canonical":
            self._see_address(attributes.get("href", ""))
        if tag == "meta" and attributes.get("property") == "og:url":
            self._see_address(attributes.get("content", ""))
        if tag == "article":
            self.open_articles += 1
            if self.open_articles == 1:
                self._card = Entry("", "")
        if self.open_articles and tag == "a":
            link = _PAPER_LINK.match(attributes.get("href", ""))
            if link and not self._card.arxiv:
                self._card = replace(self._card, arxiv=link[1])
        if self.open_articles and tag in ("h3", "p"):
            self._collecting, self._text = tag, []

    def handle_endtag(self, tag: str) -> None:
        if tag == self._collecting:
            text = _line("".join(self._text))
            if tag == "h3":
                self._card = replace(self._card, title=self._card.title or text)
            elif len(text) > max(_HEADER_LINE, len(self._card.abstract)):
                self._card = replace(self._card, abstract=text)
            self._collecting = None
        if tag == "article" and self.open_articles:
            self.open_articles -= 1
            self._collecting = None
            if not self.open_articles and self._card.arxiv:
                self.cards.append(self._card)

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is not None:  # the text of a script or style sheet
            return
        if self._collecting:
            self._text.append(data)
        elif not self.open_articles and self.day is None and len(data) < 100:
            self.day = _day(_line(data))

    def _see_address(self, address: str) -> None:
        dated = _DATED_LINK.search(address)
        day = _iso_day(dated[1]) if dated else None
        if day:
            self.address_day = _month_day(day)


def _read_html(text: str) -> tuple[str, list[Entry]]:
    _check_count("tags", text.count("<"), _MOST_PIECES)
    page = _Page()
    try:
        page.feed(text)  # never close(): it would read an unfinished tag as text, in quadratic time
    except (AssertionError, ValueError) as wrong:  # what html.parser raises on some malformed declarations and numbers
        raise ListingError(f"the HTML is broken: {_shown(str(wrong))}") from None
    lowered = text.lower()
    if page.open_articles or page.rawdata.strip() or ("<html" in lowered and "</html>" not in lowered):
        raise ListingError("the HTML does not close; the page was cut off")

    if page.records:
        try:
            return _read_json(page.records)
        except ListingError:
            if not page.cards:  # the cards say the same, mostly without the abstracts
                raise
    if not page.cards:
        raise ListingError("this is not a Daily Papers page: it has no cards that link to papers")
    if untitled := [card for card in page.cards if not card.title]:
        raise ListingError(f"the card of paper {untitled[0].arxiv} has no title")
    day = page.day or page.address_day
    if day is None:
        raise ListingError("the page has no date, such as 'Mar 11'")
    return day, page.cards


# --------------------------------------------------------------------------------------------------------------------
# Similarity

_WORD = re.compile(r"[a-z0-9]{3,}")
_SUFFIX = re.compile(r"(?:ations?|ings?|ions?|ments?|ers?|ies|ied|ed|es|s|e|y|ly|al)$")
_STOCK_PHRASES = frozenset(["existing", "paper", "present", "propose", "proposed", "results", "show", "study", "work"])


def _stems(text: str) -> Counter[str]:
    words = _WORD.findall(unicodedata.normalize("NFKD", text.lower()))
    return Counter(_stem(word) for word in words if word not in COMMON_WORDS and word not in _STOCK_PHRASES)


def _stem(word: str) -> str:
    """A rough stem: enough to let `regularising` meet `regularization`."""
    shorter = _SUFFIX.sub("", word)
    stem = shorter if len(shorter) >= 4 else word
    return stem[:-1] + "z" if stem.endswith("is") else stem


class _Similarity:
    """Cosine similarity of texts with BM25's weights: rare words count more, repeated ones saturate; 1 for equal texts.

    Saturation and length were chosen on the catalogue: how often the nearest papers of a paper are of its own field.
    """

    SATURATION = 3.0  # how many occurrences of a word bring half of what any number of them can
    LENGTH = 0.5  # how much a long text is discounted: 0 not at all, 1 in proportion

    def __init__(self, texts: Mapping[str, str]) -> None:
        counts = {key: _stems(text) for key, text in texts.items()}
        total = max(len(counts), 1)
        holding = Counter(stem for counted in counts.values() for stem in counted)
        self._rarity = {stem: math.log(1 + (total - n + 0.5) / (n + 0.5)) for stem, n in holding.items()}
        self._mean_length = sum(counted.total() for counted in counts.values()) / total
        self._vectors = {key: self._vector(counted) for key, counted in counts.items()}

    def ranked(self, query: str) -> list[tuple[str, float]]:
        """(key, similarity) of every text that shares a word with the query, most similar first."""
        asked = self._vector(_stems(query))
        found = [
            (key, sum(weight * vector[stem] for stem, weight in asked.items() if stem in vector))
            for key, vector in self._vectors.items()
        ]
        return sorted((pair for pair in found if pair[1] > 0), key=lambda pair: (-pair[1], pair[0]))

    def _vector(self, counts: Counter[str]) -> dict[str, float]:
        """The words of a text that the texts know, as a vector of length one."""
        half = self.SATURATION * (1 - self.LENGTH + self.LENGTH * counts.total() / max(self._mean_length, 1))
        weights = {
            stem: math.sqrt(self._rarity[stem]) * count / (count + half)
            for stem, count in counts.items()
            if stem in self._rarity
        }
        norm = math.hypot(*weights.values())
        return {stem: weight / norm for stem, weight in weights.items()}
