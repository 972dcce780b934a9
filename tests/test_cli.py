"""The command line as a user meets it: help, files, JSON, errors in one line, commands made from methods."""

import json
import subprocess
import sys
from typing import Literal

import pytest
import torch
import typer
from typer.testing import CliRunner

import headwise.papers
from headwise import registry
from headwise.cli import app, generated, main
from headwise.cli.common import jsonable
from headwise.errors import HeadwiseError
from headwise.papers import Check, Paper, Reproduction
from headwise.papers.catalogue import Row, record_file, row, rows
from headwise.registry import MethodError, register
from headwise.units import HeadScores, HeadSet

LLAMA = "tiny-random-llama"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """`run("eval", …)` → (exit code, standard output, standard error), through the real entry point."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


# help


def test_help_needs_no_torch():
    code = "import sys\nfrom headwise.cli import app\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def commands(command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path]
    if hasattr(command, "list_commands"):
        for name in command.list_commands(None):
            found += commands(command.get_command(None, name), (*path, name))
    return found


@pytest.mark.parametrize("path", commands(typer.main.get_command(app)), ids=lambda path: " ".join(path) or "headwise")
def test_every_command_has_help_that_teaches(run, path):
    code, out, _ = run(*path, "--help")
    assert code == 0
    assert "Usage:" in out
    assert "Example:" in out or "In Python:" in out or not path


def test_only_commands_that_can_do_something_exist():
    names = {path[0] for path in commands(typer.main.get_command(app)) if path}
    for name, verb in generated.COMMANDS.items():
        assert (name in names) == (name == "edit" or verb in registry.declared())


# errors


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["generate", "-m", "no-such-model", "-p", "x"], "no-such-model"),
        (["generate", "-m", LLAMA, "-p", ""], "the prompt is empty"),
        (["generate", "-m", "tiny-random-vit", "-p", "x"], "has no tokenizer"),
        (["generate", "-m", LLAMA, "-p", "x", "--plan", "missing.json"], "missing.json"),
        (["generate", "-m", LLAMA, "-p", "x", "--edits", "missing.json"], "missing.json"),
        (["eval", "-m", LLAMA, "--task", "passkey,chess"], "no task is called chess"),
        (["eval", "-m", LLAMA, "--task", ","], "no task is called"),
        (["eval", "-m", LLAMA, "--task", "perplexity", "--tokens", "100000000"], "the packaged text has"),
        (["edit", "zero", "-o", "x.json"], "say which heads"),
        (["edit", "zero", "-o", "x.json", "--units", "L1X3"], "L1X3"),
        (["edit", "zreo", "-o", "x.json"], "did you mean 'zero'"),
        (["edit", "scale", "-o", "x.json", "--units", "L1H3", "--value", "nan"], "finite"),
        (["reproduce", "no-such-paper"], "no paper is called 'no-such-paper'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(run, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert text in err
    assert list(tmp_path.iterdir()) == []


def test_the_debug_variable_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("HEADWISE_DEBUG", "1")
    with pytest.raises(HeadwiseError):
        main(["reproduce", "no-such-paper"])


@pytest.mark.parametrize(
    "arguments", [["bogus"], ["generate"], ["eval", "--prompts", "0"], ["edit", "mix-v", "--amount", "2"]]
)
def test_wrong_usage_is_exit_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err


# files and JSON


def test_edits_are_written_added_to_and_used(run, tmp_path):
    file = str(tmp_path / "edits.json")
    assert run("edit", "zero", "--units", "L0H1,L1H2", "-o", file)[0] == 0
    code, out, _ = run("edit", "scale", "--units", "L2H0", "--value", "2", "-o", file, "--append", "--json")
    assert code == 0
    said = json.loads(out)
    assert [edit.split()[0] for edit in said["edits"]] == ["zero", "scale"]

    ask = ["generate", "-m", LLAMA, "-p", "Once upon a time", "-n", "5", "--json"]
    plain, edited = (json.loads(run(*ask, *more)[1]) for more in ([], ["--edits", file]))
    assert plain["prompt_tokens"] == edited["prompt_tokens"] > 0
    assert 1 <= plain["new_tokens"] <= 5
    assert plain["cache_bytes"] > 0


def test_edits_of_the_best_heads_remember_their_model(run, tmp_path):
    import torch

    from headwise.attach import fingerprint
    from headwise.hub import load_model

    model, _ = load_model(LLAMA)
    values = torch.arange(12.0).view(3, 4)
    HeadScores(values=values, method="toy", fingerprint=fingerprint(model)).save(tmp_path / "s.safetensors")
    code, out, _ = run(
        "edit", "zero", "--scores", str(tmp_path / "s.safetensors"), "--top", "2", "-o", str(tmp_path / "e.json")
    )
    assert code == 0
    assert "L2H2,L2H3" in out
    code, _, err = run("generate", "-m", "tiny-random-gpt2", "-p", "hello", "--edits", str(tmp_path / "e.json"))
    assert code == 2
    assert "was made for llama" in err


def test_generate_under_a_plan_uses_less_cache(run, tmp_path):
    from headwise.plan import HeadPlan, SinkWindow

    HeadPlan.uniform(SinkWindow(4, 12), 3, 2).save(tmp_path / "plan.json")
    ask = ["generate", "-m", LLAMA, "-p", "Once upon a time, " * 20, "-n", "4", "--json"]
    full, small = (json.loads(run(*ask, *more)[1]) for more in ([], ["--plan", str(tmp_path / "plan.json")]))
    assert small["cache_bytes"] < 0.2 * full["cache_bytes"]


def test_eval_prints_one_json_object(run, tmp_path):
    from headwise.plan import HeadPlan, SinkWindow

    HeadPlan.uniform(SinkWindow(4, 60), 3, 2).save(tmp_path / "plan.json")
    ask = [
        "eval",
        "-m",
        LLAMA,
        "--task",
        "passkey,needle,perplexity,summary",
        "--batch-size",
        "2",
        "--length",
        "300",
        "--tokens",
        "600",
        "--prompts",
        "2",
    ]
    for more in ([], ["--plan", str(tmp_path / "plan.json")]):
        code, out, _ = run(*ask, *more, "--json")
        said = json.loads(out)
        assert code == 0
        assert set(said["tasks"]) == {"passkey", "needle", "perplexity", "summary"}
        low, high = said["perplexity_interval"]
        assert low <= said["tasks"]["perplexity"] <= high
        agreement = said["tasks"]["summary"]["rouge_l"]
        assert agreement["mean"] == 1.0 if not more else 0 <= agreement["low"] <= agreement["mean"] < 1
        assert said["tasks"]["passkey"]["prompts"] == 2
        assert said["tasks"]["perplexity"] > 1
    assert "exact" in run(*ask)[1]


def test_a_plan_tells_its_bytes_by_layer_and_head_before_anything_runs(run, tmp_path):
    HeadScores(values=torch.rand(3, 2), kind="kv", method="random").save(tmp_path / "s.safetensors")
    ask = [
        "plan",
        "duo",
        "--scores",
        str(tmp_path / "s.safetensors"),
        "--sparsity",
        "0.5",
        "-o",
        str(tmp_path / "p.json"),
    ]
    assert "(give --head-dim or --machine for bytes)" in run(*ask)[1]
    code, out, _ = run(*ask, "--head-dim", "64", "--length", "2048", "--batch", "2", "--json")
    said = json.loads(out)
    assert (
        code == 0
        and said["length"] == 2048
        and sorted(n for row in said["head_tokens"] for n in row) == [320] * 3 + [2048] * 3
    )
    assert sum(map(sum, said["head_bytes"])) == sum(said["layer_bytes"]["2048"]) == 2 * 256 * 3 * (2048 + 320)
    table = run(*ask, "--head-dim", "64", "--length", "2048")[1]
    assert "by kv head at 2048 tokens" in table and "512" in table and len(table.splitlines()) > 6
    made = json.loads(
        run("plan", "snapkv", "-m", LLAMA, "--budget", "64tok", "-o", str(tmp_path / "q.json"), "--json")[1]
    )
    assert len(made["head_bytes"]) == 3 and all(n > 0 for row in made["head_bytes"] for n in row)


def test_eval_reads_through_the_cache_under_longheads(run, tmp_path):
    far = str(tmp_path / "far.json")
    assert run("plan", "longheads", "-m", LLAMA, "--chunk", "16", "--window", "128", "-o", far)[0] == 0
    ask = ["-m", LLAMA, "--plan", far, "--length", "256", "--prompts", "1", "--tokens", "256", "--json"]
    code, out, err = run("eval", "--task", "passkey,perplexity", *ask)
    assert code == 0, err
    assert json.loads(out)["tasks"]["perplexity"] > 1


def test_a_plan_for_a_target_latency(run, tmp_path, monkeypatch):
    from headwise.attach import fingerprint
    from headwise.budget import StepTime
    from headwise.budget._step_time import Point
    from headwise.hub import load_model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scores = HeadScores(
        values=torch.rand(3, 2), kind="kv", method="random", fingerprint=fingerprint(load_model(LLAMA)[0])
    )
    scores.save(tmp_path / "s.safetensors")
    ask = [
        "plan",
        "duo",
        "--scores",
        str(tmp_path / "s.safetensors"),
        "-o",
        str(tmp_path / "p.json"),
        "--length",
        "32768",
    ]
    assert "headwise calibrate" in run(*ask, "--latency", "12ms")[2]
    code, out, _ = run(
        "calibrate", "-m", LLAMA, "--batches", "1,8", "--lengths", "64,16384", "--repeats", "2", "--json"
    )
    timed = json.loads(out)
    assert code == 0 and len(timed["points"]) == 4 and timed["file"].startswith(str(tmp_path))
    known = StepTime.load(
        timed["file"]
    )  # the same model and machine, with times that do not depend on what else runs here
    slow = [Point(b, t, 1536 * b * t, 2 + b + 1536 * b * t / 1e6) for b in (1, 4) for t in (64, 4096, 32768)]
    labels = {name: getattr(known, name) for name in ("device", "dtype", "head_dim", "fingerprint")}
    StepTime.fit(slow, **labels).save(timed["file"])
    for more in ([], ["--machine", timed["file"]]):
        said = json.loads(run(*ask, "--latency", "0.1s", "--batch", "4", "--json", *more)[1])
        assert 60 < said["step_ms"] <= 100 and said["budget"].endswith(" B")
    assert "not both" in run(*ask, "--latency", "12s", "--budget", "50%")[2]
    assert "before any key is read" in run(*ask, "--latency", "0.0000001ms")[2]
    assert "no budget" in run(*ask, "--latency", "soon")[2]


def test_the_same_seed_gives_the_same_sample(run):
    ask = ["generate", "-m", LLAMA, "-p", "a", "-n", "6", "--temperature", "1", "--json"]
    texts = [json.loads(run(*ask, "--seed", seed)[1])["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_models_lists_the_bundled_ones(run):
    assert "smollm2" in json.loads(run("models", "--json")[1])["models"]
    assert LLAMA in run("models")[1]


def test_json_has_only_plain_values():
    import torch

    value = {"a": (1, torch.tensor([1.5])), 2: float("nan"), "p": HeadSet.parse("L0H1"), "n": None}
    assert jsonable(value) == {"a": [1, [1.5]], "2": None, "p": "L0H1", "n": None}


# commands made from methods


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch):
    """A command line with one scorer and one planner that only tests know; returns what they were called with."""
    seen: dict[str, object] = {}
    monkeypatch.setattr(registry, "_methods", {})
    monkeypatch.setattr(registry, "load_all", lambda: None)

    @register("score", "toy-norm", paper="13")
    def toy_norm(
        model,
        tokenizer,
        *,
        lengths: list[int] = [8],  # noqa: B006
        tests: int = 3,
        mode: Literal["sum", "max"] = "sum",
        share: float | None = None,
        exclude: HeadSet | None = None,
        causal: bool = True,
        seed: int = 5,
        progress: bool = False,
    ) -> HeadScores:
        """Scores by nothing at all.

        tests: how many [toy] tests
            are made.
        """
        import torch

        seen.update(tests=tests, mode=mode, share=share, exclude=exclude, causal=causal, seed=seed, progress=progress)
        return HeadScores(values=torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)), method="toy-norm")

    @register("budget", "toy-plan")
    def toy_plan(scores, *, budget: "Budget", window: int = 8):  # noqa: F821
        """Plans by nothing at all."""
        from headwise.plan import HeadPlan, SinkWindow

        seen.update(budget=budget, window=window, scores=scores)
        return HeadPlan.uniform(SinkWindow(4, window), 3, 2)

    from headwise.plan import Budget

    toy_plan.__globals__["Budget"] = Budget
    parent = typer.Typer()
    parent.add_typer(generated.group("score"))
    parent.add_typer(generated.group("plan"))
    yield parent, seen
    del toy_plan.__globals__["Budget"]
    generated.command.cache_clear()


def invoke(parent: typer.Typer, *arguments: str):
    return CliRunner().invoke(parent, arguments, env={"COLUMNS": "160"})


def test_a_method_becomes_a_command_with_its_own_options(toy, tmp_path):
    parent, seen = toy
    file = tmp_path / "s.safetensors"
    options = ["--tests", "7", "--mode", "max", "--share", "0.5", "--exclude", "L0H1", "--no-causal", "-o", str(file)]
    done = invoke(parent, "score", "toy-norm", "-m", LLAMA, *options, "--json")
    assert done.exit_code == 0, done.output
    wanted = {"tests": 7, "mode": "max", "share": 0.5, "exclude": HeadSet.parse("L0H1"), "causal": False}
    assert seen == {**wanted, "seed": 5, "progress": False}
    said = json.loads(done.stdout)
    assert said["file"] == str(file)
    assert len(said["top"]) == 10
    assert HeadScores.load(file).method == "toy-norm"


def test_defaults_are_those_of_the_method(toy):
    parent, seen = toy
    assert invoke(parent, "score", "toy-norm", "-m", LLAMA).exit_code == 0
    assert seen == {
        "tests": 3, "mode": "sum", "share": None, "exclude": None, "causal": True, "seed": 5, "progress": False
    }  # fmt: skip


def test_help_of_a_method_comes_from_its_docstring(toy):
    parent, _ = toy
    text = " ".join(invoke(parent, "score", "toy-norm", "--help").output.replace("│", " ").split())
    assert "Scores by nothing at all." in text
    assert "how many [toy] tests are made" in text
    assert "headwise papers" in text
    assert "--lengths" not in text  # a list has no form on the command line
    assert "toy-norm" in invoke(parent, "score", "--help").output


def test_a_plan_is_made_from_scores_and_a_budget(toy, tmp_path):
    from headwise.plan import Budget, HeadPlan

    parent, seen = toy
    scores, plan = tmp_path / "s.safetensors", tmp_path / "p.json"
    assert invoke(parent, "score", "toy-norm", "-m", LLAMA, "-o", str(scores)).exit_code == 0
    done = invoke(parent, "plan", "toy-plan", "--scores", str(scores), "--budget", "25%", "-o", str(plan), "--json")
    assert done.exit_code == 0, done.output
    assert seen["budget"] == Budget.ratio(0.25)
    assert HeadPlan.load(plan).layers == 3
    assert 0 < json.loads(done.stdout)["ratio"]["1024"] < 0.1
    assert invoke(parent, "plan", "toy-plan", "--scores", str(scores), "-o", str(plan)).exit_code == 2  # no budget
    broken = invoke(parent, "plan", "toy-plan", "--scores", str(scores), "--budget", "7", "-o", str(plan))
    assert isinstance(broken.exception, HeadwiseError)


def test_an_option_that_no_user_could_give_is_refused(toy):
    @register("score", "odd")
    def odd(model, tokenizer, *, callback: list[int]) -> None:
        """Odd."""

    @register("score", "clash")
    def clash(model, tokenizer, *, dtype: str = "x") -> None:
        """Clash."""

    with pytest.raises(MethodError, match="no form on the command line"):
        generated.command(registry.get("score", "odd"))
    with pytest.raises(MethodError, match="belongs to the command line"):
        generated.command(registry.get("score", "clash"))


# papers and reproductions


def reproduction(top: float = 0.0, **changes) -> Reproduction:
    checks = (Check("specific", "recall_top3", "<", "recall_random"), Check("", "recall_top3", "<=", 0.25))
    values = {
        "paper": "moh",
        "claim": "c",
        "scale": "cpu",
        "metrics": {"recall_top3": top},
        "baselines": {"recall_random": 1},
    }
    return Reproduction(**{**values, "checks": checks, "seconds": 1.0, **changes})


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


def test_no_paper_claims_more_than_it_proves():
    assert [f"{r.slug}: {problem}" for r in rows() for problem in r.problems()] == []


def test_holds_is_computed_and_can_be_false():
    assert reproduction(0.1).holds
    assert not reproduction(0.5).holds
    assert [str(check) for check in reproduction(0.5).failed()] == ["recall_top3 <= 0.25"]
    assert not reproduction(float("nan")).holds
    assert not reproduction(float("-inf")).holds


def test_a_record_survives_json_and_cannot_lie():
    for made in (reproduction(0.1), reproduction(0.5), reproduction(float("nan"))):
        data = json.loads(made.to_json())
        assert list(data) == [
            "paper", "claim", "scale", "metrics", "baselines", "expected", "holds", "seconds", "environment"
        ]  # fmt: skip
        assert Reproduction.from_json(made.to_json()).to_dict() == made.to_dict()
        with pytest.raises(HeadwiseError, match="its numbers say"):
            Reproduction.from_json(json.dumps({**data, "holds": not data["holds"]}))


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"checks": ()}, "has no check"),
        ({"scale": "tpu"}, "scale is one of"),
        ({"baselines": {"recall_top3": 1}}, "both as metric and as baseline"),
        ({"metrics": {}}, "needs 'recall_top3'"),
    ],
)
def test_a_reproduction_that_proves_nothing_is_refused(changes, problem):
    with pytest.raises(HeadwiseError, match=problem):
        reproduction(**changes)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"paper": 1}', '"x"', "null"])
def test_a_broken_record_is_one_clear_error(text):
    with pytest.raises(HeadwiseError):
        Reproduction.from_json(text)


@pytest.mark.parametrize("text", ["", "a", "a <", "a < b < c", "< b", "a ~ b", "x: : a < b"])
def test_a_broken_check_is_one_clear_error(text):
    with pytest.raises(HeadwiseError, match="not a check"):
        Check.parse(text)


def test_the_environment_holds_no_host_and_no_path():
    import socket

    text = json.dumps(headwise.papers.environment())
    assert "/" not in text.replace("cpu (", "")
    assert socket.gethostname() not in text


class FakeRow(Row):
    """A row whose module and record are given."""

    module = None
    record = None


def fake(monkeypatch, *, status="works", api="headwise.cli.main", record=None, function=reproduction) -> Row:
    import types

    module = types.SimpleNamespace(PAPER=Paper(slug="moh", status=status, api=api, claim="c"), reproduce=function)
    made = FakeRow(*(getattr(row("moh"), name) for name in ("id", "slug", "verb", "arxiv", "title")))
    monkeypatch.setattr(FakeRow, "module", module)
    monkeypatch.setattr(FakeRow, "record", record)
    return made


def test_works_needs_an_api_and_a_record_that_holds(monkeypatch):
    assert fake(monkeypatch, record=reproduction(0.1)).status == "works"
    cases = [
        ({"record": None}, "no recorded run"),
        ({"record": reproduction(0.5)}, "this is false: recall_top3 <= 0.25"),
        ({"record": reproduction(0.1, claim="other")}, "tests another claim"),
        ({"record": reproduction(0.1), "api": "headwise.cli.nothing"}, "cannot be imported"),
        ({"record": reproduction(0.1), "function": None}, "no reproduce"),
    ]
    for changes, problem in cases:
        made = fake(monkeypatch, **changes)
        assert made.status == "partial"
        assert any(problem in text for text in made.problems())
    assert fake(monkeypatch, status="partial").problems() == []


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


def test_generating_beyond_the_context_is_refused(run):
    code, _, err = run("generate", "-m", LLAMA, "--prompt", "a" * 4000, "--max-new-tokens", "200")
    assert code == 2
    assert "reads 4096" in err
