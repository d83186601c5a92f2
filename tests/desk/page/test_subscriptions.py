"""Feeds and subscriptions as a reader meets them: over HTTP, with mails as files in the outbox."""

from __future__ import annotations

import email
import email.policy
import re
import time
from datetime import timedelta
from xml.etree import ElementTree

import pytest
from starlette.testclient import TestClient

from workingpapers.desk.catalogue import FIELDS
from workingpapers.desk.page.app import create_app
from workingpapers.desk.page.settings import Settings, Smtp
from workingpapers.desk.page.subscriptions import TOLD, desk_of
from workingpapers.desk.subscribers import LIMITS, PATIENCE

ADA = "ada@example.org"


@pytest.fixture
def desk(client):
    return desk_of(client.app.state.site)


def mails(settings, count=1):
    """The mails in the outbox, once there are this many; the page writes them in the background."""
    deadline = time.monotonic() + 5
    while True:
        files = sorted(settings.outbox.glob("*.eml"), key=lambda file: file.stat().st_mtime_ns)
        if len(files) >= count or time.monotonic() > deadline:
            assert len(files) == count
            return [email.message_from_bytes(file.read_bytes(), policy=email.policy.default) for file in files]
        time.sleep(0.02)


def link_in(message, kind):
    return re.search(rf"/{kind}/[0-9a-f]{{96}}", message.get_body(("plain",)).get_content())[0]


def ask(client, token, address=ADA, **choice):
    return client.post("/subscribe", data={"token": token, "address": address, **choice})


def add_news(state, seen="2026-11-16T09:00:00+00:00"):
    state.write(
        "INSERT INTO news SELECT NULL, 'x', kind, field, slug, 'Fresh', told, summary, arxiv, updated, ?, 0 "
        "FROM news LIMIT 1",
        (seen,),
    )


def subscribed(client, token, settings, **choice):
    """Through asking and confirming; the subscriber's own page."""
    ask(client, token, **choice)
    link = link_in(mails(settings)[0], "subscribe/confirm")
    return client.post(link, data={"token": token}).url.path


def test_the_whole_way_from_the_form_to_leaving(client, token, settings, desk):
    page = client.get("/subscribe").text
    assert page.count('type="checkbox"') == len(FIELDS)
    answer = ask(client, token, field=["optimization"], rhythm="daily")
    assert (answer.status_code, answer.url.path) == (200, "/subscribe/asked")
    (confirmation,) = mails(settings)
    assert confirmation["To"] == ADA
    assert confirmation["List-Unsubscribe"] is None  # there is nothing to leave yet
    link = link_in(confirmation, "subscribe/confirm")

    assert "about Optimisation" in client.get(link).text
    assert desk.subscribers.active() == []  # a scanner that opens links confirms nothing
    own = client.post(link, data={"token": token})
    assert own.url.path.startswith("/unsubscribe/")
    assert "You are subscribed" in own.text
    assert own.headers["cache-control"] == "no-store"
    assert client.get(link).status_code == client.post(link, data={"token": token}).status_code == 404

    site, now = client.app.state.site, desk.clock()
    add_news(site.state)
    (report,) = desk.postman.round(site.content, now + timedelta(days=1))
    assert (report.address, report.items) == (ADA, 1)
    digest = mails(settings, 2)[1]
    assert "Fresh" in digest.get_body(("plain",)).get_content()
    leave = link_in(digest, "unsubscribe")
    assert leave == own.url.path
    assert digest["List-Unsubscribe"].replace(" ", "") == f"<{settings.address}{leave}>"

    assert "You are subscribed" in client.get(leave).text  # a scanner that opens links ends nothing
    stranger = TestClient(client.app, base_url="http://127.0.0.1:8600", follow_redirects=False)
    for _ in range(2):  # what a mail program sends: no cookie, no token, another site
        answer = stranger.post(leave, data={"List-Unsubscribe": "One-Click"}, headers={"sec-fetch-site": "cross-site"})
        assert answer.status_code == 200  # RFC 8058 wants no redirect
        assert "You are unsubscribed" in answer.text
    assert desk.subscribers.active() == []


def test_the_answer_does_not_tell_who_is_subscribed(client, token, settings):
    subscribed(client, token, settings)
    answers = [ask(client, token, address) for address in (ADA, "nobody@example.org")]
    assert answers[0].text == answers[1].text
    told = [client.post("/api/subscriptions", json={"address": address}, headers={"x-page-token": token})
            for address in (ADA, "nobody@example.org")]  # fmt: skip
    assert [answer.status_code for answer in told] == [202, 202]
    assert told[0].json() == told[1].json() == {"told": TOLD}


def test_choices_can_be_changed_from_the_own_page(client, token, settings, desk):
    own = subscribed(client, token, settings)
    changed = client.post(f"{own}/choices", data={"field": ["causality", "training"], "rhythm": "daily"})
    assert "every day, about Causal structure and Training neural networks" in changed.text
    assert client.post(f"{own}/choices", data={"field": ["no such"], "rhythm": "daily"}).status_code == 422
    assert client.post(f"{own}/choices", data={"rhythm": "hourly"}).status_code == 422
    (found,) = desk.subscribers.active()
    assert found.choice.fields == ("causality", "training")


