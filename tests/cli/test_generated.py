"""Commands made from methods: options from the signature, help from the docstring."""

import json
from typing import Literal

import pytest
import torch
import typer
from typer.testing import CliRunner

from headwise import registry
from headwise.cli import generated
from headwise.errors import HeadwiseError
from headwise.registry import MethodError, register
from headwise.units import HeadScores, HeadSet

LLAMA = "tiny-random-llama"


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
