"""Reading a docstring in our style: paragraphs, lists, formulas, code, and sections of described names.

A section is a title underlined with hyphens. Its entries are `name, name : text`, continued by indented lines; a
section without such entries is prose. What is indented in prose is a block: formulas where every line of it is
certainly one, else code. The result is plain data; whoever shows it escapes it.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from xml.etree.ElementTree import Element

from workingpapers.desk.reference import formula, mathml

ITEM = re.compile(r"(\*{0,2}[^\W\d][\w.\[\]]*(?:, \*{0,2}[^\W\d][\w.\[\]]*)*) : (.*)")
CODE = re.compile(r"\s*(from|import|def|class|return|for|with|python|pip|workingpapers) |\s*(@\w|>>>|#|\$ )|\w\.\w+\(")
LONG = 24  # characters of a formula that may have to continue on the next line
MOSTLY = 0.4  # of a line that is shown as formulas must be formulas; the rest is words that explain them

_INLINE = re.compile(
    r"``(?P<literal>.+?)``|`(?P<code>[^`]+)`|(?P<link>https?://[^\s<>\"')]+[^\s<>\"').,;])"
    r"|arXiv[: ](?P<arxiv>\d{4}\.\d{4,5})|(?<![\w*])\*(?P<stress>[A-Za-z][A-Za-z -]*)\*(?![\w*])"
)
_RULE = re.compile(r"-{3,}\s*")
_BULLET = re.compile(r"(- |\d\. )")

Find = Callable[[str], tuple[str, str] | None]  # name -> (module, name) of its entry in the reference


@dataclass(frozen=True)
class Piece:
    """Some characters of a line.

    Attributes
    ----------
    text : as the docstring has it, without its quotes.
    target : of a link, an address; of a name, its module and anchor.
    markup : of a formula, its MathML.
    """

    kind: Literal["text", "code", "stress", "math", "name", "link"]
    text: str
    target: Any = ""
    markup: str = ""

    def __html__(self) -> str:
        """What a template shows of a formula; MathML is made by `mathml`, which escapes."""
        if self.kind != "math":
            raise TypeError(f"a piece of kind {self.kind} is not markup")
        return self.markup


@dataclass(frozen=True)
class Block:
    """A paragraph, a list, a list of described names, a block of formulas or of code.

    Attributes
    ----------
    lines : pieces of a paragraph (one line), of formulas (several).
    items : of a list, the blocks of each entry.
    names : of described names, those of each item.
    text : of code.
    """

    kind: Literal["paragraph", "list", "names", "formulas", "code"]
    lines: Sequence[Sequence[Piece]] = ()
    items: Sequence[Sequence[Block]] = ()
    names: Sequence[Sequence[str]] = ()
    text: str = ""


@dataclass(frozen=True)
class Section:
    """A titled part: "Parameters", "Returns", "Examples", ..."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Docstring:
    """A docstring in parts: its first sentence, what explains it, its sections."""

    summary: Sequence[Piece]
    blocks: Sequence[Block]
    sections: Sequence[Section]

    def described(self, title: str) -> list[tuple[Sequence[str], Sequence[Block]]]:
        """The names that a section describes, with their descriptions."""
        return [
            entry
            for section in self.sections
            if section.title == title
            for block in section.blocks
            if block.kind == "names"
            for entry in zip(block.names, block.items, strict=True)
        ]


def parse(text: str, names: Collection[str] = (), find: Find = lambda name: None) -> Docstring:
    """Take a docstring apart.

    Parameters
    ----------
    names : of the parameters and attributes it speaks of; they are not taken for symbols.
    find : where a name in backquotes is documented.
    """
    lines = inspect.cleandoc(text).splitlines()
    prose = _INLINE.sub("", " ".join(lines))
    reader = _Reader(frozenset(names), find, formula.symbols(prose, names))
    first = next((number for number, line in enumerate(lines) if not line.strip()), len(lines))
    starts = [at for at in range(len(lines) - 1) if lines[at].strip() and _RULE.fullmatch(lines[at + 1])]
    ends = [*starts[1:], len(lines)] if starts else []
    body = starts[0] if starts else len(lines)
    return Docstring(
        reader.pieces(" ".join(lines[: min(first, body)])),
        reader.blocks(lines[min(first, body) : body]),
        [
            Section(lines[start].strip(), reader.blocks(lines[start + 2 : end]))
            for start, end in zip(starts, ends, strict=True)
        ],
    )


