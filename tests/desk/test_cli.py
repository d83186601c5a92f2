"""The command line as a script sees it: output, JSON, exit codes."""

import json
import subprocess
import sys
import time

import pytest

from workingpapers.cli import main
from workingpapers.desk import evidence
from workingpapers.desk.catalogue import evidence_path, paper


def run(capsys, *arguments):
    """Exit code, standard output and standard error of a command."""
    try:
        code = main([*arguments])
    except SystemExit as left:
        code = left.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def as_json(capsys, *arguments):
    code, out, _ = run(capsys, *arguments, "--json")
    return code, json.loads(out)


@pytest.fixture
def recorded(toy, capsys):
    run(capsys, "check", toy, "--scale", "laptop", "--jobs", "0", "--record")
    run(capsys, "bench", toy, "--scale", "laptop", "--jobs", "0", "--record")
    return toy


class TestReading:
    def test_list(self, toy, capsys):
        code, rows = as_json(capsys, "list")
        assert code == 0
        assert [(row["slug"], row["status"], row["verdicts"]) for row in rows] == [
            ("toy", "listed", {}),
            ("rope", "listed", {}),
        ]
        code, out, _ = run(capsys, "list", "--status", "working")
        assert (code, "0 papers" in out) == (0, True)

    def test_list_after_recording(self, recorded, capsys):
        _, rows = as_json(capsys, "list", "--field", "optimization")
        assert rows[0]["status"] == "working"
        assert rows[0]["verdicts"]["laptop"] == {"gap": "holds", "exact": "fails", "speed": "holds"}
        assert "✗ toy" in run(capsys, "list")[1]

    def test_show_tells_measured_interval_and_age(self, recorded, capsys, tmp_path):
        code, out, _ = run(capsys, "show", recorded)
        assert code == 0
        assert "gap of new below old (difference): -" in out
        assert "older than the code" not in out
        claims = tmp_path / "claims/optimization/toy.py"
        claims.write_text(claims.read_text().replace('"new": 1.0', '"new": 1.5'))
        assert "older than the code" in run(capsys, "show", recorded)[1]

    def test_an_unknown_slug_suggests_the_nearest(self, toy, capsys):
        code, _, err = run(capsys, "show", "toi")
        assert code == 2
        assert "did you mean toy" in err

    def test_search(self, toy, capsys):
        code, hits = as_json(capsys, "search", "knots")
        assert (code, [hit["slug"] for hit in hits]) == (0, ["rope"])
        assert run(capsys, "search", "zebra")[0] == 0

    def test_help_shows_an_example(self, capsys):
        for command in ("list", "search", "show", "check", "bench", "import", "report"):
            code, out, _ = run(capsys, command, "--help")
            assert (code, "example:\n  workingpapers" in out) == (0, True)

    def test_answers_at_once_and_without_torch(self):
        program = "import sys; from workingpapers.cli import main; main(['list']); print('torch' in sys.modules)"
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.strip().endswith("False")
        # 0.3 s on an idle machine; the suite's other processes share this one's cores
        assert time.perf_counter() - started < 1.5

    def test_importing_the_package_is_cheap(self):
        program = (
            "import time; t = time.perf_counter(); import workingpapers; d = time.perf_counter() - t\n"
            "import sys; print(d, 'torch' in sys.modules, 'numpy' in sys.modules)"
        )
        times = []
        for _ in range(3):
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
            seconds, torch, numpy = done.stdout.split()
            assert (torch, numpy) == ("False", "False")
            times.append(float(seconds))
        assert min(times) < 0.05


