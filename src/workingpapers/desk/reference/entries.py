"""The reference: what every public name is called with, returns and says of itself, read from the sources.

Nothing is imported: the desk knows the fields by their text alone, and torch would take seconds. What is public stands
in the stubs (`__init__.pyi`) of the fields and in the catalogue; definitions are found by following imports inside this
package. A paper that does not work yet has no module and no entries.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Literal

from workingpapers.desk.catalogue import FIELDS, Paper, papers
from workingpapers.desk.reference import docstring
from workingpapers.desk.reference.definitions import (
    PACKAGE,
    ROOT,
    Source,
    path_of,
    read,
    resolve,
    segment,
    text_of,
    type_of,
)

SHARED = {"data": "Data sets", "common": "What the fields share"}

Kind = Literal["class", "base class", "function", "method", "property", "module", "alias"]


@dataclass(frozen=True)
class Argument:
    """A parameter of a call.

    Attributes
    ----------
    name : with its stars.
    annotation, default : as written, "" where there is none.
    type : the annotation for readers: `Float[Tensor, "n d"]` is ("float Tensor", "n × d").
    keyword_only : whether it can be passed by name alone.
    """

    name: str
    annotation: str
    default: str
    type: Sequence[tuple[str, str]]
    keyword_only: bool = False


@dataclass(frozen=True)
class Entry:
    """A public name.

    Attributes
    ----------
    module : page it stands on, as the catalogue has it: `causality.colide`.
    name : `CoLiDE`, or `CoLiDE.fit`; the anchor on that page.
    home : where it is defined, `workingpapers.causality.colide.estimator`.
    text : its docstring.
    returns : type for readers, as in `Argument`.
    members : methods and properties of a class, functions of a module.
    inherited : from which entry a class has which further members.
    """

    module: str
    name: str
    kind: Kind
    home: str
    text: str
    source: str
    arguments: Sequence[Argument] | None = None
    annotation: str = ""
    returns: Sequence[tuple[str, str]] = ()
    members: Sequence[Entry] = ()
    inherited: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def signature(self) -> str:
        """As Python has it."""
        if self.arguments is None:
            return self.name + (f": {self.annotation}" if self.annotation else "")
        shown, star = [], False
        for each in self.arguments:
            star = star or each.name.startswith("*")
            if each.keyword_only and not star:
                shown.append("*")
                star = True
            blank = " " if each.annotation else ""
            default = f"{blank}={blank}{each.default}" if each.default else ""
            shown.append(each.name + (f": {each.annotation}" if each.annotation else "") + default)
        return f"{self.name}({', '.join(shown)})" + (f" -> {self.annotation}" if self.annotation else "")

    @property
    def summary(self) -> str:
        """The first sentence of the docstring, on one line."""
        first = inspect.cleandoc(self.text).split("\n\n")[0]
        return " ".join(first.split()).replace("`", "")

    @cached_property
    def lead(self) -> Sequence[docstring.Piece]:
        """The summary with its formulas and links."""
        return docstring.parse(inspect.cleandoc(self.text).split("\n\n")[0], (), lambda name: _find(self, name)).summary

    @cached_property
    def documentation(self) -> docstring.Docstring:
        """The docstring in parts; names in it that have entries are links."""
        names = {each.name.lstrip("*") for each in self.arguments or ()}
        names |= {name for found in _described(self.text) for name in found}
        return docstring.parse(self.text, names, lambda name: _find(self, name))

    @cached_property
    def parameters(self) -> list[tuple[Sequence[Argument], Sequence[docstring.Block]]]:
        """The arguments as the docstring groups and describes them; those it leaves out come last."""
        left = {each.name.lstrip("*"): each for each in self.arguments or ()}
        made: list[tuple[Sequence[Argument], Sequence[docstring.Block]]] = []
        for title in ("Parameters", "Attributes"):
            for names, blocks in self.documentation.described(title):
                if title == "Parameters" or all(name in left for name in names):
                    known = [left.pop(name.lstrip("*"), Argument(name, "", "", ())) for name in names]
                    made.append((known, blocks))
        return [*made, (list(left.values()), [])] if left and made else made

    @property
    def heading(self) -> str:
        """What the docstring calls its parameters: a result's are its attributes."""
        titles = [section.title for section in self.documentation.sections]
        return "Attributes" if "Attributes" in titles and "Parameters" not in titles else "Parameters"

    @property
    def sections(self) -> list[docstring.Section]:
        """The sections that `parameters` does not cover."""
        covered = {each.name for group, _ in self.parameters for each in group}
        fields = self.kind in ("class", "base class") and all(
            name in covered for names, _ in self.documentation.described("Attributes") for name in names
        )
        hidden = {"Parameters"} | ({"Attributes"} if fields else set())
        return [
            section
            for section in self.documentation.sections
            if section.title not in hidden or any(block.kind != "names" for block in section.blocks)
        ]

    def walk(self) -> Iterator[Entry]:
        """This entry and its members."""
        yield self
        for member in self.members:
            yield from member.walk()


