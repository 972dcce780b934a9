"""What the pages show is run: every block of Python and every command, in order, as a reader would; or the page says why not."""

import ast
import re

import pytest

from docs_helper import CONSOLE, FENCE, PLAIN, PYTHON, ROOT, check_command, commands, exists, named, pages, read_page
from docs_helper import run_block as run
from recipes_helper import shrink

SMALL = [name for name in pages() if read_page(name).runs and not read_page(name).needs_smollm2]
LARGE = [name for name in pages() if read_page(name).runs and read_page(name).needs_smollm2]


@pytest.fixture(autouse=True)
def in_a_new_folder(monkeypatch, tmp_path):
    """Files that a page writes go where it can read them again, and nowhere else."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def small_recipes(monkeypatch):
    """Pages show recipes at the size of a CPU; here they train at that of the tests."""
    shrink(monkeypatch)


@pytest.mark.parametrize("name", SMALL)
def test_a_page_runs(name, capsys):
    page = read_page(name)
    space: dict = {"__name__": "page"}
    for block in page.runs:
        run(page, block, space)


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LARGE if name != "README.md"])
def test_a_page_runs_on_the_real_model(name, capsys):
    test_a_page_runs(name, capsys)


@pytest.mark.smollm2
@pytest.mark.slow
def test_the_readme_runs_and_its_ten_lines_say_what_it_says(capsys):
    page = read_page("README.md")
    space: dict = {"__name__": "page"}
    code = next(block.code for block in page.blocks if block.language in PYTHON)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    for block in page.runs:
        run(page, block, space)
    printed = capsys.readouterr().out
    assert "L18H6" in printed
    assert "Paris" in printed


@pytest.mark.parametrize("name", pages())
def test_blocks_parse_and_name_what_exists(name):
    page = read_page(name)
    for block in page.blocks:
        assert block.language in PYTHON + CONSOLE, f"{name}:{block.line}: say what language this block is, or ```text"
        if block.language in CONSOLE:
            for words in commands(page.shrunk(block.code)):
                check_command(words)
        else:
            missing = sorted(used for used in named(block.code) if not exists(used))
            assert missing == [] or page.run_by, f"{name}:{block.line}"


@pytest.mark.parametrize("name", pages())
def test_commands_stand_in_fenced_blocks_where_they_are_seen_by_the_tests(name):
    text = FENCE.sub("", (ROOT / name).read_text(encoding="utf-8"))
    assert re.findall(r"^ {4,}(?:headwise|pip|python) .*", text, re.MULTILINE) == []


def test_a_block_is_run_or_the_page_says_why_not():
    silent = []
    for name in pages():
        page = read_page(name)
        if page.run_by:
            assert name in (ROOT / page.run_by).read_text(encoding="utf-8"), f"{page.run_by} does not name {name}"
        silent += [f"{name}:{b.line}" for b in page.blocks if b.reason and len(b.reason) < 8]
        for where in re.findall(r"\btests/[\w/.]+\w", " ".join(b.reason for b in page.blocks)):
            assert (ROOT / where).exists(), f"{name} sends readers to {where}"
    assert silent == []


def test_the_method_of_the_architecture_page():
    import headwise
    from headwise import registry

    page = read_page("docs/architecture.md")
    (block,) = page.blocks
    known = dict(registry._methods)
    space = {"__name__": "headwise.score.entropy"}
    try:
        run(page, block, space)
        assert registry.get("score", "entropy").summary.startswith("Minus the mean entropy")
        scores = space["entropy"](*headwise.load_model("tiny-random-llama"), tokens=64)
    finally:
        registry._methods.clear()
        registry._methods.update(known)
    assert scores.values.shape == (3, 4)
    assert (scores.values < 0).all()


# The tests' own eyes: a page that is wrong is seen to be wrong.

BROKEN = """
<!-- blocks: "M" = "tiny-random-llama" -->

<!-- before:
    x = 2
-->

```python
y = x + 1
```

<!-- not run: takes an hour -->

```sh
headwise score retrieval --model M -o a.safetensors   # a comment
headwise models
```

```text
headwise nothing
```
"""


def test_a_page_is_read():
    page = read_page("page.md", BROKEN)
    first, second = page.blocks
    assert (first.language, first.code, first.line) == ("python", "y = x + 1\n", 8)
    assert second.reason == "takes an hour"
    assert page.runs == [first]
    space: dict = {}
    run(page, first, space)
    assert space["y"] == 3
    assert commands(page.shrunk(second.code))[0][4:] == ["tiny-random-llama", "-o", "a.safetensors"]
    assert set(PLAIN).isdisjoint(PYTHON + CONSOLE)


def test_a_failing_block_is_seen():
    page = read_page(
        "page.md", "```python\nassert 1 + 1 == 3\n```\n```sh\nheadwise generate --plan nowhere.json --prompt x\n```\n"
    )
    for block in page.blocks:
        with pytest.raises(AssertionError):
            run(page, block, {})


@pytest.mark.parametrize(
    "line",
    [
        "headwise score retrieval --modle smollm2",
        "headwise scoer duo",
        "headwise score nothing",
        "make nothing",
        "rm -r x",
    ],
)
def test_a_wrong_command_is_seen(line):
    with pytest.raises(Exception, match=r"."):  # typer, click and headwise each have their own
        check_command(commands(line)[0])


def test_a_right_command_is_let_through():
    for line in (
        "headwise score retrieval --model smollm2 --tests 3 -o s.safetensors",
        "headwise bench decode",
        "make docs",
    ):
        check_command(commands(line)[0])


def test_a_name_that_is_missing_is_seen():
    assert "headwise.score.nothing" in named("import headwise\nheadwise.score.nothing(1)")
    assert exists("headwise.budget.duo")
    assert not exists("headwise.score.nothing")
    assert not exists("headwise.nowhere.at")


def test_the_pages_are_python_that_can_be_read():
    for name in pages():
        for block in read_page(name).blocks:
            if block.language in PYTHON:
                ast.parse(block.code)
