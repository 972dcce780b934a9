"""Portable Triton kernels for selected key blocks: forward, dq, and dk/dv over the inverse lists.

Letters as in ``_kernels_rows``. Query block c of (b, kv head) reads the key blocks Index[b,kvh,c,:] (-1 = none), BS tokens
each. A tile holds the queries of one block in BM // BS heads of the group, so that keys are loaded once for all of them.
"""

import triton
import triton.language as tl


@triton.jit
def tile_rows(c, kvh, t, G, N, off, M, BS: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr):
    """Head, query index, position and validity of the BM rows of head tile t of query block c."""
    r = tl.arange(0, BM)
    g = t * (BM // BS) + r // BS
    i = c * BS + r % BS
    ok = (g < G) & (i < N)
    i = tl.where(ok, i, 0)
    pos = i + off if CAUSAL else tl.where(ok, M - 1, M - 1)
    return kvh * G + tl.where(ok, g, 0), i, pos, ok


@triton.jit
def blocks_fwd(
    Q, K, V, Index, Out, Lse, qb, qh, qn, kb, kh, kn, vb, vh, vn, scale_log2, H, G, N, M, C, entries, units, tiles_g,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out and Lse of one tile; last query blocks first."""
    pid = tl.program_id(0)
    unit = pid % units
    c = C - 1 - pid // units
    kv = unit // tiles_g
    b = (kv // (H // G)).to(tl.int64)
    kvh = kv % (H // G)
    h, i, pos, ok = tile_rows(c, kvh, unit % tiles_g, G, N, M - N, M, BS, BM, CAUSAL)
    d = tl.arange(0, BD)
    in_d = d < D
    put = ok[:, None] & in_d[None, :]
    q = tl.load(Q + b * qb + (h.to(tl.int64) * qh + i.to(tl.int64) * qn)[:, None] + d[None, :], mask=put, other=0.0)
    acc = tl.zeros((BM, BD), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)  # noqa: E741
    chosen = Index + (kv.to(tl.int64) * C + c) * entries
    for e in range(0, entries):
        block = tl.load(chosen + e)
        key = block * BS + tl.arange(0, BS)
        in_m = (block >= 0) & (key < M)
        at = tl.where(in_m, key, 0).to(tl.int64)
        k = tl.load(
            K + b * kb + kvh * kh + at[None, :] * kn + d[:, None], mask=in_m[None, :] & in_d[:, None], other=0.0
        )
        s = tl.dot(q, k, input_precision=PRECISION) * scale_log2
        s = tl.where(in_m[None, :] & (key[None, :] <= pos[:, None]), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - safe[:, None])
        alpha = tl.exp2(m - safe)
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        v = tl.load(
            V + b * vb + kvh * vh + at[:, None] * vn + d[None, :], mask=in_m[:, None] & in_d[None, :], other=0.0
        )
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    some = l > 0
    o = tl.where(some[:, None], acc / tl.where(some, l, 1.0)[:, None], 0.0)
    at_o = (b * H + h) * N + i
    tl.store(
        Lse + at_o, tl.where(some, m / 1.4426950408889634 + tl.log(tl.where(some, l, 1.0)), float("-inf")), mask=ok
    )
    tl.store(Out + at_o[:, None] * D + d[None, :], o.to(Out.dtype.element_ty), mask=put)


@triton.jit
def blocks_dq(
    Q, K, V, Do, Index, Lse, Delta, Dq, qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on,
    scale, H, G, N, M, C, entries, units, tiles_g,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dq of one tile."""
    pid = tl.program_id(0)
    unit = pid % units
    c = C - 1 - pid // units
    kv = unit // tiles_g
    b = (kv // (H // G)).to(tl.int64)
    kvh = kv % (H // G)
    h, i, pos, ok = tile_rows(c, kvh, unit % tiles_g, G, N, M - N, M, BS, BM, CAUSAL)
    d = tl.arange(0, BD)
    in_d = d < D
    put = ok[:, None] & in_d[None, :]
    q = tl.load(Q + b * qb + (h.to(tl.int64) * qh + i.to(tl.int64) * qn)[:, None] + d[None, :], mask=put, other=0.0)
    do = tl.load(Do + b * ob + (h.to(tl.int64) * oh + i.to(tl.int64) * on)[:, None] + d[None, :], mask=put, other=0.0)
    at_o = (b * H + h) * N + i
    lse = tl.load(Lse + at_o, mask=ok, other=0.0) * 1.4426950408889634
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    delta = tl.load(Delta + at_o, mask=ok, other=0.0)
    dq = tl.zeros((BM, BD), tl.float32)
    chosen = Index + (kv.to(tl.int64) * C + c) * entries
    for e in range(0, entries):
        block = tl.load(chosen + e)
        key = block * BS + tl.arange(0, BS)
        in_m = (block >= 0) & (key < M)
        at = tl.where(in_m, key, 0).to(tl.int64)
        ok_k = in_m[:, None] & in_d[None, :]
        k = tl.load(K + b * kb + kvh * kh + at[:, None] * kn + d[None, :], mask=ok_k, other=0.0)
        v = tl.load(V + b * vb + kvh * vh + at[:, None] * vn + d[None, :], mask=ok_k, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
        seen = in_m[None, :] & (key[None, :] <= pos[:, None])
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision=PRECISION)
    tl.store(Dq + at_o[:, None] * D + d[None, :], (dq * scale).to(Dq.dtype.element_ty), mask=put)


@triton.jit
def blocks_dkv(
    Q, K, V, Do, Order, Starts, Lse, Delta, Dk, Dv, qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on,
    scale, H, G, N, M, C, entries, BK, blocks, tiles_g,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dk and Dv of one key block: the query blocks that chose it are Order[Starts[block] : Starts[block + 1]] // entries."""
    pid = tl.program_id(0)
    kv = pid % BK
    block = pid // BK
    b = (kv // (H // G)).to(tl.int64)
    kvh = kv % (H // G)
    key = block * BS + tl.arange(0, BS)
    d = tl.arange(0, BD)
    in_d = d < D
    in_m = key < M
    ok_k = in_m[:, None] & in_d[None, :]
    wide = key[:, None].to(tl.int64)
    k = tl.load(K + b * kb + kvh * kh + wide * kn + d[None, :], mask=ok_k, other=0.0)
    v = tl.load(V + b * vb + kvh * vh + wide * vn + d[None, :], mask=ok_k, other=0.0)
    dk = tl.zeros((BS, BD), tl.float32)
    dv = tl.zeros((BS, BD), tl.float32)
    begin = tl.load(Starts + kv * (blocks + 1) + block)
    end = tl.load(Starts + kv * (blocks + 1) + block + 1)
    for e in range(begin * tiles_g, end * tiles_g):
        c = (tl.load(Order + kv.to(tl.int64) * C * entries + e // tiles_g) // entries).to(tl.int32)
        h, i, pos, ok = tile_rows(c, kvh, e % tiles_g, G, N, M - N, M, BS, BM, CAUSAL)
        put = ok[:, None] & in_d[None, :]
        q = tl.load(Q + b * qb + (h.to(tl.int64) * qh + i.to(tl.int64) * qn)[:, None] + d[None, :], mask=put, other=0.0)
        do = tl.load(
            Do + b * ob + (h.to(tl.int64) * oh + i.to(tl.int64) * on)[:, None] + d[None, :], mask=put, other=0.0
        )
        at_o = (b * H + h) * N + i
        lse = tl.load(Lse + at_o, mask=ok, other=0.0) * 1.4426950408889634
        delta = tl.load(Delta + at_o, mask=ok, other=0.0)
        st = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * 1.4426950408889634)
        seen = in_m[:, None] & ok[None, :] & (key[:, None] <= pos[None, :])
        pt = tl.where(seen, tl.exp2(st - lse[None, :]), 0.0)
        dv = tl.dot(pt.to(do.dtype), do, dv, input_precision=PRECISION)
        dpt = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dk = tl.dot((pt * (dpt - delta[None, :])).to(q.dtype), q, dk, input_precision=PRECISION)
    at_k = (kv.to(tl.int64) * M + key)[:, None] * D + d[None, :]
    tl.store(Dk + at_k, (dk * scale).to(Dk.dtype.element_ty), mask=ok_k)
    tl.store(Dv + at_k, dv.to(Dv.dtype.element_ty), mask=ok_k)
