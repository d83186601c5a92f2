"""The listing and the pages of the papers."""

import ast
import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from starlette.testclient import TestClient

from workingpapers import cli
from workingpapers.desk import catalogue
from workingpapers.desk.catalogue import Paper, evidence_path, papers, status
from workingpapers.desk.evidence import load
from workingpapers.desk.figure import chart
from workingpapers.desk.page import searching, stars
from workingpapers.desk.page.app import create_app
from workingpapers.desk.page.arrange import Filters, arrange
from workingpapers.desk.page.content import Content, PaperContent
from workingpapers.desk.page.usage import usage
from workingpapers.desk.search import Hit

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7*7 }}"


class Outline(HTMLParser):
    """Ids, links, headings and texts of a page, and whatever its policy forbids."""

    def __init__(self, html):
        super().__init__()
        self.ids, self.links, self.tags, self.forbidden = [], [], [], []
        self.texts = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        if "id" in found and "hx-swap-oob" not in found:
            self.ids.append(found["id"])
        if tag == "a":
            self.links.append(found["href"])
        if (
            tag == "style"
            or (tag == "script" and "src" not in found)
            or any(name == "style" or name.startswith("on") for name in found)
        ):
            self.forbidden.append((tag, found))

    def handle_data(self, data):
        self.texts.append(data)


def titles(html):
    return [re.sub("<[^>]*>", "", title) for title in re.findall(r"<h3>(.*?)</h3>", html, re.DOTALL)]


MEASURED = []  # the toy's evidence, once it has been recorded


@pytest.fixture
def recorded(toy, capsys):
    """The toy with evidence at two scales and of its benchmark."""
    path = evidence_path(toy)
    if MEASURED:
        path.parent.mkdir(exist_ok=True)
        path.write_text(MEASURED[0])
        return toy
    for command in ("check", "bench"):
        for scale in ("smoke", "laptop"):
            cli.main([command, toy, "--scale", scale, "--jobs", "0", "--record"])
    capsys.readouterr()
    MEASURED.append(path.read_text())
    return toy


@pytest.fixture
def shown(recorded, client):
    return client.get(f"/papers/{recorded}").text


