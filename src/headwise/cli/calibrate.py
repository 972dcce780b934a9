"""`calibrate`: what a decode step of a model takes on this machine, so that plans can be made for a target latency."""

from pathlib import Path
from typing import Annotated

import typer

from headwise.cli import common


def calibrate(
    model: common.Model = "smollm2",
    batches: Annotated[str, typer.Option("--batches", help="Rows of the measured steps, split by commas.")] = "1,4",
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Tokens behind them. Default: a 32nd, a quarter, all of the context."),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Steps a point, of which the median counts.")] = 8,
    capture: Annotated[
        bool, typer.Option("--capture/--eager", help="Steps as CUDA graphs, as attach(capture=True) runs them.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the step time here, beside the copy kept on this machine."),
    ] = None,
    dtype: common.Dtype = None,
    device: common.Device = None,
    progress: common.Progress = None,
    json: common.Json = False,
) -> None:
    """Measure decode steps of a model on this machine; `headwise plan … --latency 12ms` then knows what fits.

    Example: headwise calibrate --model smollm2 --batches 1,4
    """
    from headwise.budget import step_time
    from headwise.budget._step_time import kept_at

    sizes = {
        "batches": _numbers("--batches", batches),
        "lengths": None if lengths is None else _numbers("--lengths", lengths),
    }
    loaded, _ = common.load(model, dtype, device)
    timed = step_time(loaded, repeats=repeats, capture=capture, progress=common.show_progress(progress, json), **sizes)  # type: ignore[arg-type]
    kept = kept_at(timed.device, timed.fingerprint, timed.kind)
    for path in (kept, output):
        if path is not None:
            timed.save(path)
    fitted = {name: getattr(timed, name) for name in ("floor_ms", "empty_ms", "rate", "worst")}
    points = [[p.batch, p.tokens, p.nbytes, p.ms] for p in timed.points]
    data = {
        "model": model,
        "device": timed.device,
        "dtype": timed.dtype,
        **fitted,
        "points": points,
        "file": output or kept,
    }
    rows = "\n".join(f"{b:>5} rows {t:>7} tokens {n / 2**20:>9.1f} MiB {ms:>9.2f} ms" for b, t, n, ms in points)
    common.say(data, json, f"{rows}\n{timed}\nwritten: {output or kept}")


def _numbers(name: str, text: str) -> tuple[int, ...]:
    from headwise.errors import PlanError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PlanError(f"{name} is {text!r}; write whole numbers with commas between: 1,4") from None
