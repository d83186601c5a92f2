"""Downloads: the measurements of a claim as CSV and Parquet, the BibTeX entry of a paper."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from starlette.exceptions import HTTPException
from starlette.responses import Response

from workingpapers.desk.catalogue import Paper
from workingpapers.desk.page.content import Entry, PaperContent
from workingpapers.desk.page.site import Site, site_of

router = APIRouter(include_in_schema=False)

Suffix = Literal["csv", "parquet", "bib"]
KINDS: dict[Suffix, str] = {
    "csv": "text/csv; charset=utf-8; header=present",
    "parquet": "application/vnd.apache.parquet",
    "bib": "application/x-bibtex; charset=utf-8",
}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a text begins that spreadsheet programs would compute

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
}  # fmt: skip

# --------------------------------------------------------------------------------------------------------------------
# What is downloaded


def table(entry: Entry) -> tuple[list[str], list[list[Any]]]:
    """The measurements of an evidence entry: names of the columns, and one row per grid point.

    The axes come first, then mean and standard deviation of every metric (`shd_mean`, `shd_sd`), then `n`, how many
    seeds or rounds stand behind them (`n_`, where `n` is an axis). What could not be measured is None.
    """
    measured = entry["measurements"]
    axes = len(measured["axes"])
    columns = list(measured["axes"])
    for name in [*(f"{metric}_{part}" for metric in measured["metrics"] for part in ("mean", "sd")), "n"]:
        while name in columns:
            name += "_"
        columns.append(name)
    rows = [
        [*row[:axes], *(number for moments in row[axes:-1] for number in moments), row[-1]] for row in measured["rows"]
    ]
    return columns, rows


def as_csv(entry: Entry) -> bytes:
    """The measurements as RFC 4180 has them, in UTF-8: a header, CRLF, nothing for what could not be measured.

    Numbers are written with all the digits of the evidence. A text that a spreadsheet program would take for a
    formula gets an apostrophe in front.
    """
    columns, rows = table(entry)
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerows([_cell(value) for value in row] for row in [columns, *rows])
    return out.getvalue().encode()


def as_parquet(entry: Entry) -> bytes:
    """The measurements as Parquet; its metadata say what was measured, when, and with which versions.

    An axis with values of different types becomes text.

    Raises
    ------
    ImportError : pyarrow is missing; it comes with the extra `page`.
    """
    import pyarrow as pa
    from pyarrow import parquet

    columns, rows = table(entry)
    arrays = [_typed([row[i] for row in rows]) for i in range(len(columns))]
    said = {name: str(entry[name]) for name in ("paper", "claim", "scale", "seed", "recorded", "device")}
    said["versions"] = json.dumps(entry["versions"], sort_keys=True)
    schema = pa.schema(
        [pa.field(name, array.type) for name, array in zip(columns, arrays, strict=True)],
        metadata={f"workingpapers.{name}": text for name, text in said.items()},
    )
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_arrays(arrays, schema=schema), out)
    return out.getvalue()


def bibtex(paper: Paper) -> str:
    """A BibTeX entry of what the catalogue knows; it does not know the authors, and the note says so."""
    year = 2000 + int(paper.arxiv[:2]) if paper.arxiv else None
    fields = {
        "title": f"{{{_latex(paper.title)}}}",  # the second pair of braces keeps the capitals
        "year": year,
        "eprint": paper.arxiv,
        "archivePrefix": paper.arxiv and "arXiv",
        "url": paper.arxiv and f"https://arxiv.org/abs/{paper.arxiv}",
        "note": "The authors are named at the address above",
    }
    lines = [f"  {name:<13} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@misc{{{paper.slug},", *lines, "}", ""])


# --------------------------------------------------------------------------------------------------------------------
# Routes

Here = Annotated[Site, Depends(site_of)]


@router.api_route("/papers/{slug}/{claim}-{scale}.csv", methods=["GET", "HEAD"])
def measurements_csv(slug: str, claim: str, scale: str, site: Here) -> Response:
    return _download(as_csv(_entry(site, slug, claim, scale)), f"{slug}-{claim}-{scale}", "csv")


@router.api_route("/papers/{slug}/{claim}-{scale}.parquet", methods=["GET", "HEAD"])
def measurements_parquet(slug: str, claim: str, scale: str, site: Here) -> Response:
    return _download(as_parquet(_entry(site, slug, claim, scale)), f"{slug}-{claim}-{scale}", "parquet")


@router.api_route("/papers/{slug}.bib", methods=["GET", "HEAD"])
async def paper_bibtex(slug: str, site: Here) -> Response:
    return _download(bibtex(_paper(site, slug).paper).encode(), slug, "bib")


# --------------------------------------------------------------------------------------------------------------------


def _paper(site: Site, slug: str) -> PaperContent:
    found = site.content.papers.get(slug)
    if found is None:
        raise HTTPException(404, "No paper has this name.")
    return found


def _entry(site: Site, slug: str, claim: str, scale: str) -> Entry:
    """The name of a claim has no hyphen, so that `claim-scale` can be read in one way only."""
    for entry in _paper(site, slug).entries:
        if (entry["claim"], entry["scale"]) == (claim, scale):
            return entry
    raise HTTPException(404, "Nothing of this name has been recorded at this scale.")


def _download(content: bytes, name: str, suffix: Suffix) -> Response:
    # the name is made of a slug, a claim and a scale that were found, never of what was asked for
    headers = {"content-disposition": f'attachment; filename="{name}.{suffix}"', "cache-control": "no-cache"}
    return Response(content, media_type=KINDS[suffix], headers=headers)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and value.startswith(FORMULA):
        return f"'{value}"
    return str(value)  # of a float, the shortest digits that give the same number back


def _typed(values: Sequence[Any]) -> Any:
    """An Arrow array of the narrowest type that holds all of these."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int}:
        return pa.array(values, pa.int64())
    if kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
