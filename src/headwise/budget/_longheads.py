"""LongHeads' selection of chunks and the attention over them, in forms that touch only what was selected.

Letters: B batch, H query heads, K kv heads, G = H/K, S = 1 or G selections a kv head, N queries, M key columns, w tokens of a chunk,
C chunks, k chunks a query reads, D head dim. A query at position t is in chunk t // w, its current one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.budget import _longheads_fast
from headwise.budget._longheads_rotary import Rotation
from headwise.budget._longheads_state import chunk_columns, take

GATHER = 4  # up to so many queries, as in decoding, their chunks are gathered; more of them are sorted by chunk


@dataclass(frozen=True)
class Shape:
    """w tokens a chunk, k chunks a query; logits are q · k · `scale`; `own` says whether a query reads its own key."""

    w: int
    k: int
    scale: float
    rotation: Rotation
    own: bool = True


def select(q: Tensor, chunk_keys: Tensor, positions: Tensor, shift: Tensor, shape: Shape, *, by_head: bool) -> Tensor:
    """Which chunks each query reads, (B, K, S, N, C) bool, k of them in every row with positions >= k · w.

    Chunk 0, the current one and the one before are always read; of the others in between, the k - 3 with the largest q_raw · R, the
    lowest index first among equals. q (B, H, N, D) stands at positions + shift; q_raw stands at none. Scores of a kv head's queries are
    summed, or with `by_head` each query head selects alone. chunk_keys (B, K, C', D), positions (B, N), shift (B or 1,).
    """
    B, K = chunk_keys.shape[:2]
    current = positions.clamp(min=0) // shape.w  # (B, N)
    raw = shape.rotation.turn(q.float(), -(positions + shift[:, None])[:, None]).unflatten(1, (K, -1))
    raw = raw if by_head else raw.sum(2, keepdim=True)  # (B, K, S, N, D)
    scores = raw @ chunk_keys.mT[:, :, None]  # (B, K, S, N, C')
    chunk = torch.arange(chunk_keys.shape[2], device=q.device)
    middle = (chunk >= 1) & (chunk <= current[..., None] - 2)  # (B, N, C')
    scores = scores.masked_fill(~middle[:, None, None], -torch.inf)
    total = max(int(current.max()) + 1, chunk_keys.shape[2])
    chosen = torch.zeros(*scores.shape[:-1], total, dtype=torch.bool, device=q.device)
    chosen[..., : scores.shape[-1]] = _largest(scores, shape.k - 3)
    every = torch.arange(total, device=q.device)
    here = current[..., None]
    return chosen | ((every == 0) | (every == here) | (every == here - 1))[:, None, None]


def _largest(scores: Tensor, count: int) -> Tensor:
    """Where the `count` largest of scores (…, C) stand, the lowest index first among equals, and never at -inf; no sort of them all."""
    if count >= scores.shape[-1] or not count:
        return (scores > -torch.inf) & bool(count)
    bar = scores.topk(count, dim=-1).values[..., -1:]
    above, level = scores > bar, (scores == bar) & (scores > -torch.inf)
    return above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def turns(chosen: Tensor, positions: Tensor, shape: Shape) -> Tensor:
    """By how many positions a query is turned before it meets the keys of each chunk, (B, K, S, N, C).

    Remapped, chunk c in slot j moves by (j - c) · w and the query by (k - 1 - C) · w, the same for all keys of the chunk. RoPE products
    depend on differences alone, so the keys stay as they are and the query turns by the difference of the two.
    """
    slot = chosen.long().cumsum(-1) - 1
    chunk = torch.arange(chosen.shape[-1], device=chosen.device)
    current = (positions.clamp(min=0) // shape.w)[:, None, None, :, None]
    return (shape.k - 1 - current - slot + chunk) * shape.w


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    positions: Tensor,
    starts: tuple[int, ...] | None,
    shape: Shape,
) -> Tensor:
    """Attention of q (B, H, N, D) over the chosen chunks of k, v (B, K, M, D), keys remapped; (B, H, N, D) in q's dtype.

    The same function as `_longheads_reference.attend`. Rows with positions below k · w get numbers without meaning.
    """
    if _longheads_fast.works(q, k, v, shape.rotation):
        return _longheads_fast.by_kernel(
            q, k, v, chosen, positions, starts,
            w=shape.w, kept=shape.k, scale=shape.scale, rotation=shape.rotation, own=shape.own,
        )  # fmt: skip
    form = gathered if q.shape[2] <= GATHER else sorted_by_chunk
    return form(q, k, v, chosen, positions, starts, shape)


def gathered(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, positions: Tensor, starts: tuple[int, ...] | None, shape: Shape
) -> Tensor:
    """Each query's chunks side by side: k · w keys and values are read for every query and selection."""
    B, K, S, N, _ = chosen.shape
    w, M, D = shape.w, k.shape[2], v.shape[-1]
    index = chosen.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., : shape.k]  # ascending chunks
    steps = turns(chosen, positions, shape).gather(-1, index)  # (B, K, S, N, k)
    places = index[..., None] * w + torch.arange(w, device=q.device)  # positions of the keys, (B, K, S, N, k, w)
    columns = chunk_columns(index, starts, w, q.device).clamp(0, M - 1).flatten(2)[..., None]
    keys, values = (
        x.gather(2, columns.expand(-1, -1, -1, x.shape[-1])).view(B, K, S, N, -1, w, x.shape[-1]) for x in (k, v)
    )
    near = q.unflatten(1, (K, -1))[..., None, :]  # (B, K, G, N, 1, D)
    near = shape.rotation.turn(near, steps)  # (B, K, G, N, k, D)
    logits = (near[..., None, :] @ keys.mT).squeeze(-2).float() * shape.scale  # (B, K, G, N, k, w)
    logits = logits.masked_fill(~_before(places, positions[:, None, None, :, None, None], shape), -torch.inf)
    probs = torch.softmax(logits.flatten(-2), dim=-1).unflatten(-1, (-1, w)).to(v.dtype)
    out = (probs[..., None, :] @ values).squeeze(-2).sum(-2)
    return out.reshape(B, -1, N, D).to(q.dtype)


