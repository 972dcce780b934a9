"""Which attention patterns the heads of a vision transformer have learned: an auto-encoder over them, clusters, and names.

After Li et al. 2023, arXiv 2303.13731; the network and the features are ours, as their details were not public to us.

Letters: B images, L layers, H query heads, S = B·L·H samples, W side of a pattern picture, Z latents, C clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.attach import HeadCall, attach, find_stack, fingerprint
from headwise.checks import whole
from headwise.errors import ScoreError
from headwise.modes import evaluating
from headwise.progress import track
from headwise.registry import register
from headwise.score._vision import Grid, batches, check_images, default_images, find_grid, look, say
from headwise.score._vit_autoencoder import SIDE, AutoEncoder, clusters, fit, name_of, patterns, plane
from headwise.score._vit_profile import attention_rows
from headwise.units import Fingerprint, HeadScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Atlas:
    """The patterns of every head on every image.

    latents (B, L, H, Z); cluster (B, L, H); plane (B, L, H, 2), the two leading components of the latents; pictures (C, 2, W, W), what
    the decoder makes of the centre of each cluster; mean (L, H, P, P), each head's mean attention of patches to patches; names, a
    rule-made word for each head.
    """

    latents: Tensor
    cluster: Tensor
    plane: Tensor
    pictures: Tensor
    mean: Tensor
    names: tuple[tuple[str, ...], ...]
    r2: float
    grid: Grid
    made_for: Fingerprint

    def content_dependence(self) -> Tensor:
        """(L, H): variance of a head's latents over images, over the variance of all samples; 0 = the same for every image.

        The mean over heads is at most 1; a head that varies more than heads differ from each other exceeds it.
        """
        total = self.latents.flatten(0, 2).var(0, correction=0).sum().clamp(min=1e-12)
        return self.latents.var(0, correction=0).sum(-1) / total

    def of_head(self) -> Tensor:
        """(L, H): the cluster that a head is in for most images; the lowest number among equals."""
        return self.cluster.mode(0).values

    def table(self, importance: Tensor) -> list[tuple[int, float, float, int]]:
        """(cluster, mean importance, mean layer, heads) of each cluster, by the heads that are mostly in it: why a head matters."""
        home, layers = self.of_head(), torch.arange(len(self.names), dtype=torch.float)[:, None]
        rows = []
        for c in home.unique().tolist():
            inside = home == c
            rows.append(
                (c, float(importance[inside].mean()), float(layers.expand_as(home)[inside].mean()), int(inside.sum()))
            )
        return rows


@register("score", "vit-patterns", paper="10")
def vit_patterns(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    images: Tensor | None = None,
    samples: int = 32,
    latent: int = 32,
    steps: int = 300,
    batch_size: int = 16,
    stack: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """How much the attention pattern of each head of a vision model depends on the image: 0 = always the same pattern.

    images (B, channels, S, S); by default `samples` drawn shapes. `atlas_of` gives patterns, clusters and names; `tokenizer` is not used.

    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-vit")
    >>> vit_patterns(model, None, samples=4, steps=2).values.shape
    torch.Size([2, 4])
    """
    chosen = default_images(model, whole("samples", samples, 1, ScoreError), seed, stack) if images is None else images
    found = atlas_of(
        model, chosen, latent=latent, steps=steps, batch_size=batch_size, stack=stack, seed=seed, progress=progress
    )
    return HeadScores(
        values=found.content_dependence(),
        method="vit-patterns",
        data=f"{len(chosen)} images",
        fingerprint=found.made_for,
        meta={"r2": found.r2, "latent": latent},
    )


def atlas_of(
    model: PreTrainedModel,
    images: Tensor,
    *,
    latent: int = 32,
    count: int = 12,
    steps: int = 600,
    grid: tuple[int, int] | None = None,
    batch_size: int = 16,
    stack: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Atlas:
    """Patterns of all heads on all images, an auto-encoder with `latent` numbers trained on them, and `count` clusters.

    Kept per sample is a picture of 2 · 15 · 15 numbers, not its attention; per head the mean attention of patches to patches.
    """
    images, _ = check_images(model, images)
    pictures, mean, prefix, where = _collect(model, images, grid, batch_size, stack, progress)
    B, L, H = pictures.shape[:3]
    flat = pictures.flatten(0, 2)
    groups = torch.arange(B).repeat_interleave(L * H)
    trained = fit(flat, groups, latent=latent, steps=steps, seed=seed)
    with torch.no_grad():
        latents = trained.model.encode(flat)
    labels = clusters(latents, count, seed)
    names = tuple(tuple(name_of(mean[l, h], where, float(prefix[l, h])) for h in range(H)) for l in range(L))
    return Atlas(
        latents=latents.unflatten(0, (B, L, H)),
        cluster=labels.view(B, L, H),
        plane=plane(latents).view(B, L, H, 2),
        pictures=_prototypes(trained.model, latents, labels),
        mean=mean,
        names=names,
        r2=trained.r2,
        grid=where,
        made_for=fingerprint(model, stack),
    )


@torch.no_grad()
def _collect(
    model: PreTrainedModel,
    images: Tensor,
    grid: tuple[int, int] | None,
    batch_size: int,
    stack: str | None,
    progress: bool,
) -> tuple[Tensor, Tensor, Tensor, Grid]:
    """(pictures (B, L, H, 2, W, W), mean attention (L, H, P, P), mean mass on prefix tokens (L, H), grid), on the CPU."""
    found = find_stack(model, stack)
    with evaluating(model):
        where = find_grid(model, images, look(model, images[:1], found, stack).tokens, grid, stack)
        T, parts = where.prefix, []
        total: dict[int, Tensor] = {}
        prefix: dict[int, Tensor] = {}
        for part, _ in track(list(batches(images, None, batch_size)), "attention patterns", progress):
            own: list[Tensor] = []

            def watch(call: HeadCall, out: Tensor, own: list[Tensor] = own) -> None:
                A = attention_rows(call)
                patch, layer = A[:, :, T:, T:], call.layer
                own.append(patterns(patch.flatten(0, 1), where).unflatten(0, patch.shape[:2]).float().cpu())
                total[layer] = _plus(total.get(layer), patch.sum(0).cpu())
                prefix[layer] = _plus(prefix.get(layer), A[:, :, T:, :T].sum((0, 3)).mean(-1).cpu())

            with attach(model, observers=[watch], stack=stack):
                say(model, part, found, T)
            parts.append(torch.stack(own, dim=1))
    n = len(images)
    mean, mass = (torch.stack([sums[layer] for layer in range(found.layers)]) / n for sums in (total, prefix))
    return torch.cat(parts), mean, mass, where


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


@torch.no_grad()
def _prototypes(model: AutoEncoder, latents: Tensor, labels: Tensor) -> Tensor:
    centres = torch.stack([latents[labels == c].mean(0) for c in range(int(labels.max()) + 1)])
    return model.decode(centres).view(-1, 2, SIDE, SIDE)
