"""Run the recorded papers again, as their pages say, and compare: is `headwise papers` still true, row by row?

    python tools/rerun_papers.py                  every paper with a recorded run at CPU scale; about an hour of one quiet core
    python tools/rerun_papers.py bam mote         some
    python tools/rerun_papers.py --list           commands and the seconds that the recorded runs took

The exit code is 1 if a check is true in one run and false in the other. Numbers that differ by more than a tenth are shown; times are
not compared. Nothing is recorded: `headwise reproduce NAME --record` does that.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from headwise.papers import Reproduction, Row, rows

HOME = Path(__file__).parents[1]
TIMES = ("_s", "_ms", "seconds", "speedup")


def seed_of(slug: str, home: Path = HOME) -> int:
    """The seed with which a page says that the record was made: `headwise reproduce SLUG --seed N` under "Measured"; else 0."""
    for page in sorted((home / "docs" / "methods").glob("*.md")):
        _, found, measured = page.read_text(encoding="utf-8").partition(f"<!-- verdict {slug}")
        stated = re.search(rf"`headwise reproduce {re.escape(slug)}(?: --seed (\d+))?", measured) if found else None
        if stated:
            return int(stated[1] or 0)
    return 0


def differences(record: Reproduction, run: Reproduction) -> Iterator[tuple[bool, str]]:
    """(whether it makes a row untrue, what differs) of two runs of one paper."""
    before, now = ({str(check): check.holds(x.numbers) for check in x.checks} for x in (record, run))
    for check in sorted(set(before) ^ set(now)):
        yield True, f"only {'the record' if check in before else 'this run'} has the check: {check}"
    for check in (check for check in before if check in now and before[check] != now[check]):
        yield True, f"was {str(before[check]).lower()} and is {str(now[check]).lower()}: {check}"
    for name, value in record.numbers.items():
        other = run.numbers.get(name, math.nan)
        if not name.endswith(TIMES) and not math.isclose(value, other, rel_tol=0.1, abs_tol=1e-6):
            yield False, f"{name}: {value:.4g} in the record, {other:.4g} now"


def again(row: Row, seed: int) -> bool:
    """Run one paper again and say what differs; whether its row is still true."""
    assert row.record is not None and row.reproduce is not None
    run = row.reproduce("cpu", seed=seed)
    found = list(differences(row.record, run))
    true = not any(untrue for untrue, _ in found)
    verdict = "holds" if run.holds else f"does not hold ({len(run.failed())} of {len(run.checks)} checks are false)"
    print(f"{row.slug}: {'as recorded' if true else 'NOT AS RECORDED'}; {verdict}; {run.seconds:.0f} s", flush=True)
    for untrue, text in found:
        print(f"    {'! ' if untrue else ''}{text}", flush=True)
    return true


def main(arguments: list[str]) -> int:
    """The exit code is 1 if a row is not as recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args(arguments)
    recorded = {row.slug: row for row in rows() if row.record is not None and row.reproduce is not None}
    unknown = sorted(set(given.names) - set(recorded))
    if unknown:
        parser.error(f"no run is recorded of {', '.join(unknown)}; there are {', '.join(recorded)}")
    chosen = [recorded[name] for name in given.names] or list(recorded.values())
    if given.list:
        for row in chosen:
            assert row.record is not None
            print(f"headwise reproduce {row.slug} --seed {seed_of(row.slug)}: {row.record.seconds:.0f} s")
        return 0
    results = [again(row, seed_of(row.slug)) for row in chosen]
    print(f"{sum(results)} of {len(results)} are as recorded")
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
