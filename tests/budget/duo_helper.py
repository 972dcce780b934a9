"""Scores of kv heads, and a model read in pieces through the cache of a plan, for the tests of DuoAttention."""

import torch

from headwise.attach import attach
from headwise.cache import HeadwiseCache
from headwise.units import HeadScores

ROPE = ["llama", "qwen3", "mistral"]


def scores(values, **labels) -> HeadScores:
    return HeadScores(values=torch.as_tensor(values, dtype=torch.float32), kind="kv", method="duo-gates", **labels)


def drawn(layers: int, heads: int, seed: int, levels: int = 0) -> HeadScores:
    values = torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed))
    return scores((values * levels).round() / levels if levels else values)


def tokens(rows: int = 1, count: int = 60, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (rows, count), generator=torch.Generator().manual_seed(seed))


def feed(model, plan, ids, sizes, mask=None):
    """Logits of ids (B, N) read in pieces, and the cache."""
    cache, outs, start = HeadwiseCache(plan), [], 0
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), attach(model, plan=plan):
        for size in sizes:
            stop = min(start + size, ids.shape[1])
            part = dict(attention_mask=mask[:, :stop], position_ids=positions[:, start:stop])
            outs.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **part).logits)
            start = stop
    assert start == ids.shape[1]
    return torch.cat(outs, 1), cache
