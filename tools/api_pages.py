"""The pages of the API reference: every public name, each with its docstring, in docs/api/.

    python tools/api_pages.py --write     write them
    python tools/api_pages.py --check     exit 1 if a public name is missing from them, or one of them is gone

Public is what `__all__` lists, and every registered method; the texts themselves come from the docstrings when the site is built.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headwise import registry

HOME = Path(__file__).parents[1] / "docs" / "api"
VERBS = ("score", "budget", "route", "steer")
PACKAGES = {"headwise": ("headwise",), "tasks": ("headwise.hub", "headwise.tasks")}
MECHANISMS = [
    "registry",
    "units",
    "patterns",
    "plan",
    "edits",
    "expert_edits",
    "cache",
    "attention.groups",
    "attach.observe",
    "attach.experts",
    "attach.maps",
    "attach.resume",
    "attach.set_pattern",
    "attach.sinks",
    "attach.divergence",
    "keyscores",
    "errors",
]


def pages() -> dict[str, str]:
    """File name → text of every page."""
    made = {f"{verb}.md": _page(f"headwise.{verb}", _methods(verb)) for verb in VERBS}
    made |= {f"{name}.md": _page(", ".join(packages), _public(packages)) for name, packages in PACKAGES.items()}
    made["mechanisms.md"] = _modules()
    made["index.md"] = _index(made)
    return made


def _public(packages: tuple[str, ...]) -> dict[str, Any]:
    """Dotted name → thing, of what the packages' `__all__` list."""
    found: dict[str, Any] = {}
    for package in packages:
        home = importlib.import_module(package)
        found |= {f"{package}.{name}": getattr(home, name) for name in home.__all__ if not name.startswith("__")}
    return found


def _methods(verb: str) -> dict[str, Any]:
    """Registered methods of a verb's package first, then the other names that it exports."""
    package = f"headwise.{verb}"
    registered = [m.function for m in registry.methods() if m.function.__module__.startswith(package + ".")]
    return {f"{package}.{f.__name__}": f for f in registered} | _public((package,))


def _page(title: str, names: dict[str, Any]) -> str:
    return "\n".join([f"# {title}", "", *(line for name, thing in names.items() for line in _entry(name, thing))])


def _entry(name: str, thing: Any) -> Iterator[str]:
    """The generator's line for one name, under the name that users type."""
    if inspect.ismodule(thing):  # attach, attention: modules that can be called like the function of their name
        thing = getattr(thing, name.rpartition(".")[2])
    plain = inspect.isfunction(thing) or inspect.isclass(thing)
    home = f"{thing.__module__}.{thing.__qualname__}" if plain and thing.__module__.startswith("headwise") else name
    yield f"::: {home}"
    yield f"    options: {{heading: {name}}}"
    yield ""


def _modules() -> str:
    """Whole modules: the artifacts and the three mechanisms, for those who build on them."""
    lines = ["# Artifacts and mechanisms", ""]
    for module in (f"headwise.{name}" for name in MECHANISMS):
        lines += [
            f"## {module}",
            "",
            f"::: {module}",
            "    options: {show_root_heading: false, heading_level: 3, skip_local_inventory: true}",
            "",
        ]
    return "\n".join(lines)


def _index(made: dict[str, str]) -> str:
    counts = {name: text.count("\n::: ") for name, text in made.items()}
    rows = [f"| [{name[:-3]}]({name}) | {count} |" for name, count in counts.items()]
    return "\n".join(
        [
            "# API reference",
            "",
            "Made from the docstrings. Letters everywhere: B batch, L layers, H query heads, K kv heads, E experts, N queries, M keys,",
            "D head dim.",
            "A method's keyword-only options are also those of its command: `headwise score NAME --help`.",
            "",
            "| page | entries |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def main(arguments: list[str]) -> int:
    """Write or check; the exit code is 1 if a check fails."""
    if arguments not in (["--write"], ["--check"]):
        raise SystemExit(__doc__)
    made = pages()
    if arguments == ["--write"]:
        HOME.mkdir(exist_ok=True)
        for name, text in made.items():
            (HOME / name).write_text(text, encoding="utf-8")
    stale = [
        name
        for name, text in made.items()
        if not (HOME / name).exists() or (HOME / name).read_text(encoding="utf-8") != text
    ]
    print(
        *(f"docs/api/{name} is out of date; run 'make site-files'" for name in stale)
        if stale
        else [f"API pages: {len(made)} are up to date"],
        sep="\n",
    )
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
