"""Every page, in both colour schemes, on a phone and on a wide screen: axe finds nothing, nothing sticks out."""

import re

import pytest
from axe_playwright_python.sync_playwright import Axe

from workingpapers.desk.page.guard import HEADER

from .conftest import served

AXE = {
    "light": {"resultTypes": ["violations"]},
    "dark": {"resultTypes": ["violations"], "runOnly": ["color-contrast", "link-in-text-block"]},  # as for the colours
}
PAGES = [
    *("/", "/?q=toy", "/?q=zzzz", "/?field=optimization&sort=trending", "/papers/toy", "/papers/rope", "/about"),
    *("/reference", "/runs", "/runs/1", "/import", "/imported", "/imported/Mar-12", "/subscribe", "/subscribe/asked"),
    *("/api/docs", "/papers/nothing"),
]
SHARED = {"/?q=toy", "/?q=zzzz", "/?field=optimization&sort=trending"}  # have the title of the listing
LISTING = (
    b"Daily Papers\nby AK and the research community\n\nMar 12\n\nSorting Heaps of Sand With Sieves\n\n"
    b"Sand is sorted with sieves of falling width, and every grain is moved as few times as the theory allows.\n"
)


@pytest.fixture
def furnished(toy_evidence, toy_runs, settings, client, token):
    """A page with evidence, a star, a run that has been asked for and an imported listing."""
    toy_runs.touch()
    signed = {HEADER: token}
    asked = {"slug": "toy", "what": "gap", "scale": "smoke", "seed": 0}
    for path, given in [
        ("/api/runs", {"json": asked}),
        ("/api/stars/toy", {}),
        ("/api/import", {"files": {"page": ("page.txt", LISTING)}}),
    ]:
        assert client.post(path, headers=signed, **given).status_code < 300, path
    with served(settings) as address:
        yield address
    toy_runs.unlink(missing_ok=True)


@pytest.fixture
def pages(browser):
    """Pages in a browser that lets axe in: the policy of our pages forbids strangers' scripts, and axe is one."""
    contexts = []

    def opened(width, scheme):
        made = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce"
        )
        contexts.append(made)
        return made.new_page()

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_axe_finds_nothing_and_nothing_sticks_out(furnished, pages, width, scheme):
    tab = pages(width, scheme)
    axe, problems = Axe(), []
    for path in PAGES:
        tab.goto(furnished + path, wait_until="load")
        tab.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        found = axe.run(tab, options=AXE[scheme]).response["violations"]
        problems += [
            f"{path} at {width} px, {scheme}: {one['id']}: {node['html'][:160]} {node['failureSummary'][:200]}"
            for one in found
            for node in one["nodes"][:3]
        ]
        wide = tab.evaluate("document.documentElement.scrollWidth")
        if wide > width:
            problems.append(f"{path} is {wide} px wide on a screen of {width} px")
    assert not problems, "\n".join(problems)


def test_titles_tell_pages_apart_and_each_has_one_heading(furnished, client):
    titles = {}
    for path in PAGES:
        html = client.get(path).text
        assert len(re.findall(r"<h1[ >]", html)) == 1, path
        assert html.startswith('<!doctype html>\n<html lang="en">')
        title = re.search(r"<title>(.+?)</title>", html)[1]
        if path not in SHARED:
            assert title not in titles, (path, titles[title])
            titles[title] = path