class TestListing:
    def test_stands_under_its_dates_newest_first(self, recorded, client):
        html = client.get("/").text
        later, earlier = html.index(">Jul 29</span>"), html.index(">Mar 11</span>")
        assert later < earlier
        assert titles(html[later:earlier]) == ["A Toy &amp; Its &lt;Claims&gt;"]
        assert titles(html[earlier:]) == ["A Toy &amp; Its &lt;Claims&gt;", "Ropes That Solve Knots"]
        assert html.count("Jul 29 and Mar 11") == 2  # both dates, wherever the paper stands
        assert "All 2 papers" in html

    def test_says_what_holds_and_what_does_not_work_yet(self, recorded, client):
        html = client.get("/").text
        toy = re.search(r'<li class="paper working".*?</ol>', html, re.DOTALL)[0]
        assert re.search(r"✓</span> 1 holds", toy)
        assert re.search(r"✗</span> 1 fails", toy)
        assert re.search(r"[\d.]+×</b> the best peer’s speed", toy)
        assert re.search(r'<time datetime="20[^"]+">\d+ \w+ 20\d\d</time>, laptop scale', toy)
        assert "not working yet" in re.search(r'<li class="paper listed".*?</li>', html, re.DOTALL)[0]

    @pytest.mark.parametrize(
        ("query", "found"),
        [
            ("status=working", {"toy"}),
            ("status=listed", {"rope"}),
            ("status=listed&listing=Jul+29", set()),
            ("listing=Jul+29", {"toy"}),
            ("verdict=fails", {"toy"}),
            ("verdict=holds&status=listed", set()),
            ("verdict=crashed", set()),
            ("field=optimization", {"toy", "rope"}),
            ("field=language", set()),
            ("q=ropes", {"rope"}),
            ("q=ropes&status=working", set()),
            ("q=exact&verdict=fails&field=optimization", {"toy"}),  # words of a claim
            ("field=nonsense&verdict=&status=%00&sort=x", {"toy", "rope"}),  # unknown values leave a filter open
        ],
    )
    def test_filters_combine(self, recorded, client, query, found):
        html = client.get(f"/?{query}").text
        assert set(re.findall(r'data-slug="(\w+)"', html)) == found
        assert ("No paper is like that." in html) == (not found)

    def test_trending_is_asked_for_and_says_what_it_is(self, toy, client, monkeypatch):
        monkeypatch.setattr(stars, "trending", lambda site: ["rope", "toy"])
        html = client.get("/?sort=trending").text
        assert re.findall(r'data-slug="(\w+)"', html) == ["rope", "toy"]
        assert "the most stars of the last days" in html

    def test_the_form_shows_what_was_chosen(self, toy, client):
        html = client.get("/?field=language&q=%22%3E%3Cb%3E").text
        assert '<option value="language" selected>' in html
        assert 'value="&#34;&gt;&lt;b&gt;"' in html
        assert "<b>" not in html

    @pytest.mark.parametrize(
        "query",
        ["q=" + "x" * 5000, "q=%ff%fe", "q=%00", "q=%22AND%28", "q=a&q=b", "listing=Feb+30", "sort=" + "é" * 99],
    )
    def test_any_query_is_legal(self, toy, client, query):
        assert client.get(f"/?{query}").status_code == 200

    def test_hits_are_marked(self, recorded, client):
        html = client.get("/?q=toy").text
        assert "A <mark>Toy</mark> &amp; Its &lt;Claims&gt;" in html

    def test_htmx_gets_the_results_alone(self, recorded, client):
        part = client.get("/?q=&field=optimization&verdict=&sort=", headers={"hx-request": "true"})
        assert "<html" not in part.text
        assert 'data-slug="toy"' in part.text
        assert re.search(r'<p id="count" hx-swap-oob="innerHTML">\s*All 2 papers', part.text)
        assert part.headers["hx-push-url"] == "/?field=optimization"
        assert "hx-request" in part.headers["vary"].lower()
        whole = client.get("/?field=optimization")
        assert "<html" in whole.text
        assert "hx-swap-oob" not in whole.text
        typed = client.get("/?q=rop", headers={"hx-request": "true", "hx-trigger-name": "q"})
        assert typed.headers["hx-replace-url"] == "/?q=rop"
        assert "hx-push-url" not in typed.headers

    def test_head(self, toy, client):
        for path in ("/", f"/papers/{toy}", "/about", "/favicon.ico"):
            answer = client.head(path)
            assert (answer.status_code, answer.content) == (200, b"")


def paper(slug, title, listings, recorded=""):
    row = Paper(slug, title, "language", f"language.{slug}", "2401.00001", "", listings, ("f",), "does things")
    entry = {"kind": "claim", "claim": "c", "scale": "laptop", "verdict": "holds", "recorded": recorded}
    return PaperContent(row, "working" if recorded else "listed", [entry] if recorded else [], "laptop", ())


CONTENT = Content(
    "1",
    {
        found.paper.slug: found
        for found in (
            paper("old", "b first in its listing", ("Mar 11",)),
            paper("young", "D", ("Jul 29",)),
            paper("works", "a", ("Mar 11",), "2026-01-02T00:00:00+00:00"),
            paper("both", "C", ("Mar 11", "Jul 29"), "2026-01-01T00:00:00+00:00"),
        )
    },
)


