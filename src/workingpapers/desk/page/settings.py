"""What the page is told when it starts."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from workingpapers.desk.store import store_path

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Smtp:
    """The mail server that takes the digests.

    Attributes
    ----------
    host, port : of the server.
    user, password : to log in with, "" when the server wants none.
    security : "starttls", "tls" from the first byte, or "none".
    sender : address in From.
    """

    host: str
    port: int = 587
    user: str = ""
    password: str = ""
    security: str = "starttls"
    sender: str = ""


@dataclass(frozen=True)
class Settings:
    """What the page is told when it starts.

    Attributes
    ----------
    store : file of the measurements, shared with the command line.
    host, port : where it listens.
    address : the page's own address as its readers see it, without a slash at the end; it stands in feeds and mails.
    hosts : names that a Host header may carry besides those of `address`, of `host` and of the loopback device.
    jobs : worker processes of a check, by default one per core.
    meaning : whether to search by meaning too, where the extra `meaning` is installed; its model takes seconds to load.
    smtp : where mail goes; None writes it to `outbox` as .eml files.
    """

    store: Path
    host: str = "127.0.0.1"
    port: int = 8600
    address: str = ""
    hosts: tuple[str, ...] = ()
    jobs: int | None = None
    meaning: bool = False
    smtp: Smtp | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", (self.address or f"http://{_bracketed(self.host)}:{self.port}").rstrip("/"))
        if not _is_origin(self.address):
            raise ValueError(f"address must look like https://papers.example.org, got {self.address!r}")

    @classmethod
    def default(cls) -> Settings:
        return cls(store=store_path())

    @property
    def state(self) -> Path:
        """File of what belongs to the page alone: runs, stars, subscriptions, its secret. Keep it private."""
        return self.store.with_name(f"{self.store.stem}-page.sqlite")

    @property
    def outbox(self) -> Path:
        """Directory of the mails that no server takes."""
        return self.store.with_name(f"{self.store.stem}-outbox")

    @property
    def secure(self) -> bool:
        """Whether readers come by https, so that cookies may be kept to it."""
        return self.address.startswith("https:")

    @property
    def is_private(self) -> bool:
        """Whether it answers under no name but those of this machine itself: its readers are one person."""
        return self.allowed_hosts <= set(LOOPBACK)

    @property
    def allowed_hosts(self) -> frozenset[str]:
        """Names, without ports and in lower case, that a Host header may carry."""
        named = {urlsplit(self.address).hostname or "", *self.hosts, *LOOPBACK}
        if not _is_any(self.host):
            named.add(self.host)
        return frozenset(name.lower().strip("[]").rstrip(".") for name in named) - {""}


def _is_origin(address: str) -> bool:
    """Scheme, name and port, and nothing else."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not host:
        return False
    return address.lower() == f"{parts.scheme}://{_bracketed(host)}{'' if port is None else f':{port}'}"


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
