"""The memory passes of a dispatch: tokens to sorted rows, back to tokens, and what stands between the two matmuls.

    spread:      rows_s = x_{token_s}               backward: a sum of gathered rows
    gather_sum:  y_t = Σ_j rows_{place_tj}          backward: a gather
    swiglu:      h_s = silu(gate_s) ⊙ value_s · w_s

No pass adds into memory that another one writes: nothing is atomic, so results repeat bit for bit. A gate's weight is applied to
the input of the second matmul, W_down (w h) = w W_down h, where it costs no pass of its own. Torch's operations, or, on CUDA,
Triton kernels (`_permute_kernels.py`).

Letters: T tokens, k slots, S pairs of token and slot that are used, C width, I hidden width of an expert.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from headwise.attention.triton._host import interpreting, triton_available


class Sorted(NamedTuple):
    """Pairs of token and slot in the order of their experts."""

    token: Tensor  # (S,) token of each row
    order: Tensor  # (S,) flat slot, t·k + j, of each row
    place: Tensor  # (T, k) row of each slot, -1 for a slot that is not used
    ends: Tensor  # (E,) int32, the row behind the last one of each expert


def sort_pairs(index: Tensor, used: Tensor | None, experts: int) -> Sorted:
    """Sort by expert, slots of one expert in order of the tokens. `used` (T, k) None: all, and nothing waits for the device."""
    T, k = index.shape
    flat = index.reshape(-1) if used is None else torch.where(used.reshape(-1), index.reshape(-1), experts)
    # Narrow keys take fewer passes of the radix sort.
    keys, order = flat.to(torch.uint8 if experts < 256 else torch.int32).sort(stable=True)
    names = torch.arange(experts, device=index.device, dtype=keys.dtype)
    ends = torch.searchsorted(keys, names, right=True, out_int32=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(T * k, device=index.device))
    if used is not None:
        place = torch.where(used.reshape(-1), place, -1)
        order = order[: int(ends[-1])]
    return Sorted(order // k, order, place.view(T, k), ends)


def spread(x: Tensor, pairs: Sorted) -> Tensor:
    """Rows of the sorted pairs, (T, C) -> (S, C)."""
    return _Spread.apply(x, pairs.token, pairs.place)


def gather_sum(rows: Tensor, pairs: Sorted) -> Tensor:
    """Sum of each token's rows, (S, C) -> (T, C)."""
    return _GatherSum.apply(rows, pairs.token, pairs.place)


def swiglu(up: Tensor, weight: Tensor | None = None) -> Tensor:
    """silu(up[..., :I]) · up[..., I:], times `weight` (S,) of each row: (S, 2I) -> (S, I)."""
    if kernels_work(up):
        return _SwiGLU.apply(up, weight)
    gate, value = up.chunk(2, dim=-1)
    made = F.silu(gate) * value
    return made if weight is None else made * weight[:, None]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.place = place
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _summed(grad, ctx.place), None, None


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.token = token
        return _summed(rows, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.token), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up: Tensor, weight: Tensor | None) -> Tensor:
        up = up.contiguous()
        ctx.save_for_backward(up, weight)
        return _swiglu_forward(up, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return _swiglu_backward(grad.contiguous(), *ctx.saved_tensors)


# -- launches ----------------------------------------------------------------------------------------------------------


def kernels_work(x: Tensor) -> bool:
    """Do the kernels run on this tensor? On CUDA, and in Triton's interpreter."""
    known = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return known and (x.is_cuda or interpreting()) and _installed()


@cache
def _installed() -> bool:
    return triton_available()


def _summed(rows: Tensor, place: Tensor) -> Tensor:
    T, k = place.shape
    if not kernels_work(rows):
        if not len(rows):
            return rows.new_zeros(T, rows.shape[-1])
        parts = [rows.index_select(0, slot.clamp(min=0)) for slot in place.unbind(1)]
        if bool((place < 0).any()):
            parts = [
                part.masked_fill_((slot < 0)[:, None], 0) for part, slot in zip(parts, place.unbind(1), strict=True)
            ]
        for part in parts[1:]:
            parts[0] += part
        return parts[0]
    from headwise.route import _permute_kernels as kernels

    rows, C = rows.contiguous(), rows.shape[-1]
    out = torch.empty(T, C, dtype=rows.dtype, device=rows.device)
    block = min(1024, _power(C))
    kernels.gather_sum[(T, -(-C // block))](rows, place, out, C, SLOTS=k, BLOCK=block)
    return out


def _swiglu_forward(up: Tensor, weight: Tensor | None) -> Tensor:
    from headwise.route import _permute_kernels as kernels

    S, size = up.shape[0], up.shape[1] // 2
    out = torch.empty(S, size, dtype=up.dtype, device=up.device)
    block = min(1024, _power(size))
    if S:
        kernels.swiglu_forward[(S, -(-size // block))](up, weight, out, size, WEIGHED=weight is not None, BLOCK=block)
    return out


def _swiglu_backward(grad: Tensor, up: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    from headwise.route import _permute_kernels as kernels

    S, size = grad.shape
    grad_up, grad_weight = torch.empty_like(up), None if weight is None else torch.empty_like(weight)
    if S:
        kernels.swiglu_backward[(S,)](
            grad, up, weight, grad_up, grad_weight, size, WEIGHED=weight is not None, BLOCK=min(2048, _power(size))
        )
    return grad_up, grad_weight


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
