"""A whole model, random weights: prefill and decode, transformers' own caches against a plan of half (or a quarter) full heads.

    python benchmarks/end_to_end.py                                   # decode, memory: Llama-3-8B and Llama-2-7B shapes; a GPU
    python benchmarks/end_to_end.py --prefill 32768 --chunk 0 8192    # prefill, at once and in chunks
    python benchmarks/end_to_end.py --device cpu --layers 2 --lengths 512 --batches 1 --shapes gqa

Decode starts from a cache of random keys, so a row costs no prompt. Sides: `transformers` is DynamicCache with the
faster of torch's default order (cuDNN first, which plans anew for every length) and flash first; `static graph` is StaticCache in a CUDA
graph; `full` and `plan` are headwise caches, eager and captured. So `full graph` / `plan graph` is what the plan itself saves.
Weights are random: the times are those of the shape, the texts mean nothing. Roof: bytes of weights and kept keys over the copy rate.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import headwise
from headwise.attention.sdpa import preferred_kernels
from headwise.papers import environment

SHAPES = {
    "gqa": {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},  # Llama-3-8B
    "mha": {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32},  # Llama-2-7B
}
WHOLE = {"gqa": 2, "mha": 4}  # one kv head in so many keeps all: the published 50 % and 25 %
WINDOW = headwise.SinkWindow(64, 256)
WARM, STEPS = 6, 24


def build(shape: str, layers: int, device: str) -> LlamaForCausalLM:
    """The shape with random weights, bf16 on a GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=4096, num_attention_heads=32, head_dim=128, max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, **SHAPES[shape],
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def plan_of(shape: str, layers: int, *, full: bool = False) -> headwise.HeadPlan:
    """Every second or fourth kv head keeps all, in every layer."""
    K = SHAPES[shape]["num_key_value_heads"]
    row = tuple(headwise.Full() if full or h % WHOLE[shape] == 0 else WINDOW for h in range(K))
    return headwise.HeadPlan(patterns=(row,) * layers)


def now(device: str) -> float:
    """Seconds, after all work on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device: str) -> float:
    """GiB that were allocated at most since the last call."""
    if device != "cuda":
        return 0.0
    found = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return found


def copy_rate() -> float:
    """Bytes a second of a copy on the device, read and write counted."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    for _ in range(3):
        y.copy_(x)
    begin = now("cuda")
    for _ in range(20):
        y.copy_(x)
    return 20 * 2 * x.numel() / (now("cuda") - begin)


def held(cache: object) -> int:
    """Bytes of a cache's tensors."""
    if isinstance(cache, headwise.HeadwiseCache):
        return cache.nbytes
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))  # type: ignore[attr-defined]


def keys(model: LlamaForCausalLM, batch: int, length: int) -> torch.Tensor:
    """Random keys of one layer, (B, K, T, D)."""
    c = model.config
    like = next(model.parameters())
    return torch.randn(batch, c.num_key_value_heads, length, c.head_dim, device=like.device, dtype=like.dtype)


