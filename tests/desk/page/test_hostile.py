"""Strangers' input: 10,000 generated titles, listings and form inputs leave no script, no error and no changed row."""

import email
import email.policy
import json
import random
import sqlite3
from contextlib import closing
from html.parser import HTMLParser
from urllib.parse import quote, urlencode

import httpx
import pytest

from workingpapers.desk.page import subscriptions
from workingpapers.desk.page.app import create_app
from workingpapers.desk.page.guard import HEADER

from .conftest import finished, served, token_in

OURS = "http://127.0.0.1:8600"
TITLES, INPUTS = 8_000, 2_000
COUNTED = ("/import", "/api/import")  # attempts are counted; of what was tried nothing is kept
AT_ONCE = 1_000  # titles of one listing

BITS = [
    *("<script>pwned()</script>", "<script src=//evil.example/x.js>", "</title><script>pwned()</script>", "<ScRiPt/x>"),
    *("<img src=x onerror=pwned()>", "<svg/onload=pwned()>", "<body onload=pwned()>"),
    *("<details open ontoggle=pwned()>"),
    *("\" onmouseover=\"pwned()", "' autofocus onfocus='pwned()", "`onclick=pwned()`", "\"><script>pwned()</script>"),
    *("javascript:pwned()", "JaVaScRiPt:pwned()", "java\tscript:pwned()", "data:text/html,<script>pwned()</script>"),
    *("<a href=javascript:pwned()>x</a>", "<iframe srcdoc='<script>pwned()</script>'>", "<base href=//evil.example/>"),
    *("<style>*{display:none}</style>", "<p style='position:fixed'>", "<form action=//evil.example>"),
    *("<!--", "-->", "]]>"),
    *("<meta http-equiv=refresh content='0;url=//evil.example'>", "<math><mi xlink:href=javascript:pwned()>", "<mark>"),
    *("&lt;script&gt;pwned()&lt;/script&gt;", "&#60;script&#62;pwned()&#60;/script&#62;"),
    *("&#x3c;img src=x&#x3e;", "&amp;"),
    *("{{ 7331 * 7 }}", "{{ config }}", "{% include '/etc/passwd' %}", "${7331*7}", "<%= 7331*7 %>"),
    *("#{7331*7}", "{# no #}", "}}"),
    *("' OR 1=1 --", "'; DROP TABLE cells; --", "\"; DELETE FROM runs; --", "%' UNION SELECT value FROM secrets --"),
    *("NEAR(a b, 5)", "title:*", "\"unbalanced", "a AND OR NOT b", "a* OR b*", "{title abstract}: x"),
    *("^a", "a + b", "-"),
    *("../../../etc/passwd", "..\\..\\windows", "/etc/passwd", "%2e%2e%2f", "file:///etc/passwd", "toy/../rope", "%00"),
    *("\u202eevil\u202c", "\u2066x\u2069", "\u200b", "\ufeff", "e" + "\u0301" * 40, "\U000e0041", "ﷺ"),
    *("𝕏", "İ", "ß", "😀"),
    *("=cmd|' /C calc'!A0", "@SUM(1+1)", "+1", "http://evil.example/?q=", "page-token", "hx-get='/x'"),
    *("%s%n%x", "\\", "\\'"),
    *("minimax optimization", "the method", "graph", "a", "x" * 300, "causal discovery", "toy", "Ropes"),
    *("0", "nan", "1e999"),
]  # fmt: skip
WORSE = ["\x00", "\x1b[31m", "\r\nSet-Cookie: evil=1\r\n", "\r\nX-Injected: 1", "\nBcc: all@evil.example",
         "\ud800", "\udfff",
         "\x08", "\x7f", "\x85", "\u2028", "\u2029", "\r", "\n", "\t",
         "<" * 400, "[" * 400, "(" * 400, "A" * 5_000]  # fmt: skip
SAFE_SCHEMES = (
    "/",
    "?",
    "#",
    "https://arxiv.org/",
    "https://github.com/",
    "http://127.0.0.1:8600",
    "data:image/",
    "mailto:",
)
LINKS = ("href", "src", "action", "formaction", "xlink:href", "hx-get", "hx-post", "srcdoc", "poster")
FORBIDDEN = frozenset(["style", "iframe", "object", "embed", "base", "applet", "frame", "frameset", "template", "math"])


