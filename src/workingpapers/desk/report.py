"""The pages as a static site, and the table of papers in the README.

The site is the live page's templates with relative addresses, so that it can lie under any path of any web host, or be
opened from disk. What needs a server is left out; what a browser can do by itself (search, filters, sorting) it does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import NAMESPACE_URL, uuid5

from workingpapers.desk.catalogue import FIELDS
from workingpapers.desk.expect import Verdict

if TYPE_CHECKING:
    from workingpapers.desk.page.content import Content, PaperContent
    from workingpapers.desk.page.render import Addresses, Renderer

START, END = "<!-- papers: written by `workingpapers report --readme` -->", "<!-- end of papers -->"
SHORT: dict[Verdict, str] = {"holds": "hold", "fails": "fail", "inconclusive": "open", "crashed": "crashed"}

MANIFEST = ".workingpapers-report.json"  # the files that a report wrote; a later one removes those it no longer has
# what a page of the site may load; `frame-ancestors` has no effect in a page and is left to the host
POLICY = "; ".join(
    ["default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:", "font-src 'self'",
     "form-action 'self'", "base-uri 'none'"]
)  # fmt: skip


def write_site(directory: Path, address: str = "") -> list[Path]:
    """Write the listing, a page for each paper, the reference, downloads and assets; returns the files.

    A file that was written by an earlier report and is no longer part of the site is removed; nothing else is.

    Parameters
    ----------
    directory : made when absent.
    address : where the site will be found, https://example.org/papers; Atom feeds need it and are left out without it.

    Raises
    ------
    ValueError : the address is none.
    ImportError : the extra `page` is not installed.
    """
    parts = urlsplit(address)
    if address and (parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment):
        raise ValueError(f"address must look like https://example.org/papers, got {address!r}")
    from workingpapers.desk.page.content import read

    written = []
    for name, content in _files(read(), address.rstrip("/")):
        path = directory / name
        _write(path, content if isinstance(content, bytes) else content.encode())
        written.append(path)
    manifest = directory / MANIFEST
    _remove_old(directory, manifest, {path.relative_to(directory).as_posix() for path in written})
    return written


def update_readme(readme: Path) -> Path:
    """Replace the table between the two marks in a README.

    Raises
    ------
    ValueError : the marks are not there.
    """
    text = readme.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise ValueError(f"{readme} lacks the lines that enclose the table:\n{START}\n{END}")
    before, _, rest = text.partition(START)
    readme.write_text(f"{before}{START}\n{readme_table()}{END}{rest.partition(END)[2]}", encoding="utf-8")
    return readme


def readme_table() -> str:
    """Papers that work, with their verdicts; then how many are listed in each field."""
    from workingpapers.desk.page.content import read
    from workingpapers.desk.page.render import times

    content = read()
    lines = ["| paper | field | claims | speed-up over peers | evidence |", "|---|---|---|---|---|"]
    for found in content.papers.values():
        if found.status == "working":
            paper = found.paper
            age = ", older than the code" if found.stale else ""
            tally = ", ".join(f"{count} {SHORT[verdict]}" for verdict, count in found.tally.items())
            speed = times(found.speed) if found.speed else "–"
            lines.append(
                f"| [{paper.title}](https://arxiv.org/abs/{paper.arxiv}) `{paper.slug}` | {paper.field} "
                f"| {tally} | {speed} | {found.scale}, {found.recorded[:10]}{age} |"
            )
    waiting = {field: sum(found.status == "listed" for found in content.fields[field]) for field in FIELDS}
    listed = ", ".join(f"{field} {count}" for field, count in waiting.items() if count)
    return "\n".join(lines) + f"\n\nListed, not working yet ({sum(waiting.values())}): {listed}.\n"


def static(root: str, *, has_feeds: bool = False, used: set[str] | None = None) -> Addresses:
    """Addresses of the static site; the kinds are those of `render.live`, without what needs a server.

    Parameters
    ----------
    root : the way from the page to the top of the site: "", or "../" for a page one below.
    has_feeds : whether feeds are written; without them they have no address ("").
    used : takes up the names of the assets that were asked for.
    """
    from workingpapers.desk.page.assets import assets

    def url(kind: str, *names: str) -> str:
        match kind, names:
            case "home", ():
                return f"{root}index.html"
            case "paper", (slug,):
                return f"{root}papers/{slug}.html"
            case "measurements", (slug, claim, scale, suffix):
                return f"{root}papers/{slug}/{claim}-{scale}.{suffix}"
            case "bibtex", (slug,):
                return f"{root}papers/{slug}.bib"
            case "reference", ():
                return f"{root}reference/index.html"
            case "reference", (module,):
                return f"{root}reference/{module}.html"
            case "name", (module, name):
                return f"{root}reference/{module}.html#{name}"
            case "asset", (name,):
                if used is not None:
                    used.add(name)
                return f"{root}assets/{name}?v={assets()[name].version}"
            case "feed", (*field,):
                return f"{root}feeds/{field[0] if field else 'all'}.atom" if has_feeds else ""
            case "about", ():
                return f"{root}about.html"
        raise ValueError(f"the static site has no address for {kind} {names}")

    return url


# --------------------------------------------------------------------------------------------------------------------
# What the site consists of


def _files(content: Content, address: str) -> Iterator[tuple[str, str | bytes]]:
    """Name and content of every file; what pages load comes before them."""
    from workingpapers.desk.page.assets import assets
    from workingpapers.desk.page.render import Renderer

    used: set[str] = set()
    top, below = (static(root, has_feeds=bool(address), used=used) for root in ("", "../"))
    pages = list(_pages(content, Renderer(is_live=False), top, below))
    for name in sorted(used):
        yield f"assets/{name}", assets()[name].content
    index = _search_index(content)
    yield "search.json", index
    yield "search-index.js", f"globalThis.searchIndex = {index};\n"
    for found in content.papers.values():
        yield from _downloads(found)
    if address:
        yield from _feeds(content, address)
    yield from pages


def _pages(content: Content, render: Renderer, top: Addresses, below: Addresses) -> Iterator[tuple[str, str]]:
    from workingpapers.desk.page.reference import overview, pages

    def made(template: str, url: Addresses, **shown: Any) -> str:
        return render(template, url=url, policy=POLICY, **shown)

    for slug, found in content.papers.items():
        shown = {"page": found, "content": content, "starred": False, "stars": 0, "runs": ()}
        yield f"papers/{slug}.html", made("paper.html", below, **shown)
    for module, shown in pages():
        yield f"reference/{module}.html", made("reference_module.html", below, **shown)
    yield "reference/index.html", made("reference.html", below, **overview())
    yield "about.html", made("about.html", top, content=content)
    yield "index.html", made("static_index.html", top, **_listing(content))


def _listing(content: Content) -> dict[str, Any]:
    from workingpapers.desk.page.arrange import Filters
    from workingpapers.desk.page.papers import listing

    shown = listing(content, Filters())
    sorts = {name: words for name, words in shown["sorts"].items() if name != "trending"}  # nobody counts stars here
    return {**shown, "sorts": sorts, "starred": frozenset(), "stars": {}, "is_part": False}


def _feeds(content: Content, address: str) -> Iterator[tuple[str, str | bytes]]:
    from workingpapers.desk.feed import atom, recorded

    def url(kind: str, *names: str) -> str:
        return f"/{static('', has_feeds=True)(kind, *names)}"

    items = recorded(content)
    updated = max((item.updated for item in items), default="2000-01-01T00:00:00+00:00")
    for field in ("", *FIELDS):
        members = [item for item in items if field in ("", item.field)]
        feed = atom(
            members, address=address, field=field, identity=uuid5(NAMESPACE_URL, address), updated=updated, url=url
        )
        yield f"feeds/{field or 'all'}.atom", feed


def _downloads(found: PaperContent) -> Iterator[tuple[str, str | bytes]]:
    from workingpapers.desk.page.exports import as_csv, as_parquet, bibtex

    slug = found.paper.slug
    for entry in found.entries:
        name = f"papers/{slug}/{entry['claim']}-{entry['scale']}"
        yield f"{name}.csv", as_csv(entry)
        yield f"{name}.parquet", as_parquet(entry)
    yield f"papers/{slug}.bib", bibtex(found.paper)


def _search_index(content: Content) -> str:
    """What the search of the site looks through and filters by, as JSON; names are short because it is loaded whole."""
    from workingpapers.desk import reference
    from workingpapers.desk.search import COMMON_WORDS, search_claims

    claims = search_claims(found.paper for found in content.papers.values())
    described: dict[str, list[str]] = {}
    for entry in reference.entries():
        described.setdefault(entry.module, []).append(f"{entry.name}: {entry.summary}")
    papers = {
        slug: {
            "title": found.paper.title,
            "names": ", ".join(found.paper.names),
            "summary": found.paper.summary,
            "claims": " ".join([found.paper.note, *claims.get(slug, ())]).strip(),
            "reference": " ".join(described.get(found.paper.module, [])),
            "facts": f"{slug} {FIELDS[found.paper.field]} {found.paper.arxiv} {found.paper.code}",
            "field": found.paper.field,
            "status": found.status,
            "verdict": list(found.tally),
            "listing": list(found.paper.listings),
            "recorded": found.recorded,
        }
        for slug, found in content.papers.items()
    }
    # escaped, so that the text is also a script, and stays one inside an element of HTML
    text = json.dumps({"common": sorted(COMMON_WORDS), "papers": papers}, separators=(",", ":"))
    return text.replace("<", r"\u003c")


# --------------------------------------------------------------------------------------------------------------------
# Files


def _write(path: Path, content: bytes) -> None:
    """Put a complete file in place; one that is already there with this content is left alone."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def _remove_old(directory: Path, manifest: Path, names: set[str]) -> None:
    """Remove what the manifest says an earlier report wrote and this one did not, then write the manifest anew."""
    try:
        earlier = list(json.loads(manifest.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        earlier = []
    for name in earlier:
        if not isinstance(name, str) or name in names or PurePosixPath(name).is_absolute() or ".." in Path(name).parts:
            continue
        path = directory / name
        if path.resolve().is_relative_to(directory.resolve()) and path.is_file():
            path.unlink()
            for parent in path.parents:
                if parent == directory or any(parent.iterdir()):
                    break
                parent.rmdir()
    _write(manifest, json.dumps({"files": sorted(names)}, indent=1).encode() + b"\n")
