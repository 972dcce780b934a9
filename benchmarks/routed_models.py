"""What routing costs and saves in whole models with random weights: MoH layers, graphs of tokens, mixtures of attention experts.

    python benchmarks/routed_models.py [moh] [graph] [bam]      # all three by default; --device cpu --quick to see that it runs

moh: forward and training step of a stack of decoder layers, dense and with a trained head router at 75 and 50 % of the heads, by
length; `kernel` says whether heads left queries out (from the device's crossover on) or were multiplied by 0. graph: training step
of a model of experts under the plain router and under graphs of tokens. bam: a prompt of 256 tokens and 16 more by `generate`, and
the bytes of keys and values, dense, BTX and BAM. moh is timed eagerly and, on a GPU, as CUDA graphs, without the host's launches.
Medians over rounds in which all sides ran in turn; one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from timing import clock, graphed, rounds
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from headwise.attach import attach
from headwise.attach.hook import HeadCall
from headwise.papers import environment
from headwise.route import Graph, HeadRouter, LayerRoute, RouterConfig, SoftmaxTopK, bam, upcycle

LAYERS = {  # heads, head dim, layers; rows x tokens
    "12 x 64": (12, 64, 12, ((32, 512), (8, 2048), (2, 8192))),
    "32 x 128": (32, 128, 2, ((1, 4096), (1, 8192), (1, 32768))),
}
STEPS = 3
QUICK = {"4 x 16": (4, 16, 2, ((2, 32), (1, 64)))}


def llama(width: int, heads: int, layers: int, hidden: int, vocab: int, device: str) -> Any:
    """A Llama with random weights, bfloat16 on a GPU."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=65536,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32)


