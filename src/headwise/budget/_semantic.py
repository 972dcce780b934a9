"""Semantic vectors of heads, their distances, and the split of a layer's budget by them (Task-KV, arXiv 2501.15113).

Letters: B batch, L layers, Kg kv heads of a group, S slots, D head dim.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from headwise.attach import HeadCall, attach, find_stack
from headwise.attention.groups import KVGroup, key_positions
from headwise.errors import PlanError
from headwise.keyscores import Ask, ranks, splitter
from headwise.plan import Selected

Metric = Literal["l2", "cosine"]
Group = Literal["mean", "max"]


def semantic_vectors(mass: Tensor, v: Tensor, tokens: int) -> Tensor:
    """What a head says, v' = Σ_{j in I} c_j v_j, I the `tokens` keys of most attention: mass c (B, Kg, S), v (B, Kg, S, D) -> (B, Kg, D).

    The weights are not normalised anew. With all tokens, and c the mean over all queries, it is the mean output of the head.
    """
    top = mass.topk(min(tokens, mass.shape[-1]), dim=-1)
    chosen = v.float().gather(2, top.indices[..., None].expand(-1, -1, -1, v.shape[-1]))
    return (top.values[..., None] * chosen).sum(2)


def distances(vectors: Tensor, metric: str = "l2") -> Tensor:
    """Distance of each head's vector (B, Kg, D) from the mean of the heads, (B, Kg): Euclidean, or 1 - cosine."""
    centre = vectors.mean(1, keepdim=True)
    if metric == "cosine":
        return 1 - torch.cosine_similarity(vectors, centre.expand_as(vectors), dim=-1)
    if metric != "l2":
        raise PlanError(f"metric is {metric!r}; it must be 'l2' or 'cosine'")
    return (vectors - centre).norm(dim=-1)


def head_distances(ask: Ask, tokens: int = 256, window: int = 32, group: str = "mean", metric: str = "l2") -> Tensor:
    """Distances (B, Kg) of the heads that an `Ask` shows: steps 1 to 4 of the method."""
    return distances(semantic_vectors(joined(ask.masses(window), group), ask.group.v, tokens), metric)


def far_heads(layer: int, layers: int, heads: int, beta: float, m: float) -> float:
    """f(r) = n·beta - (n·beta - m) / (R - 1) · r: heads that differ, falling linearly from the first layer to the last."""
    first = heads * beta
    return first if layers == 1 else first - (first - m) / (layers - 1) * layer


def rounded(x: float) -> int:
    """To the nearest whole number, halves up."""
    return math.floor(x + 0.5)


def joined(mass: Tensor, group: str) -> Tensor:
    """One column of attention for a kv head from those of its query heads, (B, Kg, G, S) -> (B, Kg, S)."""
    if group not in ("mean", "max"):
        raise PlanError(f"group is {group!r}; it must be 'mean' or 'max'")
    return mass.mean(2) if group == "mean" else mass.amax(2)


def precedence(distance: Tensor, heads: int, closest: int, order: str, ask: Ask) -> Tensor:
    """Which head stays whole first, (B, Kg) from 0, by their distances: the `heads` farthest, then the closest, then the others.

    `order` "near" turns the distances round and "random" draws some, seeded by the layer: controls.
    """
    if order not in ("far", "near", "random"):
        raise PlanError(f"order is {order!r}; it must be 'far', 'near' or 'random'")
    if order == "random":
        generator = torch.Generator().manual_seed(ask.layer)
        distance = torch.rand(distance.shape[1], generator=generator).to(distance.device).expand_as(distance)
    everyone = torch.ones_like(distance, dtype=torch.bool)
    place = ranks(-distance if order == "near" else distance, everyone)
    last = (place == place.shape[1] - 1) & (place >= heads) & bool(closest)
    return torch.where(last, heads, place + ((place >= heads) & bool(closest)).long())


@splitter("spread")
def spread(
    ask: Ask,
    scores: Tensor,
    candidates: Tensor,
    room: Tensor,
    *,
    heads: int = 1,
    closest: int = 1,
    tokens: int = 256,
    window: int = 32,
    group: str = "mean",
    metric: str = "l2",
    order: str = "far",
    sinks: int = 1,
) -> Tensor:
    """Heads whose semantic vector lies far from the mean of all keep everything, and so does the closest one; the others share the rest.

    Where a short prompt has no room for so many whole heads, as many stay whole as fit. `sinks=0` leaves the pattern's sinks out of
    the vectors.
    """
    mass = joined(ask.masses(window), group)
    if not sinks:
        mass = mass.masked_fill((ask.positions >= 0) & (ask.positions < ask.pattern.sinks), 0.0)
    distance = distances(semantic_vectors(mass, ask.group.v, tokens), metric)
    size = candidates.sum(-1)  # (B, Kg): what a whole head keeps beside sinks and window
    fits = room // size.amax(1).clamp(min=1)
    whole = precedence(distance, heads, closest, order, ask) < fits.clamp(max=heads + closest)[:, None]
    left, others = room - (size * whole).sum(1), (~whole).sum(1).clamp(min=1)
    return torch.where(whole, size, (left // others)[:, None])


def distance_table(
    model: Any,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    tokens: int = 256,
    window: int = 32,
    group: Group = "mean",
    metric: Metric = "l2",
) -> Tensor:
    """Distances of all kv heads at the end of prompts: ids (B, N), padded on the left where `mask` is 0 -> (B, L, K) float32."""
    found = torch.zeros(ids.shape[0], find_stack(model).layers, find_stack(model).kv_heads)

    def observe(call: HeadCall, out: Tensor) -> None:
        queries, all_heads = call.queries(), tuple(range(call.k.shape[1]))
        keys = KVGroup(all_heads, call.k, call.v)
        end = int(key_positions(keys, queries).max()) + 1
        ask = Ask(call.q, keys, queries, call.scale, call.layer, Selected(0, 1, 0), (end,) * ids.shape[0])
        found[:, call.layer] = head_distances(ask, tokens, window, group, metric).cpu()

    with attach(model, observers=[observe]), torch.no_grad():
        model(ids.to(model.device), attention_mask=None if mask is None else mask.to(model.device), use_cache=False)
    return found
