"""FlexAttention as a backend: one compiled kernel for a windowed prefill on CUDA, and its eager form for checks.

Only used when asked for: compilation takes tens of seconds, and CPU has no backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from headwise.attention.groups import KVGroup, Queries


def attend(q: Tensor, group: KVGroup, queries: Queries, scale: float) -> tuple[Tensor, None]:
    """The same function as `reference.attend`, without log-sum-exp."""
    N, S = q.shape[2], group.k.shape[2]
    pattern, offset, causal = group.pattern, queries.offset, queries.causal
    start = queries.start if queries.start is not None else q.new_zeros(q.shape[0], dtype=torch.long)
    mask = queries.mask

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        q_pos, k_pos = i + offset - start[b], j - start[b]
        seen = k_pos >= 0
        if causal:
            seen = seen & pattern.reads(q_pos, k_pos)
        return seen if mask is None else seen & mask[b, 0, i, j]

    blocks = create_block_mask(rule, q.shape[0], None, N, S, device=str(q.device))
    run = _compiled() if q.is_cuda else flex_attention
    out = run(q, group.k, group.v, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != group.k.shape[1])
    return out, None


_COMPILED: list = []


def _compiled():  # noqa: ANN202 - torch.compile returns an opaque callable
    if not _COMPILED:
        _COMPILED.append(torch.compile(flex_attention, dynamic=True))
    return _COMPILED[0]