@dataclass(frozen=True)
class _Reader:
    names: frozenset[str]
    find: Find
    letters: frozenset[str]  # the symbols of this docstring

    def blocks(self, lines: Sequence[str]) -> list[Block]:
        made: list[Block] = []
        at = 0
        while at < len(lines):
            line = lines[at]
            end = at + 1
            if not line.strip():
                at = end
                continue
            if line.startswith("    "):
                while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                    end += 1
                made.append(self.display("\n".join(lines[at:end])))
            elif line.startswith(">>>"):
                while end < len(lines) and lines[end].strip():
                    end += 1
                made.append(Block("code", text="\n".join(lines[at:end])))
            elif _BULLET.match(line) or ITEM.match(line):
                pattern = ITEM if ITEM.match(line) else _BULLET
                end = _end_of_items(lines, at, pattern)
                made.append(self.items(lines[at:end], pattern))
            else:
                while end < len(lines) and lines[end].strip() and not _BULLET.match(lines[end]):
                    if ITEM.match(lines[end]) or lines[end].startswith("    "):
                        break
                    end += 1
                text = " ".join(each.strip() for each in lines[at:end])
                text = text[:-2].rstrip() if text.endswith(" ::") else text[:-1] if text.endswith("::") else text
                made.append(Block("paragraph", lines=[self.pieces(text)]))
            at = end
        return made

    def items(self, lines: Sequence[str], pattern: re.Pattern[str]) -> Block:
        starts = [number for number, line in enumerate(lines) if pattern.match(line)]
        names, items = [], []
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            found = pattern.match(lines[start])
            assert found is not None
            head = found[2] if pattern is ITEM else lines[start][found.end() :]
            rest = textwrap.dedent("\n".join(lines[start + 1 : end])).splitlines()
            items.append(self.blocks([head, *rest]))
            names.append(found[1].split(", ") if pattern is ITEM else [])
        return Block("names", items=items, names=names) if pattern is ITEM else Block("list", items=items)

    def display(self, text: str) -> Block:
        """An indented block."""
        text = textwrap.dedent(text).strip("\n")
        code = Block("code", text=text)
        if CODE.search(text):
            return code
        lines = [self.formulas(line, display=True) for line in text.splitlines() if line.strip()]
        for line in lines:
            total = sum(len(piece.text.replace(" ", "")) for piece in line)
            if sum(len(piece.text.replace(" ", "")) for piece in line if piece.kind == "math") < MOSTLY * total:
                return code
        return Block("formulas", lines=lines)

    def pieces(self, text: str) -> list[Piece]:
        """Text with its code, names, links and formulas."""
        made: list[Piece] = []
        last = 0
        for found in _INLINE.finditer(text):
            made += self.formulas(text[last : found.start()])
            last = found.end()
            quoted = found["literal"] or found["code"]
            if quoted is not None:
                made.append(self.quoted(quoted, literal=found["literal"] is not None))
            elif found["stress"] is not None:
                made.append(Piece("stress", found["stress"]))
            else:
                address = found["link"] or f"https://arxiv.org/abs/{found['arxiv']}"
                made.append(Piece("link", found[0], address))
        return made + self.formulas(text[last:])

    def quoted(self, text: str, *, literal: bool) -> Piece:
        """What stands in backquotes: the name of an entry, a formula that no program could contain, or code."""
        if text not in self.names and (target := self.find(text)) is not None:
            return Piece("name", text, target)
        if literal and not _is_python(text) and (element := formula.parse(text, self.names)) is not None:
            return _formula(element)
        return Piece("code", text)

    def formulas(self, text: str, *, display: bool = False) -> list[Piece]:
        made = []
        for part in formula.split(text, self.names, letters=self.letters, display=display):
            if isinstance(part, str):
                made.append(Piece("text", part))
            else:
                made.append(_formula(part, display=display))
        return made


def _formula(element: Element, *, display: bool = False) -> Piece:
    text = element.get("alttext", "")
    if display:
        element.set("displaystyle", "true")
    parts = mathml.broken(element) if len(text) > LONG and not display else [element]
    return Piece("math", text, markup="".join(mathml.written(part) for part in parts))


def _end_of_items(lines: Sequence[str], start: int, pattern: re.Pattern[str]) -> int:
    """Where a list ends: before the first line that neither begins an entry nor is indented."""
    for end in range(start + 1, len(lines)):
        line = lines[end]
        if line.strip() and not line.startswith("  ") and not pattern.match(line):
            return end
    return len(lines)


def _is_python(text: str) -> bool:
    """Whether it is an expression, or passes an argument; assignments of formulas have blanks around their sign."""
    try:
        compile(text, "docstring", "eval")
    except (SyntaxError, ValueError):
        return re.fullmatch(r"[\w.]+=\S+", text) is not None
    return not any(ord(letter) > 127 for letter in text)
