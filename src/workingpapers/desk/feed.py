"""What is new, kept in the order in which it was seen, and told as Atom feeds (RFC 4287).

An item is news of one paper: it works now, new evidence was recorded, or its title is new here. The ledger gives every
item a number that only grows, so that "everything after the last digest" is one comparison. Listings carry no year;
a title is therefore as old as its import, or as the moment at which the ledger first saw it in the catalogue.
"""

from __future__ import annotations

import json
import re
import sqlite3
import uuid
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from workingpapers.desk.catalogue import FIELDS
from workingpapers.desk.listing import title_key
from workingpapers.desk.page.content import Content, PaperContent
from workingpapers.desk.page.render import Addresses, live, times
from workingpapers.desk.page.state import State

Kind = Literal["working", "evidence", "listed", "imported"]

ATOM = "http://www.w3.org/2005/Atom"
ENTRIES = 100  # of a feed
ABSTRACT = 400  # characters kept of an imported abstract
BATCH = 1_000  # imported titles taken over at once, so that nobody waits long for the state

TABLES = """
    CREATE TABLE IF NOT EXISTS news (
        number INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given twice
        id TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL,
        field TEXT NOT NULL,
        slug TEXT NOT NULL,
        title TEXT NOT NULL,
        told TEXT NOT NULL,
        summary TEXT NOT NULL,
        arxiv TEXT NOT NULL,
        updated TEXT NOT NULL,
        seen TEXT NOT NULL,
        gone INTEGER NOT NULL DEFAULT 0  -- an imported title that was taken out of the store again
    );
    CREATE INDEX IF NOT EXISTS news_of_field ON news (field, number);
    CREATE INDEX IF NOT EXISTS news_of_paper ON news (slug, kind);
    CREATE TABLE IF NOT EXISTS news_marks (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

# what XML 1.0 cannot hold, and halves of surrogate pairs
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_SPACE = uuid.UUID("5d0b1b0a-6c1e-4f43-9d8e-0c8d6f6a2b71")  # of the items' identifiers


@dataclass(frozen=True)
class Item:
    """News of one paper.

    Attributes
    ----------
    id : equal for the same news, on every machine.
    kind : "working" with its first evidence, "evidence" with every later one, "listed" when the catalogue has only its
        title, "imported" when even that is missing.
    field : of the paper; of an imported title that of its nearest paper, "" when there is none.
    slug : of the paper; of an imported title that of its nearest paper, "" when there is none.
    told : what is new, one sentence.
    summary : what the paper does.
    arxiv : identifier, "" when it is not known.
    updated : when it happened, ISO 8601 in UTC.
    seen : when the ledger took it up.
    """

    id: str
    kind: Kind
    field: str
    slug: str
    title: str
    told: str
    summary: str
    arxiv: str
    updated: str
    seen: str

    @property
    def urn(self) -> str:
        return uuid.uuid5(_SPACE, self.id).urn

    def link(self, address: str, url: Addresses = live) -> str:
        """Where to read on: the paper's page; for a title without one arXiv, else the listing."""
        if self.kind != "imported":
            return address + url("paper", self.slug)
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else address + url("home")


COLUMNS = ", ".join(column.name for column in fields(Item))


