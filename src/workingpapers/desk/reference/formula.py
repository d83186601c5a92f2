"""The formulas of our docstrings as MathML: `sum_k alpha_k N(y | r_k, epsilon S_k)` as a reader expects to see it.

Docstrings are written to be read in a terminal, so their mathematics is plain text. This finds it in the prose and sets
what the strict small `grammar` understands for certain; prose is never taken for a formula, a formula never changed.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from xml.etree.ElementTree import Element

from workingpapers.desk.reference.grammar import SIGNS, NoFormula, Reader, Token, tokenise
from workingpapers.desk.reference.mathml import leaf, math, mo, row, symbol_of


def parse(text: str, names: Collection[str] = ()) -> Element | None:
    """A whole formula as a `math` element, or None when any part of it is not understood."""
    tokens = tokenise(text)
    reader = Reader(tokens, frozenset(names), display=True)
    try:
        content = reader.chain()
    except NoFormula:
        return None
    return math(content, text.strip()) if reader.at == len(tokens) else None


def symbols(text: str, names: Collection[str] = ()) -> frozenset[str]:
    """The letters that are symbols of the formulas in `text`."""
    return frozenset().union(*(found for *_, found in _runs(text, tokenise(text), frozenset(names), display=False)))


def split(
    text: str, names: Collection[str] = (), *, letters: Collection[str] = (), display: bool = False
) -> list[str | Element]:
    """Prose cut into plain text and the formulas that are certainly formulas; joined again it is `text`.

    Parameters
    ----------
    names : names of the program that `text` may speak of, its parameters above all; they stay as they are.
    letters : what also is a symbol where it stands alone.
    display : whether `text` is a line of formulas, in which words may be operands.
    """
    tokens = tokenise(text)
    runs = _runs(text, tokens, frozenset(names), display=display)
    found = [(start, stop, content) for start, stop, content, _ in runs]
    found += _lone(text, tokens, found, frozenset(letters).union(*(used for *_, used in runs)), frozenset(names))
    pieces: list[str | Element] = []
    last = 0
    for start, stop, content in sorted(found, key=lambda item: item[0]):
        pieces += [text[last:start], math(content, text[start:stop])]
        last = stop
    return [piece for piece in [*pieces, text[last:]] if not isinstance(piece, str) or piece]


def _runs(
    text: str, tokens: list[Token], names: frozenset[str], *, display: bool
) -> list[tuple[int, int, Element, set[str]]]:
    """Start, end, formula and symbols of the longest formulas, from the left."""
    found = []
    at = 0
    while at < len(tokens):
        reader = Reader(tokens, names, display=display, at=at)
        if (sizes := _by(tokens, at)) is not None:
            content, reader.at, reader.certain = sizes, at + 3, True
        elif not _starts(text, tokens, at):
            reader.at, reader.certain = at + 1, False
        else:
            try:
                content = reader.chain()
            except NoFormula:
                reader.at, reader.certain = at + 1, False
        last = tokens[reader.at - 1]
        if reader.certain and _ends(text, last):
            found.append((tokens[at].start, last.end, content, reader.symbols))
            at = reader.at
        else:
            at += 1
    return found


def _starts(text: str, tokens: list[Token], at: int) -> bool:
    """Whether a formula may begin here: not inside a word, a path or a quotation, nor with an article."""
    token = tokens[at]
    following = tokens[at + 1] if at + 1 < len(tokens) else None
    if token.text == "a" and (following is None or following.kind != "sign" or following.text in "([{|<"):
        return False  # the article
    if token.text in SIGNS and (token.text != "-" or following is None or following.spaced):
        return False
    before = text[token.start - 1] if token.start else " "
    return before.isspace() or before in '([{,|"/:;' or (token.kind == "letter" and not before.isalnum())


def _ends(text: str, token: Token) -> bool:
    """Whether a formula may end here: not inside a word or a call of the program."""
    return re.match(r"[\w(]|[.\-][A-Za-z]", text[token.end :]) is None


def _by(tokens: list[Token], at: int) -> Element | None:
    """`d x d` and `2 x 2`, sizes of a matrix."""
    if at + 2 >= len(tokens) or tokens[at + 1].text != "x" or not tokens[at + 1].spaced:
        return None
    left, right = tokens[at], tokens[at + 2]
    if left.kind == right.kind == "number" or (left.text == right.text and len(left.text) == 1 and left.text.isalpha()):
        return row([leaf(left.text), mo("×"), leaf(right.text)])
    return None


def _lone(
    text: str,
    tokens: list[Token],
    found: list[tuple[int, int, Element]],
    letters: frozenset[str],
    names: frozenset[str],
) -> list[tuple[int, int, Element]]:
    """The letters that stand alone in prose and are symbols of the formulas beside it, and those like p0."""
    made = []
    for at, token in enumerate(tokens):
        numbered = bool(letters) and token.text not in names and re.fullmatch(r"[a-z]\d", token.text) is not None
        if token.kind != "name" or not (numbered or (token.text in letters and len(token.text) == 1)):
            continue
        before, after = text[: token.start].rstrip(), text[token.end : token.end + 1]
        is_article = token.text == "a" or (token.text in ("A", "I") and (not before or before[-1] in ".:"))
        taken = any(start <= token.start < stop for start, stop, _ in found)
        symbol = symbol_of(token.text)
        if symbol is None or taken or is_article or after in ("'", "="):
            continue
        if _starts(text, tokens, at) and _ends(text, token):
            made.append((token.start, token.end, symbol))
    return made
