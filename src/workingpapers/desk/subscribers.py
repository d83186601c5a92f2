"""Who wants the digest: asking, confirming, changing, leaving.

An address that was typed into a form proves nothing, so nothing is sent to it but one mail with a link, and whoever
follows the link confirms exactly what that mail says. Links carry a random number and its HMAC under the page's
secret; they are compared in constant time and stand nowhere in the file.
"""

from __future__ import annotations

import ipaddress
import json
import re
import secrets
import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast

from workingpapers.desk.catalogue import FIELDS
from workingpapers.desk.mail import mail_address
from workingpapers.desk.page.guard import same, sign
from workingpapers.desk.page.state import State

Rhythm = Literal["daily", "weekly"]

PATIENCE = timedelta(days=7)  # for a confirmation
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
LIMITS: dict[str, tuple[int, timedelta]] = {  # confirmation mails
    "address": (3, DAY),
    "reader": (10, HOUR),
    "host": (10, HOUR),
    "everyone": (200, DAY),
}

TABLES = """
    CREATE TABLE IF NOT EXISTS subscription_requests (
        id TEXT PRIMARY KEY,
        address TEXT NOT NULL,
        fields TEXT NOT NULL,    -- JSON list; [] is all
        rhythm TEXT NOT NULL,
        asked TEXT NOT NULL,
        confirmed TEXT NOT NULL  -- '' until it is
    );
    CREATE TABLE IF NOT EXISTS subscribers (
        id TEXT PRIMARY KEY,
        key TEXT NOT NULL UNIQUE,     -- the address without case
        address TEXT NOT NULL,
        fields TEXT NOT NULL,
        rhythm TEXT NOT NULL,
        status TEXT NOT NULL CHECK (status IN ('active', 'unsubscribed', 'bounced')),
        reached INTEGER NOT NULL,     -- number of the last item that one of the digests has taken up
        served TEXT NOT NULL,         -- the moment for which the last digest was made
        refusals INTEGER NOT NULL,    -- of the address, one after the other
        changed TEXT NOT NULL
    );
    CREATE TABLE IF NOT EXISTS deliveries (
        id TEXT PRIMARY KEY,
        kind TEXT NOT NULL CHECK (kind IN ('confirmation', 'digest')),
        owner TEXT NOT NULL,          -- the request or the subscriber
        after INTEGER NOT NULL,       -- the digest has the items after < number <= upto
        upto INTEGER NOT NULL,
        status TEXT NOT NULL CHECK (status IN ('waiting', 'sending', 'sent', 'unknown', 'failed', 'withdrawn')),
        attempts INTEGER NOT NULL,
        due TEXT NOT NULL,            -- not to be tried before
        told TEXT NOT NULL,
        made TEXT NOT NULL
    );
    CREATE INDEX IF NOT EXISTS deliveries_by_status ON deliveries (status, due);
    CREATE INDEX IF NOT EXISTS deliveries_by_owner ON deliveries (owner, status);
    CREATE TABLE IF NOT EXISTS subscription_pace (kind TEXT NOT NULL, who TEXT NOT NULL, at REAL NOT NULL);
    CREATE INDEX IF NOT EXISTS subscription_pace_of ON subscription_pace (kind, who, at);
"""

_TOKEN = re.compile(r"[0-9a-f]{96}")  # 16 random bytes and their HMAC


