"""docs/performance.md is the kept results, and nothing else: stale pages, claims without a number, and false verdicts are seen."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from test_house import load_tool

HOME = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(HOME / "tools"))
    try:
        yield load_tool("performance_page")
    finally:
        sys.path.remove(str(HOME / "tools"))


@pytest.fixture
def house(tmp_path, tool):
    """A house of its own with two cards and three claims."""
    for name, ratio in (("h100", 1.5), ("h200", 2.5)):
        folder = tmp_path / "benchmarks" / "results" / name
        folder.mkdir(parents=True)
        rows = [{"N": 8, "ms": 4.0}, {"N": 16, "ms": 2.0, "ratio": ratio, "all": [1.0, 0.5]}]
        environment = {"device": f"NVIDIA {name.upper()}", "date": "2026-01-01"}
        data = {"rows": rows, "environment": environment, "commit": "abc1234"}
        (folder / "x.json").write_text(json.dumps(data))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{tool.BEGIN}\nold\n{tool.END}\nafter\n")
    text = """
[[claim]]
area = "A, with more"
issue = 4
what = "speed"
gain = "go faster by"
rank = 2
bar = ">= 2.0"
unit = "×"
file = "*/x.json"
at = ["rows", { N = 16 }, "ratio"]
[[claim]]
area = "A"
issue = 4
what = "worst of two"
bar = "<= 0.9"
file = "h100/x.json"
at = ["rows", 1, "all"]
note = "said why"
[[claim]]
area = "B"
issue = 5
what = "quotient"
gain = "a quotient"
rank = 1
file = "h200/x.json"
at = ["rows", { N = 8 }, "ms"]
over = ["rows", { N = 16 }, "ms"]
[[claim]]
area = "B"
issue = 5
what = "later"
bar = ">= 3.0"
open = "no machine"
"""
    (tmp_path / "benchmarks" / "claims.toml").write_text(text)
    return tmp_path


def test_the_page_is_up_to_date(tool, capsys):
    assert tool.main(["--check"]) == 0, capsys.readouterr().out


def test_every_card_has_a_row_and_misses_are_said(tool, house):
    assert tool.main(["--write"], house) == 0
    text = (house / "docs" / "performance.md").read_text()
    assert "| speed | ≥ 2.0 × | 1.5 | **missed** | H100 | 2026-01-01 | abc1234 | `h100/x.json` | 4 |" in text
    assert "| speed | ≥ 2.0 × | 2.5 | met | H200 |" in text
    assert "| worst of two | ≤ 0.9 | 1 / 0.5 | **missed** |" in text
    assert "- worst of two: said why" in text
    assert "| quotient | – | 2 | no bar |" in text
    assert "| later | ≥ 3.0 | – | **not measured** |" in text
    assert "**1 met, 2 missed, 1 not measured, 1 without a bar.**" in text


def test_the_readme_shows_the_claims_with_a_gain_in_their_order_with_machine_and_verdict(tool, house):
    tool.main(["--write"], house)
    assert (
        (house / "README.md").read_text()
        == f"""before
{tool.BEGIN}
| what you do | measured | bar | | machine |
|---|---|---|---|---|
| [a quotient](docs/performance.md#b) | **2** | – | no bar | H200 |
| [go faster by](docs/performance.md#a-with-more) | **1.5** × | ≥ 2.0 | **missed** | H100 |
| [go faster by](docs/performance.md#a-with-more) | **2.5** × | ≥ 2.0 | met | H200 |
{tool.END}
after
"""
    )


def test_a_changed_readme_is_stale_and_one_without_a_place_or_with_too_many_gains_is_an_error(tool, house, capsys):
    tool.main(["--write"], house)
    readme, claims = house / "README.md", house / "benchmarks" / "claims.toml"
    right = readme.read_text()
    readme.write_text(right.replace("**2.5**", "**9**"))
    assert tool.main(["--check"], house) == 1
    assert "README.md is out of date" in capsys.readouterr().out
    readme.write_text(right.replace(tool.END, ""))
    assert tool.main(["--write"], house) == 1
    assert "README.md lacks the lines" in capsys.readouterr().out
    readme.write_text(right)
    row = claims.read_text().split("[[claim]]")[1]
    claims.write_text(claims.read_text() + f"[[claim]]{row}" * 5)
    assert tool.main(["--write"], house) == 1
    assert "13 gains; 12 are enough" in capsys.readouterr().out


def test_every_gain_of_the_readme_links_to_a_heading_of_the_page():
    rows = re.findall(r"\(docs/performance\.md#([\w-]+)\)", (HOME / "README.md").read_text(encoding="utf-8"))
    page = (HOME / "docs" / "performance.md").read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", line[3:].lower()).replace(" ", "-") for line in page.splitlines() if line[:3] == "## "
    }
    assert rows and set(rows) <= headings


def test_the_worst_of_all_entries_counts(tool):
    rows = [{"N": n, "speed": 1.0 + n / 10} for n in range(5)] + [{"N": 9}]
    result = tool.Result("x.json", {"rows": rows})
    value = result.value(["rows", "*", "speed"])
    assert value == pytest.approx([1.0, 1.1, 1.2, 1.3, 1.4])
    claim = tool.Claim(area="A", issue=4, what="all", bar=">= 1.05", at=())
    assert claim.holds(value) is False
    assert claim.holds(value[1:]) is True
    assert tool._shown(value) == "1 to 1.4, 5 rows"
    with pytest.raises(tool.ClaimError, match="no number"):
        result.value(["rows", "*", "missing"])


def test_a_changed_result_makes_the_page_stale(tool, house, capsys):
    tool.main(["--write"], house)
    assert tool.main(["--check"], house) == 0
    file = house / "benchmarks" / "results" / "h200" / "x.json"
    file.write_text(file.read_text().replace("2.5", "1.9"))
    assert tool.main(["--check"], house) == 1
    assert "out of date" in capsys.readouterr().out


@pytest.mark.parametrize(
    "before, after, why",
    [
        ('"*/x.json"', '"*/y.json"', "no kept file is called"),
        ("N = 16 }, \"ratio\"", "N = 17 }, \"ratio\"", "no file has"),
        ('at = ["rows", 1, "all"]', 'at = ["rows", 7, "all"]', "there is no 7"),
        ('at = ["rows", 1, "all"]', 'at = ["rows"]', "no number"),
        ('bar = "<= 0.9"', 'bar = "fast"', "reads '>= 1.5'"),
        ('over = ["rows", { N = 16 }, "ms"]', 'over = ["rows", { N = 16 }, "all"]', "wants two numbers"),
    ],
)  # fmt: skip
def test_a_claim_that_points_at_nothing_is_an_error(tool, house, capsys, before, after, why):
    file = house / "benchmarks" / "claims.toml"
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))
    assert tool.main(["--write"], house) == 1
    assert why in capsys.readouterr().out


# the one command


@pytest.fixture(scope="module")
def runner():
    import importlib.util

    spec = importlib.util.spec_from_file_location("run_all", HOME / "benchmarks" / "run_all.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_all"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["run_all"]


def test_every_run_has_a_script_and_a_machine(runner):
    runs = runner.runs()
    assert {run.on for run in runs} == {"any", "cpu", "cuda"}
    for run in runs:
        words = shlex.split(run.command)
        assert words[0] == "python"
        assert words[1] == "-m" or (HOME / words[1]).exists(), run.command
        assert ("--device cuda" in run.command) <= (run.on == "cuda"), run.command
    for device in ("cpu", "cuda"):
        names = [run.name for run in runs if run.fits(device)]
        assert len(names) == len(set(names)), device


def test_printed_json_is_read_as_one_object_or_as_rows(runner):
    assert runner.objects('warming up\n{"a": {"b": 1}}\n') == {"a": {"b": 1}}
    found = runner.objects('{"environment": {"device": "NVIDIA H200"}}\n{"N": 1}\n{"N": 2}')
    assert found == {"environment": {"device": "NVIDIA H200"}, "rows": [{"N": 1}, {"N": 2}]}
    with pytest.raises(RuntimeError, match="no JSON"):
        runner.objects("Traceback")


def test_a_result_goes_to_its_machine_with_its_circumstances(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    script = tmp_path / "measure.py"
    script.write_text("print('{\"ms\": 3}')")
    found = runner.Run("it", "any", 60, f"python {shlex.quote(str(script))}")()
    kept = runner.keep("it", found)
    assert kept == tmp_path / "cpu" / "it.json"
    data = json.loads(kept.read_text())
    assert data["ms"] == 3
    assert {"command", "commit", "load", "seconds", "environment"} <= set(data)
    assert data["environment"]["torch"]
    assert runner.folder_of({"environment": {"device": "NVIDIA H100 80GB HBM3"}}) == tmp_path / "h100"


def test_a_run_that_fails_keeps_what_was_there(runner, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "bad.json").write_text("before")
    script = tmp_path / "bad.py"
    script.write_text("import sys; print('{}'); sys.exit('no such kernel')")
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(60)")
    runs = [runner.Run("bad", "any", 60, f"python {script}"), runner.Run("slow", "any", 1, f"python {slow}")]
    assert runner.measure(runs) == 2
    out = capsys.readouterr().out
    assert "no such kernel" in out
    assert "timed out" in out
    assert (tmp_path / "cpu" / "bad.json").read_text() == "before"
    assert not (tmp_path / "cpu" / "slow.json").exists()


def test_results_of_another_machine_are_taken_in(runner, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "HOME", tmp_path)
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("HEADWISE_COMMIT", "feed123")
    brought = tmp_path / "brought"
    brought.mkdir()
    (brought / "spans.json").write_text('{"environment": {"device": "NVIDIA H200"}, "rows": []}')
    (brought / "empty.json").write_text("")
    (brought / "nowhere.json").write_text('{"ms": 1}')
    assert runner.brought(brought) == 2
    assert json.loads((tmp_path / "results" / "h200" / "spans.json").read_text())["commit"] == "feed123"
    assert "not on what machine" in capsys.readouterr().out
    assert not (tmp_path / "results" / "cpu").exists()
    shutil.rmtree(brought)
