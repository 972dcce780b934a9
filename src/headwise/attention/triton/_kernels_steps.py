"""Kernels of a decode step's bookkeeping: every (row, kv head) of every layer has a ring; one launch moves all of them on.

Letters: L layers, B rows, K kv heads, S = pad(B*K), BN keys of a block, P programs of the decode kernel, D head dim.
"""

import triton
import triton.language as tl


@triton.jit
def advance_rings(
    At, Filled, Wrap, Limit, Slot, Gone, Position, Starts, First, Share, segments, P, B,
    BN: tl.constexpr, S: tl.constexpr, PP: tl.constexpr, SB: tl.constexpr,
):  # fmt: skip
    """One program a layer: the slot of the coming token, where the one after it goes, how many are held, and the even split."""
    layer = tl.program_id(0)
    s = tl.arange(0, S)
    on = s < segments
    here = layer * segments + s
    at = tl.load(At + here, mask=on, other=0)
    limit = tl.load(Limit + here, mask=on, other=0)
    wrap = tl.load(Wrap + here, mask=on, other=0)
    tl.store(Slot + here, at, mask=on)
    tl.store(At + here, tl.where(at + 1 >= limit, wrap, at + 1), mask=on)
    before = tl.load(Filled + here, mask=on, other=0)
    tl.store(Gone + here, (before >= limit).to(tl.int32), mask=on)
    filled = tl.minimum(before + 1, limit)
    tl.store(Filled + here, filled, mask=on)
    if layer == 0:
        b = tl.arange(0, SB)
        tl.store(Position + b, tl.load(Position + b, mask=b < B, other=0) + 1, mask=b < B)
    blocks = tl.where(on, tl.cdiv(filled, BN), 0)
    ends = tl.cumsum(blocks, 0)
    total = tl.sum(blocks, 0)
    share = tl.maximum(tl.cdiv(total, P), 1)
    starts = Starts + layer * (segments + 1)
    tl.store(starts + s + 1, ends, mask=on)
    tl.store(starts, 0)
    tl.store(Share + layer, share)
    for p0 in range(0, P, PP):
        p = p0 + tl.arange(0, PP)
        inside = (ends[None, :] <= p[:, None] * share) & on[None, :]
        tl.store(First + layer * P + p, tl.sum(inside.to(tl.int32), 1), mask=p < P)


@triton.jit
def write_rings(
    Knew, Vnew, Kptr, Vptr, PosPtr, Slot, Gone, Position, Khat, Vhat, Number, LogCount, Weigh, kb, kh, vb, vh,
    K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """One program a (row, kv head): the new key and value go to their slot, and the position of the token beside them.

    With FOLD what leaves for them is added to the means of its head, k_hat <- (n k_hat + k) / (n + 1), if it keeps any.
    """
    s = tl.program_id(0)
    b = (s // K).to(tl.int64)
    h = s % K
    d = tl.arange(0, BD)
    slot = tl.load(Slot + s).to(tl.int64)
    k_base = tl.load(Kptr + s).to(tl.pointer_type(Knew.dtype.element_ty))
    v_base = tl.load(Vptr + s).to(tl.pointer_type(Vnew.dtype.element_ty))
    if FOLD:
        weigh = tl.load(Weigh + h)
        if (weigh > 0) & (tl.load(Gone + s) > 0):
            n = tl.load(Number + s)
            share = 1.0 / (n + 1.0)
            k_old = tl.load(k_base + slot * D + d, mask=d < D, other=0.0).to(tl.float32)
            v_old = tl.load(v_base + slot * D + d, mask=d < D, other=0.0).to(tl.float32)
            k_hat = tl.load(Khat + s * D + d, mask=d < D, other=0.0)
            v_hat = tl.load(Vhat + s * D + d, mask=d < D, other=0.0)
            tl.store(Khat + s * D + d, k_hat + (k_old - k_hat) * share, mask=d < D)
            tl.store(Vhat + s * D + d, v_hat + (v_old - v_hat) * share, mask=d < D)
            tl.store(Number + s, n + 1.0)
            tl.store(LogCount + s, tl.where(weigh == 2, tl.log(n + 1.0), 0.0))
    tl.store(k_base + slot * D + d, tl.load(Knew + b * kb + h * kh + d, mask=d < D), mask=d < D)
    tl.store(v_base + slot * D + d, tl.load(Vnew + b * vb + h * vh + d, mask=d < D), mask=d < D)
    positions = tl.load(PosPtr + s)
    if positions != 0:
        tl.store(positions.to(tl.pointer_type(tl.int32)) + slot, tl.load(Position + b))
