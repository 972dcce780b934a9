"""The chapters of the demo, one function each: measure, draw, say what was found."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

import headwise
from headwise import budget, score
from headwise.cache import HeadwiseCache
from headwise.plan import HeadPlan, SinkWindow
from headwise.report import figures
from headwise.report.figures import COLOURS, Line
from headwise.report.page import Card, Section, Table
from headwise.tasks import Prompt, english, exact_match, make_passkeys, perplexity, wilson
from headwise.tasks.texts import encode
from headwise.units import HeadScores, HeadSet

if TYPE_CHECKING:
    from headwise.report.demo import Story

STREAM = SinkWindow(sinks=16, window=128)


def scores(story: Story) -> Section:
    """Which heads copy the needle."""
    s = story.settings
    found = score.retrieval(story.model, story.tokenizer, tests=s.score_tests, length=s.length, seed=s.seed)
    found.save(story.folder / "scores.safetensors")
    story.artifacts["scores"] = found
    values = found.values
    strong, zero = int((values >= 0.1).sum()), float((values == 0).float().mean())
    top = found.ranking()[:12]
    story.findings["scores"] = {
        "at_least_0.1": strong, "share_zero": zero, "top": {str(u): v for u, v in top}, "data": found.data,
    }  # fmt: skip
    story.cards.append(Card(f"{strong} of {values.numel()}", "heads copy what is retrieved (score at least 0.1)"))
    return Section(
        title="A few heads retrieve, most never do",
        text=[
            f"A five-digit key is hidden in {s.length} tokens of English and asked for at the end. Whenever the model "
            "writes a digit, each head is asked where it looks most: a head scores when that is the very digit in the text.",
            f"{strong} of {values.numel()} heads score 0.1 or more; {zero:.0%} score exactly 0. The strongest is {top[0][0]} "
            f"with {top[0][1]:.2f}.",
        ],
        figures=[figures.head_map(values, label="score")],
        table=Table(["head", "score"], [[str(u), v] for u, v in top]),
        command=f"headwise score retrieval --model {story.name} --tests {s.score_tests} --length {s.length} -o scores.safetensors",
    )


def ablation(story: Story) -> Section:
    """Are they the cause? Take them out, and as many others."""
    s, ranking = story.settings, story.artifacts["scores"]
    check = score.retrieval_check(
        story.model, story.tokenizer, ranking, top=(1, 2, 3, 5), random_sets=s.random_draws, prompts=s.prompts,
        length=s.length, perplexity_tokens=s.perplexity_tokens, seed=s.seed + 1,
    )  # fmt: skip
    story.findings["ablation"] = check.to_dict()
    raise NotImplementedError


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


def plan(story: Story) -> Section:
    """From scores to a plan."""
    s, ranking = story.settings, story.artifacts["scores"]
    model_print = ranking.fingerprint
    kv = ranking.to_kv(model_print.kv_heads, "max")
    chosen = budget.duo(kv, sparsity=0.75, sinks=STREAM.sinks, window=STREAM.recent)
    chosen.save(story.folder / "plan.json")
    story.artifacts["kv"], story.artifacts["plan"] = kv, chosen
    n = s.plan_length
    total = chosen.layers * chosen.kv_heads
    kept = len(chosen.full_heads())
    story.findings["plan"] = {"full_heads": kept, "of": total, "ratio": {str(m): chosen.ratio(m) for m in (n, 4096, 8192)}}
    return Section(
        title="Only they keep the whole past",
        text=[
            f"Three query heads share one kv head, which scores as its best member. The best {kept} of {total} kv heads keep "
            f"every token; the others keep {STREAM.sinks} sinks and the last {STREAM.recent} tokens (DuoAttention's split).",
            f"At {n} tokens that is {chosen.ratio(n):.0%} of the full cache, at 8 192 tokens {chosen.ratio(8192):.0%}.",
        ],
        figures=[figures.plan_map(chosen, n)],
        table=Table(["layer", "full kv heads", f"tokens kept of {n}"], _plan_rows(chosen, n)),
        command="headwise plan duo --scores scores.safetensors --sparsity 0.75 --sinks 16 --window 128 -o plan.json",
    )


def _plan_rows(chosen: HeadPlan, n: int) -> list[list[Any]]:
    full = chosen.full_heads().by_layer()
    return [[layer, len(full.get(layer, ())), float(row.float().mean())] for layer, row in enumerate(chosen.kept(n))]


def budgets(story: Story) -> Section:
    """Recall, perplexity and bytes at several budgets: ranked, random, inverse."""
    s, kv = story.settings, story.artifacts["kv"]
    generator = torch.Generator().manual_seed(s.seed + 2)
    prompts = make_passkeys(story.tokenizer, count=s.plan_prompts, length=s.plan_length, generator=generator)
    text = _text(story, s.perplexity_tokens)
    full = _measure(story, HeadPlan.full(kv.layers, kv.units), "full cache", prompts, text)
    runs = [full]
    for count in s.full_heads:
        sets = {"by score": kv.top(count), "the opposite": kv.bottom(count)}
        draws = kv.random_sets(count, max(1, s.random_draws - 1), generator=generator, exclude=HeadSet.empty("kv"))
        for kind, keep in [*sets.items(), *[("random", d) for d in draws]]:
            runs.append(_measure(story, HeadPlan.from_set(keep, STREAM, kv.layers, kv.units), kind, prompts, text))
    story.findings["budgets"] = [vars(r) for r in runs]
    middle = s.full_heads[len(s.full_heads) // 2]
    best = next(r for r in runs if r.kind == "by score" and r.full_heads == middle)
    story.cards.append(Card(f"{best.tokens:.0%}", f"of the digits recalled with {best.cache_bytes / full.cache_bytes:.0%} of the cache"))
    return Section(
        title="The same memory, spent well or badly",
        text=[
            f"{s.plan_prompts} keys in {s.plan_length} tokens are read through the real cache, then the answer is fed token by "
            f"token. Blue keeps the kv heads with the best scores, grey draws them by lot, orange keeps the worst.",
            f"With {middle} full kv heads of {kv.values.numel()}, the ranked plan recalls {best.tokens:.0%} of the digits from "
            f"{best.cache_bytes / 2**20:.1f} MiB; the full cache takes {full.cache_bytes / 2**20:.1f} MiB.",
            "Perplexity tells the other side: what streams is missed elsewhere, and the ranking for recall does not save it.",
        ],
        figures=[_budget_figure(runs, full)],
        table=Table(
            ["kv heads kept by", "full", "digits", "exact", "perplexity", "cache MiB", "of full"],
            [[r.kind, r.full_heads, r.tokens, f"{r.exact * r.prompts:.0f}/{r.prompts}", r.perplexity,
              r.cache_bytes / 2**20, r.cache_bytes / full.cache_bytes] for r in runs],
        ),  # fmt: skip
        command=f"headwise eval --model {story.name} --plan plan.json --task passkey,perplexity --length {s.plan_length}",
        notes=[f"{s.plan_prompts} prompts a point: read 3 of 3 against 0 of 3, not one step."],
    )


def _measure(story: Story, used: HeadPlan, kind: str, prompts: Sequence[Prompt], text: torch.Tensor) -> PlanRun:
    made: list[HeadwiseCache] = []

    def cache() -> HeadwiseCache:
        made.append(HeadwiseCache(used))
        return made[-1]

    with headwise.attach(story.model, plan=used):
        recall = exact_match(story.model, prompts, through="cache", cache=cache)
        nbytes = made[-1].nbytes
        made.clear()
        ppl = perplexity(story.model, text, window=min(len(text), 1024), tokens=len(text), through="cache", step=256)
    return PlanRun(kind, len(used.full_heads()), recall.mean, recall.tokens, len(prompts), ppl, nbytes)


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
    prompt = make_passkeys(story.tokenizer, count=1, length=s.plan_length, generator=generator)[0]
    kv = story.artifacts["kv"]
    opposite = HeadPlan.from_set(kv.bottom(len(chosen.full_heads())), STREAM, kv.layers, kv.units)
    key = "".join(map(str, story.tokenizer.decode(prompt.answer_ids)))
    runs = {"the full cache": None, "the plan": chosen, "the opposite plan": opposite}
    found = {name: _write(story, prompt, used) for name, used in runs.items()}
    story.findings["generation"] = {"key": key, **found}
    table = [[n, f["text"].strip()[:40], f["cache_bytes"] / 2**20, f["tokens_per_s"]] for n, f in found.items()]
    full, planned = found["the full cache"], found["the plan"]
    story.cards.append(Card(f"{full['cache_bytes'] / planned['cache_bytes']:.1f}×", f"smaller KV cache at {s.plan_length} tokens, freed for real"))
    return Section(
        title="Plain generate, less memory",
        text=[
            f"The prompt hides the key {key} in {s.plan_length} tokens and ends in “The pass key is”. "
            "`model.generate` runs unchanged inside `with headwise.attach(model, plan=plan)`.",
        ],
        figures=[
            figures.bars(
                list(found), [f["cache_bytes"] / 2**20 for f in found.values()], y_title="KV cache, MiB",
                colours=[COLOURS["dense"], COLOURS["score"], COLOURS["inverse"]],
            )
        ],  # fmt: skip
        quotes=[(f"With {name}", f["text"].strip() or "(nothing)") for name, f in found.items()],
        table=Table(["with", "continuation", "cache MiB", "tokens/s"], table),
        command=f'headwise generate --model {story.name} --plan plan.json --prompt - < prompt.txt',
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
    return {"text": text, "cache_bytes": out.past_key_values.nbytes, "tokens_per_s": rate}


def _shape(story: Story) -> tuple[int, int]:
    kv: HeadScores = story.artifacts["kv"]
    return kv.layers, kv.units


def routing(story: Story) -> Section:
    """Mixture-of-Head conversion."""
    raise NotImplementedError


def _text(story: Story, tokens: int) -> torch.Tensor:
    """English that no score was taken from."""
    return torch.tensor(encode(story.tokenizer, english("eval")[: 12 * tokens])[:tokens])


__all__ = ["ablation", "budgets", "generation", "plan", "routing", "scores", "wilson"]