class TestArrange:
    @pytest.mark.parametrize(
        ("sort", "order"),
        [
            ("", ["both", "young", "works", "both", "old"]),  # newest listing first, in it what works first
            ("listed", ["both", "young", "works", "both", "old"]),
            ("title", ["works", "old", "both", "young"]),
            ("evidence", ["works", "both", "young", "old"]),
            ("trending", ["young", "old", "both", "works"]),
        ],
    )
    def test_orders(self, sort, order):
        groups = arrange(CONTENT, Filters(sort=sort), trending=["young", "old"])
        assert [row.page.paper.slug for group in groups for row in group.rows] == order

    def test_hits_keep_their_rank_unless_another_order_is_asked_for(self):
        hits = [Hit("young", "D", 3.0, "x"), Hit("", "stranger", 2.0, "y"), Hit("works", "a", 1.0, "z")]

        def found(**asked):
            return [row.title for group in arrange(CONTENT, Filters(q="x", **asked), hits=hits) for row in group.rows]

        assert found() == ["D", "stranger", "a"]
        assert found(sort="title") == ["a", "D", "stranger"]
        assert found(status="working") == ["a"]  # of what was imported nobody knows whether it works

    def test_the_address_is_the_shortest(self):
        asked = {"q": " a b ", "field": "", "verdict": "fails", "sort": "no", "listing": "Mar 11"}
        assert Filters.of(asked, CONTENT).query == "q=a+b&verdict=fails&listing=Mar+11"


def test_an_imported_title_is_shown_as_such(toy, client, monkeypatch):
    hit = Hit("", "Notes <b>on</b> Nothing", 1.0, "an abstract", ((0, 5),), date="Mar 12", arxiv="2401.00001")
    monkeypatch.setattr(searching, "find", lambda site, query, limit: [hit])
    html = client.get("/?q=notes").text
    assert "<mark>Notes</mark> &lt;b&gt;on&lt;/b&gt; Nothing</bdi></h3>" in html
    assert "imported, not in the catalogue" in html
    assert '<a href="/imported/Mar-12">Mar 12</a>' in html
    assert "1 paper for" in html


def test_kept_pages_are_nobodys(recorded, settings):
    """The second reader gets the page that was rendered for the first, without the first one's token and stars."""
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8600") as client:
        one, other = (TestClient(client.app, base_url="http://127.0.0.1:8600") for _ in range(2))
        tokens = {}
        for reader in (one, other):
            for path in ("/", "/papers/toy"):
                tokens[reader, path] = set(re.findall(r"[0-9a-f]{64}", reader.get(path).text))
        assert all(len(found) == 1 for found in tokens.values())
        (first,), (second,) = tokens[one, "/"], tokens[other, "/"]
        assert first != second
        assert one.post("/stars/toy", data={"token": first}).status_code == 200
        for path in ("/", "/papers/toy"):
            pressed = 'aria-pressed="true"'
            assert pressed in one.get(path).text
            html = other.get(path).text
            assert pressed not in html
            assert first not in html
            assert second in html


