"""Circuits: the heads that iterated path patching keeps, stage by stage (Merullo et al., arXiv 2310.08744).

Letters: L layers, H query heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from headwise.attach import fingerprint
from headwise.errors import ScoreError
from headwise.registry import register
from headwise.score._circuit import Circuit, Stage
from headwise.score._patching import ROWS, Task, column_mask, make_pairs, need_language_model
from headwise.score._path_batch import PathBatch
from headwise.score._receivers import checked_through
from headwise.tasks.pairs import PromptPairs
from headwise.units import HeadScores, HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("score", "circuit", paper="29")
def circuit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    pairs: PromptPairs | None = None,
    task: Task = "induction",
    count: int = 16,
    through: str = "q",
    share: float = 0.02,
    freeze_mlps: bool = False,
    rows: int = ROWS,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Which heads iterated path patching keeps: first those that move the logits, then those that these listen to.

        score[l,h] = the largest |share| of the stages that kept the head, 0 for a head that none kept

    Gives HeadScores of kind "head", (L, H). `find_circuit` gives the stages one by one. Everything happens at the last token.

    pairs: prompts and corrupted twins of your own instead of `task` and `count`.
    task: "induction" works with any vocabulary; "ioi" and "colored-objects" need names and colours of one token.
    count: number of pairs.
    through: one stage for each part separated by a comma, such as "q" or "q,q": what of the last stage's heads receives.
    share: of all heads, kept in each stage by the size of their effect, rounded up.
    freeze_mlps: direct paths lead through the residual stream alone.
    rows: rows of a folded batch at most; results do not depend on it.

    Raises ScoreError for a share outside (0, 1].

    >>> from headwise.hub import load_model
    >>> scores = circuit(*load_model("tiny-random-llama"), count=4, share=0.1)
    >>> int((scores.values > 0).sum()) in (2, 3, 4)
    True
    """
    found = find_circuit(
        model, tokenizer, pairs=pairs, task=task, count=count, through=through, share=share, freeze_mlps=freeze_mlps,
        rows=rows, seed=seed,
    )  # fmt: skip
    scores = found.scores()
    return replace(scores, meta={**scores.meta, "share": share, "seed": seed})


def find_circuit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    pairs: PromptPairs | None = None,
    task: Task = "induction",
    count: int = 16,
    through: str = "q",
    share: float = 0.02,
    freeze_mlps: bool = False,
    rows: int = ROWS,
    seed: int = 0,
) -> Circuit:
    """The stages of `circuit`, with the same options and errors."""
    need_language_model(model)
    if not 0 < share <= 1:
        raise ScoreError(f"share={share}; it must lie in (0, 1]")
    for part in through.split(","):
        checked_through(part)
    chosen = make_pairs(model, tokenizer, pairs, task, count, seed)
    paths = PathBatch(model, chosen, column_mask(chosen, "last"), freeze_mlps=freeze_mlps, rows=rows)
    made_for = fingerprint(model)
    data = "own pairs" if pairs is not None else f"{len(chosen)} pairs of {task}"
    stages: list[Stage] = []
    receivers: HeadSet | None = None
    for part in ("logits", *through.split(",")):
        values = paths.scores(receivers, "q" if receivers is None else part)
        scores = HeadScores(values=values, method="path-patching", data=data, fingerprint=made_for)
        kept = strongest(scores, math.ceil(share * len(scores) - 1e-9))
        stages.append(Stage(receivers, part, scores, kept))
        receivers = kept
    return Circuit(tuple(stages))


def strongest(scores: HeadScores, k: int) -> HeadSet:
    """The k heads with the largest effect of either sign."""
    sizes = HeadScores(values=scores.values.abs(), method=scores.method, fingerprint=scores.fingerprint)
    kept = sizes.top(k)
    return HeadSet.of([pair for pair in kept.pairs() if float(sizes.values[pair]) > 0] or kept.pairs())


def common(circuits: Sequence[Circuit]) -> HeadSet:
    """Heads that every one of several circuits holds."""
    found = circuits[0].heads
    for one in circuits[1:]:
        found = found & one.heads
    return found
