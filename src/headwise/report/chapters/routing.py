"""Mixture-of-Head conversion: which heads a token may leave out, before and after a little training."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import headwise
from headwise.hub import load_model
from headwise.report import figures
from headwise.report.chapters.text import held_out
from headwise.report.figures import COLOURS, PALETTE, Line
from headwise.report.page import Card, Section, Table
from headwise.route import HeadLoad, HeadRouter
from headwise.route.moh import moh
from headwise.route.train_moh import train_moh
from headwise.score.taylor import taylor
from headwise.tasks import code, perplexity
from headwise.tasks.texts import encode
from headwise.units import HeadScores

if TYPE_CHECKING:
    from headwise.report.demo import Story

RULES: dict[str, dict[str, Any]] = {
    "query norm, first half shared (the paper)": {"router": "norm", "shared": "first"},
    "query norm, no shared heads": {"router": "norm", "shared": "none"},
    "query norm, most important shared": {"router": "norm", "shared": "importance"},
    "fitted router": {"router": "fitted", "target": "norm", "allocate": "uniform"},  # what needs no gradients: seconds
    "same heads for all tokens (pruning)": {"router": "static", "scope": "global"},
}
COLOUR = dict(zip(RULES, (PALETTE[2], PALETTE[4], PALETTE[0], PALETTE[1], COLOURS["dense"]), strict=True))
FITTED = "fitted router"
TRAINED = "query norm, most important shared"


@dataclass(frozen=True)
class Row:
    """One conversion: its rule, heads active of each layer's, perplexity on unseen text, tokens of training before."""

    rule: str
    active: float
    heads: str
    perplexity: float
    trained_tokens: int = 0


def routing(story: Story) -> Section:
    """Perplexity against active heads for several rules, then a short recovery training with its dense control."""
    s = story.settings
    text = held_out(story.tokenizer, s.moh_tokens)
    importance = taylor(story.model, story.tokenizer, tokens=512, seed=s.seed)
    importance.save(story.folder / "taylor.safetensors")
    dense = _perplexity(story.model, text)
    rows = [Row("dense", 1.0, "all", dense)]
    for rule, options in RULES.items():
        for count in s.moh_heads:
            router = _converted(story, options, importance, count)
            share = count / importance.units
            rows.append(Row(rule, share, f"{count} of {importance.units}", _perplexity(story.model, text, router)))
            if rule == FITTED and count == s.moh_heads[0]:
                load = head_load(story, router, text)
    rows += _trained(story, importance, text, s.moh_heads[0])
    story.findings["routing"] = [vars(r) for r in rows]
    story.findings["head_load"] = {kind: load.share(kind).tolist() for kind in load.used}
    return _section(story, rows, dense, load)


def head_load(story: Story, router: HeadRouter, text: Tensor) -> HeadLoad:
    """Which heads English and source code use: shares of the tokens by layer and head, of as many tokens of each kind."""
    program = torch.tensor(encode(story.tokenizer, code("eval")[: 12 * len(text)])[: len(text)])
    size = min(len(text), len(program))
    rows = torch.stack([text[:size], program[:size]]).to(story.model.device)
    with (
        headwise.attach(story.model, router=router),
        router.recording(rows=["English", "code"]) as load,
        torch.no_grad(),
    ):
        story.model(rows, use_cache=False, logits_to_keep=1)
    return load


def _converted(story: Story, options: dict[str, Any], importance: HeadScores, count: int) -> HeadRouter:
    s, total = story.settings, importance.units
    needed = options["router"] == "static" or options.get("shared") == "importance"
    options = {**options, "importance": importance} if needed else options
    if options["router"] == "fitted":
        options = {**options, "fit_tokens": s.fit_tokens}
    return moh(story.model, story.tokenizer, active=count / total, seed=s.seed, **options)