class TestMeasuring:
    def test_check(self, toy, capsys):
        code, claims = as_json(capsys, "check", toy, "--jobs", "0")
        assert code == 1
        assert [(claim["claim"], claim["verdict"]) for claim in claims] == [("gap", "holds"), ("exact", "fails")]
        first = claims[0]
        assert (first["paper"], first["scale"], first["seed"], first["cells"]) == ("toy", "smoke", 0, 10)
        (expectation,) = first["expectations"]
        assert expectation["measured"] == pytest.approx(-1 / 3)
        assert expectation["interval"] == pytest.approx([-1 / 3, -1 / 3])
        assert (expectation["threshold"], expectation["verdict"], expectation["replicates"]) == (0.0, "holds", 5)
        assert claims[1]["expectations"][0]["note"] == "broken in 1 of 2 rows"

    def test_exit_codes(self, toy, capsys):
        assert run(capsys, "check", toy, "--claim", "gap", "--jobs", "0")[0] == 0
        assert run(capsys, "check", toy, "--claim", "exact", "--jobs", "0")[0] == 1
        code, out, _ = run(capsys, "check", toy, "--scale", "paper", "--claim", "large", "--jobs", "0")
        assert (code, "too small" in out) == (3, True)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["check"], "name the papers"),
            (["check", "toy", "--all"], "name the papers"),
            (["check", "toyy"], "did you mean toy"),
            (["check", "rope"], "does not work yet"),
            (["check", "toy", "--claim", "nope", "--jobs", "0"], "no claim nope; it has gap, exact, large"),
            (["check", "toy", "--scale", "huge"], "invalid choice"),
            (["check", "toy", "--seed", "-1"], "at least 0"),
            (["check", "toy", "--timeout", "nan"], "must be positive"),
            (["check", "toy", "--on", "slurm"], "slurm"),
            (["report"], "name a directory"),
            (["report", "--readme", "/nonexistent/README.md"], "README.md"),
            (["import", "/nonexistent.html"], "cannot read"),
            (["frobnicate"], "invalid choice"),
            ([], "required"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_bad_use_is_2_and_says_why(self, toy, capsys, arguments, message):
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert message in err
        assert "Traceback" not in err

    def test_seeds_are_consecutive_from_the_first(self, toy, capsys):
        _, claims = as_json(capsys, "check", toy, "--claim", "exact", "--seed", "7", "--jobs", "0")
        assert (claims[0]["seed"], claims[0]["expectations"][0]["measured"]) == (7, 8.0)

    def test_what_was_measured_is_used_again(self, toy, capsys, tmp_path):
        def stamps():
            from workingpapers.desk.store import Store

            with Store(tmp_path / "store.sqlite") as store:
                return [result.measured_at for result in store.results("toy", "gap")]

        run(capsys, "check", toy, "--claim", "gap", "--jobs", "0")
        first = stamps()
        run(capsys, "check", toy, "--claim", "gap", "--jobs", "0")
        assert stamps() == first
        run(capsys, "check", toy, "--claim", "gap", "--jobs", "0", "--fresh")
        assert all(new > old for new, old in zip(stamps(), first, strict=True))

    def test_a_broken_store_is_refused(self, toy, capsys, tmp_path):
        broken = tmp_path / "broken.sqlite"
        broken.write_bytes(b"not a database" * 100)
        code, _, err = run(capsys, "check", toy, "--store", str(broken), "--jobs", "0")
        assert (code, str(broken) in err) == (2, True)
        assert broken.read_bytes() == b"not a database" * 100


class TestEvidence:
    def test_records_what_page_and_readme_need(self, recorded):
        found = evidence.load(recorded)
        entries = {entry["claim"]: entry for entry in found["claims"]["laptop"]}
        assert list(entries) == ["gap", "exact", "speed"]
        gap = entries["gap"]
        assert gap["measurements"]["axes"] == ["size", "method"]
        assert gap["measurements"]["rows"][0][:2] == [10, "new"]
        assert gap["measurements"]["rows"][0][-1] == 6
        assert {series["panel"] for series in gap["figure"]["series"]} == {10, 100}
        (x, y, low, high) = gap["figure"]["series"][0]["points"][-1]
        assert (x, y) == (3, pytest.approx(1.025 / 3, rel=1e-4))
        assert low < y < high
        assert gap["versions"]["python"]
        assert not evidence.is_stale(paper(recorded), gap)
        json.loads(evidence_path(recorded).read_text(), parse_constant=lambda name: pytest.fail(name))

    def test_scales_and_claims_are_recorded_side_by_side(self, recorded, capsys):
        run(capsys, "check", recorded, "--claim", "exact", "--jobs", "0", "--record")
        found = evidence.verdicts(evidence.load(recorded))
        assert found == {
            "laptop": {"gap": "holds", "exact": "fails", "speed": "holds"},
            "smoke": {"exact": "fails"},
        }
        assert evidence.overall(evidence.load(recorded), "laptop") == "fails"

    def test_a_dropped_claim_takes_its_evidence_along(self, recorded, capsys, tmp_path):
        claims = tmp_path / "claims/optimization/toy.py"
        claims.write_text(claims.read_text().replace("def exact", "def precise"))
        sys.modules.pop("workingpapers.claims.optimization.toy")
        run(capsys, "check", recorded, "--claim", "gap", "--scale", "laptop", "--jobs", "0", "--record")
        assert list(evidence.verdicts(evidence.load(recorded))["laptop"]) == ["gap", "speed"]

    def test_damaged_evidence_is_named(self, recorded):
        evidence_path(recorded).write_text('{"paper": "toy"')
        with pytest.raises(ValueError, match=r"toy\.json is not evidence of toy"):
            evidence.load(recorded)


class TestReport:
    def test_pages_are_written_and_named(self, recorded, capsys, tmp_path):
        site = tmp_path / "site"
        code, out, _ = run(capsys, "report", str(site))
        assert (code, out.rstrip().endswith(f"{site.as_uri()}/index.html")) == (0, True)
        page = (site / "papers/toy.html").read_text()
        assert "half the gap of &lt;the&gt; old method" in page
        assert "<svg" in page
        assert "from workingpapers.optimization.toy import solve" in page
        code, written = as_json(capsys, "report", str(site))
        assert str(site / "index.html") in written

    def test_readme_table(self, recorded, capsys, tmp_path):
        from workingpapers.desk.report import END, START

        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
        assert run(capsys, "report", "--readme", str(readme))[0] == 0
        text = readme.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "| 1 hold, 1 fail |" in text
        assert "old\n" not in text
        assert "working yet (1): optimization 1" in text
        run(capsys, "report", "--readme", str(readme))
        assert readme.read_text() == text


def test_import(toy, capsys, tmp_path):
    page = tmp_path / "page.txt"
    page.write_text(
        "new\n\nGet trending papers in your email inbox!\n\nSubscribe\n\nbyAK and the research community\n\nMar 11\n\n"
        "A Toy & Its <Claims>\n\nWe claim.\n\nUntying Knots With Ropes\n\nRopes untie knots."
    )
    code, found = as_json(capsys, "import", str(page))
    assert code == 0
    assert [(one["slug"], one["title"]) for one in found["papers"]] == [
        ("toy", "A Toy & Its <Claims>"),
        (None, "Untying Knots With Ropes"),
    ]
    assert found["papers"][1]["nearest"][0]["slug"] == "rope"
    out = run(capsys, "import", str(page))[1]
    assert "2 papers, 1 in the catalogue, 1 new" in out
    (tmp_path / "empty.txt").write_text("")
    code, _, err = run(capsys, "import", str(tmp_path / "empty.txt"))
    assert (code, "empty.txt" in err) == (2, True)
