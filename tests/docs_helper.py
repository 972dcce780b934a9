"""The code blocks of a page, and how they are run: in order, in one namespace and one folder, as a reader would.

Comments of the page, which a reader does not see, steer it:

    <!-- before: PYTHON -->                     names that the next block takes for granted (`inputs`, `labels`, files)
    <!-- blocks: "smollm2" = "tiny-random-llama"; "steps=3500" = "steps=5" -->      smaller work for the test, page-wide
    <!-- not run: REASON -->                    the next block is only checked: it parses, its names and options exist
    <!-- blocks run by tests/test_extending.py -->                                  another test takes the page apart
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import typer

ROOT = Path(__file__).parents[1]
PYTHON = ("python",)
CONSOLE = ("sh", "console", "bash")
PLAIN = ("text", "json", "markdown", "toml", "yaml", "html")
FENCE = re.compile(r"^(?P<mark>```+)(?P<language>\w*)\n(?P<code>.*?)^(?P=mark)$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
NOT_RUN = "not run:"
PAIR = re.compile(r"""(?:"([^"]+)"|'([^']+)') = (?:"([^"]*)"|'([^']*)')""")


@dataclass
class Block:
    """A fenced block: its language, its text, the line it begins on, code to run before it, and why it is not run."""

    language: str
    code: str
    line: int
    before: list[str] = field(default_factory=list)
    reason: str = ""


@dataclass
class Page:
    """A page's blocks of python and console, in order."""

    name: str
    blocks: list[Block]
    smaller: list[tuple[str, str]]
    run_by: str = ""

    def shrunk(self, text: str) -> str:
        for large, small in self.smaller:
            text = text.replace(large, small)
        return text

    @property
    def runs(self) -> list[Block]:
        return [] if self.run_by else [block for block in self.blocks if not block.reason]

    @property
    def needs_smollm2(self) -> bool:
        """Whether a block loads the packaged language model, by its name or because a command has it as its default."""
        code = self.shrunk("\n".join(block.code + "".join(block.before) for block in self.runs))
        lines = [
            words for block in self.runs if block.language in CONSOLE for words in commands(self.shrunk(block.code))
        ]
        return "smollm2" in code or any(w[1:2] == ["eval"] and not {"-m", "--model"} & set(w) for w in lines)


def pages() -> list[str]:
    """README.md and every page under docs/, as paths from the repository root."""
    return ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]


def read_page(name: str, text: str | None = None) -> Page:
    """The blocks of a page with what the comments before them say."""
    text = (ROOT / name).read_text(encoding="utf-8") if text is None else text
    page = Page(name, [], [])
    end = 0
    for fence in FENCE.finditer(text):
        block = Block(fence["language"], fence["code"], text[: fence.start()].count("\n") + 1)
        _comments(page, block, text[end : fence.start()])
        end = fence.end()
        if block.language not in PLAIN:
            page.blocks.append(block)
    _comments(page, Block("", "", 0), text[end:])
    return page


def _comments(page: Page, block: Block, between: str) -> None:
    for comment in COMMENT.findall(between):
        comment = comment.strip()
        if comment.startswith("before:"):
            block.before.append(comment.removeprefix("before:").strip("\n") + "\n")
        elif comment.startswith(NOT_RUN):
            block.reason = comment.removeprefix(NOT_RUN).strip()
        elif comment.startswith("blocks run by "):
            page.run_by = comment.removeprefix("blocks run by ").strip()
        elif comment.startswith("blocks:"):
            page.smaller += [(a or b, c or d) for a, b, c, d in PAIR.findall(comment)]


def commands(code: str) -> list[list[str]]:
    """The command lines of a console block: continued lines joined, comments gone, words split as a shell would."""
    lines = code.replace("\\\n", " ").splitlines()
    found = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [words for words in found if words]


def check_command(words: list[str]) -> None:
    """The command exists and takes these options; nothing is run. Raises where it does not."""
    program, *arguments = words
    if program == "headwise":
        _parse(arguments)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {a for a in arguments if "=" not in a} <= set(targets), words
    elif program in ("python", "bash") and arguments and not arguments[0].startswith("-"):
        assert (ROOT / arguments[0]).exists(), words
    else:
        assert program in ("pip", "python", "git", "cd", "export") or "=" in program, f"what is {program!r}? {words}"


def _parse(arguments: list[str]) -> None:
    from headwise.cli import app

    command = typer.main.get_command(app)
    context = command.make_context("headwise", ["--help"], resilient_parsing=True)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        found = command.get_command(context, name)
        assert found is not None, f"no command {name!r}"
        command = found
        context = type(context)(command, parent=context, info_name=name)
    command.make_context(command.name, list(arguments), parent=context.parent)


def run_block(page: Page, block: Block, space: dict) -> None:
    """Run one block in the page's namespace; console blocks through the command line's own `main`."""
    for code in block.before:
        exec(compile(page.shrunk(_dedent(code)), f"{page.name}, before line {block.line}", "exec"), space)
    code = page.shrunk(block.code)
    if block.language in PYTHON:
        padding = "\n" * block.line  # tracebacks name the page's own lines
        exec(compile(padding + code, page.name, "exec"), space)
        return
    for words in commands(code):
        check_command(words)
        if words[0] == "headwise":
            run_command(words[1:])


def run_command(arguments: list[str]) -> None:
    """`headwise …` in this process; raises where it does not end well."""
    from headwise.cli import main

    code: object = None
    try:
        main(arguments)
    except SystemExit as end:
        code = end.code
    assert not code, f"headwise {shlex.join(arguments)} ended with {code}"


def _dedent(code: str) -> str:
    import textwrap

    return textwrap.dedent(code)


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
    """Whether this dotted name can be imported or reached."""
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