@dataclass(frozen=True)
class Page:
    """The public names of one module.

    Attributes
    ----------
    module : as the catalogue has it, or `data`, or `common.validation`.
    title : of the paper, else of the module.
    paper : whose method it is, None for a module that several share.
    overview : the docstring of the module, and those of the modules inside it that define the names, where they say
        more than one sentence.
    """

    module: str
    title: str
    paper: Paper | None
    overview: Sequence[Entry]
    entries: Sequence[Entry]

    @cached_property
    def anchors(self) -> frozenset[str]:
        """All names that can be linked to."""
        walked = [each for entry in self.entries for each in entry.walk()]
        inherited = {
            f"{each.name}.{member}" for each in walked for names in each.inherited.values() for member in names
        }
        return frozenset({each.name for each in walked} | inherited)


def modules() -> dict[str, Paper | None]:
    """The modules that have a page, field by field: those of working papers first, then what their field shares."""
    found: dict[str, Paper | None] = {}
    known = papers()
    for name in FIELDS:
        found |= {row.module: row for row in known.values() if row.field == name and path_of(row.module) is not None}
        found |= {module: None for module in _exported(name) if module not in found}
    found["data"] = None
    return found | {f"common.{path.stem}": None for path in sorted((ROOT / "common").glob("[!_]*.py"))}


def pages() -> list[Page]:
    """Every page, in the order of `modules`."""
    return [_page(module, paper) for module, paper in modules().items()]


def page(module: str) -> Page | None:
    """The page of a module, None for any other text: what a reader asks for never becomes a path."""
    known = modules()
    return _page(module, known[module]) if module in known else None


def known(module: str) -> frozenset[str]:
    """The names that can be linked to on the page of a module; none when it has no page."""
    found = page(module)
    return found.anchors if found is not None else frozenset()


def entries() -> list[Entry]:
    """Every public name once, methods included, for those who search them."""
    seen: dict[tuple[str, str], Entry] = {}
    for each in pages():
        for entry in each.entries:
            for found in entry.walk():
                seen.setdefault((found.home, found.name), found)
    return list(seen.values())


@cache
def _page(module: str, paper: Paper | None) -> Page:
    source = read(module)
    assert source is not None
    named = _public(module, paper)
    made: dict[str, Entry] = {}
    for name in named:
        found = resolve(module, name) or resolve(module.partition(".")[0], name)
        if found is not None:
            made[name] = _entry(module, name, *found)
    for entry in list(made.values()):
        line = [entry]  # the class and its bases: each is imported where one before it is defined
        for base in entry.inherited:
            found = next(filter(None, (resolve(each.home.removeprefix(f"{PACKAGE}."), base) for each in line)), None)
            if base not in made and found is not None:
                made[base] = _entry(module, base, *found, kind="base class")
            if base in made:
                line.append(made[base])
    walked = [each for entry in made.values() for each in entry.walk()]
    shown = {module} | {each.home.removeprefix(f"{PACKAGE}.") for each in walked if each.kind == "module"}
    homes = dict.fromkeys(each.home.removeprefix(f"{PACKAGE}.") for each in walked)
    inside = [home for home in homes if home not in shown and home.startswith(f"{module}.")]
    overview = [Entry(module, module, "module", f"{PACKAGE}.{module}", source.text, "")]
    for home in inside:
        inner = read(home)
        if inner is not None and "\n\n" in inner.text:
            overview.append(Entry(module, home, "module", f"{PACKAGE}.{home}", inner.text, ""))
    title = paper.title if paper is not None else SHARED.get(module, overview[0].summary.rstrip("."))
    return Page(module, title, paper, overview, list(made.values()))


