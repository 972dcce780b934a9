"""One reader, many damaged files: what came of it."""

import json
import random
import resource
import shutil
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from damage import damages, whole_files
from readers import READERS

from headwise import storage
from headwise.errors import HeadwiseError

LONGEST_TEXT = 2000  # characters of an error


@dataclass
class Outcome:
    """How many damaged files were read, how they ended, how long the slowest took, how far the memory of the process rose."""

    files: int = 0
    read: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    memory_mb: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def count(self, load: Any, folder: Path, what: str) -> None:
        """Read once. Anything but a value or an error of headwise, with a text of a line that names the file, is noted as wrong."""
        self.files += 1
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = load(folder)
                str(found), repr(found)
            self.read += 1
        except HeadwiseError as error:
            self.refused += 1
            if len(str(error)) > LONGEST_TEXT:
                self.wrong.append(f"{what}: a text of {len(str(error))} characters")
        except Exception as error:
            self.wrong.append(f"{what}: {type(error).__module__}.{type(error).__name__}: {str(error)[:200]}")
        self.slowest_s = max(self.slowest_s, time.perf_counter() - start)


def peak_mb() -> float:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(name: str, folder: Path, files: int, seed: int = 0, keep: Path | None = None) -> Outcome:
    """Damage the files of a reader in turn, `files` times its share in all, and put each in order again.

    `keep`: a folder for the files that something went wrong with.
    """
    reader, outcome, rng = READERS[name], Outcome(), random.Random(f"{name} {seed}")
    good, folder = folder / "good", folder / "damaged"
    good.mkdir(parents=True)
    reader.save(good)
    shutil.copytree(good, folder)
    reader.load(folder)
    before = peak_mb()
    turns = max(1, round(files * reader.share / len(reader.files)))
    for file in reader.files:
        data = (good / file).read_bytes()
        ways = damages(folder / file)
        for turn in range(turns):
            shutil.rmtree(folder)
            shutil.copytree(good, folder)
            (folder / file).write_bytes(ways[turn % len(ways)](rng, data))
            wrong = len(outcome.wrong)
            copy = (folder / file).read_bytes()
            outcome.count(reader.load, folder, f"{file}, {ways[turn % len(ways)].__name__} {turn}")
            if keep is not None and len(outcome.wrong) > wrong:
                (keep / f"{name}-{turn}-{Path(file).name}").write_bytes(copy)
    outcome.memory_mb = round(peak_mb() - before, 1)
    return outcome


def whole(name: str, folder: Path) -> Outcome:
    """Something else in the place of each file of a reader: other contents, a folder, a pipe, nothing."""
    reader, outcome = READERS[name], Outcome()
    good, folder = folder / "good", folder / "damaged"
    good.mkdir(parents=True)
    reader.save(good)
    for file in reader.files:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        (folder / file).unlink()
        for what in whole_files(folder / file, storage.MAX_TENSOR_BYTES + 1):
            outcome.count(reader.load, folder, f"{file}, {what}")
            if what == "missing":
                (folder / file).unlink(missing_ok=True)
    return outcome


def as_json(outcome: Outcome) -> dict[str, Any]:
    """For the file of results."""
    return json.loads(json.dumps(vars(outcome)))
