"""Measured points of a cache: what was recalled, at what perplexity, with how many bytes. Only measured ones, never between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from headwise import storage
from headwise.errors import ArtifactError, ViewError
from headwise.plan import HeadPlan, SinkWindow
from headwise.report.chapters.cache import PlanRun, measure_plan
from headwise.report.chapters.text import held_out
from headwise.storage import StrPath, decoding
from headwise.tasks import even_depths, make_passkey
from headwise.units import HeadScores, HeadSet


@dataclass(frozen=True)
class Points:
    """Plans that were measured through the real cache, and how: `runs` by kind ("by score", "random", "the opposite", "full cache").

    `share` of a run is its bytes over those of the full cache, which is always among them.
    """

    runs: tuple[PlanRun, ...]
    how: str

    def __post_init__(self) -> None:
        if not any(run.kind == FULL for run in self.runs):
            raise ArtifactError("points need the run of the full cache, which all others are compared with")

    @property
    def full(self) -> PlanRun:
        """The run that keeps everything."""
        return next(run for run in self.runs if run.kind == FULL)

    def share(self, run: PlanRun) -> float:
        """Bytes of a run over those of the full cache."""
        return run.cache_bytes / self.full.cache_bytes

    def counts(self) -> list[int]:
        """The numbers of full kv heads that were measured, rising."""
        return sorted({run.full_heads for run in self.runs})

    def at(self, full_heads: int) -> list[PlanRun]:
        """The runs with so many full kv heads."""
        return [run for run in self.runs if run.full_heads == full_heads]

    def save(self, path: StrPath) -> None:
        """Write JSON."""
        storage.write_json(path, "cache-points", 1, {"runs": [asdict(run) for run in self.runs], "how": self.how})

    @classmethod
    def load(cls, path: StrPath) -> Points:
        """Read what `save` wrote. Raises ArtifactError."""
        document = storage.read_json(path, "cache-points", 1)
        with decoding(path):
            return cls(_runs(storage.field(document, "runs", list)), storage.field(document, "how", str))

    @classmethod
    def from_report(cls, findings: Mapping[str, Any], name: str) -> Points:
        """The points of a demo's report.json."""
        with decoding(name):
            rows = storage.field(findings, "budgets", list)
            rows = [{"tokens_per_s": 0.0, **row} if isinstance(row, dict) else row for row in rows]  # not in older ones
            return cls(_runs(rows), f"measured by the demo whose numbers {name} holds")

    def __str__(self) -> str:
        return f"{len(self.runs)} measured points at {self.counts()} full kv heads, {self.how}"


FULL = "full cache"
TYPES = {item.name: {"str": str, "int": int, "float": float}[str(item.type)] for item in fields(PlanRun)}


def _runs(rows: Sequence[Any]) -> tuple[PlanRun, ...]:
    if not all(isinstance(row, dict) for row in rows):
        raise ArtifactError("every point is an object")
    runs = tuple(PlanRun(**{name: storage.field(row, name, kind) for name, kind in TYPES.items()}) for row in rows)
    if any(run.cache_bytes < 1 or run.prompts < 1 or run.full_heads < 0 for run in runs):
        raise ArtifactError("a point has at least one byte, one prompt and no negative number of heads")
    return runs


def measure_points(
    model: Any,
    tokenizer: Any,
    scores: HeadScores,
    *,
    full_heads: Sequence[int],
    sinks: int = 16,
    window: int = 128,
    prompts: int = 4,
    length: int = 896,
    tokens: int = 1024,
    draws: int = 2,
    seed: int = 0,
    step: Callable[[str], None] | None = None,
) -> Points:
    """Recall and perplexity with so many kv heads full, the others streaming: chosen by score, by lot (`draws` times), the worst.

    Every point reads `prompts` passkeys of `length` tokens and `tokens` tokens of English through the plan's own cache. `step(kind)`
    is called before each. Raises ViewError for counts outside 0 to L · K.
    """
    kv = scores if scores.kind == "kv" else _to_kv(scores, model)
    counts = sorted(set(full_heads))
    if not counts or not 0 <= counts[0] <= counts[-1] <= len(kv):
        raise ViewError(f"full_heads is {list(full_heads)}; give numbers of kv heads from 0 to {len(kv)}")
    generator = torch.Generator().manual_seed(seed)
    depths = even_depths(prompts, 0.1, 0.7)  # outside of every window
    keys = [make_passkey(tokenizer, length=length, depth=depth, generator=generator) for depth in depths]
    text, stream = held_out(tokenizer, tokens), SinkWindow(sinks, window)

    def run(kind: str, keep: HeadSet) -> PlanRun:
        if step is not None:
            step(f"{kind}, {len(keep)} full")
        return measure_plan(model, HeadPlan.from_set(keep, stream, kv.layers, kv.units), kind, keys, text)

    everything = HeadSet.empty("kv").complement(kv.layers, kv.units)
    runs = [run(FULL, everything)]
    for count in (count for count in counts if count < len(kv)):
        runs += [run("by score", kv.top(count))]
        if count:
            runs += [run("the opposite", kv.bottom(count))]
            drawn = kv.random_sets(count, draws, generator=generator, exclude=HeadSet.empty("kv"))
            runs += [run("random", keep) for keep in drawn]
    how = (
        f"{prompts} passkeys of {length} tokens and {len(text)} tokens of English a point, others {stream}, "
        f"heads by {scores.method}, seed {seed}"
    )
    return Points(tuple(runs), how)


def _to_kv(scores: HeadScores, model: Any) -> HeadScores:
    from headwise.attach import fingerprint

    scores.check(found := fingerprint(model))
    return scores.to_kv(found.kv_heads, "max")
