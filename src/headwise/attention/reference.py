"""The oracle: every head's attention written as the equation, with a dense mask. Slow, obviously right, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.attention.groups import KVGroup, Queries, visible


def attend(q: Tensor, group: KVGroup, queries: Queries, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v for the query heads of one group.

    q (B, Hg, N, D) -> out (B, Hg, N, Dv) in q's dtype and log-sum-exp (B, Hg, N) in float32 (float64 for float64
    inputs). A query that sees no key gets out = 0 and lse = -inf.
    """
    B, Hg, N, D = q.shape
    Kg, S = group.k.shape[1:3]
    G = Hg // Kg
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_KG = q.to(wide).reshape(B, Kg, G, N, D)
    logits = torch.einsum("bkgnd,bksd->bkgns", q_KG, group.k.to(wide)) * scale
    seen = visible(group, queries)[:, :, None].expand(B, Kg, G, N, S)
    logits = logits.masked_fill(~seen, -torch.inf)
    values = group.v.to(wide)
    if group.compensation is not None:
        extra = torch.einsum("bkgnd,bkd->bkgn", q_KG, group.compensation.k.to(wide)) * scale
        extra = extra + group.compensation.log_count.to(wide)[:, :, None, None]
        logits = torch.cat([logits, extra[..., None]], dim=-1)
        values = torch.cat([values, group.compensation.v.to(wide)[:, :, None]], dim=2)
    lse = torch.logsumexp(logits, dim=-1)
    blind = torch.isneginf(lse)
    probs = torch.exp(logits - lse.masked_fill(blind, 0.0)[..., None])
    out = torch.einsum("bkgns,bksd->bkgnd", probs, values)
    return out.reshape(B, Hg, N, -1).to(q.dtype), lse.reshape(B, Hg, N)
