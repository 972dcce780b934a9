"""What vision methods cost: SoftPAG against plain attention and against a materialised map; the sweep of all heads of a ViT.

    python benchmarks/vision.py softpag --device cuda              # SD3-medium's attention: 24 heads of 64, 4096 + 333 tokens, bf16
    python benchmarks/vision.py transformer --device cuda          # a whole SD3-medium-shaped transformer (needs diffusers)
    python benchmarks/vision.py sweep --device cuda --images 8     # ViT-B/16: 144 heads, one forward per head against the resumed sweep
    python benchmarks/vision.py all --small                        # the same on toy shapes, to see that it runs

The correctness gate runs first; times are medians over rounds in which all sides run in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.attach import attach, find_stack
from headwise.edits import Edit
from headwise.papers import environment
from headwise.score._vit_prune import sweep
from headwise.steer._perturb import Perturbation, perturb
from headwise.units import HeadSet

Sides = dict[str, Callable[[], Any]]


def medians(
    sides: Sides, device: str, rounds: int, around: dict[str, Callable[[], Any]] | None = None
) -> dict[str, float]:
    """Milliseconds of each side: median over rounds after one to warm up; `around` opens what a side stands in, untimed."""
    opened = around or {}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, run in sides.items():
            with opened.get(name, nullcontext)():
                _wait(device)
                started = time.perf_counter()
                run()
                _wait(device)
                if round_:
                    times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(found) for name, found in times.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def softpag(device: str, small: bool, rounds: int) -> dict[str, float]:
    """One attention call: plain, with all heads moved half way to identity by the fused form, with 6 heads, and by a map."""
    B, H, N, D = (1, 4, 96, 16) if small else (1, 24, 4096 + 333, 64)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, N, D, generator=generator).to(device, dtype) for _ in range(3))
    call = SimpleNamespace(q=q, k=k, v=v, own_values=v, mask=None, scale=D**-0.5, options={}, layer=0)

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def fused(count: int) -> Tensor:
        heads = tuple(range(count))
        p = Perturbation(heads=HeadSet.of([(0, h) for h in heads]), u=0.5)
        return perturb(p, call, plain(), heads, torch.full((1, count), 0.5))  # type: ignore[arg-type]

    def mapped() -> Tensor:
        A = (q @ k.mT * D**-0.5).softmax(-1, dtype=torch.float32)
        A = 0.5 * A + 0.5 * torch.eye(N, device=device)
        return (A.to(dtype) @ v).transpose(1, 2)

    gap = float((fused(H).float() - mapped().float()).abs().max())
    assert gap < (2e-2 if dtype == torch.bfloat16 else 1e-4), f"the fused form is {gap} off"
    found = medians(
        {"plain": plain, "fused_all": lambda: fused(H), "fused_6": lambda: fused(min(6, H)), "map": mapped},
        device,
        rounds,
    )
    ratios = {f"{name}_over_plain": found[name] / found["plain"] for name in ("fused_all", "fused_6", "map")}
    return {f"{name}_ms": value for name, value in found.items()} | ratios


@torch.no_grad()
def transformer(device: str, small: bool, rounds: int) -> dict[str, float]:
    """A whole forward of an SD3-shaped transformer: plain, attached and idle, one layer's heads and a quarter of all heads perturbed."""
    from diffusers import SD3Transformer2DModel

    shape = dict(sample_size=16, num_layers=2, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=64)
    if not small:
        shape = dict(
            sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096
        )
    width = shape["attention_head_dim"] * shape["num_attention_heads"]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = SD3Transformer2DModel(patch_size=2, in_channels=16, out_channels=16, caption_projection_dim=width, pooled_projection_dim=64,
                                  pos_embed_max_size=192, **shape).to(device, dtype).eval()  # fmt: skip
    generator, side = torch.Generator().manual_seed(0), shape["sample_size"]
    batch = {
        "hidden_states": torch.randn(1, 16, side, side, generator=generator).to(device, dtype),
        "encoder_hidden_states": torch.randn(1, 333, shape["joint_attention_dim"], generator=generator).to(
            device, dtype
        ),
        "pooled_projections": torch.randn(1, 64, generator=generator).to(device, dtype),
        "timestep": torch.tensor([500.0], device=device),
    }
    H, L = shape["num_attention_heads"], shape["num_layers"]
    sets = {
        "one_layer": HeadSet.of([(L // 2, h) for h in range(H)]),
        "quarter": HeadSet.of([(l, h) for l in range(L) for h in range(0, H, 4)]),
    }

    def run() -> Tensor:
        return model(**batch).sample

    def attached(heads: HeadSet) -> Callable[[], Any]:
        return lambda: Perturbation(heads=heads, u=0.5).attached(model)

    plain = run()
    with attached(sets["quarter"])():
        assert not torch.equal(run(), plain), "the perturbation does nothing"
    around = {name: attached(heads) for name, heads in sets.items()}
    found = medians({"plain": run} | dict.fromkeys(sets, run), device, rounds, around)
    return {f"{name}_ms": value for name, value in found.items()} | {
        f"{name}_over_plain": found[name] / found["plain"] for name in sets
    }


@torch.no_grad()
def vit_sweep(device: str, small: bool, rounds: int, images: int, copies: int) -> dict[str, float]:
    """Every head of a ViT pruned alone: one forward per head against the resumed sweep."""
    from transformers import ViTConfig, ViTForImageClassification

    shape = (
        dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, image_size=64)
        if small
        else {}
    )
    torch.manual_seed(0)
    model = ViTForImageClassification._from_config(ViTConfig(num_labels=1000, **shape), attn_implementation="sdpa")
    model = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()
    stack, side = find_stack(model), model.config.image_size
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device, model.dtype)
    heads = [(l, h) for l in range(stack.layers) for h in range(stack.heads)]

    def one_by_one() -> Tensor:
        rows = []
        for pair in heads:
            with attach(model, edits=Edit.zero(HeadSet.of([pair]))):
                rows.append(model(pixel_values=pixels).logits)
        return torch.stack(rows)

    def resumed() -> Tensor:
        _, after, _ = sweep(model, pixels, copies=copies)
        return torch.cat([said.logits for said in after if said.logits is not None])

    gap = float((one_by_one().float() - resumed().float()).abs().max())
    assert gap < (0.1 if device == "cuda" else 1e-3), f"the sweep is {gap} off"
    found = medians({"one_by_one": one_by_one, "resumed": resumed}, device, rounds)
    return {
        "images": images,
        "heads": len(heads),
        "one_by_one_ms": found["one_by_one"],
        "resumed_ms": found["resumed"],
        "speedup": found["one_by_one"] / found["resumed"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("softpag", "transformer", "sweep", "all"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true", help="toy shapes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--copies", type=int, default=256, help="rows of a resumed pass")
    options = parser.parse_args()
    found: dict[str, Any] = {"environment": environment()}
    if options.what in ("softpag", "all"):
        found["softpag"] = softpag(options.device, options.small, options.rounds)
    if options.what in ("transformer", "all"):
        try:
            found["transformer"] = transformer(options.device, options.small, options.rounds)
        except ImportError:
            found["transformer"] = "needs diffusers: pip install 'headwise[vision]'"
    if options.what in ("sweep", "all"):
        found["sweep"] = [
            vit_sweep(options.device, options.small, options.rounds, n, options.copies) for n in options.images
        ]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
