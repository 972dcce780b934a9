"""Host side of the row kernels: one autograd function that ``routed_attention`` and ``span_attention`` share.

B batch, H query heads, K kv heads, N queries, M keys, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headwise.attention.triton import _host


@dataclass(frozen=True)
class RowsCall:
    """What each tile reads: device tensors (None = not used) and the constants of the call."""

    scale: float
    causal: bool = True
    rows: Tensor | None = None  # (B,H,N) int32: served queries ascending, then the others
    rank: Tensor | None = None  # (B,H,N+1) int32: served queries before i
    sinks: Tensor | None = None  # (K,) int32
    windows: Tensor | None = None  # (K,) int32
    key_start: Tensor | None = None  # (B,) int32
    want_lse_grad: bool = False
    deterministic: bool = False

    def flags(self, gate: Tensor | None) -> dict[str, bool]:
        """Compile-time switches of the portable kernels."""
        return dict(
            ROUTED=self.rows is not None,
            SPANS=self.windows is not None,
            CAUSAL=self.causal,
            GATED=gate is not None,
            STARTED=self.key_start is not None,
        )


def build_rows(active: Tensor) -> tuple[Tensor, Tensor]:
    """Active (B,H,N) bool -> rows (B,H,N) int32 and rank (B,H,N+1) int32, on the device, without a host sync."""
    _host.require_triton()
    from headwise.attention.triton import _kernels_rows as kernels

    B, H, N = active.shape
    source = active.view(torch.uint8) if active.dtype == torch.bool else (active != 0).view(torch.uint8)
    rows = torch.empty(B, H, N, dtype=torch.int32, device=active.device)
    rank = torch.empty(B, H, N + 1, dtype=torch.int32, device=active.device)
    chunk = 64 if _host.interpreting() else min(8192, max(128, 1 << (N - 1).bit_length()))
    kernels.build_rows[(B * H,)](source, rows, rank, *source.stride(), H, N, CHUNK=chunk, num_warps=8)
    return rows, rank


def check_key_start(key_start: Tensor | None, B: int) -> Tensor | None:
    """Validate key_start (B,) and give it as contiguous int32."""
    if key_start is None:
        return None
    if key_start.shape != (B,):
        raise ValueError(f"key_start must have shape ({B},), got {tuple(key_start.shape)}")
    return key_start.to(torch.int32).contiguous()


def gate_strides(gate: Tensor | None) -> tuple[int, int, int]:
    """Strides of the gate, zeros when there is none."""
    if gate is None:
        return 0, 0, 0
    B, H, N = gate.stride()
    return B, H, N


class _Rows(torch.autograd.Function):
    """(q, k, v, gate) -> (out, lse); see the public functions for shapes."""

    @staticmethod
    def forward(ctx, q, k, v, gate, call: RowsCall):
        q, k, v = (_host.last_dim_contiguous(x) for x in (q, k, v))
        out, raw, lse = rows_forward(q, k, v, gate, call)
        ctx.call = call
        ctx.save_for_backward(q, k, v, gate, raw, lse)
        if not call.want_lse_grad:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse):
        q, k, v, gate, raw, lse = ctx.saved_tensors
        d_lse = d_lse.contiguous() if ctx.call.want_lse_grad else None
        d_out = _host.last_dim_contiguous(d_out)
        if not ctx.call.deterministic and use_hopper(q):
            from headwise.attention.triton import _hopper

            if _hopper.has_backward(q):
                return (*_hopper.rows_backward(q, k, v, gate, raw, lse, d_out, d_lse, ctx.call), None)
        return (*portable_backward(q, k, v, gate, raw, lse, d_out, d_lse, ctx.call), None)


def use_hopper(q: Tensor) -> bool:
    """The Gluon kernels take 16-bit inputs with head dims 64 and 128 on compute capability 9."""
    return _host.hopper(q) and q.dtype != torch.float32 and q.shape[-1] in (64, 128) and _host.gluon_ready()


def rows_forward(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, call: RowsCall) -> tuple[Tensor, Tensor, Tensor]:
    """Out, ungated out, lse by the kernel for this device; the last dims of q, k, v are contiguous."""
    if use_hopper(q):
        from headwise.attention.triton import _hopper

        return _hopper.rows_forward(q, k, v, gate, call)
    return portable_forward(q, k, v, gate, call)


def portable_forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, call: RowsCall
) -> tuple[Tensor, Tensor, Tensor]:
    """Out and raw (ungated) (B,H,N,D), lse (B,H,N); raw is out when there is no gate."""
    from headwise.attention.triton import _kernels_rows as kernels

    B, H, N, D = q.shape
    M, G = k.shape[2], H // k.shape[1]
    out = torch.empty(B, H, N, D, dtype=q.dtype, device=q.device)
    raw = torch.empty_like(out) if gate is not None else out
    lse = torch.empty(B, H, N, dtype=torch.float32, device=q.device)
    tiles = _host.forward_tiles(D, q.dtype)
    grid = (-(-N // tiles["BM"]) * B * H,)
    kernels.rows_fwd[grid](
        q, k, v, gate, out, raw, lse, call.rows, call.rank, call.sinks, call.windows, call.key_start,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *gate_strides(gate),
        call.scale * _host.LOG2E, H, G, N, M, B * H,
        D=D, BD=_host.pad_head_dim(D), PRECISION=_host.dot_precision(q.dtype), **call.flags(gate), **tiles,
    )  # fmt: skip
    return out, raw, lse


def row_delta(gate, raw, d_out, d_lse, call: RowsCall) -> tuple[Tensor, Tensor | None]:
    """delta (B,H,N) = gate * <d_out, raw> - d_lse, and the gradient of the gate; 0 at queries that are not served."""
    from headwise.attention.triton import _kernels_rows_bwd as kernels

    B, H, N, D = raw.shape
    delta = torch.empty(B, H, N, dtype=torch.float32, device=raw.device)
    d_gate = torch.empty_like(delta) if gate is not None else None
    rows_per = 64
    kernels.rows_delta[(-(-N // rows_per), B * H)](
        raw, d_out, d_lse, gate, call.rank, delta, d_gate, *d_out.stride()[:3], *gate_strides(gate), H, N,
        D=D, BD=_host.pad_head_dim(D), BM=rows_per, ROUTED=call.rows is not None, GATED=gate is not None,
        HAS_DLSE=d_lse is not None,
    )  # fmt: skip
    return delta, d_gate


def portable_backward(q, k, v, gate, raw, lse, d_out, d_lse, call: RowsCall):
    """Gradients (dq, dk, dv, dgate) by two deterministic kernels: no atomics, seven matrix products per tile."""
    from headwise.attention.triton import _kernels_rows_bwd as kernels

    B, H, N, D = q.shape
    K, M = k.shape[1], k.shape[2]
    delta, d_gate = row_delta(gate, raw, d_out, d_lse, call)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3], *gate_strides(gate))
    tables = (call.rows, call.rank, call.sinks, call.windows, call.key_start)
    consts = dict(D=D, BD=_host.pad_head_dim(D), PRECISION=_host.dot_precision(q.dtype), **call.flags(gate))
    tiles = _host.forward_tiles(D, q.dtype)
    tiles = tiles if D > 128 or q.dtype == torch.float32 else tiles | dict(num_stages=2)
    kernels.rows_dq[(-(-N // tiles["BM"]) * B * H,)](
        q, k, v, d_out, gate, lse, delta, dq, *tables, *strides, call.scale, H, H // K, N, M, B * H, **consts, **tiles,
    )  # fmt: skip
    tiles = _host.backward_tiles(D, q.dtype)
    kernels.rows_dkv[(-(-M // tiles["BN"]) * B * K,)](
        q, k, v, d_out, gate, lse, delta, dk, dv, *tables, *strides, call.scale, H, H // K, N, M, B * K, **consts, **tiles,
    )  # fmt: skip
    return dq, dk, dv, d_gate.to(gate.dtype) if gate is not None and d_gate is not None else None


def rows_attention(q, k, v, gate, call: RowsCall, return_lse: bool):
    """Run the kernel, through autograd only where a gradient can be asked for; drop lse unless it was asked for."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, gate)):
        out, lse = _Rows.apply(q, k, v, gate, replace(call, want_lse_grad=return_lse))
    else:
        q, k, v = (_host.last_dim_contiguous(x) for x in (q, k, v))
        out, _, lse = rows_forward(q, k, v, gate, call)
    return (out, lse) if return_lse else out