def _trained(story: Story, importance: HeadScores, text: Tensor, count: int) -> list[Row]:
    """Recovery: the converted model and the dense one, each trained on the same tokens."""
    s, total = story.settings, importance.units
    rows = []
    for rule, active in ((TRAINED, count / total), ("dense", 1.0)):
        model, tokenizer = load_model(story.name, dtype=torch.float32)
        router = train_moh(
            model, tokenizer, active=active, importance=importance, shared="importance", steps=s.recovery_steps,
            batch_size=1, window=s.recovery_window, learning_rate=2e-5, seed=s.seed,
        )  # fmt: skip
        tokens = s.recovery_steps * s.recovery_window
        rows.append(Row(rule, active, f"{round(active * total)} of {total}", _perplexity(model, text, router), tokens))
    return rows


def _perplexity(model: Any, text: Tensor, router: HeadRouter | None = None) -> float:
    with nullcontext() if router is None else headwise.attach(model, router=router):
        return perplexity(model, text, window=512, tokens=len(text))


def _section(story: Story, rows: list[Row], dense: float, load: HeadLoad) -> Section:
    s = story.settings
    untrained = {(r.rule, r.active): r.perplexity for r in rows if not r.trained_tokens}
    first = max(r.active for r in rows if r.rule in RULES)
    by_paper, by_score = (untrained[rule, first] for rule in list(RULES)[:3:2])
    fitted = untrained[FITTED, first]
    control = next(r for r in rows if r.rule == "dense" and r.trained_tokens)
    after = next(r for r in rows if r.rule == TRAINED and r.trained_tokens)
    story.cards.append(
        Card(
            f"{by_paper:.0f} → {by_score:.0f}",
            f"perplexity of a conversion when a score picks the shared heads (dense {dense:.1f})",
        )
    )
    return Section(
        title="Every token chooses its heads",
        text=[
            "Mixture-of-Head attention lets each token leave heads out. A pretrained model is converted without new weights: some "
            "heads are shared by all tokens, the norm of the query ranks the others. The perplexity says what that costs at once.",
            f"At {after.heads} heads the paper's choice of shared heads gives {by_paper:.1f}; sharing the most important heads, "
            f"by a first-order score that takes seconds, {by_score:.1f}. A router fitted to predict each head's output gives {fitted:.1f}. "
            "The line to beat is pruning the same number of heads for all tokens.",
            f"After {after.trained_tokens} tokens of training the conversion stands at {after.perplexity:.1f}; the dense model "
            f"trained on the same tokens, which is the fair control, at {control.perplexity:.1f}.",
            f"Kinds of text use heads of their own: the two maps say which share of the tokens of English and of source code each head "
            f"serves under the fitted router; the histograms of a layer differ by {load.distance('English', 'code'):.3f} in the mean "
            "(0: the same heads, 1: no head in common).",
        ],
        figures=[
            _figure(rows, dense),
            *(figures.head_map(load.share(kind), label=f"share, {kind}") for kind in ("English", "code")),
        ],
        table=Table(
            ["rule", "heads active", "trained on", "perplexity", "over dense"],
            [[r.rule, r.heads, r.trained_tokens, r.perplexity, r.perplexity / dense] for r in rows],
        ),
        command=f"headwise score taylor --model {story.name} -o taylor.safetensors\n"
        f"headwise convert moh --model {story.name} --active 0.75 --shared importance --importance taylor.safetensors -o adapter/\n"
        f"headwise eval --model {story.name} --router adapter/ --task perplexity --length 512",
        notes=[
            f"{s.moh_tokens} tokens of unseen text. No computation is saved on a CPU: heads are masked, not skipped."
        ],
    )


def _figure(rows: list[Row], dense: float) -> Any:
    shares = sorted({r.active for r in rows})
    series = [Line("dense", [100 * a for a in shares], [dense] * len(shares), colour=COLOURS["dense"], dash="dot")]
    for rule in RULES:
        points = sorted((r.active, r.perplexity) for r in rows if r.rule == rule and not r.trained_tokens)
        series.append(Line(rule, [100 * a for a, _ in points], [p for _, p in points], colour=COLOUR[rule]))
    trained = [(100 * r.active, r.perplexity) for r in rows if r.trained_tokens]
    trained.sort()
    series.append(
        Line("after training", [a for a, _ in trained], [p for _, p in trained], colour=COLOURS["trained"], dash="dash")
    )
    return figures.lines({"perplexity": series}, x_title="active heads, %", log_y=("perplexity",))
