"""Finding a paper's claims by name, and telling whether the source they depend on has changed.

A fingerprint covers the source that a measurement can reach, found from the syntax trees alone, without importing
anything: comments, docstrings and formatting do not count. Of a claims module, and of the shared rooms `common` and
`data`, only the definitions that are reached count, so that a new loader or another claim of the same paper does not
make every older measurement worthless; a module of a field, a paper's own method, counts as a whole. The desk does
not count: it changes what is said about a measurement, not the measurement.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from workingpapers.desk import syntax

if TYPE_CHECKING:
    from workingpapers.desk.claim import Claim

__all__ = ["claims_of", "fingerprint", "function_fingerprint", "has_claims", "load_claims", "module_fingerprint"]

HOME = "workingpapers"
SHARED = ("claims", "common", "data")  # rooms whose modules hold what several papers or claims use
CLAIM_WORDS = ("claim", "benchmark")
IMPORTED = ""  # in place of a name: the statements that run when a module is imported
DYNAMIC = {"globals", "eval", "exec", "vars"}  # a definition that uses one of them may reach anything in its module

# --------------------------------------------------------------------------------------------------------------------
# Claims by name


def load_claims(module: str) -> list[Claim]:
    """Import the claims of a paper, in order of definition.

    Parameters
    ----------
    module : the paper's, "optimization.halpern".

    Raises
    ------
    LookupError : there is no such claims module.
    ValueError : two of its claims have the same name.
    """
    _claims_file(module)
    return claims_of(importlib.import_module(f"{HOME}.claims.{module}"))


def claims_of(module: ModuleType) -> list[Claim]:
    """The claims in a module's namespace, in order of definition.

    Raises
    ------
    ValueError : two of them have the same name.
    """
    from workingpapers.desk.claim import Claim

    claims = list({id(value): value for value in vars(module).values() if isinstance(value, Claim)}.values())
    names = [claim.name for claim in claims]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{module.__name__} has two claims named {name}")
    return claims


def has_claims(module: str) -> bool:
    """Whether there is a claims module for a paper's module, found without importing it."""
    return _claims_spec(module) is not None


def _claims_file(module: str) -> Path:
    spec = _claims_spec(module)
    if spec is None or spec.origin is None:
        raise LookupError(f"{module} has no claims: there is no module {HOME}.claims.{module}")
    return Path(spec.origin)


def _claims_spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(f"{HOME}.claims.{module}")
    except ModuleNotFoundError:  # not even its field has claims
        return None


# --------------------------------------------------------------------------------------------------------------------
# Fingerprints


def fingerprint(claim: Claim) -> str:
    """Of the source that a claim's measurement can depend on.

    What is expected of the measurement, its grid, how it is plotted, and the other claims of the module do not count.
    """
    return function_fingerprint(claim.measure)


def function_fingerprint(function: Callable[..., Any]) -> str:
    """Of the source that a module-level function can depend on."""
    function = inspect.unwrap(function)
    return _digest(Path(inspect.getfile(function)), [function.__name__])


def module_fingerprint(module: str) -> str:
    """Of everything in a paper's claims module, expectations included, and of all that it can depend on.

    Raises
    ------
    LookupError : there is no such claims module.
    """
    return _digest(_claims_file(module), None)


def _digest(path: Path, names: Iterable[str] | None) -> str:
    return hashlib.sha256(repr(sorted(_reached(path, names))).encode()).hexdigest()[:32]


class Target(NamedTuple):
    """Something that counts: a definition of a module, all of them (`name` None), or what runs when it is imported."""

    module: str
    name: str | None


@dataclass(frozen=True)
class Import:
    """`from module import name`, or `import module` when `name` is None; `level` counts the leading dots."""

    module: str
    name: str | None
    level: int = 0


@dataclass(frozen=True)
class Definition:
    """A top-level statement: its normalised text, and what it uses."""

    text: str
    names: frozenset[str] = frozenset()
    imports: tuple[Import, ...] = ()


@dataclass(frozen=True)
class Module:
    """What a source file defines.

    Attributes
    ----------
    definitions : by the name they bind; of a claim the decorators are a definition apart, named "@" + its name.
    always : statements that act when the module is imported, so that they count whatever is reached.
    attributes : every attribute name in the file.
    """

    definitions: Mapping[str, tuple[Definition, ...]]
    always: tuple[Definition, ...]
    attributes: frozenset[str]


