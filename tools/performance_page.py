"""docs/performance.md, made from the kept results of the benchmarks: every figure with its bar, machine, date, commit and file.

    python tools/performance_page.py --write     write the page, and the README's table of gains
    python tools/performance_page.py --check     exit 1 if one of them differs, or if a claim points at nothing

`benchmarks/claims.toml` says what is claimed and where in `benchmarks/results` the number stands. Nobody types a number or a verdict.
"""

import json
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
BEGIN = "<!-- gains: made by tools/performance_page.py from the claims that have a `gain`, do not edit -->"
END = "<!-- /gains -->"
MOST_GAINS = 12
MARKS = {True: "met", False: "**missed**", None: "no bar"}
Step = str | int | dict[str, Any]
Value = float | list[float]


class ClaimError(ValueError):
    """A claim that points at nothing, or that is not a claim."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row: `file` is a pattern below results, so that every machine with such a file gives a row of its own.

    `at` leads to the number: names of keys, indices of lists, tables that choose the one entry of a list with these values, and "*"
    for what follows in every entry that has it. `over` leads to a number that it is divided by. Of several numbers the worst counts.
    `open` says why nothing is measured. `gain` says the row again for somebody who has not read the page: it then stands in the README,
    at the place `rank`.
    """

    area: str
    issue: int
    what: str
    bar: str = ""
    unit: str = ""
    file: str = ""
    at: Sequence[Step] = ()
    over: Sequence[Step] = ()
    note: str = ""
    open: str = ""
    gain: str = ""
    rank: int = 0

    def holds(self, value: Value) -> bool | None:
        """Whether the number meets the bar; None without one."""
        if not self.bar:
            return None
        found = re.fullmatch(r"(>=|<=) ([\d.]+)", self.bar)
        if found is None:
            raise ClaimError(f"{self.what}: the bar {self.bar!r} reads '>= 1.5' or '<= 0.65'")
        numbers = value if isinstance(value, list) else [value]
        least = float(found[2])
        return all(number >= least if found[1] == ">=" else number <= least for number in numbers)


@dataclass(frozen=True)
class Result:
    """A kept file."""

    name: str
    data: dict[str, Any] = field(repr=False)

    @property
    def machine(self) -> str:
        """The card, or the CPU."""
        given = self.environment
        name = next(
            (str(given[key]) for key in ("gpu", "card", "device") if key in given), str(self.data.get("device", "CPU"))
        )
        return name.removeprefix("NVIDIA ").removesuffix(" 80GB HBM3")

    @property
    def environment(self) -> dict[str, Any]:
        """What the file says of versions, device and date."""
        return dict(self.data.get("environment", {}))

    @property
    def date(self) -> str:
        """When it was measured."""
        return str(self.environment.get("date", self.data.get("date", "–")))

    @property
    def commit(self) -> str:
        """Of the code that was measured; "≤ …" where only the commit that keeps the file is known."""
        return str(self.data.get("commit", "–"))

    def value(self, path: Sequence[Step]) -> Value:
        """The number at a path, or the numbers of a list."""
        thing: Any = self.data
        for place, step in enumerate(path):
            if step == "*":
                thing = [value for entry in thing if (value := _reached(entry, path[place + 1 :])) is not None]
                break
            thing = _next(thing, step, f"{self.name}: {list(path)}")
        if isinstance(thing, list) and thing and all(isinstance(x, int | float) for x in thing):
            return [float(x) for x in thing]
        if isinstance(thing, bool) or not isinstance(thing, int | float):
            raise ClaimError(f"{self.name}: at {list(path)} stands {str(thing)[:60]}, which is no number")
        return float(thing)


def _reached(entry: Any, path: Sequence[Step]) -> Any:
    """What stands at a path in one entry of a list, None where it has no such thing."""
    try:
        for step in path:
            entry = _next(entry, step, "")
    except ClaimError:
        return None
    return entry


def _next(thing: Any, step: Step, where: str) -> Any:
    if isinstance(step, dict):
        found = [row for row in thing if isinstance(row, dict) and all(row.get(k) == v for k, v in step.items())]
        if len(found) != 1:
            raise ClaimError(f"{where}: {len(found)} entries have {step}, wanted one")
        return found[0]
    try:
        return thing[step]
    except (KeyError, IndexError, TypeError) as error:
        raise ClaimError(f"{where}: there is no {step!r}") from error


def claims(home: Path = HOME) -> list[Claim]:
    """What is claimed, in the order of the file."""
    table = tomllib.loads((home / "benchmarks" / "claims.toml").read_text(encoding="utf-8"))
    return [Claim(**row) for row in table["claim"]]


def results(home: Path = HOME) -> dict[str, Result]:
    """All kept files by their path below results."""
    root = home / RESULTS
    files = {str(path.relative_to(root)): path for path in sorted(root.rglob("*.json"))}
    return {name: Result(name, json.loads(path.read_text(encoding="utf-8"))) for name, path in files.items()}


def measured(claim: Claim, kept: dict[str, Result]) -> Iterator[tuple[Result, Value]]:
    """The claim's number in every file that it names; ClaimError where there is none."""
    names = [name for name in kept if Path(name).match(claim.file)]
    if not names:
        raise ClaimError(f"{claim.what}: no kept file is called {claim.file}")
    found = 0
    for name in names:
        try:
            value = kept[name].value(claim.at)
        except ClaimError:
            if len(names) > 1:  # a run of another card may lack a row; one must have it
                continue
            raise
        if claim.over:
            under = kept[name].value(claim.over)
            if isinstance(value, list) or isinstance(under, list) or not under:
                raise ClaimError(f"{claim.what}: a ratio wants two numbers")
            value = value / under
        found += 1
        yield kept[name], value
    if not found:
        raise ClaimError(f"{claim.what}: no file has {list(claim.at)}")


