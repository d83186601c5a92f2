"""What readers do, in Debian's Chromium: browse, search, star, run, cancel, import, subscribe, leave."""

import email
import email.policy
import re

import pytest
from playwright.sync_api import expect

from .conftest import served

LISTING = """Daily Papers
by AK and the research community

Mar 12

Sorting Heaps of Sand With Sieves

Sand is sorted with sieves of falling width, and every grain is moved as few times as the theory allows.

Ropes That Solve Knots

Ropes are shown to solve knots that were thought to be beyond any rope, given that they are long enough for it.
"""


@pytest.fixture
def other(browser):
    """The browser of another reader."""
    context = browser.new_context()
    yield context.new_page()
    context.close()


def paper_rows(tab):
    return tab.locator("#results li.paper")


def test_a_reader_browses_from_the_listing_to_a_paper_and_back(toy_evidence, address, tab):
    tab.goto(address)
    expect(tab.get_by_role("heading", level=1)).to_have_text("Daily Papers, with the methods")
    expect(tab.get_by_role("heading", level=2)).to_contain_text(["Jul 29", "Mar 11"])
    expect(paper_rows(tab)).to_have_count(3)  # the toy stands in both listings
    tab.get_by_role("link", name="A Toy & Its <Claims>").first.click()
    expect(tab).to_have_title("A Toy & Its <Claims> · Working Papers")
    expect(tab.get_by_role("heading", level=1)).to_have_text("A Toy & Its <Claims>")
    expect(tab.get_by_text("<yes>").first).to_be_visible()
    assert tab.locator("figure svg").first.is_visible()
    tab.go_back()
    expect(paper_rows(tab)).to_have_count(3)


def test_filters_combine_stay_in_the_address_and_go_back(toy_evidence, address, tab):
    tab.goto(address)
    tab.get_by_label("Status").select_option("working")
    expect(paper_rows(tab)).to_have_count(2)
    expect(tab).to_have_url(re.compile(r"\?status=working$"))
    tab.get_by_label("Listing").select_option("Jul 29")
    expect(paper_rows(tab)).to_have_count(1)
    expect(tab).to_have_url(re.compile(r"status=working&listing=Jul\+29"))
    tab.reload()
    expect(paper_rows(tab)).to_have_count(1)
    tab.get_by_label("Field").select_option("language")
    expect(tab.locator("#results")).to_contain_text("No paper is like that.")
    tab.go_back()
    expect(paper_rows(tab)).to_have_count(1)


def test_search_as_you_type_highlights_the_hits(toy, address, tab):
    tab.goto(address)
    box = tab.get_by_role("searchbox")
    box.press_sequentially("knot", delay=20)
    expect(paper_rows(tab)).to_have_count(1)
    expect(tab.locator("#results mark").first).to_have_text(re.compile("^knots?$", re.IGNORECASE))
    expect(tab.get_by_role("status")).to_contain_text("1 paper")
    expect(tab).to_have_url(re.compile(r"\?q=knot$"))
    assert box.evaluate("box => box === document.activeElement"), "typing goes on"
    box.fill("zzzz")
    expect(tab.locator("#results")).to_contain_text("No paper is like that.")
    box.fill("")
    expect(paper_rows(tab)).to_have_count(3)


def test_a_star_stays_and_another_reader_sees_it(toy, address, tab, other):
    tab.goto(f"{address}/papers/rope")
    star = tab.get_by_role("button", name=re.compile("^Star"))
    expect(star).to_have_attribute("aria-pressed", "false")
    star.click()
    expect(star).to_have_attribute("aria-pressed", "true")
    expect(star).to_contain_text("1")
    tab.reload()
    expect(star).to_have_attribute("aria-pressed", "true")
    other.goto(f"{address}/papers/rope")
    theirs = other.get_by_role("button", name=re.compile("^Star"))
    expect(theirs).to_have_attribute("aria-pressed", "false")
    theirs.click()
    expect(theirs).to_contain_text("2")
    star.click()
    expect(star).to_have_attribute("aria-pressed", "false")
    tab.goto(f"{address}/?sort=trending")
    expect(tab.locator("#results li.paper").first).to_contain_text("Ropes That Solve Knots")


def test_code_is_copied_and_tables_are_sorted(toy_evidence, address, tab):
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.goto(f"{address}/papers/toy")
    code = tab.locator(".code").first
    code.get_by_role("button").click()
    expect(code.get_by_role("button")).to_have_text("Copied")
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied == code.locator("pre").inner_text().rstrip()
    assert "import" in copied

    measurements = tab.locator("details.measurements").first
    measurements.locator("summary").click()
    header = measurements.locator("thead th.number").first
    column = header.evaluate("header => header.cellIndex")
    for direction in ("ascending", "descending"):
        header.get_by_role("button").click()
        expect(header).to_have_attribute("aria-sort", direction)
        values = measurements.locator("tbody tr").evaluate_all(
            f"rows => rows.map(row => Number(row.cells[{column}].dataset.value))"
        )
        assert values == sorted(values, reverse=direction == "descending")


