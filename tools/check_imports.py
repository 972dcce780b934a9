"""Imports go one way: papers → route|score|budget|steer|scale → attach, attention, cache → artifacts. This checks it.

    python tools/check_imports.py [package folder]

Prints one line for each import that goes up, or from one method file to another, and exits 1 if there is any. Imports
inside functions and under `TYPE_CHECKING` count: they are dependencies too.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "headwise"
VERBS = ("route", "score", "budget", "steer", "scale")
LAYERS: tuple[tuple[str, ...], ...] = (
    ("arguments", "errors", "callable_module", "progress"),
    ("checks", "registry", "storage", "addresses", "units", "patterns", "plan", "selection", "edits", "expert_edits"),
    (
        "modes",
        "attention",
        "keyscores",
        "stores",
        "window_store",
        "selected_store",
        "steps",
        "cache",
        "attach",
        "hub",
        "models",
        "tasks",
    ),
    VERBS,
    ("papers", "report", "bench", ""),  # "" is the package itself: `import headwise`, the public face
    ("view",),
    ("cli", "__main__"),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted target) of every import of the package itself in one module; relative ones are made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")
                up = up[: len(up) - node.level + is_package]
                base = ".".join([*up, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def unit(dotted: str) -> tuple[str, str]:
    """(room, file in the room) of a dotted name below the package: `headwise.score.taylor.f` → ("score", "taylor").

    A name of the package itself that is no room, such as `headwise.attach_all`, belongs to the room "".
    """
    parts = [*dotted.split(".")[1:], "", ""]
    return (parts[0], parts[1]) if parts[0] in LEVEL else ("", "")


def violations(root: Path) -> Iterator[str]:
    """One sentence for each import below `root` (the package's folder) that the rules forbid."""
    for file in sorted(root.rglob("*.py")):
        parts = [PACKAGE, *file.relative_to(root).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        room, own = parts[1] if len(parts) > 2 or not is_package else "", parts[2] if len(parts) > 2 else ""
        if room not in LEVEL:
            yield f"{file}:1: {room!r} is in no layer; give it one in tools/check_imports.py"
            continue
        if room == "":
            continue  # the public face may show everything
        tree = ast.parse(file.read_text(encoding="utf-8"))
        targets = {
            (line, unit(name)) for line, name in imports(tree, module, is_package) if name.split(".")[0] == PACKAGE
        }
        for line, target in sorted(targets):
            problem = forbidden(room, own, *target)
            if problem:
                yield f"{file}:{line}: {module} imports {'.'.join(filter(None, [PACKAGE, *target]))}: {problem}"


def forbidden(room: str, own: str, target_room: str, target: str) -> str:
    """Why the file `own` of `room` must not import `target` of `target_room`; empty if it may."""
    if LEVEL[target_room] > LEVEL[room]:
        return f"{target_room or PACKAGE} is above {room}"
    if room in VERBS and target_room in VERBS and own != "__init__":
        same = (room, own) == (target_room, target)
        if not same and not target.startswith("_"):
            return "a method file knows no other method; share code in a helper whose name begins with '_'"
    return ""


def main(arguments: list[str]) -> int:
    """Check one package folder; the exit code is 1 if an import is forbidden."""
    root = Path(arguments[0]) if arguments else Path(__file__).parents[1] / "src" / PACKAGE
    found = list(violations(root))
    print("\n".join(found) or f"import direction: {len(list(root.rglob('*.py')))} files are fine")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