def page(rows: list[Claim], kept: dict[str, Result]) -> str:
    """The page."""
    tables, counts = [], {True: 0, False: 0, None: 0}
    for area in dict.fromkeys(row.area for row in rows):
        lines, notes = [], []
        for claim in (row for row in rows if row.area == area):
            for result, value in () if claim.open else measured(claim, kept):
                verdict = claim.holds(value)
                counts[verdict] += 1
                cells = (
                    claim.what,
                    _bar(claim),
                    _shown(value),
                    MARKS[verdict],
                    result.machine,
                    result.date,
                    result.commit,
                )
                lines.append(f"| {' | '.join(cells)} | `{result.name}` | {claim.issue} |")
            if claim.open:
                lines.append(f"| {claim.what} | {_bar(claim)} | – | **not measured** | – | – | – | – | {claim.issue} |")
            if claim.note or claim.open:
                notes.append(f"- {claim.what}: {claim.note or claim.open}")
        tables += [f"\n## {area}\n", HEAD, *lines, *(["", *notes] if notes else [])]
    unmeasured = sum(bool(row.open) for row in rows)
    total = f"{counts[True]} met, {counts[False]} missed, {unmeasured} not measured, {counts[None]} without a bar."
    used = {result.name for row in rows if not row.open for result, _ in measured(row, kept)}
    return "\n".join([ABOUT, f"**{total}**", *tables, *_environments(kept, used), ""])


ABOUT = """# Performance

<!-- made by tools/performance_page.py from benchmarks/claims.toml and benchmarks/results; do not edit -->

`make performance` runs every benchmark that this machine can run, keeps the results with commit and environment, and writes this page.
Numbers are read from the kept files; a row says *missed* where the number misses its bar. Ratios are against the fastest dense
kernel, or the fastest untouched model, of the same run. *Commit*: of the code that was measured; "≤" where only the commit that first
kept the file is known. Stories, predictions and what was tried are in `benchmarks/notes.md` and on the method pages.
"""
HEAD = "| what | bar | measured | | machine | date | commit | file | issue |\n|---|---|---|---|---|---|---|---|---|"


def _environments(kept: dict[str, Result], used: set[str]) -> Iterator[str]:
    yield "\n## Environments\n"
    yield "| file | quoted above | environment |\n|---|---|---|"
    for name, result in kept.items():
        said = ", ".join(f"{key} {value}" for key, value in result.environment.items() if key != "date")
        shared = result.data.get("load")
        said += (
            f"; load {shared} when it began, so other work shared the machine" if shared and float(shared) > 0.5 else ""
        )
        yield f"| `{name}` | {'yes' if name in used else 'no'} | {said or result.data.get('model', '–')} |"


def gains(rows: list[Claim], kept: dict[str, Result]) -> str:
    """The README's table: the claims with a `gain`, in the order of their ranks, each with its bar, its verdict and its machine."""
    lines = ["| what you do | measured | bar | | machine |", "|---|---|---|---|---|"]
    for claim in sorted((row for row in rows if row.gain), key=lambda row: row.rank):
        where = f"docs/performance.md#{_anchor(claim.area)}"
        for result, value in measured(claim, kept):
            bar = _bar(claim).removesuffix(claim.unit).strip() or "–"
            shown = f"**{_shown(value)}** {claim.unit}".strip()
            lines.append(
                f"| [{claim.gain}]({where}) | {shown} | {bar} | {MARKS[claim.holds(value)]} | {result.machine} |"
            )
    if len(lines) - 2 > MOST_GAINS:
        raise ClaimError(
            f"the README would have {len(lines) - 2} gains; {MOST_GAINS} are enough for somebody who is new"
        )
    return "\n".join(lines)


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def readme(text: str, table: str) -> str:
    """The README with its table of gains replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ClaimError(f"README.md lacks the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _bar(claim: Claim) -> str:
    text = claim.bar.replace(">=", "≥").replace("<=", "≤")
    return f"{text} {claim.unit}".strip() or "–"


def _shown(value: Value) -> str:
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) > 4:
        return f"{_shown(min(numbers))} to {_shown(max(numbers))}, {len(numbers)} rows"
    return " / ".join(f"{number:.4g}" if abs(number) < 1000 else f"{number:.0f}" for number in numbers)


def main(arguments: list[str], home: Path = HOME) -> int:
    """Write or check the page and the README's table; the exit code is 1 if a check fails."""
    if arguments not in (["--write"], ["--check"]):
        raise SystemExit(__doc__)
    try:
        rows, kept = claims(home), results(home)
        first = home / "README.md"
        made = {
            home / "docs" / "performance.md": page(rows, kept),
            first: readme(first.read_text(encoding="utf-8"), gains(rows, kept)),
        }
    except ClaimError as error:
        print(f"docs/performance.md: {error}")
        return 1
    if arguments == ["--write"]:
        for file, text in made.items():
            file.write_text(text, encoding="utf-8")
    stale = [file for file, text in made.items() if not file.exists() or file.read_text(encoding="utf-8") != text]
    for file in stale:
        print(f"{file.relative_to(home)} is out of date; run 'make performance-page'")
    if not stale:
        print(f"performance page: {len(rows)} claims are read from the kept results")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
