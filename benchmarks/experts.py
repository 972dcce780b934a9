"""Dispatch back-ends, the equal-FLOP dense layer, and what routing costs beside a transformer layer.

    OMP_NUM_THREADS=1 python benchmarks/experts.py                   # CPU, two minutes on a quiet core
    python benchmarks/experts.py --device cuda --dtype bfloat16      # GPU

For each shape: seconds of forward and backward by back-end, and the dense feed-forward layer whose matmuls have as many
FLOPs (k times the hidden width of an expert). The correctness gate (all back-ends equal the loop) runs first. Times are
medians over rounds in which all sides ran in turn; on one CPU thread they are its own seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from timing import graphed, rounds

from headwise.papers import environment
from headwise.route import Experts, Router, SoftmaxTopK
from headwise.route._experts import BACKENDS, grouped_mm_works, pick

CPU = ((4096, 8, 2, 64, 128), (4096, 8, 2, 256, 512), (4096, 64, 8, 128, 32), (8, 8, 2, 256, 512), (4096, 8, 1, 64, 16))
CUDA = ((16384, 8, 2, 2048, 4096), (16384, 16, 2, 2048, 2048), (16384, 64, 8, 2048, 1024), (32, 64, 8, 2048, 1024))


def step(run: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], None]:
    """Forward and backward, gradients thrown away."""

    def both() -> None:
        run().sum().backward()
        for leaf in leaves:
            leaf.grad = None

    return both


def compare(T: int, E: int, k: int, C: int, size: int, device: str, dtype: torch.dtype, count: int) -> dict[str, Any]:
    """One shape: milliseconds by back-end and of the dense layer, and the ratios that matter."""
    seeded = torch.Generator().manual_seed(0)
    experts = Experts(experts=E, width=C, hidden=size, generator=seeded).to(device, dtype)
    dense = Experts(experts=1, width=C, hidden=k * size, generator=seeded).to(device, dtype)
    x = torch.randn(T, C, generator=seeded).to(device, dtype).requires_grad_()
    weight, index = (t.to(device) for t in torch.randn(T, E, generator=seeded).softmax(-1).topk(k))
    weight = weight.to(dtype)
    names = [name for name in BACKENDS if name != "grouped_mm" or grouped_mm_works(experts, x)]
    with (
        torch.no_grad()
    ):  # a graph that is kept alive would tie the gradients to this stream, and no capture could follow
        reference = experts(x, index, weight, None, "loop")
        for name in names:  # the gate
            torch.testing.assert_close(experts(x, index, weight, None, name), reference, rtol=2e-2, atol=2e-2)
    leaves = [x, experts.gate_up_proj, experts.down_proj, dense.gate_up_proj, dense.down_proj]
    sides = {name: step(lambda name=name: experts(x, index, weight, None, name), leaves) for name in names}
    sides["one dense layer"] = step(lambda: dense.one(0, x), leaves)
    seconds = rounds(sides, device, count)
    extra = {}
    if device == "cuda":
        in_graph = {name: graphed(sides[name]) for name in ("grouped_mm", "one dense layer") if name in sides}
        graphs = rounds(in_graph, device, count)
        extra = {"in a CUDA graph, ms": {name: round(1e3 * s, 3) for name, s in graphs.items()}}
        extra["in a CUDA graph, dense layer over grouped_mm"] = round(
            graphs["one dense layer"] / graphs["grouped_mm"], 3
        )
    best = min((s, n) for n, s in seconds.items() if n in names)
    chosen = pick(experts, x, index)
    return {
        "tokens, experts, k, width, hidden": [T, E, k, C, size],
        "ms": {name: round(1e3 * s, 3) for name, s in seconds.items()},
        "auto": chosen,
        "auto over best": round(seconds[chosen] / best[0], 2),
        "loop over auto": round(seconds["loop"] / seconds[chosen], 2),
        "every expert on every token over auto": round(seconds["dense"] / seconds[chosen], 2),
        "dense layer over auto": round(seconds["one dense layer"] / seconds[chosen], 3),
        **extra,
    }


def overhead(device: str, dtype: torch.dtype, tokens: int, count: int) -> dict[str, float]:
    """Router and losses against a whole transformer layer of width 768, forward and backward."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=64, hidden_size=768, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=12
    )
    model = LlamaModel(config).to(device, dtype)
    router = Router(SoftmaxTopK(k=2), width=768, experts=8).to(device).train()
    ids = torch.randint(64, (max(1, tokens // 512), 512), device=device)
    x = torch.randn(*ids.shape, 768, device=device, dtype=dtype, requires_grad=True)

    def route() -> torch.Tensor:
        routing = router(x)
        return routing.loss({"balance": 0.01, "z": 0.001}) + routing.weight.sum()

    layer = step(lambda: model(ids).last_hidden_state, list(model.parameters()))
    sides = {"layer": layer, "routing": step(route, [x, *router.parameters()])}
    found = _share(rounds(sides, device, count))
    if device == "cuda":
        in_graph = _share(rounds({name: graphed(run) for name, run in sides.items()}, device, count))
        found |= {f"{name} in a CUDA graph": value for name, value in in_graph.items()}
    return found


def _share(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(1e3 * s, 3) for name, s in seconds.items()} | {
        "share": round(seconds["routing"] / seconds["layer"], 4)
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    shapes = CUDA if given.device == "cuda" else CPU
    result = {
        "environment": environment() | {"threads": torch.get_num_threads(), "dtype": given.dtype},
        "dispatch": [compare(*shape, given.device, dtype, given.rounds) for shape in shapes],
        "routing beside a layer, ms": overhead(
            given.device, dtype, 16384 if given.device == "cuda" else 1024, given.rounds
        ),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
