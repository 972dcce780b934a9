"""Head outputs times their gates, g·O: one pass forward and one backward where our kernels run.

Composed of torch operations it is a cast and a product forward, and two products, a sum over D and a cast backward, each of them a
pass over the head outputs. The kernels round as those do; ∂/∂g is summed in float32.

Letters: B batch, N queries, H heads, D head dim, R rows of all three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headwise.attention.triton import _host


def gated(out: Tensor, gates: Tensor) -> Tensor:
    """out (B, N, H, D) times gates (B, N, H), in the dtype of `out`.

    >>> gated(torch.ones(1, 2, 2, 3), torch.tensor([[[1.0, 0.5], [0.0, 2.0]]]))[..., 0].tolist()
    [[[1.0, 0.5], [0.0, 2.0]]]
    """
    known = out.dtype in _host.DTYPES and (out.is_cuda or _host.interpreting()) and _host.triton_available()
    if not known or not out.numel():
        return out * gates[..., None].to(out.dtype)
    return _Gated.apply(out, gates)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, gates: Tensor) -> Tensor:
        from headwise.attention.triton import _kernels_gating as kernels

        out, gates = out.contiguous(), gates.contiguous()
        made = torch.empty_like(out)
        R, D, BR, DP = _sizes(out)
        kernels.multiply[(-(-R // BR),)](out, gates, made, R, D, BR=BR, DP=DP)
        ctx.save_for_backward(out, gates)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        from headwise.attention.triton import _kernels_gating as kernels

        out, gates = ctx.saved_tensors
        grad = grad.contiguous()
        grad_out, grad_gates = (
            torch.empty_like(t) if needed else None
            for t, needed in zip((out, gates), ctx.needs_input_grad, strict=True)
        )
        R, D, BR, DP = _sizes(out)
        kernels.gradients[(-(-R // BR),)](
            grad, out, gates, grad_out, grad_gates, R, D,
            BR=BR, DP=DP, OUT=grad_out is not None, GATES=grad_gates is not None,
        )  # fmt: skip
        return grad_out, grad_gates


def _sizes(out: Tensor) -> tuple[int, int, int, int]:
    D = out.shape[-1]
    DP = 1 << (D - 1).bit_length()
    return out.numel() // D, D, max(1, 4096 // DP), DP
