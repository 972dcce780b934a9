"""Tokens chosen by content on real shapes: bytes against the formula, what the choice costs in a prefill, and the time of a decode step.

    python benchmarks/selected.py                      # small shapes, CPU
    python benchmarks/selected.py --device cuda        # Llama-2-7B and Mistral-7B shapes, random weights, 32k tokens

Models have a few layers of the named shape: every layer costs the same. The yardstick is the same model with transformers'
DynamicCache in the same run, with every SDPA kernel that serves it. PyTorch's default on Hopper is cuDNN, which builds a plan
for each new length of the keys, on the host: the row `default` comes first and pays for it, `cudnn` runs the same lengths
again with its plans ready. A decode step is taken apart:

- `host_ms`: until the call returns; `wall_ms`: until the device is done; `device_ms`: the sum of the times of its kernels;
- `cache_ms`: `device_ms` less that of the same model behind 64 tokens, which is what reading (and copying) the cache costs;
- `attention_ms`: of those, the attention kernels alone, without the copies that DynamicCache makes of itself at every step;
- `captured`: the step as one CUDA graph (`attach(…, capture=True)`).

Prints one JSON object; a GPU run takes about a minute.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from steps import KERNELS, copy_rate, kernel, kernels, llama, taken_apart
from timing import synchronize

import headwise
from headwise.papers import environment

ATTENTION = re.compile("sdpa|flash|fmha|attention", re.IGNORECASE)
SHAPES = {"llama-2-7b": (32, 32), "mistral-7b": (32, 8)}  # query heads, kv heads; D = 128
SIZE = {"vocab_size": 1000, "hidden_size": 4096, "intermediate_size": 11008}
SMALL = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024}
Row = dict[str, Any]


def plans_of(model: Any, tokens: int) -> dict[str, headwise.HeadPlan]:
    """Two budgets of Task-KV, which shares by head, SnapKV, the same for all, and AdaKV, which shares by content."""
    task = {"beta": 0.25, "closest": False, "context": tokens, "recent": min(256, tokens // 16)}
    found = {}
    for ratio in ("40%", "60%"):
        found[f"task-kv {ratio}"] = headwise.budget.task_kv(model, budget=ratio, **task)
        found[f"snapkv {ratio}"] = headwise.budget.snapkv(model, budget=ratio)
        found[f"adakv {ratio}"] = headwise.budget.adakv(model, budget=ratio)
    return found


def prompt(tokens: int, device: str) -> torch.Tensor:
    """Random token ids, (1, N)."""
    return torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)


def prefilled(model: Any, ids: torch.Tensor, device: str, repeats: int) -> tuple[float, Any]:
    """(median ms of a prefill, the cache of the last one)."""
    times, cache = [], None
    for _ in range(repeats + 1):
        cache = None  # the old one is freed first
        synchronize(device)
        begin = time.perf_counter()
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[1:]), cache


def dense_rows(model: Any, ids: torch.Tensor, device: str, repeats: int) -> Iterator[Row]:
    """The untouched model by every kernel, and what its decode step takes behind 64 tokens."""
    token = ids[:, :1]
    for name in KERNELS if device == "cuda" else ("default",):
        try:
            with kernel(name):
                prefill, cache = prefilled(model, ids, device, repeats)
                short = model(ids[:, :64], use_cache=True, logits_to_keep=1).past_key_values
                row: Row = {"plan": "none", "kernel": name, "prefill_ms": prefill}
                row["bytes"] = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
                row |= taken_apart(lambda c=cache: model(token, past_key_values=c), device, 8 * repeats)
                behind_64 = taken_apart(lambda c=short: model(token, past_key_values=c), device, 4 * repeats)
                row |= {f"behind_64_{key}": value for key, value in behind_64.items()}

                if device == "cuda":
                    times = kernels(lambda c=cache: model(token, past_key_values=c))
                    row["longest_kernels"] = {key[:60]: ms for key, ms in list(times.items())[:4]}
                    row["attention_ms"] = sum(ms for key, ms in times.items() if ATTENTION.search(key))
                yield row
        except RuntimeError as error:  # this kernel does not serve this shape
            yield {"plan": "none", "kernel": name, "refused": str(error).split("\n")[0][:100]}


def plan_row(
    model: Any, name: str, plan: headwise.HeadPlan, ids: torch.Tensor, device: str, repeats: int, capture: bool
) -> Row:
    """One plan; the formula is Σ slots · bytes of a token, and 4 bytes a slot for its position."""
    tokens = ids.shape[1]
    sizes = {"head_dim": headwise.find_stack(model).head_dim, "dtype": model.dtype}
    with headwise.attach(model, plan=plan, capture=capture):
        prefill, cache = prefilled(model, ids, device, 1 if capture else repeats)
        row: Row = {"plan": name, "captured": capture, "prefill_ms": prefill, "bytes": cache.nbytes}
        row["formula_bytes"] = int(plan.bytes(tokens, **sizes).sum()) + 4 * int(plan.slots(tokens).sum())
        return row | taken_apart(lambda: model(ids[:, :1], past_key_values=cache), device, 8 * repeats)


def finish(rows: list[Row], copy: float) -> None:
    """Ratios to the best untouched row of the shape, by wall clock and by what the cache costs the device."""
    dense = [row for row in rows if row["plan"] == "none" and "wall_ms" in row]
    wall, prefill = min(row["wall_ms"] for row in dense), min(row["prefill_ms"] for row in dense)
    on_device = [row for row in dense if "device_ms" in row]
    rest = min((row["behind_64_device_ms"] for row in on_device), default=0.0)
    least = min((row["device_ms"] - rest for row in on_device), default=None)
    for row in (row for row in rows if "wall_ms" in row):
        row["wall_ratio"], row["prefill_ratio"] = wall / row["wall_ms"], prefill / row["prefill_ms"]
        if least is not None:
            row["cache_ms"] = row["device_ms"] - rest
            row["cache_ratio"] = least / row["cache_ms"]
            row["attention_ratio"] = min(r["attention_ms"] for r in on_device) / row["cache_ms"]
            row["of_copy"] = 1e3 * row["bytes"] / copy / row["cache_ms"]


@torch.no_grad()
def main() -> None:
    """Every shape, the untouched model and every planner."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    tokens = given.tokens or (32768 if given.device == "cuda" else 1024)
    ids, copy = prompt(tokens, given.device), copy_rate(given.device)
    out: Row = {"environment": environment(), "tokens": tokens, "layers": given.layers, "copy_tbs": copy / 1e12}
    out["rows"] = []
    for shape, (heads, kv_heads) in SHAPES.items():
        size = SIZE if given.device == "cuda" else SMALL
        model = llama(given.layers, heads, kv_heads, tokens + 512, given.device, **size)
        rows = list(dense_rows(model, ids, given.device, given.repeats))
        for name, plan in plans_of(model, tokens).items():
            for capture in (False, True) if given.device == "cuda" else (False,):
                rows.append(plan_row(model, name, plan, ids, given.device, given.repeats, capture))
        finish(rows, copy)
        out["rows"] += [{"shape": shape, **row} for row in rows]
        del model
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