class TooMany(Exception):
    """More confirmation mails were asked for than are sent.

    Attributes
    ----------
    seconds : until the next one.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__("Too many subscriptions were asked for. Try again later.")
        self.seconds = seconds


@dataclass(frozen=True)
class Choice:
    """What somebody wants to read.

    Attributes
    ----------
    fields : of `FIELDS` in their order; none for all.
    rhythm : every day, or on Mondays.
    """

    fields: tuple[str, ...]
    rhythm: Rhythm

    @classmethod
    def of(cls, wanted: Collection[str], rhythm: str) -> Choice:
        """A choice in its normal form.

        Raises
        ------
        ValueError : there is no such field or rhythm.
        """
        if strangers := set(wanted) - FIELDS.keys():
            raise ValueError(f"There is no field {min(strangers)!r}.")
        if rhythm not in ("daily", "weekly"):
            raise ValueError("The digest comes daily or weekly.")
        chosen = tuple(field for field in FIELDS if field in wanted)
        return cls(() if len(chosen) == len(FIELDS) else chosen, cast(Rhythm, rhythm))

    @property
    def words(self) -> str:
        """`every Monday, about Clustering and Optimisation`."""
        names = [FIELDS[field] for field in self.fields] or ["all fields"]
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        return f"{'every day' if self.rhythm == 'daily' else 'every Monday'}, about {listed}"


@dataclass(frozen=True)
class Request:
    """A choice that waits for its confirmation, or has it."""

    id: str
    address: str
    choice: Choice
    is_confirmed: bool


@dataclass(frozen=True)
class Subscriber:
    """An address that was confirmed, with what it gets."""

    id: str
    address: str
    choice: Choice
    status: Literal["active", "unsubscribed", "bounced"]
    reached: int
    served: str


class Subscribers:
    """The book of subscriptions, in the page's state."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._secret = state.secret
        state.tables(TABLES)

    def ask(self, address: str, choice: Choice, *, reader: str, host: str, now: datetime) -> None:
        """Have a confirmation mail sent; the same is done whether or not the address is known.

        Parameters
        ----------
        reader : who asks.
        host : the network address that the question came from.

        Raises
        ------
        BadAddress : there is no such address.
        TooMany : enough was sent to this address, asked for from there, or sent at all.
        """
        address = mail_address(address)
        request = secrets.token_hex(16)
        stamp = iso(now)
        with self._state.transaction() as connection:
            self._keep_pace(connection, {"address": _key(address), "reader": reader, "host": _network(host)}, now)
            connection.execute(
                "INSERT INTO subscription_requests VALUES (?, ?, ?, ?, ?, '')",
                (request, address, json.dumps(choice.fields), choice.rhythm, stamp),
            )
            connection.execute(
                "INSERT INTO deliveries VALUES (?, 'confirmation', ?, 0, 0, 'waiting', 0, ?, '', ?)",
                (secrets.token_hex(16), request, stamp, stamp),
            )

    def request(self, token: str, now: datetime) -> Request | None:
        """What the link of a confirmation mail asks for, None when it has expired or never was."""
        row = self._row("subscription_requests", "confirm", token)
        return None if row is None or row["asked"] < iso(now - PATIENCE) else _request(row)

    def confirm(self, token: str, now: datetime, reached: int) -> Subscriber | None:
        """Do what a confirmation mail says, once.

        Parameters
        ----------
        reached : number of the youngest item; a new subscriber gets what comes after it.

        Returns
        -------
        Subscriber : None when the link has expired, was used before, or never was one.
        """
        found = self.request(token, now)
        if found is None:
            return None
        stamp, wanted = iso(now), json.dumps(found.choice.fields)
        with self._state.transaction() as connection:
            used = connection.execute(
                "UPDATE subscription_requests SET confirmed = ? WHERE id = ? AND confirmed = ''", (stamp, found.id)
            ).rowcount
            if not used:
                return None
            connection.execute(
                """
                INSERT INTO subscribers VALUES (?, ?, ?, ?, ?, 'active', ?, ?, 0, ?)
                ON CONFLICT (key) DO UPDATE SET
                    address = excluded.address, fields = excluded.fields, rhythm = excluded.rhythm,
                    reached = CASE status WHEN 'active' THEN reached ELSE excluded.reached END,
                    served = CASE status WHEN 'active' THEN served ELSE excluded.served END,
                    status = 'active', refusals = 0, changed = excluded.changed
                """,
                (secrets.token_hex(16), _key(found.address), found.address, wanted, found.choice.rhythm,
                 reached, stamp, stamp),
            )  # fmt: skip
            row = connection.execute("SELECT * FROM subscribers WHERE key = ?", (_key(found.address),)).fetchone()
        return _subscriber(row)

    def of(self, token: str) -> Subscriber | None:
        """Whose link this is, whatever has become of the subscription."""
        row = self._row("subscribers", "subscription", token)
        return None if row is None else _subscriber(row)

    def change(self, subscriber: Subscriber, choice: Choice, now: datetime) -> None:
        """Send something else from now on; without effect when the subscription has ended."""
        self._state.write(
            "UPDATE subscribers SET fields = ?, rhythm = ?, changed = ? WHERE id = ? AND status = 'active'",
            (json.dumps(choice.fields), choice.rhythm, iso(now), subscriber.id),
        )

    def unsubscribe(self, subscriber: Subscriber, now: datetime) -> None:
        """Send nothing any more, nor what is waiting to be sent; doing it again changes nothing."""
        with self._state.transaction() as connection:
            connection.execute(
                "UPDATE subscribers SET status = 'unsubscribed', changed = ? WHERE id = ? AND status != 'unsubscribed'",
                (iso(now), subscriber.id),
            )
            connection.execute(
                "UPDATE deliveries SET status = 'withdrawn' WHERE owner = ? AND status = 'waiting'", (subscriber.id,)
            )

    def token(self, subscriber: Subscriber) -> str:
        """What the link to this subscription carries."""
        return self._signed("subscription", subscriber.id)

    def request_token(self, request: Request) -> str:
        """What the link of the confirmation mail carries."""
        return self._signed("confirm", request.id)

    def active(self) -> list[Subscriber]:
        rows = self._state.all("SELECT * FROM subscribers WHERE status = 'active' ORDER BY rowid")
        return [_subscriber(row) for row in rows]

    def get(self, number: str) -> Subscriber | None:
        row = self._state.one("SELECT * FROM subscribers WHERE id = ?", (number,))
        return None if row is None else _subscriber(row)

    def get_request(self, number: str, now: datetime) -> Request | None:
        """A request that can still be confirmed."""
        row = self._state.one("SELECT * FROM subscription_requests WHERE id = ?", (number,))
        return None if row is None or row["confirmed"] or row["asked"] < iso(now - PATIENCE) else _request(row)

    def missed(self, subscriber: Subscriber) -> list[tuple[int, int, str]]:
        """(after, upto, made) of the digests that may not have arrived and are not sent again, youngest first."""
        rows = self._state.all(
            "SELECT after, upto, made FROM deliveries WHERE owner = ? AND status IN ('unknown', 'failed') "
            "ORDER BY upto DESC LIMIT 10",
            (subscriber.id,),
        )
        return [(row["after"], row["upto"], row["made"]) for row in rows]

    def forget(self, now: datetime) -> None:
        """Drop what need not be kept: addresses that nobody confirmed, and who asked how often."""
        with self._state.transaction() as connection:
            connection.execute("DELETE FROM subscription_requests WHERE asked < ?", (iso(now - PATIENCE),))
            connection.execute("DELETE FROM subscription_pace WHERE at < ?", ((now - DAY).timestamp(),))

    def _keep_pace(self, connection: sqlite3.Connection, asking: dict[str, str], now: datetime) -> None:
        who = {kind: sign(self._secret, "pace", asking.get(kind, "")) for kind in LIMITS}  # no network address is kept
        for kind, (most, period) in LIMITS.items():
            rows = connection.execute(
                "SELECT at FROM subscription_pace WHERE kind = ? AND who = ? AND at > ? ORDER BY at DESC LIMIT ?",
                (kind, who[kind], (now - period).timestamp(), most),
            ).fetchall()
            if len(rows) == most:
                free = rows[-1]["at"] + period.total_seconds() - now.timestamp()
                raise TooMany(max(1, int(free) + 1))
        connection.executemany(
            "INSERT INTO subscription_pace VALUES (?, ?, ?)", [(kind, who[kind], now.timestamp()) for kind in LIMITS]
        )

    def _signed(self, purpose: str, number: str) -> str:
        return number + sign(self._secret, purpose, number)

    def _row(self, table: str, purpose: str, token: str) -> Any:
        """The row whose number a token carries, if the page made that token."""
        number = token[:32]
        if not _TOKEN.fullmatch(token) or not same(token, self._signed(purpose, number)):
            return None
        return self._state.one(f"SELECT * FROM {table} WHERE id = ?", (number,))


def iso(moment: datetime) -> str:
    """A moment as the tables have it: sorts as text."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def _request(row: sqlite3.Row) -> Request:
    return Request(row["id"], row["address"], _choice(row), bool(row["confirmed"]))


def _subscriber(row: sqlite3.Row) -> Subscriber:
    return Subscriber(row["id"], row["address"], _choice(row), row["status"], row["reached"], row["served"])


def _choice(row: sqlite3.Row) -> Choice:
    return Choice(tuple(field for field in json.loads(row["fields"]) if field in FIELDS), row["rhythm"])


def _key(address: str) -> str:
    """Equal for addresses that reach the same person: hosts do not tell case apart, and hardly any user does."""
    return address.lower()


def _network(host: str) -> str:
    """Whoever holds one IPv6 address holds its whole /64."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else host
