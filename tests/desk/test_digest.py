"""The digest: what is due, real servers that refuse, stall and drop, crashes at every moment, nothing twice."""

from __future__ import annotations

import email
import email.policy
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from aiosmtpd.controller import Controller
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from workingpapers.cli import main
from workingpapers.desk.catalogue import Paper
from workingpapers.desk.digest import REFUSALS, TITLES, Postman, moment
from workingpapers.desk.feed import News
from workingpapers.desk.mail import BadAddress, Outbox, Sent, SmtpServer, compose, mail_address, smtp_from_environment
from workingpapers.desk.page.content import Content, PaperContent
from workingpapers.desk.page.settings import Settings, Smtp
from workingpapers.desk.page.state import State
from workingpapers.desk.subscribers import LIMITS, PATIENCE, Choice, Subscribers, TooMany

MONDAY = datetime(2026, 11, 16, 9, 0, tzinfo=UTC)
DAY = timedelta(days=1)


class Crash(BaseException):
    """The process dies here."""


class Town:
    """A page with subscribers and papers, a clock that is set by hand, and a process that can die and start again."""

    def __init__(self, folder, deliver=None, smtp=None):
        self.settings = Settings(folder / "store.sqlite", address="https://papers.example.org", smtp=smtp)
        self.now = MONDAY
        self.papers = {}
        self.deliver = deliver or Outbox(self.settings.outbox)
        self.start()

    def start(self):
        self.state = State(self.settings.state)
        self.news = News(self.state, self.settings.store)
        self.book = Subscribers(self.state)
        self.postman = Postman(self.settings, self.state, self.news, self.book, lambda *args: self.deliver(*args))

    def restart(self):
        self.state.close()
        self.start()

    @property
    def content(self):
        return Content(str(len(self.papers)) + str(self.now), dict(self.papers))

    def publish(self, slug, field="optimization", title="", recorded=""):
        """A title that is new; with `recorded`, evidence for it."""
        row = Paper(slug, title or f"Title of {slug}.", field, f"{field}.{slug}", "2401.00001", "", ("Mar 11",), ("f",),
                    f"Summary of {slug}.")  # fmt: skip
        entry = {"scale": "laptop", "kind": "claim", "verdict": "holds", "recorded": recorded, "claim": "rate"}
        entries = [entry] if recorded else []
        self.papers[slug] = PaperContent(
            row, "working" if recorded else "listed", entries, "laptop" if recorded else None, False
        )

    def subscribe(self, address="ada@example.org", fields=(), rhythm="daily"):
        """The whole way through both opt-ins, without the mail."""
        self.book.ask(address, Choice.of(fields, rhythm), reader=address, host=address, now=self.now)
        row = self.state.one("SELECT id FROM subscription_requests WHERE confirmed = '' AND address = ?", (address,))
        self.state.write("UPDATE deliveries SET status = 'sent' WHERE owner = ?", (row["id"],))
        self.news.refresh(self.content, self.now)
        return self.book.confirm(self.book._signed("confirm", row["id"]), self.now, self.news.last)

    def tomorrow(self, days=1):
        self.now += days * DAY
        return self.round()

    def round(self):
        return self.postman.round(self.content, self.now)

    def rows(self):
        return [row["status"] for row in self.state.all("SELECT status FROM deliveries WHERE kind = 'digest'")]

    def mails(self):
        files = sorted(self.settings.outbox.glob("*.eml")) if self.settings.outbox.is_dir() else []
        return [parsed(file.read_bytes()) for file in files]


@pytest.fixture
def town(tmp_path):
    return Town(tmp_path)


def parsed(data):
    return email.message_from_bytes(data, policy=email.policy.default)


def text_of(message, kind="plain"):
    return message.get_body((kind,)).get_content()


# --------------------------------------------------------------------------------------------------------------------
# What is due, and what is in it


def test_daily_is_due_at_six_and_weekly_on_mondays():
    assert moment("daily", datetime(2026, 11, 18, 5, 59, tzinfo=UTC)) == datetime(2026, 11, 17, 6, tzinfo=UTC)
    assert moment("daily", datetime(2026, 11, 18, 6, 0, tzinfo=UTC)) == datetime(2026, 11, 18, 6, tzinfo=UTC)
    assert moment("weekly", datetime(2026, 11, 22, 23, 0, tzinfo=UTC)) == datetime(2026, 11, 16, 6, tzinfo=UTC)
    assert moment("weekly", datetime(2026, 11, 16, 5, 0, tzinfo=UTC)) == datetime(2026, 11, 9, 6, tzinfo=UTC)


