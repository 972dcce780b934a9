"""Vision-language models: what VHR and VAR cost while an answer is written.

    python benchmarks/vlm.py overhead --device cuda        # LLaVA-1.5-7B's decoder shape, random weights, bfloat16
    python benchmarks/vlm.py overhead --layers 4 --width 256 --heads 8 --image 64 --tokens 16 --batch 1   # a CPU's size
    python benchmarks/vlm.py kernel                        # VAR's kernel by block, warps and shares, beside the plain decode kernel
    python benchmarks/vlm.py launches --device cuda        # what a decode step launches more, or less, than a plain one

Every ratio is the median over rounds in which all sides ran in turn; the gate (alpha = 1 and p = 0 change no logit, a graph says what the
plain steps say) runs first. On a GPU the sides `graph_…` run their decode steps as CUDA graphs beside a full plan; their ratios are to
`graph_plain`. A line of JSON after every batch holds all that came before it.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from timing import clock
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from headwise.attach import HeadCall, attach
from headwise.attach.images import InLayers, decoder_stack
from headwise.papers import environment
from headwise.plan import HeadPlan
from headwise.steer import _var_rows
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
    layers, rules = middle(args), the_rules(model, args)
    if args.device == "cuda" and not args.skip_graph:
        rules |= {f"graph_{name}": functools.partial(in_graphs, model, args, rule) for name, rule in rules.items()}
    if args.map:
        rules["map"] = lambda: attach(model, transforms=[InLayers(by_map, layers)], stack=decoder_stack(model))
    found: dict[str, object] = {
        "shape": {k: v for k, v in vars(args).items() if k != "run"},
        "environment": environment(),
    }
    for batch in args.batch:
        inputs = prompt(args, batch)
        gate(model, inputs, layers, args.layers)
        gaps = graph_gaps(model, inputs, rules, args) if "graph_plain" in rules else {}
        found[f"batch_{batch}"] = measured(model, inputs, rules, args) | gaps
        print(json.dumps(found), flush=True)


def middle(args: argparse.Namespace) -> tuple[int, ...]:
    """The layers of VAR: all but the first two and the last."""
    return tuple(range(2, args.layers - 1))


def the_rules(
    model: LlavaForConditionalGeneration, args: argparse.Namespace
) -> dict[str, Callable[[], AbstractContextManager]]:
    """The sides: nothing, VHR, VAR in every head of every middle layer."""
    # a tau so low that ordinary tokens are sinks: random weights have no massive activations, and this is the dearest case
    var = VAR(dims=(5,), tau=1.5, layers=middle(args), centric=False)
    return {
        "plain": nullcontext,
        "vhr": lambda: VHR(layers=default_layers(args.layers)).attach(model),
        "var": lambda: var.attach(model),
    }


@contextmanager
def in_graphs(
    model: LlavaForConditionalGeneration, args: argparse.Namespace, rule: Callable[[], AbstractContextManager]
) -> Iterator[None]:
    """A rule beside a full plan, whose decode steps are replayed as CUDA graphs."""
    plan, stack = HeadPlan.full(layers=args.layers, kv_heads=args.heads), decoder_stack(model)
    with attach(model, plan=plan, stack=stack, capture=True) as attached, rule():
        yield
        capture = attached.controller._capture
        assert capture is not None and capture.replays > args.tokens // 2, f"no graphs: {capture and capture.refused}"


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
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with rule():
                spent, steps = one_answer(model, inputs, args)
            if turn and args.device == "cuda":
                times[name].setdefault("peak", []).append(torch.cuda.max_memory_allocated() / 2**30)
            if turn:
                times[name]["prompt"].append(1000 * spent)
                times[name]["token"] += [1000 * s for s in steps[4:]]  # the first ones set up and capture
    units = {"peak": "peak_gib"}
    found = {
        name: {units.get(what, f"{what}_ms"): statistics.median(ts) for what, ts in parts.items()}
        for name, parts in times.items()
    }
    for name, parts in found.items():
        base = found["graph_plain" if name.startswith("graph_") and name != "graph_plain" else "plain"]
        if parts is not base:
            parts |= {f"{w}_ratio": parts[f"{w}_ms"] / base[f"{w}_ms"] for w in ("prompt", "token")}
    return found


@torch.no_grad()
def one_answer(
    model: LlavaForConditionalGeneration, inputs: dict, args: argparse.Namespace, said: list | None = None
) -> tuple[float, list[float]]:
    """Seconds of the prompt and of each of the tokens that follow, one call of the model each; `said` gets the logits, of forced tokens."""
    begun = clock(args.device)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    prompt_s, steps = clock(args.device) - begun, []
    mask, cache = inputs["attention_mask"], out.past_key_values
    for step in range(args.tokens):
        begun = clock(args.device)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        ids = out.logits[:, -1:].argmax(-1).clamp(max=IMAGE - 1)
        if said is not None:
            said.append(out.logits[:, -1].float())
            ids = torch.full_like(ids, 20 + step)
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


@torch.no_grad()
def kernel(args: argparse.Namespace) -> None:
    """Microseconds of VAR's kernel by addresses, by block, warps and shares, beside plain decode; many launches replayed as a graph."""
    found: dict[str, Any] = {"environment": environment()}
    for B, M in ((1, 700), (8, 700), (1, 2500)):
        call, codes = one_call(B, args.heads, M), torch.zeros(B, M, dtype=torch.uint8, device="cuda")
        codes[:, 1:577], codes[:, 3] = 1, 3
        usual = _var_rows.Room.of(call.q, args.heads).shares
        tiles = [(block, 4, usual) for block in (32, 64, 128)] + [(64, warps, usual) for warps in (2, 8)]
        tiles += [(64, 4, shares) for shares in sorted({max(1, usual // 2), 2 * usual} - {usual})]
        times = found[f"rows {B}, keys {M}"] = {"plain decode": round(replayed(ragged(call)), 2)}
        for block, warps, shares in tiles:
            step = with_tiles(block, warps, shares, call, codes)
            times[f"block {block}, warps {warps}, shares {shares}"] = round(replayed(functools.partial(step, call)), 2)
        print(json.dumps(found), flush=True)


@torch.no_grad()
def launches(args: argparse.Namespace) -> None:
    """By kernel (on a CPU: by operation), how many more a decode step of all layers launches under a rule than the plain one."""
    torch.manual_seed(0)
    model, counts = shaped(args), {}
    for name, rule in the_rules(model, args).items():
        with rule():
            one_answer(model, inputs := prompt(args, 1), args)
            out = model(**inputs, use_cache=True)
            ids, mask = torch.full_like(inputs["input_ids"][:, :1], 20), inputs["attention_mask"]
            for step in range(2):
                mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
                with torch.profiler.profile() if step else nullcontext() as seen:
                    out = model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values)
        kind = torch.autograd.DeviceType.CUDA if args.device == "cuda" else torch.autograd.DeviceType.CPU
        counts[name] = Counter(event.name for event in seen.events() if event.device_type == kind)
    plain = counts["plain"]
    found = {"layers": args.layers, "plain": plain.total(), "environment": environment()}
    for name, count in counts.items():
        if name != "plain":
            found[name] = {k: count[k] - plain[k] for k in sorted({*count, *plain}) if count[k] != plain[k]}
    print(json.dumps(found), flush=True)


def graph_gaps(
    model: LlavaForConditionalGeneration,
    inputs: dict,
    rules: dict[str, Callable[[], AbstractContextManager]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """How far replayed steps are from plain ones, relative to the logits: rounding of another kernel, through 32 random layers."""
    gaps: dict[str, float] = {}
    for name in ("plain", "vhr", "var"):
        said: list[list[torch.Tensor]] = [[], []]
        for rule, into in zip((rules[name], rules[f"graph_{name}"]), said, strict=True):
            with rule():
                one_answer(model, inputs, args, into)
        plain, graph = (torch.stack(part) for part in said)
        gaps[name] = float((plain - graph).norm() / plain.norm())
        assert gaps[name] < 0.3, f"gate: graphs of {name} are {gaps[name]} off"  # a stale graph is 1 off
    return {"graph_gap": gaps}


def one_call(B: int, H: int, M: int, D: int = 128) -> Any:
    """A decode step of one layer, its keys behind addresses."""
    from headwise.attention.triton.decode import group_pointers

    q, k, v = (torch.randn(B, H, n, D, device="cuda", dtype=torch.bfloat16) for n in (1, M, M))
    k_ptr, v_ptr, filled = group_pointers([(tuple(range(H)), k, v, M)], B, q.device)
    table = SimpleNamespace(k_ptr=k_ptr, v_ptr=v_ptr, filled=filled)
    return SimpleNamespace(q=q, k=k, v=v, mask=None, table=table, scale=D**-0.5, first_column=0)


def ragged(call: Any) -> Callable[[], object]:
    """The same step without VAR, by the kernel that a plan uses; the work is cut once a step for all layers, so outside."""
    from headwise.attention.triton import ragged_decode
    from headwise.attention.triton.decode import plan_splits

    table = call.table
    options = {"scale": call.scale, "plan": plan_splits(table.filled)}
    return functools.partial(ragged_decode, call.q, table.k_ptr, table.v_ptr, table.filled, **options)


def with_tiles(block: int, warps: int, shares: int, call: Any, codes: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """VAR's step with other tiles, compiled."""
    kept = _var_rows.BLOCK, _var_rows.WARPS
    _var_rows.BLOCK, _var_rows.WARPS = block, warps
    try:
        room = _var_rows.Room.of(call.q, call.k.shape[1], shares)
        count = torch.zeros((), dtype=torch.long, device=call.q.device)
        step = _var_rows.Step(call, codes, None, count, room, move=0.6, rho=0.2, minimum_mass=0.2)
        step(call)
    finally:
        _var_rows.BLOCK, _var_rows.WARPS = kept
    return step


def replayed(run: Callable[[], object], launches: int = 50, rounds: int = 5) -> float:
    """Microseconds of one call, from graphs of many."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            run()
    graph.replay()
    times = []
    for _ in range(rounds):
        begun = clock("cuda")
        graph.replay()
        times.append(clock("cuda") - begun)
    return 1e6 * statistics.median(times) / launches


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    timer, counter = commands.add_parser("overhead"), commands.add_parser("launches")
    for name, value in (("layers", 32), ("width", 4096), ("heads", 32), ("image", 576), ("tokens", 24), ("rounds", 3)):
        for command in (timer, counter):
            command.add_argument(f"--{name}", type=int, default=value)
    for command in (timer, counter):
        command.add_argument("--device", default="cpu")
    counter.set_defaults(run=launches)
    timer.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    timer.add_argument(
        "--map", action="store_true", help="beside the released code's way, which edits whole attention maps"
    )
    timer.add_argument("--skip-graph", action="store_true", help="leave out the sides that replay CUDA graphs")
    timer.set_defaults(run=overhead)
    tiles = commands.add_parser("kernel")
    tiles.add_argument("--heads", type=int, default=32)
    tiles.set_defaults(run=kernel)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
