"""HeadKV (Fu et al. 2024, arXiv 2410.19258): heads that retrieve keep more tokens, in proportion to their score."""

from __future__ import annotations

from typing import Any

from headwise.budget._amounts import Amount, Shape, deal
from headwise.budget._scores import kv_scores
from headwise.checks import finite
from headwise.errors import PlanError
from headwise.plan import Budget, HeadPlan
from headwise.registry import register
from headwise.units import Fingerprint, HeadScores


@register("budget", "headkv")
def headkv(
    scores: HeadScores,
    *,
    budget: Budget | str = "25%",
    beta: float = 1.2,
    by: str = "observation(window=32,kernel=7,pool=max)",
    window: int = 32,
    sinks: int = 0,
    grow: bool = True,
) -> HeadPlan:
    """SnapKV with a budget for every kv head, in proportion to its score (HeadKV).

        tokens of head h = b · (1 - 1/beta) + b/beta · L · K · s_h / Σ s,   b the even budget, the mean over all heads

    Negative scores count as 0. What a head cannot take, because it would be more than the whole text, goes to the others in proportion.

    scores: of `headwise score retrieval`, or any other score of heads; query heads are reduced to kv heads by their maximum.
    budget: size of the cache when the prompt has been read: 25% of it, or 512tok a kv head on average.
    beta: one beta-th of the budget is dealt out by score, the rest evenly; near 1 the scores rule.
    by: key scorer, a name of `headwise.keyscores` with options in brackets; by default SnapKV's.
    window: last tokens of the prompt, which are kept.
    sinks: first tokens that are kept whatever their score.
    grow: keep every token behind the prompt (the paper); otherwise the window slides.

    >>> import torch
    >>> retrieval = HeadScores(values=torch.tensor([[0.6, 0.2], [0.0, 0.2]]), kind="kv", method="retrieval")
    >>> headkv(retrieval, budget="25%", beta=2).kept(10_000).tolist()
    [[4250, 2250], [1250, 2250]]
    """
    if not finite("beta", beta, PlanError) >= 1:
        raise PlanError(f"beta is {beta}; it must be at least 1: one beta-th of the budget follows the scores")
    kv = kv_scores("scores", scores)
    unknown = Fingerprint(architecture="", config_hash="", layers=kv.layers, heads=kv.units, kv_heads=kv.units)
    amount = Amount.of(budget, Shape(kv.fingerprint or unknown))
    even = amount.share or float(amount.tokens)
    least = even * (1 - 1 / beta) if amount.share else max(even * (1 - 1 / beta), min(even, sinks + window))
    dealt = deal(kv.values.clamp(min=0).flatten().tolist(), even, least, 1.0 if amount.share else float("inf"))
    amounts = [Amount(share=x) if amount.share else Amount(tokens=x) for x in dealt]
    patterns = [one.times(1.0).selected(sinks, window, by=by, grow=grow) for one in amounts]
    rows = tuple(tuple(patterns[at : at + kv.units]) for at in range(0, len(patterns), kv.units))
    labels: dict[str, Any] = {"method": "headkv", "meta": {"scores": kv.method, "beta": float(beta)}}
    return HeadPlan(patterns=rows, prefill="dense", fingerprint=kv.fingerprint, **labels)
