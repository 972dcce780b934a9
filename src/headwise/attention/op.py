"""`headwise.attention`: one op whose input says what each head computes.

Which keys a head reads is a pattern (per kv head), a ragged storage (`KVGroup`), or both; which queries it serves is
`active`; what happens to its output is `gate`. The result is the same whatever backend ran.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from headwise.attention import reference, sdpa
from headwise.attention.groups import KVGroup, Queries, query_heads
from headwise.errors import AttentionError
from headwise.plan import Full, Pattern


@dataclass(frozen=True)
class Ran:
    """Which backend ran, and why that one."""

    backend: str
    reason: str


class AttentionOutput(NamedTuple):
    """out (B, H, N, Dv); lse (B, H, N) float32 if asked for; `ran` says which backend and why."""

    out: Tensor
    lse: Tensor | None
    ran: Ran


def attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    groups: Sequence[KVGroup] | None = None,
    patterns: Pattern | Sequence[Pattern] | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
    start: Tensor | None = None,
    offset: int | None = None,
    active: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
    explain: bool = False,
) -> Tensor | AttentionOutput:
    """Attention in which every head may read other keys and serve other queries.

    out[b,h,i] = gate[b,h,i] * sum_j softmax_j(scale * q[b,h,i].k[b,h',j]) v[b,h',j],  j over what head h lets query i see.

    Shapes: q (B, H, N, D); k (B, K, M, D) and v (B, K, M, Dv) with H a multiple of K, or `groups`, a list of
    `KVGroup` that together hold every kv head once (a ragged cache). `patterns`: one `Pattern`, or one per kv head.
    `causal`: queries are the last N of M columns. `mask` (B, 1, N, M) bool replaces that rule by the model's own.
    `start` (B,): first real column of each row (left padding). `offset`: columns before the first query (default M - N).
    `active` (B, H, N) bool: queries that a head serves; others give exactly 0. `gate` (B, H, N): factor on the output.
    `scale` defaults to 1/sqrt(D). Returns out (B, H, N, Dv), or `AttentionOutput` with `return_lse` or `explain`.

    >>> q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    >>> from headwise.plan import SinkWindow
    >>> attention(q, k, k, patterns=[Full(), SinkWindow(sinks=1, window=4)]).shape
    torch.Size([1, 4, 9, 8])
    """
    groups = _as_groups(q, k, v, groups, patterns)
    queries = _queries(q, groups, causal, mask, start, offset)
    _check(q, groups, active, gate)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run, ran = choose(q, groups, backend, need_lse=return_lse, dropout=dropout)
    out, lse = _over_groups(run, q, groups, queries, scale)
    if active is not None:
        out = torch.where(active[..., None], out, torch.zeros((), dtype=out.dtype, device=out.device))
    if gate is not None:
        out = out * gate[..., None].to(out.dtype)
    if return_lse or explain:
        return AttentionOutput(out, lse, ran)
    return out


GroupKernel = Callable[[Tensor, KVGroup, Queries, float], tuple[Tensor, Tensor | None]]


def choose(
    q: Tensor, groups: Sequence[KVGroup], backend: str, *, need_lse: bool, dropout: float
) -> tuple[GroupKernel, Ran]:
    """The kernel for one group, and the reason. Unknown or unusable backends raise `AttentionError`."""
    if backend == "reference":
        if dropout:
            raise AttentionError(f"dropout={dropout}: the reference backend has no dropout; use backend='sdpa'")
        return reference.attend, Ran("reference", "asked for")
    if backend == "flex":
        from headwise.attention import flex

        flex.require(q, groups, need_lse=need_lse, dropout=dropout)
        return flex.attend, Ran("flex", "asked for")
    if backend in ("auto", "sdpa"):

        def run(q: Tensor, group: KVGroup, queries: Queries, scale: float) -> tuple[Tensor, Tensor | None]:
            return sdpa.attend(q, group, queries, scale, need_lse=need_lse, dropout=dropout)

        return run, Ran("sdpa", "asked for" if backend == "sdpa" else _why_sdpa(q, groups, need_lse))
    raise AttentionError(f"backend={backend!r} is unknown; choose auto, reference, sdpa or flex")


def _why_sdpa(q: Tensor, groups: Sequence[KVGroup], need_lse: bool) -> str:
    if need_lse or any(g.compensation is not None for g in groups):
        return "log-sum-exp is needed: logits of a few rows at a time"
    kinds = {"full" if g.pattern.keeps_all else "window" for g in groups}
    return f"library kernels over {len(groups)} group(s) of like heads ({', '.join(sorted(kinds))}) on {q.device.type}"


def _over_groups(
    run: GroupKernel, q: Tensor, groups: Sequence[KVGroup], queries: Queries, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Run every group on its own query heads and put the heads back in order."""
    kv_heads = sum(len(g.heads) for g in groups)
    G = q.shape[1] // kv_heads
    if len(groups) == 1 and groups[0].heads == tuple(range(kv_heads)):
        return run(q, groups[0], queries, scale)
    order: list[int] = []
    outs, lses = [], []
    for group in groups:
        heads = query_heads(group.heads, G)
        out, lse = run(q[:, _as_slice(heads)], group, queries, scale)
        order += heads
        outs.append(out)
        lses.append(lse)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    back = back.to(q.device)
    out = torch.cat(outs, dim=1).index_select(1, back)
    if lses[0] is None:
        return out, None
    return out, torch.cat([lse for lse in lses if lse is not None], dim=1).index_select(1, back)


def _as_slice(indices: list[int]) -> slice | list[int]:
    """Neighbouring heads are a view; others are gathered."""
    if indices == list(range(indices[0], indices[-1] + 1)):
        return slice(indices[0], indices[-1] + 1)
    return indices


def split_by_pattern(k: Tensor, v: Tensor, patterns: Sequence[Pattern]) -> list[KVGroup]:
    """Groups of kv heads with equal patterns over the same dense keys, k (B, K, M, D)."""
    heads: dict[Pattern, list[int]] = {}
    for head, pattern in enumerate(patterns):
        heads.setdefault(pattern, []).append(head)
    return [
        KVGroup(heads=tuple(hs), k=k[:, _as_slice(hs)], v=v[:, _as_slice(hs)], pattern=pattern)
        for pattern, hs in heads.items()
    ]


def _as_groups(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    groups: Sequence[KVGroup] | None,
    patterns: Pattern | Sequence[Pattern] | None,
) -> list[KVGroup]:
    if (groups is None) == (k is None) or (k is None) != (v is None):
        raise AttentionError("give either k and v, or groups")
    if groups is not None:
        if patterns is not None:
            raise AttentionError("patterns= belongs to dense k, v; a KVGroup carries its own pattern")
        return list(groups)
    assert k is not None and v is not None
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
        raise AttentionError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must be (B, K, M, D) and agree in B, K, M")
    if patterns is None or isinstance(patterns, Pattern):
        patterns = [patterns or Full()] * k.shape[1]
    if len(patterns) != k.shape[1]:
        raise AttentionError(f"patterns has {len(patterns)} entries, k has {k.shape[1]} kv heads")
    return split_by_pattern(k, v, patterns)


def _queries(
    q: Tensor,
    groups: Sequence[KVGroup],
    causal: bool,
    mask: Tensor | None,
    start: Tensor | None,
    offset: int | None,
) -> Queries:
    if q.ndim != 4:
        raise AttentionError(f"q has shape {tuple(q.shape)}; it must be (B, H, N, D)")
    N = q.shape[2]
    if offset is None:
        if mask is not None:
            offset = mask.shape[-1] - N
        elif all(g.positions is None for g in groups):
            offset = max(g.k.shape[2] for g in groups) - N
        else:
            raise AttentionError("offset= is needed when groups carry positions: the columns before the first query")
    if mask is not None:
        if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != N:
            raise AttentionError(f"mask must be bool (B, 1, N={N}, M); it is {mask.dtype} {tuple(mask.shape)}")
    if causal and offset < 0:
        raise AttentionError(f"causal attention of N={N} queries over fewer keys (M={N + offset}) is not defined")
    return Queries(count=N, offset=offset, start=start, mask=mask, causal=causal)


def _check(q: Tensor, groups: Sequence[KVGroup], active: Tensor | None, gate: Tensor | None) -> None:
    B, H, N, D = q.shape
    heads = sorted(h for g in groups for h in g.heads)
    K = len(heads)
    if heads != list(range(K)) or K == 0:
        raise AttentionError(f"groups hold kv heads {heads}; together they must hold each of 0..K-1 once")
    if H % K:
        raise AttentionError(f"q has {H} heads, k has {K}: the number of query heads must be a multiple of the kv heads")
    for g in groups:
        if g.k.shape[0] != B or g.k.shape[1] != len(g.heads) or g.k.shape[3] != D:
            raise AttentionError(f"k of heads {g.heads} is {tuple(g.k.shape)}; expected (B={B}, {len(g.heads)}, S, D={D})")
        if g.k.device != q.device or g.v.device != q.device:
            raise AttentionError(f"q is on {q.device}, k on {g.k.device}, v on {g.v.device}: move them together")
    for name, t in (("active", active), ("gate", gate)):
        if t is not None and t.shape != (B, H, N):
            raise AttentionError(f"{name} has shape {tuple(t.shape)}; it must be (B={B}, H={H}, N={N})")
    if active is not None and active.dtype != torch.bool:
        raise AttentionError(f"active must be bool, it is {active.dtype}")
    if gate is not None and not gate.is_floating_point():
        raise AttentionError(f"gate must be floating point, it is {gate.dtype}")


def explain(q: Tensor, k: Tensor, **options: object) -> Ran:
    """Which backend `attention` would run on these shapes, and why; nothing is computed on the values."""
    backend = str(options.pop("backend", "auto"))
    groups = split_by_pattern(k, k, [Full()] * k.shape[1])
    return choose(q, groups, backend, need_lse=bool(options.pop("return_lse", False)), dropout=0.0)[1]


__all__ = ["AttentionOutput", "KVGroup", "Queries", "Ran", "attention", "explain", "replace", "split_by_pattern"]
