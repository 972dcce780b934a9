"""SnapKV (Li et al. 2024, arXiv 2404.14469): every head keeps the tokens that the end of the prompt attends to."""

from __future__ import annotations

from typing import Any, Literal

from headwise.budget._amounts import Amount, Shape
from headwise.plan import Budget, HeadPlan
from headwise.registry import register


@register("budget", "snapkv")
def snapkv(
    model: Any,
    *,
    budget: Budget | str = "25%",
    window: int = 32,
    kernel: int = 7,
    pool: Literal["max", "avg"] = "max",
    sinks: int = 0,
    grow: bool = True,
    batch: int = 1,
) -> HeadPlan:
    """Every kv head keeps the prompt's last tokens and those that they attend to most (SnapKV).

        score_j = pool over neighbours of  1/L Σ_{i in window} softmax_j(q_i·k_j / √d),   the mean over the query heads of a kv head

    The choice is made once, at the end of the prompt, so the question must stand at its end; the prompt itself is read densely.

    model: a transformers model, or its `Fingerprint`.
    budget: size of the cache when the prompt has been read: 25% of it, 512tok a kv head, or 64MiB in all; the window counts.
    window: last tokens of the prompt, which observe and are kept.
    kernel: neighbouring keys whose scores are pooled, an odd number; 1 leaves them alone.
    pool: "max" or "avg".
    sinks: first tokens that are kept whatever their score.
    grow: keep every token behind the prompt (the paper); otherwise the window slides.
    batch: rows, for a budget in bytes.

    >>> from headwise import Fingerprint
    >>> model = Fingerprint(architecture="Toy", config_hash="0", layers=2, heads=4, kv_heads=2)
    >>> print(snapkv(model, budget="25%"))
    plan of 2 × 2 kv heads by snapkv: 4 × sinks0+window32+keep(-32+0.25n):observation(window=32,kernel=7,pool=max)+grow; dense prefill
    """
    shape, by = Shape.of(model), f"observation(window={window},kernel={kernel},pool={pool})"
    pattern = Amount.of(budget, shape, batch).selected(sinks, window, by=by, grow=grow)
    labels: dict[str, Any] = {"prefill": "dense", "fingerprint": shape.fingerprint, "method": "snapkv"}
    return HeadPlan.uniform(pattern, shape.layers, shape.kv_heads, **labels)
