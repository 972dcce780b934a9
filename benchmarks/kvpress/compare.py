"""One side of the comparison with kvpress; see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch

STEPS = 5  # five digits


def prompts_and_plan(length: int, count: int, full: float, sinks: int, recent: int) -> dict[str, Any]:
    """What both sides share: token ids, answers, which kv heads stream."""
    from headwise import HeadSet, budget, score
    from headwise.hub import cache_folder, load_model
    from headwise.tasks import make_passkeys

    model, tokenizer = load_model("smollm2")
    scores = score.retrieval(model, tokenizer, tests=6, length=512).to_kv(3)
    plan = budget.duo(scores, sparsity=1 - full, budget=None, sinks=sinks, window=recent)
    keep: HeadSet = plan.full_heads()
    prompts = make_passkeys(tokenizer, count=count, length=length, generator=torch.Generator().manual_seed(1))
    folder = next(p for p in cache_folder().iterdir() if p.name.startswith("smollm2"))
    return {
        "folder": str(folder),
        "ids": [p.ids.tolist() for p in prompts],
        "answers": [p.answer_ids.tolist() for p in prompts],
        "streaming": (~keep.mask(30, 3)).tolist(),
        "sinks": sinks,
        "recent": recent,
    }


def decode(model: Any, cache: Any, ids: torch.Tensor) -> tuple[list[int], float]:
    """Greedy tokens after the prompt's last token, and seconds a step."""
    token, out = ids[:, -1:], []
    start = time.perf_counter()
    for _ in range(STEPS):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        out.append(int(token))
    return out, (time.perf_counter() - start) / STEPS


def tensor_bytes(cache: Any) -> int:
    """Bytes of all keys and values that the cache holds."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


@torch.no_grad()
def run_headwise(shared: dict[str, Any], prefill_mode: Literal["masked", "dense"]) -> dict[str, Any]:
    """Our side: the plan attached, plain forward passes. kvpress reads the prompt densely, which is `prefill_mode="dense"` here."""
    import headwise
    from headwise.hub import load_model

    model, _ = load_model("smollm2")
    keep = headwise.HeadSet.from_mask(~torch.tensor(shared["streaming"]), "kv")
    plan = headwise.HeadPlan.from_set(
        keep, headwise.SinkWindow(shared["sinks"], shared["recent"]), 30, 3, prefill=prefill_mode
    )

    def prefill(ids: torch.Tensor) -> Any:
        return model(ids, use_cache=True, logits_to_keep=1).past_key_values

    with headwise.attach(model, plan=plan):
        return measure(model, prefill, shared)


@torch.no_grad()
def run_kvpress(shared: dict[str, Any]) -> dict[str, Any]:
    """Their side: DuoAttentionPress with the same streaming heads."""
    from kvpress import DuoAttentionPress
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(
        shared["folder"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    press = DuoAttentionPress(head_compression_ratio=float(torch.tensor(shared["streaming"]).float().mean()))
    press.post_init_from_model = lambda model: None  # the heads are given, not downloaded
    press.streaming_mask = torch.tensor(shared["streaming"])
    press.sink_size, press.recent_size = shared["sinks"], shared["recent"]

    def prefill(ids: torch.Tensor) -> Any:
        cache = DynamicCache()
        with press(model):
            model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    found = measure(model, prefill, shared)
    found["claimed_compression_ratio"] = press.compression_ratio
    return found


def measure(model: Any, prefill: Any, shared: dict[str, Any]) -> dict[str, Any]:
    """Recall, cache bytes, prefill and decode seconds."""
    exact, prefill_s, decode_s, nbytes = [], [], [], 0
    for row, answer in zip(shared["ids"], shared["answers"], strict=True):
        ids = torch.tensor([row])
        start = time.perf_counter()
        cache = prefill(ids[:, :-1])
        prefill_s.append(time.perf_counter() - start)
        nbytes = tensor_bytes(cache)
        tokens, seconds = decode(model, cache, ids)
        decode_s.append(seconds)
        exact.append(tokens == answer[:STEPS])
    full = 2 * 30 * 3 * 64 * 4 * (len(shared["ids"][-1]) - 1)
    return {
        "exact": sum(exact) / len(exact),
        "prompts": len(exact),
        "cache_bytes": nbytes,
        "cache_over_full": nbytes / full,
        "prefill_s": statistics.median(prefill_s),
        "decode_ms": 1e3 * statistics.median(decode_s),
    }


def main() -> None:
    """Run one side and write its figures into the shared file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["headwise", "kvpress"])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--full", type=float, default=0.25, help="share of kv heads that keep everything")
    options = parser.parse_args()
    if options.shared.exists():
        shared = json.loads(options.shared.read_text())
    else:
        shared = prompts_and_plan(options.length, options.prompts, options.full, 16, 128)
    figures = shared.setdefault("figures", {})
    if options.side == "kvpress":
        figures["kvpress"] = run_kvpress(shared)
    else:
        figures["headwise_dense_prefill"] = run_headwise(shared, "dense")
        figures["headwise_masked_prefill"] = run_headwise(shared, "masked")
    options.shared.write_text(json.dumps(shared))
    print(json.dumps(shared["figures"], indent=1))


if __name__ == "__main__":
    main()
