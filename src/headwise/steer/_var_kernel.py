"""VAR for one new token in one launch: attention over all keys, sinks and image alike, in the place of the layer's decode kernel.

The keys of a (row, kv head) are cut into S shares, one program each, so that a batch of one still fills the device; the program that
ends last joins the shares and redistributes. Nothing is read twice: a query head stands in the tile of the tensor cores four times,
over all keys and over those of each group, in rows that would be empty anyway.

Letters: B rows, H query heads, K kv heads, G = H/K, GP = G padded, M key columns, C columns of the prompt, D head dim, BM keys of a block,
S shares, R = max(16, 4·GP) rows of the tile: row kind·GP + g is query head g over all keys, the sinks, the image's rest, the image.
"""

import triton
import triton.language as tl


@triton.jit
def _row(Start, row, s, d, M0, top, on, R: tl.constexpr, BD: tl.constexpr):
    """(output (BD,), sum) of one row of the tile, joined over the shares `s`; M0 (·,) are its maxima, `top` the highest of them."""
    at = Start + s * (R * (BD + 2))
    beta = tl.where(on, tl.exp2(M0 - top), 0.0)
    o = tl.load(at[:, None] + row * BD + d[None, :], mask=on[:, None], other=0.0, cache_modifier=".cg")
    l = tl.load(at + R * BD + R + row, mask=on, other=0.0, cache_modifier=".cg")  # noqa: E741
    return tl.sum(o * beta[:, None], 0), tl.sum(l * beta, 0)


@triton.jit(
    do_not_specialize=["C", "M"],
    do_not_specialize_on_alignment=["Filled", "Mask", "Codes", "HeadOk", "Count", "Arrived"],
)
def redistribute_one(
    Q, Keys, Values, Filled, Mask, Out, M, Codes, HeadOk, Parts, Arrived, Count,
    C, scale_log2, move, rho, minimum_mass,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, TABLE: tl.constexpr, MASKED: tl.constexpr,
    CENTRIC: tl.constexpr, CHOSEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """O − p·O_sinks + (p·P_sinks / P_rest)·O_rest where the head is image-centric, else O; counts the heads that were edited.

    With TABLE, Keys and Values (B, K) int64 are addresses of the first slots and Filled (B, K) int32 says how many are read; codes then
    go by slot. Without, the tensors themselves, M keys each. Parts (B·K·S, R·(BD + 2)) float32 is scratch: outputs, maxima, sums;
    Arrived (B·K,) int32 counts programs that are done, and is 0 again at the end.
    """
    kv, part = tl.program_id(0), tl.program_id(1)
    b, kvh = (kv // K).to(tl.int64), kv % K
    r, d = tl.arange(0, R), tl.arange(0, BD)
    kind, head = r // GP, kvh * G + r % GP
    real = (r % GP < G) & (kind < 4)
    q = tl.load(Q + (b * K * G + head[:, None]) * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    if TABLE:
        keys = tl.load(Keys + kv).to(tl.pointer_type(Q.dtype.element_ty))
        values = tl.load(Values + kv).to(tl.pointer_type(Q.dtype.element_ty))
        if D % 16 == 0:
            keys, values = tl.multiple_of(keys, 16), tl.multiple_of(values, 16)
        count = tl.load(Filled + kv)
    else:
        keys, values, count = Keys + kv.to(tl.int64) * M * D, Values + kv.to(tl.int64) * M * D, M
    share = tl.cdiv(tl.cdiv(count, BM), S) * BM
    m = tl.full((R,), float("-inf"), tl.float32)
    l = tl.zeros((R,), tl.float32)  # noqa: E741
    acc = tl.zeros((R, BD), tl.float32)
    for m0 in tl.range(part * share, tl.minimum((part + 1) * share, count), BM, num_stages=STAGES):
        at = m0 + tl.arange(0, BM)
        inside = at < count
        code = tl.load(Codes + b * C + at, mask=inside & (at < C), other=0).to(tl.int32)
        seen = inside
        if MASKED:
            seen = seen & (tl.load(Mask + b * M + at, mask=inside, other=0) != 0)
        k = tl.load(keys + at[None, :] * D + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(values + at[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        x = tl.where(seen[None, :], tl.dot(q, k, input_precision=PRECISION) * scale_log2, float("-inf"))
        higher = tl.maximum(m, tl.max(x, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        image, sink = code & 1, code // 2
        of_kind = 1 | (sink << 1) | ((image & (1 - sink)) << 2) | (image << 3)  # bit `kind`: does the key belong to it?
        w = tl.where(((of_kind[None, :] >> kind[:, None]) & 1) != 0, tl.exp2(x - safe[:, None]), 0.0)
        shrink = tl.exp2(m - safe)
        l = l * shrink + tl.sum(w, 1)  # noqa: E741
        acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = higher
    mine = Parts + (kv.to(tl.int64) * S + part) * (R * (BD + 2))
    tl.store(mine + r[:, None] * BD + d[None, :], acc, mask=(kind < 3)[:, None])  # the image's output serves nobody
    tl.store(mine + R * BD + r, m)
    tl.store(mine + R * BD + R + r, l)
    tl.debug_barrier()  # all of the program's parts stand before it says so
    if tl.atomic_add(Arrived + kv, 1) == S - 1:
        tl.store(Arrived + kv, 0)
        start, s = Parts + kv.to(tl.int64) * S * (R * (BD + 2)), tl.arange(0, SP)
        edited = 0
        for g in tl.static_range(G):
            on = s < S
            m_s = tl.load(start + s * (R * (BD + 2)) + R * BD + g, mask=on, other=float("-inf"), cache_modifier=".cg")
            top = tl.max(m_s, 0)
            top = tl.where(top == float("-inf"), 0.0, top)
            o_all, total = _row(start, g, s, d, m_s, top, on, R, BD)
            o_sinks, sinks = _row(start, GP + g, s, d, m_s, top, on, R, BD)
            o_rest, rest = _row(start, 2 * GP + g, s, d, m_s, top, on, R, BD)
            l_image = start + s * (R * (BD + 2)) + R * BD + R + 3 * GP + g
            image = tl.sum(tl.load(l_image, mask=on, other=0.0, cache_modifier=".cg") * tl.exp2(m_s - top), 0)
            chosen = rest > 0.0
            if CENTRIC:
                chosen = chosen & (image >= minimum_mass * total) & (rest >= rho * image)
            if CHOSEN:
                chosen = chosen & (tl.load(HeadOk + kvh * G + g) != 0)
            moved = o_all + move * (sinks / tl.maximum(rest, 1.0e-38) * o_rest - o_sinks)
            out = tl.where(chosen, moved, o_all) / tl.maximum(total, 1.0e-38)
            tl.store(Out + (b * K * G + kvh * G + g) * D + d, out.to(Out.dtype.element_ty), mask=d < D)
            edited += tl.where(chosen, 1, 0)
        tl.atomic_add(Count, tl.cast(edited, tl.int64))
