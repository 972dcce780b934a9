"""`headwise circuit`: find the circuit of a task and draw it."""

import contextlib
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from headwise.cli import common


def circuit(
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the page (HTML) here.")],
    model: common.Model = "smollm2",
    task: Annotated[
        Literal["induction", "ioi", "colored-objects"],
        typer.Option("--task", help="Which prompts; induction fits any model."),
    ] = "ioi",
    count: Annotated[int, typer.Option("--count", min=1, help="Pairs of prompts.")] = 12,
    through: Annotated[
        str, typer.Option("--through", help="Stages behind the first: q, k or v of the last stage's heads: 'q', 'q,v'.")
    ] = "q",
    share: Annotated[float, typer.Option("--share", help="Share of all heads that a stage keeps.")] = 0.02,
    freeze_mlps: Annotated[
        bool, typer.Option("--freeze-mlps/--live-mlps", help="Direct paths lead through the residual stream alone.")
    ] = False,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of a folded batch at most: bounds the memory.")] = 64,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="Also write the circuit's scores (safetensors) here.")
    ] = None,
    seed: common.Seed = 0,
    dtype: common.Dtype = None,
    device: common.Device = None,
    progress: common.Progress = None,
    json: common.Json = False,
) -> None:
    """Find the circuit of a task and draw it: attribution, patching, paths between heads, and whether scores are causal.

    Example: headwise circuit --task ioi -o circuit.html
    """
    from headwise.report.circuit_page import circuit_page, measure, told

    loaded, tokenizer = common.load(model, dtype, device)
    shown, start = common.show_progress(progress, json), time.perf_counter()
    story = measure(
        loaded, tokenizer, task=task, count=count, through=through, share=share, freeze_mlps=freeze_mlps, rows=rows,
        seed=seed, stage=told if shown else lambda title: contextlib.nullcontext(),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    again = f"headwise circuit --model {model} --task {task} --count {count} --through {through} --share {share:g}"
    again += f"{' --freeze-mlps' if freeze_mlps else ''} --seed {seed} -o {output.name}"
    text = circuit_page(story, model=model, command=again, seconds=seconds)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    if scores is not None:
        story.circuit.scores().save(scores)
    data = {"model": model, "task": task, "file": output, "seconds": seconds, **story.to_dict()}
    lines = [f"{stage.through:<8}{stage.kept}" for stage in story.circuit.stages]
    common.say(data, json, "\n".join([*lines, *(f"  {edge}" for edge in story.edges[:8]), f"written: {output}"]))
