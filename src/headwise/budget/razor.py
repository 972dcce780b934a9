"""RazorAttention (arXiv 2407.15891): retrieval heads keep everything, the others sinks, a buffer and one token for all the rest."""

from __future__ import annotations

from typing import Any, Literal, get_args

from headwise.budget._scores import full_heads, kv_scores
from headwise.checks import finite, shown, whole
from headwise.errors import PlanError
from headwise.plan import Budget, Elastic, HeadPlan
from headwise.registry import register
from headwise.units import HeadScores, HeadSet

Weight = Literal["count", "one", "none"]


@register("budget", "razor", paper="30")
def razor(
    scores: HeadScores,
    *,
    echo: HeadScores | None = None,
    budget: Budget | str | None = None,
    induction_share: float = 0.14,
    echo_share: float = 0.01,
    sinks: int = 4,
    s0: int = 4000,
    c: float = 5.0,
    weight: Weight = "count",
    sliding: bool = False,
    kv_heads: int | None = None,
    context: int = 32768,
    head_dim: int | None = None,
    dtype_bytes: int = 2,
    batch: int = 1,
) -> HeadPlan:
    """Retrieval heads keep everything; all others sinks, a buffer and a compensation token (RazorAttention).

        kept of N tokens: the first `sinks`, the last max(s0, N / c); the rest D becomes one token (mean k, mean v of D), logit + log|D|

    The retrieval heads are, over all L · K kv heads at once, the best round(induction_share · L · K) by `scores` and the best
    round(echo_share · L · K) by `echo`; heads in both count once. Equal scores are ordered by layer and index. The prompt is read densely.

    scores: of `headwise score induction`, or any other score of heads. Query heads are reduced to kv heads by their maximum.
    echo: a second table, of `headwise score echo`; without it no head is kept as an echo head.
    budget: size of the cache at `context` tokens, e.g. 50% or 64MiB, instead of the shares: as many heads stay full as fit,
      echo heads in proportion to the shares.
    induction_share: share of the kv heads kept for `scores`, in [0, 1].
    echo_share: share of the kv heads kept for `echo`, in [0, 1].
    sinks: first tokens of the text that every head keeps.
    s0: shortest buffer of latest tokens; texts up to s0 + sinks tokens are left alone.
    c: the buffer is one c-th of the text where that is longer than s0; at least 1.
    weight: what the compensation token counts for: "count" as many tokens as it stands for (paper), "one" a single token
      (reference code), "none" leaves it out.
    sliding: fold what leaves the buffer while decoding too; otherwise the buffer grows by every new token (reference code).
    kv_heads: kv heads a layer, where `scores` does not know its model.
    context: tokens at which the budget has to be met; longer texts take more.
    head_dim: size of a head, needed for a budget in bytes.
    dtype_bytes: bytes of a number in the cache, for a budget in bytes.
    batch: rows, for a budget in bytes.

    Raises PlanError for an option out of range, UnitError or WrongModelError for tables that do not belong together.

    >>> import torch
    >>> induction = HeadScores(values=torch.arange(8.0).view(4, 2), kind="kv", method="induction")
    >>> plan = razor(induction, induction_share=0.25, s0=100)
    >>> str(plan.full_heads()), plan.kept(1000)[0].tolist()
    ('L3K0,L3K1', [204, 204])
    """
    kv = kv_scores("scores", scores, kv_heads)
    echoes = None if echo is None else kv_scores("echo", echo, kv_heads or kv.units)
    if echoes is not None:
        _check_pair(kv, echoes)
    other = buffer(sinks, s0, c, weight, sliding)
    shares = _share("induction_share", induction_share), _share("echo_share", echo_share)
    if budget is None:
        keep = kv.top_fraction(shares[0])
        if echoes is not None:
            keep = keep | echoes.top_fraction(shares[1])
    else:
        sizes: Any = {"context": context, "batch": batch, "head_dim": head_dim, "dtype_bytes": dtype_bytes}
        full = full_heads(budget, kv, other, **sizes)
        keep = _best_of_both(kv, echoes, full, shares)
    meta = {"scores": kv.method, "echo": "" if echoes is None else echoes.method, "full_heads": len(keep)}
    return HeadPlan.from_set(
        HeadSet.of(keep.pairs(), "kv"),
        other,
        kv.layers,
        kv.units,
        prefill="dense",
        fingerprint=kv.fingerprint,
        method="razor",
        meta=meta | {"of_heads": len(kv), "weight": weight},
    )


def buffer(sinks: int, s0: int, c: float, weight: Weight, sliding: bool) -> Elastic:
    """What a head that is no retrieval head keeps; PlanError for an option out of range."""
    if weight not in get_args(Weight):
        raise PlanError(f"weight is {shown(weight)}; it must be 'count', 'one' or 'none'")
    if not finite("c", c, PlanError) >= 1:
        raise PlanError(f"c is {c}; it must be at least 1: the buffer is one c-th of the text")
    least = max(1, whole("s0", s0, 0, PlanError))  # the newest token is always kept
    return Elastic(sinks, 0, 1 / c, minimum=least, compensation=weight, grow=not sliding)


def _best_of_both(scores: HeadScores, echo: HeadScores | None, full: int, shares: tuple[float, float]) -> HeadSet:
    """Exactly `full` heads: echo heads in proportion to the shares, then the best by `scores` until the number is reached."""
    total = sum(shares)
    keep = HeadSet.empty("kv") if echo is None or not total else echo.top(round(full * shares[1] / total))
    order = (HeadSet.of([(unit.layer, unit.index)], "kv") for unit, _ in scores.ranking())
    while len(keep) < full:
        keep = keep | next(order)
    return keep


def _check_pair(scores: HeadScores, echo: HeadScores) -> None:
    if scores.fingerprint and echo.fingerprint:
        scores.fingerprint.require(echo.fingerprint, "the table of scores")
    if scores.values.shape != echo.values.shape:
        raise PlanError(f"echo is a table {tuple(echo.values.shape)}, scores one {tuple(scores.values.shape)}")


def _share(name: str, value: float) -> float:
    if not 0 <= finite(name, value, PlanError) <= 1:
        raise PlanError(f"{name} is {value}; it must lie in [0, 1]")
    return float(value)
