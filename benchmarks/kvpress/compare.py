"""One side of the comparison with kvpress; see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STEPS = 5  # five digits
WINDOW, KERNEL, SINKS = (
    32,
    7,
    4,
)  # observing queries, pooled neighbours (mean), sinks of StreamingLLM: the same on both sides
DUO = "duo"


def prompts_and_heads(options: argparse.Namespace) -> dict[str, Any]:
    """What both sides share: token ids, answers, the share that is kept, and which kv heads stream."""
    from headwise import HeadSet, budget, score
    from headwise.hub import cache_folder, load_model
    from headwise.tasks import make_passkeys

    model, tokenizer = load_model("smollm2")
    scores = score.retrieval(model, tokenizer, tests=6, length=512).to_kv(3)
    plan = budget.duo(scores, sparsity=1 - options.full, sinks=16, window=128)
    keep: HeadSet = plan.full_heads()
    generator = torch.Generator().manual_seed(1)
    prompts = make_passkeys(tokenizer, count=options.prompts, length=options.length, generator=generator)
    folder = next(p for p in cache_folder().iterdir() if p.name.startswith("smollm2"))
    return {
        "folder": str(folder),
        "ids": [p.ids.tolist() for p in prompts],
        "answers": [p.answer_ids.tolist() for p in prompts],
        "streaming": (~keep.mask(30, 3)).tolist(),
        "sinks": 16,
        "recent": 128,
        "kept": options.kept,
    }


def decode(model: Any, cache: Any, ids: torch.Tensor) -> tuple[list[int], float]:
    """Greedy tokens after the prompt's last token, and the median CPU seconds of a step; positions are those of the text."""
    token, out, seconds = ids[:, -1:], [], []
    for step in range(STEPS):
        start = time.process_time()
        position = torch.tensor([[ids.shape[1] - 1 + step]])
        token = model(token, past_key_values=cache, position_ids=position).logits[:, -1:].argmax(-1)
        seconds.append(time.process_time() - start)
        out.append(int(token))
    return out, statistics.median(seconds)


def tensor_bytes(cache: Any) -> int:
    """Bytes of all keys and values that the cache holds."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


@torch.no_grad()
def run_headwise(shared: dict[str, Any]) -> dict[str, Any]:
    """Our side: plans attached, plain forward passes. kvpress reads the prompt densely, and so do these plans."""
    import headwise
    from headwise import budget
    from headwise.hub import load_model

    model, _ = load_model("smollm2")
    keep = headwise.HeadSet.from_mask(~torch.tensor(shared["streaming"]), "kv")
    other = headwise.SinkWindow(shared["sinks"], shared["recent"])
    amount, by = f"{shared['kept']:.6g}", f"observation(window={WINDOW},kernel={KERNEL},pool=avg)"
    plans = {
        "full": budget.full(model),
        DUO: headwise.HeadPlan.from_set(keep, other, 30, 3, prefill="dense"),
        "snapkv": budget.snapkv(model, budget=amount, window=WINDOW, kernel=KERNEL, pool="avg"),
        "adakv": budget.adakv(model, budget=amount, window=WINDOW, by=by),
        "pyramidkv": budget.pyramidkv(model, budget=amount, window=WINDOW, by=by),
        "streaming-llm": budget.streaming_llm(model, budget=amount, sinks=SINKS, prefill="dense"),
    }

    def prefill(ids: torch.Tensor) -> Any:
        return model(ids, use_cache=True, logits_to_keep=1).past_key_values

    found = {}
    for name, plan in plans.items():
        with headwise.attach(model, plan=plan):
            found[name] = measure(model, prefill, shared)
    return found


@torch.no_grad()
def run_kvpress(shared: dict[str, Any]) -> dict[str, Any]:
    """Their side: the presses of the same methods, with the same options."""
    import kvpress
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(
        shared["folder"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    duo = kvpress.DuoAttentionPress(head_compression_ratio=float(torch.tensor(shared["streaming"]).float().mean()))
    duo.post_init_from_model = lambda model: None  # the heads are given, not downloaded
    duo.streaming_mask = torch.tensor(shared["streaming"])
    duo.sink_size, duo.recent_size = shared["sinks"], shared["recent"]
    snap: dict[str, Any] = {"compression_ratio": 1 - shared["kept"], "window_size": WINDOW, "kernel_size": KERNEL}
    presses = {
        "full": None,
        DUO: duo,
        "snapkv": kvpress.SnapKVPress(**snap),
        "adakv": kvpress.AdaKVPress(kvpress.SnapKVPress(**snap)),
        "pyramidkv": kvpress.PyramidKVPress(**snap),
        "streaming-llm": kvpress.StreamingLLMPress(compression_ratio=1 - shared["kept"], n_sink=SINKS),
    }

    def prefill_with(press: Any) -> Callable[[torch.Tensor], Any]:
        def prefill(ids: torch.Tensor) -> Any:
            cache = DynamicCache()
            if press is None:
                model(ids, past_key_values=cache, logits_to_keep=1)
                return cache
            with press(model):
                model(ids, past_key_values=cache, logits_to_keep=1)
            return cache

        return prefill

    return {name: measure(model, prefill_with(press), shared) for name, press in presses.items()}


def measure(model: Any, prefill: Callable[[torch.Tensor], Any], shared: dict[str, Any]) -> dict[str, Any]:
    """Recall, cache bytes, CPU time of prefill and decoding; and the tokens, to compare the sides prompt by prompt."""
    written, prefill_s, decode_s, nbytes = [], [], [], 0
    for row in shared["ids"]:
        ids = torch.tensor([row])
        start = time.process_time()
        cache = prefill(ids[:, :-1])
        prefill_s.append(time.process_time() - start)
        nbytes = tensor_bytes(cache)
        tokens, seconds = decode(model, cache, ids)
        decode_s.append(seconds)
        written.append(tokens)
    answers = [answer[:STEPS] for answer in shared["answers"]]
    digits = [a == b for mine, right in zip(written, answers, strict=True) for a, b in zip(mine, right, strict=True)]
    return {
        "exact": sum(mine == right for mine, right in zip(written, answers, strict=True)) / len(answers),
        "digits": sum(digits) / len(digits),
        "cache_bytes": nbytes,
        "cache_over_full": nbytes / (2 * 30 * 3 * 64 * 4 * (len(shared["ids"][-1]) - 1)),
        "prefill_s": statistics.median(prefill_s),
        "decode_ms": 1e3 * statistics.median(decode_s),
        "written": written,
    }


def main() -> None:
    """Run one side and write its figures into the shared file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["headwise", "kvpress"])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument(
        "--kept", type=float, default=0.25, help="share of the keys that is kept by methods of one ratio"
    )
    parser.add_argument(
        "--full", type=float, default=0.25, help="share of kv heads that keep everything (DuoAttention)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that CPU time is what a quiet core would take
    shared = json.loads(options.shared.read_text()) if options.shared.exists() else prompts_and_heads(options)
    run = run_kvpress if options.side == "kvpress" else run_headwise
    shared.setdefault("figures", {})[options.side] = run(shared)
    options.shared.write_text(json.dumps(shared))
    print(json.dumps(shared["figures"], indent=1))


if __name__ == "__main__":
    main()
