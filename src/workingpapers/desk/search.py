"""Full-text search over titles, summaries, API names and claims, in memory and as you type.

The index is SQLite's FTS5, built when it is needed: a few milliseconds for the catalogue. Words are compared by their
stems; the last word of a query counts as the beginning of one. Where no paper has all the words, misspelt ones are
replaced by the nearest words that occur, and where that finds nothing either, any of the words will do.

Imported titles have an index of their own, which is kept in a file and ranked within bounds (`desk.titles`). Of two
equal matches the paper of the catalogue stands before the imported one.
"""

from __future__ import annotations

import ast
import re
import sqlite3
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile

from workingpapers.desk import syntax
from workingpapers.desk.catalogue import FIELDS, Paper, claims_path
from workingpapers.desk.titles import CLOSE, OPEN, SNIPPET, Title, Titles

Span = tuple[int, int]

COMMON_WORDS = frozenset(
    """
    a about all also an and any are as at be both but by can do does each for from has have how i if in into is it its
    may me more most my new no not of on one only or our out over per so such than that the their them then these they
    this those through to two under use used uses using very via was we were what when where which while who whose why
    will with without would you your
    """.split()  # noqa: SIM905 - a hundred quoted words would be harder to read
)

# The columns of the index with their weights in the ranking (FTS5's bm25). `parts` holds the words inside the names
# ("RPO Loss", "custom root"), `facts` field, arXiv identifier and repository: both are searched, never shown.
# `further` holds the note and what the claims say, `reference` what the docstrings say.
_WEIGHTS = {
    "slug": 10.0, "title": 10.0, "names": 6.0, "parts": 3.0, "summary": 3.0, "facts": 2.0, "further": 1.0,
    "reference": 0.5,
}  # fmt: skip

_EXPANSIONS = 40  # whole words tried for the last, unfinished word of a query
_LONGEST_QUERY = 20  # words; the rest is ignored
_IMPORTED = 50  # most imported titles among the hits


@dataclass(frozen=True)
class Hit:
    """One result.

    Attributes
    ----------
    slug : of the paper, or "" for an imported title.
    title : of the paper.
    score : larger is better; comparable within one search only.
    snippet : the text that shows best why it was found: summary, names, claim, docstring or abstract.
    title_spans, snippet_spans : (start, end) of what matched in them, ascending and disjoint.
    date, arxiv : of an imported title: its listing, and its identifier or "".
    imported : number of an imported title in the index of those, else 0.
    partial : whether it has only some of the words of the query.
    """

    slug: str
    title: str
    score: float
    snippet: str
    title_spans: tuple[Span, ...] = ()
    snippet_spans: tuple[Span, ...] = ()
    date: str = ""
    arxiv: str = ""
    imported: int = 0
    partial: bool = False


def search(
    query: str,
    papers: Mapping[str, Paper],
    *,
    claims: Mapping[str, Iterable[str]] | None = None,
    reference: Mapping[str, str] | None = None,
    extra: Iterable[tuple[str, str]] = (),
    titles: Titles | None = None,
    limit: int = 20,
) -> list[Hit]:
    """The papers that match a query best; `Index` answers several queries from one index.

    Parameters
    ----------
    query : what the reader typed; any text is legal.
    papers : the catalogue, by slug.
    claims : what each paper's claims say, by slug (`search_claims`).
    reference : what the docstrings of each paper say, by slug.
    extra : (title, abstract) of papers that have no slug.
    titles : the imported papers, in place of `extra`.
    limit : most hits to return.
    """
    return Index(papers, claims=claims, reference=reference, extra=extra, titles=titles).search(query, limit=limit)


