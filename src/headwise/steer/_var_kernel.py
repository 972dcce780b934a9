"""VAR for one new token in one kernel: attention over all keys, sinks and image alike, in the time of attention alone.

One program reads the keys of one (row, query head) once and keeps three sums: of all keys, of the sinks, of the image that is no sink.
Keys stand in one tensor (B, K, M, D), or where a table of addresses says (`TABLE`): then nothing depends on the host, and a captured
step stays right.

Letters: B rows, H query heads, K kv heads, G = H/K, M key columns, C columns of the prompt, D head dim, BM keys of a block.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["C", "M"])
def redistribute_one(
    Q, Keys, Values, Filled, Codes, Mask, HeadOk, Out, Count, C, M, scale_log2, move, rho, minimum_mass,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    TABLE: tl.constexpr, MASKED: tl.constexpr, CENTRIC: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """O − p·O_sinks + (p·P_sinks / P_rest)·O_rest where the head is image-centric, else O; counts the heads that were edited.

    With TABLE, Keys and Values (B, K) int64 are addresses of the first slots and Filled (B, K) int32 says how many are read; codes then
    go by slot. Without, the tensors themselves, M keys each.
    """
    b, h = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BD)
    q = tl.load(Q + (b * H + h) * D + d, mask=d < D, other=0.0).to(tl.float32) * scale_log2
    kv = b.to(tl.int64) * (H // G) + h // G
    if TABLE:
        keys = tl.load(Keys + kv).to(tl.pointer_type(Q.dtype.element_ty))
        values = tl.load(Values + kv).to(tl.pointer_type(Q.dtype.element_ty))
        count = tl.load(Filled + kv)
    else:
        keys, values, count = Keys + kv * M * D, Values + kv * M * D, M
    top = -1.0e30
    total, sinks, rest, image = 0.0, 0.0, 0.0, 0.0
    o_all, o_sinks, o_rest = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    for m0 in range(0, count, BM):
        m = m0 + tl.arange(0, BM)
        seen = m < count
        if MASKED:
            seen = seen & (tl.load(Mask + b * M + m, mask=seen, other=0) != 0)
        inside = seen[:, None] & (d < D)[None, :]
        k = tl.load(keys + m[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        v = tl.load(values + m[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        logit = tl.where(seen, tl.sum(k * q[None, :], 1), -1.0e30)
        higher = tl.maximum(top, tl.max(logit, 0))
        shrink = tl.exp2(top - higher)
        p = tl.where(seen, tl.exp2(logit - higher), 0.0)
        code = tl.load(Codes + b * C + m, mask=seen & (m < C), other=0).to(tl.int32)
        on_image, on_sink = (code & 1) != 0, (code & 2) != 0
        p_sinks, p_rest = tl.where(on_sink, p, 0.0), tl.where(on_image & (on_sink == 0), p, 0.0)
        total = total * shrink + tl.sum(p, 0)
        sinks = sinks * shrink + tl.sum(p_sinks, 0)
        rest = rest * shrink + tl.sum(p_rest, 0)
        image = image * shrink + tl.sum(tl.where(on_image, p, 0.0), 0)
        o_all = o_all * shrink + tl.sum(p[:, None] * v, 0)
        o_sinks = o_sinks * shrink + tl.sum(p_sinks[:, None] * v, 0)
        o_rest = o_rest * shrink + tl.sum(p_rest[:, None] * v, 0)
        top = higher
    chosen = rest > 0.0
    if CENTRIC:
        chosen = chosen & (image >= minimum_mass * total) & (rest >= rho * image)
    if CHOSEN:
        chosen = chosen & (tl.load(HeadOk + h) != 0)
    moved = o_all + move * (sinks / tl.maximum(rest, 1.0e-38) * o_rest - o_sinks)
    out = tl.where(chosen, moved, o_all) / tl.maximum(total, 1.0e-38)
    tl.store(Out + (b * H + h) * D + d, out.to(Out.dtype.element_ty), mask=d < D)
    tl.atomic_add(Count, tl.where(chosen, 1, 0).to(tl.int64))
