"""LongHeads' attention against dense SDPA in the same process: prefill and one decode step, by length.

    python benchmarks/longheads.py                                  # 9 heads of 64, 3 kv heads, 8 chunks of 128; one thread, CPU time
    python benchmarks/longheads.py --device cuda                    # Llama-2-7B's 32 heads of 128, 16 chunks of 256, bfloat16

The dense prefill is the fastest SDPA kernel that serves it; the dense step reads all keys, and once 4096 of them, which is what the bar
of a step is counted from. Chunk keys are part of the prefill. Prints a JSON object a length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from steps import KERNELS, kernel
from timing import synchronize
from torch.nn import functional as F

from headwise.budget._longheads import Shape, attend, select
from headwise.budget._longheads_rotary import Rotation
from headwise.budget._longheads_state import Chunks
from headwise.papers import environment

TRAINED = 4096  # tokens of the dense step that a LongHeads step is compared with


@dataclass(frozen=True)
class Case:
    """A shape of attention on a device."""

    heads: int
    kv_heads: int
    dim: int
    chunk: int
    chunks: int
    device: str
    dtype: torch.dtype
    tile: int = 4096

    @classmethod
    def of(cls, device: str) -> Case:
        """The published shape on a GPU, smollm2's elsewhere."""
        if device == "cuda":
            return cls(32, 32, 128, 256, 16, device, torch.bfloat16, 1024)
        return cls(9, 3, 64, 128, 8, device, torch.float32)


def milliseconds(run: Callable[[], object], times: int, device: str) -> float:
    """Median wall clock on a GPU, least CPU time elsewhere."""
    clock, spent = time.perf_counter if device == "cuda" else time.process_time, []
    for _ in range(times + 1):
        synchronize(device)
        begin = clock()
        run()
        synchronize(device)
        spent.append(1e3 * (clock() - begin))
    return statistics.median(spent[1:]) if device == "cuda" else min(spent[1:])


@torch.no_grad()
def measure(case: Case, tokens: int) -> dict[str, float | int | str]:
    """Milliseconds of prefill and of a decode step, dense and LongHeads."""
    made = {"generator": torch.Generator(case.device).manual_seed(0), "device": case.device, "dtype": case.dtype}
    q = torch.randn(1, case.heads, tokens, case.dim, **made)  # type: ignore[call-overload]
    k, v = (torch.randn(1, case.kv_heads, tokens, case.dim, **made) for _ in range(2))  # type: ignore[call-overload]
    frequencies = 1e5 ** -(torch.arange(0, case.dim, 2, device=case.device) / case.dim)
    shape = Shape(case.chunk, case.chunks, case.dim**-0.5, Rotation(frequencies))
    positions, zero = (
        torch.arange(tokens, device=case.device)[None],
        torch.zeros(1, dtype=torch.long, device=case.device),
    )

    def far(keys: torch.Tensor, begin: int, end: int) -> None:
        part, at = q[:, :, begin:end], positions[:, begin:end]
        chosen = select(part, keys, at, zero, shape, by_head=False)
        attend(part, k[:, :, :end], v[:, :, :end], chosen, at, None, shape)

    def state() -> Chunks:
        empty = Chunks.empty(q, k, None)
        return empty.extended(q, k, v, w=case.chunk, scale=shape.scale, rotation=shape.rotation, shift=zero)

    def prefill() -> None:
        keys = state().keys
        for begin in range(0, tokens, case.tile):
            far(keys, begin, min(begin + case.tile, tokens))

    grouped = case.heads != case.kv_heads

    def dense(n: int, *, step: bool) -> float:
        query = q[:, :, n - 1 : n] if step else q[:, :, :n]
        found = []
        for name in KERNELS if case.device == "cuda" else ("default",):
            run = lambda: F.scaled_dot_product_attention(
                query, k[:, :, :n], v[:, :, :n], is_causal=not step, enable_gqa=grouped
            )
            try:
                with kernel(name):
                    found.append(milliseconds(run, 20 if step else 2, case.device))
            except RuntimeError:  # a kernel that does not serve the shape
                continue
        return min(found)

    keys = state().keys
    row: dict[str, float | int | str] = {"tokens": tokens, "dense_ms": dense(tokens, step=False)}
    row["longheads_ms"] = milliseconds(prefill, 2, case.device)
    row["dense_step_ms"] = dense(tokens, step=True)
    row["dense_trained_step_ms"] = dense(min(TRAINED, tokens), step=True)
    row["longheads_step_ms"] = milliseconds(lambda: far(keys, tokens - 1, tokens), 20, case.device)
    row["prefill_ratio"] = row["longheads_ms"] / row["dense_ms"]  # type: ignore[operator]
    row["step_over_trained"] = row["longheads_step_ms"] / row["dense_trained_step_ms"]  # type: ignore[operator]
    return row


def main() -> None:
    """Every length."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(1)
    case = Case.of(given.device)
    print(json.dumps({"environment": environment(), "case": {**vars(case), "dtype": str(case.dtype)}}), flush=True)
    lengths = given.lengths or ([32768, 65536, 131072] if given.device == "cuda" else [4096, 8192, 16384])
    for tokens in lengths:
        try:
            row = measure(case, tokens)
        except torch.OutOfMemoryError as error:
            row = {"tokens": tokens, "refused": str(error).split("\n")[0][:100]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
