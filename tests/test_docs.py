"""What the pages show is run, or at least exists: the README's ten lines, the method that the architecture page adds, names."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.smollm2
@pytest.mark.slow
def test_the_ten_lines_of_the_readme(capsys):
    (code,) = blocks("README.md")
    space: dict = {}
    exec(compile(code, "README.md", "exec"), space)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    printed = capsys.readouterr().out
    assert "L18H6" in printed
    assert "Paris" in printed


def test_the_method_of_the_architecture_page():
    import headwise
    from headwise import registry

    (code,) = blocks("docs/architecture.md")
    known = dict(registry._methods)
    space = {"__name__": "headwise.score.entropy"}
    try:
        exec(compile(code, "docs/architecture.md", "exec"), space)
        assert registry.get("score", "entropy").summary.startswith("Minus the mean entropy")
        scores = space["entropy"](*headwise.load_model("tiny-random-llama"), tokens=64)
    finally:
        registry._methods.clear()
        registry._methods.update(known)
    assert scores.values.shape == (3, 4)
    assert (scores.values < 0).all()


PAGES = sorted(
    str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md") if "```python" in page.read_text("utf-8")
)


def named(code: str) -> set[str]:
    """Dotted names of the package that a block of code uses."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "headwise":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            if re.fullmatch(r"headwise(\.\w+)+", path):
                found.add(path)
    return found


def exists(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False


def test_a_name_that_is_missing_is_seen():
    assert "headwise.score.nothing" in named("import headwise\nheadwise.score.nothing(1)")
    assert exists("headwise.budget.duo")
    assert not exists("headwise.score.nothing")
    assert not exists("headwise.nowhere.at")


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_is_code_and_names_what_exists(page):
    used = {name for code in blocks(page) for name in named(code)}
    assert sorted(name for name in used if not exists(name)) == []


@pytest.mark.parametrize("page", ["docs/serving.md", "docs/methods/kernels.md", "docs/methods/uoe.md"])
def test_pages_that_need_no_download_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    space: dict = {"__name__": "page"}
    for code in blocks(page):
        exec(compile(code.replace('"smollm2"', '"tiny-random-llama"'), page, "exec"), space)