class News:
    """The ledger of what is new.

    Parameters
    ----------
    state : where it is kept.
    store : whose imported titles are news; it need not exist.
    """

    def __init__(self, state: State, store: Path) -> None:
        self._state = state
        self._store = store
        self._version = self._imports = ""
        state.tables(TABLES)

    def refresh(self, content: Content, now: datetime) -> bool:
        """Take up what the ledger has not seen yet; whether there was anything."""
        before = self.last
        stamp = now.astimezone(UTC).isoformat(timespec="seconds")
        if content.version != self._version:
            self._add(self._of_catalogue(content, stamp))
            self._version = content.version
        if self._store.is_file():
            # nothing was ever imported, or the store is busy: the next time
            with suppress(sqlite3.OperationalError), closing(_opened(self._store)) as store:
                self._read_imports(store, content, stamp)
        return self.last > before

    @property
    def last(self) -> int:
        """The number of the youngest item, 0 when there is none."""
        return int(self._state.one("SELECT COALESCE(MAX(number), 0) FROM news")[0])

    def began(self, now: datetime) -> str:
        """Since when there is a ledger, ISO 8601: the age of a feed that has no items yet."""
        stamp = now.astimezone(UTC).isoformat(timespec="seconds")
        self._state.write("INSERT OR IGNORE INTO news_marks VALUES ('began', ?)", (stamp,))
        return str(self._state.one("SELECT value FROM news_marks WHERE name = 'began'")["value"])

    def youngest(self, field: str = "", limit: int = ENTRIES) -> list[Item]:
        """The last items of a field or of all, as they were seen, youngest first."""
        where, values = ("WHERE NOT gone AND field = ?", [field]) if field else ("WHERE NOT gone", [])
        return self._select(f"{where} ORDER BY number DESC LIMIT ?", [*values, limit])

    def between(self, after: int, upto: int, wanted: Collection[str]) -> list[Item]:
        """The items with `after` < number <= `upto`, oldest first.

        Parameters
        ----------
        wanted : fields; none for all.
        """
        among = f"AND field IN ({', '.join('?' * len(wanted))})" if wanted else ""
        return self._select(
            f"WHERE number > ? AND number <= ? AND NOT gone {among} ORDER BY number", [after, upto, *sorted(wanted)]
        )

    def _select(self, rest: str, values: Sequence[object]) -> list[Item]:
        return [Item(*row) for row in self._state.all(f"SELECT {COLUMNS} FROM news {rest}", values)]

    def _add(self, items: Iterable[Item], read: str | None = None) -> None:
        marks = ", ".join("?" * len(fields(Item)))
        rows = [tuple(vars(item).values()) for item in items]
        with self._state.transaction() as connection:
            connection.executemany(f"INSERT OR IGNORE INTO news ({COLUMNS}) VALUES ({marks})", rows)
            if read is not None:
                connection.execute("INSERT OR REPLACE INTO news_marks VALUES ('imported', ?)", (read,))

    def _of_catalogue(self, content: Content, stamp: str) -> list[Item]:
        worked = {row["slug"] for row in self._state.all("SELECT DISTINCT slug FROM news WHERE kind = 'working'")}
        found = (_of_paper(paper, stamp, has_worked=slug in worked) for slug, paper in content.papers.items())
        return [item for item in found if item is not None]

    def _read_imports(self, store: sqlite3.Connection, content: Content, stamp: str) -> None:
        """Take up the rows after the last one that was read, and hide what has been removed."""
        row = self._state.one("SELECT value FROM news_marks WHERE name = 'imported'")
        read, key = json.loads(row["value"]) if row else (0, "")
        last = store.execute("SELECT key FROM listed WHERE rowid = ?", (read,)).fetchone()
        if last is None or last["key"] != key:  # it was removed, and its number may be another's now
            read = 0
        while rows := store.execute(
            "SELECT rowid AS number, * FROM listed WHERE rowid > ? ORDER BY rowid LIMIT ?", (read, BATCH)
        ).fetchall():
            read = rows[-1]["number"]
            mark = json.dumps([read, rows[-1]["key"]])
            self._add((_of_import(row, content, stamp) for row in rows), read=mark)
        version = str([tuple(row) for row in store.execute("SELECT * FROM listed_versions ORDER BY date")])
        if version != self._imports:
            self._hide_removed({f"title/{row['key']}" for row in store.execute("SELECT key FROM listed")})
            self._imports = version

    def _hide_removed(self, there: set[str]) -> None:
        ours = self._state.all("SELECT id, gone FROM news WHERE kind = 'imported'")
        changes = [(row["id"] not in there, row["id"]) for row in ours if (row["id"] not in there) != bool(row["gone"])]
        if changes:
            with self._state.transaction() as connection:
                connection.executemany("UPDATE news SET gone = ? WHERE id = ?", changes)


