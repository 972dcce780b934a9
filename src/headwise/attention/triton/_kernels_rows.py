"""Portable Triton kernels over *rows*: tiles of queries that need not be neighbours in the sequence.

One kernel family serves routed queries (rows = sorted positions of the queries a head serves) and spans (rows = all
queries, keys = sinks + window). Legend: B batch, H query heads, K kv heads, G = H/K, N queries, M keys, D head dim,
BM rows of a tile, BN keys of a block. Row r of (b, h) is query ``idx = Rows[b,h,r]`` at position ``idx + M - N``.
Key j is visible to position p when start <= j <= p and (j - start < sink or p - j < window).
"""

import triton
import triton.language as tl


@triton.jit
def build_rows(Active, Rows, Rank, sb, sh, sn, H, N, CHUNK: tl.constexpr):
    """Rows[b,h] = served queries ascending, then the others; Rank[b,h,i] = served queries before i; one program a (b,h)."""
    bh = tl.program_id(0)
    src = Active + (bh // H).to(tl.int64) * sb + (bh % H).to(tl.int64) * sh
    rows = Rows + bh.to(tl.int64) * N
    rank = Rank + bh.to(tl.int64) * (N + 1)
    total = 0
    for i in range(0, N, CHUNK):
        at = i + tl.arange(0, CHUNK)
        total += tl.sum((tl.load(src + at * sn, mask=at < N, other=0) != 0).to(tl.int32), 0)
    before = 0
    for i in range(0, N, CHUNK):
        at = i + tl.arange(0, CHUNK)
        on = (tl.load(src + at * sn, mask=at < N, other=0) != 0).to(tl.int32)
        excl = before + tl.cumsum(on, 0) - on
        tl.store(rank + at, excl, mask=at < N)
        tl.store(rows + tl.where(on != 0, excl, total + at - excl), at, mask=at < N)
        before += tl.sum(on, 0)
    tl.store(rank + N, total)


@triton.jit
def visible(pos, key, start, sink, window, SPANS: tl.constexpr):
    """Broadcastable pos and key -> boolean tile."""
    seen = (key >= start) & (key <= pos)
    if SPANS:
        seen = seen & ((key - start < sink) | (pos - key < window))
    return seen


@triton.jit
def load_rows(Rows, bh, first, count, N, off, M, BM: tl.constexpr, ROUTED: tl.constexpr, CAUSAL: tl.constexpr):
    """Query index, position, and (served, exists) flags of BM rows from rank `first`."""
    r = first + tl.arange(0, BM)
    exists = r < N
    served = r < count
    idx = tl.load(Rows + bh.to(tl.int64) * N + r, mask=exists, other=0) if ROUTED else tl.where(exists, r, 0)
    pos = idx + off if CAUSAL else tl.where(exists, M - 1, M - 1)
    return idx, pos, served, exists


@triton.jit
def key_plan(lowest, highest, start, sink, window, M, BN: tl.constexpr, SPANS: tl.constexpr):
    """Blocks a tile reads: n_a blocks from `start`, then n_b blocks from b0. Disjoint, and they cover all visible keys."""
    end = tl.minimum(highest + 1, M)
    n_a = 0
    b0 = start
    if SPANS:
        reach = tl.maximum(lowest - window + 1, start)
        n_a = tl.cdiv(tl.maximum(tl.minimum(start + sink, end) - start, 0), BN)
        b0 = tl.maximum(reach, start + n_a * BN)
    n_b = tl.cdiv(tl.maximum(end - b0, 0), BN)
    return n_a, b0, n_b


@triton.jit
def span_of(Sinks, Windows, kvh, M, SPANS: tl.constexpr):
    """(sink, window) of a kv head; the window is clamped to M so that positions never overflow."""
    sink = 0
    window = M
    if SPANS:
        sink = tl.minimum(tl.load(Sinks + kvh), M)
        window = tl.minimum(tl.load(Windows + kvh), M)
    return sink, window


@triton.jit
def heavy_first(pid, BH, count, N, BM: tl.constexpr):
    """Program id -> (b*H+h, tile): the longest tiles start first, tiles past the count come last."""
    bh = pid % BH
    turn = pid // BH
    full = tl.cdiv(count, BM)
    return bh, tl.where(turn < full, full - 1 - turn, turn)


@triton.jit
def rows_fwd(
    Q, K, V, Gate, Out, Raw, Lse, Rows, Rank, Sinks, Windows, KeyStart,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn,
    scale_log2, H, G, N, M, BH,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROUTED: tl.constexpr, SPANS: tl.constexpr,
    CAUSAL: tl.constexpr, GATED: tl.constexpr, STARTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out[b,h,idx] = gate * softmax(q k^T) v for served rows and exactly 0 for the others; Lse in natural units."""
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
    start = tl.load(KeyStart + b) if STARTED else 0
    sink, window = span_of(Sinks, Windows, kvh, M, SPANS)

    acc = tl.zeros((BM, BD), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)  # noqa: E741
    if tile * BM < count:
        q = tl.load(
            Q + b * qb + h * qh + idx[:, None].to(tl.int64) * qn + d[None, :],
            mask=served[:, None] & in_d[None, :],
            other=0.0,
        )
        highest = tl.max(tl.where(served, pos, -1), 0)
        lowest = tl.min(tl.where(served, pos, M), 0)
        n_a, b0, n_b = key_plan(lowest, highest, start, sink, window, M, BN, SPANS)
        for j in range(0, n_a + n_b):
            key = tl.where(j < n_a, start + j * BN, b0 + (j - n_a) * BN) + tl.arange(0, BN)
            in_m = key < M
            k = tl.load(
                K + b * kb + kvh * kh + key[None, :].to(tl.int64) * kn + d[:, None],
                mask=in_m[None, :] & in_d[:, None],
                other=0.0,
            )
            s = tl.dot(q, k, input_precision=PRECISION) * scale_log2
            s = tl.where(
                visible(pos[:, None], key[None, :], start, sink, window, SPANS) & in_m[None, :], s, float("-inf")
            )
            m_new = tl.maximum(m, tl.max(s, 1))
            safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - safe[:, None])
            alpha = tl.exp2(m - safe)
            l = l * alpha + tl.sum(p, 1)  # noqa: E741
            v = tl.load(
                V + b * vb + kvh * vh + key[:, None].to(tl.int64) * vn + d[None, :],
                mask=in_m[:, None] & in_d[None, :],
                other=0.0,
            )
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
            m = m_new

    some = served & (l > 0)
    o = tl.where(some[:, None], acc / tl.where(some, l, 1.0)[:, None], 0.0)
    at = bh.to(tl.int64) * N + idx
    put = exists[:, None] & in_d[None, :]
    tl.store(
        Lse + at, tl.where(some, m / 1.4426950408889634 + tl.log(tl.where(some, l, 1.0)), float("-inf")), mask=exists
    )
    if GATED:
        tl.store(Raw + at[:, None] * D + d[None, :], o.to(Raw.dtype.element_ty), mask=put)
        gate = tl.load(Gate + b * gb + h * gh + idx.to(tl.int64) * gn, mask=served, other=0.0).to(tl.float32)
        o = tl.where(some[:, None], o * gate[:, None], 0.0)
    tl.store(Out + at[:, None] * D + d[None, :], o.to(Out.dtype.element_ty), mask=put)


@triton.jit
def zero_rows(Rank, Out, Lse, N, D: tl.constexpr, BM: tl.constexpr, HAS_LSE: tl.constexpr):
    """Out = 0 and Lse = -inf at the queries that are not served (D a power of two)."""
    bh = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    rank = Rank + bh * (N + 1) + i
    off = (i < N) & (tl.load(rank + 1, mask=i < N, other=0) == tl.load(rank, mask=i < N, other=-1))
    at = bh * N + i
    if HAS_LSE:
        tl.store(Lse + at, float("-inf"), mask=off)
    tile = tl.zeros((BM, D), Out.dtype.element_ty)
    tl.store(Out + at[:, None] * D + tl.arange(0, D)[None, :], tile, mask=off[:, None])
