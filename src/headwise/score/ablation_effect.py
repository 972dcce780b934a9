"""Ablation of single heads or experts: what the answer loses when one is silenced, set to its mean or to another prompt's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from headwise.attach import fingerprint
from headwise.errors import ScoreError
from headwise.modes import evaluating
from headwise.progress import track
from headwise.registry import register
from headwise.score._patching import ROWS, Run, Task, column_mask, make_pairs, need_language_model
from headwise.score._sweep import Sweep
from headwise.score._units import PatchUnit, mean_outputs, sweep_all
from headwise.tasks.pairs import PromptPairs
from headwise.units import HeadScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Ablation = Literal["zero", "mean", "resample"]


@register("score", "ablation-effect", paper="19")
def ablation_effect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    pairs: PromptPairs | None = None,
    task: Task = "induction",
    count: int = 16,
    tokens: Any = "all",
    how: Ablation = "zero",
    unit: PatchUnit = "head",
    rows: int = ROWS,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """What the logit difference loses when one unit is ablated, all later computation live.

        score[l,h] = mean over prompts of  LD(run) − LD(run with z_lh ablated),     in logits

    Positive: the head works for the answer. Gives HeadScores of kind "head", (L, H), or "expert", (L, E); the sweep is that of
    `activation_patching`.

    pairs: prompts of your own instead of `task` and `count`; their twins are not read.
    task: "induction" works with any vocabulary; "ioi" and "colored-objects" need names and colours of one token.
    count: number of prompts.
    tokens: where the head is ablated, a selection of positions; or one column of each row (from Python).
    how: "zero"; "mean" over the real tokens of all prompts; "resample": the output on another prompt, column by column, where
      that prompt has a token.
    unit: "head", or "expert": what an expert adds to its layer; zero is `ExpertEdits.scale(expert, 0)`.
    rows: rows of a folded batch at most, and so what memory is needed; results do not depend on it.

    Raises ScoreError for resampling with fewer than two prompts, AttachError for a model out of reach.

    >>> from headwise.hub import load_model
    >>> scores = ablation_effect(*load_model("tiny-random-mixtral"), count=4, how="mean")
    >>> tuple(scores.values.shape), scores.meta["how"]
    ((3, 4), 'mean')
    >>> print(ablation_effect(*load_model("tiny-random-qwen3-moe"), count=4, unit="expert").top(1).kind)
    expert
    """
    need_language_model(model)
    if how not in get_args(Ablation):
        raise ScoreError(f"how={how!r}; choose {', '.join(get_args(Ablation))}")
    chosen = make_pairs(model, tokenizer, pairs, task, count, seed)
    if how == "resample" and len(chosen) < 2:
        raise ScoreError("how='resample' takes outputs of another prompt; at least two prompts are needed")
    shift = int(torch.randint(1, max(2, len(chosen)), (), generator=torch.Generator().manual_seed(seed)))
    with evaluating(model):
        other = _instead(model, chosen, how, unit, shift, rows)
        swept = sweep_all(
            model, unit, chosen, column_mask(chosen, tokens), other, rows=rows,
            track=lambda items: track(items, "ablating", progress),
        )  # fmt: skip
    values = (swept.base - swept.after).double().mean(-1).cpu()
    meta: dict[str, Any] = {"how": how, "prompts": len(chosen), "seed": seed, "base": float(swept.base.mean())}
    data = "own prompts" if pairs is not None else f"{len(chosen)} prompts of {task}"
    return HeadScores(
        values=values, kind=unit, method="ablation-effect", data=data, fingerprint=fingerprint(model), meta=meta
    )


def _instead(
    model: PreTrainedModel, pairs: PromptPairs, how: Ablation, unit: PatchUnit, shift: int, rows: int
) -> Callable[[Sweep, slice], Run]:
    """What stands for the outputs of the units of some prompts; with "resample" row i takes those of row i + shift."""
    if how == "mean":
        means = mean_outputs(model, unit, pairs, rows)
        return lambda sweep, part: sweep.lent(means)
    if how == "zero":
        return lambda sweep, part: sweep.lent(None)

    def resampled(sweep: Sweep, part: slice) -> Run:
        rolled = [getattr(pairs, name).roll(-shift, 0) for name in ("ids", "corrupt", "mask", "answers", "contrasts")]
        other = PromptPairs(*(table[part] for table in rolled))
        return sweep.where_lent(sweep.record(other), other.mask)

    return resampled
