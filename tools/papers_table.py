"""What `headwise.papers` says, written into the pages: the table in README.md, docs/papers.md, and a verdict on each method's page.

    python tools/papers_table.py --write     write them
    python tools/papers_table.py --check     exit 1 if one differs, or if a paper claims more than it proves

Statuses and verdicts are computed from the recorded runs (see `headwise.papers.catalogue`): nobody types them. A page of docs/methods
has the verdict of a paper between `<!-- verdict SLUG … -->` and `<!-- /verdict -->`; each recorded paper has one on one page.
"""

import re
import sys
from pathlib import Path

from headwise.papers import Reproduction, Row, rows

HOME = Path(__file__).parents[1]
BEGIN = "<!-- papers: made by tools/papers_table.py, do not edit -->"
END = "<!-- /papers -->"
VERDICT = re.compile(r"<!-- verdict ([\w-]+)[^>]*-->\n.*?<!-- /verdict -->", re.DOTALL)
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
        "bears out the claim. `python tools/rerun_papers.py` runs them again and says which rows would change.\n",
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


def verdict(record: Reproduction) -> str:
    """One recorded run in a paragraph: when and where, whether it holds, and which checks are false."""
    where = record.environment
    failed, count = record.failed(), len(record.checks)
    begin = (
        f"Recorded run at scale `{record.scale}`: {where.get('date', '?')}, {where.get('device', '?')}, "
        f"torch {where.get('torch', '?')}, {record.seconds:.0f} s. "
    )
    if not failed:
        return f"{begin}**It holds**: all {count} checks are true."
    said = "; ".join(f"{check.name} (`{check.left} {check.op} {check.right}`)" for check in failed)
    return f"{begin}**It does not hold**: {count - len(failed)} of {count} checks are true. False: {said}."


def with_verdicts(text: str, table: list[Row]) -> str:
    """A method's page with its verdicts made anew; a verdict of a paper that has no recorded run is an error."""
    runs = {row.slug: row.records for row in table}

    def made(found: re.Match[str]) -> str:
        slug = found[1]
        if not runs.get(slug):
            raise SystemExit(f"a page gives a verdict on {slug!r}, of which no run is recorded")
        said = "\n\n".join(map(verdict, runs[slug]))
        return f"<!-- verdict {slug}: made by tools/papers_table.py, do not edit -->\n{said}\n<!-- /verdict -->"

    return VERDICT.sub(made, text)


def pages_made(table: list[Row], home: Path = HOME) -> dict[Path, str]:
    """Every page that this tool writes or writes into, as it should be."""
    first = home / "README.md"
    made = {first: readme(first.read_text(encoding="utf-8"), table), home / "docs" / "papers.md": page(table)}
    methods = sorted((home / "docs" / "methods").glob("*.md"))
    return made | {file: with_verdicts(file.read_text(encoding="utf-8"), table) for file in methods}


def unsaid(table: list[Row], made: dict[Path, str]) -> list[str]:
    """Papers with a recorded run whose verdict is on no page, or on several."""
    said = [slug for text in made.values() for slug in VERDICT.findall(text)]
    return [
        f"docs/methods: the verdict of {row.slug} stands on {said.count(row.slug)} pages, wanted one"
        for row in table
        if row.records and said.count(row.slug) != 1
    ]


def main(arguments: list[str]) -> int:
    """Write or check the pages; the exit code is 1 if a check fails."""
    if arguments not in (["--write"], ["--check"]):
        raise SystemExit(__doc__)
    table = rows()
    made = pages_made(table)
    if arguments == ["--write"]:
        for file, text in made.items():
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                file.write_text(text, encoding="utf-8")
    stale = [file.name for file, text in made.items() if not file.exists() or file.read_text(encoding="utf-8") != text]
    for name in stale:
        print(f"{name}: not what the recorded runs say; run 'make papers'")
    claims = unsaid(table, made)
    claims += [f"papers/{r.slug}: {problem}" for r in table for problem in r.problems()]
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
