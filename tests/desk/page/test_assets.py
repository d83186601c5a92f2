"""Style sheets and scripts: known beforehand, kept for ever by browsers, and nothing else can be had."""

import re

import pytest

from workingpapers.desk.page.assets import KINDS, assets
from workingpapers.desk.page.render import live


def test_an_address_changes_with_the_content():
    for name, found in assets().items():
        assert live("asset", name) == f"/assets/{name}?v={found.version}"
    assert len({found.version for found in assets().values()}) == len(assets())


def test_assets_are_kept_for_ever_and_have_their_type(client):
    for name, found in assets().items():
        answer = client.get(live("asset", name))
        assert answer.content == found.content
        assert answer.headers["content-type"] == KINDS["." + name.rsplit(".", 1)[1]]
        assert "immutable" in answer.headers["cache-control"]
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "name",
    ["serve.py", "../serve.py", "..%2fserve.py", "%2e%2e%2fserve.py", "/etc/passwd", "STYLE.CSS", ""],
)
def test_no_name_leads_to_another_file(client, name):
    answer = client.get(f"/assets/{name}")
    assert answer.status_code == 404
    assert b"uvicorn" not in answer.content
    assert b"root:" not in answer.content


def test_nothing_comes_from_elsewhere(client):
    """Neither pages nor assets name a file of another host; htmx is told to do without eval and inline styles."""
    for path in ("/", "/papers/toy", "/reference", "/import", "/subscribe", "/runs", "/about", "/api/docs"):
        html = client.get(path).text
        for tag, address in re.findall(r"<(script|link|img|iframe|source)\b[^>]*?(?:src|href)=\"([^\"]+)\"", html):
            assert address.startswith("/"), (path, tag, address)
        assert "<script>" not in html
    for name, found in assets().items():
        if name.endswith(".css"):
            assert not re.search(rb"@import|url\((?!['\"]?data:)", found.content), name
    assert '"allowEval": false' in client.get("/").text
