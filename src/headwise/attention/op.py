"""`headwise.attention`: one op whose input says what each head computes.

Which keys a head reads is a pattern (per kv head), a ragged storage (`KVGroup`), or both; which queries it serves is
`active`; what happens to its output is `gate`. The result is the same whatever backend ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headwise.attention import ways
from headwise.attention.backends import Ran, choose
from headwise.attention.groups import KVGroup, Queries
from headwise.attention.ways import Given, Parts, Way
from headwise.errors import AttentionError
from headwise.plan import Full, Pattern


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
    selected: Tensor | None = None,
    key_block: int = 1,
    query_block: int = 1,
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
    `start` (B,): first real column of each row (left padding); (B, N): where each query's own sequence begins (packed rows).
    `offset`: columns before the first query (default M - N).
    `active` (B, H, N) bool: queries that a head serves; others give exactly 0. `gate` (B, H, N): factor on the output.
    `selected` (B, K, C, E) int32: lists of key blocks of `key_block` columns, without repeats, -1 = none; list c serves the
    queries c·query_block … of all heads of the group, C = ceil(N / query_block). The pattern and causality hold inside them.
    `scale` defaults to 1/sqrt(D). Returns out (B, H, N, Dv), or `AttentionOutput` with `return_lse` or `explain`.

    >>> q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    >>> from headwise.plan import SinkWindow
    >>> attention(q, k, k, patterns=[Full(), SinkWindow(sinks=1, window=4)]).shape
    torch.Size([1, 4, 9, 8])
    """
    given = Given(
        q, k, v, groups, patterns, causal, mask, start, offset, active, gate, selected, key_block, query_block,
        scale, dropout, return_lse, backend,
    )  # fmt: skip
    key = given.signature()
    way = ways.recall(key)
    if way is None:
        parts, offset = _checked(given)
        request = given.request(parts, offset, {})
        way = Way(parts, offset, request.notes, *choose(request, backend))
        ways.remember(key, way)
        out, lse = way.backend.run(request)
    else:
        out, lse = way.run(given)
    if return_lse or explain:
        return AttentionOutput(out, lse, way.ran)
    return out


def split_by_pattern(k: Tensor, v: Tensor, patterns: Sequence[Pattern]) -> list[KVGroup]:
    """Groups of kv heads with equal patterns over the same dense keys, k (B, K, M, D)."""
    return list(ways.dense_groups(k, v, _alike(patterns)))


def _alike(patterns: Sequence[Pattern]) -> Parts:
    """Kv heads with equal patterns."""
    heads: dict[Pattern, list[int]] = {}
    for head, pattern in enumerate(patterns):
        heads.setdefault(pattern, []).append(head)
    return tuple((pattern, tuple(hs)) for pattern, hs in heads.items())


def _checked(given: Given) -> tuple[Parts | None, int]:
    """The heads of dense keys by pattern, and the columns before the first query. Raises AttentionError for what does not fit."""
    q, k, v = given.q, given.k, given.v
    patterns = _patterns(given)
    parts = None if patterns is None else _alike(patterns)
    groups = ways.dense_groups(k, v, parts) if k is not None and v is not None and parts else given.groups or ()
    queries = _queries(q, groups, given.causal, given.mask, given.start, given.offset)
    if given.selected is not None:
        for group in groups:
            _check_selection(group, queries, given)
    _check(q, groups, given.active, given.gate)
    for group in groups:
        _check_group(q, group, given.causal)
    if patterns is not None and given.backend in ("auto", "sdpa"):
        parts = _alike([_as_read(pattern, queries, k.shape[2]) for pattern in patterns])  # type: ignore[union-attr]
    return parts, queries.offset


def _as_read(pattern: Pattern, queries: Queries, M: int) -> Pattern:
    """A window at least as long as the text reads all of it: then all heads are alike."""
    short = queries.causal and queries.offset + queries.count == M and not pattern.selects
    return Full() if short and pattern.kept(M) == M else pattern


def _patterns(given: Given) -> Sequence[Pattern] | None:
    """One pattern a kv head of dense keys; None where groups are given. Raises AttentionError where neither fits."""
    k, v, groups, patterns = given.k, given.v, given.groups, given.patterns
    if (groups is None) == (k is None) or (k is None) != (v is None):
        raise AttentionError("give either k and v, or groups")
    if groups is not None:
        if patterns is not None:
            raise AttentionError("patterns= belongs to dense k, v; a KVGroup carries its own pattern")
        return None
    assert k is not None and v is not None
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
        raise AttentionError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must be (B, K, M, D) and agree in B, K, M")
    if patterns is None or isinstance(patterns, Pattern):
        patterns = [patterns or Full()] * k.shape[1]
    if len(patterns) != k.shape[1] or not all(isinstance(pattern, Pattern) for pattern in patterns):
        raise AttentionError(
            f"patterns is {patterns!r:.80}; it must hold one Pattern for each of the {k.shape[1]} kv heads"
        )
    return patterns


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
            offset = max((g.k.shape[2] for g in groups), default=N) - N
        else:
            raise AttentionError("offset= is needed when groups carry positions: the columns before the first query")
    if mask is not None:
        if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != N:
            raise AttentionError(f"mask must be bool (B, 1, N={N}, M); it is {mask.dtype} {tuple(mask.shape)}")
        wanted = {g.k.shape[2] for g in groups if g.positions is None} or {offset + N}
        if mask.shape[0] not in (1, q.shape[0]) or wanted != {mask.shape[3]}:
            raise AttentionError(
                f"mask is {tuple(mask.shape)}; B must be 1 or {q.shape[0]}, and M the {sorted(wanted)} columns of the keys"
            )
    if start is not None:
        _check_start(q, groups, start, mask, causal)
    if causal and offset < 0:
        raise AttentionError(f"causal attention of N={N} queries over fewer keys (M={N + offset}) is not defined")
    return Queries(count=N, offset=offset, start=start, mask=mask, causal=causal)


