"""Other libraries that compute the same function, where they are installed; a peer that cannot serve a case is left out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from headwise.bench.cases import Setting

FLEX_LIMIT = 8192  # FlexAttention is compiled once a shape: the longer lengths would only add minutes


def spans(setting: Setting, N: int, sinks: int, window: int) -> dict[str, float]:
    """Forward ms of FlexAttention with a mask by head; the block mask is built outside of the timer."""
    G = setting.heads // setting.kv_heads

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        streams = (h // G) % 2 == 0
        return (j <= i) & (~streams | (j < sinks) | (i - j < window))

    return _flex(setting, N, rule, heads=setting.heads)


def blocks(setting: Setting, N: int, lists: Tensor, block: int) -> dict[str, float]:
    """Forward ms of FlexAttention with the same lists, as a table of block pairs that its mask reads."""
    G, C = setting.heads // setting.kv_heads, lists.shape[2]
    table = torch.zeros(*lists.shape[:3], C + 1, dtype=torch.bool, device=lists.device)
    table.scatter_(3, torch.where(lists < 0, C, lists).long(), True)

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & table[b, h // G, i // block, j // block]

    return _flex(setting, N, rule, heads=setting.heads)


def _flex(setting: Setting, N: int, rule: Callable, heads: int) -> dict[str, float]:
    if setting.device != "cuda":
        return {}  # on a CPU it is compiled for half a minute a shape
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = setting.qkv(N)
    try:
        mask = create_block_mask(rule, 1, heads, N, N, device=setting.device)
        run: Any = functools.partial(_compiled(), q, k, v, block_mask=mask, enable_gqa=heads != setting.kv_heads)
        return {"flex": setting.time(run)}
    except Exception:  # compiling it may fail in many ways; a peer's failure must not cost our own figures
        return {}


@functools.cache
def _compiled() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def dense_peers(setting: Setting, N: int) -> dict[str, float]:
    """Forward ms of dense causal attention by flash-attn and fla, where they are installed."""
    found = {}
    for name, make in (("flash_attn", _flash_attn), ("fla", _fla)):
        try:
            run = make(setting, N)
            found[name] = setting.time(run)
        except (ImportError, RuntimeError, AttributeError):
            continue
    return found


def _flash_attn(setting: Setting, N: int) -> Callable[[], Any]:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    q, k, v = (x.transpose(1, 2).contiguous() for x in setting.qkv(N))
    return lambda: flash_attn_func(q, k, v, causal=True)


def _fla(setting: Setting, N: int) -> Callable[[], Any]:
    from fla.ops.attn import parallel_attn  # type: ignore[import-not-found]

    q, k, v = (x.transpose(1, 2).contiguous() for x in setting.qkv(N))
    return lambda: parallel_attn(q, k, v)
