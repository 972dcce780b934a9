"""Each recorded paper's verdict stands on its method's page, made from the record: a page that says otherwise is stale."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from headwise.papers import Check, Reproduction, rows
from test_house import load_tool

HOME = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool():
    return load_tool("papers_table")


@pytest.fixture
def home(tmp_path):
    shutil.copy(HOME / "README.md", tmp_path)
    shutil.copytree(HOME / "docs" / "methods", tmp_path / "docs" / "methods")
    return tmp_path


def test_each_recorded_paper_has_its_verdict_on_one_page(tool):
    table = rows()
    assert tool.unsaid(table, tool.pages_made(table)) == []


def test_the_verdict_is_that_of_the_numbers(tool):
    record = next(row.record for row in rows() if row.slug == "bam")
    failed = record.failed()
    assert failed
    said = tool.verdict(record)
    assert "does not hold" in said
    assert f"{len(record.checks) - len(failed)} of {len(record.checks)} checks" in said
    assert all(f"`{check.left} {check.op} {check.right}`" in said for check in failed)
    assert record.environment["date"] in said
    good = replace(record, checks=tuple(check for check in record.checks if check not in failed))
    assert f"**It holds**: all {len(good.checks)} checks" in tool.verdict(good)


def test_a_page_that_claims_more_than_the_record_is_seen(tool, home):
    table, file = rows(), home / "docs" / "methods" / "bam.md"
    text = file.read_text()
    assert tool.pages_made(table, home)[file] == text
    file.write_text(text.replace("**It does not hold**", "**It holds**"))
    assert tool.pages_made(table, home)[file] == text != file.read_text()


def test_a_verdict_that_is_missing_or_twice_is_seen(tool, home):
    table, file = rows(), home / "docs" / "methods" / "bam.md"
    text = file.read_text()
    file.write_text(text + text)
    assert tool.unsaid(table, tool.pages_made(table, home)) == [
        "docs/methods: the verdict of bam stands on 2 pages, wanted one"
    ]
    file.unlink()
    assert "stands on 0 pages" in tool.unsaid(table, tool.pages_made(table, home))[0]


def test_a_verdict_without_a_record_is_refused(tool, home):
    (home / "docs" / "methods" / "new.md").write_text("<!-- verdict rcmha -->\nIt holds.\n<!-- /verdict -->\n")
    with pytest.raises(SystemExit, match="rcmha"):
        tool.pages_made(rows(), home)


def test_no_row_says_works_without_a_run_that_holds():
    for row in rows():
        holds = [run.holds for run in row.records]
        assert row.status != "works" or (holds and all(holds)), row.slug
        assert row.status != "planned" or not holds, row.slug


# run again


@pytest.fixture(scope="module")
def rerun():
    return load_tool("rerun_papers")


def made(value, time=1.0):
    checks = (Check("beats chance", "reached", ">", "chance"),)
    return Reproduction("moh", "c", "cpu", {"reached": value, "step_ms": time}, {"chance": 0.5}, checks, 1.0)


def test_a_run_that_tells_another_story_is_seen(rerun):
    assert list(rerun.differences(made(0.8), made(0.81, time=9.0))) == []
    assert list(rerun.differences(made(0.8), made(0.6))) == [(False, "reached: 0.8 in the record, 0.6 now")]
    untrue, *_ = rerun.differences(made(0.8), made(0.4))
    assert untrue == (True, "was true and is false: beats chance: reached > chance")
    other = replace(made(0.8), checks=(Check("far above", "reached", ">", 0.7),))
    assert [bad for bad, _ in rerun.differences(made(0.8), other)] == [True, True]


def test_the_seed_is_the_one_that_the_page_states(rerun, home):
    assert rerun.seed_of("bam", home) == 0
    file = home / "docs" / "methods" / "bam.md"
    text = file.read_text()
    begin, found, rest = text.partition("<!-- /verdict -->")
    file.write_text(begin + found + "\n\nAs `headwise reproduce bam --seed 7` says.\n" + rest)
    assert rerun.seed_of("bam", home) == 7


def test_every_row_is_run_and_a_false_one_fails(rerun, monkeypatch, capsys):
    from types import SimpleNamespace

    row = SimpleNamespace(slug="moh", record=made(0.8), reproduce=lambda scale, *, seed: made(0.9 - seed))
    monkeypatch.setattr(rerun, "rows", lambda: [row])
    monkeypatch.setattr(rerun, "seed_of", lambda slug: 0)
    assert rerun.main([]) == 0
    assert "1 of 1 are as recorded" in capsys.readouterr().out
    monkeypatch.setattr(rerun, "seed_of", lambda slug: 1)
    assert rerun.main(["moh"]) == 1
    assert "NOT AS RECORDED" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        rerun.main(["nothing"])
