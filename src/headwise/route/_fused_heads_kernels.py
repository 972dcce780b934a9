"""Triton kernels of the trained head router: gates with the sums of the balance loss, and all gradients, in a few launches.

Imported only where Triton is; `_fused_heads.py` calls them and says what they compute. Columns of a tile: the S shared heads, the
E heads of the pool, and, where there are both, two of α. Everything is float32; products with a bfloat16 operand take the
float32 one apart into parts of bfloat16, so that tensor cores serve.

Letters: T tokens, C width, H = S + E heads, K chosen, U columns (EP: up to a power of two), BM tokens and BK columns of C of a tile.
"""

import triton
import triton.language as tl

from headwise.attention.triton._host import interpreting

INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def head_gates(
    x, W_s, W_r, W_h, place, real, gates, saved, partial, T, C, S, E, K,
    EP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SHARED: tl.constexpr, ROUTED: tl.constexpr,
    OFFICIAL: tl.constexpr, MASKED: tl.constexpr, BALANCE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Gates (T, H) in head order; saved (T, U): probabilities, with a minus where a head was not chosen.

    A row of `partial` (blocks, 2 EP + 1): sums over real tokens of the pool's probabilities and choices, and their number.
    """
    rows, units = tl.program_id(0) * BM + tl.arange(0, BM).to(tl.int64), tl.arange(0, EP)
    H = S + E
    inside, shared, pool = rows < T, units < S, (units >= S) & (units < H)
    starts, known = _row_starts(W_s, W_r, W_h, units, C, S, E)
    l = tl.zeros([BM, EP], dtype=tl.float32)
    for start in range(0, C, BK):
        columns = start + tl.arange(0, BK)
        right = columns < C
        a = tl.load(x + rows[:, None] * C + columns[None], mask=inside[:, None] & right[None], other=0.0)
        b = tl.load(starts[None] + columns[:, None], mask=known[None] & right[:, None], other=0.0)
        l = _dot_left(a, b.to(tl.float32), l)
    gate, kept = tl.zeros([BM, EP], dtype=tl.float32), tl.zeros([BM, EP], dtype=tl.float32)
    first, second = 1.0, 1.0
    if SHARED and ROUTED:
        alpha = _softmax(l, (units >= H) & (units < H + 2))
        first, second = _column(alpha, units, H, OFFICIAL), _column(alpha, units, H + 1, OFFICIAL)
        kept += alpha
    if SHARED:
        s = _softmax(l, shared)
        kept += s
        gate += s * first * (S if OFFICIAL else 1)
    if ROUTED:
        p = _softmax(l, pool)
        mask = _best(p, pool, units, K)
        kept += tl.where(mask > 0, p, -p)
        r = p * mask
        if OFFICIAL:
            r *= (K / tl.maximum(tl.sum(r, 1), 1.1920929e-07))[:, None]
        gate += r * second
        if BALANCE:
            counts = _counted(real, rows, inside, MASKED)
            to = partial + tl.program_id(0) * (2 * EP + 1)
            tl.store(to + units, tl.sum(tl.where(counts[:, None] > 0, p, 0.0), 0))
            tl.store(to + EP + units, tl.sum(mask * counts[:, None], 0))
            tl.store(to + 2 * EP, tl.sum(counts))
    head = tl.load(place + units, mask=units < H, other=0)
    tl.store(gates + rows[:, None] * H + head[None], gate, mask=inside[:, None] & (units < H)[None])
    if SAVE:
        width = H + 2 if SHARED and ROUTED else H
        tl.store(saved + rows[:, None] * width + units[None], kept, mask=inside[:, None] & (units < width)[None])


@triton.jit
def finish(partial, balance, slope, blocks, E, EP: tl.constexpr, BR: tl.constexpr, SCALING: tl.constexpr):
    """The balance loss, and slope (EP,): what a real token's probability of a head is worth in it."""
    units = tl.arange(0, EP)
    P, f = tl.zeros([EP], dtype=tl.float32), tl.zeros([EP], dtype=tl.float32)
    tokens = 0.0
    width = 2 * EP + 1
    for start in range(0, blocks, BR):
        rows = start + tl.arange(0, BR)
        inside = rows < blocks
        at = partial + rows[:, None] * width + units[None]
        P += tl.sum(tl.load(at, mask=inside[:, None], other=0.0), 0)
        f += tl.sum(tl.load(at + EP, mask=inside[:, None], other=0.0), 0)
        tokens += tl.sum(tl.load(partial + rows * width + 2 * EP, mask=inside, other=0.0))
    count = tl.maximum(tokens, 1.0)
    if SCALING == "unit":
        uses = tl.sum(f)
        worth = f * E / tl.where(uses > 0, uses, 1.0)  # f / Σ f is the same before and after the division by the count
    else:
        worth = f / count * (E if SCALING == "official" else 1)
    tl.store(slope + units, worth / count)
    tl.store(balance, tl.sum(P * worth) / count)


@triton.jit
def head_gradients(
    saved, W_s, W_r, W_h, place, real, slope, grad_gates, grad_balance, dl, dx, T, C, S, E, K,
    EP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SHARED: tl.constexpr, ROUTED: tl.constexpr,
    OFFICIAL: tl.constexpr, MASKED: tl.constexpr, GATES: tl.constexpr, BALANCE: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """∂/∂logits (T, U) from the gradients at gates and balance loss, and ∂/∂x = ∂/∂logits W."""
    rows, units = tl.program_id(0) * BM + tl.arange(0, BM).to(tl.int64), tl.arange(0, EP)
    H = S + E
    width = H + 2 if SHARED and ROUTED else H
    inside, pool = rows < T, ((units >= S) & (units < H))[None]
    both = inside[:, None] & (units < width)[None]
    kept = tl.load(saved + rows[:, None] * width + units[None], mask=both, other=0.0)
    p, mask = tl.abs(kept), tl.where(kept > 0, 1.0, 0.0)  # where p is 0 it does not matter what was chosen
    g = tl.zeros([BM, EP], dtype=tl.float32)  # ∂/∂p of whatever softmax a column belongs to
    if GATES:
        head = tl.load(place + units, mask=units < H, other=0)
        above = tl.load(
            grad_gates + rows[:, None] * H + head[None], mask=inside[:, None] & (units < H)[None], other=0.0
        ).to(tl.float32)
        first, second = 1.0, 1.0
        if SHARED and ROUTED:
            first, second = _column(p, units, H, OFFICIAL), _column(p, units, H + 1, OFFICIAL)
        if SHARED:
            factor = S if OFFICIAL else 1
            g += tl.where(units[None] < S, above * factor * first, 0.0)
        if ROUTED:
            r = tl.where(pool, p * mask, 0.0)
            norm, pull = 1.0, tl.zeros([BM, 1], dtype=tl.float32)
            if OFFICIAL:
                total = tl.sum(r, 1)[:, None]
                norm = K / tl.maximum(total, 1.1920929e-07)
                pull = tl.where(total >= 1.1920929e-07, tl.sum(above * r, 1)[:, None] * norm / total, 0.0)
            g += tl.where(pool, mask * (above * norm - pull) * second, 0.0)
        if SHARED and ROUTED:
            twice = 2.0 if OFFICIAL else 1.0
            one = tl.sum(tl.where(units[None] < S, above * p, 0.0), 1)[:, None] * (factor * twice)
            two = tl.sum(above * r * norm, 1)[:, None] * twice
            g += tl.where(units[None] == H, one, 0.0) + tl.where(units[None] == H + 1, two, 0.0)
    if BALANCE:
        counts = _counted(real, rows, inside, MASKED)
        g += counts[:, None] * (tl.load(slope + units) * tl.load(grad_balance).to(tl.float32))[None]
    weighed = p * g
    mean = tl.where(pool, tl.sum(tl.where(pool, weighed, 0.0), 1)[:, None], 0.0)
    if SHARED:
        mean += tl.where(units[None] < S, tl.sum(tl.where(units[None] < S, weighed, 0.0), 1)[:, None], 0.0)
    if SHARED and ROUTED:
        mean += tl.where(units[None] >= H, tl.sum(tl.where(units[None] >= H, weighed, 0.0), 1)[:, None], 0.0)
    g = tl.where(both, weighed - p * mean, 0.0)
    tl.store(dl + rows[:, None] * width + units[None], g, mask=both)
    if X:
        starts, known = _row_starts(W_s, W_r, W_h, units, C, S, E)
        for start in range(0, C, BK):
            columns = start + tl.arange(0, BK)
            right = columns < C
            b = tl.load(starts[:, None] + columns[None], mask=known[:, None] & right[None], other=0.0)
            out = _dot_both(g, b.to(tl.float32), dx.dtype.element_ty)
            to = dx + rows[:, None] * C + columns[None]
            tl.store(to, out.to(dx.dtype.element_ty), mask=inside[:, None] & right[None])


@triton.jit
def head_weight_gradient(
    dl, x, partial, T, C, U, per_split, EP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """A part of ∂/∂W = (∂/∂logits)ᵀ x, over the tokens of one split: partial (splits, U, C)."""
    columns, units = tl.program_id(0) * BK + tl.arange(0, BK), tl.arange(0, EP)
    first = tl.program_id(1).to(tl.int64) * per_split
    right, known = columns < C, units < U
    total = tl.zeros([EP, BK], dtype=tl.float32)
    for start in range(0, per_split, BM):
        rows = first + start + tl.arange(0, BM)
        inside = (rows < T) & (start + tl.arange(0, BM) < per_split)
        a = tl.load(dl + rows[None] * U + units[:, None], mask=known[:, None] & inside[None], other=0.0)
        b = tl.load(x + rows[:, None] * C + columns[None], mask=inside[:, None] & right[None], other=0.0)
        total = _dot_right(a, b, total)
    to = partial + (tl.program_id(1).to(tl.int64) * U + units[:, None]) * C + columns[None]
    tl.store(to, total, mask=known[:, None] & right[None])


# -- parts -------------------------------------------------------------------------------------------------------------


@triton.jit
def _row_starts(W_s, W_r, W_h, units, C, S, E):
    """Where the weights of each column begin, and which columns have any: a shared head that is alone needs none."""
    if W_r is None:
        starts, known = W_s + units * C, units < S
    else:
        starts, known = W_r + (units - S) * C, (units >= S) & (units < S + E)
    if W_s is not None:
        starts, known = tl.where(units < S, W_s + units * C, starts), known | (units < S)
    if W_h is not None:
        alpha = (units >= S + E) & (units < S + E + 2)
        starts, known = tl.where(alpha, W_h + (units - S - E) * C, starts), known | alpha
    return starts, known


@triton.jit
def _softmax(l, known):
    """Softmax over the known columns; 0 in the others."""
    shown = tl.where(known[None], l, -float("inf"))
    e = tl.where(known[None], tl.exp(shown - tl.max(shown, 1)[:, None]), 0.0)
    return tl.where(known[None], e / tl.sum(e, 1)[:, None], 0.0)


@triton.jit
def _best(p, known, units, K):
    """The K best of the known columns as 0 and 1, one after the other; of equal ones the lowest."""
    left, mask = tl.where(known[None], p, -1.0), tl.zeros_like(p)
    for _ in range(K):
        taken = units[None] == tl.argmax(left, 1, tie_break_left=True)[:, None]
        mask = tl.where(taken, 1.0, mask)
        left = tl.where(taken, -1.0, left)
    return mask


@triton.jit
def _column(a, units, number, OFFICIAL: tl.constexpr):
    """One column (BM, 1), twice it where gates are to have the mean 1."""
    return tl.sum(tl.where(units[None] == number, a, 0.0), 1)[:, None] * (2.0 if OFFICIAL else 1.0)


@triton.jit
def _counted(real, rows, inside, MASKED: tl.constexpr):
    """1.0 for real tokens."""
    counts = inside.to(tl.float32)
    if MASKED:
        counts *= tl.load(real + rows, mask=inside, other=0).to(tl.float32)
    return counts


@triton.jit
def _dot_left(a, b, total):
    """total + a b of a float32 b."""
    if a.dtype == tl.bfloat16:
        high, middle, low = _parts(b)
        total = _mma(a, high, _mma(a, middle, _mma(a, low, total)))
    else:
        total = tl.dot(a.to(tl.float32), b, total, input_precision="ieee")
    return total


@triton.jit
def _dot_right(a, b, total):
    """total + a b of a float32 a."""
    if b.dtype == tl.bfloat16:
        high, middle, low = _parts(a)
        total = _mma(high, b, _mma(middle, b, _mma(low, b, total)))
    else:
        total = tl.dot(a, b.to(tl.float32), total, input_precision="ieee")
    return total


@triton.jit
def _dot_both(a, b, dtype: tl.constexpr):
    """a b of float32 both, as exact as a result of this type asks for: two parts have 16 bits, twice bfloat16's own 8."""
    out = tl.zeros([a.shape[0], b.shape[1]], dtype=tl.float32)
    if dtype == tl.bfloat16:
        high, middle, _ = _parts(a)
        top, centre, _ = _parts(b)
        out = _mma(high, top, _mma(high, centre, _mma(middle, top, out)))
    else:
        out = tl.dot(a, b, out, input_precision="ieee")
    return out


@triton.jit
def _parts(x):
    """Three parts of bfloat16 whose sum is the float32 x: 8 of its 24 bits each."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _mma(a, b, total):
    """total + a b of bfloat16 both, which the interpreter's dot does not know."""
    if INTERPRETED:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        total = tl.dot(a, b, total)
    return total
