"""What every request passes first, looked at as an attacker would: names, origins, tokens, sizes, slowness, errors."""

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from fastapi import Request
from fastapi.routing import iter_route_contexts
from starlette.testclient import TestClient

from workingpapers.desk.page import guard
from workingpapers.desk.page.app import create_app
from workingpapers.desk.page.render import TOKEN
from workingpapers.desk.page.settings import Settings

from .conftest import finished, served, token_in

FORM = "application/x-www-form-urlencoded"
OURS = "http://127.0.0.1:8600"
COMMAND = str(Path(sys.executable).with_name("workingpapers"))


@pytest.fixture
def app(settings, monkeypatch):
    """The page with routes more that take a form, take an upload, fail."""
    monkeypatch.setattr(guard, "UPLOADS", guard.UPLOADS | {"/import/try"})
    made = create_app(settings)

    @made.post("/try")
    async def taken(request: Request) -> dict[str, int]:
        return {"fields": len(await request.form())}

    @made.post("/import/try")
    async def uploaded(request: Request) -> dict[str, int]:
        return {"fields": len(await request.form())}

    @made.get("/broken")
    @made.get("/api/broken")
    def broken() -> None:
        raise RuntimeError("a secret of the house")

    return made


@pytest.fixture
def calm(app):
    """A client that gets the answer to an error, as a browser would."""
    with TestClient(app, base_url=OURS, raise_server_exceptions=False) as found:
        yield found


