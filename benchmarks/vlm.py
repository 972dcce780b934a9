"""Vision-language models: train the bundled scene models, and what VHR and VAR cost while generating.

    python benchmarks/vlm.py train OUT --size small --steps 4000 --seeds 0 1 2 --device cuda   # OUT/scene-vlm-<seed>, then reproduce
    python benchmarks/vlm.py overhead --device cuda        # LLaVA-1.5-7B's decoder shape, random weights, bfloat16
    python benchmarks/vlm.py overhead --layers 4 --width 256 --heads 8 --image 64 --tokens 16   # a CPU's size

Every ratio is the median over rounds in which all sides ran in turn; the gate (alpha = 1 and p = 0 change no token) runs first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from headwise.models.scene_vlm import save_scene_vlm, train_scene_vlm
from headwise.papers import environment
from headwise.steer.var import VAR
from headwise.steer.vhr import VHR, default_layers
from headwise.tasks.descriptions import describe
from headwise.tasks.scenes import make_scenes

IMAGE, TEXT = 999, 64


def train(args: argparse.Namespace) -> None:
    """Train and save one model a seed, and say how it describes unseen scenes and answers the other questions."""
    for seed in args.seeds:
        start = time.perf_counter()
        model = train_scene_vlm(
            args.size, steps=args.steps, seed=seed, pool=args.pool, device=args.device, progress=True
        )
        seconds = time.perf_counter() - start
        save_scene_vlm(model, Path(args.out) / f"scene-vlm-{seed}")
        generator = torch.Generator().manual_seed(99)
        habits = ("half", "broken")
        said = {
            habit: describe(model, make_scenes(400, habit=habit, generator=generator)).measures() for habit in habits
        }
        right = {task: accuracy(model, task, generator) for task in ("at", "count")}
        print(json.dumps({"seed": seed, "seconds": seconds, "describe": said, "right": right}, indent=1))


@torch.no_grad()
def accuracy(model: LlavaForConditionalGeneration, task: str, generator: torch.Generator) -> float:
    """Share of right first tokens."""
    scenes = make_scenes(400, task=task, generator=generator)  # type: ignore[arg-type]
    inputs = {key: value.to(model.device) for key, value in scenes.inputs().items()}
    first = model(**inputs).logits[:, -1].argmax(-1).cpu()
    return float((first == torch.tensor([answer[0] for answer in scenes.answers])).float().mean())


def shaped(args: argparse.Namespace) -> tuple[LlavaForConditionalGeneration, dict[str, torch.Tensor]]:
    """A LLaVA with random weights and a prompt of one image and 64 text tokens a row; the vision tower is a token one."""
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
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    with torch.device(args.device):
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype).eval()
    ids = torch.tensor([[1, *[IMAGE] * side**2, *range(2, 2 + TEXT)]]).repeat(args.batch, 1).to(args.device)
    pixels = torch.randn(args.batch, 3, 4 * side, 4 * side).to(args.device, dtype)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def overhead(args: argparse.Namespace) -> None:
    """Seconds of a prompt and of each further token: plain, under VHR, under VAR in every head of every middle layer."""
    torch.manual_seed(0)
    model, inputs = shaped(args)
    layers = tuple(range(2, args.layers - 1))
    # a tau so low that ordinary tokens are sinks: random weights have no massive activations, and this is the dearest case
    var = VAR(dims=(5,), tau=1.5, layers=layers, centric=False)
    rules: dict[str, Callable[[], AbstractContextManager]] = {
        "plain": nullcontext,
        "vhr": lambda: VHR(layers=default_layers(args.layers)).attach(model),
        "var": lambda: var.attach(model),
    }
    gate(model, inputs, layers, args.layers)
    times: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "token": []} for name in rules}
    for turn in range(args.rounds + 1):
        for name, rule in rules.items():
            with rule():
                one, many = (run(model, inputs, count, args.device) for count in (1, args.tokens))
            if turn:
                times[name]["prompt"].append(one)
                times[name]["token"].append((many - one) / (args.tokens - 1))
    medians = {name: {what: statistics.median(ts) for what, ts in parts.items()} for name, parts in times.items()}
    ratios = {
        name: {what: medians[name][what] / medians["plain"][what] for what in ("prompt", "token")}
        for name in ("vhr", "var")
    }
    print(
        json.dumps(
            {"seconds": medians, "ratio": ratios, "shape": vars(args) | {"run": None}, **environment()}, indent=1
        )
    )


def gate(model: LlavaForConditionalGeneration, inputs: dict, layers: tuple[int, ...], count: int) -> None:
    """Interventions that change nothing must change no logit."""
    with torch.no_grad():
        plain = model(**inputs, logits_to_keep=1).logits
        for rule in (VHR(layers=default_layers(count), alpha=1.0), VAR(dims=(5,), tau=1.5, layers=layers, move=0.0)):
            with rule.attach(model):
                assert torch.equal(plain, model(**inputs, logits_to_keep=1).logits), f"gate: {rule} changes the output"


def run(model: LlavaForConditionalGeneration, inputs: dict, tokens: int, device: str) -> float:
    """Seconds of generating so many tokens."""
    start = clock(device)
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return clock(device) - start


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
    trainer = commands.add_parser("train")
    trainer.add_argument("out")
    trainer.add_argument("--size", default="small")
    trainer.add_argument("--steps", type=int, default=4000)
    trainer.add_argument("--pool", type=int, default=20000)
    trainer.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    trainer.set_defaults(run=train)
    timer = commands.add_parser("overhead")
    for name, value in (("layers", 32), ("width", 4096), ("heads", 32), ("image", 576), ("batch", 1), ("tokens", 128)):
        timer.add_argument(f"--{name}", type=int, default=value)
    timer.add_argument("--rounds", type=int, default=5)
    timer.set_defaults(run=overhead)
    for command in (trainer, timer):
        command.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
