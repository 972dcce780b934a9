"""What vision methods cost: SoftPAG against plain attention and against a materialised map; the sweep of all heads of a ViT.

    python benchmarks/vision.py softpag --device cuda              # SD3-medium's attention: 24 heads of 64, 4096 + 333 tokens, bf16
    python benchmarks/vision.py transformer --device cuda          # a whole SD3-medium-shaped transformer (needs diffusers)
    python benchmarks/vision.py sweep --device cuda --images 8     # ViT-B/16: 144 heads, one forward per head against the resumed sweep
    python benchmarks/vision.py all --small                        # the same on toy shapes, to see that it runs

The correctness gate runs first; times are medians over rounds in which all sides run in turn.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from timing import graphed
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
    sides: Sides,
    device: str,
    rounds: int,
    around: dict[str, Callable[[], Any]] | None = None,
    *,
    wait_after: bool = True,
) -> dict[str, float]:
    """Milliseconds of each side: median over rounds after one to warm up; `around` opens what a side stands in, untimed.

    Without `wait_after` only the host's time counts: what the device has still to do when the call returns does not.
    """
    opened = around or {}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, run in sides.items():
            with opened.get(name, nullcontext)():
                _wait(device)
                started = time.perf_counter()
                run()
                if wait_after:
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


SD3 = dict(sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096)
TOY = dict(sample_size=16, num_layers=24, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=64)


class Step:
    """One step of an SD3-shaped transformer with random weights, and the head sets that are perturbed in it."""

    def __init__(self, device: str, shape: dict[str, int]):
        from diffusers import SD3Transformer2DModel

        self.heads, self.layers, side = shape["num_attention_heads"], shape["num_layers"], shape["sample_size"]
        width = shape["attention_head_dim"] * self.heads
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        torch.manual_seed(0)
        options = dict(patch_size=2, in_channels=16, out_channels=16, pooled_projection_dim=64, pos_embed_max_size=192)
        with torch.device(device):
            model = SD3Transformer2DModel(**options, caption_projection_dim=width, **shape)
        self.model = model.to(dtype).eval()
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype)

        self.batch = {
            "hidden_states": random(1, 16, side, side),
            "encoder_hidden_states": random(1, 333, shape["joint_attention_dim"]),
            "pooled_projections": random(1, 64),
            "timestep": torch.tensor([500.0], device=device),
        }

    def __call__(self) -> Tensor:
        return self.model(**self.batch).sample

    def sides(self) -> dict[str, Callable[[], Any]]:
        """Nothing attached; an identity mix in all heads of one layer; in every fourth head of every layer."""
        H, L = self.heads, self.layers
        sets = {
            "one_layer": HeadSet.of([(L // 2, h) for h in range(H)]),
            "quarter": HeadSet.of([(l, h) for l in range(L) for h in range(0, H, 4)]),
        }
        around: dict[str, Callable[[], Any]] = {"plain": nullcontext}
        for name, heads in sets.items():
            around[name] = functools.partial(Perturbation(heads=heads, u=0.5).attached, self.model)
        return around


@torch.no_grad()
def transformer(device: str, small: bool, rounds: int) -> dict[str, Any]:
    """A step of an SD3-medium-shaped transformer: wall clock, host time of a toy of as many layers, and under CUDA graphs."""
    step = Step(device, TOY if small else SD3)
    around = step.sides()
    plain = step()
    for name in ("one_layer", "quarter"):
        with around[name]():
            assert not torch.equal(step(), plain), "the perturbation does nothing"
    found: dict[str, Any] = _over_plain(medians(dict.fromkeys(around, step), device, rounds, around))
    if device == "cuda":
        found["cuda_graph"] = _graphs(step, around, rounds)
    toy = Step(device, TOY)
    host = medians(dict.fromkeys(around, toy), device, 10 * rounds, toy.sides(), wait_after=False)
    added = {"one_layer": host["one_layer"] - host["plain"]}
    added["quarter_a_layer"] = (host["quarter"] - host["plain"]) / toy.layers
    found["host"] = {f"{name}_ms": ms for name, ms in host.items()} | {
        f"added_{name}_ms": ms for name, ms in added.items()
    }
    found["attach_ms"] = medians({"attach": lambda: step.sides()["one_layer"]().detach()}, device, rounds)["attach"]
    return found


def _over_plain(found: dict[str, float]) -> dict[str, float]:
    ratios = {f"{name}_over_plain": ms / found["plain"] for name, ms in found.items() if name != "plain"}
    return {f"{name}_ms": ms for name, ms in found.items()} | ratios


def _graphs(step: Step, around: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The same sides, each captured once as a CUDA graph and replayed: what the device alone takes."""
    graphs = {}
    for name, opened in around.items():
        with opened():
            graphs[name] = graphed(step)
    return _over_plain(medians(graphs, "cuda", rounds))


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
        "copies": copies,
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
    parser.add_argument("--copies", type=int, nargs="+", default=[256], help="rows of a resumed pass")
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
        found["sweep"] = []
        for n, c in itertools.product(options.images, options.copies):
            found["sweep"].append(vit_sweep(options.device, options.small, options.rounds, n, c))
            print(json.dumps(found), flush=True)  # what is there when a time limit ends the run
    print(json.dumps(found))


if __name__ == "__main__":
    main()
