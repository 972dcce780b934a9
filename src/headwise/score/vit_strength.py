"""How far each head of a vision transformer looks: attention strength against spatial distance, layer by layer.

After Li et al. 2023, arXiv 2303.13731, whose equations were not public to us; ours, with k(i, j) the distance of two patches:

    strength s(k) = mean_i mean_{j: k(i,j)=k} A_ij        mass S(k) = mean_i sum_{j: k(i,j)=k} A_ij

so that sum_k S(k) and the mass on tokens that are no patches add up to 1.

Letters: B images, L layers, H query heads, K distances, P patches.
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
from headwise.score._vit_profile import Distance, Profiler, attention_rows, distances
from headwise.units import Fingerprint, HeadScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Strength:
    """Profiles of every head, means over images.

    (L, H, K): strength (weight per neighbour), mass, inner (strength of the patches away from the border). (L, H): distance
    (patches), entropy (nats), largest, patch_to_prefix, and, with prefix tokens, prefix_to_prefix and prefix_to_patch.
    """

    tables: dict[str, Tensor]
    grid: Grid
    images: int
    made_for: Fingerprint

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tables:
            raise ScoreError(f"{name!r} was not measured; there are {', '.join(self.tables)}")
        return self.tables[name]

    def layer_trend(self) -> tuple[Tensor, Tensor]:
        """Mean and spread (standard deviation) of the strength over the heads of each layer, both (L, K)."""
        strength = self["strength"]
        return strength.mean(1), strength.std(1, correction=0)


@register("score", "vit-strength", paper="10")
def vit_strength(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    images: Tensor | None = None,
    distance: Distance = "chebyshev",
    samples: int = 64,
    batch_size: int = 16,
    stack: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadScores:
    """Mean distance, in patches, over which each head of a vision model attends: 0 = to itself only.

    images (B, channels, S, S); by default `samples` drawn shapes. `strength_of` gives the whole profiles; `tokenizer` is not used.

    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-vit")
    >>> vit_strength(model, None, samples=2).values.shape
    torch.Size([2, 4])
    """
    chosen = default_images(model, whole("samples", samples, 1, ScoreError), seed, stack) if images is None else images
    found = strength_of(model, chosen, distance=distance, batch_size=batch_size, stack=stack, progress=progress)
    mass = found["mass"].sum(-1).clamp(min=1e-12)
    return HeadScores(
        values=found["distance"] / mass,
        method="vit-strength",
        data=f"{found.images} images",
        fingerprint=found.made_for,
        meta={"distance": distance, "grid": f"{found.grid.rows}x{found.grid.columns}"},
    )


@torch.no_grad()
def strength_of(
    model: PreTrainedModel,
    images: Tensor,
    *,
    distance: Distance = "chebyshev",
    renormalize: bool = False,
    without_top: float = 0.0,
    grid: tuple[int, int] | None = None,
    batch_size: int = 16,
    stack: str | None = None,
    progress: bool = False,
) -> Strength:
    """The profiles, over all images, in memory of L · H · K. The model keeps its fused attention; rows are recomputed in blocks.

    renormalize: rows are scaled to sum to 1 over patches. without_top: this share of the patches of each image and layer, those that draw
    most attention (sinks), does not count as keys.
    """
    images, _ = check_images(model, images)
    if not 0 <= without_top < 1:
        raise ScoreError(f"without_top={without_top}; a share of the patches in [0, 1)")
    stack_found = find_stack(model, stack)
    with evaluating(model):
        seen = look(model, images[:1], stack_found, stack)
        where = find_grid(model, images, seen.tokens, grid, stack)
        profiler = Profiler(where, distance, renormalize, without_top)
        with attach(model, observers=[profiler], stack=stack):
            for part, _ in track(list(batches(images, None, batch_size)), "attention strength", progress):
                say(model, part, stack_found, where.prefix)
    layers = [profiler.layers[layer] for layer in range(stack_found.layers)]
    tables = {name: torch.stack([one.parts[name] / one.count for one in layers]).float() for name in layers[0].parts}
    return Strength(tables, where, layers[0].count, fingerprint(model, stack))


@torch.no_grad()
def strength_map(
    model: PreTrainedModel,
    images: Tensor,
    *,
    head: tuple[int, int],
    hop: int = 1,
    distance: Distance = "chebyshev",
    grid: tuple[int, int] | None = None,
    stack: str | None = None,
) -> Tensor:
    """(rows, columns): how strongly each patch attends to its ring at distance `hop` with one head, mean over images and ring."""
    images, _ = check_images(model, images)
    stack_found, kept = find_stack(model, stack), []
    whole("layer", head[0], 0, ScoreError, stack_found.layers - 1)
    whole("head", head[1], 0, ScoreError, stack_found.heads - 1)

    def keep(call: HeadCall, out: Tensor) -> None:
        if call.layer == head[0]:
            kept.append(attention_rows(call)[:, head[1]].mean(0))

    with evaluating(model):
        where = find_grid(model, images, look(model, images[:1], stack_found, stack).tokens, grid, stack)
        with attach(model, observers=[keep], stack=stack):
            say(model, images, stack_found, where.prefix)
    ring = (distances(where, distance)[1] == whole("hop", hop, 0, ScoreError)).float().to(kept[0].device)
    patch = kept[0][where.prefix :, where.prefix :]
    found = (patch * ring).sum(-1) / ring.sum(-1).clamp(min=1)
    return found.view(where.rows, where.columns).cpu()
