"""Ablation of single heads: what the answer loses when one head is silenced, set to its mean or to another prompt's output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from headwise.attach import fingerprint
from headwise.errors import ScoreError
from headwise.registry import register
from headwise.score._copying import track
from headwise.score._patching import ROWS, Sweep, Task, column_mask, make_pairs, need_language_model, quiet
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
    rows: int = ROWS,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """What the logit difference loses when one head is ablated, all later computation live.

        score[l,h] = mean over prompts of  LD(run) − LD(run with z_lh ablated),     in logits

    Positive: the head works for the answer. Gives HeadScores of kind "head", (L, H); the sweep is that of `activation_patching`.

    pairs: prompts of your own instead of `task` and `count`; their twins are not read.
    task: "induction" works with any vocabulary; "ioi" and "colored-objects" need names and colours of one token.
    count: number of prompts.
    tokens: where the head is ablated, a selection of positions; or one column of each row (from Python).
    how: "zero"; "mean" over the real tokens of all prompts; "resample": the output on another prompt, column by column, where
      that prompt has a token.
    rows: rows of a folded batch at most; results do not depend on it.

    Raises ScoreError for resampling with fewer than two prompts, AttachError for a model out of reach.

    >>> from headwise.hub import load_model
    >>> scores = ablation_effect(*load_model("tiny-random-mixtral"), count=4, how="mean")
    >>> tuple(scores.values.shape), scores.meta["how"]
    ((3, 4), 'mean')
    """
    need_language_model(model)
    if how not in get_args(Ablation):
        raise ScoreError(f"how={how!r}; choose {', '.join(get_args(Ablation))}")
    chosen = make_pairs(model, tokenizer, pairs, task, count, seed)
    if how == "resample" and len(chosen) < 2:
        raise ScoreError("how='resample' takes outputs of another prompt; at least two prompts are needed")
    shift = torch.randint(1, max(2, len(chosen)), (), generator=torch.Generator().manual_seed(seed))
    with quiet(model):
        sweep = Sweep(model, chosen, column_mask(chosen, tokens), rows=rows)
        after = sweep.all_heads(
            lambda layer: ablated(sweep.base.z[layer], chosen.mask, how, int(shift)),
            lambda layers: track(layers, "ablating", progress),
        )
    values = (sweep.base.difference - after).double().mean(-1).cpu()
    meta: dict[str, Any] = {"how": how, "prompts": len(chosen), "seed": seed}
    meta["base"] = float(sweep.base.difference.mean())
    data = "own prompts" if pairs is not None else f"{len(chosen)} prompts of {task}"
    return HeadScores(values=values, method="ablation-effect", data=data, fingerprint=fingerprint(model), meta=meta)


def ablated(z: Tensor, mask: Tensor, how: Ablation, shift: int) -> Tensor:
    """What stands for the outputs z (B, N, H, D); real tokens (B, N) make the mean, row i takes row i + shift."""
    if how == "zero":
        return torch.zeros_like(z)
    if how == "resample":  # where the other row is padding it has no output to lend
        return torch.where(mask.roll(-shift, 0)[..., None, None], z.roll(-shift, 0), z)
    real = mask.to(z.dtype)[..., None, None]
    return ((z * real).sum((0, 1)) / real.sum()).expand_as(z)