def generated(chance, *, worse=False, most=4):
    """One hostile text."""
    bits = BITS + WORSE * 3 if worse else BITS
    return chance.choice(["", " ", "x"]).join(chance.choice(bits) for _ in range(chance.randint(1, most)))


class Strict(HTMLParser):
    """Reads a page as a browser does and notes all that is not ours."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.problems = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in FORBIDDEN:
            self.problems.append(f"<{tag}>")
        if tag == "script" and not (given.get("src") or "").startswith("/assets/"):
            self.problems.append(f"<script {given}>")
        if tag == "meta" and "http-equiv" in given:
            self.problems.append(f"<meta {given}>")
        for name, value in attributes:
            text = "".join((value or "").split()).lower()
            if name.startswith("on") or name == "style" or name.startswith("hx-on"):
                self.problems.append(f"{name} of <{tag}>")
            if name in LINKS and (not text.startswith(SAFE_SCHEMES) or text.startswith("//")):
                self.problems.append(f"{name}={value!r}")

    handle_startendtag = handle_starttag


def clean(answer):
    """Assert that an answer is neither an error of ours nor anybody's script."""
    assert answer.status_code < 500, (answer.request.url, answer.text[:500])
    assert set(answer.headers) & {"x-injected", "bcc"} == set()
    assert all(cookie.startswith("reader=") for cookie in answer.headers.get_list("set-cookie"))
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    if answer.headers.get("content-type", "").startswith("text/html"):
        parser = Strict()
        parser.feed(answer.text)
        parser.close()
        assert not parser.problems, (answer.request.method, answer.request.url, parser.problems[:5])
        assert "51317" not in answer.text  # 7331 * 7
    return answer


def dump(settings):
    """Every row of every table, of whatever file the page keeps."""
    rows = {}
    for path in sorted(settings.store.parent.glob("*.sqlite")):
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            tables = connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT LIKE '%VIRTUAL%'"
            )
            for (name,) in tables.fetchall():
                if name != "imports":  # how often somebody tried
                    rows[path.name, name] = connection.execute(f'SELECT * FROM "{name}"').fetchall()
    return rows


def listing(titles, day):
    """A listing as Hugging Face's interface returns it."""
    return json.dumps(
        [
            {"paper": {"id": f"24{number // 90_000:02}.{number % 90_000 + 10_000}", "title": title,
                       "summary": f"{title} It is said here once more, at some length and in the end with a stop."},
             "publishedAt": f"2026-{day}T00:00:00.000Z"}
            for number, title in enumerate(titles)
        ]
    ).encode()  # fmt: skip


def requests(chance, count):
    """Method, path and what goes with it."""
    for number in range(count):
        text, other = generated(chance, worse=True), generated(chance, worse=True)
        encodable = text.encode("utf-8", "replace").decode()
        segment = quote(encodable, safe="") or "x"
        form = [
            ("/runs", {"slug": text, "what": other, "scale": "smoke", "seed": "0"}),
            ("/runs", {"slug": "toy", "what": text, "scale": other, "seed": text}),
            ("/runs", {"slug": "toy", "what": "gap", "scale": "smoke", "seed": text}),
            ("/subscribe", {"address": f"{text}@example.org"}),
            ("/subscribe", {"address": f"me@{text}", "field": other, "rhythm": "daily"}),
            ("/subscribe", {"address": f"me@example.org{text}", "rhythm": other}),
            ("/import", {"text": text}),
            ("/import", {"text": f"Daily Papers\n\nMar 11\n\n{text}\n\n{other}"}),
            (f"/stars/{segment}", {}),
            (f"/runs/{segment}/cancel", {}),
            (f"/imported/{segment}/remove", {}),
            (f"/subscribe/confirm/{segment}", {}),
            (f"/unsubscribe/{segment}", {"List-Unsubscribe": "One-Click"}),
        ]
        pages = [
            "/?" + urlencode({"q": encodable}),
            "/?" + urlencode({chance.choice(["field", "verdict", "status", "listing", "sort"]): encodable}),
            "/?q=%ff%fe%c0%80" + segment,
            "/?" + "&".join(f"q={segment}" for _ in range(3)),
            *(f"/{place}/{segment}" for place in ("papers", "reference", "assets", "runs", "imported", "api/papers")),
            *(f"/papers/toy/{segment}-smoke.{suffix}" for suffix in ("csv", "parquet")),
            *(f"/papers/{segment}.bib", f"/feeds/{segment}.atom"),
            *(f"/subscribe/confirm/{segment}", f"/unsubscribe/{segment}"),
            "/api/search?" + urlencode({"q": encodable, "field": other.encode("utf-8", "replace").decode()}),
        ]  # fmt: skip
        if number % 2:
            yield "GET", chance.choice(pages)[:8_000], None
        else:
            path, fields = chance.choice(form)
            if path.startswith(("/runs", "/subscribe", "/stars")) and chance.random() < 0.3:
                yield "POST", "/api" + path.replace("/subscribe", "/subscriptions")[:4_000], json.dumps(fields).encode()
            else:
                given = {name: value.encode("utf-8", "replace") for name, value in fields.items()}
                yield "POST", path[:8_000], given


