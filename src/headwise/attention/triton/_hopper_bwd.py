"""Hopper backward in Gluon: five matrix products a tile, dq summed in float32 by the copy engine's reduce-add.

A program owns BN = 128 keys of one kv head, two warpgroups of 64 keys each, and walks over the rows (64 at a time) of all
G query heads of the group. Letters as in ``_kernels_rows``. Rows come packed: q, dO (gate applied), and ``Stats`` with
log2-sum-exp (+inf for rows that count for nothing) and delta; see ``_kernels_pack``. Scores are kept transposed
(keys x rows), so that p and ds are register operands of dv and dk.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

WG = gl.constexpr(64)  # keys of one consumer warpgroup
BM = gl.constexpr(64)  # rows of a step
BN = gl.constexpr(128)
STAGES = gl.constexpr(2)


@builtin
def reduce_add(desc, coord, src, _semantic=None):
    """Add a shared-memory tile to global memory by the bulk copy engine; wait with ``tma.store_wait``."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


@gluon.jit
def rank_of(Rank, bh, i, N, ROUTED: gl.constexpr):
    """How many served queries come before query i (clamped to [0, N])."""
    i = gl.minimum(gl.maximum(i, 0), N)
    if ROUTED:
        i = gl.load(Rank + bh.to(gl.int64) * (N + 1) + i)
    return i


@gluon.jit
def row_ranges(
    Rank, bh, first_key, start, sink, window, N, M, ROUTED: gl.constexpr, SPANS: gl.constexpr, CAUSAL: gl.constexpr
):  # fmt: skip
    """(lo, hi): ranks of rows that may see the block, lo a multiple of BM; [full_lo, full_hi): they see all of it."""
    off = M - N
    hi = rank_of(Rank, bh, N, N, ROUTED)
    lo = hi * 0
    full_lo = lo
    full_hi = hi + BM
    if CAUSAL:
        lo = rank_of(Rank, bh, gl.maximum(first_key, start) - off, N, ROUTED)
        full_lo = rank_of(Rank, bh, first_key + BN - 1 - off, N, ROUTED)
    if SPANS:
        if first_key >= start + sink:
            hi = rank_of(Rank, bh, first_key + BN - 1 + window - off, N, ROUTED)
        if first_key + BN > start + sink:
            full_hi = rank_of(Rank, bh, first_key + window - off, N, ROUTED)
    if (first_key < start) | (first_key + BN > M):
        full_hi = full_lo
    return lo // BM * BM, hi, full_lo, full_hi


