"""What lies in a folder: every artifact that headwise wrote there, read with suspicion, under the name of its file.

A file that cannot be read is listed with the reason, never skipped in silence. Nothing outside the given paths is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from headwise.edits import HeadEdits
from headwise.errors import HeadwiseError, ViewError
from headwise.expert_edits import ExpertEdits
from headwise.papers import Reproduction
from headwise.plan import HeadPlan
from headwise.storage import StrPath, kind_of, read_plain_json, read_text
from headwise.units import Fingerprint, HeadScores, HeadSet
from headwise.view.points import Points

Kind = Literal["scores", "set", "plan", "edits", "expert edits", "points", "record", "report"]
T = TypeVar("T")
DEPTH, MOST = 3, 500  # folders below a folder, and files in all, that are looked at
READERS: dict[str, tuple[Kind, Callable[[Path], Any]]] = {
    "head-scores": ("scores", HeadScores.load),
    "head-set": ("set", HeadSet.load),
    "head-plan": ("plan", HeadPlan.load),
    "head-edits": ("edits", HeadEdits.load),
    "expert-edits": ("expert edits", ExpertEdits.load),
    "cache-points": ("points", Points.load),
}


@dataclass(frozen=True)
class Item:
    """One artifact: the name that it is shown under, where it lies, what it is."""

    name: str
    path: Path
    kind: Kind
    value: Any

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The model that it was made for, where the file says so."""
        return getattr(self.value, "fingerprint", None)

    @property
    def line(self) -> str:
        """What it is, in one line."""
        if isinstance(self.value, HeadScores):
            scores = self.value
            return f"{scores.method} scores of {scores.layers} × {scores.units} {scores.kind} units, {scores.data}"
        if isinstance(self.value, Reproduction):
            return f"{self.value.claim} – {'holds' if self.value.holds else 'does not hold'}"
        return str(self.value).replace("\n", "; ")[:300] if self.kind != "report" else "the findings of a demo"


@dataclass(frozen=True)
class Problem:
    """A file that could not be read, and why."""

    name: str
    reason: str


class Library:
    """The artifacts of some files and folders, in the order of their names.

    >>> import tempfile, torch
    >>> folder = Path(tempfile.mkdtemp())
    >>> HeadScores(values=torch.rand(3, 4), method="toy").save(folder / "toy.safetensors")
    >>> _ = (folder / "broken.json").write_text("{")
    >>> library = Library.open([folder])
    >>> list(library.of("scores")), [problem.name for problem in library.problems]
    (['toy.safetensors'], ['broken.json'])
    """

    def __init__(self, items: Sequence[Item], problems: Sequence[Problem], folder: Path):
        self.items = {item.name: item for item in items}
        self.problems = tuple(problems)
        self.folder = folder  # where exports go

    @classmethod
    def open(cls, paths: Sequence[StrPath]) -> Library:
        """Read files and folders. Raises ViewError for a path that is not there; a file given by name must be readable."""
        items: list[Item] = []
        problems: list[Problem] = []
        folders = []
        for path in [Path(p) for p in paths] or [Path(".")]:
            if path.is_dir():
                folders.append(path)
                _read_folder(path, items, problems)
            elif path.is_file():
                items += _read(path, path.name)
            else:
                raise ViewError(f"{str(path)!r} does not exist; give a folder, or a file that headwise wrote")
        return cls(_named_once(items), problems, folders[0] if folders else Path("."))

    def of(self, *kinds: Kind) -> dict[str, Item]:
        """Name → item, of these kinds."""
        return {name: item for name, item in self.items.items() if item.kind in kinds}

    def get(self, name: str, kind: type[T]) -> T:
        """The value of one item. Raises ViewError if there is none of this name and type."""
        item = self.items.get(name) if isinstance(name, str) else None
        if item is None or not isinstance(item.value, kind):
            raise ViewError(f"no file here is called {str(name)[:80]!r} and holds {kind.__name__}")
        return item.value

    def add(self, path: Path) -> None:
        """Read one more file, such as one that was just written."""
        for item in _read(path, path.name):
            self.items[item.name] = item


def _read_folder(folder: Path, items: list[Item], problems: list[Problem]) -> None:
    files = list(_files(folder))
    for path in files[:MOST]:
        name = path.relative_to(folder).as_posix()
        try:
            items += _read(path, name)
        except HeadwiseError as error:
            problems.append(Problem(name, str(error)))
    if len(files) > MOST:
        problems.append(Problem(str(folder), f"holds {len(files)} files; the first {MOST} were read"))


def _files(folder: Path) -> Iterator[Path]:
    """Files that may be ours, in the order of their names; links that lead out of the folder are left out."""
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if len(parts) > DEPTH + 1 or any(part.startswith(".") for part in parts) or path.suffix not in SUFFIXES:
            continue
        if path.is_file() and path.resolve().is_relative_to(root):
            yield path


def _read(path: Path, name: str) -> list[Item]:
    reader = SUFFIXES.get(path.suffix)
    if reader is None:
        raise ViewError(f"{name}: the explorer reads .safetensors and .json files that headwise wrote")
    return [Item(item_name, path, kind, value) for item_name, kind, value in reader(path, name)]


def _read_tensors(path: Path, name: str) -> Iterator[tuple[str, Kind, Any]]:
    label = kind_of(path)
    if label is None:
        raise ViewError(f"{name} is no safetensors file; write it again with headwise, or take it away")
    if label in READERS and label != "head-edits":  # tensors of edits belong to the JSON file beside them
        kind, load = READERS[label]
        yield name, kind, load(path)


def _read_json(path: Path, name: str) -> Iterator[tuple[str, Kind, Any]]:
    document = read_plain_json(path)
    label = document.get("headwise")
    if isinstance(label, str) and label in READERS:
        kind, load = READERS[label]
        yield name, kind, load(path)
    elif {"paper", "claim", "expected", "holds"} <= set(document):
        yield name, "record", Reproduction.from_json(read_text(path))
    elif isinstance(findings := document.get("findings"), dict):
        yield name, "report", findings
        if "budgets" in findings:
            yield f"{name}: budgets", "points", Points.from_report(findings, name)


SUFFIXES: dict[str, Callable[[Path, str], Iterator[tuple[str, Kind, Any]]]] = {
    ".safetensors": _read_tensors,
    ".json": _read_json,
}


def _named_once(items: Sequence[Item]) -> list[Item]:
    """Files of one name in two folders are told apart by their folders."""
    names = [item.name for item in items]
    twice = {name for name in names if names.count(name) > 1}
    return [
        Item(f"{item.path.parent.name}/{item.name}", item.path, item.kind, item.value) if item.name in twice else item
        for item in items
    ]
