"""Host side of the Hopper (compute capability 9) Gluon kernels: descriptors, launch settings, scratch buffers."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from headwise.attention.triton import _host

TILE_ROWS = 128  # rows of a forward tile
ROWS = 64  # rows of a backward step
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
        BS=KEYS, BN=KEYS, D=D, STAGES=2, BLOCKS=False, ENTRIES=32, num_warps=4, **call.flags(gate),
    )  # fmt: skip
    return out, raw, lse


def blocks_forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, block_size: int, causal: bool, scale: float):
    """Same as ``blocks.portable_forward``: rows of a tile are the queries of a block in 128 // block_size heads of a group."""
    from headwise.attention.triton import _hopper_fwd as kernels

    B, H, N, D = q.shape
    K, M = k.shape[1], k.shape[2]
    query_blocks, entries = index.shape[2:]
    head_tiles = -(-(H // K) // (TILE_ROWS // block_size))
    k, v = _host.tma_ready(k), _host.tma_ready(v)
    out = torch.empty(B, H, N, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, N, dtype=torch.float32, device=q.device)
    units = B * K * head_tiles
    kernels.attend_fwd[(query_blocks * units,)](
        q, descriptor(k, block_size), descriptor(v, block_size), None, out, out, lse, None, None, None, None, None, index,
        *q.stride()[:3], 0, 0, 0, scale * _host.LOG2E, H, H // K, N, M, units, entries, head_tiles,
        BS=block_size, BN=KEYS, D=D, STAGES=2, ROUTED=False, SPANS=False, CAUSAL=causal, GATED=False, STARTED=False,
        BLOCKS=True, ENTRIES=max(128, 1 << (entries - 1).bit_length()), num_warps=4,
    )  # fmt: skip
    return out, lse


def zero_unserved(rank: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """Write 0 (and lse -inf) at every query that no head serves; reads only the ranks."""
    from headwise.attention.triton import _kernels_rows as kernels

    B, H, N, D = out.shape
    kernels.zero_rows[(-(-N // 64), B * H)](rank, out, lse, N, D=D, BM=64, HAS_LSE=lse is not None, num_warps=4)


def flat_descriptor(x: Tensor, box: list[int], swizzle: int):
    """TMA descriptor of a contiguous 2-D float32 buffer."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=32, rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


def pack(q, gate, raw, lse, d_out, d_lse, call):
    """Row tiles for the backward: q and dO as TMA sources, statistics (B*H*T, 128), zeroed dq sums, gradient of the gate."""
    from headwise.attention.triton import _kernels_pack as kernels
    from headwise.attention.triton._rows import gate_strides

    B, H, N, D = q.shape
    tiles, routed = -(-N // ROWS), call.rows is not None
    stats = torch.empty(B * H * tiles, 2 * ROWS, dtype=torch.float32, device=q.device)
    dq_sum = torch.empty(B * H * tiles * ROWS, D, dtype=torch.float32, device=q.device)
    d_gate = None if gate is None else torch.empty(B, H, N, dtype=torch.float32, device=q.device)
    if routed:
        pack_q, pack_do = torch.empty(2, B, H, tiles * ROWS, D, dtype=q.dtype, device=q.device)
    else:
        pack_q, pack_do = _host.tma_ready(q), _host.tma_ready(d_out)
    kernels.pack_rows[(tiles, B * H)](
        q, d_out, raw, gate, lse, d_lse, call.rows, call.rank, pack_q, pack_do, stats, dq_sum, d_gate,
        *q.stride()[:3], *d_out.stride()[:3], *gate_strides(gate), H, N,
        D=D, BM=ROWS, ROUTED=routed, GATED=gate is not None, HAS_DLSE=d_lse is not None, num_warps=4,
    )  # fmt: skip
    return pack_q, pack_do, stats, dq_sum, d_gate


def rows_backward(q, k, v, gate, raw, lse, d_out, d_lse, call):
    """Same as ``_rows.portable_backward`` with five products a tile; the order of the sums in dq is not fixed."""
    from headwise.attention.triton import _hopper_bwd as kernels
    from headwise.attention.triton import _kernels_pack as packing

    B, H, N, D = q.shape
    K, M = k.shape[1], k.shape[2]
    k, v = _host.tma_ready(k), _host.tma_ready(v)
    pack_q, pack_do, stats, dq_sum, d_gate = pack(q, gate, raw, lse, d_out, d_lse, call)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    tiles = -(-N // ROWS)
    flags = {name: on for name, on in call.flags(gate).items() if name != "GATED"}
    kernels.attend_bwd[(-(-M // KEYS) * B * K,)](
        descriptor(k, KEYS), descriptor(v, KEYS), descriptor(pack_q, ROWS), descriptor(pack_do, ROWS),
        flat_descriptor(stats, [1, 2 * ROWS], 0), flat_descriptor(dq_sum, [ROWS, PANEL], 128),
        dk, dv, call.rows, call.rank, call.sinks, call.windows, call.key_start,
        call.scale, call.scale * _host.LOG2E, H, H // K, N, M, tiles, B * K, D=D, num_warps=4, **flags,
    )  # fmt: skip
    packing.unpack_dq[(tiles, B * H)](
        dq_sum, dq, call.rows, call.rank, call.scale, H, N, D=D, BM=ROWS, ROUTED=call.rows is not None, num_warps=4
    )
    return dq, dk, dv, None if gate is None else d_gate.to(gate.dtype)


def has_backward(q: Tensor) -> bool:
    """True when the Hopper backward takes these inputs (HEADWISE_PORTABLE_BACKWARD=1 switches it off)."""
    return os.environ.get("HEADWISE_PORTABLE_BACKWARD", "0") != "1"
