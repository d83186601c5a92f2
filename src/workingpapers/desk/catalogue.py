"""The catalogue: one row for every paper of the listings, working or not.

A field is one TOML file in `desk/papers`, a paper one table in it:

    [colide]
    title = "CoLiDE: Concomitant Linear DAG Estimation"   # as the listing has it
    module = "causality.colide"        # where method, claims and tests of the paper are found
    arxiv = "2310.02895"
    code = "SAMiatto/colide"           # the authors' repository on GitHub, "" when there is none
    listings = ["Mar 11"]              # the listings it stands in; they carry no year
    names = ["CoLiDE", "to_dag"]       # the public names of its method
    summary = "..."                    # what the method does and when to want it, in one sentence
    note = "..."                       # optional: what a reader of the row should know besides

Whether a paper works is computed from what lies in the tree, never written down.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

FIELDS: dict[str, str] = {
    "alignment": "Preferences and alignment",
    "causality": "Causal structure",
    "clustering": "Clustering",
    "compression": "Pruning and small models",
    "control": "Reinforcement learning and control",
    "dynamics": "Learning dynamics and theory",
    "equations": "Equations and scientific computing",
    "federated": "Federated and distributed learning",
    "generative": "Generative models",
    "inference": "Bayesian and statistical inference",
    "language": "Language models",
    "optimization": "Optimisation",
    "recommendation": "Recommender systems",
    "selection": "Selection and decisions",
    "training": "Training neural networks",
}

Status = Literal["working", "listed"]

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_ARXIV = re.compile(r"\d{2}(0[1-9]|1[0-2])\.\d{4,5}")  # year, month, number of the paper in it
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+")
_DATE = re.compile(r"(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) ([1-9]|[12]\d|3[01])")


class CatalogueError(ValueError):
    """A malformed row; the message names the file, the paper and the key."""


class UnknownPaper(LookupError):
    """No paper has this slug; the message suggests the nearest ones."""


@dataclass(frozen=True)
class Paper:
    """One row of the catalogue.

    Attributes
    ----------
    slug : its short name, `light-sb`.
    title : as the listing has it.
    field : one of `FIELDS`.
    module : `generative.light_sb`; the method is `workingpapers.generative.light_sb`, the claims
        `workingpapers.claims.generative.light_sb`.
    arxiv : identifier without version, `2310.01174`.
    code : the authors' repository, `owner/name` on GitHub, or "".
    listings : the dates of the listings it stands in, as the listings write them: `Mar 11`.
    names : public names of the method, the one to start with first.
    summary : what the method does and when to want it, one sentence.
    note : what a reader should know besides, or "".
    """

    slug: str
    title: str
    field: str
    module: str
    arxiv: str
    code: str
    listings: tuple[str, ...]
    names: tuple[str, ...]
    summary: str
    note: str = ""


def papers() -> dict[str, Paper]:
    """Every paper by slug, field by field in the order of `FIELDS`.

    Raises
    ------
    CatalogueError : a row is malformed.
    """
    return dict(_catalogue())


def paper(slug: str) -> Paper:
    """The paper of this slug.

    Raises
    ------
    UnknownPaper : there is none; the message suggests the nearest slugs.
    """
    found = _catalogue().get(slug)
    if found is None:
        raise UnknownPaper(_unknown(slug))
    return found


def status(paper: Paper) -> Status:
    """`working` when the paper's claims and its recorded evidence both exist."""
    return "working" if claims_path(paper) is not None and evidence_path(paper.slug).is_file() else "listed"