async def told(app, calls, settings):
    """What the page answers, one call after the other; `changed` says which of them left other rows."""
    answers = []
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    watched = {}
    async with httpx.AsyncClient(transport=transport, base_url=OURS) as client:
        token = token_in((await client.get("/subscribe")).text)
        for method, path, given in calls:
            before = _versions(settings, watched)
            if given is None:
                answer = await client.get(path)
            elif isinstance(given, bytes):
                headers = {HEADER: token, "content-type": "application/json"}
                answer = await client.post(path, content=given, headers=headers)
            else:
                answer = await client.post(path, data=given, headers={HEADER: token})
            answers.append((answer, method != "GET", _versions(settings, watched) != before))
    for connection in watched.values():
        connection.close()
    return answers


def _versions(settings, watched):
    """Numbers that change when somebody commits to one of the files of the page."""
    for path in settings.store.parent.glob("*.sqlite"):
        if path not in watched:
            watched[path] = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    return {path: connection.execute("PRAGMA data_version").fetchone() for path, connection in watched.items()}


def test_hostile_inputs_leave_no_script_no_error_and_no_row(settings, monkeypatch):
    monkeypatch.setattr(subscriptions.Desk, "wake", lambda desk: None)
    app = create_app(settings)
    try:
        opened = [("GET", path, None) for path in ("/", "/?q=x", "/runs", "/imported", "/feeds/all.atom")]
        finished(told(app, opened, settings))
        answers = finished(told(app, requests(random.Random(7), INPUTS), settings))
    finally:
        app.state.site.close()
    taken = 0
    for answer, is_change, has_changed in answers:
        clean(answer)
        if answer.status_code >= 400 and answer.request.url.path not in COUNTED:
            assert not has_changed, (answer.request.method, answer.request.url, answer.status_code)
        taken += is_change and answer.status_code < 400
    assert taken < 100  # such as me@example.org, which is no mischief
    assert sum(answer.status_code < 400 for answer, *_ in answers) > INPUTS / 10  # the generator gets past the door


def test_a_refused_listing_changes_no_row(client, token, settings):
    client.get("/?q=x")
    chance = random.Random(3)
    before = dump(settings)
    for number in range(20):
        bad = [
            listing([generated(chance), generated(chance) + "\ud800"], "03-11"),
            listing([generated(chance), "\x00"], "03-11"),
            listing([generated(chance)], "03-11")[:-1],
            b"[" * 100_000,
            b'{"dailyPapers": ' * 2_000,
            b"<html>" + b"<div>" * 50_000,
            b"\xff\xfe<\x00s\x00c\x00r\x00i\x00p\x00t\x00>\x00",
            generated(chance, worse=True).encode("utf-8", "replace"),
            b"PK\x03\x04" + b"\x00" * 1_000,
            b"\x1f\x8b" + b"\x00" * 1_000,
        ][number % 10]
        name = chance.choice(["../../x.json", "x.html", "\r\nX-Injected: 1", "a" * 300, "<script>pwned()</script>"])
        answer = clean(client.post("/import", files={"page": (name, bad)}, headers={HEADER: token}))
        assert 400 <= answer.status_code < 500, bad[:100]
    assert dump(settings) == before


