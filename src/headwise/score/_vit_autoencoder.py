"""Attention patterns as pictures, an auto-encoder over them, and clusters of what it finds.

A pattern has two channels: weight by relative position (query in the middle), and weight by absolute position of the key. The first tells
self, neighbours, rows and columns apart, the second finds heads that look at one place wherever they stand.

Letters: S samples, P patches, W side of a pattern picture, Z latents, C clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwise.checks import whole
from headwise.errors import ScoreError
from headwise.score._vision import Grid

SIDE = 15  # W: larger grids are averaged down to it, smaller ones padded
NAMES = ("self", "local", "row", "column", "uniform", "prefix", "spot", "mixed")


def patterns(A: Tensor, grid: Grid) -> Tensor:
    """(S, 2, W, W) in [0, 1] from attention of patches to patches (S, P, P): square roots of mean weights, each channel with maximum 1."""
    S, P = A.shape[:2]
    dy, dx = grid.offsets(A.device)
    height, width = 2 * grid.rows - 1, 2 * grid.columns - 1
    place = ((dy + grid.rows - 1) * width + dx + grid.columns - 1).flatten()
    summed = A.new_zeros(S, height * width).index_add_(1, place, A.reshape(S, -1))
    count = A.new_zeros(height * width).index_add_(0, place, torch.ones(P * P, dtype=A.dtype, device=A.device))
    relative = (summed / count).view(S, 1, height, width)
    absolute = A.mean(1).view(S, 1, grid.rows, grid.columns)
    return torch.cat([_picture(relative), _picture(absolute)], dim=1)


def _picture(weights: Tensor) -> Tensor:
    """(S, 1, W, W): averaged down where the map is larger than W, padded around the middle where it is smaller."""
    top = weights.amax((-1, -2), keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    height, width = min(weights.shape[-2], SIDE), min(weights.shape[-1], SIDE)
    small = F.adaptive_avg_pool2d(weights / top, (height, width)).clamp(min=0).sqrt()
    gap_y, gap_x = SIDE - height, SIDE - width
    return F.pad(small, (gap_x // 2, gap_x - gap_x // 2, gap_y // 2, gap_y - gap_y // 2))


class AutoEncoder(nn.Module):
    """Convolutions to Z latents and back, for pictures (S, 2, W, W)."""

    def __init__(self, latent: int):
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(2, 16, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(32 * 16, latent),
        )  # fmt: skip
        self.decode = nn.Sequential(nn.Linear(latent, 128), nn.GELU(), nn.Linear(128, 2 * SIDE * SIDE), nn.Sigmoid())

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures as they come back, (S, 2, W, W)."""
        return self.decode(self.encode(pictures)).view(-1, 2, SIDE, SIDE)


@dataclass(frozen=True)
class Fit:
    """A trained auto-encoder; r2 = 1 − squared error / variance around the mean picture, on samples that it was not trained on."""

    model: AutoEncoder
    r2: float