def test_a_subscriber_gets_what_is_new_since_and_nothing_again(town):
    town.publish("old")
    town.subscribe()
    town.publish("new")
    assert town.round() == []  # not before the next day
    (report,) = town.tomorrow()
    assert (report.kind, report.address, report.items, report.status) == ("digest", "ada@example.org", 1, "sent")
    text = text_of(town.mails()[0])
    assert "Title of new." in text
    assert "Title of old." not in text
    assert town.round() == town.tomorrow() == []  # nothing new, no mail
    town.publish("newer")
    town.tomorrow()
    assert "Title of new." not in text_of(town.mails()[1])


def test_fields_and_rhythm_are_kept_to(town):
    town.subscribe("ada@example.org", ["causality"], "daily")
    town.subscribe("bob@example.org", [], "weekly")
    town.publish("a", "causality")
    town.publish("b", "training")
    for _ in range(6):
        town.tomorrow()
    (mail_of_ada,) = town.mails()
    assert mail_of_ada["To"] == "ada@example.org"
    assert "Title of a." in text_of(mail_of_ada)
    assert "Title of b." not in text_of(mail_of_ada)
    (report,) = town.tomorrow()  # Monday
    assert (report.address, report.items) == ("bob@example.org", 2)


def test_evidence_is_news_once_for_each_recording(town):
    town.publish("a")
    town.subscribe()
    town.publish("a", recorded="2026-11-16T10:00:00+00:00")
    town.round()
    town.publish("a", recorded="2026-11-16T11:00:00+00:00")
    town.tomorrow()
    (first,) = town.mails()
    assert text_of(first).count("Title of a.") == 1  # the last of the day's recordings speaks
    assert "Works now: at laptop scale 1 claim holds." in text_of(first)
    assert first["Subject"] == "Working Papers: 1 paper with new evidence"
    town.publish("a", recorded="2026-11-18T10:00:00+00:00")
    town.tomorrow(2)
    assert "New evidence: at laptop scale" in text_of(town.mails()[1])


def test_a_flood_of_titles_is_told_as_a_number(town):
    town.subscribe()
    for i in range(TITLES + 7):
        town.publish(f"p{i:04}")
    town.tomorrow()
    (flood,) = town.mails()
    assert text_of(flood).count("* Title of") == TITLES
    assert "And 7 more" in text_of(flood)
    assert town.tomorrow() == []


def test_nobody_gets_anything_before_confirming_or_after_leaving(town):
    town.book.ask("eve@example.org", Choice((), "daily"), reader="r", host="h", now=town.now)
    left = town.subscribe("bob@example.org")
    town.publish("a")
    town.book.unsubscribe(left, town.now)
    (report,) = town.tomorrow()
    assert (report.kind, report.address) == ("confirmation", "eve@example.org")
    assert town.book.of(town.book.token(left)).status == "unsubscribed"


def test_coming_back_starts_anew(town):
    found = town.subscribe()
    town.publish("a")
    town.book.unsubscribe(found, town.now)
    town.round()
    again = town.subscribe("ADA@example.org")
    assert again.id == found.id
    assert town.tomorrow() == []  # what came while they were away is not sent
    town.publish("b")
    town.tomorrow()
    (only,) = town.mails()
    assert "Title of a." not in text_of(only)


def test_a_confirmation_holds_for_seven_days_and_once(town):
    town.book.ask("ada@example.org", Choice((), "daily"), reader="r", host="h", now=town.now)
    number = town.state.one("SELECT id FROM subscription_requests")["id"]
    token = town.book._signed("confirm", number)
    assert town.book.request(token, town.now + PATIENCE + timedelta(seconds=1)) is None
    assert town.book.confirm(token, town.now + PATIENCE + timedelta(seconds=1), 0) is None
    assert town.book.confirm(token, town.now, 0) is not None
    assert town.book.confirm(token, town.now, 0) is None
    town.book.forget(town.now + PATIENCE + timedelta(seconds=1))
    assert town.state.all("SELECT * FROM subscription_requests") == []


def test_tokens_are_compared_in_constant_time_and_bound_to_their_purpose(town, monkeypatch):
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    found = town.subscribe()
    token = town.book.token(found)
    assert town.book.of(token) == found
    assert any(token.encode() in pair for pair in compared)
    wrong = [token[:-1] + ("0" if token[-1] != "0" else "1"), "0" * 96, token.upper(), token + "0", "", "é" * 96]
    assert [town.book.of(other) for other in wrong] == [None] * len(wrong)
    assert town.book.request(token, town.now) is None  # this link does not confirm
    kept = [str(tuple(row)) for name in ("subscribers", "subscription_requests", "deliveries")
            for row in town.state.all(f"SELECT * FROM {name}")]  # fmt: skip
    assert not any(token[32:] in row for row in kept)


