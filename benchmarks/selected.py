"""Tokens chosen by content on real shapes: bytes against the formula, what the choice costs in a prefill, and the time of a decode step.

    python benchmarks/selected.py                      # small shapes, CPU
    python benchmarks/selected.py --device cuda        # Llama-2-7B and Mistral-7B shapes, random weights, 32k tokens

Models have a few layers of the named shape: every layer costs the same. Times are medians of wall clock with the device
synchronised; the yardstick is the same model with transformers' DynamicCache and SDPA in the same run. Prints one JSON object.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headwise

SHAPES = {"llama-2-7b": (32, 32), "mistral-7b": (32, 8)}  # query heads, kv heads; D = 128


def model_of(shape: str, layers: int, tokens: int, device: str, small: bool) -> LlamaForCausalLM:
    """A random Llama of this shape with few layers."""
    heads, kv_heads = SHAPES[shape]
    size = (
        {"hidden_size": 4096, "intermediate_size": 11008}
        if not small
        else {"hidden_size": 512, "intermediate_size": 1024}
    )
    config = LlamaConfig(
        vocab_size=1000,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=tokens + 64,
        **size,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").to(device, dtype).eval()


def timed(run, device: str, repeats: int) -> float:
    """Median milliseconds."""
    found = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found[1:])


@torch.no_grad()
def measure(model, plan, tokens: int, device: str, repeats: int) -> dict[str, float]:
    """Prefill and decode times (ms) and bytes of the cache, under a plan or without one."""
    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    handle = None if plan is None else headwise.attach(model, plan=plan)
    try:
        prefill = timed(lambda: model(ids, use_cache=True, logits_to_keep=1), device, repeats)
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        size = cache.nbytes if plan is not None else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        step = timed(lambda: model(ids[:, :1], past_key_values=cache), device, 10 * repeats)
    finally:
        if handle is not None:
            handle.detach()
    return {"prefill_ms": prefill, "decode_ms": step, "bytes": size}


def main() -> None:
    """Every shape and planner; the formula is Σ slots · bytes of a token, and 4 bytes a slot for its position."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    tokens = given.tokens or (32768 if given.device == "cuda" else 1024)
    out = {"device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu", "tokens": tokens, "rows": []}
    for shape in SHAPES:
        model = model_of(shape, given.layers, tokens, given.device, small=given.device == "cpu")
        dims, dtype = headwise.find_stack(model).head_dim, next(model.parameters()).dtype
        plans = {"none": None}
        for ratio in ("40%", "60%"):
            task = {"beta": 0.25, "closest": False, "context": tokens, "recent": min(256, tokens // 16)}
            plans[f"task-kv {ratio}"] = headwise.budget.task_kv(model, budget=ratio, **task)
            plans[f"snapkv {ratio}"] = headwise.budget.snapkv(model, budget=ratio)
            plans[f"adakv {ratio}"] = headwise.budget.adakv(model, budget=ratio)
        for name, plan in plans.items():
            row = {"shape": shape, "plan": name, **measure(model, plan, tokens, given.device, given.repeats)}
            if plan is not None:
                slots = int(plan.slots(tokens).sum())
                row["formula_bytes"] = int(plan.bytes(tokens, head_dim=dims, dtype=dtype).sum()) + 4 * slots
            out["rows"].append(row)
            print(json.dumps(row), flush=True)
        del model
    print(json.dumps(out))


if __name__ == "__main__":
    main()
