"""What a call of `headwise.attention` costs on the host, beside PyTorch's own dense call: microseconds by case.

Shapes are so small that a call is nearly all host time. `host` does not wait for the device (on a CPU: the process's own time, so that
other work does not count); `wall`, on CUDA, waits after every call.

    python benchmarks/host_time.py [--device cuda] [--tokens 16] [--calls 300] [--cases dense,routed] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch.nn import functional as F

from headwise.attention import KVGroup, attention
from headwise.bench import measure
from headwise.plan import Full, SinkWindow

Run = Callable[[], Any]
SPAN = SinkWindow(2, 4)


def cases(
    device: str, dtype: torch.dtype, N: int, *, heads: int = 8, kv_heads: int = 4, D: int = 64
) -> Iterator[tuple[str, Run]]:
    """(name, call), the dense calls among them; on CUDA the own kernels too, where `auto` may not take them."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=dtype)
    q, k, v = draw(1, heads, N, D), draw(1, kv_heads, N, D), draw(1, kv_heads, N, D)
    active, gate = draw(1, heads, N) > 0, draw(1, heads, N)
    lists = torch.zeros(1, kv_heads, -(-N // 16), 1, dtype=torch.int32, device=device)
    mixed = [Full() if h % 2 else SPAN for h in range(kv_heads)]
    neighbours = [Full() if 2 * h < kv_heads else SPAN for h in range(kv_heads)]
    one = draw(1, heads, 1, D)
    groups = [
        KVGroup(tuple(range(first, kv_heads, 2)), draw(1, kv_heads // 2, S, D), draw(1, kv_heads // 2, S, D), complete=True,
                positions=torch.arange(64 - S, 64, device=device)[None, None])
        for first, S in ((0, 64), (1, 8))
    ]  # fmt: skip
    calls: dict[str, tuple[Run, bool]] = {
        "sdpa": (lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), True),
        "fastest sdpa": (lambda: measure.dense(q, k, v, "cudnn" if device == "cuda" else None), True),
        "dense": (lambda: attention(q, k, v), True),
        "routed": (lambda: attention(q, k, v, active=active), True),
        "routed, gates": (lambda: attention(q, k, v, active=active, gate=gate), True),
        "spans": (lambda: attention(q, k, v, patterns=mixed), True),
        "spans, neighbours": (lambda: attention(q, k, v, patterns=neighbours), True),
        "blocks": (lambda: attention(q, k, v, selected=lists, key_block=16, query_block=16), True),
        "sdpa, one query": (lambda: F.scaled_dot_product_attention(one, k, v, enable_gqa=True), False),
        "ragged decode": (lambda: attention(one, groups=groups, offset=63), False),
    }
    if device == "cuda":
        own: dict[str, dict[str, Any]] = {
            "routed": {"active": active},
            "routed, gates": {"active": active, "gate": gate},
            "spans": {"patterns": mixed},
        }
        calls |= {
            f"{name}: own kernel": (lambda o=options: attention(q, k, v, backend="triton", **o), True)
            for name, options in own.items()
        }
        calls["ragged decode: own kernel"] = (lambda: attention(one, groups=groups, offset=63, backend="triton"), False)
    for name, (run, backward) in calls.items():
        yield name, run
        if backward:
            yield f"{name} (gradients)", _with_gradients(run, (q, k, v))


def _with_gradients(run: Run, leaves: tuple[torch.Tensor, ...]) -> Run:
    """Forward that records and its backward."""

    def step() -> None:
        for leaf in leaves:
            leaf.requires_grad_()
        out = run()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        for leaf in leaves:
            leaf.requires_grad_(False)

    return step


def microseconds(run: Run, device: str, calls: int, *, wait: bool, rounds: int = 7) -> float:
    """Median over rounds of the mean time of a call; `wait` for the device after every call, else only between rounds."""
    clock = process_time if device == "cpu" else perf_counter
    times = []
    for turn in range(rounds + 1):
        count = calls if turn else max(3, calls // 10)
        if device == "cuda":
            torch.cuda.synchronize()
        begin = clock()
        for _ in range(count):
            run()
            if wait:
                torch.cuda.synchronize()
        times.append(1e6 * (clock() - begin) / count)
    return statistics.median(times[1:])


def main() -> None:
    """Print a table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--cases", help="comma-separated beginnings of names; all by default")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rows = []
    for name, run in cases(args.device, dtype, args.tokens):
        if args.cases and not name.startswith(tuple(args.cases.split(","))):
            continue
        row: dict[str, Any] = {"case": name, "host_us": microseconds(run, args.device, args.calls, wait=False)}
        if args.device == "cuda":
            row["wall_us"] = microseconds(run, args.device, args.calls, wait=True)
        rows.append(row)
        print(
            f"{name:45s}" + "  ".join(f"{key} {value:7.1f}" for key, value in row.items() if key != "case"), flush=True
        )
    if args.json:
        text = json.dumps(
            {"environment": measure.environment(args.device), "tokens": args.tokens, "rows": rows}, indent=1
        )
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
