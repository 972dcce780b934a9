"""The command line. Heavy imports happen inside the commands, so that `headwise --help` answers at once.

Only commands that can do something exist: those made from the registry (see `generated`) appear with their first method.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from safetensors import SafetensorError

from headwise import registry
from headwise.cli import bench, calibrate, circuit, edit, generated, papers, run, select_data, view
from headwise.errors import HeadwiseError

__all__ = ["app", "main"]

INTRO = """Every attention head and expert of a transformer as an addressable unit.

The way of the data: `score` the heads, `plan` their cache, `edit` or `convert` them; `generate` and `eval` take the files."""

INTERRUPTED = 130

app = typer.Typer(
    name="headwise",
    help=INTRO,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("headwise"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end.")
    ] = False,
) -> None:
    """Only `--version` is an option of the whole command line."""


def _assemble() -> None:
    if (Path(__file__).parents[1] / "report" / "demo.py").exists():
        app.command(rich_help_panel="Start")(run.demo)
    app.command(rich_help_panel="Start")(run.models)
    app.command(rich_help_panel="Use the files")(run.generate)
    app.command("eval", rich_help_panel="Use the files")(run.evaluate)
    app.command("select-data", rich_help_panel="Use the files")(select_data.select_data)
    app.command(rich_help_panel="Start")(circuit.circuit)
    app.command(rich_help_panel="Use the files")(view.view)
    app.command(rich_help_panel="Use the files")(view.sweep)
    app.command(rich_help_panel="Claims")(papers.papers)
    app.command(rich_help_panel="Claims")(papers.reproduce)
    app.add_typer(bench.app, name="bench", help=bench.HELP, rich_help_panel="Claims")
    app.command(rich_help_panel="Make a file")(calibrate.calibrate)
    for name, verb in generated.COMMANDS.items():
        if name == "edit" or verb in registry.declared():
            app.add_typer(edit.app if name == "edit" else generated.group(name), rich_help_panel="Make a file")


_assemble()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process: 0, 1 for a claim that does not hold, 2 for a mistake of the user.

    An error that headwise raises on purpose, a full disk or Ctrl-C (130) is one red line; `HEADWISE_DEBUG=1` shows where it came from.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import rich

    rich.reconfigure(stderr=True)  # progress bars and status lines; standard output is for results
    try:
        app(None if arguments is None else list(arguments))
    except SystemExit as end:
        if end.code == INTERRUPTED:
            typer.secho("interrupted", fg="red", err=True)
        raise
    except (HeadwiseError, OSError, SafetensorError) as error:
        if os.environ.get("HEADWISE_DEBUG") == "1":
            raise
        typer.secho(f"error: {' '.join(str(error).split())}", fg="red", err=True)
        sys.exit(2)