def claims_path(paper: Paper) -> Path | None:
    """The source of the paper's claims (a package's `__init__.py` when it is one), or None; nothing is imported."""
    stem = _claims_directory().joinpath(*paper.module.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def evidence_path(slug: str) -> Path:
    """Where the evidence of a paper is recorded, whether or not it exists yet."""
    return evidence_directory() / f"{slug}.json"


def evidence_directory() -> Path:
    """The directory of `$WORKINGPAPERS_EVIDENCE`; else a checkout's `evidence`; else the one in the installed wheel."""
    chosen = os.environ.get("WORKINGPAPERS_EVIDENCE")
    if chosen:
        return Path(chosen)
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent.parent
    if package.parent.name == "src" and (checkout / "pyproject.toml").is_file():
        return checkout / "evidence"
    return package / "desk" / "evidence"


def read_catalogue(directory: Path) -> dict[str, Paper]:
    """Read and check a catalogue: one TOML file for each of `FIELDS`.

    Raises
    ------
    CatalogueError : a file is missing, not a field's or not TOML, or a row is malformed or stands twice.
    """
    by_field = {file.stem: file for file in directory.glob("*.toml")}
    if strangers := sorted(by_field.keys() - FIELDS.keys()):
        raise CatalogueError(f"{strangers[0]}.toml: no field has this name; the fields are {', '.join(FIELDS)}")
    if missing := [field for field in FIELDS if field not in by_field]:
        raise CatalogueError(f"{missing[0]}.toml: the file of this field is missing")

    catalogue: dict[str, Paper] = {}
    taken: dict[tuple[str, str], str] = {}  # (key, value) that only one paper may have -> its slug
    for field in FIELDS:
        for slug, row in _tables(by_field[field]).items():
            if slug in catalogue:
                other = catalogue[slug].field
                raise CatalogueError(f"{field}.toml: [{slug}] this slug already stands in {other}.toml")
            catalogue[slug] = read = _paper(field, slug, row)
            for key, value in (("title", read.title.casefold()), ("module", read.module), ("arxiv", read.arxiv)):
                if first := taken.get((key, value)):
                    raise CatalogueError(f"{field}.toml: [{slug}] {key}: [{first}] already has {row[key]!r}")
                taken[key, value] = slug
    return catalogue


@cache
def _catalogue() -> dict[str, Paper]:
    return read_catalogue(Path(__file__).with_name("papers"))


@cache
def _claims_directory() -> Path:
    spec = find_spec("workingpapers.claims")
    if spec is None or not spec.submodule_search_locations:
        raise CatalogueError("workingpapers.claims is not installed")
    return Path(spec.submodule_search_locations[0])


def _tables(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as wrong:
        raise CatalogueError(f"{file.name}: not a TOML file: {wrong}") from None


_ROW = {item.name: item for item in fields(Paper) if item.name not in ("slug", "field")}
_LISTS = ("listings", "names")


def _paper(field: str, slug: str, row: Any) -> Paper:
    """Check one row.

    Raises
    ------
    CatalogueError : naming the first key that is wrong.
    """

    def wrong(problem: str, key: str = "") -> CatalogueError:
        return CatalogueError(f"{field}.toml: [{slug}] {key and key + ': '}{problem}")

    if not _SLUG.fullmatch(slug):
        raise wrong("a slug is made of lower-case letters, digits and single hyphens")
    if not isinstance(row, dict):
        raise wrong(f"a paper must be a table, got {row!r}")
    if unknown := sorted(row.keys() - _ROW.keys()):
        raise wrong(f"no such key; the keys are {', '.join(_ROW)}", unknown[0])
    for key, item in _ROW.items():
        if key not in row:
            if item.default is MISSING:
                raise wrong("the key is missing", key)
        elif key in _LISTS:
            if not isinstance(row[key], list) or not all(isinstance(entry, str) for entry in row[key]):
                raise wrong(f"must be a list of texts, got {row[key]!r}", key)
            if not row[key] or len(set(row[key])) < len(row[key]):
                raise wrong(f"must hold at least one entry and none twice, got {row[key]!r}", key)
        elif not isinstance(row[key], str):
            raise wrong(f"must be a text, got {row[key]!r}", key)
        elif row[key] != " ".join(row[key].split()) or not (row[key] or key in ("code", "note")):
            raise wrong(f"must be one line without stray blanks, got {row[key]!r}", key)

    home, _, module = row["module"].partition(".")
    if home != field or not module.isidentifier():
        raise wrong(f"must be {field}.<name of the module>, got {row['module']!r}", "module")
    if not _ARXIV.fullmatch(row["arxiv"]):
        raise wrong(f"must look like 2310.01174, got {row['arxiv']!r}", "arxiv")
    if row["code"] and not _REPOSITORY.fullmatch(row["code"]):
        raise wrong(f"must be owner/name on GitHub, or empty, got {row['code']!r}", "code")
    for date in row["listings"]:
        if not _DATE.fullmatch(date):
            raise wrong(f"a date must look like 'Mar 11', got {date!r}", "listings")
    for name in row["names"]:
        if not name.isidentifier():
            raise wrong(f"must be names that Python can import, got {name!r}", "names")

    lists = {key: tuple(row[key]) for key in _LISTS}
    return Paper(slug=slug, field=field, **(row | lists))


def _unknown(slug: str) -> str:
    from difflib import get_close_matches  # needed only for the message

    slugs = list(_catalogue())
    asked = slug.strip().lower().replace("_", "-").rpartition(".")[2]
    near = [known for known in slugs if len(asked) >= 3 and (asked in known or known in asked)]
    near += [known for known in get_close_matches(asked, slugs, n=3, cutoff=0.5) if known not in near]
    advice = f"did you mean {' or '.join(near[:3])}?" if near else "`workingpapers list` shows all slugs"
    return f"no paper is called {slug!r}; {advice}"
