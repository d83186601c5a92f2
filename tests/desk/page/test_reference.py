"""The reference in the browser: nothing of a docstring is lost, nothing in it is markup."""

import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from workingpapers.desk import reference
from workingpapers.desk.page import reference as part
from workingpapers.desk.page.render import Renderer

HOSTILE = """<script>alert(1)</script> :raw:`<b>html</b>` in n >= 2 & m < 3.

.. include:: /etc/passwd
.. raw:: html

    <img src=x onerror=alert(1)>

`javascript:alert(1)` ``<svg onload=alert(1)>`` javascript:alert(1) <https://example.org/"onmouseover="alert(1)>

Parameters
----------
name : </dd><script>alert(2)</script> with |W|_1 <= {{ 7 * 7 }} {% raw %}

Examples
--------
>>> "</code></pre><script>alert(3)</script>"
"""


class Text(HTMLParser):
    """The text of a page, formulas as their source, and its tags with their attributes."""

    def __init__(self, html):
        super().__init__()
        self.words, self.tags, self._math = [], [], 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "math":
            self._math += 1
            self.words.append(dict(attributes).get("alttext", ""))

    def handle_endtag(self, tag):
        self._math -= tag == "math"

    def handle_data(self, data):
        if not self._math:
            self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)


@pytest.fixture(scope="module")
def render():
    return Renderer(is_live=True)


@pytest.fixture(scope="module")
def rendered(render):
    return {module: render("reference_module.html", **context) for module, context in part.pages()}


def words(text):
    return Counter(re.findall(r"\w+", text))


def test_no_word_of_a_docstring_is_lost(rendered):
    for page in reference.pages():
        shown = words(Text(re.sub(r"<details>.*?</details>", "", rendered[page.module], flags=re.S)).text)
        told = Counter()
        for text in [each.text for each in page.overview] + [each.text for top in page.entries for each in top.walk()]:
            told += words(text)
        assert not told - shown, (page.module, told - shown)


def test_pages_have_one_heading_distinct_anchors_and_no_style_or_script_of_their_own(rendered):
    for module, html in rendered.items():
        tags = Text(html).tags
        anchors = [attributes["id"] for _, attributes in tags if "id" in attributes]
        assert len(anchors) == len(set(anchors)), module
        assert [tag for tag, _ in tags].count("h1") == 1
        for tag, attributes in tags:
            assert tag != "style"
            assert tag != "script" or attributes["src"].startswith("/assets/")
            assert "style" not in attributes
            assert not [name for name in attributes if name.startswith("on")]


def test_links_lead_to_anchors_that_exist(rendered):
    anchors = {module: {attributes.get("id") for _, attributes in Text(html).tags} for module, html in rendered.items()}
    checked = 0
    for html in rendered.values():
        for tag, attributes in Text(html).tags:
            if tag == "a" and (found := re.fullmatch(r"/reference/([\w.]+)(?:#(.+))?", attributes["href"])):
                assert found[2] is None or found[2] in anchors[found[1]], attributes["href"]
                checked += 1
    assert checked > 500


def test_hostile_docstrings_are_text(render):
    entry = reference.Entry(
        "data", "<b>name</b>", "function", "workingpapers.data", HOSTILE, HOSTILE,
        [reference.Argument("name", "<script>", '"<script>"', [("<script>", "<b>")])], "<script>", [("<script>", "")],
    )  # fmt: skip
    page = reference.Page("data", "<script>", None, [entry], [entry])
    found = Text(render("reference_module.html", page=page, field="data"))
    assert {tag for tag, _ in found.tags} & {"script", "img", "svg", "b"} <= {"script", "b"}
    assert [attributes["src"].split("?")[0] for tag, attributes in found.tags if tag == "script"] == [
        "/assets/htmx.js",
        "/assets/page.js",
    ]
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert not any(attributes.get("href", "").startswith("javascript:") for _, attributes in found.tags)
    assert "alert(1)" in found.text
    assert "{{ 7 * 7 }}" in found.text
    assert "root:" not in found.text
    assert "math" in {tag for tag, _ in found.tags}


def test_the_overview_names_what_works(client):
    html = client.get("/reference").text
    assert 'href="/reference/optimization.halpern#vr_halpern"' in html
    assert "2 papers of the listing do not work yet" in html
    assert "optimization.toy" not in html


def test_a_module_and_what_is_no_module(client):
    shown = client.get("/reference/causality.colide")
    assert shown.status_code == 200
    assert 'id="CoLiDE.fit_many"' in shown.text
    assert 'id="GolemEV.fit"' in shown.text  # inherited
    assert 'href="/reference/causality.colide#LinearDAGEstimator.fit"' in shown.text
    for other in ("optimization.toy", "causality", "..%2f..%2fetc%2fpasswd", "desk.store", "x" * 500, "%00"):
        assert client.get(f"/reference/{other}").status_code in (404, 422), other
        assert client.get(f"/api/reference/{other}").status_code in (404, 422), other


def test_the_same_as_json(client):
    rows = client.get("/api/reference").json()
    assert "causality.colide" in [row["module"] for row in rows]
    module = client.get("/api/reference/causality.colide").json()
    assert "continuous\noptimisation" in module["text"]
    fit = next(name for name in module["names"] if name["name"] == "LinearDAGEstimator.fit")
    assert fit["signature"] == 'LinearDAGEstimator.fit(X: Float[np.ndarray, "n d"], y: object = None) -> Self'
    assert fit["arguments"][0] == {
        "name": "X", "annotation": 'Float[np.ndarray, "n d"]', "default": "", "type": "float array, n × d"
    }  # fmt: skip


def test_a_reader_with_a_phone_and_one_with_a_screen_reader(tab, address):
    from axe_playwright_python.sync_playwright import Axe

    tab.set_viewport_size({"width": 360, "height": 700})
    for path in ("/reference", "/reference/causality.colide"):
        tab.goto(address + path)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert Axe().run(tab, context={"exclude": [["math"]]}).response["violations"] == []
    drawn = tab.locator(".formulas math").first.bounding_box()
    assert drawn["height"] > 15  # set as a formula, the sum with its index below
    assert tab.locator(".formulas munder").first.evaluate("node => getComputedStyle(node).display") == "block math"
