"""Mail: addresses, messages, and handing a message to a server so that it is known what became of it.

A message that a server takes cannot be taken back, and a connection can die at any moment. Only one moment leaves open
whether the server has the message: from the dot that ends it until the reply (RFC 5321, 4.2.5 and 6.1). Before the dot
the server must not deliver, after the reply it has said what it did. So `settle` is called immediately before the dot:
who calls writes down that the message may be out from here on.
"""

from __future__ import annotations

import ipaddress
import os
import re
import selectors
import smtplib
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from workingpapers.desk.page.settings import LOOPBACK, Settings, Smtp

STAGE_SECONDS = 20.0  # for every answer of the server
TOTAL_SECONDS = 120.0  # for one message
ADDRESS_LIMIT = 254  # characters, RFC 5321
PORTS = {"starttls": 587, "tls": 465, "none": 25}

Stage = Literal["connect", "hello", "tls", "login", "sender", "recipient", "data", "dot"]
POLICY = SMTP.clone(cte_type="7bit")  # every server can carry it

_LOCAL = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


class BadAddress(ValueError):
    """A text that is no mail address, or one that cannot be written to; one sentence saying why."""


def mail_address(text: str) -> str:
    """The address as mail can be sent to it: its domain in ASCII and lower case.

    Raises
    ------
    BadAddress : it is none.
    """
    given = text.strip(" ")
    local, at, domain = given.rpartition("@")
    if not at or not local or not domain or "@" in local:
        raise BadAddress("A mail address looks like name@example.org.")
    if len(given) > ADDRESS_LIMIT or len(local) > 64:
        raise BadAddress(f"A mail address has at most {ADDRESS_LIMIT} characters, 64 before the @.")
    if not local.isascii():
        raise BadAddress("Addresses with letters beyond ASCII before the @ are not supported.")
    if not _LOCAL.fullmatch(local):
        raise BadAddress("Before the @ of a mail address there may be letters, digits and single dots, no blanks.")
    try:
        name = domain.encode("idna").decode("ascii").lower()
    except UnicodeError:
        name = ""
    labels = name.split(".")
    if len(labels) < 2 or labels[-1].isdigit() or not all(_LABEL.fullmatch(label) for label in labels):
        raise BadAddress("After the @ of a mail address stands a domain, like example.org.")
    if len(local) + 1 + len(name) > ADDRESS_LIMIT:
        raise BadAddress(f"A mail address has at most {ADDRESS_LIMIT} characters, 64 before the @.")
    return f"{local}@{name}"


def smtp_from_environment(variables: Mapping[str, str] = os.environ) -> Smtp | None:
    """The mail server of $WORKINGPAPERS_SMTP_HOST, _PORT, _USER, _PASSWORD, _SECURITY and _SENDER; None without a host.

    Raises
    ------
    ValueError : a variable has no sensible value; the message names it.
    """

    def value(name: str) -> str:
        return variables.get(f"WORKINGPAPERS_SMTP_{name}", "").strip()

    host = value("HOST")
    if not host:
        return None
    security = value("SECURITY").lower() or "starttls"
    if security not in PORTS:
        raise ValueError(f"WORKINGPAPERS_SMTP_SECURITY must be one of {', '.join(PORTS)}, got {security!r}")
    port = value("PORT") or str(PORTS[security])
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"WORKINGPAPERS_SMTP_PORT must be a number up to 65535, got {port!r}")
    if value("USER") and security == "none" and host not in LOOPBACK:
        raise ValueError("WORKINGPAPERS_SMTP_SECURITY=none would send the password in clear over the network")
    try:
        sender = mail_address(value("SENDER") or value("USER"))
    except BadAddress as wrong:
        raise ValueError(f"WORKINGPAPERS_SMTP_SENDER must be the address that mails come from: {wrong}") from None
    password = variables.get("WORKINGPAPERS_SMTP_PASSWORD", "")
    return Smtp(host, int(port), value("USER"), password, security, sender)


