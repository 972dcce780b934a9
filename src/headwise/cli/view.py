"""`view` opens the explorer on files and models; `sweep` measures the points that its budget slider stops at."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.cli import common


def view(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders and files that headwise wrote: scores, sets, plans, edits, reports. Default: here."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="A model to ask: a bundled name, a folder, a hub id. Give it twice to compare two."
        ),
    ] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    stack: Annotated[str | None, typer.Option("--stack", help="Which tower, in a model that has several.")] = None,
    dtype: common.Dtype = None,
    device: common.Device = None,
) -> None:
    """Look at heads on a local page: scores, attention on your own prompt, what is lost without a head, plans, budgets.

    Example: headwise view report --model smollm2
    """
    from headwise.view.server import make_explorer, need_dash, serve

    need_dash()
    models = [(*common.load(name, dtype, device), Path(name).name) for name in model or []]
    explorer = make_explorer(paths or [], models, stack)

    def ready(url: str) -> None:
        typer.echo(url)
        typer.secho("Ctrl-C ends it. Only this machine can reach the page.", err=True, dim=True)
        if browser:
            import webbrowser

            webbrowser.open(url)

    try:
        serve(explorer, port=port, ready=ready)
    except KeyboardInterrupt:
        typer.secho("ended", err=True, dim=True)


def sweep(
    scores: Annotated[Path, typer.Option("--scores", help="A file of scores of heads or kv heads.")],
    full: Annotated[str, typer.Option("--full", help="Numbers of kv heads that keep everything: 9,23,45.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the points go, as JSON.")],
    model: common.Model = "smollm2",
    sinks: Annotated[int, typer.Option("--sinks", min=0, help="First tokens that the other kv heads keep.")] = 16,
    window: Annotated[int, typer.Option("--window", min=1, help="Latest tokens that the other kv heads keep.")] = 128,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Passkeys a point.")] = 4,
    length: Annotated[int, typer.Option("--length", min=64, help="Tokens of each.")] = 896,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of English for the perplexity.")] = 1024,
    draws: Annotated[int, typer.Option("--draws", min=0, help="Random choices of heads a point.")] = 2,
    seed: common.Seed = 0,
    dtype: common.Dtype = None,
    device: common.Device = None,
    progress: common.Progress = None,
    json: common.Json = False,
) -> None:
    """Measure recall, perplexity and bytes with so many kv heads full: chosen by score, by lot, and the worst.

    Example: headwise sweep --scores gates.safetensors --full 9,23,45 -o points.json
    """
    from headwise.units import HeadScores
    from headwise.view.points import measure_points

    loaded_scores, counts = HeadScores.load(scores), _counts(full)
    loaded, tokenizer = common.load(model, dtype, device)
    with _status(common.show_progress(progress, json)) as step:
        points = measure_points(
            loaded, common.tokenizer_of(model, tokenizer), loaded_scores, full_heads=counts, sinks=sinks, window=window,
            prompts=prompts, length=length, tokens=tokens, draws=draws, seed=seed, step=step,
        )  # fmt: skip
    points.save(output)
    rows = [f"{run.kind:<13}{run.full_heads:>5} full {points.share(run):7.1%} of the cache, {run.tokens:7.1%} of the digits, "
            f"perplexity {run.perplexity:.3f}" for run in points.runs]  # fmt: skip
    data = {"file": output, "how": points.how, "runs": [vars(run) for run in points.runs]}
    common.say(data, json, "\n".join([*rows, f"written: {output}"]))


def _counts(text: str) -> list[int]:
    from headwise.errors import ViewError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ViewError(f"--full is {text[:60]!r}; write numbers of kv heads, such as 9,23,45") from None


class _status:  # noqa: N801 - used like a function
    """A line that says which point is measured."""

    def __init__(self, shown: bool):
        from rich.console import Console

        self.status: Any = Console(stderr=True).status("measuring") if shown else None

    def __enter__(self) -> Any:
        if self.status is None:
            return None
        self.status.start()
        return lambda line: self.status.update(f"measuring: {line}")

    def __exit__(self, *error: object) -> None:
        if self.status is not None:
            self.status.stop()
