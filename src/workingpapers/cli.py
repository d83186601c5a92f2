"""The command line. What a command needs is imported inside it: `list`, `show` and `search` answer at once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workingpapers.desk.catalogue import FIELDS, CatalogueError, Paper, UnknownPaper, claims_path, paper, papers, status
from workingpapers.desk.expect import SEVERITY, worst

if TYPE_CHECKING:
    from workingpapers.desk.check import Outcome
    from workingpapers.desk.claim import Claim
    from workingpapers.desk.search import Hit
    from workingpapers.desk.store import Result

HOLDS, NOT_ALL_HOLD, BAD_USE, CRASHED, INTERRUPTED = 0, 1, 2, 3, 130
MARKS = {"holds": "✓", "fails": "✗", "inconclusive": "?", "crashed": "!"}
EXIT_CODES = "Exit codes: 0 all claims hold, 1 a claim fails or cannot be told, 2 bad use, 3 a measurement crashed."
MAIL_SERVER = (
    "The mail server is that of $WORKINGPAPERS_SMTP_HOST, with _PORT, _USER, _PASSWORD, _SENDER and _SECURITY\n"
    "(starttls, tls or none); without it mails are written as .eml files beside the store."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (UsageError, UnknownPaper, CatalogueError) as mistake:
        print(f"workingpapers: {mistake.args[0]}", file=sys.stderr)
        return BAD_USE
    except KeyboardInterrupt:
        print("workingpapers: interrupted; what was measured is kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has left
        sys.stderr.close()
        return HOLDS


class UsageError(Exception):
    """What was asked for cannot be done; the message says why, in one sentence."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="workingpapers",
        description="The methods of the Daily Papers listings, and what their claims are worth when run.",
        epilog=EXIT_CODES,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any], int], help: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print JSON")
        return added

    listing = command("list", _list, "list the papers", "workingpapers list --field causality")
    listing.add_argument("--field", choices=FIELDS, help="only this field")
    listing.add_argument("--status", choices=["working", "listed"], help="only papers that work, or do not work yet")

    search = command(
        "search", _search, "search titles, summaries, API names and claims", "workingpapers search implicit"
    )
    search.add_argument("words", nargs="+", metavar="WORD")
    search.add_argument("--limit", type=_positive, default=10, metavar="N", help="at most N papers (default 10)")

    show = command("show", _show, "show one paper with its claims and evidence", "workingpapers show colide")
    show.add_argument("slug")

    for name, run, help in [
        ("check", _check, "measure a paper's claims and judge them"),
        ("bench", _bench, "measure a paper's cost against its peers, with nothing else running"),
    ]:
        added = command(name, run, help, f"workingpapers {name} colide --scale laptop")
        added.add_argument("slugs", nargs="*", metavar="SLUG")
        added.add_argument("--all", action="store_true", help="every paper that works")
        added.add_argument("--scale", choices=["smoke", "laptop", "paper"], default="smoke", help="(default smoke)")
        added.add_argument("--seed", type=_natural, default=0, metavar="N", help="the first of the consecutive seeds")
        added.add_argument("--claim", action="append", metavar="NAME", help="only this claim (may be repeated)")
        added.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="for one cell")
        added.add_argument("--store", type=Path, metavar="PATH", help="where results are kept")
        added.add_argument("--fresh", action="store_true", help="measure again what is in the store")
        added.add_argument("--record", action="store_true", help="write the outcome to evidence/SLUG.json")
        if name == "check":
            jobs = "processes; 0: in this one (default: one per core)"
            added.add_argument("--on", metavar="ray[://ADDRESS]", help="run the cells on a Ray cluster")
        else:
            jobs = "0: in this process, instead of one with all cores"
            added.set_defaults(on=None)
        added.add_argument("--jobs", type=_natural, metavar="N", help=jobs)

    imported = command("import", _import, "read a saved Daily Papers page", "workingpapers import daily-papers.html")
    imported.add_argument("page", type=Path, metavar="PAGE", help="text, HTML or JSON")
    imported.add_argument("--store", type=Path, metavar="PATH", help="where new papers are kept")

    serving = command("serve", _serve, "serve the listing as a web page", "workingpapers serve --port 8600")
    serving.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    serving.add_argument("--port", type=_natural, default=8600, metavar="N", help="(default 8600)")
    serving.add_argument("--address", default="", metavar="URL",
                         help="how readers reach the page, for feeds, mails and the Host header")  # fmt: skip
    serving.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="another Host to answer to")
    serving.add_argument("--store", type=Path, metavar="PATH", help="where results are kept")
    serving.add_argument("--jobs", type=_positive, metavar="N", help="processes of a check (default: one per core)")

    digest = command("digest", _digest, "send the digests that are due", "workingpapers digest --dry-run")
    digest.add_argument("--store", type=Path, metavar="PATH", help="where results are kept")
    digest.add_argument("--address", default="", metavar="URL", help="how readers reach the page, as for serve")
    digest.add_argument("--dry-run", action="store_true", help="say who would get what, send nothing")
    serving.epilog = f"{serving.epilog}\n\n{MAIL_SERVER}"
    digest.epilog = f"{digest.epilog}\n\n{MAIL_SERVER}"

    report = command("report", _report, "write the listing as static pages", "workingpapers report site/")
    report.add_argument("directory", type=Path, nargs="?", metavar="DIR")
    report.add_argument("--address", default="", metavar="URL",
                        help="where the pages will be found; without it there are no Atom feeds")  # fmt: skip
    report.add_argument("--readme", type=Path, nargs="?", const=Path("README.md"), metavar="FILE",
                        help="bring the table of papers in FILE up to date (default README.md)")  # fmt: skip
    return parser


