"""Kernel benchmarks: ``python benchmarks/kernels/bench.py [routed] [spans] [decode] [blocks] [--quick]``.

Each section first checks its kernel against a float64 reference and prints no speed-up when that fails. Ratios are
against cuDNN SDPA of the same run. Writes ``bench.json`` into $OUT when that is set.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import cases
import measure


def gate(name: str, results: dict) -> bool:
    """Run the correctness gate of a section; a red gate is reported and stops the section."""
    errors = cases.GATES[name]()
    bad = {what: error for what, error in errors.items() if not error < 2e-2}
    results[name] = {"gate": errors, "rows": []}
    print(
        f"\n== {name}: gate {'RED ' + str(bad) if bad else 'green'} (worst relative error {max(errors.values()):.1e})"
    )
    return not bad


def show(rows: list[dict]) -> None:
    """Print rows of like keys as a table."""
    for row in rows:
        print(
            "  "
            + "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )


def main(argv: list[str]) -> int:
    """Run the sections named in argv (all by default)."""
    names = [a for a in argv if not a.startswith("-")] or list(cases.SECTIONS)
    quick = "--quick" in argv
    torch.manual_seed(0)
    results: dict = {"environment": measure.environment(), "ceilings": measure.ceilings()}
    print(results["environment"], results["ceilings"])
    green = True
    for name in names:
        try:
            if gate(name, results):
                for rows in cases.SECTIONS[name](quick, results["ceilings"]):
                    results[name]["rows"] += rows
                    show(rows)
            else:
                green = False
        except Exception as error:  # one broken section must not cost the others their figures
            green = False
            print(f"== {name}: FAILED {type(error).__name__}: {str(error)[-1500:]}")
        if os.environ.get("OUT"):
            Path(os.environ["OUT"], "bench.json").write_text(json.dumps(results, indent=1))
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
