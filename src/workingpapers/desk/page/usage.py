"""The first lines of code that use a paper's method, read from its source; nothing is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from workingpapers.desk import syntax
from workingpapers.desk.catalogue import Paper

HOME = Path(__file__).resolve().parents[2]  # the package `workingpapers`
Definition = ast.ClassDef | ast.FunctionDef


@cache
def usage(paper: Paper) -> str:
    """Lines to copy: those that the module's docstring gives, else an import and a call of the paper's first name."""
    sources = list(_sources(paper))
    shown = _shown(ast.get_docstring(sources[0]) or "") if sources else ""
    if shown:
        return shown
    name = paper.names[0]
    known = {
        node.name: node
        for source in sources
        for node in source.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    lines = [f"from workingpapers.{_home_of(paper, name)} import {name}"]
    if name in known:
        lines += ["", _call(known[name], known)]
    return "\n".join(lines)


def _sources(paper: Paper) -> Iterator[ast.Module]:
    """The paper's module; of a package all of them, the one that its users import first."""
    stem = HOME.joinpath(*paper.module.split("."))
    files = sorted(stem.glob("*.py"), key=lambda file: (file.name != "__init__.py", file.name))
    for file in files or [stem.with_suffix(".py")]:
        if file.is_file():
            yield syntax.parse(file.read_text(encoding="utf-8"))


def _shown(docstring: str) -> str:
    """The first indented block that starts with an import of ours."""
    found = re.search(r"^ {4}from workingpapers\b.*(?:\n(?: {4}.*)?)*", docstring, re.MULTILINE)
    return re.sub("^ {4}", "", found[0], flags=re.MULTILINE).strip() if found else ""


def _home_of(paper: Paper, name: str) -> str:
    """The field, where it passes the name on; else the module."""
    stub = HOME / paper.field / "__init__.pyi"
    passed_on = stub.is_file() and re.search(rf"\bas {name}$", stub.read_text(encoding="utf-8"), re.MULTILINE)
    return paper.field if passed_on else paper.module


def _call(definition: Definition, known: Mapping[str, Definition]) -> str:
    if isinstance(definition, ast.FunctionDef):
        return f"result = {definition.name}({_needed(definition)})"
    methods = _methods(definition, known)
    made = f"{definition.name}({_needed(methods.get('__init__')) or _needed_fields(definition)})"
    if "fit" in methods:
        return f"estimate = {made}.fit({_needed(methods['fit'])})"
    called = methods.get("__call__") or methods.get("forward")
    return f"method = {made}" + (f"\nresult = method({_needed(called)})" if called else "")


def _methods(definition: ast.ClassDef, known: Mapping[str, Definition]) -> dict[str, ast.FunctionDef]:
    """By name, inherited ones included as far as their class is the paper's own."""
    found: dict[str, ast.FunctionDef] = {}
    for base in reversed(definition.bases):
        parent = known.get(ast.unparse(base).rpartition(".")[2])
        if isinstance(parent, ast.ClassDef) and parent is not definition:
            found |= _methods(parent, known)
    return found | {node.name: node for node in definition.body if isinstance(node, ast.FunctionDef)}


def _needed(function: ast.FunctionDef | None) -> str:
    """The arguments without defaults: `matrix, step=step`."""
    if function is None:
        return ""
    plain = [argument.arg for argument in function.args.posonlyargs + function.args.args]
    plain = plain[: len(plain) - len(function.args.defaults)]
    named = [
        argument.arg
        for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
        if default is None
    ]
    return ", ".join([*(name for name in plain if name not in ("self", "cls")), *(f"{name}={name}" for name in named)])


def _needed_fields(definition: ast.ClassDef) -> str:
    """Of a dataclass."""
    if not any("dataclass" in ast.unparse(decorator) for decorator in definition.decorator_list):
        return ""
    fields = [node for node in definition.body if isinstance(node, ast.AnnAssign) and node.value is None]
    return ", ".join(ast.unparse(node.target) for node in fields)