def test_the_keyboard_is_enough(toy, address, tab):
    tab.goto(address)
    tab.keyboard.press("Tab")
    skip = tab.get_by_role("link", name="Skip to the content")
    expect(skip).to_be_focused()
    assert skip.bounding_box()["y"] >= 0, "what has the focus can be seen"
    tab.keyboard.press("Enter")
    expect(tab.locator("main")).to_be_focused()
    tab.keyboard.press("/")
    expect(tab.get_by_role("searchbox")).to_be_focused()
    tab.keyboard.type("knots")
    expect(paper_rows(tab)).to_have_count(1)
    for _ in range(30):
        tab.keyboard.press("Tab")
        if "Ropes" in tab.evaluate("document.activeElement.textContent"):
            break
    outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline not in ("none", ""), "the focus can be seen"
    tab.keyboard.press("Enter")
    expect(tab).to_have_title(re.compile("^Ropes"))
    star = tab.get_by_role("button", name=re.compile("^Star"))
    star.focus()
    tab.keyboard.press("Enter")
    expect(star).to_have_attribute("aria-pressed", "true")
    expect(star).to_be_focused()


def test_a_run_shows_its_progress_survives_a_reload_and_ends(toy_evidence, toy_runs, address, tab):
    toy_runs.touch()  # no cell is measured as long as this file exists
    tab.goto(f"{address}/papers/toy")
    tab.get_by_label("What to check").select_option("gap")
    tab.get_by_label("Scale", exact=True).select_option("smoke")
    tab.get_by_label("First seed").fill("3")
    tab.get_by_role("button", name="Run this check").click()
    expect(tab).to_have_url(re.compile(r"/runs/1$"))
    said = tab.get_by_role("status")
    expect(said).to_contain_text("0 of 10 cells measured.")
    tab.reload()
    expect(said).to_contain_text("0 of 10 cells measured.")
    tab.evaluate("window.kept = true")
    toy_runs.unlink()
    expect(said).to_contain_text("Done:")
    expect(tab.locator("#run-state .verdict").first).to_contain_text("holds")
    assert tab.evaluate("window.kept"), "the page followed without being loaded again"
    tab.goto(f"{address}/papers/toy")
    expect(tab.locator("ul.runs")).to_contain_text("Gap")


def test_a_run_can_be_cancelled(toy_evidence, toy_runs, address, tab):
    toy_runs.touch()
    tab.goto(f"{address}/papers/toy")
    tab.get_by_role("button", name="Run this check").click()
    tab.get_by_role("button", name="Cancel this run").click()
    expect(tab.get_by_role("status")).to_contain_text("Cancelled")
    tab.goto(f"{address}/runs")
    expect(tab.get_by_role("main")).to_contain_text("cancelled")


@pytest.mark.parametrize("way", ["paste", "upload"])
def test_a_listing_is_imported(toy, address, tab, tmp_path, way):
    tab.goto(address)
    tab.get_by_role("link", name="Import", exact=True).click()
    if way == "paste":
        tab.get_by_label(re.compile("^Or the text")).fill(LISTING)
    else:
        (tmp_path / "page.txt").write_text(LISTING)
        tab.get_by_label(re.compile("^A saved page")).set_input_files(tmp_path / "page.txt")
    tab.get_by_role("button", name="Import").click()
    expect(tab.get_by_role("heading", level=1)).to_contain_text("Mar 12")
    expect(tab.get_by_role("main")).to_contain_text("Sorting Heaps of Sand With Sieves")
    expect(tab.get_by_role("link", name="Ropes That Solve Knots")).to_have_count(1)  # in the catalogue
    tab.goto(f"{address}/?q=sieves")
    expect(paper_rows(tab)).to_contain_text(["Sorting Heaps of Sand With Sieves"])


def test_half_a_listing_is_refused_with_a_reason(toy, address, other):  # `tab` takes a 422 for an error of the page
    other.goto(f"{address}/import")
    other.get_by_label(re.compile("^Or the text")).fill(LISTING[:200])
    other.get_by_role("button", name="Import").click()
    expect(other.get_by_role("alert")).to_contain_text("Nothing was imported.")


def mail(settings, number):
    """The newest mail in the outbox, once it holds this many."""
    found = sorted(settings.outbox.glob("*.eml"), key=lambda path: path.stat().st_mtime_ns)
    if len(found) < number:
        return None
    return email.message_from_bytes(found[-1].read_bytes(), policy=email.policy.default)


def test_a_reader_subscribes_confirms_and_leaves(settings, tab):
    with served(settings) as address:
        tab.goto(address)
        tab.get_by_role("link", name="Subscribe", exact=True).click()
        expect(tab.get_by_role("main")).to_contain_text("no mail server")
        tab.get_by_label("Mail address").fill("reader@example.org")
        tab.get_by_role("button", name="Subscribe").click()
        expect(tab.get_by_role("heading", level=1)).to_contain_text("look into your mail")
        for _ in range(200):
            if found := mail(settings, 1):
                break
            tab.wait_for_timeout(50)
        assert found["to"] == "reader@example.org"
        text = found.get_body(("plain",)).get_content()
        path = re.search(re.escape(settings.address) + r"(/subscribe/confirm/\S+)", text)[1]
        tab.goto(address + path)
        tab.get_by_role("button", name="Confirm").click()
        expect(tab.get_by_role("heading", level=1)).to_have_text("You are subscribed")
        leave = tab.url
        tab.goto(address)
        tab.goto(leave)
        tab.get_by_role("button", name="Unsubscribe").click()
        expect(tab.get_by_role("heading", level=1)).to_have_text("You are unsubscribed")
