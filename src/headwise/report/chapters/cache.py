"""From scores to a KV plan; what it recalls, what it costs, what it frees."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

import headwise
from headwise.arguments import cache_argument, cache_of
from headwise.budget.duo import duo
from headwise.cache import HeadwiseCache
from headwise.plan import HeadPlan, SinkWindow
from headwise.report import figures
from headwise.report.chapters.text import held_out
from headwise.report.figures import COLOURS, Line
from headwise.report.page import Card, Section, Table
from headwise.score.duo import duo_instant
from headwise.tasks import Prompt, even_depths, exact_match, make_passkey, perplexity
from headwise.units import HeadScores, HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.report.demo import Story

STREAM = SinkWindow(sinks=16, window=128)


@dataclass(frozen=True)
class PlanRun:
    """One plan, measured: recall of prompts and perplexity through the real cache, and its bytes."""

    kind: str
    full_heads: int
    exact: float
    tokens: float
    prompts: int
    perplexity: float
    cache_bytes: int
    tokens_per_s: float


def plan(story: Story) -> Section:
    """One backward pass asks which kv heads the answer needs; the best quarter keeps everything."""
    s = story.settings
    kv = duo_instant(
        story.model, story.tokenizer, length=s.gate_length, sinks=STREAM.sinks, window=STREAM.recent, seed=s.seed
    )
    kv.save(story.folder / "gates.safetensors")
    chosen = duo(kv, sparsity=0.75, sinks=STREAM.sinks, window=STREAM.recent)
    chosen.save(story.folder / "plan.json")
    story.artifacts["kv"], story.artifacts["plan"] = kv, chosen
    agreement = kv.overlap(story.artifacts["scores"].to_kv(kv.units, "max"), len(chosen.full_heads()))
    n = s.plan_length
    total = chosen.layers * chosen.kv_heads
    kept = len(chosen.full_heads())
    story.findings["plan"] = {
        "full_heads": kept,
        "of": total,
        "overlap_with_retrieval": agreement,
        "ratio": {str(m): chosen.ratio(m) for m in (n, 4096, 8192)},
    }
    return Section(
        title="Only they keep the whole past",
        text=[
            "Memory is held by kv heads, each shared by three query heads. A gate on every kv head mixes its full attention with "
            "a streaming one, and one backward pass says which gates the answer pulls open.",
            f"The best {kept} of {total} kv heads keep every token; the others keep {STREAM.sinks} sinks and the last "
            f"{STREAM.recent} tokens (DuoAttention's split). {agreement:.0%} of either choice would also be in that of the "
            "retrieval scores (Jaccard).",
            f"At {n} tokens that is {chosen.ratio(n):.0%} of the full cache, at 8 192 tokens {chosen.ratio(8192):.0%}.",
        ],
        figures=[figures.plan_map(chosen, n)],
        table=Table(["layer", "full kv heads", f"tokens kept of {n}"], _plan_rows(chosen, n)),
        command=f"headwise score duo-instant --model {story.name} --length {s.gate_length} -o gates.safetensors\n"
        "headwise plan duo --scores gates.safetensors --sparsity 0.75 --sinks 16 --window 128 -o plan.json",
    )


def _plan_rows(chosen: HeadPlan, n: int) -> list[list[Any]]:
    full = chosen.full_heads().by_layer()
    return [[layer, len(full.get(layer, ())), float(row.float().mean())] for layer, row in enumerate(chosen.kept(n))]


def budgets(story: Story) -> Section:
    """Recall, perplexity and bytes at several budgets: ranked, random, inverse."""
    s, kv = story.settings, story.artifacts["kv"]
    generator = torch.Generator().manual_seed(s.seed + 2)
    prompts = [
        make_passkey(story.tokenizer, length=s.plan_length, depth=depth, generator=generator)
        for depth in even_depths(s.plan_prompts, 0.1, 0.7)  # outside of every window
    ]
    text = held_out(story.tokenizer, s.perplexity_tokens)
    full = measure_plan(story.model, HeadPlan.full(kv.layers, kv.units), "full cache", prompts, text)
    runs = [full]
    for count in s.full_heads:
        sets = {"by score": kv.top(count), "the opposite": kv.bottom(count)}
        draws = kv.random_sets(count, s.plan_draws, generator=generator, exclude=HeadSet.empty("kv"))
        for kind, keep in [*sets.items(), *[("random", d) for d in draws]]:
            used = HeadPlan.from_set(keep, STREAM, kv.layers, kv.units)
            runs.append(measure_plan(story.model, used, kind, prompts, text))
    story.findings["budgets"] = [vars(r) for r in runs]
    middle = s.full_heads[len(s.full_heads) // 2]
    best = next(r for r in runs if r.kind == "by score" and r.full_heads == middle)
    story.cards.append(
        Card(
            f"{best.tokens:.0%}", f"of the digits recalled with {best.cache_bytes / full.cache_bytes:.0%} of the cache"
        )
    )
    return Section(
        title="The same memory, spent well or badly",
        text=[
            f"{s.plan_prompts} keys in {s.plan_length} tokens are read through the real cache, then the answer is fed token by "
            f"token. Blue keeps the kv heads with the best scores, grey draws them by lot, orange keeps the worst.",
            f"With {middle} full kv heads of {kv.values.numel()}, the ranked plan recalls {best.tokens:.0%} of the digits from "
            f"{best.cache_bytes / 2**20:.1f} MiB; the full cache takes {full.cache_bytes / 2**20:.1f} MiB.",
            f"Its perplexity on other text is {best.perplexity:.2f}, that of the full cache {full.perplexity:.2f}: what streams is missed "
            "elsewhere, and a ranking for recall serves recall.",
        ],
        figures=[_budget_figure(runs, full)],
        table=Table(
            ["kv heads kept by", "full", "digits", "exact", "perplexity", "cache MiB", "of full", "tokens/s"],
            [
                [
                    r.kind,
                    r.full_heads,
                    r.tokens,
                    f"{r.exact * r.prompts:.0f}/{r.prompts}",
                    r.perplexity,
                    r.cache_bytes / 2**20,
                    r.cache_bytes / full.cache_bytes,
                    r.tokens_per_s,
                ]
                for r in runs
            ],
        ),
        command=f"headwise eval --model {story.name} --plan plan.json --task passkey,perplexity --length {s.plan_length}",
        notes=[
            f"{s.plan_prompts} prompts a point: read 3 of 3 against 0 of 3, not one step.",
            f"Decoding runs at {best.tokens_per_s:.0f} tokens a second with the ranked plan, at {full.tokens_per_s:.0f} with the "
            "full cache; at this length most of a step is reading the weights.",
        ],
    )


def measure_plan(
    model: PreTrainedModel, used: HeadPlan, kind: str, prompts: Sequence[Prompt], text: torch.Tensor
) -> PlanRun:
    """Recall of prompts and perplexity of a text (N,) through the plan's own cache, its bytes and its speed."""
    made: list[HeadwiseCache] = []

    def cache() -> HeadwiseCache:
        made.append(HeadwiseCache(used))
        return made[-1]

    with headwise.attach(model, plan=used):
        recall = exact_match(model, prompts, through="cache", cache=cache)
        nbytes, rate = made[-1].nbytes, _decode_rate(model, made[-1])
        made.clear()
        ppl = perplexity(model, text, window=min(len(text), 1024), tokens=len(text), through="cache", step=256)
    return PlanRun(kind, len(used.full_heads()), recall.mean, recall.tokens, len(prompts), ppl, nbytes, rate)