@pytest.mark.parametrize("kind", list(LIMITS))
def test_asking_is_limited(town, kind):
    most, period = LIMITS[kind]

    def ask(i, now):
        who = {"address": f"a{i}@example.org", "reader": f"r{i}", "host": f"10.0.{i // 250}.{i % 250}"}
        who |= {kind: {"address": "a@example.org", "reader": "r", "host": "10.9.9.9"}.get(kind, "")}
        town.book.ask(who["address"], Choice((), "daily"), reader=who["reader"], host=who["host"], now=now)

    for i in range(most):
        ask(i, town.now)
    with pytest.raises(TooMany) as refused:
        ask(most, town.now + timedelta(seconds=60))
    assert refused.value.seconds == pytest.approx(period.total_seconds() - 60, abs=2)
    ask(most, town.now + timedelta(seconds=60 + refused.value.seconds))


def test_a_whole_ipv6_network_counts_as_one(town):
    for i in range(LIMITS["host"][0]):
        town.book.ask(f"a{i}@example.org", Choice((), "daily"), reader=f"{i}", host=f"2001:db8::{i:x}", now=town.now)
    with pytest.raises(TooMany):
        town.book.ask("b@example.org", Choice((), "daily"), reader="b", host="2001:db8::ffff", now=town.now)


# --------------------------------------------------------------------------------------------------------------------
# Messages


def test_a_digest_has_both_parts_and_the_headers_of_rfc_8058(town):
    found = town.subscribe()
    town.publish("a", title="Schrödinger's <b>Ducks</b> & \u202eponds")
    town.tomorrow()
    (message,) = town.mails()
    link = f"https://papers.example.org/unsubscribe/{town.book.token(found)}"
    assert message["List-Unsubscribe"].replace(" ", "") == f"<{link}>"
    assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["List-Id"] == "Working Papers <digest.papers.example.org>"
    assert message["Date"].datetime == town.now
    assert re.fullmatch(r"<2026-11-17-[0-9a-f]{32}@papers\.example\.org>", message["Message-ID"].strip())
    assert message.get_content_type() == "multipart/alternative"
    assert [part.get_content_type() for part in message.iter_parts()] == ["text/plain", "text/html"]
    assert "Schrödinger's <b>Ducks</b> &" in text_of(message)
    assert "<b>" not in text_of(message, "html")
    assert "&lt;b&gt;Ducks&lt;/b&gt; &amp;" in text_of(message, "html")
    assert link in text_of(message)
    raw = next(town.settings.outbox.glob("*.eml")).read_bytes()
    assert raw.isascii()
    assert all(len(line) <= 998 for line in raw.split(b"\r\n"))


def test_the_outbox_is_private_and_its_names_are_safe(town):
    town.subscribe()
    town.publish("a")
    town.tomorrow()
    (file,) = town.settings.outbox.iterdir()
    assert re.fullmatch(r"2026-11-17-[0-9a-f]{32}\.eml", file.name)
    assert file.stat().st_mode & 0o077 == 0
    assert town.settings.outbox.stat().st_mode & 0o077 == 0
    with pytest.raises(ValueError, match="name of a message"):
        Outbox(town.settings.outbox)(parsed(b""), "../x", lambda: True)


HOSTILE = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("\r\n\0\x0b\x1b\u2028\u202e<>&\"'.")), max_size=200
)


@given(title=HOSTILE)
@example(title="x\r\nBcc: eve@example.org\r\n\r\n.\r\nRSET")
@example(title="\r\n.\r\n")
@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_title_breaks_a_message(tmp_path_factory, title):
    town = Town(tmp_path_factory.mktemp("town"))
    try:
        town.subscribe()
        town.publish("a", title=title)
        town.publish("b", recorded="2026-11-16T10:00:00+00:00", title=title + "b")
        town.tomorrow()
        (message,) = town.mails()
        assert not message.defects
        assert message["Bcc"] is None
        assert set(message.keys()) == {
            "From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "List-Id", "List-Unsubscribe",
            "List-Unsubscribe-Post", "MIME-Version", "Content-Type",
        }  # fmt: skip
        assert [part.get_content_type() for part in message.walk()] == [
            "multipart/alternative", "text/plain", "text/html",
        ]  # fmt: skip
        assert "<script" not in text_of(message, "html").lower()
    finally:
        town.state.close()