# --------------------------------------------------------------------------------------------------------------------
# Commands that read


def _list(options: argparse.Namespace) -> int:
    from workingpapers.desk import evidence

    chosen = [
        found
        for found in papers().values()
        if options.field in (None, found.field) and options.status in (None, status(found))
    ]
    if options.json:
        return _print_json([_row(found) for found in chosen])
    for field in FIELDS:
        members = [found for found in chosen if found.field == field]
        if members:
            print(f"\n{FIELDS[field]}")
        for found in members:
            verdict = evidence.overall(evidence.load(found.slug), "laptop") if status(found) == "working" else None
            mark = MARKS[verdict] if verdict is not None else "·"
            print(f"  {mark} {found.slug:26} {_cut(found.title, 88)}")
    working = sum(status(found) == "working" for found in chosen)
    print(f"\n{len(chosen)} papers, {working} working.  ✓ all claims hold  ? cannot be told  ✗ a claim fails  · listed")
    return HOLDS


def _row(found: Paper) -> dict[str, Any]:
    from workingpapers.desk import evidence

    return {
        "slug": found.slug,
        "title": found.title,
        "field": found.field,
        "module": found.module,
        "status": status(found),
        "summary": found.summary,
        "arxiv": found.arxiv,
        "code": found.code,
        "listings": list(found.listings),
        "names": list(found.names),
        "verdicts": evidence.verdicts(evidence.load(found.slug)) if status(found) == "working" else {},
    }


def _search(options: argparse.Namespace) -> int:
    import sqlite3

    from workingpapers.desk.places import store_path, titles_path
    from workingpapers.desk.search import emphasise, search, search_claims
    from workingpapers.desk.titles import Titles

    words, index = " ".join(options.words), titles_path(store_path())
    titles = None
    with suppress(OSError, sqlite3.OperationalError):  # then without the imported titles
        titles = Titles(index) if index.exists() else None
    hits = search(words, papers(), claims=search_claims(papers().values()), titles=titles, limit=options.limit)
    if options.json:
        return _print_json([_found(hit) for hit in hits])
    strong, plain = ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    for hit in hits:
        found = paper(hit.slug) if hit.slug else None
        print(f"{found.slug}  ({found.field}, {status(found)})" if found else f"-  (imported, {hit.date})")
        print(f"    {emphasise(hit.title, hit.title_spans, strong, plain)}")
        print(f"    {emphasise(hit.snippet, hit.snippet_spans, strong, plain)}")
    if not hits:
        print(f"nothing found for {words!r}", file=sys.stderr)
    return HOLDS


def _found(hit: Hit) -> dict[str, Any]:
    about = _row(paper(hit.slug)) if hit.slug else {"slug": None, "title": hit.title, "listings": [hit.date]}
    return {**about, "score": hit.score, "snippet": hit.snippet}


