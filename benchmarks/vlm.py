"""Vision-language models: what VHR and VAR cost while an answer is written.

    python benchmarks/vlm.py overhead --device cuda        # LLaVA-1.5-7B's decoder shape, random weights, bfloat16
    python benchmarks/vlm.py overhead --layers 4 --width 256 --heads 8 --image 64 --tokens 16 --batch 1   # a CPU's size

Every ratio is the median over rounds in which all sides ran in turn; the gate (alpha = 1 and p = 0 change no token) runs first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from headwise.attach import HeadCall, attach
from headwise.attach.images import InLayers, decoder_stack
from headwise.papers import environment
from headwise.steer.var import VAR, redistribute_map
from headwise.steer.vhr import VHR, default_layers

IMAGE, TEXT = 999, 64
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def shaped(args: argparse.Namespace) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights; the vision tower is a token one."""
    side = round(args.image**0.5)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=4 * side,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=1000,
        hidden_size=args.width,
        intermediate_size=int(2.6875 * args.width),
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=4096,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=side**2, vision_feature_layer=-1
    )
    dtype = DTYPES[args.device]
    with torch.device(args.device):
        return LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


def prompt(args: argparse.Namespace, batch: int) -> dict[str, torch.Tensor]:
    """One image and 64 text tokens a row."""
    side = round(args.image**0.5)
    ids = torch.tensor([[1, *[IMAGE] * side**2, *range(2, 2 + TEXT)]]).repeat(batch, 1).to(args.device)
    pixels = torch.randn(batch, 3, 4 * side, 4 * side).to(args.device, DTYPES[args.device])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def overhead(args: argparse.Namespace) -> None:
    """Seconds of a prompt and of each further token: plain, under VHR, under VAR in every head of every middle layer."""
    torch.manual_seed(0)
    model = shaped(args)
    layers = tuple(range(2, args.layers - 1))
    # a tau so low that ordinary tokens are sinks: random weights have no massive activations, and this is the dearest case
    var = VAR(dims=(5,), tau=1.5, layers=layers, centric=False)
    rules: dict[str, Callable[[], AbstractContextManager]] = {
        "plain": nullcontext,
        "vhr": lambda: VHR(layers=default_layers(args.layers)).attach(model),
        "var": lambda: var.attach(model),
    }
    if not args.skip_map:
        rules["map"] = lambda: attach(model, transforms=[InLayers(by_map, layers)], stack=decoder_stack(model))
    found: dict[str, object] = {
        "shape": {k: v for k, v in vars(args).items() if k != "run"},
        "environment": environment(),
    }
    for batch in args.batch:
        inputs = prompt(args, batch)
        gate(model, inputs, layers, args.layers)
        found[f"batch_{batch}"] = measured(model, inputs, rules, args)
    print(json.dumps(found, indent=1))


def measured(
    model: LlavaForConditionalGeneration,
    inputs: dict,
    rules: dict[str, Callable[[], AbstractContextManager]],
    args: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Median milliseconds of the prompt and of a decode step, and their ratios to plain; the sides run in turn."""
    times: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "token": []} for name in rules}
    for turn in range(args.rounds + 1):
        for name, rule in rules.items():
            with rule():
                spent, steps = one_answer(model, inputs, args)
            if turn:
                times[name]["prompt"].append(1000 * spent)
                times[name]["token"] += [1000 * s for s in steps]
    found = {name: {f"{w}_ms": statistics.median(ts) for w, ts in parts.items()} for name, parts in times.items()}
    for name, parts in found.items():
        if name != "plain":
            parts |= {f"{w}_ratio": parts[f"{w}_ms"] / found["plain"][f"{w}_ms"] for w in ("prompt", "token")}
    return found


@torch.no_grad()
def one_answer(
    model: LlavaForConditionalGeneration, inputs: dict, args: argparse.Namespace
) -> tuple[float, list[float]]:
    """Seconds of the prompt and of each of the tokens that follow, one call of the model each."""
    begun = clock(args.device)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    prompt_s, steps = clock(args.device) - begun, []
    mask, cache = inputs["attention_mask"], out.past_key_values
    for _ in range(args.tokens):
        begun = clock(args.device)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        ids = out.logits[:, -1:].argmax(-1).clamp(max=IMAGE - 1)
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        steps.append(clock(args.device) - begun)
    return prompt_s, steps


def by_map(call: HeadCall, attend: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What the released code does, for comparison: all attention weights of a layer in float32, edited, times V."""
    logits = (call.q @ call.k.mT).float() * call.scale
    if call.mask is not None:
        logits = logits.masked_fill(~call.mask, -torch.inf)
    elif call.q.shape[2] > 1:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], device=logits.device).triu(1).bool(), -torch.inf)
    keys = torch.arange(call.k.shape[2], device=call.q.device)[None].expand(len(call.q), -1)
    edited = redistribute_map(logits.softmax(-1), keys < 577, (keys > 0) & (keys < 4), centric=False)
    return (edited.to(call.v.dtype) @ call.v).transpose(1, 2)


def gate(model: LlavaForConditionalGeneration, inputs: dict, layers: tuple[int, ...], count: int) -> None:
    """Interventions that change nothing must change no logit."""
    with torch.no_grad():
        plain = model(**inputs, logits_to_keep=1).logits
        for rule in (VHR(layers=default_layers(count), alpha=1.0), VAR(dims=(5,), tau=1.5, layers=layers, move=0.0)):
            with rule.attach(model):
                assert torch.equal(plain, model(**inputs, logits_to_keep=1).logits), f"gate: {rule} changes the output"


def clock(device: str) -> float:
    """Seconds, after all work on the device is done; on one CPU thread its own, so that other work does not count."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    timer = commands.add_parser("overhead")
    for name, value in (("layers", 32), ("width", 4096), ("heads", 32), ("image", 576), ("tokens", 24), ("rounds", 5)):
        timer.add_argument(f"--{name}", type=int, default=value)
    timer.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    timer.add_argument("--device", default="cpu")
    timer.add_argument("--skip-map", action="store_true", help="leave out the side that edits whole attention maps")
    timer.set_defaults(run=overhead)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