@pytest.mark.parametrize("header", ["to", "subject", "name", "unsubscribe"])
@pytest.mark.parametrize("bad", ["\r\nBcc: eve@example.org", "\n", "\0", "\u2028"])
def test_a_header_with_a_line_break_is_refused(town, header, bad):
    given = {"to": "ada@example.org", "subject": "s", "name": "n", "unsubscribe": "https://x.example/u"}
    given[header] += bad
    with pytest.raises(ValueError, match="control characters"):
        compose(town.settings, text="", html="", sent=town.now, **given)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ada@example.org", "ada@example.org"),
        ("  Ada.L+x@EXAMPLE.org ", "Ada.L+x@example.org"),
        ("o'neil@münchen.example", "o'neil@xn--mnchen-3ya.example"),
    ],
)
def test_addresses_that_are_taken(text, wanted):
    assert mail_address(text) == wanted


@pytest.mark.parametrize(
    "text",
    ["", "ada", "@example.org", "ada@", "a@b@example.org", "a b@example.org", "ada@example", "ada@1.2.3.4",
     "ada@[127.0.0.1]", "ada@example.org\r\nBcc: eve@example.org", "ada\n@example.org", ".a@example.org",
     "a..b@example.org", "ädа@example.org", "<ada@example.org>", "Ada <ada@example.org>", '"a b"@example.org',
     "ada@ex_ample.org", "ada@-a.org", "ada@a..org", "x" * 65 + "@example.org", "x@" + "a" * 64 + ".org",
     "x@" + ("a" * 60 + ".") * 5 + "org", "ada@example.org,eve@example.org", "ada@example.org\0", "\u2028@a.org"],
)  # fmt: skip
def test_addresses_that_are_refused(text):
    with pytest.raises(BadAddress):
        mail_address(text)


@given(text=st.one_of(st.text(max_size=300), st.from_regex(r"[!-~]{1,30}@[a-z.-]{1,30}", fullmatch=True), st.emails()))
@hypothesis_settings(max_examples=100, deadline=None)
def test_every_address_that_is_taken_can_be_written_to(tmp_path_factory, text):
    try:
        address = mail_address(text)
    except BadAddress:
        return
    assert mail_address(address) == address
    settings = Settings(tmp_path_factory.getbasetemp() / "s.sqlite")
    made = compose(settings, to=address, subject="s", text="t", html="h", name="n", sent=MONDAY)
    (to,) = parsed(made.as_bytes())["To"].addresses
    assert to.addr_spec == address


def test_the_server_comes_from_the_environment():
    def read(**given):
        return smtp_from_environment({f"WORKINGPAPERS_SMTP_{name}": value for name, value in given.items()})

    assert read() is None
    assert read(HOST="mx.example.org", SENDER="a@example.org") == Smtp("mx.example.org", 587, sender="a@example.org")
    full = read(HOST="mx", PORT="26", USER="u@example.org", PASSWORD=" p ", SECURITY="tls")
    assert full == Smtp("mx", 26, "u@example.org", " p ", "tls", "u@example.org")
    for wrong in ({"PORT": "no"}, {"PORT": "99999"}, {"SECURITY": "ssl"}, {"SENDER": "x"}, {"SENDER": "a@b.org\nX: y"}):
        with pytest.raises(ValueError, match=f"WORKINGPAPERS_SMTP_{next(iter(wrong))}"):
            read(**{"HOST": "mx", "SENDER": "a@example.org", **wrong})
    with pytest.raises(ValueError, match="in clear"):
        read(HOST="mx.example.org", USER="u", PASSWORD="p", SECURITY="none", SENDER="a@example.org")


# --------------------------------------------------------------------------------------------------------------------
# Real servers on the loopback device


class Handler:
    """What an aiosmtpd server does: answers as told, keeps what it takes."""

    def __init__(self):
        self.answers = {}
        self.kept = []

    async def handle_RCPT(self, server, session, envelope, address, options):  # noqa: N802 - aiosmtpd's names
        answer = self.answers.get("rcpt", "250 OK")
        if answer.startswith("2"):
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_MAIL(self, server, session, envelope, address, options):  # noqa: N802
        envelope.mail_from = address
        return self.answers.get("mail", "250 OK")

    async def handle_DATA(self, server, session, envelope):  # noqa: N802
        answer = self.answers.get("data", "250 kept")
        if answer.startswith("2"):
            self.kept.append((envelope.rcpt_tos[0], parsed(envelope.content)))
        return answer


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def server(**options):
    handler = Handler()
    controller = Controller(handler, hostname="127.0.0.1", port=free_port(), **options)
    controller.start()
    try:
        yield handler, controller.port
    finally:
        controller.stop()


