"""Selected-block attention: every query block reads its own list of key blocks (MoBA, LongHeads, selected keys)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headwise.attention.triton import _host, _rows

BLOCK_SIZES = (16, 32, 64, 128)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    *,
    block_size: int,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which query block c of kv head h reads the key blocks ``block_index[b,h,c]``.

    Args:
        q: (B,H,N,D); k, v: (B,K,M,D); query i has position i + M - N.
        block_index: (B,K,C,E) int32, C = ceil(N / block_size) query blocks, E entries each: numbers of key blocks in any
            order without repeats, -1 = none (best at the end of the list: trailing -1 cost nothing on Hopper).
        block_size: 16, 32, 64 or 128 tokens, for queries (counted from query 0) and keys (from key 0).
        causal: inside the chosen blocks, only keys at positions up to the query's.
        return_lse: also return the log-sum-exp (B,H,N), natural units, differentiable.

    Returns:
        (B,H,N,D); a query whose blocks hold no visible key gives 0 and lse -inf.

    Limits: one selection per kv head (all query heads of the group share it); a list entry outside the keys is undefined.
    The backward sorts the lists on the device; it is deterministic.
    """
    _host.require_triton()
    B, H, K, N, M, D = _host.check_qkv(q, k, v)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    C = -(-N // block_size)
    if block_index.dim() != 4 or block_index.shape[:3] != (B, K, C) or block_index.dtype != torch.int32:
        raise ValueError(
            f"block_index must be int32 (B,K,C,E) = ({B}, {K}, {C}, E), got {block_index.dtype} {tuple(block_index.shape)}"
        )
    options = (block_index.contiguous(), block_size, causal, _host.softmax_scale(scale, D), return_lse)
    out, lse = _Blocks.apply(q, k, v, *options)
    return (out, lse) if return_lse else out


class _Blocks(torch.autograd.Function):
    """(q, k, v) -> (out, lse)."""

    @staticmethod
    def forward(ctx, q, k, v, index, block_size, causal, scale, want_lse_grad):
        q, k, v = (_host.last_dim_contiguous(x) for x in (q, k, v))
        if _rows.use_hopper(q):
            from headwise.attention.triton import _hopper

            out, lse = _hopper.blocks_forward(q, k, v, index, block_size, causal, scale)
        else:
            out, lse = portable_forward(q, k, v, index, block_size, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse, index)
        ctx.options = (block_size, causal, scale, want_lse_grad)
        if not want_lse_grad:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse):
        q, k, v, out, lse, index = ctx.saved_tensors
        block_size, causal, scale, want_lse_grad = ctx.options
        d_lse = d_lse.contiguous() if want_lse_grad else None
        grads = portable_backward(
            q, k, v, out, lse, _host.last_dim_contiguous(d_out), d_lse, index, block_size, causal, scale
        )
        return (*grads, None, None, None, None, None)


def head_tile(G: int, block_size: int, D: int, dtype: torch.dtype, rows: int) -> tuple[int, int]:
    """(BM, head tiles of a group): about `rows` rows a tile, at least 16, not more than the group has."""
    rows = 32 if dtype == torch.float32 or D > 128 or _host.interpreting() else rows
    group = 1 << (G - 1).bit_length()
    BM = max(16, block_size, min(rows, group * block_size))
    return BM, -(-G // (BM // block_size))


def _consts(D: int, block_size: int, BM: int, causal: bool, dtype: torch.dtype) -> dict:
    """Compile-time constants of the portable kernels."""
    return dict(
        D=D,
        BD=_host.pad_head_dim(D),
        BS=block_size,
        BM=BM,
        CAUSAL=causal,
        PRECISION=_host.dot_precision(dtype),
        num_warps=8 if BM >= 128 else 4,
        num_stages=2 if D <= 128 and dtype != torch.float32 else 1,
    )


def portable_forward(q, k, v, index, block_size: int, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out (B,H,N,D) and lse (B,H,N)."""
    from headwise.attention.triton import _kernels_blocks as kernels

    B, H, N, D = q.shape
    K, M = k.shape[1], k.shape[2]
    C, entries = index.shape[2:]
    out = torch.empty(B, H, N, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, N, dtype=torch.float32, device=q.device)
    BM, tiles_g = head_tile(H // K, block_size, D, q.dtype, 128)
    units = B * K * tiles_g
    kernels.blocks_fwd[(C * units,)](
        q, k, v, index, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], scale * _host.LOG2E,
        H, H // K, N, M, C, entries, units, tiles_g, **_consts(D, block_size, BM, causal, q.dtype),
    )  # fmt: skip
    return out, lse


def inverse_lists(index: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """For each key block the flat places (query block * E + entry) that name it: order (B,K,C*E), starts (B,K,blocks+1)."""
    flat = index.flatten(2)
    keyed = torch.where(flat < 0, blocks, flat)
    ordered, order = torch.sort(keyed, dim=-1, stable=True)
    wanted = torch.arange(blocks + 1, device=index.device, dtype=torch.int32).expand(*index.shape[:2], -1).contiguous()
    return order, torch.searchsorted(ordered, wanted, out_int32=True)


def portable_backward(q, k, v, out, lse, d_out, d_lse, index, block_size: int, causal: bool, scale: float):
    """Gradients (dq, dk, dv): dq over the lists, dk and dv over the inverse lists; no atomics."""
    from headwise.attention.triton import _kernels_blocks as kernels

    B, H, N, D = q.shape
    K, M = k.shape[1], k.shape[2]
    C, entries = index.shape[2:]
    blocks = -(-M // block_size)
    delta, _ = _rows.row_delta(None, out, d_out, d_lse, _rows.RowsCall(scale=scale))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3])
    BM, tiles_g = head_tile(H // K, block_size, D, q.dtype, 128)
    units = B * K * tiles_g
    kernels.blocks_dq[(C * units,)](
        q, k, v, d_out, index, lse, delta, dq, *strides, scale, H, H // K, N, M, C, entries, units, tiles_g,
        **_consts(D, block_size, BM, causal, q.dtype),
    )  # fmt: skip
    order, starts = inverse_lists(index, blocks)
    BM, tiles_g = head_tile(H // K, block_size, D, q.dtype, 64)
    kernels.blocks_dkv[(blocks * B * K,)](
        q, k, v, d_out, order, starts, lse, delta, dk, dv, *strides, scale, H, H // K, N, M, C, entries, B * K, blocks,
        tiles_g, **_consts(D, block_size, BM, causal, q.dtype),
    )  # fmt: skip
    return dq, dk, dv
