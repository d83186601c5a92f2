"""Serving the page until it is told to stop."""

from __future__ import annotations

import signal
import socket
import sys
from contextlib import closing, suppress
from dataclasses import replace

from workingpapers.desk.page.settings import Settings

BACKLOG = 2048  # connections that wait to be accepted


def serve(settings: Settings) -> None:
    """Answer requests at `settings.host` and `settings.port` until Ctrl-C or SIGTERM.

    Parameters
    ----------
    settings : port 0 takes a free one; the first line on the standard error says which.

    Raises
    ------
    ImportError : the extra `page` is not installed.
    OSError : the port is taken, or the host is not one of this machine.
    """
    import uvicorn

    from workingpapers.desk.page.app import create_app

    sys.setswitchinterval(0.001)  # answers that are ready do not wait long for pages that are being rendered
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's way of Ctrl-C
    with suppress(KeyboardInterrupt), closing(_listen(settings.host, settings.port)) as listening:
        if settings.port == 0:
            port = listening.getsockname()[1]
            address = settings.address
            if address.endswith(":0"):  # it was not given
                address = f"{address.removesuffix(':0')}:{port}"
            settings = replace(settings, port=port, address=address)
        app = create_app(settings)
        config = uvicorn.Config(
            app,
            http="h11",  # the one that limits the size of headers
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=3,
            limit_concurrency=1_000,
            h11_max_incomplete_event_size=32_768,
        )
        print(f"Working Papers at {settings.address} (Ctrl-C to stop)", file=sys.stderr, flush=True)
        server = uvicorn.Server(config)
        app.state.site.is_closing = lambda: server.should_exit
        server.run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as opened:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(where)
            opened.listen(BACKLOG)
            return socket.socket(fileno=opened.detach())
    except OSError as trouble:
        raise OSError(f"cannot listen at {host}, port {port}: {trouble.strerror}; choose others with --host and --port"
                      ) from trouble  # fmt: skip
