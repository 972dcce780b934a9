"""Portable Triton kernels for selected keys: every query reads its own list, forward and backward.

Letters as in ``_kernels_blocks``. Query i of (b, kv head) reads the key blocks Index[b,kvh,i,:] (-1 = none), BS keys each,
BS = 1 for single keys. A tile holds the G query heads of one query, padded to BG rows, and BN gathered keys.
"""

import triton
import triton.language as tl


@triton.jit
def listed_keys(chosen, begin, total, pos, first, M, BS: tl.constexpr, BN: tl.constexpr):
    """Key numbers of list places begin .. begin + BN and whether the query reads them."""
    t = begin + tl.arange(0, BN)
    block = tl.load(chosen + t // BS, mask=t < total, other=-1)
    key = block * BS + t % BS
    seen = (t < total) & (block >= 0) & (key < M) & (key <= pos) & (key >= first)
    return tl.where(seen, key, 0).to(tl.int64), seen


@triton.jit
def query_tile(pid, N, K, G, BG: tl.constexpr):
    """(query, flat kv head, row, kv head) of a program and its query heads with their validity; last queries first."""
    units = tl.num_programs(0) // N
    i = N - 1 - pid // units
    kv = pid % units
    g = tl.arange(0, BG)
    return i, kv, (kv // K).to(tl.int64), kv % K, tl.where(g < G, g, 0), g < G


@triton.jit
def keys_fwd(
    Q, K_, V, Index, First, Out, Lse, qb, qh, qn, kb, kh, kn, vb, vh, vn, scale_log2, K, G, N, M, entries,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out and Lse of one query in all heads of a group."""
    i, kv, b, kvh, g, in_g = query_tile(tl.program_id(0), N, K, G, BG)
    h = kvh * G + g
    pos = i + M - N if CAUSAL else M - 1
    first = tl.load(First + b * N + i) if PACKED else 0
    d = tl.arange(0, BD)
    in_d = d < D
    put = in_g[:, None] & in_d[None, :]
    q = tl.load(Q + b * qb + i.to(tl.int64) * qn + (h.to(tl.int64) * qh)[:, None] + d[None, :], mask=put, other=0.0)
    acc = tl.zeros((BG, BD), tl.float32)
    m = tl.full((BG,), float("-inf"), tl.float32)
    l = tl.zeros((BG,), tl.float32)  # noqa: E741
    chosen = Index + (kv.to(tl.int64) * N + i) * entries
    for begin in range(0, entries * BS, BN):
        at, seen = listed_keys(chosen, begin, entries * BS, pos, first, M, BS, BN)
        ok_k = seen[:, None] & in_d[None, :]
        k = tl.load(K_ + b * kb + kvh * kh + at[:, None] * kn + d[None, :], mask=ok_k, other=0.0)
        v = tl.load(V + b * vb + kvh * vh + at[:, None] * vn + d[None, :], mask=ok_k, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        s = tl.where(seen[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - safe[:, None])
        alpha = tl.exp2(m - safe)
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    some = l > 0
    o = tl.where(some[:, None], acc / tl.where(some, l, 1.0)[:, None], 0.0)
    at_o = (b * K * G + h) * N + i
    lse = tl.where(some, m / 1.4426950408889634 + tl.log(tl.where(some, l, 1.0)), float("-inf"))
    tl.store(Lse + at_o, lse, mask=in_g)
    tl.store(Out + at_o[:, None] * D + d[None, :], o.to(Out.dtype.element_ty), mask=put)


@triton.jit
def keys_bwd(
    Q, K_, V, Do, Index, First, Lse, Delta, Dq, Dk, Dv, qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on,
    scale, K, G, N, M, entries,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dq of one query in all heads of a group; its share of Dk and Dv (float32) is added where its keys stand."""
    i, kv, b, kvh, g, in_g = query_tile(tl.program_id(0), N, K, G, BG)
    h = kvh * G + g
    pos = i + M - N if CAUSAL else M - 1
    first = tl.load(First + b * N + i) if PACKED else 0
    d = tl.arange(0, BD)
    in_d = d < D
    put = in_g[:, None] & in_d[None, :]
    wide = h.to(tl.int64)
    q = tl.load(Q + b * qb + i.to(tl.int64) * qn + (wide * qh)[:, None] + d[None, :], mask=put, other=0.0)
    do = tl.load(Do + b * ob + i.to(tl.int64) * on + (wide * oh)[:, None] + d[None, :], mask=put, other=0.0)
    at_o = (b * K * G + h) * N + i
    lse = tl.load(Lse + at_o, mask=in_g, other=0.0) * 1.4426950408889634
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    delta = tl.load(Delta + at_o, mask=in_g, other=0.0)
    dq = tl.zeros((BG, BD), tl.float32)
    chosen = Index + (kv.to(tl.int64) * N + i) * entries
    for begin in range(0, entries * BS, BN):
        at, seen = listed_keys(chosen, begin, entries * BS, pos, first, M, BS, BN)
        ok_k = seen[:, None] & in_d[None, :]
        k = tl.load(K_ + b * kb + kvh * kh + at[:, None] * kn + d[None, :], mask=ok_k, other=0.0)
        v = tl.load(V + b * vb + kvh * vh + at[:, None] * vn + d[None, :], mask=ok_k, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
        p = tl.where(seen[None, :] & in_g[:, None], tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        at_k = (kv.to(tl.int64) * M + at)[:, None] * D + d[None, :]
        dk = tl.dot(tl.trans(ds).to(q.dtype), q, input_precision=PRECISION) * scale
        dv = tl.dot(tl.trans(p).to(do.dtype), do, input_precision=PRECISION)
        tl.atomic_add(Dk + at_k, dk, mask=ok_k)
        tl.atomic_add(Dv + at_k, dv, mask=ok_k)
    tl.store(Dq + at_o[:, None] * D + d[None, :], (dq * scale).to(Dq.dtype.element_ty), mask=put)
