"""`papers` lists the 33 systems with their true status; `reproduce` measures one of them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from headwise.cli import common

STYLES = {"works": "[green]works[/]", "partial": "[yellow]partial[/]", "planned": "[dim]planned[/]"}


def papers(json: Annotated[bool, typer.Option("--json", help="Print the rows as one JSON list.")] = False) -> None:
    """List the 33 systems in scope: what works, what is partial, what is planned.

    Example: headwise papers --json
    """
    from headwise.papers import rows

    if json:
        import json as json_format

        typer.echo(json_format.dumps([row.to_dict() for row in rows()], ensure_ascii=False, indent=1))
        return
    from rich.table import Table

    table = Table(box=None, expand=True)
    for column in ("", "name", "verb", "status"):
        table.add_column(column, no_wrap=True)
    table.add_column("system", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("measured here")
    for row in rows():
        measured = "; ".join(
            f"{'holds' if run.holds else 'does not hold'} ({run.environment.get('date', '?')}, {run.scale})"
            for run in (row.records if row.paper else ())
        )
        table.add_row(row.id, row.slug, row.verb, STYLES[row.status], row.title, measured)
    common.say({}, False, table)


def reproduce(
    name: Annotated[str, typer.Argument(help="Name or number of the paper, see: headwise papers")],
    scale: Annotated[Literal["cpu", "gpu"], typer.Option("--scale", help="cpu: minutes. gpu: the larger run.")] = "cpu",
    seed: common.Seed = 0,
    record: Annotated[
        bool, typer.Option("--record", help="For maintainers: keep the run in the source tree, for the papers table.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option("--page", help="Also write the checks, the numbers and their figures (HTML) here.")
    ] = None,
    progress: common.Progress = None,
    json: common.Json = False,
) -> None:
    """Measure a paper's claim with this library. Exit code 1 if the numbers do not bear it out.

    Example: headwise reproduce retrieval-head --page retrieval.html
    """
    from headwise.errors import TaskError
    from headwise.papers import row
    from headwise.papers.catalogue import record_file

    chosen = row(name)
    if chosen.reproduce is None:
        raise TaskError(
            f"{chosen.slug} ({chosen.id}) is planned: there is nothing to reproduce yet; see headwise papers"
        )
    result = chosen.reproduce(scale, seed=seed, progress=common.show_progress(progress, json))
    if record:
        _keep(result.to_json(), record_file(chosen.slug, result.scale))
    if page is not None:
        from headwise.report.paper_page import paper_page

        _keep(paper_page(chosen, result, seed=seed, progress=common.show_progress(progress, json)), page)
    numbers = [f"  {name:<40}{value:12.5g}" for name, value in result.metrics.items()]
    numbers += [f"  {name + ' (baseline)':<40}{value:12.5g}" for name, value in result.baselines.items()]
    checks = [f"  {'yes' if check not in result.failed() else 'NO ':<5}{check}" for check in result.checks]
    verdict = f"{'holds' if result.holds else 'does not hold'} ({result.seconds:.0f} s, scale {result.scale})"
    common.say(result.to_dict(), json, "\n".join([result.claim, *numbers, *checks, verdict]))
    raise typer.Exit(0 if result.holds else 1)


def _keep(text: str, file: Path) -> None:
    from headwise.errors import ArtifactError

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"the run cannot be kept in {file}: {error.strerror}") from error
