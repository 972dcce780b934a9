"""What the site's generator (mkdocs) needs to be told about pages that are written for GitHub's Markdown too.

Tables and lists may follow a paragraph without an empty line there; two pages live outside `docs/`; links into the source tree
become file names.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = ("benchmarks/README.md", "benchmarks/notes.md")
FENCE = re.compile(r"^(```+)", re.MULTILINE)
ITEM = re.compile(r"(?:[-*+]|\d+\.) ")
LINK = re.compile(r"(?<!!)\[([^\]\[]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the pages that live beside the benchmarks."""
    from mkdocs.structure.files import File

    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """The page's Markdown as the generator's dialect wants it."""
    return spaced(relinked(text, page.file.src_uri))


def spaced(text: str) -> str:
    """An empty line before every table and list that follows a paragraph, outside of code.

    >>> print(spaced("Words\\n| a | b |\\n|---|---|\\n- x"))
    Words
    <BLANKLINE>
    | a | b |
    |---|---|
    <BLANKLINE>
    - x
    """
    made: list[str] = []
    fenced = False
    for line in text.split("\n"):
        fenced ^= bool(FENCE.match(line))
        before = made[-1] if made else ""
        if not fenced and before.strip() and _begins(line, before):
            made.append("")
        made.append(line)
    return "\n".join(made)


def _begins(line: str, before: str) -> bool:
    """Whether a table or a list begins with this line."""
    if line.startswith("|"):
        return not before.startswith("|")
    if ITEM.match(line):
        return not ITEM.match(before) and not before.startswith(" ")
    return before.startswith("|") and bool(line.strip())


def relinked(text: str, source: str) -> str:
    """Links from the page at `source` that leave the site: to pages of OUTSIDE by their place in it, other files as plain text."""

    def place(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"\w+:", target):
            return match[0]
        home = ROOT if source in OUTSIDE else ROOT / "docs"
        file = Path(*(home / source).parent.parts, target).resolve()
        if file.is_relative_to(ROOT / "docs"):
            inside = str(file.relative_to(ROOT / "docs"))
        elif file.is_relative_to(ROOT) and str(file.relative_to(ROOT)) in OUTSIDE:
            inside = str(file.relative_to(ROOT))
        else:
            return label if label.startswith("`") else f"{label} (`{file.relative_to(ROOT)}`)"
        up = "../" * source.count("/")
        return f"[{label}]({up}{inside}{anchor})"

    parts = re.split(r"(^```.*?^```$|`[^`\n]+`)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("`") else LINK.sub(place, part) for part in parts)
