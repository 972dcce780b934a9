"""DuoAttention's split (Xiao et al. 2024, arXiv 2410.10819): the best kv heads keep the whole past, the others sinks and a window."""

from typing import Any

import torch

from headwise.budget._scores import full_heads, kv_scores, mixed
from headwise.checks import finite, whole
from headwise.errors import PlanError
from headwise.plan import Budget, HeadPlan, Prefill, SinkWindow
from headwise.registry import register
from headwise.units import HeadScores, HeadSet


@register("budget", "duo", paper="09")
def duo(
    scores: HeadScores,
    *,
    budget: Budget | str | None = None,
    sparsity: float | None = None,
    threshold: float | None = None,
    mix: HeadScores | None = None,
    mix_share: float = 0.5,
    sinks: int = 64,
    window: int = 256,
    prefill: Prefill = "masked",
    context: int = 8192,
    head_dim: int | None = None,
    dtype_bytes: int = 2,
    batch: int = 1,
    seed: int = 0,
) -> HeadPlan:
    """The best kv heads of the whole model stay full, all others keep sinks and a window (DuoAttention).

    Heads are compared over all L · K of them at once, so layers get unequal shares. How many stay full is said in one of three ways.
    Heads of exactly equal scores, such as gates clamped to 0 or 1, are ordered by chance, the same for every call with one seed;
    so a higher sparsity always keeps a subset.

    budget: size of the cache at `context` tokens, e.g. 50%, 512tok or 64MiB; as many heads stay full as fit.
    sparsity: share of heads that stream; round((1 - sparsity) · L · K) stay full.
    threshold: heads with a score of at least this stay full. Gates of GQA models crowd near 1, where a fixed threshold saves nothing.
    mix: further scores of the same model, for a plan that serves two ends: gates find the heads that fetch a fact, `stream-difference`
      those that perplexity needs. Each table is divided by its largest score first.
    mix_share: weight of `mix`, from 0 (none) to 1 (it alone); the other scores weigh 1 - mix_share.
    sinks: first tokens that a streaming head keeps.
    window: latest tokens that a streaming head keeps.
    prefill: "masked" reads the prompt as decoding will, whatever the chunks; "dense" lets each chunk see all of itself (the paper).
    context: tokens at which the budget has to be met; longer texts take more.
    head_dim: size of a head, needed for a budget in bytes.
    dtype_bytes: bytes of a number in the cache, for a budget in bytes.
    batch: rows, for a budget in bytes.
    seed: of the order among equal scores.

    Scores of query heads are reduced to kv heads by their maximum, if they know their model. Raises PlanError.

    >>> gates = HeadScores(values=torch.tensor([[0.9, 0.1], [1.0, 0.3]]), kind="kv", method="duo-gates")
    >>> print(duo(gates, sparsity=0.5, sinks=4, window=28))
    plan of 2 × 2 kv heads by duo: 2 × full, 2 × sinks4+window28; masked prefill
    >>> duo(gates, budget="28%", sinks=4, window=28, context=1000).full_heads() == HeadSet.parse("L1K0")
    True
    """
    given = {"budget": budget, "sparsity": sparsity, "threshold": threshold}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise PlanError(f"give exactly one of budget=, sparsity= and threshold=, not {' and '.join(chosen) or 'none'}")
    kv, other = kv_scores("scores", scores), SinkWindow(sinks, window)
    if not 0 <= finite("mix_share", mix_share, PlanError) <= 1:
        raise PlanError(f"mix_share is {mix_share}; it must lie in [0, 1], the weight of mix")
    kv = kv if mix is None else mixed(kv, kv_scores("mix", mix, kv.units), mix_share)
    if budget is not None:
        sizes: Any = {"context": context, "batch": batch, "head_dim": head_dim, "dtype_bytes": dtype_bytes}
        full = full_heads(budget, kv, other, **sizes)
    elif sparsity is not None:
        if not 0 <= finite("sparsity", sparsity, PlanError) <= 1:
            raise PlanError(f"sparsity is {sparsity}; it must lie in [0, 1], the share of heads that stream")
        full = round((1 - sparsity) * len(kv))
    else:
        full = int((kv.values >= finite("threshold", threshold, PlanError)).sum())
    return HeadPlan.from_set(
        _best(kv, full, seed),
        other,
        kv.layers,
        kv.units,
        prefill=prefill,
        fingerprint=kv.fingerprint,
        method="duo",
        meta={"scores": kv.method, "full_heads": full, "of_heads": len(kv), "seed": seed},
    )


def _best(scores: HeadScores, count: int, seed: int) -> HeadSet:
    """The `count` best units; equal scores in a random order, which is the same for one seed whatever the count."""
    generator = torch.Generator().manual_seed(whole("seed", seed, 0, PlanError))
    shuffled = torch.randperm(len(scores), generator=generator)
    order = scores.values.flatten()[shuffled].sort(stable=True, descending=True).indices
    best = shuffled[order[:count]].tolist()
    return HeadSet.of([divmod(place, scores.units) for place in best], "kv")
