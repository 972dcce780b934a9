"""Activation patching: one head's or expert's output at a time is taken from the other run, the rest of the model goes on by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from headwise.attach import fingerprint
from headwise.errors import ScoreError
from headwise.modes import evaluating
from headwise.progress import track
from headwise.registry import register
from headwise.score._patching import (
    ROWS,
    Reduce,
    Run,
    Task,
    column_mask,
    make_pairs,
    need_language_model,
    shares,
)
from headwise.score._sweep import Sweep
from headwise.score._units import PatchUnit, sweep_all
from headwise.tasks.pairs import PromptPairs
from headwise.units import HeadScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Direction = Literal["noising", "denoising"]


@register("score", "activation-patching", paper="19")
def activation_patching(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    pairs: PromptPairs | None = None,
    task: Task = "induction",
    count: int = 16,
    tokens: Any = "all",
    direction: Direction = "noising",
    unit: PatchUnit = "head",
    reduce: Reduce = "ratio_of_means",
    rows: int = ROWS,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """How far one unit's output, taken from a corrupted run, moves the answer: 0 not at all, 1 all the way.

        score[l,h] = (LD(run with z_lh of the other run) − LD(run)) / (LD(other run) − LD(run))

    LD is the logit of the answer minus that of the contrast; all later computation is live (the total effect). Gives HeadScores
    of kind "head", (L, H), or "expert", (L, E). The model runs from the unit's layer on only, its units folded into the batch.

    pairs: prompts and corrupted twins of your own instead of `task` and `count`.
    task: "induction" works with any vocabulary; "ioi" and "colored-objects" need names and colours of one token.
    count: number of pairs.
    tokens: where the head is patched, a selection of positions: "all", "last", "3:7"; or one column of each row (from Python).
    direction: "noising" puts outputs of the twin into the prompt's run, "denoising" the other way round.
    unit: "head", or "expert": what an expert adds to its layer, weight included, nothing for tokens that did not choose it.
    reduce: the ratio of mean effects, or the mean of the pairs' ratios.
    rows: rows of a folded batch at most, and so what memory is needed; results do not depend on it.

    Raises ScoreError where prompt and twin are answered alike, AttachError for a model out of reach.

    >>> from headwise.hub import load_model
    >>> scores = activation_patching(*load_model("tiny-random-llama"), count=4)
    >>> tuple(scores.values.shape), scores.meta["direction"]
    ((3, 4), 'noising')
    >>> activation_patching(*load_model("tiny-random-mixtral"), count=4, unit="expert").top(1).kind
    'expert'
    """
    need_language_model(model)
    if direction not in get_args(Direction):
        raise ScoreError(f"direction={direction!r}; choose {', '.join(get_args(Direction))}")
    chosen = make_pairs(model, tokenizer, pairs, task, count, seed)
    turned = chosen if direction == "noising" else chosen.swapped()
    with evaluating(model):
        swept = sweep_all(
            model, unit, turned, column_mask(turned, tokens), _twin, rows=rows,
            track=lambda items: track(items, "patching", progress),
        )  # fmt: skip
    values = shares(swept.after, swept.base, swept.other, reduce).cpu()
    meta: dict[str, Any] = {"direction": direction, "reduce": reduce, "pairs": len(turned), "seed": seed}
    meta |= {"base": float(swept.base.mean()), "other": float(swept.other.mean())}
    data = "own pairs" if pairs is not None else f"{len(turned)} pairs of {task}"
    return HeadScores(
        values=values, kind=unit, method="activation-patching", data=data, fingerprint=fingerprint(model), meta=meta
    )


def _twin(sweep: Sweep, part: slice) -> Run:
    return sweep.record(sweep.pairs, sweep.pairs.corrupt)