def compose(
    settings: Settings, *, to: str, subject: str, text: str, html: str, name: str, sent: datetime, unsubscribe: str = ""
) -> EmailMessage:
    """A mail with a plain and an HTML part.

    Parameters
    ----------
    to : of `mail_address`.
    name : of the message, letters and digits that no other message has.
    unsubscribe : the address that ends the subscription by one POST (RFC 8058), "" when there is none to end.

    Raises
    ------
    ValueError : a header would hold a line break or another control character.
    """
    host = urlsplit(settings.address).hostname or "localhost"
    domain = host if "." in host and not _is_number(host) else "workingpapers.localhost"
    sender = settings.smtp.sender if settings.smtp else f"digest@{domain}"
    for given in (to, subject, name, unsubscribe, sender):
        if _CONTROL.search(given):
            raise ValueError(f"a header must not hold control characters, got {given!r}")
    message = EmailMessage(policy=POLICY)
    message["From"] = Address("Working Papers", addr_spec=sender)
    message["To"] = Address(addr_spec=to)
    message["Subject"] = subject
    message["Date"] = sent
    message["Message-ID"] = f"<{name}@{sender.rpartition('@')[2]}>"
    message["Auto-Submitted"] = "auto-generated"
    if unsubscribe:
        message["List-Id"] = f"Working Papers <digest.{domain}>"
        # mail programs send the POST only to an https address, and only when the mail server has signed both headers
        message["List-Unsubscribe"] = f"<{unsubscribe}>"
        message["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    message.set_content(text)
    message.add_alternative(html, subtype="html")
    return message


@dataclass(frozen=True)
class Sent:
    """What became of a message.

    Attributes
    ----------
    result : "sent"; "later" when the server surely does not have it; "never" when it also said that it will not take
        it; "unknown" when the connection broke between the final dot and the reply; "withdrawn" when `settle` said no.
    stage : how far it came.
    told : what the server or the system said.
    """

    result: Literal["sent", "later", "never", "unknown", "withdrawn"]
    stage: Stage = "dot"
    told: str = ""

    @property
    def is_of_server(self) -> bool:
        """Whether the next message would fare alike, whoever it is for."""
        return self.result == "later" and self.stage in ("connect", "hello", "tls", "login", "sender")


class Transport(Protocol):
    """Hands over a message named `name`; `settle` is called right before it may be out for ever, and may say no."""

    def __call__(self, message: EmailMessage, name: str, settle: Callable[[], bool]) -> Sent: ...


class Outbox:
    """Writes messages as .eml files, for a page without a mail server.

    The file is named after the message, so that writing it again after a crash replaces it: nothing needs settling.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, message: EmailMessage, name: str, settle: Callable[[], bool]) -> Sent:
        if not re.fullmatch(r"[0-9a-z-]{1,80}", name):
            raise ValueError(f"not the name of a message: {name!r}")
        partial = self._directory / f".{name}.part"
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(partial, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(message.as_bytes())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._directory / f"{name}.eml")
        except OSError as full:
            return Sent("later", "connect", f"{full.strerror}: the outbox cannot be written")
        return Sent("sent", told="written to the outbox")


class SmtpServer:
    """Hands messages to a mail server, one connection for each.

    Parameters
    ----------
    stage_seconds : for every answer of the server.
    total_seconds : for a whole message; a server that answers letter by letter is left then.
    """

    def __init__(
        self, smtp: Smtp, *, stage_seconds: float = STAGE_SECONDS, total_seconds: float = TOTAL_SECONDS
    ) -> None:
        self._smtp = smtp
        self._stage_seconds = stage_seconds
        self._total_seconds = total_seconds

    def __call__(self, message: EmailMessage, name: str, settle: Callable[[], bool]) -> Sent:
        finished = threading.Event()
        session = self._session()
        threading.Thread(target=self._cut_off, args=(session, finished), daemon=True).start()
        try:
            return self._send(session, message, settle)
        finally:
            finished.set()
            session.close()

    def _send(self, session: Any, message: EmailMessage, settle: Callable[[], bool]) -> Sent:
        stage: Stage = "connect"
        try:
            _expect(220, session.connect(self._smtp.host, self._smtp.port))
            stage = "hello"
            session.ehlo_or_helo_if_needed()
            stage = "tls"
            if self._smtp.security == "starttls":
                session.starttls(context=ssl.create_default_context())
                session.ehlo_or_helo_if_needed()
            stage = "login"
            if self._smtp.user:
                session.login(self._smtp.user, self._smtp.password)
            stage = "sender"
            _expect(250, session.mail(str(message["From"].addresses[0].addr_spec)))
            stage = "recipient"
            _expect(250, session.rcpt(str(message["To"].addresses[0].addr_spec)))
            stage = "data"
            _expect(354, session.docmd("DATA"))
            session.send(_stuffed(message.as_bytes()))
        except smtplib.SMTPResponseException as refused:
            is_final = refused.smtp_code >= 500 and stage in ("recipient", "data")
            return Sent("never" if is_final else "later", stage, _told(refused))
        except (OSError, smtplib.SMTPException) as broken:
            return Sent("later", stage, _shown(str(broken) or type(broken).__name__))
        if not settle():
            return Sent("withdrawn", stage)
        try:
            if _has_spoken(session.sock):  # before its turn: it is leaving, and never gets the dot
                raise smtplib.SMTPResponseException(*session.getreply())
            session.send(b".\r\n")
        except smtplib.SMTPResponseException as refused:
            return Sent("later", "dot", _told(refused))
        except (OSError, smtplib.SMTPException) as broken:  # not all of the dot has left this machine
            return Sent("later", "dot", _shown(str(broken) or type(broken).__name__))
        try:
            code, told = session.getreply()
        except (OSError, smtplib.SMTPException) as broken:
            return Sent("unknown", "dot", _shown(str(broken) or type(broken).__name__))
        with suppress(OSError, smtplib.SMTPException):  # the message is out; how we part does not matter
            session.docmd("QUIT")
        words = _told(smtplib.SMTPResponseException(code, told))
        if 200 <= code < 300:
            return Sent("sent", "dot", words)
        if not 400 <= code < 600:  # no SMTP: whether it has the message nobody can tell
            return Sent("unknown", "dot", words)
        return Sent("never" if code >= 500 else "later", "dot", words)

    def _session(self) -> Any:
        # with a name of its own it does not ask the name service, which may stall
        name = socket.gethostname()
        session: Any
        if self._smtp.security == "tls":
            context = ssl.create_default_context()
            session = smtplib.SMTP_SSL(local_hostname=name, timeout=self._stage_seconds, context=context)
        else:
            session = smtplib.SMTP(local_hostname=name, timeout=self._stage_seconds)
        session._host = self._smtp.host  # what the certificate must name; `connect` does not set it
        return session

    def _cut_off(self, session: Any, finished: threading.Event) -> None:
        """End the conversation when its time is up, wherever it is."""
        wait = self._total_seconds
        while not finished.wait(wait):
            wait = 0.1  # again, until the other thread has noticed
            with suppress(OSError, AttributeError):  # it has no socket yet, or no more
                session.sock.shutdown(socket.SHUT_RDWR)


def transport(settings: Settings) -> Transport:
    """The mail server of the settings, or the outbox without one."""
    return SmtpServer(settings.smtp) if settings.smtp else Outbox(settings.outbox)


def _has_spoken(connection: socket.socket) -> bool:
    """Whether something has arrived that was not read yet, if only the end of the connection."""
    with selectors.DefaultSelector() as looking:
        looking.register(connection, selectors.EVENT_READ)
        return bool(looking.select(0))


def _expect(wanted: int, reply: tuple[int, bytes]) -> None:
    code, told = reply
    if code != wanted and not (wanted == 250 and code == 251):  # 251: the server forwards
        raise smtplib.SMTPResponseException(code, told)


def _told(refused: smtplib.SMTPResponseException) -> str:
    said = refused.smtp_error
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    return _shown(f"{refused.smtp_code} {text}")


def _shown(text: str) -> str:
    """A line of the server as it may stand in a table: short, without control characters."""
    return " ".join(_CONTROL.sub(" ", text).split())[:200]


def _stuffed(message: bytes) -> bytes:
    """The message as DATA wants it: lines end in CRLF, and none of them is a lone dot."""
    lines = re.sub(rb"\r\n|\r|\n", b"\r\n", message)
    return re.sub(rb"(?m)^\.", b"..", lines).removesuffix(b"\r\n") + b"\r\n"


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