@pytest.mark.timeout(120)
def test_hostile_titles_are_shown_and_do_nothing(client, token, settings, tab):
    """Eight listings of a thousand titles, imported, searched for and shown; in the end by a real browser."""
    chance = random.Random(11)
    titles = list(dict.fromkeys(f"{generated(chance)} {number}"[:340] for number in range(TITLES)))
    for part in range(0, TITLES, AT_ONCE):
        page = listing(titles[part : part + AT_ONCE], f"03-{part // AT_ONCE + 1:02}")
        answer = clean(client.post("/import", files={"page": ("x.json", page)}, headers={HEADER: token}))
        assert answer.status_code == 200, answer.text[-2_000:]
    shown = 0
    for part in range(TITLES // AT_ONCE):
        for number in (1, 7, 20):
            answer = clean(client.get(f"/imported/Mar-{part + 1}?page={number}"))
            shown += answer.text.count("pwned()")
    for bit in BITS:
        shown += clean(client.get("/", params={"q": bit})).text.count("pwned()")
        clean(client.get("/", params={"q": bit}, headers={"hx-request": "true"}))
        found = client.get("/api/search", params={"q": bit})
        assert found.status_code < 500
    assert shown > 1_000  # they are there, as text

    with served(settings) as address:
        tab.on("dialog", lambda dialog: pytest.fail(dialog.message))
        tab.add_init_script("window.hits = 0; window.pwned = () => { window.hits += 1; };")
        for path in (
            "/?q=script",
            "/?q=onerror",
            "/imported/Mar-1",
            "/imported/Mar-8?page=20",
            "/?q=%3Cscript%3Epwned()",
        ):
            tab.goto(address + path)
            assert "pwned()" in tab.inner_text("main")
            assert tab.evaluate("window.hits") == 0
            assert tab.locator("main script, main iframe, main style, main [onerror], main img").count() == 0


def test_hostile_addresses_make_no_other_mail(client, token, settings):
    """Whatever mail leaves goes to one address, the one that was typed, and has no headers of strangers."""
    chance = random.Random(5)
    for number in range(60):
        text = chance.choice(WORSE + BITS)
        address = f"me{number}@example.org"
        tried = chance.choice(
            [f"{address}{text}", f"{text}{address}", f"{address}, {text}@example.org", f"<{text}>{address}"]
        )
        answer = client.post("/subscribe", data={"address": tried.encode("utf-8", "replace")}, headers={HEADER: token})
        clean(answer)
    assert client.post("/subscribe", data={"address": "me@example.org"}, headers={HEADER: token}).status_code in (
        200,
        429,
    )
    for path in settings.outbox.glob("*.eml"):
        mail = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
        assert len(mail.get_all("to")) == 1
        assert len(mail["to"].addresses) == 1
        assert mail.get_all("bcc") is None
        assert mail["x-injected"] is None


def test_hostile_headers_are_no_error(client):
    chance = random.Random(9)
    names = ["if-none-match", "if-modified-since", "accept", "cookie", "referer", "hx-request",
    "hx-trigger-name", "range",
             "last-event-id", "content-type", "accept-language", "x-forwarded-for", "hx-current-url"]  # fmt: skip
    values = [
        "Mon, 01 Jan 2024 00:00:00 +99999999999999",
        "Mon, 01 Jan 0000 00:00:00 GMT",
        "bytes=-1",
        "a" * 3_000,
        '"',
        "*",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "application/json; charset=no",
        "reader=x; reader=y",
    ]
    for number in range(300):
        value = (chance.choice(values) if number % 2 else generated(chance)).encode("utf-8", "replace")
        headers = {chance.choice(names): value.replace(b"\n", b" ").replace(b"\r", b" ")}
        path = chance.choice(
            ["/", "/?q=x", "/papers/toy", "/feeds/all.atom", "/stars/toy", "/import", "/api/papers", "/runs/1/events"]
        )
        method = chance.choice(["GET", "POST", "HEAD"])
        clean(client.request(method, path, headers=headers, content=b"x=1" if method == "POST" else None))
