"""Files as the explorer reads them, and what goes wrong with them."""

import json
import os

import pytest
import torch

from headwise.errors import ArtifactError, HeadwiseError, ViewError
from headwise.papers.catalogue import RECORDS
from headwise.plan import HeadPlan
from headwise.units import HeadScores
from headwise.view.library import MOST, Library
from headwise.view.points import Points
from view_helper import folder_of

RUN = {
    "kind": "full cache",
    "full_heads": 6,
    "exact": 1.0,
    "tokens": 1.0,
    "prompts": 2,
    "perplexity": 3.0,
    "cache_bytes": 100,
    "tokens_per_s": 5.0,
}


def test_every_kind_is_found_by_what_the_file_says(tmp_path):
    folder_of(tmp_path)
    Points.from_report({"budgets": [RUN]}, "x").save(tmp_path / "points.json")
    (tmp_path / "report.json").write_text(json.dumps({"findings": {"budgets": [RUN]}}))
    (tmp_path / "record.json").write_text(next(iter(sorted(RECORDS.glob("*.json")))).read_text())
    (tmp_path / "package.json").write_text('{"name": "something else"}')
    library = Library.open([tmp_path])
    kinds = {name: item.kind for name, item in library.items.items()}
    assert kinds == {
        "alpha.safetensors": "scores", "beta.safetensors": "scores", "gates.safetensors": "scores", "set.safetensors": "set",
        "plan.json": "plan", "wide.json": "plan", "edits.json": "edits", "points.json": "points", "report.json": "report",
        "report.json: budgets": "points", "record.json": "record",
    }  # fmt: skip
    assert library.problems == ()
    assert all(item.line for item in library.items.values())


@pytest.mark.parametrize(
    "name, content",
    [
        ("bad.json", b"{"),
        ("bad.json", b"\xff\xfe"),
        ("bad.safetensors", b"nothing"),
        ("bad.json", b'{"headwise": "head-plan", "schema": 99}'),
        ("bad.json", b'{"findings": {"budgets": [{"kind": "full cache"}]}}'),
        ("bad.json", b'{"headwise": "cache-points", "schema": 1, "runs": [], "how": ""}'),
        ("bad.json", b'{"paper": "x", "claim": "", "expected": "", "holds": true}'),
    ],
)
def test_a_broken_file_is_listed_with_the_reason_and_the_others_are_read(tmp_path, name, content):
    folder_of(tmp_path)
    (tmp_path / name).write_bytes(content)
    library = Library.open([tmp_path])
    assert [problem.name for problem in library.problems] == [name]
    assert library.problems[0].reason
    assert "alpha.safetensors" in library.items
    with pytest.raises(HeadwiseError):
        Library.open([tmp_path / name])


def test_links_out_of_the_folder_hidden_and_deep_files_are_left_out(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside / ".hidden", inside / "a/b/c/d", outside):
        folder.mkdir(parents=True)
        HeadScores(values=torch.ones(1, 2), method="x").save(folder / "s.safetensors")
    HeadScores(values=torch.ones(1, 2), method="x").save(inside / "a" / "s.safetensors")
    os.symlink(outside / "s.safetensors", inside / "link.safetensors")
    assert list(Library.open([inside]).items) == ["a/s.safetensors"]


def test_a_folder_of_many_files_is_cut_and_that_is_said(tmp_path):
    for number in range(MOST + 1):
        (tmp_path / f"{number:04d}.json").write_text("{}")
    (problem,) = Library.open([tmp_path]).problems
    assert f"the first {MOST} were read" in problem.reason


def test_what_is_not_there(tmp_path):
    with pytest.raises(ViewError, match="does not exist"):
        Library.open([tmp_path / "nothing"])
    library = Library.open([tmp_path])
    for name in ("nothing", None, "../x"):
        with pytest.raises(ViewError, match="no file here"):
            library.get(name, HeadPlan)


def test_two_folders_with_one_name(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        HeadScores(values=torch.ones(1, 2), method=name).save(tmp_path / name / "s.safetensors")
    assert list(Library.open([tmp_path / "a", tmp_path / "b"]).items) == ["a/s.safetensors", "b/s.safetensors"]


def test_points_need_the_full_cache_and_real_counts():
    with pytest.raises(ArtifactError, match="full cache"):
        Points.from_report({"budgets": [{**RUN, "kind": "random"}]}, "x")
    with pytest.raises(ArtifactError, match="at least one byte"):
        Points.from_report({"budgets": [{**RUN, "cache_bytes": 0}]}, "x")