def by_smtp(port, stage_seconds=5.0, total_seconds=10.0, **smtp):
    smtp = {"security": "none", "sender": "digest@papers.example.org", **smtp}
    return SmtpServer(Smtp("127.0.0.1", port, **smtp), stage_seconds=stage_seconds, total_seconds=total_seconds)


def with_news(town, **subscriber):
    town.subscribe(**subscriber)
    town.publish("a", title="Dots\n.\nand .dots Ł")
    return town


def test_a_server_takes_the_message_as_it_was_written(town):
    with_news(town)
    with server() as (handler, port):
        town.deliver = by_smtp(port)
        (report,) = town.tomorrow()
        assert (report.status, report.told) == ("sent", "250 kept")
        assert town.tomorrow() == []
    ((to, message),) = handler.kept
    assert to == "ada@example.org"
    assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert "Dots . and .dots Ł" in text_of(message)
    assert "Dots . and .dots Ł" in text_of(message, "html")
    assert not message.defects


def test_lines_that_begin_with_a_dot_arrive(town):
    message = parsed(b"From: a@example.org\r\nTo: b@example.org\r\n\r\nx\r\n.\r\n..y\nz\r\n")
    with server() as (handler, port):
        assert by_smtp(port)(message, "n", lambda: True).result == "sent"
    ((_, kept),) = handler.kept
    assert kept.get_content().splitlines() == ["x", ".", "..y", "z"]


def test_a_temporary_refusal_is_tried_again_later_and_later(town):
    with_news(town)
    with server() as (handler, port):
        town.deliver = by_smtp(port)
        handler.answers["rcpt"] = "451 greylisted"
        (report,) = town.tomorrow()
        assert (report.status, report.told) == ("waiting", "451 greylisted")
        assert town.round() == []  # not at once
        waits = []
        for _ in range(8):
            before = town.now
            while not town.round():
                town.now += timedelta(minutes=5)
            waits.append(town.now - before)
        assert waits[:3] == [timedelta(minutes=5), timedelta(minutes=10), timedelta(minutes=20)]
        assert max(waits) == timedelta(hours=6)
        handler.answers.clear()
        town.publish("b")
        (report,) = town.tomorrow()
        assert report.status == "sent"
        (report,) = town.round()  # what came meanwhile is in the next one
    texts = [text_of(message) for _, message in handler.kept]
    assert [("Dots" in text, "Title of b." in text) for text in texts] == [(True, False), (False, True)]


def test_an_address_that_is_refused_again_and_again_is_given_up(town):
    found = town.subscribe()
    other = town.subscribe("bob@example.org")
    town.publish("a")
    with server() as (handler, port):
        town.deliver = by_smtp(port)
        handler.answers["rcpt"] = "550 nobody here"
        town.postman._subscribers.unsubscribe(other, town.now)
        for attempt in range(REFUSALS):
            assert town.book.get(found.id).status == "active", attempt
            town.tomorrow(2)
        assert town.book.get(found.id).status == "bounced"
        assert town.rows() == ["failed"]
        handler.answers.clear()
        town.publish("b")
        assert town.tomorrow(2) == []
    assert len(town.book.missed(found)) == 1


def test_a_refusal_after_the_dot_is_no_doubt(town):
    with_news(town)
    with server() as (handler, port):
        town.deliver = by_smtp(port)
        handler.answers["data"] = "452 full"
        town.tomorrow()
        assert town.rows() == ["waiting"]
        handler.answers["data"] = "554 looks like spam"
        town.tomorrow()
        assert town.rows() == ["waiting"]
        handler.answers.clear()
        town.tomorrow(2)
        assert town.rows() == ["sent"]
    assert len(handler.kept) == 1


def test_a_confirmation_that_is_refused_for_good_is_not_tried_again(town):
    with server() as (handler, port):
        town.deliver = by_smtp(port)
        handler.answers["rcpt"] = "550 nobody here"
        town.book.ask("eve@example.org", Choice((), "daily"), reader="r", host="h", now=town.now)
        assert [report.status for report in town.round()] == ["failed"]
        assert town.tomorrow() == []


@pytest.mark.parametrize("security", ["none", "starttls", "tls"])
def test_nobody_there_is_tried_again(town, security):
    with_news(town)
    town.deliver = by_smtp(free_port(), security=security)
    (report,) = town.tomorrow()
    assert report.status == "waiting"
    assert "refused" in report.told.lower()


