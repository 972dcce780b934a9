"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): every head keeps the first tokens and the latest ones; and plain windows."""

from __future__ import annotations

from typing import Any

from headwise.budget._amounts import Amount, Shape
from headwise.checks import whole
from headwise.errors import PlanError
from headwise.plan import Budget, Elastic, HeadPlan, Pattern, Prefill, SinkWindow
from headwise.registry import register


@register("budget", "streaming-llm")
def streaming_llm(
    model: Any, *, budget: Budget | str = "25%", sinks: int = 4, prefill: Prefill = "masked", batch: int = 1
) -> HeadPlan:
    """Every kv head keeps its first tokens and the latest ones, as many as the budget allows (StreamingLLM).

    A budget in tokens or bytes gives a fixed window, a ratio one that grows with the text. Positions are those of the text; the paper
    counts them within the cache, which lets a text run beyond the trained length and is not what this plan does.

    model: a transformers model, or its `Fingerprint`.
    budget: size of the cache: 25% of the text, 512tok a kv head, or 64MiB in all.
    sinks: first tokens that every head keeps; 0 leaves a plain window.
    prefill: "masked" reads the prompt as decoding will; "dense" reads it whole, and then drops.
    batch: rows, for a budget in bytes.

    >>> from headwise import Fingerprint
    >>> model = Fingerprint(architecture="Toy", config_hash="0", layers=2, heads=4, kv_heads=2)
    >>> print(streaming_llm(model, budget="64tok"))
    plan of 2 × 2 kv heads by streaming-llm: 4 × sinks4+window60; masked prefill
    """
    shape = Shape.of(model)
    amount, sinks = Amount.of(budget, shape, batch), whole("sinks", sinks, 0, PlanError)
    pattern: Pattern
    if amount.share:
        pattern = Elastic(sinks, -sinks, amount.share)
    elif int(amount.tokens) > sinks:
        pattern = SinkWindow(sinks, int(amount.tokens) - sinks)
    else:
        raise PlanError(f"the budget leaves {int(amount.tokens)} tokens for a kv head, and {sinks} are sinks: raise it")
    labels: dict[str, Any] = {"prefill": prefill, "fingerprint": shape.fingerprint, "method": "streaming-llm"}
    return HeadPlan.uniform(pattern, shape.layers, shape.kv_heads, **labels)
