"""What the three mechanisms cost and save: attach overhead, observing, cache bytes and decode time under a plan.

    python benchmarks/foundation.py                 # smollm2 on this machine; ~10 minutes on 2 quiet cores
    python benchmarks/foundation.py --context 2048  # shorter
    python benchmarks/foundation.py --shape llama3-8b --context 131072 --device cuda   # random weights, attention only

Every ratio is the median over rounds in which both sides ran in turn; the correctness gate runs first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable

import torch
from timing import rounds
from torch.nn import functional as F
from transformers import DynamicCache

import headwise
from headwise.attention.sdpa import preferred_kernels
from headwise.papers import environment

SHAPES = {"llama3-8b": (32, 32, 8, 128), "llama2-7b": (32, 32, 32, 128)}  # layers, heads, kv heads, head dim


@torch.no_grad()
def overhead(model: torch.nn.Module, tokens: int = 512, steps: int = 32, count: int = 5) -> dict[str, float]:
    """Prefill and decode with nothing active, and while observing the arg-max keys of all heads, against the bare model."""
    ids = torch.randint(100, 40000, (1, tokens), generator=torch.Generator().manual_seed(0))
    idle = headwise.Edit.zero(headwise.HeadSet.parse("L0H0"), phase="decode", tokens=[10**6])  # never selects a token
    bare = model(ids, logits_to_keep=1).logits
    with headwise.attach(model, edits=idle):
        assert torch.equal(bare, model(ids, logits_to_keep=1).logits), "gate: attached model differs"

    def prefill() -> None:
        model(ids, logits_to_keep=1)

    def decode() -> None:
        cache = DynamicCache(config=model.config)
        out = model(ids[:, :64], past_key_values=cache, logits_to_keep=1)
        for _ in range(steps):
            out = model(out.logits.argmax(-1), past_key_values=cache)

    def attached(run: Callable[[], None]) -> Callable[[], None]:
        def inner() -> None:
            with headwise.attach(model, observers=[]):
                run()

        return inner

    def observed(run: Callable[[], None]) -> Callable[[], None]:
        def inner() -> None:
            with headwise.observe(model, "argmax", rows="last"):
                run()

        return inner

    found = {}
    for name, run in (("prefill", prefill), ("decode", decode)):
        t = rounds({"bare": run, "attached": attached(run), "observed": observed(run)}, "cpu", count)
        found[f"{name}_attached_ratio"] = t["attached"] / t["bare"]
        found[f"{name}_observed_ratio"] = t["observed"] / t["bare"]
        found[f"{name}_bare_s"] = t["bare"]
    return found


@torch.no_grad()
def plan_decode(model: torch.nn.Module, context: int, steps: int = 16) -> dict[str, float]:
    """Cache bytes and decode time at `context` tokens: half of the kv heads full, the rest 16 sinks + 128 recent."""
    stack = headwise.find_stack(model)
    keep = headwise.HeadSet.of(
        [(layer, k) for layer in range(stack.layers) for k in range(stack.kv_heads) if (layer + k) % 2]
    )
    keep = headwise.HeadSet.of(keep.pairs(), kind="kv")
    plan = headwise.HeadPlan.from_set(keep, headwise.SinkWindow(16, 128), stack.layers, stack.kv_heads)
    full = headwise.HeadPlan.full(stack.layers, stack.kv_heads)
    ids = torch.randint(100, 40000, (1, context), generator=torch.Generator().manual_seed(0))
    caches = {
        "dynamic": _filled(model, ids, None),
        "full_plan": _filled(model, ids, full),
        "half_plan": _filled(model, ids, plan),
    }
    nbytes = {name: _bytes(cache) for name, cache in caches.items()}

    def decode(name: str, used: headwise.HeadPlan | None) -> Callable[[], None]:
        def run() -> None:
            token = torch.ones(1, 1, dtype=torch.long)
            if used is None:
                for _ in range(steps):
                    model(token, past_key_values=caches[name])
                return
            with headwise.attach(model, plan=used):
                for _ in range(steps):
                    model(token, past_key_values=caches[name])

        return run

    t = rounds(
        {
            "dynamic": decode("dynamic", None),
            "full_plan": decode("full_plan", full),
            "half_plan": decode("half_plan", plan),
        },
        "cpu",
        3,
    )
    return {
        "context": context,
        "dynamic_bytes": nbytes["dynamic"],
        "half_plan_bytes": nbytes["half_plan"],
        "half_plan_bytes_ratio": nbytes["half_plan"] / nbytes["dynamic"],
        "full_plan_bytes_ratio": nbytes["full_plan"] / nbytes["dynamic"],
        "dynamic_decode_ms": 1e3 * t["dynamic"] / steps,
        "half_plan_decode_ratio": t["half_plan"] / t["dynamic"],
        "full_plan_decode_ratio": t["full_plan"] / t["dynamic"],
    }


def _filled(model: torch.nn.Module, ids: torch.Tensor, plan: headwise.HeadPlan | None) -> object:
    if plan is None:
        return model(ids, logits_to_keep=1, use_cache=True).past_key_values
    with headwise.attach(model, plan=plan):
        return model(ids, logits_to_keep=1, use_cache=True).past_key_values


def _bytes(cache: object) -> int:
    if isinstance(cache, headwise.HeadwiseCache):
        return cache.nbytes
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))  # type: ignore[attr-defined]


@torch.no_grad()
def shape_decode(shape: str, context: int, batch: int, device: str) -> dict[str, float]:
    """Decode attention of all layers of a shape with random keys: DynamicCache-like dense SDPA against a half-full plan."""
    layers, heads, kv_heads, dim = SHAPES[shape]
    pattern = headwise.SinkWindow(64, 256)
    row = tuple(headwise.Full() if k % 2 else pattern for k in range(kv_heads))
    plan = headwise.HeadPlan(patterns=(row,) * layers)
    dtype = torch.bfloat16
    cache = headwise.HeadwiseCache(plan)
    generator = torch.Generator(device).manual_seed(0)
    for layer in range(layers):  # filled in chunks, as a long prompt would
        for begin in range(0, context, 32768):
            size = (batch, kv_heads, min(32768, context - begin), dim)
            k, v = (torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(2))
            cache.update(k, v, layer)
            cache.layers[layer].take(None)
    nbytes, formula = cache.nbytes, int(plan.bytes(context, head_dim=dim, dtype=dtype, batch=batch).sum())
    q = torch.randn(batch, heads, 1, dim, generator=generator, device=device, dtype=dtype)
    new = torch.randn(batch, kv_heads, 1, dim, generator=generator, device=device, dtype=dtype)
    dense_k = [
        torch.randn(batch, kv_heads, context, dim, generator=generator, device=device, dtype=dtype) for _ in range(2)
    ]
    dense_v = [torch.randn_like(k) for k in dense_k]  # two layers in turn: 512 MiB each, no cache holds them

    taken = []
    for layer in range(layers):
        cache.update(new, new, layer)
        taken.append(cache.layers[layer].take(None)[:2])
    ran = headwise.attention(q, groups=taken[0][0], offset=taken[0][1], explain=True).ran
    gate(q, *taken[0])

    def step() -> None:
        """A decode step's work on the cache: store the token, then attend, in every layer."""
        for layer in range(layers):
            cache.update(new, new, layer)
            groups, offset, _ = cache.layers[layer].take(None)
            headwise.attention(q, groups=groups, offset=offset)

    def attend() -> None:
        for groups, offset in taken:
            headwise.attention(q, groups=groups, offset=offset)

    def dense() -> None:
        with preferred_kernels(q):
            for layer in range(layers):
                F.scaled_dot_product_attention(q, dense_k[layer % 2], dense_v[layer % 2], enable_gqa=heads != kv_heads)

    sides = {"dense": dense, "attend": attend, "step": step}
    t = rounds(sides, device, 20)
    if device == "cuda":
        graphs = {f"{name}_graph": captured(sides[name]).replay for name in ("dense", "attend")}
        t |= rounds(graphs, device, 20)
    read = 2 * batch * layers * dim * 2
    found = {
        "context": context,
        "batch": batch,
        "bytes": nbytes,
        "bytes_over_formula": nbytes / formula,
        "backend": f"{ran.backend}: {ran.reason}",
        **{f"{name}_ms": 1e3 * seconds for name, seconds in t.items()},
        "step_over_dense": t["step"] / t["dense"],
        "attend_over_dense": t["attend"] / t["dense"],
        "dense_TBps": read * kv_heads * context / t["dense"] / 1e12,
    }
    if device == "cuda":
        found["attend_over_dense_graph"] = t["attend_graph"] / t["dense_graph"]
        found["attend_graph_TBps"] = formula / t["attend_graph"] / 1e12
        found["dense_graph_TBps"] = read * kv_heads * context / t["dense_graph"] / 1e12
    return found


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The kernels of one call, without the host's time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def gate(q: torch.Tensor, groups: list, offset: int) -> None:
    """No figure without the right result: against the reference, one row at a time in float32."""
    row = [dataclasses.replace(g, k=g.k[:1], v=g.v[:1]) for g in groups]
    found = headwise.attention(q[:1], groups=row, offset=offset)
    wanted = headwise.attention(q[:1], groups=row, offset=offset, backend="reference")
    error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    assert error < 1e-2, f"gate: error {error}"


def main() -> int:
    """Run and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=("overhead", "plan"), help="one of the two CPU parts")
    parser.add_argument("--rounds", type=int, default=5, help="of the first part")
    options = parser.parse_args()
    found: dict[str, object] = {"environment": environment()}
    if options.shape:
        found["decode"] = shape_decode(options.shape, options.context, options.batch, options.device)
    else:
        from headwise.hub import load_model

        model, _ = load_model("smollm2")
        if options.only != "plan":
            found["overhead"] = overhead(model, count=options.rounds)
        if options.only != "overhead":
            found["plan"] = plan_decode(model, options.context)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
