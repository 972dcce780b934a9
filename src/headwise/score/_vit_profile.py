"""Attention against distance on the grid of patches, streamed: running sums per head, never the attention of all images.

Letters: B images, L layers, H query heads, N tokens, P patches, T prefix tokens, K distances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from headwise.attach import HeadCall
from headwise.errors import ScoreError
from headwise.score._vision import Grid

Distance = Literal["chebyshev", "euclidean"]
BLOCK = 1 << 22  # attention weights of one block of images


def distances(grid: Grid, kind: Distance) -> tuple[Tensor, Tensor]:
    """(distance (P, P), ring (P, P) int64): Chebyshev hops max(|dy|, |dx|), or Euclidean, its rings rounded to whole patches."""
    dy, dx = grid.offsets()
    if kind == "chebyshev":
        distance = torch.maximum(dy.abs(), dx.abs()).float()
    elif kind == "euclidean":
        distance = (dy**2 + dx**2).float().sqrt()
    else:
        raise ScoreError(f"distance={kind!r}; choose 'chebyshev' or 'euclidean'")
    return distance, distance.round().long()


def attention_rows(call: HeadCall) -> Tensor:
    """A (B, H, N, N) of a call without a mask, float32 or wider."""
    if call.mask is not None or call.causal or call.k.shape[2] != call.q.shape[2]:
        raise ScoreError(f"layer {call.layer}: a profile over patches needs unmasked, bidirectional self-attention")
    call.need_expressible("an attention profile")
    wide, G = torch.promote_types(call.q.dtype, torch.float32), call.q.shape[1] // call.k.shape[1]
    k = call.k.to(wide).repeat_interleave(G, 1)
    return (call.q.to(wide) @ k.mT * call.scale).softmax(-1)


@dataclass
class Sums:
    """Running sums of one layer over images, each (H, …) in float64."""

    count: int = 0
    parts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, found: dict[str, Tensor], images: int) -> None:
        """Add what a batch of images gave, already summed over them."""
        self.count += images
        for name, value in found.items():
            value = value.double().cpu()
            self.parts[name] = self.parts[name] + value if name in self.parts else value


class Profiler:
    """An observer that sums up the profiles of every layer."""

    def __init__(self, grid: Grid, kind: Distance, renormalize: bool, without_top: float):
        self.grid, self.renormalize, self.without_top = grid, renormalize, without_top
        self.distance, self.ring = distances(grid, kind)
        self.rings = int(self.ring.max()) + 1
        self.interior = _interior(grid)
        self.layers: dict[int, Sums] = {}

    @torch.no_grad()
    def __call__(self, call: HeadCall, out: Tensor) -> None:
        B, H, N = call.q.shape[:3]
        step = max(1, BLOCK // (H * N * N))
        for at in range(0, B, step):
            A = attention_rows(_cut(call, slice(at, at + step)))
            self.layers.setdefault(call.layer, Sums()).add(self.summed(A), len(A))

    def summed(self, A: Tensor) -> dict[str, Tensor]:
        """What the rows A (B, H, N, N) of some images add up to; means over patches, sums over images."""
        T, device = self.grid.prefix, A.device
        ring, distance = self.ring.to(device), self.distance.to(device)
        patch = A[:, :, T:, T:]
        to_prefix = A[:, :, T:, :T].sum(-1).mean(-1)
        kept = self._kept(patch)
        patch = patch * kept
        if self.renormalize:
            patch = patch / patch.sum(-1, keepdim=True).clamp(min=torch.finfo(patch.dtype).tiny)
        mass = _by_ring(patch, ring, self.rings)  # (B, H, P, K)
        sizes = _by_ring(kept.expand_as(patch), ring, self.rings)
        there = (sizes > 0).to(mass.dtype)
        strength = mass / sizes.clamp(min=1)
        inner = self.interior.to(device, mass.dtype)[:, None]
        found = {
            "mass": mass.mean(2),
            "strength": (strength * there).sum(2) / there.sum(2).clamp(min=1),
            "inner": (strength * there * inner).sum(2) / (there * inner).sum(2).clamp(min=1),
            "distance": (patch * distance).sum(-1).mean(-1),
            "entropy": -torch.xlogy(A, A).sum(-1).mean(-1),
            "largest": A.max(-1).values.mean(-1),
            "patch_to_prefix": to_prefix,
        }
        if T:
            found |= {
                "prefix_to_prefix": A[:, :, :T, :T].sum(-1).mean(-1),
                "prefix_to_patch": A[:, :, :T, T:].sum(-1).mean(-1),
            }
        return {name: value.sum(0) for name, value in found.items()}

    def _kept(self, patch: Tensor) -> Tensor:
        """1 for keys that count (B, 1, 1, P): all but the share `without_top` that draws most attention in its image and layer."""
        B, _, _, P = patch.shape
        kept = torch.ones(B, 1, 1, P, dtype=patch.dtype, device=patch.device)
        gone = math.ceil(self.without_top * P) if self.without_top else 0
        if gone:
            drawn = patch.mean((1, 2)).topk(gone, dim=-1).indices  # (B, gone)
            kept[:, 0, 0].scatter_(1, drawn, 0.0)
        return kept


def _by_ring(values: Tensor, ring: Tensor, rings: int) -> Tensor:
    """Sums over the keys of each ring, (B, H, P, K), of values (B, H, P, P)."""
    found = values.new_zeros(*values.shape[:3], rings)
    return found.scatter_add_(-1, ring.expand(values.shape), values)


def _interior(grid: Grid) -> Tensor:
    """(P,) bool: patches of the middle, at least a third of the way from each border; all where the grid is small."""
    margin_y, margin_x = grid.rows // 3, grid.columns // 3
    inner = torch.zeros(grid.rows, grid.columns, dtype=torch.bool)
    inner[margin_y : grid.rows - margin_y, margin_x : grid.columns - margin_x] = True
    return inner.flatten()


def _cut(call: HeadCall, rows: slice) -> HeadCall:
    from dataclasses import replace

    return replace(call, q=call.q[rows], k=call.k[rows], v=call.v[rows])
