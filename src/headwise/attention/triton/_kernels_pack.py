"""Packing around the Hopper backward: rows into tiles of 64 with their statistics, and dq back to its places.

Letters as in ``_kernels_rows``; T = ceil(N / 64) tiles a (b, h). D is a power of two here.
"""

import triton
import triton.language as tl

from headwise.attention.triton._kernels_rows import load_rows


@triton.jit
def pack_rows(
    Q, Do, Raw, Gate, Lse, Dlse, Rows, Rank, PackQ, PackDo, Stats, DqSum, Dgate,
    qb, qh, qn, ob, oh, on, gb, gh, gn, H, N,
    D: tl.constexpr, BM: tl.constexpr, ROUTED: tl.constexpr, GATED: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """Per tile: Stats (log2-sum-exp, +inf for rows that do not count; delta), zeros in DqSum, and if routed q and dO."""
    tile = tl.program_id(0)
    bh = tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = bh % H
    count = N
    if ROUTED:
        count = tl.load(Rank + bh.to(tl.int64) * (N + 1) + N)
    idx, pos, served, exists = load_rows(Rows, bh, tile * BM, count, N, 0, N, BM, ROUTED, True)
    at = bh.to(tl.int64) * N + idx
    if tile * BM < count:
        d = tl.arange(0, D)
        ok = served[:, None] & (d < D)[None, :]
        wide = idx[:, None].to(tl.int64)
        o = tl.load(Raw + at[:, None] * D + d[None, :], mask=ok, other=0.0).to(tl.float32)
        do = tl.load(Do + b * ob + h * oh + wide * on + d[None, :], mask=ok, other=0.0)
        dot = tl.sum(o * do.to(tl.float32), 1)
        slot = bh.to(tl.int64) * tl.num_programs(0) + tile
        r = slot * BM + tl.arange(0, BM)
        to = r[:, None] * D + d[None, :]
        if GATED:
            tl.store(Dgate + at, dot, mask=exists)
            gate = tl.load(Gate + b * gb + h * gh + idx.to(tl.int64) * gn, mask=served, other=0.0).to(tl.float32)
            dot = dot * gate
            do = (do * gate[:, None]).to(PackDo.dtype.element_ty)
        if HAS_DLSE:
            dot = dot - tl.load(Dlse + at, mask=served, other=0.0)
        if ROUTED:
            q = tl.load(Q + b * qb + h * qh + wide * qn + d[None, :], mask=ok, other=0.0)
            tl.store(PackQ + to, q)
            tl.store(PackDo + to, do)
        lse = tl.load(Lse + at, mask=served, other=float("-inf"))
        stat = slot * (2 * BM) + tl.arange(0, BM)
        tl.store(Stats + stat, tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634))
        tl.store(Stats + stat + BM, tl.where(lse == float("-inf"), 0.0, dot))
        tl.store(DqSum + to, tl.zeros((BM, D), tl.float32))
    elif GATED:
        tl.store(Dgate + at, tl.zeros((BM,), tl.float32), mask=exists)


@triton.jit
def unpack_dq(DqSum, Dq, Rows, Rank, scale, H, N, D: tl.constexpr, BM: tl.constexpr, ROUTED: tl.constexpr):
    """Dq[b,h,idx] = scale * DqSum[row], exactly 0 for queries that are not served."""
    tile = tl.program_id(0)
    bh = tl.program_id(1)
    count = N
    if ROUTED:
        count = tl.load(Rank + bh.to(tl.int64) * (N + 1) + N)
    idx, pos, served, exists = load_rows(Rows, bh, tile * BM, count, N, 0, N, BM, ROUTED, True)
    d = tl.arange(0, D)
    r = (bh.to(tl.int64) * tl.num_programs(0) + tile) * BM + tl.arange(0, BM)
    dq = tl.load(DqSum + r[:, None] * D + d[None, :], mask=served[:, None] & (d < D)[None, :], other=0.0)
    at = (bh.to(tl.int64) * N + idx)[:, None] * D + d[None, :]
    tl.store(Dq + at, (dq * scale).to(Dq.dtype.element_ty), mask=exists[:, None] & (d < D)[None, :])
