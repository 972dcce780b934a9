"""docs/extending.md is run: its files go into a copy of the source tree, and are tested there with everything that all methods share."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = "docs/extending.md"
KINDS = {"scorer": "score", "planner": "budget", "router": "route", "edit": "steer"}


def sections():
    """Kind → {path: text} of the files that the page shows for it."""
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    found = {}
    for part in text.split("\n## ")[1:]:
        kind = re.match(r"An? (\w+):", part)
        if kind:
            files = re.findall(r"\*\*`([^`]+)`\*\*\n\n```(?:python|markdown)\n(.*?)```", part, re.DOTALL)
            found[kind[1]] = dict(files)
    return found


def test_each_kind_of_method_is_three_files_that_do_not_exist_yet():
    assert set(sections()) == set(KINDS)
    for kind, files in sections().items():
        verb = KINDS[kind]
        places = [path.rpartition("/")[0] for path in files]
        assert places == [f"src/headwise/{verb}", f"tests/{verb}", "docs/methods"], kind
        assert not any((ROOT / path).exists() for path in files), kind


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the source tree with the page's files in it; nothing else is changed."""
    root = tmp_path_factory.mktemp("tree")
    unneeded = shutil.ignore_patterns("__pycache__", "weights", "records")
    shutil.copytree(ROOT / "src" / "headwise", root / "src" / "headwise", ignore=unneeded)
    shutil.copytree(ROOT / "tests", root / "tests", ignore=unneeded)
    for name in ("tools", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=unneeded)
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "src" / "headwise" / "papers" / "records").mkdir()
    for files in sections().values():
        for path, text in files.items():
            (root / path).write_text(text, encoding="utf-8")
    return root


def run(tree, *command):
    import os

    environment = {**os.environ, "PYTHONPATH": f"{tree / 'src'}:{tree / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.slow
def test_their_tests_examples_and_the_shared_checks_pass(tree):
    paths = [path for files in sections().values() for path in files if path.endswith(".py")]
    out = run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, "tests/test_registry.py")
    assert int(re.search(r"(\d+) passed", out)[1]) >= 25
    assert "files are fine" in run(tree, "tools/check_imports.py")


@pytest.mark.slow
def test_their_commands_exist_and_make_files(tree):
    code = """
import sys
import headwise, pathlib
from typer.testing import CliRunner
from headwise.cli import app
assert str(pathlib.Path(headwise.__file__)).startswith(sys.argv[1]), headwise.__file__
M = ["-m", "tiny-random-llama"]
commands = [
    ["score", "previous-token", *M, "--tokens", "32", "-o", "s.safetensors"],
    ["plan", "alternate", *M, "--window", "60", "-o", "plan.json"],
    ["convert", "heaviest", *M, "--active", "0.5", "-o", "adapter"],
    ["edit", "wake", *M, "--heads", "L0H1", "-o", "edits.json"],
    ["eval", *M, "--plan", "plan.json", "--edits", "edits.json", "--router", "adapter", "--length", "300", "--prompts", "1"],
]
for command in commands:
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, (command, done.output, done.exception)
assert "Attention on the token before" in CliRunner().invoke(app, ["score", "--help"]).output
print("made", sorted(path.name for path in pathlib.Path(".").glob("*.safetensors")))
"""
    assert "s.safetensors" in run(tree, "-c", code, str(tree))


def test_the_page_obeys_the_linter():
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("needs ruff")
    for files in sections().values():
        for path, text in files.items():
            if path.endswith(".py"):
                for command in (["check", "-q"], ["format", "-q", "--check"]):
                    name = ["--stdin-filename", str(ROOT / path), "-"]
                    done = subprocess.run([ruff, *command, *name], input=text, capture_output=True, text=True, cwd=ROOT)
                    assert done.returncode == 0, (path, done.stdout + done.stderr)