def _public(module: str, paper: Paper | None) -> list[str]:
    """Names of the catalogue first, then those of the field's stub, then those the module itself exports."""
    home = module.partition(".")[0]
    names = list(paper.names) if paper is not None else []
    names += _exported(home).get(module, ()) if home in FIELDS else ()
    source = read(module)
    assert source is not None
    if source.is_package or home == "common":
        names += source.exported
    return list(dict.fromkeys(names))


@cache
def _exported(name: str) -> dict[str, tuple[str, ...]]:
    """The names in a field's stub, by the module (one below the field) that they come from."""
    source = read(name)
    found: dict[str, list[str]] = {}
    for public, (module, original) in (source.imports if source is not None else {}).items():
        if module != name:
            found.setdefault(".".join(module.split(".")[:2]), []).append(public)
        else:
            found.setdefault(f"{name}.{original}", [])
    return {module: tuple(names) for module, names in found.items() if path_of(module) is not None}


@cache
def _where() -> dict[str, str]:
    """The page of every public name; a paper's page before one that several papers share."""
    known = modules()
    order = sorted(known, key=lambda module: known[module] is None)
    found: dict[str, str] = {}
    for module in order:
        for name in _public(module, known[module]):
            found.setdefault(name, module)
    return found


def _find(entry: Entry, name: str) -> tuple[str, str] | None:
    """Where a name in backquotes is documented: in the same class, on the same page, on another one."""
    name = name.removesuffix("()").removeprefix(f"{PACKAGE}.")
    if not re.fullmatch(r"\w+(\.\w+)*", name):
        return None
    here = _page(entry.module, modules()[entry.module])
    owner = entry.name.rpartition(".")[0]
    for candidate in (f"{entry.name}.{name}", f"{owner}.{name}", name):
        if candidate in here.anchors and candidate != entry.name:
            return entry.module, candidate
    head, _, tail = name.rpartition(".")
    if head in here.anchors:
        return entry.module, head  # an attribute stands in the entry of its class
    if name in modules():
        return name, ""
    where = _where()
    if head in modules() and tail in _public(head, modules()[head]):
        return head, tail
    return (where[name], name) if where.get(name, entry.module) != entry.module else None


def _entry(module: str, name: str, home: str, node: ast.stmt | None, *, kind: Kind | None = None) -> Entry:
    source = read(home)
    assert source is not None
    place = f"{PACKAGE}.{home}"
    if node is None:
        return Entry(module, name, "module", place, source.text, "", members=_of_module(module, name, home, source))
    if isinstance(node, ast.ClassDef):
        return _class(module, name, home, node, kind or "class")
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return _function(module, name, home, node, kind or "function")
    assert isinstance(node, ast.Assign)
    value = text_of(source, node.value)
    return Entry(module, name, "alias", place, source.comment(node), f"{name} = {value}", annotation=value)


def _of_module(module: str, name: str, home: str, source: Source) -> list[Entry]:
    """The names of a module that is itself a public name: those its docstring presents, or all that have one."""
    public = [each for each in source.exported if isinstance(source.defined.get(each), ast.FunctionDef | ast.ClassDef)]
    presented = [each for each in public if f"`{each}`" in source.text]
    if len(presented) > 2:  # one or two are mentioned in passing
        public = presented
    return [_entry(module, f"{name}.{each}", home, source.defined[each]) for each in public]


def _class(module: str, name: str, home: str, node: ast.ClassDef, kind: Kind) -> Entry:
    source = read(home)
    assert source is not None
    members = [
        _function(module, f"{name}.{each.name}", home, each, "property" if _is_property(each) else "method")
        for each in _methods(node)
    ]
    own = {each.name.rpartition(".")[2] for each in members}
    inherited: dict[str, list[str]] = {}
    for _, base in _bases(home, node):
        public = [each.name for each in _methods(base) if each.name not in own]
        own.update(public)
        if public or ast.get_docstring(base):
            inherited[base.name] = public
    return Entry(
        module, name, kind, f"{PACKAGE}.{home}", ast.get_docstring(node) or "",
        segment(source, node), _constructor(home, node), members=members, inherited=inherited,
    )  # fmt: skip


def _function(module: str, name: str, home: str, node: ast.FunctionDef | ast.AsyncFunctionDef, kind: Kind) -> Entry:
    source = read(home)
    assert source is not None
    skip = kind == "method" and not _has_decorator(node, "staticmethod")
    returns = text_of(source, node.returns)
    return Entry(
        module, name, kind, f"{PACKAGE}.{home}", ast.get_docstring(node) or "", segment(source, node),
        None if kind == "property" else _arguments(home, node.args, skip=skip),
        "" if returns == "None" else returns, type_of(home, node.returns) if returns != "None" else (),
    )  # fmt: skip