class Index:
    """An index that answers many queries, from several threads if need be (parameters as for `search`)."""

    def __init__(
        self,
        papers: Mapping[str, Paper],
        *,
        claims: Mapping[str, Iterable[str]] | None = None,
        reference: Mapping[str, str] | None = None,
        extra: Iterable[tuple[str, str]] = (),
        titles: Titles | None = None,
    ) -> None:
        claims, reference = claims or {}, reference or {}
        rows = [
            (
                slug,
                paper.title,
                ", ".join(paper.names),
                "\n".join(" ".join(parts(name)) for name in paper.names),
                paper.summary,
                f"{paper.field} {FIELDS[paper.field]} {paper.arxiv} {paper.code}",
                "\n".join([paper.note, *claims.get(slug, ())]).strip(),
                reference.get(slug, ""),
            )
            for slug, paper in papers.items()
        ]
        texts = [[_UNFIT.sub(" ", text) for text in row] for row in rows]
        extra = list(extra)
        if titles is None and extra:
            titles = Titles()
            titles.add(extra)
        self._titles = titles
        shown = [text for row in texts for text in row] + [text for pair in extra for text in pair]
        self._vocabulary = sorted({word for text in shown for word in _words(text)})
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)  # SQLite itself serialises its callers
        self._connection.execute(
            f"CREATE VIRTUAL TABLE texts USING fts5({', '.join(_WEIGHTS)}, tokenize='porter unicode61')"
        )
        self._connection.executemany(f"INSERT INTO texts VALUES ({', '.join('?' * len(_WEIGHTS))})", texts)

    def search(self, query: str, *, limit: int = 20) -> list[Hit]:
        """The hits of a query, best first; none for a query without a word or a digit."""
        typed = list(dict.fromkeys(_words(unicodedata.normalize("NFKC", query))))[:_LONGEST_QUERY]
        if not typed or limit < 1:
            return []
        typing = not query[-1:].isspace()  # the last word may go on, even where it is a common one
        words = [word for word in typed[:-1] if word not in COMMON_WORDS] + typed[-1:]
        exact = self._expression(words, typing)
        hits, imported = self._matches(exact, limit), self._imported(exact, limit)
        if not hits and not imported:
            words = [self._corrected(word) for word in words]
            corrected = self._expression(words, typing)
            hits, imported = self._matches(corrected, limit), self._imported(corrected, limit)
        if hits:
            return _descending(hits, imported)[:limit]
        any_of = [self._expression([word], typing=False) for word in words]
        hits = self._matches(" OR ".join(f"({expression})" for expression in any_of), limit)
        also = [] if imported or self._titles is None else self._titles.matching_any(any_of, min(limit, _IMPORTED))
        partial = [replace(hit, partial=True) for hit in (*hits, *map(_imported_hit, also))]
        return _descending(imported, partial)[:limit]

    def _expression(self, words: list[str], typing: bool) -> str:
        """All of the words in FTS5's language; words hold letters and digits only, so quoting them is safe."""
        terms = [{word, *_other_spelling(word)} for word in words]
        expressions = [" OR ".join(f'"{form}"' for form in sorted(forms)) for forms in terms]
        if typing:
            begun = sorted(terms[-1])
            # Stems can be shorter than what was typed ("regulariz" against "regular"): add the words it may become.
            whole = [word for form in begun for word in self._beginning_with(form)]
            expressions[-1] = " OR ".join([f'"{form}" *' for form in begun] + [f'"{word}"' for word in whole])
        return " AND ".join(f"({expression})" for expression in expressions)

    def _beginning_with(self, prefix: str) -> list[str]:
        if len(prefix) < 3:  # no stem is shorter
            return []
        first = bisect_left(self._vocabulary, prefix)
        return list(takewhile(lambda word: word.startswith(prefix), self._vocabulary[first : first + _EXPANSIONS]))

    def _corrected(self, word: str) -> str:
        """The word, or the nearest one that occurs when it neither occurs nor begins one that does."""
        from difflib import get_close_matches  # needed for misspelt queries only

        if len(word) < 4 or self._beginning_with(word):
            return word
        alike = [known for known in self._vocabulary if abs(len(known) - len(word)) <= 2]
        return next(iter(get_close_matches(word, alike, n=1, cutoff=0.7)), word)

    def _matches(self, expression: str, limit: int) -> list[Hit]:
        weights = ", ".join(map(str, _WEIGHTS.values()))
        mark = f"'{OPEN}', '{CLOSE}'"
        query = f"""
            SELECT bm25(texts, {weights}) AS rank, slug,
                   highlight(texts, 1, {mark}), highlight(texts, 2, {mark}), highlight(texts, 3, {mark}),
                   snippet(texts, 4, {mark}, '…', {SNIPPET}), snippet(texts, 6, {mark}, '…', {SNIPPET}),
                   snippet(texts, 7, {mark}, '…', {SNIPPET})
            FROM texts WHERE texts MATCH ? ORDER BY rank, rowid LIMIT ?
        """
        return [_hit(-rank, *row) for rank, *row in self._connection.execute(query, (expression, limit)).fetchall()]

    def _imported(self, expression: str, limit: int) -> list[Hit]:
        if self._titles is None:
            return []
        return [_imported_hit(title) for title in self._titles.matching(expression, min(limit, _IMPORTED))]


