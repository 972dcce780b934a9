"""Conversion to mixture-of-head attention without training: perplexity on three kinds of text and passkeys, by options of the fit.

usage: PYTHONPATH=src python benchmarks/moh_conversion.py [--model smollm2] [--out folder] [--seeds 3] [--quick] [--only "queries, zero" …]

One fit serves every number of heads. The fit reads English and source code; "stories" is narrative, of another kind; English and
code are other documents. Writes folder/moh_conversion.json after each case; no weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from headwise.attach import attach
from headwise.hub import load_model
from headwise.route import HeadRouter, moh
from headwise.route._fit_steps import Fit, FitRecipe, fit_heads
from headwise.tasks import code, english, exact_match, make_passkeys, perplexity, stories
from headwise.tasks.texts import encode

BEST: dict[str, Any] = {"target": "importance", "allocate": "sensitivity", "text": "mixed", "tokens": 16384}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # features of the router, options of the fit
    "default": ("hidden", {"target": "norm", "text": "english", "tokens": 20480}),
    "hidden, zero": ("hidden", BEST),
    "queries, zero": ("queries", BEST),
    "hidden, rest": ("hidden", BEST | {"absent": "rest"}),
    "queries, rest": ("queries", BEST | {"absent": "rest"}),
    "queries, rest, 2 rounds": ("queries", BEST | {"absent": "rest", "rounds": 2}),
    "queries, rest, norm": ("queries", BEST | {"absent": "rest", "target": "norm"}),
    "queries, rest, 49k tokens": ("queries", BEST | {"absent": "rest", "tokens": 49152}),
}
SHARES = (7 / 9, 6 / 9, 5 / 9, 0.5)


def main() -> None:
    """Fit, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", default=".")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the case 'queries, rest'; the others run once")
    parser.add_argument("--only", nargs="*", help="these cases, the first with further seeds; all by default")
    parser.add_argument("--tokens", type=int, help="tokens of each fit, instead of the case's")
    parser.add_argument("--quick", action="store_true", help="few tokens: to see that it runs")
    args = parser.parse_args()
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(args.model, dtype="float32", device=device)
    measure = Measure(model, tokenizer, tokens=1024 if args.quick else 16384, passkeys=2 if args.quick else 20)
    found: dict[str, Any] = {"dense": measure(None), "cases": {}}
    print("dense", found["dense"], flush=True)
    place = Path(args.out) / "moh_conversion.json"
    for name, features, options in cases(args.seeds, args.only):
        tokens = 1024 if args.quick else args.tokens
        options = options | ({"tokens": tokens} if tokens else {})
        fitted = fit_heads(model, tokenizer, FitRecipe(features=features, **options))
        routers = {share: _router(fitted, share) for share in SHARES}
        if options.get("rounds", 1) > 1:  # a second round is of one number of heads
            routers = {
                share: _refitted(r, model, tokenizer, options | {"features": features}) for share, r in routers.items()
            }
        rows = {f"{share:.3f}": measure(router) for share, router in routers.items()}
        if name == "queries, rest":  # at low shares the sum of costs may starve a layer
            for share, least in ((5 / 9, 1), (5 / 9, 3), (0.5, 1), (0.5, 3)):
                rows[f"{share:.3f}, least {least}"] = measure(_router(fitted, share, least))
        heads = {f"{share:.3f}": r.active_counts() for share, r in routers.items()}
        found["cases"][name] = {"features": features, **options, "fit": fitted.found, "at": rows, "heads": heads}
        print(name, json.dumps(rows), flush=True)
        write(place, found, device, started)


def write(place: Path, found: dict[str, Any], device: str, started: float) -> None:
    """What there is so far: a run that is cut off leaves its cases."""
    found["environment"] = {"torch": torch.__version__, "transformers": transformers.__version__, "device": device}
    if device == "cuda":
        found["environment"]["device"] = torch.cuda.get_device_name()
    found["seconds"] = round(time.monotonic() - started, 1)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {place}, {found['seconds']} s", flush=True)


def cases(seeds: int, only: list[str] | None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every case once, and one of them with further seeds."""
    names = only or list(CASES)
    for name in names:
        yield name, *CASES[name]
    name = names[0] if only else "queries, rest"
    features, options = CASES[name]
    for seed in range(1, seeds):
        yield f"{name}, seed {seed}", features, options | {"seed": seed}


def _refitted(first: HeadRouter, model: Any, tokenizer: Any, options: dict[str, Any]) -> HeadRouter:
    """The second round: everything measured once more under the router of the first."""
    total, heads = sum(first.active_counts()), sum(route.heads for route in first.config.layers)
    names = {"tokens": "fit_tokens", "text": "fit_text", "rounds": "fit_rounds"}
    return moh(
        model, tokenizer, router="fitted", active=total / heads, **{names.get(n, n): v for n, v in options.items()}
    )


def _router(fitted: Fit, share: float, least: int = 2) -> HeadRouter:
    L, H = len(fitted.router.config.layers), fitted.router.config.layers[0].heads
    total = round(share * L * H)
    if fitted.costs is None:
        return fitted.uniform(round(share * H))
    return fitted.dealt(total, least=least)


class Measure:
    """Perplexities by kind of text, and passkeys found, of a model with a router or without."""

    def __init__(self, model: Any, tokenizer: Any, *, tokens: int, passkeys: int):
        self.model = model
        texts = {"english": english("eval"), "code": code("eval"), "stories": "\n\n".join(stories())}
        self.ids = {name: torch.tensor(encode(tokenizer, text))[:tokens] for name, text in texts.items()}
        context = getattr(model.config, "max_position_embeddings", None) or model.config.n_positions
        self.window = min(512, context)
        self.prompts = {
            length: make_passkeys(
                tokenizer, count=passkeys, length=length, generator=torch.Generator().manual_seed(length)
            )
            for length in (512, 1024, 2048)
            if passkeys and length + 16 <= context
        }

    def __call__(self, router: HeadRouter | None) -> dict[str, float]:
        if router is None:
            return self._figures()
        with attach(self.model, router=router):
            return self._figures()

    def _figures(self) -> dict[str, float]:
        found = {
            f"ppl_{name}": perplexity(self.model, ids, window=self.window, tokens=len(ids), batch_size=8)
            for name, ids in self.ids.items()
        }
        found |= {
            f"passkey_{n}": exact_match(self.model, prompts, batch_size=4).mean for n, prompts in self.prompts.items()
        }
        return found


if __name__ == "__main__":
    main()
