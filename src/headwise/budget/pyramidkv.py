"""PyramidKV (Cai et al. 2024, arXiv 2406.02069): SnapKV with more tokens for the lower layers and fewer for the upper ones."""

from __future__ import annotations

from typing import Any

from headwise.budget._amounts import Amount, Shape
from headwise.checks import finite
from headwise.errors import PlanError
from headwise.plan import Budget, HeadPlan
from headwise.registry import register


@register("budget", "pyramidkv")
def pyramidkv(
    model: Any,
    *,
    budget: Budget | str = "25%",
    beta: float = 20.0,
    by: str = "observation(window=32,kernel=7,pool=max)",
    window: int = 32,
    sinks: int = 0,
    grow: bool = True,
    batch: int = 1,
) -> HeadPlan:
    """SnapKV with a budget that falls linearly from layer to layer (PyramidKV).

        tokens of layer l = b · (2 - 1/beta - l · (2 - 2/beta) / (L - 1)),   b the even budget, the mean over the layers

    The paper takes the window off b before, so its layers differ a little less at small budgets. Where the first layers would get more
    than the whole text, the slope is made as steep as it can be.

    model: a transformers model, or its `Fingerprint`.
    budget: size of the cache when the prompt has been read: 25% of it, 512tok a kv head, or 64MiB in all.
    beta: the last layer gets one beta-th of the even budget, at least its window; 1 is SnapKV.
    by: key scorer, a name of `headwise.keyscores` with options in brackets; by default SnapKV's.
    window: last tokens of the prompt, which are kept.
    sinks: first tokens that are kept whatever their score.
    grow: keep every token behind the prompt (the paper); otherwise the window slides.
    batch: rows, for a budget in bytes.

    >>> from headwise import Fingerprint
    >>> model = Fingerprint(architecture="Toy", config_hash="0", layers=3, heads=4, kv_heads=1)
    >>> pyramidkv(model, budget="25%", beta=20).kept(10_000).flatten().tolist()
    [4875, 2500, 125]
    """
    if not finite("beta", beta, PlanError) >= 1:
        raise PlanError(f"beta is {beta}; it must be at least 1: the last layer gets one beta-th of the even budget")
    shape = Shape.of(model)
    amount = Amount.of(budget, shape, batch)
    low = 1 / beta if not amount.share else max(1 / beta, 2 - 1 / amount.share)
    if not amount.share and amount.tokens > sinks + window:
        low = max(low, (sinks + window) / amount.tokens)
    if shape.layers == 1:
        low = 1.0
    factors = [2 - low - layer * (2 - 2 * low) / max(1, shape.layers - 1) for layer in range(shape.layers)]
    rows = [[amount.times(factor).selected(sinks, window, by=by, grow=grow)] * shape.kv_heads for factor in factors]
    return HeadPlan(
        patterns=tuple(map(tuple, rows)), prefill="dense", fingerprint=shape.fingerprint, method="pyramidkv"
    )