class TestPaper:
    def test_shows_what_was_published_and_measured(self, recorded, shown):
        (gap,) = (entry for entry in load(recorded)["claims"]["laptop"] if entry["claim"] == "gap")
        part = shown[shown.index('<section class="claim" id="gap-laptop"') :]
        assert "half the gap of &lt;the&gt; old method" in part
        low, high = gap["expectations"][0]["interval"]
        for number in (gap["expectations"][0]["measured"], low, high):
            assert f"{number:.4g}".replace("-", "−") in part
        assert gap["device"] in part
        assert f"torch {gap['versions']['torch']}" in part
        assert "laptop scale, 24 cells" in part
        assert "<svg viewBox=" in part
        assert f"/papers/{recorded}/gap-laptop.csv" in part
        assert f"/papers/{recorded}/gap-laptop.parquet" in part

    def test_other_scales_are_there_and_folded(self, shown):
        assert re.search(r'<details class="other" id="gap-smoke">\s*<summary>At smoke scale', shown)

    def test_the_overview_leads_to_every_claim(self, shown):
        outline = Outline(shown)
        inside = [link[1:] for link in outline.links if link.startswith("#")]
        assert {"gap-laptop", "exact-laptop", "speed-laptop", "gap-smoke"} <= set(inside)
        assert set(inside) <= set(outline.ids)
        assert len(set(outline.ids)) == len(outline.ids)
        assert outline.tags.count("h1") == 1

    def test_code_to_copy(self, recorded, shown):
        assert "from workingpapers.optimization.toy import solve" in shown
        assert f"workingpapers check {recorded} --scale laptop\nworkingpapers bench {recorded}" in shown
        assert "@misc{toy," in shown

    def test_old_evidence_is_marked(self, recorded, tmp_path, client):
        source = tmp_path / "claims" / "optimization" / "toy.py"
        assert "has changed since" not in client.get(f"/papers/{recorded}").text
        source.write_text(source.read_text().replace("start / step", "start / (step + 1)"))
        with TestClient(create_app(client.app.state.site.settings), base_url="http://127.0.0.1:8600") as later:
            assert "has changed since" in later.get(f"/papers/{recorded}").text

    def test_a_listed_paper_says_so(self, toy, client):
        html = client.get("/papers/rope").text
        assert "Not working yet." in html
        assert "workingpapers check" not in html

    def test_unknown(self, toy, client):
        answer = client.get("/papers/nobody")
        assert answer.status_code == 404
        assert "No paper has this name." in answer.text

    def test_hostile_texts_stay_texts(self, recorded, settings, monkeypatch):
        rows = {slug: replace(row, title=HOSTILE, summary=HOSTILE, note=HOSTILE) for slug, row in papers().items()}
        monkeypatch.setattr(catalogue, "_catalogue", lambda: rows)
        evidence = load(recorded)
        for entries in evidence["claims"].values():
            for entry in entries:
                entry.update(says=HOSTILE, published=HOSTILE, device=HOSTILE)
                for judgement in entry["expectations"]:
                    judgement.update(expectation=HOSTILE, note=HOSTILE)
                if "figure" in entry:
                    entry["figure"].update(x=HOSTILE, y=HOSTILE)
                    for series in entry["figure"]["series"]:
                        series.update(name=f"{HOSTILE}{series['name']}", panel=HOSTILE)
        evidence_path(recorded).write_text(json.dumps(evidence))
        with TestClient(create_app(settings), base_url="http://127.0.0.1:8600") as client:
            for path in ("/", "/?q=script", f"/papers/{recorded}", "/papers/rope"):
                html = client.get(path).text
                outline = Outline(html)
                assert outline.forbidden == []
                assert "img" not in outline.tags
                assert html.count("<script") == html.count("<script src=")
                assert "{{ 7*7 }}" in "".join(outline.texts)


def test_about(toy, client):
    html = client.get("/about").text
    for word in ("✓ holds", "? can&#39;t be told", "✗ fails", "! crashed", "smoke", "laptop", "Holm"):
        assert word in html


class TestUsage:
    def test_is_python_and_names_something_public(self):
        """Of every paper that works."""
        for paper in papers().values():
            if status(paper) == "working":
                tree = ast.parse(usage(paper))
                first = tree.body[0]
                assert isinstance(first, ast.ImportFrom)
                assert first.module.startswith(f"workingpapers.{paper.field}")
                assert {alias.name for alias in first.names} & set(paper.names)
                assert len(tree.body) > 1

    def test_inherited_methods_count(self):
        assert usage(papers()["colide"]).endswith("CoLiDE().fit(X)")


class TestFigure:
    POINTS = ((1, 2.0, 1.5, 2.5), (10, 0.4, -0.1, 0.9), (100, 0.03, None, None), (1000, None, None, None))

    @pytest.mark.parametrize("kind", ["line", "bars", "scatter"])
    @pytest.mark.parametrize("log", ["", "x", "y", "xy"])
    def test_any_points_are_drawn_inside(self, kind, log):
        series = [{"panel": panel, "name": name, "points": self.POINTS} for panel in (1, 2) for name in ("a<b", "c")]
        figure = {"kind": kind, "x": "n", "y": "gap", "by": "method", "log": log, "each": "d", "series": series}
        drawn = chart(figure)
        root = ElementTree.fromstring(drawn)
        panels = root.findall("./div/svg")
        assert len(panels) == 2
        assert "a<b" in panels[0].get("aria-label")
        for svg in panels:
            for path in svg.iter("path"):
                where = path.get("transform") or path.get("d")
                for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", where):
                    assert 0 <= float(x) <= 360
                    assert 0 <= float(y) <= 250
        assert "style" not in drawn
        assert " id=" not in drawn

    @pytest.mark.parametrize("points", [[], [[1, None, None, None]], [[3, 0.0, None, None]], [[0, -5.0, -6.0, -4.0]]])
    def test_little_to_draw(self, points):
        for log in ("", "xy"):
            for kind in ("line", "bars", "scatter"):
                series = [{"panel": None, "name": None, "points": points}]
                figure = {"kind": kind, "x": "n", "y": "y", "by": "method", "log": log, "each": None, "series": series}
                drawn = chart(figure)
                assert bool(drawn) == any(point[1] is not None for point in points)
                ElementTree.fromstring(drawn or "<p/>")

    def test_is_quick(self):
        series = [
            {"panel": 1, "name": str(i), "points": [(j, j, j - 1, j + 1) for j in range(1, 41)]} for i in range(12)
        ]
        figure = {"kind": "line", "x": "n", "y": "y", "by": "method", "log": "xy", "each": None, "series": series}
        started = time.process_time()
        chart(figure)
        assert time.process_time() - started < 0.1