def _methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Public methods and properties, each once: of overloads the last, which is the definition."""
    found = {
        each.name: each
        for each in node.body
        if isinstance(each, ast.FunctionDef)
        and (not each.name.startswith("_") or (each.name == "__call__" and ast.get_docstring(each)))
        and not any(isinstance(mark, ast.Attribute) and mark.attr == "setter" for mark in each.decorator_list)
    }
    return list(found.values())


def _bases(home: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
    """Base classes of this package, nearest first."""
    for base in node.bases:
        if isinstance(base, ast.Name) and (found := resolve(home, base.id)) and isinstance(found[1], ast.ClassDef):
            yield found[0], found[1]
            yield from _bases(found[0], found[1])


def _constructor(home: str, node: ast.ClassDef) -> Sequence[Argument] | None:
    for place, each in [(home, node), *_bases(home, node)]:
        init = next((one for one in each.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
        if init is not None:
            return _arguments(place, init.args, skip=True)
        if _has_decorator(each, "dataclass"):
            return _dataclass_fields(place, each)
        if any(isinstance(one, ast.Name) and one.id == "NamedTuple" for one in each.bases):
            return _fields(place, each)
    return None


def _dataclass_fields(home: str, node: ast.ClassDef) -> list[Argument]:
    """The parameters of the generated constructor: inherited fields first, each where it was first declared."""
    found: dict[str, Argument] = {}
    for place, each in reversed([(home, node), *_bases(home, node)]):
        if not _has_decorator(each, "dataclass"):
            continue
        marks = [mark for mark in each.decorator_list if isinstance(mark, ast.Call)]
        keyword_only = any(
            option.arg == "kw_only" and isinstance(option.value, ast.Constant) and option.value.value is True
            for mark in marks
            for option in mark.keywords
        )
        for one in _fields(place, each):
            if one.annotation == "KW_ONLY":
                keyword_only = True
            else:
                found[one.name] = replace(one, keyword_only=keyword_only)
    return sorted(found.values(), key=lambda argument: argument.keyword_only)


def _fields(home: str, node: ast.ClassDef) -> list[Argument]:
    source = read(home)
    assert source is not None
    made = []
    for each in node.body:
        if not isinstance(each, ast.AnnAssign) or not isinstance(each.target, ast.Name):
            continue
        annotation, default = text_of(source, each.annotation), text_of(source, each.value)
        if isinstance(each.value, ast.Call) and default.startswith("field("):
            options = {option.arg: text_of(source, option.value) for option in each.value.keywords}
            if options.get("init") == "False":
                continue
            factory = options.get("default_factory", "")
            default = options.get("default", factory and f"{factory}()")
        if not annotation.startswith("ClassVar"):
            made.append(Argument(each.target.id, annotation, default, type_of(home, each.annotation)))
    return made


def _arguments(home: str, given: ast.arguments, *, skip: bool) -> list[Argument]:
    source = read(home)
    assert source is not None

    def made(each: ast.arg, default: ast.expr | None, *, stars: str = "", keyword_only: bool = False) -> Argument:
        annotation, value = text_of(source, each.annotation), text_of(source, default)
        return Argument(stars + each.arg, annotation, value, type_of(home, each.annotation), keyword_only)

    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    found = [made(each, default) for each, default in zip(positional, defaults, strict=True)][int(skip) :]
    if given.vararg is not None:
        found.append(made(given.vararg, None, stars="*"))
    for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        found.append(made(each, default, keyword_only=True))
    if given.kwarg is not None:
        found.append(made(given.kwarg, None, stars="**"))
    return found


def _described(text: str) -> list[list[str]]:
    return [
        found[1].split(", ") for line in inspect.cleandoc(text).splitlines() if (found := docstring.ITEM.match(line))
    ]


def _is_property(node: ast.FunctionDef) -> bool:
    return _has_decorator(node, "property") or _has_decorator(node, "cached_property")


def _has_decorator(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str) -> bool:
    called = [mark.func if isinstance(mark, ast.Call) else mark for mark in node.decorator_list]
    return name in [mark.attr if isinstance(mark, ast.Attribute) else getattr(mark, "id", "") for mark in called]