def said(address, text, *, until=b"\r\n\r\n", seconds=10.0):
    """What the server answers to these bytes on a bare connection."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(text.encode("latin-1") if isinstance(text, str) else text)
        got = b""
        while until not in got and (more := connection.recv(65_536)):
            got += more
    return got.decode("latin-1")


# ---------------------------------------------------------------------------------------------------------------------
# Host


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:8600", "127.0.0.1:9", "localhost", "LOCALHOST:8600", "localhost.", "[::1]", "[::1]:8600"],
)
def test_answers_under_its_own_names(calm, host):
    assert calm.get("/about", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8600", "127.0.0.1.evil.example", "localhost.evil.example"),  # rebound names
        *("", " ", ".", ":", ":8600", "[]", "[::1", "::1", "[::2]", "0.0.0.0", "[::ffff:127.0.0.1]"),
        *("evil@127.0.0.1", "127.0.0.1@evil.example", "127.0.0.1/unsubscribe/x?", "127.0.0.1#", "127.0.0.1\\x"),
        *(
            "127.0.0.1:port",
            "127.0.0.1:123456",
            "127.0.0.1:",
            "127.0.0.1:80:80",
            "127.0.0.1 evil.example",
            "2130706433",
        ),
    ],
)
def test_answers_under_no_other_name(calm, host):
    answer = calm.get("/about", headers={"host": host})
    assert answer.status_code == 400
    assert "<" not in answer.text
    assert host.strip() not in answer.text or len(host.strip()) < 2


@pytest.mark.parametrize(
    "hosts", ["", "Host: 127.0.0.1\r\nHost: evil.example\r\n", "Host: evil.example\r\nHost: 127.0.0.1\r\n"]
)
def test_wants_exactly_one_host_header(address, hosts):
    assert said(address, f"GET / HTTP/1.1\r\n{hosts}\r\n").startswith("HTTP/1.1 400")
    assert said(address, f"GET / HTTP/1.0\r\n{hosts}\r\n").startswith("HTTP/1.1 400")


@pytest.mark.parametrize(
    "target",
    [
        *("http://evil.example/", "http://127.0.0.1/about", "//evil.example/", "/../../etc/passwd"),
        *("/assets/../../../etc/passwd", "/assets/..%2f..%2fserve.py", "/assets/%2e%2e", "/papers/%00"),
    ],
)
def test_a_target_is_a_path_of_the_page_or_nothing(address, target):
    answer = said(address, f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert re.match(r"HTTP/1.1 40[04]", answer), answer
    assert "evil" not in answer


def test_other_names_are_for_the_operator_to_allow(toy, tmp_path):
    settings = Settings(
        store=tmp_path / "s.sqlite", address="https://Papers.example.org", hosts=("lab.local", "[fe80::1]")
    )
    with TestClient(create_app(settings)) as client:
        for host in ("papers.example.org", "PAPERS.example.org:443", "lab.local", "[fe80::1]:8600"):
            assert client.get("/about", headers={"host": host}).status_code == 200
        assert client.get("/about", headers={"host": "other.example.org"}).status_code == 400
        cookie = client.get("/about", headers={"host": "lab.local"}).headers["set-cookie"]
        assert "Secure" in cookie


@pytest.mark.parametrize(
    "address",
    ["papers.example.org", "ftp://example.org", "http://", "http://a/b", "http://a?b", "http://a#b", "http://me@a",
     "http://a:99999", "http://[::1", "http://a\r\nX: y", "javascript:alert(1)"],
)  # fmt: skip
def test_an_address_is_scheme_name_and_port(tmp_path, address):
    with pytest.raises(ValueError, match="address"):
        Settings(store=tmp_path / "s.sqlite", address=address)


# ---------------------------------------------------------------------------------------------------------------------
# Where a change comes from


@pytest.mark.parametrize(
    ("headers", "is_taken"),
    [
        ({}, True),  # no browser, or one that keeps silent: the token decides
        ({"sec-fetch-site": "same-origin", "origin": OURS}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "same-origin", "origin": "null"}, True),  # the form stands on a page without referrer
        ({"sec-fetch-site": "same-site"}, False),  # another port of this machine
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "anything"}, False),
        ({"origin": OURS}, True),
        ({"origin": "https://127.0.0.1:8600"}, True),  # a proxy took the s away
        ({"origin": "http://127.0.0.1:3000"}, False),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": ""}, False),
    ],
)
def test_a_change_comes_from_the_page_itself(calm, headers, is_taken):
    token = token_in(calm.get("/about").text)
    answer = calm.post("/try", data={"token": token}, headers=headers)
    assert answer.status_code == (200 if is_taken else 403), answer.text


def test_every_change_needs_the_token(calm, app):
    calm.get("/about")  # has a cookie, as a reader whose browser is misused would
    tried = set()
    for route in iter_route_contexts(app.routes):
        for method in set(route.methods or ()) - guard.SAFE:
            if route.path.startswith("/unsubscribe/"):
                continue
            path = re.sub(r"\{[^}]*\}", "1", route.path)
            for given in ({}, {"headers": {guard.HEADER: "0" * 64}}, {"data": {guard.FIELD: ""}}):
                answer = calm.request(method, path, **given)
                assert answer.status_code == 403, (method, path, given, answer.text)
            tried.add(f"{method} {path}")
    assert len(tried) >= 6, tried


def test_no_route_escapes_the_token(app):
    """A mounted application, or a plain Starlette route, would not depend on `require_token`."""
    for route in iter_route_contexts(app.routes):
        if not set(getattr(route.original_route, "methods", None) or ["POST"]) <= guard.SAFE:
            dependant = route.original_route.dependant
            assert dependant is not None, route.path


def test_a_token_is_good_for_one_reader_only(calm, app):
    mine = token_in(calm.get("/about").text)
    theirs = token_in(TestClient(app, base_url=OURS).get("/about").text)
    assert mine != theirs
    assert calm.post("/try", data={"token": theirs}).status_code == 403
    assert calm.post("/try", data={"token": mine}).status_code == 200
    assert calm.post("/try", headers={"x-page-token": mine}).status_code == 200
    assert calm.post("/try", files={"token": (None, mine)}).status_code == 200
    assert calm.post("/try", files={"token": ("file.txt", mine)}).status_code == 403
    for wrong in (mine.upper(), mine[:-1], mine + "0", f" {mine}", "é" * 64, "\N{SNOWMAN}"):
        assert calm.post("/try", data={"token": wrong}).status_code == 403
    assert calm.post(f"/try?token={mine}").status_code == 403  # an address is written down in too many places
    calm.cookies.clear()
    assert calm.post("/try", data={"token": mine}).status_code == 403


def test_tokens_are_compared_in_constant_time(calm, monkeypatch):
    compared = []
    real = guard.hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda *both: compared.append(both) or real(*both))
    calm.post("/try", data={"token": "0" * 64})
    assert compared


def test_a_forged_cookie_is_replaced(calm):
    for forged in ("", "x", "0" * 31, "G" * 32, "0" * 33, '"; Path=/', "../../etc/passwd"):
        calm.cookies.clear()
        answer = calm.get("/about", headers={"cookie": f"reader={forged}"})
        assert re.match(
            r"reader=[0-9a-f]{32}; Path=/; Max-Age=\d+; HttpOnly; SameSite=Lax$", answer.headers["set-cookie"]
        )


def test_a_kept_page_carries_the_token_of_whoever_asks(calm):
    tokens = []
    for _ in range(3):
        calm.cookies.clear()
        page = calm.get("/about").text
        tokens.append(token_in(page))
        assert TOKEN not in page
    assert len(set(tokens)) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Bodies


def test_bodies_are_limited_by_what_they_announce(calm):
    token = token_in(calm.get("/about").text)
    assert calm.post("/try", content=b"x", headers={"content-length": str(guard.BODY_LIMIT + 1)}).status_code == 413
    upload = {"content-length": str(guard.UPLOAD_LIMIT + 1)}
    assert calm.post("/import/try", content=b"x", headers=upload).status_code == 413
    for length in ("-1", "1e3", "0x10", "", "9" * 5000, "²"):
        headers = {"content-length": length.encode("latin-1"), "x-page-token": token}
        assert calm.post("/try", content=b"x", headers=headers).status_code in (400, 413), length


@pytest.mark.parametrize(("path", "limit"), [("/try", "BODY_LIMIT"), ("/import/try", "UPLOAD_LIMIT")])
def test_bodies_are_limited_by_what_arrives(calm, monkeypatch, path, limit):
    monkeypatch.setattr(guard, limit, 5_000)
    token = token_in(calm.get("/about").text)

    def body(size):
        yield f"token={token}&rest=".encode()
        for _ in range(size // 1_000):
            yield b"x" * 1_000

    headers = {"content-type": FORM}
    assert calm.post(path, content=body(3_000), headers=headers).status_code == 200
    answer = calm.post(path, content=body(6_000), headers=headers)
    assert answer.status_code == 413
    assert "5,000 bytes" in answer.text


def test_a_chunked_body_without_end_is_cut_off(app, settings, monkeypatch):
    monkeypatch.setattr(guard, "BODY_LIMIT", 5_000)
    with served(settings, app) as address:
        start = f"POST /try HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {FORM}\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer = said(address, start + "7d0\r\n" + "x" * 2_000 + "\r\n" + ("7d0\r\n" + "x" * 2_000 + "\r\n") * 3)
    assert answer.startswith("HTTP/1.1 413")
    assert "connection: close" in answer.lower()


def test_a_slow_body_is_not_waited_for(app, settings, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    start = f"POST /try HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {FORM}\r\nContent-Length: 100\r\n\r\ntoken="
    with served(settings, app) as address:
        started = time.monotonic()
        answer = said(address, start)
        assert time.monotonic() - started < 3
        assert answer.startswith("HTTP/1.1 408")
        assert "connection: close" in answer.lower()
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as dripping:  # a byte now and then does not help
            dripping.sendall(start.encode())
            started = time.monotonic()
            while time.monotonic() - started < 3:
                try:
                    dripping.sendall(b"0")
                except OSError:
                    break
                time.sleep(0.05)
            assert time.monotonic() - started < 2


def test_a_reader_who_leaves_in_the_middle_is_no_error(app, settings, capfd):
    start = f"POST /try HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {FORM}\r\nContent-Length: 100\r\n\r\ntoken="
    with served(settings, app) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as leaving:
            leaving.sendall(start.encode())
        assert "HTTP/1.1 200" in said(address, "GET /about HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert capfd.readouterr().err == ""


def test_long_headers_are_refused(address):
    answer = said(address, "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: " + "x" * 200_000)
    assert answer.startswith("HTTP/1.1 400")


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/about", 200),
        ("GET", "/nothing", 404),
        ("GET", "/papers/nothing", 404),
        ("GET", "/assets/nothing.js", 404),
        ("GET", "/assets/page.js", 200),
        ("GET", "/api/nothing", 404),
        ("POST", "/about", 405),
        ("TRACE", "/about", 405),
        ("POST", "/try", 403),
        ("GET", "/broken", 500),
        ("GET", "/api/broken", 500),
    ],
)
def test_every_answer_carries_the_policy(calm, method, path, status):
    answer = calm.request(method, path)
    assert answer.status_code == status
    assert {name: answer.headers.get(name) for name in guard.HEADERS} == guard.HEADERS
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    if path.startswith("/api/"):
        assert answer.headers["content-type"] == "application/json"


def test_a_refused_request_carries_the_policy_too(calm):
    answer = calm.get("/", headers={"host": "evil.example"})
    assert answer.headers["content-security-policy"] == guard.POLICY


@pytest.mark.parametrize("path", ["/broken", "/api/broken"])
def test_an_error_of_ours_tells_nothing_and_is_logged(app, settings, capfd, path):
    with served(settings, app) as address:
        answer = said(address, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", until=b"never")
    assert answer.startswith("HTTP/1.1 500")
    assert "secret" not in answer
    assert "Traceback" not in answer
    assert "a secret of the house" in capfd.readouterr().err


def test_what_is_refused_is_shown_escaped(calm):
    answer = calm.get("/papers/<script>alert(1)</script>")
    assert "<script>alert" not in answer.text
    token = token_in(calm.get("/about").text)
    body = b'{"\\ud800<script>": 1, "to": "\\udfff"}'
    for route in ("/api/import", "/api/runs", "/import", "/runs", "/subscribe"):
        answer = calm.post(route, content=body, headers={"x-page-token": token, "content-type": "application/json"})
        assert 400 <= answer.status_code < 500, (route, answer.text)
        assert "<script>" not in answer.text or answer.headers["content-type"] == "application/json"


def test_head_is_get_without_the_body(address):
    for path in ("/", "/about", "/assets/htmx.js", "/api/openapi.json"):
        request = f"{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        head, body = said(address, f"HEAD {request}", until=b"never").split("\r\n\r\n", 1)
        assert head.startswith("HTTP/1.1 200")
        assert not body
        assert len(said(address, f"GET {request}", until=b"never")) > len(head) + 100


def test_there_are_no_websockets(app):
    sent = []

    async def try_one():
        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message)

        await app({"type": "websocket", "path": "/", "headers": [], "query_string": b""}, receive, send)

    finished(try_one())
    assert sent == [{"type": "websocket.close", "code": 1008}]


# ---------------------------------------------------------------------------------------------------------------------
# The process


def start(tmp_path, *options):
    """`workingpapers serve`, and the address it says."""
    command = [COMMAND, "serve", "--store", str(tmp_path / "store.sqlite"), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    return process, (re.search(r"http://\S+", line) or [line])[0]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_listens_on_loopback_and_stops_when_told(toy, tmp_path, stop):
    process, address = start(tmp_path, "--port", "0")
    try:
        with urllib.request.urlopen(f"{address}/about", timeout=10) as answer:
            assert answer.status == 200
        port = int(address.rsplit(":", 1)[1])
        assert _listening(process.pid, port) == {"0100007F"}  # 127.0.0.1 and nothing else
        taken = subprocess.run(
            [COMMAND, "serve", "--port", str(port), "--store", str(tmp_path / "s.sqlite")],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert taken.returncode == 2
        assert re.fullmatch(
            rf"workingpapers: cannot listen at 127.0.0.1, port {port}: Address .* in use; .*\n", taken.stderr
        )
        process.send_signal(stop)
        output, errors = process.communicate(timeout=10)
        assert process.returncode == 0
        assert errors == ""
        assert output == ""
    finally:
        process.kill()
        process.communicate()


def _listening(pid, port):
    """Local addresses, in the kernel's hexadecimal, at which anyone listens on this port."""
    found = set()
    for name in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{name}") as table:
            rows = [line.split() for line in table.readlines()[1:]]
        found |= {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
    return found


def test_the_file_of_the_page_is_private(client, settings):
    for path in settings.store.parent.glob(f"{settings.state.name}*"):
        assert not path.stat().st_size or path.stat().st_mode & 0o077 == 0, path