class TestInTheBrowser:
    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_nothing_offends_the_policy_or_runs_over(self, recorded, address, tab, theme):
        tab.emulate_media(color_scheme=theme)
        tab.set_viewport_size({"width": 360, "height": 800})
        for path in ("/", "/papers/toy", "/papers/rope", "/about"):
            tab.goto(address + path)
            assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 382) == (theme == "light")

    def test_filters_as_you_type_and_step_back(self, recorded, address, tab):
        tab.goto(address)
        tab.locator("#find").press_sequentially("rope")
        tab.wait_for_url(f"{address}/?q=rope")
        tab.locator('[data-slug="toy"]').first.wait_for(state="detached")
        assert tab.locator('[data-slug="rope"]').count() == 1
        assert "1 paper for “rope”" in tab.locator("#count").inner_text()
        assert tab.evaluate("document.activeElement.id") == "find"
        tab.get_by_label("Status").select_option("working")
        tab.get_by_text("No paper is like that.").wait_for()
        assert tab.url == f"{address}/?q=rope&status=working"
        tab.go_back()
        tab.locator('[data-slug="rope"]').wait_for()
        assert tab.locator("#find").input_value() == "rope"

    def test_slash_leads_to_the_search_box(self, toy, address, tab):
        tab.goto(f"{address}/papers/rope")
        tab.keyboard.press("/")
        tab.keyboard.type("toy/")
        assert tab.locator("#find").input_value() == "toy/"
        tab.keyboard.press("Enter")
        tab.wait_for_url(f"{address}/?q=toy%2F")

    def test_a_table_is_sorted_with_the_keyboard(self, recorded, address, tab):
        tab.goto(f"{address}/papers/toy")
        tab.locator("#gap-laptop > .measurements > summary").click()
        table = tab.locator("#gap-laptop > .measurements table")
        header = table.locator("thead th").filter(has_text="gap")

        def column():
            return [float(text) for text in table.locator("tbody td[data-value]:nth-child(4)").evaluate_all(
                "cells => cells.map(cell => cell.dataset.value)")]  # fmt: skip

        header.get_by_role("button").focus()
        tab.keyboard.press("Enter")
        assert header.get_attribute("aria-sort") == "ascending"
        rising = column()
        assert rising == sorted(rising)
        assert len(set(rising)) > 1
        tab.keyboard.press("Space")
        assert header.get_attribute("aria-sort") == "descending"
        assert column() == rising[::-1]
        assert table.locator("[aria-sort]").count() == 1

    def test_an_address_opens_what_is_folded(self, recorded, address, tab):
        tab.goto(f"{address}/papers/toy#gap-smoke")
        tab.locator("#gap-smoke .judgements").wait_for()
        tab.goto(f"{address}/papers/toy")
        tab.locator(".overview").get_by_role("link", name="smoke").first.click()
        tab.locator("details.other[open] .judgements").first.wait_for()

    def test_code_is_copied(self, recorded, address, tab):
        tab.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
        tab.goto(f"{address}/papers/toy")
        tab.locator(".code").first.get_by_role("button", name="Copy").click()
        tab.get_by_role("button", name="Copied").wait_for()
        assert tab.evaluate("navigator.clipboard.readText()") == "from workingpapers.optimization.toy import solve"