def _show(options: argparse.Namespace) -> int:
    from workingpapers.desk import evidence

    found = paper(options.slug)
    recorded = evidence.load(found.slug)
    stale = {id(e): evidence.is_stale(found, e) for entries in recorded["claims"].values() for e in entries}
    if options.json:
        entries = [{**entry, "stale": stale[id(entry)]} for entries in recorded["claims"].values() for entry in entries]
        return _print_json({**_row(found), "evidence": entries})
    print(f"{found.title}\n{found.slug} · {FIELDS[found.field]} · {status(found)} · listed {', '.join(found.listings)}")
    print(f"\n{found.summary}\n")
    if found.arxiv:
        print(f"paper  https://arxiv.org/abs/{found.arxiv}")
    if found.code:
        print(f"code   https://github.com/{found.code}")
    if status(found) == "working":
        print(f"use    from workingpapers.{found.module} import {', '.join(found.names)}")
    for scale, entries in recorded["claims"].items():
        for entry in entries:
            age = " (older than the code)" if stale[id(entry)] else ""
            when = f"{entry['recorded'][:10]}{age}"
            print(f"\n{MARKS[entry['verdict']]} {entry['claim']} · {scale} · {entry['verdict']} · {when}")
            print(f"  {entry['says']}")
            for judgement in entry["expectations"]:
                print(f"    {MARKS[judgement['verdict']]} {_judgement(judgement)}")
    return HOLDS


def _judgement(judgement: dict[str, Any]) -> str:
    measured = "" if judgement["measured"] is None else f": {judgement['measured']:.4g}"
    interval = judgement["interval"]
    between = f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval and None not in interval else ""
    note = f" ({judgement['note']})" if judgement["note"] else ""
    return f"{judgement['expectation']}{measured}{between}{note}"


# --------------------------------------------------------------------------------------------------------------------
# Commands that measure


def _check(options: argparse.Namespace) -> int:
    return _measure(options, kind="claim")


def _bench(options: argparse.Namespace) -> int:
    return _measure(options, kind="benchmark")


def _measure(options: argparse.Namespace, kind: str) -> int:
    chosen = _chosen_papers(options)
    from workingpapers.desk import evidence
    from workingpapers.desk.check import check
    from workingpapers.desk.run import Pool
    from workingpapers.desk.store import Store, StoreError

    outcomes: list[Outcome] = []
    try:
        pool = Pool(jobs=options.jobs, timeout=options.timeout, on=options.on)
    except (ValueError, ImportError, ConnectionError) as refused:
        raise UsageError(str(refused)) from refused
    try:
        with Store(options.store) as store, pool:
            for found in chosen:
                measured: list[Outcome] = []
                for claim in _chosen_claims(found, kind, options.claim):
                    with _progress(claim, options) as advance:
                        outcome = check(
                            claim, scale=options.scale, seed=options.seed, store=store, pool=pool,
                            fresh=options.fresh, progress=advance,
                        )  # fmt: skip
                    if outcome is not None:
                        measured.append(outcome)
                        if not options.json:
                            _print_outcome(outcome)
                if options.record and measured:
                    print(f"recorded in {evidence.record(found, measured)}", file=sys.stderr)
                outcomes += measured
    except (StoreError, ImportError) as trouble:
        raise UsageError(str(trouble)) from trouble
    if options.json:
        _print_json([outcome.as_json() for outcome in outcomes])
    elif len(outcomes) > 1:
        _print_table(outcomes)
    elif not outcomes:
        print(f"nothing to measure at scale {options.scale}", file=sys.stderr)
    severity = SEVERITY[worst([outcome.verdict for outcome in outcomes])] if outcomes else 0
    return {0: HOLDS, 1: NOT_ALL_HOLD, 2: NOT_ALL_HOLD, 3: CRASHED}[severity]


def _chosen_papers(options: argparse.Namespace) -> list[Paper]:
    if options.all == bool(options.slugs):
        raise UsageError("name the papers to measure, or give --all")
    if options.all:
        return [found for found in papers().values() if status(found) == "working"]
    chosen = [paper(slug) for slug in dict.fromkeys(options.slugs)]
    for found in chosen:
        if claims_path(found) is None:
            raise UsageError(f"{found.slug} is listed but does not work yet: it has no claims to measure")
    return chosen