@torch.no_grad()
def steps(model: LlamaForCausalLM, cache: object, batch: int, device: str, **given: Callable) -> float:
    """Milliseconds of a decode step: warm, then the median of blocks of four."""
    token, seconds = torch.zeros(batch, 1, dtype=torch.long, device=device), []
    for index in range(WARM + STEPS):
        if index >= WARM and (index - WARM) % 4 == 0:
            seconds.append(now(device))
        token = model(token, past_key_values=cache, **given).logits.argmax(-1)
    seconds.append(now(device))
    blocks = sorted(b - a for a, b in zip(seconds, seconds[1:], strict=False))
    return 1e3 * blocks[len(blocks) // 2] / 4


def transformers_side(model, batch, length, device) -> dict:
    """DynamicCache, by the faster choice of kernels."""
    k, cache = keys(model, batch, length), DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        cache.update(k, k, layer)
        cache.layers[layer].keys, cache.layers[layer].values = k.clone(), k.clone()
    del k
    peak(device)
    by = {"default": steps(model, cache, batch, device)}
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        by["flash first"] = steps(model, cache, batch, device)
    kernels = min(by, key=by.__getitem__)
    return {
        "decode_ms": by[kernels],
        "kernels": kernels,
        "by_kernels": by,
        "cache_gib": held(cache) / 2**30,
        "peak_gib": peak(device),
    }


@torch.no_grad()
def static_side(model, batch, length, device) -> dict:
    """StaticCache, one CUDA graph of the whole step."""
    cache = StaticCache(config=model.config, max_cache_len=length + 64)
    k = keys(model, batch, length)
    for layer in range(model.config.num_hidden_layers):
        cache.update(k, k, layer)
    del k
    peak(device)
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    position = torch.full((batch, 1), length, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            model(token, position_ids=position, past_key_values=cache)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(token, position_ids=position, past_key_values=cache)
    seconds = []
    for _ in range(STEPS):
        begin = now(device)
        graph.replay()
        seconds.append(now(device) - begin)
    return {"decode_ms": 1e3 * sorted(seconds)[STEPS // 2], "cache_gib": held(cache) / 2**30, "peak_gib": peak(device)}


def headwise_side(model, plan, batch, length, device, *, capture: bool) -> dict:
    """A headwise cache under a plan, eager or captured."""
    cache, k = headwise.HeadwiseCache(plan), keys(model, batch, length)
    cache.fill(k, k)
    del k
    peak(device)
    with headwise.attach(model, plan=plan, capture=capture) as attached:
        ms = steps(model, cache, batch, device)
        found = {"decode_ms": ms, "cache_gib": held(cache) / 2**30, "peak_gib": peak(device)}
        if capture:
            assert attached.controller._capture.refused is None and attached.controller._capture.replays >= STEPS
    return found


def decode_row(model, shape, batch, length, device, roof) -> dict:
    """All sides at one shape, batch and length; a side that does not fit says so."""
    layers = model.config.num_hidden_layers
    full, half = plan_of(shape, layers, full=True), plan_of(shape, layers)
    sides: dict[str, Callable[[], dict]] = {
        "transformers": lambda: transformers_side(model, batch, length, device),
        "plan": lambda: headwise_side(model, half, batch, length, device, capture=False),
    }
    if device == "cuda":
        sides["static graph"] = lambda: static_side(model, batch, length, device)
        sides["full graph"] = lambda: headwise_side(model, full, batch, length, device, capture=True)
        sides["plan graph"] = lambda: headwise_side(model, half, batch, length, device, capture=True)
    row: dict = {"shape": shape, "batch": batch, "length": length, "sides": {}}
    for name, side in sides.items():
        try:
            row["sides"][name] = side()
        except torch.OutOfMemoryError:
            row["sides"][name] = {"failed": "out of memory"}
        except Exception as error:  # a side of transformers that a graph cannot hold
            row["sides"][name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    for side in row["sides"].values():
        if roof and "cache_gib" in side:
            side["of_roof"] = 1e3 * (weights + side["cache_gib"] * 2**30) / roof / side["decode_ms"]
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


@torch.no_grad()
def prefill(model, ids, cache, chunk, device) -> dict:
    """Seconds and peak memory of reading a prompt, in chunks or at once."""
    peak(device)
    begin = now(device)
    with preferred_kernels(next(model.parameters()).new_empty(0)):
        for at in range(0, ids.shape[1], chunk or ids.shape[1]):
            model(ids[:, at : at + (chunk or ids.shape[1])], past_key_values=cache, logits_to_keep=1)
    return {"seconds": now(device) - begin, "cache_gib": held(cache) / 2**30, "peak_gib": peak(device)}


def prefill_row(model, shape, length, chunk, device) -> dict:
    """Transformers at once and in chunks, the full and the thin plan in chunks; second of two rounds where that is short."""
    layers = model.config.num_hidden_layers
    ids = torch.randint(0, 30000, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    row: dict = {"shape": shape, "length": length, "chunk": chunk, "sides": {}}
    for name in ("transformers", "full", "plan"):
        plan = None if name == "transformers" else plan_of(shape, layers, full=name == "full")
        try:
            for _ in range(2 if length <= 32768 else 1):
                if plan is None:
                    row["sides"][name] = prefill(model, ids, DynamicCache(config=model.config), chunk, device)
                else:
                    with headwise.attach(model, plan=plan):
                        row["sides"][name] = prefill(model, ids, headwise.HeadwiseCache(plan), chunk, device)
        except torch.OutOfMemoryError:
            row["sides"][name] = {"failed": "out of memory"}
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def main() -> int:
    """JSON of all rows on standard output, each row also on standard error when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["gqa", "mha"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--gib", type=float, default=90.0, help="rows whose full cache is larger are left out")
    parser.add_argument("--prefill", type=int, nargs="*", default=[])
    parser.add_argument("--chunk", type=int, nargs="+", default=[0], help="0: at once")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    roof = copy_rate() if options.device == "cuda" else 0.0
    found: dict = {
        "environment": environment(),
        "layers": options.layers,
        "copy_tb_s": roof / 1e12,
        "decode": [],
        "prefill": [],
    }
    for shape in options.shapes:
        model = build(shape, options.layers, options.device)
        for length in options.lengths:
            for batch in options.batches:
                size = 4 * options.layers * batch * length * SHAPES[shape]["num_key_value_heads"] * 128 / 2**30
                if size <= options.gib:
                    found["decode"].append(decode_row(model, shape, batch, length, options.device, roof))
        for length in options.prefill:
            found["prefill"] += [prefill_row(model, shape, length, chunk, options.device) for chunk in options.chunk]
        del model
        gc.collect()
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
