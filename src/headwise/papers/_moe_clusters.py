"""A task with a right answer for routers: tokens come from latent clusters, each with a map of its own that an expert can learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.route import (
    ExpertChoice,
    Experts,
    Hash,
    MoELayer,
    NoisyTopK,
    Router,
    Routing,
    Rule,
    Smear,
    SoftmaxTopK,
    SoftMoE,
)

CLUSTERS, WIDTH, IDS = 8, 16, 512
FAR = 2.0  # norm of the centres; tokens lie around theirs at a distance of about 1, so that the maps matter


@dataclass(frozen=True)
class Run:
    """A router and its losses."""

    rule: Rule
    losses: dict[str, float]


RUNS = {
    "balanced": Run(SoftmaxTopK(k=1, renorm=False), {"balance": 0.1}),
    "unbalanced": Run(SoftmaxTopK(k=1, renorm=False), {}),
    "information": Run(SoftmaxTopK(k=1, renorm=False), {"information": 0.1}),
    "choice": Run(ExpertChoice(capacity=1.0), {}),
    "noisy": Run(NoisyTopK(k=2), {"importance": 0.1, "load": 0.1}),
    "hash": Run(Hash(vocabulary=IDS), {}),
    "soft": Run(SoftMoE(slots=8), {}),
    "smear": Run(Smear(), {}),
}


@dataclass(frozen=True)
class Task:
    """Centres (8, C) and the map of each cluster (8, C, C)."""

    centres: Tensor
    maps: Tensor

    def draw(self, generator: torch.Generator, rows: int = 16, length: int = 64) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, C), what to say (B, N, C), and their clusters (B, N)."""
        kind = torch.randint(CLUSTERS, (rows, length), generator=generator)
        x = self.centres[kind] + torch.randn(rows, length, WIDTH, generator=generator) / WIDTH**0.5
        return x, torch.einsum("bnc,bncd->bnd", x, self.maps[kind]), kind


def make_task(seed: int) -> Task:
    """Random centres of norm `FAR` and random maps that keep lengths on average."""
    generator = torch.Generator().manual_seed(seed)
    centres = FAR * torch.nn.functional.normalize(torch.randn(CLUSTERS, WIDTH, generator=generator), dim=-1)
    return Task(centres, torch.randn(CLUSTERS, WIDTH, WIDTH, generator=generator) / WIDTH**0.5)


def measure_clusters(seed: int, steps: int, names: tuple[str, ...] = tuple(RUNS)) -> dict[str, float]:
    """Held-out error of each router and, where tokens choose, purity, dead experts and information of the routing."""
    task, found = make_task(seed), {}
    for name in names:
        layer = _train(RUNS[name], task, seed, steps)
        x, y, kind = task.draw(torch.Generator().manual_seed(seed + 99))
        ids = _ids(x.shape[:2], seed + 98)
        with torch.no_grad():
            routing = layer.route(x, token_ids=ids)
            found[f"error_{name}"] = float((layer.combine(routing, x) - y).square().mean() / y.square().mean())
        if isinstance(routing, Routing):
            found[f"purity_{name}"] = purity(routing, kind)
            found[f"dead_{name}"] = routing.statistics()["dead"]
            found[f"information_{name}"] = -float(routing.loss({"information": 1.0}))
    return found


def purity(routing: Routing, kind: Tensor) -> float:
    """Share of (token, expert) pairs whose cluster is the commonest one of their expert: 1 / 8 and a bit by chance."""
    pairs = torch.einsum("bne,bnc->ec", routing.mask(), torch.nn.functional.one_hot(kind, CLUSTERS).float())
    return float(pairs.amax(1).sum() / pairs.sum())


def _train(run: Run, task: Task, seed: int, steps: int) -> MoELayer:
    generator = torch.Generator().manual_seed(seed)
    router = Router(run.rule, width=WIDTH, experts=CLUSTERS, causal=False, generator=generator)
    experts = Experts(experts=CLUSTERS, width=WIDTH, hidden=WIDTH, std=0.25, generator=generator)
    layer = MoELayer(router, experts, losses=run.losses)
    optimizer: Any = torch.optim.Adam(layer.parameters(), lr=1e-2)
    noise = torch.Generator().manual_seed(seed + 1)
    for step in range(steps):
        x, y, _ = task.draw(noise)
        layer.state.begin()
        loss = (layer(x, token_ids=_ids(x.shape[:2], seed + step), generator=noise) - y).square().mean()
        extra = layer.state.mean_loss()
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer.eval()


def _ids(shape: torch.Size, seed: int) -> Tensor:
    """Token ids that say nothing of the cluster."""
    return torch.randint(IDS, tuple(shape), generator=torch.Generator().manual_seed(seed))
