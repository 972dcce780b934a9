"""LongHeads' attention by one kernel on CUDA; `_longheads.py` has the same in torch, with gradients.

Work follows the chunks that any query of a tile selected: neighbours that select alike share keys, as in flash attention.

Letters: as in `_longheads`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from headwise.attention.triton._host import interpreting, triton_available
from headwise.budget._longheads_rotary import Rotation

HALVES = (16, 32, 64, 128)  # pairs of a head that a tile can hold


def works(q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> bool:
    """Can the kernel do this? Whole heads of 32 to 256 dims that rotate, without gradients, on CUDA or in Triton's interpreter."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    known = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float32, torch.float16, torch.bfloat16)
    half = len(rotation.frequencies)
    sizes = half in HALVES and q.shape[-1] == 2 * half and v.shape[-1] in (32, 64, 128, 256)
    return known and sizes and not wanted and (q.is_cuda or interpreting()) and _installed()


@functools.cache
def _installed() -> bool:
    return triton_available()


def by_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    positions: Tensor,
    starts: tuple[int, ...] | None,
    *,
    w: int,
    kept: int,
    scale: float,
    rotation: Rotation,
    own: bool,
) -> Tensor:
    """Attention of q (B, H, N, D) over the chosen chunks (B, K, S, N, C) bool of k, v (B, K, M, D); (B, H, N, Dv) in q's dtype."""
    from headwise.budget import _longheads_kernels as kernels

    (B, H, N, D), (K, M), (S, C) = q.shape, k.shape[1:3], (chosen.shape[2], chosen.shape[4])
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(B, H, N, v.shape[-1], dtype=q.dtype, device=q.device)
    cos, sin = _tables(rotation, C, w, kept, q.device)
    first = None if starts is None else torch.tensor(starts, device=q.device)
    wide = q.dtype == torch.float32
    BM, BN = 16 if N <= 16 else 64, 32 if wide or D > 128 else 64
    kernels.attend_chunks[(-(-N // BM), B * H)](
        q, k, v, chosen.contiguous().view(torch.uint8), positions.to(torch.int32).expand(B, N).contiguous(), first,
        cos, sin, out, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], H, K, S, N, M, C, w, kept, scale,
        G=H // K, HALF=D // 2, DV=v.shape[-1], BM=BM, BN=BN, PAIRS=rotation.interleaved, OWN=own, PADDED=first is not None,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=64)
def _tables(rotation: Rotation, C: int, w: int, kept: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (C + kept, D/2) of turns by -C · w … (kept - 1) · w positions, in float32 as `Rotation.turn` has them."""
    steps = (torch.arange(-C, kept, device=device) * w).to(torch.float32)
    angle = steps[:, None] * rotation.frequencies.to(device)
    return angle.cos(), angle.sin()
