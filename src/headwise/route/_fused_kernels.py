"""Triton kernels of a router whose rule is top-k of softmax(W x): the choice, two losses, and all gradients in a few launches.

Imported only where Triton is; `_fused.py` calls them and says what they compute. Float32 inside.

Letters: T tokens, C width, E units (EP: up to a power of two), K slots (KP likewise), BM tokens and BK columns of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def choose(
    x, W, real, logits, probs, lse, index, weight, partial, T, C, E, scale,
    K: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    RENORM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Logits, probabilities, the k best and their weights; a row of `partial` (blocks, 2 EP + 3) with sums over real tokens."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM).to(tl.int64)
    units, slots = tl.arange(0, EP), tl.arange(0, KP)
    inside, known = rows < T, units < E
    l = tl.zeros([BM, EP], dtype=tl.float32)
    for start in range(0, C, BK):
        columns = start + tl.arange(0, BK)
        a = tl.load(x + rows[:, None] * C + columns[None], mask=inside[:, None] & (columns < C)[None], other=0.0)
        b = tl.load(W + units[None] * C + columns[:, None], mask=known[None] & (columns < C)[:, None], other=0.0)
        l = tl.dot(a.to(tl.float32), b.to(tl.float32), l, input_precision="ieee")
    both = inside[:, None] & known[None]
    tl.store(logits + rows[:, None] * E + units[None], l, mask=both)
    shown = tl.where(known[None], l, -float("inf"))
    top = tl.max(shown, 1)
    e = tl.where(known[None], tl.exp(shown - top[:, None]), 0.0)
    total = tl.sum(e, 1)
    p = e / total[:, None]
    size = top + tl.log(total)
    tl.store(probs + rows[:, None] * E + units[None], p, mask=both)
    tl.store(lse + rows, size, mask=inside)
    # The k best, one after the other; of equal ones the lowest.
    left = tl.where(known[None], p, -1.0)
    w = tl.zeros([BM, KP], dtype=tl.float32)
    chosen = tl.zeros([BM, KP], dtype=tl.int64)
    mask = tl.zeros([BM, EP], dtype=tl.float32)
    for slot in tl.static_range(K):
        best = tl.argmax(left, 1, tie_break_left=True)
        here = slots[None] == slot
        w = tl.where(here, tl.max(left, 1)[:, None], w)
        chosen = tl.where(here, best.to(tl.int64)[:, None], chosen)
        taken = units[None] == best[:, None]
        mask = tl.where(taken, 1.0, mask)
        left = tl.where(taken, -1.0, left)
    if RENORM:
        w = w / (tl.sum(w, 1) + 1e-20)[:, None]
    kept = inside[:, None] & (slots < K)[None]
    tl.store(index + rows[:, None] * K + slots[None], chosen, mask=kept)
    tl.store(weight + rows[:, None] * K + slots[None], w * scale, mask=kept)
    counts = inside.to(tl.float32)
    if MASKED:
        counts *= tl.load(real + rows, mask=inside, other=0).to(tl.float32)
    good = tl.sum(tl.where(both & (tl.abs(l) <= 3.0e38), 1.0, 0.0))
    bad = tl.sum(tl.where(both, 1.0, 0.0)) - good
    to = partial + tl.program_id(0) * (2 * EP + 3)
    tl.store(to + units, tl.sum(tl.where(counts[:, None] > 0, p, 0.0), 0))
    tl.store(to + EP + units, tl.sum(mask * counts[:, None], 0))
    tl.store(to + 2 * EP, tl.sum(tl.where(counts > 0, size * size, 0.0)))
    tl.store(to + 2 * EP + 1, tl.sum(counts))
    tl.store(to + 2 * EP + 2, bad)


@triton.jit
def finish(partial, numbers, slope, blocks, E, EP: tl.constexpr, BR: tl.constexpr):
    """numbers: balance, z, count of tokens, 1 if all logits were finite; slope (EP,): what a unit of P_e is worth in balance."""
    units = tl.arange(0, EP)
    P, f = tl.zeros([EP], dtype=tl.float32), tl.zeros([EP], dtype=tl.float32)
    square, tokens, bad = 0.0, 0.0, 0.0
    width = 2 * EP + 3
    for start in range(0, blocks, BR):
        rows = start + tl.arange(0, BR)
        inside = rows < blocks
        at = partial + rows[:, None] * width + units[None]
        P += tl.sum(tl.load(at, mask=inside[:, None], other=0.0), 0)
        f += tl.sum(tl.load(at + EP, mask=inside[:, None], other=0.0), 0)
        square += tl.sum(tl.load(partial + rows * width + 2 * EP, mask=inside, other=0.0))
        tokens += tl.sum(tl.load(partial + rows * width + 2 * EP + 1, mask=inside, other=0.0))
        bad += tl.sum(tl.load(partial + rows * width + 2 * EP + 2, mask=inside, other=0.0))
    count = tl.maximum(tokens, 1.0)
    uses = tl.sum(f)
    worth = f * E / tl.where(uses > 0, uses, 1.0)  # f / Σ f is the same before and after the division by the count
    tl.store(slope + units, worth / count)
    tl.store(numbers, tl.sum(P * worth) / count)
    tl.store(numbers + 1, square / count)
    tl.store(numbers + 2, count)
    tl.store(numbers + 3, tl.where(bad > 0, 0.0, 1.0))


@triton.jit
def gradients(
    probs, lse, index, weight, W, real, slope, numbers, grad_weight, grad_probs, grad_logits, grad_balance, grad_z,
    dl, dx, T, C, E, scale,
    K: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    RENORM: tl.constexpr, MASKED: tl.constexpr, WEIGHT: tl.constexpr, PROBS: tl.constexpr, LOGITS: tl.constexpr,
    BALANCE: tl.constexpr, Z: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """∂/∂logits (T, E) from the gradients at everything that `choose` gave, and ∂/∂x = ∂/∂logits W."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM).to(tl.int64)
    units = tl.arange(0, EP)
    inside, known = rows < T, units < E
    both = inside[:, None] & known[None]
    p = tl.load(probs + rows[:, None] * E + units[None], mask=both, other=0.0)
    counts = inside.to(tl.float32)
    if MASKED:
        counts *= tl.load(real + rows, mask=inside, other=0).to(tl.float32)
    g = tl.zeros([BM, EP], dtype=tl.float32)
    if PROBS:
        g += tl.load(grad_probs + rows[:, None] * E + units[None], mask=both, other=0.0).to(tl.float32)
    if BALANCE:
        g += counts[:, None] * (tl.load(slope + units) * tl.load(grad_balance).to(tl.float32))[None]
    if WEIGHT:
        kept, mean = tl.zeros([BM], dtype=tl.float32), tl.zeros([BM], dtype=tl.float32)
        above = tl.zeros([BM, EP], dtype=tl.float32)
        mask = tl.zeros([BM, EP], dtype=tl.float32)
        for slot in tl.static_range(K):
            i = tl.load(index + rows * K + slot, mask=inside, other=0)
            w = tl.load(weight + rows * K + slot, mask=inside, other=0.0)
            gw = tl.load(grad_weight + rows * K + slot, mask=inside, other=0.0).to(tl.float32)
            here = units[None] == i[:, None]
            above += tl.where(here, gw[:, None], 0.0)
            mask = tl.where(here, 1.0, mask)
            mean += gw * w
            kept += tl.sum(tl.where(here, p, 0.0), 1)
        if RENORM:
            g += mask * (above * scale - mean[:, None]) / (kept + 1e-20)[:, None]
        else:
            g += above * scale
    g = p * (g - tl.sum(p * g, 1)[:, None])
    if Z:
        size = tl.load(lse + rows, mask=inside, other=0.0)
        g += p * (counts * 2 * size * tl.load(grad_z).to(tl.float32) / tl.load(numbers + 2))[:, None]
    if LOGITS:
        g += tl.load(grad_logits + rows[:, None] * E + units[None], mask=both, other=0.0).to(tl.float32)
    g = tl.where(both, g, 0.0)
    tl.store(dl + rows[:, None] * E + units[None], g, mask=both)
    if X:
        for start in range(0, C, BK):
            columns = start + tl.arange(0, BK)
            right = columns < C
            b = tl.load(W + units[:, None] * C + columns[None], mask=known[:, None] & right[None], other=0.0)
            out = tl.dot(g, b.to(tl.float32), input_precision="ieee")
            to = dx + rows[:, None] * C + columns[None]
            tl.store(to, out.to(dx.dtype.element_ty), mask=inside[:, None] & right[None])


@triton.jit
def weight_gradient(
    dl, x, partial, T, C, E, per_split, EP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """A part of ∂/∂W = (∂/∂logits)ᵀ x, over the tokens of one split: partial (splits, E, C)."""
    columns, units = tl.program_id(0) * BK + tl.arange(0, BK), tl.arange(0, EP)
    first = tl.program_id(1).to(tl.int64) * per_split
    right, known = columns < C, units < E
    total = tl.zeros([EP, BK], dtype=tl.float32)
    for start in range(0, per_split, BM):
        rows = first + start + tl.arange(0, BM)
        inside = (rows < T) & (start + tl.arange(0, BM) < per_split)
        a = tl.load(dl + rows[None] * E + units[:, None], mask=known[:, None] & inside[None], other=0.0)
        b = tl.load(x + rows[:, None] * C + columns[None], mask=inside[:, None] & right[None], other=0.0)
        total = tl.dot(a, b.to(tl.float32), total, input_precision="ieee")
    to = partial + (tl.program_id(1).to(tl.int64) * E + units[:, None]) * C + columns[None]
    tl.store(to, total, mask=known[:, None] & right[None])
