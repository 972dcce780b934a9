"""Decode throughput at equal memory: how many rows fit into a number of bytes of KV cache, and how many tokens a second they give.

    python benchmarks/throughput.py --device cuda                     # Llama-3-8B shape, 8 layers, 12 GiB of cache; a GPU
    python benchmarks/throughput.py --lengths 256 --gib 0.005 --layers 2 --small    # a CPU

MoA's setting (arXiv 2406.14909): a prompt of N tokens, room for 1024 more, half of the kv heads with a span of an eighth of
the text and half with seven eighths, so half of the cache. Weights and caches are random and the prompt is not read: caches are
filled as if it had been, so times are those of the shape. Compared, each at the largest batch that fits:

- `hf`: transformers' DynamicCache with every SDPA kernel that serves it. The copy of a layer's cache that every step of
  DynamicCache makes beside the old one is not counted against its room, which favours it. PyTorch's default on Hopper is cuDNN,
  which builds a plan for every new length of the keys on the host (40 to 60 ms): `default` comes first and pays for them,
  `cudnn` runs the same lengths again with its plans ready, and is what ratios are taken against if it is the fastest;
- `own full`: a HeadwiseCache whose heads all keep everything;
- `moa`: the plan. Also at the batch of the full cache, and `hf` at the plan's batch, which takes twice the memory.
  On a GPU both are also run with `attach(…, capture=True)`, where the host launches a step as one CUDA graph.

Prints a JSON object a length, each with all rows so far; `tokens_per_s` is rows over the wall clock of a step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from steps import KERNELS, copy_rate, kernel, llama, taken_apart
from transformers import DynamicCache

import headwise
from headwise.budget import moa_spans
from headwise.papers import environment

SIZE = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128}
SMALL = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "head_dim": 32}
HEADS, KV_HEADS, ROOM = 32, 8, 1024
Row = dict[str, Any]


def moa_plan(layers: int, tokens: int) -> headwise.HeadPlan:
    """Two rules in every layer, an eighth and seven eighths of the text, as MoA's engine deploys them for so many tokens."""
    row = tuple(headwise.Elastic(64, 0, 0.125 if head % 2 else 0.875) for head in range(KV_HEADS))
    return moa_spans(headwise.HeadPlan(patterns=(row,) * layers), tokens)


class Bench:
    """One model and one amount of memory."""

    def __init__(self, model: Any, gib: float, device: str, repeats: int):
        self.model, self.room, self.device, self.repeats = model, int(gib * 2**30), device, repeats
        self.layers = model.config.num_hidden_layers
        self.token = 2 * model.config.head_dim * model.dtype.itemsize  # bytes of one token in one kv head

    def rows(self, slots: int) -> int:
        """The largest batch whose rows of so many slots fit."""
        return max(1, self.room // (slots * self.token))

    def random(self, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, K, T, D)."""
        shape = (batch, KV_HEADS, tokens, self.model.config.head_dim)
        return tuple(torch.randn(shape, device=self.device, dtype=self.model.dtype) for _ in range(2))  # type: ignore[return-value]

    def step(self, cache: Any, batch: int) -> Row:
        """One token for every row."""
        ids = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        found = taken_apart(lambda: self.model(ids, past_key_values=cache), self.device, self.repeats)
        return {"batch": batch, **found, "tokens_per_s": 1e3 * batch / found["wall_ms"]}

    def untouched(self, batch: int, tokens: int, name: str) -> Row:
        """DynamicCache and one kernel of SDPA."""
        cache = DynamicCache(config=self.model.config)
        k, v = self.random(batch, tokens)
        for layer in range(self.layers):
            cache.update(k.clone(), v.clone(), layer)
        del k, v
        with kernel(name):
            found = self.step(cache, batch)
        held = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        return {"cache": "hf", "kernel": name, "cache_gib": held / 2**30, **found}

    def planned(self, plan: headwise.HeadPlan, batch: int, tokens: int, name: str, capture: bool) -> Row:
        """A HeadwiseCache of this plan."""
        with headwise.attach(self.model, plan=plan, capture=capture):
            cache = headwise.HeadwiseCache(plan).fill(*self.random(batch, tokens))
            found = self.step(cache, batch)
        return {"cache": name, "captured": capture, "cache_gib": cache.nbytes / 2**30, **found}


def attempt(measure: Callable[[], Row], **labels: Any) -> Row:
    """A row, or why there is none: out of memory, or a kernel that does not serve the shape."""
    try:
        return {**labels, **measure()}
    except RuntimeError as error:
        return {**labels, "refused": str(error).split("\n")[0][:120]}


@torch.no_grad()
def at_length(bench: Bench, tokens: int) -> list[Row]:
    """All rows of one prompt length."""
    total = tokens + ROOM
    plan, full = moa_plan(bench.layers, total), headwise.HeadPlan.full(bench.layers, KV_HEADS)
    many, few = bench.rows(int(plan.slots(total).sum())), bench.rows(int(full.slots(total).sum()))
    names = list(KERNELS) if bench.device == "cuda" else ["default"]
    rows = [attempt(lambda n=n: bench.untouched(few, tokens, n), at="largest batch") for n in names]  # type: ignore[misc]
    for capture in (False, True) if bench.device == "cuda" else (False,):
        for what, chosen, batch, at in (
            ("own full", full, few, "largest batch"),
            ("moa", plan, many, "largest batch"),
            ("moa", plan, few, "equal batch"),
        ):
            run = lambda w=what, p=chosen, b=batch, c=capture: bench.planned(p, b, tokens, w, c)  # type: ignore[misc]
            rows.append(attempt(run, at=at))
    best = max((r for r in rows if r.get("cache") == "hf"), key=lambda r: r["tokens_per_s"])
    steady = "flash" if bench.device == "cuda" else "default"  # no plans to build at a batch that did not run before
    rows += [attempt(lambda: bench.untouched(many, tokens, steady), at="the plan's batch, more memory")]
    own = max((r["tokens_per_s"] for r in rows if r.get("cache") == "own full"), default=None)
    for row in (r for r in rows if "tokens_per_s" in r):
        row["over_hf"] = row["tokens_per_s"] / best["tokens_per_s"]
        row["over_own_full"] = own and row["tokens_per_s"] / own
    return [{"prompt": tokens, "share": plan.ratio(total), **row} for row in rows]


def main() -> None:
    """Every length."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--gib", type=float, default=12.0)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--small", action="store_true", help="a small model instead of Llama-3-8B's shape")
    given = parser.parse_args()
    longest = max(given.lengths) + ROOM
    model = llama(given.layers, HEADS, KV_HEADS, longest, given.device, **(SMALL if given.small else SIZE))
    bench = Bench(model, given.gib, given.device, given.repeats)
    out: Row = {"environment": environment(), "layers": given.layers, "gib": given.gib}
    out["copy_tbs"] = copy_rate(given.device) / 1e12
    out["rows"] = []
    for tokens in given.lengths:
        out["rows"] += at_length(bench, tokens)
        print(json.dumps(out), flush=True)  # the last line has all; a run that is cut off leaves the lengths before


if __name__ == "__main__":
    main()
