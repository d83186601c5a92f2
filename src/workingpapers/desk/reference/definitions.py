"""Definitions in the sources of this package, found and read without importing anything."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from workingpapers.desk import syntax

PACKAGE = "workingpapers"
ROOT = Path(__file__).resolve().parents[2]
SCALARS = {
    "Float": "float", "Float16": "float16", "Float32": "float32", "Float64": "float64", "BFloat16": "bfloat16",
    "Int": "integer", "Integer": "integer", "Int32": "int32", "Int64": "int64", "UInt": "unsigned", "UInt8": "uint8",
    "Bool": "bool", "Complex": "complex", "Num": "number", "Real": "real", "Inexact": "inexact", "Shaped": "",
}  # fmt: skip


def type_of(home: str, node: ast.expr | None, depth: int = 0) -> list[tuple[str, str]]:
    """A type for readers: (words, shape) of each alternative; aliases of this package are written out."""
    source = read(home)
    if node is None or source is None:
        return []
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        made: list[tuple[str, str]] = []
        for words, axes in [*type_of(home, node.left, depth), *type_of(home, node.right, depth)]:
            if axes and made and made[-1][1] == axes:  # one shape, two kinds of array
                made[-1] = (f"{made[-1][0]} or {words.rpartition(' ')[2]}", axes)
            else:
                made.append((words, axes))
        return made
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
        return [(node.value, "")]
    if isinstance(node, ast.Name) and depth < 4:
        found = resolve(home, node.id)
        if found is not None and isinstance(found[1], ast.Assign) and _is_type(found[1].value):
            return type_of(found[0], found[1].value, depth + 1)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        head, inner = node.value.id, node.slice
        if head in SCALARS and isinstance(inner, ast.Tuple) and len(inner.elts) == 2:
            array, shape = inner.elts
            if isinstance(shape, ast.Constant) and isinstance(shape.value, str):
                of = "array" if text_of(source, array).endswith("ndarray") else text_of(source, array)
                return [(f"{SCALARS[head]} {of}".strip(), shape_of(shape.value))]
        if head == "Literal":
            options = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return [(" or ".join(text_of(source, option) for option in options), "")]
    return [(text_of(source, node), "")]


def shape_of(written: str) -> str:
    """A jaxtyping shape for readers: `batch d` is batch × d."""
    axes = [
        f"{axis[1:]}…"
        if axis.startswith("*")
        else "…"
        if axis == "..."
        else "any"
        if axis == "_"
        else axis.lstrip("#?")
        for axis in written.split()
    ]
    return " × ".join(axes) if axes else "scalar"


def _is_type(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.BitOr)
    return isinstance(node, ast.Subscript)


@dataclass(frozen=True)
class Source:
    """One module of this package as text.

    Attributes
    ----------
    imports : name to (module, name there); the stub of a package counts, when it has one.
    defined : classes, functions and values by name.
    exported : `__all__`, else what a package imports by `name as name`, else what is defined and has a docstring.
    """

    module: str
    code: str
    text: str
    is_package: bool
    imports: Mapping[str, tuple[str, str]]
    defined: Mapping[str, ast.stmt]
    exported: Sequence[str]

    @cached_property
    def lines(self) -> list[str]:
        return self.code.split("\n")

    def comment(self, node: ast.stmt) -> str:
        """The comment behind a value, which is all the documentation it has."""
        return self.lines[(node.end_lineno or node.lineno) - 1].partition("  # ")[2]


@cache
def path_of(module: str) -> Path | None:
    stem = ROOT.joinpath(*module.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


@cache
def read(module: str) -> Source | None:
    path = path_of(module)
    if path is None:
        return None
    code = path.read_text(encoding="utf-8")
    tree = syntax.parse(code)
    is_package = path.name == "__init__.py"
    package = module if is_package else module.rpartition(".")[0]
    body = list(tree.body)
    stub = path.with_suffix(".pyi")
    if stub.is_file():
        body += syntax.parse(stub.read_text(encoding="utf-8")).body
    imports: dict[str, tuple[str, str]] = {}
    aliased: list[str] = []
    defined: dict[str, ast.stmt] = {}
    listed: list[str] | None = None
    for node in body:
        if isinstance(node, ast.ImportFrom) and (origin := _origin(package, node)) is not None:
            for each in node.names:
                imports[each.asname or each.name] = origin, each.name
                aliased += [each.name] if each.asname == each.name else []
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            defined[node.targets[0].id] = node
            if node.targets[0].id == "__all__" and isinstance(node.value, ast.List):
                listed = [str(each.value) for each in node.value.elts if isinstance(each, ast.Constant)]
    documented = [
        name
        for name, node in defined.items()
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and name[0] != "_" and ast.get_docstring(node)
    ]
    exported = listed if listed is not None else aliased if is_package else documented
    return Source(module, code, ast.get_docstring(tree) or "", is_package, imports, defined, exported)


def _origin(package: str, node: ast.ImportFrom) -> str | None:
    """The module of this package that an import names, None for any other."""
    if node.level:
        parts = package.split(".")
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, *([node.module] if node.module else [])])
    name = node.module or ""
    return name.removeprefix(f"{PACKAGE}.") if name.startswith(f"{PACKAGE}.") else None


def resolve(module: str, name: str) -> tuple[str, ast.stmt | None] | None:
    """Module and node of a definition, found through imports; the node of a module is None."""
    for _ in range(10):
        source = read(module)
        if source is None:
            return None
        if name in source.defined:
            return module, source.defined[name]
        if source.imports.get(name, (module, name)) == (module, name):
            below = f"{module}.{name}"
            return (below, None) if path_of(below) is not None else None
        module, name = source.imports[name]
    return None


def text_of(source: Source, node: ast.AST | None) -> str:
    """As written, on one line."""
    if not isinstance(node, ast.expr) or node.end_lineno is None:
        return ""
    lines = [line.encode() for line in source.lines[node.lineno - 1 : node.end_lineno]]
    lines[-1] = lines[-1][: node.end_col_offset]
    lines[0] = lines[0][node.col_offset :]
    return " ".join(b" ".join(lines).decode().split())


def segment(source: Source, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The whole definition with its decorators, without the indentation of its class."""
    first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
    lines = source.lines[first - 1 : node.end_lineno]
    return inspect.cleandoc("\n" + "\n".join(lines))