def _decode_rate(model: PreTrainedModel, cache: HeadwiseCache, steps: int = 8) -> float:
    """Tokens a second behind what the cache holds; the median step, as other work may disturb some."""
    token = torch.zeros(cache.layers[0].batch_size, 1, dtype=torch.long, device=model.device)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.no_grad():
            model(token, **cache_argument(model, cache))
        seconds.append(time.perf_counter() - start)
    return 1 / sorted(seconds)[steps // 2]


def _budget_figure(runs: Sequence[PlanRun], full: PlanRun) -> Any:
    def series(kind: str, value: str, colour: str) -> Line:
        points: dict[int, list[PlanRun]] = {}
        for r in runs:
            if r.kind == kind:
                points.setdefault(r.full_heads, []).append(r)
        points[full.full_heads] = [full]
        xs = sorted(points)
        share = [100 * fmean(r.cache_bytes for r in points[x]) / full.cache_bytes for x in xs]
        ys = [[getattr(r, value) for r in points[x]] for x in xs]
        mean = [fmean(y) for y in ys]
        if kind != "random":
            return Line(kind, share, mean, colour=colour)
        return Line(kind, share, mean, [min(y) for y in ys], [max(y) for y in ys], colour=colour, dash="dot")

    kinds = (("by score", "score"), ("random", "random"), ("the opposite", "inverse"))
    return figures.lines(
        {
            "digits recalled": [series(kind, "tokens", COLOURS[c]) for kind, c in kinds],
            "perplexity": [series(kind, "perplexity", COLOURS[c]) for kind, c in kinds],
        },
        x_title="share of the full KV cache, %",
    )


def generation(story: Story) -> Section:
    """Plain `generate` under the plan: text, bytes, tokens a second."""
    s, chosen = story.settings, story.artifacts["plan"]
    generator = torch.Generator().manual_seed(s.seed + 3)
    prompt = make_passkey(story.tokenizer, length=s.plan_length, depth=0.4, generator=generator)
    (story.folder / "prompt.txt").write_text(prompt.text, encoding="utf-8")
    kv = story.artifacts["kv"]
    opposite = HeadPlan.from_set(kv.bottom(len(chosen.full_heads())), STREAM, kv.layers, kv.units)
    key = "".join(map(str, story.tokenizer.decode(prompt.answer_ids)))
    runs = {"the full cache": None, "the plan": chosen, "the opposite plan": opposite}
    found = {name: _write(story, prompt, used) for name, used in runs.items()}
    story.findings["generation"] = {"key": key, **found}
    table = [[n, f["text"].strip()[:40], f["cache_bytes"] / 2**20, f["tokens_per_s"]] for n, f in found.items()]
    full, planned = found["the full cache"], found["the plan"]
    story.cards.append(
        Card(
            f"{full['cache_bytes'] / planned['cache_bytes']:.1f}×",
            f"smaller KV cache at {s.plan_length} tokens, freed for real",
        )
    )
    return Section(
        title="Plain generate, less memory",
        text=[
            f"The prompt hides the key {key} in {s.plan_length} tokens and ends in “The pass key is”. "
            "`model.generate` runs unchanged inside `with headwise.attach(model, plan=plan)`.",
        ],
        figures=[
            figures.bars(
                list(found),
                [f["cache_bytes"] / 2**20 for f in found.values()],
                y_title="KV cache, MiB",
                colours=[COLOURS["dense"], COLOURS["score"], COLOURS["inverse"]],
            )
        ],
        quotes=[(f"With {name}", f["text"].strip() or "(nothing)") for name, f in found.items()],
        table=Table(["with", "continuation", "cache MiB", "tokens/s"], table),
        command=f"headwise generate --model {story.name} --plan plan.json --prompt - < prompt.txt",
    )


@torch.no_grad()
def _write(story: Story, prompt: Prompt, used: HeadPlan | None) -> dict[str, Any]:
    ids = prompt.ids[None]
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    with headwise.attach(story.model, plan=used or HeadPlan.full(*_shape(story))):
        start = time.perf_counter()
        story.model.generate(ids, **{**options, "max_new_tokens": 1})
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        out = story.model.generate(ids, **options, return_dict_in_generate=True)
        seconds = time.perf_counter() - start - prefill
    new = out.sequences[0, ids.shape[1] :]
    text = story.tokenizer.decode(new, skip_special_tokens=True)
    rate = (len(new) - 1) / seconds if seconds > 0 else float("nan")
    return {"text": text, "cache_bytes": cache_of(out).nbytes, "tokens_per_s": rate}


def _shape(story: Story) -> tuple[int, int]:
    kv: HeadScores = story.artifacts["kv"]
    return kv.layers, kv.units