def test_a_server_that_is_away_is_asked_once_in_a_round(town):
    for i in range(4):
        town.subscribe(f"a{i}@example.org")
    town.publish("a")
    town.deliver = by_smtp(free_port())
    assert len(town.tomorrow()) == 1
    assert town.rows() == ["waiting"] * 4


class Rough:
    """A server of sockets, for what no good server does.

    Parameters
    ----------
    manner : "silent" says nothing; "mute after X" stops answering at X; "drop at X" hangs up there; "dribble" answers
        letter by letter without end; "gibberish after dot".
    """

    def __init__(self, manner):
        self.manner = manner
        self.kept = []
        self.is_mute = threading.Event()

    def __enter__(self):
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._ended = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._ended.set()
        self._listening.close()

    def _accept(self):
        while not self._ended.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                try:
                    self._talk(connection)
                except OSError:
                    continue

    def _talk(self, connection):
        say = lambda text: connection.sendall(text.encode() + b"\r\n")  # noqa: E731
        if self.manner == "silent":
            return self._wait()
        if self.manner == "dribble":
            while not self._ended.is_set():
                connection.sendall(b"2")
                time.sleep(0.02)
            return None
        say("220 rough")
        lines = connection.makefile("rb")
        for line in lines:
            verb = line.split()[0].decode().upper()
            if self.manner == f"drop at {verb}":
                return None
            if self.manner == f"mute at {verb}":
                return self._wait()
            if verb != "DATA":
                say("250 fine")
                continue
            say("354 go on")
            if self.manner == "drop before dot":
                connection.recv(10)
                return None
            if self.manner == "leave before dot":  # politely, with all that was sent read
                while lines.readline().count(b"==--\r\n") == 0:  # the last line of a mail with parts
                    continue
                say("421 leaving")
                return None
            message = b""
            while not message.endswith(b"\r\n.\r\n"):
                message += lines.readline()
            self.kept.append(message)
            if self.manner == "drop after dot":
                return None
            if self.manner == "mute after dot":
                return self._wait()
            say({"gibberish after dot": "one two three", "good": "250 kept"}[self.manner])
        return None

    def _wait(self):
        self.is_mute.set()
        self._ended.wait(10)


def settle_slowly(town):
    """So that the server's hanging up arrives before the dot leaves; in between it is anybody's guess."""
    deliver = town.deliver
    town.deliver = lambda message, name, settle: deliver(message, name, lambda: settle() and not time.sleep(0.03))


SURE = ["silent", "dribble", "drop before dot", "leave before dot"] + [
    f"{what} at {verb}" for what in ("drop", "mute") for verb in ("EHLO", "MAIL", "RCPT", "DATA")
]


@pytest.mark.parametrize("manner", SURE)
def test_what_breaks_before_the_dot_is_sent_again(town, manner):
    with_news(town)
    with Rough(manner) as rough:
        town.deliver = by_smtp(rough.port, stage_seconds=0.15, total_seconds=0.6)
        settle_slowly(town)
        began = time.monotonic()
        (report,) = town.tomorrow()
        assert time.monotonic() - began < 3
        assert report.status == "waiting"
        assert rough.kept == []
    with Rough("good") as good:
        town.deliver = by_smtp(good.port)
        (report,) = town.tomorrow()
        assert report.status == "sent"
        assert len(good.kept) == 1


@pytest.mark.parametrize("manner", ["drop after dot", "mute after dot", "gibberish after dot"])
def test_what_breaks_after_the_dot_is_not_sent_again_but_shown(town, manner):
    found = town.subscribe()
    town.publish("a")
    with Rough(manner) as rough:
        town.deliver = by_smtp(rough.port, stage_seconds=0.15, total_seconds=0.6)
        (report,) = town.tomorrow()
        assert report.status == "unknown"
        assert len(rough.kept) == 1
    with Rough("good") as good:
        town.deliver = by_smtp(good.port)
        assert town.tomorrow() == []
        town.publish("b")
        assert [report.status for report in town.tomorrow()] == ["sent"]
        assert b"Title of a." not in good.kept[0]
    ((after, upto, _),) = town.book.missed(found)
    assert [item.slug for item in town.news.between(after, upto, ())] == ["a"]


