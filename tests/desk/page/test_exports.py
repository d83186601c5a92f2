"""Downloads: the numbers of the evidence, unchanged, in files that other programs read."""

import csv
import io
import re

import pytest
from pyarrow import parquet

from workingpapers.desk.catalogue import Paper
from workingpapers.desk.page.content import read
from workingpapers.desk.page.exports import as_csv, as_parquet, bibtex, table


@pytest.fixture
def entry(toy_evidence):
    return read().papers["toy"].entries[0]


def made(**changed):
    row = {
        "slug": "toy", "title": "A Toy", "field": "optimization", "module": "optimization.toy", "arxiv": "2401.00001",
        "code": "", "listings": ("Jul 29",), "names": ("solve",), "summary": "minimises toys",
    }  # fmt: skip
    return Paper(**(row | changed))


class TestTable:
    def test_axes_then_moments_then_n(self, entry):
        columns, rows = table(entry)
        assert columns == ["size", "method", "gap_mean", "gap_sd", "loss_mean", "loss_sd", "n"]
        assert rows[0] == [10, "=new()", 0.1, 0.30000000000000004, None, None, 6]

    def test_an_axis_named_n_keeps_its_name(self):
        columns, _ = table({"measurements": {"axes": ["n"], "metrics": [], "rows": [[3, 5]]}})
        assert columns == ["n", "n_"]


class TestCsv:
    def test_what_python_reads_back_is_what_was_measured(self, entry):
        text = as_csv(entry).decode()
        header, first, second = csv.reader(io.StringIO(text, newline=""), strict=True)
        assert header == table(entry)[0]
        assert float(first[3]) == 0.30000000000000004
        assert first[4] == ""
        assert float(second[2]) == -2.5e-7
        assert text.count("\r\n") == text.count("\n") == 3

    def test_no_cell_is_a_formula_and_numbers_stay_numbers(self, entry):
        _, first, second = csv.reader(io.StringIO(as_csv(entry).decode(), newline=""))
        assert (first[1], second[1]) == ("'=new()", '\'@old, "quoted"')
        assert second[2] == "-2.5e-07"

    @pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
    def test_every_way_to_begin_a_formula(self, text):
        entry = {"measurements": {"axes": ["method"], "metrics": [], "rows": [[text, 1]]}}
        assert list(csv.reader(io.StringIO(as_csv(entry).decode(), newline="")))[1][0] == f"'{text}"


class TestParquet:
    def test_types_values_and_metadata(self, entry):
        found = parquet.read_table(io.BytesIO(as_parquet(entry)))
        assert [str(kind) for kind in found.schema.types] == ["int64", "string"] + ["double"] * 4 + ["int64"]
        assert [list(row.values()) for row in found.to_pylist()] == table(entry)[1]
        told = {name.decode(): text.decode() for name, text in found.schema.metadata.items()}
        assert told["workingpapers.paper"] == "toy"
        assert (told["workingpapers.claim"], told["workingpapers.scale"]) == ("gap", "laptop")
        assert told["workingpapers.recorded"].startswith("2026-11-21T10:00")
        assert '"numpy": "2"' in told["workingpapers.versions"]

    def test_an_axis_of_different_types_becomes_text(self, entry):
        mixed = {"axes": ["size", "share", "on"], "metrics": [], "rows": [[1, 1, True, 5], ["all", 0.5, None, 5]]}
        found = parquet.read_table(io.BytesIO(as_parquet({**entry, "measurements": mixed})))
        assert found.to_pydict() == {"size": ["1", "all"], "share": [1.0, 0.5], "on": [True, None], "n": [5, 5]}


class TestBibtex:
    def test_what_the_catalogue_knows(self):
        text = bibtex(made())
        assert text.startswith("@misc{toy,\n")
        fields = dict(re.findall(r"^  (\w+) += \{(.*)\},$", text, re.MULTILINE))
        assert fields["title"] == "{A Toy}"
        assert (fields["year"], fields["eprint"], fields["archivePrefix"]) == ("2024", "2401.00001", "arXiv")
        assert fields["url"] == "https://arxiv.org/abs/2401.00001"
        assert "author" not in fields
        assert "author" in fields["note"]

    def test_latex_and_its_braces_cannot_be_broken_by_a_title(self):
        title = bibtex(made(title=r"Up to 50% & more: $\beta_1^2$ {#1} ~x")).splitlines()[1]
        inside = title.partition("= {")[2].removesuffix("},")
        assert inside == (
            r"{Up to 50\% \& more: \$\textbackslash{}beta\_1\textasciicircum{}2\$ \{\#1\} \textasciitilde{}x}"
        )
        assert bibtex(made(title="Light Schrödinger Bridge")).count("Schrödinger") == 1


class TestRoutes:
    def test_downloads_have_names_and_kinds(self, toy_evidence, client):
        for suffix, kind in [("csv", "text/csv"), ("parquet", "application/vnd.apache.parquet")]:
            answer = client.get(f"/papers/toy/gap-laptop.{suffix}")
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kind)
            assert answer.headers["content-disposition"] == f'attachment; filename="toy-gap-laptop.{suffix}"'
        assert client.get("/papers/toy/gap-smoke.csv").text.splitlines() == [
            "method,gap_mean,gap_sd,n",
            "new,0.1,0.0,5",
        ]

    def test_bibtex_is_not_taken_for_a_paper(self, toy, client):
        answer = client.get("/papers/toy.bib")
        assert answer.text.startswith("@misc{toy,")
        assert answer.headers["content-disposition"].endswith('"toy.bib"')
        assert client.head("/papers/toy.bib").status_code == 200

    @pytest.mark.parametrize(
        "path",
        ["/papers/toy/gap-huge.csv", "/papers/toy/none-laptop.csv", "/papers/none/gap-laptop.csv", "/papers/none.bib",
         "/papers/toy/gap-laptop.exe", "/papers/toy/../../etc/passwd-laptop.csv", "/papers/rope/gap-laptop.parquet",
         "/papers/toy/%2e%2e%2fgap-laptop.csv"],
    )  # fmt: skip
    def test_what_was_not_recorded_is_not_found(self, toy_evidence, client, path):
        assert client.get(path).status_code == 404

    def test_every_address_that_pages_name_answers(self, toy_evidence, client):
        page = client.get("/papers/toy").text
        links = set(re.findall(r'href="(/papers/[^"]+\.(?:csv|parquet|bib))"', page))
        assert len(links) == 4 * 2 + 1
        assert {client.get(link).status_code for link in links} == {200}
