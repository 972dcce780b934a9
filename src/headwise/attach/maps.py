"""Whole attention maps of chosen heads, for people who look at short prompts: N × M numbers a head, with or without a KV plan.

Statistics of many tokens come from `observe`, which keeps no matrix.
Letters: B batch, H query heads, K kv heads, G = H/K, N queries, M columns, S slots of a group, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headwise.attach.hook import HeadCall
from headwise.attention.groups import KVGroup, Queries, key_positions, query_heads, visible


def attention_map(call: HeadCall) -> Tensor:
    """softmax(q k^T · scale) of every head of a call, (B, H, N, M) float32: column j is the key at position j of its row.

    Rows of padding are 0. Under a plan, columns whose keys the cache has let go are 0 and the share of a compensation token, which has no
    position, is missing: a row then sums to less than 1. Edits of the scores ("uniform") are not part of it. Raises AttachError
    for a model whose softmax the headwise op cannot express.

    >>> from headwise.attach import attach
    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-llama")
    >>> seen = []
    >>> with torch.no_grad(), attach(model, observers=[lambda call, out: seen.append(attention_map(call))]):
    ...     _ = model(torch.arange(8)[None])
    >>> seen[0].shape, bool((seen[0].sum(-1) - 1).abs().max() < 1e-5), float(seen[0][0, 0, 0, 1])
    (torch.Size([1, 4, 8, 8]), True, 0.0)
    """
    call.need_expressible("an attention map")
    queries, (B, H, N, _) = call.queries(), call.q.shape
    columns = call.past + N if call.causal else call.k.shape[2]
    found = torch.zeros(B, H, N, columns, dtype=torch.float32, device=call.q.device)
    for group in call.key_groups():
        heads = query_heads(group.heads, H // call.site.kv_heads)
        found[:, heads] = _group_map(call, group, queries, heads, columns)
    real = call.real_tokens()
    return found if real is None else found * real[:, None, :, None]


def _group_map(call: HeadCall, group: KVGroup, queries: Queries, heads: list[int], columns: int) -> Tensor:
    """The maps of one group of kv heads, (B, Hg, N, M)."""
    B, Kg, S = group.k.shape[:3]
    N, G = call.q.shape[2], len(heads) // Kg
    q = (call.q[:, heads].float() * call.scale).reshape(B, Kg, G * N, -1)
    logits = (q @ group.k.float().mT).view(B, Kg, G, N, S)
    logits = logits.masked_fill(~visible(group, queries)[:, :, None], -torch.inf)
    if group.compensation is not None:
        extra = (q @ group.compensation.k.float()[..., None]).view(B, Kg, G, N, 1)
        logits = torch.cat([logits, extra + group.compensation.log_count[:, :, None, None, None]], -1)
    weights = logits.softmax(-1).nan_to_num(0.0)[..., :S]
    position = key_positions(group, queries).clamp(0, columns - 1)[:, :, None, None].expand(weights.shape)
    found = torch.zeros(B, Kg, G, N, columns, device=weights.device)
    return found.scatter_add_(-1, position, weights).view(B, Kg * G, N, columns)


def each_map(use: Callable[[int, Tensor], None]) -> Callable[[HeadCall, Tensor], None]:
    """An observer for `attach` that hands `use(layer, maps)` the maps (B, H, N, M) of each layer as the model runs."""

    def see(call: HeadCall, out: Tensor) -> None:
        use(call.layer, attention_map(call))

    return see