def fit(pictures: Tensor, groups: Tensor, *, latent: int, steps: int, batch: int = 128, seed: int = 0) -> Fit:
    """Adam on the mean squared error; of the groups (S,), such as images, 80 % are for training and 20 % for r2 (all, if there is one)."""
    whole("latent", latent, 1, ScoreError)
    generator = torch.Generator().manual_seed(seed)
    names = groups.unique()
    order = names[torch.randperm(len(names), generator=generator)]
    training = torch.isin(groups, order[: max(1, round(0.8 * len(order)))])
    held_out = ~training if bool((~training).any()) else training
    train = pictures[training]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoEncoder(latent).to(pictures.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(whole("steps", steps, 1, ScoreError)):
        rows = torch.randint(len(train), (min(batch, len(train)),), generator=generator)
        loss = F.mse_loss(model(train[rows]), train[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        rest = pictures[held_out]
        error = (model.eval()(rest) - rest).square().sum()
        spread = (rest - train.mean(0)).square().sum().clamp(min=1e-12)
    return Fit(model, float(1 - error / spread))


def clusters(latents: Tensor, count: int, seed: int) -> Tensor:
    """(S,) int64: k-means of standardised latents by scipy, the best of eight starts; empty clusters are closed up."""
    import numpy as np
    from scipy.cluster.vq import kmeans2

    points = latents.double().cpu()
    points = (points - points.mean(0)) / points.std(0, correction=0).mean().clamp(min=1e-12)
    count = min(whole("clusters", count, 1, ScoreError), len(points.unique(dim=0)))
    best, labels = float("inf"), torch.zeros(len(points), dtype=torch.long)
    for start in range(8):
        centres, found = kmeans2(
            points.numpy(), count, minit="++", rng=np.random.default_rng(seed + start), missing="warn"
        )
        cost = float((points - torch.from_numpy(centres)[torch.from_numpy(found).long()]).square().sum())
        if cost < best:
            best, labels = cost, torch.from_numpy(found).long()
    return labels.unique(return_inverse=True)[1]


def purity(labels: Tensor, truth: Tensor) -> float:
    """Share of samples whose cluster is mostly of their own kind."""
    hits = sum(int(truth[labels == c].bincount().max()) for c in labels.unique())
    return hits / len(labels)


def plane(latents: Tensor) -> Tensor:
    """(S, 2): the two leading principal components."""
    centred = latents.double() - latents.double().mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    return (centred @ axes[:2].T).float()


def name_of(A: Tensor, grid: Grid, prefix_mass: float) -> str:
    """A rule-made name of one mean attention map (P, P), which with `prefix_mass` sums to 1 in each row.

    prefix: over half of the mass is on tokens that are no patches. Of the rest: self, local (within one hop), row or column holds over
    half; uniform: the entropy is within 3 % of the largest possible; spot: a quarter of the keys holds over three quarters whoever asks.
    """
    if prefix_mass > 0.5:
        return "prefix"
    A = A / A.sum(-1, keepdim=True).clamp(min=1e-12)
    dy, dx = grid.offsets(A.device)
    hop = torch.maximum(dy.abs(), dx.abs())
    share = lambda chosen: float((A * chosen).sum(-1).mean())  # noqa: E731
    P = grid.patches
    if P > 1 and float(-torch.xlogy(A, A).sum(-1).mean()) > 0.97 * torch.log(torch.tensor(float(P))):
        return "uniform"
    for name, chosen in (("self", hop == 0), ("row", dy == 0), ("column", dx == 0), ("local", hop <= 1)):
        if share(chosen) > 0.5:
            return name
    busiest = A.mean(0).sort(descending=True).values
    return "spot" if float(busiest[: max(1, P // 4)].sum()) > 0.75 else "mixed"


def planted(
    kinds: Sequence[str], count: int, grid: Grid, *, generator: torch.Generator, noise: float = 0.1
) -> tuple[Tensor, Tensor]:
    """(attention (S, P, P), kind (S,)): `count` samples of each known pattern, blurred by noise: what clusters should recover.

    Kinds: "self", "local", "row", "column", "uniform", "spot" (one random place for all queries of a sample).
    """
    dy, dx = grid.offsets()
    hop = torch.maximum(dy.abs(), dx.abs())
    base = {"self": hop == 0, "local": (hop <= 1) & (hop > 0), "row": dy == 0, "column": dx == 0, "uniform": hop >= 0}
    made, truth = [], []
    for number, kind in enumerate(kinds):
        if kind not in (*base, "spot"):
            raise ScoreError(f"kind={kind!r}; choose {', '.join((*base, 'spot'))}")
        for _ in range(count):
            if kind == "spot":
                centre = int(torch.randint(grid.patches, (1,), generator=generator))
                weights = (hop[centre] <= 1).float().expand(grid.patches, -1)
            else:
                weights = base[kind].float()
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
            random = torch.rand(grid.patches, grid.patches, generator=generator)
            made.append((1 - noise) * weights + noise * random / random.sum(-1, keepdim=True))
            truth.append(number)
    A = torch.stack(made)
    return A / A.sum(-1, keepdim=True), torch.tensor(truth)
