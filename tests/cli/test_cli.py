"""The command line as a user meets it: help, errors in one line, wrong usage."""

import subprocess
import sys

import pytest
import typer

from headwise import registry
from headwise.cli import app, generated, main
from headwise.errors import HeadwiseError

LLAMA = "tiny-random-llama"


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
