"""Path patching: which heads speak to a receiver directly (Wang et al. 2022; Merullo et al., arXiv 2310.08744)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headwise.attach import fingerprint
from headwise.progress import track
from headwise.registry import register
from headwise.score._patching import ROWS, Reduce, Task, column_mask, make_pairs, need_language_model
from headwise.score._path_batch import PathBatch
from headwise.score._receivers import checked_receivers, checked_through
from headwise.score._units import PatchUnit
from headwise.tasks.pairs import PromptPairs
from headwise.units import HeadScores, HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("score", "path-patching", paper="29")
def path_patching(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    pairs: PromptPairs | None = None,
    task: Task = "induction",
    count: int = 16,
    receivers: HeadSet | None = None,
    through: str = "q",
    tokens: Any = "last",
    unit: PatchUnit = "head",
    freeze_mlps: bool = False,
    reduce: Reduce = "ratio_of_means",
    rows: int = ROWS,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """How far a unit moves the answer on its direct path to a receiver: 0 not at all, 1 as far as the corrupted prompt.

        score[l,h] = (LD(path patched) − LD(prompt)) / (LD(twin) − LD(prompt))

    Pass A: the sender's output is the twin's, all other heads are frozen to the prompt's, MLPs answer live unless frozen. Pass B: the
    receivers read what pass A brought them, everything else is live. arXiv 2310.08744 stores −100 times this. A sender that stands
    behind every receiver scores 0: nothing flows back. Gives HeadScores of "head" (L, H) or "expert" (L, E).

    pairs: prompts and corrupted twins of your own instead of `task` and `count`.
    task: "induction" works with any vocabulary; "ioi" and "colored-objects" need names and colours of one token.
    count: number of pairs.
    receivers: heads, kv heads (all query heads of a group) or experts that receive; by default the logits.
    through: what of the receivers is patched: of heads some of "q", "k", "v", where k and v are those of one query head, also where heads
        share them; of kv heads "k", "v"; of experts "x", the hidden states that they compute on, "w", their weights.
    tokens: where senders send and receivers receive: "last", "all"; or one column of each row (from Python).
    unit: what sends: "head", or "expert", whose part goes out behind the attention of its layer.
    freeze_mlps: MLPs too keep the prompt's outputs; the direct path is then the residual stream alone.
    reduce: the ratio of mean effects, or the mean of the pairs' ratios.
    rows: rows of a folded batch at most; results do not depend on it.

    Raises ScoreError for tokens that do not reach the receiver and letters that it lacks, UnitError for units that the model lacks.

    >>> from headwise.hub import load_model
    >>> scores = path_patching(*load_model("tiny-random-llama"), count=4, receivers=HeadSet.parse("L2H1"), through="qk")
    >>> bool((scores.values[2] == 0).all()), bool((scores.values[:2] != 0).all())
    (True, True)
    """
    need_language_model(model)
    named = receivers
    if receivers is not None:
        checked_through(through, receivers.kind)
        receivers = checked_receivers(receivers, model)
    chosen = make_pairs(model, tokenizer, pairs, task, count, seed)
    paths = PathBatch(model, chosen, column_mask(chosen, tokens), unit=unit, freeze_mlps=freeze_mlps, rows=rows)
    values = paths.scores(receivers, through, reduce, lambda layers: track(layers, "path patching", progress))
    to = "logits" if named is None else f"{through} of {named}"
    meta: dict[str, Any] = {"receivers": to, "freeze_mlps": freeze_mlps, "reduce": reduce, "pairs": len(chosen)}
    data = "own pairs" if pairs is not None else f"{len(chosen)} pairs of {task}"
    meta["seed"] = seed
    return HeadScores(
        values=values, kind=unit, method="path-patching", data=data, fingerprint=fingerprint(model), meta=meta
    )
