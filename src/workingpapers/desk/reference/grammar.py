"""The grammar of the formulas in our docstrings: text in, MathML out, or an exception.

    operand   number | symbol | program_name | call(operand, ...) | (...) | [...] | {...} | |...| | ||...|| | <..., ...>
    postfix   _sub  ^sup  ' (transpose, derivative)  * (optimum)  and the Unicode super- and subscripts
    chain     operands joined by + - * / o (entrywise product) or nothing, then by = <= >= < > ~ -> in

A symbol is a letter, a letter with a digit, or the name of a Greek letter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element

from workingpapers.desk.reference.mathml import (
    APPLY,
    GREEK,
    LARGE,
    NAMED,
    PRIME,
    SUBSCRIPTS,
    SUPERSCRIPTS,
    TIMES,
    between,
    leaf,
    mi,
    mo,
    program,
    row,
    scripted,
    symbol_of,
    wrap,
)

RELATIONS = {
    "=": "=", "<=": "≤", ">=": "≥", "<": "<", ">": ">", "~": "∼", "->": "→", "<-": "←", ":=": "≔", "!=": "≠",
    "≤": "≤", "≥": "≥", "∈": "∈", "→": "→", "≠": "≠", "≈": "≈",
}  # fmt: skip
SIGNS = {"+": "+", "-": "−", "±": "±"}
PRODUCTS = {"*": "⋅", "/": "/", "·": "⋅", "×": "×", "∘": "∘", "&": "&"}
CLOSING = {"(": ")]", "[": "])", "{": "}"}
PROSE = frozenset(  # words that end a formula wherever they stand
    re.findall(
        r"\w+",
        "a an the and or of for with without is are on at as to over under where when by from if then its it this that "
        "in not no all each every so but both than up via per which whose until while between one two",
    )
)

_TOKEN = re.compile(
    r"""
    (?P<prose>[A-Za-z]+(?:-[A-Za-z]{2,})+ | [A-Za-z]{2,}(?:-[A-Za-z]+)+ | (?<=[A-Za-z])'(?:s|t|re|ve|ll|d)\b)
  | (?P<number>\d+(?:\.\d+)?(?:e-?\d+)?(?![A-Za-z_]))
  | (?P<name>[A-Za-z][\u0300-\u036f]+ | [A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*(?:_(?![{+*<(\w]))?)
  | (?P<letter>[Α-ω∇∂∞ℓ][\u0300-\u036f]*)
  | (?P<upper>[⁰¹²³⁴⁵⁻⁺ⁿᵀ]+)
  | (?P<lower>[₀₁₂₃ᵢⱼ]+)
  | (?P<sign>\.\.\.|\|\||<=|>=|->|<-|:=|!=|[-+*/=<>~^_'|()\[\]{},;:±·×∘&≤≥∈→≠≈])
  | (?P<other>\S)
    """,
    re.VERBOSE,
)


class NoFormula(Exception):
    """What stands here is no formula."""


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    start: int
    end: int
    spaced: bool  # whether a blank stands before it
    apart: bool  # whether two stand there, which part the formulas of one line


def tokenise(text: str) -> list[Token]:
    return [
        Token(
            str(found.lastgroup),
            found[0],
            found.start(),
            found.end(),
            text[max(found.start() - 1, 0) : found.start()].isspace(),
            text[max(found.start() - 2, 0) : found.start()] == "  ",
        )
        for found in _TOKEN.finditer(text)
    ]


@dataclass
class Reader:
    """Recursive descent; a continuation that cannot be read is left to the prose that follows."""

    tokens: list[Token]
    names: frozenset[str]
    display: bool
    at: int = 0
    certain: bool = False
    symbols: set[str] = field(default_factory=set)
    inside: list[str] = field(default_factory=list)  # the brackets that are open

    def chain(self) -> Element:
        """Sums and the relations between them."""
        parts = [self.sum()]
        while (token := self._peek()) is not None:
            mark = self._mark()
            relation = RELATIONS.get(token.text) or ("∈" if self._is_membership(token) else None)
            if relation is None or (self.inside[-1:] == ["<"] and token.text == ">"):
                break
            self.at += 1
            try:
                parts += [mo(relation), self.sum()]
            except NoFormula:
                self._back(mark)
                break
            self.certain = True
        return row(parts)

    def sum(self) -> Element:
        parts = []
        if (token := self._peek()) is not None and token.text in SIGNS:
            self.at += 1
            parts.append(mo(SIGNS[token.text], form="prefix"))
        parts += self._term()
        while (token := self._peek()) is not None and token.text in SIGNS:
            mark = self._mark()
            self.at += 1
            try:
                if token.spaced and self._is_next_attached():
                    raise NoFormula  # "x -y": a dash or an option, not a difference
                parts += [mo(SIGNS[token.text]), *self._term()]
            except NoFormula:
                self._back(mark)
                break
            self.certain = True
        return row(parts)

    def _term(self) -> list[Element]:
        parts = [self._operand()]
        while (token := self._peek()) is not None:
            mark = self._mark()
            try:
                if token.text in PRODUCTS or self._is_entrywise(token):
                    self.at += 1
                    following = [mo(PRODUCTS.get(token.text, "∘")), self._operand()]
                    self.certain = self.certain or token.text != "/" or "mn" in (parts[-1].tag, following[-1].tag)
                elif self._may_follow(token):
                    left = parts[-1]
                    right = self._operand()
                    following = [*between(left, right), right]
                    self.certain = self.certain or (left.text or "") in NAMED
                else:
                    break
            except NoFormula:
                self._back(mark)
                break
            parts += following
        return parts

    def _operand(self) -> Element:
        base, lower, upper = self._atom(), None, None
        large = base.text in LARGE.values()
        while (token := self._peek()) is not None and not token.spaced:
            following = self._peek(1)
            loose = following is None or following.spaced or following.text in (")", "]", ",", "|", "||", "}")
            if token.kind == "upper" and upper is None:
                upper = row([leaf(SUPERSCRIPTS[sign]) for sign in token.text])
                self.at += 1
            elif token.kind == "lower" and lower is None:
                lower = row([leaf(SUBSCRIPTS[sign]) for sign in token.text])
                self.at += 1
            elif token.text == "_" and lower is None:
                self.at += 1
                lower = self._script()
            elif token.text == "^" and (upper is None or upper.text == "′"):
                self.at += 1
                script = self._script()
                upper = script if upper is None else row([upper, script])
            elif token.text == "'" and upper is None:
                self.at += 1
                upper = mo("′", **PRIME)
                continue  # a prime alone may be an apostrophe
            elif token.text == "*" and loose and upper is None:
                self.at += 1
                upper = mo("*")
                if base.tag != "mi" or len(base.text or "") > 1:
                    continue
            elif token.text in ("(", "[") and self._is_function(base):
                mark = self._mark()
                try:
                    return self._operand_after(
                        row([scripted(base, lower, upper, large), mo(APPLY), self._arguments(token)])
                    )
                except NoFormula:
                    self._back(mark)
                    break
            else:
                break
            self.certain = True
        if upper is not None and upper.text == "′":  # the sign stands high by itself
            return row([scripted(base, lower, None, large), upper])
        return scripted(base, lower, upper, large)

    def _operand_after(self, base: Element) -> Element:
        """Scripts of a whole call: f(x)^2, Xᵀ(Y)'."""
        token = self._peek()
        if token is None or token.spaced or not (token.text in ("^", "'") or token.kind == "upper"):
            return base
        self.at += 1
        if token.kind == "upper":
            return scripted(base, None, row([leaf(SUPERSCRIPTS[sign]) for sign in token.text]), False)
        return scripted(base, None, self._script(), False) if token.text == "^" else row([base, mo("′", **PRIME)])

    def _is_function(self, base: Element) -> bool:
        if base.tag == "mrow":
            return len(base) > 1 and base[-1].text == ")" and base[0].text == "("
        return base.tag.startswith("m") and base.tag not in ("mn", "mo", "msqrt")

    def _arguments(self, opening: Token) -> Element:
        display = self.display
        head = self.tokens[self.at - 1].text
        self.display = display or len(head) == 1 or head in NAMED or head in GREEK  # E[reward], KL(bridge || model)
        try:
            made = self._group(opening)
        finally:
            self.display = display
        self.certain = True
        return made

    def _script(self) -> Element:
        token = self._peek()
        if token is None or token.spaced:
            raise NoFormula
        if token.text == "<":
            self.at += 1
            return row([mo("<"), self._atom()])
        if token.text in "({":
            return self._group(token, keep=False)
        if token.text in SIGNS:
            self.at += 1
            following = self._peek()
            if following is None or following.spaced or following.kind not in ("number", "name"):
                return mo(SIGNS[token.text])
            return row([mo(SIGNS[token.text], form="prefix"), self._atom()])
        if token.text == "*":
            self.at += 1
            return mo("*")
        if token.kind not in ("number", "name", "letter"):
            raise NoFormula
        return self._atom()

    def _atom(self) -> Element:
        token = self._peek()
        if token is None:
            raise NoFormula
        if token.kind == "number":
            self.at += 1
            return leaf(token.text)
        if token.kind == "letter":
            self.at += 1
            self.certain = True
            self.symbols.add(token.text)
            return mi(token.text)
        if token.kind == "name":
            return self._name(token)
        if token.text in ("(", "[", "{"):
            return self._group(token)
        if token.text in ("|", "||"):
            return self._bars(token)
        if token.text == "<" and self._opens():
            return self._inner()
        if token.text == "..." and self.inside:
            self.at += 1
            return mo("…")
        following = self._peek(1)
        if token.text == "*" and self.inside[-1:] == ["("] and self._opens() and following is not None:
            if following.kind != "letter":
                raise NoFormula  # arguments of the program
            self.at += 1
            return row([mo("*", form="prefix", rspace="0"), self._operand()])  # f(x, *θ)
        raise NoFormula

    def _name(self, token: Token) -> Element:
        """A symbol, a function with its arguments, or a name of the program."""
        following = self._peek(1)
        called = following is not None and following.text in ("(", "[") and not following.spaced
        is_scripted = following is not None and following.text in ("^", "_") and not following.spaced
        base, _, script = token.text.partition("_")
        if token.text == "a" and not self.inside and following is not None and following.kind in ("name", "prose"):
            raise NoFormula  # the article
        self.at += 1
        if token.text in ("sqrt", "floor") and called:
            assert following is not None
            group = self._group(following, keep=False)
            self.certain = True
            return wrap("msqrt", [group]) if base == "sqrt" else row([mo("⌊"), group, mo("⌋")])
        after = [each.text for each in (following, self._peek(1)) if each is not None]
        if token.text == "O" and after == ["~", "("]:
            self.at += 1
            return mi("Õ")
        if token.text in self.names and len(token.text) > 1 and token.text not in GREEK:
            made = program(token.text)
        elif "_" in token.text and (symbol := self._symbol(base, script)) is not None:
            lower = symbol_of(script)
            lower = mi(script) if lower is None else lower
            made = scripted(symbol, lower, None, symbol.text in LARGE.values())
            self.certain = True
        elif "_" in token.text:
            made = program(token.text)
        elif (symbol := self._symbol(base, "")) is not None:
            made = symbol
        elif token.text in NAMED:
            argument = self._peek()
            if argument is None or not (called or is_scripted or self._may_follow(argument)):
                raise NoFormula
            made = mi(token.text) if token.text != "log2" else scripted(mi("log"), leaf("2"), None, False)
        elif token.text == "Id":
            made = mi("Id")
        elif re.fullmatch(r"d[tuxyzsWXYZ]", base):
            made = row([mi("d", normal=True), mi(base[1])])
        elif re.fullmatch(r"[a-z][A-Z]", base):
            made = row([mi(base[0]), mo(TIMES), mi(base[1])])
        elif base in PROSE or not (self.display or is_scripted or (called and self._is_after_named())):
            raise NoFormula
        else:
            made = mi(base)
        return made

    def _symbol(self, base: str, script: str) -> Element | None:
        """The letter that `base` stands for, unless base_script is a name of the program."""
        if base in LARGE:
            return mo(LARGE[base]) if script or self._may_follow(self._peek()) else None
        if script and base not in GREEK and (base in NAMED or base in self.names) and len(script) <= 2:
            return mi(base)
        if "_" in script or (base == "n" and len(script) > 1) or (script == "" and self._was_program()):
            return None
        symbol = symbol_of(base)
        if symbol is not None:
            self.symbols.add(base)
            self.certain = self.certain or base in GREEK
        return symbol

    def _is_after_named(self) -> bool:
        return self.at > 1 and self.tokens[self.at - 2].text in NAMED

    def _was_program(self) -> bool:
        return self.tokens[self.at - 1].text.endswith("_")

    def _group(self, opening: Token, *, keep: bool = True) -> Element:
        """What stands in brackets; intervals may end with either kind."""
        self.at += 1
        self.inside.append(opening.text)
        parts: list[Element] = []
        try:
            while True:
                parts.append(self.chain())
                token = self._take()
                closing = self._peek()
                if token.text == "," and closing is not None and closing.text == ")":
                    parts.append(mo(",", rspace="0"))  # (d,), the shape of a vector
                    token = self._take()
                if token.text in CLOSING[opening.text]:
                    break
                if token.text not in (",", ";", ":", "|", "||"):
                    raise NoFormula
                parts.append(mo({"|": "∣", "||": "∥"}.get(token.text, token.text)))
        finally:
            self.inside.pop()
        if not keep:
            return row(parts)
        is_shape = len(parts) > 1 and all(len(part.text or "") == 1 for part in parts)
        self.certain = self.certain or (is_shape and any(part.tag == "mi" for part in parts))  # (n, d)
        return row([mo(opening.text), *parts, mo(token.text)])

    def _bars(self, opening: Token) -> Element:
        self.at += 1
        self.inside.append(opening.text)
        try:
            content = self.sum()
            if self._take().text != opening.text:
                raise NoFormula
        finally:
            self.inside.pop()
        self.certain = True
        mark = "|" if opening.text == "|" else "‖"
        return row([mo(mark, form="prefix", stretchy="false"), content, mo(mark, form="postfix", stretchy="false")])

    def _inner(self) -> Element:
        self.at += 1
        self.inside.append("<")
        try:
            left = self.sum()
            if self._take().text != ",":
                raise NoFormula
            right = self.sum()
            if self._take().text != ">":
                raise NoFormula
        finally:
            self.inside.pop()
        self.certain = True
        return row([mo("⟨"), left, mo(","), right, mo("⟩")])

    def _may_follow(self, token: Token | None) -> bool:
        """Whether a product without a sign may go on here."""
        if token is None or token.apart:
            return False
        if token.kind in ("letter", "number"):
            return token.kind == "letter" or self.display or not token.spaced or "{" in self.inside
        if token.kind == "name":
            base = token.text.partition("_")[0]
            if self.display:
                return token.text not in PROSE or token.text == "a"
            if token.text in ("a", "in", "o"):
                return token.text == "a" and bool(self.inside)
            following = self._peek(1)
            return (
                (symbol_of(base) is not None and (token.text not in self.names or len(token.text) == 1))
                or base in NAMED | LARGE.keys() | {"sqrt", "ceil", "floor", "Id"}
                or (token.text in self.names and bool(self.inside))
                or re.fullmatch(r"d[tuxyzsWXYZ]|[a-z][A-Z]", token.text) is not None
                or (following is not None and following.text == "(" and not following.spaced
                    and self.tokens[self.at - 1].text in NAMED)
            )  # fmt: skip
        if token.text in ("|", "||"):
            if self.inside[-1:] == [token.text]:
                return False  # it closes
            before = self.tokens[self.at - 1]
            return (self._opens() and token.spaced) or (not token.spaced and before.text in NAMED | {"E"})
        if token.text == "<":
            return token.spaced and self._opens()
        if token.text in ("(", "[", "{"):
            return self.display or bool(self.inside) or (token.text == "(" and self._is_factor())
        return False

    def _is_factor(self) -> bool:
        """Whether the bracket ahead holds one formula and no list: in prose, (d, k) is a shape."""
        mark = self._mark()
        try:
            self.at += 1
            self.inside.append("(")
            self.chain()
            return self._take().text == ")" and self.at - mark[0] > 3
        except NoFormula:
            return False
        finally:
            self.inside.pop()
            self._back(mark)

    def _is_membership(self, token: Token) -> bool:
        following = self._peek(1)
        if token.text != "in" or following is None or not following.spaced:
            return False
        if following.text in ("[", "{"):
            return True
        if following.text == "(":
            after = self._peek(2)
            return after is not None and (after.kind == "number" or after.text == "-")
        return self.display or (following.kind == "name" and len(following.text) == 1 and following.text.isupper())

    def _is_entrywise(self, token: Token) -> bool:
        following = self._peek(1)
        return token.text == "o" and token.spaced and following is not None and following.spaced

    def _opens(self) -> bool:
        following = self._peek(1)
        return following is not None and not following.spaced

    def _is_next_attached(self) -> bool:
        token = self._peek()
        return token is not None and not token.spaced

    def _mark(self) -> tuple[int, bool, frozenset[str]]:
        return self.at, self.certain, frozenset(self.symbols)

    def _back(self, mark: tuple[int, bool, frozenset[str]]) -> None:
        self.at, self.certain, self.symbols = mark[0], mark[1], set(mark[2])

    def _peek(self, ahead: int = 0) -> Token | None:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else None

    def _take(self) -> Token:
        token = self._peek()
        if token is None:
            raise NoFormula
        self.at += 1
        return token
