"""The story that `headwise demo` tells on a real language model, from scores to a report.

    score the heads -> ablate them -> plan a KV cache -> read and write under it -> route the heads

Each chapter measures with the library's public functions and gives a `Section`; the numbers also go to report.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from headwise.hub import load_model
from headwise.papers import environment
from headwise.report import chapters
from headwise.report.page import Card, Section, render
from headwise.storage import write_plain_json

TITLE = "What the heads of a language model do"
LEAD = (
    "SmolLM2-135M has 270 attention heads. A few of them copy what the model retrieves. This page finds them, proves that "
    "they are the ones, gives only them a full KV cache, and lets every token choose its heads. Every number was measured "
    "on this machine a moment ago."
)


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    score_tests: int = 6
    prompts: int = 4
    length: int = 448
    out: tuple[int, ...] = (1, 3)
    random_draws: int = 3
    gate_length: int = 640
    plan_prompts: int = 3
    plan_length: int = 896
    full_heads: tuple[int, ...] = (9, 23)
    plan_draws: int = 2
    perplexity_tokens: int = 640
    moh_tokens: int = 512
    moh_heads: tuple[int, ...] = (7, 5)
    fit_tokens: int = 4096
    recovery_steps: int = 8
    recovery_window: int = 256
    seed: int = 0

    @classmethod
    def quick(cls) -> Settings:
        """A first look: fewer prompts, shorter texts."""
        return cls(
            score_tests=3,
            prompts=2,
            out=(3,),
            random_draws=1,
            gate_length=448,
            plan_prompts=2,
            plan_length=512,
            full_heads=(23,),
            plan_draws=1,
            perplexity_tokens=512,
            moh_tokens=512,
            moh_heads=(7,),
            fit_tokens=2048,
            recovery_steps=3,
        )


@dataclass
class Story:
    """What the chapters share: the model, what was found so far, and where files go."""

    model: Any
    tokenizer: Any
    settings: Settings
    folder: Path
    name: str = "smollm2"
    findings: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    cards: list[Card] = field(default_factory=list)


def run(out: Path, *, quick: bool = False, progress: bool = False, model: str = "smollm2") -> Path:
    """Tell the story on a bundled model; writes report.html, report.json and the artifacts to `out`, returns the page's path."""
    begun = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings.quick() if quick else Settings()
    with _stage(f"loading {model}", progress):
        loaded, tokenizer = load_model(model, dtype=faster_dtype())
    story = Story(loaded, tokenizer, settings, out, name=model)
    sections: list[Section] = []
    seconds: dict[str, float] = {}
    for title, chapter in CHAPTERS.items():
        start = time.perf_counter()
        with _stage(title, progress):
            sections.append(chapter(story))
        seconds[title] = time.perf_counter() - start
    total = time.perf_counter() - begun
    facts = [("model", model), ("numbers in", str(loaded.dtype).removeprefix("torch."))]
    facts += [(k, v) for k, v in environment().items()] + [("seed", str(settings.seed)), ("took", f"{total:.0f} s")]
    page = out / "report.html"
    page.write_text(render(TITLE, LEAD, cards=story.cards, sections=sections, facts=facts), encoding="utf-8")
    found = {"environment": environment(), "seconds": seconds, "findings": story.findings}
    write_plain_json(out / "report.json", json.loads(json.dumps(found, default=float)))
    return page


CHAPTERS: dict[str, Callable[[Story], Section]] = {
    "scoring 270 heads": chapters.scores,
    "ablating heads": chapters.ablation,
    "planning the cache": chapters.plan,
    "reading under budgets": chapters.budgets,
    "writing under a plan": chapters.generation,
    "routing heads": chapters.routing,
}


def faster_dtype() -> torch.dtype:
    """float32, or bfloat16 where this processor multiplies it faster (measured, a tenth of a second)."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(256, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype))
        a @ b
        start = time.perf_counter()
        for _ in range(20):
            a @ b
        seconds[dtype] = time.perf_counter() - start
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else torch.float32


@contextmanager
def _stage(title: str, progress: bool) -> Iterator[None]:
    """A line that spins while a chapter runs and says how long it took."""
    if not progress:
        yield
        return
    from rich.console import Console

    console = Console(stderr=True)
    start = time.perf_counter()
    with console.status(f"{title} …"):
        yield
    console.print(f"[green]✓[/] {title} [dim]{time.perf_counter() - start:.1f} s[/]")
