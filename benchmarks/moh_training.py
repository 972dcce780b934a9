"""Mixture-of-head attention on a GPU: a language model from scratch, and the recovery of a converted one, beside dense controls.

usage: PYTHONPATH=src python benchmarks/moh_training.py lm|recover [--model smollm2] [--out folder] [--size gpu] [--steps N] [--seed N]
       [--teacher W] [--text library] [--also 0.5] [--beta B] [--ste selected|all|none] [--absent rest|zero]

lm: 12 layers of width 768 from scratch, dense, 75 % and 50 % of the heads, same starting weights and rows.
recover: the model converted to 75 % and another share of its heads by the fitted router, and the dense model, trained on the same rows.
Writes folder/moh_<part>[_<label>].json: settings, curves and figures of every arm; no weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from moh_conversion import BEST, Measure

from headwise.route import train_moh_lm, train_moh_recover
from headwise.route._fit_steps import FitRecipe, fit_heads


def lm(args: argparse.Namespace) -> dict:
    """Two runs of the recipe: 75 % with the dense control, 50 % without (it would be the same)."""
    found = {}
    for active, control in ((0.75, True), (0.5, False)):
        trained = train_moh_lm(
            size=args.size, active=active, control=control, steps=args.steps, seed=args.seed, progress=args.progress
        )
        print(trained, flush=True)
        for arm, figures in trained.measured.items():
            name = "dense" if arm == "dense" else f"routed_{active:g}"
            found[name] = figures | {"held_out_curve": trained.curves[arm].held_out}
        found["settings"] = trained.settings
        if control:
            found["dense_converted"] = converted(trained.students["dense"].model, trained.tokenizer)
    return found


def converted(model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """The dense model that was just trained, converted without further training: perplexity of a byte by kind of text."""
    measure = Measure(model, tokenizer, tokens=16384, passkeys=0)
    fitted = fit_heads(model, tokenizer, FitRecipe(features="queries", absent="rest", **BEST))
    total = sum(route.heads for route in fitted.router.config.layers)
    rows = {"dense": measure(None)}
    return rows | {f"{share:.3f}": measure(fitted.dealt(round(share * total))) for share in (0.75, 2 / 3, 0.5)}


def recover(args: argparse.Namespace) -> dict:
    """One run of the recipe with both shares."""
    trained = train_moh_recover(
        model=args.model,
        size=args.size,
        active=0.75,
        also=args.also or None,
        teacher=args.teacher,
        beta=args.beta,
        ste_scope=args.ste,
        absent=args.absent,
        text=args.text,
        steps=args.steps,
        seed=args.seed,
        progress=args.progress,
    )
    print(trained, flush=True)
    names = {"dense": "dense", "routed": "routed_0.75", "also": f"routed_{args.also:g}"}
    found = {names[a]: m | {"held_out_curve": trained.curves[a].held_out} for a, m in trained.measured.items()}
    heads = {names[a]: s.router.active_counts() for a, s in trained.students.items() if s.router is not None}
    return found | {"settings": trained.settings, "heads": heads}


PARTS = {"lm": lm, "recover": recover}


def main() -> None:
    """Run one part and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", default=".")
    parser.add_argument("--size", default="gpu", choices=("cpu", "gpu"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher", type=float, default=0.0)
    parser.add_argument("--also", type=float, default=0.5, help="a second share of the heads; 0 for none")
    parser.add_argument("--beta", type=float, default=0.01)
    parser.add_argument("--ste", default="selected", choices=("selected", "all", "none"))
    parser.add_argument("--absent", default="rest", choices=("rest", "zero"))
    parser.add_argument("--text", default="library", choices=("english", "mixed", "library"))
    parser.add_argument("--label", default="")
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args()
    started = time.monotonic()
    found = PARTS[args.part](args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found["environment"] = {"torch": torch.__version__, "transformers": transformers.__version__, "device": device}
    found["seconds"] = round(time.monotonic() - started, 1)
    name = f"moh_{args.part}" + (f"_{args.label}" if args.label else "")
    place = Path(args.out) / f"{name}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {place}, {found['seconds']} s")


if __name__ == "__main__":
    main()
