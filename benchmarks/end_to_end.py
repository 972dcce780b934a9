"""A whole model, random weights: prefill of a long prompt and greedy decoding, untouched against a half-streaming plan.

    python benchmarks/end_to_end.py                                   # Llama-3-8B shape, 32k prompt, 128 tokens; a GPU
    python benchmarks/end_to_end.py --layers 4 --prompt 2048 --device cpu

Both sides run transformers' own code; the untouched one uses DynamicCache and the fastest dense kernel of the machine
(cuDNN SDPA on Hopper). Weights are random, so the times are those of the shape and the texts mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import headwise
from headwise.attention.sdpa import preferred_kernels
from headwise.papers import environment

LLAMA3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 1 << 20,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}  # fmt: skip


def build(layers: int, device: str) -> LlamaForCausalLM:
    """The shape with random weights, bf16 on a GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **LLAMA3_8B))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def now(device: str) -> float:
    """Seconds, after all work on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def once(model: LlamaForCausalLM, ids: torch.Tensor, tokens: int, cache: object, device: str) -> dict[str, float]:
    """Seconds of the prefill and of a decode step, and the bytes of the cache."""
    q = ids.new_empty(0, dtype=model.dtype)
    with preferred_kernels(q):
        begin = now(device)
        out = model(ids, past_key_values=cache, logits_to_keep=1)
        prefill = now(device) - begin
        out = model(out.logits.argmax(-1), past_key_values=cache)
        begin = now(device)
        for _ in range(tokens):
            out = model(out.logits.argmax(-1), past_key_values=cache)
        decode = (now(device) - begin) / tokens
    held = cache.nbytes if isinstance(cache, headwise.HeadwiseCache) else sum(
        t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values)  # type: ignore[attr-defined]
    )  # fmt: skip
    return {"prefill_s": prefill, "decode_ms": 1e3 * decode, "cache_gib": held / 2**30}


def main() -> int:
    """Two rounds of both sides; the second counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompt", type=int, nargs="+", default=[32768])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    model = build(options.layers, options.device)
    row = tuple(headwise.Full() if k % 2 else headwise.SinkWindow(64, 256) for k in range(8))
    plan = headwise.HeadPlan(patterns=(row,) * options.layers)
    found: dict[str, object] = {
        "environment": environment(),
        "layers": options.layers,
        "batch": options.batch,
        "rows": [],
    }
    for prompt in options.prompt:
        ids = torch.randint(0, 128000, (options.batch, prompt), generator=torch.Generator().manual_seed(0)).to(
            options.device
        )
        for _ in range(2):
            full = once(model, ids, options.tokens, DynamicCache(config=model.config), options.device)
            with headwise.attach(model, plan=plan):
                half = once(model, ids, options.tokens, headwise.HeadwiseCache(plan), options.device)
        ratios = {f"{name}_ratio": full[name] / half[name] for name in full}
        found["rows"].append({"prompt": prompt, "full": full, "half_streaming": half, **ratios})  # type: ignore[attr-defined]
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
