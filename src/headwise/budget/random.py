"""Tokens kept at random: the control that a choice of tokens has to beat."""

from __future__ import annotations

from typing import Any

from headwise.budget._amounts import Amount, Shape
from headwise.checks import whole
from headwise.errors import PlanError
from headwise.plan import Budget, HeadPlan
from headwise.registry import register


@register("budget", "random")
def random(
    model: Any,
    *,
    budget: Budget | str = "25%",
    sinks: int = 4,
    window: int = 32,
    grow: bool = True,
    batch: int = 1,
    seed: int = 0,
) -> HeadPlan:
    """Sinks, a window, and further tokens drawn at random for each kv head: the control of methods that choose tokens.

    model: a transformers model, or its `Fingerprint`.
    budget: size of the cache when the prompt has been read: 25% of it, 512tok a kv head, or 64MiB in all.
    sinks: first tokens that every head keeps.
    window: latest tokens that every head keeps.
    grow: keep every token behind the prompt; otherwise the window slides.
    batch: rows, for a budget in bytes.
    seed: of the draw.
    """
    shape, by = Shape.of(model), f"random(seed={whole('seed', seed, 0, PlanError)})"
    pattern = Amount.of(budget, shape, batch).selected(sinks, window, by=by, grow=grow)
    labels: dict[str, Any] = {"prefill": "dense", "fingerprint": shape.fingerprint, "method": "random"}
    return HeadPlan.uniform(pattern, shape.layers, shape.kv_heads, **labels)
