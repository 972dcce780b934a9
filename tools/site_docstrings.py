"""Docstrings of the house as Markdown, for the API pages: `name: meaning` lines become a list, doctests fenced code."""

import re
from typing import Any

import griffe

BRACKET = re.compile(r"(`[^`]*`)|\[(?![^\]]*\]\()")  # `x[i]` in prose is an index, no reference
OPTION = re.compile(r"^(?P<names>[a-z_]+(?:, [a-z_]+)*): (?=\S)")


class HouseStyle(griffe.Extension):
    """Rewrites every docstring before it is rendered."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """One docstring.

    >>> print(markdown("Do it.\\n\\ncount: how often.\\n\\n>>> f(2)\\n4"))
    Do it.
    <BLANKLINE>
    - **count**: how often.
    <BLANKLINE>
    ```pycon
    >>> f(2)
    4
    ```
    """
    return "\n\n".join(_part(part) for part in re.split(r"\n\s*\n", text.strip("\n")))


def _part(part: str) -> str:
    if part.lstrip().startswith(">>> "):
        return f"```pycon\n{part}\n```"
    if part.startswith("    "):
        return part
    lines: list[str] = []
    listed = False
    for line in part.split("\n"):
        option = OPTION.match(line)
        if option:
            if lines and not listed:
                lines.append("")
            line = f"- **{option['names']}**: {line[option.end() :]}"
            listed = True
        elif listed:
            line = f"    {line.strip()}"
        lines.append(line)
    return BRACKET.sub(lambda found: found[1] or r"\[", "\n".join(lines))