def atom(
    items: Sequence[Item], *, address: str, field: str, identity: uuid.UUID, updated: str, url: Addresses = live
) -> bytes:
    """An Atom feed.

    Parameters
    ----------
    address : of the page, without a slash at the end.
    field : whose feed it is, "" for all.
    identity : of the page; it stays when the page moves to another address.
    updated : of the feed when it has no items, ISO 8601.
    url : where its pages are below `address`.
    """
    root = ElementTree.Element("feed", xmlns=ATOM)

    def add(parent: ElementTree.Element, name: str, text: str = "", **attributes: str) -> ElementTree.Element:
        made = ElementTree.SubElement(parent, name, attributes)
        made.text = clean(text) or None
        return made

    label = FIELDS[field] if field else "all fields"
    add(root, "id", uuid.uuid5(identity, f"feed/{field}").urn)
    add(root, "title", f"Working Papers: {label}")
    add(root, "subtitle", "Papers that work now, evidence that was recorded, and titles that are new.")
    add(root, "updated", max((item.seen for item in items), default=updated))
    add(root, "link", rel="self", type="application/atom+xml", href=address + (url("feed", field or "all")))
    add(root, "link", rel="alternate", type="text/html", href=address + url("home"))
    add(add(root, "author"), "name", "Working Papers")
    for item in sorted(items, key=lambda item: item.updated, reverse=True):
        entry = add(root, "entry")
        add(entry, "id", item.urn)
        add(entry, "title", item.title, type="text")
        add(entry, "updated", item.updated)
        add(entry, "published", item.updated)
        add(entry, "link", rel="alternate", type="text/html", href=item.link(address, url))
        if item.field:
            add(entry, "category", term=item.field, label=FIELDS.get(item.field, item.field))
        add(entry, "summary", item.told, type="text")
        # escaped twice: once as text in HTML here, once as HTML in XML by the writer
        paragraphs = "".join(f"<p>{escape(text)}</p>" for text in (item.told, item.summary) if text)
        add(entry, "content", paragraphs, type="html")
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def recorded(content: Content) -> list[Item]:
    """What can be told without a ledger: the youngest evidence of every paper that works."""
    found = [_of_paper(paper, "", has_worked=True) for paper in content.papers.values() if paper.recorded]
    return [replace(item, seen=item.updated) for item in found if item is not None]


def clean(text: str) -> str:
    """One line without characters that neither XML nor a mail may hold."""
    return " ".join(_ILLEGAL.sub("", text).split())


def _opened(store: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{store.absolute().as_uri()}?mode=ro", uri=True, timeout=5)
    connection.row_factory = sqlite3.Row
    return connection


def _of_paper(found: PaperContent, stamp: str, *, has_worked: bool) -> Item | None:
    paper = found.paper
    if found.status == "working" and found.recorded:
        recorded = datetime.fromisoformat(found.recorded).astimezone(UTC).isoformat(timespec="seconds")
        kind: Kind = "evidence" if has_worked else "working"
        news = "New evidence" if has_worked else "Works now"
        return Item(
            f"evidence/{paper.slug}/{recorded}", kind, paper.field, paper.slug, clean(paper.title),
            f"{news}: {_outcome(found)}.", clean(paper.summary), paper.arxiv, recorded, stamp,
        )  # fmt: skip
    if has_worked:  # its evidence was taken away, which is no news
        return None
    told = f"Listed {' and '.join(paper.listings)}; no method here yet."
    return Item(
        f"title/{title_key(paper.title)}", "listed", paper.field, paper.slug, clean(paper.title),
        told, clean(paper.summary), paper.arxiv, stamp, stamp,
    )  # fmt: skip


def _of_import(row: sqlite3.Row, content: Content, stamp: str) -> Item:
    near = next((slug for slug, _ in json.loads(row["nearest"]) if slug in content.papers), "")
    nearest = content.papers[near].paper if near else None
    told = f"New title in the listing of {row['date']}" + (f"; nearest here: {nearest.title}." if nearest else ".")
    abstract = clean(row["abstract"])
    cut = abstract if len(abstract) <= ABSTRACT else abstract[: ABSTRACT - 1].rstrip() + "…"
    return Item(
        f"title/{row['key']}", "imported", nearest.field if nearest else "", near,
        clean(row["title"]) or "(no title)", clean(told), cut, row["arxiv"], row["imported_at"], stamp,
    )  # fmt: skip


def _outcome(found: PaperContent) -> str:
    """`at laptop scale 2 claims hold, 1 fails; 1.2× to 3× the speed of the best peer`."""
    verbs = {
        "holds": ("holds", "hold"),
        "fails": ("fails", "fail"),
        "inconclusive": ("cannot be told", "cannot be told"),
        "crashed": ("crashed", "crashed"),
    }
    parts = [f"{count} {verbs[verdict][count > 1]}" for verdict, count in found.tally.items()]
    if parts:
        first, _, rest = parts[0].partition(" ")
        parts[0] = f"{first} {'claim' if first == '1' else 'claims'} {rest}"
    told = f"at {found.scale} scale {', '.join(parts) or 'a benchmark was measured'}"
    return f"{told}; {times(found.speed)} the speed of the best peer" if found.speed else told
