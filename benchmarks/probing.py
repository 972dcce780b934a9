"""What finding heads costs on the shape of Llama-3-8B with random weights: RazorAttention's probe, and watching a decode step.

    python benchmarks/probing.py --device cuda                            # 32 layers; the probe reads 2500 random tokens four times
    python benchmarks/probing.py --layers 2 --small --period 100 --tokens 512      # a CPU

Bars: the probe below 60 s with memory of O(tokens · block); a decode step behind 32768 tokens at most 10 % longer while every head's
largest key is recorded (what the retrieval score needs). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from steps import kernel, llama, synchronize, taken_apart
from transformers import DynamicCache

import headwise
from headwise.attach.observe import observe
from headwise.papers import environment

LARGE = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128}
SMALL = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "head_dim": 32}


def probe(model: Any, period: int, device: str) -> dict[str, float]:
    """Seconds of one probe, the second of two, and what it allocates beside the model."""
    for _ in range(2):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        synchronize(device)
        begin = time.perf_counter()
        headwise.score.induction_and_echo(model, None, length=period, repeats=4)
        synchronize(device)
        seconds = time.perf_counter() - begin
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30 if device == "cuda" else None
    matrix = model.config.num_attention_heads * (4 * period) ** 2 * 4 / 2**30
    return {"tokens": 4 * period, "seconds": seconds, "extra_gib": extra, "one_layers_maps_gib": matrix}


@torch.no_grad()
def watched(model: Any, tokens: int, device: str) -> dict[str, float]:
    """A decode step behind `tokens` random keys, bare and while the largest key of every head is recorded."""
    config, found = model.config, {}
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    for name in ("bare", "watched"):
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.randn(shape, device=device, dtype=model.dtype) for _ in range(2)), layer)
        step = lambda: model(ids, past_key_values=cache)  # noqa: B023 - called before the next one is made
        with kernel("flash" if device == "cuda" else "default"):
            if name == "bare":
                times = taken_apart(step, device, 12)
            else:
                with observe(model, "argmax", rows="last"):
                    times = taken_apart(step, device, 12)
        found |= {f"{name}_{key}": value for key, value in times.items()}
    return {"tokens": tokens, **found, "wall_ratio": found["watched_wall_ms"] / found["bare_wall_ms"]}


def main() -> None:
    """Both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--period", type=int, default=2500)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    size = SMALL if given.small else LARGE
    model = llama(given.layers, 32, 8, 1 << 17, given.device, **size)
    out: dict[str, Any] = {"environment": environment(), "layers": given.layers}
    out["probe"] = probe(model, given.period, given.device)
    out["decode"] = watched(model, given.tokens, given.device)
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