def _check_start(q: Tensor, groups: Sequence[KVGroup], start: Tensor, mask: Tensor | None, causal: bool) -> None:
    B, N = q.shape[0], q.shape[2]
    if tuple(start.shape) not in ((B,), (B, N)) or start.is_floating_point():
        raise AttentionError(
            f"start must be integers (B={B},) or (B={B}, N={N}); it is {start.dtype} {tuple(start.shape)}"
        )
    if start.ndim == 2 and (mask is not None or not causal or any(g.positions is not None for g in groups)):
        raise AttentionError("start by query (packed rows) needs causal attention, dense keys and no mask=")


def _check_selection(group: KVGroup, queries: Queries, given: Given) -> None:
    """Raises AttentionError where lists and keys do not fit together."""
    selected, key_block, query_block = given.selected, given.key_block, given.query_block
    assert selected is not None
    B, N = group.k.shape[0], queries.count
    if min(key_block, query_block) < 1:
        raise AttentionError(f"key_block={key_block} and query_block={query_block} must be at least 1")
    C = -(-N // query_block)
    if selected.ndim != 4 or selected.dtype != torch.int32 or (selected.shape[0], selected.shape[2]) != (B, C):
        raise AttentionError(
            f"selected must be int32 (B={B}, K, C={C}, E), C lists of {query_block} queries each; "
            f"it is {selected.dtype} {tuple(selected.shape)}"
        )
    if max(group.heads) >= selected.shape[1]:
        raise AttentionError(
            f"selected has lists for {selected.shape[1]} kv heads; kv head {max(group.heads)} has none"
        )
    if group.positions is not None:
        raise AttentionError("selected names columns; a ragged cache holds keys in any order")


def _check(q: Tensor, groups: Sequence[KVGroup], active: Tensor | None, gate: Tensor | None) -> None:
    B, H, N, D = q.shape
    heads = sorted(h for g in groups for h in g.heads)
    K = len(heads)
    if heads != list(range(K)) or K == 0:
        raise AttentionError(f"groups hold kv heads {heads}; together they must hold each of 0..K-1 once")
    if H % K:
        raise AttentionError(
            f"q has {H} heads, k has {K}: the number of query heads must be a multiple of the kv heads"
        )
    for name, t in (("active", active), ("gate", gate)):
        if t is not None and t.shape != (B, H, N):
            raise AttentionError(f"{name} has shape {tuple(t.shape)}; it must be (B={B}, H={H}, N={N})")
    if active is not None and active.dtype != torch.bool:
        raise AttentionError(f"active must be bool, it is {active.dtype}")
    if gate is not None and not gate.is_floating_point():
        raise AttentionError(f"gate must be floating point, it is {gate.dtype}")


def _check_group(q: Tensor, group: KVGroup, causal: bool) -> None:
    B, Kg, D, k, v = q.shape[0], len(group.heads), q.shape[3], group.k, group.v
    if k.ndim != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (B, Kg, D) or v.shape[:-1] != k.shape[:-1]:
        raise AttentionError(
            f"k and v of heads {group.heads} are {tuple(k.shape)} and {tuple(v.shape)}; "
            f"they must be (B={B}, {Kg}, S, D={D}) and (B={B}, {Kg}, S, Dv)"
        )
    if {k.device, v.device} != {q.device}:
        raise AttentionError(f"q is on {q.device}, k on {k.device}, v on {v.device}: move them together")
    if {k.dtype, v.dtype} != {q.dtype}:
        raise AttentionError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one dtype")
    slots = None if group.positions is None else group.positions.shape
    if slots is not None and (slots[0] not in (1, B) or slots[1] not in (1, Kg) or slots[2:] != k.shape[2:3]):
        raise AttentionError(
            f"positions of heads {group.heads} are {tuple(slots)}; they must be (1 or B={B}, 1 or {Kg}, S={k.shape[2]})"
        )
    if not causal and not group.pattern.keeps_all:
        raise AttentionError(f"pattern {group.pattern} needs causal attention; this attention is bidirectional")
