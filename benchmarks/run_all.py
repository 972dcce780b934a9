"""Run every benchmark that this machine can run, keep its result with commit and environment, and write docs/performance.md.

    python benchmarks/run_all.py                        # all of runs.toml that fits; `make performance` does this
    python benchmarks/run_all.py --only experts uoe     # some
    python benchmarks/run_all.py --list                 # what would run here
    python benchmarks/run_all.py --keep FOLDER          # take results made elsewhere: FOLDER/NAME.json, by their own environment

A run that fails or exceeds its limit keeps nothing: the result before it stays, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headwise.papers import environment

HOME = Path(__file__).parents[1]
RESULTS = HOME / "benchmarks" / "results"


@dataclass(frozen=True)
class Run:
    """One line of runs.toml."""

    name: str
    on: str
    seconds: int
    command: str

    def fits(self, device: str) -> bool:
        """Whether it is for this kind of machine."""
        return self.on in ("any", device)

    def __call__(self) -> dict[str, Any]:
        """What it printed, with the circumstances; raises RuntimeError where it printed no JSON."""
        words = [sys.executable if word == "python" else word for word in shlex.split(self.command)]
        load, begin = os.getloadavg()[0], time.monotonic()
        done = subprocess.run(
            words, cwd=HOME, env=surroundings(), capture_output=True, text=True, timeout=self.seconds, check=False
        )
        if done.returncode:
            raise RuntimeError((done.stderr or done.stdout)[-600:])
        stamp = {"command": self.command, "commit": commit(), "load": round(load, 1)}
        return {**stamp, "seconds": round(time.monotonic() - begin, 1), **objects(done.stdout)}


def surroundings() -> dict[str, str]:
    """One CPU thread unless asked otherwise, no network."""
    defaults = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**defaults, **os.environ, "PYTHONPATH": f"{HOME / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def commit() -> str:
    """The commit of this tree, "+" behind it where files differ; $HEADWISE_COMMIT where there is no git."""
    try:
        head, changes = (
            subprocess.run(["git", *words], cwd=HOME, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", "src", "benchmarks/*.py"))
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("HEADWISE_COMMIT", "unknown")
    return head + ("+" if changes else "")


def objects(text: str) -> dict[str, Any]:
    """The JSON object that a text is or ends with; objects of one line each become `rows`, whole results, each with more, their last."""
    found, reader, place = [], json.JSONDecoder(), text.find("{")
    while place >= 0:
        value, place = reader.raw_decode(text, place)
        found.append(value)
        place = text.find("{", place)
    if not found:
        raise RuntimeError("it printed no JSON")
    if len(found) == 1 or all("environment" in one for one in found):
        return found[-1]
    given = next((one["environment"] for one in found if "environment" in one), environment())
    return {"environment": given, "rows": [one for one in found if "environment" not in one]}


def folder_of(found: dict[str, Any]) -> Path:
    """results/h200, results/h100 …, or results/cpu, by the environment of a result."""
    given = found.get("environment", {})
    name = str(given.get("card") or given.get("gpu") or given.get("device") or found.get("device") or "cpu")
    return RESULTS / (name.split()[1].lower() if name.startswith("NVIDIA ") else "cpu")


def keep(name: str, found: dict[str, Any]) -> Path:
    """Write one result."""
    found.setdefault("environment", environment())
    file = folder_of(found) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def brought(folder: Path) -> int:
    """Keep what was measured on another machine; the number of files that were no result."""
    bad = 0
    for path in sorted(folder.glob("*.json")):
        try:
            found = {"commit": os.environ.get("HEADWISE_COMMIT", commit()), **objects(path.read_text(encoding="utf-8"))}
            if not ({"environment", "device"} & set(found)):
                raise RuntimeError("it says not on what machine it was measured")
            print(f"{path.name}: kept as {keep(path.stem, found).relative_to(HOME)}")
        except (RuntimeError, ValueError) as error:
            bad += 1
            print(f"{path.name}: {error}")
    return bad


def measure(chosen: list[Run]) -> int:
    """Run them in turn; the number of those that failed."""
    bad = 0
    for number, run in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {run.name}: {run.command} (at most {run.seconds} s)", flush=True)
        try:
            found = run()
            print(f"    {found['seconds']} s, {keep(run.name, found).relative_to(HOME)}", flush=True)
        except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
            bad += 1
            print(f"    failed: {error}", flush=True)
    return bad


def runs() -> list[Run]:
    """The list."""
    return [Run(**row) for row in tomllib.loads((HOME / "benchmarks" / "runs.toml").read_text(encoding="utf-8"))["run"]]


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [run for run in runs() if run.fits(device) and (given.only is None or run.name in given.only)]
    if given.list:
        print("\n".join(f"{run.name:20} {run.seconds:>4} s  {run.command}" for run in chosen))
        return 0
    missing = set(given.only or ()) - {run.name for run in chosen}
    if missing:
        parser.error(f"nothing called {', '.join(sorted(missing))} runs on {device}; see --list")
    bad = brought(given.keep) if given.keep else measure(chosen)
    page = subprocess.run([sys.executable, str(HOME / "tools" / "performance_page.py"), "--write"], check=False)
    return int(bool(bad) or page.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
