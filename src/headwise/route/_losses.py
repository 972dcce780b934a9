"""Choosing heads and balancing their load.

Letters: B batch, N tokens, E routed heads, K chosen of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.errors import RouteError


def select(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of scores (..., E) as a 0/1 mask of the same dtype; of equal scores the lowest index wins.

    >>> select(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2).tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    if not scores.is_floating_point():
        raise RouteError(f"scores of heads are {scores.dtype}; they must be floating point")
    if not 0 <= count <= scores.shape[-1]:
        raise RouteError(f"{count} heads cannot be chosen of {scores.shape[-1]}")
    order = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores).scatter(-1, order, 1.0)


def balance_loss(probs: Tensor, mask: Tensor, real: Tensor | None = None, scaling: str = "official") -> Tensor:
    """Load balance over all real tokens: sum_i P_i f_i, times E for "official" (equation 8 of MoH, and its code).

    P_i is the mean probability of head i (with gradient), f_i the share of tokens that chose it (without). At uniform
    routing the value is K ("official") or K / E ("paper"). probs, mask (B, N, E); real (B, N) bool leaves padding out.

    >>> probs, mask = torch.full((1, 2, 4), 0.25), torch.tensor([[[1.0, 1, 0, 0], [0, 0, 1, 1]]])
    >>> float(balance_loss(probs, mask)), float(balance_loss(probs, mask, scaling="paper"))
    (2.0, 0.5)
    """
    if scaling not in ("official", "paper"):
        raise RouteError(f"scaling is {scaling!r}; it must be 'official' or 'paper'")
    P, f = _mean(probs, real), _mean(mask.detach(), real)
    total = (P * f).sum()
    return total * probs.shape[-1] if scaling == "official" else total


def _mean(x: Tensor, real: Tensor | None) -> Tensor:
    """Mean of (B, N, E) over the real tokens, (E,); 0 where there are none."""
    if real is None:
        return x.mean(dim=(0, 1))
    weight = real.to(x.dtype)[..., None]
    return (x * weight).sum(dim=(0, 1)) / weight.sum().clamp(min=1)
