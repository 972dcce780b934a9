"""Triton kernel of LongHeads' attention: a tile of queries walks over the chunks that any of them selected.

Imported only where Triton is; `_longheads_fast.py` calls it and says what it computes.

Letters: B batch, H query heads, K kv heads, G = H/K, S selections a kv head, N queries, M key columns, C chunks, w tokens of a chunk,
R/2 = HALF pairs of a head that rotate (all of them), BM queries and BN keys of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def attend_chunks(
    q, k, v, chosen, positions, starts, cos, sin, out,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, H, K, S, N, M, C, w, kept, scale,
    G: tl.constexpr, HALF: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PAIRS: tl.constexpr, OWN: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Online softmax over chunks; before each, the queries turn by the difference of the remapped positions, a multiple of w.

    `cos`, `sin` (C + kept, HALF) are of the turns -C · w … (kept - 1) · w. PAIRS: neighbouring dims rotate, not halves of the head.
    """
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    kv, selection = head // G, tl.where(S == 1, 0, head % G)
    rows, half = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, HALF)
    inside = rows < N
    place = tl.load(positions + batch * N + rows, mask=inside, other=-1)
    current = tl.maximum(place, 0) // w
    one, two = half, half + HALF
    if PAIRS:
        one, two = 2 * half, 2 * half + 1
    at = q + batch.to(tl.int64) * qb + head.to(tl.int64) * qh + rows.to(tl.int64)[:, None] * qn
    x = tl.load(at + one[None], mask=inside[:, None], other=0.0).to(tl.float32)
    y = tl.load(at + two[None], mask=inside[:, None], other=0.0).to(tl.float32)
    keys = k + batch.to(tl.int64) * kb + kv.to(tl.int64) * kh
    values = v + batch.to(tl.int64) * vb + kv.to(tl.int64) * vh
    members = chosen + ((batch.to(tl.int64) * K + kv) * S + selection) * N * C + rows.to(tl.int64) * C
    first = 0
    if PADDED:
        first = tl.load(starts + batch)
    dims = tl.arange(0, DV)
    top, mass = tl.full([BM], -float("inf"), tl.float32), tl.zeros([BM], tl.float32)
    total = tl.zeros([BM, DV], tl.float32)
    slot = tl.zeros([BM], tl.int32)
    newest = tl.load(positions + batch * N + tl.minimum(tl.program_id(0) * BM + BM, N) - 1)  # positions ascend
    for chunk in range(0, tl.maximum(newest, 0) // w + 1):
        member = tl.load(members + chunk, mask=inside, other=0).to(tl.int32)
        if tl.max(member) > 0:
            turn = (C + kept - 1 - current - slot + chunk).to(tl.int64)[:, None] * HALF + half[None]
            c = tl.load(cos + turn, mask=member[:, None] > 0, other=0.0)
            s = tl.load(sin + turn, mask=member[:, None] > 0, other=0.0)
            a, b = (x * c - y * s).to(k.dtype.element_ty), (y * c + x * s).to(k.dtype.element_ty)
            for begin in range(0, w, BN):
                offset = begin + tl.arange(0, BN)
                token = chunk * w + offset
                column = token + first
                there = (offset < w) & (column < M)
                to = keys + column.to(tl.int64)[None] * kn
                logits = tl.dot(a, tl.load(to + one[:, None], mask=there[None], other=0.0), input_precision="ieee")
                logits += tl.dot(b, tl.load(to + two[:, None], mask=there[None], other=0.0), input_precision="ieee")
                before = token[None] <= place[:, None] if OWN else token[None] < place[:, None]
                logits = tl.where((member[:, None] > 0) & there[None] & before, logits * scale, -float("inf"))
                new = tl.maximum(top, tl.max(logits, 1))
                floor = tl.where(new == -float("inf"), 0.0, new)
                weights, factor = tl.exp(logits - floor[:, None]), tl.exp(top - floor)
                mass = mass * factor + tl.sum(weights, 1)
                part = tl.load(values + column.to(tl.int64)[:, None] * vn + dims[None], mask=there[:, None], other=0.0)
                total = tl.dot(weights.to(part.dtype), part, total * factor[:, None], input_precision="ieee")
                top = new
        slot += member
    result = total / tl.maximum(mass, 1e-38)[:, None]
    to = out + ((batch.to(tl.int64) * H + head) * N + rows.to(tl.int64)[:, None]) * DV + dims[None]
    tl.store(to, result.to(out.dtype.element_ty), mask=inside[:, None])
