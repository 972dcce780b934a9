"""Host side of the Hopper (compute capability 9) Gluon kernels: descriptors, launch settings, scratch buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.attention.triton import _host

TILE_ROWS = 128
KEYS = 128  # keys of a pipeline stage
PANEL = 64  # columns of a shared-memory panel: 128 bytes, one swizzle row


def descriptor(x: Tensor, rows: int):
    """TMA descriptor of a (B,K,M,D) 16-bit tensor: boxes of `rows` tokens and 64 columns; outside M it reads zeros."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, PANEL], layout)


def rows_forward(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, call) -> tuple[Tensor, Tensor, Tensor]:
    """Same as ``_rows.portable_forward``."""
    from headwise.attention.triton import _hopper_fwd as kernels
    from headwise.attention.triton._rows import gate_strides

    B, H, N, D = q.shape
    M, G = k.shape[2], H // k.shape[1]
    k, v = _host.tma_ready(k), _host.tma_ready(v)
    out = torch.empty(B, H, N, D, dtype=q.dtype, device=q.device)
    raw = torch.empty_like(out) if gate is not None else out
    lse = torch.empty(B, H, N, dtype=torch.float32, device=q.device)
    if call.rows is not None:
        zero_unserved(call.rank, out, lse)
    kernels.attend_fwd[(-(-N // TILE_ROWS) * B * H,)](
        q, descriptor(k, KEYS), descriptor(v, KEYS), gate, out, raw, lse,
        call.rows, call.rank, call.sinks, call.windows, call.key_start, None,
        *q.stride()[:3], *gate_strides(gate), call.scale * _host.LOG2E, H, G, N, M, B * H, 0, 0,
        BS=KEYS, BN=KEYS, D=D, STAGES=2, BLOCKS=False, num_warps=4, **call.flags(gate),
    )  # fmt: skip
    return out, raw, lse


def zero_unserved(rank: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """Write 0 (and lse -inf) at every query that no head serves; reads only the ranks."""
    from headwise.attention.triton import _kernels_rows as kernels

    B, H, N, D = out.shape
    kernels.zero_rows[(-(-N // 64), B * H)](rank, out, lse, N, D=D, BM=64, HAS_LSE=lse is not None, num_warps=4)


def has_backward(q: Tensor) -> bool:
    """True when the Hopper backward takes these inputs."""
    return False