def search_claims(papers: Iterable[Paper]) -> dict[str, list[str]]:
    """What the claims of each paper say, by slug; read from the source of the claims, which is not imported."""
    found = {}
    for paper in papers:
        path = claims_path(paper)
        if path is not None:
            files = sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
            source = "\n".join(file.read_text(encoding="utf-8") for file in files)
            found[paper.slug] = [_text(text) for text in _SAYS.findall(source)]
    return found


def emphasise(text: str, spans: Iterable[Span], before: str, after: str, escape: Callable[[str], str] = str) -> str:
    """The text with every span between `before` and `after`, all of it passed through `escape` piece by piece."""
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [escape(text[end:start]), before, escape(text[start:stop]), after]
        end = stop
    return "".join([*pieces, escape(text[end:])])


def parts(name: str) -> list[str]:
    """The words in a Python name: `RPOLoss` is RPO and Loss, `custom_root` custom and root."""
    return _PART.findall(name)


# --------------------------------------------------------------------------------------------------------------------

_UNFIT = re.compile("[\x00-\x08\x0e-\x1f\ud800-\udfff]")  # control characters and halves of characters
_TOKEN = re.compile(r"[^\W_]+")
_PART = re.compile(r"[A-Z][A-Z0-9]*(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z0-9]+")
_MARKED = re.compile(f"{OPEN}(.*?){CLOSE}")
_SPELLING = re.compile(r"(?<=\w{3})i([sz])(?=\w*$)")
_SAYS = re.compile(r"""\bsays=\(?\s*((?:"(?:[^"\\\n]|\\.)*"\s*|'(?:[^'\\\n]|\\.)*'\s*)+)""")


def _text(literal: str) -> str:
    """What a literal of one or several adjacent texts stands for."""
    expression = syntax.parse(f"({literal})").body[0]
    assert isinstance(expression, ast.Expr)
    return str(ast.literal_eval(expression.value))


def _words(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _other_spelling(word: str) -> list[str]:
    """`regularize` for `regularise` and the reverse."""
    found = _SPELLING.search(word)
    return [f"{word[: found.start(1)]}{'z' if found[1] == 's' else 's'}{word[found.end(1) :]}"] if found else []


def _hit(score: float, slug: str, title: str, names: str, name_parts: str, *texts: str) -> Hit:
    """Show, besides the title, the text in which most words matched.

    On a tie summary, then names, then the rest in its order.
    """
    summary, *rest = texts
    title, title_spans = _unmarked(title)
    candidates = [summary, names + name_parts, *rest]
    matching = [_matching_words(text) for text in candidates]
    best = matching.index(max(matching))
    if candidates[best] is candidates[1]:
        snippet, spans = _matching_names(names, name_parts)
    else:
        snippet, spans = _unmarked(candidates[best].replace("\n", " "))
    return Hit(slug, title, score, snippet, title_spans, spans)


def _imported_hit(found: Title) -> Hit:
    title, title_spans = _unmarked(found.title)
    text, text_spans = _unmarked(found.text)
    return Hit("", title, found.score, text, title_spans, text_spans, found.date, found.arxiv, found.id)


def _descending(*groups: list[Hit]) -> list[Hit]:
    """One group after the other, with scores that never rise."""
    hits: list[Hit] = []
    for group in groups:
        factor = 1.0
        if hits and group and hits[-1].score < group[0].score:
            factor = hits[-1].score / group[0].score
        hits += [replace(hit, score=factor * hit.score) if factor != 1.0 else hit for hit in group]
    return hits


def _matching_words(marked: str) -> int:
    return len({found.lower() for found in _MARKED.findall(marked)})


def _matching_names(names: str, name_parts: str) -> tuple[str, tuple[Span, ...]]:
    """The names that match, whole or in part, each a span; the others follow."""
    pairs = list(zip(names.split(", "), name_parts.split("\n"), strict=True))
    plain = [name.replace(OPEN, "").replace(CLOSE, "") for name, _ in pairs]
    matching = [name for name, pair in zip(plain, pairs, strict=True) if any(OPEN in text for text in pair)]
    spans, at = [], 0
    for name in matching:
        spans.append((at, at + len(name)))
        at += len(name) + len(", ")
    return ", ".join(matching + [name for name in plain if name not in matching]), tuple(spans)


def _unmarked(text: str) -> tuple[str, tuple[Span, ...]]:
    """Text without FTS5's marks, and where they were."""
    plain, spans, at = [], [], 0
    for piece in text.split(OPEN):
        inside, closed, outside = piece.rpartition(CLOSE)
        if closed:
            spans.append((at, at + len(inside)))
        plain += [inside, outside]
        at += len(inside) + len(outside)
    return "".join(plain), tuple(spans)
