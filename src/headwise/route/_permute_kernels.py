"""Triton kernels of the dispatch: a sum of gathered rows, and SwiGLU times a weight of each row, both in one pass over memory.

Imported only where Triton is; `_permute.py` holds the same in torch and calls these.
"""

import triton
import triton.language as tl


@triton.jit
def gather_sum(rows, place, out, C, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = Σ_j rows[place[t, j]] in float32; a place below 0 adds nothing."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < C
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(place + token * SLOTS + slot).to(tl.int64)
        total += tl.load(rows + row * C + columns, mask=inside & (row >= 0), other=0.0).to(tl.float32)
    tl.store(out + token * C + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_forward(up, weight, out, size, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    """out[s] = silu(up[s, :I]) · up[s, I:] · weight[s]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(up + row * 2 * size + columns, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(up + row * 2 * size + size + columns, mask=inside, other=0.0).to(tl.float32)
    made = gate * tl.sigmoid(gate) * value
    if WEIGHED:
        made *= tl.load(weight + row).to(tl.float32)
    tl.store(out + row * size + columns, made.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(grad, up, weight, grad_up, grad_weight, size, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of `swiglu_forward` at up (S, 2I) and weight (S,)."""
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if WEIGHED:
        factor = tl.load(weight + row).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < size
        gate = tl.load(up + row * 2 * size + columns, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(up + row * 2 * size + size + columns, mask=inside, other=0.0).to(tl.float32)
        above = tl.load(grad + row * size + columns, mask=inside, other=0.0).to(tl.float32)
        sure = tl.sigmoid(gate)
        act = gate * sure
        total += above * act * value
        above *= factor
        at_gate = above * value * (sure + act * (1 - sure))
        tl.store(grad_up + row * 2 * size + columns, at_gate.to(grad_up.dtype.element_ty), mask=inside)
        tl.store(grad_up + row * 2 * size + size + columns, (above * act).to(grad_up.dtype.element_ty), mask=inside)
    if WEIGHED:
        tl.store(grad_weight + row, tl.sum(total, 0).to(grad_weight.dtype.element_ty))
