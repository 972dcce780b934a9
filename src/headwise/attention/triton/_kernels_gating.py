"""Triton kernels of `headwise.attention.gating`: rows (R, D) times one number each, and the gradients.

Letters: R rows, D columns (DP: up to a power of two), BR rows of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def multiply(out, gates, made, R, D, BR: tl.constexpr, DP: tl.constexpr):
    """made = out · gate."""
    rows, columns = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, DP)
    inside = rows < R
    at, both = rows[:, None] * D + columns[None], inside[:, None] & (columns < D)[None]
    gate = tl.load(gates + rows, mask=inside, other=0.0).to(out.dtype.element_ty).to(tl.float32)
    x = tl.load(out + at, mask=both, other=0.0).to(tl.float32)
    tl.store(made + at, (x * gate[:, None]).to(made.dtype.element_ty), mask=both)


@triton.jit
def gradients(
    grad, out, gates, grad_out, grad_gates, R, D,
    BR: tl.constexpr, DP: tl.constexpr, OUT: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """∂/∂out = grad · gate, ∂/∂gate = Σ_d grad · out."""
    rows, columns = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, DP)
    inside = rows < R
    at, both = rows[:, None] * D + columns[None], inside[:, None] & (columns < D)[None]
    g = tl.load(grad + at, mask=both, other=0.0).to(tl.float32)
    if OUT:
        gate = tl.load(gates + rows, mask=inside, other=0.0).to(out.dtype.element_ty).to(tl.float32)
        tl.store(grad_out + at, (g * gate[:, None]).to(grad_out.dtype.element_ty), mask=both)
    if GATES:
        x = tl.load(out + at, mask=both, other=0.0).to(tl.float32)
        tl.store(grad_gates + rows, tl.sum(g * x, 1).to(grad_gates.dtype.element_ty), mask=inside)