def _chosen_claims(found: Paper, kind: str, names: list[str] | None) -> list[Claim]:
    from workingpapers.desk.source import load_claims

    claims = [claim for claim in load_claims(found.module) if claim.kind == kind]
    unknown = set(names or ()) - {claim.name for claim in claims}
    if unknown:
        known = ", ".join(claim.name for claim in claims)
        raise UsageError(f"{found.slug} has no {kind} {', '.join(sorted(unknown))}; it has {known}")
    return [claim for claim in claims if names is None or claim.name in names]


@contextmanager
def _progress(claim: Claim, options: argparse.Namespace) -> Iterator[Callable[[Result], None]]:
    """A live bar on a terminal; plain lines, one per tenth of the cells, elsewhere."""
    total = len(claim.cells(options.scale, options.seed))
    name, done = f"{claim.paper} {claim.name}", 0
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(name, total=total)
            yield lambda result: bars.advance(task)
        return

    def advance(result: Result) -> None:
        nonlocal done
        done += 1
        if done == total or done * 10 // total > (done - 1) * 10 // total:
            print(f"{name}: {done}/{total} cells", file=sys.stderr, flush=True)

    yield advance


def _print_outcome(outcome: Outcome) -> None:
    claim = outcome.claim
    spent = f"({outcome.scale}, {outcome.seconds:.1f} s)"
    print(f"\n{MARKS[outcome.verdict]} {outcome.verdict.upper():12} {claim.paper} · {claim.name} {spent}")
    print(f"  {claim.says}")
    if claim.published:
        print(f"  published: {claim.published}")
    for judgement in outcome.as_json()["expectations"]:
        print(f"    {MARKS[judgement['verdict']]} {_judgement(judgement)}")
    for result in outcome.crashed[:3]:
        print(f"    ! {dict(result.values)}\n{_indented(result.error)}")
    if len(outcome.crashed) > 3:
        print(f"    ! and {len(outcome.crashed) - 3} more cells crashed")


def _print_table(outcomes: Sequence[Outcome]) -> None:
    print(f"\n{'paper':24} {'claim':30} {'verdict':13} {'cells':>6} {'seconds':>8}")
    for outcome in outcomes:
        cells = outcome.as_json()["cells"]
        print(
            f"{outcome.claim.paper:24} {outcome.claim.name:30} {MARKS[outcome.verdict]} {outcome.verdict:11} "
            f"{cells:6d} {outcome.seconds:8.1f}"
        )


# --------------------------------------------------------------------------------------------------------------------
# Commands that import and write


def _import(options: argparse.Namespace) -> int:
    from workingpapers.desk.listing import ListingError, import_listing, match, parse
    from workingpapers.desk.places import titles_path
    from workingpapers.desk.store import Store, StoreError
    from workingpapers.desk.titles import Titles

    try:
        listing = parse(options.page.read_bytes(), options.page.name)
        matches = match(listing, papers())
        with Store(options.store) as store:
            import_listing(store.connection, listing, matches)
            with Titles(titles_path(store.path)) as titles:
                titles.sync(store.connection)  # so that search finds them
    except OSError as trouble:
        raise UsageError(f"cannot read {options.page}: {trouble.strerror}") from trouble
    except (ListingError, StoreError) as trouble:
        raise UsageError(str(trouble)) from trouble
    new = [found for found in matches if found.paper is None]
    if options.json:
        return _print_json(
            {
                "date": listing.date,
                "papers": [
                    {
                        "title": found.entry.title,
                        "slug": None if found.paper is None else found.paper.slug,
                        "status": None if found.paper is None else status(found.paper),
                        "nearest": [{"slug": slug, "score": round(score, 3)} for slug, score in found.nearest],
                    }
                    for found in matches
                ],
            }
        )
    for found in matches:
        if found.paper is not None:
            print(f"  {status(found.paper):8} {found.paper.slug:26} {_cut(found.entry.title, 80)}")
        else:
            print(f"  new      {_cut(found.entry.title, 107)}")
            for slug, score in found.nearest:
                print(f"             near {slug} ({score:.2f}): {_cut(paper(slug).title, 80)}")
    print(f"{listing.date}: {len(matches)} papers, {len(matches) - len(new)} in the catalogue, {len(new)} new")
    return HOLDS


