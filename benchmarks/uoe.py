"""Selective attention against dense attention of the same layer: time forward and backward, memory, and where it pays.

    python benchmarks/uoe.py [--lengths 1024 4096] [--device cuda] [--dtype bfloat16] [--width 1024] [--heads 16]

One attention layer of a Llama, random weights. Per length: the dense layer with transformers' sdpa (PyTorch picks the kernel),
and the layer as a union at half of the heads a token, with even routing (random heads) as a
trained router with a balance loss has it. The row says milliseconds, ratios and, on a GPU, peak memory.
"""

import argparse
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headwise.route.uoe import uoe


def layers(width, heads, device, dtype):
    """A dense attention layer, the same as a union, and the rotary module."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=32768, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, dtype)
    dense = model.model.layers[0].self_attn
    union = uoe(model, None, active=0.5, mlp_experts=0)
    return dense, union.attention[0], model.model.rotary_emb


def run(layer, x, angles, backward):
    out = layer(hidden_states=x, position_embeddings=angles, attention_mask=None)[0]
    if backward:
        out.sum().backward()


def measure(layer, x, angles, backward, repeats):
    """Median milliseconds, and peak MiB above what was there on a GPU."""
    cuda, times = x.is_cuda, []
    for turn in range(repeats + 2):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        run(layer, x, angles, backward)
        if cuda:
            torch.cuda.synchronize()
        if turn >= 2:
            times.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20 if cuda else float("nan")
    return 1e3 * sorted(times)[len(times) // 2], peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    dense, union, rotary = layers(args.width, args.heads, device, dtype)
    for length in args.lengths:
        x = torch.randn(args.batch, length, args.width, device=device, dtype=dtype, requires_grad=True)
        angles = rotary(x, torch.arange(length, device=device)[None])
        row = {"length": length, "device": str(device), "dtype": args.dtype}
        for backward in (False, True):
            kind = "train" if backward else "forward"
            with torch.set_grad_enabled(backward):
                for name, layer in (("dense", dense), ("union", union)):
                    row[f"{kind}_{name}_ms"], row[f"{kind}_{name}_mib"] = measure(
                        layer, x, angles, backward, args.repeats
                    )
            row[f"{kind}_ratio"] = row[f"{kind}_union_ms"] / row[f"{kind}_dense_ms"]
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if v == v}))


if __name__ == "__main__":
    main()
