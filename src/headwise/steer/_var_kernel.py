"""VAR for one new token in one kernel: attention over all keys, sinks and image alike, in the time of attention alone.

One program reads the keys of one (row, query head) once and keeps three sums: of all keys, of the sinks, of the image that is no sink.

Letters: B rows, H query heads, G query heads a kv head, M key columns, C columns of the prompt, D head dim, BM keys of a block.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["C", "M"])
def redistribute_one(
    Q, Keys, Values, Codes, Mask, HeadOk, Out, Count, C, M, scale_log2, move, rho, minimum_mass,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    MASKED: tl.constexpr, CENTRIC: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """O − p·O_sinks + (p·P_sinks / P_rest)·O_rest where the head is image-centric, else O; counts the heads that were edited."""
    b, h = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BD)
    q = tl.load(Q + (b * H + h) * D + d, mask=d < D, other=0.0).to(tl.float32) * scale_log2
    row = (b.to(tl.int64) * (H // G) + h // G) * M * D
    top = -1.0e30
    total, sinks, rest, image = 0.0, 0.0, 0.0, 0.0
    o_all, o_sinks, o_rest = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    for m0 in range(0, M, BM):
        m = m0 + tl.arange(0, BM)
        seen = m < M
        if MASKED:
            seen = seen & (tl.load(Mask + b * M + m, mask=seen, other=0) != 0)
        inside = seen[:, None] & (d < D)[None, :]
        k = tl.load(Keys + row + m[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        v = tl.load(Values + row + m[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
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