@pytest.fixture
def certificate(tmp_path):
    """Of 127.0.0.1, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=loopback", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    return cert, context


def test_tls_is_required_and_verified(town, certificate, monkeypatch):
    cert, context = certificate
    with_news(town)
    with server() as (handler, port):  # offers no TLS
        town.deliver = by_smtp(port, security="starttls")
        (report,) = town.tomorrow()
        assert (report.status, handler.kept) == ("waiting", [])
    with server(tls_context=context) as (handler, port):
        town.deliver = by_smtp(port, security="starttls")
        (report,) = town.tomorrow()
        assert (report.status, handler.kept) == ("waiting", [])
        assert "certificate" in report.told.lower()
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        (report,) = town.tomorrow()
        assert report.status == "sent"
    with server(ssl_context=context) as (handler, port):
        town.publish("b")
        town.deliver = by_smtp(port, security="tls")
        (report,) = town.tomorrow()
        assert report.status == "sent"


# --------------------------------------------------------------------------------------------------------------------
# Crashes


def dying(deliver, where):
    """A transport whose process dies `where`; otherwise it does what `deliver` does."""

    def deliver_and_die(message, name, settle):
        if where == "before connecting":
            raise Crash

        def settle_and_die():
            if where == "before settling":
                raise Crash
            agreed = settle()
            if where == "after settling":
                raise Crash
            return agreed

        sent = deliver(message, name, settle_and_die)
        if where == "after the reply":
            raise Crash
        return sent

    return deliver_and_die


@pytest.mark.parametrize(
    ("where", "at_server", "row"),
    [
        ("before connecting", 1, "sent"),
        ("before settling", 1, "sent"),
        ("after settling", 0, "unknown"),  # nobody can tell it from the next one
        ("after the reply", 1, "unknown"),
    ],
)
def test_a_crash_sends_nothing_twice_and_loses_nothing_unseen(town, where, at_server, row):
    found = town.subscribe()
    town.publish("a")
    with server() as (handler, port):
        town.deliver = dying(by_smtp(port), where)
        with pytest.raises(Crash):
            town.tomorrow()
        town.restart()
        town.deliver = by_smtp(port)
        town.round()
        town.tomorrow()
        town.restart()
        town.tomorrow()
        assert len(handler.kept) == at_server
    assert town.rows() == [row]
    assert bool(town.book.missed(found)) == (row == "unknown")


@pytest.mark.parametrize(("manner", "mails_after"), [("mute at RCPT", 1), ("mute after dot", 0)])
def test_a_process_that_is_killed_leaves_the_next_one_to_go_on(town, monkeypatch, manner, mails_after):
    town.now = datetime.now(UTC) - 2 * DAY
    town.subscribe(fields=["causality"])
    for name, value in {"HOST": "127.0.0.1", "SECURITY": "none", "SENDER": "digest@papers.example.org"}.items():
        monkeypatch.setenv(f"WORKINGPAPERS_SMTP_{name}", value)
    command = [sys.executable, "-m", "workingpapers", "digest", "--store", str(town.settings.store)]
    with Rough(manner) as rough:
        monkeypatch.setenv("WORKINGPAPERS_SMTP_PORT", str(rough.port))
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        assert rough.is_mute.wait(20)
        process.kill()
        process.wait()
    with Rough("good") as good:
        monkeypatch.setenv("WORKINGPAPERS_SMTP_PORT", str(good.port))
        for _ in range(2):
            assert main(command[3:]) == 0
        assert len(good.kept) == mails_after
    assert town.rows() == ["sent" if mails_after else "unknown"]


def test_a_crash_while_the_outbox_is_written_leaves_one_file(town):
    town.subscribe()
    town.publish("a")
    outbox = Outbox(town.settings.outbox)
    for where in ("before connecting", "after the reply"):
        town.deliver = dying(outbox, where)
        with pytest.raises(Crash):
            town.tomorrow()
        town.restart()
    town.deliver = outbox
    town.round()
    assert len(town.mails()) == 1
    assert town.rows() == ["sent"]


def test_an_outbox_that_cannot_be_written_is_tried_again(town):
    town.subscribe()
    town.publish("a")
    town.settings.outbox.write_text("a file stands where the directory should be")
    (report,) = town.tomorrow()
    assert report.status == "waiting"
    town.settings.outbox.unlink()
    (report,) = town.tomorrow()
    assert report.status == "sent"


def test_one_process_sends_at_a_time(town):
    town.subscribe()
    town.publish("a")
    outbox, seen = Outbox(town.settings.outbox), []

    def deliver(message, name, settle):
        other = State(town.settings.state)
        postman = Postman(town.settings, other, News(other, town.settings.store), Subscribers(other), outbox)
        seen.append(postman.round(town.content, town.now))
        other.close()
        return outbox(message, name, settle)

    town.deliver = deliver
    assert len(town.tomorrow()) == 1
    assert seen == [[]]
    assert len(town.mails()) == 1


def test_leaving_in_the_last_moment_still_counts(town):
    found = town.subscribe()
    town.publish("a")
    with server() as (handler, port):
        real = by_smtp(port)

        def deliver(message, name, settle):
            def leave_first():
                town.book.unsubscribe(found, town.now)
                return settle()

            return real(message, name, leave_first)

        town.deliver = deliver
        (report,) = town.tomorrow()
        assert report.status == "withdrawn"
        assert handler.kept == []


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.sampled_from(["causality", "training"])),
        st.tuples(st.just("days"), st.integers(1, 8)),
        st.tuples(st.just("minutes"), st.integers(1, 400)),
        st.tuples(st.just("server"), st.sampled_from([
            "good", "connect", "recipient", "refuses", "before connecting", "before settling", "after settling",
            "after the reply", "lost",
        ])),
        st.tuples(st.just("change"), st.sampled_from(["daily", "weekly"])),
        st.tuples(st.just("restart"), st.none()),
    ),
    max_size=25,
)  # fmt: skip
UNSURE = {"after settling", "after the reply", "lost"}


@given(events=EVENTS)
@hypothesis_settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_nothing_goes_twice_and_nothing_is_lost_whatever_happens(tmp_path_factory, events):
    got = Counter()

    def accept(message, name, settle):
        if not settle():
            return Sent("withdrawn")
        for slug in set(re.findall(r"Title of (p\d+)\.", text_of(message))):
            got[message["To"], slug] += 1
        return Sent("sent")

    def deliver(message, name, settle):
        match manner:
            case "connect" | "recipient":
                return Sent("later", manner, "421")
            case "refuses":
                return Sent("later" if settle() else "withdrawn", "dot", "451")
            case "lost":
                accept(message, name, settle)
                return Sent("unknown", "dot")
        return dying(accept, manner)(message, name, settle)

    town = Town(tmp_path_factory.mktemp("town"), deliver)
    manner, published = "good", []
    people = {
        "ada@example.org": town.subscribe("ada@example.org", [], "daily"),
        "bob@example.org": town.subscribe("bob@example.org", ["causality"], "weekly"),
    }

    def round_or_crash():
        try:
            town.round()
        except Crash:
            town.restart()

    for what, value in events:
        if what == "publish":
            published.append((f"p{len(published)}", value))
            town.publish(*published[-1])
        elif what == "days":
            town.now += value * DAY
        elif what == "minutes":
            town.now += timedelta(minutes=value)
        elif what == "server":
            manner = value
        elif what == "change":
            ada = people["ada@example.org"]
            town.book.change(ada, replace(ada.choice, rhythm=value), town.now)
        else:
            town.restart()
        round_or_crash()
    manner = "good"
    for _ in range(20):
        town.now += DAY
        town.round()
    for address, person in people.items():
        missed = {
            item.slug for after, upto, _ in town.book.missed(person) for item in town.news.between(after, upto, ())
        }
        for slug, field in published:
            if person.choice.fields and field not in person.choice.fields:
                assert got[address, slug] == 0
            elif UNSURE.isdisjoint(value for _, value in events):
                assert got[address, slug] == 1
            else:
                assert got[address, slug] <= 1
                assert got[address, slug] == 1 or slug in missed
    town.state.close()


# --------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_sends_what_is_due(toy, tmp_path, monkeypatch, capsys):
    for name in [name for name in os.environ if name.startswith("WORKINGPAPERS_SMTP_")]:
        monkeypatch.delenv(name)
    town = Town(tmp_path)
    town.now = datetime.now(UTC) - 8 * DAY
    town.subscribe("ada@example.org", ["optimization"], "weekly")
    town.state.close()
    assert main(["digest", "--dry-run"]) == 0
    assert "ada@example.org  (2 items)" in capsys.readouterr().out
    assert town.mails() == []
    assert main(["digest", "--json", "--address", "https://papers.example.org"]) == 0
    assert '"status": "sent"' in capsys.readouterr().out
    assert main(["digest"]) == 0
    assert capsys.readouterr().out == ""
    (sent,) = town.mails()
    assert "A Toy & Its <Claims>" in text_of(sent)
    assert "https://papers.example.org/unsubscribe/" in text_of(sent)
    monkeypatch.setenv("WORKINGPAPERS_SMTP_HOST", "127.0.0.1")
    assert main(["digest"]) == 2
    assert "WORKINGPAPERS_SMTP_SENDER" in capsys.readouterr().err
