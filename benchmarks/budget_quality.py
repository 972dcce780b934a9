"""What each planner's cache costs in quality, at equal bytes: recall and perplexity at 25, 50 and 75 % of the cache, beside controls.

    python benchmarks/budget_quality.py --device cuda                      # smollm2; minutes on a GPU, hours on a CPU
    python benchmarks/budget_quality.py --methods duo snapkv --budgets 25% --prompts 4 --tasks passkey      # a CPU

Every plan reads the same prompts through its cache. Controls: the inverse ranking and three random rankings of kv heads for
DuoAttention's split, random tokens for methods that choose tokens, StreamingLLM for windows. Prints a JSON object a plan as it
goes; a planner that refuses a budget gives its reason in the place of numbers. Rates are of answer tokens, with exact matches and
Wilson's interval.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import headwise
from headwise import HeadPlan, HeadScores, budget, score
from headwise.errors import HeadwiseError
from headwise.papers import environment
from headwise.tasks import english, exact_match, perplexity
from headwise.tasks.passkey import make_passkeys
from headwise.tasks.ruler import make_ruler
from headwise.tasks.texts import encode

SINKS, WINDOW = 16, 128  # of kv heads that DuoAttention lets stream
Maker = Callable[[str], HeadPlan]


def rankings(model: Any, tokenizer: Any, files: dict[str, str]) -> dict[str, HeadScores]:
    """The scores that planners need: instant gates, their inverse and random ones, retrieval, the probe; and those of the files."""
    options = {"sinks": SINKS, "window": WINDOW}
    instant = score.duo_instant(model, tokenizer, **options)
    draws = {f"random {seed}": _random(instant, seed) for seed in range(3)}
    made = {"instant": instant, "inverse": replace(instant, values=-instant.values), **draws}
    made["retrieval"] = score.retrieval(model, tokenizer, tests=12, length=512, success="any").to_kv(instant.units)
    made["induction"], made["echo"] = score.induction_and_echo(model, tokenizer, length=256, repeats=2)
    return made | {name: HeadScores.load(file) for name, file in files.items()}


def _random(scores: HeadScores, seed: int) -> HeadScores:
    drawn = torch.rand(scores.values.shape, generator=torch.Generator().manual_seed(seed))
    return replace(scores, values=drawn, method=f"random {seed}")


def planners(model: Any, made: dict[str, HeadScores], profile: Any, length: int) -> dict[str, Maker]:
    """Every planner by name, as a function of the budget alone."""
    duo = partial(budget.duo, context=length, sinks=SINKS, window=WINDOW)
    ranked = [name for name in made if name not in ("induction", "echo")]
    found: dict[str, Maker] = {
        "duo" if name == "instant" else f"duo, {name}": lambda b, s=made[name]: duo(s, budget=b)  # type: ignore[misc]
        for name in ranked
    }
    found["razor"] = lambda b: budget.razor(made["induction"], echo=made["echo"], budget=b, s0=128, context=length)
    if profile is not None:
        found["moa"] = lambda b: budget.moa(profile, budget=b, lengths=str(length))
    for name in ("task_kv", "snapkv", "adakv", "pyramidkv", "streaming_llm", "random"):
        extra = {"context": length, "beta": 0.25, "m": 0, "closest": False} if name == "task_kv" else {}
        method = partial(getattr(budget, name), model, **extra)
        found[name.replace("_", "-")] = lambda b, m=method: m(budget=b)  # type: ignore[misc]
    found["headkv"] = lambda b: budget.headkv(made["retrieval"], budget=b)
    return found


class Bench:
    """The prompts and the text, made once."""

    def __init__(self, model: Any, tokenizer: Any, given: argparse.Namespace):
        self.model, self.batch, self.length = model, given.batch_size, given.length
        self.prompts = {}
        for task in given.tasks:
            draw = torch.Generator().manual_seed(given.seed)
            how: dict[str, Any] = {"count": given.prompts, "length": given.length, "generator": draw}
            self.prompts[task] = (
                make_passkeys(tokenizer, **how) if task == "passkey" else make_ruler(tokenizer, task, **how)
            )
        self.tokens = given.text_tokens
        self.ids = encode(tokenizer, english("eval")[: 12 * self.tokens])[: self.tokens]

    def row(self, plan: HeadPlan | None) -> dict[str, Any]:
        """Recall of every task and perplexity under a plan, or of the model itself."""
        begin, found = time.monotonic(), {}
        handle = None if plan is None else headwise.attach(self.model, plan=plan)
        try:
            for task, prompts in self.prompts.items():
                got = exact_match(self.model, prompts, through="cache", batch_size=self.batch)
                found[task] = {"tokens": got.tokens, "exact": got.mean, "interval": got.interval}
            if self.tokens:
                text: dict[str, Any] = {"window": self.length, "tokens": self.tokens, "batch_size": self.batch}
                found["perplexity"] = perplexity(self.model, self.ids, through="cache", **text)
        finally:
            if handle is not None:
                handle.detach()
        share = 1.0 if plan is None else plan.ratio(self.length)
        return {**found, "share": share, "seconds": time.monotonic() - begin}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budgets", nargs="+", default=["25%", "50%", "75%"])
    parser.add_argument("--methods", nargs="+", help="names as they are printed; by default all")
    parser.add_argument("--tasks", nargs="*", default=["passkey", "multi-key", "multi-value", "variable-tracking"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--text-tokens", type=int, default=24576)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts; the text is the same")
    parser.add_argument("--profile", help="a file of headwise score moa-influence; without it MoA is left out")
    parser.add_argument("--scores", nargs="*", default=[], metavar="NAME=FILE", help="further rankings for duo")
    return parser.parse_args()


def main() -> None:
    """The model itself, then every planner at every budget."""
    given = arguments()
    model, tokenizer = headwise.load_model(given.model)
    model = model.to(given.device)
    profile = budget.InfluenceProfile.load(given.profile) if given.profile else None
    made = rankings(model, tokenizer, dict(one.split("=", 1) for one in given.scores))
    bench = Bench(model, tokenizer, given)
    print(json.dumps({"environment": environment(), **vars(given)}), flush=True)
    print(json.dumps({"planner": "untouched", **bench.row(None)}), flush=True)
    makers = planners(model, made, profile, given.length)
    for amount in given.budgets:
        for name, make in makers.items():
            if given.methods and name not in given.methods:
                continue
            label = {"planner": name, "budget": amount}
            try:
                row = bench.row(make(amount))
            except HeadwiseError as error:
                row = {"refused": str(error)}
            print(json.dumps(label | row), flush=True)


if __name__ == "__main__":
    main()
