"""The reference: an overview by field, and a page for the names of each module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi import Path as InPath
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse

from workingpapers.desk import reference
from workingpapers.desk.catalogue import FIELDS, papers
from workingpapers.desk.page.site import Site, site_of
from workingpapers.desk.reference import known

__all__ = ["api", "known", "overview", "pages", "router"]

router = APIRouter(include_in_schema=False)
api = APIRouter(prefix="/api", tags=["reference"])

READ = ("GET", "HEAD")
Here = Annotated[Site, Depends(site_of)]
Module = Annotated[str, InPath(max_length=80, description="as the catalogue has it: causality.colide")]


class ArgumentModel(BaseModel):
    """A parameter of a call."""

    name: str
    annotation: str = Field(description="as written")
    default: str = Field(description="as written, empty where it must be given")
    type: str = Field(description="for people: float Tensor, n × d")


class NameModel(BaseModel):
    """A public name."""

    module: str
    name: str
    kind: str
    signature: str
    summary: str
    text: str = Field(description="its docstring")
    home: str = Field(description="where it is defined")
    arguments: list[ArgumentModel]


class ModuleModel(BaseModel):
    """A module and its public names, methods included."""

    module: str
    title: str
    paper: str = Field(description="slug, empty for what several papers share")
    text: str = Field(description="its docstring")
    names: list[NameModel]


class ModuleRow(BaseModel):
    """A module with a page in the reference."""

    module: str
    title: str
    paper: str
    names: list[str]


@router.api_route("/reference", methods=list(READ))
async def show_overview(request: Request, site: Here) -> HTMLResponse:
    """All modules and what is in them."""
    return await site.page(request, "reference", lambda: site.render("reference.html", **overview()))


@router.api_route("/reference/{module}", methods=list(READ))
async def show_module(request: Request, site: Here, module: Module) -> HTMLResponse:
    """One module."""
    found = _page(module)
    return await site.page(
        request, ("reference", module), lambda: site.render("reference_module.html", **_context(found))
    )


@api.get("/reference")
def list_modules() -> list[ModuleRow]:
    """The modules of the reference with their public names."""
    return [
        ModuleRow(module=page.module, title=page.title, paper=_slug(page), names=[entry.name for entry in page.entries])
        for page in reference.pages()
    ]


@api.get("/reference/{module}", responses={404: {"description": "no such module"}})
def describe_module(module: Module) -> ModuleModel:
    """Signatures and docstrings of one module."""
    page = _page(module)
    text = "\n\n".join(each.text for each in page.overview)
    names = [_name(each) for entry in page.entries for each in entry.walk()]
    return ModuleModel(module=module, title=page.title, paper=_slug(page), text=text, names=names)


def overview() -> dict[str, Any]:
    """What `reference.html` shows."""
    groups: dict[str, list[reference.Page]] = {}
    for page in reference.pages():
        home = page.module.partition(".")[0]
        groups.setdefault(FIELDS.get(home) or reference.SHARED[home], []).append(page)
    here = reference.modules()
    return {"groups": list(groups.items()), "waiting": sum(row.module not in here for row in papers().values())}


def pages() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each module with what `reference_module.html` shows of it."""
    for page in reference.pages():
        yield page.module, _context(page)


def _context(page: reference.Page) -> dict[str, Any]:
    return {"page": page, "field": page.module.partition(".")[0]}


def _page(module: str) -> reference.Page:
    found = reference.page(module)
    if found is None:
        raise HTTPException(404, "The reference has no such module.")
    return found


def _slug(page: reference.Page) -> str:
    return page.paper.slug if page.paper is not None else ""


def _name(entry: reference.Entry) -> NameModel:
    arguments = [
        ArgumentModel(
            name=each.name,
            annotation=each.annotation,
            default=each.default,
            type=" or ".join(f"{words}, {shape}" if shape else words for words, shape in each.type),
        )
        for each in entry.arguments or ()
    ]
    return NameModel(
        module=entry.module,
        name=entry.name,
        kind=entry.kind,
        signature=entry.signature,
        summary=entry.summary,
        text=entry.text,
        home=entry.home,
        arguments=arguments,
    )
