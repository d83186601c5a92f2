"""The digest: who is due, what they get, and how it is sent so that nothing goes twice.

A digest takes up the items after the last one that its subscriber's digests have taken up: one row is written that says
so, in the same transaction that moves the subscriber's mark. So every item is in at most one digest of a subscriber,
and a digest that was made is not lost. The row then goes

    waiting -> sending -> sent        the server has it
    waiting -> waiting                the server surely does not have it: tried again, later and later
    sending -> unknown                the connection or this process died between the final dot and the reply
    waiting -> failed                 the server refused it for good, several times
    waiting -> withdrawn              the subscriber left, or wants nothing of it any more

Sending exactly once is impossible over SMTP. What is `unknown` is not sent again, since it may have arrived; the
subscriber's own page lists it. One process sends at a time; a row that it finds `sending` was left by one that died.

Times are UTC: a daily digest is due at 6 o'clock, a weekly one on Mondays at 6, or as soon after as somebody is there
to send it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from functools import partial
from sqlite3 import Row
from typing import Any, Literal

from filelock import FileLock, Timeout

from workingpapers.desk.catalogue import FIELDS
from workingpapers.desk.feed import Item, News
from workingpapers.desk.mail import Sent, Transport, compose
from workingpapers.desk.page.content import Content
from workingpapers.desk.page.render import environment, live
from workingpapers.desk.page.settings import Settings
from workingpapers.desk.page.state import State
from workingpapers.desk.subscribers import Rhythm, Subscriber, Subscribers, iso

HOUR_OF_DAY = 6
TITLES = 100  # without a method, that a digest lists; of more it tells the number
FIRST_WAIT, LONGEST_WAIT = timedelta(minutes=5), timedelta(hours=6)
REFUSED_WAIT = timedelta(days=1)  # after a refusal for good, which sometimes is none
REFUSALS = 3  # in a row, then the address is given up
KEPT = timedelta(days=180)  # records of what was sent

_log = logging.getLogger(__name__)


def moment(rhythm: Rhythm, now: datetime) -> datetime:
    """The last moment, not after `now`, for which a digest of this rhythm is made."""
    at = now.astimezone(UTC).replace(hour=HOUR_OF_DAY, minute=0, second=0, microsecond=0)
    if rhythm == "weekly":
        at -= timedelta(days=at.weekday())
    return at if at <= now else at - (timedelta(days=1) if rhythm == "daily" else timedelta(weeks=1))


@dataclass(frozen=True)
class Report:
    """What became of one mail.

    Attributes
    ----------
    status : of its row; "waiting" when it will be tried again.
    """

    kind: Literal["confirmation", "digest"]
    address: str
    items: int
    status: str
    told: str


class Postman:
    """Sends what is due.

    Parameters
    ----------
    settings : the page's; `address` stands in the mails.
    state, news, subscribers : whose items go to whom.
    deliver : hands over one message.
    """

    def __init__(
        self, settings: Settings, state: State, news: News, subscribers: Subscribers, deliver: Transport
    ) -> None:
        self._settings = settings
        self._state = state
        self._news = news
        self._subscribers = subscribers
        self._deliver = deliver
        self._lock = FileLock(f"{state.path}.sending")
        html = environment(is_live=True)
        self._html, self._text = html, html.overlay(autoescape=False)

    def due(self, now: datetime) -> list[tuple[Subscriber, list[Item]]]:
        """Who would get a new digest now, and what would be in it."""
        last = self._news.last
        found = [
            (subscriber, self._news.between(subscriber.reached, last, subscriber.choice.fields))
            for subscriber in self._subscribers.active()
            if subscriber.served < iso(moment(subscriber.choice.rhythm, now))
        ]
        return [(subscriber, items) for subscriber, items in found if items]

    def round(self, content: Content, now: datetime) -> list[Report]:
        """Take up what is new, make the digests that are due, and try every mail whose time has come.

        Nothing happens while another thread or process is at it.
        """
        try:
            with self._lock.acquire(timeout=0):
                self._recover()
                self._subscribers.forget(now)
                self._state.write(
                    "DELETE FROM deliveries WHERE made < ? AND status NOT IN ('waiting', 'sending')", (iso(now - KEPT),)
                )
                self._news.refresh(content, now)
                self._make(now)
                return self._try(now)
        except Timeout:
            return []

    def _recover(self) -> None:
        """Rows that a process left when it died, after which the server may or may not have had the message."""
        told = "the program ended while the server was about to answer"
        self._state.write("UPDATE deliveries SET status = 'unknown', told = ? WHERE status = 'sending'", (told,))

    def _make(self, now: datetime) -> None:
        last, stamp = self._news.last, iso(now)
        for subscriber in self._subscribers.active():
            at = iso(moment(subscriber.choice.rhythm, now))
            if subscriber.served >= at or self._is_waiting(subscriber):
                continue
            items = self._news.between(subscriber.reached, last, subscriber.choice.fields)
            with self._state.transaction() as connection:
                moved = connection.execute(
                    "UPDATE subscribers SET reached = ?, served = ? WHERE id = ? AND status = 'active' AND reached = ?",
                    (last, at, subscriber.id, subscriber.reached),
                ).rowcount
                if moved and items:
                    connection.execute(
                        "INSERT INTO deliveries VALUES (?, 'digest', ?, ?, ?, 'waiting', 0, ?, '', ?)",
                        (secrets.token_hex(16), subscriber.id, subscriber.reached, last, stamp, stamp),
                    )

    def _is_waiting(self, subscriber: Subscriber) -> bool:
        """Whether an older digest is still to be sent; the next one comes after it."""
        query = "SELECT 1 FROM deliveries WHERE owner = ? AND status = 'waiting'"
        return self._state.one(query, (subscriber.id,)) is not None

    def _try(self, now: datetime) -> list[Report]:
        reports = []
        rows = self._state.all(
            "SELECT * FROM deliveries WHERE status = 'waiting' AND due <= ? ORDER BY kind, made, rowid", (iso(now),)
        )
        for row in rows:
            try:
                mail = self._confirmation(row, now) if row["kind"] == "confirmation" else self._digest(row, now)
            except ValueError as refused:  # it cannot be written down as a mail; the others can
                self._finish(row, "failed", str(refused))
                continue
            if mail is None:  # nobody wants it any more
                self._finish(row, "withdrawn", "")
                continue
            address, message, count = mail
            sent = self._deliver(message, _name(row), partial(self._settle, row))
            status = self._settled(row, sent, now)
            reports.append(Report(row["kind"], address, count, status, sent.told))
            if sent.is_of_server:  # the others would fare alike; they are tried in the next round
                _log.warning("the mail server does not take mails (%s): %s", sent.stage, sent.told)
                break
        return reports

    def _settle(self, row: Row) -> bool:
        """Write down that the message may be out from here on; False when the subscriber has left meanwhile."""
        query = "UPDATE deliveries SET status = 'sending' WHERE id = ? AND status = 'waiting'"
        return self._state.write(query, (row["id"],)) == 1

    def _settled(self, row: Row, sent: Sent, now: datetime) -> str:
        """Write down what became of a mail, and what follows from it; the row's new status."""
        attempts = row["attempts"] + 1
        match sent.result:
            case "sent" | "unknown":
                self._finish(row, sent.result, sent.told)
                if sent.result == "sent":
                    self._state.write("UPDATE subscribers SET refusals = 0 WHERE id = ?", (row["owner"],))
                return sent.result
            case "withdrawn":
                return "withdrawn"
            case "never" if row["kind"] == "confirmation" or self._is_given_up(row, sent, now):
                self._finish(row, "failed", sent.told)
                return "failed"
            case "never":
                wait = REFUSED_WAIT
            case "later":
                wait = min(FIRST_WAIT * 2 ** min(attempts - 1, 10), LONGEST_WAIT)
        # back from `sending`, when the server refused it after the dot; left alone when the subscriber has left
        self._state.write(
            "UPDATE deliveries SET status = 'waiting', attempts = ?, due = ?, told = ? "
            "WHERE id = ? AND status IN ('waiting', 'sending')",
            (attempts, iso(now + wait), sent.told, row["id"]),
        )
        return "waiting"

    def _is_given_up(self, row: Row, sent: Sent, now: datetime) -> bool:
        """Count a refusal for good; an address that is refused again and again gets no more digests."""
        with self._state.transaction() as connection:
            connection.execute("UPDATE subscribers SET refusals = refusals + 1 WHERE id = ?", (row["owner"],))
            query = "SELECT refusals FROM subscribers WHERE id = ?"
            is_over = bool(connection.execute(query, (row["owner"],)).fetchone()["refusals"] >= REFUSALS)
            if is_over and sent.stage == "recipient":
                connection.execute(
                    "UPDATE subscribers SET status = 'bounced', changed = ? WHERE id = ? AND status = 'active'",
                    (iso(now), row["owner"]),
                )
            elif is_over:  # it is this digest that is refused, not the address
                connection.execute("UPDATE subscribers SET refusals = 0 WHERE id = ?", (row["owner"],))
        return is_over

    def _finish(self, row: Row, status: str, told: str) -> None:
        query = "UPDATE deliveries SET status = ?, told = ? WHERE id = ?"
        self._state.write(query, (status, told, row["id"]))

    def _confirmation(self, row: Row, now: datetime) -> tuple[str, EmailMessage, int] | None:
        request = self._subscribers.get_request(row["owner"], now)
        if request is None:
            return None
        link = self._settings.address + live("confirm", self._subscribers.request_token(request))
        shown = {"choice": request.choice, "link": link, "address": self._settings.address}
        message = compose(
            self._settings, to=request.address, subject="Working Papers: confirm your subscription",
            text=self._rendered(self._text, "mail_confirm.txt", shown),
            html=self._rendered(self._html, "mail_confirm.html", shown),
            name=_name(row), sent=now,
        )  # fmt: skip
        return request.address, message, 0

    def _digest(self, row: Row, now: datetime) -> tuple[str, EmailMessage, int] | None:
        subscriber = self._subscribers.get(row["owner"])
        if subscriber is None or subscriber.status != "active":
            return None
        items = self._news.between(row["after"], row["upto"], subscriber.choice.fields)
        if not items:
            return None
        shown = once(items)
        methods = [item for item in shown if item.kind in ("working", "evidence")]
        titles = [item for item in shown if item.kind not in ("working", "evidence")]
        leave = self._settings.address + live("unsubscribe", self._subscribers.token(subscriber))
        values = {
            "methods": _by_field(methods),
            "titles": _by_field(titles[:TITLES]),
            "more": len(titles) - len(titles[:TITLES]),
            "choice": subscriber.choice,
            "address": self._settings.address,
            "leave": leave,
        }
        parts = [_count(len(methods), "paper with new evidence", "papers with new evidence")] if methods else []
        parts += [_count(len(titles), "new title", "new titles")] if titles else []
        message = compose(
            self._settings, to=subscriber.address, subject=f"Working Papers: {', '.join(parts)}",
            text=self._rendered(self._text, "mail_digest.txt", values),
            html=self._rendered(self._html, "mail_digest.html", values),
            name=_name(row), sent=now, unsubscribe=leave,
        )  # fmt: skip
        return subscriber.address, message, len(shown)

    def _rendered(self, templates: Any, name: str, shown: Mapping[str, Any]) -> str:
        return str(templates.get_template(name).render(shown))


def once(items: Sequence[Item]) -> list[Item]:
    """The last news of every paper; a paper that works only now is told so, however often it was measured since."""
    last: dict[str, Item] = {}
    for item in items:
        key = item.slug if item.kind in ("working", "evidence") else item.id
        earlier = last.pop(key, None)
        if earlier is not None and earlier.kind == "working":
            told = item.told.replace("New evidence", "Works now", 1)
            item = Item(**{**vars(item), "kind": "working", "told": told})
        last[key] = item
    return list(last.values())


def _by_field(items: Sequence[Item]) -> list[tuple[str, list[Item]]]:
    groups = [
        (label, [item for item in items if item.field == field]) for field, label in {**FIELDS, "": "Other"}.items()
    ]
    return [(label, members) for label, members in groups if members]


def _name(row: Row) -> str:
    """Of a mail: its day, so that files sort, and the random number of its row."""
    return f"{row['made'][:10]}-{row['id']}"


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