def _report(options: argparse.Namespace) -> int:
    from workingpapers.desk import report

    if options.directory is None and options.readme is None:
        raise UsageError("name a directory for the pages, or give --readme")
    written: list[Path] = []
    try:
        if options.directory is not None:
            written += report.write_site(options.directory, options.address)
        if options.readme is not None:
            written.append(report.update_readme(options.readme))
    except ModuleNotFoundError as missing:
        raise UsageError(f"the pages need {missing.name}: pip install 'workingpapers[page]'") from missing
    except (OSError, ValueError, ImportError) as trouble:
        raise UsageError(str(trouble)) from trouble
    if options.json:
        return _print_json([str(path) for path in written])
    if options.directory is not None:
        print(f"{len(written)} files; open {(options.directory / 'index.html').resolve().as_uri()}")
    return HOLDS


# --------------------------------------------------------------------------------------------------------------------
# The page


def _serve(options: argparse.Namespace) -> int:
    try:
        from workingpapers.desk.mail import smtp_from_environment
        from workingpapers.desk.page.serve import serve
        from workingpapers.desk.page.settings import Settings
        from workingpapers.desk.store import store_path

        settings = Settings(
            store=options.store or store_path(),
            host=options.host,
            port=options.port,
            address=options.address,
            hosts=tuple(options.allow_host),
            jobs=options.jobs,
            meaning=True,
            smtp=smtp_from_environment(),
        )
        serve(settings)
    except ModuleNotFoundError as missing:
        raise UsageError(f"the page needs {missing.name}: pip install 'workingpapers[page]'") from missing
    except (OSError, ValueError, ImportError) as trouble:
        raise UsageError(str(trouble)) from trouble
    return HOLDS


def _digest(options: argparse.Namespace) -> int:
    import sqlite3
    from datetime import UTC, datetime

    try:
        from workingpapers.desk.digest import Postman
        from workingpapers.desk.feed import News
        from workingpapers.desk.mail import smtp_from_environment, transport
        from workingpapers.desk.page.content import read
        from workingpapers.desk.page.settings import Settings
        from workingpapers.desk.page.state import State
        from workingpapers.desk.store import store_path
        from workingpapers.desk.subscribers import Subscribers

        settings = Settings(options.store or store_path(), address=options.address, smtp=smtp_from_environment())
        state = State(settings.state)
    except ModuleNotFoundError as missing:
        raise UsageError(f"the page needs {missing.name}: pip install 'workingpapers[page]'") from missing
    except (OSError, ValueError, sqlite3.Error) as trouble:
        raise UsageError(str(trouble)) from trouble
    try:
        now, content = datetime.now(UTC), read()
        news = News(state, settings.store)
        postman = Postman(settings, state, news, Subscribers(state), transport(settings))
        if options.dry_run:
            news.refresh(content, now)
            reports = [("digest", to.address, len(items), "due", "") for to, items in postman.due(now)]
        else:
            reports = [astuple(report) for report in postman.round(content, now)]
    finally:
        state.close()
    names = ("kind", "address", "items", "status", "told")
    if options.json:
        _print_json([dict(zip(names, report, strict=True)) for report in reports])
    else:
        for kind, to, items, outcome, told in reports:
            print(f"{outcome:9} {kind:12} {to}  ({items} items)  {told}".rstrip())
        print(f"{len(reports)} mails", file=sys.stderr)
    return HOLDS if all(report[3] in ("sent", "due") for report in reports) else NOT_ALL_HOLD


# --------------------------------------------------------------------------------------------------------------------


def _print_json(value: Any) -> int:
    print(json.dumps(value, indent=1, ensure_ascii=False))
    return HOLDS


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def _indented(text: str) -> str:
    return "\n".join(f"      {line}" for line in text.strip().splitlines()[-12:])


def _natural(text: str) -> int:
    return _bounded(int(text), 0)


def _positive(text: str) -> int:
    return _bounded(int(text), 1)


def _bounded(number: int, lowest: int) -> int:
    if number < lowest:
        raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {number}")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return number
