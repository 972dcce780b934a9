"""Nothing is dropped: the yardstick of every budget."""

from __future__ import annotations

from typing import Any

from headwise.budget._amounts import Shape
from headwise.plan import HeadPlan
from headwise.registry import register


@register("budget", "full")
def full(model: Any) -> HeadPlan:
    """Every kv head keeps everything: the model as it is, with a cache that counts its bytes.

    model: a transformers model, or its `Fingerprint`.
    """
    shape = Shape.of(model)
    return HeadPlan.full(shape.layers, shape.kv_heads, fingerprint=shape.fingerprint, method="full")
