"""Damaged files, killed and interrupted runs, long use, full disks: `python benchmarks/reliability.py [part …]` writes the figures.

The parts are the same functions that tests/reliability runs with small numbers.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "reliability"), str(ROOT / "tests")]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
from fuzz import as_json, fuzz, whole  # noqa: E402
from readers import READERS  # noqa: E402
from runs import COMMANDS, TRAININGS, interrupted, killed, soak  # noqa: E402

from headwise.papers.reproduction import environment  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "reliability.json"
FILES, KILLS, CALLS = 300, 16, 1000


def damaged(folder):
    """Every reader: damaged files, and other things in their place."""
    rows = {}
    for name, reader in READERS.items():
        print(name, reader.missing, flush=True)
        if reader.missing:
            continue
        rows[name] = {
            "damaged": as_json(fuzz(name, folder / name, FILES)),
            "replaced": as_json(whole(name, folder / f"{name}-whole")),
        }
    every = [row for pair in rows.values() for row in pair.values()]
    total = {key: sum(row[key] for row in every) for key in ("files", "read", "refused")}
    total |= {key: max(row[key] for row in every) for key in ("slowest_s", "memory_mb")}
    return {"readers": len(rows), **total, "wrong": sum(len(row["wrong"]) for row in every), "rows": rows}


def kills(folder):
    return {name: killed(name, folder / name, KILLS) for name in TRAININGS}


def interrupts(folder):
    """Each command, interrupted at three moments."""
    return {
        name: [interrupted(name, folder / f"{name}-{after}", after) for after in (0.2, 1.0, 3.0)] for name in COMMANDS
    }


PARTS = {"damaged": damaged, "kills": kills, "interrupts": interrupts, "soak": lambda folder: soak(CALLS)}


def main(parts):
    torch.set_num_threads(1)
    found = json.loads(OUT.read_text()) if OUT.exists() else {}
    for part in parts or PARTS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            result = PARTS[part](Path(folder))
        found[part] = {**result, "seconds": round(time.monotonic() - start), "environment": environment()}
        OUT.write_text(json.dumps(found, indent=1, sort_keys=True).replace(tempfile.gettempdir(), "TMP") + "\n")
        print(part, {key: value for key, value in result.items() if key != "rows"}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
