"""Does a plan made for a target latency meet it? Measures decode steps, makes plans for targets between, and measures those.

    python benchmarks/latency.py --device cuda        # Llama-3-8B shape, 8 layers, 4 rows behind 32768 tokens; a GPU
    python benchmarks/latency.py                      # a small shape, 2 rows behind 4096 tokens, on a CPU
    python benchmarks/latency.py --smollm2            # the packaged model, 4 rows behind 6000 tokens, on a CPU

The step time is fitted on caches in which half of the kv heads are whole (`headwise.budget.step_time`); the plans then are
DuoAttention's, from random scores, with as many whole heads as the target allows. Prints a JSON object a way of
running steps, the second with both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from typing import Any

import torch
from steps import llama, taken_apart

import headwise
from headwise.papers import environment

LARGE = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128}
SMALL = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


@torch.no_grad()
def step_ms(model: Any, plan: headwise.HeadPlan, batch: int, tokens: int, device: str, capture: bool) -> float:
    """Median wall clock of a step."""
    shape = (batch, plan.kv_heads, tokens, model.config.head_dim)
    k, v = (torch.randn(shape, device=device, dtype=model.dtype) for _ in range(2))
    ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
    with headwise.attach(model, plan=plan, capture=capture):
        cache = headwise.HeadwiseCache(plan).fill(k, v)
        return taken_apart(lambda: model(ids, past_key_values=cache), device, 15)["wall_ms"]


def main() -> None:
    """Calibrate, plan for four targets, measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--smollm2", action="store_true")
    given = parser.parse_args()
    gpu = given.device == "cuda"
    batch, tokens = (4, 32768) if gpu else (2, 4096)
    measured = (
        {"batches": (1, 4, 8), "lengths": (1024, 16384, 65536)}
        if gpu
        else {"batches": (1, 4), "lengths": (256, 2048, 8192)}
    )
    model: Any = llama(
        given.layers, 32 if gpu else 8, 8 if gpu else 4, 1 << 17, given.device, **(LARGE if gpu else SMALL)
    )
    if given.smollm2:
        model, (batch, tokens) = headwise.load_model("smollm2")[0], (4, 6000)
        measured = {"batches": (1, 4), "lengths": (256, 2048, 6000)}
    out: dict[str, Any] = {
        "environment": environment(),
        "layers": model.config.num_hidden_layers,
        "batch": batch,
        "tokens": tokens,
    }
    for name, capture in (("captured", True), ("eager", False)) if gpu else (("eager", False),):
        out[name] = met(model, batch, tokens, given.device, capture, measured)
        print(json.dumps(out), flush=True)  # the last line has all


def met(model: Any, batch: int, tokens: int, device: str, capture: bool, measured: dict[str, Any]) -> dict[str, Any]:
    """The fit, and targets between an empty and a whole cache against what a plan made for them takes."""
    begin = time.perf_counter()
    timed = headwise.budget.step_time(model, capture=capture, repeats=12, **measured)
    seconds = time.perf_counter() - begin
    heads, dim = (model.config.num_hidden_layers, model.config.num_key_value_heads), model.config.head_dim
    drawn = torch.rand(heads, generator=torch.Generator().manual_seed(0))
    scores = headwise.HeadScores(values=drawn, kind="kv", method="random")
    full = headwise.HeadPlan.full(*heads)
    whole = timed.of_plan(full, length=tokens, batch=batch)
    least = max(timed.floor_ms, timed.empty(batch))
    rows = []
    for share in (0.2, 0.4, 0.6, 0.8):
        target = least + share * (whole - least)
        budget = timed.within(target, context=tokens, batch=batch)
        sizes = {"context": tokens, "batch": batch, "head_dim": dim, "dtype_bytes": model.dtype.itemsize}
        plan = headwise.budget.duo(scores, budget=budget, **sizes)
        ms = statistics.median(step_ms(model, plan, batch, tokens, device, capture) for _ in range(3))
        row = {"target_ms": target, "predicted_ms": timed.of_plan(plan, length=tokens, batch=batch), "measured_ms": ms}
        rows.append({**row, "full_heads": len(plan.full_heads()), "of": len(scores), "over_target": ms / target - 1})
    fitted = {name: getattr(timed, name) for name in ("floor_ms", "empty_ms", "rate", "worst")}
    points = [asdict(point) for point in timed.points]
    whole_ms = step_ms(model, full, batch, tokens, device, capture)
    ends = {"empty_predicted_ms": least, "whole_predicted_ms": whole, "whole_measured_ms": whole_ms}
    return {"calibration_seconds": seconds, **fitted, "points": points, **ends, "rows": rows}


if __name__ == "__main__":
    main()