def step(model: Any, ids: Tensor, train: bool) -> Callable[[], None]:
    """A forward pass without logits, or forward and backward with the loss; gradients are thrown away."""

    def run() -> None:
        with torch.set_grad_enabled(train):
            out = model(ids, labels=ids if train else None, logits_to_keep=0 if train else 1, use_cache=False)
            if train:
                out.loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def routers(heads: int, width: int, layers: int) -> dict[str, HeadRouter | None]:
    """Dense, and trained routers with half of the running heads shared."""
    made: dict[str, HeadRouter | None] = {"dense": None}
    for share in (0.75, 0.5):
        active = round(share * heads)
        route = LayerRoute.first(heads, active // 2, active - active // 2)
        made[f"{share:.0%}"] = HeadRouter(RouterConfig(kind="trained", layers=(route,) * layers, width=width))
    return made


def moh(device: str, count: int, quick: bool) -> list[dict[str, Any]]:
    """Times by shape, length and share; ratios to dense."""
    rows = []
    for name, (heads, dim, layers, sizes) in (QUICK if quick else LAYERS).items():
        model = llama(heads * dim, heads, layers, 8 * heads * dim // 3 // 8 * 8, 256, device)
        for batch, length in sizes:
            ids = torch.randint(256, (batch, length), device=device)
            row: dict[str, Any] = {"heads x dim": name, "layers": layers, "rows": batch, "tokens": length}
            for train in (False, True):
                model.train(train)
                row |= _routed(model, ids, heads, layers, train, device, count)
            rows.append(row)
            print(json.dumps(row), flush=True)
        del model
        _free()
    return rows


def _routed(model: Any, ids: Tensor, heads: int, layers: int, train: bool, device: str, count: int) -> dict[str, Any]:
    kind, run = "train" if train else "forward", step(model, ids, train)
    sides = routers(heads, model.config.hidden_size, layers)
    kernel = {name: _served(model, router, run) for name, router in sides.items() if router is not None}
    times: dict[str, list[float]] = {name: [] for name in sides}
    captured: dict[str, list[float]] = {name: [] for name in sides if device == "cuda"}
    for _ in range(count):
        for name, router in sides.items():  # in turn; attaching is not timed, nor is the first step behind it
            with nullcontext() if router is None else attach(model, router=router):
                run()
                times[name].append(_seconds(run, device))
                if captured:
                    captured[name].append(_seconds(graphed(run), device))
    found: dict[str, Any] = {}
    for way, by in ((kind, times), (f"{kind} in a graph", captured)):
        seconds = {name: statistics.median(ts) for name, ts in by.items()}
        found |= {f"{way} {name}, ms": round(1e3 * s, 3) for name, s in seconds.items()}
        found |= {f"{way} {name} over dense": round(seconds[name] / seconds["dense"], 3) for name in kernel if by}
    return found | {f"{kind} {name}, kernel": used for name, used in kernel.items()}


def _seconds(run: Callable[[], None], device: str) -> float:
    start = clock(device)
    for _ in range(STEPS):
        run()
    return (clock(device) - start) / STEPS


def _served(model: Any, router: HeadRouter, run: Callable[[], None]) -> bool:
    """Did heads leave queries out?"""
    seen, before = [], getattr(HeadCall, "attend_served", None)
    if before is None:
        return False

    def watch(self: HeadCall, q: Tensor, gates: Tensor) -> Tensor | None:
        seen.append(before(self, q, gates))
        return seen[-1]

    HeadCall.attend_served = watch  # type: ignore[method-assign]
    try:
        with attach(model, router=router):
            run()
    finally:
        HeadCall.attend_served = before  # type: ignore[method-assign]
    return any(out is not None for out in seen)


def graph(device: str, count: int, quick: bool) -> list[dict[str, Any]]:
    """Training step of experts under four routers, by length."""
    rows = []
    base = SoftmaxTopK(k=2)
    rules = {"plain": base, **{g: Graph(base=base, graph=g) for g in ("similarity", "cosine", "attention")}}  # type: ignore[arg-type]
    width, layers, hidden, experts = (32, 2, 32, 4) if quick else (512, 8, 512, 16)
    for batch, length in ((2, 32),) if quick else ((4, 2048), (1, 8192)):
        ids, sides = torch.randint(256, (batch, length), device=device), {}
        for name, rule in rules.items():
            model = llama(width, 8, layers, hidden, 256, device).train()
            upcycle(model, experts=experts, how="drop", drop=1.0, rule=rule, losses={"balance": 0.01})
            sides[name] = step(model, ids, True)
        seconds = rounds(sides, device, count)
        row: dict[str, Any] = {"width, layers, experts": [width, layers, experts], "rows": batch, "tokens": length}
        row |= {f"{name}, ms": round(1e3 * s, 3) for name, s in seconds.items()}
        row |= {f"{name} over plain": round(s / seconds["plain"], 3) for name, s in seconds.items() if name != "plain"}
        rows.append(row)
        print(json.dumps(row), flush=True)
        del sides, model
        _free()
    return rows


@torch.no_grad()
def mixtures(device: str, count: int, quick: bool) -> dict[str, Any]:
    """Seconds of a short generation, and bytes of keys and values a token, at the paper's small shape."""
    C, hidden, heads, layers, vocab = (32, 48, 4, 2, 320) if quick else (1024, 2048, 8, 6, 256000)
    config = CohereConfig(
        vocab_size=vocab, hidden_size=C, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, logit_scale=1.0, tie_word_embeddings=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        dense = CohereForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32).eval()
    four = [dense] * 4
    models = {
        "dense": dense,
        "BTX": bam(four, None, attention="average").model,
        "BAM, expert kv": bam(four, None).model,
        "BAM, shared kv": bam(four, None, kv="shared").model,
    }
    ids = torch.randint(1, vocab, (1, 16 if quick else 256), device=device)
    found: dict[str, Any] = {}
    sides: dict[str, Callable[[], None]] = {}
    for name, model in models.items():
        model.eval()
        sides[name] = _generation(model, ids)
        cache = model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1).past_key_values
        held = sum(layer.keys.numel() * layer.keys.element_size() * 2 for layer in cache.layers)
        found[f"{name}, kv bytes a token"] = held // ids.shape[1]
    seconds = rounds(sides, device, count)
    found |= {f"{name}, ms": round(1e3 * s, 2) for name, s in seconds.items()}
    return found | {f"{name} over BTX": round(s / seconds["BTX"], 3) for name, s in seconds.items()}


def _generation(model: Any, ids: Tensor) -> Callable[[], None]:
    def run() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16, do_sample=False)

    return run


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


PARTS = {"moh": moh, "graph": graph, "bam": mixtures}


def main() -> None:
    """Run the parts and print one JSON object, last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="moh, graph, bam")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs")
    parser.add_argument("--out", help="file for the JSON object")
    args = parser.parse_args()
    names = args.parts or list(PARTS)
    result: dict[str, Any] = {"environment": environment()}
    if args.device == "cuda":
        result["environment"] |= {"card": torch.cuda.get_device_name()}
    for name in names:
        started = time.monotonic()
        result[name] = PARTS[name](args.device, args.rounds, args.quick)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        if args.out:
            with open(args.out, "w", encoding="utf-8") as file:
                file.write(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
