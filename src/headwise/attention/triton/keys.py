"""Selected-key attention: every query reads its own list of keys or key blocks (dynamic masks, per-query MoBA, LongHeads)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headwise.attention.triton import _host


def key_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_index: Tensor,
    *,
    key_block: int = 1,
    first: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which query i of kv head h reads the keys ``key_index[b,h,i]``.

    Args:
        q: (B,H,N,D); k, v: (B,K,M,D); query i has position i + M - N.
        key_index: (B,K,N,E) int32: numbers of keys, or of blocks of `key_block` keys, without repeats, -1 = none.
        key_block: keys of one entry, a power of two up to 128.
        first: (B,N) int32, packed sequences: query i reads no key before ``first[b,i]``, where its own sequence begins.
        causal: only keys at positions up to the query's.
        return_lse: also return the log-sum-exp (B,H,N), natural units, differentiable.

    Returns:
        (B,H,N,D); a query that reads no key gives 0 and lse -inf.

    Limits: gathered keys are loaded once per (query, kv head), so time follows N · E · key_block · K and GQA shares the
    loads; a list entry outside of the keys is undefined. dk and dv are sums of float32 atomics: not bitwise repeatable.
    """
    _host.require_triton()
    B, _, K, N, M, D = _host.check_qkv(q, k, v)
    if key_block not in (1, 2, 4, 8, 16, 32, 64, 128):
        raise ValueError(f"key_block must be a power of two up to 128, got {key_block}")
    if key_index.dim() != 4 or key_index.shape[:3] != (B, K, N) or key_index.dtype != torch.int32:
        raise ValueError(
            f"key_index must be int32 (B,K,N,E) = ({B}, {K}, {N}, E), got {key_index.dtype} {tuple(key_index.shape)}"
        )
    if first is not None and (first.shape != (B, N) or first.dtype != torch.int32):
        raise ValueError(f"first must be int32 (B,N) = {(B, N)}, got {first.dtype} {tuple(first.shape)}")
    first = None if first is None else first.contiguous()
    options = (key_index.contiguous(), first, key_block, causal, _host.softmax_scale(scale, D), return_lse)
    out, lse = _Keys.apply(q, k, v, *options)
    return (out, lse) if return_lse else out


class _Keys(torch.autograd.Function):
    """(q, k, v) -> (out, lse)."""

    @staticmethod
    def forward(ctx, q, k, v, index, first, key_block, causal, scale, want_lse_grad):
        from headwise.attention.triton import _kernels_keys as kernels

        q, k, v = (_host.last_dim_contiguous(x) for x in (q, k, v))
        (B, H, N, D), K = q.shape, k.shape[1]
        out = torch.empty(B, H, N, D, dtype=q.dtype, device=q.device)
        lse = torch.empty(B, H, N, dtype=torch.float32, device=q.device)
        if out.numel():
            kernels.keys_fwd[(B * K * N,)](
                q, k, v, index, index if first is None else first, out, lse,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], scale * _host.LOG2E,
                K, H // K, N, k.shape[2], index.shape[3], **_consts(q, K, key_block, causal, first),
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, index, first)
        ctx.options = (key_block, causal, scale, want_lse_grad)
        if not want_lse_grad:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse):
        from headwise.attention.triton import _kernels_keys as kernels

        q, k, v, out, lse, index, first = ctx.saved_tensors
        key_block, causal, scale, want_lse_grad = ctx.options
        d_out = _host.last_dim_contiguous(d_out)
        delta = (d_out.float() * out.float()).sum(-1)  # (B,H,N): what the softmax takes back from every dp
        delta = delta - d_lse.float() if want_lse_grad else delta
        (B, _, N, _), (K, M) = q.shape, k.shape[1:3]
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
        if dq.numel():
            kernels.keys_bwd[(B * K * N,)](
                q, k, v, d_out, index, index if first is None else first, lse, delta.contiguous(), dq, dk, dv,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3], scale,
                K, q.shape[1] // K, N, M, index.shape[3], **_consts(q, K, key_block, causal, first),
            )  # fmt: skip
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None, None


def _consts(q: Tensor, K: int, key_block: int, causal: bool, first: Tensor | None) -> dict:
    """Compile-time constants: the tile of a query's heads and gathered keys."""
    G, D = q.shape[1] // K, q.shape[3]
    narrow = q.dtype == torch.float32 or D > 128 or _host.interpreting()
    return dict(
        D=D,
        BD=_host.pad_head_dim(D),
        BS=key_block,
        BG=max(16, 1 << (G - 1).bit_length()),
        BN=32 if narrow else 64,
        CAUSAL=causal,
        PACKED=first is not None,
        PRECISION=_host.dot_precision(q.dtype),
        num_warps=4,
        num_stages=1 if narrow else 3,
    )