def sorted_by_chunk(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, positions: Tensor, starts: tuple[int, ...] | None, shape: Shape
) -> Tensor:
    """Chunk by chunk, the queries that selected it, merged by running maxima: work N · k · w, each key is read once."""
    B, K, S, N, C = chosen.shape
    G = q.shape[1] // K
    near = q.unflatten(1, (K, G))
    steps = turns(chosen, positions, shape)
    top = torch.full((B, K, G, N), -torch.inf, device=q.device)
    mass, out = torch.zeros_like(top), torch.zeros(B, K, G, N, v.shape[-1], device=q.device)
    put = (
        torch.Tensor.scatter if torch.is_grad_enabled() else torch.Tensor.scatter_
    )  # a backward pass needs the old ones
    counts = chosen.sum(3).amax(dim=(0, 1, 2)).tolist()
    for chunk, count in enumerate(counts):
        if not count:
            continue
        member = chosen[..., chunk]  # (B, K, S, N)
        rows = member.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :count]  # (B, K, S, n)
        step, real = steps[..., chunk].gather(-1, rows), member.gather(-1, rows)
        rows = rows.expand(-1, -1, G, -1)
        mine = shape.rotation.turn(near.gather(3, _wide(rows, q.shape[-1])), step)
        columns = chunk_columns(torch.tensor([chunk], device=q.device)[None], starts, shape.w, q.device)[:, 0]
        keys, values = (take(x, columns.clamp(0, x.shape[2] - 1))[:, :, None] for x in (k, v))  # (B, K, 1, w, D)
        logits = (mine @ keys.mT).float() * shape.scale  # (B, K, G, n, w)
        places = chunk * shape.w + torch.arange(shape.w, device=q.device)
        where = positions[:, None, None].expand(B, K, G, N).gather(3, rows)[..., None]
        seen = _before(places, where, shape) & real[..., None]
        part = _merged(logits.masked_fill(~seen, -torch.inf), values, *(x.gather(3, rows) for x in (top, mass)))
        new_top, new_mass, old_factor, add = part
        moved = out.gather(3, _wide(rows, out.shape[-1])) * old_factor[..., None] + add
        top, mass = put(top, 3, rows, new_top), put(mass, 3, rows, new_mass)
        out = put(out, 3, _wide(rows, out.shape[-1]), moved)
    return (out / mass.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).flatten(1, 2).to(q.dtype)


def _merged(logits: Tensor, values: Tensor, top: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(maximum, mass, factor on what was summed before, what is added) when a chunk's logits (…, n, w) join a running softmax."""
    new = torch.maximum(top, logits.amax(-1))
    floor = new.masked_fill(torch.isneginf(new), 0.0)  # a row that has seen nothing yet
    factor, weights = torch.exp(top - floor), torch.exp(logits - floor[..., None])
    return new, mass * factor + weights.sum(-1), factor, (weights.to(values.dtype) @ values).float()


def _before(places: Tensor, positions: Tensor, shape: Shape) -> Tensor:
    """Which keys at `places` a query may read: those up to itself, itself included unless the reference's slip is wanted."""
    return places <= positions if shape.own else places < positions


def _wide(index: Tensor, dim: int) -> Tensor:
    return index[..., None].expand(*index.shape, dim)
