"""FlexAttention as a backend: one compiled kernel for a windowed prefill on CUDA, and its eager form for checks.

Only used when asked for: compilation takes tens of seconds, and CPU has no backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from headwise.attention.groups import KVGroup, Queries


def attend(q: Tensor, group: KVGroup, queries: Queries, scale: float) -> tuple[Tensor, None]:
    """The same function as `reference.attend`, without log-sum-exp."""
    N, S = q.shape[2], group.k.shape[2]
    pattern, offset, causal = group.pattern, queries.offset, queries.causal
    start = queries.start if queries.start is not None else q.new_zeros(q.shape[0], dtype=torch.long)
    mask = None if queries.mask is None else queries.mask.expand(q.shape[0], -1, -1, -1)
    k, v = group.k, group.v
    if not torch.is_grad_enabled():
        q, k, v = q.detach(), k.detach(), v.detach()  # on CPU it refuses a leaf that wants gradients even under no_grad

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        q_pos, k_pos = i + offset - start[b], j - start[b]
        seen = k_pos >= 0
        if causal:
            seen = seen & pattern.reads(q_pos, k_pos)
        return seen if mask is None else seen & mask[b, 0, i, j]

    blocks = create_block_mask(rule, q.shape[0], None, N, S, device=str(q.device))
    run: Callable[..., Tensor] = _compiled() if q.is_cuda else flex_attention  # type: ignore[assignment]
    out = run(q, k, v, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out, None


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled
