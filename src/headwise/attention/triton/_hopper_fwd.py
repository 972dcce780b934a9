"""Hopper forward in Gluon: one producer warp (TMA loads of K and V), two warpgroups of 64 query rows each.

The softmax of block j runs while the tensor cores do q.k of block j+1 and p.v of block j. Letters as in
``_kernels_rows``: B batch, H query heads, G = H/K, N queries, M keys, D head dim, BN keys of a stage. Rows of a tile are
gathered by index (routing), taken in order (spans) or taken from several heads of one group (selected blocks).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

WG = gl.constexpr(64)  # rows of one consumer warpgroup
FAR = gl.constexpr(1 << 30)  # position of a key that nobody sees
NEG_INF = gl.constexpr(float("-inf"))
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def tile_of(pid, BH, Rank, N, ROUTED: gl.constexpr):
    """(b*H+h, first row, number of rows) of a program; longest tiles first."""
    bh = pid % BH
    turn = pid // BH
    count = N
    if ROUTED:
        count = gl.load(Rank + bh.to(gl.int64) * (N + 1) + N)
    full = gl.cdiv(count, 2 * WG)
    return bh, (full - 1 - turn) * 2 * WG, count


@gluon.jit
def tile_bounds(Rows, bh, first, count, N, M, ROUTED: gl.constexpr, CAUSAL: gl.constexpr):
    """Smallest and largest position of the tile's rows (they are sorted)."""
    low = first
    high = gl.minimum(first + 2 * WG, count) - 1
    if ROUTED:
        low = gl.load(Rows + bh.to(gl.int64) * N + low)
        high = gl.load(Rows + bh.to(gl.int64) * N + high)
    if CAUSAL:
        low = low + (M - N)
        high = high + (M - N)
    else:
        low = M - 1
        high = M - 1
    return low, high


@gluon.jit
def spans_of(Sinks, Windows, kvh, KeyStart, b, M, SPANS: gl.constexpr, STARTED: gl.constexpr):
    """(start, sink, window) of a tile."""
    start = 0
    sink = 0
    window = M
    if STARTED:
        start = gl.load(KeyStart + b)
    if SPANS:
        sink = gl.minimum(gl.load(Sinks + kvh), M)
        window = gl.minimum(gl.load(Windows + kvh), M)
    return start, sink, window


@gluon.jit
def key_plan(low, high, start, sink, window, M, BN: gl.constexpr, SPANS: gl.constexpr):
    """n_a blocks from `start`, then n_b blocks from b0: disjoint, covering every visible key."""
    end = gl.minimum(high + 1, M)
    n_a = 0
    b0 = start
    if SPANS:
        n_a = gl.cdiv(gl.maximum(gl.minimum(start + sink, end) - start, 0), BN)
        b0 = gl.maximum(gl.maximum(low - window + 1, start), start + n_a * BN)
    n_b = gl.cdiv(gl.maximum(end - b0, 0), BN)
    return n_a, b0, n_b


@gluon.jit
def block_first(Index, j, n_a, start, b0, entries, BS: gl.constexpr, BN: gl.constexpr, BLOCKS: gl.constexpr):
    """First key of (sub-)block j; FAR for an absent selected block."""
    if BLOCKS:
        chosen = gl.load(Index + gl.minimum(j, entries - 1))
        first = gl.where((j < entries) & (chosen >= 0), chosen * BS, FAR)
    else:
        first = gl.where(j < n_a, start + j * BN, b0 + (j - n_a) * BN)
    return first


@gluon.jit
def load_stage(
    desc, smem, full, stage, Index, b, kvh, j, n_a, start, b0, entries,
    BS: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """Copy the BN keys (or values) of block j: panels of 64 columns, each made of BN // BS pieces of BS rows."""
    SUB: gl.constexpr = BN // BS
    mbarrier.expect(full, BN * D * 2)
    for i in gl.static_range(SUB):
        first = block_first(Index, j * SUB + i, n_a, start, b0, entries, BS, BN, BLOCKS)
        for c in gl.static_range(D // 64):
            slot = (stage * (D // 64) + c) * SUB + i
            tma.async_copy_global_to_shared(desc, [b, kvh, first, c * 64], full, smem.index(slot))


@gluon.jit
def producer(
    k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty, Index, b, kvh, n, n_a, start, b0, entries,
    BS: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """Load K and V of all blocks, stage by stage."""
    for j in range(n):
        stage = j % STAGES
        phase = (j // STAGES) & 1
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        load_stage(
            k_desc, k_smem, k_full.index(stage), stage, Index, b, kvh, j, n_a, start, b0, entries, BS, BN, D, BLOCKS
        )
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        load_stage(
            v_desc, v_smem, v_full.index(stage), stage, Index, b, kvh, j, n_a, start, b0, entries, BS, BN, D, BLOCKS
        )


@gluon.jit
def mask_scores(
    s, pos, Index, j, n_a, start, b0, low, high, sink, window, entries, M,
    BS: gl.constexpr, BN: gl.constexpr, SPANS: gl.constexpr, BLOCKS: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Set the scores of invisible keys to -inf; blocks that all rows see pass untouched."""
    SUB: gl.constexpr = BN // BS
    inside = True
    for i in gl.static_range(SUB):
        first = block_first(Index, j * SUB + i, n_a, start, b0, entries, BS, BN, BLOCKS)
        inside = inside & (first + BS - 1 <= low) & (first >= start)
        if SPANS:
            inside = inside & ((first + BS <= start + sink) | (high - first < window))
    if not inside:
        lane = gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
        if BLOCKS:
            entry = j * SUB + lane // BS
            chosen = gl.load(Index + gl.minimum(entry, entries - 1))
            key = gl.where((entry < entries) & (chosen >= 0), chosen * BS + lane % BS, FAR)
        else:
            key = block_first(Index, j, n_a, start, b0, entries, BS, BN, BLOCKS) + lane
        p = gl.expand_dims(pos, 1)
        x = gl.expand_dims(key, 0)
        seen = (x >= start) & (x <= p)
        if SPANS:
            seen = seen & ((x - start < sink) | (p - x < window))
        s = gl.where(seen, s, NEG_INF)
    return s


@gluon.jit
def softmax_step(s, m, l, scale_log2):
    """Online softmax: probabilities, new maximum (raw scores), new sum, factor for the old output."""
    m_new = gl.maximum(m, gl.max(s, 1))
    base = gl.where(m_new == NEG_INF, 0.0, m_new * scale_log2)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(base, 1))
    alpha = gl.exp2(m * scale_log2 - base)
    return p, m_new, l * alpha + gl.sum(p, 1), alpha


@gluon.jit
def row_place(
    Rows, bh, kv_row, r0, count, N, H, BS: gl.constexpr, ROUTED: gl.constexpr, BLOCKS: gl.constexpr, heads,
    layout: gl.constexpr,
):  # fmt: skip
    """Query index, flat (b*H+h), and validity of 64 rows that start at row r0 of the tile's list."""
    r = r0 + gl.arange(0, WG, layout=layout)
    if BLOCKS:  # r counts rows of (head of the group, query of the block); kv_row is the block's first query
        lane = r % BS
        flat = bh + r // BS
        idx = kv_row + lane
        ok = (r // BS < heads) & (idx < N)
        idx = gl.where(ok, idx, 0)
        flat = gl.where(ok, flat, bh)
    else:
        ok = r < count
        flat = bh + gl.zeros_like(r)
        idx = gl.where(ok, r, 0)
        if ROUTED:
            idx = gl.load(Rows + bh.to(gl.int64) * N + r, mask=ok, other=0)
    return idx, flat, ok


@gluon.jit
def consumer(
    Q, Gate, Out, Raw, Lse, Rows, Index, k_smem, v_smem, q_smem, k_full, k_empty, v_full, v_empty,
    qb, qh, qn, gb, gh, gn, scale_log2, H, N, M, bh, kv_row, first, count, heads, n, n_a, start, b0, low, high, sink,
    window, entries,
    BS: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, ROUTED: gl.constexpr, SPANS: gl.constexpr,
    CAUSAL: gl.constexpr, GATED: gl.constexpr, BLOCKS: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """64 rows: gather q, walk the blocks, write the gated output."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    io: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    SUB: gl.constexpr = BN // BS
    r0 = first + WHICH * WG
    dtype: gl.constexpr = Q.dtype.element_ty

    idx, flat, ok = row_place(Rows, bh, kv_row, r0, count, N, H, BS, ROUTED, BLOCKS, heads, gl.SliceLayout(1, io))
    d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, io)), 0)
    where_q = (flat // H).to(gl.int64) * qb + (flat % H).to(gl.int64) * qh + idx.to(gl.int64) * qn
    q = gl.load(Q + gl.expand_dims(where_q, 1) + d, mask=gl.expand_dims(ok, 1), other=0.0)
    my_q = q_smem.index(WHICH)
    my_q.store(q)
    fence_async_shared()

    at, _, _ = row_place(Rows, bh, kv_row, r0, count, N, H, BS, ROUTED, BLOCKS, heads, gl.SliceLayout(1, s_layout))
    pos = at + (M - N) if CAUSAL else gl.zeros_like(at) + (M - 1)
    m = gl.full([WG], NEG_INF, gl.float32, layout=gl.SliceLayout(1, s_layout))
    l = gl.zeros([WG], gl.float32, layout=gl.SliceLayout(1, s_layout))  # noqa: E741
    acc = gl.zeros([WG, D], gl.float32, layout=o_layout)
    zero = gl.zeros([WG, BN], gl.float32, layout=s_layout)

    if n > 0:
        mbarrier.wait(k_full.index(0), 0)
        s = warpgroup_mma(my_q, stage_tile(k_smem, 0, BN, D, SUB).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(0), count=1)
        s = mask_scores(
            s, pos, Index, 0, n_a, start, b0, low, high, sink, window, entries, M, BS, BN, SPANS, BLOCKS, s_layout
        )
        p, m, l, alpha = softmax_step(s, m, l, scale_log2)
        p = gl.convert_layout(p.to(dtype), p_layout)
        mbarrier.wait(k_full.index(1 % STAGES), (1 // STAGES) & 1, pred=n > 1)
        for j in range(1, n):
            stage = j % STAGES
            before = (j - 1) % STAGES
            s = warpgroup_mma(
                my_q, stage_tile(k_smem, stage, BN, D, SUB).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            mbarrier.wait(v_full.index(before), ((j - 1) // STAGES) & 1)
            acc = warpgroup_mma(p, stage_tile(v_smem, before, BN, D, SUB), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(k_empty.index(stage), count=1)
            s = mask_scores(
                s, pos, Index, j, n_a, start, b0, low, high, sink, window, entries, M, BS, BN, SPANS, BLOCKS, s_layout
            )
            p_new, m, l, alpha = softmax_step(s, m, l, scale_log2)
            # Waiting for the next keys here keeps the assembler from moving the wait for p.v above the softmax.
            mbarrier.wait(k_full.index((j + 1) % STAGES), ((j + 1) // STAGES) & 1, pred=j + 1 < n)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, o_layout)), 1)
            p = gl.convert_layout(p_new.to(dtype), p_layout)
        last = (n - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((n - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, stage_tile(v_smem, last, BN, D, SUB), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])

    at, flat_s, ok_s = row_place(
        Rows, bh, kv_row, r0, count, N, H, BS, ROUTED, BLOCKS, heads, gl.SliceLayout(1, s_layout)
    )
    some = l > 0
    lse = gl.where(some, (m * scale_log2) * LN2 + gl.log(gl.where(some, l, 1.0)), NEG_INF)
    gl.store(Lse + flat_s.to(gl.int64) * N + at, lse, mask=ok_s)
    inverse = gl.convert_layout(gl.where(some, 1.0 / gl.where(some, l, 1.0), 0.0), gl.SliceLayout(1, o_layout))
    acc = acc * gl.expand_dims(inverse, 1)
    where_o = gl.expand_dims((flat.to(gl.int64) * N + idx) * D, 1) + d
    put = gl.expand_dims(ok, 1)
    o = gl.convert_layout(acc.to(dtype), io)
    if GATED:
        gl.store(Raw + where_o, o, mask=put)
        gate = gl.load(
            Gate + (flat // H).to(gl.int64) * gb + (flat % H).to(gl.int64) * gh + idx.to(gl.int64) * gn,
            mask=ok,
            other=0.0,
        )
        o = (o.to(gl.float32) * gl.expand_dims(gate.to(gl.float32), 1)).to(dtype)
    gl.store(Out + where_o, o, mask=put)


@gluon.jit
def stage_tile(smem, stage, BN: gl.constexpr, D: gl.constexpr, SUB: gl.constexpr):
    """(BN, D) view of one stage."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return smem.index(stage * (D // 64) * SUB)._reinterpret(smem.dtype, [BN, D], layout)


@gluon.jit
def attend_fwd(
    Q, k_desc, v_desc, Gate, Out, Raw, Lse, Rows, Rank, Sinks, Windows, KeyStart, Index,
    qb, qh, qn, gb, gh, gn, scale_log2, H, G, N, M, BH, entries, tiles_g,
    BS: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, ROUTED: gl.constexpr, SPANS: gl.constexpr,
    CAUSAL: gl.constexpr, GATED: gl.constexpr, STARTED: gl.constexpr, BLOCKS: gl.constexpr,
    ENTRIES: gl.constexpr,
):  # fmt: skip
    """One tile of 128 rows a program. Rows that no tile covers must be zeroed by ``zero_rows``."""
    pid = gl.program_id(0)
    if BLOCKS:  # BH counts (b, kv head, tile of the group's heads); programs run from the last query block to the first
        unit = pid % BH
        block = gl.num_programs(0) // BH - 1 - pid // BH
        kv = unit // tiles_g
        b = kv // (H // G)
        kvh = kv % (H // G)
        per: gl.constexpr = 2 * WG // BS
        h0 = kvh * G + (unit % tiles_g) * per
        bh = b * H + h0
        heads = gl.minimum(G - (unit % tiles_g) * per, per)
        kv_row = block * BS
        first = 0
        count = 2 * WG
        low = kv_row
        high = gl.minimum(kv_row + BS, N) - 1
        if CAUSAL:
            low = low + M - N
            high = high + M - N
        else:
            low = M - 1
            high = M - 1
        Index = Index + (kv.to(gl.int64) * (gl.num_programs(0) // BH) + block) * entries
        start, sink, window = spans_of(Sinks, Windows, kvh, KeyStart, b, M, SPANS, STARTED)
        n_a = 0
        b0 = 0
        slot = gl.arange(0, ENTRIES, layout=gl.BlockedLayout([1], [32], [4], [0]))
        chosen = gl.load(Index + slot, mask=slot < entries, other=-1)
        n = gl.cdiv(gl.max(gl.where(chosen >= 0, slot + 1, 0), 0), BN // BS)  # nothing is chosen after the last slot
    else:
        bh, first, count = tile_of(pid, BH, Rank, N, ROUTED)
        if first < 0:
            return
        b = bh // H
        kvh = (bh % H) // G
        heads = 1
        kv_row = 0
        low, high = tile_bounds(Rows, bh, first, count, N, M, ROUTED, CAUSAL)
        start, sink, window = spans_of(Sinks, Windows, kvh, KeyStart, b, M, SPANS, STARTED)
        n_a, b0, n_b = key_plan(low, high, start, sink, window, M, BN, SPANS)
        n = n_a + n_b

    SUB: gl.constexpr = BN // BS
    dtype: gl.constexpr = Q.dtype.element_ty
    q_smem = gl.allocate_shared_memory(dtype, [2, WG, D], gl.NVMMASharedLayout(128, 16, rank=2))
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * SUB * (D // 64), 1, 1, BS, 64], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES * SUB * (D // 64), 1, 1, BS, 64], v_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()

    # The tuples stand here in full because assigning a tuple turns its compile-time constants into run-time values.
    gl.warp_specialize(
        [
            (consumer, (
                Q, Gate, Out, Raw, Lse, Rows, Index, k_smem, v_smem, q_smem, k_full, k_empty, v_full, v_empty,
                qb, qh, qn, gb, gh, gn, scale_log2, H, N, M, bh, kv_row, first, count, heads, n, n_a, start, b0, low, high,
                sink, window, entries, BS, BN, D, STAGES, ROUTED, SPANS, CAUSAL, GATED, BLOCKS, 0,
            )),
            (consumer, (
                Q, Gate, Out, Raw, Lse, Rows, Index, k_smem, v_smem, q_smem, k_full, k_empty, v_full, v_empty,
                qb, qh, qn, gb, gh, gn, scale_log2, H, N, M, bh, kv_row, first, count, heads, n, n_a, start, b0, low, high,
                sink, window, entries, BS, BN, D, STAGES, ROUTED, SPANS, CAUSAL, GATED, BLOCKS, 1,
            )),
            (producer, (
                k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty, Index, b, kvh, n, n_a, start, b0,
                entries, BS, BN, D, STAGES, BLOCKS,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