@gluon.jit
def panels(smem, slot, rows: gl.constexpr, columns: gl.constexpr):
    """(rows, columns) view of the 64-column panels that start at a slot."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return smem.index(slot)._reinterpret(smem.dtype, [rows, columns], layout)


@gluon.jit
def load_rows(desc, smem, full, stage, b, h, r, D: gl.constexpr):
    """Copy BM packed rows, panel by panel."""
    for c in gl.static_range(D // 64):
        tma.async_copy_global_to_shared(desc, [b, h, r, c * 64], full, smem.index(stage * (D // 64) + c))


@gluon.jit
def producer(
    k_desc, v_desc, q_desc, do_desc, stat_desc, k_smem, v_smem, q_smem, do_smem, stat_smem,
    kv_full, q_full, do_full, empty, Rank, b, kvh, first_key, start, sink, window, H, G, N, M, tiles,
    D: gl.constexpr, ROUTED: gl.constexpr, SPANS: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Keys and values once, then q, statistics and dO of every row tile."""
    mbarrier.expect(kv_full.index(0), 2 * BN * D * 2)
    for c in gl.static_range(D // 64):
        tma.async_copy_global_to_shared(k_desc, [b, kvh, first_key, c * 64], kv_full.index(0), k_smem.index(c))
        tma.async_copy_global_to_shared(v_desc, [b, kvh, first_key, c * 64], kv_full.index(0), v_smem.index(c))
    step = 0
    for g in range(G):
        h = kvh * G + g
        bh = b * H + h
        lo, hi, full_lo, full_hi = row_ranges(Rank, bh, first_key, start, sink, window, N, M, ROUTED, SPANS, CAUSAL)
        for r in range(lo, hi, BM):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(q_full.index(stage), BM * D * 2 + 2 * BM * 4)
            load_rows(q_desc, q_smem, q_full.index(stage), stage, b, h, r, D)
            tma.async_copy_global_to_shared(
                stat_desc, [bh * tiles + r // BM, 0], q_full.index(stage), stat_smem.index(stage)
            )
            mbarrier.expect(do_full.index(stage), BM * D * 2)
            load_rows(do_desc, do_smem, do_full.index(stage), stage, b, h, r, D)
            step += 1


@gluon.jit
def mask_probabilities(
    p, Rows, bh, r, first, start, sink, window, N, M,
    ROUTED: gl.constexpr, SPANS: gl.constexpr, CAUSAL: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Zero the probabilities of invisible (key, row) pairs; p is (keys, rows)."""
    key = gl.expand_dims(first + gl.arange(0, WG, layout=gl.SliceLayout(1, layout)), 1)
    at = r + gl.arange(0, BM, layout=gl.SliceLayout(0, layout))
    pos = at
    if ROUTED:
        pos = gl.load(Rows + bh.to(gl.int64) * N + at, mask=at < N, other=0)
    pos = gl.expand_dims(pos + (M - N), 0)
    seen = (key >= start) & (key < M)
    if CAUSAL:
        seen = seen & (key <= pos)
    if SPANS:
        seen = seen & ((key - start < sink) | (pos - key < window))
    return gl.where(seen, p, 0.0)


@gluon.jit
def consumer(
    Dk, Dv, Rows, Rank, dq_desc, k_smem, v_smem, q_smem, do_smem, stat_smem, ds_smem, dq_smem,
    kv_full, q_full, do_full, empty, ds_full, b, kvh, first_key, start, sink, window,
    scale, scale_log2, H, G, N, M, tiles,
    D: gl.constexpr, ROUTED: gl.constexpr, SPANS: gl.constexpr, CAUSAL: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """64 keys: dk and dv stay in registers, dq leaves through shared memory."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=d_layout, k_width=2)
    row_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = k_smem.dtype
    P: gl.constexpr = D // 64
    first = first_key + WHICH * WG
    my_k = panels(k_smem, 0, BN, D).slice(WHICH * WG, WG, dim=0)
    my_v = panels(v_smem, 0, BN, D).slice(WHICH * WG, WG, dim=0)
    dk = gl.zeros([WG, D], gl.float32, layout=d_layout)
    dv = gl.zeros([WG, D], gl.float32, layout=d_layout)
    zero = gl.zeros([WG, BM], gl.float32, layout=s_layout)
    mbarrier.wait(kv_full.index(0), 0)
    step = 0
    for g in range(G):
        bh = b * H + kvh * G + g
        lo, hi, full_lo, full_hi = row_ranges(Rank, bh, first_key, start, sink, window, N, M, ROUTED, SPANS, CAUSAL)
        if lo < hi:
            for r in range(lo, hi, BM):
                stage = step % STAGES
                phase = (step // STAGES) & 1
                q = panels(q_smem, stage * P, BM, D)
                do = panels(do_smem, stage * P, BM, D)
                mbarrier.wait(q_full.index(stage), phase)
                s = warpgroup_mma(my_k, q.permute((1, 0)), zero, use_acc=False, is_async=True)  # (keys, rows)
                mbarrier.wait(do_full.index(stage), phase)
                dp = warpgroup_mma(my_v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
                stats = stat_smem.index(stage)._reinterpret(gl.float32, [2, BM], flat)
                lse2 = stats.index(0).load(row_layout)
                s = warpgroup_mma_wait(1, deps=[s])
                p = gl.exp2(s * scale_log2 - gl.expand_dims(lse2, 0))
                if (r < full_lo) | (r + BM > full_hi):
                    p = mask_probabilities(
                        p, Rows, bh, r, first, start, sink, window, N, M, ROUTED, SPANS, CAUSAL, s_layout
                    )
                p_op = gl.convert_layout(p.to(dtype), a_layout)
                dv = warpgroup_mma(p_op, do, dv, is_async=True)
                delta = stats.index(1).load(row_layout)
                dp = warpgroup_mma_wait(1, deps=[dp])
                ds = (p * (dp - gl.expand_dims(delta, 0))).to(dtype)
                ds_tile = ds_smem.index((step % 2) * 2 + WHICH)
                ds_tile.store(ds)
                fence_async_shared()
                ds_op = gl.convert_layout(ds, a_layout)
                dk = warpgroup_mma(ds_op, q, dk, is_async=True)
                dq_zero = gl.zeros([BM, 64], gl.float32, layout=s_layout)
                if D == 128:  # both halves of ds are needed: each warpgroup makes 64 columns of dq
                    mbarrier.arrive(ds_full.index(step % 2), count=1)
                    mbarrier.wait(ds_full.index(step % 2), (step // 2) & 1)
                    ds_all = panels(ds_smem, (step % 2) * 2, BN, BM)
                    k_half = panels(k_smem, WHICH, BN, 64)
                    dq = warpgroup_mma(ds_all.permute((1, 0)), k_half, dq_zero, use_acc=False, is_async=True)
                else:  # each warpgroup adds what its own keys give
                    dq = warpgroup_mma(ds_tile.permute((1, 0)), my_k, dq_zero, use_acc=False, is_async=True)
                # The next scores start before dq is read back; after the last tile they are computed once for nothing.
                step += 1
                dv, dk, dq = warpgroup_mma_wait(0, deps=[dv, dk, dq])
                mbarrier.arrive(empty.index(stage), count=1)
                tma.store_wait(0)
                dq_smem.index(WHICH).store(dq)
                fence_async_shared()
                column = WHICH * 64 if D == 128 else 0
                reduce_add(dq_desc, [(bh * tiles + r // BM) * BM, column], dq_smem.index(WHICH))
    tma.store_wait(0)
    io: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    key = first + gl.arange(0, WG, layout=gl.SliceLayout(1, io))
    at = ((b * (H // G) + kvh).to(gl.int64) * M + key) * D
    at = gl.expand_dims(at, 1) + gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, io)), 0)
    ok = gl.expand_dims(key < M, 1)
    gl.store(Dk + at, gl.convert_layout((dk * scale).to(dtype), io), mask=ok)
    gl.store(Dv + at, gl.convert_layout(dv.to(dtype), io), mask=ok)


@gluon.jit
def attend_bwd(
    k_desc, v_desc, q_desc, do_desc, stat_desc, dq_desc, Dk, Dv, Rows, Rank, Sinks, Windows, KeyStart,
    scale, scale_log2, H, G, N, M, tiles, BK,
    D: gl.constexpr, ROUTED: gl.constexpr, SPANS: gl.constexpr, CAUSAL: gl.constexpr, STARTED: gl.constexpr,
):  # fmt: skip
    """One block of 128 keys a program; the first keys, which most rows see, start first."""
    pid = gl.program_id(0)
    unit = pid % BK
    first_key = pid // BK * BN
    b = unit // (H // G)
    kvh = unit % (H // G)
    start = 0
    sink = 0
    window = M
    if STARTED:
        start = gl.load(KeyStart + b)
    if SPANS:
        sink = gl.minimum(gl.load(Sinks + kvh), M)
        window = gl.minimum(gl.load(Windows + kvh), M)
    dtype: gl.constexpr = Dk.dtype.element_ty
    P: gl.constexpr = D // 64
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k_smem = gl.allocate_shared_memory(dtype, [P, 1, 1, BN, 64], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [P, 1, 1, BN, 64], v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES * P, 1, 1, BM, 64], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES * P, 1, 1, BM, 64], do_desc.layout)
    stat_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 2 * BM], stat_desc.layout)
    ds_smem = gl.allocate_shared_memory(dtype, [4, WG, BM], ds_layout)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2, BM, 64], dq_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(ds_full.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consumer, (
                Dk, Dv, Rows, Rank, dq_desc, k_smem, v_smem, q_smem, do_smem, stat_smem, ds_smem, dq_smem,
                kv_full, q_full, do_full, empty, ds_full, b, kvh, first_key, start, sink, window,
                scale, scale_log2, H, G, N, M, tiles, D, ROUTED, SPANS, CAUSAL, 0,
            )),
            (consumer, (
                Dk, Dv, Rows, Rank, dq_desc, k_smem, v_smem, q_smem, do_smem, stat_smem, ds_smem, dq_smem,
                kv_full, q_full, do_full, empty, ds_full, b, kvh, first_key, start, sink, window,
                scale, scale_log2, H, G, N, M, tiles, D, ROUTED, SPANS, CAUSAL, 1,
            )),
            (producer, (
                k_desc, v_desc, q_desc, do_desc, stat_desc, k_smem, v_smem, q_smem, do_smem, stat_smem,
                kv_full, q_full, do_full, empty, Rank, b, kvh, first_key, start, sink, window, H, G, N, M,
                tiles, D, ROUTED, SPANS, CAUSAL,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
