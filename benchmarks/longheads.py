"""LongHeads' attention against dense SDPA in the same process: prefill and one decode step, by length. One thread, CPU seconds.

python benchmarks/longheads.py [tokens …]
"""

import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from headwise.budget._longheads import Shape, attend, select
from headwise.budget._longheads_rotary import Rotation
from headwise.budget._longheads_state import Chunks

HEADS, KV_HEADS, DIM, CHUNK, CHUNKS, TILE = 9, 3, 64, 128, 8, 4096


def best(run: Callable[[], object], times: int) -> float:
    """Least CPU seconds of several runs."""
    seconds = []
    for _ in range(times):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


@torch.no_grad()
def measure(tokens: int) -> str:
    """One row: prefill seconds and decode milliseconds, dense and LongHeads."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, HEADS, tokens, DIM, generator=generator)
    k, v = (torch.randn(1, KV_HEADS, tokens, DIM, generator=generator) for _ in range(2))
    shape = Shape(CHUNK, CHUNKS, DIM**-0.5, Rotation(1e5 ** -(torch.arange(0, DIM, 2) / DIM)))
    positions, zero = torch.arange(tokens)[None], torch.zeros(1, dtype=torch.long)

    def state() -> Chunks:
        empty = Chunks.empty(q, k, None)
        return empty.extended(q, k, v, w=CHUNK, scale=shape.scale, rotation=shape.rotation, shift=zero)

    def far(keys: torch.Tensor, begin: int, end: int) -> None:
        part, at = q[:, :, begin:end], positions[:, begin:end]
        chosen = select(part, keys, at, zero, shape, by_head=False)
        attend(part, k[:, :, :end], v[:, :, :end], chosen, at, None, shape)

    def prefill() -> None:
        keys = state().keys
        for begin in range(0, tokens, TILE):
            far(keys, begin, min(begin + TILE, tokens))

    keys, last = state().keys, q[:, :, -1:]
    dense = best(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 2)
    step = best(lambda: F.scaled_dot_product_attention(last, k, v, enable_gqa=True), 20)
    mine, mine_step = best(prefill, 2), best(lambda: far(keys, tokens - 1, tokens), 20)
    return f"{tokens:>7} {dense:>9.2f} {mine:>9.2f} {mine / dense:>6.2f} {1e3 * step:>9.2f} {1e3 * mine_step:>9.2f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{'tokens':>7} {'dense s':>9} {'far s':>9} {'ratio':>6} {'dense ms':>9} {'far ms':>9}")
    for tokens in map(int, sys.argv[1:] or ("4096", "8192", "16384")):
        print(measure(tokens), flush=True)
