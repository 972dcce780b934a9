"""The table of the 33 systems, made from `headwise.papers`: a short one in README.md, a long one in docs/papers.md.

    python tools/papers_table.py --write     write both
    python tools/papers_table.py --check     exit 1 if either differs, or if a paper claims more than it proves

Statuses are computed (see `headwise.papers.catalogue`): nobody types them.
"""

import sys
from pathlib import Path

from headwise.papers import Reproduction, Row, rows

HOME = Path(__file__).parents[1]
BEGIN = "<!-- papers: made by tools/papers_table.py, do not edit -->"
END = "<!-- /papers -->"
MARKS = {"works": "**works**", "partial": "partial", "planned": "planned"}


def short_table(table: list[Row]) -> str:
    """The README's table: verb, status and API of every system."""
    lines = ["| | system | verb | status | API |", "|---|---|---|---|---|"]
    lines += [f"| {r.id} | [{r.title}]({_link(r)}) | {r.verb} | {MARKS[r.status]} | {_code(r.api)} |" for r in table]
    return "\n".join(lines)


def page(table: list[Row]) -> str:
    """docs/papers.md: the counts, the table, and what was measured for each system that has a module."""
    counts = ", ".join(f"{sum(r.status == status for r in table)} {status}" for status in MARKS)
    parts = [
        "# The 33 systems",
        f"{BEGIN}\n",
        f"{len(table)} systems: {counts}. **works** means: the API imports, and the recorded run of `headwise reproduce` "
        "bears out the claim.\n",
        short_table(table),
    ]
    parts += [section(r) for r in table if r.paper]
    return "\n".join([*parts, f"\n{END}", ""])


def section(row: Row) -> str:
    """Claim, command and recorded numbers of one system."""
    assert row.paper
    lines = [f"\n## {row.id} {row.title}", f"Claim: {row.paper.claim}\n", f"Run it: `headwise reproduce {row.slug}`\n"]
    if not row.records:
        return "\n".join([*lines, "No run is recorded yet."])
    return "\n".join([*lines, "\n\n".join(measured(record) for record in row.records)])


def measured(record: Reproduction) -> str:
    """The numbers of one recorded run."""
    machine = ", ".join(f"{name} {value}" for name, value in record.environment.items())
    lines = [
        f"Recorded at scale `{record.scale}` in {record.seconds:.0f} s ({machine}):\n",
        "| measured | value |",
        "|---|---|",
        *(f"| {name} | {value:.4g} |" for name, value in record.metrics.items()),
        *(f"| {name} (baseline) | {value:.4g} |" for name, value in record.baselines.items()),
        "",
        f"Expected: {'; '.join(f'`{check}`' for check in record.checks)}. **{'Holds.' if record.holds else 'Does not hold.'}**",
    ]
    return "\n".join(lines)


def readme(text: str, table: list[Row]) -> str:
    """The README with its table replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md lacks the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{short_table(table)}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write or check both files; the exit code is 1 if a check fails."""
    if arguments not in (["--write"], ["--check"]):
        raise SystemExit(__doc__)
    table = rows()
    home = {HOME / "README.md", HOME / "docs" / "papers.md"}
    made = {
        file: readme(file.read_text(encoding="utf-8"), table) if file.name == "README.md" else page(table)
        for file in home
    }
    if arguments == ["--write"]:
        for file, text in made.items():
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
    stale = [file.name for file, text in made.items() if not file.exists() or file.read_text(encoding="utf-8") != text]
    for name in stale:
        print(f"{name}: the papers table is out of date; run 'make papers'")
    claims = [f"papers/{r.slug}: {problem}" for r in table for problem in r.problems()]
    for claim in claims:
        print(claim)
    if not stale and not claims:
        print(f"papers table: {len(table)} rows are true and up to date")
    return bool(stale or claims)


def _link(row: Row) -> str:
    return f"https://arxiv.org/abs/{row.arxiv}"


def _code(api: str) -> str:
    return ", ".join(f"`{name}`" for name in api.split(", ") if name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
