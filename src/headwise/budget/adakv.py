"""AdaKV (Feng et al. 2024, arXiv 2407.11550): the heads of a layer share their budget, and the best tokens of all of them are kept."""

from __future__ import annotations

from typing import Any

from headwise.budget._amounts import Amount, Shape
from headwise.checks import finite
from headwise.errors import PlanError
from headwise.plan import Budget, HeadPlan
from headwise.registry import register


@register("budget", "adakv")
def adakv(
    model: Any,
    *,
    budget: Budget | str = "25%",
    floor: float = 0.2,
    by: str = "observation(window=32,kernel=7,pool=max)",
    window: int = 32,
    sinks: int = 0,
    grow: bool = True,
    batch: int = 1,
) -> HeadPlan:
    """The kv heads of a layer share their budget: the best tokens of all of them are kept, a floor for each (AdaKV).

    Each (row, kv head) first gets its `floor · room` best tokens, then the rest of the layer's room goes to the best scores of all heads
    together. So a head with concentrated attention keeps few tokens and one with wide attention many; how many is known when the prompt
    has been read, and the memory follows. The plan's table shows the mean, which is exact for one row; in a batch every head is stored
    as long as its longest row needs.

    model: a transformers model, or its `Fingerprint`.
    budget: size of the cache when the prompt has been read: 25% of it, 512tok a kv head, or 64MiB in all; the window counts.
    floor: share of the even room that every head gets for sure, in [0, 1]; 1 is the method of `by` alone.
    by: key scorer, a name of `headwise.keyscores` with options in brackets; by default SnapKV's.
    window: last tokens of the prompt, which are kept.
    sinks: first tokens that are kept whatever their score.
    grow: keep every token behind the prompt (the paper); otherwise the window slides.
    batch: rows, for a budget in bytes.

    >>> from headwise import Fingerprint
    >>> model = Fingerprint(architecture="Toy", config_hash="0", layers=2, heads=4, kv_heads=2)
    >>> adakv(model, budget="25%").kept(1000).tolist()
    [[250, 250], [250, 250]]
    """
    if not 0 <= finite("floor", floor, PlanError) <= 1:
        raise PlanError(f"floor is {floor}; it must lie in [0, 1]")
    shape, split = Shape.of(model), f"pooled(floor={float(floor):.6g})"
    pattern = Amount.of(budget, shape, batch).selected(sinks, window, by=by, split=split, grow=grow)
    labels: dict[str, Any] = {"prefill": "dense", "fingerprint": shape.fingerprint, "method": "adakv"}
    return HeadPlan.uniform(pattern, shape.layers, shape.kv_heads, **labels)
