"""LongHeads as its text says, one query at a time: what every faster form is tested against. Letters as in `_longheads`."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.budget._longheads import Shape


def summaries(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """Chunk keys (B, K, C, D) of all complete chunks of q_raw (B, H, N, D), k_raw and v (B, K, N, D), which stand at no position."""
    B, K, N, D = k.shape
    group, w = q.shape[1] // K, shape.w
    found = torch.zeros(B, K, N // w, D, dtype=torch.float64)
    for b in range(B):
        for head in range(K):
            for c in range(N // w):
                here = slice(c * w, (c + 1) * w)
                local = shape.rotation.turn(k[b, head, here], torch.arange(w)).double()
                means = []
                for h in range(head * group, (head + 1) * group):
                    near = shape.rotation.turn(q[b, h, here], torch.arange(w)).double()
                    weights = torch.softmax(near @ local.T * shape.scale, dim=-1)
                    means.append((weights @ v[b, head, here].double()).mean(0))
                m = torch.stack(means).mean(0)
                found[b, head, c] = torch.softmax(local @ m * shape.scale, dim=-1) @ local
    return found


def chunks_of(scores: Tensor, t: int, shape: Shape) -> list[int]:
    """The chunks that a query at position t >= k · w reads, ascending, from its scores (C,) of all complete chunks."""
    current = t // shape.w
    middle = sorted(range(1, current - 1), key=lambda c: (-float(scores[c]), c))
    return sorted({0, current - 1, current, *middle[: shape.k - 3]})


def attend(q: Tensor, k: Tensor, v: Tensor, shape: Shape, *, start: int, by_head: bool = False) -> tuple[Tensor, list]:
    """(B, H, N, D) float64 and the chunks of every (row, head, query) at or behind `start`; q, k raw: they stand at no position.

    Queries in front of `start` read everything, densely; so do those of k or fewer chunks.
    """
    B, H, N, D = q.shape
    group = H // k.shape[1]
    keys = summaries(q, k, v, shape)
    out, chosen = torch.zeros(B, H, N, D, dtype=torch.float64), []
    for b in range(B):
        for h in range(H):
            head = h // group
            for t in range(N):
                if t < start or t // shape.w < shape.k:
                    places, slots, mine = torch.arange(t + 1), torch.arange(t + 1), t
                else:
                    heads = [h] if by_head else range(head * group, (head + 1) * group)
                    scores = sum(keys[b, head] @ q[b, one, t].double() for one in heads)
                    chunks = chunks_of(scores, t, shape)  # type: ignore[arg-type]
                    places = torch.cat([torch.arange(c * shape.w, (c + 1) * shape.w) for c in chunks])
                    places = places[places <= t] if shape.own else places[places < t]
                    slots, mine = torch.arange(len(places)), (shape.k - 1) * shape.w + t % shape.w
                    chosen.append((b, h, t, chunks))
                near = shape.rotation.turn(q[b, h, t], torch.tensor(mine)).double()
                far = shape.rotation.turn(k[b, head, places], slots).double()
                weights = torch.softmax(far @ near * shape.scale, dim=-1)
                out[b, h, t] = weights @ v[b, head, places].double()
    return out, chosen
