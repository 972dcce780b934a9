"""Backward of the row kernels (portable, deterministic): delta, then dq over rows, then dk/dv over key blocks.

Letters as in ``_kernels_rows``. ``Do`` is the gradient of the gated output; dO_eff = gate * Do.
"""

import triton
import triton.language as tl

from headwise.attention.triton._kernels_rows import heavy_first, key_plan, load_rows, span_of, visible


@triton.jit
def rows_delta(
    Raw, Do, Dlse, Gate, Rank, Delta, Dgate, ob, oh, on, gb, gh, gn, H, N,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, ROUTED: tl.constexpr, GATED: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """Delta = gate * <Do, Raw> - Dlse and Dgate = <Do, Raw>; both exactly 0 where a query is not served."""
    bh = tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = bh % H
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    on_ = i < N
    at = bh.to(tl.int64) * N + i
    served = on_
    if ROUTED:
        rank = Rank + bh.to(tl.int64) * (N + 1) + i
        served = on_ & (tl.load(rank + 1, mask=on_, other=0) > tl.load(rank, mask=on_, other=0))
    ok = served[:, None] & (d < D)[None, :]
    o = tl.load(Raw + at[:, None] * D + d[None, :], mask=ok, other=0.0).to(tl.float32)
    do = tl.load(Do + b * ob + h * oh + i[:, None].to(tl.int64) * on + d[None, :], mask=ok, other=0.0).to(tl.float32)
    dot = tl.sum(o * do, 1)
    if GATED:
        tl.store(Dgate + at, dot, mask=on_)
        dot = dot * tl.load(Gate + b * gb + h * gh + i.to(tl.int64) * gn, mask=served, other=0.0).to(tl.float32)
    if HAS_DLSE:
        dot = dot - tl.load(Dlse + at, mask=served, other=0.0)
    tl.store(Delta + at, dot, mask=on_)


@triton.jit
def rows_dq(
    Q, K, V, Do, Gate, Lse, Delta, Dq, Rows, Rank, Sinks, Windows, KeyStart,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on, gb, gh, gn,
    scale, H, G, N, M, BH,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROUTED: tl.constexpr, SPANS: tl.constexpr,
    CAUSAL: tl.constexpr, GATED: tl.constexpr, STARTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dq[b,h,idx] for every query; exactly 0 where it is not served."""
    pid = tl.program_id(0)
    count = N
    if ROUTED:
        count = tl.load(Rank + (pid % BH).to(tl.int64) * (N + 1) + N)
    bh, tile = heavy_first(pid, BH, count, N, BM)
    b = (bh // H).to(tl.int64)
    h = bh % H
    kvh = h // G
    idx, pos, served, exists = load_rows(Rows, bh, tile * BM, count, N, M - N, M, BM, ROUTED, CAUSAL)
    d = tl.arange(0, BD)
    in_d = d < D
    at = bh.to(tl.int64) * N + idx
    start = tl.load(KeyStart + b) if STARTED else 0
    sink, window = span_of(Sinks, Windows, kvh, M, SPANS)
    dq = tl.zeros((BM, BD), tl.float32)
    if tile * BM < count:
        ok = served[:, None] & in_d[None, :]
        wide = idx[:, None].to(tl.int64)
        q = tl.load(Q + b * qb + h * qh + wide * qn + d[None, :], mask=ok, other=0.0)
        do = tl.load(Do + b * ob + h * oh + wide * on + d[None, :], mask=ok, other=0.0)
        if GATED:
            gate = tl.load(Gate + b * gb + h * gh + idx.to(tl.int64) * gn, mask=served, other=0.0).to(tl.float32)
            do = (do * gate[:, None]).to(q.dtype)
        lse = tl.load(Lse + at, mask=served, other=float("-inf")) * 1.4426950408889634
        lse = tl.where(lse == float("-inf"), 0.0, lse)
        delta = tl.load(Delta + at, mask=served, other=0.0)
        highest = tl.max(tl.where(served, pos, -1), 0)
        lowest = tl.min(tl.where(served, pos, M), 0)
        n_a, b0, n_b = key_plan(lowest, highest, start, sink, window, M, BN, SPANS)
        for j in range(0, n_a + n_b):
            key = tl.where(j < n_a, start + j * BN, b0 + (j - n_a) * BN) + tl.arange(0, BN)
            in_m = key < M
            ok_k = in_m[:, None] & in_d[None, :]
            k = tl.load(K + b * kb + kvh * kh + key[:, None].to(tl.int64) * kn + d[None, :], mask=ok_k, other=0.0)
            v = tl.load(V + b * vb + kvh * vh + key[:, None].to(tl.int64) * vn + d[None, :], mask=ok_k, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
            seen = visible(pos[:, None], key[None, :], start, sink, window, SPANS) & in_m[None, :]
            p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq = tl.where(served[:, None], dq * scale, 0.0)
    tl.store(Dq + at[:, None] * D + d[None, :], dq.to(Dq.dtype.element_ty), mask=exists[:, None] & in_d[None, :])


@triton.jit
def rank_of(Rank, bh, i, N, ROUTED: tl.constexpr):
    """How many served queries come before query i (i clamped to [0, N])."""
    i = tl.minimum(tl.maximum(i, 0), N)
    out = i
    if ROUTED:
        out = tl.load(Rank + bh.to(tl.int64) * (N + 1) + i)
    return out


@triton.jit
def row_range(
    Rank, bh, first_key, start, sink, window, N, M,
    BN: tl.constexpr, ROUTED: tl.constexpr, SPANS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Ranks [lo, hi) of the rows that may see keys [first_key, first_key + BN)."""
    lo = 0
    hi = rank_of(Rank, bh, N, N, ROUTED)
    if CAUSAL:
        lo = rank_of(Rank, bh, tl.maximum(first_key, start) - (M - N), N, ROUTED)
    if SPANS:
        near = rank_of(Rank, bh, first_key + BN - 1 + window - (M - N), N, ROUTED)
        hi = tl.where(first_key < start + sink, hi, near)
    return lo, hi


@triton.jit
def rows_dkv(
    Q, K, V, Do, Gate, Lse, Delta, Dk, Dv, Rows, Rank, Sinks, Windows, KeyStart,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on, gb, gh, gn,
    scale, H, G, N, M, BK,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROUTED: tl.constexpr, SPANS: tl.constexpr,
    CAUSAL: tl.constexpr, GATED: tl.constexpr, STARTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dk and Dv of one key block: loop over the group's heads and over the rows that see the block. Heaviest first."""
    pid = tl.program_id(0)
    bk = pid % BK
    K_ = H // G
    b = (bk // K_).to(tl.int64)
    kvh = bk % K_
    first_key = (pid // BK) * BN
    key = first_key + tl.arange(0, BN)
    d = tl.arange(0, BD)
    in_d = d < D
    in_m = key < M
    ok_k = in_m[:, None] & in_d[None, :]
    k = tl.load(K + b * kb + kvh * kh + key[:, None].to(tl.int64) * kn + d[None, :], mask=ok_k, other=0.0)
    v = tl.load(V + b * vb + kvh * vh + key[:, None].to(tl.int64) * vn + d[None, :], mask=ok_k, other=0.0)
    start = tl.load(KeyStart + b) if STARTED else 0
    sink, window = span_of(Sinks, Windows, kvh, M, SPANS)
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    for g in range(0, G):
        h = kvh * G + g
        bh = (bk // K_) * H + h
        lo, hi = row_range(Rank, bh, first_key, start, sink, window, N, M, BN, ROUTED, SPANS, CAUSAL)
        for r in range(lo, hi, BM):
            idx, pos, served, exists = load_rows(Rows, bh, r, hi, N, M - N, M, BM, ROUTED, CAUSAL)
            wide = idx[:, None].to(tl.int64)
            ok = served[:, None] & in_d[None, :]
            q = tl.load(Q + b * qb + h * qh + wide * qn + d[None, :], mask=ok, other=0.0)
            do = tl.load(Do + b * ob + h * oh + wide * on + d[None, :], mask=ok, other=0.0)
            if GATED:
                gate = tl.load(Gate + b * gb + h * gh + idx.to(tl.int64) * gn, mask=served, other=0.0).to(tl.float32)
                do = (do * gate[:, None]).to(q.dtype)
            at = bh.to(tl.int64) * N + idx
            lse = tl.load(Lse + at, mask=served, other=0.0) * 1.4426950408889634
            delta = tl.load(Delta + at, mask=served, other=0.0)
            st = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * 1.4426950408889634)  # (BN, BM)
            seen = visible(pos[None, :], key[:, None], start, sink, window, SPANS) & in_m[:, None] & served[None, :]
            pt = tl.where(seen, tl.exp2(st - lse[None, :]), 0.0)
            dv = tl.dot(pt.to(do.dtype), do, dv, input_precision=PRECISION)
            dpt = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            dst = pt * (dpt - delta[None, :])
            dk = tl.dot(dst.to(q.dtype), q, dk, input_precision=PRECISION)
    at_k = ((bk.to(tl.int64) * M + key)[:, None]) * D + d[None, :]
    tl.store(Dk + at_k, (dk * scale).to(Dk.dtype.element_ty), mask=ok_k)
    tl.store(Dv + at_k, dv.to(Dv.dtype.element_ty), mask=ok_k)
