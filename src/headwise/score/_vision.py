"""What a vision transformer looks like to the analysis of its heads: tokens on a grid, what it says, and where it is resumed.

Letters: B images, L layers, H query heads, N tokens, P patches, T prefix tokens (CLS, registers, distillation), C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.attach import HeadCall, Stack, attach, find_stack
from headwise.checks import whole
from headwise.errors import ScoreError
from headwise.tasks.shapes import make_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Grid:
    """Patches in rows and columns behind T prefix tokens."""

    rows: int
    columns: int
    prefix: int

    @property
    def patches(self) -> int:
        """P."""
        return self.rows * self.columns

    def offsets(self, device: Any = None) -> tuple[Tensor, Tensor]:
        """(dy, dx) from query patch i to key patch j, each (P, P)."""
        y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in (self.rows, self.columns)), indexing="ij")
        y, x = y.flatten(), x.flatten()
        return y[None] - y[:, None], x[None] - x[:, None]


@dataclass(frozen=True)
class Said:
    """What the model says of B images: logits (B, C), None without a classifier; embedding (B, width)."""

    logits: Tensor | None
    embedding: Tensor


def find_grid(
    model: PreTrainedModel, images: Tensor, tokens: int, grid: tuple[int, int] | None, stack: str | None
) -> Grid:
    """The grid of patches among `tokens` tokens. ScoreError where it cannot be told: give grid=(rows, columns)."""
    if grid is None:
        config = find_stack(model, stack).config
        patch = getattr(config, "patch_size", None)
        sides = patch if isinstance(patch, list | tuple) else (patch, patch)
        if not all(isinstance(side, int) for side in sides):
            raise ScoreError(f"{type(model).__name__} states no patch size: give grid=(rows, columns) of its patches")
        grid = (images.shape[-2] // sides[0], images.shape[-1] // sides[1])
    rows, columns = (whole("grid", n, 1, ScoreError) for n in grid)
    prefix = tokens - rows * columns
    if not 0 <= prefix <= 16:
        raise ScoreError(
            f"{tokens} tokens do not hold {rows} × {columns} patches behind 0 to 16 others: give grid=(rows, columns)"
        )
    return Grid(rows, columns, prefix)


def batches(images: Tensor, labels: Tensor | None, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images (and labels) in parts."""
    whole("batch_size", batch_size, 1, ScoreError)
    for at in range(0, len(images), batch_size):
        part = slice(at, at + batch_size)
        yield images[part], None if labels is None else labels[part]


def default_images(model: PreTrainedModel, count: int, seed: int, stack: str | None = None) -> Tensor:
    """Drawn shapes at the size that the model wants, (count, channels, S, S): something to look at without a data set."""
    config = find_stack(model, stack).config
    size, channels = getattr(config, "image_size", None), int(getattr(config, "num_channels", 3))
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if not all(isinstance(side, int) for side in sides):
        raise ScoreError(f"{type(model).__name__} states no image size: give images=")
    drawn = make_shapes(count, size=32, generator=torch.Generator().manual_seed(seed)).pixels
    pixels = torch.nn.functional.interpolate(drawn, sides, mode="bilinear")
    return pixels.expand(-1, channels, -1, -1).contiguous()


def check_images(model: PreTrainedModel, images: Any, labels: Any = None) -> tuple[Tensor, Tensor | None]:
    """Images (B, channels, S, S) and labels (B,) on the model's device and in its dtype; ScoreError for anything else."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ScoreError(f"images is {found}; it must be a tensor (B, channels, height, width) with at least one image")
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape != images.shape[:1]):
        raise ScoreError(f"labels must be a tensor of {len(images)} class numbers, one an image")
    images = images.to(model.device, next(model.parameters()).dtype)
    return images, None if labels is None else labels.to(model.device)


def say(model: PreTrainedModel, images: Tensor, stack: Stack, prefix: int) -> Said:
    """Logits and embedding: the final hidden state's first token, or the mean of all where no token stands before the patches."""
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
        kept.append(output[0] if hidden is None else hidden)

    handle = stack.owner.register_forward_hook(keep)
    try:
        output = _run(model, images)
    finally:
        handle.remove()
    hidden = kept[-1]
    return Said(getattr(output, "logits", None), hidden[:, 0] if prefix else hidden.mean(1))


def _run(model: PreTrainedModel, images: Tensor) -> Any:
    """The whole model, or its image tower where the model asks for text too (CLIP, SigLIP)."""
    tower = None if hasattr(model, "classifier") else getattr(model, "vision_model", None)
    return (model if tower is None else tower)(pixel_values=images)


@dataclass
class Seen:
    """One pass over a batch: what the model said, and (B, N, H, D) of every layer if asked for."""

    said: Said
    tokens: int
    outputs: list[Tensor]


def look(
    model: PreTrainedModel, images: Tensor, stack: Stack, name: str | None, prefix: int = 1, keep: bool = False
) -> Seen:
    """Run the model once and check that its attention sees one row of tokens per image. ScoreError for windowed attention."""
    outputs: list[Tensor] = []
    tokens: list[int] = []

    def watch(call: HeadCall, out: Tensor) -> None:
        if out.shape[0] != len(images):
            raise ScoreError(
                f"layer {call.layer} attends in {out.shape[0] // max(1, len(images))} windows an image: windowed attention has no "
                "single grid of patches, so it is not analysed"
            )
        tokens.append(out.shape[1])
        if keep:
            outputs.append(out.clone())

    with attach(model, observers=[watch], stack=name):
        said = say(model, images, stack, prefix)
    return Seen(said, tokens[0], outputs)
