"""A small ViT classifier (a transformers class) and a recipe that trains it on drawn shapes in seconds.

Letters: B pictures, S pixels a side, C classes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.errors import TaskError
from headwise.models.loop import Run, train, warm_cosine

if TYPE_CHECKING:
    from transformers import ViTForImageClassification


def shape_vit(
    *, size: int = 24, patch: int = 4, width: int = 64, layers: int = 6, heads: int = 4, classes: int = 8, seed: int = 0
) -> ViTForImageClassification:
    """The model with random weights; `train_vit` trains it.

    >>> shape_vit()(pixel_values=torch.zeros(2, 1, 24, 24)).logits.shape
    torch.Size([2, 8])
    """
    from transformers import ViTConfig, ViTForImageClassification

    if size % patch or width % heads:
        raise TaskError(
            f"size={size}, patch={patch}, width={width}, heads={heads}: patch divides size, heads divide width"
        )
    config = ViTConfig(
        image_size=size,
        patch_size=patch,
        num_channels=1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_labels=classes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = ViTForImageClassification._from_config(config, attn_implementation="sdpa")
    return model.eval()


def train_vit(
    model: ViTForImageClassification,
    pixels: Tensor,
    labels: Tensor,
    *,
    steps: int = 300,
    batch: int = 64,
    lr: float = 3e-3,
    noise: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> ViTForImageClassification:
    """Cross-entropy on noisy pictures (B, 1, S, S) and labels (B,): Muon for the layers' matrices, AdamW for the rest. In place."""
    if len(pixels) != len(labels) or not len(pixels):
        raise TaskError(f"{len(pixels)} pictures and {len(labels)} labels; as many of both, at least one")
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and re.search(r"\.layers?\.", name)]
    ids = {id(p) for p in matrices}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW([p for p in model.parameters() if id(p) not in ids], lr=lr, weight_decay=0.01),
    ]

    def loss_of(step: int) -> Tensor:
        rows = torch.randint(len(pixels), (batch,), generator=generator)
        x = pixels[rows] + noise * torch.randn(batch, *pixels.shape[1:], generator=generator)
        return F.cross_entropy(model(pixel_values=x.to(model.device)).logits, labels[rows].to(model.device))

    run = Run(steps=steps, progress=progress, title="training a ViT")
    train(run, model, optimizers, loss_of, rate=warm_cosine(30, steps), generator=generator, clip=None)
    return model
