"""Ragged decode kernels: every (row, kv head) has its own keys; the work of all of them is cut into equal shares.

Letters: B rows, K kv heads, G query heads a kv head, Q query tokens, D head dim, R = pad(G*Q) tile rows, BN keys of a
block, P programs. Segment s = b*K + kvh owns blocks [Starts[s], Starts[s+1]) of the concatenation; program p works on
blocks [p*share, (p+1)*share). A program and a segment meet at most once, and along the walk either p or s grows, so
slot p + s is theirs alone.
"""

import triton
import triton.language as tl


@triton.jit
def plan_decode(
    Lengths, Starts, First, Share, segments, P, stride_b, stride_k, K,
    BN: tl.constexpr, S: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """One program: block prefix sums (segments+1), share of blocks a program (1), first segment of every program (P)."""
    s = tl.arange(0, S)
    length = tl.load(Lengths + (s // K) * stride_b + (s % K) * stride_k, mask=s < segments, other=0)
    blocks = tl.cdiv(length, BN)
    ends = tl.cumsum(blocks, 0)
    total = tl.sum(blocks, 0)
    share = tl.maximum(tl.cdiv(total, P), 1)
    tl.store(Starts + s + 1, ends, mask=s < segments)
    tl.store(Starts, 0)
    tl.store(Share, share)
    for p0 in range(0, P, PP):
        p = p0 + tl.arange(0, PP)
        inside = (ends[None, :] <= p[:, None] * share) & (s < segments)[None, :]
        tl.store(First + p, tl.sum(inside.to(tl.int32), 1), mask=p < P)


@triton.jit
def decode_partial(
    Q, Kptr, Vptr, Lengths, Starts, First, Share, SlotPos, QueryPos, PartO, PartM, PartL,
    qb, qh, qn, len_b, len_k, k_row, v_row, scale_log2, segments, P,
    G: tl.constexpr, NQ: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr, CAUSAL: tl.constexpr, POSITIONED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial (unnormalised output, maximum, sum) of every (program, segment) pair."""
    p = tl.program_id(0)
    share = tl.load(Share)
    at = p * share
    total = tl.load(Starts + segments)
    stop = tl.minimum(at + share, total)
    s = tl.load(First + p)
    r = tl.arange(0, R)
    d = tl.arange(0, BD)
    row_on = r < G * NQ
    token = r % NQ
    in_d = d < D
    while at < stop:
        b = s // K
        kvh = s % K
        begin = tl.load(Starts + s)
        upto = tl.minimum(tl.load(Starts + s + 1), stop)
        length = tl.load(Lengths + b * len_b + kvh * len_k)
        k_base = tl.multiple_of(tl.load(Kptr + s).to(tl.pointer_type(Q.dtype.element_ty)), 16)
        v_base = tl.multiple_of(tl.load(Vptr + s).to(tl.pointer_type(Q.dtype.element_ty)), 16)
        head = kvh * G + r // NQ
        q = tl.load(
            Q + b.to(tl.int64) * qb + head[:, None] * qh + token[:, None] * qn + d[None, :],
            mask=row_on[:, None] & in_d[None, :],
            other=0.0,
        )
        if POSITIONED:
            slot_base = tl.load(SlotPos + s).to(tl.pointer_type(tl.int32))
            q_pos = tl.load(QueryPos + b * NQ + token)
        acc = tl.zeros((R, BD), tl.float32)
        m = tl.full((R,), float("-inf"), tl.float32)
        l = tl.zeros((R,), tl.float32)  # noqa: E741
        for first in tl.range((at - begin) * BN, (upto - begin) * BN, BN, num_stages=STAGES):
            key = first + tl.arange(0, BN)
            in_m = key < length
            wide = key.to(tl.int64)
            k = tl.load(k_base + wide[None, :] * k_row + d[:, None], mask=in_m[None, :] & in_d[:, None], other=0.0)
            v = tl.load(v_base + wide[:, None] * v_row + d[None, :], mask=in_m[:, None] & in_d[None, :], other=0.0)
            x = tl.dot(q, k, input_precision=PRECISION) * scale_log2
            seen = in_m[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= length - NQ + token[:, None])
            if POSITIONED:
                slot = tl.load(slot_base + wide, mask=in_m, other=2147483647)
                seen = seen & (slot[None, :] <= q_pos[:, None])
            x = tl.where(seen, x, float("-inf"))
            m_new = tl.maximum(m, tl.max(x, 1))
            safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            w = tl.exp2(x - safe[:, None])
            alpha = tl.exp2(m - safe)
            l = l * alpha + tl.sum(w, 1)  # noqa: E741
            acc = tl.dot(w.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
            m = m_new
        slot_row = (p + s) * R + r
        tl.store(PartM + slot_row, m)
        tl.store(PartL + slot_row, l)
        tl.store(PartO + slot_row[:, None] * BD + d[None, :], acc)
        at = upto
        s += 1
        # segments without blocks lie between: skip them
        while (s < segments) & (tl.load(Starts + tl.minimum(s + 1, segments)) <= at) & (at < stop):
            s += 1


@triton.jit
def decode_merge(
    Q, PartO, PartM, PartL, Starts, Share, Khat, Vhat, LogCount, Out, Lse,
    qb, qh, qn, scale_log2, H,
    G: tl.constexpr, NQ: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
    PC: tl.constexpr, COMPENSATED: tl.constexpr,
):  # fmt: skip
    """Join the partials of one (segment, tile row) by log-sum-exp, add the compensation token, normalise, write."""
    s = tl.program_id(0)
    r = tl.program_id(1)
    b = (s // K).to(tl.int64)
    kvh = s % K
    head = kvh * G + r // NQ
    token = r % NQ
    d = tl.arange(0, BD)
    in_d = d < D
    share = tl.load(Share)
    begin = tl.load(Starts + s)
    end = tl.load(Starts + s + 1)
    acc = tl.zeros((BD,), tl.float32)
    m = float("-inf")
    l = 0.0  # noqa: E741
    if end > begin:
        p_last = (end - 1) // share
        for p0 in range(begin // share, p_last + 1, PC):
            p = p0 + tl.arange(0, PC)
            on = p <= p_last
            row = (p + s) * R + r
            # all three loads first: they are independent, and the merge is nothing but latency
            m_p = tl.load(PartM + row, mask=on, other=float("-inf"))
            l_p = tl.load(PartL + row, mask=on, other=0.0)
            o_p = tl.load(PartO + row[:, None] * BD + d[None, :], mask=on[:, None], other=0.0)
            m_new = tl.maximum(m, tl.max(m_p, 0))
            safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            beta = tl.exp2(m_p - safe)
            alpha = tl.exp2(m - safe)
            acc = acc * alpha + tl.sum(o_p * beta[:, None], 0)
            l = l * alpha + tl.sum(l_p * beta, 0)  # noqa: E741
            m = m_new
    if COMPENSATED:
        count = tl.load(LogCount + s).to(tl.float32)
        if count > float("-inf"):
            q = tl.load(Q + b * qb + head * qh + token * qn + d, mask=in_d, other=0.0).to(tl.float32)
            k = tl.load(Khat + s * D + d, mask=in_d, other=0.0).to(tl.float32)
            v = tl.load(Vhat + s * D + d, mask=in_d, other=0.0).to(tl.float32)
            x = tl.sum(q * k, 0) * scale_log2 + count * 1.4426950408889634
            m_new = tl.maximum(m, x)
            alpha = tl.exp2(m - m_new)
            beta = tl.exp2(x - m_new)
            acc = acc * alpha + v * beta
            l = l * alpha + beta  # noqa: E741
            m = m_new
    some = l > 0
    at = (b * H + head) * NQ + token
    tl.store(Out + at * D + d, tl.where(some, acc / tl.where(some, l, 1.0), 0.0).to(Out.dtype.element_ty), mask=in_d)
    tl.store(Lse + at, tl.where(some, m / 1.4426950408889634 + tl.log(tl.where(some, l, 1.0)), float("-inf")))
