"""MathML Core, which browsers show without a script, and the letters and signs of our formulas in it."""

from __future__ import annotations

import re
import unicodedata
from xml.etree.ElementTree import Element, tostring

GREEK = {
    name.replace("lamda", "lambda"): unicodedata.lookup(f"GREEK SMALL LETTER {name.upper()}")
    for name in re.findall(
        r"\w+", "alpha beta gamma delta epsilon zeta eta theta kappa lamda mu nu xi pi rho sigma tau phi chi psi omega"
    )
} | {"lam": "λ", "eps": "ε"}
CAPITALS = {
    name: unicodedata.lookup(f"GREEK CAPITAL LETTER {name.upper()}")
    for name in ("Gamma", "Delta", "Theta", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega")
} | {"Lambda": "Λ"}
LARGE = {"sum": "∑", "prod": "∏", "int": "∫"}
NAMED = frozenset(
    re.findall(
        r"\w+",
        "log log2 ln exp det tr diag max min argmax argmin sign sup inf ceil KL Var Cov prox proj softmax sin cos",
    )
)
SUPERSCRIPTS = {"⁰": "0", "¹": "1", "²": "2", "³": "3", "⁴": "4", "⁵": "5", "⁻": "−", "⁺": "+", "ⁿ": "n", "ᵀ": "T"}
SUBSCRIPTS = {"₀": "0", "₁": "1", "₂": "2", "₃": "3", "ᵢ": "i", "ⱼ": "j"}
BREAKS = frozenset("=≤≥<>∼→←≔≠∈≈+−±" + "\u2062")
OPENING = frozenset("([{|‖⟨⌊")
PRIME = {"form": "postfix"}
APPLY, TIMES = "\u2061", "\u2062"  # invisible: what a screen reader says between a function and what it is of


def written(element: Element) -> str:
    """The element as text, escaped by construction."""
    return tostring(element, encoding="unicode")


def math(content: Element, source: str) -> Element:
    element = Element("math", alttext=source)
    element.append(content)
    return element


def broken(element: Element) -> list[Element]:
    """A formula in parts between which a line may end: browsers do not break MathML themselves.

    A part begins with a relation, a sum's sign or a factor of the outermost level.
    """
    atoms: list[Element] = []
    for outer in _children(element[0]):
        atoms += _children(outer) if outer.tag == "mrow" else [outer]
    parts: list[list[Element]] = [[]]
    for number, atom in enumerate(atoms):
        is_sign = atom.tag == "mo" and atom.text in BREAKS and atom.get("form") != "prefix"
        if is_sign and number and atoms[number - 1].text not in BREAKS:
            parts.append([])
            atom = mo(atom.text or "", form="infix")
        parts[-1].append(atom)
    made = [math(row(part), "") for part in parts if part]
    made[0].set("alttext", element.get("alttext", ""))
    for part in made[1:]:
        del part.attrib["alttext"]
    return made


def _children(element: Element) -> list[Element]:
    """What a row holds, when it is not a pair of brackets, which stay together."""
    is_open = element.tag != "mrow" or element[0].text in OPENING or element[1].text == APPLY
    return [element] if is_open else list(element)


def row(parts: list[Element]) -> Element:
    return parts[0] if len(parts) == 1 else wrap("mrow", parts)


def wrap(tag: str, parts: list[Element]) -> Element:
    element = Element(tag)
    element.extend(parts)
    return element


def scripted(base: Element, lower: Element | None, upper: Element | None, large: bool) -> Element:
    if lower is None and upper is None:
        return base
    if lower is None and base.tag in ("msub", "munder"):
        base, lower = base
        large = base.text in LARGE.values()
    under = large and base.text != "∫"
    if lower is not None and upper is not None:
        return wrap("munderover" if under else "msubsup", [base, lower, upper])
    if lower is not None:
        return wrap("munder" if under else "msub", [base, lower])
    assert upper is not None
    return wrap("msup", [base, upper])


def between(left: Element, right: Element) -> list[Element]:
    """The sign that is not written: an application after log, none after a sum, else a product; words keep a gap."""
    if _base(left).text in LARGE.values():
        return []
    function = _base(left).text in NAMED
    gap = any(len(_last(side, last) or "") > 1 for side, last in ((left, True), (right, False)))
    signs = [mo(APPLY if function else TIMES)]
    if gap and not (right.tag == "mrow" and len(right) and right[0].text == "("):
        signs.append(Element("mspace", width="0.17em"))
    return signs


def symbol_of(name: str) -> Element | None:
    if name in GREEK or name in CAPITALS:
        return mi(GREEK.get(name) or CAPITALS[name])
    if re.fullmatch(r"[A-Za-z][\u0300-\u036f]*", name):
        return mi(name, normal=name == "E")
    if numbered := re.fullmatch(r"([A-Za-z]|[a-z]{2,7})(\d)", name):
        base = symbol_of(numbered[1])
        return scripted(base, leaf(numbered[2]), None, False) if base is not None else None
    return leaf(name) if name.isdigit() else None


def program(name: str) -> Element:
    element = mi(name)
    element.set("class", "name")
    return element


def mi(text: str, *, normal: bool = False) -> Element:
    element = Element("mi", {"mathvariant": "normal"} if normal else {})
    element.text = text
    return element


def mo(text: str, **attributes: str) -> Element:
    element = Element("mo", attributes)
    element.text = text
    return element


def leaf(text: str) -> Element:
    """A number, a letter or a sign."""
    if text[0].isdigit():
        element = Element("mn")
        element.text = text
        return element
    return mi(text) if text.isalpha() else mo(text)


def _base(element: Element) -> Element:
    return element[0] if element.tag in ("msub", "msup", "msubsup", "munder", "munderover") else element


def _last(element: Element, last: bool) -> str | None:
    while len(element):
        element = element[-1 if last and element.tag == "mrow" else 0]
    return element.text if element.tag == "mi" else None