def _reached(path: Path, names: Iterable[str] | None) -> set[tuple[str, str]]:
    """(module, text) of every definition that names of a file can reach; for None, all names, and what is expected."""
    start, packages = _place(path)
    find = functools.cache(functools.partial(_find, packages=packages))
    todo = [Target(start, None)] if names is None else [Target(start, name) for name in names]
    seen: set[Target] = set()
    reached: set[tuple[str, str]] = set()
    while todo:
        place, name = todo.pop()
        file = find(place)
        if file is None or place == HOME or place.startswith(f"{HOME}.desk"):
            continue
        module = _parsed(file)
        if name != IMPORTED and (_counts_whole(place) or name not in module.definitions):
            name = None
        if (place, name) in seen:
            continue
        seen.add(Target(place, name))
        if name is None:
            definitions = tuple(definition for same in module.definitions.values() for definition in same)
        elif name == IMPORTED:
            definitions = module.always
            todo.append(Target(place.rpartition(".")[0], IMPORTED))
        else:
            definitions = module.definitions[name]
            if names is None and f"@{name}" in module.definitions:
                todo.append(Target(place, f"@{name}"))
        todo.append(Target(place, IMPORTED))
        package = place if file.name == "__init__.py" else place.rpartition(".")[0]
        for definition in definitions:
            reached.add((place, definition.text))
            used = module.definitions.keys() if definition.names & DYNAMIC else definition.names
            todo += [Target(place, other) for other in used if other in module.definitions]
            for imported in definition.imports:
                todo += _targets(imported, package, module.attributes, find)
    return reached


def _counts_whole(module: str) -> bool:
    home, _, rest = module.partition(".")
    return home == HOME and rest.partition(".")[0] not in SHARED


def _place(path: Path) -> tuple[str, dict[str, Path]]:
    """A file's module name, and the directories of its own top package and of `workingpapers`."""
    parts = [] if path.name == "__init__.py" else [path.stem]
    directory = path.resolve().parent
    while (directory / "__init__.py").is_file():
        parts.insert(0, directory.name)
        directory = directory.parent
    return ".".join(parts), {HOME: Path(__file__).parents[2], parts[0]: directory}


def _find(module: str, packages: Mapping[str, Path]) -> Path | None:
    """The file of a module of the packages whose directories are given."""
    directory = packages.get(module.partition(".")[0])
    if directory is None:
        return None
    base = directory.joinpath(*module.split("."))
    return next((path for path in (base / "__init__.py", Path(f"{base}.py")) if path.is_file()), None)


def _targets(
    imported: Import, package: str, attributes: frozenset[str], find: Callable[[str], Path | None]
) -> Iterator[Target]:
    """What an import statement, in a module of `package` that uses `attributes`, makes count."""
    module = imported.module
    if imported.level:
        base = package.split(".")[: len(package.split(".")) - imported.level + 1]
        module = ".".join([*base, module] if module else base)
    file = find(module)
    if file is None or module.startswith(f"{HOME}.desk"):
        return
    if imported.name is None:  # `import a.b.c` gives a.b.c, and by way of `a` whatever is an attribute of it
        yield from _objects(module, attributes, find)
        yield from _objects(module.partition(".")[0], attributes, find)
        return
    here = Import(module, imported.name)
    if imported.name == "*":
        yield Target(module, None)
    elif (source := _exported(file, module).get(imported.name, here)) != here:
        yield from _targets(source, package, attributes, find)
    elif find(f"{module}.{imported.name}") is not None:
        yield from _objects(f"{module}.{imported.name}", attributes, find)
    else:
        yield Target(module, imported.name)


def _objects(module: str, attributes: frozenset[str], find: Callable[[str], Path | None]) -> Iterator[Target]:
    """What counts when a module or package is used as an object: of a lazy package, the names that are looked up."""
    file = find(module)
    if file is None:
        return
    if file.name != "__init__.py":
        yield Target(module, None)
        return
    exported = _exported(file, module)
    if not exported:
        yield Target(module, None)
    for name in attributes:
        if name in exported:
            yield from _targets(exported[name], module, attributes, find)
        elif find(f"{module}.{name}") is not None:
            yield from _objects(f"{module}.{name}", attributes, find)