def test_a_digest_in_doubt_is_listed_on_the_own_page(client, token, settings, desk):
    own = subscribed(client, token, settings)
    (found,) = desk.subscribers.active()
    client.app.state.site.state.write(
        "INSERT INTO deliveries VALUES ('d', 'digest', ?, 0, 1, 'unknown', 1, '', '', '2026-11-16T06:00:00+00:00')",
        (found.id,),
    )
    page = client.get(own).text
    assert "16 Nov 2026" in page
    assert "A Toy &amp; Its &lt;Claims&gt;" in page


def test_a_confirmation_expires(client, token, settings, desk):
    ask(client, token)
    link = link_in(mails(settings)[0], "subscribe/confirm")
    real = desk.clock
    desk.clock = lambda: real() + PATIENCE + timedelta(minutes=1)
    assert client.get(link).status_code == client.post(link, data={"token": token}).status_code == 404


@pytest.mark.parametrize("address", ["", "x", "a@b", "a@b@example.org", "a@example.org\r\nBcc: e@example.org", "\0"])
def test_a_bad_address_is_answered_with_the_form(client, token, settings, address):
    answer = ask(client, token, address, rhythm="daily", field=["training"])
    assert answer.status_code == 422
    if address:
        assert 'role="alert"' in answer.text
        assert re.search(r'value="training" checked', answer.text)
        assert re.search(r'value="daily" checked', answer.text)
    assert client.post("/api/subscriptions", json={"address": address},
                       headers={"x-page-token": token}).status_code == 422  # fmt: skip
    assert not settings.outbox.exists()


def test_asking_needs_the_token_and_has_its_limits(client, token):
    assert ask(client, "0" * 64).status_code == 403
    assert client.post("/api/subscriptions", json={"address": ADA}).status_code == 403
    most = LIMITS["address"][0]
    assert [ask(client, token).status_code for _ in range(most)] == [200] * most
    refused = ask(client, token, "ADA@EXAMPLE.org")
    assert refused.status_code == 429
    assert 86_000 < int(refused.headers["retry-after"]) <= 86_401
    for i in range(LIMITS["host"][0] - most):
        client.cookies.clear()  # a new reader each time, from the same place
        fresh = re.search(r'page-token" content="([0-9a-f]{64})"', client.get("/subscribe").text)[1]
        assert ask(client, fresh, f"a{i}@example.org").status_code == 200
    assert ask(client, fresh, "z@example.org").status_code == 429


@pytest.mark.parametrize("token", ["0" * 96, "x", "0" * 95, "%00", "a" * 5000, "..%2f..%2fetc", "é", "%ff%fe"])
def test_links_that_are_none(client, token):
    for path in (f"/unsubscribe/{token}", f"/subscribe/confirm/{token}"):
        assert client.get(path).status_code == 404
    assert client.post(f"/unsubscribe/{token}").status_code == 404
    assert client.post(f"/unsubscribe/{token}/choices", data={"rhythm": "daily"}).status_code == 404


def test_the_page_says_where_mails_go(client, toy, tmp_path):
    assert "no mail server" in client.get("/subscribe").text
    smtp = Smtp("127.0.0.1", 9, security="none", sender="digest@example.org")
    with TestClient(
        create_app(Settings(tmp_path / "other.sqlite", smtp=smtp)), base_url="http://127.0.0.1:8600"
    ) as other:
        assert "no mail server" not in other.get("/subscribe").text


def test_feeds_can_be_asked_whether_they_changed(client, desk):
    first = client.get("/feeds/optimization.atom")
    assert first.headers["content-type"] == "application/atom+xml; charset=utf-8"
    root = ElementTree.fromstring(first.content)
    assert len(root.findall("{http://www.w3.org/2005/Atom}entry")) == 2
    known = {"if-none-match": first.headers["etag"]}
    since = {"if-modified-since": first.headers["last-modified"]}
    for headers in (known, since, {"if-none-match": f'"x", W/{first.headers["etag"]}'}, {"if-none-match": "*"}):
        again = client.get("/feeds/optimization.atom", headers=headers)
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
    for headers in (
        {"if-none-match": '"x"', **since},
        {"if-modified-since": "no date"},
        {"if-modified-since": "1 Jan"},
    ):
        assert client.get("/feeds/optimization.atom", headers=headers).status_code == 200
    add_news(client.app.state.site.state, seen="2999-01-01T00:00:00+00:00")
    for headers in (known, since):
        assert "Fresh" in client.get("/feeds/optimization.atom", headers=headers).text


def test_feeds_are_listed_and_others_are_not_there(client, settings):
    listed = client.get("/api/feeds").json()
    assert [feed["field"] for feed in listed] == ["all", *FIELDS]
    for feed in listed:
        path = feed["address"].removeprefix(settings.address)
        assert client.get(path).status_code == client.head(path).status_code == 200
        assert f'href="{path}"' in client.get("/subscribe").text
    for name in ("nothing", "..", "all%00", "optimization'--"):
        assert client.get(f"/feeds/{name}.atom").status_code == 404
