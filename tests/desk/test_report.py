"""The static site: whole, closed in itself, replaced without touching what is not ours; and the README's table."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from workingpapers.cli import main
from workingpapers.desk.report import END, MANIFEST, START, readme_table, static, update_readme, write_site

OUTSIDE = re.compile(r"https://(arxiv\.org/abs/[\w.]+|github\.com/[\w./-]+)")
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """Ids and references of a page; complains about elements that are not closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.loads, self.open, self.wrong = [], [], [], [], []
        self.feed(text)
        self.close()
        self.wrong += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag, attributes):
        self._take(tag, dict(attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self._take(tag, dict(attributes))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if self.open[-1:] != [tag]:
            self.wrong.append(f"</{tag}> at {self.getpos()} closes {self.open[-1:]}")
        while self.open and self.open.pop() != tag:
            pass

    def _take(self, tag, attributes):
        self.wrong += [f"{name} on <{tag}>" for name in attributes if name.startswith("on") or name == "style"]
        if tag == "style" or (tag == "script" and "src" not in attributes):
            self.wrong.append(f"inline <{tag}>")
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for name in ("href", "src", "action", "xlink:href"):
            if name in attributes:
                (self.links if (tag, name) == ("a", "href") else self.loads).append(attributes[name])


def check_site(site: Path) -> int:
    """Every reference of every page leads to a file and a place in it; returns how many there were."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    wrong, count = [], 0
    for path, page in pages.items():
        wrong += [f"{path}: {problem}" for problem in page.wrong]
        wrong += [f"{path}: two elements have the id {name}" for name in {n for n in page.ids if page.ids.count(n) > 1}]
        for link in page.links + page.loads:
            count += 1
            if OUTSIDE.fullmatch(link) and link in page.links:
                continue
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or parts.path.startswith("/"):
                wrong.append(f"{path}: {link} leads away")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file() or not target.is_relative_to(site.resolve()):
                wrong.append(f"{path}: {link} leads nowhere")
            elif parts.fragment and unquote(parts.fragment) not in pages[target].ids:
                wrong.append(f"{path}: {link} has no such place")
    assert wrong == []
    return count


@pytest.fixture
def site(toy_evidence, tmp_path):
    write_site(tmp_path / "site")
    return tmp_path / "site"


def test_the_toy_site_is_closed_in_itself(site):
    assert check_site(site) > 40


@pytest.mark.slow
def test_the_real_site_is_closed_in_itself(tmp_path):
    write_site(tmp_path / "site", "https://example.org/papers")
    assert check_site(tmp_path / "site") > 1_000


def test_pages_show_everything_escaped(site):
    index, page = (site / "index.html").read_text(), (site / "papers/toy.html").read_text()
    assert index.index("Jul 29") < index.index("Mar 11")
    assert index.count("A Toy &amp; Its &lt;Claims&gt;") == 2
    assert "The &lt;i&gt;gap&lt;/i&gt; &amp; more." in page
    assert "&lt;yes&gt;" in page
    assert "<svg" in page
    assert "<i>" not in page
    assert "from workingpapers.optimization.toy import solve" in page
    assert "ot working yet" in (site / "papers/rope.html").read_text()


def test_nothing_of_the_server_is_left(site):
    for path in site.rglob("*.html"):
        text = path.read_text()
        assert "content-security-policy" in text
        for part in ("hx-", 'method="post"', "page-token", "/runs", "/subscribe", "/api", 'name="token"'):
            assert part not in text, (path, part)


def test_downloads_are_files(site):
    with (site / "papers/toy/gap-laptop.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 3
    assert (site / "papers/toy/gap-laptop.parquet").read_bytes().startswith(b"PAR1")
    assert (site / "papers/toy.bib").read_text().startswith("@misc{toy,")


def test_the_index_is_data_and_cannot_leave_its_script(site):
    text = (site / "search.json").read_text()
    found = json.loads(text)["papers"]
    assert found["toy"]["title"] == "A Toy & Its <Claims>"
    assert found["toy"]["verdict"] == ["holds", "fails"]
    assert "The new method ends lower" in found["toy"]["claims"]
    assert (site / "search-index.js").read_text() == f"globalThis.searchIndex = {text};\n"
    assert "<" not in text
    assert text.isascii()


def test_feeds_need_an_address(toy_evidence, tmp_path):
    write_site(tmp_path / "without")
    assert not (tmp_path / "without/feeds").exists()
    assert "atom" not in (tmp_path / "without/index.html").read_text().lower()
    write_site(tmp_path / "with", "https://example.org/papers/")
    feed = (tmp_path / "with/feeds/all.atom").read_text()
    assert "https://example.org/papers/papers/toy.html" in feed
    assert (tmp_path / "with/feeds/optimization.atom").is_file()
    assert 'href="feeds/all.atom"' in (tmp_path / "with/index.html").read_text()
    check_site(tmp_path / "with")


@pytest.mark.parametrize(
    "address", ["example.org", "ftp://example.org", "https://", "https://a.org/?q=1", "javascript:x"]
)
def test_addresses_that_are_none(toy, tmp_path, capsys, address):
    assert main(["report", str(tmp_path / "site"), "--address", address]) == 2
    assert "address must look like" in capsys.readouterr().err
    assert not (tmp_path / "site").exists()


class TestAgain:
    def test_the_same_evidence_gives_the_same_files(self, site, tmp_path):
        def contents(directory):
            return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}

        stamps = {path: path.stat().st_mtime_ns for path in site.rglob("*")}
        write_site(site)
        write_site(tmp_path / "other")
        assert contents(site) == contents(tmp_path / "other")
        assert {path: path.stat().st_mtime_ns for path in site.rglob("*.html")}.items() <= stamps.items()

    def test_files_of_ours_that_are_no_longer_part_go_and_others_stay(self, site, toy_evidence):
        (site / "CNAME").write_text("papers.example.org")
        (site / "papers/toy/mine.csv").write_text("mine")
        evidence = json.loads(toy_evidence.read_text())
        del evidence["claims"]["smoke"]
        toy_evidence.write_text(json.dumps(evidence))
        write_site(site)
        assert not (site / "papers/toy/gap-smoke.csv").exists()
        assert (site / "papers/toy/gap-laptop.csv").exists()
        assert (site / "CNAME").read_text() == "papers.example.org"
        assert (site / "papers/toy/mine.csv").read_text() == "mine"

    def test_a_manifest_cannot_reach_out_of_the_site(self, site, tmp_path):
        precious = tmp_path / "precious.txt"
        precious.write_text("keep")
        (site / "link").symlink_to(tmp_path)
        names = ["../precious.txt", str(precious), "link/precious.txt", 7, "papers", "index.html/../../precious.txt"]
        (site / MANIFEST).write_text(json.dumps({"files": names}))
        write_site(site)
        assert precious.read_text() == "keep"
        assert (site / "papers/toy.html").is_file()

    @pytest.mark.parametrize("text", ["\x00", '{"files": 3}'])
    def test_a_damaged_manifest_removes_nothing(self, site, text):
        (site / MANIFEST).write_text(text)
        write_site(site)
        assert "papers/toy.html" in json.loads((site / MANIFEST).read_text())["files"]


def test_there_are_no_addresses_for_what_needs_a_server():
    for kind in ("runs", "import", "subscribe", "api"):
        with pytest.raises(ValueError, match=kind):
            static("")(kind)
    assert static("../")("paper", "toy") == "../papers/toy.html"
    assert static("../")("feed") == ""


def test_readme_table(toy_evidence, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    update_readme(readme)
    text = readme.read_text()
    assert text == f"before\n{START}\n{readme_table()}{END}\nafter\n"
    row = "| `toy` | optimization | 1 hold, 1 fail | 31× | laptop, 2026-11-21 |"
    assert row in text.replace("[A Toy & Its <Claims>](https://arxiv.org/abs/2401.00000) ", "")
    assert "Listed, not working yet (1): optimization 1.\n" in text


def test_a_readme_without_the_marks_is_left_alone(toy, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("mine")
    with pytest.raises(ValueError, match="lacks the lines"):
        update_readme(readme)
    assert readme.read_text() == "mine"