def _exported(file: Path, module: str) -> dict[str, Import]:
    """The names that a lazy package exports by the stub beside it, and where each is defined."""
    stub = file.with_suffix(".pyi")
    if file.name != "__init__.py" or not stub.is_file():
        return {}
    return {
        name: Import(f"{module}.{source.module}".rstrip("."), source.name)
        for name, definitions in _parsed(stub).definitions.items()
        for definition in definitions
        for source in definition.imports
    }


# --------------------------------------------------------------------------------------------------------------------
# One file

_PARSED: dict[Path, tuple[tuple[int, int], Module]] = {}


def _parsed(path: Path) -> Module:
    """The parsed file, from memory as long as the file stays as it is."""
    stat = path.stat()
    version = (stat.st_mtime_ns, stat.st_size)
    if path not in _PARSED or _PARSED[path][0] != version:
        _PARSED[path] = (version, _parse(path.read_text(encoding="utf-8"), path))
    return _PARSED[path][1]


def _parse(text: str, path: Path) -> Module:
    tree = syntax.parse(text, str(path))
    definitions: dict[str, list[Definition]] = {}
    always: list[Definition] = []
    attributes: set[str] = set()
    foreign = {
        alias.asname or alias.name.partition(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom) and not _is_ours(node)
        for alias in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                single = _definition(_only(node, alias), attributes)
                if alias.name == "*":
                    always.append(single)
                else:
                    definitions.setdefault(alias.asname or alias.name.partition(".")[0], []).append(single)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            claiming = [decorator for decorator in node.decorator_list if _called(decorator) in CLAIM_WORDS]
            node.decorator_list = [decorator for decorator in node.decorator_list if decorator not in claiming]
            for decorator in claiming:
                apart = _definition(ast.Expr(decorator), attributes)
                definitions.setdefault(f"@{node.name}", []).append(apart)
            if all(_called(decorator) in foreign | {"artifact"} for decorator in node.decorator_list):
                definitions.setdefault(node.name, []).append(_definition(node, attributes))
            else:  # a decorator of ours may register what it decorates
                always.append(_definition(node, attributes))
                definitions.setdefault(node.name, []).append(always[-1])
        elif bound := _bound(node):
            if bound != ["__all__"]:
                definition = _definition(node, attributes)
                for name in bound:
                    definitions.setdefault(name, []).append(definition)
        elif not _is_text(node) and not _is_for_types_only(node):
            always.append(_definition(node, attributes))
    frozen = {name: tuple(same) for name, same in definitions.items()}
    return Module(frozen, tuple(always), frozenset(attributes))


def _definition(statement: ast.stmt, attributes: set[str]) -> Definition:
    """A statement without its docstrings; the attribute names in it are added to `attributes`."""
    names: set[str] = set()
    imports: list[Import] = []
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            attributes.add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            node.body = [inner for inner in node.body if not _is_text(inner)]
        elif isinstance(node, ast.Import):
            imports += [Import(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports += [Import(node.module or "", alias.name, node.level) for alias in node.names]
    return Definition(ast.unparse(statement), frozenset(names), tuple(imports))


def _only(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.stmt:
    if isinstance(node, ast.Import):
        return ast.Import([alias])
    return ast.ImportFrom(node.module, [alias], node.level)


def _is_ours(node: ast.Import | ast.ImportFrom) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or (node.module or "").partition(".")[0] == HOME
    return any(alias.name.partition(".")[0] == HOME for alias in node.names)


def _called(decorator: ast.expr) -> str:
    """The name a decorator starts with: `claim` of `@claim(...)`, `functools` of `@functools.cache`."""
    node = _root(decorator.func if isinstance(decorator, ast.Call) else decorator)
    return node.id if isinstance(node, ast.Name) else ""


def _bound(node: ast.stmt) -> list[str]:
    """The names that an assignment binds or, as `METHODS["ours"] = ...` does, whose value it changes."""
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    else:
        return []
    roots = [item for target in targets for item in (target.elts if isinstance(target, ast.Tuple) else [target])]
    roots = [_root(root) for root in roots]
    names = [root.id for root in roots if isinstance(root, ast.Name)]
    return names if len(names) == len(roots) else []


def _root(node: ast.expr) -> ast.expr:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_for_types_only(node: ast.stmt) -> bool:
    if not isinstance(node, ast.If) or node.orelse:
        return False
    test = node.test
    return (test.id if isinstance(test, ast.Name) else getattr(test, "attr", "")) == "TYPE_CHECKING"
