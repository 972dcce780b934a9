"""Activation patching: one head's output at a time is taken from the other run, the rest of the model goes on by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from headwise.attach import fingerprint
from headwise.errors import ScoreError
from headwise.registry import register
from headwise.score._copying import track
from headwise.score._patching import (
    ROWS,
    Reduce,
    Sweep,
    Task,
    column_mask,
    make_pairs,
    need_language_model,
    quiet,
    record,
    shares,
)
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
    reduce: Reduce = "ratio_of_means",
    rows: int = ROWS,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """How far one head's output, taken from a corrupted run, moves the answer: 0 not at all, 1 all the way.

        score[l,h] = (LD(run with z_lh of the other run) − LD(run)) / (LD(other run) − LD(run))

    LD is the logit of the answer minus that of the contrast; all later computation is live (the total effect). Gives HeadScores
    of kind "head", (L, H). The model runs from the head's layer on only, the heads of a layer folded into the batch.

    pairs: prompts and corrupted twins of your own instead of `task` and `count`.
    task: "induction" works with any vocabulary; "ioi" and "colored-objects" need names and colours of one token.
    count: number of pairs.
    tokens: where the head is patched, a selection of positions: "all", "last", "3:7"; or one column of each row (from Python).
    direction: "noising" puts outputs of the twin into the prompt's run, "denoising" the other way round.
    reduce: the ratio of mean effects, or the mean of the pairs' ratios.
    rows: rows of a folded batch at most; results do not depend on it.

    Raises ScoreError where prompt and twin are answered alike, AttachError for a model out of reach.

    >>> from headwise.hub import load_model
    >>> scores = activation_patching(*load_model("tiny-random-llama"), count=4)
    >>> tuple(scores.values.shape), scores.meta["direction"]
    ((3, 4), 'noising')
    """
    need_language_model(model)
    if direction not in get_args(Direction):
        raise ScoreError(f"direction={direction!r}; choose {', '.join(get_args(Direction))}")
    chosen = make_pairs(model, tokenizer, pairs, task, count, seed)
    turned = chosen if direction == "noising" else chosen.swapped()
    with quiet(model):
        sweep = Sweep(model, turned, column_mask(turned, tokens), rows=rows)
        other = record(model, turned, turned.corrupt)
        after = sweep.all_heads(other.z.__getitem__, lambda layers: track(layers, "patching", progress))
    values = shares(after, sweep.base.difference, other.difference, reduce).cpu()
    meta: dict[str, Any] = {"direction": direction, "reduce": reduce, "pairs": len(turned), "seed": seed}
    meta |= {"base": float(sweep.base.difference.mean()), "other": float(other.difference.mean())}
    data = "own pairs" if pairs is not None else f"{len(turned)} pairs of {task}"
    return HeadScores(values=values, method="activation-patching", data=data, fingerprint=fingerprint(model), meta=meta)
