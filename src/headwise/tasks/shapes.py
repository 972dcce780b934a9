"""Pictures of one textured shape each, drawn from a generator: data for small image models, with a class that can be read off.

Letters: B pictures, S pixels a side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.checks import whole
from headwise.errors import TaskError

SHAPES = ("disc", "square", "triangle", "ring")
TEXTURES = ("plain", "rows", "columns", "checks")


@dataclass(frozen=True)
class ShapeImages:
    """pixels (B, 1, S, S) in [-1, 1]; labels (B,) = shape · textures + texture."""

    pixels: Tensor
    labels: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.pixels)


def make_shapes(
    count: int, *, size: int = 16, shapes: int = 4, textures: int = 4, noise: float = 0.05, generator: torch.Generator
) -> ShapeImages:
    """`count` pictures of `shapes` × `textures` classes, as even as they can be, at random places, sizes and phases.

    >>> made = make_shapes(8, size=16, generator=torch.Generator().manual_seed(0))
    >>> made.pixels.shape, made.classes, float(made.pixels.abs().max()) <= 1
    (torch.Size([8, 1, 16, 16]), 16, True)
    """
    whole("count", count, 1, TaskError)
    whole("size", size, 8, TaskError)
    whole("shapes", shapes, 1, TaskError, len(SHAPES))
    whole("textures", textures, 1, TaskError, len(TEXTURES))
    classes = shapes * textures
    labels = torch.arange(count)[torch.randperm(count, generator=generator)] % classes
    draw = torch.rand(5, count, 1, 1, generator=generator)
    radius = (0.26 + 0.14 * draw[0]) * size
    y, x = (radius + (size - 2 * radius) * draw[i] for i in (1, 2))
    rows, columns = torch.meshgrid(*[torch.arange(size) + 0.5] * 2, indexing="ij")
    inside = _inside(rows - y, columns - x, radius, (labels // textures)[:, None, None])
    surface = _surface(rows, columns, draw[3] * 4, draw[4] * 4, (labels % textures)[:, None, None])
    pixels = torch.where(inside, surface, torch.tensor(-1.0))
    pixels = pixels + noise * torch.randn(count, size, size, generator=generator)
    return ShapeImages(pixels.clamp(-1, 1)[:, None], labels, classes)


def _inside(dy: Tensor, dx: Tensor, radius: Tensor, kind: Tensor) -> Tensor:
    """Which pixels belong to the shape, (B, S, S)."""
    distance = (dy**2 + dx**2).sqrt()
    side = radius / math.sqrt(2) * 1.2
    found = [
        distance < radius,
        (dy.abs() < side) & (dx.abs() < side),
        (dy < 0.8 * radius) & (dx.abs() < (dy + radius) * 0.65),
        (distance < radius) & (distance > 0.55 * radius),
    ]
    return torch.stack(found).gather(0, kind[None].expand(1, *distance.shape))[0]


def _surface(rows: Tensor, columns: Tensor, phase_y: Tensor, phase_x: Tensor, kind: Tensor) -> Tensor:
    """Brightness of the texture, (B, S, S): stripes and checks of period 4."""
    dark, bright = torch.tensor(-0.2), torch.tensor(1.0)
    up, left = (
        ((rows + phase_y) % 4 < 2).expand(len(kind), -1, -1),
        ((columns + phase_x) % 4 < 2).expand(len(kind), -1, -1),
    )
    found = [torch.ones_like(up), up, left, up ^ left]
    light = torch.stack(found).gather(0, kind[None].expand(1, *up.shape))[0]
    return torch.where(light, bright, dark)
