"""`headwise papers` and `headwise reproduce`: rows, records of both scales, exit codes."""

import json

import pytest

import headwise.papers
from headwise import registry
from headwise.papers.catalogue import record_file, rows
from papers_helper import fake, reproduction


def test_papers_lists_33_rows_with_their_status(run):
    code, out, _ = run("papers", "--json")
    listed = json.loads(out)
    assert code == 0
    assert [r["id"] for r in listed] == [f"{n:02}" for n in range(1, 34)]
    assert {tuple(r) for r in listed} == {("id", "title", "status", "verb", "api", "reproduce")}
    assert {r["status"] for r in listed} <= {"works", "partial", "planned"}
    assert {r["verb"] for r in listed} <= set(registry.FOLDERS)
    assert all(r["reproduce"] == (r["status"] != "planned") for r in listed)
    assert len({r.slug for r in rows()}) == len({r.arxiv for r in rows()}) == 33
    assert "moh" in run("papers")[1]


def test_runs_of_both_scales_are_kept_and_each_must_hold(run, monkeypatch, tmp_path):
    monkeypatch.setattr("headwise.papers.catalogue.RECORDS", tmp_path)
    made = fake(monkeypatch, record=reproduction(0.1))
    assert [r.scale for r in made.records] == ["cpu"] and made.status == "works"
    larger = reproduction(0.1, scale="gpu")
    record_file("moh", "gpu").write_text(larger.to_json())
    assert [r.scale for r in made.records] == ["cpu", "gpu"] and made.status == "works"
    record_file("moh", "gpu").write_text(reproduction(0.5, scale="gpu").to_json())
    assert made.status == "partial" and "this is false" in made.problems()[0]

    def measure(scale, *, seed, progress):
        return reproduction(0.1, scale=scale)

    monkeypatch.setattr(headwise.papers, "row", lambda name: fake(monkeypatch, function=measure))
    for scale in ("cpu", "gpu"):
        assert run("reproduce", "moh", "--json", "--scale", scale, "--record")[0] == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["moh.gpu.json", "moh.json"]


@pytest.mark.parametrize("top, code", [(0.1, 0), (0.5, 1)])
def test_reproduce_prints_the_run_and_its_exit_code_is_the_verdict(run, monkeypatch, top, code):
    def measure(scale, *, seed, progress):
        return reproduction(top, scale=scale)

    monkeypatch.setattr(headwise.papers, "row", lambda name: fake(monkeypatch, function=measure))
    ended, out, _ = run("reproduce", "moh", "--json", "--scale", "gpu")
    assert ended == code
    assert json.loads(out)["holds"] == (code == 0)
    assert json.loads(out)["scale"] == "gpu"
    assert ("does not hold" in run("reproduce", "moh")[1]) == (code == 1)


def test_a_planned_paper_says_so(run):
    planned = [r for r in rows() if r.status == "planned"]
    if not planned:
        pytest.skip("no paper is planned any more")
    code, _, err = run("reproduce", planned[0].slug)
    assert code == 2
    assert "is planned" in err
