"""Span attention: causal attention in which each kv head reads its sinks and its window (DuoAttention, MoA, RazorAttention)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from headwise.attention.triton import _host, _rows

Spans = Tensor | Sequence[int]


def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Spans,
    windows: Spans,
    *,
    scale: float | None = None,
    key_start: Tensor | None = None,
    return_lse: bool = False,
    dense_full_heads: bool | None = None,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention in which kv head h reads key j of query position i when ``j < sinks[h]`` or ``i - j < windows[h]``.

    Args:
        q: (B,H,N,D); k, v: (B,K,M,D), M >= N, aligned at the last token (query i has position i + M - N).
        sinks, windows: (K,) ints. ``windows[h] >= M`` means that the head reads everything. Device tensors are never
            read back; sequences and CPU tensors let the host send full heads to the library's dense kernel.
        key_start: (B,) first real key of each row; sinks count from it.
        return_lse: also return the log-sum-exp (B,H,N), natural units, differentiable.
        dense_full_heads: True splits the work into library (full heads) and own kernel (the others), False does not;
            None splits only where the own kernel is the portable one, because the Hopper kernel is faster unsplit.
        deterministic: backward without atomics.

    Returns:
        (B,H,N,D), and (B,H,N) float32 when ``return_lse``.

    Limits: the split needs M == N, no key_start and no lse, because the library kernel aligns its mask at the first token.
    """
    _host.require_triton()
    B, H, K, N, M, D = _host.check_qkv(q, k, v)
    if M < N:
        raise ValueError(f"span attention is causal and needs M >= N, got M={M} < N={N}")
    scale = _host.softmax_scale(scale, D)
    if dense_full_heads is None:
        dense_full_heads = not _rows.use_hopper(q)
    full = _full_heads(windows, M) if dense_full_heads and not return_lse and key_start is None and M == N else None
    if full is not None and len(full) == K:
        return _dense(q, k, v, scale)
    if full:
        return _split(q, k, v, sinks, windows, full, scale, deterministic)
    call = _rows.RowsCall(
        scale=scale, sinks=_as_int32(sinks, K, q.device, "sinks"), windows=_as_int32(windows, K, q.device, "windows"),
        key_start=_rows.check_key_start(key_start, B), deterministic=deterministic,
    )  # fmt: skip
    return _rows.rows_attention(q, k, v, None, call, return_lse)


def _as_int32(spans: Spans, K: int, device: torch.device, name: str) -> Tensor:
    """(K,) int32 on the device."""
    shape = tuple(spans.shape) if isinstance(spans, Tensor) else (len(spans),)
    if shape != (K,):
        raise ValueError(f"{name} must have one entry per kv head ({K}), got shape {shape}")
    if isinstance(spans, Tensor):
        return spans.to(device, torch.int32, non_blocking=True)
    return _on_device(tuple(int(span) for span in spans), device)


@functools.lru_cache(maxsize=4096)
def _on_device(spans: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied there once: a CUDA graph may hold the call, and a layer asks for the same spans again and again."""
    with torch.inference_mode(False):
        return torch.tensor(spans, dtype=torch.int32, device=device)


def _full_heads(windows: Spans, M: int) -> list[int] | None:
    """Kv heads that read everything, or None when the windows live on the device."""
    if isinstance(windows, Tensor):
        if windows.device.type != "cpu" or _host.interpreting():
            return None
        windows = windows.tolist()
    return [h for h, window in enumerate(windows) if window >= M]


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal dense attention by the fastest library kernel that takes the inputs (cuDNN first on Hopper)."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _take(x: Tensor, heads: list[int], group: int) -> Tensor:
    """The query heads of the given kv heads: a view when they are neighbours, else one gather."""
    first, last = heads[0], heads[-1]
    if heads == list(range(first, last + 1)):
        return x[:, first * group : (last + 1) * group]
    index = torch.tensor([h * group + g for h in heads for g in range(group)]).to(x.device, non_blocking=True)
    return x.index_select(1, index)


def _split(q, k, v, sinks: Spans, windows: Spans, full: list[int], scale: float, deterministic: bool) -> Tensor:
    """Full heads by the library, the others by the own kernel, joined in head order."""
    K, group = k.shape[1], q.shape[1] // k.shape[1]
    rest = [h for h in range(K) if h not in set(full)]
    short = span_attention(
        _take(q, rest, group), _take(k, rest, 1), _take(v, rest, 1), [int(sinks[h]) for h in rest],
        [int(windows[h]) for h in rest], scale=scale, dense_full_heads=False, deterministic=deterministic,
    )  # fmt: skip
    assert isinstance(short, Tensor)
    dense = _dense(_take(q, full, group), _take(k, full, 1), _take(v, full, 1), scale)
    order = [h * group + g for h in full + rest for g in range(group)]
    joined = torch.cat([dense, short], dim=1)
    if order == sorted(order):
        return joined
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return joined.index_select(1, torch.tensor(inverse).to(q.device, non_blocking=True))
