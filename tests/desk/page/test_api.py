"""Everything that the pages show, as JSON that is what the description says."""

import json
import os
import time

import pytest

from workingpapers.desk.page import content, models
from workingpapers.desk.page.guard import HEADER


def paths(client):
    return client.get("/api/openapi.json").json()["paths"]


class TestPapers:
    def test_the_listing(self, toy_evidence, client):
        found = client.get("/api/papers").json()
        assert found["count"] == 2
        toy, rope = found["papers"]
        assert (toy["slug"], toy["status"], toy["verdict"], toy["scale"]) == ("toy", "working", "fails", "laptop")
        assert (toy["tally"], toy["speed"]) == ({"holds": 1, "fails": 1}, [31.0, 31.0])
        assert (rope["status"], rope["verdict"], rope["recorded"]) == ("listed", None, "")

    @pytest.mark.parametrize(
        ("query", "slugs"),
        [
            ("status=working", ["toy"]),
            ("status=listed", ["rope"]),
            ("verdict=holds", ["toy"]),
            ("verdict=crashed", []),
            ("field=optimization", ["toy", "rope"]),
            ("field=causality", []),
            ("listing=Jul%2029", ["toy"]),
            ("listing=Mar%2011&status=listed", ["rope"]),
            ("verdict=fails&status=listed", []),
        ],
    )
    def test_filters_combine(self, toy_evidence, client, query, slugs):
        found = client.get(f"/api/papers?{query}").json()
        assert [paper["slug"] for paper in found["papers"]] == slugs
        assert found["count"] == len(slugs)

    @pytest.mark.parametrize(
        "query", ["field=none", "verdict=x", "status=", "listing=%00", "listing=Mar+11%0A", "field="]
    )
    def test_filters_that_cannot_be_are_refused(self, toy, client, query):
        answer = client.get(f"/api/papers?{query}")
        assert answer.status_code == 422
        models.Invalid.model_validate(answer.json())

    def test_one_paper_has_what_its_page_shows(self, toy_evidence, client):
        found = client.get("/api/papers/toy").json()
        gap = found["evidence"][0]
        recorded = json.loads(toy_evidence.read_text())["claims"]["laptop"][1]
        assert {name: gap[name] for name in recorded} == recorded
        assert gap["stale"] is False
        assert client.get(gap["csv"]).status_code == client.get(gap["parquet"]).status_code == 200
        assert found["bibtex"].startswith("@misc{toy,")
        assert "import solve" in found["use"]
        assert found["check"][0] == "workingpapers check toy --scale laptop"
        assert [near["slug"] for near in found["nearest"]] == ["rope"]
        assert client.get(found["page"]).status_code == client.get(found["nearest"][0]["api"]).status_code == 200

    def test_damaged_evidence_is_told(self, toy_evidence, client):
        toy_evidence.write_text("{")
        client.app.state.site._current = content.Current()
        assert client.get("/api/papers/toy").json()["unreadable"] is True
        assert client.get("/papers/toy").status_code == 200
        assert client.get("/").status_code == 200

    def test_unknown_papers_are_not_found(self, toy, client):
        answer = client.get("/api/papers/none")
        assert (answer.status_code, list(answer.json())) == (404, ["detail"])


def test_listings_and_fields(toy_evidence, client):
    listings = client.get("/api/listings").json()["listings"]
    assert [(found["date"], found["count"], found["working"]) for found in listings] == [
        ("Jul 29", 1, 1),
        ("Mar 11", 2, 1),
    ]
    assert client.get(listings[0]["api"]).json()["count"] == 1
    fields = client.get("/api/fields").json()["fields"]
    assert {found["field"]: found["count"] for found in fields}["optimization"] == 2
    assert client.get(fields[0]["api"]).status_code == 200


def test_the_root_leads_to_everything_that_can_be_read(toy, client):
    root = client.get("/api").json()
    assert {"/api/papers", "/api/listings", "/api/fields", "/api/token"} <= set(root["links"])
    assert client.get(root["openapi"]).json()["info"]["version"] == root["version"]
    assert client.get(root["docs"]).headers["content-type"].startswith("text/html")


def test_answers_are_what_the_description_says(toy_evidence, client):
    described = {
        "/api": models.Root,
        "/api/papers": models.PaperList,
        "/api/papers/toy": models.Whole,
        "/api/listings": models.ListingList,
        "/api/fields": models.FieldList,
        "/api/token": models.Token,
    }
    for path, model in described.items():
        assert model.model_validate_json(client.get(path).content, strict=True)
        operation = paths(client)[path.replace("toy", "{slug}")]["get"]
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert schema["$ref"].endswith(f"/{model.__name__}")


class TestKeeping:
    @pytest.mark.parametrize(
        "path", ["/api", "/api/papers", "/api/papers?status=working", "/api/papers/toy", "/api/fields"]
    )
    def test_an_unchanged_answer_is_not_sent_again(self, toy_evidence, client, path):
        first = client.get(path)
        tag = first.headers["etag"]
        for given in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            again = client.get(path, headers={"if-none-match": given})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert client.get(path, headers={"if-none-match": '"other"'}).content == first.content

    def test_a_changed_answer_is(self, toy_evidence, client, monkeypatch):
        monkeypatch.setattr(content, "PATIENCE", -1.0)
        tag = client.get("/api/papers").headers["etag"]
        toy_evidence.write_text(toy_evidence.read_text().replace('"fails"', '"holds"'))
        os.utime(toy_evidence, ns=(0, toy_evidence.stat().st_mtime_ns + 1_000_000))
        answer = client.get("/api/papers", headers={"if-none-match": tag})
        assert answer.status_code == 200
        assert answer.json()["papers"][0]["verdict"] == "holds"

    def test_head_has_the_headers_of_get(self, toy_evidence, client):
        got, asked = client.get("/api/papers/toy"), client.head("/api/papers/toy")
        assert asked.headers["etag"] == got.headers["etag"]
        assert asked.headers["content-length"] == str(len(got.content))

    def test_kept_answers_are_fast(self, toy_evidence, client):
        client.get("/api/papers")
        started = time.process_time()
        for _ in range(50):
            client.get("/api/papers")
        assert (time.process_time() - started) / 50 < 0.02


class TestToken:
    def test_it_lets_a_program_change_something(self, toy, client):
        answer = client.get("/api/token")
        assert answer.headers["cache-control"] == "no-store"
        assert answer.json()["header"].lower() == HEADER
        told = answer.json()
        assert client.post("/api/stars/toy").status_code == 403
        changed = client.post("/api/stars/toy", headers={told["header"]: told["token"]})
        assert changed.status_code == 200
        assert "reader" in client.cookies
        assert client.get("/api/token").json() == answer.json()

    def test_it_is_the_readers_own(self, toy, client):
        first = client.get("/api/token").json()["token"]
        client.cookies.clear()
        assert client.get("/api/token").json()["token"] != first


def test_the_overview_shows_every_route(toy, client):
    page = client.get("/api/docs").text
    for path in paths(client):
        assert path in page
    assert "only papers of this field" in page
