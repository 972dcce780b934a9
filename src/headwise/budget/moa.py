"""MoA's plan (Fu et al. 2024, arXiv 2406.14909): every kv head its own span, alpha + beta · N, chosen by an integer programme."""

from __future__ import annotations

from headwise.budget._moa_front import moa_front, parse_lengths
from headwise.budget._moa_profile import InfluenceProfile
from headwise.plan import Budget, HeadPlan
from headwise.registry import register


@register("budget", "moa", paper="02")
def moa(
    profile: InfluenceProfile,
    *,
    budget: Budget | str = "50%",
    lengths: str | None = None,
    rules_per_layer: int | None = 2,
    lowest: float = 0.9,
    alpha_step: int | None = None,
    betas: int = 9,
    fixed_rows: bool = False,
    intervals: int = 0,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    dtype_bytes: int = 2,
    batch: int = 1,
    progress: bool = False,
) -> HeadPlan:
    """Each kv head keeps the first block and a window of alpha + beta · N tokens, its own rule chosen by an integer programme (MoA).

    Over x[u, c] = 1 iff unit u (layer, kv head) follows rule c, with Z the influence that a rule hides and D the tokens it keeps:

        minimise sum Z[P, u, c] x[u, c], over all profiled lengths P;  sum_c x[u, c] = 1;
        lowest · budget_N <= sum D[N, c] x[u, c] <= budget_N for all planned lengths N;  at most `rules_per_layer` rules in a layer

    Z of a kv head is summed over the block-wise maximum of its query heads' maps; D counts kept tokens, sinks included. Solved by HiGHS
    (scipy.optimize.milp) to a gap of 1e-3. The plan is the one of least mean loss over the profiled lengths, each scaled by the
    loss of the shortest spans; `headwise.budget.moa_front` gives the whole Pareto front to choose from by validation.

    profile: of `headwise score moa-influence`.
    budget: share of the full cache at every planned length, e.g. 50%; or tokens a kv head, or bytes in all, the same at every length.
    lengths: further lengths, split by commas, at which the budget has to hold; by default twice the longest profiled one.
    rules_per_layer: different rules in one layer; two make two groups of like heads for the kernels; as many as kv heads are no limit.
    lowest: least share of the budget to be used at every length; dropped where no plan can.
    alpha_step: step of alpha; by default an eighth of the longest profiled length (1024 for 8192, as published).
    betas: values of beta between 0 and 1.
    fixed_rows: plan for MoA's own engine, which gives all rows of a prompt the span of its whole length: influence and tokens are
      those of `moa_spans(plan, N)`, to be attached in its place. By default each row has the span of the tokens up to it, which is
      what an elastic cache does.
    intervals: above 0, minimise on the Pareto front of that many intervals; else once, for the mean.
    kv_heads: kv heads a layer, where the profile does not know its model.
    head_dim: size of a head, for a budget in bytes.
    dtype_bytes: bytes of a number in the cache, for a budget in bytes.
    batch: rows, for a budget in bytes.

    Returns a plan of `Elastic` patterns (and `Full` where a head keeps all). Raises PlanError for a budget out of reach, with the
    least that is possible, and for options out of range.

    >>> import torch
    >>> far, near = torch.ones(8, 8).tril(), torch.eye(8)
    >>> profile = InfluenceProfile.of({512: torch.stack([far, near])[None]}, 64, kind="kv")
    >>> plan = moa(profile, budget="60%", lengths="512")
    >>> plan.kept(512).tolist()
    [[448, 128]]
    """
    front = moa_front(
        profile,
        budget=budget,
        lengths=lengths if lengths is None else parse_lengths(lengths),
        rules_per_layer=rules_per_layer,
        lowest=lowest,
        alpha_step=alpha_step,
        betas=betas,
        fixed_rows=fixed_rows,
        intervals=intervals,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype_bytes=dtype_bytes,
        batch=batch,
        progress=progress,
    )
    return front.plans[0]
