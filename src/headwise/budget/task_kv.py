"""Task-KV (He et al. 2025, arXiv 2501.15113): heads that differ from the others keep everything, the rest a few middle tokens."""

from __future__ import annotations

from typing import Any

from headwise.budget._amounts import Amount, Shape
from headwise.budget._semantic import Group, Metric, far_heads, rounded
from headwise.checks import finite, whole
from headwise.errors import PlanError
from headwise.plan import Budget, HeadPlan, Selected
from headwise.registry import register


@register("budget", "task-kv", paper="11")
def task_kv(
    model: Any,
    *,
    budget: Budget | str = "60%",
    beta: float = 0.25,
    m: float | None = None,
    closest: bool = True,
    tokens: int = 256,
    window: int = 32,
    kernel: int = 7,
    sinks: int = 16,
    recent: int = 256,
    group: Group = "mean",
    metric: Metric = "l2",
    count_sinks: bool = True,
    context: int = 8192,
    batch: int = 1,
) -> HeadPlan:
    """Per prompt, heads that differ keep everything; the others sinks, recent tokens and a few middle ones (Task-KV).

        c = mean of softmax(q k^T / √d) over the last `window` queries;   v' = Σ c_j v_j over the `tokens` largest c_j
        distance of head h = ||v'_h - mean over heads of v'||;   f(r) = n·beta - (n·beta - m)/(R-1)·r heads of layer r differ
        k = (B - N·n_full) / (n - n_full) - sinks - recent middle tokens for the others, by c, average-pooled over `kernel` keys

    n counts kv heads; c of a kv head joins its query heads. The round(f) farthest heads and the closest of the rest are whole,
    n_full = round(f) + 1 (halves up). Everything is decided when the prompt has been read, for each row of a batch, so the question must
    stand at its end, and a compressed cache must not serve another question. What comes later is kept. Prompts too short for so many
    whole heads keep fewer of them whole; prompts up to sinks + recent tokens are left alone.

    model: a transformers model, or its `Fingerprint`.
    budget: size of the cache when the prompt has been read: 60% of it, 2048tok a kv head, or 64MiB in all; each layer gets the same.
    beta: share of the kv heads that differ in the first layer, in [0, 1].
    m: heads that differ in the last layer, at most n; by default an eighth of the kv heads, rounded.
    closest: keep the head closest to the centre whole too, as the common view.
    tokens: keys of a semantic vector (t); at most those that there are.
    window: last queries that observe (L); at most those that there are.
    kernel: neighbouring keys that are averaged when middle tokens are chosen, an odd number.
    sinks: first tokens that every head keeps (s1).
    recent: latest tokens of the prompt that every head keeps (s2).
    group: how the query heads of a kv head are joined, "mean" or "max".
    metric: "l2" (the paper), or "cosine", which looks away from the scale of a head's values.
    count_sinks: let the sinks take part in the semantic vectors.
    context: tokens at which the budget has to hold f(r) whole heads.
    batch: rows, for a budget in bytes.

    Raises PlanError for fewer than three kv heads, and for a budget too small for the whole heads at `context`, with the least possible.

    >>> from headwise import Fingerprint
    >>> llama = Fingerprint(architecture="Llama-2-7B", config_hash="0", layers=32, heads=32, kv_heads=32)
    >>> plan = task_kv(llama, budget="40%")
    >>> plan.patterns[15][0].split, round(plan.ratio(8192), 3)
    ('spread(heads=6,closest=1,tokens=256,window=32,group=mean,metric=l2,sinks=1)', 0.4)
    """
    shape = Shape.of(model)
    n = shape.kv_heads
    if n < 3:
        raise PlanError(
            f"this model has {n} kv heads a layer; two are always equally far from their mean, so three are needed"
        )
    if not 0 <= finite("beta", beta, PlanError) <= 1:
        raise PlanError(f"beta is {beta}; it must lie in [0, 1], the share of heads that differ in the first layer")
    last = rounded(n / 8) if m is None else finite("m", m, PlanError)
    if not 0 <= last <= n:
        raise PlanError(f"m is {m}; it must lie in [0, {n}], the kv heads of a layer")
    amount = Amount.of(budget, shape, batch)
    by = f"observation(window={_count('window', window)},kernel={kernel},pool=avg,group={group})"
    rows = []
    for layer in range(shape.layers):
        far = min(n, rounded(far_heads(layer, shape.layers, n, beta, last)))
        split = (
            f"spread(heads={far},closest={int(closest)},tokens={_count('tokens', tokens)},window={window},group={group},"
            f"metric={metric},sinks={int(count_sinks)})"
        )
        pattern = amount.selected(sinks, recent, by=by, split=split, grow=True)
        _check_room(pattern, layer, min(n, far + int(closest)), n, whole("context", context, 1, PlanError))
        rows.append((pattern,) * n)
    labels: dict[str, Any] = {"method": "task-kv", "meta": {"beta": float(beta), "m": float(last), "closest": closest}}
    return HeadPlan(patterns=tuple(rows), prefill="dense", fingerprint=shape.fingerprint, **labels)


def _count(name: str, value: int) -> int:
    return whole(name, value, 1, PlanError)


def _check_room(pattern: Selected, layer: int, full: int, heads: int, context: int) -> None:
    """Whole heads must fit into the layer's budget at `context`."""
    always = min(context, pattern.sinks + pattern.recent)
    if full * (context - always) > pattern.room(context, heads):
        least = (full * context + (heads - full) * always) / (heads * context)
        raise PlanError(
            f"layer {layer} keeps {full} of {heads} kv heads whole, which takes a budget of at least {least:.4f} at {context} tokens; "
            "raise the budget, or lower beta and m"
            + (", or give closest=False" if "closest=1" in pattern.split else "")
        )
