"""Checks and launch settings shared by the Triton kernels; nothing here imports Triton at module level."""

from __future__ import annotations

import logging
import math
import os
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
LOG2E = 1.4426950408889634
MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def triton_available() -> bool:
    """True when Triton can be imported (it is an optional dependency)."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def require_triton() -> None:
    """Raise a sentence that says what is missing when Triton is not installed."""
    if not triton_available():
        raise ImportError(
            "headwise.attention.triton needs the package 'triton' (it comes with CUDA builds of torch); "
            "use the reference or sdpa backend instead"
        )


def interpreting() -> bool:
    """True when kernels run in Triton's CPU interpreter (``TRITON_INTERPRET=1`` set before the first import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int, int, int]:
    """Validate q (B,H,N,D), k and v (B,K,M,D); return (B, H, K, N, M, D)."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v must be 4-D (B,H,N,D); got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    B, H, N, D = q.shape
    Bk, K, M, Dk = k.shape
    if k.shape != v.shape or Bk != B or Dk != D:
        raise ValueError(f"k and v must be (B,K,M,D) with q's B and D; got {tuple(k.shape)} and {tuple(v.shape)}")
    if K == 0 or H % K:
        raise ValueError(f"query heads ({H}) must be a multiple of kv heads ({K})")
    if D > MAX_HEAD_DIM or D % 16:
        raise ValueError(f"head dim must be a multiple of 16 and at most {MAX_HEAD_DIM}, got {D}")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v must share one of float16, bfloat16, float32; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.is_cuda or interpreting()):
        raise ValueError(f"the Triton kernels need CUDA tensors, got {q.device}")
    return B, H, K, N, M, D


def last_dim_contiguous(x: Tensor) -> Tensor:
    """Return x with stride 1 in its last dim; every other dim may keep any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tma_ready(x: Tensor) -> Tensor:
    """Return x in a form that a TMA descriptor accepts: 16-byte aligned base and strides, last stride 1."""
    bytes_per = x.element_size()
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    fits = fits and all(s > 0 and (s * bytes_per) % 16 == 0 for s in x.stride()[:-1])
    return x if fits else x.contiguous()


def softmax_scale(scale: float | None, D: int) -> float:
    """The given scale, or 1/sqrt(D)."""
    scale = 1.0 / math.sqrt(D) if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return scale


@cache
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device, read once."""
    return torch.cuda.get_device_capability(index)


@cache
def multiprocessors(index: int | None) -> int:
    """Number of multiprocessors of a CUDA device, read once."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def hopper(x: Tensor) -> bool:
    """True when x lives on a compute-capability-9 device, where the Gluon kernels run."""
    return x.is_cuda and not interpreting() and capability(x.device.index)[0] == 9


@cache
def gluon_ready() -> bool:
    """True when this Triton has what the Gluon kernels import (written for and measured with 3.6); notes it once if not."""
    try:
        from headwise.attention.triton import _hopper_bwd, _hopper_fwd  # noqa: F401
    except (ImportError, AttributeError) as error:
        logger.warning("Gluon kernels are off (%s); the slower portable Triton kernels run instead", error)
        return False
    return True


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products run in full precision (slow, exact); 16-bit inputs ignore this."""
    return "ieee" if dtype == torch.float32 else "tf32"


def pad_head_dim(D: int) -> int:
    """Smallest power of two >= D (and >= 16): tile width of the head dim."""
    return max(16, 1 << (D - 1).bit_length())


def forward_tiles(D: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes of the portable forward and dq kernels."""
    if interpreting():
        return dict(BM=32, BN=32, num_warps=4, num_stages=1)
    if dtype == torch.float32:
        return dict(BM=32, BN=32, num_warps=4, num_stages=1)
    if D > 128:
        return dict(BM=64, BN=64, num_warps=4, num_stages=2)
    return dict(BM=128, BN=64, num_warps=8, num_stages=3)


def backward_tiles(D: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes of the portable dk/dv kernel."""
    if interpreting() or dtype == torch.float32 or D > 128:
        return dict(BM=32, BN=32 if D <= 128 else 64, num_warps=4, num_stages=1)
    return dict(BM=64, BN=128, num_warps=8, num_stages=2)
